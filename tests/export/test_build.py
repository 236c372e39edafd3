"""`mdnet-export` end to end on the packaged demo: build, verify, inspect, and what happens when something is wrong."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper
from shown_facts import unwrapped

from mdnet.cli.main import main as evaluate
from mdnet.model.checkpoint import demo_checkpoint, load_checkpoint, save_checkpoint
from mdnet.model.net import MDNet
from mdnet_engines.backends.candidates import Backend, Choice, candidates
from mdnet_engines.backends.choice import check, choose
from mdnet_engines.backends.trial import measure_apart
from mdnet_engines.bundle.files import Bundle, file_entry
from mdnet_engines.bundle.manifest import GRAPH_NAMES, GraphName, Precision
from mdnet_engines.errors import BundleError, MDNetError, UsageError
from mdnet_engines.parity.gates import LIMITS
from mdnet_engines.parity.probes import PROBES, read_probes
from mdnet_engines.parity.report_json import from_json
from mdnet_engines.system.machine import this_machine
from mdnet_export import build as build_module
from mdnet_export.build import ParityError, build_bundle
from mdnet_export.cli.main import main
from mdnet_export.graphs.export import export_graph
from mdnet_export.inspect import print_bundle
from mdnet_export.model_source import choose_weights
from mdnet_export.parity_images import parity_images
from mdnet_export.verify import verify_bundle
from mdnet_rt import Scorer

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs the [openvino] extra")


def test_the_bundle_scores_as_the_manifest_says(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest.parity.passed
    assert manifest.parity.images == 6
    assert manifest.provenance.weights == "demo"
    stored = from_json(json.loads((bundle.path / "parity.json").read_text()))
    images = parity_images(None, 128, 6)
    with Scorer.open(bundle.path) as scorer:
        assert str(scorer.choice) == stored.backend  # what is measured is what is served
        scores = scorer.score_batch(images.pixels)
    np.testing.assert_allclose(scores, [pair.bundle for pair in stored.scores], atol=1e-4)


def test_fp16_halves_the_weights_and_int8_and_fp8_more(bundle: Bundle) -> None:
    """Of int8, Vim and fusion stay in float and the encoder has three forms, each half as large as its weights.

    What GPUs get takes a quarter of what the rest takes.
    """
    graphs = bundle.manifest.graphs.values()
    for_gpus = sum(file.size for graph in graphs if graph.gpu for file in [graph.gpu.file, *graph.gpu.data])
    size = sum(file.size for graph in graphs for file in graph.files()) - for_gpus
    low, high = {"fp32": (0.9, 1.1), "fp16": (0.4, 0.65), "int8": (0.4, 0.6), "fp8": (0.2, 0.5)}[
        bundle.manifest.precision
    ]
    assert low < size / demo_checkpoint().stat().st_size < high
    assert for_gpus < 0.4 * size
    assert (for_gpus > 0) is (bundle.manifest.precision == "int8")


def test_verify_measures_again_on_other_images(bundle: Bundle, tmp_path: Path) -> None:
    # Of three faces one backend or the other fails a gate by chance.
    report = verify_bundle(bundle.path, num_images=24, output=tmp_path / "report")
    assert report.passed
    assert len(report.scores) == 24
    assert "<svg" in (tmp_path / "report" / "parity.html").read_text()


def test_graphs_for_gpus_meet_gates_of_their_own(bundle: Bundle) -> None:
    """On ONNX Runtime's CPU, in the build's report and in that of verify. A backend that is named is measured alone."""
    built = from_json(json.loads((bundle.path / "parity.json").read_text()))
    reports = [built, verify_bundle(bundle.path, num_images=24)]
    for report in reports:
        names = [gate.name for gate in report.gates if gate.name.startswith("graphs for GPUs, on onnxruntime-cpu: ")]
        assert ("graphs for GPUs, on onnxruntime-cpu: score max |Δ|" in names) is (bundle.manifest.precision == "int8")
        assert report.passed
    alone = verify_bundle(bundle.path, num_images=2, backend="onnxruntime-cpu")
    assert not any("GPU" in gate.name for gate in alone.gates)


def test_a_graph_for_gpus_that_is_off_the_gates_is_found(bundles: dict[Precision, Bundle], tmp_path: Path) -> None:
    """The largest of its weights in float16 is negated; what runs on the CPU does not change."""
    folder = Path(shutil.copytree(bundles["int8"].path, tmp_path / "bundle"))
    file = folder / "vim.gpu.onnx"
    model = onnx.load(file)
    halves = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16]
    largest = max(halves, key=lambda tensor: math.prod(tensor.dims))
    largest.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(largest), largest.name))
    onnx.save(model, file)
    document = json.loads((folder / "manifest.json").read_text())
    document["graphs"]["vim"]["gpu"]["file"] = file_entry(file).model_dump()
    (folder / "manifest.json").write_text(json.dumps(document))
    report = verify_bundle(folder, num_images=24)
    failed = [gate.name for gate in report.gates if gate.failed]
    assert failed
    assert all(name.startswith("graphs for GPUs") for name in failed)


@needs_openvino
def test_openvino_passes_the_gates(bundle: Bundle) -> None:
    report = verify_bundle(bundle.path, backend="openvino")
    assert report.passed
    assert report.backend == "encoder openvino, vim onnxruntime-cpu, fusion openvino"
    # Far inside the gates, which bf16 is not: its arithmetic is float32, also where the weights are float16.
    arithmetic = {"fp32": 1e-5, "fp16": 2e-3}.get(
        bundle.manifest.precision, LIMITS[bundle.manifest.precision].score_max_abs
    )
    assert max(abs(pair.delta) for pair in report.scores) < arithmetic


def test_verify_refuses_bf16_for_fp32(bundle: Bundle) -> None:
    if bundle.manifest.precision != "fp32":
        pytest.skip("of an fp32 bundle")
    result = CliRunner().invoke(main, ["verify", str(bundle.path), "--backend", "openvino-bf16"])
    assert result.exit_code == 2
    assert "use the backend openvino" in result.stderr


@pytest.mark.parametrize("installed", [False, pytest.param(True, marks=needs_openvino)])
def test_inspect_says_what_would_run_here(installed: bool, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdnet_engines.sessions.onnxruntime.has_cuda", lambda: False)
    if not installed:
        monkeypatch.setitem(sys.modules, "openvino", None)
    # Without OpenVINO the measured choice still counts if it does not need it: then nothing but the name is known.
    choice, why = (choose(bundle), "measured with") if installed else ("onnxruntime-cpu", "")
    result = CliRunner().invoke(main, ["inspect", str(bundle.path)])
    line = next(line for line in unwrapped(result.stdout) if line.startswith("runs here"))
    assert f"{choice} (backend auto; {why}" in line


@needs_openvino
def test_every_backend_of_this_machine_has_met_the_gates(bundle: Bundle) -> None:
    """By the manifest, with the machine that they were measured on, and with the probes that come with the bundle."""
    rows = {str(Choice(row.graphs)): row for row in bundle.manifest.backends}
    assert {str(choice) for choice in candidates(bundle)} <= rows.keys()
    for words, row in rows.items():
        assert row.parity.passed, (words, row.failures)
        assert row.machine == this_machine()
        assert measure_apart(bundle, Choice(row.graphs)).report.passed


def test_evaluate_gives_the_scores_of_score(bundle: Bundle, faces: Path, tmp_path: Path) -> None:
    """By default, on whatever `auto` takes, int8 included."""
    file = tmp_path / "evaluation.json"
    result = CliRunner().invoke(evaluate, ["evaluate", str(bundle.path), "--data", str(faces), "--json", str(file)])
    assert result.exit_code == 0, result.stderr
    (split,) = json.loads(file.read_text())["splits"]
    with Scorer.open(bundle.path) as scorer:
        rows = scorer.score([faces / "Images" / row["image"] for row in split["predictions"]])
    # Batches of the same images, in the same order.
    np.testing.assert_allclose([row["score"] for row in split["predictions"]], [row.score for row in rows], atol=1e-6)


@pytest.mark.parametrize(
    ("precision", "graph", "backend"),
    [
        ("fp32", "encoder", "auto"),
        ("fp32", "vim", "onnxruntime-cpu"),
        ("fp16", "encoder", "onnxruntime-cpu"),
        ("fp16", "fusion", "auto"),
        *(("int8", graph, "onnxruntime-cpu") for graph in GRAPH_NAMES),  # whose gates are the widest
        ("int8", "encoder", "auto"),
    ],
)
def test_a_weight_that_is_changed_and_hashed_anew_fails_the_check(
    precision: Precision, graph: GraphName, backend: Backend, bundles: dict[Precision, Bundle], tmp_path: Path
) -> None:
    """The largest weight of the graph is negated."""
    bundle = bundles[precision]
    folder = Path(shutil.copytree(bundle.path, tmp_path / "altered"))
    entry = bundle.manifest.graphs[graph]
    for file in (file.name for file in [entry.file, entry.cpu] if file):
        proto = onnx.load(folder / file)
        tensor = max(proto.graph.initializer, key=lambda each: math.prod(each.dims))
        tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
        onnx.save(proto, folder / file)
    document = json.loads((folder / "manifest.json").read_text())
    for kind in ("file", "cpu"):
        if described := document["graphs"][graph][kind]:
            document["graphs"][graph][kind] = file_entry(folder / described["name"]).model_dump()
    (folder / "manifest.json").write_text(json.dumps(document))
    trial = check(Bundle.open(folder), backend)
    assert not trial.holds, trial.verdict()


def test_verify_fails_on_a_bundle_that_is_not_the_model(bundle: Bundle, tmp_path: Path) -> None:
    """Another checkpoint's graphs under this one's provenance: what parity is there to find."""
    model = load_checkpoint(demo_checkpoint())
    model.fusion.head.out.bias.data += 0.2
    other = tmp_path / "other.safetensors"
    save_checkpoint(model, other)
    result = CliRunner().invoke(main, ["verify", str(bundle.path), "--against", str(other)])
    assert result.exit_code == 2
    assert "is not what the bundle was built from" in result.stderr


@pytest.mark.parametrize(("options", "loud"), [((), True), (("--preset", "demo"), False), (("-q",), False)])
def test_a_bare_build_says_loudly_that_it_makes_the_demo(
    options: tuple[str, ...], loud: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise MDNetError("far enough")

    monkeypatch.setattr(build_module, "build_bundle", stop)
    result = CliRunner().invoke(main, ["build", "-o", str(tmp_path / "bundle"), *options])
    lines = result.stderr.splitlines()
    assert lines[-1] == "error: far enough"
    assert lines[0].startswith("!!! no --checkpoint: this bundle is the DEMO") == loud
    assert ("mdnet-export build --checkpoint" in result.stderr) == loud


def test_inspect_shows_what_is_inside(bundle: Bundle) -> None:
    result = CliRunner().invoke(main, ["inspect", str(bundle.path)])
    assert result.exit_code == 0, result.stderr
    shown = "\n".join(unwrapped(result.stdout))
    for part in ("demo", bundle.manifest.precision, "down_s16 float32[batch, 48, 8, 8]", "Apache-2.0", "parity"):
        assert part in shown
    assert ("convolutions of vae.down_blocks.3.resnets.0" in shown) is (bundle.manifest.precision == "int8")
    assert [line for line in result.stdout.splitlines() if len(line) > 100] == []


def test_inspect_says_which_blocks_run_by_winograd(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the encoder's form for the CPU alone."""
    names = ("vae.encoder.a.conv1/Conv", "vae.encoder.a.conv2/Conv", "unet.b.conv1/Conv")
    nodes = [onnx.helper.make_node("GroupNormSiluConv", ["x"], ["y"], name=name) for name in names]
    monkeypatch.setattr("mdnet_export.inspect.winograd_convolutions", lambda file: nodes)
    encoder = bundle.manifest.graphs["encoder"]
    for cpu in (None, encoder.file):
        graphs = {**bundle.manifest.graphs, "encoder": encoder.model_copy(update={"cpu": cpu})}
        print_bundle(Bundle(bundle.path, bundle.manifest.model_copy(update={"graphs": graphs})))
        shown = "\n".join(unwrapped(capsys.readouterr().out))
        assert ("3 convolutions of " in shown and "runs them here in float32" in shown) == (cpu is not None)


