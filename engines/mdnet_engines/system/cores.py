"""How many cores this process may use: its CPU set, and the CPU quotas of Linux' control groups (cgroups v1 and v2)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def available_cores() -> int:
    """Cores this process may use, at least 1; the machine's total does not count in a container that has fewer.

    The least of the CPU set and of every quota on the process's control group and the groups above it. A quota is
    rounded up to whole cores; one that can't be read is none.
    """
    return _cores(Path("/"))


def _cores(root: Path) -> int:
    """`available_cores`, with the control groups read from `root`, which holds `proc` and `sys`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([cores, *_quotas(root)])


def _quotas(root: Path) -> Iterator[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:  # hierarchy:controllers:path, and no controllers in v2
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            mounts = ("", "unified")  # the latter next to v1
        elif "cpu" in controllers.split(","):
            mounts = ("cpu", controllers)
        else:
            continue
        for mount in mounts:
            for group in _groups(root / "sys/fs/cgroup" / mount, path):
                yield from _quota(group, v2=not controllers)


def _groups(mount: Path, path: str) -> Iterator[Path]:
    """The folder of the group `path`, then those of its parents up to `mount`."""
    names = [name for name in path.split("/") if name not in ("", "..")]
    # Without a cgroup namespace a container reads the host's path, while its mount begins at its own group.
    while names and not os.path.isdir(mount.joinpath(*names)):  # noqa: PTH112 (Path.is_dir may raise)
        del names[0]
    for depth in range(len(names), -1, -1):
        yield mount.joinpath(*names[:depth])


def _quota(group: Path, *, v2: bool) -> Iterator[int]:
    files = ("cpu.max",) if v2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    try:
        quota, period = (int(word) for name in files for word in (group / name).read_text(encoding="utf-8").split())
    except (OSError, ValueError):  # no such file; "max", which is no quota; damage
        return
    if quota > 0 and period > 0:
        yield -(-quota // period)
