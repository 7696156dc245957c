"""The tiny models themselves, and what llama.cpp really does with each kind of memory: the facts on which the engine's cache rests.

A fact that a newer llama.cpp changes fails here first. `may_end_at` is the one rule that follows from them.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modules.gguf import read_header
from tests.backends import tiny_models

lib = pytest.importorskip("llama_cpp.llama_cpp")

MAKERS: dict[str, Callable[[Path], Path]] = {
    "dense": tiny_models.dense,
    "sliding_window": tiny_models.sliding_window,
    "recurrent": tiny_models.recurrent,
    "hybrid": tiny_models.hybrid,
    "short_convolution": tiny_models.short_convolution,
}
STATES = ("recurrent", "hybrid", "short_convolution")
PARTIAL = lib.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
SAME, OTHER = 0.02, 0.1
"""Logits that differ by less come from the same history computed in another order; by more: from another history."""
NONE = (-1, -1)


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return [tiny_models.BOS, *np.random.default_rng(seed).integers(5, 300, count - 1).tolist()]


TOKENS = random_tokens(1500)
FORK = random_tokens(200, seed=1)[1:]


_SILENT = lib.llama_log_callback(lambda _level, _text, _data: None)  # the library keeps the address for as long as the process lives


class Context:
    """One context. Without flash attention, with a cache in 32 bits, on one thread: batches of any shape then give nearly the same logits."""

    def __init__(self, model: Any, **options: Any) -> None:
        params = lib.llama_context_default_params()
        plain = {"n_ctx": 2048, "n_batch": 512, "n_ubatch": 512, "n_seq_max": 8, "kv_unified": True, "swa_full": False}
        fixed = {"flash_attn_type": 0, "type_k": 0, "type_v": 0, "n_threads": 1, "n_threads_batch": 1}
        for name, value in {**plain, **fixed, **options}.items():
            setattr(params, name, value)
        self.raw = lib.llama_init_from_model(model, params)
        assert self.raw
        self.memory = lib.llama_get_memory(self.raw)
        self.vocabulary = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)))
        self._batch = lib.llama_batch_init(params.n_batch, 0, 1)

    def close(self) -> None:
        lib.llama_batch_free(self._batch)
        lib.llama_free(self.raw)

    def decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> tuple[int, np.ndarray]:
        """Compute (token, position, sequence, wanted) in one batch: the status, and the logits of the wanted ones (wanted, vocabulary)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index], batch.pos[index], batch.logits[index] = token, position, wanted
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
        status = int(lib.llama_decode(self.raw, batch))
        wanted = [index for index, row in enumerate(rows) if row[3]] if status == 0 else []
        return status, np.array([np.ctypeslib.as_array(lib.llama_get_logits_ith(self.raw, index), (self.vocabulary,)) for index in wanted])

    def extend(self, tokens: Sequence[int], sequence: int = 0, start: int = 0, step: int = 512) -> np.ndarray:
        """Append to a sequence that has `start` tokens, at most `step` in a batch; the logits after the last (vocabulary,)."""
        logits = np.zeros(0)
        for begin in range(0, len(tokens), step):
            part = tokens[begin : begin + step]
            rows = [(token, start + begin + index, sequence, index == len(part) - 1) for index, token in enumerate(part)]
            status, found = self.decode(rows)
            assert status == 0
            logits = found[0]
        return logits

    def greedy(self, tokens: Sequence[int], count: int, sequence: int = 0, start: int = 0, step: int = 512) -> tuple[list[int], np.ndarray]:
        """Append `tokens`, then the best token, `count` times: those tokens, and the logits that chose them (count, vocabulary)."""
        logits = self.extend(tokens, sequence, start, step)
        chosen, seen = [], []
        for index in range(count):
            chosen.append(int(logits.argmax()))
            seen.append(logits)
            logits = self.extend(chosen[-1:], sequence, start + len(tokens) + index)
        return chosen, np.array(seen)

    def ends(self, sequence: int = 0) -> tuple[int, int]:
        """The first and last position that is said to be there."""
        return int(lib.llama_memory_seq_pos_min(self.memory, sequence)), int(lib.llama_memory_seq_pos_max(self.memory, sequence))

    def cut(self, sequence: int, start: int, end: int = -1) -> bool:
        return bool(lib.llama_memory_seq_rm(self.memory, sequence, start, end))

    def copy(self, source: int, target: int, start: int = 0, end: int = -1) -> None:
        lib.llama_memory_seq_cp(self.memory, source, target, start, end)

    def clear(self) -> None:
        lib.llama_memory_clear(self.memory, True)

    def save(self, sequence: int, flags: int = 0) -> bytes:
        size = int(lib.llama_state_seq_get_size_ext(self.raw, sequence, flags))
        buffer = (ctypes.c_uint8 * size)()
        assert lib.llama_state_seq_get_data_ext(self.raw, buffer, size, sequence, flags) == size
        return bytes(buffer)

    def restore(self, state: bytes, sequence: int, flags: int = 0) -> int:
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        return int(lib.llama_state_seq_set_data_ext(self.raw, buffer, len(state), sequence, flags))

    def abort_next(self, abort: bool) -> None:
        """Let every computation from now on be aborted at its first node, or none."""
        self._callback = lib.ggml_abort_callback(lambda _data: True) if abort else lib.ggml_abort_callback()
        lib.llama_set_abort_callback(self.raw, self._callback, None)


