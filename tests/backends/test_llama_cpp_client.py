"""The engine process as its user sees it: right text, and every way in which a process, a file or a request can go wrong.

What many requests at once do to each other stands in `test_llama_cpp_sharing.py`.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import psutil
import pytest

from modules.backends.base import CancelToken, EngineStats, GenerationRequest
from modules.backends.llama_cpp import LOADER, client, connection
from modules.backends.llama_cpp.client import LlamaCppBackend
from modules.backends.llama_cpp.connection import Call, Connection, environment, exit_words, merge
from modules.backends.llama_cpp.protocol import Frame
from modules.errors import EngineDied, ModelError, NoModel, PromptError, PromptTooLong, SettingsError
from modules.samplers import NEUTRAL
from modules.system import is_alive
from tests.backends.llama_cpp_help import (
    CHAT,
    ENDLESS,
    GREEDY,
    NEAR_IN_STARTER,
    Stream,
    Task,
    dice,
    differ,
    gone,
    is_zombie,
    load,
    logprobs_of,
    of_prompt,
    request,
    reused,
    run,
    text_of,
    tokens_of,
    wait_for,
)

ROOT = Path(__file__).resolve().parents[2]
real_engine = pytest.mark.engine
needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="signals")


@pytest.fixture(scope="module")
def backend(starter_model: Path) -> Iterator[LlamaCppBackend]:
    made = load(starter_model)
    yield made
    made.unload()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of some hundred kilobytes that writes nonsense."""
    pytest.importorskip("gguf")
    from tests.backends import tiny_models

    return tiny_models.dense(tmp_path_factory.mktemp("models") / "dense.gguf")


# --- replies ------------------------------------------------------------------------------------------------------------------------


@real_engine
def test_it_answers_sensibly_and_stops_by_itself(backend):
    chunks = run(backend, CHAT.format("What is the capital of France? Answer with one word."), max_new_tokens=100)
    assert "Paris" in text_of(chunks) and chunks[-1].finish_reason == "stop" and "<|im_end|>" not in text_of(chunks)


@real_engine
def test_a_prefix_is_reused_and_said_so(backend):
    first = "The fox and the hen. " * 20
    tokens = len(backend.encode(first))
    run(backend, first, max_new_tokens=1)
    again = run(backend, first)
    assert again[-1].timings.reused_tokens == tokens - 1 and again[-1].timings.prefill_tokens == 1
    reply = text_of(again)
    assert run(backend, first + reply + " More.")[-1].timings.reused_tokens >= tokens
    changed = run(backend, "A" + first[1:])
    assert changed[-1].timings.reused_tokens == 0
    assert text_of(run(backend, first)) == reply  # a trimmed and refilled cache gives the same text


@real_engine
def test_a_seed_repeats_a_reply(backend):
    letters = dice(backend.encode("a b c d e f g h"))
    drawn = [tokens_of(run(backend, "My favourite", NEUTRAL, seed=seed, logit_bias=letters)) for seed in (1, 1, 2, 2**32 - 1, 2**32 - 1)]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[3] == drawn[4] and len(set(drawn[0])) > 4
    texts = [text_of(run(backend, "My favourite animal is", NEUTRAL, seed=seed, max_new_tokens=6)) for seed in (1, 2, 3)]
    assert len(set(texts)) == 3


@real_engine
def test_characters_of_many_tokens_come_whole(backend):
    ids = backend.encode("🦊")
    assert len(ids) > 1
    plan = GREEDY.replace({"grammar_string": 'root ::= "🦊🦊 é"'})
    chunks = run(backend, "A fox as an emoji:", plan)
    assert text_of(chunks) == "🦊🦊 é" and all("\ufffd" not in chunk.text for chunk in chunks)
    assert next(chunk.text for chunk in chunks if chunk.token_ids) == ""  # the first byte alone is held back
    cut = run(backend, "A fox as an emoji:", plan, max_new_tokens=1)
    assert text_of(cut) == "\ufffd" and cut[-1].finish_reason == "length"


@real_engine
def test_special_tokens_are_left_out_or_shown(backend):
    special = backend.encode("<|im_start|>")
    assert len(special) == 1
    bias = ((special[0], 1000.0),)
    assert text_of(run(backend, "a", logit_bias=bias, max_new_tokens=3)) == ""
    shown = GREEDY.replace({"skip_special_tokens": False})
    assert text_of(run(backend, "a", shown, logit_bias=bias, max_new_tokens=3)) == "<|im_start|>" * 3


