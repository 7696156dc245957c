import threading
import time
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules import replies as replies_module
from modules.backends.base import CancelToken, Chunk, Timings
from modules.conversation import Message
from modules.errors import Busy, DataError, EngineDied, NotFound
from modules.replies import FINISHED_KEPT, Piece, Replies, Reply, Ring, Stats
from tests.fakes import WAIT, PlainPresenter, until


def seen_by(events, text=""):
    """The text a listener has after `events`."""
    for event in events:
        if event.type == "snapshot":
            text = event.data["text"]
        elif event.type == "update":
            text += event.data["new"]
    return text


class Saves(list):
    """What was saved, and the errors to raise at the next saves."""

    def __init__(self):
        super().__init__()
        self.errors = []

    def __call__(self, message):
        error = self.errors.pop(0) if self.errors else None
        if error:
            raise error
        self.append(message)


class Pieces:
    """Pieces given one by one by the test; ends when told, or when its reply is cancelled."""

    def __init__(self, cancel):
        self.cancel, self.items, self.condition, self.closed = cancel, [], threading.Condition(), False
        cancel.on_cancel(lambda: self.give(Piece(chunk=Chunk(finish_reason="cancelled")), None))

    def give(self, *items):
        with self.condition:
            self.items += items
            self.condition.notify_all()

    def say(self, *texts):
        self.give(*(Piece(text, chunk=Chunk(text, completion_tokens=1)) for text in texts))

    def end(self):
        self.give(Piece(chunk=Chunk(finish_reason="stop", timings=Timings(decode_seconds=1))), None)

    def __call__(self):
        while True:
            with self.condition:
                assert self.condition.wait_for(lambda: self.items, WAIT), "the test never gave a piece"
                item = self.items.pop(0)
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item


class Running:
    """A reply with everything around it that a test looks at."""

    def __init__(self, replies, owner="anna", conversation="c1", id="m1", text="", reasoning=""):
        self.replies, self.saves, self.presenter = replies, Saves(), PlainPresenter()
        message = Message(id, None, "assistant", text, reasoning, state="running", details={"seed": 5})
        self.reply = Reply(owner, conversation, message, 2048, self.presenter, CancelToken())
        self.pieces = Pieces(self.reply.cancel)

    def start(self):
        self.replies.start(self.reply, self.pieces, self.saves)
        return self

    def wait(self):
        assert self.reply.finished.wait(WAIT), "the reply never ended"
        return self.saves[-1] if self.saves else None


@pytest.fixture
def replies():
    made = Replies()
    yield made
    made.close(WAIT)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(replies_module, "PUBLISH_SECONDS", 0.0)


# --- the ring -----------------------------------------------------------------------------------------------------------------------


def test_a_ring_numbers_from_one_and_gives_what_comes_after():
    ring = Ring(3)
    assert ring.last == 0 and ring.after(0) == []
    for number in range(1, 4):
        ring.append("t", {"n": number})
    assert [e.id for e in ring.after(0)] == [1, 2, 3]
    assert [e.data["n"] for e in ring.after(2)] == [3]
    assert ring.after(3) == [] and ring.last == 3


def test_a_ring_says_when_something_was_missed_or_never_here():
    ring = Ring(3)
    for number in range(5):
        ring.append("t", {"n": number})
    assert ring.after(1) is None and [e.id for e in ring.after(2)] == [3, 4, 5]
    assert ring.after(6) is None and ring.after(10**9) is None and ring.after(-1) is None


@given(st.integers(1, 5), st.integers(0, 12), st.integers(-3, 15))
def test_a_ring_of_any_size(size, appended, after):
    ring = Ring(size)
    for number in range(1, appended + 1):
        ring.append("t", {"n": number})
    found = ring.after(after)
    wanted = list(range(after + 1, appended + 1))
    whole = 0 <= after <= appended and len(wanted) <= size
    assert (found is None) == (not whole)
    assert found is None or [e.id for e in found] == [e.data["n"] for e in found] == wanted


# --- stats --------------------------------------------------------------------------------------------------------------------------


