"""Version 2 of the selective scan as ONNX operators: states, groups, no gate, no softplus.

ONNX functions have no optional inputs, and TensorRT's parser looks a function up by its name alone. So each variant is
an operator of its own in the domain "mdnet", whose version stays 1, because the names are new. `Variant` describes one,
and makes its name, schema and function body:

    y         = SelectiveScan2             (u, delta, A, B, C, D, z, delta_bias)
    y         = SelectiveScan2ReverseNoZ   (u, delta, A, B, C, D, delta_bias)
    y, h_last = SelectiveScan2NoZState     (u, delta, A, B, C, D, delta_bias, h0)

    B, C [batch, N, L] or [batch, G, N, L]: channel d takes group d // (D // G)      h0, h_last [batch, D, N], float32

Everything else is as in version 1 (`mdnet_engines.ops.selective_scan`). D and delta_bias are always there: zeros cost
nothing.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import onnx
from onnx import NodeProto, helper
from onnx.defs import OpSchema

from mdnet_engines.ops import scan_shapes
from mdnet_engines.ops.selective_scan import DOMAIN, OPSET, PARSER_SCHEMA, VERSION

_FLOATS = [f"tensor({kind})" for kind in ("float", "float16", "bfloat16")]
_PARAMETERS = ("A", "D", "delta_bias", "h0")  # float32 whatever the activations' type


class Variant(scan_shapes.Variant):
    """One operator, with its schema and function body."""

    def schema(self) -> OpSchema:
        """What `onnx.checker`, shape inference and onnxscript know of it."""
        return OpSchema(
            self.name,
            DOMAIN,
            VERSION,
            doc="Selective state-space scan (Mamba) along the last axis" + (", from its end." if self.reverse else "."),
            inputs=[OpSchema.FormalParameter(name, "P" if name in _PARAMETERS else "T") for name in self.inputs],
            outputs=[OpSchema.FormalParameter(name, "T" if name == "y" else "P") for name in self.outputs],
            type_constraints=[("T", _FLOATS, "activations"), ("P", ["tensor(float)"], "parameters and states")],
            attributes=PARSER_SCHEMA,
        )

    def function(self) -> onnx.FunctionProto:
        """Its function body: one `Scan` over time, whose channels are [G, P], the P channels of each group."""
        nodes = [
            *(_node("Cast", [name], [f"{name}32"], to=onnx.TensorProto.FLOAT) for name in self.inputs),
            # TensorRT's parser needs the constants of Scan's body to be values of the outer graph.
            *(_node("Constant", [], [name], value_ints=[value]) for name, value in _CONSTANTS.items()),
            *(_node("Shape", [of], [name], start=at, end=at + 1) for name, (of, at) in _SIZES.items()),
            _node("Concat", ["batch", "rest", "states", "length"], ["mix_shape"], axis=0),
            *(_node("Reshape", [f"{name}32", "mix_shape"], [f"{name}_mix"]) for name in ("B", "C")),  # [batch, G, N, L]
            _node("Shape", ["B_mix"], ["groups"], start=1, end=2),
            _node("Unsqueeze", ["delta_bias32", "one"], ["bias_col"]),
            _node("Add", ["delta32", "bias_col"], ["delta_biased"]),
            _node("Softplus" if self.softplus else "Identity", ["delta_biased"], ["dt"]),
            _node("Mul", ["dt", "u32"], ["dtu"]),
            _node("Concat", ["batch", "groups", "rest", "length"], ["row_shape"], axis=0),
            *(_node("Reshape", [name, "row_shape"], [f"{name}_rows"]) for name in ("dt", "dtu")),  # [batch, G, P, L]
            _node("Concat", ["groups", "rest", "states"], ["decay_shape"], axis=0),
            _node("Reshape", ["A32", "decay_shape"], ["A_rows"]),
            *self._first_state(),
            _node(
                "Scan",
                ["h_first", "dt_rows", "dtu_rows", "B_mix", "C_mix"],
                ["h_end", "y_rows"],
                body=_step(),
                num_scan_inputs=4,
                scan_input_axes=[3] * 4,
                scan_output_axes=[3],
                scan_input_directions=[int(self.reverse)] * 4,
                scan_output_directions=[int(self.reverse)],
            ),
            _node("Shape", ["u"], ["u_shape"]),
            _node("Reshape", ["y_rows", "u_shape"], ["y_state"]),
            _node("Unsqueeze", ["D32", "one"], ["D_col"]),
            _node("Mul", ["D_col", "u32"], ["skip"]),
            _node("Add", ["y_state", "skip"], ["y_sum"]),
            *self._gate(),
            _node("CastLike", ["y_gated", "u"], ["y"]),
        ]
        if self.state:
            nodes.append(_node("Concat", ["batch", "channels", "states"], ["h_shape"], axis=0))
            nodes.append(_node("Reshape", ["h_end", "h_shape"], ["h_last"]))
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_function(DOMAIN, self.name, list(self.inputs), list(self.outputs), nodes, opsets)

    def _first_state(self) -> list[NodeProto]:
        shape = _node("Concat", ["batch", "decay_sizes"], ["h_rows_shape"], axis=0)
        sizes = _node("Shape", ["A_rows"], ["decay_sizes"])
        if self.state:
            return [sizes, shape, _node("Reshape", ["h032", "h_rows_shape"], ["h_first"])]
        return [sizes, shape, _node("ConstantOfShape", ["h_rows_shape"], ["h_first"])]

    def _gate(self) -> list[NodeProto]:
        if not self.z:
            return [_node("Identity", ["y_sum"], ["y_gated"])]
        return [
            _node("Sigmoid", ["z32"], ["z_sigmoid"]),
            _node("Mul", ["z32", "z_sigmoid"], ["gate"]),
            _node("Mul", ["y_sum", "gate"], ["y_gated"]),
        ]


VARIANTS: dict[str, Variant] = {name: Variant(*astuple(each)) for name, each in scan_shapes.VARIANTS.items()}
"""Every variant by its operator's name."""

