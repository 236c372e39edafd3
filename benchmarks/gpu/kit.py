"""What a machine without a package index needs for all stages, in pieces that can be carried: `gpu_check.py kit DIR`.

    DIR/kit.json        what is in the pieces, with their hashes
    DIR/unpack.py       joins, checks and installs them (`gpu/unpack.py`)
    DIR/kit.001, …      a tar of wheels/ and bundles/, cut into pieces

PyTorch is not in it: the machine has the one that fits its driver.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpu.checkout import ROOT

PIECE = 58 * 2**20
REQUIRED = (
    *("mdnet", "click", "numpy", "pillow", "pydantic", "rich"),  # ours, and what it always needs
    *("diffusers", "safetensors", "jinja2", "onnx", "onnxscript", "polygraphy"),
    # Without its extras: they are CUDA's libraries, which PyTorch has brought.
    *("onnxruntime-gpu", "cuda-bindings>=13"),
    *("pytest", "ml-dtypes", "hypothesis"),  # for the tests that are marked `gpu`
)
OPTIONAL = {"tensorrt-rtx>=1.7": "tensorrt-rtx-cu13", "tensorrt>=11,<12": "tensorrt-cu13"}
"""Each with the package that it is a name for; neither is a wheel, but both build in a moment. Where an index lacks the
libraries below them, the kit says so, and does without."""
_LEFT_THERE = ("torch-", "triton-", "nvidia_")
_GLIBC = (28, 27, 26, 24, 17, 12, 5)  # the kit's wheels run with glibc 2.28 and newer
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in _GLIBC), "manylinux2014_x86_64", "manylinux1_x86_64")
_XZ = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**26}]  # finds what random weights repeat, and is quick

Tell = Callable[[str], None]


class KitError(Exception):
    """The kit was not made; the message says why."""


@dataclass
class Wheels:
    """Wheels in a folder, what to install of them, and what no wheel was found of."""

    folder: Path
    requirements: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def download(folder: Path, python: str, extra: Sequence[Path], tell: Tell) -> Wheels:
    """Get the wheels for another machine, and build ours.

    Raises:
        KitError: one that must be there can't be had.
    """
    wheels = Wheels(folder)
    tell("building the wheel of mdnet")
    _pip(["wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)])
    for file in extra:
        shutil.copy(file, folder)
    options = ["download", "--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    options += [word for name in PLATFORMS for word in ("--platform", name)]
    options += ["-d", str(folder), "--find-links", str(folder), "-c", str(ROOT / "constraints.txt")]
    tell("downloading wheels")
    _pip([*options, *(name for name in REQUIRED if name != "mdnet")])
    wheels.requirements += REQUIRED
    for requirement, named in OPTIONAL.items():
        tell(f"downloading {requirement}")
        try:
            _pip(["wheel", "--no-deps", "--wheel-dir", str(folder), requirement, named])
            _pip([*options, requirement])
        except KitError as error:
            wheels.left_out[requirement] = str(error)
        else:
            wheels.requirements.append(requirement)
    for file in folder.glob("*.whl"):
        if file.name.startswith(_LEFT_THERE):
            file.unlink()
    return wheels


def write(
    out: Path, wheels: Wheels, bundles: Path, python: str, commit: str, tell: Tell, piece: int = PIECE
) -> list[Path]:
    """Write the kit to `out`, an empty or missing folder; gives the pieces.

    Raises:
        KitError: `out` has files.
    """
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise KitError(f"{out} has files; name another folder, or empty it")
    contents, parts = {}, Pieces(out, piece)
    with tempfile.TemporaryDirectory(dir=out) as scratch, tarfile.open(fileobj=parts, mode="w|") as archive:
        for name, file in _members(wheels.folder, bundles, Path(scratch), tell):
            archive.add(file, name, filter=_nobodys)
            contents[name] = file.stat().st_size
    parts.close()
    facts = {
        "kind": "mdnet-gpu-kit",
        "commit": commit,
        "python": python,
        "requirements": wheels.requirements,
        "left out": wheels.left_out,
        "pieces": parts.made,
        "contents": contents,
    }
    (out / "kit.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("unpack.py"), out / "unpack.py")
    return [out / str(each["name"]) for each in parts.made]


class Pieces(io.RawIOBase):
    """What is written goes to `folder`/kit.001, kit.002, … of `size` bytes at most; `made` describes the whole ones."""

    def __init__(self, folder: Path, size: int):
        self.made: list[dict[str, str | int]] = []
        self._folder, self._size, self._waiting = folder, size, bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self._waiting += data
        while len(self._waiting) >= self._size:
            self._cut()
        return len(data)

    def close(self) -> None:
        if not self.closed and self._waiting:
            self._cut()
        super().close()

    def _cut(self) -> None:
        data = bytes(self._waiting[: self._size])
        del self._waiting[: self._size]
        name = f"kit.{len(self.made) + 1:03d}"
        (self._folder / name).write_bytes(data)
        self.made.append({"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})


def _members(wheels: Path, bundles: Path, scratch: Path, tell: Tell) -> Iterator[tuple[str, Path]]:
    for wheel in sorted(wheels.glob("*.whl")):
        yield f"wheels/{wheel.name}", wheel
    for folder in sorted(each for each in bundles.glob("*") if each.is_dir()):
        tell(f"packing the bundles in {folder.name}")
        packed = scratch / f"{folder.name}.tar.xz"
        with lzma.open(packed, "wb", filters=_XZ) as stream, tarfile.open(fileobj=stream, mode="w") as archive:
            archive.add(folder, folder.name, filter=_nobodys)
        yield f"bundles/{packed.name}", packed


def _nobodys(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def _pip(arguments: Iterable[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise KitError(said[-1].removeprefix("ERROR: ")[:300] if said else f"pip failed with {done.returncode}")
