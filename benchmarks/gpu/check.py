"""Run the stages, each in a process of its own and within its time, and write what they give after every one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gpu.journal import read
from gpu.process import StageProcess
from gpu.results import NOT_RUN, Results, StageResult, write

BUDGET = 540.0
"""Seconds for everything: nine minutes."""
ENDED = "somebody ended the run"
_MODEL = ("torch", "diffusers", "safetensors", "pydantic", "PIL")


@dataclass(frozen=True)
class Stage:
    """What runs (`module:function`, given a `context.Context`), its share of `BUDGET`, and modules it must have."""

    name: str
    function: str
    seconds: float
    needs: tuple[str, ...] = ("torch", "numpy")
    arguments: tuple[str, ...] = ()  # of the function, after the context


STAGES = (
    Stage("device", "gpu.device_facts:run", 20),
    Stage("scan", "gpu.scan:run", 40),
    Stage("scan time", "gpu.scan_time:run", 25),
    Stage("tensorrt demo", "gpu.served:tensorrt_demo", 45, _MODEL),
    Stage("onnxruntime", "gpu.served:onnxruntime", 45, (*_MODEL, "onnxruntime")),
    Stage("pytorch", "gpu.pytorch:eager", 45, _MODEL),
    Stage("tensorrt fp16", "gpu.served:tensorrt", 85, _MODEL, ("fp16",)),
    Stage("tensorrt int8", "gpu.served:tensorrt", 45, _MODEL, ("int8",)),
    Stage("tensorrt fp8", "gpu.served:tensorrt", 45, _MODEL, ("fp8",)),
    Stage("torch.compile", "gpu.pytorch:compiled", 55, _MODEL),
    Stage("tensorrt-rtx", "gpu.served:tensorrt_rtx", 10, _MODEL),
    Stage("end to end", "gpu.end_to_end:run", 15, (*_MODEL, "onnxruntime")),
    Stage("function body", "gpu.served:function_body", 15, (*_MODEL, "onnxruntime")),
    Stage("tests", "gpu.marked_tests:run", 20, ("pytest", *_MODEL, "onnx", "onnxscript", "onnxruntime")),
    Stage("sanitizer", "gpu.sanitizer:run", 20, ("numpy",)),
)
"""In the order in which they run: by what they prove and what they take, so that a run that ends early has proven most
of what it could. The shares add up to less than `BUDGET`: starting and ending processes takes some."""


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
    """Run `stages` one after the other; gives `results` with theirs.

    `output` has every row soon after it is known. What ends the script (`SystemExit`, `KeyboardInterrupt`) passes
    through when the stage's processes are gone and `output` says which stages were not run.
    """
    shares, environment = limits(stages, budget), setting.environment()
    end = time.monotonic() + budget
    write(results, output)

    def keep(*more: StageResult) -> Results:
        new = replace(results, stages=(*results.stages, *more))
        write(new, output)
        return new

    for place, stage in enumerate(stages):
        limit = end - time.monotonic() - sum(shares[place + 1 :])
        done: StageResult | None = None
        try:
            tell(f"[{place + 1}/{len(stages)}] {stage.name}, {max(limit, 0):.0f} s at most")
            done = run_stage(stage, setting, limit, environment, keep)
            results = keep(done)
            tell(f"[{place + 1}/{len(stages)}] {stage.name}: {done.status}, {done.seconds:.0f} s {done.note}".rstrip())
        except StoppedError as stopped:
            done, reason = stopped.result, stopped.reason
        except (KeyboardInterrupt, SystemExit) as error:
            reason = error
        else:
            continue
        results = replace(results, stages=results.stages[:place])
        keep(*filter(None, [done]), *(StageResult(each.name, NOT_RUN, 0.0, 0.0, ENDED) for each in stages[place + 1 :]))
        raise reason
    return results


class StoppedError(Exception):
    """The script was ended during a stage, by `reason`; `result` is what the stage had come to."""

    def __init__(self, result: StageResult, reason: BaseException):
        super().__init__(result.note)
        self.result, self.reason = result, reason


def run_stage(
    stage: Stage,
    setting: Setting,
    limit: float,
    environment: dict[str, str],
    keep: Callable[[StageResult], object] = lambda _: None,
) -> StageResult:
    """Run one stage for `limit` seconds at most; whatever ends its process ends it alone.

    Args:
        keep: given what the stage has come to whenever that is more than before.

    Raises:
        StoppedError: the script was ended meanwhile.
    """
    if limit < 1:
        return StageResult(stage.name, NOT_RUN, 0.0, round(max(limit, 0), 1), "nothing was left of the time for all")
    journal, said = setting.scratch / f"{stage.name}.journal", setting.scratch / f"{stage.name}.said"
    journal.touch()
    request = {
        "function": stage.function,
        "arguments": stage.arguments,
        "needs": stage.needs,
        "device": setting.device,
        "sizes": setting.sizes,
        "scratch": str(setting.scratch),
        "bundles": str(setting.bundles),
        "seconds": limit,
        "journal": str(journal),
    }
    start, kept = time.monotonic(), 0
    process: StageProcess | None = None

    def result(ended: tuple[str, str]) -> StageResult:
        return read(journal, stage.name, ended, time.monotonic() - start, limit)

    def look() -> None:
        nonlocal kept
        if (size := journal.stat().st_size) > kept:
            kept = size
            keep(result((NOT_RUN, ENDED)))  # as true as it can be, should nobody write this file again

    try:
        process = StageProcess(request, said, environment, setting.scratch)
        status, note = process.wait(limit, look)
        if not process.end():
            note += ", and can't be ended"
        return result((status, note))
    except (KeyboardInterrupt, SystemExit) as reason:
        if process is not None:
            process.end()
        raise StoppedError(result((NOT_RUN, ENDED)), reason) from None
