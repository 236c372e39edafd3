"""The demo's bundle at each precision."""

from __future__ import annotations

import pytest

from mdnet_engines.bundle.files import Bundle


@pytest.fixture(params=["fp32", "fp16", "int8", "fp8"])
def bundle(request: pytest.FixtureRequest, bundles: dict[str, Bundle]) -> Bundle:
    """The packaged demo as a bundle, at each precision."""
    return bundles[request.param]
