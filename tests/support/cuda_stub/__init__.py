"""A CUDA driver that only notes what it is asked (`libcuda.c`), for a process of its own.

The process finds it by `environment`, as the native library does: by name. `Driver` reads what it noted.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

COMPILER = shutil.which("cc")


def environment(folder: Path, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`base` for a process whose `libcuda.so.1` is the stub; compiles that into `folder`."""
    file, source = folder / "libcuda.so.1", Path(__file__).with_name("libcuda.c")
    command = [str(COMPILER), "-shared", "-fPIC", f"-Wl,-soname,{file.name}", source, "-o", file]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    paths = [str(folder), *filter(None, [base.get("LD_LIBRARY_PATH")])]
    support = str(Path(__file__).parents[1])  # where `python -m cuda_stub.probe` is found
    modules = [support, *filter(None, [base.get("PYTHONPATH")])]
    return {**base, "LD_LIBRARY_PATH": os.pathsep.join(paths), "PYTHONPATH": os.pathsep.join(modules)}


def probing(module: str, folder: Path) -> Callable[..., Any]:
    """A function that hands requests to `python -m MODULE`, one process for each call of it, and gives its answer."""
    process = environment(folder)

    def ask(*requests: dict[str, Any]) -> Any:
        command = [sys.executable, "-m", module, json.dumps(requests)]
        result = subprocess.run(command, env=process, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return ask


class Driver:
    """The stub that this process has loaded, or will."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        for name in ("stub_record", "stub_image"):
            getattr(self._library, name).restype = ctypes.c_char_p

    def set_context(self, number: int) -> None:
        """Make another context the current one; 0 is none."""
        self._library.stub_set_context(ctypes.c_long(number))

    def refuse(self, code: int) -> None:
        """Answer launches with this error from now on."""
        self._library.stub_refuse(code)

    @property
    def image(self) -> str:
        """The module's text that was loaded last."""
        return self._library.stub_image().decode()

    @property
    def calls(self) -> list[dict[str, object]]:
        """Modules loaded (`load`: number, `context`) and kernels launched, in order."""
        return [_parsed(line) for line in self._library.stub_record().decode().splitlines()]


def _parsed(line: str) -> dict[str, object]:
    if match := re.fullmatch(r"load module (\d+) in context (\d+)", line):
        return {"load": int(match[1]), "context": int(match[2])}
    match = re.fullmatch(
        r"launch (\w+) of module (\d+) grid (.*) block (.*) shared (\d+) stream (\d+) extra 0 with (.*)", line
    )
    assert match, line
    grid, block, values = ([int(number) for number in match[group].split()] for group in (3, 4, 7))
    return {
        "kernel": match[1],
        "module": int(match[2]),
        "grid": grid,
        "block": block,
        "shared": int(match[5]),
        "stream": int(match[6]),
        "values": values,
    }
