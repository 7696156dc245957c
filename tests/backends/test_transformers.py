"""The Transformers loader with tiny models: what it writes equals the library, alone and among others."""

from __future__ import annotations

import gc
import io
import json
import math
import socket
import weakref

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from modules.backends.base import Adapter, CancelToken, GenerationRequest  # noqa: E402
from modules.backends.transformers import text as text_module  # noqa: E402
from modules.backends.transformers.decoders import AloneDecoder, PackedDecoder  # noqa: E402
from modules.backends.transformers.text import Text  # noqa: E402
from modules.errors import Busy, EngineDied, ModelError, NoModel, NotANumber, PromptError, PromptTooLong, SettingsError  # noqa: E402
from modules.samplers import NEUTRAL  # noqa: E402
from tests.backends import transformers_help as tiny  # noqa: E402
from tests.backends.llama_cpp_help import Stream, Task, dice, text_of, wait_for  # noqa: E402
from tests.backends.test_torch_samplers import EXTREME  # noqa: E402
from tests.backends.transformers_help import ENDLESS, GREEDY, TINY, VOCABULARY, load, run, tokens_of  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tiny.llama(), tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def plain(folder):
    """The same weights in the library's own hands."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def backend(folder):
    made = load(folder)
    yield made
    made.unload()


KINDS = {
    "sliding": lambda: MistralForCausalLM(MistralConfig(**TINY, sliding_window=6)),
    "eager": lambda: Gemma2ForCausalLM(Gemma2Config(**TINY, head_dim=12, sliding_window=6)),
    "recurrent": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def other(request, tmp_path_factory):
    """Models that are not plain attention: (the library's, ours)."""
    torch.manual_seed(3)
    model = KINDS[request.param]().eval()
    made = load(tiny.save(model, tmp_path_factory.mktemp("models") / request.param))
    yield model, made
    made.unload()


# --- what it writes ---------------------------------------------------------------------------------------------------------------------


def test_greedy_equals_the_librarys_generate(backend, plain):
    for prompt in ("Hello, you", "a", "Once upon a time " * 8):
        assert tokens_of(run(backend, prompt, max_new_tokens=30)) == tiny.library_greedy(plain, backend.encode(prompt), 30)


def test_other_architectures_equal_it_too(other):
    model, made = other
    prompt = "It was a dark and stormy night"
    assert tokens_of(run(made, prompt, max_new_tokens=20)) == tiny.library_greedy(model, made.encode(prompt), 20)
    assert tokens_of(run(made, prompt, max_new_tokens=20)) == tiny.library_greedy(model, made.encode(prompt), 20), "the second time from the cache"


def test_several_at_once_write_what_each_writes_alone(backend, plain):
    prompts = [f"{'word ' * n}number {n}" for n in range(9)]
    tasks = [Task(run, backend, prompt, max_new_tokens=10 + n) for n, prompt in enumerate(prompts)]
    for n, (prompt, task) in enumerate(zip(prompts, tasks, strict=True)):
        assert tokens_of(task.result()) == tiny.library_greedy(plain, backend.encode(prompt), 10 + n)


def test_other_architectures_at_once(other):
    model, made = other
    tasks = [Task(run, made, f"This is {n}") for n in range(3)]
    for n, task in enumerate(tasks):
        assert tokens_of(task.result()) == tiny.library_greedy(model, made.encode(f"This is {n}"), 12)


def test_several_are_computed_in_one_step(folder):
    """Streams that overlap take fewer steps than one after the other would."""
    made = load(folder, parallel=4)
    streams = [Stream(made, tiny.request(f"Say {n}", max_new_tokens=200)) for n in range(4)]
    assert all(stream.result()[-1].completion_tokens == 200 for stream in streams)
    assert made.stats().steps < 600
    made.unload()


def test_a_seed_gives_the_same_alone_and_among_others(backend):
    sampling = ENDLESS.replace({"temperature": 1, "top_p": 0.9})
    alone = [tokens_of(run(backend, sampling=sampling, seed=seed, logit_bias=dice(range(70, 80)))) for seed in range(4)]
    assert len({tuple(tokens) for tokens in alone}) == 4
    tasks = [Task(run, backend, sampling=sampling, seed=seed, logit_bias=dice(range(70, 80))) for seed in range(4)]
    assert [tokens_of(task.result()) for task in tasks] == alone


def test_probabilities_equal_the_librarys_forward_pass(backend, plain):
    prompt = backend.encode("Probabilities of this")
    chunks = run(backend, tuple(prompt), logprobs=VOCABULARY, prompt_logprobs=3, sampling=ENDLESS.replace({"repetition_penalty": 1.5}))
    tokens = prompt + tokens_of(chunks)
    wanted = tiny.library_logprobs(plain, tokens)
    entries = [entry for chunk in chunks for entry in (*chunk.prompt_logprobs, *chunk.logprobs)]
    assert [entry.token for entry in entries] == tokens[1:]
    for row, entry in zip(wanted, entries, strict=False):
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)
        assert entry.top[0][0] == int(row.argmax())
    whole = entries[-1].top
    assert len(whole) == VOCABULARY and sum(math.exp(value) for _, _, value in whole) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", EXTREME)
