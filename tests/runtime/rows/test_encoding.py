"""Rows as bytes and back: every name survives, and of a file that is cut only the cut row is lost."""

from __future__ import annotations

import csv
import io
import json
import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdnet_engines.errors import MDNetError
from mdnet_rt.rows.encoding import COLUMNS, Row, RowFormat, as_dict, encode, header, read_rows
from mdnet_rt.rows.result import Result, Stamp

GOOD = Result("a.jpg", 3.14159265, width=350, height=349)
BAD = Result("b.jpg", None, "unreadable", "empty file")
STAMP = Stamp("tiny int8", "0123456789ab")
FORMATS: tuple[RowFormat, ...] = ("csv", "jsonl")
NAMES = [
    "a,b.jpg",
    'say "hi".jpg',
    '"quoted"',
    "two\nlines.jpg",
    "\n",
    'end\n"',
    '",,ok,,,,m,b\n"x',
    "cr\r.jpg",
    "crlf\r\n.jpg",
    " é 日本 😀.jpg",
    "=1+1",
    "",
    os.fsdecode(b"caf\xe9.jpg"),
    os.fsdecode(b"\xff\xfe,\n\x80"),
    "\u2028\x85\x1c",  # line breaks to str.splitlines(), which nothing here may use
]


def file_of(format: RowFormat, *results: Result) -> bytes:
    return header(format) + b"".join(encode(format, result, STAMP) for result in results)


def read(format: RowFormat, data: bytes) -> list[Row]:
    return list(read_rows(format, io.BytesIO(data)))


def test_csv_has_a_header_and_four_decimals() -> None:
    assert file_of("csv", GOOD, BAD) == (
        b"path,score,status,reason,width,height,model,bundle\n"
        b"a.jpg,3.1416,ok,,350,349,tiny int8,0123456789ab\n"
        b"b.jpg,,unreadable,empty file,,,tiny int8,0123456789ab\n"
    )


def test_jsonl_has_an_object_a_line_and_six_decimals() -> None:
    stamp = {"model": "tiny int8", "bundle": "0123456789ab"}
    assert [json.loads(line) for line in file_of("jsonl", GOOD, BAD).splitlines()] == [
        {"path": "a.jpg", "score": 3.141593, "status": "ok", "reason": None, "width": 350, "height": 349, **stamp},
        {"path": "b.jpg", "score": None, "status": "unreadable", "reason": "empty file", "width": None, "height": None}
        | stamp,
    ]
    assert tuple(as_dict(GOOD, STAMP)) == COLUMNS


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_every_name_is_read_by_others_programs(name: str) -> None:
    text = file_of("csv", Result(name, 1.0)).decode("utf-8", "surrogateescape")
    assert list(csv.reader(io.StringIO(text, newline="")))[1][0] == name
    line = file_of("jsonl", Result(name, 1.0))
    assert line.isascii()
    assert line.count(b"\n") == 1
    assert json.loads(line)["path"] == name


def test_csv_holds_the_bytes_of_a_name_that_is_not_utf8() -> None:
    assert b"\ncaf\xe9.jpg,1.0000,ok," in file_of("csv", Result(os.fsdecode(b"caf\xe9.jpg"), 1.0))


@given(st.lists(st.binary().filter(lambda raw: b"\0" not in raw), max_size=4), st.sampled_from(FORMATS))
def test_rows_of_any_names_come_back(names: list[bytes], format: RowFormat) -> None:
    results = [Result(os.fsdecode(raw), None, "unreadable", "x") for raw in names]
    assert [os.fsencode(row.result.path) for row in read(format, file_of(format, *results))] == names


