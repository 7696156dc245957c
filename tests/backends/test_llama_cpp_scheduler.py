"""The scheduler and the cache on a fake context that knows exactly what each sequence has seen: random work, and the invariants they promise."""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.backends.llama_cpp.cache import WORTH_RESTORING, Cache, common_prefix, whole_images
from modules.backends.llama_cpp.scheduler import LOW, MAX_LOW, NORMAL, Computed, Job, Pace, Scheduler, share_of
from modules.errors import Busy, ModelError, NotANumber

VOCABULARY = 50
BATCH, OUTPUTS = 32, 16


def follows(history: tuple[int, ...], key: object = None) -> int | None:
    """The fake model: a token that depends on everything before it and on the adapters; sometimes the end."""
    value = zlib.crc32(repr((history, key)).encode()) % 1000
    return None if value < 20 else value % VOCABULARY


def paced(piece) -> SimpleNamespace:
    """In place of a Pace: pieces as long as `piece` says."""
    return SimpleNamespace(piece=piece, seconds=lambda _reading: float("inf"), saw=lambda *_: None)


class Context:
    """A native context as the scheduler and the cache see it. `windowed` models cannot be cut back and copy only as a whole."""

    def __init__(self, cells: int, windowed: bool = False) -> None:
        self.cells, self.cuts = cells, not windowed
        self.batch_size, self.outputs_size = BATCH, OUTPUTS
        self.sequences: dict[int, list[tuple[int, int, object]]] = {}  # (position, token, cell)
        self.outputs: dict[int, tuple[tuple[int, ...], object]] = {}
        self.fail: Exception | None = None
        self.full = 0
        self.decodings: list[list[int]] = []

    def of(self, sequence: int) -> list[tuple[int, int, object]]:
        return self.sequences.setdefault(sequence, [])

    @property
    def used(self) -> int:
        return len({id(cell) for held in self.sequences.values() for _, _, cell in held})

    def decode(self, rows, key, stop) -> Computed:
        tokens = sum(len(row.tokens) for row in rows)
        assert 0 < tokens <= self.batch_size and sum(row.outputs for row in rows) <= self.outputs_size
        assert len({row.sequence for row in rows}) == len(rows)
        if stop and self.cuts and stop():
            return Computed.STOPPED
        if self.fail:
            error, self.fail = self.fail, None
            raise error
        if self.full:
            self.full -= 1
            return Computed.FULL
        assert self.used + tokens <= self.cells, "there was no room"
        self.outputs.clear()
        self.decodings.append([row.sequence for row in rows])
        first = 0
        for row in rows:
            assert row.first == first
            held = self.of(row.sequence)
            for n, (token, position) in enumerate(zip(row.tokens, row.positions, strict=True)):
                assert position == (held[-1][0] + 1 if held else 0), "positions without a gap"
                held.append((int(position), int(token), object()))
                if n >= len(row.tokens) - row.outputs:
                    self.outputs[first + n] = (tuple(token for _, token, _ in held), key)
            first += len(row.tokens)
        return Computed.DONE

    def decode_image(self, image, position, sequence, key) -> Computed:
        held = self.of(sequence)
        assert len(held) == image.start and self.used + image.length <= self.cells
        held += [(position + n, token, object()) for n, token in enumerate(image.tokens)]
        return Computed.DONE

    def clear(self) -> None:
        assert not self.used
        self.cleared = True

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        taken, there = self.of(source), self.of(target)
        if not self.cuts:
            assert not there and end == taken[-1][0] + 1, "a state is copied as a whole"
        there += [entry for entry in taken if start <= entry[0] < end]

    def cut(self, sequence: int, start: int) -> bool:
        held = self.of(sequence)
        if not self.cuts and start and any(position >= start for position, _, _ in held):
            return False
        held[:] = [entry for entry in held if entry[0] < start]
        return True

    def can_end_at(self, sequence: int, end: int) -> bool:
        held = self.of(sequence)
        return self.cuts or (held[-1][0] + 1 if held else 0) == end

    def save(self, sequence: int):
        return [(position, token) for position, token, _ in self.of(sequence)]

    def restore(self, sequence: int, state) -> bool:
        assert not self.of(sequence) and self.used + len(state) <= self.cells
        self.sequences[sequence] = [(position, token, object()) for position, token in state]
        return True


