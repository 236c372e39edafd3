"""A page to look at after a run: histogram, faces sorted by score, failures. A million images take it no more memory
than a thousand: it keeps counts, some names, and the small pictures that it will show.
"""

from __future__ import annotations

import heapq
import math
import os
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mdnet_engines.errors import MDNetError, UsageError, first_line, printable, require
from mdnet_engines.report.numbers import score_text
from mdnet_engines.report.thumbnails import Thumbnail, thumbnail
from mdnet_engines.system.atomic import new_file
from mdnet_engines.system.output_path import check_writable, is_special
from mdnet_rt.rows.result import Result, Stamp, Summary

if TYPE_CHECKING:
    from markupsafe import Markup

ENDS = 50
"""Pictures of the highest scores, and of the lowest."""
SAMPLE = 100
"""Pictures of the rest. Up to 2 × ENDS + SAMPLE images, all are shown."""
FAILURES_NAMED = 100
MAX_REASONS = 50
MAX_BINS = 10_000
MAX_TEXT = 400
"""Characters of a name or reason that are kept: its beginning and its end."""
_SIDE = 128  # pixels
_OTHER = ("", "other reasons")
_NUMBER = re.compile(r"0x[0-9a-fA-F]{6,}|(?<![A-Z\d])\d+")  # not that of JPEG2000


class Gallery:
    """Takes the rows of a run, one by one, and makes a page of them."""

    def __init__(self) -> None:
        self._summary = Summary()
        self._faces = _Faces()
        self._histogram = _Histogram()
        self._failures = _Failures()

    def add(self, result: Result) -> None:
        """Take one row. Without pixels (from an earlier run) it counts, and has no picture."""
        self._summary.add(result)
        if result.score is None:
            self._failures.add(result)
            return
        self._histogram.add(result.score)
        if result.pixels is not None:
            self._faces.add(result.path, result.score, result.pixels)

    def write(self, output: Path, stamp: Stamp, scale: str = "") -> None:
        """Write the page, which appears whole or not at all.

        Args:
            scale: the bundle's rating scale, for the reader.

        Raises:
            MDNetError: it can't be written (full disk).
        """
        page = self._render(stamp, scale)
        target = Path(os.path.realpath(output))
        try:
            with new_file(target) as scratch:
                scratch.write_text(page, encoding="utf-8")
        except OSError as error:
            why = error.strerror or first_line(error)
            raise MDNetError(f"--report {printable(output)} was not written: {why}; the rows are complete") from error

    def _render(self, stamp: Stamp, scale: str) -> str:
        from mdnet_engines.report.page import render

        summary, groups = self._summary, self._faces.groups()
        folder = _common_folder([face.path for faces in groups.values() for face in faces])
        return render(
            Path(__file__).with_name("gallery.html.j2"),
            title=f"Scores of {_images(summary.scored + summary.failed)}",
            scored=summary.scored,
            failed=summary.failed,
            facts=self._facts(stamp, scale),
            histogram=self._histogram.draw(summary) if summary.scored else None,
            folder=folder,
            groups={
                title: [(face.path, face.path[len(folder) :], score_text(face.score), face.picture) for face in faces]
                for title, faces in groups.items()
            },
            not_pictured=summary.scored - self._faces.seen,
            reasons=self._failures.reasons(),
            failures=self._failures.first,
        )

    def _facts(self, stamp: Stamp, scale: str) -> dict[str, str]:
        summary = self._summary
        facts = {"model": stamp.model, "bundle": stamp.bundle}
        if scale:
            facts["rating scale"] = scale
        facts["scored"] = f"{summary.scored:,}"
        facts["failed"] = f"{summary.failed:,}"
        if summary.doubtful:
            facts["with a warning"] = f"{summary.doubtful:,}"
        if summary.scored:
            facts["lowest score"], facts["highest score"] = score_text(summary.low), score_text(summary.high)
            facts["mean score"] = score_text(self._histogram.total / summary.scored)
        return facts


def check_report(output: Path) -> None:
    """Refuse, before any work is done, a page that could not be written at its end.

    Raises:
        UsageError: its folder is missing or may not be written to, or something that is no regular file has its name.
        MDNetError: jinja2 is missing.
    """
    require("jinja2", "report")
    target, name = Path(os.path.realpath(output)), f"--report {printable(output)}"
    if is_special(output) and not target.is_dir():
        raise UsageError(f"{name} is not a regular file; a page needs one")
    check_writable(target, name)


