"""SelectiveScan and SelectiveScanReverse as ONNX operators: schema, and a function body of standard operators.

The function body travels inside the ONNX file, so ONNX Runtime, polygraphy and TensorRT's parser run the file with
nothing of ours installed. Where a native kernel is registered for the same domain and name, it takes precedence.

    y = SelectiveScan(u, delta, A, B, C, D, z, delta_bias)                        domain "mdnet", version 1

    u, delta, z [batch, D, L]   A [D, N] (= −exp(A_log))   B, C [batch, N, L]   D, delta_bias [D]   → y [batch, D, L]

    dt = softplus(delta + delta_bias)
    h[t] = exp(dt[t]·A)·h[t−1] + dt[t]·u[t]·B[t]          y[t] = (Σₙ h[t]·C[t] + D·u[t])·silu(z[t])

The state is float32 whatever the type of the activations; A, D and delta_bias are float32 always. There are no
attributes to interpret: an ahead-of-time TensorRT plugin can't carry them, so the direction is in the operator's name.
Those that a node may have tell TensorRT's parser where the plugin is.
"""

from __future__ import annotations

import onnx
from onnx import helper
from onnx.defs import OpSchema

from mdnet_engines.ops.scan_shapes import INPUTS

DOMAIN = "mdnet"
VERSION = 1
OPSET = 18  # of the standard operators in the body
FORWARD = "SelectiveScan"
REVERSE = "SelectiveScanReverse"

_PER_STEP = ("u", "delta", "B", "C", "z")  # of the activations' type; A, D and delta_bias are parameters


def register_schemas() -> None:
    """Make both operators known to `onnx.checker`, shape inference and onnxscript, in this process. Idempotent."""
    for name in (FORWARD, REVERSE):
        if not onnx.defs.has(name, DOMAIN):
            onnx.defs.register_schema(_schema(name))


PARSER_SCHEMA = [
    OpSchema.Attribute("plugin_namespace", OpSchema.AttrType.STRING, "of TensorRT's plugin", required=False),
    OpSchema.Attribute("aot", OpSchema.AttrType.INT, "1: build TensorRT's plugin ahead of time", required=False),
]
"""Attributes for TensorRT's parser (`mdnet_engines.tensorrt.plugin`); no other runtime reads them."""


def _schema(name: str) -> OpSchema:
    floats = [f"tensor({kind})" for kind in ("float", "float16", "bfloat16")]
    return OpSchema(
        name,
        DOMAIN,
        VERSION,
        doc="Selective state-space scan (Mamba) along the last axis" + (", from its end." if name == REVERSE else "."),
        inputs=[OpSchema.FormalParameter(n, "T" if n in _PER_STEP else "P") for n in INPUTS],
        outputs=[OpSchema.FormalParameter("y", "T")],
        type_constraints=[("T", floats, "activations"), ("P", ["tensor(float)"], "parameters")],
        attributes=PARSER_SCHEMA,
    )


def function(name: str) -> onnx.FunctionProto:
    """The function body of `name`, `FORWARD` or `REVERSE`.

    One `Scan` over time; what does not depend on the state is computed for all steps at once outside of it.
    """
    body = helper.make_graph(
        [
            helper.make_node("Unsqueeze", ["dt_t", "last"], ["dt_col"]),  # (batch, D, 1)
            helper.make_node("Mul", ["dt_col", "A32"], ["exponent"]),  # A32 comes from outside the body
            helper.make_node("Exp", ["exponent"], ["decay"]),  # (batch, D, N)
            helper.make_node("Mul", ["decay", "h_in"], ["kept"]),
            helper.make_node("Unsqueeze", ["dtu_t", "last"], ["dtu_col"]),
            helper.make_node("Unsqueeze", ["B_t", "middle"], ["B_row"]),  # (batch, 1, N)
            helper.make_node("Mul", ["dtu_col", "B_row"], ["added"]),
            helper.make_node("Add", ["kept", "added"], ["h_out"]),
            helper.make_node("Unsqueeze", ["C_t", "last"], ["C_col"]),  # (batch, N, 1)
            helper.make_node("MatMul", ["h_out", "C_col"], ["y_col"]),  # (batch, D, 1)
            helper.make_node("Squeeze", ["y_col", "last"], ["y_t"]),
        ],
        "step",
        [_float(n) for n in ("h_in", "dt_t", "dtu_t", "B_t", "C_t")],
        [_float(n) for n in ("h_out", "y_t")],
    )
    backwards = int(name == REVERSE)
    nodes = [
        *(helper.make_node("Cast", [n], [f"{n}32"], to=onnx.TensorProto.FLOAT) for n in INPUTS),
        # TensorRT's parser needs the body's constants to be values of the outer graph.
        *(_constant(n, value) for n, value in (("last", [2]), ("middle", [1]))),
        helper.make_node("Unsqueeze", ["delta_bias32", "middle"], ["bias_col"]),
        helper.make_node("Add", ["delta32", "bias_col"], ["delta_biased"]),
        helper.make_node("Softplus", ["delta_biased"], ["dt"]),
        helper.make_node("Mul", ["dt", "u32"], ["dtu"]),
        helper.make_node("Shape", ["u"], ["batch"], start=0, end=1),
        helper.make_node("Shape", ["A"], ["states"]),  # (D, N)
        helper.make_node("Concat", ["batch", "states"], ["h_shape"], axis=0),
        helper.make_node("ConstantOfShape", ["h_shape"], ["h_zero"]),
        helper.make_node(
            "Scan",
            ["h_zero", "dt", "dtu", "B32", "C32"],
            ["h_last", "y_state"],
            body=body,
            num_scan_inputs=4,
            scan_input_axes=[2] * 4,
            scan_output_axes=[2],
            scan_input_directions=[backwards] * 4,
            scan_output_directions=[backwards],
        ),
        helper.make_node("Unsqueeze", ["D32", "middle"], ["D_col"]),
        helper.make_node("Mul", ["D_col", "u32"], ["skip"]),
        helper.make_node("Add", ["y_state", "skip"], ["y_sum"]),
        helper.make_node("Sigmoid", ["z32"], ["z_sigmoid"]),
        helper.make_node("Mul", ["z32", "z_sigmoid"], ["gate"]),
        helper.make_node("Mul", ["y_sum", "gate"], ["y32"]),
        helper.make_node("CastLike", ["y32", "u"], ["y"]),
    ]
    return helper.make_function(DOMAIN, name, list(INPUTS), ["y"], nodes, [helper.make_opsetid("", OPSET)])


def _float(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)


def _constant(name: str, values: list[int]) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value_ints=values)