@real_engine
def test_grammar_bans_and_bias(backend):
    for seed in range(5):
        assert text_of(run(backend, "Yes or no?", NEUTRAL.replace({"grammar_string": 'root ::= "yes" | "no"'}), seed=seed)) in ("yes", "no")
    assert run(backend, "x", GREEDY.replace({"grammar_string": 'root ::= "y"'}))[-1].finish_reason == "stop"
    assert run(backend, "x", ENDLESS.replace({"grammar_string": 'root ::= "y"'}))[-1].finish_reason == "stop"
    first = run(backend, "The capital of France is", max_new_tokens=1)[1:][-2].token_ids[0]
    banned = GREEDY.replace({"custom_token_bans": str(first)})
    assert first not in [token for chunk in run(backend, "The capital of France is", banned) for token in chunk.token_ids]
    for grammar, words in (
        ("root ::= (", r"expecting '\)'"),
        ("other ::= root", "Undefined rule"),
        ('other ::= "a"', "rule named root"),
        ('root ::= root "a"', "begin with itself"),
    ):
        with pytest.raises(SettingsError, match=words):
            run(backend, "x", GREEDY.replace({"grammar_string": grammar}))
    with pytest.raises(SettingsError, match="no token 99999999"):
        run(backend, "x", logit_bias=((99999999, 1.0),))


@real_engine
def test_logprobs_are_of_the_model_before_samplers(backend):
    chunks = run(backend, "The capital of France is", GREEDY.replace({"repetition_penalty": 1.3}), logprobs=3, max_new_tokens=4)
    found = [entry for chunk in chunks for entry in chunk.logprobs]
    assert len(found) == 4
    for entry in found:
        values = [value for _, _, value in entry.top]
        assert len(values) == 3 and values == sorted(values, reverse=True) and entry.logprob <= values[0] <= 0
    assert found[0].text == " Paris" and found[0].top[0] == (found[0].token, found[0].text, found[0].logprob)


@real_engine
@pytest.mark.parametrize("sampling", [ENDLESS, NEUTRAL, NEUTRAL.replace({"temperature": 2.0, "top_k": 50, "grammar_string": "root ::= [a-z ]+"})])
@pytest.mark.parametrize("bias", [(), ((260, 6.0), (262, -4.0))])
def test_the_chosen_tokens_probability_is_before_samplers_and_biases(backend, sampling, bias):
    values = {"seed": 5, "max_new_tokens": 24, "logit_bias": bias, "prompt_logprobs": 0}
    wanted = run(backend, "Once upon a time", sampling, logprobs=1, **values)
    got = run(backend, "Once upon a time", sampling, chosen_logprob=True, **values)
    assert tokens_of(got) == tokens_of(wanted) and len(logprobs_of(got)) == len(tokens_of(got)) > 3
    for one, other in zip(logprobs_of(got), logprobs_of(wanted), strict=True):
        assert (one.token, one.text, one.top) == (other.token, "", ()) and one.logprob == pytest.approx(other.logprob, abs=1e-4)


@real_engine
def test_every_sampler_runs_in_the_real_chain(backend):
    values = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.95, "top_n_sigma": 2.0, "xtc_probability": 0.5}
    values |= {"repetition_penalty": 1.1, "repetition_penalty_range": 0, "dry_multiplier": 0.8, "frequency_penalty": 0.1, "presence_penalty": 0.1}
    for extra in ({}, {"mirostat_mode": 1}, {"mirostat_mode": 2}, {"adaptive_target": 0.4}, {"dynamic_temperature": True, "dynatemp_high": 2}):
        sampling = NEUTRAL.replace({**values, **extra})
        assert text_of(run(backend, "Once upon a time", sampling, seed=3, max_new_tokens=8)) != ""


@real_engine
def test_penalty_range_zero_is_the_whole_context(backend):
    fox = backend.encode(" fox")[0]
    wanted = {"prompt": "The fox" + " and the hen" * 20, "logit_bias": ((fox, 50.0),), "max_new_tokens": 1}
    for last_n, text in ((0, False), (2, True), (1024, False)):
        sampling = GREEDY.replace({"presence_penalty": 100.0, "repetition_penalty_range": last_n})
        assert (text_of(run(backend, sampling=sampling, **wanted)) == " fox") is text


@real_engine
def test_what_this_model_cannot_do_is_said(backend):
    with pytest.raises(ModelError, match="--mmproj"):
        run(backend, "x", images=(b"png",))
    with pytest.raises(PromptError, match="images must be text"):
        run(backend, (5, 6), images=(b"png",))
    assert backend.features == {"generate", "parallel", "grammar", "logprobs", "prefill", "adapters", "embeddings", "stats"}


@real_engine
def test_max_new_tokens_is_exact_also_at_nought(backend):
    for limit in (0, 1, 7):
        chunks = run(backend, "The fox", ENDLESS, max_new_tokens=limit)
        assert chunks[-1].finish_reason == "length" and chunks[-1].completion_tokens == limit == len(tokens_of(chunks))


@real_engine
def test_bans_of_many_tokens_and_a_bias_that_forces(backend):
    letters = tuple((token, float("-inf")) for token in range(1000, 20_000))
    assert not set(tokens_of(run(backend, "The capital of France is", logit_bias=letters))) & set(range(1000, 20_000))
    forced = backend.encode(" hen")[0]
    assert tokens_of(run(backend, "The fox", logit_bias=((forced, 500.0),), max_new_tokens=5)) == [forced] * 5


