"""Operators that call every entry of our header of ONNX Runtime's C interface (`slots.cpp`), to be used by `probe`."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

COMPILER = shutil.which("c++")
ROOM = Path(__file__).resolve().parents[3] / "engines" / "cpp"
HEADER = Path("onnxruntime", "c_api.h")


def entries(header: str) -> list[str]:
    """The functions in the structures of `c_api.h`, by name."""
    return [name for name in re.findall(r"\(\*(\w+)\)\(", header) if name != "task"]  # an argument


def build(folder: Path, header: str | None = None) -> Path:
    """Compile the operators into `folder`, with another text of the header in place of ours if it is given."""
    include = ROOM
    if header is not None:
        include = folder / "include"
        (include / HEADER).parent.mkdir(parents=True)
        (include / HEADER).write_text(header)
    library = folder / "libslots.so"
    source = Path(__file__).with_name("slots.cpp")
    command = [str(COMPILER), "-std=c++17", "-shared", "-fPIC", "-pthread", f"-I{include}", source, "-o", library]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return library
