"""Faces drawn from known factors: the pictures that the demo model learns from, since no real data can be shipped.

A face is one frozen `FaceFactors`, and its picture is a pure function of it. Three of its numbers cause the rating that
`mdnet.data.drawn_set` gives it; a good model ignores everything else. No picture shows a person.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]
Points = np.ndarray  # (N, 2) in face units: origin between ear and ear, y down, crown at y = -1, chin at y = +1

# 8:8:3:3 in every 22 faces, which is 2000:2000:750:750 in 5500; spread out, so that a short set has the shares too.
GROUP_CYCLE = (("AF", "AM", "CF", "AF", "AM", "CM", "AF", "AM") * 3)[:22]

# What symmetry 0 and proportions 0 do, in face units (sizes and angle: relative, radians), at direction ±1.
_LOPSIDED = {
    "eye_drop": 0.11, "eye_size": 0.30, "brow_drop": 0.07, "nose_shift": 0.08,
    "mouth_shift": 0.10, "mouth_tilt": 0.24, "chin_shift": 0.09,
}  # fmt: skip
_OFF_CANON = {"eye_gap": 0.09, "eye_height": 0.10, "nose_length": 0.10, "mouth_height": 0.09, "mouth_width": 0.38}

_SUPERSAMPLE = 3
_MOST_SPOTS = 80
_FACE_WIDTH = 0.76  # half of it, for a half height of 1
_SKIN_RAMP = np.array([(250, 224, 206), (238, 200, 172), (214, 166, 130), (168, 118, 86), (122, 82, 60)], float)
_HAIR_COLOURS = {
    "A": ((28, 24, 26), (44, 32, 28), (66, 44, 32), (92, 60, 40), (120, 118, 120)),
    "C": ((48, 34, 28), (96, 62, 38), (150, 104, 58), (206, 170, 108), (140, 66, 36), (150, 148, 148)),
}
_EYE_COLOURS = ((74, 46, 30), (98, 66, 38), (52, 36, 28), (86, 108, 74), (84, 118, 148), (110, 116, 120))


@dataclass(frozen=True)
class FaceFactors:
    """One face: three causes of its rating, then the nuisance that changes the picture and never the rating.

    `lopsided` and `off_canon` say only in which direction (root mean square 1) a face deviates; how far is what
    `symmetry` and `proportions` say. Colours are RGB in 0–255, lengths are in half face heights, `shift` is in
    picture sides.
    """

    symmetry: float  # 1: both halves mirror each other
    proportions: float  # 1: eyes, nose and mouth sit on the canon
    texture: float  # 1: smooth skin; 0: blotched and full of blemishes

    lopsided: tuple[float, ...]
    off_canon: tuple[float, ...]
    group: str  # AF, AM, CF or CM: palette and hair only
    skin: Colour
    hair: Colour
    eyes: Colour
    lips: Colour
    cloth: Colour
    background: tuple[Colour, Colour]
    hair_length: float
    hair_volume: float
    hairline: float
    parting: float
    brow_width: float
    eye_opening: float
    jaw: float
    light: tuple[float, float]  # relative brightness gained from left to right, and from top to bottom
    grain: float  # standard deviation of the camera's noise
    roll: float  # degrees
    shift: tuple[float, float]
    scale: float
    seed: int  # where blemishes, strands and background spots fall


def draw_factors(rng: np.random.Generator, group: str | None = None) -> FaceFactors:
    """Draw a face's factors: causes uniform in 0–1 and independent of each other and of all the nuisance."""
    group = group or GROUP_CYCLE[rng.integers(len(GROUP_CYCLE))]
    palette, feminine = group[0], group[1] == "F"
    symmetry, proportions, texture = rng.uniform(size=3)
    skin = _ramp(_SKIN_RAMP, rng.beta(1.6, 2.2)) + rng.normal(0, 4, 3)
    hair_colours = _HAIR_COLOURS[palette]
    background = rng.uniform(80, 220) + rng.normal(0, 22, 3)
    lip_red = rng.uniform(0.25, 0.6) if feminine else rng.uniform(0.15, 0.35)
    return FaceFactors(
        symmetry=float(symmetry),
        proportions=float(proportions),
        texture=float(texture),
        lopsided=_direction(rng, len(_LOPSIDED)),
        off_canon=_direction(rng, len(_OFF_CANON)),
        group=group,
        skin=_colour(skin),
        hair=_colour(np.array(hair_colours[rng.integers(len(hair_colours))]) + rng.normal(0, 5, 3)),
        eyes=_EYE_COLOURS[rng.integers(3 if palette == "A" else len(_EYE_COLOURS))],
        lips=_mix(_colour(skin * 0.86), (176, 52, 62), lip_red),
        cloth=_colour(rng.uniform(50, 200) + rng.normal(0, 35, 3)),
        background=(_colour(background), _colour(background * rng.uniform(0.6, 1.0) + rng.normal(0, 12, 3))),
        hair_length=float(rng.uniform(0.35, 1.5) if feminine else rng.uniform(-0.35, 0.15)),
        hair_volume=float(rng.uniform(1.1, 1.24) if feminine else rng.uniform(1.05, 1.18)),
        hairline=float(rng.uniform(-0.78, -0.62)),
        parting=float(rng.uniform(-0.6, 0.6)),
        brow_width=float(rng.uniform(0.045, 0.06) if feminine else rng.uniform(0.055, 0.08)),
        eye_opening=float(rng.uniform(0.066, 0.088)),
        jaw=float(rng.uniform(0.10, 0.24)),
        light=(float(rng.uniform(-0.16, 0.16)), float(rng.uniform(-0.14, 0.06))),
        grain=float(rng.uniform(0.5, 4.0)),
        roll=float(rng.uniform(-6, 6)),
        shift=(float(rng.uniform(-0.025, 0.025)), float(rng.uniform(-0.02, 0.02))),
        scale=float(rng.uniform(0.95, 1.05)),
        seed=int(rng.integers(2**32)),
    )


