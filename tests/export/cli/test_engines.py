"""`mdnet-export engines` as a user meets it: real TensorRT-RTX plans of the demo, and what can go wrong on the way."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path

import click.testing
import pytest
import tensorrt_hosts
from shown_facts import unwrapped
from small_bundle import write_small_bundle

from mdnet_engines.bundle.files import Bundle
from mdnet_engines.bundle.manifest import GRAPH_NAMES, Precision
from mdnet_engines.errors import UsageError
from mdnet_engines.tensorrt.plan_process import probe
from mdnet_engines.tensorrt.plans import check_plans, explain_incompatible, plan_path, plans_folder
from mdnet_export.cli import engines as cli_engines
from mdnet_export.inspect import print_bundle

EXPORT = Path(sysconfig.get_path("scripts"), "mdnet-export")
NOT_NEEDED = ("torch", "diffusers", "onnx", "onnxscript", "onnxruntime", "transformers", "safetensors")

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the [rtx] extra (Linux and Windows on x86-64)"
)


def run(
    *arguments: str | Path, environment: Mapping[str, str] = os.environ, timeout: int = 300
) -> subprocess.CompletedProcess[str]:
    command = [EXPORT, "engines", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that a failed run says."""
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_small_bundle(tmp_path / "mdnet-bundle")


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if reason := tensorrt_hosts.missing():
        pytest.skip(reason)
    return tensorrt_hosts.tensorrt_11(tmp_path_factory.mktemp("tensorrt"))


# ------------------------------------------------------------------------------------------------------- TensorRT-RTX


@needs_rtx
def test_the_demos_plans_are_built_from_the_bundle_alone(bundle: Bundle, tmp_path: Path) -> None:
    """Of the real graphs: TensorRT's parser takes them as they are, the scan's function body included."""
    folder = tmp_path / "mdnet-bundle"
    shutil.copytree(bundle.path, folder)
    forbidden = dict.fromkeys(NOT_NEEDED, "raise ImportError('not to be had here')")
    result = run(folder, "--backend", "tensorrt-rtx", environment=tensorrt_hosts.with_modules(tmp_path, **forbidden))
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()  # in a pipe: what was built, and no progress
    assert [line.split(":")[0] for line in lines[:3]] == list(GRAPH_NAMES)
    assert len(lines) == 4

    opened = Bundle.open(folder)
    (engines,) = opened.manifest.engines
    check_plans(opened, engines)
    assert str(plans_folder(opened, engines)) in lines[3]
    for name in GRAPH_NAMES:
        plan = plan_path(opened, engines, name)
        assert f"{plan.stat().st_size / 1e6:.1f} MB" in lines[GRAPH_NAMES.index(name)]
    layers = json.loads((plans_folder(opened, engines) / "layers.json").read_text())["graphs"]
    # One scan's body is a loop, with layers for what enters, recurs and leaves; a plugin would be one layer.
    kinds = [layer["type"] for layer in layers["vim"]]
    scans = kinds.count("TRIP_LIMIT")
    assert scans >= 2
    assert kinds.count("RECURRENCE") >= scans
    precision = {"fp32": "FLOAT"}.get(opened.manifest.precision, "HALF")  # what int8 leaves, and gives, is half too
    products = [layer["outputs"][0].split()[0] for layer in layers["encoder"] if layer["type"] == "CONVOLUTION"]
    assert set(products) == {precision}

    host = probe("tensorrt-rtx")
    reason = explain_incompatible(engines, opened.manifest, host)
    if host.gpu is None:
        assert reason is not None
        assert "no NVIDIA GPU" in reason


@needs_rtx
def test_a_second_run_says_that_the_plans_are_there_and_force_builds_them(small: Path) -> None:
    options = (small, "--backend", "tensorrt-rtx", "--gpu", "sm_86,sm_89", "--batch", "1,2,4")
    assert run(*options).returncode == 0
    manifest = (small / "manifest.json").read_text()
    again = run(*options)
    assert again.returncode == 0
    assert "up to date" in again.stderr
    assert (small / "manifest.json").read_text() == manifest
    assert "fusion: " in run(*options, "--force").stderr
    (engines,) = Bundle.open(small).manifest.engines
    assert (engines.target, str(engines.batch)) == ("sm_86-sm_89", "1,2,4")


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "batch", ["1,8", "8,1,32", "0,1,2", "1,8,8,32", "1,8,4,32", "a,b,c", "", "1,8,99999", "1.5,2,3"]
)
def test_batch_sizes_that_are_none_are_bad_usage(batch: str, small: Path) -> None:
    with pytest.raises(UsageError, match="--batch"):
        cli_engines.parse_batch(batch)
    result = click.testing.CliRunner().invoke(cli_engines.engines, [str(small), "--batch", batch])
    assert isinstance(result.exception, UsageError)


@pytest.mark.parametrize("batch", ["1,8,32", "1,1,8,32,32", "4,4,4", "1,1,2,4,8,16,16"])
def test_between_the_least_and_the_most_are_the_sizes_that_plans_are_tuned_for(batch: str) -> None:
    assert str(cli_engines.parse_batch(batch)) == batch


