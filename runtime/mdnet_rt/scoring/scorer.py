"""Images → scores with a bundle: the graphs, open, and a pipeline that feeds them; one `Result` per image."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from mdnet_engines.backends.candidates import Backend, open_choice
from mdnet_engines.backends.choice import choose
from mdnet_engines.backends.trial import QUICK
from mdnet_engines.bundle.files import Bundle
from mdnet_engines.bundle.framed import framed
from mdnet_engines.bundle.manifest import GRAPH_NAMES, GraphName, Manifest
from mdnet_engines.errors import BundleError, MDNetError, UsageError
from mdnet_engines.parity.measure import measure_scores
from mdnet_engines.parity.probes import read_probes
from mdnet_engines.sessions.session import Session
from mdnet_engines.system.cores import available_cores
from mdnet_rt.images.face_crop import face_finder
from mdnet_rt.images.preprocess import Decoded, FindBox, ImageError, decode, decode_in_memory
from mdnet_rt.rows.result import Result
from mdnet_rt.scoring import forked
from mdnet_rt.scoring.pipeline import Pipeline, Task
from mdnet_rt.sources.objects import Data, Item, read_objects

BUNDLE_VARIABLE = "MDNET_BUNDLE"
BUNDLE_FOLDER = "mdnet-bundle"
BATCH_SIZE = 16
NO_PROBES = "note: this bundle has no probes (schema version 1): what it scores can't be checked here; build it again"

MAX_DECODERS = 4
"""By default: each may hold one image of `MAX_PIXELS`, and decoding shares its cores with the graphs."""


def find_bundle(bundle: str | os.PathLike[str] | None = None) -> Path:
    """Give the bundle's folder: the one named, else `$MDNET_BUNDLE`, else `./mdnet-bundle`.

    Raises:
        UsageError: none is named and the default does not exist.
    """
    if bundle is not None:
        return Path(bundle)
    if named := os.environ.get(BUNDLE_VARIABLE):
        return Path(named)
    if not Path(BUNDLE_FOLDER).is_dir():
        raise UsageError(
            f"no bundle: name one (--bundle DIR), set {BUNDLE_VARIABLE}, "
            f"or make ./{BUNDLE_FOLDER} with: mdnet-export build"
        )
    return Path(BUNDLE_FOLDER)


class Scorer:
    """A bundle, ready to score. Use `Scorer.open`; close it, or use it in a `with` block, to free the graphs.

    It works in the process that opened it. In one that is forked later every call is refused: open another there.

    The graphs' contract: `encoder` and `vim` take `image`, uint8 `[batch, S, S, 3]`, where S is the manifest's
    `image_size`; `fusion` takes outputs of these two by their names and gives `score`, float32 `[batch]`.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        backend: Backend,
        threads: int,
        batch_size: int,
        check: bool = True,
        face: str | None = None,
    ):
        self.bundle = bundle
        self.manifest: Manifest = framed(bundle.manifest, face)
        self._find_box = face_finder(self.manifest.preprocessing.face)  # first, as what it lacks takes no time to find
        self.image_size: int = bundle.manifest.preprocessing.image_size
        self.batch_size = _at_least(1, "batch_size", batch_size)
        _at_least(0, "threads", threads)
        self.choice = choose(bundle, backend, threads=threads, check=check)
        self._graphs = open_choice(bundle, self.choice, threads=threads)
        self._process = os.getpid()
        forked.watch(self)
        _check_contract(self._graphs)

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str] | None = None,
        *,
        backend: Backend = "auto",
        threads: int = 0,
        batch_size: int = BATCH_SIZE,
        check: bool = True,
        face: str | None = None,
    ) -> Scorer:
        """Open a bundle (validated, hashes checked) and load its graphs.

        Args:
            bundle: its folder; without it as `find_bundle` says.
            backend: what runs the graphs, as `mdnet_engines.backends.candidates` says; `auto` is as
                `mdnet_engines.backends.choice` says.
            threads: threads per graph; 0 takes all the cores this process may use.
            batch_size: how many images go through the graphs at once, unless `score` or `stream` says otherwise.
            check: apply the bundle's gates first, unless the backend has passed them on this machine before.
            face: `none`, `crop` or `crop:FACTOR`: which square of an image is scored. By default that of training;
                another is warned of (`mdnet_engines.framing`).

        Raises:
            UsageError: no bundle is named or found, or an argument is out of range.
            BundleError: the bundle can't be trusted, or its graphs don't fit together.
            MDNetError: the backend is missing, can't load a graph, or is off its gates here; or the bundle's framing
                needs the extra `face`, which is not installed.
        """
        opened = Bundle.open(find_bundle(bundle))
        return cls(opened, backend=backend, threads=threads, batch_size=batch_size, check=check, face=face)

    def check(self) -> None:
        """Score a few of the bundle's probes with these very graphs, in one batch.

        Raises:
            MDNetError: the scores are off the bundle's gates.
        """
        if self.manifest.probes is None:
            return
        probes, manifest = read_probes(self.bundle).first(QUICK), self.manifest
        report = measure_scores(
            self.score_batch,
            probes.reference["score"],
            probes.images,
            precision=manifest.precision,
            scale=manifest.score,
            backend=str(self.choice),
        )
        if not report.passed:
            raise MDNetError(f"{self.choice} is off the bundle's gates ({report.failures()})")

    def score(self, items: Iterable[Item] | Item, *, batch_size: int | None = None) -> list[Result]:
        """Score images, or one; as `stream`, in a list."""
        return list(self.stream(items, batch_size=batch_size))

    def stream(
        self,
        items: Iterable[Item] | Item,
        *,
        batch_size: int | None = None,
        workers: int = 0,
        keep_pixels: bool = False,
        stop: threading.Event | None = None,
    ) -> Iterator[Result]:
        """Score images as they are taken from `items`, giving one `Result` for each, in their order.

        Two batches are decoded ahead while the graphs run, so memory does not grow with the number of images. An image
        that can't be used becomes a `Result` with its reason.

        Args:
            items: paths, folders, patterns, bytes, open files, PIL images, arrays, tensors, or an iterable of these:
                `mdnet_rt.sources.objects.read_objects` has the list, and says what `Result.path` is.
            workers: threads that read and decode; by default one for each core, up to four.
            keep_pixels: fill in `Result.pixels`.
            stop: when set, the batch in the graphs is finished and the iterator ends.

        Raises:
            UsageError: `items`, or one of them, can't be an image; at once, unless a generator gives it.
            MDNetError: this scorer is of another process, or the graphs could not be run; no single image is at fault.
        """
        self._refuse_after_fork()  # before anything is read
        pipeline = Pipeline(
            self.score_batch,
            self.image_size,
            batch_size=self.batch_size if batch_size is None else _at_least(1, "batch_size", batch_size),
            workers=_at_least(0, "workers", workers) or min(MAX_DECODERS, available_cores()),
            keep_pixels=keep_pixels,
            stop=stop,
        )
        to_srgb = self.manifest.preprocessing.to_srgb
        images = read_objects(items)
        return pipeline.run(_task(name, data, self.image_size, self._find_box, to_srgb) for name, data in images)

    def score_batch(self, images: np.ndarray) -> np.ndarray:
        """Run the graphs once on preprocessed images.

        Args:
            images: uint8 `[n, S, S, 3]` RGB, as `preprocess` gives them.

        Returns:
            float32 `[n]`, on the rating scale.

        Raises:
            UsageError: another type or shape.
            MDNetError: the graphs could not be run, or this scorer is closed or of another process.
        """
        self._refuse_after_fork()
        if not self._graphs:
            raise MDNetError("this scorer is closed; open another with Scorer.open")
        expected = (self.image_size, self.image_size, 3)
        if images.dtype != np.uint8 or images.shape[1:] != expected:
            wanted = ", ".join(map(str, expected))
            raise UsageError(f"expected uint8 [n, {wanted}], got {images.dtype} {list(images.shape)}")
        if not len(images):
            return np.zeros(0, np.float32)
        scores = self._graphs.score(images)
        if scores.shape != (len(images),):
            raise MDNetError(f"fusion gave scores of shape {list(scores.shape)} for {len(images)} images")
        return scores.astype(np.float32, copy=False)

    def close(self) -> None:
        """Free the graphs. A scorer that is closed stays closed; closing it again does nothing.

        Nor does closing it in a forked process, where its graphs can't be freed.
        """
        if self._is_here:
            self._graphs.close()

    @property
    def _is_here(self) -> bool:
        return os.getpid() == self._process

    def _refuse_after_fork(self) -> None:
        if not self._is_here:
            raise MDNetError(
                f"this scorer was opened in another process ({self._process}), before a fork; "
                "open one in each process, after the fork"
            )

    def __repr__(self) -> str:
        manifest, closed = self.manifest, "" if self._graphs else ", closed"
        size = f"{self.image_size}x{self.image_size} pixels"
        return f"<Scorer {self.bundle.path}: {manifest.preset} {manifest.precision}, {size}, {self.choice}{closed}>"

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _task(name: str, data: Data, size: int, find_box: FindBox | None, to_srgb: bool) -> Task:
    if isinstance(data, (Path, bytes)):
        held = len(data) if isinstance(data, bytes) else 0
        return Task(name, functools.partial(decode, data, size, find_box=find_box, to_srgb=to_srgb), held)
    if isinstance(data, ImageError):
        return Task(name, functools.partial(_refuse, data))
    if callable(data):
        return Task(name, lambda: decode(data(), size, find_box=find_box, to_srgb=to_srgb))
    # What is in memory is the caller's, who may go on to change it (a video reader's one frame buffer), and PIL images
    # load lazily and not thread-safely: done where it is taken.
    in_memory = functools.partial(decode_in_memory, data, size, find_box=find_box, to_srgb=to_srgb)
    return Task(name, in_memory, at_once=True)


def _refuse(error: ImageError) -> Decoded:
    raise error


def _check_contract(graphs: Mapping[GraphName, Session]) -> None:
    encoder, vim, fusion = (graphs[name] for name in GRAPH_NAMES)
    for name, graph in (("encoder", encoder), ("vim", vim)):
        if graph.inputs != ("image",):
            raise BundleError(f"{name}.onnx takes {', '.join(graph.inputs)}; expected the one input image")
    if shared := set(encoder.outputs) & set(vim.outputs):
        raise BundleError(f"encoder and vim both give {', '.join(sorted(shared))}; rebuild the bundle")
    if missing := set(fusion.inputs) - {*encoder.outputs, *vim.outputs}:
        raise BundleError(f"fusion takes {', '.join(sorted(missing))}, which no graph gives; rebuild the bundle")
    if "score" not in fusion.outputs:
        raise BundleError(f"fusion gives {', '.join(fusion.outputs)}; expected score; rebuild the bundle")


def _at_least(minimum: int, name: str, value: int) -> int:
    if value < minimum:
        raise UsageError(f"{name} is {value}; expected {minimum} or more")
    return value
