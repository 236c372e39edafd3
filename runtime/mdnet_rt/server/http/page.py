"""`GET /`: a page to try the server with. It loads nothing, and talks to this server alone.

`page.html` is the page, with names in double braces that are filled in once; only its own script and style may run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from importlib.resources import files

from mdnet_engines.bundle.manifest import Manifest
from mdnet_rt.rows.result import Stamp


def make_page(manifest: Manifest, backend: str) -> tuple[bytes, dict[str, str]]:
    """The page for a bundle that `backend` runs, in UTF-8, and the headers to send with it."""
    text = files("mdnet_rt.server.http").joinpath("page.html").read_text("utf-8")
    rules = {
        "default-src": "'none'",
        "connect-src": "'self'",
        "style-src": _hash_of(text, "style"),
        "script-src": _hash_of(text, "script"),
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    stamp, scale, weights = Stamp.of(manifest), manifest.score, manifest.provenance.weights
    values = {
        "model": stamp.model,
        "bundle": stamp.bundle,
        "backend": backend,
        "minimum": f"{scale.minimum:g}",
        "maximum": f"{scale.maximum:g}",
        "note": "" if weights == "checkpoint" else f"{weights} weights: the scores mean nothing for real people",
    }
    for name, value in values.items():
        text = text.replace("{{" + name + "}}", html.escape(value))
    return text.encode(), {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": "; ".join(f"{rule} {what}" for rule, what in rules.items()),
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
    }


def _hash_of(page: str, tag: str) -> str:
    """The one element's content, as a Content-Security-Policy names it."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
