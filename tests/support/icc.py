"""ICC profiles (version 2) written from the specification, and the colours that they stand for, in float64."""

from __future__ import annotations

import struct

import numpy as np

_D50 = np.array([0.9642, 1.0, 0.8249])
_D65 = np.array([0.9505, 1.0, 1.0891])
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])

# Red, green and blue as CIE xy, white, and the exponent of the transfer curve.
SPACES = {
    "Display P3": ([(0.680, 0.320), (0.265, 0.690), (0.150, 0.060)], _D65, 2.2),
    "Adobe RGB": ([(0.640, 0.330), (0.210, 0.710), (0.150, 0.060)], _D65, 563 / 256),
    "ProPhoto": ([(0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001)], _D50, 1.8),
}
_SRGB = [(0.640, 0.330), (0.300, 0.600), (0.150, 0.060)]


def rgb_profile(space: str) -> bytes:
    """A profile of three primaries and one exponent."""
    primaries, white, exponent = SPACES[space]
    columns = _to_d50(primaries, white).T
    tags = {f"{name}XYZ": _xyz(column) for name, column in zip("rgb", columns, strict=True)}
    return _profile("RGB ", "XYZ ", {**tags, **{f"{name}TRC": _curve(exponent) for name in "rgb"}, "wtpt": _xyz(_D50)})


def grey_profile(exponent: float) -> bytes:
    """A profile of one curve."""
    return _profile("GRAY", "XYZ ", {"kTRC": _curve(exponent), "wtpt": _xyz(_D50)})


def cmyk_profile(inks: np.ndarray) -> bytes:
    """A profile of a table. `inks`: `[2, 2, 2, 2, 3]`, the sRGB colours of no and full ink of C, M, Y and K."""
    lab = _lab(_to_d50(_SRGB, _D65) @ _linear(inks.reshape(-1, 3).T / 255)).T
    table = np.round(np.stack([lab[:, 0] * 2.55, lab[:, 1] + 128, lab[:, 2] + 128], axis=1)).astype(np.uint8)
    ramp = bytes(range(256))
    identity = struct.pack(">9i", *(np.eye(3).reshape(-1) * 65536).astype(int))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + ramp * 4 + table.tobytes() + ramp * 3
    return _profile("CMYK", "Lab ", {"A2B0": lut, "wtpt": _xyz(_D50)})


def from_srgb(pixels: np.ndarray, space: str) -> np.ndarray:
    """The pixels, uint8 `[H, W, 3]`, that show in `space` the colours that `pixels` show in sRGB, where it has them."""
    primaries, white, exponent = SPACES[space]
    matrix = np.linalg.inv(_to_d50(primaries, white)) @ _to_d50(_SRGB, _D65)
    linear = np.einsum("ij,hwj->hwi", matrix, _linear(pixels / 255))
    return np.round(255 * np.clip(linear, 0, 1) ** (1 / exponent)).astype(np.uint8)


def grey_from_srgb(pixels: np.ndarray, exponent: float) -> np.ndarray:
    """Likewise for grey, uint8 `[H, W]`."""
    return np.round(255 * _linear(pixels / 255) ** (1 / exponent)).astype(np.uint8)


def _linear(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _to_d50(primaries: list[tuple[float, float]], white: np.ndarray) -> np.ndarray:
    """Linear RGB → XYZ under D50, 3×3 (Lindbloom's derivation, Bradford's adaptation)."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    matrix = columns * np.linalg.solve(columns, white)
    scale = np.diag((_BRADFORD @ _D50) / (_BRADFORD @ white))
    return np.linalg.inv(_BRADFORD) @ scale @ _BRADFORD @ matrix


def _lab(xyz: np.ndarray) -> np.ndarray:
    ratio = xyz / _D50[:, None]
    f = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *np.round(np.asarray(values) * 65536).astype(int))


def _curve(exponent: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(exponent * 256)) + bytes(2)


def _profile(space: str, connection: str, tags: dict[str, bytes]) -> bytes:
    at = 128 + 4 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for name, body in tags.items():
        table += struct.pack(">4sII", name.encode(), at + len(data), len(body))
        data += body + bytes(-len(body) % 4)
    kind = "scnr" if space == "CMYK" else "mntr"
    header = struct.pack(
        ">I4sI4s4s4s", at + len(data), bytes(4), 0x02400000, kind.encode(), space.encode(), connection.encode()
    )
    header += struct.pack(">6H4s", 2024, 1, 1, 0, 0, 0, b"acsp") + bytes(28)
    header += struct.pack(">3i", *np.round(_D50 * 65536).astype(int))
    return header.ljust(128, b"\0") + table + data
