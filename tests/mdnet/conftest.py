"""Drawn faces and the demo's bundle, each made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdnet.data.drawn_set import write_dataset
from mdnet_engines.bundle.files import Bundle


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 drawn faces in SCUT-FBP5500's layout; not to be changed."""
    root = tmp_path_factory.mktemp("data") / "faces"
    write_dataset(root, 60, seed=1)
    return root


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The packaged demo as an fp32 bundle."""
    from mdnet_export.build import build_bundle
    from mdnet_export.model_source import choose_weights
    from mdnet_export.parity_images import parity_images

    folder = tmp_path_factory.mktemp("bundles") / "fp32"
    return build_bundle(choose_weights(), folder, images=parity_images(None, 128, 6))
