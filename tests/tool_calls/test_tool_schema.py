"""The schema of a reply that must be a call."""

from __future__ import annotations

import pytest

from modules.errors import NotFound, PromptError
from modules.tool_calls import grammar_schema

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ADD = {"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}
GET = {"name": "get"}


def call(name, arguments):
    properties = {"name": {"const": name}, "arguments": arguments}
    return {"type": "object", "properties": properties, "required": ["name", "arguments"], "additionalProperties": False}


def test_one_of_the_tools_or_the_one_named():
    nothing = {"type": "object", "properties": {}}
    assert grammar_schema([ADD, GET], None, False) == {"anyOf": [call("add", PARAMETERS), call("get", nothing)]}
    assert grammar_schema([ADD, GET], "add", False) == call("add", PARAMETERS)
    assert grammar_schema([GET], None, True) == {"type": "array", "items": call("get", nothing), "minItems": 1, "maxItems": 8}


def test_references_hold():
    node = {"type": "object", "properties": {"next": {"$ref": "#"}, "x": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"type": "null"}}}
    schema = grammar_schema([ADD, {"name": "tree", "parameters": node}], None, True)
    assert schema["items"]["anyOf"][1] == call("tree", {"$ref": "#/$defs/tool1"})
    moved = schema["$defs"]["tool1"]
    assert moved["properties"] == {"next": {"$ref": "#/$defs/tool1"}, "x": {"$ref": "#/$defs/tool1/$defs/x"}}
    assert moved["$defs"] == node["$defs"]
    assert schema["items"]["anyOf"][0] == call("add", PARAMETERS)


def test_what_cannot_be_is_said():
    with pytest.raises(NotFound, match="“nope”"):
        grammar_schema([ADD], "nope", False)
    with pytest.raises(NotFound, match="empty"):
        grammar_schema([], None, False)
    deep: dict = {}
    for _ in range(5000):
        deep = {"items": deep}
    with pytest.raises(PromptError, match="flatter"):
        grammar_schema([{"name": "x", "parameters": deep}], None, False)
