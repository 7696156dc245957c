"""Who is asking: identities and logins that survive a restart. Which page may ask is `guard.py`.

An identity comes from one of two cookies, and only their hashes are kept or logged:

no logins configured    `tgw_browser_<id>`: 256 random bits; the owner is derived from them, nothing is stored
logins configured       `tgw_session_<id>`: 256 random bits; sessions.json holds their hash, the user and the expiry

`<id>` is drawn once for each user_data folder, because browsers send cookies to every port of a host: two servers must neither
read nor overwrite each other's, and a server must find its own again after it moved to the next free port.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import math
import os
import platform
import re
import secrets
import threading
import time
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from modules.errors import AccessDenied, Busy, DataError, SettingsError
from modules.log import logger
from modules.paths import write_atomically

DAY = 86400
SESSION_SECONDS = 30 * DAY  # since the last use
COOKIE_SECONDS = 400 * DAY  # the longest that browsers keep a cookie; renewed whenever the page is opened
MAX_SESSIONS = 10_000
MAX_FIELD = 1024  # characters of a name or password worth hashing
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}", re.ASCII)


class NotLoggedIn(AccessDenied):
    """Logins are configured and this request carries none that is valid."""

    status = 401


class HasCookies(Protocol):
    """All that is asked of a request: Starlette's Request and WebSocket and Gradio's Request have it."""

    @property
    def cookies(self) -> Mapping[str, str]:
        """Cookie values by name."""
        ...


@dataclass(frozen=True)
class Identity:
    """One who asks. `owner` owns conversations and replies; `session` is the key of this browser's settings."""

    owner: str
    session: str

    @property
    def name(self) -> str:
        """The login name; empty for a browser without login."""
        return self.owner.removeprefix("user-") if self.owner.startswith("user-") else ""


@dataclass(frozen=True)
class Cookie:
    """A cookie to set; one with `max_age` 0 is deleted by the browser."""

    name: str
    value: str
    max_age: int = COOKIE_SECONDS
    secure: bool = False

    @property
    def header(self) -> str:
        """Value of the Set-Cookie header. Lax: a link from another site opens the page logged in, but no foreign form or script acts."""
        return f"{self.name}={self.value}; Path=/; Max-Age={self.max_age}; HttpOnly; SameSite=Lax" + ("; Secure" if self.secure else "")


# ---------------------------------------------------------------------------------------------------------------- logins


def read_users(inline: str, path: Path | None = None) -> dict[str, str]:
    """Passwords by user name from --gradio-auth and the file of --gradio-auth-path: `name:password`, separated by commas or lines.

    A password may contain colons, not commas. Raises SettingsError, which never quotes an entry: it may be a bare password.
    """
    users = _parse_users(inline, "--gradio-auth")
    if path is None:
        return users
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SettingsError(f"Cannot read the logins in {path}: {reason}. Correct --gradio-auth-path.") from error
    in_file = _parse_users(text, str(path))
    if not in_file:
        raise SettingsError(f"There is no login in {path}. Write name:password on a line of its own, or leave --gradio-auth-path out.")
    if twice := sorted(users.keys() & in_file.keys()):
        raise SettingsError(f"The user {twice[0]!r} is in --gradio-auth and in {path}. Remove one of the two.")
    return users | in_file


def _parse_users(text: str, source: str) -> dict[str, str]:
    users: dict[str, str] = {}
    entries = [entry.strip() for entry in re.split(r"[,\r\n]", text) if entry.strip()]
    for number, entry in enumerate(entries, 1):
        user, colon, password = entry.partition(":")
        user = _normal(user.strip())
        if not (user and colon and password) or not user.isprintable() or max(len(user), len(password)) > MAX_FIELD:
            raise SettingsError(f"Login {number} of {source} is not of the form name:password (and neither may contain a comma). Correct it.")
        if user in users:
            raise SettingsError(f"The user {user!r} is there twice in {source}. Remove one of the two.")
        users[user] = password
    return users


def require_login(exposed: bool, users: Mapping[str, str]) -> tuple[dict[str, str], str | None]:
    """The logins to use, and the password that was made up: a server that others can reach (`exposed`) never runs without one.

    The caller prints the password once, with the user name `admin`; it is new at each start and kept nowhere.
    """
    if users or not exposed:
        return dict(users), None
    letters = "abcdefghjkmnpqrstuvwxyz23456789"  # none that is mistaken for another when typed on a phone; 16 of 31: 79 bits
    password = "-".join("".join(secrets.choice(letters) for _ in range(4)) for _ in range(4))
    return {"admin": password}, password


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text)  # the same name typed on a Mac and on Windows


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _mac(key: str, text: str) -> str:
    return hmac.new(key.encode(), _normal(text).encode("utf-8", "surrogatepass"), "sha256").hexdigest()


