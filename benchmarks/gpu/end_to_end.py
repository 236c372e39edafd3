"""JPEG files to scores with the runtime: images a second, and the share of the time in which the device is busy."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from gpu.bundles import open_bundle
from gpu.context import CheckFailed, Context, NotInstalled
from gpu.results import Figure
from mdnet.data.draw_face import draw_face
from mdnet_engines.backends.choice import choose
from mdnet_engines.parity.gates import LIMITS
from mdnet_engines.system.cores import available_cores
from mdnet_rt.scoring.scorer import Scorer

_FILES, _SIDE = 32, 350  # different pictures, as large as the data set's
_ON_A_GPU = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda")
_MOST_WORKERS = 16


def run(context: Context) -> None:
    """One row, by the backend that the runtime takes by itself."""
    context.series([("fp16, JPEG files", lambda: stream(context))])


def stream(context: Context) -> dict[str, Figure]:
    """Score a stream of files for some seconds, after a first look at how many that is."""
    bundle = open_bundle(context, "fp16")
    backend = str(choose(bundle, check=False)) if context.device.is_cuda else "onnxruntime-cpu"
    if context.device.is_cuda and backend not in _ON_A_GPU:
        raise NotInstalled(f"onnxruntime-gpu or tensorrt: the runtime would take {backend}")
    files, batch = jpegs(context.scratch / "jpegs"), context.sizes.goal_batch
    workers = min(_MOST_WORKERS, available_cores())
    limit = LIMITS["fp16"].batch_max_abs
    with Scorer.open(bundle.path, backend=backend, batch_size=batch) as scorer:
        first = [row.score for row in scorer.stream(files, workers=workers)]
        if None in first:
            raise CheckFailed("a picture was not scored")
        scores: list[float | None] = []

        def score(count: int) -> None:
            names = itertools.islice(itertools.cycle(files), count)
            scores[:] = [row.score for row in scorer.stream(names, workers=workers)]

        trial, _ = context.device.busy_during(lambda: score(2 * len(files)))
        count = max(2, round(context.sizes.jpeg_seconds / trial * 2)) * len(files)
        seconds, busy = context.device.busy_during(lambda: score(count))
    expected = np.resize(np.array(first, np.float64), count)
    worst = float(np.abs(np.array(scores, np.float64) - expected).max())
    figures: dict[str, Figure] = {"images/s": count / seconds, "images": count, "batch": batch, "workers": workers}
    figures["busy"] = busy
    figures["max |Δscore| between runs"] = worst
    if not worst <= limit:
        raise CheckFailed(f"the same picture's scores differ by {worst:.3g}, allowed is {limit:g}", figures)
    return {**figures, "note": backend}


def jpegs(folder: Path) -> list[Path]:
    """Drawn faces as JPEG files."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"{i}.jpg" for i in range(_FILES)]
    for seed, file in enumerate(files):
        draw_face(np.random.default_rng(seed), _SIDE)[0].save(file, quality=90)
    return files
