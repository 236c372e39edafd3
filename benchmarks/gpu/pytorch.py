"""The PyTorch model on the device: eager in fp32 and fp16, and `torch.compile` in fp16."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpu.clock import peak_torch_memory, quiet_fp32
from gpu.context import CheckFailed, Context
from gpu.kernels import open_kernel
from gpu.model import (
    Reference,
    Score,
    check_scores,
    load_model,
    reference,
    run_in_torch,
    singles,
    speed,
)
from gpu.results import Figure
from mdnet.scan import mamba_ssm as scan_mamba
from mdnet_engines.ops.scan_shapes import INPUTS
from mdnet_engines.parity.gates import LIMITS

_STEPS = ("u", "delta", "B", "C", "z")


def eager(context: Context) -> None:
    """A row for the GPU against the CPU, then one for each precision and batch."""
    against, precisions = "fp32, device against CPU", ("fp32", "fp16")
    context.expect(against, *(name for each in precisions for name in _names(each, context.sizes.batches)))
    held = reference(context)
    context.attempt(against, functools.partial(_against_cpu, context, held))
    use_kernel(context)
    for precision in precisions:
        model = prepare(context, precision)
        _rows(context, model, held, precision, context.sizes.batches)
        del model


def compiled(context: Context) -> None:
    """`torch.compile` with fixed shapes, fp16: a compilation for each batch, so the first tells what the next takes."""
    batches = context.sizes.compiled_batches
    context.expect(*_names("fp16", batches))
    held = reference(context)
    use_kernel(context)
    model = prepare(context, "fp16")
    # Single images in eager: another shape would be another compilation.
    known = functools.cache(functools.partial(singles, _score(context, model), held))

    def row(batch: int) -> dict[str, Figure]:
        torch.compiler.reset()
        fast = torch.compile(model, dynamic=False, backend=context.sizes.compiler)
        return _row(context, fast, held, "fp16", batch, known)

    context.series(zip(_names("fp16", batches), (functools.partial(row, n) for n in batches), strict=True))


def use_kernel(context: Context) -> None:
    """Let the model's scan run `selective_scan.cu`, so that no figure owes anything to a loop in Python.

    On CUDA `mdnet.scan` looks for mamba-ssm's kernel; ours takes its place. On the CPU our native one runs anyway.
    """
    if not context.device.is_cuda:
        return
    kernel, _ = open_kernel(context.device, context.scratch)

    def scan(*tensors: Tensor, reverse: bool) -> Tensor:
        inputs = _as_taken(dict(zip(INPUTS, tensors, strict=True)))
        y = torch.empty_like(inputs["u"])
        kernel(inputs, y, reverse=reverse)
        return y.to(tensors[0].dtype)

    replaced: Any = scan_mamba
    replaced.available, replaced.scan = (lambda u, _A: u.is_cuda), scan


def prepare(context: Context, precision: str) -> nn.Module:
    """The model in one precision, channels last; in fp16 the head stays in float32, as in a bundle."""
    quiet_fp32()
    torch.backends.cudnn.benchmark = True
    model: Any = load_model(context).to(memory_format=torch.channels_last)
    if precision == "fp16":
        model.half()
        model.fusion.head.float().register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))
    return model


def _as_taken(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One type for what has steps, float32 for the parameters, all contiguous: what the kernel takes."""
    kinds = {inputs[name].dtype for name in _STEPS}
    kind = kinds.pop() if len(kinds) == 1 else torch.float32
    return {name: x.to(kind if name in _STEPS else torch.float32).contiguous() for name, x in inputs.items()}


def _against_cpu(context: Context, held: Reference) -> dict[str, Figure]:
    """The reference itself, which was computed on the device, against the CPU: two images."""
    from gpu.clock import Device

    pixels = held.images.pixels[:2]
    model = load_model(context).cpu()
    expected = run_in_torch(model, pixels, Device("cpu"))["score"]
    figures: dict[str, Figure] = {"max |Δscore|": float(np.abs(held.outputs["score"][:2] - expected).max())}
    if not float(figures["max |Δscore|"]) <= LIMITS["fp32"].score_max_abs:
        raise CheckFailed(f"allowed is {LIMITS['fp32'].score_max_abs:g}", figures)
    return figures


def _rows(context: Context, model: nn.Module, held: Reference, precision: str, batches: tuple[int, ...]) -> None:
    known = functools.cache(functools.partial(singles, _score(context, model), held))
    row = functools.partial(_row, context, model, held, precision)
    works = (functools.partial(row, n, known) for n in batches)
    context.series(zip(_names(precision, batches), works, strict=True))


def _names(precision: str, batches: tuple[int, ...]) -> list[str]:
    return [f"{precision}, batch {n}" for n in batches]


def _row(
    context: Context,
    model: Callable[[Tensor], Tensor],
    held: Reference,
    precision: str,
    batch: int,
    known: Callable[[], np.ndarray],
) -> dict[str, Figure]:
    """Check a batch's scores, then take its time with the images on the device."""
    device = context.device
    images = torch.from_numpy(held.batch(batch)[0]).to(device.kind)

    def run() -> Tensor:
        with torch.inference_mode():
            return model(images)

    run()  # compiles, where it is to be compiled
    memory = peak_torch_memory(device, run)
    seconds = device.measure(run, seconds=context.sizes.seconds)
    figures: dict[str, Figure] = {**speed(context, seconds, batch, precision), "peak GiB": memory}
    try:
        figures |= check_scores(_score(context, model), held, batch, precision, known())
    except CheckFailed as error:
        raise CheckFailed(str(error), {**figures, **error.figures}) from None
    return figures


def _score(context: Context, model: Callable[[Tensor], Tensor]) -> Score:
    def score(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(images).to(context.device.kind)).float().cpu().numpy()

    return score