def load(path: Path) -> Any:
    lib.llama_log_set(_SILENT, None)
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    assert model
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def models(folder: Path) -> Iterator[dict[str, Any]]:
    """Each model, loaded."""
    lib.llama_backend_init()
    loaded = {name: load(make(folder / f"{name}.gguf")) for name, make in MAKERS.items()}
    yield loaded
    for model in loaded.values():
        lib.llama_model_free(model)


@pytest.fixture
def open_context(models: dict[str, Any]) -> Iterator[Callable[..., Context]]:
    """Opens contexts by the model's name, and closes them."""
    opened: list[Context] = []

    def open_one(name: str, **options: Any) -> Context:
        opened.append(Context(models[name], **options))
        return opened[-1]

    yield open_one
    for context in opened:
        context.close()


@pytest.fixture
def truth(models: dict[str, Any]) -> Iterator[Callable[[str, Sequence[int]], np.ndarray]]:
    """Logits after `tokens`, computed alone in an empty cache."""
    contexts: dict[str, Context] = {}

    def logits(name: str, tokens: Sequence[int]) -> np.ndarray:
        context = contexts.setdefault(name, Context(models[name]))
        context.clear()
        return context.extend(tokens)

    yield logits
    for context in contexts.values():
        context.close()


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of two logits."""
    return float(np.abs(a - b).max())


# --- the files ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [*MAKERS.values(), tiny_models.bert], ids=lambda make: make.__name__)
def test_files_are_small_and_the_same_each_time(make: Callable[..., Path], tmp_path: Path) -> None:
    first, again, other = make(tmp_path / "a.gguf"), make(tmp_path / "b.gguf"), make(tmp_path / "c.gguf", seed=99)
    assert first.stat().st_size < 2_000_000
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()


def test_the_header_tells_what_the_app_reads(tmp_path: Path) -> None:
    header = read_header(tiny_models.dense(tmp_path / "dense.gguf"))
    assert (header.architecture, header.context_length, header.chat_template) == ("llama", tiny_models.CONTEXT, tiny_models.TEMPLATE)


@pytest.mark.parametrize(
    ("name", "recurrent", "hybrid", "window"),
    [("dense", 0, 0, 0), ("sliding_window", 0, 0, tiny_models.WINDOW), ("recurrent", 1, 0, 0), ("hybrid", 0, 1, 0), ("short_convolution", 0, 1, 0)],
)
def test_flags(models: dict[str, Any], name: str, recurrent: int, hybrid: int, window: int) -> None:
    model = models[name]
    assert bool(lib.llama_model_is_recurrent(model)) == bool(recurrent)
    assert bool(lib.llama_model_is_hybrid(model)) == bool(hybrid)
    assert lib.llama_model_n_swa(model) == window
    assert lib.llama_model_n_ctx_train(model) == tiny_models.CONTEXT


# --- text -----------------------------------------------------------------------------------------------------------------------------


def tokenize(model: Any, text: bytes) -> list[int]:
    buffer = (ctypes.c_int32 * (len(text) + 16))()
    count = lib.llama_tokenize(lib.llama_model_get_vocab(model), text, len(text), buffer, len(buffer), False, True)
    return buffer[:count]


def detokenize(model: Any, tokens: Sequence[int]) -> bytes:
    buffer = ctypes.create_string_buffer(64 * len(tokens) + 64)
    array = (ctypes.c_int32 * len(tokens))(*tokens)
    count = lib.llama_detokenize(lib.llama_model_get_vocab(model), array, len(tokens), buffer, len(buffer), False, True)
    return buffer.raw[:count]


def random_text(generator: random.Random) -> str:
    ranges = ((0x01, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFD), (0x1F300, 0x1FAFF))
    return "".join(chr(generator.randint(*generator.choice(ranges))) for _ in range(generator.randint(1, 40)))


def test_any_text_survives(models: dict[str, Any]) -> None:
    generator = random.Random(1)
    texts = ["", " ", "  two  spaces ", "▁ is not a space", "\r\n\ttabs", "hello why", "12345", "🦊👨‍👩‍👧", "Ġ Ċ ĉ", "<s></s>", "ﷺ" * 20]
    for text in (*texts, *(random_text(generator) for _ in range(500))):
        assert detokenize(models["dense"], tokenize(models["dense"], text.encode())) == text.encode()


def test_words_and_control_tokens_are_one_token(models: dict[str, Any]) -> None:
    tokens = tokenize(models["dense"], b"<|im_start|>user\nhello water<|im_end|>")
    assert [detokenize(models["dense"], [token]) for token in tokens] == [b"<|im_start|>", b"user", b"\n", b"hello", b" water", b"<|im_end|>"]
    assert (tokens[0], tokens[-1]) == (tiny_models.IM_START, tiny_models.IM_END)


def test_all_have_the_same_vocabulary(models: dict[str, Any]) -> None:
    vocabularies = [lib.llama_model_get_vocab(model) for model in models.values()]
    for vocabulary in vocabularies:
        texts = [lib.llama_vocab_get_text(vocabulary, token) for token in range(lib.llama_vocab_n_tokens(vocabulary))]
        assert texts == [lib.llama_vocab_get_text(vocabularies[0], token) for token in range(len(texts))]
        assert lib.llama_vocab_bos(vocabulary) == tiny_models.BOS and lib.llama_vocab_get_add_bos(vocabulary)
        assert lib.llama_vocab_eos(vocabulary) == tiny_models.EOS
        assert {token for token in range(len(texts)) if lib.llama_vocab_is_eog(vocabulary, token)} == {tiny_models.EOS, tiny_models.IM_END}


# --- what they write ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_greedy_output_is_clear_and_lively(models: dict[str, Any], open_context: Callable[..., Context], name: str) -> None:
    context = open_context(name)
    chosen, logits = context.greedy(TOKENS[:200], 100)
    context.clear()
    assert context.greedy(TOKENS[:200], 100)[0] == chosen
    best = np.sort(logits, axis=1)[:, -2:]
    lead = best[:, 1] - best[:, 0]
    assert np.median(lead) > 0.5 and (lead > 0.1).mean() > 0.8
    assert len(set(chosen)) > 30
    text = detokenize(models[name], chosen).decode("ascii")
    assert all(character == "\n" or character.isprintable() for character in text)


@pytest.mark.parametrize("name", MAKERS)
def test_pieces_of_any_size_give_the_same_continuation(open_context: Callable[..., Context], name: str) -> None:
    whole, logits = open_context(name).greedy(TOKENS[:200], 100)
    for step in (1, 7, 64):
        pieces, others = open_context(name).greedy(TOKENS[:200], 100, step=step)
        assert pieces == whole
        assert apart(logits, others) < SAME


@pytest.mark.parametrize("name", MAKERS)
def test_what_comes_next_depends_on_every_token(truth: Callable[..., np.ndarray], name: str) -> None:
    tokens = TOKENS[:60]
    logits = truth(name, tokens)
    for index in range(1, 60, 7):
        changed = [*tokens[:index], 5 + (tokens[index] + 60) % 250, *tokens[index + 1 :]]
        assert apart(logits, truth(name, changed)) > OTHER, f"token {index} does not count"


def test_another_seed_is_another_model_for_the_same_tokens(folder: Path, open_context: Callable[..., Context]) -> None:
    draft = load(tiny_models.dense(folder / "draft.gguf", seed=8))
    context = Context(draft)
    assert context.greedy(TOKENS[:50], 20)[0] != open_context("dense").greedy(TOKENS[:50], 20)[0]
    context.close()
    lib.llama_model_free(draft)


@pytest.mark.parametrize("name", ["dense", "sliding_window", "hybrid", "short_convolution"])
def test_the_cache_may_be_quantised(open_context: Callable[..., Context], truth: Callable[..., np.ndarray], name: str) -> None:
    q8_0 = open_context(name, type_k=8, type_v=8, flash_attn_type=1)
    assert apart(q8_0.extend(TOKENS[:50]), truth(name, TOKENS[:50])) < 0.5


def every_next(context: Context, length: int) -> np.ndarray:
    """Logits after each of the first `length` TOKENS, computed at once (length, vocabulary)."""
    rows = [(token, index, 0, True) for index, token in enumerate(TOKENS[:length])]
    return np.concatenate([context.decode(rows[start : start + 300])[1] for start in range(0, length, 300)])


# --- facts: cutting -------------------------------------------------------------------------------------------------------------------


def may_end_at(context: Context, sequence: int, end: int, window: int) -> bool:
    """The rule: whether a sequence would go on rightly, were it cut, or copied, to its first `end` tokens.

    It holds for all kinds of memory, because a state says that its first position is its last. It must be asked before: afterwards the
    positions may be gone (−1), and then nothing warns.
    """
    first, last = context.ends(sequence)
    if end in (0, last + 1):
        return True
    return 0 <= first <= (max(0, end - window + 1) if window else 0)


@pytest.mark.parametrize("name", ["dense", "sliding_window"])
def test_cells_say_where_they_begin_and_end(open_context: Callable[..., Context], name: str) -> None:
    context = open_context(name)
    context.extend(TOKENS[: tiny_models.WINDOW + 50])
    assert context.ends() == (0, tiny_models.WINDOW + 49)  # a window forgets only when its cells are wanted, not when it moves on


@pytest.mark.parametrize("name", STATES)
def test_a_state_begins_where_it_ends(open_context: Callable[..., Context], name: str) -> None:
    context = open_context(name)
    context.extend(TOKENS[:66])
    assert context.ends() == (65, 65)


@pytest.mark.parametrize("full", [False, True])
def test_a_window_keeps_more_than_it_sees(open_context: Callable[..., Context], full: bool) -> None:
    context = open_context("sliding_window", swa_full=full)
    context.extend(TOKENS[:1000])
    first, last = context.ends()
    assert last == 999
    assert first == 0 if full else 0 < first < last - tiny_models.WINDOW


CELLS = pytest.mark.parametrize(("name", "full"), [("dense", False), ("sliding_window", False), ("sliding_window", True)])


@CELLS
def test_cells_can_be_cut_wherever_the_rule_allows(open_context: Callable[..., Context], models: dict[str, Any], name: str, full: bool) -> None:
    """Also where it does not, says llama.cpp: it returns True and computes something else. Each end, from the last to the first."""
    right = every_next(open_context(name), 600)
    context = open_context(name, swa_full=full, n_ubatch=64)
    window = int(lib.llama_model_n_swa(models[name]))
    context.extend(TOKENS[:600])
    first, _ = context.ends()
    edge = max(first, 100) + window
    refused = 0
    for end in (599, 598, 590, 500, edge + 10, edge + 1, edge, edge - 1, edge - 2, edge - 4, edge - 8, edge - 15, edge - 20, 20, 1):
        allowed = may_end_at(context, 0, end, window)
        assert context.cut(0, end) is True
        distance = apart(context.extend(TOKENS[end : end + 1], start=end), right[end])
        assert distance < SAME if allowed else distance > OTHER, f"cut to {end}, first position {first}"
        refused += not allowed
    assert (refused > 3) == (name == "sliding_window" and not full)


def test_a_window_that_moved_on_vanishes_when_cut_and_nothing_warns(open_context: Callable[..., Context], truth: Callable[..., np.ndarray]) -> None:
    context = open_context("sliding_window", n_ubatch=64)
    context.extend(TOKENS[:800])
    assert context.cut(0, 50) is True
    assert context.ends() == NONE  # the layers that see everything still hold 50 tokens
    status, logits = context.decode([(FORK[0], 50, 0, True)])
    assert status == 0
    assert apart(logits[0], truth("sliding_window", [*TOKENS[:50], FORK[0]])) > 1


@pytest.mark.parametrize("name", STATES)
def test_a_state_cannot_be_cut(open_context: Callable[..., Context], truth: Callable[..., np.ndarray], name: str) -> None:
    """Nothing changes when it is tried; cutting all of it, or nothing, succeeds."""
    context = open_context(name)
    context.extend(TOKENS[:66])
    for end in (65, 60, 1):
        assert not may_end_at(context, 0, end, 0)
        assert context.cut(0, end) is False
        assert context.ends() == (65, 65)
    assert context.decode([(FORK[0], 60, 0, True)])[0] == -1  # positions must follow one another
    assert context.cut(0, 66) is True
    assert apart(context.extend(FORK[:1], start=66), truth(name, [*TOKENS[:66], FORK[0]])) < SAME
    assert context.cut(0, 0) is True
    assert context.ends() == NONE
    assert apart(context.extend(FORK[:5]), truth(name, FORK[:5])) < SAME


@pytest.mark.parametrize("name", STATES)
def test_cutting_the_front_of_a_state_does_nothing_and_says_true(open_context: Callable[..., Context], name: str) -> None:
    context = open_context(name)
    context.extend(TOKENS[:66])
    assert context.cut(0, 0, 30) is True
    assert context.ends() == (65, 65)


def test_cutting_what_is_not_there_succeeds(open_context: Callable[..., Context]) -> None:
    for name in MAKERS:
        context = open_context(name)
        context.extend(TOKENS[:20])
        assert context.cut(0, 1000) and context.cut(5, 0) and context.cut(5, 7)
        assert context.ends()[1] == 19


def test_some_states_can_be_taken_back(open_context: Callable[..., Context], truth: Callable[..., np.ndarray]) -> None:
    """`n_rs_seq`: by at most so many tokens, all from the last batch, once. Enough for speculation with architectures that have it."""
    name, length = "short_convolution", 100
    context = open_context(name, n_rs_seq=4)
    assert lib.llama_n_rs_seq(context.raw) == 4
    for back in (1, 4):
        context.clear()
        context.extend(TOKENS[:length])
        assert context.cut(0, length - back) is True
        assert context.cut(0, length - back - 1) is False  # not again before something is computed
        assert apart(context.extend(FORK[:3], start=length - back), truth(name, [*TOKENS[: length - back], *FORK[:3]])) < SAME
    context.clear()
    context.extend(TOKENS[:length])
    assert context.cut(0, length - 5) is False


def test_taking_back_a_state_beyond_its_last_batch_is_wrong_and_says_true(
    open_context: Callable[..., Context], truth: Callable[..., np.ndarray]
) -> None:
    context = open_context("short_convolution", n_rs_seq=4)
    context.extend(TOKENS[:100], step=1)
    assert context.cut(0, 98) is True
    assert apart(context.extend(FORK[:3], start=98), truth("short_convolution", [*TOKENS[:98], *FORK[:3]])) > OTHER


def test_a_copy_of_a_state_just_taken_back_is_wrong(open_context: Callable[..., Context], truth: Callable[..., np.ndarray]) -> None:
    context = open_context("short_convolution", n_rs_seq=4)
    context.extend(TOKENS[:100])
    assert context.cut(0, 98)
    context.copy(0, 1)
    right = truth("short_convolution", [*TOKENS[:98], *FORK[:3]])
    assert apart(context.extend(FORK[:3], sequence=1, start=98), right) > OTHER
    assert apart(context.extend(FORK[:3], sequence=0, start=98), right) < SAME


@pytest.mark.parametrize("name", ["recurrent", "hybrid"])
def test_most_states_cannot_be_taken_back(open_context: Callable[..., Context], name: str) -> None:
    assert lib.llama_n_rs_seq(open_context(name, n_rs_seq=4).raw) == 0


# --- facts: copying -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_copies_go_their_own_ways(open_context: Callable[..., Context], truth: Callable[..., np.ndarray], name: str) -> None:
    """Seven copies and their source, each with other tokens, in batches in which each has another number of them."""
    context = open_context(name)
    context.extend(TOKENS[:120])
    for sequence in range(1, 8):
        context.copy(0, sequence)
        assert context.ends(sequence) == context.ends(0)
    histories = [list(TOKENS[:120]) for _ in range(8)]
    logits: dict[int, np.ndarray] = {}
    for turn in range(12):
        rows = []
        for sequence, history in enumerate(histories):
            new = [5 + (token + 13 * sequence) % 290 for token in FORK[5 * turn : 5 * turn + 1 + (sequence * turn) % 5]]
            rows += [(token, len(history) + index, sequence, index == len(new) - 1) for index, token in enumerate(new)]
            history += new
        status, found = context.decode(rows)
        assert status == 0
        logits = dict(enumerate(found))
    for sequence, history in enumerate(histories):
        assert apart(logits[sequence], truth(name, history)) < SAME


@pytest.mark.parametrize("name", MAKERS)
def test_greedy_continuations_of_copies_are_those_computed_alone(open_context: Callable[..., Context], name: str) -> None:
    alone = [open_context(name).greedy([*TOKENS[:100], *FORK[start : start + 5]], 30)[0] for start in (0, 50)]
    context = open_context(name)
    context.extend(TOKENS[:100])
    context.copy(0, 1)
    shared = [context.greedy(FORK[start : start + 5], 30, sequence, 100)[0] for sequence, start in ((0, 0), (1, 50))]
    assert shared == alone


@CELLS
def test_cells_of_a_prefix_can_be_copied_wherever_the_rule_allows(
    open_context: Callable[..., Context], models: dict[str, Any], name: str, full: bool
) -> None:
    right = every_next(open_context(name), 600)
    context = open_context(name, swa_full=full, n_ubatch=64)
    window = int(lib.llama_model_n_swa(models[name]))
    context.extend(TOKENS[:590])
    for end in (360, 480, 371, 366, 364, 358, 355, 345, 50, 10):
        allowed = may_end_at(context, 0, end, window)
        context.copy(0, 1, 0, end)
        distance = apart(context.extend(TOKENS[end : end + 1], sequence=1, start=end), right[end])
        assert distance < SAME if allowed else distance > OTHER, f"copied to {end}, first position {context.ends()[0]}"
        assert context.cut(1, 0)
    assert apart(context.extend(TOKENS[590:591], start=590), right[590]) < SAME


@pytest.mark.parametrize("name", STATES)
def test_a_state_is_copied_whole_whatever_range_is_asked(open_context: Callable[..., Context], truth: Callable[..., np.ndarray], name: str) -> None:
    context = open_context(name)
    context.extend(TOKENS[:120])
    context.copy(0, 1, 0, 100)
    first, last = context.ends(1)
    assert first == 119
    if name == "recurrent":
        assert last == 119
        assert context.decode([(FORK[0], 100, 1, True)])[0] == -1
    else:
        assert last == 99  # only its cells end there, and nothing warns
        assert apart(context.extend(FORK[:1], sequence=1, start=100), truth(name, [*TOKENS[:100], FORK[0]])) > OTHER


@pytest.mark.parametrize("name", MAKERS)
def test_the_target_of_a_copy_must_be_empty(open_context: Callable[..., Context], truth: Callable[..., np.ndarray], name: str) -> None:
    """What stood there stays among the new cells; only a state alone is replaced."""
    context = open_context(name)
    context.extend(TOKENS[:60])
    context.extend(FORK[:60], sequence=1)
    context.copy(0, 1)
    distance = apart(context.extend(FORK[:1], sequence=1, start=60), truth(name, [*TOKENS[:60], FORK[0]]))
    assert distance < SAME if name == "recurrent" else distance > OTHER
    assert context.cut(1, 0)
    context.copy(0, 1)
    assert apart(context.extend(FORK[:1], sequence=1, start=60), truth(name, [*TOKENS[:60], FORK[0]])) < SAME


def test_cells_of_a_window_that_two_sequences_hold_are_never_free(open_context: Callable[..., Context]) -> None:
    """Out of everybody's sight, they still cannot be taken: copies of a long sequence stop each other, and their source."""
    context = open_context("sliding_window", n_ubatch=64)
    context.extend(TOKENS[:800])
    context.copy(0, 1)
    for sequence in (0, 1):
        assert context.decode([(FORK[0], 800, sequence, True)])[0] == 1
    assert context.cut(1, 0)
    assert context.decode([(FORK[0], 800, 0, True)])[0] == 0