def test_every_sampler_works_within_the_engine(backend, name):
    chunks = run(backend, "abcabcab", sampling=NEUTRAL.replace({name: EXTREME[name], "ban_eos_token": True}), seed=3, max_new_tokens=4)
    assert chunks[-1].completion_tokens == 4


def test_what_one_request_asks_for_ends_no_other(backend, monkeypatch):
    other = Stream(backend, tiny.request("the other", max_new_tokens=100)).writes()
    monkeypatch.setattr("modules.backends.torch_samplers.tfs", lambda *_: 1 / 0)
    with pytest.raises(ModelError, match="could not be chosen"):
        run(backend, sampling=NEUTRAL.replace({"tfs": 0.5}))
    assert other.result()[-1].completion_tokens == 100


def test_text_streams_in_whole_characters(backend):
    fox = backend.encode("🦊é")
    sampling = GREEDY.replace({"grammar_string": 'root ::= "🦊é" "!"'})
    chunks = run(backend, sampling=sampling)
    assert text_of(chunks) == "🦊é!" and tokens_of(chunks)[: len(fox)] == fox and not any("\ufffd" in chunk.text for chunk in chunks)
    cut = run(backend, sampling=sampling, max_new_tokens=2)
    assert text_of(cut) == "\ufffd" and cut[-1].finish_reason == "length"


def test_special_tokens_are_shown_when_wanted(backend):
    (token,) = backend.encode("<|user|>")
    bias = ((token, 1000.0),)
    assert text_of(run(backend, max_new_tokens=2, logit_bias=bias)) == ""
    assert text_of(run(backend, max_new_tokens=2, logit_bias=bias, sampling=ENDLESS.replace({"skip_special_tokens": False}))) == "<|user|><|user|>"


def test_markers_are_text_though_they_are_special(monkeypatch):
    tokens = list(tiny.byte_tokenizer()("<|user|>a<s><image>")["input_ids"])
    assert Text(tiny.byte_tokenizer(), VOCABULARY).decode(tokens, special=False) == "a"
    monkeypatch.setattr(text_module, "MARKERS", ("<|user|>", "a"))
    text = Text(tiny.byte_tokenizer(), VOCABULARY)
    assert text.decode(tokens, special=False) == "<|user|>a"
    assert text.decode(tokens) == "<|user|>a<s><image>"


def test_it_ends_by_itself(backend):
    chunks = run(backend, sampling=GREEDY, logit_bias=((1, 1000.0),))
    assert chunks[-1].finish_reason == "stop" and chunks[-1].completion_tokens == 0


# --- the cache --------------------------------------------------------------------------------------------------------------------------


def test_the_next_turn_reads_only_what_is_new(backend, plain):
    first = "A first message that is long enough to be worth something. "
    chunks = run(backend, first)
    history = backend.encode(first) + tokens_of(chunks)
    second = (*history, *backend.encode(" And a second one."))
    found = run(backend, tuple(second))
    assert found[-1].timings.reused_tokens == len(history) - 1
    assert tokens_of(found) == tiny.library_greedy(plain, list(second), 12)
    changed = (*history[:40], *backend.encode("something else"))
    again = run(backend, tuple(changed))
    assert again[-1].timings.reused_tokens >= 40 and tokens_of(again) == tiny.library_greedy(plain, list(changed), 12)


