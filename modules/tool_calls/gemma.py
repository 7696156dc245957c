"""Gemma 4: `<|tool_call>call:NAME{key:<|"|>text<|"|>,n:3}<tool_call|>`."""

from __future__ import annotations

from modules.tool_calls.literals import GEMMA, members
from modules.tool_calls.reader import Format, Reader, Steps

_START, _END = "<|tool_call>", "<tool_call|>"


def _parse(reader: Reader) -> Steps[None]:
    yield from reader.literal(_START)
    yield from reader.space()
    yield from reader.literal("call:")
    name = yield from reader.name()
    yield from reader.literal("{")
    reader.call(name, (yield from members(reader, GEMMA, ":", "}")))
    yield from reader.closing(_END)


FORMAT = Format("gemma", _parse, hints=("<|tool_call>call:",), starts=(_START,), marks=(_END, GEMMA[0]))
