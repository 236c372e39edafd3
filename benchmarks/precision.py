"""What a precision and a runtime bring on the CPU, for the whole model, image to score: python benchmarks/precision.py

The baseline is PyTorch eager in float32, channels_last, with the native scan, so that no ratio owes anything to a
Python loop. Each contestant takes turns with it, run by run, in a process of its own; times are medians, a ratio is the
median of the pairs' ratios, and peak memory is that process's. Weights are random: as much work as others, and scores
that mean nothing, so agreement is `mdnet-export verify`'s to show. Images are preprocessed and in memory.

"OpenVINO, its own conversion" is the same PyTorch encoder through `openvino.convert_model`, beside our Vim and fusion.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from mdnet.config import PRESETS

BASELINE = "PyTorch eager"
_EXPORT = "from mdnet_export.cli import main; main()"
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
}


def main() -> None:
    """Measure, print, and write the figures where `-o` says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--preset", choices=list(PRESETS), default="sd15-vim-s")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="contestants whose name holds this")
    parser.add_argument("--bundles", type=Path, help="folder that keeps the bundles (built when missing)")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options)
    if min(options.batch_size, options.rounds, options.threads) < 1:
        parser.error("--batch-size, --rounds and --threads must be 1 or more")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.bundles or Path(scratch)
        chosen = {name: way for name, way in CONTESTANTS.items() if name != BASELINE and options.only in name}
        build_bundles(folder, options.preset, {kind for way, kind in chosen.values() if way != "torch"})
        figures = {name: against_baseline(name, folder, options) for name in chosen}
    print(f"{options.preset}, batch {options.batch_size}, {options.threads} threads; × is the speed of {BASELINE}")
    for name, figure in figures.items():
        print(f"{figure['speedup']:6.2f}×  {figure['ms']:9.1f} ms  {figure['peak_gib']:5.2f} GiB  {name}")
    first = next(iter(figures.values()))
    print(f"  1.00×  {first['baseline_ms']:9.1f} ms  {first['baseline_peak_gib']:5.2f} GiB  {BASELINE}")
    if options.output:
        facts = {
            "command": f"python {' '.join(sys.argv)}",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {package: _version(package) for package in ("torch", "onnxruntime", "openvino")},
            "preset": options.preset,
            "batch_size": options.batch_size,
            "threads": options.threads,
        }
        options.output.write_text(json.dumps({**facts, "contestants": figures}, indent=1) + "\n")
    return None


def build_bundles(folder: Path, preset: str, wanted: set[str]) -> None:
    """Build what is missing, with random weights; ranges from a few faces, since they change no speed."""
    needed = {"fp32"} | (wanted & {"fp16", "int8"})
    for precision in sorted(needed):
        if (folder / precision / "manifest.json").is_file():
            continue
        command = [sys.executable, "-c", _EXPORT, "build", "--preset", preset, "--random-init", "--force"]
        command += ["--precision", precision, "--num-images", "2", "-o", str(folder / precision)]
        command += ["--num-calib", "8"] if precision != "fp32" else []
        subprocess.run(command, check=True, stdout=sys.stderr)


def against_baseline(name: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Time one contestant and the baseline in turns."""
    workers = [Worker(BASELINE, folder, options), Worker(name, folder, options)]
    try:
        pairs = [[worker.run() for worker in workers] for _ in range(options.rounds)]
        peaks = [worker.stop() for worker in workers]
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
    baseline, seconds = zip(*pairs, strict=True)
    return {
        "ms": statistics.median(seconds) * 1e3,
        "baseline_ms": statistics.median(baseline) * 1e3,
        "speedup": statistics.median(b / s for b, s in pairs),
        "peak_gib": peaks[1],
        "baseline_peak_gib": peaks[0],
    }


class Worker:
    """A contestant in a process of its own; one line in for a run, one line out with its seconds."""

    def __init__(self, name: str, folder: Path, options: argparse.Namespace):
        numbers = {"--batch-size": options.batch_size, "--threads": options.threads}
        arguments = [str(part) for pair in numbers.items() for part in pair]
        # Threads that spin while the other contestant runs would take its cores.
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(options.threads)}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name, "--preset", options.preset, "--bundles", folder, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.run()  # which warms up

    def run(self) -> float:
        """Seconds of one run."""
        return float(self._ask("run"))

    def stop(self) -> float:
        """End it; its peak memory, GiB."""
        return float(self._ask("stop"))

    def _ask(self, what: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        if not (answer := self.process.stdout.readline()):
            sys.exit("error: a contestant died; its message is above")
        return answer


def work(options: argparse.Namespace) -> None:
    """Run as a contestant: a line in, a line out."""
    size = PRESETS[options.preset].image_size
    images = np.random.default_rng(0).integers(0, 256, (options.batch_size, size, size, 3), dtype=np.uint8)
    how, kind = CONTESTANTS[options.worker]
    if how == "torch":
        score = open_torch(options.preset, kind, options.threads)
    elif how == "convert":
        score = open_converted(options.preset, kind, options.threads, options.bundles / "fp32")
    else:
        score = open_bundle(options.bundles / kind, how, options.threads)
    for line in sys.stdin:
        if line.strip() == "stop":
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, flush=True)
            return
        start = time.perf_counter()
        scores = score(images)
        seconds = time.perf_counter() - start
        if not np.isfinite(scores).all():
            sys.exit(f"error: {options.worker} gave {scores}")
        print(seconds, flush=True)


def open_torch(preset_name: str, kind: str, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """The PyTorch model: eager, compiled, under bf16 autocast, or with the scan's portable loop."""
    import torch

    from mdnet import scan
    from mdnet.config import preset
    from mdnet.model import random_mdnet

    torch.set_num_threads(threads)
    model: Any = random_mdnet(preset(preset_name), seed=0).to(memory_format=torch.channels_last)
    if kind == "loop":
        scan._runs_natively = lambda u: False
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

    from mdnet.config import preset
    from mdnet.model import random_mdnet
    from mdnet_engines.bundle import Bundle
    from mdnet_engines.choice import open_graphs
    from mdnet_export.graphs import EncoderGraph

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


def open_bundle(bundle: Path, backend: Any, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A bundle, through the runtime."""
    from mdnet_rt import Scorer

    return Scorer.open(bundle, backend=backend, threads=threads).score_batch


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
