"""Many requests on one real engine: each gets what it gets alone, nobody waits for ever, and what is known is not computed again.

The models are tiny ones made here (`tiny_models.py`): what they write depends on every token before, so a cell that is lost or somebody else's shows.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modules.backends.base import Adapter, CancelToken, Chunk, GenerationRequest
from modules.backends.llama_cpp.cache import WORTH_RESTORING
from modules.backends.llama_cpp.client import LlamaCppBackend, _asked
from modules.errors import Busy, ModelError, PromptError, PromptTooLong, SettingsError
from modules.samplers import NEUTRAL
from tests.backends.llama_cpp_help import (
    CHAT,
    ENDLESS,
    NEAR,
    NEAR_IN_STARTER,
    Stream,
    Task,
    dice,
    differ,
    load,
    of_prompt,
    request,
    reused,
    run,
    text_of,
    tokens_of,
    wait_for,
)

pytest.importorskip("gguf")

from tests.backends import tiny_models

pytestmark = pytest.mark.engine

UNCUTTABLE = ("sliding_window", "recurrent", "hybrid", "short_convolution")
WORDS = ("the", "and", "you", "is", "to", "of", "in", "user", "assistant", "system", "hello", "one", "two", "three", "why", "water", "name")


def words(count: int, seed: int = 0) -> str:
    """So many words, the same ones for the same seed."""
    chosen = random.Random(seed)
    return " ".join(chosen.choice(WORDS) for _ in range(count))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a tiny model, or gives the one made before."""
    folder = tmp_path_factory.mktemp("models")

    def make(kind: str, **values) -> Path:
        path = folder / f"{kind}{values.get('seed', '')}.gguf"
        return path if path.exists() else getattr(tiny_models, kind)(path, **values)

    return make


@pytest.fixture(scope="module")
def dense(tiny: Callable[..., Path]) -> Iterator[LlamaCppBackend]:
    made = load(tiny("dense"), parallel=4, max_queue=8, ctx_size=8192)
    yield made
    made.unload()


@pytest.fixture(scope="module")
def starter(starter_model: Path) -> Iterator[LlamaCppBackend]:
    made = load(starter_model, parallel=4)
    yield made
    made.unload()


def alone(path: Path, prompts: list[str], sampling=ENDLESS, **values) -> list[list[Chunk]]:
    """What each of `prompts` gets when nobody else is there and nothing is known of it: with `prompt_logprobs` a prompt is computed whole."""
    backend = load(path, parallel=1, cache_ram=0)
    try:
        found = [run(backend, prompt, sampling, logprobs=2, prompt_logprobs=0, **values) for prompt in prompts]
    finally:
        backend.unload()
    assert not any(map(reused, found))
    return found


def assert_same(wanted: list[list[Chunk]], got: list[list[Chunk]], near: float = NEAR) -> None:
    faults = {number: differ(*pair, near) for number, pair in enumerate(zip(wanted, got, strict=True))}
    assert not any(faults.values()), {number: fault for number, fault in faults.items() if fault}


# --- many at once -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", *UNCUTTABLE])
def test_many_at_once_get_what_each_gets_alone(tiny, kind):
    prompts = [f"{n} {words(10 + 13 * n, n)}" for n in range(10)]
    wanted = alone(tiny(kind), prompts)
    backend = load(tiny(kind), parallel=4)
    try:
        for _ in range(2):  # the second time from the cache
            tasks = [Task(run, backend, prompt, ENDLESS) for prompt in prompts]
            assert_same(wanted, [task.result() for task in tasks])
    finally:
        backend.unload()


def test_many_at_once_with_the_starter(starter):
    prompts = [CHAT.format(f"Write one sentence about {thing}.") for thing in ("foxes", "rain", "the sea", "bread", "Paris", "winter")]
    wanted = [run(starter, prompt, logprobs=2, max_new_tokens=16) for prompt in prompts]
    tasks = [Task(run, starter, prompt, max_new_tokens=16) for prompt in prompts]
    assert_same(wanted, [task.result() for task in tasks], NEAR_IN_STARTER)


