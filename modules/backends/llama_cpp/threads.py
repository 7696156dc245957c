"""How many threads to compute with. Engine process only.

For prompts one on each physical core; for writing one fewer: llama.cpp's threads wait for each other by spinning, hundreds of times a
token, and a single neighbour on the last core then costs far more than that core gives. Measured on 2 cores, tokens/s of the 135M starter:
quiet 193 with 2 threads and 150 with 1; beside one busy process 0.2 to 5 with 2 and 77 to 132 with 1.
"""

from __future__ import annotations

import os
from pathlib import Path


def writing_threads() -> int:
    """Default for generated tokens, one at a time."""
    return max(1, usable_cores() - 1)


def usable_cores(cpus: Path = Path("/sys/devices/system/cpu"), quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Physical cores allowed to this process, at most the container's CPU quota; all processors where that cannot be found out.

    A second thread on one core, or more threads than the quota pays for, only makes the others wait.
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
