"""Another program that never rests, beside four clients: tokens/s with it over without. Thread counts are each program's own choice here."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks.engine.harness import Bench, Check, Ours, Stream, Subject, in_background, median_of, say, steady, title, wait
from benchmarks.engine.references import llama_server

CLIENTS, LONGEST = 4, 1900


def measure(bench: Bench) -> list[Check]:
    """See the module."""
    title(f"neighbour: {CLIENTS} clients, one busy process beside the engine or none, in turn, medians of {bench.few(bench.runs, 1)}")
    with bench.ours(threads=0, threads_batch=0) as ours:
        ratio = compare(bench, ours)
    with llama_server(bench, CLIENTS, own_threads=True, name="llama-server, its own threads") as server:
        if server:
            compare(bench, server)
    return [Check(f"neighbour: {CLIENTS} clients, tokens/s beside a busy process over quiet", ratio, 0.4)]


def compare(bench: Bench, subject: Subject) -> float:
    """The ratio of the medians."""
    quiet, beside, threads = [], [], {}
    speed(bench, subject)  # warms up
    for _ in range(bench.few(bench.runs, 1)):
        quiet.append(speed(bench, subject))
        threads["quiet"] = _threads(subject)
        with busy_process():
            beside.append(speed(bench, subject))
            threads["beside"] = _threads(subject)
    ratio = median_of(beside) / median_of(quiet)
    each = ", ".join(f"{a:.1f} → {b:.1f}" for a, b in zip(quiet, beside, strict=True))
    say(f"{subject.name:<32} quiet {median_of(quiet):7.1f} tok/s   beside {median_of(beside):7.1f} tok/s   ratio {ratio:.3f}   ({each})")
    if isinstance(subject, Ours):
        say(f"{'':<32} threads in the end: quiet {threads['quiet']}, beside {threads['beside']}")
    return ratio


def speed(bench: Bench, subject: Subject) -> float:
    """Tokens/s of all clients together, over a fixed time: a collapse must not take forever."""
    seconds = bench.few(10, 3)
    streams = [Stream(bench.prompts.fresh(24), LONGEST, client=f"client {i}") for i in range(CLIENTS)]
    with in_background(subject, streams):
        wait(lambda: all(len(stream.times) > 1 for stream in streams), 120, "all streams to begin")
        end = time.perf_counter() + seconds
        wait(lambda: time.perf_counter() > end or any(len(stream.times) == LONGEST for stream in streams), seconds + 1, "the time to pass")
    return steady(streams)


def _threads(subject: Subject) -> int:
    """Of our engine's last step."""
    return int(subject.backend.stats().threads) if isinstance(subject, Ours) else 0


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """A process that computes all the time, for a second before already."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(1)
        yield
    finally:
        process.kill()
        process.wait()