@needs_rtx
def test_what_rtx_can_not_build_is_one_line(small: Path) -> None:
    for option, words in (("--compatible", "on its own version"), ("--level=5", "every --level")):
        result = run(small, "--backend", "tensorrt-rtx", option)
        assert result.returncode == 2
        assert words in refusal(result)


@needs_rtx
def test_a_gpu_that_rtx_does_not_build_for_is_bad_usage(small: Path) -> None:
    result = run(small, "--backend", "tensorrt-rtx", "--gpu", "sm_90")
    assert result.returncode == 2
    assert "has no sm_90; it builds for " in refusal(result)


@needs_rtx
@pytest.mark.parametrize("gpus", ["sm_86", "sm_89,sm_86"])
def test_fp8_is_not_built_for_a_gpu_without_it(gpus: str, tmp_path: Path) -> None:
    folder = write_small_bundle(tmp_path / "mdnet-bundle", precision="fp8")
    result = run(folder, "--backend", "tensorrt-rtx", "--gpu", gpus)
    assert result.returncode == 2
    line = refusal(result)
    assert "sm_86 has no FP8" in line
    assert "mdnet-export build --precision int8 (or fp16)" in line
    assert not (folder / "engines").exists()


@needs_rtx
def test_the_demos_fp8_plans_are_built_for_ada_and_blackwell(bundles: dict[Precision, Bundle], tmp_path: Path) -> None:
    """The products' factors are FP8 on their way in: what TensorRT fuses into FP8 kernels."""
    folder = Path(shutil.copytree(bundles["fp8"].path, tmp_path / "mdnet-bundle"))
    result = run(folder, "--backend", "tensorrt-rtx", "--gpu", "sm_89,sm_120")
    assert result.returncode == 0, result.stderr
    opened = Bundle.open(folder)
    (engines,) = opened.manifest.engines
    assert engines.target == "sm_89-sm_120"
    layers = json.loads((plans_folder(opened, engines) / "layers.json").read_text())["graphs"]["encoder"]
    quantised = [layer["outputs"][0].split()[0] for layer in layers if layer["type"] == "QUANTIZE"]
    assert len(quantised) > 30
    assert set(quantised) == {"FP8"}


def test_a_folder_that_is_no_bundle_says_so(tmp_path: Path) -> None:
    result = run(tmp_path / "nowhere")
    assert result.returncode == 1
    assert "nowhere is not a bundle" in refusal(result)


FAKES = {
    "TensorRT 10": ("tensorrt", "__version__ = '10.13.3.9'", "10.13.3.9 is too old"),
    "no TensorRT": ("tensorrt", "raise ImportError('no such module')", "the extra mdnet[tensorrt]"),
    "no TensorRT-RTX": ("tensorrt_rtx", "raise ImportError('no such module')", "the extra mdnet[rtx]"),
    "native crash": ("tensorrt_rtx", "import os; os.abort()", "was ended by SIGABRT"),
}


@pytest.mark.parametrize(("module", "source", "words"), FAKES.values(), ids=FAKES)
def test_a_tensorrt_that_will_not_do_is_one_line(
    module: str, source: str, words: str, small: Path, tmp_path: Path
) -> None:
    environment = tensorrt_hosts.with_modules(tmp_path / "modules", **{module: source})
    result = run(small, "--backend", module.replace("_", "-"), environment=environment)
    assert result.returncode == 1
    assert words in refusal(result)
    assert not (small / "engines").exists()


def test_with_neither_there_is_advice_for_both(small: Path, tmp_path: Path) -> None:
    neither = dict.fromkeys(("tensorrt", "tensorrt_rtx"), "raise ImportError('no such module')")
    line = refusal(run(small, environment=tensorrt_hosts.with_modules(tmp_path / "modules", **neither)))
    assert "mdnet[tensorrt]" in line
    assert "mdnet[rtx]" in line


# --------------------------------------------------------------------------------------------------------- TensorRT 11


