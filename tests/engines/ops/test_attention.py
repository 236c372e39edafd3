"""Attention in bfloat16 against float64: the native kernel, and the operator with the kernel and the function body."""

from __future__ import annotations

import ctypes

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from fences import fenced
from onnx import TensorProto, helper, numpy_helper

from mdnet_engines.ops import native
from mdnet_engines.ops.product import ATTENTION, function
from mdnet_engines.ops.selective_scan import DOMAIN, VERSION

RANDOM = np.random.default_rng(0)
loaded = native.library() if native.custom_op_library() else None
needs_kernel = pytest.mark.skipif(
    loaded is None or not loaded.mdnet_has_bfloat16(), reason="no native kernel for this processor"
)
# Weights of a sum, at most 1, are rounded to 8 bits; a weight that lies between two may be rounded either way.
TOLERANCE = 2**-8
# The batch axes of q, k and v; then rows, inner, keys, columns.
SHAPES = {
    "one of each": ((1,), (1,), (1,), 1, 1, 1, 1),
    "less than a group of rows": ((2,), (2,), (2,), 5, 8, 7, 3),
    "odd sizes": ((3,), (3,), (3,), 25, 13, 33, 19),
    "heads": ((2, 8), (2, 8), (2, 8), 64, 40, 64, 40),
    "keys and values of a fixed text": ((3, 4), (1, 4), (1, 4), 30, 24, 77, 24),
    "one set of keys": ((4,), (), (), 12, 16, 16, 48),
    "many keys": ((1,), (1,), (1,), 13, 64, 1500, 65),
}


def rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """softmax(q·k)·v in float64, of inputs and weights rounded to bfloat16."""
    scores = rounded(q) @ rounded(k)
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return rounded(powers / powers.sum(axis=-1, keepdims=True)) @ rounded(v)


def inputs_of(name: str) -> list[np.ndarray]:
    q_batch, k_batch, v_batch, rows, inner, keys, columns = SHAPES[name]
    shapes = ((*q_batch, rows, inner), (*k_batch, inner, keys), (*v_batch, keys, columns))
    made = [RANDOM.normal(size=shape).astype(np.float32) for shape in shapes]
    made[0] *= np.float32(2 / np.sqrt(inner))
    return [fenced(array) for array in made]


def tolerance(v: np.ndarray) -> float:
    return TOLERANCE * float(np.abs(v).max())


# --- the kernel ---


