"""What the documentation says is so: its code runs, its shapes are the model's, it has every field."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from mdnet.model.config import MDNetConfig, TrainConfig, preset
from mdnet.model.net import MDNet

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.parametrize("page", ["selective-scan.md"])
def test_the_code_on_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert blocks
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


@pytest.fixture(scope="module")
def model_page() -> str:
    return (DOCS / "mdnet.md").read_text(encoding="utf-8")


def written(*shape: int) -> str:
    return "×".join(["B", *map(str, shape)])


def test_the_models_page_has_the_models_shapes(model_page: str) -> None:
    config = preset("sd15-vim-s")
    with torch.device("meta"):  # shapes only
        model = MDNet(config).eval()
        image = torch.empty(2, config.image_size, config.image_size, 3, dtype=torch.uint8)
    seen: dict[str, tuple[int, ...]] = {}

    def watch(name: str) -> None:
        def note(_module: object, _inputs: object, output: torch.Tensor) -> None:
            seen[name] = tuple(output.shape[1:])

        model.get_submodule(name).register_forward_hook(note)

    for name in ("diffusion.vae", "diffusion.unet.conv_in", "vim.patch_embed", "fusion.norm_local", "fusion.blocks.1"):
        watch(name)
    features, tokens = model.diffusion(image), model.vim(image)
    model.fusion(features, tokens)
    rows = {row.split(" | ")[0].removeprefix("| "): row for row in model_page.splitlines() if row.startswith("| ")}

    def row(start: str) -> str:
        return next(text for name, text in rows.items() if start in name)

    for start, shape in {
        "input: RGB": image.shape[1:],
        "VAE encoder": seen["diffusion.vae"],
        "first level": seen["diffusion.unet.conv_in"],
        "`down_s16`": features["down_s16"].shape[1:],
        "`down_s32`": features["down_s32"].shape[1:],
        "`mid_s64`": features["mid_s64"].shape[1:],
        "each map as tokens": seen["fusion.norm_local"],
        "class token in the middle": tokens.shape[1:],
        "scan": (config.vim_inner, tokens.shape[1]),
        "its dt, B, C": (config.vim_dt_rank, tokens.shape[1]),
        "`tokens`": tokens.shape[1:],
        "fusion blocks": seen["fusion.blocks.1"],
        "score": (config.vim_dim,),
    }.items():
        assert f"{written(*shape)}" in row(start), start


def test_the_models_page_has_every_field_with_its_value(model_page: str) -> None:
    fields = [*dataclasses.fields(MDNetConfig), *dataclasses.fields(TrainConfig)]
    for field in fields:
        assert f"`{field.name}`" in model_page, field.name
    for config, names in (
        (preset("sd15-vim-s"), ["image_size", "timestep", "fusion_depth", "fusion_heads", "fusion_mlp", "head_dim"]),
        (TrainConfig(), ["weight_decay", "warmup", "clip", "ema", "validation", "seed"]),
    ):
        for name in names:
            value = re.escape(str(getattr(config, name)))
            assert re.search(rf"^\| `{name}` \| {value}\b", model_page, re.MULTILINE), name
