"""Small things that clients of both APIs meet: null, headers, what is not followed, and messages that say what they can do."""

import json
import socket
import threading
from pathlib import Path

import anthropic
import httpx
import pytest

from modules import settings
from modules.api.errors import _FOR_CLIENTS
from modules.api.keys import check_settings
from modules.api.server import ApiServer, build_api
from modules.app import option_groups
from modules.backends.base import Chunk
from modules.errors import SettingsError
from modules.guard import Hosts
from tests.api.conftest import served
from tests.fakes import WAIT, FakeBackend

HELLO = [{"role": "user", "content": "Hello"}]
ROUTES = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": "x"},
    "/v1/responses": {"input": "x"},
    "/v1/messages": {"messages": HELLO, "max_tokens": 9},
}


@pytest.mark.parametrize("path", ROUTES)
def test_null_is_the_same_as_nothing(api, path):
    nulls = ("stream", "echo", "model", "stop", "seed", "n", "continue_", "temperature", "tools", "user", "stream_options")
    with api.client() as client:
        response = client.post(path, json={**ROUTES[path], **dict.fromkeys(nulls)})
    assert response.status_code == 200 and response.json()["model"] == "model.fake", response.text


def test_a_required_field_may_not_be_null(api):
    assert api.post("/v1/completions", {"prompt": None}, 400)["error"]["param"] == "prompt"
    assert api.post("/v1/completions", {"prompt": "x", "stream": True, "stream_options": {"include_usage": 5}}, 400)["error"]["param"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ("{", None, "not JSON"),
        ('{"prompt": {"a": 1}}', "prompt", "list"),
        ('{"prompt": ["a", 1]}', "prompt", "prompt.1"),
        ('{"messages": [{"role": "x", "content": ""}]}', "messages.0.role", "user"),
        ('{"messages": [{"content": ""}]}', "messages.0.role", "required"),
        ('{"messages": [{"role": "user", "content": 5}]}', "messages.0.content", "string"),
        ("[]", None, "dictionary"),
    ],
)
def test_the_field_at_fault_is_named(api, body, param, words):
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    with api.client() as client:
        response = client.post(path, content=body, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param) and words in error["message"], error


def test_a_missing_content_type_is_told(api):
    with api.client() as client:
        response = client.post("/v1/completions", content=b'{"prompt": "x"}')
    assert response.status_code == 400 and "Content-Type: application/json" in response.json()["error"]["message"]


def test_what_goes_before_another_field_is_told(api):
    with api.client() as client:
        ignored = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 3, "max_new_tokens": 5}).headers["X-Ignored"]
        assert ignored == "max_new_tokens is not followed: max_tokens goes before it"
    assert api.backend.requests[-1].max_new_tokens == 3


@pytest.mark.parametrize("seed", [-2, 2**32, 10**40])
def test_a_seed_outside_its_bounds_is_refused(api, seed):
    for path, body in ROUTES.items():
        assert "seed" in json.dumps(api.post(path, {**body, "seed": seed}, 400))
    api.post("/v1/completions", {"prompt": "x", "seed": 2**32 - 1})
    assert api.backend.requests[-1].seed == 2**32 - 1


@pytest.mark.parametrize("path", ["/health", "/v1/health", "/v1/internal/health"])
def test_health_by_head(api, path):
    response = httpx.head(api.url + path, timeout=WAIT)
    assert (response.status_code, response.content) == (200, b"")


def test_anthropics_list_of_models(api):
    client = anthropic.Anthropic(base_url=api.url, api_key="none", max_retries=0, timeout=WAIT, _strict_response_validation=True)
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"model.fake", "other.fake"} and models["model.fake"].type == "model"
    found = api.get("/v1/models/model.fake")
    assert found["created"] == int((api.app.data.models / "model.fake").stat().st_mtime) and found["features"] == []
    assert client.models.retrieve("model.fake").created_at.timestamp() == found["created"]


