"""The routes of downloads over a real server: looking, fetching, pausing, who may."""

import random
import threading
from unittest import mock

import pytest

from modules import app as building
from modules.downloads import Downloads
from tests.fakes import WAIT, until
from tests.hub_server import serving
from tests.ui.live import live_app

GGUF = random.Random(3).randbytes(200_000)


@pytest.fixture(scope="module")
def hub():
    with serving(files={"m.Q4_K_M.gguf": GGUF, "m.Q8_0.gguf": GGUF * 2, "README.md": b"# Hi"}) as made:
        yield made


def served(hub, folder, *flags):
    return mock.patch.object(building, "Downloads", lambda data: Downloads(data, hub.url, token="")), live_app(folder, *flags)


@pytest.fixture(scope="module")
def server(hub, tmp_path_factory):
    patched, live = served(hub, tmp_path_factory.mktemp("downloads") / "user_data")
    with patched, live as made:
        yield made


def test_a_model_is_looked_at_and_fetched(server, hub):
    with server.browser() as me:
        plan = me.json("POST", "/downloads/plan", {"text": "some/model"})
        assert [(file["name"], file["quant"], file["chosen"]) for file in plan["files"]] == [
            ("m.Q8_0.gguf", "Q8_0", False),
            ("m.Q4_K_M.gguf", "Q4_K_M", True),
            ("README.md", "", False),
        ]
        assert (plan["repo"], plan["branch"], plan["kind"], plan["note"]) == ("some/model", "main", "gguf", "")
        started = me.json("POST", "/downloads", {"text": "some/model", "files": ["m.Q8_0.gguf"]}, 202)
        assert server.app.downloads.wait(started["id"], WAIT).state == "done"
        (listed,) = me.json("GET", "/downloads")["downloads"]
        assert listed["state"] == "done" and listed["done"] == listed["total"] == 2 * len(GGUF) and listed["targets"] == ["m.Q8_0.gguf"]
        assert me.json("DELETE", f"/downloads/{started['id']}") == {"downloads": []}
        assert (server.app.data.models / "m.Q8_0.gguf").read_bytes() == GGUF * 2


def test_pausing_resuming_cancelling(server, hub):
    hub.hold = threading.Event()
    with server.browser() as me:
        id = me.json("POST", "/downloads", {"text": "some/model:main"}, 202)["id"]
        until(lambda: server.app.downloads.get(id).done)
        assert me.json("POST", f"/downloads/{id}/pause")["downloads"][0]["state"] == "paused"
        assert me.json("POST", f"/downloads/{id}/resume")["downloads"][0]["state"] in ("queued", "running")
        assert me.json("POST", f"/downloads/{id}/cancel")["downloads"][0]["state"] == "cancelled"
        hub.hold.set()
        assert me.json("POST", "/downloads/nothing/pause", status=404)["error"]["code"] == "NotFound"


def test_errors_are_told(server):
    with server.browser() as me:
        assert "no repository" in me.json("POST", "/downloads/plan", {"text": "other/model"}, 404)["error"]["message"]
        assert me.json("POST", "/downloads/plan", {"text": "../x"}, 400)["error"]["code"] == "SettingsError"
        assert me.json("POST", "/downloads", {"text": "some/model", "files": ["../../x"]}, 400)["error"]["code"] == "NameError"


def test_nobody_else_may(server, hub, tmp_path):
    with server.browser() as me:
        foreign = me.post("/downloads/plan", content='{"text": "some/model"}', headers={"Content-Type": "text/plain"})
        assert foreign.status_code in (403, 415)
    patched, live = served(hub, tmp_path / "user_data", "--multi-user")
    with patched, live as shared, shared.browser() as me:
        asked = len(hub.asked)
        for method, path, body in (
            ("GET", "", None),
            ("POST", "/plan", {"text": "some/model"}),
            ("POST", "", {"text": "some/model"}),
            ("DELETE", "/x", None),
        ):
            assert me.json(method, f"/downloads{path}", body, 403)["error"]["code"] == "AccessDenied"
        assert len(hub.asked) == asked
