"""`mdnet`: draw data, import weights, train, evaluate."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mdnet_engines.console import Command, progress, say, steps
from mdnet_engines.errors import UsageError, require

if TYPE_CHECKING:
    from mdnet.data import Protocol
    from mdnet.model import MDNet

DRAWN_FACES = 2000

protocol_option = click.option(
    "--protocol", type=click.Choice(["60-40", "cv5"]), default="60-40", show_default=True, help="Official split."
)


@click.group(cls=Command)
@click.version_option(package_name="mdnet")
def main() -> None:
    """MD-Net in PyTorch: published weights, data, training, evaluation."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--count", default=DRAWN_FACES, show_default=True)
@click.option("--seed", default=0, show_default=True)
def draw(folder: Path, count: int, seed: int) -> None:
    """Draw rated faces into FOLDER, in the layout of SCUT-FBP5500."""
    from mdnet.drawn import write_dataset

    with progress() as bar:
        write_dataset(folder, count, seed, bar("drawing", count))
    say(f"{count} drawn faces in {folder}")


@main.command()
@click.option("--faces", type=click.IntRange(min=2), default=4000, show_default=True, help="Drawn faces to learn from.")
@click.option("--epochs", type=click.IntRange(min=1), default=12, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("prior.safetensors"), show_default=True)
def prior(faces: int, epochs: int, seed: int, output: Path) -> None:
    """Make the demo's encoder: a stand-in for Stable Diffusion's, taught on drawn faces without their ratings.

    The checkpoint is for `mdnet train --init`; its Vim and fusion are random.
    """
    _require_train()
    from mdnet.checkpoint import save_checkpoint
    from mdnet.config import preset
    from mdnet.model import random_mdnet
    from mdnet.prior import train_prior

    _check_output(output)
    model = random_mdnet(preset("demo"), seed)
    with progress() as bar:
        drawn, tick = bar("drawing", faces), bar("training", epochs)

        def on_epoch(number: int, error: float) -> None:
            tick(1)
            say(f"epoch {number:>3}/{epochs}: error {error:.4f} (1 is what a constant would reach)")

        train_prior(model, faces=faces, epochs=epochs, seed=seed, on_face=drawn, on_epoch=on_epoch)
    save_checkpoint(model, output, notes={"command": _command(), "data": f"{faces} drawn faces, without ratings"})
    say(f"{output}; next: mdnet train --init {shlex.quote(str(output))}")