def test_a_copied_beginning_leaves_the_other_chat_as_it_was(backend, plain):
    start = backend.encode("The same beginning of two chats. ")
    chats = [start + backend.encode(letter * 80) for letter in "ab"]
    for chat in (*chats, *chats):
        found = run(backend, tuple(chat))
        assert tokens_of(found) == tiny.library_greedy(plain, chat, 12)
    assert found[-1].timings.reused_tokens == len(chats[1]) - 1


def test_what_cannot_be_cut_back_is_used_only_where_it_ends(other):
    model, made = other
    prompt = made.encode("Some text that is long enough to be kept for later.")
    first = run(made, tuple(prompt))
    whole = prompt + tokens_of(first)
    longer = [*whole, *made.encode(" More.")]
    found = run(made, tuple(longer))
    assert found[-1].timings.reused_tokens == len(whole) - 1 and tokens_of(found) == tiny.library_greedy(model, longer, 12)
    other_end = [*prompt[:20], *made.encode("different")]
    found = run(made, tuple(other_end))
    assert tokens_of(found) == tiny.library_greedy(model, other_end, 12)
    decoder = made._engine._decoder
    assert found[-1].timings.reused_tokens == (20 if decoder.croppable else 0)


def test_what_is_kept_is_bounded(folder):
    made = load(folder, kept_tokens=100)
    for n in range(8):
        run(made, f"{n} is the number of this prompt, which is kept")
    stats = made.stats()
    assert 0 < stats.cached_sequences <= 2 and stats.cells_used <= 100 and stats.evictions >= 5
    made.unload()


def test_a_full_context_ends_with_length(backend):
    chunks = run(backend, tuple(backend.encode("x" * 250)), max_new_tokens=None)
    assert chunks[-1].finish_reason == "length" and chunks[-1].completion_tokens == 6


def test_a_very_long_prompt_is_refused_before_it_is_tokenised(backend, monkeypatch):
    monkeypatch.setattr(backend._text, "encode", None)
    with pytest.raises(PromptTooLong, match="30000000 characters"):
        run(backend, "x" * 30_000_000)


def test_a_tokenizer_with_more_tokens_than_the_model_is_noticed(tmp_path):
    made = load(tiny.save(tiny.llama(vocab_size=90), tmp_path / "small"))
    with pytest.raises(PromptError, match="its tokens are 0 to 89"):
        run(made, "~")
    assert run(made, "!")[-1].finish_reason == "length"
    made.unload()


# --- many at once -----------------------------------------------------------------------------------------------------------------------


def test_a_full_queue_is_said_at_once(folder):
    made = load(folder, parallel=1, max_queue=1)
    running = Stream(made, tiny.request("first", max_new_tokens=None)).writes()
    waiting = Stream(made, tiny.request("second", max_new_tokens=2)).waits()
    with pytest.raises(Busy) as refused:
        run(made, "third")
    assert refused.value.retry_after > 0
    running.stop()
    assert waiting.result()[-1].completion_tokens == 2
    made.unload()


def test_clients_take_turns(folder):
    made = load(folder, parallel=2)
    running = [Stream(made, tiny.request(f"{n}", max_new_tokens=None, client="greedy")).writes() for n in range(2)]
    third = Stream(made, tiny.request("c", max_new_tokens=None, client="greedy")).waits()
    modest = Stream(made, tiny.request("d", max_new_tokens=2, client="modest")).waits()
    running[0].stop()
    assert modest.result()[-1].finish_reason == "length" and not third.chunks[-1].finish_reason
    running[1].stop()
    third.stop()
    made.unload()


def test_cancel_takes_effect_within_a_step(backend):
    stream = Stream(backend, tiny.request(max_new_tokens=None)).writes()
    steps = backend.stats().steps
    chunks = stream.stop()
    assert chunks[-1].finish_reason == "cancelled"
    wait_for(lambda: backend.stats().busy_sequences == 0)
    assert backend.stats().steps >= steps and chunks[-1].completion_tokens < 246


def test_reading_a_long_prompt_does_not_stop_others(folder):
    made = load(folder, batch_size=16, ctx_size=512)
    writer = Stream(made, tiny.request(max_new_tokens=None)).writes()
    reader = Stream(made, tiny.request("long " * 80, max_new_tokens=2))
    reader.result()
    began, ended = reader.times[0], reader.first_token
    assert sum(began <= at <= ended for at in writer.times) >= 400 // 16 - 2
    writer.stop()
    made.unload()


