"""Which MD-Net to export: a checkpoint, the packaged demo, or random weights to prove size and speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mdnet.evaluation.scored_model import training_of
from mdnet.model.checkpoint import demo_checkpoint, load_checkpoint, read_metadata
from mdnet.model.config import MDNetConfig, preset
from mdnet.model.net import MDNet, random_mdnet
from mdnet_engines.bundle.files import sha256_of
from mdnet_engines.bundle.manifest import Provenance, Training
from mdnet_engines.errors import UsageError


@dataclass(frozen=True)
class Weights:
    """A model that can be made when it is needed: `kind` says from what."""

    kind: Literal["demo", "checkpoint", "random"]
    config: MDNetConfig
    file: Path | None = None
    sha256: str | None = None
    seed: int | None = None

    def load(self) -> MDNet:
        """Build the model on the CPU, in evaluation mode."""
        if self.file is None:
            assert self.seed is not None
            return random_mdnet(self.config, self.seed)
        return load_checkpoint(self.file)

    def training(self) -> Training | None:
        """Which images the weights learned from, as far as the checkpoint says."""
        return None if self.file is None else training_of(read_metadata(self.file)[1])

    def describe(self) -> str:
        """For one line of output."""
        if self.kind == "demo":
            return "the packaged demo checkpoint (trained on drawn faces: its scores mean nothing for real people)"
        if self.kind == "random":
            return f"random weights (seed {self.seed}): good for size and speed, the scores mean nothing"
        return str(self.file)

    def licenses(self) -> list[str]:
        """What the weights bring with them."""
        if self.kind == "demo":
            return ["weights: Apache-2.0, trained on drawn faces"]
        if self.kind == "random":
            return ["weights: random"]
        assert self.file is not None
        notes = read_metadata(self.file)[1]
        return [
            line for line in (_encoder(notes, self.config), _vae(notes), _vim(notes, self.config), _data(notes)) if line
        ]

    @property
    def name(self) -> str | None:
        """What its owner calls it: a checkpoint's file name without suffix."""
        return self.file.stem[:200] if self.file is not None and self.kind == "checkpoint" else None


def _encoder(notes: Mapping[str, object], config: MDNetConfig) -> str:
    """Whose encoder it is, as the checkpoint says."""
    if licence := _licence(notes.get("stable_diffusion")):
        return f"Stable Diffusion's encoder weights: {licence}"
    if isinstance(found := notes.get("encoder"), str):
        return f"encoder weights: {found:.200}"
    unknown = "encoder weights: the checkpoint does not say whose"
    if config.preset.startswith("demo"):  # whose widths no published encoder has
        return unknown
    return f"{unknown}; Stable Diffusion's are under a CreativeML Open RAIL-M licence, whose use restrictions pass on"


def _vae(notes: Mapping[str, object]) -> str:
    """Of a distilled VAE encoder in place of the encoder's own."""
    found = _licence(notes.get("vae")) or notes.get("vae")
    return f"VAE encoder weights: {found:.200}" if isinstance(found, str) else ""


def _vim(notes: Mapping[str, object], config: MDNetConfig) -> str:
    if licence := _licence(notes.get("vim")):
        return f"Vision Mamba weights: {licence}"
    if isinstance(found := notes.get("vim"), str):
        return f"Vision Mamba weights: {found:.200}"
    return "" if config.preset.startswith("demo") else "Vision Mamba weights: the checkpoint does not say whose"


def _data(notes: Mapping[str, object]) -> str:
    data = notes.get("data")
    if not isinstance(data, str):
        return "training data: the checkpoint does not say; SCUT-FBP5500 is for non-commercial research only"
    in_its_layout = notes.get("protocol") in ("60-40", "cv5") and "drawn faces" not in data
    more = ", in SCUT-FBP5500's layout; that data set is for non-commercial research only" if in_its_layout else ""
    return f"training data: {data:.200}{more}"


def _licence(note: object) -> str:
    licence = note.get("licence") if isinstance(note, Mapping) else None
    return licence[:200] if isinstance(licence, str) else ""


def choose_weights(
    *, checkpoint: Path | None = None, preset_name: str | None = None, random_init: bool = False, seed: int = 0
) -> Weights:
    """Turn what the user asked for into `Weights`.

    Raises:
        UsageError: the options contradict each other, or name a preset that has no packaged weights.
        MDNetError: the checkpoint can't be read.
    """
    if checkpoint is not None:
        if random_init:
            raise UsageError("--checkpoint and --random-init contradict each other; give one of them")
        config, _ = read_metadata(checkpoint)
        if preset_name not in (None, config.preset):
            raise UsageError(f"{checkpoint} is a checkpoint of preset {config.preset}, not {preset_name}")
        return Weights("checkpoint", config, checkpoint, sha256_of(checkpoint))
    config = preset(preset_name or "demo")
    if random_init:
        return Weights("random", config, seed=seed)
    if config.preset != "demo":
        raise UsageError(
            f"preset {config.preset} has no packaged weights; give yours with --checkpoint FILE, "
            "or --random-init to prove size and speed without them"
        )
    return Weights("demo", config, demo_checkpoint(), sha256_of(demo_checkpoint()))


def weights_of(provenance: Provenance, preset_name: str, checkpoint: Path | None) -> Weights:
    """The weights that a bundle was built from.

    Raises:
        UsageError: they came from a checkpoint that is missing here, or differs from the given one.
    """
    if provenance.weights == "random":
        return choose_weights(preset_name=preset_name, random_init=True, seed=provenance.seed or 0)
    if provenance.weights == "checkpoint" and checkpoint is None:
        raise UsageError("the bundle was built from a checkpoint; give it with --against FILE")
    weights = choose_weights(checkpoint=checkpoint, preset_name=preset_name)
    if weights.sha256 != provenance.checkpoint_sha256:
        raise UsageError(
            f"{weights.file} is not what the bundle was built from: its sha256 is {str(weights.sha256)[:12]}…, "
            f"the manifest says {str(provenance.checkpoint_sha256)[:12]}…"
        )
    return weights