class _Throttle:
    """Slows guessing down: after some failures each further attempt must wait, twice as long each time.

    Names are counted in a fixed number of buckets by a secret hash: memory is bounded, and an unknown name behaves like a known one.
    """

    BUCKETS, FORGET = 1024, 900.0
    PER_NAME = (5, 60.0)  # free failures, longest wait in seconds
    IN_ALL = (50, 2.0)  # many names tried from everywhere; short, for the honest wait too

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._secret = secrets.token_hex()
        self._failures: dict[int, tuple[int, float]] = {}
        self._lock = threading.Lock()

    def attempt(self, user: str) -> None:
        """Count an attempt, as failed until `passed` says otherwise. Raises Busy when it comes too early; then it is not counted."""
        with self._lock:
            keys = {self._bucket(user): self.PER_NAME, -1: self.IN_ALL}
            wait = max(self._wait(key, *limits) for key, limits in keys.items())
            if wait > 0:
                raise Busy(f"Too many failed logins. Try again in {math.ceil(wait)} seconds.", retry_after=math.ceil(wait))
            for key in keys:
                self._failures[key] = (self._count(key) + 1, self._now())

    def passed(self, user: str) -> None:
        """The attempt was right."""
        with self._lock:
            self._failures.pop(self._bucket(user), None)
            self._failures[-1] = (max(0, self._count(-1) - 1), self._now())

    def _bucket(self, user: str) -> int:
        return int(_mac(self._secret, user), 16) % self.BUCKETS

    def _count(self, key: int) -> int:
        count, last = self._failures.get(key, (0, 0.0))
        return count if 0 <= self._now() - last < self.FORGET else 0  # also when the clock was set back

    def _wait(self, key: int, free: int, longest: float) -> float:
        over = self._count(key) - free
        if over < 0:
            return 0.0
        return self._failures[key][1] + min(longest, 2.0 ** min(over, 10)) - self._now()


@dataclass(frozen=True)
class _Login:
    """What is kept of a session. `check`: HMAC of the password under the token, which is not kept: a changed password ends the session."""

    user: str
    check: str
    created: float
    expires: float


