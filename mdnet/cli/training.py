"""`mdnet train` and `mdnet ablate`: the subcommands that learn from ratings."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mdnet.cli.common import DRAWN_FACES, check_output, command_line, require_train
from mdnet.cli.data import (
    check_fold,
    data_help,
    data_or_drawn,
    fold_option,
    parse_scale,
    protocol_option,
    scale_option,
    training_split,
)
from mdnet.data.rated import Scale
from mdnet.model.config import FUSIONS, TrainConfig, preset
from mdnet_engines.console import say, show_progress
from mdnet_engines.errors import UsageError
from mdnet_engines.framing import FaceOption, parse_face
from mdnet_engines.options import config_option
from mdnet_engines.progress import Laps

if TYPE_CHECKING:
    from mdnet.evaluation.scored_model import Device
    from mdnet.model.net import MDNet
    from mdnet.training.train import Epoch

DRAWN = "drawn faces"
"""In what notes say of a frozen encoder that never saw photographs."""

face_option = click.option(
    "--face",
    type=FaceOption(),
    help="Which square of an image the model sees, in training and after.  [default: that of --init, else none]",
)
views_option = click.option(
    "--views",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Of each image: itself, and others that are turned, scaled and lit a little otherwise.",
)
_TRAINING_OPTIONS = (
    click.option("--preset", help="demo: the packaged demo's frozen encoder, with Vim and fusion from scratch."),
    click.option("--init", type=click.Path(path_type=Path, dir_okay=False), help="Checkpoint to start from."),
    click.option("--data", type=click.Path(path_type=Path), help=data_help),
    face_option,
    protocol_option,
    fold_option,
    scale_option,
    click.option(
        "--epochs",
        type=click.IntRange(min=0),
        default=16,
        show_default=True,
        help="With --linear-probe, 0 is for the probe alone, fitted to all pictures.",
    ),
    click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True),
    click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), default=2e-3, show_default=True),
    views_option,
    click.option(
        "--linear-probe",
        is_flag=True,
        help="First fit the streams' heads by ridge regression, then train everything: for few pictures.",
    ),
    click.option(
        "--patience",
        type=click.IntRange(min=0),
        default=5,
        show_default=True,
        help="Stop after so many epochs without gain; 0: never.",
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
@config_option
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
    face: str | None,
    protocol: str | None,
    fold: int | None,
    scale: tuple[float, float] | None,
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
    was interrupted continues with --resume. docs/mdnet.md has the layout of a table of your own ratings.
    """
    require_train()
    from mdnet.evaluation.baselines import beside
    from mdnet.evaluation.evaluate import Evaluation
    from mdnet.evaluation.loaded import score_beside_baselines
    from mdnet.evaluation.scored_model import check_device
    from mdnet.model.checkpoint import origins, save_checkpoint
    from mdnet.model.net import with_fusion
    from mdnet.training.features import feature_folder
    from mdnet.training.state import StateFile
    from mdnet.training.tensorboard_log import training_log
    from mdnet.training.train import train as fit

    check_output(output)
    check_fold(protocol, fold, drawn=data is None)
    state = StateFile(output.with_name(f"{output.name}.state"), resume=resume)
    state.check()
    check_device(device)
    model, origin = initial_model(preset, init, seed, parse_scale(scale), face), origins(init)
    if fusion not in (None, model.config.fusion):
        model = with_fusion(model, fusion, seed)
    _check_data(data, model)
    config = TrainConfig(**how, seed=seed)
    epochs: list[Epoch] = []
    with data_or_drawn(data) as rated, training_log(log) as write_log, feature_folder(cache) as features:
        with show_progress() as progress:
            protocol, split = training_split(rated, protocol, fold, _scale_of(model), progress)
        of_drawings = _warn_of_drawings(model, init, data)
        with show_progress() as progress:
            laps = Laps(progress)

            def on_epoch(epoch: Epoch) -> None:
                write_log(epoch)
                epochs.append(epoch)
                say(
                    f"epoch {epoch.number:>3}/{epoch.of}: training MSE {epoch.loss:.4f}, "
                    f"validation Pearson {epoch.validation_pearson:.4f}, {laps.lap():.1f} s"
                )

            best = fit(
                model.to(device),
                split.train,
                config,
                cache=features,
                half_features=half_features,
                state=state,
                progress=laps,
                on_epoch=on_epoch,
            )
            if not config.epochs:
                say(f"linear probe of {len(split.train)} pictures: training MSE {best.loss:.4f}, {laps.lap():.1f} s")
            scores, baselines = score_beside_baselines(
                model, split, cache=features, half_features=half_features, progress=progress
            )
    result = Evaluation.of(split.test.ratings, scores)
    notes = {
        "command": command_line(),
        "data": rated.name if data else f"{DRAWN_FACES} drawn faces, seed 0",
        **({"data_sha256": rated.sha256} if rated.sha256 else {}),
        "protocol": protocol,
        **({} if fold is None else {"fold": fold}),
        **({"encoder": f"trained on {DRAWN}"} if of_drawings else {}),
        "best_epoch": best.number,
        "epochs": [dataclasses.asdict(epoch) for epoch in epochs],
        "test": dataclasses.asdict(result),
        "baselines": {
            name: Evaluation.of(split.test.ratings, predicted).figures() for name, predicted in baselines.items()
        },
        **origin,
    }
    save_checkpoint(model, output, notes=notes)
    state.remove()
    click.echo(f"{split.name}: {result}{beside(split.test.ratings, baselines)}")
    say(f"{output}: epoch {best.number}; next: mdnet-export build --checkpoint {shlex.quote(str(output))}")


