"""`mdnet prior`, `mdnet train` and `mdnet ablate`: the subcommands that learn."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mdnet.cli.common import DRAWN_FACES, check_output, command_line, protocol_option, require_train
from mdnet.model.config import FUSIONS, TrainConfig, preset
from mdnet_engines.console import say, show_progress
from mdnet_engines.errors import UsageError

if TYPE_CHECKING:
    from mdnet.data.scut_fbp5500 import Protocol
    from mdnet.evaluation.scored_model import Device
    from mdnet.model.net import MDNet
    from mdnet.training.train import Epoch

_TRAINING_OPTIONS = (
    click.option("--preset", help="demo: the packaged demo's frozen encoder, with Vim and fusion from scratch."),
    click.option("--init", type=click.Path(path_type=Path, dir_okay=False), help="Checkpoint to start from."),
    click.option("--data", type=click.Path(path_type=Path), help="SCUT-FBP5500, or faces from `mdnet draw`."),
    protocol_option,
    click.option("--fold", type=click.IntRange(1, 5), help="Which fold of cv5 to train for."),
    click.option("--epochs", type=click.IntRange(min=1), default=16, show_default=True),
    click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True),
    click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), default=2e-3, show_default=True),
    click.option(
        "--patience",
        type=click.IntRange(min=0),
        default=0,
        help="Stop after so many epochs without gain.  [default: never]",
    ),
    click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True),
    click.option("--amp", is_flag=True, help="Mixed precision: Vim and fusion in bfloat16."),
    click.option(
        "--cache",
        type=click.Path(path_type=Path, file_okay=False),
        help="Keep frozen features here, for later runs too.",
    ),
    click.option("--half-features", is_flag=True, help="Keep them in float16: half the disk."),
)


def _training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_TRAINING_OPTIONS):
        command = option(command)
    return command


@click.command()
@click.option("--faces", type=click.IntRange(min=2), default=4000, show_default=True, help="Drawn faces to learn from.")
@click.option("--vae-epochs", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--unet-epochs", type=click.IntRange(min=1), default=24, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    help="Write faces, their reconstructions, and faces that the model makes up to this .png.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("prior.safetensors"), show_default=True)
def prior(faces: int, vae_epochs: int, unet_epochs: int, seed: int, picture: Path | None, output: Path) -> None:
    """Make the demo's encoder: that of a small latent diffusion model, trained on drawn faces without their ratings.

    The checkpoint is for `mdnet train --init`; its Vim and fusion are random.
    """
    require_train()
    from mdnet.model.checkpoint import save_checkpoint
    from mdnet.model.net import random_mdnet
    from mdnet.training.prior import PriorConfig, draw_picture, train_prior

    check_output(output)
    check_output(picture, "--picture", "the picture")
    config = PriorConfig(faces=faces, vae_epochs=vae_epochs, unet_epochs=unet_epochs, seed=seed)
    model = random_mdnet(preset("demo"), seed)
    with show_progress() as progress:
        diffusion = train_prior(
            model,
            config,
            progress=progress,
            on_epoch=lambda stage, number, loss: say(f"{stage}, epoch {number:>2}: loss {loss:.4f}"),
        )
    if picture:
        draw_picture(diffusion, model.config.image_size).save(picture)
    save_checkpoint(model, output, notes={"command": command_line(), "data": f"{faces} drawn faces, without ratings"})
    say(f"{output}; next: mdnet train --init {shlex.quote(str(output))}")


@click.command()
@_training_options
@click.option("--fusion", type=click.Choice(FUSIONS), help="How the streams are joined.  [default: the checkpoint's]")
@click.option("--seed", default=0, show_default=True)
@click.option("--log", type=click.Path(path_type=Path, file_okay=False), help="Write a TensorBoard log to this folder.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run with the same options.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("mdnet.safetensors"), show_default=True)
def train(
    preset: str | None,
    init: Path | None,
    data: Path | None,
    protocol: Protocol,
    fold: int | None,
    device: Device,
    cache: Path | None,
    half_features: bool,
    fusion: str | None,
    seed: int,
    log: Path | None,
    resume: bool,
    output: Path,
    **how: Any,  # fields of TrainConfig
) -> None:
    """Train on a training list of the protocol, evaluate on its test list, write a checkpoint.

    Without --data, the preset demo draws its own faces. After each epoch the run is kept in OUTPUT.state; a run that
    was interrupted continues with --resume.
    """
    require_train()
    from mdnet.data.scut_fbp5500 import read_splits
    from mdnet.evaluation.evaluate import evaluate
    from mdnet.evaluation.scored_model import check_device
    from mdnet.model.checkpoint import save_checkpoint
    from mdnet.model.net import with_fusion
    from mdnet.training.state import StateFile
    from mdnet.training.tensorboard_log import training_log
    from mdnet.training.train import train as fit

    check_output(output)
    _check_fold(protocol, fold)
    state = StateFile(output.with_name(f"{output.name}.state"), resume=resume)
    state.check()
    check_device(device)
    model = _initial_model(preset, init, seed)
    if fusion not in (None, model.config.fusion):
        model = with_fusion(model, fusion, seed)
    _check_data(data, model)
    config = TrainConfig(**how, seed=seed)
    with _data_or_drawn(data) as folder, training_log(log) as write_log:
        split = read_splits(folder, protocol)[(fold or 1) - 1]
        with show_progress() as progress:

            def on_epoch(epoch: Epoch) -> None:
                write_log(epoch)
                say(
                    f"epoch {epoch.number:>3}/{epoch.of}: training MSE {epoch.loss:.4f}, "
                    f"validation Pearson {epoch.validation_pearson:.4f}"
                )

            best = fit(
                model.to(device),
                split.train,
                config,
                cache=cache,
                half_features=half_features,
                state=state,
                progress=progress,
                on_epoch=on_epoch,
            )
            result = evaluate(model, split.test, progress=progress)
    notes = {
        "command": command_line(),
        "data": data.name if data else f"{DRAWN_FACES} drawn faces, seed 0",
        "protocol": protocol,
        **({"fold": fold} if fold else {}),
        "best_epoch": best.number,
        "test": dataclasses.asdict(result),
    }
    save_checkpoint(model, output, notes=notes)
    state.remove()
    click.echo(f"{split.name}: {result}")
    say(f"{output}: epoch {best.number}; next: mdnet-export build --checkpoint {shlex.quote(str(output))}")


@click.command()
@_training_options
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each kind.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Keep every run in this .json file, and continue from it."
)
def ablate(
    preset: str | None,
    init: Path | None,
    data: Path | None,
    protocol: Protocol,
    fold: int | None,
    device: Device,
    cache: Path | None,
    half_features: bool,
    seeds: int,
    output: Path | None,
    **how: Any,  # fields of TrainConfig
) -> None:
    """Compare MD-Net with each stream alone, and with concatenation in place of cross-attention.

    All are trained alike, from fresh fusion weights, with the seeds 0, 1, …; the test list's figures are printed as a
    Markdown table, mean ± sd over the seeds. The same command with the same -o makes only the runs that are missing.
    """
    require_train()
    from mdnet.data.scut_fbp5500 import read_splits
    from mdnet.evaluation.scored_model import check_device
    from mdnet.training.ablation import Results, table
    from mdnet.training.ablation import ablate as compare

    check_output(output, what="the runs")
    _check_fold(protocol, fold)
    check_device(device)
    results = Results(output)
    _check_data(data, _initial_model(preset, init, 0))
    config = TrainConfig(**how)
    with _data_or_drawn(data) as folder, show_progress() as progress:
        split = read_splits(folder, protocol)[(fold or 1) - 1]
        runs = compare(
            lambda seed: _initial_model(preset, init, seed),
            split,
            config,
            seeds=range(seeds),
            results=results,
            cache=cache,
            half_features=half_features,
            device=device,
            progress=progress,
            on_run=lambda run: say(str(run)),
        )
    click.echo(table(runs))


def _check_fold(protocol: Protocol, fold: int | None) -> None:
    if (protocol == "cv5") != (fold is not None):
        raise UsageError("--protocol cv5 needs --fold 1 to 5, and --fold needs --protocol cv5")


def _check_data(data: Path | None, model: MDNet) -> None:
    if data is None and model.config.preset != "demo":
        raise UsageError(f"preset {model.config.preset} needs --data DIR; only demo draws its own")


def _initial_model(preset_name: str | None, init: Path | None, seed: int) -> MDNet:
    from mdnet.model.checkpoint import demo_checkpoint, load_checkpoint
    from mdnet.model.net import random_mdnet

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
    from mdnet.data.drawn_set import write_dataset

    with tempfile.TemporaryDirectory(prefix="mdnet-faces-") as scratch:
        folder = Path(scratch) / "drawn"
        say(f"no --data: drawing {DRAWN_FACES} faces")
        with show_progress() as progress:
            write_dataset(folder, DRAWN_FACES, 0, progress)
        yield folder