@dataclass
class _Face:
    """A scored image; `index` is its place among them. It has its picture once it is known to be kept."""

    path: str
    score: float
    index: int
    picture: Thumbnail | None = None


class _Faces:
    """The highest scores, the lowest, and of all between them a sample in which each is as likely as any other."""

    def __init__(self) -> None:
        self.seen = 0
        self._high: list[_Ranked] = []
        self._low: list[_Ranked] = []
        self._between: list[_Face] = []
        self._seen_between = 0
        self._random = random.Random(0)  # the same run gives the same page

    def add(self, path: str, score: float, pixels: np.ndarray) -> None:
        face = _Face(_shortened(path), score, self.seen)
        self.seen += 1
        if self._exchange(face) is not face:
            # Pixels are part of a whole batch, which would stay in memory with them.
            face.picture = thumbnail(pixels, _SIDE)

    def groups(self) -> dict[str, list[_Face]]:
        """Heading → faces, highest score first."""
        high, low = ([ranked.face for ranked in heap] for heap in (self._high, self._low))
        sample = f"A random sample of the other {self._seen_between:,}"
        groups = {"Highest scores": high, sample: self._between, "Lowest scores": low}
        if self.seen <= 2 * ENDS + SAMPLE:
            groups = {"All images": [face for faces in groups.values() for face in faces]}
        return {
            title: sorted(faces, key=lambda face: (-face.score, face.index)) for title, faces in groups.items() if faces
        }

    def _exchange(self, face: _Face) -> _Face | None:
        """Take `face`, and give the one there is no room for, which may be the same.

        What leaves the highest may be one of the lowest; what leaves both is a part of the sample's population, and
        never comes back, so each of these is counted there once.
        """
        out = _push(self._high, _Ranked(face.score, -face.index, face))
        if out is not None:
            out = _push(self._low, _Ranked(-out.score, -out.index, out))
        if out is None:
            return None
        self._seen_between += 1
        if len(self._between) < SAMPLE:
            self._between.append(out)
            return None
        at = self._random.randrange(self._seen_between)
        if at < SAMPLE:
            out, self._between[at] = self._between[at], out
        return out


class _Ranked(NamedTuple):
    """A face in a heap. Of equal scores the later goes first, so that equal images don't all become pictures."""

    key: float
    minus_index: int
    face: _Face


def _push(heap: list[_Ranked], ranked: _Ranked) -> _Face | None:
    if len(heap) < ENDS:
        heapq.heappush(heap, ranked)
        return None
    return heapq.heappushpop(heap, ranked).face


class _Histogram:
    """Images in bins that are finer than what is drawn: thousandths, and tenfold each time they are too many."""

    def __init__(self) -> None:
        self.total = 0.0
        self._exponent = -3
        self._counts: Counter[int] = Counter()

    def add(self, score: float) -> None:
        self.total += score
        self._counts[math.floor(score / 10.0**self._exponent + 1e-6)] += 1  # or 2.8 would fall below 2.8
        while len(self._counts) > MAX_BINS:
            self._exponent += 1
            coarse: Counter[int] = Counter()
            for k, count in self._counts.items():
                coarse[k // 10] += count
            self._counts = coarse

    def draw(self, summary: Summary) -> Markup:
        from mdnet_engines.report.charts import distribution

        return distribution(
            self._counts,
            10.0**self._exponent,
            summary.low,
            summary.high,
            title="Distribution of scores",
            x_label="score",
        )


@dataclass
class _Failures:
    """`counts` by status and reason, whose numbers are left out so that there are few; `first` are named."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    first: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, result: Result) -> None:
        status, reason = _shortened(result.status), _shortened(result.reason or "")
        if len(self.first) < FAILURES_NAMED:
            self.first.append((_shortened(result.path), status, reason))
        kind = (status, _NUMBER.sub("#", reason))
        self.counts[kind if kind in self.counts or len(self.counts) < MAX_REASONS else _OTHER] += 1

    def reasons(self) -> list[tuple[str, str, int]]:
        """Status, reason and count, the most common first and what has no row of its own last."""
        ordered = sorted(self.counts.items(), key=lambda item: (item[0] == _OTHER, -item[1]))
        return [(*kind, count) for kind, count in ordered]


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT // 2]}…{text[-MAX_TEXT // 2 :]}"


def _common_folder(paths: list[str]) -> str:
    """What all of `paths` begin with, up to a slash; under a picture it would be nothing but noise."""
    folder = max(paths, default="")
    while folder := folder[: folder.rfind("/", 0, -1) + 1]:
        if all(path.startswith(folder) for path in paths):
            break
    return folder


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"
