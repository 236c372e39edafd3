"""Any model that uses the scan, in any type, on its way into a file that runs with and without the native library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from mdnet.scan import selective_scan
from mdnet_engines.ops import native
from mdnet_engines.ops import selective_scan as scan_op
from mdnet_export.scan import attach_functions, translation_table


class Block(nn.Module):
    """One scan in each direction; parameters and activations in the types that they are given."""

    def __init__(self, mixes: torch.dtype = torch.float32, steps: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("A", -torch.rand(3, 4))
        self.register_buffer("D", torch.randn(3))
        self.register_buffer("bias", torch.randn(3))
        self.mixes, self.steps = mixes, steps

    def forward(self, x: Tensor) -> Tensor:
        u = x.to(self.steps)
        mix = torch.cat([x, x[:, :1]], dim=1).to(self.mixes)
        both = [selective_scan(u, u, self.A, mix, mix, self.D, u, self.bias, reverse) for reverse in (False, True)]
        return both[0].float() + both[1].float()  # ONNX Runtime adds no bfloat16 on the CPU


def exported(module: nn.Module, x: Tensor) -> onnx.ModelProto:
    program = torch.onnx.export(
        module.eval(), (x,), dynamo=True, opset_version=18, custom_translation_table=translation_table(), verbose=False
    )
    assert program is not None
    return attach_functions(program.model_proto)


def sessions(model: onnx.ModelProto) -> list[onnxruntime.InferenceSession]:
    """Nothing of ours; and the native library, where there is one."""
    found = []
    for library in (None, native.custom_op_library()):
        options = onnxruntime.SessionOptions()
        if library:
            options.register_custom_ops_library(str(library))
        found.append(onnxruntime.InferenceSession(model.SerializeToString(), options))
    return found


BLOCKS = {
    "float32": Block(),
    "float16": Block(torch.float16, torch.float16).half(),
    "bfloat16": Block(torch.bfloat16, torch.bfloat16).bfloat16(),
    "half activations, float32 parameters": Block(torch.float16, torch.float16),
    "half u, float32 B and C": Block(torch.float32, torch.float16),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_type_exports_to_a_file_that_runs_everywhere(kind: str) -> None:
    block, x = BLOCKS[kind], torch.randn(2, 3, 9)
    model = exported(block, x)
    onnx.checker.check_model(model, full_check=True)
    expected = block(x).numpy()
    for session in sessions(model):
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        # Two outputs are rounded to the half type and added: bfloat16 has 8 bits.
        limit = 1e-5 if kind == "float32" else 2.0**-6
        assert np.abs(got - expected).max() <= limit * np.abs(expected).max()


class Decoder(nn.Module):
    """A scan of version 2 whose state goes in and out, in two groups."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.options = options
        self.register_buffer("A", -torch.rand(6, 4))

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        mix = x[:, :4].unflatten(1, (1, 4)).expand(-1, 2, -1, -1)
        return selective_scan(x, x.abs(), self.A, mix, mix, h0=state, return_last_state=True, **self.options)


def exported_decoder(module: Decoder, x: Tensor, state: Tensor) -> onnx.ModelProto:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    program = torch.onnx.export(
        module.eval(),
        (x, state),
        dynamo=True,
        opset_version=18,
        dynamic_shapes=({0: batch, 2: length}, {0: batch}),
        custom_translation_table=translation_table(),
        verbose=False,
    )
    assert program is not None
    return attach_functions(program.model_proto)


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"delta_softplus": False}], ids=str)
def test_a_model_with_a_state_runs_in_pieces_of_any_length(options: dict[str, bool]) -> None:
    module = Decoder(**options)
    model = exported_decoder(module, torch.randn(2, 6, 9), torch.randn(2, 6, 4))
    onnx.checker.check_model(model, full_check=True)
    x, state = torch.randn(3, 6, 12), torch.randn(3, 6, 4)
    expected, last = (value.numpy() for value in module(x, state))
    reverse = options.get("reverse", False)
    for session in sessions(model):
        name_x, name_state = (value.name for value in session.get_inputs())
        pieces, h = {}, state.numpy()
        spans = [slice(0, 7), slice(7, 8), slice(8, 12)]
        for span in spans[::-1] if reverse else spans:
            pieces[span.start], h = session.run(None, {name_x: x[..., span].numpy(), name_state: h})
        got = np.concatenate([pieces[span.start] for span in spans], axis=2)
        for one, other in ((got, expected), (h, last)):
            assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()


