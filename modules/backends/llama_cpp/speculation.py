"""Guessing tokens ahead. What is guessed wrong costs time and never changes the text: the model chooses at each place, and only agreement is kept.

For greedy choices the text is the same as without; for drawn ones each token is drawn from the same distribution (the guess is only compared with
what was drawn). Sources: Leviathan et al. 2022, arXiv:2211.17192, for draft models; "prompt lookup decoding" (A. Saxena, 2023) for n-grams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modules.backends.llama_cpp.scheduler import Job, Row
from modules.errors import ModelError


class NgramLookup:
    """Looks for the last tokens of a job further up in its own text, and guesses what came after them there."""

    def __init__(self, ngram: int, longest: int, min_hits: int = 1) -> None:
        """`ngram`: tokens that must agree; `longest` guess; `min_hits`: how often the n-gram must have been seen."""
        self._ngram = ngram
        self._longest = longest
        self._min_hits = min_hits
        self._lengths: dict[int, int] = {}
        self._before: dict[int, tuple[int, int]] = {}

    def guess(self, jobs: Sequence[Job], most: Mapping[int, int]) -> dict[int, list[int]]:
        """See `Speculator.guess`."""
        found = {}
        for job in jobs:
            guess = self._of(job.tokens, min(most[job.id], self._length(job)))
            if guess:
                found[job.id] = guess
        return found

    def _length(self, job: Job) -> int:
        """How long a guess may be: twice as long after one that was right, half after one that was not. A wrong one is computed in vain."""
        drafted, accepted = self._before.get(job.id, (0, 0))
        length = self._lengths.get(job.id, min(8, self._longest))
        if job.drafted > drafted:
            all_right = job.accepted - accepted == job.drafted - drafted
            length = min(self._longest, length * 2) if all_right else max(2, length // 2)
        self._lengths[job.id] = length
        self._before[job.id] = (job.drafted, job.accepted)
        return length

    def _of(self, tokens: np.ndarray, most: int) -> list[int]:
        n = self._ngram
        if most <= 0 or len(tokens) <= n:
            return []
        same = tokens[n - 1 : -1] == tokens[-1]
        for back in range(1, n):
            same = same & (tokens[n - 1 - back : -1 - back] == tokens[-1 - back])
        ends = np.flatnonzero(same) + n
        if len(ends) < self._min_hits:
            return []
        start = int(ends[-1])  # the newest
        return [int(token) for token in tokens[start : start + most]]

    def forget(self, job: Job) -> None:
        """See `Speculator.forget`."""
        self._lengths.pop(job.id, None)
        self._before.pop(job.id, None)


class DraftModel:
    """A smaller model of the same vocabulary writes ahead, greedily."""

    def __init__(self, model: Any, longest: int) -> None:
        """`model`: a `Model` with at least as many sequence numbers as jobs run, and a context of the same length."""
        self._model = model
        self._longest = longest
        self._sequences: dict[int, tuple[int, np.ndarray]] = {}  # of a job: its sequence number, and the tokens in the draft's cache
        self._numbers = list(range(model.sequences))[::-1]

    def guess(self, jobs: Sequence[Job], most: Mapping[int, int]) -> dict[int, list[int]]:
        """See `Speculator.guess`. One decoding of the draft for each token ahead, of all jobs together."""
        wanted = [(job, min(most[job.id], self._longest)) for job in jobs]
        ready = [(job, count) for job, count in wanted if count > 0 and self._number(job) is not None]
        written: dict[int, list[int]] = {job.id: [] for job, _ in ready}
        for ahead in range(max((count for _, count in ready), default=0)):
            rows = [self._row(job, written[job.id]) for job, count in ready if count > ahead]
            jobs_now = [job for job, count in ready if count > ahead]
            if not self._compute(rows):
                break
            end = 0
            for job, row in zip(jobs_now, rows, strict=True):
                end += len(row.tokens)
                written[job.id].append(self._model.likeliest(end - 1))
        return {id: tokens for id, tokens in written.items() if tokens}

    def _number(self, job: Job) -> int | None:
        if job.id not in self._sequences and self._numbers:
            self._sequences[job.id] = (self._numbers.pop(), np.zeros(0, np.int32))
        return self._sequences[job.id][0] if job.id in self._sequences else None

    def _row(self, job: Job, ahead: Sequence[int]) -> Row:
        """What the draft has not computed of the job's tokens and of its own guess; wrong guesses of the last time are cut off first."""
        number, cached = self._sequences[job.id]
        text = np.concatenate([job.tokens, np.array(ahead, np.int32)])
        different = np.flatnonzero(cached[: len(text)] != text[: len(cached)])
        known = int(different[0]) if len(different) else min(len(cached), len(text) - 1)
        if known < len(cached):
            self._model.cut(number, known)
        self._sequences[job.id] = (number, text[:known])
        return Row(number, text[known:], np.arange(known, len(text), dtype=np.int32), 1)

    def _compute(self, rows: Sequence[Row]) -> bool:
        """Long rows, of a job new to the draft, go ahead in pieces; then all newest tokens in one step."""
        for row in rows:
            while len(row.tokens) > 1:
                count = min(len(row.tokens) - 1, self._model.batch_size)
                if not self._decode([Row(row.sequence, row.tokens[:count], row.positions[:count], 0)]):
                    return False
                row.tokens, row.positions = row.tokens[count:], row.positions[count:]
        return self._decode(rows)

    def _decode(self, rows: Sequence[Row]) -> bool:
        try:
            if self._model.decode(rows, None, None).value:  # no place: guess nothing
                return False
        except ModelError:
            return False
        numbers = {number: id for id, (number, _) in self._sequences.items()}
        for row in rows:
            id = numbers[row.sequence]
            self._sequences[id] = (row.sequence, np.concatenate([self._sequences[id][1], row.tokens]))
        return True

    def forget(self, job: Job) -> None:
        """See `Speculator.forget`."""
        number, _ = self._sequences.pop(job.id, (None, None))
        if number is not None:
            self._model.cut(number, 0)
            self._numbers.append(number)
