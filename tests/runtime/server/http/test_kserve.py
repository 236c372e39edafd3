"""The Open Inference Protocol: what its clients send is understood, and what does not fit is told of."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Server, serving
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from mdnet_rt.images.preprocess import ImageError, load_image
from mdnet_rt.server.http import kserve
from mdnet_rt.server.wire import RefusedError
from mdnet_rt.server.work import Outcome

SIZE = 32
Expected = Callable[[np.ndarray], float]


@pytest.fixture(scope="module")
def server(shared_bundle: Path) -> Iterator[Server]:
    with serving(shared_bundle, "--max-images", 8) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with InferenceServerClient(f"127.0.0.1:{server.port}") as made:
        yield made


@pytest.fixture
def files(photo: Callable[..., Path]) -> list[bytes]:
    return [photo(f"{seed}.png", seed=seed).read_bytes() for seed in range(3)]


@pytest.fixture
def pixels(files: list[bytes]) -> np.ndarray:
    return np.stack([load_image(file, SIZE) for file in files])


@pytest.fixture
def scores(pixels: np.ndarray, expected_score: Expected) -> list[float]:
    return [expected_score(image) for image in pixels]


def tensor(name: str, array: np.ndarray, datatype: str, *, binary: bool) -> Any:
    made = InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


# With Triton's client.


def test_tritonclient_finds_server_and_model(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("mdnet")
    assert client.is_model_ready("mdnet", "1")
    assert not client.is_model_ready("mdnet", "2")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("mdnet", "1")
    assert {each["name"]: (each["datatype"], each["shape"]) for each in metadata["inputs"]} == {
        "image": ("BYTES", [-1]),
        "pixels": ("UINT8", [-1, SIZE, SIZE, 3]),
    }
    assert metadata["outputs"][0] == {"name": "score", "datatype": "FP32", "shape": [-1]}


@pytest.mark.parametrize("binary_out", [False, True])
@pytest.mark.parametrize("kind", ["image", "pixels binary", "pixels json", "image as base64 json"])
def test_tritonclient_gets_scores_whatever_way_tensors_travel(
    client: Any, files: list[bytes], pixels: np.ndarray, scores: list[float], kind: str, binary_out: bool
) -> None:
    given = {
        "image": lambda: tensor("image", np.array(files, np.object_), "BYTES", binary=True),
        "image as base64 json": lambda: tensor(
            "image", np.array([base64.b64encode(file) for file in files], np.object_), "BYTES", binary=False
        ),
        "pixels binary": lambda: tensor("pixels", pixels, "UINT8", binary=True),
        "pixels json": lambda: tensor("pixels", pixels, "UINT8", binary=False),
    }[kind]()
    wanted = [InferRequestedOutput("score", binary_data=binary_out)]
    result = client.infer("mdnet", [given], outputs=wanted, request_id="r-1", model_version="1")
    got = result.as_numpy("score")
    assert (got.dtype, got.shape) == (np.float32, (3,))
    np.testing.assert_allclose(got, scores, atol=1e-5)
    assert result.get_response()["id"] == "r-1"
    assert [output["name"] for output in result.get_response()["outputs"]] == ["score"]


def test_tritonclient_gets_all_outputs_by_default_and_each_image_its_status(
    client: Any, files: list[bytes], scores: list[float]
) -> None:
    given = tensor("image", np.array([files[0], b"text", files[2]], np.object_)[:, None], "BYTES", binary=True)
    for as_binary in (True, False):
        result = client.infer("mdnet", [given], outputs=None if as_binary else _wanted("score", "status", "reason"))
        got = result.as_numpy("score")
        assert np.isnan(got).tolist() == [False, True, False]
        np.testing.assert_allclose(got[[0, 2]], [scores[0], scores[2]], atol=1e-5)
        statuses = [text if isinstance(text, str) else text.decode() for text in result.as_numpy("status")]
        assert statuses == ["ok", "unreadable", "ok"]
        assert "not an image" in str(result.as_numpy("reason")[1])


def _wanted(*names: str) -> list[Any]:
    return [InferRequestedOutput(name, binary_data=False) for name in names]


def test_tritonclient_reads_our_errors(client: Any, files: list[bytes]) -> None:
    good = tensor("image", np.array(files, np.object_), "BYTES", binary=True)
    one_bad = tensor("image", np.array([b"text"], np.object_), "BYTES", binary=True)
    many = tensor("image", np.array(files * 3, np.object_), "BYTES", binary=True)
    for request, status, text in (
        (lambda: client.infer("mdnet", [one_bad]), "422", "not an image"),
        (lambda: client.infer("mdnet", [good, good]), "400", "one input"),
        (lambda: client.infer("mdnet", [many]), "413", "at most 8"),
        (lambda: client.infer("other", [good]), "404", "the model here is mdnet"),
        (lambda: client.infer("mdnet", [good], outputs=_wanted("logits")), "400", "the outputs are score, status"),
        (lambda: client.infer("mdnet", [good], request_compression_algorithm="gzip"), "415", "Content-Encoding"),
    ):
        with pytest.raises(InferenceServerException, match=text) as caught:
            request()
        assert caught.value.status() == status


# Without it.


def infer(server: Server, document: dict[str, Any]) -> Any:
    return server.request("POST", "/v2/models/mdnet/infer", json.dumps(document).encode())


def test_json_alone_is_enough(server: Server, files: list[bytes], pixels: np.ndarray, scores: list[float]) -> None:
    data = [base64.b64encode(file).decode() for file in files]
    images = {"name": "image", "datatype": "BYTES", "shape": [3], "data": data}
    nested = {"name": "pixels", "datatype": "UINT8", "shape": list(pixels.shape), "data": pixels.tolist()}
    flat = {**nested, "data": pixels.reshape(-1).tolist()}
    for given in (images, nested, flat):
        answer = infer(server, {"id": "7", "inputs": [given]})
        assert answer.status == 200
        assert (answer.json["model_name"], answer.json["model_version"], answer.json["id"]) == ("mdnet", "1", "7")
        outputs = {output["name"]: output for output in answer.json["outputs"]}
        assert outputs["score"]["data"] == pytest.approx(scores, abs=1e-5)
        assert outputs["status"]["data"] == ["ok"] * 3


PIXELS: dict[str, Any] = {"name": "pixels", "datatype": "UINT8", "shape": [1, 2, 2, 3], "data": [0] * 12}
IMAGE: dict[str, Any] = {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["aaaa"]}


@pytest.mark.parametrize(
    "document",
    [
        [],
        {},
        {"inputs": []},
        {"inputs": {}},
        {"inputs": [None]},
        {"inputs": [PIXELS, IMAGE]},
        {"inputs": [{}]},
        {"inputs": [{**IMAGE, "name": "picture"}]},
        {"inputs": [{**IMAGE, "name": ["image"]}]},
        {"inputs": [{**IMAGE, "shape": [2]}]},
        {"inputs": [{**IMAGE, "shape": [0], "data": []}]},
        {"inputs": [{**IMAGE, "shape": [-1]}]},
        {"inputs": [{**IMAGE, "shape": [True]}]},
        {"inputs": [{**IMAGE, "shape": []}]},
        {"inputs": [{**IMAGE, "shape": [1, 2]}]},
        {"inputs": [{**IMAGE, "shape": "1"}]},
        {"inputs": [{**IMAGE, "datatype": "UINT8"}]},
        {"inputs": [{**IMAGE, "data": [1]}]},
        {"inputs": [{**IMAGE, "data": "aaaa"}]},
        {"inputs": [{**IMAGE, "data": None}]},
        {"inputs": [{**IMAGE, "parameters": []}]},
        {"inputs": [{**IMAGE, "parameters": {"binary_data_size": 4}}]},
        {"inputs": [{**IMAGE, "parameters": {"shared_memory_region": "x"}}]},
        {"inputs": [{**PIXELS, "shape": [1, 2, 3, 2]}]},
        {"inputs": [{**PIXELS, "data": [0] * 11}]},
        {"inputs": [{**PIXELS, "data": [256] + [0] * 11}]},
        {"inputs": [{**PIXELS, "data": [-1] + [0] * 11}]},
        {"inputs": [{**PIXELS, "data": [0.5] + [0] * 11}]},
        {"inputs": [{**PIXELS, "data": [None] + [0] * 11}]},
        {"inputs": [{**PIXELS, "data": ["x" * 100] + [0] * 11}]},
        {"inputs": [{**PIXELS, "data": ["7"] * 12}]},
        {"inputs": [{**PIXELS, "data": [True] * 12}]},
        {"inputs": [{**PIXELS, "data": [[[["7"] * 3] * 2] * 2]}]},
        {"inputs": [{**PIXELS, "data": [10**400] + [0] * 11}]},
        {"inputs": [{**PIXELS, "data": [[0], [0, 0]]}]},
        {"inputs": [{**PIXELS, "data": {"0": 0}}]},
        {"inputs": [{**PIXELS, "shape": [1, 2, 2, 3], "datatype": "FP32"}]},
        {"inputs": [IMAGE], "id": 7},
        {"inputs": [IMAGE], "parameters": 1},
        {"inputs": [IMAGE], "parameters": {"binary_data_output": 1}},
        {"inputs": [IMAGE], "outputs": [{"name": "logits"}]},
        {"inputs": [IMAGE], "outputs": [{"name": {}}]},
        {"inputs": [IMAGE], "outputs": [{"name": "score"}, {"name": "score"}]},
        {"inputs": [IMAGE], "outputs": [{"name": "score", "parameters": {"classification": 2}}]},
        {"inputs": [IMAGE], "outputs": "score"},
    ],
)
def test_a_document_that_does_not_fit_is_400(document: Any) -> None:
    with pytest.raises(RefusedError) as caught:
        kserve.read_request(json.dumps(document).encode(), None, 2, 8)
    assert caught.value.status == 400


def binary(given: dict[str, Any], data: bytes, *, declared: int | None = None) -> tuple[bytes, bytes]:
    """A body with binary data, and the length of its JSON."""
    size = len(data) if declared is None else declared
    tensor = {key: value for key, value in given.items() if key != "data"} | {"parameters": {"binary_data_size": size}}
    text = json.dumps({"inputs": [tensor]}).encode()
    return text + data, str(len(text)).encode()


def test_binary_data_are_read_as_they_lie() -> None:
    two = {**IMAGE, "shape": [2]}
    body, length = binary(two, struct.pack("<I", 3) + b"abc" + struct.pack("<I", 0))
    assert kserve.read_request(body, length, 2, 8).payloads == [b"abc", b""]
    body, length = binary(PIXELS, bytes(range(12)))
    (image,) = kserve.read_request(body, length, 2, 8).payloads
    assert isinstance(image, np.ndarray)
    assert image.tolist() == np.arange(12).reshape(2, 2, 3).tolist()


@pytest.mark.parametrize(
    ("given", "data", "declared", "length"),
    [
        (PIXELS, bytes(11), None, None),
        (PIXELS, bytes(12), 11, None),
        (PIXELS, bytes(12), 13, None),
        (PIXELS, bytes(12), -12, None),
        (PIXELS, bytes(12), None, b"0"),
        (PIXELS, bytes(12), None, b"-1"),
        (PIXELS, bytes(12), None, b"9999999"),
        (PIXELS, bytes(12), None, b"9" * 5000),
        (PIXELS, bytes(12), None, b"x"),
        (PIXELS, bytes(12), None, b"10"),
        (IMAGE, b"\4\0\0\0abc", None, None),
        (IMAGE, b"\4\0\0", None, None),
        (IMAGE, b"\xff\xff\xff\xff", None, None),
        (IMAGE, b"", None, None),
        (IMAGE, bytes(4 * 1_000_000), None, None),  # a million empty files where one was announced
    ],
)
def test_binary_data_that_do_not_fit_are_400(
    given: dict[str, Any], data: bytes, declared: int | None, length: bytes | None
) -> None:
    body, true_length = binary(given, data, declared=declared)
    with pytest.raises(RefusedError) as caught:
        kserve.read_request(body, length or true_length, 2, 8)
    assert caught.value.status == 400


@pytest.mark.parametrize("size", [32, 224, 256])
@pytest.mark.parametrize("nested", [False, True])
def test_json_holds_the_pixels_of_an_image_and_little_more(
    size: int, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), np.uint8)

    def body(count: int) -> bytes:
        data = np.repeat(pixels, count, axis=0)
        tensor = {"name": "pixels", "datatype": "UINT8", "shape": list(data.shape)}
        return json.dumps({"inputs": [{**tensor, "data": (data if nested else data.ravel()).tolist()}]}).encode()

    (found,) = kserve.read_request(body(1), None, size, 64).payloads
    np.testing.assert_array_equal(found, pixels[0])
    many = body(2 if size > 128 else 40)
    monkeypatch.setattr("mdnet_rt.server.http.bodies.from_json", None)  # it is refused before it is parsed
    with pytest.raises(RefusedError, match="values in the JSON") as caught:
        kserve.read_request(many, None, size, 64)
    assert caught.value.status == 413


@pytest.mark.parametrize("unit", [b"[]", b"{}", b"[[[1]]]", b'{"a":1}', b"1"])
def test_json_of_small_parts_is_bounded_by_their_number(unit: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdnet_rt.server.http.bodies.from_json", None)
    body = b"[" + b",".join([unit] * (kserve.max_values(224) + 1)) + b"]"
    with pytest.raises(RefusedError, match="values in the JSON"):
        kserve.read_request(body, None, 224, 64)


def test_json_of_too_many_values_is_not_parsed() -> None:
    with pytest.raises(RefusedError) as caught:
        kserve.read_request(b"[" + b"0," * kserve.max_values(2) + b"0]", None, 2, 8)
    assert caught.value.status == 413


def test_base64_that_is_none_is_its_images_failure() -> None:
    (bad,) = kserve.read_request(json.dumps({"inputs": [{**IMAGE, "data": ["!"]}]}).encode(), None, 2, 8).payloads
    assert isinstance(bad, ImageError)


def test_an_answer_has_the_outputs_in_the_order_they_were_asked_for() -> None:
    request = kserve.InferRequest([], [("reason", True), ("score", False), ("status", True)], None)
    body, headers = kserve.write_answer(request, [Outcome(2.5), Outcome(None, "unreadable", "é")], "mdnet")
    length = int(headers["inference-header-content-length"])
    document = json.loads(body[:length])
    assert [output["name"] for output in document["outputs"]] == ["reason", "score", "status"]
    assert document["outputs"][1]["data"] == [2.5, None]
    sizes = [output.get("parameters", {}).get("binary_data_size", 0) for output in document["outputs"]]
    blob = body[length:]
    assert blob[: sizes[0]] == b"\0\0\0\0" + b"\2\0\0\0" + "é".encode()
    assert blob[sizes[0] :] == b"\2\0\0\0ok" + b"\x0a\0\0\0unreadable"
    assert sum(sizes) == len(blob)
    assert "id" not in document
