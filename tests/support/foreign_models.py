"""Models that others wrote or described, small, with random weights: each on its own scan, and on ours.

Transformers' and mambapy's code is theirs. VMamba's, MambaVision's and Vim's blocks are written anew after the papers
(arXiv 2401.10166, 2407.08083, 2401.09417), with the scan as an argument.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdnet.scan import mamba_chunk_scan_combined, selective_scan_fn, selective_state_update

Patch = Callable[[nn.Module], contextlib.AbstractContextManager[Any]]


def slow_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):  # type: ignore[no-untyped-def]
    """mamba-ssm's `selective_scan_fn` as a loop over the formula: what the blocks below have of their own."""
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    if B.ndim == 2:
        B, C = (mix[None, :, :, None].expand(len(u), -1, -1, u.shape[2]) for mix in (B, C))
    B, C = (mix if mix.ndim == 4 else mix[:, None] for mix in (B, C))
    B, C = (mix.repeat_interleave(u.shape[1] // mix.shape[1], 1) for mix in (B, C))
    h, steps = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        h = torch.exp(dt[:, :, t, None] * A) * h + (dt[:, :, t] * u[:, :, t])[..., None] * B[..., t]
        steps.append((h * C[..., t]).sum(-1))
    y = torch.stack(steps, -1)
    y = y if D is None else y + D[:, None] * u
    y = y if z is None else y * F.silu(z)
    return (y, h) if return_last_state else y


class SS2D(nn.Module):
    """VMamba's cross scan: four directions of an image as four groups of one scan, one state for each channel."""

    def __init__(self, scan: Callable[..., Any] = slow_scan, dim: int = 12, states: int = 1, rank: int = 2):
        super().__init__()
        self.scan, self.sizes = scan, [rank, states, states]
        self.x_proj = nn.Parameter(torch.randn(4, rank + 2 * states, dim) / 4)
        self.dt_proj = nn.Parameter(torch.randn(4, dim, rank) / 4)
        self.dt_bias = nn.Parameter(torch.randn(4 * dim) - 2)
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(4 * dim, 1))
        self.D = nn.Parameter(torch.ones(4 * dim))
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:  # (B, H, W, C)
        height, width, dim = image.shape[1:]
        x = image.permute(0, 3, 1, 2)
        across = torch.stack([x.flatten(2), x.mT.flatten(2)], 1)  # (B, 2, C, L): by rows and by columns
        x = torch.cat([across, across.flip(-1)], 1)
        dt, B, C = torch.einsum("bkcl,kdc->bkdl", x, self.x_proj).split(self.sizes, 2)
        delta = torch.einsum("bkrl,kcr->bkcl", dt, self.dt_proj).flatten(1, 2)
        A = -self.A_log.exp()
        y = self.scan(x.flatten(1, 2), delta, A, B, C, self.D, delta_bias=self.dt_bias, delta_softplus=True)
        y = y.unflatten(1, (4, dim))
        y = y[:, :2] + y[:, 2:].flip(-1)
        columns = y[:, 1].unflatten(-1, (width, height)).mT.flatten(2)
        return self.norm((y[:, 0] + columns).mT).unflatten(1, (height, width))


class VisionMixer(nn.Module):
    """MambaVision's mixer: half the channels go through the scan, without a gate; the others pass beside it."""

    def __init__(self, scan: Callable[..., Any] = slow_scan, dim: int = 16, states: int = 8, rank: int = 2):
        super().__init__()
        half = dim // 2
        self.scan, self.sizes = scan, [rank, states, states]
        self.in_proj, self.out_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.conv_x, self.conv_z = (nn.Conv1d(half, half, 3, padding="same", groups=half, bias=False) for _ in "xz")
        self.x_proj = nn.Linear(half, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, half)
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(half, 1))
        self.D = nn.Parameter(torch.ones(half))

    def forward(self, tokens: Tensor) -> Tensor:  # (B, L, C)
        x, z = self.in_proj(tokens).mT.chunk(2, 1)
        x, z = F.silu(self.conv_x(x)), F.silu(self.conv_z(z))
        dt, B, C = self.x_proj(x.mT).mT.split(self.sizes, 1)
        delta = self.dt_proj.weight @ dt
        y = self.scan(
            x, delta, -self.A_log.exp(), B, C, self.D, z=None, delta_bias=self.dt_proj.bias, delta_softplus=True
        )
        return self.out_proj(torch.cat([y, z], 1).mT)


