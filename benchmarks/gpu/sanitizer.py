"""The scan's kernels under compute-sanitizer: accesses out of bounds, races in shared memory.

Run as a program (`python -m gpu.sanitizer cuda FOLDER`) it is what runs there: a few launches, checked, every tensor in
memory of its own. It talks to the driver alone: with PyTorch the tools would look at PyTorch's start for longer than at
our kernels. In the dry run the program runs by itself, and its kernels under the compiler's address sanitizer.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gpu import driver
from gpu.context import CheckFailed, Context, NotInstalled, NotSupported
from gpu.results import Figure
from mdnet_engines.cuda import kernel as cuda_kernel
from mdnet_engines.ops.scan_shapes import INPUTS

TOOLS = ("memcheck", "racecheck")
_FOUND = 86  # exit code where it has something to report
_PARAMETERS = ("A", "D", "delta_bias", "h0")  # always float32
_SIZES = ((1, 33, 19, 16), (2, 3, 5, 64), (1, 1, 1, 1))

Launch = Callable[[dict[str, np.ndarray], str, bool, bool], np.ndarray]
"""Inputs, the type of what has steps, whether it is the reverse scan, and the kernel for small launches → y.

With h0 among the inputs it is version 2's kernel, and the result y and h_last, one after the other.
"""


def run(context: Context) -> None:
    """A row for each tool."""
    tools = TOOLS if context.device.is_cuda else ("address sanitizer",)
    context.series((tool, functools.partial(check, context, tool)) for tool in tools)


def check(context: Context, tool: str) -> dict[str, Figure]:
    """Run the program under one tool."""
    command = [sys.executable, "-m", "gpu.sanitizer", context.device.kind, str(context.scratch)]
    if context.device.is_cuda:
        found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        if found is None:
            raise NotInstalled("compute-sanitizer")
        command = [found, "--tool", tool, "--error-exitcode", str(_FOUND), *command]
    elif shutil.which("g++") is None:
        raise NotInstalled("g++, for the emulation")
    done = subprocess.run(command, capture_output=True, text=True)
    return {"note": read(tool, done.returncode, done.stdout + done.stderr)}


def read(tool: str, code: int, text: str) -> str:
    """What a tool's end says, where it is good.

    Raises:
        NotSupported: the tool does not work on this machine.
        CheckFailed: it found something, or the program failed.
    """
    lines = [line.strip("= ") for line in text.splitlines() if line.strip("= ")]
    if code and (refusal := next((line for line in lines if "not supported" in line.lower()), None)):
        raise NotSupported(f"compute-sanitizer: {refusal}")
    if code == _FOUND:
        raise CheckFailed(
            next((line for line in lines if "Error" in line or "hazard" in line), f"{tool} reports errors")
        )
    if code:
        raise CheckFailed(lines[-1] if lines else f"exit code {code}")
    return next((line for line in reversed(lines) if "SUMMARY" in line), lines[-1] if lines else "")


def arrays(sizes: tuple[int, int, int, int], seed: int) -> dict[str, np.ndarray]:
    """Inputs of the operator, float32."""
    batch, channels, length, states = sizes
    random = np.random.default_rng(seed)
    shapes = {
        **dict.fromkeys(("u", "delta", "z"), (batch, channels, length)),
        **dict.fromkeys(("B", "C"), (batch, states, length)),
        "A": (channels, states),
        **dict.fromkeys(("D", "delta_bias"), (channels,)),
    }
    made = {name: random.standard_normal(shapes[name], dtype=np.float32) for name in INPUTS}
    return {**made, "A": -np.exp(made["A"])}


def arrays_v2(sizes: tuple[int, int, int, int], seed: int) -> dict[str, np.ndarray]:
    """The same with h0, without z, and with two or three groups where they can share the channels evenly."""
    made = arrays(sizes, seed)
    batch, channels, _, states = sizes
    groups = next((groups for groups in (2, 3) if channels % groups == 0), 1)
    made |= {name: np.repeat(made[name][:, None], groups, 1) for name in ("B", "C")}
    del made["z"]
    return {**made, "h0": np.ones((batch, channels, states), np.float32)}


def main() -> None:
    """Launch every kernel on small inputs; exit 1 where an output is not finite."""
    launch, dtypes = _on_gpu() if sys.argv[1] == "cuda" else _emulated(Path(sys.argv[2]))
    launches = 0
    for dtype in dtypes:
        for sizes in _SIZES:
            kernels = (False, True) if cuda_kernel.has_small(sizes[3]) else (False,)
            for reverse, small in itertools.product((False, True), kernels):
                for make in (arrays,) if small else (arrays, arrays_v2):
                    if not np.isfinite(launch(make(sizes, launches), dtype, reverse, small)).all():
                        sys.exit(f"{dtype}, {sizes}: not finite")
                    launches += 1
    print(f"{launches} launches")


def _on_gpu() -> tuple[Launch, tuple[str, ...]]:
    driver.start()
    kernel = driver.ScanKernel()

    def launch(inputs: dict[str, np.ndarray], dtype: str, reverse: bool, small: bool) -> np.ndarray:
        types = {name: "float32" if name in _PARAMETERS else dtype for name in inputs}
        y = driver.Buffer(np.full_like(inputs["u"], np.nan), dtype)
        buffers = {name: driver.Buffer(values, types[name]) for name, values in inputs.items()}
        if "h0" not in inputs:
            kernel(buffers, y, reverse=reverse, small=small, stream=0)
            return y.read()
        h_last = driver.Buffer(np.full_like(inputs["h0"], np.nan), "float32")
        kernel(buffers, y, reverse=reverse, softplus=True, h_last=h_last, stream=0)
        return np.append(y.read(), h_last.read())

    return launch, ("float32", "float16", "bfloat16")


def _emulated(folder: Path) -> tuple[Launch, tuple[str, ...]]:
    import cuda_emulation

    if not (program := folder / "launch").exists():  # by an earlier stage
        program = cuda_emulation.build(cuda_kernel.source(), folder)

    def launch(inputs: dict[str, np.ndarray], _: str, reverse: bool, small: bool) -> np.ndarray:
        if "h0" not in inputs:
            return cuda_emulation.launch(program, folder, inputs, reverse=reverse, small=small)
        return np.append(*cuda_emulation.launch_v2(program, folder, inputs, reverse=reverse, state=True))

    return launch, ("float32",)


if __name__ == "__main__":
    main()
