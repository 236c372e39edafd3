"""The encoder in int8 or fp8: calibrate, choose the blocks by what they do to the score, write Q/DQ graphs.

int8 is also timed, since it is for CPUs. Vim and fusion stay in float: the encoder is nine tenths of the work. For ONNX
Runtime on the CPU their wide products are written in bfloat16 (`mdnet_calib.passes.bfloat16`), which needs no
calibration; on GPUs they are float16.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import onnx

from mdnet_calib.cache import histograms
from mdnet_calib.calibration_set import CalibrationSet, RangeMethod
from mdnet_calib.passes import fp8
from mdnet_calib.passes.graph_view import copy_of
from mdnet_calib.passes.int8 import activations, int8_nodes, to_int8
from mdnet_calib.ranges import Histogram, collect
from mdnet_calib.sensitivity import Budget, Choice, choose
from mdnet_engines.bundle.files import sha256_of
from mdnet_engines.bundle.manifest import Precision, ScoreScale
from mdnet_engines.bundle.precision_facts import CalibrationFacts, Fp8Facts, Int8Facts
from mdnet_engines.errors import MDNetError
from mdnet_engines.parity.gates import LIMITS_SCALE
from mdnet_engines.progress import SILENT, Progress
from mdnet_engines.sessions.session import Session
from mdnet_engines.system.machine import lacks_vnni
from mdnet_export.drift import BudgetCheck, cpu_backends, open_on
from mdnet_export.graphs.cpu_variant import add_exact_variant, write_variants
from mdnet_export.graphs.export import save_graph

FP8_METHOD: RangeMethod = "minmax"  # a number with an exponent loses nothing to the outliers that it makes room for
NOISE = 0.05
"""Of the float encoder's time: so much longer may int8 take before it counts as slower. Two timings of the same graph
differ by some per cent on a shared machine, and a build should not fail by chance."""


@dataclass(frozen=True)
class Calibration:
    """How to calibrate: on what, ranges by which method, within which budget, and where histograms are kept.

    The budget's drift is in rating points of `scale`.
    """

    images: CalibrationSet
    method: RangeMethod = "percentile"
    budget: Budget = field(default_factory=Budget)
    cache: Path | None = None
    scale: ScoreScale = LIMITS_SCALE
    """Of the scores."""

    def facts(self, precision: Precision) -> CalibrationFacts:
        """What the manifest says of it."""
        return CalibrationFacts(
            images=len(self.images.names),
            source=self.images.source,
            sha256=self.images.digest,
            method={"int8": self.method, "fp8": FP8_METHOD}.get(precision),
        )


@dataclass(frozen=True)
class Speed:
    """Seconds for `batch` images in the encoder, float and int8, each on the backend that is fastest for it here.

    Medians of runs that took turns. `backend` is that of int8.
    """

    batch: int
    float_seconds: float
    int8_seconds: float
    backend: str

    @property
    def ratio(self) -> float:
        """How many times as fast as float."""
        return self.float_seconds / self.int8_seconds

    @property
    def slower(self) -> bool:
        """By more than `NOISE`."""
        return self.int8_seconds > (1 + NOISE) * self.float_seconds


@dataclass(frozen=True)
class Quantised:
    """What became of the encoder."""

    kind: ClassVar[str]
    choice: Choice
    budget: Budget
    backends: list[str]
    """On which the budget was held."""

    def for_people(self) -> dict[str, str]:
        """For the report's list of facts."""
        budget, drift = self.budget, self.choice.drift
        facts = {
            self.kind: f"{len(self.choice.blocks)} blocks of the encoder",
            "budget on calibration images": f"max |Δscore| {budget.max_score_drift:g}, Pearson {budget.min_pearson:g}; "
            f"used: {drift.max_abs:.3g}"
            + ("" if drift.pearson is None else f", {drift.pearson:.5f}")
            + f", the worst of {', '.join(self.backends)}",
        }
        for block in self.choice.float_blocks:
            alone = self.choice.alone[block]
            facts[f"kept in float: {block}"] = (
                f"alone in {self.kind} it moves a score by {alone.max_abs:.3g} at most, {alone.mean_abs:.3g} on average"
            )
        return facts

    def _within_budget(self) -> dict[str, Any]:
        return {
            "float_blocks": self.choice.float_blocks,
            "max_score_drift": self.budget.max_score_drift,
            "min_pearson": self.budget.min_pearson,
            "drift_max_abs": self.choice.drift.max_abs,
            "drift_pearson": self.choice.drift.pearson,
            "drift_on": self.backends,
        }


