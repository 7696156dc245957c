"""Servers for the openai_server backend: our own API over a backend, llama-cpp-python's server, and one that does as a test says."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import httpx

from modules import app, loaders, settings
from modules.api.server import ApiServer, build_api
from modules.backends.base import Backend, CancelToken
from modules.backends.openai_server import LOADER
from modules.backends.openai_server.client import OpenAIServerBackend
from modules.guard import Hosts
from modules.paths import UserData
from modules.store import Store
from tests.fakes import FakeEngine, PlainPresenter, until

START = 60.0


def connect(url: str, model: str = "", cancel: CancelToken | None = None, **values) -> OpenAIServerBackend:
    """The backend for the server at `url`; `values` are options."""
    options = LOADER.options.build({"server_url": url, **values})
    made = LOADER.load(Path(f"openai:{model}") if model else Path("made-up"), options, lambda _fraction, _words: None, cancel or CancelToken())
    assert isinstance(made, OpenAIServerBackend)
    return made


@contextmanager
def our_api(make: Callable[[], Backend], folder: Path, *flags: str) -> Iterator[str]:
    """The address of our API over the backend that `make` makes."""
    engine, data = FakeEngine(make), UserData(folder)
    data.create()
    (data.models / "model.fake").touch()
    with mock.patch.object(loaders, "LOADERS", (engine.loader,)):
        built = app.build(settings.load(("--api", *flags), (), (), app.option_groups()), data, Store.open(data.database), PlainPresenter)
        built.models.load(built.models.choose("model.fake"))
    listener = socket.create_server(("127.0.0.1", 0))
    server = ApiServer(build_api(built, lambda: Hosts.build(False)), listener)
    server.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        server.stop()
        built.close()


@contextmanager
def llama_cpp_server(model: Path, context: int) -> Iterator[str]:
    """The address of llama-cpp-python's server, a process of its own. It runs one request at a time."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--model", str(model), "--n_ctx", str(context), "--n_threads", "1", "--n_threads_batch", "1", "--interrupt_requests", "false"]
    words = [sys.executable, "-m", "llama_cpp.server", *flags, "--host", "127.0.0.1", "--port", str(port), "--verbose", "false"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})

    def answers() -> bool:
        assert process.poll() is None, "the server ended"
        try:
            return httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 200
        except httpx.TransportError:
            return False

    try:
        until(answers, START)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(10)


class Told:
    """A server whose routes a test writes: `routes[(method, path)]` is (status, body, headers), or a function of the request's JSON that gives it.

    A body that is a list is a stream of events; a function in it is called when it is reached, with the connection's "is it still there".
    """

    def __init__(self) -> None:
        self.routes: dict[tuple[str, str], object] = {}
        self.asked: list[tuple[str, str, object, dict[str, str]]] = []
        self.gone = threading.Event()
        """Set when a client went away in the middle of a stream."""
        self.url = ""

    def bodies(self, path: str) -> list:
        return [body for _, asked, body, _ in self.asked if asked == path]


class _Handler(BaseHTTPRequestHandler):
    told: Told
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET", None)

    def do_POST(self) -> None:
        self._answer("POST", json.loads(self.rfile.read(int(self.headers.get("content-length", 0)))))

    def _answer(self, method: str, body: object) -> None:
        self.told.asked.append((method, self.path, body, {name.lower(): value for name, value in self.headers.items()}))
        found = self.told.routes.get((method, self.path), (404, {"error": {"message": "no such route"}}))
        status, answer, *rest = found(body) if callable(found) else found
        self.send_response(status)
        for name, value in (rest[0] if rest else {}).items():
            self.send_header(name, value)
        self.end_headers()
        try:
            for piece in answer if isinstance(answer, list) else [answer]:
                data = piece() if callable(piece) else piece
                if isinstance(answer, list):
                    data = data if isinstance(data, bytes) else b"data: " + (data if data == "[DONE]" else json.dumps(data)).encode() + b"\n\n"
                self.wfile.write(data if isinstance(data, bytes) else json.dumps(data).encode())
        except OSError:
            self.told.gone.set()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@contextmanager
def told_server() -> Iterator[Told]:
    """A `Told` on a port of its own."""
    told = Told()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"told": told}))
    told.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield told
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
