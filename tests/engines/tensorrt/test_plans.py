"""Plans in a bundle: which may be used here, which never are, and how a new set takes the old one's place.

Nothing here builds: a plan is a few bytes.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_bundle import write_small_bundle

from mdnet_engines.bundle.files import Bundle, file_entry
from mdnet_engines.bundle.manifest import GRAPH_NAMES, BatchRange, PlanEntry, PlanSet
from mdnet_engines.errors import BundleError, MDNetError
from mdnet_engines.system.gpu import Gpu
from mdnet_engines.tensorrt import plans
from mdnet_engines.tensorrt.plans import (
    Host,
    check_plans,
    explain_incompatible,
    install_plans,
    scratch_folder,
    usable_plans,
)

RTX_TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
RTX = Host("tensorrt-rtx", "1.7.1.116", gpu=Gpu("RTX 4090", "sm_89", "13.0"), targets=RTX_TARGETS)
HOPPER = Host("tensorrt", "11.4.0.106", gpu=Gpu("H100", "sm_90", "13.0"))
FOLDERS = {"tensorrt-rtx": "tensorrt-rtx-1.7.1.116-portable", "tensorrt": "tensorrt-11.4.0.106-sm_90"}


TWO_GPUS = Host("tensorrt", "11.4.0.106", gpu=Gpu("H100", "sm_90", "13.0", count=2))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(write_small_bundle(tmp_path / "mdnet-bundle"))


def digest(bundle: Bundle, name: str) -> str:
    """By its definition: the sha256 of the sha256s of the graph's files."""
    files = [hashlib.sha256((bundle.path / f"{name}.onnx").read_bytes()).hexdigest()]
    return hashlib.sha256("\n".join(files).encode()).hexdigest()


def make(bundle: Bundle, folder: Path, content: str = "plan", **changes: Any) -> PlanSet:
    """Write plans of `content` into `folder`, and describe them."""
    entries = {}
    for name in GRAPH_NAMES:
        (folder / f"{name}.plan").write_text(f"{content} of {name}")
        entries[name] = PlanEntry(file=file_entry(folder / f"{name}.plan"), graph=digest(bundle, name))
    described = {
        "runtime": "tensorrt-rtx",
        "version": "1.7.1.116",
        "target": "portable",
        "batch": BatchRange(minimum=1, optimum=8, maximum=32),
        "plans": entries,
    }
    return PlanSet.model_validate({**described, **changes})


def install(bundle: Bundle, content: str = "plan", **changes: Any) -> Bundle:
    with scratch_folder(bundle) as scratch:
        return install_plans(bundle, scratch, make(bundle, scratch, content, **changes))


def tensorrt(**changes: Any) -> dict[str, Any]:
    return {"runtime": "tensorrt", "version": "11.4.0.106", "target": "sm_90", **changes}


def compatible(**changes: Any) -> dict[str, Any]:
    return tensorrt(target="portable", compatible=True, **changes)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# ---------------------------------------------------------------------------------------------------------- preflight


@pytest.mark.parametrize(("sm", "runs"), [("sm_80", False), ("sm_86", False), ("sm_89", True), ("sm_120", True)])
@pytest.mark.parametrize("target", ["portable", "sm_86-sm_89-sm_120"])
def test_fp8_plans_are_for_gpus_that_have_fp8(sm: str, runs: bool, target: str, tmp_path: Path) -> None:
    """Whatever the plans were built for; no other plans would help, so none are proposed."""
    bundle = install(Bundle.open(write_small_bundle(tmp_path / "fp8", precision="fp8")), target=target)
    gpu = Gpu("some GPU", sm, "13.0")
    host = Host("tensorrt-rtx", "1.7.1.116", gpu=gpu, targets=RTX_TARGETS)
    engines = bundle.manifest.engines[0]
    reason = explain_incompatible(engines, bundle.manifest, host)
    if runs and (target == "portable" or sm in target):
        assert reason is None
        assert usable_plans(bundle, host) == engines
    elif not runs:
        assert reason is not None
        with pytest.raises(MDNetError, match=rf"{sm} has no FP8, .* from sm_89 on; .*--precision int8 \(or fp16\)$"):
            usable_plans(bundle, host)


