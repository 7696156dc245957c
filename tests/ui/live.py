"""A browser without a screen for tests of the server: cookies, JSON, the tab's WebSocket and what a page makes of its events."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import httpx
import psutil
import uvicorn
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from modules import app, auth, guard, loaders, settings
from modules.paths import UserData
from modules.store import Store
from modules.ui.serve import bind, build_server
from modules.ui.views import BlockPresenter
from tests.fakes import WAIT, FakeBackend, FakeEngine, until

ROOT = Path(__file__).resolve().parents[2]
START = 90.0
"""Seconds for a server to come up on a machine that is busy."""


class Browser(httpx.Client):
    """One browser without login: its cookie is made here, as the page would give it. `folder`: the server's user_data."""

    def __init__(self, url: str, folder: Path | None = None, **options) -> None:
        super().__init__(base_url=url, timeout=WAIT, **options)
        self.url = url
        self.headers["X-TGW"] = "1"
        if folder:
            installation = json.loads((folder / "sessions.json").read_text())["installation"]
            self.cookies.set(f"tgw_browser_{installation}", (os.urandom(16).hex() + "x" * 11))

    def json(self, method: str, path: str, body=None, status: int = 200):
        """The answer's JSON; the status must be `status`, and an error must have our form."""
        response = self.request(method, path, content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert response.status_code == status, response.text
        found = response.json()
        if status >= 400:
            assert set(found) == {"error"} and set(found["error"]) == {"code", "message"} and found["error"]["message"], found
        return found

    @property
    def revision(self) -> int:
        return self.json("GET", "/chat/session")["revision"]

    def ask(self, text: str, conversation: str | None = None, status: int = 202):
        return self.json("POST", "/chat/messages", {"conversation": conversation, "text": text, "revision": self.revision}, status)

    def messages(self, conversation: str) -> list[dict]:
        return self.json("GET", f"/chat/conversations/{conversation}")["messages"]

    def ended(self, conversation: str) -> dict:
        """The last message, once it no longer runs."""
        until(lambda: self.messages(conversation)[-1]["state"] != "running")
        return self.messages(conversation)[-1]

    @contextmanager
    def tab(self, **options):
        """The tab's WebSocket."""
        cookies = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        with connect(
            self.url.replace("http", "ws", 1) + "/chat/events",
            additional_headers={"Cookie": cookies},
            origin=self.url,
            open_timeout=WAIT,
            close_timeout=2,
            **options,
        ) as socket:
            yield Tab(socket)


class Tab:
    """What one tab hears. `events`: everything so far."""

    def __init__(self, socket) -> None:
        self.socket = socket
        self.events: list[dict] = []

    def follow(self, conversation, replies=()) -> None:
        self.socket.send(json.dumps({"type": "follow", "conversation": conversation, "replies": dict(replies)}))

    def next(self, seconds: float = WAIT) -> dict:
        event = json.loads(self.socket.recv(timeout=seconds))
        self.events.append(event)
        return event

    def until(self, type: str, true=lambda event: True) -> dict:
        """The next event of `type` for which `true`."""
        ends = time.monotonic() + WAIT
        while time.monotonic() < ends:
            event = self.next(ends - time.monotonic())
            if event["type"] == type and true(event):
                return event
        raise AssertionError(f"no {type}: {self.events[-5:]}")

    def closed(self) -> int:
        """The code with which the server closed."""
        try:
            while True:
                self.next()
        except ConnectionClosed as end:
            return end.rcvd.code if end.rcvd else 1006


class Message:
    """What a page shows of one reply, made from its events as chat.js makes it."""

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self.reasoning: list[str] = []
        self.closed: set[tuple[str, int]] = set()
        self.final: dict | None = None
        self.seen: list[int] = []

    def take(self, event: dict) -> None:
        self.seen.append(event["event"])
        if event["type"] == "snapshot":
            self.blocks, self.reasoning, self.closed = list(event["blocks"]), list(event["reasoning"]), set()
        elif event["type"] == "update":
            for name in ("blocks", "reasoning"):
                for change in event[name]:
                    self._change(name, *change)
        elif event["type"] == "end":
            self.final = event["message"]

    def _change(self, name: str, index: int, html: str, closed: bool, append: bool) -> None:
        blocks = getattr(self, name)
        assert index <= len(blocks), "a block is missing"
        assert (name, index) not in self.closed, "a finished block was sent again"
        if index == len(blocks):
            blocks.append("")
        if append:
            head, end, tail = blocks[index].rpartition("</code>")
            blocks[index] = head + html + end + tail
        else:
            blocks[index] = html
        if closed:
            self.closed.add((name, index))

    def follow(self, tab: Tab, id: str) -> Message:
        """Take all of `tab`'s events about the reply `id` until its end."""
        while self.final is None:
            event = tab.next()
            if event.get("reply") == id:
                self.take(event)
        return self


@dataclass
class Live:
    """A server in this process. `hold()` makes its model wait for `say()` before each piece."""

    app: app.App
    auth: auth.Auth
    engine: FakeEngine
    url: str

    @property
    def backend(self) -> FakeBackend:
        return self.engine.loaded[-1]

    def hold(self, *script: str) -> None:
        self.backend.script, self.backend.gate = list(script), threading.Semaphore(0)

    def say(self, pieces: int = 1) -> None:
        self.backend.gate.release(pieces)

    def let_go(self) -> None:
        for backend in self.engine.loaded:
            backend.gate.release(1000)

    def browser(self) -> Browser:
        return Browser(self.url, self.app.data.root)


@contextmanager
def live_app(folder: Path, *flags: str, users: dict[str, str] | None = None):
    """A `Live` with the models model.fake (loaded) and other.fake."""
    engine, data = FakeEngine(), UserData(folder)
    data.create()
    for name in ("model.fake", "other.fake"):
        (data.models / name).touch()
    with mock.patch.object(loaders, "LOADERS", (engine.loader,)):
        configuration = settings.load(flags, (), (), app.option_groups())
        built = app.build(configuration, data, Store.open(data.database), BlockPresenter)
        built.models.load(built.models.choose("model.fake"))
        who = auth.Auth(users or {}, data.sessions)
        with _serving(build_server(built, who, guard.Hosts.build(False))) as url:
            built.models.listen(built.replies.wake)
            live = Live(built, who, engine, url)
            yield live
            live.let_go()
        built.close()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def _serving(asgi):
    listener = bind(settings.Settings(listen_port=free_port()))
    server = uvicorn.Server(uvicorn.Config(asgi, log_level="critical", timeout_graceful_shutdown=1, ws_max_size=2**17))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(WAIT)
        listener.close()


class Server:
    """A `server.py` process of its own, of the program in `root`; `lines` is what it has printed. `up()` waits for the page."""

    def __init__(self, folder: Path, *flags: str, env: dict[str, str] | None = None, root: Path = ROOT) -> None:
        self.folder, self.lines, self.url = folder, [], ""
        self._changed = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, str(root / "server.py"), "--user-data-dir", str(folder), *flags],
            cwd=root,
            env={**os.environ, "NO_COLOR": "1", **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self.lines.append("")
            self._changed.notify_all()

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def says(self, pattern: str, seconds: float = START) -> re.Match:
        """Wait until the output holds `pattern`."""
        found: list[re.Match] = []

        def there() -> bool:
            found.extend(re.finditer(pattern, self.output))
            return bool(found)

        with self._changed:
            assert self._changed.wait_for(there, seconds), f"never said {pattern!r}:\n{self.output}"
        return found[0]

    def up(self) -> Server:
        """Wait for the page."""
        self.url = self.says(r"The page is at (http\S+?)/(\s|$)")[1]
        return self

    def ends(self, seconds: float = START) -> int:
        """Wait for the end; the exit code."""
        return self.process.wait(seconds)

    def browser(self) -> Browser:
        return Browser(self.url, self.folder)

    def ready(self) -> Browser:
        """A browser, when the model is loaded."""
        browser = self.browser()
        until(lambda: browser.json("GET", "/models")["status"]["state"] == "ready", START)
        return browser

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT)

    def interrupt(self, number: int = signal.SIGINT) -> float:
        """Ask it to end; the seconds that it took."""
        began = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(START)
        return time.monotonic() - began


@contextmanager
def servers():
    """Makes servers, and leaves none behind."""
    made: queue.SimpleQueue[Server] = queue.SimpleQueue()

    def make(folder: Path, *flags: str, **options) -> Server:
        server = Server(folder, *flags, **options)
        made.put(server)
        return server

    try:
        yield make
    finally:
        while not made.empty():
            server = made.get()
            children = server.children() if server.process.poll() is None else []
            server.process.kill()
            server.process.wait(WAIT)
            for child in children:
                if child.is_running():
                    child.kill()


def echo_model(folder: Path, text: str = "", name: str = "model.echo") -> Path:
    """An echo model in `folder`'s models that says `text`."""
    path = folder / "models" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path
