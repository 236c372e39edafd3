"""`benchmarks/gpu_check.py`: the dry run works, what goes wrong is seen, and the tables say what the results say."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cuda_stub
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "benchmarks" / "gpu_check.py"
sys.path.append(str(SCRIPT.parent))  # at the end: it has modules of common names
check, checkout, claims, process, render, results = (
    importlib.import_module(f"gpu.{name}") for name in ("check", "checkout", "claims", "process", "render", "results")
)
gpu_check = importlib.import_module("gpu_check")
sys.path.remove(str(SCRIPT.parent))
STAGES = [stage.name for stage in check.STAGES]
GPU, DAY = "NVIDIA H100", "2026-11-25"


def command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=1500, **options
    )


# The dry run.


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The answer, and the file's content as text."""
    folder = tmp_path_factory.mktemp("dry")
    # On a busy machine a stage may take several times its share.
    done = command("--dry-run", "-o", "dry.json", "--budget", "2400", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return SimpleNamespace(done=done, text=(folder / "dry.json").read_text(), file=folder / "dry.json")


@pytest.mark.slow
def test_the_dry_run_has_every_stage_with_its_rows(dry_run: Any) -> None:
    read = results.read(dry_run.file)
    assert read.dry_run
    assert [stage.name for stage in read.stages] == STAGES
    for stage in read.stages:
        assert stage.rows, stage.name
        assert all(row.note for row in stage.rows if row.status != results.PASSED), stage.name
        assert stage.status in (results.PASSED, results.NOT_INSTALLED, results.NOT_SUPPORTED), stage


@pytest.mark.slow
def test_the_dry_run_runs_what_a_cpu_can(dry_run: Any) -> None:
    stages = {stage.name: stage for stage in results.read(dry_run.file).stages}
    for name in (
        "device",
        "scan",
        "scan time",
        "onnxruntime",
        "pytorch",
        "torch.compile",
        "end to end",
        "function body",
    ):
        assert stages[name].status == results.PASSED, stages[name]
    assert all(row.figures["cases"] > 1 for row in stages["scan"].rows if row.name.startswith(("float", "bfloat")))
    (batch,) = (row for row in stages["pytorch"].rows if row.name == "fp16, batch 2")
    assert {"images/s", "max |Δscore|", "batch against singles"} < batch.figures.keys()


@pytest.mark.slow
def test_a_pipe_gets_no_progress_and_the_file_no_places(dry_run: Any) -> None:
    assert dry_run.done.stderr == ""
    for place in (REPOSITORY, dry_run.file.parent, Path.home()):
        assert str(place) + os.sep not in dry_run.text


@pytest.mark.slow
def test_a_dry_run_is_no_evidence(dry_run: Any, tmp_path: Path) -> None:
    shutil.copy(dry_run.file, tmp_path / "cpu-2026-11-25.json")
    with pytest.raises(results.ResultError, match="dry run"):
        results.newest(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--dry-run"], 2, "needs -o"),
        (["--only", "nothing"], 2, "there are: device"),
        (["--budget", "0"], 2, "expected seconds"),
        (["bundles"], 2, "bundles takes a folder"),
        (["render", "x"], 2, "render takes no folder"),
    ],
)
def test_what_can_not_be_meant_is_refused(arguments: list[str], code: int, says: str) -> None:
    done = command(*arguments)
    assert done.returncode == code
    assert says in done.stderr.splitlines()[-1]


