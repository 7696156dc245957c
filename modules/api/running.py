"""Replies for the event loop: each is written on a thread of its own, and what it says comes here piece by piece.

A client that goes away takes its replies with it: closing the iterator cancels them, and their places in the engine are free within one step.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Send

from modules import tool_calls
from modules.api.requests import Job
from modules.app import App
from modules.backends.base import Backend, CancelToken, Chunk, TokenLogprob
from modules.errors import Busy, UserError
from modules.log import logger
from modules.streams import REPLACED
from modules.text_generation import generate_reply, raw_reply, split_reply
from modules.tool_calls import ToolCall, ToolStream

SILENCE = 15.0
"""Seconds after which a stream that has nothing to say sends a comment, so that nobody in between takes it for dead."""
STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""For the OpenAPI document: that a route answers with a stream where it is asked for one."""
MAX_THREADS = 128
"""That prepare requests, or wait for the model that these need; who comes when all do is told to come again."""
_THREADS: RunVar[CapacityLimiter] = RunVar("tgw-api-threads")
T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """A piece of reply `index`. With `finish_reason` it is its last one."""

    index: int
    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    chunk: Chunk = field(default_factory=Chunk)
    finish_reason: str | None = None
    """stop, length, tool_calls or cancelled."""
    stop: str = ""
    """The stop string that ended it."""
    reasoning_tokens: int = 0
    places: tuple[int, ...] = ()
    """Of each of the chunk's log-probabilities: characters of the raw reply before its token."""


@dataclass
class Counts:
    """Tokens of one reply, as its parts tell them."""

    prompt: int = 0
    cached: int = 0
    """Of the prompt's, those that were not computed again."""
    completion: int = 0
    thought: int = 0

    def seen(self, part: Part) -> None:
        """Take in the next part."""
        chunk = part.chunk
        self.prompt = max(self.prompt, chunk.prompt_tokens)
        self.completion = max(self.completion, chunk.completion_tokens)
        self.thought = max(self.thought, part.reasoning_tokens)
        if chunk.timings:
            self.cached = min(self.prompt, chunk.timings.reused_tokens)


class Gone(Exception):
    """The client is not there any more."""


async def parts(app: App, jobs: Sequence[Job], answer: str = "") -> AsyncIterator[Part]:
    """What the replies say, as it comes, until all have ended. Raises what a reply raises; the others are cancelled then.

    Meanwhile `app.stops` can stop them: by `answer`, the id that the client is told, or by who asked.
    """
    came: asyncio.Queue[Part | BaseException | None] = asyncio.Queue()
    post = _post()
    post.queues.add(came)

    def put(what: Part | BaseException | None) -> None:
        post.put(came, what)

    def write(index: int, job: Job) -> None:
        try:
            for part in _written(app, index, job):
                put(part)
            put(None)
        except BaseException as error:  # noqa: BLE001  a thread's top: whoever waits must hear of it
            put(error)

    for index, job in enumerate(jobs):
        threading.Thread(target=write, args=(index, job), name="api-reply", daemon=True).start()
    left = len(jobs)
    try:
        with app.stops.kept(answer, jobs[0].request.client if jobs else "", [job.request.cancel for job in jobs]):
            while left:
                what = await came.get()
                if isinstance(what, BaseException):
                    raise what
                if what is None:
                    left -= 1
                else:
                    yield what
    finally:
        post.queues.discard(came)
        for job in jobs:
            job.request.cancel.cancel()


def end_all() -> None:
    """End what this event loop's clients wait for with an error that says that the server ends, which they are still told."""
    post = _post()
    if not post.ended.done():
        post.ended.set_result(None)
    for queue in post.queues:
        queue.put_nowait(_ends())


def _ends() -> Busy:
    return Busy("The server is shutting down. Send again when it is back.", retry_after=30)


class _Post:
    """Brings what threads say to queues of an event loop, which is woken once for all that came meanwhile: waking it is the dearest part."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._came: list[tuple[asyncio.Queue[Any], Any]] = []
        self.queues: set[asyncio.Queue[Any]] = set()
        """Those of replies that are being written. For the event loop's own thread."""
        self.ended: asyncio.Future[None] = loop.create_future()
        """Done when the server ends."""

    def put(self, queue: asyncio.Queue[Any], what: Any) -> None:
        """Put `what` into `queue`, from any thread."""
        with self._lock:
            self._came.append((queue, what))
            first = len(self._came) == 1
        if first:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            came, self._came = self._came, []
        for queue, what in came:
            queue.put_nowait(what)


_POSTS: WeakKeyDictionary[asyncio.AbstractEventLoop, _Post] = WeakKeyDictionary()


def _post() -> _Post:
    loop = asyncio.get_running_loop()
    return _POSTS.setdefault(loop, _Post(loop))


