import logging
import threading
import time

import pytest

from modules.ahead import Ahead
from modules.backends.base import GenerationRequest
from modules.errors import PromptTooLong
from tests.fakes import WAIT, FakeBackend, until


@pytest.fixture
def backend():
    made = FakeBackend(features=frozenset({"prefill"}))
    yield made
    made.unload()


@pytest.fixture
def ahead():
    made = Ahead()
    yield made
    made.close()


def prompt(backend, *tokens):
    """Something to compute: these tokens."""
    return lambda cancel: (backend, GenerationRequest(tokens, cancel=cancel))


def done(backend):
    return [request.prompt for request in backend.prefilled]


def idle(ahead):
    until(lambda: ahead.busy == 0)


def test_a_prompt_is_computed_and_the_thread_ends(ahead, backend):
    assert ahead.start("anna", prompt(backend, 1, 2))
    idle(ahead)
    assert done(backend) == [(1, 2)]
    until(lambda: not any(thread.name == "ahead-anna" for thread in threading.enumerate()))


def test_a_newer_one_takes_the_place_of_the_older_ones(ahead, backend):
    backend.hold_prefills()
    ahead.start("anna", prompt(backend, 1))
    until(lambda: backend.prefills)
    backend.hold_prefills(deaf=True)  # so that the first cannot end before the third is there
    ahead.start("anna", prompt(backend, 1, 2))
    ahead.start("anna", prompt(backend, 1, 2, 3))
    assert backend.prefills[0].cancel.cancelled
    backend.hold_prefills(False)
    idle(ahead)
    assert [request.prompt for request in backend.prefills] == [(1,), (1, 2, 3)] and done(backend) == [(1, 2, 3)]


def test_each_session_has_its_own(ahead, backend):
    backend.hold_prefills()
    ahead.start("anna", prompt(backend, 1))
    ahead.start("bert", prompt(backend, 2))
    until(lambda: len(backend.prefills) == 2)
    assert not any(request.cancel.cancelled for request in backend.prefills)
    ahead.cancel("anna")
    ahead.cancel("nobody")
    backend.hold_prefills(False)
    idle(ahead)
    assert done(backend) == [(2,)]


def test_beyond_the_bound_nothing_happens(backend):
    ahead = Ahead(most=2)
    backend.hold_prefills()
    assert [ahead.start(name, prompt(backend, number)) for number, name in enumerate("abc")] == [True, True, False]
    assert ahead.start("a", prompt(backend, 7)), "one that has its place keeps it"
    assert ahead.busy == 2
    backend.hold_prefills(False)
    idle(ahead)
    assert ahead.start("c", prompt(backend, 8))
    idle(ahead)
    assert (2,) not in done(backend) and (7,) in done(backend) and (8,) in done(backend)


def test_cancelling_returns_at_once_though_the_engine_hangs(ahead, backend):
    backend.hold_prefills(deaf=True)
    ahead.start("anna", prompt(backend, 1))
    until(lambda: backend.prefills)
    ahead.cancel("anna")
    assert backend.prefills[0].cancel.cancelled and ahead.busy == 1
    backend.hold_prefills(False)
    idle(ahead)
    assert done(backend) == []


def test_what_waits_is_cancelled_too(ahead, backend):
    backend.hold_prefills(deaf=True)
    ahead.start("anna", prompt(backend, 1))
    until(lambda: backend.prefills)
    ahead.start("anna", prompt(backend, 2))
    ahead.cancel("anna")
    backend.hold_prefills(False)
    idle(ahead)
    assert len(backend.prefills) == 1


def test_one_cancelled_while_it_is_prepared_is_not_begun(ahead, backend):
    preparing, go = threading.Event(), threading.Event()

    def prepare(cancel):
        preparing.set()
        assert go.wait(WAIT)
        return prompt(backend, 1)(cancel)

    ahead.start("anna", prepare)
    assert preparing.wait(WAIT)
    ahead.cancel("anna")
    go.set()
    idle(ahead)
    assert backend.prefills == []


def test_the_same_prompt_twice_running_is_computed_once(ahead, backend):
    for tokens in ((1, 2), (1, 2), (1, 2, 3), (1, 2)):
        ahead.start("anna", prompt(backend, *tokens))
        idle(ahead)
    assert done(backend) == [(1, 2), (1, 2, 3), (1, 2)]
    ahead.start("bert", prompt(backend, 1, 2))
    idle(ahead)
    ahead.cancel("bert")  # a reply may have pushed it out of the cache
    ahead.start("bert", prompt(backend, 1, 2))
    idle(ahead)
    assert done(backend)[3:] == [(1, 2), (1, 2)]
    other = FakeBackend()
    ahead.start("bert", prompt(other, 1, 2))
    idle(ahead)
    assert done(other) == [(1, 2)]


def test_one_that_was_cancelled_may_be_computed_again(ahead, backend):
    backend.hold_prefills()
    ahead.start("anna", prompt(backend, 1))
    until(lambda: backend.prefills)
    ahead.start("anna", prompt(backend, 1))
    until(lambda: len(backend.prefills) == 2)
    backend.hold_prefills(False)
    idle(ahead)
    assert done(backend) == [(1,)]


def test_errors_are_told_to_nobody(ahead, backend, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("tgw"), "propagate", True)
    caplog.set_level(logging.DEBUG, "tgw")

    def too_long(cancel):
        raise PromptTooLong("It is too long.")

    def broken(cancel):
        raise ZeroDivisionError

    for prepare in (too_long, lambda cancel: None, broken):
        assert ahead.start("anna", prepare)
        idle(ahead)
    assert [(r.levelname, bool(r.exc_info)) for r in caplog.records] == [("DEBUG", False), ("ERROR", True)]
    assert ahead.start("anna", prompt(backend, 1)), "the session is free again"
    idle(ahead)
    assert done(backend) == [(1,)]


def test_closing_ends_everything(ahead, backend):
    backend.hold_prefills()
    for name in ("anna", "bert"):
        ahead.start(name, prompt(backend, 1))
    until(lambda: len(backend.prefills) == 2)
    ahead.close()
    assert ahead.busy == 0 and all(request.cancel.cancelled for request in backend.prefills)
    assert not ahead.start("anna", prompt(backend, 1))
    ahead.cancel("anna")
    ahead.close()
    assert len(backend.prefills) == 2 and done(backend) == []


def test_closing_does_not_wait_for_an_engine_that_hangs(ahead, backend):
    backend.hold_prefills(deaf=True)
    ahead.start("anna", prompt(backend, 1))
    until(lambda: backend.prefills)
    began = time.monotonic()
    ahead.close(seconds=0.1)
    assert time.monotonic() - began < WAIT / 4 and ahead.busy == 1
    backend.unload()
    idle(ahead)
