"""Vision Mamba against a plain implementation that flips the sequence, as the published code does."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mdnet.model.config import preset
from mdnet.model.vim import IMAGENET_MEAN, IMAGENET_STD, VisionMamba

CONFIG = dataclasses.replace(preset("demo"), vim_depth=2, vim_dim=24, fusion_heads=2, vim_state=5)


def slow_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
    h = torch.zeros(*u.shape[:2], A.shape[1], dtype=u.dtype)
    steps = []
    for t in range(u.shape[2]):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta * u)[:, :, t, None] * B[:, None, :, t]
        steps.append((h * C[:, None, :, t]).sum(-1) + D * u[:, :, t])
    return torch.stack(steps, dim=2) * F.silu(z)


def one_direction(weights: dict[str, Tensor], mark: str, x: Tensor, z: Tensor) -> Tensor:
    """A causal mixer on (B, D, L), with the weights called `conv1d<mark>` and so on."""
    kernel = weights[f"conv1d{mark}.weight"]
    x = F.conv1d(x, kernel, weights[f"conv1d{mark}.bias"], padding=kernel.shape[2] - 1, groups=x.shape[1])
    x = F.silu(x[..., : z.shape[2]])
    A = -torch.exp(weights["A_b_log" if mark else "A_log"])
    rank = weights[f"dt_proj{mark}.weight"].shape[1]
    mixed = torch.einsum("rd,bdl->brl", weights[f"x_proj{mark}.weight"], x)
    dt, B, C = mixed[:, :rank], mixed[:, rank : rank + A.shape[1]], mixed[:, rank + A.shape[1] :]
    dt = torch.einsum("dr,brl->bdl", weights[f"dt_proj{mark}.weight"], dt)
    dt = F.softplus(dt + weights[f"dt_proj{mark}.bias"][:, None])
    return slow_scan(x, dt, A, B, C, weights[f"D{mark}"], z)


def flipped_vim(vim: VisionMamba, image: Tensor) -> Tensor:
    """The published algorithm on the same weights: both directions run forward, one of them on flipped tokens."""
    weights = {name: tensor.double() for name, tensor in vim.state_dict().items()}
    pixels = image.double().permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(value, dtype=torch.float64)[:, None, None] for value in (IMAGENET_MEAN, IMAGENET_STD))
    patches = F.conv2d((pixels - mean) / std, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], 16)
    patches = patches.flatten(2).transpose(1, 2)
    middle = patches.shape[1] // 2
    cls = weights["cls_token"].expand(len(image), -1, -1)
    hidden = torch.cat([patches[:, :middle], cls, patches[:, middle:]], dim=1) + weights["pos_embed"]
    residual = torch.zeros_like(hidden)

    def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5) * weight

    for i in range(CONFIG.vim_depth):
        mixer = {k.removeprefix(f"layers.{i}.mixer."): v for k, v in weights.items() if f"layers.{i}.mixer." in k}
        residual = residual + hidden
        normed = rms_norm(residual, weights[f"layers.{i}.norm.weight"])
        x, z = (normed @ mixer["in_proj.weight"].T).transpose(1, 2).chunk(2, dim=1)
        y = one_direction(mixer, "", x, z) + one_direction(mixer, "_b", x.flip(-1), z.flip(-1)).flip(-1)
        hidden = (y / 2).transpose(1, 2) @ mixer["out_proj.weight"].T
    return rms_norm(residual + hidden, weights["norm_f.weight"])


@pytest.fixture(scope="module")
def vim() -> VisionMamba:
    torch.manual_seed(0)
    model = VisionMamba(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the usual start has symmetric directions and weights of one
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_no_flip_equals_flipped_forward(vim: VisionMamba) -> None:
    image = torch.randint(0, 256, (3, 128, 128, 3), dtype=torch.uint8)
    expected = flipped_vim(vim, image)
    with torch.no_grad():
        tokens = vim(image).double()
    # float32 against float64 over two blocks.
    assert (tokens - expected).abs().max() < 1e-5 * expected.abs().max()


def test_directions_differ(vim: VisionMamba) -> None:
    """Guards the test above: a model whose backward branch were dropped or doubled must not pass it."""
    forward, backward = vim.layers[0].mixer.branches()
    assert not torch.allclose(forward.taps, backward.taps.flip(-1))
    x = torch.randn(1, CONFIG.vim_inner, 9)
    assert not torch.allclose(forward.run(x, x, reverse=False), backward.run(x, x, reverse=True))


def test_backward_branch_sees_only_the_future(vim: VisionMamba) -> None:
    _, backward = vim.layers[0].mixer.branches()
    x, z = torch.randn(2, 1, CONFIG.vim_inner, 12)
    changed = x.clone()
    changed[..., 4] += 1
    before, after = (backward.run(value, z, reverse=True) for value in (x, changed))
    assert torch.equal(before[..., 5:], after[..., 5:])
    assert not torch.equal(before[..., :5], after[..., :5])


def test_state_dict_has_the_published_keys() -> None:
    mixer = "A_log D A_b_log D_b in_proj.weight conv1d.weight conv1d.bias x_proj.weight dt_proj.weight dt_proj.bias "
    mixer += "conv1d_b.weight conv1d_b.bias x_proj_b.weight dt_proj_b.weight dt_proj_b.bias out_proj.weight"
    expected = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm_f.weight"}
    for i in range(CONFIG.vim_depth):
        expected |= {f"layers.{i}.mixer.{key}" for key in mixer.split()} | {f"layers.{i}.norm.weight"}
    assert set(VisionMamba(CONFIG).state_dict()) == expected


@pytest.mark.parametrize(("name", "dim", "parameters"), [("sd15-vim-t", 192, 7.0e6), ("sd15-vim-s", 384, 25.4e6)])
def test_published_sizes(name: str, dim: int, parameters: float) -> None:
    config = dataclasses.replace(preset(name), image_size=256)
    with torch.device("meta"):
        vim = VisionMamba(config)
    count = sum(p.numel() for p in vim.parameters())
    assert vim.layers[0].mixer.in_proj.weight.shape == (4 * dim, dim)
    assert vim.layers[0].mixer.dt_proj.in_features == -(-dim // 16)
    assert count == pytest.approx(parameters, rel=0.03)  # the published count has a classifier and 197 positions


@pytest.mark.parametrize(("size", "index"), [(224, 98), (256, 128), (512, 512)])
def test_class_token_stands_in_the_middle(size: int, index: int) -> None:
    config = dataclasses.replace(preset("sd15-vim-s"), image_size=256)
    object.__setattr__(config, "image_size", size)  # 224 is what was published; our encoder can't take it
    assert config.vim_class_index == index
