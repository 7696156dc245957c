"""Grammars and JSON schemas: llguidance tells which tokens may come next."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import torch

from modules.backends.transformers.text import Text
from modules.errors import ModelError, SettingsError

MAX_GRAMMAR = 256 * 1024
"""Characters of a grammar or schema."""
_ESCAPE = re.compile(r"(?<!\\)\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))")
_SPACE = r"( |\n[ ]{0,20})?"
"""Between two parts of JSON: at most so much, so that a model cannot go on writing nothing."""


class Grammars:
    """Makes followers for one tokenizer. Methods may be called from any thread."""

    def __init__(self, text: Text, ends: tuple[int, ...]) -> None:
        self._text = text
        self._ends = ends
        self._lock = threading.Lock()
        self._tokenizer: Any = None

    def follower(self, grammar: str, json_schema: str) -> Follower | None:
        """What follows a GBNF grammar or a JSON schema; None when neither is asked for. Raises SettingsError with what is wrong."""
        if not grammar.strip() and not json_schema:
            return None
        if grammar.strip() and json_schema:
            raise SettingsError("A grammar and a JSON schema cannot both be followed. Leave one out.")
        if len(grammar) + len(json_schema) > MAX_GRAMMAR:
            raise SettingsError(f"The grammar or schema has more than {MAX_GRAMMAR} characters. Make it smaller.")
        from llguidance import LLMatcher

        text = _of_schema(json_schema) if json_schema else _of_gbnf(grammar)
        matcher = LLMatcher(self._made(), text, log_level=0)
        if matcher.is_error():
            what = "JSON schema" if json_schema else "grammar"
            raise SettingsError(f"The {what} cannot be followed: {_first(matcher.get_error())}. Correct or simplify it.")
        return Follower(matcher)

    def _made(self) -> Any:
        """The tokenizer in llguidance's form: made once, which takes a while."""
        with self._lock:
            if self._tokenizer is None:
                import llguidance.hf

                try:
                    ends = list(self._ends)
                    size = max(self._text.vocabulary, len(self._text.tokenizer))
                    self._tokenizer = llguidance.hf.from_tokenizer(self._text.tokenizer, n_vocab=size, eos_token=ends or None)
                except (ValueError, TypeError, AttributeError, RuntimeError) as error:
                    raise ModelError(f"Grammars cannot be used with this model's tokenizer: {str(error)[:200]}. Leave the grammar out.") from None
            return self._tokenizer


def _first(text: str) -> str:
    """The first line of an error."""
    return (text.strip().splitlines() or ["it is too complex"])[0][:200].rstrip(".")


def _written_out(escape: re.Match[str]) -> str:
    """The character of an escape with its number, where it means nothing else in a text or a class: the converter reads some of these wrongly."""
    character = chr(min(int(next(filter(None, escape.groups())), 16), 0x10FFFF))
    return character if character.isprintable() and character not in '"\\[]^-/' else escape[0]


def _of_gbnf(grammar: str) -> str:
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return LLMatcher.grammar_from_lark(gbnf_to_lark(_ESCAPE.sub(_written_out, grammar)))
    except Exception as error:  # noqa: BLE001  # the converter raises plain ones
        raise SettingsError(f"The grammar cannot be read: {_first(str(error))}. Correct it: it must be GBNF with a rule named root.") from None


def _of_schema(schema: str) -> str:
    from llguidance import LLMatcher

    try:
        json.loads(schema)
        return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _SPACE})
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"The JSON schema cannot be used: {_first(str(error))}. Correct it.") from None


class Follower:
    """Where one reply stands in its grammar. One thread."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self, device: torch.device, vocabulary: int) -> torch.Tensor:
        """Which tokens may come next: bool, (vocabulary,). Raises SettingsError when the grammar has become too much to follow."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self._check()
        found = ((bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten().bool()
        if len(found) < vocabulary:
            found = torch.nn.functional.pad(found, (0, vocabulary - len(found)))
        return found[:vocabulary].to(device)

    def accept(self, token: int) -> bool:
        """Take a chosen token; whether the grammar ends here. Raises SettingsError like `allowed`."""
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise SettingsError(f"The grammar cannot be followed further: {_first(self._matcher.get_error())}. Simplify it.")
