"""Sessions on OpenVINO: NumPy's results in the arithmetic that was asked for, one-line errors, threads."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import scan_model
from onnx import TensorProto, helper, numpy_helper

from mdnet_engines.errors import MDNetError
from mdnet_engines.ops import selective_scan as scan_op
from mdnet_engines.sessions import openvino as openvino_session
from mdnet_engines.sessions.openvino import OpenVINOSession, is_installed
from mdnet_engines.system.cores import available_cores

openvino = pytest.importorskip("openvino", reason="needs the [openvino] extra")

NATIVE_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
WEIGHTS = np.arange(6, dtype=np.float32).reshape(3, 2)


def value(name: str, *shape: int | str, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    **constants: np.ndarray,
) -> onnx.ModelProto:
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def product() -> onnx.ModelProto:
    """product = x·W and total = x + a, for x and a [batch, 3]; the inputs' order is not the alphabet's."""
    return model(
        [helper.make_node("MatMul", ["x", "W"], ["product"]), helper.make_node("Add", ["x", "a"], ["total"])],
        [value("x", "batch", 3), value("a", "batch", 3)],
        [value("product", "batch", 2), value("total", "batch", 3)],
        W=WEIGHTS,
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


def assert_right(got: dict[str, np.ndarray], given: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(got["product"], given["x"] @ WEIGHTS, rtol=1e-6, atol=1e-6)  # sums of 3 products
    np.testing.assert_array_equal(got["total"], given["x"] + given["a"])


def test_names_and_results_are_the_graphs(file: Path) -> None:
    session = OpenVINOSession(file)
    assert session.inputs == ("x", "a")
    assert session.outputs == ("product", "total")
    given = feeds()
    got = session.run({**given, "another graph's": WEIGHTS})
    assert list(got) == ["product", "total"]
    assert_right(got, given)


def test_an_outputs_name_is_onnxs_where_openvino_has_several(tmp_path: Path) -> None:
    """What OpenVINO fuses becomes one tensor that has the names of all that went into it."""
    nodes = [helper.make_node("Squeeze", ["x", "last"], ["flat"]), helper.make_node("Add", ["flat", "one"], ["score"])]
    constants = {"last": np.array([1]), "one": np.float32(1)}
    onnx.save(model(nodes, [value("x", "batch", 1)], [value("score", "batch")], **constants), tmp_path / "fused.onnx")
    session = OpenVINOSession(tmp_path / "fused.onnx")
    assert session.outputs == ("score",)
    np.testing.assert_array_equal(session.run({"x": np.array([[1], [2]], np.float32)})["score"], [2, 3])


def test_identities_do_not_merge_names(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("Neg", ["same"], ["minus"]),
        helper.make_node("Identity", ["minus"], ["a"]),
    ]
    outputs = [value("a", "batch"), value("minus", "batch"), value("same", "batch")]
    onnx.save(model(nodes, [value("x", "batch")], outputs), tmp_path / "identities.onnx")
    session = OpenVINOSession(tmp_path / "identities.onnx")
    assert session.inputs == ("x",)
    assert session.outputs == ("a", "minus", "same")
    got = session.run({"x": np.array([1, 2], np.float32)})
    np.testing.assert_array_equal(np.stack([got[name] for name in session.outputs]), [[-1, -2], [-1, -2], [1, 2]])


def test_the_batch_may_change_between_runs(file: Path) -> None:
    session = OpenVINOSession(str(file))
    for batch in (1, 5, 2, 33):
        given = feeds(batch, seed=batch)
        assert_right(session.run(given), given)


def test_results_stay_as_they_are_when_the_session_runs_again(file: Path) -> None:
    session = OpenVINOSession(file)
    given = feeds()
    got = session.run(given)
    session.run(feeds(seed=1))
    assert_right(got, given)


def test_feeds_need_not_be_contiguous(file: Path) -> None:
    given = {"x": np.asfortranarray(feeds()["x"]), "a": feeds(6)["a"][::-3]}
    assert_right(OpenVINOSession(file).run(given), given)


def test_external_weights_are_found_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bundle").mkdir()
    file = tmp_path / "bundle" / "large.onnx"
    onnx.save(product(), file, save_as_external_data=True, location="large.onnx.data", size_threshold=0)
    assert file.with_name("large.onnx.data").stat().st_size >= WEIGHTS.nbytes
    monkeypatch.chdir(tmp_path)
    given = feeds()
    assert_right(OpenVINOSession("bundle/large.onnx").run(given), given)


# 64 rows and columns: large enough for the kernels that have a bf16 form.
LARGE = np.random.default_rng(7).standard_normal((64, 64)).astype(np.float32)


def linked_weights(tmp_path: Path) -> Path:
    """A graph and its weights as the Hugging Face cache has them: links to files of other names in another folder."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    onnx.save(product(), tmp_path / "g.onnx", save_as_external_data=True, location="g.onnx.data", size_threshold=0)
    for number, name in enumerate(("g.onnx", "g.onnx.data")):
        blob = (tmp_path / name).rename(tmp_path / "blobs" / str(number))
        (tmp_path / "snapshot" / name).symlink_to(blob)
    return tmp_path / "snapshot" / "g.onnx"


