"""`mdnet prior` and `mdnet pretrain`: the streams' starts, for those who have no published ones."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mdnet.cli.common import check_output, command_line, require_train
from mdnet.cli.training import DRAWN, face_option, initial_model, views_option
from mdnet.model.config import preset as preset_named
from mdnet_engines.console import say, show_progress
from mdnet_engines.errors import UsageError
from mdnet_engines.framing import parse_face
from mdnet_engines.progress import Laps

if TYPE_CHECKING:
    from mdnet.evaluation.scored_model import Device
    from mdnet.training.pretrain import PretrainEpoch


_PICTURES = "Pictures: a folder, or SCUT-FBP5500 or a table, of which the training list is taken. May be repeated."


@click.command()
@click.option(
    "--faces",
    type=click.IntRange(min=0),
    help="Drawn faces to learn from.  [default: 4000, or none with --data]",
)
@click.option("--data", type=click.Path(path_type=Path), multiple=True, help=_PICTURES)
@face_option
@click.option("--vae-epochs", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--unet-epochs", type=click.IntRange(min=1), default=24, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    help="Write faces, their reconstructions, and faces that the model makes up to this .png.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("prior.safetensors"), show_default=True)
def prior(
    faces: int | None,
    data: tuple[Path, ...],
    face: str | None,
    vae_epochs: int,
    unet_epochs: int,
    seed: int,
    picture: Path | None,
    output: Path,
) -> None:
    """Make an encoder at the demo's sizes: that of a small latent diffusion model, trained on faces without ratings.

    The checkpoint is for `mdnet pretrain --init` and `mdnet train --init`; its Vim and fusion are random.
    """
    require_train()
    import torch

    from mdnet.data.pictures import training_pictures
    from mdnet.model.checkpoint import save_checkpoint
    from mdnet.model.net import random_mdnet
    from mdnet.training.features import load_pixels
    from mdnet.training.prior import PriorConfig, draw_faces, draw_picture, train_prior

    check_output(output)
    check_output(picture, "--picture", "the picture")
    drawn = faces if faces is not None else 0 if data else 4000
    config = PriorConfig(vae_epochs=vae_epochs, unet_epochs=unet_epochs, seed=seed)
    framing = None if face is None else parse_face(face)
    model = random_mdnet(dataclasses.replace(preset_named("demo"), face=framing), seed)
    size = model.config.image_size
    with show_progress() as progress:
        files = [file for path in data for file in training_pictures(path, progress)]
        if len(files) + drawn < 2:
            raise UsageError(f"{len(files) + drawn} faces to learn from; expected 2 or more (--faces, --data)")
        parts = [load_pixels(files, size, progress, face=model.config.face)] if files else []
        parts += [draw_faces(drawn, size, progress)] if drawn else []
        pixels = torch.cat(parts)
        laps = Laps(progress)

        def on_epoch(stage: str, number: int, loss: float) -> None:
            say(f"{stage}, epoch {number:>2}: loss {loss:.4f}, {laps.lap():.1f} s")

        diffusion = train_prior(model, pixels, config, progress=laps, on_epoch=on_epoch)
    if picture:
        draw_picture(diffusion, pixels[:8]).save(picture)
    seen = f"{drawn} {DRAWN}"
    if data:
        seen = f"{_pictures_of(files, data)}{f' and {drawn} drawn ones' if drawn else ''}"
    seen = f"{seen}, without ratings"
    notes: dict[str, object] = {"command": command_line(), "data": seen, "encoder": f"trained here on {seen}"}
    save_checkpoint(model, output, notes=notes)
    say(f"{output}; next: mdnet pretrain --init {shlex.quote(str(output))} --data ...")


@click.command()
@click.option("--preset", help="demo: the packaged demo's frozen encoder, and a fresh Vim.")
@click.option("--init", type=click.Path(path_type=Path, dir_okay=False), help="Checkpoint whose Vim is trained on.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help=_PICTURES,
)
@face_option
@views_option
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
    views: int,
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
    from mdnet.training.views import with_views

    check_output(output)
    state = StateFile(output.with_name(f"{output.name}.state"), resume=resume)
    state.check()
    check_device(device)
    model = initial_model(preset, init, seed, None, face).to(device)
    config = PretrainConfig(epochs=epochs, batch_size=batch_size, seed=seed)
    with show_progress() as progress:
        files = [file for path in data for file in training_pictures(path, progress)]
        pixels = load_pixels(files, model.config.image_size, progress, face=model.config.face)
        pixels = with_views(pixels, views)
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
    seen = f"{_pictures_of(files, data)}, without ratings"
    notes: dict[str, object] = {**origins(init), "command": command_line(), "vim": f"pre-trained here on {seen}"}
    save_checkpoint(model, output, notes=notes)
    state.remove()
    say(f"{output}; next: mdnet train --init {shlex.quote(str(output))} --data ...")


def _pictures_of(files: Sequence[Path], data: Sequence[Path]) -> str:
    return f"{len(files)} pictures of {', '.join(path.name for path in data)}"
