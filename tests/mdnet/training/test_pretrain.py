"""Vim's start from pictures without ratings, and `mdnet pretrain`."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from mdnet.cli.main import main
from mdnet.data.pictures import training_pictures
from mdnet.data.scut_fbp5500 import read_splits
from mdnet.model.checkpoint import demo_checkpoint, load_checkpoint, read_metadata
from mdnet.model.config import preset
from mdnet.model.net import random_mdnet
from mdnet.model.vim import VisionMamba
from mdnet.training.features import load_pixels
from mdnet.training.pretrain import PretrainConfig, PretrainEpoch, gradients, pretrain
from mdnet.training.state import StateFile
from mdnet_engines.errors import MDNetError, UsageError

CONFIG = PretrainConfig(epochs=4, batch_size=6)


@pytest.fixture(scope="module")
def pixels(faces: Path) -> torch.Tensor:
    return load_pixels(read_splits(faces, "60-40")[0].train.images, 128)


def fresh() -> VisionMamba:
    return random_mdnet(preset("demo"), seed=0).vim


def test_a_gradient_is_counted_where_it_is_by_its_direction_and_strength() -> None:
    picture = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    picture[0, :, 20:] = 200  # an upright edge: the gradient lies along x
    picture[1, 9:] = 100  # a level one, half as strong: along y
    found = gradients(picture, 8)
    assert found.shape == (2, 8, 4, 4)
    assert found[0].argmax() == torch.tensor([0, 0, 2]) @ torch.tensor([16, 4, 1])
    assert torch.equal((found[0] > found.min()).nonzero()[:, 2].unique(), torch.tensor([2]))
    assert torch.equal((found[1] > found.min()).nonzero()[:, [0, 1]].unique(dim=0), torch.tensor([[4, 1]]))
    strength = (found.exp() - 3e-3).amax((1, 2, 3))
    assert strength[0] / strength[1] == pytest.approx(2, rel=1e-3)


def test_it_learns_and_is_reproducible(pixels: torch.Tensor) -> None:
    runs: list[list[PretrainEpoch]] = []
    for _ in range(2):
        epochs: list[PretrainEpoch] = []
        vim = fresh()
        pretrain(vim, pixels, dataclasses.replace(CONFIG, epochs=8), on_epoch=epochs.append)
        assert not vim.training
        runs.append(epochs)
    assert runs[0] == runs[1]
    assert runs[0][-1].masked < 0.8 * runs[0][0].masked
    assert runs[0][-1].seen < 0.8 * runs[0][0].seen


def test_a_run_that_was_killed_and_resumed_ends_as_one_that_was_not(pixels: torch.Tensor, tmp_path: Path) -> None:
    whole, vim = fresh(), fresh()
    expected = pretrain(whole, pixels, CONFIG)

    def kill(epoch: PretrainEpoch) -> None:
        if epoch.number == 2:
            raise KeyboardInterrupt

    file = tmp_path / "run.state"
    with pytest.raises(KeyboardInterrupt):
        pretrain(vim, pixels, CONFIG, state=StateFile(file, resume=False), fingerprint={"a": "b"}, on_epoch=kill)
    with pytest.raises(UsageError, match="a was b, is c"):
        pretrain(fresh(), pixels, CONFIG, state=StateFile(file, resume=True), fingerprint={"a": "c"})
    resumed = fresh()
    assert pretrain(resumed, pixels, CONFIG, state=StateFile(file, resume=True), fingerprint={"a": "b"}) == expected
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_fewer_pictures_than_a_batch_are_refused(pixels: torch.Tensor) -> None:
    with pytest.raises(MDNetError, match=r"5 pictures to pre-train on; expected 6 or more"):
        pretrain(fresh(), pixels[:5], CONFIG)


def test_the_command_changes_vim_alone_and_says_from_what(faces: Path, tmp_path: Path) -> None:
    file = tmp_path / "start.safetensors"
    arguments = ["pretrain", "--preset", "demo", "--data", str(faces), "--epochs", "1", "--batch-size", "8"]
    result = CliRunner().invoke(main, [*arguments, "-o", str(file)])
    assert result.exit_code == 0, result.stderr
    made, packaged = load_checkpoint(file), load_checkpoint(demo_checkpoint())
    for name, value in packaged.diffusion.state_dict().items():
        assert torch.equal(made.diffusion.state_dict()[name], value), name
    start = random_mdnet(preset("demo"), 0).vim.state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in made.vim.state_dict().items())
    _, notes = read_metadata(file)
    count = len(read_splits(faces, "60-40")[0].train)
    assert notes["vim"] == f"pre-trained here on {count} pictures of {faces.name}, without ratings"
    assert "drawn faces" in notes["encoder"]
    assert not file.with_name(f"{file.name}.state").exists()


def test_views_are_more_pictures_to_learn_from(faces: Path, tmp_path: Path) -> None:
    count = len(read_splits(faces, "60-40")[0].train)
    words = ["pretrain", "--preset", "demo", "--data", str(faces), "--epochs", "1", "--batch-size", str(count + 1)]
    words += ["-o", str(tmp_path / "start.safetensors")]
    assert f"{count} pictures to pre-train on" in CliRunner().invoke(main, words).stderr
    result = CliRunner().invoke(main, [*words, "--views", "2"])
    assert result.exit_code == 0, result.stderr


def test_pictures_of_a_test_list_are_left_out(faces: Path, tmp_path: Path) -> None:
    (split,) = read_splits(faces, "60-40")
    assert training_pictures(faces) == split.train.images
    for name in "abc":
        Image.fromarray(np.full((64, 64, 3), 40 * ord(name) % 256, np.uint8)).save(tmp_path / f"{name}.png")
    assert [file.name for file in training_pictures(tmp_path)] == ["a.png", "b.png", "c.png"]
    table = tmp_path / "mine.csv"
    table.write_text("image,rating,split\na.png,1,train\nb.png,2,test\nc.png,3,train\n")
    assert [file.name for file in training_pictures(table)] == ["a.png", "c.png"]
    table.write_text("image,rating\na.png,1\nb.png,2\n")
    assert len(training_pictures(table)) == 2


def test_the_framing_goes_on_to_training_and_epochs_say_their_seconds(portraits: Path, tmp_path: Path) -> None:
    file = tmp_path / "start.safetensors"
    arguments = ["pretrain", "--preset", "demo", "--data", str(portraits), "--face", "crop:1.2", "--epochs", "2"]
    result = CliRunner().invoke(main, [*arguments, "--batch-size", "8", "-o", str(file)])
    assert result.exit_code == 0, result.stderr
    assert load_checkpoint(file).config.face == 1.2
    lines = [line for line in result.stderr.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 2
    assert all(re.search(r", on the others [0-9.]+, [0-9.]+ s$", line) for line in lines), lines
