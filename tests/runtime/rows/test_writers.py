"""Where rows end up: when all goes well, when it does not, and when a run goes on with what another has left."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mdnet_engines.errors import BundleError, MDNetError, UsageError
from mdnet_rt.rows import writers
from mdnet_rt.rows.encoding import as_dict
from mdnet_rt.rows.result import Result, Stamp
from mdnet_rt.rows.writers import (
    Format,
    RunInterruptedError,
    TableWriter,
    check_output,
    choose_format,
    is_finished,
    open_writer,
)
from mdnet_rt.sources import parquet

GOOD = Result("a.jpg", 3.14159265, width=350, height=349)
BAD = Result("b.jpg", None, "unreadable", "empty file")
STAMP = Stamp("tiny int8", "0123456789ab")
HEADER = "path,score,status,reason,width,height,model,bundle\n"
CONTINUED: tuple[Format, ...] = ("csv", "jsonl", "parquet")


def run(format: Format, output: Path, *results: Result, resume: bool = False, stamp: Stamp = STAMP) -> list[Result]:
    """Write those of `results` that have no row yet; give those that had."""
    with open_writer(format, output, stamp, resume=resume) as writer:
        earlier = list(writer.earlier())
        for result in results[len(earlier) :]:
            writer.write(result)
    return earlier


def interrupted(format: Format, output: Path, *results: Result, raised: BaseException | None = None) -> None:
    """As `run`, which then fails."""

    def fail() -> None:
        with open_writer(format, output, STAMP) as writer:
            for result in results:
                writer.write(result)
            raise raised or KeyboardInterrupt

    with pytest.raises(MDNetError if raised is None else (MDNetError, type(raised))):
        fail()


def partial_of(output: Path) -> Path:
    return Path(f"{output}.partial")


def table_of(*results: Result) -> str:
    stream = io.BytesIO()
    writer = TableWriter(stream)
    for result in results:
        writer.write(result)
    writer.finish()
    assert writer.rows == len(results)
    return stream.getvalue().decode()


def test_table_shows_names_whole_and_takes_no_markup_or_control_characters_from_them() -> None:
    name = "[red]" + "long" * 100 + "\x1b[2J.jpg"
    shown = table_of(Result(name, 2.0), BAD)
    assert "[red]" + "long" * 100 + r"\x1b[2J.jpg" in shown
    assert "2.0000" in shown
    assert "empty file" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("output", "named", "terminal", "expected"),
    [
        (None, None, True, "table"),
        (None, None, False, "csv"),
        (None, "jsonl", True, "jsonl"),
        (Path("a.csv"), None, True, "csv"),
        (Path("a.JSONL"), None, True, "jsonl"),
        (Path("a.parquet"), None, True, "parquet"),
        (Path("a.txt"), "table", False, "table"),
        (Path("a.csv"), "jsonl", False, "jsonl"),
    ],
)
def test_format_is_what_is_named_else_the_suffix_else_the_terminal(
    output: Path | None, named: Format | None, terminal: bool, expected: str
) -> None:
    assert choose_format(output, named, terminal=terminal) == expected


@pytest.mark.parametrize("name", ["scores", "scores.txt", "scores.json"])
def test_a_suffix_that_says_nothing_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match=r"expected a name ending in \.csv, \.jsonl or \.parquet"):
        choose_format(Path(name), None, terminal=True)


def test_parquet_needs_a_file() -> None:
    with pytest.raises(UsageError, match="needs a file"):
        choose_format(None, "parquet", terminal=False)


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    output = tmp_path / "scores.csv"
    output.write_text("earlier")
    with open_writer("csv", output, STAMP) as writer:
        writer.write(GOOD)
        assert output.read_text() == "earlier"
        assert partial_of(output).read_text().count("a.jpg,3.1416,ok") == 1  # at once, not when it ends
    assert output.read_text() == HEADER + "a.jpg,3.1416,ok,,350,349,tiny int8,0123456789ab\n"
    assert [path.name for path in tmp_path.iterdir()] == ["scores.csv"]
    assert is_finished(output)


@pytest.mark.parametrize(
    ("raised", "reported", "start"),
    [
        (BundleError("bad graph"), BundleError, "bad graph; "),
        (KeyboardInterrupt(), RunInterruptedError, "interrupted; "),
        (OSError(errno.ENOSPC, "No space left on device"), MDNetError, "no space left"),
        (ZeroDivisionError("oops"), MDNetError, "unexpected ZeroDivisionError: oops; "),
    ],
)
@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet", "table"])
def test_after_a_failure_the_error_says_where_the_rows_are(
    tmp_path: Path, format: Format, raised: BaseException, reported: type[MDNetError], start: str
) -> None:
    output = tmp_path / "scores.out"

    def fail() -> None:
        with open_writer(format, output, STAMP) as writer:
            writer.write(GOOD)
            writer.write(BAD)
            raise raised

    with pytest.raises(reported) as caught:
        fail()
    how = "" if format == "table" else "; the same command with --resume continues"
    assert str(caught.value).startswith(start)
    assert str(caught.value).endswith(f"the 2 rows so far are in {output}.partial{how}")
    assert not output.exists()
    assert "a.jpg" in partial_of(output).read_text()
    assert RunInterruptedError.exit_code == 130


@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet", "table"])
def test_a_failure_before_the_first_row_leaves_nothing(tmp_path: Path, format: Format) -> None:
    with pytest.raises(BundleError, match=r"^bad graph$"), open_writer(format, tmp_path / "scores.csv", STAMP):
        raise BundleError("bad graph")
    assert not list(tmp_path.iterdir())


def test_a_linked_output_is_written_where_the_link_leads(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "scores.csv"
    link.symlink_to(tmp_path / "disk" / "real.csv")
    check_output(link, "csv")
    run("csv", link, GOOD)
    assert link.is_symlink()
    assert (tmp_path / "disk" / "real.csv").read_text().startswith("path,")


def test_a_link_that_leads_to_itself_is_replaced_or_refused_but_not_followed_for_ever(tmp_path: Path) -> None:
    link = tmp_path / "scores.csv"
    link.symlink_to(link)
    check_output(link, "csv")
    run("csv", link, GOOD)
    assert link.read_text().startswith("path,")


def test_a_device_is_written_to_and_not_replaced() -> None:
    for device in (Path("/dev/null"), Path("/dev/stdout")):
        check_output(device, "csv")
    run("csv", Path("/dev/null"), GOOD)
    assert Path("/dev/null").is_char_device()
    assert not Path("/dev/null.partial").exists()
    for format, resume in (("csv", True), ("parquet", False)):
        with pytest.raises(UsageError, match="not a regular file"):
            check_output(Path("/dev/null"), format, resume=resume)  # type: ignore[arg-type]


def test_a_link_to_an_open_file_is_written_through_from_where_the_file_stands(tmp_path: Path) -> None:
    log, link = tmp_path / "log.csv", tmp_path / "scores.csv"
    log.write_bytes(b"earlier\n")
    with log.open("ab") as stream:
        link.symlink_to(f"/proc/self/fd/{stream.fileno()}")
        check_output(link, "csv")
        run("csv", link, GOOD, BAD)
    run("csv", tmp_path / "plain.csv", GOOD, BAD)
    assert log.read_bytes() == b"earlier\n" + (tmp_path / "plain.csv").read_bytes()
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "plain.csv", "scores.csv"]


def test_an_open_file_that_rows_cant_be_written_to_is_refused_early(tmp_path: Path) -> None:
    (tmp_path / "file.csv").write_text("earlier")
    with (tmp_path / "file.csv").open("rb") as stream:
        with pytest.raises(UsageError, match="not open for writing"):
            check_output(Path(f"/dev/fd/{stream.fileno()}"), "csv")
        with pytest.raises(UsageError, match="not a regular file"):
            check_output(Path(f"/proc/self/fd/{stream.fileno()}"), "csv", resume=True)
    with pytest.raises(UsageError, match="not open for writing"):
        check_output(Path("/dev/fd/1048000"), "csv")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's always full device")
def test_a_full_disk_is_an_error() -> None:
    with pytest.raises(OSError, match="No space left"):
        run("csv", Path("/dev/full"), GOOD)


@contextmanager
def disk_that_holds(size: int) -> Iterator[None]:
    """No file may grow over `size` bytes: as on a full disk, the write that meets the limit is cut."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("format", CONTINUED)