@pytest.mark.parametrize(
    ("built", "host", "words"),
    [
        ({}, Host("tensorrt-rtx", "1.8.0.2", gpu=RTX.gpu, targets=RTX_TARGETS), ("1.7.1.116", "1.8.0.2")),
        ({}, Host("tensorrt-rtx", problem="TensorRT-RTX can't be imported"), ("TensorRT-RTX can't be imported",)),
        ({}, Host("tensorrt-rtx", "1.7.1.116", targets=RTX_TARGETS), ("sm_80", "no NVIDIA GPU")),
        ({"target": "sm_86-sm_120"}, RTX, ("sm_86 and sm_120", "sm_89", "RTX 4090")),
        (tensorrt(), RTX, ("TensorRT,", "TensorRT-RTX")),
        (tensorrt(target="sm_100"), HOPPER, ("sm_100", "sm_90", "H100")),
        (tensorrt(platform="win32-amd64"), HOPPER, ("win32-amd64", plans.this_platform())),
        (tensorrt(version="11.3.0.1"), HOPPER, ("11.3.0.1", "11.4.0.106")),
        (compatible(version="11.10.0.1"), HOPPER, ("11.10.0.1 for it and later ones", "11.4.0.106")),
        (compatible(), Host("tensorrt", "11.4.0.106", gpu=Gpu("T4", "sm_75", "13.0")), ("GPUs from Ampere", "sm_75")),
        (compatible(platform="win32-amd64"), HOPPER, ("win32-amd64", plans.this_platform())),
        (tensorrt(target="sm_89"), TWO_GPUS, ("sm_89", "sm_90", "the first of 2: CUDA_VISIBLE_DEVICES")),
    ],
    ids=[
        *("version", "not installed", "no GPU", "GPU", "runtime", "TensorRT's GPU", "platform", "TensorRT's version"),
        *("an older version", "before Ampere", "compatible, platform", "two GPUs"),
    ],
)
def test_a_plan_for_something_else_is_explained(
    built: dict[str, Any], host: Host, words: tuple[str, ...], bundle: Bundle, tmp_path: Path
) -> None:
    reason = explain_incompatible(make(bundle, tmp_path, **built), bundle.manifest, host)
    assert reason is not None
    assert reason.isprintable()
    for word in words:
        assert word in reason


@pytest.mark.parametrize(
    ("sm", "runs"),
    [
        *((sm, True) for sm in ("sm_80", "sm_86", "sm_89", "sm_120", "sm_121", "sm_130")),
        *((sm, False) for sm in ("sm_75", "sm_61", "sm_87", "sm_90", "sm_100")),
    ],
)
def test_portable_plans_run_on_rtx_gpus_from_ampere_on(sm: str, runs: bool, bundle: Bundle, tmp_path: Path) -> None:
    """NVIDIA: compute capability 8.0, 8.6, 8.9, 12.0 and later; Turing and the data centre's 9.0 and 10.0 are not."""
    host = Host("tensorrt-rtx", "1.7.1.116", gpu=Gpu("some GPU", sm, "13.0"), targets=RTX_TARGETS)
    assert (explain_incompatible(make(bundle, tmp_path), bundle.manifest, host) is None) == runs


@pytest.mark.parametrize("target", ["sm_89", "sm_86-sm_89", "sm_89-sm_120"])
def test_a_plan_for_this_gpu_among_others_fits(target: str, bundle: Bundle, tmp_path: Path) -> None:
    assert explain_incompatible(make(bundle, tmp_path, target=target), bundle.manifest, RTX) is None


def test_tensorrts_plan_for_this_gpu_version_and_platform_fits(bundle: Bundle, tmp_path: Path) -> None:
    engines = make(bundle, tmp_path, **tensorrt(platform=plans.this_platform()))
    assert explain_incompatible(engines, bundle.manifest, HOPPER) is None


