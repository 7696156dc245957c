"""A plan of samplers (`samplers.py`) as llama.cpp's native samplers. Engine process only."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np

from modules.backends.llama_cpp.samplers import WHOLE_CONTEXT
from modules.errors import SettingsError

Sampler = Any  # llama_sampler_p


@dataclass(frozen=True)
class Vocabulary:
    """What samplers need to know of a model."""

    pointer: Any
    size: int
    end_tokens: tuple[int, ...]
    """Tokens that end a generation (EOS, end of turn, …)."""
    context: int


class Chain:
    """The samplers of one request, with their state. `close` frees them; use no other method after it."""

    def __init__(self, plan: Iterable[tuple[str, Mapping[str, Any]]], vocabulary: Vocabulary) -> None:
        """Raises SettingsError for a wrong grammar or a token that the model does not have."""
        self._vocabulary = vocabulary
        self._grammar: Sampler | None = None
        self._listeners: list[tuple[Sampler, int]] = []  # and how many last tokens each looks at
        self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        stages = list(plan)
        self._greedy: tuple[np.ndarray, np.ndarray] | None = None
        try:
            for name, args in stages:
                self._add(name, args)
            if {name for name, _ in stages} <= {"logit_bias", "ban_eos", "greedy"} and stages[-1][0] == "greedy":
                self._greedy = self._biases(stages)
        except BaseException:
            self.close()
            raise

    def _add(self, name: str, args: Mapping[str, Any]) -> None:
        sampler = _MAKERS[name](self._vocabulary, args)
        if name == "grammar":
            self._grammar = sampler
            return
        lib.llama_sampler_chain_add(self._chain, sampler)
        if name in ("penalties", "dry"):
            self._listeners.append((sampler, _window(self._vocabulary, args["last_n"])))

    def _biases(self, stages: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, and what is added to their logits."""
        bias = {token: value for name, args in stages if name == "logit_bias" for token, value in args["bias"]}
        if any(name == "ban_eos" for name, _ in stages):
            bias |= dict.fromkeys(self._vocabulary.end_tokens, float("-inf"))
        return np.array(list(bias), np.int64), np.array(list(bias.values()), np.float32)

    def accept_prompt(self, tokens: Sequence[int]) -> None:
        """Show the end of the prompt to penalties and DRY. A grammar, and samplers that learn from their own choices, do not see it."""
        for sampler, window in self._listeners:
            for token in tokens[-window:] if window else ():
                lib.llama_sampler_accept(sampler, token)

    def sample(self, context: Any, index: int) -> int | None:
        """Choose and accept a token from the logits of output `index`; None when the grammar allows nothing more."""
        if self._greedy is not None:  # the native samplers would first make a list of all candidates
            logits = self._logits(context, index)
            tokens, values = self._greedy
            if not len(tokens):
                return int(np.argmax(logits))
            before = logits[tokens]
            logits[tokens] += values
            chosen = int(np.argmax(logits))
            logits[tokens] = before  # they are the model's: its probabilities are asked afterwards
            return chosen
        if self._grammar is None:
            return int(lib.llama_sampler_sample(self._chain, context, index))
        token = self._sample_grammar(self._logits(context, index))
        if token is not None:
            lib.llama_sampler_accept(self._chain, token)
            if token not in self._vocabulary.end_tokens:
                lib.llama_sampler_accept(self._grammar, token)
        return token

    def _logits(self, context: Any, index: int) -> np.ndarray:
        return np.ctypeslib.as_array(lib.llama_get_logits_ith(context, index), (self._vocabulary.size,))

    def _sample_grammar(self, logits: np.ndarray) -> int | None:
        """As llama.cpp's own tools do: choose freely, and only if the grammar forbids that token mask the whole vocabulary first.

        Masking costs 3 ms at 49,000 tokens, checking one token nothing.
        """
        ids = np.arange(self._vocabulary.size, dtype=np.int32)
        token = self._apply(self._chain, _Candidates(ids, logits))
        if self._allowed(token):
            return token
        candidates = _Candidates(ids, logits)
        lib.llama_sampler_apply(self._grammar, candidates.pointer)
        if not np.isfinite(candidates.data["logit"]).any():
            return None
        token = self._apply(self._chain, candidates)
        # False only when biases ban all that the grammar allows (ban_eos at its end): nothing can follow.
        return token if self._allowed(token) and np.isfinite(candidates.chosen_logit) else None

    def _apply(self, sampler: Sampler, candidates: _Candidates) -> int:
        lib.llama_sampler_apply(sampler, candidates.pointer)
        return candidates.chosen

    def _allowed(self, token: int) -> bool:
        one = _Candidates(np.array([token], dtype=np.int32), np.ones(1, dtype=np.float32))
        lib.llama_sampler_apply(self._grammar, one.pointer)
        return bool(np.isfinite(one.data["logit"][0]))

    def close(self) -> None:
        """Free the native samplers."""
        lib.llama_sampler_free(self._chain)
        if self._grammar is not None:
            lib.llama_sampler_free(self._grammar)


