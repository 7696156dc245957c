"""What the tests of tool calls share: replies fed in pieces, and what came out."""

from __future__ import annotations

import json
from itertools import pairwise

from modules.tool_calls import ToolDelta, ToolStream

NAMES = ("get_weather", "get", "add", "write-file", "погода")
HERMES = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def pieces(text, cuts):
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(places)]


def fed(parts, names=NAMES, **options):
    stream = ToolStream(names, **options)
    return [delta for part in parts for delta in stream.feed(part)] + stream.finish()


def joined(deltas: list[ToolDelta]):
    """Prose and calls in order, neighbouring prose joined; arguments as values."""
    found: list = []
    for delta in deltas:
        assert bool(delta.text) != bool(delta.call)
        if delta.call:
            found.append((delta.call.name, json.loads(delta.call.arguments)))
        elif found and isinstance(found[-1], str):
            found[-1] += delta.text
        else:
            found.append(delta.text)
    return found


def read(text, **options):
    """What a reply is: the same whole, by characters and by threes."""
    whole = joined(fed([text], **options))
    assert joined(fed(text, **options)) == whole
    assert joined(fed([text[at : at + 3] for at in range(0, len(text), 3)], **options)) == whole
    return whole
