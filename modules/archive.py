"""What is done to conversations besides talking: arranging, deleting and taking that back, branching, choosing, exporting, importing.

Each tells the owner's other pages. Ids of incognito conversations lead to the store that is never on disk (`App.store_of`).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from modules import transfer
from modules.app import App
from modules.auth import Identity
from modules.conversation import Conversation, Message
from modules.errors import DataError, NotFound, PromptError, UserError
from modules.sessions import Session
from modules.settings import PageOptions
from modules.store import FIRST_IN_MEMORY, MessagePage, clean
from modules.turns import source_of

MAX_TOGETHER = 10_000
"""Conversations in one request."""


def select(app: App, who: Identity, conversation: str, message: str) -> None:
    """Show the branch of another version."""
    with app.replies.starting(who.owner, conversation):
        app.store_of(conversation).show(who.owner, conversation, message)
    _changed(app, who, conversation)


def choose(app: App, who: Identity, conversation: str, message: str) -> None:
    """Take one of several replies that stand side by side; the others stay as its versions."""
    store = app.store_of(conversation)
    with app.replies.starting(who.owner, conversation):
        chosen = store.conversation(who.owner, conversation)[message]
        store.save(_with_detail(chosen, "chosen", True))
        store.show(who.owner, conversation, message)
    _changed(app, who, conversation)


def beside(app: App, who: Identity, conversation: str, page: MessagePage) -> list[Message]:
    """The other replies of the last message's group, while none of them is chosen."""
    last = page.items[-1].message if page.items else None
    group = last.details.get("group") if last else None
    if not last or not group:
        return []
    tree = app.store_of(conversation).conversation(who.owner, conversation)
    together = [tree[id] for id in tree.siblings(last.id) if tree[id].details.get("group") == group]
    if any(message.details.get("chosen") for message in together):
        return []
    return [message for message in together if message.id != last.id]


def pin_message(app: App, who: Identity, conversation: str, message: str, pinned: bool) -> None:
    """Keep a message in the prompt when the context is full, or no longer."""
    app.store_of(conversation).pin_message(who.owner, conversation, message, pinned)
    _changed(app, who, conversation)


def remove(app: App, who: Identity, conversation: str, message: str) -> int:
    """Take a message and all that follows it out of the conversation; the number for `undo`."""
    with app.replies.starting(who.owner, conversation):
        number = app.store_of(conversation).remove(who.owner, conversation, message)
    _changed(app, who, conversation)
    _listed(app, who, conversation)
    return number


def branch(app: App, who: Identity, conversation: str, message: str) -> Conversation:
    """A new conversation with everything up to a message."""
    made = app.store_of(conversation).copy_branch(who.owner, conversation, message)
    _listed(app, who, made.id)
    return made


def rename(app: App, who: Identity, conversation: str, title: str) -> None:
    """Give a conversation another title."""
    app.store_of(conversation).rename(who.owner, conversation, title)
    _listed(app, who, conversation)


def arrange(
    app: App,
    who: Identity,
    conversations: Sequence[str],
    folder: str | None = None,
    pinned: bool | None = None,
    add_tags: Sequence[str] = (),
    remove_tags: Sequence[str] = (),
    tags: Sequence[str] | None = None,
) -> None:
    """Put conversations into a folder, pin them, tag them."""
    for store, ids in _by_store(app, conversations):
        store.arrange(who.owner, ids, folder=folder, pinned=pinned, add_tags=add_tags, remove_tags=remove_tags, tags=tags)
    for id in conversations[:100]:  # further ones are seen when the list is read again
        _listed(app, who, id)


def delete(app: App, who: Identity, conversations: Sequence[str]) -> list[int]:
    """Delete conversations, stopping what is being written in them; the numbers for `undo`. Incognito ones are gone for good."""
    if len(conversations) > MAX_TOGETHER:
        raise PromptError(f"{len(conversations):,} conversations are too many for one request; at most {MAX_TOGETHER:,} are taken.")
    numbers: list[int] = []
    for id in conversations:
        for reply in app.replies.running(id):
            if reply.owner == who.owner:
                reply.cancel.cancel()
        store = app.store_of(id)
        try:
            number = store.delete(who.owner, id)
        except NotFound:  # gone already; the others are deleted all the same
            if len(conversations) == 1:
                raise
            continue
        if store is app.store:
            numbers.append(number)
        app.replies.tell(who.owner, "deleted", {"id": id})
    return numbers


