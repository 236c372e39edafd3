"""What the endpoints do. Handlers take the request as it is and read its body themselves, bounded."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from fastapi import Request, Response

from mdnet_engines.bundle.manifest import Manifest
from mdnet_engines.errors import first_line
from mdnet_rt.rows.result import Stamp
from mdnet_rt.server.http import kserve
from mdnet_rt.server.http.bodies import Bodies, Upload, find_uploads
from mdnet_rt.server.http.page import make_page
from mdnet_rt.server.metrics import Metrics
from mdnet_rt.server.settings import Settings
from mdnet_rt.server.wire import ClientLeftError, RefusedError, wire_of
from mdnet_rt.server.work import Outcome, Work

_LEFT = 499  # nginx's number for a client that left; only in the metrics, as nobody sees it
_ENDPOINTS = {"/": "page", "/score": "score", "/healthz": "health", "/readyz": "health", "/metrics": "metrics"}
_SCORED = ("score", "infer")

Handler = Callable[[Request], Awaitable[Response]]


class Service:
    """What the endpoints share.

    Args:
        manifest: of the bundle that `work` scores with.
        backend: what runs its graphs, in words.
        tell: called with one line where the server itself is at fault.
    """

    def __init__(
        self,
        manifest: Manifest,
        backend: str,
        work: Work,
        settings: Settings,
        metrics: Metrics,
        tell: Callable[[str], None],
    ):
        self.draining = False
        self._work, self._settings, self._metrics, self._tell = work, settings, metrics, tell
        self._bodies = Bodies(settings)
        self.stamp = Stamp.of(manifest)
        self._page, self._page_headers = make_page(manifest, backend)
        metrics.watch(
            "mdnet_held_bytes", "Bodies of all requests that are being read or scored.", lambda: self._bodies.held
        )

    @property
    def ready(self) -> bool:
        """Whether new requests are welcome."""
        return self._work.alive and not self.draining

    @property
    def model_name(self) -> str:
        """The one model's, in the paths of the Open Inference Protocol."""
        return self._settings.model_name

    @property
    def image_size(self) -> int:
        """Side of the images that its graphs take."""
        return self._work.image_size

    def page(self) -> Response:
        """GET /."""
        return Response(self._page, headers=self._page_headers)

    @property
    def alive(self) -> bool:
        """Whether this process can still score."""
        return self._work.alive

    async def score(self, request: Request) -> Response:
        """POST /score."""
        headers, wire = _headers(request), wire_of(request.scope)
        with self._bodies.hold() as hold:
            self._admit(wire.failure)
            body = await hold.read(headers, request.receive, wire)
            kind = headers.get(b"content-type", b"").decode("latin-1")
            if kind.startswith("image/") and body:  # nothing to take apart
                uploads = [Upload(None, body)]
            else:
                uploads = await self._work.in_pool(find_uploads, kind, body, self._settings.max_images)
            del body
            outcomes = await self._work.score([upload.data for upload in uploads], wire)
        return self._answer(uploads, outcomes)

    async def infer(self, request: Request) -> Response:
        """POST /v2/models/NAME/infer."""
        self.check_model(request)
        headers, wire = _headers(request), wire_of(request.scope)
        with self._bodies.hold() as hold:
            self._admit(wire.failure)
            body = await hold.read(headers, request.receive, wire)
            wanted = await self._work.in_pool(
                kserve.read_request,
                body,
                headers.get(kserve.HEADER),
                self._work.image_size,
                self._settings.max_images,
            )
            del body
            outcomes = await self._work.score(wanted.payloads, wire)
        if len(outcomes) == 1 and outcomes[0].score is None:
            raise RefusedError(422, outcomes[0].reason or outcomes[0].status)
        content, answer_headers = kserve.write_answer(wanted, outcomes, self._settings.model_name)
        return Response(content, headers=answer_headers)

    def check_model(self, request: Request) -> None:
        """Raise `RefusedError` (404) unless the path names the model there is."""
        name, wanted = request.path_params["name"], request.path_params.get("version", kserve.VERSION)
        if (name, wanted) != (self._settings.model_name, kserve.VERSION):
            raise RefusedError(404, f"the model here is {self._settings.model_name}, version {kserve.VERSION}")

    def metadata(self) -> dict[str, Any]:
        """The model, to the Open Inference Protocol."""
        return kserve.model_metadata(self._settings.model_name, self._work.image_size)

    def watched(self, handler: Handler) -> Handler:
        """Turn a handler's exceptions into answers."""

        async def endpoint(request: Request) -> Response:
            try:
                return await handler(request)
            except RefusedError as refused:
                return _refusal(refused)
            except ClientLeftError:
                return Response(status_code=_LEFT)  # to a closed connection
            except Exception as error:
                self._tell(f"error: unexpected {type(error).__name__} in {request.url.path}: {first_line(error)}")
                return answer_json({"error": "internal error"}, 500)

        endpoint.__doc__, endpoint.__name__ = handler.__doc__, handler.__name__
        return endpoint

    def _admit(self, failure: RefusedError | None) -> None:
        if failure is not None:
            raise failure
        self._work.check_room()

    def _answer(self, uploads: Sequence[Upload], outcomes: Sequence[Outcome]) -> Response:
        results = [
            {"name": upload.name, "status": outcome.status, "score": outcome.score, "reason": outcome.reason}
            for upload, outcome in zip(uploads, outcomes, strict=True)
        ]
        answer: dict[str, Any] = {"results": results, "model": self.stamp.model, "bundle": self.stamp.bundle}
        if len(outcomes) == 1 and outcomes[0].score is None:
            return answer_json({**answer, "error": outcomes[0].reason}, 422)
        return answer_json(answer)


class HeadAsGet:
    """An ASGI application that answers HEAD as GET, without the body."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def without_body(message: Mapping[str, Any]) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app({**scope, "method": "GET"}, receive, without_body)


class Counted:
    """An ASGI application whose answers are counted and, where they were scored, timed."""

    def __init__(self, app: Any, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), _LEFT

        async def counted(message: Mapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            endpoint = _endpoint(scope["path"])
            self._metrics.requests.labels(endpoint, str(status)).inc()
            if endpoint in _SCORED and status == 200:
                self._metrics.request_seconds.observe(time.monotonic() - start)


def _endpoint(path: str) -> str:
    """The label of a path: a few, whatever clients ask for."""
    if path.startswith("/v2"):
        return "infer" if path.endswith("/infer") else "protocol"
    return _ENDPOINTS.get(path, "other")


def answer_json(content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON; NaN is refused, since JSON has no NaN."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return Response(text, status, headers, media_type="application/json")


def _refusal(refused: RefusedError) -> Response:
    headers = {"retry-after": str(refused.retry_after)} if refused.retry_after else {}
    if refused.close:
        headers["connection"] = "close"
    return answer_json({"error": refused.reason}, refused.status, headers)


def _headers(request: Request) -> dict[bytes, bytes]:
    return dict(request.scope["headers"])
