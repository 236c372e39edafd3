"""The scan's kernels under compute-sanitizer: accesses out of bounds, races in shared memory.

Run as a program (`python -m gpu.sanitizer cuda FOLDER`) it is what runs there: a few launches, checked, every tensor in
memory of its own. In the dry run the program runs by itself, and its kernels under the compiler's address sanitizer.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu.context import CheckFailed, Context, NotInstalled, NotSupported
from gpu.results import Figure

TOOLS = ("memcheck", "racecheck")
_FOUND = 86  # exit code where it has something to report
_SIZES = ((1, 33, 19, 16), (2, 3, 5, 64), (1, 1, 1, 1))


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
        options = ["--tool", tool, "--error-exitcode", str(_FOUND)]
        # PyTorch tries calls that may fail, which is not what is looked for.
        options += ["--report-api-errors", "no"] if tool == "memcheck" else []
        command = [found, *options, *command]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or an access just outside is another tensor
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
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


def main() -> None:
    """Launch every kernel on small inputs; exit 1 where an output is not finite."""
    import torch

    from gpu.clock import Device
    from gpu.kernels import open_kernel, random_tensors

    kind: Any = sys.argv[1]
    device = Device(kind)
    kernel, what = open_kernel(device, Path(sys.argv[2]))
    launches = 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16) if device.is_cuda else (torch.float32,):
        for sizes in _SIZES:
            for reverse in (False, True):
                inputs = random_tensors(sizes, dtype, device, seed=launches)
                y = torch.full_like(inputs["u"], torch.nan)
                kernel(inputs, y, reverse=reverse)
                device.synchronize()
                if not torch.isfinite(y).all():
                    sys.exit(f"{dtype}, {sizes}: not finite")
                launches += 1
    print(f"{launches} launches on {what}")


if __name__ == "__main__":
    main()