@dataclass
class Listener:
    """A voice that asks the fake model, and remembers everything it is told."""

    context: Context
    job: Job | None = None
    written: list[int] = field(default_factory=list)
    ends: list[object] = field(default_factory=list)
    read_to: list[int] = field(default_factory=list)
    probabilities: list[tuple[int, ...]] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    started: int | None = None
    clock = itertools.count()

    def choose(self, output: int) -> int | None:
        history, key = self.context.outputs[output]
        mine = tuple(int(t) for t in self.job.tokens)
        guessed = history[len(mine) :]
        assert history[: len(mine)] == mine or mine[: len(history)] == history, "it sees its own tokens and no others"
        assert key == self.job.key and not guessed[:0]
        return follows(history, key)

    def wrote(self, job: Job, tokens) -> None:
        assert not self.ends
        self.written += tokens

    def read(self, job: Job, outputs: range) -> None:
        assert not self.ends
        if self.started is None:
            self.started = next(self.clock)
        self.read_to.append(job.computed)
        self.probabilities += [self.context.outputs[n][0] for n in outputs]

    def waits(self, position: int) -> None:
        assert not self.ends
        self.positions.append(position)

    def ended(self, job: Job, reason: str) -> None:
        self.ends.append(reason)

    def failed(self, job: Job, error) -> None:
        self.ends.append(error)


class Guesser:
    """Guesses sometimes right and sometimes wrong."""

    def guess(self, jobs, most):
        return {job.id: self._of(job, most[job.id]) for job in jobs if most[job.id]}

    def _of(self, job, most):
        history, found = [int(t) for t in job.tokens], []
        for n in range(min(most, 4)):
            token = follows((*history, *found), job.key)
            found.append((token if token is not None else 0) if (len(history) + n) % 3 else 49)
        return found

    def forget(self, job) -> None:
        pass


class World:
    def __init__(self, cells=64, parallel=3, numbers=8, spill=10_000, windowed=False, guess=False, share=0.5, **options) -> None:
        self.context = Context(cells, windowed)
        self.cache = Cache(self.context, cells, numbers, spill)
        speculator = Guesser() if guess else None
        self.scheduler = Scheduler(
            self.context, self.cache, parallel=parallel, cuts=not windowed, speculator=speculator, prefill_share=share, **options
        )
        self.listeners: list[Listener] = []

    def arrive(self, prompt, limit=None, client="", priority=NORMAL, key=None, **values) -> Listener:
        listener = Listener(self.context)
        job = Job(len(self.listeners) + 1, listener, client=client, priority=priority, key=key, limit=limit, **values)
        job.arrived = float(len(self.listeners))
        job.ask(prompt)
        listener.job = job
        self.listeners.append(listener)
        self.scheduler.submit(job)
        return listener

    def step(self) -> None:
        self.scheduler.step()
        assert self.cache.used == self.context.used, "the count of cells is the real one"
        assert self.cache.used <= self.cache.size
        assert len(self.scheduler._running) <= self.scheduler.parallel

    def run(self, most: int = 20_000) -> None:
        steps = 0
        while not self.scheduler.idle:
            self.step()
            steps += 1
            assert steps < most, "it never ends"

    def expected(self, listener: Listener) -> tuple[list[int], str]:
        history, key = [int(t) for t in listener.job.tokens[: listener.job.prompt]], listener.job.key
        prompt = len(history)
        while listener.job.limit is None or len(history) - prompt < listener.job.limit:
            token = follows(tuple(history), key)
            if token is None:
                return history[prompt:], "stop"
            history.append(token)
            if len(history) > self.cache.size:
                break
        return history[prompt:], "length"

    def check_end(self) -> None:
        assert all(len(listener.ends) == 1 for listener in self.listeners), "every request ends exactly once"
        assert not self.scheduler._running and not self.cache._busy
        self.cache.forget()
        assert self.cache.used == self.context.used == 0, "no cell is lost"
        assert sorted(self.cache._numbers) == list(range(len(self.cache._numbers))) and not self.cache.spilled


