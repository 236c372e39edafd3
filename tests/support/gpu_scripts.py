"""`benchmarks/gpu_check.py` for its tests: its modules, and the command itself."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "benchmarks" / "gpu_check.py"
sys.path.append(str(SCRIPT.parent))  # at the end: it has modules of common names
gpu_check = importlib.import_module("gpu_check")
sys.path.remove(str(SCRIPT.parent))


def module(name: str) -> Any:
    """A module of `benchmarks/gpu`; those of the stages import PyTorch."""
    return importlib.import_module(f"gpu.{name}")


check, checkout, claims, process, render, results = map(
    module, ("check", "checkout", "claims", "process", "render", "results")
)
STAGES = [stage.name for stage in check.STAGES]
DAY = "2026-11-25"  # of runs that are made up


def command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=1200, **options
    )
