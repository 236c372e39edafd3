"""Explain the scores of a few pictures: a checkpoint by occlusion and attention, a bundle by occlusion alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mdnet.evaluation.scored_model import Device, ScoredModel, torch_scores
from mdnet.explain.maps import agreement, joined
from mdnet.explain.occlusion import Occlusion, default_patch, default_stride, occlude, starts
from mdnet_engines.backends.candidates import Backend
from mdnet_engines.errors import MDNetError, printable
from mdnet_engines.progress import SILENT, Progress
from mdnet_rt.images.preprocess import ImageError

if TYPE_CHECKING:
    from mdnet.explain.attention import Looked

READINGS = ("traced", "own")
"""How attention is read: see `mdnet.explain.attention`."""


WORTH_SAYING = 10
"""Seconds."""


@dataclass(frozen=True)
class Explained:
    """One picture as the model sees it, and what its score depends on. `looked` is None where there is no attention."""

    name: str
    pixels: np.ndarray  # (S, S, 3) uint8
    occlusion: Occlusion
    looked: Looked | None

    def attention(self, reading: str) -> np.ndarray | None:
        """All scales of a reading together, (s, s) on the finest grid."""
        return None if self.looked is None else joined(getattr(self.looked, reading))

    def agreement(self, reading: str, other: Explained | None = None) -> float:
        """Rank correlation of attention, or of another picture's, with this picture's occlusion; NaN without it."""
        attention = (other or self).attention(reading)
        return math.nan if attention is None else agreement(attention, self.occlusion.cells(len(attention)))


@dataclass(frozen=True)
class Explanation:
    """What `explain` found, and how."""

    model: ScoredModel
    patch: int
    stride: int
    images: list[Explained]
    skipped: list[tuple[str, str]]
    """Name and reason of the pictures that could not be read."""
    without_attention: str | None
    """Why there is no attention."""
    seconds: float
    """For a picture."""

    def agreement(self, reading: str) -> tuple[float, float]:
        """Mean over the pictures: of attention with its own picture's occlusion, and with that of the others.

        Where the second is as large as the first, attention does not tell these pictures apart.
        """
        own = [each.agreement(reading) for each in self.images]
        others = [one.agreement(reading, two) for one in self.images for two in self.images if one is not two]
        return float(np.mean(own)), float(np.mean(others)) if others else math.nan

    def to_json(self) -> dict[str, Any]:
        """Everything but the pictures; null for a figure that is not there."""
        return {
            "model": {"path": str(self.model.path), "kind": self.model.kind, **self.model.facts},
            "patch": self.patch,
            "stride": self.stride,
            "without_attention": self.without_attention,
            "images": [
                {
                    "image": each.name,
                    "score": each.occlusion.score,
                    "occlusion": each.occlusion.loss.tolist(),
                    "attention": {
                        reading: {name: cells.tolist() for name, cells in getattr(each.looked, reading).items()}
                        for reading in (READINGS if each.looked else ())
                    },
                    "agreement": {
                        reading: value if math.isfinite(value := each.agreement(reading)) else None
                        for reading in (READINGS if each.looked else ())
                    },
                }
                for each in self.images
            ],
            "skipped": [{"image": name, "reason": reason} for name, reason in self.skipped],
        }


def explain(
    model: ScoredModel,
    files: Sequence[Path],
    *,
    patch: int | None = None,
    stride: int | None = None,
    device: Device = "cpu",
    backend: Backend = "auto",
    batch_size: int = 16,
    progress: Progress = SILENT,
    on_image: Callable[[Explained], None] = lambda _: None,
) -> Explanation:
    """Explain the score of each of `files`. A picture that can't be read is skipped, and named in a note.

    Args:
        patch: side of the hidden square in pixels of what the model sees; None is `default_patch`.
        stride: from one square to the next; None is `default_stride`.
        device: what runs a checkpoint.
        backend: what runs a bundle.
        progress: counts the scores that are computed, and says in a note how long they will take.
        on_image: called after each picture.

    Raises:
        UsageError: patch or stride don't fit.
        MDNetError: no picture could be read, a score is not finite, or the model can't be loaded.
    """
    patch = patch or default_patch(model.image_size)
    stride = stride or default_stride(patch)
    runs = 1 + len(starts(model.image_size, patch, stride)) ** 2
    pictures, skipped = _read(model, files, progress)
    score, look, reason = _open(model, device, backend)
    images, began = list[Explained](), time.perf_counter()
    advance = progress.count(f"{runs} scores for each of {len(pictures)} pictures", runs * len(pictures))
    for name, pixels in pictures:
        occlusion = occlude(
            score,
            pixels,
            patch=patch,
            stride=stride,
            batch_size=batch_size,
            advance=advance if images else _announced(advance, runs, len(pictures), progress),
        )
        images.append(Explained(name, pixels, occlusion, look(pixels) if look else None))
        on_image(images[-1])
    seconds = (time.perf_counter() - began) / len(images)
    return Explanation(model, patch, stride, images, skipped, reason, seconds)


def _read(
    model: ScoredModel, files: Sequence[Path], progress: Progress
) -> tuple[list[tuple[str, np.ndarray]], list[tuple[str, str]]]:
    """Name and pixels of each picture; name and reason of each that can't be read."""
    pictures, skipped = [], []
    for file in files:
        try:
            pictures.append((str(file), model.read(file)))
        except ImageError as error:
            skipped.append((str(file), str(error)))
            progress.note(f"skipped {printable(file)}: {error}")
    if not pictures:
        raise MDNetError(f"none of {len(files)} pictures could be read")
    return pictures, skipped


def _open(
    model: ScoredModel, device: Device, backend: Backend
) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], Looked] | None, str | None]:
    """What scores, what reads the attention of one picture, and why there is nothing that reads it."""
    if model.kind == "bundle":
        return (
            model.load(device, backend),
            None,
            "a bundle's graphs keep their attention to themselves; give the checkpoint",
        )
    from mdnet.explain.attention import look, without_attention

    loaded = model.load_torch(device)
    reason = without_attention(loaded.config)
    return torch_scores(loaded), None if reason else lambda pixels: look(loaded, pixels), reason


def _announced(advance: Callable[[int], None], runs: int, pictures: int, progress: Progress) -> Callable[[int], None]:
    """`advance`, which after the first batch says how long all will take, if that is worth a line."""
    began, done, said = time.perf_counter(), 0, False

    def advance_and_say(more: int) -> None:
        nonlocal done, said
        advance(more)
        done += more
        if not said and more < done:  # the first score alone has also loaded and tuned what runs it
            said = True
            each = (time.perf_counter() - began) / done * runs
            if each * pictures >= WORTH_SAYING:
                progress.note(f"{runs} scores a picture: about {_span(each)}, {_span(each * pictures)} in all")

    return advance_and_say


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"
