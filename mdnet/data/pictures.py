"""Pictures without ratings: those of files and folders, and those that a model may learn from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mdnet.data.source import is_table, open_data
from mdnet_engines.errors import UsageError, printable
from mdnet_engines.progress import SILENT, Progress
from mdnet_rt.images.preprocess import FORMATS


def training_pictures(path: Path, progress: Progress = SILENT) -> list[Path]:
    """The images of a folder, or the training list of rated data, so that nothing is learnt from a test list.

    SCUT-FBP5500: of its split 60-40. A table: of its column split. One that leaves its folds open has no test list
    yet; all its images are taken, and a note says so.

    Raises:
        UsageError: nothing is there, or no image in it.
        MDNetError: the data are broken.
    """
    if not is_table(path) and not (path / "Images").is_dir():
        return find_images([path])
    data = open_data(path)
    protocol = data.protocol(None, training=True)
    if data.table is not None and protocol != "split":
        progress.note(f"{path} names no test list: all of its pictures are taken, without their ratings")
        return list(data.table.rated.images)
    return list(data.splits(protocol, progress)[0].train.images)


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Files as they are given; of a folder, with its subfolders, the images by their suffix, sorted.

    Raises:
        UsageError: nothing is there, or a folder holds no image.
    """
    suffixes = {suffix for suffix, format in Image.registered_extensions().items() if format in FORMATS}
    found = []
    for path in paths:
        if not path.exists():
            raise UsageError(f"{printable(path)}: no such file or folder")
        inside = [path]
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes)
            if not inside:
                raise UsageError(
                    f"{printable(path)}: no images in this folder (looked for {' '.join(sorted(suffixes))})"
                )
        found += inside
    return found