def test_prefill_gives_way(backend):
    long = GenerationRequest("z" * 200, ENDLESS)
    backend.prefill(long)
    assert list(backend.generate(tiny.request("z" * 200, max_new_tokens=1)))[-1].timings.reused_tokens == 199
    token = CancelToken()
    token.cancel()
    backend.prefill(GenerationRequest("y" * 200, ENDLESS, cancel=token))
    assert backend.stats().busy_sequences == 0


# --- guessing ahead, guidance, grammars -------------------------------------------------------------------------------------------------


def test_prompt_lookup_changes_nothing_but_the_steps(backend, plain):
    prompt = "one two three four five. one two three four five. one two"
    sampling = ENDLESS.replace({"prompt_lookup_num_tokens": 4})
    chunks = run(backend, prompt, sampling=sampling, max_new_tokens=60)
    assert tokens_of(chunks) == tiny.library_greedy(plain, backend.encode(prompt), 60)
    drawn = ENDLESS.replace({"temperature": 1})
    bias = dice(range(70, 73))
    wanted = tokens_of(run(backend, prompt, sampling=drawn, seed=4, logit_bias=bias, max_new_tokens=60))
    found = run(backend, prompt, sampling=drawn.replace({"prompt_lookup_num_tokens": 4}), seed=4, logit_bias=bias, max_new_tokens=60)
    assert tokens_of(found) == wanted and 0 < found[-1].timings.accepted_tokens < found[-1].timings.draft_tokens
    after = run(backend, tuple(backend.encode(prompt) + tokens_of(found)), max_new_tokens=20)
    assert tokens_of(after) == tiny.library_greedy(plain, backend.encode(prompt) + tokens_of(found), 20), "what was guessed wrong is not kept"


def test_a_draft_model_changes_nothing(folder, plain, tmp_path):
    same = load(folder, model_draft=str(folder), draft_max=4)
    chunks = run(same, max_new_tokens=40)
    assert tokens_of(chunks) == tiny.library_greedy(plain, same.encode("Hello, you"), 40)
    assert chunks[-1].timings.accepted_tokens == chunks[-1].timings.draft_tokens >= 25
    assert same.stats().steps <= 12
    same.unload()
    stranger = tiny.save(tiny.llama(9), tmp_path / "draft")
    different = load(folder, model_draft=str(stranger))
    chunks = run(different, max_new_tokens=40)
    assert tokens_of(chunks) == tiny.library_greedy(plain, different.encode("Hello, you"), 40)
    assert chunks[-1].timings.accepted_tokens < chunks[-1].timings.draft_tokens
    different.unload()


def test_guidance_equals_the_librarys(backend, plain):
    prompt, negative = backend.encode("Tell me a tale"), "Something else that is longer than it"
    asked = torch.tensor([prompt])
    found = plain.generate(
        asked, attention_mask=torch.ones_like(asked), max_new_tokens=10, do_sample=False, suppress_tokens=[1], pad_token_id=1,
        guidance_scale=1.5, negative_prompt_ids=torch.tensor([backend.encode(negative)]),
    )  # fmt: skip
    sampling = ENDLESS.replace({"guidance_scale": 1.5, "negative_prompt": negative})
    assert tokens_of(run(backend, tuple(prompt), sampling=sampling, max_new_tokens=10)) == found[0, len(prompt) :].tolist()


