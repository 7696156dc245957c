"""Which page may ask: Host and Origin checks, the login before every route, and the headers of every answer.

A page of another site must not act here: not by DNS rebinding (its name turned to this machine), not by forms and fetches with our cookies
(CSRF), not by WebSockets. Pure ASGI, so that it stands before our routes and Gradio's alike.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import platform
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any, Protocol
from urllib.parse import quote

from modules.auth import Auth, Cookie, NotLoggedIn
from modules.errors import AccessDenied, UserError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


class HasHeaders(Protocol):
    """A request with headers, looked up in any case."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Header values by name."""
        ...


@dataclass(frozen=True)
class Hosts:
    """Which Host headers are answered. A foreign name that leads here is DNS rebinding: a web page turned its own name to this machine."""

    names: frozenset[str] = frozenset({"localhost"})
    any_address: bool = False

    @classmethod
    def build(cls, listen: bool, listen_host: str = "", extra: Iterable[str] = (), machine: str = "") -> Hosts:
        """`listen`: also every IP address (no page can rebind one), this machine's name (`machine`, else asked) and `listen_host`."""
        names = {"localhost", *extra}
        if listen:
            machine = machine or platform.node()
            names |= {listen_host, machine, machine.split(".")[0], machine.split(".")[0] + ".local"}
        return cls(frozenset(name.lower().strip("[]").rstrip(".") for name in names if name), any_address=listen)

    def plus(self, name: str) -> Hosts:
        """With one name more: the address of a tunnel is known only when it stands."""
        return replace(self, names=self.names | {name.lower()})

    def allow(self, name: str) -> bool:
        """Whether `name`, without port or brackets, is one of ours."""
        name = name.lower().rstrip(".")
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name in self.names
        return self.any_address or address.is_loopback or name in self.names


_AUTHORITY = r"(?:\[(?P<six>[0-9a-fA-F:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::(?P<port>[0-9]{1,5}))?"
_HOST = re.compile(_AUTHORITY, re.ASCII)
_ORIGIN = re.compile(r"(?P<scheme>https?)://" + _AUTHORITY, re.ASCII)
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


def check_host(headers: Mapping[str, list[str]], hosts: Hosts) -> None:
    """Raises UserError (400) for a missing, repeated or malformed Host, AccessDenied for a name that is not ours."""
    values = headers.get("host", [])
    match = _HOST.fullmatch(values[0]) if len(values) == 1 else None
    if match is None:
        raise UserError("The request has no valid Host header. Send exactly one.")
    name = match["six"] or match["name"]
    if not hosts.allow(name):
        raise AccessDenied(f"This server does not answer to the name {name[:100]!r}. Open it by its address, or allow the name with --allowed-hosts.")


def check_origin(scope: Scope, headers: Mapping[str, list[str]]) -> None:
    """Raises AccessDenied where a page of another site is behind the request. `headers` has passed `check_host`.

    What has neither Origin nor Sec-Fetch-Site comes from no browser's script: every browser of today sends one of them.
    """
    safe = scope["type"] == "http" and scope["method"] in _SAFE_METHODS
    origins, site, mode = (headers.get(name, []) for name in ("origin", "sec-fetch-site", "sec-fetch-mode"))
    foreign_origin = not safe and any(not _same_origin(origin, headers["host"][0]) for origin in origins)
    # Following a link to the page is the only thing that another site, or another port of this host, may cause.
    foreign_site = bool({"cross-site", "same-site"} & set(site)) and not (safe and mode == ["navigate"])
    if foreign_origin or foreign_site:
        raise AccessDenied("The request comes from a page of another site. Behind a proxy, let it pass the Host header on with its port.")


def _same_origin(origin: str, host: str) -> bool:
    """Host and port, not the scheme: behind a proxy that ends TLS the server cannot know it, and one host:port speaks only one."""
    ours, theirs = _HOST.fullmatch(host.lower()), _ORIGIN.fullmatch(origin.lower())
    if not ours or not theirs:
        return False  # "null" too: sandboxed frames and local files
    default = "443" if theirs["scheme"] == "https" else "80"
    return (ours["six"] or ours["name"], ours["port"] or default) == (theirs["six"] or theirs["name"], theirs["port"] or default)


