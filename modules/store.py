"""Conversations in one SQLite file: owners, trees of messages, full-text search, browser sessions.

A write is one transaction and a message is one row, so saving a running reply costs the same in a chat of any length. WAL mode: readers and
the writer do not wait for each other. `synchronous=FULL`: with NORMAL a power loss would take back every commit since the last checkpoint,
minutes of talk; the price is one fsync a write, and a reply is saved at most once a second.

Search is FTS5 over words (unicode61), not over trigrams: it finds from the first letter on, where trigrams need three, and most Chinese
words have two characters. Scripts without spaces are split into characters (`search_text`), so that any part of their text is found as a
phrase. The index holds no second copy of the text (external content). Results come newest first, never by bm25, which would score every
hit of a common word. Prefixes of one and two letters have an index of their own; longer ones match few enough words to need none.

Every method may be called from any thread, checks the owner (NotFound for another's conversation, as if it were absent) and raises DataError
when the file cannot be read or written, Busy when no connection comes free.
"""

from __future__ import annotations

import json
import os
import queue
import re
import sqlite3
import threading
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modules.conversation import Conversation, Message, new_id
from modules.errors import Busy, DataError, NotFound
from modules.log import logger

MAX_TITLE = 200
"""Characters."""
MAX_PAGE = 1000
"""Conversations or messages in one answer."""
MAX_QUERY_WORDS = 16
MAX_QUERY_CHARACTERS = 100
MAX_SESSIONS = 10_000
_MAX_HITS = 50_000
"""Hits looked at for one page of results: one huge conversation full of the word may not make a search slow."""
_AUTOMATIC_TITLE = 60
_SNIPPET_WORDS = 24
_MAX_SNIPPET_BYTES = 100_000
"""Longer messages show their beginning: finding the place means splitting the whole message into words."""
_READERS = 8
_WAIT = 30.0
"""Seconds for a free connection in this process; `_BUSY` is the wait for a lock that another process holds."""
_BUSY = 5.0
_APPLICATION_ID = 0x54475731

_SURROGATES = re.compile("[\ud800-\udfff]")
_NO_SPACES = re.compile(  # Thai, Lao, Myanmar, Khmer; kana, Han, Hangul (particles hang on its words), half-width kana
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff])"
)
_BIDI = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F])
_OPEN, _CLOSE, _SEAM = "\x02", "\x03", "\x1f"
_MARKS = str.maketrans({_OPEN: " ", _CLOSE: " "})

MIGRATIONS: tuple[str, ...] = (
    # Each is SQL that leads from version n to n + 1; never edit one that was released.
    # owners: one name may stand in several rows. change_owner() renames rows, so the index, which holds the row's id, stays as it is.
    # turn: the order of changes. The clock may jump, this does not.
    # messages.parent has no foreign key: cascading down a branch would recurse once a message; add() checks it.
    """
    CREATE TABLE owners (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL);
    CREATE INDEX owners_name ON owners (name);
    CREATE TABLE conversations (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner INTEGER NOT NULL REFERENCES owners (id),
        title TEXT NOT NULL, tip TEXT, changed REAL NOT NULL, turn INTEGER NOT NULL
    );
    CREATE INDEX conversations_owner ON conversations (owner, turn);
    CREATE INDEX conversations_turn ON conversations (turn);
    CREATE TABLE messages (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
        conversation INTEGER NOT NULL REFERENCES conversations (number), parent TEXT, role TEXT NOT NULL, created REAL NOT NULL,
        state TEXT NOT NULL, details TEXT NOT NULL, reasoning TEXT NOT NULL, text TEXT NOT NULL
    );
    CREATE INDEX messages_parent ON messages (conversation, parent);
    CREATE INDEX messages_running ON messages (conversation) WHERE state = 'running';
    CREATE VIEW message_search AS
        SELECT m.number, 'o' || c.owner AS owner, search_text(m.text) AS text FROM messages m JOIN conversations c ON c.number = m.conversation;
    CREATE VIEW title_search AS SELECT number, 'o' || owner AS owner, search_text(title) AS text FROM conversations;
    CREATE VIRTUAL TABLE message_index USING fts5 (
        owner, text, content = 'message_search', content_rowid = 'number', columnsize = 0, prefix = '1 2', tokenize = 'unicode61 remove_diacritics 2'
    );
    CREATE VIRTUAL TABLE title_index USING fts5 (
        owner, text, content = 'title_search', content_rowid = 'number', columnsize = 0, prefix = '1 2', tokenize = 'unicode61 remove_diacritics 2'
    );
    CREATE TABLE sessions (key TEXT PRIMARY KEY, "values" TEXT NOT NULL, saved REAL NOT NULL);
    CREATE INDEX sessions_saved ON sessions (saved);
    """,
)

