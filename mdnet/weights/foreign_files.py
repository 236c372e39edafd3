"""Other projects' weight files, read without running anything in them: safetensors, and pickles with an allow-list.

Tensors are read one by one, when asked for: what MD-Net leaves out (decoders, optimiser state) never takes memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mdnet.model.checkpoint import few, misfits
from mdnet_engines.errors import MDNetError, first_line, printable

Shape = tuple[int, ...]


class Stored(NamedTuple):
    """A tensor that still lies in its file."""

    shape: Shape
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Weights:
    """Named tensors of one or more files; `extras` is everything else in a pickle."""

    source: Path
    tensors: dict[str, Stored]
    files: tuple[Path, ...]
    extras: dict[str, Any] = field(default_factory=dict)
    state_key: str = ""
    """Where in a pickle the tensors were; empty where they were all of it."""


class _Inert:
    """Stands in for a class that checkpoints mention and nobody needs: takes every argument and does nothing."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


# hustvl's checkpoints keep their command line, CompVis' what PyTorch Lightning and NumPy noted with the weights.
ALLOWED: list[Any] = [
    argparse.Namespace,
    (_Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (_Inert, "numpy.core.multiarray.scalar"),
    (_Inert, "numpy._core.multiarray.scalar"),  # NumPy 2's name for it
    (_Inert, "numpy.dtype"),
    (_Inert, "_codecs.encode"),
    *((_Inert, f"{module}.{kind}Path") for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
    *(
        (_Inert, f"{module}.Pure{kind}Path")
        for module in ("pathlib", "pathlib._local")
        for kind in ("Posix", "Windows")
    ),
]
STATE_KEYS = ("state_dict", "model", "state_dict_ema", "model_ema")
"""Where a pickle may have its state dict; averaged weights are taken where there are no others."""
WRAPPERS = ("module.", "_orig_mod.", "model.")
"""What DistributedDataParallel, `torch.compile` and PyTorch Lightning put before every name."""


def open_weights(file: Path) -> Weights:
    """Open a safetensors file or what `torch.save` wrote: a state dict, alone or under one of `STATE_KEYS`.

    Raises:
        MDNetError: neither, cut short, a Git LFS pointer, or a pickle that wants more than tensors and `ALLOWED`.
    """
    if not file.is_file():
        raise MDNetError(
            f"{file}: {'this is a folder' if file.is_dir() else 'no such file'}; expected a file of weights"
        )
    with file.open("rb") as stream:
        head = stream.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise MDNetError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` where it was cloned")
    # Eight bytes of length, then JSON: some files called .ckpt are safetensors.
    if head[8:9] == b"{" or file.suffix == ".safetensors":
        return Weights(file, _open_safetensors(file), (file,))
    content = load_pickle(file)
    if isinstance(content, Tensor):
        content = {"": content}
    key, state = next(_states(content), ("", {}))
    if not state:
        raise MDNetError(
            f"{file} holds no state dict; expected named tensors, alone or under one of {', '.join(STATE_KEYS)}"
        )
    extras = {name: value for name, value in content.items() if name != key} if key else {}
    return Weights(file, {name: _in_memory(tensor) for name, tensor in state.items()}, (file,), extras, key)


def _states(content: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The state dicts in a pickle, each with the key that it is under."""
    if not isinstance(content, Mapping):
        return
    for key, state in [*((key, content.get(key)) for key in STATE_KEYS), ("", content)]:
        if isinstance(state, Mapping):
            tensors = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
            if tensors:
                yield key, tensors


def unwrap(weights: Weights, telling: str) -> tuple[Weights, str]:
    """Remove what wrappers put before the names, and what they hold besides the model.

    Args:
        telling: the name of a tensor that the model has; without it, wrapped or not, nothing changes.

    Returns:
        The weights, and in one line what was found; empty where there is nothing to say.
    """
    prefix = next((name.removesuffix(telling) for name in weights.tensors if _is_wrapped(name, telling)), "")
    tensors = {name.removeprefix(prefix): each for name, each in weights.tensors.items() if name.startswith(prefix)}
    told = [f"`{weights.state_key}`"] if weights.state_key not in ("", *STATE_KEYS[:2]) else []
    told += [f"names without `{prefix}`"] if prefix else []
    if left_out := len(weights.tensors) - len(tensors):
        told.append(f"{left_out} other tensors left out")
    return dataclasses.replace(weights, tensors=tensors), f"{weights.source.name}: {', '.join(told)}" if told else ""


def _is_wrapped(name: str, telling: str) -> bool:
    prefix = name.removesuffix(telling)
    while wrapper := next((each for each in WRAPPERS if prefix.startswith(each)), ""):
        prefix = prefix.removeprefix(wrapper)
    return name.endswith(telling) and not prefix


def load_pickle(file: Path) -> Any:
    """`torch.load` with `weights_only` and `ALLOWED`; tensors of a zip file stay on the disk until they are used."""
    with torch.serialization.safe_globals(ALLOWED):
        try:
            try:
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                return torch.load(file, map_location="cpu", weights_only=True)  # the format before PyTorch 1.6
        except OSError:
            raise
        except Exception as error:  # an unpickler meets damage in many ways
            if names := _refused(error):
                raise MDNetError(
                    f"{file} is a pickle that wants to run {names}; refused: only tensors and plain values are read"
                ) from None
            # PyTorch's own words would advise to load it unsafely.
            reason = "" if "weights_only" in str(error) else f" ({first_line(error)})"
            raise MDNetError(f"{file} is not a file of weights, or was cut short{reason}") from None


def open_folder(folder: Path, stem: str, bin_stem: str) -> Weights:
    """Weights as diffusers and transformers save them: safetensors before .bin, float32 before fp16, or shards.

    Raises:
        MDNetError: there are none, or a shard that the index names is missing; the message lists the files found.
    """
    names = []
    for base, suffix in ((stem, "safetensors"), (bin_stem, "bin")):
        names += [f"{base}.{suffix}", f"{base}.{suffix}.index.json"]
        names += [f"{base}.fp16.{suffix}", f"{base}.{suffix}.index.fp16.json", f"{base}.fp16.{suffix}.index.json"]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise MDNetError(
            f"{folder} holds {listing(folder)}; expected {stem}.safetensors, .fp16.safetensors or {bin_stem}.bin"
        )
    if found.suffix != ".json":
        return open_weights(found)
    shards = read_json(found).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise MDNetError(f"{found} has no weight_map from keys to files; was it cut short?")
    opened = {}
    for name in sorted(set(shards.values())):
        if Path(name).name != name:
            raise MDNetError(f"{found} names the shard {printable(name)!r}, which is not in its own folder")
        if not (folder / name).is_file():
            raise MDNetError(f"{folder} lacks the shard {printable(name)}, which {found.name} names")
        opened[name] = open_weights(folder / name)
    tensors = {key: opened[name].tensors[key] for key, name in shards.items() if key in opened[name].tensors}
    return Weights(folder, tensors, tuple(part.files[0] for part in opened.values()))


def take(weights: Weights, expected: Mapping[str, Shape], what: str) -> dict[str, Tensor]:
    """Read exactly the tensors `expected`, as float32.

    Raises:
        MDNetError: names are missing, unexpected or of another shape than `what` has, or a value is not finite.
    """
    shapes = {name: stored.shape for name, stored in weights.tensors.items()}
    if problems := misfits(expected, shapes):
        raise MDNetError(f"{weights.source} does not fit {what}: {problems}")
    taken = {}
    for name in expected:
        tensor = weights.tensors[name].read().to(torch.float32).contiguous()
        if not torch.isfinite(tensor).all():
            raise MDNetError(f"{weights.source}: {name} holds NaN or infinity; is it a damaged or overflowed file?")
        taken[name] = tensor
    return taken


def listing(folder: Path) -> str:
    """What lies in `folder`, for a message."""
    return few(sorted(printable(entry.name) + "/" * entry.is_dir() for entry in folder.iterdir())) or "nothing"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        MDNetError: the file is missing or holds something else.
    """
    if not file.is_file():
        raise MDNetError(f"{file.parent} has no {file.name}; it holds {listing(file.parent)}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MDNetError(f"{file} is not JSON ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise MDNetError(f"{file} does not hold a JSON object")
    return content


def _open_safetensors(file: Path) -> dict[str, Stored]:
    try:
        stored = safe_open(str(file), framework="pt")
        shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise MDNetError(f"{file} is not a complete safetensors file ({first_line(error)})") from None
    return {name: Stored(shape, functools.partial(stored.get_tensor, name)) for name, shape in shapes.items()}


def _in_memory(tensor: Tensor) -> Stored:
    return Stored(tuple(tensor.shape), lambda: tensor)


def _refused(error: Exception) -> str:
    """What a refused pickle asked for: `os.system` of "Unsupported global: GLOBAL os.system was not …"."""
    _, found, rest = str(error).partition("GLOBAL ")
    return printable(rest.split()[0]) if found and rest.split() else ""
