"""The bundle's manifest: what `manifest.json` may say, validated before anything it names is opened.

A bundle is the only thing that passes from export to runtime:

    mdnet-bundle/
      manifest.json      this schema
      encoder.onnx       (+ encoder.onnx.data when the weights are large)
      vim.onnx
      fusion.onnx
      encoder.cpu.onnx, vim.cpu.onnx, fusion.cpu.onnx    of an int8 bundle: the same graphs for ONNX Runtime on the CPU;
                                                         of an fp32 bundle the encoder, where it gains by that
      encoder.gpu.onnx, vim.gpu.onnx, fusion.gpu.onnx    of an int8 bundle: the same graphs for GPUs, float16 where they
                                                         are not int8 (+ encoder.gpu.onnx.data … for what is float16)
      probes.npz         drawn faces, and PyTorch fp32's outputs for them: `mdnet_engines.parity.probes`
      parity.json        the numbers behind `manifest.parity`
      parity.html        the same, for people
      engines/           plans of `mdnet-export engines`, a cache: one folder for each entry of `manifest.engines`
        tensorrt-rtx-1.7.1.116-portable/
          encoder.plan  vim.plan  fusion.plan
          timing.cache   (TensorRT only)
          layers.json  engine.json   for people

Rules, each with what it prevents:
- manifest.json is at most 1 MiB (a manifest that fills memory);
- unknown fields are refused (a misspelt or newer field that would be silently ignored);
- every path is a plain file name in the bundle's own folder (a manifest that reads or loads `/etc/...`);
- every file carries its sha256 and size, checked before a parser sees a byte (a swapped or cut file);
- the name of a folder of plans is made of runtime, version and target, each of a strict pattern, never read as a path
  (as above); a plan is native code, and is opened only when its sha256 is that of its entry (a planted plan);
- a plan's entry says from which graph it was built (a plan that survived its graph and scores with old weights);
- plans are a cache: they are checked when they are chosen (`mdnet_engines.tensorrt.plans`), not when the bundle is
  opened (a damaged or foreign plan that would take a bundle away whose ONNX files are whole);
- `schema_version` is checked before the rest, so that a newer bundle is named as such. Versions 1 and 2 are still read:
  1 had no probes, and int8 weights of 8 bits; neither had graphs for GPUs.
"""

from __future__ import annotations

import hashlib
import math
from typing import Annotated, Final, Literal

from pydantic import Field, StringConstraints, model_validator

from mdnet_engines.bundle.parity_summary import ParitySummary
from mdnet_engines.bundle.part import Part, Sha256
from mdnet_engines.bundle.precision_facts import CalibrationFacts, Fp8Facts, Int8Facts
from mdnet_engines.framing import LEAST, MOST
from mdnet_engines.system.machine import Machine

SCHEMA_VERSION: Final = 3
READABLE_VERSIONS = (1, 2, SCHEMA_VERSION)
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 2**20

Precision = Literal["fp32", "fp16", "int8", "fp8"]
GraphName = Literal["encoder", "vim", "fusion"]
GRAPH_NAMES: tuple[GraphName, ...] = ("encoder", "vim", "fusion")

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$", max_length=128)]

GraphBackend = Literal["onnxruntime-cpu", "onnxruntime-cuda", "openvino", "openvino-bf16", "tensorrt", "tensorrt-rtx"]
PlanRuntime = Literal["tensorrt", "tensorrt-rtx"]
PORTABLE = "portable"
"""The target of a plan that was built for no GPU in particular."""
RuntimeVersion = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,4}(\.[0-9]{1,6}){1,4}$")]
Target = Annotated[str, StringConstraints(pattern=r"^(portable|sm_[0-9]{2,3}(-sm_[0-9]{2,3}){0,15})$")]


class FileEntry(Part):
    """One file of the bundle: `name` in the bundle's folder, its `sha256` and `size` in bytes."""

    name: FileName
    sha256: Sha256
    size: int = Field(ge=0)


class TensorSpec(Part):
    """A graph input or output. A string in `shape` is a symbolic dimension (`batch`)."""

    name: str
    dtype: Literal["uint8", "float32", "float16"]
    shape: list[int | str]


class GpuGraph(Part):
    """The variant of a graph for GPUs: its file, and the weights that are in no other variant's `data`."""

    file: FileEntry
    data: list[FileEntry] = Field(default=[])


