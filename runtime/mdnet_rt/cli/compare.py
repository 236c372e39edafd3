"""`mdnet-rt compare`: two bundles on the same images."""

from __future__ import annotations

import functools
import json
import shlex
import sys
import warnings
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mdnet_engines.backends.candidates import BACKENDS, Backend
from mdnet_engines.console import say, show, show_progress
from mdnet_engines.errors import printable
from mdnet_engines.system.output_path import write_text

if TYPE_CHECKING:
    from rich.table import Table

    from mdnet_engines.bundle.manifest import Manifest
    from mdnet_rt.bench.compare import Comparison, Pair


@click.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--images", multiple=True, required=True, type=click.Path(), help="Images, a folder, a pattern, or a URL."
)
@click.option("--limit", type=click.IntRange(1), help="Take only the first so many.")
@click.option(
    "--worst", type=click.IntRange(0), default=5, show_default=True, help="Rows shown: furthest apart, moved."
)
@click.option("--batch-size", type=click.IntRange(1, 1024), default=16, show_default=True, help="Images at once.")
@click.option("--threads", type=click.IntRange(0, 1024), default=0, help="Threads per graph. Default: all cores.")
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="What runs both.")
@click.option("-o", "--json", "json_", type=click.Path(path_type=Path), help="Write all figures to this file.")
def compare(
    a: Path,
    b: Path,
    images: tuple[str, ...],
    limit: int | None,
    worst: int,
    batch_size: int,
    threads: int,
    backend: Backend,
    json_: Path | None,
) -> int:
    """Score the same images with the bundles A and B: how far apart the scores are, what moves in rank, speed.

    Exit code 0: both scored every image; 1: some were not scored by A or by B.
    """
    from mdnet_engines.bundle.files import Bundle
    from mdnet_engines.system.cores import available_cores
    from mdnet_rt.bench.compare import compare_bundles, to_json
    from mdnet_rt.rows.writers import check_output
    from mdnet_rt.scoring.scorer import Scorer
    from mdnet_rt.sources.locations import find_locations, read_locations

    warnings.simplefilter("ignore")  # Pillow's: what matters of them becomes a reason
    if json_:
        check_output(json_, "jsonl")
    entries = islice(read_locations(find_locations(images)), limit)
    bundles = [Bundle.open(folder) for folder in (a, b)]
    manifests = [bundle.manifest for bundle in bundles]
    if note := _scales_note(*manifests):
        say(note)
    # A backend that was named is compared whatever its gates say.
    open_one = functools.partial(
        Scorer, backend=backend, threads=threads, batch_size=batch_size, check=backend == "auto"
    )
    with open_one(bundles[0]) as scorer_a, open_one(bundles[1]) as scorer_b:
        scorers = (scorer_a, scorer_b)
        for name, bundle, scorer in zip("AB", bundles, scorers, strict=True):
            manifest = bundle.manifest
            say(f"{name}: {printable(bundle.path)}, {printable(manifest.label)}, {scorer.choice}")
        with show_progress(unit="images", lines=False) as progress:
            advance = progress.count("scoring", limit)
            found = compare_bundles(*scorers, entries, batch_size=batch_size, advance=advance)
    _print(found, worst)
    if json_:
        document = {
            "command": shlex.join(["mdnet-rt", *sys.argv[1:]]),
            "threads": threads or available_cores(),
            "batch_size": batch_size,
            "graphs": {name: dict(scorer.choice.graphs) for name, scorer in zip("ab", scorers, strict=True)},
            **to_json(found, *manifests, worst=worst),
        }
        write_text(json_, json.dumps(document, indent=1, allow_nan=False) + "\n")
    return 1 if found.failures else 0


def _scales_note(a: Manifest, b: Manifest) -> str | None:
    if a.score == b.score:
        return None
    scales = " and ".join(str(each.score) for each in (a, b))
    return f"note: the scales differ ({scales}): correlations and ranks can be compared, differences of scores can't"


def _print(found: Comparison, worst: int) -> None:
    show(_figures(found))
    for title, pairs in (("furthest apart", found.furthest(worst)), ("most places moved", found.most_moved(worst))):
        if pairs:
            show(_pairs(title, pairs))
    if found.failures:
        show(_failures(found, max(worst, 1)))


def _figures(found: Comparison) -> Table:
    from rich.table import Table

    summary = found.summary()

    def text(name: str, format: str) -> str:
        return "–" if summary[name] is None else f"{summary[name]:{format}}"

    counts = f"{summary['images']}: {summary['scored_by_both']} scored by both"
    for name, words in (("only_a", "by A alone"), ("only_b", "by B alone"), ("neither", "by neither")):
        counts += f", {summary[name]} {words}" if summary[name] else ""
    table = Table("", "B against A")
    table.add_row("images", counts)
    table.add_row(
        "|Δscore| max, p99, mean", ", ".join(text(name, ".3g") for name in ("max_abs", "p99_abs", "mean_abs"))
    )
    table.add_row("mean Δscore, B − A", text("mean", "+.3g"))
    table.add_row("Pearson, Spearman", f"{text('pearson', '.6f')}, {text('spearman', '.6f')}")
    for name in "ab":
        table.add_row(f"graphs of {name.upper()}, images/s", text(f"{name}_images_per_second", ".1f"))
    table.add_row("speed, B ÷ A", text("speed_ratio", ".2f"))
    return table


def _pairs(title: str, pairs: list[Pair]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title)
    table.add_column("image")
    for name in ("A", "B", "Δ", "rank in A", "in B", "places up"):
        table.add_column(name, justify="right")
    for pair in pairs:
        # Text, not str: rich would read `[...]` in a name as markup.
        scores = (f"{pair.a:.4f}", f"{pair.b:.4f}", f"{pair.delta:+.3g}")
        ranks = (f"{pair.rank_a:.10g}", f"{pair.rank_b:.10g}", f"{pair.move:+.10g}" if pair.move else "0")
        table.add_row(Text(printable(pair.image)), *scores, *ranks)
    return table


def _failures(found: Comparison, shown: int) -> Table:
    from rich.table import Table
    from rich.text import Text

    more = len(found.failures) - shown
    table = Table(title="not scored by both", caption=f"and {more} more" if more > 0 else None)
    for name in ("image", "A", "B"):
        table.add_column(name)
    for failure in found.failures[:shown]:
        reasons = (Text(printable(each) if each else "scored") for each in (failure.a, failure.b))
        table.add_row(Text(printable(failure.image)), *reasons)
    return table
