"""What cannot be enforced is refused by its name and place, never taken in silence."""

import pytest

from modules.api.errors import BadRequest
from modules.api.json_schema import checked, only_objects
from modules.api.requests import _tools_of
from modules.api.schemas import ChatRequest

GOOD = [
    {},
    {"type": "object"},
    {"type": ["string", "null"]},
    {"properties": {"a": {"type": "integer", "minimum": 1, "maximum": 9}}, "required": ["a"]},
    {"type": "object", "additionalProperties": {"type": "number"}},
    {"type": "string", "enum": ["a", "b"], "title": "One of them"},
    {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}], "default": None},
    {"$ref": "#/$defs/x", "$defs": {"x": {"type": "array", "items": {"const": 1}, "minItems": 1, "maxItems": 2}}},
    {"type": "object", "properties": {"next": {"$ref": "#"}, "$ref": {"type": "string"}, "a": False}},
    {"$ref": "#/definitions/a~0~1b", "definitions": {"a~/b": True}},
    {"anyOf": [{"const": 1}, {"type": "array", "items": {"$ref": "#/anyOf/0"}}]},
    {"type": ["number", "null"], "enum": [1, 2.5, None]},
    {"const": 'a"b\n\x00'},
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
    ({"$ref": "#"}, "the $ref at / leads back to itself"),
    ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"anyOf": [{"$ref": "#/$defs/a"}]}}}, "leads back to itself"),
    ({"$ref": "#/properties", "properties": {}}, "beside $ref"),
    ({"properties": {"a": {"$ref": "#/properties/b/const"}, "b": {"const": {}}}}, "leads nowhere"),
    ({"properties": {"a": False}, "required": ["a"]}, "'a' is required and no property that may be"),
    ({"anyOf": [False]}, "/anyOf/0 must not be false"),
    ({"type": []}, "no type of JSON"),
    ({"type": "integer", "enum": [1, True]}, "'True' is not of the type 'integer'"),
    ({"const": float("inf")}, "holds NaN, Infinity"),
    ({"const": "\ud800"}, "half a surrogate pair"),
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


def test_which_schemas_are_of_objects_alone():
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}
    assert all(map(only_objects, [node, {"properties": {}}, {"$defs": {"node": node}, "$ref": "#/$defs/node"}, {"anyOf": [node, {"const": {}}]}]))
    assert not any(
        map(only_objects, [{}, True, {"type": "string"}, {"anyOf": [node, {"type": "null"}]}, {"enum": [{}, 1]}, {"type": ["object", "null"]}])
    )


@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize(("parameters", "good"), [({"type": "string"}, False), (["x"], False), ({"properties": {}}, True), ({}, True), (None, True)])
def test_the_parameters_of_a_tool_are_an_object(choice, parameters, good):
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    body = ChatRequest(messages=[{"role": "user", "content": "x"}], tools=[tool], tool_choice=choice)
    if good:
        assert _tools_of(body)[1] == (choice == "required")
        return
    with pytest.raises(BadRequest, match="must be the schema of an object"):
        _tools_of(body)


def test_forced_parameters_that_may_be_no_object_are_refused():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"anyOf": [{"type": "object"}, {"type": "string"}]}}}
    with pytest.raises(BadRequest, match="must be the schema of an object"):
        _tools_of(ChatRequest(messages=[{"role": "user", "content": "x"}], tools=[tool], tool_choice="required"))
