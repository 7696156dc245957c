"""Anthropic's routes: messages, and the count of their tokens. A request becomes a chat request: there is one way to a prompt."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from modules.api.errors import BadRequest, anthropic_error
from modules.api.limits import StrictRoute
from modules.api.requests import Job, chat_job, prompt_length
from modules.api.running import STREAMS, Counts, Part, begun, event, ignored_headers, parts, sse, while_there, with_model
from modules.api.schemas import AnthropicChoice, AnthropicCountRequest, AnthropicMessage, AnthropicRequest, ChatRequest, as_chat
from modules.app import App
from modules.backends.base import Backend, CancelToken
from modules.tool_calls import ToolCall

Json = dict[str, Any]
_THOUGHT = ("thinking", "redacted_thinking")
_TOOL_KEYS = frozenset({"type", "name", "description", "input_schema", "cache_control"})


def build_router(app: App, client: Callable[[Request], str]) -> APIRouter:
    """The routes; `client` says who asks."""
    router = APIRouter(route_class=StrictRoute)

    @router.post("/v1/messages", tags=["Anthropic"], responses=STREAMS)
    async def messages(request: Request, body: AnthropicRequest) -> Response:
        """A reply to a conversation."""
        job = await with_model(request, app, body.model, lambda backend, _: message_job(app, backend, body, client(request)))
        answer = MessageAnswer(job.request.model, job, body.stop_sequences or ())
        if body.stream:
            stream = await while_there(request, begun(parts(app, [job], answer.id)))
            return sse(answer.stream(stream), lambda error: [event(anthropic_error(error), "error")], ignored_headers([job]))
        whole = await while_there(request, answer.whole(parts(app, [job], answer.id)))
        return JSONResponse(whole, headers=ignored_headers([job]))

    @router.post("/v1/messages/count_tokens", tags=["Anthropic"])
    async def count_tokens(request: Request, body: AnthropicCountRequest) -> Response:
        """How many tokens the prompt of such a request has."""

        def count(backend: Backend, _: CancelToken) -> tuple[Job, int]:
            job = message_job(app, backend, body, client(request), fitting=False)
            return job, prompt_length(backend, job)

        job, length = await with_model(request, app, body.model, count)
        if job.request.images:
            job = replace(job, ignored=(*job.ignored, "tokens of images are not counted"))
        return JSONResponse({"input_tokens": length}, headers=ignored_headers([job]))

    return router


# --- the request ------------------------------------------------------------------------------------------------------------------------


def message_job(app: App, backend: Backend, body: AnthropicCountRequest, client: str, fitting: bool = True) -> Job:
    """The reply to a request for a message. Raises as `chat_job` does."""
    job = chat_job(app, backend, chat_request(body), client, fitting)
    return replace(job, ignored=(*job.ignored, *_not_followed(body)))


def chat_request(body: AnthropicCountRequest) -> ChatRequest:
    """The same, asked of the chat route. Earlier thinking is left out; a last message of the assistant is gone on with."""
    messages = [each for place, message in enumerate(body.messages) for each in _chat_messages(message, place)]
    if body.system:
        messages.insert(0, {"role": "system", "content": _system(body.system)})
    if messages[-1].get("tool_calls"):
        raise BadRequest("messages: the last tool_use has no result. Add a user's message with its tool_result.", "messages")
    fields: Json = {"messages": messages, "continue_": messages[-1]["role"] == "assistant"}
    if isinstance(body, AnthropicRequest):
        fields |= {"max_tokens": body.max_tokens, "stop": body.stop_sequences}
    if body.thinking:
        fields["enable_thinking"] = body.thinking.type != "disabled"
    return as_chat(body, fields | _tool_fields(body.tools or (), body.tool_choice) | _output_fields(body.output_config or {}))


def _not_followed(body: AnthropicCountRequest) -> list[str]:
    told = [f"{name} is unknown" for name in body.unknown()]
    if body.thinking:
        told += [f"thinking.{name} is not followed" for name in ("budget_tokens", *(body.thinking.model_extra or ())) if getattr(body.thinking, name)]
    told += [f"tools.{name} is not followed" for name in sorted({key for tool in body.tools or () for key in tool} - _TOOL_KEYS)]
    return told + [f"output_config.{name} is unknown" for name in sorted((body.output_config or {}).keys() - {"effort", "format"})]


def _system(system: str | Sequence[Json]) -> str:
    if isinstance(system, str):
        return system
    for block in system:
        if block.get("type") != "text":
            raise BadRequest(f"system: blocks of type {str(block.get('type'))[:40]!r} cannot be read here. Send text.", "system")
    return "\n\n".join(str(block.get("text") or "") for block in system)


def _tool_fields(tools: Sequence[Json], choice: AnthropicChoice | None) -> Json:
    if not tools and not choice:
        return {}
    for place, tool in enumerate(tools):
        if tool.get("type") not in (None, "custom"):
            what = f"tools[{place}]: {str(tool['type'])[:80]!r} is a tool of Anthropic's own servers"
            raise BadRequest(f"{what}, which nothing here offers. Leave it out, or describe a tool with name and input_schema.", "tools")
        if not isinstance(tool.get("name"), str) or not isinstance(tool.get("input_schema"), dict):
            raise BadRequest(f"tools[{place}] needs a name and an input_schema.", "tools")
    functions = [
        {"type": "function", "function": {"name": t["name"], "description": str(t.get("description") or ""), "parameters": t["input_schema"]}}
        for t in tools
    ]
    fields: Json = {"tools": functions}
    if choice:
        named = {"type": "function", "function": {"name": choice.name}}
        fields["tool_choice"] = {"any": "required", "tool": named}.get(choice.type, choice.type)
        fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    return fields


def _output_fields(output: Json) -> Json:
    fields: Json = {}
    if output.get("effort"):
        fields["reasoning_effort"] = "xhigh" if output["effort"] == "max" else output["effort"]
    if output.get("format"):
        fields["response_format"] = output["format"]
    return fields


def _chat_messages(message: AnthropicMessage, place: int) -> Iterator[Json]:
    """A message as those of a chat: each tool result is one of its own, in its place among the others."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    content: list[Json] = []
    calls: list[Json] = []
    results = False
    for number, block in enumerate(message.content):
        kind, where = block.get("type"), f"messages[{place}].content[{number}]"
        if kind == "tool_result" and message.role == "user":
            if content:
                yield {"role": "user", "content": content}
            content, results = [], True
            yield _result(block, where)
        elif kind == "tool_use" and message.role == "assistant":
            calls.append(_call(block, where))
        elif kind not in _THOUGHT:
            content.append(_part(block, where))
    if calls:
        yield {"role": "assistant", "content": content or None, "tool_calls": calls}
    elif content or not results:
        yield {"role": message.role, "content": content}


