"""`mdnet import` from files to a checkpoint that loads and trains."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import published_weights as published
import pytest
import stock_diffusion as stock
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from mdnet.cli.main import main
from mdnet.data.drawn_set import write_dataset
from mdnet.model.checkpoint import load_checkpoint, read_metadata
from mdnet.model.config import PRESETS, MDNetConfig, preset
from mdnet.model.net import MDNet
from mdnet.model.vim import VisionMamba
from mdnet.weights.assemble import import_weights, sd_licence

CONFIG = preset("demo")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sd/` without a text encoder, `prompt.safetensors`, `vim.pth` at 224 pixels."""
    root = tmp_path_factory.mktemp("published")
    torch.manual_seed(2)
    stock.unet(CONFIG).save_pretrained(root / "sd" / "unet")
    stock.vae(CONFIG).save_pretrained(root / "sd" / "vae")
    save_file({"context": torch.randn(CONFIG.context_length, CONFIG.context_dim)}, root / "prompt.safetensors")
    published.write_vim(root / "vim.pth", published.vim_state(CONFIG, 224), 224)
    return root


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def import_(files: Path, output: Path, *more: object) -> Result:
    prompt = [] if "--null-prompt" in more else ["--null-prompt", files / "prompt.safetensors"]
    return run("import", "--sd", files / "sd", "--vim", files / "vim.pth", *prompt, "-o", output, *more)


def test_import_then_load_then_train(files: Path, tmp_path: Path) -> None:
    output = tmp_path / "start.safetensors"
    result = import_(files, output)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert result.stderr.splitlines() == [  # quiet in a pipe: no progress, only what the user has to know
        "left out: Vim's classifier (head.bias, head.weight)",
        f"{output}: preset demo, 128 pixels, Vim stride 16; next: mdnet train --init {output} --data DIR",
    ]
    assert os.listdir(tmp_path) == ["start.safetensors"]
    before = load_checkpoint(output)
    write_dataset(tmp_path / "faces", 24, seed=1)
    trained = tmp_path / "trained.safetensors"
    result = run("train", "--init", output, "--data", tmp_path / "faces", "--epochs", 1, "-o", trained)
    assert result.exit_code == 0, result.output
    after = load_checkpoint(trained).state_dict()
    trainable = {name for name, parameter in before.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trainable} == {"vim", "fusion"}
    for name, tensor in before.state_dict().items():
        assert torch.equal(after[name], tensor) == (name not in trainable), name


def test_the_notes_name_every_source_with_its_hash_and_licence(files: Path, tmp_path: Path) -> None:
    assert import_(files, tmp_path / "out.safetensors").exit_code == 0
    _, notes = read_metadata(tmp_path / "out.safetensors")
    unet = "unet/diffusion_pytorch_model.safetensors"
    sources = {"stable_diffusion": (files / "sd", unet), "null_prompt": (files, "prompt.safetensors")}
    sources["vim"] = (files, "vim.pth")
    for part, (root, name) in sources.items():
        assert notes[part]["files"][name] == hashlib.sha256((root / name).read_bytes()).hexdigest()
    assert "OpenRAIL-M" in notes["stable_diffusion"]["licence"]
    assert "Apache-2.0" in notes["vim"]["licence"]
    assert notes["fusion"] == "fresh weights, seed 0"
    assert notes["command"].startswith("mdnet")


VARIANTS = {
    "sd21": dataclasses.replace(stock.SMALL["sd21"], preset="small-sd21"),
    "taesd": preset("demo-taesd"),
}


def write_pipeline(root: Path, config: MDNetConfig) -> Path:
    """`sd/`, its VAE in `tiny/` where it is a tiny one, `prompt.safetensors`; any text encoder is left out."""
    torch.manual_seed(2)
    stock.unet(config).save_pretrained(root / "sd" / "unet")
    stock.vae(config).save_pretrained(root / ("tiny" if config.vae == "tiny" else "sd/vae"))
    save_file({"context": torch.randn(config.context_length, config.context_dim)}, root / "prompt.safetensors")
    return root


@pytest.mark.parametrize(("name", "licence"), [("sd21", "RAIL"), ("taesd", "MIT")])
def test_the_preset_follows_from_the_files(
    name: str, licence: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = VARIANTS[name]
    monkeypatch.setitem(PRESETS, variant.preset, variant)
    root = write_pipeline(tmp_path, variant)
    vae = ["--vae", root / "tiny"] if name == "taesd" else []
    words = ["--sd", root / "sd", *vae, "--vim", files / "vim.pth", "--null-prompt", root / "prompt.safetensors"]
    output = tmp_path / "out.safetensors"
    result = run("import", *words, "--image-size", 64, "-o", output)
    assert result.exit_code == 0, result.output
    config, notes = read_metadata(output)
    assert config == dataclasses.replace(variant, image_size=64)
    part, file = ("vae", "tiny") if name == "taesd" else ("stable_diffusion", "sd/vae")
    stored = "diffusion_pytorch_model.safetensors"
    digest = hashlib.sha256((root / file / stored).read_bytes()).hexdigest()
    assert notes[part]["files"][stored if name == "taesd" else f"vae/{stored}"] == digest
    assert licence in notes[part]["licence"]
    assert torch.isfinite(load_checkpoint(output)(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))).all()


