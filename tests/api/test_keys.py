"""Keys, Host, Origin and CORS of the API: who may ask."""

import hmac
import json

import pytest

from modules import settings
from modules.api import keys
from modules.api.errors import WrongKey
from modules.api.keys import Keys, check_settings
from modules.app import option_groups
from modules.errors import SettingsError
from tests.api.conftest import served

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
PAGE = "https://page.example"
ADMIN_ROUTES = [
    ("GET", "/metrics"),
    ("GET", "/v1/internal/model/list"),
    ("POST", "/v1/internal/model/load"),
    ("POST", "/v1/internal/model/unload"),
    ("GET", "/v1/internal/lora/list"),
    ("POST", "/v1/internal/lora/load"),
    ("POST", "/v1/internal/lora/unload"),
]


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    """A server with both keys and one foreign page that may ask."""
    with served(tmp_path_factory.mktemp("locked"), "--api-key", "secret", "--admin-key", "master", "--cors-origin", PAGE) as api:
        yield api


@pytest.fixture(scope="module")
def open_api(tmp_path_factory):
    """One without keys."""
    with served(tmp_path_factory.mktemp("open")) as api:
        yield api


def ask(api, method, path, body=None, **headers):
    with api.client(**{name.replace("_", "-"): value for name, value in headers.items()}) as client:
        return client.request(method, path, json=body)


# --- keys -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{"authorization": "Bearer secret"}, {"authorization": "bearer secret"}, {"x_api_key": "secret"}])
def test_a_key_comes_in_either_header(locked, given):
    assert ask(locked, "POST", CHAT, HELLO, **given).status_code == 200


@pytest.mark.parametrize(
    "given", [{}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}, {"authorization": "Basic secret"}, {"x_api_key": "secret1"}]
)
def test_without_the_right_key_nothing_is_done(locked, given):
    before = len(locked.backend.requests)
    response = ask(locked, "POST", CHAT, HELLO, **given)
    assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["type"] == "authentication_error" and "secret" not in response.text
    assert len(locked.backend.requests) == before


def test_refused_messages_are_told_in_anthropics_form(locked):
    assert ask(locked, "POST", "/v1/messages", {}).json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("path", ["/openapi.json", "/v1/models", "/v1/internal/model/info", "/v1/internal/encode", "/nowhere"])
def test_every_other_route_needs_a_key(locked, path):
    assert ask(locked, "GET", path).status_code == 401


@pytest.mark.parametrize(("method", "path"), ADMIN_ROUTES)
def test_what_concerns_the_server_needs_the_admin_key(locked, method, path):
    for given in ({}, {"x_api_key": "secret"}, {"authorization": "Bearer secret"}):
        response = ask(locked, method, path, {}, **given)
        assert response.status_code == 401 and "--admin-key" in response.text
    assert ask(locked, method, path, {"lora_names": [], "model_name": "nowhere"}, x_api_key="master").status_code in (200, 404, 503)


def test_the_admin_key_opens_the_rest_too(locked):
    locked.app.models.load(locked.app.models.choose("model.fake"))
    assert ask(locked, "POST", CHAT, HELLO, x_api_key="master").status_code == 200


def test_the_lists_of_paths_and_of_routes_agree(locked):
    paths = locked.get("/openapi.json", authorization="Bearer secret")["paths"]
    served_paths = {path for path in paths if path.startswith(keys.ADMIN)}
    assert served_paths == {path for _, path in ADMIN_ROUTES} and paths.keys() >= keys.OPEN


def test_health_is_open(locked):
    for path in keys.OPEN:
        assert ask(locked, "GET", path).json() == {"status": "ok"}


def test_a_key_may_have_any_characters():
    key = "schlüssel-鍵"
    told = key.encode().decode("latin-1")  # how a server reads the bytes that a client sends
    Keys(key).check(CHAT, {"authorization": [f"Bearer {told}"]})
    for wrong in (told[:-1], key, "schl?ssel-?"):
        with pytest.raises(WrongKey):
            Keys(key).check(CHAT, {"authorization": [f"Bearer {wrong}"]})


def test_without_keys_this_machine_may_do_all(open_api):
    assert ask(open_api, "POST", CHAT, HELLO).status_code == 200
    assert ask(open_api, "GET", "/v1/internal/model/list").status_code == 200
    assert ask(open_api, "POST", CHAT, HELLO, authorization="Bearer none").status_code == 200


def test_keys_are_compared_in_constant_time(monkeypatch):
    compared = []

    def watched(one, other):
        compared.append((one, other))
        return hmac.compare_digest(one, other)

    monkeypatch.setattr(keys, "hmac", type("Watched", (), {"compare_digest": staticmethod(watched)}))
    Keys("secret", "master").check(CHAT, {"authorization": ["Bearer secret"], "x-api-key": ["other"]})
    assert compared == [(b"secret", b"secret"), (b"secret", b"master"), (b"other", b"secret"), (b"other", b"master")]  # all, a match or not


