"""Half precision as typed ONNX: weights and activations in float16, float32 where half a range would not do.

What stays in float32, and why:
- the selective scan: its state sums hundreds of steps (it takes and gives float32 here);
- the Split that the scan's B and C come from: TensorRT-RTX 1.7.1 can't build the scan's body with a cast in between;
- normalisations and softmax: variances overflow and sums lose bits in float16;
- RMSNorm's residual stream, the sum of all layers so far, as the published Vim keeps it;
- nodes that the caller names, such as the score's head;
- values that came near to float16's largest number on calibration images (`near_overflow`);
- the inputs and outputs of the graph, so that graphs of different precision can be combined.

A quantised graph (`mdnet_calib.passes.int8`, `fp8`) is rewritten likewise. A scale becomes float16 as any weight does,
since TensorRT wants the scale's type to be that of the values around it, unless float16 would round it by too much:
then the values that it scales stay in float32, and what computes with them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mdnet_calib.ranges import largest_magnitudes
from mdnet_engines.errors import MDNetError
from mdnet_engines.ops import selective_scan as scan_op

NORMALISATION = frozenset(
    {
        "InstanceNormalization",
        "GroupNormalization",
        "LayerNormalization",
        "Pow",
        "ReduceMean",
        "ReduceSum",
        "Sqrt",
        "Reciprocal",
        "Softmax",
    }
)
_STATISTICS = frozenset({"ReduceMean", "Sqrt", "Reciprocal"})  # what takes these as input belongs to the norm as well
_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div"})
_B, _C = scan_op.INPUTS.index("B"), scan_op.INPUTS.index("C")
_HALF_MAX = float(np.finfo(np.float16).max)
QUANTISE, DEQUANTISE = "QuantizeLinear", "DequantizeLinear"
HEADROOM = 4
"""A value that reaches this part of float16's largest number on calibration images may pass it on others."""
QDQ_OPSET = 19
"""The first in which Q/DQ take float8, and scales in float16. Of opset 21, ONNX Runtime 1.32 can't load such graphs."""
_SCALE_ROUNDING = 2.0**-8  # of itself, at most: half a step of a weight of 7 bits


def to_fp16(
    proto: onnx.ModelProto,
    *,
    keep: Collection[str] = (),
    float32_values: Collection[str] = (),
    folder: Path | None = None,
) -> onnx.ModelProto:
    """The float32 graph with float16 inside, same inputs and outputs. `proto` is used up, as in `to_int8`.

    Args:
        proto: the graph with its weights loaded and the types of its values in `value_info`.
        keep: prefixes of node names that stay in float32; a node's name starts with its module's path.
        float32_values: values that no node may give or take in float16, such as `near_overflow` finds.
        folder: where the weights lie that are not in `proto`. Those that stay as they are stay there.

    Raises:
        MDNetError: a value has no type, or a node has a graph of its own (`If`, `Loop`, `Scan`).
    """
    large = set(float32_values) | _scaled_finely(proto, folder)
    # What is quantised and dequantised is as large afterwards.
    quantised = {node.output[0] for node in proto.graph.node if node.op_type == QUANTISE and node.input[0] in large}
    large |= {node.output[0] for node in proto.graph.node if node.op_type == DEQUANTISE and node.input[0] in quantised}
    around = {i for i, node in enumerate(proto.graph.node) if not large.isdisjoint([*node.input, *node.output])}
    return _Fp16Rewrite(proto, float32_nodes(proto, keep) | around, folder).run()


def near_overflow(
    proto: onnx.ModelProto,
    feeds: Iterable[Mapping[str, np.ndarray]],
    *,
    keep: Collection[str] = (),
) -> list[str]:
    """Names of the values that would be float16 but come within a factor of `HEADROOM` of its largest number, 65504.

    Args:
        feeds: inputs to run the float32 graph on.
        keep: as for `to_fp16`.

    Raises:
        MDNetError: a value is not finite even in float32.
    """
    stays = float32_nodes(proto, keep)
    half = {name for i, node in enumerate(proto.graph.node) if i not in stays for name in (*node.input, *node.output)}
    largest = largest_magnitudes(proto, feeds)
    if broken := [name for name, value in largest.items() if not np.isfinite(value)]:
        raise MDNetError(f"{broken[0]} is not finite on a calibration image, in float32 already")
    return [name for name, value in largest.items() if name in half and value > _HALF_MAX / HEADROOM]


def float32_nodes(proto: onnx.ModelProto, keep: Collection[str]) -> set[int]:
    """Positions in `proto.graph.node` of the nodes that stay in float32, by the rules of this module."""
    nodes = proto.graph.node
    producer = {output: node for node in nodes for output in node.output}
    feeds_rms_norm = {node.input[0] for node in nodes if node.op_type == "Pow"}
    states = {name for node in nodes if node.domain == scan_op.DOMAIN for name in node.input[_B : _C + 1]}
    chosen = set()
    for position, node in enumerate(nodes):
        sources = [producer[name].op_type for name in node.input if name in producer]
        elementwise = node.op_type in _ELEMENTWISE
        if (
            node.domain == scan_op.DOMAIN
            or node.op_type in NORMALISATION
            or node.name.startswith(tuple(keep))
            or (elementwise and not _STATISTICS.isdisjoint(sources))
            or (node.op_type == "Add" and node.output[0] in feeds_rms_norm)
            or (node.op_type == "Split" and not states.isdisjoint(node.output))
        ):
            chosen.add(position)
    return chosen


