"""The rooms: who imports whom, and what importing the runtime must not load."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(importlib.util.find_spec("importlinter") is None, reason="needs the [lint] extra")
def test_rooms_import_only_what_they_may() -> None:
    lint = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    result = subprocess.run([sys.executable, "-c", lint, "--no-cache"], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("package", ["mdnet_rt", "mdnet_engines"])
def test_importing_the_lean_side_loads_nothing_heavy(package: str, tmp_path: Path) -> None:
    heavy = {"diffusers", "onnx", "onnxruntime", "pydantic", "rich", "torch"}
    program = f"import sys, {package}; print(*sorted({heavy} & set(sys.modules)))"
    # Away from the repository, whose folder names hide the installed packages of the same name.
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
