"""The web server: our routes first, then Gradio's page, behind the guard; its port, TLS, tunnel and browser. Returns when it is told to end."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import gradio
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException

from modules import system, transfer
from modules.app import App
from modules.auth import Auth
from modules.errors import Busy, InUse, SettingsError, UserError
from modules.guard import ASGIApp, Guard, Hosts, Message, Receive, Scope, Send
from modules.log import logger
from modules.settings import Settings
from modules.ui.branches import shown_values
from modules.ui.i18n import Speaking
from modules.ui.login import login_router
from modules.ui.page import appearance, build_page
from modules.ui.routes import build_router

DEFAULT_PORT = 7860
PORTS_TRIED = 100
MAX_BODY_BYTES = 16 * 2**20
"""Of one request, Gradio's too: the longest message that is taken, in UTF-8, and room to spare."""


def build_server(app: App, auth: Auth, hosts: Hosts) -> Guard:
    """The whole ASGI application."""
    api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, telemetry={"auto_configure": False})
    api.include_router(login_router(auth, app.store.change_owner))
    api.include_router(build_router(app, auth))
    _add_errors(api)
    api.add_middleware(BodyLimit)

    def session_values(request: Any, conversation: str = "") -> dict[str, Any]:
        return shown_values(app, auth.need(request), conversation)

    api.add_middleware(Speaking, values=session_values)
    page = build_page(app, session_values)
    gradio.mount_gradio_app(
        api,
        page,
        path="/",
        auth_dependency=auth.gradio_user,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        max_file_size=MAX_BODY_BYTES,
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
        **appearance(),
    )
    return Guard(api, auth, hosts)


def _add_errors(api: FastAPI) -> None:
    """Every error answers {"error": {"code", "message"}}; the message is for the person."""

    @api.exception_handler(UserError)
    def user_error(_: Request, error: UserError) -> JSONResponse:
        headers = {"Retry-After": str(round(error.retry_after))} if isinstance(error, Busy) else {}
        return _error(error.status, error.code, str(error), headers)

    @api.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return _error(400, "InvalidRequest", f"The request is not as expected: {where}: {first['msg']}.")

    @api.exception_handler(AnyHTTPException)
    def refused(_: Request, error: AnyHTTPException) -> JSONResponse:
        return _error(error.status_code, "InvalidRequest", f"The request is not as expected: {error.detail}.")

    @api.exception_handler(Exception)
    def broken(_: Request, error: Exception) -> JSONResponse:  # uvicorn logs it with its traceback
        return _error(500, "InternalError", f"The server made a mistake ({type(error).__name__}). The terminal has the details.")


class BodyLimit:
    """ASGI middleware: a body of more than MAX_BODY_BYTES (of an import: its own limit) is not read to its end; its route answers 413."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count what the route receives. A route that reads no body is not disturbed by a long one."""
        taken, most = 0, transfer.MAX_BYTES if scope.get("path", "").endswith("/chat/import") else MAX_BODY_BYTES

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > most:
                raise HTTPException(413, f"a request of more than {most >> 20} MB. Send less at once")
            return message

        await self.app(scope, counted if scope["type"] == "http" else receive, send)


def _error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"code": code, "message": message}}, status, headers)


# --- listening ----------------------------------------------------------------------------------------------------------------------


def bind(settings: Settings) -> socket.socket:
    """A listening socket on the configured port, or on 7860 or the next free one. Raises InUse or SettingsError with the fix."""
    host = settings.listen_host or ("0.0.0.0" if settings.listen else "127.0.0.1")
    if settings.listen_port:
        return _bind(host, settings.listen_port)
    for port in range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED):
        try:
            return _bind(host, port)
        except InUse:
            continue
    raise InUse(f"Ports {DEFAULT_PORT} to {DEFAULT_PORT + PORTS_TRIED - 1} are all in use. End a program that holds one, or give --listen-port.")


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, or asyncio leaves Nagle's delay of 40 ms on
    system.claim_port(listener)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except PermissionError:
        listener.close()
        raise SettingsError(f"Port {port} needs more rights than this account has. Give a --listen-port above 1023.") from None
    except OSError as error:
        listener.close()
        if error.errno not in system.ADDRESS_IN_USE:
            raise SettingsError(f"Cannot listen on {host}: {error.strerror}. Correct --listen-host.") from None
        raise InUse(f"Port {port} is in use by another program. End that one, or choose another port with --listen-port.") from None
    return listener


def address(settings: Settings, listener: socket.socket) -> str:
    """The page's address for a browser on this machine."""
    host, port = listener.getsockname()[:2]
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"{'https' if settings.ssl_certfile else 'http'}://{shown}:{port}{_subpath(settings)}/"


def _subpath(settings: Settings) -> str:
    return f"/{settings.subpath.strip('/')}" if settings.subpath.strip("/") else ""


def serve(app: App, auth: Auth) -> None:
    """Serve until a signal ends it. Raises InUse, SettingsError."""
    settings = app.settings
    listener = bind(settings)
    guard = build_server(app, auth, Hosts.build(settings.listen, settings.listen_host, settings.allowed_hosts))
    app.models.listen(app.replies.wake)
    config = uvicorn.Config(
        guard,
        log_level="warning",
        access_log=False,
        root_path=_subpath(settings),
        ssl_keyfile=settings.ssl_keyfile or None,
        ssl_certfile=settings.ssl_certfile or None,
        ws_max_size=2**17,
        timeout_graceful_shutdown=3,
        server_header=False,
    )
    server = _Server(config, lambda: _up(app, guard, address(settings, listener)))
    server.run(sockets=[listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, up: Callable[[], None]) -> None:
        super().__init__(config)
        self._up = up

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._up()


def _up(app: App, guard: Guard, url: str) -> None:
    logger.info("The page is at %s", url)
    if app.settings.auto_launch:
        system.open_browser(url)
    if app.settings.share:
        threading.Thread(target=_share, args=(guard, url), name="share", daemon=True).start()


def _share(guard: Guard, url: str) -> None:
    """Open Gradio's tunnel, which fetches a program from Gradio's servers: done only when asked for, and only with a login."""
    import secrets
    from urllib.parse import urlsplit

    from gradio import networking

    try:
        parts = urlsplit(url)
        public = networking.setup_tunnel(parts.hostname, parts.port, secrets.token_urlsafe(32), None, None)
    except Exception as error:  # noqa: BLE001  a thread's top; the local page goes on
        logger.error("The tunnel could not be opened: %s. The page works on this machine only.", error)
        return
    guard.hosts = guard.hosts.plus(urlsplit(public).hostname or "")
    logger.info("The page is published at %s", public)