def _written(app: App, index: int, job: Job) -> Iterator[Part]:
    """The parts of one reply, on its thread."""
    chunks = generate_reply(app, job.request)
    pieces = raw_reply(chunks, job.request) if job.raw else split_reply(chunks, job.request, job.prompt, names=job.names)
    tools = ToolStream(job.tools, job.template) if job.tools and not job.forced else None
    text, called, silent = [], False, True
    for piece in pieces:
        deltas = tools.feed(piece.text) if tools and piece.text else []
        if tools and piece.chunk.finish_reason:
            deltas += tools.finish()
        if job.one_call:
            deltas = [] if called else deltas[: next((place for place, delta in enumerate(deltas, 1) if delta.call), len(deltas))]
        calls = tuple(delta.call for delta in deltas if delta.call)
        said = "".join(delta.text for delta in deltas) if tools else piece.text
        if job.forced:
            text.append(said)
            said = ""
            if piece.chunk.finish_reason:
                calls = tuple(tool_calls.parse_forced("".join(text), job.tools))
        called = called or bool(calls)
        if called and job.one_call:
            job.request.cancel.cancel()
        reason = piece.chunk.finish_reason
        ended = "tool_calls" if called and (reason == "stop" or (reason and job.one_call)) else reason
        # The first one is told whatever it holds: the answer begins, and its client is listened to, while a long prompt is still being read.
        noted = piece.chunk.logprobs or piece.chunk.prompt_logprobs or piece.chunk.queue_position is not None
        if silent or said or piece.reasoning or calls or ended or noted:
            silent = False
            yield Part(index, said, piece.reasoning, calls, piece.chunk, ended, piece.stop, piece.reasoning_tokens, piece.places)


async def begun(stream: AsyncIterator[Part]) -> AsyncIterator[Part]:
    """`stream`, of which the first part is there: what is wrong from the start is raised here, while the answer can still have that status."""
    try:
        first = await anext(stream)
    except StopAsyncIteration:
        return stream

    async def whole() -> AsyncIterator[Part]:
        try:
            yield first
            async for part in stream:
                yield part
        finally:
            await stream.aclose()  # type: ignore[attr-defined]

    return whole()


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; it is cancelled, and Gone raised, when the client goes away meanwhile, or Busy when the server ends."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch, ended = asyncio.ensure_future(work), asyncio.ensure_future(gone()), _post().ended
    awaited: set[asyncio.Future[Any]] = {task, watch, ended}
    try:
        await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _ends() if ended.done() else Gone
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def with_model(request: Request, app: App, wanted: str, work: Callable[[Backend, CancelToken], T]) -> T:
    """What `work` returns: blocking, with the model that a request for `wanted` is answered by, which stays in memory meanwhile.

    It may wait for that model, so its threads are not those of the other routes. Its token is cancelled when the client goes away. Raises Gone,
    NoModel, Busy, ModelError, and what `work` raises.
    """
    cancel, threads = CancelToken(), _threads()
    if not threads.available_tokens:
        raise Busy("Too many requests wait for a model. Try again in a few seconds.", retry_after=5)

    def blocking() -> T:
        with app.models.use(app.models.answering(wanted), cancel) as backend:
            return work(backend, cancel)

    try:
        return await while_there(request, to_thread.run_sync(blocking, limiter=threads))
    finally:
        cancel.cancel()


def _threads() -> CapacityLimiter:
    try:
        return _THREADS.get()
    except LookupError:
        _THREADS.set(limiter := CapacityLimiter(MAX_THREADS))
        return limiter


def event(data: Any, name: str = "") -> bytes:
    """A server-sent event."""
    body = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return (f"event: {name}\n" if name else "").encode() + b"data: " + body.encode("utf-8", "replace") + b"\n\n"


def sse(events: AsyncIterator[bytes], failed: Callable[[UserError], Iterable[bytes]], headers: dict[str, str]) -> StreamingResponse:
    """A stream of events. An error on the way is told by `failed`, and ends it; silence is broken by comments."""
    fixed = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return _EventStream(_told(events, failed), media_type="text/event-stream", headers={**fixed, **headers})


class _EventStream(StreamingResponse):
    """A stream in which silence is broken by comments. A task of its own watches for it: the stream's way costs nothing more."""

    async def stream_response(self, send: Send) -> None:
        """Send it all; what makes the events is closed, whatever happens."""
        now = asyncio.get_running_loop().time
        last = now()

        async def say(body: bytes, more: bool = True) -> None:
            nonlocal last
            last = now()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        async def break_silence() -> None:
            while True:
                if (rest := last + SILENCE - now()) > 0:
                    await asyncio.sleep(rest)
                else:
                    await say(b": keep-alive\n\n")

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        watch = asyncio.ensure_future(break_silence())
        try:
            async for each in self.body_iterator:
                await say(each)  # type: ignore[arg-type]
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            await self.body_iterator.aclose()  # type: ignore[attr-defined]
        await say(b"", more=False)


async def _told(events: AsyncIterator[bytes], failed: Callable[[UserError], Iterable[bytes]]) -> AsyncIterator[bytes]:
    try:
        async for each in events:
            yield each
    except UserError as error:
        for each in failed(error):
            yield each
    except Exception as error:  # noqa: BLE001  the status is sent: this is the only place left to say it
        logger.exception("A streamed reply failed")
        for each in failed(UserError(f"The server made a mistake ({type(error).__name__}). Its terminal has the details.")):
            yield each
    finally:
        await events.aclose()  # type: ignore[attr-defined]


def ignored_headers(jobs: Sequence[Job]) -> dict[str, str]:
    """What is not followed, in a header."""
    return told_headers(jobs[0].ignored if jobs else ())


def told_headers(ignored: Sequence[str]) -> dict[str, str]:
    """Words for what is not followed, in a header."""
    words = "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in "; ".join(ignored)[:1000]).strip()
    return {"X-Ignored": words} if words else {}


def logprob_view(chosen: TokenLogprob, top: int) -> dict[str, Any]:
    """A token with its `top` likeliest alternatives, as OpenAI's chats tell it. The bytes of a part of a character are not known."""

    def view(text: str, logprob: float) -> dict[str, Any]:
        known = None if REPLACED in text else list(text.encode("utf-8", "replace"))
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": known}

    return {**view(chosen.text, chosen.logprob), "top_logprobs": [view(text, logprob) for _, text, logprob in chosen.top[:top]]}