def test_without_a_gpu_the_command_says_so_in_one_line(tmp_path: Path) -> None:
    done = command("-o", tmp_path / "x.json", env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1
    assert re.fullmatch(r"error: there is no CUDA GPU here.*\n", done.stderr)
    assert not (tmp_path / "x.json").exists()


# What goes wrong.

BROKEN = """
import os, signal, subprocess, sys, time
from gpu.context import CheckFailed

ROWS = ("one", "two", "three")

def fine(context):
    context.attempt("one", lambda: {"figure": 1.5})

def begun(context, then):
    context.expect(*ROWS)
    fine(context)
    context.attempt("two", then)

def last_words():
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)

def forking():
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD], start_new_session=alone, stdout=subprocess.PIPE)
        for alone in (False, True)
    ]
    for child in children:
        child.stdout.readline()  # it ignores what it can from now on
    with open("children", "w") as file:
        print(*(child.pid for child in children), file=file)
    time.sleep(600)

CHILD = "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]; print(flush=True); time.sleep(600)"

def deaf():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(600)

def in_native_code():
    import ctypes
    ctypes.PyDLL(None).pause()  # holds Python's lock, so that no Python code runs

def crash(context):
    begun(context, last_words)

def hang(context):
    begun(context, lambda: time.sleep(600))

def hang_in_native_code(context):
    begun(context, in_native_code)

def ignore_signals(context):
    begun(context, deaf)

def fork(context):
    begun(context, forking)

def exit_early(context):
    begun(context, lambda: os._exit(0))

def cut_line(context):
    context.expect(*ROWS)
    fine(context)
    context.report._file.write('{"row": {"name": "tw')
    context.report._file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

def failing(context):
    def work():
        raise CheckFailed("off by 3", {"error": 3.0})
    context.attempt("two", work)
    fine(context)

def raising(context):
    context.expect(*ROWS)
    fine(context)
    raise ValueError("unexpected")

def late(context):
    context.attempt("long", lambda: {}, needs_seconds=10_000)
    fine(context)

def given(context, *words):
    context.attempt(" ".join(words), lambda: {})

def with_kernel(context, spoil):
    from unittest.mock import patch
    import torch
    from gpu import kernels, scan

    def kernel(inputs, y, **options):
        kernels._native(inputs, y, **options)
        spoil(y)
    with patch.object(scan, "DTYPES", (torch.float32,)), patch.object(scan, "open_kernel", lambda *_: (kernel, "")):
        scan.run(context)

def exact(context):
    with_kernel(context, lambda y: None)

def wrong(context):
    with_kernel(context, lambda y: y.view(-1)[-1:].add_(1e-2))

def unwritten(context):
    with_kernel(context, lambda y: y.view(-1)[-1:].fill_(float("nan")))
"""
SLOW = ("hang", "hang_in_native_code", "ignore_signals", "fork")


class Hurried:
    """A clock that stands still until a stage is well into its second row, and is then far ahead.

    However long a busy machine takes to start the stage, its time is over there, and nowhere else.
    """

    def __init__(self, folder: Path, name: str):
        self._journal, self._children = folder / f"{name}.journal", folder / "children"
        self._name = name

    def monotonic(self) -> float:
        begun = self._journal.exists() and '{"begin": "two"}' in self._journal.read_text()
        if self._name == "fork":
            begun = self._children.exists() and self._children.read_text().endswith("\n")
        return 1000.0 if begun else 0.0


def setting_of(folder: Path) -> Any:
    (folder / "broken.py").write_text(BROKEN)
    (folder / "bundles").mkdir()
    return check.Setting("cpu", "tiny", folder, folder / "bundles", (*checkout.import_paths(), str(folder)))


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The results of a run whose stages go wrong in all ways, each between others that don't."""
    folder = tmp_path_factory.mktemp("broken")
    setting = setting_of(folder)
    names = ("exact", "crash", "exit_early", "cut_line", "failing", "raising", "late", "wrong", "unwritten", "fine")
    stages = [check.Stage(name, f"broken:{name}", 60, needs=()) for name in names]
    stages.insert(3, check.Stage("missing", "broken:fine", 60, needs=("json", "no_such_module", "nor_this")))
    stages.insert(4, check.Stage("given", "broken:given", 60, needs=(), arguments=("two", "words")))
    begin = results.Results("none", f"{DAY}T10:00:00+00:00", True, "command", {})
    output = folder / "out.json"
    environment = setting.environment()
    done = {stage.name: check.run_stage(stage, setting, 120, environment) for stage in stages}
    for name in SLOW:
        with pytest.MonkeyPatch.context() as monkeypatch:
            clock = SimpleNamespace(monotonic=Hurried(folder, name).monotonic, sleep=time.sleep)
            monkeypatch.setattr(process, "time", clock)
            done[name] = check.run_stage(check.Stage(name, f"broken:{name}", 60, needs=()), setting, 7, environment)
    run = replace(begin, stages=tuple(done.values()))
    results.write(run, output)
    return done, output


@pytest.mark.parametrize(
    ("stage", "status", "note"),
    [
        ("exact", "passed", ""),
        ("crash", "crashed", "SIGSEGV, having said: last words"),
        ("exit_early", "crashed", "ended without a word"),
        ("cut_line", "crashed", "SIGKILL"),
        *((name, "timed out", "stopped after 7 s") for name in SLOW),
        ("missing", "not installed", "no_such_module, nor_this"),
        ("failing", "failed", "off by 3"),
        ("raising", "failed", "ValueError: unexpected"),
        ("late", "passed", ""),
        ("given", "passed", ""),
        ("wrong", "failed", "cases are wrong"),
        ("unwritten", "failed", "not finite"),
        ("fine", "passed", ""),
    ],
)
def test_what_goes_wrong_in_a_stage_is_that_stages_alone(
    stage: str, status: str, note: str, broken: tuple[Any, Path]
) -> None:
    done = broken[0][stage]
    assert done.status == status, done
    assert note in done.note


@pytest.mark.parametrize(
    ("stage", "second"), [("crash", "crashed"), ("exit_early", "crashed"), *((name, "timed out") for name in SLOW)]
)
def test_a_stage_that_ends_early_keeps_its_rows_and_names_the_others(
    stage: str, second: str, broken: tuple[Any, Path]
) -> None:
    first, *others = broken[0][stage].rows
    assert first == results.Row("one", "passed", "", {"figure": 1.5})
    assert [(row.name, row.status) for row in others] == [("two", second), ("three", "not run")]
    assert all(row.note for row in others)


@pytest.mark.parametrize("stage", ["cut_line", "raising"])
def test_rows_that_were_announced_and_not_begun_are_not_run(stage: str, broken: tuple[Any, Path]) -> None:
    rows = {row.name: row for row in broken[0][stage].rows}
    assert rows["one"].status == "passed"
    assert rows["two"].status == rows["three"].status == "not run"


def is_running(pid: int) -> bool:
    """Whether a process does anything; one that has ended and that nobody asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_nothing_that_a_stage_started_outlives_it(broken: tuple[Any, Path]) -> None:
    children = (broken[1].parent / "children").read_text().split()
    assert len(children) == 2
    assert not [pid for pid in children if is_running(int(pid))]


def test_a_stages_arguments_reach_it(broken: tuple[Any, Path]) -> None:
    assert [row.name for row in broken[0]["given"].rows] == ["two words"]


def test_figures_of_a_failed_check_are_kept(broken: tuple[Any, Path]) -> None:
    (row,) = (row for row in broken[0]["failing"].rows if row.status == "failed")
    assert row.figures == {"error": 3.0}


def test_what_has_no_time_left_is_said_and_the_stage_goes_on(broken: tuple[Any, Path]) -> None:
    assert [row.status for row in broken[0]["late"].rows] == ["not run", "passed"]


def test_a_run_with_failures_has_not_passed_and_one_without_packages_has(broken: tuple[Any, Path]) -> None:
    run = results.read(broken[1])
    assert not run.passed
    good = tuple(stage for stage in run.stages if stage.name in ("exact", "missing", "late", "fine"))
    assert replace(run, stages=good).passed


# A run that somebody ends.

RUN = """
import sys
from pathlib import Path
import gpu_check
from gpu import check, results
folder, stages = Path(sys.argv[1]), [check.Stage(name, f"broken:{name}", 60, needs=()) for name in sys.argv[2:]]
paths = (*gpu_check.import_paths(), str(folder))
setting = check.Setting("cpu", "tiny", folder, folder / "bundles", paths)
for number in gpu_check._SIGNALS:
    gpu_check.signal.signal(number, gpu_check._stop)
begin = results.Results("none", "2026-11-25T10:00:00+00:00", True, "command", {})
check.run_stages(stages, setting, begin, folder / "out.json")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize("stage", SLOW)
def test_a_run_that_is_ended_loses_no_row(stage: str, number: signal.Signals, tmp_path: Path) -> None:
    setting_of(tmp_path)
    script = subprocess.Popen(
        [sys.executable, "-c", RUN, tmp_path, "given", stage, "fine"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(checkout.import_paths())},
        stderr=subprocess.PIPE,
    )
    clock = Hurried(tmp_path, stage)

    def written() -> list[str]:
        run = results.read(tmp_path / "out.json") if (tmp_path / "out.json").exists() else None
        return [row.name for each in (run.stages if run else ()) for row in each.rows]

    # SIGKILL leaves no time to write: by then the row has been written.
    while not clock.monotonic() or (number == signal.SIGKILL and "one" not in written()):
        assert script.poll() is None
        time.sleep(0.02)
    script.send_signal(number)
    said = script.communicate(timeout=60)[1].decode()
    run = results.read(tmp_path / "out.json")
    first, second, *others = run.stages
    assert (first.status, second.rows[0]) == ("passed", results.Row("one", "passed", "", {"figure": 1.5}))
    assert (second.status, second.note) == ("not run", check.ENDED)
    assert {row.status for row in second.rows[1:]} == {"not run"}
    assert run.passed
    if number == signal.SIGKILL:
        assert script.returncode == -number
        while any("gpu.worker" in command_of(pid) for pid, text in processes() if str(tmp_path) in text):
            time.sleep(0.02)  # the kernel ends it, in its own time
        for pid, text in processes():  # what the worker had started is nobody's any more
            if str(tmp_path) in text:
                os.kill(pid, signal.SIGKILL)
        return
    assert script.returncode == 128 + number
    assert said == "stopping; what has been proven is kept\n"
    assert [row.name for row in second.rows] == ["one", "two", "three"]
    assert [(stage.name, stage.status) for stage in others] == [("fine", "not run")]
    assert not [pid for pid, text in processes() if str(tmp_path) in text]


def processes() -> list[tuple[int, str]]:
    """All processes with their environments: a stage's folder is in that of everything that the stage started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if is_running(int(folder.name)):
                found.append((int(folder.name), (folder / "environ").read_bytes().decode(errors="replace")))
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def test_a_process_that_can_not_be_ended_costs_its_stage_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = setting_of(tmp_path)
    monkeypatch.setattr(process.StageProcess, "_gone", lambda self: False)
    done = check.run_stage(check.Stage("crash", "broken:crash", 60, needs=()), setting, 60, setting.environment())
    assert done.note.endswith(", and can't be ended")
    assert done.rows[0].status == "passed"


def test_no_run_overwrites_anothers_results(tmp_path: Path) -> None:
    file = tmp_path / "gpu-2026-11-25.json"
    for expected in ("gpu-2026-11-25.json", "gpu-2026-11-25-2.json", "gpu-2026-11-25-3.json"):
        unused = gpu_check.unused(file)
        assert unused.name == expected
        unused.touch()


# The time for all.


def test_the_shares_fit_into_nine_minutes() -> None:
    assert check.BUDGET == 540
    assert sum(check.limits(check.STAGES, check.BUDGET)) <= check.BUDGET
    assert sum(check.limits(check.STAGES, 60)) <= 60


def test_a_stage_gets_what_those_before_it_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock, given, written = [0.0], [], []
    took = {"a": 1.0, "b": 30.0, "c": 25.0, "d": 5.0}

    def run_stage(stage: Any, _setting: Any, limit: float, _environment: Any, _keep: Any) -> Any:
        given.append(limit)
        written.append(len(results.read(tmp_path / "out.json").stages))
        clock[0] += min(took[stage.name], limit)
        return results.StageResult(stage.name, "passed", took[stage.name], limit, "", (results.Row("x", "passed"),))

    monkeypatch.setattr(check, "run_stage", run_stage)
    monkeypatch.setattr(check.time, "monotonic", lambda: clock[0])
    setting = check.Setting("cpu", "tiny", tmp_path, tmp_path, ())
    begin = results.Results("none", f"{DAY}T10:00:00+00:00", True, "command", {})
    stages = [check.Stage(name, "", check.BUDGET / 4) for name in took]
    run = check.run_stages(stages, setting, begin, tmp_path / "out.json", budget=80)
    assert given == [20, 39, 29, 24]
    assert written == [0, 1, 2, 3]  # after every stage
    assert results.read(tmp_path / "out.json") == run


def test_no_stage_begins_when_the_time_is_over(tmp_path: Path) -> None:
    setting = check.Setting("cpu", "tiny", tmp_path, tmp_path, ())
    done = check.run_stage(check.Stage("a", "broken:fine", 60), setting, 0.5, {})
    assert (done.status, done.rows) == ("not run", ())


# Results and their rendering.


def row(name: str, status: str = "passed", note: str = "", **figures: float) -> Any:
    return results.Row(name, status, note, {key.replace("_", " "): value for key, value in figures.items()})


def rate(name: str, value: float, share: float = 0.1) -> Any:
    return results.Row(name, "passed", "", {"images/s": value, "of the matrix product's rate": share})


def scan_row(batch: int, times: float) -> Any:
    return results.Row(f"selective_scan.cu, float16, batch {batch}", "passed", "", {"× its floor": times})


ROWS = {
    "device": [row("facts")],
    "scan": [row("float32, forward"), row("bfloat16, reverse"), row("mamba-ssm's kernel and its gradient")],
    "scan time": [scan_row(64, 1.4), scan_row(1, 7.0)],
    "tensorrt demo": [row("fp16, plans"), row("fp16, parity"), rate("fp16, batch 8", 9000)],
    "onnxruntime": [row("fp16, own op, parity"), rate("fp16, own op, batch 32", 1200, 0.4)],
    "pytorch": [rate("fp16, batch 32", 900)],
    "tensorrt fp16": [row("fp16, plans"), row("fp16, parity"), rate("fp16, batch 32", 1500.4, 0.55)],
    "tensorrt int8": [row("int8, plans"), row("int8, parity"), rate("int8, batch 32", 1900)],
    "tensorrt fp8": [row("fp8, plans"), row("fp8, parity"), rate("fp8, batch 32", 2000)],
    "torch.compile": [rate("fp16, batch 32", 1000)],
    "tensorrt-rtx": [row("fp16, plans"), row("fp16, parity"), rate("fp16, batch 32", 1400)],
    "end to end": [rate("fp16, JPEG files", 1111)],
    "function body": [row("fp16, function body, one image")],
    "tests": [row("tests/export/test_gpu.py")],
    "sanitizer": [row("memcheck")],
}


def made_up(day: str = DAY, **changes: list[Any]) -> Any:
    """A run of which everything passed, but for the stages that are given otherwise (`_` for a space or a hyphen)."""
    changed = {name.replace("_", " "): rows for name, rows in changes.items()}
    stages = []
    for name, rows in ROWS.items():
        found = changed.get(name.replace("-", " ").replace(".", " "), rows)
        status = results.worst(each.status for each in found)
        note = next((f"{each.name}: {each.note}" for each in found if each.status == status and each.note), "")
        stages.append(results.StageResult(name, status, 10.0, 20.0, note, tuple(found)))
    return results.Results(GPU, f"{day}T10:00:00+00:00", False, "python benchmarks/gpu_check.py", {}, tuple(stages))


def ended(name: str, status: str, rows: list[Any]) -> Any:
    """A run in which all is well but for one stage, which did not come to its end."""
    run = made_up()
    changed = {"status": status, "note": "why", "rows": tuple(rows)}
    return replace(run, stages=tuple(replace(s, **changed) if s.name == name else s for s in run.stages))


def lines_of(run: Any) -> dict[str, str]:
    """The table of claims in docs/gpu.md: claim → its state."""
    found = re.findall(r"^\| (.+?) \| (.+) \|$", render.claims_table(run), re.MULTILINE)
    return {what: said for what, said in found if what not in ("on a GPU", "---")}


def test_without_results_every_claim_is_unverified() -> None:
    said = lines_of(None)
    assert [*said] == [claim.what for claim in claims.CLAIMS]
    assert all(text.endswith("*unverified*: no run on a GPU yet") for text in said.values())
    assert render.docs_block(None).count("*unverified*") == len(claims.GOALS) + 1
    assert "every GPU claim is *unverified*" in render.readme_block(None)


def test_committed_tables_are_those_of_the_committed_results(tmp_path: Path) -> None:
    pages = [REPOSITORY / "docs" / "gpu.md", REPOSITORY / "README.md"]
    copies = [Path(shutil.copy(page, tmp_path)) for page in pages]
    for copy in copies:
        text = copy.read_text(encoding="utf-8")
        copy.write_text(text.replace(render.END, f"a line by hand\n{render.END}"), encoding="utf-8")
    render.render(REPOSITORY / "benchmarks" / "results", *copies)
    for page, copy in zip(pages, copies, strict=True):
        assert copy.read_bytes() == page.read_bytes(), "python benchmarks/gpu_check.py render"


def test_a_claim_whose_rows_passed_is_verified_with_gpu_and_day() -> None:
    said = lines_of(made_up())
    assert all(text.startswith(f"verified on {GPU}, {DAY}") for text in said.values()), said
    assert said["TensorRT 11 at full size, fp16"].endswith(": 1500 images/s at batch 32")
    assert said["selective scan on CUDA: `selective_scan.cu`"].endswith(": 1.40× its floor at batch 64")


def test_every_stage_has_made_up_rows_and_every_claim_a_stage() -> None:
    assert [*ROWS] == STAGES
    assert {claim.stage for claim in claims.CLAIMS} <= {*STAGES}


@pytest.mark.parametrize("status", ["timed out", "crashed"])
def test_a_claim_is_verified_though_its_stage_ended_in_a_row_of_another(status: str) -> None:
    rows = [row("float32, forward"), row("mamba-ssm's kernel and its gradient", status, "stopped after 40 s")]
    said = lines_of(ended("scan", status, rows))
    assert said["selective scan on CUDA: `selective_scan.cu`"].startswith(f"verified on {GPU}, {DAY}: 1.40×")
    assert said["selective scan on CUDA: mamba-ssm's kernel and its gradient, which training takes"] == (
        f"**{status}** on {GPU}, {DAY}: mamba-ssm's kernel and its gradient: stopped after 40 s"
    )


def test_a_claim_says_which_rows_its_stage_did_not_come_to() -> None:
    rows = [
        row("fp16, own op, parity"),
        rate("fp16, own op, batch 32", 1200),
        row("fp16, own op, batch 1", "timed out", "stopped after 45 s"),
        row("fp16, own op, batch 64", "not run", "the stage had ended"),
    ]
    said = lines_of(ended("onnxruntime", "timed out", rows))
    lacking = "without fp16, own op, batch 1 (timed out), fp16, own op, batch 64 (not run)"
    assert said["selective scan on CUDA: ONNX Runtime's operator"] == f"verified in part on {GPU}, {DAY}; {lacking}"
    assert said["ONNX Runtime CUDA, `--backend onnxruntime-cuda`"] == (
        f"verified in part on {GPU}, {DAY}: 1200 images/s at batch 32; {lacking}"
    )


@pytest.mark.parametrize("status", ["timed out", "crashed", "failed"])
def test_a_stage_that_went_wrong_before_its_first_row_fails_its_claims(status: str) -> None:
    said = lines_of(ended("scan", status, []))
    assert said["selective scan on CUDA: `selective_scan.cu`"] == f"**{status}** on {GPU}, {DAY}: why"


def test_a_stage_that_was_under_way_when_the_run_was_ended_has_failed_nothing() -> None:
    rows = [row("float32, forward", "not run", check.ENDED)]
    said = lines_of(ended("scan", "not run", rows))
    assert said["selective scan on CUDA: `selective_scan.cu`"].endswith(
        f"*unverified*: not run on {GPU}, {DAY} ({check.ENDED})"
    )


@pytest.mark.parametrize("status", ["failed", "crashed"])
def test_a_claim_with_a_bad_row_is_told_as_such_and_no_other_is(status: str) -> None:
    bad = [row("fp16, own op, parity", status, "score max |Δ|"), row("fp16, own op, batch 1")]
    said = lines_of(made_up(onnxruntime=bad))
    failed = [what for what, text in said.items() if text.startswith(f"**{status}** on {GPU}, {DAY}: ")]
    assert failed == [
        "selective scan on CUDA: ONNX Runtime's operator",
        "ONNX Runtime CUDA, `--backend onnxruntime-cuda`",
    ]
    assert "score max \\|Δ\\|" in said[failed[0]]  # a cell's own lines are not the table's


@pytest.mark.parametrize("status", ["not installed", "not supported", "not run"])
def test_what_could_not_run_stays_unverified_with_the_reason(status: str) -> None:
    rows = [row("fp16, plans", status, "tensorrt"), row("fp16, parity", status, "tensorrt")]
    text = lines_of(made_up(tensorrt_fp16=rows))["TensorRT 11 at full size, fp16"]
    assert text == (f"tested with stand-ins for GPU and builder; *unverified*: {status} on {GPU}, {DAY} (tensorrt)")


def test_plans_that_were_only_built_verify_nothing() -> None:
    rows = [row("fp16, plans"), row("fp16, parity", "not supported", "for RTX GPUs")]
    said = lines_of(made_up(tensorrt_rtx=rows))
    (text,) = (text for what, text in said.items() if what.startswith("TensorRT-RTX"))
    assert "*unverified*: not supported" in text


def test_a_claim_of_which_a_part_is_missing_says_which() -> None:
    rows = [row("fp16, own op, parity"), row("fp16, own op, batch 64", "not run", "1 s was left")]
    text = lines_of(made_up(onnxruntime=rows))["ONNX Runtime CUDA, `--backend onnxruntime-cuda`"]
    assert text == f"verified in part on {GPU}, {DAY}; without fp16, own op, batch 64 (not run)"


def test_no_figure_stands_without_gpu_and_day() -> None:
    for text in lines_of(made_up()).values():
        if re.search(r"\d images/s|\d×", text):
            assert f"{GPU}, {DAY}" in text
    docs = render.docs_block(made_up())
    goals, _, table = docs.partition(f"\n{GPU}, {DAY}, ")
    assert all(f"on {GPU}, {DAY}: " in line for line in goals.splitlines()[2:] if line)
    assert "1500" in table


def test_goals_are_met_or_missed_by_the_best_of_ours() -> None:
    def goals(run: Any) -> list[str]:
        return [claims.goal_state(goal, run).partition(" on ")[0] for goal in claims.GOALS]

    assert goals(made_up()) == ["met", "met", "met"]  # 1.4×; 1500 / 1000; 0.55
    slow = [row("fp16, parity"), rate("fp16, batch 32", 1250, 0.45)]
    assert goals(made_up(tensorrt_fp16=slow, tensorrt_rtx=slow, scan_time=[scan_row(64, 1.6)])) == ["missed"] * 3
    none = [row("fp16, batch 32", "not installed", "triton")]
    assert claims.goal_state(claims.GOALS[1], made_up(torch_compile=none)).startswith("*unverified*: not measured")


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A folder with these runs, and a file of another benchmark."""

    def make(*runs: Any) -> Path:
        (tmp_path / "scan-cpu.json").write_text('{"results": {}}')
        for number, run in enumerate(runs):
            results.write(run, tmp_path / f"{number}.json")
        return tmp_path

    return make


def test_the_newest_run_wins_by_its_own_date(folder: Callable[..., Path]) -> None:
    assert results.newest(folder(made_up("2026-12-01"), made_up("2026-11-30"))).day == "2026-12-01"


def test_a_folder_without_runs_has_none(folder: Callable[..., Path]) -> None:
    assert results.newest(folder()) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": 2}, "has the schema 2; this version reads 1"),
        ({"schema": None}, "has the schema None"),
        ({"dry_run": True}, "is a dry run"),
        ({"date": "yesterday"}, "is not as gpu_check.py writes it"),
        ({"more": 1}, "is not as gpu_check.py writes it"),
        ({"stages": [{"name": "scan"}]}, "is not as gpu_check.py writes it"),
        (
            {"stages": [{"name": "scan", "status": "fine", "seconds": 1, "limit": 2, "note": "", "rows": []}]},
            "has the status 'fine'",
        ),
    ],
)
def test_a_file_that_is_not_known_is_refused(change: dict[str, Any], says: str, folder: Callable[..., Path]) -> None:
    place = folder(made_up())
    file = place / "0.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(results.ResultError, match=re.escape(says)) as caught:
        results.newest(place)
    assert "0.json" in str(caught.value)


