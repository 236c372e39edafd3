"""Histograms on disk: a graph that was calibrated on these very images is not run again.

One `.npz` for each pair of graph and images, found by both digests; it serves every range method. A file that is cut,
damaged or of another layout counts as missing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from mdnet_calib.ranges import BINS, Histogram
from mdnet_engines.system.atomic import new_file

_LAYOUT = 1


def histograms(
    folder: Path | None,
    *,
    graph: str,
    images: str,
    tensors: Collection[str],
    collect: Callable[[], dict[str, Histogram]],
) -> tuple[dict[str, Histogram], bool]:
    """The histograms of `tensors`, from `folder` if it has them for exactly this graph and these images.

    Args:
        folder: of the cache, made if missing; None keeps nothing.
        graph, images: hex digests of what the histograms are of.
        collect: computes them, when they are not there.

    Returns:
        The histograms, and whether they came from the cache.
    """
    if folder is None:
        return collect(), False
    file = folder / f"ranges-{graph[:16]}-{images[:16]}.npz"
    key = f"{_LAYOUT} {graph} {images}"
    found = _read(file, key)
    if found is not None and found.keys() >= set(tensors):
        return {name: found[name] for name in tensors}, True
    fresh = collect()
    _write(file, key, fresh)
    return fresh, False


def _read(file: Path, key: str) -> dict[str, Histogram] | None:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if str(arrays["key"]) != key:
                return None
            names, bounds, counts = arrays["names"], arrays["bounds"], arrays["counts"]
            names = [str(name) for name in names]
    except Exception:  # what a damaged archive raises depends on the byte that was hit; all of it means: measure again
        return None
    if bounds.shape != (len(names), 2) or counts.shape != (len(names), BINS):
        return None
    return {
        name: Histogram(float(limit), float(largest), row.astype(np.int64))
        for name, (limit, largest), row in zip(names, bounds, counts, strict=True)
    }


def _write(file: Path, key: str, values: dict[str, Histogram]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with new_file(file) as scratch, scratch.open("wb") as stream:
        np.savez_compressed(
            stream,
            key=np.array(key),
            names=np.array(list(values)),
            bounds=np.array([(h.limit, h.largest) for h in values.values()]),
            counts=np.array([h.counts for h in values.values()]),
        )
