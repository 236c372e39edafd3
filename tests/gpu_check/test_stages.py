"""A stage that goes wrong spoils no other, and a run that somebody ends loses no row."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gpu_scripts import DAY, check, checkout, process, results

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
