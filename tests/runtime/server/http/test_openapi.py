"""The OpenAPI document and the server agree, in a thousand requests that schemathesis makes up from the document."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from serving import serving

FOLDER = Path(__file__).resolve().parents[3] / "support" / "openapi_fuzz"
SECONDS = 300  # it takes 40


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="needs the [fuzz] extra")
def test_what_the_document_allows_is_taken_and_what_it_forbids_is_refused(shared_bundle: Path, tmp_path: Path) -> None:
    with serving(shared_bundle) as server:
        result = subprocess.run(
            [
                sys.executable, "-m", "schemathesis.cli", "--config-file", FOLDER / "schemathesis.toml",
                "run", f"{server.url}/openapi.json", "--checks", "all", "--phases", "examples,coverage,fuzzing",
                "--max-examples", "50", "--seed", "1", "--no-shrink", "--continue-on-failure",
                "--generation-database", "none", "--request-timeout", "20",
            ],
            cwd=tmp_path,
            env={**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(FOLDER)},
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        assert server.metric("mdnet_requests_total", endpoint="infer", code="200") > 0  # the requests get so far
        assert server.metric("mdnet_requests_total", endpoint="score", code="422") > 0
        assert server.metric("mdnet_requests_total", code="500") == 0
