"""HTTP to the server: one client with its pool of connections, on an event loop in a thread of its own.

A loop, because a task there can be cancelled whatever it waits for (a connection, the first word, the next one): its connection is closed at
once, by which servers notice that nobody wants the answer any more.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as NotInTime
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from modules.backends.base import CancelToken
from modules.connections import is_loopback, retry_after, why
from modules.errors import Busy, EngineDied, ModelError, NotFound, PromptTooLong, UserError

Json = dict[str, Any]
T = TypeVar("T")
MAX_ANSWER = 64 << 20
MAX_LINE = 8 << 20
MAX_STREAM = 1 << 30
MAX_HELD = 1000
"""Events that wait for who reads them; then the server has to wait."""
CONNECT_SECONDS = 10.0


class Refused(Exception):
    """The server answered with an error status. `message` is in its words, made safe to show."""

    def __init__(self, status: int, message: str, retry: float) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.message, self.retry = status, message, retry


class Wire:
    """The way to one server. Methods are called from any thread, none of them that of the loop."""

    def __init__(self, root: str, key: str, timeout: float, parallel: int) -> None:
        """`root`: the address without /v1. `timeout`: seconds without a byte after which an answer is given up."""
        self.root, self.timeout, self._key = root, timeout, key
        self.host = urlsplit(root).netloc
        self._loop = asyncio.new_event_loop()
        self._client = httpx.AsyncClient(
            headers={"User-Agent": "text-generation-webui", **({"Authorization": f"Bearer {key}"} if key else {})},
            timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS, write=60.0),
            limits=httpx.Limits(max_connections=parallel + 4, max_keepalive_connections=parallel),
            follow_redirects=False,
            trust_env=not is_loopback(urlsplit(root).hostname or ""),  # a proxy of the environment is no way to this machine
        )
        self._thread = threading.Thread(target=self._loop.run_forever, name="openai-server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End everything under way, and the thread. A second call does nothing."""
        if self._loop.is_closed():
            return
        with suppress(NotInTime, CancelledError):
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        if not self._thread.is_alive():
            self._loop.close()

    async def _end(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    # --- whole answers ----------------------------------------------------------------------------------------------------------------

    def ask(self, method: str, path: str, body: Json | None = None, cancel: CancelToken | None = None, seconds: float = 0.0) -> Any:
        """The answer's JSON; None when it is none. Raises Refused for an error status, EngineDied, ModelError("cancelled")."""
        future = self.spawn(self._ask(method, path, body))
        if cancel:
            cancel.on_cancel(lambda: _cancel(future))
        try:
            return future.result(seconds or self.timeout + CONNECT_SECONDS)
        except CancelledError:
            raise ModelError("Loading was cancelled." if cancel and cancel.cancelled else "The model was unloaded.") from None
        except NotInTime:
            future.cancel()
            raise EngineDied(f"{self.host} did not answer in time. Look whether that server works, and try again.") from None

    async def _ask(self, method: str, path: str, body: Json | None) -> Any:
        async with self._opened(method, path, body) as response:
            data = await _read(response, MAX_ANSWER)
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            return None

    # --- streams ----------------------------------------------------------------------------------------------------------------------

    def stream(self, path: str, body: Json, ended: Callable[[], None]) -> Stream:
        """Begin a streaming answer. `ended` is called once, on any thread, when its connection is free again."""
        return Stream(self, path, body, ended)

    async def read_events(self, path: str, body: Json, held: queue.SimpleQueue[Any]) -> None:
        """Put each event's JSON into `held`, until the stream says that it ended, or ends."""
        async with self._opened("POST", path, body) as response:
            async for line in _lines(response):
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                try:
                    held.put(json.loads(data))
                except (ValueError, RecursionError):
                    raise EngineDied(f"{self.host} sent something that cannot be read. Look whether it speaks the OpenAI API.") from None
                while held.qsize() > MAX_HELD:
                    await asyncio.sleep(0.02)

    # --- common -----------------------------------------------------------------------------------------------------------------------

    def spawn(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin `work` on the loop. Raises EngineDied once it is closed."""
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:  # the loop is closed
            work.close()
            raise EngineDied("The model was unloaded during this. Load it again on the Model tab.") from None

    def _opened(self, method: str, path: str, body: Json | None) -> _Opened:
        return _Opened(self, self._client.build_request(method, self.root + path, json=body))

    async def send(self, request: httpx.Request) -> httpx.Response:
        """The answer, once its head is there. Raises EngineDied, Refused."""
        response = await self._client.send(request, stream=True)
        if response.status_code == 200:
            return response
        try:
            data = await _read(response, 1 << 20)
        finally:
            await response.aclose()
        raise Refused(response.status_code, self.safe(_message(data)), retry_after(response.headers.get("retry-after"), 2.0))

    def died(self, error: httpx.HTTPError) -> EngineDied:
        """What went wrong with the connection."""
        return EngineDied(f"{self.host}: {why(error)}. Look whether that server runs, and try again.")

    def safe(self, text: str) -> str:
        """`text` from the server fit to be shown: short, printable, without the key."""
        shown = text.replace(self._key, "…") if self._key else text
        return "".join(c if c.isprintable() else " " for c in shown)[:300].strip().rstrip(".")


class _Opened:
    """An answer that is closed in any case."""

    def __init__(self, wire: Wire, request: httpx.Request) -> None:
        self._wire, self._request = wire, request
        self._response: httpx.Response | None = None

    async def __aenter__(self) -> httpx.Response:
        try:
            self._response = await self._wire.send(self._request)
        except httpx.HTTPError as error:
            raise self._wire.died(error) from None
        return self._response

    async def __aexit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self._response:
            await self._response.aclose()
        if isinstance(error, httpx.HTTPError):
            raise self._wire.died(error) from None


class Stream:
    """A streaming answer, read by one thread."""

    def __init__(self, wire: Wire, path: str, body: Json, ended: Callable[[], None]) -> None:
        self._wire = wire
        self._held: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._ended = ended
        self._future = wire.spawn(wire.read_events(path, body, self._held))
        self._future.add_done_callback(self._done)

    def _done(self, _future: Future[None]) -> None:
        self._ended()
        self._held.put(_END)

    def next(self) -> Json | None:
        """The next event; None at the end, also after `close`. Raises Refused, EngineDied."""
        try:
            event = self._held.get(timeout=self._wire.timeout + CONNECT_SECONDS)
        except queue.Empty:
            self.close()
            raise EngineDied(f"{self._wire.host} said nothing for {self._wire.timeout:.0f} seconds. Look whether it works, and try again.") from None
        if event is not _END:
            return event if isinstance(event, dict) else {}
        if not self._future.cancelled() and (error := self._future.exception()):
            raise error
        return None

    def close(self) -> None:
        """End it: the connection is closed soon, who reads is woken. From any thread."""
        _cancel(self._future)


_END = object()


def _cancel(future: Future[Any]) -> None:
    with suppress(RuntimeError):  # the loop is closed, and all its tasks with it
        future.cancel()


def error_of(refused: Refused, host: str, model: str) -> UserError:
    """What a person is told when the server refuses a reply."""
    status, said = refused.status, f" It says: {refused.message}." if refused.message else ""
    if status in (429, 503):
        return Busy(f"{host} has no place now.{said}", max(refused.retry, 0.1))
    if status in (401, 403):
        return ModelError(f"{host} does not take the key. Set OPENAI_SERVER_KEY, or OPENAI_SERVER_KEY_FILE, and start again.{said}")
    if status == 404:
        return NotFound(f"{host} does not know the model {model!r}, or has no such route. Check the model's name.{said}")
    if 300 <= status < 400:
        return ModelError(f"{host} sends us elsewhere, which is not followed. Correct the address (--server-url).")
    if status >= 500:
        return EngineDied(f"{host} failed (status {status}). Try again; its own log has the details.{said}")
    low = refused.message.lower()
    if "context" in low and any(word in low for word in ("exceed", "maximum", "length", "too long", "larger", "fits")):
        return PromptTooLong(f"The prompt and the reply do not fit the context of {host}. Shorten the text, or set server_context.{said}")
    return ModelError(f"{host} refuses the request (status {status}).{said} Change what it names.")


async def _read(response: httpx.Response, most: int) -> bytes:
    data = bytearray()
    async for piece in response.aiter_bytes():
        data += piece
        if len(data) > most:
            raise EngineDied("The server's answer is too long. Look whether it speaks the OpenAI API.")
    return bytes(data)


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Lines of bounded length of a stream of bounded length."""
    held, total = bytearray(), 0
    async for piece in response.aiter_bytes():
        total += len(piece)
        held += piece
        if b"\n" in piece:
            *lines, rest = bytes(held).split(b"\n")
            held = bytearray(rest)
            for line in lines:
                yield line.rstrip(b"\r")
        if len(held) > MAX_LINE or total > MAX_STREAM:
            raise EngineDied("The server's answer is too long. Look whether it speaks the OpenAI API.")
    if held:
        yield bytes(held)


def _message(data: bytes) -> str:
    """The words of an error's body: OpenAI's form, or FastAPI's, or plain text."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return data.decode("utf-8", "replace")[:300]
    error = body.get("error", body.get("detail", body.get("message", ""))) if isinstance(body, dict) else body
    if isinstance(error, dict):
        error = error.get("message", "")
    return error if isinstance(error, str) else json.dumps(error)[:300]
