"""What the stages measure and read: a scan's floor, scores, other programs' reports, how busy a GPU is."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gpu_scripts import module


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="needs ptxas, of the CUDA toolkit")
def test_the_kernel_of_exponentials_compiles(tmp_path: Path) -> None:
    (tmp_path / "e.ptx").write_text(module("device_facts").exponentials_ptx())
    done = subprocess.run(
        ["ptxas", "-arch=sm_90", "e.ptx", "-o", "e.cubin"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_scans_floor_is_its_bytes_and_its_exponentials(tmp_path: Path) -> None:
    import torch

    kernels, scan_time = module("kernels"), module("scan_time")
    inputs = kernels.random_tensors((2, 3, 5, 4), torch.float16, module("clock").Device("cpu"), seed=0)
    y = torch.empty_like(inputs["u"])
    context = SimpleNamespace(scratch=tmp_path)
    assert scan_time.floor(context, inputs, y) == {}  # nothing was measured
    (tmp_path / "ceilings.json").write_text('{"bytes": 100.0, "exponentials": 10.0}')
    moved = 2 * (4 * 2 * 3 * 5 + 2 * 2 * 4 * 5) + 4 * (3 * 4 + 3 + 3)  # u, delta, z, y, B, C; A, D, delta_bias
    assert scan_time.floor(context, inputs, y) == {"bytes": moved / 100, "exponentials": 2 * 3 * 5 * 4 / 10}


@pytest.mark.parametrize(
    ("code", "text", "outcome"),
    [
        (0, "18 launches\n========= ERROR SUMMARY: 0 errors\n", "ERROR SUMMARY: 0 errors"),
        (86, "========= Invalid __global__ write of size 4\n========= Error: x\n", "CheckFailed: Error: x"),
        (1, "Traceback\nValueError: wrong\n", "CheckFailed: ValueError: wrong"),
        (
            1,
            "========= Error: Device not supported.\nRuntimeError: 999\n",
            "NotSupported: compute-sanitizer: Error: Device",
        ),
    ],
)
def test_what_the_sanitizer_says_is_read(code: int, text: str, outcome: str) -> None:
    try:
        said = module("sanitizer").read("memcheck", code, text)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    assert said.startswith(outcome)


@pytest.mark.parametrize(
    ("cases", "outcome"),
    [
        (["<x/>", "<skipped message='no TensorRT'/>"], {"passed": 1, "skipped": 1, "failed": 0}),
        (["<x/>", "<failure/>"], "CheckFailed: tests.a: 1"),
        (["<x/>", "<error/>"], "CheckFailed: tests.a: 1"),
        (["<skipped message='needs a CUDA GPU'/>"], "NotSupported: needs a CUDA GPU"),
        ([], "NotSupported: there are none"),
    ],
)
def test_a_report_of_tests_is_read(cases: list[str], outcome: Any, tmp_path: Path) -> None:
    body = "".join(f'<testcase classname="tests.a" name="{i}">{case}</testcase>' for i, case in enumerate(cases))
    (tmp_path / "report.xml").write_text(f"<testsuites><testsuite>{body}</testsuite></testsuites>")
    try:
        said = module("marked_tests").read(tmp_path / "report.xml")
        said = {name: said[name] for name in outcome}
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    assert said == outcome


def test_the_scores_of_a_batch_are_held_to_pytorchs_and_to_single_images() -> None:
    import numpy as np

    model = module("model")
    true = np.array([2.0, 3.0])
    images = SimpleNamespace(pixels=np.arange(2, dtype=np.uint8).reshape(2, 1, 1, 1))
    held = model.Reference(images, {"score": true})

    def check_with(error: float, in_place: int | None = None) -> None:
        def score(pixels: Any) -> Any:
            got = true[pixels.reshape(-1)] + error
            if in_place is not None and len(got) > in_place:
                got[in_place] += 0.005
            return got

        model.check_scores(score, held, 5, "fp16", model.singles(score, held))

    check_with(0.009)
    with pytest.raises(Exception, match=r"max \|Δscore\| is 0.011, allowed is 0.01"):
        check_with(0.011)
    with pytest.raises(Exception, match=r"batch against singles is 0\.005, allowed is 0\.002"):
        check_with(0.0, in_place=4)
    with pytest.raises(Exception, match=r"max .* is nan"):
        check_with(float("nan"))


def test_pytorchs_scan_gives_the_kernel_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from mdnet.scan import loop as scan_loop
    from mdnet.scan import mamba_ssm as scan_mamba

    kernels, pytorch, given = module("kernels"), module("pytorch"), []

    def kernel(inputs: dict[str, torch.Tensor], y: torch.Tensor, *, reverse: bool) -> None:
        given.append(inputs)
        kernels._native(inputs, y, reverse=reverse)

    for name in ("available", "scan"):
        monkeypatch.setattr(scan_mamba, name, None)  # so that they are put back
    monkeypatch.setattr(pytorch, "open_kernel", lambda *_: (kernel, ""))
    pytorch.use_kernel(SimpleNamespace(device=SimpleNamespace(is_cuda=True), scratch=None))
    inputs = kernels.random_tensors((2, 6, 9, 4), torch.float16, module("clock").Device("cpu"), seed=0)
    # As the model in half precision has them: parts of larger tensors, parameters in half precision too.
    halves = [value.half().mT.contiguous().mT if value.ndim == 3 else value.half() for value in inputs.values()]
    for reverse in (False, True):
        y = scan_mamba.scan(*halves, reverse=reverse)
        expected, _ = scan_loop.scan(*halves, reverse=reverse)
        assert y.dtype is torch.float16
        torch.testing.assert_close(y, expected, rtol=2e-3, atol=2e-3)  # a rounding to half precision
    for name, value in given[0].items():
        assert value.is_contiguous()
        assert value.dtype is (torch.float32 if name in kernels.PARAMETERS else torch.float16), name


def test_operations_are_twice_the_multiply_adds() -> None:
    # By hand, of SD 1.5's encoder at 256²: 270.6 + 52.8 GFLOP; Vim-Small and fusion add a few per cent.
    operations = module("model").operations(module("sizes").FULL.config())
    assert 323e9 < operations < 350e9


def test_busy_is_the_mean_of_what_is_read_meanwhile() -> None:
    readings, read = iter([0.2, 0.4, 0.6]), threading.Event()

    def reading() -> float:
        value = next(readings, None)
        if value is None:
            read.set()
        return 0.4 if value is None else value

    assert module("busy").mean_during(lambda: read.wait(60), reading) == pytest.approx(0.4)


def test_without_nvml_busy_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_name: str) -> None:
        raise OSError

    busy = module("busy")
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(busy.BusyError, match="libnvidia-ml"):
        busy.nvml_utilisation("GPU-0")
