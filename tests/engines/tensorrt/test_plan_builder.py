"""The process that builds plans: what it asks of TensorRT, and that no failure in there is more than a line out here.

TensorRT-RTX is real, and builds without a GPU. TensorRT 11 is NVIDIA's bindings with a stand-in for its builder
(tests/support/tensorrt_stand_in.py): no plan of it has been built or run here.
"""

from __future__ import annotations

import errno
import functools
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_hosts
from onnx import helper, numpy_helper
from recorded import Recorded
from small_bundle import describe, write_small_bundle

from mdnet_engines.bundle.files import Bundle
from mdnet_engines.bundle.manifest import GRAPH_NAMES, BatchRange
from mdnet_engines.errors import MDNetError, UsageError
from mdnet_engines.ops.scan_shapes import VARIANTS
from mdnet_engines.system.gpu import Gpu
from mdnet_engines.tensorrt import plan_process, plans
from mdnet_engines.tensorrt.builder_callbacks import BuilderProgress
from mdnet_engines.tensorrt.plan_process import build_plans, probe
from mdnet_engines.tensorrt.plans import Host, check_plans, plan_path, plans_folder

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the [rtx] extra (Linux and Windows on x86-64)"
)
FIRST, SECOND = "encoder", "vim"  # graphs, in the order they are built
PLANS = sorted(f"{name}.plan" for name in GRAPH_NAMES)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(write_small_bundle(tmp_path / "mdnet-bundle"))


host_of = functools.cache(probe)  # the same in all tests that have the real TensorRT-RTX, or the stand-in's GPU