def draw_face(rng: np.random.Generator, size: int = 350, group: str | None = None) -> tuple[Image.Image, FaceFactors]:
    """Draw one face of `group`, or of a group drawn by its share: an RGB picture of `size` × `size`, and its causes."""
    factors = draw_factors(rng, group)
    return render_face(factors, size), factors


def render_face(factors: FaceFactors, size: int = 350) -> Image.Image:
    """Draw `factors` as an RGB picture of `size` × `size`: the same factors always give the same pixels."""
    rng = np.random.default_rng(factors.seed)
    canvas = _Canvas(factors, size)
    geometry = _place(factors)
    _draw_surroundings(canvas, factors, rng)
    _draw_head(canvas, factors, geometry)
    for side in (-1, 1):
        _draw_eye(canvas, factors, geometry, side)
    _draw_nose(canvas, factors, geometry)
    _draw_mouth(canvas, factors, geometry)
    _draw_fringe(canvas, factors, rng)
    image, skin = canvas.finish()
    return _light_and_skin(image, skin, factors, geometry, rng)


class _Geometry(NamedTuple):
    """Where the features are, in face units. Pairs are (left, right) as seen in the picture."""

    eye_x: tuple[float, float]
    eye_y: tuple[float, float]
    eye_scale: tuple[float, float]
    brow_y: tuple[float, float]
    nose: tuple[float, float]  # the tip
    mouth: tuple[float, float]
    mouth_width: float
    mouth_tilt: float
    chin_x: float


