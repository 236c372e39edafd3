"""Data, training, evaluation and the `mdnet` command, on a few drawn faces."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from recorded import Recorded
from tensorboard.backend.event_processing import event_accumulator

from mdnet.cli.main import main
from mdnet.data.scut_fbp5500 import read_splits
from mdnet.evaluation.evaluate import evaluate
from mdnet.evaluation.scored_model import open_model
from mdnet.model.checkpoint import load_checkpoint, read_metadata
from mdnet.model.config import TrainConfig, preset
from mdnet.model.net import MDNet, random_mdnet
from mdnet.training.state import StateFile
from mdnet.training.train import Epoch, train
from mdnet_engines.errors import MDNetError, UsageError


def test_training_fits_its_images_and_leaves_the_encoder_alone(faces: Path) -> None:
    (split,) = read_splits(faces, "60-40")
    model = random_mdnet(preset("demo"), seed=0)
    frozen = {name: tensor.clone() for name, tensor in model.diffusion.state_dict().items()}
    epochs: list[Epoch] = []
    counted = Recorded()
    config = TrainConfig(epochs=6, batch_size=9, learning_rate=2e-3, ema=0.7)
    best = train(model, split.train, config, progress=counted, on_epoch=epochs.append)
    _, (total, images), (_, done) = counted.counts
    assert total == sum(images) == len(split.train)
    assert sum(done) == 6
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
    evaluated = CliRunner().invoke(
        main, ["evaluate", str(file), "--data", str(faces), "--cache", str(tmp_path / "features")]
    )
    assert evaluated.stdout == trained.stdout
    assert "; baselines: PC " in trained.stdout
    assert "ridge on the frozen features" in trained.stdout
    _, notes = read_metadata(file)
    (split,) = read_splits(faces, "60-40")
    assert [epoch["number"] for epoch in notes["epochs"]] == [1]
    assert open_model(file).epochs[0].validation_pearson == notes["epochs"][0]["validation_pearson"]
    assert notes["test"]["mae"] == pytest.approx(evaluate(load_checkpoint(file), split.test).mae, abs=1e-6)


def test_the_probe_alone_is_a_training(faces: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    command = ["train", "--preset", "demo", "--data", str(faces), "--linear-probe", "--epochs", "0", "-o", str(file)]
    trained = CliRunner().invoke(main, command)
    assert trained.exit_code == 0, trained.stderr
    assert "linear probe of " in trained.stderr
    evaluated = CliRunner().invoke(
        main, ["evaluate", str(file), "--data", str(faces), "--cache", str(tmp_path / "cache")]
    )
    assert evaluated.stdout == trained.stdout
    assert read_metadata(file)[1]["epochs"] == []


def test_pictures_that_the_encoder_never_saw_the_like_of_are_noted_and_drawn_faces_are_not(
    faces: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(faces, photos)
    (photos / "README.txt").unlink()  # by which drawn faces are known
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    command = ["train", "--epochs", "1", "--cache", str(tmp_path / "cache")]
    noted = CliRunner().invoke(main, [*command, "--preset", "demo", "--data", str(photos), "-o", str(first)])
    again = CliRunner().invoke(main, [*command, "--init", str(first), "--data", str(photos), "-o", str(second)])
    drawn = CliRunner().invoke(main, [*command, "--init", str(first), "--data", str(faces), "-o", str(second)])
    for done, expected in ((noted, 1), (again, 1), (drawn, 0)):
        assert done.exit_code == 0, done.stderr
        assert done.stderr.count("note: the frozen encoder has never seen a photograph, only drawn faces") == expected


def test_the_framing_of_training_is_kept_and_evaluated_with(portraits: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    data = ("--data", str(portraits), "--cache", str(tmp_path / "cache"))
    command = ["train", "--preset", "demo", *data, "--epochs", "1", "--face", "crop:1.5", "-o", str(file)]
    trained = CliRunner().invoke(main, command)
    assert trained.exit_code == 0, trained.stderr
    assert read_metadata(file)[0].face == 1.5
    evaluated = CliRunner().invoke(main, ["evaluate", str(file), *data])
    assert evaluated.stdout == trained.stdout
    otherwise = CliRunner().invoke(main, ["evaluate", str(file), *data, "--face", "none"])
    assert "trained on a square of 1.5 times the face, and gets the central square" in otherwise.stderr
    assert otherwise.stdout != evaluated.stdout

    again = tmp_path / "again.safetensors"
    command = ["train", "--init", str(file), *data, "--epochs", "1", "-o", str(again)]
    assert CliRunner().invoke(main, command).exit_code == 0
    assert read_metadata(again)[0].face == 1.5  # as that of --init
    assert CliRunner().invoke(main, [*command, "--face", "none"]).exit_code == 0
    assert read_metadata(again)[0].face is None


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_run_that_was_killed_and_resumed_ends_as_one_that_was_not(
    stop_after: int, faces: Path, tmp_path: Path
) -> None:
    (split,) = read_splits(faces, "60-40")
    config = TrainConfig(epochs=4, batch_size=9, ema=0.7)
    whole, killed, resumed = (random_mdnet(preset("demo"), seed=0) for _ in range(3))
    expected = train(whole, split.train, config, cache=tmp_path / "cache")

    def kill(epoch: Epoch) -> None:
        if epoch.number == stop_after:
            raise KeyboardInterrupt

    file = tmp_path / "run.state"
    with pytest.raises(KeyboardInterrupt):
        train(
            killed,
            split.train,
            config,
            cache=tmp_path / "cache",
            state=StateFile(file, resume=False),
            on_epoch=kill,
        )
    numbers: list[int] = []
    best = train(
        resumed,
        split.train,
        config,
        cache=tmp_path / "cache",
        state=StateFile(file, resume=True),
        on_epoch=lambda epoch: numbers.append(epoch.number),
    )
    assert numbers == list(range(stop_after + 1, 5))
    assert best == expected
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_state_of_another_run_is_refused_and_says_what_differs(faces: Path, tmp_path: Path) -> None:
    (split,) = read_splits(faces, "60-40")
    file = tmp_path / "run.state"
    config = TrainConfig(epochs=1, batch_size=16)

    def model(seed: int = 0) -> MDNet:
        return random_mdnet(preset("demo"), seed)

    train(model(), split.train, config, state=StateFile(file, resume=False))
    with pytest.raises(UsageError, match="continue it with --resume, or remove"):
        train(model(), split.train, config, state=StateFile(file, resume=False))
    with pytest.raises(UsageError, match="batch_size was 16, is 8;"):
        train(model(), split.train, TrainConfig(epochs=1, batch_size=8), state=StateFile(file, resume=True))
    with pytest.raises(UsageError, match=r"training list was .*, is "):
        train(model(), split.test, config, state=StateFile(file, resume=True))
    with pytest.raises(UsageError, match=r"encoder was .*, is .*, first weights was .*, is "):
        train(model(seed=1), split.train, config, state=StateFile(file, resume=True))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(MDNetError, match="is not the state of a training run"):
        train(model(), split.train, config, state=StateFile(file, resume=True))


def test_training_stops_when_patience_is_at_its_end(faces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (split,) = read_splits(faces, "60-40")
    falling = iter([0.5, 0.9, 0.8, 0.7, 0.6])
    monkeypatch.setattr("mdnet.training.train.pearson", lambda *_: next(falling))
    epochs: list[Epoch] = []
    model = random_mdnet(preset("demo"), seed=0)
    best = train(model, split.train, TrainConfig(epochs=9, batch_size=30, patience=2), on_epoch=epochs.append)
    assert [epoch.number for epoch in epochs] == [1, 2, 3, 4]
    assert best == epochs[1]


def test_mixed_precision_trains_float32_weights_to_nearly_the_same_loss(faces: Path) -> None:
    (split,) = read_splits(faces, "60-40")
    losses: dict[bool, list[float]] = {False: [], True: []}
    for amp, kept in losses.items():
        model = random_mdnet(preset("demo"), seed=0)
        config = TrainConfig(epochs=3, batch_size=9, amp=amp)
        train(model, split.train, config, on_epoch=lambda epoch, kept=kept: kept.append(epoch.loss))
        assert all(parameter.dtype == torch.float32 for parameter in model.trainable_parameters())
    assert losses[True] != losses[False]  # bfloat16 was there
    # Eight bits of mantissa: a per cent or so on each score, less on a mean of squares that is near 1.
    assert losses[True] == pytest.approx(losses[False], rel=0.1)


def test_a_loss_that_is_not_finite_ends_the_run(faces: Path) -> None:
    (split,) = read_splits(faces, "60-40")
    model = random_mdnet(preset("demo"), seed=0)
    with torch.no_grad():
        model.fusion.head.out.bias.fill_(torch.nan)
    with pytest.raises(MDNetError, match="not finite; try a lower --learning-rate"):
        train(model, split.train, TrainConfig(epochs=1))


def test_the_train_command_resumes_logs_and_notes_its_fold(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, log = tmp_path / "model.safetensors", tmp_path / "log"
    command = ["train", "--preset", "demo", "--data", str(faces), "--protocol", "cv5", "--fold", "2", "--epochs", "2"]
    command += ["--log", str(log), "--cache", str(tmp_path / "cache"), "-o", str(file)]
    save = StateFile.save

    def killed(self: StateFile, run: object) -> None:
        save(self, run)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StateFile, "save", killed)
        interrupted = CliRunner().invoke(main, command)
    assert interrupted.exit_code == 130
    assert not file.exists()
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 2
    assert "model.safetensors.state holds an unfinished run" in again.stderr
    resumed = CliRunner().invoke(main, [*command, "--resume"])
    assert resumed.exit_code == 0, resumed.stderr
    assert "epoch   1/2" not in resumed.stderr
    assert "epoch   2/2" in resumed.stderr
    assert resumed.stdout.startswith("fold 2: PC ")
    _, notes = read_metadata(file)
    assert (notes["protocol"], notes["fold"], notes["data"]) == ("cv5", 2, faces.name)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "log", "cache"}
    events = event_accumulator.EventAccumulator(str(log)).Reload()
    assert set(events.Tags()["scalars"]) == {"loss/train", "pearson/validation", "learning_rate"}
    assert [event.step for event in events.Scalars("loss/train")] == [2]  # the first epoch died before its line


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["train"], "--preset demo, or --init"),
        (["train", "--preset", "sd15-vim-s"], "--init CHECKPOINT"),
        (["train", "--preset", "nope"], "no preset 'nope'"),
        (["train", "--preset", "demo", "-o", "/dev/null"], "-o takes the name of a regular file"),
        (["train", "--preset", "demo", "-o", "missing/model.safetensors"], "-o takes a file in a folder that exists"),
        (["train", "--preset", "demo", "--data", "missing"], "no folder Images"),
        (["train", "--preset", "demo", "--epochs", "-1"], "-1 is not in the range"),
        (
            ["train", "--preset", "demo", "--epochs", "0"],
            "--epochs 0 trains nothing but the linear probe: add --linear-probe",
        ),
        (["train", "--preset", "demo", "--protocol", "cv5"], "--protocol cv5 needs --fold 1 to 5"),
        (["train", "--preset", "demo", "--fold", "1"], "--fold needs --protocol cv5, folds or kfold:K; this is 60-40"),
        (
            ["train", "--preset", "demo", "--protocol", "cv5", "--fold", "6"],
            "--fold 6: --protocol cv5 has folds 1 to 5",
        ),
        (["train", "--preset", "demo", "--resume"], "no run to resume"),
    ],
)
def test_a_wrong_command_is_explained(
    arguments: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert reason in result.stderr
