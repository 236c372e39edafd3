"""Products in bfloat16 against float64: the native kernel, and the operators with the kernel and the function body."""

from __future__ import annotations

import ctypes

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mdnet_engines import native
from mdnet_engines.product_op import PRODUCTS, function
from mdnet_engines.scan_op import DOMAIN, VERSION

RANDOM = np.random.default_rng(0)
loaded = native.library() if native.custom_op_library() else None
needs_kernel = pytest.mark.skipif(
    loaded is None or not loaded.mdnet_has_bfloat16(), reason="no native kernel for this processor"
)
# Sums of `inner` products of normal numbers in float32: some 1e-7 of sqrt(inner) for each rounding.
TOLERANCE = 1e-5
# rows, inner, columns: a group is 12 rows, a panel 32 columns or 16; 1,024 inner values are multiplied at a time.
SIZES = [(1, 1, 1), (12, 2, 32), (13, 7, 33), (11, 8, 16), (24, 31, 17), (5, 1024, 40), (25, 1025, 49), (3, 2500, 8)]


def rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def turned(x: np.ndarray, turn: bool) -> np.ndarray:
    return np.ascontiguousarray(x.swapaxes(-1, -2)) if turn else x


def assert_product(y: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    expected = rounded(a) @ rounded(b)
    assert y.shape == expected.shape
    assert y.dtype == np.float32
    assert np.abs(y - expected).max(initial=0) <= TOLERANCE * np.sqrt(a.shape[-1])


# --- the kernel ---


class Product(ctypes.Structure):
    """`MdnetProduct` of `engines/cpp/product.h`."""

    _fields_ = [
        *((n, ctypes.c_int64) for n in ("batch", "rows", "columns", "inner", "a_matrices", "b_matrices")),
        *((n, ctypes.c_void_p) for n in ("a", "b", "a_packed", "b_packed", "y")),
        *((n, ctypes.c_int32) for n in ("a_transposed", "b_transposed")),
    ]


def run_native(
    a: np.ndarray, b: np.ndarray, transposed: tuple[bool, bool] = (False, False), packed: str = ""
) -> np.ndarray:
    """a (n, M, K) by b (m, K, N), each given to the kernel as `transposed` says, and packed before if `packed` says."""
    assert loaded is not None
    loaded.mdnet_product_pack.restype = ctypes.c_void_p
    loaded.mdnet_product_pack.argtypes = [ctypes.c_void_p, ctypes.c_int]
    (counts, (rows, inner), columns) = ((len(a), len(b)), a.shape[1:], b.shape[2])
    given = [turned(a, transposed[0]), turned(b, transposed[1])]
    y = np.full(max(counts) * rows * columns + 64, np.nan, np.float32)
    pointers = [x.ctypes.data for x in given]
    call = Product(max(counts), rows, columns, inner, *counts, *pointers, None, None, y.ctypes.data, *transposed)
    if "a" in packed:
        call.a_packed, call.a = loaded.mdnet_product_pack(ctypes.byref(call), 0), None
    if "b" in packed:
        call.b_packed, call.b = loaded.mdnet_product_pack(ctypes.byref(call), 1), None
    status = loaded.mdnet_product_here(ctypes.byref(call))
    for memory in (call.a_packed, call.b_packed):
        ctypes.CDLL(None).free(ctypes.c_void_p(memory))
    assert status == 0
    assert np.isnan(y[max(counts) * rows * columns :]).all()  # nothing is written behind the end
    return y[: max(counts) * rows * columns].reshape(max(counts), rows, columns)


@needs_kernel
@pytest.mark.parametrize("packed", ["", "a", "b", "ab"])
@pytest.mark.parametrize("transposed", [*PRODUCTS, (True, True)])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_kernel_agrees_with_float64(
    sizes: tuple[int, int, int], transposed: tuple[bool, bool], packed: str
) -> None:
    rows, inner, columns = sizes
    a, b = normal(2, rows, inner), normal(2, inner, columns)
    assert_product(run_native(a, b, transposed, packed), a, b)


@needs_kernel
@pytest.mark.parametrize(("a_count", "b_count"), [(1, 4), (4, 1), (2, 6), (6, 3)])
def test_one_side_may_have_fewer_matrices(a_count: int, b_count: int) -> None:
    a, b = normal(a_count, 14, 9), normal(b_count, 9, 20)
    count = max(a_count, b_count)
    assert_product(run_native(a, b), *(np.tile(x, (count // len(x), 1, 1)) for x in (a, b)))


@needs_kernel
def test_values_that_are_not_finite_come_through() -> None:
    a, b = np.ones((1, 3, 4), np.float32), np.ones((1, 4, 2), np.float32)
    a[0, 0, 1], a[0, 1, 2] = np.nan, np.inf
    y = run_native(a, b)[0]
    assert np.isnan(y[0]).all()
    assert (y[1] == np.inf).all()
    assert (y[2] == 4).all()


@needs_kernel
@pytest.mark.parametrize("field", ["batch", "rows", "columns", "inner", "a_matrices", "b_matrices"])
def test_an_empty_call_is_refused(field: str) -> None:
    a, b, y = normal(1, 2, 3), normal(1, 3, 4), normal(1, 2, 4)
    call = Product(1, 2, 4, 3, 1, 1, a.ctypes.data, b.ctypes.data, None, None, y.ctypes.data, 0, 0)
    setattr(call, field, 0)
    assert loaded is not None
    assert loaded.mdnet_product_here(ctypes.byref(call)) == 3


# --- the operators ---


def run(
    a: np.ndarray, b: np.ndarray, operator: str = "BFloat16MatMul", *, registered: bool, constant: str = ""
) -> np.ndarray:
    inputs = {"a": a, "b": b}
    graph = helper.make_graph(
        [helper.make_node(operator, ["a", "b"], ["y"], domain=DOMAIN)],
        "product",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape) for n, x in inputs.items() if n not in constant],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * max(a.ndim, b.ndim))],
        [numpy_helper.from_array(x, n) for n, x in inputs.items() if n in constant],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, VERSION)]
    proto = helper.make_model(graph, opset_imports=opsets, functions=[function(operator)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if registered:
        options.register_custom_ops_library(str(native.custom_op_library()))
    else:
        onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {n: x for n, x in inputs.items() if n not in constant})[0]


BATCHES = [((), ()), ((3,), ()), ((), (3,)), ((2, 4), (2, 4)), ((2, 4), (1, 4)), ((2, 4), (4,)), ((1, 4), (2, 4))]


@pytest.mark.parametrize("registered", [False, pytest.param(True, marks=needs_kernel)])
@pytest.mark.parametrize("constant", ["", "a", "b"])
@pytest.mark.parametrize("transposed", PRODUCTS)
@pytest.mark.parametrize(("a_batch", "b_batch"), BATCHES)
def test_the_operator_agrees_with_float64(
    a_batch: tuple[int, ...], b_batch: tuple[int, ...], transposed: tuple[bool, bool], constant: str, registered: bool
) -> None:
    a, b = normal(*a_batch, 13, 9), normal(*b_batch, 9, 17)
    given = (turned(a, transposed[0]), turned(b, transposed[1]))
    assert_product(run(*given, PRODUCTS[transposed], registered=registered, constant=constant), a, b)


@needs_kernel
def test_a_batch_is_its_images_bit_for_bit() -> None:
    a, b = normal(3, 30, 40), normal(40, 50)
    together = run(a, b, registered=True)
    for i in range(3):
        np.testing.assert_array_equal(run(a[i : i + 1], b, registered=True)[0], together[i])


@needs_kernel
def test_empty_axes_give_what_a_product_gives() -> None:
    assert run(normal(0, 3, 4), normal(4, 5), registered=True).shape == (0, 3, 5)
    assert (run(normal(2, 3, 0), normal(0, 5), registered=True) == np.zeros((2, 3, 5))).all()


@needs_kernel
@pytest.mark.parametrize(
    ("a_shape", "b_shape", "reason"),
    [
        ((2, 3), (4, 5), "the inner axes of a and b differ"),
        ((3, 2, 4), (2, 4, 5), "the matrices of one input must be as many"),
        ((2, 1, 3, 4), (2, 4, 5), "the matrices of one input must be as many"),
        ((4,), (4, 5), "a and b must have 2 to 8 axes"),
    ],
)
def test_what_does_not_fit_is_refused(a_shape: tuple[int, ...], b_shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(Exception, match=f"BFloat16MatMul: .*{reason}"):
        run(normal(*a_shape), normal(*b_shape), registered=True)
