"""Products in bfloat16 against float64: the native kernel, and the operators with the kernel and the function body."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from fences import FENCE, fenced
from onnx import TensorProto, helper, numpy_helper

from mdnet_engines.ops import native
from mdnet_engines.ops.product import PRODUCTS, function
from mdnet_engines.ops.selective_scan import DOMAIN, VERSION

RANDOM = np.random.default_rng(0)
loaded = native.library() if native.custom_op_library() else None
has_kernel = loaded is not None and bool(loaded.mdnet_has_bfloat16())
needs_library = pytest.mark.skipif(loaded is None, reason="mdnet was installed without its native library")
needs_kernel = pytest.mark.skipif(not has_kernel, reason="no native kernel for this processor")
# Sums of `inner` products of normal numbers in float32: some 1e-7 of sqrt(inner) for each rounding.
TOLERANCE = 1e-5
# rows, inner, columns: a group is 12 rows, a panel 32 columns or 16; 1,024 inner values are multiplied at a time.
SIZES = [(1, 1, 1), (12, 2, 32), (13, 7, 33), (11, 8, 16), (24, 31, 17), (5, 1024, 40), (25, 1025, 49), (3, 2500, 8)]
EDGES = [
    *((rows, 3, 5) for rows in (1, 11, 12, 13, 23, 24, 25)),
    *((2, 3, columns) for columns in (1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65)),
    *((2, inner, 3) for inner in (1, 2, 31, 32, 33, 63, 64, 65, 1023, 1024, 1025, 1026, 2047, 2048, 2049)),
    (25, 1055, 65),
]

# What a float32 becomes, by the rules of IEEE 754 for 8 bits of precision: to the nearest, halves to even.
STEP = 2.0**-7  # from 1 to the next bfloat16
LARGEST = (2 - STEP) * 2.0**127
ROUNDED = {
    "exact": (1 + STEP, 1 + STEP),
    "below half a step": (1 + STEP / 2 - 2.0**-23, 1),
    "half a step, down to even": (1 + STEP / 2, 1),
    "above half a step": (1 + STEP / 2 + 2.0**-23, 1 + STEP),
    "half a step, up to even": (1 + 1.5 * STEP, 1 + 2 * STEP),
    "negative half a step": (-1 - STEP / 2, -1),
    "up to a power of 2": (2 - 2.0**-23, 2),
    "smallest normal number": (2.0**-126, 2.0**-126),
    "largest": (LARGEST, LARGEST),
    "just not infinite": (np.uint32(0x7F7F7FFF).view(np.float32), LARGEST),
    "half a step above the largest": (np.uint32(0x7F7F8000).view(np.float32), np.inf),
    "largest float32": (np.finfo(np.float32).max, np.inf),
    "infinity": (-np.inf, -np.inf),
    "NaN": (np.nan, np.nan),
    "NaN whose bits are all cut off": (np.uint32(0x7F800001).view(np.float32), np.nan),
}
VALUES, RESULTS = np.array(list(ROUNDED.values()), np.float32).T


def rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def whole(*shape: int) -> np.ndarray:
    """Integers that bfloat16 holds, and whose products' sums float32 holds, in any order: results are exact."""
    return RANDOM.integers(-60, 61, shape).astype(np.float32)


def turned(x: np.ndarray, turn: bool) -> np.ndarray:
    return np.ascontiguousarray(x.swapaxes(-1, -2)) if turn else x


def assert_product(y: np.ndarray, a: np.ndarray, b: np.ndarray, form: object = "") -> None:
    expected = rounded(a) @ rounded(b)
    assert y.shape == expected.shape, form
    assert y.dtype == np.float32, form
    assert np.abs(y - expected).max(initial=0) <= TOLERANCE * np.sqrt(a.shape[-1]), form


# --- the kernel ---


