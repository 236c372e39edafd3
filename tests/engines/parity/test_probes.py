"""The probes of a bundle: what is written is read back, and whatever is wrong with a file is one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_bundle import SIZE, describe, expected_outputs, write_small_bundle

from mdnet_engines.bundle.files import Bundle
from mdnet_engines.errors import BundleError
from mdnet_engines.parity import probes as probes_module
from mdnet_engines.parity.probes import PROBES_NAME, load_probes, read_probes, write_probes

PIXELS = np.random.default_rng(2).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(write_small_bundle(tmp_path / "bundle"))


def refusal(file: Path, bundle: Bundle) -> str:
    with pytest.raises(BundleError) as error:
        load_probes(file, bundle.manifest)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_what_is_written_is_read_back(bundle: Bundle, tmp_path: Path) -> None:
    expected = expected_outputs(PIXELS)
    write_probes(tmp_path / PROBES_NAME, PIXELS, expected, outputs=2)
    probes = load_probes(tmp_path / PROBES_NAME, bundle.manifest)
    np.testing.assert_array_equal(probes.images.pixels, PIXELS)
    assert len(set(probes.images.names)) == 5
    assert {name: len(values) for name, values in probes.reference.items()} == {"score": 5, "down": 2, "tokens": 2}
    for name, values in probes.reference.items():
        np.testing.assert_array_equal(values, expected[name][: len(values)])
    few = probes.first(1)
    assert len(few.images.names) == len(few.images.pixels) == len(few.reference["score"]) == 1


def test_the_same_probes_are_the_same_file(tmp_path: Path) -> None:
    """Its hash is in the manifest, and two builds of one model should differ in nothing."""
    for name in ("a.npz", "b.npz"):
        write_probes(tmp_path / name, PIXELS, expected_outputs(PIXELS))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_bundle_of_version_1_has_none(bundle: Bundle) -> None:
    manifest = bundle.path / "manifest.json"
    document = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**document, "schema_version": 1, "probes": None}))
    with pytest.raises(BundleError, match=r"has no probes \(schema version 1\); build it again"):
        read_probes(Bundle.open(bundle.path))


def test_a_missing_or_altered_file_is_found_when_the_bundle_is_opened(bundle: Bundle) -> None:
    file = bundle.path / PROBES_NAME
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"probes\.npz has sha256"):
        Bundle.open(bundle.path)
    file.unlink()
    with pytest.raises(BundleError, match=r"probes\.npz is missing"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04" + bytes(60), "cut"], ids=repr)
def test_a_damaged_file_is_one_line(content: bytes | str, bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / PROBES_NAME
    whole = (bundle.path / PROBES_NAME).read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    assert "can't be read as probes" in refusal(file, bundle)


@pytest.mark.parametrize(("field", "value"), [("flags", 1), ("compression", 99)])
def test_a_member_that_zipfile_can_not_read_is_one_line(field: str, value: int, bundle: Bundle, tmp_path: Path) -> None:
    """Encrypted, or compressed in a way of its own: both its headers say so."""
    file, content = tmp_path / PROBES_NAME, bytearray((bundle.path / PROBES_NAME).read_bytes())
    for header, start in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(header) + start + (0 if field == "flags" else 2)] = value
    file.write_bytes(content)
    assert "can't be read as probes" in refusal(file, bundle)


GOOD: dict[str, Any] = {
    "pixels": PIXELS,
    **{name if name == "score" else f"output.{name}": values for name, values in expected_outputs(PIXELS).items()},
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: a.pop("pixels"), "lacks pixels"),
        (lambda a: a.pop("score"), "lacks score"),
        (lambda a: a.pop("output.tokens"), "lacks tokens"),
        (lambda a: a.update(pixels=a["pixels"][:, :-1]), "pixels is uint8 [5, 63, 64, 3]"),
        (lambda a: a.update(pixels=a["pixels"].astype(np.float32)), "pixels is float32"),
        (lambda a: a.update(pixels=a["pixels"][:0], score=a["score"][:0]), "pixels is uint8 [0, 64, 64, 3]"),
        (lambda a: a.update(score=a["score"][:4]), "score is float32 [4]"),
        (lambda a: a.update(score=a["score"][:, None]), "score is float32 [5, 1]"),
        (lambda a: a.update({"output.down": a["output.down"][:, :2]}), "down is float32 [5, 2]"),
        (lambda a: a.update(score=np.full(5, np.nan, np.float32)), "score is not finite"),
        (lambda a: a.update(extra=np.zeros(3)), "holds extra, which is no output of the bundle's graphs"),
        (lambda a: a.update(pixels=np.array([None, 1], dtype=object)), "can't be read as probes"),
    ],
)
def test_probes_that_do_not_fit_the_graphs_are_refused(
    change: Callable[[dict[str, Any]], object], reason: str, bundle: Bundle, tmp_path: Path
) -> None:
    arrays = dict(GOOD)
    change(arrays)
    np.savez_compressed(tmp_path / PROBES_NAME, **arrays)
    assert reason in refusal(tmp_path / PROBES_NAME, bundle)


def test_a_file_that_unpacks_to_too_much_is_not_unpacked(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes_module, "_MAX_BYTES", 10_000)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("unpacked"))
    np.savez_compressed(tmp_path / PROBES_NAME, pixels=np.zeros(20_000, np.uint8))
    assert "unpacks to more than" in refusal(tmp_path / PROBES_NAME, bundle)


def test_hashes_that_fit_do_not_make_foreign_probes_good(bundle: Bundle) -> None:
    """Another bundle's file, entered in the manifest as it should be."""
    file = bundle.path / PROBES_NAME
    np.savez_compressed(file, **{**GOOD, "pixels": PIXELS[:, ::2, ::2]})
    document = json.loads((bundle.path / "manifest.json").read_text())
    (bundle.path / "manifest.json").write_text(json.dumps({**document, "probes": describe(file)}))
    with pytest.raises(BundleError, match=r"pixels is uint8 \[5, 32, 32, 3\]; the probes are not this bundle's"):
        read_probes(Bundle.open(bundle.path))