def test_probabilities_stay_ones_own_among_others(dense):
    prompt = words(80, 5)
    wanted = run(dense, prompt, logprobs=3, prompt_logprobs=2)
    others = [Stream(dense, request(words(50, n), ENDLESS, max_new_tokens=None)).writes() for n in range(2)]
    got = run(dense, prompt, logprobs=3, prompt_logprobs=2)
    for other in others:
        other.stop()
    assert not differ(wanted, got)
    for one, two in zip(of_prompt(wanted), of_prompt(got), strict=True):
        assert one.token == two.token and one.logprob == pytest.approx(two.logprob, abs=NEAR)


def test_drawn_tokens_repeat_by_seed_beside_others(dense):
    four = dice(dense.encode("abcd"))
    wanted = [text_of(run(dense, "hello water", NEUTRAL, seed=seed, logit_bias=four)) for seed in range(4)]
    tasks = [Task(run, dense, "hello water", NEUTRAL, seed=seed, logit_bias=four) for seed in range(4)]
    assert [text_of(task.result()) for task in tasks] == wanted and len(set(wanted)) == 4


def test_a_long_prompt_stops_nobody(starter):
    writing = Stream(starter, request("Once", ENDLESS, max_new_tokens=None)).writes()
    long = Stream(starter, request("A long story of hens. " * 60, max_new_tokens=1))
    long.result()
    writing.stop()
    reports = [at for at, chunk in zip(long.times, long.chunks, strict=True) if chunk.prefill_done]
    written = [at for at, chunk in zip(writing.times, writing.chunks, strict=True) if chunk.token_ids]
    assert len(reports) >= 4
    between = [sum(one < at < two for at in written) for one, two in zip(reports, reports[2:], strict=False)]
    assert all(between), between  # each report is of another step, and each step writes a token
    assert len(tokens_of(writing.chunks)) == writing.chunks[-1].completion_tokens


# --- places -------------------------------------------------------------------------------------------------------------------------


def test_positions_in_the_queue_are_told_and_a_full_one_is_busy(tiny):
    backend = load(tiny("dense"), parallel=1, max_queue=2)
    try:
        first = Stream(backend, request("one", ENDLESS, max_new_tokens=None)).writes()
        second = Stream(backend, request("two", ENDLESS, max_new_tokens=None)).waits()
        third = Stream(backend, request("three")).waits()
        with pytest.raises(Busy, match="2 requests are waiting") as refused:
            run(backend, "four")
        assert 1 <= refused.value.retry_after <= 60
        ahead = request("five")
        reading = Task(backend.prefill, ahead)
        assert [chunk.queue_position for chunk in third.chunks] == [1]
        first.stop()
        third.until(lambda chunk: chunk.queue_position == 0)
        second.stop()
        chunks = third.result()
        assert chunks[-1].finish_reason == "length" and chunks[-1].timings.queue_seconds > 0
        assert [chunk.queue_position for chunk in second.chunks if chunk.queue_position is not None] == [0]
        reading.result()  # neither Busy nor in the others' way
        assert ahead.cancel.cancelled is False and reused(run(backend, "five", max_new_tokens=1)) > 0
    finally:
        backend.unload()


@pytest.mark.parametrize("parallel", [1, 2])
def test_clients_take_turns(tiny, parallel):
    backend = load(tiny("dense"), parallel=parallel)
    try:
        running = [Stream(backend, request(f"run {n}", ENDLESS, client="many", max_new_tokens=None)).writes() for n in range(parallel)]
        flood = [Stream(backend, request(f"many {n}", ENDLESS, client="many", max_new_tokens=60)).waits() for n in range(4)]
        single = Stream(backend, request("single", ENDLESS, client="single", max_new_tokens=60)).waits()
        running[0].stop()
        single.result()
        for stream in flood:
            stream.result()
        assert sum(stream.first_token < single.first_token for stream in flood) <= 1
        assert [stream.first_token for stream in flood] == sorted(stream.first_token for stream in flood)
        for stream in running[1:]:
            stream.stop()
    finally:
        backend.unload()


