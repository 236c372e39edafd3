"""`mdnet-export triton`: a model repository for NVIDIA Triton."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mdnet_engines.console import say

if TYPE_CHECKING:
    from mdnet_export.triton.repository import Repository


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--name", default="mdnet", show_default=True, help="The ensemble's name; the models' names begin with it."
)
@click.option(
    "--backend",
    type=click.Choice(["onnxruntime", "tensorrt"]),
    default="onnxruntime",
    show_default=True,
    help="What Triton runs the graphs with; tensorrt takes the bundle's plans (mdnet-export engines).",
)
@click.option("--kind", type=click.Choice(["cpu", "gpu"]), help="By default cpu for onnxruntime, gpu for tensorrt.")
@click.option("--instances", type=click.IntRange(min=1), default=1, show_default=True, help="Of each model.")
@click.option(
    "--max-batch-size",
    type=click.IntRange(1, 4096),
    help="Images in one batch; by default 16, or the plans' maximum if that is less.",
)
@click.option(
    "--queue-delay",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="µs",
    help="How long a request may wait for others to share a batch with.",
)
@click.option(
    "--plans", metavar="FOLDER", help="Which of several sets of plans, by its folder in the bundle's engines/."
)
@click.option(
    "--native-scan",
    metavar="PATH",
    help="Register the native selective scan, faster on a CPU. PATH is where the server sees OUT, such as /models.",
)
def triton(bundle: Path, output: Path, **options: Any) -> None:
    """Write a model repository for NVIDIA Triton to OUT from BUNDLE: three models and an ensemble.

    Needs the bundle alone. A repository that it made before at OUT is replaced atomically; any other folder is refused.
    """
    from mdnet_engines.bundle.files import Bundle
    from mdnet_export.triton.repository import write_repository

    _print_written(write_repository(Bundle.open(bundle), output, **options))


def _print_written(made: Repository) -> None:
    serving = made.serving
    runs = f"{serving.backend} ({made.plans.folder})" if made.plans else serving.backend
    say(f"{made.path}: {made.size / 1e6:.1f} MB")
    say(
        f"ensemble {serving.name}, {serving.instances} of each model on the {serving.kind.upper()} by {runs}, "
        f"up to {serving.max_batch_size} images in a batch; README.md says what to send"
    )
