"""hustvl's checkpoints: what is read of them, how positions change size, and what is refused."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import published_weights as published
import pytest
import torch
from recorded import Recorded
from safetensors.torch import save_file
from torch import Tensor

from mdnet.model.config import MDNetConfig, preset
from mdnet.model.vim import VisionMamba
from mdnet.weights.vision_mamba import open_vim, resize_positions, take_vim
from mdnet_engines.errors import MDNetError

CONFIG = preset("demo")
PUBLISHED = "vim_small_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"


def cubic(distance: float, a: float = -0.75) -> float:
    """Keys' cubic kernel; PyTorch (and OpenCV) take a = −0.75."""
    x = abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resized(rows: np.ndarray, grid: int) -> np.ndarray:
    """The rule of the contract, place by place: take row M//2 out, resample the grid, put it back at the new M//2."""
    middle, old = (len(rows) - 1) // 2, math.isqrt(len(rows) - 1)
    places = np.delete(rows, middle, axis=0).reshape(old, old, -1)
    weights = np.zeros((grid, old))
    for new in range(grid):
        centre = (new + 0.5) * old / grid - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            weights[new, min(max(tap, 0), old - 1)] += cubic(centre - tap)
    out = np.einsum("ya,xb,abd->yxd", weights, weights, places).reshape(grid * grid, -1)
    return np.insert(out, grid * grid // 2, rows[middle], axis=0)


@pytest.mark.parametrize(("old", "new"), [(14, 16), (14, 8), (27, 31), (14, 13), (7, 8), (9, 9)])
def test_positions_are_resized_around_the_middle_class_token(old: int, new: int) -> None:
    torch.manual_seed(0)
    positions = torch.randn(1, old**2 + 1, 5, dtype=torch.float64)
    got = resize_positions(positions, new)
    expected = resized(positions[0].numpy(), new)
    assert got.shape == (1, new**2 + 1, 5)
    assert torch.equal(got[0, new**2 // 2], positions[0, old**2 // 2])
    # float64 on both sides, sums of sixteen terms.
    np.testing.assert_allclose(got[0].numpy(), expected, rtol=0, atol=1e-12)


def test_a_gradient_of_positions_stays_one() -> None:
    """Guards against a transposed grid: along each axis the values still rise, inside, by the ratio of the grids."""
    rows = torch.arange(14.0)[:, None].expand(14, 14)
    patches = torch.stack([rows, rows.T], dim=-1).reshape(1, 196, 2)
    positions = torch.cat([patches[:, :98], torch.full((1, 1, 2), 99.0), patches[:, 98:]], dim=1)
    got = resize_positions(positions, 16)[0]
    grid = torch.cat([got[:128], got[129:]]).reshape(16, 16, 2)
    inside = slice(3, 13)  # away from the edges, where the kernel repeats the last row
    steps_down, steps_right = grid[..., 0].diff(dim=0)[inside], grid[..., 1].diff(dim=1)[:, inside]
    # A cubic of a = −0.75 is not exact on lines: it errs by about a hundredth of a step.
    torch.testing.assert_close(steps_down, torch.full_like(steps_down, 14 / 16), rtol=0, atol=0.1)
    torch.testing.assert_close(steps_right, torch.full_like(steps_right, 14 / 16), rtol=0, atol=0.1)


def make(tmp_path: Path, config: MDNetConfig = CONFIG, size: int = 224, **args: Any) -> tuple[Path, dict[str, Tensor]]:
    torch.manual_seed(1)
    state = published.vim_state(config, size)
    return published.write_vim(tmp_path / "vim.pth", state, size, **args), state


@pytest.mark.parametrize("stride", [16, 8])
@pytest.mark.parametrize(("trained", "image_size"), [(224, 128), (224, 256), (128, 128), (384, 192)])
def test_a_checkpoint_is_read_at_any_size(trained: int, image_size: int, stride: int, tmp_path: Path) -> None:
    file, state = make(tmp_path, dataclasses.replace(CONFIG, vim_stride=stride), trained, model=PUBLISHED)
    config, weights = open_vim(file, None, image_size)
    assert (config.preset, config.image_size, config.vim_stride) == ("demo", image_size, stride)
    got, dropped = take_vim(weights, config)
    assert dropped == ["head.bias", "head.weight"]
    assert set(got) == set(state) - set(dropped)
    for name in set(got) - {"pos_embed"}:
        assert torch.equal(got[name], state[name]), name
    expected = resized(state["pos_embed"][0].double().numpy(), config.vim_grid)
    # Computed in float64 on both sides, then rounded once to float32: values up to 5 differ by at most 2.4e-7.
    np.testing.assert_allclose(got["pos_embed"][0].numpy(), expected, rtol=0, atol=3e-7)
    vim = VisionMamba(config)
    vim.load_state_dict(got)
    image = torch.randint(0, 256, (1, image_size, image_size, 3), dtype=torch.uint8)
    with torch.inference_mode():
        assert vim(image).shape == (1, config.vim_grid**2 + 1, config.vim_dim)


def test_positions_of_the_same_size_are_kept_to_the_bit(tmp_path: Path) -> None:
    file, state = make(tmp_path, size=CONFIG.image_size)
    config, weights = open_vim(file, None, None)
    assert torch.equal(take_vim(weights, config)[0]["pos_embed"], state["pos_embed"])


@pytest.mark.parametrize(("name", "positions"), [("sd15-vim-t", 197), ("sd15-vim-s", 197), ("sd15-vim-s", 730)])
def test_the_published_sizes_and_strides_are_recognised(name: str, positions: int, tmp_path: Path) -> None:
    stride = 16 if positions == 197 else 8
    config = dataclasses.replace(preset(name), vim_stride=stride)
    state = {k: torch.zeros(()).expand(t.shape) for k, t in meta_vim(config).items()}
    state["pos_embed"] = torch.zeros(()).expand(1, positions, config.vim_dim)
    torch.save({"model": state}, tmp_path / "vim.pth")  # without args, the published resolution
    got, weights = open_vim(tmp_path / "vim.pth", None, None)
    assert got == config
    assert take_vim(weights, got)[0]["pos_embed"].shape == (1, config.vim_grid**2 + 1, config.vim_dim)


def meta_vim(config: MDNetConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return VisionMamba(config).state_dict()


def test_optimiser_and_average_are_left_alone(tmp_path: Path) -> None:
    """`model_ema` of the made file is zero, `model` is not."""
    file, _ = make(tmp_path)
    config, weights = open_vim(file, None, None)
    assert all(tensor.abs().max() > 0 for tensor in take_vim(weights, config)[0].values())


def renamed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


STATE = published.vim_state(CONFIG, 224)
WRAPPED: dict[str, tuple[object, str | None]] = {
    "DistributedDataParallel": ({"model": renamed(STATE, "module.")}, "names without `module.`"),
    "torch.compile": (renamed(STATE, "_orig_mod."), "names without `_orig_mod.`"),
    "compiled and distributed": ({"model": renamed(STATE, "module._orig_mod.")}, "names without `module._orig_mod.`"),
    "Lightning": (
        {
            "state_dict": {**renamed(STATE, "model."), "loss.weight": torch.ones(3)},
            "pytorch-lightning_version": "2.5",
            "hyper_parameters": {"folder": Path("data")},
        },
        "names without `model.`, 1 other tensors left out",
    ),
    "timm's average": ({"state_dict_ema": STATE, "epoch": 3}, "`state_dict_ema`"),
    "average alone": ({"model_ema": renamed(STATE, "module.")}, "`model_ema`, names without `module.`"),
    "plain": (STATE, None),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_a_wrapped_checkpoint_is_recognised_and_said_in_one_line(case: str, tmp_path: Path) -> None:
    content, told = WRAPPED[case]
    torch.save(content, tmp_path / "vim.pth")
    progress = Recorded()
    config, weights = open_vim(tmp_path / "vim.pth", None, 224 // 64 * 64, progress=progress)
    got, _ = take_vim(weights, config)
    assert all(torch.equal(got[name], STATE[name]) for name in got if name != "pos_embed")
    assert progress.notes == ([f"vim.pth: {told}"] if told else [])


def test_wrapped_safetensors_are_recognised(tmp_path: Path) -> None:
    save_file(renamed(STATE, "module."), tmp_path / "vim.safetensors")
    config, weights = open_vim(tmp_path / "vim.safetensors", None, None)
    assert torch.equal(take_vim(weights, config)[0]["cls_token"], STATE["cls_token"])


@pytest.mark.parametrize(("noted", "size"), [(384, 384), (np.float64(224.0), 224)], ids=["int", "numpy"])
def test_scalars_of_numpy_and_paths_in_the_command_line_are_no_obstacle(
    noted: object, size: int, tmp_path: Path
) -> None:
    state = published.vim_state(CONFIG, size)
    args = argparse.Namespace(input_size=noted, lr=np.float32(0.1), output_dir=tmp_path, pure=PurePosixPath("/data"))
    torch.save({"model": state, "args": args}, tmp_path / "vim.pth")
    config, weights = open_vim(tmp_path / "vim.pth", None, None)
    assert torch.equal(take_vim(weights, config)[0]["cls_token"], state["cls_token"])


def test_tensors_of_no_wrapper_that_is_known_are_not_taken(tmp_path: Path) -> None:
    torch.save(renamed(STATE, "teacher."), tmp_path / "vim.pth")
    with pytest.raises(MDNetError, match="is not a Vision Mamba of hustvl/Vim: it lacks cls_token"):
        open_vim(tmp_path / "vim.pth", None, None)


def drop(*names: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: [state.pop(name) for name in names]


def change(**tensors: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.update({name.replace("__", "."): tensor for name, tensor in tensors.items()})


def no_change(_: object) -> None:
    return None


LAYER = "layers.0.mixer."
WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], object], dict[str, Any], str]] = {
    "one direction": (
        drop(LAYER + "A_b_log", LAYER + "D_b"),
        {},
        r"the Vim of preset demo: missing layers.0.mixer.A_b_log; missing layers.0.mixer.D_b$",
    ),
    "unexpected": (change(norm_f__bias=torch.ones(48)), {}, "demo: unexpected norm_f.bias$"),
    "shape": (
        change(layers__0__mixer__dt_proj__weight=torch.ones(96, 4)),
        {},
        r"layers.0.mixer.dt_proj.weight is \(96, 4\), expected \(96, 3\)$",
    ),
    "no Vim": (
        drop("cls_token", "pos_embed"),
        {},
        "is not a Vision Mamba of hustvl/Vim: it lacks cls_token",
    ),
    "another depth": (change(layers__3__norm__weight=torch.ones(48)), {}, "vim_depth is 4, preset demo expects 3"),
    "another patch": (
        change(patch_embed__proj__weight=torch.ones(48, 3, 8, 8)),
        {},
        "vim_patch is 8, preset demo expects 16",
    ),
    "unknown width": (
        change(cls_token=torch.ones(1, 1, 768)),
        {},
        r"is a Vim of width 768; there are presets for 384 \(sd15-vim-s\), 192 \(sd15-vim-t\), 48 \(demo\)",
    ),
    "positions": (
        change(pos_embed=torch.ones(1, 50, 48)),
        {},
        r"pos_embed is \(1, 50, 48\); images of 224 pixels make 730 \(stride 8\) or 197 \(stride 16\) positions",
    ),
    "class token first": (
        no_change,
        {"model": "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_cls_token"},
        "variant with midclstok, div2 in its name",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_checkpoint_is_explained_on_one_line(case: str, tmp_path: Path) -> None:
    edit, args, message = WRONG[case]
    state = published.vim_state(CONFIG, 224)
    edit(state)
    file = published.write_vim(tmp_path / "vim.pth", state, 224, **args)
    with pytest.raises(MDNetError, match=message) as caught:
        take_vim(*reversed(open_vim(file, None, None)))
    assert "\n" not in str(caught.value)


def test_another_preset_than_asked_for_is_refused(tmp_path: Path) -> None:
    file, _ = make(tmp_path)
    with pytest.raises(MDNetError, match="vim_dim is 48, preset sd15-vim-s expects 384"):
        open_vim(file, "sd15-vim-s", None)


class Harmful:
    """Needs no call to do harm: building an object of an unknown class is refused already."""


def test_a_pickle_with_another_class_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = {"model": published.vim_state(CONFIG, 224), "args": argparse.Namespace(hook=Harmful())}
    torch.save(checkpoint, tmp_path / "vim.pth")
    with pytest.raises(MDNetError, match=r"wants to run \S*Harmful; refused"):
        open_vim(tmp_path / "vim.pth", None, None)
    # Allowing Namespace lasts for one load only.
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_a_cut_file_is_explained(tmp_path: Path) -> None:
    file, _ = make(tmp_path)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(MDNetError, match=r"vim.pth is not a file of weights, or was cut short \("):
        open_vim(file, None, None)
