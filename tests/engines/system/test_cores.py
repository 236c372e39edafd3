"""How many cores a process may use, on laid-out control group trees: nothing here depends on the machine's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mdnet_engines.system import cores as cpu
from mdnet_engines.system.cores import available_cores

CORES = 8
V2_BESIDE_V1 = "12:cpuset:/\n4:cpu,cpuacct:{path}\n1:name=systemd:/\n0::/\n"


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(CORES)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


def lay_out(root: Path, group: str, files: dict[str, str]) -> Path:
    """A root folder whose /proc/self/cgroup reads `group`, with `files` below /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(group)
    (root / "sys/fs/cgroup").mkdir(parents=True)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def v1(folder: str, quota: str, period: str = "100000\n") -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": period}


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("50000 100000\n", 1),
        ("100000 100000\n", 1),
        ("150000 100000\n", 2),
        ("30000 10000\n", 3),
        ("3200000 100000\n", CORES),
        ("max 100000\n", CORES),
    ],
)
@pytest.mark.usefixtures("cores")
def test_a_quota_of_v2_is_rounded_up_and_counts_where_it_is_less_than_the_cpu_set(
    limit: str, expected: int, tmp_path: Path
) -> None:
    root = lay_out(tmp_path, "0::/user.slice/job.scope\n", {"user.slice/job.scope/cpu.max": limit})
    assert cpu._cores(root) == expected


@pytest.mark.parametrize(("quota", "expected"), [("50000\n", 1), ("150000\n", 2), ("-1\n", CORES)])
@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
@pytest.mark.usefixtures("cores")
def test_a_quota_of_v1_counts_as_one_of_v2(mount: str, quota: str, expected: int, tmp_path: Path) -> None:
    root = lay_out(tmp_path, V2_BESIDE_V1.format(path="/job"), v1(f"{mount}/job", quota))
    assert cpu._cores(root) == expected


@pytest.mark.parametrize(("own", "above", "top", "expected"), [(4, 3, 5, 3), (2, 3, 5, 2), (4, 3, 1, 1)])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.usefixtures("cores")
def test_the_least_quota_of_the_group_and_its_parents_counts(
    version: int, own: int, above: int, top: int, expected: int, tmp_path: Path
) -> None:
    levels = {"a/b/c": own, "a/b": above, "a": top}
    if version == 2:
        files = {f"{folder}/cpu.max": f"{n * 100_000} 100000\n" for folder, n in levels.items()}
        root = lay_out(tmp_path, "0::/a/b/c\n", files)
    else:
        files = {k: v for folder, n in levels.items() for k, v in v1(f"cpu/{folder}", f"{n * 100_000}\n").items()}
        root = lay_out(tmp_path, V2_BESIDE_V1.format(path="/a/b/c"), files)
    assert cpu._cores(root) == expected


@pytest.mark.usefixtures("cores")
def test_a_quota_on_a_group_of_others_does_not_count(tmp_path: Path) -> None:
    root = lay_out(tmp_path, "0::/a/mine\n", {"a/mine/cpu.max": "max 100000\n", "a/other/cpu.max": "100000 100000\n"})
    assert cpu._cores(root) == CORES


@pytest.mark.parametrize("path", ["/", "/docker/0123", "/kubepods/pod1/0123", "/../../escaped"])
@pytest.mark.usefixtures("cores")
def test_a_container_finds_its_quota_at_the_mount_with_and_without_a_cgroup_namespace(
    path: str, tmp_path: Path
) -> None:
    """With a namespace its group is `/`; without one it reads the host's path, of which nothing is mounted."""
    assert cpu._cores(lay_out(tmp_path / "v2", f"0::{path}\n", {"cpu.max": "200000 100000\n"})) == 2
    assert cpu._cores(lay_out(tmp_path / "v1", V2_BESIDE_V1.format(path=path), v1("cpu", "200000\n"))) == 2


@pytest.mark.usefixtures("cores")
def test_a_group_made_inside_a_container_without_a_cgroup_namespace_is_found(tmp_path: Path) -> None:
    files = {"cpu.max": "300000 100000\n", "init.scope/cpu.max": "200000 100000\n"}
    assert cpu._cores(lay_out(tmp_path, "0::/docker/0123/init.scope\n", files)) == 2


@pytest.mark.usefixtures("cores")
def test_v2_mounted_beside_v1_counts_too(tmp_path: Path) -> None:
    root = lay_out(tmp_path, "4:cpuset:/\n0::/job\n", {"unified/job/cpu.max": "100000 100000\n"})
    assert cpu._cores(root) == 1


@pytest.mark.parametrize(
    "limit", ["", "\n", "100000\n", "x 100000\n", "0 100000\n", "-1 100000\n", "100000 0\n", "1 2 3"]
)
@pytest.mark.usefixtures("cores")
def test_damage_is_no_quota_and_hides_no_other(limit: str, tmp_path: Path) -> None:
    files = {"job/cpu.max": limit}
    assert cpu._cores(lay_out(tmp_path / "alone", "0::/job\n", files)) == CORES
    assert cpu._cores(lay_out(tmp_path / "below", "0::/job\n", {**files, "cpu.max": "100000 100000\n"})) == 1


@pytest.mark.parametrize(
    "group", [b"", b"\n", b"nothing", b"0:", b"::", b"0::/\xff\n", b"0::/" + b"a" * 5000, b"0::/\0"]
)
@pytest.mark.usefixtures("cores")
def test_a_damaged_list_of_groups_is_no_quota(group: bytes, tmp_path: Path) -> None:
    root = lay_out(tmp_path, "", {})
    (root / "proc/self/cgroup").write_bytes(group)
    assert cpu._cores(root) == CORES


@pytest.mark.usefixtures("cores")
def test_what_can_not_be_read_is_no_quota(tmp_path: Path) -> None:
    assert cpu._cores(tmp_path) == CORES  # no /proc
    root = lay_out(tmp_path, "0::/job\n", {})
    (root / "sys/fs/cgroup/job/cpu.max").mkdir(parents=True)
    (root / "sys/fs/cgroup/cpu.max").write_bytes(b"\xff\xfe")
    assert cpu._cores(root) == CORES


@pytest.mark.parametrize(("count", "expected"), [(8, 8), (None, 1)])
def test_cores_where_the_system_has_no_cpu_sets(
    count: int | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert cpu._cores(tmp_path) == expected


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no CPU sets")
def test_this_machine_gives_at_least_one_core_and_no_more_than_the_cpu_set() -> None:
    assert 1 <= available_cores() <= len(os.sched_getaffinity(0))
