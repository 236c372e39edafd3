"""The stand-in for a GPU: what it offers is real, and it notices what it is there to notice."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import gpu_stand_in
import numpy as np
import pytest
import tensorrt_stubs
from gpu_stand_in import SIZE, Gpu, images, reference
from gpu_stand_in.networks import MEMORY

from mdnet_engines.errors import MDNetError
from mdnet_engines.tensorrt.session import TensorRTSessions

Plans = dict[Any, Path]
COMPARE = Path(gpu_stand_in.__file__).with_name("compare.py")


@pytest.mark.parametrize(("module", "package"), [("cuda.bindings.runtime", "cuda"), ("tensorrt_rtx", "tensorrt_rtx")])
def test_the_stand_in_has_nothing_that_the_real_module_lacks(module: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {module}")
    assert what_the_real_one_lacks(module) == []


def test_the_stand_in_has_nothing_that_the_real_tensorrt_lacks(tmp_path: Path) -> None:
    if reason := tensorrt_stubs.missing():
        pytest.skip(reason)
    assert what_the_real_one_lacks("tensorrt", tensorrt_stubs.environment(tmp_path)) == []


def what_the_real_one_lacks(module: str, environment: dict[str, str] | None = None) -> Any:
    command = [sys.executable, COMPARE, module]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("wait", [0, 1])
def test_a_wait_that_is_left_out_is_noticed(
    plans: Plans, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, wait: int, cuda_graphs: bool
) -> None:
    cuda, waits = sys.modules["cuda.bindings.runtime"], []
    wait_event = cuda.cudaStreamWaitEvent

    def but_one(*arguments: Any) -> Any:
        waits.append(arguments)
        return (cuda.cudaError_t.cudaSuccess,) if len(waits) % 2 == wait else wait_event(*arguments)

    monkeypatch.setattr(cuda, "cudaStreamWaitEvent", but_one)
    with TensorRTSessions(plans, max_batch=2, cuda_graphs=cuda_graphs) as sessions:
        assert not np.array_equal(sessions.run(images(2))["score"], reference(images(2))["score"])
        assert any("in no order" in problem for problem in gpu.problems)
        if cuda_graphs:
            with pytest.raises(MDNetError):
                sessions.run(images(2))
        gpu.streams[0x5001].last = None  # nobody waits for Vim now; what it had is still pending
    gpu.problems.clear()
    gpu.pending.clear()
    gpu.alive.clear()


def test_a_context_in_two_threads_and_of_two_sizes_is_noticed(plans: Plans, gpu: Gpu) -> None:
    with TensorRTSessions(plans, max_batch=2) as sessions:
        sessions.run(images(2))
        (worker,) = sessions._workers.values()
        worker._contexts[2]["vim"].set_input_shape("image", (1, SIZE, SIZE, 3))
        other = Thread(target=lambda: worker._contexts[2]["vim"].set_device_memory(0, MEMORY["vim"]))
        other.start()
        other.join()
    assert [problem.split(" ", 4)[-1] for problem in gpu.problems] == [
        "went to another batch size",
        "is used by two threads",
    ]
    gpu.problems.clear()
