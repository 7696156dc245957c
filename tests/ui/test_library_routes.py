"""The library's routes over a real server: what there is, saving and deleting one's own, hostile names, multi-user mode."""

import json
from urllib.parse import quote

import pytest

from modules.instruction_templates import SHIPPED
from modules.templates import FALLBACK
from modules.ui.library_routes import EXAMPLE
from tests.ui.live import live_app

GOOD = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
KINDS = ("presets", "characters", "users", "templates", "prompts")
BODIES = {
    "presets": {"values": {"top_k": 3}},
    "characters": {"name": "Ann", "context": "Kind.", "greeting": "Hi"},
    "users": {"name": "Bo", "bio": "Tea."},
    "templates": {"text": GOOD},
    "prompts": {"text": "Say {{what}}"},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with live_app(tmp_path_factory.mktemp("library") / "user_data") as live:
        yield live


@pytest.fixture
def me(server):
    with server.browser() as browser:
        yield browser
    for kind in (*KINDS, "instruction-templates", "grammars", "css"):
        folder = server.app.data.root / kind
        for path in folder.iterdir() if folder.is_dir() else ():
            path.unlink()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with live_app(tmp_path_factory.mktemp("shared") / "user_data", "--multi-user") as live:
        yield live


def at(kind, name):
    return f"/chat/{kind}/{quote(name, safe='')}"


def put(server, place, text):
    (server.app.data.root / place).write_text(text, "utf-8")


def test_what_there_is(me, server):
    found = me.json("GET", "/chat/library")
    lists = {"characters", "users", "presets", "templates", "prompts", "grammars", "styles", "notification", "adapters", "other_models"}
    assert set(found) == lists and found["other_models"] == []
    assert "Assistant" in found["characters"] and found["users"] == ["Default"] and "Top-P" in found["presets"]
    assert set(SHIPPED) <= set(found["templates"]) and "Translate" in found["prompts"]
    assert found["grammars"] == [] and found["notification"] is False
    put(server, "css/Mine.css", "")
    put(server, "grammars/digits.gbnf", "root ::= [0-9]+\r\n")
    server.app.data.notification.touch()
    found = me.json("GET", "/chat/library")
    assert "Mine" in found["styles"] and found["grammars"] == ["digits"] and found["notification"] is True
    server.app.data.notification.unlink()
    assert me.json("GET", "/chat/grammars/digits") == {"text": "root ::= [0-9]+\n"}


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_deleting_ones_own(me, server, kind):
    assert me.json("PUT", at(kind, "My own"), BODIES[kind]) == {}
    assert "My own" in me.json("GET", "/chat/library")[kind]
    assert me.json("DELETE", at(kind, "My own"), {}) == {}
    assert "My own" not in me.json("GET", "/chat/library")[kind]
    assert "does not exist" in me.json("DELETE", at(kind, "My own"), {}, status=404)["error"]["message"]


def test_what_is_told_of_each(me):
    for kind in KINDS:
        me.json("PUT", at(kind, "x"), BODIES[kind])
    values = me.json("GET", at("presets", "x"))["values"]
    assert (values["top_k"], values["top_p"]) == (3, 1) and isinstance(values["sampler_priority"], list)
    assert me.json("GET", at("characters", "x")) == BODIES["characters"]
    assert me.json("GET", at("users", "x")) == BODIES["users"]
    prompt = me.json("GET", at("prompts", "x"))
    assert prompt == {"text": "Say {{what}}", "source": "Say {{what}}", "variables": [{"name": "what", "default": None}]}


def test_a_prompts_date_is_filled_in(me, server):
    put(server, "prompts/day.txt", "On {{date}}: {{what=all}}")
    found = me.json("GET", at("prompts", "day"))
    assert "{{date}}" not in found["text"] and found["text"].endswith("{{what=all}}")
    assert found["source"] == "On {{date}}: {{what=all}}"
    assert found["variables"] == [{"name": "what", "default": "all"}]


def test_a_template_is_shown_with_an_example(me, server):
    found = me.json("POST", "/chat/template", {"name": "ChatML"})
    assert found["text"] == SHIPPED["ChatML"] and found["error"] == ""
    assert all(message.content in found["example"] for message in EXAMPLE)
    own = me.json("POST", "/chat/template", {})
    assert own["text"] == FALLBACK.source  # this model has none
    tried = me.json("POST", "/chat/template", {"text": GOOD})
    assert tried["example"].startswith("[system] Answer in one sentence.\n[user] What has six sides?\n") and tried["error"] == ""


def test_the_models_own_template(me, server, monkeypatch):
    monkeypatch.setattr(type(server.backend), "chat_template", "OWN {{ bos_token }}{{ messages[-1].content }}")
    monkeypatch.setattr(type(server.backend), "bos_token", "<b>")
    found = me.json("POST", "/chat/template", {"name": ""})
    assert found["text"].startswith("OWN ") and found["example"] == "OWN <b>And eight?"
    monkeypatch.setattr(server.app.models, "loaded_backend", lambda: None)
    assert "No model is loaded" in me.json("POST", "/chat/template", {"name": ""})["error"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{% if", "failed"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", "stopped"),
        ("{{ ''.__class__ }}", "not allowed"),
        ("x" * 200_000, "characters"),
    ],
)
def test_a_wrong_template_is_a_readable_error_and_is_not_saved(me, text, reason):
    found = me.json("POST", "/chat/template", {"text": text})
    assert found["example"] == "" and reason in found["error"]
    error = me.json("PUT", at("templates", "Bad"), {"text": text}, status=422)["error"]
    assert "Bad.jinja" in error["message"]
    assert "Bad" not in me.json("GET", "/chat/library")["templates"]


