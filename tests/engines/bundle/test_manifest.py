"""What `manifest.json` may say: the schema alone. What `Bundle.open` makes of a folder is in test_bundle.py."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mdnet_engines.bundle.manifest import FileEntry, Manifest


def file(name: str) -> dict[str, Any]:
    return {"name": name, "sha256": "0123456789abcdef" * 4, "size": 7}


def tensor(name: str, dtype: str, *shape: int | str) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


def graph(name: str, takes: dict[str, Any], gives: dict[str, Any]) -> dict[str, Any]:
    return {
        "file": file(f"{name}.onnx"),
        "data": [],
        "cpu": None,
        "gpu": None,
        "precision": "fp16",
        "inputs": [takes],
        "outputs": [gives],
    }


IMAGE = tensor("image", "uint8", "batch", 64, 64, 3)
TOKENS = tensor("tokens", "float16", "batch", 17, 24)
DOCUMENT: dict[str, Any] = {
    "schema_version": 3,
    "model": "md-net",
    "preset": "demo",
    "precision": "fp16",
    "preprocessing": {
        "image_size": 64,
        "resample": "bicubic",
        "crop": "center",
        "jpeg_draft": 2,
        "colour": "srgb",
        "face": 0.8,
    },
    "score": {"minimum": 1.0, "maximum": 5.0},
    "graphs": {
        "encoder": {
            **graph("encoder", IMAGE, TOKENS),
            "data": [file("encoder.onnx.data")],
            "cpu": file("encoder.cpu.onnx"),
            "gpu": {"file": file("encoder.gpu.onnx"), "data": [file("encoder.gpu.onnx.data")]},
        },
        "vim": graph("vim", IMAGE, TOKENS),
        "fusion": graph("fusion", TOKENS, tensor("score", "float32", "batch")),
    },
    "probes": file("probes.npz"),
    "reports": [file("parity.json"), file("parity.html")],
    "engines": [
        {
            "runtime": "tensorrt",
            "version": "11.4.0.106",
            "target": "sm_90",
            "platform": "linux-x86_64",
            "gpu": "NVIDIA H100",
            "batch": {"minimum": 1, "optimum": 8, "maximum": 32, "further_optima": [16]},
            "workspace_gib": 2.0,
            "level": 5,
            "stripped": True,
            "compatible": False,
            "plans": {name: {"file": file(f"{name}.plan"), "graph": "a" * 64} for name in ("encoder", "vim", "fusion")},
            "timing_cache": file("timing.cache"),
        }
    ],
    "backends": [
        {
            "graphs": {"encoder": "openvino", "vim": "onnxruntime-cpu", "fusion": "openvino"},
            "machine": {
                "architecture": "x86_64",
                "features": ["avx2"],
                "gpu": None,
                "versions": {"onnxruntime": "1.32.0"},
            },
            "parity": {
                "passed": False,
                "forced": False,
                "images": 6,
                "source": "drawn faces",
                "max_abs": 0.5,
                "mean_abs": None,
                "pearson": None,
                "spearman": None,
                "not_evaluated": "",
            },
            "failures": "score max |Δ| is 0.5, allowed is at most 0.001",
            "snr_db": {"tokens": 61.5},
        }
    ],
    "parity": {
        "passed": True,
        "forced": False,
        "images": 6,
        "source": "drawn faces",
        "max_abs": 0.001,
        "mean_abs": 0.0005,
        "pearson": None,
        "spearman": 0.99,
        "not_evaluated": "score Pearson (the reference scores hardly vary)",
    },
    "calibration": {"images": 64, "source": "64 images of photos", "sha256": "b" * 64, "method": "percentile"},
    "int8": {
        "int8_blocks": ["vae.mid_block.resnets.0"],
        "float_blocks": ["vae.down_blocks.0.resnets.0"],
        "max_score_drift": 0.15,
        "min_pearson": 0.995,
        "drift_max_abs": 0.04,
        "drift_pearson": None,
        "drift_on": ["onnxruntime-cpu", "openvino"],
        "speedup": 2.5,
        "speedup_on": "onnxruntime-cpu, batch 1",
        "slower_forced": False,
    },
    "fp8": {
        "fp8_blocks": ["vae.mid_block.resnets.0"],
        "float_blocks": [],
        "max_score_drift": 0.05,
        "min_pearson": 0.9997,
        "drift_max_abs": 0.04,
        "drift_pearson": 0.9999,
        "drift_on": [],
    },
    "float32_values": {"vim": ["add_58"]},
    "provenance": {
        "weights": "checkpoint",
        "checkpoint": "portraits",
        "checkpoint_sha256": "f" * 64,
        "seed": None,
        "training": {"protocol": "kfold:5", "fold": 2, "data": "ratings.csv", "data_sha256": "e" * 64},
        "command": "mdnet-export build",
        "versions": {"torch": "2.9.0"},
    },
    "licenses": ["Apache-2.0"],
}


def parts(node: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The place of every object whose fields the schema names (`versions` is free)."""
    if isinstance(node, dict) and path[-1:] not in (("versions",), ("snr_db",)):
        yield path
        for key, value in node.items():
            yield from parts(value, (*path, key))
    if isinstance(node, list):
        for index, value in enumerate(node):
            yield from parts(value, (*path, index))


