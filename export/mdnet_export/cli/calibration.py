"""The options of `mdnet-export build` that say what to calibrate on, and what int8 and fp8 may cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from mdnet_calib.calibration_set import RangeMethod
from mdnet_calib.sensitivity import Budget
from mdnet_engines.console import say
from mdnet_engines.errors import UsageError
from mdnet_engines.progress import Progress

if TYPE_CHECKING:
    from mdnet_calib.calibration_set import CalibrationSet
    from mdnet_engines.bundle.manifest import Precision
    from mdnet_engines.parity.measure import Images
    from mdnet_export.model_source import Weights
    from mdnet_export.parity_images import Pictures
    from mdnet_export.quantise import Calibration

_Function = TypeVar("_Function", bound=Callable[..., Any])
_NUM_IMAGES: dict[str, int] = {"int8": 64, "fp8": 64, "fp16": 8}  # of --num-calib; fp16 only looks for overflow
_CANDIDATES = 4  # times as many images for --k-centre to choose from

_OPTIONS = (
    click.option(
        "--calib",
        type=click.Path(path_type=Path, exists=True),
        help="int8, fp8, fp16: folder of calibration images; or SCUT-FBP5500's root or a table of ratings (.csv, "
        ".parquet), of which training images are used.",
    ),
    click.option("--num-calib", type=int, help="int8, fp8, fp16: how many of them. Default: 64; 8 for fp16."),
    click.option("--k-centre", is_flag=True, help="int8, fp8: choose images that differ in the encoder's features."),
    click.option(
        "--range-method",
        type=click.Choice(get_args(RangeMethod)),
        default="percentile",
        show_default=True,
        help="int8: how a value's range follows from the calibration images (fp8: minmax).",
    ),
    click.option(
        "--max-score-drift",
        type=click.FloatRange(0, min_open=True),
        help="int8, fp8: largest |Δscore| on calibration images, in rating points; blocks stay in float to keep it. "
        f"Default: {Budget.max_score_drift:g} on a scale of 1 to 5, on others in proportion.",
    ),
    click.option(
        "--min-pearson",
        type=click.FloatRange(0, 1),
        default=Budget.min_pearson,
        show_default=True,
        help="int8, fp8: lowest Pearson correlation with the float scores.",
    ),
    click.option(
        "--calib-cache",
        type=click.Path(path_type=Path, file_okay=False),
        help="int8, fp8: keep histograms of the images here, for faster builds on them.",
    ),
)


def calibration_options(function: _Function) -> _Function:
    """Add the options to a command; they are what `choose_images` takes."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def choose_images(
    weights: Weights,
    precision: Precision,
    *,
    images: Path | None,
    num_images: int | None,
    calib: Path | None,
    progress: Progress,
    **options: Any,  # of `choose_calibration`
) -> tuple[Images, Calibration | None]:
    """Read what a build's parity is measured on, and what it calibrates with.

    Without `images`, some of the pictures of `calib` are kept for parity where they are enough; else faces are drawn.

    Raises:
        UsageError: as `choose_calibration`; or there is no image to measure on.
    """
    from mdnet_export.parity_images import MIN_HELD_OUT, hold_out, own_pictures, parity_images

    size, face, training = weights.config.image_size, weights.config.face, weights.training()
    pictures, held = None, None
    if calib is not None and precision != "fp32":
        pictures = own_pictures(calib, training=training, progress=progress)
        if images is None:
            held, pictures = hold_out(pictures, size, num_images, face=face)
    calibration = choose_calibration(weights, precision, calib=calib, pictures=pictures, progress=progress, **options)
    if held is not None and calibration is not None:
        held = held.besides(calibration.images.pixels)  # the same picture by two names
    enough = min(MIN_HELD_OUT, num_images or MIN_HELD_OUT)
    if held is not None and len(held.names) >= enough:
        return held, calibration
    measured = parity_images(images, size, num_images, face=face, training=training, progress=progress)
    if images is None and calib is not None:
        few = f"{calib.name or calib} has too few pictures to keep some for the gates"
        say(f"warning: {few}; parity is measured on drawn faces, not on pictures like yours (--images DIR)")
        measured = dataclasses.replace(measured, source=f"{measured.source}: {few}")
    return measured, calibration


def choose_calibration(
    weights: Weights,
    precision: Precision,
    *,
    calib: Path | None,
    pictures: Pictures | None = None,
    num_calib: int | None,
    k_centre: bool,
    range_method: RangeMethod,
    max_score_drift: float | None,
    min_pearson: float,
    calib_cache: Path | None,
    progress: Progress,
) -> Calibration | None:
    """Read the calibration images of a build, from `pictures` where they have been looked for in `calib` already.

    None for fp32, which has nothing to calibrate.

    Raises:
        UsageError: images are missing, too few, or test images of the benchmark.
    """
    if precision == "fp32":
        if calib is not None:
            raise UsageError("--calib is for --precision int8, fp8 or fp16; fp32 has nothing to calibrate")
        return None
    if precision in ("int8", "fp8") and calib is None and weights.kind == "checkpoint":
        raise UsageError(f"{precision} needs images like those to be scored; give a folder of some 64 with --calib DIR")
    from mdnet_engines.bundle.manifest import ScoreScale
    from mdnet_engines.parity.gates import LIMITS_SCALE
    from mdnet_export.parity_images import calibration_images
    from mdnet_export.quantise import Calibration

    count = _NUM_IMAGES[precision] if num_calib is None else num_calib
    wanted = count * (_CANDIDATES if k_centre else 1)
    images = calibration_images(
        calib if pictures is None else pictures,
        weights.config.image_size,
        wanted,
        face=weights.config.face,
        training=weights.training(),
        progress=progress,
    )
    if images.skipped:
        say(f"note: {images.skipped} calibration images could not be read and are left out")
    if k_centre:
        images = _spread_out(images, count, weights, progress)
    scale = ScoreScale(minimum=weights.config.score_min, maximum=weights.config.score_max)
    if max_score_drift is None:
        max_score_drift = Budget.max_score_drift * scale.width / LIMITS_SCALE.width
    return Calibration(images, range_method, Budget(max_score_drift, min_pearson), calib_cache, scale)


def _spread_out(images: CalibrationSet, count: int, weights: Weights, progress: Progress) -> CalibrationSet:
    """The `count` images that cover the encoder's features best."""
    import numpy as np
    import torch

    from mdnet_calib.calibration_set import k_centre

    encoder = weights.load().diffusion
    rows = []
    advance = progress.count("features of calibration candidates", len(images.names))
    with torch.inference_mode():
        for i in range(len(images.names)):
            maps = encoder(torch.from_numpy(images.pixels[i : i + 1]))
            rows.append(np.concatenate([part.mean(dim=(2, 3)).numpy()[0] for part in maps.values()]))
            advance(1)
    return images.take(k_centre(np.stack(rows), count))
