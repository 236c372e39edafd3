"""`mdnet-rt score`: images → rows."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mdnet_engines.backends.candidates import BACKENDS
from mdnet_engines.console import say, show_progress, stdout_is_terminal
from mdnet_engines.errors import UsageError, printable
from mdnet_engines.framing import FaceOption
from mdnet_rt.rows.result import Stamp
from mdnet_rt.rows.writers import FORMATS, Format, check_output, choose_format, is_finished, open_writer

if TYPE_CHECKING:
    from mdnet_rt.rows.gallery import Gallery
    from mdnet_rt.scoring.run import Executor, Settings

_WEIGHTS_NOTES = {
    "demo": "note: this bundle has the demo weights; its scores mean nothing for real people",
    "random": "note: this bundle has random weights; its scores mean nothing",
}
_STDIN = Path("-")
_REMOTE_WORKERS = 16  # which wait more than they decode


@click.command()
@click.argument("paths", nargs=-1, type=click.Path())
@click.option("--list", "list_", type=click.Path(path_type=Path), help="File of paths and URLs, one a line; -: stdin.")
@click.option("-0", "--null", is_flag=True, help="Names in the list end in NUL bytes, as find -print0 writes them.")
@click.option("--column", help="Of Parquet files: the column that holds the images.")
@click.option("--bundle", type=click.Path(path_type=Path), help="Its folder. Default: $MDNET_BUNDLE, ./mdnet-bundle.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write rows to this .csv, .jsonl or .parquet.")
@click.option("--format", "format_", type=click.Choice(FORMATS), help="Default: by -o; table on a terminal, else csv.")
@click.option("--resume", is_flag=True, help="Continue the rows that an interrupted run left for -o.")
@click.option("--report", type=click.Path(path_type=Path), help="Write a page to look at: histogram, faces, failures.")
@click.option("--face", type=FaceOption(), help="Which square of an image to score. Default: that of training.")
@click.option("--batch-size", type=click.IntRange(1, 1024), default=16, show_default=True, help="Images at once.")
@click.option("--threads", type=click.IntRange(0, 1024), default=0, help="Threads per graph. Default: all cores.")
@click.option("--workers", type=click.IntRange(0, 256), default=0, help="Threads that read. Default: cores, at most 4.")
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="What runs the graphs.")
@click.option("--no-check", is_flag=True, help="Score even if the backend fails the bundle's gates on this machine.")
@click.option(
    "--executor",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="ray: a Ray cluster, whose nodes all read the bundle and the images at the same paths, or by URL.",
)
@click.option(
    "--ray-address", help="HOST:PORT, or local. Default: $RAY_ADDRESS, this machine's cluster, a new local one."
)
@click.option(
    "--ray-actors", type=click.IntRange(1), help="Scoring processes. Default: one a GPU, else one per 4 CPUs."
)
def score(
    paths: tuple[str, ...],
    list_: Path | None,
    null: bool,
    output: Path | None,
    format_: Format | None,
    resume: bool,
    report: Path | None,
    workers: int,
    no_check: bool,
    executor: str,
    ray_address: str | None,
    ray_actors: int | None,
    **how: Any,  # fields of the run's settings
) -> int:
    """Score images, folders (searched with their subfolders), quoted patterns such as 'a/**/*.jpg', tar archives,
    Parquet files, and URLs of all these.

    Exit code 0: every image was scored; 1: some were not, and their rows say why.
    """
    from mdnet_rt.scoring.run import Settings, score_all, stop_on_signal
    from mdnet_rt.scoring.scorer import NO_PROBES
    from mdnet_rt.sources.entry import is_url

    _quiet_pillow()
    locations = _locations(paths, list_, null)
    rows = choose_format(output, format_, terminal=stdout_is_terminal())
    _check(output, rows, resume, report)
    if output and resume and is_finished(output):
        say(f"{printable(output)} is already complete; without --resume it is replaced")
        return 0
    # The bar and rows would share the terminal's lines. A table comes after the bar.
    bar = sys.stderr.isatty() and (rows == "table" or output is not None or not stdout_is_terminal())
    workers = workers or (_REMOTE_WORKERS if any(map(is_url, paths)) else 0)
    settings = Settings(**how, workers=workers, keep_pixels=report is not None, check=not no_check)
    with _open_executor(executor, settings, ray_address, ray_actors) as (manifest, score_locations):
        if note := _WEIGHTS_NOTES.get(manifest.provenance.weights):
            say(note)
        if manifest.probes is None:
            say(NO_PROBES)
        gallery = _gallery(report)
        stamp = Stamp.of(manifest)
        start = time.perf_counter()
        with (
            open_writer(rows, output, stamp, resume=resume) as writer,
            show_progress(shown=bar, unit="images", lines=False) as progress,
            stop_on_signal() as stop,
        ):
            advance = progress.count("scoring", _count(locations, list_) if bar else None)
            scored = score_locations(locations(), (row.path for row in writer.earlier()), stop)
            summary = score_all(scored, writer, gallery=gallery, advance=advance)
        say(summary.line(time.perf_counter() - start))
        if gallery and report:
            gallery.write(report, stamp, str(manifest.score))
    return 1 if summary.failed else 0


def _open_executor(
    executor: str, settings: Settings, ray_address: str | None, ray_actors: int | None
) -> AbstractContextManager[Executor]:
    if executor == "ray":
        from mdnet_rt.cluster.ray_executor import ray_executor

        return ray_executor(settings, address=ray_address, actors=ray_actors)
    if ray_address or ray_actors:
        raise UsageError("--ray-address and --ray-actors require --executor ray")
    from mdnet_rt.scoring.run import local_executor

    return local_executor(settings)


def _locations(paths: tuple[str, ...], list_: Path | None, null: bool) -> Callable[[], Iterator[str]]:
    """A function that gives the locations to read, from their first."""
    from mdnet_rt.sources.locations import find_locations, read_list

    if bool(paths) == bool(list_):
        raise UsageError("give images, folders, patterns or URLs to score, or a --list of them (one of the two)")
    if null and not list_:
        raise UsageError("--null requires --list")
    if list_ is None:
        find_locations(paths)  # so that errors in them come before a bundle is opened
        return lambda: find_locations(paths)
    if list_ == _STDIN:
        if sys.stdin is None:
            raise UsageError("--list - reads standard input, which is closed; give a file")
        return lambda: read_list(sys.stdin.buffer, null=null)
    if not list_.is_file():
        raise UsageError(f"--list {printable(list_)}: no such file")

    def read() -> Iterator[str]:
        with list_.open("rb") as stream:
            yield from read_list(stream, null=null)

    return read


def _count(locations: Callable[[], Iterator[str]], list_: Path | None) -> int | None:
    """How many images there are; None where only reading them all tells."""
    from mdnet_rt.sources.entry import archive_kind

    if list_ == _STDIN:
        return None
    count = 0
    for location in locations():
        if archive_kind(location):
            return None
        count += 1
    return count


def _check(output: Path | None, rows: Format, resume: bool, report: Path | None) -> None:
    if output:
        check_output(output, rows, resume=resume)
    elif sys.stdout is None:
        raise UsageError("rows go to standard output, which is closed; name a file with -o")
    elif resume:
        raise UsageError("--resume continues a file: name it with -o")
    if report:
        from mdnet_rt.rows.gallery import check_report

        if output and os.path.realpath(output) == os.path.realpath(report):
            raise UsageError("-o and --report name the same file")
        check_report(report)


def _gallery(report: Path | None) -> Gallery | None:
    if report is None:
        return None
    from mdnet_rt.rows.gallery import Gallery

    return Gallery()


def _quiet_pillow() -> None:
    """Keep Pillow's warnings (large image, odd metadata) off the terminal: what matters of them becomes a row."""
    from PIL import Image

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
