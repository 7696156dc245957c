"""The engine's parts inside this process: the model, the native chain, jobs on the real model, and the engine over two pipes."""

from __future__ import annotations

import ctypes
import io
import itertools
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from modules.backends.base import Adapter, GenerationRequest
from modules.backends.llama_cpp.client import _asked
from modules.backends.llama_cpp.options import DEFAULT_CONTEXT, LlamaCppOptions
from modules.backends.llama_cpp.protocol import Frame, encode, pack_tokens, read_frame, unpack_floats, unpack_tokens
from modules.backends.llama_cpp.samplers import chain_plan
from modules.errors import Busy, ModelError, SettingsError, UserError
from modules.markers import MARKERS
from modules.samplers import NEUTRAL

lib = pytest.importorskip("llama_cpp.llama_cpp")
pytest.importorskip("gguf")

from modules.backends.llama_cpp import engine as engine_module  # noqa: E402
from modules.backends.llama_cpp import jobs as jobs_module  # noqa: E402
from modules.backends.llama_cpp import model as model_module  # noqa: E402
from modules.backends.llama_cpp.cache import Cache  # noqa: E402
from modules.backends.llama_cpp.engine import Engine, Outlet, memory_in_use, spill_bytes  # noqa: E402
from modules.backends.llama_cpp.jobs import adapters_key, error_frame, make_job, prepare  # noqa: E402
from modules.backends.llama_cpp.model import Model, explain_adapter, explain_failure  # noqa: E402
from modules.backends.llama_cpp.scheduler import LOW, Computed, Row, Scheduler  # noqa: E402
from tests.backends import tiny_models  # noqa: E402

GREEDY = NEUTRAL.replace({"temperature": 0})
ENDLESS = GREEDY.replace({"ban_eos_token": True})

PROMPTS = (
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):\n",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "1, 2, 3, 4,",
    "Dear Sir or Madam,\n\n",
    "Die Katze sitzt auf",
    "The recipe needs",
    "🦊 is an emoji of",
    "Q: What is water?\nA:",
)


def options(**values) -> dict:
    chosen = LlamaCppOptions.build({"ctx_size": 512, "threads": 1, "threads_batch": 1, "batch_size": 64, "cache_ram": 0, **values})
    return {**chosen.model_dump(), "tensor_split": chosen.shares, "default_context": DEFAULT_CONTEXT, "markers": MARKERS}


@pytest.fixture(scope="module")
def model(starter_model: Path) -> Iterator[Model]:
    made = Model(str(starter_model), options(), lambda _fraction: None)
    yield made
    made.close()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.dense(tmp_path_factory.mktemp("models") / "dense.gguf")


@pytest.fixture(scope="module")
def small(dense: Path) -> Iterator[Model]:
    made = Model(str(dense), options(), lambda _fraction: None)
    yield made
    made.close()


def frame(id: int = 1, prompt: str | tuple[int, ...] = "Once upon a time", sampling=GREEDY, kind: str = "generate", **values) -> Frame:
    return Frame(kind, id, *_asked(GenerationRequest(prompt, sampling, **{"max_new_tokens": 8, "seed": 1, **values})))


def run(model: Model, *frames: Frame, parallel: int = 1) -> list[Frame]:
    """What is sent for `frames`, in an empty cache."""
    model.clear()
    sent: list[Frame] = []
    scheduler = Scheduler(model, Cache(model, model.context_length, model.sequences), parallel=parallel, prefill_share=0.5, cuts=model.cuts)
    for each in frames:
        job = make_job(each, model, sent.append)
        try:
            prepare(job, each, model)
        except UserError as error:
            sent.append(error_frame(each.id, error))
            continue
        scheduler.submit(job)
    while not scheduler.idle:
        scheduler.step()
    return sent


def row(tokens: list[int], start: int = 0, sequence: int = 0, outputs: int = 1) -> Row:
    return Row(sequence, np.array(tokens, np.int32), np.arange(start, start + len(tokens), dtype=np.int32), outputs)


def length(model: Model, sequence: int = 0) -> int:
    """Tokens of a sequence in native memory."""
    return int(lib.llama_memory_seq_pos_max(model._memory, sequence)) + 1


