"""The TensorRT sessions' orchestration, on a stand-in for GPU, CUDA and TensorRT (tests/support/gpu_stand_in).

No GPU has run this: test_tensorrt_session_gpu.py is for whoever has one.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_stand_in import ENGINES, SIZE, Gpu, assert_same, images, reference, write_plans
from gpu_stand_in.networks import MEMORY

from mdnet_engines.errors import MDNetError
from mdnet_engines.parity.gates import LIMITS_SCALE
from mdnet_engines.parity.measure import Images, measure
from mdnet_engines.sessions.session import run_graphs
from mdnet_engines.tensorrt.plan_builder import MODULES
from mdnet_engines.tensorrt.session import TensorRTSessions

MAX_BATCH = 6  # not a power of two: the largest size is
BATCHES = (1, 3, MAX_BATCH, 2 * MAX_BATCH + 1)
Plans = dict[Any, Path]


@pytest.fixture
def sessions(gpu: Gpu, plans: Plans) -> Iterator[TensorRTSessions]:
    with TensorRTSessions(plans, max_batch=MAX_BATCH) as opened:
        yield opened


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("runtime", MODULES)
def test_scores_are_those_of_the_graphs_in_a_chain(gpu: Gpu, plans: Plans, runtime: Any, cuda_graphs: bool) -> None:
    with TensorRTSessions(plans, runtime=runtime, max_batch=MAX_BATCH, cuda_graphs=cuda_graphs) as sessions:
        for turn in range(4):  # first, captured, and with other images in the same buffers
            for batch in BATCHES:
                pixels = images(batch, seed=turn)
                assert_same(sessions.run(pixels), {"score": reference(pixels)["score"]})
    assert bool(gpu.calls["cudaGraphLaunch"]) == cuda_graphs


def test_all_outputs_are_every_graphs(sessions: TensorRTSessions) -> None:
    for turn in range(3):
        for batch in BATCHES:
            pixels = images(batch, seed=turn)
            assert_same(sessions.run(pixels, all_outputs=True), reference(pixels))


def test_results_stay_when_the_next_batch_runs(sessions: TensorRTSessions) -> None:
    first = sessions.run(images(2, seed=1), all_outputs=True)
    sessions.run(images(2, seed=2), all_outputs=True)
    assert_same(first, reference(images(2, seed=1)))


def test_no_images_are_no_scores(sessions: TensorRTSessions, gpu: Gpu) -> None:
    assert_same(sessions.run(images(0), all_outputs=True), reference(images(0)))
    assert gpu.history == []


def test_padding_is_a_copy_of_the_last_image(sessions: TensorRTSessions, gpu: Gpu) -> None:
    sessions.run(images(4, seed=1))  # what would be in the padding rows if nobody wrote there
    gpu.seen.clear()
    pixels = images(3, seed=2)
    assert len(sessions.run(pixels)["score"]) == 3
    assert [graph for graph, _ in gpu.seen] != []
    for graph, given in gpu.seen:
        for name, rows in given.items():
            assert len(rows) == 4
            np.testing.assert_array_equal(rows[3], rows[2], err_msg=f"{graph} {name}")


@pytest.mark.parametrize(
    ("batch", "sizes"), [(1, [1]), (2, [2]), (3, [4]), (4, [4]), (5, [6]), (6, [6]), (7, [6, 1]), (15, [6, 6, 4])]
)
def test_a_batch_runs_in_pieces_of_few_sizes(
    sessions: TensorRTSessions, gpu: Gpu, batch: int, sizes: list[int]
) -> None:
    sessions.run(images(batch))
    assert [len(given["image"]) for graph, given in gpu.seen if graph == "encoder"] == sizes


def test_each_size_has_contexts_of_its_own(sessions: TensorRTSessions, gpu: Gpu) -> None:
    for batch in (1, 3, 4, 6, 1, 4, 5, 6, 3):  # of sizes 1, 4 and 6, changing; the stand-in notes a context's change
        sessions.run(images(batch))
    assert gpu.alive["context"] == 3 * len(ENGINES)
    assert gpu.alive["engine"] == len(ENGINES)


def test_a_size_is_enqueued_once_captured_once_and_then_only_launched(sessions: TensorRTSessions, gpu: Gpu) -> None:
    counts = []
    for batch in (4, 3, 4, 3):
        before = gpu.calls.copy()
        sessions.run(images(batch))
        counts.append(gpu.calls - before)
    enqueued, captured, *replayed = counts
    assert (enqueued["execute_async_v3"], enqueued["cudaGraphLaunch"]) == (3, 0)
    assert (captured["execute_async_v3"], captured["cudaGraphLaunch"], captured["cudaStreamBeginCapture"]) == (3, 1, 1)
    for calls in replayed:
        assert calls == {"cudaSetDevice": 1, "cudaMemcpyAsync": 2, "cudaGraphLaunch": 1, "cudaStreamSynchronize": 1}


@pytest.mark.parametrize("all_outputs", [False, True])
def test_the_host_waits_once_and_only_images_and_what_is_asked_for_are_copied(
    sessions: TensorRTSessions, gpu: Gpu, all_outputs: bool
) -> None:
    for _ in range(3):
        before = gpu.calls.copy()
        outputs = sessions.run(images(3), all_outputs=all_outputs)
        calls = gpu.calls - before
        assert calls["cudaStreamSynchronize"] == 1
        assert calls["cudaMemcpyAsync"] == 1 + len(outputs)


def test_nothing_orders_encoder_and_vim_and_fusion_comes_after_both(sessions: TensorRTSessions, gpu: Gpu) -> None:
    for turn in range(3):
        gpu.history.clear()
        sessions.run(images(2))
        copy_in, encoder, vim, fusion = (
            next(op for op in gpu.history if op.what == what) for what in ("copy", "encoder", "vim", "fusion")
        )
        assert encoder not in vim.before, turn
        assert vim not in encoder.before
        assert copy_in in encoder.before & vim.before
        assert {encoder, vim} <= fusion.before


def test_encoder_and_fusion_share_memory_for_activations_and_sizes_share_all(
    sessions: TensorRTSessions, gpu: Gpu
) -> None:
    for batch in (1, 3, 6):
        sessions.run(images(batch))
    scratch = {what: {op.writes[-1] for op in gpu.history if op.what == what} for what in ENGINES}
    assert scratch["encoder"] & scratch["fusion"] == set()  # the same memory, as much of it as each takes
    assert {start for start, _ in scratch["encoder"]} == {start for start, _ in scratch["fusion"]}
    assert {what: [end - start for start, end in used] for what, used in scratch.items()} == {
        what: [size] for what, size in MEMORY.items()
    }
    images_scores_and_features = 5
    assert gpu.alive["device memory"] == images_scores_and_features + 2


PROFILES = [[1, 1, 1], [2, 4, 4], [5, 8, 32]]


def test_each_size_runs_in_the_profile_that_takes_it(gpu: Gpu, tmp_path: Path) -> None:
    plans = write_plans(tmp_path, **{graph: {"profiles": PROFILES} for graph in ENGINES})
    with TensorRTSessions(plans, max_batch=MAX_BATCH) as sessions:
        for turn in range(3):
            for batch in BATCHES:
                assert_same(sessions.run(images(batch, seed=turn), all_outputs=True), reference(images(batch, turn)))
        (worker,) = sessions._workers.values()
        used = {size: {context._profile for context in each.values()} for size, each in worker._contexts.items()}
        assert used == {1: {0}, 4: {1}, 6: {2}}


@pytest.mark.parametrize(("max_batch", "part"), [(1, 1 / 32), (4, 4 / 32), (6, 1)])
def test_memory_is_taken_for_the_profiles_that_batches_can_reach(
    gpu: Gpu, tmp_path: Path, max_batch: int, part: float
) -> None:
    plans = write_plans(tmp_path, **{graph: {"profiles": PROFILES} for graph in ENGINES})
    with TensorRTSessions(plans, max_batch=max_batch) as sessions:
        sessions.run(images(1))
        scratch = {op.what: op.writes[-1] for op in gpu.history if op.what in ENGINES}
        assert {what: end - start for what, (start, end) in scratch.items()} == {
            what: int(size * part) for what, size in MEMORY.items()
        }


def test_a_profile_that_is_refused_is_one_line(gpu: Gpu, tmp_path: Path) -> None:
    plans = write_plans(tmp_path, **{graph: {"profiles": PROFILES} for graph in ENGINES})
    gpu.failing = {"set_optimization_profile_async": 2}
    with TensorRTSessions(plans, max_batch=MAX_BATCH) as sessions:
        sessions.run(images(1))
        with pytest.raises(MDNetError, match="TensorRT refused profile 1 of vim"):
            sessions.run(images(4))
        assert_same(sessions.run(images(4)), {"score": reference(images(4))["score"]})


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Run `work` in so many threads, all of them there until the last is done."""
    together = threading.Barrier(count)

    def one(number: int) -> Any:
        together.wait(timeout=30)
        try:
            return work(number)
        finally:
            together.wait(timeout=30)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_each_thread_has_contexts_of_its_own(sessions: TensorRTSessions, gpu: Gpu) -> None:
    def work(number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        batches = [images(batch, seed=number) for batch in (3, 1, 3, 7, 2, 4, 1)]
        return [(sessions.run(pixels)["score"], reference(pixels)["score"]) for pixels in batches]

    for pairs in in_threads(4, work):
        for got, expected in pairs:
            np.testing.assert_array_equal(got, expected)
    assert gpu.alive["engine"] == len(ENGINES)
    assert gpu.alive["stream"] == 2 * 4


def test_a_thread_that_ended_leaves_its_contexts_to_the_next(sessions: TensorRTSessions, gpu: Gpu) -> None:
    for number in range(5):
        pixels = images(3, seed=number)
        with ThreadPoolExecutor(1) as pool:
            got = pool.submit(sessions.run, pixels).result()
        assert_same(got, {"score": reference(pixels)["score"]})
    assert gpu.alive["stream"] == 2
    assert gpu.alive["context"] == len(ENGINES)


def test_all_threads_use_the_gpu_that_was_current(gpu: Gpu, plans: Plans) -> None:
    gpu.current = 1
    with TensorRTSessions(plans, max_batch=2) as sessions:
        in_threads(2, lambda number: sessions.run(images(2)))
        assert {memory.gpu for memory in gpu.memory} == {1}


def test_each_graph_runs_alone_as_a_session(sessions: TensorRTSessions) -> None:
    assert sessions.graphs["encoder"].inputs == ("image",)
    assert sessions.graphs["fusion"].outputs == ("score",)
    for batch in BATCHES:
        pixels = images(batch, seed=batch)
        expected = reference(pixels)
        assert_same(run_graphs(sessions.graphs, pixels), expected)
        features = {name: expected[name][::-1] + 1 for name in sessions.graphs["fusion"].inputs}
        assert_same(sessions.graphs["fusion"].run(features), ENGINES["fusion"].compute(**features))
        assert_same(sessions.run(pixels, all_outputs=True), expected)  # their runs leave the chain as it was


def test_the_parity_gates_run_on_it(sessions: TensorRTSessions) -> None:
    pixels = images(7)
    given = Images([f"{i}.png" for i in range(7)], pixels, "noise")
    report = measure(
        sessions.graphs, reference(pixels), given, precision="fp32", scale=LIMITS_SCALE, backend="tensorrt"
    )
    assert report.passed, [gate for gate in report.gates if gate.failed]


@pytest.mark.parametrize(
    ("feeds", "said"),
    [
        ({"tokens": np.zeros((1, SIZE, 2), np.float32)}, "needs the input down; it was given tokens"),
        ({"down": np.zeros((2, 3, 1))}, r"down is float64 \[2, 3, 1\]; the plan takes float32 \[2, 3, 2\]"),
        ({"mid": np.zeros((1, 3), np.float32)}, r"mid is float32 \[1, 3\]; the plan takes float32 \[2, 3\]"),
    ],
)
def test_feeds_that_do_not_fit_are_refused(
    sessions: TensorRTSessions, gpu: Gpu, feeds: dict[str, np.ndarray], said: str
) -> None:
    good = {name: value for name, value in reference(images(2)).items() if name != "score"}
    with pytest.raises(MDNetError, match=said):
        sessions.graphs["fusion"].run(feeds if "tokens" in feeds else {**good, **feeds})
    with pytest.raises(MDNetError, match=r"image is float64 .*; the plan takes uint8"):
        sessions.run(np.zeros((1, SIZE, SIZE, 3)))
    assert gpu.history == []


def test_everything_is_freed_what_depends_on_others_first(gpu: Gpu, plans: Plans) -> None:
    sessions = TensorRTSessions(plans, max_batch=MAX_BATCH)
    for _ in range(3):
        for batch in BATCHES:
            sessions.run(images(batch))
    assert gpu.alive["executable graph"] == 3
    gpu.destroyed.clear()
    sessions.close()
    order = {kind: [i for i, each in enumerate(gpu.destroyed) if each == kind] for kind in gpu.destroyed}
    # Each size's graph goes before its contexts, all contexts before the memory, and the engines last.
    assert order["executable graph"][0] < order["context"][0]
    assert order["executable graph"][-1] < order["context"][-1] < order["device memory"][0]
    assert order["device memory"][-1] < order["stream"][0]
    assert order["stream"][-1] < order["engine"][0]
    assert order["engine"][-1] < order["runtime"][0]
    assert gpu.leaks() == {}
    sessions.close()
    with pytest.raises(MDNetError, match="closed"):
        sessions.run(images(1))
    with pytest.raises(MDNetError, match="closed"):
        sessions.graphs["vim"].run({"image": images(1)})


def test_close_waits_for_the_batches_that_run(gpu: Gpu, plans: Plans, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions, cuda = TensorRTSessions(plans, max_batch=2), sys.modules["cuda.bindings.runtime"]
    pixels, running, go_on, copy = images(2), threading.Event(), threading.Event(), cuda.cudaMemcpyAsync

    def slowly(*arguments: Any) -> Any:
        running.set()
        assert go_on.wait(timeout=30)
        return copy(*arguments)

    monkeypatch.setattr(cuda, "cudaMemcpyAsync", slowly)
    with ThreadPoolExecutor(2) as pool:
        batch = pool.submit(sessions.run, pixels)
        assert running.wait(timeout=30)
        closing = pool.submit(sessions.close)
        time.sleep(0.2)  # enough for a close that would not wait; more can't fail
        assert not closing.done()
        go_on.set()
        closing.result(timeout=30)
        assert_same(batch.result(timeout=30), {"score": reference(pixels)["score"]})


def test_a_batch_that_begins_while_the_sessions_close_is_refused(
    gpu: Gpu, plans: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = TensorRTSessions(plans, max_batch=2)
    sessions.run(images(1))
    found = sessions._worker()  # all that a batch did before the other thread closed
    sessions.close()
    monkeypatch.setattr(sessions, "_worker", lambda: found)
    with pytest.raises(MDNetError, match="closed"):
        sessions.run(images(1))


def test_a_plan_of_tensorrt_rtx_that_can_not_be_captured_is_refused_or_enqueued(gpu: Gpu, tmp_path: Path) -> None:
    plans = write_plans(tmp_path, encoder={"capturable": False})
    with TensorRTSessions(plans, runtime="tensorrt-rtx", max_batch=2) as sessions:
        sessions.run(images(2))
        with pytest.raises(MDNetError, match=r"encoder\.plan can't be captured .* REQUIRE_USER_ALLOCATION"):
            sessions.run(images(2))
    with TensorRTSessions(plans, runtime="tensorrt-rtx", max_batch=2, cuda_graphs=False) as sessions:
        for _ in range(3):
            assert_same(sessions.run(images(2)), {"score": reference(images(2))["score"]})


def test_importing_the_modules_imports_nothing_of_nvidia() -> None:
    code = "import sys, mdnet_engines.tensorrt.session; print(*sys.modules, sep='\\n')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    imported = result.stdout.split()
    assert "mdnet_engines.cuda.runtime" in imported
    assert not [module for module in imported if module.startswith(("tensorrt", "cuda.", "nvidia"))]
