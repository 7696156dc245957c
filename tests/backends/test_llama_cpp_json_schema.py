"""What a grammar lets through is what its schema allows: told by llama.cpp itself, which is given whole answers."""

import json
import re

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.backends.llama_cpp.json_schema import grammar_of, integers
from modules.errors import SettingsError


def pattern(low, high):
    """The expression as a regular expression: GBNF's literals and classes are alike."""
    return re.compile(integers(low, high).replace('""', "").replace('"-"', "-").replace(" ", ""))


@given(st.integers(-3000, 3000), st.integers(0, 3000), st.integers(-9000, 9000))
def test_integers_within_bounds_and_no_others(low, width, number):
    high = low + width
    found = pattern(low, high)
    for each in (low, high, number, low - 1, high + 1, (low + high) // 2):
        assert bool(found.fullmatch(str(each))) == (low <= each <= high), (low, high, each)
    assert not found.fullmatch("007") and not found.fullmatch("-0")


def test_a_schema_with_bounds():
    grammar = grammar_of({"type": "object", "properties": {"n": {"type": "integer", "exclusiveMinimum": 8, "maximum": 12}}, "required": ["n"]})
    assert "::= [9-9] | [1] ([0-2])\n" in grammar


def test_strings_hold_no_control_characters():
    assert r'char ::= [^"\\\x00-\x1F] |' in grammar_of({"type": "string"})


def test_what_is_constant_is_left_alone():
    assert "range" not in grammar_of({"const": {"type": "integer", "minimum": 3}})


def test_bounds_that_leave_nothing():
    with pytest.raises(SettingsError, match="no integer"):
        grammar_of({"type": "integer", "minimum": 2.5, "maximum": 2.9})


# --- the grammars, as llama.cpp follows them --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vocabulary(starter_model):
    lib = pytest.importorskip("llama_cpp")
    params = lib.llama_model_default_params()
    params.vocab_only = True
    model = lib.llama_model_load_from_file(str(starter_model).encode(), params)
    yield lib.llama_model_get_vocab(model)
    lib.llama_model_free(model)


def follows(vocabulary, schema, text: str) -> bool:
    """Whether the grammar of `schema` lets `text` through, whole."""
    import llama_cpp as lib

    sampler = lib.llama_sampler_init_grammar(vocabulary, grammar_of(schema).encode(), b"root")
    assert sampler, "llama.cpp refuses the grammar"
    raw = text.encode()
    tokens = (lib.llama_token * (len(raw) + 8))()
    count = lib.llama_tokenize(vocabulary, raw, len(raw), tokens, len(tokens), False, False)
    assert count > 0
    try:
        for token in [*tokens[:count], lib.llama_vocab_eos(vocabulary)]:
            one = (lib.llama_token_data * 1)(lib.llama_token_data(token, 0.0, 0.0))
            lib.llama_sampler_apply(sampler, lib.llama_token_data_array(one, 1, -1, False))
            if one[0].logit != 0.0:
                return False
            lib.llama_sampler_accept(sampler, token)
        return True
    finally:
        lib.llama_sampler_free(sampler)


TREE = {"type": "object", "properties": {"next": {"$ref": "#"}, "value": {"type": "null"}}, "required": ["value"]}
OPTIONAL = {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}}
FURTHER = {"type": "object", "properties": {"ab": {"type": "integer"}, "]": {"const": 1}}, "additionalProperties": {"type": "string"}}
ANSWERS = [
    *(
        ({"const": value}, [value], ["x", 1])
        for value in ("a\nb", "\t", "\x01", "\x00", "😀", 'a"b', "a\\b", "größe 名", "", {"a": "x\ny"}, "\ud800")
    ),
    ({"enum": ["😀", "a\nb", 'q"', None, 1.5]}, ["😀", "a\nb", 'q"', None, 1.5], ["q", 1, "\ufffd"]),
    *(
        ({"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]}, [{name: 5}], [{}, {name: "x"}, True, {"y": 1}])
        for name in ("", "\x00", "\n", "😀", 'a"b', "$ref", "*", "root", "a b", "\\")
    ),
    (TREE, [{"value": None}, {"next": {"next": {"value": None}, "value": None}, "value": None}], [{}, {"next": 1, "value": None}]),
    ({"type": "object", "properties": {"a": False, "b": {"const": 1}}}, [{}, {"b": 1}], [{"a": 1}, {"a": None, "b": 1}]),
    ({"$ref": "#/definitions/a~0~1b%20c", "definitions": {"a~/b c": {"const": 7}}}, [7], [8]),
    ({"anyOf": [{"const": 1}, {"type": "array", "items": {"$ref": "#/anyOf/0"}}]}, [1, [1, 1], []], [[2], 2]),
    (OPTIONAL, [{}, {"a": 1}, {"b": 2}, {"a": 1, "c": 3}, {"a": 1, "b": 2, "c": 3}], [{"a": 2}, {"c": 1}]),
    ({**OPTIONAL, "required": ["b"]}, [{"b": 2}, {"a": 1, "b": 2}, {"b": 2, "c": 3}], [{}, {"a": 1}, {"a": 1, "c": 3}]),
    ({**OPTIONAL, "required": ["a", "c"]}, [{"a": 1, "c": 3}, {"a": 1, "b": 2, "c": 3}], [{"a": 1}, {"c": 3}, {"a": 1, "b": 2}]),
    (FURTHER, [{}, {"ab": 1}, {"x": "y"}, {"ab": 1, "a": "x", "abc": "x", "": "x"}, {"]": 1, "x\n": "x"}], [{"ab": "x"}, {"x": 1}, {"]": "x"}]),
    ({"type": "object", "additionalProperties": False}, [{}], [{"a": 1}]),
    ({"type": "object", "additionalProperties": {"type": "null"}}, [{}, {"a": None, "😀": None}], [{"a": 1}]),
    (
        {"properties": {"name": {"const": 3}, "x": {"$ref": "#/$defs/name"}}, "$defs": {"name": {"const": 4}}},
        [{"name": 3, "x": 4}],
        [{"x": 3}],
    ),
    ({"type": "array", "minItems": 2, "maxItems": 3}, [[1, "a"], [[], {}, None]], [[], [1], [1, 2, 3, 4]]),
    ({"type": "array", "items": {"const": 1}, "maxItems": 1}, [[], [1]], [[1, 1], [2]]),
    ({"type": "array", "items": {"const": 1}, "minItems": 1}, [[1], [1] * 9], [[], [2]]),
    ({"type": "array", "maxItems": 0}, [[]], [[1]]),
    ({"type": "string", "minLength": 2, "maxLength": 200}, ["ab", "\n😀", "a" * 200], ["a", "a" * 201]),
    ({"type": "string", "maxLength": 0}, [""], ["a"]),
    ({"type": ["string", "null"]}, ["a", None], [1, []]),
    ({"type": "integer", "minimum": -3, "maximum": 12}, [-3, 0, 12], [-4, 13, 1.5]),
    ({}, [1, "a", [1, {"b": None}], -2.5e10, True], []),
]


def written(value) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(value)  # half a surrogate pair can only be escaped


@pytest.mark.engine
@pytest.mark.parametrize(("schema", "good", "bad"), ANSWERS, ids=[json.dumps(each[0])[:60] for each in ANSWERS])
def test_a_grammar_allows_what_its_schema_does(vocabulary, schema, good, bad):
    for value in good:
        jsonschema.validate(value, schema)
        assert follows(vocabulary, schema, written(value)), value
    for value in bad:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(value, schema)
        assert not follows(vocabulary, schema, written(value)), value


@pytest.mark.engine
@pytest.mark.parametrize(
    ("text", "good"),
    [
        (r'"\ud83d\ude00"', True),
        (r'"\u00e4"', True),
        (r'"\ud83d"', False),
        (r'"\ude00"', False),
        ('"a\nb"', False),
        (r'"\x"', False),
        ('"a" ', False),
    ],
)
def test_strings_as_they_may_be_written(vocabulary, text, good):
    assert follows(vocabulary, {"type": "string", "maxLength": 1 if good else 9}, text) == good


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "a"},
        {"type": "text"},
        {"type": ["string", 1]},
        {"type": []},
        {"$ref": "http://example.com"},
        {"anyOf": [False]},
        {"enum": []},
        {"properties": {"a": False}, "required": ["a"]},
        {"type": "array", "minItems": 2, "maxItems": 1},
        {"properties": {str(n): {"type": "string", "maxLength": 1900 + n} for n in range(20)}},
        5,
    ],
)
def test_what_cannot_be_followed_is_refused(schema):
    with pytest.raises(SettingsError, match="JSON schema cannot be used"):
        grammar_of(schema)