@pytest.mark.parametrize("version", ["11.4.0.106", "11.4.0.107", "11.10.0.1", "12.0.0.1"])
@pytest.mark.parametrize("sm", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
def test_compatible_plans_run_with_later_versions_and_on_gpus_from_ampere_on(
    version: str, sm: str, bundle: Bundle, tmp_path: Path
) -> None:
    engines = make(bundle, tmp_path, **compatible(platform=plans.this_platform()))
    host = Host("tensorrt", version, gpu=Gpu("some GPU", sm, "13.0"))
    assert explain_incompatible(engines, bundle.manifest, host) is None


def test_plans_for_this_very_gpu_come_before_compatible_ones(bundle: Bundle) -> None:
    bundle = install(install(bundle, **compatible()), **tensorrt())
    assert [engines.target for engines in bundle.manifest.engines] == ["portable", "sm_90"]
    assert usable_plans(bundle, HOPPER).target == "sm_90"
    _cut(plans.plan_path(bundle, bundle.manifest.engines[1], "vim"))
    assert usable_plans(bundle, HOPPER).target == "portable"


def test_a_plan_of_another_graph_is_named(bundle: Bundle, tmp_path: Path) -> None:
    """Plans copied over from a bundle with other weights would score with those."""
    engines = make(bundle, tmp_path)
    other = Bundle.open(write_small_bundle(tmp_path / "other", scale=2.0))
    reason = explain_incompatible(engines, other.manifest, RTX)
    assert reason is not None
    assert "another encoder, vim, fusion" in reason


# ------------------------------------------------------------------------------------------------------ damaged plans


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _alter(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] + b"X")


def _link_folder(file: Path) -> None:
    elsewhere = file.parents[3] / "elsewhere"
    file.parent.rename(elsewhere)
    file.parent.symlink_to(elsewhere)


def _link_engines(file: Path) -> None:
    elsewhere = file.parents[3] / "elsewhere"
    file.parents[1].rename(elsewhere)
    file.parents[1].symlink_to(elsewhere)


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (_cut, "incomplete"),
    (_alter, "altered"),
    (Path.unlink, "missing"),
    (_link_folder, "link"),
    (_link_engines, "link"),
]


@pytest.mark.parametrize(("damage", "word"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_plan_is_refused_and_the_bundle_still_opens(
    damage: Callable[[Path], object], word: str, bundle: Bundle
) -> None:
    changed = install(bundle)
    (engines,) = changed.manifest.engines
    check_plans(changed, engines)
    damage(plans.plan_path(changed, engines, "vim"))
    with pytest.raises(BundleError, match=word) as caught:
        check_plans(Bundle.open(bundle.path), engines)
    assert f"mdnet-export engines {bundle.path} --backend tensorrt-rtx" in str(caught.value)
    with pytest.raises(MDNetError, match=word) as caught:
        usable_plans(changed, RTX)
    assert "mdnet-export engines" in str(caught.value)


def test_where_one_set_is_damaged_the_next_is_used(bundle: Bundle) -> None:
    for target in ("sm_89", "portable"):
        bundle = install(bundle, target, target=target)
    _cut(plans.plan_path(bundle, bundle.manifest.engines[0], "vim"))
    assert usable_plans(bundle, RTX).target == "portable"


def test_usable_plans_are_the_first_that_fit(bundle: Bundle) -> None:
    for target in ("sm_86", "sm_89", "portable"):
        bundle = install(bundle, target, target=target)
    assert usable_plans(bundle, RTX).target == "sm_89"


def test_why_no_plan_fits_is_said_for_each_with_the_command(bundle: Bundle) -> None:
    for target in ("sm_86", "sm_120"):
        bundle = install(bundle, target, target=target)
    with pytest.raises(MDNetError) as caught:
        usable_plans(bundle, RTX)
    (line,) = str(caught.value).splitlines()
    for word in ("1.7.1.116-sm_86 was built", "1.7.1.116-sm_120 was built", "sm_89", "mdnet-export engines"):
        assert word in line


def test_a_bundle_without_plans_says_how_to_make_them(bundle: Bundle) -> None:
    with pytest.raises(MDNetError, match=r"no plans for TensorRT; .*mdnet-export engines .* --backend tensorrt"):
        usable_plans(install(bundle), HOPPER)


# ----------------------------------------------------------------------------------------------------------- manifest


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / "manifest.json").read_text())
    change(document)
    (folder / "manifest.json").write_text(json.dumps(document))


def test_a_manifest_from_before_plans_is_valid(bundle: Bundle) -> None:
    assert "engines" not in json.loads((bundle.path / "manifest.json").read_text())
    assert bundle.manifest.engines == []


