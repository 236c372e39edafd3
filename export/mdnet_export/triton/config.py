"""A bundle's graphs for Triton: `config.pbtxt` of the three models and of the ensemble that joins them.

A configuration is made as nested dicts and lists with the field names of Triton's `ModelConfig`, and written in
protobuf's text format by `to_text`; a test reads it back with Triton's own protobuf.

Which fields Triton takes where was read from the sources of its core, `onnxruntime_backend` and `tensorrt_backend`:
- `dims` leave the batch axis out. A tensor of shape [batch] is `dims: [1]` with an empty `reshape`: Triton shows it as
  rows of one number;
- an ensemble has neither warm-up nor instances, and is joined by the models' `dims`, not by their `reshape`;
- a path in `model_operations` goes to ONNX Runtime unchanged: it is looked up where the server runs;
- the TensorRT backend has one execution context for each profile of an instance, and runs batches of any size on it.
  TensorRT 11 is reported to leak the plugins' CUDA modules when a context's sizes change (NVIDIA/TensorRT#4849). So
  batches run as CUDA graphs, which the backend captures for a few sizes when it loads the model. Within the lower bound
  of a graph it pads a batch by itself. The key of a graph has the inputs' shapes: without them no bound is ever met.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mdnet_engines.bundle.manifest import GRAPH_NAMES, BatchRange, GraphEntry, GraphName, Manifest, TensorSpec
from mdnet_engines.errors import BundleError
from mdnet_export.triton.readme import facts

TritonBackend = Literal["onnxruntime", "tensorrt"]
Kind = Literal["cpu", "gpu"]
VERSION = 1
"""Of every model. The ensemble names it: graphs of different bundles don't fit together."""

_TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32", "float16": "TYPE_FP16"}


class Enum(str):
    """A name of an enumeration: the one text that is written without quotes."""


@dataclass(frozen=True)
class Serving:
    """How Triton is to run the models.

    `name` is the ensemble's, and the beginning of the others'. `queue_delay` is how long a request may wait for others
    to share a batch with, in microseconds.
    """

    name: str
    backend: TritonBackend
    kind: Kind
    instances: int
    max_batch_size: int
    queue_delay: int
    plan_batch: BatchRange | None = None
    """The sizes that the plans take, of TensorRT alone."""

    def profiles(self) -> list[tuple[int, int, int]]:
        """The plans' optimisation profiles that batches can run in."""
        every = self.plan_batch.profiles() if self.plan_batch else []
        return [profile for profile in every if profile[0] <= self.max_batch_size]

    def sizes(self) -> list[int]:
        """The sizes that plans run at, batches being padded: powers of two, the limit, and those they are tuned for.

        All profiles but the last end at the size that they are tuned for: what is padded stays in its profile.
        """
        powers = (1 << power for power in range(self.max_batch_size.bit_length()))
        tuned = (best for _, best, _ in self.profiles() if best < self.max_batch_size)
        return sorted({*powers, *tuned, self.max_batch_size})

    def model(self, graph: GraphName) -> str:
        """What the model of one graph is called."""
        return f"{self.name}_{graph}"


def model_config(
    manifest: Manifest, graph: GraphName, serving: Serving, *, file: str, op_library: str | None = None
) -> dict[str, Any]:
    """The configuration of one graph's model.

    Args:
        file: the graph's file in the version's folder.
        op_library: the native library's path where the server runs, to be registered with ONNX Runtime.
    """
    entry = manifest.graphs[graph]
    entry = entry.on_gpus() if serving.kind == "gpu" else entry
    sizes = sorted({1, serving.max_batch_size})
    config: dict[str, Any] = {
        "name": serving.model(graph),
        "backend": serving.backend,
        "default_model_filename": file,
        "max_batch_size": serving.max_batch_size,
        "input": [_tensor(spec) for spec in entry.inputs],
        "output": [_tensor(spec) for spec in entry.outputs],
        "version_policy": {"specific": {"versions": [VERSION]}},
        "instance_group": [{"count": serving.instances, "kind": Enum(f"KIND_{serving.kind.upper()}")}],
        "dynamic_batching": {"max_queue_delay_microseconds": serving.queue_delay},
        "model_warmup": [_warmup(entry, size) for size in sizes],
        "parameters": _parameters({"bundle": manifest.digest(), "precision": entry.precision}),
    }
    if serving.plan_batch:
        config["optimization"] = {"cuda": {"graphs": True, "graph_spec": _graph_specs(entry, serving.sizes())}}
        if len(profiles := serving.profiles()) > 1:
            config["instance_group"][0]["profile"] = [str(number) for number in range(len(profiles))]
        if not serving.queue_delay:  # with a delay, Triton would send a size that it prefers without waiting for more
            config["dynamic_batching"]["preferred_batch_size"] = serving.sizes()
    if op_library:
        config["model_operations"] = {"op_library_filename": [op_library]}
    return config