def test_stats_grow_with_the_chunks():
    stats = Stats(context_length=100).seen(Piece(chunk=Chunk(prompt_tokens=40, prefill_done=16)), 0.5)
    assert (stats.prompt_tokens, stats.prefill_done, stats.tokens, stats.first_token_seconds) == (40, 16, 0, None)
    stats = stats.seen(Piece(chunk=Chunk("a", completion_tokens=1)), 1.0).seen(Piece(chunk=Chunk("b", completion_tokens=3)), 2.0)
    assert (stats.tokens, stats.first_token_seconds, stats.tokens_per_second, stats.prompt_tokens) == (3, 1.0, 2.0, 40)
    stats = stats.seen(Piece(chunk=Chunk(finish_reason="length", completion_tokens=3, timings=Timings(decode_seconds=0.5, reused_tokens=30))), 2.5)
    assert (stats.tokens_per_second, stats.reused_tokens, stats.finish_reason, stats.seconds) == (4.0, 30, "length", 2.5)


def test_one_token_has_no_speed():
    stats = Stats().seen(Piece(chunk=Chunk("a", completion_tokens=1)), 1.0).seen(Piece(chunk=Chunk(finish_reason="stop", completion_tokens=1)), 1.0)
    assert stats.tokens_per_second is None and stats.tokens == 1


# --- a reply's life -----------------------------------------------------------------------------------------------------------------


def test_the_whole_life_of_a_reply(replies, quick):
    run = Running(replies).start()
    run.pieces.say("Hel", "lo")
    until(lambda: run.reply.message.text == "Hello")
    assert run.reply.message.state == "running"
    run.pieces.end()
    final = run.wait()
    assert (final.text, final.state, final.details["seed"]) == ("Hello", "done", 5)
    assert final.details["stats"]["finish_reason"] == "stop" and "error" not in final.details
    assert run.reply.message == final
    events = run.reply.ring.after(0)
    assert [e.type for e in events] == ["update"] * (len(events) - 1) + ["end"]
    assert events[-2].data["final"] and not any(e.data["final"] for e in events[:-2])
    assert seen_by(events) == "Hello" and events[-1].data == {"text": "Hello", "state": "done", "error": None}


def test_a_continued_message_goes_on_from_what_it_has(replies):
    run = Running(replies, text="Once", reasoning="hm").start()
    run.pieces.say(" upon")
    run.pieces.end()
    final = run.wait()
    assert (final.text, final.reasoning) == ("Once upon", "hm")
    assert run.reply.snapshot().data == {"text": "Once upon"}


def test_thinking_is_kept_apart(replies):
    run = Running(replies).start()
    run.pieces.give(Piece("", "think"), Piece("ing?", "ing"), Piece(" yes", ""))
    run.pieces.end()
    assert (run.wait().text, run.wait().reasoning) == ("ing? yes", "thinking")


def test_the_first_update_comes_at_once_and_the_next_are_gathered(replies, monkeypatch):
    monkeypatch.setattr(replies_module, "PUBLISH_SECONDS", 3600.0)
    run = Running(replies).start()
    run.pieces.say("a")
    until(lambda: run.reply.ring.last == 1)
    run.pieces.say(*"bcdefgh")
    until(lambda: not run.pieces.items)
    assert run.reply.ring.last == 1
    run.pieces.end()  # the end does not wait
    run.wait()
    assert [e.data.get("new") for e in run.reply.ring.after(0)] == ["a", "bcdefgh", None]


def test_updates_are_no_closer_than_promised(replies):
    times = []
    run = Running(replies)
    update = run.presenter.update
    run.presenter.update = lambda stats, final: (times.append((time.monotonic(), final)), update(stats, final))[1]
    began = time.monotonic()
    run.start()
    until(lambda: (run.pieces.say("x"), len(times) >= 5)[1])
    run.pieces.end()
    run.wait()
    regular = [when for when, final in times if not final]
    assert regular[-1] - began >= (len(regular) - 1) * replies_module.PUBLISH_SECONDS
    assert len(run.saves[-1].text) > len(times)


