"""Images → scores: decode in a few threads, run the bundle's three graphs on batches, one `Result` per image."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
from PIL import Image

from mdnet_engines.backends import Backend, open_graphs
from mdnet_engines.bundle import Bundle
from mdnet_engines.errors import BundleError, MDNetError, UsageError
from mdnet_engines.manifest import GRAPH_NAMES, GraphName, Manifest
from mdnet_engines.session import Session, available_cores
from mdnet_rt.preprocess import ImageError, load_image, preprocess
from mdnet_rt.results import Result

Item: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
"""An image: its path, its file's bytes, a PIL image, or uint8 `[H, W, 3]` RGB."""

BUNDLE_VARIABLE = "MDNET_BUNDLE"
BUNDLE_FOLDER = "mdnet-bundle"
BATCH_SIZE = 16

_MAX_DECODERS = 4  # each may hold one image of MAX_PIXELS, and decoding shares its cores with the graphs
_BATCHES_AHEAD = 2


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

    The graphs' contract: `encoder` and `vim` take `image`, uint8 `[batch, S, S, 3]`, where S is the manifest's
    `image_size`; `fusion` takes outputs of these two by their names and gives `score`, float32 `[batch]`.
    """

    def __init__(self, bundle: Bundle, *, backend: Backend, threads: int, batch_size: int):
        self.manifest: Manifest = bundle.manifest
        self.image_size: int = bundle.manifest.preprocessing.image_size
        self.batch_size = _at_least(1, "batch_size", batch_size)
        _at_least(0, "threads", threads)
        self._graphs = open_graphs(bundle, backend=backend, threads=threads)
        _check_contract(self._graphs)

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str] | None = None,
        *,
        backend: Backend = "auto",
        threads: int = 0,
        batch_size: int = BATCH_SIZE,
    ) -> Scorer:
        """Open a bundle (validated, hashes checked) and load its graphs.

        Args:
            bundle: its folder; without it as `find_bundle` says.
            backend: what runs the graphs, as `mdnet_engines.backends` says; `auto` takes what is installed.
            threads: threads per graph; 0 takes all the cores this process may use.
            batch_size: how many images go through the graphs at once, unless `score` or `stream` says otherwise.

        Raises:
            UsageError: no bundle is named or found, or an argument is out of range.
            BundleError: the bundle can't be trusted, or its graphs don't fit together.
            MDNetError: the backend is missing or can't load a graph.
        """
        return cls(Bundle.open(find_bundle(bundle)), backend=backend, threads=threads, batch_size=batch_size)

    def score(self, items: Iterable[Item] | Item, *, batch_size: int | None = None) -> list[Result]:
        """Score images (or one); as `stream`, in a list."""
        return list(self.stream(items, batch_size=batch_size))

    def stream(self, items: Iterable[Item] | Item, *, batch_size: int | None = None) -> Iterator[Result]:
        """Score images as they are taken from `items`, giving one `Result` for each, in their order.

        Two batches are decoded ahead while the graphs run, so memory does not grow with the number of images. An image
        that can't be used becomes a `Result` with its reason. `Result.path` is the path, a PIL image's own file
        name, or `item N` (from 0).

        Raises:
            MDNetError: the graphs could not be run; this concerns no single image.
        """
        size = self.batch_size if batch_size is None else _at_least(1, "batch_size", batch_size)
        with closing(self._decoded(_several(items), size)) as batches:
            for batch in batches:
                yield from self._results(batch)

    def score_batch(self, images: np.ndarray) -> np.ndarray:
        """Run the graphs once on preprocessed images.

        Args:
            images: uint8 `[n, S, S, 3]` RGB, as `preprocess` gives them.

        Returns:
            float32 `[n]`, on the rating scale.

        Raises:
            UsageError: another type or shape.
            MDNetError: the graphs could not be run, or this scorer is closed.
        """
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
        """Free the graphs. A scorer that is closed stays closed; closing it again does nothing."""
        self._graphs.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _decoded(
        self, items: Iterable[Item], size: int
    ) -> Generator[list[tuple[str, np.ndarray | ImageError]], None, None]:
        """Batches of (name, image or what is wrong with it), decoded ahead of the one being scored."""
        pool = ThreadPoolExecutor(min(_MAX_DECODERS, available_cores()), thread_name_prefix="mdnet-decode")
        source = enumerate(items)
        batches: deque[list[tuple[str, Future[np.ndarray | ImageError]]]] = deque()
        try:
            while True:
                while len(batches) <= _BATCHES_AHEAD:
                    batch = [(_name(item, i), self._submit(pool, item)) for i, item in islice(source, size)]
                    if not batch:
                        break
                    batches.append(batch)
                if not batches:
                    return
                yield [(name, future.result()) for name, future in batches.popleft()]
        finally:
            pool.shutdown(cancel_futures=True)  # also when the caller stops early or the graphs fail

    def _submit(self, pool: ThreadPoolExecutor, item: Item) -> Future[np.ndarray | ImageError]:
        if isinstance(item, (str, os.PathLike, bytes)):
            return pool.submit(_decode, item, self.image_size)
        # What is in memory is the caller's, who may go on to change it (a video reader's one frame buffer), and PIL
        # images load lazily and not thread-safely: done at once, here.
        done: Future[np.ndarray | ImageError] = Future()
        done.set_result(_decode(item, self.image_size))
        return done

    def _results(self, batch: list[tuple[str, np.ndarray | ImageError]]) -> list[Result]:
        images = [image for _, image in batch if isinstance(image, np.ndarray)]
        scores = iter(self.score_batch(np.stack(images)) if images else [])
        return [
            _result(name, float(next(scores))) if isinstance(image, np.ndarray) else Result(name, None, str(image))
            for name, image in batch
        ]


def _result(name: str, score: float) -> Result:
    return Result(name, score) if np.isfinite(score) else Result(name, None, f"score is not finite ({score})")


def _decode(item: Item, size: int) -> np.ndarray | ImageError:
    try:
        if isinstance(item, (str, os.PathLike, bytes)):
            return load_image(item, size)
        return preprocess(item, size)
    except ImageError as error:
        return error


def _name(item: Item, index: int) -> str:
    if isinstance(item, (str, os.PathLike)):
        return os.fspath(item)
    return str(getattr(item, "filename", "") or f"item {index}")


def _several(items: Iterable[Item] | Item) -> Iterable[Item]:
    # A path and one array are iterable too, but not as images; four axes are a stack, which iterates as one.
    one = (
        items.ndim == 3 if isinstance(items, np.ndarray) else isinstance(items, (str, os.PathLike, bytes, Image.Image))
    )
    return cast("Iterable[Item]", [items] if one else items)


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
