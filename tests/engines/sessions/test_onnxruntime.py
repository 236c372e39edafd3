"""Sessions on ONNX Runtime: the provider that was asked for, one-line errors, threads."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mdnet_engines.errors import MDNetError, UsageError
from mdnet_engines.sessions import cuda_provider
from mdnet_engines.sessions.onnxruntime import OrtSession, cuda_is_installed, cuda_problem, has_cuda
from mdnet_engines.system.gpu import Gpu

WEIGHTS = np.arange(6, dtype=np.float32).reshape(3, 2)


def value(name: str, *shape: int | str, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model(*nodes: onnx.NodeProto, inputs: list, outputs: list, constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(list(nodes), "tiny", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def product() -> onnx.ModelProto:
    """product = x·W and total = x + y, for x [batch, 3] and y [batch, 3]; the inputs' order is not the alphabet's."""
    return model(
        helper.make_node("MatMul", ["x", "W"], ["product"]),
        helper.make_node("Add", ["x", "a"], ["total"]),
        inputs=[value("x", "batch", 3), value("a", "batch", 3)],
        outputs=[value("product", "batch", 2), value("total", "batch", 3)],
        constants={"W": WEIGHTS},
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    onnx.save(product(), tmp_path / "tiny.onnx")
    return tmp_path / "tiny.onnx"


def feeds(batch: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal((batch, 3)).astype(np.float32) for name in ("x", "a")}


def one_line(error: pytest.ExceptionInfo[MDNetError]) -> str:
    (line,) = str(error.value).splitlines()
    return line


def test_names_and_results_are_the_graphs(file: Path) -> None:
    session = OrtSession(file)
    assert session.inputs == ("x", "a")
    assert session.outputs == ("product", "total")
    given = feeds()
    got = session.run(given)
    assert list(got) == ["product", "total"]
    np.testing.assert_allclose(got["product"], given["x"] @ WEIGHTS, rtol=1e-6, atol=1e-6)  # sums of 3 products
    np.testing.assert_array_equal(got["total"], given["x"] + given["a"])


def test_the_batch_may_change_between_runs(file: Path) -> None:
    session = OrtSession(str(file))
    assert [len(session.run(feeds(batch))["product"]) for batch in (1, 5, 2)] == [1, 5, 2]


def test_external_weights_are_found_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bundle").mkdir()
    file = tmp_path / "bundle" / "large.onnx"
    onnx.save(product(), file, save_as_external_data=True, location="large.onnx.data", size_threshold=0)
    monkeypatch.chdir(tmp_path)
    given = feeds()
    got = OrtSession("bundle/large.onnx").run(given)
    np.testing.assert_allclose(got["product"], given["x"] @ WEIGHTS, rtol=1e-6, atol=1e-6)


class Recorder:
    """Stands in for `InferenceSession`: makes a real one, on the CPU whatever was asked, and keeps what was asked."""

    def __init__(self) -> None:
        self.providers: list[str] = []
        self.provider_options: list[dict[str, str]] = []
        self.threads = 0
        self.settings: dict[str, Any] = {}
        self._make = onnxruntime.InferenceSession

    def __call__(
        self,
        path: str,
        options: onnxruntime.SessionOptions,
        providers: list[str | tuple[str, dict[str, str]]],
        **settings: Any,
    ) -> onnxruntime.InferenceSession:
        pairs = [(each, {}) if isinstance(each, str) else each for each in providers]
        self.providers, self.provider_options = [name for name, _ in pairs], [given for _, given in pairs]
        self.threads, self.settings = options.intra_op_num_threads, settings
        return self._make(path, options, providers=["CPUExecutionProvider"])


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(onnxruntime, "InferenceSession", recorder)
    return recorder


def test_the_cpu_backend_asks_for_the_cpu_alone(file: Path, recorder: Recorder) -> None:
    OrtSession(file, backend="onnxruntime-cpu")
    assert recorder.providers == ["CPUExecutionProvider"]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has all that the CUDA provider needs, as far as can be seen before a session is made."""
    monkeypatch.setattr(cuda_provider, "problem", lambda _: "")
    monkeypatch.setattr(onnxruntime, "set_default_logger_severity", lambda _: None)  # it is the process's


@pytest.mark.usefixtures("cuda")
def test_a_silent_fallback_to_the_cpu_is_refused(file: Path, recorder: Recorder) -> None:
    """ONNX Runtime comes up without CUDA, and raises nothing, when it can't load its provider."""
    with pytest.raises(MDNetError) as error:
        OrtSession(file, backend="onnxruntime-cuda")
    assert recorder.providers == ["CUDAExecutionProvider", "CPUExecutionProvider"]  # CUDA first
    assert "CUDAExecutionProvider" in one_line(error)
    assert "CPUExecutionProvider" in one_line(error)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("tf32", [False, True])