def _place(factors: FaceFactors) -> _Geometry:
    skew = {k: (1 - factors.symmetry) * a * d for (k, a), d in zip(_LOPSIDED.items(), factors.lopsided, strict=True)}
    off = {
        k: (1 - factors.proportions) * a * d for (k, a), d in zip(_OFF_CANON.items(), factors.off_canon, strict=True)
    }
    eye_x, eye_y = 0.35 + off["eye_gap"], -0.08 + off["eye_height"]
    drop, brow = skew["eye_drop"] / 2, eye_y - 0.23
    return _Geometry(
        eye_x=(-eye_x, eye_x),
        eye_y=(eye_y - drop, eye_y + drop),
        eye_scale=(1 - skew["eye_size"] / 2, 1 + skew["eye_size"] / 2),
        brow_y=(brow - drop - skew["brow_drop"], brow + drop + skew["brow_drop"]),
        nose=(skew["nose_shift"], 0.27 + off["nose_length"]),
        mouth=(skew["mouth_shift"], 0.58 + off["mouth_height"]),
        mouth_width=0.26 * (1 + off["mouth_width"]),
        mouth_tilt=skew["mouth_tilt"],
        chin_x=skew["chin_shift"],
    )


class _Canvas:
    """Polygons in face units on a supersampled picture, with a mask of visible facial skin."""

    def __init__(self, factors: FaceFactors, size: int) -> None:
        side = size * _SUPERSAMPLE
        top, bottom = factors.background
        backdrop = np.rint(np.linspace(top, bottom, side)).astype(np.uint8)[:, None]  # (side, 1, 3)
        self.image = Image.fromarray(backdrop).resize((side, side), Image.Resampling.NEAREST)
        self.skin = Image.new("L", (side, side), 0)
        self._draw, self._draw_skin = ImageDraw.Draw(self.image), ImageDraw.Draw(self.skin)
        self._axes, self._origin = _to_picture(factors, side)

    def fill(self, points: Points, colour: Colour, skin: bool = False) -> None:
        """Fill a polygon; `skin` says whether it's skin that light, blush and blemishes should work on."""
        corners = (points @ self._axes + self._origin).ravel().tolist()
        self._draw.polygon(corners, fill=colour)
        self._draw_skin.polygon(corners, fill=255 if skin else 0)

    def tint(self, points: Points, colour: Colour) -> None:
        """Fill a polygon and leave it what it was: skin or not."""
        self._draw.polygon((points @ self._axes + self._origin).ravel().tolist(), fill=colour)

    def finish(self) -> tuple[Image.Image, np.ndarray]:
        """The anti-aliased picture and its skin mask (size, size) in 0–1."""
        mask = np.asarray(self.skin.reduce(_SUPERSAMPLE), np.float32) / 255
        return self.image.reduce(_SUPERSAMPLE), mask


