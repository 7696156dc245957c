"""Gradio's own API, driven by gradio_client: what is there, streams, the login, stopping; and that nothing else is there."""

import threading
import time

import pytest

from modules.errors import EngineDied
from modules.ui import gradio_api
from tests.fakes import FakeBackend, until
from tests.ui.live import live_app

ENDPOINTS = {
    "/chat": ["message", "history", "system", "parameters"],
    "/generate": ["prompt", "parameters"],
    "/load_model": ["name", "loader", "options"],
    "/unload_model": [],
    "/list_models": [],
    "/token_count": ["text"],
}
USERS = {"ann": "secret", "bob": "secret2"}


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A server with logins."""
    with live_app(tmp_path_factory.mktemp("gradio"), users=USERS) as made:
        yield made


@pytest.fixture
def ready(live):
    """The same, its model loaded anew and ready to speak."""
    live.app.models.load(live.app.models.choose("model.fake"))
    yield live
    live.let_go()


def client_of(live, user="ann"):
    from gradio_client import Client

    return Client(live.url, auth=(user, USERS[user]) if user else None, verbose=False)


@pytest.fixture(scope="module")
def client(live):
    return client_of(live)


def failing(client, words, *arguments, **options):
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match=words):
        client.predict(*arguments, **options)


def test_these_endpoints_are_there_and_no_others(client):
    found = client.view_api(return_format="dict", print_info=False)
    assert {name: [each["parameter_name"] for each in told["parameters"]] for name, told in found["named_endpoints"].items()} == ENDPOINTS
    assert found["unnamed_endpoints"] == {}
    assert all(told["description"] for told in found["named_endpoints"].values())
    assert [each["type"]["type"] for each in found["named_endpoints"]["/chat"]["returns"]] == ["string"]


def test_handlers_of_the_page_are_private(client):
    others = [each for each in client.config["dependencies"] if f"/{each['api_name']}" not in ENDPOINTS]
    assert others and all(each["api_visibility"] == "private" for each in others)
    with pytest.raises(ValueError, match="Cannot find a function"):
        client.predict("", api_name=f"/{others[0]['api_name']}")


def test_a_reply_is_streamed(ready, client):
    ready.hold("Hello", " world")
    job = client.submit("Hi", api_name="/chat")
    until(lambda: ready.backend.requests)
    ready.say()
    until(lambda: job.outputs() == ["Hello"])
    ready.say()
    assert list(job) == ["Hello", "Hello world"] and job.result() == "Hello world"


def test_it_is_asked_as_by_the_api(ready, client):
    before = [{"role": "user", "content": "One"}, {"role": "assistant", "content": "Two"}]
    client.predict("Three", before, "Be brief.", {"temperature": 0.5, "max_tokens": 7, "stop": ["x"]}, api_name="/chat")
    request = ready.backend.requests[-1]
    prompt = ready.backend.decode(request.prompt)
    assert [prompt.index(text) for text in ("Be brief.", "One", "Two", "Three")] == sorted(
        prompt.index(t) for t in ("Be brief.", "One", "Two", "Three")
    )
    assert (request.sampling.temperature, request.max_new_tokens) == (0.5, 7) and "x" in request.stop
    assert request.client == "user-ann"


def test_thinking_is_left_out_of_a_chat_and_kept_in_a_text(ready, client):
    ready.backend.script = ["<think>hm", "</think>", "Yes"]
    assert client.predict("Hi", api_name="/chat") == "Yes"
    assert client.predict("Hi", api_name="/generate") == "<think>hm</think>Yes"


def test_a_text_is_gone_on_with(ready, client):
    assert client.predict("Once", {"max_tokens": 3}, api_name="/generate") == "Hello world"
    request = ready.backend.requests[-1]
    assert (ready.backend.decode(request.prompt), request.max_new_tokens) == ("Once", 3)


def test_tokens_are_counted(ready, client):
    assert client.predict("Hello", api_name="/token_count") == 5


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"temperature": -1}, "temperature"),
        ({"colour": 1}, "colour"),
        ({"tools": []}, "tools"),
        ({"n": 2}, "n is no part"),
        ({"messages": []}, "messages"),
    ],
)
def test_a_parameter_that_cannot_be_followed_is_told(ready, client, parameters, words):
    failing(client, words, "Hi", None, "", parameters, api_name="/chat")
    assert ready.backend.requests == []


def test_a_history_that_is_none_is_told(ready, client):
    failing(client, "role", "Hi", [{"role": "nobody", "content": "x"}], api_name="/chat")


def test_what_fails_is_told(ready, client):
    ready.backend.error = EngineDied("It died.")
    failing(client, "It died", "Hi", api_name="/chat")
    ready.app.models.unload()
    failing(client, "No model", "Hi", api_name="/generate")
    failing(client, "No model", "Hi", api_name="/token_count")


def test_cancelling_a_job_ends_the_reply(ready, client):
    ready.hold("Hello", " world")
    job = client.submit("Hi", api_name="/chat")
    until(lambda: ready.backend.requests)
    ready.say()
    until(lambda: job.outputs() == ["Hello"])
    job.cancel()
    until(lambda: ready.backend.closed == 1)
    assert ready.backend.requests[0].cancel.cancelled


def test_a_reader_that_goes_away_ends_the_reply(ready, monkeypatch):
    import httpx

    monkeypatch.setattr(gradio_api, "SILENCE", 0.2)
    ready.hold("Hello", " world")
    with httpx.Client(base_url=ready.url, headers={"accept": "application/json"}) as http:
        http.post("/login", data={"username": "ann", "password": "secret"})
        event = http.post("/gradio_api/call/chat", json={"data": ["Hi", None, "", None]}).json()["event_id"]
        with http.stream("GET", f"/gradio_api/call/chat/{event}") as response:
            until(lambda: ready.backend.requests)
            ready.say()
            next(line for line in response.iter_lines() if "Hello" in line)
    until(lambda: ready.backend.closed == 1)
    assert ready.backend.requests[0].cancel.cancelled


def test_long_replies_are_told_at_a_bounded_pace(ready, client):
    ready.backend.script = ["a"] * 2000
    began = time.monotonic()
    texts = list(client.submit("Hi", api_name="/generate"))
    assert texts[-1] == "a" * 2000
    assert len(texts) <= 2 + (time.monotonic() - began) / gradio_api.TELL_SECONDS


def test_models_are_loaded_and_freed(ready, client):
    assert client.predict(api_name="/list_models") == {"models": ["model.fake", "other.fake"], "loaded": "model.fake"}
    assert client.predict("other.fake", "", {"fake-size": 3}, api_name="/load_model")["model_name"] == "other.fake"
    failing(client, "nowhere", "nowhere.fake", api_name="/load_model")
    failing(client, "ctx_size", "other.fake", "", {"ctx_size": 1}, api_name="/load_model")
    failing(client, "model name", "../other.fake", api_name="/load_model")
    assert client.predict(api_name="/unload_model")["model_name"] is None
    assert client.predict(api_name="/list_models")["loaded"] is None


def test_two_people_stream_at_once(ready):
    ready.engine.make = lambda: FakeBackend(features=frozenset({"parallel"}))
    ready.app.models.load(ready.app.models.choose("model.fake"))
    ready.engine.make = FakeBackend
    ready.hold("Hello", " world")
    jobs = [client_of(ready, user).submit("Hi", api_name="/chat") for user in USERS]
    until(lambda: ready.backend.most_at_once == 2)
    ready.backend.gate = threading.Semaphore(10**6)
    assert [job.result() for job in jobs] == ["Hello world"] * 2
    assert {request.client for request in ready.backend.requests} == {"user-ann", "user-bob"}


def test_nothing_is_there_without_the_login(live):
    import httpx
    from gradio_client.exceptions import AuthenticationError

    with pytest.raises(AuthenticationError):
        client_of(live, None)
    for path in ("/gradio_api/call/chat", "/gradio_api/queue/join", "/gradio_api/run/chat"):
        assert httpx.post(live.url + path, json={"data": ["Hi"], "fn_index": 0, "session_hash": "x"}).status_code == 401
    assert httpx.post(live.url + "/gradio_api/call/chat", json={"data": ["Hi"]}, headers={"Origin": "https://evil.example"}).status_code == 403


def test_in_multi_user_mode_the_model_stays(tmp_path):
    with live_app(tmp_path, "--multi-user") as live:
        client = client_of(live, None)
        failing(client, "multi-user", "other.fake", api_name="/load_model")
        failing(client, "multi-user", api_name="/unload_model")
        assert client.predict(api_name="/list_models") == {"models": [], "loaded": "model.fake"}
        assert client.predict("Hi", api_name="/chat") == "Hello world"
        assert len(live.engine.loaded) == 1
