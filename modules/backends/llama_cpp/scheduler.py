"""Who computes what in the next step: continuous batching of many requests on one context.

A job is a list of tokens: its prompt, then what it has written. A sequence in the cache holds the start of that list. What is missing is computed,
a piece in each step; when nothing is missing, the next token is chosen and put at the end. That is all: reading a prompt, writing, going on after
having given way, and using what others have computed differ only in how much is missing.

Each step is one decoding of: the newest token of every job that writes, and a piece of the prompts that are being read, no longer than
`prefill_share` of the step's time allows. So a long prompt slows the others down by a bounded factor and never stops them.

Invariants (tests/backends/test_llama_cpp_scheduler.py tries them with random arrivals, cancels, lengths and evictions):
- Every job ends exactly once: by `ended` or `failed`, after which nothing is told it.
- Its tokens depend on its own tokens only; what it shares with others is a prefix that is the same for both.
- Within a priority and a client jobs get their places in the order of their arrival; between clients, who has fewer places is next, or who got
  one longer ago.
- No job ends because of another. Where cells are short the youngest gives way: it waits again, and goes on later where it was.
- No cell is lost: when nobody runs, what is in use is what finished sequences keep.
- A cancel takes effect within one step. Jobs of low priority compute only while no other job is here.
"""

from __future__ import annotations

import bisect
import collections
import itertools
import sys
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import numpy as np

from modules.backends.llama_cpp.cache import Cache, Held, common_prefix
from modules.errors import Busy, ModelError, NotANumber, UserError

NORMAL, LOW = 0, 1
MAX_LOW = 16
"""Jobs of low priority that may wait; the oldest one gives way for good to the next."""
MARGIN = 256
"""Free cells for its first new tokens that a job finds when it gets its place beside others."""
WORTH_WAITING = 16
"""Tokens that another job must be about to compute, for a job with the same prompt to wait for them."""
TURN_SECONDS = 0.1
"""How long jobs of one set of adapters compute before those of another do: changing adapters costs a new plan of the computation."""
LONGEST_STEP_SECONDS = 1.0
"""Aim for a step in which nobody writes: what arrives during it waits so long."""
TILE = 64
"""Flash attention on a CPU computes so many tokens at once, and as long for fewer."""
ONE_PAUSE_SECONDS = 0.75
"""Where more people wait for their first word than are being written to, these wait once so long, if it is all that those lack. Piece by piece it
would take longer: the fewer tokens at once, the more time for each."""
SMALLEST_PIECE = 7
"""Tokens of a prompt in a step in which others write: fewer cost the prompt more than they spare the others (docs/architecture.md has figures)."""
CLIENTS_REMEMBERED = 1000
PROGRESS_SECONDS = 0.1
"""Between two reports of how far a prompt is."""


class Computed(Enum):
    """How a decoding ended. Only DONE leaves anything in the cache."""

    DONE = 0
    FULL = 1
    STOPPED = 2


@dataclass
class Row:
    """What one sequence computes in a step."""

    sequence: int
    tokens: np.ndarray
    positions: np.ndarray
    outputs: int
    """For so many of the last tokens a choice or a probability will be asked."""
    first: int = 0
    """Place of its first token in the batch."""


class Decoder(Protocol):
    """The native context, as far as the scheduler needs it."""

    batch_size: int
    """Most tokens of one decoding."""
    outputs_size: int
    """Most outputs of one decoding."""

    def decode(self, rows: Sequence[Row], key: Hashable, stop: Callable[[], bool] | None) -> Computed:
        """Compute `rows` with the adapters `key`; `stop`, asked often, may end it early. Raises ModelError. Not DONE: the cache is as before."""
        ...

    def decode_image(self, image: Any, position: int, sequence: int, key: Hashable) -> Computed:
        """Compute an image's entries at `position`."""
        ...


class Speculator(Protocol):
    """Guesses tokens ahead; the model then computes them all at once, and those it would have chosen itself are kept."""

    def guess(self, jobs: Sequence[Job], most: Mapping[int, int]) -> dict[int, list[int]]:
        """For each job's id at most `most[id]` tokens that may follow `job.tokens`; jobs without a guess are left out."""
        ...

    def forget(self, job: Job) -> None:
        """The job has ended or has to wait."""
        ...


