import subprocess
import sys

import numpy as np
import pytest

from fedtl import machine


def test_cores_are_those_this_process_may_use() -> None:
    import os

    assert 1 <= machine.allowed_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 64), ("150000 100000", 1), ("50000 100000", 1)]
)
def test_a_quota_of_the_cgroup_counts(
    monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr("fedtl.machine._read", lambda _: quota)
    assert machine.allowed_cores() == cores


def test_memory_is_bounded_by_the_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 1000 kB",
        "/sys/fs/cgroup/memory.max": "500000",
        "/sys/fs/cgroup/memory.current": "100000",
    }
    monkeypatch.setattr("fedtl.machine._read", lambda path: files.get(path, ""))
    assert machine.available_memory_bytes() == 400_000
    files["/sys/fs/cgroup/memory.max"] = "max"
    assert machine.available_memory_bytes() == 1_024_000


def test_the_peak_grows_with_what_is_touched_and_is_not_the_parents() -> None:
    ballast = np.ones(50 * 2**20 // 8)
    here = machine.peak_rss_mib()
    code = "from fedtl import machine; print(machine.peak_rss_mib())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert here > 60
    assert float(child.stdout) < here
    assert ballast[0] == 1


def test_versions_name_what_results_depend_on() -> None:
    assert {"python", "fedtl", "torch", "numpy", "numba"} <= set(machine.versions())
