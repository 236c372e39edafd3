"""How much of everything a run does: two sets of sizes for a GPU, full and small, one for the dry run on a CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mdnet.model.config import MDNetConfig


@dataclass(frozen=True)
class Sizes:
    """Sizes of a run. `batches` stand in the order in which they are measured, since time may end before them."""

    name: str
    preset: str
    changes: dict[str, int]  # of the preset
    precisions: tuple[str, ...]  # of the bundles, where this version can build them
    batches: tuple[int, ...]
    compiled_batches: tuple[int, ...]  # of torch.compile, each a compilation
    goal_batch: int  # at which the goals are looked at
    images: int  # that parity is measured on
    scans: tuple[tuple[int, int, int, int], ...]  # (batch, channels, length, states) to be timed
    large_scans: tuple[tuple[int, int, int, int], ...]  # and to be checked, beside the shared case table
    case_elements: int  # cases of that table with more states and steps than this are left out
    copy_bytes: int
    matmul: int
    seconds: float  # of repeats for each figure
    compiler: str  # of torch.compile
    jpeg_seconds: float
    small: str  # the sizes with the small model

    @property
    def packaged(self) -> bool:
        """Whether the model is the demo that comes with its weights; others have random ones."""
        return self.preset == "demo" and not self.changes

    def config(self) -> MDNetConfig:
        """The model's."""
        from mdnet.model.config import preset

        return replace(preset(self.preset), **self.changes)


FULL = Sizes(
    name="full",
    preset="sd15-vim-s",
    changes={},
    precisions=("fp16", "int8", "fp8"),
    batches=(32, 1, 8, 64),
    compiled_batches=(32, 1, 8, 64),
    goal_batch=32,
    images=8,
    scans=((64, 768, 257, 16), (8, 768, 257, 16), (1, 768, 257, 16)),
    large_scans=((1, 768, 1, 16), (64, 768, 197, 16), (8, 768, 257, 16), (8, 384, 1025, 16)),
    case_elements=10**9,
    copy_bytes=2**30,
    matmul=8192,
    seconds=1.0,
    compiler="inductor",
    jpeg_seconds=5.0,
    small="demo",
)
DEMO = replace(
    FULL, name="demo", preset="demo", precisions=("fp16",), batches=(1, 8), goal_batch=8, images=16, seconds=0.3
)
TINY = Sizes(
    name="tiny",
    preset="demo",
    changes={"image_size": 64, "vim_depth": 1},
    precisions=("fp16",),
    batches=(2, 1),
    compiled_batches=(2,),
    goal_batch=2,
    images=2,
    scans=((2, 32, 17, 16),),
    large_scans=((1, 33, 20, 16),),
    case_elements=8_000,
    copy_bytes=2**20,
    matmul=128,
    seconds=0.01,
    compiler="eager",  # catches the graph; what comes after takes a compiler minutes on two cores
    jpeg_seconds=0.2,
    small="tiny",
)
SIZES = {sizes.name: sizes for sizes in (FULL, DEMO, TINY)}
