"""`mdnet`: draw data, import weights, train, evaluate."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mdnet_engines.console import Command, progress, say, steps
from mdnet_engines.errors import UsageError, require

if TYPE_CHECKING:
    from mdnet.benchmark import SplitResult
    from mdnet.data import Protocol, Split
    from mdnet.model import MDNet
    from mdnet.subject import Device
    from mdnet.train import Epoch

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
@protocol_option
@click.option("--fold", type=click.IntRange(1, 5), help="Which fold of cv5 to train for.")
@click.option("--epochs", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), default=2e-3, show_default=True)
@click.option(
    "--patience",
    type=click.IntRange(min=0),
    default=0,
    help="Stop after so many epochs without gain.  [default: never]",
)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--amp", is_flag=True, help="Mixed precision: Vim and fusion in bfloat16.")
@click.option(
    "--cache", type=click.Path(path_type=Path, file_okay=False), help="Keep frozen features here, for later runs too."
)
@click.option("--half-features", is_flag=True, help="Keep them in float16: half the disk.")
@click.option("--log", type=click.Path(path_type=Path, file_okay=False), help="Write a TensorBoard log to this folder.")
@click.option("--resume", is_flag=True, help="Go on with a run of the same options that was interrupted.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("mdnet.safetensors"), show_default=True)
def train(
    preset: str | None,
    init: Path | None,
    data: Path | None,
    protocol: Protocol,
    fold: int | None,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    patience: int,
    seed: int,
    device: Device,
    amp: bool,
    cache: Path | None,
    half_features: bool,
    log: Path | None,
    resume: bool,
    output: Path,
) -> None:
    """Train on a training list of the protocol, evaluate on its test list, write a checkpoint.

    Without --data, the preset demo draws its own faces. After each epoch the run is kept in OUTPUT.state; a run that
    was interrupted goes on with --resume.
    """
    _require_train()
    from mdnet.checkpoint import save_checkpoint
    from mdnet.data import read_splits
    from mdnet.evaluate import evaluate
    from mdnet.subject import check_device
    from mdnet.train import TrainConfig
    from mdnet.train import train as fit
    from mdnet.train_log import training_log
    from mdnet.train_state import StateFile

    _check_output(output)
    if (protocol == "cv5") != (fold is not None):
        raise UsageError("--protocol cv5 needs --fold 1 to 5, and --fold needs --protocol cv5")
    state = StateFile(output.with_name(f"{output.name}.state"), resume=resume)
    state.check()
    check_device(device)
    model = _initial_model(preset, init, seed)
    if data is None and model.config.preset != "demo":
        raise UsageError(f"preset {model.config.preset} needs --data DIR; only demo draws its own")
    config = TrainConfig(
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, patience=patience, amp=amp, seed=seed
    )
    with _data_or_drawn(data) as folder, training_log(log) as write_log:
        split = read_splits(folder, protocol)[(fold or 1) - 1]
        with progress() as bar:
            advance, tick = bar("frozen features", len(split.train)), bar("training", epochs)

            done = 0

            def on_epoch(epoch: Epoch) -> None:
                nonlocal done
                tick(epoch.number - done)  # a run that was resumed starts further on
                done = epoch.number
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
                on_image=advance,
                on_epoch=on_epoch,
            )
        with progress() as bar:
            result = evaluate(model, split.test, on_image=bar("testing", len(split.test)))
    notes = {
        "command": _command(),
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


@main.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="CHECKPOINT_OR_BUNDLE...")
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, help="SCUT-FBP5500, or faces from `mdnet draw`."
)
@protocol_option
@click.option(
    "--report", type=click.Path(path_type=Path), help="Write a page with tables and charts to this .html file."
)
@click.option(
    "--json", "json_", type=click.Path(path_type=Path), help="Write every figure and score to this .json file."
)
@click.option("--batch-size", type=click.IntRange(1, 1024), default=16, show_default=True, help="Images at once.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def evaluate(
    models: tuple[Path, ...],
    data: Path,
    protocol: Protocol,
    report: Path | None,
    json_: Path | None,
    batch_size: int,
    device: Device,
) -> None:
    """PC, MAE and RMSE on the test images of each split of the protocol, and their mean ± sd over the folds of cv5.

    A model is a checkpoint or a bundle's folder. For cv5 give five, in the order of the folds (each trained on the
    training list of its fold), or one for all of them. Figures per group are in --report and --json.
    """
    from mdnet.benchmark import run_benchmark
    from mdnet.subject import open_subject

    for option, file in (("--report", report), ("--json", json_)):
        _check_output(file, option, "the result")
    if report:
        require("jinja2", "train")
    with contextlib.ExitStack() as bars:

        def on_split(split: Split) -> Callable[[int], None]:
            return bars.enter_context(progress())(split.name, len(split.test))

        def on_result(split: SplitResult) -> None:
            bars.close()  # the bar and the line would share the terminal
            click.echo(f"{split.name}: {split.evaluation()}")

        benchmark = run_benchmark(
            [open_subject(path) for path in models],
            data,
            protocol,
            device=device,
            batch_size=batch_size,
            on_note=lambda note: say(f"note: {note}"),
            on_split=on_split,
            on_result=on_result,
        )
    if len(benchmark.splits) > 1:
        click.echo(f"{protocol}: {benchmark.spread()}")
    if json_:
        json_.write_text(json.dumps(benchmark.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if report:
        from mdnet.evaluation_report import render_report

        facts = {"command": _command(), "mdnet": version("mdnet"), "device": device}
        report.write_text(render_report(benchmark, facts=facts), encoding="utf-8")


def _check_output(file: Path | None, option: str = "-o", what: str = "the checkpoint") -> None:
    if file and (not file.parent.is_dir() or file.is_dir()):
        raise UsageError(f"{file}: {option} takes a file in a folder that exists, to write {what} to")


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
