"""ONNX Runtime's CUDA provider: whether this process can use it, else why not; its options; its errors in words.

`onnxruntime-gpu` is built for one major version of CUDA and brings none of CUDA's libraries. Its extras [cuda,cudnn]
install them where the loader does not look; `onnxruntime.preload_dlls` loads them from there. Without them ONNX Runtime
writes to stderr and goes on with the CPU, so all that it needs is tried here first, in the order of what a user has to
mend: package, GPU, driver, libraries.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import threading
from pathlib import Path
from typing import Any

from mdnet_engines.errors import first_line, printable
from mdnet_engines.system.gpu import visible_gpu

NAME = "CUDAExecutionProvider"
_LIBRARY = "libonnxruntime_providers_cuda.so"
_CUDNN = "libcudnn.so.9"  # of every onnxruntime-gpu from 1.19 on; newer ones open it at the first convolution only
_CUDA_12 = "'onnxruntime-gpu[cuda,cudnn]<1.27'"  # 1.27 is the first for CUDA 13
_PRELOADING = threading.Lock()
_FAILURE = re.compile(r"(\w+ failure \d+: .*?) ; GPU=")  # what follows is a source line, and the host's name
_NO_MEMORY = re.compile(r"out of memory|ALLOC_FAILED|Failed to allocate memory|Available memory of")


def is_installed(ort: Any) -> bool:
    """Whether this ONNX Runtime has the provider, which it lists on machines that can't run it too."""
    return NAME in ort.get_available_providers()


def problem(ort: Any) -> str:
    """Why no session can run on CUDA in this process, on one line, with what to do; empty where nothing is missing."""
    if not is_installed(ort):
        return (
            f"onnxruntime-cuda needs {NAME}; this ONNX Runtime has {', '.join(ort.get_available_providers())}. "
            "pip uninstall onnxruntime, then install mdnet[cuda]"
        )
    gpu = visible_gpu()
    if gpu is None:
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if chosen is None else f"; CUDA_VISIBLE_DEVICES is {printable(chosen)!r}"
        return f"onnxruntime-cuda needs an NVIDIA GPU; there is none, or no driver for it: see nvidia-smi{hidden}"
    built_for = str(getattr(ort, "cuda_version", "")).partition(".")[0]
    if built_for.isdigit() and int(gpu.driver.partition(".")[0]) < int(built_for):
        older = f", or pip install {_CUDA_12}" if gpu.driver.startswith("12.") and built_for == "13" else ""
        return (
            f"onnxruntime-cuda needs a driver for CUDA {built_for}, for which onnxruntime-gpu {ort.__version__} is "
            f"built; this one is for CUDA {gpu.driver}: update it{older}"
        )
    with _PRELOADING:
        _preload(ort)
    if reason := _unloadable(ort):
        return (
            f"onnxruntime-cuda can't load its libraries for CUDA {built_for} ({reason}); they come with: "
            f"pip install 'onnxruntime-gpu[cuda,cudnn]=={ort.__version__}'"
        )
    return ""


def options(*, tf32: bool) -> dict[str, str]:
    """The provider's options.

    Its GPU is the first that CUDA_VISIBLE_DEVICES leaves, which `visible_gpu` names. That is its default: to name a
    device makes 1.31 warn that no plug-in provider has it.

    Args:
        tf32: let products and convolutions of float32 round their factors to ten bits, as they do by default.
    """
    return {
        # By default cuDNN runs all its algorithms for each convolution whenever it sees a new batch size.
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": str(int(tf32)),
    }


def in_words(error: BaseException) -> str:
    """An error of ONNX Runtime on one line; where CUDA failed, what failed and what to do, without the source line."""
    text = first_line(error)
    failure = _FAILURE.search(text)
    if _NO_MEMORY.search(text):
        hint = "; use a smaller batch size"
    else:
        hint = "; see nvidia-smi, and start again when it lists the GPU" if failure else ""
    return (failure[1] if failure else text) + hint


def is_lost(error: BaseException) -> bool:
    """Whether CUDA failed in a way after which this process can't use it any more: any but a lack of memory."""
    text = first_line(error)
    return bool(_FAILURE.search(text)) and not _NO_MEMORY.search(text)


@functools.cache
def _preload(ort: Any) -> None:
    """Load CUDA's libraries from the packages of the extras, or where the loader finds them.

    PyTorch for the same CUDA has loaded these files already, and they are not loaded twice.
    """
    # It prints what it does not find, which `_unloadable` finds too; the stdout of other threads is left alone.
    ort.print = lambda *_: None
    try:
        ort.preload_dlls()
    finally:
        del ort.print


def _unloadable(ort: Any) -> str:
    """What the loader says of the provider, or of the first library that it needs and does not get; else empty."""
    provider = Path(ort.__file__).parent / "capi" / _LIBRARY
    if not provider.is_file():  # another system's name for it
        return ""
    for library in (str(provider), _CUDNN):
        try:
            ctypes.CDLL(library)  # as ONNX Runtime does; it has been imported, which the provider takes for granted
        except OSError as error:
            return first_line(error)
    return ""
