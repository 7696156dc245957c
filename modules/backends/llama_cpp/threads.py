"""How many threads to compute with: one for each physical core this process may use. Engine process only."""

from __future__ import annotations

import os
from pathlib import Path


def default_threads(cpus: Path = Path("/sys/devices/system/cpu"), quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Physical cores allowed to this process, at most the container's CPU quota; all processors where that cannot be found out.

    A second thread on one core, or more threads than the quota pays for, makes llama.cpp slower: its threads wait by spinning.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_siblings(cpus, cpu) for cpu in allowed}
    return max(1, min(len(cores), _quota(quota)))


def _siblings(cpus: Path, cpu: int) -> str:
    try:
        return (cpus / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quota(path: Path) -> int:
    try:
        allowed, period = path.read_text().split()
        return max(1, int(allowed) // int(period))
    except (OSError, ValueError):  # no such file, or "max": no limit
        return 1 << 16
