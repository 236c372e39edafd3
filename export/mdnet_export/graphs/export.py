"""MD-Net as three graphs: thin modules over the model's own parts, and their export to ONNX.

image (uint8, B×S×S×3) ─┬─ encoder ── down_s16, down_s32, mid_s64 ─┐
                        └─ vim ────── tokens ──────────────────────┴─ fusion ── score (B)
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from mdnet.model.diffusion import DiffusionEncoder, to_vae_range
from mdnet.model.fusion import Fusion
from mdnet.model.net import MDNet
from mdnet.model.vim import VisionMamba
from mdnet_engines.bundle.manifest import GraphName
from mdnet_engines.errors import MDNetError
from mdnet_engines.ops import selective_scan as scan_op
from mdnet_export.graphs.fold import fold_diffusion, fold_vim, with_shared_weights
from mdnet_export.scan import attach_functions, translation_table
from mdnet_export.scan.translate import quiet_exporter

EXTERNAL_DATA_BYTES = 16 * 2**20  # above this the weights go into a file of their own, which sessions map into memory


class EncoderGraph(nn.Module):
    """uint8 image → the diffusion features, with everything folded that timestep and prompt decide."""

    def __init__(self, encoder: DiffusionEncoder):
        super().__init__()
        encoder = with_shared_weights(encoder)
        fold_diffusion(encoder)
        self.vae, self.unet = encoder.vae.encoder, encoder.unet

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.unet.encode(self.vae(to_vae_range(image)), None, None).values())


class VimGraph(nn.Module):
    """uint8 image → all tokens."""

    def __init__(self, vim: VisionMamba):
        super().__init__()
        self.vim = with_shared_weights(vim)
        fold_vim(self.vim)

    def forward(self, image: Tensor) -> Tensor:
        return self.vim(image)


class FusionGraph(nn.Module):
    """Features and tokens → score."""

    def __init__(self, fusion: Fusion):
        super().__init__()
        self.fusion = fusion

    def forward(self, *inputs: Tensor) -> Tensor:
        *features, tokens = inputs
        return self.fusion(dict(zip(self.fusion.scales, features, strict=True)), tokens)


@dataclass(frozen=True)
class GraphSpec:
    """A graph to export: its module, and example inputs whose order and names are the graph's."""

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]


def graph_spec(model: MDNet, name: GraphName, batch: int = 2) -> GraphSpec:
    """The graph `name` of `model`, with example inputs of `batch` images."""
    config = model.config
    image = torch.zeros(batch, config.image_size, config.image_size, 3, dtype=torch.uint8)
    features = {key: torch.zeros(batch, *shape) for key, shape in config.feature_shapes.items()}
    if name == "encoder":
        return GraphSpec(EncoderGraph(model.diffusion), {"image": image}, tuple(features))
    if name == "vim":
        return GraphSpec(VimGraph(model.vim), {"image": image}, ("tokens",))
    tokens = torch.zeros(batch, config.vim_grid**2 + 1, config.vim_dim)
    return GraphSpec(FusionGraph(model.fusion), {**features, "tokens": tokens}, ("score",))


def export_graph(model: MDNet, name: GraphName, folder: Path) -> Path:
    """Export one graph to `folder/<name>.onnx`, checked by `onnx.checker`, any batch size.

    Graphs that use the selective scan carry its function body. Names of the exporting machine (stack traces, module
    paths) are stripped.
    """
    spec = graph_spec(model, name)
    with torch.no_grad(), quiet_exporter():
        program = torch.onnx.export(
            spec.module.eval(),
            tuple(spec.inputs.values()),
            dynamo=True,
            opset_version=scan_op.OPSET,
            input_names=list(spec.inputs),
            output_names=list(spec.outputs),
            dynamic_shapes=_dynamic_batch(spec),
            custom_translation_table=translation_table(),
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    del program
    strip_metadata(proto)
    _check_batch_is_symbolic(proto)
    attach_functions(proto)
    return save_graph(proto, folder / f"{name}.onnx")


def save_graph(proto: onnx.ModelProto, file: Path) -> Path:
    """Write a graph, large weights into a file next to it, and check the result."""
    large = proto.ByteSize() > EXTERNAL_DATA_BYTES
    onnx.save(proto, file, save_as_external_data=large, location=f"{file.name}.data", size_threshold=1024)
    scan_op.register_schemas()
    onnx.checker.check_model(file, full_check=True)
    return file


def strip_metadata(proto: onnx.ModelProto) -> None:
    """Remove what the exporter writes about the source code (file paths, stack traces); name nodes by their module.

    A node of `model.fusion.head.hidden` is then called `fusion.head.hidden/<its own name>`.
    """
    for node in proto.graph.node:
        scopes = {prop.key: prop.value for prop in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "[]")
        if module := [scope for scope in ast.literal_eval(scopes)[:-1] if scope]:
            node.name = f"{module[-1]}/{node.name}"
    del proto.metadata_props[:]
    proto.doc_string = ""
    graph = proto.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""


def _check_batch_is_symbolic(proto: onnx.ModelProto) -> None:
    # torch.export can settle on the example's batch without a word, for instance where a module calls len(tensor).
    for value in (*proto.graph.input, *proto.graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise MDNetError(f"the exporter fixed the batch of {value.name}; a module's Python code depends on it")


def _dynamic_batch(spec: GraphSpec) -> tuple[Any, ...]:
    batch = torch.export.Dim("batch", min=1)
    shapes = tuple({0: batch} for _ in spec.inputs)
    return (shapes,) if isinstance(spec.module, FusionGraph) else shapes  # *inputs is one argument to torch.export
