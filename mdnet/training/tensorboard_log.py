"""Training curves for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mdnet_engines.errors import require

if TYPE_CHECKING:
    from mdnet.training.train import Epoch


@contextmanager
def training_log(folder: Path | None) -> Iterator[Callable[[Epoch], None]]:
    """Give a function to call after each epoch, which writes its figures to `folder`; without one it does nothing.

    Scalars over epochs: `loss/train` (mean squared error), `pearson/validation`, `learning_rate`. A run that is resumed
    continues the same curves.

    Raises:
        MDNetError: the package tensorboard is missing.
    """
    if folder is None:
        yield lambda _: None
        return
    require("tensorboard", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:

        def write(epoch: Epoch) -> None:
            writer.add_scalar("loss/train", epoch.loss, epoch.number)
            writer.add_scalar("pearson/validation", epoch.validation_pearson, epoch.number)
            writer.add_scalar("learning_rate", epoch.learning_rate, epoch.number)

        yield write
