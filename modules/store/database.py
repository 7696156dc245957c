"""One SQLite file for many threads: a connection that writes, a pool of those that read, the schema brought up to date.

WAL mode: readers and the writer do not wait for each other. `synchronous=FULL`: with NORMAL a power loss would take back every commit since
the last checkpoint, minutes of talk; the price is one fsync a write. A database in memory has one connection, behind the lock, for both.
"""

from __future__ import annotations

import os
import queue
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from modules.errors import Busy, DataError
from modules.log import logger
from modules.store.words import clean, search_text

READERS = 8
_WAIT = 30.0
"""Seconds for a free connection in this process; `_BUSY` is the wait for a lock that another process holds."""
_BUSY = 5.0
_APPLICATION_ID = 0x54475731
_MEMORY = Path(":memory:")

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


class Connection(sqlite3.Connection):
    """Every string bound to a statement is storable: ids and queries come from outside as well as texts."""

    def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        """As in sqlite3."""
        return super().execute(sql, [clean(p) if isinstance(p, str) else p for p in parameters])

    def one(self, sql: str, *parameters: Any) -> sqlite3.Row | None:
        """The first row, or None."""
        row: sqlite3.Row | None = self.execute(sql, parameters).fetchone()
        return row


def _connect(path: Path) -> Connection:
    db: Connection = sqlite3.connect(str(path), timeout=_BUSY, isolation_level=None, check_same_thread=False, factory=Connection)
    db.row_factory = sqlite3.Row
    db.create_function("search_text", 1, search_text, deterministic=True)
    for pragma in ("trusted_schema = ON", "foreign_keys = ON", "synchronous = FULL", "cache_size = -8000", f"journal_size_limit = {1 << 26}"):
        db.execute(f"PRAGMA {pragma}")
    return db


@contextmanager
def _transaction(db: Connection, kind: str) -> Iterator[Connection]:
    db.execute(f"BEGIN {kind}")
    try:
        yield db
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            with suppress(sqlite3.Error):  # the error that led here is the one to tell
                db.execute("ROLLBACK")


class Database:
    """The file at `path`, open, or a database in memory. Every method may be called from any thread."""

    def __init__(self, path: Path, writer: Connection) -> None:
        self.path = path
        self._writer = writer
        self._lock = threading.Lock()
        self._closed = False
        self._readers: queue.LifoQueue[Connection | None] = queue.LifoQueue()
        for _ in range(READERS):
            self._readers.put(None)  # connected when first needed

    @property
    def in_memory(self) -> bool:
        """Nothing of it is ever on disk."""
        return self.path == _MEMORY

    @staticmethod
    def _opened(path: Path, migrations: Sequence[str]) -> Connection:
        """The writing connection to the file, which is created or brought to the newest schema, after keeping a copy beside it.

        Raises DataError for a damaged or foreign file and one written by a newer program; such a file is left as it is.
        """
        try:
            db = _connect(path)
            try:
                if path == _MEMORY:
                    db.execute("PRAGMA temp_store = MEMORY")  # nor do large sorts touch the disk
                _migrate(db, path, migrations)
                db.execute("PRAGMA journal_mode = WAL")
            except BaseException:
                db.close()
                raise
        except (sqlite3.Error, OSError) as error:
            raise _explained(path, error) from error
        return db

    def close(self) -> None:
        """Wait for calls in progress, then close the file. Calls after it raise DataError."""
        if self._closed:
            return
        self._closed = True
        with suppress(queue.Empty):
            for _ in range(READERS):
                reader = self._readers.get(timeout=_WAIT)
                if reader is not None:
                    reader.close()
        with self._lock:
            self._writer.close()

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        """A connection of the pool, in one snapshot of the data."""
        if self.in_memory:
            with self._writing() as only:
                yield only
            return
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
    def _writing(self) -> Iterator[Connection]:
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


def _migrate(db: Connection, path: Path, migrations: Sequence[str]) -> None:
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


def _keep_copy(db: Connection, path: Path, version: int) -> Path:
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