@real_engine
def test_end_tokens_end_and_can_be_banned(backend):
    (end,) = backend.encode(backend.eos_token)
    stopped = run(backend, "The fox", logit_bias=((end, 500.0),))
    assert stopped[-1].finish_reason == "stop" and stopped[-1].completion_tokens == 0 and text_of(stopped) == ""
    banned = run(backend, "The fox", ENDLESS, logit_bias=((end, 500.0),))
    assert banned[-1].finish_reason == "length" and end not in tokens_of(banned)


# --- schemas and grammars -----------------------------------------------------------------------------------------------------------

ANIMAL = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "legs": {"enum": [2, 4]}}, "required": ["name", "legs"]}
CHAIN = {
    "$defs": {"node": {"type": "object", "properties": {"value": {"enum": [1]}, "next": {"$ref": "#/$defs/node"}}, "required": ["value"]}},
    "$ref": "#/$defs/node",
}


@real_engine
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_schema_is_followed(backend, seed):
    found = json.loads(text_of(run(backend, "An animal as JSON:", NEUTRAL, seed=seed, json_schema=json.dumps(ANIMAL), max_new_tokens=100)))
    assert set(found) == {"name", "legs"} and isinstance(found["name"], str) and len(found["name"]) <= 8 and found["legs"] in (2, 4)


@real_engine
def test_schemas_of_all_kinds_are_followed(backend):
    def said(schema: object, **values) -> object:
        return json.loads(text_of(run(backend, "JSON:", json_schema=json.dumps(schema), max_new_tokens=60, **values)))

    assert said({"const": {"a": [1, None, True]}}) == {"a": [1, None, True]}
    assert said({"enum": ["red", "green"]}) in ("red", "green")
    bits = said({"type": "array", "items": {"enum": [0, 1]}, "minItems": 3, "maxItems": 3})
    assert isinstance(bits, list) and len(bits) == 3 and set(bits) <= {0, 1}
    assert said({"const": "a\n\U0001f600"}) == "a\n\U0001f600"
    assert said({"type": ["boolean", "null"]}) in (True, False, None)
    closing = backend.encode("}")[0]
    assert said(CHAIN, logit_bias=((closing, 20.0),))["value"] == 1


def deep(levels: int) -> str:
    return '{"type":"object","properties":{"a":' * levels + '{"type":"string"}' + "}}" * levels


HOSTILE = {
    "number": "5",
    "text": '"x"',
    "null": "null",
    "list": "[]",
    "not JSON": "{",
    "unknown type": {"type": "foo"},
    "deep": deep(2000),
    "brackets": "[" * 100_000,
    "one MB": {"type": "object", "properties": {f"property{n}": {"type": "string"} for n in range(30_000)}},
    "many properties": {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(5000)}},
    "itself": {"$ref": "#"},
    "itself alone": {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}},
    "elsewhere": {"$ref": "https://example.com/schema.json"},
    "nowhere": {"$ref": "#/$defs/none"},
    "a wrong pattern": {"type": "string", "pattern": "^*$"},
    "brackets in a pattern": {"type": "string", "pattern": "^" + "(" * 5000 + "a" + ")" * 5000 + "$"},
    "a long pattern": {"type": "string", "pattern": "^a{1000000000}$"},
    "minItems": {"type": "array", "items": {}, "minItems": 10**9},
    "maxItems": {"type": "array", "items": {}, "maxItems": 10**9},
    "minLength": {"type": "string", "minLength": 10**9},
    "maxLength": {"type": "string", "maxLength": 10**9},
    "below nought": {"type": "array", "items": {}, "minItems": -5, "maxItems": -1},
    "of another type": {"type": "string", "minLength": "x", "pattern": 7, "enum": 5},
    "no choice": {"anyOf": []},
}


@real_engine
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_costs_a_message(backend, name):
    schema, pid = HOSTILE[name], backend.pid
    with pytest.raises(SettingsError, match=r"JSON schema|grammar"):
        run(backend, "x", json_schema=schema if isinstance(schema, str) else json.dumps(schema))
    assert backend.pid == pid and run(backend, "x", max_new_tokens=1)[-1].finish_reason == "length"


GRAMMARS = {
    "brackets": "root ::= " + "(" * 100_000 + '"a"' + ")" * 100_000,
    "brackets that fit": "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000,
    "a chain": "\n".join(["root ::= r0", *(f"r{n} ::= r{n + 1}" for n in range(100_000)), 'r100000 ::= "a"']),
    "many": "root ::= " + " | ".join(['"a"'] * 100_000),
    "itself": 'root ::= root "a" | "b"',
    "repeated": 'root ::= "a"{1000000000}',
    "open": 'root ::= "a',
    "over a frame": "root ::= " + "a" * (9 << 20),
}