def bare_loop(model: Model, prompt: str, count: int) -> list[int]:
    """Greedy tokens of the plainest use of llama.cpp, in a context of its own."""
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 512, 1, 1
    context = lib.llama_init_from_model(model._model, params)
    tokens = model.tokenize(prompt.encode(), True)
    array = (ctypes.c_int32 * len(tokens))(*tokens)
    lib.llama_decode(context, lib.llama_batch_get_one(array, len(tokens)))
    found: list[int] = []
    while len(found) < count:
        logits = lib.llama_get_logits_ith(context, -1)
        best = max(range(model.vocabulary.size), key=lambda i: logits[i])
        if best in model.vocabulary.end_tokens:
            break
        found.append(best)
        lib.llama_decode(context, lib.llama_batch_get_one((ctypes.c_int32 * 1)(best), 1))
    lib.llama_free(context)
    return found


@pytest.mark.parametrize(
    "text", ["<|im_start|>user\nhi <|im_end|>  <|im_end|>x" * 40, "<|im_start|>" * 300, "plain words " * 300, "é<|im_end|>🦊 " * 100, ""]
)
def test_a_text_that_is_tokenised_in_parts_has_the_same_tokens(model, monkeypatch, text):
    whole = model.tokenize(text.encode(), True)
    parts = list(model._parts(text.encode()))
    assert parts == [text.encode()]  # short enough
    monkeypatch.setattr(model_module, "PART_BYTES", 16)
    assert len(list(model._parts(text.encode()))) > 20 * ("<|" in text) and b"".join(model._parts(text.encode())) == text.encode()
    assert model.tokenize(text.encode(), True) == whole


@pytest.mark.engine
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_is_the_bare_loop_token_for_token(model, prompt):
    frames = run(model, frame(prompt=prompt, max_new_tokens=16))
    assert [token for each in frames for token in each.fields.get("tokens", ())] == bare_loop(model, prompt, 16)


@pytest.mark.engine
def test_pieces_joined_are_the_detokenised_text(model):
    texts = [
        *PROMPTS,
        " leading space",
        "tabs\t\tand\n\n\nlines",
        "naïve — “quotes” …",
        "日本語のテキスト",
        "👩‍👩‍👧‍👦🏳️‍🌈",
        "mixed اَلْعَرَبِيَّةُ и русский",
        "  a   b    c",
    ]
    for text in texts:
        tokens = model.tokenize(text.encode(), False)
        assert b"".join(model.piece(token, special=True) for token in tokens) == model.detokenize(tokens) == text.encode()


@pytest.mark.engine
def test_markers_are_text_though_they_are_special(model, dense):
    start, end = (model.tokenize(text, False)[0] for text in (b"<|im_start|>", b"<|im_end|>"))
    assert model.piece(start, special=False) == b"" == model.piece(end, special=False)
    marked = Model(str(dense), {**options(), "markers": ["<|im_start|>assistant", "hen"]}, lambda _fraction: None)
    try:
        start, end = (marked.tokenize(text, False)[0] for text in (b"<|im_start|>", b"<|im_end|>"))
        assert (marked.piece(start, special=False), marked.piece(end, special=False)) == (b"<|im_start|>", b"")
        assert marked.piece(end, special=True) == b"<|im_end|>"
    finally:
        marked.close()


@pytest.mark.engine
def test_every_token_of_the_vocabulary_has_a_piece(model):
    assert all(isinstance(model.piece(token, special=True), bytes) for token in range(0, model.vocabulary.size, 7))
    model._piece_buffers.buffer = ctypes.create_string_buffer(1)  # longer pieces make their own room
    assert model.piece(model.tokenize(b" capital", False)[0], special=False) == b" capital"
    assert model.detokenize([]) == b"" and model.tokenize(b"", False) == []


@pytest.mark.engine
def test_bos_is_added_where_the_model_wants_it_and_never_twice(model, monkeypatch):
    bos = lib.llama_vocab_bos(model._vocab)
    assert model.tokenize(b"hi", True) == model.tokenize(b"hi", False)  # this model wants none
    monkeypatch.setattr(lib, "llama_vocab_get_add_bos", lambda _vocab: True)
    assert model.tokenize(b"hi", True) == [bos, *model.tokenize(b"hi", False)]
    with_bos = model.detokenize([bos]) + b"hi"
    assert model.tokenize(with_bos, True) == model.tokenize(with_bos, False)
    assert model.tokenize(b"", True) == [bos]