@click.command()
@_training_options
@click.option(
    "--fusion",
    "fusions",
    type=click.Choice(FUSIONS),
    multiple=True,
    help="A kind to train; may be repeated.  [default: all]",
)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each kind.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Keep every run in this .json file, and continue from it."
)
def ablate(
    preset: str | None,
    init: Path | None,
    data: Path | None,
    face: str | None,
    protocol: str | None,
    fold: int | None,
    scale: tuple[float, float] | None,
    device: Device,
    cache: Path | None,
    half_features: bool,
    fusions: tuple[str, ...],
    seeds: int,
    output: Path | None,
    **how: Any,  # fields of TrainConfig
) -> None:
    """Compare MD-Net with each stream alone, and with concatenation in place of cross-attention.

    All are trained alike, from fresh fusion weights, with the seeds 0, 1, …; the test list's figures are printed as a
    Markdown table, mean ± sd over the seeds. The same command with the same -o makes only the runs that are missing.
    """
    require_train()
    from mdnet.evaluation.scored_model import check_device
    from mdnet.training.ablation import Results, table
    from mdnet.training.ablation import ablate as compare

    check_output(output, what="the runs")
    check_fold(protocol, fold, drawn=data is None)
    check_device(device)
    results = Results(output)
    on_scale = parse_scale(scale)
    _check_data(data, model := initial_model(preset, init, 0, on_scale, face))
    config = TrainConfig(**how)
    with data_or_drawn(data) as rated, show_progress() as progress:
        _, split = training_split(rated, protocol, fold, _scale_of(model), progress)
        _warn_of_drawings(model, init, data)
        runs = compare(
            lambda seed: initial_model(preset, init, seed, on_scale, face),
            split,
            config,
            seeds=range(seeds),
            fusions=fusions or FUSIONS,
            results=results,
            cache=cache,
            half_features=half_features,
            device=device,
            progress=progress,
            on_run=lambda run: say(str(run)),
        )
    click.echo(table(runs))


def _check_data(data: Path | None, model: MDNet) -> None:
    from mdnet.data.scut_fbp5500 import RATING_SCALE

    if data is None and model.config.preset != "demo":
        raise UsageError(f"preset {model.config.preset} needs --data DIR; only demo draws its own")
    if data is None and _scale_of(model) != RATING_SCALE:
        raise UsageError(f"drawn faces have ratings from {RATING_SCALE}, the model's scale is {_scale_of(model)}")


def _warn_of_drawings(model: MDNet, init: Path | None, data: Path | None) -> bool:
    """Whether the frozen encoder was trained on drawn faces alone, as far as it is known; a line where `data` are not.

    It is known of the packaged encoder, of what `mdnet prior` made, and of what was trained from these.
    """
    from mdnet.data.drawn_set import is_drawn
    from mdnet.model.checkpoint import demo_checkpoint, load_checkpoint, read_metadata
    from mdnet.training.features import encoder_digest

    notes = {} if init is None else read_metadata(init)[1]
    said = DRAWN in str(notes.get("encoder"))
    if not said and model.config.preset == "demo":
        said = encoder_digest(model.diffusion) == encoder_digest(load_checkpoint(demo_checkpoint()).diffusion)
    if said and data is not None and not is_drawn(data):
        say(
            "note: the frozen encoder has never seen a photograph, only drawn faces: a ridge on its features shows how "
            "far it reaches on your pictures. `mdnet import` brings one trained on photographs (docs/import.md)"
        )
    return said


def initial_model(
    preset_name: str | None, init: Path | None, seed: int, scale: Scale | None, face: str | None
) -> MDNet:
    """The model of `--init` or `--preset`, on the scale and at the framing that were asked for.

    Raises:
        UsageError: neither option gives a model.
    """
    from mdnet.model.net import with_scale

    model = _model_to_start_from(preset_name, init, seed)
    if face is not None:
        model.config = dataclasses.replace(model.config, face=parse_face(face))
    return model if scale is None else with_scale(model, *scale)


def _scale_of(model: MDNet) -> Scale:
    return Scale(model.config.score_min, model.config.score_max)


def _model_to_start_from(preset_name: str | None, init: Path | None, seed: int) -> MDNet:
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
