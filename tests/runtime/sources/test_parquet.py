"""Images out of Parquet columns. What is written as Parquet is in test_writers.py."""

from __future__ import annotations

import io
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mdnet_engines.errors import MDNetError, UsageError
from mdnet_rt.images.preprocess import ImageError
from mdnet_rt.sources import archives
from mdnet_rt.sources.archives import read_archive
from mdnet_rt.sources.entry import Entry
from mdnet_rt.sources.locations import read_locations
from mdnet_rt.sources.parquet import read_images

IMAGES = [random.Random(i).randbytes(50 * i) for i in range(40)]
HUGGING_FACE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def parquet(options: dict[str, Any] | None = None, **columns: pa.Array) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream, **options or {})
    return stream.getvalue()


def images(data: bytes, column: str | None = None) -> list[bytes | None]:
    return list(read_images(io.BytesIO(data), column))


def entries(data: bytes) -> list[Entry]:
    return list(read_archive("a.parquet", lambda: io.BytesIO(data)))


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"row_group_size": 7}, {"use_dictionary": True, "compression": "zstd"}, {"data_page_version": "2.0"}],
    ids=str,
)
def test_every_cell_comes_in_order_nulls_too(kind: pa.DataType, options: dict[str, Any]) -> None:
    cells = [*IMAGES, None, *IMAGES[:3], None]
    assert images(parquet(options, pixels=pa.array(cells, kind))) == cells


def test_hugging_faces_struct_is_read_by_its_bytes() -> None:
    cells = [{"bytes": b"1", "path": "a.jpg"}, None, {"bytes": None, "path": "b.jpg"}, {"bytes": b"2", "path": None}]
    assert images(parquet(image=pa.array(cells, HUGGING_FACE))) == [b"1", None, None, b"2"]


def test_each_row_is_an_entry_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_BYTES", 4)
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").write_bytes(parquet(image=pa.array([b"1", None, b"four", b"five!"])))
    found = [(each.name, each.data) for each in read_locations(["a.parquet"])]
    assert [name for name, _ in found] == [f"a.parquet::{row}" for row in range(4)]
    assert [str(data) if isinstance(data, ImageError) else data for _, data in found] == [
        b"1",
        "no image in this row",
        b"four",
        "5 bytes exceed the limit of 4",
    ]


TWO = {"left": pa.array([b"l"]), "right": pa.array([b"r"]), "label": pa.array([3])}


@pytest.mark.parametrize("column", ["left", "right"])
def test_of_several_columns_the_one_named_is_read(column: str) -> None:
    assert images(parquet(**TWO), column) == [column[0].encode()]


def test_of_several_columns_the_one_called_image_is_read() -> None:
    assert images(parquet(**TWO, image=pa.array([b"i"]))) == [b"i"]
    assert images(parquet(**TWO, image=pa.array([b"i"])), "left") == [b"l"]


def test_a_column_whose_name_only_begins_the_same_is_not_taken_for_it() -> None:
    data = parquet(**{"image.small": pa.array([b"small"]), "image": pa.array([b"image"]), "a.b": pa.array([b"ab"])})
    assert images(data) == [b"image"]
    assert images(data, "image.small") == [b"small"]
    assert images(data, "a.b") == [b"ab"]


@pytest.mark.parametrize(
    ("columns", "column", "message"),
    [
        (TWO, None, "the columns left, right may all hold images; name one with --column"),
        (TWO, "centre", "no column centre; the columns are left, right, label"),
        (TWO, "label", "the column label is of type int64, which holds no images"),
        ({"label": pa.array([3])}, None, r"no column holds images; name one with --column \(the columns are label\)"),
        ({"image": pa.array(["a.jpg"])}, None, "no column holds images"),
        ({"image": pa.array([{"path": "a.jpg"}])}, None, "no column holds images"),
        ({"image": pa.array([{"bytes": {"bytes": b"x"}}])}, None, "no column holds images"),
        ({"image": pa.array([[b"x"]])}, None, "no column holds images"),
        ({"image": pa.array([b"x"]).dictionary_encode()}, None, "no column holds images"),
    ],
)
def test_a_column_that_cannot_be_chosen_is_told_in_the_files_own_row(
    columns: dict[str, pa.Array], column: str | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        images(parquet(**columns), column)
    (entry,) = read_archive("a.parquet", lambda: io.BytesIO(parquet(**columns)), column)
    assert entry.name == "a.parquet"
    assert re.match(message, str(entry.data))


def test_a_file_without_rows_has_no_images() -> None:
    assert entries(parquet(image=pa.array([], pa.binary()))) == []


def test_a_file_cut_anywhere_is_a_row_that_says_so() -> None:
    data = parquet({"row_group_size": 10}, image=pa.array(IMAGES))
    for cut in [*range(12), *range(12, len(data), len(data) // 50), *range(len(data) - 12, len(data))]:
        (entry,) = entries(data[:cut])  # always: the end of a Parquet file says where all else is
        assert entry.name == "a.parquet"
        assert str(entry.data).startswith("damaged Parquet file (")
        assert "\n" not in str(entry.data)


def test_a_damaged_page_ends_the_file_after_what_is_whole() -> None:
    data = bytearray(parquet({"row_group_size": 10, "compression": "zstd"}, image=pa.array(IMAGES)))
    page = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(2).column(0).data_page_offset
    data[page : page + 200] = bytes(200)  # row groups end at 10 and 20, batches that are read at 16
    found = entries(bytes(data))
    assert [each.data for each in found[:20]] == IMAGES[:20]
    assert str(found[-1].data).startswith("damaged Parquet file (")
    assert str(found[-1].data).endswith(f"(after {len(found) - 1} images)")
    assert len(found) == 21


@pytest.mark.parametrize("data", [b"PAR1", b"PAR1" * 3, b"text" * 100, b"PAR1\xff\xff\xff\x7fPAR1"])
def test_what_is_not_parquet_is_one_error(data: bytes) -> None:
    with pytest.raises(MDNetError, match="damaged Parquet file"):
        images(data)
