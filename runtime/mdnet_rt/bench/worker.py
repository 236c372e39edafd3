"""A bundle on one backend as a contestant of `mdnet-rt bench`: `python -m mdnet_rt.bench.worker`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from mdnet_engines.system.child_process import serve
from mdnet_rt.bench.clock import timed

if TYPE_CHECKING:
    from mdnet_rt.sources.entry import Entry

STREAM = 4
"""Batches of one end-to-end run: enough for decoding and graphs to overlap."""
MADE = 8
"""Distinct images that are made where none are given; they are used over and over."""


Stages = dict[str, Callable[[], object]]


def answer(opened: Callable[[Mapping[str, Any]], tuple[Stages, dict[str, Any]]]) -> NoReturn:
    """Be a `Worker`'s process.

    Args:
        opened: takes the worker's options; gives the stages that can be run, and what there is to say about them.
    """
    stages: Stages = {}

    def open_(request: dict[str, Any], say: object) -> dict[str, Any]:
        found, facts = opened(request)
        stages.update(found)
        return facts

    serve({"open": open_, "run": lambda request, _: timed(stages[request["stage"]])[1]})


def open_stages(options: Mapping[str, Any]) -> tuple[Stages, dict[str, Any]]:
    """What can be run, and what there is to say about it.

    Args:
        options: `bundle`, `backend`, `threads`, `batch_size`, and either `images` (locations) or `image_size`.

    Raises:
        UsageError: a backend that is not for this bundle; no image can be read.
        MDNetError: the bundle or the backend can't be opened.
    """
    from mdnet_engines.bundle.files import Bundle
    from mdnet_engines.framing import FramingWarning
    from mdnet_rt.bench.sample import decode
    from mdnet_rt.scoring.scorer import Scorer

    n = options["batch_size"]
    bundle = Bundle.open(Path(options["bundle"]))
    made = bundle.manifest.preprocessing
    # The JPEGs that are made show no face: of a model that looks for one, all but the search is timed.
    face = made.face if options.get("images") else None
    entries, images = _images(options, made.image_size, face)
    batch, stream = list(islice(cycle(entries), n)), list(islice(cycle(entries), STREAM * n))
    backend, threads = options["backend"], options["threads"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FramingWarning)
        scorer = Scorer(
            bundle,
            backend=backend,
            threads=threads,
            batch_size=n,
            check=backend == "auto",
            face=None if face == made.face else "none",
        )
    graphs, size = scorer._graphs, scorer.image_size
    pixels = np.stack([decode(entry, size, face=face) for entry in batch])
    features = {**graphs["encoder"].run({"image": pixels}), **graphs["vim"].run({"image": pixels})}
    stages: Stages = {
        "decode": lambda: [decode(entry, size, face=face) for entry in batch],
        "encoder": lambda: graphs["encoder"].run({"image": pixels}),
        "vim": lambda: graphs["vim"].run({"image": pixels}),
        "fusion": lambda: graphs["fusion"].run(features),
        "graphs": lambda: graphs.score(pixels),
        "end to end": lambda: list(scorer.stream(stream)),
    }
    runs = {stage: STREAM * n if stage == "end to end" else n for stage in stages}
    return stages, {"images_per_run": runs, "graphs": dict(scorer.choice.graphs), "images": images}


def _images(options: Mapping[str, Any], size: int, face: float | None) -> tuple[list[Entry], dict[str, Any]]:
    from mdnet_rt.bench.sample import make_jpegs, take_images

    count = STREAM * options["batch_size"]
    if images := options.get("images"):
        entries, skipped = take_images(images, count, size, face=face)
        return entries, {"source": images, "distinct": len(entries), "skipped": skipped}
    width, height = options["image_size"]
    entries = make_jpegs(min(MADE, count), width, height)
    source = f"made: JPEGs of {width}x{height}, low-frequency noise, seed 0"
    return entries, {"source": source, "distinct": len(entries), "skipped": 0}


if __name__ == "__main__":
    answer(open_stages)
