"""Data, training, evaluation and the `mdnet` command, on a few drawn faces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mdnet.checkpoint import load_checkpoint, read_metadata
from mdnet.cli import main
from mdnet.config import preset
from mdnet.data import read_splits
from mdnet.evaluate import evaluate
from mdnet.model import random_mdnet
from mdnet.train import Epoch, TrainConfig, train


def test_training_fits_its_images_and_leaves_the_encoder_alone(faces: Path) -> None:
    (split,) = read_splits(faces, "60-40")
    model = random_mdnet(preset("demo"), seed=0)
    frozen = {name: tensor.clone() for name, tensor in model.diffusion.state_dict().items()}
    epochs: list[Epoch] = []
    counted: list[int] = []
    config = TrainConfig(epochs=6, batch_size=9, learning_rate=2e-3, ema=0.7)
    best = train(model, split.train, config, on_image=counted.append, on_epoch=epochs.append)
    assert sum(counted) == len(split.train)
    assert [epoch.number for epoch in epochs] == list(range(1, 7))
    assert epochs[-1].loss < 0.7 * epochs[0].loss
    assert best.validation_pearson == max(epoch.validation_pearson for epoch in epochs)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in model.diffusion.state_dict().items())
    assert not model.training


def test_training_is_reproducible(faces: Path) -> None:
    (split,) = read_splits(faces, "60-40")
    results = []
    for _ in range(2):
        model = random_mdnet(preset("demo"), seed=0)
        losses: list[float] = []
        train(model, split.train, TrainConfig(epochs=1), on_epoch=lambda epoch, kept=losses: kept.append(epoch.loss))
        results.append(losses)
    assert results[0] == results[1]


def test_train_and_evaluate_commands_agree(faces: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    trained = CliRunner().invoke(
        main, ["train", "--preset", "demo", "--data", str(faces), "--epochs", "1", "-o", str(file)]
    )
    assert trained.exit_code == 0, trained.stderr
    evaluated = CliRunner().invoke(main, ["evaluate", str(file), "--data", str(faces)])
    assert evaluated.stdout == trained.stdout
    _, notes = read_metadata(file)
    (split,) = read_splits(faces, "60-40")
    assert notes["test"]["mae"] == pytest.approx(evaluate(load_checkpoint(file), split.test).mae, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["train"], "--preset demo, or --init"),
        (["train", "--preset", "sd15-vim-s"], "--init CHECKPOINT"),
        (["train", "--preset", "nope"], "no preset 'nope'"),
        (["train", "--preset", "demo", "-o", "missing/model.safetensors"], "-o takes a file in a folder that exists"),
        (["train", "--preset", "demo", "--data", "missing"], "no folder Images"),
        (["train", "--preset", "demo", "--epochs", "0"], "0 is not in the range"),
    ],
)
def test_a_wrong_command_is_explained(
    arguments: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert reason in result.stderr
