"""TensorRT's parser takes the graphs as they are, scan's function body included, and builds engines without a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from mdnet_engines.bundle import Bundle
from mdnet_engines.manifest import GRAPH_NAMES, GraphName

SCRIPT = Path(__file__).parents[1] / "support" / "rtx_build.py"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the [rtx] extra (Linux and Windows on x86-64)"
)


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_an_engine_builds(bundle: Bundle, name: GraphName) -> None:
    command = [sys.executable, SCRIPT, bundle.graph_path(name)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert f"{name}.onnx: " in result.stdout