def test_a_flood_of_one_does_not_shut_the_door_on_others(tiny):
    backend = load(tiny("dense"), parallel=1, max_queue=3)
    try:
        running = Stream(backend, request("run", ENDLESS, client="many", max_new_tokens=None)).writes()
        flood = [Stream(backend, request(f"many {n}", client="many")).waits() for n in range(3)]
        with pytest.raises(Busy):
            run(backend, "one more", client="many")
        single = Stream(backend, request("single", client="single")).waits()
        with pytest.raises(Busy):
            flood[2].task.result()
        running.stop()
        assert all(stream.result()[-1].finish_reason == "length" for stream in (*flood[:2], single))
    finally:
        backend.unload()


def test_cancel_of_who_waits_reads_or_writes(starter):
    writing = [Stream(starter, request(f"{n}", ENDLESS, max_new_tokens=None)).writes() for n in range(3)]
    reading = Stream(starter, request("A long story of foxes. " * 250)).until(lambda chunk: chunk.prompt_tokens > 1000)
    waiting = Stream(starter, request("Late")).waits()
    for stream in (waiting, reading, writing[0]):
        before = sum(len(other.chunks) for other in writing[1:])
        last = stream.stop()[-1]
        assert last.finish_reason == "cancelled" and last.timings and len(tokens_of(stream.chunks)) == last.completion_tokens
        wait_for(lambda seen=before: sum(len(other.chunks) for other in writing[1:]) > seen)  # nobody else was
    assert reading.chunks[-1].completion_tokens == 0
    for stream in writing[1:]:
        stream.stop()
    wait_for(lambda: starter.stats().busy_sequences == 0)


# --- prefixes -----------------------------------------------------------------------------------------------------------------------


def test_a_chat_that_goes_on_computes_what_is_new(dense):
    chat, known = words(100, 9), 0
    for turn in range(4):
        reply = run(dense, chat, ENDLESS, max_new_tokens=20)
        assert reused(reply) >= known
        assert reply[-1].timings.prefill_tokens + reused(reply) == reply[-1].prompt_tokens == len(dense.encode(chat, add_bos=True))
        known = reply[-1].prompt_tokens - 1
        chat += text_of(reply) + "\nand you? " + words(5, turn)


def test_clients_with_the_same_beginning_compute_it_once(tiny):
    backend = load(tiny("dense"), parallel=8)
    try:
        system = words(400, 1)
        length = len(backend.encode(system, add_bos=True))
        prompts = [f"{system} {n} {words(5, n)}" for n in range(8)]
        wanted = alone(tiny("dense"), prompts[:1])
        got = [task.result() for task in [Task(run, backend, prompt, ENDLESS) for prompt in prompts]]
        computed = sum(chunks[-1].timings.prefill_tokens for chunks in got)
        assert length < computed < length + 8 * 40
        for chunks in got:
            assert chunks[-1].timings.prefill_tokens + reused(chunks) == chunks[-1].prompt_tokens
        assert not differ(wanted[0], got[0])
        wait_for(lambda: backend.stats().prompt_tokens == computed)
        assert backend.stats().reused_tokens == sum(map(reused, got))
    finally:
        backend.unload()


@pytest.mark.parametrize("kind", ["dense", *UNCUTTABLE])
@pytest.mark.parametrize("cache_ram", [64, 0])
def test_what_had_to_make_room_comes_back_from_memory(tiny, kind, cache_ram):
    chats = [words(150, n) for n in range(4)]
    backend = load(tiny(kind), ctx_size=512, parallel=1, cache_ram=cache_ram)
    try:
        assert backend.context_length == 512
        first = [run(backend, chat, ENDLESS) for chat in chats]
        longer = [f"{chat}{text_of(reply)} {words(4)}" for chat, reply in zip(chats, first, strict=True)]
        again = [run(backend, chat, ENDLESS) for chat in longer]
        wait_for(lambda: backend.stats().finished.get("length") == 8)
        stats = backend.stats()
    finally:
        backend.unload()
    assert_same(alone(tiny(kind), longer), again)
    found = [reused(chunks) for chunks in again]
    if cache_ram:
        assert all(count > 140 for count in found), found
        assert stats.cache_hits_memory >= 3 and stats.evictions >= 3 and 0 < stats.spilled_bytes <= 64 << 20
    else:
        assert sum(count > 140 for count in found) <= 2 and stats.spilled_sequences == stats.spilled_bytes == stats.cache_hits_memory == 0