def test_weights_may_be_links_out_of_the_folder(tmp_path: Path) -> None:
    file = linked_weights(tmp_path)
    given = feeds()
    assert_right(OpenVINOSession(file).run(given), given)
    assert sorted(os.listdir(file.parent)) == ["g.onnx", "g.onnx.data"]


def test_where_linked_weights_get_no_second_name_the_way_out_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    file = linked_weights(tmp_path)
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(MDNetError, match=r"g\.onnx\.data is a link.*cp -rL") as error:
        OpenVINOSession(file)
    assert one_line(error)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    nodes = [helper.make_node("MatMul", ["x", "W"], ["h"]), helper.make_node("MatMul", ["h", "W"], ["y"])]
    onnx.save(model(nodes, [value("x", "batch", 64)], [value("y", "batch", 64)], W=LARGE), tmp_path / "large.onnx")
    return tmp_path / "large.onnx"


def relative_error(session: OpenVINOSession) -> float:
    x = np.random.default_rng(8).standard_normal((32, 64)).astype(np.float32)
    exact = x.astype(np.float64) @ LARGE.astype(np.float64) @ LARGE.astype(np.float64)
    return float(np.abs(session.run({"x": x})["y"] - exact).max() / np.abs(exact).max())


def test_float32_is_computed_in_float32(large: Path) -> None:
    """OpenVINO's own choice on a CPU with bf16 is bf16, whose rounding alone is 4e-3."""
    assert relative_error(OpenVINOSession(large)) < 1e-6


@pytest.mark.skipif(not NATIVE_BF16, reason="needs a CPU with native bf16")
def test_bf16_is_computed_in_bf16(large: Path) -> None:
    # Worse than float32 could be, and no worse than operands rounded to 8 bits: 2⁻⁹ each, which mostly cancel in sums.
    assert 1e-4 < relative_error(OpenVINOSession(large, arithmetic="bf16")) < 1e-2


def test_bf16_on_a_cpu_without_it_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32", "INT8"])
    with pytest.raises(MDNetError, match="no native bf16") as error:
        OpenVINOSession(file, arithmetic="bf16")
    assert one_line(error)
    OpenVINOSession(file)


@pytest.mark.parametrize(
    "arithmetic", ["f32", pytest.param("bf16", marks=pytest.mark.skipif(not NATIVE_BF16, reason="needs bf16"))]
)
def test_q_dq_pairs_compute_in_integers(arithmetic: Any, tmp_path: Path) -> None:
    """Against int64 arithmetic. Scales are powers of two, so that no float operation in the reference rounds."""
    x_scale, w_scale = np.float32(2**-5), np.float32(2**-6)
    random = np.random.default_rng(9)
    weights = random.integers(-64, 65, (64, 64), np.int8)  # 7 bits, as mdnet_calib.passes.int8 makes them
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["wq", "ws", "zero"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["y"]),
    ]
    proto = model(
        nodes, [value("x", "batch", 64)], [value("y", "batch", 64)], xs=x_scale, ws=w_scale, zero=np.int8(0), wq=weights
    )
    onnx.save(proto, tmp_path / "int8.onnx")
    x = random.standard_normal((5, 64)).astype(np.float32) * 2
    steps = np.clip(np.rint(x / x_scale), -128, 127).astype(np.int64)
    assert (np.abs(steps) == 127).any() or (steps == -128).any()  # saturation is part of it
    expected = (steps @ weights.astype(np.int64)) * (float(x_scale) * float(w_scale))
    got = OpenVINOSession(tmp_path / "int8.onnx", arithmetic=arithmetic).run({"x": x})["y"]
    # bf16 may round the result, never the sum.
    np.testing.assert_allclose(got, expected, rtol=2**-8 if arithmetic == "bf16" else 1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [scan_op.FORWARD, scan_op.REVERSE])
