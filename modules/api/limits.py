"""How long the body of a request may be, for the API and for the page."""

from __future__ import annotations

from collections.abc import Callable

from starlette.exceptions import HTTPException

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
