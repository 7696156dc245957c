"""Errors as API clients know them: OpenAI's {"error": {message, type, code, param}} and Anthropic's {"type": "error", "error": {type, message}}."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from modules.errors import AccessDenied, Busy, NoModel, NotFound, PromptTooLong, UserError

Json = dict[str, Any]


class BadRequest(UserError):
    """A field of the request cannot be followed."""

    def __init__(self, message: str, param: str | None = None) -> None:
        """`param`: the field's name."""
        super().__init__(message)
        self.param = param


class NotAvailable(UserError):
    """A route that this server knows and has nothing for."""

    status = 501


class WrongKey(AccessDenied):
    """No key, or one that is not ours."""

    status = 401


def status_of(error: UserError) -> int:
    """The HTTP status: as the clients of OpenAI and Anthropic expect it, where our own page has another one."""
    if isinstance(error, NoModel):
        return 503
    return 400 if isinstance(error, PromptTooLong) or error.status == 422 else error.status


_FOR_CLIENTS = (
    ("Choose one on the Model tab and press Load; your text is kept.", "POST /v1/internal/model/load loads one, and --model when the server starts."),
    ("Choose a model from the list on the Model tab.", "GET /v1/models lists those there are."),
    ("Put it there, or choose one from the list on the Model tab.", "GET /v1/models lists those there are."),
    ("Wait for it, or cancel it on the Model tab.", "Wait for it, or cancel it with POST /v1/internal/model/unload."),
    ("Send again when a model is ready; the Model tab shows it.", "Send again when a model is ready; GET /v1/internal/model/info shows it."),
    ("Load it again on the Model tab", "Load it again with POST /v1/internal/model/load"),
    ("Your text is kept; send it again when the ", "Send again when the "),
    ("Your text is kept; the engine starts again by itself: send again.", "The engine starts again by itself: send again."),
    ("; your text is kept, send it again then, or load another model.", "; send again then, or load another model."),
)
"""What our page offers, and what a client has in its place."""


def words_of(error: UserError) -> str:
    """The message, for somebody who has the API and not the page."""
    text = str(error)
    for page, client in _FOR_CLIENTS:
        text = text.replace(page, client)
    return text


def headers_of(error: UserError) -> dict[str, str]:
    """Retry-After where trying again makes sense."""
    return {"Retry-After": str(max(1, round(error.retry_after)))} if isinstance(error, Busy) else {}


def openai_error(error: UserError) -> Json:
    """OpenAI's body."""
    code = "context_length_exceeded" if isinstance(error, PromptTooLong) else _snake(error.code)
    return openai_body(status_of(error), words_of(error), code, getattr(error, "param", None))


def openai_body(status: int, message: str, code: str | None = None, param: str | None = None) -> Json:
    """OpenAI's body; its type follows from the status."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 501: "not_available_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def anthropic_error(error: UserError) -> Json:
    """Anthropic's body."""
    kind = "overloaded_error" if isinstance(error, Busy) else "not_found_error" if isinstance(error, NotFound) else None
    return anthropic_body(status_of(error), words_of(error), kind)


def anthropic_body(status: int, message: str, kind: str | None = None) -> Json:
    """Anthropic's body; its type follows from the status unless `kind` says it."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error"}
    kind = kind or kinds.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def what_is_wrong(errors: Sequence[Mapping[str, Any]], body: Any) -> tuple[str, str | None]:
    """Words for what pydantic found, and the field at fault. Where a field has several forms, all that was missed is told."""
    first = errors[0]
    if first["type"] == "json_invalid":  # its place is one in the text, no field
        return f"The body is not JSON: {first['ctx']['error']}, at character {first['loc'][-1]}.", None
    param = _field(first, body)
    root = param.split(".")[0]
    misses = [(where, each["msg"]) for each in errors if (where := _field(each, body)).split(".")[0] == root][:4]
    text = " or ".join(dict.fromkeys(f"{where}: {text}" if where else text for where, text in misses))
    return f"The request is not as expected: {text}.", param or None


def _field(error: Mapping[str, Any], body: Any) -> str:
    """The place of an error in `body`: pydantic's, without the names of the forms that it tried there."""
    kind, *places = error["loc"]
    if kind in ("query", "path"):
        return str(places[-1])
    places, kept = places if kind == "body" else [kind, *places], []
    for number, place in enumerate(places, 1):
        there = place in body if isinstance(body, dict) else isinstance(body, list) and isinstance(place, int)
        body = body[place] if there else body
        if there or (error["type"] == "missing" and number == len(places)):
            kept.append(str(place))
    return ".".join(kept)


# --- the OpenAPI document ---------------------------------------------------------------------------------------------------------------

_TEXT, _MAYBE = {"type": "string"}, {"type": ["string", "null"]}


def _schema(**properties: Any) -> Json:
    return {"type": "object", "properties": properties, "required": list(properties)}


_SCHEMAS = {
    "Error": _schema(error=_schema(message=_TEXT, type=_TEXT, param=_MAYBE, code=_MAYBE)),
    "AnthropicError": _schema(type={"const": "error"}, error=_schema(type=_TEXT, message=_TEXT)),
}


def documented(document: Json, without_key: Collection[str]) -> Json:
    """The document with the errors of each route, in the form of its API, instead of the 422 that FastAPI tells of and nothing here answers.

    `without_key`: the paths that need none.
    """
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas |= _SCHEMAS
    for path, routes in document["paths"].items():
        schema = {"$ref": f"#/components/schemas/{'AnthropicError' if path.startswith('/v1/messages') else 'Error'}"}
        for method, route in routes.items():
            route["responses"].pop("422", None)
            for status in _statuses(path in without_key, method, route):
                route["responses"][str(status)] = {"description": HTTPStatus(status).phrase, "content": {"application/json": {"schema": schema}}}
    return document


def _statuses(without_key: bool, method: str, route: Json) -> list[int]:
    if "501" in route["responses"]:
        return [401, 403, 500, 501]
    found = [403, 500] if without_key else [401, 403, 500]
    found += [400, 404, 503] if method != "get" or "parameters" in route else []
    return found + ([413] if "requestBody" in route else [])


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
