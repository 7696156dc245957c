"""Rows of conversations and messages: from values to rows and back, and the words of each in the search index.

`where` arguments are constants of this program, never text from outside. Raises NotFound where something is not there, or not the owner's.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modules.conversation import Conversation, Message, Summary
from modules.errors import NotFound
from modules.store.database import Connection
from modules.store.words import clean, clean_name, clean_title, title_from

MAX_TAGS = 50
"""Of one conversation."""


@dataclass(frozen=True)
class ShownMessage:
    """A message of the branch shown; `versions` are the ids of its siblings and itself, oldest first, `position` its own index there."""

    message: Message
    versions: tuple[str, ...]
    position: int


@dataclass(frozen=True)
class MessagePage:
    """Consecutive messages, oldest first; `next` is the id to ask the messages above with, None when the first is the root."""

    items: tuple[ShownMessage, ...]
    next: str | None


@dataclass(frozen=True)
class Node:
    """A message as the tree view shows it: `text` is its beginning."""

    id: str
    parent: str | None
    role: str
    text: str
    state: str
    created: float


# Values


def to_json(values: Mapping[str, Any]) -> str:
    """A value that JSON does not know is kept as its text: a detail may not cost the reply."""
    return json.dumps(dict(values), ensure_ascii=False, separators=(",", ":"), default=lambda v: dict(v) if isinstance(v, Mapping) else str(v))


def message_of(row: sqlite3.Row) -> Message:
    """The message in a row."""
    details = json.loads(row["details"])
    return Message(row["id"], row["parent"], row["role"], row["text"], row["reasoning"], row["created"], row["state"], details)


def conversation_of(db: Connection, head: sqlite3.Row, owner: str) -> Conversation:
    """The whole conversation of a row."""
    rows = db.execute("SELECT * FROM messages WHERE conversation = ? ORDER BY number", (head["number"],))
    messages = {row["id"]: message_of(row) for row in rows}
    settings, tags = json.loads(head["settings"]), tags_of(db, head["number"])
    pinned, summary = bool(head["pinned"]), summary_of(head)
    return Conversation(head["id"], owner, head["title"], messages, head["tip"], settings, head["folder"], tags, pinned, summary)


def summary_of(head: sqlite3.Row) -> Summary | None:
    """The summary in a conversation's row."""
    return Summary(**json.loads(head["summary"])) if head["summary"] else None


def summary_json(summary: Summary | None) -> str:
    """A summary as it stands in a conversation's row."""
    return to_json(vars(summary)) if summary else ""


# Finding


def owner_numbers(db: Connection, owner: str) -> list[int]:
    """The rows of an owner's name."""
    return [row["id"] for row in db.execute("SELECT id FROM owners WHERE name = ?", (owner,))]


def owner_number(db: Connection, owner: str) -> int:
    """A row of an owner's name, made where there is none."""
    known = owner_numbers(db, owner)
    return known[0] if known else inserted(db.execute("INSERT INTO owners (name) VALUES (?)", (owner,)))


def inserted(cursor: sqlite3.Cursor) -> int:
    """The number that the new row was given."""
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def owned(db: Connection, owner: str, id: str) -> sqlite3.Row:
    """The row of a conversation."""
    row = db.one("SELECT c.* FROM conversations c JOIN owners o ON o.id = c.owner WHERE c.id = ? AND o.name = ?", id, owner)
    if row is None:
        raise NotFound("This conversation does not exist any more. Choose another one or start a new one.")
    return row


def in_conversation(db: Connection, number: int, message_id: str) -> sqlite3.Row:
    """The number, id and parent of a message."""
    row = db.one("SELECT number, id, parent FROM messages WHERE id = ? AND conversation = ?", message_id, number)
    if row is None:
        raise NotFound("This message is not in the conversation any more. Reload the page.")
    return row


def branch(db: Connection, last: str | None, limit: int) -> list[sqlite3.Row]:
    """Up to `limit` messages that end with `last`, oldest first."""
    sql = """
        WITH RECURSIVE up (id, step) AS (
            SELECT ?, 1 UNION ALL SELECT m.parent, step + 1 FROM up JOIN messages m USING (id) WHERE m.parent IS NOT NULL AND step < ?
        )
        SELECT m.* FROM up JOIN messages m USING (id) ORDER BY step DESC"""
    return [] if last is None else db.execute(sql, (last, limit)).fetchall()


def versions(db: Connection, row: sqlite3.Row) -> tuple[str, ...]:
    """Ids of the siblings of a message and itself, oldest first."""
    sql = "SELECT id FROM messages WHERE conversation = ? AND parent IS ? ORDER BY number"
    return tuple(sibling["id"] for sibling in db.execute(sql, (row["conversation"], row["parent"])))


def newest_leaf(db: Connection, number: int, message_id: str) -> str:
    """The end of the branch that begins with a message and goes on with the newest version each time."""
    sql = """
        WITH RECURSIVE down (id, step) AS (
            SELECT ?, 0 UNION ALL
            SELECT (SELECT m.id FROM messages m WHERE m.conversation = ? AND m.parent = down.id ORDER BY m.number DESC LIMIT 1), step + 1
            FROM down WHERE down.id IS NOT NULL
        )
        SELECT id FROM down WHERE id IS NOT NULL ORDER BY step DESC LIMIT 1"""
    leaf: str = db.execute(sql, (message_id, number)).fetchone()["id"]
    return leaf