def test_a_window_as_large_as_the_context_has_no_such_limit(open_context: Callable[..., Context], truth: Callable[..., np.ndarray]) -> None:
    context = open_context("sliding_window", swa_full=True)
    context.extend(TOKENS[:800])
    for sequence in range(1, 4):
        context.copy(0, sequence)
    for sequence in range(4):
        tail = FORK[sequence : sequence + 30]
        assert apart(context.extend(tail, sequence, 800), truth("sliding_window", [*TOKENS[:800], *tail])) < SAME


def test_even_then_idle_sequences_lose_cells_out_of_sight_to_others(open_context: Callable[..., Context], truth: Callable[..., np.ndarray]) -> None:
    """While free cells are left: so the rule must be asked each time, with any window."""
    context = open_context("sliding_window", swa_full=True)
    for sequence in range(2):
        context.extend(TOKENS[:400], sequence)
    assert context.cut(0, 0)
    context.extend(FORK[:199], 2)
    context.extend([*FORK, *FORK, *FORK], 3)
    first, last = context.ends(1)
    assert 0 < first < last == 399
    assert may_end_at(context, 1, 400, tiny_models.WINDOW) and not may_end_at(context, 1, 100, tiny_models.WINDOW)
    assert apart(context.extend(FORK[:1], 1, 400), truth("sliding_window", [*TOKENS[:400], FORK[0]])) < SAME