class GraphEntry(Part):
    """One ONNX graph: its file, external weights if any, precision and signature."""

    file: FileEntry
    data: list[FileEntry] = Field(default=[])
    cpu: FileEntry | None = None
    """The same graph, on the same `data`, in the variant that ONNX Runtime's CPU kernels, and ours, are fast for."""
    gpu: GpuGraph | None = None
    """The same graph for GPUs, with float16 in the place of float32, on the same int8 weights (int8 only)."""
    precision: Precision
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]

    def files(self) -> list[FileEntry]:
        gpu = [self.gpu.file, *self.gpu.data] if self.gpu else []
        return [self.file, *self.data, *([self.cpu] if self.cpu else []), *gpu]

    def on_gpus(self) -> GraphEntry:
        """The graph as GPUs get it: this one, or its variant for them in its place."""
        if self.gpu is None:
            return self
        changes = {"file": self.gpu.file, "data": [*self.data, *self.gpu.data], "cpu": None, "gpu": None}
        precision = "fp16" if self.precision == "fp32" else self.precision
        return self.model_copy(update={**changes, "precision": precision})

    def digest(self) -> str:
        """One sha256 for the graph that plans are built from, weights included: what a plan of it is known by."""
        built_from = self.on_gpus()
        digests = [file.sha256 for file in [built_from.file, *built_from.data]]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()


class Preprocessing(Part):
    """How an image becomes the graphs' input; stored with the weights so that serving can't drift from training."""

    image_size: int = Field(ge=32, le=4096)
    resample: Literal["bicubic"] = "bicubic"
    crop: Literal["center"] = "center"
    jpeg_draft: Literal[2] = 2
    """JPEGs are decoded at a reduced size that is still at least this many times `image_size`."""
    colour: Literal["as_stored", "srgb"] = "as_stored"
    """Whether the colour profile of a file is applied; bundles that do not say were made when none was."""
    face: float | None = Field(default=None, ge=LEAST, le=MOST)
    """Side of a square around the face, over the longer side of the face, with the eyes level, that is taken in place
    of the central one. Bundles that do not say were made when training knew the central square only.
    """

    @property
    def to_srgb(self) -> bool:
        return self.colour == "srgb"

    def digested(self) -> str:
        """What the bundle's digest has of it: without what is as it was before there was a choice."""
        as_ever = {"colour": not self.to_srgb, "face": self.face is None}
        return self.model_dump_json(exclude={name for name, same in as_ever.items() if same})


class ScoreScale(Part):
    """The rating scale of the score."""

    minimum: float = Field(allow_inf_nan=False)
    maximum: float = Field(allow_inf_nan=False)

    @property
    def width(self) -> float:
        """In rating points."""
        return self.maximum - self.minimum

    @model_validator(mode="after")
    def _in_order(self) -> ScoreScale:
        if not 0 < self.width < math.inf:
            raise ValueError(f"the scale {self.minimum:g} to {self.maximum:g} is not one")
        return self

    def __str__(self) -> str:
        return f"{self.minimum:g} to {self.maximum:g}"


class BackendCheck(Part):
    """How one choice of backends, by graph, met the gates on one kind of machine."""

    graphs: dict[GraphName, GraphBackend]
    machine: Machine
    parity: ParitySummary
    failures: str = Field(default="", max_length=2000)
    """The gates that failed, with value and limit."""
    snr_db: dict[str, float] = Field(default={})
    """Signal-to-noise ratio of every graph output on the bundle's probes, each graph fed with PyTorch's own inputs."""


class Training(Part):
    """Which images the weights were trained on, as the checkpoint records; `None` if it doesn't."""

    protocol: str | None = Field(default=None, max_length=40)
    """Of which protocol the training list was: `60-40` or `cv5` of SCUT-FBP5500, or one of a table of ratings."""
    fold: int | None = None
    """Which fold was left out, where the protocol has folds; from 1, unless a table numbers them otherwise."""
    data: str | None = Field(default=None, max_length=400)
    """What the data set was called."""
    data_sha256: Sha256 | None = None
    """Of a table of ratings: its file's hash."""


class Provenance(Part):
    """Where the weights came from and what made the bundle."""

    weights: Literal["demo", "checkpoint", "random"]
    checkpoint: str | None = Field(default=None, max_length=200)
    """The user's name of it: the file's, without its suffix."""
    checkpoint_sha256: Sha256 | None = None
    seed: int | None = None
    training: Training | None = None
    command: str
    versions: dict[str, str]

    @property
    def name(self) -> str:
        """Whose weights: by the user's name where they have one."""
        return self.checkpoint or self.weights