_CONSTANTS = {"rest": -1, "one": 1, "two": 2, "three": 3}
_SIZES = {"batch": ("u", 0), "length": ("u", 2), "channels": ("A", 0), "states": ("A", 1)}


def register_schemas() -> None:
    """Make the operators known to `onnx.checker`, shape inference and onnxscript, in this process. Idempotent."""
    for variant in VARIANTS.values():
        if not onnx.defs.has(variant.name, DOMAIN):
            onnx.defs.register_schema(variant.schema())


def _step() -> onnx.GraphProto:
    """One step: h [batch, G, P, N], dt and dtu [batch, G, P], B and C [batch, G, N]."""
    nodes = [
        _node("Unsqueeze", ["dt_t", "three"], ["dt_col"]),
        _node("Mul", ["dt_col", "A_rows"], ["exponent"]),  # A_rows comes from outside the body
        _node("Exp", ["exponent"], ["decay"]),
        _node("Mul", ["decay", "h_in"], ["kept"]),
        _node("Unsqueeze", ["dtu_t", "three"], ["dtu_col"]),
        _node("Unsqueeze", ["B_t", "two"], ["B_row"]),  # [batch, G, 1, N]
        _node("Mul", ["dtu_col", "B_row"], ["added"]),
        _node("Add", ["kept", "added"], ["h_out"]),
        _node("Unsqueeze", ["C_t", "three"], ["C_col"]),  # [batch, G, N, 1]
        _node("MatMul", ["h_out", "C_col"], ["y_col"]),
        _node("Squeeze", ["y_col", "three"], ["y_t"]),
    ]
    inputs, outputs = (
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names]
        for names in (("h_in", "dt_t", "dtu_t", "B_t", "C_t"), ("h_out", "y_t"))
    )
    return helper.make_graph(nodes, "step", inputs, outputs)


def _node(op_type: str, inputs: list[str], outputs: list[str], **attributes: Any) -> NodeProto:
    return helper.make_node(op_type, inputs, outputs, **attributes)
