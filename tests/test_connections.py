import socket
import threading
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import httpx
import pytest

from modules.connections import checked_url, end, is_loopback, origin, retry_after, why
from modules.errors import SettingsError
from tests.fakes import WAIT


@pytest.mark.parametrize("url", ["https://example.org/", "http://localhost:8080/v1", "http://127.0.0.9", "http://[::1]:80"])
def test_addresses_that_may_be_asked(url):
    assert checked_url(f" {url} ", "It", False) == url.rstrip("/")


@pytest.mark.parametrize(
    "url",
    ["", "example.org", "ftp://example.org", "file:///etc/passwd", "https://", "https://u:p@example.org", "https://example.org?x=1", "https://[::1",
     "https://example.org:99999", "http://example.org", "http://localhost.example.org"],
)  # fmt: skip
def test_addresses_that_may_not(url):
    with pytest.raises(SettingsError, match=r"^It must"):
        checked_url(url, "It", False)


def test_plain_http_only_where_it_is_allowed():
    assert checked_url("http://example.org", "It", True) == "http://example.org"
    assert is_loopback("127.1.2.3") and is_loopback("[::1]") and not is_loopback("10.0.0.1") and not is_loopback("127.0.0.1.example.org")


def test_origins():
    assert origin("https://Example.org/x") == origin("https://example.org:443/y") != origin("http://example.org/x")


@pytest.mark.parametrize(("value", "seconds"), [("3", 3), ("-1", 0), ("1e9", 300), ("nan", 7), ("soon", 7), ("", 7), (None, 7), ("inf", 300)])
def test_waiting_as_long_as_asked_within_bounds(value, seconds):
    assert retry_after(value, 7) == seconds


def test_waiting_until_a_time():
    at = datetime.now(timezone.utc) + timedelta(seconds=100)
    assert 90 < retry_after(format_datetime(at, usegmt=True), 7) <= 100


def test_a_reader_wakes_when_another_thread_ends_its_answer():
    listener = socket.create_server(("127.0.0.1", 0))
    error, opened, responses = [], threading.Event(), []

    def read():
        try:
            with httpx.stream("GET", f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=WAIT) as response:
                responses.append(response)
                opened.set()
                response.read()
        except httpx.TransportError as raised:
            error.append(raised)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    peer, _ = listener.accept()
    peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
    assert opened.wait(WAIT)
    end(responses[0])
    reader.join(WAIT / 2)
    assert not reader.is_alive() and why(error[0]) == "the connection broke"
    end(responses[0])
    peer.close()
    listener.close()
