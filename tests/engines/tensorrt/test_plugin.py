"""The TensorRT plugins, with NVIDIA's own bindings: TensorRT gets what the kernel was written for.

TensorRT itself can't be had here, and no kernel runs: see tests/support/tensorrt_stubs.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper
from scan_cases import PARAMETERS, SCAN_TOLERANCE, ScanCase, make_inputs, reference_scan

from mdnet_engines.cuda import kernel as cuda_kernel
from mdnet_engines.errors import MDNetError
from mdnet_engines.ops import native
from mdnet_engines.ops import selective_scan as scan_op
from mdnet_engines.ops.scan_shapes import VARIANTS
from mdnet_engines.tensorrt import plugin as tensorrt_plugin

BOTH = (scan_op.FORWARD, scan_op.REVERSE)
DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}  # NumPy's names, TensorRT's names
BATCHES = (1, 7, 64)
CHANNELS = (32, 33, 768)  # one block, one channel more, Vim-Small
STATES = (4, 16, 64)  # as many as each of the kernels has room for
SIZES = {"batch": -1, "channels": 33, "length": 197, "states": 16}  # all different; the batch is symbolic
SCALARS = ("channels", "length", "states")  # TensorRT passes them between the inputs and the output
CUDA_TYPES = {"activation": "const T*", "parameter": "const float*", "scalar": "int", "output": "T*"}
PTX_TYPES = {"activation": "u64", "parameter": "u64", "scalar": "u32", "output": "u64"}

Ask = Callable[..., Any]


def role(argument: str) -> str:
    """Of one of the kernel's arguments, as the operator has it."""
    if argument not in scan_op.INPUTS:
        return "output" if argument == "y" else "scalar"
    return "parameter" if argument in PARAMETERS else "activation"


def test_importing_the_module_imports_nothing_of_nvidia() -> None:
    code = "import sys, mdnet_engines.tensorrt.plugin; print(*sys.modules, sep='\\n')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    imported = result.stdout.split()
    assert "mdnet_engines.tensorrt.plugin" in imported
    assert not [module for module in imported if module.startswith(("tensorrt", "cuda", "nvidia"))]


