"""What a run leaves: stages, their rows, and the file that holds them. Reads nothing that it does not know."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

KIND = "mdnet-gpu-check"
SCHEMA = 1

PASSED, FAILED, CRASHED, TIMED_OUT = "passed", "failed", "crashed", "timed out"
NOT_INSTALLED, NOT_SUPPORTED, NOT_RUN = "not installed", "not supported", "not run"
BAD = (CRASHED, TIMED_OUT, FAILED)
STATUSES = (*BAD, PASSED, NOT_SUPPORTED, NOT_INSTALLED, NOT_RUN)
"""In the order in which one row's status decides that of its stage. "Not supported" is said of a GPU or its runtime,
"not installed" of a package, "not run" of what was not begun, or was under way when somebody ended the run; none is a
failure, and none is evidence. "Timed out" is what was begun and stopped."""

Figure = float | int | str


class ResultError(Exception):
    """A file of results that can't be taken as evidence; the message names it and says why."""


@dataclass(frozen=True)
class Row:
    """One thing that was tried. `figures` by what they are, units included: `{"images/s": 812.0}`."""

    name: str
    status: str
    note: str = ""
    figures: dict[str, Figure] = field(default_factory=dict)

    def number(self, name: str) -> float | None:
        """A figure, where the row has it as a number."""
        value = self.figures.get(name)
        return None if value is None or isinstance(value, str) else float(value)


@dataclass(frozen=True)
class StageResult:
    """A stage that ran, or was cut: its rows, what its process came to, and the seconds it took of its `limit`."""

    name: str
    status: str
    seconds: float
    limit: float
    note: str = ""
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Results:
    """One run of all stages on one machine."""

    gpu: str
    date: str
    """When it began, ISO 8601 in UTC."""
    dry_run: bool
    command: str
    versions: dict[str, str]
    stages: tuple[StageResult, ...] = ()

    @property
    def day(self) -> str:
        return self.date[:10]

    @property
    def passed(self) -> bool:
        """Whether all that ran passed its checks."""
        return not any(stage.status in BAD for stage in self.stages)

    def rows(self, stage: str) -> tuple[Row, ...]:
        return next((each.rows for each in self.stages if each.name == stage), ())


def worst(statuses: Iterable[str]) -> str:
    """The status of a stage whose rows have these."""
    found = set(statuses)
    return next((status for status in STATUSES if status in found), FAILED)


def plain(figures: dict[str, Figure]) -> dict[str, Figure]:
    """Figures as JSON takes them: six digits, and what is no finite number by its name."""
    short: dict[str, Figure] = {}
    for name, value in figures.items():
        if isinstance(value, (str, int)):
            short[name] = value
        else:
            short[name] = float(f"{value:.6g}") if math.isfinite(value) else str(float(value))
    return short


def write(results: Results, file: Path) -> None:
    """Write a run's results in one step, so that a killed run leaves a whole file."""
    text = json.dumps({"kind": KIND, "schema": SCHEMA, **asdict(results)}, indent=1, allow_nan=False) + "\n"
    draft = file.with_name(f".{file.name}.partial")
    draft.write_text(text, encoding="utf-8")
    draft.replace(file)


def read(file: Path) -> Results | None:
    """The results in a file; None where it is a JSON file of another kind.

    Raises:
        ResultError: a schema, status or shape that this version does not know.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultError(f"{file.name} is no JSON: {error}") from None
    if not isinstance(document, dict) or document.get("kind") != KIND:
        return None
    if document.get("schema") != SCHEMA:
        raise ResultError(f"{file.name} has the schema {document.get('schema')!r}; this version reads {SCHEMA}")
    try:
        results = _parse({key: value for key, value in document.items() if key not in ("kind", "schema")})
        datetime.fromisoformat(results.date)
    except (KeyError, TypeError, ValueError) as error:
        raise ResultError(f"{file.name} is not as gpu_check.py writes it: {error}") from None
    for stage in results.stages:
        for status in (stage.status, *(row.status for row in stage.rows)):
            if status not in STATUSES:
                raise ResultError(f"{file.name}: {stage.name} has the status {status!r}; known: {', '.join(STATUSES)}")
    return results


def newest(folder: Path) -> Results | None:
    """The newest run among the JSON files of a folder, None without any.

    Raises:
        ResultError: a file is a dry run, which shows nothing of a GPU, or can't be read.
    """
    runs = []
    for file in sorted(folder.glob("*.json")):
        if (results := read(file)) is None:
            continue
        if results.dry_run:
            raise ResultError(f"{file.name} is a dry run and no evidence; remove it")
        runs.append(results)
    return max(runs, key=lambda results: datetime.fromisoformat(results.date), default=None)


def _parse(document: dict[str, Any]) -> Results:
    stages = [
        StageResult(**{**stage, "rows": tuple(Row(**row) for row in stage["rows"])}) for stage in document["stages"]
    ]
    return Results(**{**document, "stages": tuple(stages)})