def test_rendering_writes_between_the_marks_alone(folder: Callable[..., Path]) -> None:
    place = folder(made_up())
    pages = [place / "gpu.md", place / "README.md"]
    for page in pages:
        page.write_text(f"before\n{render.BEGIN}\nold\n{render.END}\nafter\n")
    assert render.render(place, *pages) == pages
    for page in pages:
        text = page.read_text()
        assert text.startswith(f"before\n{render.BEGIN}\n")
        assert text.endswith(f"{render.END}\nafter\n")
        assert "old" not in text
        assert GPU in text
    assert render.render(place, *pages) == []
    pages[0].write_text("no marks")
    with pytest.raises(results.ResultError, match=r"gpu\.md has not one place"):
        render.render(place, *pages)


def test_figures_that_are_not_finite_are_written_by_name(tmp_path: Path) -> None:
    figures = results.plain({"a": float("nan"), "b": float("inf"), "c": 1.23456789, "d": 3, "e": "x"})
    assert figures == {"a": "nan", "b": "inf", "c": 1.23457, "d": 3, "e": "x"}


# What the stages are made of.

BARE = """
import sys

class Lacking:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {names} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Lacking, sys.meta_path)

from gpu import check, journal, worker
import gpu_check
stages = {{stage.name: stage for stage in check.STAGES}}
with open("journal", "w") as file:
    for name in {stages}:
        stage = stages[name]
        request = dict(function=stage.function, arguments=(), needs=stage.needs, device="cpu", sizes="tiny")
        assert worker.run({{**request, "scratch": ".", "bundles": ".", "seconds": 500}}, journal.Writer(file, []))
"""
PACKAGES = (
    *("pydantic", "diffusers", "safetensors", "PIL", "click", "rich", "onnx", "onnxscript", "onnxruntime"),
    *("ml_dtypes", "pytest", "tensorrt", "tensorrt_rtx", "polygraphy", "cuda", "mamba_ssm"),
)