class Product(ctypes.Structure):
    """`MdnetMatmul` of `engines/cpp/matmul/matmul.h`."""

    sizes = ("batch", "rows", "columns", "inner", "a_matrices", "b_matrices")
    _fields_ = [
        *((n, ctypes.c_int64) for n in sizes),
        *((n, ctypes.c_void_p) for n in ("a", "b", "a_packed", "b_packed", "y")),
        *((n, ctypes.c_int32) for n in ("a_transposed", "b_transposed")),
    ]


def run_native(
    a: np.ndarray,
    b: np.ndarray,
    transposed: tuple[bool, bool] = (False, False),
    packed: str = "",
    batch: int | None = None,
) -> np.ndarray:
    """a (n, M, K) by b (m, K, N), each given to the kernel as `transposed` says, and packed before if `packed` says."""
    assert loaded is not None
    loaded.mdnet_matmul_pack.restype = ctypes.c_void_p
    loaded.mdnet_matmul_pack.argtypes = [ctypes.c_void_p, ctypes.c_int]
    (counts, (rows, inner), columns) = ((len(a), len(b)), a.shape[1:], b.shape[2])
    batch = batch or max(counts)
    given = [fenced(turned(a, transposed[0])), fenced(turned(b, transposed[1]))]
    size = batch * rows * columns
    memory = np.full(size + 64, np.nan, np.float32)
    y = memory[FENCE : FENCE + size]
    pointers = [x.ctypes.data for x in given]
    call = Product(batch, rows, columns, inner, *counts, *pointers, None, None, y.ctypes.data, *transposed)
    if "a" in packed:
        call.a_packed, call.a = loaded.mdnet_matmul_pack(ctypes.byref(call), 0), None
        given[0][...] = np.nan  # it is not read any more
    if "b" in packed:
        call.b_packed, call.b = loaded.mdnet_matmul_pack(ctypes.byref(call), 1), None
        given[1][...] = np.nan
    status = loaded.mdnet_matmul(ctypes.byref(call), None, None)
    for packed_memory in (call.a_packed, call.b_packed):
        ctypes.CDLL(None).free(ctypes.c_void_p(packed_memory))
    assert status == 0
    assert np.isnan(memory[:FENCE]).all()  # nothing is written before the start
    assert np.isnan(memory[FENCE + size :]).all()  # or behind the end
    return y.reshape(batch, rows, columns)


# How the kernel may be given its two sides: which are transposed, which are packed.
FORMS = list(product([*PRODUCTS, (True, True)], ["", "a", "b", "ab"]))


@needs_kernel
@pytest.mark.parametrize("sizes", SIZES)
def test_the_kernel_agrees_with_float64_in_every_form(sizes: tuple[int, int, int]) -> None:
    rows, inner, columns = sizes
    a, b = normal(2, rows, inner), normal(2, inner, columns)
    for form in FORMS:
        assert_product(run_native(a, b, *form), a, b, form)


@needs_kernel
@pytest.mark.parametrize("sizes", EDGES)
def test_whole_numbers_are_multiplied_exactly_in_every_form(sizes: tuple[int, int, int]) -> None:
    """No tolerance in which a value in the wrong place could hide."""
    rows, inner, columns = sizes
    a, b = whole(2, rows, inner), whole(2, inner, columns)
    expected = a.astype(np.float64) @ b
    for form in FORMS:
        np.testing.assert_array_equal(run_native(a, b, *form), expected, str(form))


@needs_kernel
@pytest.mark.parametrize("packed", ["", "ab"])
@pytest.mark.parametrize("batch", [1, 3])
def test_work_that_is_shared_out_in_uneven_parts_is_all_done(batch: int, packed: str) -> None:
    """Some groups of rows to a task, and fewer in an image's last."""
    a, b = whole(batch, 12 * 200 + 7, 3), whole(1, 3, 2)
    np.testing.assert_array_equal(run_native(a, b, packed=packed), a.astype(np.float64) @ b)


