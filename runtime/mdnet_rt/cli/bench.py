"""`mdnet-rt bench`: how fast a bundle is here, and against what."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mdnet_engines.backends.candidates import BACKENDS, Backend
from mdnet_engines.console import say, show, show_progress
from mdnet_engines.errors import UsageError, printable
from mdnet_engines.system.output_path import write_text

if TYPE_CHECKING:
    from rich.table import Table

    from mdnet_rt.bench.run import BatchResult


_MAX_JPEG = 65_500  # pixels on a side, libjpeg's limit


@click.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="What runs the bundle.")
@click.option(
    "--against",
    multiple=True,
    type=click.Choice([*BACKENDS, "pytorch"]),
    help="Compare with this, taking turns; may be repeated.",
)
@click.option("--batch-sizes", default="1,4,16", show_default=True, help="Separated by commas.")
@click.option(
    "--seconds", type=click.FloatRange(0.1), default=8, show_default=True, help="To measure a batch size for."
)
@click.option("--rounds", type=click.IntRange(1), help="Measure this many rounds, however long they take.")
@click.option("--threads", type=click.IntRange(0, 1024), default=0, help="Threads per graph. Default: all cores.")
@click.option("--images", multiple=True, type=click.Path(), help="Images to run on. Default: JPEGs are made.")
@click.option("--image-size", default="350x350", show_default=True, help="Width and height of the JPEGs that are made.")
@click.option("-o", "--json", "json_", type=click.Path(path_type=Path), help="Write all figures to this file.")
def bench(
    bundle: Path | None,
    backend: Backend,
    against: tuple[str, ...],
    batch_sizes: str,
    seconds: float,
    rounds: int | None,
    threads: int,
    images: tuple[str, ...],
    image_size: str,
    json_: Path | None,
) -> None:
    """Time decoding, each graph, the graphs chained, and image files to rows; latency, images/s, peak memory.

    With --against, also how many times faster the bundle is than others, median and quartiles over the rounds.
    BUNDLE is by default $MDNET_BUNDLE, else ./mdnet-bundle.
    """
    from mdnet_engines.bundle.files import read_manifest
    from mdnet_rt.bench.run import Setup, measure, to_json
    from mdnet_rt.rows.writers import check_output
    from mdnet_rt.scoring.scorer import find_bundle
    from mdnet_rt.sources.locations import find_locations

    sizes = _parse_batch_sizes(batch_sizes)
    width_height = _parse_image_size(image_size)
    if json_:
        check_output(json_, "jsonl")
    find_locations(images)  # so that errors in them come before anything is started
    folder = find_bundle(bundle)
    setup = Setup(
        folder,
        read_manifest(folder),
        backend=backend,
        against=against,
        threads=threads,
        images=images,
        image_size=width_height,
        seconds=seconds,
        rounds=rounds,
    )
    say(f"{printable(folder)}: {printable(setup.manifest.label)}")
    results = []
    for size in sizes:
        with show_progress(lines=False) as progress:
            result = measure(setup, size, progress=progress)
        if size == sizes[0]:
            for line in _about(result):
                say(line)
        show(_table(result, backend))  # at once: a batch size that fails loses no earlier table
        results.append(result)
    if json_:
        document = to_json(setup, results, shlex.join(["mdnet-rt", *sys.argv[1:]]))
        write_text(json_, json.dumps(document, indent=1, allow_nan=False) + "\n")


def _parse_batch_sizes(text: str) -> list[int]:
    words = text.split(",")
    if not all(re.fullmatch(r" *[0-9]{1,4} *", word) and 1 <= int(word) <= 1024 for word in words):
        raise UsageError(f"--batch-sizes {printable(text)}: expected numbers from 1 to 1024, such as 1,4,16")
    return list(dict.fromkeys(int(word) for word in words))


def _parse_image_size(text: str) -> tuple[int, int]:
    from mdnet_rt.images.preprocess import MAX_PIXELS

    found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    width, height = map(int, found.groups()) if found else (0, 0)
    if not 0 < width * height <= MAX_PIXELS or max(width, height) > _MAX_JPEG:
        raise UsageError(
            f"--image-size {printable(text)}: expected a width and height such as 350x350, "
            f"at most {MAX_PIXELS} pixels and {_MAX_JPEG} on a side"
        )
    return width, height


def _about(result: BatchResult) -> Iterator[str]:
    """What the contestants run on, a line each."""
    from mdnet_engines.backends.candidates import Choice

    for name, facts in result.contestants.items():
        if (what := str(Choice(facts["graphs"]))) != name:
            yield f"{name}: {what}"
    images = next(iter(result.contestants.values()))["images"]
    source = images["source"] if isinstance(images["source"], str) else " ".join(map(printable, images["source"]))
    skipped = f", {images['skipped']} that can't be read left out" if images["skipped"] else ""
    yield f"images: {source}{skipped}"


def _table(result: BatchResult, baseline: str) -> Table:
    from rich.table import Table

    peaks = ", ".join(
        f"{name} {facts['peak_memory_bytes'] / 2**20:.0f} MiB"
        for name, facts in result.contestants.items()
        if facts["peak_memory_bytes"]
    )
    table = Table(
        title=f"batch {result.batch_size}, {result.rounds} rounds", caption=f"peak memory: {peaks}" if peaks else None
    )
    table.add_column("stage")
    if several := len(result.contestants) > 1:
        table.add_column("run by")
    for title in ("images", "p50 ms", "p90 ms", "p99 ms", "images/s"):
        table.add_column(title, justify="right")
    if several:
        table.add_column(f"{baseline} ÷ this", no_wrap=True)
    stage = ""
    for row in result.rows:
        cells = [row.stage if row.stage != stage else "", *([row.contestant] if several else []), str(row.images)]
        cells += [f"{value:.2f}" for value in (row.p50_ms, row.p90_ms, row.p99_ms)]
        rate = row.images_per_second
        cells += [f"{rate:.1f}" if rate >= 10 else f"{rate:.3g}"]
        if row.ratio:
            cells += [f"{row.ratio.median:.2f} ({row.ratio.p25:.2f}–{row.ratio.p75:.2f})"]
        table.add_row(*cells)
        stage = row.stage
    return table
