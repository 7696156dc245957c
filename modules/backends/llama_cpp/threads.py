"""How many threads to compute with, now. Engine process only.

llama.cpp's threads wait for each other hundreds of times a token; one that has lost its core to another program holds up all. So the number
follows what other programs leave free: all cores on a quiet machine, fewer beside a busy neighbour.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

LOOK_SECONDS = 0.25
TOLERATED = 0.6
"""Of a core: as much as others may use of the last one before it is left to them. The server, which shows the replies, is one of the others."""


class Threads:
    """The number of threads for the next step. `writing` and `reading`: as configured, or one a core."""

    def __init__(self, writing: int = 0, reading: int = 0, neighbours: Callable[[], float | None] | None = None) -> None:
        """0 is automatic: as many as the cores that others leave free. `neighbours`: cores in use by others since it was last asked."""
        cores = usable_cores()
        self.writing = writing or cores
        self.reading = reading or cores
        self._fixed_writing, self._fixed_reading = bool(writing), bool(reading)
        self._neighbours = neighbours or Neighbours().cores
        self._free = cores
        self._cores = cores
        self._looked = 0.0
        self.last = 0
        """Threads of the last step."""

    def now(self, tokens: int) -> int:
        """For a step of so many tokens."""
        fixed, most = (self._fixed_writing, self.writing) if tokens == 1 else (self._fixed_reading, self.reading)
        self.last = most if fixed else min(most, self._look())
        return self.last

    def _look(self) -> int:
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            others = self._neighbours()
            if others is not None:
                self._free = max(1, int(self._cores - others + TOLERATED))
        return self._free


class Neighbours:
    """Cores that other processes use, of those this one may run on."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._ticks = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
        self._before: tuple[float, float, float] | None = None

    def cores(self) -> float | None:
        """Since the last call; None at first, and where the system does not tell."""
        busy = self._busy()
        if busy is None:
            return None
        now, own = time.monotonic(), time.process_time()
        before, self._before = self._before, (now, busy, own)
        if before is None or now - before[0] < LOOK_SECONDS / 2:
            return None
        return max(0.0, (busy - before[1]) - (own - before[2])) / (now - before[0])

    def _busy(self) -> float | None:
        """Seconds that the allowed processors were busy since the start of the system."""
        try:
            lines = self._stat.read_text().splitlines()
        except OSError:
            return None
        allowed = {f"cpu{cpu}" for cpu in os.sched_getaffinity(0)}
        total = 0
        for line in lines:
            name, *fields = line.split()
            if name in allowed:
                user, nice, system, _idle, _waiting, *interrupts = map(int, fields[:7])
                total += user + nice + system + sum(interrupts)
        return total / self._ticks


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
