"""The rooms: who imports whom, how large folders and files may become, and what importing the runtime must not load."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = [
    REPOSITORY / folder
    for folder in ("mdnet", "calib/mdnet_calib", "engines/mdnet_engines", "export/mdnet_export", "runtime/mdnet_rt")
]
FILES = [file for package in PACKAGES for file in sorted(package.rglob("*.py"))]
ONE_THING = {"mdnet/data/draw_face.py": "a face, stroke by stroke"}
"""Files that may be longer than others."""


def module(file: Path) -> str:
    package = next(package for package in PACKAGES if package in file.parents)
    return ".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(file): file for file in FILES}


def imports(file: Path) -> Iterator[str]:
    """The modules of ours that a file imports, wherever in it, found without importing or installing anything."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield inner if inner in MODULES else str(node.module)


def test_every_import_leads_to_a_file() -> None:
    assert {name for file in FILES for name in imports(file)} <= MODULES.keys()


def test_no_imports_run_in_a_circle() -> None:
    graph = {name: set(imports(file)) - {name} for name, file in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_folders_and_files_are_small_enough_to_read() -> None:
    many = {str(folder) for folder in {file.parent for file in FILES} if len(list(folder.glob("*.py"))) > 12}
    lengths = {str(file.relative_to(REPOSITORY)): len(file.read_text().splitlines()) for file in FILES}
    assert not many
    assert {file for file, length in lengths.items() if length > 350} <= ONE_THING.keys()


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
