"""Threads are not more than processors: a container's quota counts, and what the operator says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from promptd.processors import num_processors

AVAILABLE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def group(folder: Path, **quotas: str) -> tuple[Path, Path]:
    """Write control groups, `a__b="…"` for a/b's quota, and the membership in a/b/c."""
    for name, quota in quotas.items():
        place = folder / "groups" / name.strip("_").replace("__", "/")
        place.mkdir(parents=True, exist_ok=True)
        (place / "cpu.max").write_text(f"{quota}\n")
    own = folder / "own"
    own.write_text("1:name=systemd:/x\n0::/a/b/c\n")
    return folder / "groups", own


@pytest.mark.parametrize(
    ("quotas", "most"),
    [
        ({}, AVAILABLE),
        ({"a__b": "max 100000"}, AVAILABLE),
        ({"a__b": "100000 100000"}, 1),
        ({"a": "50000 100000", "a__b__c": "max 100000"}, 1),
        ({"_": "100000 100000"}, 1),  # a container sees its own group as the root
        ({"a__b__c": f"{AVAILABLE * 100_000 - 1} 100000"}, AVAILABLE),
        ({"a__b__c": "9900000 100000"}, AVAILABLE),
        ({"a__b__c": "nonsense"}, AVAILABLE),
    ],
)
def test_quotas_of_v2(tmp_path: Path, quotas: dict[str, str], most: int) -> None:
    """The least of this group's and those above; a part of a processor is one."""
    assert num_processors(*group(tmp_path, **quotas)) == most


@pytest.mark.parametrize(("quota", "most"), [("-1", AVAILABLE), ("100000", 1), ("20000", 1)])
def test_quotas_of_v1(tmp_path: Path, quota: str, most: int) -> None:
    """They are two files there."""
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota + "\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert num_processors(tmp_path, tmp_path / "none") == most


PROGRAM = """
import sys, threading
from pathlib import Path
import torch
from promptd import processors
processors.num_processors.__defaults__ = (Path(sys.argv[2]), Path("none"))
processors.os.sched_getaffinity = lambda _: range(4)
torch.set_num_threads(4)
processors.use_threads(eval(sys.argv[1]))
found = []
thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
thread.start()
thread.join()
print(torch.get_num_threads(), *found)
"""


@pytest.mark.parametrize(
    ("wanted", "environment", "quota", "used"),
    [
        ("None", {}, "", 4),
        ("None", {}, "200000", 2),
        ("None", {"OMP_NUM_THREADS": "4"}, "200000", 4),
        ("3", {}, "", 3),
        ("3", {"OMP_NUM_THREADS": "1"}, "200000", 3),
    ],
)
def test_threads(tmp_path: Path, wanted: str, environment: dict[str, str], quota: str, used: int) -> None:
    """What is asked for, else what OpenMP was told, else one for each processor; in all threads of the process."""
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, wanted, str(tmp_path)],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.split() == [str(used)] * 2, done.stderr