class VimMixer(nn.Module):
    """Vim's mixer, "v2": the tokens forward and flipped, each direction with its own weights, and their mean."""

    def __init__(self, scan: Callable[..., Any] = slow_scan, dim: int = 8, states: int = 16, rank: int = 2):
        super().__init__()
        inner = 2 * dim
        self.scan, self.sizes = scan, [rank, states, states]
        self.in_proj, self.out_proj = nn.Linear(dim, 2 * inner, bias=False), nn.Linear(inner, dim, bias=False)
        self.convs = nn.ModuleList(nn.Conv1d(inner, inner, 4, padding=3, groups=inner) for _ in range(2))
        self.x_projs = nn.ModuleList(nn.Linear(inner, rank + 2 * states, bias=False) for _ in range(2))
        self.dt_projs = nn.ModuleList(nn.Linear(rank, inner) for _ in range(2))
        self.A_logs = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(2, inner, 1))
        self.Ds = nn.Parameter(torch.ones(2, inner))

    def forward(self, tokens: Tensor) -> Tensor:  # (B, L, d)
        both = self.in_proj(tokens).mT
        forward, backward = self.branch(both, 0), self.branch(both.flip(-1), 1)
        return self.out_proj((forward + backward.flip(-1)).mT / 2)

    def branch(self, both: Tensor, k: int) -> Tensor:
        x, z = both.chunk(2, 1)
        x = F.silu(self.convs[k](x)[..., : x.shape[-1]])
        dt, B, C = self.x_projs[k](x.mT).mT.split(self.sizes, 1)
        dt_proj = self.dt_projs[k]
        delta, A = dt_proj.weight @ dt, -self.A_logs[k].exp()
        return self.scan(x, delta, A, B, C, self.Ds[k], z=z, delta_bias=dt_proj.bias, delta_softplus=True)


@dataclass(frozen=True)
class Foreign:
    """A model, what it takes, and how our scan gets into it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    ours: Patch
    dynamic: dict[int, str]
    """Of its one input: which axes may have any size."""
    scans: int
    """How many scans it has, and so how many nodes its file."""


@contextlib.contextmanager
def _argument(model: nn.Module) -> Iterator[None]:
    with mock.patch.object(model, "scan", selective_scan_fn):
        yield


@contextlib.contextmanager
def _mambapy(model: nn.Module) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for layer in model.layers:
            stack.enter_context(mock.patch.object(layer.mixer.config, "use_cuda", True))
            layer.mixer.selective_scan_cuda = selective_scan_fn  # where it puts what it imports from mamba_ssm
        yield


def _build_mambapy() -> nn.Module:
    from mambapy.mamba import Mamba, MambaConfig

    return Mamba(MambaConfig(d_model=8, n_layers=2, d_state=8, pscan=False))


class Logits(nn.Module):
    """A causal language model as a function of its tokens."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


SIZES: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8, "num_hidden_layers": 2},
    "falcon_mamba": {"state_size": 8, "num_hidden_layers": 2},
    "mamba2": {"state_size": 8, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
    "jamba": {
        "num_hidden_layers": 3,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 24,
        "mamba_d_state": 8,
        "mamba_dt_rank": 2,
        "initializer_range": 0.1,  # with 0.02 a layer of so few channels adds next to nothing
    },
}


def language_model(kind: str, **changes: Any) -> nn.Module:
    """Transformers' causal language model of the kind, of few channels; `changes` are to its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    sizes = {"hidden_size": 16, "vocab_size": 40, **SIZES[kind], **changes}
    config = AutoConfig.for_model(kind, **sizes, **tokens)
    return AutoModelForCausalLM.from_config(config).eval()


@contextlib.contextmanager
def ours_in_transformers(kind: str) -> Iterator[None]:
    """Our scan, and our step of it, in the module of transformers that has the models of the kind."""
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    names = {"mamba_selective_scan": selective_scan_fn, "mamba_selective_state_update": selective_state_update}
    if kind == "mamba2":
        names = {
            "mamba2_chunk_scan": mamba_chunk_scan_combined,
            "mamba2_selective_state_update": selective_state_update,
        }
    with mock.patch.multiple(module, **names):
        yield


def _language(kind: str, scans: int) -> Foreign:
    return Foreign(
        lambda: Logits(language_model(kind)),
        lambda: (torch.randint(1, 40, (2, 11)),),
        lambda model: ours_in_transformers(kind),
        {0: "batch", 1: "length"},
        scans,
    )


def _block(build: Callable[[], nn.Module], *shape: int, scans: int = 1, axes: tuple[int, ...] = (0, 1)) -> Foreign:
    names = ("batch", "length", "width")
    dynamic = dict(zip(axes, names, strict=False))
    return Foreign(build, lambda: (torch.randn(shape),), _argument, dynamic, scans)


FOREIGN: dict[str, Foreign] = {
    "transformers' Mamba": _language("mamba", 2),
    "transformers' FalconMamba": _language("falcon_mamba", 2),
    "transformers' Jamba": _language("jamba", 2),
    "transformers' Mamba2": _language("mamba2", 2),
    "mambapy": Foreign(_build_mambapy, lambda: (torch.randn(2, 11, 8),), _mambapy, {0: "batch", 1: "length"}, 2),
    "VMamba's cross scan": _block(SS2D, 2, 4, 5, 12, axes=(0,)),
    "MambaVision's mixer": _block(VisionMixer, 2, 11, 16),
    "Vim's mixer": _block(VimMixer, 2, 11, 8, scans=2),
}


def built(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model and its inputs, the same in every call."""
    torch.manual_seed(0)
    foreign = FOREIGN[name]
    return foreign.build().eval(), foreign.inputs()
