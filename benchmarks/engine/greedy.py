"""Whether our engine writes what the bare loop writes: token for token alone, and nearly so in a full batch.

Alone, the engine is started anew for each prompt, so that its cache is empty. In a batch, numbers are added in another order, and two candidates
that are nearly equal may change places: for each first difference the bare loop tells how far apart their logits are. What the library itself
does to a prompt that is computed in pieces is shown beside it: the same loop, which reads 32 tokens at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from benchmarks.engine.harness import Bench, Check, Ours, Stream, say, title
from benchmarks.engine.references import Bare, bare

CLIENTS, PIECE = 8, 32
OPENINGS = (
    "Once upon a time there was",
    "The most important thing to know about",
    "Write a short letter about",
    "In the year 1900, people thought that",
    "Question: What is special about",
    "My grandmother used to tell me a story of",
    "def describe():\n    # Returns a text about",
    "Five facts about",
    "Nobody in the village had ever seen",
    "Dear editor, I disagree with your article on",
)
TOPICS = ("a lighthouse keeper", "the river in winter", "old clocks and their makers", "a market at night", "the history of bread")


def measure(bench: Bench) -> list[Check]:
    """See the module."""
    with bench.ours() as ours:
        prompts = [tuple(ours.backend.encode(text, True)) for text in texts()][: bench.few(50, 4)]
        ends = tuple(ours.backend.encode(ours.backend.eos_token))
    tokens = bench.few(128, 48)
    title(f"greedy: {len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, {tokens} tokens each")
    with bare(bench) as loop:
        wanted = [loop.write(prompt, tokens) for prompt in prompts]
        alone = [_alone(bench, prompt, tokens) for prompt in prompts]
        equal = sum(_equal(_written(stream, ends), right) for stream, right in zip(alone, wanted, strict=True))
        say(f"1 client, empty cache: {equal} of {len(prompts)} equal to the bare loop's; reused tokens {sum(s.timings.reused_tokens for s in alone)}")
        _gaps(loop, [_written(stream, ends) for stream in alone], prompts, wanted)
        crowd = _crowd(bench, prompts, tokens)
        same = sum(_equal(_written(stream, ends), right) for stream, right in zip(crowd, wanted, strict=True))
        say(f"{CLIENTS} clients: {same} of {len(prompts)} equal ({same / len(prompts):.2f})")
        gaps = _gaps(loop, [_written(stream, ends) for stream in crowd], prompts, wanted)
        pieces = [loop.write(prompt, tokens, piece=PIECE) for prompt in prompts]
        say(f"the bare loop, prompts read {PIECE} tokens at once: {sum(map(_equal, pieces, wanted))} of {len(prompts)} equal to its own")
        _gaps(loop, pieces, prompts, wanted)
    return [
        Check("greedy: prompts written as the bare loop writes them, 1 client, over all", equal / len(prompts), 1),
        Check(f"greedy: widest gap of logits at a first difference, {CLIENTS} clients", max(gaps, default=0.0), 0.1, at_least=False),
    ]


def texts() -> list[str]:
    """50 openings; every third one has three others in front of it, every tenth one has all those before it."""
    plain = [f"{opening} {topic}" for topic in TOPICS for opening in OPENINGS]
    before = [i if i % 10 == 9 else 3 * (i % 3 == 2) for i in range(len(plain))]
    return [". ".join(plain[max(0, i - before[i]) : i + 1]) for i in range(len(plain))]


def _alone(bench: Bench, prompt: Sequence[int], tokens: int) -> Stream:
    stream = Stream(prompt, tokens, may_end=True)
    with bench.ours() as ours:
        ours.run(stream)
    return stream


def _crowd(bench: Bench, prompts: Sequence[Sequence[int]], tokens: int) -> list[Stream]:
    """The same by one engine, always `CLIENTS` at once."""
    streams = [Stream(prompt, tokens, client=f"client {i}", may_end=True) for i, prompt in enumerate(prompts)]
    with bench.ours(parallel=CLIENTS) as ours, ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(lambda stream: Ours.run(ours, stream), streams))
    return streams


def _equal(ours: Sequence[int], wanted: Sequence[int]) -> bool:
    return _difference(ours, wanted) is None


def _written(stream: Stream, ends: Sequence[int]) -> list[int]:
    """Its tokens; where it ended by itself, the token that ends a text after them, as the bare loop tells it."""
    return [*stream.tokens, *(ends[:1] if stream.reason == "stop" else ())]


def _difference(ours: Sequence[int], wanted: Sequence[int]) -> int | None:
    """The first place where they differ."""
    places = range(max(len(ours), len(wanted)))
    return next((place for place in places if list(ours[place : place + 1]) != list(wanted[place : place + 1])), None)


def _gaps(loop: Bare, texts: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> list[float]:
    """At each first difference: the bare loop's logit of its own candidate less that of ours. Printed too."""
    gaps = []
    for ours, prompt, right in zip(texts, prompts, wanted, strict=True):
        place = _difference(ours, right)
        if place is None:
            continue
        if place >= min(len(ours), len(right)):  # one is the other's beginning: no difference between candidates, and never right
            gap = float("inf")
        else:
            best, other = loop.logits(prompt, right[:place], (right[place], ours[place]))
            gap = best - other
        gaps.append(gap)
        say(f"    prompt of {len(prompt)} tokens: first difference at token {place} of {len(right)}, gap {gap:.4f}")
    return gaps
