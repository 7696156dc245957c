"""A job: one request on its way through the engine, from its prompt to its chunks."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch

from modules.backends.base import Chunk, FinishReason, GenerationRequest, Timings, TokenLogprob
from modules.backends.torch_samplers import Sampler, alternatives, guided
from modules.backends.transformers.grammar import Follower
from modules.backends.transformers.text import TextStream
from modules.errors import UserError

MAX_ALTERNATIVES = 1000
"""Reported for one token at most."""


@dataclass
class Track:
    """Tokens, and how many of them are computed in `state`. The reply's own, and with guidance that of the negative prompt."""

    tokens: list[int]
    state: Any = None
    extra: Any = None
    """An image's tensors, needed with the first tokens."""
    logits: torch.Tensor | None = None
    """After the last token, once all are computed: rows for it and for the guesses before it."""

    @property
    def computed(self) -> int:
        """Tokens in the cache."""
        return self.state.length if self.state is not None else 0

    @property
    def missing(self) -> int:
        """Tokens not computed yet."""
        return len(self.tokens) - self.computed


@dataclass(eq=False)
class Job:
    """One request. Made by who asks; afterwards only the engine's thread changes it."""

    request: GenerationRequest
    track: Track
    limit: int
    """New tokens at most."""
    sampler: Sampler | None
    """None: only the prompt is computed."""
    stream: TextStream
    piece: Callable[[int], str]
    ends: frozenset[int]
    key: Hashable = None
    """Adapters and scales: jobs of the same key are computed together, and may use each other's beginnings."""
    negative: Track | None = None
    follower: Follower | None = None
    reuse: bool = True
    guesser: Callable[[Sequence[int], int], list[int]] | None = None
    """Tokens that may follow, at most so many."""
    chunks: SimpleQueue[Chunk | UserError] = field(default_factory=SimpleQueue)
    cancelled: bool = False
    asked_at: float = field(default_factory=time.monotonic)
    admitted_at: float = 0.0
    first_at: float = 0.0
    last_at: float = 0.0
    reused: int = 0
    drafted: int = 0
    accepted: int = 0
    position: int | None = None
    """What was last told of its place among the waiting."""
    ended: str = ""

    def __post_init__(self) -> None:
        self.prompt = len(self.track.tokens)

    @property
    def tracks(self) -> list[Track]:
        """The reply's, and the negative prompt's with guidance."""
        return [self.track, self.negative] if self.negative else [self.track]

    @property
    def done(self) -> int:
        """Tokens written."""
        return len(self.track.tokens) - self.prompt

    @property
    def writes(self) -> bool:
        """Whether its prompt is computed."""
        return bool(self.first_at)

    @property
    def wants_prompt(self) -> bool:
        """Whether the prompt's own probabilities are asked for."""
        return self.request.prompt_logprobs is not None

    # --- from logits to chunks ------------------------------------------------------------------------------------------------------------

    def read(self, logits: torch.Tensor, start: int) -> None:
        """Tell that the prompt is computed up to `track.computed`. `logits`: a row for each token from `start` on, if they are wanted."""
        found: tuple[TokenLogprob, ...] = ()
        if self.wants_prompt:
            count = min(self.request.prompt_logprobs or 0, MAX_ALTERNATIVES)
            followed = self.track.tokens[start + 1 : min(start + 1 + len(logits), self.prompt)]
            found = tuple(self._described(row, token, count) for row, token in zip(logits, followed, strict=False))
        self.chunks.put(Chunk(prompt_tokens=self.prompt, prefill_done=min(self.track.computed, self.prompt), prompt_logprobs=found))

    def write(self, guessed: Sequence[int]) -> FinishReason | None:
        """Choose the next token, and further ones while `guessed` foresaw them; why the reply ends here, if it does.

        The logits have a row after the last token, and one after each guess; guesses that did not come true are to be cut off by the caller.
        """
        rows = self._rows()
        tokens: list[int] = []
        found: list[TokenLogprob] = []
        reason: FinishReason | None = None
        for place in range(len(rows)):
            token = self._choose(rows[place])
            if token is None or token in self.ends:
                reason = "stop"
                break
            found += self._logprob(place, token)
            tokens.append(token)
            for track in self.tracks:
                track.tokens.append(token)
            if self.follower and self.follower.accept(token):
                reason = "stop"
            elif self.done >= self.limit:
                reason = "length"
            if reason or place >= len(guessed) or guessed[place] != token:
                break
        self.accepted += max(0, len(tokens) - 1)
        self.last_at = time.monotonic()
        if tokens:
            self.chunks.put(Chunk(self.stream.feed(tokens), tuple(tokens), completion_tokens=self.done, logprobs=tuple(found)))
        return reason

    def _rows(self) -> torch.Tensor:
        assert self.track.logits is not None
        if self.negative is None:
            return self.track.logits
        assert self.negative.logits is not None
        scale = self.request.sampling.guidance_scale
        return torch.stack([guided(row, away, scale) for row, away in zip(self.track.logits, self.negative.logits, strict=True)])

    def _choose(self, row: torch.Tensor) -> int | None:
        assert self.sampler
        if self.sampler.plain and self.follower is None:
            return int(row.argmax())
        allowed = self.follower.allowed(row.device, len(row)) if self.follower else None
        return self.sampler.choose(row, self.track.tokens, allowed)

    def _logprob(self, place: int, token: int) -> list[TokenLogprob]:
        assert self.track.logits is not None
        if self.request.logprobs:
            return [self._described(self.track.logits[place], token, min(self.request.logprobs, MAX_ALTERNATIVES))]
        if self.request.chosen_logprob:
            return [TokenLogprob(token, "", alternatives(self.track.logits[place], token, 0)[0])]
        return []

    def _described(self, row: torch.Tensor, token: int, count: int) -> TokenLogprob:
        own, best = alternatives(row, token, count)
        return TokenLogprob(token, self.piece(token), own, tuple((other, self.piece(other), value) for other, value in best))

    # --- the end --------------------------------------------------------------------------------------------------------------------------

    def end(self, reason: FinishReason) -> None:
        """Tell that it is over."""
        self.ended = reason
        text = self.stream.finish()
        self.chunks.put(
            Chunk(text, finish_reason=reason, prompt_tokens=self.prompt, completion_tokens=self.done, timings=self.timings()),
        )

    def fail(self, error: UserError) -> None:
        """Tell that it failed."""
        self.ended = "error"
        self.chunks.put(error)

    def timings(self) -> Timings:
        """As far as it has come."""
        now = time.monotonic()
        admitted = self.admitted_at or now
        return Timings(
            queue_seconds=admitted - self.asked_at,
            prefill_seconds=(self.first_at or now) - admitted,
            prefill_tokens=max(0, min(self.track.computed, self.prompt) - self.reused),
            reused_tokens=self.reused,
            decode_seconds=max(0.0, self.last_at - self.first_at) if self.first_at else 0.0,
            draft_tokens=self.drafted,
            accepted_tokens=self.accepted,
        )
