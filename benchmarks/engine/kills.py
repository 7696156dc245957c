"""The engine is killed, or stopped, at random moments under load: clear errors in time, service back by itself, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engine.harness import Bench, Check, Ours, Stream, median_of, say, title, wait
from modules.errors import EngineDied, UserError

CLIENTS, LONGEST = 4, 1500
TIMEOUT = 5
SLACK = 1.0
BACK_SECONDS = 30.0
MARK = "TGW_BENCHMARK_ENGINE"


@dataclass
class Kill:
    """One kill of a process and what came of it."""

    pid: int
    how: signal.Signals
    moment: float
    endings: list[Ending]
    back: float = float("inf")
    """Seconds from the kill to a reply; infinite when none came."""
    refusals: int = 0
    """Requests after the errors that were refused before one was answered."""

    @property
    def latest(self) -> float:
        """Seconds from the kill to the last running request's end."""
        return max(ending.ended for ending in self.endings) - self.moment

    def row(self) -> str:
        """One line."""
        return (
            f"{self.how.name:<8} process {self.pid}: latest error after {self.latest:5.2f} s, "
            f"service back after {self.back:5.2f} s, refusals until then {self.refusals}"
        )


@dataclass
class Ending:
    """How one running request ended."""

    error: UserError | None = None
    ended: float = 0.0
    """`time.perf_counter()`."""

    @property
    def clear(self) -> bool:
        """An error that says what happened and what to do."""
        return isinstance(self.error, EngineDied) and len(str(self.error).split(". ")) > 1


def measure(bench: Bench) -> list[Check]:
    """See the module."""
    kills, random_ = bench.few(50, 2), random.Random(bench.runs)
    title(f"kills: {kills} times kill -9 or SIGSTOP in turn, {CLIENTS} running requests, --engine-timeout {TIMEOUT}")
    os.environ[MARK] = uuid.uuid4().hex  # all processes that descend from us carry it, orphans too
    done: list[Kill] = []
    left = 0
    with bench.ours(engine_timeout=TIMEOUT, parallel=CLIENTS) as ours:
        for number in range(kills):
            kill = _kill_under_load(bench, ours, (signal.SIGKILL, signal.SIGSTOP)[number % 2], random_)
            _ask_until_answered(bench, ours, kill)
            left += _left_behind(ours.backend.pid)
            done.append(kill)
            say(f"{number + 1:3} {kill.row()}")
            for ending in kill.endings:
                if not ending.clear:
                    say(f"      unclear: {type(ending.error).__name__}: {ending.error}")
    left += _left_behind(None)
    late, back = [kill.latest for kill in done], [kill.back for kill in done]
    unclear = sum(not ending.clear for kill in done for ending in kill.endings)
    say(
        f"latest errors: median {median_of(late):.2f} s, worst {max(late):.2f} s; back: median {median_of(back):.2f} s, worst {max(back):.2f} s; "
        f"{sum(kill.refusals > 0 for kill in done)} times the first request after the errors was refused"
    )
    return [
        Check("kills: seconds until the latest error of a running request", max(late), TIMEOUT + SLACK, at_least=False),
        Check("kills: running requests that did not end with a clear error", unclear, 0, at_least=False),
        Check("kills: seconds from the kill to a reply, the longest", max(back), BACK_SECONDS, at_least=False),
        Check("kills: processes left behind (orphans, zombies)", left, 0, at_least=False),
    ]


def _kill_under_load(bench: Bench, ours: Ours, how: signal.Signals, random_: random.Random) -> Kill:
    """Kill while all clients' requests run: some read their prompts still, some write."""
    endings = [Ending() for _ in range(CLIENTS)]
    streams = [Stream(bench.prompts.fresh(random_.randint(16, 1500)), LONGEST, client=f"client {i}") for i in range(CLIENTS)]

    def client(stream: Stream, ending: Ending) -> None:
        try:
            ours.run(stream)
        except UserError as error:
            ending.error = error
        ending.ended = time.perf_counter()

    threads = [threading.Thread(target=client, args=pair) for pair in zip(streams, endings, strict=True)]
    for thread in threads:
        thread.start()
    wait(lambda: all(stream.sent for stream in streams), 10, "all clients to ask")
    time.sleep(random_.uniform(0.02, 2.5))  # the random moment
    kill = Kill(ours.backend.pid, how, time.perf_counter(), endings)
    os.kill(kill.pid, how)
    for thread in threads:
        thread.join()
    return kill


def _ask_until_answered(bench: Bench, ours: Ours, kill: Kill) -> None:
    """Ask anew until there is a reply, at most twice as long as it may take."""
    while time.perf_counter() - kill.moment < 2 * BACK_SECONDS:
        try:
            ours.run(Stream(bench.prompts.fresh(16), 4))
        except UserError as error:
            kill.refusals += 1
            if kill.refusals == 1:
                say(f"      refused at first: {type(error).__name__}: {error}")
            time.sleep(0.5)
        else:
            kill.back = time.perf_counter() - kill.moment
            return


def _left_behind(current: int | None) -> int:
    """Processes with our mark, or zombies of ours, other than this one and the `current` engine. Printed too."""
    with contextlib.suppress(TimeoutError):
        wait(lambda: not _others(current), 2, "processes to end")
    others = _others(current)
    for pid, what in others.items():
        say(f"      left behind: process {pid}, {what}")
    return len(others)


def _others(current: int | None, proc: Path = Path("/proc")) -> dict[int, str]:
    found = {}
    for folder in proc.iterdir():
        if not folder.name.isdigit() or int(folder.name) in (os.getpid(), current):
            continue
        with contextlib.suppress(OSError):  # it has just ended
            state, parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            if state == "Z" and int(parent) == os.getpid():
                found[int(folder.name)] = "zombie"
            elif f"{MARK}={os.environ[MARK]}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = f"state {state}, parent {parent}"
    return found
