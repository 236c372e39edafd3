"""Files with the keys, names and layout of what Stable Diffusion 1.5 and 2.1, TAESD and Vision Mamba published.

Weights are random.

python tests/support/published_weights.py FOLDER [PRESET]   # full size by default: 2.3 GB of fp16 files
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import stock_diffusion as stock
import torch
from safetensors.torch import save_file
from torch import Tensor

from mdnet.model.config import MDNetConfig, preset
from mdnet.model.vim import VisionMamba

START, END = "<|startoftext|>", "<|endoftext|>"


def vim_state(config: MDNetConfig, size: int, classes: int = 10) -> dict[str, Tensor]:
    """hustvl's `model`: `config`'s Vim with the positions of `size` pixels and a classifier; every value differs."""
    grid = (size - config.vim_patch) // config.vim_stride + 1
    state = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in VisionMamba(config).state_dict().items()}
    state["pos_embed"] = torch.randn(1, grid**2 + 1, config.vim_dim)
    state["head.weight"], state["head.bias"] = torch.randn(classes, config.vim_dim), torch.randn(classes)
    return state


def write_vim(file: Path, state: dict[str, Tensor], size: int, **args: object) -> Path:
    """A .pth as hustvl's main.py saves it."""
    one = next(iter(state.values()))
    checkpoint = {
        "model": state,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": one}}, "param_groups": [{"lr": 1e-3}]},
        "lr_scheduler": {"base_values": [1e-3], "warmup_steps": []},
        "epoch": 299,
        "model_ema": {name: tensor * 0 for name, tensor in state.items()},
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(input_size=size, batch_size=128, output_dir="./output", **args),
    }
    torch.save(checkpoint, file)
    return file


def clip_state(
    config: MDNetConfig, layers: int, vocabulary: int, heads: int, activation: str = "quick_gelu"
) -> tuple[object, dict[str, Tensor]]:
    """transformers' text model, and its weights under the published names (`text_model.…`)."""
    from transformers import CLIPTextConfig, CLIPTextModel

    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=config.context_dim,
            intermediate_size=4 * config.context_dim,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=config.context_length,
            hidden_act=activation,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    ).eval()
    state = {f"text_model.{k.removeprefix('text_model.')}": v.clone() for k, v in model.state_dict().items()}
    state["text_model.embeddings.position_ids"] = torch.arange(config.context_length)[None]
    return model, state


def open_clip_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published names of a text model → Stability's (`cond_stage_model.model.…`), with a last layer that is not used.

    Written down from open_clip's transformer.py, whose attention is PyTorch's own.
    """
    outer = {"embeddings.token_embedding.weight": "token_embedding.weight"}
    outer |= {"embeddings.position_embedding.weight": "positional_embedding"}
    outer |= {f"final_layer_norm.{kind}": f"ln_final.{kind}" for kind in ("weight", "bias")}
    inner = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    inner |= {"self_attn.out_proj": "attn.out_proj"}
    bare = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    layers = sorted({int(name.split(".")[2]) for name in bare if name.startswith("encoder.layers.")})
    made = {theirs: bare[ours] for ours, theirs in outer.items()}
    for kind in ("weight", "bias"):
        for i in layers:
            ours, theirs = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
            made |= {f"{theirs}.{b}.{kind}": bare[f"{ours}.{a}.{kind}"] for a, b in inner.items()}
            parts = [bare[f"{ours}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            made[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(parts)
    last = f"transformer.resblocks.{layers[-1]}."
    unused = f"transformer.resblocks.{layers[-1] + 1}."
    made |= {name.replace(last, unused): torch.randn_like(made[name]) for name in list(made) if name.startswith(last)}
    width = made["ln_final.bias"].shape[0]
    made |= {"text_projection": torch.randn(width, width), "logit_scale": torch.tensor(4.6)}
    return {f"cond_stage_model.model.{name}": tensor for name, tensor in made.items()}


def write_text_encoder(
    root: Path, model: object, state: dict[str, Tensor], file: str = "model.safetensors", pad: str = END
) -> None:
    """`text_encoder/` and `tokenizer/`; the vocabulary is a few letters and the two special tokens, which come last.

    Stable Diffusion 2's tokenizer pads with `!`, by one of its two files alone.
    """
    encoder, tokenizer = root / "text_encoder", root / "tokenizer"
    encoder.mkdir(parents=True)
    tokenizer.mkdir()
    settings = {**model.config.to_dict(), "architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    (encoder / "config.json").write_text(json.dumps(settings))
    if file.endswith(".bin"):
        torch.save(state, encoder / file)
    else:
        save_file(state, encoder / file, {"format": "pt"})
    size = state["text_model.embeddings.token_embedding.weight"].shape[0]
    letters = ["!", *(chr(0x100 + i) for i in range(size - 3))]
    words = {word: number for number, word in enumerate([*letters, START, END])}
    (tokenizer / "vocab.json").write_text(json.dumps(words))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (tokenizer / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": pad}))
    length = state["text_model.embeddings.position_embedding.weight"].shape[0]
    described = {**special, "model_max_length": length, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(described))


def ldm_unet(state: dict[str, Tensor], config: MDNetConfig) -> dict[str, Tensor]:
    """diffusers' U-Net keys → CompVis' (`model.diffusion_model.…`), written down from CompVis' openaimodel.py."""
    per_level = config.unet_layers + 1
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
    resnet |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    outer = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    outer |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}

    def rename(key: str) -> str:
        for ours, theirs in outer.items():
            if key.startswith(f"{ours}."):
                return f"{theirs}.{key.removeprefix(f'{ours}.')}"
        part, *rest = key.split(".")
        if part == "mid_block":
            kind, number, *rest = rest
            block = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
        else:
            level, kind, number, *rest = rest
            place = int(level) * per_level + int(number)
            if part == "down_blocks" and kind == "downsamplers":
                return f"input_blocks.{(int(level) + 1) * per_level}.0.op.{rest[-1]}"
            if part == "up_blocks" and kind == "upsamplers":
                last = (int(level) + 1) * per_level - 1
                return f"output_blocks.{last}.{1 if level == '0' else 2}.conv.{rest[-1]}"
            side = "input_blocks" if part == "down_blocks" else "output_blocks"
            block = f"{side}.{place + (part == 'down_blocks')}.{1 if kind == 'attentions' else 0}"
        if kind == "resnets":
            rest = [resnet[rest[0]], *rest[1:]]
        return ".".join([block, *rest])

    return {f"model.diffusion_model.{rename(key)}": tensor for key, tensor in state.items()}


