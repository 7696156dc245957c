"""A long prompt arrives while others' replies stream: how much longer the gaps between their tokens become, and how fast it is read.

Measured for four values of the share of time that prompts get, and for llama-server with four batch sizes, which is what it has instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.engine.harness import Bench, Check, Stream, Subject, in_background, median_of, percentile, say, title, wait
from benchmarks.engine.references import llama_server
from modules.backends.llama_cpp import LOADER

STREAMS, LONGEST = 4, 1200
SHARES = (0.2, 0.4, 0.8, 0.9)
BATCHES = (64, 128, 512, 2048)
PATIENCE = 120.0


@dataclass
class Disturbed:
    """What was seen of one subject: seconds."""

    prompt: int
    """Tokens of the long prompt."""
    before: list[float] = field(default_factory=list)
    during: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    """To the long prompt's first token, with nobody else."""
    beside: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median gap over the median before."""
        return median_of(self.during) / median_of(self.before)

    @property
    def worst(self) -> float:
        """99th percentile over the median before."""
        return percentile(self.during, 0.99) / median_of(self.before)

    @property
    def speed(self) -> float:
        """Of reading, over undisturbed."""
        return median_of(self.alone) / median_of(self.beside)

    def row(self, name: str) -> str:
        """One line."""
        before, during = median_of(self.before) * 1000, median_of(self.during) * 1000
        return (
            f"{name:<24} gap {before:6.1f} → {during:6.1f} ms ({self.median:5.2f}×)   p99 {percentile(self.before, 0.99) * 1000:6.1f} → "
            f"{percentile(self.during, 0.99) * 1000:6.1f} ms ({self.worst:5.2f}× the median)   reads {self.prompt / median_of(self.alone):6.0f} → "
            f"{self.prompt / median_of(self.beside):6.0f} tok/s ({self.speed:.2f})"
        )


def measure(bench: Bench) -> list[Check]:
    """See the module."""
    rounds, length = bench.few(3, 1), bench.few(3000, 500)
    title(f"interference: a prompt of {length} tokens beside {STREAMS} streams, {rounds} times; gaps of all streams together")
    usual = float(LOADER.options.model_fields["prefill_share"].default)
    others = [share for share in SHARES if share != usual]
    found = {}
    for share in [usual] if bench.quick else sorted([usual, *others[:3]]):
        with bench.ours(parallel=STREAMS + 1, prefill_share=share) as ours:
            found[share] = disturb(bench, ours, length, rounds)
        say(found[share].row(f"ours, share {share:g}" + (" (default)" if share == usual else "")))
    for batch in BATCHES[-1:] if bench.quick else BATCHES:
        with llama_server(bench, STREAMS + 1, ["-kvu", "-b", str(batch), "-ub", str(min(batch, 512))]) as server:
            if server:
                say(disturb(bench, server, length, rounds).row(f"llama-server, -b {batch}"))
    return [
        Check("interference: median gap during a long prompt over the median before", found[usual].median, 4, at_least=False),
        Check("interference: 99th percentile of the gaps over the median before", found[usual].worst, 8, at_least=False),
        Check("interference: its prefill speed over undisturbed", found[usual].speed, 0.4),
    ]


def disturb(bench: Bench, subject: Subject, length: int, rounds: int) -> Disturbed:
    """Send prompts of `length` tokens alone and beside streams, in turn."""
    subject.run(Stream(bench.prompts.fresh(64), 8))
    seen = Disturbed(length)
    for _ in range(rounds):
        alone = Stream(bench.prompts.fresh(length), 1)
        subject.run(alone)
        seen.alone.append(alone.first)
        _beside(bench, subject, seen)
    return seen


def _beside(bench: Bench, subject: Subject, seen: Disturbed) -> None:
    settled, measured = bench.few(20, 5), bench.few(100, 30)
    streams = [Stream(bench.prompts.fresh(24), LONGEST, client=f"client {i}") for i in range(STREAMS)]
    prompt = Stream(bench.prompts.fresh(seen.prompt), 1, client="newcomer")
    with in_background(subject, streams):
        wait(lambda: all(len(stream.times) >= settled for stream in streams), PATIENCE, "all streams to begin")
        begin = max(stream.times[settled - 1] for stream in streams)
        wait(lambda: all(len(stream.times) >= settled + measured for stream in streams), PATIENCE, "the streams to go on")
        subject.run(prompt)
        if any(len(stream.times) >= LONGEST for stream in streams):
            raise RuntimeError("A stream ended before the long prompt was read: the machine is too fast or too slow for these lengths.")
    seen.beside.append(prompt.first)
    for stream in streams:
        seen.before += stream.gaps(begin, prompt.sent)
        seen.during += stream.gaps(prompt.sent, prompt.times[0])
