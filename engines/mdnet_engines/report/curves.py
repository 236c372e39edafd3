"""Curves over steps, such as a training's over its epochs, as inline SVG. Needs markupsafe."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from mdnet_engines.report.charts import axes, dots, frame
from mdnet_engines.report.numbers import number


def curve(
    points: Sequence[tuple[int, float]], marked: int | None, *, name: str, title: str, x_label: str, y_label: str
) -> Markup:
    """A line through finite values at whole steps from 1 on, at least one; the step `marked` is ringed."""
    steps, values = [step for step, _ in points], [value for _, value in points]
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1.0, abs(low)):
        low, high = low - 0.5, high + 0.5
    x, y = axes((min(steps) - 1, max(steps)), (low, high))
    positions = [(x.position(step), y.position(value)) for step, value in points]
    ring = Markup('<circle cx="{:.2f}" cy="{:.2f}" r="7"><title>{}: {}</title></circle>')
    rings = [
        ring.format(*at, step, number(value, 4))
        for at, (step, value) in zip(positions, points, strict=True)
        if step == marked
    ]
    return frame(
        name,
        title,
        f"{x_label} {min(steps)} to {max(steps)}; from {number(values[0], 4)} to {number(values[-1], 4)}, "
        f"lowest {number(min(values), 4)}, highest {number(max(values), 4)}.",
        x,
        y,
        x.unit(x_label),
        y.unit(y_label),
        Markup('<polyline class="curve" points="{}"/>').format(" ".join(f"{px:.2f},{py:.2f}" for px, py in positions))
        + dots(positions)
        + Markup('<g class="rings">{}</g>').format(Markup("").join(rings)),
    )