@dataclass(frozen=True)
class Int8Result(Quantised):
    """Of int8."""

    kind = "int8"
    speed: Speed

    def facts(self) -> Int8Facts:
        """What the manifest says of it."""
        return Int8Facts(
            int8_blocks=self.choice.blocks,
            **self._within_budget(),
            speedup=round(self.speed.ratio, 3),
            speedup_on=f"{self.speed.backend}, batch {self.speed.batch}",
            slower_forced=self.speed.slower and not lacks_vnni(),
        )

    def for_people(self) -> dict[str, str]:
        """For the report's list of facts."""
        facts = super().for_people()
        speed = f"{self.speed.ratio:.2f}× as fast as float ({self.speed.backend}, batch {self.speed.batch})"
        return {**facts, self.kind: f"{facts[self.kind]}, {speed}"}


@dataclass(frozen=True)
class Fp8Result(Quantised):
    """Of fp8."""

    kind = "fp8"

    def facts(self) -> Fp8Facts:
        """What the manifest says of it."""
        return Fp8Facts(fp8_blocks=self.choice.blocks, **self._within_budget())


def quantise_encoder(
    folder: Path,
    calibration: Calibration,
    *,
    progress: Progress = SILENT,
) -> Int8Result:
    """Rewrite `encoder.onnx` in a bundle's folder to int8; write each graph's variant for ONNX Runtime's CPU kernels.

    Args:
        folder: with the three float32 graphs.
        calibration: images, range method and budget.

    Raises:
        MDNetError: no block is within the budget, or a value is not finite on a calibration image.
    """
    file = folder / "encoder.onnx"
    proto = onnx.load(file)
    nodes = _wide_enough(int8_nodes(proto), "int8")
    thresholds = _thresholds(proto, activations(proto, nodes), _digest(file), calibration, calibration.method, progress)
    for name in ("vim", "fusion"):
        write_variants(onnx.load(folder / f"{name}.onnx"), folder / f"{name}.onnx")
    with TemporaryDirectory(prefix="mdnet-int8-", dir=folder.parent) as temporary:
        scratch = Path(temporary)
        write = partial(_write_int8, scratch / file.name, proto, thresholds)
        choice, backends = _choose("int8", nodes, write, folder, scratch, calibration, progress)
        del proto, write
        progress.step("timing int8 against float")
        add_exact_variant(file)  # float as it would be served
        speed = _time(folder, scratch, calibration.images.pixels)
        _replace_encoder(folder, scratch)
    return Int8Result(choice, calibration.budget, backends, speed)


def quantise_encoder_fp8(folder: Path, calibration: Calibration, *, progress: Progress = SILENT) -> Fp8Result:
    """Rewrite `encoder.onnx` in a bundle's folder to fp8, the rest of it still float32.

    Args, raises: as `quantise_encoder`; the range method is `FP8_METHOD`.
    """
    file = folder / "encoder.onnx"
    proto = onnx.load(file)
    nodes = _wide_enough(fp8.fp8_nodes(proto), "fp8")
    tensors = fp8.activations(proto, nodes)
    thresholds = _thresholds(proto, tensors, _digest(file), calibration, FP8_METHOD, progress)
    with TemporaryDirectory(prefix="mdnet-fp8-", dir=folder.parent) as temporary:
        scratch = Path(temporary)
        write = partial(_write_fp8, scratch / file.name, proto, thresholds)
        choice, backends = _choose("fp8", nodes, write, folder, scratch, calibration, progress)
        _replace_encoder(folder, scratch)
    return Fp8Result(choice, calibration.budget, backends)


def _write_int8(file: Path, proto: onnx.ModelProto, thresholds: dict[str, float], nodes: list[str]) -> None:
    write_variants(to_int8(copy_of(proto), thresholds, nodes), file)