def require_json(request: HasHeaders) -> None:
    """For our own routes that change something: raises AccessDenied unless it is JSON with `X-TGW: 1`, which no foreign form can send."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json" or request.headers.get("x-tgw") != "1":
        raise AccessDenied("Send JSON with the headers 'Content-Type: application/json' and 'X-TGW: 1'.")


def require_own_page(request: HasHeaders) -> None:
    """For an upload: raises AccessDenied without `X-TGW: 1`, which no foreign form can send."""
    if request.headers.get("x-tgw") != "1":
        raise AccessDenied("Send the file with the header 'X-TGW: 1'.")


# Gradio's page keeps no promise of a content security policy. What it needs, found by trying 6.31 in Chromium:
# 'unsafe-eval' because gr.HTML and js= compile their templates in the browser; inline styles because Svelte writes them;
# its inline scripts are named by their hashes, so that an inline script or handler that got into the page later does not run.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-eval'{hashes}; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; media-src 'self' data: blob:; connect-src 'self'; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
_FILE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox; frame-ancestors 'none'"  # uploads and outputs opened as pages
_FILES = ("/gradio_api/file=", "/gradio_api/file/")
_INLINE_SCRIPT = re.compile(rb"<script(?![^>]*\ssrc=)[^>]*>(.+?)</script>", re.DOTALL | re.IGNORECASE)
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),  # "no-referrer" would make browsers send `Origin: null` with our own forms
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


def page_policy(html: bytes = b"") -> str:
    """The Content-Security-Policy of our pages; the inline scripts of `html` as it leaves the server may run, no others."""
    digests = (base64.b64encode(hashlib.sha256(script).digest()).decode() for script in _INLINE_SCRIPT.findall(html))
    return _POLICY.format(hashes="".join(f" 'sha256-{digest}'" for digest in digests))


class Guard:
    """ASGI middleware before everything, Gradio's routes too: Host, origin, login, then the answer's security headers.

    With logins configured every path needs one, but for `PUBLIC` and for paths under `own_key`, whose routes ask for an API key themselves.
    (Gradio leaves several of its routes open: cancel, heartbeat, stream, reset, token.) It never sends CORS headers and removes Gradio's.
    """

    PUBLIC = frozenset({"/login", "/logout", "/favicon.ico", "/manifest.json", "/robots.txt"})

    def __init__(self, app: ASGIApp, auth: Auth, hosts: Hosts, own_key: Iterable[str] = ()) -> None:
        """`hosts` may be replaced while serving."""
        self.app, self.auth, self.hosts = app, auth, hosts
        self._own_key = tuple(prefix.rstrip("/") + "/" for prefix in own_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it with a short JSON error (a WebSocket before it is accepted)."""
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = headers_by_name(scope)
        try:
            check_host(headers, self.hosts)
            check_origin(scope, headers)
            self._check_login(scope, headers)
        except UserError as error:
            return await _refuse(scope, headers, error, send)
        answer = _Answer(scope, send)
        if _wants_page(scope, headers) and (cookie := self.auth.page_cookie(_cookies(headers))):
            answer.extra.append((b"set-cookie", cookie.header.encode("latin-1")))
            scope = _for_page(scope, headers, cookie)
        await self.app(scope, receive, answer.send if scope["type"] == "http" else send)

    def _check_login(self, scope: Scope, headers: Mapping[str, list[str]]) -> None:
        path = route_path(scope)
        if not self.auth.login_required or path in self.PUBLIC or path.startswith(self._own_key):
            return
        if self.auth.identify(_cookies(headers)) is None:
            raise NotLoggedIn("Log in first.")


