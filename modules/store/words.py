"""The texts of the store: what can be kept, titles, and the words that a search looks for. Pure."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

MAX_TITLE = 200
"""Characters."""
MAX_NAME = 60
"""Characters of a folder's or tag's name."""
MAX_QUERY_WORDS = 16
MAX_QUERY_CHARACTERS = 100
OPEN, CLOSE = "\x02", "\x03"
"""What stands around a match in a snippet."""
_SEAM = "\x1f"
_AUTOMATIC_TITLE = 60
_SURROGATES = re.compile("[\ud800-\udfff]")
_NO_SPACES = re.compile(  # Thai, Lao, Myanmar, Khmer; kana, Han, Hangul (particles hang on its words), half-width kana
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff])"
)
_BIDI = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F])
_MARKS = str.maketrans({OPEN: " ", CLOSE: " "})

Snippet = tuple[tuple[str, bool], ...]
"""Pieces of text in order, each with whether it is a match."""


def clean(text: str) -> str:
    """`text` with lone surrogates, which UTF-8 cannot carry, replaced by U+FFFD."""
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)


def clean_title(text: str) -> str:
    """One line without control or direction-changing characters, at most MAX_TITLE characters."""
    printable = "".join(" " if unicodedata.category(c) == "Cc" else c for c in clean(text[: MAX_TITLE * 10]).translate(_BIDI))
    return " ".join(printable.split())[:MAX_TITLE].rstrip()


def clean_name(text: str) -> str:
    """A folder's or tag's name: one line of at most MAX_NAME characters."""
    return clean_title(text)[:MAX_NAME].rstrip()


def title_from(text: str) -> str:
    """A title made of the beginning of a message, cut between words."""
    title = clean_title(text)
    if len(title) <= _AUTOMATIC_TITLE:
        return title
    head = title[: _AUTOMATIC_TITLE + 1].rpartition(" ")[0]
    return (head if len(head) > _AUTOMATIC_TITLE // 2 else title[:_AUTOMATIC_TITLE]).rstrip(" ,;:.-") + "…"


def search_text(text: str) -> str:
    """What the index reads: seams between the characters of scripts that write no spaces, so that each becomes a word."""
    text = text.translate(_MARKS) if OPEN in text or CLOSE in text else text
    return text if text.isascii() else _NO_SPACES.sub(rf"{_SEAM}\1{_SEAM}", text)


def match_expression(owners: Sequence[int], query: str) -> str:
    """The FTS5 expression for a user's `query`: all its words, the last as a prefix; "" when it holds no word.

    Everything the user typed is quoted, so there are no operators; words and characters beyond the limits are left out.
    """
    words = [w for w in clean(query[:MAX_QUERY_CHARACTERS]).replace("\0", " ").split() if any(c.isalnum() for c in w)]
    words = list(dict.fromkeys(words))[:MAX_QUERY_WORDS]
    if not words or not owners:
        return ""
    phrases = ['"' + search_text(w).replace('"', '""') + '"' for w in words]
    return f"owner : ({' OR '.join(f'o{number}' for number in owners)}) AND text : ({' '.join(phrases)} *)"


def pieces(marked: str) -> Snippet:
    """The snippet that the index marked."""
    text = re.sub(r"\s+", " ", marked.replace(_SEAM, "").replace("\0", " "))
    parts = re.split(f"[{OPEN}{CLOSE}]", text)
    return tuple((part, index % 2 == 1) for index, part in enumerate(parts) if part)
