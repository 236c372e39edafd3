"""What this project says about GPUs, and which rows of a run prove it. docs/gpu.md has a line for each claim."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gpu.results import BAD, CRASHED, FAILED, PASSED, TIMED_OUT, Results, Row
from gpu.sizes import FULL

NO_RUN = "*unverified*: no run on a GPU yet"
_BATCH = 32
_SERVED = r"parity|batch"  # of the rows of plans: that they build is not that they run


@dataclass(frozen=True)
class Headline:
    """A figure that is told with a claim: of which row of which stage, in what words."""

    stage: str
    row: str
    figure: str
    words: str


@dataclass(frozen=True)
class Claim:
    """Something to be shown on a GPU, and what was tested in place of one.

    It is verified when every row of `stage` whose name `rows` (a regular expression) is found in has passed, whatever
    became of the stage's other rows.
    """

    what: str
    so_far: str
    stage: str
    rows: str = ""
    headline: Headline | None = None


def _rate(stage: str, row: str) -> Headline:
    return Headline(stage, f"{row}, batch {_BATCH}", "images/s", f"{{:.0f}} images/s at batch {_BATCH}")


CLAIMS = (
    Claim(
        "selective scan on CUDA: `selective_scan.cu`",
        "compiled; source and committed PTX run on the CPU; launches checked against a stub driver",
        "scan",
        "^b?float",
        Headline("scan time", "selective_scan.cu, float16, batch 64", "× its floor", "{:.2f}× its floor at batch 64"),
    ),
    Claim(
        "selective scan on CUDA: ONNX Runtime's operator",
        "built; the PTX runs on the CPU with what a stub driver was called with",
        "onnxruntime",
        "own op",
    ),
    Claim(
        "selective scan on CUDA: TensorRT 11's plugin",
        "registered with NVIDIA's own registry; the PTX runs on the CPU with the launch that it gives TensorRT",
        "tensorrt demo",
        _SERVED,
    ),
    Claim(
        "selective scan on CUDA: mamba-ssm's kernel and its gradient, which training takes",
        "its calls are tested against a stand-in",
        "scan",
        "^mamba-ssm",
    ),
    Claim(
        "selective scan on CUDA: no access out of bounds, no race",
        "in emulation under GCC's address sanitizer",
        "sanitizer",
    ),
    Claim("PyTorch on CUDA, fp32 and fp16", "tested on CPUs", "pytorch", headline=_rate("pytorch", "fp16")),
    Claim(
        "ONNX Runtime CUDA, `--backend onnxruntime-cuda`",
        "",
        "onnxruntime",
        headline=_rate("onnxruntime", "fp16, own op"),
    ),
    Claim("ONNX Runtime CUDA without our operator: the function body", "", "function body"),
    Claim(
        "TensorRT 11: the demo's plans, and the session that runs them",
        "tested with stand-ins for GPU and builder",
        "tensorrt demo",
    ),
    *(
        Claim(
            f"TensorRT 11 at full size, {precision}",
            "tested with stand-ins for GPU and builder",
            f"tensorrt {precision}",
            headline=_rate(f"tensorrt {precision}", precision),
        )
        for precision in FULL.precisions
    ),
    Claim(
        "TensorRT-RTX 1.7.1: plans of all graphs (`mdnet-export engines --backend tensorrt-rtx`)",
        "build without a GPU, in `make test` too: the demo's and, in a run by hand, the full size's in every "
        "precision; [times](benchmarks.md#tensorrt-rtx-plans)",
        "tensorrt-rtx",
        _SERVED,
        _rate("tensorrt-rtx", "fp16"),
    ),
    Claim(
        "JPEG files to scores on a GPU",
        "the same pipeline runs on CPUs",
        "end to end",
        headline=Headline("end to end", "fp16, JPEG files", "images/s", "{:.0f} images/s"),
    ),
    Claim("the tests marked `gpu`", "skipped without a GPU", "tests"),
)


def state(claim: Claim, results: Results | None) -> str:
    """What can be said of a claim after a run, in Markdown; figures come with the GPU and the day."""
    before = f"{claim.so_far}; " if claim.so_far else ""
    if results is None:
        return before + NO_RUN
    where = f"{results.gpu}, {results.day}"
    stage = next((each for each in results.stages if each.name == claim.stage), None)
    if stage is None:
        return f"{before}*unverified*: left out of the run on {where}"
    rows = [row for row in stage.rows if re.search(claim.rows, row.name)]
    failed = [row for row in rows if row.status in (FAILED, CRASHED)]
    if failed:
        return f"**{failed[0].status}** on {where}: {cell(f'{failed[0].name}: {failed[0].note}')}"
    if not any(row.status == PASSED for row in rows):
        late = next((row for row in rows if row.status == TIMED_OUT), None)
        first = late or (rows[0] if rows else stage)
        if first.status in BAD:
            return f"**{first.status}** on {where}: {cell(f'{late.name}: {late.note}' if late else first.note)}"
        note = f" ({cell(first.note)})" if first.note else ""
        return f"{before}*unverified*: {first.status} on {where}{note}"
    words = _told(claim.headline, results)
    lacking = [f"{row.name} ({row.status})" for row in rows if row.status != PASSED]
    if lacking:
        return f"verified in part on {where}{words}; without {cell(', '.join(lacking))}"
    return f"verified on {where}{words}"


def _told(headline: Headline | None, results: Results) -> str:
    if headline is None:
        return ""
    row = next((row for row in results.rows(headline.stage) if row.name == headline.row), None)
    value = row.number(headline.figure) if row else None
    return "" if value is None else f": {headline.words.format(value)}"


def cell(text: str) -> str:
    """Text in a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


