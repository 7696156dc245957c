import json
import platform
from dataclasses import dataclass, field

import pytest

from modules.auth import (
    Auth,
)
from modules.errors import AccessDenied
from modules.guard import Guard, Hosts, page_policy, require_json
from tests.fakes import run


@dataclass
class Asked:
    cookies: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


class Clock:
    def __init__(self) -> None:
        self.time = 1_700_000_000.0

    def __call__(self) -> float:
        return self.time


USERS = {"ann": "pw:with:colons", "bob": "b"}


def asked(cookie) -> Asked:
    return Asked({cookie.name: cookie.value})


async def _receive():
    return {"type": "http.request", "body": b"", "more_body": False}


def call(guard, method="GET", path="/", host="localhost:7860", kind="http", root_path="", query=b"", **headers):
    """(status, headers, body, scope seen by the app or None) of one request; header names with _ for -; lists are repeated headers."""
    sent, fields = [], [] if host is None else [(b"host", host.encode())]
    for name, values in headers.items():
        for value in [values] if isinstance(values, str) else values:
            fields.append((name.replace("_", "-").encode(), value.encode()))
    scope = {"type": kind, "path": path, "root_path": root_path, "query_string": query, "headers": fields}
    if kind == "http":
        scope["method"] = method

    async def send(message):
        sent.append(message)

    guard.app.scope = None
    run(guard(scope, _receive, send))
    start = sent[0] if sent else {}
    body = b"".join(m.get("body", b"") for m in sent if m["type"] == "http.response.body")
    return start.get("status", start.get("type")), dict(start.get("headers", [])), body, guard.app.scope


class App:
    """Answers with what it is told to."""

    def __init__(self, body=(b"{}",), headers=((b"content-type", b"application/json"),)) -> None:
        self.body, self.headers, self.scope = body, list(headers), None

    async def __call__(self, scope, receive, send):
        self.scope = scope
        if scope["type"] == "websocket":
            return await send({"type": "websocket.accept"})
        if scope["type"] == "lifespan":
            return await send({"type": "lifespan.startup.complete"})
        await send({"type": "http.response.start", "status": 200, "headers": self.headers})
        for index, piece in enumerate(self.body):
            await send({"type": "http.response.body", "body": piece, "more_body": index < len(self.body) - 1})


def guard(users=(), listen=False, app=None, **options) -> Guard:
    return Guard(app or App(), Auth(dict(users), None), Hosts.build(listen, machine="tower.home.lan", **options), own_key=("/v1",))


@pytest.mark.parametrize(
    ("host", "alone", "listening"),
    [
        ("localhost", 200, 200),
        ("LOCALHOST.:80", 200, 200),
        ("127.0.0.1:7860", 200, 200),
        ("127.8.8.8", 200, 200),
        ("[::1]:7860", 200, 200),
        ("192.168.1.20:7860", 403, 200),
        ("[fd00::5]", 403, 200),
        ("0.0.0.0:7860", 403, 200),
        ("tower", 403, 200),
        ("tower.local:7860", 403, 200),
        ("Tower.Home.LAN", 403, 200),
        ("evil.example", 403, 403),
        ("localhost.evil.example", 403, 403),
        ("127.0.0.1.evil.example", 403, 403),
        ("2130706433", 403, 403),
        ("127.1", 403, 403),
        ("mine.example:443", 403, 403),
        ("", 400, 400),
        ("localhost:port", 400, 400),
        ("a@localhost", 400, 400),
        ("localhost/x", 400, 400),
        ("localhost,evil.example", 400, 400),
        ("::1", 400, 400),
        ("[::1", 400, 400),
        ("lócalhost", 400, 400),
        (None, 400, 400),
    ],
)
def test_host(host, alone, listening) -> None:
    for kind in ("http", "websocket"):
        for expected, listen in ((alone, False), (listening, True)):
            status, _, body, seen = call(guard(listen=listen), host=host, kind=kind)
            assert (seen is not None) == (expected == 200)
            assert status == (expected if kind == "http" else "websocket.accept" if expected == 200 else "websocket.close")
            if kind == "http" and expected != 200:
                assert set(json.loads(body)["error"]) == {"code", "message"}


def test_host_twice_is_refused() -> None:
    assert call(guard(), host=None, Host=["localhost", "evil.example"])[0] == 400


