"""The login page, and the guard in front of a real mounted Gradio page."""

import re
import shutil
import socket
import threading
import time

import fastapi
import gradio as gr
import pytest
import uvicorn
from fastapi.testclient import TestClient
from starlette.routing import Mount
from starlette.websockets import WebSocketDisconnect

from modules.auth import Auth
from modules.errors import DataError
from modules.guard import Guard, Hosts
from modules.ui.login import local_path, login_page, login_router

USERS = {"ann": "secret", 'x"><script>alert(1)</script>': "b"}
HTML = {"accept": "text/html"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def build(users, monkeypatch, on_adopt=lambda old, new: None, page=None):
    """The guarded application with a small Gradio page mounted, and its Auth."""
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    auth = Auth(users, None)
    app = fastapi.FastAPI()
    app.include_router(login_router(auth, on_adopt))

    @app.get("/whoami")
    def whoami(request: fastapi.Request) -> dict[str, str]:
        return {"owner": auth.need(request).owner}

    @app.websocket("/events")
    async def events(socket: fastapi.WebSocket) -> None:
        await socket.accept()
        await socket.send_text(auth.need(socket).owner)
        await socket.close()

    with gr.Blocks(title="Test") as blocks:
        (page or small_page)()
    gr.mount_gradio_app(app, blocks, path="/", auth_dependency=auth.gradio_user, ssr_mode=False, run_history=False, footer_links=[])
    return Guard(app, auth, Hosts.build(False)), auth, app


def small_page():
    box, out = gr.Textbox(label="Input"), gr.Textbox(label="Output")
    gr.Button("Go").click(_answer, box, out, api_name="answer")


def _answer(text: str, request: gr.Request) -> str:
    return f"{text} for {request.username}"


def client(guard) -> TestClient:
    return TestClient(guard, base_url="http://localhost:7860", follow_redirects=False)


def log_in(c: TestClient, user="ann", password="secret", **more):
    return c.post("/login", data={"username": user, "password": password, **more}, headers=HTML)


def test_an_unknown_browser_is_led_through_the_login_to_where_it_wanted(monkeypatch) -> None:
    guard, auth, _ = build(USERS, monkeypatch)
    with client(guard) as c:
        away = c.get("/?__theme=dark", headers=HTML)
        assert (away.status_code, away.headers["location"]) == (303, "/login?next=/%3F__theme%3Ddark")
        page = c.get(away.headers["location"], headers=HTML)
        assert page.status_code == 200 and 'name="next" value="/?__theme=dark"' in page.text
        back = log_in(c, next="/?__theme=dark")
        assert (back.status_code, back.headers["location"]) == (303, "/?__theme=dark")
        assert "HttpOnly" in back.headers["set-cookie"]
        assert "gradio_config" in c.get("/", headers=HTML).text
        assert c.get("/whoami").json() == {"owner": "user-ann"}
        assert c.get("/login", headers=HTML).status_code == 303  # already in
        sent = {"origin": "http://localhost:7860", "cookie": f"{auth.session_cookie}={c.cookies[auth.session_cookie]}"}
        with c.websocket_connect("ws://localhost:7860/events", headers=sent) as ws:
            assert ws.receive_text() == "user-ann"
        for wrong in ({**sent, "cookie": ""}, {**sent, "origin": "http://evil.example"}, {**sent, "host": "evil.example"}):
            with pytest.raises(WebSocketDisconnect), c.websocket_connect("ws://localhost:7860/events", headers=wrong):
                pass


def test_a_wrong_password_is_told_in_the_page_and_the_name_stays(monkeypatch) -> None:
    guard, _, _ = build(USERS, monkeypatch)
    with client(guard) as c:
        answer = log_in(c, 'x"><script>alert(2)</script>', "wrong", next="/x")
        assert answer.status_code == 401 and "set-cookie" not in answer.headers
        assert "Wrong name or password" in answer.text and 'value="/x"' in answer.text
        assert "<script" not in answer.text and "wrong" not in answer.text.replace("Wrong", "")
        assert log_in(c, 'x"><script>alert(1)</script>', "b").status_code == 303
        for _ in range(5):
            log_in(c, "ann", "wrong")
        answer = log_in(c, "ann", "secret")
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1 and "Try again in" in answer.text


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b"username=ann", b"&" * 100 + b"=", b"a=1&" * 50, b"username=" + b"a" * 100_000, b"{}"])
def test_a_broken_form_is_a_failed_login(body: bytes, monkeypatch) -> None:
    guard, _, _ = build(USERS, monkeypatch)
    with client(guard) as c:
        assert c.post("/login", content=body).status_code == 401
        assert c.post("/login", content=body, headers={"content-type": "application/json"}).json()["error"]["code"] == "NotLoggedIn"


