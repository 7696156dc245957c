"""OpenAIServerBackend: a model that another server runs, as a `Backend`."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from modules.backends.base import CancelToken, Chunk, FinishReason, GenerationRequest, Timings
from modules.backends.openai_server.options import OpenAIServerOptions
from modules.backends.openai_server.payload import Json, chat, sampling
from modules.backends.openai_server.probe import Server
from modules.backends.openai_server.wire import Refused, Wire, error_of
from modules.errors import Busy, EngineDied, NoModel, PromptError, PromptTooLong

KEPT_TEXTS = 64
"""Texts whose tokens are remembered: the pieces of a conversation are counted again at each turn."""
_REASONS: dict[str, FinishReason] = {"length": "length", "cancelled": "cancelled"}


@dataclass
class _Reply:
    """What came so far of one reply."""

    prompt: int
    began: float = field(default_factory=time.monotonic)
    first: float = 0.0
    last: float = 0.0
    pieces: int = 0
    reason: FinishReason | None = None
    usage: Json = field(default_factory=dict)
    told: Json = field(default_factory=dict)
    thinking: bool = False
    calls: dict[int, dict[str, str]] = field(default_factory=dict)

    def end(self, reason: FinishReason) -> Chunk:
        """The last chunk."""
        prompt = int(_count(self.usage, "prompt_tokens")) or self.prompt
        cached = int(_count(self.usage.get("prompt_tokens_details"), "cached_tokens") or _count(self.told, "cache_n"))
        timings = Timings(
            prefill_seconds=_count(self.told, "prompt_ms") / 1000 or (self.first or time.monotonic()) - self.began,
            prefill_tokens=max(prompt - cached, 0),
            reused_tokens=min(cached, prompt),
            decode_seconds=self.last - self.first,
            draft_tokens=int(_count(self.told, "draft_n")),
            accepted_tokens=int(_count(self.told, "draft_n_accepted")),
        )
        done = int(_count(self.usage, "completion_tokens")) or self.pieces
        return Chunk("", (), reason, prompt_tokens=prompt, completion_tokens=done, timings=timings)


class OpenAIServerBackend:
    """Satisfies `Backend`. Its chunks carry no token ids, which such servers do not tell."""

    def __init__(self, wire: Wire, server: Server, options: OpenAIServerOptions) -> None:
        self.name = server.model
        self.context_length = server.context_length
        self.chat_template = server.chat_template
        self.bos_token, self.eos_token = server.bos_token, server.eos_token
        extras = {"grammar": server.kind in ("llama.cpp", "vllm"), "estimate": not server.tokenizer.exact}
        self.features: frozenset[str] = frozenset({"generate", "parallel", "text-only", *(name for name, has in extras.items() if has)})
        self._wire, self._server, self._options = wire, server, options
        self._changed = threading.Condition()
        self._running = self._waiting = 0
        self._unloaded = False
        self._known: OrderedDict[str, tuple[int, ...]] = OrderedDict()

    # --- tokens -----------------------------------------------------------------------------------------------------------------------

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """See `Backend.encode`; made-up numbers where the server has no tokenizer ("estimate")."""
        text = text.encode("utf-8", "replace").decode()
        with self._changed:
            known = self._known.get(text)
        if known is None:
            known = tuple(self._told(lambda: self._server.tokenizer.encode(text)))
            with self._changed:
                self._known[text] = known
                while len(self._known) > KEPT_TEXTS:
                    self._known.popitem(last=False)
        bos = self._server.tokenizer.bos
        return [*(bos if add_bos and known[: len(bos)] != bos else ()), *known]

    def decode(self, tokens: list[int] | tuple[int, ...]) -> str:
        """See `Backend.decode`."""
        return str(self._told(lambda: self._server.tokenizer.decode(tokens)))

    def _told(self, ask: Any) -> Any:
        self._check()
        try:
            return ask()
        except Refused as refused:
            raise error_of(refused, self._wire.host, self.name) from None

    # --- generating -------------------------------------------------------------------------------------------------------------------

    def generate(self, request: GenerationRequest) -> Iterator[Chunk]:
        """See `Backend.generate`."""
        self._check()
        path, body, length = self._asked(request)
        room = self.context_length - length
        if room < 0:
            raise PromptTooLong(f"The prompt has {length} tokens and the context holds {self.context_length}. Shorten it.")
        limit = room if request.max_new_tokens is None else min(room, request.max_new_tokens)
        reply = _Reply(length)
        if limit == 0 or request.cancel.cancelled:
            yield Chunk(prompt_tokens=length, prefill_done=length)
            yield reply.end("cancelled" if request.cancel.cancelled else "length")
            return
        if request.max_new_tokens is not None or path == "/v1/completions":
            body["max_tokens"] = limit
        if self._placed(request.cancel):
            yield from self._streamed(request, path, body, reply)
        else:
            yield reply.end("cancelled")

    def _asked(self, request: GenerationRequest) -> tuple[str, Json, int]:
        """The route, what to send there, and how many tokens the prompt has."""
        server, prompt = self._server, request.prompt
        tokens = list(prompt) if not isinstance(prompt, str) else self.encode(prompt, request.sampling.add_bos_token)
        body = {"model": server.model, **sampling(request, server.kind)}
        text = prompt if isinstance(prompt, str) else None
        if text is None and not (server.takes_tokens and self.chat_template is None):
            text = self.decode(tokens)
        messages = chat(text, server.kind) if text is not None else None
        if messages:
            return "/v1/chat/completions", {**body, **messages}, len(tokens)
        if not server.completes:
            raise PromptError(f"{self._wire.host} can only chat: it has no /v1/completions. Use the Chat tab in instruct mode.")
        if server.takes_tokens:
            return "/v1/completions", {**body, "prompt": tokens}, len(tokens)
        return "/v1/completions", {**body, "prompt": text or ""}, len(tokens)

    def _streamed(self, request: GenerationRequest, path: str, body: Json, reply: _Reply) -> Iterator[Chunk]:
        stream = self._wire.stream(path, body, self._release)
        request.cancel.on_cancel(stream.close)
        try:
            while (event := stream.next()) is not None and not request.cancel.cancelled:
                text = _text_of(event, reply, self._wire)
                if not reply.first and text:
                    reply.first = time.monotonic()
                    yield Chunk(prompt_tokens=reply.prompt, prefill_done=reply.prompt)
                if text:
                    reply.last, reply.pieces = time.monotonic(), reply.pieces + 1
                    yield Chunk(text, completion_tokens=reply.pieces)
        except Refused as refused:
            raise error_of(refused, self._wire.host, self.name) from None
        finally:
            stream.close()
        if not reply.first:
            yield Chunk(prompt_tokens=reply.prompt, prefill_done=reply.prompt)
        if request.cancel.cancelled and reply.reason is None:
            yield reply.end("cancelled")
        elif self._unloaded and reply.reason is None:
            raise EngineDied("The model was unloaded during this. Load it again on the Model tab and send again.")
        elif reply.reason is None:
            raise EngineDied(f"{self._wire.host} ended the reply without saying why. Send it again.")
        else:
            if end := _closing(reply):
                yield Chunk(end, completion_tokens=reply.pieces)
            yield reply.end(reply.reason)

    def _placed(self, cancel: CancelToken) -> bool:
        """Wait for one of the places, in a bounded queue, and take it; False if cancelled meanwhile. Raises Busy, NoModel."""
        cancel.on_cancel(self._wake)
        with self._changed:
            if self._waiting >= self._options.server_queue:
                raise Busy("Too many replies are waiting for this server. Try again in a few seconds.", retry_after=5)
            self._waiting += 1
            try:
                ready = self._changed.wait_for(
                    lambda: self._running < self._options.server_parallel or cancel.cancelled or self._unloaded, self._wire.timeout
                )
            finally:
                self._waiting -= 1
            if not ready:
                raise Busy(f"{self._wire.host} gave no place in {self._wire.timeout:.0f} seconds. Try again later.", retry_after=5)
            self._check()
            if cancel.cancelled:
                return False
            self._running += 1
            return True

    def _release(self) -> None:
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # --- life -------------------------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._unloaded:
            raise NoModel("The model was unloaded. Load it again on the Model tab.")

    def alive(self) -> bool:
        """Until `unload`: whether the server answers shows when it is asked."""
        return not self._unloaded

    def memory(self) -> int:
        """That of another program."""
        return 0

    def unload(self) -> None:
        """Running generations end with EngineDied."""
        with self._changed:
            self._unloaded = True
            self._changed.notify_all()
        self._wire.close()


# --- events -----------------------------------------------------------------------------------------------------------------------------


def _text_of(event: Json, reply: _Reply, wire: Wire) -> str:
    """The text that an event brings; what else it tells goes into `reply`. Raises EngineDied for an error in the stream."""
    if error := event.get("error"):
        said = error.get("message") if isinstance(error, dict) else error
        raise EngineDied(f"{wire.host} broke off: {wire.safe(str(said))}. Send it again.")
    for name, place in (("usage", reply.usage), ("timings", reply.told)):
        if isinstance(event.get(name), dict):
            place.update(event[name])
    choices = event.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    delta = choice.get("delta")
    text = _of_chat(delta, reply) if isinstance(delta, dict) else choice.get("text")
    reason = choice.get("finish_reason")
    if isinstance(reason, str):
        reply.reason = _REASONS.get(reason, "stop")
    return text if isinstance(text, str) else ""


def _of_chat(delta: Json, reply: _Reply) -> str:
    """Text of a chat's delta; thinking, which comes apart there, between the marks by which it is told in a stream of text."""
    thought, said = delta.get("reasoning_content") or delta.get("reasoning"), delta.get("content")
    for call in delta.get("tool_calls") or ():
        _add_call(call, reply)
    text = ""
    if isinstance(thought, str) and thought:
        text += thought if reply.thinking else "<think>" + thought
        reply.thinking = True
    if isinstance(said, str) and said:
        text += ("</think>\n\n" if reply.thinking else "") + said
        reply.thinking = False
    return text


def _add_call(call: Any, reply: _Reply) -> None:
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(function, dict):
        known = reply.calls.setdefault(len(reply.calls) if not isinstance(call.get("index"), int) else call["index"], {"name": "", "arguments": ""})
        for name in known:
            known[name] += function.get(name) or ""


def _closing(reply: _Reply) -> str:
    """What a chat's reply ends with in a stream of text: the end of its thinking, and its calls of tools in the form of Hermes."""
    calls = []
    for call in reply.calls.values():
        calls.append(f'<tool_call>\n{{"name": {json.dumps(call["name"])}, "arguments": {call["arguments"] or "{}"}}}\n</tool_call>')
    return ("</think>\n\n" if reply.thinking and calls else "") + "\n".join(calls)


def _count(values: Any, key: str) -> float:
    value = values.get(key) if isinstance(values, dict) else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**40 else 0
