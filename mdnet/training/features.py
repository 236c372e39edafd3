"""Frozen features, computed once and kept on disk: training then touches only Vim and fusion.

    CACHE/<encoder digest>-<image size>-<dtype>/
        <id>.safetensors    a shard, up to SHARD_IMAGES images: for each feature map a tensor (n, 2, C, h, w), images
                            and their mirror images; its metadata lists the sha256 of each image's preprocessed pixels

Features are found by what made them (the encoder's weights, the pixels it saw), never by a file's name: an image that
was renamed is found again, one that changed or was preprocessed otherwise is computed anew. A shard appears whole or
not at all, so a killed run loses one at the most, and several runs may share a cache. A shard that can't be read is
passed over.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mdnet.data.rated import Rated
from mdnet.evaluation.evaluate import load_needed
from mdnet.model.config import MDNetConfig
from mdnet.model.diffusion import DiffusionEncoder
from mdnet.training.views import with_views
from mdnet_engines.errors import MDNetError
from mdnet_engines.progress import SILENT, Progress
from mdnet_engines.system.atomic import new_file

SHARD_IMAGES = 64
_IMAGES_KEY = "mdnet_images"
_DTYPES = {False: torch.float32, True: torch.float16}


class Features:
    """Pixels, ratings and frozen features of a data set, image by image. Features are memory-mapped.

    Where images have several views, the rows are all images themselves, then all their second views, and so on.
    Made by `cached_features`. Lives no longer than the folder it was made in.
    """

    def __init__(self, pixels: Tensor, ratings: Tensor, rows: list[tuple[dict[str, Tensor], int]]):
        self.pixels = pixels  # (n, S, S, 3) uint8
        self.ratings = ratings  # (n,)
        self._rows = rows  # of each image: the shard's tensors, and its place there

    def __len__(self) -> int:
        """How many images, whatever the number of their views."""
        return len(self.ratings)

    def batch(
        self, rows: Tensor, mirror: Tensor, device: torch.device | str = "cpu"
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """What a training step takes of the views `rows` (b,), each mirrored where `mirror` (b,) is 1.

        Returns:
            Features by name (b, C, h, w) in float32, pixels (b, S, S, 3) in uint8, ratings (b,); all on `device`.
        """
        chosen = [(*self._rows[row], side) for row, side in zip(rows.tolist(), mirror.tolist(), strict=True)]
        features = {
            name: torch.stack([shard[name][place, side] for shard, place, side in chosen]).to(device).float()
            for name in chosen[0][0]
        }
        pixels = self.pixels[rows]
        pixels = torch.where(mirror.bool()[:, None, None, None], pixels.flip(2), pixels)
        return features, pixels.to(device), self.ratings[rows % len(self)].to(device)


@contextmanager
def feature_folder(folder: Path | None) -> Iterator[Path]:
    """Give the cache's folder, made where it is missing; without one a temporary folder, which goes with the block."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="mdnet-features-") as scratch:
        yield Path(scratch)


@contextmanager
def cached_features(
    encoder: DiffusionEncoder,
    config: MDNetConfig,
    data: Rated,
    *,
    folder: Path | None = None,
    half: bool = False,
    views: int = 1,
    batch_size: int = 8,
    progress: Progress = SILENT,
) -> Iterator[Features]:
    """Give the features of `data`'s images and of their mirror images; what is not in the cache yet is computed.

    Args:
        folder: the cache, as `feature_folder` has it.
        half: keep float16 in place of float32: half the disk, features rounded to 11 bits.
        views: of each image: itself, and others by `mdnet.training.views`.
        batch_size: images per run of the encoder, each with its mirror image.
        progress: counts the images that are ready.

    Raises:
        MDNetError: an image can't be read, the disk is too small, or a feature is not finite in the type it is kept in.
    """
    with feature_folder(folder) as root:
        cache = _Cache(root, encoder, config, half)
        pixels = load_pixels(data.images, config.image_size, progress, face=config.face)
        pixels = with_views(pixels, views)
        digests = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in pixels]
        known = cache.known(set(digests))
        advance = progress.count(f"frozen features of {len(digests)} images", len(digests))
        advance(sum(digest in known for digest in digests))
        first_rows = {digest: row for row, digest in reversed(list(enumerate(digests)))}
        missing = [row for digest, row in first_rows.items() if digest not in known]
        cache.check_room(len(missing))
        for start in range(0, len(missing), SHARD_IMAGES):
            rows = sorted(missing)[start : start + SHARD_IMAGES]
            shard = cache.compute(pixels[rows], [digests[row] for row in rows], batch_size, advance)
            known.update({digests[row]: (shard, place) for place, row in enumerate(rows)})
        yield Features(pixels, torch.from_numpy(data.ratings), [known[digest] for digest in digests])


