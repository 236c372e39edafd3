"""What `mdnet evaluate` scores with: a PyTorch checkpoint or a bundle, behind one function from images to scores."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, TypeGuard

import numpy as np

from mdnet.data.rated import Scale
from mdnet_engines.backends.choice import open_graphs
from mdnet_engines.bundle.manifest import MANIFEST_NAME, Training
from mdnet_engines.errors import MDNetError, UsageError, require
from mdnet_rt.images.face_crop import face_finder
from mdnet_rt.images.preprocess import load_image

if TYPE_CHECKING:
    from mdnet.model.net import MDNet
    from mdnet_engines.backends.candidates import Backend
    from mdnet_engines.bundle.files import Bundle

ScoreBatch: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""uint8 RGB (n, S, S, 3) → scores (n,) on the rating scale."""
Device = Literal["cpu", "cuda"]


class TrainedEpoch(NamedTuple):
    """The mean squared error on the training list, and Pearson on the validation slice."""

    number: int
    loss: float
    validation_pearson: float


@dataclass(frozen=True)
class ScoredModel:
    """A model on disk: what is known of it before its weights are read, and `load` to get its scores."""

    path: Path
    kind: Literal["checkpoint", "bundle"]
    image_size: int
    training: Training
    """Which images it learned from, as far as it says."""
    scale: Scale = field(kw_only=True)
    """Of its scores."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """For a report: preset, precision, hash."""
    to_srgb: bool = True
    """Whether colour profiles of images are applied."""
    face: float | None = field(default=None, kw_only=True)
    """Which square of an image it sees, as a manifest has it: that of its training, unless it was replaced."""
    epochs: tuple[TrainedEpoch, ...] = field(default=(), kw_only=True)
    """How it was trained, as far as it says."""
    best_epoch: int | None = field(default=None, kw_only=True)
    """Whose weights it has."""
    _bundle: Bundle | None = None

    def read(self, file: Path) -> np.ndarray:
        """An image as this model sees it, uint8 (S, S, 3); raises `ImageError` where it can't be used."""
        return load_image(file, self.image_size, find_box=face_finder(self.face), to_srgb=self.to_srgb)

    def load(self, device: Device = "cpu", backend: Backend = "auto") -> ScoreBatch:
        """Read the weights, and give what scores a batch: uint8 (n, S, S, 3) → float32 (n,).

        Args:
            device: where PyTorch puts a checkpoint.
            backend: what runs a bundle; `auto` is what `mdnet-rt score` takes.

        Raises:
            MDNetError: the weights don't fit, or device or backend is not there.
        """
        if self._bundle is not None:
            return open_graphs(self._bundle, backend=backend, check=backend == "auto").score
        return torch_scores(self.load_torch(device))

    def load_torch(self, device: Device = "cpu") -> MDNet:
        """Read a checkpoint's model onto `device`, with the framing `face`; raises as `load`."""
        from mdnet.model.checkpoint import load_checkpoint

        check_device(device)
        model = load_checkpoint(self.path)
        model.config = dataclasses.replace(model.config, face=self.face)
        return model.to(device)


def open_model(path: Path) -> ScoredModel:
    """Look at a checkpoint or a bundle, the latter with all its hashes, without reading weights into memory.

    Raises:
        UsageError: nothing exists there, or it is a folder that is not a bundle.
        MDNetError: a file that is no checkpoint of MD-Net, or a bundle that can't be trusted.
    """
    if path.is_dir():
        if not (path / MANIFEST_NAME).exists():
            raise UsageError(f"{path} is neither a checkpoint nor a bundle: a folder without {MANIFEST_NAME}")
        return _open_bundle(path)
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder; expected a checkpoint (.safetensors) or a bundle's folder")
    return _open_checkpoint(path)


def check_device(device: Device) -> None:
    """Raise `MDNetError` where PyTorch does not have `device`."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise MDNetError("PyTorch finds no CUDA GPU; use --device cpu")


def training_of(notes: Mapping[str, object]) -> Training:
    """What a checkpoint's notes say about its training images; whatever else they hold is left out."""
    protocol, fold, data = notes.get("protocol"), notes.get("fold"), notes.get("data")
    sha256 = notes.get("data_sha256")
    return Training(
        protocol=protocol[:40] if isinstance(protocol, str) else None,
        fold=fold if isinstance(fold, int) else None,
        data=data[:400] if isinstance(data, str) else None,
        data_sha256=sha256 if isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) else None,
    )


def epochs_of(notes: Mapping[str, object]) -> tuple[TrainedEpoch, ...]:
    """The epochs in a checkpoint's notes, in their order; whatever is not an epoch of finite figures is left out."""
    found: dict[int, TrainedEpoch] = {}
    listed = notes.get("epochs")
    for fields in listed if isinstance(listed, list) else []:
        if not isinstance(fields, dict):
            continue
        number, *figures = (fields.get(name) for name in TrainedEpoch._fields)
        if isinstance(number, int) and 0 < number < 1_000_000:
            values = [float(value) for value in figures if _is_figure(value)]
            if len(values) == len(figures):
                found[number] = TrainedEpoch(number, *values)
    return tuple(found[number] for number in sorted(found))


def _is_figure(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def torch_scores(model: MDNet) -> ScoreBatch:
    """A PyTorch model as a function of batches; the images go where its weights are."""
    import torch

    device = next(model.parameters()).device

    def score(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(images).to(device)).float().cpu().numpy()

    return score


def _open_bundle(path: Path) -> ScoredModel:
    from mdnet_engines.bundle.files import Bundle

    bundle = Bundle.open(path)
    manifest = bundle.manifest
    provenance = manifest.provenance
    return ScoredModel(
        path,
        "bundle",
        manifest.preprocessing.image_size,
        provenance.training or Training(),
        {
            "preset": manifest.preset,
            "precision": manifest.precision,
            "weights": f"{provenance.name}, sha256 {str(provenance.checkpoint_sha256)[:12]}…",
        },
        manifest.preprocessing.to_srgb,
        bundle,
        scale=Scale(manifest.score.minimum, manifest.score.maximum),
        face=manifest.preprocessing.face,
    )


def _open_checkpoint(path: Path) -> ScoredModel:
    for module in ("torch", "diffusers", "safetensors"):
        require(module, "train")
    from mdnet.model.checkpoint import read_metadata
    from mdnet_engines.bundle.files import sha256_of

    config, notes = read_metadata(path)
    facts = {"preset": config.preset, "precision": "PyTorch fp32", "weights": f"sha256 {sha256_of(path)[:12]}…"}
    scale = Scale(config.score_min, config.score_max)
    best = notes.get("best_epoch")
    return ScoredModel(
        path,
        "checkpoint",
        config.image_size,
        training_of(notes),
        facts,
        scale=scale,
        face=config.face,
        epochs=epochs_of(notes),
        best_epoch=best if isinstance(best, int) else None,
    )