@needs_kernel
@pytest.mark.parametrize("place", [0, 1, 2])  # the low half of a pair, the high one, and the odd end
@pytest.mark.parametrize("side", ["a", "b"])
def test_inputs_are_rounded_to_bfloat16_in_every_form(side: str, place: int) -> None:
    x = np.zeros((1, len(ROUNDED), 3), np.float32)
    x[0, :, place] = VALUES
    for form in FORMS:
        if side == "a":
            got = run_native(x, np.ones((1, 3, 1), np.float32), *form)
        else:
            got = run_native(np.ones((1, 1, 3), np.float32), x.swapaxes(1, 2), *form)
        np.testing.assert_array_equal(got.ravel(), RESULTS, str(form))


@needs_kernel
@pytest.mark.parametrize("packed", ["", "ab"])
@pytest.mark.parametrize(("a_count", "b_count", "batch"), [(2, 3, 6), (3, 2, 12), (1, 1, 4)])
def test_both_sides_may_have_fewer_matrices_than_the_batch(a_count: int, b_count: int, batch: int, packed: str) -> None:
    a, b = whole(a_count, 14, 9), whole(b_count, 9, 20)
    expected = [a[i % a_count].astype(np.float64) @ b[i % b_count] for i in range(batch)]
    np.testing.assert_array_equal(run_native(a, b, packed=packed, batch=batch), expected)


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
@pytest.mark.parametrize("transposed", [*PRODUCTS, (True, True)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row_and_column(value: float, transposed: tuple[bool, bool]) -> None:
    """In the last of an odd number of values, beside which a 0 is filled in, in a group and a panel that are not full.

    The other factors are not 0, so infinity stays infinity.
    """
    a, b = np.abs(normal(1, 13, 7)) + 1, np.abs(normal(1, 7, 21)) + 1
    a[0, 2, 6] = value
    b[0, 6, 20] = value
    with np.errstate(invalid="ignore"):
        expected = rounded(a) @ rounded(b)
    assert np.isfinite(expected).sum() == 12 * 20
    np.testing.assert_allclose(run_native(a, b, transposed), expected, rtol=1e-6)


@needs_kernel
@pytest.mark.parametrize(
    "changes",
    [
        *({field: value} for field in Product.sizes for value in (0, -1)),
        {"batch": 3, "a_matrices": 2},
        {"batch": 3, "b_matrices": 2},
        {"batch": 2, "a_matrices": 4},
        {"batch": 2, "b_matrices": 4},
    ],
)
def test_a_call_that_makes_no_sense_is_refused(changes: Mapping[str, int]) -> None:
    a, b, y = normal(4, 2, 3), normal(4, 3, 4), np.zeros((4, 2, 4), np.float32)
    call = Product(1, 2, 4, 3, 1, 1, a.ctypes.data, b.ctypes.data, None, None, y.ctypes.data, 0, 0)
    for field, value in changes.items():
        setattr(call, field, value)
    assert loaded is not None
    loaded.mdnet_matmul_pack.restype = ctypes.c_void_p
    assert loaded.mdnet_matmul(ctypes.byref(call), None, None) == 3
    assert not y.any()
    assert [loaded.mdnet_matmul_pack(ctypes.byref(call), side) for side in (0, 1)] == [None, None]


@needs_kernel
def test_no_call_at_all_is_refused() -> None:
    assert loaded is not None
    assert loaded.mdnet_matmul(None, None, None) == 3


# --- the operators ---


def open_session(
    inputs: Mapping[str, np.ndarray],
    operator: str,
    *,
    registered: bool,
    constant: str = "",
    threads: int = 2,
    profile: Path | None = None,
) -> onnxruntime.InferenceSession:
    """One node and its function body; the sizes of what is not constant are left open."""
    values = {n: x for n, x in inputs.items() if n not in constant}
    graph = helper.make_graph(
        [helper.make_node(operator, list(inputs), ["y"], domain=DOMAIN)],
        "product",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * x.ndim) for n, x in values.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * max(x.ndim for x in inputs.values()))],
        [numpy_helper.from_array(x, n) for n, x in inputs.items() if n in constant],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, VERSION)]
    proto = helper.make_model(graph, opset_imports=opsets, functions=[function(operator)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if registered:
        options.register_custom_ops_library(str(native.custom_op_library()))
    else:
        onnx.checker.check_model(proto, full_check=True)
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile / "profile")
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(
    a: np.ndarray,
    b: np.ndarray,
    operator: str = "BFloat16MatMul",
    *,
    registered: bool,
    constant: str = "",
    threads: int = 2,
) -> np.ndarray:
    inputs = {"a": a, "b": b}
    session = open_session(inputs, operator, registered=registered, constant=constant, threads=threads)
    return session.run(None, {n: x for n, x in inputs.items() if n not in constant})[0]


BATCHES = [((), ()), ((3,), ()), ((), (3,)), ((2, 4), (2, 4)), ((2, 4), (1, 4)), ((2, 4), (4,)), ((1, 4), (2, 4))]
EMPTY = {  # batch axes of a and of b; rows, inner, columns
    "batch": ((0,), (0,), 3, 4, 5),
    "batch of a alone": ((0,), (), 3, 4, 5),
    "batch of b alone": ((1,), (0,), 3, 4, 5),
    "batch behind another": ((2, 0), (2, 0), 3, 4, 5),
    "rows": ((2,), (2,), 0, 4, 5),
    "columns": ((2,), (), 3, 4, 0),
    "inner": ((), (), 3, 0, 5),
    "inner of a batch": ((2, 3), (3,), 3, 0, 5),
}
EITHER = [False, pytest.param(True, marks=needs_kernel)]


@pytest.mark.parametrize("registered", EITHER)
@pytest.mark.parametrize(("a_batch", "b_batch"), BATCHES)
def test_every_operator_agrees_with_float64(
    a_batch: tuple[int, ...], b_batch: tuple[int, ...], registered: bool
) -> None:
    a, b = normal(*a_batch, 13, 9), normal(*b_batch, 9, 17)
    for transposed, constant in product(PRODUCTS, ["", "a", "b"]):
        given = (turned(a, transposed[0]), turned(b, transposed[1]))
        got = run(*given, PRODUCTS[transposed], registered=registered, constant=constant)
        assert_product(got, a, b, (transposed, constant))


@needs_kernel
def test_a_batch_is_its_images_bit_for_bit() -> None:
    a, b = normal(3, 30, 40), normal(40, 50)
    together = run(a, b, registered=True)
    for i in range(3):
        np.testing.assert_array_equal(run(a[i : i + 1], b, registered=True)[0], together[i])


@needs_kernel
@pytest.mark.parametrize("constant", ["", "b"])
def test_the_number_of_threads_changes_no_bit(constant: str) -> None:
    a, b = normal(3, 130, 77), normal(77, 90)
    one, *others = (run(a, b, registered=True, constant=constant, threads=threads) for threads in (1, 2, 5))
    for other in others:
        np.testing.assert_array_equal(one, other)


@needs_kernel
@pytest.mark.parametrize("constant", ["", "b"])
def test_one_session_serves_many_threads(constant: str) -> None:
    """A constant's packed form is shared by all of them."""
    b = whole(33, 49)
    session = open_session({"a": np.empty((1, 1)), "b": b}, "BFloat16MatMul", registered=True, constant=constant)
    calls = [whole(1 + i % 30, 33) for i in range(24)]
    more = {} if constant else {"b": b}
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda a: session.run(None, {"a": a, **more})[0], calls))
    for a, y in zip(calls, results, strict=True):
        np.testing.assert_array_equal(y, a @ b)


