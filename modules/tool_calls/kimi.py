"""Kimi K2: `<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{…}<|tool_call_end|>`, in a section."""

from __future__ import annotations

import re

from modules.tool_calls.reader import Format, Reader, Steps

_SECTION, _SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_CALL, _ARGUMENTS, _CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_NUMBER = re.compile(r"[:0-9]*")


def _parse(reader: Reader) -> Steps[None]:
    if (yield from reader.literal(_SECTION, _CALL)) == _SECTION:
        yield from reader.space()
        yield from reader.literal(_CALL)
    while True:
        yield from reader.space()
        yield from reader.maybe("functions.")
        name = yield from reader.name()
        yield from reader.run(_NUMBER)
        yield from reader.space()
        yield from reader.literal(_ARGUMENTS)
        yield from reader.space()
        reader.call(name, (yield from reader.object()))
        yield from reader.closing(_CALL_END)
        if (yield from reader.closing(_SECTION_END)):
            return
        yield from reader.literal(_CALL)


FORMAT = Format(
    "kimi", _parse, hints=("<|tool_call_begin|>", "tool_calls_section"), starts=(_SECTION, _CALL), marks=(_SECTION_END, _ARGUMENTS, _CALL_END)
)
