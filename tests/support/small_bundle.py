"""A bundle of three tiny ONNX graphs that hang together as MD-Net's do, made without PyTorch in milliseconds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array

from mdnet_engines.parity.probes import PROBES_NAME, write_probes

GRAPHS = ("encoder", "vim", "fusion")
SIZE = 64


def write_small_bundle(folder: Path, *, scale: float = 1.0, precision: str = "fp32") -> Path:
    """Write a valid bundle into `folder`. Another `scale` gives other weights."""
    folder.mkdir(parents=True, exist_ok=True)
    image, colours = ("image", TensorProto.UINT8, ["batch", SIZE, SIZE, 3]), ["batch", 3]
    down, tokens = ("down", TensorProto.FLOAT, colours), ("tokens", TensorProto.FLOAT, colours)
    save(folder / "encoder.onnx", [image], down, scale)
    save(folder / "vim.onnx", [image], tokens, -scale)
    save(folder / "fusion.onnx", [down, tokens], ("score", TensorProto.FLOAT, ["batch"]), scale)
    pixels = np.random.default_rng(11).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
    write_probes(folder / PROBES_NAME, pixels, expected_outputs(pixels, scale))
    document = {
        "schema_version": 2,
        "preset": "demo",
        "precision": precision,
        "preprocessing": {"image_size": SIZE},
        "score": {"minimum": 1, "maximum": 5},
        "graphs": {
            "encoder": graph(folder, "encoder", precision, [image], down),
            "vim": graph(folder, "vim", precision, [image], tokens),
            "fusion": graph(folder, "fusion", precision, [down, tokens], ("score", TensorProto.FLOAT, ["batch"])),
        },
        "probes": describe(folder / PROBES_NAME),
        "parity": {"passed": True, "images": 2, "source": "drawn faces", "max_abs": 0.0, "mean_abs": 0.0},
        "provenance": {"weights": "random", "command": "mdnet-export build", "versions": {"torch": "2.9"}},
        "licenses": ["Apache-2.0"],
    }
    (folder / "manifest.json").write_text(json.dumps(document))
    return folder


def expected_outputs(pixels: np.ndarray, scale: float = 1.0) -> dict[str, np.ndarray]:
    """What the graphs give for images (n, SIZE, SIZE, 3), by their formulas."""
    colours = pixels.astype(np.float64).mean((1, 2))
    outputs = {"down": scale * colours, "tokens": -scale * colours, "score": np.zeros(len(pixels))}
    return {name: values.astype(np.float32) for name, values in outputs.items()}


Value = tuple[str, int, list[Any]]


def save(file: Path, inputs: list[Value], result: Value, scale: float) -> None:
    """One graph: its inputs' sum, averaged to the shape of `result`, times `scale`."""
    nodes = [helper.make_node("Cast", [name], [f"{name}_float"], to=TensorProto.FLOAT) for name, _, _ in inputs]
    total = f"{inputs[0][0]}_float"
    for name, _, _ in inputs[1:]:
        nodes.append(helper.make_node("Add", [total, f"{name}_float"], ["total"]))
        total = "total"
    nodes.append(helper.make_node("ReduceMean", [total, "axes"], ["mean"], keepdims=0))
    nodes.append(helper.make_node("Mul", ["mean", "scale"], [result[0]]))
    axes = [1, 2] if len(inputs) == 1 else [1]
    constants = [from_array(np.array(axes), "axes"), from_array(np.array([scale], np.float32), "scale")]
    values = [helper.make_tensor_value_info(*value) for value in (*inputs, result)]
    made = helper.make_graph(nodes, file.stem, values[:-1], values[-1:], constants)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), file)


def graph(folder: Path, name: str, precision: str, inputs: list[Value], result: Value) -> dict[str, Any]:
    return {
        "file": describe(folder / f"{name}.onnx"),
        "precision": precision,
        "inputs": [tensor(*value) for value in inputs],
        "outputs": [tensor(*result)],
    }


def tensor(name: str, kind: int, shape: list[Any]) -> dict[str, Any]:
    return {"name": name, "dtype": "uint8" if kind == TensorProto.UINT8 else "float32", "shape": shape}


def describe(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {"name": file.name, "sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