def changed(path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    document = copy.deepcopy(DOCUMENT)
    node: Any = document
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return document


def test_a_bundle_that_does_not_say_what_becomes_of_colours_and_faces_is_as_it_was_with_its_digest() -> None:
    document = copy.deepcopy(DOCUMENT)
    del document["preprocessing"]["colour"], document["preprocessing"]["face"]
    manifest = Manifest.model_validate(document)
    assert not manifest.preprocessing.to_srgb
    assert manifest.preprocessing.face is None
    files = [entry for name in ("encoder", "vim", "fusion") for entry in manifest.graphs[name].files()]
    made = (
        '{"image_size":64,"resample":"bicubic","crop":"center","jpeg_draft":2}'  # as it was before there was a choice
    )
    text = "\n".join([*(file.sha256 for file in files), made])
    assert manifest.digest() == hashlib.sha256(text.encode()).hexdigest()
    assert Manifest.model_validate(DOCUMENT).preprocessing.to_srgb
    assert Manifest.model_validate(DOCUMENT).digest() != manifest.digest()


def test_what_is_written_is_read_back() -> None:
    manifest = Manifest.model_validate(DOCUMENT)
    assert json.loads(manifest.model_dump_json()) == DOCUMENT
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_version_1_has_no_probes_and_version_2_can_not_do_without() -> None:
    old = {**DOCUMENT, "schema_version": 1, "probes": None, "backends": []}
    assert Manifest.model_validate(old).probes is None
    for version, probes in ((1, file("probes.npz")), (2, None)):
        with pytest.raises(ValidationError, match="has probes from schema version 2 on"):
            Manifest.model_validate({**DOCUMENT, "schema_version": version, "probes": probes})


def test_a_manifest_of_version_2_knew_no_graphs_for_gpus() -> None:
    old = copy.deepcopy(DOCUMENT)
    old["schema_version"] = 2
    for entry in old["graphs"].values():
        del entry["gpu"]
    encoder = Manifest.model_validate(old).graphs["encoder"]
    assert encoder.on_gpus() == encoder
    built_from = [each["sha256"] for each in (file("encoder.onnx"), file("encoder.onnx.data"))]
    assert encoder.digest() == hashlib.sha256("\n".join(built_from).encode()).hexdigest()  # plans of then stay good


def test_gpus_get_the_graph_that_was_made_for_them() -> None:
    graphs = Manifest.model_validate(DOCUMENT).graphs
    encoder = graphs["encoder"].on_gpus()
    assert [each.name for each in encoder.files()] == ["encoder.gpu.onnx", "encoder.onnx.data", "encoder.gpu.onnx.data"]
    assert encoder.outputs == graphs["encoder"].outputs
    assert graphs["vim"].on_gpus() == graphs["vim"]
    assert encoder.digest() == graphs["encoder"].digest()


def test_a_plan_is_known_by_the_graph_that_it_was_built_from() -> None:
    """A change of what runs on the CPU alone leaves plans as they are; one of what they were built from does not."""
    place = ("graphs", "encoder")
    digest = Manifest.model_validate(DOCUMENT).graphs["encoder"].digest()
    for path, same in (
        (("file",), True),
        (("cpu",), True),
        (("data", 0), False),
        (("gpu", "file"), False),
        (("gpu", "data", 0), False),
    ):
        other = Manifest.model_validate(changed((*place, *path, "sha256"), OTHER)).graphs["encoder"]
        assert (other.digest() == digest) is same, path


def test_a_manifest_without_the_training_is_read() -> None:
    provenance = {name: value for name, value in DOCUMENT["provenance"].items() if name != "training"}
    assert Manifest.model_validate({**DOCUMENT, "provenance": provenance}).provenance.training is None


def test_every_file_is_vouched_for() -> None:
    names = [entry.name for entry in Manifest.model_validate(DOCUMENT).files()]
    assert sorted(names) == [
        "encoder.cpu.onnx",
        "encoder.gpu.onnx",
        "encoder.gpu.onnx.data",
        "encoder.onnx",
        "encoder.onnx.data",
        "fusion.onnx",
        "parity.html",
        "parity.json",
        "probes.npz",
        "vim.onnx",
    ]  # of the plans, each set vouches for its own


OTHER = "f" * 64


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("engines",), []),
        (("engines", 0, "plans", "vim", "file", "sha256"), OTHER),
        (("engines", 0, "version"), "9.9.9"),
        (("reports",), []),
        (("parity", "max_abs"), 0.5),
        (("provenance", "command"), "mdnet-export build --force"),
        (("provenance", "versions"), {}),
        (("licenses",), []),
        (("graphs", "vim", "file", "name"), "renamed.onnx"),
    ],
    ids=lambda part: ".".join(map(str, part)) if isinstance(part, tuple) else "",
)
def test_the_digest_is_that_of_the_scores_not_of_plans_and_reports(path: tuple[str | int, ...], value: Any) -> None:
    other = Manifest.model_validate(changed(path, value))
    assert other != Manifest.model_validate(DOCUMENT)
    assert other.digest() == Manifest.model_validate(DOCUMENT).digest()


