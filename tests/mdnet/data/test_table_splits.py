"""A table's protocols: what is trained on, what is tested on, and that no picture is on both sides."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recorded import Recorded

from mdnet.data.rated import Rated
from mdnet.data.table import RatingTable, read_table
from mdnet.data.table_splits import table_splits
from mdnet_engines.errors import MDNetError, UsageError


def picture(file: Path, seed: int) -> None:
    """A picture of its own for each seed."""
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).resize((64, 64)).save(file)


def make(folder: Path, columns: dict[str, list[object]], seeds: list[int] | None = None) -> RatingTable:
    """A table of pictures p0.png, p1.png … with these columns beside them."""
    count = len(next(iter(columns.values())))
    for row in range(count):
        picture(folder / f"p{row}.png", row if seeds is None else seeds[row])
    rows = zip([f"p{row}.png" for row in range(count)], *columns.values(), strict=True)
    lines = [",".join(["image", *columns]), *(",".join(map(str, row)) for row in rows)]
    (folder / "ratings.csv").write_text("\n".join(lines))
    return read_table(folder / "ratings.csv")


def names(part: Rated) -> list[str]:
    return [image.stem for image in part.images]


def many(folder: Path, count: int = 47, seeds: list[int] | None = None) -> RatingTable:
    """Ratings and groups at random; groups of 30, 16 and 1."""
    rng = np.random.default_rng(3)
    ratings: list[object] = [round(float(value), 3) for value in rng.uniform(1, 5, count)]
    groups: list[object] = ["x" if row < 30 else "y" if row < count - 1 else "alone" for row in range(count)]
    return make(folder, {"rating": ratings, "group": groups}, seeds)


# --- split ---


@pytest.mark.parametrize(
    ("parts", "trained", "tested", "name"),
    [
        (["train", "val", "train"], ["p0", "p2"], ["p1"], "val"),
        (["train", "test", "val"], ["p0"], ["p1"], "test"),
        (["test", "test", "test"], [], ["p0", "p1", "p2"], "test"),
    ],
)
def test_a_split_column_says_what_is_trained_and_tested_on(
    tmp_path: Path, parts: list[object], trained: list[str], tested: list[str], name: str
) -> None:
    (split,) = table_splits(make(tmp_path, {"rating": [1, 2, 3], "split": parts}), "split")
    assert (names(split.train), names(split.test), split.name, split.fold) == (trained, tested, name, None)


def test_a_picture_in_two_splits_is_refused_with_both_lines(tmp_path: Path) -> None:
    table = make(tmp_path, {"rating": [1, 2, 3], "split": ["train", "train", "val"]}, seeds=[0, 1, 0])
    Image.open(tmp_path / "p2.png").save(tmp_path / "again.bmp")  # other bytes, the same pixels
    (tmp_path / "again.bmp").replace(tmp_path / "p2.png")
    with pytest.raises(
        MDNetError, match=r"^ratings.csv:4: the picture of ratings.csv:2, which is in train; this is val"
    ):
        table_splits(table, "split")


def test_a_picture_twice_in_one_split_is_kept(tmp_path: Path) -> None:
    table = make(tmp_path, {"rating": [1, 2, 3], "split": ["train", "train", "val"]}, seeds=[0, 0, 1])
    (split,) = table_splits(table, "split")
    assert names(split.train) == ["p0", "p1"]


def test_a_table_with_nothing_to_test_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MDNetError, match="no line with the split test or val"):
        table_splits(make(tmp_path, {"rating": [1, 2], "split": ["train", "train"]}), "split")


# --- folds ---


def test_each_fold_of_the_table_is_tested_on_once(tmp_path: Path) -> None:
    splits = table_splits(make(tmp_path, {"rating": [1, 2, 3, 4], "fold": [0, 2, 0, 1]}), "folds")
    assert [(split.name, split.fold) for split in splits] == [("fold 0", 0), ("fold 1", 1), ("fold 2", 2)]
    assert [names(split.test) for split in splits] == [["p0", "p2"], ["p3"], ["p1"]]
    assert names(splits[0].train) == ["p1", "p3"]


def test_a_picture_in_two_folds_of_the_table_is_refused(tmp_path: Path) -> None:
    table = make(tmp_path, {"rating": [1, 2, 3], "fold": [1, 2, 2]}, seeds=[5, 6, 5])
    with pytest.raises(
        MDNetError, match=r"ratings.csv:4: the picture of ratings.csv:2, which is in fold 1; this is fold 2"
    ):
        table_splits(table, "folds")


def test_one_fold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MDNetError, match="has one fold; expected two or more"):
        table_splits(make(tmp_path, {"rating": [1, 2], "fold": [1, 1]}), "folds")


# --- folds by a seed ---


def test_folds_partition_the_pictures_into_equal_parts(tmp_path: Path) -> None:
    splits = table_splits(many(tmp_path), "kfold:5")
    assert [(split.name, split.fold) for split in splits] == [(f"fold {n}", n) for n in range(1, 6)]
    tested = [name for split in splits for name in names(split.test)]
    assert sorted(tested) == sorted(f"p{row}" for row in range(47))
    assert sorted(len(split.test) for split in splits) == [9, 9, 9, 10, 10]
    for split in splits:
        assert sorted(names(split.train) + names(split.test)) == sorted(tested)


def test_every_fold_has_its_share_of_groups_and_ratings(tmp_path: Path) -> None:
    for split in table_splits(many(tmp_path), "kfold:5"):
        groups = Counter(split.test.groups)
        assert 5 <= groups["x"] <= 7  # 30 in 5 folds
        assert 2 <= groups["y"] <= 5  # 16 in 5 folds
        ratings = split.test.ratings[np.array(split.test.groups) == "x"]
        assert ratings.min() < 2.4
        assert ratings.max() > 3.6


def test_folds_are_the_seeds_and_not_the_order_of_lines(tmp_path: Path) -> None:
    table = many(tmp_path)

    def folds(protocol: str, of: RatingTable = table) -> list[list[str]]:
        return [sorted(names(split.test)) for split in table_splits(of, protocol)]

    first, *lines = (tmp_path / "ratings.csv").read_text().splitlines()
    (tmp_path / "other.csv").write_text("\n".join([first, *reversed(lines)]))
    assert folds("kfold:4:7") == folds("kfold:4:7", read_table(tmp_path / "other.csv"))
    assert folds("kfold:4") == folds("kfold:4:0") != folds("kfold:4:7")


def test_the_same_picture_is_in_one_fold(tmp_path: Path) -> None:
    seeds = [row // 2 for row in range(40)]  # every picture twice, under different names
    for split in table_splits(many(tmp_path, 40, seeds), "kfold:3"):
        trained = {seeds[int(name[1:])] for name in names(split.train)}
        assert trained.isdisjoint(seeds[int(name[1:])] for name in names(split.test))
        assert 12 <= len(split.test) <= 14


def test_fewer_different_pictures_than_folds_are_refused(tmp_path: Path) -> None:
    table = make(tmp_path, {"rating": [1, 2, 3, 4]}, seeds=[0, 0, 1, 1])
    with pytest.raises(MDNetError, match="has 2 different pictures; kfold:3 needs 3"):
        table_splits(table, "kfold:3")


# --- all, and what is wrong ---


def test_all_pictures_are_a_test_list_that_nothing_compares(tmp_path: Path) -> None:
    progress = Recorded()
    (split,) = table_splits(make(tmp_path, {"rating": [1, 2]}), "all", progress)
    assert (names(split.train), names(split.test), progress.counts) == ([], ["p0", "p1"], [])


@pytest.mark.parametrize(
    ("protocol", "reason"),
    [
        ("split", "has no column split"),
        ("folds", "has no column fold"),
        ("kfold:1", "expected two folds or more"),
        ("60-40", "protocol 60-40 is not one of a table"),
    ],
)
def test_a_protocol_that_the_table_lacks_is_refused(tmp_path: Path, protocol: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        table_splits(make(tmp_path, {"rating": [1, 2]}), protocol)


def test_a_picture_that_cannot_be_read_is_named_with_its_line(tmp_path: Path) -> None:
    table = make(tmp_path, {"rating": [1, 2, 3]})
    (tmp_path / "p1.png").write_text("no picture")
    with pytest.raises(
        MDNetError, match=r"^ratings.csv:3: .*p1.png: not an image.*every picture of the table is needed"
    ):
        table_splits(table, "kfold:2")


def test_comparing_pictures_is_counted(tmp_path: Path) -> None:
    progress = Recorded()
    table_splits(many(tmp_path, 7), "kfold:2", progress)
    assert progress.counts == [(7, [1] * 7)]
