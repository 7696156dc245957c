"""GLM: `<tool_call>NAME`, pairs `<arg_key>k</arg_key><arg_value>v</arg_value>`, `</tool_call>`."""

from __future__ import annotations

from typing import Any

from modules.tool_calls.parameters import as_declared
from modules.tool_calls.reader import Format, Reader, Steps

_START, _END = "<tool_call>", "</tool_call>"
_KEY, _KEY_END, _VALUE, _VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"


def _parse(reader: Reader) -> Steps[None]:
    yield from reader.literal(_START)
    yield from reader.space()
    name = yield from reader.name()
    found: dict[str, Any] = {}
    while True:
        yield from reader.space()
        if found and not (yield from reader.ahead()):
            break  # only the end marker, which ends the reply, is missing
        if (yield from reader.literal(_KEY, _END)) == _END:
            break
        key = yield from reader.header(_KEY_END)
        yield from reader.space()
        yield from reader.literal(_VALUE)
        found[key] = as_declared((yield from reader.until(_VALUE_END)), reader.tools[name], key)
    reader.call(name, found)


FORMAT = Format("glm", _parse, hints=(_KEY,), starts=(_START,), marks=(_END, _KEY, _KEY_END, _VALUE, _VALUE_END))
