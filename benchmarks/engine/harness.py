"""What the measurements share: a client's stream, who is measured, made-up prompts, and the figures that must be reached.

Every subject (ours, a bare loop, a server) is asked with token ids, writes greedily and never ends by itself, and is timed where its client
receives a token. Only one subject computes at a time; those that are loaded meanwhile wait without work.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from modules.backends.base import CancelToken, GenerationRequest, Timings
from modules.backends.llama_cpp import LOADER
from modules.samplers import NEUTRAL

MAY_END = NEUTRAL.replace({"temperature": 0})
GREEDY = MAY_END.replace({"ban_eos_token": True})
CONTEXT = 8192
FIRST_TOKEN = 1000
"""Vocabularies begin with special tokens and single bytes; from here on there are ordinary pieces of words."""
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstv" for vowel in ("a", "e", "i", "o", "u", "an", "er", "in")]


# --- one request ------------------------------------------------------------------------------------------------------------------------


@dataclass
class Stream:
    """One request and what its client saw of it. A subject fills it; other threads may look on."""

    prompt: Sequence[int]
    wanted: int
    """Tokens to write."""
    client: str = ""
    may_end: bool = False
    """Whether the text may end by itself (our engine only)."""
    cancel: CancelToken = field(default_factory=CancelToken)
    sent: float = 0.0
    """When it was asked, `time.perf_counter()`."""
    times: list[float] = field(default_factory=list)
    """When each token arrived."""
    tokens: list[int] = field(default_factory=list)
    """Empty where the subject does not tell ids."""
    timings: Timings = field(default_factory=Timings)
    """Of our own engine, as `reason` is; otherwise zeros."""
    reason: str = ""

    def took(self, count: int, tokens: Sequence[int] = ()) -> None:
        """So many tokens arrived now."""
        self.times += [time.perf_counter()] * count
        self.tokens += tokens

    @property
    def first(self) -> float:
        """Seconds from asking to the first token."""
        return self.times[0] - self.sent

    def gaps(self, begin: float, end: float) -> list[float]:
        """Seconds between two arrivals, for those in begin < t ≤ end."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False) if begin < later <= end and later > earlier]


def steady(streams: Sequence[Stream]) -> float:
    """Tokens/s of all together, from when the last one has its first token to when the first one has its last. nan when no such time was."""
    begin, end = max(stream.times[0] for stream in streams), min(stream.times[-1] for stream in streams)
    counted = sum(begin < time_ <= end for stream in streams for time_ in stream.times)
    return counted / (end - begin) if end > begin else float("nan")


def whole(streams: Sequence[Stream]) -> float:
    """Tokens/s of all together, from the first question to the last token."""
    return sum(len(stream.times) for stream in streams) / (max(s.times[-1] for s in streams) - min(s.sent for s in streams))


def last_first(streams: Sequence[Stream]) -> float:
    """Seconds from the first question until every stream has its first token."""
    return max(stream.times[0] for stream in streams) - min(stream.sent for stream in streams)


# --- who is measured --------------------------------------------------------------------------------------------------------------------


class Subject(Protocol):
    """What answers streams."""

    name: str

    def run(self, stream: Stream) -> None:
        """Answer one stream; returns at its end. May be called from many threads."""
        ...

    def together(self, streams: Sequence[Stream]) -> None:
        """Answer all, asked at the same moment."""
        ...


class Threaded:
    """`together` for a subject that many threads may ask: one thread a client."""

    def run(self, stream: Stream) -> None:
        """See Subject."""
        raise NotImplementedError

    def together(self, streams: Sequence[Stream]) -> None:
        """See Subject. Raises the first error of a client."""
        start = threading.Barrier(len(streams))

        def client(stream: Stream) -> None:
            start.wait()
            self.run(stream)

        with ThreadPoolExecutor(len(streams)) as pool:
            for future in [pool.submit(client, stream) for stream in streams]:
                future.result()