class Bare(nn.Module):
    """No D, z, delta_bias or state; half activations but for B and C where `mixed`."""

    def __init__(self, last_state: bool = False, mixed: bool = False) -> None:
        super().__init__()
        self.last_state, self.mixed = last_state, mixed
        self.register_buffer("A", -torch.rand(3, 4))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        mix = torch.cat([x, x[:, :1]], dim=1)
        x = x.half() if self.mixed else x
        return selective_scan(x, x, self.A, mix, mix, return_last_state=self.last_state)


@pytest.mark.parametrize("module", [Bare(), Bare(last_state=True), Bare(mixed=True)], ids=["y", "state", "mixed"])
def test_missing_inputs_are_filled_in(module: Bare) -> None:
    x = torch.randn(2, 3, 9)
    model = exported(module, x)
    onnx.checker.check_model(model, full_check=True)
    results = module(x)
    expected = results if isinstance(results, tuple) else (results,)
    for session in sessions(model):
        for got, one in zip(session.run(None, {session.get_inputs()[0].name: x.numpy()}), expected, strict=True):
            limit = 2.0**-10 if module.mixed else 1e-5
            assert got.dtype == one.numpy().dtype
            assert np.abs(got - one.numpy()).max() <= limit * np.abs(one.numpy()).max()
    (scan,) = (node for node in model.graph.node if node.domain == scan_op.DOMAIN)
    assert scan.op_type == ("SelectiveScan2NoZState" if module.last_state else "SelectiveScan2NoZ")
    assert {attribute.name: helper.get_attribute_value(attribute) for attribute in scan.attribute} == {
        "plugin_namespace": b"mdnet",
        "aot": 1,
    }


def test_a_scan_with_too_many_states_for_the_plugin_keeps_its_body_in_tensorrt() -> None:
    module = Bare()
    module.A = -torch.rand(64, 65)
    model = exported(module, torch.randn(2, 64, 9))
    (scan,) = (node for node in model.graph.node if node.domain == scan_op.DOMAIN)
    assert not scan.attribute


def test_float64_is_refused_in_words() -> None:
    with pytest.raises(Exception, match="float64") as error:  # the exporter wraps what a translation raises
        exported(Block(torch.float64, torch.float64).double(), torch.randn(2, 3, 9))
    assert "model.float()" in str(error.value) or "model.float()" in str(error.value.__cause__)


def test_a_scan_in_a_branch_has_its_body_too() -> None:
    scan = helper.make_node(scan_op.REVERSE, list(scan_op.INPUTS), ["y"], domain=scan_op.DOMAIN)
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    branch = helper.make_graph([scan], "then", [], [result])
    other = helper.make_graph([helper.make_node("Identity", ["u"], ["y"])], "else", [], [result])
    node = helper.make_node("If", ["choice"], ["out"], then_branch=branch, else_branch=other)
    model = helper.make_model(helper.make_graph([node], "graph", [], []))
    assert [function.name for function in attach_functions(model).functions] == [scan_op.REVERSE]


def test_attaching_twice_adds_nothing(tmp_path: Path) -> None:
    model = exported(Block(), torch.randn(2, 3, 9))
    before = model.SerializeToString()
    assert attach_functions(model).SerializeToString() == before
    assert sorted(function.name for function in model.functions if function.domain == scan_op.DOMAIN) == [
        scan_op.FORWARD,
        scan_op.REVERSE,
    ]