Snippet = tuple[tuple[str, bool], ...]
"""Pieces of text in order, each with whether it is a match."""


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


@dataclass(frozen=True)
class Page:
    """A part of the list; `next` is the cursor for the part after it, None at the end."""

    items: tuple[ConversationInfo, ...]
    next: str | None


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


def clean(text: str) -> str:
    """`text` with lone surrogates, which UTF-8 cannot carry, replaced by U+FFFD."""
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)


def clean_title(text: str) -> str:
    """One line without control or direction-changing characters, at most MAX_TITLE characters."""
    printable = "".join(" " if unicodedata.category(c) == "Cc" else c for c in clean(text[: MAX_TITLE * 10]).translate(_BIDI))
    return " ".join(printable.split())[:MAX_TITLE].rstrip()


def title_from(text: str) -> str:
    """A title made of the beginning of a message, cut between words."""
    title = clean_title(text)
    if len(title) <= _AUTOMATIC_TITLE:
        return title
    head = title[: _AUTOMATIC_TITLE + 1].rpartition(" ")[0]
    return (head if len(head) > _AUTOMATIC_TITLE // 2 else title[:_AUTOMATIC_TITLE]).rstrip(" ,;:.-") + "…"


def search_text(text: str) -> str:
    """What the index reads: seams between the characters of scripts that write no spaces, so that each becomes a word."""
    text = text.translate(_MARKS) if _OPEN in text or _CLOSE in text else text
    return text if text.isascii() else _NO_SPACES.sub(rf"{_SEAM}\1{_SEAM}", text)


def match_expression(owners: Sequence[int], query: str) -> str:
    """The FTS5 expression for a user's `query`: all its words, the last as a prefix; "" when it holds no word.

    Everything the user typed is quoted, so there are no operators; words and characters beyond the limits are left out.
    """
    words = [w for w in clean(query[:MAX_QUERY_CHARACTERS]).replace("\0", " ").split() if any(c.isalnum() for c in w)]
    words = list(dict.fromkeys(words))[:MAX_QUERY_WORDS]
    if not words or not owners:
        return ""
    phrases = ['"' + search_text(w).replace('"', '""') + '"' for w in words]
    return f"owner : ({' OR '.join(f'o{number}' for number in owners)}) AND text : ({' '.join(phrases)} *)"


def _pieces(marked: str) -> Snippet:
    text = re.sub(r"\s+", " ", marked.replace(_SEAM, "").replace("\0", " "))
    parts = re.split(f"[{_OPEN}{_CLOSE}]", text)
    return tuple((part, index % 2 == 1) for index, part in enumerate(parts) if part)


_CAUSES = (
    ("disk is full", "the disk is full. Free some space and try again."),
    ("disk I/O error", "the disk reports an error. Check free space and the disk's health, then try again."),
    ("locked", "another program holds it. Close that program and try again."),
    ("readonly", "it is read-only. Make the file and its folder writable."),
    ("unable to open", "it cannot be opened. Make the folder exist and be writable, or choose another one with --user-data-dir."),
    ("no such module", "this Python's SQLite has no FTS5 search. Use a Python from python.org or your system's packages."),
    ("closed database", "it is already closed, the server is shutting down. Try again after its restart."),
    ("malformed", "it is damaged. Put back a backup copy of it, or move it away to start with an empty one."),
    ("not a database", "it is damaged or not a database. Put back a backup copy of it, or move it away to start with an empty one."),
)


def _explained(path: Path, error: Exception) -> DataError:
    text = str(error)
    cause = next((fix for sign, fix in _CAUSES if sign in text), f"{text}. Restart the server; if it stays, put back a backup copy.")
    return DataError(f"The conversations in {path} cannot be read or written: {cause}")


class _Connection(sqlite3.Connection):
    """Every string bound to a statement is storable: ids and queries come from outside as well as texts."""

    def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        return super().execute(sql, [clean(p) if isinstance(p, str) else p for p in parameters])

    def one(self, sql: str, *parameters: Any) -> sqlite3.Row | None:
        row: sqlite3.Row | None = self.execute(sql, parameters).fetchone()
        return row


def _connect(path: Path) -> _Connection:
    db: _Connection = sqlite3.connect(str(path), timeout=_BUSY, isolation_level=None, check_same_thread=False, factory=_Connection)
    db.row_factory = sqlite3.Row
    db.create_function("search_text", 1, search_text, deterministic=True)
    for pragma in ("trusted_schema = ON", "foreign_keys = ON", "synchronous = FULL", "cache_size = -8000", f"journal_size_limit = {1 << 26}"):
        db.execute(f"PRAGMA {pragma}")
    return db


@contextmanager
def _transaction(db: _Connection, kind: str) -> Iterator[_Connection]:
    db.execute(f"BEGIN {kind}")
    try:
        yield db
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            with suppress(sqlite3.Error):  # the error that led here is the one to tell
                db.execute("ROLLBACK")


class Store:
    """The database file at `path`, open. One per user_data folder: opening marks replies that nobody writes any more as interrupted."""

    def __init__(self, path: Path, writer: _Connection) -> None:
        self.path = path
        self._writer = writer
        self._lock = threading.Lock()
        self._closed = False
        self._readers: queue.LifoQueue[_Connection | None] = queue.LifoQueue()
        for _ in range(_READERS):
            self._readers.put(None)  # connected when first needed

    @classmethod
    def open(cls, path: Path, migrations: Sequence[str] = MIGRATIONS) -> Store:
        """Create the file or bring it to the newest schema, after keeping a copy beside it (`<name>.before-v<n>`).

        Raises DataError for a damaged or foreign file and one written by a newer program; such a file is left as it is.
        """
        try:
            db = _connect(path)
            try:
                _migrate(db, path, migrations)
                db.execute("PRAGMA journal_mode = WAL")
                _interrupt(db)
            except BaseException:
                db.close()
                raise
        except (sqlite3.Error, OSError) as error:
            raise _explained(path, error) from error
        return cls(path, db)

    def close(self) -> None:
        """Wait for calls in progress, then close the file. Calls after it raise DataError."""
        if self._closed:
            return
        self._closed = True
        with suppress(queue.Empty):
            for _ in range(_READERS):
                reader = self._readers.get(timeout=_WAIT)
                if reader is not None:
                    reader.close()
        with self._lock:
            self._writer.close()

    @contextmanager
    def _reading(self) -> Iterator[_Connection]:
        """A connection of the pool, in one snapshot of the data."""
        self._check_open()
        try:
            db = self._readers.get(timeout=_WAIT)
        except queue.Empty:
            raise Busy("Too many requests read conversations at once. Try again in a moment.") from None
        try:
            db = db or _connect(self.path)
            with _transaction(db, "DEFERRED"):
                yield db
        except sqlite3.Error as error:
            raise _explained(self.path, error) from error
        finally:
            self._readers.put(db)

    @contextmanager
    def _writing(self) -> Iterator[_Connection]:
        """The one writing connection, in one transaction: all of it is kept, or nothing."""
        self._check_open()
        if not self._lock.acquire(timeout=_WAIT):
            raise Busy("Another long write is going on in the conversations. Try again in a moment.")
        try:
            with _transaction(self._writer, "IMMEDIATE") as db:
                yield db
        except sqlite3.Error as error:
            raise _explained(self.path, error) from error
        finally:
            self._lock.release()

    def _check_open(self) -> None:
        if self._closed:
            raise _explained(self.path, sqlite3.ProgrammingError("closed database"))

    # Reading

    def conversations(self, owner: str, query: str = "", limit: int = 50, before: str | None = None) -> Page:
        """The owner's conversations, newest change first; with `query` those whose title holds all its words, then those with such a message.

        `before` is `Page.next` of the page before. Raises NotFound for a cursor that this method did not give.
        """
        cursor, limit = _cursor(before), _bounded(limit)
        with self._reading() as db:
            owners = _owner_numbers(db, owner)
            return _search(db, owners, query, limit, cursor or 0) if query.strip() else _list(db, owners, limit, cursor)

    def info(self, owner: str, id: str) -> ConversationInfo:
        """One row of the list, without its messages."""
        with self._reading() as db:
            head = _owned(db, owner, id)
            return _info(db.execute(f"{_INFO} WHERE c.number = ?", (head["number"],)).fetchone())

    def conversation(self, owner: str, id: str) -> Conversation:
        """The whole tree."""
        with self._reading() as db:
            head = _owned(db, owner, id)
            rows = db.execute("SELECT * FROM messages WHERE conversation = ? ORDER BY number", (head["number"],))
            return Conversation(head["id"], owner, head["title"], {row["id"]: _message(row) for row in rows}, head["tip"])

    def messages(self, owner: str, id: str, limit: int = 40, before: str | None = None) -> MessagePage:
        """The newest `limit` messages of the branch shown, or those above message `before`. The cost is that of `limit` rows."""
        with self._reading() as db:
            head = _owned(db, owner, id)
            last = head["tip"] if before is None else _in_conversation(db, head["number"], before)["parent"]
            rows = _branch(db, last, _bounded(limit))
            versions = {row["id"]: _versions(db, row) for row in rows}
        items = tuple(ShownMessage(_message(row), versions[row["id"]], versions[row["id"]].index(row["id"])) for row in rows)
        return MessagePage(items, rows[0]["id"] if rows and rows[0]["parent"] is not None else None)

    def session(self, key: str) -> dict[str, Any] | None:
        """What `save_session` kept under `key`, or None."""
        with self._reading() as db:
            row = db.one('SELECT "values" FROM sessions WHERE key = ?', key)
        return None if row is None else json.loads(row["values"])

    # Writing

    def create(self, owner: str, title: str = "") -> Conversation:
        """A new, empty conversation. Without a title it takes one from its first user message."""
        conversation = Conversation(new_id(), owner, clean_title(title))
        with self._writing() as db:
            _insert_conversation(db, _owner_number(db, owner), conversation, time.time())
        return conversation

    def add(self, owner: str, id: str, messages: Sequence[Message], tip: str) -> None:
        """Insert `messages`, parents before children, and show the branch that ends with message `tip`; all or nothing."""
        with self._writing() as db:
            head = _owned(db, owner, id)
            _insert_messages(db, head["number"], messages)
            _in_conversation(db, head["number"], tip)
            _title_if_none(db, head, messages)
            db.execute("UPDATE conversations SET tip = ? WHERE number = ?", (tip, head["number"]))
            _touch(db, head["number"])

    def save(self, message: Message) -> None:
        """Write text, reasoning, state and details of a message that is stored already. Not for callers from outside: asks for no owner.

        While the message is running this is one row. Raises NotFound when the conversation has been deleted meanwhile.
        """
        with self._writing() as db:
            row = db.one("SELECT number, conversation, state FROM messages WHERE id = ?", message.id)
            if row is None:
                raise NotFound("This message was deleted while it was being written.")
            if row["state"] == message.state == "running":
                _update(db, row["number"], message)
                return
            _unindex_messages(db, "number = ?", row["number"])
            _update(db, row["number"], message)
            db.execute("UPDATE messages SET state = ? WHERE number = ?", (message.state, row["number"]))
            _index_messages(db, "number = ?", row["number"])
            _touch(db, row["conversation"])

    def set_tip(self, owner: str, id: str, tip: str) -> None:
        """Show the branch that ends with message `tip`. Does not count as a change in the list's order."""
        with self._writing() as db:
            number = _owned(db, owner, id)["number"]
            _in_conversation(db, number, tip)
            db.execute("UPDATE conversations SET tip = ? WHERE number = ?", (tip, number))

    def show(self, owner: str, id: str, message_id: str) -> str:
        """Show the branch of message `message_id` down to its newest leaf (a swipe), and return that leaf's id, the new tip."""
        with self._writing() as db:
            number = _owned(db, owner, id)["number"]
            tip = _newest_leaf(db, number, _in_conversation(db, number, message_id)["id"])
            db.execute("UPDATE conversations SET tip = ? WHERE number = ?", (tip, number))
        return tip

    def rename(self, owner: str, id: str, title: str) -> None:
        """Give a title, made one printable line of at most MAX_TITLE characters."""
        with self._writing() as db:
            _set_title(db, _owned(db, owner, id)["number"], clean_title(title))

    def delete(self, owner: str, id: str) -> None:
        """Delete a conversation with its messages and their words in the index."""
        with self._writing() as db:
            number = _owned(db, owner, id)["number"]
            _unindex_messages(db, "conversation = ?", number)
            db.execute("DELETE FROM title_index WHERE rowid = ?", (number,))
            db.execute("DELETE FROM messages WHERE conversation = ?", (number,))
            db.execute("DELETE FROM conversations WHERE number = ?", (number,))

    def change_owner(self, old: str, new: str) -> None:
        """Give all conversations of `old` to `new` (a browser's chats, at its first login). Costs the same for any number of them."""
        with self._writing() as db:
            db.execute("UPDATE owners SET name = ? WHERE name = ?", (new, old))

    def save_session(self, key: str, values: Mapping[str, Any]) -> None:
        """Keep small JSON `values` under `key`; only the MAX_SESSIONS saved last are kept. The key is stored as it is: pass no secret."""
        with self._writing() as db:
            db.execute('REPLACE INTO sessions (key, "values", saved) VALUES (?, ?, ?)', (key, _json(values), time.time()))
            db.execute("DELETE FROM sessions WHERE saved < (SELECT saved FROM sessions ORDER BY saved DESC LIMIT 1 OFFSET ?)", (MAX_SESSIONS - 1,))

    def import_conversations(self, owner: str, conversations: Iterable[Conversation]) -> None:
        """Store whole conversations under `owner`, one transaction each, keeping ids, titles and tips. Parents come before children.

        A message that claims to be running becomes interrupted: nobody writes it here.
        """
        for conversation in conversations:
            messages = tuple(replace(m, state="interrupted") if m.state == "running" else m for m in conversation.messages.values())
            with self._writing() as db:
                changed = max((m.created for m in messages), default=0.0) or time.time()
                number = _insert_conversation(db, _owner_number(db, owner), conversation, changed)
                _insert_messages(db, number, messages)
                if conversation.tip is not None:
                    _in_conversation(db, number, conversation.tip)


def _migrate(db: _Connection, path: Path, migrations: Sequence[str]) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    ours = db.execute("PRAGMA application_id").fetchone()[0] == _APPLICATION_ID
    if not ours and db.one("SELECT 1 FROM sqlite_schema") is not None:
        raise DataError(f"{path} is a database of another program. Move it away, or choose another folder with --user-data-dir.")
    if version > len(migrations):
        raise DataError(f"{path} was written by a newer version of this program (schema {version}, here {len(migrations)}). Update the program.")
    if version == len(migrations):
        return
    copy = _keep_copy(db, path, len(migrations)) if version else None
    steps = ";".join(migrations[version:])
    try:
        db.executescript(f"BEGIN IMMEDIATE;{steps};PRAGMA application_id = {_APPLICATION_ID};PRAGMA user_version = {len(migrations)};COMMIT")
    except sqlite3.Error as error:
        if copy is None:
            raise
        raise DataError(f"{path} could not be brought to schema {len(migrations)} ({error}). It is unchanged, and a copy is in {copy}.") from error
    if copy is not None:
        logger.info("%s is now schema %d; the former file is kept as %s", path, len(migrations), copy.name)


def _keep_copy(db: _Connection, path: Path, version: int) -> Path:
    copy = path.with_name(f"{path.name}.before-v{version}")
    unfinished = copy.with_name(copy.name + ".part")
    unfinished.unlink(missing_ok=True)
    target = sqlite3.connect(str(unfinished))
    try:
        db.backup(target)
    finally:
        target.close()
    os.replace(unfinished, copy)
    return copy


def _interrupt(db: _Connection) -> None:
    with _transaction(db, "IMMEDIATE"):
        running = [row["number"] for row in db.execute("SELECT number FROM messages WHERE state = 'running'")]
        for number in running:
            db.execute("UPDATE messages SET state = 'interrupted' WHERE number = ?", (number,))
            _index_messages(db, "number = ?", number)


def _json(values: Mapping[str, Any]) -> str:
    # A value JSON does not know is kept as its text: a detail may not cost the reply.
    return json.dumps(dict(values), ensure_ascii=False, separators=(",", ":"), default=lambda v: dict(v) if isinstance(v, Mapping) else str(v))


def _message(row: sqlite3.Row) -> Message:
    details = json.loads(row["details"])
    return Message(row["id"], row["parent"], row["role"], row["text"], row["reasoning"], row["created"], row["state"], details)


def _bounded(limit: int) -> int:
    return max(1, min(limit, MAX_PAGE))


def _cursor(before: str | None) -> int | None:
    if before is None:
        return None
    if not re.fullmatch("[0-9]{1,18}", before):
        raise NotFound("This place in the list is not there any more. Reload the page.")
    return int(before)


def _owner_numbers(db: _Connection, owner: str) -> list[int]:
    return [row["id"] for row in db.execute("SELECT id FROM owners WHERE name = ?", (owner,))]


def _owner_number(db: _Connection, owner: str) -> int:
    known = _owner_numbers(db, owner)
    return known[0] if known else _inserted(db.execute("INSERT INTO owners (name) VALUES (?)", (owner,)))


def _inserted(cursor: sqlite3.Cursor) -> int:
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def _owned(db: _Connection, owner: str, id: str) -> sqlite3.Row:
    row = db.one("SELECT c.* FROM conversations c JOIN owners o ON o.id = c.owner WHERE c.id = ? AND o.name = ?", id, owner)
    if row is None:
        raise NotFound("This conversation does not exist any more. Choose another one or start a new one.")
    return row


def _in_conversation(db: _Connection, number: int, message_id: str) -> sqlite3.Row:
    row = db.one("SELECT id, parent FROM messages WHERE id = ? AND conversation = ?", message_id, number)
    if row is None:
        raise NotFound("This message is not in the conversation any more. Reload the page.")
    return row


def _branch(db: _Connection, last: str | None, limit: int) -> list[sqlite3.Row]:
    """Up to `limit` messages that end with `last`, oldest first."""
    sql = """
        WITH RECURSIVE up (id, step) AS (
            SELECT ?, 1 UNION ALL SELECT m.parent, step + 1 FROM up JOIN messages m USING (id) WHERE m.parent IS NOT NULL AND step < ?
        )
        SELECT m.* FROM up JOIN messages m USING (id) ORDER BY step DESC"""
    return [] if last is None else db.execute(sql, (last, limit)).fetchall()


def _versions(db: _Connection, row: sqlite3.Row) -> tuple[str, ...]:
    sql = "SELECT id FROM messages WHERE conversation = ? AND parent IS ? ORDER BY number"
    return tuple(sibling["id"] for sibling in db.execute(sql, (row["conversation"], row["parent"])))


def _newest_leaf(db: _Connection, number: int, message_id: str) -> str:
    sql = """
        WITH RECURSIVE down (id, step) AS (
            SELECT ?, 0 UNION ALL
            SELECT (SELECT m.id FROM messages m WHERE m.conversation = ? AND m.parent = down.id ORDER BY m.number DESC LIMIT 1), step + 1
            FROM down WHERE down.id IS NOT NULL
        )
        SELECT id FROM down WHERE id IS NOT NULL ORDER BY step DESC LIMIT 1"""
    leaf: str = db.execute(sql, (message_id, number)).fetchone()["id"]
    return leaf


def _insert_conversation(db: _Connection, owner: int, conversation: Conversation, changed: float) -> int:
    sql = """INSERT INTO conversations (id, owner, title, tip, changed, turn)
        VALUES (?, ?, ?, ?, ?, (SELECT coalesce(max(turn), 0) + 1 FROM conversations))"""
    number = _inserted(db.execute(sql, (conversation.id, owner, clean_title(conversation.title), conversation.tip, changed)))
    db.execute("INSERT INTO title_index (rowid, owner, text) SELECT number, owner, text FROM title_search WHERE number = ?", (number,))
    return number


def _insert_messages(db: _Connection, number: int, messages: Sequence[Message]) -> None:
    """Raises NotFound when a parent is neither stored in this conversation nor earlier in `messages` (so there are no cycles)."""
    first = db.execute("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'messages'").fetchone()[0]
    known: set[str | None] = {None}
    for message in messages:
        if message.parent not in known:
            _in_conversation(db, number, message.parent or "")
        known.add(message.id)
    db.executemany(
        "INSERT INTO messages (id, conversation, parent, role, created, state, details, reasoning, text) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [(m.id, number, m.parent, m.role, m.created, m.state, clean(_json(m.details)), clean(m.reasoning), clean(m.text)) for m in messages],
    )
    _index_messages(db, "number > ?", first)


def _update(db: _Connection, number: int, message: Message) -> None:
    values = (message.text, message.reasoning, _json(message.details), number)
    db.execute("UPDATE messages SET text = ?, reasoning = ?, details = ? WHERE number = ?", values)


def _index_messages(db: _Connection, where: str, value: int) -> None:
    """Write the words of the ended messages chosen by `where` (a constant of this file) into the index."""
    numbers = f"SELECT number FROM messages WHERE {where} AND state <> 'running'"
    db.execute(f"INSERT INTO message_index (rowid, owner, text) SELECT number, owner, text FROM message_search WHERE number IN ({numbers})", (value,))


def _unindex_messages(db: _Connection, where: str, value: int) -> None:
    """Before the text changes or goes: the index finds the words to remove by reading it."""
    db.execute(f"DELETE FROM message_index WHERE rowid IN (SELECT number FROM messages WHERE {where} AND state <> 'running')", (value,))


def _set_title(db: _Connection, number: int, title: str) -> None:
    db.execute("DELETE FROM title_index WHERE rowid = ?", (number,))
    db.execute("UPDATE conversations SET title = ? WHERE number = ?", (title, number))
    db.execute("INSERT INTO title_index (rowid, owner, text) SELECT number, owner, text FROM title_search WHERE number = ?", (number,))


def _title_if_none(db: _Connection, head: sqlite3.Row, messages: Sequence[Message]) -> None:
    title = "" if head["title"] else title_from(next((m.text for m in messages if m.role == "user"), ""))
    if title:
        _set_title(db, head["number"], title)


def _touch(db: _Connection, number: int) -> None:
    turn = "(SELECT max(turn) + 1 FROM conversations)"
    db.execute(f"UPDATE conversations SET changed = ?, turn = {turn} WHERE number = ?", (time.time(), number))


_INFO = """SELECT c.number, c.id, c.title, c.changed, c.turn,
    EXISTS (SELECT 1 FROM messages m WHERE m.conversation = c.number AND m.state = 'running') AS running FROM conversations c"""


def _info(row: sqlite3.Row, snippet: Snippet = ()) -> ConversationInfo:
    return ConversationInfo(row["id"], row["title"], row["changed"], bool(row["running"]), snippet)


def _marks(values: Sequence[object]) -> str:
    return ", ".join("?" * len(values))


def _list(db: _Connection, owners: Sequence[int], limit: int, before: int | None) -> Page:
    sql = f"{_INFO} WHERE c.owner IN ({_marks(owners)}) AND c.turn < ? ORDER BY c.turn DESC LIMIT ?"
    rows = db.execute(sql, (*owners, before if before is not None else 1 << 62, limit + 1)).fetchall()
    shown = rows[:limit]
    return Page(tuple(_info(row) for row in shown), str(shown[-1]["turn"]) if len(rows) > limit else None)


def _search(db: _Connection, owners: Sequence[int], query: str, limit: int, skip: int) -> Page:
    match = match_expression(owners, query)
    if not match:
        return Page((), None)
    found = _found(db, match, skip + limit + 1)
    chosen = found[skip : skip + limit]
    numbers = [number for number, _ in chosen]
    rows = {row["number"]: row for row in db.execute(f"{_INFO} WHERE c.number IN ({_marks(numbers)})", numbers)}
    titles = _snippets(db, "title", match, [number for number, message in chosen if message is None])
    texts = _snippets(db, "message", match, [message for _, message in chosen if message is not None])
    items = tuple(_info(rows[number], titles[number] if message is None else texts[message]) for number, message in chosen)
    return Page(items, str(skip + limit) if len(found) > skip + limit else None)


def _found(db: _Connection, match: str, count: int) -> list[tuple[int, int | None]]:
    """Up to `count` conversations, each with its newest message that matches, or None where the title does."""
    by_title = (
        "SELECT c.number FROM title_index t JOIN conversations c ON c.number = t.rowid WHERE t.title_index MATCH ? ORDER BY c.turn DESC LIMIT ?"
    )
    found: dict[int, int | None] = dict.fromkeys(row["number"] for row in db.execute(by_title, (match, count)))
    # CROSS JOIN fixes the order of the loops, so that hits stream newest first and reading stops when the page is full.
    hits = """SELECT m.number, m.conversation FROM message_index i CROSS JOIN messages m ON m.number = i.rowid
        WHERE i.message_index MATCH ? ORDER BY i.rowid DESC LIMIT ?"""
    rows = db.execute(hits, (match, _MAX_HITS))
    while len(found) < count and (row := rows.fetchone()):
        found.setdefault(row["conversation"], row["number"])
    rows.close()
    return list(found.items())


def _snippets(db: _Connection, what: str, match: str, rows: Sequence[int]) -> dict[int, Snippet]:
    """The place of the match in each of the `rows` of one index."""
    if not rows:
        return {}
    index = f"{what}_index"
    # The plus sign keeps FTS5 from evaluating the expression once a row; the range stops it where the page ends.
    sql = f"""SELECT rowid, CASE WHEN length(CAST(text AS BLOB)) > {_MAX_SNIPPET_BYTES} THEN substr(text, 1, 200)
            ELSE snippet({index}, 1, ?, ?, '…', {_SNIPPET_WORDS}) END AS marked
        FROM {index} WHERE {index} MATCH ? AND rowid BETWEEN ? AND ? AND +rowid IN ({_marks(rows)})"""
    return {row["rowid"]: _pieces(row["marked"]) for row in db.execute(sql, (_OPEN, _CLOSE, match, min(rows), max(rows), *rows))}