SCHEMA = '{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": false}'


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"sampling": GREEDY.replace({"grammar_string": 'root ::= ("yes" | "no") [a-c]{2}'})}, r"(yes|no)[a-c]{2}"),
        ({"json_schema": SCHEMA}, r'\{\s*"a"\s*:\s*(true|false)\s*\}'),
    ],
)  # fmt: skip
def test_grammars_and_schemas_are_followed(backend, values, wanted):
    import re

    chunks = run(backend, max_new_tokens=200, **{"sampling": GREEDY, **values})
    assert chunks[-1].finish_reason in ("stop", "length")
    if chunks[-1].finish_reason == "stop":
        assert re.fullmatch(wanted, text_of(chunks))


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"enum": ["a\n", "\x01", "😀", 'q"\\']}, ["a\n", "\x01", "😀", 'q"\\'], ["a", "\ufffd"]),
        *(({"properties": {n: {"const": 1}}, "type": "object", "required": [n]}, [{n: 1}], [{n: 2}, {}, True]) for n in ("", "\x00", "$ref", "😀")),
        ({"type": "object", "properties": {"n": {"$ref": "#"}}, "additionalProperties": False}, [{"n": {"n": {}}}], [{"n": 1}]),
        ({"type": "object", "properties": {"a": False}}, [{}], [{"a": 1}]),
        ({"$ref": "#/definitions/a~0~1b", "definitions": {"a~/b": {"const": 7}}}, [7], [8]),
    ],
)
def test_schemas_with_strange_names_and_references(schema, good, bad):
    from llguidance import LLMatcher, LLTokenizer

    from modules.backends.transformers.grammar import _of_schema

    bytes_ = LLTokenizer("byte")

    def follows(value) -> bool:
        raw = json.dumps(value, ensure_ascii=False).encode()
        matcher = LLMatcher(bytes_, _of_schema(json.dumps(schema)), log_level=0)
        return matcher.try_consume_tokens(bytes_.tokenize_bytes(raw)) == len(raw) and matcher.is_accepting()

    assert all(map(follows, good)) and not any(map(follows, bad))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sampling": GREEDY.replace({"grammar_string": "root ::= nothing"})}, "grammar"),
        ({"sampling": GREEDY.replace({"grammar_string": "((("})}, "grammar"),
        ({"json_schema": "{"}, "JSON schema"),
        ({"json_schema": '{"type": "nonsense"}'}, "JSON schema"),
        ({"json_schema": "{}", "sampling": GREEDY.replace({"grammar_string": 'root ::= "a"'})}, "both"),
        ({"sampling": GREEDY.replace({"grammar_string": "#" * 300_000})}, "smaller"),
    ],
)
def test_wrong_grammars_are_refused(backend, values, words):
    with pytest.raises(SettingsError, match=words):
        run(backend, **values)
    assert run(backend)[-1].finish_reason == "length"


# --- adapters ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    place = tmp_path_factory.mktemp("loras")
    return tiny.lora(tiny.llama(), place / "one", 1), tiny.lora(tiny.llama(), place / "two", 2)


def test_adapters_work_at_their_scale_and_leave_no_trace(backend, plain, loras):
    from peft import PeftModel

    prompt = backend.encode("With adapters or without")
    wanted = tiny.library_greedy(plain, prompt, 12)

    def found(*adapters):
        return tokens_of(run(backend, tuple(prompt), adapters=adapters))

    one, two = (PeftModel.from_pretrained(tiny.llama(), str(path)).eval() for path in loras)
    assert found() == wanted
    assert found(Adapter(loras[0])) == tiny.library_greedy(one, prompt, 12) != wanted
    assert found(Adapter(loras[1])) == tiny.library_greedy(two, prompt, 12) != wanted
    assert found() == wanted and found(Adapter(loras[0], 0.0)) == wanted
    halves = found(Adapter(loras[0], 0.5))
    for module in one.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling["default"] *= 0.5
    assert halves == tiny.library_greedy(one, prompt, 12)
    assert len({tuple(found(*some)) for some in ([], [Adapter(loras[0])], [Adapter(loras[0]), Adapter(loras[1])])}) == 3
    mixed = [(), (Adapter(loras[0]),), (Adapter(loras[1]),), (Adapter(loras[0], 0.5),)]
    alone = [found(*some) for some in mixed]
    tasks = [Task(run, backend, tuple(prompt), adapters=some) for some in mixed]
    assert [tokens_of(task.result()) for task in tasks] == alone
    assert set(backend.adapters) == {path.resolve() for path in loras}
    for path in loras:
        backend.unload_adapter(path)
    assert backend.adapters == () and found() == wanted
    assert not any("lora" in name for name, _ in backend._model.named_parameters())
    assert found(Adapter(loras[0])) != wanted, "it can be loaded again"
    backend.unload_adapter(loras[0])


def test_an_adapter_that_went_meanwhile_ends_its_own_reply_only(backend, loras, tmp_path, monkeypatch):
    backend.load_adapter(loras[0])
    other = Stream(backend, tiny.request("the other", max_new_tokens=150)).writes()
    monkeypatch.setattr(backend, "load_adapter", lambda _path: None)
    with pytest.raises(ModelError, match="not loaded any more"):
        run(backend, adapters=(Adapter(tmp_path / "gone"),))
    assert other.result()[-1].completion_tokens == 150
    backend.unload_adapter(loras[0])