@pytest.mark.parametrize("size", [0, 30, 200, 300, 420])
def test_when_the_disk_is_full_the_rows_so_far_are_there_to_go_on_with(
    tmp_path: Path, format: Format, size: int
) -> None:
    results = [Result(f"{i},\n.jpg", i / 8, width=1, height=2) for i in range(8)]
    whole, output = tmp_path / "whole", tmp_path / "scores"
    run(format, whole, *results)
    with disk_that_holds(size), pytest.raises((MDNetError, OSError), match="ile too large"):
        run(format, output, *results)
    assert not output.exists()
    run(format, output, *results, resume=True)
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores", "whole"]


def test_a_disk_that_is_full_when_parquet_is_made_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "scores.parquet"
    output.write_text("earlier")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _full_when_called(2))  # first for the rows, then for the Parquet file
        with pytest.raises(MDNetError, match=r"no space left.*--resume continues"):
            run("parquet", output, GOOD, BAD)
    assert output.read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.parquet", "scores.parquet.partial"]
    assert run("parquet", output, GOOD, BAD, resume=True) == [Result("a.jpg", 3.141593, width=350, height=349), BAD]
    assert pq.read_table(output).num_rows == 2


def _full_when_called(times: int) -> Callable[[int], None]:
    calls = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == times:
            raise OSError(errno.ENOSPC, "No space left on device")

    return fsync


