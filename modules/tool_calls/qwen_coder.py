"""Qwen3-Coder and Qwen 3.5: `<tool_call><function=NAME><parameter=k>v</parameter></function></tool_call>`; the outer tags may be missing."""

from __future__ import annotations

from modules.tool_calls.parameters import pairs, upto
from modules.tool_calls.reader import Format, Reader, Steps

_START, _END, _FUNCTION = "<tool_call>", "</tool_call>", "<function="


def _parse(reader: Reader) -> Steps[None]:
    if (yield from reader.literal(_START, _FUNCTION)) == _START:
        yield from reader.space()
        yield from reader.literal(_FUNCTION)
    while True:
        name = yield from reader.name()
        yield from reader.literal(">")
        reader.call(name, (yield from pairs(reader, name, "<parameter=", upto(">"), "</parameter>", "</function>", lines=True)))
        if (yield from reader.closing(_END)):
            return
        yield from reader.literal(_FUNCTION)


FORMAT = Format("qwen_coder", _parse, hints=("<tool_call>", "<function="), starts=(_START, _FUNCTION), marks=(_END,))