class Ours(Threaded):
    """Our engine, asked as the server asks it: `Backend.generate` in this process, one thread a client."""

    name = "ours"

    def __init__(self, model: Path, options: dict[str, Any]) -> None:
        self.backend: Any = LOADER.load(model, LOADER.options.build(options), lambda _fraction, _words: None, CancelToken())

    def run(self, stream: Stream) -> None:
        """See Subject. Raises UserError."""
        stream.sent = time.perf_counter()
        for chunk in self.backend.generate(request(stream)):
            if chunk.token_ids:
                stream.took(len(chunk.token_ids), chunk.token_ids)
            if chunk.finish_reason:
                stream.reason, stream.timings = chunk.finish_reason, chunk.timings or Timings()

    def prefill(self, stream: Stream) -> None:
        """Compute its prompt ahead of time."""
        self.backend.prefill(request(stream))

    def idle(self, seconds: float = 10.0) -> Any:
        """The engine's figures once it has nothing to do. Raises TimeoutError."""
        time.sleep(1.1)  # figures may be a second old
        wait(lambda: not (stats := self.backend.stats()).busy_sequences and not stats.waiting, seconds, "the engine to be idle")
        return self.backend.stats()


def request(stream: Stream) -> GenerationRequest:
    """The request that a stream asks of our engine."""
    sampling = MAY_END if stream.may_end else GREEDY
    return GenerationRequest(tuple(stream.prompt), sampling, max_new_tokens=stream.wanted, client=stream.client, cancel=stream.cancel)


def wait(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Look every 2 ms until `condition`. Raises TimeoutError naming `what`."""
    end = time.perf_counter() + seconds
    while not condition():
        if time.perf_counter() > end:
            raise TimeoutError(f"Waited {seconds:.0f} s in vain for {what}.")
        time.sleep(0.002)


# --- what is asked ----------------------------------------------------------------------------------------------------------------------


class Prompts:
    """Made-up text as token ids. `fresh` prompts begin with a token that no other one of this run begins with: nothing of them can be cached."""

    def __init__(self, encode: Callable[[str], Sequence[int]], seed: int) -> None:
        self._random = random.Random(seed)
        words = [made_up(self._random) for _ in range(300)]
        self._body = encode(" ".join(self._random.choices(words, k=8000)))
        self._first = FIRST_TOKEN

    def fresh(self, length: int) -> tuple[int, ...]:
        """So many tokens that share no start with anything before."""
        self._first += 1
        return (self._first, *self.more(length - 1))

    def more(self, length: int) -> tuple[int, ...]:
        """So many tokens from somewhere in the text, to go on with."""
        start = self._random.randrange(len(self._body) - length)
        return tuple(self._body[start : start + length])


def made_up(random_: random.Random, syllables: int = 3) -> str:
    """A word that nobody knows."""
    return "".join(random_.choices(SYLLABLES, k=syllables))


# --- what must be reached ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A figure and its bound."""

    what: str
    value: float
    bound: float
    at_least: bool = True
    """Otherwise at most."""

    @property
    def met(self) -> bool:
        """False for nan too."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def row(self) -> str:
        """One line of the table."""
        return f"{'ok    ' if self.met else 'MISSED'}  {self.what:<92} {self.value:9.3f}   wanted {'≥' if self.at_least else '≤'} {self.bound:g}"


@dataclass(frozen=True)
class Bench:
    """What all measurements are given."""

    model: Path
    prompts: Prompts
    threads: int
    """Of every subject, for writing and reading, where subjects are compared."""
    llama_server: Path | None
    runs: int
    minutes: float
    """Of the soak."""
    quick: bool
    """A smoke run: everything small."""

    @contextlib.contextmanager
    def ours(self, **options: Any) -> Iterator[Ours]:
        """Our engine, with the compared number of threads unless told otherwise."""
        given = {"ctx_size": CONTEXT, "threads": self.threads, "threads_batch": self.threads, **options}
        subject = Ours(self.model, given)
        try:
            yield subject
        finally:
            subject.backend.unload()

    def few(self, full: int, quick: int) -> int:
        """`full`, or `quick` in a smoke run."""
        return quick if self.quick else full


def median_of(figures: Sequence[float]) -> float:
    """The median; nan for none."""
    return statistics.median(figures) if figures else float("nan")


def percentile(figures: Sequence[float], share: float) -> float:
    """The smallest figure that `share` of all do not exceed; nan for none."""
    ordered = sorted(figures)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


@contextlib.contextmanager
def in_background(subject: Subject, streams: Sequence[Stream]) -> Iterator[None]:
    """Let `streams` be answered meanwhile; they are cancelled at the end. Raises the first error of a client."""
    with ThreadPoolExecutor(len(streams)) as pool:
        futures = [pool.submit(subject.run, stream) for stream in streams]
        try:
            yield
        finally:
            for stream in streams:
                stream.cancel.cancel()
            for future in futures:
                future.result()


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def title(text: str) -> None:
    """Print a heading."""
    say(f"\n--- {text}")
