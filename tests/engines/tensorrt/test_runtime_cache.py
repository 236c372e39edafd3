"""TensorRT-RTX's kernels are compiled once and found again; whatever is wrong with what was kept, batches run."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from gpu_stand_in import Gpu, assert_same, images, reference

from mdnet_engines.system import machine
from mdnet_engines.tensorrt import runtime_cache
from mdnet_engines.tensorrt.session import TensorRTSessions

Plans = dict[Any, Path]
SIZES = (1, 2)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Path]]:
    """What lies in the user's cache, which is empty at first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda: sorted((tmp_path / "cache" / "mdnet" / "tensorrt-rtx").glob("*"))


def compiled(gpu: Gpu, plans: Plans, **options: Any) -> int:
    """How many kernels a process compiles for two sizes."""
    before = gpu.calls["compile"]
    with TensorRTSessions(
        plans, **{"runtime": "tensorrt-rtx", "max_batch": 2, "digest": "of these plans", **options}
    ) as s:
        for turn in range(3):
            for batch in SIZES:
                assert_same(s.run(images(batch, seed=turn)), {"score": reference(images(batch, seed=turn))["score"]})
    return gpu.calls["compile"] - before


def test_the_second_process_compiles_nothing(gpu: Gpu, plans: Plans, kept: Callable[[], list[Path]]) -> None:
    assert compiled(gpu, plans) == 3 * len(SIZES)
    (file,) = kept()
    content = file.read_bytes()
    assert compiled(gpu, plans) == 0
    assert kept() == [file]
    assert file.read_bytes() == content


def test_kernels_are_kept_as_soon_as_a_size_has_run(gpu: Gpu, plans: Plans, kept: Callable[[], list[Path]]) -> None:
    """A server is killed, not closed."""
    with TensorRTSessions(plans, runtime="tensorrt-rtx", max_batch=2, digest="of these plans") as sessions:
        sessions.run(images(1))
        (file,) = kept()
        one = file.read_bytes()
        sessions.run(images(2))
        two = file.read_bytes()
        assert len(two) > len(one)
        before = file.stat().st_mtime_ns
        for _ in range(3):
            sessions.run(images(2))
        sessions.graphs["vim"].run({"image": images(2)})  # its kernels are there
        assert file.stat().st_mtime_ns == before


def test_threads_compile_each_kernel_once(gpu: Gpu, plans: Plans, kept: Callable[[], list[Path]]) -> None:
    with TensorRTSessions(plans, runtime="tensorrt-rtx", max_batch=2, digest="of these plans") as sessions:
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(sessions.run, images(2, seed=n)) for n in range(12)]:
                done.result()
        assert gpu.calls["compile"] == 3


@pytest.mark.parametrize("other", ["plans", "version", "GPU"])
def test_other_plans_versions_and_gpus_have_files_of_their_own(
    gpu: Gpu, plans: Plans, kept: Callable[[], list[Path]], other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(gpu, plans)
    options = {}
    if other == "plans":
        options["digest"] = "of others"
    elif other == "version":
        monkeypatch.setattr("tensorrt_rtx.__version__", "1.8.0.1")
    else:
        gpu.current = 1
    assert compiled(gpu, plans, **options) == 3 * len(SIZES)
    assert len(kept()) == 2


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def alter(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"X")


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, alter, empty])
def test_a_damaged_file_never_reaches_native_code_and_is_replaced(
    gpu: Gpu, plans: Plans, kept: Callable[[], list[Path]], damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    compiled(gpu, plans)
    (file,) = kept()
    content = file.read_bytes()
    damage(file)
    assert compiled(gpu, plans) == 3 * len(SIZES)
    assert gpu.calls["deserialize"] == 0
    (line,) = caplog.messages
    assert line == f"{file} is damaged: TensorRT-RTX compiles its kernels anew and replaces it"
    assert file.read_bytes() == content


def test_a_file_that_tensorrt_does_not_take_is_replaced(
    gpu: Gpu, plans: Plans, kept: Callable[[], list[Path]], caplog: pytest.LogCaptureFixture
) -> None:
    """The driver was updated within its CUDA version: only TensorRT-RTX can tell."""
    compiled(gpu, plans)
    gpu.machine = "this GPU, another driver"
    assert compiled(gpu, plans) == 3 * len(SIZES)
    (line,) = caplog.messages
    assert "is of another GPU, driver or version" in line
    caplog.clear()
    assert compiled(gpu, plans) == 0
    assert caplog.messages == []


@pytest.mark.parametrize(
    "name",
    [
        *("create_runtime_cache", "set_runtime_cache", "deserialize", "serialize"),
        *("cudaGetDeviceProperties", "cudaDriverGetVersion"),
    ],
)
def test_whatever_fails_batches_run(
    gpu: Gpu, plans: Plans, kept: Callable[[], list[Path]], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    compiled(gpu, plans)
    gpu.failing = {name: gpu.calls[name] + 1}
    assert compiled(gpu, plans) in (0, 3 * len(SIZES))
    assert all(line.isprintable() and "not kept for the next start" in line for line in caplog.messages)
    assert compiled(gpu, plans) in (0, 3 * len(SIZES))


def test_a_full_disk_is_a_line_in_the_log(
    gpu: Gpu,
    plans: Plans,
    kept: Callable[[], list[Path]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runtime_cache, "new_file", full)
    assert compiled(gpu, plans) == 3 * len(SIZES)
    (line,) = caplog.messages  # not one for each size
    assert "No space left on device" in line
    assert kept() == []


def test_without_a_cache_folder_a_digest_or_tensorrt_rtx_nothing_is_kept(
    gpu: Gpu,
    plans: Plans,
    kept: Callable[[], list[Path]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG)
    compiled(gpu, plans, digest="")
    compiled(gpu, plans, runtime="tensorrt")
    monkeypatch.setattr(runtime_cache, "cache_folder", lambda name: None)
    compiled(gpu, plans)
    assert gpu.calls["create_runtime_cache"] == 0
    assert kept() == []
    assert caplog.messages == []


def test_the_folder_is_the_users_cache(kept: Callable[[], list[Path]]) -> None:
    file = runtime_cache.cache_file("a", "b")
    assert file is not None
    assert file.parent == machine.cache_folder("tensorrt-rtx")
    assert file != runtime_cache.cache_file("a b")
