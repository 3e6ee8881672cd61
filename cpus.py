"""How many processors this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def available_cpus(system: Path = Path("/")) -> int:
    """How many CPUs this process may use: as many as it may run on, but no more than the quotas of
    its control groups allow. A part of a CPU counts as one.

    `system` is where /proc and /sys are.
    """
    pinned = hasattr(os, "sched_getaffinity")
    cpus = len(os.sched_getaffinity(0)) if pinned else os.cpu_count() or 1
    return min([cpus, *(max(1, math.ceil(quota)) for quota in cpu_quotas(system))])


def cpu_quotas(system: Path = Path("/")) -> list[float]:
    """The quotas, in CPUs, of the control groups that this process is in, of version 1 or 2. A
    group without a quota has no entry. See cgroup-v2.rst (cpu.max) and sched-bwc.rst (cfs_quota_us)
    of the kernel.
    """
    quotas = []
    for folder, v2 in _cpu_groups(system):
        try:
            if v2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = (
                    (folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
                )
            if quota != "max" and int(quota) > 0:
                quotas.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue  # The root group has no such file, nor has one without the controller.
    return quotas


def _cpu_groups(system: Path) -> Iterator[tuple[Path, bool]]:
    # The folders of the groups over this process that can have a quota, and whether they are of
    # version 2. Only a part of the tree may be mounted, as in a container that shows the paths of
    # the host. Then the folder of the mount itself is the container's group.
    proc = system / "proc/self"
    try:
        groups = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (proc / "mountinfo").read_text().splitlines()]
    except OSError:  # no Linux
        return
    for mount in mounts:
        kind, options = mount[mount.index("-") + 1], mount[-1].split(",")
        if kind != "cgroup2" and not (kind == "cgroup" and "cpu" in options):
            continue
        top = system / mount[4].lstrip("/")
        for _, controllers, path in groups:
            if ("cpu" in controllers.split(",")) if kind == "cgroup" else not controllers:
                inside = Path(path.removeprefix(mount[3]).lstrip("/"))
                for folder in (inside, *inside.parents):
                    yield top / folder, kind == "cgroup2"
