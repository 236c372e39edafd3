"""A table's file → its cells as text, each row with its place for messages. CSV and Parquet come out alike.

A CSV file is UTF-8, with or without a byte-order mark; commas, semicolons or tabs stand between its cells, whichever
gives the first line the most known names.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdnet_engines.errors import MDNetError, UsageError, first_line, printable, require

CSV_SUFFIXES = (".csv", ".tsv", ".txt")
SUFFIXES = (*CSV_SUFFIXES, ".parquet")
SHOWN = 10
"""Wrong lines in a message, before it says how many more there are."""

_DELIMITERS = (",", ";", "\t")


@dataclass(frozen=True)
class Row:
    """One row; `place` is the file's name with a line (CSV, from 1) or with a row (Parquet, from 0)."""

    place: str
    cells: list[str]


@dataclass(frozen=True)
class Cells:
    """A table as text: the names in its header, in lower case, and its rows."""

    header: list[str]
    rows: list[Row]
    place: str
    """Of the header."""


def read_cells(file: Path, known: Collection[str]) -> Cells:
    """Read a table.

    Args:
        known: names of columns by which a header, and what stands between its cells, is recognised.

    Raises:
        UsageError: no such file, or its name is not that of a table.
        MDNetError: it is empty, not UTF-8 or not a table, has rows longer than its header, or Parquet without pyarrow.
    """
    if not file.is_file():
        raise UsageError(f"{printable(file)}: no such file; expected a table of ratings ({', '.join(SUFFIXES)})")
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{printable(file)} is not a table of ratings by its name; expected {', '.join(SUFFIXES)}")
    if file.stat().st_size == 0:
        raise MDNetError(f"{printable(file)} is empty; expected a line that names the columns, then a line a picture")
    return _read_parquet(file, known) if suffix == ".parquet" else _read_csv(file, known)


def wrong_lines(file: Path, problems: Sequence[tuple[str, str]], note: str = "") -> MDNetError:
    """One error for all that is wrong: the first lines by place and problem, how many more, and what to do."""
    note = f"; {note}" if note else ""
    if len(problems) == 1:
        return MDNetError(f"{problems[0][0]}: {problems[0][1]}{note}")
    lines = [f"{printable(file)}: {len(problems)} lines are wrong{note}"]
    lines += [f"  {place}: {problem}" for place, problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  and {len(problems) - SHOWN} more")
    return MDNetError("\n".join(lines))


def _read_csv(file: Path, known: Collection[str]) -> Cells:
    text, name = _decode(file), printable(file.name)
    first = next((line for line in text.splitlines() if line.strip()), "")
    if not first:
        raise MDNetError(
            f"{printable(file)} has no text; expected a line that names the columns, then a line a picture"
        )
    delimiter = max(_DELIMITERS, key=lambda mark: _fit(first, mark, known))
    header, rows, problems, header_place = None, list[Row](), list[tuple[str, str]](), ""
    # newline="" keeps line ends for the reader, which knows them inside quotes
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    start = 1
    try:
        for cells in lines:
            place, start = f"{name}:{start}", lines.line_num + 1
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if header is None:
                header, header_place = [cell.lower() for cell in cells], place
            elif len(cells) > len(header) and any(cells[len(header) :]):
                comma = "; if a comma is the decimal sign, separate cells by semicolons" if delimiter == "," else ""
                problems.append((place, f"{len(cells)} cells, the first line names {len(header)} columns{comma}"))
            else:
                cells += [""] * (len(header) - len(cells))
                rows.append(Row(place, cells[: len(header)]))
    except csv.Error as error:
        raise MDNetError(f"{name}:{start}: not a table's line ({error}); is a quotation mark never closed?") from None
    if problems:
        raise wrong_lines(file, problems)
    assert header is not None  # there is a line with text
    return Cells(header, rows, header_place)


def _fit(line: str, delimiter: str, known: Collection[str]) -> tuple[int, int]:
    """How many cells of the first line are known names, and how many there are."""
    cells = [cell.strip().strip('"').lower() for cell in line.split(delimiter)]
    return sum(cell in known for cell in cells), len(cells)


def _decode(file: Path) -> str:
    data = file.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise MDNetError(f"{printable(file)} is text in UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise MDNetError(f"{printable(file.name)}:{line}: not text in UTF-8; save the table as UTF-8") from None


def _read_parquet(file: Path, known: Collection[str]) -> Cells:
    require("pyarrow", "parquet")
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = printable(file.name)
    try:
        with pq.ParquetFile(file) as opened:
            fields = [field for field in opened.schema_arrow if _is_plain(field.type)]
            other = [field for field in opened.schema_arrow if not _is_plain(field.type)]
            columns = opened.read([field.name for field in fields]).columns
    except (pa.ArrowException, OSError) as error:
        raise MDNetError(f"{printable(file)} is not a Parquet file that can be read ({first_line(error)})") from None
    for field in other:
        if field.name.strip().lower() in known:
            raise MDNetError(f"{name}: column {printable(field.name)} holds {field.type}; expected text or numbers")
    texts = [["" if cell is None else str(cell).strip() for cell in column.to_pylist()] for column in columns]
    rows = [Row(f"{name} row {row}", list(cells)) for row, cells in enumerate(zip(*texts, strict=True))]
    return Cells([field.name.strip().lower() for field in fields], rows, name)


def _is_plain(kind: Any) -> bool:
    """Whether a Parquet column of this type holds text or numbers: no bytes of pictures, no lists, no structs."""
    import pyarrow as pa

    return not (pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