@real_engine
@pytest.mark.parametrize("name", GRAMMARS)
def test_a_hostile_grammar_costs_a_message(backend, name):
    pid = backend.pid
    with pytest.raises((SettingsError, PromptError)):
        run(backend, "x", GREEDY.replace({"grammar_string": GRAMMARS[name]}))
    assert backend.pid == pid and run(backend, "x", max_new_tokens=1)[-1].finish_reason == "length"


@real_engine
def test_a_grammar_and_a_schema_are_one_too_many(backend):
    with pytest.raises(SettingsError, match="cannot both"):
        run(backend, "x", GREEDY.replace({"grammar_string": 'root ::= "a"'}), json_schema=json.dumps(ANIMAL))


# --- probabilities ------------------------------------------------------------------------------------------------------------------


def compare_with_writing(backend: LlamaCppBackend, text: str, places: tuple[int, ...], tolerance: float) -> None:
    """The prompt's probabilities against those of writing it, token by token, at some places and at its end."""
    prompt = backend.encode(text)
    assert len(prompt) > 130  # more than two pieces of 64
    chunks = run(backend, prompt, max_new_tokens=2, prompt_logprobs=3)
    found = of_prompt(chunks)
    assert [entry.token for entry in found] == prompt[1:] and reused(chunks) == 0 and chunks[-1].completion_tokens == 2
    for place in (*places, len(prompt) - 1):
        forced = run(backend, prompt[:place], logit_bias=((prompt[place], 1000.0),), max_new_tokens=1, logprobs=3)
        (written,) = logprobs_of(forced)
        read = found[place - 1]
        assert written.token == read.token and written.text == read.text
        assert written.logprob == pytest.approx(read.logprob, abs=tolerance), place
        assert [value for _, _, value in written.top] == pytest.approx([value for _, _, value in read.top], abs=tolerance)
    assert len(of_prompt(run(backend, prompt, max_new_tokens=0, prompt_logprobs=0))) == len(prompt) - 1


@real_engine
def test_probabilities_of_the_prompt_are_those_of_writing_it(dense):
    backend = load(dense, ctx_size=512, flash_attn="off")  # flash attention rounds otherwise for one token than for many
    try:
        compare_with_writing(backend, "hello water name why is the system of two " * 10, (1, 2, 3, 62, 63, 64, 65, 66, 127, 128, 129, 150), 1e-3)
    finally:
        backend.unload()


@real_engine
def test_probabilities_of_the_prompt_with_the_starter(backend):
    prompt = backend.encode("The quick brown fox jumps over the lazy dog. " * 7)
    read = of_prompt(run(backend, prompt, max_new_tokens=0, prompt_logprobs=0))
    faults = []
    for place in range(5, len(prompt), 7):
        forced = run(backend, prompt[:place], logit_bias=((prompt[place], 1000.0),), max_new_tokens=1, logprobs=1)
        faults.append(abs(logprobs_of(forced)[0].logprob - read[place - 1].logprob))
    assert max(faults) < 1.5 and sum(faults) / len(faults) < 0.3, faults  # rounding, see NEAR_IN_STARTER; a wrong place would be off by much more


@real_engine
def test_perplexity_tells_english_from_noise(backend):
    def perplexity(tokens: list[int]) -> float:
        found = of_prompt(run(backend, tokens, max_new_tokens=0, prompt_logprobs=0))
        assert len(found) == len(tokens) - 1 and all(entry.top == () for entry in found)
        return math.exp(-sum(entry.logprob for entry in found) / len(found))

    tokens = backend.encode("Water boils at one hundred degrees. It is a liquid that all living things need, and most of the earth is covered by it.")
    assert 1 < perplexity(tokens) * 20 < perplexity(tokens[::-1])
    assert of_prompt(run(backend, tokens[:1], max_new_tokens=0, prompt_logprobs=5)) == []


@real_engine
def test_every_token_of_the_vocabulary_may_be_asked_for_and_fewer_may_come(backend):
    chunks = run(backend, "The fox and the hen " * 20, max_new_tokens=2, logprobs=10**6, prompt_logprobs=10**6)
    for entry in (*of_prompt(chunks), *logprobs_of(chunks)):
        values = [value for _, _, value in entry.top]
        assert len(values) >= 1000 and values == sorted(values, reverse=True) and sum(map(math.exp, values)) <= 1.0001


@real_engine
def test_probabilities_do_not_depend_on_what_else_is_asked(backend):
    wanted = run(backend, "Once upon a time", max_new_tokens=8, logprobs=2, prompt_logprobs=1)
    assert len(logprobs_of(wanted)) == 8
    assert not differ(wanted, run(backend, "Once upon a time", max_new_tokens=8), NEAR_IN_STARTER)


