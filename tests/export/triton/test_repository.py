"""A Triton model repository from a bundle: what Triton's own protobuf reads in it, and what its ensemble computes.

No Triton server runs here. In its place the tests do what its core does with the files: read the configurations, check
every tensor of the ensemble, and run the ensemble's steps with ONNX Runtime, as the configurations say.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image, ImageOps
from small_bundle import SIZE, write_small_bundle

from mdnet_engines.bundle.files import Bundle, file_entry
from mdnet_engines.bundle.manifest import GRAPH_NAMES, BatchRange, PlanEntry, PlanSet
from mdnet_engines.errors import BundleError, MDNetError, UsageError
from mdnet_engines.ops import native
from mdnet_engines.tensorrt.plans import install_plans, plan_path, scratch_folder
from mdnet_export.triton import repository as triton
from mdnet_export.triton.config import to_text
from mdnet_export.triton.readme import facts, preprocessing, readme
from mdnet_export.triton.repository import write_repository
from mdnet_rt import Scorer
from mdnet_rt.images.preprocess import load_image

model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs tritonclient and grpcio")
text_format = pytest.importorskip("google.protobuf.text_format")

EXPORT = Path(sysconfig.get_path("scripts"), "mdnet-export")
DTYPES = {"TYPE_UINT8": np.uint8, "TYPE_FP32": np.float32, "TYPE_FP16": np.float16}
Configs = dict[str, Any]

needs_library = pytest.mark.skipif(native.custom_op_library() is None, reason="installed without the native library")


@pytest.fixture
def small(tmp_path: Path) -> Bundle:
    return Bundle.open(write_small_bundle(tmp_path / "mdnet-bundle"))


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 128, 128, 3), np.uint8)


def read(repository: Path) -> Configs:
    """Every model's configuration by its folder's name, as Triton's protobuf reads it. Unknown fields are an error."""
    texts = {file.parent.name: file.read_text(encoding="utf-8") for file in repository.glob("*/config.pbtxt")}
    return {name: text_format.Parse(text, model_config_pb2.ModelConfig()) for name, text in texts.items()}


def names(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def kind_of(tensor: Any) -> str:
    return str(model_config_pb2.DataType.Name(tensor.data_type))


def parameters(config: Any) -> dict[str, str]:
    return {key: value.string_value for key, value in config.parameters.items()}


# ------------------------------------------------------------------------------------------ what Triton's core would do


def check_model(config: Any, folder: Path) -> None:
    """The configuration agrees with the ONNX file: names, types, and shapes without the batch axis."""
    graph = onnx.load(folder / "1" / config.default_model_filename, load_external_data=False).graph
    for tensors, values in ((config.input, graph.input), (config.output, graph.output)):
        assert [tensor.name for tensor in tensors] == [value.name for value in values]
        for tensor, value in zip(tensors, values, strict=True):
            batch, *row = value.type.tensor_type.shape.dim
            assert batch.dim_param, "Triton batches along a first axis of any size"
            sizes = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
            assert list(sizes) == [dim.dim_value for dim in row]
            assert np.prod(tensor.dims) == np.prod(list(sizes))
            assert tensor.dims, "Triton refuses a tensor without dims"
            assert DTYPES[kind_of(tensor)] == onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)


def check_warmup(config: Any) -> None:
    """Each warm-up feeds every input of the model, as the model takes it."""
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, config.max_batch_size]
    for warmup in config.model_warmup:
        inputs = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in config.input}
        assert {key: (value.data_type, list(value.dims)) for key, value in warmup.inputs.items()} == inputs
        assert all(value.zero_data for value in warmup.inputs.values())


def check_ensemble(configs: Configs, name: str) -> list[Any]:
    """Walk the ensemble's tensors as Triton does when it loads it; gives the steps in an order that can run."""
    ensemble = configs[name]
    assert ensemble.platform == "ensemble"
    assert not ensemble.model_warmup, "Triton refuses one of an ensemble"
    assert not ensemble.instance_group, "likewise"
    known = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in ensemble.input}
    waiting, order = list(ensemble.ensemble_scheduling.step), []
    while waiting:
        ready = [step for step in waiting if set(step.input_map.values()) <= known.keys()]
        assert ready, "a cycle, or a tensor that nothing gives"
        for step in ready:
            model = configs[step.model_name]
            assert list(model.version_policy.specific.versions) == [step.model_version]
            assert model.max_batch_size >= ensemble.max_batch_size
            assert {tensor.name for tensor in model.input} == step.input_map.keys()
            assert step.output_map.keys() <= {tensor.name for tensor in model.output}
            for tensor in model.input:
                assert known[step.input_map[tensor.name]] == (tensor.data_type, list(tensor.dims))
            for tensor in model.output:
                made = step.output_map[tensor.name]
                assert made not in known, "two steps give the same tensor"
                known[made] = (tensor.data_type, list(tensor.dims))
            waiting.remove(step)
            order.append(step)
    for tensor in ensemble.output:
        assert known[tensor.name] == (tensor.data_type, list(tensor.dims))
    return order


