"""The list of conversations: pages of it, and what a search finds.

Search is FTS5 over words (unicode61), not over trigrams: it finds from the first letter on, where trigrams need three, and most Chinese
words have two characters. Scripts without spaces are split into characters (`words.search_text`), so that any part of their text is found
as a phrase. The index holds no second copy of the text (external content). Results come newest first, never by bm25, which would score every
hit of a common word. Prefixes of one and two letters have an index of their own; longer ones match few enough words to need none.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from modules.errors import NotFound
from modules.store.database import Connection
from modules.store.words import CLOSE, OPEN, Snippet, match_expression, pieces

MAX_PAGE = 1000
"""Conversations or messages in one answer."""
MAX_PINNED = 100
"""Pinned conversations that the first page holds beyond its limit."""
_MAX_HITS = 50_000
"""Hits looked at for one page of results: one huge conversation full of the word may not make a search slow."""
_SNIPPET_WORDS = 24
_MAX_SNIPPET_BYTES = 100_000
"""Longer messages show their beginning: finding the place means splitting the whole message into words."""


@dataclass(frozen=True)
class ConversationInfo:
    """One row of the list. `snippet` shows where a search matched: the newest message found, or the title; () without a search."""

    id: str
    title: str
    updated: float
    """Seconds since the epoch."""
    running: bool
    """A reply is being written in it."""
    snippet: Snippet = ()
    folder: str = ""
    """"" for none."""
    pinned: bool = False
    tags: tuple[str, ...] = ()
    created: float = 0.0
    """Seconds since the epoch."""
    hit: str = ""
    """Id of the message that a search found; "" where that was the title."""


@dataclass(frozen=True)
class Page:
    """A part of the list; `next` is the cursor for the part after it, None at the end."""

    items: tuple[ConversationInfo, ...]
    next: str | None


@dataclass(frozen=True)
class Filter:
    """Whose conversations, and which of them: those in `folder` ("" for those in none), those with `tag`; None for any."""

    owners: Sequence[int]
    folder: str | None = None
    tag: str | None = None

    def sql(self) -> tuple[str, list[object]]:
        """The condition on conversations c, and its values."""
        where, values = f"c.owner IN ({marks(self.owners)})", list[object](self.owners)
        if self.folder is not None:
            where, values = f"{where} AND c.folder = ?", [*values, self.folder]
        if self.tag is not None:
            where, values = f"{where} AND c.number IN (SELECT conversation FROM tags WHERE name = ?)", [*values, self.tag]
        return where, values


def bounded(limit: int) -> int:
    """A page's size within bounds."""
    return max(1, min(limit, MAX_PAGE))


def marks(values: Sequence[object]) -> str:
    """As many question marks."""
    return ", ".join("?" * len(values))


INFO = """SELECT c.number, c.id, c.title, c.changed, c.turn, c.folder, c.pinned, c.created,
    (SELECT group_concat(name, char(31)) FROM tags t WHERE t.conversation = c.number) AS tags,
    EXISTS (SELECT 1 FROM messages m WHERE m.conversation = c.number AND m.state = 'running') AS running FROM conversations c"""
"""What `info` reads; a WHERE follows."""


def info(row: sqlite3.Row, snippet: Snippet = (), hit: str = "") -> ConversationInfo:
    """The value of a row of INFO."""
    tags = tuple(sorted(row["tags"].split("\x1f"))) if row["tags"] else ()
    running, pinned = bool(row["running"]), bool(row["pinned"])
    return ConversationInfo(row["id"], row["title"], row["changed"], running, snippet, row["folder"], pinned, tags, row["created"], hit)


def listed(db: Connection, chosen: Filter, limit: int, before: str | None) -> Page:
    """A page of the list: pinned ones first, then by change. `before` is `Page.next`; raises NotFound for another one."""
    where, values = chosen.sql()
    if before is None:
        limit += min(MAX_PINNED, db.execute(f"SELECT count(*) FROM conversations c WHERE {where} AND c.pinned = 1", values).fetchone()[0])
    else:
        where, values = f"{where} AND (c.pinned, c.turn, c.changed, c.number) < (?, ?, ?, ?)", [*values, *_place(before)]
    order = "c.pinned DESC, c.turn DESC, c.changed DESC, c.number DESC"
    rows = db.execute(f"{INFO} WHERE {where} ORDER BY {order} LIMIT ?", (*values, limit + 1)).fetchall()
    shown = rows[:limit]
    last = shown[-1] if len(rows) > limit else None
    return Page(tuple(map(info, shown)), f"{last['pinned']}_{last['turn']}_{last['changed']}_{last['number']}" if last else None)


def _place(before: str) -> tuple[object, ...]:
    found = re.fullmatch(r"([01])_([0-9]{1,18})_([0-9]{1,18}(?:\.[0-9]{1,18})?(?:e[-+]?[0-9]{1,3})?)_([0-9]{1,18})", before)
    if not found:
        raise _lost()
    return int(found[1]), int(found[2]), float(found[3]), int(found[4])


def _lost() -> NotFound:
    return NotFound("This place in the list is not there any more. Reload the page.")