@pytest.mark.usefixtures("exported_before", "without_openvino")
def test_a_failed_gate_writes_nothing_unless_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true_reference = build_module.reference_outputs

    def wrong_reference(*args: object) -> dict[str, np.ndarray]:
        outputs = true_reference(*args)  # type: ignore[arg-type]
        return {**outputs, "score": outputs["score"] + 0.5}

    monkeypatch.setattr(build_module, "reference_outputs", wrong_reference)
    images = parity_images(None, 128, 2)
    with pytest.raises(ParityError, match=r"score max \|Δ\| is 0.5"):
        build_bundle(choose_weights(), tmp_path / "bundle", images=images)
    assert list(tmp_path.iterdir()) == []
    forced = build_bundle(choose_weights(), tmp_path / "bundle", images=images, force=True)
    assert forced.manifest.parity.forced
    assert not forced.manifest.parity.passed
    assert forced.manifest.parity.max_abs == pytest.approx(0.5, abs=1e-3)


@pytest.mark.usefixtures("exported_before", "without_openvino")
def test_pictures_of_people_are_not_in_the_bundle_nor_are_their_names(tmp_path: Path) -> None:
    """Figures are. The probes are drawn faces, as ever."""
    drawn = parity_images(None, 128, 3)
    images = dataclasses.replace(
        drawn, names=["anna.jpg", "ben.jpg", "cho.jpg"], source="3 images of mine", private=True
    )
    bundle = build_bundle(choose_weights(), tmp_path / "bundle", images=images)
    for file in bundle.path.iterdir():
        assert not any(name.encode() in file.read_bytes() for name in images.names), file
    page = (bundle.path / "parity.html").read_text()
    assert "data:image" not in page
    assert "picture 3" in page
    stored = from_json(json.loads((bundle.path / "parity.json").read_text()))
    assert [pair.image for pair in stored.scores] == ["picture 1", "picture 2", "picture 3"]
    assert bundle.manifest.parity.source == "3 images of mine"
    assert len(read_probes(bundle).images.pixels) == PROBES


