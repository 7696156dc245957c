"""Guessing ahead: from the text itself, or with a small model. Guesses are checked by the model, so the reply is the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from modules.backends.transformers.decoders import Decoder, Part
from modules.backends.transformers.kept import common

Guesser = Callable[[Sequence[int], int], list[int]]
"""Tokens that may follow these, at most so many."""
LONGEST_KEY, SHORTEST_KEY = 3, 2
"""Last tokens that must have stood in the text before: the longer ones are tried first."""


def from_text(count: int) -> Guesser:
    """What followed, at its latest earlier place, the end of the text; at most `count` tokens."""

    def guess(tokens: Sequence[int], room: int) -> list[int]:
        return looked_up(tokens, min(count, room))

    return guess


def looked_up(tokens: Sequence[int], count: int) -> list[int]:
    """The up to `count` tokens after the latest earlier place of the last 3 tokens, or of the last 2; [] when there is none."""
    for size in range(LONGEST_KEY, SHORTEST_KEY - 1, -1):
        end = list(tokens[-size:])
        if len(tokens) <= size:
            continue
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start] == end[0] and list(tokens[start : start + size]) == end:
                return list(tokens[start + size : start + size + count])
    return []


class DraftModel:
    """A small model that writes ahead, greedily. It belongs to the engine's thread."""

    def __init__(self, decoder: Decoder, vocabulary: int, count: int) -> None:
        """`vocabulary`: of the model that checks; guesses beyond it are cut off. The decoder must be croppable."""
        self._decoder = decoder
        self._vocabulary = vocabulary
        self._count = count
        self._tokens: list[int] = []
        self._state: Any = decoder.new()

    def __call__(self, tokens: Sequence[int], room: int) -> list[int]:
        """See `Guesser`. Goes on from what it computed for the last call, as far as that is the same text."""
        known = common(self._tokens, tokens, len(tokens) - 1)
        if known < self._state.length:
            self._decoder.crop(self._state, known)
        missing, guessed = list(tokens[self._state.length :]), list[int]()
        while len(guessed) < min(self._count, room):
            token = int(self._decoder.run([Part(self._state, missing, 1)])[0][0].argmax())
            if token >= self._vocabulary:
                break
            guessed.append(token)
            missing = [token]
        self._tokens = [*tokens, *guessed][: self._state.length]
        return guessed
