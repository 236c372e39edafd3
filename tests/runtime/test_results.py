"""Rows: what each format holds, and where they end up when all goes well and when it does not."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdnet_engines.errors import BundleError, MDNetError, UsageError
from mdnet_rt.results import (
    CsvWriter,
    Format,
    JsonlWriter,
    Result,
    RunInterruptedError,
    Summary,
    TableWriter,
    check_output,
    choose_format,
    open_writer,
)

GOOD = Result("a.jpg", 3.14159265)
BAD = Result("b.jpg", None, "empty file")


def rows_of(writer_class: type, *results: Result) -> bytes:
    stream = io.BytesIO()
    writer = writer_class(stream)
    for result in results:
        writer.write(result)
    writer.finish()
    assert writer.rows == len(results)
    return stream.getvalue()


def test_a_result_is_ok_when_it_has_no_error() -> None:
    assert GOOD.ok
    assert not BAD.ok


def test_csv_has_a_header_and_four_decimals() -> None:
    assert rows_of(CsvWriter, GOOD, BAD) == b"path,score,error\na.jpg,3.1416,\nb.jpg,,empty file\n"


def test_jsonl_has_an_object_a_line_and_six_decimals() -> None:
    assert [json.loads(line) for line in rows_of(JsonlWriter, GOOD, BAD).splitlines()] == [
        {"path": "a.jpg", "score": 3.141593, "error": None},
        {"path": "b.jpg", "score": None, "error": "empty file"},
    ]


NAMES = ["a,b.jpg", 'say "hi".jpg', "two\nlines.jpg", "cr\r.jpg", " é 日本.jpg", os.fsdecode(b"caf\xe9.jpg")]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_every_name_comes_back_from_csv_and_jsonl(name: str) -> None:
    text = rows_of(CsvWriter, Result(name, 1.0)).decode("utf-8", "surrogateescape")
    assert list(csv.reader(io.StringIO(text, newline="")))[1][0] == name
    line = rows_of(JsonlWriter, Result(name, 1.0))
    assert line.isascii()
    assert line.count(b"\n") == 1
    assert json.loads(line)["path"] == name


@given(st.binary(min_size=1).filter(lambda raw: b"\0" not in raw))
def test_any_bytes_of_a_name_come_back_from_csv_and_jsonl(raw: bytes) -> None:
    name = os.fsdecode(raw)
    text = rows_of(CsvWriter, Result(name, None, "x")).decode("utf-8", "surrogateescape")
    assert os.fsencode(list(csv.reader(io.StringIO(text, newline="")))[1][0]) == raw
    assert os.fsencode(json.loads(rows_of(JsonlWriter, Result(name, None, "x")))["path"]) == raw


def test_csv_holds_the_bytes_of_a_name_that_is_not_utf8() -> None:
    assert b"\ncaf\xe9.jpg,1.0000,\n" in rows_of(CsvWriter, Result(os.fsdecode(b"caf\xe9.jpg"), 1.0))


def test_table_shows_names_whole_and_takes_no_markup_or_control_characters_from_them() -> None:
    name = "[red]" + "long" * 100 + "\x1b[2J.jpg"
    shown = rows_of(TableWriter, Result(name, 2.0), BAD).decode()
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
    with pytest.raises(UsageError, match=r"expected a name ending in \.csv or \.jsonl"):
        choose_format(Path(name), None, terminal=True)


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    output = tmp_path / "scores.csv"
    output.write_text("earlier")
    with open_writer("csv", output) as writer:
        writer.write(GOOD)
        assert output.read_text() == "earlier"
        assert (tmp_path / "scores.csv.partial").read_text().endswith("a.jpg,3.1416,\n")  # at once, not when it ends
    assert output.read_text() == "path,score,error\na.jpg,3.1416,\n"
    assert [path.name for path in tmp_path.iterdir()] == ["scores.csv"]


@pytest.mark.parametrize(
    ("raised", "reported", "start"),
    [
        (BundleError("bad graph"), BundleError, "bad graph; "),
        (KeyboardInterrupt(), RunInterruptedError, "interrupted; "),
        (OSError(errno.ENOSPC, "No space left on device"), MDNetError, "no space left"),
        (ZeroDivisionError("oops"), MDNetError, "unexpected ZeroDivisionError: oops; "),
    ],
)
@pytest.mark.parametrize("format", ["csv", "jsonl", "table"])
def test_after_a_failure_the_error_says_where_the_rows_are(
    tmp_path: Path, format: Format, raised: BaseException, reported: type[MDNetError], start: str
) -> None:
    output = tmp_path / "scores.out"

    def run() -> None:
        with open_writer(format, output) as writer:
            writer.write(GOOD)
            writer.write(BAD)
            raise raised

    with pytest.raises(reported) as caught:
        run()
    assert str(caught.value).startswith(start)
    assert str(caught.value).endswith(f"the 2 rows so far are in {output}.partial")
    assert not output.exists()
    assert "a.jpg" in Path(f"{output}.partial").read_text()
    assert RunInterruptedError.exit_code == 130


def test_a_failure_before_the_first_row_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"^bad graph$"), open_writer("csv", tmp_path / "scores.csv"):
        raise BundleError("bad graph")
    assert not list(tmp_path.iterdir())


def test_a_linked_output_is_written_where_the_link_leads(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "scores.csv"
    link.symlink_to(tmp_path / "disk" / "real.csv")
    check_output(link)
    with open_writer("csv", link) as writer:
        writer.write(GOOD)
    assert link.is_symlink()
    assert (tmp_path / "disk" / "real.csv").read_text().startswith("path,")


def test_a_device_is_written_to_and_not_replaced() -> None:
    for device in (Path("/dev/null"), Path("/dev/stdout")):
        check_output(device)
    with open_writer("csv", Path("/dev/null")) as writer:
        writer.write(GOOD)
    assert Path("/dev/null").is_char_device()
    assert not Path("/dev/null.partial").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's always full device")
def test_a_full_disk_is_an_error() -> None:
    with pytest.raises(OSError, match="No space left"), open_writer("csv", Path("/dev/full")) as writer:
        writer.write(GOOD)


def test_outputs_that_cannot_work_are_refused_early(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    for output, message in (
        (tmp_path / "missing" / "a.csv", "there is no folder"),
        (tmp_path / "folder.csv", "is a folder"),
        (tmp_path / "folder.csv" / ".." / "nope" / "a.csv", "there is no folder"),
    ):
        with pytest.raises(UsageError, match=message):
            check_output(output)
    check_output(tmp_path / "new.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.csv"]


@pytest.mark.parametrize("closed", ["folder", "file"])
def test_no_permission_to_write_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: str) -> None:
    output = tmp_path / "scores.csv"
    output.touch()
    place = {"folder": tmp_path, "file": output}[closed]
    # Root, which tests may run as, writes everywhere: the refusal is staged.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place)
    with pytest.raises(UsageError, match=f"no permission to write to {place}$"):
        check_output(output)


@pytest.mark.parametrize(
    ("results", "line"),
    [
        ([GOOD, BAD], "2 images: 1 scored, 1 failed, 0.5 s, 4.0 images/s; scores 3.1 to 3.1"),
        ([BAD], "1 image: 0 scored, 1 failed, 0.5 s, 2.0 images/s"),
        ([GOOD, Result("c", 1.94)], "2 images: 2 scored, 0 failed, 0.5 s, 4.0 images/s; scores 1.9 to 3.1"),
        ([], "0 images: 0 scored, 0 failed, 0.5 s, 0.0 images/s"),
    ],
)
def test_summary_counts_in_one_line(results: list[Result], line: str) -> None:
    summary = Summary()
    for result in results:
        summary.add(result)
    assert summary.line(0.5) == line
