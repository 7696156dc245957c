"""Where the API is served: its own port, the page's, alone; and that its event loop never stands still."""

import json
import threading
import time

import httpx
import pytest

from modules.api.server import build_api
from modules.guard import Hosts
from modules.ui.serve import _Both, build_server
from tests.api.conftest import served
from tests.fakes import WAIT, FakeBackend, until
from tests.ui.live import Server, free_port, live_app

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def test_one_port_for_both(tmp_path):
    with live_app(tmp_path / "page", "--api", "--api-key", "secret") as live:
        hosts = Hosts.build(False)
        page, api = build_server(live.app, live.auth, hosts), build_api(live.app, lambda: hosts)

        async def ask():
            transport = httpx.ASGITransport(_Both(page, api))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                refused = await client.get("/v1/models")
                models = await client.get("/v1/models", headers={"Authorization": "Bearer secret"})
                return (
                    refused.status_code,
                    models.json()["object"],
                    (await client.get("/health")).status_code,
                    (await client.get("/login")).status_code,
                )

        from tests.fakes import run

        refused, kind, health, login = run(ask())
    assert (refused, kind, health) == (401, "list", 200) and login < 500


@pytest.mark.parametrize("flag", ["--api", "--nowebui"])
def test_the_program_serves_it(tmp_path, flag):
    port = free_port()
    server = Server(tmp_path, flag, "--api-port", str(port), "--listen-port", str(free_port()))
    url = f"http://127.0.0.1:{port}"
    try:

        def answers():
            try:
                return httpx.get(f"{url}/health", timeout=1).status_code == 200
            except httpx.HTTPError:
                return False

        until(answers, 60)
        assert httpx.get(f"{url}/v1/models", timeout=WAIT).json()["data"] == []
        response = httpx.post(f"{url}/v1/chat/completions", json=HELLO, timeout=WAIT)
        assert response.status_code == 503 and "No model" in response.json()["error"]["message"]
    finally:
        server.process.terminate()
        assert server.process.wait(WAIT) in (0, 130, 143, -15)


def test_it_does_not_listen_to_others_without_a_key(tmp_path):
    server = Server(tmp_path, "--nowebui", "--listen", "--api-port", str(free_port()))
    assert server.process.wait(60) == 1
    assert any("--api-key" in line for line in server.lines)


class Slow(FakeBackend):
    """Reading a prompt takes as long as that of a large model on a slow machine."""

    def encode(self, text, add_bos=False):
        time.sleep(0.5)
        return super().encode(text, add_bos)


def test_the_event_loop_never_stands_still(tmp_path):
    """While prompts are prepared, replies are written and a model is loaded, other requests are answered at once."""
    with served(tmp_path, make=Slow) as api:
        lags, over = [], threading.Event()

        def probe():
            with api.client() as client:
                while not over.is_set():
                    began = time.perf_counter()
                    assert client.get("/health").status_code == 200
                    lags.append(time.perf_counter() - began)

        watcher = threading.Thread(target=probe)
        watcher.start()
        api.engine.go.clear()
        loading = threading.Thread(target=lambda: api.post("/v1/internal/model/load", {"model_name": "other.fake"}))
        writers = [threading.Thread(target=lambda: httpx.post(f"{api.url}/v1/chat/completions", json=HELLO, timeout=WAIT)) for _ in range(4)]
        for thread in writers:
            thread.start()
        for thread in writers:
            thread.join(WAIT)
        loading.start()
        assert api.engine.started.acquire(timeout=WAIT)
        count = len(lags)
        until(lambda: len(lags) > count + 20)
        api.engine.go.set()
        loading.join(WAIT)
        over.set()
        watcher.join(WAIT)
    # What would block the loop blocks it for half a second at least; a busy machine alone does not.
    assert sorted(lags)[len(lags) // 2] < 0.1 and sum(lag > 0.45 for lag in lags) <= 1


@pytest.mark.engine
def test_the_page_and_the_api_say_the_same(real_api):
    """Greedy, the same conversation: one prompt, one text."""
    from modules import chat
    from modules.auth import Identity

    app, who = real_api.app, Identity("anna", "anna-session")
    app.sessions.change(who.session, {"temperature": 0.0, "do_sample": False, "max_new_tokens": 24, "auto_max_new_tokens": False, "seed": 1})
    turn = chat.reply(app, who, None, "Name three colours.")
    for reply in app.replies.running(turn.conversation.id):
        assert reply.finished.wait(60)
    said = app.store.conversation("anna", turn.conversation.id).path()[-1].text
    body = {"messages": [{"role": "user", "content": "Name three colours."}], "max_tokens": 24, "temperature": 0, "do_sample": False, "seed": 1}
    told = real_api.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    assert told == said != ""


def test_keep_alive_comments(tmp_path, monkeypatch):
    from modules.api import running

    monkeypatch.setattr(running, "SILENCE", 0.05)
    with served(tmp_path) as api:
        api.backend.gate = threading.Semaphore(1)
        with api.client() as client, client.stream("POST", "/v1/chat/completions", json={**HELLO, "stream": True}) as response:
            lines = response.iter_lines()
            assert any(line == ": keep-alive" for line in lines)
            api.backend.gate.release(10)
            rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""] or "data: [DONE]" in rest
    assert json.loads(next(line for line in rest if line.startswith("data: {"))[6:])["object"] == "chat.completion.chunk"