@real_engine
def test_a_megabyte_of_text_and_more_than_a_frame(backend, monkeypatch):
    with pytest.raises(PromptTooLong, match="2048"):
        run(backend, "word " * 200_000)
    monkeypatch.setattr(client, "MAX_RAW", 10)
    with pytest.raises(PromptTooLong, match="MiB"):
        backend.encode("longer than ten bytes")


@real_engine
def test_a_request_that_no_frame_holds_is_refused_and_the_next_one_is_answered(backend):
    for values in ({"json_schema": "x" * (9 << 20)}, {"logit_bias": tuple((token, 1.5) for token in range(1_000_000))}):
        with pytest.raises((PromptError, SettingsError)):
            run(backend, "x", **values)
        assert run(backend, "x", max_new_tokens=1)[-1].finish_reason == "length"


# --- cancel -------------------------------------------------------------------------------------------------------------------------


@real_engine
def test_cancel_during_prefill_takes_effect_inside_a_piece(backend):
    token = CancelToken()
    stream = backend.generate(GenerationRequest("A long story of foxes. " * 330, GREEDY, cancel=token))
    first = next(stream)
    assert first.prompt_tokens > 1500
    timer = threading.Timer(0.2, token.cancel)
    timer.start()
    last = list(stream)[-1]
    assert last.finish_reason == "cancelled" and last.completion_tokens == 0
    assert run(backend, "Hello", max_new_tokens=2)[-1].finish_reason == "length"


@real_engine
def test_cancel_while_others_go_on(backend):
    running, other = (Stream(backend, request(prompt, ENDLESS, max_new_tokens=None)).writes() for prompt in ("Once", "Twice"))
    last = other.stop()[-1]
    assert last.finish_reason == "cancelled" and last.completion_tokens == len(tokens_of(other.chunks)) > 0 and last.timings
    seen = len(running.chunks)
    assert backend.encode("counted while a reply is written")
    wait_for(lambda: len(running.chunks) > seen)
    running.stop()


@real_engine
def test_a_cancelled_request_costs_nothing_later(backend):
    token = CancelToken()
    token.cancel()
    chunks = run(backend, "Once", cancel=token)
    assert [chunk.finish_reason for chunk in chunks] == ["cancelled"] and backend.embed(["a"], token).vectors == ()
    wait_for(lambda: backend.stats().busy_sequences == backend.stats().waiting == 0)


# --- death --------------------------------------------------------------------------------------------------------------------------


class Totals:
    """Looks at the totals all the time; they must never go back."""

    NAMES = [field.name for field in fields(EngineStats)][[field.name for field in fields(EngineStats)].index("prompt_tokens") :]

    def __init__(self, backend: LlamaCppBackend) -> None:
        self._backend = backend
        self._over = threading.Event()
        self._task = Task(self._look)

    def _look(self) -> None:
        before = EngineStats()
        while not self._over.wait(0.001):
            now = self._backend.stats()
            for name in self.NAMES:
                if name != "finished":
                    assert getattr(now, name) >= getattr(before, name), name
            assert all(now.finished.get(reason, 0) >= count for reason, count in before.finished.items())
            before = now

    def stop(self) -> None:
        self._over.set()
        self._task.result()


def load_of_four(backend: LlamaCppBackend, until: threading.Event) -> list[Task]:
    """Four threads that send requests until told to stop. Each gives how many of them ended well, and the errors of the others."""

    def ask(number: int) -> tuple[int, list[str]]:
        well, died = 0, []
        while not until.is_set():
            try:
                ended = run(backend, f"Story {number}: " + "foxes and hens " * 20, ENDLESS, max_new_tokens=40, client=str(number))
                assert ended[-1].finish_reason == "length" and ended[-1].completion_tokens == 40
                well += 1
            except EngineDied as error:
                died.append(str(error))
        return well, died

    return [Task(ask, number) for number in range(4)]


@real_engine
@needs_signals
def test_kill_under_load_is_told_to_all_and_service_comes_back(dense):
    backend, over = load(dense), threading.Event()
    totals, pids = Totals(backend), []
    try:
        tasks = load_of_four(backend, over)
        for deaths in (1, 2, 3):
            wait_for(lambda: backend.alive() and backend.stats().busy_sequences and backend.pid not in pids)
            pids.append(backend.pid)
            os.kill(pids[-1], signal.SIGKILL)
            wait_for(lambda died=deaths: backend.alive() and backend.stats().restarts == died)
        over.set()
        ends = [task.result() for task in tasks]
        assert all(well and len(died) <= 3 for well, died in ends)
        errors = [error for _, died in ends for error in died]
        assert errors and all("signal 9" in error and "Your text is kept" in error for error in errors)
        totals.stop()
        assert run(backend, "Hello", max_new_tokens=2)[-1].finish_reason == "length" and len(set(pids)) == 3
    finally:
        over.set()
        pids.append(backend.pid)
        backend.unload()
    assert all(map(gone, pids))


