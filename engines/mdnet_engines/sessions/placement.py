"""Which of ONNX Runtime's providers ran each node of a graph, by a profile (`OrtSession(…, profile=folder)`).

ONNX Runtime puts a node on the CPU where a provider has no kernel for it, and expands our operators into their function
bodies where no library has them: both are silent, right, and slow.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mdnet_engines.ops import selective_scan
from mdnet_engines.sessions.onnxruntime import OrtSession

_SCANS = (selective_scan.FORWARD, selective_scan.REVERSE)


@dataclass(frozen=True)
class Placement:
    """How many nodes ran, by operator and provider. Runs of one node count once, steps of a loop's body too."""

    nodes: Mapping[tuple[str, str], int]

    def scans(self, provider: str) -> int:
        """Selective scans that ran as our operator on `provider`."""
        return sum(self.nodes.get((operator, provider), 0) for operator in _SCANS)

    def elsewhere(self, provider: str) -> dict[str, int]:
        """How many nodes another provider ran, by operator, the most frequent first."""
        found = Counter[str]()
        for (operator, where), count in self.nodes.items():
            if where != provider:
                found[operator] += count
        return dict(found.most_common())

    def scan_problem(self, provider: str, expected: int) -> str:
        """What is wrong with the graphs' `expected` selective scans, in words; empty if all ran on `provider`."""
        if (here := self.scans(provider)) == expected:
            return ""
        away = {where: self.scans(where) for _, where in self.nodes if where != provider and self.scans(where)}
        if away:
            return f"{here} of {expected} selective scans ran on {provider}, " + ", ".join(
                f"{count} on {where}" for where, count in away.items()
            )
        return f"{here} of {expected} selective scans ran as our operator; the rest ran as its function body"


def end_profiles(sessions: Iterable[OrtSession]) -> Placement:
    """End the profiles of sessions that were opened with one and have run; give where their nodes ran."""
    found = Counter[tuple[str, str]]()
    for session in sessions:
        ran = set()
        for event in json.loads(session.end_profile().read_text(encoding="utf-8")):
            facts = event.get("args") or {}
            if event.get("cat") == "Node" and facts.get("provider"):
                ran.add((event["name"], facts.get("node_index"), facts["op_name"], facts["provider"]))
        found.update((operator, provider) for _, _, operator, provider in ran)
    return Placement(found)
