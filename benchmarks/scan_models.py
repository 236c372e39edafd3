"""Models that others wrote or described, 768 channels, 196 steps: their own slow path against the file with our scan.

    python benchmarks/scan_models.py [--threads N] [--rounds N]

Random weights, one image or sequence, eager PyTorch without a CUDA kernel against ONNX Runtime with the native library.
The two take turns; each ratio is the median of the rounds' ratios. A package that is missing is said to be.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

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


def language(kind: str, **changes: Any) -> tuple[Callable[[], nn.Module], Tensor, Any]:
    """Two layers of one of transformers' models."""
    sizes = {"hidden_size": WIDTH, "state_size": 16, **changes}
    tokens = torch.randint(1, 40, (1, LENGTH))
    return (
        lambda: foreign.Logits(foreign.language_model(kind, **sizes)),
        tokens,
        lambda _: foreign.ours_in_transformers(kind),
    )


def mambapy() -> nn.Module:
    """Two layers."""
    from mambapy.mamba import Mamba, MambaConfig

    return Mamba(MambaConfig(d_model=WIDTH, n_layers=2, d_state=16, pscan=False))


def models() -> dict[str, tuple[Callable[[], nn.Module], Tensor, Callable[[Any], AbstractContextManager[Any]]]]:
    """How to build each model, what it takes, and how our scan gets into it."""
    given = foreign.FOREIGN
    tokens = torch.randn(1, LENGTH, WIDTH)
    return {
        "transformers' Mamba": language("mamba"),
        "transformers' FalconMamba": language("falcon_mamba"),
        "transformers' Jamba": language("jamba", **JAMBA),
        "transformers' Mamba2": language("mamba2", **MAMBA_2),
        "mambapy": (mambapy, tokens, given["mambapy"].ours),
        "VMamba's cross scan": (
            lambda: foreign.SS2D(dim=192, rank=12),
            torch.randn(1, 14, 14, 192),
            given["VMamba's cross scan"].ours,
        ),
        "MambaVision's mixer": (
            lambda: foreign.VisionMixer(dim=2 * 768, states=16, rank=48),
            torch.randn(1, LENGTH, 2 * 768),
            given["MambaVision's mixer"].ours,
        ),
        "Vim's mixer": (lambda: foreign.VimMixer(dim=WIDTH, rank=24), tokens, given["Vim's mixer"].ours),
    }


def compare(name: str, build: Callable[[], nn.Module], example: Tensor, ours: Any, threads: int, rounds: int) -> str:
    """One line of the table."""
    torch.manual_seed(0)
    try:
        model = build().eval()
    except ImportError as error:
        return f"{name:28} not installed ({error.name})"
    (parameter,) = inspect.signature(model.forward).parameters
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(native.custom_op_library()))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        with ours(model):
            done = export(model, (example,), Path(folder, "model.onnx"), dynamic={parameter: {0: "batch"}}, check=False)
        session = onnxruntime.InferenceSession(done.path, options, providers=["CPUExecutionProvider"])
        feeds = {parameter: example.numpy()}
        pairs = [(seconds(lambda: model(example)), seconds(lambda: session.run(None, feeds))) for _ in range(rounds)]
    own, file = (statistics.median(pair[side] for pair in pairs[1:]) * 1e3 for side in (0, 1))
    ratio = statistics.median(theirs / here for theirs, here in pairs[1:])
    return f"{name:28}{own:12.1f}{file:12.2f}{ratio:9.1f}×"


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
    print(f"{'model':28}{'own, ms':>12}{'file, ms':>12}{'ratio':>10}")
    for name, (build, example, ours) in models().items():
        print(compare(name, build, example, ours, options.threads, options.rounds + 1), flush=True)


if __name__ == "__main__":
    main()
