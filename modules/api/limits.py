"""What the body of a request may be: how long, for the API and for the page; and which JSON, for the API."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import HTTPException as RouteHTTPException
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

from modules.guard import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """ASGI middleware: a body of more than `most(path)` bytes is not read to its end; its route answers 413."""

    def __init__(self, app: ASGIApp, most: Callable[[str], int]) -> None:
        self.app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count what the route receives. A route that reads no body is not disturbed by a long one."""
        taken, most = 0, self._most(scope.get("path", ""))

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > most:
                raise HTTPException(413, f"a request of more than {most >> 20} MB. Send less at once")
            return message

        await self.app(scope, counted if scope["type"] == "http" else receive, send)


class StrictRoute(APIRoute):
    """A route whose JSON is what every other program takes for JSON too: what it says can be answered, kept and shown again."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own, of a request that is read strictly."""
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strictly


class _StrictRequest(Request):
    async def json(self) -> Any:
        """The body. Not a number, infinity, and half of a character are refused: Python takes them, and can then not write them."""
        body = await self.body()
        try:
            text = body.decode(json.detect_encoding(body))
        except UnicodeDecodeError:
            raise RouteHTTPException(400, "it is not text in Unicode") from None
        found = json.loads(text, parse_constant=_no_number, parse_float=_finite)
        if _HALF.search(text):  # as emojis have it too: only writing it out tells
            try:
                json.dumps(found, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise RouteHTTPException(400, "it has half of a character, \\ud800 to \\udfff without its other half") from None
        return found


_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise RouteHTTPException(400, f"the number {text[:20]} is too large")
    return number


def _no_number(name: str) -> NoReturn:
    raise RouteHTTPException(400, f"{name} is no JSON")
