"""The web server's own part: ports and their errors, addresses, the tunnel."""

import errno
import socket
import threading

import pytest

from modules import auth, system
from modules.errors import InUse, SettingsError
from modules.guard import Guard, Hosts
from modules.settings import Settings
from modules.ui import serve
from tests.fakes import until
from tests.ui.live import free_port, live_app


@pytest.fixture
def bound():
    listeners = []

    def bind(**values):
        listeners.append(serve.bind(Settings(**values)))
        return listeners[-1]

    yield bind
    for listener in listeners:
        listener.close()


def test_a_named_port_is_taken_or_refused_with_the_fix(bound):
    port = free_port()
    assert bound(listen_port=port).getsockname() == ("127.0.0.1", port)
    with pytest.raises(InUse, match=rf"Port {port} is in use by another program\..*--listen-port"):
        bound(listen_port=port)


def test_without_one_the_next_free_port_is_found(bound, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(serve, "DEFAULT_PORT", taken.getsockname()[1])
        assert bound().getsockname()[1] > serve.DEFAULT_PORT
        monkeypatch.setattr(serve, "PORTS_TRIED", 1)
        with pytest.raises(InUse, match=r"are all in use.*--listen-port"):
            bound()


def test_small_messages_are_sent_at_once(bound):
    """asyncio turns Nagle's algorithm off only for sockets that name TCP; with it each answer would wait 40 ms for an acknowledgement."""
    listener = bound(listen_port=free_port())
    with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
        assert accepted.proto == socket.IPPROTO_TCP


def test_listen_opens_every_address_and_listen_host_one(bound):
    assert bound(listen=True, listen_port=free_port()).getsockname()[0] == "0.0.0.0"
    assert bound(listen=True, listen_host="127.0.0.1", listen_port=free_port()).getsockname()[0] == "127.0.0.1"


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_an_ipv6_address(bound):
    try:
        listener = bound(listen_host="::1", listen_port=free_port())
    except SettingsError:
        pytest.skip("no IPv6 loopback here")
    assert serve.address(Settings(), listener) == f"http://[::1]:{listener.getsockname()[1]}/"


def test_an_address_that_is_not_of_this_machine(bound):
    with pytest.raises(SettingsError, match=r"Cannot listen on 192\.0\.2\.1: .*--listen-host"):
        bound(listen_host="192.0.2.1", listen_port=free_port())


@pytest.mark.parametrize(
    ("error", "raised", "told"),
    [(PermissionError(errno.EACCES, "denied"), SettingsError, "above 1023"), (OSError(next(iter(system.ADDRESS_IN_USE)), "used"), InUse, "in use")],
)
def test_a_port_that_the_system_refuses(error, raised, told, monkeypatch):
    def refuse(*_):
        raise error

    monkeypatch.setattr(serve.system, "claim_port", lambda listener: None)
    monkeypatch.setattr(serve.socket.socket, "bind", refuse)
    with pytest.raises(raised, match=told):
        serve.bind(Settings(listen_port=80))


@pytest.mark.parametrize(
    ("values", "shape"),
    [
        ({}, "http://127.0.0.1:{}/"),
        ({"listen": True}, "http://127.0.0.1:{}/"),
        ({"subpath": "/chat/me/"}, "http://127.0.0.1:{}/chat/me/"),
        ({"subpath": "/"}, "http://127.0.0.1:{}/"),
        ({"ssl_certfile": "c", "ssl_keyfile": "k"}, "https://127.0.0.1:{}/"),
    ],
)
def test_the_address_to_open(values, shape, bound):
    listener = bound(**values, listen_port=free_port())
    assert serve.address(Settings(**values), listener) == shape.format(listener.getsockname()[1])


@pytest.fixture
def guard():
    async def nothing(scope, receive, send):
        raise AssertionError

    return Guard(nothing, auth.Auth({"ann": "pw"}, None), Hosts.build(False))


def test_the_tunnels_name_is_one_of_ours_once_it_stands(guard, monkeypatch, caplog):
    asked = []
    monkeypatch.setattr("gradio.networking.setup_tunnel", lambda *arguments: asked.append(arguments[:2]) or "https://abc.gradio.live")
    assert not guard.hosts.allow("abc.gradio.live")
    serve._share(guard, "http://127.0.0.1:7861/")
    assert asked == [("127.0.0.1", 7861)] and guard.hosts.allow("abc.gradio.live") and not guard.hosts.allow("gradio.live")


def test_a_tunnel_that_fails_costs_nothing_else(guard, monkeypatch):
    def fail(*_):
        raise RuntimeError("no way out")

    errors = []
    monkeypatch.setattr("gradio.networking.setup_tunnel", fail)
    monkeypatch.setattr(serve.logger, "error", lambda *words: errors.append(words[0] % words[1:]))
    before = guard.hosts
    serve._share(guard, "http://127.0.0.1:7861/")
    assert guard.hosts == before and errors == ["The tunnel could not be opened: no way out. The page works on this machine only."]


def test_browser_and_tunnel_only_when_asked_for(guard, monkeypatch, tmp_path):
    opened, shared = [], threading.Event()
    monkeypatch.setattr(serve.system, "open_browser", opened.append)
    monkeypatch.setattr(serve, "_share", lambda *_: shared.set())
    with live_app(tmp_path / "quiet") as live:
        serve._up(live.app, guard, "http://127.0.0.1:1/")
    assert opened == [] and not shared.is_set()
    with live_app(tmp_path / "loud", "--auto-launch", "--share") as live:
        serve._up(live.app, guard, "http://127.0.0.1:1/")
    assert opened == ["http://127.0.0.1:1/"]
    until(shared.is_set)