def test_a_graph_with_the_scan_stays_on_onnxruntime(name: str, tmp_path: Path) -> None:
    onnx.save(scan_model.model(name), tmp_path / "vim.onnx")
    with pytest.raises(MDNetError, match=r"vim\.onnx holds the selective scan.*ONNX Runtime") as error:
        OpenVINOSession(tmp_path / "vim.onnx")
    assert one_line(error)


def test_no_openvino_says_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_installed()
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert not is_installed()
    with pytest.raises(MDNetError) as error:
        OpenVINOSession(file)
    assert "install mdnet[openvino]" in one_line(error)


def _foreign() -> bytes:
    proto = product()
    proto.graph.node[0].op_type = "NoSuchOperator"
    return proto.SerializeToString()


BROKEN: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "not_onnx": lambda: b"<html>404</html>",
    "another_format": lambda: b'<?xml version="1.0"?><net name="Model0" version="11"><layers/><edges/></net>',
    "cut": lambda: product().SerializeToString()[:-40],
    "unknown_operator": _foreign,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_cannot_be_loaded_is_named(kind: str, file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file.write_bytes(BROKEN[kind]())
    with pytest.raises(MDNetError, match=r"can't load tiny\.onnx") as error:
        OpenVINOSession(file)
    assert ".cpp:" not in one_line(error)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["missing.onnx", "."])
def test_a_path_without_a_graph_is_an_error_of_ours(name: str, tmp_path: Path) -> None:
    with pytest.raises(MDNetError) as error:
        OpenVINOSession(tmp_path / name)
    assert one_line(error)


def test_a_missing_feed_is_named_with_what_was_given(file: Path) -> None:
    session = OpenVINOSession(file)
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
    """OpenVINO itself would convert another type."""
    session = OpenVINOSession(file)
    with pytest.raises(MDNetError) as error:
        session.run({**feeds(), "x": WRONG[kind]})
    assert "x takes float32 [any, 3]" in one_line(error)
    assert str(list(WRONG[kind].shape)) in one_line(error)
    assert len(session.run(feeds())["total"]) == 2  # it still works


