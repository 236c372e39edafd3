"""Data, training, evaluation and the `mdnet` command, on a few drawn faces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy import stats

from mdnet.checkpoint import load_checkpoint, read_metadata
from mdnet.cli import main
from mdnet.config import preset
from mdnet.data import read_splits
from mdnet.drawn import write_dataset
from mdnet.evaluate import evaluate
from mdnet.metrics import mae, pearson, rmse, spearman
from mdnet.model import random_mdnet
from mdnet.train import Epoch, TrainConfig, train
from mdnet_engines.errors import MDNetError, UsageError


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "faces"
    write_dataset(root, 60, seed=1)
    return root


def test_splits_are_the_files(faces: Path) -> None:
    (split,) = read_splits(faces, "60-40")
    file = faces / "train_test_files" / "split_of_60%training and 40%testing" / "train.txt"
    first, rating = file.read_text().splitlines()[0].split()
    assert split.train.images[0] == faces / "Images" / first
    assert split.train.ratings[0] == pytest.approx(float(rating))
    assert len(split.train) + len(split.test) == 60


def test_five_folds_test_every_image_once(faces: Path) -> None:
    folds = read_splits(faces, "cv5")
    tested = [image for fold in folds for image in fold.test.images]
    assert len(folds) == 5
    assert len(tested) == len(set(tested)) == 60


def broken(faces: Path, tmp_path: Path) -> Path:
    root = tmp_path / "broken"
    lists = root / "train_test_files" / "split_of_60%training and 40%testing"
    lists.mkdir(parents=True)
    (root / "Images").symlink_to(faces / "Images")
    (lists / "train.txt").write_text("AF1.jpg 3.0\nAM1.jpg 2.5\n")
    (lists / "test.txt").write_text("CF1.jpg 3.0\n")
    return root


@pytest.mark.parametrize(
    ("part", "text", "reason"),
    [
        ("test", "AF1.jpg 3.0\n", "1 test images are also in train.txt"),
        ("train", "AF1.jpg 3.0\nAM1.jpg high\n", r"train.txt:2: expected `NAME.jpg RATING`"),
        ("train", "AF1.jpg\n", r"train.txt:1: expected"),
        ("train", "ZZ9.jpg 3.0\n", "1 of its images are missing, such as .*ZZ9.jpg"),
        ("test", "\n", "lists no image"),
        ("test", None, "test.txt is missing"),
    ],
)
def test_a_broken_data_set_says_where(faces: Path, tmp_path: Path, part: str, text: str | None, reason: str) -> None:
    root = broken(faces, tmp_path)
    file = root / "train_test_files" / "split_of_60%training and 40%testing" / f"{part}.txt"
    file.unlink()
    if text is not None:
        file.write_text(text)
    with pytest.raises(MDNetError, match=reason):
        read_splits(root, "60-40")


def test_a_folder_that_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder Images"):
        read_splits(tmp_path, "60-40")


def test_metrics_agree_with_scipy() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=200).round(1), rng.normal(size=200).round(1)  # rounded: ties
    assert pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert mae(a, b) == pytest.approx(np.mean(np.abs(a - b)))
    assert rmse(a, b) == pytest.approx(np.sqrt(np.mean((a - b) ** 2)))


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
