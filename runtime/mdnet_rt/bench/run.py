"""How fast a bundle is on this machine, part by part and as a whole, and against other ways to run the same model.

Each contestant is a process of its own (`process.py`). In every round each stage is run once by all who know it, one
right after the other and in turned order every other round, so that what the machine does meanwhile hits all alike; a
ratio is taken within a round, and its median is reported.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mdnet_engines.backends.candidates import Backend
from mdnet_engines.bundle.manifest import Manifest
from mdnet_engines.errors import UsageError
from mdnet_engines.progress import SILENT, Progress
from mdnet_engines.system.cores import available_cores
from mdnet_rt.bench.facts import describe_bundle, describe_host
from mdnet_rt.bench.process import Worker

PYTORCH = "pytorch"
STAGES = ("decode", "encoder", "vim", "fusion", "graphs", "end to end")
"""Decoding in one thread; each graph alone; the three, chained; image files → rows, a stream of several batches."""
SCHEMA_VERSION = 1
_LEAST_ROUNDS = 3  # however long they take: a median of fewer is none


@dataclass(frozen=True)
class Setup:
    """What is measured.

    Args:
        bundle: its folder, and `manifest` what it holds.
        backend: what runs the bundle, the baseline of every ratio.
        against: backends, or `pytorch`, to compare with.
        threads: per graph; 0 takes all the cores this process may use.
        images: locations, as `mdnet_rt.sources.locations` has them; without any, JPEGs of `image_size` are made.
        image_size: width and height.
        seconds: how long one batch size is measured, three rounds at least.
        rounds: how many rounds, in place of `seconds`.
    """

    bundle: Path
    manifest: Manifest
    backend: Backend = "auto"
    against: tuple[str, ...] = ()
    threads: int = 0
    images: tuple[str, ...] = ()
    image_size: tuple[int, int] = (350, 350)
    seconds: float = 8.0
    rounds: int | None = None


@dataclass(frozen=True)
class Ratio:
    """Another contestant's time over the baseline's, of the rounds' pairs: above 1 the baseline is faster."""

    median: float
    p25: float
    p75: float


@dataclass(frozen=True)
class Row:
    """One stage of one contestant. A run is `images` images; `ratio` is missing for the baseline itself."""

    stage: str
    contestant: str
    images: int
    runs: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    images_per_second: float
    ratio: Ratio | None


@dataclass(frozen=True)
class BatchResult:
    """The figures of one batch size. `contestants`: what each reports, and `peak_memory_bytes` of its process."""

    batch_size: int
    rounds: int
    rows: list[Row]
    contestants: dict[str, dict[str, Any]]


def contestants(setup: Setup) -> dict[str, str]:
    """What is run, by the names that rows have, the baseline first. One that runs against itself has two names."""
    others = {f"{each} (again)" if each == setup.backend else each: each for each in setup.against}
    return {setup.backend: setup.backend, **others}


def measure(setup: Setup, batch_size: int, *, progress: Progress = SILENT) -> BatchResult:
    """Measure one batch size, in processes that start for it and end with it.

    Raises:
        UsageError, MDNetError: a contestant can't be had here, is another model than the bundle's, or died.
    """
    with contextlib.ExitStack() as stack:
        chosen = contestants(setup)
        progress.step(f"batch {batch_size}: starting {', '.join(chosen)}")
        workers = [stack.enter_context(_start(setup, name, what, batch_size)) for name, what in chosen.items()]
        told = [worker.ready() for worker in workers]
        for worker, facts in zip(workers, told, strict=True):
            _check_shapes(worker.name, facts, setup.manifest)
        runs = [facts["images_per_run"] for facts in told]
        # Decoding is the same for all.
        stages = {stage: [i for i, known in enumerate(runs) if stage in known] for stage in STAGES}
        stages["decode"] = [0]
        # Warms up; a stream runs nothing that its parts did not, and takes longest.
        _round(workers, {stage: known for stage, known in stages.items() if stage != STAGES[-1]}, turned=False)
        rounds: list[Round] = []
        start = time.perf_counter()
        while _goes_on(setup, len(rounds), time.perf_counter() - start):
            progress.step(f"batch {batch_size}: round {len(rounds) + 1}")
            rounds.append(_round(workers, stages, turned=len(rounds) % 2 == 1))
        about = {
            worker.name: {**facts, "peak_memory_bytes": worker.peak_memory()}
            for worker, facts in zip(workers, told, strict=True)
        }

    def times(stage: str, i: int) -> list[float]:
        return [each[stage, i] for each in rounds]

    rows = [
        make_row(stage, workers[i].name, runs[i][stage], times(stage, i), times(stage, 0) if i else None)
        for stage, known in stages.items()
        for i in known
    ]
    return BatchResult(batch_size, len(rounds), rows, about)


def make_row(
    stage: str, contestant: str, images: int, seconds: Sequence[float], baseline: Sequence[float] | None
) -> Row:
    """The figures of one contestant's runs. `baseline`: the seconds of the baseline in the same rounds."""
    p50, p90, p99 = (float(value) for value in np.percentile(seconds, (50, 90, 99)) * 1e3)
    ratio = None
    if baseline is not None:
        p25, median, p75 = (float(value) for value in np.percentile(np.divide(seconds, baseline), (25, 50, 75)))
        ratio = Ratio(median, p25, p75)
    return Row(stage, contestant, images, len(seconds), p50, p90, p99, images * len(seconds) / sum(seconds), ratio)


def to_json(setup: Setup, results: Sequence[BatchResult], command: str) -> dict[str, Any]:
    """All figures, and what a reader needs to know of them."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        **describe_host(),
        "bundle": describe_bundle(setup.manifest),
        "baseline": setup.backend,
        "threads": setup.threads or available_cores(),
        "batches": [asdict(result) for result in results],
    }


Round = dict[tuple[str, int], float]
"""Seconds by stage and contestant."""


def _start(setup: Setup, name: str, what: str, batch_size: int) -> Worker:
    threads = setup.threads or available_cores()
    options: dict[str, Any] = {"batch_size": batch_size}
    if what == PYTORCH:
        options |= {"preset": setup.manifest.preset, "image_size": setup.manifest.preprocessing.image_size}
        return Worker(name, ["-m", "mdnet.cli.bench_worker"], options, threads=threads)
    options |= {"bundle": os.fspath(setup.bundle), "backend": what}
    options |= {"images": setup.images} if setup.images else {"image_size": setup.image_size}
    return Worker(name, ["-m", "mdnet_rt.bench.worker"], options, threads=threads)


def _check_shapes(name: str, facts: dict[str, Any], manifest: Manifest) -> None:
    """Refuse a model of another size: the preset alone does not say everything (Vim's stride, for one)."""
    own = {spec.name: spec.shape[1:] for graph in manifest.graphs.values() for spec in graph.outputs}
    for output, shape in facts.get("shapes", {}).items():
        if own.get(output) != shape:
            raise UsageError(
                f"{name}: the preset {manifest.preset} gives {output} {shape}, this bundle {own.get(output)}; "
                "it can't be run against the preset's model"
            )


def _round(workers: Sequence[Worker], stages: dict[str, list[int]], *, turned: bool) -> Round:
    return {
        (stage, i): workers[i].run(stage)
        for stage, known in stages.items()
        for i in (reversed(known) if turned else known)
    }


def _goes_on(setup: Setup, rounds: int, seconds: float) -> bool:
    if setup.rounds is not None:
        return rounds < setup.rounds
    return rounds < _LEAST_ROUNDS or seconds < setup.seconds
