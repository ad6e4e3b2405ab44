"""How many threads compute on the CPU.

Threads that share a product wait for each other without sleeping: that is fastest while each has a processor of its
own, and many times slower than fewer threads where it has not.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def num_processors(cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUP) -> int:
    """Return how many processors this process may use: those it may run on, or a container's quota of their time.

    Linux: `cpu.max` of control groups v2, of this one and those above it; `cpu.cfs_quota_us` of v1.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [count, *_quotas(cgroups, own)]
    return max(1, math.ceil(min(quotas)))


def use_threads(count: int | None) -> None:
    """Have products computed by so many threads, or by one for each processor; `OMP_NUM_THREADS` is a count, too."""
    if count is None and not os.environ.get("OMP_NUM_THREADS"):
        count = min(num_processors(), torch.get_num_threads())
    if count is not None and count != torch.get_num_threads():
        torch.set_num_threads(count)


def _quotas(cgroups: Path, own: Path) -> list[float]:
    found = []
    for line in _read(own).splitlines():
        number, _, path = line.partition("::")
        group = cgroups / path.lstrip("/")
        if number == "0" and path:
            found += [
                _ratio(*_read(each / "cpu.max").split())
                for each in (group, *group.parents)
                if each.is_relative_to(cgroups)
            ]
    v1 = cgroups / "cpu"
    found.append(_ratio(_read(v1 / "cpu.cfs_quota_us").strip(), _read(v1 / "cpu.cfs_period_us").strip()))
    return found


def _ratio(quota: str = "", period: str = "") -> float:
    """Return processors; without end where no quota is set: v2 says `max`, v1 says -1."""
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else math.inf


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