def test_a_failure_inside_the_graph_is_one_line(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    session = OpenVINOSession(file)
    with pytest.raises(MDNetError, match="OpenVINO failed: ") as error:
        session.run({"x": feeds(2)["x"], "a": feeds(3)["a"]})
    assert one_line(error)
    assert capfd.readouterr() == ("", "")
    given = feeds()
    assert_right(session.run(given), given)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What OpenVINO was asked for, one dict of options for each session."""
    compile_model, seen = openvino.Core.compile_model, []

    def noted(self: Any, model: Any, device: str, options: dict[str, Any]) -> Any:
        seen.append({"device": device, **options})
        return compile_model(self, model, device, options)

    monkeypatch.setattr(openvino.Core, "compile_model", noted)
    return seen


def test_threads_are_as_asked(file: Path, asked: list[dict[str, Any]]) -> None:
    OpenVINOSession(file, threads=3)
    OpenVINOSession(file)
    assert [options["INFERENCE_NUM_THREADS"] for options in asked] == [3, available_cores()]
    assert {options["device"] for options in asked} == {"CPU"}


@pytest.mark.skipif(available_cores() < 2 or sys.platform != "linux", reason="needs Linux and two cores")
def test_running_moves_no_thread_to_other_cores(file: Path, tmp_path: Path) -> None:
    """Pinned threads would make several scorers on one machine share its first cores."""
    program = f"""
import os, numpy
from mdnet_engines.sessions.openvino import OpenVINOSession
feed = numpy.zeros((64, 3), numpy.float32)
OpenVINOSession({str(file)!r}, threads=2).run({{"x": feed, "a": feed}})
print(*{{tuple(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")}}, sep="\\n")
"""
    assert run_python(program, tmp_path).splitlines() == [str(tuple(os.sched_getaffinity(0)))]


def run_python(program: str, folder: Path) -> str:
    """What `program` prints in a process of its own, away from the repository, whose folders hide the packages."""
    return subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True
    ).stdout


def test_one_session_serves_several_threads(file: Path) -> None:
    session = OpenVINOSession(file, threads=1)

    def run(seed: int) -> None:
        given = feeds(batch=1 + seed % 7, seed=seed)
        assert_right(session.run(given), given)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(400)))


def test_first_runs_are_one_at_a_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    running: list[int] = []
    most: list[int] = []
    make = openvino.CompiledModel.create_infer_request

    def slowly(model: Any) -> Any:
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()
        return make(model)

    monkeypatch.setattr(openvino.CompiledModel, "create_infer_request", slowly)
    sessions = [OpenVINOSession(file, threads=1) for _ in range(2)]
    given = feeds()
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda session: session.run(given), sessions))
    assert most == [1, 1]
    for got in results:
        assert_right(got, given)


def test_nothing_of_the_export_is_imported(file: Path, tmp_path: Path) -> None:
    program = f"""
import sys
from mdnet_engines.sessions.openvino import OpenVINOSession
print("openvino" in sys.modules)
OpenVINOSession({str(file)!r})
print(*{{"torch", "onnx", "onnxruntime", "diffusers"}} & set(sys.modules))
"""
    assert run_python(program, tmp_path).split() == ["False"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mdnet" / "openvino"


def test_a_small_graphs_compiled_form_is_kept_and_is_the_same_graph(file: Path, cache: Path) -> None:
    first = OpenVINOSession(file)
    (kept,) = cache.iterdir()
    again, given = OpenVINOSession(file), feeds()
    assert list(cache.iterdir()) == [kept]
    assert (again.inputs, again.outputs) == (first.inputs, first.outputs)
    assert_right(again.run(given), given)
    changed = onnx.load(file)
    changed.graph.initializer[0].CopyFrom(numpy_helper.from_array(-WEIGHTS, "W"))
    onnx.save(changed, file)
    np.testing.assert_allclose(OpenVINOSession(file).run(given)["product"], -given["x"] @ WEIGHTS, rtol=1e-6, atol=1e-6)


def test_names_come_back_from_the_cache_where_openvino_merges_them(tmp_path: Path, cache: Path) -> None:
    nodes = [helper.make_node("Squeeze", ["x", "last"], ["flat"]), helper.make_node("Add", ["flat", "one"], ["score"])]
    constants = {"last": np.array([1]), "one": np.float32(1)}
    onnx.save(model(nodes, [value("x", "batch", 1)], [value("score", "batch")], **constants), tmp_path / "fused.onnx")
    sessions = [OpenVINOSession(tmp_path / "fused.onnx") for _ in range(2)]
    assert len(list(cache.iterdir())) == 1
    assert [session.outputs for session in sessions] == [("score",)] * 2


@pytest.mark.parametrize("damage", [lambda blob: blob[: len(blob) // 2], lambda blob: bytes(len(blob)), lambda _: b""])
def test_a_damaged_compiled_form_is_made_again(file: Path, cache: Path, damage: Callable[[bytes], bytes]) -> None:
    OpenVINOSession(file)
    (kept,) = cache.iterdir()
    kept.write_bytes(damage(kept.read_bytes()))
    given = feeds()
    assert_right(OpenVINOSession(file).run(given), given)


def test_a_large_graph_or_a_cache_that_cannot_be_made_goes_without(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_session, "_MAX_CACHED_BYTES", 10)
    OpenVINOSession(file)
    assert not cache.exists()
    monkeypatch.undo()
    cache.parent.parent.mkdir()
    cache.parent.touch()  # a file where the folder should be
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent.parent))
    given = feeds()
    assert_right(OpenVINOSession(file).run(given), given)


def test_opening_a_session_reports_to_nobody_and_starts_no_process(tmp_path: Path) -> None:
    """OpenVINO's telemetry would fork this process, and leave a child that a fork of ours then waits for."""
    program = f"""
import multiprocessing.process, sys
started = []
multiprocessing.process.BaseProcess.start = started.append
sys.path[:0] = {sys.path!r}
from mdnet_engines.sessions.openvino import _import_openvino
_import_openvino()
print(started, "openvino_telemetry" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "[] False\n", done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="of stacks for signals on Linux")
def test_signals_are_handled_after_sessions_have_gone(file: Path) -> None:
    """A Core for each session left the main thread a stack for signals that was unmapped: SIGSEGV at Ctrl-C."""
    program = f"""
import faulthandler, signal, sys
faulthandler.enable()  # as pytest does
sys.path[:0] = {sys.path!r}
from mdnet_engines.sessions.openvino import OpenVINOSession
first, second = OpenVINOSession({os.fspath(file)!r}), OpenVINOSession({os.fspath(file)!r})
del first
del second
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
signal.raise_signal(signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("handled\n", 0), done.stderr