# --- a context for all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", *UNCUTTABLE])
def test_replies_that_do_not_fit_together_all_end_in_full(tiny, kind):
    prompts = [f"{n} {words(40, n)}" for n in range(4)]
    wanted = alone(tiny(kind), prompts, max_new_tokens=300)
    backend = load(tiny(kind), ctx_size=512, parallel=4)
    try:
        streams = [Stream(backend, request(prompt, ENDLESS, max_new_tokens=300)) for prompt in prompts]
        got = [stream.result() for stream in streams]
        wait_for(lambda: backend.stats().finished.get("length") == 4)
        preemptions = backend.stats().preemptions
    finally:
        backend.unload()
    assert all(chunks[-1].finish_reason == "length" and chunks[-1].completion_tokens == 300 for chunks in got)
    assert_same(wanted, got)
    if kind != "recurrent":  # its states need no cells
        assert preemptions > 0


@pytest.mark.parametrize("kind", ["dense", *UNCUTTABLE])
def test_the_end_of_the_context_is_the_end_of_ones_own_reply_only(tiny, kind):
    backend = load(tiny(kind), ctx_size=512, parallel=4)
    try:
        streams = [Stream(backend, request(f"{n} {words(30 * n + 5)}", ENDLESS, max_new_tokens=None)) for n in range(3)]
        for stream in streams:
            last = stream.result()[-1]
            assert last.finish_reason == "length" and 512 <= last.prompt_tokens + last.completion_tokens <= 513
        full = backend.encode(words(600))[:512]
        assert run(backend, full, ENDLESS, max_new_tokens=None)[-1].completion_tokens == 1
        with pytest.raises(PromptTooLong, match=r"513 tokens.*512"):
            run(backend, [*full, 5])
    finally:
        backend.unload()


def test_probabilities_of_a_prompt_that_had_to_give_way_come_once(tiny):
    backend = load(tiny("dense"), ctx_size=512, parallel=3)
    try:
        prompt = backend.encode(words(400, 3))[:300]
        wanted = of_prompt(run(backend, prompt, ENDLESS, prompt_logprobs=1))
        for _ in range(3):
            others = [Stream(backend, request(words(20, n), ENDLESS, max_new_tokens=400)) for n in range(2)]
            got = run(backend, prompt, ENDLESS, prompt_logprobs=1, max_new_tokens=100)
            for other in others:
                assert other.result()[-1].completion_tokens == 400
            assert [entry.token for entry in of_prompt(got)] == [entry.token for entry in wanted] == prompt[1:]
            assert [entry.logprob for entry in of_prompt(got)] == pytest.approx([entry.logprob for entry in wanted], abs=NEAR)
    finally:
        backend.unload()


# --- models whose cache cannot be cut -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", UNCUTTABLE)
def test_chats_with_a_cache_that_cannot_be_cut(tiny, kind):
    """Prompts that grow, are sent again, and part ways; some at the same time."""
    backend = load(tiny(kind), parallel=3)
    asked: list[str] = []
    got: list[list[Chunk]] = []

    def say(*prompts: str) -> list[list[Chunk]]:
        tasks = [Task(run, backend, prompt, ENDLESS, max_new_tokens=12) for prompt in prompts]
        found = [task.result() for task in tasks]
        asked.extend(prompts)
        got.extend(found)
        return found

    try:
        chats = [f"{n} {words(60, n)}" for n in range(3)]
        replies = say(*chats)
        for turn in range(3):
            again = say(*chats)  # regenerate
            third = say(*chats)
            for chunks in (*again, *third):
                assert reused(chunks) >= chunks[-1].prompt_tokens - 1 - WORTH_RESTORING, "the snapshot at the prompt's end"
            assert [text_of(chunks) for chunks in again] == [text_of(chunks) for chunks in replies]
            longer = [f"{chat}{text_of(reply)} {words(8, turn)}" for chat, reply in zip(chats, replies, strict=True)]
            parted = [f"{chat} but {words(8, turn)}" for chat in chats]
            before = [chunks[-1].prompt_tokens for chunks in replies]
            replies = say(*longer)
            for length, chunks in zip(before, replies, strict=True):
                assert reused(chunks) >= length - 1 - WORTH_RESTORING, "the whole of the turn before, or its prompt"
            say(*parted)
            chats = longer
    finally:
        backend.unload()
    assert_same(alone(tiny(kind), asked, max_new_tokens=12), got)


