import json
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from modules import auth as auth_module
from modules.auth import (
    COOKIE_SECONDS,
    DAY,
    MAX_SESSIONS,
    SESSION_SECONDS,
    Auth,
    NotLoggedIn,
    read_users,
    require_login,
)
from modules.errors import Busy, SettingsError


@dataclass
class Asked:
    cookies: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


class Clock:
    def __init__(self) -> None:
        self.time = 1_700_000_000.0

    def __call__(self) -> float:
        return self.time


USERS = {"ann": "pw:with:colons", "bob": "b"}


def asked(cookie) -> Asked:
    return Asked({cookie.name: cookie.value})


# --- logins from flags and files


def test_users_are_read_from_flag_and_file(tmp_path: Path) -> None:
    file = tmp_path / "logins"
    file.write_bytes(b"\xef\xbb\xbfcarl:c\r\n\r\n dora:d, eve:e:e \n")
    assert read_users("ann:pw:with:colons, bob:b", file) == {**USERS, "carl": "c", "dora": "d", "eve": "e:e"}
    assert read_users("") == {}


@pytest.mark.parametrize(
    "text", ["topsecret", "ann:", ":topsecret", "ann:ok,topsecret", "a\x07nn:topsecret", "ann:topsecret,ann:other", "a:" + "topsecret" * 200]
)
def test_malformed_logins_are_refused_without_showing_a_password(text: str, tmp_path: Path) -> None:
    file = tmp_path / "logins"
    file.write_text(text)
    for call in (lambda: read_users(text), lambda: read_users("", file)):
        with pytest.raises(SettingsError) as caught:
            call()
        assert "topsecret" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00"])
def test_a_login_file_that_is_missing_empty_or_binary_is_an_error_with_the_fix(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "logins"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingsError, match="--gradio-auth-path"):
        read_users("", file)


def test_a_user_in_flag_and_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "logins"
    file.write_text("ann:x")
    with pytest.raises(SettingsError, match="'ann'"):
        read_users("ann:y", file)


def test_an_exposed_server_never_runs_without_a_login() -> None:
    assert require_login(False, {}) == ({}, None)
    assert require_login(True, USERS) == (USERS, None)
    users, password = require_login(True, {})
    assert users == {"admin": password}
    assert password and len(password) == 19
    assert require_login(True, {})[1] != password


# --- browsers without login


def test_a_browser_is_known_by_its_cookie_alone(tmp_path: Path) -> None:
    auth = Auth({}, tmp_path / "sessions.json")
    assert auth.who(Asked()) is None
    cookie = auth.new_browser_cookie()
    me = auth.who(asked(cookie))
    assert me is not None
    assert me.owner.startswith("browser-") and len(me.owner) == 40 and me.name == ""
    assert me.session not in me.owner
    assert Auth({}, tmp_path / "sessions.json").who(asked(cookie)) == me  # after a restart
    assert cookie.value not in (tmp_path / "sessions.json").read_text()
    assert "HttpOnly" in cookie.header and "SameSite=Lax" in cookie.header and "Secure" not in cookie.header
    assert f"Max-Age={COOKIE_SECONDS}" in cookie.header
    assert auth.new_browser_cookie().value != cookie.value


@pytest.mark.parametrize("value", ["", "short", "a" * 42, "a" * 44, "a" * 42 + "=", "a" * 42 + "é", "a" * 42 + "\n", "../" + "a" * 40])
def test_a_cookie_of_another_form_is_no_cookie(value: str) -> None:
    auth = Auth({}, None)
    assert auth.who(Asked({auth.browser_cookie: value})) is None
    with_login = Auth(USERS, None)
    assert with_login.who(Asked({with_login.session_cookie: value})) is None


def test_two_installations_do_not_share_cookie_names(tmp_path: Path) -> None:
    one, two = Auth(USERS, tmp_path / "1" / "sessions.json"), Auth(USERS, tmp_path / "2" / "sessions.json")
    assert one.session_cookie != two.session_cookie and one.browser_cookie != two.browser_cookie
    assert Auth({}, tmp_path / "1" / "sessions.json").browser_cookie == one.browser_cookie
    (tmp_path / "1").rename(tmp_path / "3")
    assert Auth({}, tmp_path / "3" / "sessions.json").browser_cookie == one.browser_cookie


def test_gradio_is_told_the_name_or_nothing() -> None:
    auth = Auth({}, None)
    assert auth.gradio_user(Asked()) == "" and auth.gradio_user(asked(auth.new_browser_cookie())) == ""
    logged = Auth(USERS, None)
    assert logged.gradio_user(Asked()) is None
    assert logged.gradio_user(asked(logged.login("ann", "pw:with:colons"))) == "ann"