def _scaled_finely(proto: onnx.ModelProto, folder: Path | None) -> set[str]:
    """The values on the float side of Q/DQ whose scale float16 would round by too much."""
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    fine = set()
    for node in proto.graph.node:
        if node.op_type in (QUANTISE, DEQUANTISE) and node.input[1] in weights:
            scale = _array(weights[node.input[1]], folder)
            with np.errstate(over="ignore"):
                rounded = scale.astype(np.float16).astype(np.float32)
            if (np.abs(rounded - scale) > _SCALE_ROUNDING * scale).any():
                fine.add(node.input[0] if node.op_type == QUANTISE else node.output[0])
    return fine


class _Fp16Rewrite:
    """One pass in topological order. A value has the type its producer gave it; a consumer of another type gets a
    cast, shared with other such consumers. A weight is stored in its consumers' type, in both if they differ."""

    def __init__(self, proto: onnx.ModelProto, float32: set[int], folder: Path | None):
        self.proto, self.graph, self.float32, self.folder = proto, proto.graph, float32, folder
        self.weights = {tensor.name: tensor for tensor in self.graph.initializer}
        self.is_float = {tensor.name: tensor.data_type == TensorProto.FLOAT for tensor in self.graph.initializer}
        for value in (*self.graph.value_info, *self.graph.input, *self.graph.output):
            self.is_float[value.name] = value.type.tensor_type.elem_type == TensorProto.FLOAT
        for node in self.graph.node:  # a quantiser declares no types
            if node.op_type in (QUANTISE, DEQUANTISE):
                quantises = node.op_type == QUANTISE
                self.is_float |= {node.input[0]: quantises, node.output[0]: not quantises}
        self.half: set[str] = set()  # float values that are float16 now
        self.copies: dict[tuple[str, bool], str] = {}  # (value, as half) → its cast, or the weight in that type
        self.nodes: list[onnx.NodeProto] = []

    def run(self) -> onnx.ModelProto:
        outputs = {value.name for value in self.graph.output}
        for position, node in enumerate(self.graph.node):
            if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
                raise MDNetError(f"{node.name} ({node.op_type}) holds a graph of its own; fp16 can't be chosen for it")
            self._rewrite(node, half=position not in self.float32, outputs=outputs)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input}
        kept = [tensor for tensor in self.weights.values() if tensor.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)
        for value in self.graph.value_info:
            if value.name in self.half:
                value.type.tensor_type.elem_type = TensorProto.FLOAT16
        if any(node.op_type in (QUANTISE, DEQUANTISE) for node in self.nodes):
            for opset in self.proto.opset_import:
                if not opset.domain:
                    opset.version = max(opset.version, QDQ_OPSET)
        return self.proto

    def _rewrite(self, node: onnx.NodeProto, half: bool, outputs: set[str]) -> None:
        for i, name in enumerate(node.input):
            if name and self._float(name):
                node.input[i] = self._as(name, half)
        if half and node.op_type == "Cast" and self._float(node.output[0]):
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("to", TensorProto.FLOAT16))
        elif half and node.op_type in ("Constant", "ConstantOfShape"):
            half = False  # their type is in an attribute; consumers cast, and runtimes fold the cast
        self.nodes.append(node)
        if not half:
            return
        for i, name in enumerate(node.output):
            if not name or not self._float(name):
                continue
            if name in outputs:
                node.output[i] = inner = f"{name}_half"
                self.half.add(inner)
                self.is_float[inner] = True
                self.nodes.append(_cast(inner, name, TensorProto.FLOAT))
                self.copies[name, True] = inner
            else:
                self.half.add(name)

    def _as(self, name: str, half: bool) -> str:
        """The name under which the float value `name` can be had in the wanted type."""
        if (name in self.half) == half:
            return name
        if (name, half) not in self.copies:
            copy = f"{name}_{'half' if half else 'float'}"
            if name in self.weights:
                self.weights[copy] = _half_weight(self.weights[name], copy, self.folder)
            else:
                self.nodes.append(_cast(name, copy, TensorProto.FLOAT16 if half else TensorProto.FLOAT))
            self.copies[name, half] = copy
        return self.copies[name, half]

    def _float(self, name: str) -> bool:
        try:
            return self.is_float[name]
        except KeyError:
            raise MDNetError(f"the value {name} has no type in the graph; run onnx.shape_inference first") from None


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}/Cast", to=kind)


def _array(tensor: onnx.TensorProto, folder: Path | None) -> np.ndarray:
    return numpy_helper.to_array(tensor, base_dir=str(folder or ""))


def _half_weight(tensor: onnx.TensorProto, name: str, folder: Path | None) -> onnx.TensorProto:
    """A weight in float16. What is out of range becomes the largest finite value (masks of −inf stand for "none")."""
    values = _array(tensor, folder)
    return numpy_helper.from_array(np.clip(values, -_HALF_MAX, _HALF_MAX).astype(np.float16), name)
