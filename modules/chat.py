"""A turn of conversation: reply, regenerate, continue, edit. Each reads as the turn's life; a failed one leaves nothing behind.

Everything that can be refused (no model, too long a prompt, a bad template) is refused before anything is saved.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from modules.app import App
from modules.auth import Identity
from modules.backends.base import Backend, CancelToken, GenerationRequest
from modules.conversation import Conversation, Message
from modules.errors import PromptError, PromptTooLong, UserError
from modules.replies import Piece, Reply
from modules.samplers import SamplingParams
from modules.sessions import Session
from modules.templates import FALLBACK, ChatTemplate, Fitted, PromptMessage, fit, prompt_messages, stop_strings
from modules.text_generation import generate_reply, split_reply

MAX_MESSAGE_CHARACTERS = 2_000_000


@dataclass(frozen=True)
class Turn:
    """What a turn added: the conversation, its new messages (the last one may be running), and the reply, if one was started."""

    conversation: Conversation
    messages: tuple[Message, ...]
    reply: Reply | None = None


def reply(app: App, who: Identity, conversation: str | None, text: str) -> Turn:
    """Add the user's `text` (to a new conversation when `conversation` is None) and start the answer."""
    if not text.strip():
        raise PromptError("The message is empty. Type something first.")
    if len(text) > MAX_MESSAGE_CHARACTERS:
        raise PromptTooLong(f"The message has {len(text):,} characters; at most {MAX_MESSAGE_CHARACTERS:,} are taken. Shorten it.")
    with app.replies.starting(who.owner, conversation or f"new-{secrets.token_hex(8)}"):
        current = app.store.conversation(who.owner, conversation) if conversation else Conversation("", who.owner)
        grown, user = current.add("user", text)
        return _answer(app, who, grown, (user,))


def regenerate(app: App, who: Identity, conversation: str, message: str) -> Turn:
    """Start another version of an assistant's message."""
    with app.replies.starting(who.owner, conversation):
        current = app.store.conversation(who.owner, conversation)
        old = _assistant(current, message)
        return _answer(app, who, replace(current, tip=old.parent), ())


def continue_reply(app: App, who: Identity, conversation: str, message: str) -> Turn:
    """Let an assistant's message go on from where it ends; the message stays the same one."""
    with app.replies.starting(who.owner, conversation):
        current = app.store.conversation(who.owner, conversation)
        old = _assistant(current, message)
        if old.reasoning and not old.text:
            raise PromptError("This reply was stopped while the model was thinking. Use Regenerate instead.")
        request, prompt = _prepare(app, app.sessions.get(who.session), (*current.path(old.parent), old), open_end=True)
        running = replace(old, state="running", details=_details(app, request, prompt))
        app.store.save(running)
        app.store.set_tip(who.owner, conversation, old.id)
        return _start(app, who, current, (running,), request, prompt)


def edit(app: App, who: Identity, conversation: str, message: str, text: str) -> Turn:
    """Add another version of a message with `text`; a user's message is then answered again."""
    if not text.strip():
        raise PromptError("The message is empty. Type something first.")
    with app.replies.starting(who.owner, conversation):
        current = app.store.conversation(who.owner, conversation)
        grown, edited = current.add_sibling(message, text)
        if edited.role == "user":
            return _answer(app, who, grown, (edited,))
        app.store.add(who.owner, conversation, [edited], edited.id)
        app.replies.tell(who.owner, "changed", {"conversation": conversation})
        return Turn(grown, (edited,))


def select(app: App, who: Identity, conversation: str, message: str) -> None:
    """Show the branch of another version."""
    with app.replies.starting(who.owner, conversation):
        app.store.show(who.owner, conversation, message)
    app.replies.tell(who.owner, "changed", {"conversation": conversation})


def rename(app: App, who: Identity, conversation: str, title: str) -> None:
    """Give a conversation another title."""
    app.store.rename(who.owner, conversation, title)
    announce(app, who.owner, conversation)


def delete(app: App, who: Identity, conversation: str) -> None:
    """Delete a conversation; a reply being written in it is stopped first."""
    running = app.replies.running(conversation)
    if running and running.owner == who.owner:
        running.cancel.cancel()
    app.store.delete(who.owner, conversation)
    app.replies.tell(who.owner, "deleted", {"id": conversation})


def announce(app: App, owner: str, conversation: str) -> None:
    """Tell the owner's other pages that a conversation in the list has changed."""
    app.replies.tell(owner, "conversation", {"id": conversation})


