"""Which request computes when: one at a time, first come, first served. Engine process only.

The rest of the engine and the protocol know nothing of this rule; a scheduler that runs many sequences at once takes this file's place.
Every job ends exactly once, with an `end` or an `error` frame, and sends nothing after it.
"""

from __future__ import annotations

import codecs
import collections
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modules.backends.llama_cpp.model import Computed, Model
from modules.backends.llama_cpp.protocol import Frame, unpack_tokens
from modules.errors import Busy, ModelError, PromptError, PromptTooLong, UserError

MAX_QUEUE = 64
Send = Callable[[Frame], None]


@dataclass
class Job:
    """One generation: what was asked, and how far it is."""

    id: int
    asked: Mapping[str, Any]
    """Fields of the `generate` frame."""
    prompt: bytes
    """UTF-8 text or token ids, as `asked["text"]` says."""
    cancelled: bool = False
    arrived: float = field(default_factory=time.monotonic)
    started: float = 0.0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_seconds: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    done: int = 0
    """Tokens generated."""

    def timings(self) -> dict[str, float]:
        """Fields of `Timings`."""
        return {
            "queue_seconds": (self.started or time.monotonic()) - self.arrived,
            "prefill_seconds": self.prefill_seconds,
            "prefill_tokens": self.prompt_tokens - self.reused_tokens if self.prefill_seconds else 0,
            "reused_tokens": self.reused_tokens,
            "decode_seconds": self.last_token - self.first_token,
        }


