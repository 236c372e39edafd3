"""`mdnet distil`: a tiny VAE encoder taught by a checkpoint's own."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from mdnet.cli.common import check_output, command_line, require_train
from mdnet_engines.console import say, show_progress


@click.command()
@click.option(
    "--init",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Checkpoint whose VAE teaches.  [default: the packaged demo]",
)
@click.option("--faces", type=click.IntRange(min=2), default=2000, show_default=True, help="Drawn faces to learn from.")
@click.option("--epochs", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("tiny.safetensors"), show_default=True)
def distil(init: Path | None, faces: int, epochs: int, seed: int, output: Path) -> None:
    """Put a tiny VAE encoder, taught on drawn faces, in place of a checkpoint's own.

    The checkpoint is for `mdnet train --init`: its Vim and fusion have learnt with the other VAE.
    """
    require_train()
    from mdnet.model.checkpoint import demo_checkpoint, load_checkpoint, origins, save_checkpoint
    from mdnet.training.distil import DistilConfig
    from mdnet.training.distil import distil as teach

    check_output(output)
    model = load_checkpoint(init or demo_checkpoint())
    with show_progress() as progress:
        made, share = teach(
            model,
            DistilConfig(faces=faces, epochs=epochs, seed=seed),
            progress=progress,
            on_epoch=lambda number, loss: say(f"epoch {number:>2}: squared error of the latents {loss:.4f}"),
        )
    teacher = init.name if init else "the packaged demo"
    notes = {**origins(init), "command": command_line(), "vae": f"distilled from {teacher}'s, drawn faces"}
    save_checkpoint(made, output, notes=notes)
    click.echo(f"{share:.1%} of the latents' variance on faces it did not learn from")
    say(f"{output}: preset {made.config.preset}; next: mdnet train --init {shlex.quote(str(output))}")
