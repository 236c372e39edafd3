"""Vision Mamba from a checkpoint of hustvl/Vim: `{"model": state dict, "args": Namespace, …}`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mdnet.model.checkpoint import few
from mdnet.model.config import PRESETS, MDNetConfig, preset
from mdnet.model.vim import VisionMamba
from mdnet.weights.foreign_files import Stored, Weights, open_weights, take, unwrap
from mdnet_engines.errors import MDNetError, UsageError, printable
from mdnet_engines.progress import SILENT, Progress

PUBLISHED_SIZE = 224
"""Training resolution of the published checkpoints, where a file doesn't give its own."""
STRIDES = (16, 8)
TELLING = ("cls_token", "pos_embed", "patch_embed.proj.weight", "layers.0.mixer.A_log", "layers.0.mixer.conv1d.weight")
# Parts of upstream's model names without which the same weights compute something else.
VARIANT = ("bimambav2", "midclstok", "div2")


def open_vim(
    file: Path, preset_name: str | None, image_size: int | None, *, progress: Progress = SILENT
) -> tuple[MDNetConfig, Weights]:
    """Find out what `file` is.

    Args:
        preset_name: None takes it from the checkpoint's width.
        image_size: of the new model; None takes the preset's.
        progress: receives what is unusual about the file.

    Returns:
        The preset with `image_size` and the checkpoint's stride, and the checkpoint.

    Raises:
        MDNetError: not such a checkpoint, or not one of the preset's size.
    """
    weights, note = unwrap(open_weights(file), TELLING[0])
    if note:
        progress.note(note)
    if absent := [name for name in TELLING if name not in weights.tensors]:
        raise MDNetError(
            f"{file} is not a Vision Mamba of hustvl/Vim: it lacks {few(absent)} and holds "
            f"{few([printable(name) for name in weights.tensors])}"
        )
    name = getattr(weights.extras.get("args"), "model", None)
    if isinstance(name, str) and name.startswith("vim_") and (lacking := [p for p in VARIANT if p not in name]):
        raise MDNetError(
            f"{file} is {printable(name)}; MD-Net's Vim is a variant with {', '.join(lacking)} in its name"
        )
    shape = {name: weights.tensors[name].shape for name in TELLING}
    width = shape["cls_token"][-1]
    config = preset(preset_name or _preset_of_width(file, width))
    inner, state = shape["layers.0.mixer.A_log"]
    found = {
        "vim_dim": width,
        "vim_depth": len({name.split(".")[1] for name in weights.tensors if name.startswith("layers.")}),
        "vim_patch": shape["patch_embed.proj.weight"][-1],
        "vim_state": state,
        "vim_conv": shape["layers.0.mixer.conv1d.weight"][-1],
        "vim_expand": inner / width,
    }
    for field, value in found.items():
        if value != (wanted := getattr(config, field)):
            raise MDNetError(f"{file}: {field} is {value:g}, preset {config.preset} expects {wanted}")
    stride = _stride(file, shape["pos_embed"], config.vim_patch, weights)
    return dataclasses.replace(config, image_size=image_size or config.image_size, vim_stride=stride), weights


def take_vim(weights: Weights, config: MDNetConfig) -> tuple[dict[str, Tensor], list[str]]:
    """Read what `open_vim` found: Vim's state dict at `config.image_size`, and the keys of the classifier left out."""
    dropped = sorted(name for name in weights.tensors if name.startswith("head."))
    kept: dict[str, Stored] = {name: value for name, value in weights.tensors.items() if name not in dropped}
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in VisionMamba(config).state_dict().items()}
    shapes["pos_embed"] = (1, kept["pos_embed"].shape[1], config.vim_dim)
    state = take(dataclasses.replace(weights, tensors=kept), shapes, f"the Vim of preset {config.preset}")
    state["pos_embed"] = resize_positions(state["pos_embed"], config.vim_grid)
    return state, dropped


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """(1, g² + 1, d) → (1, grid² + 1, d): bicubic over the patches.

    The class token's row stands in the middle of both (M // 2) and is no place in the image: it moves unchanged.
    """
    patches = positions.shape[1] - 1
    old, middle, new_middle = round(patches**0.5), patches // 2, grid**2 // 2
    if old == grid:
        return positions
    cls = positions[:, middle : middle + 1]
    places = torch.cat([positions[:, :middle], positions[:, middle + 1 :]], dim=1)
    places = places.mT.unflatten(2, (old, old))  # (1, d, g, g)
    # In float64: float32 would misplace the taps of a fine grid by a few 1e-6.
    places = F.interpolate(places.double(), size=(grid, grid), mode="bicubic", align_corners=False)
    places = places.flatten(2).mT.to(cls.dtype)
    return torch.cat([places[:, :new_middle], cls, places[:, new_middle:]], dim=1)


def _preset_of_width(file: Path, width: int) -> str:
    first = {config.vim_dim: config.preset for config in reversed(PRESETS.values())}
    if width in first:
        return first[width]
    known = ", ".join(f"{each} ({first[each]})" for each in sorted(first, reverse=True))
    raise UsageError(f"{file} is a Vim of width {width}; there are presets for {known}")


def _stride(file: Path, shape: tuple[int, ...], patch: int, weights: Weights) -> int:
    """Overlapping patches leave no trace in the weights but the number of positions at the training resolution."""
    size = getattr(weights.extras.get("args"), "input_size", None)
    size = size if isinstance(size, int) else PUBLISHED_SIZE
    counts = {}
    if size >= patch:
        counts = {((size - patch) // stride + 1) ** 2 + 1: stride for stride in reversed(STRIDES)}
    if len(shape) != 3 or shape[1] not in counts:
        fitting = " or ".join(f"{count} (stride {stride})" for count, stride in counts.items())
        raise MDNetError(f"{file}: pos_embed is {shape}; images of {size} pixels make {fitting or 'no'} positions")
    return counts[shape[1]]
