"""The web server: our routes first, then Gradio's page, behind the guard; its port, TLS, tunnel and browser. Returns when it is told to end."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import gradio
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException

from modules import system, transfer
from modules.api.limits import BodyLimit
from modules.api.server import api_served, tls
from modules.app import App
from modules.auth import Auth
from modules.errors import Busy, InUse, UserError
from modules.guard import ASGIApp, Guard, Hosts, Receive, Scope, Send, route_path
from modules.listening import address, claim, host_of, settings_path
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
    api.add_middleware(BodyLimit, most=_longest_body)

    def session_values(request: Any, conversation: str = "") -> dict[str, Any]:
        return shown_values(app, auth.need(request), conversation)

    api.add_middleware(Speaking, values=session_values)
    page = build_page(app, auth.need)
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


def _longest_body(path: str) -> int:
    return transfer.MAX_BYTES if path.endswith("/chat/import") else MAX_BODY_BYTES


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


def _error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"code": code, "message": message}}, status, headers)


# --- listening ----------------------------------------------------------------------------------------------------------------------


def bind(settings: Settings) -> socket.socket:
    """A listening socket on the configured port, or on 7860 or the next free one. Raises InUse or SettingsError with the fix."""
    host = host_of(settings)
    if settings.listen_port:
        return claim(host, settings.listen_port)
    for port in range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED):
        try:
            return claim(host, port)
        except InUse:
            continue
    raise InUse(f"Ports {DEFAULT_PORT} to {DEFAULT_PORT + PORTS_TRIED - 1} are all in use. End a program that holds one, or give --listen-port.")


def serve(app: App, auth: Auth) -> None:
    """Serve until a signal ends it. Raises InUse, SettingsError."""
    settings = app.settings
    listener = bind(settings)
    guard = build_server(app, auth, Hosts.build(settings.listen, settings.listen_host, settings.allowed_hosts))
    app.models.listen(app.replies.wake)
    page: ASGIApp = guard
    with api_served(app, lambda: guard.hosts) as api:
        if api and (settings.api_key or not auth.login_required):
            page = _Both(guard, api)
        config = uvicorn.Config(
            page,
            log_level="warning",
            access_log=False,
            root_path=settings_path(settings),
            ws_max_size=2**17,
            timeout_graceful_shutdown=3,
            server_header=False,
            **tls(settings),
        )
        server = _Server(config, lambda: _up(app, guard, address(settings, listener)))
        server.run(sockets=[listener])


class _Both:
    """ASGI application: the API's paths to the API, everything else to the page. With logins this needs an API key, which then takes their place."""

    def __init__(self, page: ASGIApp, api: ASGIApp) -> None:
        self._page, self._api = page, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass it on."""
        ours = scope["type"] == "http" and (path := route_path(scope)) and (path.startswith("/v1/") or path == "/health")
        await (self._api if ours else self._page)(scope, receive, send)


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
