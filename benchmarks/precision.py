"""What a precision and a runtime bring on the CPU, for the whole model, image to score: python benchmarks/precision.py

The baseline is PyTorch eager in float32, channels_last, with the native scan, so that no ratio owes anything to a
Python loop. Each contestant takes turns with it, run by run, in a process of its own; times are medians, a ratio is the
median of the pairs' ratios, and peak memory is that process's. Weights are random: as much work as others, and scores
that mean nothing, so agreement is `mdnet-export verify`'s to show. Images are preprocessed and in memory.

"OpenVINO, its own conversion" is the same PyTorch encoder through `openvino.convert_model`, beside our Vim and fusion;
"auto" is what a user gets who names no backend. A contestant that can't run here has the reason in place of figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any

import numpy as np

from mdnet.model.config import PRESETS
from mdnet_engines.errors import MDNetError
from mdnet_rt.bench.facts import describe_host
from mdnet_rt.bench.process import Worker
from mdnet_rt.bench.worker import answer

BASELINE = "PyTorch eager"
_EXPORT = "from mdnet_export.cli.main import main; main()"
CONTESTANTS: dict[str, tuple[str, str]] = {  # name → (how it is opened, its precision's bundle or arithmetic)
    BASELINE: ("torch", "native"),
    "PyTorch eager, scan in a Python loop": ("torch", "loop"),
    "torch.compile": ("torch", "compile"),
    "PyTorch eager, bf16 autocast": ("torch", "bf16"),
    "ONNX Runtime, fp32": ("onnxruntime-cpu", "fp32"),
    "ONNX Runtime, int8": ("onnxruntime-cpu", "int8"),
    "OpenVINO, fp32": ("openvino", "fp32"),
    "OpenVINO, its own conversion, fp32": ("convert", "f32"),
    "OpenVINO, fp16 bundle in bf16": ("openvino-bf16", "fp16"),
    "OpenVINO, its own conversion, bf16": ("convert", "bf16"),
    "OpenVINO, int8": ("openvino", "int8"),
    "OpenVINO, int8, the rest in bf16": ("openvino-bf16", "int8"),
    "auto, fp32": ("auto", "fp32"),
    "auto, int8": ("auto", "int8"),
}


def main() -> None:
    """Measure, print, and write the figures where `-o` says."""
    options = _parse()
    if options.worker:
        return answer(lambda _: open_contestant(options))
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.bundles or Path(scratch)
        refused = build_bundles(folder, options.preset, {_bundle_of(name) for name in options.chosen} - {None})
        facts = {
            "command": f"python {' '.join(sys.argv)}",
            **describe_host(),
            "preset": options.preset,
            "batch_size": options.batch_size,
            "threads": options.threads,
        }
        rows: dict[str, dict[str, Any]] = {}
        for name in options.chosen:
            try:
                if reason := refused.get(_bundle_of(name)):
                    raise MDNetError(f"{name}: its bundle can't be built: {reason}")
                rows[name] = against_baseline(name, folder, options)
            except MDNetError as error:
                rows[name] = {"reason": str(error)}
            if options.output:  # each time: what comes next may end this process too
                options.output.write_text(json.dumps({**facts, "contestants": rows}, indent=1) + "\n")
    show(rows, options)
    if all("reason" in row for row in rows.values()):
        sys.exit(1)
    return None


def show(rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """Print a line for each contestant, and one for the baseline."""
    print(f"{options.preset}, batch {options.batch_size}, {options.threads} threads; × is the speed of {BASELINE}")
    line = "{:6.2f}×  {:9.1f} ms  {:5.2f} GiB  {}".format
    for name, row in rows.items():
        if "reason" in row:
            print(f"not measured: {row['reason']}")
        else:
            print(line(row["speedup"], row["ms"], row["peak_gib"] or nan, name))
    if measured := [row for row in rows.values() if "reason" not in row]:
        print(line(1, measured[0]["baseline_ms"], measured[0]["baseline_peak_gib"] or nan, BASELINE))


def build_bundles(folder: Path, preset: str, precisions: set[str]) -> dict[str | None, str]:
    """Build what is missing, with random weights; ranges from a few faces, since they change no speed.

    Gives the reason for each precision whose bundle could not be built.
    """
    refused: dict[str | None, str] = {}
    for precision in sorted(precisions):
        if (folder / precision / "manifest.json").is_file():
            continue
        command = [sys.executable, "-c", _EXPORT, "build", "--preset", preset, "--random-init", "--force"]
        command += ["--precision", precision, "--num-images", "2", "-o", str(folder / precision)]
        command += ["--num-calib", "8"] if precision != "fp32" else []
        last = ""
        with subprocess.Popen(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True) as build:
            assert build.stderr is not None
            for line in build.stderr:
                sys.stderr.write(line)
                last = line.strip() or last
        if build.returncode:
            refused[precision] = last.removeprefix("error: ") or f"exit code {build.returncode}"
    return refused


def against_baseline(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Time one contestant and the baseline in turns.

    Raises:
        MDNetError: one of them can't run here, for the reason given.
    """
    with _start(BASELINE, folder, options) as baseline, _start(name, folder, options) as contestant:
        workers = (baseline, contestant)
        about = [worker.ready() for worker in workers]
        for worker in workers:  # warms up
            worker.run("graphs")
        pairs = [[worker.run("graphs") for worker in workers] for _ in range(options.rounds)]
        peaks = [(peak := worker.peak_memory()) and peak / 2**30 for worker in workers]
    baseline_seconds, seconds = zip(*pairs, strict=True)
    return {
        **about[1],
        "ms": statistics.median(seconds) * 1e3,
        "baseline_ms": statistics.median(baseline_seconds) * 1e3,
        "speedup": statistics.median(b / s for b, s in pairs),
        "peak_gib": peaks[1],
        "baseline_peak_gib": peaks[0],
    }


