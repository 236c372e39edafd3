"""Explained scores for people: one HTML page that loads nothing else and runs nothing. It has the pictures in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mdnet.explain.explain import READINGS, Explained, Explanation
from mdnet.explain.maps import painted_look, painted_loss
from mdnet_engines.report.numbers import number, score_text
from mdnet_engines.report.page import render
from mdnet_engines.report.thumbnails import thumbnail

_SIDE = 192  # pixels


def render_page(explanation: Explanation, *, facts: Mapping[str, str]) -> str:
    """The page: every picture beside its maps, and how far attention and occlusion agree.

    Args:
        facts: what a reader needs to repeat it (command, versions).
    """
    images, model = explanation.images, explanation.model
    # A picture's maps share their colours with those of all others, or a flat one would look as strong.
    most = max(float(np.abs(each.occlusion.pixels).max()) for each in images)
    size = model.image_size
    return render(
        Path(__file__).with_name("explain_page.html.j2"),
        title="What the scores depend on",
        facts={
            "model": ", ".join([f"{model.kind} {model.path}", *model.facts.values()]),
            "occlusion": f"a grey square of {explanation.patch} pixels, every {explanation.stride}, of {size} × {size}",
            "time": f"{explanation.seconds:.1f} s a picture",
            **facts,
        },
        without=explanation.without_attention,
        agreement={reading: [_figure(value) for value in explanation.agreement(reading)] for reading in READINGS},
        several=len(images) > 1,
        most=number(most, 2),
        images=[_picture(each, most) for each in images],
        skipped=explanation.skipped,
    )


def _picture(each: Explained, most: float) -> dict[str, Any]:
    """What the template shows of one picture."""
    loss, looked = each.occlusion.loss, each.looked
    maps = {
        reading: {
            "all": thumbnail(painted_look(each.pixels, attention), _SIDE),
            "scales": [
                (
                    f"{len(cells)} × {len(cells)}",
                    f"{cells.sum():.0%}",
                    thumbnail(painted_look(each.pixels, cells), _SIDE),
                )
                for cells in getattr(looked, reading).values()
            ],
            "agreement": _figure(each.agreement(reading)),
        }
        for reading in READINGS
        if (attention := each.attention(reading)) is not None
    }
    return {
        "name": each.name,
        "score": score_text(each.occlusion.score),
        "loss": number(max(float(loss.max()), 0.0), 2),
        "gain": number(max(float(-loss.min()), 0.0), 2),
        "itself": thumbnail(each.pixels, _SIDE),
        "occlusion": thumbnail(painted_loss(each.pixels, each.occlusion.pixels, most), _SIDE),
        "maps": maps,
    }


def _figure(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}".replace("-", "−")
