"""How fast we write: one client beside a bare loop, and 4, 8 and 16 at once beside llama-server with as many slots.

Two speeds of all clients together: "steady" from the moment when the last one has its first token until the first one is done; "whole" from the
first question to the last token, prompts included. Steady decides. "Client" is what this process spends on receiving a token: it shares the cores.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

from benchmarks.engine.harness import Bench, Check, Stream, Subject, median_of, say, steady, title, whole
from benchmarks.engine.references import bare, llama_server, python_server

PROMPT_TOKENS = 24
Speeds = dict[str, tuple[float, float, float]]
"""(steady, whole, client's seconds for a token) by name of the subject, medians."""


def decode(bench: Bench) -> list[Check]:
    """One client."""
    title(f"decode: 1 client, {bench.threads} threads each, medians of {bench.runs}, taking turns")
    with contextlib.ExitStack() as stack:
        ours, loop = stack.enter_context(bench.ours(parallel=1)), stack.enter_context(bare(bench))
        automatic = stack.enter_context(bench.ours(parallel=1, threads=0, threads_batch=0))
        automatic.name = "ours, automatic threads"
        servers = [
            stack.enter_context(llama_server(bench, 1)),
            stack.enter_context(llama_server(bench, 1, own_threads=True, name="llama-server, its own threads")),
            stack.enter_context(python_server(bench, ours.backend)),
        ]
        if servers[-1] is None:
            say("llama_cpp.server: not measured, the extra [server] of llama-cpp-python is not installed")
        speeds = race(bench, [loop, ours, automatic, *filter(None, servers)], 1)
    return [Check("decode: 1 client, tokens/s over the bare loop's", speeds["ours"][0] / speeds[loop.name][0], 0.97)]


def clients(bench: Bench) -> list[Check]:
    """Several clients at once."""
    checks = []
    for count in (4,) if bench.quick else (4, 8, 16):
        title(f"clients: {count} at once, {bench.threads} threads each, medians of {bench.runs}, taking turns")
        with contextlib.ExitStack() as stack:
            ours, loop = stack.enter_context(bench.ours(parallel=count)), stack.enter_context(bare(bench, count))
            servers = [
                stack.enter_context(llama_server(bench, count)),
                stack.enter_context(llama_server(bench, count, ["-kvu"], name="llama-server, unified cache")),
                stack.enter_context(llama_server(bench, count, own_threads=True, name="llama-server, its own threads")),
                stack.enter_context(python_server(bench, ours.backend)) if count == 4 else None,
            ]
            speeds = race(bench, [loop, ours, *filter(None, servers)], count)
        name, bound = ("llama-server", 1.0) if servers[0] else (loop.name, 0.98)
        checks.append(Check(f"clients: {count} at once, tokens/s over {name}'s", speeds["ours"][0] / speeds[name][0], bound))
    return checks


def race(bench: Bench, subjects: Sequence[Subject], count: int) -> Speeds:
    """Ask each subject in turn, as often as `bench.runs` says and once before to warm up; print and return the medians."""
    tokens = bench.few(256, 32)
    runs: dict[str, list[tuple[float, float, float]]] = {subject.name: [] for subject in subjects}
    for run in range(bench.runs + 1):
        prompts = [bench.prompts.fresh(PROMPT_TOKENS) for _ in range(count)]
        for subject in subjects:
            streams = [Stream(prompt, tokens, client=f"client {i}") for i, prompt in enumerate(prompts)]
            before = time.process_time()
            subject.together(streams)
            if run:
                client = (time.process_time() - before) / (count * tokens)
                runs[subject.name].append((steady(streams), whole(streams), client))
    speeds: Speeds = {}
    for name, figures in runs.items():
        fast, all_, client = (median_of(column) for column in zip(*figures, strict=True))
        speeds[name] = (fast, all_, client)
        each = " ".join(f"{figure[0]:.1f}" for figure in figures)
        say(f"{name:<32} steady {fast:7.1f} tok/s   whole {all_:7.1f} tok/s   client {client * 1e6:4.0f} µs a token   (steady: {each})")
    return speeds
