"""What every backend must do, tried on each that is installed."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from modules.backends.base import Backend, CancelToken, Chunk, GenerationRequest
from modules.backends.echo import EchoBackend
from modules.errors import NoModel, PromptError, PromptTooLong, UserError
from modules.samplers import NEUTRAL

GREEDY = NEUTRAL.replace({"temperature": 0})
PROMPT = "Once upon a time there was a fox"
TEXTS = ["hello world", " leading", "two  spaces\n\nlines\t", "naïve café", "🦊👩‍👩‍👧 文字", "<|im_start|>user\nhi<|im_end|>", "a\0b", "\ud800", ""]


def _endless(request: GenerationRequest) -> Iterator[str]:
    while True:
        yield "word "


def _echo(_request: pytest.FixtureRequest) -> Backend:
    return EchoBackend(_endless, context_length=1024)


def _llama_cpp(request: pytest.FixtureRequest) -> Backend:
    pytest.importorskip("llama_cpp")
    from modules.backends.llama_cpp import LOADER

    options = LOADER.options.build({"ctx_size": 1024, "threads": 1, "threads_batch": 1})
    return LOADER.load(request.getfixturevalue("starter_model"), options, lambda _fraction, _words: None, CancelToken())


@pytest.fixture(scope="module", params=[_echo, pytest.param(_llama_cpp, marks=pytest.mark.engine)])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    made = request.param(request)
    yield made
    made.unload()


def run(backend: Backend, **values) -> list[Chunk]:
    return list(backend.generate(GenerationRequest(**{"prompt": PROMPT, "sampling": GREEDY, "max_new_tokens": 20, **values})))


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def test_what_it_says_of_itself(backend):
    assert backend.name and backend.context_length == 1024 and backend.alive() and backend.memory() >= 0
    assert isinstance(backend.features, frozenset) and isinstance(backend.bos_token, str)


def test_one_last_chunk_and_counts_that_add_up(backend):
    chunks = run(backend)
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"] and chunks[-1].finish_reason
    assert [chunk.timings is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].completion_tokens == 20 == sum(len(chunk.token_ids) for chunk in chunks)
    counts = [chunk.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert chunks[0].prompt_tokens == chunks[-1].prompt_tokens == len(backend.encode(PROMPT, add_bos=True))
    timings = chunks[-1].timings
    assert timings and timings.prefill_tokens + timings.reused_tokens == chunks[-1].prompt_tokens and timings.decode_seconds >= 0


def test_the_stream_is_the_text_of_its_tokens(backend):
    chunks = run(backend, sampling=GREEDY.replace({"skip_special_tokens": False}))
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    prompt = backend.encode(PROMPT, add_bos=True)
    assert backend.decode(prompt) + text_of(chunks) == backend.decode([*prompt, *tokens])


def test_prompts_may_be_tokens(backend):
    assert text_of(run(backend, prompt=tuple(backend.encode(PROMPT, add_bos=True)))) == text_of(run(backend))


@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_are_inverse(backend, text):
    assert backend.decode(backend.encode(text)) == text.encode("utf-8", "replace").decode()


def test_limits(backend):
    assert text_of(run(backend, max_new_tokens=0)) == "" and run(backend, max_new_tokens=0)[-1].finish_reason == "length"
    assert run(backend, max_new_tokens=1)[-1].completion_tokens == 1


def test_a_full_context_ends_with_length(backend):
    prompt = tuple(backend.encode("word " * 1200)[:1014])
    chunks = run(backend, prompt=prompt, max_new_tokens=None, sampling=GREEDY.replace({"ban_eos_token": True}))
    assert chunks[-1].finish_reason == "length" and 10 <= chunks[-1].completion_tokens <= 11


def test_a_prompt_too_long_names_both_numbers(backend):
    length = len(backend.encode("word " * 3000))
    with pytest.raises(PromptTooLong, match=rf"{length} tokens.*1024"):
        run(backend, prompt="word " * 3000)
    assert text_of(run(backend))


def test_unknown_tokens_are_refused(backend):
    for tokens in ([10**9], [-1], [2**40]):
        with pytest.raises(PromptError):
            backend.decode(tokens)
        with pytest.raises(UserError):
            run(backend, prompt=tuple(tokens))


def test_cancel_before_and_during(backend):
    token = CancelToken()
    token.cancel()
    assert run(backend, cancel=token, max_new_tokens=None)[-1].finish_reason == "cancelled"
    token = CancelToken()
    seen = []
    for chunk in backend.generate(GenerationRequest(PROMPT, GREEDY.replace({"ban_eos_token": True}), cancel=token)):
        seen.append(chunk)
        if chunk.completion_tokens >= 3:
            token.cancel()
    assert seen[-1].finish_reason == "cancelled" and seen[-1].completion_tokens < 100


def test_closing_early_frees_the_place(backend):
    stream = backend.generate(GenerationRequest(PROMPT, GREEDY.replace({"ban_eos_token": True})))
    while not next(stream).text:
        pass
    stream.close()
    assert run(backend)[-1].finish_reason == "length"


def test_requests_from_many_threads_do_not_mix(backend):
    wanted = {n: text_of(run(backend, max_new_tokens=5 + n)) for n in range(4)}
    got: dict[int, str] = {}

    def ask(n: int) -> None:
        got[n] = text_of(run(backend, max_new_tokens=5 + n))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == wanted


def test_after_unload_everything_says_so(backend):  # the last test of the module: the fixture's backend is gone
    stream = backend.generate(GenerationRequest(PROMPT, GREEDY.replace({"ban_eos_token": True})))
    next(stream)
    backend.unload()
    backend.unload()
    with pytest.raises(UserError):
        list(stream)
    with pytest.raises(NoModel):
        run(backend)
    assert not backend.alive()
