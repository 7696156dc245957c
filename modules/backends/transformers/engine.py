"""The engine: one thread that computes all jobs together, a step at a time.

A step is one forward pass for each set of adapters in use: the newest token of every job that writes, and pieces of the prompts that are
being read. Reading, writing and going on after a shared beginning differ only in how many tokens of a track are missing. Cancelling and
newcomers are looked at between two steps.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch

from modules.backends.base import Chunk, EngineStats
from modules.backends.transformers.decoders import Decoder, Part
from modules.backends.transformers.jobs import Job, Track
from modules.backends.transformers.kept import KeptSequences
from modules.backends.transformers.load import free_memory, out_of_memory
from modules.errors import Busy, EngineDied, ModelError, NoModel, NotANumber, UserError
from modules.log import logger

SMALLEST_PIECE = 16
"""Tokens of a prompt read in a step, however slow that is."""
MOST_PROBABILITIES = 128
"""Tokens of a prompt read in a step when the probabilities of each are wanted: a row of logits is as wide as the vocabulary."""
UNLOADED = "The model was unloaded. Load it again on the Model tab."
DURING = "The model was unloaded during this. Send again when a model is ready; the Model tab shows it."


class AdapterSwitch(Protocol):
    """Puts adapters to work, or none."""

    def use(self, key: Hashable) -> None:
        """From now on compute with the adapters and scales of `key`."""
        ...


@dataclass(frozen=True)
class Limits:
    """What the options allow."""

    parallel: int
    max_queue: int
    batch_size: int
    prefill_share: float
    context_length: int
    kept_tokens: int


@dataclass
class Pace:
    """How long a step takes, measured all the time: seconds of one that only writes, and of a token of a prompt."""

    writing: float = 0.0
    token: float = 0.0

    def saw(self, seconds: float, read: int, writers: int) -> None:
        """A step took so long, read so many tokens of prompts and wrote so many replies on."""
        if not read:
            self.writing += (seconds - self.writing) * (0.2 if self.writing else 1.0)
        else:
            each = max(0.0, seconds - (self.writing if writers else 0.0)) / read
            self.token += (each - self.token) * (0.2 if self.token else 1.0)

    def piece(self, share: float, most: int) -> int:
        """Tokens of prompts to read in a step that also writes, so that reading takes `share` of the time."""
        if not self.writing or not self.token:
            return min(most, 4 * SMALLEST_PIECE)
        return max(SMALLEST_PIECE, min(most, int(self.writing * share / (1 - share) / self.token)))


@dataclass
class _Totals:
    counts: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    finished: Counter[str] = field(default_factory=Counter)


class Engine:
    """Computes jobs on a thread of its own until `close`. Methods may be called from any thread, but for those that say otherwise."""

    def __init__(self, decoder: Decoder, switch: AdapterSwitch, limits: Limits) -> None:
        self.limits = limits
        self._decoder = decoder
        self._switch = switch
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._quiet: list[Job] = []
        """Prompts to be computed while nobody else computes."""
        self._work: list[Callable[[], None]] = []
        self._active: list[Job] = []
        self._closed = False
        self._kept = KeptSequences(decoder, limits.kept_tokens)
        self._pace = Pace()
        self._totals = _Totals()
        self._thread = threading.Thread(target=self._run, name="transformers-engine", daemon=True)
        self._thread.start()

    # --- asking, from any thread ------------------------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Let `job` wait for a place. Raises Busy when too many wait, NoModel after the end."""
        with self._changed:
            if self._closed:
                raise NoModel(UNLOADED)
            if job.sampler is None and (self._active or self._waiting or len(self._quiet) >= self.limits.max_queue):
                job.end("cancelled")
            elif job.sampler is None:
                self._quiet.append(job)
            elif len(self._waiting) >= self.limits.max_queue and len(self._active) >= self.limits.parallel:
                raise Busy("Too many requests wait for this model. Try again in a few seconds.", retry_after=5)
            else:
                self._waiting.append(job)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Give `job` up within one step."""
        job.cancelled = True
        with self._changed:
            self._changed.notify_all()

    def between_steps(self, work: Callable[[], Any]) -> Any:
        """Run `work` on the engine's thread between two steps, and return or raise what it does."""
        done = threading.Event()
        found: list[Any] = []
        failed: list[UserError] = []

        def call() -> None:
            try:
                found.append(work())
            except UserError as error:
                failed.append(error)
            except Exception as error:  # noqa: BLE001  # it is told to who asked, and the thread goes on
                logger.exception("Work between two steps failed")
                failed.append(ModelError(f"That failed: {type(error).__name__}: {str(error)[:200]}."))
            finally:
                done.set()

        with self._changed:
            if self._closed:
                raise NoModel(UNLOADED)
            self._work.append(call)
            self._changed.notify_all()
        while not done.wait(0.2):
            if not self._thread.is_alive():
                raise EngineDied(DURING)
        if failed:
            raise failed[0]
        return found[0]

    def uses(self, wanted: Callable[[Hashable], bool]) -> bool:
        """Whether a job whose key is `wanted` waits or is computed."""
        with self._changed:
            return any(wanted(job.key) for job in [*self._active, *self._waiting, *self._quiet])

    def hidden(self, tokens: Sequence[int]) -> torch.Tensor:
        """See `Decoder.hidden`; without adapters. On the engine's thread only."""
        self._switch.use(None)
        return self._decoder.hidden(tokens)

    def forget(self, wanted: Callable[[Hashable], bool]) -> None:
        """Let go of finished sequences whose key is `wanted`. On the engine's thread only."""
        self._kept.drop(wanted)

    def alive(self) -> bool:
        """Whether it computes."""
        return self._thread.is_alive() and not self._closed

    def cache_bytes(self) -> int:
        """Memory of all sequences."""
        states = [track.state for job in list(self._active) for track in job.tracks if track.state is not None]
        return self._kept.nbytes + sum(state.nbytes for state in states)

    def stats(self) -> EngineStats:
        """See `Measured.stats`."""
        with self._changed:
            active, waiting = list(self._active), len(self._waiting)
        used = self._kept.tokens + sum(track.computed for job in active for track in job.tracks)
        cells = self.limits.context_length * self.limits.parallel + self.limits.kept_tokens
        totals = self._totals
        return EngineStats(
            busy_sequences=len(active),
            parallel=self.limits.parallel,
            waiting=waiting,
            max_queue=self.limits.max_queue,
            cells=cells,
            cells_used=min(used, cells),
            cached_sequences=len(self._kept),
            threads=torch.get_num_threads(),
            evictions=self._kept.evictions,
            finished={reason: count for reason, count in totals.finished.items() if count},
            **totals.counts,
            **cast(dict[str, Any], totals.seconds),
        )

    def close(self) -> None:
        """End all jobs with EngineDied, and the thread. A second call does nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(60)

    # --- the thread -------------------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self._work or self._active or self._waiting or self._quiet)
                    if self._closed:
                        return
                try:
                    self._prepare()
                    if self._active:
                        self._step(list(self._active))
                except UserError as error:
                    self._give_up(list(self._active), error)
                except Exception as error:  # noqa: BLE001  # a thread's top: who waits must be told, and the next request must find it alive
                    logger.exception("A step of the engine failed")
                    what = f"{type(error).__name__}: {str(error)[:200]}"
                    self._give_up(list(self._active), ModelError(f"The model could not compute this: {what}. Try again, or load it again."))
        finally:
            self._end_all()

    def _prepare(self) -> None:
        """Do what is to be done between steps; look at cancels and newcomers."""
        with self._changed:
            work, self._work = self._work, []
        for each in work:
            each()
        for job in [job for job in self._active if job.cancelled or (job.sampler is None and self._waiting)]:
            self._finish(job, "cancelled")
        with self._changed:
            for job in [job for job in self._waiting + self._quiet if job.cancelled]:
                (self._waiting if job in self._waiting else self._quiet).remove(job)
                job.end("cancelled")
                self._totals.finished["cancelled"] += job.sampler is not None
            admitted = []
            while self._waiting and len(self._active) < self.limits.parallel:
                admitted.append(self._next())
                self._active.append(admitted[-1])
            if self._quiet and not self._active:
                admitted.append(self._quiet.pop(0))
                self._active.append(admitted[-1])
            for position, job in enumerate(self._waiting):
                if job.position != position:
                    job.position = position
                    job.chunks.put(Chunk(prompt_tokens=job.prompt, queue_position=position))
        for job in admitted:
            self._admit(job)

    def _next(self) -> Job:
        """The one that waits longest of those whose client has the fewest places."""
        places = Counter(job.request.client for job in self._active)
        job = min(self._waiting, key=lambda each: places[each.request.client])
        self._waiting.remove(job)
        return job

    def _admit(self, job: Job) -> None:
        job.admitted_at = time.monotonic()
        self._totals.seconds["queue_seconds"] += job.admitted_at - job.asked_at
        for track in job.tracks:
            if job.reuse and not job.wants_prompt:
                track.state = self._kept.take(job.key, track.tokens)
            if track.state is None:
                track.state = self._decoder.new()
        job.reused = job.track.computed
        self._totals.counts["reused_tokens"] += job.reused
        self._totals.counts["cache_hits_cells" if job.reused else "cache_misses"] += 1
        job.chunks.put(Chunk(prompt_tokens=job.prompt, prefill_done=job.reused))

    # --- a step -----------------------------------------------------------------------------------------------------------------------------

    def _step(self, jobs: list[Job]) -> None:
        began = time.monotonic()
        writers = [job for job in jobs if job.writes]
        budget = self._pace.piece(self.limits.prefill_share, self.limits.batch_size) if writers else self.limits.batch_size
        plan: list[tuple[Job, Track, Part]] = []
        guesses = {job: self._guess(job) for job in writers} if len(jobs) == 1 else {}
        for job in writers:
            for track in job.tracks:
                guessed = guesses.get(job, [])
                plan.append((job, track, Part(track.state, [track.tokens[-1], *guessed], 1 + len(guessed))))
        reads = 0
        for job in jobs:
            for track in job.tracks if not job.writes else ():
                piece = self._piece(job, track, budget - reads)
                if piece is not None:
                    plan.append((job, track, piece))
                    reads += len(piece.tokens)
        starts = {id(track): track.computed for _, track, _ in plan}
        self._compute(plan)
        for job in dict.fromkeys(job for job, _, _ in plan):
            self._after(job, guesses.get(job, []), starts.get(id(job.track)))
        self._pace.saw(time.monotonic() - began, reads, len(writers))
        self._totals.counts["steps"] += 1

    def _piece(self, job: Job, track: Track, budget: int) -> Part | None:
        """The next tokens of a prompt, at most `budget` where the model lets them be divided."""
        count = track.missing
        if not count or budget <= 0:
            return None
        if not self._decoder.whole and track.extra is None:
            count = min(count, budget, MOST_PROBABILITIES if job.wants_prompt else budget)
        tokens = track.tokens[track.computed : track.computed + count]
        last = count == track.missing
        outputs = count if job.wants_prompt and track is job.track else int(last)
        return Part(track.state, tokens, outputs, track.extra)

    def _guess(self, job: Job) -> list[int]:
        room = min(job.limit - job.done, self.limits.context_length - len(job.track.tokens)) - 1
        if job.guesser is None or job.negative is not None or room <= 0 or not self._decoder.croppable:
            return []
        guessed = job.guesser(job.track.tokens, room)
        job.drafted += len(guessed)
        return guessed

    def _compute(self, plan: list[tuple[Job, Track, Part]]) -> None:
        """One forward pass for each set of adapters; the rows of logits go to their tracks."""
        for key in dict.fromkeys(job.key for job, _, _ in plan):
            chosen = [entry for entry in plan if entry[0].key == key]
            try:
                self._switch.use(key)
            except UserError as error:
                self._give_up([job for job, _, _ in chosen], error)
                continue
            for (_, track, part), logits in zip(chosen, self._run_parts([part for _, _, part in chosen]), strict=True):
                track.logits = logits if part.outputs else None
                track.extra = None

    def _run_parts(self, parts: list[Part]) -> list[torch.Tensor]:
        try:
            return self._decoder.run(parts)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        self._kept.drop()
        free_memory()
        try:
            return self._decoder.run(parts)
        except RuntimeError as error:
            if out_of_memory(error):
                raise ModelError(
                    "There is not enough memory for so long a context. Shorten it, or load the model with a smaller --ctx-size."
                ) from None
            raise

    def _after(self, job: Job, guessed: list[int], start: int | None) -> None:
        """What follows from the logits of a step."""
        if job.ended:
            return
        try:
            if not job.writes:
                if start is not None:
                    job.read(job.track.logits if job.track.logits is not None else torch.zeros(0, 1), start)
                if any(track.missing for track in job.tracks):
                    return
                self._prompt_done(job)
            if job.ended:
                return
            _check(job)
            before = job.done
            reason = job.write(guessed)
            foreseen = max(0, job.done - before - 1)
            for track in job.tracks if guessed else ():
                self._decoder.crop(track.state, track.computed - len(guessed) + foreseen)
            if reason:
                self._finish(job, reason)
        except UserError as error:
            self._give_up([job], error)
        except Exception as error:  # noqa: BLE001  # what one request asks for ends no other
            logger.exception("Choosing a token failed")
            self._give_up(
                [job], ModelError(f"The next token could not be chosen: {type(error).__name__}: {str(error)[:200]}. Change the parameters.")
            )

    def _prompt_done(self, job: Job) -> None:
        job.first_at = job.last_at = time.monotonic()
        self._totals.seconds["prefill_seconds"] += job.first_at - job.admitted_at
        for track in job.tracks:
            assert track.logits is not None
            track.logits = track.logits[-1:]
        if job.limit <= 0 or job.sampler is None:
            self._finish(job, "length")

    def _finish(self, job: Job, reason: Any) -> None:
        """End it, and keep what is computed of it."""
        with self._changed:
            self._active.remove(job)
        if job.reuse:
            for track in job.tracks:
                if track.state is not None and track.computed:
                    self._kept.add(job.key, track.tokens[: track.computed], track.state)
        self._forget(job)
        job.end(reason)
        totals = self._totals
        totals.finished[reason] += job.sampler is not None
        totals.counts["draft_tokens"] += job.drafted
        totals.counts["accepted_tokens"] += job.accepted
        totals.seconds["decode_seconds"] += job.timings().decode_seconds

    def _give_up(self, jobs: list[Job], error: UserError) -> None:
        for job in jobs:
            with self._changed:
                if job not in self._active:
                    continue
                self._active.remove(job)
            self._forget(job)
            job.fail(error)
            self._totals.finished["error"] += 1

    def _forget(self, job: Job) -> None:
        self._totals.counts["prompt_tokens"] += job.timings().prefill_tokens
        self._totals.counts["generated_tokens"] += job.done
        for track in job.tracks:
            track.logits = track.extra = None

    def _end_all(self) -> None:
        with self._changed:
            jobs = [*self._active, *self._waiting, *self._quiet]
            self._active, self._waiting, self._quiet, work = [], [], [], self._work
            self._work = []
        for job in jobs:
            for track in job.tracks:
                track.state = track.logits = track.extra = None
            job.fail(EngineDied(DURING))
        for each in work:
            each()
        self._kept.drop()
        del self._decoder, self._switch, self._kept._cutter  # the model goes when nobody holds it


def _check(job: Job) -> None:
    """Raise NotANumber when the logits are none."""
    for track in job.tracks:
        if track.logits is not None and not bool(torch.isfinite(track.logits.amax(-1)).all()):
            raise NotANumber("The model computed something that is no number. Load it again with another --compute-dtype (bfloat16 or float32).")
