"""Which JSON schemas can be enforced. One with a keyword that the grammar would not follow is refused with that keyword's name."""

from __future__ import annotations

import json
from graphlib import CycleError, TopologicalSorter
from typing import Any
from urllib.parse import unquote

from modules.api.errors import BadRequest

MAX_DEPTH = 32
MAX_PARTS = 5000
TYPES = frozenset({"object", "array", "string", "integer", "number", "boolean", "null"})
_NOTES = frozenset({"title", "description", "default", "examples", "$schema", "$id", "$comment", "deprecated", "readOnly", "writeOnly"})
_FOLLOWED = frozenset({
    "type", "properties", "required", "additionalProperties", "enum", "const", "items", "minItems", "maxItems", "minLength", "maxLength",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "anyOf", "$ref", "$defs", "definitions",
})  # fmt: skip
_TYPE_OF = {
    "properties": "object", "required": "object", "additionalProperties": "object", "items": "array", "minItems": "array", "maxItems": "array",
    "minLength": "string", "maxLength": "string",
    "minimum": "integer", "maximum": "integer", "exclusiveMinimum": "integer", "exclusiveMaximum": "integer",
}  # fmt: skip
"""What a keyword speaks of: beside another type, or none, the grammar would not follow it."""
_ALONE = ("$ref", "anyOf", "const", "enum")
"""Beside one of these the grammar follows nothing else."""
_PYTHON: dict[str, Any] = {"object": dict, "array": list, "string": str, "number": (int, float), "null": type(None)}
_COUNTS = (("minItems", "maxItems"), ("minLength", "maxLength"))


Place = tuple[str, ...]
"""Where a part stands: the steps to it from the root."""


