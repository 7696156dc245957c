"""What all outgoing connections share: which addresses may be asked, in words why one does not answer, and ending one from another thread.

No request is made here, and importing this loads no HTTP library.
"""

from __future__ import annotations

import ipaddress
import math
import socket
from contextlib import suppress
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from modules.errors import SettingsError

if TYPE_CHECKING:
    import httpx

MAX_RETRY_AFTER = 300.0
"""Seconds: no server may keep us waiting longer by what it says."""


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine, by name or number."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def checked_url(url: str, what: str, http_allowed: bool) -> str:
    """`url` without a slash at its end. Raises SettingsError unless it is https, or http where that is allowed, without a name or password in it."""
    try:
        parts = urlsplit(url.strip())
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        host, parts = "", urlsplit("")
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise SettingsError(f"{what} must be an address like https://example.org. Correct it.")
    if parts.username is not None or parts.password is not None:
        raise SettingsError(f"{what} must not hold a name or password. Leave them out of the address.")
    if parts.scheme == "http" and not (http_allowed or is_loopback(host)):
        raise SettingsError(f"{what} must begin with https://.")
    return url.strip().rstrip("/")


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port: a secret for one of these is told to no other."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or {"https": 443}.get(parts.scheme, 80)


def retry_after(value: str | None, otherwise: float) -> float:
    """Seconds that a Retry-After header asks to wait, bounded; `otherwise` when there is none that can be read."""
    if not value:
        return otherwise
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(timezone.utc)).total_seconds()
        except (ValueError, TypeError):
            return otherwise
    return otherwise if math.isnan(seconds) else min(max(seconds, 0.0), MAX_RETRY_AFTER)


def why(error: Exception) -> str:
    """What is wrong with a connection, in a few words and without its address, which may hold secrets."""
    import httpx

    if isinstance(error, httpx.ConnectTimeout | httpx.ReadTimeout | httpx.WriteTimeout | httpx.PoolTimeout):
        return "no answer in time"
    if isinstance(error, httpx.ConnectError):
        text = str(error)
        return "its certificate is not trusted" if "CERTIFICATE" in text else "no connection"
    return "the connection broke"


def end(response: httpx.Response) -> None:
    """End a streaming answer from any thread: who reads it gets an error at once. Reading goes on in its own thread, which closes the answer."""
    stream = response.extensions.get("network_stream")
    connection = stream.get_extra_info("socket") if stream is not None else None
    if connection is not None:
        with suppress(OSError):  # already ended
            socket.socket.shutdown(connection, socket.SHUT_RDWR)  # not the method of a TLS socket, which another thread must not call