@pytest.mark.parametrize("registered", EITHER)
@pytest.mark.parametrize("name", EMPTY)
def test_empty_axes_give_what_a_product_gives(name: str, registered: bool) -> None:
    a_batch, b_batch, rows, inner, columns = EMPTY[name]
    a, b = normal(*a_batch, rows, inner), normal(*b_batch, inner, columns)
    for transposed, constant in product(PRODUCTS, ["", "a", "b", "ab"]):
        given = (turned(a, transposed[0]), turned(b, transposed[1]))
        got = run(*given, PRODUCTS[transposed], registered=registered, constant=constant)
        np.testing.assert_array_equal(got, a @ b, f"{transposed} {constant}", strict=True)


@pytest.mark.parametrize("registered", EITHER)
def test_as_many_axes_as_the_kernel_takes(registered: bool) -> None:
    a, b = whole(1, 1, 2, 1, 3, 1, 2, 3), whole(1, 3, 1, 3, 4)
    np.testing.assert_array_equal(run(a, b, registered=registered), a @ b, strict=True)


@pytest.mark.parametrize("registered", EITHER)
@pytest.mark.parametrize("transposed", PRODUCTS)
@pytest.mark.parametrize("side", ["a", "b"])
def test_the_operator_rounds_its_inputs(side: str, transposed: tuple[bool, bool], registered: bool) -> None:
    one = np.ones((1, 1), np.float32)
    a, b = (VALUES[:, None], one) if side == "a" else (one, VALUES[None])
    given = (turned(a, transposed[0]), turned(b, transposed[1]))
    np.testing.assert_array_equal(run(*given, PRODUCTS[transposed], registered=registered).ravel(), RESULTS)


