"""The Open Inference Protocol, version 2 (KServe, Triton), as functions of bytes: requests in, answers out.

The model has two inputs, of which a request gives one, and three outputs:

| input | type | shape | |
| --- | --- | --- | --- |
| `image` | BYTES | [n] or [n, 1] | image files; in JSON as base64, which raw bytes have no place in |
| `pixels` | UINT8 | [n, S, S, 3] | RGB as `mdnet_rt.images.preprocess` gives it |

| output | type | shape | |
| --- | --- | --- | --- |
| `score` | FP32 | [n] | NaN where there is none (null in JSON, which has no NaN) |
| `status` | BYTES | [n] | ok, or what is wrong with the image |
| `reason` | BYTES | [n] | in words; empty for ok |

Tensors travel as JSON or by the binary tensor data extension, in either direction, each on its own.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mdnet_rt.images.preprocess import ImageError
from mdnet_rt.server.http.bodies import from_base64, parse_json
from mdnet_rt.server.wire import RefusedError
from mdnet_rt.server.work import Outcome, Payload

VERSION = "1"
"""The one version of the model that a server has."""
MIN_VALUES = 2**16
"""Values that a request's JSON may have whatever the size of the images."""
HEADER = b"inference-header-content-length"
_OUTPUTS = {"score": "FP32", "status": "BYTES", "reason": "BYTES"}


@dataclass(frozen=True)
class InferRequest:
    """The images of a request, and how it wants its answer."""

    payloads: list[Payload]
    outputs: list[tuple[str, bool]]
    """Name, and whether as binary data; in the order they were asked for."""
    id: str | None = None


def model_metadata(name: str, image_size: int) -> dict[str, Any]:
    """What `GET /v2/models/NAME` answers."""
    return {
        "name": name,
        "versions": [VERSION],
        "platform": "mdnet_onnx",
        "inputs": [
            {"name": "image", "datatype": "BYTES", "shape": [-1]},
            {"name": "pixels", "datatype": "UINT8", "shape": [-1, image_size, image_size, 3]},
        ],
        "outputs": [{"name": output, "datatype": kind, "shape": [-1]} for output, kind in _OUTPUTS.items()],
    }


def max_values(image_size: int) -> int:
    """Values that a request's JSON may have: while it is parsed nothing else runs.

    They are enough for the pixels of one image, a list for each row and pixel; those of more belong into binary data.
    """
    return max(MIN_VALUES, 4 * image_size**2 + 2 * image_size + 1024)


def read_request(body: bytes, json_length: bytes | None, image_size: int, max_images: int) -> InferRequest:
    """Parse the body of an infer request.

    Args:
        json_length: the header `Inference-Header-Content-Length`, where there is one: what follows is binary data.

    Raises:
        RefusedError: 400 for what does not fit the protocol or the model, 413 for too many images or too much JSON.
    """
    if json_length is None:
        text, binary = body, memoryview(b"")
    else:
        if not json_length.isdigit() or not 0 < (length := int(json_length[:20])) <= len(body):
            raise RefusedError(400, f"Inference-Header-Content-Length does not fit a body of {len(body)} bytes")
        text, binary = body[:length], memoryview(body)[length:]
    document = parse_json(text, max_values(image_size))
    if not isinstance(document, dict):
        raise RefusedError(400, "expected a JSON object with inputs")
    request_id = document.get("id")
    if not isinstance(request_id, (str, type(None))):
        raise RefusedError(400, "id is not a string")
    inputs = _objects(document, "inputs")
    if len(inputs) != 1 or inputs[0].get("name") not in ("image", "pixels"):
        raise RefusedError(400, "expected one input: image (BYTES) or pixels (UINT8)")
    tensor = inputs[0]
    shape = _shape(tensor)
    if shape[0] > max_images:
        raise RefusedError(413, f"{shape[0]} images in one request; at most {max_images} are allowed")
    data = _binary_data(tensor, binary)
    payloads: list[Payload]
    if tensor["name"] == "image":
        _expect(tensor, "BYTES", "[n] or [n, 1]", shape[1:] in ([], [1]))
        payloads = list(_read_images(tensor, data, shape[0]))
    else:
        one = [image_size, image_size, 3]
        _expect(tensor, "UINT8", f"[n, {image_size}, {image_size}, 3]", shape[1:] == one)
        payloads = list(_read_pixels(tensor, data, shape))
    return InferRequest(payloads, _wanted_outputs(document), request_id)


