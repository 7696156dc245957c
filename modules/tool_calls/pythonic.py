"""Pythonic: `[NAME(a="x", b=3), …]` where a line begins."""

from __future__ import annotations

from modules.tool_calls.json_text import arguments_text
from modules.tool_calls.literals import PYTHON, members
from modules.tool_calls.reader import Format, Found, NoCall, Reader, Steps


def _parse(reader: Reader) -> Steps[None]:
    yield from reader.literal("[")
    found: list[Found] = []
    while True:
        yield from reader.space()
        name = yield from reader.name()
        yield from reader.literal("(")
        arguments = yield from members(reader, PYTHON, "=", ")")
        try:
            found.append((name, arguments_text(arguments)))
        except ValueError as error:
            raise NoCall from error
        yield from reader.space()
        if (yield from reader.literal(",", "]")) == "]":
            break
    reader.commit(*found)


FORMAT = Format("pythonic", _parse, line=True)
