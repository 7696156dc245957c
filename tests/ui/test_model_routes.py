"""The routes of the Model tab over a real server: cards, memory, loading, what is kept, adapters, conversions, who may."""

import hashlib
from contextlib import contextmanager
from unittest import mock

import pytest

from modules import guard
from modules.ui.serve import build_server
from tests.fakes import WAIT, until
from tests.ui.live import Browser, _serving
from tests.ui.model_help import BROKEN, GIB, GPU, OTHER, TINY, built, machine

READING = ("memory", f"hash?name={TINY}", f"card?name={TINY}", "adapters")
WRITING = (
    ("POST", "models/load", {"name": OTHER}),
    ("POST", "models/unload", {}),
    ("POST", "models/cancel", {}),
    ("POST", "models/estimate", {"name": TINY}),
    ("PUT", "models/settings", {"name": TINY}),
    ("PUT", "models/template", {"name": TINY, "template": ""}),
    ("POST", "models/restore", {"name": TINY}),
    ("POST", "models/delete", {"name": OTHER}),
    ("POST", "models/adapters", {"wanted": {}}),
    ("POST", "conversions", {"kind": "to-hf", "name": TINY, "numbers": "float16"}),
    ("POST", "conversions/cancel", {}),
)
HOSTILE = ("gone.gguf", "", "..", "../settings.yaml", "/etc/passwd", "a\\b.gguf", "ollama:x", "x" * 999)


