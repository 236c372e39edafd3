"""Three small graphs that fit together as a bundle's do, computed with NumPy, and plans of them.

A plan is a JSON object: the graph, the profile's least, best and most rows (or several profiles), and the bytes that
activations take; perhaps `stripped`, or `host_code`. A graph is one too, with the names of its files of weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SIZE = 4  # of an image
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # name → type by TensorRT's name, shape without the batch


@dataclass(frozen=True)
class Network:
    inputs: Tensors
    outputs: Tensors
    compute: Callable[..., dict[str, np.ndarray]]


def encoder(image: np.ndarray) -> dict[str, np.ndarray]:
    pixels = image.astype(np.float32) / 255
    return {"down": pixels.mean(3).reshape(-1, SIZE * SIZE)[:, :6].reshape(-1, 3, 2), "mid": pixels.mean((1, 2))}


def vim(image: np.ndarray) -> dict[str, np.ndarray]:
    pixels = image.astype(np.float32) / 255
    return {"tokens": np.stack([pixels.max((2, 3)), pixels.min((2, 3))], 2)}


def fusion(down: np.ndarray, mid: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    return {"score": 1 + down.sum((1, 2)) + 2 * mid.sum(1) + 3 * tokens.sum((1, 2))}


FEATURES: Tensors = {"down": ("FLOAT", (3, 2)), "mid": ("FLOAT", (3,))}
TOKENS: Tensors = {"tokens": ("FLOAT", (SIZE, 2))}
IMAGE: Tensors = {"image": ("UINT8", (SIZE, SIZE, 3))}
ENGINES = {
    "encoder": Network(IMAGE, FEATURES, encoder),
    "vim": Network(IMAGE, TOKENS, vim),
    "fusion": Network({**FEATURES, **TOKENS}, {"score": ("FLOAT", ())}, fusion),
}
TYPES = {"UINT8": np.uint8, "FLOAT": np.float32, "INT64": np.int64}
MEMORY = {"encoder": 1000, "vim": 300, "fusion": 2000}


def write_plans(folder: Path, **changes: dict[str, Any]) -> dict[Any, Path]:
    """The three plans, with `changes` of the fields of one."""
    paths = {}
    for graph, memory in MEMORY.items():
        plan = {"graph": graph, "batches": [1, 4, 8], "memory": memory, **changes.get(graph, {})}
        paths[graph] = folder / f"{graph}.plan"
        paths[graph].write_text(json.dumps(plan), encoding="utf-8")
    return paths


def write_weights(folder: Path) -> dict[Any, Path]:
    """The graphs that `write_plans` has the plans of; the encoder's weights are in a file of their own."""
    paths = {}
    for graph in MEMORY:
        data = ["encoder.onnx.data"] if graph == "encoder" else []
        paths[graph] = folder / f"{graph}.onnx"
        paths[graph].write_text(json.dumps({"graph": graph, "data": data}), encoding="utf-8")
        for name in data:
            (folder / name).write_bytes(b"weights")
    return paths


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


def reference(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Every output of every graph."""
    outputs = {**encoder(pixels), **vim(pixels)}
    return {**outputs, **fusion(**outputs)}


def assert_same(got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Equal to the last bit: both are the same NumPy calls, row by row."""
    assert set(got) == set(expected)
    for name in got:
        assert got[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
