"""README's chart of speed, drawn from committed figures: python benchmarks/chart.py

Reads benchmarks/results/precision-sd15-vim-s-cpu.json and writes docs/images/speed-light.svg and speed-dark.svg. The
same figures give the same bytes, so that `tests/test_docs.py` can hold the chart to them. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "precision-sd15-vim-s-cpu.json"
IMAGES = ROOT / "docs" / "images"

OURS = ("auto, int8", "OpenVINO, int8", "OpenVINO, fp16 bundle in bf16")
"""Contestants that run a bundle of lower precision: drawn in colour."""

BARS = {  # contestant of benchmarks/precision.py → its label; None: the baseline that all are measured against
    None: "PyTorch eager, fp32",
    "torch.compile": "torch.compile, fp32",
    "OpenVINO, its own conversion, fp32": "OpenVINO's own conversion, fp32",
    "PyTorch eager, bf16 autocast": "PyTorch eager, bf16 autocast",
    "OpenVINO, its own conversion, bf16": "OpenVINO's own conversion, bf16",
    "ONNX Runtime, fp32": "ONNX Runtime, fp32 bundle",
    "OpenVINO, fp16 bundle in bf16": "OpenVINO, fp16 bundle in bf16",
    "OpenVINO, int8": "OpenVINO, int8 bundle",
    "auto, int8": "int8 bundle, default backend",
}

# Sizes in SVG units (CSS pixels at full width).
WIDTH, LEFT, RIGHT, TOP = 840, 290, 140, 46
BAR, GAP = 20, 10


@dataclass(frozen=True)
class Colours:
    """One colour scheme. There is no background: the page's own shows."""

    text: str
    muted: str
    line: str
    other: str
    ours: str


SCHEMES = {
    "light": Colours(text="#1f2328", muted="#59636e", line="#d1d9e0", other="#8c959f", ours="#1f5fa8"),
    "dark": Colours(text="#f0f6fc", muted="#9198a1", line="#3d444d", other="#6e7681", ours="#58a6ff"),
}


@dataclass(frozen=True)
class Bar:
    label: str
    speedup: float
    ms: float
    ours: bool


def bars(figures: dict[str, Any]) -> list[Bar]:
    """The bars of the chart, in the order of `BARS`."""
    measured = figures["contestants"]
    drawn = []
    for name, label in BARS.items():
        if name is None:
            drawn.append(Bar(label, 1.0, measured["torch.compile"]["baseline_ms"], False))
        else:
            drawn.append(Bar(label, measured[name]["speedup"], measured[name]["ms"], name in OURS))
    return drawn


def draw(figures: dict[str, Any], colours: Colours) -> str:
    """The chart as SVG: horizontal bars, times faster than PyTorch eager."""
    rows = bars(figures)
    bottom = TOP + len(rows) * (BAR + GAP)
    scale = (WIDTH - LEFT - RIGHT) / max(row.speedup for row in rows)
    machine = figures["machine"]
    what = f"{figures['preset']}, one image to score, {figures['threads']} threads, {machine['processor']}"
    title = f"Times faster than PyTorch eager: {what}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 8}" role="img" '
        'font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif" font-size="14">',
        f"<title>{escape(title)}</title>",
        f'<text x="0" y="16" fill="{colours.text}" font-weight="600">Times faster than PyTorch eager</text>',
        f'<text x="0" y="34" fill="{colours.muted}" font-size="12">{escape(what)}</text>',
    ]
    for index, row in enumerate(rows):
        y = TOP + GAP / 2 + index * (BAR + GAP)
        width = row.speedup * scale
        weight = ' font-weight="600"' if row.ours else ""
        fill = colours.ours if row.ours else colours.other
        middle = y + BAR / 2 + 5
        parts += [
            f'<text x="{LEFT - 10}" y="{middle:.1f}" fill="{colours.text}" text-anchor="end"{weight}>'
            f"{escape(row.label)}</text>",
            f'<rect x="{LEFT}" y="{y:.1f}" width="{width:.1f}" height="{BAR}" rx="2" fill="{fill}"/>',
            f'<text x="{LEFT + width + 8:.1f}" y="{middle:.1f}" fill="{colours.text}"{weight}>{row.speedup:.2f}×'
            f'<tspan fill="{colours.muted}" font-weight="400"> · {row.ms:.0f} ms</tspan></text>',
        ]
    baseline = LEFT + scale
    parts.append(f'<path d="M{baseline:.1f} {TOP}V{bottom}" stroke="{colours.line}" stroke-dasharray="4 4"/>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="figures of benchmarks/precision.py")
    parser.add_argument("-o", "--output", type=Path, default=IMAGES, help="folder for the two files")
    options = parser.parse_args()
    figures = json.loads(options.results.read_text(encoding="utf-8"))
    options.output.mkdir(parents=True, exist_ok=True)
    for name, colours in SCHEMES.items():
        file = options.output / f"speed-{name}.svg"
        file.write_text(draw(figures, colours), encoding="utf-8")
        print(file)


if __name__ == "__main__":
    main()