def checked(schema: Any, where: str) -> None:
    """Raise BadRequest, naming the keyword and its place, unless everything in `schema` will be followed."""
    try:
        json.dumps(schema, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise BadRequest(f"{where}: the schema holds NaN, Infinity or half a surrogate pair, or is too deep. Correct it.", where) from None
    parts: dict[Place, dict[str, Any]] = {}
    todo: list[tuple[Any, Place, int]] = [(schema, (), 0)]
    count = 0
    while todo:
        part, place, depth = todo.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_PARTS:
            raise BadRequest(f"{where}: the schema is too deep or too large ({MAX_DEPTH} levels, {MAX_PARTS} parts). Simplify it.", where)
        if part is True or (part is False and (place[-1:] == ("additionalProperties",) or place[-2:-1] == ("properties",))):
            parts[place] = {}
            continue
        if not isinstance(part, dict):
            what = "must not be false: that allows nothing" if part is False else "must be an object"
            raise BadRequest(f"{where}: {_shown(place) if place else 'the schema'} {what}.", where)
        parts[place] = part
        todo += [(each, (*place, *steps), depth + 1) for steps, each in _checked_part(part, _shown(place), where)]
    _check_references(parts, where)


def only_objects(schema: Any) -> bool:
    """Whether a `checked` schema allows objects alone."""
    todo, seen = [schema], set()
    while todo:
        part = todo.pop()
        if not isinstance(part, dict):
            return False
        if "$ref" in part:
            if part["$ref"] not in seen:
                seen.add(part["$ref"])
                todo.append(_found(schema, _target(part["$ref"])))
        elif "anyOf" in part:
            todo += part["anyOf"]
        elif "const" in part or "enum" in part:
            if not all(isinstance(value, dict) for value in part.get("enum", [part.get("const")])):
                return False
        elif part.get("type", "object" if "properties" in part else None) not in ("object", ["object"]):
            return False
    return True


def _shown(place: Place) -> str:
    return "/" + "/".join(place)


def _check_references(parts: dict[Place, dict[str, Any]], where: str) -> None:
    """Each $ref must lead to a part, and not back to itself without anything between."""
    next_to: dict[Place, list[Place]] = {}
    for place, part in parts.items():
        next_to[place] = [(*place, "anyOf", str(index)) for index in range(len(part.get("anyOf", [])))]
        if "$ref" in part:
            target = _target(part["$ref"])
            if target not in parts:
                said = f"the $ref {str(part['$ref'])[:100]!r} leads nowhere in this schema"
                raise BadRequest(f"{where}: at {_shown(place)} {said}.", where)
            next_to[place].append(target)
    try:
        TopologicalSorter(next_to).prepare()
    except CycleError as error:
        raise BadRequest(f"{where}: the $ref at {_shown(error.args[1][0])} leads back to itself. Put an object or a list between.", where) from None


def _target(reference: Any) -> Place | None:
    if reference == "#":
        return ()
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    return tuple(step.replace("~1", "/").replace("~0", "~") for step in unquote(reference[2:]).split("/"))


def _found(root: Any, place: Place | None) -> Any:
    at = root
    for step in place or ():
        at = at[int(step)] if isinstance(at, list) else at[step]
    return at


def _checked_part(part: dict[str, Any], place: str, where: str) -> list[tuple[Place, Any]]:
    strange = sorted(part.keys() - _FOLLOWED - _NOTES)
    if strange:
        raise BadRequest(f"{where}: the keyword {strange[0]!r} at {place} cannot be enforced. Leave it out, or say it in the prompt.", where)
    wrong = _wrong_type(part) or _wrong_value(part) or _wrong_place(part)
    if wrong:
        raise BadRequest(f"{where}: at {place} {wrong}.", where)
    below: list[tuple[Place, Any]] = []
    for name in ("properties", "$defs", "definitions"):
        inner = part.get(name, {})
        if not isinstance(inner, dict):
            raise BadRequest(f"{where}: {name} at {place} must be an object.", where)
        below += [((name, key), value) for key, value in inner.items()]
    below += [(("anyOf", str(index)), value) for index, value in enumerate(part.get("anyOf", []))]
    return below + [((name,), part[name]) for name in ("items", "additionalProperties") if name in part]


def _wrong_type(part: dict[str, Any]) -> str:
    """What is wrong with the type, or with a keyword that does not belong to it; ""."""
    kinds = part.get("type", [])
    if "type" in part and not kinds:
        return f"{kinds!r} is no type of JSON"
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if not isinstance(kind, str) or kind not in TYPES:
            return f"{kind!r} is no type of JSON"
    for name, kind in _TYPE_OF.items():
        plain = kind == "object" and "properties" in part and "type" not in part  # an object by what it has
        if name in part and kinds != kind and not plain:
            return f"{name} is followed only beside the type {kind!r} alone"
    given = part.get("enum", [part["const"]] if "const" in part else [])
    for value in given if kinds and isinstance(given, list) else []:
        if not any(_is(value, kind) for kind in (kinds if isinstance(kinds, list) else [kinds])):
            return f"{str(value)[:60]!r} is not of the type {kinds!r}"
    return ""


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or kind == "boolean":
        return isinstance(value, bool) and kind == "boolean"
    if kind == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return isinstance(value, _PYTHON[kind])


def _wrong_value(part: dict[str, Any]) -> str:
    """A keyword whose value is none; ""."""
    for low, high in _COUNTS:
        for name in (low, high):
            if name in part and (not isinstance(part[name], int) or isinstance(part[name], bool) or part[name] < 0):
                return f"{name} must be a whole number of at least 0"
        if part.get(low, 0) > part.get(high, part.get(low, 0)):
            return f"{low} is more than {high}"
    for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        if name in part and (isinstance(part[name], bool) or not isinstance(part[name], int | float)):
            return f"{name} must be a number"
    for name in ("enum", "anyOf"):
        if name in part and (not isinstance(part[name], list) or not part[name]):
            return f"{name} must be a list, and not an empty one"
    required = part.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        return "required must be a list of names"
    return ""


def _wrong_place(part: dict[str, Any]) -> str:
    """What stands beside what it cannot stand beside; ""."""
    alone = next((name for name in _ALONE if name in part), None)
    beside = sorted(part.keys() - _NOTES - {alone, "$defs", "definitions"} - ({"type"} if alone in ("const", "enum") else set()))
    if alone and beside:
        return f"{beside[0]} beside {alone} cannot be enforced"
    properties = part.get("properties", {})
    missing = [name for name in part.get("required", []) if isinstance(properties, dict) and properties.get(name, False) is False]
    return f"{missing[0][:60]!r} is required and no property that may be" if missing else ""
