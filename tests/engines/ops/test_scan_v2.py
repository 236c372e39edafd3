"""The operators of version 2: their function bodies in hosts that have nothing of ours, and the native kernel."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx_evaluator import evaluate
from scan_cases import (
    CUDA_TOLERANCE,
    EVERY_VARIANT_CASE,
    VARIANT_CASES,
    VariantCase,
    assert_close,
    expected_of,
    make_variant_inputs,
)
from scan_model import run_variant, variant_model, variant_of

from mdnet_engines.cuda import kernel as cuda_kernel
from mdnet_engines.ops import native, scan_v2
from mdnet_engines.ops import selective_scan as scan_op
from mdnet_engines.sessions.onnxruntime import cuda_problem
from mdnet_engines.tensorrt.plugin import PARSER_ATTRIBUTES

VARIANTS = [*scan_v2.VARIANTS.values()]
needs_library = pytest.mark.skipif(
    native.custom_op_library() is None, reason="mdnet was installed without its native library"
)
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
every_case = pytest.mark.parametrize("case", EVERY_VARIANT_CASE, ids=lambda case: case.name)
ON_CUDA = [case for case in EVERY_VARIANT_CASE if case.states <= cuda_kernel.MAX_STATES]
QUIET = 4


def session(
    proto: onnx.ModelProto,
    *,
    registered: bool,
    profile: Path | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = QUIET
    if registered:
        options.register_custom_ops_library(str(native.custom_op_library()))
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile / "profile")
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=list(providers))


def test_names_and_inputs_say_what_a_variant_has() -> None:
    assert len(VARIANTS) == len(scan_v2.VARIANTS) == 16
    assert scan_v2.Variant().name == "SelectiveScan2"
    bare = scan_v2.Variant(reverse=True, z=False, softplus=False, state=True)
    assert bare.name == "SelectiveScan2ReverseNoZNoSoftplusState"
    assert bare.inputs == ("u", "delta", "A", "B", "C", "D", "delta_bias", "h0")
    assert bare.outputs == ("y", "h_last")
    assert scan_v2.Variant().inputs == scan_op.INPUTS


@every_case
def test_stock_onnxruntime_runs_the_function_body(case: VariantCase) -> None:
    inputs = make_variant_inputs(case)
    model = variant_model(variant_of(case), case.dtype, grouped=case.groups > 0)
    got = run_variant(session(model, registered=False), case, inputs)
    for one, exact, dtype in zip(got, expected_of(case, inputs), (case.dtype, "float32"), strict=False):
        assert_close(one, exact, dtype)


@needs_library
@every_case
def test_the_native_kernel_agrees_with_the_reference(case: VariantCase) -> None:
    inputs = make_variant_inputs(case)
    model = variant_model(variant_of(case), case.dtype, grouped=case.groups > 0)
    got = run_variant(session(model, registered=True), case, inputs)
    for one, exact, dtype in zip(got, expected_of(case, inputs), (case.dtype, "float32"), strict=False):
        assert_close(one, exact, dtype)


@needs_library
@every_variant
def test_the_native_kernel_runs_although_the_file_has_a_function_body(variant: scan_v2.Variant, tmp_path: Path) -> None:
    case = VariantCase(
        "one", 2, 6, 5, 4, variant.reverse, groups=2, without=() if variant.z else ("z",), state=variant.state
    )
    profiled = session(variant_model(variant), registered=True, profile=tmp_path)
    run_variant(profiled, case, make_variant_inputs(case))
    events = json.loads(Path(profiled.end_profiling()).read_text())
    assert {event["args"]["op_name"] for event in events if event.get("args", {}).get("op_name")} == {variant.name}


# onnx's own evaluator has a softplus that overflows above 88: its limit, not the function body's.
GENTLE = [case for case in VARIANT_CASES if case.elements <= 5_000 and case.delta_mean == 0]


@pytest.mark.parametrize("case", GENTLE, ids=lambda case: case.name)
def test_onnx_reference_evaluator_runs_the_function_body(case: VariantCase) -> None:
    inputs = make_variant_inputs(case)
    zeros = dict.fromkeys(("D", "delta_bias"), np.zeros(case.channels, np.float32))
    got = evaluate(variant_model(variant_of(case), grouped=case.groups > 0), {**zeros, **inputs})
    for one, exact in zip(got, expected_of(case, inputs), strict=False):
        assert_close(one, exact)


@every_variant
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_full_check_passes_with_the_schemas_registered(variant: scan_v2.Variant, dtype: str) -> None:
    scan_v2.register_schemas()
    onnx.checker.check_model(variant_model(variant, dtype), full_check=True)


@pytest.mark.parametrize("registered", [False, pytest.param(True, marks=needs_library)])
def test_one_file_takes_groups_or_none(registered: bool) -> None:
    """B and C may have three axes or four; a file whose shapes say neither runs with both."""
    variant = scan_v2.Variant(state=True)
    model = variant_model(variant)
    for value in model.graph.input:
        if value.name in ("B", "C"):
            value.type.tensor_type.ClearField("shape")
    both = session(model, registered=registered)
    for groups in (0, 1, 3):
        case = VariantCase("rank", 2, 6, 9, 4, reverse=False, groups=groups, state=True)
        inputs = make_variant_inputs(case)
        for one, exact in zip(run_variant(both, case, inputs), expected_of(case, inputs), strict=True):
            assert_close(one, exact)


@needs_library
@pytest.mark.parametrize("name", ["B", "C", "h0", "z"])
def test_what_makes_no_sense_is_refused_in_words(name: str) -> None:
    case = VariantCase("spoilt", 2, 6, 5, 4, reverse=False, groups=2, state=True)
    variant = variant_of(case)
    model = variant_model(variant)
    for value in model.graph.input:
        value.type.tensor_type.ClearField("shape")  # or ONNX Runtime itself refuses another number of axes
    inputs = make_variant_inputs(case)
    good = inputs[name].shape
    spoilt = tuple(size + (axis == len(good) - 1) for axis, size in enumerate(good))
    with pytest.raises(Exception, match="SelectiveScan2State") as error:
        run_variant(session(model, registered=True), case, {**inputs, name: np.ones(spoilt, np.float32)})
    for words in (name, str(spoilt), str(good)):
        assert words in str(error.value)


@needs_library
@pytest.mark.parametrize("groups", [0, 4])
def test_groups_that_can_not_share_the_channels_are_refused(groups: int) -> None:
    case = VariantCase("spoilt", 2, 6, 5, 4, reverse=False, groups=2)
    mixes = {name: np.ones((2, groups, 4, 5), np.float32) for name in ("B", "C")}
    with pytest.raises(Exception, match=r"SelectiveScan2: B is .* groups"):
        run_variant(
            session(variant_model(variant_of(case)), registered=True), case, {**make_variant_inputs(case), **mixes}
        )


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the [rtx] extra")
@pytest.mark.parametrize("grouped", [True, False])
def test_tensorrt_rtx_builds_the_function_body_of_every_variant(grouped: bool, tmp_path: Path) -> None:
    graphs = {}
    parameters = {"A": np.full((8, 4), -1, np.float32), **dict.fromkeys(("D", "delta_bias"), np.ones(8, np.float32))}
    for variant in VARIANTS:
        sizes = {"channels": 8, "states": 4, "length": 7, "groups": 2}
        model = variant_model(variant, grouped=grouped, sizes=sizes)
        model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in parameters.items())
        inputs = [value for value in model.graph.input if value.name not in parameters]  # each with the batch first
        del model.graph.input[:]
        model.graph.input.extend(inputs)
        (node,) = (node for node in model.graph.node if node.op_type == variant.name)
        node.attribute.extend(onnx.helper.make_attribute(*pair) for pair in PARSER_ATTRIBUTES.items())
        onnx.save(model, tmp_path / f"{variant.name}.onnx")
        graphs[variant.name] = {"onnx": str(tmp_path / f"{variant.name}.onnx"), "tf32": False}
    request = {"ask": "build", "runtime": "tensorrt-rtx", "graphs": graphs, "folder": str(tmp_path), "targets": []}
    request |= {"profiles": [[1, 4, 8]], "level": None, "stripped": False, "compatible": False, "workspace": None}
    command = [sys.executable, "-m", "mdnet_engines.tensorrt.plan_builder"]
    result = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    answer = json.loads(result.stdout.splitlines()[-1])["result"]
    assert set(answer["graphs"]) == set(scan_v2.VARIANTS)
    for name, built in answer["graphs"].items():
        assert (tmp_path / f"{name}.plan").stat().st_size == built["bytes"]


@every_variant
def test_operator_and_body_need_nothing_but_standard_operators(variant: scan_v2.Variant) -> None:
    function = variant.function()
    (step,) = [a.g for node in function.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    assert {node.domain for node in (*function.node, *step.node)} == {""}
    assert not step.initializer  # TensorRT's parser takes a body's constants only as values of the outer graph
    assert "Constant" not in {node.op_type for node in step.node}
    assert not function.attribute  # an ahead-of-time TensorRT plugin can't carry any


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_CUDA, ids=lambda case: case.name)
def test_agrees_with_the_reference_on_cuda(case: VariantCase, tmp_path: Path) -> None:
    assert cuda_problem() == ""  # which also loads CUDA's libraries
    variant, inputs = variant_of(case), make_variant_inputs(case)
    model = variant_model(variant, case.dtype, grouped=case.groups > 0)
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    on_gpu = session(model, registered=True, profile=tmp_path, providers=providers)
    got = run_variant(on_gpu, case, inputs)
    for one, exact, dtype in zip(got, expected_of(case, inputs), (case.dtype, "float32"), strict=False):
        assert_close(one, exact, dtype, CUDA_TOLERANCE)
    events = json.loads(Path(on_gpu.end_profiling()).read_text())
    ran = [event["args"] for event in events if event.get("args", {}).get("op_name") == variant.name]
    assert {event["provider"] for event in ran} == {"CUDAExecutionProvider"}
