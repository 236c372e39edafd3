"""Score images with a bundle's three graphs on one device of ONNX Runtime.

    host ── images ──┬── encoder ──┬── fusion ── scores ── host
                     └── Vim ──────┘

- Only images go up and scores come down: a graph's outputs are handed to the next one where they are. Each session
  waits for its stream before it gives them.
- Batches have fixed sizes, the powers of two up to `LARGEST`: cuDNN looks for an algorithm for each convolution and
  each new size. Smaller ones are padded with copies of their last image and cut again; larger ones are cut into pieces.
- Images are copied from ordinary host memory: ONNX Runtime's Python interface (1.31) has pinned memory for plug-in
  providers alone.

*Unverified on a GPU.* Every machine tests it on the CPU provider, which takes the same calls.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mdnet_engines.bundle.manifest import GRAPH_NAMES, GraphName
from mdnet_engines.sessions.onnxruntime import OrtSession, OrtValue

LARGEST = 64
"""Images that run at once."""


def score(graphs: Mapping[GraphName, OrtSession], images: np.ndarray) -> np.ndarray:
    """uint8 images [n, S, S, 3] → scores [n]. Safe to call from several threads.

    Raises:
        MDNetError: another type or shape, no memory, or the device is gone.
    """
    pieces = [_piece(graphs, images[start : start + LARGEST]) for start in range(0, len(images), LARGEST)]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)


def _piece(graphs: Mapping[GraphName, OrtSession], images: np.ndarray) -> np.ndarray:
    encoder, vim, fusion = (graphs[name] for name in GRAPH_NAMES)
    rows = len(images)
    size = 1 << (rows - 1).bit_length()
    padded = np.concatenate([images, np.repeat(images[-1:], size - rows, axis=0)]) if size > rows else images
    image = {"image": encoder.upload(padded)}
    features: dict[str, OrtValue] = {}
    for graph in (encoder, vim):
        features |= graph.run_there(image, [name for name in graph.outputs if name in fusion.inputs])
    scores: np.ndarray = fusion.run_there(features, ["score"], to_host=True)["score"].numpy()
    return scores[:rows]
