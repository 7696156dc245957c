"""Conversations in one SQLite file: owners, trees of messages, full-text search, what was deleted, drafts, browser sessions, the API's responses.

A write is one transaction and a message is one row, so saving a running reply costs the same in a chat of any length; a reply is saved at most
once a second. Below this class: `database` (the file, its connections), `schema`, `rows` (conversations and messages), `lists` (the list and
its search), `trash`, `responses` (of the API), `words` (texts).

Every method may be called from any thread, checks the owner (NotFound for another's conversation, as if it were absent) and raises DataError
when the file cannot be read or written, Busy when no connection comes free.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from modules.conversation import Conversation, Message, Summary, new_id
from modules.errors import NameError_, NotFound, PromptTooLong, UserError
from modules.store import lists, responses, rows, trash
from modules.store.database import Connection, Database
from modules.store.lists import MAX_PAGE, ConversationInfo, Filter, Page, bounded
from modules.store.responses import StoredResponse
from modules.store.rows import MAX_TAGS, MessagePage, Node, ShownMessage, in_conversation, owned
from modules.store.schema import MIGRATIONS
from modules.store.trash import FIRST_IN_MEMORY, Trashed
from modules.store.words import MAX_NAME, MAX_TITLE, Snippet, clean, clean_name, clean_title, title_from

__all__ = [
    "FIRST_IN_MEMORY", "INCOGNITO", "MAX_DRAFTS", "MAX_DRAFT_CHARACTERS", "MAX_NAME", "MAX_PAGE", "MAX_SESSIONS", "MAX_TAGS", "MAX_TITLE",
    "MIGRATIONS", "ConversationInfo", "MessagePage", "Node", "Page", "ShownMessage", "Snippet", "Store", "StoredResponse", "Trashed", "clean",
    "clean_name", "clean_title", "title_from",
]  # fmt: skip

INCOGNITO = "incognito-"
"""What the ids of conversations in a store in memory begin with."""
MAX_SESSIONS = 10_000
MAX_DRAFTS = 1000
"""Of one owner."""
MAX_DRAFT_CHARACTERS = 400_000
_BEGINNING = 80
"""Characters of a message in the tree view."""


class Store(Database):
    """The database file at `path`, open. One per user_data folder: opening marks replies that nobody writes any more as interrupted."""

    @classmethod
    def open(cls, path: Path, migrations: Sequence[str] = MIGRATIONS) -> Store:
        """Create the file or bring it to the newest schema, after keeping a copy beside it (`<name>.before-v<n>`).

        Raises DataError for a damaged or foreign file and one written by a newer program; such a file is left as it is.
        """
        store = cls(path, cls._opened(path, migrations))
        try:
            with store._writing() as db:
                _interrupt(db)
                trash.purge(db, time.time())
        except UserError:
            store.close()
            raise
        return store

    @classmethod
    def open_memory(cls) -> Store:
        """An empty store that is never on disk: for incognito conversations. What is deleted in it as a whole does not come back."""
        path = Path(":memory:")
        store = cls(path, cls._opened(path, MIGRATIONS))
        with store._writing() as db:
            db.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('trash', ?)", (trash.FIRST_IN_MEMORY,))
        return store

    # Reading

    def conversations(
        self, owner: str, query: str = "", limit: int = 50, before: str | None = None, folder: str | None = None, tag: str | None = None
    ) -> Page:
        """The owner's conversations: pinned ones (the first page holds up to 100 of them beyond `limit`), then by change, newest first.

        With `query` those whose title holds all its words, then those with such a message. `folder` ("": in none) and `tag` choose among
        them. `before` is `Page.next` of the page before. Raises NotFound for a cursor that this method did not give.
        """
        with self._reading() as db:
            chosen = Filter(rows.owner_numbers(db, owner), folder, tag)
            if query.strip():
                return lists.search(db, chosen, query, bounded(limit), before)
            return lists.listed(db, chosen, bounded(limit), before)

    def folders(self, owner: str) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
        """The owner's folders and tags, each as (name, number of conversations), by name."""
        with self._reading() as db:
            return lists.counts(db, rows.owner_numbers(db, owner))

    def info(self, owner: str, id: str) -> ConversationInfo:
        """One row of the list, without its messages."""
        with self._reading() as db:
            head = owned(db, owner, id)
            return lists.info(db.execute(f"{lists.INFO} WHERE c.number = ?", (head["number"],)).fetchone())

    def conversation(self, owner: str, id: str) -> Conversation:
        """The whole tree."""
        with self._reading() as db:
            return rows.conversation_of(db, owned(db, owner, id), owner)

    def messages(self, owner: str, id: str, limit: int = 40, before: str | None = None) -> MessagePage:
        """The newest `limit` messages of the branch shown, or those above message `before`. The cost is that of `limit` rows."""
        with self._reading() as db:
            head = owned(db, owner, id)
            last = head["tip"] if before is None else in_conversation(db, head["number"], before)["parent"]
            found = rows.branch(db, last, bounded(limit))
            versions = {row["id"]: rows.versions(db, row) for row in found}
        items = tuple(ShownMessage(rows.message_of(row), versions[row["id"]], versions[row["id"]].index(row["id"])) for row in found)
        return MessagePage(items, found[0]["id"] if found and found[0]["parent"] is not None else None)

    def tree(self, owner: str, id: str) -> tuple[list[Node], str | None]:
        """Every message with the beginning of its text, parents before children and versions oldest first; and the tip."""
        with self._reading() as db:
            head = owned(db, owner, id)
            sql = "SELECT id, parent, role, substr(text, 1, ?) AS text, state, created FROM messages WHERE conversation = ? ORDER BY number"
            return [Node(**dict(row)) for row in db.execute(sql, (_BEGINNING, head["number"]))], head["tip"]

    # A conversation and its messages

    def create(self, owner: str, title: str = "", settings: Mapping[str, Any] | None = None) -> Conversation:
        """A new, empty conversation with its own `settings`. Without a title it takes one from its first user message."""
        conversation = Conversation(self._new_id(), owner, clean_title(title), settings=dict(settings or {}))
        with self._writing() as db:
            now = time.time()
            rows.insert_conversation(db, rows.owner_number(db, owner), conversation, now, now, rows.newest_turn(db))
        return conversation

    def add(self, owner: str, id: str, messages: Sequence[Message], tip: str) -> None:
        """Insert `messages`, parents before children, and show the branch that ends with message `tip`; all or nothing."""
        with self._writing() as db:
            head = owned(db, owner, id)
            rows.insert_messages(db, head["number"], messages)
            in_conversation(db, head["number"], tip)
            rows.title_if_none(db, head, messages)
            rows.show(db, head["number"], tip)
            rows.touch(db, head["number"])

    def save(self, message: Message) -> None:
        """Write text, reasoning, state and details of a message that is stored already. Not for callers from outside: asks for no owner.

        Whether it is pinned stays as `pin_message` left it, also while a reply is written that knows nothing of it. While the message is
        running this is one row. Raises NotFound when the conversation has been deleted meanwhile.
        """
        with self._writing() as db:
            row = db.one("SELECT number, conversation, state, details FROM messages WHERE id = ?", message.id)
            if row is None:
                raise NotFound("This message was deleted while it was being written.")
            details = _pinned(message.details, json.loads(row["details"]).get("pinned"))
            if row["state"] == message.state == "running":
                rows.update(db, row["number"], message, details)
                return
            rows.unindex_messages(db, "number = ?", row["number"])
            rows.update(db, row["number"], message, details)
            db.execute("UPDATE messages SET state = ? WHERE number = ?", (message.state, row["number"]))
            rows.index_messages(db, "number = ?", row["number"])
            rows.touch(db, row["conversation"])

    def pin_message(self, owner: str, id: str, message_id: str, pinned: bool) -> None:
        """Set `details["pinned"]` of a message to True, or take it out."""
        with self._writing() as db:
            number = in_conversation(db, owned(db, owner, id)["number"], message_id)["number"]
            (details,) = db.execute("SELECT details FROM messages WHERE number = ?", (number,)).fetchone()
            kept = rows.to_json(_pinned(json.loads(details), pinned))
            db.execute("UPDATE messages SET details = ? WHERE number = ?", (kept, number))

    def set_tip(self, owner: str, id: str, tip: str) -> None:
        """Show the branch that ends with message `tip`. Does not count as a change in the list's order."""
        with self._writing() as db:
            number = owned(db, owner, id)["number"]
            in_conversation(db, number, tip)
            rows.show(db, number, tip)

    def show(self, owner: str, id: str, message_id: str) -> str:
        """Show the branch of message `message_id` down to its newest leaf (a swipe), and return that leaf's id, the new tip."""
        with self._writing() as db:
            number = owned(db, owner, id)["number"]
            tip = rows.newest_leaf(db, number, in_conversation(db, number, message_id)["id"])
            rows.show(db, number, tip)
        return tip

    def copy_branch(self, owner: str, id: str, message_id: str) -> Conversation:
        """A new conversation with the messages from the root to `message_id`, with what explains them, and the settings, folder, tags and summary."""
        with self._writing() as db:
            old = rows.conversation_of(db, owned(db, owner, id), owner)
            path = old.path(old[message_id].id)
            new = {message.id: new_id() for message in path}
            messages = {new[message.id]: _copied(message, new) for message in path}
            title = re.sub(r" \(branch\)$", "", old.title)[: MAX_TITLE - 9] + " (branch)"
            told = old.summary and new.get(old.summary.after)  # else it tells of another branch
            summary = replace(old.summary, after=told) if old.summary and told else None
            copy = replace(old, id=self._new_id(), title=title, messages=messages, tip=new[message_id], pinned=False, summary=summary)
            number = rows.insert_conversation(db, rows.owner_number(db, owner), copy, time.time(), time.time(), rows.newest_turn(db))
            rows.insert_messages(db, number, tuple(messages.values()))
            for message, (prompt, tokens) in _explanations(db, new).items():
                _explain(db, new[message], prompt, tokens)
        return copy

    def rename(self, owner: str, id: str, title: str) -> None:
        """Give a title, made one printable line of at most MAX_TITLE characters."""
        with self._writing() as db:
            rows.set_title(db, owned(db, owner, id)["number"], clean_title(title))

    def arrange(
        self,
        owner: str,
        ids: Sequence[str],
        *,
        folder: str | None = None,
        pinned: bool | None = None,
        add_tags: Sequence[str] = (),
        remove_tags: Sequence[str] = (),
        tags: Sequence[str] | None = None,
    ) -> None:
        """Put conversations into a folder ("": out of any), pin them, change their tags (`tags`: these alone); all of them or none.

        Names are made one line of at most MAX_NAME characters. Does not count as a change in the list's order. Raises NameError_ for more
        than MAX_TAGS tags.
        """
        with self._writing() as db:
            for id in ids:
                number = owned(db, owner, id)["number"]
                if folder is not None:
                    db.execute("UPDATE conversations SET folder = ? WHERE number = ?", (clean_name(folder), number))
                if pinned is not None:
                    db.execute("UPDATE conversations SET pinned = ? WHERE number = ?", (bool(pinned), number))
                if tags is not None:
                    db.execute("DELETE FROM tags WHERE conversation = ?", (number,))
                for name in remove_tags:
                    db.execute("DELETE FROM tags WHERE conversation = ? AND name = ?", (number, clean_name(name)))
                rows.insert_tags(db, number, [*(tags or ()), *add_tags])
                if len(rows.tags_of(db, number)) > MAX_TAGS:
                    raise NameError_(f"A conversation takes at most {MAX_TAGS} tags. Take some off first.")

    def settings(self, owner: str, id: str) -> dict[str, Any]:
        """What `set_settings` kept for a conversation; {} for none."""
        with self._reading() as db:
            values: dict[str, Any] = json.loads(owned(db, owner, id)["settings"])
        return values

    def set_settings(self, owner: str, id: str, values: Mapping[str, Any]) -> None:
        """Keep a conversation's own JSON `values`. Does not count as a change in the list's order."""
        with self._writing() as db:
            number = owned(db, owner, id)["number"]
            db.execute("UPDATE conversations SET settings = ? WHERE number = ?", (rows.to_json(values), number))

    def summary(self, owner: str, id: str) -> Summary | None:
        """What `set_summary` kept for a conversation, or None."""
        with self._reading() as db:
            return rows.summary_of(owned(db, owner, id))

    def set_summary(self, owner: str, id: str, summary: Summary | None) -> None:
        """Keep what the model is told of dropped messages; None forgets it."""
        with self._writing() as db:
            number = owned(db, owner, id)["number"]
            db.execute("UPDATE conversations SET summary = ? WHERE number = ?", (rows.summary_json(summary), number))

    # Deleting, and taking that back

    def delete(self, owner: str, id: str) -> int:
        """Move a conversation into the trash; the number to `restore` it with. In memory it is gone for good, and the number leads nowhere."""
        with self._writing() as db:
            trash.purge(db, time.time())
            number = trash.put_conversation(db, owned(db, owner, id), time.time())
            if self.in_memory:
                db.execute("DELETE FROM trash WHERE conversation = ?", (id,))
        return number

    def remove(self, owner: str, id: str, message_id: str) -> int:
        """Move a message and everything below it into the trash; the number to `restore` it with.

        If it was shown, its nearest version is shown instead (the one before, else the one after) down to its newest leaf; without another
        version, what stands above it.
        """
        with self._writing() as db:
            trash.purge(db, time.time())
            head = owned(db, owner, id)
            number = trash.put_branch(db, head, message_id, time.time())
            rows.touch(db, head["number"])
        return number

    def restore(self, owner: str, number: int) -> str:
        """Put back what `delete` or `remove` took away, exactly where it was; the id of the conversation. A branch that was shown is again.

        A message that was being written becomes interrupted. Raises NotFound when it is not in the trash, or what it belongs to is there too.
        """
        with self._writing() as db:
            return trash.restore(db, owner, number)

    def trash(self, owner: str, limit: int = 200) -> list[Trashed]:
        """The owner's newest deletions, newest first. Each stays 30 days."""
        with self._reading() as db:
            numbers = rows.owner_numbers(db, owner)
            sql = f"""SELECT number, kind, title, conversation, removed FROM trash WHERE owner IN ({lists.marks(numbers)})
                ORDER BY number DESC LIMIT ?"""
            return [Trashed(**dict(row)) for row in db.execute(sql, (*numbers, bounded(limit)))]

    def empty_trash(self, owner: str) -> None:
        """Forget all that the owner deleted."""
        with self._writing() as db:
            numbers = rows.owner_numbers(db, owner)
            db.execute(f"DELETE FROM trash WHERE owner IN ({lists.marks(numbers)})", numbers)

    # Beside the conversations

    def draft(self, owner: str, id: str | None) -> str:
        """The text typed last for a conversation, or for a new one (None), and not sent; "" for none."""
        with self._reading() as db:
            numbers = [owned(db, owner, id)["owner"]] if id else rows.owner_numbers(db, owner)
            sql = f"SELECT text FROM drafts WHERE conversation = ? AND owner IN ({lists.marks(numbers)}) ORDER BY saved DESC LIMIT 1"
            row = db.one(sql, id or "", *numbers)
        return row["text"] if row else ""

    def save_draft(self, owner: str, id: str | None, text: str) -> None:
        """Keep a draft, or forget it ("" as `text`); only the MAX_DRAFTS saved last are kept. Raises PromptTooLong."""
        if len(text) > MAX_DRAFT_CHARACTERS:
            raise PromptTooLong(f"A draft of more than {MAX_DRAFT_CHARACTERS:,} characters is not kept. Send it, or keep it in a file.")
        with self._writing() as db:
            number = owned(db, owner, id)["owner"] if id else rows.owner_number(db, owner)
            db.execute("DELETE FROM drafts WHERE conversation = ? AND owner IN (SELECT id FROM owners WHERE name = ?)", (id or "", owner))
            if text:
                db.execute("INSERT INTO drafts (owner, conversation, saved, text) VALUES (?, ?, ?, ?)", (number, id or "", time.time(), text))
                sql = "SELECT saved FROM drafts WHERE owner = ? ORDER BY saved DESC LIMIT 1 OFFSET ?"
                db.execute(f"DELETE FROM drafts WHERE owner = ? AND saved < ({sql})", (number, number, MAX_DRAFTS - 1))

    def save_explanation(self, message_id: str, prompt: str, tokens: bytes) -> None:
        """Keep what explains a message: its prompt and its packed tokens. It goes with the message. Asks for no owner, as `save` does not."""
        with self._writing() as db:
            if not _explain(db, message_id, prompt, tokens):
                raise NotFound("This message was deleted while it was being written.")

    def explanations(self, owner: str, id: str, message_ids: Iterable[str]) -> dict[str, tuple[str, bytes]]:
        """(prompt, tokens) of those messages of a conversation that have them."""
        with self._reading() as db:
            number = owned(db, owner, id)["number"]
            return _explanations(db, message_ids, number)

    def imported(self, key: str) -> bool:
        """Whether `mark_imported` was called with `key`."""
        with self._reading() as db:
            return db.one("SELECT 1 FROM imports WHERE key = ?", key) is not None

    def mark_imported(self, keys: Iterable[str]) -> None:
        """Remember that files (by their hashes) were imported."""
        with self._writing() as db:
            for key in keys:
                db.execute("INSERT OR IGNORE INTO imports (key) VALUES (?)", (key,))

    def import_conversations(self, owner: str, conversations: Iterable[Conversation]) -> None:
        """Store whole conversations under `owner`, one transaction each, keeping ids, titles and tips. Parents come before children.

        Each takes its place in the list by the time of its newest message. A message that claims to be running becomes interrupted: nobody
        writes it here. Nothing is written over: an id that is there already is a DataError.
        """
        for conversation in conversations:
            messages = tuple(replace(m, state="interrupted") if m.state == "running" else m for m in conversation.messages.values())
            times = [m.created for m in messages if m.created > 0]
            with self._writing() as db:
                number = rows.owner_number(db, owner)
                turn = rows.place_in_time(db, number, max(times)) if times else rows.newest_turn(db)
                created, changed = (min(times), max(times)) if times else (time.time(), time.time())
                number = rows.insert_conversation(db, number, conversation, created, changed, turn)
                rows.insert_messages(db, number, messages)
                if conversation.tip is not None:
                    in_conversation(db, number, conversation.tip)

    def change_owner(self, old: str, new: str) -> None:
        """Give all conversations of `old` to `new` (a browser's chats, at its first login). Costs the same for any number of them."""
        with self._writing() as db:
            db.execute("UPDATE owners SET name = ? WHERE name = ?", (new, old))

    def session(self, key: str) -> dict[str, Any] | None:
        """What `save_session` kept under `key`, or None."""
        with self._reading() as db:
            row = db.one('SELECT "values" FROM sessions WHERE key = ?', key)
        return None if row is None else json.loads(row["values"])

    def save_session(self, key: str, values: Mapping[str, Any]) -> None:
        """Keep small JSON `values` under `key`; only the MAX_SESSIONS saved last are kept. The key is stored as it is: pass no secret."""
        with self._writing() as db:
            db.execute('REPLACE INTO sessions (key, "values", saved) VALUES (?, ?, ?)', (key, rows.to_json(values), time.time()))
            db.execute("DELETE FROM sessions WHERE saved < (SELECT saved FROM sessions ORDER BY saved DESC LIMIT 1 OFFSET ?)", (MAX_SESSIONS - 1,))

    # Of the API: `client` is who asked

    def response(self, client: str, id: str) -> StoredResponse:
        """A response that was kept."""
        with self._reading() as db:
            return responses.one(db, client, id)

    def response_chain(self, client: str, id: str) -> list[StoredResponse]:
        """A response and those that it goes on from, oldest first. Raises NotFound when one of them is gone."""
        with self._reading() as db:
            return responses.chain(db, client, id)

    def save_response(self, client: str, response: StoredResponse) -> None:
        """Keep a response; of all clients' only those used last are kept, at most MAX_RESPONSES."""
        with self._writing() as db:
            responses.insert(db, client, response)

    def delete_response(self, client: str, id: str) -> None:
        """Forget a response. One that goes on from it stays, and cannot be gone on from."""
        with self._writing() as db:
            responses.delete(db, client, id)

    def _new_id(self) -> str:
        return INCOGNITO + new_id() if self.in_memory else new_id()


