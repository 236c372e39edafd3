"""`mdnet-rt bench`: honest figures, contestants in processes of their own, and what goes wrong in one line."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from scipy import stats

from mdnet_engines.bundle.files import Bundle
from mdnet_engines.bundle.manifest import Manifest, TensorSpec
from mdnet_engines.errors import MDNetError, UsageError
from mdnet_engines.system.child_process import CrashError
from mdnet_engines.system.machine import this_machine
from mdnet_rt.bench import clock as bench_clock
from mdnet_rt.bench import run as bench
from mdnet_rt.bench.process import Worker
from mdnet_rt.bench.sample import decode, make_jpegs, take_images
from mdnet_rt.cli.main import main
from mdnet_rt.rows.result import Stamp

LINUX = sys.platform == "linux"
COMMAND = [sys.executable, "-c", "from mdnet_rt.cli.main import main; main()", "bench"]


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["bench", *(str(arg) for arg in args)])


@pytest.fixture
def setup(shared_bundle: Path) -> bench.Setup:
    return bench.Setup(shared_bundle, Bundle.open(shared_bundle).manifest, backend="onnxruntime-cpu", rounds=4)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Write a module that a worker can be started with: what it does when it is to run, and at its start."""

    def write(run: str, start: str = "") -> str:
        (tmp_path / "contestant.py").write_text(
            "import os, signal, sys\n"
            "from mdnet_engines.system.child_process import serve\n"
            "from mdnet_engines.errors import MDNetError, UsageError\n"
            f"{start}\n"
            f"def run(request, say):\n    {run or 'pass'}\n"
            "serve({'open': lambda request, say: {'threads': request['threads']}, 'run': run})\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return "contestant"

    return write


def test_a_row_has_the_percentiles_throughput_and_ratios_of_its_runs() -> None:
    random = np.random.default_rng(0)
    own, other = random.gamma(2, 0.01, 101).tolist(), random.gamma(3, 0.01, 101).tolist()
    row = bench.make_row("graphs", "pytorch", 4, other, own)
    expected = [1e3 * stats.scoreatpercentile(other, p) for p in (50, 90, 99)]
    assert [row.p50_ms, row.p90_ms, row.p99_ms] == pytest.approx(expected)
    assert row.images_per_second == pytest.approx(4 / statistics.mean(other))
    ratios = sorted(b / a for a, b in zip(own, other, strict=True))
    assert row.ratio == bench.Ratio(*(pytest.approx(ratios[i]) for i in (50, 25, 75)))
    assert bench.make_row("graphs", "auto", 4, own, None).ratio is None


class Fake:
    """A contestant whose runs take what the test says; it notes who was run when."""

    log: list[tuple[str, str]] = []  # noqa: RUF012 (the test clears it)
    drift = 1.0

    def __init__(self, name: str, program: list[str], options: object, *, threads: int):
        self.name = name

    def ready(self) -> dict[str, Any]:
        parts = {"encoder": 2, "vim": 2, "fusion": 2, "graphs": 2}
        runs = parts if self.name == "pytorch" else {"decode": 2, **parts, "end to end": 8}
        return {"images_per_run": runs, "graphs": {}}

    def run(self, stage: str) -> float:
        Fake.log.append((stage, self.name))
        Fake.drift += 0.01  # a machine that slows down all the time
        return Fake.drift * (3.0 if self.name == "pytorch" else 1.0)

    def peak_memory(self) -> int:
        return 123

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_contestants_take_turns_so_that_drift_hits_all_alike(
    setup: bench.Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "Worker", Fake)
    monkeypatch.setattr(Fake, "log", [])
    monkeypatch.setattr(Fake, "drift", 1.0)
    result = bench.measure(replace(setup, against=("pytorch",)), 2)
    order = [name for stage, name in Fake.log if stage == "graphs"]
    own = "onnxruntime-cpu"
    # The first round warms up; then every other round is turned.
    assert order == [own, "pytorch", own, "pytorch", "pytorch", own, own, "pytorch", "pytorch", own]
    assert result.rounds == 4
    rows = {(row.stage, row.contestant): row for row in result.rows}
    assert set(rows) == {
        *((stage, own) for stage in bench.STAGES),
        *((stage, "pytorch") for stage in ("encoder", "vim", "fusion", "graphs")),
    }
    for (_, name), row in rows.items():
        assert row.runs == 4
        if name == "pytorch":
            # Each pair is one step of the drift apart, to either side; whole runs after one another would be some 20.
            assert row.ratio is not None
            assert row.ratio.median == pytest.approx(3.0, rel=0.01)
    assert rows["end to end", own].images == 8


def test_time_is_kept_but_three_rounds_are_always_run(setup: bench.Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "Worker", Fake)
    assert bench.measure(replace(setup, rounds=None, seconds=1e-9), 1).rounds == 3
    clock = iter(range(1000))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(clock)))  # a second for each look at it
    assert bench.measure(replace(setup, rounds=None, seconds=10), 1).rounds == 9


