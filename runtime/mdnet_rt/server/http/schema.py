"""Requests and answers as OpenAPI documents them. Nothing is validated by these: bodies are read by hand, bounded."""

from __future__ import annotations

from typing import Any, Literal, cast

from pydantic import BaseModel, Field


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


class Images(BaseModel):
    """A JSON body of `/score`: image files as base64."""

    images: list[str] = Field(min_length=1, json_schema_extra={"items": {"type": "string", "format": "byte"}})


class Tensor(BaseModel):
    """A tensor of the Open Inference Protocol."""

    name: str
    datatype: Literal["BYTES", "UINT8", "FP32"]
    shape: list[int]
    parameters: dict[str, Any] = {}
    data: list[Any] | None = Field(None, description="Absent where the tensor is binary data behind the JSON.")


class WantedOutput(BaseModel):
    """An output that is asked for."""

    name: Literal["score", "status", "reason"]
    parameters: dict[str, Any] = {}


class InferBody(BaseModel):
    """An infer request; as binary data follow it where a header says so, its type is then application/octet-stream."""

    id: str | None = None
    inputs: list[Tensor] = Field(min_length=1, max_length=1)
    outputs: list[WantedOutput] = []
    parameters: dict[str, Any] = {}


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
    429: "Busy: come again after Retry-After seconds.",
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


FILE: dict[str, Any] = {"type": "string", "format": "binary"}
MULTIPART: dict[str, Any] = {
    "type": "object",
    "additionalProperties": {"type": "array", "items": FILE},
    "minProperties": 1,
}
INFER_HEADER: dict[str, Any] = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "required": False,
    "description": "Bytes of JSON at the beginning of the body; binary data follow.",
    "schema": {"type": "integer", "minimum": 1},
}