def test_outputs_that_cannot_work_are_refused_early(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    for output, message in (
        (tmp_path / "missing" / "a.csv", "does not exist; create it"),
        (tmp_path / "folder.csv", "is a folder"),
        (tmp_path / "folder.csv" / ".." / "nope" / "a.csv", "does not exist; create it"),
        (Path("s3://bucket/a.csv"), "is a URL"),
    ):
        with pytest.raises(UsageError, match=message):
            check_output(output, "csv")
    with pytest.raises(UsageError, match="a table can't be continued"):
        check_output(tmp_path / "new.txt", "table", resume=True)
    check_output(tmp_path / "new.csv", "csv")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.csv"]


@pytest.mark.parametrize("closed", ["folder", "file"])
def test_no_permission_to_write_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: str) -> None:
    output = tmp_path / "scores.csv"
    output.touch()
    place = {"folder": tmp_path, "file": output}[closed]
    # Root, which tests may run as, writes everywhere: the refusal is staged.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place)
    with pytest.raises(UsageError, match=f"no permission to write to {place}$"):
        check_output(output, "csv")


AWKWARD = [
    Result("a,b.jpg", 1.5, width=1, height=2),
    Result('two\n"lines"\n', None, "unreadable", 'a "reason", with commas'),
    Result(os.fsdecode(b"caf\xe9\r\n.jpg"), 2.25, width=3, height=4),
    Result("\n\n\n", 3.0, width=5, height=6),
    Result("", None, "no_face", "no face"),
]


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_a_run_killed_at_any_byte_is_continued_as_if_it_had_not_been(tmp_path: Path, format: Format) -> None:
    output, partial = tmp_path / "scores", tmp_path / "scores.partial"
    run(format, output, *AWKWARD)
    whole = output.read_bytes()
    output.unlink()
    for cut in range(len(whole) + 1):
        partial.write_bytes(whole[:cut])
        run(format, output, *AWKWARD, resume=True)
        assert output.read_bytes() == whole, f"killed at byte {cut}"
        assert not partial.exists()


@pytest.mark.parametrize("format", CONTINUED)
def test_rows_that_are_there_are_given_back_and_counted(tmp_path: Path, format: Format) -> None:
    output = tmp_path / "scores"
    interrupted(format, output, *AWKWARD[:3])
    assert not is_finished(output)
    with open_writer(format, output, STAMP, resume=True) as writer:
        assert writer.rows == 3
        writer.write(AWKWARD[3])  # while the rows of before are still to be asked for
        assert list(writer.earlier()) == AWKWARD[:3]
        assert list(writer.earlier()) == AWKWARD[:3]
        assert writer.rows == 4


@pytest.mark.parametrize("format", CONTINUED)
def test_rows_of_an_interrupted_run_are_not_thrown_away_unasked(tmp_path: Path, format: Format) -> None:
    output = tmp_path / "scores"
    interrupted(format, output, GOOD)
    before = partial_of(output).read_bytes()
    with pytest.raises(UsageError, match=r"scores\.partial: .*interrupted: add --resume to continue it, or delete it$"):
        run(format, output, GOOD, BAD)
    assert partial_of(output).read_bytes() == before
    assert not output.exists()


