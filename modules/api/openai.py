"""OpenAI's routes: chat completions, completions, embeddings, models; and those that exist without anything behind them."""

from __future__ import annotations

import base64
import struct
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from modules.api.errors import NotAvailable, openai_error
from modules.api.limits import StrictRoute
from modules.api.requests import Job, chat_job, completion_jobs, copies, not_asked
from modules.api.running import STREAMS, Counts, Part, begun, event, ignored_headers, logprob_view, parts, sse, told_headers, while_there, with_model
from modules.api.schemas import ChatRequest, CompletionRequest, EmbeddingRequest
from modules.app import App
from modules.backends.base import Backend, CancelToken, Chunk, Embedding, TokenLogprob
from modules.errors import NotFound, UserError
from modules.streams import REPLACED, token_places

Json = dict[str, Any]
Client = Callable[[Request], str]
_ABSENT = {
    "/v1/audio/speech": "speech",
    "/v1/audio/transcriptions": "transcription",
    "/v1/audio/translations": "translation of speech",
    "/v1/images/generations": "image generation",
    "/v1/images/edits": "image editing",
    "/v1/images/variations": "image variations",
    "/v1/moderations": "moderation",
}


def build_router(app: App, client: Client) -> APIRouter:
    """The routes; `client` says who asks."""
    router = APIRouter(route_class=StrictRoute)

    @router.post("/v1/chat/completions", tags=["OpenAI"], responses=STREAMS)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """A reply to a conversation."""
        job = await with_model(request, app, body.model, lambda backend, _: chat_job(app, backend, body, client(request)))
        jobs = copies(job, body.n or 1)
        answer = ChatAnswer(app, body, jobs)
        if body.stream:
            stream = await while_there(request, begun(parts(app, jobs, answer.id)))
            return sse(answer.stream(stream), lambda error: [event(openai_error(error))], ignored_headers(jobs))
        whole = await while_there(request, answer.whole(parts(app, jobs, answer.id)))
        return JSONResponse(whole, headers=ignored_headers(jobs))

    @router.post("/v1/completions", tags=["OpenAI"], responses=STREAMS)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """What follows a text."""
        firsts = await with_model(request, app, body.model, lambda backend, _: completion_jobs(app, backend, body, client(request)))
        jobs = [each for job in firsts for each in copies(job, max(body.n or 1, body.best_of or 1))]
        answer = TextAnswer(app, body, jobs)
        if body.stream:
            stream = await while_there(request, begun(parts(app, jobs, answer.id)))
            return sse(answer.stream(stream), lambda error: [event(openai_error(error))], ignored_headers(jobs))
        whole = await while_there(request, answer.whole(parts(app, jobs, answer.id)))
        return JSONResponse(whole, headers=ignored_headers(jobs))

    @router.post("/v1/embeddings", tags=["OpenAI"])
    async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
        """Vectors of texts."""
        view = await with_model(request, app, body.model, lambda backend, cancel: _embedded(app, backend, body, cancel))
        return JSONResponse(view, headers=told_headers(not_asked(body.model, view["model"])))

    @router.get("/v1/models", tags=["OpenAI"])
    def models() -> Json:
        """All models of the model folder, and which of them is loaded."""
        data = [model_view(app, name) for name in _names(app)]
        ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
        return {"object": "list", "data": data, "has_more": False, **ends}

    @router.get("/v1/models/{name:path}", tags=["OpenAI"])
    def model(name: str) -> Json:
        """One of them."""
        if name not in _names(app):
            raise NotFound(f"There is no model {name[:200]!r} here. GET /v1/models lists those there are.")
        return model_view(app, name)

    for path, what in _ABSENT.items():
        router.add_api_route(path, _absent(what), methods=["POST"], tags=["OpenAI"], response_model=None, status_code=501)
    return router


def _absent(what: str) -> Callable[[], Response]:
    def absent() -> Response:
        raise NotAvailable(f"Nothing here offers {what}.")

    absent.__doc__ = f"Not available: {what}."
    return absent


# --- models -----------------------------------------------------------------------------------------------------------------------------


def _names(app: App) -> list[str]:
    names, loaded = app.models.names(), app.models.status().name
    return names if not loaded or loaded in names else [loaded, *names]