class _Answer:
    """Puts the security headers on a response; HTML is held back until it is whole, since its policy names its inline scripts."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._path, self._send = route_path(scope), send
        self._start: Message | None = None
        self._html = bytearray()
        self.extra: list[tuple[bytes, bytes]] = []

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            fields = {k.lower(): v for k, v in message.get("headers", [])}
            html = fields.get(b"content-type", b"").startswith(b"text/html") and b"content-encoding" not in fields
            if html and not self._path.startswith(_FILES):
                self._start = message
                return
            message = self._with_headers(message, page_policy())
        elif message["type"] == "http.response.body" and self._start is not None:
            self._html += message.get("body", b"")
            if message.get("more_body", False):
                return
            whole, start, self._start = bytes(self._html), self._start, None
            await self._send(self._with_headers(start, page_policy(whole), (b"cache-control", b"no-store")))
            message = {**message, "body": whole}
        await self._send(message)

    def _with_headers(self, message: Message, policy: str, *more: tuple[bytes, bytes]) -> Message:
        if self._path.startswith(_FILES):
            policy = _FILE_POLICY
        ours = [*_HEADERS, (b"content-security-policy", policy.encode()), *more]
        replaced = {k for k, _ in ours}
        kept = [(k, v) for k, v in message.get("headers", []) if k.lower() not in replaced and not k.lower().startswith(b"access-control-")]
        return {**message, "headers": [*kept, *ours, *self.extra]}


async def _refuse(scope: Scope, headers: Mapping[str, list[str]], error: UserError, send: Send) -> None:
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1008, "reason": ""})  # before accept: the server answers 403
    fields = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
    body, status = json.dumps({"error": {"code": error.code, "message": str(error)}}).encode(), error.status
    if isinstance(error, NotLoggedIn) and _is_navigation(scope, headers):
        query = scope.get("query_string", b"").decode("latin-1")
        wanted = route_path(scope) + (f"?{query}" if query else "")
        target = f"{scope.get('root_path', '')}/login?next={quote(wanted, safe='/')}"
        body, status = b"", 303
        fields.append((b"location", target.encode("latin-1")))
    answer = _Answer(scope, send)
    await answer.send({"type": "http.response.start", "status": status, "headers": [*fields, (b"content-length", str(len(body)).encode())]})
    await answer.send({"type": "http.response.body", "body": body})


def headers_by_name(scope: Scope) -> dict[str, list[str]]:
    """The headers of a request, by name in lower case."""
    headers: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1").strip())
    return headers


def _cookies(headers: Mapping[str, list[str]]) -> dict[str, str]:
    pairs = (pair.partition("=") for pair in ";".join(headers.get("cookie", [])).split(";"))
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}


def route_path(scope: Scope) -> str:
    """The path as our routes see it, without the sub-path of a proxy."""
    path, root = scope["path"], scope.get("root_path", "")
    return path[len(root) :] or "/" if root and (path == root or path.startswith(root + "/")) else path


def _wants_page(scope: Scope, headers: Mapping[str, list[str]]) -> bool:
    """A browser opening a page, or gradio_client's first request, which keeps the cookie it gets."""
    return _is_navigation(scope, headers) or (scope["type"] == "http" and route_path(scope) == "/config")


def _is_navigation(scope: Scope, headers: Mapping[str, list[str]]) -> bool:
    return scope["type"] == "http" and scope["method"] == "GET" and "text/html" in ",".join(headers.get("accept", []))


def _for_page(scope: Scope, headers: Mapping[str, list[str]], cookie: Cookie) -> Scope:
    """`scope` as if the browser had sent `cookie` already, and asking for plain HTML: the policy names what stands in it."""
    pairs = "; ".join(f"{name}={value}" for name, value in {**_cookies(headers), cookie.name: cookie.value}.items())
    kept = [(name, value) for name, value in scope["headers"] if name.lower() not in (b"cookie", b"accept-encoding")]
    return {**scope, "headers": [*kept, (b"cookie", pairs.encode("latin-1"))]}
