"""The engine's parts inside this process: the model, the native chain, the scheduler, and the engine over two pipes."""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from modules.backends.llama_cpp.options import DEFAULT_CONTEXT, LlamaCppOptions
from modules.backends.llama_cpp.protocol import Frame, encode, pack_tokens, read_frame, unpack_tokens
from modules.backends.llama_cpp.samplers import chain_plan
from modules.backends.llama_cpp.threads import usable_cores, writing_threads
from modules.errors import Busy, ModelError, SettingsError
from modules.samplers import NEUTRAL

lib = pytest.importorskip("llama_cpp.llama_cpp")

from modules.backends.llama_cpp import engine as engine_module  # noqa: E402
from modules.backends.llama_cpp.engine import Engine, memory_in_use  # noqa: E402
from modules.backends.llama_cpp.model import Computed, Model, explain_failure  # noqa: E402
from modules.backends.llama_cpp.scheduler import Job, Scheduler  # noqa: E402

GREEDY = NEUTRAL.replace({"temperature": 0})
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
    chosen = LlamaCppOptions.build({"ctx_size": 512, "threads": 1, "threads_batch": 1, "batch_size": 64, **values})
    return {**chosen.model_dump(), "tensor_split": chosen.shares, "default_context": DEFAULT_CONTEXT}


@pytest.fixture(scope="module")
def model(starter_model: Path) -> Iterator[Model]:
    made = Model(str(starter_model), options(), lambda _fraction: None)
    yield made
    made.close()


def job(id: int = 1, prompt: str | bytes = "Once upon a time", sampling=GREEDY, max_new: int | None = 8, **values) -> Job:
    asked = {"text": isinstance(prompt, str), "add_bos": True, "plan": chain_plan(sampling, 1), "max_new": max_new, "logprobs": 0, "special": False}
    return Job(id, {**asked, **values}, prompt.encode() if isinstance(prompt, str) else prompt)


def run(model: Model, *jobs: Job) -> list[Frame]:
    """What the scheduler sends for `jobs`, one after another."""
    sent: list[Frame] = []
    scheduler = Scheduler(model, sent.append)
    for one in jobs:
        scheduler.submit(one)

    def stop_when_done(frame: Frame) -> None:
        sent.append(frame)
        if sum(f.kind in ("end", "error") for f in sent) == len(jobs):
            scheduler.stop()

    scheduler._send = stop_when_done
    scheduler.run()
    return sent


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


@pytest.mark.engine
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_is_the_bare_loop_token_for_token(model, prompt):
    model.forget()
    frames = run(model, job(prompt=prompt, max_new=16))
    assert [token for frame in frames for token in frame.fields.get("tokens", ())] == bare_loop(model, prompt, 16)


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
def test_every_token_of_the_vocabulary_has_a_piece(model):
    assert all(isinstance(model.piece(token, special=True), bytes) for token in range(0, model.vocabulary.size, 7))
    model._piece_buffer = ctypes.create_string_buffer(1)  # longer pieces make their own room
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


@pytest.mark.engine
def test_a_cache_that_cannot_be_trimmed_is_cleared(model, monkeypatch):
    tokens = model.tokenize(b"The fox and the hen and the hound", False)
    model.forget()
    assert model.compute(tokens) is Computed.DONE and model.cached == len(tokens)
    assert model.keep_prefix(tokens) == len(tokens) - 1
    assert model.compute(tokens[-1:]) is Computed.DONE
    with monkeypatch.context() as patched:
        patched.setattr(lib, "llama_memory_seq_rm", lambda *_: False)
        assert model.keep_prefix(tokens[:3]) == 0 and model.cached == 0
    model.compute(tokens)
    with monkeypatch.context() as patched:  # a sliding window that has left the start behind
        patched.setattr(lib, "llama_model_n_swa", lambda _model: 2)
        patched.setattr(lib, "llama_memory_seq_pos_min", lambda *_: 5)
        assert model.keep_prefix(tokens[:6]) == 0
    model.compute(tokens)
    with monkeypatch.context() as patched:
        patched.setattr(lib, "llama_model_n_swa", lambda _model: 2)
        patched.setattr(lib, "llama_memory_seq_pos_min", lambda *_: 3)
        assert model.keep_prefix(tokens[:6]) == 5
    model.forget()


