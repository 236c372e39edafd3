"""What --data may name, and which protocol follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdnet.data.rated import Scale
from mdnet.data.scut_fbp5500 import read_splits
from mdnet.data.source import check_protocol, is_table, open_data
from mdnet_engines.errors import MDNetError, UsageError


@pytest.fixture
def table(tmp_path: Path) -> Path:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).touch()
    return write(tmp_path, "image,rating\na.jpg,3\nb.jpg,7\n")


def write(folder: Path, text: str) -> Path:
    file = folder / "ratings.csv"
    file.write_text(text)
    return file


def test_a_table_and_the_folder_that_holds_it_are_the_same(table: Path) -> None:
    by_file, by_folder = open_data(table), open_data(table.parent)
    assert by_file.name == by_folder.name == "ratings.csv"
    assert by_file.sha256 == by_folder.sha256 is not None


def test_tables_are_told_from_folders_of_pictures(table: Path, faces: Path) -> None:
    (table.parent / "pictures").mkdir()
    found = [is_table(path) for path in (table, table.parent, table.parent / "pictures", faces, faces / "Images")]
    assert found == [True, True, False, False, False]


def test_scut_fbp5500_is_known_by_its_layout(faces: Path) -> None:
    data = open_data(faces)
    assert (data.table, data.name, data.sha256) == (None, "faces", None)
    assert data.protocol(None, training=True) == "60-40"
    assert data.splits("60-40")[0].test.images == read_splits(faces, "60-40")[0].test.images


@pytest.mark.parametrize("where", ["missing", ".", "two"])
def test_what_is_neither_is_refused(where: str, tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    for name in ("ratings.csv", "ratings.parquet"):
        (tmp_path / "two" / name).touch()
    reason = "has both ratings.csv and ratings.parquet" if where == "two" else "neither SCUT-FBP5500 .* nor a table"
    with pytest.raises(UsageError, match=reason):
        open_data(tmp_path / where)


@pytest.mark.parametrize(
    ("columns", "training", "evaluating"),
    [
        ("image,rating\na.jpg,3\nb.jpg,7\n", "kfold:5", "all"),
        ("image,rating,split\na.jpg,3,train\nb.jpg,7,val\n", "split", "split"),
        ("image,rating,fold\na.jpg,3,1\nb.jpg,7,2\n", "folds", "folds"),
        ("image,rating,fold,split\na.jpg,3,1,train\nb.jpg,7,2,val\n", "split", "split"),
    ],
)
def test_the_protocol_follows_from_the_columns(table: Path, columns: str, training: str, evaluating: str) -> None:
    data = open_data(write(table.parent, columns))
    assert (data.protocol(None, training=True), data.protocol(None, training=False)) == (training, evaluating)
    assert data.protocol("kfold:3", training=True) == data.protocol("kfold:3:0", training=False) == "kfold:3"
    assert data.protocol("kfold:10:10", training=True) == "kfold:10:10"


def test_protocols_belong_to_their_kind_of_data(table: Path, faces: Path) -> None:
    with pytest.raises(UsageError, match=r"protocol 60-40 is not one of .*; known: split, folds, kfold:K"):
        open_data(table).protocol("60-40", training=True)
    with pytest.raises(UsageError, match=r"protocol kfold:5 is not one of .*; known: 60-40, cv5"):
        open_data(faces).protocol("kfold:5", training=False)


@pytest.mark.parametrize("text", ["60-40", "cv5", "split", "folds", "all", "kfold:5", "kfold:10:42"])
def test_protocols_by_name(text: str) -> None:
    assert check_protocol(text) == text


@pytest.mark.parametrize("text", ["", "kfold", "kfold:", "kfold:0", "kfold:5:", "kfold:-1", "CV5", "kfold:5 "])
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="unknown protocol"):
        check_protocol(text)


def test_ratings_must_be_on_the_scale(table: Path, faces: Path) -> None:
    with pytest.raises(MDNetError, match=r"ratings.csv:3: the rating is 7, off .* 1 to 5; .*; say --scale 1 7"):
        open_data(table).check_scale(Scale(1, 5), "say --scale {fitting}")
    open_data(table).check_scale(Scale(1, 10), "")
    open_data(faces).check_scale(Scale(1, 5), "")
    with pytest.raises(UsageError, match="has ratings from 1 to 5, not 1 to 10; say --scale 1 5"):
        open_data(faces).check_scale(Scale(1, 10), "say --scale {fitting}")


def test_columns_of_no_use_are_noted(table: Path) -> None:
    assert open_data(table).notes(Scale(1, 10)) == []
    (note,) = open_data(write(table.parent, "image,rating,splits\na.jpg,3,train\n")).notes(Scale(1, 10))
    assert note.endswith("ratings.csv: columns that are not used: splits")


def test_ratings_that_leave_half_the_scale_empty_are_noted(table: Path, faces: Path) -> None:
    names = [f"{number}.jpg" for number in range(20)]
    for name in names:
        (table.parent / name).touch()
    data = open_data(write(table.parent, "image,rating\n" + "".join(f"{n},{1 + i / 5}\n" for i, n in enumerate(names))))
    (note,) = data.notes(Scale(1, 10))
    assert "ratings reach from 1 to 4.8, less than half of the scale 1 to 10; are they on that scale?" in note
    assert data.notes(Scale(1, 5)) == open_data(faces).notes(Scale(1, 5)) == []