class _Candidates:
    """A native array of candidate tokens. Samplers may put another array in its place; `chosen` looks there."""

    def __init__(self, ids: np.ndarray, logits: np.ndarray) -> None:
        self.data = np.zeros(len(ids), dtype=[("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])
        self.data["id"], self.data["logit"] = ids, logits
        self._array = lib.llama_token_data_array(ctypes.cast(self.data.ctypes.data, lib.llama_token_data_p), len(ids), -1, False)
        self.pointer = ctypes.byref(self._array)

    @property
    def chosen(self) -> int:
        return int(self._array.data[self._array.selected].id)

    @property
    def chosen_logit(self) -> float:
        return float(self._array.data[self._array.selected].logit)


def _window(vocabulary: Vocabulary, last_n: int) -> int:
    return vocabulary.context if last_n == WHOLE_CONTEXT else min(last_n, vocabulary.context)


def _logit_bias(vocabulary: Vocabulary, args: Mapping[str, Any]) -> Sampler:
    for token, _ in args["bias"]:
        if not 0 <= token < vocabulary.size:
            raise SettingsError(f"There is no token {token} in this model: its tokens are 0 to {vocabulary.size - 1}. Correct the ban or bias.")
    array = (lib.llama_logit_bias * len(args["bias"]))(*(lib.llama_logit_bias(token, value) for token, value in args["bias"]))
    return lib.llama_sampler_init_logit_bias(vocabulary.size, len(array), array)


def _ban_eos(vocabulary: Vocabulary, _args: Mapping[str, Any]) -> Sampler:
    return _logit_bias(vocabulary, {"bias": [(token, float("-inf")) for token in vocabulary.end_tokens]})


def _penalties(vocabulary: Vocabulary, args: Mapping[str, Any]) -> Sampler:
    window = _window(vocabulary, args["last_n"])
    return lib.llama_sampler_init_penalties(vocabulary.size, window, args["repeat"], args["frequency"], args["presence"])


def _dry(vocabulary: Vocabulary, args: Mapping[str, Any]) -> Sampler:
    breakers = [text.encode("utf-8", "replace") for text in args["breakers"]]
    return lib.llama_sampler_init_dry(
        vocabulary.pointer,
        args["multiplier"],
        args["base"],
        args["allowed_length"],
        _window(vocabulary, args["last_n"]),
        (ctypes.c_char_p * len(breakers))(*breakers),
        len(breakers),
    )


def _grammar(vocabulary: Vocabulary, args: Mapping[str, Any]) -> Sampler:
    text = args["text"].encode("utf-8", "replace")
    check_grammar(text)
    with _native_errors() as said:
        sampler = lib.llama_sampler_init_grammar(vocabulary.pointer, text, b"root")
    if not sampler:
        reason = next((line.removeprefix("parse: error parsing grammar: ") for line in said if line.startswith("parse:")), "")
        reason = reason.removesuffix(" at ") or "it needs a rule named root, and no rule may begin with itself"
        raise SettingsError(f"The grammar cannot be used: {reason}. Correct it, or empty the field.")
    return sampler


MAX_GRAMMAR = 64 * 1024
MAX_RULES = 2000
MAX_BRACKETS = 100
MAX_BRANCHES = 2000


def check_grammar(text: bytes) -> None:
    """Raise SettingsError for a grammar that is too much for llama.cpp's parser, which is recursive and whose choices are all tried at once."""
    depth = deepest = 0
    plain = re.sub(rb'"(\\.|[^"\\])*"|\[(\\.|[^\]\\])*\]|#[^\n]*', b'""', text)
    for character in plain:
        depth += (character == ord("(")) - (character == ord(")"))
        deepest = max(deepest, depth)
    for count, most, what in (
        (len(text), MAX_GRAMMAR, "bytes"),
        (plain.count(b"::="), MAX_RULES, "rules"),
        (deepest, MAX_BRACKETS, "brackets one inside the other"),
        (plain.count(b"|"), MAX_BRANCHES, "alternatives"),
    ):
        if count > most:
            raise SettingsError(f"The grammar cannot be used: it has {count} {what}, and at most {most} are read. Make it smaller.")


@contextmanager
def _native_errors() -> Any:
    """Lines that native code writes to stderr inside the block: llama.cpp says only there what is wrong with a grammar."""
    said: list[str] = []
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            said += file.read(4096).decode("utf-8", "replace").splitlines()


_MAKERS: dict[str, Callable[[Vocabulary, Mapping[str, Any]], Sampler]] = {
    "logit_bias": _logit_bias,
    "ban_eos": _ban_eos,
    "grammar": _grammar,
    "penalties": _penalties,
    "dry": _dry,
    "top_n_sigma": lambda _, a: lib.llama_sampler_init_top_n_sigma(a["value"]),
    "temperature": lambda _, a: lib.llama_sampler_init_temp(a["t"]),
    "dynamic_temperature": lambda _, a: lib.llama_sampler_init_temp_ext(a["t"], a["delta"], a["exponent"]),
    "top_k": lambda _, a: lib.llama_sampler_init_top_k(a["value"]),
    "top_p": lambda _, a: lib.llama_sampler_init_top_p(a["value"], 1),
    "typical_p": lambda _, a: lib.llama_sampler_init_typical(a["value"], 1),
    "min_p": lambda _, a: lib.llama_sampler_init_min_p(a["value"], 1),
    "xtc": lambda _, a: lib.llama_sampler_init_xtc(a["p"], a["t"], 1, a["seed"]),
    "mirostat": lambda v, a: lib.llama_sampler_init_mirostat(v.size, a["seed"], a["tau"], a["eta"], 100),
    "mirostat_v2": lambda _, a: lib.llama_sampler_init_mirostat_v2(a["seed"], a["tau"], a["eta"]),
    "adaptive_p": lambda _, a: lib.llama_sampler_init_adaptive_p(a["target"], a["decay"], a["seed"]),
    "greedy": lambda _, _a: lib.llama_sampler_init_greedy(),
    "dist": lambda _, a: lib.llama_sampler_init_dist(a["seed"]),
}
