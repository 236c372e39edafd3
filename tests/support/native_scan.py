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
    batch_stride, row_stride, step = (stride // array.itemsize for stride in array.strides)
    assert step == 1 or array.shape[2] == 1
    return native.Rows(array.ctypes.data, batch_stride, row_stride)


def arguments(inputs: dict[str, np.ndarray], y: np.ndarray, *, reverse: bool, isa: str) -> native.Scan:
    """The call's structure; it points into the arrays, which must outlive it."""
    u, A = inputs["u"], inputs["A"]
    return native.Scan(
        *u.shape,
        A.shape[1],
        native.TYPES[u.dtype.name],
        reverse,
        native.ISAS[isa],
        *(rows(inputs[name]) for name in ("u", "delta", "z", "B", "C")),
        *(inputs[name].ctypes.data for name in ("A", "D", "delta_bias")),
        y.ctypes.data,
    )


def native_scan(inputs: dict[str, np.ndarray], *, reverse: bool = False, isa: str = "best") -> np.ndarray:
    """y, of the type of u. The output is poisoned first: an element that is not written shows."""
    y = np.full(inputs["u"].shape, np.nan, inputs["u"].dtype)
    native.run(arguments(inputs, y, reverse=reverse, isa=isa))
    return y


def native_gradients(
    inputs: dict[str, np.ndarray], grad: np.ndarray, *, reverse: bool = False, isa: str = "best"
) -> dict[str, np.ndarray]:
    """The gradients of the sum of grad · y, by the names of the inputs; float32 or float64, as these are."""
    batch, channels, length = inputs["u"].shape
    states = inputs["A"].shape[1]
    splits = native._required().mdnet_scan_splits(channels)
    shapes = {
        **dict.fromkeys(("u", "delta", "z"), (batch, channels, length)),
        "A": (batch, channels, states),
        **dict.fromkeys(("B", "C"), (splits, batch, length, states)),
        **dict.fromkeys(("D", "delta_bias"), (batch, channels)),
    }
    parts = {name: np.full(shape, np.nan, grad.dtype) for name, shape in shapes.items()}
    y = np.empty_like(grad)
    gradients = native.Gradients(rows(grad), **{name: part.ctypes.data for name, part in parts.items()})
    native.run(arguments(inputs, y, reverse=reverse, isa=isa), gradients)
    return {
        **{name: parts[name] for name in ("u", "delta", "z")},
        **{name: parts[name].sum(0) for name in ("A", "D", "delta_bias")},
        **{name: parts[name].sum(0).swapaxes(1, 2) for name in ("B", "C")},
    }
