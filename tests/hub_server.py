"""A hub on a local port that speaks as much of the Hub's API as downloads use, and misbehaves as it is told.

Large files come, as from the real one, over a redirect to another host name (`localhost`), where the token must not go.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 10_000
"""Bytes from which on a file is kept as the Hub keeps large ones."""
PAGE = 3
"""Files on a page of a listing."""


@dataclass
class Hub:
    """What is served. Change it at any time."""

    files: dict[str, bytes] = field(default_factory=dict)
    repo: str = "some/model"
    branches: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    token: str = ""
    """Needed for everything, when not empty."""
    error: tuple[int, str] | None = None
    """Status and X-Error-Code of every answer."""
    drops: list[int] = field(default_factory=list)
    """For each of the next contents: break the connection after so many bytes."""
    busy: int = 0
    """So many of the next contents are answered with 503."""
    served: dict[str, bytes] = field(default_factory=dict)
    """Contents that differ from those listed."""
    tag: str = ""
    """Put before each entity tag."""
    ignore_range: bool = False
    location: str = ""
    """Where every content is redirected to."""
    names: list[str] = field(default_factory=list)
    """Further names in the listing."""
    hold: threading.Event | None = None
    """Contents stop in their middle until it is set."""
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """Paths and headers, as they came."""
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def contents(self) -> list[dict[str, str]]:
        """Headers of the requests for contents."""
        return [headers for path, headers in self.asked if path.startswith("/cdn/")]

    def entry(self, name: str) -> dict:
        data = self.files.get(name, b"x")
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        large = {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}} if len(data) >= LARGE else {}
        return {"type": "file", "path": name, "size": len(data), "oid": git, **large}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        hub.asked.append((path, {name.lower(): value for name, value in self.headers.items()}))
        if hub.error:
            return self.answer(hub.error[0], b"{}", {"X-Error-Code": hub.error[1]})
        if hub.token and not path.startswith("/cdn/") and self.headers.get("authorization") != f"Bearer {hub.token}":
            return self.answer(401, b"{}", {"X-Error-Code": "GatedRepo"})
        api = f"/api/models/{hub.repo}/"
        if path.startswith(api + "revision/"):
            commit = hub.branches.get(path.removeprefix(api + "revision/"))
            return self.json({"sha": commit}) if commit else self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if path.startswith(api + "tree/"):
            return self.listing(int(query.get("cursor", ["0"])[0]))
        name = path.removeprefix(f"/{hub.repo}/resolve/{COMMIT}/")
        if name in hub.files and name != path:
            return self.answer(302, b"", {"Location": hub.location or f"http://localhost:{hub.port}/cdn/{name}?signature=secret"})
        if path.startswith("/cdn/") and path[5:] in hub.files:
            return self.content(path[5:])
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound" if path.startswith("/api/") else "EntryNotFound"})

    def listing(self, first: int) -> None:
        names = [*self.hub.files, *self.hub.names]
        entries = [self.hub.entry(name) for name in names[first : first + PAGE]]
        more = first + PAGE < len(names)
        link = {"Link": f'<{self.hub.url}/api/models/{self.hub.repo}/tree/{COMMIT}?recursive=true&cursor={first + PAGE}>; rel="next"'} if more else {}
        self.json([{"type": "directory", "path": "sub", "oid": "0" * 40, "size": 0}, *entries], link)

    def content(self, name: str) -> None:
        hub = self.hub
        if hub.busy:
            hub.busy -= 1
            return self.answer(503, b"", {"Retry-After": "0"})
        data = hub.served.get(name, hub.files[name])
        tag = f'"{hub.tag}{hashlib.md5(data).hexdigest()}"'
        begin, status, headers = 0, 200, {"ETag": tag, "Accept-Ranges": "bytes"}
        asked = self.headers.get("range")
        if asked and not hub.ignore_range and self.headers.get("if-range") in (None, tag):
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
            status, headers["Content-Range"] = 206, f"bytes {begin}-{len(data) - 1}/{len(data)}"
        rest = data[begin:]
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(rest))}.items():
            self.send_header(key, value)
        self.end_headers()
        limit = hub.drops.pop(0) if hub.drops else len(rest)
        half = len(rest) // 2 if hub.hold else limit
        self.wfile.write(rest[: min(half, limit)])
        self.wfile.flush()
        if hub.hold:
            hub.hold.wait(30)
            self.wfile.write(rest[half:limit])
        if limit < len(rest):
            self.close_connection = True

    def json(self, value: object, headers: dict[str, str] | None = None) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that go away are what is tested


@contextmanager
def serving(**values) -> Iterator[Hub]:
    """A hub on a port of its own."""
    hub = Hub(**values)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        if hub.hold:
            hub.hold.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
