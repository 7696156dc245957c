"""From a JSON schema to a grammar in GBNF, for the keywords that docs/api.md names; any other is refused.

llama-cpp-python's own converter is not used: it writes control characters and characters beyond U+FFFF into the JSON as they are, stumbles
over quotes in names, over a property named `$ref` and over references to the root, and gives different parts one rule.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn
from urllib.parse import unquote

from modules.errors import SettingsError

MAX_COUNTED = 20_000
"""All maxLength, maxItems and the like together: the engine writes each of them out."""
_FARTHEST = 10**15 - 1
"""Where one bound alone is given, the other is this: larger numbers are not exact in most readers of JSON."""
_LONGEST_TOLD = 12
"""Characters by which further names are told from the properties': one that agrees in so many does not come."""
_NOTES = frozenset({"title", "description", "default", "examples", "$schema", "$id", "$comment", "deprecated", "readOnly", "writeOnly"})
_DEFINITIONS = frozenset({"$defs", "definitions"})
_WORDS = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
    "string": {"minLength", "maxLength"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
}
_PLAIN = r'"\\\x00-\x1F'
"""What stands in no JSON string as it is, for a class of GBNF."""
_RULES = {
    "space": '" "?',
    "null": '"null"',
    "boolean": '"true" | "false"',
    "integer": '"-"? ([0-9] | [1-9] [0-9]{1,15})',
    "number": 'integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?',
    "hex": "[0-9a-fA-F]",
    "unit": r'[0-9a-cA-CefEF] hex hex hex | [dD] [0-7] hex hex | [dD] [89abAB] hex hex "\\u" [dD] [c-fC-F] hex hex',
    "char": rf'[^{_PLAIN}] | "\\" (["\\/bfnrt] | "u" unit)',
    "string": r'"\"" char* "\""',
    "array": '"[" space (value ("," space value)* space)? "]"',
    "object": '"{" space (string ":" space value ("," space string ":" space value)* space)? "}"',
    "value": "object | array | string | number | boolean | null",
}
"""JSON itself. At most one space between two parts, so that a model cannot go on writing nothing."""


def grammar_of(schema: Any) -> str:
    """GBNF that follows `schema`. Raises SettingsError for what cannot be followed, and what Python raises for a schema of a wrong form."""
    return _Writer(schema).text


def literal(value: Any) -> str:
    """The JSON of `value` as a literal of GBNF."""
    text = re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False, allow_nan=False))
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _refuse(what: str) -> NoReturn:
    raise SettingsError(f"The JSON schema cannot be used: {what}. Correct or simplify it.")