def test_a_bare_machine_runs_the_stages_of_the_kernel(tmp_path: Path) -> None:
    stages = ("device", "scan", "scan time", "sanitizer")
    done = subprocess.run(
        [sys.executable, "-c", BARE.format(names=set(PACKAGES), stages=stages)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(checkout.import_paths()), "PATH": str(tmp_path)},  # no g++
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line).get("row") for line in (tmp_path / "journal").read_text().splitlines()]
    found = {row["name"]: row for row in rows if row}
    lacking = {name for name, row in found.items() if row["status"] == "not installed"}
    assert lacking == {name for name in found if "mamba-ssm" in name or name == "address sanitizer"}
    assert {row["status"] for name, row in found.items() if name not in lacking} == {"passed"}
    assert found["bfloat16, reverse"]["figures"]["cases"] > 1


def test_a_checkout_that_is_not_installed_can_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkout.importlib.util, "find_spec", lambda name: None)
    program = "import mdnet, mdnet_engines.cuda.kernel as k; print(mdnet.__version__, len(k.ptx()), k.__file__)"
    # -S: no site-packages, so that what is installed here can't help.
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(checkout.import_paths())},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    version, length, file = done.stdout.split()
    assert version == "0"
    assert int(length) > 10_000
    assert Path(file).is_relative_to(REPOSITORY)


