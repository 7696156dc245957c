"""What every backend must do, tried on each that is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack

import pytest

from modules.backends.base import Backend, CancelToken, Chunk, GenerationRequest
from modules.backends.echo import EchoBackend
from modules.errors import NoModel, PromptError, PromptTooLong, UserError
from modules.samplers import NEUTRAL
from tests.backends import remote_help
from tests.backends.llama_cpp_help import NEAR_IN_STARTER, Task, differ, text_of

GREEDY = NEUTRAL.replace({"temperature": 0})
PROMPT = "Once upon a time there was a fox"
TEXTS = ["hello world", " leading", "two  spaces\n\nlines\t", "naïve café", "🦊👩‍👩‍👧 文字", "<|im_start|>user\nhi<|im_end|>", "a\0b", "\ud800", ""]


def _endless(request: GenerationRequest) -> Iterator[str]:
    while True:
        yield "word "


def _echo(_request: pytest.FixtureRequest) -> Backend:
    return EchoBackend(_endless, context_length=512)


def _slowly(request: GenerationRequest) -> Iterator[str]:
    """So slowly that a reply still comes when a test stops reading it."""
    for word in _endless(request):
        request.cancel.wait(0.01)
        yield word


def _llama_cpp(request: pytest.FixtureRequest) -> Backend:
    pytest.importorskip("llama_cpp")
    from modules.backends.llama_cpp import LOADER

    options = LOADER.options.build({"ctx_size": 512, "threads": 1, "threads_batch": 1})
    return LOADER.load(request.getfixturevalue("starter_model"), options, lambda _fraction, _words: None, CancelToken())


def _transformers(request: pytest.FixtureRequest) -> Backend:
    pytest.importorskip("transformers")
    from modules.backends.transformers import LOADER

    options = LOADER.options.build({"ctx_size": 512, "cpu": True})
    return LOADER.load(request.getfixturevalue("starter_model"), options, lambda _fraction, _words: None, CancelToken())


def _over_http(request: pytest.FixtureRequest, serve: AbstractContextManager[str]) -> Backend:
    """The model of a server that runs as long as the tests of this backend."""
    stack = ExitStack()
    request.addfinalizer(stack.close)
    return remote_help.connect(stack.enter_context(serve), server_context=512)


def _our_api(request: pytest.FixtureRequest) -> Backend:
    return _over_http(
        request, remote_help.our_api(lambda: EchoBackend(_slowly, context_length=512), request.getfixturevalue("tmp_path_factory").mktemp("api"))
    )


def _llama_cpp_server(request: pytest.FixtureRequest) -> Backend:
    pytest.importorskip("starlette_context")
    return _over_http(request, remote_help.llama_cpp_server(request.getfixturevalue("starter_model"), 512))


ENGINES = (_llama_cpp, _transformers, _llama_cpp_server)


@pytest.fixture(scope="module", params=[_echo, _our_api, *(pytest.param(engine, marks=pytest.mark.engine) for engine in ENGINES)])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    made = request.param(request)
    yield made
    made.unload()


def run(backend: Backend, **values) -> list[Chunk]:
    return list(backend.generate(GenerationRequest(**{"prompt": PROMPT, "sampling": GREEDY, "max_new_tokens": 20, **values})))


def test_what_it_says_of_itself(backend):
    assert backend.name and backend.context_length == 512 and backend.alive() and backend.memory() >= 0
    assert isinstance(backend.features, frozenset) and isinstance(backend.bos_token, str)
    assert "generate" in backend.features


def test_one_last_chunk_and_counts_that_add_up(backend):
    chunks = run(backend)
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"] and chunks[-1].finish_reason
    assert [chunk.timings is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].completion_tokens == 20
    assert "text-only" in backend.features or sum(len(chunk.token_ids) for chunk in chunks) == 20
    counts = [chunk.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert chunks[0].prompt_tokens == len(backend.encode(PROMPT, add_bos=True))
    assert "estimate" in backend.features or chunks[0].prompt_tokens == chunks[-1].prompt_tokens
    timings = chunks[-1].timings
    assert timings and timings.prefill_tokens + timings.reused_tokens == chunks[-1].prompt_tokens and timings.decode_seconds >= 0


def test_the_stream_is_the_text_of_its_tokens(backend):
    if "text-only" in backend.features:
        pytest.skip("it tells no tokens")
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
    prompt = tuple(backend.encode("word " * 600)[:502])
    chunks = run(backend, prompt=prompt, max_new_tokens=None, sampling=GREEDY.replace({"ban_eos_token": True}))
    assert chunks[-1].finish_reason == "length" and 10 <= chunks[-1].completion_tokens <= 11


def test_a_prompt_too_long_names_both_numbers(backend):
    length = len(backend.encode("word " * 3000))
    with pytest.raises(PromptTooLong, match=rf"{length} tokens.*512"):
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


def test_a_chunk_tells_one_thing_at_a_time_and_in_order(backend):
    """Waiting, then reading, then writing, then the end."""
    chunks = run(backend, client="somebody")
    kinds = ["end" if c.finish_reason else "writes" if c.token_ids else "waits" if c.queue_position is not None else "reads" for c in chunks]
    assert kinds == sorted(kinds, key=["waits", "reads", "writes", "end"].index)
    done = [chunk.prefill_done for chunk in chunks if chunk.prefill_done]
    assert done == sorted(done) and done[-1] == chunks[0].prompt_tokens


def test_probabilities(backend):
    if "logprobs" not in backend.features:
        pytest.skip("it has none")
    chunks = run(backend, logprobs=2, prompt_logprobs=1)
    found = [entry for chunk in chunks for entry in chunk.logprobs]
    assert [entry.token for entry in found] == [token for chunk in chunks for token in chunk.token_ids]
    assert all(len(entry.top) == 2 and entry.logprob <= entry.top[0][2] <= 0 for entry in found)
    prompt = backend.encode(PROMPT, add_bos=True)
    assert [entry.token for chunk in chunks for entry in chunk.prompt_logprobs] == prompt[1:]
    assert not any(chunk.logprobs or chunk.prompt_logprobs for chunk in run(backend))


def test_the_probabilities_of_the_chosen_tokens_alone(backend):
    if "logprobs" not in backend.features:
        pytest.skip("it has none")
    chunks, whole = run(backend, chosen_logprob=True, prompt_logprobs=0), run(backend, logprobs=2, prompt_logprobs=0)
    found = [entry for chunk in chunks for entry in chunk.logprobs]
    assert all(len(chunk.logprobs) == len(chunk.token_ids) for chunk in chunks) and not any(entry.top for entry in found)
    assert [entry.token for entry in found] == [token for chunk in chunks for token in chunk.token_ids]
    for one, other in zip(found, [entry for chunk in whole for entry in chunk.logprobs], strict=True):
        assert one.token == other.token and one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_prefill(backend):
    if "prefill" not in backend.features:
        pytest.skip("it cannot")
    request = GenerationRequest(PROMPT + " and a hen", GREEDY, max_new_tokens=2)
    assert backend.prefill(request) is None
    last = list(backend.generate(request))[-1]
    assert last.timings.reused_tokens == last.prompt_tokens - 1
    token = CancelToken()
    token.cancel()
    backend.prefill(GenerationRequest(PROMPT, cancel=token))


def test_embeddings(backend):
    if "embeddings" not in backend.features:
        pytest.skip("it makes none")
    found = backend.embed([PROMPT, "x", tuple(backend.encode(PROMPT, add_bos=True))], CancelToken())
    assert len(found.vectors) == 3 and len({len(vector) for vector in found.vectors}) == 1 and found.tokens > 3
    assert all(sum(value * value for value in vector) == pytest.approx(1, abs=1e-3) for vector in found.vectors)
    assert sum(a * b for a, b in zip(found.vectors[0], found.vectors[2], strict=True)) > 0.999


def test_stats(backend):
    if "stats" not in backend.features:
        pytest.skip("it has none")
    run(backend)
    stats = backend.stats()
    assert stats.parallel >= 1 and stats.busy_sequences <= stats.parallel and stats.cells_used <= stats.cells and stats.restarts == 0


def test_a_cancel_token_outlives_its_request(backend):
    token = CancelToken()
    run(backend, cancel=token)
    token.cancel()
    assert run(backend)[-1].finish_reason == "length"


def test_requests_from_many_threads_do_not_mix(backend):
    alternatives = 2 if "logprobs" in backend.features else 0
    prompts = [f"{PROMPT} number {n}" for n in range(6)]
    wanted = [run(backend, prompt=prompt, max_new_tokens=5 + n, logprobs=alternatives) for n, prompt in enumerate(prompts)]
    tasks = [Task(run, backend, prompt=prompt, max_new_tokens=5 + n) for n, prompt in enumerate(prompts)]
    for n, (alone, task) in enumerate(zip(wanted, tasks, strict=True)):
        among = task.result()
        assert among[-1].completion_tokens == 5 + n and among[-1].prompt_tokens == alone[-1].prompt_tokens
        assert not differ(alone, among, NEAR_IN_STARTER) if alternatives else text_of(alone) == text_of(among)


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