class _Writer:
    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._rules: dict[str, str] = {}
        self._named: dict[str, str] = {}  # by what they say: parts that are alike share a rule
        self._references = {"#": "root"}
        self._counted = 0
        self._rules["root"] = self._value(schema)
        self.text = "\n".join(f"{name} ::= {says}" for name, says in (self._rules | _RULES).items())

    def _rule(self, says: str) -> str:
        if says not in self._named:
            self._named[says] = f"part{len(self._named)}"
            self._rules[self._named[says]] = says
        return self._named[says]

    def _value(self, part: Any) -> str:
        """What stands for `part` in a sequence: a name or a literal."""
        if part is True:
            return "value"
        if not isinstance(part, dict):
            _refuse(f"{str(part)[:60]!r} stands where a schema must")
        words = part.keys() - _NOTES - _DEFINITIONS
        for name, follow in (("$ref", self._reference), ("anyOf", self._any), ("const", literal), ("enum", self._enum)):
            if name in words:
                self._only(words, {name, "type"} if name in ("const", "enum") else {name})
                return follow(part[name])
        kind = part.get("type", next((kind for kind, own in _WORDS.items() if own & words), "value"))
        if isinstance(kind, list):
            return self._any([{**part, "type": each} for each in kind])
        if not isinstance(kind, str) or kind not in ("object", "array", "string", "integer", "number", "boolean", "null", "value"):
            _refuse(f"{str(kind)[:60]!r} is no type of JSON")
        own = _WORDS.get(kind, set()) & words
        self._only(words, own | {"type"})
        if not own:
            return kind
        return self._rule({"object": self._object, "array": self._array, "string": self._string, "integer": _integer}[kind](part))

    def _only(self, words: set[str], followed: set[str]) -> None:
        if words - followed:
            _refuse(f"{min(words - followed)[:60]!r} cannot be enforced there")

    def _any(self, parts: Sequence[Any]) -> str:
        possible = [self._value(part) for part in parts if part is not False]
        if not possible:
            _refuse("it leaves no choice")
        return self._rule(" | ".join(possible))

    def _enum(self, values: Sequence[Any]) -> str:
        return self._rule(" | ".join(map(literal, values))) if values else _refuse("enum is empty")

    def _reference(self, reference: str) -> str:
        if reference not in self._references:
            if not reference.startswith("#/"):
                _refuse(f"the $ref {reference[:100]!r} leads out of it")
            target = self._schema
            for step in unquote(reference[2:]).split("/"):
                target = target[int(step)] if isinstance(target, list) else target[step.replace("~1", "/").replace("~0", "~")]
            self._references[reference] = name = f"ref{len(self._references)}"
            self._rules[name] = self._value(target)
        return self._references[reference]

    def _count(self, part: Mapping[str, Any], low: str, high: str) -> tuple[int, int | None]:
        least, most = part.get(low, 0), part.get(high)
        if not isinstance(least, int) or not isinstance(most, int | None) or least < 0 or (most is not None and most < least):
            _refuse(f"{low} and {high} must be whole numbers from 0, the first not above the second")
        self._counted += least if most is None else most
        if self._counted > MAX_COUNTED:
            _refuse(f"all its counts together are more than {MAX_COUNTED}")
        return least, most

    def _string(self, part: Mapping[str, Any]) -> str:
        least, most = self._count(part, "minLength", "maxLength")
        return r'"\"" ' + (f"char{_times(least, most)} " if most != 0 else "") + r'"\""'

    def _array(self, part: Mapping[str, Any]) -> str:
        least, most = self._count(part, "minItems", "maxItems")
        if most == 0:
            return '"[" space "]"'
        item = self._value(part.get("items", True))
        rest = "" if most == 1 else f' ("," space {item}){_times(max(0, least - 1), None if most is None else most - 1)}'
        return f'"[" space {item}{rest} space "]"' if least else f'"[" space ({item}{rest} space)? "]"'

    def _object(self, part: Mapping[str, Any]) -> str:
        properties: Mapping[str, Any] = part.get("properties", {})
        required = set(part.get("required", ()))
        possible = [name for name, each in properties.items() if each is not False]
        if required - set(possible):
            _refuse(f"{min(required - set(possible))[:60]!r} is required and no property that can be")
        further = part.get("additionalProperties", "properties" not in part)
        more = f'{self._other(properties)} ":" space {self._value(further)}' if further is not False else ""
        return (
            '"{" space ' + self._members([(literal(n) + ' ":" space ' + self._value(properties[n]), n in required) for n in possible], more) + ' "}"'
        )

    def _members(self, pairs: list[tuple[str, bool]], more: str) -> str:
        """The properties in their order; those that are not required may be left out. Then any number of `more`."""
        needed = next((place for place, (_, must) in enumerate(pairs) if must), len(pairs))
        rest = f' ("," space {more})*' if more else ""
        begins = [f"{more}{rest}"] if more and needed == len(pairs) else []  # ways to begin: with one that is needed, or before it
        for place in reversed(range(len(pairs))):
            pair, must = pairs[place]
            if place <= needed and needed:  # it stands at two places
                pair, rest = self._rule(pair), rest and f" {self._rule(rest)}"
            if place <= needed:
                begins.append(pair + rest)
            rest = f' "," space {pair}{rest}' if must else f' ("," space {pair})?{rest}'
        if not begins:
            return ""
        return f"({' | '.join(reversed(begins))}) space" if needed < len(pairs) else f"(({' | '.join(reversed(begins))}) space)?"

    def _other(self, names: Mapping[str, Any]) -> str:
        """A string that is none of `names`: their first characters as a tree. An escape may come only where no name goes on."""
        if not names:
            return "string"
        tree: dict[str, Any] = {}
        for name in names:
            plain = re.split(r'["\\\x00-\x1F\ud800-\udfff]', name, maxsplit=1)[0]
            at = tree
            for character in plain[:_LONGEST_TOLD]:
                at = at.setdefault(character, {})
            if len(plain) > _LONGEST_TOLD or plain == name:
                at["closed" if len(plain) > _LONGEST_TOLD else "taken"] = True
        return self._rule(rf'"\"" {self._branch(tree)} "\""')

    def _branch(self, tree: Mapping[str, Any]) -> str:
        """What may follow in the string until its end."""
        letters = [key for key in tree if len(key) == 1]
        others = "".join(f"\\U{ord(letter):08X}" for letter in letters)
        ways = [f"[^{_PLAIN}{others}] char*"]
        ways += [f'"{letter}" {self._rule(self._branch(tree[letter]))}' for letter in letters if "closed" not in tree[letter]]
        return f"({' | '.join(ways)})" + ("" if "taken" in tree else "?")


def _times(least: int, most: int | None) -> str:
    return f"{{{least},{'' if most is None else most}}}"


def _integer(part: Mapping[str, Any]) -> str:
    return integers(*_bounds(part))


def _bounds(part: Mapping[str, Any]) -> tuple[int, int]:
    lows = [-_FARTHEST, *_whole(part, "minimum", up=True), *(number + 1 for number in _whole(part, "exclusiveMinimum", up=False))]
    highs = [_FARTHEST, *_whole(part, "maximum", up=False), *(number - 1 for number in _whole(part, "exclusiveMaximum", up=True))]
    if max(lows) > min(highs):
        raise SettingsError(f"The JSON schema allows no integer from {max(lows)} to {min(highs)}. Correct its bounds.")
    return max(lows), min(highs)


def _whole(part: Mapping[str, Any], name: str, up: bool) -> list[int]:
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
