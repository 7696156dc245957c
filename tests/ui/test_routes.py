"""The page's routes over a real server: what each answers, who may ask, and what bad input gets."""

import json
import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from modules.backends.base import EngineStats
from modules.errors import DataError
from modules.ui import serve
from tests.fakes import until
from tests.ui.live import Browser, live_app


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One server for the whole file: each test is another browser in it."""
    with live_app(tmp_path_factory.mktemp("routes") / "user_data") as live:
        (live.app.data.root.parent / "outside.fake").touch()
        yield live


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory):
    with live_app(tmp_path_factory.mktemp("multi"), "--multi-user") as live:
        yield live


@pytest.fixture
def live(server):
    """The server with a model that says its two words and never waits."""
    if server.app.models.status().state != "ready":
        server.app.models.load(server.app.models.choose("model.fake"))
    server.backend.script = ["Hello", " world"]
    yield server
    server.let_go()


@pytest.fixture
def new_browser(live):
    made = []

    def make():
        made.append(live.browser())
        return made[-1]

    yield make
    for browser in made:
        browser.close()


@pytest.fixture
def me(new_browser):
    return new_browser()


@pytest.fixture
def other(new_browser):
    return new_browser()


# --- conversations ------------------------------------------------------------------------------------------------------------------


def test_a_turn_and_what_is_told_of_it(me, live):
    answer = me.ask("Hi **there**")
    question, reply = answer["messages"]
    id = answer["conversation"]["id"]
    assert answer["conversation"]["title"] == "Hi **there**"
    assert (question["role"], question["state"], question["text"]) == ("user", "done", "Hi **there**")
    assert "<strong>" not in question["blocks"][0]  # as typed
    assert (reply["role"], reply["versions"]) == ("assistant", [reply["id"]])
    done = me.ended(id)
    assert (done["id"], done["text"], done["state"], done["error"]) == (reply["id"], "Hello world", "done", None)
    assert done["blocks"] == ["<p>Hello world</p>\n"] or "Hello world" in done["blocks"][0]
    assert done["stats"]["tokens"] == 2 and done["stats"]["finish_reason"] == "stop" and done["stats"]["reused_tokens"] == 3
    assert done["stats"]["context_used"] == done["stats"]["prompt_tokens"] + 2 and done["stats"]["context_length"] == 2048
    assert done["model"] == "model.fake" and isinstance(done["stats"]["seed"], int)


def test_the_list_its_search_and_its_pages(me):
    for number in range(3):
        me.ended(me.ask(f"Question {number} about <b>apples</b>")["conversation"]["id"])
    listed = me.json("GET", "/chat/conversations")
    assert [item["title"] for item in listed["items"]] == [f"Question {n} about <b>apples</b>" for n in (2, 1, 0)]
    assert not any(item["running"] for item in listed["items"]) and listed["next"] is None
    found = me.json("GET", "/chat/conversations?query=question+1+app")["items"]
    assert [item["title"] for item in found] == ["Question 1 about <b>apples</b>"]
    assert any(match for _, match in found[0]["snippet"]) and "<b>" in "".join(text for text, _ in found[0]["snippet"])
    assert me.json("GET", "/chat/conversations?query=pears")["items"] == []


def test_many_conversations_come_in_pages(me, live):
    owner = live.app.store.conversations  # the list as the store gives it
    assert owner is not None
    ids = []
    for number in range(52):
        ids.append(me.ask(f"n{number}")["conversation"]["id"])
        me.ended(ids[-1])  # its end is a change too, and the list is by the last change
    first = me.json("GET", "/chat/conversations")
    rest = me.json("GET", f"/chat/conversations?before={first['next']}")
    assert [item["id"] for item in first["items"] + rest["items"]] == ids[::-1] and rest["next"] is None


def test_a_long_conversation_comes_from_its_newest_end(me):
    id = me.ask("first")["conversation"]["id"]
    for number in range(25):
        me.ended(id)
        me.ask(f"n{number}", id)
    me.ended(id)
    newest = me.json("GET", f"/chat/conversations/{id}")
    assert len(newest["messages"]) == 40 and newest["earlier"]
    above = me.json("GET", f"/chat/conversations/{id}?before={newest['messages'][0]['id']}")
    assert len(above["messages"]) == 12 and not above["earlier"] and above["messages"][0]["text"] == "first"


def test_rename_and_delete(me):
    id = me.ask("Hi")["conversation"]["id"]
    assert me.json("PATCH", f"/chat/conversations/{id}", {"title": "  New\n title\u202e "}) == {}
    assert me.json("GET", f"/chat/conversations/{id}")["title"] == "New title"
    me.ended(id)
    undo = me.json("DELETE", f"/chat/conversations/{id}")["undo"]
    me.json("GET", f"/chat/conversations/{id}", status=404)
    assert me.json("GET", "/chat/trash")["items"][0]["undo"] == undo
    assert me.json("POST", "/chat/undo", {"undo": [undo]}) == {"conversations": [id]}
    assert me.json("GET", f"/chat/conversations/{id}")["title"] == "New title" and me.json("GET", "/chat/trash")["items"] == []


def test_versions_edit_select_continue_and_stop(me, live):
    turn = me.ask("Hi")
    id, first = turn["conversation"]["id"], turn["messages"][1]["id"]
    me.ended(id)
    second = me.json("POST", "/chat/regenerate", {"conversation": id, "message": first, "revision": me.revision}, 202)["messages"]
    assert [m["role"] for m in second] == ["assistant"] and second[0]["versions"] == [first, second[0]["id"]]
    me.ended(id)
    shown = me.json("POST", "/chat/select", {"conversation": id, "message": first})
    assert [m["id"] for m in shown["messages"]] == [turn["messages"][0]["id"], first] and shown["title"] == "Hi"
    grown = me.json("POST", "/chat/continue", {"conversation": id, "message": first, "revision": me.revision}, 202)["messages"]
    assert grown[0]["id"] == first and me.ended(id)["text"] == "Hello worldHello world"
    edited = me.json("POST", "/chat/edit", {"conversation": id, "message": first, "text": "Mine", "revision": me.revision}, 202)["messages"]
    assert [m["text"] for m in edited] == ["Mine"] and len(edited[0]["versions"]) == 3
    asked = me.json("POST", "/chat/edit", {"conversation": id, "message": turn["messages"][0]["id"], "text": "Ho", "revision": me.revision}, 202)
    assert [m["role"] for m in asked["messages"]] == ["user", "assistant"] and len(asked["messages"][0]["versions"]) == 2
    me.ended(id)
    live.hold("a", "b", "c")
    running = me.ask("More", id)["messages"][1]["id"]
    live.say()
    until(lambda: me.messages(id)[-1]["text"] == "a")
    assert me.json("GET", "/chat/conversations")["items"][0]["running"]
    me.json("PATCH", f"/chat/conversations/{id}", {"title": "while it runs"})
    busy = me.ask("Too early", id, 503)
    assert "Wait for its end" in busy["error"]["message"]
    assert me.json("POST", "/chat/stop", {"message": running}) == {}
    stopped = me.ended(id)
    assert (stopped["state"], stopped["text"], stopped["stats"]["finish_reason"]) == ("stopped", "a", "cancelled")
    assert me.json("POST", "/chat/stop", {"message": running}) == {}  # it had ended just before


def test_a_draft_is_computed_ahead_and_asked_for_no_more_where_it_cannot_be(me, live):
    id = me.ask("Hi")["conversation"]["id"]
    me.ended(id)
    draft = {"conversation": id, "text": "Tell me of it", "revision": me.revision}
    assert me.json("POST", "/chat/ahead", draft, 202) == {"ahead": False}
    backend = live.backend
    backend.features = frozenset({"prefill"})
    try:
        backend.hold_prefills()
        assert me.json("POST", "/chat/ahead", draft, 202) == {"ahead": True}
        until(lambda: backend.prefills)
        assert backend.decode(backend.prefills[0].prompt).endswith("Hello world<|im_end|>\n<|im_start|>user\nTell me of")
        assert me.json("POST", "/chat/ahead", draft | {"revision": 7, "text": "Another draft"}, 202) == {"ahead": True}
        assert not backend.prefills[0].cancel.cancelled, "an old page changes nothing"
        assert me.ended(me.ask("Tell me of it", id)["conversation"]["id"])["text"] == "Hello world"
        assert backend.prefills[0].cancel.cancelled and len(backend.prefills) == 1
        me.json("POST", "/models/unload", {}, 202)
        assert me.json("POST", "/chat/ahead", draft, 202) == {"ahead": True}
        assert me.json("GET", "/models")["status"]["state"] == "none"
        until(lambda: live.app.ahead.busy == 0)
    finally:
        backend.hold_prefills(False)
    assert backend.prefilled == []


# --- owners -------------------------------------------------------------------------------------------------------------------------


def test_nothing_of_another_owner_exists(me, other, live):
    live.hold("a", "b", "c")
    turn = me.ask("Mine alone")
    id, question, reply = turn["conversation"]["id"], *(m["id"] for m in turn["messages"])
    live.say()
    until(lambda: me.messages(id)[-1]["text"] == "a")
    assert other.json("GET", "/chat/conversations")["items"] == other.json("GET", "/chat/conversations?query=mine")["items"] == []
    where, what = {"conversation": id, "revision": me.revision}, {"message": reply}
    attempts = (
        ("GET", f"/chat/conversations/{id}", None),
        ("GET", f"/chat/conversations/{id}?before={reply}", None),
        ("PATCH", f"/chat/conversations/{id}", {"title": "Stolen"}),
        ("DELETE", f"/chat/conversations/{id}", None),
        ("POST", "/chat/messages", where | {"text": "Hi"}),
        ("POST", "/chat/ahead", where | {"text": "Hi"}),
        ("POST", "/chat/regenerate", where | what),
        ("POST", "/chat/continue", where | what),
        ("POST", "/chat/edit", where | what | {"text": "Changed"}),
        ("POST", "/chat/edit", where | {"message": question, "text": "Changed"}),
        ("POST", "/chat/select", {"conversation": id} | what),
        ("POST", "/chat/stop", what),
    )
    for method, path, body in attempts:
        stolen = other.json(method, path, body, 404)
        absent = other.json(method, path.replace(id, "0" * 32), json.loads(json.dumps(body).replace(id, "0" * 32).replace(reply, "1" * 32)), 404)
        assert stolen["error"]["code"] == absent["error"]["code"] == "NotFound"
        assert "Mine" not in json.dumps(stolen)
    live.say(2)
    done = me.ended(id)
    assert (done["state"], done["text"]) == ("done", "abc")  # the stop of the other did nothing
    assert me.json("GET", f"/chat/conversations/{id}")["title"] == "Mine alone"


def test_a_message_of_another_conversation_is_not_found_in_this_one(me):
    one, two = (me.ask(text) for text in ("one", "two"))
    me.ended(one["conversation"]["id"])
    me.ended(two["conversation"]["id"])
    for path in ("regenerate", "continue", "select", "edit"):
        body = {"conversation": one["conversation"]["id"], "message": two["messages"][1]["id"], "revision": me.revision, "text": "x"}
        me.json("POST", f"/chat/{path}", body, 404)


def test_a_browser_without_cookie_is_told_to_reload(live):
    with Browser(live.url) as stranger:
        for method, path in (("GET", "/chat/conversations"), ("GET", "/models"), ("GET", "/chat/session"), ("POST", "/models/unload")):
            assert stranger.json(method, path, {}, 401)["error"]["code"] == "NotLoggedIn"


# --- who may write ------------------------------------------------------------------------------------------------------------------

WRITING = (
    ("POST", "/chat/messages"),
    ("POST", "/chat/ahead"),
    ("POST", "/chat/regenerate"),
    ("POST", "/chat/continue"),
    ("POST", "/chat/edit"),
    ("POST", "/chat/insert"),
    ("POST", "/chat/impersonate"),
    ("POST", "/chat/resume"),
    ("POST", "/chat/repeat"),
    ("POST", "/chat/alternatives"),
    ("POST", "/chat/select"),
    ("POST", "/chat/choose"),
    ("POST", "/chat/pin"),
    ("POST", "/chat/remove"),
    ("POST", "/chat/branch"),
    ("POST", "/chat/arrange"),
    ("POST", "/chat/delete"),
    ("POST", "/chat/undo"),
    ("PATCH", "/chat/summary"),
    ("PUT", "/chat/draft"),
    ("POST", "/chat/export"),
    ("POST", "/chat/import"),
    ("POST", "/chat/preset"),
    ("POST", "/chat/character"),
    ("POST", "/chat/user"),
    ("POST", "/chat/stop"),
    ("PATCH", "/chat/session"),
    ("POST", "/chat/session/save"),
    ("PATCH", "/chat/conversations/x"),
    ("DELETE", "/chat/conversations/x"),
    ("POST", "/models/load"),
    ("POST", "/models/unload"),
    ("POST", "/models/cancel"),
)
FORMS = ({"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}, {"Content-Type": "application/json", "X-TGW": "0"})


@pytest.mark.parametrize(("method", "path"), WRITING)
def test_what_a_foreign_form_can_send_changes_nothing(method, path, me, live):
    before = me.revision
    body = '{"conversation":null,"text":"Hi","revision":0,"message":"x","title":"x","name":"other.fake","values":{}}'
    for headers in FORMS:
        response = me.request(method, path, content=body, headers=headers)
        assert response.status_code in (400, 403), response.text
        assert set(response.json()["error"]) == {"code", "message"}
    assert live.app.models.status().name == "model.fake" and me.revision == before
    assert me.json("GET", "/chat/conversations")["items"] == []


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}]
)
def test_foreign_pages_and_names_are_refused_with_a_cookie_too(headers, me):
    response = me.post("/chat/messages", json={"conversation": None, "text": "Hi", "revision": me.revision}, headers=headers)
    assert response.status_code == 403 and response.json()["error"]["code"] == "AccessDenied"
    if "Origin" not in headers:
        assert me.get("/chat/conversations", headers=headers).status_code == 403


# --- parameters ---------------------------------------------------------------------------------------------------------------------


def test_parameters_are_each_browsers_own_and_carry_a_revision(me, other, live):
    begun = me.json("GET", "/chat/session")
    old = begun["revision"]
    assert begun["values"]["temperature"] == other.json("GET", "/chat/session")["values"]["temperature"]
    told = me.json("PATCH", "/chat/session", {"temperature": 0.25, "custom_system_message": "Be brief."})
    assert told == {"revision": me.revision} and me.revision != old
    assert me.json("GET", "/chat/session")["values"]["temperature"] == 0.25
    assert other.json("GET", "/chat/session")["revision"] == old
    stale = me.json("POST", "/chat/messages", {"conversation": None, "text": "Hi", "revision": old}, 409)
    assert stale["error"]["code"] == "StaleRevision" and me.json("GET", "/chat/conversations")["items"] == []
    me.ended(me.ask("Hi")["conversation"]["id"])
    assert live.backend.requests[-1].sampling.temperature == 0.25
    assert live.backend.decode(live.backend.requests[-1].prompt).startswith("<|im_start|>system\nBe brief.") or "Be brief." in live.backend.decode(
        live.backend.requests[-1].prompt
    )


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1},
        {"temperature": "hot"},
        {"temperature": None},
        {"temperature": True},
        {"temperature": {}},
        {"temperature": 1e999},
        {"temperature": 10**400},
        {"temperature": [1]},
        {"top_k": 1.5},
        {"top_k": 10**30},
        {"top_p": 5},
        {"seed": "x"},
        {"custom_system_message": 5},
        {"custom_system_message": ["a"]},
        {"reasoning_effort": "very"},
        {"custom_stopping_strings": {"a": 1}},
        {"temprature": 1},
        {"listen": True},
        {"": 1},
        {"\ud800": 1},
        {"__class__": 1},
        {"top_p": 5, "temperature": 0.5},
    ],
)
def test_a_parameter_out_of_range_changes_nothing(values, me):
    before = me.json("GET", "/chat/session")
    response = me.patch("/chat/session", content=json.dumps(values), headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422) and response.json()["error"]["code"] in ("SettingsError", "InvalidRequest")
    name = next(iter(values))
    assert name.isalpha() is False or name in response.text
    assert me.json("GET", "/chat/session") == before


def test_the_defaults_are_saved_and_unknown_keys_stay(new_browser, live, monkeypatch):
    path, me = live.app.data.settings, new_browser()
    path.write_text("my-extension-key: 5\nfuture_key: [1, 2]\nlisten_port: 7999\ntop_k: 3\n")
    me.json("PATCH", "/chat/session", {"temperature": 0.5})
    assert me.json("POST", "/chat/session/save", {}) == {}
    stored = yaml.safe_load(path.read_text())
    assert stored["my-extension-key"] == 5 and stored["future_key"] == [1, 2] and stored["listen_port"] == 7999
    assert stored["temperature"] == 0.5 and "top_k" not in stored  # this browser has the default, so saving says so
    assert new_browser().json("GET", "/chat/session") == me.json("GET", "/chat/session")
    me.json("PATCH", "/chat/session", {"temperature": 1.0})
    me.json("POST", "/chat/session/save", {})
    assert "temperature" not in yaml.safe_load(path.read_text())


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00", b"- a list\n"])
def test_a_settings_file_that_is_not_one_is_not_overwritten(content, me, live):
    path = live.app.data.settings
    path.write_bytes(content)
    try:
        error = me.json("POST", "/chat/session/save", {}, 400)["error"]
        assert error["code"] == "SettingsError" and "settings.yaml" in error["message"] and path.read_bytes() == content
    finally:
        path.unlink()


def test_a_full_disk_is_told_when_saving_the_defaults(me, live, monkeypatch):
    def full(*_, **__):
        raise DataError("Cannot write settings.yaml: No space left on device. Free some space.")

    monkeypatch.setattr("modules.ui.routes.write_atomically", full)
    assert "Free some space" in me.json("POST", "/chat/session/save", {}, 500)["error"]["message"]


# --- models -------------------------------------------------------------------------------------------------------------------------


def test_models_are_listed_loaded_and_unloaded(me, live):
    found = me.json("GET", "/models")
    assert found["models"] == ["model.fake", "other.fake"]
    assert (found["status"]["state"], found["status"]["name"], found["status"]["memory"]) == ("ready", "model.fake", 123)
    assert me.json("POST", "/models/load", {"name": "other.fake", "options": {"fake_size": 7}}, 202)["status"]["state"] in ("loading", "ready")
    until(lambda: me.json("GET", "/models")["status"]["name"] == "other.fake" and me.json("GET", "/models")["status"]["state"] == "ready")
    assert me.json("POST", "/models/unload", {}, 202)["status"]["state"] == "none"
    refused = me.ask("Hi", None, 409)
    assert refused["error"]["code"] == "NoModel" and "Model tab" in refused["error"]["message"]
    assert me.json("GET", "/chat/conversations")["items"] == []


def test_a_load_is_cancelled_and_a_second_one_waits(me, live):
    live.engine.go.clear()
    try:
        me.json("POST", "/models/load", {"name": "other.fake"}, 202)
        assert live.engine.started.acquire(timeout=20)
        busy = me.json("POST", "/models/load", {"name": "model.fake"}, 503)
        assert "Another model is being loaded" in busy["error"]["message"]
        loading = me.ask("Hi", None, 409)["error"]
        assert loading["code"] == "NoModel" and "still loading" in loading["message"]
        me.json("POST", "/models/cancel", {}, 202)
        until(lambda: me.json("GET", "/models")["status"]["state"] != "loading")
    finally:
        live.engine.go.set()


@pytest.mark.parametrize(
    "body",
    [
        {"name": "gone.fake"},
        {"name": ""},
        {"name": "."},
        {"name": ".."},
        {"name": "../outside.fake"},
        {"name": "../../etc/passwd"},
        {"name": "/etc/passwd"},
        {"name": "models/../model.fake"},
        {"name": "..\\outside.fake"},
        {"name": "C:\\outside.fake"},
        {"name": "\\\\host\\share\\x.fake"},
        {"name": "．．/outside.fake"},
        {"name": "model.fake\0"},
        {"name": "\ud800.fake"},
        {"name": "x" * 5000},
        {"name": "a/" * 3000},
        {"name": "~/x.fake"},
        {"name": "model.fake", "loader": "gone"},
        {"name": "model.fake", "loader": "../x"},
        {"name": "model.fake", "loader": "\ud800" * 100},
        {"name": "model.fake", "options": {"unknown": 1}},
        {"name": "model.fake", "options": {"fake_size": 11}},
        {"name": "model.fake", "options": {"fake_size": "x"}},
        {"name": "model.fake", "options": {"fake_size": None}},
        {"name": "model.fake", "options": {"fake_size": [[]] * 100}},
        {"name": "model.fake", "options": {"trust_remote_code": True}},
        {"name": "model.fake", "options": []},
        {"name": 5},
        {"name": None},
        {"name": ["model.fake"]},
        {},
    ],
)
def test_no_name_loader_or_option_is_trusted(body, me, live):
    response = me.post("/models/load", content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert response.status_code in (400, 404, 422) and len(error["message"]) < 1000, response.text
    assert live.app.models.status().state == "ready" and live.app.models.status().name == "model.fake"


def test_a_link_out_of_the_model_folder_is_not_followed(me, live, tmp_path):
    secret = tmp_path / "secret.fake"
    secret.touch()
    link = live.app.data.models / "link.fake"
    link.symlink_to(secret)
    try:
        assert me.json("POST", "/models/load", {"name": "link.fake"}, 400)["error"]["code"] == "NameError"
    finally:
        link.unlink()


def test_in_multi_user_mode_nobody_chooses_the_model_or_the_defaults(shared_server):
    with Browser(shared_server.url, shared_server.app.data.root) as me:
        assert me.json("GET", "/models")["models"] == []
        assert me.json("GET", "/models")["status"]["state"] == "ready"
        for path, body in (("load", {"name": "other.fake"}), ("unload", {}), ("cancel", {})):
            assert me.json("POST", f"/models/{path}", body, 403)["error"]["code"] == "AccessDenied"
        me.json("PATCH", "/chat/session", {"temperature": 0.5})
        assert me.json("POST", "/chat/session/save", {}, 403)["error"]["code"] == "AccessDenied"
        assert not shared_server.app.data.settings.exists()
        assert me.ended(me.ask("Hi")["conversation"]["id"])["text"] == "Hello world"


# --- bad bodies ---------------------------------------------------------------------------------------------------------------------

BODIES = (
    b"",
    b"null",
    b"[]",
    b"5",
    b'"text"',
    b"true",
    b"{",
    b'{"text": ',
    b"\xff\xfe",
    b'{"text": "\xff"}',
    b"\x00",
    b'{"a": NaN, "revision": Infinity}',
    b'{"text": 5, "revision": "x", "message": {}, "conversation": 7, "title": [], "name": {}}',
    b'{"text": null, "revision": null, "message": null, "conversation": null, "title": null, "name": null}',
    b'{"text": {"a": 1}, "revision": 1e400}',
    b'{"revision": ' + b"9" * 6000 + b"}",
    b"[" * 100_000,
    b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    b'{"' + b"k" * 100_000 + b'": 1}',
    b'{"\\ud800": "\\udfff"}',
)


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_a_bad_body_is_an_error_in_our_form_and_changes_nothing(body, me, live):
    before = me.revision
    for method, path in WRITING:
        if path in ("/models/unload", "/models/cancel", "/chat/session/save") or method == "DELETE":
            continue  # they read no body
        response = me.request(method, path, content=body, headers={"Content-Type": "application/json"})
        assert 400 <= response.status_code < 500, (path, response.status_code, response.text)
        error = response.json()["error"]
        assert set(error) == {"code", "message"} and 0 < len(error["message"]) < 1000
    assert me.json("GET", "/chat/conversations")["items"] == [] and me.revision == before


@pytest.mark.parametrize("query", ["before=x", "before=-1", "before=" + "9" * 50, "before=%00", "query=%00&before=%ff"])
def test_a_bad_cursor_is_not_found(query, me):
    response = me.get(f"/chat/conversations?{query}")
    assert response.status_code == 404 and response.json()["error"]["code"] == "NotFound"


@pytest.mark.parametrize("id", ["%00", "..%2f..%2fetc", "%ff", "x" * 5000, "'; DROP TABLE messages; --", "\u202e"])
def test_a_bad_id_is_not_found(id, me):
    assert me.get(f"/chat/conversations/{id}").status_code == 404


def test_any_search_is_answered(me):
    me.ended(me.ask("needle")["conversation"]["id"])
    for query in ('"', "*", "a OR b", "NEAR(a b)", "needle*", "-x", "%", "x" * 10_000, "\0", "text : x", "(", "\ud7ff"):
        assert me.get("/chat/conversations", params={"query": query}).status_code == 200


@pytest.mark.parametrize("text", ["", " \n\t ", "\u3000"])
def test_an_empty_message_is_refused(text, me):
    assert me.ask(text, None, 422)["error"]["code"] == "PromptError"
    assert me.json("GET", "/chat/conversations")["items"] == []


def test_one_megabyte_is_refused_with_the_fix_and_nothing_is_saved(me):
    error = me.ask("word " * 200_000, None, 413)["error"]
    assert error["code"] == "PromptTooLong" and "horten" in error["message"]
    assert me.json("GET", "/chat/conversations")["items"] == []


def test_three_megabytes_are_refused_before_they_are_looked_at(me, live):
    asked = len(live.backend.requests)
    assert "2,000,000" in me.ask("x" * 3_000_000, None, 413)["error"]["message"]
    assert len(live.backend.requests) == asked


@pytest.mark.parametrize("path", ["/chat/messages", "/gradio_api/run/predict", "/chat/session"])
@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "in pieces"])
def test_a_body_without_end_is_not_read(path, chunked, me, monkeypatch):
    monkeypatch.setattr(serve, "MAX_BODY_BYTES", 2**20)
    pieces = (b"x" * 65_536 for _ in range(64))
    body = pieces if chunked else b"x" * 2**22
    response = me.request("PATCH" if "session" in path else "POST", path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    if path.startswith("/chat"):
        assert "1 MB" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "text", ["a\0b\x01\x1b[31m", "\x7fELF\x02\x01\x01\0\0\0" * 50, "\ufffe\uffff", "\u202eabc", "e\u0301" * 20, "\U0001f468\u200d\U0001f469"]
)
def test_binary_in_a_message_is_a_message(text, me):
    turn = me.ask(text)
    assert turn["messages"][0]["text"] == text
    id = turn["conversation"]["id"]
    assert me.ended(id)["state"] == "done"
    assert me.messages(id)[0]["text"] == text and "\0" not in me.messages(id)[0]["blocks"][0]


def test_a_lone_surrogate_is_refused_or_replaced(me):
    body = b'{"text": "half \\ud83d emoji", "revision": %d}' % me.revision
    response = me.post("/chat/messages", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (202, 400) and (response.status_code == 202 or response.json()["error"]["message"])
    assert me.json("GET", "/chat/conversations") is not None


def test_a_mistake_of_ours_is_an_error_in_the_same_form(me, live, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(type(live.app.store), "conversations", broken)
    error = me.json("GET", "/chat/conversations", status=500)["error"]
    assert error["code"] == "InternalError" and "secret" not in error["message"] and "terminal" in error["message"]


# --- what is not there --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json", "/gradio_api/docs", "/monitoring/summary", "/gradio_api/monitoring"])
def test_no_description_of_the_routes_is_served(path, me):
    response = me.get(path)
    assert response.status_code in (403, 404) or "swagger" not in response.text.lower()
    if path == "/openapi.json":
        assert response.status_code == 404


@pytest.mark.parametrize("route", ["/gradio_api/file=", "/file=", "/gradio_api/file/", "/gradio_api/proxy=file://"])
def test_gradios_file_route_gives_nothing_of_ours(route, me, live):
    data = live.app.data
    data.settings.write_text("gradio_auth: admin:secret\n")
    try:
        root = Path(__file__).resolve().parents[2]
        for path in (data.database, data.sessions, data.settings, data.models / "model.fake", data.lock, root / "server.py", Path("/etc/passwd")):
            for spelling in (str(path), f"{data.cache}/gradio/../../{path.name}", str(path).lstrip("/")):
                response = me.get(f"{route}{spelling}")
                assert response.status_code in (400, 403, 404, 405), (spelling, response.status_code)
    finally:
        data.settings.unlink()


def test_assets_are_served_by_name_only(me):
    found = me.get("/assets/0123/chat.js")
    assert found.status_code == 200 and "immutable" in found.headers["cache-control"]
    assert "javascript" in found.headers["content-type"]
    for name in ("__init__.py", "../routes.py", "..%2froutes.py", "%2e%2e/page.py", "gone.js"):
        assert me.get(f"/assets/0123/{name}").status_code in (403, 404), name


def test_the_model_folder_may_vanish(me, live):
    aside = live.app.data.models.with_name("aside")
    shutil.move(live.app.data.models, aside)
    try:
        assert me.json("GET", "/models")["models"] == []
        me.json("POST", "/models/load", {"name": "model.fake"}, 404)
    finally:
        shutil.move(aside, live.app.data.models)


def test_the_model_tab_can_ask_what_the_engine_does(me, live):
    told = me.json("GET", "/models/status")
    assert told["status"] == me.json("GET", "/models")["status"] and told["engine"] is None
    assert told["loaded"] == [{"name": "model.fake", "loader": "fake", "memory": 123, "users": 0, "current": True}]
    with patched(live.backend, features=frozenset({"stats"}), told=EngineStats(busy_sequences=2, parallel=4, cells=100, cells_used=40)):
        engine = me.json("GET", "/models/status")["engine"]
    assert (engine["busy"], engine["parallel"], engine["cells"], engine["cells_used"]) == (2, 4, 100, 40)
    live.app.models.unload()
    answer = me.json("GET", "/models/status")
    assert answer["engine"] is None and answer["status"]["state"] == "none"


@contextmanager
def patched(thing, **values):
    with ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(mock.patch.object(thing, name, value))
        yield


# --- metrics ------------------------------------------------------------------------------------------------------------------------


def families(response):
    assert response.status_code == 200 and response.headers["cache-control"] == "no-store", response.text
    return {family.name: family for family in text_string_to_metric_families(response.text)}


def test_metrics_are_for_everybody_where_there_are_no_logins(live):
    response = httpx.get(live.url + "/metrics", headers={"Accept": "*/*"})  # without a cookie: a Prometheus
    found = families(response)
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert found["tgw_model_info"].samples[0].labels == {"model": "model.fake", "loader": "fake"}
    response = httpx.get(live.url + "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert response.text.endswith("# EOF\n")


def test_metrics_without_a_model(live):
    live.app.models.unload()
    found = families(httpx.get(live.url + "/metrics"))
    assert "tgw_uptime_seconds" in found and "tgw_model_info" not in found


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Host": "127.0.0.1.evil.example"}, {"Sec-Fetch-Site": "cross-site"}])
def test_metrics_are_not_for_foreign_names_and_pages(headers, live):
    response = httpx.get(live.url + "/metrics", headers=headers)
    assert response.status_code == 403 and "tgw_" not in response.text


def test_metrics_are_read_only(live):
    assert httpx.post(live.url + "/metrics").status_code in (404, 405)


def test_metrics_need_the_login_that_everything_needs(tmp_path):
    with live_app(tmp_path / "user_data", "--multi-user", users={"ann": "pw"}) as live:
        response = httpx.get(live.url + "/metrics")
        assert response.status_code == 401 and response.json()["error"]["code"] == "NotLoggedIn" and "tgw_" not in response.text
        with httpx.Client(base_url=live.url) as scraper:  # as the documentation says
            assert scraper.post("/login", data={"username": "ann", "password": "wrong"}).status_code == 401
            assert scraper.get("/metrics").status_code == 401
            assert scraper.post("/login", data={"username": "ann", "password": "pw"}).json() == {"success": True}
            assert "tgw_uptime_seconds" in families(scraper.get("/metrics"))
            scraper.post("/logout")
            assert scraper.get("/metrics").status_code == 401