class BatchRange(Part):
    """The batch sizes a plan takes, and those it is tuned for."""

    minimum: int = Field(ge=1)
    optimum: int
    maximum: int = Field(le=4096)
    further_optima: list[int] = Field(default=[], max_length=7)
    """Sizes above `optimum` that have an optimisation profile of their own."""

    @model_validator(mode="after")
    def _in_order(self) -> BatchRange:
        tuned = [self.optimum, *self.further_optima]
        if not self.minimum <= tuned[0] or not tuned[-1] <= self.maximum or tuned != sorted(set(tuned)):
            raise ValueError(f"batch {self} is not minimum ≤ optimum < … < optimum ≤ maximum")
        return self

    def profiles(self) -> list[tuple[int, int, int]]:
        """Least, best and most images of each optimisation profile; each but the last ends at its best size."""
        tuned = [self.optimum, *self.further_optima]
        first = [self.minimum, *(best + 1 for best in tuned[:-1])]
        return list(zip(first, tuned, [*tuned[:-1], self.maximum], strict=True))

    def __str__(self) -> str:
        return ",".join(map(str, [self.minimum, self.optimum, *self.further_optima, self.maximum]))


class PlanEntry(Part):
    """One graph's plan: its file, and the digest of the graph that it was built from."""

    file: FileEntry
    graph: Sha256


class PlanSet(Part):
    """The plans of all graphs for one runtime, version and target, in `engines/<folder>`: one set, whatever options."""

    runtime: PlanRuntime
    version: RuntimeVersion
    target: Target
    platform: str | None = Field(default=None, max_length=80)
    """Of TensorRT's plans, which do not run on another operating system; those of TensorRT-RTX do."""
    gpu: str | None = Field(default=None, max_length=200)
    """The name of the GPU it was tuned on; None where it was built without one."""
    batch: BatchRange
    workspace_gib: float | None = Field(default=None, gt=0)
    level: int | None = Field(default=None, ge=0, le=5)
    """Of the builder's optimisation; None is TensorRT's default."""
    stripped: bool = False
    """Whether the plans are without weights, which the bundle's graphs give when they are loaded."""
    compatible: bool = False
    """Whether later versions of TensorRT, and any GPU from Ampere on, run them. They hold code for the CPU too."""
    plans: dict[GraphName, PlanEntry]
    timing_cache: FileEntry | None = None

    @property
    def folder(self) -> str:
        return f"{self.runtime}-{self.version}-{self.target}"

    @model_validator(mode="after")
    def _whole(self) -> PlanSet:
        if self.compatible and (self.runtime, self.target) != ("tensorrt", PORTABLE):
            raise ValueError("compatible plans are TensorRT's, and portable")
        if missing := [name for name in GRAPH_NAMES if name not in self.plans]:
            raise ValueError(f"no plan for {', '.join(missing)}")
        return self

    def files(self) -> list[FileEntry]:
        return [plan.file for plan in self.plans.values()]


class Manifest(Part):
    """The whole of `manifest.json`."""

    schema_version: Literal[1, 2, 3] = SCHEMA_VERSION
    model: Literal["md-net"] = "md-net"
    preset: str
    precision: Precision
    preprocessing: Preprocessing
    score: ScoreScale
    graphs: dict[GraphName, GraphEntry]
    probes: FileEntry | None = None
    """None in version 1 alone."""
    reports: list[FileEntry] = Field(default=[])
    engines: list[PlanSet] = Field(default=[], max_length=64)
    parity: ParitySummary
    """Of what `auto` took where the bundle was built."""
    backends: list[BackendCheck] = Field(default=[], max_length=64)
    """Every backend that `auto` could have taken there."""
    calibration: CalibrationFacts | None = None
    int8: Int8Facts | None = None
    fp8: Fp8Facts | None = None
    float32_values: dict[GraphName, list[str]] = Field(default={})
    """Values of a graph in float16 that come too near to float16's largest number and stay in float32."""
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

    @model_validator(mode="after")
    def _has_probes(self) -> Manifest:
        if (self.probes is None) != (self.schema_version == 1):
            raise ValueError("a bundle has probes from schema version 2 on")
        return self

    @model_validator(mode="after")
    def _one_set_for_each_folder(self) -> Manifest:
        folders = [engines.folder for engines in self.engines]
        if len(set(folders)) != len(folders):
            raise ValueError(f"two sets of plans are in the same folder: {', '.join(sorted(folders))}")
        return self

    @property
    def label(self) -> str:
        """What to call the model in front of people: by its owner's name of the checkpoint, where there is one."""
        return f"{self.provenance.checkpoint or self.preset} {self.precision}"

    def digest(self) -> str:
        """One sha256 for what decides the scores: the graphs, their weights, preprocessing. Plans don't change it."""
        parts = [file.sha256 for name in GRAPH_NAMES for file in self.graphs[name].files()]
        return hashlib.sha256("\n".join([*parts, self.preprocessing.digested()]).encode()).hexdigest()

    def files(self) -> list[FileEntry]:
        """Every file the bundle can't do without. Plans are not among them."""
        probes = [self.probes] if self.probes else []
        return [file for graph in self.graphs.values() for file in graph.files()] + probes + self.reports