@pytest.mark.parametrize("stamp", [Stamp("tiny int8", "ba9876543210"), Stamp("tiny fp32", "0123456789ab")])
@pytest.mark.parametrize("format", CONTINUED)
def test_rows_of_another_bundle_are_refused(tmp_path: Path, format: Format, stamp: Stamp) -> None:
    output = tmp_path / "scores"
    interrupted(format, output, GOOD)
    before = partial_of(output).read_bytes()
    with pytest.raises(UsageError, match=f"come from tiny int8, bundle 0123456789ab; this is {stamp.model}, bundle"):
        run(format, output, GOOD, BAD, resume=True, stamp=stamp)
    assert partial_of(output).read_bytes() == before


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("format", "content"),  # in JSON Lines a row that was cut may look like anything without a line break
    [("csv", "notes of mine"), *[(format, "notes of mine\n") for format in CONTINUED]],
)
def test_a_file_of_something_else_in_the_partial_files_place_is_left_alone(
    tmp_path: Path, format: Format, resume: bool, content: str
) -> None:
    output = tmp_path / "scores"
    partial_of(output).write_text(content)
    with pytest.raises(UsageError, match=r"scores\.partial: not an mdnet-rt results file"):
        run(format, output, GOOD, resume=resume)
    assert partial_of(output).read_text() == content


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet", "table"])
def test_a_second_run_on_the_same_output_is_refused_and_the_first_is_not_disturbed(
    tmp_path: Path, format: Format, resume: bool
) -> None:
    output = tmp_path / "scores"
    with open_writer(format, output, STAMP) as writer:
        writer.write(GOOD)
        with pytest.raises(UsageError, match="another run is writing to") as caught:
            run(format, output, BAD, resume=resume)
        assert "\n" not in str(caught.value)
        writer.write(BAD)
    assert output.exists()
    assert not partial_of(output).exists()
    if format == "jsonl":
        assert [json.loads(line)["path"] for line in output.read_text().splitlines()] == ["a.jpg", "b.jpg"]


def test_a_second_run_in_another_process_is_refused_too(tmp_path: Path) -> None:
    output = tmp_path / "scores.csv"
    program = f"""
from pathlib import Path
from mdnet_rt.rows.result import Stamp
from mdnet_rt.rows.writers import open_writer
with open_writer("csv", Path({str(output)!r}), Stamp("m", "b")):
    pass
"""
    with open_writer("csv", output, STAMP) as writer:
        second = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert "UsageError: another run is writing to" in second.stderr
        writer.write(GOOD)
    assert output.read_text().count("a.jpg") == 1


@pytest.mark.parametrize("ends", ["finished", "gone"])
def test_a_run_that_ends_while_another_opens_its_file_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    output = tmp_path / "scores.csv"
    partial, lock, calls = partial_of(output), writers._lock, []

    def lock_after_the_first_has_ended(descriptor: int) -> bool:
        calls.append(descriptor)
        if len(calls) == 1:
            partial.replace(output) if ends == "finished" else partial.unlink()
            output.write_text("rows of the first")
        return lock(descriptor)

    monkeypatch.setattr(writers, "_lock", lock_after_the_first_has_ended)
    with open_writer("csv", output, STAMP) as writer:
        writer.write(GOOD)
        assert output.read_text() == "rows of the first"
        assert partial.read_text().count("a.jpg") == 1
    assert len(calls) == 2
    assert output.read_text().startswith(HEADER)


def test_a_run_that_fails_without_rows_does_not_take_the_next_ones_file_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, free = tmp_path / "scores.csv", []
    unlink = Path.unlink

    def look_then_unlink(path: Path, missing_ok: bool = False) -> None:
        with path.open("rb") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free.append(path)
            except OSError:
                pass
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", look_then_unlink)
    with pytest.raises(BundleError), open_writer("csv", output, STAMP):
        raise BundleError("bad graph")
    assert not free  # nobody could have begun to write to it
    assert not list(tmp_path.iterdir())


def test_where_the_file_system_has_no_locks_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    run("csv", tmp_path / "scores.csv", GOOD)
    assert (tmp_path / "scores.csv").exists()