PREFIXES = [tuple(range(20)), (*range(10), *range(30, 40)), (7,) * 15, (1,)]
prompts = st.builds(lambda prefix, rest: (*prefix, *rest), st.sampled_from(PREFIXES), st.lists(st.integers(0, VOCABULARY - 1), max_size=30))
arrivals = st.tuples(
    st.just("arrive"),
    prompts,
    st.one_of(st.none(), st.integers(0, 25)),
    st.sampled_from(["ann", "bob", "eve"]),
    st.sampled_from([NORMAL, NORMAL, NORMAL, LOW]),
    st.sampled_from([None, None, (("adapter", 1.0),)]),
)
actions = st.lists(
    st.one_of(arrivals, arrivals, st.tuples(st.just("step"), st.integers(1, 12)), st.tuples(st.just("cancel"), st.integers(0, 30))), max_size=40
)
worlds = st.fixed_dictionaries(
    {
        "cells": st.integers(56, 160),
        "parallel": st.integers(1, 5),
        "numbers": st.integers(6, 12),
        "spill": st.sampled_from([0, 60, 10_000]),
        "windowed": st.booleans(),
        "guess": st.booleans(),
        "share": st.sampled_from([0.2, 0.6, 0.9]),
    }
)


@settings(max_examples=250, deadline=None)
@given(worlds, actions)
def test_random_work_keeps_every_promise(options, work):
    world = World(**options)
    world.scheduler._pace = paced(lambda writing, share, most: min(most, 7 if writing else 20))
    cancelled = set()
    for action, *values in work:
        if action == "arrive":
            prompt, limit, client, priority, key = values
            world.arrive(prompt, 0 if priority == LOW else limit, client, priority, key)
        elif action == "step":
            for _ in range(values[0]):
                world.step()
        elif values[0] < len(world.listeners):
            cancelled.add(values[0])
            world.scheduler.cancel(values[0] + 1)
            world.step()
            assert world.listeners[values[0]].ends, "a cancel takes effect within one step"
    world.run()
    for number, listener in enumerate(world.listeners):
        text, reason = world.expected(listener)
        if listener.ends == ["cancelled"]:
            assert number in cancelled or listener.job.priority == LOW
            assert listener.written == text[: len(listener.written)]
        else:
            assert (listener.written, listener.ends) == (text, [reason])
    for client in ("ann", "bob", "eve"):
        begun = [x.started for x in world.listeners if x.job.client == client and x.job.priority == NORMAL and x.started is not None]
        assert begun == sorted(begun), "first come, first served"
    world.check_end()


# --- shared prefixes ----------------------------------------------------------------------------------------------------------------


def test_clients_with_one_system_prompt_compute_it_once():
    world = World(cells=400, parallel=8, numbers=16)
    system = tuple(n % VOCABULARY for n in range(100))
    world.listeners = [world.arrive((*system, n, n + 1), limit=5) for n in range(8)] and world.listeners
    world.run()
    assert world.scheduler.totals.prompt_tokens == 100 + 8 * 2
    assert sum(x.job.reused for x in world.listeners) == 7 * 100
    world.check_end()


def test_a_chat_that_goes_on_computes_what_is_new():
    world = World(cells=200)
    first = world.arrive(range(30), limit=10)
    world.run()
    second = world.arrive([*range(30), *first.written, 5, 6], limit=3)
    world.run()
    assert second.job.reused == 30 + len(first.written) - (0 if first.ends == ["stop"] else 1)
    again = world.arrive(range(30), limit=10)
    world.run()
    assert again.job.reused == 29 and again.written == first.written
    world.check_end()


def test_other_adapters_share_nothing():
    world = World(cells=200)
    plain = world.arrive(range(30), limit=5)
    world.run()
    adapted = world.arrive(range(30), limit=5, key=(("a", 1.0),))
    other = world.arrive(range(30), limit=5, key=(("a", 0.5),))
    world.run()
    assert adapted.job.reused == other.job.reused == 0
    assert plain.written != adapted.written
    assert {len(set(batch)) for batch in world.context.decodings} == {1}  # batched apart
    world.check_end()