def use(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Give the processes that are started from here on this environment."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return environment


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if reason := tensorrt_hosts.missing():
        pytest.skip(reason)
    return tensorrt_hosts.tensorrt_11(tmp_path_factory.mktemp("tensorrt"))


@pytest.fixture
def tensorrt(stand_in: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """TensorRT 11 and its GPU, from here on."""
    return use({**stand_in, "STAND_IN_NOTES": str(tmp_path / "notes.jsonl")}, monkeypatch)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def untouched(bundle: Bundle) -> bool:
    return names(bundle.path) == sorted(["manifest.json", "probes.npz", *(f"{n}.onnx" for n in GRAPH_NAMES)]) and (
        Bundle.open(bundle.path).manifest == bundle.manifest
    )


def test_the_parent_imports_nothing_that_it_does_not_need() -> None:
    code = "import sys, mdnet_engines.tensorrt.plan_process; print(*sys.modules, sep='\\n')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    imported = result.stdout.split()
    assert "mdnet_engines.tensorrt.plan_process" in imported
    heavy = ("tensorrt", "cuda", "nvidia", "torch", "onnx", "diffusers", "onnxruntime")
    assert not [module for module in imported if module.split(".")[0].startswith(heavy)]


# ------------------------------------------------------------------------------------------------------- TensorRT-RTX

# In a plan of TensorRT-RTX 1.7, bytes 24 to 27 are its version, and byte 32 has a bit for each compute capability it is
# for, and one for all later ones. NVIDIA does not document it: read from plans that were each built for one capability.
CAPABILITY_BITS = {"sm_80": 0x02, "sm_86": 0x04, "sm_89": 0x08, "sm_120": 0x10, "sm_121": 0x20, "later": 0x40}


@needs_rtx
@pytest.mark.parametrize(
    ("wanted", "folder", "capabilities"),
    [
        ([], "portable", list(CAPABILITY_BITS)),
        (["sm_89"], "sm_89", ["sm_89"]),
        (["sm_120", "sm_86", "sm_120"], "sm_86-sm_120", ["sm_86", "sm_120"]),
    ],
)
def test_rtx_builds_for_what_it_was_asked(
    wanted: list[str], folder: str, capabilities: list[str], bundle: Bundle
) -> None:
    host = host_of("tensorrt-rtx")
    built = build_plans(bundle, host, targets=wanted)
    assert built.engines.folder == f"tensorrt-rtx-{host.version}-{folder}"
    opened = Bundle.open(bundle.path)
    assert opened.manifest.engines == [built.engines]
    check_plans(opened, built.engines)
    assert names(plans_folder(opened, built.engines)) == sorted([*PLANS, "engine.json", "layers.json"])
    for name in GRAPH_NAMES:
        plan = plan_path(opened, built.engines, name).read_bytes()
        if host.version.startswith("1.7."):
            assert plan[24:28] == bytes(map(int, host.version.split(".")))
            assert plan[32] == sum(CAPABILITY_BITS[capability] for capability in capabilities)


@needs_rtx
def test_plans_are_built_of_a_bundle_of_links(bundle: Bundle, tmp_path: Path) -> None:
    """As the Hugging Face cache lays it out: the files by their hashes, graphs and weights apart."""
    (tmp_path / "blobs").mkdir()
    encoder = bundle.path / "encoder.onnx"
    onnx.save(onnx.load(encoder), encoder, save_as_external_data=True, location="encoder.onnx.data", size_threshold=0)
    document = json.loads((bundle.path / "manifest.json").read_text())
    document["graphs"]["encoder"]["file"] = describe(encoder)
    document["graphs"]["encoder"]["data"] = [describe(bundle.path / "encoder.onnx.data")]
    (bundle.path / "manifest.json").write_text(json.dumps(document))
    for file in bundle.path.glob("*.onnx*"):
        blob = tmp_path / "blobs" / describe(file)["sha256"]
        file.rename(blob)
        file.symlink_to(blob)
    assert build_plans(Bundle.open(bundle.path), host_of("tensorrt-rtx")).record is not None


@needs_rtx
def test_the_layers_are_saved_with_their_types(bundle: Bundle) -> None:
    built = build_plans(bundle, host_of("tensorrt-rtx"))
    saved = json.loads((plans_folder(bundle, built.engines) / "layers.json").read_text())
    assert saved["of"] == "network"
    assert built.record is not None
    for name in GRAPH_NAMES:
        assert len(saved["graphs"][name]) == built.record["graphs"][name]["layers"]
    kinds = [layer["type"] for layer in saved["graphs"]["encoder"]]
    assert {"CAST", "REDUCE", "ELEMENTWISE"} <= set(kinds)
    cast = saved["graphs"]["encoder"][kinds.index("CAST")]
    assert cast["outputs"] == ["FLOAT [-1, 64, 64, 3]"]


@needs_rtx
def test_plans_that_are_there_are_left_until_something_changes(bundle: Bundle) -> None:
    host = host_of("tensorrt-rtx")
    built = build_plans(bundle, host)
    assert built.record is not None
    assert build_plans(built.bundle, host).record is None
    forced = build_plans(built.bundle, host, force=True)
    assert forced.record is not None
    batch = BatchRange(minimum=1, optimum=4, maximum=64)
    changed = build_plans(forced.bundle, host, batch=batch)
    assert changed.record is not None
    assert [engines.batch for engines in Bundle.open(bundle.path).manifest.engines] == [batch]
    with plan_path(bundle, changed.engines, "vim").open("r+b") as stream:
        stream.truncate(100)
    assert build_plans(changed.bundle, host, batch=batch).record is not None


@needs_rtx
def test_rtx_takes_a_profile_for_each_size_that_plans_are_tuned_for(bundle: Bundle) -> None:
    host = host_of("tensorrt-rtx")
    one = build_plans(bundle, host)
    batch = BatchRange(minimum=1, optimum=1, further_optima=[8, 32], maximum=32)
    three = build_plans(one.bundle, host, batch=batch)
    assert three.record is not None
    assert three.record["batch"]["further_optima"] == [8, 32]
    for name in GRAPH_NAMES:  # each profile has kernels of its own
        assert three.engines.plans[name].file.size > 1.5 * one.engines.plans[name].file.size
    assert build_plans(three.bundle, host, batch=batch).record is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"level": 3}, "same plan at every --level"),
        ({"compatible": True}, "on its own version alone"),
        ({"stripped": True}, "only where there is a GPU"),
    ],
)
def test_what_rtx_does_not_build_is_refused_before_anything_is_built(
    options: dict[str, Any], words: str, bundle: Bundle
) -> None:
    with pytest.raises(MDNetError, match=words) as caught:
        build_plans(bundle, Host("tensorrt-rtx", "1.7.1.116", targets=("sm_89",)), **options)
    assert str(caught.value).isprintable()
    assert untouched(bundle)


