"""Parameters written as pairs of tags, as the XML-like formats have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from modules.tool_calls.json_text import loose
from modules.tool_calls.reader import Reader, Steps


def pairs(reader: Reader, start: str, key: Callable[[Reader], Steps[str]], end: str, close: str, lines: bool = False) -> Steps[dict[str, Any]]:
    """`start`, what `key` reads, the value and `end`, any number of times, up to `close`. Of two values for one key the last counts.

    A value that is JSON becomes what it says. `lines`: one line break around the value is the format's.
    """
    found: dict[str, Any] = {}
    while True:
        yield from reader.space()
        if (yield from reader.literal(start, close)) == close:
            return found
        name = yield from key(reader)
        value = yield from reader.until(end)
        found[name] = loose(value.removeprefix("\n").removesuffix("\n") if lines else value)


def upto(mark: str) -> Callable[[Reader], Steps[str]]:
    """A key that ends at `mark`."""
    return lambda reader: reader.header(mark)