def test_saved_at_once_then_at_most_once_a_second_then_at_the_end(replies, quick, monkeypatch):
    monkeypatch.setattr(replies_module, "SAVE_SECONDS", 3600.0)
    run = Running(replies).start()
    run.pieces.say("a")
    until(lambda: run.saves)
    assert (run.saves[0].text, run.saves[0].state) == ("a", "running")
    for number in range(2, 6):
        run.pieces.say("b")
        until(lambda n=number: run.reply.ring.last >= n)
    assert len(run.saves) == 1
    run.pieces.end()
    assert run.wait().text == "abbbb" and len(run.saves) == 2


def test_what_came_last_is_saved_though_nothing_comes_after_it(replies, quick, monkeypatch):
    monkeypatch.setattr(replies_module, "SAVE_SECONDS", 0.05)
    run = Running(replies).start()
    run.pieces.say("a")
    until(lambda: run.saves)
    run.pieces.say("b")
    until(lambda: run.saves[-1].text == "ab")
    assert run.saves[-1].state == "running"
    count = len(run.saves)
    time.sleep(0.15)  # time for saves that must not come: nothing changed
    assert len(run.saves) == count
    run.pieces.end()
    run.wait()


def test_a_failed_engine_keeps_what_it_said_and_says_why(replies):
    run = Running(replies).start()
    run.pieces.say("half")
    run.pieces.give(EngineDied("The engine ended. Send again."))
    final = run.wait()
    assert (final.text, final.state, final.details["error"]) == ("half", "failed", "The engine ended. Send again.")
    assert run.reply.ring.after(0)[-1].data["error"] == "The engine ended. Send again."
    assert run.reply.message.state == "failed"


def test_an_error_that_nobody_foresaw_ends_the_reply_without_its_secrets(replies):
    run = Running(replies).start()
    run.pieces.give(ZeroDivisionError("/home/anna/secret"))
    final = run.wait()
    assert final.state == "failed" and "ZeroDivisionError" in final.details["error"] and "secret" not in final.details["error"]


def test_stop_keeps_what_was_said(replies, quick):
    run = Running(replies).start()
    run.pieces.say("half")
    until(lambda: run.reply.ring.last)
    replies.stop("anna", "m1")
    assert (run.wait().text, run.wait().state) == ("half", "stopped")
    replies.stop("anna", "m1")


def test_a_reply_that_ended_by_itself_just_before_the_stop_is_done(replies):
    run = Running(replies)
    run.pieces.say("all")
    run.pieces.end()
    run.reply.produce(run.pieces)
    run.reply.cancel.cancel()
    run.reply.publish(run.saves, lambda: None, threading.Event())
    assert run.saves[-1].state == "done"


def test_a_chat_deleted_meanwhile_stops_its_reply_quietly(replies, quick, caplog, monkeypatch):
    monkeypatch.setattr(replies_module.logger, "propagate", True)
    run = Running(replies)
    run.saves.errors = [NotFound("gone")] * 9
    run.start()
    run.pieces.say("a")
    run.wait()
    assert run.reply.cancel.cancelled and not run.saves
    assert run.reply.ring.after(0)[-1].data["error"] is None and not caplog.records


@pytest.mark.parametrize("error", [DataError("The disk is full."), Busy("No connection came free.")])
def test_a_save_that_fails_is_tried_again(error, replies, quick, monkeypatch):
    monkeypatch.setattr(replies_module, "SAVE_SECONDS", 0.01)
    run = Running(replies)
    run.saves.errors = [error, error]
    run.start()
    run.pieces.say("a")
    until(lambda: run.saves)
    assert not run.reply.finished.is_set()
    run.pieces.end()
    assert run.wait().state == "done"


@pytest.mark.parametrize("error", [DataError("The disk is full."), Busy("No connection came free.")])
def test_a_last_save_that_fails_is_told_and_tried_again(error, replies, monkeypatch):
    monkeypatch.setattr(replies_module, "SAVE_RETRY_SECONDS", (0.01, 0.01, 0.01))
    run = Running(replies)
    run.pieces.end()
    run.saves.errors = [error, error]
    run.start()
    final = run.wait()
    assert final.state == "done" and "error" not in final.details
    assert run.reply.ring.after(0)[-1].data["error"] == f"This reply is not saved yet. {error}"


