"""What stands in the context's cache, and what was moved from it to main memory. Pure bookkeeping: native memory is behind `Memory`.

A sequence is a chain of entries: a token, its position, and the cell it lies in. Sequences share cells by reference: a copied prefix costs
nothing, and a cell is free when nobody holds it. Finished sequences stay, least recently used last, until somebody needs their cells or their
number; then they are moved to main memory while there is room, or dropped.

Invariants (tests/backends/test_llama_cpp_scheduler.py tries them with random work):
- `used` is the number of cells that native memory really holds; no cell is held by nobody.
- Two sequences share a cell only with the same key, token and position, and everything before it the same too.
- A sequence in use is never evicted.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

WORTH_RESTORING = 32
"""Tokens that a sequence in main memory must save over the best one in cells: fewer are computed faster than moved."""


class Memory(Protocol):
    """The native cache, by sequence number and position."""

    cuts: bool
    """Whether any sequence can be cut back to any length. False for models with a state (recurrent, hybrid) or a sliding window."""

    def clear(self) -> None:
        """Remove everything, the numbers in the cells too."""
        ...

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Let `target` hold the cells of `source` at positions start ≤ p < end too."""
        ...

    def cut(self, sequence: int, start: int) -> bool:
        """Remove positions ≥ `start` (0: all). False, with nothing changed, where the model cannot."""
        ...

    def can_end_at(self, sequence: int, end: int) -> bool:
        """Whether a copy or cut that ends before position `end` would be right; always true of the sequence's own end.

        False for states that only exist as a whole (recurrent, hybrid), and where a sliding window has moved on.
        """
        ...

    def save(self, sequence: int) -> Any:
        """The sequence's state as a buffer of bytes."""
        ...

    def restore(self, sequence: int, state: Any) -> bool:
        """Put a saved state into the empty `sequence`; False when that fails."""
        ...


class Held:
    """A sequence in cells."""

    def __init__(self, id: int, key: Hashable) -> None:
        self.id = id
        self.key = key
        self.length = 0
        self._rows = np.zeros((3, 256), np.int32)

    @property
    def tokens(self) -> np.ndarray:
        """int32 (length,). A view: valid until the sequence grows."""
        return self._rows[0, : self.length]

    @property
    def positions(self) -> np.ndarray:
        """int32 (length,). Nearly always 0, 1, 2, …; images of some models take fewer positions than cells."""
        return self._rows[1, : self.length]

    @property
    def cells(self) -> np.ndarray:
        """int32 (length,): numbers of our own, not the library's."""
        return self._rows[2, : self.length]

    def append(self, tokens: Any, positions: Any, cells: Any) -> None:
        """Add entries at the end."""
        end = self.length + len(tokens)
        self._reserve(end)
        for row, values in enumerate((tokens, positions, cells)):
            self._rows[row, self.length : end] = values
        self.length = end

    def append_one(self, token: int, position: int, cell: int) -> None:
        """Add one entry at the end."""
        self._reserve(self.length + 1)
        rows, end = self._rows, self.length
        rows[0, end], rows[1, end], rows[2, end] = token, position, cell
        self.length = end + 1

    def _reserve(self, length: int) -> None:
        if length > self._rows.shape[1]:
            grown = np.zeros((3, max(length, 2 * self._rows.shape[1])), np.int32)
            grown[:, : self.length] = self._rows[:, : self.length]
            self._rows = grown

    def end_after(self, length: int) -> int:
        """The first position that does not belong to the first `length` entries."""
        if length == 0:
            return 0
        return int(self._rows[1, length] if length < self.length else self._rows[1, length - 1] + 1)


