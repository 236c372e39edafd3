"""The native library built with a compiler's sanitizers, and Python programs that run with it.

folder = build("thread", tmp_path)                       # half a minute
result = run("thread", folder, ["-m", "pytest", "-p", "sanitized.plugin", "-s", *files])
assert result.returncode == 0, result.stdout

Python itself has no sanitizer in it, so the runtime is preloaded. `plugin.py` gives pytest the library that was built.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mdnet_engines.system.cores import available_cores

SANITIZERS = {"address,undefined": "libasan.so", "thread": "libtsan.so"}
"""What `-fsanitize=` takes, and the runtime it needs."""
HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[2] / "engines" / "cpp"
TOOLS = ("gcc", "g++", "cmake", "make")
FAULT = 66
"""Exit code of a program in which a sanitizer found something."""
_FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-pthread", "-fno-sanitize-recover=all")
_COMPILERS = ("-DCMAKE_C_COMPILER=gcc", "-DCMAKE_CXX_COMPILER=g++")


def missing(sanitizer: str) -> str | None:
    """Why nothing can be built with `sanitizer` here; None where it can."""
    if tools := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"needs {', '.join(tools)}"
    return None if _runtime(SANITIZERS[sanitizer]) else f"GCC's {SANITIZERS[sanitizer]} is not installed"


def build(sanitizer: str, folder: Path) -> Path:
    """Build the native library of `engines/cpp`, and the other files here, with `sanitizer`; gives their folder.

    Raises:
        ValueError: a build failed.
    """
    _do("cmake", "-G", "Unix Makefiles", "-S", SOURCES, "-B", folder, f"-DMDNET_SANITIZE={sanitizer}", *_COMPILERS)
    _do("cmake", "--build", folder, "--parallel", str(available_cores()))
    for name in ("threads", "planted"):
        _do("g++", *_FLAGS, f"-fsanitize={sanitizer}", HERE / f"{name}.cpp", "-o", folder / f"{name}.so")
    return folder


def run(
    sanitizer: str, folder: Path, arguments: Sequence[str], *, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python with the sanitizer's runtime and what `build` left in `folder`, until the first fault or the end.

    Standard output has what is written to standard error too: the sanitizer's report is there.
    """
    options = f"halt_on_error=1:exitcode={FAULT}:print_stacktrace=1"
    environment = {
        **os.environ,
        # The C++ runtime too: without it the address sanitizer can't pass exceptions on.
        "LD_PRELOAD": " ".join(str(_runtime(name)) for name in (SANITIZERS[sanitizer], "libstdc++.so")),
        "ASAN_OPTIONS": f"{options}:detect_leaks=0",  # Python frees little at its end
        "UBSAN_OPTIONS": options,
        "TSAN_OPTIONS": f"{options}:suppressions={HERE / 'thread.supp'}",
        "PYTHONPATH": str(HERE.parent),
        "MDNET_SANITIZED": str(folder),
        "MDNET_SANITIZER": sanitizer,
        # NumPy's own threads, which the sanitizer can't follow.
        "OPENBLAS_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def _runtime(name: str) -> Path | None:
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = Path(found.stdout.strip())
    return path if path.is_absolute() else None  # the bare name again where GCC has no such file


def _do(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise ValueError(f"{command[0]} failed:\n{done.stdout}")
