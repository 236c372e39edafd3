"""`mdnet-rt check` and `mdnet-rt tune`: is a bundle right on this machine, and what runs it fastest?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mdnet_engines.backends.candidates import BACKENDS, Backend
from mdnet_engines.console import say, show, show_progress
from mdnet_engines.errors import printable

if TYPE_CHECKING:
    from mdnet_engines.backends.choice import Trial, Tuning
    from mdnet_engines.bundle.files import Bundle

bundle_argument = click.argument("bundle", required=False, type=click.Path(path_type=Path))
threads_option = click.option(
    "--threads", type=click.IntRange(0, 1024), default=0, help="Threads per graph. Default: all cores."
)
json_option = click.option("--json", "json_", is_flag=True, help="Print one JSON object for machines.")


@click.command()
@bundle_argument
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="What runs the graphs.")
@threads_option
@json_option
def check(bundle: Path | None, backend: Backend, threads: int, json_: bool) -> int:
    """Run the bundle's probes as `score` would, and apply the gates. Needs neither torch nor a checkpoint.

    BUNDLE is by default $MDNET_BUNDLE, else ./mdnet-bundle. Exit code 0: every gate holds; 1: one does not.
    """
    from mdnet_engines.backends.choice import check as check_bundle

    found = _open(bundle)
    with show_progress(lines=False) as progress:
        trial = check_bundle(found, backend, threads=threads, progress=progress)
    if json_:
        click.echo(json.dumps(_check_as_json(found, trial)))
    else:
        verb = "holds" if trial.holds else "does NOT hold"
        manifest = found.manifest
        title = f"{printable(found.path)}, {printable(manifest.label)}"
        click.echo(f"{title}: {verb} on {trial.choice}: {trial.verdict()}")
    return 0 if trial.holds else 1


@click.command()
@bundle_argument
@threads_option
@click.option(
    "--seconds", type=click.FloatRange(0.1, 600), default=3, show_default=True, help="To time each graph for."
)
@json_option
def tune(bundle: Path | None, threads: int, seconds: float, json_: bool) -> None:
    """Put every backend of this machine through the gates, time those that pass, and let `auto` take the fastest.

    What is found is kept in the user's cache, for this bundle, processor, number of threads, and versions.
    BUNDLE is by default $MDNET_BUNDLE, else ./mdnet-bundle.
    """
    from mdnet_engines.backends import choice

    found = _open(bundle)
    with show_progress(lines=False) as progress:
        tuning = choice.tune(found, threads=threads, seconds=seconds, progress=progress)
    if json_:
        click.echo(json.dumps(_tuning_as_json(found, tuning)))
    else:
        _print(tuning)
    if not tuning.kept:
        say("warning: the choice could not be kept: the cache folder ($XDG_CACHE_HOME/mdnet) can't be written")


def _open(bundle: Path | None) -> Bundle:
    from mdnet_engines.bundle.files import Bundle
    from mdnet_rt.scoring.scorer import find_bundle

    return Bundle.open(find_bundle(bundle))


def _check_as_json(bundle: Bundle, trial: Trial) -> dict[str, Any]:
    from mdnet_engines.parity.report_json import to_json
    from mdnet_engines.system.machine import this_machine

    report = None if trial.report is None else to_json(trial.report)
    return {
        **_about(bundle),
        "holds": trial.holds,
        "graphs": dict(trial.choice.graphs),
        "machine": this_machine().model_dump(),
        "problem": trial.problem or None,
        "gates": report and report["gates"],
        "parity": trial.report and trial.report.summary().model_dump(),
    }


def _tuning_as_json(bundle: Bundle, tuning: Tuning) -> dict[str, Any]:
    times = tuning.times
    return {
        **_about(bundle),
        "graphs": dict(tuning.choice.graphs),
        "batch": times.batch,
        "ms": times.graphs,
        "whole_ms": times.whole,
        "candidates": [
            {"graphs": dict(trial.choice.graphs), "holds": trial.holds, "verdict": trial.verdict()}
            for trial in tuning.trials
        ],
        "kept": tuning.kept,
    }


def _about(bundle: Bundle) -> dict[str, str]:
    return {
        "bundle": str(bundle.path),
        "digest": bundle.manifest.digest(),
        "preset": bundle.manifest.preset,
        "precision": bundle.manifest.precision,
    }


def _print(tuning: Tuning) -> None:
    from rich.table import Table

    times = tuning.times
    table = Table("graph", "backend", "ms", "", title=f"batch {times.batch}, median")
    for graph, by_backend in [*times.graphs.items(), *([("all", times.whole)] if times.whole else [])]:
        for backend, ms in sorted(by_backend.items(), key=lambda pair: pair[1]):
            chosen = tuning.choice.graphs.get(graph, next(iter(tuning.choice.graphs.values()))) == backend  # type: ignore[call-overload]
            table.add_row(graph, backend, f"{ms:.3g}", "taken" if chosen else "")
    show(table)
    for trial in tuning.trials:
        click.echo(f"gates, {trial.choice}: {trial.verdict()}")
    click.echo(f"auto takes {tuning.choice}")
