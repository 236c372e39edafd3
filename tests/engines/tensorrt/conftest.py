"""What the tests of the TensorRT plugins share."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_stub
import pytest
import tensorrt_stubs

SUPPORT = Path(__file__).parents[2] / "support"


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Put a question to `probe.py`, in a process of its own."""
    if reason := tensorrt_stubs.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("tensorrt")
    environment = cuda_stub.environment(folder, tensorrt_stubs.environment(folder))

    def put(question: str, **argument: Any) -> Any:
        command = [sys.executable, SUPPORT / "tensorrt_stubs" / "probe.py", question, json.dumps(argument)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return put