class Voice(Protocol):
    """Chooses a job's tokens and tells its client. Called on the computing thread; of a job that never got a place also on its submitter's."""

    def choose(self, output: int) -> int | None:
        """The token to follow output `output` of the last decoding, not an end token; None when the text ends here. Raises NotANumber."""
        ...

    def wrote(self, job: Job, tokens: Sequence[int]) -> None:
        """These tokens were chosen."""
        ...

    def read(self, job: Job, outputs: range) -> None:
        """So much of the prompt is computed; `outputs` are places in the batch of its newest tokens, for their probabilities."""
        ...

    def waits(self, position: int) -> None:
        """So many jobs get a place before this one."""
        ...

    def ended(self, job: Job, reason: str) -> None:
        """ "stop", "length" or "cancelled". Frees what `choose` needs."""
        ...

    def failed(self, job: Job, error: UserError) -> None:
        """It ends with an error. Frees what `choose` needs."""
        ...


class Job:
    """One request, and how far it is."""

    def __init__(
        self,
        id: int,
        voice: Voice,
        *,
        client: str = "",
        priority: int = NORMAL,
        key: Hashable = None,
        limit: int | None = None,
        reads_probabilities: bool = False,
    ) -> None:
        """`limit`: new tokens at most; `key`: what else the cache's content depends on; `reads_probabilities`: of the prompt's tokens."""
        self.id = id
        self.voice = voice
        self.client = client
        self.priority = priority
        self.key = key
        self.limit = limit
        self.reads_probabilities = reads_probabilities
        self.cancelled = False
        self.arrived = time.monotonic()
        self.started = 0.0
        """When it got its place first; then when it was read, when its first and its newest token were chosen. 0: not yet."""
        self.first_token = self.last_token = 0.0
        self.prompt = 0
        """Tokens of the prompt; the rest of `tokens` was written."""
        self.reused = -1
        """Prompt tokens found in the cache; −1 before the job got its place."""
        self.drafted = self.accepted = 0
        self.position: int | None = None
        self.images: Sequence[Any] = ()
        """Parts of the prompt that are computed as a whole, with `start` and `length`."""
        self.sequence: Held | None = None
        self.leader: tuple[Job, int] | None = None
        self.told = 0.0
        self._tokens = np.zeros(0, np.int32)
        self._positions = np.zeros(0, np.int32)
        self.length = 0

    def ask(self, tokens: Sequence[int], positions: Sequence[int] | None = None, images: Sequence[Any] = ()) -> None:
        """Set the prompt. Must be done before the job is ready."""
        self.prompt = self.length = len(tokens)
        self._tokens = np.array(tokens, np.int32)
        self._positions = np.arange(self.length, dtype=np.int32) if positions is None else np.array(positions, np.int32)
        self.images = images

    def append(self, token: int) -> None:
        """Add a written token."""
        if self.length == len(self._tokens):
            self._tokens, self._positions = (np.concatenate([a, np.zeros(max(256, len(a)), np.int32)]) for a in (self._tokens, self._positions))
        self._tokens[self.length] = token
        self._positions[self.length] = self._next_position()
        self.length += 1

    def _next_position(self) -> int:
        """After an image that takes fewer positions than entries, the next position is the image's own business."""
        last = self.images[-1] if self.images else None
        if last is not None and self.length == last.start + last.length:
            return int(self._positions[last.start]) + int(last.n_positions)
        return int(self._positions[self.length - 1]) + 1

    @property
    def tokens(self) -> np.ndarray:
        """int32 (length,): prompt and what was written."""
        return self._tokens[: self.length]

    @property
    def positions(self) -> np.ndarray:
        """int32 (length,)."""
        return self._positions[: self.length]

    @property
    def done(self) -> int:
        """Tokens written."""
        return self.length - self.prompt

    @property
    def computed(self) -> int:
        """Tokens in the cache."""
        return self.sequence.length if self.sequence else 0

    @property
    def missing(self) -> int:
        """Tokens to compute before the next can be chosen."""
        return self.length - self.computed

    @property
    def writes(self) -> bool:
        """Whether it is past its prompt: one token is missing, the newest."""
        return self.done > 0 and self.missing == 1

    def next_image(self) -> Any:
        """The image that begins where the sequence ends, if one does."""
        return next((image for image in self.images if image.start == self.computed), None)

    def until_image(self) -> int:
        """How many missing tokens come before the next image."""
        return min((image.start for image in self.images if image.start >= self.computed), default=self.length) - self.computed

    def timings(self) -> dict[str, float]:
        """Fields of `Timings`."""
        now = time.monotonic()
        started = self.started or now
        return {
            "queue_seconds": started - self.arrived,
            "prefill_seconds": (self.first_token or now) - started if self.started else 0.0,
            "prefill_tokens": max(0, min(self.prompt, self.computed) - self.reused) if self.reused >= 0 else 0,
            "reused_tokens": max(0, self.reused),
            "decode_seconds": self.last_token - self.first_token,
            "draft_tokens": self.drafted,
            "accepted_tokens": self.accepted,
        }