def ensemble_config(manifest: Manifest, serving: Serving) -> dict[str, Any]:
    """The configuration of the ensemble: preprocessed images in, scores out, and how the first are made."""
    graphs = manifest.graphs
    return {
        "name": serving.name,
        "platform": "ensemble",
        "max_batch_size": serving.max_batch_size,
        "input": [_tensor(spec, reshape=False) for spec in graphs["encoder"].inputs],
        "output": [_tensor(spec, reshape=False) for spec in graphs["fusion"].outputs if spec.name == "score"],
        "version_policy": {"specific": {"versions": [VERSION]}},
        "ensemble_scheduling": {
            "step": [
                {
                    "model_name": serving.model(name),
                    "model_version": VERSION,
                    "input_map": [{"key": spec.name, "value": spec.name} for spec in graphs[name].inputs],
                    "output_map": [{"key": spec.name, "value": spec.name} for spec in graphs[name].outputs],
                }
                for name in GRAPH_NAMES
            ]
        },
        "parameters": _parameters(facts(manifest)),
    }


def check_graphs(manifest: Manifest) -> None:
    """Raise `BundleError` unless the three graphs hang together in a way that an ensemble can say."""
    given = {spec.name: spec for spec in manifest.graphs["encoder"].inputs if spec.name == "image"}
    for name in GRAPH_NAMES:
        entry = manifest.graphs[name]
        for spec in (*entry.inputs, *entry.outputs):
            if not spec.shape or not isinstance(spec.shape[0], str) or any(isinstance(n, str) for n in spec.shape[1:]):
                raise BundleError(
                    f"{name}: {spec.name} has the shape {spec.shape}; expected a batch axis and then fixed sizes"
                )
        for spec in entry.inputs:
            if (source := given.get(spec.name)) is None:
                raise BundleError(
                    f"{name} takes {spec.name}, which is neither the image nor given by a graph before it"
                )
            if (spec.dtype, spec.shape[1:]) != (source.dtype, source.shape[1:]):
                raise BundleError(
                    f"{name} takes {spec.name} as {spec.dtype} {spec.shape}; "
                    f"it is given as {source.dtype} {source.shape}"
                )
        for spec in entry.outputs:
            if spec.name in given:
                raise BundleError(f"{name} gives {spec.name}, which another graph already gives")
            given[spec.name] = spec
    if "score" not in {spec.name for spec in manifest.graphs["fusion"].outputs}:
        raise BundleError("fusion gives no score")


def _tensor(spec: TensorSpec, *, reshape: bool = True) -> dict[str, Any]:
    row = [int(size) for size in spec.shape[1:]]
    tensor = {"name": spec.name, "data_type": Enum(_TYPES[spec.dtype]), "dims": row or [1]}
    return tensor if row or not reshape else {**tensor, "reshape": {"shape": []}}


def _warmup(entry: GraphEntry, size: int) -> dict[str, Any]:
    """A batch of zeros: what takes long on the first request of a size is done before the model counts as ready."""
    tensors = [{**_tensor(spec, reshape=False), "zero_data": True} for spec in entry.inputs]
    inputs = [{"key": tensor.pop("name"), "value": tensor} for tensor in tensors]
    return {"name": f"batch of {size}", "batch_size": size, "inputs": inputs}


def _graph_specs(entry: GraphEntry, sizes: list[int]) -> list[dict[str, Any]]:
    """A CUDA graph for each size, which runs every batch that is larger than the size before."""
    rows = [{"key": spec.name, "value": {"dim": [int(size) for size in spec.shape[1:]]}} for spec in entry.inputs]
    return [
        {"batch_size": size, "input": rows, "graph_lower_bound": {"batch_size": before + 1, "input": rows}}
        for before, size in zip([0, *sizes], sizes, strict=False)
    ]


def _parameters(texts: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"key": key, "value": {"string_value": text}} for key, text in texts.items()]


def to_text(message: Mapping[str, Any], indent: str = "") -> str:
    """A message in protobuf's text format. Dicts are messages, lists repeated fields, `Enum`s are not quoted."""
    lines = []
    for field, value in message.items():
        messages = value if isinstance(value, list) and value and isinstance(value[0], Mapping) else [value]
        for one in messages:
            if isinstance(one, Mapping):
                lines.append(f"{indent}{field} {{\n{to_text(one, indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{field}: {_scalar(one)}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and not isinstance(value, Enum):
        return f'"{"".join(map(_escaped, value.encode()))}"'
    return str(value)


def _escaped(byte: int) -> str:
    # Octal takes three digits at most, so that a digit after it is not read as a part of it.
    character = chr(byte)
    return character if 32 <= byte < 127 and character not in '"\\' else f"\\{byte:03o}"
