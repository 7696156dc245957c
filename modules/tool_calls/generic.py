"""Any model: the answer begins with a fence or a tag that holds calls as JSON and nothing else, or is such JSON as a whole."""

from __future__ import annotations

import re

from modules.tool_calls.objects import several
from modules.tool_calls.reader import Format, Reader, Steps

_TAG = re.compile(r"[A-Za-z|][\w:.|\-]*")


def _parse(reader: Reader) -> Steps[None]:
    end = ""
    if (yield from reader.maybe("```")):
        end = "```"
        yield from reader.maybe("json", "JSON", "tool_call", "tool_calls", "tool_code")
    elif (yield from reader.maybe("<")):
        tag = yield from reader.header(">", 64, _TAG)
        end = f"</{tag}>"
    yield from reader.space()
    found = yield from several(reader)
    if not (end and (yield from reader.maybe(end))):
        yield from reader.end()
    reader.commit(*found)


FORMAT = Format("generic", _parse)
