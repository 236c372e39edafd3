"""The documentation is true: commands and code run; options, files and links exist; shapes are the model's."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from pages_of_docs import NAMES, blocks, command_lines, matches, problem, prose
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.mamba import modeling_mamba

from mdnet.cli.main import main as mdnet_command
from mdnet.model.config import PRESETS, MDNetConfig, TrainConfig, preset
from mdnet.model.diffusion import DiffusionEncoder, to_vae_range
from mdnet.model.net import MDNet
from mdnet_calib.sensitivity import Budget
from mdnet_export.build import build_bundle
from mdnet_export.graphs.export import EncoderGraph
from mdnet_export.model_source import choose_weights
from mdnet_export.parity_images import calibration_images, parity_images
from mdnet_export.quantise import Calibration

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in int8, with every block in int8, calibrated on few images: built in half the time of a real one."""
    calibration = Calibration(calibration_images(None, 128, 8), budget=Budget(9, 0))
    folder, images = tmp_path_factory.mktemp("demo") / "mdnet-bundle", parity_images(None, 128, 4)
    build_bundle(choose_weights(), folder, precision="int8", images=images, calibration=calibration, force=True)
    return folder


@pytest.fixture
def reader(demo_bundle: Path, tmp_path: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """A shell in a folder as the pages assume it: a bundle, the examples, and photos of which one is damaged."""
    for name in ("mdnet-bundle", "old-bundle"):
        shutil.copytree(demo_bundle, tmp_path / name)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copytree(ROOT / "examples", tmp_path / "photos")
    (tmp_path / "photos" / "cut.jpg").write_bytes((ROOT / "examples" / "face-1.jpg").read_bytes()[:-48])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "120", "TERM": "dumb"}
    environment.pop("MDNET_BUNDLE", None)

    def run(command: str) -> subprocess.CompletedProcess[str]:
        shell = ["bash", "-uo", "pipefail", "-c", command]
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.run(shell, cwd=tmp_path, env=environment, text=True, timeout=300, check=False, **both)

    return run


@pytest.mark.parametrize("page", [name for name in NAMES if any(each.is_shell and each.run for each in blocks(name))])
def test_the_commands_on_the_page_run_and_print_what_it_shows(
    page: str, reader: Callable[[str], subprocess.CompletedProcess[str]]
) -> None:
    for block in blocks(page):
        if not (block.is_shell and block.run):
            continue
        for command, expected in block.steps():
            done = reader(command)
            if expected is None:
                assert done.returncode == 0, f"{block}: {command}\n{done.stdout}"
            else:
                assert matches(expected, done.stdout), f"{block}: {command}\n{done.stdout}"


def test_the_manifests_for_kubernetes_name_real_options_and_paths() -> None:
    yaml = pytest.importorskip("yaml")
    manifests, dockerfile = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("deploy/kubernetes.yaml", "Dockerfile")
    )
    deployment, service = yaml.safe_load_all(manifests)
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    entry = json.loads(re.findall(r"^ENTRYPOINT (.+)$", dockerfile, re.MULTILINE)[0])
    assert not problem([*entry, *container["args"]])
    sources = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "runtime/mdnet_rt/server").rglob("*.py"))
    probes = [value for name, value in container.items() if name.endswith("Probe")]
    assert len(probes) == 3
    assert all(f'"{probe["httpGet"]["path"]}"' in sources for probe in probes)
    ports = {each["containerPort"] for each in container["ports"]}
    assert {service["spec"]["ports"][0]["targetPort"], *(probe["httpGet"]["port"] for probe in probes)} == ports


def test_output_of_another_kind_is_found() -> None:
    assert matches("8 images: 8 scored, 0.2 s\n…\nend", "9 images: 8 scored, 1.5 s\nmany\nlines\nend\n")
    assert not matches("8 images: 8 scored", "8 images: 8 failed")


@pytest.mark.parametrize("page", NAMES)
def test_options_on_the_page_are_the_commands_options(page: str) -> None:
    wrong = [f"{where}: {why}" for where, words in command_lines(page) if (why := problem(words))]
    assert not wrong


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("mdnet-rt score --bacth-size 4 photos", "no option --bacth-size"),
        ("mdnet-rt score --backend onnx photos", "--backend takes"),
        ("mdnet-export bild", "no command bild"),
        ("make tset", "no target"),
        ("python benchmarks/scan.py --fast", "no option"),
    ],
)
def test_a_command_that_is_wrong_is_found(line: str, why: str) -> None:
    assert why in problem(line.split())
    assert not problem(["mdnet-rt", "score", "photos", "--backend=openvino", "-o", "scores.csv", "--resume"])


