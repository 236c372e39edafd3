"""`mdnet`: draw data, import weights, train, evaluate, explain."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mdnet import __version__
from mdnet.cli.common import DRAWN_FACES, check_output, command_line, require_train
from mdnet.cli.data import data_help, fold_option, parse_scale, protocol_option, scale_option
from mdnet.cli.distil import distil
from mdnet.cli.explain import explain
from mdnet.cli.pretraining import pretrain, prior
from mdnet.cli.training import ablate, train
from mdnet_engines.backends.candidates import BACKENDS
from mdnet_engines.console import Command, say, show_progress
from mdnet_engines.errors import UsageError, require
from mdnet_engines.framing import FaceOption
from mdnet_engines.system.output_path import write_text

if TYPE_CHECKING:
    from mdnet.evaluation.scored_model import Device
    from mdnet_engines.backends.candidates import Backend


@click.group("mdnet", cls=Command)
def main() -> None:
    """MD-Net in PyTorch: published weights, data, training, evaluation, what a score depends on."""


for command in (prior, distil, pretrain, train, ablate, explain):
    main.add_command(command)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--count", default=DRAWN_FACES, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--test", type=int, help="Also write ratings.csv, a table whose last so many faces are the test list.")
def draw(folder: Path, count: int, seed: int, test: int | None) -> None:
    """Draw rated faces into FOLDER, in the layout of SCUT-FBP5500."""
    from mdnet.data.drawn_set import write_dataset

    with show_progress() as progress:
        write_dataset(folder, count, seed, progress, test=test)
    say(f"{count} drawn faces in {folder}")


@main.command("import")
@click.option(
    "--sd",
    type=click.Path(path_type=Path),
    required=True,
    help="Stable Diffusion 1.x or 2.x: a diffusers folder, or a single .safetensors or .ckpt.",
)
@click.option(
    "--vae",
    type=click.Path(path_type=Path),
    help="A distilled VAE encoder in place of SD's: AutoencoderTiny's folder, or TAESD's .safetensors or .pth.",
)
@click.option("--vim", type=click.Path(path_type=Path), required=True, help="Vision Mamba: a .pth of hustvl/Vim.")
@click.option("--preset", help="Such as sd15-vim-s or sd21-vim-s; by default chosen by what the files are.")
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
    vae: Path | None,
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
    require_train()
    from mdnet.model.checkpoint import save_checkpoint
    from mdnet.weights.assemble import import_weights

    check_output(output)
    with show_progress(lines=False) as progress:
        imported = import_weights(
            sd,
            vim,
            vae=vae,
            preset=preset,
            image_size=image_size,
            null_prompt_file=null_prompt,
            seed=seed,
            progress=progress,
        )
        progress.step(f"writing {output}")
        save_checkpoint(imported.model, output, notes={"command": command_line(), **imported.notes})
    if imported.dropped:
        say(f"left out: Vim's classifier ({', '.join(imported.dropped)})")
    config = imported.model.config
    say(
        f"{output}: preset {config.preset}, {config.image_size} pixels, Vim stride {config.vim_stride}; "
        f"next: mdnet train --init {shlex.quote(str(output))} --data DIR"
    )


@main.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="CHECKPOINT_OR_BUNDLE...")
@click.option("--data", type=click.Path(path_type=Path), required=True, help=data_help)
@protocol_option
@fold_option
@scale_option
@click.option(
    "--report", type=click.Path(path_type=Path), help="Write a page with tables and charts to this .html file."
)
@click.option(
    "--json", "json_", type=click.Path(path_type=Path), help="Write every figure and score to this .json file."
)
@click.option("--face", type=FaceOption(), help="Which square of an image to score. Default: that of training.")
@click.option("--batch-size", type=click.IntRange(1, 1024), default=16, show_default=True, help="Images at once.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="What runs a checkpoint."
)
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="What runs a bundle.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    help="Frozen features of the training list, as `mdnet train --cache` keeps them: for a ridge beside a checkpoint.",
)
@click.option("--half-features", is_flag=True, help="They are in float16.")
@click.option(
    "--pictures",
    is_flag=True,
    help="Put the pictures with the largest errors into the page, which then has people's faces in it.",
)
def evaluate(
    models: tuple[Path, ...],
    data: Path,
    protocol: str | None,
    fold: int | None,
    scale: tuple[float, float] | None,
    report: Path | None,
    json_: Path | None,
    face: str | None,
    batch_size: int,
    device: Device,
    backend: Backend,
    cache: Path | None,
    half_features: bool,
    pictures: bool,
) -> None:
    """PC, MAE and RMSE on the test images of each split of the protocol, and their mean ± sd over its folds.

    A model is a checkpoint or a bundle's folder. Of a protocol with folds give one model for each, in their order
    (each trained on the training list of its fold), or one for all of them or for --fold. Of a table without a split
    or fold column all pictures are scored. Figures per group are in --report and --json. Beside each PC is that of
    baselines: the mean rating of the image's group in the training list and, with --cache, a ridge on the frozen
    features.
    """
    from mdnet.evaluation.baselines import RIDGE
    from mdnet.evaluation.protocols import run_benchmark
    from mdnet.evaluation.scored_model import open_model

    for option, file in (("--report", report), ("--json", json_)):
        check_output(file, option, "the result")
    if pictures and not report:
        raise UsageError("--pictures is about the page of --report, which is not asked for")
    if report:
        require("jinja2", "train")
    with show_progress() as progress:
        benchmark = run_benchmark(
            [open_model(path) for path in models],
            data,
            protocol,
            fold=fold,
            scale=parse_scale(scale),
            face=face,
            device=device,
            backend=backend,
            batch_size=batch_size,
            cache=cache,
            half_features=half_features,
            progress=progress,
            on_result=lambda split: click.echo(f"{split.name}: {split}"),
        )
    if len(benchmark.splits) > 1:
        click.echo(f"{benchmark.protocol}: {benchmark}")
    if RIDGE not in benchmark.baselines:
        say(f"note: no {RIDGE} beside it; that takes a checkpoint, a training list and --cache DIR")
    if json_:
        write_text(json_, json.dumps(benchmark.to_json(), indent=1, allow_nan=False) + "\n")
    if report:
        from mdnet.evaluation.report_page import render_report

        facts = {"command": command_line(), "mdnet": __version__, "device": device, "backend": backend}
        write_text(report, render_report(benchmark, facts=facts, pictures=pictures))
