"""Launches of the scan's PTX as its two callers make them, and their result by `ptx_on_cpu`.

by_tensorrt(cases, folder)   # what the TensorRT plugin hands out, asked through NVIDIA's own plugin classes
by_library(cases, folder)    # what the native library gives the CUDA driver, for ONNX Runtime
y = run(launch, inputs)
y, h_last = run_with_state(launch, inputs)

Both ask in a process of their own, once for all cases.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cuda_stub
import numpy as np
import ptx_on_cpu
import tensorrt_stubs
from cuda_stub.probe import TENSORS
from scan_cases import ScanCase, VariantCase

from mdnet_engines.ops import selective_scan as scan_op
from mdnet_engines.ops.scan_shapes import VARIANTS, Variant

_SIZES = ("channels", "length", "states", "groups")
_PROBE = Path(__file__).with_name("tensorrt_stubs") / "probe.py"


@dataclass(frozen=True)
class Launch:
    """`arguments` are the kernel's, in order: names of tensors, and numbers, of which 0 may be a null pointer."""

    ptx: str
    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    arguments: tuple[str | int, ...]


def by_tensorrt(cases: Sequence[ScanCase], folder: Path) -> list[list[Launch]]:
    """The plugin's launches of each case, one for each tactic, with its symbolic grid worked out for the case's batch.

    TensorRT passes the inputs, then the plugin's scalars, then the output.
    """
    environment = cuda_stub.environment(folder, tensorrt_stubs.environment(folder))
    nodes = [
        {
            "name": _operator(case),
            "dtype": case.dtype,
            "sizes": {"batch": -1, **{name: getattr(case, name, 0) for name in _SIZES}},
            "batches": [case.batch],
        }
        for case in cases
    ]
    answers = _answer([str(_PROBE), "aot_of_each", json.dumps({"nodes": nodes})], environment)
    return [
        [_of_tactic(tactic, case) for tactic in answer.values()] for case, answer in zip(cases, answers, strict=True)
    ]


def _operator(case: ScanCase) -> str:
    if isinstance(case, VariantCase):
        return Variant(case.reverse, "z" not in case.without, case.softplus, case.state).name
    return scan_op.REVERSE if case.reverse else scan_op.FORWARD


def _of_tactic(answer: dict[str, Any], case: ScanCase) -> Launch:
    batch, variant = str(case.batch), VARIANTS.get(_operator(case))
    inputs, outputs = (variant.inputs, variant.outputs) if variant else (scan_op.INPUTS, ("y",))
    assert answer["shared"][batch] == [0]
    arguments = (*inputs, *answer["scalars"][batch], *outputs)
    return Launch(
        answer["ptx"], answer["kernel"], tuple(answer["grid"][batch]), tuple(answer["block"][batch]), arguments
    )


def by_library(cases: Sequence[ScanCase], folder: Path) -> list[Launch]:
    """What the native library gives to cuLaunchKernel, with the module that it loaded."""
    sizes = ("batch", "channels", "length", "states", "dtype", "reverse")
    added = ("groups", "without", "softplus", "state")  # of VariantCase alone
    calls = [
        {"stream": 0, **{name: getattr(case, name) for name in (*sizes, *added) if hasattr(case, name)}}
        for case in cases
    ]
    answer = _answer(["-m", "cuda_stub.probe", json.dumps(calls)], cuda_stub.environment(folder))
    assert not any(answer["said"])
    tensors = {4096 * (i + 1): name for i, name in enumerate(TENSORS)}  # where the probe has them
    made = [call for call in answer["calls"] if "kernel" in call]
    return [
        Launch(
            answer["image"],
            call["kernel"],
            tuple(call["grid"]),
            tuple(call["block"]),
            tuple(tensors.get(value, value) for value in call["values"]),
        )
        for call in made
    ]


def run(launch: Launch, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Execute the PTX; gives y in the type of u.

    Raises:
        PtxError: an access is wrong; see `ptx_on_cpu`.
    """
    return run_with_state(launch, inputs)[0]


def run_with_state(launch: Launch, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """The same, with the last state [batch, channels, states] of a launch that writes it."""
    u, memory = inputs["u"], ptx_on_cpu.Global()
    states = (*u.shape[:2], inputs["A"].shape[1])
    address = {name: memory.input(name, values) for name, values in inputs.items()}
    address["y"] = memory.output("y", u.nbytes)
    if "h_last" in launch.arguments:
        address["h_last"] = memory.output("h_last", 4 * int(np.prod(states)))
    arguments = [address[value] if isinstance(value, str) else value for value in launch.arguments]
    ptx_on_cpu.launch(launch.ptx, launch.kernel, launch.grid, launch.block, arguments, memory)
    y = memory.result("y").view(u.dtype).reshape(u.shape)
    return y, memory.result("h_last").view(np.float32).reshape(states) if "h_last" in address else None


def _answer(command: list[str], environment: dict[str, str]) -> Any:
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
