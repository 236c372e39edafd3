"""Run one ONNX graph with OpenVINO on the CPU, in the arithmetic that was asked for.

OpenVINO reads the bundle's ONNX file as it is; explicit Q/DQ pairs become its int8 kernels. It lacks SelectiveScan and
does not expand the operator's function body: Vim stays with ONNX Runtime.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from mdnet_engines.errors import MDNetError, first_line, printable
from mdnet_engines.system.cores import available_cores
from mdnet_engines.system.machine import cache_folder

Arithmetic = Literal["f32", "bf16"]
_SINK = "/sink_port_0"  # OpenVINO's name of a graph's result is the ONNX output's name and this
_ALONE = threading.Lock()
"""Held while a session opens and while it first runs. OpenVINO's binding, first asked for a type by two threads, lets
them wait for each other: one has the GIL, the other the lock of a table that both need."""
_processes: set[int] = set()
"""Those that opened a session: this one and, after a fork, those before it."""
_MAX_CACHED_BYTES = 64 * 2**20
"""Of larger graphs the compiled form is not kept: it has the weights in it again, and such a run is long anyway."""


class OpenVINOSession:
    """One graph, ready to run. Safe to call from several threads; their runs share the session's cores.

    The compiled form of a small graph is kept in the user's cache folder (`$XDG_CACHE_HOME/mdnet`).

    Args:
        path: the ONNX file; external weights are found next to it.
        threads: by default all the cores this process may use. OpenVINO takes no more than the physical ones.
        cached: keep the compiled form. Not of graphs that are tried once.
        arithmetic: of what is not int8 in the graph. It is always set: left to itself, OpenVINO computes a float32
            graph in bf16 where the CPU has it. bf16 has 8 bits of mantissa (float16 11, float32 24).

    Raises:
        MDNetError: OpenVINO is missing, or ran before this process was forked; the CPU has no native bf16; the file
            can't be loaded or holds the scan.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int = 0,
        arithmetic: Arithmetic = "f32",
        cached: bool = True,
    ):
        _refuse_after_fork()
        with _ALONE:
            self._open(path, threads or available_cores(), arithmetic, cached)

    def _open(self, path: str | os.PathLike[str], threads: int, arithmetic: Arithmetic, cached: bool) -> None:
        core = _core(_import_openvino())
        if arithmetic == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise MDNetError("this CPU has no native bf16, which openvino-bf16 needs; use the backend openvino")
        options = {
            "INFERENCE_PRECISION_HINT": arithmetic,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            # Pinned, the threads of every process that scores would be on the same first cores.
            "ENABLE_CPU_PINNING": False,
        }
        if cached and (cache := _cache_folder(Path(path))):
            options["CACHE_DIR"] = os.fspath(cache)
        try:
            self._model = core.compile_model(_read(path), "CPU", options)
        except MDNetError:
            raise
        except Exception as error:  # RuntimeError or one of the front end's own, which differ between versions
            if "mdnet." in str(error):
                raise MDNetError(f"{Path(path).name} holds the selective scan: it stays on ONNX Runtime") from None
            raise MDNetError(f"OpenVINO can't load {Path(path).name}: {_reason(error)}") from error
        if not self._model.outputs:  # what an empty file is to it
            raise MDNetError(f"OpenVINO can't load {Path(path).name}: no graph in it")
        self._specs = [_Spec.of(port) for port in self._model.inputs]
        self._idle: deque[Any] = deque()  # requests that no thread is using; each holds its own buffers
        self._has_run = False
        self.inputs: tuple[str, ...] = tuple(spec.name for spec in self._specs)
        self.outputs: tuple[str, ...] = tuple(output_name(port) for port in self._model.outputs)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph on `feeds` (input name → array, batch first); give its outputs by name.

        Raises:
            MDNetError: a feed is missing, or has a shape or type that the graph does not take.
        """
        arrays = [spec.taken_from(feeds) for spec in self._specs]
        with contextlib.nullcontext() if self._has_run else _ALONE:
            results = self._infer(arrays)
        self._has_run = True
        return results

    def _infer(self, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._model.create_infer_request()
        try:
            values = request.infer(arrays)  # copies in and out
        except Exception as error:  # the request goes with it, whatever state it is in
            raise MDNetError(f"OpenVINO failed: {_reason(error)}") from error
        self._idle.append(request)
        return {name: values[i] for i, name in enumerate(self.outputs)}


def output_name(port: Any) -> str:
    """The ONNX name of a graph's output. OpenVINO may have others for it too."""
    name: str = port.get_node().get_friendly_name().removesuffix(_SINK)
    return name


