"""Who may use the API: the Host and Origin of a request, its key, and which foreign pages may ask (CORS). Pure ASGI, before every route.

A key comes as `Authorization: Bearer KEY` or as `x-api-key: KEY`, and keys are compared in constant time. Without a configured key the API is
open to this machine; `check_settings` refuses to listen further.
"""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from modules.api.errors import WrongKey, anthropic_error, openai_error, status_of
from modules.errors import SettingsError, UserError
from modules.guard import ASGIApp, Hosts, Message, Receive, Scope, Send, check_host, check_origin, headers_by_name, route_path
from modules.settings import Settings

OPEN = frozenset({"/health", "/v1/health", "/v1/internal/health"})
"""A probe needs no key, and learns nothing but that the server is up."""
ADMIN = ("/v1/internal/model/load", "/v1/internal/model/unload", "/v1/internal/model/list", "/v1/internal/lora/", "/metrics")
"""What the admin key is for; everything else takes either key."""
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+/?", re.IGNORECASE)
_LOOPBACK = ("", "127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Keys:
    """The keys; "" for none. Without an admin key of its own the API key is that too."""

    api: str = ""
    admin: str = ""

    @classmethod
    def build(cls, settings: Settings) -> Keys:
        """Those of the settings."""
        return cls(settings.api_key, settings.admin_key or settings.api_key)

    def check(self, path: str, headers: Mapping[str, list[str]]) -> None:
        """Raises WrongKey."""
        if path in OPEN:
            return
        admin = path.startswith(ADMIN)
        wanted = [self.admin] if admin else [key for key in (self.api, self.admin) if key]
        if not (self.admin if admin else self.api):
            return
        if not _matches(headers, wanted):
            which = "admin key (--admin-key)" if admin else "key (--api-key)"
            raise WrongKey(f"This needs the {which} of the server, as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'.")

    def administers(self, headers: Mapping[str, list[str]]) -> bool:
        """Whether the admin key was given, where that is a key of its own: what concerns other clients is for its holder only."""
        return bool(self.admin) and self.admin != self.api and _matches(headers, [self.admin])


def _matches(headers: Mapping[str, list[str]], wanted: Sequence[str]) -> bool:
    """Whether one of `wanted` is among the keys of a request."""
    given = [value[7:].strip() for value in headers.get("authorization", []) if value[:7].lower() == "bearer "]
    given += headers.get("x-api-key", [])
    # Every given key is compared with every wanted one, so that the time tells nothing.
    return any([hmac.compare_digest(one.encode("latin-1", "replace"), other.encode()) for one in given[:4] for other in wanted])


def check_settings(settings: Settings) -> None:
    """Raises SettingsError where the API would be open to other machines without a key."""
    wide = settings.listen or settings.public_api or settings.listen_host not in _LOOPBACK
    if (settings.api or settings.nowebui) and wide and not settings.api_key:
        raise SettingsError("With --listen the API answers other machines, so it needs a key: give --api-key, or leave --listen out.")
    for origin in settings.cors_origin:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            what = f"--cors-origin {origin[:200]!r} is no origin, so no page would match it"
            raise SettingsError(f"{what}. Give scheme, name and port, without a path: https://page.example or http://localhost:3000.")
        if origin == "*" and not settings.api_key:
            raise SettingsError("--cors-origin '*' lets every web page use the API: give --api-key too, or name the pages.")


class ApiGuard:
    """ASGI middleware before the API's routes. Every answer to a page of `origins` ("*" for all) carries the CORS headers it needs."""

    def __init__(self, app: ASGIApp, keys: Keys, hosts: Callable[[], Hosts], origins: Sequence[str] = ()) -> None:
        self.app, self._keys, self._hosts, self._origins = app, keys, hosts, frozenset(origin.rstrip("/").lower() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                return await send({"type": "websocket.close", "code": 1008, "reason": ""})
            return await self.app(scope, receive, send)
        headers, path = headers_by_name(scope), route_path(scope)
        origin = self._foreign(headers)
        answer = _with_headers(send, _cors(origin) if origin else [])
        if origin and scope["method"] == "OPTIONS":
            return await _answer(answer, 204, b"", _preflight(headers))
        try:
            check_host(headers, self._hosts())
            if not origin:
                check_origin(scope, headers)
            self._keys.check(path, headers)
        except UserError as error:
            body = anthropic_error(error) if path.startswith("/v1/messages") else openai_error(error)
            extra = [(b"www-authenticate", b"Bearer")] if isinstance(error, WrongKey) else []
            return await _answer(answer, status_of(error), json.dumps(body).encode(), extra)
        await self.app(scope, receive, answer)

    def _foreign(self, headers: Mapping[str, list[str]]) -> str:
        """The origin of a page that may ask although it is not ours."""
        given = headers.get("origin", [])
        allowed = len(given) == 1 and ("*" in self._origins or given[0].lower() in self._origins)
        return given[0] if allowed else ""


def _cors(origin: str) -> list[tuple[bytes, bytes]]:
    exposed = b"x-ignored, retry-after"
    return [(b"access-control-allow-origin", origin.encode("latin-1")), (b"access-control-expose-headers", exposed), (b"vary", b"Origin")]


def _preflight(headers: Mapping[str, list[str]]) -> list[tuple[bytes, bytes]]:
    asked = ", ".join(headers.get("access-control-request-headers", []))[:2000]
    return [
        (b"access-control-allow-methods", b"GET, POST, DELETE, OPTIONS"),
        (b"access-control-allow-headers", asked.encode("latin-1") or b"content-type"),
        (b"access-control-max-age", b"600"),
    ]


def _with_headers(send: Send, extra: list[tuple[bytes, bytes]]) -> Send:
    fixed = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"), *extra]

    async def answer(message: Message) -> None:
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", [])}
            message = {**message, "headers": [*message.get("headers", []), *((k, v) for k, v in fixed if k not in names)]}
        await send(message)

    return answer


async def _answer(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    fields = [(b"content-length", str(len(body)).encode()), *([(b"content-type", b"application/json")] if body else []), *headers]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})
