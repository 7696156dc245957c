"""OpenAI's Responses: a reply made of items, kept so that a later request can go on from it. A request becomes a chat request."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal
from uuid import uuid4

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from starlette.responses import Response

from modules.api.errors import BadRequest, words_of
from modules.api.limits import StrictRoute
from modules.api.requests import Job, chat_job, prompt_length
from modules.api.running import STREAMS, Counts, Part, begun, event, ignored_headers, logprob_view, parts, sse, while_there, with_model
from modules.api.schemas import ChatRequest, ResponsesRequest, as_chat
from modules.app import App
from modules.backends.base import Backend
from modules.errors import NotFound, UserError
from modules.log import logger
from modules.store import StoredResponse
from modules.tool_calls import ToolCall

Json = dict[str, Any]
_LOGPROBS = "message.output_text.logprobs"
_TOOL_KEYS = frozenset({"type", "name", "description", "parameters", "strict"})


class PreviousResponseNotFound(BadRequest):
    """`previous_response_id` leads nowhere. OpenAI answers that with status 400 and this code."""


def build_router(app: App, client: Callable[[Request], str]) -> APIRouter:
    """The routes; `client` says who asks."""
    router = APIRouter(route_class=StrictRoute)

    @router.post("/v1/responses", tags=["OpenAI"], responses=STREAMS)
    async def create(request: Request, body: ResponsesRequest) -> Response:
        """A reply to a conversation."""
        asked = await with_model(request, app, body.model, lambda backend, _: _asked(app, backend, body, client(request)))
        headers = ignored_headers([asked.job])
        answer = ResponseAnswer(asked.job.request.model, body, asked.job)

        async def keep() -> None:
            if answer.view["store"]:
                answer.view["store"] = await run_in_threadpool(_kept, app, client(request), asked.items, answer.view)

        if body.stream:
            stream = await while_there(request, begun(parts(app, [asked.job], answer.view["id"])))
            return sse(answer.stream(stream, keep), answer.failed, headers)
        return JSONResponse(await while_there(request, answer.whole(parts(app, [asked.job], answer.view["id"]), keep)), headers=headers)

    @router.get("/v1/responses/{id}", tags=["OpenAI"])
    def retrieve(request: Request, id: str, stream: bool = False) -> Json:
        """A response that was kept."""
        if stream:
            raise BadRequest("stream: a kept response is not streamed again. Leave it out.", "stream")
        return app.store.response(client(request), id).body

    @router.delete("/v1/responses/{id}", tags=["OpenAI"])
    def delete(request: Request, id: str) -> Json:
        """Forget a response; what goes on from it can then not be gone on from."""
        app.store.delete_response(client(request), id)
        return {"id": id, "object": "response", "deleted": True}

    @router.get("/v1/responses/{id}/input_items", tags=["OpenAI"])
    def input_items(
        request: Request,
        id: str,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Json:
        """What a response was asked, without what was before it."""
        items = app.store.response(client(request), id).items[:: 1 if order == "asc" else -1]
        places = {item["id"]: place for place, item in enumerate(items)}
        if after is not None and after not in places:
            raise NotFound(f"There is no item {after[:100]!r} in the input of this response.")
        first = places[after] + 1 if after is not None else 0
        shown = items[first : first + limit]
        ends = {"first_id": shown[0]["id"] if shown else "", "last_id": shown[-1]["id"] if shown else ""}
        return {"object": "list", "data": shown, **ends, "has_more": first + limit < len(items)}

    return router


def _kept(app: App, client: str, items: list[Json], view: Json) -> bool:
    """Whether the response could be kept. One that could not is an answer all the same, and says so."""
    try:
        app.store.save_response(client, StoredResponse(view["id"], view["previous_response_id"], items, view))
    except UserError as error:
        logger.warning("A response is not kept: %s", error)
        return False
    return True


# --- the request ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    job: Job
    items: list[Json]
    """The request's own input."""


def _asked(app: App, backend: Backend, body: ResponsesRequest, client: str) -> _Asked:
    _check(body)
    given = body.input if isinstance(body.input, list) else [{"role": "user", "content": body.input}] if body.input else []
    own = [_item(item, f"input[{place}]") for place, item in enumerate(given)]
    before = _before(app, body.previous_response_id, client)
    fields = _fields(body)

    def job(items: Sequence[Json], fitting: bool) -> Job:
        return chat_job(app, backend, _chat_request(body, items, fields), client, fitting)

    items = [*before, *own]
    if body.truncation == "auto":
        items = _cut(items, lambda some: _fits(backend, body, job(some, False)))
    made = job(items, True)
    return _Asked(replace(made, ignored=(*made.ignored, *_not_followed(body))), own)


