"""The API on a port, with a scripted engine or the real one."""

from __future__ import annotations

import shutil
import socket
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import httpx
import pytest

from modules import app, loaders, settings
from modules.api.server import ApiServer, build_api
from modules.guard import Hosts
from modules.paths import UserData
from modules.store import Store
from tests.fakes import WAIT, FakeBackend, FakeEngine, PlainPresenter, until


@dataclass
class Served:
    """A running API. `engine.loaded[-1]` is what it asks."""

    app: app.App
    engine: FakeEngine | None
    url: str

    @property
    def backend(self) -> FakeBackend:
        return self.engine.loaded[-1]

    def client(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=WAIT, headers=headers)

    def post(self, path: str, body, status: int = 200, **headers: str):
        """The answer's JSON; the status must be `status`."""
        with self.client(**headers) as client:
            response = client.post(path, json=body)
        assert response.status_code == status, response.text
        return response.json()

    def get(self, path: str, status: int = 200, **headers: str):
        with self.client(**headers) as client:
            response = client.get(path)
        assert response.status_code == status, response.text
        return response.json()


@contextmanager
def serving(built: app.App):
    """The API of `built` on a port of its own; gives its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = ApiServer(build_api(built, lambda: Hosts.build(False)), listener)
    server.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.stop()


@contextmanager
def served(folder, *flags: str, make=FakeBackend):
    """A `Served` with the models model.fake (loaded) and other.fake."""
    engine, data = FakeEngine(make), UserData(folder)
    data.create()
    for name in ("model.fake", "other.fake"):
        (data.models / name).touch()
    with mock.patch.object(loaders, "LOADERS", (engine.loader,)):
        configuration = settings.load(("--api", *flags), (), (), app.option_groups())
        built = app.build(configuration, data, Store.open(data.database), PlainPresenter)
        built.models.load(built.models.choose("model.fake"))
        with serving(built) as url:
            yield Served(built, engine, url)
            for backend in engine.loaded:
                backend.gate.release(10**6)
        built.close()


@pytest.fixture
def api(tmp_path):
    """The API with a scripted engine."""
    with served(tmp_path) as made:
        yield made


@pytest.fixture(scope="session")
def real_api(tmp_path_factory, starter_model):
    """The API with the real engine and the starter model."""
    data = UserData(tmp_path_factory.mktemp("api"))
    data.create()
    shutil.copy(starter_model, data.models)
    configuration = settings.load(("--api", "--ctx-size", "4096"), (), (), app.option_groups())
    built = app.build(configuration, data, Store.open(data.database), PlainPresenter)
    built.models.load(built.models.choose(starter_model.name))
    with serving(built) as url:
        yield Served(built, None, url)
    built.close()