def test_named_hosts_are_answered() -> None:
    g = guard(extra=["mine.example"])
    assert call(g, host="mine.example:443")[0] == 200
    assert call(guard(listen=True, listen_host="box.example"), host="box.example")[0] == 200
    assert call(g, host="abc.gradio.live")[0] == 403
    g.hosts = g.hosts.plus("abc.gradio.live")
    assert call(g, host="abc.gradio.live")[0] == 200
    assert Hosts.build(True).allow(platform.node() or "localhost")


SAME = ["http://localhost:7860", "HTTP://LOCALHOST:7860", "https://localhost:7860"]
FOREIGN = [
    "null",
    "",
    "http://localhost",
    "http://localhost:3000",
    "http://127.0.0.1:7860",
    "https://evil.example",
    "http://localhost:7860.evil.example",
    "file://",
]


@pytest.mark.parametrize("origin", SAME + FOREIGN)
def test_origin(origin: str) -> None:
    ours = origin in SAME
    for method in ("POST", "PUT", "DELETE", "PATCH", "PROPFIND"):
        assert call(guard(), method, origin=origin)[0] == (200 if ours else 403)
    assert call(guard(), kind="websocket", origin=origin)[0] == ("websocket.accept" if ours else "websocket.close")
    assert call(guard(), "GET", origin=origin)[0] == 200


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost", "http://localhost", 200),
        ("localhost", "https://localhost", 200),
        ("localhost:443", "https://localhost", 200),
        ("localhost:80", "https://localhost", 403),
        ("localhost:80", "http://localhost", 200),
        ("[::1]:7860", "http://[::1]:7860", 200),
    ],
)
def test_default_ports_and_both_schemes(host: str, origin: str, status: int) -> None:
    assert call(guard(), "POST", host=host, origin=origin)[0] == status


def test_two_origins_are_refused_and_none_is_a_program() -> None:
    assert call(guard(), "POST", origin=["http://localhost:7860", "http://evil.example"])[0] == 403
    assert call(guard(), "POST")[0] == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_other_sites_may_only_link_to_us(site: str) -> None:
    assert call(guard(), "POST", sec_fetch_site=site, sec_fetch_mode="navigate")[0] == 403
    assert call(guard(), "GET", sec_fetch_site=site, sec_fetch_mode="no-cors")[0] == 403
    assert call(guard(), "GET", sec_fetch_site=site, sec_fetch_mode="cors")[0] == 403
    assert call(guard(), "GET", sec_fetch_site=site, sec_fetch_mode="navigate")[0] == 200
    assert call(guard(), kind="websocket", sec_fetch_site=site)[0] == "websocket.close"
    assert call(guard(), "POST", sec_fetch_site="same-origin")[0] == 200
    assert call(guard(), "GET", sec_fetch_site="none")[0] == 200


def test_everything_needs_the_login_but_a_few_paths() -> None:
    g = guard(USERS)
    for path in ("/", "/config", "/gradio_api/heartbeat/x", "/login/", "//login", "/v1", "/v1x", "/static/x.css"):
        status, headers, body, seen = call(g, path=path)
        assert (status, seen) == (401, None)
        assert json.loads(body)["error"]["code"] == "NotLoggedIn"
        assert b"content-security-policy" in headers
    for path in ("/login", "/v1/models", "/favicon.ico"):
        assert call(g, path=path)[0] == 200
    assert call(g, kind="websocket", path="/events")[0] == "websocket.close"
    cookie = g.auth.login("bob", "b")
    assert call(g, path="/config", cookie=f"x=1; {cookie.name}={cookie.value}")[0] == 200
    assert call(g, kind="websocket", cookie=f"{cookie.name}={cookie.value}")[0] == "websocket.accept"
    assert call(guard(), path="/config")[0] == 200


def test_a_page_without_login_leads_to_the_login_page() -> None:
    g = guard(USERS)
    status, headers, _, _ = call(g, path="/a b", query=b"x=1&y=2", accept="text/html,*/*")
    assert (status, headers[b"location"]) == (303, b"/login?next=/a%20b%3Fx%3D1%26y%3D2")
    assert call(g, path="/chat", root_path="/chat", accept="text/html")[1][b"location"] == b"/chat/login?next=/"
    assert call(g, path="/sub/x", root_path="/sub", accept="text/html")[1][b"location"] == b"/sub/login?next=/x"
    assert call(g, path="/\r\nSet-Cookie: a=b", accept="text/html")[1][b"location"] == b"/login?next=/%0D%0ASet-Cookie%3A%20a%3Db"
    assert call(g, "POST", path="/", accept="text/html")[0] == 401
    assert call(g, path="/config", accept="*/*")[0] == 401  # what gradio_client expects


