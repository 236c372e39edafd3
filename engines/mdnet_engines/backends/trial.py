"""Try backends in a process of its own, so that one that crashes is a reason and not the end: gates and times.

`measure_apart` and `time_apart` start `python -m mdnet_engines.backends.trial`, which opens the graphs as a run would.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mdnet_engines.backends.candidates import Choice, named, open_choice, open_graph
from mdnet_engines.bundle.files import Bundle, read_manifest
from mdnet_engines.bundle.manifest import GRAPH_NAMES, GraphBackend, GraphName
from mdnet_engines.parity.gates import gate_against_build
from mdnet_engines.parity.measure import Images, Outputs, measure, measure_graphs, measure_scores
from mdnet_engines.parity.probes import PROBES_NAME, Probes, expected_snr, load_probes, read_probes, write_probes
from mdnet_engines.parity.report import ParityReport
from mdnet_engines.parity.report_json import from_json, to_json
from mdnet_engines.progress import SILENT, Progress
from mdnet_engines.system.child_process import Say, ask, serve

QUICK = 8
"""Probes, in one batch, that a first run on a machine scores."""
BATCH = 16
_SLOW = 0.1  # seconds an image, from which single images are timed: a batch would keep the user waiting
_ROUNDS = 5  # at least
_MOST_DB = 200.0  # for outputs that are equal, whose ratio is infinite


@dataclass(frozen=True)
class Times:
    """Median milliseconds for `batch` images: of each graph by backend, and of all graphs on a GPU by backend."""

    batch: int
    graphs: dict[GraphName, dict[GraphBackend, float]]
    whole: dict[GraphBackend, float]


@dataclass(frozen=True)
class Measured:
    """How a choice of backends met the gates, and the signal-to-noise ratio of every output on the probes, dB."""

    report: ParityReport
    snr_db: dict[str, float]


def measure_apart(
    bundle: Bundle,
    choice: Choice,
    *,
    threads: int = 0,
    against: tuple[Images, Outputs] | None = None,
    quick: bool = False,
    gpu_graphs: bool = False,
    progress: Progress = SILENT,
) -> Measured:
    """Hold a choice of backends to the gates, and to how near to PyTorch it was where the bundle was built.

    Args:
        against: images and PyTorch's outputs for them; by default the bundle's probes.
        quick: only scores, of the first `QUICK` images, and the graph outputs that the probes have.
        gpu_graphs: of the graphs that GPUs get, whatever runs them.

    Raises:
        CrashError: the process was ended by native code, or for want of memory.
        MDNetError: a graph could not be opened or run.
    """
    request = {"ask": "measure", "quick": quick, "threads": threads, **_names(bundle), "graphs": dict(choice.graphs)}
    request["gpu_graphs"] = gpu_graphs
    with TemporaryDirectory(prefix="mdnet-trial-") as folder:
        if against is not None:
            images, reference = against
            write_probes(Path(folder, PROBES_NAME), images.pixels, reference, outputs=len(images.pixels))
            ratings = None if images.ratings is None else images.ratings.tolist()
            request |= {"folder": folder, "names": images.names, "source": images.source}
            request |= {"ratings": ratings, "groups": images.groups}
        answer = ask("mdnet_engines.backends.trial", request, name=str(choice), progress=progress)
    return Measured(from_json(answer["report"]), answer["snr_db"])


def measure_gpu_graphs(bundle: Bundle, against: tuple[Images, Outputs], *, progress: Progress = SILENT) -> ParityReport:
    """Hold the graphs that GPUs get to the gates, on the CPU: slow there, and needs no GPU; raises as above."""
    choice = named(bundle, "onnxruntime-cpu")
    return measure_apart(bundle, choice, against=against, gpu_graphs=True, progress=progress).report


def time_apart(
    bundle: Bundle,
    choices: Sequence[Choice],
    *,
    threads: int = 0,
    seconds: float,
    progress: Progress = SILENT,
) -> Times:
    """Time every backend of `choices` on every graph that it runs, in turns, for about `seconds` a graph; as above."""
    request = {
        "ask": "time",
        "threads": threads,
        "seconds": seconds,
        **_names(bundle),
        "choices": [dict(choice.graphs) for choice in choices],
    }
    answer = ask("mdnet_engines.backends.trial", request, name="timing", progress=progress)
    return Times(answer["batch"], answer["graphs"], answer["whole"])


def _names(bundle: Bundle) -> dict[str, str]:
    return {"bundle": str(bundle.path.absolute())}


# --------------------------------------------------------------------------------------------------------- in the child


def _measure(request: dict[str, Any], say: Say) -> dict[str, Any]:
    bundle = _open(request)
    bundle = bundle.on_gpus() if request["gpu_graphs"] else bundle
    choice = Choice(request["graphs"])
    say("step", f"opening {choice}")
    graphs = open_choice(bundle, choice, threads=request["threads"])
    probes, scale = read_probes(bundle), bundle.manifest.score
    held_to: dict[str, Any] = {"precision": bundle.manifest.precision, "scale": scale, "backend": str(choice)}
    say("step", f"{choice} on {probes.images.source}")
    if request["quick"]:
        few = probes.first(QUICK)
        report = measure_scores(graphs.score, few.reference["score"], few.images, **held_to)
    else:
        wanted = _images(request, bundle) if "folder" in request else probes
        report = measure(graphs, wanted.reference, wanted.images, **held_to)
    outputs = measure_graphs(graphs, probes.reference, probes.images.pixels, scale)
    gates = list(report.gates)
    if "folder" not in request:  # else it is being built: there is nothing to compare with yet
        gates.append(gate_against_build(outputs, expected_snr(bundle.manifest, choice.graphs)))
    snr_db = {name: min(each.snr_db, _MOST_DB) for parities in outputs.values() for name, each in parities.items()}
    return {
        "report": to_json(dataclasses.replace(report, gates=gates)),
        "snr_db": {name: value for name, value in snr_db.items() if value == value},
    }


def _time(request: dict[str, Any], say: Say) -> dict[str, Any]:
    bundle, threads, seconds = _open(request), request["threads"], request["seconds"]
    choices = [Choice(graphs) for graphs in request["choices"]]
    pixels = read_probes(bundle).images.pixels
    pixels = pixels[np.arange(BATCH) % len(pixels)]
    apart = [choice for choice in choices if not choice.on_gpu]  # on a GPU graphs are timed one after the other
    whole: dict[str, float] = {}
    values: dict[str, np.ndarray] = {"image": pixels}
    by_graph: dict[str, dict[str, float]] = {}
    batch = BATCH
    for name in GRAPH_NAMES if apart else ():
        say("step", f"timing {name}")
        backends = dict.fromkeys(choice.graphs[name] for choice in apart)
        sessions = {backend: open_graph(bundle, name, backend, threads) for backend in backends}
        first = next(iter(sessions.values()))
        feeds = {each: values[each][:batch] for each in first.inputs}
        if name == GRAPH_NAMES[0]:
            single = {each: value[:1] for each, value in feeds.items()}
            first.run(single)
            start = time.perf_counter()
            first.run(single)
            if time.perf_counter() - start > _SLOW:
                batch, feeds = 1, single
        values |= first.run(feeds)
        by_graph[name] = _in_turns({b: partial(session.run, feeds) for b, session in sessions.items()}, seconds)
    for choice in choices:
        if choice in apart:
            continue
        say("step", f"timing {choice}")
        graphs = open_choice(bundle, choice, threads=threads)
        whole |= _in_turns({str(choice): partial(graphs.score, pixels[:batch])}, seconds)
        graphs.close()
    return {"batch": batch, "graphs": by_graph, "whole": whole}


def _in_turns(runs: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each: a few runs, and where there are several, for about `seconds` in all."""
    for run in runs.values():
        run()  # warms up
    taken: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    while len(next(iter(taken.values()))) < _ROUNDS or (len(runs) > 1 and time.perf_counter() < end):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in taken.items()}


def _open(request: dict[str, Any]) -> Bundle:
    """The bundle, whose files whoever asks has checked."""
    path = Path(request["bundle"])
    return Bundle(path, read_manifest(path))


def _images(request: dict[str, Any], bundle: Bundle) -> Probes:
    """The images that were given, with PyTorch's outputs."""
    probes = load_probes(Path(request["folder"], PROBES_NAME), bundle.manifest)
    ratings = None if request["ratings"] is None else np.array(request["ratings"])
    given = Images(request["names"], probes.images.pixels, request["source"], ratings, request["groups"])
    return Probes(given, probes.reference)


if __name__ == "__main__":
    serve({"measure": _measure, "time": _time})