def test_the_file_has_every_stage_and_what_a_reader_needs(shared_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    options = ("--backend", "onnxruntime-cpu", "--against", "onnxruntime-cpu", "--threads", 1, "--rounds", 2)
    result = run(shared_bundle, *options, "--batch-sizes", "1,3", "--image-size", "60x40", "-o", out)
    assert result.exit_code == 0, result.stderr
    found = json.loads(out.read_text())
    manifest = Bundle.open(shared_bundle).manifest
    assert found["bundle"]["digest"] == Stamp.of(manifest).bundle
    assert (found["bundle"]["preset"], found["bundle"]["precision"]) == ("tiny", "fp32")
    assert (found["baseline"], found["threads"]) == ("onnxruntime-cpu", 1)
    assert found["machine"]["cores_usable"] >= 1
    assert found["machine"]["instruction_sets"] == this_machine().features
    assert {"python", "mdnet", "numpy", "pillow"} <= set(found["versions"])
    assert [batch["batch_size"] for batch in found["batches"]] == [1, 3]
    for batch in found["batches"]:
        n = batch["batch_size"]
        own, again = batch["contestants"]["onnxruntime-cpu"], batch["contestants"]["onnxruntime-cpu (again)"]
        assert own["graphs"] == again["graphs"] == dict.fromkeys(("encoder", "vim", "fusion"), "onnxruntime-cpu")
        assert "60x40" in own["images"]["source"]
        if LINUX:  # the peak of that process, not of this one, which has scipy in it and more
            assert 2**24 < own["peak_memory_bytes"] < 2**29
        for row in batch["rows"]:
            assert row["runs"] == 2
            assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
            assert row["images"] == (4 * n if row["stage"] == "end to end" else n)
            assert (row["ratio"] is None) == (row["contestant"] == "onnxruntime-cpu")
        assert [row["stage"] for row in batch["rows"] if row["ratio"] is None] == list(bench.STAGES)
        assert [row["stage"] for row in batch["rows"] if row["ratio"]] == list(bench.STAGES[1:])
    for word in ("batch 1, 2 rounds", "batch 3, 2 rounds", "end to end", "images/s", "(again)"):
        assert word in result.stdout


def test_images_of_a_folder_are_used_and_bad_ones_told_of(
    shared_bundle: Path, photo: Callable[..., Path], tmp_path: Path
) -> None:
    photo("photos/a.png")
    photo("photos/c.png", seed=1)
    (tmp_path / "photos" / "b.jpg").write_text("not an image")
    out = tmp_path / "figures.json"
    options = ("--backend", "onnxruntime-cpu", "--rounds", 1, "--batch-sizes", 2, "-o", out)
    result = run(shared_bundle, "--images", tmp_path / "photos", *options)
    assert result.exit_code == 0, result.stderr
    assert "1 that can't be read left out" in result.stderr
    (batch,) = json.loads(out.read_text())["batches"]
    images = batch["contestants"]["onnxruntime-cpu"]["images"]
    assert images == {"source": [str(tmp_path / "photos")], "distinct": 2, "skipped": 1}


def test_a_model_of_faces_is_timed_on_faces_or_without_the_search(face_bundle: Path, tmp_path: Path) -> None:
    """The JPEGs that are made show none."""
    portrait = Path(__file__).parents[2] / "data" / "portrait.jpg"
    for images in ((), ("--images", portrait)):
        out = tmp_path / "figures.json"
        options = ("--backend", "onnxruntime-cpu", "--rounds", 1, "--batch-sizes", 1, "-o", out)
        result = run(face_bundle, *images, *options)
        assert result.exit_code == 0, result.stderr
        assert "warning" not in result.stderr
        assert json.loads(out.read_text())["bundle"]["face"] == 1.2


def test_a_benchmark_without_a_readable_image_ends_in_one_line(shared_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("not an image")
    result = run(shared_bundle, "--backend", "onnxruntime-cpu", "--images", tmp_path / "a.jpg")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: onnxruntime-cpu: none of the 1 images can be read")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--against", "caffe"), "'caffe' is not one of"),
        (("--batch-sizes", "1,x"), "expected numbers from 1 to 1024"),
        (("--batch-sizes", "0"), "expected numbers from 1 to 1024"),
        (("--image-size", "350"), "expected a width and height"),
        (("--image-size", "0x10"), "expected a width and height"),
        (("--images", "nowhere.jpg"), "does not exist"),
        (("-o", "nowhere/figures.json"), "does not exist; create it"),
    ],
)
def test_bad_options_are_refused_before_anything_is_started(
    shared_bundle: Path, options: tuple[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    result = run(shared_bundle, *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_bundle_of_no_known_preset_has_no_pytorch_to_run_against(shared_bundle: Path) -> None:
    result = run(shared_bundle, "--backend", "onnxruntime-cpu", "--against", "pytorch")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: pytorch: no preset 'tiny'; known: ")


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs the [train] extra")
def test_pytorch_is_run_part_by_part_where_it_is_the_bundles_size(setup: bench.Setup) -> None:
    sizes = {"down_s16": [48, 8, 8], "down_s32": [64, 4, 4], "mid_s64": [64, 2, 2], "tokens": [65, 48]}
    result = bench.measure(replace(setup, manifest=as_demo(setup.manifest, sizes), against=("pytorch",), rounds=1), 2)
    rows = [row for row in result.rows if row.contestant == "pytorch"]
    assert [row.stage for row in rows] == ["encoder", "vim", "fusion", "graphs"]
    assert all(row.ratio is not None and row.ratio.median > 0 for row in rows)
    assert result.contestants["pytorch"]["shapes"] == sizes


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs the [train] extra")
def test_pytorch_is_refused_where_the_bundle_is_another_size_than_its_preset(setup: bench.Setup) -> None:
    sizes = {"down_s16": [48, 8, 8], "down_s32": [64, 4, 4], "mid_s64": [64, 2, 2], "tokens": [226, 48]}  # stride 8
    message = r"^pytorch: the preset demo gives tokens \[65, 48\], this bundle \[226, 48\]; "
    with pytest.raises(UsageError, match=message):
        bench.measure(replace(setup, manifest=as_demo(setup.manifest, sizes), against=("pytorch",), rounds=1), 2)


def as_demo(manifest: Manifest, outputs: dict[str, list[int]]) -> Manifest:
    """The manifest of a bundle of the preset `demo`, the encoder's and Vim's outputs being `outputs`."""
    specs = [TensorSpec(name=name, dtype="float32", shape=["batch", *shape]) for name, shape in outputs.items()]
    encoder = manifest.graphs["encoder"].model_copy(update={"outputs": specs})
    return manifest.model_copy(
        update={
            "preset": "demo",
            "preprocessing": manifest.preprocessing.model_copy(update={"image_size": 128}),
            "graphs": {**manifest.graphs, "encoder": encoder},
        }
    )


def test_a_backend_that_is_not_for_this_bundle_is_named(shared_bundle: Path) -> None:
    result = run(shared_bundle, "--backend", "onnxruntime-cpu", "--against", "openvino-bf16")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: openvino-bf16: ")


@pytest.mark.usefixtures("deadline")
def test_a_worker_that_ends_by_an_error_is_one_line_with_its_name(module: Callable[..., str]) -> None:
    with Worker("it", ["-m", module("raise MDNetError('no memory')")], {}, threads=1) as worker:
        assert worker.ready() == {"threads": 1}
        with pytest.raises(MDNetError, match=r"^it: no memory$"):
            worker.run("graphs")
        with pytest.raises(MDNetError, match=r"^it's process ended "):  # and again, where the pipe is closed
            worker.run("graphs")


@pytest.mark.usefixtures("deadline")
@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", r"^it's process was killed \(out of memory\?\)$"),
        ("print('last', file=sys.stderr); os.abort()", r"^it's process was ended by SIGABRT, having said: last$"),
        ("os._exit(3)", r"^it's process ended without an answer \(exit code 3\)$"),
        ("1 / 0", r"^it's process ended .* having said: ZeroDivisionError: division by zero$"),
    ],
)
def test_a_worker_that_dies_before_it_is_ready_is_no_hang(module: Callable[..., str], end: str, message: str) -> None:
    with Worker("it", ["-m", module("", end)], {}, threads=1) as worker, pytest.raises(CrashError, match=message):
        worker.ready()


@pytest.mark.usefixtures("deadline")
def test_a_worker_that_was_asked_for_what_can_not_be_is_bad_usage(module: Callable[..., str]) -> None:
    name = module("raise UsageError('not for this')")
    with Worker("it", ["-m", name], {}, threads=1) as worker, pytest.raises(UsageError, match=r"^it: not for this$"):
        worker.run("graphs")


@pytest.mark.skipif(not LINUX, reason="only Linux says it")
def test_peak_memory_is_that_of_the_worker_alone(module: Callable[..., str]) -> None:
    held = bytearray(os.urandom(1)) * 2**28  # which a process that starts with its parent's peak would show
    name = module("held = bytearray(2**26); held[::4096] = b'1' * 2**14; return 1")
    with Worker("it", ["-m", name], {}, threads=1) as worker:
        worker.ready()
        before = worker.peak_memory()
        worker.run("graphs")
        after = worker.peak_memory()
    assert before is not None
    assert after is not None
    assert before < len(held)
    assert after > before + 2**25


# Sent at the first run, when nothing is imported any more, where Python may drop an interrupt; the worker stands still.
INTERRUPTED = """
import os, signal, threading
from mdnet_rt.bench.process import Worker
from mdnet_rt.cli.main import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a program in the background does not have
run = Worker.run
def interrupted(worker, stage):
    print(worker._process.pid, flush=True)
    os.kill(worker._process.pid, signal.SIGSTOP)
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    return run(worker, stage)
Worker.run = interrupted
main()
"""


@pytest.mark.skipif(os.name != "posix", reason="stops a process by signal")
def test_ctrl_c_while_a_worker_runs_ends_it_too(shared_bundle: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED, "bench", shared_bundle, "--backend", "onnxruntime-cpu"]
    done = subprocess.run([*command, "--batch-sizes", "1"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "error: interrupted"
    (worker,) = map(int, done.stdout.split())
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_a_reader_that_leaves_is_no_failure(shared_bundle: Path) -> None:
    command = [*COMMAND, str(shared_bundle), "--backend", "onnxruntime-cpu", "--rounds", "1", "--batch-sizes", "1,2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 0
    assert "error" not in errors
    assert "Traceback" not in errors


def test_made_images_are_the_same_each_time_and_as_long_as_photographs() -> None:
    first, second = make_jpegs(2, 350, 350), make_jpegs(2, 350, 350)
    assert [entry.data for entry in first] == [entry.data for entry in second]
    assert first[0].data != first[1].data
    assert decode(first[0], 32).shape == (32, 32, 3)
    white = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (350, 350, 3), np.uint8)
    Image.fromarray(noise).save(white, "JPEG", quality=90)
    assert isinstance(first[0].data, bytes)
    assert 15_000 < len(first[0].data) < len(white.getvalue()) / 2


def test_images_are_taken_until_there_are_enough(photo: Callable[..., Path], tmp_path: Path) -> None:
    for i in range(5):
        photo(f"photos/{i}.png", seed=i)
    (tmp_path / "photos" / "0.png").write_text("no image")
    entries, skipped = take_images([str(tmp_path / "photos")], 2, 32)
    assert [Path(entry.name).name for entry in entries] == ["1.png", "2.png"]
    assert skipped == 1


def test_a_timed_run_is_over_when_its_threads_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    spent = iter([0.0, 0.004, 0.004, 0.008, 0.008, 0.0081, 1.0])  # CPU seconds, before and after each wait
    waits: list[float] = []
    monkeypatch.setattr(bench_clock.time, "process_time", lambda: next(spent))
    monkeypatch.setattr(bench_clock.time, "sleep", waits.append)
    result, seconds = bench_clock.timed(lambda: "done")
    assert result == "done"
    assert seconds >= 0
    assert len(waits) == 3
