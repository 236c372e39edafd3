"""ONNX Runtime's session: one ONNX graph on the provider that was asked for and on no other."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mdnet_engines.errors import GpuLostError, MDNetError, UsageError, first_line
from mdnet_engines.ops import native
from mdnet_engines.sessions import cuda_provider
from mdnet_engines.system.cores import available_cores

OrtBackend = Literal["onnxruntime-cpu", "onnxruntime-cuda"]
PROVIDERS: dict[OrtBackend, str] = {
    "onnxruntime-cpu": "CPUExecutionProvider",
    "onnxruntime-cuda": cuda_provider.NAME,
}
OrtValue = Any
"""`onnxruntime.OrtValue`: a tensor where the provider has it, on the GPU or on the host."""
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
        tf32: let CUDA round the factors of float32 products and convolutions to ten bits; has no effect on the CPU.
        profile: a folder for a profile of its runs, which `end_profile` ends.

    Raises:
        MDNetError: ONNX Runtime is missing, lacks the provider or what that needs, or can't load the file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        backend: OrtBackend = "onnxruntime-cpu",
        threads: int = 0,
        tf32: bool = False,
        profile: Path | None = None,
    ):
        if backend not in PROVIDERS:
            raise UsageError(f"unknown backend {backend!r}; known: {', '.join(PROVIDERS)}")
        self._ort = ort = _import_onnxruntime()
        provider = PROVIDERS[backend]
        on_gpu = provider == cuda_provider.NAME
        if on_gpu and (problem := cuda_provider.problem(ort)):
            raise MDNetError(problem)
        options = ort.SessionOptions()
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile / Path(path).stem)
        options.log_severity_level = _QUIET
        options.intra_op_num_threads = threads or available_cores()
        # Threads that spin take the cores from those that decode, or run the next graph: none between runs. Within a
        # run of a large graph they save time, since to wake one takes as long as some of its nodes.
        is_large = _is_large(Path(path))
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(is_large)))
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # With a memory pattern ONNX Runtime keeps all values in one block from the second run on, beside the memory
        # of the first run: 50 MB at full size, and no faster.
        options.enable_mem_pattern = on_gpu or not is_large
        providers: list[Any] = [PROVIDERS["onnxruntime-cpu"]]
        if on_gpu:
            providers.insert(0, (provider, cuda_provider.options(tf32=tf32)))
            ort.set_default_logger_severity(_QUIET)  # CUDA's failures go to the log of the process, not the session's
        _register_scan(options)
        try:
            # If CUDA failed, now or in a run, its fallback would print that to stdout and go on with the CPU.
            self.session = ort.InferenceSession(os.fspath(path), options, providers=providers, enable_fallback=0)
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            words = cuda_provider.in_words(error)
            raise MDNetError(f"ONNX Runtime can't load {Path(path).name}: {words}") from error
        if (running := self.session.get_providers()[0]) != provider:
            raise MDNetError(
                f"asked for {provider}, ONNX Runtime came up with {running}: is the CUDA install complete?"
            )
        self._device = "cuda" if on_gpu else "cpu"  # as `OrtValue` and `IOBinding` name it
        self.inputs: tuple[str, ...] = tuple(value.name for value in self.session.get_inputs())
        self.outputs: tuple[str, ...] = tuple(value.name for value in self.session.get_outputs())

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph on `feeds` (input name → array, batch first); give its outputs by name.

        Raises:
            MDNetError: a feed is missing, or has a shape or type that the graph does not take.
        """
        given = self._given(feeds)
        try:
            values = self.session.run(None, given)
        except Exception as error:
            raise _failed(error) from error
        return dict(zip(self.outputs, values, strict=True))

    def upload(self, rows: np.ndarray) -> OrtValue:
        """Copy `rows` to the session's device, for `run_there`; on the CPU it is the array itself.

        Raises:
            MDNetError: the device has no memory for it, or is gone.
        """
        try:
            return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(rows), self._device, 0)
        except Exception as error:
            raise _failed(error) from error

    def run_there(
        self, feeds: Mapping[str, OrtValue], outputs: Iterable[str], *, to_host: bool = False
    ) -> dict[str, OrtValue]:
        """Run the graph on values that are on its device; give `outputs`, which stay there, or come to the host.

        Raises:
            MDNetError: as `run`.
        """
        given, wanted = self._given(feeds), list(outputs)
        try:
            binding = self.session.io_binding()
            for name, value in given.items():
                binding.bind_ortvalue_input(name, value)
            for name in wanted:
                binding.bind_output(name, "cpu" if to_host else self._device, 0)
            self.session.run_with_iobinding(binding)
            return dict(zip(wanted, binding.get_outputs(), strict=True))
        except Exception as error:
            raise _failed(error) from error

    def end_profile(self) -> Path:
        """End the profile; give its file."""
        return Path(self.session.end_profiling())

    def _given(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return {name: feeds[name] for name in self.inputs}
        except KeyError as error:
            raise MDNetError(f"the graph needs the input {error}; it was given {', '.join(feeds)}") from None


def _is_large(path: Path) -> bool:
    """Whether a graph, with its external weights, computes for so long that decoding costs nothing in comparison."""
    weights = path.with_name(f"{path.name.partition('.')[0]}.onnx.data")  # of both its variants
    return sum(file.stat().st_size for file in (path, weights) if file.exists()) >= _LARGE


def _failed(error: Exception) -> MDNetError:
    kind = GpuLostError if cuda_provider.is_lost(error) else MDNetError
    return kind(f"ONNX Runtime failed: {cuda_provider.in_words(error)}")


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
    """Whether ONNX Runtime's CUDA provider can be used in this process."""
    return not cuda_problem()


def cuda_problem() -> str:
    """Why ONNX Runtime's CUDA provider can't be used in this process, on one line; empty where it can."""
    try:
        return cuda_provider.problem(_import_onnxruntime())
    except MDNetError as error:
        return str(error)


def cuda_is_installed() -> bool:
    """Whether the ONNX Runtime here is one for CUDA, whatever the machine has."""
    try:
        return cuda_provider.is_installed(_import_onnxruntime())
    except MDNetError:
        return False


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MDNetError(
            f"ONNX Runtime can't be imported ({first_line(error)}); "
            "install mdnet[cpu], or mdnet[cuda] on a machine with a GPU"
        ) from None
    return onnxruntime