def test_saving_is_given_up_in_the_end_but_the_text_is_still_there(replies, monkeypatch):
    monkeypatch.setattr(replies_module, "SAVE_RETRY_SECONDS", (0.01, 0.01))
    run = Running(replies)
    run.saves.errors = [DataError("full")] * 50
    run.start()
    run.pieces.say("all")
    run.pieces.end()
    run.wait()
    assert not run.saves and replies.now(Message("m1", None, "assistant", "")).text == "all"


def test_closing_gives_the_last_chance_to_save(monkeypatch):
    monkeypatch.setattr(replies_module, "SAVE_RETRY_SECONDS", (3600.0, 3600.0))
    replies = Replies()
    run = Running(replies)
    run.pieces.end()
    run.saves.errors = [DataError("full")]
    run.start()
    until(lambda: run.reply.ring.last == 2)
    replies.close(WAIT)
    assert run.reply.finished.is_set() and run.saves[-1].state == "done"


@pytest.mark.parametrize("text", ["deep", "very deep"])
def test_a_reply_that_cannot_be_shown_does_not_block_its_chat(text, replies, quick):
    run = Running(replies)
    run.presenter.fail_in = "deep"
    run.start()
    run.pieces.say("so ", text)
    final = run.wait()
    assert final.state == "failed" and final.text.startswith("so ") and "could not be shown" in final.details["error"]
    assert run.reply.cancel.cancelled
    until(lambda: [event.type for event in replies.news("anna").after(0)] == ["conversation", "changed"])  # what a page lacks, it reads
    with replies.starting("anna", "c1"):
        pass


# --- listeners ----------------------------------------------------------------------------------------------------------------------


def test_many_listeners_hear_the_same(replies, quick):
    run = Running(replies)
    heard = [[] for _ in range(5)]
    news = [threading.Event() for _ in heard]
    stops = [replies.listen("anna", event.set) for event in news]

    def follow(mine, event):
        while not (mine and mine[-1].type == "end"):
            assert event.wait(WAIT)
            event.clear()
            mine += run.reply.ring.after(mine[-1].id if mine else 0)

    threads = [threading.Thread(target=follow, args=pair, daemon=True) for pair in zip(heard, news, strict=True)]
    for thread in threads:
        thread.start()
    run.start()
    for letter in "abcdef":
        run.pieces.say(letter)
    run.pieces.end()
    run.wait()
    for thread in threads:
        thread.join(WAIT)
    assert all(mine == heard[0] for mine in heard) and seen_by(heard[0]) == "abcdef"
    for stop in stops:
        stop()
    assert replies._wakes == {}
    stops[0]()


def test_resume_and_snapshot_beyond_the_ring(replies, quick):
    run = Running(replies)
    run.reply.ring = Ring(4)
    run.start()
    text = ""
    for number in range(1, 11):
        run.pieces.say(str(number))
        text += str(number)
        until(lambda n=number: run.reply.ring.last >= n)
    assert run.reply.ring.after(2) is None
    snapshot = run.reply.snapshot()
    assert (snapshot.id, snapshot.type, snapshot.data["text"]) == (10, "snapshot", text)
    run.pieces.say("!", "?")
    run.pieces.end()
    run.wait()
    later = run.reply.ring.after(snapshot.id)
    assert later is not None and seen_by([snapshot, *later]) == text + "!?"
    resumed = run.reply.ring.after(later[0].id)
    assert [e.id for e in resumed] == [e.id for e in later[1:]]


def test_listeners_are_woken_for_their_owner_only(replies):
    woken = []
    replies.listen("anna", lambda: woken.append("anna"))
    replies.listen("bert", lambda: woken.append("bert"))
    replies.tell("anna", "changed", {"x": 1})
    assert woken == ["anna"] and replies.news("anna").after(0)[0].data == {"x": 1} and replies.news("bert").last == 0
    replies.wake()
    assert sorted(woken) == ["anna", "anna", "bert"]