def test_a_copy_gets_its_own_window_through_its_partial_state(open_context: Callable[..., Context], truth: Callable[..., np.ndarray]) -> None:
    """The way out with a small window: the target's part within the window is written anew, the other layers' cells stay shared."""
    context = open_context("sliding_window", n_ubatch=64)
    context.extend(TOKENS[:800])
    ends = {1: 800, 2: 730}
    for sequence, end in ends.items():
        assert may_end_at(context, 0, end, tiny_models.WINDOW)
        context.copy(0, sequence, 0, end)
        state = context.save(sequence, PARTIAL)
        assert context.restore(state, sequence, PARTIAL) == len(state)
        assert context.ends(sequence) == (end - tiny_models.WINDOW, end - 1)
    for sequence, end in {0: 800, **ends}.items():
        assert apart(context.extend(FORK[:50], sequence, end, step=10), truth("sliding_window", [*TOKENS[:end], *FORK[:50]])) < SAME


# --- facts: saving --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_a_saved_sequence_comes_back_under_another_number(open_context: Callable[..., Context], truth: Callable[..., np.ndarray], name: str) -> None:
    context = open_context(name)
    context.extend(TOKENS[:120])
    state = context.save(0)
    right = truth(name, [*TOKENS[:120], *FORK[:10]])
    assert context.restore(state, 4) == len(state)
    assert context.ends(4)[1] == 119
    assert apart(context.extend(FORK[:10], 4, 120), right) < SAME
    assert apart(context.extend(FORK[:10], 0, 120), right) < SAME
    assert context.restore(state, 4) == len(state)  # over a sequence in use
    assert apart(context.extend(FORK[:10], 4, 120), right) < SAME
    other = open_context(name, n_seq_max=64)
    assert other.restore(state, 63) == len(state)
    assert apart(other.extend(FORK[:10], 63, 120), right) < SAME


