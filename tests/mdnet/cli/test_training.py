"""What `mdnet train` and `mdnet prior` report while they learn, and where their options may come from."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mdnet.cli.main import main
from mdnet.data.rated import Split
from mdnet.training.train import Epoch
from mdnet_engines.progress import Progress


def train(*words: str) -> Result:
    return CliRunner().invoke(main, ["train", "--preset", "demo", *words])


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """No training, but its reports: features of 8 images, then as many epochs as were asked for. Gives the configs."""
    configs: list[Any] = []

    def fit(
        model: object, data: object, config: Any, *, progress: Progress, on_epoch: Callable[[Epoch], None], **_: object
    ) -> Epoch:
        configs.append(config)
        progress.count("frozen features of 8 images", 8)(8)
        advance = progress.count("training", config.epochs)
        for number in range(1, config.epochs + 1):
            advance(1)
            on_epoch(Epoch(number, config.epochs, 0.5, 0.25))
        return Epoch(1, config.epochs, 0.5, 0.25)

    def score(model: object, split: Split, **_: object) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return split.test.ratings + 0.5, {}

    monkeypatch.setattr("mdnet.training.train.train", fit)
    monkeypatch.setattr("mdnet.evaluation.loaded.score_beside_baselines", score)
    monkeypatch.setattr("mdnet.model.checkpoint.save_checkpoint", lambda *_, notes: configs.append(notes))
    return configs


def seconds_left_out(text: str) -> list[str]:
    return re.sub(r"\b[0-9]+\.[0-9] s", "# s", text).splitlines()


def test_a_pipe_gets_features_and_a_line_with_its_seconds_for_each_epoch(
    learned: list[Any], faces: Path, tmp_path: Path
) -> None:
    result = train("--data", str(faces), "--epochs", "2", "-o", str(tmp_path / "m.safetensors"))
    assert result.exit_code == 0, result.output
    assert result.stdout == "60-40: PC 1.0000  MAE 0.5000  RMSE 0.5000 on 24 test images\n"
    assert seconds_left_out(result.stderr)[:-1] == [
        "[# s] frozen features of 8 images: 0 of 8",
        "[# s] frozen features of 8 images: 8 of 8, # s",
        "[# s] training: 0 of 2",
        "epoch   1/2: training MSE 0.5000, validation Pearson 0.2500, # s",
        "[# s] training: 2 of 2, # s",
        "epoch   2/2: training MSE 0.5000, validation Pearson 0.2500, # s",
    ]


def test_quiet_training_prints_its_result_alone(learned: list[Any], faces: Path, tmp_path: Path) -> None:
    result = train("--data", str(faces), "-q", "-o", str(tmp_path / "m.safetensors"))
    assert (result.exit_code, result.stderr, len(result.stdout.splitlines())) == (0, "", 1)


def test_a_configuration_file_trains_and_the_checkpoint_names_what_it_gave(
    learned: list[Any], faces: Path, tmp_path: Path
) -> None:
    file = tmp_path / "my.toml"
    file.write_text(f'data = "{faces}"\nepochs = 3\nbatch-size = 4\noutput = "{tmp_path / "m.safetensors"}"\n')
    result = train("--config", str(file), "--epochs", "2")
    assert result.exit_code == 0, result.output
    config, notes = learned
    assert (config.epochs, config.batch_size) == (2, 4)
    assert notes["command"].endswith(f"# {file}: data = {faces}, batch-size = 4, output = {tmp_path / 'm.safetensors'}")


def test_prior_says_each_epochs_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def train_prior(
        model: object, faces: object, config: Any, *, progress: Progress, on_epoch: Callable[[str, int, float], None]
    ) -> None:
        progress.count("training", 2)
        on_epoch("VAE", 1, 0.5)
        on_epoch("U-Net", 1, 0.25)

    monkeypatch.setattr("mdnet.training.prior.train_prior", train_prior)
    result = CliRunner().invoke(main, ["prior", "--faces", "2", "-o", str(tmp_path / "prior.safetensors")])
    assert result.exit_code == 0, result.output
    assert seconds_left_out(result.stderr)[:-1] == [
        "[# s] drawing: 0 of 2",
        "[# s] drawing: 2 of 2, # s",
        "[# s] training: 0 of 2",
        "VAE, epoch  1: loss 0.5000, # s",
        "U-Net, epoch  1: loss 0.2500, # s",
    ]
