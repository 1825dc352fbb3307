"""What this machine allows a process to use, and what it has used."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "fedtl", "flwr", "torch", "torchvision", "ray", "numpy", "pandas", "numba", "onnxruntime",
)  # fmt: skip
"""Whose versions are written into every result."""


def allowed_cores() -> int:
    """Cores this process may use: affinity and cgroup quota, at least 1."""
    affine = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if affine else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def available_memory_bytes() -> int | None:
    """Memory a new allocation can have, within the cgroup's limit; None where unknown."""
    available = None
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    if limit.isdigit() and used.isdigit():
        free = max(0, int(limit) - int(used))
        available = free if available is None else min(available, free)
    return available


def peak_rss_mib() -> float:
    """The largest resident memory of this process so far, in MiB.

    Linux's own count is preferred: ``getrusage`` also counts what the parent had at the fork.
    """
    for line in _read("/proc/self/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def gpu_present() -> bool:
    """Whether an NVIDIA driver is loaded; asks the kernel, not torch, which takes seconds."""
    return Path("/proc/driver/nvidia/version").exists()


def versions() -> dict[str, str]:
    """Python's and the main packages' versions."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_model() -> str:
    """The processor's name, for results that hold on one CPU type."""
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
