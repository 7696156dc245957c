"""Finished sequences that stay computed, so that a next turn reads only what is new. Pure bookkeeping: no torch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

WORTH = 8
"""Tokens that a shared beginning must have to be used again."""
SPARE = 64
"""A kept sequence that is longer than the shared beginning by more than this is copied and stays; else it is taken over."""


class Cutter(Protocol):
    """The part of a decoder that is needed here."""

    croppable: bool

    def copy(self, state: Any, length: int) -> Any:
        """See `Decoder.copy`."""
        ...

    def crop(self, state: Any, length: int) -> None:
        """See `Decoder.crop`."""
        ...


@dataclass
class _Kept:
    key: Hashable
    tokens: list[int]
    state: Any


class KeptSequences:
    """At most `most` tokens of finished sequences; those used longest ago go first. One thread."""

    def __init__(self, cutter: Cutter, most: int) -> None:
        self._cutter = cutter
        self._most = most
        self._kept: list[_Kept] = []
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def tokens(self) -> int:
        """Tokens of all that is kept."""
        return sum(len(each.tokens) for each in self._kept)

    @property
    def nbytes(self) -> int:
        """Memory of all that is kept."""
        return sum(each.state.nbytes for each in list(self._kept))

    def take(self, key: Hashable, prompt: Sequence[int]) -> Any:
        """A state with the longest known beginning of `prompt`, without its last token; None when there is none worth it.

        A sequence that cannot be cut back is found only when the prompt goes on where it ends. `key`: what else the numbers depend on.
        """
        best, length = None, WORTH - 1
        for kept in self._kept:
            shared = common(kept.tokens, prompt, len(prompt) - 1) if kept.key == key else 0
            if shared > length and (self._cutter.croppable or shared == len(kept.tokens)):
                best, length = kept, shared
        if best is None:
            return None
        self._kept.remove(best)
        if self._cutter.croppable and len(best.tokens) - length > SPARE:
            state = self._cutter.copy(best.state, length)
            self._kept.append(best)
            return state
        self._cutter.crop(best.state, length)
        return best.state

    def add(self, key: Hashable, tokens: Sequence[int], state: Any) -> None:
        """Keep `state`, which has computed exactly `tokens`. One that is a beginning of it is let go."""
        if len(tokens) < WORTH or len(tokens) > self._most:
            return
        if self._cutter.croppable:
            self._kept = [e for e in self._kept if e.key != key or common(e.tokens, tokens, len(tokens)) < len(e.tokens)]
        self._kept.append(_Kept(key, list(tokens), state))
        while self.tokens > self._most:
            self._kept.pop(0)
            self.evictions += 1

    def drop(self, wanted: Callable[[Hashable], bool] = lambda _key: True) -> None:
        """Let go of everything whose key is `wanted`."""
        self._kept = [each for each in self._kept if not wanted(each.key)]


def common(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """Length of the common beginning, at most `most`."""
    end = min(len(one), len(other), most)
    if list(one[:end]) == list(other[:end]):
        return end
    return next(place for place in range(end) if one[place] != other[place])
