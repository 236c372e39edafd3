"""The wheel with [cpu] in an environment of its own: small, without torch, and able to score a bundle."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from mdnet_engines.ops import native

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = REPOSITORY / "examples"
MEGABYTE = 10**6
LIBRARY = "mdnet_engines/libmdnet_ops.so"
HERE = Path(sysconfig.get_path("scripts"))
compiled = pytest.mark.skipif(native.custom_op_library() is None, reason="no compiler here for the native library")


def run(*command: str | Path, cwd: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    # Without the caller's settings: no repository on the path, no bundle chosen.
    clean = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "MDNET_BUNDLE"}}
    return subprocess.run(command, cwd=cwd, env=clean | settings, capture_output=True, text=True)


def must(*command: str | Path, cwd: Path, **settings: str) -> str:
    result = run(*command, cwd=cwd, **settings)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by way of the sdist as for publishing."""
    work = tmp_path_factory.mktemp("wheel")
    must(sys.executable, "-m", "build", "--outdir", work, REPOSITORY, cwd=work)
    (wheel,) = work.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def lean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands in a fresh environment with the wheel and its [cpu] extra."""
    work = tmp_path_factory.mktemp("install")
    venv.create(work / "env", with_pip=True)
    commands = work / "env" / HERE.name
    must(commands / "pip", "install", "-q", "-c", REPOSITORY / "constraints.txt", f"{wheel}[cpu]", cwd=work)
    return commands


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo bundle, built where torch is."""
    work = tmp_path_factory.mktemp("build")
    must(HERE / "mdnet-export", "build", "-o", work / "bundle", cwd=work)
    return work / "bundle"


@compiled
def test_the_wheel_is_for_a_platform_and_for_any_python(wheel: Path) -> None:
    assert re.search(r"-py3-none-(linux|manylinux)\w*\.whl$", wheel.name)


@compiled
def test_the_lean_environment_has_the_native_kernel(lean: Path, tmp_path: Path) -> None:
    program = "from mdnet_engines.ops import native; print(native.custom_op_library()); native.library().mdnet_isa()"
    assert must(lean / "python", "-c", program, cwd=tmp_path).strip().endswith(LIBRARY)


def test_without_a_compiler_it_installs_and_scores_the_same(lean: Path, bundle: Path, tmp_path: Path) -> None:
    build = (sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, REPOSITORY)
    log = must(*build, cwd=tmp_path, CXX="/bin/false", CC="/bin/false")
    assert "without its native library" in log
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert LIBRARY not in zipfile.ZipFile(wheel).namelist()

    site = tmp_path / "site"
    must(lean / "pip", "install", "-q", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    program = "from mdnet_rt.cli.main import main; main()"
    command = (lean / "python", "-c", program, "score", EXAMPLES, "--bundle", bundle)
    result = run(*command, cwd=tmp_path, PYTHONPATH=str(site))
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("native library") == 1  # said once, for three graphs
    assert parsed(result.stdout) == pytest.approx(scores(lean, bundle, tmp_path), abs=2e-4)


def scores(commands: Path, bundle: Path, cwd: Path) -> dict[str, float]:
    """File name → score of the example images, by the environment whose `commands` these are."""
    return parsed(must(commands / "mdnet-rt", "score", EXAMPLES, "--bundle", bundle, cwd=cwd))


def parsed(table: str) -> dict[str, float]:
    return {Path(row["path"]).name: float(row["score"]) for row in csv.DictReader(table.splitlines())}


@compiled
def test_the_wheel_has_every_file_of_the_rooms(wheel: Path) -> None:
    packages = ("mdnet", "calib/mdnet_calib", "engines/mdnet_engines", "export/mdnet_export", "runtime/mdnet_rt")
    expected = {
        file.relative_to((REPOSITORY / package).parent).as_posix()
        for package in packages
        for file in (REPOSITORY / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    } | {LIBRARY}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == expected


def test_the_lean_environment_proves_the_bundle(lean: Path, bundle: Path, tmp_path: Path) -> None:
    line = must(lean / "mdnet-rt", "check", bundle, cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert line.startswith(f"{bundle}, demo fp32: holds on onnxruntime-cpu: max |Δscore| ")


@pytest.mark.parametrize("module", ["diffusers", "jinja2", "onnx", "onnxscript", "safetensors", "torch"])
def test_nothing_of_training_or_export_is_installed(module: str, lean: Path, tmp_path: Path) -> None:
    program = f"import importlib.util; print(importlib.util.find_spec({module!r}))"
    assert must(lean / "python", "-c", program, cwd=tmp_path).strip() == "None"


def test_the_environment_is_small(lean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(must(lean / "python", "-c", place, cwd=tmp_path).strip())
    sizes = {entry.name: size_of(entry) for entry in site.iterdir()}
    total = sum(sizes.values())
    with capsys.disabled():
        largest = sorted(sizes.items(), key=lambda item: -item[1])[:6]
        parts = ", ".join(f"{name} {size / MEGABYTE:.0f}" for name, size in largest)
        print(f"\nmdnet[cpu] takes {total / MEGABYTE:.0f} MB ({parts})")
    assert total < 250 * MEGABYTE


def size_of(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


@pytest.mark.parametrize("command", ["mdnet", "mdnet-export", "mdnet-rt"])
def test_help_needs_no_extra(command: str, lean: Path, tmp_path: Path) -> None:
    assert "Usage:" in must(lean / command, "--help", cwd=tmp_path)


@pytest.mark.parametrize(("command", "extra"), [("mdnet-export build", "export"), ("mdnet train", "train")])
def test_a_missing_extra_is_named_in_one_line(command: str, extra: str, lean: Path, tmp_path: Path) -> None:
    script, subcommand = command.split()
    result = run(lean / script, subcommand, cwd=tmp_path)
    (line,) = result.stderr.splitlines()
    assert f"mdnet[{extra}]" in line
    assert result.returncode == 1


def test_the_lean_environment_gives_the_scores_of_the_one_with_torch(lean: Path, bundle: Path, tmp_path: Path) -> None:
    lean_scores = scores(lean, bundle, tmp_path)
    assert len(lean_scores) > 0
    # The same graphs on the same machine; another numpy or Pillow may differ in the last bits, csv has four digits.
    assert lean_scores == pytest.approx(scores(HERE, bundle, tmp_path), abs=2e-4)