def test_an_adapter_in_use_is_not_unloaded(backend, loras):
    stream = Stream(backend, tiny.request(max_new_tokens=None, adapters=(Adapter(loras[0]),))).writes()
    if not stream.chunks[-1].finish_reason:
        with pytest.raises(Busy):
            backend.unload_adapter(loras[0])
    stream.stop()
    wait_for(lambda: backend.stats().busy_sequences == 0)
    backend.unload_adapter(loras[0])
    backend.unload_adapter(loras[0])


def test_adapters_that_do_not_fit_are_refused(backend, plain, tmp_path):
    wider = tiny.lora(tiny.llama(hidden_size=64), tmp_path / "wider", 1)
    deeper = tiny.lora(tiny.llama(num_hidden_layers=3), tmp_path / "deeper", 1)
    empty = tmp_path / "empty"
    empty.mkdir()
    damaged = tiny.lora(tiny.llama(), tmp_path / "damaged", 1)
    weights = damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    strange = tiny.lora(tiny.llama(), tmp_path / "strange", 1)
    tiny.change_json(strange / "adapter_config.json", peft_type="PREFIX_TUNING")
    for path in (wider, deeper, empty, damaged, strange):
        with pytest.raises(ModelError):
            backend.load_adapter(path)
    assert backend.adapters == ()
    assert tokens_of(run(backend)) == tiny.library_greedy(plain, backend.encode("Hello, you"), 12)
    with pytest.raises(SettingsError, match="scale"):
        run(backend, adapters=(Adapter(tmp_path / "x", math.nan),))


# --- loading, faults, the end -----------------------------------------------------------------------------------------------------------


def test_numbers_that_are_none_end_the_reply_with_the_fix(folder):
    made = load(folder)
    made._model.lm_head.weight.data[5] = math.nan
    with pytest.raises(NotANumber, match="compute-dtype"):
        run(made)
    assert made.alive() and made.stats().busy_sequences == 0
    made.unload()


def test_a_fault_in_a_step_ends_its_replies_only(backend, monkeypatch):
    monkeypatch.setattr(backend._engine._decoder, "_model", None)
    with pytest.raises(ModelError, match="could not compute"):
        run(backend)
    monkeypatch.undo()
    assert run(backend)[-1].finish_reason == "length"


def test_when_memory_is_short_finished_chats_go_first(backend, monkeypatch):
    run(backend, "something that is kept for later")
    decoder = backend._engine._decoder
    real, failures = decoder.run, [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")]

    def scarce(parts):
        if failures:
            raise failures.pop()
        return real(parts)

    monkeypatch.setattr(decoder, "run", scarce)
    assert run(backend, "other")[-1].finish_reason == "length"
    failures += [RuntimeError("can't allocate memory")] * 2
    with pytest.raises(ModelError, match="ctx-size"):
        run(backend, "other")


def test_nothing_asks_the_network(folder, monkeypatch):
    def refuse(*_args, **_values):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    made = load(folder)
    run(made)
    made.unload()


def test_unloading_gives_everything_back(folder):
    made = load(folder)
    run(made)
    model, state = weakref.ref(made._model), weakref.ref(made._engine._kept._kept[0].state)
    stream = Stream(made, tiny.request(max_new_tokens=None)).writes()
    made.unload()
    with pytest.raises(EngineDied):
        stream.result()
    stream.task.error = None
    gc.collect()
    assert model() is None and state() is None and made.memory() == 0
    with pytest.raises(NoModel):
        run(made)


def test_stats_add_up(folder):
    made = load(folder)
    chunks = run(made, "twelve chars")
    stats = made.stats()
    assert (stats.prompt_tokens, stats.generated_tokens, stats.finished) == (12, 12, {"length": 1})
    assert stats.cells_used == 23 and stats.cached_sequences == 1 and stats.memory_bytes == made.memory() > 0
    assert stats.decode_seconds == pytest.approx(chunks[-1].timings.decode_seconds)
    made.unload()


def test_embeddings_are_the_mean_of_the_last_layer(backend, plain):
    tokens = backend.encode("Some words")
    found = backend.embed(["Some words"], CancelToken())
    with torch.inference_mode():
        mean = plain.model(input_ids=torch.tensor([tokens])).last_hidden_state[0].mean(0)
    assert torch.tensor(found.vectors[0]).tolist() == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)
    with pytest.raises(PromptError):
        backend.embed([""], CancelToken())


