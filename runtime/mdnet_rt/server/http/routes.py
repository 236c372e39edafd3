"""The endpoints as a FastAPI application, with the OpenAPI document of what they really take and give."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from mdnet_rt.server.http import schema
from mdnet_rt.server.http.app import HeadAsGet, Service, answer_json
from mdnet_rt.server.http.kserve import VERSION
from mdnet_rt.server.http.schema import body, errors, schema_of
from mdnet_rt.server.metrics import CONTENT_TYPE, Metrics

_READING = (400, 408, 413, 415, 429, 431, 500, 503, 504)


def make_app(service: Service, metrics: Metrics) -> FastAPI:
    """The application; `Counted` around it counts its answers."""
    app = FastAPI(
        title="MD-Net",
        version=version("mdnet"),
        description="Scores of face photographs, on the bundle's rating scale.",
        docs_url=None,  # both pages load their scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_page(app, service)
    _add_health(app, service, metrics)
    _add_score(app, service)
    _add_protocol(app, service)
    app.add_exception_handler(HTTPException, _no_such_thing)
    app.add_middleware(HeadAsGet)
    return app


def _add_page(app: FastAPI, service: Service) -> None:
    @app.get("/", response_class=Response, responses={200: {"content": {"text/html": {}}}})
    async def page() -> Response:
        """A page to try it: choose photographs, see their scores."""
        return service.page()


def _add_health(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.get("/healthz", response_model=schema.Health, responses=errors(503))
    async def healthz() -> Response:
        """Liveness: whether the model's thread runs. True while draining."""
        return _health({"status": "alive"}, service.alive)

    @app.get("/readyz", response_model=schema.Health, responses=errors(503))
    async def readyz() -> Response:
        """Readiness: false from the moment the server gets the signal to stop."""
        return _health({"status": "ready"}, service.ready)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(metrics.page(), headers={"content-type": CONTENT_TYPE})


def _add_score(app: FastAPI, service: Service) -> None:
    media_types = {
        "image/*": schema.FILE,
        "application/octet-stream": schema.FILE,
        "multipart/form-data": schema.MULTIPART,
        "application/json": schema_of(schema.Images),
    }

    @app.post(
        "/score",
        response_model=schema.ScoreAnswer,
        responses={**errors(*_READING), **errors(422, model=schema.NoScore)},
        openapi_extra=body(media_types),
    )
    @service.watched
    async def score(request: Request) -> Response:
        """Score one image file (the body as it is) or several (multipart, whatever the fields' names, or JSON)."""
        return await service.score(request)


def _add_protocol(app: FastAPI, service: Service) -> None:
    """The Open Inference Protocol, version 2."""

    @app.get("/v2", response_model=schema.ServerMetadata)
    async def server_metadata() -> Response:
        """What this server is."""
        return answer_json({"name": "mdnet-rt", "version": app.version, "extensions": ["binary_tensor_data"]})

    @app.get("/v2/health/live", response_model=schema.Live, responses=errors(503))
    async def live() -> Response:
        """Liveness, as /healthz."""
        return _health({"live": True}, service.alive)

    @app.get("/v2/health/ready", response_model=schema.Ready, responses=errors(503))
    async def ready() -> Response:
        """Readiness, as /readyz."""
        return _health({"ready": True}, service.ready)

    for path, names in (("/v2/models/{name}", ["name"]), ("/v2/models/{name}/versions/{version}", ["name", "version"])):
        _add_model(app, service, path, names)


def _add_model(app: FastAPI, service: Service, path: str, names: list[str]) -> None:
    known = {"name": service.model_name, "version": VERSION}
    in_path: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "enum": [known[name]]}}
        for name in names
    ]

    def get(suffix: str, model: Any, *codes: int) -> Any:
        return app.get(
            path + suffix, response_model=model, responses=errors(404, *codes), openapi_extra={"parameters": in_path}
        )

    @get("", schema.ModelMetadata)
    @service.watched
    async def metadata(request: Request) -> Response:
        """The model's inputs and outputs."""
        service.check_model(request)
        return answer_json(service.metadata())

    @get("/ready", schema.ModelReady, 503)
    @service.watched
    async def ready(request: Request) -> Response:
        """Whether the model can be used: as /readyz."""
        service.check_model(request)
        return _health({"name": request.path_params["name"], "ready": True}, service.ready)

    media_types = {
        "application/json": schema.infer_body(service.image_size),
        "application/octet-stream": schema.INFER_BINARY,
    }

    @app.post(
        path + "/infer",
        response_model=schema.InferAnswer,
        responses={
            200: {"content": {"application/octet-stream": {"schema": schema.FILE}}},
            **errors(404, 422, *_READING),
        },
        openapi_extra={**body(media_types), "parameters": [*in_path, schema.INFER_HEADER]},
    )
    @service.watched
    async def infer(request: Request) -> Response:
        """Score image files (input `image`) or preprocessed pixels (input `pixels`), as JSON or with binary data."""
        return await service.infer(request)


def _health(content: dict[str, Any], fine: bool) -> Response:
    return answer_json(content) if fine else answer_json({"error": "not ready"}, 503)


async def _no_such_thing(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = f"{error.detail}: {request.method} {request.url.path}; GET /openapi.json lists what there is"
    return answer_json({"error": text}, error.status_code, error.headers)
