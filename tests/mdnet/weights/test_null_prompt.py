"""The null prompt's embedding against transformers' own text model, from every place where it may lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import published_weights as published
import pytest
import stock_diffusion as stock
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from mdnet.model.config import preset
from mdnet.weights.null_prompt import null_prompt
from mdnet_engines.errors import MDNetError

CONFIG = preset("demo")


@pytest.fixture
def text(tmp_path: Path) -> tuple[Tensor, dict[str, Tensor], Path]:
    """The embedding by transformers' own model, the published weights, and a folder with encoder and tokenizer."""
    pytest.importorskip("transformers")
    torch.manual_seed(5)
    model, state = published.clip_state(CONFIG, layers=2, vocabulary=40, heads=1)
    root = tmp_path / "text"
    root.mkdir()
    published.write_text_encoder(root, model, state)
    ids = torch.tensor([[38] + [39] * (CONFIG.context_length - 1)])  # start, end, and the end token again as padding
    with torch.inference_mode():
        return model(ids).last_hidden_state[0], state, root


def test_the_null_prompt_of_a_folder_is_transformers_own(text: tuple[Tensor, dict[str, Tensor], Path]) -> None:
    expected, _, root = text
    got, files = null_prompt(root, None, CONFIG)
    # The same operations on the same weights; 1e-6 allows for another attention kernel.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert {file.name for file in files} >= {"model.safetensors", "vocab.json", "merges.txt"}


@pytest.mark.parametrize("file", ["model.fp16.safetensors", "pytorch_model.bin"])
def test_the_text_encoders_other_names_are_read(file: str, text: tuple[Tensor, dict, Path], tmp_path: Path) -> None:
    expected, state, root = text
    (root / "text_encoder" / "model.safetensors").unlink()
    if file.endswith(".bin"):
        torch.save(state, root / "text_encoder" / file)
    else:
        save_file({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, root / "text_encoder" / file)
    got, _ = null_prompt(root, None, CONFIG)
    # fp16 keeps 11 bits of each weight; the embedding is normalised, about 1.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-2 if "fp16" in file else 1e-6)


def test_the_null_prompt_of_a_single_file_needs_no_tokenizer(
    text: tuple[Tensor, dict[str, Tensor], Path], tmp_path: Path
) -> None:
    expected, state, _ = text
    save_file({f"cond_stage_model.transformer.{k}": v for k, v in state.items()}, tmp_path / "sd.safetensors")
    got, _ = null_prompt(tmp_path / "sd.safetensors", None, CONFIG)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


OPEN_CLIP = stock.SMALL["sd21"]


@pytest.fixture(scope="module")
def open_clip() -> tuple[object, dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Stable Diffusion 2's text encoder: transformers' model with its weights, Stability's, and the embedding.

    The embedding is by PyTorch's own layers on Stability's weights: all but the last, the final norm, a causal mask,
    and 0 as the padding.
    """
    pytest.importorskip("transformers")
    torch.manual_seed(7)
    width, length = OPEN_CLIP.context_dim, OPEN_CLIP.context_length
    model, state = published.clip_state(OPEN_CLIP, layers=23, vocabulary=40, heads=1, activation="gelu")
    single = published.open_clip_state(state)
    theirs = {name.removeprefix("cond_stage_model.model."): tensor for name, tensor in single.items()}
    ids = torch.tensor([38, 39] + [0] * (length - 2))
    x = (theirs["token_embedding.weight"][ids] + theirs["positional_embedding"])[None]
    mask = nn.Transformer.generate_square_subsequent_mask(length)
    names = {"attn.": "self_attn.", "ln_1.": "norm1.", "ln_2.": "norm2.", "mlp.c_fc.": "linear1."}
    names["mlp.c_proj."] = "linear2."
    layer = nn.TransformerEncoderLayer(width, 1, 4 * width, activation="gelu", norm_first=True, batch_first=True).eval()
    for i in range(23):
        block = f"transformer.resblocks.{i}."
        part = {name.removeprefix(block): tensor for name, tensor in theirs.items() if name.startswith(block)}
        for old, new in names.items():
            part = {name.replace(old, new): tensor for name, tensor in part.items()}
        layer.load_state_dict(part)
        with torch.no_grad():
            x = layer(x, src_mask=mask, is_causal=True)
    return model, state, single, F.layer_norm(x[0], (width,), theirs["ln_final.weight"], theirs["ln_final.bias"])


OpenClip = tuple[object, dict[str, Tensor], dict[str, Tensor], Tensor]


def test_stable_diffusion_2s_null_prompt_is_the_same_of_folder_and_single_file(
    open_clip: OpenClip, tmp_path: Path
) -> None:
    model, state, single, expected = open_clip
    published.write_text_encoder(tmp_path, model, state, pad="!")
    save_file({name: tensor.contiguous() for name, tensor in single.items()}, tmp_path / "v2.safetensors")
    for source in (tmp_path, tmp_path / "v2.safetensors"):
        got, _ = null_prompt(source, None, OPEN_CLIP)
        # 23 layers of float32, by other kernels.
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_a_single_file_that_lacks_open_clips_unused_layer_gives_the_same(open_clip: OpenClip, tmp_path: Path) -> None:
    """So diffusers' script writes it: its folders have 23 layers."""
    _, _, single, expected = open_clip
    kept = {name: tensor.contiguous() for name, tensor in single.items() if ".resblocks.23." not in name}
    assert len(kept) == len(single) - 12
    save_file(kept, tmp_path / "v2.safetensors")
    got, _ = null_prompt(tmp_path / "v2.safetensors", None, OPEN_CLIP)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_an_open_clip_text_encoder_with_missing_weights_is_refused(open_clip: OpenClip, tmp_path: Path) -> None:
    _, _, single, _ = open_clip
    part = "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_bias"
    save_file({k: v.contiguous() for k, v in single.items() if k != part}, tmp_path / "v2.safetensors")
    with pytest.raises(MDNetError, match=r"not a CLIP text model .*layers.22.self_attn.*bias"):
        null_prompt(tmp_path / "v2.safetensors", None, OPEN_CLIP)


def test_a_text_encoder_with_missing_weights_is_refused(text: tuple[Tensor, dict, Path], tmp_path: Path) -> None:
    _, state, root = text
    part = "text_model.encoder.layers.1.mlp.fc2.weight"
    save_file({k: v for k, v in state.items() if k != part}, root / "text_encoder" / "model.safetensors")
    with pytest.raises(MDNetError, match=r"does not fit its own config.json: missing .*layers.1.mlp.fc2.weight"):
        null_prompt(root, None, CONFIG)
    single = {f"cond_stage_model.transformer.{k}": v for k, v in state.items() if k != part}
    save_file(single, tmp_path / "sd.safetensors")
    with pytest.raises(MDNetError, match=r"not a CLIP text model .*layers.1.mlp.fc2.weight") as caught:
        null_prompt(tmp_path / "sd.safetensors", None, CONFIG)
    assert "\n" not in str(caught.value)


def test_a_text_encoder_of_another_width_is_refused(text: tuple[Tensor, dict, Path]) -> None:
    config = dataclasses.replace(CONFIG, context_dim=48)
    with pytest.raises(MDNetError, match=r"embedding is \(8, 32\), preset demo expects \(8, 48\)"):
        null_prompt(text[2], None, config)


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("text_encoder", "tokenizer"):
        (tmp_path / part).mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "text_encoder" / "model.safetensors")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MDNetError, match=r"transformers is not installed; it comes with the extra mdnet\[import\]"):
        null_prompt(tmp_path, None, CONFIG)