@functools.cache
def _core(openvino: Any) -> Any:
    """The process's one Core, kept to its end.

    Each Core gives the thread that opens it another stack for signals. Two that are released in the order they were
    opened leave the first one's, unmapped by then, and the next Ctrl-C is a segmentation fault.
    """
    return openvino.Core()


def _refuse_after_fork() -> None:
    # Its table of threads is one for the whole process: another session would wait, now and then, for those of before.
    if _processes - {os.getpid()}:
        raise MDNetError(
            "OpenVINO has run before this process was forked, and can't run in both; "
            "open scorers only after the fork, or take the backend onnxruntime-cpu here"
        )
    _processes.add(os.getpid())


class _Spec(NamedTuple):
    """An input of the graph; None in `shape` is any size."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]

    @classmethod
    def of(cls, port: Any) -> _Spec:
        shape = tuple(None if axis.is_dynamic else axis.get_length() for axis in port.partial_shape)
        return cls(port.get_node().get_friendly_name(), np.dtype(port.element_type.to_dtype()), shape)

    def taken_from(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        # Checked here: OpenVINO would convert another type without a word.
        if self.name not in feeds:
            raise MDNetError(f"the graph needs the input {self.name!r}; it was given {', '.join(feeds)}")
        array = feeds[self.name]
        fits = len(array.shape) == len(self.shape) and all(
            size in (None, given) for size, given in zip(self.shape, array.shape, strict=True)
        )
        if array.dtype != self.dtype or not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in self.shape)
            raise MDNetError(
                f"the input {self.name} takes {self.dtype} [{wanted}]; it was given {array.dtype} {list(array.shape)}"
            )
        return array


def is_installed() -> bool:
    """Whether OpenVINO can be imported."""
    try:
        _import_openvino()
    except MDNetError:
        return False
    return True


def _cache_folder(graph: Path) -> Path | None:
    """Where OpenVINO keeps the compiled form of a small graph; None for a large one, or where it can't be kept.

    Compiling takes most of a short run's time. OpenVINO finds an entry by graph, options, CPU and its own version, and
    compiles again where one is damaged.
    """
    data = graph.with_name(graph.name + ".data")
    try:
        if sum(file.stat().st_size for file in (graph, data) if file.exists()) > _MAX_CACHED_BYTES:
            return None
    except OSError:
        return None
    return cache_folder("openvino")


def _read(path: str | os.PathLike[str]) -> Any:
    # By the ONNX front end, not `Core.read_model`, which tries the file as every format it knows.
    from openvino.frontend import FrontEndManager

    front_end = FrontEndManager().load_by_framework("onnx")
    with _without_links(Path(path)) as file:
        return front_end.convert(front_end.load(os.fspath(file)))


@contextlib.contextmanager
def _without_links(path: Path) -> Iterator[Path]:
    """The graph, next to weights that are not links: OpenVINO refuses those that lead out of the folder, as in the
    Hugging Face cache. What is linked gets a second name (a hard link) for as long as it is read.

    Raises:
        MDNetError: the folder or the file system does not allow that.
    """
    weights = [file for file in path.parent.glob("*.data") if file.is_symlink()]
    if not weights:
        yield path
        return
    try:
        with tempfile.TemporaryDirectory(prefix=".openvino.", dir=path.parent) as folder:
            for file in [path, *weights]:
                os.link(file.resolve(), Path(folder, file.name))
            yield Path(folder, path.name)
    except OSError as error:
        raise MDNetError(
            f"{weights[0]} is a link, and OpenVINO reads no weights from links ({first_line(error)}); "
            "copy the bundle with its contents (cp -rL), or use --backend onnxruntime-cpu"
        ) from error


def _reason(error: BaseException) -> str:
    """The last line of OpenVINO's report: before it are the C++ files that the error passed through."""
    lines = [line.strip().removeprefix("-- ") for line in str(error).splitlines() if line.strip()]
    return printable(lines[-1]) if lines else type(error).__name__


def _import_openvino() -> Any:
    # Its telemetry would fork this process at the import, to report it; without that package OpenVINO has a stub.
    kept_out = "openvino_telemetry" not in sys.modules
    if kept_out:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment] # how an import is made to fail
    try:
        import openvino
    except Exception as error:
        raise MDNetError(f"OpenVINO can't be imported ({first_line(error)}); install mdnet[openvino]") from None
    finally:
        if kept_out:
            del sys.modules["openvino_telemetry"]
    return openvino
