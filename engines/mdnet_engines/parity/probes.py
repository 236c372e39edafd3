"""The probes of a bundle: drawn faces, preprocessed, and PyTorch fp32's outputs for them, in one `probes.npz`.

    pixels            uint8 (n, S, S, 3)
    score             float32 (n,)
    output.<name>     float32 (k, …)    every output of encoder and Vim, for the first k images

They let any machine prove the bundle's graphs without torch, a checkpoint or a picture of anybody.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mdnet_engines.bundle.files import Bundle
from mdnet_engines.bundle.manifest import GraphBackend, GraphName, Manifest
from mdnet_engines.errors import BundleError, first_line
from mdnet_engines.parity.measure import Images, Outputs

PROBES_NAME = "probes.npz"
PROBES = 24
OUTPUTS_KEPT = 2
"""Images whose graph outputs are kept: 1.4 MB each at full size."""
_PREFIX = "output."
_FLOAT32_ON_CPU: frozenset[GraphBackend] = frozenset({"onnxruntime-cpu", "openvino"})
_BF16_SNR = 46.0  # dB: products of 8 bits of mantissa, summed in float32
_MAX_BYTES = 2**30  # unpacked


@dataclass(frozen=True)
class Probes:
    """Images, and what they are to give: `score` (n,) and every other graph output (k, …), float32."""

    images: Images
    reference: Outputs

    def first(self, count: int) -> Probes:
        """The first `count` images, or all where there are fewer."""
        images = self.images
        chosen = Images(images.names[:count], images.pixels[:count], images.source)
        return Probes(chosen, {name: values[:count] for name, values in self.reference.items()})


def write_probes(file: Path, pixels: np.ndarray, reference: Outputs, *, outputs: int = OUTPUTS_KEPT) -> None:
    """Write images (n, S, S, 3) and their reference; of every graph output those of the first `outputs` images."""
    kept = {f"{_PREFIX}{name}": values[:outputs] for name, values in reference.items() if name != "score"}
    np.savez_compressed(file, pixels=pixels, score=reference["score"], **kept)  # type: ignore[arg-type]


def read_probes(bundle: Bundle) -> Probes:
    """The probes of a bundle whose files have been checked.

    Raises:
        BundleError: it has no probes, or they don't fit its graphs.
    """
    if bundle.manifest.probes is None:
        raise BundleError(
            f"{bundle.path} has no probes (schema version {bundle.manifest.schema_version}); "
            "build it again with: mdnet-export build"
        )
    return load_probes(bundle.path / bundle.manifest.probes.name, bundle.manifest)


def load_probes(file: Path, manifest: Manifest) -> Probes:
    """Probes of a file, for a bundle with this manifest.

    Raises:
        BundleError: the file is damaged, or its images or outputs are not of the graphs' shapes.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if sum(member.file_size for member in archive.infolist()) > _MAX_BYTES:
                raise BundleError(f"{file} unpacks to more than {_MAX_BYTES} bytes; this is not a file of probes")
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, RuntimeError) as error:
        # RuntimeError is zipfile's: a member is encrypted, or compressed in a way that it doesn't know.
        raise BundleError(f"{file} can't be read as probes: {first_line(error)}") from None
    pixels, score = arrays.pop("pixels", None), arrays.pop("score", None)
    size = manifest.preprocessing.image_size
    _check(file, "pixels", pixels, np.uint8, [size, size, 3])
    assert pixels is not None
    _check(file, "score", score, np.float32, [], length=len(pixels))
    assert score is not None
    reference = {"score": score}
    for spec in [*manifest.graphs["encoder"].outputs, *manifest.graphs["vim"].outputs]:
        values = arrays.pop(f"{_PREFIX}{spec.name}", None)
        _check(file, spec.name, values, np.float32, spec.shape[1:])
        assert values is not None
        reference[spec.name] = values
    if arrays:
        raise BundleError(f"{file} holds {', '.join(sorted(arrays))[:200]}, which is no output of the bundle's graphs")
    names = [f"probe {i}" for i in range(len(pixels))]
    return Probes(Images(names, pixels, f"{len(pixels)} probes"), reference)


def expected_snr(manifest: Manifest, choice: Mapping[GraphName, GraphBackend]) -> dict[str, float]:
    """The least signal-to-noise ratio of each graph output on the probes, dB, that a choice of backends must come near.

    It is that of the same backends where the bundle was built; ONNX Runtime and OpenVINO in float32 stand for one
    another. In an int8 bundle ONNX Runtime may multiply in bfloat16 what is float, where the CPU has that.
    """
    most = _BF16_SNR if manifest.precision == "int8" else math.inf
    expected: dict[str, float] = {}
    for graph, backend in choice.items():
        alike = _FLOAT32_ON_CPU if backend in _FLOAT32_ON_CPU else {backend}
        built = [row for row in manifest.backends if row.parity.passed and row.graphs[graph] in alike]
        for spec in manifest.graphs[graph].outputs:
            if known := [row.snr_db[spec.name] for row in built if spec.name in row.snr_db]:
                expected[spec.name] = min(*known, most)
    return expected


def _check(
    file: Path, name: str, values: np.ndarray | None, dtype: type, shape: list[int | str], *, length: int | None = None
) -> None:
    """Raise `BundleError` unless `values` are of this type and, but for the first axis, shape; a name fits any size."""
    if values is None:
        raise BundleError(f"{file} lacks {name}; the probes are not this bundle's")
    fits = len(values.shape) == len(shape) + 1 and all(
        not isinstance(size, int) or size == given for size, given in zip(shape, values.shape[1:], strict=True)
    )
    if values.dtype != dtype or not fits or not len(values) or length not in (None, len(values)):
        raise BundleError(f"{file}: {name} is {values.dtype} {list(values.shape)}; the probes are not this bundle's")
    if not np.isfinite(values).all():
        raise BundleError(f"{file}: {name} is not finite; build the bundle again with: mdnet-export build")
