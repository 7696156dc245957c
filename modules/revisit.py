"""A reply looked at again: what explains it, the tokens that might have stood there, the same once more, or on from another token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modules import explain
from modules.app import App
from modules.auth import Identity
from modules.backends.base import Adapter, Backend
from modules.conversation import Conversation, Message
from modules.errors import NotFound, PromptError, UserError
from modules.explain import Alternative, Explanation
from modules.turns import Plan, Source, prompting_of


def explained(app: App, who: Identity, conversation: str, message: str) -> dict[str, Any]:
    """All that is known of a reply, as JSON. Without a model in memory its tokens have no texts. Raises NotFound."""
    current, found = _found(app, who, conversation, message)
    told = _recalled(app, who, current, found)
    details, backend = found.details, app.models.loaded_backend()
    prompt_tokens = backend.encode(told.prompt) if backend else []
    texts = explain.token_texts(backend, [token.id for token in told.tokens]) if backend and _same_model(app, details) else []
    why_not = _differences(app, backend, details, len(prompt_tokens) + len(told.tokens)) if backend else ["No model is loaded."]
    return {
        "prompt": told.prompt,
        "prompt_tokens": len(prompt_tokens) or details.get("stats", {}).get("prompt_tokens"),
        "parameters": details.get("parameters", {}),
        "seed": details.get("seed"),
        "model": details.get("model"),
        "model_hash": _hash(app, details),
        "adapters": details.get("adapters", []),
        "stats": details.get("stats", {}),
        "created": found.created,
        "repeatable": not why_not,
        "why_not": " ".join(why_not),
        "start": details.get("begins", 0),
        "tokens": [[token.id, text, token.logprob] for token, text in zip(told.tokens, texts, strict=True)] if texts else [],
    }


def alternatives(app: App, who: Identity, conversation: str, message: str, position: int) -> list[Alternative]:
    """The likeliest tokens at a place of a reply, by the model in memory. Raises NotFound, ModelError."""
    current, found = _found(app, who, conversation, message)
    told, backend = _recalled(app, who, current, found), app.models.backend
    tokens = explain.before(backend.encode(told.prompt), told.tokens, position)
    return explain.alternatives(backend, tokens, adapters=_adapters(app, found), client=who.owner)


def resumed(app: App, source: Source, conversation: Conversation, message: Message, position: int, token: int) -> Plan:
    """The plan for a version of `message` that has `token` at `position` and goes on from there."""
    told, backend = _recalled(app, source.who, conversation, message), app.models.backend
    said = explain.resumed(backend, told.tokens, position, token, message.details.get("stop", ()))
    return _plan(app, source, conversation, message, told.prompt, said)


def repeated(app: App, source: Source, conversation: Conversation, message: Message) -> Plan:
    """The plan for the same reply once more. Raises PromptError where it would be another one."""
    told, backend = _recalled(app, source.who, conversation, message), app.models.backend
    why_not = _differences(app, backend, message.details, len(backend.encode(told.prompt)) + len(told.tokens))
    if why_not:
        raise PromptError(f"This reply cannot be repeated as it was. {' '.join(why_not)} Use Regenerate instead.")
    return _plan(app, source, conversation, message, told.prompt, tuple(token for token in told.tokens if token.given))


def _plan(app: App, source: Source, conversation: Conversation, message: Message, prompt: str, said: Sequence[explain.Token]) -> Plan:
    backend = app.models.backend
    tokens = (*backend.encode(prompt), *(token.id for token in said))
    if len(tokens) >= backend.context_length:
        raise PromptError(f"This reply has no room: {len(tokens):,} tokens, and the context holds {backend.context_length:,}. Load a larger context.")
    request = explain.request_again(message.details, tokens, _adapters(app, message), source.who.owner)
    names = prompting_of(app, backend, source.session).names()
    path = conversation.path(message.parent) if message.parent else ()
    return Plan(source, request, prompt, path, message.details.get("dropped_messages", 0), said=tuple(said), names=names)


def _found(app: App, who: Identity, conversation: str, message: str) -> tuple[Conversation, Message]:
    current = app.store_of(conversation).conversation(who.owner, conversation)
    return current, current[message]


def _recalled(app: App, who: Identity, conversation: Conversation, message: Message) -> Explanation:
    path = conversation.path(message.parent) if message.parent else ()
    told = explain.recall(app.store_of(conversation.id), who.owner, conversation.id, message, path)
    if told is None:
        raise NotFound("Nothing is kept of how this message was made. Regenerate it to have it explained.")
    return told


def _adapters(app: App, message: Message) -> tuple[Adapter, ...]:
    return tuple(Adapter(_adapter_path(app, name), float(scale)) for name, scale in message.details.get("adapters", ()))


def _adapter_path(app: App, name: str) -> Path:
    known = {adapter.path.name: adapter.path for adapter in app.models.adapters}
    return known.get(name) or app.data.file("lora", name)


def _differences(app: App, backend: Backend, details: Any, length: int) -> list[str]:
    names = []
    for name, _ in details.get("adapters", ()):
        try:
            _adapter_path(app, name)
        except UserError:
            continue
        names.append(name)
    status, path = app.models.status(), app.models.file
    return explain.differences(
        {**details, "model_hash": _hash(app, details)}, length, backend, status.name or "", app.hashes.get(path) if path else None, names
    )


def _same_model(app: App, details: Any) -> bool:
    """Whether the tokens of a reply are those of the model in memory: by its file, or where that is not known yet by its name."""
    path, was = app.models.file, _hash(app, details)
    now = app.hashes.get(path) if path else None
    return was == now if was and now else details.get("model") == app.models.status().name


def _hash(app: App, details: Any) -> str | None:
    """The hash of the file that wrote a reply, as it was then; it may have become known later than the reply."""
    if details.get("model_hash") or not details.get("model_stamp"):
        return details.get("model_hash")
    try:
        return app.hashes.get(app.models.places.path(str(details.get("model"))), details["model_stamp"])
    except UserError:
        return None
