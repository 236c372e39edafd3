"""The kit of `benchmarks/gpu_check.py`: what it packs, and that a damaged or missing piece is named."""

from __future__ import annotations

import base64
import hashlib
import json
import lzma
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from gpu_scripts import SCRIPT, module

kit = module("kit")
PYTHON = "{}.{}".format(*sys.version_info[:2])
PIECE = 5000


def write_wheel(folder: Path, name: str) -> None:
    """A wheel of one module, which has a constant."""
    files = {
        f"{name}.py": b"VALUE = 7\n",
        f"{name}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{name}-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }

    def entry(path: str, data: bytes) -> str:
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        return f"{path},sha256={digest},{len(data)}\n"

    record = f"{name}-1.0.dist-info/RECORD"
    text = "".join(entry(*each) for each in files.items()) + f"{record},,\n"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, data in {**files, record: text.encode()}.items():
            wheel.writestr(path, data)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A kit of a wheel and two bundles, in several pieces."""
    wheels, bundles = tmp_path / "wheels", tmp_path / "bundles"
    for folder in (wheels, bundles / "full" / "fp16", bundles / "demo" / "fp16"):
        folder.mkdir(parents=True)
    write_wheel(wheels, "mdnet_kit_test")
    (bundles / "full" / "fp16" / "weights").write_bytes(bytes(hashlib.sha256(b"seed").digest()) * 2000)
    # What does not repeat itself can't be packed: this makes the pieces many.
    random = b"".join(hashlib.sha256(str(i).encode()).digest() for i in range(600))
    (bundles / "demo" / "fp16" / "weights").write_bytes(random)
    ready = kit.Wheels(wheels, ["mdnet_kit_test"], {"tensorrt": "no wheel"})
    pieces = kit.write(tmp_path / "kit", ready, bundles, PYTHON, "abc", lambda _: None, piece=PIECE)
    assert len(pieces) > 3
    return tmp_path / "kit"


def unpack(folder: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, folder / "unpack.py", target]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_manifest_lists_what_the_pieces_have(made: Path) -> None:
    facts = json.loads((made / "kit.json").read_text())
    assert {name.partition("/")[0] for name in facts["contents"]} == {"wheels", "bundles"}
    assert "wheels/mdnet_kit_test-1.0-py3-none-any.whl" in facts["contents"]
    assert facts["left out"] == {"tensorrt": "no wheel"}
    assert (facts["commit"], facts["python"], facts["requirements"]) == ("abc", PYTHON, ["mdnet_kit_test"])
    sizes = [(made / piece["name"]).stat().st_size for piece in facts["pieces"]]
    assert sizes == [piece["bytes"] for piece in facts["pieces"]]
    assert all(size == PIECE for size in sizes[:-1])
    assert {file.name for file in made.iterdir()} == {"kit.json", "unpack.py", *(p["name"] for p in facts["pieces"])}


def test_weights_that_repeat_themselves_take_no_room(made: Path) -> None:
    contents = json.loads((made / "kit.json").read_text())["contents"]
    assert contents["bundles/full.tar.xz"] < 1000  # of 64,000 bytes


def test_pieces_may_come_one_by_one_and_the_last_one_installs_all(made: Path, tmp_path: Path) -> None:
    names = [piece["name"] for piece in json.loads((made / "kit.json").read_text())["pieces"]]
    target = tmp_path / "target"
    for place, name in enumerate(names):
        arrived = tmp_path / f"arrival {place}"
        arrived.mkdir()
        for file in ("kit.json", "unpack.py", name):
            (arrived / file).write_bytes((made / file).read_bytes())
        done = unpack(arrived, target)
        if missing := names[place + 1 :]:
            assert (done.returncode, done.stderr) == (3, "")
            assert done.stdout == f"have {place + 1} of {len(names)} pieces; missing: {', '.join(missing)}\n"
    assert done.returncode == 0, done.stderr
    python = target / "venv" / "bin" / "python"
    assert done.stdout.endswith(f"{python} benchmarks/gpu_check.py --bundles {target / 'bundles'}\n")
    # NumPy is one of this Python's own packages, which stands for PyTorch.
    program = "import mdnet_kit_test, numpy; print(mdnet_kit_test.VALUE)"
    result = subprocess.run([python, "-c", program], capture_output=True, text=True)
    assert result.stdout == "7\n", result.stderr
    assert len((target / "bundles" / "full" / "fp16" / "weights").read_bytes()) == 64_000
    assert len((target / "bundles" / "demo" / "fp16" / "weights").read_bytes()) == 600 * 32
    assert not (target / "pieces").exists()
    assert not list(target.glob("bundles/*.xz"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_piece_is_named_and_a_good_one_takes_its_place(
    damage: Callable[[Path], None], made: Path, tmp_path: Path
) -> None:
    bad, missing = made / "kit.002", made / "kit.003"
    good, other = bad.read_bytes(), missing.read_bytes()
    damage(bad)
    missing.unlink()
    done = unpack(made, tmp_path / "target")
    assert (done.returncode, done.stderr) == (1, "error: damaged: kit.002; copy these again\n")
    bad.write_bytes(good)
    done = unpack(made, tmp_path / "target")
    assert done.returncode == 3
    assert done.stdout.endswith("missing: kit.003\n")
    missing.write_bytes(other)
    damage(tmp_path / "target" / "pieces" / "kit.001")  # after it was checked
    assert unpack(made, tmp_path / "target").returncode == 0


def test_a_kit_for_another_python_says_so(made: Path, tmp_path: Path) -> None:
    facts = json.loads((made / "kit.json").read_text())
    (made / "kit.json").write_text(json.dumps({**facts, "python": "3.99"}))
    done = unpack(made, tmp_path / "target")
    assert done.returncode == 1
    assert done.stderr == f"error: the kit is for Python 3.99, this is {PYTHON}; run this with it\n"


def test_unpacking_takes_nothing_but_the_standard_library(made: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-I", "-S", made / "unpack.py"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "python3 unpack.py TARGET" in done.stderr


def test_a_folder_with_files_is_not_written_into(made: Path, tmp_path: Path) -> None:
    with pytest.raises(kit.KitError, match="has files"):
        kit.write(made, kit.Wheels(tmp_path), tmp_path, PYTHON, "", lambda _: None)


def test_a_kit_without_bundles_names_the_command_that_builds_them(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "kit", tmp_path / "kit", "--bundles", tmp_path / "none"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"error: there are no bundles in {tmp_path / 'none'}; before this: make gpu-bundles\n"
    assert not (tmp_path / "kit").exists()


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What pip was asked; it has all but the libraries of TensorRT, and PyTorch comes with diffusers."""
    asked: list[list[str]] = []

    def run(arguments: Sequence[str]) -> None:
        asked.append(list(arguments))
        folder = Path(arguments[arguments.index("-d" if "-d" in arguments else "--wheel-dir") + 1])
        if arguments[0] == "download" and any(word.startswith("tensorrt>") for word in arguments):
            raise kit.KitError("No matching distribution found for tensorrt_cu13_libs")
        for name in ("torch-2.13.0", "nvidia_cublas-13", "diffusers-0.42.1"):
            (folder / f"{name}-py3-none-any.whl").touch()

    monkeypatch.setattr(kit, "_pip", run)
    return asked


def test_wheels_are_for_the_other_machine_and_without_pytorch(pip: list[list[str]], tmp_path: Path) -> None:
    extra, folder = tmp_path / "libs-1-py3-none-any.whl", tmp_path / "wheels"
    extra.touch()
    folder.mkdir()
    wheels = kit.download(folder, "3.12", [extra], lambda _: None)
    assert {file.name for file in folder.iterdir()} == {extra.name, "diffusers-0.42.1-py3-none-any.whl"}
    assert wheels.left_out == {"tensorrt>=11,<12": "No matching distribution found for tensorrt_cu13_libs"}
    assert "tensorrt-rtx>=1.7" in wheels.requirements
    assert not {"torch", "tensorrt>=11,<12"} & {*wheels.requirements}
    downloads = [words for words in pip if words[0] == "download"]
    for words in downloads:
        assert "--only-binary=:all:" in words
        assert words[words.index("--python-version") + 1] == "3.12"
        assert "manylinux_2_28_x86_64" in words


def test_the_models_random_weights_are_one_table_and_no_two_layers_alike() -> None:
    import torch

    from mdnet.model.config import preset
    from mdnet.model.net import random_mdnet

    model, config = module("model"), preset("demo")
    made, again, plain = model.random_model(config), model.random_model(config), random_mdnet(config, model.SEED)
    large = []
    states = (made.state_dict().items(), again.state_dict().values(), plain.state_dict().values())
    for (name, ours), same, before in zip(*states, strict=True):
        assert torch.equal(ours, same), name
        if ours.ndim > 1 and ours.numel() >= model._LARGE:
            large.append(ours)
            assert float(ours.std()) == pytest.approx(float(before.std()), rel=0.05), name
        else:
            assert torch.equal(ours, before), name
    assert len(large) > 10
    assert len({tensor.numpy().tobytes() for tensor in large}) == len(large)


def test_what_repeats_itself_at_a_distance_is_packed_once() -> None:
    import numpy as np

    table = np.random.default_rng(0).standard_normal(2**12, dtype=np.float32).reshape(8, -1)
    repeated = lzma.compress(np.tile(table, (50, 1)).tobytes(), filters=kit._XZ)
    assert len(repeated) < 1.3 * table.nbytes