def test_the_digest_changes_with_every_graph_its_weights_and_the_preprocessing() -> None:
    larger = copy.deepcopy(DOCUMENT)
    larger["preprocessing"]["image_size"] = 96
    for name in ("encoder", "vim"):
        larger["graphs"][name]["inputs"][0]["shape"] = ["batch", 96, 96, 3]
    swapped = copy.deepcopy(DOCUMENT)
    swapped["graphs"]["vim"]["file"]["sha256"] = OTHER
    again = copy.deepcopy(DOCUMENT)
    again["graphs"]["fusion"]["file"]["sha256"] = OTHER  # the same digits in another graph
    documents = [
        DOCUMENT,
        larger,
        swapped,
        again,
        changed(("graphs", "encoder", "file", "sha256"), OTHER),
        changed(("graphs", "encoder", "data", 0, "sha256"), OTHER),
        changed(("graphs", "encoder", "data"), []),
        changed(("graphs", "encoder", "gpu", "data", 0, "sha256"), OTHER),
        changed(("graphs", "encoder", "gpu"), None),
        changed(("preprocessing", "face"), 1.2),
        changed(("preprocessing", "face"), None),
    ]
    digests = [Manifest.model_validate(document).digest() for document in documents]
    assert len(set(digests)) == len(documents)
    assert all(len(digest) == 64 for digest in digests)


@pytest.mark.parametrize("place", list(parts(DOCUMENT)), ids=lambda place: ".".join(map(str, place)) or "top")
def test_an_unknown_field_is_refused_at_every_level(place: tuple[str | int, ...]) -> None:
    with pytest.raises(ValidationError):
        Manifest.model_validate(changed((*place, "mispelt"), 1))


