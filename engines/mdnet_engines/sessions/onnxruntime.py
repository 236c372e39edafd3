"""ONNX Runtime's session: one ONNX graph on the provider that was asked for and on no other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mdnet_engines.errors import MDNetError, UsageError, first_line
from mdnet_engines.ops import native
from mdnet_engines.system.cores import available_cores
from mdnet_engines.system.gpu import visible_gpu

if TYPE_CHECKING:
    pass

OrtBackend = Literal["onnxruntime-cpu", "onnxruntime-cuda"]
PROVIDERS: dict[OrtBackend, str] = {
    "onnxruntime-cpu": "CPUExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
}
_LARGE = 8 << 20  # bytes: the demo's graphs have up to 3 MB, the full size's 25 to 1,440
_QUIET = 4  # ONNX Runtime's "fatal" severity: what fails is raised, and need not be in its log as well


class OrtSession:
    """One graph, ready to run. Safe to call from several threads.

    The native kernels of the selective scan are registered with it, where the package was installed with them.

    Args:
        path: the ONNX file; external weights are found next to it.
        backend: which provider must run it. CUDA keeps CPU as the provider of what CUDA has no kernel for
            (shape arithmetic), but a session that came up without CUDA is refused: ONNX Runtime falls back silently.
        threads: intra-op threads; by default all the cores this process may use.

    Raises:
        MDNetError: ONNX Runtime is missing, lacks the provider, or can't load the file.
    """

    def __init__(self, path: str | os.PathLike[str], *, backend: OrtBackend = "onnxruntime-cpu", threads: int = 0):
        if backend not in PROVIDERS:
            raise UsageError(f"unknown backend {backend!r}; known: {', '.join(PROVIDERS)}")
        ort = _import_onnxruntime()
        provider = PROVIDERS[backend]
        if provider not in ort.get_available_providers():
            raise MDNetError(
                f"{backend} needs {provider}; this ONNX Runtime has {', '.join(ort.get_available_providers())}. "
                "pip uninstall onnxruntime, then install mdnet[cuda]"
            )
        options = ort.SessionOptions()
        options.log_severity_level = _QUIET
        options.intra_op_num_threads = threads or available_cores()
        # Threads that spin take the cores from those that decode, or run the next graph: none between runs. Within a
        # run of a large graph they save time, since to wake one takes as long as some of its nodes.
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(_is_large(Path(path)))))
        options.add_session_config_entry("session.force_spinning_stop", "1")
        providers = [provider] if provider == "CPUExecutionProvider" else [provider, "CPUExecutionProvider"]
        _register_scan(options)
        try:
            self.session = ort.InferenceSession(os.fspath(path), options, providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise MDNetError(f"ONNX Runtime can't load {Path(path).name}: {first_line(error)}") from error
        if (running := self.session.get_providers()[0]) != provider:
            raise MDNetError(
                f"asked for {provider}, ONNX Runtime came up with {running}: is the CUDA install complete?"
            )
        self.inputs: tuple[str, ...] = tuple(value.name for value in self.session.get_inputs())
        self.outputs: tuple[str, ...] = tuple(value.name for value in self.session.get_outputs())

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph on `feeds` (input name → array, batch first); give its outputs by name.

        Raises:
            MDNetError: a feed is missing, or has a shape or type that the graph does not take.
        """
        try:
            values = self.session.run(None, {name: feeds[name] for name in self.inputs})
        except KeyError as error:
            raise MDNetError(f"the graph needs the input {error}; it was given {', '.join(feeds)}") from None
        except Exception as error:
            raise MDNetError(f"ONNX Runtime failed: {first_line(error)}") from error
        return dict(zip(self.outputs, values, strict=True))


def _is_large(path: Path) -> bool:
    """Whether a graph, with its external weights, computes for so long that decoding costs nothing in comparison."""
    weights = path.with_name(f"{path.name.partition('.')[0]}.onnx.data")  # of both its variants
    return sum(file.stat().st_size for file in (path, weights) if file.exists()) >= _LARGE


def _register_scan(options: Any) -> None:
    library = native.custom_op_library()
    if library is None:
        native.say_it_is_missing()
        return
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:
        raise MDNetError(native.BROKEN.format(library.name, first_line(error))) from error


def has_cuda() -> bool:
    """Whether ONNX Runtime has its CUDA provider and the driver has a GPU; the provider exists without a GPU too."""
    try:
        ort = _import_onnxruntime()
    except MDNetError:
        return False
    return PROVIDERS["onnxruntime-cuda"] in ort.get_available_providers() and visible_gpu() is not None


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MDNetError(
            f"ONNX Runtime can't be imported ({first_line(error)}); "
            "install mdnet[cpu], or mdnet[cuda] on a machine with a GPU"
        ) from None
    return onnxruntime