def fake_tensorrt(version: str | None) -> ModuleType:
    module = ModuleType("tensorrt")
    if version is not None:
        module.__version__ = version  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(
    ("installed", "reason"),
    [
        (None, "can't be imported"),
        (fake_tensorrt("10.13.3.9"), "needs TensorRT 11 or newer, this is 10.13.3.9"),
        (fake_tensorrt("1.7.1.116"), "needs TensorRT 11 or newer, this is 1.7.1.116"),  # TensorRT-RTX under that name
        (fake_tensorrt(None), "needs TensorRT 11 or newer, this is of unknown version"),
        (fake_tensorrt("11.4.0.106"), "TensorRT 11.4.0.106 lacks tensorrt.plugin"),
    ],
)
def test_a_tensorrt_that_will_not_do_is_one_line(
    installed: ModuleType | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", installed)
    monkeypatch.delitem(sys.modules, "tensorrt.plugin", raising=False)
    with pytest.raises(MDNetError, match=re.escape(reason)) as caught:
        tensorrt_plugin.register_plugins()
    assert "mdnet[tensorrt]" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_plugin_is_registered_once(ask: Ask) -> None:
    answer = ask("registry")
    inputs = {**dict.fromkeys(BOTH, scan_op.INPUTS), **{name: each.inputs for name, each in VARIANTS.items()}}
    assert int(answer["version"].split(".")[0]) >= 11
    # TensorRT's parser looks for version "1" unless the node names another.
    assert sorted(answer["plugins"]) == [[name, "1"] for name in sorted(inputs)]
    assert {name: tuple(names) for name, names in answer["inputs"].items()} == inputs
    assert set(answer["attributes"].values()) == {0}
    assert not answer["imported_rtx"]


def test_the_names_are_those_of_the_operators() -> None:
    assert tensorrt_plugin.NAMESPACE == scan_op.DOMAIN
    assert tensorrt_plugin.PLUGINS == {scan_op.FORWARD: False, scan_op.REVERSE: True}


def test_a_node_must_say_which_implementation_it_wants(ask: Ask) -> None:
    assert "has both AOT and JIT implementations" in ask("undecided", name=scan_op.FORWARD)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_output_has_the_type_and_the_symbolic_shape_of_u(name: str, dtype: str, ask: Ask) -> None:
    answer = ask("describe", name=name, dtype=dtype, sizes=SIZES, batches=BATCHES)
    assert answer["types"] == [DTYPES[dtype]]
    assert answer["symbolic"] == [[True, False, False]]
    for batch in BATCHES:
        assert answer["shapes"][str(batch)] == [[batch, SIZES["channels"], SIZES["length"]]]


@pytest.mark.parametrize("name", BOTH)
def test_activations_are_of_one_of_three_types_and_parameters_float32(name: str, ask: Ask) -> None:
    answer = ask("describe", name=name, dtype="float32", sizes=SIZES, batches=BATCHES)
    tensors = (*scan_op.INPUTS, "y")
    expected = [["FLOAT" if n in PARAMETERS else kind for n in tensors] for kind in DTYPES.values()]
    assert sorted(answer["combinations"]) == sorted(expected)
    assert answer["layouts"] == ["LINEAR"]


@pytest.mark.parametrize("tensor", scan_op.INPUTS[1:])
def test_a_node_whose_tensors_do_not_fit_is_refused_in_words(tensor: str, ask: Ask) -> None:
    said = ask("misfit", name=scan_op.FORWARD, dtype="float32", sizes=SIZES, tensor=tensor)
    assert re.match(rf"{tensor} is \(.*\), but u \(-1, 33, 197\) and A \(.*\) need \(.*\)$", said), said


def ptx_parameters(ptx: str, kernel: str) -> list[str]:
    """The types of an entry point's parameters."""
    entry = re.search(rf"\.entry {kernel}\((.*?)\)", ptx, re.DOTALL)
    assert entry, f"no .entry {kernel}"
    return re.findall(r"\.param \.(\w+)", entry[1])


def cuda_parameters() -> dict[str, str]:
    """Name → type of the parameters of the kernels in the CUDA source."""
    declared = cuda_kernel.source().replace("\\\n", " ").partition("__global__")[2]
    parameters = re.search(r"\(([^()]*)\)\s*\{", declared)
    assert parameters
    pairs = (parameter.rsplit(maxsplit=1) for parameter in parameters[1].split(","))
    return {name: " ".join(kind.split()) for kind, name in pairs}


def test_the_kernel_takes_what_tensorrt_passes() -> None:
    assert cuda_parameters() == {name: CUDA_TYPES[role(name)] for name in cuda_kernel.ARGUMENTS}


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "states"), list(zip(CHANNELS, STATES, strict=True)))
def test_the_engine_gets_the_kernel_and_a_launch_that_covers_every_channel_once(
    name: str, dtype: str, channels: int, states: int, ask: Ask
) -> None:
    sizes = {**SIZES, "channels": channels, "states": states}
    tactics = ask("aot", name=name, dtype=dtype, sizes=sizes, batches=BATCHES)
    for tactic, answer in tactics.items():
        kernel = cuda_kernel.kernel_name(
            reverse=name == scan_op.REVERSE,
            dtype=dtype,  # type: ignore[arg-type]
            states=states,
            small=int(tactic) == tensorrt_plugin.TACTIC_SMALL,
        )
        assert answer["kernel"] == kernel
        assert ptx_parameters(answer["ptx"], kernel) == [PTX_TYPES[role(name)] for name in cuda_kernel.ARGUMENTS]
        (threads,) = re.findall(r"\.maxntid (\d+), 1, 1", answer["ptx"])
        for batch in map(str, BATCHES):
            assert dict(zip(SCALARS, answer["scalars"][batch], strict=True)) == {
                "channels": channels,
                "length": sizes["length"],
                "states": states,
            }
            assert answer["block"][batch] == [int(threads), 1, 1] == [cuda_kernel.THREADS, 1, 1]
            assert answer["shared"][batch] == [0]
            x, y, z = answer["grid"][batch]
            assert (x, z) == (int(batch), 1)
            per_block = cuda_kernel.channels_per_block(kernel)
            covered = Counter(c for block in range(y) for c in range(block * per_block, (block + 1) * per_block))
            assert {covered[c] for c in range(channels)} == {1}
            assert all(block * per_block < channels for block in range(y))  # none without a channel


@pytest.mark.parametrize("states", [1, 4, 5, 16, 17, 64])
def test_tensorrt_may_time_both_kernels_where_there_are_two(states: int, ask: Ask) -> None:
    answer = ask("aot", name=scan_op.FORWARD, dtype="float16", sizes={**SIZES, "states": states}, batches=BATCHES)
    both = 4 < states <= 16
    assert list(answer) == (["1", "2"] if both else ["0"])
    assert len({each["kernel"] for each in answer.values()}) == len(answer)


