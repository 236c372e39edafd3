"""Demo bundles and drawn faces, each made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mdnet.data.drawn_set import write_dataset
from mdnet.model.net import MDNet
from mdnet_calib.sensitivity import Budget
from mdnet_engines.bundle.files import Bundle
from mdnet_engines.bundle.manifest import GRAPH_NAMES, GraphName
from mdnet_export import build as build_module
from mdnet_export.build import build_bundle
from mdnet_export.graphs.export import export_graph
from mdnet_export.model_source import choose_weights
from mdnet_export.parity_images import calibration_images, parity_images
from mdnet_export.quantise import Calibration


@pytest.fixture(scope="session")
def float_graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packaged demo's three float32 graphs; not to be changed."""
    folder = tmp_path_factory.mktemp("graphs")
    model = choose_weights().load()
    for name in GRAPH_NAMES:
        export_graph(model, name, folder)
    return folder


def take_graphs_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let builds of the packaged demo copy its graphs: an export takes longer than all that comes after it."""

    def copy(model: MDNet, name: GraphName, to: Path) -> Path:
        return Path(shutil.copy(folder / f"{name}.onnx", to))

    monkeypatch.setattr(build_module, "export_graph", copy)


@pytest.fixture
def exported_before(float_graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of the packaged demo in this test copy its graphs."""
    take_graphs_from(float_graphs, monkeypatch)


@pytest.fixture(scope="session")
def bundles(float_graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """The packaged demo as a bundle, by precision.

    In int8 it has all blocks that int8 is for, and stands whatever a busy machine's clock says of it.
    """
    folder, images = tmp_path_factory.mktemp("bundles"), parity_images(None, 128, 6)
    calibration = {"int8": Calibration(calibration_images(None, 128, 16), budget=Budget(9, 0))}
    with pytest.MonkeyPatch.context() as monkeypatch:
        take_graphs_from(float_graphs, monkeypatch)
        return {
            precision: build_bundle(
                choose_weights(),
                folder / precision,
                precision=precision,
                images=images,
                calibration=calibration.get(precision),
                force=precision == "int8",
            )
            for precision in ("fp32", "fp16", "int8")
        }


@pytest.fixture(params=["fp32", "fp16", "int8"])
def bundle(request: pytest.FixtureRequest, bundles: dict[str, Bundle]) -> Bundle:
    """The packaged demo as a bundle, at each precision."""
    return bundles[request.param]


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 drawn faces in SCUT-FBP5500's layout; not to be changed."""
    root = tmp_path_factory.mktemp("data") / "faces"
    write_dataset(root, 60, seed=1)
    return root
