"""The lean runtime: images in, scores out, with a bundle that `mdnet-export` made.

from mdnet_rt import Scorer

with Scorer.open("mdnet-bundle") as scorer:
    for result in scorer.stream(paths):
        print(result.path, result.score, result.reason)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdnet_rt.rows.result import Result
    from mdnet_rt.scoring.scorer import Scorer

__all__ = ["Result", "Scorer"]

# Imported on first use: training takes only `mdnet_rt.images.preprocess` and needs no session and no pydantic.
_HOMES = {"Result": "mdnet_rt.rows.result", "Scorer": "mdnet_rt.scoring.scorer"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