@pytest.mark.parametrize("page", NAMES)
def test_no_command_hides_in_an_indented_block(page: str) -> None:
    assert not re.findall(r"^    \$? ?(?:mdnet|mdnet-rt|mdnet-export|pip|make|python) .*$", prose(page), re.MULTILINE)


@pytest.mark.parametrize("page", NAMES)
def test_files_and_links_on_the_page_exist(page: str) -> None:
    text, folder = prose(page), (ROOT / page).parent
    rooms = "engines|runtime|mdnet|calib|export|tests|benchmarks|docs"
    for name in re.findall(rf"`((?:{rooms})/[\w./-]+\.(?:py|cpp|h|cu|ptx|md|json))`", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"`((?:mdnet|mdnet_\w+)(?:\.\w+)+)`", text):
        assert named(name), name
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:srcset|src)=\"([^\"]+)\"", text):
        link = target[0] or target[1]
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        aim = (folder / file).resolve() if file else ROOT / page
        assert aim.is_file() or (aim.is_dir() and not anchor), link
        if anchor:
            assert anchor in anchors(aim), link


def named(name: str) -> bool:
    """Whether a dotted name leads to a module, or to something in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        return all((found := getattr(found, part, None)) is not None for part in parts[count:])
    return False


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_chart_is_drawn_from_the_committed_figures(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "benchmarks" / "chart.py", "-o", tmp_path], check=True, capture_output=True)
    drawn = sorted(tmp_path.iterdir())
    assert [file.name for file in drawn] == ["speed-dark.svg", "speed-light.svg"]
    for file in drawn:
        assert file.read_bytes() == (DOCS / "images" / file.name).read_bytes(), "python benchmarks/chart.py"


@pytest.mark.parametrize("page", ["selective-scan.md"])
def test_the_code_on_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = [block.text for block in blocks(f"docs/{page}") if block.language == "python"]
    assert code
    monkeypatch.chdir(tmp_path)
    # The page puts our scan into transformers: afterwards theirs is in its place again.
    monkeypatch.setattr(modeling_mamba, "mamba_selective_scan", modeling_mamba.mamba_selective_scan)
    names: dict[str, object] = {"__name__": "page"}
    for block in code:
        exec(compile(block, page, "exec"), names)


def test_readmes_python_scores_the_examples(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = [block.text for block in blocks("README.md") if block.language == "python"]
    monkeypatch.chdir(ROOT)
    exec(code.replace('"mdnet-bundle"', repr(str(demo_bundle))), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "examples/face-1.jpg",
        "examples/face-2.jpg",
    ]


def test_the_runtime_pages_python_scores_each_kind_of_image(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = next(block.text for block in blocks("docs/runtime.md") if block.language == "python")
    monkeypatch.chdir(ROOT)
    exec(code.replace('"mdnet-bundle"', repr(str(demo_bundle))), names := {"__name__": "page"})
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith(f"<Scorer {demo_bundle}: demo int8, 128x128 pixels, ")
    assert rows[-1].startswith("item 99 ")
    calls = re.findall(r"^scorer\.score\((.+?)\)(?:  .*)?$", code, re.MULTILINE)
    assert len(calls) == 11
    for call in calls:
        results = eval(f"scorer.score({call})", names)
        assert results, call
        assert all(result.ok for result in results), call


def test_the_configuration_file_on_the_page_is_taken(tmp_path: Path) -> None:
    (text,) = [block.text for block in blocks("docs/command-line.md") if block.language == "toml"]
    (tmp_path / "train.toml").write_text(text)
    # Options are read in the order in which they are typed: by the time of -h the file has been checked.
    done = CliRunner().invoke(mdnet_command, ["train", "--config", str(tmp_path / "train.toml"), "-h"])
    assert done.exit_code == 0, done.output
    (tmp_path / "train.toml").write_text(text + "lr = 1\n")
    done = CliRunner().invoke(mdnet_command, ["train", "--config", str(tmp_path / "train.toml"), "-h"])
    assert done.exit_code == 2


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


def test_the_models_page_has_each_variants_size(model_page: str) -> None:
    for name, config in PRESETS.items():
        if config.image_size != 256:
            continue
        with torch.device("meta"):  # shapes only
            encoder = DiffusionEncoder(config)
            image = torch.empty(1, 256, 256, 3, dtype=torch.uint8)
            vae = gmac(encoder.vae, to_vae_range(image))
            whole = gmac(EncoderGraph(encoder), image)
        sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (encoder.vae, encoder.unet)]
        shown = f"{sizes[0]:.2f} | {sizes[1]:.1f} | {vae:.1f} | {whole:.1f} |"
        assert re.search(rf"^\| .*`{name}`.* \| {re.escape(shown)}$", model_page, re.MULTILINE), (name, shown)


def gmac(module: torch.nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops() / 2e9


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