@dataclass(frozen=True)
class Spilled:
    """A sequence in main memory."""

    key: Hashable
    tokens: np.ndarray
    positions: np.ndarray
    state: Any
    size: int
    """Bytes."""


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many entries at the start of `a` and `b` are the same."""
    count = min(len(a), len(b))
    different = np.flatnonzero(a[:count] != b[:count])
    return int(different[0]) if len(different) else count


class Cache:
    """All sequences of one context. One thread only."""

    def __init__(self, memory: Memory, cells: int, sequences: int, spill_bytes: int = 0) -> None:
        """`sequences`: how many numbers there are; `spill_bytes`: room in main memory, 0 for none."""
        self._memory = memory
        self.size = cells
        self.spill_bytes = spill_bytes
        self._bytes_per_token = 0.0  # of the state moved last
        self._holders = np.zeros(cells, np.int32)
        self._free_cells = np.arange(cells, dtype=np.int32)[::-1].copy()
        self._free = cells  # the first so many of _free_cells
        self._numbers = list(range(sequences))[::-1]
        self._busy: dict[int, Held] = {}
        self._idle: collections.OrderedDict[int, Held] = collections.OrderedDict()  # least recently used first
        self._spilled: collections.OrderedDict[int, Spilled] = collections.OrderedDict()
        self._spills = 0
        self.evictions = 0
        self.hits_cells = self.hits_memory = self.misses = 0

    # --- how full it is -------------------------------------------------------------------------------------------------------------

    @property
    def used(self) -> int:
        """Cells held by anybody."""
        return self.size - self._free

    @property
    def idle(self) -> int:
        """Finished sequences in cells."""
        return len(self._idle)

    @property
    def spilled(self) -> int:
        """Sequences in main memory."""
        return len(self._spilled)

    @property
    def spilled_bytes(self) -> int:
        """Main memory they take."""
        return sum(each.size for each in list(self._spilled.values()))  # the thread that tells the engine's health asks too

    def available(self) -> int:
        """Cells that are free or could be: all but those of sequences in use."""
        return self.size - self._busy_cells()

    def _busy_cells(self) -> int:
        held = np.zeros(self.size, bool)
        for sequence in self._busy.values():
            held[sequence.cells] = True
        return int(held.sum())

    # --- taking and giving back -----------------------------------------------------------------------------------------------------

    def take(self, key: Hashable, tokens: np.ndarray, most: int) -> Held | None:
        """A sequence for `tokens` that already holds as much of their start as is known, at most `most`. None when all numbers are in use."""
        length, source = self._best(key, tokens, most)
        saved, name = self._best_spilled(key, tokens, most)
        if name is not None and saved >= length + WORTH_RESTORING:
            restored = self._restore(name, saved)
            if restored:
                self.hits_memory += 1
                return restored
            length, source = self._best(key, tokens, most)  # another one: making room may have evicted it
        if source is not None and source.id in self._idle and length == source.length:  # it would only be continued
            self.hits_cells += 1
            return self._wake(source)
        sequence = self._new(key, keep=source)
        if sequence is None:
            return None
        if source is None:
            self.misses += 1
            return sequence
        self.hits_cells += 1
        self._share(source, sequence, length)
        return sequence

    def _wake(self, sequence: Held) -> Held:
        del self._idle[sequence.id]
        self._busy[sequence.id] = sequence
        return sequence

    def improve(self, sequence: Held, tokens: np.ndarray, most: int) -> None:
        """Let `sequence`, which holds the start of `tokens`, share what others have computed of them since."""
        length, source = self._best(sequence.key, tokens, most, but=sequence)
        if source is not None and length > sequence.length:
            self._share(source, sequence, length)

    def shared(self, key: Hashable, tokens: np.ndarray, most: int) -> int:
        """How many entries `take` would at least share with sequences in use, whose cells `available` leaves out."""
        return max((self._usable(each, key, tokens, most) for each in self._busy.values()), default=0)

    def finish(self, sequence: Held) -> None:
        """Keep a sequence that is no longer in use as the most recently used one."""
        del self._busy[sequence.id]
        self._idle[sequence.id] = sequence
        if not sequence.length:
            self._drop_idle(sequence)
        elif self._memory.cuts:
            self._drop_beginnings(sequence)

    def _drop_beginnings(self, newest: Held) -> None:
        """What is only the beginning of another sequence is of no more use where every beginning can be cut out of the whole."""
        for other in [each for each in self._idle.values() if each is not newest and each.key == newest.key]:
            same = common_prefix(other.tokens, newest.tokens)
            if same == newest.length:
                self._idle.move_to_end(other.id)
                self._drop_idle(newest)
                return
            if same == other.length:
                self._drop_idle(other)

    def snapshot(self, sequence: Held) -> None:
        """Keep a copy of `sequence` as it is now, for models whose sequences cannot be cut back later."""
        copy = self._new(sequence.key, keep=sequence)
        if copy is not None:
            self._share(sequence, copy, sequence.length)
            self.finish(copy)

    def drop(self, sequence: Held) -> None:
        """Forget a sequence in use, whatever state it is in."""
        self._memory.cut(sequence.id, 0)
        self._release(sequence, 0)
        del self._busy[sequence.id]
        self._numbers.append(sequence.id)

    def forget(self, wanted: Callable[[Hashable], bool] = lambda key: True) -> None:
        """Drop every finished sequence, in cells and in main memory, whose key is `wanted`."""
        for sequence in list(self._idle.values()):
            if wanted(sequence.key):
                self._drop_idle(sequence)
        for name, spilled in list(self._spilled.items()):
            if wanted(spilled.key):
                del self._spilled[name]

    def wipe(self) -> None:
        """Drop every sequence, and what stands in the cells. Nobody may be in use."""
        self.forget()
        self._memory.clear()

    def give_back_memory(self) -> None:
        """Halve the room in main memory, to half of what is in use, and drop what no longer fits: the system is running short of it."""
        self.spill_bytes = self.spilled_bytes // 2
        while self._spilled and self.spilled_bytes > self.spill_bytes:
            self._spilled.popitem(last=False)

    def clear_the_way(self) -> None:
        """Move finished sequences to main memory, least recently used first, as long as nothing is lost by it: somebody is at work.

        llama.cpp's attention walks over every cell up to the last one held, whoever holds it: with the starter model on two cores 2,900 cells of
        others made four writers a third slower, 500 a twentieth. Moving 1,000 tokens out or in takes 3 ms.
        """
        while self._memory.cuts and self._idle and self.used > self._busy_cells():
            oldest = next(iter(self._idle.values()))
            if self.spilled_bytes + oldest.length * self._bytes_per_token >= self.spill_bytes:
                return
            if not self._spill(oldest, push=False):
                return
            self.evictions += 1
            self._drop_idle(oldest)

    # --- growing and shrinking ------------------------------------------------------------------------------------------------------

    def room(self, count: int) -> bool:
        """Make `count` cells free by evicting finished sequences; False when those in use leave fewer."""
        while self._free < count and self._idle:
            self._evict(next(iter(self._idle.values())))
        return self._free >= count

    def extend(self, sequence: Held, tokens: Any, positions: Any) -> None:
        """Note what was computed into `sequence`. There must be room for it."""
        count = len(tokens)
        self._free -= count
        assert self._free >= 0, "computed more than there was room for"
        if count == 1:  # nearly always; one at a time numpy's ways for many cost more than the work
            cell = self._free_cells[self._free]
            self._holders[cell] = 1
            sequence.append_one(tokens[0], positions[0], cell)
            return
        cells = self._free_cells[self._free : self._free + count]
        self._holders[cells] = 1
        sequence.append(tokens, positions, cells)

    def cut(self, sequence: Held, length: int) -> bool:
        """Take back all but the first `length` entries; False, with nothing changed, where the model cannot."""
        if length >= sequence.length:
            return True
        if not self._memory.cut(sequence.id, sequence.end_after(length)):
            return False
        self._release(sequence, length)
        return True

    # --- inside ---------------------------------------------------------------------------------------------------------------------

    def _sequences(self) -> Iterator[Held]:
        yield from self._busy.values()
        yield from reversed(self._idle.values())

    def _usable(self, sequence: Held, key: Hashable, tokens: np.ndarray, most: int) -> int:
        """How many of `tokens`, at most `most`, `sequence` can give."""
        if sequence.key != key:
            return 0
        length = whole_images(tokens, min(common_prefix(sequence.tokens, tokens), most))
        return length if self._memory.cuts or self._memory.can_end_at(sequence.id, sequence.end_after(length)) else 0

    def _best(self, key: Hashable, tokens: np.ndarray, most: int, but: Held | None = None) -> tuple[int, Held | None]:
        """The sequence in cells that shares the longest usable start, and how long that is."""
        best, found = 0, None
        for sequence in self._sequences():
            length = self._usable(sequence, key, tokens, most) if sequence is not but else 0
            if length > best:
                best, found = length, sequence
        return best, found

    def _best_spilled(self, key: Hashable, tokens: np.ndarray, most: int) -> tuple[int, int | None]:
        best, found = 0, None
        for name, spilled in self._spilled.items():
            length = whole_images(tokens, min(common_prefix(spilled.tokens, tokens), most)) if spilled.key == key else 0
            if length > best and (self._memory.cuts or length == len(spilled.tokens)):
                best, found = length, name
        return best, found

    def _new(self, key: Hashable, keep: Held | None = None) -> Held | None:
        """An empty sequence in use; evicts a finished one other than `keep` for its number if need be."""
        if not self._numbers:
            oldest = next((each for each in self._idle.values() if each is not keep), None)
            if oldest is None:
                return None
            self._evict(oldest)
        sequence = Held(self._numbers.pop(), key)
        self._busy[sequence.id] = sequence
        return sequence

    def _share(self, source: Held, target: Held, length: int) -> None:
        """Let `target`, which holds a start of `source`'s tokens, hold the first `length` of them."""
        own = target.length
        self._memory.copy(source.id, target.id, target.end_after(own), source.end_after(length))
        cells = source.cells[own:length]
        self._holders[cells] += 1
        target.append(source.tokens[own:length], source.positions[own:length], cells)
        if source.id in self._idle:
            self._idle.move_to_end(source.id)

    def _release(self, sequence: Held, length: int) -> None:
        cells = sequence.cells[length:]
        self._holders[cells] -= 1
        freed = cells[self._holders[cells] == 0]
        self._free_cells[self._free : self._free + len(freed)] = freed
        self._free += len(freed)
        sequence.length = length

    def _drop_idle(self, sequence: Held) -> None:
        del self._idle[sequence.id]
        self._busy[sequence.id] = sequence
        self.drop(sequence)

    def _evict(self, sequence: Held) -> None:
        self.evictions += 1
        self._spill(sequence)
        self._drop_idle(sequence)

    def _spill(self, sequence: Held, push: bool = True) -> bool:
        """Whether a copy of it stands in main memory now. `push`: older ones may go for it."""
        if not self.spill_bytes:
            return False
        state = self._memory.save(sequence.id)
        size = len(state)
        self._bytes_per_token = size / max(1, sequence.length)
        if size + (0 if push else self.spilled_bytes) > self.spill_bytes:
            return False
        for name, other in list(self._spilled.items()):
            if self._memory.cuts and other.key == sequence.key and common_prefix(other.tokens, sequence.tokens) == len(other.tokens):
                del self._spilled[name]
        while self._spilled and self.spilled_bytes + size > self.spill_bytes:
            self._spilled.popitem(last=False)
        self._spills += 1
        self._spilled[self._spills] = Spilled(sequence.key, sequence.tokens.copy(), sequence.positions.copy(), state, size)
        return True

    def _restore(self, name: int, length: int) -> Held | None:
        spilled = self._spilled.pop(name)  # not to be pushed out by what makes room for it
        whole = len(spilled.tokens)
        sequence = self._new(spilled.key) if self.room(whole) else None
        restored = sequence is not None and self._memory.restore(sequence.id, spilled.state)
        if sequence is None or not restored:
            if sequence:
                self.drop(sequence)
            self._keep(name, spilled)
            return None
        self.extend(sequence, spilled.tokens, spilled.positions)
        if length < whole:  # the rest of it may be wanted again
            self._keep(name, spilled)
            self.cut(sequence, length)
        return sequence

    def _keep(self, name: int, spilled: Spilled) -> None:
        if self.spilled_bytes + spilled.size <= self.spill_bytes:
            self._spilled[name] = spilled


def whole_images(tokens: Sequence[int] | np.ndarray, length: int) -> int:
    """`length`, or fewer so as not to end inside an image: its entries are negative and are computed only together.

    Two images that touch count as one here, which costs a computation and never a wrong result.
    """
    if length < len(tokens) and length and tokens[length] < 0:
        while length and tokens[length - 1] < 0:
            length -= 1
    return length
