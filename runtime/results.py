"""One row per image, and the three ways to write rows: a table for people, CSV and JSON Lines for programs."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from mdnet_engines.console import INTERRUPTED, explain_os_error
from mdnet_engines.errors import MDNetError, UsageError, printable

Format = Literal["table", "csv", "jsonl"]
FORMATS: tuple[Format, ...] = ("table", "csv", "jsonl")
PARTIAL = ".partial"


@dataclass(frozen=True)
class Result:
    """What became of one image: a score on the bundle's rating scale, or the reason why there is none."""

    path: str
    score: float | None
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the image was scored."""
        return self.error is None


@dataclass
class Summary:
    """Counts and score range of a run, row by row."""

    scored: int = 0
    failed: int = 0
    low: float = float("inf")
    high: float = float("-inf")

    def add(self, result: Result) -> None:
        """Count one row."""
        if result.score is None:
            self.failed += 1
            return
        self.scored += 1
        self.low, self.high = min(self.low, result.score), max(self.high, result.score)

    def line(self, seconds: float) -> str:
        """The run in one line; `seconds` is what reading and scoring took."""
        images = self.scored + self.failed
        text = f"{images} image{'' if images == 1 else 's'}: {self.scored} scored, {self.failed} failed, "
        text += f"{seconds:.1f} s, {images / max(seconds, 1e-9):.1f} images/s"
        return text + (f"; scores {self.low:.1f} to {self.high:.1f}" if self.scored else "")


class RunInterruptedError(MDNetError):
    """Ctrl-C while a file was being written; the message says where the rows so far are."""

    exit_code = INTERRUPTED


class Writer(Protocol):
    """Takes rows in order. `rows` counts those that have reached the stream."""

    rows: int

    def write(self, result: Result) -> None:
        """Take one row."""

    def finish(self) -> None:
        """Write what is still held."""


class CsvWriter:
    """`path,score,error` with a header. A name that isn't UTF-8 is written as the bytes it has on the disk."""

    def __init__(self, stream: BinaryIO):
        self.rows = 0
        self._stream = stream
        self._put(["path", "score", "error"])

    def write(self, result: Result) -> None:
        score = "" if result.score is None else f"{result.score:.4f}"
        self._put([result.path, score, result.error or ""])
        self.rows += 1

    def finish(self) -> None:
        pass

    def _put(self, fields: list[str]) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\r\n").writerow(fields)  # so that it quotes either character in a name
        _put(self._stream, line.getvalue().removesuffix("\r\n").encode("utf-8", "surrogateescape") + b"\n")


class JsonlWriter:
    """One JSON object a line, ASCII only. A byte that isn't UTF-8 is `\\udcXX`, which `os.fsencode` turns back."""

    def __init__(self, stream: BinaryIO):
        self.rows = 0
        self._stream = stream

    def write(self, result: Result) -> None:
        score = None if result.score is None else round(result.score, 6)
        line = json.dumps({"path": result.path, "score": score, "error": result.error}, allow_nan=False)
        _put(self._stream, line.encode("ascii") + b"\n")
        self.rows += 1

    def finish(self) -> None:
        pass


class TableWriter:
    """A table, printed when all rows are there, since column widths depend on all of them."""

    def __init__(self, stream: BinaryIO):
        self.rows = 0
        self._stream = stream
        self._held: list[Result] = []

    def write(self, result: Result) -> None:
        self._held.append(result)

    def finish(self) -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table("image", "score", "problem", show_edge=False, pad_edge=False)
        table.columns[0].overflow = table.columns[2].overflow = "fold"
        table.columns[1].justify = "right"
        for result in self._held:
            score = "" if result.score is None else f"{result.score:.4f}"
            # Text, not str: rich would read `[...]` in a name as markup.
            table.add_row(Text(printable(result.path)), score, Text(printable(result.error or ""), style="red"))
        if self._stream.isatty():
            Console(file=sys.stdout).print(table)
        else:
            plain = io.StringIO()
            Console(file=plain, width=10_000, color_system=None).print(table)  # wide: no name is folded
            _put(self._stream, "".join(f"{line.rstrip()}\n" for line in plain.getvalue().splitlines()).encode())
        self.rows = len(self._held)


