"""What tests of several rooms share: drawn faces, and the demo's graphs and bundles, each made once.

Tests marked `gpu` are skipped, with their reason, where PyTorch sees no GPU. None touches the user's cache.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from mdnet.model.net import MDNet
    from mdnet_engines.bundle.files import Bundle
    from mdnet_engines.bundle.manifest import GraphName, Precision


# PyTorch's threads would spin while they wait, on cores that others need: on a busy machine a training took ten times
# as long. It is read when libgomp is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# By default an example may take 0.2 s, and drawing examples not long either: a busy machine takes its time.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


HARMFUL = (
    "unet.down_blocks.0.attentions.0.",
    "unet.down_blocks.0.downsamplers.0.",
    "unet.down_blocks.1.resnets.0.",
    "unet.down_blocks.1.attentions.0.",
)
"""Parts of the demo that break the budget in fp8, with all that is in them."""


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = os.fspath(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    torch = pytest.importorskip("torch", reason="needs PyTorch, to see whether there is a CUDA GPU")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


def takes_graphs(file: str) -> bool:
    """Whether tests of the file take the demo's graphs or bundles."""
    return "/export/" in file or file.endswith(("/test_evaluate.py", "/test_explain.py"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share tests out by file, for what a file's tests share; those that take the demo's graphs to one process."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "the demo's graphs" if takes_graphs(file) else file

    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # of pytest-xdist: what takes longest comes first
        items.sort(key=lambda item: not takes_graphs(item.nodeid.partition("::")[0]))


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 drawn faces in SCUT-FBP5500's layout; not to be changed."""
    from mdnet.data.drawn_set import write_dataset

    root = tmp_path_factory.mktemp("data") / "faces"
    write_dataset(root, 60, seed=1)
    return root


@pytest.fixture(scope="session")
def portraits(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same data set with a photo of a person in place of each drawing, at another place of a grey canvas."""
    from PIL import Image

    root = Path(shutil.copytree(faces, tmp_path_factory.mktemp("data") / "portraits"))
    photo = Image.open(Path(__file__).parent / "data" / "portrait.jpg").convert("RGB").resize((160, 160))
    for number, file in enumerate(sorted((root / "Images").iterdir())):
        canvas = Image.new("RGB", (220, 240), (110 + number, 120, 130))
        canvas.paste(photo, (number % 60, number % 80))
        canvas.save(file)
    return root


@pytest.fixture(scope="session")
def float_graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packaged demo's three float32 graphs; not to be changed."""
    from mdnet_engines.bundle.manifest import GRAPH_NAMES
    from mdnet_export.graphs.export import export_graph
    from mdnet_export.model_source import choose_weights

    folder = tmp_path_factory.mktemp("graphs")
    model = choose_weights().load()
    for name in GRAPH_NAMES:
        export_graph(model, name, folder)
    return folder


def take_graphs_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let builds and checks of the packaged demo copy its graphs: an export takes longer than all that comes after."""

    def copy(model: MDNet, name: GraphName, to: Path) -> Path:
        return Path(shutil.copy(folder / f"{name}.onnx", to))

    for module in ("build", "verify"):
        monkeypatch.setattr(f"mdnet_export.{module}.export_graph", copy)


@pytest.fixture
def exported_before(float_graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds and checks of the packaged demo in this test copy its graphs."""
    take_graphs_from(float_graphs, monkeypatch)


@pytest.fixture
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds in this test try ONNX Runtime alone; those of `bundles` try and time every backend that is here."""
    monkeypatch.setattr("mdnet_engines.sessions.openvino.is_installed", lambda: False)


def _build(precision: Precision, graphs: Path, folder: Path) -> Bundle:
    from mdnet_calib.passes import fp8
    from mdnet_calib.sensitivity import Budget
    from mdnet_export.build import build_bundle
    from mdnet_export.model_source import choose_weights
    from mdnet_export.parity_images import calibration_images, parity_images
    from mdnet_export.quantise import Calibration

    quantised, every = precision in ("int8", "fp8"), fp8.fp8_nodes
    with pytest.MonkeyPatch.context() as monkeypatch:
        take_graphs_from(graphs, monkeypatch)
        monkeypatch.setattr(fp8, "fp8_nodes", lambda proto: [n for n in every(proto) if not n.startswith(HARMFUL)])
        return build_bundle(
            choose_weights(),
            folder / precision,
            precision=precision,
            images=parity_images(None, 128, 6),
            calibration=Calibration(calibration_images(None, 128, 16), budget=Budget(9, 0)) if quantised else None,
            force=precision == "int8",
        )


@pytest.fixture(scope="session")
def demo_bundle(float_graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The packaged demo as an fp32 bundle; not to be changed."""
    return _build("fp32", float_graphs, tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="session")
def bundles(demo_bundle: Bundle, float_graphs: Path) -> dict[Precision, Bundle]:
    """The packaged demo as a bundle, by precision; not to be changed.

    In int8 it has all blocks that int8 is for, and stands whatever a busy machine's clock says of it. In fp8 it lacks
    those that a whole calibration leaves in float16, which takes a minute to find.
    """
    others: tuple[Precision, ...] = ("fp16", "int8", "fp8")
    return {"fp32": demo_bundle, **{each: _build(each, float_graphs, demo_bundle.path.parent) for each in others}}
