"""What int8 or fp8 in some blocks of the encoder does to the scores of the calibration images: the budget's measure."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mdnet_calib.sensitivity import Drift
from mdnet_engines.bundle.manifest import GRAPH_NAMES, GraphName, ScoreScale
from mdnet_engines.errors import MDNetError
from mdnet_engines.parity.gates import limits_for
from mdnet_engines.parity.metrics import pearson
from mdnet_engines.sessions import openvino as openvino_session
from mdnet_engines.sessions.onnxruntime import OrtSession
from mdnet_engines.sessions.openvino import OpenVINOSession
from mdnet_engines.sessions.session import Session, run_graphs
from mdnet_export.graphs.cpu_variant import open_for_cpu

DRIFT_IMAGES = 64
"""Calibration images, at most, on which a choice of blocks is scored."""
ORDER_IMAGES = 16
"""Of these, how many each block is scored on alone."""


class BudgetCheck:
    """Scores the calibration images with some nodes quantised, and compares with the float graphs.

    It does so on every backend for CPUs that is installed, any of which may be the one that serves: their kernels round
    differently, and the two forms of an int8 encoder have other activations. What counts is the worst.
    """

    def __init__(
        self,
        folder: Path,
        scratch: Path,
        write: Callable[[list[str]], None],
        pixels: np.ndarray,
        scale: ScoreScale,
    ):
        """Score the images with the float graphs.

        Args:
            folder: with the three float32 graphs.
            write: writes the encoder to `scratch` with these nodes quantised.
            pixels: of the calibration images, (n, S, S, 3).
            scale: of the scores.
        """
        self.scratch, self.write = scratch, write
        self.pixels = pixels[:DRIFT_IMAGES]
        self.written: list[str] = []
        self.spread = limits_for("int8", scale).pearson_needs_sd
        float_graphs: dict[GraphName, Session] = {name: OrtSession(folder / f"{name}.onnx") for name in GRAPH_NAMES}
        expected = [run_graphs(float_graphs, image)["score"] for image in self._images()]
        self.expected = np.concatenate(expected).astype(np.float64)
        del float_graphs
        vim = open_for_cpu(folder, "vim")
        self.tokens = [vim.run({"image": image})["tokens"] for image in self._images()]
        self.fusion = {backend: open_on(backend, folder, "fusion") for backend in cpu_backends()}
        self.worst = next(iter(self.fusion))

    def __call__(self, nodes: list[str]) -> Drift:
        self._write(nodes)
        drifts = {}
        for backend in list(self.fusion):
            try:
                drifts[backend] = self._on(backend, DRIFT_IMAGES)
            except MDNetError:
                if backend == "onnxruntime-cpu":
                    raise
                del self.fusion[backend]  # what can't run these graphs can't serve them
        self.worst = max(drifts, key=lambda backend: _or_inf(drifts[backend].mean_abs))
        correlations = [drift.pearson for drift in drifts.values() if drift.pearson is not None]
        return Drift(
            float(np.max([drift.max_abs for drift in drifts.values()])),  # NaN where one is
            float(np.max([drift.mean_abs for drift in drifts.values()])),
            float(np.min(correlations)) if correlations else None,
        )

    def alone(self, nodes: list[str]) -> Drift:
        """Of one block, on fewer images, and on the backend that was furthest off."""
        self._write(nodes)
        return self._on(self.worst, ORDER_IMAGES)

    def _write(self, nodes: list[str]) -> None:
        self.write(nodes)
        self.written = nodes

    def _on(self, backend: str, count: int) -> Drift:
        encoder, fusion = open_on(backend, self.scratch, "encoder"), self.fusion[backend]
        scores = [
            fusion.run({**encoder.run({"image": image}), "tokens": tokens})["score"]
            for image, tokens in zip(self._images()[:count], self.tokens[:count], strict=True)
        ]
        got, expected = np.concatenate(scores).astype(np.float64), self.expected[:count]
        delta = np.abs(got - expected)
        spread = expected.std() >= self.spread
        return Drift(float(delta.max()), float(delta.mean()), float(pearson(expected, got)) if spread else None)

    def _images(self) -> list[np.ndarray]:
        """One at a time, as calibration has the memory for."""
        return [self.pixels[i : i + 1] for i in range(len(self.pixels))]


def _or_inf(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def cpu_backends() -> list[str]:
    """The backends of this machine that may serve int8 on a CPU."""
    return ["onnxruntime-cpu", *(["openvino"] if openvino_session.is_installed() else [])]


def open_on(backend: str, folder: Path, name: GraphName) -> Session:
    """A graph that may change yet."""
    if backend == "openvino":
        return OpenVINOSession(folder / f"{name}.onnx", cached=False)
    return open_for_cpu(folder, name)