class Attention(ctypes.Structure):
    """`MdnetAttention` of `engines/cpp/attention/attention.h`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "rows", "keys", "inner", "columns")),
        *((name, ctypes.c_int64) for name in ("q_matrices", "k_matrices", "v_matrices")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "k_packed", "v_packed", "y")),
    ]


def call_of(q: np.ndarray, k: np.ndarray, v: np.ndarray, y: np.ndarray) -> Attention:
    (rows, inner), (keys, columns) = q.shape[-2:], v.shape[-2:]
    counts = [int(np.prod(x.shape[:-2])) for x in (q, k, v)]
    pointers = [x.ctypes.data for x in (q, k, v)]
    return Attention(max(counts), rows, keys, inner, columns, *counts, *pointers, None, None, y.ctypes.data)


@needs_kernel
@pytest.mark.parametrize("name", SHAPES)
def test_the_kernel_agrees_with_float64_and_writes_nothing_else(name: str) -> None:
    q, k, v = inputs_of(name)
    expected = reference(q, k, v)
    y = np.full(expected.size + 64, np.nan, np.float32)
    assert loaded is not None
    assert loaded.mdnet_attention(ctypes.byref(call_of(q, k, v, y)), None, None) == 0
    assert np.isnan(y[expected.size :]).all()
    np.testing.assert_allclose(y[: expected.size].reshape(expected.shape), expected, atol=tolerance(v), rtol=0)


@needs_kernel
def test_scores_that_differ_widely_do_not_overflow() -> None:
    """exp(400) is more than a float holds."""
    q, k, v = inputs_of("odd sizes")
    q *= np.float32(100)
    y = np.empty_like(reference(q, k, v), dtype=np.float32)
    assert loaded is not None
    assert loaded.mdnet_attention(ctypes.byref(call_of(q, k, v, y)), None, None) == 0
    np.testing.assert_allclose(y, reference(q, k, v), atol=tolerance(v), rtol=0)


@needs_kernel
@pytest.mark.parametrize("field", ["batch", "rows", "keys", "inner", "columns", "q_matrices", "v_matrices"])
def test_an_empty_call_is_refused(field: str) -> None:
    q, k, v = inputs_of("odd sizes")
    call = call_of(q, k, v, np.empty(reference(q, k, v).shape, np.float32))
    setattr(call, field, 0)
    assert loaded is not None
    assert loaded.mdnet_attention(ctypes.byref(call), None, None) == 3


# --- the operator ---


def model(inputs: list[np.ndarray], *, constant: bool = False) -> onnx.ModelProto:
    values = {name: array for name, array in zip("qkv", inputs, strict=True) if not constant or name == "q"}
    graph = helper.make_graph(
        [helper.make_node(ATTENTION, list("qkv"), ["y"], domain=DOMAIN)],
        "attention",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name, x in values.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * max(x.ndim for x in inputs))],
        [numpy_helper.from_array(x, n) for n, x in zip("qkv", inputs, strict=True) if n not in values],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, opset_imports=opsets, functions=[function(ATTENTION)], ir_version=10)


def run(inputs: list[np.ndarray], *, registered: bool, constant: bool = False) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if registered:
        options.register_custom_ops_library(str(native.custom_op_library()))
    session = onnxruntime.InferenceSession(
        model(inputs, constant=constant).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = dict(zip("qkv", inputs, strict=True))
    return session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})[0]


@pytest.mark.parametrize("name", SHAPES)
def test_the_function_body_agrees_with_float64(name: str) -> None:
    inputs = inputs_of(name)
    onnx.checker.check_model(model(inputs), full_check=True)
    got = run(inputs, registered=False)
    np.testing.assert_allclose(got, reference(*inputs), atol=tolerance(inputs[2]), rtol=0)


@needs_kernel
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_the_native_operator_agrees_with_float64(name: str, constant: bool) -> None:
    inputs = inputs_of(name)
    got = run(inputs, registered=True, constant=constant)
    expected = reference(*inputs)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=tolerance(inputs[2]), rtol=0)


@needs_kernel
def test_a_batch_is_its_images_bit_for_bit() -> None:
    q, k, v = inputs_of("heads")
    together = run([q, k, v], registered=True)
    for i in range(len(q)):
        alone = run([x[i : i + 1] for x in (q, k, v)], registered=True)
        np.testing.assert_array_equal(alone, together[i : i + 1])


@needs_kernel
@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (((2, 4, 3), (2, 5, 6), (2, 6, 7)), "the inner axes of q and k differ"),
        (((2, 4, 3), (2, 3, 6), (2, 5, 7)), "k and v need the same number of keys"),
        (((2, 4, 3), (3, 3, 6), (3, 6, 7)), "the matrices of one input must be as many"),
        (((4,), (4, 6), (6, 7)), "q, k and v must have 2 to 8 axes"),
        (((2, 4, 0), (2, 0, 6), (2, 6, 7)), "an axis is empty"),
    ],
)
def test_what_does_not_fit_is_refused(shapes: tuple[tuple[int, ...], ...], reason: str) -> None:
    with pytest.raises(Exception, match=f"BFloat16Attention: .*{reason}"):
        run([np.zeros(shape, np.float32) for shape in shapes], registered=True)


@needs_kernel
def test_an_empty_batch_gives_an_empty_result() -> None:
    assert run([np.zeros((0, *s), np.float32) for s in ((4, 3), (3, 6), (6, 7))], registered=True).shape == (0, 4, 7)
