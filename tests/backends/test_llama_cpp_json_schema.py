"""What the converter leaves open is closed here: each number within its bounds is written, none outside of them."""

import re

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
    assert "n ::= ([9-9] | [1] ([0-2]))" in grammar


def test_strings_hold_no_control_characters():
    assert r'char ::= [^"\\\x00-\x1F] |' in grammar_of({"type": "string"})


def test_what_is_constant_is_left_alone():
    assert "range" not in grammar_of({"const": {"type": "integer", "minimum": 3}})


def test_bounds_that_leave_nothing():
    with pytest.raises(SettingsError, match="no integer"):
        grammar_of({"type": "integer", "minimum": 2.5, "maximum": 2.9})
