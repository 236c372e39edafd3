"""Tables of ratings as people write them, and what is wrong with each line of a bad one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mdnet.data.rated import Scale
from mdnet.data.table import RatingTable, fitting_scale, read_table
from mdnet_engines.errors import MDNetError, UsageError

NAMES = ("a.jpg", "b.jpg", "c.jpg", "images/d.jpg")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with four files that stand for pictures: the reader does not open them."""
    (tmp_path / "images").mkdir()
    for name in NAMES:
        (tmp_path / name).touch()
    return tmp_path


def write(folder: Path, text: str | bytes, name: str = "ratings.csv") -> Path:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def names(table: RatingTable) -> list[str]:
    return [image.relative_to(table.file.parent).as_posix() for image in table.rated.images]


def problem(folder: Path, text: str | bytes, name: str = "ratings.csv") -> str:
    with pytest.raises(MDNetError) as caught:
        read_table(write(folder, text, name))
    return str(caught.value)


# --- what is read ---


def test_a_table_has_pictures_ratings_groups_and_splits(folder: Path) -> None:
    text = "image,rating,group,split\na.jpg,1.5,x,train\nimages/d.jpg,4,,val\nb.jpg,2,y,TEST\n"
    table = read_table(write(folder, text))
    assert names(table) == ["a.jpg", "images/d.jpg", "b.jpg"]
    np.testing.assert_array_equal(table.rated.ratings, np.array([1.5, 4, 2], np.float32))
    assert table.rated.groups == ["x", "", "y"]
    assert (table.parts, table.folds, table.unused) == (["train", "val", "test"], None, [])
    assert table.places == ["ratings.csv:2", "ratings.csv:3", "ratings.csv:4"]


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffimage,rating\na.jpg,3.5\nb.jpg,2\n",  # a byte-order mark
        "image;rating\na.jpg;3.5\nb.jpg;2\n",
        "image\trating\na.jpg\t3.5\nb.jpg\t2\n",
        "image;rating\na.jpg;3,5\nb.jpg;2,0\n",  # a comma as decimal sign
        'image,rating\na.jpg,"3,5"\nb.jpg,2\n',
        "image,rating\r\na.jpg,3.5\r\n\r\nb.jpg,2\r\n",
        " Image , RATING \n a.jpg , 3.5 \n b.jpg , 2 ",
        "Filename,Score\na.jpg,3.5\nb.jpg,2\n",
        "rating,path\n3.5,a.jpg\n2,b.jpg\n",
        '"image","rating"\n"a.jpg","3.5"\n"b.jpg","2"\n',
        "image,rating,,\na.jpg,3.5,,\nb.jpg,2,,\n",  # cells that a spreadsheet adds
        "image;rating;note\na.jpg;3.5;one, two, three\nb.jpg;2\n",
    ],
)
def test_tables_of_other_programs_read_the_same(folder: Path, text: str) -> None:
    table = read_table(write(folder, text))
    assert (names(table), table.rated.ratings.tolist()) == (["a.jpg", "b.jpg"], [3.5, 2.0])


def test_paths_may_be_absolute_or_have_backslashes(folder: Path) -> None:
    table = read_table(write(folder, f"image,rating\n{folder / 'a.jpg'},1\nimages\\d.jpg,2\n./b.jpg,3\n"))
    assert [image.resolve() for image in table.rated.images] == [
        (folder / name).resolve() for name in ("a.jpg", "images/d.jpg", "b.jpg")
    ]


def test_a_column_of_no_use_is_named(folder: Path) -> None:
    assert read_table(write(folder, "image,rating,splits,age\na.jpg,3,train,9\n")).unused == ["splits", "age"]


@pytest.mark.parametrize("cells", [["0", "1", "4"], ["1.0", "2.0", "2"]])
def test_folds_keep_their_numbers(folder: Path, cells: list[str]) -> None:
    lines = "".join(f"{name},3,{fold}\n" for name, fold in zip(NAMES, cells, strict=False))
    assert read_table(write(folder, f"image,rating,fold\n{lines}")).folds == [int(float(cell)) for cell in cells]