@main.command("import")
@click.option(
    "--sd",
    type=click.Path(path_type=Path),
    required=True,
    help="Stable Diffusion 1.x: a diffusers folder, or CompVis' single .safetensors or .ckpt.",
)
@click.option("--vim", type=click.Path(path_type=Path), required=True, help="Vision Mamba: a .pth of hustvl/Vim.")
@click.option("--preset", help="sd15-vim-s, sd15-vim-t or demo; taken from Vim's width where it is not given.")
@click.option(
    "--image-size", type=click.IntRange(min=64), help="Side of the input, a multiple of 64.  [default: preset's]"
)
@click.option(
    "--null-prompt", type=click.Path(path_type=Path), help="The empty prompt's embedding, or a checkpoint with it."
)
@click.option("--seed", default=0, show_default=True, help="For the fusion, which starts fresh.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("mdnet.safetensors"), show_default=True)
def import_(
    sd: Path,
    vim: Path,
    preset: str | None,
    image_size: int | None,
    null_prompt: Path | None,
    seed: int,
    output: Path,
) -> None:
    """Make a checkpoint to train from, of Stable Diffusion's and Vision Mamba's published weights.

    Nothing in the files is run. The licences of both pass on to the checkpoint, whose notes name them.
    """
    _require_train()
    from mdnet.checkpoint import save_checkpoint
    from mdnet.import_weights import import_weights

    _check_output(output)
    with steps() as step:
        imported = import_weights(
            sd,
            vim,
            preset=preset,
            image_size=image_size,
            null_prompt_file=null_prompt,
            seed=seed,
            on_step=step,
        )
        step(f"writing {output}")
        save_checkpoint(imported.model, output, notes={"command": _command(), **imported.notes})
    if imported.dropped:
        say(f"left out: Vim's classifier ({', '.join(imported.dropped)})")
    config = imported.model.config
    say(
        f"{output}: preset {config.preset}, {config.image_size} pixels, Vim stride {config.vim_stride}; "
        f"next: mdnet train --init {shlex.quote(str(output))} --data DIR"
    )


@main.command()
@click.option("--preset", help="demo: the packaged demo's frozen encoder, with Vim and fusion from scratch.")
@click.option("--init", type=click.Path(path_type=Path, dir_okay=False), help="Checkpoint to start from.")
@click.option("--data", type=click.Path(path_type=Path), help="SCUT-FBP5500, or faces from `mdnet draw`.")
@click.option("--epochs", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), default=2e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("mdnet.safetensors"), show_default=True)
def train(
    preset: str | None,
    init: Path | None,
    data: Path | None,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    output: Path,
) -> None:
    """Train on the 60 % split, evaluate on the 40 % split, write a checkpoint.

    Without --data, the preset demo draws its own faces.
    """
    _require_train()
    from mdnet.checkpoint import save_checkpoint
    from mdnet.data import read_splits
    from mdnet.evaluate import evaluate
    from mdnet.train import Epoch, TrainConfig
    from mdnet.train import train as fit

    _check_output(output)
    model = _initial_model(preset, init, seed)
    if data is None and model.config.preset != "demo":
        raise UsageError(f"preset {model.config.preset} needs --data DIR; only demo draws its own")
    config = TrainConfig(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed)
    with _data_or_drawn(data) as folder:
        split = read_splits(folder, "60-40")[0]
        with progress() as bar:
            advance, tick = bar("frozen features", len(split.train)), bar("training", epochs)

            def on_epoch(epoch: Epoch) -> None:
                tick(1)
                say(
                    f"epoch {epoch.number:>3}/{epoch.of}: training MSE {epoch.loss:.4f}, "
                    f"validation Pearson {epoch.validation_pearson:.4f}"
                )

            best = fit(model, split.train, config, on_image=advance, on_epoch=on_epoch)
        with progress() as bar:
            result = evaluate(model, split.test, on_image=bar("testing", len(split.test)))
    notes = {
        "command": _command(),
        "data": data.name if data else f"{DRAWN_FACES} drawn faces, seed 0",
        "protocol": "60-40",
        "best_epoch": best.number,
        "test": dataclasses.asdict(result),
    }
    save_checkpoint(model, output, notes=notes)
    click.echo(f"60-40: {result}")
    say(f"{output}: epoch {best.number}; next: mdnet-export build --checkpoint {shlex.quote(str(output))}")


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, help="SCUT-FBP5500, or faces from `mdnet draw`."
)
@protocol_option
def evaluate(checkpoint: Path, data: Path, protocol: Protocol) -> None:
    """PC, MAE and RMSE of CHECKPOINT on the test images of each split of the protocol."""
    _require_train()
    from mdnet.checkpoint import load_checkpoint
    from mdnet.data import read_splits
    from mdnet.evaluate import evaluate as score

    model = load_checkpoint(checkpoint)
    for split in read_splits(data, protocol):
        with progress() as bar:
            result = score(model, split.test, on_image=bar(split.name, len(split.test)))
        click.echo(f"{split.name}: {result}")


def _check_output(file: Path) -> None:
    if not file.parent.is_dir() or file.is_dir():
        raise UsageError(f"{file}: -o takes a file in a folder that exists, to write the checkpoint to")


def _command() -> str:
    return shlex.join(["mdnet", *sys.argv[1:]])


def _initial_model(preset_name: str | None, init: Path | None, seed: int) -> MDNet:
    from mdnet.checkpoint import demo_checkpoint, load_checkpoint
    from mdnet.config import preset
    from mdnet.model import random_mdnet

    if init is not None:
        return load_checkpoint(init, expect_preset=preset_name)
    if preset_name is None:
        raise UsageError("give --preset demo, or --init CHECKPOINT to start from")
    if preset_name != "demo":
        preset(preset_name)  # an unknown name is the user's first mistake to hear of
        raise UsageError(f"preset {preset_name} has a pre-trained encoder; give its weights with --init CHECKPOINT")
    model = random_mdnet(preset(preset_name), seed)
    model.diffusion = load_checkpoint(demo_checkpoint()).diffusion
    return model


@contextlib.contextmanager
def _data_or_drawn(data: Path | None) -> Iterator[Path]:
    if data is not None:
        yield data
        return
    from mdnet.drawn import write_dataset

    with tempfile.TemporaryDirectory(prefix="mdnet-faces-") as scratch:
        folder = Path(scratch) / "drawn"
        say(f"no --data: drawing {DRAWN_FACES} faces")
        with progress() as bar:
            write_dataset(folder, DRAWN_FACES, 0, bar("drawing", DRAWN_FACES))
        yield folder


def _require_train() -> None:
    for module in ("torch", "diffusers", "safetensors"):
        require(module, "train")
