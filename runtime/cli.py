"""`mdnet-rt`: score images from the command line."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

import click

from mdnet_engines.backends import BACKENDS, Backend
from mdnet_engines.console import Command, progress, say
from mdnet_rt.results import FORMATS, Format, Summary, check_output, choose_format, open_writer

_WEIGHTS_NOTES = {
    "demo": "note: this bundle has the demo weights; its scores mean nothing for real people",
    "random": "note: this bundle has random weights; its scores mean nothing",
}


@click.group(cls=Command)
@click.version_option(package_name="mdnet", prog_name="mdnet-rt")
def main() -> None:
    """Score face photographs with a bundle that mdnet-export made."""


@main.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path())
@click.option("--bundle", type=click.Path(path_type=Path), help="Its folder. Default: $MDNET_BUNDLE, ./mdnet-bundle.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the rows to this .csv or .jsonl file.")
@click.option("--format", "format_", type=click.Choice(FORMATS), help="Default: by -o; table on a terminal, else csv.")
@click.option("--batch-size", type=click.IntRange(1, 1024), default=16, show_default=True, help="Images at once.")
@click.option("--threads", type=click.IntRange(0, 1024), default=0, help="Threads per graph. Default: all cores.")
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="What runs the graphs.")
def score(
    paths: tuple[str, ...],
    bundle: Path | None,
    output: Path | None,
    format_: Format | None,
    batch_size: int,
    threads: int,
    backend: Backend,
) -> int:
    """Score images, folders (searched with their subfolders) and quoted patterns such as 'a/**/*.jpg'.

    Exit code 0: every image was scored; 1: some were not, and their rows say why.
    """
    from mdnet_rt.scorer import Scorer
    from mdnet_rt.sources import find_images

    _quiet_pillow()
    images = find_images(paths)
    rows = choose_format(output, format_, terminal=sys.stdout.isatty())
    if output:
        check_output(output)
    # The bar and rows would share the terminal's lines. A table comes when the bar is gone.
    bar = sys.stderr.isatty() and (rows == "table" or output is not None or not sys.stdout.isatty())
    summary = Summary()
    with Scorer.open(bundle, backend=backend, threads=threads, batch_size=batch_size) as scorer:
        if note := _WEIGHTS_NOTES.get(scorer.manifest.provenance.weights):
            say(note)
        start = time.perf_counter()
        with open_writer(rows, output) as writer, progress(shown=bar) as start_bar:
            advance = start_bar("scoring", len(images))
            for result in scorer.stream(images):
                writer.write(result)
                summary.add(result)
                advance(1)
        say(summary.line(time.perf_counter() - start))
    return 1 if summary.failed else 0


def _quiet_pillow() -> None:
    """Keep Pillow's warnings (large image, odd metadata) off the terminal: what matters of them becomes a row."""
    from PIL import Image

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


if __name__ == "__main__":
    main()
