"""A turn of conversation: reply, regenerate, continue, edit. Each reads as the turn's life; a failed one leaves nothing behind.

Everything that can be refused (no model, too long a prompt, a bad template) is refused before anything is saved.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, cast

from modules.ahead import Work
from modules.app import App
from modules.auth import Identity
from modules.backends.base import Backend, CancelToken, GenerationRequest, Prefilling, adapters_of
from modules.conversation import Conversation, Message
from modules.errors import PromptError, PromptTooLong, UserError
from modules.replies import Piece, Reply
from modules.samplers import SamplingParams
from modules.sessions import Session
from modules.templates import FALLBACK, ChatTemplate, Fitted, PromptMessage, fit, leave_out, prompt_messages, stop_strings
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
    with _turn(app, who, conversation or f"new-{secrets.token_hex(8)}"):
        current = app.store.conversation(who.owner, conversation) if conversation else Conversation("", who.owner)
        grown, user = current.add("user", text)
        return _answer(app, who, grown, (user,))


def regenerate(app: App, who: Identity, conversation: str, message: str) -> Turn:
    """Start another version of an assistant's message."""
    with _turn(app, who, conversation):
        current = app.store.conversation(who.owner, conversation)
        old = _assistant(current, message)
        return _answer(app, who, replace(current, tip=old.parent), ())


def continue_reply(app: App, who: Identity, conversation: str, message: str) -> Turn:
    """Let an assistant's message go on from where it ends; the message stays the same one."""
    with _turn(app, who, conversation):
        current = app.store.conversation(who.owner, conversation)
        old = _assistant(current, message)
        if old.reasoning and not old.text:
            raise PromptError("This reply was stopped while the model was thinking. Use Regenerate instead.")
        session, path = app.sessions.get(who.session), (*current.path(old.parent), old)
        request, prompt = _prepare(app, app.models.backend, who, session, path, open_end=True)
        running = replace(old, state="running", details=_details(app, request, prompt))
        app.store.save(running)
        app.store.set_tip(who.owner, conversation, old.id)
        return _start(app, who, current, (running,), request, prompt)


def edit(app: App, who: Identity, conversation: str, message: str, text: str) -> Turn:
    """Add another version of a message with `text`; a user's message is then answered again."""
    if not text.strip():
        raise PromptError("The message is empty. Type something first.")
    with _turn(app, who, conversation):
        current = app.store.conversation(who.owner, conversation)
        grown, edited = current.add_sibling(message, text)
        if edited.role == "user":
            return _answer(app, who, grown, (edited,))
        app.store.add(who.owner, conversation, [edited], edited.id)
        app.replies.tell(who.owner, "changed", {"conversation": conversation})
        return Turn(grown, (edited,))


def select(app: App, who: Identity, conversation: str, message: str) -> None:
    """Show the branch of another version."""
    with _turn(app, who, conversation):
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


# --- before a turn ------------------------------------------------------------------------------------------------------------------

LAST_WORD = 16
"""Characters at the end of a draft whose tokens may still change, at most: a word, or so much of a text without spaces."""


def ahead(app: App, who: Identity, conversation: str | None, text: str, revision: int) -> bool:
    """Let the engine compute what `reply` with a message that begins with `text` would send, as far as it is certain.

    Returns at once. A later call takes the place of an earlier one of the same browser, and a turn ends it. Nothing comes of it without a
    model in memory, with an old `revision`, or where `reply` would refuse. False: nor will anything come of calling again, until another
    model is loaded. Raises NotFound for a conversation that is not there, or not the owner's.
    """
    if conversation:
        app.store.info(who.owner, conversation)
    backend = app.models.loaded_backend()
    if app.settings.no_prefill_ahead or (backend and "prefill" not in backend.features):
        return False
    session = app.sessions.get(who.session)
    if backend and backend.alive() and revision == session.revision and len(text) <= MAX_MESSAGE_CHARACTERS:
        app.ahead.start(who.session, lambda cancel: _work_ahead(app, who, session, backend, conversation, text, cancel))
    return True


def _work_ahead(app: App, who: Identity, session: Session, backend: Backend, conversation: str | None, text: str, cancel: CancelToken) -> Work | None:
    """What two prompts have in common that part where `text` may still change: no template has to be understood for that."""
    if conversation and app.replies.running(conversation):
        return None  # its end changes the history
    path = app.store.conversation(who.owner, conversation).path() if conversation else ()
    settled = _settled(text)
    one, other = (_opened(session, (*path, Message("", None, "user", draft))) for draft in ((text, settled) if settled else ("a", "1")))
    request, prompt = _prepare(app, backend, who, session, *one)
    if cancel.cancelled:
        return None
    parting = _renderer(_template(backend), session, other[1])(leave_out(_messages(session, other[0]), prompt.dropped))
    return cast(Prefilling, backend), replace(request, prompt=_common(prompt.tokens, backend.encode(parting)), cancel=cancel)


def _settled(text: str) -> str:
    """`text` without its last word, which may be half of another one."""
    text = text.rstrip()
    head, tail = text[:-LAST_WORD], text[-LAST_WORD:]
    return (head + tail[: max(tail.rfind(" "), tail.rfind("\n"), 0)]).rstrip()


def _common(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    """The beginning that both have."""
    length = next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return tuple(one[:length])


# --- the steps of a turn ------------------------------------------------------------------------------------------------------------


@contextmanager
def _turn(app: App, who: Identity, conversation: str) -> Iterator[None]:
    """Hold the conversation while a turn is prepared. What is computed ahead for this browser gives way to it at once."""
    with app.replies.starting(who.owner, conversation):
        app.ahead.cancel(who.session)
        yield


def _answer(app: App, who: Identity, conversation: Conversation, new: tuple[Message, ...]) -> Turn:
    """Prepare, save `new` and an empty answer, start."""
    session = app.sessions.get(who.session)
    request, prompt = _prepare(app, app.models.backend, who, session, *_opened(session, conversation.path()))
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


def _opened(session: Session, path: Sequence[Message]) -> tuple[Sequence[Message], bool]:
    """`path` with the text that every reply begins with, if there is one, and whether it then ends in an open message."""
    begun = session.chat.start_with
    return ((*path, Message("", None, "assistant", begun)), True) if begun else (path, False)


def _prepare(
    app: App, backend: Backend, who: Identity, session: Session, path: Sequence[Message], open_end: bool
) -> tuple[GenerationRequest, Fitted]:
    """The request for what follows `path`. `open_end`: the last message is the assistant's and goes on."""
    template, sampling = _template(backend), session.sampling
    fitted = fit(_renderer(template, session, open_end), _messages(session, path), _budget(backend, sampling), backend.encode)
    request = GenerationRequest(
        fitted.tokens,
        sampling,
        None if sampling.auto_max_new_tokens else sampling.max_new_tokens,
        secrets.randbelow(2**31) if sampling.seed < 0 else sampling.seed,
        stop=(*sampling.stopping_strings, *stop_strings(template)),
        adapters=adapters_of(backend, app.models.adapters),
        client=who.owner,
        cancel=CancelToken(),
    )
    return request, fitted


def _template(backend: Backend) -> ChatTemplate:
    return ChatTemplate(backend.chat_template, backend.bos_token, backend.eos_token) if backend.chat_template else FALLBACK


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
        **({"adapters": [[adapter.path.name, adapter.scale] for adapter in request.adapters]} if request.adapters else {}),
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