def test_a_saved_window_has_nothing_to_cut(open_context: Callable[..., Context]) -> None:
    """Only what the next token sees is saved, so a restored sequence can go on, or compute its last token again, and no more."""
    context = open_context("sliding_window")
    context.extend(TOKENS[:120])
    context.restore(context.save(0), 4)
    assert context.ends(4) == (120 - tiny_models.WINDOW, 119)
    assert [end for end in range(1, 121) if may_end_at(context, 4, end, tiny_models.WINDOW)] == [119, 120]


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_cut_short_is_refused_and_leaves_the_sequence_empty(
    open_context: Callable[..., Context], truth: Callable[..., np.ndarray], name: str
) -> None:
    context = open_context(name)
    context.extend(TOKENS[:120])
    state = context.save(0)
    assert context.restore(state[: len(state) // 2], 5) == 0
    assert context.ends(5) == NONE
    assert apart(context.extend(FORK[:20], 5), truth(name, FORK[:20])) < SAME


@pytest.mark.parametrize("name", ["sliding_window", *STATES])
def test_a_partial_state_brings_an_earlier_end_back(open_context: Callable[..., Context], truth: Callable[..., np.ndarray], name: str) -> None:
    """A checkpoint: taken where somebody may want to go on, small, and good for going back and for copies of a prefix."""
    context = open_context(name)
    context.extend(TOKENS[:120])
    checkpoint = context.save(0, PARTIAL)
    context.extend(TOKENS[120:900], start=120)
    right = truth(name, [*TOKENS[:120], *FORK[:10]])

    context.copy(0, 1, 0, 120)
    assert context.restore(checkpoint, 1, PARTIAL) == len(checkpoint)
    assert apart(context.extend(FORK[:10], 1, 120), right) < SAME

    assert apart(context.extend(FORK[:1], 0, 900), truth(name, [*TOKENS[:900], FORK[0]])) < SAME
    assert context.restore(checkpoint, 0, PARTIAL) == len(checkpoint)
    assert context.cut(0, 120) is True  # the cells; after the state, which would refuse before
    assert apart(context.extend(FORK[:10], 0, 120), right) < SAME


def test_what_a_sequence_costs(open_context: Callable[..., Context]) -> None:
    """A state is as large for one token as for many, and one is set aside for each of `n_seq_max` sequences; in a hybrid the cells come on top."""
    sizes = {}
    for name in MAKERS:
        context = open_context(name)
        for length in (100, 200):
            context.clear()
            context.extend(TOKENS[:length])
            sizes[name, length] = (len(context.save(0)), len(context.save(0, PARTIAL)))
    assert sizes["recurrent", 100] == sizes["recurrent", 200]
    for name in ("hybrid", "short_convolution", "sliding_window"):
        (whole, part), (longer, same) = sizes[name, 100], sizes[name, 200]
        assert part == same < whole < longer
    assert sizes["dense", 100][0] == sizes["dense", 100][1]  # a cache of cells alone has no part that is small


# --- facts: when computing fails ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_a_full_cache_changes_nothing(open_context: Callable[..., Context], truth: Callable[..., np.ndarray], name: str) -> None:
    context = open_context(name, n_ctx=256)
    for sequence in (0, 1):
        context.extend(TOKENS[:100], sequence)
    context.copy(0, 2)
    before = [context.ends(sequence) for sequence in range(3)]
    status, _ = context.decode([(token, 100 + index, 2, index == 99) for index, token in enumerate(FORK[:100])])
    assert status == (0 if name == "recurrent" else 1)  # a state is never full
    for sequence in range(2 if name == "recurrent" else 3):
        assert context.ends(sequence) == before[sequence]
        assert apart(context.extend(FORK[:1], sequence, 100), truth(name, [*TOKENS[:100], FORK[0]])) < SAME


@pytest.mark.parametrize("name", MAKERS)
def test_an_aborted_batch_and_its_own_sequences(open_context: Callable[..., Context], truth: Callable[..., np.ndarray], name: str) -> None:
    """Cells: as before. A state: it claims the new position, is lost, and must be removed."""
    context = open_context(name)
    context.extend(TOKENS[:60])
    context.abort_next(True)
    assert context.decode([(token, 60 + index, 0, index == 9) for index, token in enumerate(FORK[:10])])[0] == 2
    context.abort_next(False)
    if name in STATES:
        assert context.ends() == (69, 69)
        assert context.cut(0, 60) is False
        assert context.cut(0, 0) is True
    else:
        assert context.ends() == (0, 59)
        assert apart(context.extend(FORK[:10], start=60), truth(name, [*TOKENS[:60], *FORK[:10]])) < SAME


@pytest.mark.parametrize("name", MAKERS)
def test_an_aborted_batch_and_the_others(open_context: Callable[..., Context], truth: Callable[..., np.ndarray], name: str) -> None:
    """In a hybrid, a batch of two sequences whose states are not neighbours spoils the one between them: its state is moved, its data is not yet.

    So a batch is never aborted there, or all sequences are forgotten.
    """
    context = open_context(name)
    for sequence in range(3):
        context.extend(TOKENS[: 40 + 10 * sequence], sequence)
    context.abort_next(True)
    assert (
        context.decode([(token, 40 + 10 * sequence + index, sequence, index == 9) for sequence in (0, 2) for index, token in enumerate(FORK[:10])])[0]
        == 2
    )
    context.abort_next(False)
    assert context.ends(1)[1] == 49
    distance = apart(context.extend(FORK[:3], 1, 50), truth(name, [*TOKENS[:50], *FORK[:3]]))
    assert distance > OTHER if name in ("hybrid", "short_convolution") else distance < SAME


# --- embeddings -----------------------------------------------------------------------------------------------------------------------


def embed(context: Context, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """One embedding a text (texts, width), in one batch."""
    status, _ = context.decode([(token, index, number, True) for number, text in enumerate(texts) for index, token in enumerate(text)])
    assert status == 0
    return np.array([np.ctypeslib.as_array(lib.llama_get_embeddings_seq(context.raw, number), (64,)) for number in range(len(texts))])


def test_bert_embeds_texts_together_as_alone(folder: Path) -> None:
    model = load(tiny_models.bert(folder / "bert.gguf"))
    assert (lib.llama_model_n_embd(model), lib.llama_model_n_ctx_train(model)) == (64, 512)
    assert lib.llama_model_has_decoder(model) and not lib.llama_model_has_encoder(model)  # so these do not tell an embedding model
    context = Context(model, n_ctx=512, embeddings=True)
    assert not context.memory  # but this does
    assert lib.llama_pooling_type(context.raw) == lib.LLAMA_POOLING_TYPE_MEAN
    texts = [tokenize(model, text) for text in (b"hello water", b"hello water!", b"why is the name one", b"12345 67890")]
    together = embed(context, texts)
    alone = np.array([embed(context, [text])[0] for text in texts])
    assert apart(together, alone) < 1e-3
    unit = together / np.linalg.norm(together, axis=1, keepdims=True)
    likeness = unit @ unit.T
    assert likeness[0, 1] > likeness[0, 2] and likeness[0, 1] > likeness[0, 3]
    assert likeness[~np.eye(4, dtype=bool)].max() < 0.99
    swapped = embed(context, [texts[0][::-1]])[0]
    assert apart(swapped, together[0]) > 0.01  # the order of the tokens counts
    context.close()
    lib.llama_model_free(model)


# --- adapters -------------------------------------------------------------------------------------------------------------------------


class Adapted:
    """A model's context, with adapters to set."""

    def __init__(self, path: Path) -> None:
        self.model = load(path)
        self.context = Context(self.model)

    def adapter(self, path: Path) -> Any:
        found = lib.llama_adapter_lora_init(self.model, str(path).encode())
        assert found
        return found

    def use(self, *adapters: tuple[Any, float]) -> None:
        handles = (lib.llama_adapter_lora_p_ctypes * len(adapters))(*(adapter for adapter, _ in adapters))
        scales = (ctypes.c_float * len(adapters))(*(scale for _, scale in adapters))
        assert lib.llama_set_adapters_lora(self.context.raw, handles, len(adapters), scales) == 0

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        self.context.clear()
        return self.context.greedy(tokens, count)[0]

    def close(self) -> None:
        self.context.close()
        lib.llama_model_free(self.model)


def check_adapter(base: Path, folder: Path, text: bytes) -> None:
    adapted = Adapted(base)
    tokens = tokenize(adapted.model, text)
    one, two = (adapted.adapter(tiny_models.lora(folder / f"lora{seed}.gguf", base, seed=seed)) for seed in (1, 2))
    idle = adapted.adapter(tiny_models.lora(folder / "idle.gguf", base, strength=0))
    plain = adapted.greedy(tokens, 10)
    outputs = [plain]
    for use in ([(one, 1.0)], [(two, 1.0)], [(one, 0.5)], [(one, 1.0), (two, 1.0)]):
        adapted.use(*use)
        outputs.append(adapted.greedy(tokens, 10))
    assert len({tuple(output) for output in outputs}) == len(outputs)
    for use in ([(idle, 1.0)], [(one, 0.0)], []):
        adapted.use(*use)
        assert adapted.greedy(tokens, 10) == plain
    adapted.close()


def test_adapters_change_the_output(folder: Path, tmp_path: Path) -> None:
    check_adapter(tiny_models.dense(tmp_path / "base.gguf"), tmp_path, b"why is the water one name")


@pytest.mark.engine
def test_adapters_change_the_output_of_the_starter_model(starter_model: Path, tmp_path: Path) -> None:
    check_adapter(starter_model, tmp_path, b"<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")


def test_cells_hold_the_adapter_they_were_computed_with(tmp_path: Path) -> None:
    """So a prefix may be shared between requests with the same adapters only."""
    adapted = Adapted(tiny_models.dense(tmp_path / "base.gguf"))
    adapter = adapted.adapter(tiny_models.lora(tmp_path / "lora.gguf", tmp_path / "base.gguf"))
    context = adapted.context
    context.extend(TOKENS[:60])
    adapted.use((adapter, 1.0))
    mixed = context.extend(FORK[:1], start=60)
    context.clear()
    context.extend(TOKENS[:60])
    assert apart(context.extend(FORK[:1], start=60), mixed) > OTHER
    adapted.close()


def test_adapters_are_for_llama_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mamba"):
        tiny_models.lora(tmp_path / "lora.gguf", tiny_models.recurrent(tmp_path / "base.gguf"))
