"""Run the CUDA kernels of SelectiveScan on a CPU, thread by thread: `cuda_on_cpu/` says how.

program = build(cuda_kernel.source(), folder)       # several seconds: once, not for every test
y = launch(program, folder, inputs, reverse=False)
y, h_last = launch_v2(program, folder, inputs, reverse=False, state=True)
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mdnet_engines.cuda import kernel as cuda_kernel
from mdnet_engines.ops.scan_shapes import INPUTS_V2

COMPILER = "g++"
_SHIM = Path(__file__).with_name("cuda_on_cpu")
_SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
_FLAGS = ("-std=c++17", "-O1", "-g", "-ffp-contract=off", *_SANITIZERS)


class KernelError(Exception):
    """What a GPU may do silently: an access out of bounds, threads that part ways, an output written twice or never."""


def build(source: str, folder: Path) -> Path:
    """Compile CUDA C++ for the CPU, with the address and undefined-behaviour sanitizers; gives the program.

    Raises:
        ValueError: the compiler refuses it.
    """
    kernel, program = folder / "kernel.cu", folder / "launch"
    kernel.write_text(source, encoding="utf-8")
    inputs = ("-include", _SHIM / "cuda_on_cpu.h", "-I", _SHIM, "-x", "c++", kernel, _SHIM / "launch.cpp")
    done = subprocess.run(
        [COMPILER, *_FLAGS, *map(str, inputs), "-rdynamic", "-ldl", "-o", str(program)], capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"{COMPILER} refuses the kernel:\n{done.stderr}")
    return program


def launch(
    program: Path,
    folder: Path,
    inputs: Mapping[str, np.ndarray],
    *,
    reverse: bool,
    small: bool | None = None,
    kernel: str = "",
) -> np.ndarray:
    """Run one launch on the operator's inputs; gives y [batch, channels, length] in the type of u.

    Args:
        program: what `build` gave.
        folder: where the tensors are handed over.
        inputs: by name; u, delta, B, C and z of one type, A, D and delta_bias float32.
        reverse: which direction's kernel `mdnet_engines.cuda.kernel` is asked for.
        small: whether that is the one for small launches; by default the sizes decide.
        kernel: the entry point instead, by name.

    Raises:
        KernelError: see there; or the kernel did not end in a minute.
    """
    u, states = inputs["u"], inputs["A"].shape[1]
    if small is None:
        small = cuda_kernel.is_small(*u.shape[:2], states)
    name = kernel or cuda_kernel.kernel_name(reverse=reverse, dtype=u.dtype.name, states=states, small=small)
    _run(program, folder, inputs, name)
    return _result(folder, "y", u.dtype, u.shape)


def launch_v2(
    program: Path,
    folder: Path,
    inputs: Mapping[str, np.ndarray],
    *,
    reverse: bool,
    softplus: bool = True,
    state: bool = False,
) -> tuple[np.ndarray, np.ndarray | None]:
    """The same with version 2's kernel: gives y, and h_last [batch, channels, states] where `state` asks for it.

    D, z, delta_bias and h0 may be missing, B and C may have an axis of groups.
    """
    u, B, states = inputs["u"], inputs["B"], inputs["A"].shape[1]
    name = cuda_kernel.kernel_name(reverse=reverse, dtype=u.dtype.name, states=states, version=2)
    _run(program, folder, inputs, name, B.shape[1] if B.ndim == 4 else 1, int(softplus), int(state))
    y = _result(folder, "y", u.dtype, u.shape)
    return y, _result(folder, "h_last", np.dtype(np.float32), (*u.shape[:2], states)) if state else None


def _run(program: Path, folder: Path, inputs: Mapping[str, np.ndarray], name: str, *more: int) -> None:
    for tensor in INPUTS_V2:
        (folder / tensor).unlink(missing_ok=True)
    for tensor, values in inputs.items():
        (folder / tensor).write_bytes(np.ascontiguousarray(values).tobytes())
    u, states = inputs["u"], inputs["A"].shape[1]
    sizes = (*u.shape, states, u.itemsize, cuda_kernel.THREADS, cuda_kernel.channels_per_block(name), *more)
    try:
        done = subprocess.run(
            [str(program), name, str(folder), *map(str, sizes)],
            capture_output=True,
            text=True,
            timeout=60,
            env={"ASAN_OPTIONS": "detect_leaks=0"},  # nothing is freed before the exit
        )
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"{name} does not end") from error
    if done.returncode:
        raise KernelError(f"{name}: {_reason(done.stderr)}")


def _result(folder: Path, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer((folder / name).read_bytes(), dtype).reshape(shape)


def build_or_skip(source: str, folder: Path) -> Path:
    """`build`, or a skipped test where this machine lacks what it takes."""
    import pytest  # here alone: benchmarks use the rest

    if sys.platform != "linux" or shutil.which(COMPILER) is None:
        pytest.skip(f"the emulation needs Linux and {COMPILER}")
    try:
        return build(source, folder)
    except ValueError as error:
        if re.search("cannot find .*san", str(error)):
            pytest.skip(f"the emulation needs {COMPILER}'s libasan and libubsan")
        raise


def _reason(stderr: str) -> str:
    """The sanitizer's line that says what happened, or else the launcher's."""
    lines = stderr.splitlines() or ["no reason given"]
    return next((line for line in lines if "ERROR: " in line or "runtime error: " in line), lines[-1]).strip()