def test_an_encoder_decoder(tmp_path):
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, eos_token_id=1, pad_token_id=1, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    made = load(tiny.save(model, tmp_path / "t5"))
    prompt = made._text.with_ends("translate this")
    asked = torch.tensor([prompt])
    wanted = model.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=10, do_sample=False, suppress_tokens=[1])[0, 1:].tolist()
    assert tokens_of(run(made, "translate this", max_new_tokens=10)) == wanted
    tasks = [Task(run, made, "translate this", max_new_tokens=10) for _ in range(3)]
    assert [tokens_of(task.result()) for task in tasks] == [wanted] * 3
    assert len(made.embed(["x"], CancelToken()).vectors[0]) == 32
    made.unload()


def test_models_are_packed_where_they_can(backend, other):
    assert isinstance(backend._engine._decoder, PackedDecoder)
    kind = type(other[1]._engine._decoder)
    assert kind is (PackedDecoder if isinstance(other[0], MistralForCausalLM) else AloneDecoder)


def test_unloading_gives_memory_back_to_the_system(tmp_path):
    import psutil

    process = psutil.Process()
    folder = tiny.save(tiny.llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=8), tmp_path / "large")
    gc.collect()
    before = process.memory_info().rss
    made = load(folder)
    run(made, "x" * 200)
    weights, with_it = made.memory(), process.memory_info().rss
    assert weights > 100 << 20 and with_it - before > 0.8 * weights
    made.unload()
    assert process.memory_info().rss - before < 0.25 * weights


# --- images -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A tiny LLaVA with its processor: (the library's, its processor, ours)."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    tokenizer = tiny.byte_tokenizer()
    processor = LlavaProcessor(
        image_processor=clip.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16}
    eyes = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    torch.manual_seed(0)
    (marker,) = tokenizer.encode("<image>")
    config = LlavaConfig(vision_config=eyes, text_config=LlamaConfig(**TINY), image_token_id=marker, image_seq_length=4, vision_feature_layer=-1)
    model = LlavaForConditionalGeneration(config).eval()
    folder = tmp_path_factory.mktemp("models") / "tiny-llava"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    made = load(folder)
    yield model, processor, made
    made.unload()


def picture(colour):
    from PIL import Image

    return Image.new("RGB", (40, 20), colour)


def png(colour):
    data = io.BytesIO()
    picture(colour).save(data, "PNG")
    return data.getvalue()


def test_images_are_seen_as_the_library_sees_them(seeing):
    model, processor, made = seeing
    assert "images" in made.features
    said = []
    for colours in (["red"], ["blue"], ["red", "blue"]):
        asked = processor(
            text=["Look: " + "<image>" * len(colours) + " what?"], images=[picture(c) for c in colours], return_tensors="pt", add_special_tokens=False
        )
        wanted = model.generate(**asked, max_new_tokens=12, do_sample=False, suppress_tokens=[1], pad_token_id=1)
        prompt = "Look: " + made.image_marker * len(colours) + " what?"
        chunks = run(made, prompt, images=tuple(png(c) for c in colours))
        assert tokens_of(chunks) == wanted[0, asked["input_ids"].shape[1] :].tolist()
        said.append(tokens_of(chunks))
    assert said[0] != said[1]
    assert run(made, "no image at all")[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "images"),
    [
        ("{}", [b"no image"]),
        ("{}{}", ["red"]),
        ("none", ["red"]),
        ("{} <image>", ["red"]),
        ((1, 2), ["red"]),
        ("{}", [b"\x89PNG\r\n\x1a\n" + b"\0" * 50]),
    ],
)
def test_wrong_images_are_refused(seeing, prompt, images):
    made = seeing[2]
    text = prompt.replace("{}", made.image_marker) if isinstance(prompt, str) else prompt
    with pytest.raises(PromptError):
        run(made, text, images=tuple(png(each) if isinstance(each, str) else each for each in images))


def test_a_model_that_only_reads_refuses_images(backend):
    with pytest.raises(ModelError, match="cannot see images"):
        run(backend, "x", images=(png("red"),))
