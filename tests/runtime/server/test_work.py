"""The server under load it can't take, with a model that a test can stop: bounded, quick, nothing lost."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from mdnet_engines.bundle.files import read_manifest
from mdnet_engines.errors import MDNetError
from mdnet_rt.images.face_crop import face_finder
from mdnet_rt.images.preprocess import load_image
from mdnet_rt.server import large
from mdnet_rt.server.http.app import Counted, Service
from mdnet_rt.server.http.routes import make_app
from mdnet_rt.server.metrics import Metrics
from mdnet_rt.server.settings import Settings
from mdnet_rt.server.work import Work

DEADLINE = 60
SIZE = 32


class Model:
    """Scores an image by its first value; stops while it is told to, fails when it is told to."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.batches: list[int] = []
        self.failing = False
        self.seconds = 0.0

    def score(self, images: np.ndarray) -> np.ndarray:
        self.batches.append(len(images))
        assert self.go.wait(DEADLINE)
        time.sleep(self.seconds)
        if self.failing:
            raise MDNetError("out of order")
        return images[:, 0, 0, 0].astype(np.float32)


class Lab:
    """A server without sockets, and its parts."""

    def __init__(self, client: httpx.AsyncClient, model: Model, service: Service, work: Work, metrics: Metrics):
        self.client, self.model, self.service, self.work, self.metrics = client, model, service, work, metrics

    async def score(self, image: bytes) -> httpx.Response:
        return await self.client.post("/score", content=image, headers={"content-type": "image/png"})

    def start(self, image: bytes) -> asyncio.Task[httpx.Response]:
        return asyncio.create_task(self.score(image))

    async def load(self, images: int) -> None:
        """Wait until so many images are under way."""
        await self.until(lambda: self.work.load == images)

    async def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < end
            await asyncio.sleep(0.005)


@pytest.fixture
def run(shared_bundle: Path) -> Callable[..., None]:
    """Run a test's coroutine with a lab of these settings."""
    manifest = read_manifest(shared_bundle)

    @contextlib.asynccontextmanager
    async def lab(settings: Settings, face: float | None) -> AsyncIterator[Lab]:
        model, metrics = Model(), Metrics(max_batch=settings.max_batch)
        work = Work(model.score, SIZE, settings, metrics, face=face)
        service = Service(manifest, "onnxruntime-cpu", work, settings, metrics, tell=lambda line: None)
        transport = httpx.ASGITransport(Counted(make_app(service, metrics), metrics))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=DEADLINE) as client:
            yield Lab(client, model, service, work, metrics)
        model.go.set()
        work.close()
        await asyncio.sleep(0)  # what the threads have handed over
        assert work.load == 0

    def start(test: Callable[[Lab], Awaitable[None]], *, face: float | None = None, **settings: object) -> None:
        async def whole() -> None:
            async with lab(Settings(**settings), face) as made:
                await asyncio.wait_for(test(made), DEADLINE)

        asyncio.run(whole())

    return start


@pytest.fixture
def images(photo: Callable[..., Path]) -> list[bytes]:
    return [photo(f"{seed}.png", seed=seed).read_bytes() for seed in range(12)]


def first_value(image: bytes) -> float:
    return float(load_image(image, SIZE)[0, 0, 0])


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def test_an_image_is_framed_as_in_training(run: Callable[..., None], images: list[bytes]) -> None:
    portrait = (Path(__file__).parents[2] / "data" / "portrait.jpg").read_bytes()
    expected = float(load_image(portrait, SIZE, find_box=face_finder(1.2))[0, 0, 0])
    assert expected != first_value(portrait)

    async def test(lab: Lab) -> None:
        assert (await lab.score(portrait)).json()["results"][0]["score"] == expected
        (nobody,) = (await lab.score(images[0])).json()["results"]
        assert (nobody["status"], nobody["reason"]) == ("no_face", "no face found")

    run(test, face=1.2)


