"""Winograd convolutions as operators: with the native kernel and with the function body, against float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from convolutions import convolved
from onnx import TensorProto, helper, numpy_helper

from mdnet_engines.ops import native
from mdnet_engines.ops.selective_scan import DOMAIN, VERSION
from mdnet_engines.ops.winograd import CONV_QUANTIZE, CONV_SUMS, NAMES, function

RANDOM = np.random.default_rng(0)
loaded = native.library() if native.custom_op_library() else None
has_kernel = loaded is not None and loaded.mdnet_winograd_products() >= 0
needs_kernel = pytest.mark.skipif(not has_kernel, reason="on this processor a direct convolution is faster")
SCALES = {"x": (0.02, 117), "c": (0.05, 121), "a": (0.04, 99), "y": (0.06, 130)}
SHAPES = [(1, 1, 1, 1, 1), (2, 9, 13, 32, 40), (1, 8, 8, 64, 32)]  # batch, height, width, channels, outputs


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def in_bytes(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, np.uint8)


def arrays(name: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """All inputs of an operator, in their order."""
    *sizes, channels, outputs = shape
    w = RANDOM.integers(-64, 65, (outputs, channels, 3, 3), np.int8)
    made = {
        **{"x": in_bytes(*sizes, channels), "w": w, "bias": normal(outputs)},
        "w_scale": (RANDOM.uniform(0.5, 1, outputs) / 64 / np.sqrt(9 * channels)).astype(np.float32),
        "a": in_bytes(*sizes, outputs) if "QLinear" in name else 3 * normal(*sizes, outputs),
    }
    for of, (scale, point) in SCALES.items():
        made |= {f"{of}_scale": np.array(scale, np.float32), f"{of}_zero_point": np.array(point, np.uint8)}
    return {of: made[of] for of in function(name).input}


def stands_for(given: dict[str, np.ndarray], of: str) -> np.ndarray:
    if given[of].dtype != np.uint8:
        return given[of].astype(np.float64)
    return (given[of].astype(np.float64) - SCALES[of][1]) * np.float32(SCALES[of][0])


def expected(name: str, given: dict[str, np.ndarray]) -> np.ndarray:
    """What is rounded to y in the end, in float64; the convolution's own bytes are not."""
    w = given["w"] * given["w_scale"][:, None, None, None].astype(np.float64)
    c = convolved(stands_for(given, "x"), w, 1) + given["bias"]
    if name == CONV_QUANTIZE:
        return c
    limits = (np.array([0, 255]) - SCALES["c"][1]) * SCALES["c"][0]
    assert (np.clip(c, *limits) == c).all()  # or the function body would differ from the kernel
    return stands_for(given, "a") + c


def open_session(
    name: str,
    given: dict[str, np.ndarray],
    *,
    registered: bool,
    keep_bytes: int = 0,
    constant: tuple[str, ...] = ("w", "w_scale"),
    **options: Path,
) -> onnxruntime.InferenceSession:
    """One node, which has its function body too."""
    shape_of = {of: [None] * array.ndim for of, array in given.items()}
    output = TensorProto.UINT8 if name.endswith("Quantize") else TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node(name, list(given), ["y"], domain=DOMAIN, keep_bytes=keep_bytes)],
        "winograd",
        [
            helper.make_tensor_value_info(of, helper.np_dtype_to_tensor_dtype(array.dtype), shape_of[of])
            for of, array in given.items()
            if of not in constant
        ],
        [helper.make_tensor_value_info("y", output, [None] * 4)],
        [numpy_helper.from_array(given[of], of) for of in constant],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, VERSION)]
    proto = helper.make_model(graph, opset_imports=opsets, functions=[function(name)], ir_version=10)
    onnx.checker.check_model(proto, full_check=True)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 2
    settings.log_severity_level = 4
    if registered:
        settings.register_custom_ops_library(str(native.custom_op_library()))
    if "profile" in options:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(options["profile"] / "profile")
    return onnxruntime.InferenceSession(proto.SerializeToString(), settings, providers=["CPUExecutionProvider"])


def run(name: str, given: dict[str, np.ndarray], *, registered: bool, **options: int) -> np.ndarray:
    session = open_session(name, given, registered=registered, **options)  # type: ignore[arg-type]
    return session.run(None, {one.name: given[one.name] for one in session.get_inputs()})[0]


@pytest.mark.parametrize("keep_bytes", [0, 1])
@pytest.mark.parametrize("registered", [False, pytest.param(True, marks=needs_kernel)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_operator_convolves(name: str, shape: tuple[int, ...], registered: bool, keep_bytes: int) -> None:
    """To a step of its bytes; the function body's sum is of a convolution that is rounded too."""
    given = arrays(name, shape)
    y, exact = run(name, given, registered=registered, keep_bytes=keep_bytes), expected(name, given)
    of_float = np.sqrt(np.mean(expected(CONV_QUANTIZE, given) ** 2))
    bfloat16 = 0.1 * of_float if registered and loaded and loaded.mdnet_winograd_products() == 1 else 1e-4
    rounded = SCALES["c"][0] / 2 if name in CONV_SUMS.values() and not registered else 0
    if y.dtype == np.uint8:
        exact = np.clip(exact / np.float32(SCALES["y"][0]) + SCALES["y"][1], 0, 255)
        assert np.abs(y - exact).max() <= 0.501 + (bfloat16 + rounded) / SCALES["y"][0]
    else:
        assert np.abs(y - exact).max() <= bfloat16 + rounded


@needs_kernel
@pytest.mark.parametrize("name", NAMES)
def test_the_native_kernel_runs_where_the_library_is_registered(name: str, tmp_path: Path) -> None:
    given = arrays(name, SHAPES[0])
    session = open_session(name, given, registered=True, profile=tmp_path)
    session.run(None, {one.name: given[one.name] for one in session.get_inputs()})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    assert name in {event["args"].get("op_name") for event in events if event.get("cat") == "Node"}


@needs_kernel
@pytest.mark.parametrize("name", NAMES)
def test_no_image_at_all_has_no_result(name: str) -> None:
    assert run(name, arrays(name, (0, 4, 4, 3, 5)), registered=True).shape == (0, 4, 4, 5)


@needs_kernel
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"x": in_bytes(1, 4, 4, 3)}, "as many channels as w"),
        ({"bias": normal(1)}, "bias must have an element for each output"),
        ({"w_scale": np.ones(3, np.float32)}, "w_scale must have an element for each output"),
        ({"w": np.ones((8, 4, 1, 1), np.int8)}, "w must be outputs x channels x 3 x 3"),
        ({"a": normal(1, 4, 4, 1)}, "a must have the shape of y"),
        ({"x_scale": np.ones(2, np.float32)}, "scales and zero-points must be scalars"),
        ({"y_zero_point": np.ones(2, np.uint8)}, "scales and zero-points must be scalars"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, np.ndarray], reason: str) -> None:
    given = {**arrays("WinogradConvSumQuantize", (1, 4, 4, 4, 8)), **changes}
    with pytest.raises(Exception, match=f"WinogradConvSumQuantize: .*{reason}"):
        run("WinogradConvSumQuantize", given, registered=True)


@needs_kernel
def test_weights_that_are_no_constants_are_refused() -> None:
    with pytest.raises(Exception, match="w and w_scale must be constants"):
        run(CONV_QUANTIZE, arrays(CONV_QUANTIZE, (1, 4, 4, 4, 8)), registered=True, constant=("w_scale",))