def encoder_digest(encoder: DiffusionEncoder) -> str:
    """Hex sha256 of everything that decides the encoder's features."""
    settings = f"timestep {encoder.timestep}, scaling {encoder.vae.scaling}"
    return hashlib.sha256(f"{settings}, {state_digest(encoder)}".encode()).hexdigest()


def state_digest(module: nn.Module) -> str:
    """Hex sha256 of a module's state: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Cache:
    """The shards of one encoder, image size and type."""

    def __init__(self, root: Path, encoder: DiffusionEncoder, config: MDNetConfig, half: bool):
        self.encoder, self.dtype, self.shapes = encoder, _DTYPES[half], config.feature_shapes
        kind = str(self.dtype).removeprefix("torch.")
        self.folder = root / f"{encoder_digest(encoder)[:20]}-{config.image_size}-{kind}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def known(self, wanted: set[str]) -> dict[str, tuple[dict[str, Tensor], int]]:
        """Digest → its shard's tensors and its place there, for the images among `wanted` that the cache holds."""
        known: dict[str, tuple[dict[str, Tensor], int]] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                images, tensors = _open_shard(file, self.shapes)
            except (SafetensorError, KeyError, ValueError, OSError):
                continue  # another program's, cut off, or removed by its owner
            expected = {name: (len(images), 2, *shape) for name, shape in self.shapes.items()}
            if all(
                tensors[name].shape == shape and tensors[name].dtype == self.dtype for name, shape in expected.items()
            ):
                known.update({digest: (tensors, place) for place, digest in enumerate(images) if digest in wanted})
        return known

    def check_room(self, images: int) -> None:
        """Raise where the features of `images` more images will not fit on the disk: hours of work would end so."""
        size = images * 2 * sum(map(math.prod, self.shapes.values())) * self.dtype.itemsize
        if size > (free := shutil.disk_usage(self.folder).free):
            raise MDNetError(
                f"the features of {images} images take {size / 1e9:.1f} GB, {self.folder.parent} has "
                f"{free / 1e9:.1f} GB free; name a folder on a larger disk with --cache, or halve them with "
                "--half-features"
            )

    @torch.inference_mode()
    def compute(
        self, pixels: Tensor, digests: Sequence[str], batch_size: int, advance: Callable[[int], None]
    ) -> dict[str, Tensor]:
        """Run the encoder on `pixels` (n, S, S, 3) and their mirror images; write a shard, and give its tensors."""
        device = self.encoder.context.device
        parts: dict[str, list[Tensor]] = {name: [] for name in self.shapes}
        for images in pixels.split(batch_size):
            both = torch.stack([images, images.flip(2)], dim=1).flatten(0, 1)  # image, mirror image, image, …
            for name, feature in self.encoder(both.to(device)).items():
                parts[name].append(feature.cpu().to(self.dtype).unflatten(0, (-1, 2)))
            advance(len(images))
        tensors = {name: torch.cat(values) for name, values in parts.items()}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                hint = "; leave out --half-features" if self.dtype == torch.float16 else ", is the checkpoint damaged?"
                raise MDNetError(f"feature {name} is not finite in {self.dtype}{hint}")
        _, mapped = _open_shard(self._write(tensors, digests), self.shapes)
        return mapped  # not those in memory, which would add up

    def _write(self, tensors: dict[str, Tensor], digests: Sequence[str]) -> Path:
        file = self.folder / f"{uuid.uuid4().hex[:16]}.safetensors"
        with new_file(file) as scratch:
            save_file(tensors, scratch, {_IMAGES_KEY: json.dumps(list(digests))})
        return file


def _open_shard(file: Path, names: Iterable[str]) -> tuple[list[str], dict[str, Tensor]]:
    """The digests of a shard's images, and its tensors, memory-mapped."""
    with safe_open(file, framework="pt") as stored:
        images = json.loads((stored.metadata() or {})[_IMAGES_KEY])
        return images, {name: stored.get_tensor(name) for name in names}


def load_pixels(files: Sequence[Path], size: int, progress: Progress = SILENT, *, face: float | None = None) -> Tensor:
    """Preprocessed images, uint8 (n, size, size, 3).

    Args:
        face: which square of an image is taken, as a manifest has it.

    Raises:
        MDNetError: an image can't be read.
    """
    pixels = torch.empty(len(files), size, size, 3, dtype=torch.uint8)
    advance = progress.count(f"reading {len(files)} images", len(files))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding and resizing leave Python's lock
        for row, image in enumerate(pool.map(lambda file: load_needed(file, size, face=face), files)):
            pixels[row] = torch.from_numpy(np.ascontiguousarray(image))
            advance(1)
    return pixels