def test_without_a_text_encoder_the_way_to_get_an_embedding_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "sd"
    (folder / "unet").mkdir(parents=True)
    message = r"sd holds unet/, and no text_encoder/; give .* with --null-prompt FILE: .* \(8, 32\) tensor"
    with pytest.raises(MDNetError, match=message):
        null_prompt(folder, None, CONFIG)
    save_file({"model.diffusion_model.out.0.bias": torch.ones(1)}, tmp_path / "one.safetensors")
    with pytest.raises(MDNetError, match=r"one.safetensors has no text encoder \(cond_stage_model.*--null-prompt"):
        null_prompt(tmp_path / "one.safetensors", None, CONFIG)


def test_a_stored_null_prompt_is_read_in_each_form(tmp_path: Path) -> None:
    context = torch.randn(CONFIG.context_length, CONFIG.context_dim).half().float()
    np.save(tmp_path / "a.npy", context.numpy())
    save_file({"anything": context.half()}, tmp_path / "b.safetensors")
    save_file({"other": torch.ones(2), "diffusion.context": context}, tmp_path / "c.safetensors")
    torch.save(context[None], tmp_path / "d.pt")
    for file in sorted(tmp_path.iterdir()):
        got, files = null_prompt(tmp_path, file, CONFIG)
        assert torch.equal(got, context), file.name
        assert files == (file,)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a.npy", lambda f: f.write_bytes(b"no"), "a.npy is not a NumPy array"),
        ("b.safetensors", lambda f: save_file({"x": torch.ones(77, 768)}, f), r"is \(77, 768\), .* expects \(8, 32\)"),
        ("c.pt", lambda f: torch.save({"x": torch.ones(1), "y": torch.ones(1)}, f), "holds x, y; expected one tensor"),
        ("d.pt", lambda f: torch.save(torch.full((8, 32), float("inf")), f), "values that are not finite numbers"),
        ("e.pt", lambda f: torch.save(torch.ones(8, 32, dtype=torch.int64), f), "values that are not finite numbers"),
        ("f.pt", lambda f: None, "f.pt: no such file"),
    ],
)
def test_a_wrong_null_prompt_is_explained(name: str, make: Callable, message: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    with pytest.raises(MDNetError, match=message):
        null_prompt(tmp_path, tmp_path / name, CONFIG)