def test_evicted_chats_come_back_from_main_memory():
    world = World(cells=100, parallel=1, numbers=4, spill=1000)
    chats = [tuple((n * 13 + i) % VOCABULARY for i in range(80)) for n in range(4)]
    for chat in chats:
        world.arrive(chat, limit=1)
        world.run()
    assert world.cache.evictions == 3 and world.cache.spilled == 3
    back = world.arrive((*chats[0], 1), limit=1)
    world.run()
    assert back.job.reused == 80 and world.cache.hits_memory == 1
    assert world.cache.spilled_bytes <= 1000
    world.check_end()


def test_who_writes_has_no_cells_of_finished_chats_beside_him():
    world = World(cells=400, parallel=1, numbers=8)
    chats = [tuple((n * 13 + i) % VOCABULARY for i in range(80)) for n in range(3)]
    for chat in chats:
        world.arrive(chat, limit=1)
        world.run()
    assert world.cache.spilled == 2 and world.cache.idle == 1  # the last one moved nobody when it ended
    back = world.arrive((*chats[0], 1), limit=1)
    world.run()
    assert back.job.reused == 80 and world.cache.hits_memory == 1
    world.check_end()


def test_nothing_is_dropped_from_main_memory_to_clear_the_way():
    world = World(cells=400, parallel=1, numbers=8, spill=500)
    for n in range(4):
        world.arrive([(n * 13 + i) % VOCABULARY for i in range(80)], limit=1)
        world.run()
    assert world.cache.spilled and world.cache.spilled + world.cache.idle == 4
    world.check_end()


def test_a_first_chat_too_large_for_main_memory_stays_in_cells():
    world = World(cells=400, parallel=1, numbers=8, spill=60)
    for n in range(2):
        world.arrive([(n * 13 + i) % VOCABULARY for i in range(80)], limit=1)
        world.run()
    assert world.cache.idle == 2 and not world.cache.evictions
    world.check_end()


def test_without_room_in_main_memory_they_are_computed_anew():
    world = World(cells=100, parallel=1, numbers=4, spill=0)
    for n in (0, 1, 0):
        world.arrive([(n * 13 + i) % VOCABULARY for i in range(80)], limit=1)
        world.run()
    assert world.scheduler.totals.prompt_tokens == 240 and world.cache.spilled == 0
    world.check_end()


def test_models_with_a_state_go_on_from_the_end_of_a_prompt():
    world = World(cells=200, windowed=True)
    first = world.arrive(range(40), limit=5)
    world.run()
    again = world.arrive(range(40), limit=5)
    world.run()
    assert again.job.reused == 39 and again.written == first.written
    longer = world.arrive([*range(40), *first.written, 9, 9], limit=5)
    world.run()
    assert longer.job.reused == 40 + len(first.written) - (first.ends == ["length"])
    elsewhere = world.arrive([*range(20), 9, 9], limit=5)
    world.run()
    assert elsewhere.job.reused == 0 and (elsewhere.written, elsewhere.ends[0]) == world.expected(elsewhere)
    world.check_end()


# --- places -------------------------------------------------------------------------------------------------------------------------


def test_two_that_do_not_fit_together_both_come_to_their_end():
    world = World(cells=64, parallel=2)
    one, two = world.arrive(range(20), limit=43, client="ann"), world.arrive(range(25, 45), limit=43, client="bob")
    world.run()
    for listener in (one, two):
        assert (listener.written, listener.ends[0]) == world.expected(listener)
    world.check_end()


def test_a_full_context_ends_its_own_reply(monkeypatch):
    monkeypatch.setitem(globals(), "follows", lambda history, key=None: len(history) % VOCABULARY)
    world = World(cells=64, parallel=2)
    world.arrive(range(60))
    short = world.arrive(range(10), limit=3)
    world.run()
    assert [len(x.written) for x in world.listeners] == [5, 3] and [x.ends for x in world.listeners] == [["length"], ["length"]]
    assert short.written == [10, 11, 12]
    world.check_end()


