"""Calls that a grammar forces: the JSON schema that a reply must follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modules.errors import NotFound, PromptError
from modules.tool_calls.json_text import MAX_DEPTH

MOST_CALLS = 8
_DEFINED = "#/$defs/{}"


def grammar_schema(tools: Sequence[Mapping[str, Any]], choice: str | None, parallel: bool) -> dict[str, Any]:
    """What a reply must be when a call is required: `{"name", "arguments"}` of one of `tools`, or of the one named `choice`.

    `tools`: as the API has them, `{"type": "function", "function": {…}}`, or the inner objects. `parallel`: a list of 1 to MOST_CALLS of these.
    A tool whose parameters refer to their own parts moves to the schema's `$defs`, so that the references hold. Raises NotFound, PromptError.
    """
    functions = [tool["function"] if isinstance(tool.get("function"), Mapping) else tool for tool in tools]
    offered = [function for function in functions if choice is None or function["name"] == choice]
    if not offered:
        raise NotFound(f"No tool is named “{choice}”; name one of those in `tools`." if choice else "A call is required, but `tools` is empty.")
    definitions: dict[str, Any] = {}
    calls = [_call(function, f"tool{place}", definitions) for place, function in enumerate(offered)]
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if parallel:
        schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": MOST_CALLS}
    return {**schema, "$defs": definitions} if definitions else schema


def _call(function: Mapping[str, Any], key: str, definitions: dict[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    moved = _moved(parameters, _DEFINED.format(key))
    if moved != parameters:
        definitions[key] = moved
        parameters = {"$ref": _DEFINED.format(key)}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, root: str, depth: int = 0) -> Any:
    """`schema` with the references to its own root changed to `root`."""
    if depth > MAX_DEPTH:
        raise PromptError(f"A tool's parameters are nested more than {MAX_DEPTH} deep; write them flatter.")
    if isinstance(schema, Mapping):
        return {
            key: root + value[1:] if key == "$ref" and isinstance(value, str) and value.startswith("#") else _moved(value, root, depth + 1)
            for key, value in schema.items()
        }
    return [_moved(item, root, depth + 1) for item in schema] if isinstance(schema, list) else schema
