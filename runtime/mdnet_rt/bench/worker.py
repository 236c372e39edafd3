"""A bundle on one backend as a contestant of `mdnet-rt bench`: `python -m mdnet_rt.bench.worker`.

What comes in and goes out is in `process.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from mdnet_engines.errors import MDNetError, first_line
from mdnet_rt.bench.clock import timed

if TYPE_CHECKING:
    from mdnet_rt.sources.entry import Entry

STREAM = 4
"""Batches of one end-to-end run: enough for decoding and graphs to overlap."""
MADE = 8
"""Distinct images that are made where none are given; they are used over and over."""


Stages = dict[str, Callable[[], object]]


def main() -> None:
    """Answer for the bundle that the command line names."""
    answer(lambda: open_stages(_parse()))


def answer(opened: Callable[[], tuple[Stages, dict[str, Any]]]) -> None:
    """Answer on standard output until standard input ends.

    Args:
        opened: gives the stages that can be run, and what there is to say about them.
    """
    # A library that prints must not write between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        stages, facts = opened()
        print(json.dumps(facts), file=answers, flush=True)
        for line in sys.stdin:
            _, seconds = timed(stages[line.strip()])
            print(seconds, file=answers, flush=True)
    except MDNetError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        print(f"unexpected {type(error).__name__}: {first_line(error)}", file=sys.stderr)
        sys.exit(1)


def open_stages(options: argparse.Namespace) -> tuple[Stages, dict[str, Any]]:
    """What can be run, and what there is to say about it.

    Raises:
        UsageError: a backend that is not for this bundle; no image can be read.
        MDNetError: the bundle or the backend can't be opened.
    """
    from mdnet_engines.bundle.files import Bundle
    from mdnet_rt.bench.sample import decode
    from mdnet_rt.scoring.scorer import Scorer

    n = options.batch_size
    bundle = Bundle.open(options.bundle)
    entries, images = _images(options, bundle.manifest.preprocessing.image_size)
    batch, stream = list(islice(cycle(entries), n)), list(islice(cycle(entries), STREAM * n))
    check = options.backend == "auto"
    scorer = Scorer(bundle, backend=options.backend, threads=options.threads, batch_size=n, check=check)
    graphs, size = scorer._graphs, scorer.image_size
    pixels = np.stack([decode(entry, size) for entry in batch])
    features = {**graphs["encoder"].run({"image": pixels}), **graphs["vim"].run({"image": pixels})}
    stages: Stages = {
        "decode": lambda: [decode(entry, size) for entry in batch],
        "encoder": lambda: graphs["encoder"].run({"image": pixels}),
        "vim": lambda: graphs["vim"].run({"image": pixels}),
        "fusion": lambda: graphs["fusion"].run(features),
        "graphs": lambda: graphs.score(pixels),
        "end to end": lambda: list(scorer.stream(stream)),
    }
    runs = {stage: STREAM * n if stage == "end to end" else n for stage in stages}
    return stages, {"images_per_run": runs, "graphs": dict(scorer.choice.graphs), "images": images}


def _images(options: argparse.Namespace, size: int) -> tuple[list[Entry], dict[str, Any]]:
    from mdnet_rt.bench.sample import make_jpegs, take_images

    if options.images:
        entries, skipped = take_images(options.images, STREAM * options.batch_size, size)
        return entries, {"source": options.images, "distinct": len(entries), "skipped": skipped}
    width, height = map(int, options.image_size.split("x"))
    entries = make_jpegs(min(MADE, STREAM * options.batch_size), width, height)
    source = f"made: JPEGs of {width}x{height}, low-frequency noise, seed 0"
    return entries, {"source": source, "distinct": len(entries), "skipped": 0}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--images", action="append")
    images.add_argument("--image-size")
    return parser.parse_args()


if __name__ == "__main__":
    main()
