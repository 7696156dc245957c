"""Eight clients at once with the same system prompt and different questions, over computing each of them alone.

Alone means one after the other, each with a system prompt of its own that begins with another token: nothing can be reused, and that it was not is
checked. Both are timed to the first token; the replies go on meanwhile.
"""

from __future__ import annotations

from benchmarks.engine.harness import Bench, Check, Ours, Stream, Subject, last_first, median_of, say, title
from benchmarks.engine.references import llama_server

CLIENTS, QUESTION, REPLY = 8, 12, 16


def measure(bench: Bench) -> list[Check]:
    """See the module."""
    rounds, system = bench.runs, bench.few(1000, 150)
    title(f"prefix: {CLIENTS} clients, system prompt of {system} tokens, questions of {QUESTION}, medians of {rounds}")
    with bench.ours(parallel=CLIENTS, cache_ram=0) as ours:
        ratio = compare(bench, ours, system, rounds)
    with llama_server(bench, CLIENTS, ["-kvu", "-c", "16384"]) as server:  # it shares nothing: eight do not fit into 8,192 cells
        if server:
            compare(bench, server, system, rounds)
    return [Check(f"prefix: {CLIENTS} clients, time to all first tokens over computing each alone", ratio, 0.15, at_least=False)]


def compare(bench: Bench, subject: Subject, length: int, rounds: int) -> float:
    """The ratio of the medians, with a system prompt of `length` tokens."""
    alone, together, reused = [], [], []
    for _ in range(rounds):
        each = [Stream(bench.prompts.fresh(length + QUESTION), REPLY) for _ in range(CLIENTS)]
        for stream in each:
            subject.run(stream)
        if any(stream.timings.reused_tokens for stream in each):
            raise RuntimeError("A prompt that shares nothing was not computed whole: the comparison would not be fair.")
        alone.append(sum(stream.first for stream in each))
        system = bench.prompts.fresh(length)
        streams = [Stream((*system, *bench.prompts.more(QUESTION)), REPLY, client=f"client {i}") for i in range(CLIENTS)]
        subject.together(streams)
        together.append(last_first(streams))
        reused.append(sum(stream.timings.reused_tokens for stream in streams))
    ratio = median_of(together) / median_of(alone)
    what = f", reused {median_of(reused):.0f} of {CLIENTS * (length + QUESTION)} prompt tokens" if isinstance(subject, Ours) else ""
    say(f"{subject.name:<16} alone, added up {median_of(alone):6.2f} s   all at once {median_of(together):6.2f} s   ratio {ratio:.3f}{what}")
    return ratio