@pytest.mark.parametrize(
    ("format", "result"),
    [
        ("csv", Result("a", 3.25, width=1, height=20_000)),
        ("jsonl", Result("a", 3.141593, width=1, height=20_000)),
        *[(format, Result("a", None, "not_finite", "score is not finite (nan)", 7, 8)) for format in FORMATS],
        *[(format, Result("a", None, "no_face", 'a "reason", with\ncommas')) for format in FORMATS],
    ],
)
def test_a_row_comes_back_whole(format: RowFormat, result: Result) -> None:
    data = file_of(format, result)
    assert read(format, data) == [Row(result, STAMP, len(data))]


@pytest.mark.parametrize("format", FORMATS)
def test_of_a_file_cut_at_any_byte_the_whole_rows_are_read_and_nothing_else(format: RowFormat) -> None:
    results = [
        Result(name, None, "unreadable", "r") if i % 2 else Result(name, 2.5, width=1, height=2)
        for i, name in enumerate(NAMES)
    ]
    ends = [len(file_of(format, *results[:count])) for count in range(len(results) + 1)]
    data = file_of(format, *results)
    for cut in range(len(data) + 1):
        whole = sum(end <= cut for end in ends[1:])
        rows = read(format, data[:cut])
        assert [row.result for row in rows] == results[:whole], f"cut at byte {cut}"
        assert [row.end for row in rows] == ends[1 : whole + 1], f"cut at byte {cut}"


@pytest.mark.parametrize("format", FORMATS)
def test_a_name_longer_than_the_csv_modules_limit_comes_back(format: RowFormat) -> None:
    name = "n," * 500_000
    assert read(format, file_of(format, Result(name, None, "unreadable", "file name too long")))[0].result.path == name


@pytest.mark.parametrize("format", FORMATS)
def test_an_empty_file_has_no_rows(format: RowFormat) -> None:
    assert read(format, b"") == []
    assert read(format, header(format)) == []


def line(**changes: object) -> bytes:
    return json.dumps(as_dict(GOOD, STAMP) | changes).encode() + b"\n"


HEADER = header("csv")
FOREIGN = {
    "other columns": ("csv", b"path,score,error\na.jpg,3.1,\n"),
    "no newline": ("csv", b"my notes"),
    "one line": ("csv", b"my notes\n"),
    "empty line": ("csv", HEADER + b"\n" + encode("csv", GOOD, STAMP)),
    "few columns": ("csv", HEADER + b"a,b\n" + encode("csv", GOOD, STAMP)),
    "many columns": ("csv", HEADER + encode("csv", GOOD, STAMP)[:-1] + b",\n"),
    "text as score": ("csv", HEADER + b"a,high,ok,,,,m,b\n"),
    "text as width": ("csv", HEADER + b"a,1,ok,,wide,,m,b\n"),
    "JSON Lines": ("csv", line()),
    "CSV": ("jsonl", file_of("csv", GOOD)),
    "not JSON": ("jsonl", line() + b"{\n"),
    "bytes": ("jsonl", b"\xff\xfe\n"),
    "a list": ("jsonl", b"[]\n"),
    "an empty line": ("jsonl", b"\n"),
    "a column less": ("jsonl", b'{"path": "a"}\n'),
    "a column more": ("jsonl", line(extra=1)),
    "a path that is a list": ("jsonl", line(path=[1])),
    "a path that is a number": ("jsonl", line(path=7)),
    "a score that is a list": ("jsonl", line(score=[])),
    "an endless score": ("jsonl", line(score=10**400)),
    "an infinite width": ("jsonl", line(width=float("inf"))),
    "a width that is a list": ("jsonl", line(width=[])),
    "a deep one": ("jsonl", b"[" * 10 * sys.getrecursionlimit() + b"\n"),
}


@pytest.mark.parametrize(("format", "data"), FOREIGN.values(), ids=FOREIGN)
def test_what_this_program_did_not_write_is_refused_in_one_line(format: RowFormat, data: bytes) -> None:
    with pytest.raises(MDNetError, match=r"^not an mdnet-rt results file: .") as caught:
        read(format, data)
    assert "\n" not in str(caught.value)
