"""Training and evaluation on a table of one's own ratings, as typed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from mdnet.cli.main import main
from mdnet.data.table import read_table
from mdnet.model.checkpoint import read_metadata


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures with ratings from 1 to 10, as tables with splits, with folds, and with neither."""
    folder, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(1)
    tables: dict[str, list[str]] = {"ratings": ["split"], "folds": ["fold"], "plain": [""]}
    for row in range(24):
        colours = rng.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(colours).resize((64, 64)).save(folder / f"{row}.png")
        for name, cell in (("ratings", "train" if row < 16 else "val"), ("folds", str(row % 3)), ("plain", "")):
            tables[name].append(f"{row}.png,{1 + row * 9 / 23:.3f},{'ab'[row % 2]},{cell}")
    for name, (last, *lines) in tables.items():
        (folder / f"{name}.csv").write_text("\n".join([f"image,rating,group,{last}", *lines]))
    return folder


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_a_model_trained_on_a_table_keeps_its_scale_and_what_it_has_seen(folder: Path, tmp_path: Path) -> None:
    table, model, figures = folder / "ratings.csv", tmp_path / "mine.safetensors", tmp_path / "figures.json"
    done = run("train", "--preset", "demo", "--data", table, "--scale", 1, 10, "--epochs", 1, "-o", model)
    assert done.exit_code == 0, done.stderr
    config, notes = read_metadata(model)
    assert (config.score_min, config.score_max) == (1, 10)
    known = {"data": "ratings.csv", "data_sha256": read_table(table).sha256, "protocol": "split"}
    assert {**notes, **known} == notes
    assert "fold" not in notes
    assert done.stdout.startswith("val: PC ")

    again = run("evaluate", model, "--data", table, "--json", figures)
    assert again.exit_code == 0, again.stderr
    assert again.stdout.split("PC")[0] == "val: "
    document = json.loads(figures.read_text())
    assert (document["protocol"], document["scale"], document["notes"]) == ("split", {"minimum": 1, "maximum": 10}, [])
    assert set(document["groups"]) == {"a", "b"}
    assert all(1 < row["score"] < 10 for row in document["splits"][0]["predictions"])

    seen = run("evaluate", model, "--data", table, "--protocol", "all")
    assert "was trained with split of 'ratings.csv', so it has seen test images of all" in seen.stderr
    elsewhere = run("evaluate", model, "--data", folder / "plain.csv")
    assert elsewhere.stdout.startswith("all: PC ")
    assert elsewhere.stdout.endswith("on 24 test images\n")
    assert "seen" not in elsewhere.stderr


def test_ablate_takes_a_fold_of_a_table(folder: Path, tmp_path: Path) -> None:
    words = ("--preset", "demo", "--scale", 1, 10, "--epochs", 1, "--seeds", 1, "-o", tmp_path / "runs.json")
    done = run("ablate", "--data", folder / "folds.csv", "--fold", 0, *words)
    assert done.exit_code == 0, done.stderr
    runs = json.loads((tmp_path / "runs.json").read_text())["runs"]
    assert {one["test"]["images"] for one in runs} == {8}
    assert {one["fingerprint"]["scale"] for one in runs} == {"1 to 10"}


SCALE = ("--scale", "1", "10")


@pytest.mark.parametrize(
    ("table", "words", "reason"),
    [
        ("ratings.csv", (), "ratings reach from 1 to 10; say which scale the ratings have, such as --scale 1 10"),
        ("plain.csv", SCALE, "has no column split or fold, so its protocol is kfold:5: give --fold 1 to 5, or another"),
        ("plain.csv", (*SCALE, "--protocol", "kfold:3"), "--protocol kfold:3 needs --fold 1 to 3"),
        (
            "plain.csv",
            (*SCALE, "--protocol", "kfold:3", "--fold", "4"),
            "--fold 4: --protocol kfold:3 has folds 1 to 3",
        ),
        ("plain.csv", (*SCALE, "--protocol", "all"), "protocol all is for `mdnet evaluate`"),
        ("plain.csv", (*SCALE, "--protocol", "split"), "has no column split, which --protocol split needs"),
        ("plain.csv", (*SCALE, "--protocol", "60-40"), "protocol 60-40 is not one of"),
        ("plain.csv", (*SCALE, "--protocol", "k-fold"), "unknown protocol 'k-fold'"),
        ("folds.csv", SCALE, "--protocol folds needs --fold, one of 0, 1, 2"),
        ("folds.csv", (*SCALE, "--fold", "3"), "--protocol folds needs --fold, one of 0, 1, 2"),
        ("ratings.csv", (*SCALE, "--fold", "1"), "--fold needs --protocol cv5, folds or kfold:K; this is split"),
        ("ratings.csv", ("--scale", "10", "1"), "--scale 10 1: expected the least rating, then the greatest"),
        ("ratings.csv", ("--scale", "0", "nan"), "--scale 0 nan: expected the least rating"),
        ("ratings.csv", ("--scale", "one", "two"), "'one' is not a valid float"),
    ],
)
def test_what_does_not_fit_the_table_is_explained(
    folder: Path, table: str, words: tuple[str, ...], reason: str
) -> None:
    done = run("train", "--preset", "demo", "--data", folder / table, *words)
    assert done.exit_code in (1, 2)
    assert reason in done.stderr


def test_a_table_without_pictures_to_train_on_is_refused(folder: Path) -> None:
    text = (folder / "ratings.csv").read_text().replace(",train", ",test")
    (folder / "held-out.csv").write_text(text)
    done = run("train", "--preset", "demo", "--data", folder / "held-out.csv", *SCALE)
    assert "held-out.csv: 0 pictures to train on; expected 10 or more" in done.stderr


def test_drawn_faces_have_a_scale_of_their_own() -> None:
    done = run("train", "--preset", "demo", *SCALE)
    assert "drawn faces have ratings from 1 to 5, the model's scale is 1 to 10" in done.stderr


def test_evaluate_refuses_another_scale_than_the_models(folder: Path) -> None:
    from mdnet.model.checkpoint import demo_checkpoint

    done = run("evaluate", demo_checkpoint(), "--data", folder / "ratings.csv")
    assert (
        "demo.safetensors was trained for the scale 1 to 5; for these ratings train one with --scale 1 10"
        in done.stderr
    )
    said = run("evaluate", demo_checkpoint(), "--data", folder / "ratings.csv", *SCALE)
    assert "demo.safetensors was trained for the scale 1 to 5, --scale says 1 to 10" in said.stderr