def open_session(config: Any, folder: Path) -> Any:
    """As Triton's backend opens it: the default file of the version's folder, with the libraries that are named."""
    import onnxruntime

    assert config.backend == "onnxruntime"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    for library in config.model_operations.op_library_filename:
        options.register_custom_ops_library(library)
    file = folder / "1" / config.default_model_filename
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def run_ensemble(repository: Path, pixels: np.ndarray, name: str = "mdnet") -> np.ndarray:
    """The ensemble's score for a batch, step by step, each tensor in the shape that its model shows to others."""
    configs = read(repository)
    known = {"image": pixels}
    for step in check_ensemble(configs, name):
        config = configs[step.model_name]
        session = open_session(config, repository / step.model_name)
        feeds = {}
        for tensor in config.input:
            value = known[step.input_map[tensor.name]]
            assert value.shape[1:] == tuple(tensor.dims)
            feeds[tensor.name] = value
        made = session.run([tensor.name for tensor in config.output], feeds)
        for tensor, value in zip(config.output, made, strict=True):
            known[step.output_map[tensor.name]] = value.reshape(len(pixels), *tensor.dims)
    assert [tensor.name for tensor in configs[name].output] == ["score"]
    return known["score"]


# ------------------------------------------------------------------------------------------------------ what is written


def test_the_repository_agrees_with_its_graphs(bundle: Bundle, tmp_path: Path) -> None:
    made = write_repository(bundle, tmp_path / "models")
    configs = read(made.path)
    assert sorted(configs) == ["mdnet", "mdnet_encoder", "mdnet_fusion", "mdnet_vim"]
    assert len(check_ensemble(configs, "mdnet")) == 3
    for name in GRAPH_NAMES:
        config = configs[f"mdnet_{name}"]
        assert config.name == f"mdnet_{name}"
        check_model(config, made.path / config.name)
        check_warmup(config)
        assert config.HasField("dynamic_batching")
        assert [model_config_pb2.ModelInstanceGroup.Kind.Name(g.kind) for g in config.instance_group] == ["KIND_CPU"]


def test_its_ensemble_gives_the_scores_of_the_bundle(bundle: Bundle, tmp_path: Path, images: np.ndarray) -> None:
    made = write_repository(bundle, tmp_path / "models")
    with Scorer.open(bundle.path, backend="onnxruntime-cpu", threads=1) as scorer:
        expected = scorer.score_batch(images)
    scores = run_ensemble(made.path, images)
    assert scores.shape == (5, 1)
    # Here the operators run their function bodies, there the native kernels: other roundings in fp16, and in int8 steps
    # of values that lie between two: each form may be 0.15 from float32 (its gate), on another side.
    tolerance = {"fp32": 1e-5, "fp16": 1e-4, "int8": 0.2, "fp8": 0.1}[bundle.manifest.precision]
    np.testing.assert_allclose(scores[:, 0], expected, atol=tolerance, rtol=0)
    assert np.ptp(expected) > 10 * 1e-5


@needs_library
def test_with_the_native_scan_they_are_the_same_scores(bundle: Bundle, tmp_path: Path, images: np.ndarray) -> None:
    models = tmp_path / "models"
    write_repository(bundle, models, native_scan=str(models))  # where "the server", these tests, sees it
    configs = read(models)
    library = str(models / "mdnet_vim" / "libmdnet_ops.so")
    used = {name for name, config in configs.items() if library in config.model_operations.op_library_filename}
    graphs = {"mdnet_encoder", "mdnet_vim", "mdnet_fusion"}
    assert used == (graphs if bundle.manifest.precision == "int8" else {"mdnet_vim"})
    with Scorer.open(bundle.path, backend="onnxruntime-cpu", threads=1) as scorer:
        expected = scorer.score_batch(images)
    np.testing.assert_allclose(run_ensemble(models, images)[:, 0], expected, atol=1e-6, rtol=0)