def _part(block: Mapping[str, Any], where: str) -> Json:
    """A block as a part of a chat message."""
    if block.get("type") == "text":
        return {"type": "text", "text": str(block.get("text") or "")}
    if block.get("type") != "image":
        raise BadRequest(f"{where}: blocks of type {str(block.get('type'))[:40]!r} cannot be read here. Send text and image.", "messages")
    source = block.get("source")
    kind = source.get("type") if isinstance(source, dict) else None
    if not isinstance(source, dict) or kind != "base64":
        why = (
            "addresses are not fetched, so that nothing leaves this machine" if kind == "url" else f"a source of type {str(kind)[:40]!r} is not known"
        )
        raise BadRequest(f"{where}: {why}. Send the image itself, as a source of type base64.", "messages")
    return {"type": "image_url", "image_url": {"url": f"data:{source.get('media_type') or 'image/png'};base64,{source.get('data') or ''}"}}


def _call(block: Mapping[str, Any], where: str) -> Json:
    if not isinstance(block.get("name"), str) or not isinstance(block.get("input", {}), dict):
        raise BadRequest(f"{where}: a tool_use needs a name and an input that is an object.", "messages")
    function = {"name": block["name"], "arguments": json.dumps(block.get("input", {}), ensure_ascii=False)}
    return {"id": str(block.get("id") or ""), "type": "function", "function": function}


