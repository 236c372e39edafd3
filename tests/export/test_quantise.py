"""The packaged demo in int8: what is in the bundle, what it costs, and when it is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from recorded import Recorded

from mdnet.model.checkpoint import demo_checkpoint, load_checkpoint
from mdnet_calib.calibration_set import MIN_IMAGES, CalibrationSet
from mdnet_calib.passes.int8 import int8_nodes
from mdnet_calib.sensitivity import Budget, block_of
from mdnet_engines.bundle.files import Bundle
from mdnet_engines.bundle.manifest import GRAPH_NAMES, GraphName, Precision
from mdnet_engines.errors import MDNetError, UsageError
from mdnet_engines.ops import winograd
from mdnet_engines.parity.gates import LIMITS
from mdnet_engines.sessions.onnxruntime import OrtSession
from mdnet_engines.sessions.openvino import OpenVINOSession
from mdnet_engines.sessions.session import Session, run_graphs
from mdnet_engines.system.machine import lacks_vnni
from mdnet_export import build as build_module
from mdnet_export import drift, quantise
from mdnet_export.build import SlowerError, build_bundle
from mdnet_export.cli.main import main
from mdnet_export.model_source import choose_weights
from mdnet_export.parity_images import calibration_images, parity_images
from mdnet_export.quantise import NOISE, Calibration, Speed, quantise_encoder
from mdnet_export.rewrite import FLOAT32_MODULES
from mdnet_rt import Scorer

FEW_BLOCKS = ("vae.mid_block.resnets.0.", "vae.mid_block.resnets.1.", "unet.down_blocks.1.downsamplers.0.")
FASTER, SLOWER = Speed(8, 0.020, 0.010, "a made-up runtime"), Speed(8, 0.010, 0.0225, "a made-up runtime")


@pytest.fixture(scope="module")
def few() -> CalibrationSet:
    return calibration_images(None, 128, MIN_IMAGES)


@pytest.fixture
def int8_bundle(bundles: dict[str, Bundle]) -> Bundle:
    return bundles["int8"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Speed], None]:
    """Says what the timing of int8 against float will find; until told otherwise, that int8 is faster."""

    def found(speed: Speed) -> None:
        monkeypatch.setattr(quantise, "_time", lambda *_: speed)

    found(FASTER)
    return found


@pytest.fixture
def three_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only three ResNet blocks are there to choose from, so that trying each is quick."""
    monkeypatch.setattr(
        quantise, "int8_nodes", lambda proto: [name for name in int8_nodes(proto) if name.startswith(FEW_BLOCKS)]
    )


@pytest.fixture
def folder(float_graphs: Path, tmp_path: Path) -> Path:
    """Float graphs to quantise, in a folder that may be changed."""
    return Path(shutil.copytree(float_graphs, tmp_path / "bundle"))


def scores(folder: Path, encoder: str, pixels: np.ndarray) -> np.ndarray:
    """By ONNX Runtime, one image at a time, with one of the folder's encoders."""
    files = {"encoder": folder / encoder, "vim": folder / "vim.onnx", "fusion": folder / "fusion.onnx"}
    graphs: dict[GraphName, OrtSession] = {name: OrtSession(files[name]) for name in GRAPH_NAMES}
    return np.concatenate([run_graphs(graphs, pixels[i : i + 1])["score"] for i in range(len(pixels))])


