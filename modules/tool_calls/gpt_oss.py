"""GPT-OSS: a message to `functions.NAME`; the recipient stands before or behind the channel. The prompt may hold the message's beginning."""

from __future__ import annotations

import re

from modules.tool_calls.reader import Format, NoCall, Reader, Steps

_STARTS = ("<|start|>assistant", "<|channel|>", "to=functions.")
_MESSAGE, _ENDS = "<|message|>", ("<|call|>", "<|end|>")
_RECIPIENT = re.compile(r"to=(?:functions\.)?([^\s<]+)")


def _parse(reader: Reader) -> Steps[None]:
    start = yield from reader.literal(*_STARTS)
    header = start + (yield from reader.header(_MESSAGE))
    recipient = _RECIPIENT.search(header)
    if not recipient or recipient[1] not in reader.names:
        raise NoCall
    yield from reader.space()
    reader.call(recipient[1], (yield from reader.object()))
    yield from reader.closing(*_ENDS)


FORMAT = Format("gpt_oss", _parse, hints=("to=functions.", "<|channel|>"), starts=_STARTS, marks=(_MESSAGE, *_ENDS))