def notes_in(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    return {**environment, "STAND_IN_NOTES": str(folder / "notes.jsonl")}


def test_tensorrt_is_the_default_where_it_has_a_gpu(stand_in: dict[str, str], small: Path, tmp_path: Path) -> None:
    environment = notes_in(stand_in, tmp_path)
    result = run(small, "--workspace", "2", environment=environment)
    assert result.returncode == 0, result.stderr
    (engines,) = Bundle.open(small).manifest.engines
    assert (engines.runtime, engines.target, engines.workspace_gib) == ("tensorrt", "sm_90", 2)
    assert [entry["graph"] for entry in tensorrt_hosts.notes(environment, "build")] == list(GRAPH_NAMES)


@needs_rtx
def test_rtx_is_the_default_where_tensorrt_has_none(stand_in: dict[str, str], small: Path, tmp_path: Path) -> None:
    environment = notes_in(stand_in, tmp_path)
    del environment["STUB_GPU"]
    assert run(small, environment=environment).returncode == 0
    assert [engines.runtime for engines in Bundle.open(small).manifest.engines] == ["tensorrt-rtx"]


def test_every_option_reaches_the_manifest_and_inspect(
    stand_in: dict[str, str],
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    environment = notes_in(stand_in, tmp_path)
    options = ("--batch", "1,1,8,8", "--level", "4", "--stripped", "--compatible")
    built = run(small, *options, environment=environment)
    assert built.returncode == 0, built.stderr
    assert "batch 1,1,8,8, level 4, without weights, for later versions too, 0.0 MB" in built.stderr
    assert "up to date" in run(small, *options, environment=environment).stderr
    assert "up to date" not in run(small, "--compatible", environment=environment).stderr
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    print_bundle(Bundle.open(small))
    (line,) = [line for line in unwrapped(capsys.readouterr().out) if "-portable, " in line]
    assert line.endswith("-portable, batch 1,8,32, for later versions too, 0.0 MB; runs here with --backend tensorrt")
    monkeypatch.setenv("STUB_GPU", "75")
    monkeypatch.setenv("STUB_GPUS", "2")
    print_bundle(Bundle.open(small))
    said = "\n".join(unwrapped(capsys.readouterr().out))
    assert "built for GPUs from Ampere (sm_80) on, this machine has sm_75 (Stub GPU), the first of 2: CUDA_" in said


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
@pytest.mark.parametrize("before", ["first", "replaced"])
def test_a_build_that_is_killed_leaves_the_bundle_as_it_was(
    before: str, stand_in: dict[str, str], small: Path, tmp_path: Path
) -> None:
    environment = notes_in(stand_in, tmp_path)
    if before == "replaced":
        assert run(small, environment=environment).returncode == 0
    manifest = (small / "manifest.json").read_bytes()
    stuck = tensorrt_hosts.with_faults(environment, wait="vim")
    with subprocess.Popen([EXPORT, "engines", small, "--force"], env=stuck, stderr=subprocess.DEVNULL) as command:
        deadline = time.monotonic() + 120
        while not list(small.glob("engines/.building.*/encoder.plan")):
            assert command.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        command.send_signal(signal.SIGKILL)
    opened = Bundle.open(small)
    assert (small / "manifest.json").read_bytes() == manifest
    for engines in opened.manifest.engines:
        check_plans(opened, engines)

    assert run(small, "--force", environment=environment).returncode == 0
    opened = Bundle.open(small)
    check_plans(opened, opened.manifest.engines[0])
    assert [file.name for file in (small / "engines").iterdir()] == [opened.manifest.engines[0].folder]


def test_a_bundles_build_makes_plans_where_tensorrt_has_a_gpu(
    stand_in: dict[str, str],
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in notes_in(stand_in, tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("STAND_IN_FAULTS", json.dumps({"build": "vim"}))
    cli_engines.build_unasked(Bundle.open(small))  # no error: the bundle is there, and good
    assert "no TensorRT plans: TensorRT can't build vim" in capsys.readouterr().err
    monkeypatch.delenv("STAND_IN_FAULTS")
    cli_engines.build_unasked(Bundle.open(small))
    assert [engines.target for engines in Bundle.open(small).manifest.engines] == ["sm_90"]


def test_a_bundles_build_makes_no_plans_without_a_gpu(
    stand_in: dict[str, str], small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in stand_in.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("STUB_GPU")
    cli_engines.build_unasked(Bundle.open(small))
    assert capsys.readouterr().err == ""
    assert Bundle.open(small).manifest.engines == []


# ------------------------------------------------------------------------------------------------------------- inspect


def test_inspect_says_of_each_set_whether_it_runs_here(
    stand_in: dict[str, str],
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in notes_in(stand_in, tmp_path).items():
        monkeypatch.setenv(name, value)

    def plans() -> list[str]:
        print_bundle(Bundle.open(small))
        return [line for line in unwrapped(capsys.readouterr().out) if line.startswith("plans")]

    assert plans() == []
    cli_engines.build_unasked(Bundle.open(small))
    (line,) = plans()
    assert "-sm_90, batch 1,8,32" in line
    assert line.endswith("runs here")
    monkeypatch.setenv("STUB_GPU", "86")
    (line,) = plans()
    assert "not for this machine: built for sm_90, this machine has sm_86" in line
    opened = Bundle.open(small)
    plan_path(opened, opened.manifest.engines[0], "fusion").write_bytes(b"")
    (line,) = plans()
    assert "DAMAGED" in line
    assert "mdnet-export engines" in line


def test_the_command_is_offered_without_what_building_a_bundle_takes(tmp_path: Path) -> None:
    forbidden = dict.fromkeys(NOT_NEEDED, "raise ImportError('not to be had here')")
    environment = tensorrt_hosts.with_modules(tmp_path, **forbidden)
    result = run("--help", environment=environment)
    assert result.returncode == 0, result.stderr
    assert "--workspace" in result.stdout
    code = "import sys, mdnet_export.cli.main; print(*sys.modules, sep='\\n')"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout.split()
    assert not set(imported) & set(NOT_NEEDED)
