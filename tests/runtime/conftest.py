"""A bundle small enough to build by hand, whose scores have a closed form, and files to feed it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from mdnet_engines.bundle.files import file_entry, write_bundle
from mdnet_engines.bundle.manifest import (
    MANIFEST_NAME,
    FileEntry,
    GraphEntry,
    Manifest,
    ParitySummary,
    Preprocessing,
    Provenance,
    ScoreScale,
    TensorSpec,
)
from mdnet_engines.parity.probes import PROBES_NAME, write_probes

SIZE = 32
MEAN_WEIGHTS = np.array([0.5, 0.3, 0.15], np.float32)  # unequal: swapped channels change the score
CORNER_WEIGHTS = np.array([0.2, 0.1, 0.05], np.float32)


@pytest.fixture(scope="session")
def expected_score() -> Callable[[np.ndarray], float]:
    """The score of one preprocessed image by the bundle's formula; not finite for an image that is all black."""

    def score(image: np.ndarray) -> float:
        pixels = image.astype(np.float64) / 255
        with np.errstate(divide="ignore"):
            brightest = np.log(pixels.max())
        return float(3 + pixels.mean((0, 1)) @ MEAN_WEIGHTS + pixels[0, 0] @ CORNER_WEIGHTS + brightest / 4)

    return score


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., Path]:
    """Write a bundle of three tiny graphs to a folder; keywords replace a graph's or the provenance's parts."""

    def make(folder: Path, *, weights: str = "checkpoint", **graphs: onnx.ModelProto) -> Path:
        models = {"encoder": encoder(), "vim": vim(), "fusion": fusion(), **graphs}
        with write_bundle(folder) as scratch:
            for name, model in models.items():
                onnx.save(model, scratch / f"{name}.onnx")
            entries = {name: _entry(scratch / f"{name}.onnx", model) for name, model in models.items()}
            probes = None if graphs else _probes(scratch)  # with another graph they would not hold
            (scratch / MANIFEST_NAME).write_text(_manifest(entries, weights, probes).model_dump_json())
        return folder

    return make


@pytest.fixture(scope="session")
def graphs() -> dict[str, Callable[..., onnx.ModelProto]]:
    """Builders of the three graphs, to be bent out of shape."""
    return {"encoder": encoder, "vim": vim, "fusion": fusion}


@pytest.fixture(scope="session")
def shared_bundle(make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good bundle for tests that only read it."""
    return make_bundle(tmp_path_factory.mktemp("bundle") / "mdnet-bundle")


@pytest.fixture
def bundle(shared_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the good bundle, to be tampered with."""
    return Path(shutil.copytree(shared_bundle, tmp_path / "mdnet-bundle"))


@pytest.fixture(scope="session")
def face_bundle(shared_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The good bundle, trained on squares of 1.2 times the face."""
    folder = Path(shutil.copytree(shared_bundle, tmp_path_factory.mktemp("framed") / "mdnet-bundle"))
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    manifest["preprocessing"]["face"] = 1.2
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Callable[..., Path]:
    """Save a random image (by `seed`) under a name relative to the test's folder."""

    def save(name: str, *, seed: int = 0, shape: tuple[int, int] = (48, 40), **options: object) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)
        Image.fromarray(pixels).save(file, **options)
        return file

    return save


@pytest.fixture
def png_declaring() -> Callable[[int, int], bytes]:
    """A PNG of under 100 bytes whose header declares any size."""

    def png(width: int, height: int) -> bytes:
        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        pixels = chunk(b"IDAT", zlib.compress(b"\0" * 64))
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")

    return png


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    """A named pipe that nobody writes to, called like an image."""
    path = tmp_path / "pipe.jpg"
    os.mkfifo(path)
    return path


@pytest.fixture
def deadline() -> Iterator[None]:
    """Fail a test that waits for ever, as opening a FIFO would."""

    def late(*_: object) -> None:
        raise TimeoutError("still waiting after a minute")

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)  # what does not wait takes as long as a busy machine makes it
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def encoder(image: str = "image", means: str = "means") -> onnx.ModelProto:
    """uint8 image → mean and top left pixel, each `[batch, 3]` in 0…1."""
    nodes = [
        helper.make_node("Cast", [image], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "full"], ["unit"]),
        helper.make_node("ReduceMean", ["unit", "rows_columns"], [means], keepdims=0),
        helper.make_node("Slice", ["unit", "zeros", "ones", "rows_columns"], ["pixel"]),
        helper.make_node("Squeeze", ["pixel", "rows_columns"], ["corner"]),
    ]
    return _model(
        nodes,
        {image: ("uint8", ["batch", SIZE, SIZE, 3])},
        {means: ["batch", 3], "corner": ["batch", 3]},
        full=np.float32(255),
        rows_columns=np.array([1, 2]),
        zeros=np.array([0, 0]),
        ones=np.array([1, 1]),
    )