def test_a_set_of_plans_from_before_there_were_options_is_valid(bundle: Bundle) -> None:
    install(bundle)
    new = {"level", "stripped", "compatible"}
    rewrite(bundle.path, lambda document: [document["engines"][0].pop(name) for name in new])
    rewrite(bundle.path, lambda document: document["engines"][0]["batch"].pop("further_optima"))
    (engines,) = Bundle.open(bundle.path).manifest.engines
    assert (engines.level, engines.stripped, engines.compatible) == (None, False, False)
    assert engines.batch.profiles() == [(1, 8, 32)]


@pytest.mark.parametrize(
    ("sizes", "profiles"),
    [
        ([1, 8, 32], [(1, 8, 32)]),
        ([1, 1, 8, 32, 32], [(1, 1, 1), (2, 8, 8), (9, 32, 32)]),
        ([2, 4, 8, 64], [(2, 4, 4), (5, 8, 64)]),
        ([3, 3, 4, 4], [(3, 3, 3), (4, 4, 4)]),
    ],
)
def test_every_size_is_in_one_profile(sizes: list[int], profiles: list[tuple[int, int, int]]) -> None:
    least, best, *further, most = sizes
    batch = BatchRange(minimum=least, optimum=best, further_optima=further, maximum=most)
    assert batch.profiles() == profiles
    assert str(batch) == ",".join(map(str, sizes))
    taken = [size for first, _, last in profiles for size in range(first, last + 1)]
    assert taken == list(range(least, most + 1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("level", 6),
        ("compatible", True),  # of TensorRT-RTX
        ("batch", {"minimum": 1, "optimum": 8, "further_optima": [8], "maximum": 32}),
        ("batch", {"minimum": 1, "optimum": 8, "further_optima": [64], "maximum": 32}),
        ("target", "../../secret"),
        ("target", "sm_90/.."),
        ("target", "sm_90\n"),
        ("target", ""),
        ("target", "portable-sm_90"),
        ("version", "1.7/../.."),
        ("version", "1"),
        ("version", ".."),
        ("version", "1.7 "),
        ("runtime", "tensorrt/.."),
        ("runtime", "onnxruntime"),
        ("batch", {"minimum": 8, "optimum": 1, "maximum": 32}),
        ("batch", {"minimum": 0, "optimum": 1, "maximum": 32}),
        ("workspace_gib", -1),
        ("folder", "/etc"),
    ],
)
def test_what_could_lead_out_of_the_folder_or_means_nothing_is_refused(
    field: str, value: object, bundle: Bundle
) -> None:
    install(bundle)
    rewrite(bundle.path, lambda document: document["engines"][0].update({field: value}))
    with pytest.raises(BundleError, match=r"engines\.0[.:]"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("name", ["../vim.plan", "/etc/passwd", "sub/vim.plan", ""])
def test_a_plans_name_is_a_plain_name(name: str, bundle: Bundle) -> None:
    install(bundle)
    rewrite(bundle.path, lambda document: document["engines"][0]["plans"]["vim"]["file"].update(name=name))
    with pytest.raises(BundleError, match=r"engines\.0\.plans\.vim\.file\.name"):
        Bundle.open(bundle.path)


def test_a_set_without_all_graphs_is_refused(bundle: Bundle) -> None:
    install(bundle)
    rewrite(bundle.path, lambda document: document["engines"][0]["plans"].pop("fusion"))
    with pytest.raises(BundleError, match="no plan for fusion"):
        Bundle.open(bundle.path)


def test_two_sets_in_one_folder_are_refused(bundle: Bundle) -> None:
    install(bundle)
    rewrite(bundle.path, lambda document: document["engines"].append(document["engines"][0]))
    with pytest.raises(BundleError, match="same folder"):
        Bundle.open(bundle.path)


# --------------------------------------------------------------------------------------------------------- installing


def test_a_set_lies_in_its_folder_and_in_the_manifest(bundle: Bundle) -> None:
    install(bundle)
    install(bundle, **tensorrt())
    opened = Bundle.open(bundle.path)
    assert [engines.folder for engines in opened.manifest.engines] == [*FOLDERS.values()]
    assert names(bundle.path / "engines") == sorted(FOLDERS.values())
    for engines in opened.manifest.engines:
        check_plans(opened, engines)
    assert opened.manifest.model_copy(update={"engines": []}) == bundle.manifest  # nothing else has changed


def test_a_new_set_replaces_the_old_one_of_its_folder_alone(bundle: Bundle) -> None:
    install(bundle, **tensorrt())
    install(bundle, "old")
    (bundle.path / "engines" / FOLDERS["tensorrt-rtx"] / "stale.txt").write_text("of the old set")
    changed = install(bundle, "new")
    assert [engines.folder for engines in changed.manifest.engines] == [FOLDERS["tensorrt"], FOLDERS["tensorrt-rtx"]]
    assert names(bundle.path / "engines" / FOLDERS["tensorrt-rtx"]) == [f"{name}.plan" for name in sorted(GRAPH_NAMES)]
    for engines in Bundle.open(bundle.path).manifest.engines:
        check_plans(changed, engines)


def test_a_death_between_the_two_steps_leaves_a_bundle_that_opens(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(bundle, "old")
    before = (bundle.path / "manifest.json").read_bytes()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            install(bundle, "new")
    assert (bundle.path / "manifest.json").read_bytes() == before
    opened = Bundle.open(bundle.path)
    with pytest.raises(BundleError, match="altered"):  # the new plans are not the manifest's: they are not loaded
        check_plans(opened, opened.manifest.engines[0])
    changed = install(opened, "new")
    check_plans(changed, changed.manifest.engines[0])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_what_fails_before_leaves_everything_as_it_was(error: BaseException, bundle: Bundle) -> None:
    before = names(bundle.path)
    with pytest.raises(type(error)), scratch_folder(bundle) as scratch:  # noqa: PT012
        make(bundle, scratch)
        raise error
    assert names(bundle.path) == before
    assert Bundle.open(bundle.path).manifest == bundle.manifest


def test_builds_at_the_same_time_do_not_lose_each_others_entry(bundle: Bundle) -> None:
    """Each starts from the manifest without the other."""
    ready = threading.Barrier(4)

    def run(target: str) -> None:
        with scratch_folder(bundle) as scratch:
            engines = make(bundle, scratch, target, target=target)
            ready.wait(timeout=60)
            install_plans(bundle, scratch, engines)

    targets = ("sm_80", "sm_86", "sm_89", "sm_120")
    threads = [threading.Thread(target=run, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(e.target for e in Bundle.open(bundle.path).manifest.engines) == sorted(targets)
    assert names(bundle.path / "engines") == sorted(f"tensorrt-rtx-1.7.1.116-{target}" for target in targets)


@pytest.mark.parametrize("rest", ["as another bundle", "gone", "other graphs in place"])
def test_plans_never_enter_a_bundle_that_was_replaced_meanwhile(rest: str, bundle: Bundle) -> None:
    with pytest.raises((MDNetError, BundleError)), scratch_folder(bundle) as scratch:  # noqa: PT012
        engines = make(bundle, scratch)
        if rest != "other graphs in place":
            bundle.path.rename(bundle.path.with_name("old"))
        if rest != "gone":
            write_small_bundle(bundle.path, scale=2.0)
        install_plans(bundle, scratch, engines)
    if rest != "gone":
        assert Bundle.open(bundle.path).manifest.engines == []


def test_what_a_killed_build_left_is_removed_and_what_is_at_work_is_not(bundle: Bundle) -> None:
    with scratch_folder(bundle) as at_work:
        (bundle.path / "engines" / ".building.killed").mkdir()
        (bundle.path / "engines" / ".building.killed" / "vim.plan").write_text("half a pl")
        with scratch_folder(bundle) as second:
            assert names(bundle.path / "engines") == sorted([at_work.name, second.name])
    assert not (bundle.path / "engines").exists()


@pytest.mark.parametrize("kind", ["link", "file"])
def test_plans_go_nowhere_but_into_the_bundles_own_folder(kind: str, bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    if kind == "link":
        (bundle.path / "engines").symlink_to(tmp_path / "elsewhere")
    else:
        (bundle.path / "engines").write_text("mine")
    with pytest.raises(BundleError, match="link or a file"), scratch_folder(bundle):
        pass
    assert names(tmp_path / "elsewhere") == []
