"""A turn of conversation: reply, regenerate, continue, edit, insert, impersonate. Each reads as the turn's life; a failed one leaves nothing behind.

Everything that can be refused (no model, too long a prompt, a bad template) is refused before anything is saved.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from modules import revisit, titles, turns
from modules.ahead import Work
from modules.app import App
from modules.auth import Identity
from modules.backends.base import Adapter, Adapting, Backend, CancelToken, Prefilling
from modules.conversation import Conversation, Message, Role, new_id
from modules.errors import PromptError, PromptTooLong, UserError
from modules.prompting import substituted
from modules.replies import Piece, Reply, TextPresenter
from modules.text_generation import generate_reply, split_reply
from modules.turns import Plan, Source, opened, prepare, source_of

MAX_MESSAGE_CHARACTERS = 2_000_000
MAX_ANSWERS = 8
"""Replies side by side."""


@dataclass(frozen=True)
class Turn:
    """What a turn added: the conversation, its new messages (the last ones may be running), and the replies that were started."""

    conversation: Conversation
    messages: tuple[Message, ...]
    replies: tuple[Reply, ...] = ()

    @property
    def reply(self) -> Reply:
        """The first reply."""
        return self.replies[0]


def reply(app: App, who: Identity, conversation: str | None, text: str, n: int = 1, incognito: bool = False) -> Turn:
    """Add the user's `text` (to a new conversation when `conversation` is None) and start `n` answers."""
    _check(text)
    with _turn(app, who, conversation):
        source, current = _current(app, who, conversation, incognito)
        grown, _ = _said(source, current, "user", text)
        turn = _answer(app, source, grown, _new(grown, current), n)
    if not conversation and source.session.page.title_by_model:
        titles.later(app, source, turn.conversation.id, turn.reply)
    return turn


def regenerate(app: App, who: Identity, conversation: str, message: str, n: int = 1, changes: Mapping[str, Any] | None = None) -> Turn:
    """Start other versions of an assistant's message. `changes`: a "preset", "adapters" [[name, scale]] or another "model" for these alone."""
    with _turn(app, who, conversation):
        source, current = _current(app, who, conversation)
        old = _assistant(current, message)
        if old.details.get("greeting"):
            raise PromptError("A greeting is not written by the model. Edit it instead.")
        return _answer(app, _changed(app, source, changes or {}), replace(current, tip=old.parent), (), n, changes or {})


def continue_reply(app: App, who: Identity, conversation: str, message: str) -> Turn:
    """Let an assistant's message go on from where it ends, thinking included; the message stays the same one."""
    with _turn(app, who, conversation):
        source, current = _current(app, who, conversation)
        old = _assistant(current, message)
        plan = prepare(app, app.models.backend, source, (*(current.path(old.parent) if old.parent else ()), old), open_end=True)
        former = {name: old.details[name] for name in ("stats", "group") if name in old.details}
        known = turns.details(app, plan, **_lasting(old), **former, begins=len(old.text), began_thinking=len(old.reasoning))
        running = replace(old, state="running", details=known)
        source.store.save(running)
        source.store.set_tip(who.owner, conversation, old.id)
        return Turn(current, (running,), turns.start(app, who, current, {old.id: plan}, (running,)))


def edit(app: App, who: Identity, conversation: str, message: str, text: str, answer: bool = True) -> Turn:
    """Add another version of a message with `text`; a user's message is then answered again, if `answer`."""
    _check(text)
    with _turn(app, who, conversation):
        source, current = _current(app, who, conversation)
        old = current[message]
        grown, edited = current.add_sibling(message, text, details=_lasting(old))
        if edited.role == "user" and answer:
            return _answer(app, source, grown, (edited,))
        return _added(app, source, grown, (edited,))


def insert(app: App, who: Identity, conversation: str | None, role: Literal["user", "assistant"], text: str) -> Turn:
    """Add a message at the end without an answer."""
    _check(text)
    with _turn(app, who, conversation):
        source, current = _current(app, who, conversation)
        grown, _ = _said(source, current, role, text)
        return _added(app, source, grown, _new(grown, current))


def resume(app: App, who: Identity, conversation: str, message: str, position: int, token: int) -> Turn:
    """Another version of an assistant's message: the same up to token `position`, then `token`, and on from there."""
    with _turn(app, who, conversation):
        source, current = _current(app, who, conversation)
        old = _assistant(current, message)
        return _beside(app, source, current, old, revisit.resumed(app, source, current, old, position, token))


def repeat(app: App, who: Identity, conversation: str, message: str) -> Turn:
    """Another version of an assistant's message, from exactly the same prompt, parameters and seed."""
    with _turn(app, who, conversation):
        source, current = _current(app, who, conversation)
        old = _assistant(current, message)
        return _beside(app, source, current, old, revisit.repeated(app, source, current, old))