def test_need_says_what_to_do() -> None:
    with pytest.raises(NotLoggedIn, match="Log in"):
        Auth(USERS, None).need(Asked())
    auth = Auth({}, None)
    with pytest.raises(NotLoggedIn, match="Reload"):
        auth.need(Asked())
    assert auth.need(asked(auth.new_browser_cookie())).owner


# --- logins


def test_a_login_survives_a_restart_and_only_its_hash_is_stored(tmp_path: Path) -> None:
    file = tmp_path / "sessions.json"
    cookie = Auth(USERS, file, cookie_secure=True).login(" ann ", "pw:with:colons")
    again = Auth(USERS, file)
    me = again.who(asked(cookie))
    assert me is not None and (me.owner, me.name) == ("user-ann", "ann")
    assert cookie.header.endswith("; Secure")
    text = file.read_text()
    assert cookie.value not in text and "colons" not in text and me.session not in text
    if os.name == "posix":
        assert file.stat().st_mode & 0o777 == 0o600


def test_a_browser_cookie_is_no_login_and_a_login_name_is_no_browser_owner() -> None:
    auth = Auth({"browser-" + "0" * 32: "x"}, None)
    me = auth.who(asked(auth.login("browser-" + "0" * 32, "x")))
    assert me is not None and me.owner == "user-browser-" + "0" * 32
    assert auth.who(Asked({auth.browser_cookie: secrets.token_urlsafe(32)})) is None
    assert auth.who(Asked({auth.session_cookie: secrets.token_urlsafe(32)})) is None


