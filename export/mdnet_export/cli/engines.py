"""`mdnet-export engines`: TensorRT plans from a bundle alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from mdnet_engines.bundle.manifest import PlanRuntime
from mdnet_engines.console import say, show_progress
from mdnet_engines.errors import MDNetError, UsageError

if TYPE_CHECKING:
    from mdnet_engines.bundle.files import Bundle
    from mdnet_engines.bundle.manifest import BatchRange
    from mdnet_engines.tensorrt.plan_process import Built
    from mdnet_engines.tensorrt.plans import Host

NEITHER = (
    "there is no TensorRT to build with: install mdnet[tensorrt] where there is a GPU, or mdnet[rtx], which needs none"
)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), default=Path("mdnet-bundle"))
@click.option(
    "--backend",
    type=click.Choice(get_args(PlanRuntime)),
    help="By default tensorrt if it is installed and has a GPU, else tensorrt-rtx.",
)
@click.option(
    "--gpu",
    default="",
    metavar="SM,…",
    help="What to build for: sm_86, sm_89, sm_120 …, or current. By default tensorrt builds for this machine's GPU, "
    "tensorrt-rtx for any RTX GPU from Ampere on.",
)
@click.option(
    "--batch",
    default="1,8,32",
    show_default=True,
    metavar="MIN,OPT,…,MAX",
    help="Batch sizes. Each OPT is a size that the plans are tuned for: more of them take time and space.",
)
@click.option(
    "--workspace",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GiB",
    help="Device memory that one layer may use for intermediate results; by default all of it.",
)
@click.option(
    "--level", type=click.IntRange(0, 5), help="How long tensorrt looks for fast kernels; its own default is 3."
)
@click.option("--stripped", is_flag=True, help="Plans without weights: the bundle's graphs give them at each start.")
@click.option(
    "--compatible",
    is_flag=True,
    help="Plans that later versions of TensorRT and all GPUs from Ampere on run, perhaps more slowly.",
)
@click.option("--force", is_flag=True, help="Rebuild plans that already exist.")
def engines(
    bundle: Path, backend: PlanRuntime | None, gpu: str, batch: str, workspace: float | None, **options: Any
) -> None:
    """Build TensorRT plans of BUNDLE's graphs and put them into it. Needs the bundle alone: no torch, no checkpoint."""
    from mdnet_engines.bundle.files import Bundle
    from mdnet_engines.tensorrt.plan_process import build_plans

    sizes, opened = parse_batch(batch), Bundle.open(bundle)
    host = choose_host(backend)
    with show_progress(lines=False) as progress:
        built = build_plans(
            opened,
            host,
            targets=[word.strip() for word in gpu.split(",") if word.strip()],
            batch=sizes,
            workspace_gib=workspace,
            progress=progress,
            **options,
        )
    print_built(built)


def build_unasked(bundle: Bundle) -> None:
    """After `mdnet-export build`: plans too, where TensorRT has its GPU. A failure is reported; the bundle is kept."""
    from mdnet_engines.tensorrt.plan_process import build_plans, default_host

    if (host := default_host()) is None:
        return
    try:
        with show_progress(lines=False) as progress:
            print_built(build_plans(bundle, host, progress=progress))
    except MDNetError as error:
        say(f"no TensorRT plans: {error}")


def choose_host(backend: PlanRuntime | None) -> Host:
    """What to build with: what was asked for, or what is here."""
    from mdnet_engines.tensorrt.plan_process import default_host, probe

    if backend:
        return probe(backend)
    if host := default_host():
        return host
    if not (host := probe("tensorrt-rtx")).problem:
        return host
    raise MDNetError(NEITHER)


def parse_batch(text: str) -> BatchRange:
    """`1,8,32` as a range of batch sizes, or `UsageError`. More than one size may stand between least and most."""
    from pydantic import ValidationError

    from mdnet_engines.bundle.manifest import BatchRange

    try:
        minimum, optimum, *further, maximum = map(int, text.split(","))
        return BatchRange(minimum=minimum, optimum=optimum, further_optima=further, maximum=maximum)
    except (ValueError, ValidationError):
        raise UsageError(
            f"--batch is {text!r}; expected the least size, up to eight to tune for and the most, from 1 to 4096 in "
            "ascending order, such as 1,8,32 or 1,1,8,32,32"
        ) from None


def print_built(built: Built) -> None:
    """What was built, and how long it took; or that it was there."""
    from mdnet_engines.tensorrt.plans import plans_folder, summary

    folder, record = plans_folder(built.bundle, built.engines), built.record
    if record is None:
        say(f"{folder} is up to date; --force builds it again")
        return
    for name, figures in record["graphs"].items():
        say(f"{name}: {figures['layers']} layers, {figures['bytes'] / 1e6:.1f} MB, {figures['seconds']:.1f} s")
    memory = f", {record['peak_gib']} GiB of memory" if record["peak_gib"] else ""
    say(f"{folder}: {summary(built.engines)}{memory}")