LAUNCH = """
import json
from types import SimpleNamespace
from cuda_stub import Driver
from gpu.driver import ScanKernel
from mdnet_engines.cuda.kernel import ARGUMENTS
def tensor(name, *shape):
    address = 4096 * (ARGUMENTS.index(name) + 1)
    return SimpleNamespace(shape=shape, dtype="torch.float16", data_ptr=lambda: address, is_contiguous=lambda: True)
B, D, L, N = 5, 33, 197, 17
steps = {name: tensor(name, B, D, L) for name in ("u", "delta", "z")}
mixes = {name: tensor(name, B, N, L) for name in ("B", "C")}
others = {"A": tensor("A", D, N), "D": tensor("D", D), "delta_bias": tensor("delta_bias", D)}
driver = Driver()
kernel = ScanKernel()
kernel({**steps, **mixes, **others}, tensor("y", B, D, L), reverse=True, stream=0x57)
sixteen = {**others, "A": tensor("A", D, 16)}
for small in (None, False):
    kernel({**steps, **mixes, **sixteen}, tensor("y", B, D, L), reverse=True, small=small, stream=0x57)
groups = {"A": tensor("A", 66, N), "B": tensor("B", B, 2, N, L), "C": tensor("C", B, 2, N, L)}
kernel({"u": tensor("u", B, 66, L), "delta": tensor("delta", B, 66, L), **groups}, tensor("y", B, 66, L), reverse=False,
       softplus=False, stream=0x57)
said = ""
driver.refuse(2)
try:
    kernel({**steps, **mixes, **others}, tensor("y", B, D, L), reverse=True, stream=0)
except Exception as error:
    said = str(error)
print(json.dumps({"calls": driver.calls, "image": len(driver.image), "said": said}))
"""


