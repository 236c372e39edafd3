"""Run the stages, each in a process of its own and within its time, and write what they give after every one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gpu.checkout import ROOT
from gpu.results import CRASHED, FAILED, NO_TIME, PASSED, TIMED_OUT, Results, Row, StageResult, worst, write

BUDGET = 540.0
"""Seconds for everything: nine minutes."""
_MODEL = ("torch", "diffusers", "safetensors", "pydantic", "PIL")


@dataclass(frozen=True)
class Stage:
    """What runs (`module:function`, given a `context.Context`), its share of `BUDGET`, and modules it must have."""

    name: str
    function: str
    seconds: float
    needs: tuple[str, ...] = ("torch", "numpy")


STAGES = (
    Stage("device", "gpu.device_facts:run", 20),
    Stage("scan", "gpu.scan:run", 45),
    Stage("scan time", "gpu.scan_time:run", 25),
    Stage("sanitizer", "gpu.sanitizer:run", 45),
    Stage("pytorch", "gpu.pytorch:eager", 50, _MODEL),
    Stage("torch.compile", "gpu.pytorch:compiled", 80, _MODEL),
    Stage("bundles", "gpu.bundles:run", 110, (*_MODEL, "onnx", "onnxscript", "onnxruntime")),
    Stage("onnxruntime", "gpu.served:onnxruntime", 45, (*_MODEL, "onnxruntime")),
    Stage("tensorrt", "gpu.served:tensorrt", 50, _MODEL),
    Stage("tensorrt-rtx", "gpu.served:tensorrt_rtx", 15, _MODEL),
    Stage("end to end", "gpu.end_to_end:run", 20, (*_MODEL, "onnxruntime")),
    Stage("tests", "gpu.marked_tests:run", 30, ("pytest", *_MODEL, "onnx", "onnxscript", "onnxruntime")),
)
"""In the order in which they run. The shares add up to less than `BUDGET`: starting and ending processes takes some."""


def limits(stages: Sequence[Stage], budget: float) -> list[float]:
    """Each stage's share of `budget`, seconds; what a stage leaves of it goes to the next."""
    return [stage.seconds * budget / BUDGET for stage in stages]


@dataclass(frozen=True)
class Setting:
    """Where and how the stages run: `device` is cuda or cpu, `sizes` full or tiny, both folders exist.

    `paths` is where the stages find modules (`checkout.import_paths`).
    """

    device: str
    sizes: str
    scratch: Path
    bundles: Path
    paths: tuple[str, ...]

    def environment(self) -> dict[str, str]:
        """For the stages' processes: they find the project's packages, and do not take the current folder's."""
        paths = [*self.paths, *filter(None, [os.environ.get("PYTHONPATH")])]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


def run_stages(
    stages: Sequence[Stage],
    setting: Setting,
    results: Results,
    output: Path,
    *,
    budget: float = BUDGET,
    tell: Callable[[str], None] = lambda _: None,
) -> Results:
    """Run `stages` one after the other; gives `results` with theirs, which `output` has after each."""
    shares, environment = limits(stages, budget), setting.environment()
    end = time.monotonic() + budget
    write(results, output)
    for place, stage in enumerate(stages):
        limit = end - time.monotonic() - sum(shares[place + 1 :])
        tell(f"[{place + 1}/{len(stages)}] {stage.name}, {max(limit, 0):.0f} s at most")
        done = run_stage(stage, setting, limit, environment)
        results = replace(results, stages=(*results.stages, done))
        write(results, output)
        tell(f"[{place + 1}/{len(stages)}] {stage.name}: {done.status}, {done.seconds:.0f} s {done.note}".rstrip())
    return results


def run_stage(stage: Stage, setting: Setting, limit: float, environment: dict[str, str]) -> StageResult:
    """Run one stage for `limit` seconds at most; whatever ends its process ends it alone."""
    if limit < 1:
        return StageResult(stage.name, NO_TIME, 0.0, round(max(limit, 0), 1), "nothing was left of the time for all")
    rows_file, said = setting.scratch / f"{stage.name}.rows", setting.scratch / f"{stage.name}.said"
    request = {
        "function": stage.function,
        "needs": stage.needs,
        "device": setting.device,
        "sizes": setting.sizes,
        "scratch": str(setting.scratch),
        "bundles": str(setting.bundles),
        "seconds": limit,
        "rows": str(rows_file),
    }
    rows_file.touch()
    start = time.monotonic()
    with said.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "gpu.worker"],
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=setting.scratch,
            start_new_session=True,  # with all that it starts, to be ended together
        )
        try:
            process.communicate(json.dumps(request).encode(), timeout=limit)
            ended = _end(process.returncode, said)
        except subprocess.TimeoutExpired:
            ended = TIMED_OUT, f"stopped after {limit:.0f} s"
        finally:
            _kill(process)
    rows, done = _rows(rows_file)
    status, note = ended
    if not status and not done:
        status, note = CRASHED, "its process ended without a word"
    elif not status:
        status, note = _sum_up(rows)
    return StageResult(stage.name, status, round(time.monotonic() - start, 1), round(limit, 1), note, rows)


def _sum_up(rows: Sequence[Row]) -> tuple[str, str]:
    """The status of a stage that came to its end, and what a reader should know first."""
    if not rows:
        return FAILED, "it gave no row"
    status = worst(row.status for row in rows)
    notes = [f"{row.name}: {row.note}" for row in rows if row.status == status]
    return status, "" if status == PASSED else notes[0] + (f" (and {len(notes) - 1} more)" if notes[1:] else "")


def _end(code: int, said: Path) -> tuple[str, str]:
    if code == 0:
        return "", ""
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    words = [line for line in said.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = f", having said: {words[-1].strip()[:200]}" if words else ""
    return CRASHED, how + last.replace(str(ROOT), ".")


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # also what the stage started and left
    process.wait()


def _rows(file: Path) -> tuple[tuple[Row, ...], bool]:
    rows, done = [], False
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            document = json.loads(line)
        except ValueError:  # cut while it was written
            continue
        if "done" in document:
            done = True
        else:
            rows.append(Row(**document))
    return tuple(rows), done