def test_parquet_reads_as_csv_does(folder: Path) -> None:
    columns = {"Image": ["a.jpg", "b.jpg"], "rating": [3.5, 2.0], "group": pa.array(["x", None]), "fold": [1, 2]}
    pq.write_table(pa.table({**columns, "picture": [b"\xff", b"\xd8"]}), folder / "ratings.parquet")
    table = read_table(folder / "ratings.parquet")
    assert (names(table), table.rated.ratings.tolist()) == (["a.jpg", "b.jpg"], [3.5, 2.0])
    assert (table.rated.groups, table.folds) == (["x", ""], [1, 2])
    assert table.places == ["ratings.parquet row 0", "ratings.parquet row 1"]


# --- what is refused, and how it is named ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ratings.csv is empty; expected a line that names the columns"),
        ("\n \n", "ratings.csv has no text"),
        ("image,rating\n", "ratings.csv lists no picture"),
        (
            "a.jpg,3.5\nb.jpg,2\n",
            "ratings.csv:1: expected names of columns, at least image and rating, got 'a.jpg,3.5'",
        ),
        (
            "image,beauty\na.jpg,3\n",
            "ratings.csv:1: no column for the rating; expected rating or score, got image, beauty",
        ),
        ("picture,rating\na.jpg,3\n", "ratings.csv:1: no column for the image; expected image or file or"),
        ("image,file,rating\na.jpg,a.jpg,3\n", "ratings.csv:1: several columns for the image (image and file)"),
        ("image,rating\na.jpg,nan\n", "ratings.csv:2: the rating is nan; expected a number"),
        ("image,rating\na.jpg,inf\n", "ratings.csv:2: the rating is inf; expected a number"),
        ("image,rating\na.jpg,\n", "ratings.csv:2: no rating"),
        ("image,rating\na.jpg\n", "ratings.csv:2: no rating"),
        ("image,rating\n,3\n", "ratings.csv:2: no picture's name"),
        (f"image,rating\n{'long' * 2000},3\n", " is missing; 1 of 1 pictures are missing"),
        ("image,rating\nimages,3\n", "images is missing"),
        ("image,rating\na.jpg,high\n", "ratings.csv:2: the rating is 'high'; expected a number"),
        ("image,rating\na.jpg,1.234,5\n", "ratings.csv:2: 3 cells, the first line names 2 columns; if a comma is the"),
        ("image,rating\na.jpg,3,5\n", "if a comma is the decimal sign, separate cells by semicolons"),
        ("image,rating\nC:\\faces\\a.jpg,3\n", "ratings.csv:2: C:\\faces\\a.jpg is an absolute path of Windows"),
        ("image,rating\n\\\\nas\\faces\\a.jpg,3\n", "is an absolute path of Windows; give one relative to the table"),
        ("image,rating\na.jpg,3\na.jpg,4\n", "a.jpg is at ratings.csv:2 already; give each picture its mean rating"),
        ("image,rating\na.jpg,3\n./a.jpg,4\n", "ratings.csv:3: "),
        ("image,rating,split\na.jpg,3,holdout\n", "ratings.csv:2: the split is 'holdout'; expected train, val or test"),
        ("image,rating,split\na.jpg,3,\n", "ratings.csv:2: the split is ''; expected train, val or test"),
        ("image,rating,fold\na.jpg,3,first\n", "ratings.csv:2: the fold is 'first'; expected a whole number such as 1"),
        ("image,rating,fold\na.jpg,3,-1\n", "ratings.csv:2: the fold is '-1'"),
        ('image,rating\n"a.jpg,3\n', "ratings.csv:2: not a table's line"),
        (b"image,rating,group\na.jpg,3,x\nb.jpg,3,\xe9\n", "ratings.csv:3: not text in UTF-8; save the table as UTF-8"),
        ("image,rating\na.jpg,3\n".encode("utf-16"), "ratings.csv is text in UTF-16; save it as UTF-8"),
    ],
)
def test_a_wrong_table_is_refused_with_its_line(folder: Path, text: str | bytes, message: str) -> None:
    assert message in problem(folder, text)


