"""Hermes and Qwen: `<tool_call>{"name": NAME, "arguments": {…}}</tool_call>`."""

from __future__ import annotations

from modules.tool_calls.objects import calls
from modules.tool_calls.reader import Format, Reader, Steps

_START, _END = "<tool_call>", "</tool_call>"


def _parse(reader: Reader) -> Steps[None]:
    yield from reader.literal(_START)
    while True:
        yield from reader.space()
        reader.commit(*(yield from calls(reader, bare=True)))
        if (yield from reader.closing(_END)):
            return


FORMAT = Format("hermes", _parse, hints=(_START,), starts=(_START,), marks=(_END,))