def test_no_key_is_logged(locked, caplog):
    ask(locked, "POST", CHAT, HELLO, authorization="Bearer secret")
    ask(locked, "POST", CHAT, {}, authorization="Bearer mistyped")
    assert not {"secret", "mistyped", "master"} & set(caplog.text.split())


def test_an_admin_is_who_has_a_key_of_its_own():
    given = {"x-api-key": ["a"]}
    assert Keys("b", "a").administers(given) and not Keys("a", "a").administers(given) and not Keys("", "").administers({"x-api-key": [""]})


def test_without_an_admin_key_the_api_key_is_that_too(tmp_path):
    with served(tmp_path, "--api-key", "secret") as api:
        assert ask(api, "GET", "/v1/internal/model/list", x_api_key="secret").status_code == 200
        assert ask(api, "GET", "/v1/internal/model/list").status_code == 401


# --- pages of other sites ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "192.168.0.9", "127.0.0.1.evil.example:5000"])
def test_another_name_is_refused(open_api, host):
    """A page whose name was turned to this machine."""
    response = ask(open_api, "GET", "/v1/models", host=host)
    assert response.status_code == 403 and response.json()["error"]["type"] == "permission_error"
    assert ask(open_api, "GET", "/health", host=host).status_code == 403


@pytest.mark.parametrize("given", [{"origin": "https://evil.example"}, {"origin": "null"}, {"sec_fetch_site": "cross-site"}])
def test_a_page_of_another_site_is_refused(open_api, locked, given):
    before = len(open_api.backend.requests)
    response = ask(open_api, "POST", CHAT, HELLO, **given)
    assert response.status_code == 403 and "access-control-allow-origin" not in response.headers
    assert len(open_api.backend.requests) == before
    assert ask(locked, "POST", CHAT, HELLO, authorization="Bearer secret", **given).status_code == 403
    assert ask(open_api, "OPTIONS", CHAT, **given).status_code in (403, 405)


def test_a_form_of_another_site_is_refused(open_api):
    """It needs no preflight."""
    with open_api.client(Origin="https://evil.example") as client:
        assert client.post(CHAT, content=json.dumps(HELLO), headers={"Content-Type": "text/plain"}).status_code == 403


def test_a_page_that_is_named_may_ask(locked):
    response = ask(locked, "POST", CHAT, HELLO, origin=PAGE, sec_fetch_site="cross-site", authorization="Bearer secret")
    assert response.status_code == 200 and response.headers["access-control-allow-origin"] == PAGE
    assert "x-ignored" in response.headers["access-control-expose-headers"] and "Origin" in response.headers["vary"]
    assert "access-control-allow-credentials" not in response.headers
    assert ask(locked, "POST", CHAT, HELLO, origin=PAGE).status_code == 401  # and reads why
    assert ask(locked, "POST", CHAT, HELLO, origin=PAGE).headers["access-control-allow-origin"] == PAGE
    assert ask(locked, "POST", CHAT, HELLO, origin=PAGE, host="evil.example", authorization="Bearer secret").status_code == 403


def test_its_preflight_is_answered_without_a_key(locked):
    wanted = {"access_control_request_method": "POST", "access_control_request_headers": "authorization,content-type"}
    response = ask(locked, "OPTIONS", CHAT, origin=PAGE, **wanted)
    assert response.status_code == 204 and response.headers["access-control-allow-origin"] == PAGE
    assert (
        response.headers["access-control-allow-headers"] == "authorization,content-type"
        and "POST" in response.headers["access-control-allow-methods"]
    )
    refused = ask(locked, "OPTIONS", CHAT, origin="https://page.example.evil", **wanted)
    assert refused.status_code in (401, 403) and "access-control-allow-origin" not in refused.headers


def test_all_pages_may_ask_where_that_is_said(tmp_path):
    with served(tmp_path, "--api-key", "secret", "--cors-origin", "*") as api:
        response = ask(api, "POST", CHAT, HELLO, origin="https://any.example", authorization="Bearer secret")
        assert response.status_code == 200 and response.headers["access-control-allow-origin"] == "https://any.example"
        assert ask(api, "POST", CHAT, HELLO, origin="https://any.example").status_code == 401


# --- settings ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "fine"),
    [
        ((), True),
        (("--api",), True),
        (("--api", "--listen-host", "127.0.0.1"), True),
        (("--api", "--listen"), False),
        (("--api", "--listen-host", "192.168.0.9"), False),
        (("--api", "--listen", "--admin-key", "master"), False),
        (("--api", "--listen", "--api-key", "secret"), True),
        (("--listen",), True),  # the page asks for a login
        (("--api", "--cors-origin", "*"), False),
        (("--api", "--cors-origin", PAGE), True),
        (("--api", "--cors-origin", "*", "--api-key", "secret"), True),
    ],
)
def test_an_open_api_is_not_served_to_others(flags, fine):
    chosen = settings.load(flags, (), (), option_groups()).settings
    if fine:
        check_settings(chosen)
    else:
        with pytest.raises(SettingsError, match="--api-key"):
            check_settings(chosen)