def test_cuda_does_not_tune_for_each_batch_size_and_rounds_no_factor_unasked(
    tf32: bool, file: Path, recorder: Recorder
) -> None:
    with pytest.raises(MDNetError):
        OrtSession(file, backend="onnxruntime-cuda", **({"tf32": True} if tf32 else {}))
    expected = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "1" if tf32 else "0"}
    assert recorder.provider_options == [expected, {}]


@pytest.mark.usefixtures("cuda")
def test_onnxruntime_is_not_left_to_fall_back_by_itself(file: Path, recorder: Recorder) -> None:
    """It would print what failed on CUDA to stdout, among the rows of scores."""
    with pytest.raises(MDNetError):
        OrtSession(file, backend="onnxruntime-cuda")
    assert recorder.settings == {"enable_fallback": 0}


@pytest.mark.usefixtures("cuda")
def test_what_cuda_says_when_a_session_is_made_is_the_error(
    file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("a.cc:1 f() CUDA failure 100: no CUDA-capable device is detected ; GPU=-1 ; hostname=h ; f")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(MDNetError, match=r"can't load tiny\.onnx: CUDA failure 100: no CUDA-capable device") as error:
        OrtSession(file, backend="onnxruntime-cuda")
    assert "see nvidia-smi" in one_line(error)
    assert capfd.readouterr() == ("", "")


def test_a_gpu_that_goes_away_during_a_run_is_one_line_with_the_next_step(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = OrtSession(file)

    def fail(*_: object) -> None:
        raise RuntimeError("b.cc:9 CUDA failure 999: unknown error ; GPU=0 ; hostname=h ; file=b.cc ; line=9 ; expr=x")

    monkeypatch.setattr(session.session, "run", fail)
    monkeypatch.setattr(session.session, "run_with_iobinding", fail)
    given = {name: session.upload(value) for name, value in feeds().items()}
    for run in (lambda: session.run(feeds()), lambda: session.run_there(given, session.outputs)):
        with pytest.raises(MDNetError) as error:
            run()
        words = "CUDA failure 999: unknown error; see nvidia-smi, and start again when it lists the GPU"
        assert one_line(error) == f"ONNX Runtime failed: {words}"


def test_cuda_on_a_cpu_only_onnxruntime_says_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MDNetError) as error:
        OrtSession(file, backend="onnxruntime-cuda")
    assert "install mdnet[cuda]" in one_line(error)
    assert "pip uninstall onnxruntime" in one_line(error)  # the two packages have the same import name


@pytest.mark.parametrize("gpu", [None, Gpu("H100", "sm_90", "13.0")])
@pytest.mark.parametrize("provider", [False, True])
def test_cuda_takes_the_provider_and_a_gpu(provider: bool, gpu: Gpu | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider alone is there wherever onnxruntime-gpu is installed. Libraries: test_cuda_provider.py."""
    known = [*(["CUDAExecutionProvider"] if provider else []), "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: known)
    monkeypatch.setattr(cuda_provider, "visible_gpu", lambda: gpu)
    assert has_cuda() == (provider and gpu is not None)
    assert has_cuda() == (not cuda_problem())
    assert cuda_is_installed() == provider
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert not has_cuda()
    assert not cuda_is_installed()
    assert "install mdnet[cpu]" in cuda_problem()


def test_no_onnxruntime_says_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MDNetError) as error:
        OrtSession(file)
    assert "install mdnet[cpu]" in one_line(error)


def test_an_unknown_backend_is_bad_usage_and_names_the_known(file: Path) -> None:
    with pytest.raises(UsageError) as error:
        OrtSession(file, backend="tpu")  # type: ignore[arg-type]
    assert "'tpu'" in one_line(error)
    assert "onnxruntime-cpu" in one_line(error)
    assert "onnxruntime-cuda" in one_line(error)


def _foreign() -> bytes:
    proto = product()
    proto.graph.node[0].op_type = "NoSuchOperator"
    return proto.SerializeToString()


def _too_new() -> bytes:
    proto = product()
    proto.opset_import[0].version = 999
    return proto.SerializeToString()


BROKEN: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "not_onnx": lambda: b"<html>404</html>",
    "cut": lambda: product().SerializeToString()[:-40],
    "unknown_operator": _foreign,
    "newer_opset": _too_new,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_cannot_be_loaded_is_named(kind: str, file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file.write_bytes(BROKEN[kind]())
    with pytest.raises(MDNetError, match=r"can't load tiny\.onnx") as error:
        OrtSession(file)
    assert one_line(error)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["missing.onnx", "."])
def test_a_path_without_a_graph_is_an_error_of_ours(name: str, tmp_path: Path) -> None:
    with pytest.raises(MDNetError) as error:
        OrtSession(tmp_path / name)
    assert one_line(error)


def test_a_missing_feed_is_named_with_what_was_given(file: Path) -> None:
    session = OrtSession(file)
    with pytest.raises(MDNetError) as error:
        session.run({"x": feeds()["x"], "tokens": feeds()["a"]})
    assert "'a'" in one_line(error)
    assert "tokens" in one_line(error)


WRONG = {
    "size": np.zeros((2, 4), np.float32),
    "rank": np.zeros((2, 3, 1), np.float32),
    "float64": np.zeros((2, 3), np.float64),
    "uint8": np.zeros((2, 3), np.uint8),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_feed_of_the_wrong_shape_or_type_is_refused(kind: str, file: Path) -> None:
    session = OrtSession(file)
    with pytest.raises(MDNetError) as error:
        session.run({**feeds(), "x": WRONG[kind]})
    assert "x" in one_line(error)
    assert len(session.run(feeds())["total"]) == 2  # it still works


def test_a_failure_inside_the_graph_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing comes from ONNX Runtime's own log beside the error."""
    proto = model(
        helper.make_node("Reshape", ["x", "four"], ["y"]),
        inputs=[value("x", "batch")],
        outputs=[value("y", 4)],
        constants={"four": np.array([4], np.int64)},
    )
    onnx.save(proto, tmp_path / "reshape.onnx")
    session = OrtSession(tmp_path / "reshape.onnx")
    with pytest.raises(MDNetError) as error:
        session.run({"x": np.zeros(5, np.float32)})
    assert "Reshape" in one_line(error)
    assert capfd.readouterr().err == ""


def test_onnxruntimes_warnings_are_not_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    proto = product()
    proto.graph.initializer.append(numpy_helper.from_array(WEIGHTS, "unused"))  # it warns about these
    onnx.save(proto, tmp_path / "warns.onnx")
    OrtSession(tmp_path / "warns.onnx").run(feeds())
    assert capfd.readouterr() == ("", "")


def test_threads_are_as_asked(file: Path, recorder: Recorder) -> None:
    OrtSession(file, threads=3)
    assert recorder.threads == 3


def test_threads_are_by_default_the_cores_of_this_process(
    file: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's own default counts the machine's cores, which a container may not have."""
    monkeypatch.setattr("mdnet_engines.sessions.onnxruntime.available_cores", lambda: 3)
    OrtSession(file)
    assert recorder.threads == 3


def test_one_session_serves_several_threads(file: Path) -> None:
    session = OrtSession(file, threads=1)

    def run(seed: int) -> bool:
        given = feeds(batch=1 + seed % 7, seed=seed)
        got = session.run(given)
        return np.array_equal(got["total"], given["x"] + given["a"]) and np.allclose(
            got["product"], given["x"] @ WEIGHTS, rtol=1e-6, atol=1e-6
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(400)))


def test_a_run_on_the_device_gives_what_a_run_gives_and_takes_back_what_it_gave(file: Path) -> None:
    session = OrtSession(file)
    given = feeds(5)
    there = {name: session.upload(value) for name, value in given.items()}
    outputs = session.run_there(there, ["total", "product"])
    assert list(outputs) == ["total", "product"]
    expected = session.run(given)
    for name, value in outputs.items():
        np.testing.assert_array_equal(value.numpy(), expected[name])
    again = session.run_there({"x": outputs["total"], "a": there["a"]}, ["total"], to_host=True)
    np.testing.assert_array_equal(again["total"].numpy(), given["x"] + given["a"] + given["a"])


def test_a_run_on_the_device_names_a_missing_feed_and_refuses_another_shape(file: Path) -> None:
    session = OrtSession(file)
    given = {name: session.upload(value) for name, value in feeds().items()}
    with pytest.raises(MDNetError) as error:
        session.run_there({"x": given["x"]}, ["total"])
    assert "'a'" in one_line(error)
    with pytest.raises(MDNetError) as error:
        session.run_there({**given, "x": session.upload(WRONG["size"])}, ["total"])
    assert "x" in one_line(error)


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The entries that a session's options are given."""
    given: dict[str, str] = {}

    class Options(onnxruntime.SessionOptions):  # type: ignore[misc]
        def add_session_config_entry(self, key: str, value: str) -> None:
            given[key] = value
            super().add_session_config_entry(key, value)

    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    return given


@pytest.mark.parametrize(("megabytes", "spins"), [(0, "0"), (7, "0"), (8, "1")])
@pytest.mark.parametrize("name", ["graph.onnx", "graph.cpu.onnx"])
def test_threads_spin_within_a_run_of_a_large_graph_and_never_between_runs(
    name: str, megabytes: int, spins: str, file: Path, entries: dict[str, str], tmp_path: Path
) -> None:
    """What is large is told by the weights, which both forms of a graph share."""
    graph = tmp_path / name
    graph.write_bytes(file.read_bytes())
    if megabytes:
        with (tmp_path / "graph.onnx.data").open("wb") as weights:
            weights.truncate(megabytes << 20)
    session = OrtSession(graph)
    assert entries["session.intra_op.allow_spinning"] == spins
    assert entries["session.force_spinning_stop"] == "1"
    keeps_one_block = session.session.get_session_options().enable_mem_pattern
    assert keeps_one_block == (spins == "0")  # which takes memory that only large graphs have much of
