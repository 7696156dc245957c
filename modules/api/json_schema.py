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
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "anyOf", "oneOf", "$ref", "$defs", "definitions",
})  # fmt: skip


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
    kinds = part.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if not isinstance(kind, str) or kind not in TYPES:
            raise BadRequest(f"{where}: {kind!r} at {place or '/'} is no type of JSON.", where)
    if kinds == "number" and part.keys() & {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}:
        raise BadRequest(f"{where}: bounds of a number at {place or '/'} cannot be enforced, only those of an integer. Leave them out.", where)
    reference = part.get("$ref")
    if reference is not None and not _found(root, reference):
        raise BadRequest(f"{where}: the $ref {str(reference)[:100]!r} at {place or '/'} leads nowhere in this schema.", where)
    below: list[tuple[str, Any]] = []
    for name in ("properties", "$defs", "definitions"):
        inner = part.get(name, {})
        if not isinstance(inner, dict):
            raise BadRequest(f"{where}: {name} at {place or '/'} must be an object.", where)
        below += [(f"{name}/{key}", value) for key, value in inner.items()]
    for name in ("anyOf", "oneOf"):
        inner = part.get(name, [])
        if not isinstance(inner, list):
            raise BadRequest(f"{where}: {name} at {place or '/'} must be a list.", where)
        below += [(f"{name}/{index}", value) for index, value in enumerate(inner)]
    return below + [(name, part[name]) for name in ("items", "additionalProperties") if name in part]


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
