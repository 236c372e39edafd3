"""The bundle's manifest: what `manifest.json` may say, validated before anything it names is opened.

A bundle is the only thing that passes from export to runtime:

    mdnet-bundle/
      manifest.json      this schema
      encoder.onnx       (+ encoder.onnx.data when the weights are large)
      vim.onnx
      fusion.onnx
      parity.json        the numbers behind `manifest.parity`
      parity.html        the same, for people

Rules, each with what it prevents:
- manifest.json is at most 1 MiB (a manifest that fills memory);
- unknown fields are refused (a misspelt or newer field that would be silently ignored);
- every path is a plain file name in the bundle's own folder (a manifest that reads or loads `/etc/...`);
- every file carries its sha256 and size, checked before a parser sees a byte (a swapped or cut file);
- `schema_version` is checked before the rest, so that a newer bundle is named as such.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

SCHEMA_VERSION: Final = 1
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 2**20

Precision = Literal["fp32", "fp16"]
GraphName = Literal["encoder", "vim", "fusion"]
GRAPH_NAMES: tuple[GraphName, ...] = ("encoder", "vim", "fusion")

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$", max_length=128)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FileEntry(_Part):
    """One file of the bundle: `name` in the bundle's folder, its `sha256` and `size` in bytes."""

    name: FileName
    sha256: Sha256
    size: int = Field(ge=0)


class TensorSpec(_Part):
    """A graph input or output. A string in `shape` is a symbolic dimension (`batch`)."""

    name: str
    dtype: Literal["uint8", "float32", "float16"]
    shape: list[int | str]


class GraphEntry(_Part):
    """One ONNX graph: its file, external weights if any, precision and signature."""

    file: FileEntry
    data: list[FileEntry] = []
    precision: Precision
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]

    def files(self) -> list[FileEntry]:
        return [self.file, *self.data]


class Preprocessing(_Part):
    """How an image becomes the graphs' input; stored with the weights so that serving can't drift from training."""

    image_size: int = Field(ge=32, le=4096)
    resample: Literal["bicubic"] = "bicubic"
    crop: Literal["center"] = "center"
    jpeg_draft: Literal[2] = 2
    """JPEGs are decoded at a reduced size that is still at least this many times `image_size`."""


class ScoreScale(_Part):
    """The rating scale of the score."""

    minimum: float
    maximum: float


class ParitySummary(_Part):
    """Agreement of the bundle with PyTorch fp32 on `images` images (scores in rating points)."""

    passed: bool
    forced: bool = False
    images: int
    source: str
    max_abs: float | None
    mean_abs: float | None
    """None where a score was not finite."""
    pearson: float | None = None
    spearman: float | None = None
    """None where the reference scores hardly vary (random weights), which leaves a correlation no meaning."""

    def __str__(self) -> str:
        """The differences, for one line of output."""
        if self.max_abs is None or self.mean_abs is None:
            return f"scores that are not finite, {self.source}"
        correlation = "" if self.pearson is None else f", Pearson {self.pearson:.6f}"
        return f"max |Δscore| {self.max_abs:.2g}, mean {self.mean_abs:.2g}{correlation}, {self.source}"


class Training(_Part):
    """Which images the weights learned from, as the checkpoint told; `None` where it did not."""

    protocol: str | None = Field(default=None, max_length=40)
    """Of which protocol of SCUT-FBP5500 the training list was: `60-40` or `cv5`."""
    fold: int | None = None
    """Of `cv5`: which of the five folds was left out, from 1."""
    data: str | None = Field(default=None, max_length=400)
    """What the data set was called."""


class Provenance(_Part):
    """Where the weights came from and what made the bundle."""

    weights: Literal["demo", "checkpoint", "random"]
    checkpoint_sha256: Sha256 | None = None
    seed: int | None = None
    training: Training | None = None
    command: str
    versions: dict[str, str]


class Manifest(_Part):
    """The whole of `manifest.json`."""

    schema_version: Literal[1] = SCHEMA_VERSION
    model: Literal["md-net"] = "md-net"
    preset: str
    precision: Precision
    preprocessing: Preprocessing
    score: ScoreScale
    graphs: dict[GraphName, GraphEntry]
    reports: list[FileEntry] = []
    parity: ParitySummary
    provenance: Provenance
    licenses: list[str]

    @model_validator(mode="after")
    def _image_size_is_the_graphs(self) -> Manifest:
        size = self.preprocessing.image_size
        for graph in self.graphs.values():
            for spec in graph.inputs:
                if spec.name == "image" and spec.shape[1:] != [size, size, 3]:
                    raise ValueError(f"image_size is {size}, but a graph takes images of shape {spec.shape}")
        return self

    def files(self) -> list[FileEntry]:
        """Every file the manifest vouches for."""
        return [file for graph in self.graphs.values() for file in graph.files()] + self.reports