def write_answer(request: InferRequest, outcomes: Sequence[Outcome], model_name: str) -> tuple[bytes, dict[str, str]]:
    """The body of an answer, and its headers."""
    columns: dict[str, list[Any]] = {
        "score": [outcome.score for outcome in outcomes],
        "status": [outcome.status for outcome in outcomes],
        "reason": [outcome.reason or "" for outcome in outcomes],
    }
    outputs: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for name, as_binary in request.outputs:
        output: dict[str, Any] = {"name": name, "datatype": _OUTPUTS[name], "shape": [len(outcomes)]}
        if as_binary:
            blobs.append(_pack(columns[name]))
            output["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            output["data"] = columns[name]
        outputs.append(output)
    answer: dict[str, Any] = {"model_name": model_name, "model_version": VERSION, "outputs": outputs}
    if request.id is not None:
        answer["id"] = request.id
    text = json.dumps(answer, separators=(",", ":")).encode()
    if not blobs:
        return text, {"content-type": "application/json"}
    headers = {"content-type": "application/octet-stream", HEADER.decode(): str(len(text))}
    return b"".join([text, *blobs]), headers


def _objects(document: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """The list of objects at `key`; empty where there is none."""
    values = document.get(key, [])
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise RefusedError(400, f"{key} is not a list of objects")
    return values


def _parameters(owner: Mapping[str, Any]) -> dict[str, Any]:
    parameters = owner.get("parameters", {})
    if not isinstance(parameters, dict):
        raise RefusedError(400, "parameters is not an object")
    if any(name.startswith("shared_memory") for name in parameters) or "classification" in parameters:
        raise RefusedError(400, "shared memory and classification are not supported")
    return parameters


def _binary_data(tensor: Mapping[str, Any], binary: memoryview) -> memoryview | None:
    """The input's binary data; None where its data are in the JSON."""
    size = _parameters(tensor).get("binary_data_size")
    if size is None:
        if len(binary):
            raise RefusedError(400, f"{len(binary)} bytes of binary data that no input's binary_data_size accounts for")
        return None
    if type(size) is not int or size != len(binary):
        raise RefusedError(400, f"binary_data_size is not the {len(binary)} bytes that follow the JSON")
    if "data" in tensor:
        raise RefusedError(400, "an input has both data and binary_data_size")
    return binary


def _shape(tensor: Mapping[str, Any]) -> list[int]:
    shape = tensor.get("shape")
    if not isinstance(shape, list) or not shape or not all(type(axis) is int and axis > 0 for axis in shape):
        raise RefusedError(400, f"input {tensor['name']}: shape is not a list of positive integers")
    return shape


def _expect(tensor: Mapping[str, Any], datatype: str, shape: str, fits: bool) -> None:
    if tensor.get("datatype") != datatype or not fits:
        raise RefusedError(400, f"input {tensor['name']}: expected {datatype} of shape {shape}")


def _read_images(tensor: Mapping[str, Any], data: memoryview | None, count: int) -> list[bytes | ImageError]:
    if data is not None:
        images = _unpack(data, count)
    else:
        values = _flat(tensor.get("data"))
        if not all(isinstance(value, str) for value in values):
            raise RefusedError(400, "input image: expected base64 strings in data")
        images = [from_base64(str(value)) for value in values]
    if len(images) != count:
        raise RefusedError(400, f"input image: data of {len(images)} elements for a shape of {count}")
    return images


def _read_pixels(tensor: Mapping[str, Any], data: memoryview | None, shape: Sequence[int]) -> np.ndarray:
    pixels = np.frombuffer(data, np.uint8) if data is not None else _uint8(tensor.get("data"))
    if pixels.size != math.prod(shape):
        raise RefusedError(400, f"input pixels: data of {pixels.size} elements for the shape {shape}")
    return pixels.reshape(shape)


def _uint8(data: object) -> np.ndarray:
    """JSON numbers, flat or nested, in a flat array."""
    try:
        # Not NumPy's own choice of type: for one long string in a list it makes room for one in every place.
        values = np.array(data, np.float64)
    except (TypeError, ValueError, OverflowError):  # no numbers, or ragged
        values = np.array(math.nan)
    # NumPy also takes "12" and true for numbers.
    if not _types(data) <= {int, float} or not ((values >= 0) & (values <= 255) & (values == np.floor(values))).all():
        raise RefusedError(400, "input pixels: expected integers from 0 to 255 in data")
    return values.astype(np.uint8).reshape(-1)


def _types(data: object) -> set[type]:
    """The types of a list's values, at whatever depth."""
    while isinstance(data, list) and (found := set(map(type, data))) == {list}:
        data = list(itertools.chain.from_iterable(data))
    return found if isinstance(data, list) else {type(data)}


def _flat(data: object) -> list[object]:
    """A list of elements, or of lists of one element each."""
    if not isinstance(data, list):
        raise RefusedError(400, "an input has neither data nor binary_data_size")
    return [value[0] if isinstance(value, list) and len(value) == 1 else value for value in data]


def _unpack(data: memoryview, most: int) -> list[bytes | ImageError]:
    """BYTES elements: each a length, uint32 little-endian, and as many bytes. It stops at one more than `most`."""
    elements: list[bytes | ImageError] = []
    at = 0
    while at < len(data) and len(elements) <= most:
        if at + 4 > len(data) or at + 4 + (size := struct.unpack_from("<I", data, at)[0]) > len(data):
            raise RefusedError(400, "input image: the binary data end within an element")
        elements.append(bytes(data[at + 4 : at + 4 + size]))
        at += 4 + size
    return elements


def _pack(column: Sequence[float | str | None]) -> bytes:
    if column and isinstance(column[0], str):
        texts = [str(text).encode() for text in column]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)
    return np.array([math.nan if score is None else score for score in column], "<f4").tobytes()


def _wanted_outputs(document: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """The outputs that are asked for; all, where none is."""
    binary = _flag(_parameters(document), "binary_data_output", False)
    wanted = _objects(document, "outputs")
    if not wanted:
        return [(name, binary) for name in _OUTPUTS]
    names = [str(output.get("name")) for output in wanted]
    if not set(names) <= set(_OUTPUTS) or len(set(names)) < len(names):
        raise RefusedError(400, f"unknown or repeated output; the outputs are {', '.join(_OUTPUTS)}")
    return [
        (name, _flag(_parameters(output), "binary_data", binary)) for name, output in zip(names, wanted, strict=True)
    ]


def _flag(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise RefusedError(400, f"{name} is not true or false")
    return value