def test_a_foreign_page_cannot_log_anybody_in_or_out(monkeypatch) -> None:
    guard, _, _ = build(USERS, monkeypatch)
    with client(guard) as c:
        for origin in ("http://evil.example", "null", "http://localhost:3000"):
            assert c.post("/login", data={"username": "ann", "password": "secret"}, headers={"origin": origin}).status_code == 403
        log_in(c)
        assert c.post("/logout", headers={"origin": "http://evil.example"}).status_code == 403
        assert c.get("/whoami").status_code == 200


def test_logout(monkeypatch) -> None:
    guard, auth, _ = build(USERS, monkeypatch)
    with client(guard) as c:
        log_in(c)
        token = c.cookies[auth.session_cookie]
        answer = c.post("/logout", headers=HTML)
        assert (answer.status_code, answer.headers["location"]) == (303, "/login")
        assert auth.session_cookie not in c.cookies
        assert c.get("/whoami", headers={"cookie": f"{auth.session_cookie}={token}"}).status_code == 401
        assert c.post("/logout").json() == {"success": True}


def test_what_a_browser_owned_before_goes_to_the_user_once(monkeypatch) -> None:
    adopted = []
    guard, auth, _ = build(USERS, monkeypatch, on_adopt=lambda old, new: adopted.append((old, new)))
    with client(guard) as c:
        cookie = auth.new_browser_cookie()
        c.cookies.set(cookie.name, cookie.value, domain="localhost.local")
        log_in(c)
        assert adopted == [(auth.browser_owner(type("R", (), {"cookies": {cookie.name: cookie.value}})), "user-ann")]
        log_in(c, 'x"><script>alert(1)</script>', "b")
        assert len(adopted) == 1


def test_an_adoption_that_fails_is_told(monkeypatch) -> None:
    def full(old: str, new: str) -> None:
        raise DataError("The disk is full. Free some space.")

    guard, auth, _ = build(USERS, monkeypatch, on_adopt=full)
    with client(guard) as c:
        cookie = auth.new_browser_cookie()
        answer = c.post("/login", data={"username": "ann", "password": "secret"}, headers={"cookie": f"{cookie.name}={cookie.value}", **HTML})
        assert answer.status_code == 500 and "disk is full" in answer.text


def test_without_logins_there_is_no_login_page(monkeypatch) -> None:
    guard, _, _ = build({}, monkeypatch)
    with client(guard) as c:
        assert c.get("/login?next=/x", headers=HTML).headers["location"] == "/x"
        assert c.post("/login", data={"username": "", "password": ""}).status_code == 404
        page = c.get("/", headers=HTML)
        assert page.status_code == 200 and "gradio_config" in page.text
        first = c.get("/whoami").json()["owner"]
        assert first.startswith("browser-") and c.get("/whoami").json()["owner"] == first
        c.post("/logout", headers=HTML)
        assert c.get("/whoami").json()["owner"] == first  # the conversations of this browser are not lost


@pytest.mark.parametrize("target", ["//evil.example", "/\\evil.example", "/\t/evil.example", "https://evil.example", "evil", "", "/\r\nx: y", "/é"])
def test_after_the_login_only_a_path_of_this_server_is_opened(target: str) -> None:
    assert local_path(target) == "/"


def test_the_login_page_escapes_and_has_no_script() -> None:
    page = login_page('/"><script>', '"><script>', "<script>")
    assert "<script" not in page and page.count("&lt;script&gt;") == 3
    assert not re.search(r"https?://", page)
    assert page.count("autofocus") == 1


def _requests(app: fastapi.FastAPI) -> list[tuple[str, str]]:
    """Every (method, path) that the mounted Gradio application answers, path parameters filled in."""
    routes = list(next(route.app for route in app.routes if isinstance(route, Mount)).routes)
    found = set()
    while routes:
        route = routes.pop()
        if hasattr(route, "original_router"):  # FastAPI keeps an included router as one entry
            routes += route.original_router.routes
            continue
        path = re.sub(r"\{[^}]*\}", "x", route.path)
        found |= {(method, path) for method in route.methods}
    return sorted(found)


def test_no_route_of_gradio_answers_without_login(monkeypatch) -> None:
    guard, _, app = build(USERS, monkeypatch)
    with client(guard) as c:
        asked = _requests(app)
        assert len(asked) > 60 and ("POST", "/gradio_api/cancel") in asked and ("GET", "/gradio_api/heartbeat/x") in asked
        answered = [(method, path) for method, path in asked if c.request(method, path).status_code != 401]
    assert {path for _, path in answered} <= Guard.PUBLIC


