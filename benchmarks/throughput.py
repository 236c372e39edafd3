"""Images a second on the CPU at several batch sizes, by how the cores are shared: python benchmarks/throughput.py

The baseline is what a user gets who names no backend: `auto`, one batch after the other, all threads in each. Each
contestant takes turns with it, run by run, in a process of its own. A run is the same number of batches for both, as
many as keep every stream busy twice; a ratio is the median of the pairs' ratios. Weights are random, images are
preprocessed and in memory.

A stream is a thread that scores batches on its own. OpenVINO's THROUGHPUT hint chooses the number of its streams; it
can't run the selective scan, so each of its streams has Vim on one thread of ONNX Runtime, as our backend has. A
contestant that can't run here has the reason in place of figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mdnet.model.config import PRESETS
from mdnet_engines.backends.candidates import Backend
from mdnet_engines.backends.choice import open_graphs
from mdnet_engines.bundle.files import Bundle
from mdnet_engines.bundle.manifest import GraphName
from mdnet_engines.errors import MDNetError
from mdnet_engines.sessions.openvino import output_name
from mdnet_rt.bench.facts import describe_host
from mdnet_rt.bench.process import Worker
from mdnet_rt.bench.worker import answer

BASELINE = "auto"
CONTESTANTS: dict[str, tuple[str, Backend]] = {  # name → (how batches share the threads, backend)
    BASELINE: ("in turn", "auto"),
    "auto, a stream for each thread": ("streams", "auto"),
    "auto, encoder and Vim side by side": ("side by side", "auto"),
    "ONNX Runtime": ("in turn", "onnxruntime-cpu"),
    "OpenVINO": ("in turn", "openvino"),
    "OpenVINO, THROUGHPUT": ("throughput", "openvino"),
    "OpenVINO, its own stream for each thread": ("own streams", "openvino"),
    "OpenVINO in bf16, THROUGHPUT": ("throughput", "openvino-bf16"),
}
Score = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    """Measure, print, and write the figures where `-o` says."""
    options = _parse()
    if options.worker:
        answer(lambda _: open_contestant(options))
    from precision import build_bundles  # a contestant's process does not have this folder on its path

    with tempfile.TemporaryDirectory() as scratch:
        folder = options.bundles or Path(scratch)
        if reason := build_bundles(folder, options.preset, {options.precision}).get(options.precision):
            sys.exit(f"error: the bundle can't be built: {reason}")
        facts = {"command": f"python {' '.join(sys.argv)}", **describe_host()}
        facts |= {name: getattr(options, name) for name in ("preset", "precision", "threads", "batches")}
        rows: dict[str, dict[str, Any]] = {}
        for name in options.chosen:
            try:
                rows[name] = against_baseline(name, folder, options)
            except MDNetError as error:
                rows[name] = {"reason": str(error)}
            show(name, rows[name])
            if options.output:  # each time: what comes next may end this process too
                options.output.write_text(json.dumps({**facts, "contestants": rows}, indent=1) + "\n")
    if all("reason" in row for row in rows.values()):
        sys.exit(1)


def show(name: str, row: dict[str, Any]) -> None:
    """Print a contestant's lines, one for each batch size."""
    if "reason" in row:
        print(f"not measured: {row['reason']}", flush=True)
    for size, figures in row.get("batch sizes", {}).items():
        per_second, baseline = figures["images_per_second"], figures["baseline_images_per_second"]
        line = f"{figures['speedup']:6.2f}×  {per_second:8.2f} images/s, {BASELINE} {baseline:8.2f}"
        print(f"{line}  batch {size:>2}, {row['streams']} streams  {name}", flush=True)