RTX_SCRIPT = """
import sys
import tensorrt_rtx as trt
from mdnet_engines.tensorrt.builder_callbacks import make_logger

logger = make_logger(trt)
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(sys.argv[1])
config = builder.create_builder_config()
for flag in sys.argv[2:]:
    config.set_flag(getattr(trt.BuilderFlag, flag))
print(builder.build_serialized_network(network, config) is not None, logger.first_error)
"""


@needs_rtx
def test_why_stripped_and_compatible_plans_of_rtx_are_refused(tmp_path: Path) -> None:
    """Without a GPU it strips no weights of a product, and the package has no lean runtime to put into a plan."""
    if host_of("tensorrt-rtx").gpu or not host_of("tensorrt-rtx").version.startswith("1.7."):
        pytest.skip("of TensorRT-RTX 1.7 on a machine without a GPU")
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4, 64]) for name in ("x", "y")]
    weights = numpy_helper.from_array(np.ones((64, 64), np.float32), "weights")
    product = helper.make_node("MatMul", ["x", "weights"], ["y"])
    graph = helper.make_graph([product], "product", values[:1], values[1:], [weights])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "g.onnx")

    def build(*flags: str) -> str:
        command = [sys.executable, "-c", RTX_SCRIPT, str(tmp_path / "g.onnx"), *flags]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    assert build().startswith("True")
    assert build("STRIP_PLAN", "REFIT_IDENTICAL").startswith("False")
    assert "libnvinfer_lean" in build("VERSION_COMPATIBLE")


@needs_rtx
@pytest.mark.parametrize("damage", [b"not ONNX", b"\x08\x08\x12"], ids=["text", "cut"])
def test_a_graph_that_does_not_parse_is_one_line(damage: bytes, bundle: Bundle) -> None:
    """Past the hashes, that is: `Bundle.open` would have refused it."""
    (bundle.path / f"{SECOND}.onnx").write_bytes(damage)
    with pytest.raises(MDNetError, match="TensorRT-RTX can't read the graph vim: ") as caught:
        build_plans(bundle, host_of("tensorrt-rtx"))
    assert str(caught.value).isprintable()
    assert not (bundle.path / "engines").exists()


@needs_rtx
def test_a_workspace_that_is_too_small_says_which_option_to_change(bundle: Bundle) -> None:
    with pytest.raises(MDNetError, match=r"can't build .*--workspace") as caught:
        build_plans(bundle, host_of("tensorrt-rtx"), targets=["sm_86"], workspace_gib=1e-9)
    assert str(caught.value).isprintable()
    assert untouched(bundle)


@needs_rtx
@pytest.mark.parametrize(("target", "words"), [("sm_90", "has no sm_90"), ("nonsense", "has no nonsense")])
def test_a_target_that_rtx_has_not_is_bad_usage(target: str, words: str, bundle: Bundle) -> None:
    with pytest.raises(UsageError, match=words):
        build_plans(bundle, host_of("tensorrt-rtx"), targets=["sm_89", target])


def test_current_needs_a_gpu_to_be_current(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="no NVIDIA GPU"):
        build_plans(bundle, Host("tensorrt-rtx", "1.7.1.116", targets=("sm_89",)), targets=["current"])


# --------------------------------------------------------------------------------------------------------- TensorRT 11