def _write_fp8(file: Path, proto: onnx.ModelProto, thresholds: dict[str, float], nodes: list[str]) -> None:
    file.with_name(f"{file.name}.data").unlink(missing_ok=True)  # onnx appends to an existing file
    save_graph(fp8.to_fp8(copy_of(proto), thresholds, nodes), file)


def _wide_enough(nodes: list[str], kind: str) -> list[str]:
    if not nodes:
        raise MDNetError(f"nothing in the encoder is wide enough to gain from {kind}; take --precision fp16")
    return nodes


def _choose(
    kind: str,
    nodes: list[str],
    write: Callable[[list[str]], None],
    folder: Path,
    scratch: Path,
    calibration: Calibration,
    progress: Progress,
) -> tuple[Choice, list[str]]:
    """The nodes that the budget allows, and the backends that it was held on; `scratch` has the encoder with them."""
    drift_of = BudgetCheck(folder, scratch, write, calibration.images.pixels, calibration.scale)
    choice = choose(nodes, calibration.budget, drift_of, drift_alone=drift_of.alone, kind=kind, progress=progress)
    if not choice.nodes:
        harm = min(drift.max_abs for drift in choice.alone.values())
        raise MDNetError(
            f"no block of the encoder can be {kind}: even the most harmless moves a score by {harm:.3g}, the budget "
            f"is {calibration.budget.max_score_drift:g}; raise --max-score-drift or take --precision fp16"
        )
    if drift_of.written != choice.nodes:
        write(choice.nodes)
    return choice, list(drift_of.fusion)


def _replace_encoder(folder: Path, scratch: Path) -> None:
    for old in folder.glob("encoder.*"):
        old.unlink()
    for new in scratch.glob("encoder.*"):
        new.rename(folder / new.name)


def _thresholds(
    proto: onnx.ModelProto,
    tensors: list[str],
    digest: str,
    calibration: Calibration,
    method: RangeMethod,
    progress: Progress,
) -> dict[str, float]:
    """The range of each of `tensors`, from the calibration images or from their cache."""
    images = calibration.images

    def run_graph() -> dict[str, Histogram]:
        feeds = [{"image": image[None]} for image in images.pixels]
        return collect(proto, tensors, feeds, progress=progress)

    found, cached = histograms(
        calibration.cache, graph=digest, images=images.digest, tensors=tensors, collect=run_graph
    )
    progress.step(f"ranges by {method}" + (", from the cache" if cached else ""))
    return {name: histogram.threshold(method) for name, histogram in found.items()}


def _time(float_folder: Path, int8_folder: Path, pixels: np.ndarray) -> Speed:
    """Time both encoders on every runtime for CPUs that is installed; what counts is the fastest of each."""
    sessions: dict[tuple[str, str], Session] = {}
    for kind, folder in (("float", float_folder), ("int8", int8_folder)):
        sessions |= {(kind, backend): open_on(backend, folder, "encoder") for backend in cpu_backends()}
    seconds = {each: [_seconds(session, pixels[:1])] for each, session in sessions.items()}  # which warms up
    # A large model is timed with single images, so that a build does not wait for it; a small one in a batch as served.
    slow = _seconds(sessions["float", "onnxruntime-cpu"], pixels[:1]) > 0.2
    batch, rounds = (1, 5) if slow else (min(16, len(pixels)), 15)
    for _ in range(rounds + 1):  # the first has another batch size
        for each, session in sessions.items():
            seconds[each].append(_seconds(session, pixels[:batch]))
    medians = {each: statistics.median(values[2:]) for each, values in seconds.items()}
    fastest = {kind: min((m, b) for (k, b), m in medians.items() if k == kind) for kind in ("float", "int8")}
    return Speed(batch, fastest["float"][0], *fastest["int8"])


def _seconds(session: Session, pixels: np.ndarray) -> float:
    start = time.perf_counter()
    session.run({"image": pixels})
    return time.perf_counter() - start


def _digest(file: Path) -> str:
    """One sha256 of a graph and its weights."""
    data = file.with_name(f"{file.name}.data")
    return sha256_of(file) if not data.exists() else f"{sha256_of(file)[:32]}{sha256_of(data)[:32]}"
