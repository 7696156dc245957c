import io
import threading
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules import log, text_generation
from modules.backends.base import CancelToken, Chunk, GenerationRequest
from modules.errors import EngineDied, NoModel
from modules.samplers import SamplingParams
from modules.text_generation import decode, encode, generate_reply, split_reply
from tests.fakes import FakeBackend, make_app, until


@pytest.fixture
def app(tmp_path, monkeypatch):
    made = make_app(tmp_path, monkeypatch)
    yield made
    made.close()


@pytest.fixture
def said():
    """The program's log while the test runs."""
    kept = log.logger.handlers[:], log.logger.level, log.logger.propagate
    stream = io.StringIO()
    log.setup(stream=stream)
    yield stream
    log.logger.handlers[:], log.logger.propagate = kept[0], kept[2]
    log.logger.setLevel(kept[1])  # forgets too which levels were found enabled


def test_raw_text_comes_through_and_the_end_is_logged(app, said):
    backend = app.models.backend
    backend.script = ["Hello", " <think>", "world"]
    chunks = list(generate_reply(app, GenerationRequest("prompt", seed=7, stop=("world",))))
    assert "".join(c.text for c in chunks) == "Hello <think>world"  # stop strings and thinking are of no concern here
    assert [c.finish_reason for c in chunks] == [None, None, None, "stop"]
    assert "(2.00 tokens/s, 3 tokens, context 9 of 2048, seed 7, stop)" in said.getvalue()
    assert "prompt" not in said.getvalue() and backend.closed == 1


def test_verbose_prints_prompt_and_parameters(tmp_path, monkeypatch, said):
    app = make_app(tmp_path, monkeypatch, "--verbose")
    list(generate_reply(app, GenerationRequest("the prompt", SamplingParams(top_k=3), seed=7, stop=("x",))))
    list(generate_reply(app, GenerationRequest((97, 98, 99))))
    app.close()
    text = said.getvalue()
    assert "Prompt:\nthe prompt" in text and "{'top_k': 3}, stop ['x'], seed 7" in text and "Prompt:\nabc" in text
    assert "Parameters: defaults" in text


def test_no_model(app):
    app.models.unload()
    with pytest.raises(NoModel):
        next(generate_reply(app, GenerationRequest("x")))
    for function in (encode, decode):
        with pytest.raises(NoModel):
            function(app, "")


def test_encode_and_decode(app):
    assert encode(app, "ab") == [97, 98] and decode(app, [97, 98]) == "ab"


def test_closing_frees_the_engine_and_the_lock(app, monkeypatch):
    backend = app.models.backend
    streams = []  # held here, so that only close() ends them
    generate = backend.generate
    monkeypatch.setattr(backend, "generate", lambda request: streams.append(generate(request)) or streams[-1])
    first = generate_reply(app, GenerationRequest("x"))
    next(first)
    assert (backend.at_once, backend.closed) == (1, 0)
    first.close()
    assert (backend.at_once, backend.closed) == (0, 1)
    assert len(list(generate_reply(app, GenerationRequest("x")))) == 3


def test_cancelled_while_waiting_for_the_lock(app):
    first = generate_reply(app, GenerationRequest("x"))
    next(first)
    request = GenerationRequest("y")
    got = []
    thread = threading.Thread(target=lambda: got.extend(generate_reply(app, request)), daemon=True)
    thread.start()
    until(lambda: len(app.models._current.turns._queue) == 2)
    request.cancel.cancel()
    thread.join(20)
    assert [c.finish_reason for c in got] == ["cancelled"] and len(app.models.backend.requests) == 1
    first.close()


