"""The ablation table: what differs between its runs, that it goes on where it stopped, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from recorded import Recorded

from mdnet.cli.main import main
from mdnet.data.rated import Split
from mdnet.data.scut_fbp5500 import read_splits
from mdnet.evaluation.evaluate import Evaluation, evaluate
from mdnet.model.config import FUSIONS, TrainConfig, preset
from mdnet.model.net import MDNet, random_mdnet, with_fusion
from mdnet.training.ablation import Results, Run, ablate, table
from mdnet.training.train import train
from mdnet_engines.errors import MDNetError

CONFIG = TrainConfig(epochs=1, batch_size=18)


@pytest.fixture
def split(faces: Path) -> Split:
    return read_splits(faces, "60-40")[0]


def start(seed: int) -> MDNet:
    model = random_mdnet(preset("demo"), seed)
    model.diffusion = random_mdnet(preset("demo"), 0).diffusion
    return model


def test_a_run_is_what_training_and_evaluating_that_model_gives(split: Split, tmp_path: Path) -> None:
    counted = Recorded()
    runs = ablate(start, split, CONFIG, seeds=[1], fusions=["concatenation"], results=Results(None), progress=counted)
    model = with_fusion(start(1), "concatenation", 1)
    best = train(model, split.train, TrainConfig(epochs=1, batch_size=18, seed=1))
    expected = evaluate(model, split.test)
    assert [(run.fusion, run.seed, run.best_epoch) for run in runs] == [("concatenation", 1, best.number)]
    # Features of another batch size: float32's rounding.
    assert runs[0].test.figures() == pytest.approx(expected.figures(), abs=1e-4)
    read_and_computed = [len(split.train)] * 2 + [len(split.test)] * 2
    assert [total for total, _ in counted.counts] == [*read_and_computed, 1]
    assert all(sum(advances) == total for total, advances in counted.counts)


def test_a_table_goes_on_where_it_was_interrupted(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "table.json"
    fusions = ["cross-attention", "vim-only"]
    whole = ablate(start, split, CONFIG, seeds=[0, 1], fusions=fusions, results=Results(None), cache=tmp_path / "cache")
    seen: list[Run] = []

    def killed(run: Run) -> None:
        seen.append(run)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ablate(
            start,
            split,
            CONFIG,
            seeds=[0, 1],
            fusions=fusions,
            results=Results(file),
            cache=tmp_path / "cache",
            on_run=killed,
        )
    trained: list[int] = []

    def counted(*arguments: object, **options: object) -> object:
        trained.append(1)
        return train(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("mdnet.training.ablation.train", counted)
    runs = ablate(start, split, CONFIG, seeds=[0, 1], fusions=fusions, results=Results(file), cache=tmp_path / "cache")
    assert len(trained) == 1
    assert runs == whole
    assert len({run.test for run in runs}) == 4  # four different models
    # Other settings are other runs.
    ablate(
        start,
        split,
        TrainConfig(epochs=2, batch_size=18),
        seeds=[0],
        fusions=["vim-only"],
        results=Results(file),
        cache=tmp_path / "cache",
    )
    assert len(trained) == 2
    assert len(json.loads(file.read_text())["runs"]) == 5


def test_the_table_has_a_row_for_each_fusion_with_mean_and_sample_deviation() -> None:
    runs = [
        Run(fusion, seed, 1, Evaluation(10, pearson, 0.25, 0.5), {})
        for fusion, figures in (("cross-attention", (0.9, 0.8)), ("vim-only", (0.5,)))
        for seed, pearson in enumerate(figures)
    ]
    assert table(runs).splitlines() == [
        "| fusion | PC | MAE | RMSE | seeds |",
        "| --- | --- | --- | --- | --- |",
        "| cross-attention | 0.8500 ± 0.0707 | 0.2500 ± 0.0000 | 0.5000 ± 0.0000 | 2 |",
        "| vim-only | 0.5000 | 0.2500 | 0.5000 | 1 |",
    ]


@pytest.mark.parametrize("content", ["", "[]", '{"runs": [{"fusion": "vim-only"}]}', '{"runs": 3}', "\xff"])
def test_a_file_that_is_no_table_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(MDNetError, match=r"is not a table of `mdnet ablate`.*another file with -o"):
        Results(file)


def test_the_command_prints_the_table(faces: Path, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    words = ["ablate", "--preset", "demo", "--data", str(faces), "--epochs", "1", "--seeds", "1", "-o", str(file)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {fusion}" for fusion in FUSIONS]
    assert {run["fusion"] for run in json.loads(file.read_text())["runs"]} == set(FUSIONS)
    again = CliRunner().invoke(main, words)
    assert again.stdout == result.stdout
    one = CliRunner().invoke(main, [*words, "--fusion", "vim-only"])
    assert one.stdout.splitlines()[2:] == [line for line in lines if line.startswith("| vim-only")]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["ablate"], "--preset demo, or --init"),
        (["ablate", "--preset", "demo", "--protocol", "cv5"], "needs --fold 1 to 5"),
        (["ablate", "--preset", "demo", "-o", "missing/table.json"], "-o takes a file in a folder that exists"),
        (["ablate", "--preset", "demo", "--data", "missing"], "no folder Images"),
        (["train", "--preset", "demo", "--fusion", "sum"], "'sum' is not one of"),
    ],
)
def test_a_wrong_command_is_explained(
    words: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert reason in result.stderr
