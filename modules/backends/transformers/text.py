"""Text to tokens and back: a Hugging Face tokenizer behind the few things that this loader needs of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from modules.errors import PromptError, PromptTooLong
from modules.markers import MARKERS

MAX_TEXT = 64 << 20
"""Characters that are tokenised at once at most."""
CONTEXT = 6
"""Tokens before a new one that decide how it is written (a space in front, a character in parts)."""
LONGEST_CHARACTER = 8
"""Tokens that may wait for the rest of a character; after that they are no text."""


class Text:
    """A model's tokenizer. Methods may be called from any thread."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        """`vocabulary`: how many tokens the model knows; more than the tokenizer does, or, where the two do not belong together, fewer."""
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.bos: int | None = tokenizer.bos_token_id
        self._lock = threading.Lock()
        self._breakers: dict[tuple[str, ...], frozenset[int]] = {}
        self._texts: list[str] = []
        self.longest = max(map(len, tokenizer.get_vocab()), default=1)
        """Characters of the longest token."""
        added = {token for token, about in getattr(tokenizer, "added_tokens_decoder", {}).items() if about.special}
        marked = {token for text in MARKERS for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]}
        self._hidden = (added | set(tokenizer.all_special_ids)) - marked
        self._shows_markers = bool(marked & added)
        special = tokenizer("a", add_special_tokens=True)["input_ids"]
        self._adds_bos = self.bos is not None and special[:1] == [self.bos]

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """See `Backend.encode`. A BOS is added where the model is used to one."""
        if len(text) > MAX_TEXT:
            raise PromptTooLong(f"The text has {len(text) >> 20} million characters and at most {MAX_TEXT >> 20} can be read. Shorten it.")
        clean = text.encode("utf-8", "replace").decode("utf-8")
        tokens: list[int] = self.tokenizer(clean, add_special_tokens=False, verbose=False)["input_ids"] if clean else []
        starts = bool(tokens) and tokens[0] == self.bos
        return [self.bos, *tokens] if add_bos and self._adds_bos and self.bos is not None and not starts else list(tokens)

    def with_ends(self, text: str) -> list[int]:
        """Token ids as the model's own template of special tokens has them: for encoders."""
        return list(self.tokenizer(text.encode("utf-8", "replace").decode("utf-8"), verbose=False)["input_ids"])

    def decode(self, tokens: Sequence[int], special: bool = True) -> str:
        """Text of `tokens`, with special tokens or without: then those of `MARKERS` still stand in it."""
        if not special and self._shows_markers:
            tokens, special = [token for token in tokens if token not in self._hidden], True
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        return text

    def check(self, tokens: Sequence[int]) -> None:
        """Raise PromptError when a token id is not in the vocabulary: on a GPU computing with it would be the end of the whole process."""
        for token in (min(tokens), max(tokens)) if tokens else ():
            if not 0 <= token < self.vocabulary:
                raise PromptError(f"There is no token {token} in this model: its tokens are 0 to {self.vocabulary - 1}.")

    def containing(self, texts: Sequence[str]) -> frozenset[int]:
        """The tokens whose text holds one of `texts`."""
        key = tuple(texts)
        with self._lock:
            if not self._texts:
                self._texts = self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))], clean_up_tokenization_spaces=False)
            if key not in self._breakers:
                if len(self._breakers) >= 16:
                    self._breakers.clear()
                self._breakers[key] = frozenset(n for n, text in enumerate(self._texts) if any(each in text for each in key))
            return self._breakers[key]


class TextStream:
    """Tokens of one reply to whole characters, as they come."""

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int]) -> None:
        """`before`: the prompt's tokens, of which the last say how the first new one is written."""
        self._decode = decode
        self._before = list(before[-CONTEXT:])
        self._waiting: list[int] = []

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that is certain now."""
        self._waiting += tokens
        text = self._new()
        if text.endswith("\ufffd") and len(self._waiting) < LONGEST_CHARACTER:
            return ""
        self._take()
        return text

    def finish(self) -> str:
        """The rest; what is no whole character becomes U+FFFD."""
        text = self._new() if self._waiting else ""
        self._take()
        return text

    def _new(self) -> str:
        return self._decode(self._before + self._waiting)[len(self._decode(self._before)) :]

    def _take(self) -> None:
        self._before = (self._before + self._waiting)[-CONTEXT:]
        self._waiting = []