def test_an_endless_example_is_cut(me):
    found = me.json("POST", "/chat/template", {"text": "{% for m in messages %}{{ m.content * 10000 }}{% endfor %}"})
    assert len(found["example"]) <= 20_000


@pytest.mark.parametrize("name", ["..", "../../settings", "/etc/passwd", "a/b", "CON", ".hidden", "a\0b", "", "x" * 300])
@pytest.mark.parametrize("kind", [*KINDS, "grammars"])
def test_hostile_names_are_refused_everywhere(me, server, kind, name):
    before = sorted(server.app.data.root.rglob("*"))
    if name != "..":  # a client itself resolves that one
        if kind != "templates":
            assert me.json("GET", at(kind, name), status=400)["error"]["code"] == "NameError"
        if kind != "grammars":
            assert me.json("PUT", at(kind, name), BODIES[kind], status=400)["error"]["code"] == "NameError"
            assert me.json("DELETE", at(kind, name), {}, status=400)["error"]["code"] == "NameError"
    if kind == "templates" and name:
        assert me.json("POST", "/chat/template", {"name": name}, status=400)["error"]["code"] == "NameError"
    assert sorted(server.app.data.root.rglob("*")) == before


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("presets", {"values": {"top_k": "many"}}),
        ("presets", {"values": []}),
        ("characters", {"name": "A\nB"}),
        ("characters", {"name": 5}),
        ("users", {"name": ""}),
        ("templates", {"text": 5}),
        ("prompts", {"text": "a\0b"}),
        ("prompts", {}),
    ],
)
def test_wrong_bodies_change_nothing(me, kind, body):
    response = me.request("PUT", at(kind, "x"), content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert 400 <= response.status_code < 500 and response.json()["error"]["message"]
    assert "x" not in me.json("GET", "/chat/library")[kind]


def test_a_broken_file_is_listed_and_its_error_names_it(me, server):
    put(server, "characters/Bad.yaml", "a: &a [*a]")
    put(server, "presets/Bad.yaml", "top_p: 7")
    assert "Bad" in me.json("GET", "/chat/library")["characters"]
    for kind in ("characters", "presets"):
        assert "Bad.yaml" in me.json("GET", at(kind, "Bad"), status=400)["error"]["message"]


def test_without_the_pages_header_nothing_is_changed(me):
    del me.headers["X-TGW"]
    for kind in KINDS:
        assert me.json("PUT", at(kind, "x"), BODIES[kind], status=403)["error"]["code"] == "AccessDenied"
        assert me.json("DELETE", at(kind, "x"), {}, status=403)["error"]["code"] == "AccessDenied"


def test_in_multi_user_mode_everything_is_read_and_nothing_written(shared):
    with shared.browser() as me:
        assert "Top-P" in me.json("GET", "/chat/library")["presets"]
        assert me.json("GET", at("presets", "Top-P"))["values"]["top_p"] == 0.95
        assert me.json("POST", "/chat/template", {"name": "ChatML"})["example"]
        assert me.json("POST", "/chat/template", {"text": GOOD}, status=403)["error"]["code"] == "AccessDenied"
        before = sorted(shared.app.data.root.rglob("*"))
        for kind in KINDS:
            assert "where the server is started" in me.json("PUT", at(kind, "x"), BODIES[kind], status=403)["error"]["message"]
            assert me.json("DELETE", at(kind, "x"), {}, status=403)["error"]["code"] == "AccessDenied"
        assert [path for path in sorted(shared.app.data.root.rglob("*")) if path.suffix in (".yaml", ".jinja", ".txt")] == [
            path for path in before if path.suffix in (".yaml", ".jinja", ".txt")
        ]


def test_a_visitor_without_a_cookie_is_not_told(server):
    import httpx

    assert httpx.get(server.url + "/chat/library").status_code == 401