@real_engine
@needs_signals
def test_the_engine_comes_back_although_nobody_asks_and_is_the_same(starter_model):
    seen: list[float] = []
    backend = load(starter_model, lambda fraction, _words: seen.append(fraction))
    try:
        wanted = run(backend, "The fox", logprobs=2)
        pid = backend.pid
        seen.clear()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not backend.alive())
        assert backend.memory() == 0 or backend.pid != pid
        wait_for(backend.alive)
        assert gone(pid) and seen[-1] == 1.0 and backend.pid != pid and backend.stats().restarts == 1
        assert not differ(wanted, run(backend, "The fox"), NEAR_IN_STARTER)
    finally:
        pid = backend.pid
        backend.unload()
    assert gone(pid)


@real_engine
@needs_signals
def test_a_frozen_engine_does_not_keep_anybody_waiting(dense):
    backend = load(dense, engine_timeout=2, ctx_size=2**16)  # so many cells that no reply is full before the engine is stopped
    try:
        streams = [Stream(backend, request(f"{n}", ENDLESS, max_new_tokens=None)).writes() for n in range(4)]
        pid, began = backend.pid, time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)  # until then it would answer
        count = Task(backend.encode, "x")  # at once: once the engine is back, it would be answered
        token = CancelToken()
        token.cancel()
        assert run(backend, "x", cancel=token)[-1].finish_reason == "cancelled"  # Stop works although nobody answers
        for task in (*(stream.task for stream in streams), count):
            with pytest.raises(EngineDied, match=r"did not answer for 2 seconds"):
                task.result(10)
            assert task.ended_at - began < 2 + 4
        assert run(backend, "The fox", max_new_tokens=1)[-1].finish_reason == "length" and gone(pid)
        assert backend.stats().restarts == 1
    finally:
        backend.unload()


@real_engine
@needs_signals
def test_a_frozen_engine_that_nobody_waits_for_is_left_alone(dense):
    backend = load(dense, engine_timeout=2)
    try:
        pid = backend.pid
        os.kill(pid, signal.SIGSTOP)
        time.sleep(3)  # more than the timeout: that nothing happens cannot be waited for
        os.kill(pid, signal.SIGCONT)
        assert run(backend, "The fox", max_new_tokens=1)[-1].finish_reason == "length" and backend.pid == pid
    finally:
        backend.unload()


def test_pauses_grow_up_to_half_a_minute():
    assert [client.pause_before(start) for start in (1, 2, 3, 4, 8, 100)] == [0, 0.5, 1, 2, 30, 30]


@real_engine
@needs_signals
def test_a_start_that_fails_is_tried_again_with_growing_pauses(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.3)
    path = tmp_path / "moved.gguf"
    path.symlink_to(dense)
    starts: list[float] = []
    failures: list[float] = []
    backend = load(path, lambda fraction, _words: starts.append(time.monotonic()) if fraction == 0.0 else None)
    start = backend.start

    def noted(cancel: CancelToken) -> None:
        try:
            start(cancel)
        except ModelError:
            failures.append(time.monotonic())
            raise

    monkeypatch.setattr(backend, "start", noted)
    try:
        starts.clear()
        path.unlink()
        os.kill(backend.pid, signal.SIGKILL)
        wait_for(lambda: not backend.alive())
        with pytest.raises(EngineDied, match="could not be started again"):  # it waits for the first attempt
            Task(run, backend, "x").result()
        wait_for(lambda: len(failures) >= 4)
        for ask in (lambda: backend.encode("x"), lambda: run(backend, "x"), lambda: backend.embed(["x"], CancelToken())):
            with pytest.raises(EngineDied, match="could not be started again"):
                ask()
        pauses = [start - failure for failure, start in zip(failures, starts[1:], strict=False)]
        assert all(pause >= client.pause_before(start) for start, pause in enumerate(pauses, 2))
        assert not backend.alive() and backend.memory() == 0
        path.symlink_to(dense)
        wait_for(backend.alive)
        assert run(backend, "x", max_new_tokens=1)[-1].finish_reason == "length"
    finally:
        backend.unload()


@real_engine
@needs_signals
def test_unload_during_a_pause_or_a_start_ends_the_attempts(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 30.0)
    path = tmp_path / "moved.gguf"
    path.symlink_to(dense)
    seen: list[Callable[[], None]] = []
    before = set(psutil.Process().children())
    backend = load(path, lambda _fraction, _words: [act() for act in seen])
    path.unlink()
    os.kill(backend.pid, signal.SIGKILL)
    wait_for(lambda: not backend.alive())
    with pytest.raises(EngineDied):
        Task(run, backend, "x").result()
    assert [thread for thread in threading.enumerate() if thread.name == "engine-start"]
    backend.unload()
    wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name == "engine-start"], 5)
    with pytest.raises(NoModel):
        run(backend, "x")

    backend = load(dense, lambda _fraction, _words: [act() for act in seen])
    seen[:] = [backend.unload]
    os.kill(backend.pid, signal.SIGKILL)
    wait_for(lambda: not backend.alive())
    with pytest.raises((NoModel, EngineDied)):
        Task(run, backend, "x").result()
    wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name == "engine-start"])
    assert set(psutil.Process().children()) == before


