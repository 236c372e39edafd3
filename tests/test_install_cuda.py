"""What mdnet[cuda] installs, in an environment without torch and with a stub for the driver: do its libraries load?"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import cuda_stub
import pytest
from small_bundle import write_small_bundle

REPOSITORY = Path(__file__).resolve().parent.parent
NO_INDEX = ("No matching distribution", "connection", "Could not fetch URL")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or not cuda_stub.COMPILER, reason="needs Linux and a C compiler"),
]


class Installed:
    """The environment. `nvidia` is where its packages have CUDA's libraries."""

    def __init__(self, folder: Path, base: dict[str, str]):
        self.python = folder / "env" / "bin" / "python"
        (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
        self.nvidia = packages / "nvidia"
        (folder / "stub").mkdir()
        self._environment = cuda_stub.environment(folder / "stub", base)
        self._environment["PYTHONPATH"] = str(REPOSITORY / "engines")

    def ask(self, program: str, *arguments: Path, capability: int = 0) -> tuple[Any, list[str]]:
        """Run a program; give all that it prints, as JSON, and the lines on stderr.

        Args:
            capability: of the GPU that the driver lists; 0 is none.
        """
        command = [str(self.python), "-c", textwrap.dedent(program), *map(str, arguments)]
        environment = {**self._environment, **({"STUB_GPU": str(capability)} if capability else {})}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout), result.stderr.splitlines()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """An environment with what the package and its extra [cuda] ask for: 3 GB, removed afterwards."""
    lines = requires("mdnet") or []
    wanted = [line.partition(";")[0] for line in lines if "extra ==" not in line or 'extra == "cuda"' in line]
    folder = tmp_path_factory.mktemp("cuda")
    try:
        venv.create(folder / "env", with_pip=True)
        ours = {"PYTHONPATH", "XDG_CACHE_HOME", "CUDA_VISIBLE_DEVICES"}  # the tests' cache has none of pip's downloads
        base = {name: value for name, value in os.environ.items() if name not in ours}
        command = [folder / "env" / "bin" / "python", "-m", "pip", "install", "-q", "--only-binary=:all:", *wanted]
        result = subprocess.run(command, env=base, capture_output=True, text=True, timeout=900)
        if result.returncode and any(words in result.stderr for words in NO_INDEX):
            pytest.skip("needs a package index that has onnxruntime-gpu")
        assert result.returncode == 0, result.stderr
        yield Installed(folder, base)
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_small_bundle(tmp_path / "bundle")


@contextmanager
def hidden(folder: Path) -> Iterator[None]:
    aside = folder.with_name(f"hidden-{folder.name}")
    folder.rename(aside)
    try:
        yield
    finally:
        aside.rename(folder)


PROBLEM = """
    import json
    from mdnet_engines.sessions.onnxruntime import cuda_problem, has_cuda
    print(json.dumps([cuda_problem(), has_cuda()]))
"""
SESSION = """
    import json, sys
    from mdnet_engines.errors import MDNetError
    from mdnet_engines.sessions import cuda_provider
    from mdnet_engines.sessions.onnxruntime import OrtSession
    from mdnet_engines.system.gpu import Gpu

    cuda_provider.visible_gpu = lambda: Gpu("gone since it was listed", "sm_90", "13.2")
    try:
        OrtSession(sys.argv[1], backend="onnxruntime-cuda")
    except MDNetError as error:
        print(json.dumps(str(error)))
"""
AUTO = """
    import json, sys
    import numpy as np
    from mdnet_engines.backends.choice import open_graphs
    from mdnet_engines.bundle.files import Bundle

    graphs = open_graphs(Bundle.open(sys.argv[1]), check=False)
    print(json.dumps([type(graphs).__name__, graphs.score(np.zeros((2, 64, 64, 3), np.uint8)).tolist()]))
"""


def test_it_comes_without_torch(installed: Installed) -> None:
    assert not (installed.nvidia.parent / "torch").exists()
    assert installed.nvidia.is_dir()


def test_all_libraries_load_and_only_a_gpu_is_missing(installed: Installed, bundle: Path) -> None:
    (said, usable), stderr = installed.ask(PROBLEM)
    assert "needs an NVIDIA GPU" in said
    assert not usable
    assert stderr == []
    assert installed.ask(PROBLEM, capability=90) == (["", True], [])
    # With the libraries loaded and our options read, ONNX Runtime asks for the device.
    said, stderr = installed.ask(SESSION, bundle / "vim.onnx")
    assert "vim.onnx: CUDA failure 100: no CUDA-capable device is detected; see nvidia-smi" in said
    assert len(said.splitlines()) == 1
    assert not any("onnxruntime" in line for line in stderr)


@pytest.mark.parametrize(("folder", "library"), [("", "libcublasLt.so."), ("cudnn", "libcudnn.so.9")])
def test_without_an_extra_the_missing_library_is_named(folder: str, library: str, installed: Installed) -> None:
    with hidden(installed.nvidia / folder):
        (said, usable), stderr = installed.ask(PROBLEM, capability=90)
    assert library in said
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]==" in said
    assert not usable
    assert stderr == []


@pytest.mark.parametrize(("complete", "reason"), [(True, "needs an NVIDIA GPU"), (False, "libcublasLt.so.")])
def test_auto_scores_on_the_cpu_with_one_line_why(
    complete: bool, reason: str, installed: Installed, bundle: Path
) -> None:
    if complete:
        graphs, stderr = installed.ask(AUTO, bundle)
    else:
        with hidden(installed.nvidia):
            graphs, stderr = installed.ask(AUTO, bundle, capability=90)
    assert graphs == ["Graphs", [0.0, 0.0]]
    stderr = [line for line in stderr if "native library" not in line]  # these sources have none beside them
    assert len(stderr) == 1
    assert stderr[0].startswith("note: passed over: onnxruntime-cuda ")
    assert reason in stderr[0]
