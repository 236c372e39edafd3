"""How long a scan takes: against its floor, the loop in PyTorch, and mamba-ssm's kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from gpu.context import Context, NotInstalled
from gpu.device_facts import ceilings
from gpu.kernels import Kernel, open_kernel, random_tensors
from gpu.results import Figure
from mdnet.scan import loop as scan_loop
from mdnet.scan import mamba_ssm as scan_mamba
from mdnet_engines.cuda import kernel as cuda_kernel
from mdnet_engines.ops.scan_shapes import INPUTS

DTYPES = (torch.float32, torch.float16)
OURS = "selective_scan.cu"
LARGE = f"{OURS} as for large launches"
TIMES_FLOOR = "× its floor"


def run(context: Context) -> None:
    """Rows for each size and type: ours, the loop, mamba-ssm. The level-2 cache is overwritten before each run."""
    others = (("PyTorch loop", scan_loop.scan), ("mamba-ssm", scan_mamba.scan))
    kinds = [(sizes, dtype, _what(sizes, dtype)) for sizes in context.sizes.scans for dtype in DTYPES]
    context.expect(*(f"{name}, {what}" for _, _, what in kinds for name in (OURS, *(name for name, _ in others))))
    kernel, _ = open_kernel(context.device, context.scratch)
    for sizes, dtype, what in kinds:
        inputs = random_tensors(sizes, dtype, context.device, seed=0)
        y = torch.empty_like(inputs["u"])
        ordered = [inputs[name] for name in INPUTS]
        own = context.attempt(f"{OURS}, {what}", functools.partial(_ours, context, sizes, kernel, inputs, y))
        if _is_small(sizes):  # what the kernel for small launches gains
            large = functools.partial(kernel, small=False)
            context.attempt(f"{LARGE}, {what}", functools.partial(_ours, context, sizes, large, inputs, y))
        for name, scan in others:
            context.attempt(f"{name}, {what}", functools.partial(_other, context, name, scan, ordered, own))


def _what(sizes: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}, batch {sizes[0]}"


def _is_small(sizes: tuple[int, int, int, int]) -> bool:
    batch, channels, _, states = sizes
    return cuda_kernel.is_small(batch, channels, states)


def floor(context: Context, inputs: dict[str, Tensor], y: Tensor) -> dict[str, float]:
    """The least seconds for a scan, as the device stage measured: `bytes` moved once, and `exponentials`."""
    rates = ceilings(context)
    moved = sum(tensor.nbytes for tensor in (*inputs.values(), y))
    work = {"bytes": moved, "exponentials": inputs["u"].numel() * inputs["A"].shape[1]}
    return {name: amount / rates[name] for name, amount in work.items() if name in rates}


def _ours(
    context: Context, sizes: tuple[int, ...], kernel: Kernel, inputs: dict[str, Tensor], y: Tensor
) -> dict[str, Figure]:
    seconds = context.device.measure(
        lambda: kernel(inputs, y, reverse=False), seconds=context.sizes.seconds / 4, flush=True
    )
    figures: dict[str, Figure] = {"µs": seconds * 1e6}
    least = floor(context, inputs, y)
    figures |= {f"floor by {name}, µs": value * 1e6 for name, value in least.items()}
    if len(least) == 2:
        figures[TIMES_FLOOR] = seconds / max(least.values())
    return {**figures, "note": "batch, channels, steps, states: " + ", ".join(map(str, sizes))}


def _other(
    context: Context, name: str, scan: Callable[..., object], inputs: list[Tensor], own: dict[str, Figure] | None
) -> dict[str, Figure]:
    if name == "mamba-ssm" and not scan_mamba.available(inputs[0], inputs[2]):
        raise NotInstalled(scan_mamba.problem(inputs[0].device) if inputs[0].is_cuda else f"{name}, which needs CUDA")
    seconds = context.device.measure(
        lambda: scan(*inputs, reverse=False), seconds=context.sizes.seconds / 4, flush=True
    )
    figures: dict[str, Figure] = {"µs": seconds * 1e6}
    if own:
        figures["× the time of ours"] = seconds * 1e6 / float(own["µs"])
    return figures
