"""MiniMax: `<minimax:tool_call><invoke name="NAME"><parameter name="k">v</parameter></invoke></minimax:tool_call>`."""

from __future__ import annotations

from modules.tool_calls.parameters import pairs, upto
from modules.tool_calls.reader import Format, Reader, Steps

_START, _END = "<minimax:tool_call>", "</minimax:tool_call>"


def _parse(reader: Reader) -> Steps[None]:
    yield from reader.literal(_START)
    yield from reader.space()
    yield from reader.literal('<invoke name="')
    while True:
        name = yield from reader.name()
        yield from reader.literal('">')
        reader.call(name, (yield from pairs(reader, name, '<parameter name="', upto('">'), "</parameter>", "</invoke>")))
        if (yield from reader.closing(_END)):
            return
        yield from reader.literal('<invoke name="')


FORMAT = Format("minimax", _parse, hints=("minimax:tool_call",), starts=(_START,), marks=(_END,))