@real_engine
@needs_signals
def test_who_waits_for_a_start_can_stop_waiting(dense):
    began, go_on = threading.Event(), threading.Event()
    go_on.set()

    def progress(_fraction: float, _words: str) -> None:
        began.set()
        go_on.wait(20)

    backend = load(dense, progress)
    try:
        began.clear()
        go_on.clear()
        os.kill(backend.pid, signal.SIGKILL)
        assert began.wait(20)
        token = CancelToken()
        waiting = Task(run, backend, "x", cancel=token)
        threading.Timer(0.1, token.cancel).start()
        assert [chunk.finish_reason for chunk in waiting.result(5)] == ["cancelled"]
        go_on.set()
        assert run(backend, "x", max_new_tokens=1)[-1].finish_reason == "length"  # that one's Stop has stopped nobody else
    finally:
        go_on.set()
        backend.unload()


@real_engine
@needs_signals
def test_a_death_between_loading_and_being_known_is_noticed(dense, monkeypatch):
    reload_adapters = LlamaCppBackend._reload_adapters

    def and_die(self: LlamaCppBackend, loaded: Connection) -> None:
        monkeypatch.setattr(LlamaCppBackend, "_reload_adapters", reload_adapters)
        os.kill(loaded.pid, signal.SIGKILL)
        wait_for(lambda: not loaded.alive)

    monkeypatch.setattr(LlamaCppBackend, "_reload_adapters", and_die)
    backend = load(dense)
    try:
        assert run(backend, "x", max_new_tokens=1)[-1].finish_reason == "length" and backend.stats().restarts == 1
    finally:
        backend.unload()


PARENT = """
import sys, time
from pathlib import Path
from modules.backends.base import CancelToken, GenerationRequest
from modules.backends.llama_cpp import LOADER
backend = LOADER.load(Path(sys.argv[1]), LOADER.options.build({"ctx_size": 2048, "threads": 1, "threads_batch": 1}), lambda f, w: None, CancelToken())
stream = backend.generate(GenerationRequest("A long story of foxes. " * 300))
next(stream)
print(backend.pid, flush=True)
list(stream)
"""


