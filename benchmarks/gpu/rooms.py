"""The project's packages from a checkout that nobody installed: folders under their import names."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ROOMS = {"mdnet_calib": "calib", "mdnet_engines": "engines", "mdnet_export": "export", "mdnet": "mdnet"}
ROOMS["mdnet_rt"] = "runtime"
"""Import name → folder, as pyproject.toml maps them for the wheel."""


def import_paths(scratch: Path) -> list[str]:
    """What has to be on `PYTHONPATH` for the stages: links to the rooms where they are not installed, and our helpers.

    Without an install there is no native library: ONNX Runtime then has no own operator, and the CPU's scan is a loop.
    """
    paths = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "support")]
    if any(importlib.util.find_spec(name) is None for name in ROOMS):
        paths.insert(0, str(_link(scratch / "rooms")))
    return paths


def _link(folder: Path) -> Path:
    folder.mkdir()
    for name, room in ROOMS.items():
        (folder / name).symlink_to(ROOT / room, target_is_directory=True)
    # mdnet asks for its own version.
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    facts = folder / f"mdnet-{version[1] if version else '0'}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mdnet\nVersion: {version[1] if version else 0}\n")
    return folder