class Scheduler:
    """Jobs come in from the reader's thread; `run` computes them on its own."""

    def __init__(self, model: Model, send: Send, max_queue: int = MAX_QUEUE) -> None:
        self._model = model
        self._send = send
        self._max_queue = max_queue
        self._waiting: collections.deque[Job] = collections.deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._stopped = False
        self.steps = 0
        """Pieces and tokens computed since the start."""

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue. Raises Busy when that is full."""
        with self._changed:
            if len(self._waiting) >= self._max_queue:
                raise Busy(f"{len(self._waiting)} requests are waiting already. Try again in a moment.")
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, id: int) -> None:
        """End a job within one step; an unknown or ended one is no error."""
        with self._changed:
            waiting = next((job for job in self._waiting if job.id == id), None)
            if waiting:
                self._waiting.remove(waiting)
            elif self._running and self._running.id == id:
                self._running.cancelled = True
        if waiting:
            self._end(waiting, "cancelled")

    @property
    def load(self) -> tuple[int, int]:
        """(jobs waiting, jobs running)."""
        with self._changed:
            return len(self._waiting), int(self._running is not None)

    def stop(self) -> None:
        """Make `run` return after the running job."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def run(self) -> None:
        """Compute jobs until `stop`."""
        while job := self._next():
            try:
                self._end(job, *self._generate(job))
            except UserError as error:
                self._send(error_frame(job.id, error))
            except Exception as error:  # noqa: BLE001  # the top of the computing thread: one job's failure must not be all jobs'
                traceback.print_exc(file=sys.stderr)
                self._model.forget()
                self._send(error_frame(job.id, ModelError(f"The engine failed: {error}. Send again; if it repeats, load the model again.")))

    def _next(self) -> Job | None:
        with self._changed:
            self._running = None
            while not self._waiting and not self._stopped:
                self._changed.wait()
            if self._stopped:
                return None
            self._running = self._waiting.popleft()
            return self._running

    def _end(self, job: Job, reason: str, text: str = "") -> None:
        fields = {"reason": reason, "prompt": job.prompt_tokens, "done": job.done, "timings": job.timings()}
        self._send(Frame("end", job.id, fields, text.encode()))

    # --- one job --------------------------------------------------------------------------------------------------------------------

    def _generate(self, job: Job) -> tuple[str, str]:
        """(finish reason, last text). Raises UserError."""
        job.started = time.monotonic()
        tokens = self._prompt(job)
        chain = self._model.chain(job.asked["plan"])
        try:
            chain.accept_prompt(tokens)
            if not self._prefill(job, tokens):
                return "cancelled", ""
            return self._write(job, chain)
        finally:
            chain.close()

    def _prompt(self, job: Job) -> list[int]:
        tokens = self._model.tokenize(job.prompt, job.asked["add_bos"]) if job.asked["text"] else unpack_tokens(job.prompt)
        job.prompt_tokens = len(tokens)
        if not tokens:
            raise PromptError("The prompt is empty. Write something first.")
        check_tokens(self._model, tokens)
        if len(tokens) > self._model.context_length:
            raise PromptTooLong(
                f"The prompt has {len(tokens)} tokens and the context holds {self._model.context_length}. "
                "Shorten it, or load the model with a larger --ctx-size."
            )
        return tokens

    def _prefill(self, job: Job, tokens: list[int]) -> bool:
        """Compute the prompt in pieces; False when cancelled."""
        start = time.monotonic()
        model = self._model
        model.should_stop = lambda: job.cancelled
        job.reused_tokens = model.keep_prefix(tokens)
        self._report_prefill(job, job.reused_tokens)
        while model.cached < len(tokens):
            if job.cancelled:
                return False
            result = model.compute(tokens[model.cached : model.cached + model.batch_size])
            if result is Computed.STOPPED:
                return False
            if result is Computed.FULL:
                model.forget()
                raise ModelError("The context's cache has no place for this prompt. Send again; if it repeats, load the model again.")
            self.steps += 1
            job.prefill_seconds = time.monotonic() - start
            self._report_prefill(job, model.cached)
        return not job.cancelled

    def _report_prefill(self, job: Job, done: int) -> None:
        self._send(Frame("chunk", job.id, {"prompt": job.prompt_tokens, "prefill": done}))

    def _write(self, job: Job, chain: Any) -> tuple[str, str]:
        """Generate until something ends it."""
        model, wanted = self._model, job.asked["logprobs"]
        text = codecs.getincrementaldecoder("utf-8")("replace")  # holds back the bytes of an unfinished character
        limit = job.asked["max_new"]
        while limit is None or job.done < limit:
            if job.cancelled:
                return "cancelled", text.decode(b"", True)
            before = model.logprobs() if wanted else None
            token = model.sample(chain)
            if token is None or token in model.vocabulary.end_tokens:
                return "stop", text.decode(b"", True)
            self._count(job)
            fields: dict[str, Any] = {"tokens": [token], "done": job.done}
            if before is not None:
                fields["logprobs"] = [self._alternatives(before, token, wanted)]
            self._send(Frame("chunk", job.id, fields, text.decode(model.piece(token, job.asked["special"])).encode()))
            if job.done == limit:
                break
            if model.cached >= model.context_length or model.compute_one(token) is Computed.FULL:
                break
            self.steps += 1
        return "length", text.decode(b"", True)

    def _count(self, job: Job) -> None:
        job.last_token = time.monotonic()
        job.first_token = job.first_token or job.last_token
        job.done += 1

    def _alternatives(self, logprobs: np.ndarray, token: int, count: int) -> list[Any]:
        """[token, text, log-probability, [[token, text, log-probability], …]], best first."""
        count = min(count, len(logprobs))
        best = np.argpartition(logprobs, -count)[-count:]
        best = best[np.argsort(-logprobs[best], kind="stable")]
        return [*self._described(token, logprobs), [self._described(int(other), logprobs) for other in best]]

    def _described(self, token: int, logprobs: np.ndarray) -> list[Any]:
        return [token, self._model.piece(token, special=True).decode("utf-8", "replace"), float(logprobs[token])]


def check_tokens(model: Model, tokens: Sequence[int]) -> None:
    """Raise PromptError when a token id is not in the vocabulary."""
    unknown = model.first_unknown(tokens)
    if unknown is not None:
        raise PromptError(f"There is no token {unknown} in this model: its tokens are 0 to {model.vocabulary.size - 1}.")


def error_frame(id: int, error: UserError) -> Frame:
    """The `error` frame that says `error`."""
    return Frame("error", id, {"kind": error.code, "message": str(error)})