@pytest.mark.parametrize("users", [{**USERS, "ann": "new"}, {"bob": "b"}, {}])
def test_a_changed_or_removed_password_ends_the_session_for_good(users: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "sessions.json"
    cookie = Auth(USERS, file).login("ann", "pw:with:colons")
    assert Auth(users, file).who(asked(cookie)) is None
    if users:
        assert Auth(USERS, file).who(asked(cookie)) is None


def test_the_same_name_and_password_typed_in_another_unicode_form_are_right() -> None:
    auth = Auth({"jos\u00e9": "caf\u00e9"}, None)
    me = auth.who(asked(auth.login("jose\u0301", "cafe\u0301")))
    assert me is not None and me.name == "jos\u00e9"


@pytest.mark.parametrize(("user", "password"), [("ann", "b"), ("nobody", "b"), ("", ""), ("ann", ""), ("ann", "x" * 100_000), ("\ud800", "\ud800")])
def test_a_wrong_login_gives_nothing_and_stores_nothing(user: str, password: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    auth = Auth(USERS, tmp_path / "sessions.json")
    with pytest.raises(NotLoggedIn) as caught:
        auth.login(user, password)
    assert str(caught.value) == "Wrong name or password. Try again."  # the same for both
    assert json.loads((tmp_path / "sessions.json").read_text())["sessions"] == {}
    assert "nobody" not in caplog.text


def test_every_login_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = auth_module.hmac.compare_digest
    monkeypatch.setattr(auth_module.hmac, "compare_digest", lambda a, b: seen.append((len(a), len(b))) or real(a, b))
    auth = Auth(USERS, None)
    for user in ("ann", "nobody"):
        with pytest.raises(NotLoggedIn):
            auth.login(user, "wrong")
    assert seen == [(64, 64), (64, 64)]


def test_a_session_lasts_thirty_days_from_its_last_use(tmp_path: Path) -> None:
    clock, file = Clock(), tmp_path / "sessions.json"
    auth = Auth(USERS, file, now=clock)
    cookie = auth.login("bob", "b")
    for _ in range(3):
        clock.time += SESSION_SECONDS - DAY / 2
        auth = Auth(USERS, file, now=clock)
        assert auth.who(asked(cookie))
    clock.time += SESSION_SECONDS
    assert auth.who(asked(cookie)) is None


def test_use_is_written_at_most_once_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    auth = Auth(USERS, tmp_path / "sessions.json", now=clock)
    cookie = auth.login("bob", "b")
    writes = []
    monkeypatch.setattr(auth_module, "write_atomically", lambda *a, **k: writes.append(a))
    for _ in range(48):
        clock.time += DAY / 24
        auth.who(asked(cookie))
    assert len(writes) == 1


def test_logout_ends_the_session_for_good(tmp_path: Path) -> None:
    auth = Auth(USERS, tmp_path / "sessions.json")
    cookie = auth.login("bob", "b")
    assert "Max-Age=0" in auth.logout(asked(cookie)).header
    assert auth.who(asked(cookie)) is None
    assert Auth(USERS, tmp_path / "sessions.json").who(asked(cookie)) is None
    assert auth.logout(Asked()).max_age == 0


def test_the_number_of_sessions_is_bounded_and_the_oldest_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_SESSIONS == 10_000
    monkeypatch.setattr(auth_module, "MAX_SESSIONS", 3)
    clock = Clock()
    auth = Auth(USERS, tmp_path / "sessions.json", now=clock)
    cookies = []
    for _ in range(5):
        clock.time += 1
        cookies.append(auth.login("bob", "b"))
    assert [auth.who(asked(cookie)) is not None for cookie in cookies] == [False, False, True, True, True]
    assert len(json.loads((tmp_path / "sessions.json").read_text())["sessions"]) == 3


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"sessions": {}}',
        b'{"installation": "../../x", "sessions": {}}',
        b'{"installation": 5, "sessions": {}}',
        b'{"installation": "0123abcd", "sessions": []}',
        b'{"installation": "0123abcd", "sessions": {"x": 1}}',
        b'{"installation": "0123abcd", "sessions": {"x": {"user": "ann"}}}',
        b'{"installation": "0123abcd", "sessions": {"x": {"user": 1, "check": "", "created": 1, "expires": 2}}}',
        b'{"installation": "0123abcd", "sessions": {"x": {"user": "ann", "check": "", "created": 1, "expires": Infinity}}}',
        b'{"installation": "0123abcd", "sessions": {"x": {"user": "ann", "check": "", "created": "", "expires": ""}}}',
        b"[" * 100_000,
    ],
)
def test_a_corrupt_session_file_is_kept_aside_and_the_cookie_names_stay(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "sessions.json"
    name = Auth({}, file).browser_cookie
    file.write_bytes(content)
    auth = Auth(USERS, file)
    assert auth.browser_cookie == name
    assert (tmp_path / "sessions.json.bad").read_bytes() == content
    assert auth.who(asked(auth.login("bob", "b")))


def test_a_session_file_that_cannot_be_written_keeps_nobody_out(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    auth = Auth(USERS, blocked / "sessions.json")  # its folder is a file
    assert auth.who(asked(auth.login("bob", "b")))


def test_the_owner_of_before_is_reported_for_adoption() -> None:
    open_house, closed = Auth({}, None), Auth(USERS, None)
    token = open_house.new_browser_cookie().value
    before = open_house.who(Asked({open_house.browser_cookie: token}))
    assert before is not None
    assert closed.browser_owner(Asked({closed.browser_cookie: token})) == before.owner
    assert closed.browser_owner(Asked()) is None
    assert closed.forget_browser().max_age == 0


# --- guessing


def fail(auth: Auth, user: str, times: int) -> None:
    for _ in range(times):
        with pytest.raises(NotLoggedIn):
            auth.login(user, "wrong")


@pytest.mark.parametrize("user", ["ann", "nobody"])
def test_guessing_is_slowed_down_for_known_and_unknown_names_alike(user: str) -> None:
    clock = Clock()
    auth = Auth(USERS, None, now=clock)
    waits = []
    fail(auth, user, 5)
    for _ in range(10):
        with pytest.raises(Busy) as caught:
            auth.login(user, "pw:with:colons")
        waits.append(caught.value.retry_after)
        clock.time += caught.value.retry_after
        fail(auth, user, 1)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    auth.login("bob", "b")  # others are not held up


def test_a_right_password_and_time_reset_the_count() -> None:
    clock = Clock()
    auth = Auth(USERS, None, now=clock)
    for _ in range(3):
        fail(auth, "bob", 4)
        auth.login("bob", "b")
    fail(auth, "ann", 5)
    clock.time += 1000
    fail(auth, "ann", 5)


def test_guessing_over_many_names_is_slowed_down_in_bounded_memory() -> None:
    clock = Clock()
    auth = Auth(USERS, None, now=clock)
    busy = 0
    for number in range(3000):
        try:
            auth.login(f"name{number}", "wrong")
        except NotLoggedIn:
            pass
        except Busy as error:
            busy += 1
            assert error.retry_after <= 60
            clock.time += 2
    assert busy > 2000 / 2
    assert len(auth._throttle._failures) <= 1025


def test_parallel_attempts_are_all_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt counts before it is compared: forty threads at once get no more guesses than one."""
    auth = Auth(USERS, None, now=Clock())
    for _ in range(5):
        auth._throttle.attempt("ann")  # five that are still being compared
    with pytest.raises(Busy):
        auth.login("ann", "pw:with:colons")
