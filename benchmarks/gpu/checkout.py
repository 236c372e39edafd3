"""This checkout, and where its packages are for a machine that nobody installed them on."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = {
    "mdnet": "",
    "mdnet_calib": "calib",
    "mdnet_engines": "engines",
    "mdnet_export": "export",
    "mdnet_rt": "runtime",
}
"""Import name → the folder that holds it."""


def import_paths() -> list[str]:
    """What has to be on `PYTHONPATH` for the stages: our helpers, and the packages where they are not installed.

    Without an install there is no native library: ONNX Runtime then has no own operator, and the CPU's scan is a loop.
    """
    paths = [ROOT / "benchmarks", ROOT / "tests" / "support"]
    if any(importlib.util.find_spec(name) is None for name in PACKAGES):
        paths += [ROOT / folder for folder in PACKAGES.values()]
    return [str(path) for path in paths]
