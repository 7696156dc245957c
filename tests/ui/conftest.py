"""A live server with a scripted engine, and a browser that watches for errors and for requests to other hosts."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

from modules import app, auth, guard, loaders, settings
from modules.paths import UserData
from modules.store import Store
from modules.ui.views import BlockPresenter
from tests.fakes import WAIT, FakeBackend, FakeEngine, until

CHROMIUM_FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"

WINDOW = {"viewport": {"width": 1280, "height": 800}}


@dataclass
class Live:
    """A running server. `backend` says `backend.script`; `hold()` makes it wait for `say()`."""

    app: app.App
    auth: auth.Auth
    engine: FakeEngine
    url: str

    def owner(self, tab) -> str:
        """Who the browser of `tab` is."""
        return self.auth.need(SimpleNamespace(cookies={each["name"]: each["value"] for each in tab.context.cookies()})).owner

    @property
    def backend(self) -> FakeBackend:
        return self.engine.loaded[-1]

    def hold(self, *script: str) -> None:
        self.backend.script, self.backend.gate = list(script), threading.Semaphore(0)

    def say(self, pieces: int = 1) -> None:
        self.backend.gate.release(pieces)

    @property
    def asked(self) -> int:
        """How many generations the engine was asked for."""
        return len(self.backend.requests)


@pytest.fixture(scope="session")
def listener():
    """One port for the servers of all tests, one after the other: what a browser keeps of the page's files, it keeps for all of them."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@contextmanager
def serving(built: app.App, who: auth.Auth, listener: socket.socket):
    """The server of `built`; gives its address."""
    import uvicorn

    from modules.ui.serve import build_server

    ready = build_server(built, who, guard.Hosts.build(False))
    built.models.listen(built.replies.wake)
    server = uvicorn.Server(uvicorn.Config(ready, log_level="critical", timeout_graceful_shutdown=0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener.dup()]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(WAIT)


@pytest.fixture
def live_server(tmp_path, monkeypatch, request, listener):
    """A `Live` server; flags in the marker's arguments: @pytest.mark.parametrize("live_server", [("--flag",)], indirect=True)."""
    engine = FakeEngine()
    engine.loader = replace(engine.loader, samplers=frozenset({"top_p", "top_k"}))
    monkeypatch.setattr(loaders, "LOADERS", (engine.loader,))
    data = UserData(tmp_path)
    data.create()
    for name in ("model.fake", "other.fake"):
        (data.models / name).touch()
    configuration = settings.load(getattr(request, "param", ()), (), (), app.option_groups())
    built = app.build(configuration, data, Store.open(data.database), BlockPresenter)
    built.models.load(built.models.choose("model.fake"))
    who = auth.Auth({}, data.sessions)
    with serving(built, who, listener) as url:
        yield Live(built, who, engine, url)
        for backend in engine.loaded:
            backend.gate.release(10**6)
    built.close()


@pytest.fixture(scope="session")
def chromium(browser_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(browser_path), args=CHROMIUM_FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def everyday(chromium):
    """The browser of `new_tab`, which keeps its cache from test to test."""
    context = chromium.new_context(**WINDOW)
    yield context
    context.close()


@pytest.fixture
def watched(live_server):
    """Listens to browser contexts. At the end: no error in any page, and no request to any host but ours."""
    contexts, errors, foreign = [], [], []

    def asked(request):
        if not request.url.startswith((live_server.url, "data:", "blob:")):
            foreign.append(request.url)

    def said(message):
        if "Content Security Policy" in message.text:
            errors.append(message.text)

    def failed(error):
        errors.append(str(error.error))

    listeners = {"request": asked, "console": said, "weberror": failed}

    def watch(context):
        context.set_default_timeout(WAIT * 1000)
        for event, listen in listeners.items():
            context.on(event, listen)
        contexts.append(context)
        return context

    yield watch
    for context in contexts:
        for event, listen in listeners.items():
            context.remove_listener(event, listen)
    assert foreign == []
    assert errors == []


@pytest.fixture
def new_browser(chromium, watched):
    """Makes browser contexts. Each reads all files of the page anew: where another browser is not what matters, `new_tab` is quicker."""
    contexts = []

    def make(**options):
        context = watched(chromium.new_context(**{**WINDOW, **options}))
        contexts.append(context)
        return context

    yield make
    for context in contexts:
        context.close()


@pytest.fixture
def new_tab(everyday, watched, live_server):
    """Opens tabs of one browser."""
    _forget(everyday, live_server.url)
    watched(everyday)

    def make(path: str = "/", size: tuple[int, int] | None = None, script: str = ""):
        tab = everyday.new_page()
        tab.add_init_script(script)
        if size:
            tab.set_viewport_size({"width": size[0], "height": size[1]})
        tab.goto(live_server.url + path)
        tab.locator(".tgw-composer textarea").wait_for()
        tab.wait_for_function("document.querySelector('.tgw-chip').dataset.state === 'ready'")
        return tab

    yield make
    everyday.set_offline(False)
    for tab in everyday.pages:
        tab.goto("about:blank")  # what it does as it goes, it does now
        tab.close()


def _forget(context, url: str) -> None:
    """Let a browser know nothing of former servers at this address but the files of the page."""
    blank = context.new_page()
    context.new_cdp_session(blank).send("Storage.clearDataForOrigin", {"origin": url, "storageTypes": "cookies,local_storage"})
    context.clear_cookies()
    blank.close()