def test_stable_diffusion_2_has_its_own_licence() -> None:
    assert sd_licence(preset("sd21-vim-s")) == "CreativeML Open RAIL++-M"
    assert sd_licence(preset("sd15-taesd-vim-s")) == sd_licence(preset("sd15-vim-s")) == "CreativeML OpenRAIL-M"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "demo-taesd"], "preset demo-taesd needs --vae: AutoencoderTiny's folder, or taesd_encoder"),
        (["--preset", "demo", "--vae", "x"], "preset demo has Stable Diffusion's own VAE; --vae is for presets such"),
    ],
)
def test_a_vae_that_the_preset_does_not_have_or_lacks_is_bad_usage(
    words: list[str], message: str, files: Path, tmp_path: Path
) -> None:
    result = import_(files, tmp_path / "out.safetensors", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_seed_is_the_fusions_alone(files: Path) -> None:
    def with_seed(seed: int) -> MDNet:
        prompt = files / "prompt.safetensors"
        return import_weights(files / "sd", files / "vim.pth", null_prompt_file=prompt, seed=seed).model

    state = torch.random.get_rng_state()
    one, same, other = (with_seed(seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    differing = {name.split(".")[0] for name in one if not torch.equal(one[name], other[name])}
    assert differing == {"fusion"}


def test_a_checkpoint_gives_its_null_prompt_to_the_next_import(files: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    assert import_(files, first).exit_code == 0
    assert import_(files, second, "--null-prompt", first).exit_code == 0
    assert torch.equal(load_checkpoint(first).diffusion.context, load_checkpoint(second).diffusion.context)


def test_image_size_and_preset_are_taken(files: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    assert import_(files, output, "--image-size", 192, "--preset", "demo").exit_code == 0
    model = load_checkpoint(output)
    assert model.config.image_size == 192
    assert torch.isfinite(model(torch.zeros(1, 192, 192, 3, dtype=torch.uint8))).all()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--image-size", "100"], 2, "image_size is 100; the U-Net's mid block needs a multiple of 64"),
        (["--preset", "none"], 2, "no preset 'none'; known: sd15-vim-s, sd15-vim-t, sd21-vim-s"),
        (["--preset", "sd15-vim-t"], 1, "vim_dim is 48, preset sd15-vim-t expects 192"),
        (["--sd", "gone"], 1, "gone: no such file or folder"),
        (["--vim", "gone.pth"], 1, "gone.pth: no such file"),
        (["--null-prompt", "gone.npy"], 1, "gone.npy: No such file or directory"),
        (["-o", "gone/out.safetensors"], 2, "-o takes a file in a folder that exists"),
    ],
)
def test_a_mistake_ends_in_one_line(words: list[str], code: int, message: str, files: Path, tmp_path: Path) -> None:
    result = import_(files, tmp_path / "out.safetensors", *words)
    assert result.exit_code == code
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
    assert os.listdir(tmp_path) == []


def test_a_folder_without_a_text_encoder_says_how_to_go_on(files: Path, tmp_path: Path) -> None:
    result = run("import", "--sd", files / "sd", "--vim", files / "vim.pth", "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 1
    assert "no text_encoder/; give the null prompt's embedding with --null-prompt FILE" in result.stderr


def test_whole_published_files_need_nothing_else_and_transformers_stays_quiet(tmp_path: Path) -> None:
    """In a process of its own: what transformers prints, it prints past click's runner."""
    pytest.importorskip("transformers")
    published.main(tmp_path, CONFIG)
    contexts = []
    for source in ("sd", "sd.safetensors"):
        output = tmp_path / f"{source}.out"
        words = ["import", "--sd", tmp_path / source, "--vim", tmp_path / "vim.pth", "-o", output]
        code = "import sys; from mdnet.cli.main import main; main(sys.argv[1:])"
        done = subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, text=True)
        assert len(done.stderr.splitlines()) == 2, done.stderr
        contexts.append(load_checkpoint(output).diffusion.context)
    # One text encoder in two layouts, one with a tokenizer and one without.
    torch.testing.assert_close(contexts[0], contexts[1], rtol=0, atol=1e-6)


MEASURED = """
import json, resource, sys
from pathlib import Path
from mdnet.model.checkpoint import save_checkpoint
from mdnet.weights.assemble import import_weights, sd_licence
sd, vim, out = map(Path, sys.argv[1:])
imported = import_weights(sd, vim)
save_checkpoint(imported.model, out, notes=imported.notes)
print(json.dumps({"preset": imported.model.config.preset, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("source", ["sd", "sd.safetensors"])
def test_a_full_size_import_stays_under_10_gib(source: str, full_size: Path, tmp_path: Path) -> None:
    """Peak resident memory of a fresh process, which imports and writes the checkpoint."""
    output = tmp_path / "out.safetensors"
    words = [sys.executable, "-c", MEASURED, full_size / source, full_size / "vim.pth", output]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    measured = json.loads(done.stdout)
    assert measured["preset"] == "sd15-vim-s"
    assert measured["peak"] / 2**20 < 10  # ru_maxrss is in KiB
    config, _ = read_metadata(output)
    assert config == preset("sd15-vim-s")
    output.unlink()


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("full-size")
    published.main(root, preset("sd15-vim-s"))
    return root


def test_the_made_vim_file_is_what_mdnet_calls_vim() -> None:
    """Guards the files above: the keys that hustvl published, and no others but the classifier's."""
    names = set(published.vim_state(CONFIG, 224))
    assert names - set(VisionMamba(CONFIG).state_dict()) == {"head.weight", "head.bias"}
