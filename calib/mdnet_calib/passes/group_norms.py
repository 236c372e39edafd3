"""Finding group normalisation in a graph, as torch's exporter writes it.

x → Reshape [0, groups, −1] → InstanceNormalization (ones, zeros) → Reshape to x's shape → Mul gamma → Add beta
  ( → Sigmoid → Mul )
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from onnx import NodeProto

from mdnet_calib.passes.graph_view import GraphView, attribute


@dataclass(frozen=True)
class GroupNorm:
    """Group normalisation of x, which has 4 axes, channels second; and SiLU behind it, or not."""

    x: str
    groups: int
    epsilon: float
    gamma: str
    beta: str
    """Constants with an element for each channel."""
    silu: bool
    nodes: list[NodeProto]
    """In their order; nothing else reads what is between them."""

    def attributes(self) -> dict[str, Any]:
        """Those of our operators with group normalisation."""
        return {"groups": self.groups, "epsilon": self.epsilon}


def group_norm(view: GraphView, norm: NodeProto) -> GroupNorm | None:
    """The group normalisation around an InstanceNormalization, if it is exactly what this module describes."""
    if norm.op_type != "InstanceNormalization":
        return None
    grouped = view.producer.get(norm.input[0])
    restored = view.only_reader(norm, "Reshape")
    scaled = view.only_reader(restored, "Mul")
    shifted = view.only_reader(scaled, "Add")
    if not (grouped and restored and scaled and shifted) or view.only_reader(grouped) is None:
        return None
    groups = _groups(view, norm, grouped)
    x = grouped.input[0]
    shape = view.producer.get(restored.input[1])
    gamma, beta = _parameter(view, scaled, restored, x), _parameter(view, shifted, scaled, x)
    if not (groups and gamma and beta and shape and _is_shape_of(shape, x)):
        return None
    if view.constants[gamma].dims[0] % groups or restored.input[0] != norm.output[0]:
        return None
    gate = view.silu(shifted)
    nodes = [shape, grouped, norm, restored, scaled, shifted, *gate]
    return GroupNorm(x, groups, attribute(norm, "epsilon", 1e-5), gamma, beta, bool(gate), nodes)


def _groups(view: GraphView, norm: NodeProto, grouped: NodeProto) -> int:
    """How many groups are normalised; 0 if the nodes do something else too."""
    if grouped.op_type != "Reshape" or attribute(grouped, "allowzero", 0):
        return 0
    target, scale, bias = (view.array(name) for name in (grouped.input[1], *norm.input[1:]))
    if target is None or scale is None or bias is None or (scale != 1).any() or bias.any():
        return 0
    return scale.size if target.tolist() == [0, scale.size, -1] else 0


def _parameter(view: GraphView, node: NodeProto, before: NodeProto, x: str) -> str | None:
    """The constant operand of Mul or Add, if it has one float for each channel of x."""
    (name, *others) = [name for name in node.input if name != before.output[0]] or [""]
    shape = view.shapes.get(x, [])
    if others or len(shape) != 4 or not shape[1]:
        return None
    return name if view.floats(name) == [shape[1], 1, 1] else None


def _is_shape_of(node: NodeProto, x: str) -> bool:
    """Whether `node` gives x's whole shape."""
    whole = not any(found.name == "end" or found.i for found in node.attribute)
    return whole and node.op_type == "Shape" and node.input[0] == x
