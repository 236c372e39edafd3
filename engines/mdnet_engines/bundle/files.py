"""Open a bundle (validated, every hash checked) and write one (all of it or nothing)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from mdnet_engines.bundle.manifest import (
    GRAPH_NAMES,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    READABLE_VERSIONS,
    FileEntry,
    GraphName,
    Manifest,
)
from mdnet_engines.errors import BundleError, UsageError, printable
from mdnet_engines.system.atomic import new_folder


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest is valid and whose files are what the manifest says.

    Plans are not looked at: they are a cache, which `mdnet_engines.tensorrt.plans` checks when one is chosen.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read and check the bundle at `path`.

        Raises:
            BundleError: not a bundle, or its manifest or one of its files can't be trusted; the message says which.
        """
        root = Path(path)
        while True:
            manifest = read_manifest(root)
            try:
                for entry in manifest.files():
                    check_file(root, entry)
            except (BundleError, FileNotFoundError) as error:
                if read_manifest(root) != manifest:
                    continue  # a build put another bundle in its place meanwhile: look at that one
                if isinstance(error, BundleError):
                    raise BundleError(
                        f"{error}; copy the whole folder, or rebuild it with: mdnet-export build"
                    ) from None
                raise
            return cls(root, manifest)

    def graph_path(self, name: GraphName, *, cpu: bool = False) -> Path:
        """The ONNX file of the graph `name`; with `cpu` the variant for ONNX Runtime on the CPU, where it has one."""
        entry = self.manifest.graphs[name]
        return self.path / (entry.cpu if cpu and entry.cpu else entry.file).name

    def on_gpus(self) -> Bundle:
        """The bundle as GPUs get it: each graph replaced by its variant for them, where it has one."""
        graphs = {name: entry.on_gpus() for name, entry in self.manifest.graphs.items()}
        return Bundle(self.path, self.manifest.model_copy(update={"graphs": graphs}))


def read_manifest(root: Path) -> Manifest:
    """The valid manifest of the bundle at `root`, or `BundleError`. No other file is looked at."""
    file = root / MANIFEST_NAME
    if not file.exists():
        reason = f"no {MANIFEST_NAME} in it" if root.is_dir() else "no such folder"
        raise BundleError(f"{root} is not a bundle ({reason}); make one with: mdnet-export build -o {root}")
    check_regular(file)
    with file.open("rb") as stream:
        raw = stream.read(MAX_MANIFEST_BYTES + 1)
    if len(raw) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{file} is larger than {MAX_MANIFEST_BYTES} bytes; this is not a manifest")
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file} is not JSON ({error}); rebuild the bundle with: mdnet-export build") from None
    version = document.get("schema_version") if isinstance(document, dict) else None
    if type(version) is not int or version not in READABLE_VERSIONS:  # True and 1.0 equal 1
        raise BundleError(
            f"{file} has schema version {version!r:.40}, this mdnet reads {', '.join(map(str, READABLE_VERSIONS))}; "
            "rebuild the bundle, or install the mdnet that wrote it"
        )
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = printable(".".join(str(part) for part in first["loc"]))
        raise BundleError(f"{file}: {where:.200}: {first['msg']} (got {first['input']!r:.80})") from None
    if missing := [name for name in GRAPH_NAMES if name not in manifest.graphs]:
        raise BundleError(f"{file} lacks the graphs {', '.join(missing)}; rebuild the bundle")
    return manifest


def check_file(root: Path, entry: FileEntry) -> None:
    """Raise `BundleError` unless the file in the folder `root` is a regular one with the entry's size and sha256.

    A link to one will do: the Hugging Face cache and Kubernetes lay bundles out so, and the hash decides.
    """
    file = root / entry.name
    if not file.exists():
        raise BundleError(f"{file} is missing")
    check_regular(file)
    if (size := file.stat().st_size) != entry.size:
        raise BundleError(f"{file} has {size} bytes, the manifest says {entry.size}: the copy is incomplete or altered")
    if (digest := sha256_of(file)) != entry.sha256:
        raise BundleError(f"{file} has sha256 {digest[:12]}…, the manifest says {entry.sha256[:12]}…: it was altered")


def check_regular(file: Path) -> None:
    """Raise `BundleError` where `file` is no regular file, nor a link to one. A pipe would block."""
    if not file.is_file():
        raise BundleError(f"{file} is not a regular file, which a bundle's files must be")


def sha256_of(file: Path) -> str:
    """Hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def file_entry(file: Path) -> FileEntry:
    """Describe `file` for the manifest."""
    return FileEntry(name=file.name, sha256=sha256_of(file), size=file.stat().st_size)


@contextlib.contextmanager
def write_bundle(destination: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder; when the block ends without an error, it replaces `destination` atomically.

    If the block raises, or the process dies, `destination` is as it was. An existing destination is replaced only if it
    is a bundle or an empty folder.

    Raises:
        UsageError: `destination` exists and is something else.
    """
    # The final component may be a link to where the bundle really is: replace that, not the link.
    target = Path(destination).resolve()
    with new_folder(target, lambda: check_replaceable(target)) as folder:
        yield folder


def check_replaceable(target: Path) -> None:
    """Raise `UsageError` unless `target` is free, an empty folder or a bundle, and nobody's current folder."""
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"{target} is a file; -o takes the folder to write the bundle to")
    if _current_folder_is_in(target):
        raise UsageError(f"{target} is the current folder, which can't be replaced; choose a folder in it with -o")
    if any(target.iterdir()) and not _holds_our_manifest(target):
        raise UsageError(f"{target} exists and is not a bundle; it is left alone. Choose another folder with -o")


def _current_folder_is_in(target: Path) -> bool:
    try:
        return Path.cwd().is_relative_to(target)
    except FileNotFoundError:  # the shell's folder was deleted
        return False


def _holds_our_manifest(folder: Path) -> bool:
    # Of any schema version: an outdated bundle may be replaced. Browser extensions have a manifest.json too.
    file = folder / MANIFEST_NAME
    try:
        small = file.is_file() and file.stat().st_size <= MAX_MANIFEST_BYTES
        document = json.loads(file.read_bytes()) if small else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and {"schema_version", "graphs"} <= document.keys()
