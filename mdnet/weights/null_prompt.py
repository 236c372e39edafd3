"""The null prompt's embedding: what Stable Diffusion's text encoder gives for the empty prompt, padded to its length.

It never changes, so it is computed once and stored in the MD-Net checkpoint; the text encoder is left behind.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdnet.model.checkpoint import few
from mdnet.model.config import MDNetConfig
from mdnet.weights.foreign_files import Stored, Weights, listing, open_folder, open_weights
from mdnet_engines.errors import MDNetError, first_line, require

LDM_TEXT = "cond_stage_model.transformer."
OPEN_CLIP_TEXT = "cond_stage_model.model."
OPEN_CLIP_LAYERS = 23
"""Stable Diffusion 2 leaves out the last of OpenCLIP's 24 layers; files made from diffusers' folders lack it."""
OPEN_CLIP_NAMES = {
    "token_embedding.": "embeddings.token_embedding.",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.": "final_layer_norm.",
    "transformer.resblocks.": "encoder.layers.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".attn.": ".self_attn.",
}
"""Parts of OpenCLIP's names → of transformers'."""
OPEN_CLIP_UNUSED = ("text_projection", "logit_scale", "attn_mask")
HEAD_WIDTH = 64
"""Of every CLIP text encoder that was published."""


def null_prompt(source: Path, stored: Path | None, config: MDNetConfig) -> tuple[Tensor, tuple[Path, ...]]:
    """The embedding (tokens, context_dim) in float32, and the files it came from.

    Args:
        source: a diffusers folder with `text_encoder/` and `tokenizer/`, or a single file.
        stored: a file that holds the embedding; it goes before `source`.

    Raises:
        MDNetError: there is neither, transformers is not installed, or the embedding has another shape.
    """
    files: tuple[Path, ...]
    if stored is not None:
        context, files, origin = _read_stored(stored), (stored,), stored
    elif source.is_dir():
        context, files = _from_folder(source, config)
        origin = source / "text_encoder"
    else:
        context, files, origin = _from_single_file(open_weights(source), config), (source,), source
    context = context.squeeze(0) if context.ndim == 3 else context
    wanted = (config.context_length, config.context_dim)
    if tuple(context.shape) != wanted:
        raise MDNetError(
            f"{origin}: the null prompt's embedding is {tuple(context.shape)}, preset {config.preset} expects {wanted}"
        )
    if not context.is_floating_point() or not torch.isfinite(context).all():
        raise MDNetError(f"{origin}: the null prompt's embedding holds values that are not finite numbers")
    return context.float().contiguous(), files


def _read_stored(file: Path) -> Tensor:
    """One tensor of a .npy, .safetensors or .pt file, or `diffusion.context` of an MD-Net checkpoint."""
    if file.suffix == ".npy":
        try:
            return torch.from_numpy(np.load(file, allow_pickle=False))
        except (ValueError, EOFError, TypeError) as error:
            raise MDNetError(f"{file} is not a NumPy array ({first_line(error)})") from None
    tensors = open_weights(file).tensors
    for name in ("diffusion.context", "context"):
        if name in tensors:
            return tensors[name].read()
    if len(tensors) != 1:
        raise MDNetError(f"{file} holds {few(sorted(tensors))}; expected one tensor, or one called context")
    return next(iter(tensors.values())).read()


def _from_folder(root: Path, config: MDNetConfig) -> tuple[Tensor, tuple[Path, ...]]:
    for part in ("text_encoder", "tokenizer"):
        if not (root / part).is_dir():
            raise _no_text_encoder(f"{root} holds {listing(root)}, and no {part}/", config)
    weights = open_folder(root / "text_encoder", "model", "pytorch_model")  # says in our words what is wrong
    transformers = _transformers()
    variant = "fp16" if ".fp16." in weights.files[0].name or "fp16-" in weights.files[0].name else None
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(root / "tokenizer", local_files_only=True)
        model, report = transformers.CLIPTextModel.from_pretrained(
            root / "text_encoder",
            variant=variant,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises many kinds
        raise MDNetError(
            f"{root}: transformers can't load text_encoder/ and tokenizer/ ({first_line(error)})"
        ) from None
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random numbers
        raise MDNetError(f"{root / 'text_encoder'} does not fit its own config.json: missing {few(missing)}")
    prompt = tokenizer("", padding="max_length", max_length=config.context_length, truncation=True, return_tensors="pt")
    files = (*weights.files, *sorted(file for file in (root / "tokenizer").iterdir() if file.is_file()))
    return _encode(model, prompt.input_ids), files


def _from_single_file(weights: Weights, config: MDNetConfig) -> Tensor:
    """CLIP's sizes are read from the shapes; its vocabulary ends with the start and the end token.

    OpenAI's CLIP, of Stable Diffusion 1, pads with the end token, OpenCLIP with 0.
    """
    stored = _below(weights, LDM_TEXT)
    stored = {name.removeprefix("text_model."): value for name, value in stored.items()}
    if open_clip := not stored:
        stored = _as_transformers(_below(weights, OPEN_CLIP_TEXT))
    words, fc1 = (stored.get(name) for name in ("embeddings.token_embedding.weight", "encoder.layers.0.mlp.fc1.weight"))
    if words is None or fc1 is None:
        problem = f"{weights.source} has no text encoder ({LDM_TEXT}text_model.*, {OPEN_CLIP_TEXT}*)"
        raise _no_text_encoder(problem, config)
    vocabulary, width = words.shape
    transformers = _transformers()
    model = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=fc1.shape[0],
            num_hidden_layers=len({name.split(".")[2] for name in stored if name.startswith("encoder.layers.")}),
            num_attention_heads=max(width // HEAD_WIDTH, 1),
            max_position_embeddings=config.context_length,
            hidden_act="gelu" if open_clip else "quick_gelu",
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )
    state = {name: value.read().float() for name, value in stored.items() if not name.endswith("position_ids")}
    # transformers 5 dropped the prefix `text_model.` from its names.
    prefix = "text_model." if any(name.startswith("text_model.") for name in model.state_dict()) else ""
    try:
        model.load_state_dict({prefix + name: value for name, value in state.items()})
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        raise MDNetError(f"{weights.source}: its text encoder is not a CLIP text model ({problem[:300]})") from None
    ids = torch.full((1, config.context_length), 0 if open_clip else vocabulary - 1)
    ids[0, :2] = torch.tensor([vocabulary - 2, vocabulary - 1])
    return _encode(model, ids)


def _below(weights: Weights, prefix: str) -> dict[str, Stored]:
    return {name.removeprefix(prefix): each for name, each in weights.tensors.items() if name.startswith(prefix)}


def _as_transformers(stored: dict[str, Stored]) -> dict[str, Stored]:
    """OpenCLIP's names → transformers', without the last layer; queries, keys and values lie in one tensor there."""
    renamed: dict[str, Stored] = {}
    for theirs, value in stored.items():
        name = theirs
        for part, ours in OPEN_CLIP_NAMES.items():
            name = name.replace(part, ours)
        layer = name.removeprefix("encoder.layers.").split(".")[0]
        if name in OPEN_CLIP_UNUSED or (layer.isdigit() and int(layer) >= OPEN_CLIP_LAYERS):
            continue
        head, in_proj, kind = name.partition("in_proj_")
        for i, third in enumerate("qkv" if in_proj else ""):
            shape = (value.shape[0] // 3, *value.shape[1:])
            renamed[f"{head}{third}_proj.{kind}"] = Stored(shape, functools.partial(_third, value, i))
        if not in_proj:
            renamed[name] = value
    return renamed


def _third(stored: Stored, i: int) -> Tensor:
    return stored.read().chunk(3)[i]


@torch.inference_mode()
def _encode(model: Any, ids: Tensor) -> Tensor:
    # The last hidden state, with the final norm, and no attention mask. Stable Diffusion 2 left out the last layer.
    return model.eval()(ids).last_hidden_state.clone()


def _transformers() -> Any:
    require("transformers", "import")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its remarks would stand among our one-line messages
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers


def _no_text_encoder(problem: str, config: MDNetConfig) -> MDNetError:
    return MDNetError(
        f"{problem}; give the null prompt's embedding with --null-prompt FILE: a checkpoint that `mdnet import` wrote, "
        f"or a ({config.context_length}, {config.context_dim}) tensor in .safetensors, .npy or .pt"
    )
