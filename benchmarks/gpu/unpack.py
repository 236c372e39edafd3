"""Join, check and install a kit of wheels and bundles, on a machine that has PyTorch and no package index.

    python3 unpack.py TARGET

It takes the pieces that lie beside it and puts them into TARGET. If pieces are missing, it names them: run it again
with these. When the last has come, it unpacks the bundles, installs the wheels into TARGET/venv, which also sees the
packages of the Python that runs it, and says how to go on. `kit.json`, beside it, says what the kit has.

Nothing but Python's standard library is needed. This file travels with the kit, so it imports nothing of ours.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import site
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import IO, Any

BLOCK = 2**20


def main() -> int:
    """Exit 1 where something is damaged or does not fit this machine, 3 where pieces are missing."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    here, target = Path(__file__).resolve().parent, Path(sys.argv[1]).resolve()
    kit = json.loads((here / "kit.json").read_text(encoding="utf-8"))
    running = "{}.{}".format(*sys.version_info[:2])
    if running != kit["python"]:
        print(f"error: the kit is for Python {kit['python']}, this is {running}; run this with it", file=sys.stderr)
        return 1
    store = target / "pieces"
    store.mkdir(parents=True, exist_ok=True)
    if damaged := collect(kit, here, store):
        print(f"error: damaged: {', '.join(damaged)}; copy these again", file=sys.stderr)
        return 1
    if missing := [piece["name"] for piece in kit["pieces"] if not (store / piece["name"]).exists()]:
        have = len(kit["pieces"]) - len(missing)
        print(f"have {have} of {len(kit['pieces'])} pieces; missing: {', '.join(missing)}")
        return 3
    unpack(kit, store, target)
    shutil.rmtree(store)
    python = install(kit, target)
    print(f"{python} benchmarks/gpu_check.py --bundles {target / 'bundles'}")
    return 0


def collect(kit: dict[str, Any], here: Path, store: Path) -> list[str]:
    """Copy the good pieces from `here` to `store`; give the names of the others."""
    damaged = []
    for piece in kit["pieces"]:
        source, kept = here / piece["name"], store / piece["name"]
        if source.exists() and not is_good(kept, piece):
            kept.unlink(missing_ok=True)
            if not is_good(source, piece):
                damaged.append(piece["name"])
                continue
            draft = kept.with_suffix(".partial")
            shutil.copyfile(source, draft)
            draft.replace(kept)
    return damaged


def is_good(file: Path, piece: dict[str, Any]) -> bool:
    """Whether the file is the piece, byte for byte."""
    if not file.exists() or file.stat().st_size != piece["bytes"]:
        return False
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest() == piece["sha256"]


def unpack(kit: dict[str, Any], store: Path, target: Path) -> None:
    """Wheels to TARGET/wheels, bundles to TARGET/bundles."""
    for name in ("wheels", "bundles"):
        shutil.rmtree(target / name, ignore_errors=True)
    joined: Any = Joined([store / piece["name"] for piece in kit["pieces"]])
    with tarfile.open(fileobj=joined, mode="r|") as archive:
        _extract(archive, target)
    for packed in sorted(target.glob("bundles/*.tar.xz")):
        with tarfile.open(packed, "r:xz") as archive:
            _extract(archive, target / "bundles")
        packed.unlink()


def install(kit: dict[str, Any], target: Path) -> Path:
    """Make TARGET/venv, with what `kit` names and this Python lacks; give its Python."""
    venv = target / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--system-site-packages", str(venv)], check=True)
    packages = next(venv.glob("lib/python*/site-packages"))
    # This Python may be one of a virtual environment itself, whose packages its children do not see.
    lines = [f"import site; site.addsitedir({folder!r})\n" for folder in site.getsitepackages()]
    (packages / "parent.pth").write_text("".join(lines), encoding="utf-8")
    python = venv / "bin" / "python"
    options = ["--quiet", "--no-index", "--find-links", str(target / "wheels"), "--disable-pip-version-check"]
    subprocess.run([str(python), "-m", "pip", "install", *options, *kit["requirements"]], check=True)
    return python


class Joined:
    """Files one after the other, as one to read from."""

    def __init__(self, files: list[Path]):
        self._files = files
        self._open: IO[bytes] | None = None

    def read(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            if self._open is None:
                if not self._files:
                    break
                self._open = self._files.pop(0).open("rb")
            block = self._open.read(size - len(found))
            if not block:
                self._open.close()
                self._open = None
            found += block
        return found


def _extract(archive: tarfile.TarFile, folder: Path) -> None:
    if hasattr(tarfile, "data_filter"):
        archive.extractall(folder, filter="data")
    else:
        archive.extractall(folder)


if __name__ == "__main__":
    sys.exit(main())
