"""The native scan on NumPy arrays, in the build for any instruction set that this processor has."""

from __future__ import annotations

import numpy as np

from mdnet_engines.ops import native


def isas() -> list[str]:
    """The builds that can run here, "portable" first."""
    names = list(native.ISAS)[1:]
    best = native.best_isa()
    return names[: names.index(best) + 1] if best in names else []


def rows(array: np.ndarray) -> native.Rows:
    """A tensor (batch, rows, length), or (batch, groups, rows, length), whose groups follow each other."""
    strides = [stride // array.itemsize for stride in array.strides]
    assert strides[-1] == 1 or array.shape[-1] == 1
    assert array.ndim == 3 or strides[1] == array.shape[2] * strides[2]
    return native.Rows(array.ctypes.data, strides[0], strides[-2])


def arguments(
    inputs: dict[str, np.ndarray], y: np.ndarray, *, reverse: bool, isa: str, softplus: bool = True
) -> native.Scan:
    """The call's structure; it points into the arrays, which must outlive it. Any input may be left out."""
    u, A, B = (inputs[name] for name in ("u", "A", "B"))
    return native.Scan(
        *u.shape,
        A.shape[1],
        native.TYPES[u.dtype.name],
        reverse,
        native.ISAS[isa],
        y=y.ctypes.data,
        groups=B.shape[1] if B.ndim == 4 else 0,
        no_softplus=not softplus,
        **{name: rows(inputs[name]) for name in ("u", "delta", "z", "B", "C") if name in inputs},
        **{name: inputs[name].ctypes.data for name in ("A", "D", "delta_bias", "h0") if name in inputs},
    )


def native_scan(inputs: dict[str, np.ndarray], *, reverse: bool = False, isa: str = "best") -> np.ndarray:
    """y, of the type of u. The output is poisoned first: an element that is not written shows."""
    y = np.full(inputs["u"].shape, np.nan, inputs["u"].dtype)
    native.run(arguments(inputs, y, reverse=reverse, isa=isa))
    return y


def native_states(
    inputs: dict[str, np.ndarray], *, reverse: bool = False, softplus: bool = True, isa: str = "best"
) -> tuple[np.ndarray, np.ndarray]:
    """y and the last state."""
    A = inputs["A"]
    y = np.full(inputs["u"].shape, np.nan, inputs["u"].dtype)
    h_last = np.full((len(y), *A.shape), np.nan, A.dtype)
    call = arguments(inputs, y, reverse=reverse, isa=isa, softplus=softplus)
    call.h_last = h_last.ctypes.data
    native.run(call)
    return y, h_last


def native_gradients(
    inputs: dict[str, np.ndarray],
    grad: np.ndarray,
    grad_last: np.ndarray | None = None,
    *,
    reverse: bool = False,
    softplus: bool = True,
    isa: str = "best",
) -> dict[str, np.ndarray]:
    """The gradients of the sum of grad · y (and grad_last · h_last), by the names of the inputs; float32 or float64."""
    batch, channels, length = inputs["u"].shape
    states, B = inputs["A"].shape[1], inputs["B"]
    groups = B.shape[1] if B.ndim == 4 else 1
    splits = native._required().mdnet_scan_splits(channels // groups)
    shapes = {
        **dict.fromkeys(("u", "delta", "z"), (batch, channels, length)),
        **dict.fromkeys(("A", "h0"), (batch, channels, states)),
        **dict.fromkeys(("B", "C"), (splits, batch, groups, length, states)),
        **dict.fromkeys(("D", "delta_bias"), (batch, channels)),
    }
    parts = {name: np.full(shapes[name], np.nan, grad.dtype) for name in inputs}
    y = np.empty_like(grad)
    gradients = native.Gradients(rows(grad), **{name: part.ctypes.data for name, part in parts.items()})
    if grad_last is not None:
        gradients.h_last = grad_last.ctypes.data
    native.run(arguments(inputs, y, reverse=reverse, isa=isa, softplus=softplus), gradients)
    for name in ("A", "D", "delta_bias", "B", "C"):
        if name in parts:
            parts[name] = parts[name].sum(0)
    for name in ("B", "C"):
        parts[name] = parts[name].swapaxes(2, 3).reshape(inputs[name].shape)
    return parts
