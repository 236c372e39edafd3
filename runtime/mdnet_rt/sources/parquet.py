"""Rows as a Parquet file, and images out of a Parquet column. Needs pyarrow (extra `parquet`)."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from mdnet_engines.errors import MDNetError, UsageError, first_line
from mdnet_engines.system.atomic import new_file

_ROWS_IN_A_GROUP = 65_536
_ROWS_READ_AT_ONCE = 16
"""Few, since each holds the bytes of an image."""
_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        ("score", pa.float32()),
        pa.field("status", pa.string(), nullable=False),
        ("reason", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        pa.field("model", pa.string(), nullable=False),
        pa.field("bundle", pa.string(), nullable=False),
    ]
)


def write_parquet(rows: Path, target: Path) -> None:
    r"""Turn a file of JSON Lines rows into `target`, which appears whole or not at all. One process at a time may.

    Parquet's strings are UTF-8: a byte of a name that is not becomes `\udcXX` in letters.
    """
    # Only one run writes this file; under one name, what a killed run has left goes with the next.
    with new_file(target, scratch=target.with_name(f".{target.name}.scratch")) as scratch:
        with rows.open("rb") as lines, pq.ParquetWriter(scratch, _SCHEMA, compression="zstd") as writer:
            while group := [_row(line) for line in itertools.islice(lines, _ROWS_IN_A_GROUP)]:
                writer.write_batch(pa.RecordBatch.from_pylist(group, _SCHEMA))
        scratch.chmod(rows.stat().st_mode & 0o777)


def read_images(stream: BinaryIO, column: str | None = None) -> Iterator[bytes | None]:
    """The cells of an image column, row by row: encoded image files, None where there is none.

    A column is `binary`, or a struct with a field `bytes` (as Hugging Face's data sets have it). Without a name: the
    one called `image`, else the only one of such a type.

    Raises:
        UsageError: no such column, or several.
        MDNetError: the file is damaged.
    """
    try:
        file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=2**20)
        name = _choose(file.schema_arrow, column)
        groups = range(file.num_row_groups)  # one at a time, so that a damaged one takes nothing of the one before it
        read = functools.partial(file.iter_batches, _ROWS_READ_AT_ONCE, columns=[name], use_threads=False)
        for batch in itertools.chain.from_iterable(read(row_groups=[group]) for group in groups):
            for cell in batch.column(name):  # not the first: of "image", columns called "image.…" are read too
                value = cell.as_py()
                yield value["bytes"] if isinstance(value, dict) else value
    except (pa.ArrowException, OSError) as error:
        raise MDNetError(f"damaged Parquet file ({first_line(error)[:200]})") from error


def _choose(schema: pa.Schema, column: str | None) -> str:
    images = [field.name for field in schema if _holds_images(field.type)]
    if column is not None:
        if column in images:
            return column
        if column in schema.names:
            raise UsageError(f"the column {column} is of type {schema.field(column).type}, which holds no images")
        raise UsageError(f"no column {column}; the columns are {', '.join(schema.names)}")
    if "image" in images:
        return "image"
    if len(images) != 1:
        found = f"the columns {', '.join(images)} may all hold images" if images else "no column holds images"
        raise UsageError(f"{found}; name one with --column (the columns are {', '.join(schema.names)})")
    return images[0]


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _row(line: bytes) -> dict[str, Any]:
    row = json.loads(line)
    return {k: v.encode("utf-8", "backslashreplace").decode() if isinstance(v, str) else v for k, v in row.items()}