@real_engine
@needs_signals
def test_the_engine_ends_when_its_parent_is_killed(starter_model):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(starter_model)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())  # it is in the middle of a prompt
    assert is_alive(pid)
    parent.kill()
    parent.wait(10)
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while is_alive(pid) and not is_zombie(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(pid) or is_zombie(pid)  # a container without an init does not reap orphans


@real_engine
def test_ctrl_c_at_the_terminal_does_not_end_the_engine(backend):
    if sys.platform != "win32":
        os.kill(backend.pid, signal.SIGINT)
    assert run(backend, "The fox", max_new_tokens=2)[-1].finish_reason == "length"


# --- files --------------------------------------------------------------------------------------------------------------------------


@real_engine
@pytest.mark.parametrize("share", [0.0, 1e-7, 1e-4, 0.01, 0.05, 0.5, 0.999])
def test_truncated_models_are_named(starter_model, tmp_path, share):
    path = tmp_path / "cut.gguf"
    with starter_model.open("rb") as whole:
        path.write_bytes(whole.read(int(starter_model.stat().st_size * share)))
    with pytest.raises(ModelError, match=r"cut\.gguf .* again"):
        load(path)


def test_other_files_are_named(tmp_path):
    (tmp_path / "picture.gguf").write_bytes(b"\x89PNG" * 100)
    (tmp_path / "empty").mkdir()
    for name, words in (("picture.gguf", "not a GGUF file"), ("none.gguf", "no file"), ("empty", "exactly one GGUF model")):
        with pytest.raises(ModelError, match=words):
            load(tmp_path / name)


@real_engine
def test_a_header_that_llama_cpp_refuses_is_explained_by_it(starter_model, tmp_path):
    path = tmp_path / "odd.gguf"
    content = starter_model.read_bytes()
    path.write_bytes(content.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0zzama", 1))
    with pytest.raises(ModelError, match="does not know the architecture 'zzama'"):
        load(path)


@real_engine
def test_loading_can_be_cancelled(starter_model):
    token = CancelToken()
    with pytest.raises(ModelError, match="Loading was cancelled"):
        load(starter_model, lambda _fraction, _words: token.cancel(), token)


@real_engine
def test_an_engine_that_dies_while_loading_is_a_model_error(starter_model, monkeypatch):
    def stillborn(**values) -> Connection:
        return Connection((sys.executable, "-c", "import os; os.abort()"), **values)

    monkeypatch.setattr(client, "Connection", stillborn)
    with pytest.raises(ModelError, match=r"could not be loaded: The engine stopped unexpectedly \(signal 6"):
        load(starter_model)


# --- the connection without a model -------------------------------------------------------------------------------------------------


def test_a_command_that_is_no_engine():
    with pytest.raises(ModelError, match="could not be started"):
        Connection(("/nowhere/python",))
    noisy = Connection((sys.executable, "-c", "print('hello, this is no frame at all')"))
    with pytest.raises(EngineDied, match="exit code 0"):
        noisy.call("ping", {}).last()
    noisy.close(EngineDied("over"))
    assert not noisy.alive
    with pytest.raises(EngineDied):
        noisy.call("ping", {})


def test_a_process_that_dies_at_once_never_leaves_a_caller_waiting():
    for _ in range(15):  # the threads race with the death
        with pytest.raises(EngineDied, match="exit code 3"):
            Connection((sys.executable, "-S", "-c", "import os; os._exit(3)")).call("ping", {}).last()


def test_close_forces_a_process_that_does_not_listen():
    deaf = Connection((sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"))
    call = deaf.call("ping", {})
    deaf.close(EngineDied("over"), patience=0.3)
    with pytest.raises(EngineDied, match="over"):
        call.last()
    assert gone(deaf.pid)


class Silent:
    """Stands for a connection; keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Frame] = []

    def send(self, frame: Frame) -> None:
        self.sent.append(frame)

    def forget(self, call: Call) -> None:
        pass


def test_chunks_that_nobody_fetches_are_merged():
    call = Call(Silent(), 1)
    for number in range(1000):
        call.put(Frame("chunk", 1, {"tokens": [number], "done": number + 1}, b"x"))
    call.put(Frame("end", 1, {"reason": "stop"}))
    frames = list(call.frames())
    assert len(frames) <= connection.MERGE_FROM + 1 and frames[-1].kind == "end"
    assert [token for frame in frames[:-1] for token in frame.fields["tokens"]] == list(range(1000))
    assert b"".join(frame.raw for frame in frames) == b"x" * 1000 and frames[-2].fields["done"] == 1000


def test_totals_of_a_life_in_which_nothing_was_finished():
    ended = {"steps": 3, "finished": {"stop": 2}}
    for former, now in (({"finished": {}}, {}), ({}, {"finished": {}}), ({"finished": {}}, {"finished": {}})):
        assert client._added(former, now) == {"finished": {}}
    assert client._added({"finished": {}}, ended) == client._added(ended, {}) == ended
    assert client._added(ended, ended) == {"steps": 6, "finished": {"stop": 4}}


def test_merge_keeps_what_only_one_has():
    joined = merge(Frame("chunk", 1, {"prompt": 5, "prefill": 5}), Frame("chunk", 1, {"tokens": [1], "logprobs": [[1]], "done": 1}, b"a"))
    assert joined == Frame("chunk", 1, {"prompt": 5, "prefill": 5, "tokens": [1], "logprobs": [[1]], "done": 1}, b"a")


def test_a_cancelled_call_gives_up_on_a_slow_engine_and_cancels_once():
    silent = Silent()
    call = Call(silent, 9)
    call.cancel()
    call.close()
    assert list(call.frames(patience=0.05)) == [] and silent.sent == [Frame("cancel", 9)]
    with pytest.raises(EngineDied):
        call.last()


def test_a_call_that_ended_is_not_cancelled():
    silent = Silent()
    call = Call(silent, 9)
    call.put(Frame("error", 9, {"kind": "Unheard", "message": "of"}))
    call.close()
    with pytest.raises(ModelError, match="of"):
        call.last()
    assert silent.sent == []


def test_words_and_environment():
    assert exit_words(3) == "exit code 3" and exit_words(-11) == "signal 11, SIGSEGV" and exit_words(-200) == "signal 200"
    made = environment({"PATH": "/bin", "PYTHONPATH": "/evil", "PYTHONSAFEPATH": "1"})
    assert made["PYTHONPATH"] == str(ROOT) and "PYTHONSAFEPATH" not in made and made["PATH"] == "/bin"


def test_the_loader_costs_nothing_and_knows_its_files(tmp_path):
    code = "import sys, modules.backends.llama_cpp, modules.backends.llama_cpp.client; print([m for m in ('llama_cpp', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"
    assert LOADER.detect(tmp_path / "x.GGUF") and not LOADER.detect(tmp_path / "x.bin") and not LOADER.detect(tmp_path)
    (tmp_path / "m.gguf").touch()
    assert LOADER.detect(tmp_path)
    with pytest.raises(SettingsError, match="60,40"):
        LOADER.options.build({"tensor_split": "60,x"})
    assert LOADER.options.build({"tensor_split": "60, 40"}).shares == (60.0, 40.0)
