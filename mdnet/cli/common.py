"""What the subcommands of `mdnet` share."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from mdnet_engines.errors import UsageError, require
from mdnet_engines.options import from_config
from mdnet_engines.system.output_path import is_special

DRAWN_FACES = 2000


def check_output(file: Path | None, option: str = "-o", what: str = "the checkpoint") -> None:
    """Raise `UsageError` where `file` can't be written, before the work starts."""
    if file and (not file.parent.is_dir() or file.is_dir()):
        raise UsageError(f"{file}: {option} takes a file in a folder that exists, to write {what} to")
    if file and option == "-o" and is_special(file):  # these files are replaced when the new one is whole
        raise UsageError(f"{file}: -o takes the name of a regular file, to write {what} to")


def command_line() -> str:
    """The command as it was typed, for notes, with what it took from a configuration file."""
    typed, config = shlex.join(["mdnet", *sys.argv[1:]]), from_config()
    return f"{typed}  # {config}" if config else typed


def require_train() -> None:
    """Raise where the extra `train` is missing."""
    for module in ("torch", "diffusers", "safetensors"):
        require(module, "train")