def test_missing_pictures_are_counted_and_the_first_ten_named(folder: Path) -> None:
    lines = "".join(f"gone{number}.jpg,3\n" for number in range(14))
    first, *listed, last = problem(folder, f"image,rating\na.jpg,3\n{lines}").splitlines()
    assert "14 lines are wrong; 14 of 15 pictures are missing (paths are relative to the table's folder)" in first
    assert [line.split(": ")[0].strip() for line in listed] == [f"ratings.csv:{line}" for line in range(3, 13)]
    assert listed[0].endswith("gone0.jpg is missing")
    assert last == "  and 4 more"


def test_lines_that_are_wrong_in_different_ways_come_in_one_error(folder: Path) -> None:
    text = "image,rating,split\na.jpg,x,train\nb.jpg,3,train\ngone.jpg,3,val\nc.jpg,3,other\n"
    _, *listed = problem(folder, text).splitlines()
    assert [line.split(": ")[0].strip() for line in listed] == ["ratings.csv:2", "ratings.csv:4", "ratings.csv:5"]


def test_a_line_is_where_its_row_begins(folder: Path) -> None:
    text = 'image,rating,note\na.jpg,3,"two\nlines"\nb.jpg,x,\n'
    assert problem(folder, text).startswith("ratings.csv:4: the rating is 'x'")


@pytest.mark.parametrize("name", ["missing.csv", "ratings.xlsx"])
def test_what_is_no_table_by_its_name_is_refused(folder: Path, name: str) -> None:
    (folder / "ratings.xlsx").write_bytes(b"PK")
    with pytest.raises(UsageError, match=r"\.csv, \.tsv, \.txt, \.parquet"):
        read_table(folder / name)


def test_parquet_without_pyarrow_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"image": ["a.jpg"], "rating": [3.0]}), folder / "ratings.parquet")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "pyarrow" else find(name, *rest)
    )
    with pytest.raises(MDNetError, match=r"pyarrow is not installed; it comes with the extra mdnet\[parquet\]"):
        read_table(folder / "ratings.parquet")


def test_a_damaged_parquet_file_is_refused(folder: Path) -> None:
    assert "is not a Parquet file that can be read" in problem(folder, b"PAR1 and no more", "ratings.parquet")


def test_pictures_inside_parquet_are_refused(folder: Path) -> None:
    pictures = [{"bytes": b"\xff\xd8", "path": "a.jpg"}]
    pq.write_table(pa.table({"image": pictures, "rating": [3.0]}), folder / "ratings.parquet")
    with pytest.raises(MDNetError, match=r"column image holds struct<.*; expected text or numbers"):
        read_table(folder / "ratings.parquet")


def test_an_empty_cell_of_parquet_is_no_rating(folder: Path) -> None:
    pq.write_table(pa.table({"image": ["a.jpg", "b.jpg"], "rating": [3.0, None]}), folder / "ratings.parquet")
    with pytest.raises(MDNetError, match=r"^ratings.parquet row 1: no rating$"):
        read_table(folder / "ratings.parquet")


# --- the scale ---


def test_ratings_off_the_scale_are_named_with_a_scale_that_fits(folder: Path) -> None:
    table = read_table(write(folder, "image,rating\na.jpg,3\nb.jpg,7.5\nc.jpg,9.25\n"))
    table.check_scale(Scale(1, 10), "")
    with pytest.raises(MDNetError) as caught:
        table.check_scale(Scale(1, 5), "give --scale {fitting}")
    first, *listed = str(caught.value).splitlines()
    assert first.endswith("2 lines are wrong; ratings reach from 3 to 9.25; give --scale 1 10")
    assert listed == [
        "  ratings.csv:3: the rating is 7.5, off the scale 1 to 5",
        "  ratings.csv:4: the rating is 9.25, off the scale 1 to 5",
    ]


@pytest.mark.parametrize(
    ("low", "high", "scale"),
    [
        (0.1, 0.9, (0, 1)),
        (1.2, 4.9, (1, 5)),
        (1, 6.5, (1, 7)),
        (1, 9.6, (1, 10)),
        (0, 9.6, (0, 10)),
        (2, 87, (0, 100)),
        (-3.5, 3.2, (-4, 4)),
        (120, 180.5, (120, 181)),
        (200, 200, (200, 201)),
    ],
)
def test_the_scale_suggested_is_a_usual_one_that_holds_all(low: float, high: float, scale: tuple[int, int]) -> None:
    assert fitting_scale(low, high) == scale