# --- the steps of a turn ------------------------------------------------------------------------------------------------------------


def _answer(app: App, who: Identity, conversation: Conversation, new: tuple[Message, ...]) -> Turn:
    """Prepare, save `new` and an empty answer, start."""
    session = app.sessions.get(who.session)
    opening = (Message("", None, "assistant", session.chat.start_with),) if session.chat.start_with else ()
    request, prompt = _prepare(app, session, (*conversation.path(), *opening), open_end=bool(opening))
    grown, answer = conversation.add("assistant", session.chat.start_with, state="running", details=_details(app, request, prompt))
    stored = _store(app, who, grown, (*new, answer))
    return _start(app, who, stored, (*new, answer), request, prompt)


def _store(app: App, who: Identity, conversation: Conversation, new: tuple[Message, ...]) -> Conversation:
    """Save `new`; a conversation without an id is made for them, and not left behind empty when that fails."""
    if conversation.id:
        app.store.add(who.owner, conversation.id, new, new[-1].id)
        return conversation
    made = app.store.create(who.owner)
    try:
        app.store.add(who.owner, made.id, new, new[-1].id)
    except UserError:
        with suppress(UserError):
            app.store.delete(who.owner, made.id)
        raise
    return replace(conversation, id=made.id)


def _prepare(app: App, session: Session, path: Sequence[Message], open_end: bool) -> tuple[GenerationRequest, Fitted]:
    """The request for what follows `path`. `open_end`: the last message is the assistant's and goes on."""
    backend, sampling = app.models.backend, session.sampling
    template = ChatTemplate(backend.chat_template, backend.bos_token, backend.eos_token) if backend.chat_template else FALLBACK
    fitted = fit(_renderer(template, session, open_end), _messages(session, path), _budget(backend, sampling), backend.encode)
    request = GenerationRequest(
        fitted.tokens,
        sampling,
        None if sampling.auto_max_new_tokens else sampling.max_new_tokens,
        secrets.randbelow(2**31) if sampling.seed < 0 else sampling.seed,
        stop=(*sampling.stopping_strings, *stop_strings(template)),
        cancel=CancelToken(),
    )
    return request, fitted


def _messages(session: Session, path: Sequence[Message]) -> list[PromptMessage]:
    system = session.chat.custom_system_message
    told = [PromptMessage("system", system)] if system else []
    return [*told, *prompt_messages(m for m in path if m.text)]


def _renderer(template: ChatTemplate, session: Session, open_end: bool) -> Callable[[Sequence[PromptMessage]], str]:
    chat = session.chat
    return lambda messages: template.render(
        messages,
        add_generation_prompt=not open_end,
        continue_last=open_end,
        enable_thinking=chat.enable_thinking,
        reasoning_effort=chat.reasoning_effort,
    )


def _budget(backend: Backend, sampling: SamplingParams) -> int:
    """Tokens that a prompt may have: the context without room for the reply, of which at least half is the prompt's."""
    context = min(backend.context_length, sampling.truncation_length or backend.context_length)
    return context - min(sampling.max_new_tokens, context // 2)


def _details(app: App, request: GenerationRequest, prompt: Fitted) -> dict[str, Any]:
    """What explains the reply later."""
    return {
        "model": app.models.status().name,
        "seed": request.seed,
        "parameters": {k: list(v) if isinstance(v, tuple) else v for k, v in request.sampling.differences().items()},
        "dropped_messages": prompt.dropped,
    }


def _start(app: App, who: Identity, conversation: Conversation, messages: tuple[Message, ...], request: GenerationRequest, prompt: Fitted) -> Turn:
    answer = messages[-1]
    running = Reply(who.owner, conversation.id, answer, app.models.status().context_length, app.present(), request.cancel)

    def pieces() -> Iterable[Piece]:
        return split_reply(generate_reply(app, request), request, prompt.prompt)

    app.replies.start(running, pieces, app.store.save)
    app.replies.tell(who.owner, "started", {"conversation": conversation.id, "messages": [m.id for m in messages]})
    announce(app, who.owner, conversation.id)
    return Turn(conversation, messages, running)


def _assistant(conversation: Conversation, message: str) -> Message:
    found = conversation[message]
    if found.role != "assistant":
        raise PromptError("Only a reply can be written again or continued. Edit your own message instead.")
    return found