@pytest.mark.parametrize("registered", EITHER)
@pytest.mark.parametrize("transposed", PRODUCTS)
@pytest.mark.parametrize("constant", ["a", "b"])
def test_a_constant_serves_every_size_of_the_other_input(
    constant: str, transposed: tuple[bool, bool], registered: bool
) -> None:
    """It is packed when the session is made, which knows of no other size."""
    a, b = whole(25, 33), whole(33, 49)
    given = {"a": turned(a, transposed[0]), "b": turned(b, transposed[1])}
    rank = {constant: given[constant], "ab".replace(constant, ""): np.empty((1, 1, 1))}
    inputs = {name: rank[name] for name in "ab"}
    session = open_session(inputs, PRODUCTS[transposed], registered=registered, constant=constant)
    for batch in (1, 3):
        for size in (1, 12, 40):
            if constant == "b":
                x = whole(batch, size, 33)
                got = session.run(None, {"a": turned(x, transposed[0])})[0]
                np.testing.assert_array_equal(got, x @ b, strict=True)
            else:
                x = whole(batch, 33, size)
                got = session.run(None, {"b": turned(x, transposed[1])})[0]
                np.testing.assert_array_equal(got, a @ x, strict=True)


@needs_library
@pytest.mark.parametrize("operator", PRODUCTS.values())
def test_the_kernel_runs_where_the_processor_has_one_and_else_the_function_body(operator: str, tmp_path: Path) -> None:
    inputs = {"a": whole(4, 4), "b": whole(4, 4)}
    session = open_session(inputs, operator, registered=True, profile=tmp_path)
    session.run(None, inputs)
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = {event["args"]["op_name"] for event in events if event.get("args", {}).get("op_name")}
    assert (ran == {operator}) is has_kernel
    assert ("MatMul" in ran) is not has_kernel


@needs_kernel
@pytest.mark.parametrize(
    ("a_shape", "b_shape", "reason"),
    [
        ((2, 3), (4, 5), "the inner axes of a and b differ"),
        ((3, 2, 4), (2, 4, 5), "the matrices of one input must be as many"),
        ((2, 1, 3, 4), (2, 4, 5), "the matrices of one input must be as many"),
        ((2, 1, 3, 4), (1, 3, 4, 5), "the matrices of one input must be as many"),
        ((4,), (4, 5), "a and b must have 2 to 8 axes"),
        ((4, 5), (5,), "a and b must have 2 to 8 axes"),
        ((1,) * 7 + (4, 5), (5, 6), "a and b must have 2 to 8 axes"),
    ],
)
def test_what_does_not_fit_is_refused(a_shape: tuple[int, ...], b_shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(Exception, match=f"BFloat16MatMul: .*{reason}"):
        run(normal(*a_shape), normal(*b_shape), registered=True)