class Pace:
    """How long steps take, to keep a piece of a prompt within its share of the time."""

    def __init__(self, per_token: float = 0.0) -> None:
        self.per_token = per_token
        """Seconds that each token of a prompt adds to a step; 0: not known."""
        self._writing: dict[int, float] = {}

    def saw(self, writing: int, reading: int, seconds: float) -> None:
        """A step of so many tokens of each kind took so long."""
        if reading >= SMALLEST_PIECE:
            alone = min(self._alone(writing), seconds / 2)
            self.per_token = _average(self.per_token, (seconds - alone) / reading)
        elif writing and not reading:
            self._writing[writing] = _average(self._writing.get(writing, 0.0), seconds)

    def piece(self, writing: int, share: float, most: int) -> int:
        """Tokens of prompts that go into a step in which `writing` jobs write: reading may take `share` of its time."""
        if not self.per_token:
            return min(most, 64 if writing else most)
        if not writing:
            tiles = max(1, round(LONGEST_STEP_SECONDS / self.per_token / TILE))
            return min(most, tiles * TILE)
        share = min(share, 0.99)
        return max(SMALLEST_PIECE, min(most, int(self._alone(writing) * share / (1 - share) / self.per_token)))

    def _alone(self, writing: int) -> float:
        """Seconds of a step in which so many jobs write and nobody reads."""
        near = min(self._writing, key=lambda n: abs(n - writing), default=None)
        return writing * self.per_token if near is None or not writing else self._writing[near]

    def seconds(self, reading: int) -> float:
        """What so many tokens of prompts add to a step; inf while that is not known."""
        return reading * self.per_token if self.per_token else float("inf")


def share_of(share: float, reading: int, writing: int) -> float:
    """The share of the time that reading gets: `share`, and more where more people wait for their first word than are being written to."""
    crowd = max(1.0, reading / max(1, writing))
    return 1 - 1 / (1 + share / (1 - share) * crowd)


def _average(old: float, new: float) -> float:
    return new if not old else 0.8 * old + 0.2 * new


