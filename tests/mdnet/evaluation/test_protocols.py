"""A protocol as a whole: splits, groups and spreads against plain numpy, and who has seen which images."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recorded import Recorded
from scipy import stats

from mdnet.data.rated import Rated, Scale
from mdnet.data.scut_fbp5500 import GROUPS, read_splits
from mdnet.data.source import RatedData, open_data
from mdnet.evaluation.evaluate import Evaluation, predict
from mdnet.evaluation.protocols import Benchmark, SplitResult, assign, run_benchmark, seen_images
from mdnet.evaluation.scored_model import Device, ScoredModel, training_of
from mdnet_engines.backends.candidates import Backend
from mdnet_engines.bundle.manifest import Training
from mdnet_engines.errors import MDNetError, UsageError
from mdnet_rt.images.preprocess import load_image

SIZE = 32


@dataclass(frozen=True)
class Brightness(ScoredModel):
    """A model that scores how bright an image is, times `gain`."""

    gain: float = 1.0
    loads: list[float] = field(default_factory=list, compare=False)

    def load(self, device: Device = "cpu", backend: Backend = "auto") -> Callable[[np.ndarray], np.ndarray]:
        self.loads.append(self.gain)
        return lambda images: brightness(images) * np.float32(self.gain)


def brightness(images: np.ndarray) -> np.ndarray:
    return 1 + images.astype(np.float32).mean(axis=(1, 2, 3)) / 64


def scored_by(
    name: str = "model", gain: float = 1.0, scale: tuple[float, float] = (1, 5), **training: object
) -> Brightness:
    return Brightness(Path(name), "checkpoint", SIZE, training_of(training), gain=gain, scale=Scale(*scale))


def expected_scores(data: Rated) -> np.ndarray:
    return np.array([float(brightness(load_image(file, SIZE)[None])[0]) for file in data.images])


def test_cv5_is_every_fold_then_mean_and_sample_deviation(faces: Path) -> None:
    model = scored_by()
    result = run_benchmark([model], faces, "cv5", batch_size=5)
    folds = read_splits(faces, "cv5")
    rows = []
    for fold, split in zip(folds, result.splits, strict=True):
        scores, truth = expected_scores(fold.test), fold.test.ratings.astype(np.float64)
        np.testing.assert_allclose(split.scores, scores, rtol=1e-6)  # float32 sums over 3,072 values
        error = scores - truth
        rows.append([stats.pearsonr(scores, truth).statistic, np.abs(error).mean(), np.sqrt((error**2).mean())])
        assert list(split.evaluation().figures().values()) == pytest.approx(rows[-1], rel=1e-5)
    spread = result.spread()
    assert list(spread.mean.values()) == pytest.approx(np.mean(rows, axis=0), rel=1e-5)
    assert list(spread.sd.values()) == pytest.approx(np.std(rows, axis=0, ddof=1), rel=1e-4)
    assert spread.images == 60
    assert model.loads == [1.0]  # one model for all folds is read once


def test_groups_are_by_name_and_partition_the_test_images(faces: Path) -> None:
    (split,) = run_benchmark([scored_by()], faces, "60-40").splits
    (test,) = (one.test for one in read_splits(faces, "60-40"))
    scores, truth = expected_scores(test), test.ratings.astype(np.float64)
    for group in GROUPS:
        rows = [row for row, image in enumerate(test.images) if image.name.startswith(group)]
        part = split.evaluation(group)
        assert part.images == len(rows) > 1
        assert part.mae == pytest.approx(np.abs(scores[rows] - truth[rows]).mean(), rel=1e-5)
        assert part.pearson == pytest.approx(stats.pearsonr(scores[rows], truth[rows]).statistic, rel=1e-4)
    assert sum(split.evaluation(group).images for group in GROUPS) == len(test)


def test_five_models_score_their_own_folds_in_order(faces: Path) -> None:
    result = run_benchmark([scored_by(f"{n}", gain=n) for n in range(1, 6)], faces, "cv5")
    for gain, (fold, split) in enumerate(zip(read_splits(faces, "cv5"), result.splits, strict=True), start=1):
        np.testing.assert_allclose(split.scores, gain * expected_scores(fold.test), rtol=1e-6)


def test_progress_and_results_come_split_by_split(faces: Path) -> None:
    progress, results = Recorded(), []
    run_benchmark(
        [scored_by()],
        faces,
        "cv5",
        batch_size=8,
        progress=progress,
        on_result=lambda split: results.append((split.name, len(progress.counts))),
    )
    assert progress.counts == [(12, [8, 4])] * 5
    assert results == [(f"fold {n}", n) for n in range(1, 6)]


def test_a_split_without_a_group_leaves_a_gap_and_no_mean() -> None:
    def split(names: list[str]) -> SplitResult:
        ratings = np.linspace(2, 4, len(names), dtype=np.float32)
        test = Rated([Path(name) for name in names], ratings, [name[:2] for name in names])
        return SplitResult("fold", scored_by(), test, ratings + 0.5)

    result = Benchmark("cv5", "faces", [split(["AF1.jpg", "AF2.jpg", "CM1.jpg"]), split(["AF3.jpg", "AF4.jpg"])], [])
    assert result.spread("AF").mean == pytest.approx({"pearson": 1.0, "mae": 0.5, "rmse": 0.5})
    assert all(math.isnan(value) for value in result.spread("CM").mean.values())
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert document["groups"]["CM"] == {
        "images": 1,
        "mean": {"pearson": None, "mae": None, "rmse": None},
        "sd": {"pearson": None, "mae": None, "rmse": None},
    }
    # One image has errors, but a correlation takes two.
    assert document["splits"][0]["groups"]["CM"] == {"images": 1, "pearson": None, "mae": 0.5, "rmse": 0.5}


def test_json_has_every_score(faces: Path) -> None:
    result = run_benchmark([scored_by()], faces, "60-40")
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    (split,) = document["splits"]
    assert [row["score"] for row in split["predictions"]] == result.splits[0].scores.tolist()
    truth = np.array([row["rating"] for row in split["predictions"]])
    scores = np.array([row["score"] for row in split["predictions"]])
    assert split["rmse"] == pytest.approx(np.sqrt(((scores - truth) ** 2).mean()), rel=1e-5)  # ratings: six decimals
    assert document["overall"] == {
        "images": 24,
        "mean": {name: split[name] for name in ("pearson", "mae", "rmse")},
        "sd": {"pearson": None, "mae": None, "rmse": None},
    }


@pytest.mark.parametrize(("protocol", "count"), [("60-40", 2), ("60-40", 5), ("cv5", 2), ("cv5", 6), ("cv5", 0)])
def test_a_wrong_number_of_models_is_refused(protocol: str, count: int) -> None:
    with pytest.raises(UsageError, match=f"{count} models for protocol {protocol}; expected one"):
        assign([scored_by()] * count, 1 if protocol == "60-40" else 5, protocol)


def seen(models: list[Brightness], protocol: str, data: RatedData | None = None) -> list[str]:
    """The lines about one model, or one for each fold, that is tested with a protocol."""
    folds: dict[str, list[int | None]] = {"cv5": [*range(1, 6)], "kfold:3": [1, 2, 3]}
    numbers = folds.get(protocol, [None])
    return seen_images(assign(models, len(numbers), protocol), numbers, protocol, data or RatedData(Path("faces")))


@pytest.mark.parametrize(
    ("protocol", "training", "reason"),
    [
        ("60-40", {}, None),
        ("60-40", {"protocol": "60-40", "data": "x"}, None),
        (
            "60-40",
            {"protocol": "cv5", "fold": 2},
            "trained with cv5, so on the same data it has seen test images of 60-40",
        ),
        (
            "cv5",
            {"protocol": "60-40", "data": "x"},
            "trained with 60-40 of 'x', so on the same data it has seen test images",
        ),
        ("cv5", {"protocol": "cv5", "fold": 2}, "trained for fold 2, so .* test images of fold 1, 3, 4, 5"),
        ("cv5", {"protocol": "cv5"}, "scores all 5 folds"),
        ("cv5", {"data": "x"}, r"scores all 5 folds, so if it was trained on this data \(it says: of 'x'\)"),
        ("cv5", {}, "scores all 5 folds, so if it was trained on this data, it has seen test images"),
    ],
)
def test_one_model_that_has_seen_test_images_is_told_of_once(
    protocol: str, training: dict[str, object], reason: str | None
) -> None:
    notes = seen([scored_by(**training)], protocol)
    if reason is None:
        assert notes == []
        return
    (note,) = notes
    assert note.startswith("model ")
    assert re.search(reason, note)


def test_of_five_models_only_those_at_the_wrong_fold_are_told_of() -> None:
    def models(*folds: int) -> list[Brightness]:
        return [scored_by(f"m{row}", protocol="cv5", fold=fold) for row, fold in enumerate(folds, start=1)]

    assert seen(models(1, 2, 3, 4, 5), "cv5") == []
    wrong = seen(models(2, 1, 3, 4, 5), "cv5")
    assert [note.split(",")[0] for note in wrong] == ["m1 was trained for fold 2", "m2 was trained for fold 1"]
    assert seen([scored_by(f"m{n}") for n in range(1, 6)], "cv5") == []  # they say nothing: nothing is known


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Twelve pictures with ratings from 1 to 10; one is alone in its group."""
    lines = ["image,rating,group,split"]
    for row in range(12):
        colours = np.random.default_rng(row).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(colours).resize((SIZE, SIZE)).save(tmp_path / f"{row}.png")
        lines.append(f"{row}.png,{1 + row * 0.75},{'alone' if row == 11 else 'x'},{'train' if row < 6 else 'val'}")
    (tmp_path / "ratings.csv").write_text("\n".join(lines))
    return tmp_path / "ratings.csv"


