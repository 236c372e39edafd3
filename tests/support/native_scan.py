"""The native scan on NumPy arrays, in the build for any instruction set that this processor has."""

from __future__ import annotations

import numpy as np

from mdnet_engines import native


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
