"""Models that others wrote or described, 768 channels, 196 steps: their own slow path against the file with our scan.

    python benchmarks/scan_models.py [--threads N] [--rounds N]

Random weights, one image or sequence, eager PyTorch without a CUDA kernel against ONNX Runtime with the native library:
the scans alone, then the whole model, whose products both sides have. The two take turns; each ratio is the median of
the rounds' ratios. A package that is missing is said to be.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import onnxruntime
import torch
from torch import Tensor, nn

from mdnet_engines.ops import native
from mdnet_export.scan import export

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))
import foreign_models as foreign

LENGTH, WIDTH = 196, 384  # a block of Mamba doubles its width
MAMBA_2 = {"num_heads": 12, "head_dim": 64, "n_groups": 1, "chunk_size": 64, "state_size": 64}
JAMBA = {"mamba_d_state": 16, "mamba_dt_rank": 24, "intermediate_size": 768, "num_attention_heads": 6}


@dataclass(frozen=True)
class Model:
    """How to build it, what it takes, how our scan gets into it, and where its own scan is: an object and a name."""

    build: Callable[[], nn.Module]
    example: Tensor
    ours: Callable[[Any], AbstractContextManager[Any]]
    own: Callable[[Any], tuple[Any, str]]


def language(kind: str, **changes: Any) -> Model:
    """Two layers of one of transformers' models."""
    sizes = {"hidden_size": WIDTH, "state_size": 16, **changes}
    module, scan = f"transformers.models.{kind}.modeling_{kind}", "mamba_selective_scan"
    return Model(
        lambda: foreign.Logits(foreign.language_model(kind, **sizes)),
        torch.randint(1, 40, (1, LENGTH)),
        lambda _: foreign.ours_in_transformers(kind),
        lambda _: (importlib.import_module(module), "mamba2_chunk_scan" if kind == "mamba2" else scan),
    )


def block(name: str, build: Callable[[], nn.Module], *shape: int) -> Model:
    return Model(build, torch.randn(1, *shape), foreign.FOREIGN[name].ours, lambda model: (model, "scan"))


def mambapy() -> nn.Module:
    """Two layers."""
    from mambapy.mamba import Mamba, MambaConfig

    return Mamba(MambaConfig(d_model=WIDTH, n_layers=2, d_state=16, pscan=False))


def models() -> dict[str, Model]:
    """All of them, by name."""
    cross, vision, vim = "VMamba's cross scan", "MambaVision's mixer", "Vim's mixer"
    tokens, patch = torch.randn(1, LENGTH, WIDTH), foreign.FOREIGN["mambapy"].ours
    return {
        "transformers' Mamba": language("mamba"),
        "transformers' FalconMamba": language("falcon_mamba"),
        "transformers' Jamba": language("jamba", **JAMBA),
        "transformers' Mamba2": language("mamba2", **MAMBA_2),
        "mambapy": Model(mambapy, tokens, patch, lambda model: (type(model.layers[0].mixer), "selective_scan_seq")),
        cross: block(cross, lambda: foreign.SS2D(dim=192, rank=12), 14, 14, 192),
        vision: block(vision, lambda: foreign.VisionMixer(dim=2 * 768, states=16, rank=48), LENGTH, 2 * 768),
        vim: block(vim, lambda: foreign.VimMixer(dim=WIDTH, rank=24), LENGTH, WIDTH),
    }


def compare(name: str, given: Model, threads: int, rounds: int) -> str:
    """One line of the table."""
    torch.manual_seed(0)
    try:
        model = given.build().eval()
    except ImportError as error:
        return f"{name:28} not installed ({error.name})"
    (parameter,) = inspect.signature(model.forward).parameters
    feeds, pairs = {parameter: given.example.numpy()}, []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = Path(folder, "model.onnx")
        with given.ours(model):
            export(model, (given.example,), file, dynamic={parameter: {0: "batch"}}, check=False)
        plain, profiled = (open_session(file, threads, profiled) for profiled in (False, True))
        clock = Clock()
        place, attribute = given.own(model)
        with mock.patch.object(place, attribute, clock.around(getattr(place, attribute))):
            for _ in range(rounds):
                clock.seconds = 0.0
                whole = seconds(lambda: model(given.example))
                pairs.append((clock.seconds, whole, seconds(lambda: plain.run(None, feeds))))
                profiled.run(None, feeds)
        scans = scan_seconds(Path(profiled.end_profiling()), rounds)
    rows = [(scan, in_file, whole, file) for (scan, whole, file), in_file in zip(pairs, scans, strict=True)][1:]
    columns = [statistics.median(row[i] for row in rows) * 1e3 for i in range(4)]
    ratios = [statistics.median(row[i] / row[i + 1] for row in rows) for i in (0, 2)]
    scan, in_file, whole, run = columns
    return f"{name:28}{scan:9.2f}{in_file:9.2f}{ratios[0]:8.1f}×{whole:9.1f}{run:9.2f}{ratios[1]:8.1f}×"


def open_session(file: Path, threads: int, profiled: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_profiling = profiled
    options.profile_file_prefix = str(file.with_suffix(""))
    options.register_custom_ops_library(str(native.custom_op_library()))
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def scan_seconds(profile: Path, rounds: int) -> list[float]:
    """Of each run, the time of all its scan nodes together."""
    nodes = [event for event in json.loads(profile.read_text()) if event.get("cat") == "Node"]
    times = [event["dur"] for event in nodes if event["args"].get("op_name", "").startswith("SelectiveScan")]
    each = len(times) // rounds
    return [sum(times[i : i + each]) / 1e6 for i in range(0, len(times), each)]


class Clock:
    """Adds up the time that a function takes."""

    seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **named)
            self.seconds += time.perf_counter() - start
            return result

        return timed


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7, help="after one that warms up")
    options = parser.parse_args()
    if native.custom_op_library() is None:
        sys.exit(f"error: {native.MISSING}")
    torch.set_num_threads(options.threads)
    print(f"{'milliseconds':28}{'scans: own, file, ratio':>27}{'whole: own, file, ratio':>27}")
    for name, model in models().items():
        print(compare(name, model, options.threads, options.rounds + 1), flush=True)


if __name__ == "__main__":
    main()