def test_a_window_kept_whole_can_be_cut(tiny):
    prompt = words(120, 2)
    wanted = alone(tiny("sliding_window"), [prompt, prompt[: len(prompt) // 2] + " other"])
    backend = load(tiny("sliding_window"), streaming_llm=True)
    try:
        first, second = run(backend, prompt, ENDLESS), run(backend, prompt[: len(prompt) // 2] + " other", ENDLESS)
        assert reused(second) > 50
        assert_same(wanted, [first, second])
    finally:
        backend.unload()


# --- reading ahead ------------------------------------------------------------------------------------------------------------------


def test_what_was_read_ahead_is_not_read_again(dense):
    prompt = words(200, 77)
    dense.prefill(request(prompt))
    chunks = run(dense, prompt)
    assert reused(chunks) == chunks[-1].prompt_tokens - 1
    with pytest.raises(PromptTooLong):
        dense.prefill(request(words(10000)))
    with pytest.raises(PromptError):
        dense.prefill(request([10**6]))


def test_reading_ahead_gives_way_at_once_and_goes_on_later(starter):
    text = "A long story of cats. " * 60
    fields, raw = _asked(request(text, max_new_tokens=0))
    call = starter._connection.call("prefill", fields, raw)  # the frames say how far it is
    frames = call.frames()
    first = next(frames)
    assert first.fields["prefill"] < 200 and first.fields["prompt"] > 300
    done: list[int] = []
    rest = Task(lambda: [done.append(frame.fields.get("prefill", -1)) for frame in frames])
    real = run(starter, "Hello", max_new_tokens=2)
    assert real[-1].finish_reason == "length" and rest.is_alive(), "the real request ends before what is read ahead"
    assert max(done, default=0) < first.fields["prompt"] - 100
    rest.result()
    assert done[-1] == -1 and max(done) >= first.fields["prompt"] - 1
    assert reused(run(starter, text, max_new_tokens=1)) == first.fields["prompt"] - 1


def test_reading_ahead_can_be_cancelled_and_is_never_busy(starter):
    token = CancelToken()
    task = Task(starter.prefill, request("A long story of dogs. " * 250, cancel=token))
    token.cancel()
    task.result(10)
    writing = Stream(starter, request("Once", ENDLESS, max_new_tokens=None)).writes()
    tokens = [CancelToken() for _ in range(40)]
    tasks = [Task(starter.prefill, request(f"{n} a short story", cancel=token)) for n, token in enumerate(tokens)]
    wait_for(lambda: sum(task.is_alive() for task in tasks) <= 20)  # the oldest have given way for good
    for token in tokens:
        token.cancel()
    for task in tasks:
        task.result(10)
    writing.stop()


# --- adapters -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loras(tiny: Callable[..., Path]) -> tuple[Path, Path]:
    base = tiny("dense")
    return tuple(tiny_models.lora(base.parent / f"lora{seed}.gguf", base, seed=seed) for seed in (7, 8))


def with_adapter(
    backend: LlamaCppBackend, path: Path | None, scale: float = 1.0, prompt: str = "hello water name why " * 10, **values
) -> list[Chunk]:
    return run(backend, prompt, ENDLESS, adapters=(Adapter(path, scale),) if path else (), **values)


def test_swapped_adapters_are_those_of_an_empty_cache(tiny, dense, loras):
    one, two = loras
    asked = [(None, 1.0), (one, 1.0), (two, 1.0), (one, 0.5), (one, 0.0), (one, -1.0)]
    fresh = []
    for path, scale in asked:
        backend = load(tiny("dense"))
        fresh.append(with_adapter(backend, path, scale, logprobs=2))
        backend.unload()
    texts = [text_of(chunks) for chunks in fresh]
    assert len(set(texts)) == 5 and texts[0] == texts[4]  # a scale of 0 is the base
    for _ in range(2):
        assert_same(fresh, [with_adapter(dense, path, scale) for path, scale in asked])
    assert reused(with_adapter(dense, one)) > 50  # its own beginning is shared
    both = [run(dense, "hello", ENDLESS, adapters=tuple(Adapter(path) for path in order)) for order in (loras, loras[::-1])]
    assert tokens_of(both[0]) == tokens_of(both[1]) != tokens_of(run(dense, "hello", ENDLESS, adapters=(Adapter(one),)))
    assert set(dense.adapters) >= set(loras)


def test_different_adapters_at_once(dense, loras):
    asked = [(path, f"{n} {words(30, n)}") for n in range(3) for path in (None, *loras)]
    wanted = [with_adapter(dense, path, prompt=prompt, logprobs=2, max_new_tokens=40) for path, prompt in asked]
    tasks = [Task(with_adapter, dense, path, prompt=prompt, max_new_tokens=40) for path, prompt in asked]
    assert_same(wanted, [task.result() for task in tasks])


def test_adapters_are_unloaded_when_nobody_uses_them(dense, loras):
    one = loras[0]
    wanted = text_of(with_adapter(dense, one))
    writing = Stream(dense, request("hello", ENDLESS, max_new_tokens=None, adapters=(Adapter(one),))).writes()
    with pytest.raises(Busy, match="uses this adapter"):
        dense.unload_adapter(one)
    assert one in dense.adapters
    writing.stop()
    dense.unload_adapter(one)
    dense.unload_adapter(one)
    assert one not in dense.adapters
    assert text_of(with_adapter(dense, one)) == wanted
    other_name = one.parent / "x" / ".." / one.name
    dense.load_adapter(other_name)
    assert dense.adapters.count(one) == 1 and len(dense.adapters) <= 2
    dense.unload_adapter(other_name)
    assert one not in dense.adapters and text_of(with_adapter(dense, one)) == wanted


def test_a_file_that_changed_under_its_name_is_another_adapter(tiny, dense, loras):
    path = tiny("dense").parent / "changing.gguf"
    path.write_bytes(loras[0].read_bytes())
    assert text_of(with_adapter(dense, path)) == text_of(with_adapter(dense, loras[0]))
    dense.unload_adapter(path)
    path.unlink()
    path.write_bytes(loras[1].read_bytes())
    assert text_of(with_adapter(dense, path)) == text_of(with_adapter(dense, loras[1])) != text_of(with_adapter(dense, loras[0]))
    dense.unload_adapter(path)


def test_wrong_adapters_are_named(dense, starter_model, loras, tmp_path):
    with pytest.raises(ModelError, match=r"wrong\.gguf.*another base model"):
        with_adapter(dense, tiny_models.lora(tmp_path / "wrong.gguf", starter_model))
    (tmp_path / "peft").mkdir()
    with pytest.raises(ModelError, match=r"the folder peft.*Convert it to a GGUF adapter"):
        with_adapter(dense, tmp_path / "peft")
    with pytest.raises(ModelError, match="not a LoRA adapter"):
        with_adapter(dense, starter_model)
    with pytest.raises(ModelError, match="no file"):
        with_adapter(dense, tmp_path / "none.gguf")
    (tmp_path / "cut.gguf").write_bytes(loras[0].read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"cut\.gguf"):
        with_adapter(dense, tmp_path / "cut.gguf")
    for scale in (1e4, float("inf"), float("nan")):
        with pytest.raises(SettingsError, match="scale"):
            with_adapter(dense, loras[0], scale)


def test_a_spoilt_adapter_spoils_nobody_else(tiny, loras, tmp_path):
    """Numbers that are none get into every sum over the cache, masked or not."""
    spoilt = tiny_models.lora(tmp_path / "spoilt.gguf", tiny("dense"), strength=1e9)
    prompts = [f"{n} {words(60, n)}" for n in range(6)]
    wanted = alone(tiny("dense"), prompts)
    for flash in ("auto", "off"):
        backend = load(tiny("dense"), flash_attn=flash)
        try:
            with pytest.raises(ModelError, match="no number"):
                with_adapter(backend, spoilt)
            assert_same(wanted, [run(backend, prompt, ENDLESS) for prompt in prompts])
        finally:
            backend.unload()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_adapters_come_back_with_the_engine(tiny, loras, tmp_path, caplog):
    lost = tmp_path / "lost.gguf"
    lost.write_bytes(loras[1].read_bytes())
    backend = load(tiny("dense"))
    try:
        wanted = with_adapter(backend, loras[0], logprobs=2)
        with_adapter(backend, lost)
        lost.unlink()
        os.kill(backend.pid, signal.SIGKILL)
        wait_for(lambda: backend.alive() and backend.stats().restarts == 1)
        assert backend.adapters == (loras[0],) and "lost.gguf was not loaded again" in caplog.text
        assert not differ(wanted, with_adapter(backend, loras[0]))
        with pytest.raises(ModelError, match=r"lost\.gguf"):
            with_adapter(backend, lost)
    finally:
        backend.unload()


def test_reading_ahead_with_an_adapter(dense, loras):
    prompt, two = words(150, 31), Adapter(loras[1])
    dense.unload_adapter(loras[1])
    dense.prefill(request(prompt, adapters=(two,)))
    assert reused(run(dense, prompt, adapters=(two,))) > 150 and reused(run(dense, prompt)) <= 1  # the BOS of others


# --- embeddings ---------------------------------------------------------------------------------------------------------------------


def cosine(one: tuple[float, ...], two: tuple[float, ...]) -> float:
    return sum(a * b for a, b in zip(one, two, strict=True))


def test_embeddings_of_a_model_that_writes(starter):
    texts = ["The cat sat on the mat.", "A cat was sitting on a rug.", "Interest rates rose by two percent in March.", "a", "naïve café 🦊", ""]
    with pytest.raises(PromptError):
        starter.embed(texts, CancelToken())  # an empty text has no embedding
    texts = [*texts[:-1], *(f"Sentence number {n} about foxes. " * (n // 4 + 1) for n in range(20))]
    found = starter.embed(texts, CancelToken())
    assert len(found.vectors) == 25 and found.tokens == sum(len(starter.encode(text, add_bos=True)) for text in texts)
    assert all(cosine(vector, vector) == pytest.approx(1, abs=1e-4) for vector in found.vectors)
    for number in (0, 1, 3, 4, 24):
        (one,) = starter.embed([texts[number]], CancelToken()).vectors
        assert cosine(one, found.vectors[number]) > 0.999  # quantised weights: other batches use other kernels
    cats, rug, rates = found.vectors[:3]
    assert cosine(cats, rug) > cosine(cats, rates)
    tokens = tuple(starter.encode(texts[0], add_bos=True))
    assert cosine(starter.embed([tokens], CancelToken()).vectors[0], cats) > 0.999
    assert starter.embed([], CancelToken()).vectors == ()


def test_embeddings_too_long_or_wrong_are_named(starter):
    with pytest.raises(PromptTooLong, match=r"Text 2 has \d+ tokens"):
        starter.embed(["short", "long " * 5000], CancelToken())
    with pytest.raises(PromptError, match="no token"):
        starter.embed([(5, 10**6)], CancelToken())
    assert len(starter.embed(["short"], CancelToken()).vectors) == 1


def test_embeddings_do_not_stop_a_stream(dense):
    dense.embed(["the first one makes a context for itself"], CancelToken())
    writing = Stream(dense, request("Once", ENDLESS, max_new_tokens=None)).writes()
    task = Task(dense.embed, [f"Text {n} about foxes and hens." for n in range(100)], CancelToken())
    assert len(task.result().vectors) == 100
    written = [at for at, chunk in zip(writing.times, writing.chunks, strict=False) if chunk.token_ids and task.started_at < at < task.ended_at]
    writing.stop()
    assert len(written) >= 3


def test_embeddings_can_be_cancelled(starter):
    token = CancelToken()
    task = Task(starter.embed, [f"Text {n}. " * 50 for n in range(400)], token)
    wait_for(lambda: starter._connection._calls)
    token.cancel()
    assert task.result(10).vectors == () and task.ended_at - task.started_at < 10
    assert len(starter.embed(["short"], CancelToken()).vectors) == 1


def test_a_model_for_embeddings(tiny):
    backend = load(tiny("bert"))
    try:
        assert backend.features == {"parallel", "embeddings", "stats"} and backend.context_length == 512
        with pytest.raises(ModelError, match="makes embeddings only"):
            run(backend, "hello")
        backend.prefill(request("hello"))
        texts = [words(n + 1, n) for n in range(40)]
        found = backend.embed(texts, CancelToken())
        assert len(found.vectors) == 40 and all(
            len(vector) == 64 and cosine(vector, vector) == pytest.approx(1, abs=1e-4) for vector in found.vectors
        )
        for number in (0, 15, 16, 39):
            assert backend.embed([texts[number]], CancelToken()).vectors[0] == pytest.approx(found.vectors[number], abs=1e-3)
        with pytest.raises(PromptTooLong):
            backend.embed([words(2000)], CancelToken())
        tasks = [Task(backend.embed, [text], CancelToken()) for text in texts]
        for task, vector in zip(tasks, found.vectors, strict=True):
            assert task.result().vectors[0] == pytest.approx(vector, abs=1e-3)
        assert backend.decode(backend.encode("hello water")) == "hello water"
    finally:
        backend.unload()


# --- what it says of itself ---------------------------------------------------------------------------------------------------------


def test_stats_add_up(tiny):
    backend = load(tiny("dense"), parallel=2, max_queue=5, ctx_size=32768)
    try:
        stats = backend.stats()
        assert (stats.parallel, stats.max_queue, stats.cells, stats.busy_sequences) == (2, 5, 32768, 0) and stats.memory_bytes > 10**7
        chunks = [run(backend, f"{n} {words(30, n)}", ENDLESS) for n in range(3)]
        stopped = Stream(backend, request("hello", ENDLESS, max_new_tokens=None)).writes()
        wait_for(lambda: backend.stats().busy_sequences == 1)
        stopped.stop()
        with pytest.raises(PromptTooLong):
            run(backend, words(40000))
        wait_for(lambda: backend.stats().finished.get("cancelled"))
        stats = backend.stats()
        assert stats.finished["length"] == 3 and stats.finished["cancelled"] == 1 and stats.restarts == 0 and stats.preemptions == 0
        assert stats.generated_tokens >= 3 * 24 and stats.steps >= 3 * 24
        assert stats.prompt_tokens >= sum(each[-1].timings.prefill_tokens for each in chunks) and stats.cells_used > 0
        assert stats.cache_misses + stats.cache_hits_cells + stats.cache_hits_memory >= 4
        assert stats.decode_seconds > 0 and stats.prefill_seconds > 0 and stats.queue_seconds >= 0 and stats.threads == 1
        assert backend.memory() > 10**7 and isinstance(backend.generate(GenerationRequest("x")), Iterator)
    finally:
        backend.unload()
    assert backend.stats().generated_tokens == stats.generated_tokens and backend.memory() == 0


@pytest.mark.parametrize(("ctx_size", "places"), [(1024, 1), (8192, 4)])
def test_places_chosen_from_the_context(tiny, ctx_size, places):
    backend = load(tiny("dense"), parallel=0, ctx_size=ctx_size)
    try:
        assert backend.stats().parallel == places
    finally:
        backend.unload()
