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