def test_a_table_is_scored_by_its_own_split_scale_and_groups(table: Path) -> None:
    result = run_benchmark([scored_by(scale=(1, 10))], table)
    assert (result.protocol, [split.name for split in result.splits], result.notes) == ("split", ["val"], [])
    assert [image.name for image in result.splits[0].test.images] == [f"{row}.png" for row in range(6, 12)]
    assert result.groups == ["alone", "x"]
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert document["scale"] == {"minimum": 1, "maximum": 10}
    assert {name: group["images"] for name, group in document["groups"].items()} == {"alone": 1, "x": 5}
    assert document["groups"]["alone"]["mean"]["pearson"] is None  # no correlation of one image


def test_folds_by_a_seed_are_scored_one_by_one(table: Path) -> None:
    result = run_benchmark([scored_by(f"{n}", n, (1, 10)) for n in (1, 2, 3)], table, "kfold:3:5")
    tested = [image.name for split in result.splits for image in split.test.images]
    assert sorted(tested) == sorted(f"{row}.png" for row in range(12))
    for gain, split in enumerate(result.splits, start=1):
        np.testing.assert_allclose(split.scores, gain * expected_scores(split.test), rtol=1e-6)


def test_one_fold_alone_is_scored_by_the_model_that_left_it_out(table: Path, faces: Path) -> None:
    known = {"protocol": "kfold:3", "fold": 2, "data": "ratings.csv", "data_sha256": open_data(table).sha256}
    result = run_benchmark([scored_by(scale=(1, 10), **known)], table, "kfold:3", fold=2)
    assert ([split.name for split in result.splits], result.notes) == (["fold 2"], [])
    (note,) = run_benchmark([scored_by(scale=(1, 10), **known)], table, "kfold:3", fold=1).notes
    assert "has seen test images of fold 1" in note
    with pytest.raises(UsageError, match="--fold 4: protocol kfold:3 has folds 1, 2, 3"):
        run_benchmark([scored_by(scale=(1, 10))], table, "kfold:3", fold=4)
    with pytest.raises(UsageError, match="--fold 1: protocol 60-40 has no folds"):
        run_benchmark([scored_by()], faces, fold=1)