@dataclass
class Totals:
    """Counts since the start."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    queue_seconds: float = 0.0
    steps: int = 0
    preemptions: int = 0
    finished: collections.Counter[str] = field(default_factory=collections.Counter)


class Scheduler:
    """Jobs come in from any thread; `run`, or `step`, computes on one."""

    def __init__(
        self,
        decoder: Decoder,
        cache: Cache,
        *,
        parallel: int = 4,
        max_queue: int = 64,
        prefill_share: float,
        speculator: Speculator | None = None,
        cuts: bool = True,
        seconds_per_token: float = 0.0,
        flush: Callable[[], None] = lambda: None,
    ) -> None:
        """`cuts`: whether sequences can be cut back (see `Memory.cuts`); `seconds_per_token`: of a prompt, as a first guess; `flush` is called after
        each step, for what voices have to tell.
        """
        self._decoder = decoder
        self.cache = cache
        self.parallel = parallel
        self.max_queue = max_queue
        self._share = prefill_share
        self._speculator = speculator if cuts else None
        self._cuts = cuts
        self._flush = flush
        self._changed = threading.Condition()
        self._waiting: list[Job] = []  # by arrival
        self._running: list[Job] = []  # by the time they got their place
        self._served: dict[str, int] = {}  # of a client: when it got its last place; the longest ago first
        self._serving = itertools.count(1)
        self._chores: collections.deque[Callable[[], None]] = collections.deque()
        self._stopped = False
        self._news = False
        """Whether somebody came, went, or wants to go: only then places are given anew."""
        self._turn: Hashable = None
        self._turn_ends = 0.0
        self._last_chore = self._last_image = False
        self._computing: list[Job] = []
        self._pace = Pace(seconds_per_token)
        self.totals = Totals()

    # --- from any thread ------------------------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Let a job wait for its place. Raises Busy when too many wait; for low priority another one gives way instead."""
        with self._changed:
            victim = self._make_place(job)
            bisect.insort(self._waiting, job, key=lambda each: each.arrived)
            self._news = True
            self._changed.notify()
        if victim:
            self._turn_away(victim)

    def _make_place(self, job: Job) -> Job | None:
        """A waiting job that must go for `job` to come in."""
        same = [each for each in self._waiting if each.priority == job.priority and not each.started]
        if job.priority == LOW:
            return self._take_out(same[0]) if len(same) >= MAX_LOW else None
        if len(same) < self.max_queue:
            return None
        counts = collections.Counter(each.client for each in same)
        client, most = counts.most_common(1)[0] if counts else ("", 0)
        if most > counts[job.client] + 1:  # one client's flood does not shut the door on others: its own newest one goes
            return self._take_out(next(each for each in reversed(same) if each.client == client))
        raise self._busy(len(same))

    def _take_out(self, job: Job) -> Job:
        self._waiting.remove(job)
        return job

    def _turn_away(self, job: Job) -> None:
        if job.priority == LOW:
            self._tell_end(job, "cancelled")
        else:
            self.totals.finished["error"] += 1
            job.voice.failed(job, self._busy(self.max_queue))

    def _busy(self, waiting: int) -> Busy:
        ended = self.totals.finished["stop"] + self.totals.finished["length"]
        each = (self.totals.prefill_seconds + self.totals.decode_seconds) / ended if ended else 1.0
        return Busy(f"{waiting} requests are waiting already. Try again in a moment.", retry_after=max(1.0, min(60.0, each)))

    def cancel(self, id: int) -> None:
        """End a job within one step; an unknown or ended one is no error."""
        with self._changed:
            for job in [*self._waiting, *self._running]:
                if job.id == id:
                    job.cancelled = self._news = True
                    self._changed.notify()

    def chore(self, work: Callable[[], None]) -> None:
        """Do `work` on the computing thread, between two steps. It must not raise."""
        with self._changed:
            self._chores.append(work)
            self._changed.notify()

    def stop(self) -> None:
        """Make `run` return after the step."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    @property
    def load(self) -> tuple[int, int]:
        """(jobs waiting, jobs running), those of low priority left out."""
        with self._changed:
            return sum(j.priority == NORMAL for j in self._waiting), sum(j.priority == NORMAL for j in self._running)

    def uses(self, wanted: Callable[[Hashable], bool]) -> bool:
        """Whether a job that waits or runs has a key that is `wanted`."""
        with self._changed:
            return any(wanted(job.key) for job in [*self._waiting, *self._running])

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        with self._changed:
            return not (self._waiting or self._running or self._chores)

    # --- the computing thread -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Compute until `stop`."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._waiting or self._running or self._chores)
                if self._stopped:
                    return
            self.step()

    def step(self) -> None:
        """One decoding, or one chore; and whoever must begin or end."""
        if self._do_chore():
            return
        if self._news:
            self._news = False
            self._end_cancelled()
            self._admit()
            self._tell_positions()
        jobs = self._turn_of()
        self._catch_up(jobs)
        self._computing = []
        try:
            self._compute(jobs)
        except UserError as error:
            self._fail(self._computing or jobs, error)
        except Exception as error:  # noqa: BLE001  # the top of the computing thread: one step's failure must not be all steps'
            traceback.print_exc(file=sys.stderr)
            self._fail(self._computing or jobs, ModelError(f"The engine failed: {error}. Send again; if it repeats, load the model again."))
        self._flush()

    def _do_chore(self) -> bool:
        """Chores take turns with steps."""
        self._last_chore = bool(self._chores) and not (self._last_chore and (self._running or self._waiting))
        if self._last_chore:
            self._chores.popleft()()
            self._flush()
        return self._last_chore

    # --- places ---------------------------------------------------------------------------------------------------------------------

    def _end_cancelled(self) -> None:
        with self._changed:
            gone = [job for job in self._waiting if job.cancelled]
            self._waiting = [job for job in self._waiting if not job.cancelled]
        for job in gone:
            self._tell_end(job, "cancelled")
        for job in [job for job in self._running if job.cancelled]:
            self._end(job, "cancelled")

    def _admit(self) -> None:
        """Give places to waiting jobs, as long as there are places and cells."""
        if any(job.priority == NORMAL for job in [*self._waiting, *self._running]):
            for low in [job for job in self._running if job.priority == LOW]:
                self._give_way(low)
        before = len(self._running)
        while (job := self._next()) and self._start(job):
            pass
        if len(self._running) > before:
            self.cache.clear_the_way()  # after all have taken what they share

    def _next(self) -> Job | None:
        if len(self._running) >= self.parallel:
            return None
        with self._changed:
            waiting = list(self._waiting)
        places = collections.Counter(job.client for job in self._running)
        if self._running or any(job.priority == NORMAL for job in waiting):
            waiting = [job for job in waiting if job.priority == NORMAL]
        return min(waiting, key=lambda job: (places[job.client], not job.started, self._served.get(job.client, 0), job.arrived), default=None)

    def _start(self, job: Job) -> bool:
        """Give `job` its place; False when cells or sequence numbers are short."""
        most = 0 if job.reads_probabilities else job.length - 1
        if self._running and not self._fits(job, most):
            return False
        sequence = self.cache.take(job.key, job.tokens, most)
        if sequence is None:
            return False
        with self._changed:
            self._waiting.remove(job)
        job.sequence = sequence
        job.position = None
        self._running.append(job)
        if not job.started:
            self._remember_served(job.client)
            job.started = time.monotonic()
            job.reused = job.computed
            self.totals.reused_tokens += job.reused
            self.totals.queue_seconds += job.started - job.arrived
            job.voice.read(job, range(0))
        self._take_snapshot(job)
        self._choose_leader(job)
        return True

    def _remember_served(self, client: str) -> None:
        self._served.pop(client, None)
        self._served[client] = next(self._serving)
        if len(self._served) > CLIENTS_REMEMBERED:
            self._served.pop(next(iter(self._served)))

    def _fits(self, job: Job, most: int) -> bool:
        ahead = min(MARGIN, self.cache.size - job.length, MARGIN if job.limit is None else job.limit - job.done)
        return self.cache.available() >= job.length - self.cache.shared(job.key, job.tokens, most) + max(1, ahead)

    def _choose_leader(self, job: Job) -> None:
        """If another job is about to compute what this one needs too, wait for it."""
        if not self._cuts or job.reads_probabilities:
            return
        best = job.computed + WORTH_WAITING
        for other in self._running:
            if other is not job and other.key == job.key and not other.writes:
                length = min(common_prefix(other.tokens, job.tokens), job.length - 1)
                if length > max(best, other.computed):
                    best, job.leader = length, (other, length)

    def _catch_up(self, jobs: Sequence[Job]) -> None:
        """Share what a job's leader has computed meanwhile; without a leader any more, go on alone."""
        for job in jobs:
            if job.leader is None:
                continue
            leader, length = job.leader
            if leader.computed >= length or leader not in self._running:
                assert job.sequence
                before = job.computed
                self.cache.improve(job.sequence, job.tokens, job.length - 1)
                job.reused += job.computed - before
                self.totals.reused_tokens += job.computed - before
                job.leader = None

    def _give_way(self, job: Job) -> None:
        """Wait again; what is computed stays as long as its cells are not needed, and is found again like any prefix."""
        self.totals.preemptions += job.priority == NORMAL
        self._leave(job)
        with self._changed:
            bisect.insort(self._waiting, job, key=lambda each: each.arrived)

    def _leave(self, job: Job) -> None:
        assert job.sequence
        self._running.remove(job)
        self._news = True
        self.cache.finish(job.sequence)
        job.sequence = job.leader = None
        for other in self._running:
            if other.leader and other.leader[0] is job:
                other.leader = (job, 0)  # it goes on alone, even if this one is back before the next step
        if self._speculator:
            self._speculator.forget(job)

    def _end(self, job: Job, reason: str) -> None:
        self._count(job)
        self._tell_end(job, reason)  # first: it tells how much was computed
        self._leave(job)

    def _tell_end(self, job: Job, reason: str) -> None:
        self.totals.finished[reason] += job.priority == NORMAL
        job.voice.ended(job, reason)

    def _count(self, job: Job) -> None:
        timings = job.timings()
        self.totals.prefill_seconds += timings["prefill_seconds"]
        self.totals.decode_seconds += timings["decode_seconds"]

    def _fail(self, jobs: Sequence[Job], error: UserError) -> None:
        """A decoding went wrong: its jobs end, and what they hold is not to be trusted."""
        for job in [job for job in jobs if job in self._running]:
            assert job.sequence
            self._running.remove(job)
            self._news = True
            self.cache.drop(job.sequence)
            if self._speculator:
                self._speculator.forget(job)
            self.totals.finished["error"] += 1
            job.voice.failed(job, error)

    def _start_over(self) -> None:
        """Empty the cache to the last bit: even masked out, what is no number spoils the sums that others compute. They go on from the beginning."""
        for job in list(self._running):
            self._give_way(job)
        self.cache.wipe()

    def _tell_positions(self) -> None:
        with self._changed:
            waiting = [job for job in self._waiting if job.priority == NORMAL]
        for position, job in enumerate(waiting):
            if job.position != position:
                job.position = position
                job.voice.waits(position)

    # --- a step ---------------------------------------------------------------------------------------------------------------------

    def _turn_of(self) -> list[Job]:
        """The running jobs whose adapters have their turn."""
        first = self._running[0].key if self._running else None
        if all(job.key == first for job in self._running):
            self._turn = first
            return list(self._running)
        keys = list(dict.fromkeys(job.key for job in self._running))
        now = time.monotonic()
        if self._turn not in keys or now >= self._turn_ends:
            after = keys.index(self._turn) + 1 if self._turn in keys else 0
            self._turn, self._turn_ends = keys[after % len(keys)], now + TURN_SECONDS
        return [job for job in self._running if job.key == self._turn]

    def _compute(self, jobs: list[Job]) -> None:
        if self._compute_image(jobs):
            return
        rows = self._rows(jobs)
        if not rows:
            self._unblock()
            return
        self._computing = [job for job, _ in rows]
        writing = sum(len(row.tokens) for job, row in rows if job.writes)
        reading = sum(len(row.tokens) for job, row in rows) - writing
        began = time.monotonic()
        result = self._decoder.decode([row for _, row in rows], self._turn, None if writing else self._reason_to_stop(self._computing))
        if result is not Computed.DONE:
            self._not_computed(result)
            return
        self.totals.steps += 1
        self._pace.saw(writing, reading, time.monotonic() - began)
        for job, row in rows:
            try:
                self._advance(job, row)
            except NotANumber as error:
                self._fail([job], error)
                self._start_over()
                return

    def _rows(self, jobs: Sequence[Job]) -> list[tuple[Job, Row]]:
        """What to compute, within the batch and the free cells; jobs give way, youngest first, where cells are short."""
        writing = [job for job in jobs if job.writes]
        self._make_room(writing)
        left = min(self._decoder.batch_size, self._decoder.outputs_size)
        rows = [(job, self._row(job, 1)) for job in [job for job in writing if job in self._running][:left]]
        reading = [job for job in jobs if job in self._running and not job.writes]
        self._add_guesses(rows, left - len(rows) - len(reading))  # each of these may come to its first choice
        rows += self._pieces(reading, rows)
        end = 0
        for _, row in rows:
            row.first, end = end, end + len(row.tokens)
        return rows

    def _make_room(self, writing: Sequence[Job]) -> None:
        """A cell for the newest token of each."""
        while not self.cache.room(sum(job in self._running for job in writing)):
            if len(self._running) == 1:
                self._end(self._running[0], "length")
                return
            self._give_way(self._youngest())

    def _unblock(self) -> None:
        """Nothing can be computed for want of cells: the youngest leaves them to the others."""
        if len(self._running) > 1:
            self._give_way(self._youngest())

    def _youngest(self) -> Job:
        return max(self._running, key=lambda job: job.arrived)

    def _row(self, job: Job, count: int) -> Row:
        start = job.computed
        end = start + count
        outputs = count if job.reads_probabilities else int(end == job.length)
        return Row(job.sequence.id if job.sequence else -1, job.tokens[start:end], job.positions[start:end], outputs)

    def _add_guesses(self, rows: list[tuple[Job, Row]], left: int) -> None:
        if not self._speculator or not rows or left <= 0:
            return
        room = self.cache.size - self.cache.used - len(rows)  # guesses evict nobody
        most = {}
        for job, _ in rows:
            wanted = self.cache.size - job.length if job.limit is None else job.limit - job.done
            most[job.id] = max(0, min(left // len(rows), room // len(rows), wanted - 1))
        guesses = self._speculator.guess([job for job, _ in rows if not job.images], most)
        for job, row in rows:
            guess = guesses.get(job.id, [])[: most[job.id]]
            if guess:
                row.tokens = np.concatenate([row.tokens, np.array(guess, np.int32)])
                row.positions = row.positions[0] + np.arange(len(row.tokens), dtype=np.int32)
                row.outputs = len(row.tokens)
                job.drafted += len(guess)
                self.totals.draft_tokens += len(guess)

    def _pieces(self, reading: Sequence[Job], rows: Sequence[tuple[Job, Row]]) -> list[tuple[Job, Row]]:
        """Pieces of prompts: half of what there is for the oldest, then for who is nearest the end of its prompt."""
        ready = [job for job in reading if job.leader is None and job.until_image() > 0]
        if not ready:
            return []
        taken = sum(len(row.tokens) for _, row in rows)
        most = self._decoder.batch_size - taken
        self.cache.room(taken + min(most, sum(job.missing for job in ready)))
        most = min(most, self.cache.size - self.cache.used - taken)
        missing = sum(job.missing for job in ready)
        if len(ready) > len(rows) and self._pace.seconds(missing) <= ONE_PAUSE_SECONDS:
            budget = max(0, min(most, missing))
        else:
            budget = min(most, self._pace.piece(taken, share_of(self._share, len(ready), len(rows)), most)) if most > 0 else 0
        if not rows and 0 < missing - budget < TILE and missing <= most:
            budget = missing  # such a rest would take as long as a tile, and its numbers another path than the whole prompt's
        outputs = self._decoder.outputs_size - sum(row.outputs for _, row in rows)
        wanted = {job.id: 0 for job in ready}
        orders = [(ready[:1], budget - budget // 2), (sorted(ready, key=lambda job: job.missing), budget)]
        for order, limit in orders:
            for job in order:
                more = min(limit, budget, self._longest(job, outputs) - wanted[job.id])
                if more > 0:
                    wanted[job.id] += more
                    budget -= more
        pieces = [(job, self._row(job, wanted[job.id])) for job in ready if wanted[job.id]]
        while sum(row.outputs for _, row in pieces) > outputs:
            pieces.pop()
        return pieces

    def _longest(self, job: Job, outputs: int) -> int:
        """How long a piece of it may be at most."""
        longest = job.until_image()
        if job.reads_probabilities:
            return min(longest, outputs)
        if not self._cuts and longest > 1 and longest == job.missing:
            return longest - 1  # the last token comes alone: before it is the place for a snapshot, see _advance
        return longest

    def _reason_to_stop(self, jobs: Sequence[Job]) -> Callable[[], bool]:
        """Asked during a step in which nobody writes: whether nobody needs it any more."""
        low = all(job.priority == LOW for job in jobs)
        return lambda: all(job.cancelled for job in jobs) or (low and any(job.priority == NORMAL for job in self._waiting))

    def _not_computed(self, result: Computed) -> None:
        if result is Computed.STOPPED:
            return  # the reason for it is dealt with at the next step
        if self.cache.idle:
            self.cache.room(self.cache.size)  # our count says that there is room; the model's own rules differ (windows, states)
        elif len(self._running) > 1:
            self._give_way(self._youngest())
        else:
            raise ModelError("The context's cache has no place for this. Load the model with a larger --ctx-size or a smaller --parallel.")

    def _compute_image(self, jobs: Sequence[Job]) -> bool:
        """Compute a whole image for the first job that stands before one, in turn with the steps of those who write."""
        job = next((each for each in jobs if not each.writes and each.leader is None and each.next_image()), None)
        self._last_image = job is not None and not (self._last_image and any(other.writes for other in jobs))
        if job is None or not self._last_image:
            return False
        image = job.next_image()
        assert job.sequence
        if not self.cache.room(image.length):
            self._give_way(self._youngest())
            return True
        self._computing = [job]
        position = int(job.positions[image.start])
        result = self._decoder.decode_image(image, position, job.sequence.id, self._turn)
        if result is not Computed.DONE:
            self._not_computed(result)
            return True
        end = image.start + image.length
        self.cache.extend(job.sequence, job.tokens[image.start : end], job.positions[image.start : end])
        self.totals.prompt_tokens += image.length
        self._tell_progress(job, range(0))
        return True

    # --- after a decoding -----------------------------------------------------------------------------------------------------------

    def _advance(self, job: Job, row: Row) -> None:
        assert job.sequence
        guesses = len(row.tokens) - 1 if job.writes else 0
        self.cache.extend(job.sequence, row.tokens, row.positions)
        if guesses:
            self._choose_among(job, row)
            return
        if not job.done:
            self.totals.prompt_tokens += len(row.tokens)
            self._tell_progress(job, range(row.first, row.first + len(row.tokens)) if job.reads_probabilities else range(0))
            self._take_snapshot(job)
        if job.missing == 0:
            self._choose(job, row.first + len(row.tokens) - 1)

    def _take_snapshot(self, job: Job) -> None:
        """Before its last token is computed: where the same prompt, and the next turn, can go on though nothing can be cut back."""
        if not self._cuts and not job.done and job.missing == 1 and job.computed:
            assert job.sequence
            self.cache.snapshot(job.sequence)

    def _tell_progress(self, job: Job, outputs: range) -> None:
        now = time.monotonic()
        if outputs or job.missing == 0 or now - job.told >= PROGRESS_SECONDS:
            job.told = now
            job.voice.read(job, outputs)

    def _choose(self, job: Job, output: int) -> None:
        """Choose the next token, or end."""
        if job.limit is not None and job.done >= job.limit:
            self._end(job, "length")
            return
        token = job.voice.choose(output)
        if token is None:
            self._end(job, "stop")
            return
        self._write(job, [token])
        if job.done == job.limit or job.length > self.cache.size:
            self._end(job, "length")

    def _choose_among(self, job: Job, row: Row) -> None:
        """Choose at each guess; the first one that differs is the last, and the guesses after it are taken back."""
        assert job.sequence
        before = job.computed - len(row.tokens)
        chosen: list[int] = []
        ended = False
        for place, guessed in enumerate([*row.tokens[1:], None]):
            token = job.voice.choose(row.first + place)
            ended = token is None
            if token is None:
                break
            chosen.append(token)
            if token != guessed:
                break
        accepted = len(chosen) - (0 if ended else 1)
        self.cache.cut(job.sequence, before + 1 + accepted)
        job.accepted += accepted
        self.totals.accepted_tokens += accepted
        if chosen:
            self._write(job, chosen)
        if ended:
            self._end(job, "stop")
        elif job.done == job.limit or job.length > self.cache.size:
            self._end(job, "length")

    def _write(self, job: Job, tokens: Sequence[int]) -> None:
        job.last_token = time.monotonic()
        job.first_token = job.first_token or job.last_token
        for token in tokens:
            job.append(token)
        self.totals.generated_tokens += len(tokens)
        job.voice.wrote(job, tokens)
