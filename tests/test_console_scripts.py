"""Each command that the package installs is there and says how it is used."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib.metadata import entry_points
from pathlib import Path

import pytest

SCRIPTS = sorted(
    script.name
    for script in entry_points(group="console_scripts")
    if script.module.split(".")[0] in {"mdnet", "mdnet_export", "mdnet_rt"}
)


def test_the_three_commands_are_installed() -> None:
    assert SCRIPTS == ["mdnet", "mdnet-export", "mdnet-rt"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_answered(script: str, tmp_path: Path) -> None:
    command = Path(sysconfig.get_path("scripts"), script)
    result = subprocess.run([command, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Usage:" in result.stdout


@pytest.mark.parametrize("module", ["mdnet", "mdnet_export", "mdnet_rt"])
def test_a_command_can_be_run_as_a_module(module: str, tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-m", module, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"Usage: python -m {module}" in result.stdout
