"""What ONNX Runtime's CUDA provider needs, on machines that lack a part of it: a fake package, real libraries."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mdnet_engines.sessions import cuda_provider
from mdnet_engines.sessions.cuda_provider import in_words, is_lost, problem
from mdnet_engines.system.gpu import Gpu

COMPILER = shutil.which("cc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")

BOTH = ["CUDAExecutionProvider", "CPUExecutionProvider"]


class FakeOrt(ModuleType):
    """onnxruntime-gpu as far as it is asked; `nvidia` are the libraries that `preload_dlls` finds."""

    __version__ = "1.31.1"
    cuda_version = "13.0"

    def __init__(self, folder: Path):
        super().__init__("onnxruntime")
        self.__file__ = str(folder / "__init__.py")
        self.providers = BOTH
        self.nvidia: list[Path] = []
        self.preloaded = 0

    def get_available_providers(self) -> list[str]:
        return self.providers

    def preload_dlls(self) -> None:
        self.preloaded += 1
        if not self.nvidia:
            say: Callable[[str], None] = getattr(self, "print", print)  # its module's own print, if it has one
            say("Failed to load libcublasLt.so.13: cannot open shared object file")
        for library in self.nvidia:
            ctypes.CDLL(str(library))


def shared_library(file: Path, *needs: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    options = ["-shared", "-nostdlib", f"-Wl,--no-as-needed,-soname,{file.name}"]
    command = [str(COMPILER), *options, "-o", file, *needs, "-x", "c", "/dev/null"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return file


@pytest.fixture
def ort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeOrt:
    """On a machine with a GPU."""
    monkeypatch.setattr(cuda_provider, "visible_gpu", lambda: Gpu("H100", "sm_90", "13.2"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return FakeOrt(tmp_path / "onnxruntime")


@pytest.fixture
def libraries(ort: FakeOrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A provider in the package that needs a library, and cuDNN: where `preload_dlls` looks and the loader does not.

    Their names are this test's own, since a library stays loaded in this process.
    """
    needed = shared_library(tmp_path / "nvidia" / f"libneeded{tmp_path.name}.so.13")
    cudnn = shared_library(tmp_path / "nvidia" / f"libcudnn{tmp_path.name}.so.9")
    monkeypatch.setattr(cuda_provider, "_CUDNN", cudnn.name)
    shared_library(tmp_path / "onnxruntime" / "capi" / "libonnxruntime_providers_cuda.so", needed)
    return [needed, cudnn]


def line(ort: Any) -> str:
    (only,) = problem(ort).splitlines()
    return only


@needs_compiler
def test_with_all_it_needs_there_is_no_problem(ort: FakeOrt, libraries: list[Path]) -> None:
    ort.nvidia = libraries
    assert problem(ort) == ""


@needs_compiler
def test_a_library_that_the_provider_needs_is_named_with_the_package_that_has_it(
    ort: FakeOrt, libraries: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    said = line(ort)
    assert f"{libraries[0].name}: cannot open shared object file" in said
    assert "for CUDA 13" in said
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]==1.31.1'" in said
    assert capfd.readouterr() == ("", "")  # though preload_dlls prints


@needs_compiler
def test_cudnn_is_missed_before_the_first_convolution(ort: FakeOrt, libraries: list[Path]) -> None:
    ort.nvidia = libraries[:1]
    assert libraries[1].name in line(ort)


@needs_compiler
def test_a_damaged_provider_is_a_reason_too(ort: FakeOrt, libraries: list[Path]) -> None:
    ort.nvidia = libraries
    provider = Path(str(ort.__file__)).parent / "capi" / "libonnxruntime_providers_cuda.so"
    provider.write_bytes(b"cut")
    assert f"{provider.name}: " in line(ort)


