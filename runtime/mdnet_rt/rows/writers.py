"""Where rows go: standard output, or a file that has its name only when it is whole, and that can be continued."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

from mdnet_engines.console import INTERRUPTED, explain_os_error
from mdnet_engines.errors import MDNetError, UsageError, printable, require
from mdnet_engines.system.output_path import check_writable, descriptor_of, is_special, open_special
from mdnet_rt.rows.encoding import RowFormat, encode, header, read_rows
from mdnet_rt.rows.result import Result, Stamp

try:
    import fcntl
except ImportError:  # not on Windows, where a file that is open can't be opened for writing again anyway
    fcntl = None  # type: ignore[assignment]

Format = Literal["table", "csv", "jsonl", "parquet"]
FORMATS: tuple[Format, ...] = ("table", "csv", "jsonl", "parquet")
PARTIAL = ".partial"
_SUFFIXES: dict[str, Format] = {".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}


class RunInterruptedError(MDNetError):
    """A run was interrupted before all images were scored; the message says where the rows so far are."""

    exit_code = INTERRUPTED


class Writer(Protocol):
    """Takes rows in order. `rows` counts those that have reached the stream, of earlier runs too."""

    rows: int

    def write(self, result: Result) -> None:
        """Take one row."""

    def finish(self) -> None:
        """Write what is still held."""

    def earlier(self) -> Iterator[Result]:
        """The rows that an interrupted run had left."""


class RowWriter:
    """CSV or JSON Lines. Each row is flushed: a reader of the pipe sees it at once, and a killed run loses none."""

    def __init__(self, stream: BinaryIO, stamp: Stamp, format: RowFormat, *, rows: int = 0, file: Path | None = None):
        self.rows = rows
        self._stream, self._stamp, self._format = stream, stamp, format
        self._earlier = (file, rows) if file and rows else None
        if not rows:
            _put(stream, header(format))

    def write(self, result: Result) -> None:
        _put(self._stream, encode(self._format, result, self._stamp))
        self.rows += 1

    def finish(self) -> None:
        pass

    def earlier(self) -> Iterator[Result]:
        if self._earlier is None:
            return
        file, rows = self._earlier
        with file.open("rb") as stream:
            for row in islice(read_rows(self._format, stream), rows):
                yield row.result


class TableWriter:
    """A table for people, printed after the last row, since column widths depend on all rows."""

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
            table.add_row(Text(printable(result.path)), score, Text(printable(result.reason or ""), style="red"))
        if self._stream.isatty():
            Console(file=sys.stdout).print(table)
        else:
            plain = io.StringIO()
            Console(file=plain, width=10_000, color_system=None).print(table)  # wide: no name is folded
            _put(self._stream, "".join(f"{line.rstrip()}\n" for line in plain.getvalue().splitlines()).encode())
        self.rows = len(self._held)

    def earlier(self) -> Iterator[Result]:
        return iter(())


def choose_format(output: Path | None, named: Format | None, *, terminal: bool) -> Format:
    """The format named; else what the output file's suffix says; else a table on a terminal and CSV in a pipe.

    Raises:
        UsageError: an output file whose suffix says nothing, and no format named; Parquet without a file.
    """
    if named == "parquet" and output is None:
        raise UsageError("--format parquet needs a file: -o scores.parquet")
    if named:
        return named
    if output is None:
        return "table" if terminal else "csv"
    if format := _SUFFIXES.get(output.suffix.lower()):
        return format
    *most, last = _SUFFIXES
    names = f"{', '.join(most)} or {last}"
    raise UsageError(f"-o {printable(output)}: expected a name ending in {names}, or --format")


def check_output(output: Path, format: Format, *, resume: bool = False) -> None:
    """Refuse, before any work is done, an output file that could not be written at its end.

    Raises:
        UsageError: its folder is missing or may not be written to, a folder has its name, or it can't be resumed.
        MDNetError: Parquet without pyarrow.
    """
    if format == "parquet":
        require("pyarrow", "parquet")
    target = _target(output)
    if "://" in os.fspath(output) or ":/" in os.fspath(output):
        raise UsageError(f"-o {printable(output)} is a URL; rows are written to a local file")
    if is_special(output) and not target.is_dir():
        _check_special(output, format, resume)
        return
    check_writable(target, f"-o {printable(output)}")
    if resume and format == "table":
        raise UsageError("--resume continues .csv, .jsonl and .parquet files; a table can't be continued")


def _check_special(output: Path, format: Format, resume: bool) -> None:
    """Refuse what rows can't be written through to: no such open file, one for reading, a device without permission."""
    if resume or format == "parquet":
        raise UsageError(f"-o {printable(output)} is not a regular file; --resume and Parquet need one")
    descriptor = descriptor_of(output)
    if descriptor is None:
        if not os.access(output, os.W_OK):
            raise UsageError(f"-o {printable(output)}: no permission to write to it")
        return
    try:
        os.write(descriptor, b"")
    except OSError:
        raise UsageError(f"-o {printable(output)} is not open for writing; give the name of a file") from None


def is_finished(output: Path) -> bool:
    """Whether `output` is whole: it has its name, and no run that writes to it was interrupted."""
    target = _target(output)
    return target.exists() and not _partial(target).exists()