def undo(app: App, who: Identity, numbers: Sequence[int]) -> list[str]:
    """Bring back what `delete` and `remove` took away; the conversations."""
    found: list[str] = []
    problem: UserError | None = None
    for number in numbers:
        store = app.incognito if number >= FIRST_IN_MEMORY else app.store
        try:
            found.append(store.restore(who.owner, number))
        except UserError as error:  # the others are brought back all the same
            problem = error
    for id in dict.fromkeys(found):
        _changed(app, who, id)
        _listed(app, who, id)
    if problem:
        raise problem
    return found


def export(app: App, who: Identity, conversations: Sequence[str] | None, form: Literal["json", "markdown"]) -> tuple[str, str]:
    """Name and content of a file with conversations; None: all of them."""
    ids = conversations if conversations is not None else _all(app, who)
    found = [app.store_of(id).conversation(who.owner, id) for id in ids]
    if not found:
        raise PromptError("There is no conversation to export yet.")
    name = transfer.file_name(found[0].title) if len(found) == 1 else "conversations"
    if form == "json":
        return f"{name}.json", transfer.to_json(found)
    return f"{name}.md", "\n\n".join(transfer.to_markdown(conversation) for conversation in found)


def import_file(app: App, who: Identity, data: bytes, name: str) -> list[str]:
    """Store the conversations in a file; their ids. Nothing that is there is touched. Raises BadUpload."""
    try:
        found = transfer.read(data, name, who.owner)
    except DataError as error:
        raise BadUpload(str(error)) from None
    app.store.import_conversations(who.owner, found)
    for conversation in found[:100]:
        _listed(app, who, conversation.id)
    return [conversation.id for conversation in found]


class BadUpload(DataError):
    """A file from outside that cannot be read."""

    status = 400


_changing = threading.Lock()
"""Held while values are read, changed and stored: two browsers may change one conversation at the same moment."""


def _cleaned(value: Any) -> Any:
    """What the store would make of it: else it were one value in memory and another one on the disk."""
    if isinstance(value, str):
        return clean(value)
    return [_cleaned(each) for each in value] if isinstance(value, list) else value


def change_values(app: App, who: Identity, conversation: str | None, values: Mapping[str, Any]) -> Session:
    """Change parameters: the conversation's, and this browser's, which new chats begin with; the values now in effect. Raises SettingsError.

    What is changed in an incognito chat stays in it.
    """
    values = {name: _cleaned(value) for name, value in values.items()}
    own = {name: value for name, value in values.items() if name in PageOptions.model_fields}
    with _changing:
        source = source_of(app, who, conversation)
        changed = source.session.change(values)
        if source.store is app.incognito:
            values = own
        session = app.sessions.change(who.session, values) if values else source.session
        if not conversation:
            return session
        lasts = bool(values.keys() - own.keys()) or source.store is app.incognito
        if lasts:
            source.store.set_settings(who.owner, conversation, changed.kept())
    if lasts:
        app.replies.tell(who.owner, "settings", {"conversation": conversation, "revision": changed.revision})
    return changed


def summarise(app: App, who: Identity, conversation: str, text: str) -> None:
    """Change the words of a conversation's summary; without any, forget it."""
    store = app.store_of(conversation)
    known = store.summary(who.owner, conversation)
    if known:
        store.set_summary(who.owner, conversation, replace(known, text=text.strip()) if text.strip() else None)
        _changed(app, who, conversation)


def _all(app: App, who: Identity) -> list[str]:
    ids: list[str] = []
    cursor = None
    while True:
        page = app.store.conversations(who.owner, limit=1000, before=cursor)
        ids += [item.id for item in page.items]
        cursor = page.next
        if cursor is None:
            return ids


def _by_store(app: App, ids: Sequence[str]) -> list[tuple[Any, list[str]]]:
    stores = (app.store, app.incognito)
    return [(store, found) for store in stores if (found := [id for id in ids if app.store_of(id) is store])]


def _with_detail(message: Message, name: str, value: Any) -> Message:
    return replace(message, details={**message.details, name: value})


def _changed(app: App, who: Identity, conversation: str) -> None:
    app.replies.tell(who.owner, "changed", {"conversation": conversation})


def _listed(app: App, who: Identity, conversation: str) -> None:
    app.replies.tell(who.owner, "conversation", {"id": conversation})