def test_a_scale_that_the_model_was_not_trained_for_is_refused(table: Path, faces: Path) -> None:
    with pytest.raises(MDNetError) as caught:
        run_benchmark([scored_by()], table)
    first = str(caught.value).splitlines()[0]
    assert "ratings reach from 1 to 9.25; model was trained for the scale 1 to 5" in first
    assert first.endswith("for these ratings train one with --scale 1 10")
    with pytest.raises(UsageError, match="model was trained for the scale 1 to 5, --scale says 1 to 10"):
        run_benchmark([scored_by()], table, scale=Scale(1, 10))
    with pytest.raises(
        UsageError, match="has ratings from 1 to 5, not 1 to 10; model was trained for the scale 1 to 10"
    ):
        run_benchmark([scored_by(scale=(1, 10))], faces)


def test_models_of_different_scales_are_refused(table: Path) -> None:
    with pytest.raises(
        UsageError, match="b was trained for the scale 0 to 10, a for 1 to 10; one evaluation needs one"
    ):
        run_benchmark([scored_by("a", scale=(1, 10)), scored_by("b", scale=(0, 10))], table, "kfold:2")


@pytest.mark.parametrize(
    ("protocol", "training", "reason"),
    [
        ("split", {"protocol": "split"}, None),
        (
            "all",
            {"protocol": "split"},
            "was trained with split of 'ratings.csv', so it has seen test images of all: these",
        ),
        ("kfold:3", {"protocol": "split"}, "so it has seen test images of kfold:3: these figures are no benchmark"),
        ("kfold:3", {"protocol": "kfold:3:1", "fold": 1}, "was trained with kfold:3:1 of"),
        ("kfold:3", {"protocol": "kfold:3", "fold": 2}, "was trained for fold 2 of .*, so .* test images of fold 1, 3"),
        (
            "split",
            {"protocol": "kfold:3", "fold": 2, "sha256": "a" * 64},
            "was trained on another 'ratings.csv', so whether",
        ),
        ("split", {"protocol": "kfold:3", "fold": 2, "sha256": "a" * 64, "data": "other.csv"}, None),
        ("split", {"protocol": "60-40", "sha256": None, "data": "faces"}, None),
        ("kfold:3", {"sha256": None, "data": None}, "scores all 3 folds, so if it was trained on this data"),
    ],
)
def test_a_model_that_has_seen_a_tables_pictures_is_known_by_its_hash(
    table: Path, protocol: str, training: dict[str, object], reason: str | None
) -> None:
    data = open_data(table)
    said = {"data": "ratings.csv", "data_sha256": training.get("sha256", data.sha256), **training}
    notes = seen([scored_by(**said)], protocol, data)
    assert len(notes) == (reason is not None)
    assert reason is None or re.search(reason, notes[0])