@pytest.mark.skipif(cuda_stub.COMPILER is None, reason="needs a C compiler")
def test_the_launch_has_the_kernels_grid_and_arguments(tmp_path: Path) -> None:
    from mdnet_engines.cuda import kernel as cuda_kernel

    environment = cuda_stub.environment(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parent), environment["PYTHONPATH"]])
    done = subprocess.run([sys.executable, "-c", LAUNCH], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["image"] == len(cuda_kernel.ptx())
    _, call, *other, version_2 = answer["calls"]
    assert [(each["kernel"], each["grid"]) for each in other] == [
        ("selective_scan_reverse_f16_n16_small", [5, 5, 1]),
        ("selective_scan_reverse_f16_n16", [5, 2, 1]),
    ]
    assert call["kernel"] == cuda_kernel.kernel_name(reverse=True, dtype="float16", states=17)
    assert (call["grid"], call["block"], call["shared"], call["stream"]) == ([5, 2, 1], [128, 1, 1], 0, 0x57)
    sizes = {"channels": 33, "length": 197, "states": 17}
    assert call["values"] == [sizes.get(name, 4096 * (i + 1)) for i, name in enumerate(cuda_kernel.ARGUMENTS)]
    assert version_2["kernel"] == cuda_kernel.kernel_name(reverse=False, dtype="float16", states=17, version=2)
    assert version_2["grid"] == [5, 2, 2]
    sizes |= {"groups": 2, "softplus": 0, **dict.fromkeys(("D", "z", "delta_bias", "h0", "h_last"), 0)}
    assert version_2["values"] == [
        sizes[name] if name in sizes else 4096 * (cuda_kernel.ARGUMENTS.index(name) + 1)
        for name in cuda_kernel.ARGUMENTS_V2
    ]
    assert "cuLaunchKernel: out of memory (2)" in answer["said"]


BUFFERS = """
import numpy as np
from gpu import driver
from gpu.driver import Buffer
driver.start()
values = np.array([[1.0, -2.5, 3.14159, 1e-3]], np.float32)
print([Buffer(values, dtype).read().astype(float).tolist() for dtype in ("float32", "float16", "bfloat16")])
print(Buffer(values, "float16").shape, Buffer(values, "float16").data_ptr() > 2**20)
"""


@pytest.mark.skipif(cuda_stub.COMPILER is None, reason="needs a C compiler")
def test_what_runs_under_the_sanitizer_talks_to_the_driver_alone(tmp_path: Path) -> None:
    import numpy as np

    environment = cuda_stub.environment(tmp_path) | {"STUB_GPU": "90"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parent), environment["PYTHONPATH"]])

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, *arguments]
        return subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    done = python("-c", BUFFERS)
    assert done.returncode == 0, done.stderr
    values, facts = done.stdout.splitlines()
    for got, precision in zip(json.loads(values), (2**-24, 2**-11, 2**-7), strict=True):
        np.testing.assert_allclose(got, [[1.0, -2.5, 3.14159, 1e-3]], rtol=precision)
    assert facts == "(1, 4) True"
    # The stub computes nothing: what the outputs were filled with before must be noticed.
    done = python("-m", "gpu.sanitizer", "cuda", ".")
    assert (done.returncode, done.stderr) == (1, "float32, (1, 33, 19, 16): not finite\n")
    assert "torch" not in python("-X", "importtime", "-m", "gpu.sanitizer", "cuda", ".").stderr