def model_view(app: App, name: str) -> Json:
    """A model as /v1/models tells it, to OpenAI's clients and Anthropic's; what only a loaded one knows is there for that one."""
    backend = app.models.loaded_as(name)
    try:
        created = int(app.models.places.path(name).stat().st_mtime)
    except (UserError, OSError):  # one of another server, or from outside of our places
        created = 0
    view: Json = {"id": name, "object": "model", "created": created, "owned_by": "local", "loaded": backend is not None}
    at = datetime.fromtimestamp(created, UTC).isoformat()
    view |= {"type": "model", "display_name": name, "created_at": at, "lifecycle": "active"}
    if backend:
        view |= {"context_length": backend.context_length, "max_model_len": backend.context_length, "features": sorted(backend.features)}
    return view


# --- chat -------------------------------------------------------------------------------------------------------------------------------


class _Usage:
    """Counts of all replies of one request. Replies to one prompt count it once."""

    def __init__(self, prompts: Sequence[int]) -> None:
        self._prompts = prompts  # of each reply, the number of its prompt
        self._replies = [Counts() for _ in prompts]
        self.timings: Json = {}
        """Those of the reply that ended last, to be added to an answer."""

    def seen(self, part: Part) -> None:
        self._replies[part.index].seen(part)
        if part.chunk.timings:
            self.timings = {"timings": timings_view(part.chunk)}

    def view(self) -> Json:
        firsts = [self._replies[index] for index, number in enumerate(self._prompts) if number not in self._prompts[:index]]
        prompt, completion = sum(each.prompt for each in firsts), sum(each.completion for each in self._replies)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(each.cached for each in firsts), "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": sum(each.thought for each in self._replies),
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }


def timings_view(chunk: Chunk) -> Json:
    """Measured in the engine, under the names of llama.cpp's server."""
    t = chunk.timings
    assert t
    predicted = max(0, chunk.completion_tokens - 1)
    return {
        "queue_ms": round(t.queue_seconds * 1000, 3),
        "cache_n": t.reused_tokens,
        "prompt_n": t.prefill_tokens,
        "prompt_ms": round(t.prefill_seconds * 1000, 3),
        "prompt_per_second": t.prefill_tokens / t.prefill_seconds if t.prefill_seconds else None,
        "predicted_n": chunk.completion_tokens,
        "predicted_ms": round(t.decode_seconds * 1000, 3),
        "predicted_per_second": predicted / t.decode_seconds if t.decode_seconds else None,
        "draft_n": t.draft_tokens,
        "draft_n_accepted": t.accepted_tokens,
    }


class _Answer:
    """What the two kinds of completions have in common."""

    prefix, whole_object, chunk_object = "", "", ""

    def __init__(self, app: App, usage_in_stream: bool, jobs: Sequence[Job], prompts: Sequence[int]) -> None:
        self.jobs = jobs
        self.usage_in_stream = usage_in_stream
        self.counts = _Usage(prompts)
        self.id = f"{self.prefix}{uuid4().hex}"
        self.head = {"id": self.id, "created": int(time.time()), "model": jobs[0].request.model}

    def _whole(self, choices: list[Json]) -> Json:
        fixed = {"object": self.whole_object, "system_fingerprint": None}
        return {**self.head, **fixed, "choices": choices, "usage": self.counts.view(), **self.counts.timings}

    def _chunk(self, choices: list[Json], **more: Any) -> bytes:
        usage: Json = {"usage": None} if self.usage_in_stream else {}
        return event({**self.head, "object": self.chunk_object, "system_fingerprint": None, "choices": choices, **usage, **more})

    def _timings(self) -> Json:
        """For the last chunk of a reply, unless a chunk with the counts follows."""
        return {} if self.usage_in_stream else self.counts.timings

    def _end(self) -> list[bytes]:
        last = [self._chunk([], usage=self.counts.view(), **self.counts.timings)] if self.usage_in_stream else []
        return [*last, event("[DONE]")]


