"""How the native library launches the CUDA kernel, for ONNX Runtime and for TensorRT's just-in-time plugin.

There is no GPU: the CUDA driver is a stub that notes its calls (tests/support/cuda_stub). What the kernel does with
these arguments is tests/engines/cuda/test_kernel.py.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import cuda_stub
import pytest
from cuda_stub.probe import TENSORS

from mdnet_engines.cuda import kernel as cuda_kernel
from mdnet_engines.ops import native

CALL = {
    "batch": 5,
    "channels": 33,
    "length": 197,
    "states": 16,
    "dtype": "float32",
    "reverse": False,
    "stream": 0x57,
}

pytestmark = pytest.mark.skipif(
    native.custom_op_library() is None or cuda_stub.COMPILER is None, reason="needs the native library and a C compiler"
)

Launch = Callable[..., Any]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Make calls, in one process, and give what was said and noted."""
    return cuda_stub.probing("cuda_stub.probe", tmp_path_factory.mktemp("cuda"))


def test_every_kernel_is_launched_by_its_name(launch: Launch) -> None:
    states = (1, 4, 5, 16, 17, 64)
    kinds = list(itertools.product((False, True), ("float32", "float16", "bfloat16"), states, (False, True)))
    answer = launch(*({**CALL, "reverse": r, "dtype": d, "states": n, "batch": 1 if s else 64} for r, d, n, s in kinds))
    assert not any(answer["said"])
    expected = [
        cuda_kernel.kernel_name(reverse=r, dtype=d, states=n, small=s and cuda_kernel.has_small(n))  # type: ignore[arg-type]
        for r, d, n, s in kinds
    ]
    assert [call["kernel"] for call in answer["calls"] if "kernel" in call] == expected
    assert answer["image"] == cuda_kernel.ptx()


@pytest.mark.parametrize("states", [4, 16, 17])
@pytest.mark.parametrize("channels", [1, 8, 32, 33, 768])
def test_grid_and_arguments_are_the_kernels(channels: int, states: int, launch: Launch) -> None:
    answer = launch({**CALL, "channels": channels, "states": states})
    (call,) = (call for call in answer["calls"] if "kernel" in call)
    small = cuda_kernel.is_small(CALL["batch"], channels, states)
    assert call["kernel"].endswith("_small") == small
    blocks = -(-channels // (8 if small else 32))
    assert call["grid"] == [CALL["batch"], blocks, 1]
    assert call["block"] == [cuda_kernel.THREADS, 1, 1]
    assert (call["shared"], call["stream"]) == (0, CALL["stream"])
    sizes = {**CALL, "channels": channels, "states": states}
    expected = [sizes.get(name, 4096 * (i + 1)) for i, name in enumerate(cuda_kernel.ARGUMENTS)]
    assert call["values"] == expected


@pytest.mark.parametrize(
    "change",
    [
        {"groups": 3},
        {"groups": 1, "state": True},
        {"softplus": False},
        *({"without": [name]} for name in ("D", "z", "delta_bias")),
        {"groups": 33, "softplus": False, "state": True, "without": ["D", "z", "delta_bias"]},
    ],
    ids=str,
)
def test_what_version_2_adds_takes_its_kernel_with_null_for_what_is_missing(
    change: dict[str, Any], launch: Launch
) -> None:
    answer = launch({**CALL, **change})
    assert not any(answer["said"])
    (call,) = (call for call in answer["calls"] if "kernel" in call)
    groups = change.get("groups", 1)
    assert call["kernel"] == cuda_kernel.kernel_name(reverse=False, dtype="float32", states=16, version=2)
    assert call["grid"] == [CALL["batch"], -(-CALL["channels"] // groups // 32), groups]
    at = {name: 4096 * (i + 1) for i, name in enumerate(TENSORS)}
    missing = {*change.get("without", ()), *(() if "state" in change else ("h0", "h_last"))}
    scalars = {
        **{"channels": CALL["channels"] // groups, "length": CALL["length"], "states": CALL["states"]},
        **{"groups": groups, "softplus": int(change.get("softplus", True))},
    }
    expected = [0 if name in missing else scalars.get(name, at.get(name)) for name in cuda_kernel.ARGUMENTS_V2]
    assert call["values"] == expected


def test_one_group_with_everything_there_is_version_1(launch: Launch) -> None:
    answer = launch({**CALL, "groups": 1})
    assert [call["kernel"] for call in answer["calls"] if "kernel" in call] == [
        cuda_kernel.kernel_name(reverse=False, dtype="float32", states=16, small=True)
    ]


def test_the_sizes_alone_choose_the_kernel(launch: Launch) -> None:
    limit = cuda_kernel.SMALL_BLOCKS
    sizes = [(1, 8 * limit), (1, 8 * limit + 1), (limit, 8), (limit, 9), (limit + 1, 1), (2, 768), (3, 768), (4, 384)]
    answer = launch(*({**CALL, "batch": batch, "channels": channels} for batch, channels in sizes))
    small = [call["kernel"].endswith("_small") for call in answer["calls"] if "kernel" in call]
    assert small == [cuda_kernel.is_small(batch, channels, CALL["states"]) for batch, channels in sizes]
    assert small == [True, False, True, False, False, True, False, True]


def test_a_context_loads_the_module_once(launch: Launch) -> None:
    answer = launch(*({**CALL, "context": context} for context in (1, 1, 2, 1, 2)))
    loads = [(call["load"], call["context"]) for call in answer["calls"] if "load" in call]
    assert loads == [(1, 1), (2, 2)]
    assert [call["module"] for call in answer["calls"] if "kernel" in call] == [1, 1, 2, 1, 2]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"states": 65}, "at most 64 states"),
        ({"length": 2**25}, "fewer than 2^25 steps"),
        ({"dtype": "float64"}, "no float64"),
        ({"channels": 65536, "groups": 65536}, "at most 65535 groups"),
        ({"context": 0}, "invalid device context"),
        ({"refuse": 2}, "out of memory"),
    ],
)
def test_what_can_not_be_launched_is_one_line(change: dict[str, Any], says: str, launch: Launch) -> None:
    (said,) = launch({**CALL, **change})["said"]
    assert says in said
    assert len(said.splitlines()) == 1


def test_no_driver_is_one_line() -> None:
    program = "from mdnet_engines.ops import native; native.run_cuda(native.Scan(1, 1, 1, 1, 0, 0, 0), 0)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    if "libcuda.so.1" not in result.stderr:
        pytest.skip("there is a CUDA driver here")
    assert "is the NVIDIA driver installed?" in result.stderr
