"""The options of `mdnet` that say what is rated, on which scale, and what of it is trained and tested on."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mdnet.cli.common import DRAWN_FACES
from mdnet.data.rated import Scale, Split
from mdnet_engines.console import say, show_progress
from mdnet_engines.errors import UsageError, printable
from mdnet_engines.progress import Progress

if TYPE_CHECKING:
    from mdnet.data.source import RatedData

_LEAST = 10
"""Pictures to train on: a tenth of them chooses the epoch."""


class _ProtocolType(click.ParamType):
    """A protocol's name."""

    name = "protocol"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from mdnet.data.source import check_protocol

        return check_protocol(value)


data_help = "SCUT-FBP5500, faces from `mdnet draw`, or a table of your own ratings (.csv, .parquet)."
protocol_option = click.option(
    "--protocol",
    type=_ProtocolType(),
    help="60-40 or cv5; of a table: split, folds, kfold:K[:SEED], all.  [default: by the data]",
)
fold_option = click.option(
    "--fold",
    type=click.IntRange(min=0),
    help="Of a protocol with folds: the one to test on, which training leaves out.",
)
scale_option = click.option(
    "--scale", type=float, nargs=2, metavar="MIN MAX", help="Scale of the ratings.  [default: the model's]"
)


def parse_scale(ends: tuple[float, float] | None) -> Scale | None:
    """The scale of `--scale`; raises `UsageError` where it is none."""
    if ends is None:
        return None
    scale = Scale(*ends)
    if not (math.isfinite(scale.low) and math.isfinite(scale.high) and scale.low < scale.high):
        raise UsageError(f"--scale {scale.low:g} {scale.high:g}: expected the least rating, then the greatest")
    return scale


def check_fold(protocol: str | None, fold: int | None, *, drawn: bool = False) -> None:
    """Raise `UsageError` where `--fold` does not fit a protocol that says how many folds it has.

    Args:
        drawn: there is no `--data`, so that the default is that of drawn faces.
    """
    if protocol is None and not drawn:
        return
    protocol = protocol or "60-40"
    if (count := _folds(protocol)) is None:
        if fold is not None and protocol != "folds":
            raise UsageError(f"--fold needs --protocol cv5, folds or kfold:K; this is {protocol}")
    elif fold is None:
        raise UsageError(f"--protocol {protocol} needs --fold 1 to {count}")
    elif not 1 <= fold <= count:
        raise UsageError(f"--fold {fold}: --protocol {protocol} has folds 1 to {count}")


def training_split(
    data: RatedData, protocol: str | None, fold: int | None, scale: Scale, progress: Progress
) -> tuple[str, Split]:
    """The protocol and the split to train and test on.

    Args:
        protocol: what was asked for; by default that of the data.
        scale: the model's.

    Raises:
        UsageError: protocol, fold or scale do not fit the data.
        MDNetError: the data are broken.
    """
    asked, protocol = protocol, data.protocol(protocol, training=True)
    if asked is None and fold is None and (count := _folds(protocol)):
        raise UsageError(
            f"{printable(data.path)} has no column split or fold, so its protocol is {protocol}: give --fold 1 to "
            f"{count}, or another --protocol"
        )
    if protocol == "all":
        raise UsageError("protocol all is for `mdnet evaluate`: it leaves nothing to train on")
    check_fold(protocol, fold)
    data.check_scale(scale, "say which scale the ratings have, such as --scale {fitting}")
    for note in data.notes(scale):
        progress.note(note)
    splits = data.splits(protocol, progress)
    chosen = [split for split in splits if split.fold == fold]
    if not chosen:
        numbers = ", ".join(str(split.fold) for split in splits)
        raise UsageError(f"--protocol {protocol} needs --fold, one of {numbers}")
    if len(chosen[0].train) < _LEAST:
        raise UsageError(
            f"{printable(data.path)}: {len(chosen[0].train)} pictures to train on; expected {_LEAST} or more"
        )
    return protocol, chosen[0]


@contextlib.contextmanager
def data_or_drawn(path: Path | None) -> Iterator[RatedData]:
    """The data at `path`, else freshly drawn faces."""
    from mdnet.data.source import open_data

    if path is not None:
        yield open_data(path)
        return
    from mdnet.data.drawn_set import write_dataset

    with tempfile.TemporaryDirectory(prefix="mdnet-faces-") as scratch:
        folder = Path(scratch) / "drawn"
        say(f"no --data: drawing {DRAWN_FACES} faces")
        with show_progress() as progress:
            write_dataset(folder, DRAWN_FACES, 0, progress)
        yield open_data(folder)


def _folds(protocol: str) -> int | None:
    """How many folds it has by its name."""
    from mdnet.data.scut_fbp5500 import FOLDS
    from mdnet.data.table_splits import KFOLD

    if found := KFOLD.fullmatch(protocol):
        return int(found[1])
    return FOLDS if protocol == "cv5" else None