def _result(block: Mapping[str, Any], where: str) -> Json:
    content = block.get("content") or ""
    if not isinstance(block.get("tool_use_id"), str) or not isinstance(content, str | list):
        raise BadRequest(f"{where}: a tool_result needs the tool_use_id of its call, and text or blocks as its content.", "messages")
    said = [{"type": "text", "text": content}] if isinstance(content, str) else [_part(each, where) for each in content if isinstance(each, dict)]
    if block.get("is_error"):
        said.insert(0, {"type": "text", "text": "Error: "})
    return {"role": "tool", "tool_call_id": block["tool_use_id"], "content": said}


# --- the answer -------------------------------------------------------------------------------------------------------------------------


class MessageAnswer:
    """The answer to one request, whole or as events: both come of the same steps."""

    def __init__(self, model: str, job: Job, stops: Sequence[str]) -> None:
        """`stops`: the stop strings of the request itself."""
        self.id = f"msg_{uuid4().hex}"
        self._head = {"id": self.id, "type": "message", "role": "assistant", "model": model}
        self._stops = stops
        self._counts = Counts(prompt=len(job.request.prompt) if isinstance(job.request.prompt, tuple) else 0)
        self._content: list[Json] = []
        self._open = ""  # the kind of the block that is being written
        self._said: list[str] = []  # its text
        self._ended: Json = {"stop_reason": None, "stop_sequence": None}

    async def stream(self, came: AsyncIterator[Part]) -> AsyncIterator[bytes]:
        """The events of a stream."""
        begins = True
        async for part in came:
            self._counts.seen(part)
            if begins:
                yield _event("message_start", message=self._view())
                yield _event("ping")
            begins = False
            for each in self._events(part):
                yield each
        for each in self._close():
            yield each
        yield _event("message_delta", delta=self._ended, usage=self._usage())
        yield _event("message_stop")

    async def whole(self, came: AsyncIterator[Part]) -> Json:
        """The whole answer."""
        async for part in came:
            self._counts.seen(part)
            list(self._events(part))
        list(self._close())
        return self._view()

    def _view(self) -> Json:
        return {**self._head, "content": self._content, **self._ended, "usage": self._usage()}

    def _usage(self) -> Json:
        counts = self._counts
        return {
            "input_tokens": counts.prompt - counts.cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": counts.cached,
            "output_tokens": counts.completion,
        }

    def _events(self, part: Part) -> Iterator[bytes]:
        for kind, text in (("thinking", part.reasoning), ("text", part.text)):
            if text:
                yield from self._begin(kind)
                self._said.append(text)
                yield self._delta({"type": f"{kind}_delta", kind: text})
        for call in part.calls:
            yield from self._called(call)
        if part.finish_reason:
            self._ended = self._end_of(part)

    def _begin(self, kind: str) -> Iterator[bytes]:
        if self._open == kind:
            return
        yield from self._close()
        self._open = kind
        self._content.append({"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})})
        yield _event("content_block_start", index=len(self._content) - 1, content_block=self._content[-1])

    def _close(self) -> Iterator[bytes]:
        if not self._open:
            return
        if self._open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": ""})
        self._content[-1][self._open] = "".join(self._said)
        self._open, self._said = "", []
        yield _event("content_block_stop", index=len(self._content) - 1)

    def _called(self, call: ToolCall) -> Iterator[bytes]:
        yield from self._close()
        block = {"type": "tool_use", "id": "toolu_" + call.id.removeprefix("call_"), "name": call.name, "input": json.loads(call.arguments)}
        self._content.append(block)
        yield _event("content_block_start", index=len(self._content) - 1, content_block={**block, "input": {}})
        yield self._delta({"type": "input_json_delta", "partial_json": call.arguments})
        yield _event("content_block_stop", index=len(self._content) - 1)

    def _delta(self, delta: Json) -> bytes:
        return _event("content_block_delta", index=len(self._content) - 1, delta=delta)

    def _end_of(self, part: Part) -> Json:
        if part.finish_reason == "stop" and part.stop and part.stop in self._stops:
            return {"stop_reason": "stop_sequence", "stop_sequence": part.stop}
        reason = {"length": "max_tokens", "tool_calls": "tool_use"}.get(part.finish_reason or "", "end_turn")
        return {"stop_reason": reason, "stop_sequence": None}


def _event(name: str, **fields: Any) -> bytes:
    return event({"type": name, **fields}, name)
