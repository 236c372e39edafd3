"""The tests that are marked as needing a GPU. Without one they are skipped, which the rows say."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from gpu.checkout import ROOT
from gpu.context import CheckFailed, Context, NotSupported
from gpu.results import Figure

_MARK = "pytest.mark." + "gpu"


def run(context: Context) -> None:
    """One row for each file that has any."""
    # Only these files, so that what others import need not be there.
    files = [file for file in sorted((ROOT / "tests").rglob("test_*.py")) if _MARK in file.read_text(encoding="utf-8")]
    names = {str(file.relative_to(ROOT)): file for file in files}
    context.expect(*names)
    for name, file in names.items():
        context.attempt(name, functools.partial(run_tests, context.scratch, file))


def run_tests(scratch: Path, file: Path) -> dict[str, Figure]:
    """Run a file's in a process of their own."""
    report = scratch / f"{file.stem}.xml"
    options = ["-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}", "--basetemp", str(scratch / "tests")]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(file)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if not report.exists():
        raise CheckFailed((done.stderr or done.stdout).strip().splitlines()[-1])
    return read(report)


def read(report: Path) -> dict[str, Figure]:
    """Counts from a JUnit report.

    Raises:
        CheckFailed: a test failed; the first is named.
        NotSupported: all were skipped; the first reason is given.
    """
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [found for case in cases if (found := case.find("skipped")) is not None]
    passed = len(cases) - len(failed) - len(skipped)
    figures: dict[str, Figure] = {"passed": passed, "skipped": len(skipped), "failed": len(failed)}
    if failed:
        raise CheckFailed(f"{failed[0].get('classname')}: {failed[0].get('name')}", figures)
    reasons = sorted({str(each.get("message")) for each in skipped})
    if not passed:
        raise NotSupported(reasons[0] if reasons else "there are none")
    return {**figures, "note": f"skipped: {'; '.join(reasons)}"[:300] if reasons else ""}
