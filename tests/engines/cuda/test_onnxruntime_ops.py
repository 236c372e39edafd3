"""ONNX Runtime's CUDA operators, without a GPU and without ONNX Runtime: what they are, and what they launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cuda_stub
import pytest
from cuda_stub.ort_probe import CUDA, STREAM

from mdnet_engines.cuda import kernel as cuda_kernel
from mdnet_engines.ops import native, scan_v2
from mdnet_engines.ops import selective_scan as scan_op

FLOAT, TYPES = 1, {"float32": 1, "float16": 10, "bfloat16": 16}
SIZES = {"batch": 5, "channels": 36, "length": 197, "states": 16, "groups": 3}
PARAMETERS = ("A", "D", "delta_bias", "h0")

pytestmark = pytest.mark.skipif(
    native.custom_op_library() is None or cuda_stub.COMPILER is None, reason="needs the native library and a C compiler"
)

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run nodes, in one process."""
    return cuda_stub.probing("cuda_stub.ort_probe", tmp_path_factory.mktemp("cuda"))


def shapes(variant: scan_v2.Variant, *, grouped: bool = True, **changed: int) -> list[list[int]]:
    batch, channels, length, states, groups = {**SIZES, **changed}.values()
    mix = (batch, groups, states, length) if grouped else (batch, states, length)
    of = {
        **dict.fromkeys(("u", "delta", "z"), (batch, channels, length)),
        **dict.fromkeys(("B", "C"), mix),
        **dict.fromkeys(("D", "delta_bias"), (channels,)),
        **{"A": (channels, states), "h0": (batch, channels, states)},
    }
    return [list(of[name]) for name in variant.inputs]


def test_every_operator_is_there_for_cuda_in_every_type(run: Run) -> None:
    found = [each for each in run()["registered"] if each[0].startswith("SelectiveScan") and each[1] == CUDA]
    operators = {name: (variant.inputs, variant.outputs) for name, variant in scan_v2.VARIANTS.items()}
    operators |= dict.fromkeys((scan_op.FORWARD, scan_op.REVERSE), (scan_op.INPUTS, ("y",)))
    expected = [
        [
            name,
            CUDA,
            [FLOAT if tensor in PARAMETERS else kind for tensor in inputs],
            [kind if tensor == "y" else FLOAT for tensor in outputs],
        ]
        for name, (inputs, outputs) in operators.items()
        for kind in TYPES.values()
    ]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_variant_launches_its_kernel_with_its_tensors(dtype: str, run: Run) -> None:
    variants = [*scan_v2.VARIANTS.values()]
    answer = run(*({"name": v.name, "type": TYPES[dtype], "inputs": shapes(v)} for v in variants))
    assert not any(answer["said"])
    calls = [call for call in answer["calls"] if "kernel" in call]
    assert len(calls) == len(variants)
    for variant, call, outputs in zip(variants, calls, answer["outputs"], strict=True):
        name = cuda_kernel.kernel_name(reverse=variant.reverse, dtype=dtype, states=16, version=2)  # type: ignore[arg-type]
        assert (call["kernel"], call["stream"], call["grid"]) == (name, STREAM, [5, 1, 3])
        at = {tensor: 4096 * (i + 1) for i, tensor in enumerate(variant.inputs)}
        at |= {tensor: 4096 * (i + 101) for i, tensor in enumerate(variant.outputs)}
        scalars = {"channels": 12, "length": 197, "states": 16, "groups": 3, "softplus": int(variant.softplus)}
        assert call["values"] == [{**at, **scalars}.get(argument, 0) for argument in cuda_kernel.ARGUMENTS_V2]
        assert outputs == [[5, 36, 197], [5, 36, 16]][: 1 + variant.state]


def test_a_node_that_version_1_can_serve_takes_its_kernels(run: Run) -> None:
    variant = scan_v2.Variant()
    answer = run({"name": variant.name, "type": FLOAT, "inputs": shapes(variant, grouped=False)})
    (call,) = (call for call in answer["calls"] if "kernel" in call)
    assert call["kernel"] == cuda_kernel.kernel_name(reverse=False, dtype="float32", states=16, small=True)


def test_what_can_not_be_launched_is_refused_in_words(run: Run) -> None:
    variant = scan_v2.Variant(z=False, state=True)
    nodes = [shapes(variant, states=65), shapes(variant, groups=5), shapes(variant)]
    nodes[2][-1] = [5, 36, 17]
    answer = run(*({"name": variant.name, "type": FLOAT, "inputs": inputs} for inputs in nodes))
    says = ("at most 64 states", "its groups can't share the channels", "h0 is (5, 36, 17)")
    assert all(expected in said for expected, said in zip(says, answer["said"], strict=True)), answer["said"]
    assert not answer["calls"]