def counts(db: Connection, owners: Sequence[int]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """The folders, then the tags, each with the number of conversations, by name."""
    folders = f"SELECT folder, count(*) FROM conversations WHERE owner IN ({marks(owners)}) AND folder <> '' GROUP BY folder"
    tags = f"SELECT t.name, count(*) FROM tags t JOIN conversations c ON c.number = t.conversation WHERE c.owner IN ({marks(owners)}) GROUP BY t.name"
    return _by_name(db, folders, owners), _by_name(db, tags, owners)


def _by_name(db: Connection, sql: str, owners: Sequence[int]) -> list[tuple[str, int]]:
    return sorted(((name, count) for name, count in db.execute(sql, owners)), key=lambda found: (found[0].casefold(), found[0]))


# Search


def search(db: Connection, chosen: Filter, query: str, limit: int, before: str | None) -> Page:
    """A page of the conversations whose title holds all words, then of those with such a message. Raises NotFound for a foreign cursor."""
    if before is not None and not re.fullmatch("[0-9]{1,18}", before):
        raise _lost()
    skip = int(before or 0)
    match = match_expression(chosen.owners, query)
    if not match:
        return Page((), None)
    found = _found(db, chosen, match, skip + limit + 1)
    shown = found[skip : skip + limit]
    numbers = [number for number, _ in shown]
    rows = {row["number"]: row for row in db.execute(f"{INFO} WHERE c.number IN ({marks(numbers)})", numbers)}
    titles = _snippets(db, "title", match, [number for number, message in shown if message is None])
    by_text = [message for _, message in shown if message is not None]
    texts = _snippets(db, "message", match, by_text)
    hits = [*by_text, *_newest(db, match, [number for number, message in shown if message is None])]
    ids = {row["conversation"]: row["id"] for row in db.execute(f"SELECT conversation, id FROM messages WHERE number IN ({marks(hits)})", hits)}
    items = tuple(info(rows[number], titles[number] if message is None else texts[message], ids.get(number, "")) for number, message in shown)
    return Page(items, str(skip + limit) if len(found) > skip + limit else None)


def _found(db: Connection, chosen: Filter, match: str, count: int) -> list[tuple[int, int | None]]:
    """Up to `count` conversations, each with its newest message that matches, or None where the title does."""
    # The index knows the owner. Within a folder or a tag each hit is looked up among the numbers that lie there, not in the table itself.
    where, values = chosen.sql() if (chosen.folder, chosen.tag) != (None, None) else ("", [])
    there = f"SELECT number FROM conversations c WHERE {where}"
    among = "AND +{} IN ({})" if where else ""
    by_title = f"""SELECT c.number FROM title_index t JOIN conversations c ON c.number = t.rowid
        WHERE t.title_index MATCH ? {among.format("t.rowid", there)} ORDER BY c.turn DESC, c.changed DESC LIMIT ?"""
    found: dict[int, int | None] = dict.fromkeys(row["number"] for row in db.execute(by_title, (match, *values, count)))
    # CROSS JOIN fixes the order of the loops, so that hits stream newest first and reading stops when the page is full.
    hits = f"""SELECT m.number, m.conversation FROM message_index i CROSS JOIN messages m ON m.number = i.rowid
        WHERE i.message_index MATCH ? {among.format("i.rowid", f"SELECT number FROM messages WHERE conversation IN ({there})")}
        ORDER BY i.rowid DESC LIMIT ?"""
    rows = db.execute(hits, (match, *values, _MAX_HITS))
    while len(found) < count and (row := rows.fetchone()):
        found.setdefault(row["conversation"], row["number"])
    rows.close()
    return list(found.items())


def _newest(db: Connection, match: str, numbers: Sequence[int]) -> list[int]:
    """The newest message that matches of each conversation in `numbers` that has one: a title often is its first message's text."""
    among = f"SELECT number FROM messages WHERE conversation IN ({marks(numbers)})"
    newest = f"""SELECT max(m.number) FROM message_index i CROSS JOIN messages m ON m.number = i.rowid
        WHERE i.message_index MATCH ? AND +i.rowid IN ({among}) GROUP BY m.conversation"""
    return [row[0] for row in db.execute(newest, (match, *numbers))] if numbers else []


def _snippets(db: Connection, what: str, match: str, rows: Sequence[int]) -> dict[int, Snippet]:
    """The place of the match in each of the `rows` of one index."""
    if not rows:
        return {}
    index = f"{what}_index"
    # The plus sign keeps FTS5 from evaluating the expression once a row; the range stops it where the page ends.
    sql = f"""SELECT rowid, CASE WHEN length(CAST(text AS BLOB)) > {_MAX_SNIPPET_BYTES} THEN substr(text, 1, 200)
            ELSE snippet({index}, 1, ?, ?, '…', {_SNIPPET_WORDS}) END AS marked
        FROM {index} WHERE {index} MATCH ? AND rowid BETWEEN ? AND ? AND +rowid IN ({marks(rows)})"""
    return {row["rowid"]: pieces(row["marked"]) for row in db.execute(sql, (OPEN, CLOSE, match, min(rows), max(rows), *rows))}
