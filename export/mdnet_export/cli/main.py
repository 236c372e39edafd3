"""`mdnet-export`: build a bundle, look into one, prove one again."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from mdnet_engines.backends.candidates import BACKENDS
from mdnet_engines.bundle.files import Bundle, check_replaceable
from mdnet_engines.bundle.manifest import Precision
from mdnet_engines.console import Command, say, show, show_progress, warn_loudly
from mdnet_engines.errors import MDNetError, printable, require
from mdnet_engines.parity.gates import RATED_IMAGES
from mdnet_engines.parity.probes import PROBES
from mdnet_engines.report.numbers import correlation_text
from mdnet_engines.tensorrt.plans import FOR_FP8
from mdnet_export.cli.calibration import calibration_options, choose_images
from mdnet_export.cli.engines import build_unasked, engines
from mdnet_export.cli.triton import triton

if TYPE_CHECKING:
    from rich.table import Table

    from mdnet_engines.backends.candidates import Backend
    from mdnet_engines.parity.report import ParityReport

DEFAULT_BUNDLE = Path("mdnet-bundle")
_VERDICTS = {"pass": "pass", "fail": "[bold red]FAIL[/]", "not evaluated": "[bold yellow]not evaluated[/]"}

images_option = click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="What to measure parity on: a folder of images; or SCUT-FBP5500's root or a table of ratings, of which test "
    "images are used. By default faces are drawn; a build with --calib keeps some of these pictures for it.",
)
count_option = click.option(
    "--num-images", type=int, help=f"How many of them to use.  [default: {RATED_IMAGES}; {PROBES} drawn faces]"
)
checkpoint_option = click.option(
    "--checkpoint", type=click.Path(path_type=Path, dir_okay=False), help="Trained MD-Net checkpoint (.safetensors)."
)


@click.group("mdnet-export", cls=Command)
def main() -> None:
    """From a trained PyTorch MD-Net to a bundle that mdnet-rt serves."""


main.add_command(engines)
main.add_command(triton)


@main.command()
@checkpoint_option
@click.option("--preset", help="Such as sd15-vim-s, sd21-vim-s or demo; a checkpoint knows its own.")
@click.option("--random-init", is_flag=True, help="Random weights: proves size and speed before you have weights.")
@click.option("--seed", default=0, show_default=True, help="Seed of --random-init.")
@click.option("--precision", type=click.Choice(get_args(Precision)), default="fp32", show_default=True)
@calibration_options
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=DEFAULT_BUNDLE, show_default=True, help="Bundle folder."
)
@images_option
@count_option
@click.option(
    "--force", is_flag=True, help="Write the bundle even if a gate fails or int8 is slower; the manifest records it."
)
def build(
    checkpoint: Path | None,
    preset: str | None,
    random_init: bool,
    seed: int,
    precision: Precision,
    output: Path,
    images: Path | None,
    num_images: int | None,
    force: bool,
    **calibration: Any,
) -> None:
    """Build a bundle: three ONNX graphs, a manifest and a parity report.

    An existing bundle at OUTPUT is replaced atomically; any other folder is refused.
    """
    _require_export()
    from mdnet_export.build import build_bundle
    from mdnet_export.model_source import choose_weights

    weights = choose_weights(checkpoint=checkpoint, preset_name=preset, random_init=random_init, seed=seed)
    if checkpoint is None and preset is None and not random_init:
        warn_loudly(
            "no --checkpoint: this bundle is the DEMO, whose scores mean nothing for real people",
            "for your own model: mdnet-export build --checkpoint mine.safetensors",
        )
    say(f"weights: {weights.describe()}")
    check_replaceable(output.resolve())
    command = shlex.join(["mdnet-export", *sys.argv[1:]])
    with show_progress() as progress:
        measured_on, chosen = choose_images(
            weights, precision, images=images, num_images=num_images, **calibration, progress=progress
        )
        bundle = build_bundle(
            weights,
            output,
            precision=precision,
            images=measured_on,
            calibration=chosen,
            force=force,
            command=command,
            progress=progress,
        )
    _print_result(bundle)
    build_unasked(bundle)


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path), default=DEFAULT_BUNDLE)
def inspect(bundle: Path) -> None:
    """Check a bundle's files against its manifest and show what is in it."""
    from mdnet_export.inspect import print_bundle

    print_bundle(Bundle.open(bundle))


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path), default=DEFAULT_BUNDLE)
@click.option(
    "--against",
    type=click.Path(path_type=Path, exists=True),
    help="The checkpoint it was built from, or another bundle. A bundle of demo or random weights needs neither.",
)
@images_option
@count_option
@click.option(
    "--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="auto: what mdnet-rt score takes."
)
@click.option("--layers", is_flag=True, help="Compare every layer too; always done if a gate fails.")
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), help="Write the report there.")
def verify(
    bundle: Path,
    against: Path | None,
    images: Path | None,
    num_images: int | None,
    backend: Backend,
    layers: bool,
    output: Path | None,
) -> None:
    """Measure a bundle against PyTorch again, on this machine; exit 1 when a gate fails."""
    _require_export()
    from mdnet_export.verify import verify_bundle

    with show_progress() as progress:
        report = verify_bundle(
            bundle,
            against=against,
            images_folder=images,
            num_images=num_images,
            backend=backend,
            layers=layers,
            output=output,
            progress=progress,
        )
    _print_gates(report)
    _print_layers(report)
    if not report.passed:
        raise MDNetError(f"{bundle} is not in parity with PyTorch on {report.backend}")