def test_a_flood_does_not_shut_the_door_on_others():
    world = World(max_queue=4, parallel=1)
    flood = [world.arrive([n, n + 1], limit=1, client="hog") for n in range(4)]
    guest = world.arrive([9, 9], limit=1, client="guest")
    assert isinstance(flood[-1].ends[0], Busy)
    with pytest.raises(Busy, match="4 requests are waiting") as busy:
        world.scheduler.submit(Job(99, Listener(world.context), client="hog"))
    assert busy.value.retry_after >= 1
    world.run()
    order = sorted((x for x in world.listeners if x.started is not None), key=lambda x: x.started)
    assert order[0] is flood[0] and guest in order and len(order) == 4


def test_places_go_to_who_has_fewer():
    world = World(cells=160, parallel=2)
    many = [world.arrive([n] * 20, limit=10, client="hog") for n in range(4)]
    guest = world.arrive([40] * 20, limit=10, client="guest")
    world.step()
    assert many[0].started is not None and guest.started is not None and many[1].started is None
    world.run()
    world.check_end()


def test_with_one_place_clients_take_turns():
    world = World(cells=160, parallel=1)
    many = [world.arrive([n] * 9, limit=2, client="hog") for n in range(4)]
    world.step()
    guest = world.arrive([40] * 9, limit=2, client="guest")
    world.run()
    assert many[0].started < guest.started < many[1].started
    world.check_end()


def test_positions_in_the_queue_are_told():
    world = World(parallel=1)
    waiting = [world.arrive([n, n], limit=8) for n in range(3)]
    world.step()
    assert [x.positions for x in waiting] == [[], [0], [1]]
    world.run()


def test_low_priority_gives_way_at_once_and_never_turns_anybody_away():
    world = World(cells=160, parallel=2)
    world.scheduler._pace = paced(lambda writing, share, most: 10)
    ahead = world.arrive(range(45), limit=0, priority=LOW)
    world.step()
    assert ahead.job.computed == 10
    real = world.arrive(range(45), limit=2)
    world.step()
    assert ahead.job.sequence is None and real.job.reused == 10
    world.run()
    assert ahead.ends == ["length"] and not ahead.written
    assert world.scheduler.totals.finished["length"] == 1
    for n in range(MAX_LOW + 3):
        world.arrive([n], limit=0, priority=LOW)
    assert sum(x.ends == ["cancelled"] for x in world.listeners) == 3
    world.run()
    world.check_end()


def test_a_step_of_low_priority_is_broken_off():
    world = World(cells=160)
    ahead = world.arrive(range(45), limit=0, priority=LOW)
    decode = world.context.decode

    def interrupted(rows, key, stop):
        if world.context.decodings == [] and len(world.listeners) == 1:
            assert not stop()
            world.arrive(range(25, 45), limit=1)
            assert stop()
        return decode(rows, key, stop)

    world.context.decode = interrupted
    world.step()
    assert ahead.job.computed == 0
    world.run()
    assert [x.ends for x in world.listeners] == [["length"], ["length"]]


def test_two_that_wait_for_each_other_do_not_wait_for_ever():
    world = World(cells=400, parallel=3)
    common = tuple(n % VOCABULARY for n in range(90))
    writer = world.arrive([3, 1], limit=200, client="b")
    while not writer.written:
        world.step()
    world.arrive((*common, 1), limit=2, client="b")
    world.arrive((*common, 2), limit=2, client="a")
    world.context.full = 1
    world.run(most=2000)
    world.check_end()


# --- a step -------------------------------------------------------------------------------------------------------------------------


def test_a_long_prompt_does_not_stop_who_writes():
    world = World(cells=400)
    world.scheduler._pace = paced(lambda writing, share, most: 6 if writing else most)
    writer = world.arrive([3, 1], limit=40)
    while not writer.written:
        world.step()
    world.arrive(range(200), limit=1)
    before = len(writer.written)
    for n in range(1, 5):
        world.step()
        assert len(writer.written) == before + n or writer.ends
    world.run()


def test_short_prompts_overtake_within_a_step():
    world = World(cells=400)
    world.scheduler._pace = paced(lambda writing, share, most: 20)
    long, short = world.arrive(range(200), limit=1), world.arrive([30, 31, 32], limit=1)
    world.step()
    assert short.written and long.job.computed == 17
    world.run()


