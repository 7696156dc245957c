"""Mistral: `[TOOL_CALLS]NAME[ARGS]{…}`, with `[CALL_ID]…` between in some versions; older ones `[TOOL_CALLS][{"name": …, "arguments": …}]`."""

from __future__ import annotations

import re

from modules.tool_calls.objects import calls
from modules.tool_calls.reader import Format, Reader, Steps

_START, _CALL_ID, _ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_ID = re.compile(r"[0-9A-Za-z_\-]*")


def _parse(reader: Reader) -> Steps[None]:
    yield from reader.literal(_START)
    yield from reader.space()
    if (yield from reader.ahead()) == "[":
        reader.commit(*(yield from calls(reader, bare=True)))
        return
    name = yield from reader.name()
    if (yield from reader.maybe(_CALL_ID)):
        yield from reader.run(_ID)
    yield from reader.maybe(_ARGS)
    yield from reader.space()
    reader.call(name, (yield from reader.object()))


FORMAT = Format("mistral", _parse, hints=(_START,), starts=(_START,), marks=(_CALL_ID, _ARGS))
