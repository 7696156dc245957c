"""What cannot be enforced is refused by its name and place, never taken in silence."""

import pytest

from modules.api.errors import BadRequest
from modules.api.json_schema import checked

GOOD = [
    {},
    {"type": "object"},
    {"type": ["string", "null"]},
    {"properties": {"a": {"type": "integer", "minimum": 1, "maximum": 9}}, "required": ["a"]},
    {"type": "object", "additionalProperties": {"type": "number"}},
    {"type": "string", "enum": ["a", "b"], "title": "One of them"},
    {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}], "default": None},
    {"$ref": "#/$defs/x", "$defs": {"x": {"type": "array", "items": {"const": 1}, "minItems": 1, "maxItems": 2}}},
]
BAD = [
    ({"type": "text"}, "'text' is no type"),
    ({"type": {"a": 1}}, "no type"),
    ({"type": "string", "pattern": "x"}, "'pattern'"),
    ({"oneOf": [{"type": "null"}]}, "'oneOf'"),
    ({"type": "array", "minItems": "x"}, "minItems must be a whole number"),
    ({"type": "array", "maxItems": -1}, "maxItems must be a whole number"),
    ({"type": "array", "minItems": 3, "maxItems": 2}, "minItems is more than maxItems"),
    ({"type": "object", "required": 5}, "required must be a list"),
    ({"type": "object", "required": ["b"], "properties": {"a": {}}}, "'b' is required"),
    ({"type": "integer", "minimum": "1"}, "minimum must be a number"),
    ({"type": "integer", "minimum": True}, "minimum must be a number"),
    ({"type": "number", "minimum": 1}, "minimum is followed only beside the type 'integer'"),
    ({"type": ["integer", "null"], "minimum": 1}, "minimum is followed only"),
    ({"minLength": 3}, "minLength is followed only"),
    ({"enum": []}, "enum must be a list"),
    ({"anyOf": {}}, "anyOf must be a list"),
    ({"anyOf": [{}], "type": "string"}, "type beside anyOf"),
    ({"$ref": "#/$defs/none"}, "leads nowhere"),
    ({"type": "object", "properties": []}, "properties at / must be an object"),
    ({"type": "object", "properties": {"a": {"type": "array", "items": {"format": "date"}}}}, "'format' at /properties/a/items"),
    ([], "must be an object"),
]


@pytest.mark.parametrize("schema", GOOD)
def test_what_can_be_enforced_is_taken(schema):
    checked(schema, "response_format")


@pytest.mark.parametrize(("schema", "words"), BAD)
def test_what_cannot_be_enforced_is_named(schema, words):
    with pytest.raises(BadRequest) as caught:
        checked(schema, "response_format")
    assert words in str(caught.value) and str(caught.value).startswith("response_format: ")


def test_depth_and_size_are_bounded():
    deep = {}
    for _ in range(40):
        deep = {"type": "array", "items": deep}
    with pytest.raises(BadRequest, match="too deep"):
        checked(deep, "tools")
    with pytest.raises(BadRequest, match="too large"):
        checked({"anyOf": [{} for _ in range(6000)]}, "tools")