def against_baseline(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Time one contestant and the baseline in turns, at every batch size.

    Raises:
        MDNetError: one of them can't run here, for the reason given.
    """
    with _start(BASELINE, folder, options) as baseline, _start(name, folder, options) as contestant:
        workers = (baseline, contestant)
        about = [worker.ready() for worker in workers]
        measured = {}
        for size in options.sizes:
            for worker in workers:  # warms up
                worker.run(size)
            pairs = [[worker.run(size) for worker in workers] for _ in range(options.rounds)]
            images = options.batches * int(size)
            baseline_seconds, seconds = zip(*pairs, strict=True)
            measured[size] = {
                "images_per_second": images / statistics.median(seconds),
                "baseline_images_per_second": images / statistics.median(baseline_seconds),
                "speedup": statistics.median(b / s for b, s in pairs),
            }
        peak = contestant.peak_memory()
    return {**about[1], "batch sizes": measured, "peak_gib": peak and peak / 2**30}


def _start(name: str, folder: Path, options: argparse.Namespace) -> Worker:
    program = [__file__, "--worker", name, "--preset", options.preset, "--precision", options.precision]
    program += ["--bundles", str(folder), "--threads", str(options.threads), "--batches", str(options.batches)]
    program += ["--batch-sizes", ",".join(options.sizes)]
    return Worker(name, program, {}, threads=options.threads)


def open_contestant(options: argparse.Namespace) -> tuple[dict[str, Callable[[], object]], dict[str, Any]]:
    """The contestant `options.worker`: a stage for each batch size, and what there is to say of it."""
    how, backend = CONTESTANTS[options.worker]
    bundle = Bundle.open(options.bundles / options.precision)
    streams = options.threads if how == "streams" else 1
    score: Score
    if how in ("throughput", "own streams"):
        score, streams = open_streams(bundle, backend, options.threads, hinted=how == "throughput")
    elif how == "side by side":
        score = side_by_side(bundle, backend, options.threads)
    else:
        score = open_graphs(bundle, backend=backend, threads=options.threads // streams, check=False).score
    size = bundle.manifest.preprocessing.image_size
    score(np.zeros((1, size, size, 3), np.uint8))  # OpenVINO's first run in two threads at once may never end
    pool = ThreadPoolExecutor(streams)

    def run_of(n: int) -> Callable[[], object]:
        images = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)

        def run() -> None:
            scores = list(pool.map(score, [images] * options.batches))
            if not np.isfinite(scores).all():
                raise MDNetError(f"its scores are {scores}")

        return run

    return {n: run_of(int(n)) for n in options.sizes}, {"streams": streams}


def side_by_side(bundle: Bundle, backend: Backend, threads: int) -> Score:
    """Encoder and Vim of the same batch at the same time, each with all threads."""
    graphs = open_graphs(bundle, backend=backend, threads=threads, check=False)
    pool = ThreadPoolExecutor(1)

    def score(images: np.ndarray) -> np.ndarray:
        tokens = pool.submit(graphs["vim"].run, {"image": images})
        features = graphs["encoder"].run({"image": images})
        return graphs["fusion"].run({**features, **tokens.result()})["score"]

    return score


def open_streams(bundle: Bundle, backend: Backend, threads: int, *, hinted: bool) -> tuple[Score, int]:
    """Encoder and fusion on OpenVINO's streams, Vim on ONNX Runtime; and how many streams there are."""
    try:
        import openvino
    except ImportError:
        raise MDNetError("openvino is not installed") from None
    core, bf16 = openvino.Core(), backend == "openvino-bf16"
    if bf16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise MDNetError("this CPU has no native bf16")
    streaming = {"PERFORMANCE_HINT": "THROUGHPUT"} if hinted else {"NUM_STREAMS": threads}
    settings = {"INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32", "INFERENCE_NUM_THREADS": threads, **streaming}
    names: tuple[GraphName, ...] = ("encoder", "fusion")
    models = {name: core.compile_model(str(bundle.graph_path(name)), "CPU", settings) for name in names}
    streams = models["encoder"].get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
    vim = open_graphs(bundle, backend="onnxruntime-cpu", threads=max(1, threads // streams), check=False)["vim"]

    def infer(name: GraphName, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        model = models[name]
        values = model.create_infer_request().infer(feeds)
        return {output_name(port): values[port] for port in model.outputs}

    def score(images: np.ndarray) -> np.ndarray:
        features = infer("encoder", {"image": images})
        return infer("fusion", {**features, **vim.run({"image": images})})["score"]

    return score, streams


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--preset", choices=list(PRESETS), default="demo")
    parser.add_argument("--precision", choices=["fp32", "int8"], default="int8")
    parser.add_argument("--batch-sizes", default="1,4,16", help="separated by commas")
    parser.add_argument("--batches", type=int, default=4, help="in each run: twice the streams, or more")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", action="append", help="contestants whose name holds this; may be repeated")
    parser.add_argument("--bundles", type=Path, help="folder that keeps the bundles (built when missing)")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.sizes = options.batch_sizes.split(",")
    if not all(size.isdecimal() and int(size) for size in options.sizes):
        parser.error("--batch-sizes takes numbers from 1 on, separated by commas")
    if min(options.batches, options.rounds, options.threads) < 1:
        parser.error("--batches, --rounds and --threads must be 1 or more")
    known = [name for name in CONTESTANTS if name != BASELINE]
    options.chosen = [name for name in known if any(part in name for part in options.only or [""])]
    if not options.chosen:
        parser.error(f"no contestant's name holds {' or '.join(options.only)}; there are: {'; '.join(known)}")
    return options


if __name__ == "__main__":
    main()
