"""How large the values of a graph become on calibration images: one histogram of magnitudes for each tensor.

A histogram serves every range method, so that trying another one costs no run of the graph:

- `minmax`: the largest magnitude seen. Nothing is cut, and one outlier coarsens every value.
- `percentile`: all but one value in 10,000 keep their place; the rest is cut.
- `entropy`: the range whose 128 levels lose the least information (Kullback-Leibler divergence; the method of
  S. Migacz, "8-bit inference with TensorRT", GTC 2017).
- `mse`: the range with the least mean squared error of rounding and cutting together.

Ranges are symmetric, as TensorRT wants them: a threshold T stands for [−T, T].
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import numpy as np
import onnx
from onnx import TensorProto, helper

from mdnet_engines.bundle.manifest import RangeMethod
from mdnet_engines.errors import MDNetError
from mdnet_engines.sessions.onnxruntime import OrtSession

RANGE_METHODS: tuple[RangeMethod, ...] = get_args(RangeMethod)

BINS = 2048  # of a histogram; a magnitude is then known to 0.1 % of the largest one, finer than 127 levels can use
LEVELS = 127  # magnitudes that a symmetric int8 value can have, zero apart
PERCENTILE = 99.99
_SAMPLES = 2**18  # values that one image adds to a tensor's histogram; the largest is taken from all of them
_SMALLEST_CUT = 0.1  # entropy and mse try no range below a tenth of the largest magnitude


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
        if method == "percentile":
            share = np.cumsum(self.counts) / self.counts.sum()
            return min(self._edge(int(np.searchsorted(share, PERCENTILE / 100)) + 1), self.largest)
        loss = _information_lost if method == "entropy" else _squared_error
        used = int(np.ceil(self.largest / self.limit * BINS))
        first = max(int(used * _SMALLEST_CUT), LEVELS + 1)
        if first >= used:
            return self.largest
        candidates = np.unique(np.linspace(first, used, 128).astype(int))
        losses = [loss(self.counts, int(bins)) for bins in candidates]
        return min(self._edge(int(candidates[int(np.argmin(losses))])), self.largest)

    def _edge(self, bins: int) -> float:
        return bins / BINS * self.limit


def _squared_error(counts: np.ndarray, bins: int) -> float:
    """Σ (value − what int8 makes of it)² for a range that ends after `bins` bins; the unit is a bin's width."""
    centres = np.arange(len(counts)) + 0.5
    step = bins / LEVELS
    rounded = np.minimum(np.rint(centres / step), LEVELS) * step
    return float(counts @ (centres - rounded) ** 2)


def _information_lost(counts: np.ndarray, bins: int) -> float:
    """Divergence of the distribution that int8 can represent from the one that was seen."""
    seen = counts[:bins].astype(np.float64)
    level = np.minimum(np.arange(bins) * (LEVELS + 1) // bins, LEVELS)
    there = seen > 0
    # A level's count is spread over those of its bins that hold anything; empty bins stay empty.
    filled = np.maximum(np.bincount(level, there, LEVELS + 1), 1)
    represented = np.where(there, (np.bincount(level, seen, LEVELS + 1) / filled)[level], 0.0)
    seen[-1] += counts[bins:].sum()  # what is cut lands on the last level, which then can't tell it apart
    p, q = seen / seen.sum(), represented / max(represented.sum(), 1.0)
    both = p > 0
    return float(np.sum(p[both] * np.log(p[both] / np.maximum(q[both], 1e-12))))


def collect(
    proto: onnx.ModelProto,
    tensors: Collection[str],
    feeds: Iterable[Mapping[str, np.ndarray]],
    *,
    on_progress: Callable[[], None] = lambda: None,
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
        for feed in feeds:
            outputs = session.run(feed)
            for name, histogram in histograms.items():
                try:
                    histogram.add(outputs[name])
                except MDNetError as error:
                    raise MDNetError(f"{name}: {error} on a calibration image") from None
            on_progress()
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
