"""A parity report as JSON: `parity.json`, and what a process that measured one sends back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from mdnet_engines.errors import BundleError
from mdnet_engines.parity.report import Gate, LayerParity, ParityReport, RatingParity, ScorePair, TensorParity


def to_json(report: ParityReport) -> dict[str, Any]:
    """Every field of `report`, plus its `passed` and the `verdict` of each gate, as what strict JSON can hold.

    NaN and infinities become the strings "NaN", "Infinity", "-Infinity" (null already means "not evaluated").
    A file name that is not UTF-8 keeps its surrogates: write it with `json.dumps`' default, ASCII escapes.
    """
    document = asdict(report)
    for part, gate in zip(document["gates"], report.gates, strict=True):
        part["verdict"] = gate.verdict
    document["passed"] = report.passed
    return _plain(document)


def from_json(document: Mapping[str, Any]) -> ParityReport:
    """The report that `to_json` wrote; what it computed (`passed`, `verdict`) is computed anew, not believed.

    Raises:
        BundleError: a field is missing or is not of its type.
    """
    try:
        return ParityReport(
            precision=_text(document["precision"]),
            backend=_text(document["backend"]),
            source=_text(document["source"]),
            graphs={
                graph: {name: _parity(part) for name, part in outputs.items()}
                for graph, outputs in document["graphs"].items()
            },
            scores=[
                ScorePair(_text(part["image"]), _float(part["reference"]), _float(part["bundle"]))
                for part in document["scores"]
            ],
            gates=[
                Gate(
                    name=_text(part["name"]),
                    value=None if part["value"] is None else _float(part["value"]),
                    at_most=_bool(part["at_most"]),
                    limit=_float(part["limit"]),
                    note=_text(part["note"]),
                )
                for part in document["gates"]
            ],
            forced=_bool(document["forced"]),
            layers={
                graph: [
                    LayerParity(_text(part["layer"]), _text(part["value"]), _parity(part["parity"])) for part in parts
                ]
                for graph, parts in document["layers"].items()
            },
            ratings=[
                RatingParity(
                    group=_text(part["group"]),
                    images=int(_float(part["images"])),
                    **{name: _float(part[name]) for name in ("reference", "bundle", "mean_abs", "of_width")},
                )
                for part in document["ratings"]
            ],
        )
    except KeyError as error:
        raise BundleError(f"parity report: field {error} is missing; rebuild with: mdnet-export build") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise BundleError(f"parity report: {error}; rebuild with: mdnet-export build") from None


def _parity(part: Mapping[str, Any]) -> TensorParity:
    return TensorParity(_float(part["cosine"]), _float(part["snr_db"]), _float(part["max_abs"]))


_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (float, np.floating)):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _float(value: Any) -> float:
    if isinstance(value, str) and value in _NON_FINITE:
        return _NON_FINITE[value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, got {value!r:.80}")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r:.80}")
    return value


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"expected true or false, got {value!r:.80}")
    return value