def _require_export() -> None:
    for module in ("torch", "diffusers", "onnx", "onnxscript", "jinja2"):
        require(module, "export")
    require("onnxruntime", "cpu")


def _print_result(bundle: Bundle) -> None:
    manifest = bundle.manifest
    size = sum(file.size for file in manifest.files()) / 1e6
    parity = manifest.parity
    verdict = "parity passed" if parity.passed else "PARITY FAILED, written because of --force"
    say(f"{bundle.path}: {printable(manifest.label)}, {size:.1f} MB")
    say(f"{verdict}: {parity.figures()}; see {bundle.path / 'parity.html'}")
    _warn_of_gaps(parity.not_evaluated)
    if manifest.precision == "fp16":
        say("fp16 is for GPUs; on a CPU only the backend openvino-bf16 gains from it")
    if manifest.precision == "fp8":
        say(f"fp8 is {FOR_FP8}")
    if (int8 := manifest.int8) and int8.speedup < 1:
        why = _why_written(int8.speedup)
        say(f"note: on this machine int8 is {int8.speedup:.2f}× as fast as float ({int8.speedup_on}); {why}")
    say(f"next: mdnet-rt score --bundle {shlex.quote(str(bundle.path))} IMAGES")


def _why_written(speedup: float) -> str:
    from mdnet_export.quantise import NOISE

    return f"up to {NOISE:.0%} more time counts as noise" if speedup * (1 + NOISE) >= 1 else "it may gain on another"


def _print_layers(report: ParityReport) -> None:
    from mdnet_engines.parity.gates import LIMITS
    from mdnet_engines.parity.measure import first_diverging

    limit = LIMITS[report.precision].graph_snr_db
    for graph, layers in report.layers.items():
        if first := first_diverging(layers, report.precision):
            say(f"{graph}: the first layer below {limit:g} dB is {first.layer} ({first.parity.snr_db:.1f} dB)")
        else:
            worst = min(layers, key=lambda layer: layer.parity.snr_db)
            say(f"{graph}: no layer is below {limit:g} dB; the lowest is {worst.layer} ({worst.parity.snr_db:.1f} dB)")


def _print_gates(report: ParityReport) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table("gate", "value", "limit", "", title=f"{report.precision} on {report.backend}, {report.source}")
    for gate in report.gates:
        value = escape(gate.note) if gate.value is None else f"{gate.value:.6g}"
        limit = f"{'≤' if gate.at_most else '≥'} {gate.limit:g}"
        table.add_row(escape(printable(gate.name)), value, limit, _VERDICTS[gate.verdict])
    show(table)
    if report.ratings:
        show(_ratings(report))
    _warn_of_gaps(report.not_evaluated())


def _ratings(report: ParityReport) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table("", title="Pearson with the ratings, and mean |Δscore|")
    for column in ("images", "reference", "bundle", "lost", "mean |Δ|", "of the scale"):
        table.add_column(column, justify="right")
    for part in report.ratings:
        correlations = (*map(correlation_text, (part.reference, part.bundle)), correlation_text(part.lost, "+"))
        moved = (f"{part.mean_abs:.3g}", f"{part.of_width:.2%}")
        table.add_row(escape(printable(part.group)), str(part.images), *correlations, *moved)
    return table


def _warn_of_gaps(not_evaluated: str) -> None:
    if not_evaluated:
        say(f"warning: not evaluated, neither passed nor failed: {not_evaluated}")