def _check(body: ResponsesRequest) -> None:
    for name in ("background", "conversation", "prompt"):
        if getattr(body, name):
            raise BadRequest(f"{name} is not offered here. Leave it out; previous_response_id goes on from an earlier response.", name)
    if not body.input and body.previous_response_id is None:
        raise BadRequest("input is missing: give a text, or a list of items.", "input")


def _not_followed(body: ResponsesRequest) -> list[str]:
    told = [f"{name} is unknown" for name in body.unknown()]
    told += [f"include {name[:100]} is not offered" for name in body.include or () if name != _LOGPROBS]
    told += [f"reasoning.{name} is not followed" for name in sorted(body.reasoning.model_extra or ())] if body.reasoning else []
    told += [f"text.{name} is not followed" for name in sorted(body.text.model_extra or ())] if body.text else []
    told += [f"stream_options.{name} is not followed" for name, value in sorted((body.stream_options or {}).items()) if value]
    return told + [f"tools.{name} is not followed" for name in sorted({key for tool in body.tools or () for key in tool} - _TOOL_KEYS)]


def _before(app: App, previous: str | None, client: str) -> list[Json]:
    """The items of the conversation that the request goes on from."""
    if previous is None:
        return []
    try:
        chain = app.store.response_chain(client, previous)
    except NotFound as error:
        raise PreviousResponseNotFound(str(error), "previous_response_id") from None
    return [item for response in chain for item in (*response.items, *response.body["output"])]