@contextmanager
def serving(folder, *flags):
    with (
        built(folder, *flags) as (engine, app, who),
        _serving(build_server(app, who, guard.Hosts.build(False))) as url,
        Browser(url, app.data.root) as me,
    ):
        me.engine, me.app = engine, app
        yield me


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One server for the whole file."""
    with serving(tmp_path_factory.mktemp("models") / "user_data", "--max-loaded-models", "2") as me:
        yield me


@pytest.fixture
def me(server):
    """A browser in it; TINY is the model in use, on a machine with 1 GiB free."""
    with machine():
        if [each.name for each in server.app.models.loaded()] != [TINY]:
            server.app.models.unload()
            server.app.models.load(server.app.models.choose(TINY))
        yield server
    server.app.model_settings.forget(TINY)


def test_a_card_says_what_a_model_is_and_how_it_would_be_loaded(me):
    found = me.json("GET", f"/models/card?name={TINY}")
    card = found["card"]
    assert (card["architecture"], card["layers"], card["context_length"], card["kind"]) == ("llama", 3, 2048, "gguf")
    assert card["has_template"] and card["parameters"] > 1000 and card["size"] == (me.app.data.models / TINY).stat().st_size
    assert (found["own"], found["file"], found["error"], found["loader"]) == (True, True, "", "fake")
    assert found["values"]["ctx_size"] == 0 and found["saved"] == {"loader": "", "options": {}, "instruction_template": ""}
    broken = me.json("GET", f"/models/card?name={BROKEN}")
    assert broken["card"] is None and BROKEN in broken["error"]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_leads_out_of_the_model_folders(me, name):
    bodies = [(method, path, body) for method, path, body in WRITING if "name" in body and not path.endswith("restore")]
    for method, path, body in bodies:
        assert me.request(method, "/" + path, json={**body, "name": name}).status_code in (400, 403, 404), path
    for path in ("card", "hash"):
        assert me.get(f"/models/{path}", params={"name": name}).status_code in (400, 404)
    assert me.app.models.status().name == TINY
    assert me.app.model_settings.get(name).options == {}


def test_an_estimate_tells_parts_by_device_and_what_would_fit(me):
    ask = {"name": TINY, "options": {"ctx_size": 2048}}
    found = me.json("POST", "/models/estimate", ask)
    (device,) = found["devices"]
    assert device["free"] == GIB and set(device["needs"]) == {"weights", "cache", "compute", "engine"}
    assert (found["fits"], found["refusal"], found["gpus"], found["largest_context"]) == (True, "", False, 2048)
    smaller = me.json("POST", "/models/estimate", {**ask, "options": {"ctx_size": 512}})["devices"][0]["needs"]
    assert smaller["cache"] < device["needs"]["cache"]
    with machine(of_gpu=GIB):
        found = me.json("POST", "/models/estimate", ask)
        assert found["gpus"] and found["best_gpu_layers"] == 4 and found["devices"][1]["name"] == GPU
        assert sum(found["devices"][1]["needs"].values()) > 0
    assert me.json("POST", "/models/estimate", {"name": TINY, "options": {"ctx_size": -5}}, 400)["error"]["code"] == "SettingsError"


def test_a_model_that_does_not_fit_is_loaded_only_when_one_insists(me):
    with machine(free=1 << 20):
        refused = me.json("POST", "/models/load", {"name": OTHER}, 409)["error"]
        assert refused["code"] == "DoesNotFit" and "1 MiB are free" in refused["message"]
        assert me.app.models.status().name == TINY
        me.json("POST", "/models/load", {"name": OTHER, "force": True}, 202)
        until(lambda: me.app.models.status().name == OTHER and me.app.models.status().state == "ready")


def test_models_in_memory_are_told_and_one_is_unloaded(me):
    me.json("POST", "/models/load", {"name": OTHER}, 202)
    until(lambda: len(me.app.models.loaded()) == 2)
    told = me.json("GET", "/models/status")["loaded"]
    assert {(each["name"], each["current"], each["memory"]) for each in told} == {(TINY, False, 123), (OTHER, True, 123)}
    me.json("POST", "/models/unload", {"name": TINY}, 202)
    assert [each["name"] for each in me.json("GET", "/models/status")["loaded"]] == [OTHER]


def test_settings_are_saved_used_and_forgotten(me):
    me.json("PUT", "/models/settings", {"name": TINY, "options": {"ctx_size": 512}})
    me.json("PUT", "/models/settings", {"name": TINY, "options": {"parallel": 2}})
    found = me.json("GET", f"/models/card?name={TINY}")
    assert found["saved"]["options"] == {"ctx_size": 512, "parallel": 2} and found["values"]["ctx_size"] == 512
    me.json("POST", "/models/load", {"name": TINY, "options": {"parallel": 3}}, 202)
    until(lambda: me.engine.asked[-1][1].parallel == 3 and me.app.models.status().state == "ready")
    assert me.engine.asked[-1][1].ctx_size == 512
    for options in ({"ctx_size": -1}, {"unknown": 1}):
        me.json("PUT", "/models/settings", {"name": TINY, "options": options}, 400)
    me.json("POST", "/models/restore", {"name": TINY})
    assert me.json("GET", f"/models/card?name={TINY}")["values"]["ctx_size"] == 0


def test_what_is_saved_and_wrong_is_told_beside_the_usual_values(me):
    me.app.model_settings.save(TINY, "", {"ctx_size": -7})
    found = me.json("GET", f"/models/card?name={TINY}")
    assert "ctx_size" in found["error"] and found["values"]["ctx_size"] == 0 and found["card"]


def test_a_template_is_saved_and_used_at_once(me):
    me.json("PUT", "/models/template", {"name": TINY, "template": "Alpaca"})
    assert "### Instruction:" in me.app.models.backend.chat_template
    assert me.json("GET", f"/models/card?name={TINY}")["saved"]["instruction_template"] == "Alpaca"
    me.json("PUT", "/models/template", {"name": TINY, "template": "no such"}, 404)
    me.json("PUT", "/models/template", {"name": TINY, "template": ""})
    assert me.app.models.backend.chat_template is None


def test_the_hash_of_a_file(me):
    path = f"/models/hash?name={TINY}"
    until(lambda: me.json("GET", path)["sha256"])
    assert me.json("GET", path)["sha256"] == hashlib.sha256((me.app.data.models / TINY).read_bytes()).hexdigest()
    (me.app.data.models / "folder").mkdir()
    me.json("GET", "/models/hash?name=folder", None, 404)


def test_a_model_is_deleted_but_not_while_it_is_in_memory(me):
    (me.app.data.models / "gone.gguf").write_bytes(b"x")
    assert "Unload it first" in me.json("POST", "/models/delete", {"name": TINY}, 409)["error"]["message"]
    assert "gone.gguf" not in me.json("POST", "/models/delete", {"name": "gone.gguf"})["models"]
    assert not (me.app.data.models / "gone.gguf").exists() and (me.app.data.models / TINY).exists()


def test_adapters_are_used_with_scales(me):
    peft = me.app.data.loras / "peft"
    peft.mkdir()
    (peft / "adapter_config.json").touch()
    found = me.json("GET", "/models/adapters")
    assert found["able"] and [each["name"] for each in found["adapters"]] == ["bad.gguf", "one.gguf", "peft"]
    used = me.json("POST", "/models/adapters", {"wanted": {"one.gguf": 0.5}})["adapters"]
    assert [(each["name"], each["scale"]) for each in used if each["used"]] == [("one.gguf", 0.5)]
    assert "does not fit" in me.json("POST", "/models/adapters", {"wanted": {"bad.gguf": 1}}, 422)["error"]["message"]
    assert [(adapter.path.name, adapter.scale) for adapter in me.app.models.adapters] == [("one.gguf", 0.5)]
    for wanted, status in (({"../x": 1}, 400), ({"gone": 1}, 404), ({"one.gguf": "x"}, 400)):
        me.json("POST", "/models/adapters", {"wanted": wanted}, status)
    assert not any(each["used"] for each in me.json("POST", "/models/adapters", {"wanted": {}})["adapters"])
    me.app.models.unload()
    assert not me.json("GET", "/models/adapters")["able"]


def test_a_conversion_is_started_watched_and_refused_where_something_stands(me):
    models = me.app.data.models
    sources = {each["name"]: each for each in me.json("GET", "/conversions/sources")["sources"]}
    assert sources[TINY] == {"name": TINY, "kind": "to-hf", "numbers": ["float16", "bfloat16", "float32"]}
    ask = {"kind": "to-hf", "name": TINY, "numbers": "float32"}
    assert me.json("POST", "/conversions", ask, 202)["target"] == "tiny-9-float32"
    until(lambda: me.json("GET", "/conversions")["progress"] == 0.25)
    assert "Another conversion" in me.json("POST", "/conversions", {**ask, "numbers": "float16"}, 503)["error"]["message"]
    me.json("POST", "/conversions/cancel", {}, 202)
    assert me.app.conversions.wait(WAIT) and me.json("GET", "/conversions")["state"] == "cancelled"
    (models / "go").touch()
    me.json("POST", "/conversions", ask, 202)
    assert me.app.conversions.wait(WAIT) and me.json("GET", "/conversions")["state"] == "done" and (models / "tiny-9-float32").is_dir()
    assert "exists already" in me.json("POST", "/conversions", ask, 409)["error"]["message"]
    me.json("POST", "/conversions", {**ask, "numbers": "Q8_0"}, 400)
    me.json("POST", "/conversions", {**ask, "kind": "rm"}, 400)


def test_in_multi_user_mode_there_is_none_of_this(tmp_path):
    with serving(tmp_path / "user_data", "--multi-user") as me:
        for path in READING:
            assert me.json("GET", f"/models/{path}", None, 403)["error"]["code"] == "AccessDenied"
        for path in ("conversions", "conversions/sources"):
            me.json("GET", f"/{path}", None, 403)
        for method, path, body in WRITING:
            assert me.json(method, f"/{path}", body, 403)["error"]["code"] == "AccessDenied", path
        assert me.json("GET", "/models/status")["loaded"] == []
        assert "folder" not in me.json("GET", "/models")
        assert me.app.models.status().name == TINY


def test_what_the_model_in_use_takes_counts_as_free(me):
    with machine(free=GIB, of_gpu=GIB):
        with mock.patch.object(me.app.models.backend, "memory", lambda: 100 << 20):
            main, gpu = me.json("POST", "/models/estimate", {"name": OTHER})["devices"]
        assert main["free"] == GIB + (100 << 20) - (me.app.data.models / TINY).stat().st_size
        assert gpu["free"] == gpu["total"] == GIB
    with machine(free=GIB, of_gpu=GIB, gpu_free=GIB // 2):
        free = me.json("POST", "/models/estimate", {"name": OTHER})["devices"][1]["free"]
        assert GIB // 2 + (300 << 20) < free <= GIB