class ChatAnswer(_Answer):
    """The answer to a chat request, whole or in chunks."""

    prefix, whole_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, app: App, body: ChatRequest, jobs: Sequence[Job]) -> None:
        super().__init__(app, body.usage_in_stream, jobs, [0] * len(jobs))
        self.top = (body.top_logprobs or 0) if body.logprobs else None

    async def stream(self, came: AsyncIterator[Part]) -> AsyncIterator[bytes]:
        """The chunks of a stream."""
        for index in range(len(self.jobs)):
            yield self._choice(index, {"role": "assistant", "refusal": None, "content": ""})
        async for part in came:
            self.counts.seen(part)
            if part.reasoning:
                yield self._choice(part.index, {"reasoning_content": part.reasoning})
            logprobs = self._logprobs(part)
            if part.text or logprobs:
                yield self._choice(part.index, {"content": part.text}, logprobs)
            for call in part.calls:
                yield self._choice(part.index, {"tool_calls": [{"index": call.index, **_call_view(call)}]})
            if part.finish_reason:
                yield self._choice(part.index, {}, finish=_reason(part.finish_reason), **self._timings())
        for each in self._end():
            yield each

    async def whole(self, came: AsyncIterator[Part]) -> Json:
        """The whole answer."""
        texts: list[list[Part]] = [[] for _ in self.jobs]
        async for part in came:
            self.counts.seen(part)
            texts[part.index].append(part)
        return self._whole([self._message(index, some) for index, some in enumerate(texts)])

    def _message(self, index: int, some: list[Part]) -> Json:
        text, reasoning = "".join(part.text for part in some), "".join(part.reasoning for part in some)
        calls = [_call_view(call) for part in some for call in part.calls]
        message: Json = {"role": "assistant", "refusal": None, "content": text if text or not calls else None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        content = [entry for part in some for entry in (self._logprobs(part) or {"content": []})["content"]]
        logprobs = None if self.top is None else {"content": content, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": _reason(some[-1].finish_reason if some else None)}

    def _choice(self, index: int, delta: Json, logprobs: Json | None = None, finish: str | None = None, **more: Any) -> bytes:
        return self._chunk([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}], **more)

    def _logprobs(self, part: Part) -> Json | None:
        if self.top is None or not part.chunk.logprobs:
            return None
        return {"content": [logprob_view(each, self.top) for each in part.chunk.logprobs], "refusal": None}


def _call_view(call: Any) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _reason(reason: str | None) -> str:
    return reason if reason in ("length", "tool_calls") else "stop"


# --- completions ------------------------------------------------------------------------------------------------------------------------


class TextAnswer(_Answer):
    """The answer to a completion request, whole or in chunks. Choice p * n + i is reply i to prompt p."""

    prefix, whole_object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def __init__(self, app: App, body: CompletionRequest, jobs: Sequence[Job]) -> None:
        self.n, self.each = body.n or 1, max(body.n or 1, body.best_of or 1)
        super().__init__(app, body.usage_in_stream, jobs, [index // self.each for index in range(len(jobs))])
        self.body = body
        self._prompts: list[list[TokenLogprob]] = [[] for _ in jobs]  # log-probabilities of those that are not told yet

    async def stream(self, came: AsyncIterator[Part]) -> AsyncIterator[bytes]:
        """The chunks of a stream."""
        echoed = [not self.body.echo] * len(self.jobs)
        async for part in self._seen(came):
            if not echoed[part.index] and (part.text or part.chunk.logprobs or part.finish_reason):
                echoed[part.index] = True
                yield self._choice(part.index, self.jobs[part.index].prompt, self._logprobs(part.index, echoed=True))
            logprobs = self._logprobs(part.index, [part])
            if part.text or logprobs:
                yield self._choice(part.index, part.text, logprobs)
            if part.finish_reason:
                yield self._choice(part.index, "", None, _reason(part.finish_reason), **self._timings())
        for each in self._end():
            yield each

    async def whole(self, came: AsyncIterator[Part]) -> Json:
        """The whole answer; of `best_of` replies the likeliest."""
        said: list[list[Part]] = [[] for _ in self.jobs]
        async for part in self._seen(came):
            said[part.index].append(part)
        kept = []
        for first in range(0, len(self.jobs), self.each):
            order: Sequence[int] = range(first, first + self.each)
            if self.each > self.n:
                order = sorted(order, key=lambda index: -_likelihood(said[index]))
            kept += list(order)[: self.n]
        return self._whole([self._choice_of(place, index, said[index]) for place, index in enumerate(kept)])

    async def _seen(self, came: AsyncIterator[Part]) -> AsyncIterator[Part]:
        """What came; with max_tokens 0 without the one token that was needed to have the prompt read."""
        async for part in came:
            if self.body.max_tokens == 0:
                chunk = replace(part.chunk, logprobs=(), completion_tokens=0)
                part = replace(part, text="", chunk=chunk, places=(), finish_reason=part.finish_reason and "length")  # noqa: PLW2901
            self.counts.seen(part)
            self._prompts[part.index] += part.chunk.prompt_logprobs
            yield part

    def _choice_of(self, place: int, index: int, some: list[Part]) -> Json:
        text = "".join(part.text for part in some)
        text = self.jobs[index].prompt + text if self.body.echo else text
        finish = _reason(some[-1].finish_reason) if some else "stop"
        return {"index": place, "text": text, "logprobs": self._logprobs(index, some, self.body.echo), "finish_reason": finish}

    def _choice(self, index: int, text: str, logprobs: Json | None, finish: str | None = None, **more: Any) -> bytes:
        return self._chunk([{"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}], **more)

    def _logprobs(self, index: int, some: Sequence[Part] = (), echoed: bool = False) -> Json | None:
        """Those of the prompt, if it is `echoed`, and of `some` parts of the reply."""
        if self.body.logprobs is None:
            return None
        view: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

        def add(name: str, logprob: float | None, top: Json | None, place: int) -> None:
            for field, value in (("tokens", name), ("token_logprobs", logprob), ("top_logprobs", top), ("text_offset", place)):
                view[field].append(value)

        prompt = self.jobs[index].prompt
        told = [(place, each) for part in some for place, each in zip(part.places, part.chunk.logprobs, strict=True)]
        start = len(prompt) if self.body.echo else 0
        entries = [(start + place, each) for place, each in told]
        if echoed and self.jobs[index].request.prompt:
            first = cast(tuple[int, ...], self.jobs[index].request.prompt)[0]
            text = self.jobs[index].first
            places = token_places(prompt, [text, *(each.text for each in self._prompts[index])])
            add(_token_name(first, text), None, None, places[0])  # nothing stands before it, so it has no probability
            entries = [*zip(places[1:], self._prompts[index], strict=True), *entries]
        for place, each in entries:
            top: Json = {}
            for token, text, logprob in each.top[: self.body.logprobs]:
                name = _token_name(token, text)
                top[name if name not in top else _token_name(token)] = max(logprob, -9999.0)
            add(_token_name(each.token, each.text), max(each.logprob, -9999.0), top, place)
        return view if view["tokens"] else None


def _token_name(token: int, text: str = REPLACED) -> str:
    """The text of a token; its id where that is no whole text, so that each has a name of its own."""
    return f"token_id:{token}" if REPLACED in text else text


def _likelihood(some: Sequence[Part]) -> float:
    """Mean log-probability of a reply's tokens."""
    found = [each.logprob for part in some for each in part.chunk.logprobs]
    return sum(found) / len(found) if found else float("-inf")


# --- embeddings -------------------------------------------------------------------------------------------------------------------------


def _embedded(app: App, backend: Backend, body: EmbeddingRequest, cancel: CancelToken) -> Json:
    name = app.models.name_of(backend)
    if "embeddings" not in backend.features:
        raise UserError("The loaded model gives no embeddings. Load one that does.")
    given = body.input
    texts = [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)
    read: list[str | tuple[int, ...]] = [each if isinstance(each, str) else tuple(cast(list[int], each)) for each in texts]
    found = cast(Embedding, backend).embed(read, cancel)
    if body.dimensions and any(body.dimensions > len(vector) for vector in found.vectors):
        raise UserError(f"The model's vectors have {len(found.vectors[0])} numbers. Ask for at most so many dimensions.")
    data = [{"object": "embedding", "index": place, "embedding": _vector(vector, body)} for place, vector in enumerate(found.vectors)]
    usage = {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
    return {"object": "list", "data": data, "model": name, "usage": usage}


def _vector(vector: Sequence[float], body: EmbeddingRequest) -> list[float] | str:
    if body.dimensions:  # cut and made of length 1 again, as models of this kind are trained for
        cut = vector[: body.dimensions]
        length = sum(each * each for each in cut) ** 0.5 or 1.0
        vector = [each / length for each in cut]
    return list(vector) if body.encoding_format == "float" else base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
