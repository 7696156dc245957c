"""Ports: taking one, and what a browser on this machine calls it."""

from __future__ import annotations

import socket

from modules import system
from modules.errors import InUse, SettingsError
from modules.settings import Settings


def host_of(settings: Settings) -> str:
    """The address to listen on."""
    return settings.listen_host or ("0.0.0.0" if settings.listen else "127.0.0.1")


def claim(host: str, port: int, flag: str = "--listen-port") -> socket.socket:
    """A listening socket; `flag` is named in what is raised: InUse or SettingsError with the fix."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, or asyncio leaves Nagle's delay of 40 ms on
    system.claim_port(listener)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except PermissionError:
        listener.close()
        raise SettingsError(f"Port {port} needs more rights than this account has. Give a {flag} above 1023.") from None
    except OSError as error:
        listener.close()
        if error.errno not in system.ADDRESS_IN_USE:
            raise SettingsError(f"Cannot listen on {host}: {error.strerror}. Correct --listen-host.") from None
        raise InUse(f"Port {port} is in use by another program. End that one, or choose another port with {flag}.") from None
    return listener


def address(settings: Settings, listener: socket.socket, subpath: str | None = None) -> str:
    """The page's address for a browser on this machine; with `subpath` that of another one there."""
    host, port = listener.getsockname()[:2]
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"{'https' if settings.ssl_certfile else 'http'}://{shown}:{port}{settings_path(settings) if subpath is None else subpath}/"


def settings_path(settings: Settings) -> str:
    """The path under which a proxy shows the page, with a slash before it; "" for none."""
    return f"/{settings.subpath.strip('/')}" if settings.subpath.strip("/") else ""