@pytest.mark.parametrize(("length", "pieces"), [(235, [235]), (256, [192, 64]), (300, [192, 108]), (192, [192]), (500, [192, 192, 116])])
def test_alone_no_prompt_ends_in_a_piece_below_a_tile(length, pieces):
    world = World(cells=1000)
    world.context.batch_size = 512
    world.scheduler._pace = paced(lambda writing, share, most: min(most, 192))
    listener = world.arrive([n % VOCABULARY for n in range(length)], limit=1)
    read, found = 0, []
    while not listener.ends:
        world.step()
        found.append(listener.job.computed - read if listener.job.sequence else length - read)
        read = sum(found)
    assert found == pieces


def test_pace():
    pace = Pace()
    assert pace.piece(0, 0.5, 512) == 512 and pace.piece(2, 0.5, 512) == 64
    pace.saw(4, 0, 0.010)
    pace.saw(0, 100, 0.100)  # 1 ms a token
    assert pace.piece(4, 0.5, 512) == 10  # 20 ms in all, of which writing takes 10
    assert pace.piece(4, 0.9, 512) == 90 and pace.piece(4, 0.9, 50) == 50
    assert pace.piece(5, 0.5, 512) == 10  # the nearest that is known
    assert pace.piece(0, 0.5, 4096) == 1024  # a second, in whole tiles
    pace.saw(0, 1, 5.0)  # too small a piece tells nothing
    assert pace.piece(0, 0.5, 4096) == 1024
    pace.saw(4, 20, 0.030)  # what writing takes is not the prompt's
    assert pace.per_token == pytest.approx(0.001)


def test_where_more_wait_than_are_written_to_the_rest_of_their_prompts_is_read_at_once():
    world = World(cells=4000, parallel=8, numbers=20)
    world.context.batch_size = 600
    writer = world.arrive([1, 2], limit=50)
    while not writer.written:
        world.step()
    world.scheduler._pace = pace = Pace(0.001)
    pace.saw(1, 0, 0.010)
    readers = [world.arrive([10 + n, *range(50)], limit=50) for n in range(3)]
    world.step()
    assert all(reader.written for reader in readers)
    late = [world.arrive([20 + n, *range(50)], limit=50) for n in range(3)]  # as many are written to by now
    world.step()
    assert not all(reader.written for reader in late)
    world.run()


def test_a_crowd_of_readers_gets_more_of_the_time():
    assert share_of(0.6, 1, 4) == share_of(0.6, 4, 4) == share_of(0.6, 0, 0) == pytest.approx(0.6)
    assert share_of(0.5, 7, 1) == pytest.approx(7 / 8)


def test_probabilities_of_a_prompt_come_for_every_token():
    world = World(cells=100)
    listener = world.arrive(range(40), limit=2, reads_probabilities=True)
    world.run()
    assert listener.probabilities == [tuple(range(n)) for n in range(1, 41)]
    again = world.arrive(range(40), limit=2, reads_probabilities=True)
    world.run()
    assert again.job.reused == 0 and again.probabilities == listener.probabilities
    world.check_end()


def test_guesses_change_nothing_but_the_number_of_steps():
    plain, guessing = World(cells=300), World(cells=300, guess=True)
    for world in (plain, guessing):
        world.arrive(range(10), limit=60)
        world.run()
    a, b = plain.listeners[0], guessing.listeners[0]
    assert (a.written, a.ends) == (b.written, b.ends)
    assert 0 < b.job.accepted < b.job.drafted == guessing.scheduler.totals.draft_tokens
    assert guessing.scheduler.totals.steps < plain.scheduler.totals.steps
    guessing.check_end()


def test_a_failed_step_ends_its_own_jobs_only():
    world = World(cells=300, parallel=2)
    world.context.fail = ModelError("broken")
    first = world.arrive(range(10), limit=2)
    world.step()
    assert str(first.ends[0]) == "broken"
    world.context.fail = RuntimeError("a fault")
    second = world.arrive(range(10), limit=2)
    world.step()
    assert "The engine failed: a fault" in str(second.ends[0])
    third = world.arrive(range(10), limit=2)
    world.run()
    assert third.ends == ["length"] and world.scheduler.totals.finished == Counter(error=2, length=1)
    world.check_end()


