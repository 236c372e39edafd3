"""What a stage did, line by line in a file: its process writes, `gpu.check` reads, and no crash takes a line back.

{"expect": ["fp16, batch 1", …]}    rows that are to come
{"begin": "fp16, batch 1"}          the row that is under way
{"row": {…}}                        what became of it
{"done": true, "whole": false}      the stage's end, and whether no exception ended it
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from gpu.results import CRASHED, FAILED, NOT_RUN, PASSED, Row, StageResult, worst


class Writer:
    """Writes a journal; `places` are folders that no note names."""

    def __init__(self, file: IO[str], places: Sequence[str]):
        self._file = file
        self._places = places

    def expect(self, names: Sequence[str]) -> None:
        self._write({"expect": list(names)})

    def begin(self, name: str) -> None:
        self._write({"begin": name})

    def row(self, row: Row) -> None:
        note = row.note
        for place in self._places:
            note = note.replace(f"{place}/", "")
        self._write({"row": asdict(replace(row, note=note))})

    def done(self, *, whole: bool) -> None:
        self._write({"done": True, "whole": whole})

    def _write(self, document: dict[str, Any]) -> None:
        print(json.dumps(document, allow_nan=False), file=self._file, flush=True)


def read(file: Path, name: str, ended: tuple[str, str], seconds: float, limit: float) -> StageResult:
    """The stage's result, as far as its journal goes.

    Args:
        ended: how its process ended: a status that is not "passed", and a note; empty where nothing stopped it. It
            becomes the status of the row that was under way. Rows that were announced and not begun are "not run".
    """
    rows: list[Row] = []
    expected: list[str] = []
    begun: list[str] = []
    done = whole = False
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            document = json.loads(line)
        except ValueError:  # cut while it was written
            continue
        expected += document.get("expect", ())
        begun += [document["begin"]] if "begin" in document else []
        rows += [Row(**document["row"])] if "row" in document else []
        done, whole = document.get("done", done), document.get("whole", whole)
    status, note = ended
    if not status and not done:
        status, note = CRASHED, "its process ended without a word"
    if status or not whole:
        known = {row.name for row in rows}
        rows += [Row(each, status, note) for each in dict.fromkeys(begun) if status and each not in known]
        missing = [each for each in dict.fromkeys(expected) if each not in {*known, *begun}]
        rows += [Row(each, NOT_RUN, "the stage had ended") for each in missing]
    if not status:
        status, note = _sum_up(rows)
    return StageResult(name, status, round(seconds, 1), round(limit, 1), note, tuple(rows))


def _sum_up(rows: Sequence[Row]) -> tuple[str, str]:
    """The status of a stage that came to its end, and what a reader should know first."""
    if not rows:
        return FAILED, "it gave no row"
    status = worst(row.status for row in rows)
    notes = [f"{row.name}: {row.note}" for row in rows if row.status == status]
    return status, "" if status == PASSED else notes[0] + (f" (and {len(notes) - 1} more)" if notes[1:] else "")