def test_news_of_owners_long_gone_are_forgotten(replies, monkeypatch):
    monkeypatch.setattr(replies_module, "OWNERS_KEPT", 3)
    for number in range(5):
        replies.tell(str(number), "x", {})
    assert list(replies._news) == ["2", "3", "4"]


# --- all replies --------------------------------------------------------------------------------------------------------------------


def test_nobody_reaches_the_reply_of_another(replies, quick):
    run = Running(replies).start()
    assert replies.get("bert", "m1") is None and replies.get("anna", "m1") is run.reply and replies.get("anna", "m2") is None
    with pytest.raises(NotFound):
        replies.stop("bert", "m1")
    assert not run.reply.cancel.cancelled
    run.pieces.end()
    run.wait()


def test_one_turn_at_a_time_in_a_chat(replies):
    with replies.starting("anna", "c1"):
        with pytest.raises(Busy), replies.starting("anna", "c1"):
            pass
        with replies.starting("anna", "c2"), replies.starting("bert", "c1"):
            pass
    run = Running(replies).start()
    assert replies.running("c1") == (run.reply,) and replies.running("c2") == ()
    with pytest.raises(Busy, match="Wait for its end, or stop it"), replies.starting("anna", "c1"):
        pass
    run.pieces.end()
    run.wait()
    assert replies.running("c1") == ()
    with pytest.raises(ZeroDivisionError), replies.starting("anna", "c1"):
        raise ZeroDivisionError
    with replies.starting("anna", "c1"):
        pass


def test_now_is_ahead_of_what_was_saved_and_keeps_the_state(replies, quick):
    run = Running(replies).start()
    saved = run.reply.message
    run.pieces.say("new")
    until(lambda: run.reply.ring.last)
    assert replies.now(saved).text == "new"
    run.pieces.give(EngineDied("Dead."))
    run.wait()
    assert (replies.now(saved).state, replies.now(saved).details["error"]) == ("failed", "Dead.")
    other = replace(saved, id="other")
    assert replies.now(other) is other


def test_only_so_many_finished_replies_are_kept(replies):
    for number in range(FINISHED_KEPT + 10):
        run = Running(replies, id=str(number), conversation=str(number))
        run.pieces.end()
        run.start().wait()
    assert len(replies._replies) <= FINISHED_KEPT + 1
    assert replies.get("anna", "0") is None and replies.get("anna", str(FINISHED_KEPT + 9))


def test_close_stops_and_saves_all():
    replies = Replies()
    runs = [Running(replies, id=str(n), conversation=str(n)).start() for n in range(5)]
    for run in runs:
        run.pieces.say("half")
    replies.close(WAIT)
    assert all(run.reply.finished.is_set() for run in runs)
    assert [(run.saves[-1].text, run.saves[-1].state) for run in runs] == [("half", "stopped")] * 5
    with pytest.raises(Busy, match="shutting down"):
        Running(replies, id="late").start()


def test_close_does_not_wait_for_ever():
    replies = Replies()
    run = Running(replies)
    release = threading.Event()

    def deaf():
        release.wait(WAIT)
        yield Piece("late")

    replies.start(run.reply, deaf, run.saves)
    began = time.monotonic()
    replies.close(0.05)
    assert time.monotonic() - began < WAIT / 2 and not run.reply.finished.is_set()
    release.set()
    run.wait()


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=60), st.lists(st.integers(0, 60), max_size=12), st.booleans())
def test_any_cutting_of_the_text_gives_the_same_message(text, cuts, thinking):
    places = sorted({0, *(min(c, len(text)) for c in cuts), len(text)})
    parts = [text[a:b] for a, b in pairwise(places)]
    replies = Replies()
    run = Running(replies)
    run.pieces.give(*(Piece("", part) if thinking else Piece(part) for part in parts))
    run.pieces.end()
    run.start()
    final = run.wait()
    assert (final.reasoning if thinking else final.text) == text and final.state == "done"
    assert thinking or seen_by(run.reply.ring.after(0)) == text
