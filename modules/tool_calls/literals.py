"""Values in notations near to JSON: Python's literals, and Gemma's bare keys with a quote of its own."""

from __future__ import annotations

import re
from typing import Any

from modules.tool_calls.json_text import MAX_DEPTH, loose
from modules.tool_calls.reader import NoCall, Reader, Steps

PYTHON = ('"', "'")
GEMMA = ('<|"|>', '"')
_WORD = re.compile(r"[\w.+\-]*")
_KEY = re.compile(r"[\w.$\-]*")
_WORDS = {"True": True, "False": False, "None": None}
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U000[0-9a-fA-F]{5}|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "\n": "", "\\": "\\", '"': '"', "'": "'", "/": "/"}


def members(reader: Reader, quotes: tuple[str, ...], middle: str, close: str, depth: int = 0) -> Steps[dict[str, Any]]:
    """`key middle value`, with commas between, up to `close`; the opening was read. Of two values for one key the last counts."""
    found: dict[str, Any] = {}
    yield from reader.space()
    while not (yield from reader.maybe(close)):
        key = yield from _key(reader, quotes)
        yield from reader.space()
        yield from reader.literal(middle)
        found[key] = yield from _value(reader, quotes, depth + 1)
        yield from _comma(reader, close)
    return found


def _value(reader: Reader, quotes: tuple[str, ...], depth: int) -> Steps[Any]:
    if depth > MAX_DEPTH:
        raise NoCall
    yield from reader.space()
    opened = yield from reader.maybe(*quotes, "{", "[", "(")
    if opened in quotes:
        return (yield from _string(reader, opened))
    if opened == "{":
        return (yield from members(reader, quotes, ":", "}", depth))
    if opened:
        return (yield from _items(reader, quotes, "]" if opened == "[" else ")", depth))
    word = yield from reader.run(_WORD)
    value = _WORDS[word] if word in _WORDS else loose(word)
    if isinstance(value, str):
        raise NoCall
    return value


def _items(reader: Reader, quotes: tuple[str, ...], close: str, depth: int) -> Steps[list[Any]]:
    found = []
    yield from reader.space()
    while not (yield from reader.maybe(close)):
        found.append((yield from _value(reader, quotes, depth + 1)))
        yield from _comma(reader, close)
    return found


def _comma(reader: Reader, close: str) -> Steps[None]:
    yield from reader.space()
    if (yield from reader.maybe(",")):
        yield from reader.space()
    elif (yield from reader.ahead()) != close:
        raise NoCall


def _key(reader: Reader, quotes: tuple[str, ...]) -> Steps[str]:
    quote = yield from reader.maybe(*quotes)
    key = yield from _string(reader, quote) if quote else reader.run(_KEY)
    if not key:
        raise NoCall
    return key


def _string(reader: Reader, quote: str) -> Steps[str]:
    if len(quote) > 1:
        return (yield from reader.until(quote))
    return _ESCAPE.sub(_unescaped, (yield from reader.quoted(quote)))


def _unescaped(match: re.Match[str]) -> str:
    body = match[1]
    return chr(int(body[1:], 16)) if len(body) > 1 else _ESCAPES.get(body, match[0])
