"""Llama: `NAME{…}` where a line begins; Llama 3's `{"name": NAME, "parameters": {…}}`, after its tag or as the whole answer."""

from __future__ import annotations

from modules.tool_calls.objects import calls, several
from modules.tool_calls.reader import Format, Reader, Steps

_TAG = "<|python_tag|>"


def _bare(reader: Reader) -> Steps[None]:
    name = yield from reader.name()
    reader.call(name, (yield from reader.object()))


def _tagged(reader: Reader) -> Steps[None]:
    yield from reader.literal(_TAG)
    while True:
        yield from reader.space()
        reader.commit(*(yield from calls(reader)))
        yield from reader.space()
        yield from reader.maybe(";")


def _answer(reader: Reader) -> Steps[None]:
    found = yield from several(reader)
    yield from reader.end()
    reader.commit(*found)


BARE = Format("bare", _bare, line=True)
TAGGED = Format("llama_tagged", _tagged, starts=(_TAG,))
ANSWER = Format("llama", _answer)