# --- computing ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_a_stop_inside_a_step_leaves_the_cache_as_it_was(model):
    model.clear()
    tokens = model.tokenize(b"word " * 120, False)[:110]
    assert model.decode([row(tokens[:60])], None, None) is Computed.DONE and length(model) == 60
    before = model.nodes
    stop = lambda: model.nodes > before + 20  # noqa: E731
    assert model.decode([row(tokens[60:], 60)], None, stop) is Computed.STOPPED
    assert length(model) == 60 and before + 20 < model.nodes < before + 60
    assert model.decode([row(tokens[60:], 60)], None, lambda: False) is Computed.DONE and length(model) == 110


def test_no_place_leaves_the_cache_as_it_was(small):
    model = small
    model.clear()
    tokens = model.tokenize(b"word " * 600, False)
    for start in range(0, 480, 60):
        assert model.decode([row(tokens[start : start + 60], start)], None, None) is Computed.DONE
    assert model.decode([row(tokens[:60], 0, sequence=1)], None, None) is Computed.FULL
    assert length(model, 0) == 480 and length(model, 1) == 0


@pytest.mark.engine
def test_sequences_are_copied_cut_saved_and_restored(model):
    model.clear()
    tokens = model.tokenize(b"The fox and the hen and the hound went for a walk", False)
    assert model.decode([row(tokens)], None, None) is Computed.DONE
    wanted = model.logprobs(len(tokens) - 1)
    half = len(tokens) // 2
    model.copy(0, 1, 0, half)
    assert length(model, 1) == half and model.can_end_at(0, half) and model.can_end_at(0, 0)
    assert model.decode([row(tokens[half:], half, sequence=1)], None, None) is Computed.DONE
    assert np.abs(model.logprobs(len(tokens) - half - 1) - wanted).max() < 0.1
    state = model.save(0)
    assert model.restore(2, state) and length(model, 2) == len(tokens) and not model.restore(3, state[:100])
    assert model.cut(2, half) and length(model, 2) == half and model.cut(2, 0) and length(model, 2) == 0
    with pytest.raises(ModelError, match="error -1"):  # a place that is taken
        model.decode([row(tokens[-1:], len(tokens) - 1, sequence=1)], None, None)
    model.clear()
    assert all(length(model, sequence) == 0 for sequence in range(4))


@pytest.mark.engine
def test_probabilities_are_probabilities(model):
    model.clear()
    model.decode([row(model.tokenize(b"The capital of France is", False))], None, None)
    found = model.logprobs(len(model.tokenize(b"The capital of France is", False)) - 1)
    assert np.exp(found).sum() == pytest.approx(1) and model.piece(int(found.argmax()), False) == b" Paris"
    assert model.likeliest(len(model.tokenize(b"The capital of France is", False)) - 1) == found.argmax()
    for token in (int(found.argmax()), int(found.argmin()), 0, len(found) - 1):
        assert model.logprob(len(model.tokenize(b"The capital of France is", False)) - 1, token) == pytest.approx(found[token], abs=1e-4)


