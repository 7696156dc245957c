"""Which JSON schemas can be enforced. One with a keyword that the grammar would not follow is refused with that keyword's name."""

from __future__ import annotations

from typing import Any

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
_COUNTS = (("minItems", "maxItems"), ("minLength", "maxLength"))


def checked(schema: Any, where: str) -> None:
    """Raise BadRequest, naming the keyword and its place, unless everything in `schema` will be followed."""
    parts = 0
    todo: list[tuple[Any, str, int]] = [(schema, "", 0)]
    while todo:
        part, place, depth = todo.pop()
        parts += 1
        if depth > MAX_DEPTH or parts > MAX_PARTS:
            raise BadRequest(f"{where}: the schema is too deep or too large ({MAX_DEPTH} levels, {MAX_PARTS} parts). Simplify it.", where)
        if isinstance(part, bool):
            continue
        if not isinstance(part, dict):
            raise BadRequest(f"{where}: {place or 'the schema'} must be an object.", where)
        todo += [(each, f"{place}/{name}", depth + 1) for name, each in _checked_part(part, place, schema, where)]


def _checked_part(part: dict[str, Any], place: str, root: Any, where: str) -> list[tuple[str, Any]]:
    strange = sorted(part.keys() - _FOLLOWED - _NOTES)
    if strange:
        here = f"the keyword {strange[0]!r} at {place or '/'}"
        raise BadRequest(f"{where}: {here} cannot be enforced. Leave it out, or say it in the prompt.", where)
    wrong = _wrong_type(part) or _wrong_value(part) or _wrong_place(part, root)
    if wrong:
        raise BadRequest(f"{where}: at {place or '/'} {wrong}.", where)
    below: list[tuple[str, Any]] = []
    for name in ("properties", "$defs", "definitions"):
        inner = part.get(name, {})
        if not isinstance(inner, dict):
            raise BadRequest(f"{where}: {name} at {place or '/'} must be an object.", where)
        below += [(f"{name}/{key}", value) for key, value in inner.items()]
    below += [(f"anyOf/{index}", value) for index, value in enumerate(part.get("anyOf", []))]
    return below + [(name, part[name]) for name in ("items", "additionalProperties") if name in part]


def _wrong_type(part: dict[str, Any]) -> str:
    """What is wrong with the type, or with a keyword that does not belong to it; ""."""
    kinds = part.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if not isinstance(kind, str) or kind not in TYPES:
            return f"{kind!r} is no type of JSON"
    for name, kind in _TYPE_OF.items():
        plain = kind == "object" and "properties" in part and "type" not in part  # an object by what it has
        if name in part and kinds != kind and not plain:
            return f"{name} is followed only beside the type {kind!r} alone"
    return ""


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


def _wrong_place(part: dict[str, Any], root: Any) -> str:
    """What stands beside what it cannot stand beside, or leads nowhere; ""."""
    alone = next((name for name in _ALONE if name in part), None)
    beside = sorted(part.keys() - _NOTES - {alone, "$defs", "definitions"} - ({"type"} if alone in ("const", "enum") else set()))
    if alone and beside:
        return f"{beside[0]} beside {alone} cannot be enforced"
    if "$ref" in part and not _found(root, part["$ref"]):
        return f"the $ref {str(part['$ref'])[:100]!r} leads nowhere in this schema"
    properties = part.get("properties", {})
    missing = [name for name in part.get("required", []) if isinstance(properties, dict) and name not in properties]
    return f"{missing[0][:60]!r} is required and no property" if missing else ""


def _found(root: Any, reference: Any) -> bool:
    if reference == "#":
        return True
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return False
    at = root
    for step in reference[2:].split("/"):
        key = step.replace("~1", "/").replace("~0", "~")
        if not isinstance(at, dict) or key not in at:
            return False
        at = at[key]
    return True
