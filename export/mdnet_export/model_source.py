"""Which MD-Net to export: a checkpoint, the packaged demo, or random weights to prove size and speed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mdnet.evaluation.scored_model import training_of
from mdnet.model.checkpoint import demo_checkpoint, load_checkpoint, read_metadata
from mdnet.model.config import MDNetConfig, preset
from mdnet.model.net import MDNet, random_mdnet
from mdnet.weights.assemble import TAESD_LICENCE, sd_licence
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
        tiny = [f"tiny VAE encoder weights: {TAESD_LICENCE}, if they are TAESD's"] if self.config.vae == "tiny" else []
        return [
            f"Stable Diffusion encoder weights: {sd_licence(self.config)}, whose use restrictions pass on",
            *tiny,
            "Vision Mamba weights: Apache-2.0",
            "SCUT-FBP5500, where it was the training data: non-commercial research only",
        ]


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