def test_the_gpu_is_the_drivers(tensorrt: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    host = probe("tensorrt")
    assert (host.problem, host.gpu and host.gpu.sm, host.gpu and host.gpu.name) == ("", "sm_90", "Stub GPU")
    assert int(host.version.split(".")[0]) >= 11
    assert plan_process.default_host() == host
    monkeypatch.setenv("STUB_GPU", "120")
    gpu = probe("tensorrt").gpu
    assert gpu is not None
    assert gpu.sm == "sm_120"
    monkeypatch.delenv("STUB_GPU")
    assert probe("tensorrt").gpu is None
    assert plan_process.default_host() is None


def test_tensorrt_is_asked_for_what_the_user_asked(tensorrt: dict[str, str], bundle: Bundle) -> None:
    batch = BatchRange(minimum=1, optimum=4, maximum=16)
    built = build_plans(bundle, host_of("tensorrt"), batch=batch, workspace_gib=0.5)
    (builder,) = tensorrt_hosts.notes(tensorrt, "Builder")
    assert builder["plugins"] == sorted(["SelectiveScan", "SelectiveScanReverse", *VARIANTS])
    asked = {entry["graph"]: entry for entry in tensorrt_hosts.notes(tensorrt, "build")}
    assert list(asked) == list(GRAPH_NAMES)
    for entry in asked.values():
        assert entry["network"] == 1  # of NetworkDefinitionCreationFlag, strongly typed is the first
        assert entry["limits"] == {"WORKSPACE": 2**29}
        assert entry["flags"] == []  # no TF32: the bundle is fp32
        assert entry["cache"] == ""
    assert asked["encoder"]["profiles"] == [{"image": [[n, 64, 64, 3] for n in (1, 4, 16)]}]
    assert asked["fusion"]["profiles"] == [{name: [[n, 3] for n in (1, 4, 16)] for name in ("down", "tokens")}]

    engines, folder = built.engines, plans_folder(bundle, built.engines)
    assert engines.folder == f"tensorrt-{probe('tensorrt').version}-sm_90"
    assert (engines.gpu, engines.batch, engines.workspace_gib) == ("Stub GPU", batch, 0.5)
    assert engines.platform is not None
    assert names(folder) == sorted([*PLANS, "engine.json", "layers.json", "timing.cache"])
    assert (folder / "vim.plan").read_bytes() == b"plan of vim"
    assert json.loads((folder / "layers.json").read_text()) == {
        "of": "engine",
        "graphs": {name: {"Layers": [f"plan of {name}"]} for name in GRAPH_NAMES},
    }


def test_without_a_limit_none_is_set_and_tf32_is_for_bundles_that_are_not_fp32(
    tensorrt: dict[str, str], tmp_path: Path
) -> None:
    build_plans(Bundle.open(write_small_bundle(tmp_path / "half", precision="fp16")), host_of("tensorrt"))
    for entry in tensorrt_hosts.notes(tensorrt, "build"):
        assert entry["limits"] == {}
        assert entry["flags"] == ["TF32"]


def test_tensorrt_is_asked_for_each_option(tensorrt: dict[str, str], bundle: Bundle) -> None:
    batch = BatchRange(minimum=1, optimum=1, further_optima=[8, 16], maximum=32)
    plain = build_plans(bundle, host_of("tensorrt"))
    assert [(e["level"], e["hardware"]) for e in tensorrt_hosts.notes(tensorrt, "build")] == [(None, "NONE")] * 3
    built = build_plans(plain.bundle, host_of("tensorrt"), batch=batch, level=5, stripped=True, compatible=True)
    asked = tensorrt_hosts.notes(tensorrt, "build")[3:]
    for entry in asked:
        assert entry["flags"] == ["STRIP_PLAN", "REFIT_IDENTICAL", "VERSION_COMPATIBLE"]
        assert (entry["level"], entry["hardware"], entry["libraries"]) == (5, "AMPERE_PLUS", [])
    assert asked[0]["profiles"] == [
        {"image": [[n, 64, 64, 3] for n in sizes]} for sizes in ((1, 1, 1), (2, 8, 8), (9, 16, 32))
    ]
    read_back = [entry["host_code"] for entry in tensorrt_hosts.notes(tensorrt, "deserialize")]
    assert read_back == [False] * 3 + [True] * 3  # such a plan brings a runtime of its own, which is code for the CPU

    engines = built.engines
    assert engines.folder == f"tensorrt-{host_of('tensorrt').version}-portable"
    assert (engines.level, engines.stripped, engines.compatible, engines.batch) == (5, True, True, batch)
    assert built.bundle.manifest.engines == [plain.engines, engines]  # in folders of their own
    assert Bundle.open(bundle.path).manifest == built.bundle.manifest


def test_a_plugin_library_that_a_later_version_needs_goes_into_compatible_plans(
    tensorrt: dict[str, str], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(tensorrt_hosts.with_faults(tensorrt, libraries=True), monkeypatch)
    build_plans(bundle, host_of("tensorrt"), compatible=True)
    build_plans(bundle, host_of("tensorrt"))
    libraries = [entry["libraries"] for entry in tensorrt_hosts.notes(tensorrt, "build")]
    assert libraries == [["libnvinfer_vc_plugin.so.11"]] * 3 + [[]] * 3


def test_other_options_build_the_plans_anew_in_the_same_folder(tensorrt: dict[str, str], bundle: Bundle) -> None:
    host = host_of("tensorrt")
    for options in ({}, {"level": 2}, {"level": 0}, {"stripped": True}, {"stripped": True, "level": 0}):
        built = build_plans(bundle, host, **options)
        assert built.record is not None, options
        bundle = Bundle.open(built.bundle.path)
        assert bundle.manifest.engines == [built.engines]
        assert build_plans(bundle, host, **options).record is None, options


def test_compatible_plans_are_built_from_ampere_on(bundle: Bundle) -> None:
    turing = Host("tensorrt", "11.4.0.106", gpu=Gpu("T4", "sm_75", "13.0"))
    with pytest.raises(UsageError, match=r"from Ampere \(sm_80\) on, and this is sm_75"):
        build_plans(bundle, turing, compatible=True)


@pytest.mark.parametrize(("wanted", "fits"), [(["current"], True), (["sm_90"], True), (["sm_86"], False)])
def test_tensorrt_builds_for_this_gpu_alone(
    wanted: list[str], fits: bool, tensorrt: dict[str, str], bundle: Bundle
) -> None:
    host = host_of("tensorrt")
    if fits:
        assert build_plans(bundle, host, targets=wanted).engines.target == "sm_90"
        return
    with pytest.raises(UsageError, match=r"sm_90, not for sm_86; .*--backend tensorrt-rtx"):
        build_plans(bundle, host, targets=wanted)


def test_tensorrt_without_a_gpu_says_what_to_do(
    tensorrt: dict[str, str], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = probe("tensorrt")
    monkeypatch.delenv("STUB_GPU")
    for stale in (host, probe("tensorrt")):  # the GPU was there when it was asked; or was not
        with pytest.raises(MDNetError, match=r"builds for the GPU in the machine.*--backend tensorrt-rtx"):
            build_plans(bundle, stale)
    assert untouched(bundle)
    assert not Path(tensorrt["STAND_IN_NOTES"]).exists()  # TensorRT's Builder is a null pointer there


def test_the_timing_cache_is_used_again(tensorrt: dict[str, str], bundle: Bundle) -> None:
    told = Recorded()
    first = build_plans(bundle, host_of("tensorrt"), progress=told)
    build_plans(first.bundle, host_of("tensorrt"), force=True, progress=told)
    assert told.notes == []
    caches = [entry["cache"] for entry in tensorrt_hosts.notes(tensorrt, "build")]
    assert caches == [""] * 3 + ["timing cache of this GPU"] * 3


@pytest.mark.parametrize("damage", ["altered", "missing", "of another GPU"])
def test_a_timing_cache_that_will_not_do_is_left_out_and_said(
    damage: str, tensorrt: dict[str, str], bundle: Bundle
) -> None:
    bundle = build_plans(bundle, host_of("tensorrt")).bundle
    (engines,) = bundle.manifest.engines
    cache = plans_folder(bundle, engines) / "timing.cache"
    if damage == "missing":
        cache.unlink()
    else:
        cache.write_bytes(b"timing cache of elsewhere")
    if damage == "of another GPU":  # as it was written: only TensorRT can tell
        document = json.loads((bundle.path / "manifest.json").read_text())
        document["engines"][0]["timing_cache"] = describe(cache)
        (bundle.path / "manifest.json").write_text(json.dumps(document))
    told = Recorded()
    built = build_plans(Bundle.open(bundle.path), host_of("tensorrt"), force=True, progress=told)
    (line,) = told.notes
    assert "timing cache" in line
    assert [entry["cache"] for entry in tensorrt_hosts.notes(tensorrt, "build")] == [""] * 6
    seen = [entry["content"] for entry in tensorrt_hosts.notes(tensorrt, "create_timing_cache")]
    # What was altered never reaches native code.
    assert seen == (["", "timing cache of elsewhere", ""] if damage == "of another GPU" else ["", ""])
    assert cache.read_bytes() == b"timing cache of this GPU"
    check_plans(built.bundle, built.engines)


def test_layers_that_cant_be_read_back_are_no_reason_to_fail(
    tensorrt: dict[str, str], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(tensorrt_hosts.with_faults(tensorrt, layers=True), monkeypatch)
    told = Recorded()
    built = build_plans(bundle, host_of("tensorrt"), progress=told)
    (line,) = told.notes
    assert "layers.json" in line
    saved = json.loads((plans_folder(bundle, built.engines) / "layers.json").read_text())
    assert saved["of"] == "network"
    assert [layer["name"] for layer in saved["graphs"]["vim"]] == ["Cast", "ReduceMean", "Mul"]


# ------------------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({"parse": SECOND}, "TensorRT can't read the graph vim: Unsupported operator SelectiveScan"),
        ({"build": SECOND}, "TensorRT can't build vim: Error Code 10: no tactic for node scan"),
        ({"abort": SECOND}, "TensorRT's process was ended by SIGABRT during vim: building engine"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_failure_in_tensorrt_is_one_line_and_the_bundle_is_as_it_was(
    faults: dict[str, Any],
    words: str,
    tensorrt: dict[str, str],
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(tensorrt_hosts.with_faults(tensorrt, **faults), monkeypatch)
    with pytest.raises(MDNetError) as caught:
        build_plans(bundle, host_of("tensorrt"))
    assert words in str(caught.value)
    assert str(caught.value).isprintable()
    assert untouched(bundle)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_named(tensorrt: dict[str, str], bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    use(tensorrt_hosts.with_faults(tensorrt, bundle.path / "engines", full=SECOND), monkeypatch)
    with pytest.raises(MDNetError, match="no space left on the disk"):
        build_plans(bundle, host_of("tensorrt"))
    assert untouched(bundle)


def test_a_disk_that_is_full_only_when_it_is_flushed_is_named_too(
    tensorrt: dict[str, str], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(plans, "settle", full)
    with pytest.raises(MDNetError, match="no space left on the disk"):
        build_plans(bundle, host_of("tensorrt"))
    assert untouched(bundle)


BUILDER = [sys.executable, "-m", "mdnet_engines.tensorrt.plan_builder"]


@pytest.fixture
def request_file(bundle: Bundle, tmp_path: Path) -> Path:
    """A request to build one graph."""
    (tmp_path / "out").mkdir()
    request = {
        "ask": "build",
        "runtime": "tensorrt",
        "graphs": {FIRST: {"onnx": str(bundle.graph_path("encoder")), "tf32": True}},
        "folder": str(tmp_path / "out"),
        "profiles": [[1, 8, 32]],
        "level": None,
        "stripped": False,
        "compatible": False,
        "workspace": None,
        "targets": [],
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    return tmp_path / "request.json"


def test_a_build_whose_answer_nobody_reads_ends(tensorrt: dict[str, str], request_file: Path) -> None:
    with request_file.open() as asked:
        child = subprocess.Popen(BUILDER, env=tensorrt, stdin=asked, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.close()  # before its first word
    try:
        assert child.wait(timeout=60) == 1
    finally:
        child.kill()
    assert not (request_file.parent / "out" / f"{FIRST}.plan").exists()


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a process can't see that its parent is gone")
def test_a_build_without_its_parent_ends(tensorrt: dict[str, str], request_file: Path) -> None:
    """The command was killed while a phase of minutes runs, in which nothing is said."""
    code = "import subprocess, sys, time; subprocess.Popen(sys.argv[2:], stdin=open(sys.argv[1])); time.sleep(600)"
    command = [sys.executable, "-c", code, request_file, *BUILDER]
    environment = tensorrt_hosts.with_faults(tensorrt, wait=FIRST)
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert "step" in json.loads(parent.stdout.readline())  # of the builder, which has the same standard output
        parent.kill()
        parent.communicate(timeout=60)  # ends when the builder has


BROKEN = {
    "missing": ("raise ImportError('No module named tensorrt')", "TensorRT can't be imported; it is the extra"),
    "library": ("raise OSError('libnvinfer.so.11: cannot open')", "libnvinfer.so.11"),
    "old": ("__version__ = '10.13.3.9'", "TensorRT 10.13.3.9 is too old; 11 or newer is the extra mdnet[tensorrt]"),
    "rtx under its name": ("__version__ = '1.7.1.116'", "TensorRT 1.7.1.116 is too old"),
    "no version": ("", "TensorRT can't be imported"),
    "abort": ("import os; os.abort()", "was ended by SIGABRT"),
    "segfault": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "was ended by SIGSEGV"),
    "killed": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was killed (out of memory?)"),
    "exit": ("import os; os._exit(7)", "exit code 7"),
    "says": ("import os; os.write(2, b'boom\\x1b[2J\\n'); os.abort()", "having said: boom"),
}


@pytest.mark.parametrize(("source", "words"), BROKEN.values(), ids=BROKEN)
def test_a_tensorrt_that_will_not_do_is_one_line(
    source: str, words: str, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(tensorrt_hosts.with_modules(tmp_path / "modules", tensorrt=source), monkeypatch)
    host = probe("tensorrt")
    assert words in host.problem
    assert host.problem.isprintable()
    assert plan_process.default_host() is None
    with pytest.raises(MDNetError) as caught:
        build_plans(bundle, host)
    assert str(caught.value) == host.problem
    assert untouched(bundle)


def test_a_library_that_prints_does_not_disturb_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "import os; print('hello'); os.write(1, b'{\"result\": 1}\\n'); __version__ = '11.4.0.1'"
    use(tensorrt_hosts.with_modules(tmp_path / "modules", tensorrt=source), monkeypatch)
    assert (probe("tensorrt").version, probe("tensorrt").problem) == ("11.4.0.1", "")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 always looks into the current folder")
def test_the_current_folders_modules_are_not_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone of NVIDIA/TensorRT has folders by these names."""
    tensorrt_hosts.with_modules(tmp_path, tensorrt="__version__ = '99.0'", tensorrt_rtx="__version__ = '99.0'")
    monkeypatch.chdir(tmp_path)
    assert {probe("tensorrt").version, probe("tensorrt-rtx").version}.isdisjoint({"99.0"})


def test_an_interrupt_ends_the_process_and_leaves_nothing(
    tensorrt: dict[str, str], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(tensorrt_hosts.with_faults(tensorrt, wait=FIRST), monkeypatch)
    host = host_of("tensorrt")

    def interrupt(step: str | int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plans(bundle, host, progress=Recorded(interrupt))
    assert untouched(bundle)


# ------------------------------------------------------------------------------------------------------------ progress


def test_progress_is_the_phase_and_how_far_it_is() -> None:
    told: list[str] = []
    progress = BuilderProgress("vim", told.append)
    progress.start("Building engine", 4)
    progress.step("Building engine", 0)
    progress.start("Timing\nlayers", 1)
    progress.step("Timing\nlayers", 0)
    progress.finish("Timing\nlayers")
    progress.step("Building engine", 3)
    progress.step("Building engine", 9)  # more than it said
    progress.step("never started", 2)
    progress.finish("never started")
    assert told == [
        "vim: building engine, 0 %",
        "vim: building engine, 25 %",
        "vim: timing\\nlayers",
        "vim: building engine, 100 %",
        "vim: never started",
    ]


def test_progress_of_a_thousand_steps_is_told_by_the_per_cent() -> None:
    told: list[str] = []
    progress = BuilderProgress("vim", told.append)
    progress.start("Cloning network graph", 1000)
    for step in range(1000):
        progress.step("Cloning network graph", step)
    assert told == [f"vim: cloning network graph, {n} %" for n in range(101)]


def test_progress_from_many_threads_loses_nothing() -> None:
    told: list[str] = []
    progress = BuilderProgress("vim", told.append)
    threads = [threading.Thread(target=progress.start, args=(f"phase {n}", 1)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(told) == sorted(f"vim: phase {n}" for n in range(16))
