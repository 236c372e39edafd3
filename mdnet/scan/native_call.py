"""The selective scan by the native library, on PyTorch's own threads; takes what `mdnet.scan.loop` takes."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from mdnet.scan.loop import Gradients, state_dtype
from mdnet_engines.ops import native
from mdnet_engines.ops.scan_shapes import INPUTS_V2

_TYPES: dict[torch.dtype, int] = {getattr(torch, name): code for name, code in native.TYPES.items()}
_STEPS = ("u", "delta", "z", "B", "C")  # what has the sequence as its last axis


def available(u: Tensor) -> bool:
    """Whether the library is installed and takes a scan of `u`."""
    return u.device.type == "cpu" and u.dtype in _TYPES and native.library() is not None


def scan(
    *inputs: Tensor | None, reverse: bool, softplus: bool = True, last_state: bool = True
) -> tuple[Tensor, Tensor]:
    """y (batch, channels, length), in the type of `u`, and the last state (batch, channels, states).

    Args:
        inputs: u, delta, A, B, C, D, z, delta_bias, h0, of which those from D on may be None.
        last_state: if False, an empty tensor takes the last state's place.
    """
    given = _given(inputs)
    u, kind = given["u"], state_dtype(given["u"])
    same = all(given[name].dtype == u.dtype for name in _STEPS if name in given)
    call = _Call(given, u.dtype if same else kind, reverse, softplus)
    y = torch.empty(u.shape, dtype=call.io)
    h_last = torch.empty(call.state_shape if last_state else (0,), dtype=kind)
    call.scan.y, call.scan.h_last = y.data_ptr(), h_last.data_ptr() if last_state else None
    call.run()
    return y.to(u.dtype), h_last


def scan_backward(
    grad: Tensor, *inputs: Tensor | None, reverse: bool, softplus: bool = True, grad_last: Tensor | None = None
) -> Gradients:
    """Gradients of the tensors, from those of y and the last state. States are recomputed, not kept from before."""
    given = _given(inputs)
    kind = state_dtype(given["u"])
    call = _Call(given, kind, reverse, softplus)
    grad = _rows(grad, kind)
    (batch, channels, length), states, groups = given["u"].shape, call.state_shape[2], call.scan.groups
    # What many channels or images share comes in parts, which are summed here: the same way whatever the threads do.
    splits = call.library.mdnet_scan_splits(channels // groups)
    shapes = {
        **dict.fromkeys(("u", "delta", "z"), (batch, channels, length)),
        "A": (batch, channels, states),
        **dict.fromkeys(("B", "C"), (splits, batch, groups, length, states)),
        **dict.fromkeys(("D", "delta_bias"), (batch, channels)),
        "h0": call.state_shape,
    }
    parts = {name: torch.empty(shapes[name], dtype=kind) for name in given}
    after = None if grad_last is None else grad_last.to(kind).contiguous()
    pointers = {name: part.data_ptr() for name, part in parts.items()}
    call.run(native.Gradients(_view(grad), h_last=None if after is None else after.data_ptr(), **pointers))
    for name in ("A", "B", "C", "D", "delta_bias"):
        if name in parts:
            parts[name] = parts[name].sum(0)
    for name in ("B", "C"):
        parts[name] = parts[name].mT.reshape(given[name].shape)
    return tuple(
        parts[name].to(given[name].dtype).contiguous() if name in given else None for name in INPUTS_V2[: len(inputs)]
    )


def _given(inputs: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in zip(INPUTS_V2, inputs, strict=False) if tensor is not None}


class _Call:
    """The arguments of one native call, and the tensors that they point to."""

    def __init__(self, given: dict[str, Tensor], io: torch.dtype, reverse: bool, softplus: bool):
        loaded = native.library()
        assert loaded is not None
        self.library, self.io = loaded, io
        u, A, B = given["u"], given["A"], given["B"]
        kind = state_dtype(u)
        self.state_shape = (*u.shape[:2], A.shape[1])
        self._steps = {name: _rows(given[name], io) for name in _STEPS if name in given}
        self._others = {name: x.to(kind).contiguous() for name, x in given.items() if name not in _STEPS}
        self.scan = native.Scan(
            *u.shape,
            A.shape[1],
            _TYPES[io],
            reverse,
            groups=B.shape[1] if B.ndim == 4 else 1,
            no_softplus=not softplus,
            **{name: _view(tensor) for name, tensor in self._steps.items()},
            **{name: tensor.data_ptr() for name, tensor in self._others.items()},
        )

    def run(self, gradients: native.Gradients | None = None) -> None:
        native.run(self.scan, gradients, gomp_parallel=_gomp_parallel(), threads=torch.get_num_threads())


def _rows(tensor: Tensor, kind: torch.dtype) -> Tensor:
    """The tensor (batch, …, length) in the type `kind`, with three axes and steps side by side; views stay views."""
    tensor = tensor.to(kind)
    tensor = tensor.flatten(1, 2) if tensor.ndim == 4 else tensor
    return tensor if tensor.stride(2) == 1 or tensor.shape[2] == 1 else tensor.contiguous()


def _view(tensor: Tensor) -> native.Rows:
    return native.Rows(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


@functools.cache
def _gomp_parallel() -> int | None:
    """The entry of the OpenMP runtime that PyTorch runs on: its threads, not a second set."""
    # A runtime that was preloaded in place of PyTorch's own is found in the process, as PyTorch finds it.
    for library in (None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")):
        try:
            return ctypes.cast(ctypes.CDLL(library).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None  # a PyTorch built without OpenMP
