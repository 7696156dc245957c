"""Requests and the model they need: waiting for it, keeping it, and which one it is."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from modules.api import running
from modules.backends.base import Embeddings
from tests.api.conftest import served
from tests.fakes import WAIT, FakeBackend, until

HELLO = [{"role": "user", "content": "Hello"}]
WAITING = 60
"""More than the threads that routes share."""
BY_PATH = [
    ("/v1/chat/completions", {"messages": HELLO}),
    ("/v1/completions", {"prompt": "x"}),
    ("/v1/messages", {"messages": HELLO, "max_tokens": 9}),
    ("/v1/messages/count_tokens", {"messages": HELLO}),
    ("/v1/responses", {"input": "x"}),
    ("/v1/internal/chat-prompt", {"messages": HELLO}),
    ("/v1/internal/encode", {"text": "x"}),
    ("/v1/internal/decode", {"tokens": [65]}),
    ("/v1/internal/token-count", {"text": "x"}),
]


def idle(models):
    """Unload the model as one that nobody used."""
    models._current.last_use -= 3600
    models.unload_if_idle()
    assert not models.loaded()


def test_many_requests_that_wait_for_a_load_leave_the_other_routes_alone(tmp_path):
    with served(tmp_path, "--load-on-request") as api, ThreadPoolExecutor(WAITING) as pool:
        api.engine.go.clear()
        asked = [pool.submit(api.post, "/v1/chat/completions", {"messages": HELLO, "model": "other.fake"}) for _ in range(WAITING)]
        assert api.engine.started.acquire(timeout=WAIT)  # the first model's load
        assert api.engine.started.acquire(timeout=WAIT)
        for _ in range(3):  # while they come
            assert api.get("/v1/internal/model/info")["state"] == "loading"
            assert api.get("/v1/models")["data"]
            assert api.post("/v1/internal/stop-generation", {})["status"] == "ok"
        api.engine.go.set()
        assert {each.result(WAIT)["model"] for each in asked} == {"other.fake"}


def test_who_comes_when_all_places_to_wait_are_taken_is_told_to_come_again(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "MAX_THREADS", 2)
    with served(tmp_path, "--load-on-request") as api, ThreadPoolExecutor(2) as pool, api.client() as client:
        api.engine.go.clear()
        body = {"messages": HELLO, "model": "other.fake"}
        asked = [pool.submit(api.post, "/v1/chat/completions", body) for _ in range(2)]
        until(lambda: sum(map(_awaits, threading.enumerate())) == 2)
        refused = client.post("/v1/chat/completions", json=body)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        api.engine.go.set()
        assert {each.result(WAIT)["model"] for each in asked} == {"other.fake"}


def test_a_client_that_leaves_while_its_model_is_awaited_frees_its_thread(tmp_path):
    with served(tmp_path, "--load-on-request") as api:
        api.engine.go.clear()
        leaving = []
        for name in ("other.fake", "other.fake", "other.fake"):
            leaving.append(threading.Thread(target=_leave, args=(api.url, name), daemon=True))
            leaving[-1].start()
        for each in leaving:
            each.join(WAIT)
        until(lambda: sum(map(_awaits, threading.enumerate())) <= 1)  # the one that loads
        api.engine.go.set()


def _leave(url: str, name: str) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/chat/completions", json={"messages": HELLO, "model": name}, timeout=0.5)


def _awaits(thread: threading.Thread) -> bool:
    """Whether it waits for a model, or loads it."""
    frame = sys._current_frames().get(thread.ident)
    while frame:
        if frame.f_code.co_name == "_enter":
            return True
        frame = frame.f_back
    return False


@pytest.mark.parametrize(("path", "body"), BY_PATH)
def test_two_that_ask_while_an_idle_model_comes_back_are_both_answered(tmp_path, path, body):
    with served(tmp_path, "--idle-timeout", "1") as api, ThreadPoolExecutor(2) as pool:
        assert api.engine.started.acquire(timeout=WAIT)
        idle(api.app.models)
        api.engine.go.clear()
        first = pool.submit(api.post, path, body)
        assert api.engine.started.acquire(timeout=WAIT)
        second = pool.submit(api.post, path, body)
        threading.Timer(0.2, api.engine.go.set).start()  # the second one has come by then, or else waits for nothing
        assert first.result(WAIT) and second.result(WAIT)
        assert len(api.engine.loaded) == 2


def test_who_waits_for_a_load_is_told_that_the_server_ends(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        with served(tmp_path, "--load-on-request") as api:
            api.engine.go.clear()
            body = {"messages": HELLO, "model": "other.fake"}
            asked = [pool.submit(api.post, "/v1/chat/completions", body, 503) for _ in range(2)]
            until(lambda: sum(map(_awaits, threading.enumerate())) == 2)
        assert all("shutting down" in each.result(WAIT)["error"]["message"] for each in asked)


class Embedding(FakeBackend):
    """Gives vectors when it is let."""

    def __init__(self):
        super().__init__(features=frozenset({"embeddings"}))
        self.begun, self.go = threading.Event(), threading.Event()

    def embed(self, inputs, cancel):
        self.begun.set()
        assert self.go.wait(WAIT)
        return Embeddings(((1.0, 2.0),) * len(inputs), 3)


@pytest.mark.parametrize(("path", "body"), [("/v1/embeddings", {"input": "x"}), ("/v1/rerank", {"query": "x", "documents": ["y"]})])
def test_a_model_that_makes_vectors_is_kept_and_named(tmp_path, path, body):
    with served(tmp_path, "--idle-timeout", "1", make=Embedding) as api, ThreadPoolExecutor(1) as pool:
        backend = api.backend
        answer = pool.submit(api.post, path, body)
        assert backend.begun.wait(WAIT)
        api.app.models._current.last_use -= 3600
        api.app.models.unload_if_idle()
        api.app.models.start_loading(api.app.models.choose("other.fake"))
        until(lambda: "Waiting for running replies" in api.app.models.status().text)
        assert not backend.unloaded
        backend.go.set()
        assert answer.result(WAIT)["model"] == "model.fake"
        until(lambda: backend.unloaded)


class Numbered(FakeBackend):
    """Each has token ids of its own. `meanwhile` happens while the next prompt is encoded."""

    made = 0

    def __init__(self):
        super().__init__(features=frozenset({"embeddings"}))
        Numbered.made += 1
        self.number, self.meanwhile = Numbered.made, None

    def encode(self, text, add_bos=False):
        if self.meanwhile:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        return [1000 * self.number + ord(c) for c in text]

    def embed(self, inputs, cancel):
        return Embeddings(((1.0, 2.0),) * len(inputs), 3)


def test_a_model_that_replaces_the_one_a_prompt_was_made_for_does_not_get_it(tmp_path):
    with served(tmp_path, make=Numbered) as api:
        models = api.app.models

        def replaced():
            models.unload()
            models.load(models.choose("other.fake"))

        api.backend.meanwhile = replaced
        assert "Send again" in api.post("/v1/completions", {"prompt": "abc"}, 503)["error"]["message"]
        assert not [request for backend in api.engine.loaded for request in backend.requests]
        assert api.post("/v1/completions", {"prompt": "abc"})["model"] == "other.fake"


def test_every_route_follows_the_model_that_is_named_or_says_so(tmp_path):
    with served(tmp_path, "--max-loaded-models", "2", make=Numbered) as api, api.client() as client:
        api.app.models.load(api.app.models.choose("other.fake"))
        for number, backend in enumerate(api.engine.loaded):
            backend.chat_template = f"{number} {{{{ messages[0].content }}}}"
        asked = {"query": "x", "documents": ["y"]}
        assert api.post("/v1/internal/chat-prompt", {"messages": HELLO, "model": "model.fake"})["prompt"] == "0 Hello"
        assert api.post("/v1/internal/chat-prompt", {"messages": HELLO})["prompt"] == "1 Hello"
        assert api.post("/v1/rerank", {**asked, "model": "model.fake"})["model"] == "model.fake"
        for path, body in [*BY_PATH[:6], ("/v1/embeddings", {"input": "x"}), ("/v1/rerank", asked)]:
            told = client.post(path, json={**body, "model": "absent"}).headers["x-ignored"]
            assert "'absent' is not loaded; answered by 'other.fake'" in told, path


def test_more_replies_than_could_ever_wait_are_refused_at_once(api):
    error = api.post("/v1/completions", {"prompt": ["x"] * 16, "n": 5}, 400)["error"]
    assert "At most 64 replies" in error["message"] and "are 80" in error["message"]
    assert len(api.post("/v1/completions", {"prompt": ["x"] * 16, "n": 4})["choices"]) == 64
