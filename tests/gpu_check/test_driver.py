"""Launches through CUDA's driver alone; a stub stands for it and records the calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cuda_stub
import pytest
from gpu_scripts import SCRIPT

LAUNCH = """
import json
from types import SimpleNamespace
from cuda_stub import Driver
from gpu.driver import ScanKernel
from mdnet_engines.cuda.kernel import ARGUMENTS
def tensor(name, *shape):
    address = 4096 * (ARGUMENTS.index(name) + 1)
    return SimpleNamespace(shape=shape, dtype="torch.float16", data_ptr=lambda: address, is_contiguous=lambda: True)
B, D, L, N = 5, 33, 197, 17
steps = {name: tensor(name, B, D, L) for name in ("u", "delta", "z")}
mixes = {name: tensor(name, B, N, L) for name in ("B", "C")}
others = {"A": tensor("A", D, N), "D": tensor("D", D), "delta_bias": tensor("delta_bias", D)}
driver = Driver()
kernel = ScanKernel()
kernel({**steps, **mixes, **others}, tensor("y", B, D, L), reverse=True, stream=0x57)
sixteen = {**others, "A": tensor("A", D, 16)}
for small in (None, False):
    kernel({**steps, **mixes, **sixteen}, tensor("y", B, D, L), reverse=True, small=small, stream=0x57)
groups = {"A": tensor("A", 66, N), "B": tensor("B", B, 2, N, L), "C": tensor("C", B, 2, N, L)}
kernel({"u": tensor("u", B, 66, L), "delta": tensor("delta", B, 66, L), **groups}, tensor("y", B, 66, L), reverse=False,
       softplus=False, stream=0x57)
said = ""
driver.refuse(2)
try:
    kernel({**steps, **mixes, **others}, tensor("y", B, D, L), reverse=True, stream=0)
except Exception as error:
    said = str(error)
print(json.dumps({"calls": driver.calls, "image": len(driver.image), "said": said}))
"""


@pytest.mark.skipif(cuda_stub.COMPILER is None, reason="needs a C compiler")
def test_the_launch_has_the_kernels_grid_and_arguments(tmp_path: Path) -> None:
    from mdnet_engines.cuda import kernel as cuda_kernel

    environment = cuda_stub.environment(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parent), environment["PYTHONPATH"]])
    done = subprocess.run([sys.executable, "-c", LAUNCH], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["image"] == len(cuda_kernel.ptx())
    _, call, *other, version_2 = answer["calls"]
    assert [(each["kernel"], each["grid"]) for each in other] == [
        ("selective_scan_reverse_f16_n16_small", [5, 5, 1]),
        ("selective_scan_reverse_f16_n16", [5, 2, 1]),
    ]
    assert call["kernel"] == cuda_kernel.kernel_name(reverse=True, dtype="float16", states=17)
    assert (call["grid"], call["block"], call["shared"], call["stream"]) == ([5, 2, 1], [128, 1, 1], 0, 0x57)
    sizes = {"channels": 33, "length": 197, "states": 17}
    assert call["values"] == [sizes.get(name, 4096 * (i + 1)) for i, name in enumerate(cuda_kernel.ARGUMENTS)]
    assert version_2["kernel"] == cuda_kernel.kernel_name(reverse=False, dtype="float16", states=17, version=2)
    assert version_2["grid"] == [5, 2, 2]
    sizes |= {"groups": 2, "softplus": 0, **dict.fromkeys(("D", "z", "delta_bias", "h0", "h_last"), 0)}
    assert version_2["values"] == [
        sizes[name] if name in sizes else 4096 * (cuda_kernel.ARGUMENTS.index(name) + 1)
        for name in cuda_kernel.ARGUMENTS_V2
    ]
    assert "cuLaunchKernel: out of memory (2)" in answer["said"]


BUFFERS = """
import numpy as np
from gpu import driver
from gpu.driver import Buffer
driver.start()
values = np.array([[1.0, -2.5, 3.14159, 1e-3]], np.float32)
print([Buffer(values, dtype).read().astype(float).tolist() for dtype in ("float32", "float16", "bfloat16")])
print(Buffer(values, "float16").shape, Buffer(values, "float16").data_ptr() > 2**20)
"""


@pytest.mark.skipif(cuda_stub.COMPILER is None, reason="needs a C compiler")
def test_what_runs_under_the_sanitizer_talks_to_the_driver_alone(tmp_path: Path) -> None:
    import numpy as np

    environment = cuda_stub.environment(tmp_path) | {"STUB_GPU": "90"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parent), environment["PYTHONPATH"]])

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, *arguments]
        return subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    done = python("-c", BUFFERS)
    assert done.returncode == 0, done.stderr
    values, facts = done.stdout.splitlines()
    for got, precision in zip(json.loads(values), (2**-24, 2**-11, 2**-7), strict=True):
        np.testing.assert_allclose(got, [[1.0, -2.5, 3.14159, 1e-3]], rtol=precision)
    assert facts == "(1, 4) True"
    # The stub computes nothing: what the outputs were filled with before must be noticed.
    done = python("-m", "gpu.sanitizer", "cuda", ".")
    assert (done.returncode, done.stderr) == (1, "float32, (1, 33, 19, 16): not finite\n")
    assert "torch" not in python("-X", "importtime", "-m", "gpu.sanitizer", "cuda", ".").stderr
