"""MD-Net checkpoints: one safetensors file with the configuration in its metadata. Nothing in it can run code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mdnet.model.config import MDNetConfig
from mdnet.model.net import MDNet
from mdnet_engines.errors import MDNetError, UsageError, first_line, printable
from mdnet_engines.system.atomic import new_file

CONFIG_KEY = "mdnet_config"
NOTES_KEY = "mdnet_notes"
ORIGINS = ("stable_diffusion", "null_prompt", "encoder", "vae", "vim")
"""Notes that say where weights come from: what is trained from a checkpoint keeps them."""
SHOWN = 5
"""Names in a message, before it says how many more there are."""


def save_checkpoint(model: MDNet, file: str | os.PathLike[str], *, notes: dict[str, object] | None = None) -> None:
    """Write `model` to `file` atomically: a killed run leaves the old file or none.

    Args:
        notes: JSON-ready facts to keep with the weights (data, command, metrics).
    """
    target = Path(file)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    metadata = {CONFIG_KEY: json.dumps(model.config.to_dict()), NOTES_KEY: json.dumps(notes or {})}
    with new_file(target) as scratch:
        save_file(tensors, scratch, metadata)


def load_checkpoint(file: str | os.PathLike[str], *, expect_preset: str | None = None) -> MDNet:
    """Read a model that `save_checkpoint` wrote, in evaluation mode on the CPU.

    Raises:
        MDNetError: not such a file, another preset than `expect_preset`, or keys that don't fit its configuration.
    """
    config, _ = read_metadata(file)
    if expect_preset is not None and config.preset != expect_preset:
        raise MDNetError(f"{file} is a checkpoint of preset {config.preset}, not {expect_preset}")
    with torch.device("meta"):  # shapes only: no time and memory for weights that are replaced at once
        model = MDNet(config)
    with safe_open(os.fspath(file), framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if problems := misfits(expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()}):
        raise MDNetError(f"{file} does not fit its own configuration: {problems}")
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def read_metadata(file: str | os.PathLike[str]) -> tuple[MDNetConfig, dict[str, object]]:
    """The configuration and the notes of a checkpoint, without reading its weights.

    Raises:
        MDNetError: there is no such file, it is no checkpoint, or its configuration can't be one.
    """
    if not Path(file).is_file():
        raise MDNetError(f"{file}: no such file; a checkpoint is what `mdnet train` and `mdnet import` write")
    try:
        with safe_open(os.fspath(file), framework="pt") as stored:
            metadata = stored.metadata() or {}
    except SafetensorError as error:
        raise MDNetError(f"{file} is not a safetensors file ({error})") from None
    if CONFIG_KEY not in metadata:
        raise MDNetError(f"{file} has no MD-Net configuration inside; is it another model's checkpoint?")
    try:
        fields, notes = (json.loads(metadata.get(key, "{}")) for key in (CONFIG_KEY, NOTES_KEY))
    except (ValueError, RecursionError) as error:
        raise MDNetError(f"{file}: its configuration or notes are not JSON ({first_line(error)})") from None
    if not isinstance(fields, dict) or not isinstance(notes, dict):
        raise MDNetError(f"{file}: its configuration and notes are not JSON objects; was it altered?")
    try:
        return MDNetConfig.from_dict(fields), notes
    except UsageError as error:
        raise MDNetError(f"{file} has no usable configuration: {error}") from None


def origins(file: str | os.PathLike[str] | None) -> dict[str, object]:
    """The notes of a checkpoint on where its weights come from; None is the packaged demo. Raises as above."""
    if file is None:
        return {"encoder": "the packaged demo's (Apache-2.0), trained on drawn faces"}
    notes = read_metadata(file)[1]
    return {name: notes[name] for name in ORIGINS if name in notes}


def demo_checkpoint() -> Path:
    """The packaged checkpoint of the preset `demo`, trained on drawn faces."""
    return Path(str(resources.files("mdnet") / "demo.safetensors"))


def misfits(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """Names that are missing, unexpected or wrongly shaped, a few of them; empty where everything fits."""
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {printable(name)}" for name in found if name not in expected]
    problems += [
        f"{name} is {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    return few(sorted(problems), "; ")


def few(items: list[str], separator: str = ", ") -> str:
    """The first of `items` on one line, and how many there are beyond."""
    more = [f"and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return separator.join(items[:SHOWN] + more)
