"""What becomes of an image, what made its score, and the counts of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdnet_engines.bundle.files import Bundle
from mdnet_rt.rows.result import Result, Stamp, Summary

GOOD = Result("a.jpg", 3.14159265, width=350, height=349)
BAD = Result("b.jpg", None, "unreadable", "empty file")


@pytest.mark.parametrize("status", ["unreadable", "not_finite", "no_face", "several_faces"])
def test_a_result_is_ok_by_its_status_alone(status: str) -> None:
    assert GOOD.ok
    assert not Result("b.jpg", None, status, "why").ok


def test_a_stamp_names_the_model_and_the_digest_of_what_decides_its_scores(shared_bundle: Path) -> None:
    manifest = Bundle.open(shared_bundle).manifest
    assert Stamp.of(manifest) == Stamp("tiny fp32", manifest.digest()[:12])


@pytest.mark.parametrize(
    ("results", "line"),
    [
        ([GOOD, BAD], "2 images: 1 scored, 1 failed, 0.5 s, 4.0 images/s; scores 3.1 to 3.1"),
        ([BAD], "1 image: 0 scored, 1 failed, 0.5 s, 2.0 images/s"),
        ([GOOD, Result("c", 1.94)], "2 images: 2 scored, 0 failed, 0.5 s, 4.0 images/s; scores 1.9 to 3.1"),
        (
            [GOOD, Result("c", 1.94, reason="one flat colour"), BAD],
            "3 images: 2 scored (1 with a warning), 1 failed, 0.5 s, 6.0 images/s; scores 1.9 to 3.1",
        ),
        ([], "0 images: 0 scored, 0 failed, 0.5 s, 0.0 images/s"),
    ],
)
def test_summary_counts_in_one_line(results: list[Result], line: str) -> None:
    summary = Summary()
    for result in results:
        summary.add(result)
    assert summary.line(0.5) == line