def test_a_small_bundle_of_other_tensors_works_alike(small: Bundle, tmp_path: Path) -> None:
    made = write_repository(small, tmp_path / "models", name="other-2", max_batch_size=3)
    configs = read(made.path)
    check_ensemble(configs, "other-2")
    for name in GRAPH_NAMES:
        check_model(configs[f"other-2_{name}"], made.path / f"other-2_{name}")
        check_warmup(configs[f"other-2_{name}"])
    pixels = np.random.default_rng(1).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
    with Scorer.open(small.path, backend="onnxruntime-cpu") as scorer:
        expected = scorer.score_batch(pixels)
    np.testing.assert_allclose(run_ensemble(made.path, pixels, "other-2")[:, 0], expected, rtol=1e-6)


def test_an_int8_encoder_goes_in_the_form_of_its_device(bundles: Mapping[str, Bundle], tmp_path: Path) -> None:
    for kind, file in (("cpu", "encoder.cpu.onnx"), ("gpu", "encoder.gpu.onnx")):
        made = write_repository(bundles["int8"], tmp_path / kind, kind=kind)
        version = made.path / "mdnet_encoder" / "1"
        more = ["encoder.gpu.onnx.data"] if kind == "gpu" else []
        assert sorted(names(version)) == sorted([file, "encoder.onnx.data", *more])
        config = read(made.path)["mdnet_encoder"]
        assert config.default_model_filename == file
        assert model_config_pb2.ModelInstanceGroup.Kind.Name(config.instance_group[0].kind) == f"KIND_{kind.upper()}"


def test_the_bundle_can_be_read_as_before(bundles: Mapping[str, Bundle], tmp_path: Path) -> None:
    # Files with a second name can't: onnx refuses external data that is hard-linked.
    write_repository(bundles["int8"], tmp_path / "models")
    onnx.load(bundles["int8"].path / "encoder.onnx")
    Bundle.open(bundles["int8"].path)


def test_options_reach_the_configurations(small: Bundle, tmp_path: Path) -> None:
    made = write_repository(small, tmp_path / "m", kind="gpu", instances=2, max_batch_size=1, queue_delay=250)
    for name, config in read(made.path).items():
        assert config.max_batch_size == 1
        if name != "mdnet":
            assert [group.count for group in config.instance_group] == [2]
            assert config.dynamic_batching.max_queue_delay_microseconds == 250
            assert [warmup.batch_size for warmup in config.model_warmup] == [1]


def test_what_a_client_has_to_know_is_stated(bundles: Mapping[str, Bundle], tmp_path: Path) -> None:
    bundle = bundles["fp32"]
    made = write_repository(bundle, tmp_path / "models")
    stated = parameters(read(made.path)["mdnet"])
    document = json.loads((made.path / "mdnet-triton.json").read_text(encoding="utf-8"))
    readme = (made.path / "README.md").read_text(encoding="utf-8")
    assert (stated["image_size"], stated["jpeg_draft"]) == ("128", "2")
    assert (stated["score_minimum"], stated["score_maximum"]) == ("1", "5")
    assert stated["bundle"] == bundle.manifest.digest()
    for text in (bundle.manifest.digest(), *bundle.manifest.licenses, *preprocessing(bundle.manifest)):
        assert text in readme
    for licence in bundle.manifest.licenses:
        assert licence in stated["licenses"]
    assert stated.items() <= document.items()
    assert str(tmp_path) not in readme + json.dumps(document)
    assert "mean nothing" in readme