def test_no_route_of_gradio_answers_a_foreign_page(monkeypatch) -> None:
    guard, _, app = build({}, monkeypatch)
    origin = {"origin": "https://evil.example"}
    with client(guard) as c:
        c.get("/", headers=HTML)
        for method, path in _requests(app):
            if method == "POST":
                assert c.request(method, path, headers=origin).status_code == 403
            assert c.request(method, path, headers={"host": "evil.example"}).status_code == 403
        answer = c.get("/config", headers=origin)
        assert not [name for name in answer.headers if name.startswith("access-control")]
        preflight = c.options("/gradio_api/queue/join", headers={**origin, "access-control-request-method": "POST"})
        assert not [name for name in preflight.headers if name.startswith("access-control")]


def test_a_hostile_title_does_not_become_a_script_that_the_policy_names(monkeypatch) -> None:
    """The policy trusts every inline script of the page, so Gradio must keep values from becoming one."""
    hostile = "</script><script>alert(1)</script>"
    guard, _, _ = build({}, monkeypatch, page=lambda: (small_page(), gr.Dropdown([hostile], label=hostile), gr.HTML(hostile)))
    with client(guard) as c:
        hostile_page = c.get("/", headers=HTML)
    guard, _, _ = build({}, monkeypatch)
    with client(guard) as c:
        plain_page = c.get("/", headers=HTML)
    assert "alert(1)" in hostile_page.text
    counts = [page.headers["content-security-policy"].count("sha256-") for page in (hostile_page, plain_page)]
    assert counts[0] == counts[1] == len(re.findall(r"<script>|<script data", plain_page.text))


# --- served for real


@pytest.fixture
def serve(monkeypatch):
    """Start the guarded application on a free port; gives its address."""
    running = []

    def start(users, page=None) -> str:
        guard, _, _ = build(users, monkeypatch, page=page)
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(guard, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        running.append((server, thread))
        deadline = time.monotonic() + 20
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.started
        return f"http://127.0.0.1:{listening.getsockname()[1]}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(10)


@pytest.mark.parametrize("users", [{}, USERS])
def test_gradio_client_works_with_and_without_login(users, serve) -> None:
    from gradio_client import Client
    from gradio_client.exceptions import AuthenticationError

    url = serve(users)
    if users:
        with pytest.raises(AuthenticationError):
            Client(url, verbose=False)
        with pytest.raises(AuthenticationError):
            Client(url, auth=("ann", "wrong"), verbose=False)
    program = Client(url, auth=("ann", "secret") if users else None, verbose=False)
    assert program.predict("hi", api_name="/answer") == ("hi for ann" if users else "hi for ")


def many_controls():
    box, out = gr.Textbox(label="Input"), gr.Textbox(label="Output")
    gr.Button("Go").click(_answer, box, out)
    gr.HTML("<b id=shown>shown</b><img src=/nothing.png onerror='window.injected = 1'>")
    for control in (gr.Slider, gr.Dropdown, gr.Checkbox, gr.File, gr.Number, gr.Image, gr.Dataframe, gr.JSON, gr.Markdown, gr.Code, gr.UploadButton):
        control()


@pytest.mark.browser
def test_the_page_works_under_its_policy_in_chromium(serve, chromium) -> None:
    from playwright import sync_api

    url = serve(USERS, many_controls)
    page = chromium.new_page(viewport={"width": 390, "height": 800})
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(url)
    assert page.url.endswith("/login?next=/")
    assert page.evaluate("document.activeElement.id") == "username"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.keyboard.type("ann")
    page.keyboard.press("Tab")
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    page.get_by_role("alert").wait_for()
    assert page.evaluate("document.activeElement.id") == "password" and page.get_by_label("Name").input_value() == "ann"
    page.keyboard.type("secret")
    page.keyboard.press("Enter")
    page.get_by_label("Input", exact=True).fill("hello", timeout=30_000)
    page.get_by_role("button", name="Go").click()
    sync_api.expect(page.get_by_label("Output", exact=True)).to_have_value("hello for ann", timeout=20_000)
    sync_api.expect(page.locator("#shown")).to_be_visible()
    listen = "const s = new WebSocket(`ws://${location.host}/events`); s.onmessage = e => done(e.data); s.onerror = () => done('refused')"
    assert page.evaluate(f"new Promise(done => {{ {listen} }})") == "user-ann"
    assert page.evaluate("window.injected") is None  # the handler in the HTML was refused...
    refused = [text for text in said if "Content Security Policy" in text]
    assert refused and all("event handler" in text for text in refused)  # ...and nothing else was
    assert not [request for request in asked if not request.startswith((url, "data:", "blob:"))]
    page.context.close()
