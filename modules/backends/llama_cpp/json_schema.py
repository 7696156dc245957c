"""From a JSON schema to a grammar: llama-cpp-python's converter, and what it leaves open: bounds of integers, control characters in strings."""

from __future__ import annotations

import json
import re
from typing import Any

from modules.errors import SettingsError

_MARK = "tgw integer range "
_FARTHEST = 10**15 - 1
"""Where one bound alone is given, the other is this: larger numbers are not exact in most readers of JSON."""


def grammar_of(schema: Any) -> str:
    """GBNF that follows `schema`. Raises what the converter raises, and SettingsError for bounds that leave no integer."""
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    ranges: list[str] = []
    grammar: str = json_schema_to_gbnf(json.dumps(_marked(schema, ranges)))
    for number, expression in enumerate(ranges):
        grammar = grammar.replace(f'"\\"{_MARK}{number}\\""', f"({expression})")
    return re.sub(r'^(char ::= )\[\^"\\\\\]', lambda found: found[1] + r'[^"\\\x00-\x1F]', grammar, flags=re.MULTILINE)


def _marked(part: Any, ranges: list[str]) -> Any:
    """`part` with a constant in place of each bounded integer; its expression goes to `ranges`."""
    if isinstance(part, list):
        return [_marked(each, ranges) for each in part]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "integer" and part.keys() & {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"} and "enum" not in part:
        low, high = _bounds(part)
        ranges.append(integers(low, high))
        return {"const": f"{_MARK}{len(ranges) - 1}"}
    return {name: value if name in ("const", "enum", "default", "examples") else _marked(value, ranges) for name, value in part.items()}


def _bounds(part: dict[str, Any]) -> tuple[int, int]:
    lows = [-_FARTHEST, *_whole(part, "minimum", up=True), *(number + 1 for number in _whole(part, "exclusiveMinimum", up=False))]
    highs = [_FARTHEST, *_whole(part, "maximum", up=False), *(number - 1 for number in _whole(part, "exclusiveMaximum", up=True))]
    if max(lows) > min(highs):
        raise SettingsError(f"The JSON schema allows no integer from {max(lows)} to {min(highs)}. Correct its bounds.")
    return max(lows), min(highs)


def _whole(part: dict[str, Any], name: str, up: bool) -> list[int]:
    """A bound as the nearest integer inwards; [] where there is none."""
    value = part.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return []
    whole = int(value)
    return [whole if whole == value else whole + (1 if value > 0 else 0) if up else whole - (1 if value < 0 else 0)]


def integers(low: int, high: int) -> str:
    """A GBNF expression for the decimal integers from `low` to `high`, without leading zeros."""
    parts = []
    if low < 0:
        parts.append(f'"-" ({_naturals(max(1, -high), -low)})')
    if high >= 0:
        parts.append(_naturals(max(0, low), high))
    return " | ".join(parts)


def _naturals(low: int, high: int) -> str:
    first, last = len(str(low)), len(str(high))
    parts = []
    for length in range(first, last + 1):
        least = str(low) if length == first else "1" + "0" * (length - 1)
        most = str(high) if length == last else "9" * length
        parts.append(_same_length(least, most))
    return " | ".join(parts)


def _same_length(low: str, high: str) -> str:
    """The numbers from `low` to `high`, which have as many digits."""
    if not low:
        return '""'
    a, b, rest = low[0], high[0], len(low) - 1
    if low[1:] == "0" * rest and high[1:] == "9" * rest:
        return f"[{a}-{b}]" + " [0-9]" * rest
    if a == b:
        return f"[{a}] ({_same_length(low[1:], high[1:])})"
    parts = [f"[{a}] ({_same_length(low[1:], '9' * rest)})"]
    if int(b) - int(a) > 1:
        parts.append(f"[{int(a) + 1}-{int(b) - 1}]" + " [0-9]" * rest)
    parts.append(f"[{b}] ({_same_length('0' * rest, high[1:])})")
    return " | ".join(parts)
