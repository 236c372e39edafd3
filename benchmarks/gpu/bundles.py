"""Bundles of the models in the precisions that GPUs run, built before a GPU is at hand: `gpu_check.py bundles DIR`.

    DIR/full/weights.safetensors, DIR/full/fp16, DIR/full/int8, …   the model at full size, random weights
    DIR/demo/fp16                                                   the demo

Each is built in a process of its own (`python -m gpu.bundles SIZES PRECISION DIR`), which gives its memory back.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from gpu.context import CheckFailed, Context, NotInstalled
from gpu.sizes import SIZES, Sizes
from mdnet_engines.bundle.files import Bundle, sha256_of
from mdnet_engines.bundle.manifest import MANIFEST_NAME, Precision

_CALIBRATION_IMAGES = 8  # ranges of int8 and fp8; more would change no speed, and these weights mean nothing
MAKE = "make gpu-bundles"


class BuildError(Exception):
    """A bundle was not built; the message says which, and why."""


def make(sizes: Sizes, bundles: Path, environment: Mapping[str, str], tell: Callable[[str], None]) -> None:
    """Build the bundles that are missing, of `sizes` and of its small model, in the precisions that this version knows.

    Raises:
        BuildError: see there.
    """
    for each in {sizes.name: sizes, sizes.small: SIZES[sizes.small]}.values():
        for precision in each.precisions:
            name = f"{each.name}/{precision}"
            if precision not in get_args(Precision):
                tell(f"{name}: left out, this version builds no {precision}")
                continue
            if (bundles / name / MANIFEST_NAME).is_file():
                tell(f"{name}: is there")
                continue
            tell(f"{name}: building")
            command = [sys.executable, "-m", "gpu.bundles", each.name, precision, str(bundles)]
            done = subprocess.run(command, env=dict(environment), capture_output=True, text=True)
            if done.returncode:
                words = done.stderr.strip().splitlines()
                raise BuildError(f"{name}: {words[-1] if words else f'exit code {done.returncode}'}")


def open_bundle(context: Context, precision: str) -> Bundle:
    """The bundle of a precision.

    Raises:
        NotInstalled: nobody built it.
        CheckFailed: it failed parity with PyTorch on the CPU.
    """
    folder = context.bundles / context.sizes.name / precision
    if not (folder / MANIFEST_NAME).is_file():
        raise NotInstalled(f"there is no {precision} bundle; build it before: {MAKE}")
    bundle = Bundle.open(folder)
    if not bundle.manifest.parity.passed:
        raise CheckFailed(f"the {precision} bundle's parity with PyTorch failed on the CPU already")
    return bundle


def build(sizes: Sizes, precision: Any, bundles: Path) -> None:
    """Build one bundle; where int8 is slower than float on this CPU, which a GPU does not care about, it stands."""
    from gpu.model import random_model, weights_file
    from mdnet.model.checkpoint import save_checkpoint
    from mdnet_export.build import build_bundle
    from mdnet_export.model_source import Weights
    from mdnet_export.parity_images import calibration_images, parity_images
    from mdnet_export.quantise import Calibration

    config, file = sizes.config(), weights_file(sizes, bundles)
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        save_checkpoint(random_model(config), file)
    size = config.image_size
    images = calibration_images(None, size, _CALIBRATION_IMAGES) if precision in ("int8", "fp8") else None
    build_bundle(
        Weights("demo" if sizes.packaged else "random", config, file, sha256_of(file)),
        bundles / sizes.name / precision,
        precision=precision,
        images=parity_images(None, size, 2),
        calibration=Calibration(images) if images else None,
        force=True,
        command="gpu_check.py bundles",
    )


if __name__ == "__main__":
    build(SIZES[sys.argv[1]], sys.argv[2], Path(sys.argv[3]))
