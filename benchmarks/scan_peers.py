"""What others have for Mamba-1's scan, for benchmarks/scan.py: ONNX Runtime's LinearAttention, and mambapy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import NodeProto, TensorProto, helper


def linear_attention(inputs: dict[str, np.ndarray]) -> onnx.ModelProto:
    """A model of one scan by `com.microsoft.LinearAttention`: a head for each channel, d_k = N, d_v = 1, one key.

    decay is dt·A, key B, value dt·u and query C; the rest of the formula is standard operators.
    """
    channels = inputs["A"].shape[0]
    node = helper.make_node
    sizes = {"one": [1], "two": [2], "last": [-1], "flat": [0, 0, -1], "heads": [1, 1, channels, 1]}
    nodes: list[NodeProto] = [
        *(node("Constant", [], [name], value_ints=value) for name, value in sizes.items()),
        node("Unsqueeze", ["delta_bias", "one"], ["bias_col"]),
        node("Add", ["delta", "bias_col"], ["biased"]),
        node("Softplus", ["biased"], ["dt"]),
        node("Mul", ["dt", "u"], ["dtu"]),
        *(node("Transpose", [of], [f"{of}_t"], perm=[0, 2, 1]) for of in ("dt", "dtu", "B", "C")),
        node("Unsqueeze", ["dt_t", "last"], ["dt_col"]),
        node("Mul", ["dt_col", "A"], ["exponent"]),
        node("Reshape", ["exponent", "flat"], ["decay"]),
        node("Unsqueeze", ["C_t", "two"], ["C_row"]),
        node("Tile", ["C_row", "heads"], ["C_heads"]),
        node("Reshape", ["C_heads", "flat"], ["query"]),
        node(
            "LinearAttention",
            ["query", "B_t", "dtu_t", "", "decay"],
            ["out", "state"],
            domain="com.microsoft",
            update_rule="gated",
            scale=1.0,
            q_num_heads=channels,
            kv_num_heads=channels,
        ),
        node("Transpose", ["out"], ["y_state"], perm=[0, 2, 1]),
        node("Unsqueeze", ["D", "one"], ["D_col"]),
        node("Mul", ["D_col", "u"], ["skip"]),
        node("Add", ["y_state", "skip"], ["sum"]),
        node("Sigmoid", ["z"], ["sigmoid"]),
        node("Mul", ["z", "sigmoid"], ["gate"]),
        node("Mul", ["sum", "gate"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in inputs.items()]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, inputs["u"].shape)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph(nodes, "scan", values, [y]), opset_imports=opsets, ir_version=10)


def linear_attention_run(inputs: dict[str, np.ndarray], threads: int) -> Callable[[], object] | str:
    """Runs it; or why this ONNX Runtime can't."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    model = linear_attention(inputs).SerializeToString()
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception:  # ONNX Runtime's exceptions share no base class of their own
        return f"not in ONNX Runtime {onnxruntime.__version__}"
    return lambda: session.run(None, inputs)


def mambapy_run(inputs: dict[str, np.ndarray]) -> Callable[[], object] | str:
    """The scan of mambapy's block, with what is around it there; or that the package is missing."""
    try:
        from mambapy.mamba import MambaBlock
    except ImportError:
        return "not installed"
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    u, delta, B, C, z = (tensors[name].mT.contiguous() for name in ("u", "delta", "B", "C", "z"))
    A, D, bias = (tensors[name] for name in ("A", "D", "delta_bias"))

    def run() -> torch.Tensor:
        with torch.no_grad():
            dt = torch.nn.functional.softplus(delta + bias)
            return MambaBlock.selective_scan(None, u, dt, A, B, C, D) * torch.nn.functional.silu(z)

    return run
