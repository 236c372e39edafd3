"""Three graphs that hand their values on where they are, on the CPU provider, which takes the same calls as CUDA's."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from mdnet_engines.bundle.manifest import GRAPH_NAMES, GraphName
from mdnet_engines.errors import MDNetError
from mdnet_engines.sessions import device_chain
from mdnet_engines.sessions.onnxruntime import OrtSession
from mdnet_engines.sessions.session import run_graphs

SIZE = 8
Graphs = dict[GraphName, OrtSession]


def graph(file: Path, inputs: dict[str, int], nodes: list[onnx.NodeProto], outputs: dict[str, list[Any]]) -> None:
    shapes = {1: ["batch"], 2: ["batch", 3], 4: ["batch", SIZE, SIZE, 3]}
    kinds = {4: TensorProto.UINT8}
    values = [helper.make_tensor_value_info(n, kinds.get(r, TensorProto.FLOAT), shapes[r]) for n, r in inputs.items()]
    results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in outputs.items()]
    axes = [onnx.numpy_helper.from_array(np.array(axes), f"axes{len(axes)}") for axes in ([1, 2], [1])]
    made = helper.make_graph(nodes, file.stem, values, results, axes)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), file)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """Scores depend on the image: the mean of its mean and largest pixels. No graph takes `shown`."""
    folder, node = tmp_path_factory.mktemp("chain"), helper.make_node
    cast = node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT)
    means = node("ReduceMean", ["pixels", "axes2"], ["down"], keepdims=0)
    tops = node("ReduceMax", ["pixels", "axes2"], ["tokens"], keepdims=0)
    colours = ["batch", 3]
    shown = node("Identity", ["down"], ["shown"])
    graph(folder / "encoder.onnx", {"image": 4}, [cast, means, shown], {"shown": colours, "down": colours})
    graph(folder / "vim.onnx", {"image": 4}, [cast, tops], {"tokens": colours})
    total = [node("Add", ["down", "tokens"], ["sum"]), node("ReduceMean", ["sum", "axes1"], ["score"], keepdims=0)]
    graph(folder / "fusion.onnx", {"tokens": 2, "down": 2}, total, {"score": ["batch"]})
    return {name: OrtSession(folder / f"{name}.onnx", threads=1) for name in GRAPH_NAMES}


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


class Watched:
    """What the chain does with values, by kind; and the sizes of the batches that go up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: Counter[str] = Counter()
        self.sizes: list[int] = []
        self.given: dict[str, list[int]] = {}
        self.bound: list[tuple[str, int]] = []
        ort_value, binding = onnxruntime.OrtValue, onnxruntime.IOBinding
        upload, download = ort_value.ortvalue_from_numpy, ort_value.numpy
        outputs, take = binding.get_outputs, binding.bind_ortvalue_input

        def uploaded(array: np.ndarray, *where: object) -> Any:
            self.calls["up"] += 1
            self.sizes.append(len(array))
            return upload(array, *where)

        def downloaded(value: Any) -> np.ndarray:
            self.calls["down"] += 1
            return download(value)

        def gave(bound: Any) -> Any:
            values = outputs(bound)
            self.given.setdefault("addresses", []).extend(value.data_ptr() for value in values)
            return values

        def took(bound: Any, name: str, value: Any) -> None:
            self.bound.append((name, value.data_ptr()))
            take(bound, name, value)

        def ran(*_: object) -> None:
            self.calls["run with arrays"] += 1

        monkeypatch.setattr(ort_value, "ortvalue_from_numpy", uploaded)
        monkeypatch.setattr(ort_value, "numpy", downloaded)
        monkeypatch.setattr(binding, "get_outputs", gave)
        monkeypatch.setattr(binding, "bind_ortvalue_input", took)
        monkeypatch.setattr(onnxruntime.InferenceSession, "run", ran)


def test_only_images_go_up_and_only_scores_come_down(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run_graphs(graphs, images(4))["score"]
    watched = Watched(monkeypatch)
    np.testing.assert_array_equal(device_chain.score(graphs, images(4)), expected)
    assert watched.calls == {"up": 1, "down": 1}
    bound = dict(watched.bound)
    assert [name for name, _ in watched.bound].count("image") == 2
    assert len({address for name, address in watched.bound if name == "image"}) == 1  # uploaded once, for both
    # What the fusion takes is, address for address, what the others gave.
    assert {bound["down"], bound["tokens"]} <= set(watched.given["addresses"])


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 33, 64, 65, 130])
def test_every_image_has_its_own_score_in_batches_of_any_size(count: int, graphs: Graphs) -> None:
    pixels = images(count, seed=count)
    got = device_chain.score(graphs, pixels)
    assert got.shape == (count,)
    np.testing.assert_array_equal(got, run_graphs(graphs, pixels)["score"])
    assert len(np.unique(got)) > count * 0.9  # they do differ, so that an order would show


def test_no_images_give_no_scores(graphs: Graphs) -> None:
    assert device_chain.score(graphs, images(0)).shape == (0,)


def test_batches_go_up_in_a_few_fixed_sizes(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN looks for an algorithm for each new size, and each convolution."""
    watched = Watched(monkeypatch)
    for count in range(1, 200):
        device_chain.score(graphs, images(count))
    assert set(watched.sizes) == {1, 2, 4, 8, 16, 32, 64}


def test_a_view_of_an_array_is_scored_as_its_copy(graphs: Graphs) -> None:
    pixels = images(8)
    np.testing.assert_array_equal(
        device_chain.score(graphs, pixels[::-2]), device_chain.score(graphs, pixels[::-2].copy())
    )


def test_several_threads_may_score_at_once(graphs: Graphs) -> None:
    batches = [images(1 + seed % 9, seed) for seed in range(60)]
    expected = [run_graphs(graphs, batch)["score"] for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        for got, wanted in zip(
            pool.map(lambda batch: device_chain.score(graphs, batch), batches), expected, strict=True
        ):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    "wrong", [np.zeros((2, SIZE, SIZE + 1, 3), np.uint8), np.zeros((2, SIZE, SIZE, 3), np.float32)]
)
def test_images_of_another_shape_or_type_are_refused_in_one_line(wrong: np.ndarray, graphs: Graphs) -> None:
    with pytest.raises(MDNetError, match=r"image|tensor\(uint8\)") as error:
        device_chain.score(graphs, wrong)
    assert len(str(error.value).splitlines()) == 1