def _start(name: str, folder: Path, options: argparse.Namespace) -> Worker:
    program = [__file__, "--worker", name, "--preset", options.preset, "--bundles", str(folder)]
    program += ["--batch-size", str(options.batch_size), "--threads", str(options.threads)]
    return Worker(name, program, {}, threads=options.threads)


def _bundle_of(name: str) -> str | None:
    how, kind = CONTESTANTS[name]
    return {"torch": None, "convert": "fp32"}.get(how, kind)


def open_contestant(options: argparse.Namespace) -> tuple[dict[str, Callable[[], object]], dict[str, Any]]:
    """The contestant `options.worker`: the whole model as its only stage, and what there is to say of it."""
    size = PRESETS[options.preset].image_size
    images = np.random.default_rng(0).integers(0, 256, (options.batch_size, size, size, 3), dtype=np.uint8)
    how, kind = CONTESTANTS[options.worker]
    about: dict[str, Any] = {}
    if how == "torch":
        score = open_torch(options.preset, kind, options.threads)
    elif how == "convert":
        score = open_converted(options.preset, kind, options.threads, options.bundles / "fp32")
    else:
        score, about["graphs"] = open_bundle(options.bundles / kind, how, options)

    def run() -> None:
        if not np.isfinite(scores := score(images)).all():
            raise MDNetError(f"its scores are {scores}")

    return {"graphs": run}, about


def open_torch(preset_name: str, kind: str, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """The PyTorch model: eager, compiled, under bf16 autocast, or with the scan's portable loop."""
    import torch

    from mdnet.model.config import preset
    from mdnet.model.net import random_mdnet
    from mdnet.scan import op

    torch.set_num_threads(threads)
    model: Any = random_mdnet(preset(preset_name), seed=0).to(memory_format=torch.channels_last)
    if kind == "loop":
        op._runs_natively = lambda u: False
    elif kind == "compile":
        model = torch.compile(model)

    def score(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
            return model(torch.from_numpy(images)).float().numpy()

    return score


def open_converted(preset_name: str, arithmetic: str, threads: int, bundle: Path) -> Callable[[np.ndarray], np.ndarray]:
    """OpenVINO's own conversion of the PyTorch encoder, with the bundle's Vim and fusion behind it."""
    import openvino
    import torch

    from mdnet.model.config import preset
    from mdnet.model.net import random_mdnet
    from mdnet_engines.backends.choice import open_graphs
    from mdnet_engines.bundle.files import Bundle
    from mdnet_export.graphs.export import EncoderGraph

    config = preset(preset_name)
    encoder = EncoderGraph(random_mdnet(config, seed=0).diffusion).eval()
    image = torch.zeros(1, config.image_size, config.image_size, 3, dtype=torch.uint8)
    with torch.no_grad():
        converted = openvino.convert_model(encoder, example_input=image, input=[-1, *image.shape[1:]])
    settings = {
        "INFERENCE_PRECISION_HINT": arithmetic,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
    }
    compiled = openvino.Core().compile_model(converted, "CPU", settings)
    graphs = open_graphs(Bundle.open(bundle), backend="openvino", threads=threads)
    names = tuple(config.feature_shapes)

    def score(images: np.ndarray) -> np.ndarray:
        features = dict(zip(names, compiled([images]).to_tuple(), strict=True))
        return graphs["fusion"].run({**features, **graphs["vim"].run({"image": images})})["score"]

    return score


def open_bundle(
    bundle: Path, backend: Any, options: argparse.Namespace
) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, str]]:
    """A bundle, through the runtime, and what runs each of its graphs."""
    from mdnet_engines.bundle.files import Bundle
    from mdnet_rt import Scorer

    scorer = Scorer(
        Bundle.open(bundle),
        backend=backend,
        threads=options.threads,
        batch_size=options.batch_size,
        check=backend == "auto",
    )
    return scorer.score_batch, dict(scorer.choice.graphs)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--preset", choices=list(PRESETS), default="sd15-vim-s")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", action="append", help="contestants whose name holds this; may be repeated")
    parser.add_argument("--bundles", type=Path, help="folder that keeps the bundles (built when missing)")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.batch_size, options.rounds, options.threads) < 1:
        parser.error("--batch-size, --rounds and --threads must be 1 or more")
    known = [name for name in CONTESTANTS if name != BASELINE]
    options.chosen = [name for name in known if any(part in name for part in options.only or [""])]
    if not options.chosen:
        parser.error(f"no contestant's name holds {' or '.join(options.only)}; there are: {'; '.join(known)}")
    return options


if __name__ == "__main__":
    main()