@needs_compiler
def test_libraries_are_preloaded_once_in_a_process(ort: FakeOrt, libraries: list[Path]) -> None:
    ort.nvidia = libraries
    with ThreadPoolExecutor(8) as pool:  # the graphs of a bundle are opened in several threads
        assert set(pool.map(problem, [ort] * 32)) == {""}
    assert ort.preloaded == 1
    assert not hasattr(ort, "print")


@pytest.mark.parametrize("chosen", [None, "", "7"])
def test_without_a_gpu_it_says_so_and_what_hides_one(
    chosen: str | None, ort: FakeOrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_provider, "visible_gpu", lambda: None)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    said = line(ort)
    assert "needs an NVIDIA GPU" in said
    assert "see nvidia-smi" in said
    assert (f"CUDA_VISIBLE_DEVICES is {chosen!r}" in said) == (chosen is not None)
    assert ort.preloaded == 0  # a gigabyte of libraries, for nothing


@pytest.mark.parametrize(
    ("driver", "built_for", "says"),
    [
        ("12.9", "13.0", "pip install 'onnxruntime-gpu[cuda,cudnn]<1.27'"),
        ("11.8", "13.0", "update it"),
        ("11.8", "12.8", "update it"),
        ("13.0", "13.0", ""),
        ("13.2", "12.8", ""),  # a driver runs what was built for older versions
    ],
)
def test_a_driver_of_an_older_major_version_is_told_from_what_the_package_is_built_for(
    driver: str, built_for: str, says: str, ort: FakeOrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_provider, "visible_gpu", lambda: Gpu("H100", "sm_90", driver))
    monkeypatch.setattr(cuda_provider, "_CUDNN", "libc.so.6")
    ort.cuda_version = built_for
    if not says:
        assert problem(ort) == ""
        return
    said = line(ort)
    assert f"for CUDA {driver}" in said
    assert f"for CUDA {built_for.partition('.')[0]}," in said
    assert says in said
    assert ("<1.27" in said) == ("<1.27" in says)


def test_the_cpu_package_is_told_what_to_install(ort: FakeOrt) -> None:
    ort.providers = BOTH[1:]
    assert "pip uninstall onnxruntime, then install mdnet[cuda]" in line(ort)


# As onnxruntime-gpu 1.31.1 raised it, on a machine with its libraries and without a GPU.
NO_DEVICE = (
    "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:154 std::conditional_t<THRW, void, "
    "onnxruntime::common::Status> onnxruntime::CudaCall(ERRTYPE, const char*, const char*, SUCCTYPE, const char*, "
    "const char*, int) [with ERRTYPE = cudaError; bool THRW = true] CUDA failure 100: no CUDA-capable device is "
    "detected ; GPU=-1 ; hostname=vm ; file=/onnxruntime_src/onnxruntime/core/providers/cuda/"
    "cuda_execution_provider.cc ; line=355 ; expr=cudaSetDevice(info_.device_id); \n\n"
)


SEE = "see nvidia-smi, and start again when it lists the GPU"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            NO_DEVICE,
            f"CUDA failure 100: no CUDA-capable device is detected; {SEE}",
        ),
        (
            "x CUBLAS failure 14: CUBLAS_STATUS_INTERNAL_ERROR ; GPU=0 ; hostname=h",
            f"CUBLAS failure 14: CUBLAS_STATUS_INTERNAL_ERROR; {SEE}",
        ),
        (
            "x CUDA failure 2: out of memory ; GPU=0 ; hostname=h",
            "CUDA failure 2: out of memory; use a smaller batch size",
        ),
        (
            "Failed to allocate memory for requested buffer of size 8",
            "Failed to allocate memory for requested buffer of size 8; use a smaller batch size",
        ),
        ("Unexpected input data type.\nmore", "Unexpected input data type."),
    ],
)
def test_an_error_of_cuda_is_told_without_its_source_line_and_with_the_next_step(text: str, words: str) -> None:
    assert in_words(RuntimeError(text)) == words
    assert is_lost(RuntimeError(text)) == (SEE in words)