def ldm_vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' VAE keys → CompVis' (`first_stage_model.…`), whose attention is made of 1×1 convolutions."""
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
    renamed = {}
    for key, value in state.items():
        tensor = value
        half, *rest = key.split(".")
        match rest:
            case ["mid_block", "attentions", "0", layer, *_, last]:
                tensor = value[:, :, None, None] if last == "weight" and layer != "group_norm" else value
                rest = ["mid", "attn_1", attention[layer], last]
            case ["mid_block", "resnets", number, *tail]:
                rest = ["mid", f"block_{int(number) + 1}", *tail]
            case ["down_blocks", level, "resnets", number, *tail]:
                rest = ["down", level, "block", number, *tail]
            case ["down_blocks", level, "downsamplers", "0", *tail]:
                rest = ["down", level, "downsample", *tail]
            case ["up_blocks", level, "resnets", number, *tail]:
                rest = ["up", str(3 - int(level)), "block", number, *tail]
            case ["up_blocks", level, "upsamplers", "0", *tail]:
                rest = ["up", str(3 - int(level)), "upsample", *tail]
        name = ".".join([half, *rest]).replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        renamed[f"first_stage_model.{name}"] = tensor
    return renamed


def main(root: Path, config: MDNetConfig) -> None:
    """Write `sd/` (fp16), `sd.safetensors` (CompVis' or Stability's, fp16) and `vim.pth`."""
    parts = {}
    for part, make in (("unet", stock.unet), ("vae", stock.vae)):
        with torch.device("meta"):
            model = make(config)
        folder = root / "sd" / part
        folder.mkdir(parents=True)
        model.save_config(folder)
        parts[part] = {k: torch.randn(t.shape, dtype=torch.float16) * 0.02 for k, t in model.state_dict().items()}
        save_file(parts[part], folder / "diffusion_pytorch_model.fp16.safetensors")
    heads = max(config.context_dim // 64, 1)
    sd2 = config.unet_linear_projection
    text, state = clip_state(config, 23 if sd2 else 12, 49408, heads, "gelu" if sd2 else "quick_gelu")
    halves = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    write_text_encoder(root / "sd", text, halves, "model.fp16.safetensors", "!" if sd2 else END)
    single = {**ldm_unet(parts["unet"], config), **ldm_vae(parts["vae"])}
    if sd2:
        single |= open_clip_state(halves)
    else:
        single |= {f"cond_stage_model.transformer.{name}": tensor for name, tensor in halves.items()}
    save_file({name: tensor.contiguous() for name, tensor in single.items()}, root / "sd.safetensors")
    write_vim(root / "vim.pth", vim_state(config, 224, classes=1000), 224)


if __name__ == "__main__":
    main(Path(sys.argv[1]), preset(*sys.argv[2:] or ["sd15-vim-s"]))
