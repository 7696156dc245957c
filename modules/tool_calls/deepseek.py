"""DeepSeek: V3.1's `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{…}`, and V3's with the word "function" first and the JSON in a fence."""

from __future__ import annotations

from modules.tool_calls.reader import Format, Reader, Steps

_SECTION, _SECTION_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _BETWEEN, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


def _parse(reader: Reader) -> Steps[None]:
    if (yield from reader.literal(_SECTION, _CALL)) == _SECTION:
        yield from reader.space()
        yield from reader.literal(_CALL)
    while True:
        yield from _call(reader)
        yield from reader.closing(_CALL_END)
        if (yield from reader.closing(_SECTION_END)):
            return
        yield from reader.literal(_CALL)


def _call(reader: Reader) -> Steps[None]:
    name = yield from reader.literal(*reader.names, "function")
    yield from reader.literal(_BETWEEN)
    if name == "function" and (yield from reader.ahead()) != "{":
        name = yield from reader.name()
    yield from reader.space()
    fenced = yield from reader.maybe("```json")
    yield from reader.space()
    reader.call(name, (yield from reader.object()))
    if fenced:
        yield from reader.closing("```")


FORMAT = Format(
    "deepseek", _parse, hints=("tool▁call▁begin", "tool▁calls▁begin"), starts=(_SECTION, _CALL), marks=(_SECTION_END, _BETWEEN, _CALL_END)
)