def test_generations_take_turns(app):
    app.models.backend.script = list("abcdef")
    threads = [threading.Thread(target=lambda: list(generate_reply(app, GenerationRequest("x"))), daemon=True) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert app.models.backend.closed == 5 and app.models.backend.most_at_once == 1


def test_an_engine_that_dies_is_logged_as_cut_off_and_gives_the_lock_back(app, said):
    app.models.backend.error = EngineDied("dead")
    with pytest.raises(EngineDied):
        list(generate_reply(app, GenerationRequest("x")))
    assert "cut off" in said.getvalue()
    app.models.backend.error = None
    assert list(generate_reply(app, GenerationRequest("x")))[-1].finish_reason == "stop"


class Clock:
    """Time that passes only where somebody waits."""

    def __init__(self):
        self.now, self.waits = 100.0, []

    def monotonic(self):
        return self.now


class PacedToken(CancelToken):
    clock: Clock

    def wait(self, timeout):
        self.clock.waits.append(timeout)
        self.clock.now += timeout
        return False


def test_slowed_down_to_so_many_tokens_a_second(app, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(text_generation, "time", clock)
    token = PacedToken()
    token.clock = clock
    app.models.backend.script = list("abcdefgh")
    list(generate_reply(app, GenerationRequest("x", SamplingParams(max_tokens_second=4), cancel=token)))
    assert clock.now == pytest.approx(102.0)
    clock.waits.clear()
    list(generate_reply(app, GenerationRequest("x", cancel=token)))
    assert clock.waits == []


# --- split_reply --------------------------------------------------------------------------------------------------------------------


def split(texts, stop=(), prompt="", reason="stop"):
    request = GenerationRequest("x", stop=tuple(stop))
    chunks = [*(Chunk(text, completion_tokens=n) for n, text in enumerate(texts, 1)), Chunk(finish_reason=reason)]
    pieces = list(split_reply(iter(chunks), request, prompt))
    return "".join(p.text for p in pieces), "".join(p.reasoning for p in pieces), pieces[-1].chunk.finish_reason, request


@settings(max_examples=50)
@given(st.lists(st.integers(0, 60), max_size=10))
def test_answer_and_thinking_apart_however_the_text_is_cut(cuts):
    text = "<think>I wonder STOP</think>\n\nThe answer STOP never seen"
    places = sorted({0, *(min(c, len(text)) for c in cuts), len(text)})
    parts = [text[a:b] for a, b in pairwise(places)]
    answer, thinking, reason, request = split(parts, stop=["STOP"])
    assert (answer, thinking, reason) == ("The answer ", "I wonder STOP", "stop")
    assert request.cancel.cancelled


def test_no_stop_string_no_cancel():
    answer, thinking, reason, request = split(["a STO", "P? b"], stop=["STOPP"], reason="length")
    assert (answer, thinking, reason) == ("a STOP? b", "", "length") and not request.cancel.cancelled


def test_a_held_back_beginning_of_a_stop_string_is_text_at_the_end():
    assert split(["a STO"], stop=["STOP"])[:3] == ("a STO", "", "stop")


def test_a_stop_string_makes_a_cancelled_end_a_natural_one():
    assert split(["a STOP", " more", " and more"], stop=["STOP"], reason="cancelled")[:3] == ("a ", "", "stop")


def test_a_prompt_that_opens_thinking():
    assert split(["hm</think>yes"], prompt="...<think>\n")[:2] == ("yes", "hm")


def test_counts_go_through_with_their_pieces():
    request = GenerationRequest("x")
    pieces = list(split_reply(iter([Chunk(prefill_done=8, prompt_tokens=16), Chunk("a"), Chunk(finish_reason="stop")]), request, ""))
    assert [p.chunk.prefill_done for p in pieces] == [8, 0, 0] and len(pieces) == 3


def test_the_engine_stops_at_a_stop_string(app):
    backend = app.models.backend
    backend.script = ["a", " STOP", "b", "c", "d"]
    request = GenerationRequest("x", stop=("STOP",))
    pieces = list(split_reply(generate_reply(app, request), request, ""))
    assert "".join(p.text for p in pieces) == "a " and pieces[-1].chunk.finish_reason == "stop"
    assert pieces[-1].chunk.completion_tokens == 2 and backend.at_once == 0
    assert isinstance(backend, FakeBackend)
