"""Rows as bytes, and bytes as rows: CSV and JSON Lines, each row whole on the disk before the next one begins.

A run that was killed leaves at most one row that is cut; `read_rows` stops before it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import BinaryIO, Literal, NamedTuple

from mdnet_engines.errors import MDNetError, first_line
from mdnet_rt.rows.result import Result, Stamp

RowFormat = Literal["csv", "jsonl"]
COLUMNS = ("path", "score", "status", "reason", "width", "height", "model", "bundle")


class Row(NamedTuple):
    """A row read back, and the position in the file where the next one begins."""

    result: Result
    stamp: Stamp
    end: int


def header(format: RowFormat) -> bytes:
    """What a file begins with."""
    return _csv_line(list(COLUMNS)) if format == "csv" else b""


def encode(format: RowFormat, result: Result, stamp: Stamp) -> bytes:
    r"""One row.

    CSV writes a name that isn't UTF-8 as the bytes it has on the disk; JSON Lines, ASCII only, writes such a byte as
    `\udcXX`, which `os.fsencode` turns back.
    """
    if format == "jsonl":
        return json.dumps(as_dict(result, stamp), allow_nan=False).encode("ascii") + b"\n"
    score = "" if result.score is None else f"{result.score:.4f}"
    size = ["" if side is None else str(side) for side in (result.width, result.height)]
    return _csv_line([result.path, score, result.status, result.reason or "", *size, stamp.model, stamp.bundle])


def as_dict(result: Result, stamp: Stamp) -> dict[str, str | float | int | None]:
    """Column → value."""
    return {
        "path": result.path,
        "score": None if result.score is None else round(result.score, 6),
        "status": result.status,
        "reason": result.reason,
        "width": result.width,
        "height": result.height,
        "model": stamp.model,
        "bundle": stamp.bundle,
    }


def read_rows(format: RowFormat, stream: BinaryIO) -> Iterator[Row]:
    """The rows of a file that `encode` made, up to one that is cut.

    Raises:
        MDNetError: the file has something else in it.
    """
    return _read_csv(stream) if format == "csv" else _read_jsonl(stream)


def _read_csv(stream: BinaryIO) -> Iterator[Row]:
    first, columns = stream.readline(), header("csv")
    if first != columns:
        if not columns.startswith(first):
            raise _foreign(f"its columns are not {','.join(COLUMNS)}")
        return
    end, whole = len(first), True
    csv.field_size_limit(2**31 - 1)  # of the whole process; a name in a list may be longer than the usual 128 KiB

    def lines() -> Iterator[str]:
        nonlocal end, whole
        for line in stream:
            end, whole = end + len(line), line.endswith(b"\n")
            yield line.decode("utf-8", "surrogateescape")

    try:
        for number, fields in enumerate(csv.reader(lines()), 1):
            # A name with a line break in it may be cut right behind the break; such a row lacks columns.
            if not whole or len(fields) != len(COLUMNS):
                if len(fields) > len(COLUMNS) or not _at_end(stream):
                    raise _foreign(f"row {number} has {len(fields)} columns of {len(COLUMNS)}")
                return
            yield _row(dict(zip(COLUMNS, [field or None for field in fields], strict=True)), end)
    except csv.Error as error:
        raise _foreign(first_line(error)) from error


def _read_jsonl(stream: BinaryIO) -> Iterator[Row]:
    end = 0
    for line in stream:
        if not line.endswith(b"\n"):
            return
        end += len(line)
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _foreign(f"a line is not JSON ({first_line(error)})") from error
        if not isinstance(fields, dict) or set(fields) != set(COLUMNS):
            raise _foreign(f"a line does not have {', '.join(COLUMNS)}")
        yield _row(fields, end)


def _row(fields: dict[str, str | None], end: int) -> Row:
    try:
        score, width, height = (fields[name] for name in ("score", "width", "height"))
        if not isinstance(fields["path"] or "", str):
            raise TypeError(f"a path is a {type(fields['path']).__name__}")
        result = Result(
            path=fields["path"] or "",
            score=None if score is None else float(score),
            status=str(fields["status"]),
            reason=fields["reason"],
            width=None if width is None else int(width),
            height=None if height is None else int(height),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise _foreign(first_line(error)) from error
    return Row(result, Stamp(str(fields["model"]), str(fields["bundle"])), end)


def _at_end(stream: BinaryIO) -> bool:
    return not stream.read(1)


def _foreign(what: str) -> MDNetError:
    return MDNetError(f"not an mdnet-rt results file: {what}")


def _csv_line(fields: list[str]) -> bytes:
    line = io.StringIO()
    csv.writer(line, lineterminator="\r\n").writerow(fields)  # so that it quotes either character in a name
    return line.getvalue().removesuffix("\r\n").encode("utf-8", "surrogateescape") + b"\n"