def test_one_model_is_unloaded_or_all(tmp_path):
    with served(tmp_path, "--max-loaded-models", "2") as api:
        api.app.models.load(api.app.models.choose("other.fake"))
        error = api.post("/v1/internal/model/unload", {"model_name": "nowhere"}, 404)["error"]
        assert "nowhere" in error["message"] and len(api.app.models.loaded()) == 2
        api.post("/v1/internal/model/unload", {"model_name": "model.fake"})
        assert [each.name for each in api.app.models.loaded()] == ["other.fake"]
        api.app.models.load(api.app.models.choose("model.fake"))
        api.post("/v1/internal/model/unload", {})
        assert not api.app.models.loaded()


def test_messages_do_not_speak_of_the_page(api):
    error = api.post("/v1/internal/model/load", {"model_name": "nowhere"}, 404)["error"]
    assert "GET /v1/models" in error["message"] and "tab" not in error["message"]
    error = api.post("/v1/internal/model/load", {"model_name": "/etc/passwd"}, 400)["error"]
    assert "'/etc/passwd' is no model name" in error["message"]
    with api.client() as client:
        client.post("/v1/internal/model/unload")
    for path, body in ROUTES.items():
        message = api.post(path, body, 503)["error"]["message"]
        assert message == "No model is loaded. POST /v1/internal/model/load loads one, and --model when the server starts."


def test_each_text_for_the_page_is_one():
    sources = "".join(path.read_text("utf-8") for path in Path(settings.__file__).parent.rglob("*.py") if path.parent.name != "api")
    assert [page for page, _ in _FOR_CLIENTS if page not in sources] == []


@pytest.mark.parametrize("origin", ["not a url", "page.example", "https://page.example/app", "null", "https://"])
def test_an_origin_that_is_none_is_refused(origin):
    with pytest.raises(SettingsError, match="without a path"):
        check_settings(settings.Settings(api=True, cors_origin=(origin,)))


@pytest.mark.parametrize("origin", ["https://page.example", "http://localhost:3000/", "chrome-extension://abcdef", "http://[::1]:3000"])
def test_an_origin(origin):
    check_settings(settings.Settings(api=True, cors_origin=(origin,)))


@pytest.mark.parametrize("flag", ["--api-key", "--admin-key"])
def test_an_empty_key_is_refused(flag):
    with pytest.raises(SettingsError, match=f"{flag} is empty"):
        settings.load(("--api", flag, ""), (), (), option_groups())


WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"town": {"type": "string"}}}}


def test_a_required_call_that_is_cut_off_is_no_text(tmp_path):
    class Cut(FakeBackend):
        def generate(self, request):
            yield Chunk('[{ "name":', (1,), prompt_tokens=1, completion_tokens=1)
            yield Chunk(finish_reason="length", prompt_tokens=1, completion_tokens=1)

    with served(tmp_path, make=lambda: Cut(features=frozenset({"grammar", "parallel"}))) as api:
        body = {"messages": HELLO, "tools": [{"type": "function", "function": WEATHER}], "tool_choice": "required"}
        choice = api.post("/v1/chat/completions", body)["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("", "length")
        with api.client() as client:
            assert "name" not in client.post("/v1/chat/completions", json={**body, "stream": True}).text
        tool = {"name": "weather", "input_schema": WEATHER["parameters"]}
        answer = api.post("/v1/messages", {"messages": HELLO, "max_tokens": 3, "tools": [tool], "tool_choice": {"type": "any"}})
        assert (answer["content"], answer["stop_reason"]) == ([], "max_tokens")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_server_that_ends_tells_the_clients_of_streams(api, path, caplog):
    api.backend.gate = threading.Semaphore(1)
    listener = socket.create_server(("127.0.0.1", 0))
    server = ApiServer(build_api(api.app, lambda: Hosts.build(False)), listener)
    server.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with httpx.Client(timeout=WAIT) as client, client.stream("POST", url + path, json={**ROUTES[path], "stream": True}) as response:
        lines = response.iter_lines()
        assert any("Hello" in line for line in lines)
        server.stop()
        rest = list(lines)
    assert "shutting down" in [line for line in rest if line.startswith("data: ")][-1]
    assert not [record for record in caplog.records if record.exc_info]