def test_notes_of_any_kind_make_a_training() -> None:
    assert training_of({"protocol": 5, "fold": "2", "data": None, "best_epoch": 3}) == Training()
    assert training_of({"protocol": "cv5", "fold": 2, "data": "d" * 900}).data == "d" * 400
    assert training_of({"data_sha256": "a" * 63}) == training_of({"data_sha256": 5}) == Training()
    assert training_of({"data_sha256": "a" * 64}).data_sha256 == "a" * 64


def test_an_image_that_cannot_be_read_ends_the_evaluation(tmp_path: Path) -> None:
    file = tmp_path / "AF1.jpg"
    file.write_bytes(b"no picture")
    with pytest.raises(MDNetError, match=r"AF1.jpg: not an image .*; every image of the split is needed"):
        predict(brightness, SIZE, Rated([file], np.ones(1, np.float32)))


def test_a_score_that_is_not_finite_ends_the_evaluation(faces: Path) -> None:
    (split,) = read_splits(faces, "60-40")
    with pytest.raises(MDNetError, match=rf"{split.test.images[1].name}: its score is not finite \(nan\)"):
        predict(lambda images: np.where(np.arange(len(images)) == 1, np.nan, 3.0), SIZE, split.test)


def test_no_images_give_no_scores() -> None:
    none = Rated([], np.zeros(0, np.float32))
    assert predict(brightness, SIZE, none).shape == (0,)
    assert Evaluation.of(none.ratings, np.zeros(0)).images == 0
