"""Parameters written as pairs of tags, as the XML-like formats have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from modules.tool_calls.json_text import loose
from modules.tool_calls.reader import Reader, Steps


def pairs(
    reader: Reader, tool: str, start: str, key: Callable[[Reader], Steps[str]], end: str, close: str, lines: bool = False
) -> Steps[dict[str, Any]]:
    """The arguments of `tool`: `start`, what `key` reads, the value and `end`, any number of times, up to `close`. Of two values for one key the
    last counts. `lines`: one line break around the value is the format's.
    """
    found: dict[str, Any] = {}
    while True:
        yield from reader.space()
        if (yield from reader.literal(start, close)) == close:
            return found
        name = yield from key(reader)
        value = yield from reader.until(end)
        found[name] = as_declared(value.removeprefix("\n").removesuffix("\n") if lines else value, reader.tools[tool], name)


def upto(mark: str) -> Callable[[Reader], Steps[str]]:
    """A key that ends at `mark`."""
    return lambda reader: reader.header(mark)


def as_declared(text: str, parameters: Any, name: str) -> Any:
    """What `text` says as the value of parameter `name`: itself where only a string may stand, as `parameters`, a JSON schema, tells; else the JSON
    that it is, or itself when it is none. Such formats write strings without quotes: "1.10" can be a version or a number.
    """
    schema = parameters.get("properties") if isinstance(parameters, Mapping) else None
    kinds = _kinds(schema.get(name) if isinstance(schema, Mapping) else None, parameters)
    if "null" in kinds and text.strip() == "null":
        return None
    return text if "string" in kinds and kinds <= {"string", "null"} else loose(text)


def _kinds(schema: Any, root: Any, depth: int = 4) -> set[str]:
    """The types of the values that `schema` allows, of which only strings and null are told apart; "any" where it does not say."""
    if not isinstance(schema, Mapping) or not depth:
        return {"any"}
    if isinstance(kind := schema.get("type"), str):
        return {kind}
    if isinstance(kind, list):
        return {str(each) for each in kind}
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list):
        return {"null" if each is None else "string" if isinstance(each, str) else "any" for each in values}
    if isinstance(parts := schema.get("allOf"), list):
        return next((kinds for each in parts if (kinds := _kinds(each, root, depth - 1)) != {"any"}), {"any"})
    if isinstance(options := schema.get("anyOf", schema.get("oneOf")), list):
        return {kind for each in options for kind in _kinds(each, root, depth - 1)}
    where, _, what = str(schema.get("$ref", "")).rpartition("/")
    shared = root.get(where.removeprefix("#/")) if where in ("#/$defs", "#/definitions") else None
    return _kinds(shared.get(what) if isinstance(shared, Mapping) else None, root, depth - 1)