def test_parquet_holds_what_json_lines_hold(tmp_path: Path) -> None:
    results = [*AWKWARD[:2], GOOD, Result("only failures have none.jpg", None, "not_finite", "nan", 7, 8)]
    run("parquet", tmp_path / "scores.parquet", *results)
    run("jsonl", tmp_path / "scores.jsonl", *results)
    table = pq.read_table(tmp_path / "scores.parquet")
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    # approx: Parquet's scores are float32, which has fewer digits than JSON's.
    assert table.to_pylist() == [pytest.approx(json.loads(line)) for line in lines]


@pytest.mark.parametrize("results", [[], [BAD], [GOOD]], ids=["none", "failures", "scores"])
def test_parquets_columns_have_their_types_whatever_rows_there_are(tmp_path: Path, results: list[Result]) -> None:
    run("parquet", tmp_path / "scores.parquet", *results)
    schema = pq.read_table(tmp_path / "scores.parquet").schema
    assert {field.name: str(field.type) for field in schema} == {
        "path": "string",
        "score": "float",
        "status": "string",
        "reason": "string",
        "width": "int32",
        "height": "int32",
        "model": "string",
        "bundle": "string",
    }


def test_parquet_spells_a_byte_that_is_not_utf8(tmp_path: Path) -> None:
    run("parquet", tmp_path / "scores.parquet", Result(os.fsdecode(b"caf\xe9.jpg"), 1.0))
    assert pq.read_table(tmp_path / "scores.parquet")["path"].to_pylist() == [r"caf\udce9.jpg"]


def test_parquet_of_more_rows_than_a_group_has_them_all_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "_ROWS_IN_A_GROUP", 3)
    run("parquet", tmp_path / "scores.parquet", *[Result(str(i), i / 4) for i in range(10)])
    file = pq.ParquetFile(tmp_path / "scores.parquet")
    assert file.num_row_groups == 4
    assert file.read()["path"].to_pylist() == [str(i) for i in range(10)]


def test_parquet_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "scores.parquet"

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(parquet.pq.ParquetWriter, "write_batch", fail)
        with pytest.raises(MDNetError, match="no space left"):
            run("parquet", output, GOOD)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet.partial"]


def test_a_kill_between_parquets_rename_and_the_end_is_recovered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "scores.parquet"
    write = parquet.write_parquet

    class Killed(BaseException):
        """Past every handler but `finally`, as the end of a process is."""

    def write_and_die(rows: Path, target: Path) -> None:
        write(rows, target)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(parquet, "write_parquet", write_and_die)
        with pytest.raises(Killed):
            run("parquet", output, *AWKWARD[:2])
    first = output.read_bytes()
    assert partial_of(output).exists()
    assert not is_finished(output)
    with pytest.raises(UsageError, match="add --resume"):
        run("parquet", output, *AWKWARD[:2])
    assert run("parquet", output, *AWKWARD[:2], resume=True) == AWKWARD[:2]
    assert output.read_bytes() == first
    assert is_finished(output)


def test_what_a_run_killed_while_making_parquet_leaves_goes_with_the_next(tmp_path: Path) -> None:
    program = """
import os, sys
import pyarrow.parquet as pq
from mdnet_rt.rows.result import Result, Stamp
from mdnet_rt.rows.writers import open_writer
pq.ParquetWriter.write_batch = lambda *_: os.kill(os.getpid(), 9)
with open_writer("parquet", sys.argv[1], Stamp("m", "b")) as writer:
    writer.write(Result("a.jpg", 3.0))
"""
    output = tmp_path / "scores.parquet"
    assert subprocess.run([sys.executable, "-c", program, output]).returncode == -9
    assert len(list(tmp_path.iterdir())) == 2  # the rows, and half a file
    with open_writer("parquet", output, Stamp("m", "b"), resume=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]


def test_a_finished_file_is_written_as_others_are_to_be_read(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        for name in ("a.csv", "a.parquet"):
            run(choose_format(Path(name), None, terminal=False), tmp_path / name, GOOD)
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_the_rows_of_standard_output_are_as_in_a_file() -> None:
    program = """
from mdnet_rt.rows.result import Result, Stamp
from mdnet_rt.rows.writers import open_writer
with open_writer("jsonl", None, Stamp("m", "b")) as writer:
    writer.write(Result("a", 1.0))
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
    assert json.loads(shown) == as_dict(Result("a", 1.0), Stamp("m", "b"))
