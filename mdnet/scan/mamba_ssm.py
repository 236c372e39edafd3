"""The selective scan on mamba-ssm's CUDA kernel, forward and backward, where that package is installed.

A custom operator's own code runs where PyTorch records no gradients, so the two halves of the package's autograd
function are called by themselves: the extension below them has changed its entries between releases, these have not.
The kernel knows one direction: a reverse scan is a scan of the flipped sequence. Unverified on a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

from mdnet.scan import loop as scan_loop
from mdnet.scan.loop import Gradients
from mdnet_engines.errors import first_line

MAX_STATES = 256
"""What the kernel is compiled for; with more, `mdnet.scan.loop` runs."""
_STEPS = (0, 1, 3, 4, 6)  # u, delta, B, C, z: those with the sequence as last axis


def available(u: Tensor, A: Tensor) -> bool:
    """Whether the kernel runs on the device of `u`, and takes a scan of `u` with the states of `A`."""
    types = (torch.float32, torch.float16, torch.bfloat16)
    return u.is_cuda and u.dtype in types and A.shape[1] <= MAX_STATES and not problem(u.device)


@functools.cache
def problem(device: torch.device) -> str:
    """Why the kernel does not run on `device`; empty if a scan of two steps, tried once, is right.

    An import proves nothing: since its #977 the package imports without its CUDA extension too, and an extension may
    have no code for this GPU.
    """
    if importlib.util.find_spec("mamba_ssm") is None:
        return "mamba-ssm is not installed"
    shapes = ((1, 2, 2), (1, 2, 2), (2, 1), (1, 1, 2), (1, 1, 2), (2,), (1, 2, 2), (2,))
    inputs = [torch.full(shape, 0.5, device=device) for shape in shapes]
    try:
        expected, _ = scan_loop.scan(*inputs, reverse=False)
        if torch.allclose(scan(*inputs, reverse=False), expected, rtol=1e-3):
            return ""
        why = "its result is wrong"
    except Exception as error:  # whatever another project's import or kernel raises
        why = first_line(error)
    warnings.warn(f"mamba-ssm is installed, but its selective scan does not run: {why}", stacklevel=2)
    return f"mamba-ssm's selective scan does not run: {why}"


def scan(*inputs: Tensor, reverse: bool) -> Tensor:
    """y (batch, channels, length), in the type of `u`; takes what `mdnet.scan.selective_scan` takes."""
    y = _forward(_Context(), inputs, reverse)
    return (y.flip(-1) if reverse else y).to(inputs[0].dtype).contiguous()


def scan_backward(grad: Tensor, *inputs: Tensor, reverse: bool) -> Gradients:
    """Gradients of the eight tensors, from `grad` of y. The forward pass runs again: the operator keeps its inputs."""
    context = _Context()
    y = _forward(context, inputs, reverse)
    grad = grad.to(y.dtype)
    grads = _kernel().backward(context, grad.flip(-1) if reverse else grad)
    return tuple(
        (value.flip(-1) if reverse and place in _STEPS else value).to(like.dtype).contiguous()
        for place, (value, like) in enumerate(zip(grads[: len(inputs)], inputs, strict=True))
    )


class _Context:
    """What an autograd function keeps between its halves."""

    saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


def _forward(context: _Context, inputs: tuple[Tensor, ...], reverse: bool) -> Tensor:
    # One type for what has steps, the wider where they differ; float32 for the parameters.
    kinds = {inputs[place].dtype for place in _STEPS}
    kind = kinds.pop() if len(kinds) == 1 else torch.float32
    taken = [tensor.to(kind if place in _STEPS else torch.float32) for place, tensor in enumerate(inputs)]
    taken = [tensor.flip(-1) if reverse and place in _STEPS else tensor for place, tensor in enumerate(taken)]
    delta_softplus = True
    return _kernel().forward(context, *(tensor.contiguous() for tensor in taken), delta_softplus)


@functools.cache
def _kernel() -> Any:
    from mamba_ssm.ops.selective_scan_interface import SelectiveScanFn

    return SelectiveScanFn