def test_the_page_gives_a_cookie_and_already_knows_its_identity() -> None:
    g = guard()
    _, headers, _, seen = call(g, accept="text/html", cookie="a=1", accept_encoding="br, gzip")
    name, _, value = headers[b"set-cookie"].decode().split(";")[0].partition("=")
    inside = dict(seen["headers"])
    assert inside[b"cookie"].decode() == f"a=1; {name}={value}" and b"accept-encoding" not in inside
    _, again, _, _ = call(g, accept="text/html", cookie=f"{name}={value}")
    assert again[b"set-cookie"].decode().startswith(f"{name}={value};")  # renewed
    _, fresh, _, seen = call(g, accept="text/html", cookie=f"{name}=bad")
    assert dict(seen["headers"])[b"cookie"] == fresh[b"set-cookie"].split(b";")[0]
    assert b"set-cookie" not in call(g, accept="application/json")[1]
    assert b"set-cookie" in call(g, path="/config", accept="*/*")[1]  # gradio_client
    closed = guard(USERS)
    assert b"set-cookie" not in call(closed, path="/login", accept="text/html")[1]
    cookie = closed.auth.login("bob", "b")
    assert call(closed, accept="text/html", cookie=f"{cookie.name}={cookie.value}")[1][b"set-cookie"].decode() == cookie.header


def test_cors_headers_are_removed_and_security_headers_are_there() -> None:
    cors = [(b"Access-Control-Allow-Origin", b"http://evil.example"), (b"access-control-allow-credentials", b"true"), (b"X-Own", b"1")]
    _, headers, _, _ = call(guard(app=App(headers=[*cors, (b"Content-Security-Policy", b"default-src *")])))
    assert not [name for name in headers if name.lower().startswith(b"access-control")]
    assert headers[b"X-Own"] == b"1" and b"Content-Security-Policy" not in headers
    assert headers[b"x-content-type-options"] == b"nosniff"
    assert headers[b"content-security-policy"].decode() == page_policy()
    assert (
        call(guard(), "OPTIONS", origin="http://evil.example", access_control_request_method="POST")[1].keys() & {b"access-control-allow-origin"}
        == set()
    )


def test_html_is_whole_and_its_policy_names_its_inline_scripts_only() -> None:
    import base64
    import hashlib

    html = (b"<html><script>on", b"e()</script><SCRIPT data-x>two()</SCRIPT><script src='x.js'></script>", b"</html>")
    app = App(html, [(b"content-type", b"text/html; charset=utf-8")])
    _, headers, body, _ = call(guard(app=app), accept="text/html")
    assert body == b"".join(html) and headers[b"cache-control"] == b"no-store"
    policy = headers[b"content-security-policy"].decode()
    for script in (b"one()", b"two()"):
        assert base64.b64encode(hashlib.sha256(script).digest()).decode() in policy
    assert policy.count("sha256-") == 2
    assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]
    assert "http" not in policy and "*" not in policy


def test_files_that_people_sent_are_shown_in_a_sandbox() -> None:
    app = App((b"<script>alert(1)</script>",), [(b"content-type", b"text/html")])
    policy = call(guard(app=app), path="/gradio_api/file=/tmp/x.html")[1][b"content-security-policy"]
    assert b"sandbox" in policy and b"sha256" not in policy


def test_a_stream_is_passed_on_piece_by_piece() -> None:
    app = App((b"a", b"b"), [(b"content-type", b"text/event-stream")])
    assert call(guard(app=app))[2] == b"ab"


def test_lifespan_is_passed_on() -> None:
    assert call(guard(), host=None, kind="lifespan")[0] == "lifespan.startup.complete"


@pytest.mark.parametrize(
    ("headers", "right"),
    [
        ({"content-type": "application/json", "x-tgw": "1"}, True),
        ({"content-type": "Application/JSON; charset=utf-8", "x-tgw": "1"}, True),
        ({"content-type": "application/json"}, False),
        ({"content-type": "text/plain", "x-tgw": "1"}, False),
        ({"content-type": "text/plain;application/json", "x-tgw": "1"}, False),
        ({"x-tgw": "1"}, False),
    ],
)
def test_our_json_routes_take_nothing_that_a_foreign_form_can_send(headers: dict[str, str], right: bool) -> None:
    if right:
        require_json(Asked(headers=headers))
    else:
        with pytest.raises(AccessDenied, match="X-TGW"):
            require_json(Asked(headers=headers))