@pytest.fixture(scope="module")
def module() -> Callable[[str], Any]:
    """Import a module of the stages, which imports PyTorch."""
    return lambda name: importlib.import_module(f"gpu.{name}")


def test_bundles_are_built_that_are_missing_and_that_this_version_can_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Callable[[str], Any]
) -> None:
    bundles, said, built = module("bundles"), [], []
    sizes = replace(module("sizes").FULL, precisions=("fp16", "int8", "fp3"))

    def run(command: list[str], **_: Any) -> Any:
        built.append(command[-3:])
        return SimpleNamespace(returncode=int(command[-2] == "int8"), stderr="Traceback\nValueError: no space\n")

    monkeypatch.setattr(bundles.subprocess, "run", run)
    (tmp_path / "full" / "fp16").mkdir(parents=True)
    (tmp_path / "full" / "fp16" / "manifest.json").touch()
    with pytest.raises(bundles.BuildError, match="full/int8: ValueError: no space"):
        bundles.make(sizes, tmp_path, {}, said.append)
    (tmp_path / "full" / "int8").mkdir()
    (tmp_path / "full" / "int8" / "manifest.json").touch()
    bundles.make(sizes, tmp_path, {}, said.append)
    assert built == [["full", "int8", str(tmp_path)], ["demo", "fp16", str(tmp_path)]]
    assert "full/fp3: left out, this version builds no fp3" in said