@pytest.mark.parametrize("field", ["preset", "precision", "preprocessing", "score", "graphs", "parity", "provenance"])
def test_a_missing_field_is_refused(field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        Manifest.model_validate({key: value for key, value in DOCUMENT.items() if key != field})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), 4),
        (("model",), "other-net"),
        (("precision",), "int4"),
        (("preprocessing", "image_size"), 31),
        (("preprocessing", "image_size"), 4097),
        (("preprocessing", "image_size"), 64.5),
        (("preprocessing", "resample"), "nearest"),
        (("preprocessing", "crop"), "random"),
        (("score", "maximum"), 1),
        (("score", "maximum"), -3),
        (("score", "minimum"), float("nan")),
        (("score", "maximum"), float("inf")),
        (("preprocessing", "face"), 0),
        (("preprocessing", "face"), 100),
        (("preprocessing", "face"), "crop"),
        (("graphs", "decoder"), graph("decoder", TOKENS, TOKENS)),
        (("graphs", "vim", "file", "size"), -1),
        (("graphs", "vim", "file", "sha256"), "0" * 63),
        (("graphs", "vim", "file", "sha256"), "A" * 64),
        (("graphs", "vim", "file", "sha256"), "0" * 64 + "\n"),
        (("graphs", "vim", "inputs", 0, "dtype"), "complex64"),
        (("provenance", "weights"), "stolen"),
        (("provenance", "checkpoint_sha256"), "none"),
    ],
    ids=lambda part: ".".join(map(str, part)) if isinstance(part, tuple) else repr(part)[:20],
)
def test_a_value_outside_the_schema_is_refused(path: tuple[str | int, ...], value: Any) -> None:
    with pytest.raises(ValidationError):
        Manifest.model_validate(changed(path, value))


@pytest.mark.parametrize("shape", [["batch", 32, 32, 3], ["batch", 3, 64, 64], ["batch"], []])
def test_image_size_must_be_what_the_graphs_take(shape: list[int | str]) -> None:
    with pytest.raises(ValidationError, match="image_size is 64"):
        Manifest.model_validate(changed(("graphs", "vim", "inputs", 0, "shape"), shape))


@pytest.mark.parametrize(
    ("weights", "checkpoint", "label"),
    [
        ("checkpoint", "portraits", "portraits fp16"),
        ("checkpoint", None, "sd15-vim-s fp16"),
        ("random", None, "sd15-vim-s fp16"),
        ("demo", None, "sd15-vim-s fp16"),
    ],
)
def test_a_model_goes_by_its_owners_name_where_it_has_one(weights: str, checkpoint: str | None, label: str) -> None:
    document = changed(("provenance", "weights"), weights)
    document["provenance"]["checkpoint"] = checkpoint
    assert Manifest.model_validate({**document, "preset": "sd15-vim-s"}).label == label


def test_a_manifest_is_not_changed_after_its_checks() -> None:
    manifest = Manifest.model_validate(DOCUMENT)
    with pytest.raises(ValidationError):
        manifest.graphs["vim"].file.name = "/etc/passwd"
    with pytest.raises(ValidationError):
        manifest.preset = "other"


PLAIN = st.text("ab1_.-", max_size=6)
CHARACTER = st.sampled_from("/\\:~%*\0\n é.\u2215-") | st.characters()
NASTY = st.one_of(
    st.builds(lambda *parts: "".join(parts), PLAIN, CHARACTER, PLAIN),  # one character away from a good name
    st.text(),
    st.text("ab", min_size=100, max_size=200),
    st.sampled_from([".", "..", "C:", "~"]),
)


@given(NASTY)
def test_an_accepted_name_stays_in_the_folder(name: str) -> None:
    try:
        entry = FileEntry(name=name, sha256="0" * 64, size=0)
    except ValidationError:
        return
    assert entry.name == name
    assert Path(name).name == name
    assert os.path.normpath(name) == name
    assert name not in {"", ".", ".."}
    assert name.isascii()
    assert name.isprintable()
    assert not set(name) & set('/\\:~%*?"<>| ')
    assert len(name) <= 128


@pytest.mark.parametrize("name", ["encoder.onnx", "encoder.onnx.data", "a", "_private", "v1.2-rc_3.bin", "a" * 128])
def test_a_plain_name_is_accepted(name: str) -> None:
    assert FileEntry(name=name, sha256="0" * 64, size=0).name == name