def _fields(body: ResponsesRequest) -> Json:
    """All that the chat request has besides messages."""
    logprobs = bool(body.top_logprobs) or _LOGPROBS in (body.include or ())
    fields = {
        "max_tokens": body.max_output_tokens,
        "logprobs": logprobs or None,
        "top_logprobs": body.top_logprobs if logprobs else None,
        "tools": [_tool(tool, f"tools[{place}]") for place, tool in enumerate(body.tools or ())] or None,
        "tool_choice": body.tool_choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": body.text.format if body.text else None,
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _tool(tool: Json, where: str) -> Json:
    if tool.get("type") != "function":
        raise BadRequest(f"{where}: tools of type {str(tool.get('type'))[:80]!r} are not offered here, only functions. Leave it out.", "tools")
    if not isinstance(tool.get("name"), str) or not tool["name"]:
        raise BadRequest(f'{where} must be {{"type": "function", "name": ..., "parameters": ...}}.', "tools")
    function = {"name": tool["name"], "description": str(tool.get("description") or ""), "parameters": tool.get("parameters")}
    return {"type": "function", "function": function}


def _chat_request(body: ResponsesRequest, items: Sequence[Json], fields: Json) -> ChatRequest:
    told = [{"role": "system", "content": body.instructions}] if body.instructions else []
    return as_chat(body, {"messages": [*told, *_messages(items)], **fields})


def _fits(backend: Backend, body: ResponsesRequest, job: Job) -> bool:
    """Whether there is room for the prompt and for the reply, which may take up to half of the context."""
    context = backend.context_length
    return prompt_length(backend, job) + min(body.max_output_tokens or context // 4, context // 2) <= context


def _cut(items: list[Json], fits: Callable[[list[Json]], bool]) -> list[Json]:
    """`items` without as many of the oldest turns as must go; what the system says stays, and the newest turn."""
    starts = [place for place, item in enumerate(items) if item.get("role") == "user"]
    if len(starts) < 2 or fits(items):
        return items

    def without(count: int) -> list[Json]:
        fixed = [item for item in items[: starts[count]] if item.get("role") in ("system", "developer")]
        return [*fixed, *items[starts[count] :]]

    return without(bisect_left(range(1, len(starts) - 1), True, key=lambda count: fits(without(count))) + 1)


# --- items ------------------------------------------------------------------------------------------------------------------------------


def _item(item: Mapping[str, Any], where: str) -> Json:
    """An item of the input as it is kept and shown: with an id, and its content as parts."""
    kind = item.get("type") or ("message" if "role" in item else None)
    makers = {"message": _message, "function_call": _function_call, "function_call_output": _function_result, "reasoning": _reasoning}
    if not isinstance(kind, str) or kind not in makers:
        what = f"{where}: items of type {str(kind)[:40]!r} cannot be read here"
        raise BadRequest(f"{what}. Send message, function_call, function_call_output and reasoning.", "input")
    prefix, made = makers[kind](item, where)
    given = item.get("id")
    return {**made, "id": given if isinstance(given, str) and given else f"{prefix}_{uuid4().hex}"}


def _message(item: Mapping[str, Any], where: str) -> tuple[str, Json]:
    role, content = item.get("role"), item.get("content")
    if role not in ("user", "assistant", "system", "developer"):
        raise BadRequest(f"{where}.role must be user, assistant, system or developer.", "input")
    content = [{"type": "input_text", "text": content}] if isinstance(content, str) else content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise BadRequest(f"{where}.content must be text or a list of parts.", "input")
    made = [_part(part, role == "assistant") for part in content]
    return "msg", {"type": "message", "role": role, "status": "completed", "content": made}


def _part(part: Json, said: bool) -> Json:
    kind = part.get("type")
    if kind in ("text", "input_text", "output_text"):
        text = str(part.get("text") or "")
        return {"annotations": [], **part, "type": "output_text", "text": text} if said else {**part, "type": "input_text", "text": text}
    return {"detail": "auto", **part} if kind == "input_image" else part


def _function_call(item: Mapping[str, Any], where: str) -> tuple[str, Json]:
    named = {name: item.get(name) for name in ("call_id", "name", "arguments")}
    if not all(isinstance(value, str) for value in named.values()):
        raise BadRequest(f"{where}: a function_call needs call_id, name and arguments.", "input")
    return "fc", {"type": "function_call", "status": "completed", **named}


def _function_result(item: Mapping[str, Any], where: str) -> tuple[str, Json]:
    call, output = item.get("call_id"), item.get("output")
    parts_given = isinstance(output, list) and all(isinstance(part, dict) for part in output)
    if not isinstance(call, str) or not (isinstance(output, str) or parts_given):
        raise BadRequest(f"{where}: a function_call_output needs call_id, and text or parts as output.", "input")
    return "fco", {"type": "function_call_output", "status": "completed", "call_id": call, "output": output}


def _reasoning(item: Mapping[str, Any], where: str) -> tuple[str, Json]:
    for name in ("content", "summary"):
        some = item.get(name) or []
        if not isinstance(some, list) or not all(isinstance(part, dict) for part in some):
            raise BadRequest(f"{where}.{name} must be a list of parts.", "input")
    return "rs", {"type": "reasoning", "summary": item.get("summary") or [], "content": item.get("content") or []}


def _messages(items: Sequence[Json]) -> list[Json]:
    """The messages of a chat. Thinking and calls belong to the assistant's message beside them."""
    messages: list[Json] = []
    thought = ""
    for item in items:
        kind = item["type"]
        if kind == "reasoning":
            thought = "\n".join(str(part.get("text") or "") for part in item.get("content") or item["summary"])
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
        else:
            if kind == "message":
                messages.append({"role": item["role"], "content": item["content"]})
            elif thought or not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            if kind == "function_call":
                call = {"id": item["call_id"], "type": "function", "function": {"name": item["name"], "arguments": item["arguments"]}}
                messages[-1].setdefault("tool_calls", []).append(call)
            if thought and messages[-1]["role"] == "assistant":
                messages[-1]["reasoning_content"] = thought
            thought = ""
    return messages


# --- the answer -------------------------------------------------------------------------------------------------------------------------


class ResponseAnswer:
    """The answer to one request, whole or as events: both come of the same steps. `view` is the response as far as it is."""

    def __init__(self, model: str, body: ResponsesRequest, job: Job) -> None:
        self.view = _new_view(model, body, job)
        self._counts = Counts()
        self._top = body.top_logprobs or 0
        self._logprobs = bool(job.request.logprobs)
        self._number = -1  # of the last event
        self._open = ""  # the type of the item that is being written
        self._said: list[str] = []  # its text
        self._tokens: list[Json] = []  # of it, with their log-probabilities
        self._waiting: list[Json] = []  # of text that is still withheld

    async def stream(self, came: AsyncIterator[Part], keep: Callable[[], Any]) -> AsyncIterator[bytes]:
        """The events of a stream. `keep` is awaited before the last one."""
        yield self._event("response.created", response=self.view)
        yield self._event("response.in_progress", response=self.view)
        async for part in came:
            for each in self._events(part):
                yield each
        await keep()
        yield self._event(f"response.{self.view['status']}", response=self.view)

    async def whole(self, came: AsyncIterator[Part], keep: Callable[[], Any]) -> Json:
        """The whole answer."""
        async for part in came:
            for _ in self._events(part):
                pass
        await keep()
        return self.view

    def failed(self, error: UserError) -> list[bytes]:
        """The last event of a stream that failed."""
        self.view |= {"status": "failed", "error": {"code": "server_error", "message": words_of(error)}}
        return [self._event("response.failed", response=self.view)]

    def _event(self, type: str, /, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": type, "sequence_number": self._number, **fields}, type)

    def _events(self, part: Part) -> Iterator[bytes]:
        self._counts.seen(part)
        if part.reasoning:
            self._waiting = []
            yield from self._say("reasoning", part.reasoning)
        elif self._logprobs:
            self._waiting += [_with_bytes(logprob_view(each, self._top)) for each in part.chunk.logprobs]
        if part.text:
            yield from self._say("message", part.text)
        for call in part.calls:
            self._waiting = []
            yield from self._called(call)
        if part.finish_reason:
            cut = part.finish_reason == "length"
            yield from self._close("incomplete" if cut else "completed")
            self._finish(cut)

    def _finish(self, cut: bool) -> None:
        counts = self._counts
        self.view["status"] = "incomplete" if cut else "completed"
        self.view["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        self.view["completed_at"] = None if cut else int(time.time())
        self.view["usage"] = {
            "input_tokens": counts.prompt,
            "input_tokens_details": {"cached_tokens": counts.cached, "cache_write_tokens": 0},
            "output_tokens": counts.completion,
            "output_tokens_details": {"reasoning_tokens": counts.thought},
            "total_tokens": counts.prompt + counts.completion,
        }

    @property
    def _place(self) -> Json:
        output = self.view["output"]
        return {"item_id": output[-1]["id"], "output_index": len(output) - 1}

    def _text_part(self, text: str, tokens: list[Json]) -> Json:
        if self._open == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "annotations": [], "logprobs": tokens, "text": text}

    def _add(self, item: Json) -> bytes:
        self.view["output"].append(item)
        return self._event("response.output_item.added", output_index=len(self.view["output"]) - 1, item=item)

    def _done(self) -> bytes:
        output = self.view["output"]
        return self._event("response.output_item.done", output_index=len(output) - 1, item=output[-1])

    def _say(self, kind: str, text: str) -> Iterator[bytes]:
        if self._open != kind:
            yield from self._close("completed")
            self._open = kind
            more: Json = {"summary": []} if kind == "reasoning" else {"role": "assistant"}
            prefix = "rs" if kind == "reasoning" else "msg"
            yield self._add({"id": f"{prefix}_{uuid4().hex}", "type": kind, "status": "in_progress", "content": [], **more})
            yield self._event("response.content_part.added", **self._place, content_index=0, part=self._text_part("", []))
        self._said.append(text)
        tokens, self._waiting = self._waiting, []
        self._tokens += tokens
        more = {} if kind == "reasoning" else {"logprobs": tokens}
        yield self._event(f"response.{self._name}.delta", **self._place, content_index=0, delta=text, **more)

    def _close(self, status: str) -> Iterator[bytes]:
        """End the item that is being written, if there is one."""
        if not self._open:
            return
        text, tokens = "".join(self._said), self._tokens
        part = self._text_part(text, tokens)
        more = {} if self._open == "reasoning" else {"logprobs": tokens}
        yield self._event(f"response.{self._name}.done", **self._place, content_index=0, text=text, **more)
        yield self._event("response.content_part.done", **self._place, content_index=0, part=part)
        self.view["output"][-1] |= {"status": status, "content": [part]}
        self._open, self._said, self._tokens = "", [], []
        yield self._done()

    @property
    def _name(self) -> str:
        return "reasoning_text" if self._open == "reasoning" else "output_text"

    def _called(self, call: ToolCall) -> Iterator[bytes]:
        yield from self._close("completed")
        item = {"id": f"fc_{uuid4().hex}", "type": "function_call", "call_id": call.id, "name": call.name}
        yield self._add({**item, "status": "in_progress", "arguments": ""})
        yield self._event("response.function_call_arguments.delta", **self._place, delta=call.arguments)
        yield self._event("response.function_call_arguments.done", **self._place, arguments=call.arguments, name=call.name)
        self.view["output"][-1] |= {"status": "completed", "arguments": call.arguments}
        yield self._done()


def _with_bytes(view: Json) -> Json:
    """A token whose bytes are a list, which here must be one."""
    others = [{**each, "bytes": each["bytes"] or []} for each in view["top_logprobs"]]
    return {**view, "bytes": view["bytes"] or [], "top_logprobs": others}


def _new_view(model: str, body: ResponsesRequest, job: Job) -> Json:
    sampling = job.request.sampling
    return {
        "id": f"resp_{uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "store": body.store is not False,
        "temperature": sampling.temperature,
        "text": {"format": (body.text and body.text.format) or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": [{"strict": None, "description": None, "parameters": None, **tool} for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "user": body.user,
        "metadata": body.metadata or {},
    }