def vim(brightest: str = "brightest") -> onnx.ModelProto:
    """uint8 image → logarithm of its highest value, `[batch]`."""
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "full"], ["unit"]),
        helper.make_node("ReduceMax", ["unit", "pixels"], ["highest"], keepdims=0),
        helper.make_node("Log", ["highest"], [brightest]),
    ]
    return _model(
        nodes,
        {"image": ("uint8", ["batch", SIZE, SIZE, 3])},
        {brightest: ["batch"]},
        full=np.float32(255),
        pixels=np.array([1, 2, 3]),
    )


def fusion(score: str = "score") -> onnx.ModelProto:
    """3 + means · MEAN_WEIGHTS + corner · CORNER_WEIGHTS + brightest / 4, `[batch]`."""
    nodes = [
        helper.make_node("MatMul", ["means", "mean_weights"], ["a"]),
        helper.make_node("MatMul", ["corner", "corner_weights"], ["b"]),
        helper.make_node("Div", ["brightest", "four"], ["c"]),
        helper.make_node("Sum", ["a", "b", "c", "three"], [score]),
    ]
    return _model(
        nodes,
        {"means": ("float32", ["batch", 3]), "corner": ("float32", ["batch", 3]), "brightest": ("float32", ["batch"])},
        {score: ["batch"]},
        mean_weights=MEAN_WEIGHTS,
        corner_weights=CORNER_WEIGHTS,
        four=np.float32(4),
        three=np.float32(3),
    )


def _model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[str, list[int | str]]],
    outputs: dict[str, list[int | str]],
    **constants: np.ndarray | np.generic,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
            for name, (dtype, shape) in inputs.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def _entry(file: Path, model: onnx.ModelProto) -> GraphEntry:
    def specs(values: list[onnx.ValueInfoProto]) -> list[TensorSpec]:
        return [
            TensorSpec(
                name=value.name,
                dtype=helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
                shape=[axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim],
            )
            for value in values
        ]

    return GraphEntry(
        file=file_entry(file), precision="fp32", inputs=specs(model.graph.input), outputs=specs(model.graph.output)
    )


def _probes(folder: Path) -> FileEntry:
    """Random images, and what the three graphs' formulas give for them."""
    pixels = np.random.default_rng(7).integers(0, 256, (4, SIZE, SIZE, 3), np.uint8)
    unit = pixels.astype(np.float64) / 255
    outputs = {"means": unit.mean((1, 2)), "corner": unit[:, 0, 0], "brightest": np.log(unit.max((1, 2, 3)))}
    score = 3 + outputs["means"] @ MEAN_WEIGHTS + outputs["corner"] @ CORNER_WEIGHTS + outputs["brightest"] / 4
    reference = {name: values.astype(np.float32) for name, values in {**outputs, "score": score}.items()}
    write_probes(folder / PROBES_NAME, pixels, reference)
    return file_entry(folder / PROBES_NAME)


def _manifest(graphs: dict[str, GraphEntry], weights: str, probes: FileEntry | None) -> Manifest:
    return Manifest(
        schema_version=2 if probes else 1,
        probes=probes,
        preset="tiny",
        precision="fp32",
        preprocessing=Preprocessing(image_size=SIZE),
        score=ScoreScale(minimum=1, maximum=5),
        graphs=graphs,
        parity=ParitySummary(passed=True, images=0, source="none", max_abs=0, mean_abs=0),
        provenance=Provenance(weights=weights, command="pytest", versions={}),
        licenses=[],
    )
