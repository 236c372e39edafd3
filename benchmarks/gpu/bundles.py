"""Bundles of the model, random weights, in the precisions that GPUs run: built where they are missing.

Each build is a process of its own (`python -m gpu.bundles SIZES PRECISION FOLDER`), and all run at one time, since most
of a build is one thread.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu.context import CheckFailed, Context, NotInstalled
from gpu.results import Figure
from gpu.sizes import SIZES, Sizes
from mdnet_engines.bundle.files import Bundle
from mdnet_engines.bundle.manifest import MANIFEST_NAME

_CALIBRATION_IMAGES = 8  # ranges of int8; more would change no speed, and these weights mean nothing


def run(context: Context) -> None:
    """A row for each precision."""
    sizes = context.sizes
    building = {}
    for precision in sizes.precisions:
        folder = context.bundles / precision
        if (folder / MANIFEST_NAME).is_file():
            continue
        command = [sys.executable, "-m", "gpu.bundles", sizes.name, precision, str(folder)]
        building[precision] = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for precision in sizes.precisions:
        context.attempt(precision, functools.partial(_wait, context.bundles / precision, building.get(precision)))


def open_bundle(context: Context, precision: str) -> Bundle:
    """The bundle of a precision.

    Raises:
        NotInstalled: the stage that builds it did not.
    """
    folder = context.bundles / precision
    if not (folder / MANIFEST_NAME).is_file():
        raise NotInstalled(f"there is no {precision} bundle: see the stage bundles")
    return Bundle.open(folder)


def _wait(folder: Path, process: subprocess.Popen[str] | None) -> dict[str, Figure]:
    words = process.communicate()[1].strip().splitlines() if process else []
    if process and process.returncode:
        raise CheckFailed(words[-1] if words else f"its process ended with {process.returncode}")
    manifest = Bundle.open(folder).manifest
    if not manifest.parity.passed:
        raise CheckFailed("parity with PyTorch failed on the CPU already")
    size = sum(file.stat().st_size for file in folder.glob("*.onnx*"))
    return {"MB": size / 1e6, "note": "built" if process else "was there"}


def build(sizes: Sizes, precision: Any, folder: Path) -> None:
    """Build one bundle; where int8 is slower than float on this CPU, which a GPU does not care about, it stands."""
    from mdnet_export.build import build_bundle
    from mdnet_export.model_source import Weights
    from mdnet_export.parity_images import calibration_images, parity_images
    from mdnet_export.quantise import Calibration

    config = sizes.config()
    size = config.image_size
    images = calibration_images(None, size, _CALIBRATION_IMAGES) if precision == "int8" else None
    build_bundle(
        Weights("random", config, seed=0),
        folder,
        precision=precision,
        images=parity_images(None, size, 2),
        calibration=Calibration(images) if images else None,
        force=True,
        command="gpu_check.py",
    )


if __name__ == "__main__":
    build(SIZES[sys.argv[1]], sys.argv[2], Path(sys.argv[3]))