@pytest.mark.parametrize("form", ["jpeg", "turned jpeg", "transparent png"])
def test_the_stated_preprocessing_is_the_runtimes(form: str, small: Bundle) -> None:
    # The steps as the README words them, by hand. What they say is looked for in the text, so that neither moves alone.
    pixels = np.random.default_rng(2).integers(0, 256, (13, 17, 4), np.uint8)
    picture = Image.fromarray(pixels, "RGBA").resize((700, 520), Image.Resampling.BILINEAR)
    file = io.BytesIO()
    if form == "transparent png":
        picture.save(file, "PNG")
    else:
        exif = Image.Exif()
        exif[0x0112] = 6 if form == "turned jpeg" else 1
        picture.convert("RGB").save(file, "JPEG", exif=exif)
    steps = " ".join(preprocessing(small.manifest))
    for words in (f"{2 * SIZE} pixels", "on white", "EXIF", f"central square to {SIZE} x {SIZE}", "bicubic"):
        assert words in steps
    image: Image.Image = Image.open(file)
    if form != "transparent png":
        scale = max(s for s in (1, 2, 4, 8) if min(image.size) // s >= 2 * SIZE)
        image.draft(None, (-(-image.width // scale), -(-image.height // scale)))
        assert image.width == -(-700 // scale), "the scale that the words say"
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = ImageOps.exif_transpose(image.convert("RGB"))
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    square = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    np.testing.assert_array_equal(load_image(file.getvalue(), SIZE), np.asarray(square))


def test_clients_are_told_to_look_for_the_face_where_training_did(small: Bundle) -> None:
    made = small.manifest.preprocessing.model_copy(update={"face": 0.8})
    manifest = small.manifest.model_copy(update={"preprocessing": made})
    assert "its side 0.8 times the longer side of the face" in " ".join(preprocessing(manifest))
    assert "draft" not in " ".join(preprocessing(manifest))
    assert facts(manifest)["face"] == "0.8"
    assert "find_box=mdnet_rt.images.face_crop.FaceFinder(0.8)" in readme(manifest, "mdnet", ["encoder"], 8, [])
    assert "face" not in facts(small.manifest)


@pytest.mark.parametrize(
    "text", ["", 'a "quoted" \\ path\n', "ünïcode × 漢", "\x00\x017\x7f", "\\101 \\x41 '"], ids=ascii
)
def test_texts_are_escaped_so_that_protobuf_reads_them_back(text: str) -> None:
    written = to_text({"name": text, "parameters": [{"key": text, "value": {"string_value": text}}]})
    config = text_format.Parse(written, model_config_pb2.ModelConfig())
    assert config.name == text
    assert parameters(config) == {text: text}
    assert written.isascii()


# -------------------------------------------------------------------------------------------------------------- plans


def install(bundle: Bundle, **changes: Any) -> Bundle:
    """Give the bundle a set of TensorRT plans of a few bytes; nothing here loads them."""
    with scratch_folder(bundle) as scratch:
        plans = {}
        for name in GRAPH_NAMES:
            (scratch / f"{name}.plan").write_text(f"plan of {name}")
            plans[name] = PlanEntry(
                file=file_entry(scratch / f"{name}.plan"), graph=bundle.manifest.graphs[name].digest()
            )
        batch = BatchRange(minimum=1, optimum=4, maximum=8)
        described = {"runtime": "tensorrt", "version": "11.4.0.106", "target": "sm_90", "batch": batch, "plans": plans}
        return install_plans(bundle, scratch, PlanSet.model_validate({**described, **changes}))


def test_plans_are_served_where_the_bundle_has_them(small: Bundle, tmp_path: Path) -> None:
    bundle = install(small, gpu="NVIDIA H100")
    made = write_repository(bundle, tmp_path / "models", backend="tensorrt")
    configs = read(made.path)
    check_ensemble(configs, "mdnet")
    for name in GRAPH_NAMES:
        config = configs[f"mdnet_{name}"]
        file = made.path / config.name / "1" / config.default_model_filename
        assert file.read_text() == f"plan of {name}"
        assert config.backend == "tensorrt"
        assert config.max_batch_size == 8, "not more than the plans take"
        assert model_config_pb2.ModelInstanceGroup.Kind.Name(config.instance_group[0].kind) == "KIND_GPU"
        check_warmup(config)
    readme = (made.path / "README.md").read_text(encoding="utf-8")
    assert "TensorRT 11.4.0.106 on NVIDIA H100" in readme


def chosen_graph(config: Any, rows: int) -> int | None:
    """The size of the CUDA graph that Triton's TensorRT backend runs a batch of `rows` with, or None.

    As `FindClosestCudaGraph` does: graphs in the order of their keys, which are the batch and every input's shape; each
    number of the batch's key must lie between those of the graph's lower bound and of the graph.
    """

    def key(spec: Any, inputs: Any) -> list[int]:
        shapes = [[spec, *inputs[tensor.name].dim] for tensor in config.input if tensor.name in inputs]
        return [spec, *(number for shape in shapes for number in shape)]

    asked = [rows, *(number for tensor in config.input for number in (rows, *tensor.dims))]
    for spec in sorted(config.optimization.cuda.graph_spec, key=lambda spec: spec.batch_size):
        most, least = (
            key(spec.batch_size, spec.input),
            key(spec.graph_lower_bound.batch_size, spec.graph_lower_bound.input),
        )
        if len(most) == len(asked) and all(a <= b <= c for a, b, c in zip(least, asked, most, strict=True)):
            return int(spec.batch_size)
    return None


@pytest.mark.parametrize(
    ("batch", "limit", "sizes", "profiles"),
    [
        ((1, 4, 8), None, [1, 2, 4, 8], []),
        ((1, 4, 8), 6, [1, 2, 4, 6], []),
        ((1, 1, 1), None, [1], []),
        ((1, 8, 64), None, [1, 2, 4, 8, 16], []),
        ((1, 1, 3, 12, 32), None, [1, 2, 3, 4, 8, 12, 16], ["0", "1", "2"]),
        ((1, 1, 3, 12, 32), 12, [1, 2, 3, 4, 8, 12], ["0", "1", "2"]),
        ((1, 1, 3, 12, 32), 3, [1, 2, 3], ["0", "1"]),
    ],
)
def test_every_batch_is_padded_to_one_of_a_few_sizes_within_its_profile(
    batch: tuple[int, ...], limit: int | None, sizes: list[int], profiles: list[str], small: Bundle, tmp_path: Path
) -> None:
    least, best, *further, most = batch
    taken = BatchRange(minimum=least, optimum=best, further_optima=further, maximum=most)
    made = write_repository(install(small, batch=taken), tmp_path / "models", backend="tensorrt", max_batch_size=limit)
    for name in GRAPH_NAMES:
        config = read(made.path)[f"mdnet_{name}"]
        assert config.optimization.cuda.graphs
        assert [spec.batch_size for spec in config.optimization.cuda.graph_spec] == sizes
        assert list(config.instance_group[0].profile) == profiles
        assert list(config.dynamic_batching.preferred_batch_size) == sizes
        for rows in range(1, config.max_batch_size + 1):
            size = chosen_graph(config, rows)
            assert size == min(each for each in sizes if each >= rows)
            # A context has the graphs of its own profile alone.
            assert any(first <= rows and size <= last for first, _, last in taken.profiles())
    said = (made.path / "README.md").read_text(encoding="utf-8")
    assert f"Plans run at {', '.join(map(str, sizes))} images" in said


def test_where_requests_may_wait_no_small_size_is_preferred(small: Bundle, tmp_path: Path) -> None:
    """Triton sends a batch of a size that it prefers at once: a single image would never wait for a second one."""
    made = write_repository(install(small), tmp_path / "models", backend="tensorrt", queue_delay=500)
    for name in GRAPH_NAMES:
        batching = read(made.path)[f"mdnet_{name}"].dynamic_batching
        assert (list(batching.preferred_batch_size), batching.max_queue_delay_microseconds) == ([], 500)


def test_onnx_files_take_batches_as_they_come(small: Bundle, tmp_path: Path) -> None:
    config = read(write_repository(small, tmp_path / "models").path)["mdnet_vim"]
    assert not config.HasField("optimization")
    assert list(config.dynamic_batching.preferred_batch_size) == []


def test_compatible_plans_need_an_option_of_triton_which_the_readme_has(small: Bundle, tmp_path: Path) -> None:
    bundle = install(install(small, target="portable", compatible=True), target="sm_80", stripped=True)
    made = write_repository(bundle, tmp_path / "models", backend="tensorrt")
    assert made.plans == bundle.manifest.engines[0], "the others are without weights"
    readme = (made.path / "README.md").read_text(encoding="utf-8")
    assert "TensorRT 11.4.0.106 and later" in readme
    assert "--backend-config=tensorrt,version-compatible=true" in readme


def test_one_of_several_sets_of_plans_has_to_be_named(small: Bundle, tmp_path: Path) -> None:
    bundle = install(install(small), target="sm_80")
    with pytest.raises(UsageError, match=r"--plans: tensorrt-11\.4\.0\.106-sm_90, tensorrt-11\.4\.0\.106-sm_80"):
        write_repository(bundle, tmp_path / "models", backend="tensorrt")
    made = write_repository(bundle, tmp_path / "models", backend="tensorrt", plans="tensorrt-11.4.0.106-sm_80")
    assert made.plans == bundle.manifest.engines[1]
    with pytest.raises(MDNetError, match="no TensorRT plans called 'sm_80'"):
        write_repository(bundle, tmp_path / "models", backend="tensorrt", plans="sm_80")


def nothing(bundle: Bundle) -> Bundle:
    return bundle


def rtx_only(bundle: Bundle) -> Bundle:
    return install(bundle, runtime="tensorrt-rtx", target="portable")


def of_other_graphs(bundle: Bundle) -> Bundle:
    engines = install(bundle).manifest.engines
    write_small_bundle(bundle.path, scale=2.0)
    document = json.loads((bundle.path / "manifest.json").read_text())
    document["engines"] = [each.model_dump() for each in engines]
    (bundle.path / "manifest.json").write_text(json.dumps(document))
    return Bundle.open(bundle.path)


def altered(bundle: Bundle) -> Bundle:
    made = install(bundle)
    plan_path(made, made.manifest.engines[0], "vim").write_text("PLAN of vim")
    return made


def for_large_batches(bundle: Bundle) -> Bundle:
    return install(bundle, batch=BatchRange(minimum=2, optimum=4, maximum=8))


def without_weights(bundle: Bundle) -> Bundle:
    return install(bundle, stripped=True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (without_weights, "without weights, which Triton can't put back"),
        (nothing, "no TensorRT plans"),
        (rtx_only, "no TensorRT plans"),
        (of_other_graphs, "built from other graphs"),
        (altered, "it was altered"),
        (for_large_batches, "need at least 2 images"),
    ],
)
def test_plans_that_triton_could_not_serve_are_refused_with_the_command_that_builds_them(
    make: Callable[[Bundle], Bundle], words: str, small: Bundle, tmp_path: Path
) -> None:
    bundle = make(small)
    with pytest.raises(MDNetError, match=words) as caught:
        write_repository(bundle, tmp_path / "models", backend="tensorrt")
    assert f"mdnet-export engines {bundle.path} --backend tensorrt" in str(caught.value)
    assert not (tmp_path / "models").exists()


# ------------------------------------------------------------------------------------------------- written whole or not


def test_a_repository_of_ours_is_replaced(small: Bundle, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    write_repository(small, models, name="before")
    write_repository(small, models)
    assert sorted(path.name for path in models.iterdir()) == [
        *("README.md", "mdnet", "mdnet-triton.json", "mdnet_encoder", "mdnet_fusion", "mdnet_vim")
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mdnet-bundle", "models"], "no scratch folder is left"
    assert (models.stat().st_mode & 0o777) == 0o777 & ~umask(), "a server of another user can read it"


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_models_of_others_in_a_repository_are_not_lost(small: Bundle, tmp_path: Path) -> None:
    models = write_repository(small, tmp_path / "models").path
    (models / "resnet").mkdir()
    with pytest.raises(UsageError, match="resnet"):
        write_repository(small, models)
    assert (models / "resnet").is_dir()


@pytest.mark.parametrize("marker", ["{", "[]", "{}", '{"entries": "README.md"}', '{"entries": []}'])
def test_a_folder_of_something_else_is_left_alone(marker: str, small: Bundle, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mdnet-triton.json").write_text(marker)
    with pytest.raises(UsageError, match="left alone"):
        write_repository(small, tmp_path / "models")
    assert names(tmp_path / "models") == ["mdnet-triton.json"]


def test_a_file_the_current_folder_and_the_bundle_are_not_replaced(
    small: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    models = write_repository(small, tmp_path / "models").path
    monkeypatch.chdir(models / "mdnet")
    for target, words in (
        (tmp_path / "file", "is a file"),
        (models, "current folder"),
        (small.path, "in the bundle"),
        (small.path / "models", "in the bundle"),
    ):
        with pytest.raises(UsageError, match=words):
            write_repository(small, target)


@pytest.mark.parametrize("there", [True, False], ids=["over another", "new"])
def test_a_full_disk_leaves_what_was_there(
    there: bool, small: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    if there:
        write_repository(small, models, name="before")
    before = names(models)

    real = shutil.copyfile

    def full(source: Path, copy: Path) -> None:
        if source.name == "fusion.onnx":
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        real(source, copy)

    monkeypatch.setattr(triton.shutil, "copyfile", full)
    with pytest.raises(MDNetError, match=rf"no space left on the disk for {models}"):
        write_repository(small, models)
    assert names(models) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mdnet-bundle", *(["models"] if there else [])]


def test_a_bundle_that_is_replaced_meanwhile_is_told_of(
    small: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = triton._onnx_files

    def replaced(bundle: Bundle, graph: Any, kind: Any) -> list[Path]:
        if graph == "fusion":
            write_small_bundle(bundle.path, scale=3.0)
        return real(bundle, graph, kind)

    monkeypatch.setattr(triton, "_onnx_files", replaced)
    with pytest.raises(MDNetError, match="replaced while it was copied"):
        write_repository(small, tmp_path / "models")
    assert not (tmp_path / "models").exists()


# ------------------------------------------------------------------------------------------------------------- bad use


def bent(bundle: Bundle, graph: str, side: str, **changes: Any) -> Bundle:
    """The bundle, with the first input or output of a graph described as something else."""
    document = json.loads((bundle.path / "manifest.json").read_text())
    document["graphs"][graph][side][0].update(changes)
    (bundle.path / "manifest.json").write_text(json.dumps(document))
    return Bundle.open(bundle.path)


@pytest.mark.parametrize(
    ("graph", "side", "changes", "words"),
    [
        ("vim", "inputs", {"name": "picture"}, "vim takes picture"),
        ("vim", "inputs", {"dtype": "float32"}, "vim takes image as float32"),
        ("vim", "outputs", {"name": "down"}, "vim gives down"),
        ("fusion", "inputs", {"shape": ["batch", 4]}, r"fusion takes down as float32 \['batch', 4\]"),
        ("fusion", "inputs", {"name": "up"}, "fusion takes up"),
        ("fusion", "outputs", {"name": "rating"}, "no score"),
        ("encoder", "outputs", {"shape": ["batch", "rows"]}, "then fixed sizes"),
        ("encoder", "outputs", {"shape": [1, 3]}, "a batch axis"),
    ],
)
def test_graphs_that_do_not_hang_together_are_refused(
    graph: str, side: str, changes: dict[str, Any], words: str, small: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=words):
        write_repository(bent(small, graph, side, **changes), tmp_path / "models")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--name", "a/b"], "--name"),
        (["--name", "README.md"], "--name"),
        (["--name", ""], "--name"),
        (["--backend", "tensorrt"], "mdnet-export engines"),
        (["--backend", "tensorrt", "--kind", "cpu"], "run on a GPU"),
        (["--plans", "x"], "--backend tensorrt"),
        (["--native-scan", "models"], "such as /models"),
    ],
)
def test_bad_use_is_one_line(options: list[str], words: str, small: Bundle, tmp_path: Path) -> None:
    assert words in refusal(small.path, tmp_path / "models", *options)
    assert not (tmp_path / "models").exists()


def test_a_damaged_bundle_is_one_line(small: Bundle, tmp_path: Path) -> None:
    (small.path / "vim.onnx").write_bytes(b"cut")
    assert "vim.onnx has 3 bytes" in refusal(small.path, tmp_path / "models")
    assert "is not a bundle" in refusal(tmp_path, tmp_path / "models")


def test_a_batch_larger_than_the_plans_take_is_refused(small: Bundle, tmp_path: Path) -> None:
    bundle = install(small)
    with pytest.raises(UsageError, match="take 8 images at most"):
        write_repository(bundle, tmp_path / "models", backend="tensorrt", max_batch_size=9)


def test_the_native_scan_needs_the_library(small: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "custom_op_library", lambda: None)
    with pytest.raises(MDNetError, match="without its native library"):
        write_repository(small, tmp_path / "models", native_scan="/models")


def refusal(*arguments: str | Path) -> str:
    """The one line that a failed command says."""
    result = subprocess.run([EXPORT, "triton", *arguments], capture_output=True, text=True, timeout=60)
    assert (result.returncode in (1, 2), result.stdout) == (True, "")
    (line,) = result.stderr.splitlines()
    return line


def test_the_command_takes_the_bundle_alone(small: Bundle, tmp_path: Path) -> None:
    blocked = ("torch", "diffusers", "onnx", "onnxscript", "onnxruntime", "tritonclient", "google.protobuf")
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); from mdnet_export.cli.main import main; main()"
    )
    command = [sys.executable, "-c", program, "triton", small.path, tmp_path / "models"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "ensemble mdnet" in result.stderr
    check_ensemble(read(tmp_path / "models"), "mdnet")
