"""What was deleted and can come back: whole conversations, and branches of them, as rows of JSON in the table `trash`.

Rows come back as they were, with their numbers, so that everything stands where it stood. Nothing is written over: a branch whose
conversation, or whose message above it, is gone too stays in the trash until that is restored.
"""

from __future__ import annotations

import json
import sqlite3
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modules.errors import NotFound
from modules.store import rows as r
from modules.store.database import Connection
from modules.store.words import title_from

KEPT_SECONDS = 30 * 24 * 3600
FIRST_IN_MEMORY = 1 << 40
"""Numbers in a store in memory begin here: they lead nowhere in one on disk, and none of those leads here."""
_CONVERSATION = ("number", "id", "owner", "title", "tip", "changed", "turn", "created", "folder", "pinned", "settings", "summary")
_MESSAGE = ("number", "id", "conversation", "parent", "role", "created", "state", "details", "reasoning", "text")


@dataclass(frozen=True)
class Trashed:
    """One deletion. `kind` is "conversation" or "messages", `title` the conversation's or the beginning of the first message."""

    number: int
    kind: str
    title: str
    conversation: str
    removed: float
    """Seconds since the epoch."""


def purge(db: Connection, now: float) -> None:
    """Forget what was deleted more than KEPT_SECONDS ago."""
    db.execute("DELETE FROM trash WHERE removed < ?", (now - KEPT_SECONDS,))


def put_conversation(db: Connection, head: sqlite3.Row, now: float) -> int:
    """Move a conversation into the trash."""
    number = head["number"]
    messages = db.execute("SELECT * FROM messages WHERE conversation = ? ORDER BY number", (number,)).fetchall()
    draft = db.one("SELECT text FROM drafts WHERE conversation = ? AND owner = ?", head["id"], head["owner"])
    content = {"conversation": dict(head), "tags": r.tags_of(db, number), "draft": draft["text"] if draft else "", **_content(db, number, messages)}
    kept = _keep(db, head, "conversation", head["title"], content, now)
    r.unindex_messages(db, "conversation = ?", number)
    r.unindex_title(db, number)
    db.execute("DELETE FROM drafts WHERE conversation = ?", (head["id"],))
    db.execute("DELETE FROM messages WHERE conversation = ?", (number,))
    db.execute("DELETE FROM conversations WHERE number = ?", (number,))
    return kept


def put_branch(db: Connection, head: sqlite3.Row, message_id: str, now: float) -> int:
    """Move a message and everything below it into the trash. If it was shown, its nearest older version is, or a newer one, or its parent."""
    first = r.in_conversation(db, head["number"], message_id)
    messages = _below(db, head["number"], message_id)
    shown = any(row["id"] == head["tip"] for row in messages)
    content = {"tip": head["tip"] if shown else None, **_content(db, head["number"], messages)}
    kept = _keep(db, head, "messages", title_from(messages[0]["text"]) or head["title"], content, now)
    if shown:
        r.show(db, head["number"], _instead(db, head["number"], first))
    db.executemany("DELETE FROM message_index WHERE rowid = ?", [(row["number"],) for row in messages if row["state"] != "running"])
    db.executemany("DELETE FROM messages WHERE number = ?", [(row["number"],) for row in messages])
    return kept


def restore(db: Connection, owner: str, number: int) -> str:
    """Put back what deletion `number` took away; the id of its conversation. Raises NotFound, and then changes nothing."""
    sql = "SELECT t.* FROM trash t JOIN owners o ON o.id = t.owner WHERE t.number = ? AND o.name = ?"
    kept = db.one(sql, number, owner) if 0 < number < 1 << 62 else None
    if kept is None:
        raise NotFound("This is not in the trash any more: it was restored, or deleted for good.")
    content = json.loads(kept["content"])
    (_restore_conversation if kept["kind"] == "conversation" else _restore_branch)(db, kept, content)
    db.execute("DELETE FROM trash WHERE number = ?", (number,))
    id: str = kept["conversation"]
    return id


