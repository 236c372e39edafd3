"""The operators in ONNX Runtime with the native library registered, against the float64 reference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from scan_cases import (
    CUDA_TOLERANCE,
    EVERY_CASE,
    NUMPY_TYPES,
    REFUSED,
    REFUSED_CASE,
    Refusal,
    ScanCase,
    assert_close,
    make_inputs,
    reference_scan,
)
from scan_model import model, operator_of, run

from mdnet_engines.errors import MDNetError
from mdnet_engines.ops import native
from mdnet_engines.ops import selective_scan as scan_op
from mdnet_engines.sessions.onnxruntime import OrtSession, cuda_problem

pytestmark = pytest.mark.skipif(
    native.custom_op_library() is None, reason="mdnet was installed without its native library"
)

BOTH = (scan_op.FORWARD, scan_op.REVERSE)
QUIET = 4


def session(
    proto: onnx.ModelProto,
    *,
    threads: int = 2,
    profile: Path | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = QUIET
    options.register_custom_ops_library(str(native.custom_op_library()))
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile / "profile")
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=list(providers))


@pytest.fixture(scope="module")
def sessions() -> dict[tuple[str, str], onnxruntime.InferenceSession]:
    return {(name, dtype): session(model(name, dtype)) for name in BOTH for dtype in NUMPY_TYPES}


@pytest.mark.parametrize("case", EVERY_CASE, ids=lambda case: case.name)
def test_agrees_with_the_reference(case: ScanCase, sessions: dict) -> None:
    inputs = make_inputs(case)
    got = run(sessions[operator_of(case), case.dtype], inputs)
    assert_close(got, reference_scan(**inputs, reverse=case.reverse), case.dtype)


def executed(profiled: onnxruntime.InferenceSession) -> dict[str, str]:
    """The operators whose kernels ran, and on which provider."""
    events = json.loads(Path(profiled.end_profiling()).read_text())
    kernels = [event["args"] for event in events if event.get("args", {}).get("op_name")]
    return {kernel["op_name"]: kernel["provider"] for kernel in kernels}


@pytest.mark.parametrize("name", BOTH)
def test_the_native_kernel_runs_although_the_file_has_a_function_body(name: str, tmp_path: Path) -> None:
    profiled = session(model(name), profile=tmp_path)
    run(profiled, make_inputs(REFUSED_CASE))
    assert executed(profiled) == {name: "CPUExecutionProvider"}


@pytest.mark.parametrize("refusal", REFUSED, ids=lambda refusal: refusal.name)
def test_what_makes_no_sense_is_refused_in_words(refusal: Refusal) -> None:
    proto = model(scan_op.FORWARD)
    for value in proto.graph.input:
        value.type.tensor_type.ClearField("shape")  # or ONNX Runtime itself refuses another number of axes
    with pytest.raises(Exception, match="SelectiveScan") as error:  # its exceptions share no base class of their own
        run(session(proto), refusal.spoil(make_inputs(REFUSED_CASE)))
    for words in refusal.says:
        assert words in str(error.value)


@pytest.mark.parametrize("kind", ["DOUBLE", "INT64"])
@pytest.mark.parametrize("name", scan_op.INPUTS)
def test_a_type_without_a_kernel_is_refused_when_loading(name: str, kind: str) -> None:
    proto = model(scan_op.FORWARD)
    (value,) = (value for value in proto.graph.input if value.name == name)
    value.type.tensor_type.elem_type = onnx.TensorProto.DataType.Value(kind)
    with pytest.raises(Exception, match=f"tensor\\({kind.lower()}\\)|[Tt]ype"):
        session(proto)


def test_the_number_of_threads_changes_no_bit() -> None:
    inputs = make_inputs(ScanCase("threads", batch=3, channels=100, length=70, states=16, reverse=False))
    one, *others = (run(session(model(scan_op.FORWARD), threads=threads), inputs) for threads in (1, 2, 5))
    for other in others:
        np.testing.assert_array_equal(one, other)


def test_one_session_serves_many_threads(sessions: dict) -> None:
    shared = sessions[scan_op.REVERSE, "float32"]
    calls = [make_inputs(ScanCase("many", 1 + i % 3, 40, 33, 16, reverse=True), seed=i) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda inputs: run(shared, inputs), calls))
    for inputs, got in zip(calls, results, strict=True):
        assert_close(got, reference_scan(**inputs, reverse=True))


def test_our_session_registers_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    register = onnxruntime.SessionOptions.register_custom_ops_library
    monkeypatch.setattr(
        onnxruntime.SessionOptions,
        "register_custom_ops_library",
        lambda options, library: (seen.append(library), register(options, library)),
    )
    onnx.save(model(scan_op.FORWARD), tmp_path / "scan.onnx")
    inputs = make_inputs(REFUSED_CASE)
    got = OrtSession(tmp_path / "scan.onnx").run(inputs)["y"]
    assert_close(got, reference_scan(**inputs))
    assert seen == [str(native.custom_op_library())]


def test_our_session_does_without_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mdnet_engines.__path__", [str(tmp_path)])
    native._say_it_once.cache_clear()
    onnx.save(model(scan_op.FORWARD), tmp_path / "scan.onnx")
    inputs = make_inputs(REFUSED_CASE)
    for _ in range(2):
        assert_close(OrtSession(tmp_path / "scan.onnx").run(inputs)["y"], reference_scan(**inputs))
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # said once
    native._say_it_once.cache_clear()


def test_a_foreign_library_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdnet_engines.__path__", [str(tmp_path)])
    (tmp_path / "libmdnet_ops.so").write_bytes(b"of another machine")
    onnx.save(model(scan_op.FORWARD), tmp_path / "scan.onnx")
    with pytest.raises(MDNetError, match=r"libmdnet_ops\.so can't be loaded .*; install mdnet again") as error:
        OrtSession(tmp_path / "scan.onnx")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("case", EVERY_CASE, ids=lambda case: case.name)
def test_agrees_with_the_reference_on_cuda(case: ScanCase, tmp_path: Path) -> None:
    assert cuda_problem() == ""  # which also loads CUDA's libraries
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    name, inputs = operator_of(case), make_inputs(case)
    on_gpu = session(model(name, case.dtype), profile=tmp_path, providers=providers)
    expected = reference_scan(**inputs, reverse=case.reverse)
    assert_close(run(on_gpu, inputs), expected, case.dtype, CUDA_TOLERANCE)
    assert executed(on_gpu)[name] == "CUDAExecutionProvider"  # the library has a kernel for the CPU too
