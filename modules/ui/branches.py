"""What the page is told of a conversation: the branch shown, some of its messages, the model's state. Reads the store, knows no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from modules import archive
from modules.app import App
from modules.auth import Identity
from modules.conversation import Message
from modules.errors import NotFound, TemplateError
from modules.prompting import substituted
from modules.sessions import Session
from modules.templates import ChatTemplate
from modules.turns import source_of
from modules.ui.views import message_view, status_view

Json = dict[str, Any]


def branch_view(app: App, who: Identity, id: str, before: str | None = None) -> Json:
    """The newest messages of the branch shown, or those above message `before`; running replies as they are now. Raises NotFound."""
    store = app.store_of(id)
    page = store.messages(who.owner, id, before=before)
    messages = [message_view(app.replies.now(m.message), m.versions) for m in page.items]
    if before:
        return {"id": id, "messages": messages, "earlier": page.next is not None}
    info, source = store.info(who.owner, id), source_of(app, who, id)
    versions = page.items[-1].versions if page.items else ()
    return {
        "id": id,
        "title": info.title,
        "messages": messages,
        "earlier": page.next is not None,
        "beside": [message_view(app.replies.now(m), versions) for m in archive.beside(app, who, id, page)],
        "revision": source.session.revision,
        "values": source.session.values(),
        "draft": store.draft(who.owner, id),
        "summary": vars(source.summary) if source.summary else None,
        "folder": info.folder,
        "pinned": info.pinned,
        "tags": list(info.tags),
        "incognito": store is app.incognito,
    }


def greeting_view(session: Session) -> Json | None:
    """The message that a new chat with these values begins with, if any."""
    chat = session.chat
    if chat.mode == "instruct" or not chat.greeting.strip():
        return None
    return message_view(Message("", None, "assistant", substituted(chat.greeting, chat), details={"greeting": True, "name": chat.name2}))


def message_views(app: App, who: Identity, id: str, ids: Sequence[str]) -> list[Json]:
    """Views of messages, in their order; those that are gone are left out. Raises NotFound for the conversation."""
    store = app.store_of(id)
    page = store.messages(who.owner, id, limit=len(ids))
    known = {m.message.id: (m.message, m.versions) for m in page.items}
    if not known.keys() >= set(ids):  # siblings, or another branch
        tree = store.conversation(who.owner, id)
        known = {each: (tree.messages[each], tree.siblings(each)) for each in ids if each in tree.messages}
    return [message_view(app.replies.now(known[each][0]), known[each][1]) for each in ids if each in known]


def shown_values(app: App, who: Identity, conversation: str) -> Json:
    """The values that the controls show: the conversation's, or this browser's where there is none, or not (any more) one of its own."""
    try:
        return source_of(app, who, conversation or None).session.values()
    except NotFound:
        return app.sessions.get(who.session).values()


def status_now(app: App) -> Json:
    """The model's state."""
    backend = app.models.loaded_backend()
    return status_view(app.models.status(), _knows(backend.chat_template or "") if backend else ())


@lru_cache(maxsize=32)
def _knows(template: str) -> tuple[str, ...]:
    """Which thinking options a model's template asks for; none for a wrong one, which is told when it is used. Asked for at each event of a tab."""
    try:
        return tuple(sorted(ChatTemplate(template).thinking_variables))
    except TemplateError:
        return ()
