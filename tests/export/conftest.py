"""Demo bundles, built once."""

from __future__ import annotations

import pytest

from mdnet_engines.bundle import Bundle
from mdnet_export.build import build_bundle
from mdnet_export.images import parity_images
from mdnet_export.weights import choose_weights


@pytest.fixture(scope="session", params=["fp32", "fp16"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The packaged demo as a bundle, at each precision."""
    folder = tmp_path_factory.mktemp("bundles") / request.param
    return build_bundle(choose_weights(), folder, precision=request.param, images=parity_images(None, 128, 6))
