"""A bundle on another framing than its own."""

from __future__ import annotations

import warnings

from mdnet_engines.bundle.manifest import Manifest
from mdnet_engines.framing import FramingWarning, mismatch, parse_face


def framed(manifest: Manifest, face: str | None) -> Manifest:
    """The manifest with the framing that is asked for; without one, as it is. Warns where they differ.

    Its digest then differs too, so that rows of both can't be mixed.
    """
    if face is None:
        return manifest
    trained, used = manifest.preprocessing.face, parse_face(face)
    if note := mismatch(trained, used):
        warnings.warn(note, FramingWarning, stacklevel=3)
    return manifest.model_copy(update={"preprocessing": manifest.preprocessing.model_copy(update={"face": used})})