@pytest.mark.usefixtures("exported_before", "without_openvino")
def test_a_checkpoint_is_built_and_verified_with_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's with another bias in the fusion, which is exported anew."""
    copy = build_module.export_graph
    monkeypatch.setattr(
        build_module, "export_graph", lambda *given: (export_graph if given[1] == "fusion" else copy)(*given)
    )
    model = load_checkpoint(demo_checkpoint())
    model.fusion.head.out.bias.data += 0.3
    model.config = dataclasses.replace(model.config, face=0.8)
    file = tmp_path / "mine.safetensors"
    save_checkpoint(model, file)
    out = tmp_path / "bundle"
    arguments = ["build", "--checkpoint", str(file), "-o", str(out), "--num-images", "2"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    manifest = Bundle.open(out).manifest
    assert (manifest.provenance.weights, manifest.preprocessing.face) == ("checkpoint", 0.8)
    assert "a square of 0.8 times the face, eyes level" in CliRunner().invoke(main, ["inspect", str(out)]).stdout
    without = CliRunner().invoke(main, ["verify", str(out)])
    assert "give it with --against" in without.stderr
    assert CliRunner().invoke(main, ["verify", str(out), "--against", str(file), "--num-images", "2"]).exit_code == 0


KILLED = """
import os, shutil, signal, sys
from mdnet_export import build
from mdnet_export.cli.main import main

def export(model, name, folder):
    if name == "vim":
        os.kill(os.getpid(), signal.SIGKILL)
    shutil.copy(f"{sys.argv[1]}/{name}.onnx", folder)
build.export_graph = export
main(["build", "-o", sys.argv[2]])
"""


def test_a_killed_build_leaves_the_old_bundle(demo_bundle: Bundle, float_graphs: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of a rebuild: the bundle that was there is still whole."""
    target = Path(shutil.copytree(demo_bundle.path, tmp_path / "bundle"))
    process = subprocess.run([sys.executable, "-c", KILLED, float_graphs, target], stderr=subprocess.DEVNULL)
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob(".bundle.*/bundle/*")] == ["encoder.onnx"]
    assert Bundle.open(target).manifest == demo_bundle.manifest


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--preset", "sd15-vim-s"], "has no packaged weights; give yours with --checkpoint FILE"),
        (["--preset", "sd15"], "no preset 'sd15'; known: sd15-vim-s"),
        (["--checkpoint", "none.safetensors"], "none.safetensors: no such file"),
        (["--checkpoint", "text.safetensors"], "not a safetensors file"),
        (["--checkpoint", "text.safetensors", "--random-init"], "contradict each other"),
        (["--images", "empty"], "empty"),
        (["--num-images", "0"], "at least one image"),
        (["-o", "text.safetensors"], "is a file; -o takes the folder"),
        (["-o", "full"], "exists and is not a bundle; it is left alone"),
        (["--precision", "fp4"], "'fp4' is not one of"),
    ],
)
def test_a_wrong_command_is_explained_and_writes_nothing(
    arguments: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.safetensors").write_text("not weights")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    result = CliRunner().invoke(main, ["build", *arguments])
    assert result.exit_code in (1, 2)
    assert reason in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_checkpoint_of_another_preset_is_refused() -> None:
    with pytest.raises(UsageError, match="checkpoint of preset demo, not sd15-vim-t"):
        choose_weights(checkpoint=demo_checkpoint(), preset_name="sd15-vim-t")


@pytest.mark.usefixtures("exported_before")
def test_no_space_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = build_module.export_graph

    def full(model: MDNet, name: GraphName, folder: Path) -> Path:
        if name == "vim":
            raise OSError(28, "No space left on device", str(tmp_path / "bundle"))
        return copy(model, name, folder)

    monkeypatch.setattr(build_module, "export_graph", full)
    result = CliRunner().invoke(main, ["build", "-o", str(tmp_path / "bundle"), "--num-images", "1"])
    assert result.exit_code == 1
    assert "no space left on the disk" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_altered_on_disk_is_not_verified(bundle: Bundle, tmp_path: Path) -> None:
    target = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    with (target / "vim.onnx").open("r+b") as stream:
        stream.seek(100)
        stream.write(b"\x00\x01")
    with pytest.raises(BundleError, match=r"vim\.onnx has sha256"):
        verify_bundle(target)


def test_parity_images_are_spread_over_a_folder(tmp_path: Path) -> None:
    drawn = parity_images(None, 128, 3)
    assert len({image.tobytes() for image in drawn.pixels}) == 3
    from PIL import Image

    for i in range(9):
        Image.fromarray(drawn.pixels[i % 3]).save(tmp_path / f"{i}.png")
    (tmp_path / "9.png").write_text("no image")
    chosen = parity_images(tmp_path, 128, 4)
    assert chosen.names == ["0.png", "3.png", "6.png"]  # 9.png is the fourth, and can't be read
    assert dataclasses.asdict(chosen)["source"].startswith("3 images of ")
