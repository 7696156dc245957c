"""The API's application, and the server of its own port."""

from __future__ import annotations

import hashlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.responses import Response

from modules.api import anthropic, management, openai, responses
from modules.api.errors import anthropic_body, anthropic_error, documented, headers_of, openai_body, openai_error, status_of, what_is_wrong
from modules.api.keys import OPEN, ApiGuard, Keys, check_settings
from modules.api.limits import BodyLimit
from modules.api.running import Gone, end_all
from modules.app import App
from modules.errors import UserError
from modules.guard import ASGIApp, Hosts
from modules.listening import address, claim, host_of
from modules.log import logger
from modules.settings import Settings

MAX_BODY_BYTES = 64 * 2**20
"""Of one request: images come within it."""


def build_api(app: App, hosts: Callable[[], Hosts]) -> ASGIApp:
    """The whole ASGI application, behind its guard. `hosts`: the names that it answers to, now."""
    settings = app.settings
    api = FastAPI(
        title="Text Generation Web UI",
        version="1",
        description="A drop-in for OpenAI's and Anthropic's APIs, for the models of this machine.",
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        telemetry={"auto_configure": False},
    )
    api.include_router(openai.build_router(app, _client))
    api.include_router(responses.build_router(app, _client))
    api.include_router(anthropic.build_router(app, _client))
    api.include_router(management.build_router(app, _client))
    _add_errors(api)
    describe = api.openapi
    api.openapi = lambda: api.openapi_schema or documented(describe(), OPEN)  # type: ignore[method-assign]
    return ApiGuard(BodyLimit(api, lambda _: MAX_BODY_BYTES), Keys.build(settings), hosts, settings.cors_origin)


def _client(request: Request) -> str:
    """Who asks: requests of different clients take turns. Those with one key from one address are one."""
    key = request.headers.get("authorization") or request.headers.get("x-api-key") or ""
    address = request.client.host if request.client else ""
    return "api:" + hashlib.sha256(f"{key} {address}".encode()).hexdigest()[:16]


def _add_errors(api: FastAPI) -> None:
    """Every error has the form of the API that its route belongs to."""

    def answer(request: Request, status: int, openai_form: Any, anthropic_form: Any, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse(anthropic_form if request.url.path.startswith("/v1/messages") else openai_form, status, headers)

    @api.exception_handler(UserError)
    def user_error(request: Request, error: UserError) -> JSONResponse:
        return answer(request, status_of(error), openai_error(error), anthropic_error(error), headers_of(error))

    @api.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        text, param = what_is_wrong(error.errors(), error.body)
        if isinstance(error.body, bytes) and error.body and "json" not in request.headers.get("content-type", ""):
            text = "The body is not read as JSON: send the header 'Content-Type: application/json' with it."
        return answer(request, 400, openai_body(400, text, "invalid_request", param), anthropic_body(400, text))

    @api.exception_handler(AnyHTTPException)
    def refused(request: Request, error: AnyHTTPException) -> JSONResponse:
        words = {404: "There is no such route. GET /openapi.json lists those there are.", 405: "This route takes another method."}
        text = words.get(error.status_code, f"The request is not as expected: {error.detail}.")
        return answer(request, error.status_code, openai_body(error.status_code, text), anthropic_body(error.status_code, text))

    @api.exception_handler(Gone)
    def gone(request: Request, error: Gone) -> Response:
        return Response(status_code=499)  # nobody reads it

    @api.exception_handler(Exception)
    def broken(request: Request, error: Exception) -> JSONResponse:  # uvicorn logs it with its traceback
        text = f"The server made a mistake ({type(error).__name__}). Its terminal has the details."
        return answer(request, 500, openai_body(500, text, "internal_error"), anthropic_body(500, text))


class _Server(uvicorn.Server):
    async def shutdown(self, sockets: Any = None) -> None:
        """Clients of replies that are being written are told before their connections are closed."""
        end_all()
        await super().shutdown(sockets)


class ApiServer:
    """A server of the API on its own port, in a thread with an event loop of its own: the page and the API do not wait for each other."""

    def __init__(self, api: ASGIApp, listener: Any, **options: Any) -> None:
        """`options`: further ones of uvicorn, as for TLS."""
        config = uvicorn.Config(api, log_level="warning", access_log=False, timeout_graceful_shutdown=3, server_header=False, ws="none", **options)
        self._server = _Server(config)
        self._thread = threading.Thread(target=self._run, args=(listener,), name="api", daemon=True)

    @property
    def started(self) -> bool:
        """Whether it answers."""
        return self._server.started

    def start(self) -> None:
        """Serve, until `stop`."""
        self._thread.start()

    def stop(self) -> None:
        """End it, and wait for that."""
        self._server.should_exit = True
        self._thread.join(10)

    def _run(self, listener: Any) -> None:
        self._server.run(sockets=[listener])


def tls(settings: Settings) -> dict[str, Any]:
    """Uvicorn's options for the certificate of the settings."""
    return {"ssl_keyfile": settings.ssl_keyfile or None, "ssl_certfile": settings.ssl_certfile or None}


@contextmanager
def api_served(app: App, hosts: Callable[[], Hosts]) -> Iterator[ASGIApp | None]:
    """The API, served on its own port meanwhile; None without --api. Raises InUse, SettingsError."""
    settings = app.settings
    if not settings.api and not settings.nowebui:
        yield None
        return
    check_settings(settings)
    api = build_api(app, hosts)
    listener = claim(host_of(settings), settings.api_port, "--api-port")
    server = ApiServer(api, listener, **tls(settings))
    server.start()
    logger.info("The API is at %s", address(settings, listener, subpath="") + "v1")
    try:
        yield api
    finally:
        server.stop()


def serve_alone(app: App) -> None:
    """Serve the API without a page, until a signal ends it (--nowebui). Raises InUse, SettingsError."""
    hosts = Hosts.build(app.settings.listen, app.settings.listen_host, app.settings.allowed_hosts)
    ended = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: ended.set())
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with api_served(app, lambda: hosts):
        ended.wait()
