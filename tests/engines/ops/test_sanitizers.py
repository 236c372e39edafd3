"""Every native kernel under the address, undefined-behaviour and thread sanitizers, on cases of its own tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import sanitized

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[3]
FILES = (
    *("test_native.py", "test_native_states.py", "test_custom_op.py", "test_scan_v2.py", "test_product.py"),
    *("test_attention.py", "test_convolution.py", "test_quantised.py", "test_winograd.py", "test_winograd_ops.py"),
    "test_resnet.py",
)
PROGRAM = """
import ctypes, numpy
faults, threads = (ctypes.CDLL(f"{folder}/{{name}}.so") for name in ("planted", "threads"))
ones = numpy.ones(1000, numpy.float32)
x, count = ctypes.c_void_p(ones.ctypes.data), ctypes.c_size_t(1000)
{fault}
"""
FAULTS = [  # sanitizer, what a program does, and what the report calls it
    ("address,undefined", "faults.past_the_end(x, count)", "heap-buffer-overflow"),
    ("address,undefined", "faults.shifted_too_far(40)", "shift exponent 40 is too large"),
    ("thread", "faults.shared_sum(threads.team_parallel_for, x)", "data race"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of what was built with a sanitizer; skips where it can't be built."""

    @functools.cache
    def build(sanitizer: str) -> Path:
        if reason := sanitized.missing(sanitizer):
            pytest.skip(reason)
        return sanitized.build(sanitizer, tmp_path_factory.mktemp("sanitized"))

    return build


@pytest.mark.parametrize("sanitizer", sanitized.SANITIZERS)
def test_no_kernel_has_a_fault(sanitizer: str, built: Callable[[str], Path]) -> None:
    options = ["-m", "pytest", "-vv", "-s", "-p", "sanitized.plugin", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    files = [f"tests/engines/ops/{name}" for name in FILES]
    done = sanitized.run(sanitizer, built(sanitizer), [*options, *files], cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout[-30_000:]


@pytest.mark.parametrize(("sanitizer", "fault", "name"), FAULTS, ids=lambda value: value.partition("(")[0])
def test_a_planted_fault_is_found(sanitizer: str, fault: str, name: str, built: Callable[[str], Path]) -> None:
    """Or the test above would pass with a runtime that checks nothing."""
    folder = built(sanitizer)
    done = sanitized.run(sanitizer, folder, ["-c", PROGRAM.format(folder=folder, fault=fault)])
    assert done.returncode == sanitized.FAULT
    assert name in done.stdout