def weights_in_int8(file: Path) -> set[str]:
    """Names of the convolutions and products whose weight comes from int8."""
    graph = onnx.load(file, load_external_data=False).graph
    dequantised = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    products = [node for node in graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    by_winograd = {node.name for node in graph.node if node.op_type in winograd.NAMES}  # they read the bytes themselves
    return by_winograd | {node.name for node in products if node.input[1] in dequantised}


# --- a bundle ---


def test_the_manifest_says_how_int8_came_about(int8_bundle: Bundle, float_graphs: Path) -> None:
    manifest = Bundle.open(int8_bundle.path).manifest
    assert manifest.precision == "int8"
    assert {name: graph.precision for name, graph in manifest.graphs.items()} == {
        "encoder": "int8",
        "vim": "fp32",
        "fusion": "fp32",
    }
    calibration, int8 = manifest.calibration, manifest.int8
    assert calibration is not None
    assert int8 is not None
    images = calibration_images(None, 128, 16)
    assert (calibration.images, calibration.source, calibration.method) == (16, "16 drawn faces", "percentile")
    assert calibration.sha256 == images.digest
    blocks = dict.fromkeys(block_of(node) for node in int8_nodes(onnx.load(float_graphs / "encoder.onnx")))
    assert int8.int8_blocks == list(blocks)
    assert int8.float_blocks == []
    assert (int8.max_score_drift, int8.min_pearson) == (9, 0)
    assert int8.speedup_on.endswith(", batch 16")
    assert int8.slower_forced == (int8.speedup < 1 / (1 + NOISE) and not lacks_vnni())


def test_int8_scores_are_within_the_gates_on_unseen_faces(int8_bundle: Bundle) -> None:
    """Against PyTorch, by the formulas of the gates written once more."""
    pixels, limits = parity_images(None, 128, 32).pixels, LIMITS["int8"]
    with torch.inference_mode():
        expected = load_checkpoint(demo_checkpoint())(torch.from_numpy(pixels)).numpy()
    with Scorer.open(int8_bundle.path) as scorer:
        got = scorer.score_batch(pixels)
    delta = np.abs(got - expected)
    assert 0 < delta.max() <= limits.score_max_abs
    assert delta.mean() <= limits.score_mean_abs
    assert np.corrcoef(expected, got)[0, 1] >= limits.score_pearson


def test_the_encoder_has_two_forms_on_one_file_of_weights(int8_bundle: Bundle) -> None:
    entry = int8_bundle.manifest.graphs["encoder"]
    names = ["encoder.onnx", "encoder.onnx.data", "encoder.cpu.onnx", "encoder.gpu.onnx", "encoder.gpu.onnx.data"]
    assert [file.name for file in entry.files()] == names
    assert entry.cpu is not None
    locations, activations = set(), {}
    for file in (entry.file.name, entry.cpu.name):
        light = onnx.load(int8_bundle.path / file, load_external_data=False)
        locations |= {each.value for t in light.graph.initializer for each in t.external_data if each.key == "location"}
        zeros = {node.input[2] for node in light.graph.node if node.op_type == "QuantizeLinear"}
        activations[file] = {tensor.data_type for tensor in light.graph.initializer if tensor.name in zeros}
    assert locations == {"encoder.onnx.data"}
    assert activations == {"encoder.onnx": {onnx.TensorProto.INT8}, "encoder.cpu.onnx": {onnx.TensorProto.UINT8}}
    # What rounds otherwise here and there, attention to bfloat16, moves other values over the edge of a step: two forms
    # differ about as much as each does from float32.
    pixels = parity_images(None, 128, 6).pixels
    apart = scores(int8_bundle.path, "encoder.onnx", pixels) - scores(int8_bundle.path, "encoder.cpu.onnx", pixels)
    assert np.abs(apart).max() < 0.1


def test_gpus_get_every_graph_in_half_with_the_same_int8_weights(int8_bundle: Bundle) -> None:
    """What is int8 is stored once. What is float32 in there is what float16 leaves: no weight of a product."""
    for name in GRAPH_NAMES:
        entry = int8_bundle.manifest.graphs[name]
        assert entry.gpu is not None
        stored, made = (onnx.load(int8_bundle.path / each.name) for each in (entry.file, entry.gpu.file))
        light = onnx.load(int8_bundle.path / entry.gpu.file.name, load_external_data=False)
        place = {
            tensor.name: each.value
            for tensor in light.graph.initializer
            for each in tensor.external_data
            if each.key == "location"
        }
        quantised = {t.name: t.raw_data for t in stored.graph.initializer if t.data_type == onnx.TensorProto.INT8}
        arrays = {tensor.name: tensor for tensor in made.graph.initializer}
        assert quantised.items() <= {key: tensor.raw_data for key, tensor in arrays.items()}.items()
        for key in place.keys() & quantised.keys():
            assert place[key] == f"{name}.onnx.data"
        weights = {node.input[1]: node.name for node in made.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")}
        kept = [weights[key] for key in weights & arrays.keys() if arrays[key].data_type == onnx.TensorProto.FLOAT]
        assert all(node.startswith(FLOAT32_MODULES) for node in kept), kept
        # Of both files: int8's own types are all that is left between them.
        kinds = {tensor.data_type for tensor in arrays.values()}
        assert onnx.TensorProto.FLOAT16 in kinds


def test_the_folder_holds_what_the_manifest_names_and_no_more(int8_bundle: Bundle) -> None:
    named = {file.name for file in int8_bundle.manifest.files()}
    assert {file.name for file in int8_bundle.path.iterdir()} == named | {"manifest.json"}


def test_every_file_can_be_read_by_who_may_read_the_manifest(int8_bundle: Bundle) -> None:
    """onnx makes files of weights that only their owner may read."""
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in int8_bundle.path.iterdir()}
    assert set(modes.values()) == {modes["manifest.json"]}


def test_an_int8_encoder_is_a_third_of_its_float_size(int8_bundle: Bundle, float_graphs: Path) -> None:
    """A byte for four, and what stays in float: narrow layers, biases, norms, the fixed prompt's keys and values."""
    data = int8_bundle.path / "encoder.onnx.data"
    light = onnx.load(int8_bundle.path / "encoder.onnx", load_external_data=False)
    full = onnx.load(float_graphs / "encoder.onnx")
    weights = {t.name: t for t in full.graph.initializer}
    chosen = {node.input[1] for node in full.graph.node if node.name in set(int8_nodes(full))}
    quantised = sum(int(np.prod(weights[name].dims)) for name in chosen)
    stored = [t for t in light.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    assert sum(int(np.prod(tensor.dims)) for tensor in stored) == quantised
    assert data.stat().st_size < 1.5 * quantised


def test_an_int8_bundle_says_in_its_report_how_it_was_made(int8_bundle: Bundle) -> None:
    page = (int8_bundle.path / "parity.html").read_text()
    for part in (
        "16 images, 16 drawn faces, ranges by percentile",
        "blocks of the encoder",
        "budget on calibration images",
    ):
        assert part in page


# --- slower ---


def test_int8_that_is_slower_is_refused_with_both_times(
    exported_before: None,
    without_openvino: None,
    three_blocks: None,
    clock: Callable[[Speed], None],
    few: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock(SLOWER)
    for module in (build_module, quantise):
        monkeypatch.setattr(module, "lacks_vnni", lambda: False)
    arguments = {"precision": "int8", "images": parity_images(None, 128, 2), "calibration": Calibration(few)}
    expected = (
        r"^int8 is slower than float: 22\.5 ms against 10 ms in the encoder \(a made-up runtime, batch 8\); "
        r"5% more is allowed as noise\. Noth"
    )
    with pytest.raises(SlowerError, match=expected) as caught:
        build_bundle(choose_weights(), tmp_path / "bundle", **arguments)  # type: ignore[arg-type]
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []
    forced = build_bundle(choose_weights(), tmp_path / "bundle", force=True, **arguments)  # type: ignore[arg-type]
    assert forced.manifest.int8 is not None
    assert forced.manifest.int8.slower_forced
    assert forced.manifest.int8.speedup == pytest.approx(10 / 22.5, abs=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_int8_that_is_slower_without_vnni_is_written_with_a_note(
    exported_before: None,
    without_openvino: None,
    three_blocks: None,
    clock: Callable[[Speed], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such a CPU is no evidence against int8: the bundle may be for another."""
    clock(SLOWER)
    for module in (build_module, quantise):
        monkeypatch.setattr(module, "lacks_vnni", lambda: True)
    command = ["build", "--precision", "int8", "--num-calib", "8", "--num-images", "1", "-o", str(tmp_path / "bundle")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.stderr
    assert "note: on this machine int8 is 0.44× as fast as float (a made-up runtime, batch 8)" in result.stderr
    facts = Bundle.open(tmp_path / "bundle").manifest.int8
    assert facts is not None
    assert not facts.slower_forced


@pytest.mark.parametrize(("int8_seconds", "slower"), [(0.5, False), (1.049, False), (1.051, True), (3, True)])
def test_the_noise_of_a_busy_machine_makes_nothing_slower(int8_seconds: float, slower: bool) -> None:
    """Within `NOISE` of float's time, which docs/precision.md names."""
    assert Speed(1, 1.0, int8_seconds, "any").slower is slower


def test_both_encoders_are_timed_in_turns_on_the_same_images(
    folder: Path, int8_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's CPU provider times the form that it will run."""
    opened, runs = [], []

    class Timed(OrtSession):
        def __init__(self, path: Path):
            super().__init__(path)
            self.name = path.parent.name + "/" + path.name
            opened.append(self.name)

        def run(self, feeds):  # type: ignore[no-untyped-def]
            runs.append((self.name, len(feeds["image"])))
            return super().run(feeds)

    monkeypatch.setattr("mdnet_export.graphs.cpu_variant.OrtSession", Timed)
    monkeypatch.setattr("mdnet_engines.sessions.openvino.is_installed", lambda: False)
    speed = quantise._time(folder, int8_bundle.path, parity_images(None, 128, 4).pixels)
    assert speed.backend == "onnxruntime-cpu"
    assert opened == ["bundle/encoder.onnx", "int8/encoder.cpu.onnx"]
    assert runs[:3] == [*((name, 1) for name in opened), ("bundle/encoder.onnx", 1)]
    turns = runs[3:]
    assert turns == [(name, speed.batch) for name in opened] * (len(turns) // 2)
    assert speed.float_seconds > 0
    assert speed.int8_seconds > 0


# --- the budget ---


def test_blocks_that_break_the_budget_stay_in_float_and_are_named(
    exported_before: None,
    without_openvino: None,
    three_blocks: None,
    clock: object,
    few: CalibrationSet,
    float_graphs: Path,
    folder: Path,
    tmp_path: Path,
) -> None:
    loose = quantise_encoder(folder, Calibration(few, budget=Budget(9, 0))).facts()
    assert loose.float_blocks == []
    limit = 0.9 * loose.drift_max_abs
    progress = Recorded()
    bundle = build_bundle(
        choose_weights(),
        tmp_path / "tight",
        precision="int8",
        images=parity_images(None, 128, 4),
        calibration=Calibration(few, budget=Budget(limit, 0)),
        progress=progress,
    )
    facts = bundle.manifest.int8
    assert facts is not None
    assert facts.float_blocks
    assert facts.int8_blocks
    assert sorted(facts.int8_blocks + facts.float_blocks) == sorted(block.rstrip(".") for block in FEW_BLOCKS)
    assert facts.max_score_drift == limit
    for file in ("encoder.onnx", "encoder.cpu.onnx"):
        assert {block_of(node) for node in weights_in_int8(bundle.path / file)} == set(facts.int8_blocks)
    # What was kept in is what is recorded: measured again, on the graphs that were written.
    with Scorer.open(bundle.path, backend="onnxruntime-cpu") as scorer:
        after = np.concatenate([scorer.score_batch(few.pixels[i : i + 1]) for i in range(len(few.pixels))])
    drift = np.abs(after - scores(float_graphs, "encoder.onnx", few.pixels)).max()
    assert drift == pytest.approx(facts.drift_max_abs, abs=1e-6)
    assert drift <= limit
    page = (bundle.path / "parity.html").read_text()
    assert all(f"kept in float: {block}" in page for block in facts.float_blocks)
    assert sum("alone" in step for step in progress.steps) == 3


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs the [openvino] extra")
def test_the_budget_is_held_on_every_backend_that_may_serve(
    three_blocks: None, clock: object, few: CalibrationSet, float_graphs: Path, folder: Path
) -> None:
    facts = quantise_encoder(folder, Calibration(few, budget=Budget(9, 0))).facts()
    assert facts.drift_on == ["onnxruntime-cpu", "openvino"]
    expected = scores(float_graphs, "encoder.onnx", few.pixels)
    images = [few.pixels[i : i + 1] for i in range(len(few.pixels))]
    vim = OrtSession(folder / "vim.cpu.onnx")
    by_backend: dict[str, list[Session]] = {
        "onnxruntime-cpu": [OrtSession(folder / f"{name}.cpu.onnx") for name in ("encoder", "fusion")],
        "openvino": [OpenVINOSession(folder / f"{name}.onnx") for name in ("encoder", "fusion")],
    }
    drifts = []
    for encoder, fusion in by_backend.values():
        got = [fusion.run({**encoder.run({"image": i}), **vim.run({"image": i})})["score"] for i in images]
        drifts.append(np.abs(np.concatenate(got) - expected).max())
    assert max(drifts) > min(drifts)
    assert facts.drift_max_abs == pytest.approx(max(drifts), abs=1e-6)


def test_a_backend_that_breaks_the_budget_counts_though_another_meets_it(
    three_blocks: None, clock: object, few: CalibrationSet, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Off(OrtSession):
        def run(self, feeds):  # type: ignore[no-untyped-def]
            return {name: 1.5 * values for name, values in super().run(feeds).items()}

    def open_on(backend: str, place: Path, name: GraphName) -> OrtSession:
        return (Off if backend == "off" else OrtSession)(place / f"{name}.onnx")

    monkeypatch.setattr(drift, "open_on", open_on)
    calibration = Calibration(few, budget=Budget(0.3, 0))
    for backends in (["onnxruntime-cpu", "off"], ["off", "onnxruntime-cpu"]):
        monkeypatch.setattr(drift, "cpu_backends", lambda names=backends: names)
        with pytest.raises(MDNetError, match="no block of the encoder can be int8"):
            quantise_encoder(folder, calibration)
    monkeypatch.setattr(drift, "cpu_backends", lambda: ["onnxruntime-cpu"])
    assert quantise_encoder(folder, calibration).facts().drift_on == ["onnxruntime-cpu"]


def test_a_budget_that_nothing_meets_is_said(
    without_openvino: None, three_blocks: None, clock: object, few: CalibrationSet, folder: Path, tmp_path: Path
) -> None:
    before = (folder / "encoder.onnx").read_bytes()
    with pytest.raises(
        MDNetError, match=r"^no block of the encoder can be int8: even the most harmless moves"
    ) as caught:
        quantise_encoder(folder, Calibration(few, budget=Budget(1e-9, 0)))
    harm = float(re.findall(r"moves a score by ([\d.e-]+)", str(caught.value))[0])
    assert 1e-9 < harm < 0.15
    assert "--max-score-drift" in str(caught.value)
    assert (folder / "encoder.onnx").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_range_method_changes_the_graph(
    three_blocks: None, clock: object, few: CalibrationSet, float_graphs: Path, tmp_path: Path
) -> None:
    scales = {}
    for method in ("minmax", "percentile"):
        target = Path(shutil.copytree(float_graphs, tmp_path / method))
        quantise_encoder(target, Calibration(few, method=method, cache=tmp_path / "cache"))
        graph = onnx.load(target / "encoder.onnx").graph
        arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        pairs = [node for node in graph.node if node.op_type == "QuantizeLinear"]
        scales[method] = np.array([arrays[node.input[1]] for node in pairs])
    assert (scales["minmax"] >= scales["percentile"]).all()
    assert (scales["minmax"] > scales["percentile"]).any()


# --- the cache ---


def test_a_second_build_on_the_same_images_calibrates_nothing(
    three_blocks: None,
    clock: object,
    few: CalibrationSet,
    float_graphs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, collect = [], quantise.collect

    def spy(*arguments: object, **options: object) -> object:
        calls.append(1)
        return collect(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(quantise, "collect", spy)
    calibration = Calibration(few, cache=tmp_path / "cache")
    written: list[bytes] = []
    progress = Recorded()
    for name in ("first", "second"):
        target = Path(shutil.copytree(float_graphs, tmp_path / name))
        quantise_encoder(target, calibration, progress=progress)
        written.append((target / "encoder.onnx").read_bytes())
    assert len(calls) == 1
    assert written[0] == written[1]
    assert [step for step in progress.steps if "ranges" in step] == [
        "ranges by percentile",
        "ranges by percentile, from the cache",
    ]
    other = dataclasses.replace(calibration, images=few.take(list(range(MIN_IMAGES))[::-1]))
    quantise_encoder(Path(shutil.copytree(float_graphs, tmp_path / "third")), other)
    assert len(calls) == 2


# --- what is refused ---


def test_parity_is_not_measured_on_calibration_images(few: CalibrationSet, tmp_path: Path) -> None:
    images = parity_images(None, 128, 4)
    shared = dataclasses.replace(images, pixels=np.concatenate([images.pixels[:3], few.pixels[:1]]))
    for precision in ("int8", "fp16"):
        with pytest.raises(UsageError, match=r"^1 calibration images are also images that parity is measured on"):
            build_bundle(
                choose_weights(), tmp_path / "bundle", precision=precision, images=shared, calibration=Calibration(few)
            )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_what_is_quantised_without_calibration_is_refused(precision: Precision, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{precision} needs calibration images"):
        build_bundle(choose_weights(), tmp_path / "bundle", precision=precision, images=parity_images(None, 128, 2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--calib", "few"], "--calib is for --precision int8, fp8 or fp16; fp32 has nothing to calibrate"),
        (["--precision", "int8", "--checkpoint", "mine.safetensors"], "give a folder of some 64 with --calib DIR"),
        (["--precision", "fp8", "--checkpoint", "mine.safetensors"], "fp8 needs images like those to be scored"),
        (["--precision", "int8", "--calib", "few"], "few has 1 usable images; calibration needs at least 8"),
        (["--precision", "int8", "--num-calib", "7"], "--num-calib is 7; calibration needs at least 8 images"),
        (["--precision", "fp16", "--num-calib", "7"], "--num-calib is 7; calibration needs at least 8 images"),
        (["--precision", "int8", "--calib", "missing"], "'missing' does not exist"),
        (["--precision", "int8", "--calib", "faces/Images"], "test images of the benchmark"),
        (["--precision", "int8", "--range-method", "magic"], "'magic' is not one of"),
        (["--precision", "int8", "--max-score-drift", "0"], "0.0 is not in the range x>0"),
        (["--precision", "int8", "--min-pearson", "2"], "2.0 is not in the range 0<=x<=1"),
    ],
)
def test_a_wrong_command_is_explained_and_writes_nothing(
    arguments: list[str], reason: str, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(demo_checkpoint(), tmp_path / "mine.safetensors")
    (tmp_path / "few").mkdir()
    shutil.copy(faces / "Images" / "AF1.jpg", tmp_path / "few")
    (tmp_path / "faces").symlink_to(faces)
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    result = CliRunner().invoke(main, ["build", "--num-images", "1", *arguments])
    assert result.exit_code == 2
    assert reason in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


# --- the command ---


def test_a_data_set_calibrates_by_its_training_images_and_is_judged_by_its_test_images(
    exported_before: None,
    without_openvino: None,
    three_blocks: None,
    clock: object,
    faces: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every option at once, as a user with a data set would give them."""
    monkeypatch.chdir(tmp_path)
    arguments = [
        *("build", "--precision", "int8", "--calib", str(faces), "--num-calib", "8", "--k-centre"),
        *("--range-method", "percentile", "--max-score-drift", "1", "--min-pearson", "0.5"),
        *("--calib-cache", "ranges", "--images", str(faces), "--num-images", "4", "-o", "out"),
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    manifest = Bundle.open(tmp_path / "out").manifest
    assert manifest.calibration is not None
    assert manifest.int8 is not None
    assert (manifest.calibration.images, manifest.calibration.method) == (8, "percentile")
    assert (manifest.int8.max_score_drift, manifest.int8.min_pearson) == (1, 0.5)
    assert "training images of faces" in manifest.calibration.source
    assert manifest.parity.source == "4 test images of faces"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "ranges"]
    assert len(list((tmp_path / "ranges").iterdir())) == 1


def test_a_cache_that_can_not_be_written_is_one_line(
    exported_before: None, three_blocks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("years of work")
    command = ["build", "--precision", "int8", "--num-calib", "8", "--num-images", "1"]
    result = CliRunner().invoke(main, [*command, "--calib-cache", "file/below"])
    assert result.exit_code == 1
    assert "file" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