@pytest.mark.engine
def test_a_stop_inside_a_piece_leaves_the_cache_as_it_was(model):
    model.forget()
    tokens = model.tokenize(b"word " * 60, False)[:60]
    assert model.compute(tokens[:30]) is Computed.DONE
    before = model.nodes
    model.should_stop = lambda: model.nodes > before + 20
    assert model.compute(tokens[30:]) is Computed.STOPPED and model.cached == 30 and before + 20 < model.nodes < before + 60
    model.should_stop = lambda: False
    assert model.compute(tokens[30:]) is Computed.DONE and model.cached == 60


@pytest.mark.engine
def test_errors_of_computing_empty_the_cache(model, monkeypatch):
    model.forget()
    model.compute(model.tokenize(b"The fox", False))
    with monkeypatch.context() as patched:
        patched.setattr(lib, "llama_decode", lambda *_: -3)
        with pytest.raises(ModelError, match="error -3"):
            model.compute_one(5)
        assert model.cached == 0
        patched.setattr(lib, "llama_decode", lambda *_: 1)
        frames = run(model, job())
        assert frames[-1].kind == "error" and "no place" in frames[-1].fields["message"]
        patched.setattr(lib, "llama_decode", lambda *_: 1 / 0)
        frames = run(model, job(), job(2))
        assert [(f.kind, f.id) for f in frames if f.kind != "chunk"] == [("error", 1), ("error", 2)]
        assert "The engine failed: division" in frames[-1].fields["message"]
    assert run(model, job())[-1].fields["reason"] == "length"


@pytest.mark.engine
def test_jobs_run_in_order_and_end_once(model):
    frames = run(model, job(1), job(2, prompt=b""), job(3, prompt="x " * 600), job(4, prompt=pack_tokens([5, 6, 7])), job(5, prompt=""))
    assert [(f.id, f.kind, f.fields.get("reason") or f.fields.get("kind")) for f in frames if f.kind != "chunk"] == [
        (1, "end", "length"),
        (2, "error", "PromptError"),
        (3, "error", "PromptTooLong"),
        (4, "end", "length"),
        (5, "error", "PromptError"),
    ]
    assert [f.id for f in frames] == sorted(f.id for f in frames)


@pytest.mark.engine
def test_prefill_is_told_piece_by_piece(model):
    model.forget()
    frames = run(model, job(prompt="word " * 150, max_new=1))
    told = [f.fields["prefill"] for f in frames if "prefill" in f.fields]
    assert told == [0, 64, 128, frames[-1].fields["prompt"]] and 128 < told[-1] <= 192


@pytest.mark.engine
def test_a_prompt_that_fills_the_context_still_gets_its_one_token(model):
    tokens = (model.tokenize(b"word " * 600, False))[:512]
    frames = run(model, job(prompt=pack_tokens(tokens), max_new=None, sampling=GREEDY.replace({"ban_eos_token": True})))
    assert frames[-1].fields["reason"] == "length" and frames[-1].fields["done"] == 1


def test_a_full_queue_is_busy_and_waiting_jobs_can_be_cancelled():
    sent: list[Frame] = []
    scheduler = Scheduler(None, sent.append, max_queue=2)
    scheduler.submit(job(1))
    scheduler.submit(job(2))
    with pytest.raises(Busy, match="2 requests are waiting"):
        scheduler.submit(job(3))
    scheduler.cancel(1)
    scheduler.cancel(77)
    assert [(f.id, f.fields["reason"]) for f in sent] == [(1, "cancelled")] and scheduler.load == (1, 0)
    scheduler.stop()
    scheduler.run()


# --- the chain ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_grammar_masks_only_when_the_free_choice_is_forbidden(model):
    model.forget()
    model.compute(model.tokenize(b"The answer is", False))
    chain = model.chain(chain_plan(NEUTRAL.replace({"grammar_string": 'root ::= " "? [0-9]+ "." '}), 3))
    text = b""
    for _ in range(30):
        token = model.sample(chain)
        if token is None or token in model.vocabulary.end_tokens:
            break
        text += model.piece(token, special=False)
        model.compute_one(token)
    chain.close()
    assert re.fullmatch(rb" ?[0-9]+\.?", text)


@pytest.mark.engine
def test_penalties_and_dry_see_the_prompt_and_nothing_else_does(model):
    model.forget()
    tokens = model.tokenize(b"fox fox fox fox", False)
    model.compute(tokens)
    for values in ({"presence_penalty": 50.0}, {"dry_multiplier": 50.0, "dry_allowed_length": 1}):
        liked = [(tokens[-1], 20.0)]
        free = model.chain(chain_plan(GREEDY, 1, liked))
        penalised = model.chain(chain_plan(GREEDY.replace(values), 1, liked))
        penalised.accept_prompt(tokens)
        assert model.sample(free) == tokens[-1] != model.sample(penalised)
        free.close()
        penalised.close()


