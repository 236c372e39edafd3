"""What TensorRT sessions can't be opened with, and what fails later: one line for the user, and nothing left behind."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from gpu_stand_in import Gpu, assert_same, images, reference, write_plans, write_weights
from gpu_stand_in.cuda import FUNCTIONS

from mdnet_engines.cuda import runtime
from mdnet_engines.errors import GpuLostError, MDNetError, UsageError
from mdnet_engines.tensorrt.session import TensorRTSessions

MAX_BATCH = 6
Plans = dict[Any, Path]


def scenario(plans: Plans, runtime: Any = "tensorrt") -> None:
    """Two sizes: enqueued, captured, launched; and one graph alone."""
    with TensorRTSessions(plans, runtime=runtime, max_batch=2) as sessions:
        for _ in range(3):
            for batch in (2, 1):
                sessions.run(images(batch), all_outputs=True)
        sessions.graphs["vim"].run({"image": images(1)})


FREEING = [name for name in FUNCTIONS if "Free" in name or "Destroy" in name]
OF_THE_CACHE = ("cudaGetDeviceProperties", "cudaDriverGetVersion")  # test_runtime_cache.py
MAY_FAIL = [name for name in FUNCTIONS if name not in (*FREEING, *OF_THE_CACHE, "cudaGetErrorString")]
MAY_FAIL += ["Runtime", "deserialize_cuda_engine", "create_runtime_config", "create_execution_context"]
MAY_FAIL += ["set_input_shape", "set_tensor_address", "execute_async_v3"]


@pytest.mark.parametrize("name", MAY_FAIL)
def test_whatever_fails_is_one_line_and_leaves_nothing(gpu: Gpu, plans: Plans, name: str) -> None:
    scenario(plans)
    times, failures = gpu.calls[name], 0
    assert times
    for turn in range(1, times + 1):
        gpu.failing = {name: gpu.calls[name] + turn}
        try:
            scenario(plans)
        except MDNetError as error:  # held while what is left is counted: its traceback must keep nothing alive
            failures += 1
            assert "\n" not in str(error)
            assert gpu.leaks() == {}, turn
        gpu.failing = {}
        assert gpu.leaks() == {}, turn
        assert gpu.problems == [], turn
    # Only at close do failures stay quiet: it sets the device and waits for the streams, whatever comes of it.
    at_close = {"cudaSetDevice": 1, "cudaStreamSynchronize": 2}
    assert failures == times - at_close.get(name, 0)


@pytest.mark.parametrize("name", FREEING)
def test_what_can_not_be_freed_does_not_keep_the_rest(gpu: Gpu, plans: Plans, name: str) -> None:
    scenario(plans)
    for turn in range(1, gpu.calls[name] + 1):
        gpu.failing = {name: gpu.calls[name] + turn}
        scenario(plans)
        gpu.failing = {}
        assert sum(gpu.leaks().values()) == 1
        gpu.alive.clear()
    if name == "cudaGraphExecDestroy":  # what is left of it is that
        assert {problem.partition(",")[0] for problem in gpu.problems} == {"a context was destroyed while it ran"}
        gpu.problems.clear()


@pytest.mark.parametrize("name", ["execute_async_v3", "cudaGraphInstantiate", "cudaMemcpyAsync", "cudaEventRecord"])
def test_the_next_batch_runs_after_one_that_failed(gpu: Gpu, plans: Plans, name: str) -> None:
    with TensorRTSessions(plans, max_batch=2) as sessions:
        sessions.run(images(2))
        gpu.failing = {name: gpu.calls[name] + 2 - (name == "cudaGraphInstantiate")}
        with pytest.raises(MDNetError):
            sessions.run(images(2, seed=1))
        assert gpu.pending == []  # nothing still reads the buffers that the next batch is written to
        for seed in (2, 3):
            assert_same(sessions.run(images(2, seed=seed)), {"score": reference(images(2, seed=seed))["score"]})


def test_a_failure_says_what_tensorrt_logged_and_running_out_of_memory_what_to_do(gpu: Gpu, plans: Plans) -> None:
    gpu.failing = {"execute_async_v3": 2}
    with TensorRTSessions(plans, max_batch=2) as sessions:
        with pytest.raises(MDNetError) as caught:
            sessions.run(images(1))
        assert str(caught.value) == "TensorRT failed to run vim: Error Code 1: Cuda Runtime (unlucky)"
    gpu.failing = {"cudaMalloc": gpu.calls["cudaMalloc"] + 1}
    said = r"cudaMalloc .*MemoryAllocation.*; use a smaller batch size"
    with TensorRTSessions(plans, max_batch=2) as sessions, pytest.raises(MDNetError, match=said):
        sessions.run(images(1))


def test_a_plan_that_tensorrt_refuses_is_to_be_rebuilt(gpu: Gpu, plans: Plans) -> None:
    plans["vim"].write_bytes(b"\x00\x01")
    with pytest.raises(MDNetError) as caught:
        TensorRTSessions(plans, max_batch=2)
    assert str(caught.value) == (
        "TensorRT can't load vim.plan, built for another GPU or version: Error Code 6: Internal Error (it is not mine)"
        "; rebuild with: mdnet-export engines BUNDLE --backend tensorrt"
    )
    plans["vim"].unlink()
    with pytest.raises(MDNetError, match=r"vim\.plan can't be read: No such file"):
        TensorRTSessions(plans, max_batch=2)


def test_on_the_second_gpu_the_command_that_rebuilds_is_for_that_one(gpu: Gpu, plans: Plans) -> None:
    plans["encoder"].write_bytes(b"\x00")
    gpu.current = 1
    with pytest.raises(
        MDNetError, match=r"can't load encoder\.plan on GPU 1, .*: CUDA_VISIBLE_DEVICES=1 mdnet-export "
    ):
        TensorRTSessions(plans, max_batch=2)


def test_plans_with_code_for_the_cpu_are_loaded_only_where_that_is_allowed(gpu: Gpu, tmp_path: Path) -> None:
    plans = write_plans(tmp_path, vim={"host_code": True})
    with pytest.raises(MDNetError, match=r"can't load vim\.plan.*a runtime of its own, which is not allowed"):
        TensorRTSessions(plans, max_batch=2)
    with TensorRTSessions(plans, max_batch=2, host_code=True) as sessions:
        assert_same(sessions.run(images(2)), {"score": reference(images(2))["score"]})


# ------------------------------------------------------------------------------------------------------ without weights


@pytest.fixture
def stripped(tmp_path: Path) -> Plans:
    return write_plans(tmp_path, **{graph: {"stripped": True} for graph in ("encoder", "vim", "fusion")})


@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_plans_without_weights_get_those_of_their_graphs(
    gpu: Gpu, stripped: Plans, tmp_path: Path, runtime: Any
) -> None:
    weights = write_weights(tmp_path)
    with TensorRTSessions(stripped, runtime=runtime, max_batch=2, weights=weights) as sessions:
        for _ in range(3):
            assert_same(sessions.run(images(2), all_outputs=True), reference(images(2)))


def no_graph(folder: Path, weights: Plans) -> None:
    weights["encoder"].unlink()


def no_data(folder: Path, weights: Plans) -> None:
    (folder / "encoder.onnx.data").unlink()


def another_graph(folder: Path, weights: Plans) -> None:
    weights["encoder"], weights["vim"] = weights["vim"], weights["encoder"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            no_graph,
            r"encoder\.plan is without weights, and .*/encoder\.onnx is missing; copy the whole bundle, or build",
        ),
        (no_data, r"weights of encoder\.onnx into encoder\.plan \(Failed to open file: encoder\.onnx\.data\); build"),
        (another_graph, r"weights of vim\.onnx into encoder\.plan \(it has no conv_in\.weight\); build plans with"),
        (None, r"encoder\.plan is without weights, and its graph was not named; open it by its bundle, or build"),
    ],
)
def test_weights_that_are_missing_or_of_another_graph_are_one_line(
    gpu: Gpu, stripped: Plans, tmp_path: Path, damage: Any, said: str
) -> None:
    weights = write_weights(tmp_path) if damage else None
    if damage:
        damage(tmp_path, weights)
    with pytest.raises(MDNetError, match=said) as caught:
        TensorRTSessions(stripped, max_batch=2, weights=weights)
    assert str(caught.value).isprintable()
    assert gpu.leaks() == {}  # with the error still held: its traceback keeps nothing alive


@pytest.mark.parametrize("name", ["Refitter", "refit_from_file", "refit_cuda_engine"])
def test_a_refit_that_fails_is_one_line_and_leaves_nothing(
    gpu: Gpu, stripped: Plans, tmp_path: Path, name: str
) -> None:
    weights = write_weights(tmp_path)
    for turn in (1, 2, 3):
        gpu.failing = {name: gpu.calls[name] + turn}
        with pytest.raises(MDNetError, match=r"TensorRT can't put the weights of \w+\.onnx into \w+\.plan") as caught:
            TensorRTSessions(stripped, max_batch=2, weights=weights)
        assert str(caught.value).isprintable()
        assert gpu.leaks() == {}


# ---------------------------------------------------------------------------------------------- a driver that goes away


@pytest.mark.parametrize("when", ["first", "captured", "launched"])
def test_a_gpu_that_is_lost_is_one_line_with_the_next_step(gpu: Gpu, plans: Plans, when: str) -> None:
    sessions = TensorRTSessions(plans, max_batch=2)
    for _ in range(["first", "captured", "launched"].index(when)):
        sessions.run(images(2))
    gpu.lost = True
    for _ in range(2):  # and it stays so
        with pytest.raises(GpuLostError, match="has lost the GPU: look at nvidia-smi, then start it again") as caught:
            sessions.run(images(2))
        assert str(caught.value).isprintable()
    sessions.close()
    for noted in (gpu.alive, gpu.pending, gpu.problems):  # nothing on a lost GPU can be freed
        noted.clear()


def test_a_gpu_that_is_lost_in_tensorrts_own_calls_is_named_too(
    gpu: Gpu, plans: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = sys.modules["cuda.bindings.runtime"]
    with TensorRTSessions(plans, max_batch=2) as sessions:
        sessions.run(images(1))
        record = cuda.cudaEventRecord

        def and_then(*arguments: Any) -> Any:
            answer = record(*arguments)
            gpu.lost = True
            return answer

        monkeypatch.setattr(cuda, "cudaEventRecord", and_then)
        monkeypatch.setattr(cuda, "cudaStreamWaitEvent", lambda *_: (cuda.cudaError_t.cudaSuccess,))
        with pytest.raises(GpuLostError) as caught:
            sessions.run(images(2))
        said = str(caught.value)
        assert said.startswith("TensorRT failed to run encoder: Error Code 1: Cuda Runtime (no device); cudaStreamSync")
        assert said.endswith("this process has lost the GPU: look at nvidia-smi, then start it again")
    gpu.alive.clear()
    gpu.pending.clear()


def test_every_error_that_is_for_good_is_one_of_cudas() -> None:
    real = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    assert {status.name for status in real.cudaError_t} >= runtime._FOR_GOOD


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder": {"batches": [1, 2, 4]}}, r"encoder\.plan takes batches of 1 to 4; expected 1 to 6"),
        ({"vim": {"batches": [2, 4, 8]}}, r"vim\.plan takes batches of 2 to 8; expected 1 to 6"),
        (
            {"vim": {"profiles": [[1, 1, 1], [3, 4, 8]]}},
            r"vim\.plan takes batches of 1 to 1 and 3 to 8; expected 1 to 6",
        ),
        ({"vim": {"batch": 1}}, r"vim: image is UINT8 \[1, 4, 4, 3\]; expected a batch of rows"),
        ({"fusion": {"row": (-1, 2)}}, r"fusion: down is FLOAT \[-1, -1, 2\]; expected a batch of rows"),
        ({"fusion": {"dtype": "INT64"}}, r"fusion: down is INT64"),
        ({"encoder": {"row": (8, 8, 3)}}, r"the plans disagree on image"),
        ({"fusion": {"is": "vim"}}, r"not a bundle's encoder, vim and fusion"),
        ({"vim": {"is": "encoder"}}, r"not a bundle's encoder, vim and fusion"),
    ],
)
def test_plans_that_can_not_run_together_are_refused(
    gpu: Gpu, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(MDNetError, match=said):
        TensorRTSessions(write_plans(tmp_path, **changes), max_batch=MAX_BATCH)
    assert gpu.leaks() == {}


def test_arguments_out_of_range_are_usage_errors(gpu: Gpu, plans: Plans) -> None:
    with pytest.raises(UsageError, match="unknown runtime 'tensor'; known: tensorrt, tensorrt-rtx"):
        TensorRTSessions(plans, runtime="tensor", max_batch=1)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="max_batch is 0"):
        TensorRTSessions(plans, max_batch=0)


@pytest.mark.parametrize("status", ["cudaErrorInsufficientDriver", "cudaErrorNoDevice", "cudaSuccess"])
def test_without_a_gpu_nothing_of_tensorrt_is_called(
    gpu: Gpu, plans: Plans, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    cuda = sys.modules["cuda.bindings.runtime"]
    monkeypatch.setattr(cuda, "cudaGetDeviceCount", lambda: (cuda.cudaError_t[status], 0))
    monkeypatch.delitem(sys.modules, "tensorrt")
    with pytest.raises(MDNetError, match="TensorRT needs an NVIDIA GPU") as caught:
        TensorRTSessions(plans, max_batch=1)
    assert "\n" not in str(caught.value)


def old(version: str) -> ModuleType:
    module = ModuleType("tensorrt")
    module.__version__ = version  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(
    ("name", "installed", "said"),
    [
        ("cuda.bindings.runtime", None, r"cuda-bindings can't be imported .* mdnet\[tensorrt\]"),
        ("tensorrt", None, r"TensorRT can't be imported; it is the extra mdnet\[tensorrt\]"),
        ("tensorrt", old("10.13.3.9"), r"TensorRT 10\.13\.3\.9 is too old"),
        ("tensorrt_rtx", None, r"TensorRT-RTX can't be imported; it is the extra mdnet\[rtx\]"),
    ],
)
def test_a_library_that_is_missing_or_too_old_is_one_line(
    gpu: Gpu, plans: Plans, monkeypatch: pytest.MonkeyPatch, name: str, installed: ModuleType | None, said: str
) -> None:
    monkeypatch.setitem(sys.modules, name, installed)
    runtime: Any = "tensorrt-rtx" if name == "tensorrt_rtx" else "tensorrt"
    with pytest.raises(MDNetError, match=said) as caught:
        TensorRTSessions(plans, runtime=runtime, max_batch=1)
    assert "\n" not in str(caught.value)