def _restore_conversation(db: Connection, kept: sqlite3.Row, content: dict[str, Any]) -> None:
    head = content["conversation"]
    _insert(db, "conversations", _CONVERSATION, [head])
    r.insert_tags(db, head["number"], content["tags"])
    r.index_title(db, head["number"])
    if content["draft"]:
        values = (head["owner"], head["id"], kept["removed"], content["draft"])
        db.execute("INSERT INTO drafts (owner, conversation, saved, text) VALUES (?, ?, ?, ?)", values)
    _restore_messages(db, content)


def _restore_branch(db: Connection, kept: sqlite3.Row, content: dict[str, Any]) -> None:
    head = db.one("SELECT number FROM conversations WHERE id = ? AND owner = ?", kept["conversation"], kept["owner"])
    if head is None:
        raise NotFound("The conversation of these messages is deleted too. Restore it first, then these messages.")
    number = head["number"]
    above = content["messages"][0]["parent"]
    if above is not None and db.one("SELECT 1 FROM messages WHERE id = ? AND conversation = ?", above, number) is None:
        raise NotFound("What stood above these messages is deleted too. Restore that first, then these messages.")
    _restore_messages(db, content)
    if content["tip"] is not None:
        r.show(db, number, content["tip"])


def _restore_messages(db: Connection, content: dict[str, Any]) -> None:
    messages = [message if message["state"] != "running" else message | {"state": "interrupted"} for message in content["messages"]]
    _insert(db, "messages", _MESSAGE, messages)
    words = "INSERT INTO message_index (rowid, owner, text) SELECT number, owner, text FROM message_search WHERE number = ?"
    db.executemany(words, [(message["number"],) for message in messages])
    explanations = [(number, prompt, b64decode(tokens)) for number, prompt, tokens in content["explanations"]]
    db.executemany("INSERT INTO explanations (message, prompt, tokens) VALUES (?, ?, ?)", explanations)


def _insert(db: Connection, table: str, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    sql = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
    db.executemany(sql, [[row[name] for name in columns] for row in rows])


def _keep(db: Connection, head: sqlite3.Row, kind: str, title: str, content: dict[str, Any], now: float) -> int:
    sql = "INSERT INTO trash (owner, kind, title, conversation, removed, content) VALUES (?, ?, ?, ?, ?, ?)"
    return r.inserted(db.execute(sql, (head["owner"], kind, title, head["id"], now, r.to_json(content))))


def _content(db: Connection, number: int, messages: Sequence[sqlite3.Row]) -> dict[str, Any]:
    numbers = {row["number"] for row in messages}
    found = db.execute("SELECT e.* FROM explanations e JOIN messages m ON m.number = e.message WHERE m.conversation = ?", (number,))
    explanations = [(row["message"], row["prompt"], b64encode(row["tokens"]).decode()) for row in found if row["message"] in numbers]
    return {"messages": [dict(row) for row in messages], "explanations": explanations}


def _below(db: Connection, number: int, message_id: str) -> list[sqlite3.Row]:
    """A message and everything below it, parents first."""
    sql = """
        WITH RECURSIVE down (id) AS (
            SELECT ? UNION ALL SELECT m.id FROM down JOIN messages m ON m.conversation = ? AND m.parent = down.id
        )
        SELECT m.* FROM down JOIN messages m USING (id) ORDER BY m.number"""
    return db.execute(sql, (message_id, number)).fetchall()


def _instead(db: Connection, number: int, gone: sqlite3.Row) -> str | None:
    """What is shown when `gone` is not any more."""
    sql = "SELECT id FROM messages WHERE conversation = ? AND parent IS ? AND number {} ? ORDER BY number {} LIMIT 1"
    values = (number, gone["parent"], gone["number"])
    near = db.one(sql.format("<", "DESC"), *values) or db.one(sql.format(">", "ASC"), *values)
    return r.newest_leaf(db, number, near["id"]) if near else gone["parent"]
