"""What a session is, and how the three graphs of a bundle run one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from mdnet_engines.bundle.manifest import GraphName


class Session(Protocol):
    """One graph, ready to run on some runtime. Safe to call from several threads."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph on `feeds` (input name → array, batch first); give its outputs by name."""


def run_graphs(graphs: Mapping[GraphName, Session], images: np.ndarray) -> dict[str, np.ndarray]:
    """Run a bundle's three graphs on uint8 images [n, S, S, 3]; give every output by name, `score` [n] among them."""
    outputs = {**graphs["encoder"].run({"image": images}), **graphs["vim"].run({"image": images})}
    return {**outputs, **graphs["fusion"].run(outputs)}
