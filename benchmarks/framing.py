"""How portraits must be framed for a model of tight crops: python benchmarks/framing.py DATA

DATA has `ratings.csv` (image, rating, …), the crops that it names, and in `originals/` the uncropped photographs of
some of them under the same names. For each framing of `--face` a ridge learns the ratings of the other crops, framed
so; it then scores these people twice, by their crops and by their photographs, framed so. Images come through the
product's own preprocessing. Only figures are printed.

The ridge is on HOG features (128 pixels, cells of 16, 9 bins), which ask for no training; with `--checkpoint` on the
frozen features of that model. Its penalty was chosen by five-fold cross-validation on crops as they are.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from mdnet_engines.framing import parse_face
from mdnet_rt.images.face_crop import face_finder
from mdnet_rt.images.preprocess import ImageError, load_image

SIZE = 128
FRAMINGS = "none,crop:0.7,crop:0.8,crop:0.9,crop:1,crop:1.2,crop:2"
Describe = Callable[[np.ndarray], np.ndarray]
"""uint8 images (n, S, S, 3) → features (n, d)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--framings", default=FRAMINGS, help=f"separated by commas; default {FRAMINGS}")
    parser.add_argument("--checkpoint", type=Path, help="take the frozen features of this model in place of HOG")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    with (options.data / "ratings.csv").open() as table:
        ratings = {row["image"]: float(row["rating"]) for row in csv.DictReader(table)}
    photos = {name: options.data / "originals" / Path(name).name for name in ratings}
    pairs = [name for name, photo in photos.items() if photo.exists()]
    others = [name for name in ratings if name not in set(pairs)]
    describe, penalty = (hog, 5e3) if options.checkpoint is None else (frozen(options.checkpoint), 1e4)

    found = {name: frame(photos[name], "crop") for name in pairs}
    outcomes = Counter(str(pixels) if isinstance(pixels, ImageError) else "one face" for pixels in found.values())
    print(f"{len(pairs)} photographs: " + ", ".join(f"{count} {what}" for what, count in outcomes.most_common()))
    pairs = [name for name in pairs if not isinstance(found[name], ImageError)]
    truth = np.array([ratings[name] for name in pairs])
    print(f"PC on {len(pairs)} people, trained on {len(others)} crops of others")
    print("framing    likeness  crops  photographs  lost (± standard error)")
    for face in options.framings.split(","):
        learned = stack([options.data / name for name in others], face)
        model = Ridge(describe(learned), describe(learned[:, :, ::-1]), np.array([ratings[n] for n in others]), penalty)
        crops, wholes = stack([options.data / name for name in pairs], face), stack([photos[n] for n in pairs], face)
        by_crops, by_photos = model(describe(crops)), model(describe(wholes))
        likeness = np.mean([correlation(a.ravel(), b.ravel()) for a, b in zip(crops, wholes, strict=True)])
        lost = correlation(by_crops, truth) - correlation(by_photos, truth)
        print(
            f"{face:<10} {likeness:8.3f}  {correlation(by_crops, truth):.3f}  {correlation(by_photos, truth):11.3f}  "
            f"{lost:+.3f} ± {spread(by_crops, by_photos, truth):.3f}",
            flush=True,
        )


def frame(file: Path, face: str) -> np.ndarray | ImageError:
    """The image as a model of this framing gets it, or why it does not."""
    try:
        return load_image(file, SIZE, find_box=face_finder(parse_face(face)))
    except ImageError as error:
        return error


def stack(files: list[Path], face: str) -> np.ndarray:
    """All of them, uint8 (n, S, S, 3)."""
    framed = {file: frame(file, face) for file in files}
    if bad := [f"{file.name}: {why}" for file, why in framed.items() if isinstance(why, ImageError)]:
        raise SystemExit(f"{face}: {len(bad)} images can't be used, such as {bad[0]}")
    return np.stack([framed[file] for file in files])


def hog(images: np.ndarray) -> np.ndarray:
    """Histograms of oriented gradients."""
    descriptor = cv2.HOGDescriptor((SIZE, SIZE), (32, 32), (16, 16), (16, 16), 9)
    return np.stack([np.ravel(descriptor.compute(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))) for image in images])


def frozen(checkpoint: Path) -> Describe:
    """What a checkpoint's encoder gives."""
    import torch

    from mdnet.model.checkpoint import load_checkpoint

    model = load_checkpoint(checkpoint)
    if model.config.image_size != SIZE:
        raise SystemExit(f"{checkpoint} takes {model.config.image_size} pixels; this compares at {SIZE}")

    def describe(images: np.ndarray) -> np.ndarray:
        rows = []
        with torch.inference_mode():
            for start in range(0, len(images), 32):
                maps = model.diffusion(torch.from_numpy(np.ascontiguousarray(images[start : start + 32])))
                rows.append(np.concatenate([part.flatten(1).numpy() for part in maps.values()], axis=1))
        return np.concatenate(rows)

    return describe


class Ridge:
    """Linear regression of ratings (n,) on the features of images and their mirror images (n, d), penalised."""

    def __init__(self, features: np.ndarray, mirrored: np.ndarray, ratings: np.ndarray, penalty: float):
        both = np.concatenate([features, mirrored]).astype(np.float32)
        self.mean, self.sd, self.rating = both.mean(axis=0), both.std(axis=0) + 1e-6, ratings.mean()
        rows = (both - self.mean) / self.sd
        kernel = rows @ rows.T + np.float32(penalty) * np.eye(len(rows), dtype=np.float32)
        wanted = (np.concatenate([ratings, ratings]) - self.rating).astype(np.float32)
        self.weights = rows.T @ np.linalg.solve(kernel, wanted)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return ((features - self.mean) / self.sd) @ self.weights + self.rating


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's."""
    return float(np.corrcoef(a, b)[0, 1])


def spread(a: np.ndarray, b: np.ndarray, truth: np.ndarray) -> float:
    """Standard error of the difference of their correlations with `truth`, by 1,000 bootstrap samples of people."""
    random = np.random.default_rng(0)
    samples = random.integers(0, len(truth), (1000, len(truth)))
    return float(np.std([correlation(a[rows], truth[rows]) - correlation(b[rows], truth[rows]) for rows in samples]))


if __name__ == "__main__":
    main()
