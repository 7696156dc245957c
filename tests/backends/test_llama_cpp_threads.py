"""The number of threads: fixed where it is configured, else what other programs leave free."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from modules.backends.llama_cpp import threads as module
from modules.backends.llama_cpp.threads import Neighbours, Threads, usable_cores

CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that `time.monotonic` tells; set by the test."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def threads(monkeypatch: pytest.MonkeyPatch, cores: int, *values: int, busy: Iterator[float | None] | None = None) -> Threads:
    monkeypatch.setattr(module, "usable_cores", lambda: cores)
    return Threads(*values, neighbours=lambda: next(busy) if busy else None)


def test_configured_numbers_stay(monkeypatch, clock):
    made = threads(monkeypatch, 8, 3, 5, busy=iter([8.0]))
    assert (made.writing, made.reading) == (3, 5)
    assert [made.now(tokens) for tokens in (1, 2, 500)] == [3, 5, 5] and made.last == 5
    assert [made.now(tokens) for tokens in (1, 2)] == [3, 5] and made.last == 5
    half = threads(monkeypatch, 8, 0, 5, busy=iter([7.0]))
    assert half.now(2) == 5 and half.now(1) == 1


def test_automatic_is_one_a_core_on_a_quiet_machine(monkeypatch, clock):
    made = threads(monkeypatch, 8)
    assert (made.writing, made.reading) == (8, 8) and made.now(1) == 8 and made.now(100) == 8


@pytest.mark.parametrize(("others", "wanted"), [(0.0, 8), (0.5, 8), (0.7, 7), (1.0, 7), (2.0, 6), (7.9, 1), (30.0, 1)])
def test_automatic_leaves_others_their_cores(monkeypatch, clock, others, wanted):
    assert threads(monkeypatch, 8, busy=iter([others])).now(1) == wanted


def test_a_single_core_is_always_used(monkeypatch, clock):
    assert threads(monkeypatch, 1, busy=iter([1.0])).now(1) == 1


def test_it_looks_again_only_after_a_while_and_keeps_what_it_knew(monkeypatch, clock):
    made = threads(monkeypatch, 4, busy=iter([3.0, None, 0.0]))
    assert made.now(1) == 1
    clock[0] += module.LOOK_SECONDS / 2
    assert made.now(1) == 1
    clock[0] += module.LOOK_SECONDS
    assert made.now(1) == 1  # nothing was found out
    clock[0] += module.LOOK_SECONDS
    assert made.now(1) == 4


# --- what others use ----------------------------------------------------------------------------------------------------------------


def write_stat(path: Path, seconds: float) -> None:
    """So many seconds on the first processor allowed, half of them as user, and much on one that is not."""
    ticks = os.sysconf("SC_CLK_TCK")
    busy = int(seconds * ticks)
    lines = [
        f"cpu  {busy} 0 0 5 5 0 0 0 0 0",
        f"cpu{CPUS[0]} {busy // 2} 0 {busy - busy // 2} 77777 99999 0 0 0 0 0",
        "cpu9999 55555 0 0 5 5 0 0 0 0 0",
    ]
    path.write_text("\n".join([*lines, "intr 1 2 3", "ctxt 5"]) + "\n")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="/proc")
def test_neighbours_are_all_but_ourselves(tmp_path, monkeypatch, clock):
    own = [5.0]
    monkeypatch.setattr(module.time, "process_time", lambda: own[0])
    stat = tmp_path / "stat"
    write_stat(stat, 100)
    looked = Neighbours(stat)
    assert looked.cores() is None  # nothing to compare with
    clock[0] += 10
    own[0] += 3
    write_stat(stat, 108)
    assert looked.cores() == pytest.approx(0.5, abs=0.01)  # 8 seconds in 10, 3 of them our own
    clock[0] += 10
    own[0] += 10
    write_stat(stat, 117)
    assert looked.cores() == 0.0  # our own clock runs finer
    clock[0] += module.LOOK_SECONDS / 10
    assert looked.cores() is None


def test_where_the_system_does_not_tell_nothing_is_known(tmp_path):
    assert Neighbours(tmp_path / "none").cores() is None


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="/proc")
def test_a_busy_neighbour_is_seen():
    looked = Neighbours()
    looked.cores()
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            pass

    own = threading.Thread(target=work)  # this process's own work is not a neighbour's
    own.start()
    time.sleep(0.5)  # a measurement takes its time
    over.set()
    own.join()
    found = looked.cores()
    assert found is not None and 0 <= found <= len(CPUS)


# --- cores --------------------------------------------------------------------------------------------------------------------------


def test_usable_cores(tmp_path):
    for cpu in CPUS:
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text("0-1\n")
    none = tmp_path / "none"
    assert usable_cores(tmp_path, none) == 1  # all threads of one core
    assert usable_cores(none, none) == len(CPUS)
    quota = tmp_path / "cpu.max"
    for text, wanted in (("100000 100000\n", 1), ("50000 100000\n", 1), ("max 100000\n", len(CPUS)), ("no numbers\n", len(CPUS)), ("", len(CPUS))):
        quota.write_text(text)
        assert usable_cores(none, quota) == wanted
