"""The engine process as its user sees it: right text, and every way in which a process, a file or a request can go wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modules.backends.base import Adapter, CancelToken, Chunk, GenerationRequest
from modules.backends.llama_cpp import LOADER, client, connection
from modules.backends.llama_cpp.client import LlamaCppBackend
from modules.backends.llama_cpp.connection import Call, Connection, environment, exit_words, merge
from modules.backends.llama_cpp.protocol import Frame
from modules.errors import EngineDied, ModelError, PromptTooLong, SettingsError
from modules.samplers import NEUTRAL, SamplingParams
from modules.system import is_alive

ROOT = Path(__file__).resolve().parents[2]
GREEDY = NEUTRAL.replace({"temperature": 0})
ENDLESS = GREEDY.replace({"ban_eos_token": True})
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
OPTIONS = {"ctx_size": 2048, "threads": 1, "threads_batch": 1}
real_engine = pytest.mark.engine


def load(path: Path, progress: Callable[[float, str], None] = lambda _fraction, _words: None, cancel: CancelToken | None = None) -> LlamaCppBackend:
    backend = LOADER.load(path, LOADER.options.build(OPTIONS), progress, cancel or CancelToken())
    assert isinstance(backend, LlamaCppBackend)
    return backend


@pytest.fixture(scope="module")
def backend(starter_model: Path) -> Iterator[LlamaCppBackend]:
    made = load(starter_model)
    yield made
    made.unload()


def run(backend: LlamaCppBackend, prompt: str | tuple[int, ...], sampling: SamplingParams = GREEDY, **values) -> list[Chunk]:
    return list(backend.generate(GenerationRequest(prompt, sampling, **{"max_new_tokens": 24, **values})))


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def gone(pid: int) -> bool:
    """Whether the process ends, and is reaped, within a bounded time."""
    deadline = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)


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
    replies = [text_of(run(backend, "My favourite animal is", NEUTRAL, seed=seed)) for seed in (1, 1, 2, 2**32 - 1, 2**32 - 1)]
    assert replies[0] == replies[1] != replies[2] and replies[3] == replies[4]


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
def test_every_sampler_runs_in_the_real_chain(backend):
    values = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.95, "top_n_sigma": 2.0, "xtc_probability": 0.5}
    values |= {"repetition_penalty": 1.1, "repetition_penalty_range": 0, "dry_multiplier": 0.8, "frequency_penalty": 0.1, "presence_penalty": 0.1}
    for extra in ({}, {"mirostat_mode": 1}, {"mirostat_mode": 2}, {"adaptive_target": 0.4}, {"dynamic_temperature": True, "dynatemp_high": 2}):
        sampling = NEUTRAL.replace({**values, **extra})
        assert text_of(run(backend, "Once upon a time", sampling, seed=3)) == text_of(run(backend, "Once upon a time", sampling, seed=3)) != ""


@real_engine
def test_penalty_range_zero_is_the_whole_context(backend):
    fox = backend.encode(" fox")[0]
    wanted = {"prompt": "The fox" + " and the hen" * 20, "logit_bias": ((fox, 50.0),), "max_new_tokens": 1}
    for last_n, text in ((0, False), (2, True), (1024, False)):
        sampling = GREEDY.replace({"presence_penalty": 100.0, "repetition_penalty_range": last_n})
        assert (text_of(run(backend, sampling=sampling, **wanted)) == " fox") is text


@real_engine
def test_what_this_version_cannot_do_is_said(backend):
    with pytest.raises(ModelError, match="Images are not supported"):
        run(backend, "x", images=(b"png",))
    with pytest.raises(ModelError, match="LoRA"):
        run(backend, "x", adapters=(Adapter(Path("a.gguf")),))


@real_engine
def test_a_megabyte_of_text_and_more_than_a_frame(backend, monkeypatch):
    with pytest.raises(PromptTooLong, match="2048"):
        run(backend, "word " * 200_000)
    monkeypatch.setattr(client, "MAX_RAW", 10)
    with pytest.raises(PromptTooLong, match="MiB"):
        backend.encode("longer than ten bytes")


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
def test_cancel_of_a_waiting_request_ends_it_while_another_runs(backend):
    running = backend.generate(GenerationRequest("Once", ENDLESS))
    while not next(running).token_ids:
        pass
    token = CancelToken()
    waiting = backend.generate(GenerationRequest("Twice", GREEDY, cancel=token))
    threading.Timer(0.1, token.cancel).start()
    assert [chunk.finish_reason for chunk in waiting] == ["cancelled"]
    assert next(running).token_ids
    assert backend.encode("counted while a reply is written")
    running.close()


# --- death --------------------------------------------------------------------------------------------------------------------------


@real_engine
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_kill_during_a_reply_is_said_and_the_next_request_is_answered(starter_model):
    seen: list[float] = []
    backend = load(starter_model, lambda fraction, _words: seen.append(fraction))
    try:
        wanted = text_of(run(backend, "The fox"))
        stream = backend.generate(GenerationRequest("The fox", ENDLESS))
        for _ in range(5):
            next(stream)
        pid = backend.pid
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineDied, match=r"signal 9.*Your text is kept; send again"):
            list(stream)
        assert gone(pid) and not backend.alive() and backend.memory() == 0
        seen.clear()
        assert text_of(run(backend, "The fox")) == wanted and backend.alive() and seen[-1] == 1.0 and backend.pid != pid
    finally:
        backend.unload()
    assert gone(backend.pid)


@real_engine
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_repeated_deaths_are_not_repaired_for_ever(starter_model, monkeypatch):
    monkeypatch.setattr(client, "DEATHS_ALLOWED", 1)
    backend = load(starter_model)
    backend._deaths = client.collections.deque(maxlen=1)
    try:
        for _ in range(2):
            os.kill(backend.pid, signal.SIGKILL)
            assert gone(backend.pid)
            while backend.alive():
                time.sleep(0.01)
            if backend._deaths:
                with pytest.raises(EngineDied, match="Load the model again"):
                    backend.encode("x")
            else:
                assert backend.encode("x")
    finally:
        backend.unload()


@real_engine
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_new_start_can_be_cancelled_or_fail_and_leaves_no_process(starter_model, tmp_path):
    path = tmp_path / "moved.gguf"
    path.symlink_to(starter_model)
    seen: list[Callable[[], None]] = []
    backend = load(path, lambda _fraction, _words: [act() for act in seen])
    try:
        os.kill(backend.pid, signal.SIGKILL)
        assert gone(backend.pid)
        token = CancelToken()
        seen.append(token.cancel)
        assert run(backend, "x", cancel=token)[-1].finish_reason == "cancelled"
        assert gone(backend.pid)
        seen[:] = [backend.unload]
        with pytest.raises(EngineDied, match="could not be loaded again"):
            run(backend, "x")
        assert gone(backend.pid)
        with pytest.raises(ModelError, match="The model was unloaded"):
            backend.start(CancelToken())
        assert gone(backend.pid)
    finally:
        backend.unload()


@real_engine
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_frozen_engine_does_not_keep_anybody_waiting(starter_model, monkeypatch):
    monkeypatch.setattr(client, "Connection", lambda: Connection(silence=6.0))
    backend = load(starter_model)
    try:
        stream = backend.generate(GenerationRequest("The fox", ENDLESS))
        next(stream)
        os.kill(backend.pid, signal.SIGSTOP)
        token = CancelToken()
        token.cancel()
        assert run(backend, "x", cancel=token)[-1].finish_reason == "cancelled"  # Stop works although nobody answers
        with pytest.raises(EngineDied, match="did not answer for 6 seconds"):
            list(stream)
        assert run(backend, "The fox")[-1].finish_reason
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
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_the_engine_ends_when_its_parent_is_killed(starter_model):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(starter_model)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())  # it is in the middle of a prompt
    assert is_alive(pid)
    parent.kill()
    parent.wait(10)
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while is_alive(pid) and not _zombie(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(pid) or _zombie(pid)  # a container without an init does not reap orphans


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False


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
    monkeypatch.setattr(client, "Connection", lambda: Connection((sys.executable, "-c", "import os; os.abort()")))
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

    def check_heartbeat(self) -> None:
        pass

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
