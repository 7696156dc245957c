"""The scripted backend."""

from __future__ import annotations

import math
import threading

import pytest

from modules.backends.base import CancelToken, GenerationRequest
from modules.backends.echo import LOADER, EchoBackend, words
from modules.errors import EngineDied, ModelError, NoModel, PromptError, PromptTooLong


def said(backend: EchoBackend, **values) -> str:
    return "".join(chunk.text for chunk in backend.generate(GenerationRequest(**values)))


def test_it_says_its_text_or_the_prompt():
    assert said(EchoBackend(words("One two  three ")), prompt="x") == "One two  three "
    assert said(EchoBackend(words("")), prompt="hello 🦊 there") == "hello 🦊 there"
    assert said(EchoBackend(words("")), prompt=tuple("né".encode())) == "né"
    pieces = [chunk.text for chunk in EchoBackend(words("One two")).generate(GenerationRequest("x"))]
    assert pieces == ["", "One", " two", ""]


def test_length_is_counted_in_bytes_and_cut_characters_are_replaced():
    chunks = list(EchoBackend(words("aé")).generate(GenerationRequest("x", max_new_tokens=2)))
    assert "".join(chunk.text for chunk in chunks) == "a\ufffd"
    assert (chunks[-1].finish_reason, chunks[-1].completion_tokens) == ("length", 2)
    chunks = list(EchoBackend(words("abcdef"), context_length=5).generate(GenerationRequest("xyz")))
    assert (chunks[-1].finish_reason, chunks[-1].completion_tokens) == ("length", 2)


def test_scripts_may_wait_and_are_cancelled_at_once():
    reached, token = threading.Event(), CancelToken()

    def script(request):
        yield "one"
        reached.set()
        assert request.cancel.wait(20)
        yield "never"

    request = GenerationRequest("x", cancel=token)
    threading.Thread(target=lambda: reached.wait(20) and token.cancel()).start()
    chunks = list(EchoBackend(script).generate(request))
    assert "".join(chunk.text for chunk in chunks) == "one" and chunks[-1].finish_reason == "cancelled"
    chunks = list(EchoBackend(words("a b c", delay=20)).generate(request))
    assert [chunk.finish_reason for chunk in chunks] == [None, "cancelled"]


def test_scripts_may_fail_and_engines_may_go():
    def script(_request):
        yield "one"
        raise EngineDied("gone")

    stream = EchoBackend(script).generate(GenerationRequest("x"))
    with pytest.raises(EngineDied, match="gone"):
        list(stream)
    backend = EchoBackend(words("one two"))
    stream = backend.generate(GenerationRequest("x"))
    assert [next(stream).text, next(stream).text] == ["", "one"]
    backend.unload()
    with pytest.raises(EngineDied):
        next(stream)
    with pytest.raises(NoModel):
        list(backend.generate(GenerationRequest("x")))
    assert not backend.alive() and backend.memory() == 0


def test_its_probabilities_are_made_up_and_always_the_same():
    echo = EchoBackend(words("abba"))
    entries = [entry for chunk in echo.generate(GenerationRequest("x", logprobs=30)) for entry in chunk.logprobs]
    assert [entry.text for entry in entries] == list("abba") and entries[0] == entries[3] and entries[0].logprob != entries[1].logprob
    every = EchoBackend(lambda _: ["".join(map(chr, range(128))) + "é"])
    for entry in (entry for chunk in every.generate(GenerationRequest("x", logprobs=30)) for entry in chunk.logprobs):
        values = [value for _, _, value in entry.top]
        assert values == sorted(values, reverse=True) and entry.logprob in values and 0.99 < sum(map(math.exp, values)) <= 1
        assert 25 <= len(values) == len({token for token, _, _ in entry.top})


def test_errors_name_the_fix():
    with pytest.raises(PromptTooLong, match=r"9 tokens.*holds 5"):
        said(EchoBackend(words("a"), context_length=5), prompt="123456789")
    with pytest.raises(PromptError, match="0 to 255"):
        EchoBackend(words("")).decode([256])


def test_the_loader_takes_echo_files(tmp_path):
    path = tmp_path / "parrot.echo"
    path.write_text("Polly wants\na cracker.\n")
    seen = []
    assert LOADER.detect(path) and not LOADER.detect(tmp_path) and not LOADER.detect(tmp_path / "x.gguf")
    backend = LOADER.load(path, LOADER.options.build({"word_delay": 0}), lambda fraction, _words: seen.append(fraction), CancelToken())
    assert said(backend, prompt="?") == "Polly wants\na cracker." and backend.name == "parrot" and seen == [1.0]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match="UTF-8"):
        LOADER.load(path, LOADER.options(), lambda _fraction, _words: None, CancelToken())