def impersonate(app: App, who: Identity, conversation: str | None, text: str) -> Reply:
    """Write the user's next message, going on from `text`; nothing of it is saved. Its events are those of `TextPresenter`."""
    with _turn(app, who, conversation):
        source, current = _current(app, who, conversation)
        path = (*_greeted(source, current).path(), Message("", None, "user", text))
        plan = prepare(app, app.models.backend, source, path, open_end=True, speaker="user")
        message = Message(new_id(), None, "user", text, state="running")
        running = Reply(who.owner, conversation or f"new-{message.id}", message, None, TextPresenter(), plan.request.cancel)

        def pieces() -> Iterator[Piece]:
            return split_reply(generate_reply(app, plan.request), plan.request, plan.prompt, text, names=plan.names)

        app.replies.start(running, pieces, lambda _: None)
        return running


# --- before a turn ------------------------------------------------------------------------------------------------------------------

LAST_WORD = 16
"""Characters at the end of a draft whose tokens may still change, at most: a word, or so much of a text without spaces."""


def ahead(app: App, who: Identity, conversation: str | None, text: str, revision: int) -> bool:
    """Let the engine compute what `reply` with a message that begins with `text` would send, as far as it is certain.

    Returns at once. A later call takes the place of an earlier one of the same browser, and a turn ends it. Nothing comes of it without a
    model in memory, with an old `revision`, or where `reply` would refuse. False: nor will anything come of calling again, until another
    model is loaded. Raises NotFound for a conversation that is not there, or not the owner's.
    """
    source = source_of(app, who, conversation)
    backend = app.models.loaded_backend()
    if app.settings.no_prefill_ahead or (backend and "prefill" not in backend.features):
        return False
    if backend and backend.alive() and revision == source.session.revision and len(text) <= MAX_MESSAGE_CHARACTERS:
        app.ahead.start(who.session, lambda cancel: _work_ahead(app, source, backend, text, cancel))
    return True


def _work_ahead(app: App, source: Source, backend: Backend, text: str, cancel: CancelToken) -> Work | None:
    """What two prompts have in common that part where `text` may still change: no template has to be understood for that."""
    if source.conversation and app.replies.running(source.conversation):
        return None  # its end changes the history
    path = _greeted(source, _stored(source)).path()
    settled = _settled(text)
    one, other = (opened(source.session, (*path, Message("", None, "user", draft))) for draft in ((text, settled) if settled else ("a", "1")))
    plan = prepare(app, backend, source, *one)
    if cancel.cancelled:
        return None
    parting = turns.rendered(app, backend, plan, other[0])
    tokens = cast(tuple[int, ...], plan.request.prompt)
    return cast(Prefilling, backend), replace(plan.request, prompt=_common(tokens, backend.encode(parting)), cancel=cancel)


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
def _turn(app: App, who: Identity, conversation: str | None) -> Iterator[None]:
    """Hold the conversation while a turn is prepared. What is computed ahead for this browser gives way to it at once."""
    with app.replies.starting(who.owner, conversation or f"new-{secrets.token_hex(8)}"):
        app.ahead.cancel(who.session)
        yield


def _check(text: str) -> None:
    if not text.strip():
        raise PromptError("The message is empty. Type something first.")
    if len(text) > MAX_MESSAGE_CHARACTERS:
        raise PromptTooLong(f"The message has {len(text):,} characters; at most {MAX_MESSAGE_CHARACTERS:,} are taken. Shorten it.")


def _current(app: App, who: Identity, conversation: str | None, incognito: bool = False) -> tuple[Source, Conversation]:
    """What a turn begins with: the values in effect, and the conversation; one without an id when it is still to be made."""
    source = source_of(app, who, conversation)
    if incognito and not conversation:
        source = replace(source, store=app.incognito)
    return source, _stored(source)


def _stored(source: Source) -> Conversation:
    owner = source.who.owner
    return source.store.conversation(owner, source.conversation) if source.conversation else Conversation("", owner)


def _greeted(source: Source, conversation: Conversation) -> Conversation:
    """A new conversation begins with the character's greeting, where there is one."""
    chat = source.session.chat
    if conversation.messages or chat.mode == "instruct" or not chat.greeting.strip():
        return conversation
    greeting = substituted(chat.greeting, chat)
    return conversation.add("assistant", greeting, details={"greeting": True, "name": chat.name2})[0]


def _said(source: Source, conversation: Conversation, role: Role, text: str) -> tuple[Conversation, Message]:
    chat = source.session.chat
    known = {} if chat.mode == "instruct" else {"name": chat.name1 if role == "user" else chat.name2}
    return _greeted(source, conversation).add(role, text, details=known)