@pytest.mark.engine
def test_a_chain_that_cannot_be_built_is_freed_and_named(model):
    with pytest.raises(SettingsError, match="-5"):
        model.chain([("logit_bias", {"bias": [[-5, 1.0]]})])


# --- loading ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_options_reach_llama_cpp(starter_model, capfd):
    seen: list[float] = []
    chosen = {"ctx_size": 256, "cache_type": "q8_0", "flash_attn": "on", "no_mmap": True, "mlock": False, "tensor_split": "1", "threads": 2}
    made = Model(str(starter_model), options(**chosen, compress_pos_emb=2.0), seen.append, verbose=True)
    about = made.describe()
    assert (about["context_length"], about["trained_context"], about["threads"]) == (256, 8192, 2) and seen[-1] == 1.0
    assert about["bos_token"] == "<|im_start|>" and about["parameters"] > 10**8 and about["chat_template"]
    made.close()
    assert "llama_model_loader" in capfd.readouterr().err


@pytest.mark.engine
def test_the_default_context_is_the_models_own_but_bounded(starter_model):
    made = Model(str(starter_model), {**options(ctx_size=0), "default_context": 1024}, lambda _fraction: None)
    assert made.context_length == 1024
    made.close()


def test_failures_are_explained():
    assert "does not know the architecture 'zzama'" in explain_failure(
        ["error loading model: unknown model architecture: 'zzama'", "failed to load model"]
    )
    assert "memory ran out" in explain_failure(["ggml_backend_cpu: failed to allocate buffer of size 1"])
    assert explain_failure(["load: error loading model: tensor x is missing."]).startswith("tensor x is missing. ")
    assert explain_failure([]).startswith("llama.cpp gave no reason. ")


def test_threads(tmp_path):
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text("0-1\n")
    none = tmp_path / "none"
    assert usable_cores(tmp_path, none) == 1  # all threads of one core
    assert usable_cores(none, none) >= 1
    quota = tmp_path / "cpu.max"
    quota.write_text("100000 100000\n")
    assert usable_cores(none, quota) == 1
    quota.write_text("max 100000\n")
    assert usable_cores(none, quota) == usable_cores(none, none)
    assert 1 <= writing_threads() <= usable_cores()


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


@pytest.mark.engine
def test_an_engine_from_load_to_end_of_file(starter_model, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_module, "HEARTBEAT_SECONDS", 0.05)
    pipes = Pipes()
    pipes.send(Frame("ping", 1))
    assert pipes.until("pong").id == 1
    pipes.send(Frame("encode", 2, {"add_bos": False}, b"early"))
    assert "still loading" in pipes.until("error").fields["message"]
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    pipes.send(Frame("load", 3, {"path": str(tmp_path / "bad.gguf"), "options": options(), "verbose": False}))
    assert pipes.until("error").fields["kind"] == "ModelError"
    pipes.send(Frame("load", 4, {"path": str(starter_model), "options": options(), "verbose": False}))
    assert pipes.until("progress").fields["fraction"] > 0
    assert pipes.until("loaded").fields["context_length"] == 512
    pipes.send(Frame("encode", 5, {"add_bos": False}, b"hello"))
    tokens = unpack_tokens(pipes.until("tokens").raw)
    pipes.send(Frame("decode", 6, {}, pack_tokens(tokens)))
    assert pipes.until("text").raw == b"hello"
    pipes.send(Frame("decode", 7, {}, b"abc"))
    assert pipes.until("error").id == 7
    pipes.send(Frame("decode", 8, {}, pack_tokens([-1])))
    assert pipes.until("error").fields["kind"] == "PromptError"
    endless = job(9, sampling=GREEDY.replace({"ban_eos_token": True}), max_new=None)
    pipes.send(Frame("generate", 9, endless.asked, endless.prompt))
    while "tokens" not in pipes.until("chunk").fields:
        pass
    pipes.send(Frame("cancel", 9))
    assert pipes.until("end").fields["reason"] == "cancelled"
    while not (beat := pipes.until("heartbeat").fields)["steps"]:
        pass
    assert beat["nodes"] > 0 and beat["memory"] > 10**7 and beat["queued"] == 0
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