@contextlib.contextmanager
def open_writer(format: Format, output: Path | None, stamp: Stamp, *, resume: bool = False) -> Iterator[Writer]:
    """Give a writer to `output`, or to standard output.

    A file is written as `<output>.partial`, row by row, and takes its name when the block ends well. If the block
    fails, or the process is killed, the partial file stays as long as there are rows in it, and `resume` continues it:
    a row that was cut is taken away, and `Writer.earlier` gives those that are whole. Only one run at a time has the
    partial file. Parquet, which can't be continued, is made of JSON Lines at the end. A link is followed; an open
    file (`/dev/stdout`), a device or a FIFO is written through, since a rename would put a file in its place.

    Raises:
        MDNetError: what the block raised, with the place of the rows so far; also for a full disk and the like.
        RunInterruptedError: Ctrl-C, likewise.
        UsageError: there are rows of an interrupted run and `resume` is not set, or they are of another bundle;
            another run has the file.
    """
    if output is None:
        yield from _finished(_plain_writer(format, sys.stdout.buffer, stamp))
        return
    if is_special(output):
        with open_special(output) as stream:
            yield from _finished(_plain_writer(format, stream, stamp))
        return
    target = _target(output)
    partial = _partial(target)
    writer: Writer | None = None
    try:
        with _open_partial(partial) as stream:
            writer = _partial_writer(format, stream, stamp, partial, resume)
            with _removed_if_empty(partial, writer):
                yield from _finished(writer)
                os.fsync(stream.fileno())
                if format == "parquet":
                    from mdnet_rt.sources.parquet import write_parquet

                    write_parquet(partial, target)
                    partial.unlink()
                else:
                    partial.replace(target)
    except (Exception, KeyboardInterrupt) as error:
        if writer is None or not writer.rows:
            raise
        raise _with_place(error, partial, writer.rows, resumable=format != "table") from error


def _plain_writer(format: Format, stream: BinaryIO, stamp: Stamp) -> Writer:
    if format == "table":
        return TableWriter(stream)
    return RowWriter(stream, stamp, "jsonl" if format == "parquet" else format)


def _partial_writer(format: Format, stream: BinaryIO, stamp: Stamp, partial: Path, resume: bool) -> Writer:
    if format == "table":
        if stream.read(1):
            raise UsageError(f"{printable(partial)} belongs to an interrupted run; delete it, or choose another -o")
        return TableWriter(stream)
    rows_format: RowFormat = "jsonl" if format == "parquet" else format
    rows, end = 0, 0
    try:
        for row in read_rows(rows_format, stream):
            if not resume:
                raise UsageError("it belongs to a run that was interrupted: add --resume to continue it, or delete it")
            if row.stamp != stamp:
                raise UsageError(
                    f"its rows come from {row.stamp.model}, bundle {row.stamp.bundle}; "
                    f"this is {stamp.model}, bundle {stamp.bundle}. Delete it to start again"
                )
            rows, end = rows + 1, row.end
    except MDNetError as error:
        raise UsageError(f"{printable(partial)}: {error}") from None
    stream.seek(end)
    stream.truncate()
    return RowWriter(stream, stamp, rows_format, rows=rows, file=partial)


@contextlib.contextmanager
def _open_partial(partial: Path) -> Iterator[BinaryIO]:
    """Open the partial file for this run alone, without emptying it."""
    while True:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        with os.fdopen(descriptor, "r+b") as stream:
            if not _lock(descriptor):
                raise UsageError(
                    f"another run is writing to {printable(partial)}; wait until it ends, or choose another -o"
                )
            # Between the two steps the other run may have ended, and what is locked now be its finished file.
            if _is_at(descriptor, partial):
                yield stream
                return


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _removed_if_empty(partial: Path, writer: Writer) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if not writer.rows:  # and while it is locked: a moment later it may be another run's
            with contextlib.suppress(OSError):
                partial.unlink()
        raise


def _lock(descriptor: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # else: a file system without locks
    return True


def _finished(writer: Writer) -> Iterator[Writer]:
    try:
        yield writer
    finally:
        writer.finish()  # after a failure too: a table shows the rows that there are


def _with_place(error: BaseException, partial: Path, rows: int, *, resumable: bool) -> MDNetError:
    place = f"the {rows} {'row so far is' if rows == 1 else 'rows so far are'} in {printable(partial)}"
    place += "; the same command with --resume continues" if resumable else ""
    if isinstance(error, KeyboardInterrupt):
        return RunInterruptedError(f"interrupted; {place}")
    if isinstance(error, OSError):
        return MDNetError(f"{explain_os_error(error)}; {place}")
    if isinstance(error, MDNetError):
        return type(error)(f"{error}; {place}")
    return MDNetError(f"unexpected {type(error).__name__}: {error}; {place}")


def _partial(target: Path) -> Path:
    return target.with_name(target.name + PARTIAL)


def _target(output: Path) -> Path:
    return Path(os.path.realpath(output))  # not Path.resolve(), which raises on a loop of links


def _put(stream: BinaryIO, line: bytes) -> None:
    stream.write(line)
    stream.flush()