class _SessionFile:
    """Sessions by the hash of their token, in memory and in a JSON file (mode 0600). `path` None: in memory only. Safe from any thread."""

    def __init__(self, path: Path | None, now: Callable[[], float]) -> None:
        self._path, self._now, self._lock = path, now, threading.Lock()
        self.installation, self._logins = self._load()
        self._save()

    def get(self, key: str) -> _Login | None:
        """The unexpired session; its expiry moves on with use, written at most once a day."""
        with self._lock:
            login = self._logins.get(key)
            if login is None or login.expires <= self._now():
                return None
            if login.expires < self._now() + SESSION_SECONDS - DAY:
                login = self._logins[key] = replace(login, expires=self._now() + SESSION_SECONDS)
                self._save()
            return login

    def put(self, key: str, user: str, check: str) -> None:
        """Begin a session; the longest unused one goes when there are too many."""
        with self._lock:
            self._logins[key] = _Login(user, check, self._now(), self._now() + SESSION_SECONDS)
            self._save()

    def drop(self, key: str) -> None:
        """End a session."""
        with self._lock:
            if self._logins.pop(key, None):
                self._save()

    def _load(self) -> tuple[str, dict[str, _Login]]:
        if self._path is None:
            return secrets.token_hex(4), {}
        try:
            return self._read(json.loads(self._path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            aside = self._path.with_name(self._path.name + ".bad")
            reason = type(error).__name__
            logger.warning(
                "The logins in %s are unreadable (%s). The file is kept as %s; everybody must log in again.", self._path, reason, aside.name
            )
            with contextlib.suppress(OSError):  # then the new file replaces it
                os.replace(self._path, aside)
        # Derived, not drawn: after the loss of the file the cookies that browsers hold are still found.
        return _hash(f"{platform.node()}:{self._path.resolve()}")[:8], {}

    def _read(self, data: Any) -> tuple[str, dict[str, _Login]]:
        """Raises ValueError, TypeError, KeyError or AttributeError for any file that this class did not write."""
        installation = data["installation"]
        if not re.fullmatch(r"[0-9a-f]{8}", installation):
            raise ValueError("installation")
        logins = {key: _Login(**value) for key, value in data["sessions"].items()}
        for login in logins.values():
            if not (isinstance(login.user, str) and isinstance(login.check, str) and math.isfinite(login.created + login.expires)):
                raise ValueError("session")
        return installation, logins

    def _save(self) -> None:
        if self._path is None:
            return
        alive = sorted((item for item in self._logins.items() if item[1].expires > self._now()), key=lambda item: item[1].expires)
        self._logins = dict(alive[-MAX_SESSIONS:])
        data = {"installation": self.installation, "sessions": {key: asdict(login) for key, login in self._logins.items()}}
        try:
            write_atomically(self._path, json.dumps(data), mode=0o600)
        except DataError as error:  # a full disk must not keep anybody out
            logger.warning("Logins and logouts since the last one saved are forgotten at a restart. %s", error)


class Auth:
    """The one answer to "who is asking". Safe from any thread.

    `users`: passwords by name, empty when no login is wanted. `sessions_file`: `UserData.sessions`. `cookie_secure`: served over HTTPS.
    """

    def __init__(
        self, users: Mapping[str, str], sessions_file: Path | None, cookie_secure: bool = False, now: Callable[[], float] = time.time
    ) -> None:
        self._users = {_normal(user): password for user, password in users.items()}
        self._secret = secrets.token_hex()
        self._digests = {user: _mac(self._secret, password) for user, password in self._users.items()}
        self._nobody = _mac(self._secret, secrets.token_hex())
        self._sessions = _SessionFile(sessions_file, now)
        self._throttle = _Throttle(now)
        self._secure = cookie_secure
        self.browser_cookie = f"tgw_browser_{self._sessions.installation}"
        self.session_cookie = f"tgw_session_{self._sessions.installation}"

    @property
    def login_required(self) -> bool:
        """Whether logins are configured."""
        return bool(self._users)

    def who(self, request: HasCookies) -> Identity | None:
        """Who asks; None when not logged in or, without logins, for a browser that has no cookie yet (opening the page gives it one)."""
        return self.identify(request.cookies)

    def identify(self, cookies: Mapping[str, str]) -> Identity | None:
        """`who` for bare cookies."""
        if self.login_required:
            token = _token(cookies, self.session_cookie)
            user = self._user_of(token) if token else None
            return Identity(f"user-{user}", _session_key(token)) if token and user else None
        token = _token(cookies, self.browser_cookie)
        return Identity(_browser_owner(token), _session_key(token)) if token else None

    def need(self, request: HasCookies) -> Identity:
        """`who`, for routes. Raises NotLoggedIn."""
        identity = self.who(request)
        if identity is None:
            raise NotLoggedIn("Log in first." if self.login_required else "Reload the page: this browser has sent no cookie of this server.")
        return identity

    def gradio_user(self, request: HasCookies) -> str | None:
        """For Gradio's `auth_dependency`: None refuses. Without logins nobody is refused; Gradio's own handlers then ask `who`."""
        identity = self.who(request)
        if identity is None:
            return None if self.login_required else ""
        return identity.name

    def login(self, user: str, password: str) -> Cookie:
        """A new session's cookie. Raises NotLoggedIn for a wrong name or password (which one is not told), Busy after too many."""
        user, password = _normal(user.strip())[:MAX_FIELD], password[: MAX_FIELD + 1]
        self._throttle.attempt(user)
        right = hmac.compare_digest(_mac(self._secret, password), self._digests.get(user, self._nobody))
        if not right:
            logger.warning("A login failed.")  # without the name: people type passwords there
            raise NotLoggedIn("Wrong name or password. Try again.")
        self._throttle.passed(user)
        token = secrets.token_urlsafe(32)
        self._sessions.put(_hash(token), user, _mac(token, self._users[user]))
        return self._cookie(self.session_cookie, token)

    def logout(self, request: HasCookies) -> Cookie:
        """End the session here and give the cookie that deletes it in the browser."""
        if token := _token(request.cookies, self.session_cookie):
            self._sessions.drop(_hash(token))
        return replace(self._cookie(self.session_cookie, ""), max_age=0)

    def new_browser_cookie(self) -> Cookie:
        """A cookie for a browser without one."""
        return self._cookie(self.browser_cookie, secrets.token_urlsafe(32))

    def page_cookie(self, cookies: Mapping[str, str]) -> Cookie | None:
        """The cookie to send with the page: the valid one again, so that it never expires in use, or a new one; None: not logged in."""
        name = self.session_cookie if self.login_required else self.browser_cookie
        if self.identify(cookies):
            return self._cookie(name, cookies[name])
        return None if self.login_required else self.new_browser_cookie()

    def browser_owner(self, request: HasCookies) -> str | None:
        """Who this browser was before logins were configured: the caller gives those conversations to the user that logs in."""
        token = _token(request.cookies, self.browser_cookie)
        return _browser_owner(token) if token else None

    def forget_browser(self) -> Cookie:
        """Deletes the browser's cookie after its conversations went to a user: the next user of it must not get them."""
        return replace(self._cookie(self.browser_cookie, ""), max_age=0)

    def _cookie(self, name: str, value: str) -> Cookie:
        return Cookie(name, value, secure=self._secure)

    def _user_of(self, token: str) -> str | None:
        login = self._sessions.get(_hash(token))
        if login is None:
            return None
        password = self._users.get(login.user)
        if password is None or not hmac.compare_digest(_mac(token, password).encode(), login.check.encode("utf-8", "replace")):
            self._sessions.drop(_hash(token))  # the password has changed: it must not come back with the old one
            return None
        return login.user


def _token(cookies: Mapping[str, str], name: str) -> str | None:
    value = cookies.get(name, "")
    return value if _TOKEN.fullmatch(value) else None


def _browser_owner(token: str) -> str:
    return "browser-" + _hash(token)[:32]


def _session_key(token: str) -> str:
    return _hash("session:" + token)[:32]