def test_a_bundle_that_nobody_built_is_named_with_the_command_that_builds_it(
    tmp_path: Path, module: Callable[[str], Any]
) -> None:
    bundles = module("bundles")
    context = SimpleNamespace(bundles=tmp_path, sizes=module("sizes").FULL)
    with pytest.raises(Exception, match="there is no fp8 bundle; build it before: make gpu-bundles") as caught:
        bundles.open_bundle(context, "fp8")
    assert module("context").judge(caught.value)[0] == "not installed"


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="needs ptxas, of the CUDA toolkit")
def test_the_kernel_of_exponentials_compiles(tmp_path: Path, module: Callable[[str], Any]) -> None:
    (tmp_path / "e.ptx").write_text(module("device_facts").exponentials_ptx())
    done = subprocess.run(
        ["ptxas", "-arch=sm_90", "e.ptx", "-o", "e.cubin"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_scans_floor_is_its_bytes_and_its_exponentials(tmp_path: Path, module: Callable[[str], Any]) -> None:
    import torch

    kernels, scan_time = module("kernels"), module("scan_time")
    inputs = kernels.random_tensors((2, 3, 5, 4), torch.float16, module("clock").Device("cpu"), seed=0)
    y = torch.empty_like(inputs["u"])
    context = SimpleNamespace(scratch=tmp_path)
    assert scan_time.floor(context, inputs, y) == {}  # nothing was measured
    (tmp_path / "ceilings.json").write_text('{"bytes": 100.0, "exponentials": 10.0}')
    moved = 2 * (4 * 2 * 3 * 5 + 2 * 2 * 4 * 5) + 4 * (3 * 4 + 3 + 3)  # u, delta, z, y, B, C; A, D, delta_bias
    assert scan_time.floor(context, inputs, y) == {"bytes": moved / 100, "exponentials": 2 * 3 * 5 * 4 / 10}


@pytest.mark.parametrize(
    ("code", "text", "outcome"),
    [
        (0, "18 launches\n========= ERROR SUMMARY: 0 errors\n", "ERROR SUMMARY: 0 errors"),
        (86, "========= Invalid __global__ write of size 4\n========= Error: x\n", "CheckFailed: Error: x"),
        (1, "Traceback\nValueError: wrong\n", "CheckFailed: ValueError: wrong"),
        (
            1,
            "========= Error: Device not supported.\nRuntimeError: 999\n",
            "NotSupported: compute-sanitizer: Error: Device",
        ),
    ],
)
def test_what_the_sanitizer_says_is_read(code: int, text: str, outcome: str, module: Callable[[str], Any]) -> None:
    try:
        said = module("sanitizer").read("memcheck", code, text)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    assert said.startswith(outcome)


@pytest.mark.parametrize(
    ("cases", "outcome"),
    [
        (["<x/>", "<skipped message='no TensorRT'/>"], {"passed": 1, "skipped": 1, "failed": 0}),
        (["<x/>", "<failure/>"], "CheckFailed: tests.a: 1"),
        (["<x/>", "<error/>"], "CheckFailed: tests.a: 1"),
        (["<skipped message='needs a CUDA GPU'/>"], "NotSupported: needs a CUDA GPU"),
        ([], "NotSupported: there are none"),
    ],
)
def test_a_report_of_tests_is_read(
    cases: list[str], outcome: Any, tmp_path: Path, module: Callable[[str], Any]
) -> None:
    body = "".join(f'<testcase classname="tests.a" name="{i}">{case}</testcase>' for i, case in enumerate(cases))
    (tmp_path / "report.xml").write_text(f"<testsuites><testsuite>{body}</testsuite></testsuites>")
    try:
        said = module("marked_tests").read(tmp_path / "report.xml")
        said = {name: said[name] for name in outcome}
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    assert said == outcome


def test_the_scores_of_a_batch_are_held_to_pytorchs_and_to_single_images(module: Callable[[str], Any]) -> None:
    import numpy as np

    model = module("model")
    true = np.array([2.0, 3.0])
    images = SimpleNamespace(pixels=np.arange(2, dtype=np.uint8).reshape(2, 1, 1, 1))
    held = model.Reference(images, {"score": true})

    def check_with(error: float, in_place: int | None = None) -> None:
        def score(pixels: Any) -> Any:
            got = true[pixels.reshape(-1)] + error
            if in_place is not None and len(got) > in_place:
                got[in_place] += 0.005
            return got

        model.check_scores(score, held, 5, "fp16", model.singles(score, held))

    check_with(0.009)
    with pytest.raises(Exception, match=r"max \|Δscore\| is 0.011, allowed is 0.01"):
        check_with(0.011)
    with pytest.raises(Exception, match=r"batch against singles is 0\.005, allowed is 0\.002"):
        check_with(0.0, in_place=4)
    with pytest.raises(Exception, match=r"max .* is nan"):
        check_with(float("nan"))


def test_pytorchs_scan_gives_the_kernel_what_it_takes(
    module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from mdnet.scan import loop as scan_loop
    from mdnet.scan import mamba_ssm as scan_mamba

    kernels, pytorch, given = module("kernels"), module("pytorch"), []

    def kernel(inputs: dict[str, torch.Tensor], y: torch.Tensor, *, reverse: bool) -> None:
        given.append(inputs)
        kernels._native(inputs, y, reverse=reverse)

    for name in ("available", "scan"):
        monkeypatch.setattr(scan_mamba, name, None)  # so that they are put back
    monkeypatch.setattr(pytorch, "open_kernel", lambda *_: (kernel, ""))
    pytorch.use_kernel(SimpleNamespace(device=SimpleNamespace(is_cuda=True), scratch=None))
    inputs = kernels.random_tensors((2, 6, 9, 4), torch.float16, module("clock").Device("cpu"), seed=0)
    # As the model in half precision has them: parts of larger tensors, parameters in half precision too.
    halves = [value.half().mT.contiguous().mT if value.ndim == 3 else value.half() for value in inputs.values()]
    for reverse in (False, True):
        y = scan_mamba.scan(*halves, reverse=reverse)
        expected, _ = scan_loop.scan(*halves, reverse=reverse)
        assert y.dtype is torch.float16
        torch.testing.assert_close(y, expected, rtol=2e-3, atol=2e-3)  # a rounding to half precision
    for name, value in given[0].items():
        assert value.is_contiguous()
        assert value.dtype is (torch.float32 if name in kernels.PARAMETERS else torch.float16), name


def test_operations_are_twice_the_multiply_adds(module: Callable[[str], Any]) -> None:
    # By hand, of SD 1.5's encoder at 256²: 270.6 + 52.8 GFLOP; Vim-Small and fusion add a few per cent.
    operations = module("model").operations(module("sizes").FULL.config())
    assert 323e9 < operations < 350e9


def test_busy_is_the_mean_of_what_is_read_meanwhile(module: Callable[[str], Any]) -> None:
    readings, read = iter([0.2, 0.4, 0.6]), threading.Event()

    def reading() -> float:
        value = next(readings, None)
        if value is None:
            read.set()
        return 0.4 if value is None else value

    assert module("busy").mean_during(lambda: read.wait(60), reading) == pytest.approx(0.4)


def test_without_nvml_busy_is_not_known(monkeypatch: pytest.MonkeyPatch, module: Callable[[str], Any]) -> None:
    def missing(_name: str) -> None:
        raise OSError

    busy = module("busy")
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(busy.BusyError, match="libnvidia-ml"):
        busy.nvml_utilisation("GPU-0")