def test_small_images_do_not_wait_for_large_ones(
    run: Callable[..., None], images: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large ones are held up for as long as the test likes."""
    held = threading.Event()
    decode = large._decode_in

    def late(*args: object) -> object:
        assert held.wait(DEADLINE)
        return decode(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(large, "_decode_in", late)
    bomb = encoded(Image.new("RGB", (2000, 2000), (9, 0, 0)), "PNG")

    async def test(lab: Lab) -> None:
        bombs = [lab.start(bomb) for _ in range(12)]
        await lab.load(12)
        for image in images:
            answer = await lab.score(image)
            assert answer.json()["results"][0]["score"] == pytest.approx(first_value(image))
        held.set()
        for each in await asyncio.gather(*bombs):
            assert each.json()["results"][0] == {"name": None, "status": "ok", "score": 9, "reason": "one flat colour"}

    run(test)


def test_images_of_more_than_25_megapixels_are_refused_by_default(
    run: Callable[..., None], png_declaring: Callable[[int, int], bytes]
) -> None:
    async def test(lab: Lab) -> None:
        answer = await lab.score(png_declaring(5001, 5000))
        assert answer.status_code == 422
        assert answer.json()["error"] == "5001x5000 pixels exceed the limit of 25000000"

    run(test)


def test_a_progressive_jpeg_of_many_scans_is_refused(run: Callable[..., None]) -> None:
    jpeg = encoded(Image.new("RGB", (64, 64), (90, 0, 0)), "JPEG", progressive=True)
    last = jpeg.rindex(b"\xff\xda")

    async def test(lab: Lab) -> None:
        assert (await lab.score(jpeg)).status_code == 200
        answer = await lab.score(jpeg[:last] + jpeg[last:-2] * 100 + jpeg[-2:])
        assert answer.json()["error"] == "a JPEG of more than 100 scans"

    run(test)


def test_the_warning_of_an_image_comes_with_its_score(run: Callable[..., None]) -> None:
    flat = encoded(Image.new("RGB", (40, 40), (77, 0, 0)), "PNG")

    async def test(lab: Lab) -> None:
        (result,) = (await lab.score(flat)).json()["results"]
        assert result == {"name": None, "status": "ok", "score": 77.0, "reason": "one flat colour"}

    run(test)


def test_a_full_queue_answers_429_at_once_and_what_was_let_in_is_answered(
    run: Callable[..., None], images: list[bytes]
) -> None:
    async def test(lab: Lab) -> None:
        lab.model.go.clear()
        accepted = [lab.start(image) for image in images[:4]]
        await lab.load(4)
        for image in images[4:]:
            refused = await lab.score(image)  # comes back while the model stands still
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"].startswith("busy: 4 images")
        lab.model.go.set()
        answers = await asyncio.gather(*accepted)
        assert [answer.status_code for answer in answers] == [200] * 4
        scores = [answer.json()["results"][0]["score"] for answer in answers]
        assert scores == [first_value(image) for image in images[:4]]
        assert (await lab.score(images[5])).status_code == 200

    run(test, max_queue=4, max_images=4, max_batch=2)


def test_a_request_of_several_images_is_let_in_whole_or_not_at_all(
    run: Callable[..., None], images: list[bytes]
) -> None:
    async def test(lab: Lab) -> None:
        lab.model.go.clear()
        first = lab.start(images[0])
        await lab.load(1)
        files = [("images", (str(i), image)) for i, image in enumerate(images[:4])]
        assert (await lab.client.post("/score", files=files)).status_code == 429
        assert lab.work.load == 1
        lab.model.go.set()
        assert (await first).status_code == 200
        assert (await lab.client.post("/score", files=files)).status_code == 200

    run(test, max_queue=4, max_images=4)


def test_a_queue_whose_last_score_would_come_too_late_is_full(run: Callable[..., None], images: list[bytes]) -> None:
    async def test(lab: Lab) -> None:
        lab.model.seconds = 0.05
        assert (await lab.score(images[0])).status_code == 200
        assert lab.work._seconds_per_image >= 0.05  # it has learnt
        lab.work._seconds_per_image = 5.0
        lab.model.go.clear()
        waiting = [lab.start(image) for image in images[:4]]
        await lab.load(4)
        files = [("images", (str(i), image)) for i, image in enumerate(images[4:10])]
        assert (await lab.client.post("/score", files=files)).status_code == 429  # the tenth would take 50 s
        lab.model.go.set()
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200] * 4

    run(test, score_timeout=40, max_batch=4)


def test_no_scores_in_time_is_504_and_images_not_begun_are_dropped(
    run: Callable[..., None], images: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    timeout, give_up = 50, []

    async def test(lab: Lab) -> None:
        loop = asyncio.get_running_loop()
        call_later = loop.call_later

        def noted(seconds: float, call: Callable[..., object], *args: object, **options: Any) -> asyncio.TimerHandle:
            if seconds == timeout:
                give_up.append(lambda: call(*args))
            return call_later(seconds, call, *args, **options)

        monkeypatch.setattr(loop, "call_later", noted)
        lab.model.go.clear()
        late = [lab.start(image) for image in images[:3]]
        await lab.until(lambda: lab.model.batches == [1] and lab.work._batcher._jobs.qsize() == 2)
        for each in give_up:  # as if the time were over
            each()
        assert [answer.status_code for answer in await asyncio.gather(*late)] == [504] * 3
        assert lab.work.load == 3  # still counted, as one is in the model and two in its queue
        lab.model.go.set()
        await lab.load(0)
        assert lab.model.batches == [1]
        assert b'mdnet_images_total{status="abandoned"} 2.0' in lab.metrics.page()
        assert (await lab.score(images[0])).status_code == 200

    run(test, score_timeout=timeout, max_batch=1)


def test_a_model_that_fails_is_500_and_the_next_request_is_scored(
    run: Callable[..., None], images: list[bytes]
) -> None:
    async def test(lab: Lab) -> None:
        lab.model.failing = True
        answer = await lab.score(images[0])
        assert (answer.status_code, answer.json()) == (500, {"error": "scoring failed: out of order"})
        lab.model.failing = False
        assert (await lab.score(images[0])).status_code == 200

    run(test)


def test_a_decoder_that_fails_unforeseen_leaves_the_queue_as_it_was(
    run: Callable[..., None], images: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(lab: Lab) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("mdnet_rt.server.work.decode", None)
            answer = await lab.score(images[0])
        assert answer.status_code == 500
        assert answer.json()["error"].startswith("scoring failed: unexpected TypeError")
        assert lab.work.load == 0
        assert (await lab.score(images[0])).status_code == 200

    run(test)


def test_each_request_of_a_batch_gets_its_own_scores(run: Callable[..., None], images: list[bytes]) -> None:
    async def test(lab: Lab) -> None:
        lab.model.go.clear()
        first = lab.start(images[0])
        await lab.load(1)
        several = [
            lab.client.post("/score", files=[("x", ("x", each)) for each in images[i : i + 3]]) for i in (1, 4, 7)
        ]
        tasks = [asyncio.create_task(each) for each in several]
        await lab.load(10)
        lab.model.go.set()
        await first
        for i, answer in zip((1, 4, 7), await asyncio.gather(*tasks), strict=True):
            scores = [result["score"] for result in answer.json()["results"]]
            assert scores == [first_value(image) for image in images[i : i + 3]]
        assert sum(lab.model.batches) == 10
        assert len(lab.model.batches) < 10  # some did share one

    run(test, max_batch=8)


def test_bodies_of_all_requests_together_are_bounded(run: Callable[..., None], images: list[bytes]) -> None:
    async def test(lab: Lab) -> None:
        lab.model.go.clear()
        waiting = [lab.start(image) for image in images[:2]]
        await lab.load(2)
        refused = await lab.score(images[2])
        assert refused.status_code == 429
        lab.model.go.set()
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200] * 2
        assert (await lab.score(images[2])).status_code == 200

    size = len(images[0])
    run(test, max_body=size + size // 5, max_held=2 * size + size // 2)


def test_draining_turns_readiness_off_and_nothing_else(run: Callable[..., None], images: list[bytes]) -> None:
    async def test(lab: Lab) -> None:
        paths = ("/readyz", "/v2/health/ready", "/v2/models/mdnet/ready")
        assert [(await lab.client.get(path)).status_code for path in paths] == [200] * 3
        lab.service.draining = True
        assert [(await lab.client.get(path)).status_code for path in paths] == [503] * 3
        assert [(await lab.client.get(path)).status_code for path in ("/healthz", "/v2/health/live")] == [200] * 2
        assert (await lab.score(images[0])).status_code == 200

    run(test)


def test_what_nobody_thought_of_is_500_and_one_line_to_the_operator(
    run: Callable[..., None], images: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(lab: Lab) -> None:
        lines: list[str] = []
        monkeypatch.setattr(lab.service, "_tell", lines.append)
        monkeypatch.setattr(lab.work, "score", None)
        answer = await lab.score(images[0])
        assert (answer.status_code, answer.json()) == (500, {"error": "internal error"})
        (line,) = lines
        assert line.startswith("error: unexpected TypeError in /score: ")

    run(test)
