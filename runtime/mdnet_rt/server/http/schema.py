"""Requests and answers as OpenAPI documents them. Nothing is validated by these: bodies are read by hand, bounded."""

from __future__ import annotations

from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field


class ImageResult(BaseModel):
    """What became of one image."""

    name: str | None = Field(description="The file's name in a multipart body, else the field's; null elsewhere.")
    status: Literal["ok", "unreadable", "not_finite"]
    score: float | None = Field(description="On the rating scale; null unless status is ok.")
    reason: str | None = Field(description="Why there is no score, or why it is doubtful, in one line.")


class ScoreAnswer(BaseModel):
    """One result for each image, in the order of the request."""

    results: list[ImageResult]
    model: str = Field(description="Preset and precision of the bundle.")
    bundle: str = Field(description="The first 12 hex digits of the sha256 of what decides the scores.")


class NoScore(ScoreAnswer):
    """The one image of a request has no score."""

    error: str


class Error(BaseModel):
    """What was wrong, in one line."""

    error: str


FILE: dict[str, Any] = {"type": "string", "format": "binary", "minLength": 1}
BASE64: dict[str, Any] = {"type": "string", "contentEncoding": "base64"}


class Images(BaseModel):
    """A JSON body of `/score`: image files as base64."""

    images: list[str] = Field(min_length=1, json_schema_extra={"items": BASE64})
    model_config = ConfigDict(extra="forbid")


class Tensor(BaseModel):
    """An output tensor of the Open Inference Protocol."""

    name: str
    datatype: Literal["BYTES", "FP32"]
    shape: list[int]
    parameters: dict[str, Any] = {}
    data: list[Any] | None = Field(None, description="Absent where the tensor is binary data behind the JSON.")


class InferAnswer(BaseModel):
    """The outputs of an infer request."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[Tensor]


class TensorMetadata(BaseModel):
    """An input or output of the model; -1 is any number."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """The model, to the Open Inference Protocol."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServerMetadata(BaseModel):
    """The server, to the Open Inference Protocol."""

    name: str
    version: str
    extensions: list[str]


class Health(BaseModel):
    status: Literal["alive", "ready"]


class Live(BaseModel):
    live: bool


class Ready(BaseModel):
    ready: bool


class ModelReady(BaseModel):
    name: str
    ready: bool


_TEXTS = {
    400: "Not HTTP, or a body that is malformed, incomplete or without images.",
    404: "No such model or version.",
    408: "The request was not complete in time.",
    413: "The body, or the number of images, is above the limit.",
    415: "Another Content-Type, or a Content-Encoding.",
    422: "The one image of the request has no score.",
    429: "Busy: retry after Retry-After seconds.",
    431: "Too many bytes of headers.",
    500: "Scoring failed.",
    503: "Too many connections, or not ready.",
    504: "No scores in time.",
}


def errors(*codes: int, model: type[BaseModel] = Error) -> dict[int | str, dict[str, Any]]:
    """Error answers for `responses=` of a route."""
    return {code: {"model": model, "description": _TEXTS[code]} for code in codes}


def body(content: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A required request body for `openapi_extra=` of a route: media type → schema."""
    return {"requestBody": {"required": True, "content": {kind: {"schema": each} for kind, each in content.items()}}}


def infer_body(image_size: int) -> dict[str, Any]:
    """The JSON of an infer request. A schema can't say that `data` have as many elements as `shape`."""
    sides = [{"const": side} for side in (image_size, image_size, 3)]
    many, one = {"type": "integer", "minimum": 1}, {"const": 1}
    files = {"type": "array", "minItems": 1, "items": {"anyOf": [BASE64, _array(BASE64, 1, 1)]}}
    image = _tensor("image", "BYTES", {**_array(one, 1, 2), "prefixItems": [many]}, files)
    values = {"type": "array", "minItems": 1, "description": "Integers from 0 to 255, flat or nested as the shape is."}
    pixels = _tensor("pixels", "UINT8", {**_array({}, 4, 4), "prefixItems": [many, *sides]}, values)
    output = {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"enum": ["score", "status", "reason"]}, "parameters": _parameters("binary_data")},
    }
    return {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": ["string", "null"]},
            "inputs": _array({"oneOf": [image, pixels]}, 1, 1),
            "outputs": {**_array(output, 0, 3), "description": "Each at most once; without any, all."},
            "parameters": _parameters("binary_data_output"),
        },
    }


def _tensor(name: str, datatype: str, shape: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    properties = {"name": {"const": name}, "datatype": {"const": datatype}, "shape": shape, "data": data}
    return {
        "type": "object",
        "required": ["name", "datatype", "shape", "data"],
        "properties": {**properties, "parameters": _parameters()},
    }


def _array(items: dict[str, Any], least: int, most: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def _parameters(*flags: str) -> dict[str, Any]:
    """Any parameters but those of what is not supported; `flags` are true or false."""
    unknown = {"not": {"pattern": "^shared_memory|^classification$|^binary_data_size$"}}
    return {"type": "object", "properties": {name: {"type": "boolean"} for name in flags}, "propertyNames": unknown}


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """A model's schema in one piece, since FastAPI collects the definitions only of what it reads itself."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})
    return cast("dict[str, Any]", _inlined(schema, parts))


def _inlined(schema: Any, parts: dict[str, Any]) -> Any:
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inlined(parts[schema["$ref"].rsplit("/", 1)[-1]], parts)
        return {key: _inlined(value, parts) for key, value in schema.items()}
    return [_inlined(value, parts) for value in schema] if isinstance(schema, list) else schema


INFER_BINARY: dict[str, Any] = {
    "type": "string",
    "format": "binary",
    "description": "The JSON, whose input has the parameter binary_data_size in place of data, then the binary data.",
}
MULTIPART: dict[str, Any] = {
    "type": "object",
    "additionalProperties": {"not": {"enum": [[], None]}},
    "minProperties": 1,
    "description": "Every part is an image file, whatever its field is called; a field may have several.",
}
INFER_HEADER: dict[str, Any] = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "required": False,
    "description": "Bytes of JSON at the beginning of the body; binary data follow.",
    "schema": {"type": "integer", "minimum": 1},
}