@pytest.mark.engine
def test_errors_of_computing_end_those_who_computed(model, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(lib, "llama_decode", lambda *_: -3)
        frames = run(model, frame())
        assert frames[-1].kind == "error" and "error -3" in frames[-1].fields["message"]
        patched.setattr(lib, "llama_decode", lambda *_: 1)
        frames = run(model, frame())
        assert frames[-1].kind == "error" and "no place" in frames[-1].fields["message"]
        patched.setattr(lib, "llama_decode", lambda *_: 1 / 0)
        frames = run(model, frame(1), frame(2))
        assert [(f.kind, f.id) for f in frames if f.kind != "chunk"] == [("error", 1), ("error", 2)]
        assert "The engine failed: division" in frames[-1].fields["message"]
    assert run(model, frame())[-1].fields["reason"] == "length"


@pytest.mark.engine
@pytest.mark.parametrize("parallel", [1, 3])
def test_jobs_end_once_and_errors_are_named(model, parallel):
    asked = [frame(1), frame(2, ()), frame(3, "x " * 600), frame(4, (5, 6, 7)), frame(5, ""), frame(6, (10**6,)), frame(7, max_new_tokens=0)]
    frames = run(model, *asked, parallel=parallel)
    assert sorted((f.id, f.kind, f.fields.get("reason") or f.fields.get("kind")) for f in frames if f.kind != "chunk") == [
        (1, "end", "length"),
        (2, "error", "PromptError"),
        (3, "error", "PromptTooLong"),
        (4, "end", "length"),
        (5, "error", "PromptError"),
        (6, "error", "PromptError"),
        (7, "end", "length"),
    ]
    for id in (1, 4, 7):
        own = [f for f in frames if f.id == id]
        assert own[-1].kind == "end" and sum(len(f.fields.get("tokens", ())) for f in own) == own[-1].fields["done"] == (0 if id == 7 else 8)


@pytest.mark.engine
def test_prefill_is_told_piece_by_piece(model, monkeypatch):
    monkeypatch.setattr("modules.backends.llama_cpp.scheduler.PROGRESS_SECONDS", 0.0)
    frames = run(model, frame(prompt="word " * 150, max_new_tokens=1))
    told = [f.fields["prefill"] for f in frames if "prefill" in f.fields]
    assert told[0] == 0 and told == sorted(set(told)) and told[-1] == frames[-1].fields["prompt"] > 128
    assert all(later - earlier <= 64 for earlier, later in itertools.pairwise(told))


def test_a_prompt_that_fills_the_context_still_gets_its_one_token(small):
    tokens = tuple(small.tokenize(b"word " * 600, False)[:512])
    frames = run(small, frame(prompt=tokens, max_new_tokens=None, sampling=ENDLESS))
    assert frames[-1].fields["reason"] == "length" and frames[-1].fields["done"] == 1


@pytest.mark.engine
def test_a_frame_of_prefill_is_a_job_of_low_priority_that_writes_nothing(model):
    job = make_job(frame(kind="prefill", client="me"), model, lambda _frame: None)
    assert job.priority == LOW and job.limit == 0 and job.client == "me"
    frames = run(model, frame(kind="prefill", prompt="word " * 20))
    assert frames[-1].fields["reason"] == "length" and frames[-1].fields["done"] == 0 and not any("tokens" in f.fields for f in frames)


def test_keys_of_adapters_and_frames_of_errors():
    assert adapters_key([]) is None and adapters_key([["a", 0.0]]) is None
    assert adapters_key([["b", 1], ["a", 0.5]]) == adapters_key([["a", 0.5], ["b", 1.0]]) == (("a", 0.5), ("b", 1.0))
    assert _asked(GenerationRequest("x", adapters=(Adapter(Path("/a.gguf"), 0.5),)))[0]["adapters"] == [["/a.gguf", 0.5]]
    assert error_frame(3, Busy("later", 7)) == Frame("error", 3, {"kind": "Busy", "message": "later", "retry_after": 7})
    assert error_frame(3, ModelError("no")) == Frame("error", 3, {"kind": "ModelError", "message": "no"})


def test_counts_and_roots_of_schemas():
    def grammar(schema: str) -> str:
        ((name, args),) = jobs_module._with_schema([], schema)
        assert name == "grammar"
        return args["text"]

    assert "root ::=" in grammar('{"type": "string"}')
    assert "root ::=" in grammar('{"$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"}')
    assert jobs_module._with_schema([["greedy", {}]], "") == [("greedy", {})]
    for schema in (
        '{"maxItems": 2001, "items": {}}',
        '{"properties": {"a": [{"minLength": 1e9}]}}',
        '{"type": "string", "pattern": "^[ab]{3,2001}$"}',
    ):
        with pytest.raises(SettingsError, match="at most 2000"):
            grammar(schema)


# --- the chain ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_grammar_masks_only_when_the_free_choice_is_forbidden(model):
    model.clear()
    prompt = model.tokenize(b"The answer is", False)
    model.decode([row(prompt)], None, None)
    end, output = len(prompt), len(prompt) - 1
    chain = model.chain(chain_plan(NEUTRAL.replace({"grammar_string": 'root ::= " "? [0-9]+ "." '}), 3))
    text = b""
    for _ in range(30):
        token = model.sample(chain, output)
        if token is None or token in model.vocabulary.end_tokens:
            break
        text += model.piece(token, special=False)
        model.decode([row([token], end)], None, None)
        end, output = end + 1, 0
    chain.close()
    assert re.fullmatch(rb" ?[0-9]+\.?", text)


@pytest.mark.engine
def test_penalties_and_dry_see_the_prompt_and_nothing_else_does(model):
    model.clear()
    tokens = model.tokenize(b"fox fox fox fox", False)
    model.decode([row(tokens)], None, None)
    last = len(tokens) - 1
    for values in ({"presence_penalty": 50.0}, {"dry_multiplier": 50.0, "dry_allowed_length": 1}):
        liked = [(tokens[-1], 20.0)]
        free = model.chain(chain_plan(GREEDY, 1, liked))
        penalised = model.chain(chain_plan(GREEDY.replace(values), 1, liked))
        penalised.accept_prompt(tokens)
        assert model.sample(free, last) == tokens[-1] != model.sample(penalised, last)
        free.close()
        penalised.close()


@pytest.mark.engine
def test_a_chain_that_cannot_be_built_is_freed_and_named(model):
    with pytest.raises(SettingsError, match="-5"):
        model.chain([("logit_bias", {"bias": [[-5, 1.0]]})])


# --- loading ------------------------------------------------------------------------------------------------------------------------


class Seen:
    """Parameters that the library was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model: dict = {}
        self.context: dict = {}
        self.numa: list[int] = []
        self._load, self._init = lib.llama_model_load_from_file, lib.llama_init_from_model
        monkeypatch.setattr(lib, "llama_model_load_from_file", self._loaded)
        monkeypatch.setattr(lib, "llama_init_from_model", self._made)
        monkeypatch.setattr(lib, "llama_numa_init", self.numa.append)

    def _loaded(self, path: bytes, params: ctypes.Structure) -> object:
        self.model = {name: getattr(params, name) for name, _ in params._fields_}
        self.model["shares"] = [params.tensor_split[0]] if params.tensor_split else []
        return self._load(path, params)

    def _made(self, model: object, params: ctypes.Structure) -> object:
        self.context = {name: getattr(params, name) for name, _ in params._fields_}
        return self._init(model, params)


OF_MODEL = {
    "gpu_layers": (7, {"n_gpu_layers": 7}),
    "split_mode": ("row", {"split_mode": 2}),
    "tensor_split": ("3", {"shares": [3.0]}),
    "no_mmap": (True, {"load_mode": lib.LLAMA_LOAD_MODE_NONE}),
    "mlock": (True, {"load_mode": lib.LLAMA_LOAD_MODE_MMAP_MLOCK}),
}
OF_CONTEXT = {
    "ctx_size": (768, {"n_ctx": 768}),
    "batch_size": (300, {"n_batch": 300}),
    "ubatch_size": (32, {"n_ubatch": 32}),
    "no_kv_offload": (True, {"offload_kqv": False}),
    "cache_type": ("q8_0", {"type_k": 8, "type_v": 8}),
    "flash_attn": ("off", {"flash_attn_type": 0}),
    "streaming_llm": (True, {"swa_full": True}),
    "threads": (2, {"n_threads": 2, "n_threads_batch": 1}),
    "threads_batch": (2, {"n_threads": 1, "n_threads_batch": 2}),
    "rope_freq_base": (5000.0, {"rope_freq_base": 5000.0}),
    "compress_pos_emb": (4.0, {"rope_freq_scale": 0.25}),
    "parallel": (6, {"n_seq_max": 6 + 32, "kv_unified": True}),
}
ELSEWHERE = {
    *("cpu_moe", "numa"),  # below
    *("max_queue", "prefill_share", "cache_ram", "engine_timeout"),  # of our own parts: scheduler, cache and connection
    *("model_draft", "draft_max", "gpu_layers_draft", "ctx_size_draft", "spec_type"),  # test_llama_cpp_speculation.py
    *("spec_ngram_size_n", "spec_ngram_size_m", "spec_ngram_min_hits"),
    "mmproj",  # test_llama_cpp_vision.py
}


def test_no_option_is_forgotten():
    assert {*OF_MODEL, *OF_CONTEXT, *ELSEWHERE} == set(LlamaCppOptions.model_fields)


@pytest.mark.parametrize("name", [*OF_MODEL, *OF_CONTEXT])
def test_every_option_reaches_llama_cpp(dense, monkeypatch, name):
    value, wanted = {**OF_MODEL, **OF_CONTEXT}[name]
    seen = Seen(monkeypatch)
    made = Model(str(dense), options(**{name: value}), lambda _fraction: None)
    found = seen.model if name in OF_MODEL else seen.context
    assert {key: found[key] for key in wanted} == wanted
    made.close()
    plain = Model(str(dense), options(), lambda _fraction: None)
    found = seen.model if name in OF_MODEL else seen.context
    assert {key: found[key] for key in wanted} != wanted or name == "parallel"
    plain.close()


def test_experts_in_main_memory_and_numa(dense, monkeypatch):
    seen = Seen(monkeypatch)
    Model(str(dense), options(cpu_moe=True, numa=True), lambda _fraction: None).close()
    assert seen.model["tensor_buft_overrides"] and seen.numa == [1]
    Model(str(dense), options(), lambda _fraction: None).close()
    assert not seen.model["tensor_buft_overrides"] and seen.numa == [1]


def test_what_cannot_go_together_is_said_with_the_fix(dense):
    with pytest.raises(ModelError, match="flash-attn"):
        Model(str(dense), options(cache_type="q8_0", flash_attn="off"), lambda _fraction: None)


@pytest.mark.engine
def test_a_model_tells_what_it_is(starter_model, capfd):
    seen: list[float] = []
    made = Model(str(starter_model), options(ctx_size=256, no_mmap=True, threads=2), seen.append, verbose=True)
    about = made.describe()
    assert (about["context_length"], about["trained_context"], about["threads"], about["cuts"], about["writes"]) == (256, 8192, 2, True, True)
    assert about["bos_token"] == "<|im_start|>" and about["parameters"] > 10**8 and about["chat_template"] and seen[-1] == 1.0
    made.close()
    assert "llama_model_loader" in capfd.readouterr().err


def test_the_default_context_is_the_models_own_but_bounded(dense):
    for default, wanted in ((1024, 1024), (10**6, tiny_models.CONTEXT)):
        made = Model(str(dense), {**options(ctx_size=0), "default_context": default}, lambda _fraction: None)
        assert made.context_length == wanted
        made.close()


@pytest.mark.parametrize("kind", ["dense", "sliding_window", "recurrent", "hybrid", "bert"])
def test_what_kind_of_cache_a_model_has(tmp_path, kind):
    made = Model(str(getattr(tiny_models, kind)(tmp_path / "m.gguf")), options(), lambda _fraction: None)
    assert made.cuts == (kind in ("dense", "bert")) and made.writes == (kind != "bert")
    if made.writes:
        tokens = made.tokenize(b"hello one two three why water name " * 8, True)[:60]
        assert made.decode([row(tokens)], None, None) is Computed.DONE and made.can_end_at(0, 60)
        assert made.can_end_at(0, 30) == (kind == "dense") or kind == "sliding_window"
    made.close()


@pytest.mark.engine
def test_embeddings_have_a_context_of_bounded_size(starter_model, monkeypatch):
    seen = Seen(monkeypatch)
    made = Model(str(starter_model), options(ctx_size=8192), lambda _fraction: None)
    assert 512 <= made.longest_embedding <= 4096 and seen.context["n_ubatch"] == made.longest_embedding and seen.context["embeddings"]
    made.close()


def test_failures_are_explained():
    assert "does not know the architecture 'zzama'" in explain_failure(
        ["error loading model: unknown model architecture: 'zzama'", "failed to load model"]
    )
    assert "memory ran out" in explain_failure(["ggml_backend_cpu: failed to allocate buffer of size 1"])
    assert explain_failure(["load: error loading model: tensor x is missing."]).startswith("tensor x is missing. ")
    assert explain_failure([]).startswith("llama.cpp gave no reason. ")
    assert "memory ran out" in explain_failure(["llama_init_from_model: failed to initialize the context: std::bad_alloc"])
    assert "another base model" in explain_adapter(["tensor 'blk.0.attn_q.weight' has incorrect shape (hint: maybe wrong base model?)"])
    assert "Download it again" in explain_adapter(["gguf_init: failed to read"])


# --- the engine over pipes ----------------------------------------------------------------------------------------------------------


class Pipes:
    """An Engine in this process, with the server's ends of its two pipes."""

    def __init__(self) -> None:
        there_in, here_out = os.pipe()
        here_in, there_out = os.pipe()
        self.to, self.back = os.fdopen(here_out, "wb"), os.fdopen(here_in, "rb")
        self.codes: list[int] = []
        self.left = threading.Event()
        self.engine = Engine(os.fdopen(there_in, "rb"), os.fdopen(there_out, "wb"), self._leave)
        self.thread = threading.Thread(target=self.engine.serve, daemon=True)
        self.thread.start()

    def _leave(self, code: int) -> None:
        self.codes.append(code)
        self.left.set()

    def send(self, frame: Frame) -> None:
        self.to.write(encode(frame))
        self.to.flush()

    def until(self, *kinds: str) -> Frame:
        while True:
            frame = read_frame(self.back.read)
            assert frame is not None
            if frame.kind in kinds:
                return frame

    def end(self) -> list[int]:
        self.to.close()
        assert self.left.wait(20)
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.back.close()
        return self.codes

    def load(self, path: Path, id: int = 1, **values) -> Frame:
        self.send(Frame("load", id, {"path": str(path), "options": options(**values), "draft": None, "verbose": False}))
        return self.until("loaded", "error")


def test_an_engine_from_load_to_end_of_file(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_module, "HEARTBEAT_SECONDS", 0.05)
    pipes = Pipes()
    pipes.send(Frame("ping", 1))
    assert pipes.until("pong").id == 1
    pipes.send(Frame("encode", 2, {"add_bos": False}, b"early"))
    assert "still loading" in pipes.until("error").fields["message"]
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    assert pipes.load(tmp_path / "bad.gguf", 3).fields["kind"] == "ModelError"
    loaded = pipes.load(dense, 4)
    assert loaded.id == 4 and loaded.fields["context_length"] == 512 and loaded.fields["speculates"] is False
    pipes.send(Frame("encode", 5, {"add_bos": False}, b"hello"))
    tokens = unpack_tokens(pipes.until("tokens").raw)
    pipes.send(Frame("decode", 6, {}, pack_tokens(tokens)))
    assert pipes.until("text").raw == b"hello"
    pipes.send(Frame("decode", 7, {}, b"abc"))
    assert pipes.until("error").id == 7
    pipes.send(Frame("decode", 8, {}, pack_tokens([-1])))
    assert pipes.until("error").fields["kind"] == "PromptError"
    pipes.send(frame(9, sampling=ENDLESS, max_new_tokens=None))
    while "tokens" not in pipes.until("chunk").fields:
        pass
    pipes.send(Frame("cancel", 9))
    assert pipes.until("end").fields["reason"] in ("cancelled", "length")
    pipes.send(Frame("cancel", 12345))  # nobody
    pipes.send(Frame("embed", 10, {"lengths": [5, 5], "text": [True, True]}, b"hellowater"))
    vectors = pipes.until("vectors")
    assert vectors.fields["count"] == 2 and len(unpack_floats(vectors.raw)) == 128
    pipes.send(Frame("embed", 11, {"lengths": [5, 7], "text": [True, True]}, b"hellowater"))
    assert pipes.until("error").id == 11
    while not (beat := pipes.until("heartbeat").fields)["totals"]["steps"]:
        pass
    assert beat["beats"] > 0 and beat["busy"] is False and beat["stats"]["memory_bytes"] > 10**7 and beat["stats"]["cells"] == 512
    assert pipes.end() == [0]


def test_a_frame_that_makes_no_sense_ends_nothing(dense):
    """The server is trusted, but a mistake there must not cost everybody's replies."""
    pipes = Pipes()
    pipes.load(dense)
    pipes.send(Frame("unheard of", 2))
    pipes.send(Frame("encode", 3, {}))
    assert pipes.until("error").id == 3
    asked = frame(5)
    fields = {**asked.fields, "plan": [["no such sampler", {}]]}
    pipes.send(Frame("generate", 5, fields, asked.raw))
    assert pipes.until("error").id == 5
    pipes.send(frame(6))
    assert pipes.until("end", "error").fields["reason"] == "length"
    assert pipes.end() == [0]


def test_answers_that_no_frame_holds_are_errors(dense, monkeypatch):
    pipes = Pipes()
    pipes.load(dense)
    monkeypatch.setattr("modules.backends.llama_cpp.protocol.MAX_RAW", 600)
    pipes.send(Frame("encode", 2, {"add_bos": False}, b"7" * 500))  # 2,000 bytes of ids
    assert pipes.until("tokens", "error").kind == "error"
    pipes.send(Frame("embed", 3, {"lengths": [5] * 4, "text": [True] * 4}, b"hello" * 4))  # 1,024 bytes of vectors
    assert pipes.until("vectors", "error").kind == "error"
    pipes.send(frame(4))
    assert pipes.until("end", "error").fields["reason"] == "length"
    assert pipes.end() == [0]


def test_cancel_finds_what_is_being_prepared(dense, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()

    def slow(*args: object) -> None:
        begun.set()
        assert go_on.wait(20)
        prepare(*args)

    monkeypatch.setattr(engine_module, "prepare", slow)
    pipes = Pipes()
    pipes.load(dense)
    pipes.send(frame(2, sampling=ENDLESS, max_new_tokens=None))
    assert begun.wait(20)
    pipes.send(Frame("embed", 3, {"lengths": [5], "text": [True]}, b"hello"))
    pipes.send(Frame("cancel", 2))
    pipes.send(Frame("cancel", 3))
    pipes.send(Frame("ping", 4))
    pipes.until("pong")  # frames are taken in order: both are cancelled now
    go_on.set()
    assert {pipes.until("end").id, pipes.until("end").id} == {2, 3}
    assert pipes.end() == [0]


def test_too_many_at_once_are_told_before_their_prompts_are_read(dense, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(engine_module, "prepare", lambda *args: go_on.wait(20) and prepare(*args))
    pipes = Pipes()
    pipes.load(dense, max_queue=2)
    for id in range(10, 20):
        pipes.send(frame(id))
    first = pipes.until("error")
    assert first.fields["kind"] == "Busy" and first.fields["retry_after"] >= 1 and first.id >= 14
    go_on.set()
    ended = {first.id}
    while len(ended) < 10:
        last = pipes.until("end", "error")
        assert last.kind == "end" or last.fields["kind"] == "Busy"
        assert last.id not in ended
        ended.add(last.id)
    assert pipes.end() == [0]


def test_memory_is_given_back_when_the_machine_is_short_of_it(dense, monkeypatch):
    monkeypatch.setattr(engine_module, "HEARTBEAT_SECONDS", 0.05)
    pipes = Pipes()
    pipes.load(dense, cache_ram=64, ctx_size=256)
    for id in range(2, 8):
        pipes.send(frame(id, f"{id} " + "hello water " * 60))
        pipes.until("end")
    while not (stats := pipes.until("heartbeat").fields["stats"])["spilled_sequences"]:
        pass
    assert stats["spilled_bytes"] > 0
    monkeypatch.setattr(engine_module.psutil, "virtual_memory", lambda: SimpleNamespace(available=1, total=1000))
    while pipes.until("heartbeat").fields["stats"]["spilled_sequences"]:
        pass
    assert pipes.end() == [0]


def test_broken_frames_end_the_engine():
    pipes = Pipes()
    pipes.to.write(b"this is no frame")
    assert pipes.end() == [2]


def test_shutdown_and_a_server_that_is_gone_end_the_engine():
    pipes = Pipes()
    pipes.send(Frame("shutdown"))
    assert pipes.left.wait(20) and pipes.end()[0] == 0
    pipes = Pipes()
    pipes.back.close()
    pipes.send(Frame("ping", 1))
    assert pipes.left.wait(20) and pipes.codes[0] == 0
    pipes.to.close()


def test_memory_in_use(tmp_path):
    assert memory_in_use() > 10**6
    assert memory_in_use(tmp_path / "none") > 10**6


def test_the_outlet_keeps_order_and_writes_steps_at_once():
    class Stream(io.BytesIO):
        writes = 0

        def write(self, data: bytes) -> int:
            self.writes += 1
            return super().write(data)

    stream = Stream()
    outlet = Outlet(stream, lambda: pytest.fail("not gone"))
    outlet.flush()
    assert stream.writes == 0
    for number in range(3):
        outlet.put(Frame("chunk", number))
    outlet.flush()
    assert stream.writes == 1
    outlet.put(Frame("chunk", 3))
    outlet.send(Frame("end", 4))
    stream.seek(0)
    assert [read_frame(stream.read).id for _ in range(5)] == [0, 1, 2, 3, 4]


def test_the_outlet_tells_that_nobody_reads():
    told: list[int] = []
    stream = io.BytesIO()
    stream.close()
    outlet = Outlet(stream, lambda: told.append(1))
    outlet.send(Frame("end", 4))
    assert told == [1]


def test_room_in_main_memory():
    assert spill_bytes(0) == 0 and spill_bytes(3) == 3 << 20 and spill_bytes(-1) > 1 << 20
