"""A training run on disk after each epoch, so that a killed one continues where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from mdnet.data.rated import Rated
from mdnet.model.config import TrainConfig
from mdnet.training.features import encoder_digest, state_digest
from mdnet_engines.errors import MDNetError, UsageError, first_line
from mdnet_engines.system.atomic import new_file

if TYPE_CHECKING:
    from mdnet.model.net import MDNet

Fingerprint = dict[str, str]


class Stateful(Protocol):
    """What can be kept and go on."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class StateFile:
    """Where a run is kept.

    Args:
        file: written atomically after each epoch; deleted when the run has ended.
        resume: continue the run that `file` holds. Without it, an existing file is an error: it is hours of work.
    """

    def __init__(self, file: Path, *, resume: bool):
        self.file, self.resume = file, resume
        self._fingerprint: Fingerprint = {}

    def check(self) -> None:
        """Raise `UsageError` where there is something to resume and nobody asked, or the other way round."""
        if self.resume and not self.file.exists():
            raise UsageError(f"{self.file} is missing, so there is no run to resume; leave out --resume")
        if not self.resume and self.file.exists():
            raise UsageError(f"{self.file} holds an unfinished run: continue it with --resume, or remove the file")

    def open(self, fingerprint: Fingerprint, run: Stateful) -> None:
        """Check that the file is of the run that `fingerprint` describes, and put what it holds into `run`.

        Raises:
            UsageError: as `check`, or the file belongs to another run; the message says what differs.
            MDNetError: the file can't be read.
        """
        self.check()
        self._fingerprint = fingerprint
        if not self.resume:
            return
        try:
            stored = torch.load(self.file, map_location="cpu", weights_only=True)
            kept, state = dict(stored["fingerprint"]), stored["run"]
        except Exception as error:  # pickle and zip errors of many kinds
            raise MDNetError(
                f"{self.file} is not the state of a training run ({first_line(error)}); remove it to start again"
            ) from None
        if other := [name for name in fingerprint if kept.get(name) != fingerprint[name]]:
            changes = ", ".join(f"{name} was {kept.get(name)}, is {fingerprint[name]}" for name in other)
            raise UsageError(f"{self.file} belongs to another run: {changes}; use the options that it was started with")
        run.load_state_dict(state)

    def save(self, run: Stateful) -> None:
        """Replace the file by the state of `run`."""
        with new_file(self.file) as scratch:
            torch.save({"fingerprint": self._fingerprint, "run": run.state_dict()}, scratch)

    def remove(self) -> None:
        """The run has ended."""
        self.file.unlink(missing_ok=True)


def fingerprint(model: MDNet, data: Rated, config: TrainConfig, *, half_features: bool) -> Fingerprint:
    """What must be the same for a run to go on: name → value, short enough for a message."""
    listed = "".join(f"{image.name} {rating}\n" for image, rating in zip(data.images, data.ratings, strict=True))
    return {
        **{name: str(value) for name, value in dataclasses.asdict(config).items()},
        "preset": model.config.preset,
        "image size": str(model.config.image_size),
        "scale": f"{model.config.score_min:g} to {model.config.score_max:g}",
        "face": str(model.config.face),
        "features": "float16" if half_features else "float32",
        "encoder": encoder_digest(model.diffusion)[:12],
        "first weights": state_digest(nn.ModuleList([model.vim, model.fusion]))[:12],
        "training list": hashlib.sha256(listed.encode()).hexdigest()[:12],
    }
