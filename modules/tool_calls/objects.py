"""Calls that are JSON objects: `{"name": NAME, "arguments": {…}}` and its variants, alone or in a list."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from modules.tool_calls.json_text import arguments_text
from modules.tool_calls.reader import Found, NoCall, Reader, Steps

_KEYS = tuple(f'"{key}"' for key in ("name", "function", "arguments", "parameters", "type", "id"))


def calls(reader: Reader, bare: bool = False) -> Steps[list[Found]]:
    """An object or a list of objects, all of them calls; `bare`: a name alone is a call too.

    The first key must be one that calls have, and a name that stands first must be offered: so any other JSON is soon known to be none.
    """
    opened = yield from reader.literal("{", "[")
    if opened == "[":
        yield from reader.space()
        opened += yield from reader.literal("{")
    yield from reader.space()
    key = yield from reader.literal(*_KEYS)
    head = opened + key
    if key == '"name"':
        head += yield from _name(reader)
    try:
        return from_value((yield from reader.json(head, opened)), reader.names, bare)
    except ValueError as error:
        raise NoCall from error


def several(reader: Reader) -> Steps[list[Found]]:
    """Such values, with white space, a comma or a semicolon between them, and the white space behind."""
    found = yield from calls(reader)
    while True:
        yield from reader.space()
        if not (yield from reader.maybe(";", ",")) and (yield from reader.ahead()) not in ("{", "["):
            return found
        yield from reader.space()
        found += yield from calls(reader)


def from_value(value: Any, names: Collection[str], bare: bool = False) -> list[Found]:
    """The calls that a JSON value is. Raises ValueError when it, or any part of a list, is no call of an offered tool."""
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ValueError("no call")
    return [_one(item, names, bare) for item in items]


def _one(item: Any, names: Collection[str], bare: bool) -> Found:
    if isinstance(item, dict) and isinstance(item.get("function"), dict):
        item = item["function"]
    if not isinstance(item, dict):
        raise ValueError("not an object")
    name = item.get("name", item.get("function"))
    if not isinstance(name, str) or name not in names:
        raise ValueError("not an offered tool")
    if not bare and item.keys().isdisjoint(("arguments", "parameters")):
        raise ValueError("no arguments")
    return name, arguments_text(item.get("arguments", item.get("parameters")))


def _name(reader: Reader) -> Steps[str]:
    yield from reader.space()
    yield from reader.literal(":")
    yield from reader.space()
    yield from reader.literal('"')
    name = yield from reader.name()
    yield from reader.literal('"')
    return ":" + json.dumps(name)