_WRITERS: dict[Format, Any] = {"table": TableWriter, "csv": CsvWriter, "jsonl": JsonlWriter}


def choose_format(output: Path | None, named: Format | None, *, terminal: bool) -> Format:
    """The format named; else what the output file's suffix says; else a table on a terminal and CSV in a pipe.

    Raises:
        UsageError: an output file whose suffix says nothing, and no format named.
    """
    if named:
        return named
    if output is None:
        return "table" if terminal else "csv"
    suffix = output.suffix.lower()
    if suffix == ".csv":
        return "csv"
    if suffix == ".jsonl":
        return "jsonl"
    raise UsageError(f"-o {printable(output)}: expected a name ending in .csv or .jsonl, or --format beside it")


def check_output(output: Path) -> None:
    """Refuse, before any work is done, an output file that could not be written at its end.

    Raises:
        UsageError: its folder is missing or may not be written to, or a folder has its name.
    """
    target = _target(output)
    if target.is_dir():
        raise UsageError(f"-o {printable(output)} is a folder; give the file to write")
    if not target.parent.is_dir():
        raise UsageError(f"-o {printable(output)}: there is no folder {printable(target.parent)}; make it first")
    # Replacing takes a writable folder only, but a read-only file was made so for a reason. A device is its own place.
    needed = [target] if target.exists() else []
    needed += [] if _is_special(target) else [target.parent]
    for place in needed:
        if not os.access(place, os.W_OK):
            raise UsageError(f"-o {printable(output)}: no permission to write to {printable(place)}")


@contextlib.contextmanager
def open_writer(format: Format, output: Path | None = None) -> Iterator[Writer]:
    """Give a writer to `output`, or to standard output.

    A file is written as `<output>.partial`, row by row, and takes its name when the block ends well. If the block
    fails, the partial file stays as long as there are rows in it, and the error says so. A link is followed; a device
    or a FIFO is written to directly, since a rename would put a file in its place.

    Raises:
        MDNetError: what the block raised, with the place of the rows so far; also for a full disk and the like.
        RunInterruptedError: Ctrl-C, likewise.
    """
    if output is None:
        yield from _finished(_WRITERS[format](sys.stdout.buffer))
        return
    target = _target(output)
    if _is_special(target):
        with target.open("wb") as stream:
            yield from _finished(_WRITERS[format](stream))
        return
    partial = target.with_name(target.name + PARTIAL)
    writer: Writer | None = None
    try:
        with partial.open("wb") as stream:
            writer = _WRITERS[format](stream)
            yield from _finished(writer)
            os.fsync(stream.fileno())
        partial.replace(target)
    except (Exception, KeyboardInterrupt) as error:
        if writer is None or not writer.rows:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        raise _with_place(error, partial, writer.rows) from error


def _finished(writer: Writer) -> Iterator[Writer]:
    try:
        yield writer
    finally:
        writer.finish()  # after a failure too: a table shows the rows that there are


def _with_place(error: BaseException, partial: Path, rows: int) -> MDNetError:
    place = f"the {rows} {'row so far is' if rows == 1 else 'rows so far are'} in {printable(partial)}"
    if isinstance(error, KeyboardInterrupt):
        return RunInterruptedError(f"interrupted; {place}")
    if isinstance(error, OSError):
        return MDNetError(f"{explain_os_error(error)}; {place}")
    if isinstance(error, MDNetError):
        return type(error)(f"{error}; {place}")
    return MDNetError(f"unexpected {type(error).__name__}: {error}; {place}")


def _target(output: Path) -> Path:
    return Path(os.path.realpath(output))  # not Path.resolve(), which raises on a loop of links


def _is_special(path: Path) -> bool:
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def _put(stream: BinaryIO, line: bytes) -> None:
    # Flushed row by row: a reader of the pipe sees each at once, and a killed run loses none.
    stream.write(line)
    stream.flush()
