"""How large the values of a graph become on calibration images: one histogram of magnitudes for each tensor.

A histogram serves both range methods, so that trying the other one costs no run of the graph:

- `percentile`: all but one value in 10,000 keep their place; the rest is cut.
- `minmax`: the largest magnitude seen. Nothing is cut, and one outlier coarsens every value.

Ranges are symmetric, as TensorRT wants them: a threshold T stands for [−T, T].
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnx import TensorProto, helper

from mdnet_calib.calibration_set import RangeMethod
from mdnet_engines.errors import MDNetError
from mdnet_engines.progress import SILENT, Progress
from mdnet_engines.sessions.onnxruntime import OrtSession

BINS = 2048  # of a histogram; a magnitude is then known to 0.1 % of the largest one, finer than the levels of int8
PERCENTILE = 99.99
_SAMPLES = 2**18  # values that one image adds to a tensor's histogram; the largest is taken from all of them


@dataclass
class Histogram:
    """Magnitudes of one tensor: `counts[i]` of them lie in bin i of `BINS` equal ones from 0 to `limit`."""

    limit: float = 0.0
    largest: float = 0.0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, values: np.ndarray) -> None:
        """Count values of any shape.

        Raises:
            MDNetError: one of them is not finite.
        """
        if not values.size:
            return
        magnitudes = np.abs(values).ravel()
        largest = float(magnitudes.max())
        if not np.isfinite(largest):
            raise MDNetError("a value is not finite")
        self.largest = max(self.largest, largest)
        if largest > self.limit:
            self._widen(largest)
        if self.limit:
            if magnitudes.size > _SAMPLES:
                # At random: every so-manieth value would be of the same few channels, or columns of an image.
                magnitudes = magnitudes[np.random.default_rng(magnitudes.size).integers(magnitudes.size, size=_SAMPLES)]
            self.counts += np.histogram(magnitudes.astype(np.float64), BINS, (0.0, self.limit))[0]

    def _widen(self, largest: float) -> None:
        """Double the range until it holds `largest`; each doubling joins the bins in pairs, which loses no count."""
        if not self.limit:
            self.limit = largest
        while self.limit < largest:
            self.limit *= 2
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2, np.int64)])

    def threshold(self, method: RangeMethod) -> float:
        """The T of the range [−T, T] by `method`; 0 where every value was 0."""
        if not self.largest or method == "minmax":
            return self.largest
        share = np.cumsum(self.counts) / self.counts.sum()
        bins = int(np.searchsorted(share, PERCENTILE / 100)) + 1
        return min(bins / BINS * self.limit, self.largest)


def collect(
    proto: onnx.ModelProto,
    tensors: Collection[str],
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    progress: Progress = SILENT,
) -> dict[str, Histogram]:
    """Run the graph on each of `feeds` and count the magnitudes of `tensors`.

    Give one image at a time: all of `tensors` are in memory at once (0.7 GB for an image in `sd15-vim-s`).

    Raises:
        MDNetError: a value is not finite; the message names its tensor.
    """
    histograms = {name: Histogram() for name in tensors}
    with TemporaryDirectory(prefix="mdnet-calib-") as folder:
        probed = onnx.ModelProto()
        probed.CopyFrom(proto)
        session = OrtSession(_with_outputs(probed, tensors, Path(folder)))
        advance = progress.count("calibration images through the graph", len(feeds))
        for feed in feeds:
            outputs = session.run(feed)
            for name, histogram in histograms.items():
                try:
                    histogram.add(outputs[name])
                except MDNetError as error:
                    raise MDNetError(f"{name}: {error} on a calibration image") from None
            advance(1)
    return histograms


def largest_magnitudes(
    proto: onnx.ModelProto,
    feeds: Iterable[Mapping[str, np.ndarray]],
) -> dict[str, float]:
    """The largest magnitude of every float32 value of the graph, inputs included, over all of `feeds`.

    Infinite or NaN values give `inf`. Computed inside the graph, so that no tensor is ever copied out of it.
    """
    typed = (*proto.graph.input, *proto.graph.value_info, *proto.graph.output)
    known = {value.name: value.type.tensor_type.elem_type for value in typed}
    every = [value.name for value in proto.graph.input] + [name for node in proto.graph.node for name in node.output]
    names = [name for name in every if known.get(name) == TensorProto.FLOAT]
    probed = onnx.ModelProto()
    probed.CopyFrom(proto)
    for i, name in enumerate(names):
        probed.graph.node.append(helper.make_node("Abs", [name], [f"magnitude_{i}"]))
        probed.graph.node.append(helper.make_node("ReduceMax", [f"magnitude_{i}"], [f"largest_{i}"], keepdims=0))
        # ONNX Runtime's maximum skips a NaN; a sum does not.
        probed.graph.node.append(helper.make_node("ReduceSum", [f"magnitude_{i}"], [f"sum_{i}"], keepdims=0))
    del probed.graph.output[:]
    found = dict.fromkeys(names, 0.0)
    with TemporaryDirectory(prefix="mdnet-calib-") as folder:
        probes = [f"{kind}_{i}" for i in range(len(names)) for kind in ("largest", "sum")]
        session = OrtSession(_with_outputs(probed, probes, Path(folder)))
        for feed in feeds:
            outputs = session.run(feed)
            for i, name in enumerate(names):
                finite = np.isfinite(outputs[f"sum_{i}"])
                found[name] = max(found[name], float(outputs[f"largest_{i}"]) if finite else np.inf)
    return found


def _with_outputs(proto: onnx.ModelProto, tensors: Collection[str], folder: Path) -> Path:
    """Write the graph with `tensors` among its outputs; `proto` is used up, its weights are in the file alone then."""
    outputs = {value.name for value in proto.graph.output}
    proto.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in tensors if name not in outputs
    )
    file = folder / "probed.onnx"
    onnx.save(proto, file, save_as_external_data=True, location="probed.data", size_threshold=1024)
    return file
