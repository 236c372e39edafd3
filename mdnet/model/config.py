"""MD-Net's configuration, flat and frozen, with a named preset for every model the project knows; and its training's.

The abstract of the paper (arXiv 2509.17172) names the parts, not their sizes. A field marked "ours" is a choice that
the abstract leaves open.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from mdnet_engines.errors import UsageError, printable
from mdnet_engines.framing import LEAST, MOST

FUSIONS = ("cross-attention", "concatenation", "diffusion-only", "vim-only")
"""How the streams are joined: MD-Net's way, then its ablations."""
VAES = ("kl", "tiny")

# Far above every model there is, and small enough to be multiplied.
Pixels = Annotated[int, Field(ge=1, le=4096)]
Width = Annotated[int, Field(ge=1, le=65_536)]
Count = Annotated[int, Field(ge=1, le=1024)]
Rating = Annotated[float, Field(ge=-1e6, le=1e6)]


@checked_dataclass(frozen=True, config=ConfigDict(strict=True))
class MDNetConfig:
    """Everything that determines MD-Net's graphs. Sizes are in channels, tokens or pixels."""

    preset: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]{1,100}$")]
    image_size: Pixels = 256
    """Side of the square input, S. Ours: the smallest size that gives Stable Diffusion's U-Net a 4×4 mid block."""
    face: Annotated[float, Field(ge=LEAST, le=MOST)] | None = None
    """What S×S pixels show: a square of this many times the face, with the eyes level. None: the central square."""

    # Frozen diffusion encoder: the VAE's encoder, then the U-Net's down path and mid block (SD 1.5 by default).
    vae: str = "kl"
    """One of `VAES`: Stable Diffusion's own (diffusers' `AutoencoderKL`), or distilled from it (`AutoencoderTiny`)."""
    vae_channels: tuple[Width, ...] = (128, 256, 512, 512)
    """At S, S/2, S/4 and S/8; a tiny VAE has one width."""
    vae_layers: Count = 2
    """ResNet blocks of a level; a tiny VAE has one at S, whatever this says of the others."""
    latent_channels: Width = 4
    vae_scaling: Annotated[float, Field(gt=0, le=1000)] = 0.18215
    unet_channels: tuple[Width, ...] = (320, 640, 1280, 1280)
    unet_layers: Count = 2
    unet_heads: Count | tuple[Count, ...] = 8
    """Heads of an attention, one count or one for each level; diffusers' configurations say `attention_head_dim`."""
    unet_linear_projection: bool = False
    """Whether a transformer begins and ends with linear layers (SD 2) or 1×1 convolutions (SD 1): other shapes."""
    context_dim: Width = 768
    context_length: Width = 77
    norm_groups: Count = 32
    timestep: Annotated[int, Field(ge=0, lt=1000)] = 1
    """Ours: nearly no noise is assumed in the latent, and none is added (as VPD does), so scores are deterministic."""

    # Vision Mamba
    vim_dim: Width = 384
    vim_depth: Count = 24
    vim_patch: Pixels = 16
    vim_stride: Pixels = 16
    vim_state: Count = 16
    vim_conv: Count = 4
    vim_expand: Count = 2

    # Fusion and head (ours)
    fusion: str = "cross-attention"
    """One of `FUSIONS`; see `mdnet.model.fusion`. All but the first are for comparison."""
    fusion_depth: Count = 2
    fusion_heads: Count = 6
    fusion_mlp: Count = 4
    head_dim: Width = 128
    stream_heads: Annotated[int, Field(ge=0, le=1024)] = 0
    """Weighted sums of its tokens that a head of each stream reads; 0: no such heads, as in older checkpoints."""
    score_min: Rating = 1.0
    score_max: Rating = 5.0

    def __post_init__(self) -> None:
        if self.image_size % 64 or self.image_size <= 0:
            raise UsageError(f"image_size is {self.image_size}; the U-Net's mid block needs a multiple of 64")
        if len(self.vae_channels) != 4 or len(self.unet_channels) != 4:
            raise UsageError("vae_channels and unet_channels need four entries each: S/8 latents, S/64 mid block")
        if self.vae not in VAES:
            raise UsageError(f"vae is {self.vae!r}; known: {', '.join(VAES)}")
        if self.vae == "tiny" and len(set(self.vae_channels)) > 1:
            raise UsageError(f"vae_channels are {_listed(self.vae_channels)}; a tiny VAE has one width")
        if isinstance(self.unet_heads, tuple) and len(self.unet_heads) != 4:
            raise UsageError(f"unet_heads has {len(self.unet_heads)} entries; give one number, or one for each level")
        divisors: list[tuple[str, str, tuple[int, ...]]] = [
            ("unet_channels", "norm_groups", (self.norm_groups,) * 4),
            ("unet_channels", "unet_heads", self.unet_heads_by_level),
        ]
        if self.vae == "kl":  # the other has no norms
            divisors.append(("vae_channels", "norm_groups", (self.norm_groups,) * 4))
        for name, divisor, counts in divisors:
            if any(width % count for width, count in zip(getattr(self, name), counts, strict=True)):
                shown = _listed(counts if len(set(counts)) > 1 else counts[:1])
                raise UsageError(f"{name} {_listed(getattr(self, name))} are not multiples of {divisor} {shown}")
        if self.vim_patch > self.image_size:
            raise UsageError(f"vim_patch is {self.vim_patch}, larger than image_size {self.image_size}")
        if self.score_min >= self.score_max:
            raise UsageError(f"score_min {self.score_min} is not below score_max {self.score_max}")
        if self.vim_dim % self.fusion_heads:
            raise UsageError(f"vim_dim {self.vim_dim} is not a multiple of fusion_heads {self.fusion_heads}")
        if self.fusion not in FUSIONS:
            raise UsageError(f"fusion is {self.fusion!r}; known: {', '.join(FUSIONS)}")

    @property
    def unet_heads_by_level(self) -> tuple[int, ...]:
        """Heads of the attentions of each of the four levels; the mid block has the last one's."""
        return self.unet_heads if isinstance(self.unet_heads, tuple) else (self.unet_heads,) * 4

    @property
    def vae_blocks(self) -> tuple[int, ...]:
        """ResNet blocks of a tiny VAE at S, S/2, S/4 and S/8."""
        return (1, *(self.vae_layers,) * 3)

    @property
    def vim_inner(self) -> int:
        """Channels of the selective scan, D."""
        return self.vim_dim * self.vim_expand

    @property
    def vim_dt_rank(self) -> int:
        """Rank of the step-size projection: ceil(vim_dim / 16)."""
        return -(-self.vim_dim // 16)

    @property
    def vim_grid(self) -> int:
        """Patches along one side."""
        return (self.image_size - self.vim_patch) // self.vim_stride + 1

    @property
    def vim_class_index(self) -> int:
        """Where the class token stands among the vim_grid² + 1 tokens: in the middle."""
        return self.vim_grid**2 // 2

    @property
    def feature_shapes(self) -> dict[str, tuple[int, int, int]]:
        """The encoder's outputs without the batch: name → (channels, height, width)."""
        c, s = self.unet_channels, self.image_size
        return {
            "down_s16": (c[1], s // 16, s // 16),
            "down_s32": (c[2], s // 32, s // 32),
            "mid_s64": (c[3], s // 64, s // 64),
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> MDNetConfig:
        """The inverse of `to_dict`.

        Raises:
            UsageError: a field is unknown, missing, of another type or out of its range; the message names it.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise UsageError(f"unknown configuration fields: {', '.join(unknown)}; was it made by a newer mdnet?")
        if "preset" not in fields:
            raise UsageError("the configuration lacks its preset's name")
        # JSON has no tuples.
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        try:
            return cls(**values)
        except ValidationError as error:
            first = max(error.errors(), key=lambda found: len(found["loc"]))  # an entry of a tuple before the tuple
            field, *rest = first["loc"]
            places = [part for part in rest if isinstance(part, int)]  # of a union, pydantic names the type too
            where = printable(".".join(map(str, (field, *places))))
            raise UsageError(f"{where} is {first['input']!r:.80}: {first['msg'].lower()}") from None


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Rates are per step at `batch_size`.

    Raises:
        UsageError: no epochs, and no linear probe.
    """

    epochs: int = 16
    """0: the linear probe alone."""
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    """Share of the steps over which the rate rises; it then falls along a cosine."""
    clip: float = 1.0
    ema: float = 0.98
    """Decay of the averaged weights per step; they are what is evaluated and kept."""
    validation: float = 0.1
    """Share of the training split that chooses the epoch. The test split has no part in it."""
    stream_loss: float = 0.3
    """Weight of each stream's own error beside that of the score, where the model has heads for streams."""
    views: int = 1
    """Of each training image: itself, and others by `mdnet.training.views`. An epoch takes one of them at random."""
    linear_probe: bool = False
    """Begin with the streams' heads fitted to the ratings (`mdnet.training.probe`)."""
    patience: int = 5
    """Stop after this many epochs in a row without a better validation; 0: never."""
    amp: bool = False
    """Vim and fusion in bfloat16 where PyTorch's autocast allows; weights, scan states and validation stay float32."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.epochs or self.linear_probe):
            raise UsageError("--epochs 0 trains nothing but the linear probe: add --linear-probe")


# The same code at widths that train on two cores in minutes.
_DEMO = MDNetConfig(
    "demo",
    image_size=128,
    vae_channels=(8, 16, 24, 32),
    vae_layers=1,
    unet_channels=(32, 48, 64, 64),
    unet_layers=1,
    unet_heads=2,
    context_dim=32,
    context_length=8,
    norm_groups=8,
    vim_dim=48,
    vim_depth=3,
    fusion_depth=2,
    fusion_heads=2,
    fusion_mlp=2,
    head_dim=32,
    stream_heads=16,
)
_HEADS: dict[str, Any] = {"stream_heads": 16}
PRESETS: dict[str, MDNetConfig] = {
    config.preset: config
    for config in (
        MDNetConfig("sd15-vim-s", **_HEADS),
        MDNetConfig("sd15-vim-t", vim_dim=192, fusion_heads=3, **_HEADS),
        # Heads of 64 channels each; where SD 2.1 predicts velocity in place of noise, the encoder half is the same.
        MDNetConfig(
            "sd21-vim-s", unet_heads=(5, 10, 20, 20), unet_linear_projection=True, context_dim=1024, stream_heads=16
        ),
        # TAESD's latents come out scaled as SD 1.x's U-Net takes them.
        MDNetConfig(
            "sd15-taesd-vim-s", vae="tiny", vae_channels=(64,) * 4, vae_layers=3, vae_scaling=1.0, stream_heads=16
        ),
        _DEMO,
        dataclasses.replace(
            _DEMO, preset="demo-taesd", vae="tiny", vae_channels=(8,) * 4, vae_layers=1, vae_scaling=1.0
        ),
    )
}


def preset(name: str) -> MDNetConfig:
    """The preset called `name`.

    Raises:
        UsageError: there is none; the message lists those there are.
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise UsageError(f"no preset {name!r}; known: {', '.join(PRESETS)}") from None


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
