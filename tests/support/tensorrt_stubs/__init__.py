"""TensorRT's Python bindings on a machine where TensorRT's libraries can't be installed.

NVIDIA publishes the bindings and the lean runtime as ordinary wheels, the builder and the parser not. Three libraries
of a few lines take their place, so that `import tensorrt` succeeds and its plugin registry is the real one; a `Builder`
or an `OnnxParser` can't be had. `probe.py` runs in a process of its own: native code may end the process.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")
# What the package `tensorrt` of the full wheel is: the bindings under that name.
FRONT_END = {
    "__init__.py": "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n",
    "plugin/__init__.py": "from tensorrt_bindings.plugin import *\n",
}


def missing() -> str | None:
    """Why the bindings can't be used here, or None."""
    if importlib.util.find_spec("tensorrt_libs"):
        return None
    for package in ("tensorrt_bindings", "tensorrt_lean_libs"):
        if importlib.util.find_spec(package) is None:
            return "needs tensorrt-cu13-bindings and tensorrt-lean-cu13-libs"
    return None if shutil.which("cc") else "needs a C compiler"


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process that is to find the bindings; compiles the libraries into `folder`.

    Where TensorRT is installed in full, that is the one to test, and the environment is this process's own.
    """
    if importlib.util.find_spec("tensorrt_libs"):
        return dict(os.environ)
    for name in LIBRARIES:
        file = folder / f"{name}.so.11"
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{file.name}", HERE / f"{name}.c", "-o", file, "-ldl"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    for name, text in FRONT_END.items():
        file = folder / "tensorrt" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    lean = importlib.util.find_spec("tensorrt_lean_libs")
    assert lean is not None
    assert lean.origin is not None
    before = {"LD_LIBRARY_PATH": [str(folder), str(Path(lean.origin).parent)], "PYTHONPATH": [str(folder)]}
    joined = {name: os.pathsep.join([*paths, *filter(None, [os.environ.get(name)])]) for name, paths in before.items()}
    return {**os.environ, **joined}