def _new(grown: Conversation, before: Conversation) -> tuple[Message, ...]:
    """The messages of `grown` that `before` does not have, parents first."""
    return tuple(message for id, message in grown.messages.items() if id not in before.messages)


def _lasting(message: Message) -> dict[str, Any]:
    """What a new version of a message has in common with the old one."""
    return {name: message.details[name] for name in ("name", "greeting", "pinned") if name in message.details}


def _changed(app: App, source: Source, changes: Mapping[str, Any]) -> Source:
    """`source` with another preset or model for one reply."""
    if changes.get("preset"):
        source = replace(source, session=source.session.change(app.presets.get(changes["preset"])))
    return replace(source, model=changes.get("model", ""))


def _answer(
    app: App, source: Source, conversation: Conversation, new: tuple[Message, ...], n: int = 1, changes: Mapping[str, Any] | None = None
) -> Turn:
    """Prepare, save `new` and `n` empty answers, start."""
    if not 1 <= n <= MAX_ANSWERS:
        raise PromptError(f"{n} answers at once cannot be made. Ask for 1 to {MAX_ANSWERS}.")
    changes = changes or {}
    backend = turns.backend_of(app, source)
    plan = prepare(app, backend, source, *opened(source.session, conversation.path()))
    if "adapters" in changes:
        plan = replace(plan, request=replace(plan.request, adapters=_adapters(app, backend, changes["adapters"])))
    begun = source.session.chat.start_with
    more = {"preset": changes["preset"]} if changes.get("preset") else {}
    return _begin(app, source, conversation, new, [turns.again(plan, number) for number in range(n)], begun, begins=len(begun), **more)


def _begin(
    app: App, source: Source, conversation: Conversation, new: Sequence[Message], plans: Sequence[Plan], text: str, thought: str = "", **more: Any
) -> Turn:
    """Save `new` and an answer for each of `plans`, side by side below them, and start these."""
    above, answers, grown = conversation.tip, [], conversation
    group = {"group": new_id()} if len(plans) > 1 else {}
    begins = {name: value for name, value in more.items() if value}
    for plan in plans:
        grown = replace(grown, tip=above)
        grown, answer = grown.add("assistant", text, state="running", reasoning=thought, details=turns.details(app, plan, **group, **begins))
        answers.append(answer)
    stored = _store(source, grown, (*new, *answers), answers[0].id)
    placed = [replace(plan, source=replace(plan.source, store=source.store, conversation=stored.id)) for plan in plans]
    started = turns.start(app, source.who, stored, dict(zip([a.id for a in answers], placed, strict=True)), (*new, *answers))
    return Turn(stored, (*new, *answers), started)


def _beside(app: App, source: Source, conversation: Conversation, old: Message, plan: Plan) -> Turn:
    """Start another version of `old`, which begins with what `old` began with."""
    text, thought = old.text[: old.details.get("begins", 0)], old.reasoning[: old.details.get("began_thinking", 0)]
    above = replace(conversation, tip=old.parent)
    return _begin(app, source, above, (), [plan], text, thought, begins=len(text), began_thinking=len(thought))


def _added(app: App, source: Source, conversation: Conversation, new: tuple[Message, ...]) -> Turn:
    """Save `new` messages that nobody answers."""
    stored = _store(source, conversation, new, new[-1].id)
    app.replies.tell(source.who.owner, "conversation", {"id": stored.id})
    app.replies.tell(source.who.owner, "changed", {"conversation": stored.id})
    return Turn(stored, new)


def _store(source: Source, conversation: Conversation, new: Sequence[Message], tip: str) -> Conversation:
    """Save `new`; a conversation without an id is made for them, and not left behind empty when that fails."""
    store, owner = source.store, source.who.owner
    if conversation.id:
        store.add(owner, conversation.id, new, tip)
        return conversation
    made = store.create(owner, settings=source.session.kept())
    try:
        store.add(owner, made.id, new, tip)
    except UserError:
        with suppress(UserError):
            store.delete(owner, made.id)
        raise
    return replace(conversation, id=made.id)


def _adapters(app: App, backend: Backend, named: Sequence[Sequence[Any]]) -> tuple[Adapter, ...]:
    """Adapters by name and scale, loaded if they are not yet. Raises NotFound, ModelError."""
    if named and "adapters" not in backend.features:
        raise PromptError(f"{backend.name} cannot use LoRA adapters. Choose a model that another loader runs.")
    found = tuple(Adapter(app.data.file("lora", str(name)), float(scale)) for name, scale in named)
    for adapter in found:
        cast(Adapting, backend).load_adapter(adapter.path)
    return found


def _assistant(conversation: Conversation, message: str) -> Message:
    found = conversation[message]
    if found.role != "assistant":
        raise PromptError("Only a reply can be written again or continued. Edit your own message instead.")
    return found
