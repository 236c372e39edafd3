"""`mdnet explain`: what a score depends on, as a page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mdnet import __version__
from mdnet.cli.common import check_output, command_line
from mdnet_engines.backends.candidates import BACKENDS
from mdnet_engines.console import say, show_progress
from mdnet_engines.errors import printable, require
from mdnet_engines.system.output_path import write_text

if TYPE_CHECKING:
    from mdnet.evaluation.scored_model import Device
    from mdnet.explain.explain import Explained
    from mdnet_engines.backends.candidates import Backend


@click.command()
@click.argument("model", type=click.Path(path_type=Path), metavar="CHECKPOINT_OR_BUNDLE")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGES...")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The .html page to write.")
@click.option("--json", "json_", type=click.Path(path_type=Path), help="Write every map to this .json file.")
@click.option(
    "--patch",
    type=click.IntRange(min=1),
    help="Side of the grey square, in pixels of the model's input.  [default: an eighth of it]",
)
@click.option(
    "--stride", type=click.IntRange(min=1), help="Pixels from one square to the next.  [default: half the patch]"
)
@click.option(
    "--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Take the first so many images."
)
@click.option("--batch-size", type=click.IntRange(1, 1024), default=16, show_default=True, help="Squares at once.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="What runs a checkpoint."
)
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="What runs a bundle.")
def explain(
    model: Path,
    images: tuple[Path, ...],
    output: Path,
    json_: Path | None,
    patch: int | None,
    stride: int | None,
    limit: int,
    batch_size: int,
    device: Device,
    backend: Backend,
) -> int:
    """Show what the scores of a few pictures depend on: by occlusion, and by attention beside it.

    IMAGES are files, or folders with subfolders. Occlusion hides one place after another and asks the model again: by
    default 225 times a picture. Attention takes a checkpoint; with a bundle the page has occlusion alone. The page has
    the pictures in it.
    """
    from mdnet.data.pictures import find_images
    from mdnet.evaluation.scored_model import open_model
    from mdnet.explain.explain import explain as explain_images

    for option, file in (("-o", output), ("--json", json_)):
        check_output(file, option, "the page" if option == "-o" else "the maps")
    require("jinja2", "report")
    files = find_images(images)
    if len(files) > limit:
        say(f"note: {len(files)} images; the first {limit} are explained (--limit)")
    with show_progress() as progress:
        explanation = explain_images(
            open_model(model),
            files[:limit],
            patch=patch,
            stride=stride,
            device=device,
            backend=backend,
            batch_size=batch_size,
            progress=progress,
            on_image=lambda each: click.echo(_line(each)),
        )
    if json_:
        write_text(json_, json.dumps(explanation.to_json(), allow_nan=False) + "\n")
    from mdnet.explain.page import render_page

    write_text(output, render_page(explanation, facts={"command": command_line(), "mdnet": __version__}))
    if explanation.without_attention:
        say(f"no attention: {explanation.without_attention}")
    say(f"{output}: {len(explanation.images)} pictures, {explanation.seconds:.1f} s each")
    return 1 if explanation.skipped else 0


def _line(each: Explained) -> str:
    loss = each.occlusion.loss
    agreement = each.agreement("traced")
    attention = "" if math.isnan(agreement) else f", attention agrees {agreement:.2f}"
    return (
        f"{printable(each.name)}: {each.occlusion.score:.4f}; one hidden square moves it "
        f"{min(-float(loss.max()), 0):+.4f} to {max(-float(loss.min()), 0):+.4f}{attention}"
    )