# --------------------------------------------------------------------------------------------------------------- goals


@dataclass(frozen=True)
class Goal:
    """A figure that is aimed at: not a check, since it is no error to miss it."""

    what: str
    at_least: bool
    limit: float
    measured: Callable[[Results], float | None]


def _scan_over_floor(results: Results) -> float | None:
    values = [row.number("× its floor") for row in results.rows("scan time") if row.name.endswith("batch 64")]
    return max((value for value in values if value is not None), default=None)


def _fp16_rows(results: Results) -> Iterator[Row]:
    for stage in ("onnxruntime", "tensorrt fp16", "tensorrt-rtx"):
        for row in results.rows(stage):
            if row.status == PASSED and row.name.startswith("fp16") and row.name.endswith(f"batch {_BATCH}"):
                yield row


def _best(results: Results, figure: str) -> float | None:
    values = [row.number(figure) for row in _fp16_rows(results)]
    return max((value for value in values if value is not None), default=None)


def _over_compiled(results: Results) -> float | None:
    own = _best(results, "images/s")
    rows = (row for row in results.rows("torch.compile") if row.name == f"fp16, batch {_BATCH}")
    other = next((row.number("images/s") for row in rows), None)
    return own / other if own and other else None


GOALS = (
    Goal("selective scan, batch 64: at most 1.5× its floor", False, 1.5, _scan_over_floor),
    Goal(f"fp16, batch {_BATCH}: at least 1.3× `torch.compile` fp16", True, 1.3, _over_compiled),
    Goal(
        f"whole model in fp16, batch {_BATCH}: at least 0.5 of the measured matrix product's rate",
        True,
        0.5,
        lambda results: _best(results, "of the matrix product's rate"),
    ),
)


def goal_state(goal: Goal, results: Results | None) -> str:
    """Met, missed or unverified, in Markdown."""
    if results is None:
        return NO_RUN
    value = goal.measured(results)
    where = f"{results.gpu}, {results.day}"
    if value is None:
        return f"*unverified*: not measured on {where}"
    met = value >= goal.limit if goal.at_least else value <= goal.limit
    return f"{'met' if met else 'missed'} on {where}: {value:.2f}"