def _to_picture(factors: FaceFactors, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Matrix (2, 2) and origin (2,) that take row vectors in face units to pixels of a picture of `side`."""
    angle, scale = np.deg2rad(factors.roll), 0.35 * side * factors.scale
    axes = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return axes, side * (np.array([0.5, 0.485]) + factors.shift)


def _draw_surroundings(canvas: _Canvas, factors: FaceFactors, rng: np.random.Generator) -> None:
    top, bottom = factors.background
    for _ in range(rng.integers(0, 14)):
        spot = _ellipse(rng.uniform(-1.7, 1.7, 2), rng.uniform(0.05, 0.3) * np.ones(2))
        canvas.fill(spot, _mix(top, bottom, rng.uniform(-0.6, 1.6)))
    if factors.hair_length > 0.2:
        _draw_long_hair(canvas, factors, rng)
    shade = _dim(factors.skin, 0.9)
    canvas.fill(np.array([(-0.36, 0.5), (0.36, 0.5), (0.45, 1.25), (0.75, 1.6), (-0.75, 1.6), (-0.45, 1.25)]), shade)
    canvas.fill(_ellipse((0, 0.82), (0.355, 0.42))[:31], _dim(factors.skin, 0.74))
    shoulders = [(-2, 2.6), (-1.5, 1.62), (-0.95, 1.42), (-0.42, 1.22), (-0.2, 1.46), (0, 1.52)]
    canvas.fill(_smooth(_mirrored(shoulders)), factors.cloth)
    collar = _smooth(np.array([(-0.42, 1.22), (-0.2, 1.46), (0, 1.52), (0.2, 1.46), (0.42, 1.22)]))
    canvas.fill(_ribbon(collar, np.full(len(collar), 0.05)), _dim(factors.cloth, 0.8))


def _draw_long_hair(canvas: _Canvas, factors: FaceFactors, rng: np.random.Generator) -> None:
    volume, end = factors.hair_volume, factors.hair_length
    half = [(0, -volume), (-0.5, -volume * 0.92), (-0.86 * volume, -0.4), (-0.9 * volume, end * 0.5), (-0.82, end)]
    canvas.fill(_smooth(_mirrored([*half, (-0.3, end + 0.1)])), _dim(factors.hair, 0.85))
    for x in np.linspace(0.5, 0.78 * volume, 9):
        for side in (-1, 1):
            wave = rng.uniform(-0.03, 0.03)
            path = _smooth(np.array([(side * x, -0.5), (side * x + wave, end * 0.3), (side * x * 0.97, end)]))
            canvas.fill(_ribbon(path, 0.035 * _taper(len(path))), _dim(factors.hair, rng.uniform(0.65, 1.25)))


def _draw_head(canvas: _Canvas, factors: FaceFactors, geometry: _Geometry) -> None:
    canvas.fill(_scalp(factors), _dim(factors.hair, 0.85))
    for side in (-1, 1):
        canvas.fill(_ellipse((side * 0.77, 0.05), (0.1, 0.2)), _dim(factors.skin, 0.9))
        canvas.fill(_ellipse((side * 0.785, 0.05), (0.055, 0.13)), _dim(factors.skin, 0.76))
    canvas.fill(_outline(factors, geometry), factors.skin, skin=True)


def _outline(factors: FaceFactors, geometry: _Geometry) -> Points:
    angle = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    y = -np.cos(angle)
    lower = np.clip(y, 0, 1)
    x = _FACE_WIDTH * np.sign(np.sin(angle)) * np.abs(np.sin(angle)) ** 0.85
    return np.stack([x * (1 - factors.jaw * lower**1.5) + geometry.chin_x * lower**2, y], axis=1)


def _draw_eye(canvas: _Canvas, factors: FaceFactors, geometry: _Geometry, side: int) -> None:
    """Eye and brow: white, iris cut off by the lids, pupil, glint, lashes, crease."""
    which = 0 if side < 0 else 1
    scale = geometry.eye_scale[which]
    centre = np.array([geometry.eye_x[which], geometry.eye_y[which]])
    half, upper, lower = 0.165 * scale, factors.eye_opening * 1.15 * scale, factors.eye_opening * 0.75 * scale

    def lid(x: np.ndarray, height: float) -> np.ndarray:
        # The outer corner sits a little higher than the inner one.
        return height * (1 - (x / half) ** 2) ** 0.8 - 0.1 * x * side

    x = np.linspace(-half, half, 25)
    top, low = np.stack([x, lid(x, -upper)], 1) + centre, np.stack([x, lid(x, lower)], 1) + centre
    canvas.fill(np.concatenate([top, low[::-1]]), (246, 243, 240))

    def disc(radius: float, colour: Colour, at: tuple[float, float] = (0, -0.012)) -> None:
        ring = _ellipse(np.multiply(at, scale), (radius * scale, radius * scale))
        ring[:, 1] = np.clip(ring[:, 1], lid(ring[:, 0], -upper), lid(ring[:, 0], lower))
        canvas.fill(ring + centre, colour)

    disc(0.086, _dim(factors.eyes, 0.6))
    disc(0.074, factors.eyes)
    disc(0.038, (16, 14, 14))
    disc(0.018, (250, 250, 250), at=(0.03, -0.045))
    lashes = 0.03 if factors.group[1] == "F" else 0.02
    canvas.fill(_ribbon(top, lashes * _taper(25, 0.35)), (34, 26, 26))
    canvas.fill(_ribbon(low, 0.010 * _taper(25)), _dim(factors.skin, 0.62))
    canvas.tint(_ribbon(top - (0, 0.045 * scale), 0.012 * _taper(25)), _dim(factors.skin, 0.72))

    across = np.linspace(-0.19, 0.21, 15) * side  # from the nose outwards
    arch = -0.075 * np.sin(np.linspace(0.15, 0.95, 15) * np.pi) + 0.03
    brow = np.stack([across + centre[0], arch + geometry.brow_y[which]], axis=1)
    canvas.fill(
        _ribbon(brow, factors.brow_width * np.linspace(1.1, 0.25, 15)),
        _dim(_mix(factors.hair, factors.skin, 0.15), 0.85),
    )


def _draw_nose(canvas: _Canvas, factors: FaceFactors, geometry: _Geometry) -> None:
    tip = np.array(geometry.nose)
    for side in (-1, 1):
        wing = np.array([(0.085, -0.10), (0.125, -0.03), (0.105, 0.025), (0.06, 0.02)]) * (side, 1) + tip
        path = _smooth(wing)
        canvas.tint(_ribbon(path, 0.022 * _taper(len(path))), _dim(factors.skin, 0.68))
        canvas.tint(_ellipse(np.add(tip, (side * 0.055, 0.02)), (0.034, 0.018)), _dim(factors.skin, 0.42))
    base = _smooth(np.array([(-0.05, 0.04), (0, 0.055), (0.05, 0.04)]) + tip)
    canvas.tint(_ribbon(base, 0.018 * _taper(len(base))), _dim(factors.skin, 0.7))


def _draw_mouth(canvas: _Canvas, factors: FaceFactors, geometry: _Geometry) -> None:
    cos, sin = np.cos(geometry.mouth_tilt), np.sin(geometry.mouth_tilt)
    turn = np.array([[cos, sin], [-sin, cos]])

    def placed(points: list[tuple[float, float]]) -> Points:
        return _smooth(np.array(points) * (geometry.mouth_width, 1)) @ turn + geometry.mouth

    bow = placed([(-1, -0.02), (-0.5, -0.045), (-0.18, -0.075), (0, -0.055), (0.18, -0.075), (0.5, -0.045), (1, -0.02)])
    parting = placed([(-1, -0.02), (-0.5, 0.008), (0, 0.004), (0.5, 0.008), (1, -0.02)])
    under = placed([(-1, -0.02), (-0.55, 0.07), (0, 0.105), (0.55, 0.07), (1, -0.02)])
    canvas.fill(np.concatenate([bow, parting[::-1]]), _dim(factors.lips, 0.9))
    canvas.fill(np.concatenate([parting, under[::-1]]), factors.lips)
    gloss = placed([(-0.4, 0.05), (0, 0.062), (0.4, 0.05)])
    canvas.fill(_ribbon(gloss, 0.022 * _taper(len(gloss))), _mix(factors.lips, (255, 240, 240), 0.25))
    canvas.fill(_ribbon(parting, 0.02 * _taper(len(parting), 0.4)), _dim(factors.lips, 0.45))


def _scalp(factors: FaceFactors) -> Points:
    """The outer curve of the hair, from one temple over the crown to the other."""
    u = np.linspace(-1, 1, 41)
    end = _temple(factors)
    y = end - (factors.hair_volume + end) * (1 - np.abs(u) ** 2.6) ** 0.6
    return np.stack([u * 0.79 * factors.hair_volume**0.6, y], axis=1)


def _temple(factors: FaceFactors) -> float:
    return -0.02 if factors.hair_length > 0.2 else -0.12


def _draw_fringe(canvas: _Canvas, factors: FaceFactors, rng: np.random.Generator) -> None:
    """The hair in front of the face: between the outer curve and a hairline that is highest at the parting."""
    outer, end = _scalp(factors), _temple(factors)
    u = np.linspace(-1, 1, len(outer))
    reach = np.abs(u - factors.parting) / (1 + abs(factors.parting))
    inner = np.stack([u * _FACE_WIDTH * 0.99, factors.hairline + (end - factors.hairline) * reach**2.2], axis=1)
    canvas.fill(np.concatenate([outer, inner[::-1]]), factors.hair)
    for depth in np.linspace(0.06, 0.94, 15):
        strand = outer * (1 - depth) + inner * depth
        start, stop = np.sort(rng.choice(len(u), 2, replace=False))
        if stop - start > 4:
            strand = strand[start:stop]
            canvas.fill(_ribbon(strand, 0.022 * _taper(len(strand))), _dim(factors.hair, rng.uniform(0.7, 1.3)))


def _light_and_skin(
    image: Image.Image, skin: np.ndarray, factors: FaceFactors, geometry: _Geometry, rng: np.random.Generator
) -> Image.Image:
    """Work in what is soft: relief and blush on the skin, blotches and blemishes, light over all, grain."""
    size = image.width
    relief, blush = _relief(factors, geometry, size)
    uneven, spots = _blemishes(factors, size, rng)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    light = 1 + factors.light[0] * ramp[None, :] + factors.light[1] * ramp[:, None]
    gain = light * (1 + skin * (relief * uneven - 0.22 * spots - 1))
    redness = skin * (blush + 0.25 * spots)
    grain = factors.grain * rng.standard_normal((size, size), dtype=np.float32)
    planes = []
    for plane, taken in zip(image.split(), (0.0, 1.0, 0.85), strict=True):  # red skin is skin with less green and blue
        values = np.asarray(plane, np.float32) * gain * (1 - taken * redness) + grain
        planes.append(Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)))
    return Image.merge("RGB", planes)


def _relief(factors: FaceFactors, geometry: _Geometry, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Brightness of a rounded face (rim, sockets and nose side darker, ridge brighter) and blush, (size, size) each."""
    coarse = max(size // 5, 8)  # nothing here is sharp, so it's computed small and enlarged
    axes, origin = _to_picture(factors, coarse)
    grid = np.stack(np.meshgrid(np.arange(coarse) + 0.5, np.arange(coarse) + 0.5), axis=-1)
    x, y = np.moveaxis((grid - origin) @ np.linalg.inv(axes), -1, 0)

    def bump(at: tuple[float, float], width: float, height: float) -> np.ndarray:
        return np.exp(-(((x - at[0]) / width) ** 2) - ((y - at[1]) / height) ** 2)

    nose_x, nose_y = geometry.nose
    side = -1 if factors.light[0] > 0 else 1  # away from the light
    shade = 1.03 - 0.22 * np.clip((x / 0.8) ** 2 + (y / 1.08) ** 2, 0, 1.2) ** 2
    shade += 0.09 * bump((nose_x * 0.7, nose_y - 0.2), 0.05, 0.22) + 0.06 * bump((nose_x, nose_y - 0.04), 0.05, 0.05)
    shade -= 0.09 * bump((nose_x * 0.7 + side * 0.1, nose_y - 0.15), 0.06, 0.25)
    shade -= 0.10 * bump((geometry.mouth[0], geometry.mouth[1] + 0.16), 0.17, 0.05)
    for eye_x, eye_y in zip(geometry.eye_x, geometry.eye_y, strict=True):
        shade -= 0.12 * bump((eye_x * 0.92, eye_y - 0.09), 0.2, 0.1)
    blush = 0.10 * (bump((-0.45, 0.32), 0.2, 0.16) + bump((0.45, 0.32), 0.2, 0.16))
    return _enlarge(shade, size), _enlarge(blush, size)


def _blemishes(factors: FaceFactors, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Blotches and pores as a brightness around 1, and the depth of red spots in 0–1, (size, size) each.

    At texture 1 they are 1 and 0. Spots are 3 to 9 pixels across at 350, so that they're still there at 128.
    """
    rough = 1 - factors.texture
    blotches = _enlarge(rng.standard_normal((size // 9, size // 9)), size)
    pores = _enlarge(rng.standard_normal((size // 3, size // 3)), size)
    layer = Image.new("L", (size, size))
    draw = ImageDraw.Draw(layer)
    axes, origin = _to_picture(factors, size)
    where = rng.uniform(-1, 1, (_MOST_SPOTS, 2)) * (0.72, 0.95) @ axes + origin
    radii = rng.uniform(0.014, 0.038, _MOST_SPOTS) * axes[0, 0]
    depths = rng.uniform(80, 200, _MOST_SPOTS)
    for (x, y), radius, depth in list(zip(where, radii, depths, strict=True))[: round(_MOST_SPOTS * rough)]:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=int(depth))
    spots = np.asarray(layer.filter(ImageFilter.GaussianBlur(size / 350)), np.float32) / 255
    return 1 + rough * (0.045 * blotches + 0.04 * pores), spots


def _enlarge(values: np.ndarray, size: int) -> np.ndarray:
    field = Image.fromarray(values.astype(np.float32))
    return np.asarray(field.resize((size, size), Image.Resampling.BICUBIC))


def _direction(rng: np.random.Generator, length: int) -> tuple[float, ...]:
    """Random signs with comparable magnitudes, root mean square 1: every deviation shows, none gives it all away."""
    values = rng.uniform(0.5, 1.5, length) * rng.choice((-1, 1), length)
    return tuple((values / np.sqrt(np.mean(values**2))).tolist())


def _colour(values: np.ndarray) -> Colour:
    red, green, blue = np.clip(np.rint(values), 0, 255).astype(int).tolist()
    return red, green, blue


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    return _colour(np.array(a) * (1 - share) + np.array(b) * share)


def _dim(colour: Colour, factor: float) -> Colour:
    return _colour(np.array(colour) * factor)


def _ramp(stops: np.ndarray, at: float) -> np.ndarray:
    return np.array([np.interp(at * (len(stops) - 1), np.arange(len(stops)), channel) for channel in stops.T])


def _ellipse(centre: np.ndarray | tuple[float, float], radii: np.ndarray | tuple[float, float]) -> Points:
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * radii + centre


def _mirrored(half: list[tuple[float, float]]) -> Points:
    left = np.array(half)
    right = (left * (-1, 1))[::-1]
    return np.concatenate([left, right])


def _smooth(points: Points, per_segment: int = 8) -> Points:
    """Catmull–Rom spline through `points`, end points doubled."""
    padded = np.concatenate([points[:1], points, points[-1:]])
    a, b, c, d = padded[:-3, None], padded[1:-2, None], padded[2:-1, None], padded[3:, None]  # (segments, 1, 2)
    t = np.linspace(0, 1, per_segment, endpoint=False)[:, None]
    curve = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return np.concatenate([curve.reshape(-1, 2), points[-1:]])


def _taper(length: int, least: float = 0.15) -> np.ndarray:
    return least + (1 - least) * np.sin(np.linspace(0, np.pi, length))


def _ribbon(path: Points, widths: np.ndarray) -> Points:
    """The polygon of a stroke along `path`, `widths` wide."""
    along = np.gradient(path, axis=0)
    normal = np.stack([-along[:, 1], along[:, 0]], axis=1) / np.maximum(np.hypot(*along.T), 1e-9)[:, None]
    offset = normal * widths[:, None] / 2
    return np.concatenate([path + offset, (path - offset)[::-1]])
