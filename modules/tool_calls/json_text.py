"""JSON as models write it: read with bounds, and the text of a call's arguments."""

from __future__ import annotations

import json
import math
import re
from typing import Any

MAX_DEPTH = 64
"""How deep lists and objects may stand in each other; what goes deeper is no call."""
_TOKENS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', re.DOTALL)


def loads(text: str) -> Any:
    """The value that `text` is, line breaks within strings allowed. Raises ValueError, also for what is too deep and for numbers without end."""
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        raise ValueError("too deep")
    return json.loads(text, strict=False, parse_constant=_refuse, parse_float=_finite)


def loose(text: str) -> Any:
    """The value that `text` is as JSON, else `text` itself."""
    try:
        return loads(text)
    except ValueError:
        return text


def arguments_text(value: Any) -> str:
    """The arguments of a call, an object, as JSON; nothing is an empty object, a string holds the JSON. Raises ValueError."""
    if isinstance(value, str):
        value = loads(value)
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise ValueError("not an object")
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "replace").decode()  # half of a pair of surrogates, which no answer could carry, becomes "?"


def _depth(text: str) -> int:
    level = deepest = 0
    for token in _TOKENS.finditer(text):
        level += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        deepest = max(deepest, level)
    return deepest


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError("too large")
    return number
