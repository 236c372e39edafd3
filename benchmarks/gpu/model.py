"""The whole model, and what all that run it share: images, PyTorch's scores, the checks and figures of a row.

Its random weights are made once and saved beside the bundles (`weights_file`), since a random generator need not give
the same numbers on another machine. They repeat themselves, so that bundles travel in a fiftieth of their size: each
large tensor is cut from one table of 2¹⁹ normal numbers. No engine looks for that, and every tensor starts elsewhere
in the table, so that no two layers are the same.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from gpu.clock import Device, quiet_fp32
from gpu.context import CheckFailed, Context
from gpu.device_facts import ceilings
from gpu.results import Figure
from gpu.sizes import Sizes
from mdnet.model.checkpoint import demo_checkpoint, load_checkpoint
from mdnet.model.config import MDNetConfig
from mdnet.model.net import MDNet, random_mdnet
from mdnet.scan import mamba_ssm as scan_mamba
from mdnet_engines.parity.gates import LIMITS
from mdnet_engines.parity.measure import Images, Outputs
from mdnet_export.parity_images import parity_images

SEED = 0
_TABLE = 2**19  # numbers
_LARGE = 2**14  # elements of a tensor that is cut from the table
IMAGES_PER_S, MATMUL_SHARE = "images/s", "of the matrix product's rate"

Score = Callable[[np.ndarray], np.ndarray]
"""uint8 [n, S, S, 3] on the host → scores [n]."""


@dataclass(frozen=True)
class Reference:
    """What everything is held to: PyTorch in float32, one image at a time."""

    images: Images
    outputs: Outputs

    def batch(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The images again and again, up to `size`, and where each is in `images`."""
        places = np.arange(size) % len(self.images.pixels)
        return self.images.pixels[places], places

    def first(self) -> Reference:
        """The first image alone."""
        images = replace(self.images, names=self.images.names[:1], pixels=self.images.pixels[:1])
        return Reference(images, {name: values[:1] for name, values in self.outputs.items()})


def weights_file(sizes: Sizes, bundles: Path) -> Path:
    """The checkpoint that a set of bundles is built from."""
    return demo_checkpoint() if sizes.packaged else bundles / sizes.name / "weights.safetensors"


def load_model(context: Context) -> MDNet:
    """The model in float32 on the device: with the bundles' weights if they exist."""
    file = weights_file(context.sizes, context.bundles)
    model = load_checkpoint(file) if file.is_file() else random_model(context.sizes.config())
    return model.to(context.device.kind)


def random_model(config: MDNetConfig) -> MDNet:
    """A model whose large tensors have the numbers of one table, each with the spread that PyTorch gave it."""
    model, table = random_mdnet(config, SEED), np.random.default_rng(SEED).standard_normal(_TABLE, dtype=np.float32)
    used: Counter[int] = Counter()
    with torch.no_grad():
        for tensor in model.parameters():
            width = tensor[0].numel() if tensor.ndim > 1 else 0
            if not width or width > _TABLE or tensor.numel() < _LARGE:
                continue
            rows = table[: _TABLE // width * width].reshape(-1, width)
            # Whole rows, so that what int8 makes of a row, with a scale of its own, repeats itself too.
            places = (used[width] + np.arange(len(tensor))) % len(rows)
            used[width] += 7
            tensor.copy_(torch.from_numpy(rows[places]).reshape(tensor.shape) * round(float(tensor.std()), 4))
    return model


def reference(context: Context) -> Reference:
    """PyTorch's outputs, computed by the first stage that asks: on the device, the scan by the loop, no TF32."""
    images = parity_images(None, context.sizes.config().image_size, context.sizes.images)
    file = context.scratch / f"reference-{context.sizes.name}.npz"
    if not file.exists():
        quiet_fp32()
        with patch.object(scan_mamba, "available", lambda *_: False):
            outputs = run_in_torch(load_model(context), images.pixels, context.device)
        draft = file.with_name("draft.npz")
        np.savez(draft, **outputs)
        draft.replace(file)
    with np.load(file) as saved:
        return Reference(images, {name: saved[name] for name in saved.files})


def run_in_torch(model: MDNet, pixels: np.ndarray, device: Device) -> Outputs:
    """Every output of the three graphs, (n, …) each, of one image at a time."""
    rows: list[Outputs] = []
    with torch.inference_mode():
        for i in range(len(pixels)):
            image = torch.from_numpy(pixels[i : i + 1]).to(device.kind)
            features, tokens = model.diffusion(image), model.vim(image)
            tensors = {**features, "tokens": tokens, "score": model.fusion(features, tokens)}
            rows.append({name: tensor.float().cpu().numpy() for name, tensor in tensors.items()})
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def check_scores(
    score: Score, reference: Reference, batch: int, precision: str, singles: np.ndarray
) -> dict[str, Figure]:
    """Hold a batch's scores to PyTorch's, and to `singles`, those of the same images alone.

    The limits are those of the parity gates (`mdnet_engines.parity.gates.LIMITS`). In a batch that is larger than the
    number of images, copies of an image stand in several places.

    Raises:
        CheckFailed: a limit is not held.
    """
    limits = LIMITS[precision]
    images, places = reference.batch(batch)
    got = score(images).astype(np.float64)
    figures: dict[str, Figure] = {
        "max |Δscore|": float(np.abs(got - reference.outputs["score"][places]).max()),
        "batch against singles": float(np.abs(got - singles[places]).max()),
    }
    for name, limit in zip(figures, (limits.score_max_abs, limits.batch_max_abs), strict=True):
        if not float(figures[name]) <= limit:  # NaN is not, either
            raise CheckFailed(f"{name} is {float(figures[name]):.3g}, allowed is {limit:g}", figures)
    return figures


def singles(score: Score, reference: Reference) -> np.ndarray:
    """The scores of the reference's images, one at a time."""
    pixels = reference.images.pixels
    return np.concatenate([score(pixels[i : i + 1]) for i in range(len(pixels))]).astype(np.float64)


def speed(context: Context, seconds: float, batch: int, precision: str) -> dict[str, Figure]:
    """Images a second, the latency, and the share of the measured rate of matrix products that the model's reach.

    The rate is float32's for fp32, float16's for everything else.
    """
    figures: dict[str, Figure] = {IMAGES_PER_S: batch / seconds, "ms a batch": seconds * 1e3}
    if rate := ceilings(context).get("float32" if precision == "fp32" else "float16"):
        figures[MATMUL_SHARE] = operations(context.sizes.config()) * batch / seconds / rate
    return figures


@functools.cache
def operations(config: MDNetConfig) -> int:
    """Floating-point operations of an image in convolutions, products and attention: twice the multiply-adds."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = MDNet(config).eval()
        image = torch.empty(1, config.image_size, config.image_size, 3, dtype=torch.uint8)
        counter: Any = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            model(image)
    return int(counter.get_total_flops())
