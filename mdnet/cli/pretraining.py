"""`mdnet pretrain`: Vim's start, for those who have no published one."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mdnet.cli.common import check_output, command_line, require_train
from mdnet.cli.training import face_option, initial_model
from mdnet_engines.console import say, show_progress
from mdnet_engines.progress import Laps

if TYPE_CHECKING:
    from mdnet.evaluation.scored_model import Device
    from mdnet.training.pretrain import PretrainEpoch


@click.command()
@click.option("--preset", help="demo: the packaged demo's frozen encoder, and a fresh Vim.")
@click.option("--init", type=click.Path(path_type=Path, dir_okay=False), help="Checkpoint whose Vim is trained on.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="Pictures: a folder, or SCUT-FBP5500 or a table, of which the training list is taken. May be repeated.",
)
@face_option
@click.option("--epochs", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--resume", is_flag=True, help="Continue an interrupted run with the same options.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("start.safetensors"), show_default=True)
def pretrain(
    preset: str | None,
    init: Path | None,
    data: tuple[Path, ...],
    face: str | None,
    epochs: int,
    batch_size: int,
    seed: int,
    device: Device,
    resume: bool,
    output: Path,
) -> None:
    """Train Vim to predict the edges of hidden patches (MaskFeat), on pictures whose ratings are not looked at.

    The checkpoint is for `mdnet train --init`. After each epoch the run is kept in OUTPUT.state.
    """
    require_train()
    from mdnet.data.pictures import training_pictures
    from mdnet.evaluation.scored_model import check_device
    from mdnet.model.checkpoint import origins, save_checkpoint
    from mdnet.training.features import load_pixels, state_digest
    from mdnet.training.pretrain import PretrainConfig
    from mdnet.training.pretrain import pretrain as fit
    from mdnet.training.state import StateFile

    check_output(output)
    state = StateFile(output.with_name(f"{output.name}.state"), resume=resume)
    state.check()
    check_device(device)
    model = initial_model(preset, init, seed, None, face).to(device)
    config = PretrainConfig(epochs=epochs, batch_size=batch_size, seed=seed)
    with show_progress() as progress:
        files = [file for path in data for file in training_pictures(path, progress)]
        pixels = load_pixels(files, model.config.image_size, progress, face=model.config.face)
        fingerprint = {
            **{name: str(value) for name, value in dataclasses.asdict(config).items()},
            "first weights": state_digest(model.vim)[:12],
            "pictures": hashlib.sha256(pixels.numpy().data).hexdigest()[:12],
        }

        laps = Laps(progress)

        def on_epoch(epoch: PretrainEpoch) -> None:
            say(
                f"epoch {epoch.number:>3}/{epoch.of}: error on hidden patches {epoch.masked:.4f}, "
                f"on the others {epoch.seen:.4f}, {laps.lap():.1f} s"
            )

        model.vim.requires_grad_(True)
        fit(
            model.vim,
            pixels,
            config,
            fingerprint=fingerprint,
            state=state,
            progress=laps,
            on_epoch=on_epoch,
        )
    seen = f"{len(files)} pictures of {', '.join(path.name for path in data)}, without ratings"
    notes: dict[str, object] = {**origins(init), "command": command_line(), "vim": f"pre-trained here on {seen}"}
    save_checkpoint(model, output, notes=notes)
    state.remove()
    say(f"{output}; next: mdnet train --init {shlex.quote(str(output))} --data ...")
