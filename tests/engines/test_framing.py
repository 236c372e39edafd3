"""What `--face` says, and what is said where a model gets another framing than it was trained at."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from small_bundle import write_small_bundle

from mdnet_engines.bundle.files import read_manifest
from mdnet_engines.bundle.framed import framed
from mdnet_engines.bundle.manifest import MANIFEST_NAME, Manifest
from mdnet_engines.console import Command
from mdnet_engines.errors import UsageError
from mdnet_engines.framing import FACTOR, FaceOption, FramingWarning, mismatch, parse_face


def manifest_of(folder: Path, face: float | None) -> Manifest:
    write_small_bundle(folder)
    document = json.loads((folder / MANIFEST_NAME).read_text())
    document["preprocessing"]["face"] = face
    return Manifest.model_validate(document)


@pytest.mark.parametrize(
    ("text", "face"), [("none", None), ("crop", FACTOR), ("crop:1.25", 1.25), ("crop:2", 2.0), ("crop:0.25", 0.25)]
)
def test_every_framing_has_a_word(text: str, face: float | None) -> None:
    assert parse_face(text) == face


@pytest.mark.parametrize(
    "text",
    ["", "Crop", "crop:", "crop:-1", "crop:1e1", "crop:nan", "crop:0.1", "crop:99", "0.8", "crop:1\n"],
)
def test_another_word_is_bad_usage_of_the_option(text: str) -> None:
    with pytest.raises(UsageError):
        parse_face(text)

    @click.command()
    @click.option("--face", type=FaceOption())
    def command(face: str | None) -> None:
        click.echo(face)

    result = CliRunner().invoke(command, ["--face", text])
    assert result.exit_code == 2
    assert "--face" in result.stderr


def test_a_mismatch_names_both_framings() -> None:
    assert mismatch(0.8, 0.8) is None
    assert mismatch(None, None) is None
    note = mismatch(0.8, 2.0)
    assert note is not None
    assert "trained on a square of 0.8 times the face" in note
    assert "gets a square of 2 times the face" in note
    assert "trained on the central square" in str(mismatch(None, 1.2))


@pytest.mark.parametrize("face", [None, 0.8])
def test_the_framing_of_training_is_the_default_and_no_warning(face: float | None, tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, face)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert framed(manifest, None) == manifest
        assert framed(manifest, "none" if face is None else f"crop:{face:g}") == manifest


def test_another_framing_warns_and_makes_rows_of_another_digest(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, 0.8)
    with pytest.warns(FramingWarning, match=r"0\.8 times the face, and gets a square of 1\.2"):
        wider = framed(manifest, "crop:1.2")
    assert wider.preprocessing.face == 1.2
    assert wider.digest() != manifest.digest()
    assert manifest.preprocessing.face == 0.8


def test_a_bundle_that_does_not_say_has_the_central_square(tmp_path: Path) -> None:
    write_small_bundle(tmp_path)
    assert "face" not in json.loads((tmp_path / MANIFEST_NAME).read_text())["preprocessing"]
    assert read_manifest(tmp_path).preprocessing.face is None


def test_command_lines_show_the_warning_as_one_line() -> None:
    @click.group(cls=Command)
    def group() -> None:
        pass

    @group.command()
    def work() -> None:
        warnings.warn("framed otherwise", FramingWarning, stacklevel=2)

    for _ in range(2):  # each run says it again
        assert CliRunner().invoke(group, ["work"]).stderr == "warning: framed otherwise\n"
