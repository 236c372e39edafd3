"""Whose weights a bundle is made of: names and licences are those of the checkpoint, not of its preset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from mdnet.model.checkpoint import CONFIG_KEY, NOTES_KEY, demo_checkpoint, origins
from mdnet.model.config import preset
from mdnet_export.model_source import choose_weights

SD = {"stable_diffusion": {"files": {}, "licence": "CreativeML OpenRAIL-M; restrictions pass on"}}
VIM = {"vim": {"files": {}, "licence": "Apache-2.0 (hustvl/Vim)"}}


def checkpoint(file: Path, preset_name: str = "demo", **notes: Any) -> Path:
    """A file that has a checkpoint's metadata, and no weights."""
    import json

    import numpy as np

    config = json.dumps(preset(preset_name).to_dict())
    save_file({"none": np.zeros(1)}, file, {CONFIG_KEY: config, NOTES_KEY: json.dumps(notes)})
    return file


def licences(file: Path) -> str:
    return "; ".join(choose_weights(checkpoint=file).licenses())


@pytest.mark.parametrize("preset_name", ["demo", "sd15-vim-s"])
def test_imported_weights_bring_their_licences(preset_name: str, tmp_path: Path) -> None:
    found = licences(checkpoint(tmp_path / "a.safetensors", preset_name, **SD, **VIM))
    assert "Stable Diffusion's encoder weights: CreativeML OpenRAIL-M; restrictions pass on" in found
    assert "Vision Mamba weights: Apache-2.0 (hustvl/Vim)" in found


@pytest.mark.parametrize("preset_name", ["demo", "sd15-vim-s"])
def test_an_encoder_made_at_home_has_no_licence_of_stable_diffusion(preset_name: str, tmp_path: Path) -> None:
    notes = {"encoder": "trained here on 900 drawn faces, without ratings"}
    found = licences(checkpoint(tmp_path / "a.safetensors", preset_name, **notes))
    assert "encoder weights: trained here on 900 drawn faces, without ratings" in found
    assert "Stable Diffusion" not in found


def test_what_a_checkpoint_does_not_say_is_not_made_up(tmp_path: Path) -> None:
    full = licences(checkpoint(tmp_path / "full.safetensors", "sd15-vim-s"))
    assert "encoder weights: the checkpoint does not say whose; Stable Diffusion's are under" in full
    assert "Vision Mamba weights: the checkpoint does not say whose" in full
    demo = licences(checkpoint(tmp_path / "demo.safetensors"))
    assert "encoder weights: the checkpoint does not say whose" in demo
    assert "Stable Diffusion" not in demo


@pytest.mark.parametrize(
    ("notes", "line", "restricted"),
    [
        ({"data": "SCUT-FBP5500_v2", "protocol": "60-40"}, "training data: SCUT-FBP5500_v2, in SCUT", True),
        ({"data": "1100 drawn faces, seed 0", "protocol": "60-40"}, "training data: 1100 drawn faces, seed 0", False),
        ({"data": "ratings.csv", "protocol": "kfold:5"}, "training data: ratings.csv", False),
        ({}, "training data: the checkpoint does not say", True),
    ],
)
def test_training_data_are_named_as_the_checkpoint_does(
    notes: dict[str, str], line: str, restricted: bool, tmp_path: Path
) -> None:
    found = licences(checkpoint(tmp_path / "a.safetensors", **notes))
    assert line in found
    assert ("non-commercial" in found) is restricted


@pytest.mark.parametrize("note", [3, {}, {"licence": 5}, ["x"], None])
def test_odd_notes_of_a_checkpoint_are_as_good_as_none(note: Any, tmp_path: Path) -> None:
    found = licences(checkpoint(tmp_path / "a.safetensors", stable_diffusion=note, vim=note, encoder=note, data=note))
    assert "encoder weights: the checkpoint does not say whose" in found


def test_a_checkpoint_goes_by_its_files_name(tmp_path: Path) -> None:
    assert choose_weights(checkpoint=checkpoint(tmp_path / "portraits.v2.safetensors")).name == "portraits.v2"
    assert choose_weights().name is None
    assert choose_weights(random_init=True).name is None


def test_what_is_trained_from_a_checkpoint_keeps_where_its_weights_come_from(tmp_path: Path) -> None:
    given = checkpoint(tmp_path / "a.safetensors", **SD, **VIM, data="x", best_epoch=3)
    assert origins(given) == {**SD, **VIM}
    assert "demo's" in str(origins(None)["encoder"])
    assert origins(demo_checkpoint()) == {} or "encoder" in origins(demo_checkpoint())