def test_what_is_no_number_ends_one_reply_and_empties_the_cache():
    world = World(cells=300, parallel=2)
    healthy = world.arrive(range(20, 30), limit=20)
    while not healthy.written:
        world.step()
    spoilt = world.arrive(range(10), limit=5)
    choose = spoilt.choose

    def broken(output):
        choose(output)
        raise NotANumber("no number")

    spoilt.choose = broken
    while not spoilt.ends:
        world.step()
    assert str(spoilt.ends[0]) == "no number" and world.context.cleared and world.cache.used == 0
    world.run()
    assert (healthy.written, healthy.ends[0]) == world.expected(healthy)
    world.check_end()


def test_a_context_that_is_full_by_its_own_rules():
    world = World(cells=300, parallel=2)
    world.arrive(range(10), limit=2)
    world.run()
    world.context.full = 3
    one, two = world.arrive(range(20, 30), limit=3), world.arrive(range(30, 40), limit=3)
    world.run()
    assert one.ends == ["length"] or isinstance(one.ends[0], ModelError)
    assert two.ends[0] != [] and world.cache.evictions == 1
    world.check_end()


def test_images_are_computed_whole_and_shared_only_whole():
    world = World(cells=300)
    image = SimpleNamespace(start=5, length=8, n_positions=8, tokens=[-5, -6, -7, -8, -9, -10, -11, -12])
    prompt = [1, 2, 3, 4, 5, *image.tokens, 6, 7]

    def ask(tokens) -> Listener:
        listener = Listener(world.context)
        listener.job = Job(len(world.listeners) + 1, listener, limit=2)
        listener.job.ask(tokens, images=[image])
        world.listeners.append(listener)
        world.scheduler.submit(listener.job)
        world.run()
        return listener

    first, again = ask(prompt), ask(prompt)
    assert again.written == first.written and again.job.reused == 14
    image.tokens[-1] = -99
    other = ask([1, 2, 3, 4, 5, *image.tokens, 6, 7])
    assert other.job.reused == 5 and other.written != first.written
    world.check_end()


def test_positions_after_an_image_that_takes_fewer():
    job = Job(1, None)
    image = SimpleNamespace(start=2, length=4, n_positions=2)
    job.ask([1, 2, -1, -2, -3, -4], [0, 1, 2, 2, 2, 2], [image])
    job.append(7)
    job.append(8)
    assert list(job.positions) == [0, 1, 2, 2, 2, 2, 4, 5] and job.until_image() == 2


def test_chores_take_turns_with_steps():
    world = World(cells=300)
    done = []
    listener = world.arrive(range(5), limit=5)
    for n in range(3):
        world.scheduler.chore(lambda n=n: done.append((n, len(listener.written))))
    world.run()
    assert [n for n, _ in done] == [0, 1, 2] and done[0][1] < done[2][1]
    world.scheduler.chore(lambda: done.append("alone"))
    world.run()
    assert done[-1] == "alone"


# --- the cache ----------------------------------------------------------------------------------------------------------------------


def test_common_prefix_and_whole_images():
    a = np.array([1, 2, 3, 4])
    assert common_prefix(a, np.array([1, 2, 9])) == 2 and common_prefix(a, a[:2]) == 2 and common_prefix(a, a[:0]) == 0
    tokens = [1, -5, -6, 2]
    assert [whole_images(tokens, n) for n in range(5)] == [0, 1, 1, 3, 4]


def test_few_tokens_are_not_worth_a_restore():
    context = Context(100)
    cache = Cache(context, 100, 4, 1000)
    for start in (0, 10):
        sequence = cache.take(None, np.arange(start, start + 60), 59)
        context.sequences[sequence.id] = [(n, start + n, object()) for n in range(60)]
        assert cache.room(60)
        cache.extend(sequence, range(start, start + 60), range(60))
        cache.finish(sequence)
    assert cache.spilled == 1
    few = cache.take(None, np.arange(WORTH_RESTORING - 1), 90)
    assert few.length == 0 and cache.hits_memory == 0
    cache.drop(few)
    enough = cache.take(None, np.arange(WORTH_RESTORING), 90)
    assert enough.length == WORTH_RESTORING and cache.hits_memory == 1 and cache.spilled == 2  # its rest may be wanted again