def tags_of(db: Connection, number: int) -> tuple[str, ...]:
    """The tags of a conversation, in order."""
    return tuple(row["name"] for row in db.execute("SELECT name FROM tags WHERE conversation = ? ORDER BY name", (number,)))


# Writing


def newest_turn(db: Connection) -> int:
    """The turn of what changes now."""
    turn: int = db.execute("SELECT coalesce(max(turn), 0) + 1 FROM conversations").fetchone()[0]
    return turn


def place_in_time(db: Connection, owner: int, changed: float) -> int:
    """The turn of a conversation that comes from elsewhere: that of the owner's last one that changed before; among equals the later is first."""
    sql = "SELECT turn FROM conversations WHERE owner = ? AND changed <= ? ORDER BY changed DESC LIMIT 1"
    row = db.one(sql, owner, changed)
    return row["turn"] if row else 0


def insert_conversation(db: Connection, owner: int, conversation: Conversation, created: float, changed: float, turn: int) -> int:
    """Store a conversation without its messages, and return its number."""
    sql = """INSERT INTO conversations (id, owner, title, tip, changed, turn, created, folder, pinned, settings, summary)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
    title, folder = clean_title(conversation.title), clean_name(conversation.folder)
    own = (folder, conversation.pinned, to_json(conversation.settings), summary_json(conversation.summary))
    values = (conversation.id, owner, title, conversation.tip, changed, turn, created, *own)
    number = inserted(db.execute(sql, values))
    insert_tags(db, number, sorted(set(conversation.tags))[:MAX_TAGS])
    index_title(db, number)
    return number


def insert_tags(db: Connection, number: int, names: Iterable[str]) -> None:
    """Give a conversation further tags."""
    for name in filter(None, map(clean_name, names)):
        db.execute("INSERT OR IGNORE INTO tags (conversation, name) VALUES (?, ?)", (number, name))


def insert_messages(db: Connection, number: int, messages: Sequence[Message]) -> None:
    """Raises NotFound when a parent is neither stored in this conversation nor earlier in `messages` (so there are no cycles)."""
    first = db.execute("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'messages'").fetchone()[0]
    known: set[str | None] = {None}
    for message in messages:
        if message.parent not in known:
            in_conversation(db, number, message.parent or "")
        known.add(message.id)
    db.executemany(
        "INSERT INTO messages (id, conversation, parent, role, created, state, details, reasoning, text) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [(m.id, number, m.parent, m.role, m.created, m.state, clean(to_json(m.details)), clean(m.reasoning), clean(m.text)) for m in messages],
    )
    index_messages(db, "number > ?", first)


def update(db: Connection, number: int, message: Message, details: Mapping[str, Any]) -> None:
    """Write text, reasoning and details of a message; its words in the index are the caller's."""
    values = (message.text, message.reasoning, to_json(details), number)
    db.execute("UPDATE messages SET text = ?, reasoning = ?, details = ? WHERE number = ?", values)


def index_messages(db: Connection, where: str, value: int) -> None:
    """Write the words of the ended messages chosen by `where` into the index."""
    numbers = f"SELECT number FROM messages WHERE {where} AND state <> 'running'"
    db.execute(f"INSERT INTO message_index (rowid, owner, text) SELECT number, owner, text FROM message_search WHERE number IN ({numbers})", (value,))


def unindex_messages(db: Connection, where: str, value: int) -> None:
    """Before the text changes or goes: the index finds the words to remove by reading it."""
    db.execute(f"DELETE FROM message_index WHERE rowid IN (SELECT number FROM messages WHERE {where} AND state <> 'running')", (value,))


def index_title(db: Connection, number: int) -> None:
    """Write the words of a conversation's title into the index."""
    db.execute("INSERT INTO title_index (rowid, owner, text) SELECT number, owner, text FROM title_search WHERE number = ?", (number,))


def unindex_title(db: Connection, number: int) -> None:
    """Before the title changes or goes."""
    db.execute("DELETE FROM title_index WHERE rowid = ?", (number,))


def set_title(db: Connection, number: int, title: str) -> None:
    """Change a title, in the index too."""
    unindex_title(db, number)
    db.execute("UPDATE conversations SET title = ? WHERE number = ?", (title, number))
    index_title(db, number)


def title_if_none(db: Connection, head: sqlite3.Row, messages: Sequence[Message]) -> None:
    """A conversation without a title takes one from its first user message, else from what stands there first."""
    texts = [m.text for m in messages if m.role == "user"] or [m.text for m in messages]
    title = "" if head["title"] else title_from(next(filter(None, texts), ""))
    if title:
        set_title(db, head["number"], title)


def show(db: Connection, number: int, tip: str | None) -> None:
    """Show the branch that ends with message `tip`."""
    db.execute("UPDATE conversations SET tip = ? WHERE number = ?", (tip, number))


def touch(db: Connection, number: int) -> None:
    """Count as the newest change."""
    db.execute("UPDATE conversations SET changed = ?, turn = ? WHERE number = ?", (time.time(), newest_turn(db), number))