@pytest.mark.parametrize(("states", "small"), [*((states, False) for states in STATES), (16, True)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse", [False, True])
def test_the_ptx_of_one_kernel_is_that_kernel_alone(reverse: bool, dtype: str, states: int, small: bool) -> None:
    kernel = cuda_kernel.kernel_name(reverse=reverse, dtype=dtype, states=states, small=small)  # type: ignore[arg-type]
    whole, one = cuda_kernel.ptx(), tensorrt_plugin.ptx_of(kernel)
    assert re.findall(r"\.entry (\w+)", one) == [kernel]
    assert one.count("{") == one.count("}")
    assert ptx_parameters(one, kernel) == ptx_parameters(whole, kernel)
    start = one.index(f".visible .entry {kernel}(")
    body = one[start : one.index("\n}\n", start)]
    assert body in whole
    assert "ret;" in body
    for directive in (".version", ".target", ".address_size"):
        assert re.findall(rf"^\{directive} .*$", one, re.MULTILINE) == re.findall(
            rf"^\{directive} .*$", whole, re.MULTILINE
        )
    # What stands outside of all kernels is all there: a constant that one of them reads, for instance.
    outside = [line for line in whole.split(".visible .entry")[0].splitlines() if line.startswith(".global")]
    assert set(outside) <= set(one.splitlines())


@pytest.mark.skipif(native.custom_op_library() is None, reason="mdnet was installed without its native library")
@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("dtype", DTYPES)
def test_just_in_time_launches_the_same_kernel(name: str, dtype: str, ask: Ask) -> None:
    sizes = {**SIZES, "batch": 5}
    answer = ask("jit", name=name, dtype=dtype, sizes=sizes, stream=0x57)
    (call,) = (call for call in answer["calls"] if "kernel" in call)
    assert cuda_kernel.is_small(5, sizes["channels"], sizes["states"])
    kernel = cuda_kernel.kernel_name(
        reverse=name == scan_op.REVERSE,
        dtype=dtype,  # type: ignore[arg-type]
        states=sizes["states"],
        small=True,
    )
    assert call["kernel"] == kernel
    expected = {**answer["pointers"], **sizes}
    assert dict(zip(cuda_kernel.ARGUMENTS, call["values"], strict=True)) == {
        argument: expected[argument] for argument in cuda_kernel.ARGUMENTS
    }
    assert (call["grid"], call["block"]) == ([5, 5, 1], [cuda_kernel.THREADS, 1, 1])
    assert (call["shared"], call["stream"]) == (0, 0x57)


CASE = ScanCase("small", batch=2, channels=33, length=7, states=16, reverse=False)


def model(name: str, attributes: dict[str, str | int]) -> onnx.ModelProto:
    """One node with its function body; the parameters are weights, as in the real graphs, and the batch is symbolic."""
    inputs = make_inputs(CASE)
    activations = [n for n in scan_op.INPUTS if n not in PARAMETERS]

    def value(tensor: str, like: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(tensor, TensorProto.FLOAT, ["batch", *inputs[like].shape[1:]])

    graph = helper.make_graph(
        [helper.make_node(name, list(scan_op.INPUTS), ["y"], name="scan", domain=scan_op.DOMAIN, **attributes)],
        "one_scan",
        [value(n, n) for n in activations],
        [value("y", "u")],
        [numpy_helper.from_array(inputs[n], n) for n in PARAMETERS],
    )
    opsets = [helper.make_opsetid("", scan_op.OPSET), helper.make_opsetid(scan_op.DOMAIN, scan_op.VERSION)]
    return helper.make_model(graph, opset_imports=opsets, functions=[scan_op.function(name)], ir_version=10)


def test_the_parsers_attributes_have_the_types_it_reads() -> None:
    (node,) = model(scan_op.FORWARD, tensorrt_plugin.PARSER_ATTRIBUTES).graph.node
    kinds = {attribute.name: attribute.type for attribute in node.attribute}
    assert kinds == {"plugin_namespace": AttributeProto.STRING, "aot": AttributeProto.INT}
    assert helper.get_node_attr_value(node, "plugin_namespace") == scan_op.DOMAIN.encode()
    assert helper.get_node_attr_value(node, "aot") == 1


@pytest.mark.parametrize("name", BOTH)
def test_a_file_with_the_parsers_attributes_is_valid_onnx(name: str) -> None:
    scan_op.register_schemas()
    for attributes in (tensorrt_plugin.PARSER_ATTRIBUTES, {}):  # optional: a file without them stays valid
        onnx.checker.check_model(model(name, attributes), full_check=True)


@pytest.mark.parametrize("name", BOTH)
def test_stock_onnxruntime_runs_a_file_with_the_parsers_attributes(name: str) -> None:
    inputs = make_inputs(CASE)
    feeds = {n: value for n, value in inputs.items() if n not in PARAMETERS}
    results = []
    for attributes in (tensorrt_plugin.PARSER_ATTRIBUTES, {}):
        proto = model(name, attributes).SerializeToString()
        results += onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"]).run(None, feeds)
    expected = reference_scan(**inputs, reverse=name == scan_op.REVERSE)
    assert np.abs(results[0] - expected).max() <= SCAN_TOLERANCE * np.abs(expected).max()
    np.testing.assert_array_equal(*results)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the [rtx] extra")
@pytest.mark.parametrize("name", BOTH)
def test_tensorrt_rtx_takes_the_function_body_of_a_file_with_the_parsers_attributes(name: str, tmp_path: Path) -> None:
    file = tmp_path / "scan.onnx"
    onnx.save(model(name, tensorrt_plugin.PARSER_ATTRIBUTES), file)
    request = {"ask": "build", "runtime": "tensorrt-rtx", "graphs": {"scan": {"onnx": str(file), "tf32": False}}}
    request |= {"folder": str(tmp_path), "profiles": [[1, 4, 8]], "workspace": None, "targets": []}
    request |= {"level": None, "stripped": False, "compatible": False}
    command = [sys.executable, "-m", "mdnet_engines.tensorrt.plan_builder"]
    result = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    answer = json.loads(result.stdout.splitlines()[-1])["result"]
    assert answer["graphs"]["scan"]["layers"] > len(scan_op.function(name).node)  # the body's, not one plugin's
    assert (tmp_path / "scan.plan").stat().st_size == answer["graphs"]["scan"]["bytes"]
