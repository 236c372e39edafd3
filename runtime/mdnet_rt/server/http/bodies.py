"""A request's body, bounded while it is read, and the images in it: a raw file, multipart, or JSON with base64."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json
from python_multipart.multipart import MultipartParser, parse_options_header

from mdnet_engines.errors import first_line
from mdnet_rt.images.preprocess import ImageError
from mdnet_rt.server.settings import Settings
from mdnet_rt.server.wire import ClientLeftError, RefusedError, Wire

Receive = Callable[[], Awaitable[Mapping[str, Any]]]
MAX_NAME = 255
"""Characters of a file's name that come back with its result."""
_DATA_URI = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
_TYPES = "image/*, application/octet-stream, multipart/form-data, application/json"


@dataclass(frozen=True)
class Upload:
    """One image of a request: what its client calls it, and its file's bytes."""

    name: str | None
    data: bytes | ImageError


class Bodies:
    """Reads bodies, none above `max_body` and all that are held at a time not above `max_held`."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self.held = 0

    def hold(self) -> Hold:
        """Room for one body, given back at the end of a `with` block."""
        return Hold(self, self._settings)


class Hold:
    """One request's share of what is held."""

    def __init__(self, bodies: Bodies, settings: Settings):
        self._bodies, self._settings = bodies, settings
        self._size = 0

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self._bodies.held -= self._size

    async def read(self, headers: Mapping[bytes, bytes], receive: Receive, wire: Wire) -> bytes:
        """The whole body.

        Raises:
            RefusedError: too large (413), compressed (415), no room for it (429), or what is wrong with the wire.
            ClientLeftError: the connection was lost.
        """
        if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"identity", b""):
            raise RefusedError(415, "compressed bodies are not accepted; send it without Content-Encoding", close=True)
        if int(headers.get(b"content-length", b"0")) > self._settings.max_body:
            raise self._too_large()
        parts: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeftError
            parts.append(message.get("body", b""))
            self._add(len(parts[-1]))
            if not message.get("more_body"):
                return parts[0] if len(parts) == 1 else b"".join(parts)
            if wire.failure is not None:
                raise wire.failure

    def _add(self, size: int) -> None:
        self._size += size
        self._bodies.held += size
        if self._size > self._settings.max_body:
            raise self._too_large()
        if self._bodies.held > self._settings.max_held:
            raise RefusedError(429, "busy: too much is being uploaded; retry in 1 s", retry_after=1, close=True)

    def _too_large(self) -> RefusedError:
        return RefusedError(413, f"the body is larger than {self._settings.max_body} bytes", close=True)


def find_uploads(content_type: str, body: bytes, max_images: int) -> list[Upload]:
    """The images in a body, in their order.

    Args:
        content_type: the request's; if it is empty the body is one image file.

    Raises:
        RefusedError: another type (415), a malformed body or one without images (400), or too many images (413).
    """
    kind, options = parse_options_header(content_type)
    if not body:
        raise RefusedError(400, "the body is empty; expected an image, multipart/form-data or JSON")
    if kind == b"multipart/form-data":
        uploads = _from_multipart(options.get(b"boundary", b""), body, max_images)
    elif kind == b"application/json":
        uploads = _from_json(body, max_images)
    elif kind in (b"", b"application/octet-stream") or kind.startswith(b"image/"):
        uploads = [Upload(None, body)]
    else:
        raise RefusedError(415, f"Content-Type is {kind.decode('latin-1')[:80]}; expected one of {_TYPES}")
    if not uploads:
        raise RefusedError(400, "no image in the body")
    return uploads


def parse_json(text: bytes, most_values: int) -> Any:
    """Parse JSON as the standard has it: UTF-8, no NaN, nested 200 deep at most.

    Values are counted first: as Python objects they take many times the text's memory.

    Raises:
        RefusedError: not JSON (400), or more than `most_values` values (413).
    """
    if text.count(b",") + text.count(b"[") + text.count(b"{") > most_values:
        raise RefusedError(413, f"more than {most_values} values in the JSON; send less at once")
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise RefusedError(400, f"not valid JSON: {first_line(error)}") from None


def from_base64(text: str) -> bytes | ImageError:
    """An image file's bytes, or that this is not base64: with line breaks or without, also in a `data:` URI."""
    if uri := _DATA_URI.match(text):
        text = text[uri.end() :]
    text = text.replace("\n", "").replace("\r", "")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):  # the latter for text that is not ASCII
        return ImageError("not base64")


def _from_json(body: bytes, max_images: int) -> list[Upload]:
    document = parse_json(body, 2 * max_images + 64)
    images = document.get("images") if isinstance(document, dict) and len(document) == 1 else None
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise RefusedError(400, 'expected {"images": ["<base64>", ...]} and nothing else')
    return [Upload(None, from_base64(image)) for image in images]


def _from_multipart(boundary: bytes, body: bytes, max_images: int) -> list[Upload]:
    """Every part is an image, whatever the field is called."""
    if not boundary:
        raise RefusedError(400, "multipart/form-data without a boundary")
    parts = _Parts(max_images)
    try:
        parser = MultipartParser(boundary, parts.callbacks())
        parser.write(body)
        parser.finalize()
    except ValueError as error:
        raise RefusedError(400, f"not valid multipart/form-data: {first_line(error)}") from None
    if not parts.complete:
        raise RefusedError(400, "multipart/form-data that ends before its last boundary")
    return parts.uploads


class _Parts:
    """What the multipart parser calls; collects the parts."""

    def __init__(self, most: int):
        self.uploads: list[Upload] = []
        self.complete = False
        self._most = most
        self._field = self._value = b""
        self._disposition = b""
        self._data: list[bytes] = []

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._on_field,
            "on_header_value": self._on_value,
            "on_header_end": self._on_header_end,
            "on_part_data": self._on_data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        if len(self.uploads) == self._most:
            raise RefusedError(413, f"more than {self._most} images in one request")
        self._field = self._value = self._disposition = b""
        self._data = []

    def _on_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field = self._value = b""

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        self._data.append(data[start:end])

    def _end(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"filename") or options.get(b"name")
        text = name.decode("utf-8", "replace")[:MAX_NAME] if name else None
        self.uploads.append(Upload(text, b"".join(self._data)))

    def _finish(self) -> None:
        self.complete = True