def _interrupt(db: Connection) -> None:
    running = [row["number"] for row in db.execute("SELECT number FROM messages WHERE state = 'running'")]
    for number in running:
        db.execute("UPDATE messages SET state = 'interrupted' WHERE number = ?", (number,))
        rows.index_messages(db, "number = ?", number)


def _pinned(details: Mapping[str, Any], pinned: object) -> dict[str, Any]:
    """`details` with "pinned" as it is to be."""
    others = {name: value for name, value in details.items() if name != "pinned"}
    return {**others, "pinned": True} if pinned else others


def _copied(message: Message, new: Mapping[str, str]) -> Message:
    """A message of a path under its new id. It stands beside no other reply now, and nobody writes it."""
    details = {name: value for name, value in message.details.items() if name != "group"}
    parent = new[message.parent] if message.parent is not None else None
    return replace(message, id=new[message.id], parent=parent, state="interrupted" if message.state == "running" else message.state, details=details)


def _explain(db: Connection, message_id: str, prompt: str, tokens: bytes) -> bool:
    sql = "INSERT OR REPLACE INTO explanations (message, prompt, tokens) SELECT number, ?, ? FROM messages WHERE id = ?"
    return db.execute(sql, (prompt, tokens, message_id)).rowcount > 0


def _explanations(db: Connection, message_ids: Iterable[str], number: int | None = None) -> dict[str, tuple[str, bytes]]:
    """(prompt, tokens) by message id; `number`: only within this conversation."""
    sql = """SELECT e.prompt, e.tokens FROM explanations e JOIN messages m ON m.number = e.message
        WHERE m.id = ? AND m.conversation = coalesce(?, m.conversation)"""
    found = {id: db.one(sql, id, number) for id in message_ids}
    return {id: (row["prompt"], bytes(row["tokens"])) for id, row in found.items() if row}
