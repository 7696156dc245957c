"""Chats of an earlier system's `user_data`, taken over once. Its files are only read: they stay as they are, and that system can go on using them.

    logs/instruct/<id>.json   logs/chat/<character>/<id>.json   logs/persistent_<character>.json

Each becomes a conversation of its own with the mode and the character that its place says. What was taken over is remembered by a hash of
its content and place, so that deleting the conversation here does not bring it back; a chat that has since gone on there comes once more.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any

from modules import transfer
from modules.characters import Character, Characters
from modules.conversation import Conversation
from modules.errors import NotFound, UserError
from modules.log import logger
from modules.paths import UserData
from modules.store import Store, clean_title

PATIENCE = 5.0
"""Seconds that the first list of conversations waits for them; an import that takes longer goes on behind it."""
_TOLD = 20
"""Files that could not be read are named in the log, up to so many."""
_AUTOMATIC = re.compile(r"\d{8}-\d{2}-\d{2}-\d{2}")
"""A file name that the earlier system made: no title."""
_EMPTY = "it holds no message with text"
_importing = threading.Lock()


@dataclass(frozen=True)
class Log:
    """One file with a chat."""

    path: Path
    mode: str
    character: str
    """"" in instruct mode."""
    title: str
    """"" when nobody chose one."""
    size: int
    changed: float
    """Seconds since the epoch."""

    @property
    def where(self) -> str:
        """Its place, without the file's name: copies in one place are one chat."""
        return f"{self.mode}/{self.character}"


@dataclass(frozen=True)
class Report:
    """What came of an import; what had been taken over before is not counted."""

    imported: int = 0
    empty: int = 0
    """Chats in which nobody has said anything but the greeting."""
    failed: tuple[tuple[str, str], ...] = ()
    """(file, reason)."""


def find_logs(data: UserData) -> list[Log]:
    """The chats in the folder, those changed last at the end. Nothing is opened; what cannot be listed is passed over."""
    found = [
        *_in(data.logs / "instruct", "instruct"),
        *(log for folder in _folders(data.logs / "chat") for log in _in(folder, "chat", folder.name)),
        *_persistent(data.logs),
    ]
    return sorted(found, key=lambda log: (log.changed, log.path))


def import_logs(data: UserData, store: Store, owner: str) -> Report:
    """Give `owner` every chat in the folder that was not taken over yet. One file at a time is in memory.

    A file that cannot be read is reported and does not stop the others. Raises what `store` raises (DataError, Busy): then the next call goes on.
    """
    character = cache(partial(_character, Characters(data.characters)))
    taken: list[int] = []
    failed: list[tuple[str, str]] = []
    for log in find_logs(data):
        seen = _key(log.where, log.path.name, log.size, log.changed)  # so that a start does not read everything again
        if store.imported(seen):
            continue
        came = _take(log, store, owner, character(log.character))
        if isinstance(came, str):
            failed.append((str(log.path), came))
            continue
        taken += came
        store.mark_imported([seen])
    return Report(sum(taken), taken.count(0), tuple(failed))


def _take(log: Log, store: Store, owner: str, who: Character | None) -> list[int] | str:
    """Import one file: [how many conversations], [] for one that is known, or why it cannot be read."""
    try:
        conversations, key = _read(log, owner)
    except UserError as error:
        return str(error)
    if store.imported(key):
        return []
    for place, conversation in enumerate(conversations):
        _keep(store, owner, _arranged(conversation, log, who, _key(key, place)[:32]))
    store.mark_imported([key])
    return [len(conversations)]


def adopt(data: UserData, store: Store, owner: str, multi_user: bool = False) -> None:
    """Give the chats in the folder to `owner`, who is the first to ask for conversations. Later calls cost next to nothing.

    The folder belongs to the whole server, as it did in the earlier system. In multi-user mode nothing is taken over. Errors are logged only.
    """
    key = None if multi_user else _state(data)
    if key is None or store.imported(key) or not _importing.acquire(blocking=False):
        return
    thread = threading.Thread(target=_adopt, args=(data, store, owner, key), name="old chats", daemon=True)
    thread.start()
    thread.join(PATIENCE)


def _adopt(data: UserData, store: Store, owner: str, key: str) -> None:
    try:
        report = import_logs(data, store, owner)
        store.mark_imported([key])
    except UserError as error:
        logger.error("The chats in %s were not all taken over: %s", data.logs, error)
    else:
        for file, reason in report.failed[:_TOLD]:
            logger.warning("%s was left out: %s", file, reason)
        if report.imported or report.failed:
            logger.info("Chats in %s: %d taken over, %d could not be read.", data.logs, report.imported, len(report.failed))
    finally:
        _importing.release()


def _state(data: UserData) -> str | None:
    """Changes when a file is added to the folders, or written anew; None when there are none."""
    folders = [data.logs, data.logs / "instruct", *_folders(data.logs / "chat")]
    times = []
    for folder in folders:
        with suppress(OSError):
            times.append((str(folder), folder.stat().st_mtime_ns))
    return _key(*times) if times else None


def _folders(folder: Path) -> list[Path]:
    return [path for path, stat in _entries(folder) if S_ISDIR(stat.st_mode)]


def _entries(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    try:
        names = sorted(os.listdir(folder))
    except OSError:  # not there, in nearly all cases
        return
    for name in names:
        with suppress(OSError):  # a link to nowhere, or deleted meanwhile
            yield folder / name, (folder / name).stat()


def _chats(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    return ((path, stat) for path, stat in _entries(folder) if path.suffix == ".json" and S_ISREG(stat.st_mode))


def _in(folder: Path, mode: str, character: str = "") -> Iterator[Log]:
    for path, stat in _chats(folder):
        yield _log(path, stat, mode, character, "" if _AUTOMATIC.fullmatch(path.stem) else path.stem)


def _persistent(folder: Path) -> Iterator[Log]:
    """The one chat of a character, as it was kept before there were several."""
    for path, stat in _chats(folder):
        if path.stem.startswith("persistent_"):
            yield _log(path, stat, "chat", path.stem.removeprefix("persistent_"), "")


def _log(path: Path, stat: os.stat_result, mode: str, character: str, title: str) -> Log:
    return Log(path, mode, clean_title(character), clean_title(title), stat.st_size, stat.st_mtime)


def _read(log: Log, owner: str) -> tuple[list[Conversation], str]:
    """The conversations in which somebody spoke, and the key of this content in this place. Raises UserError."""
    try:
        with log.path.open("rb") as file:
            raw = file.read(transfer.MAX_BYTES + 1)
    except OSError as error:
        raise NotFound(f"It cannot be read: {error.strerror or error}.") from None
    key = _key(log.where, hashlib.sha256(raw).hexdigest())
    try:
        found = transfer.read(raw, log.path.name, owner)
    except UserError as error:
        if _EMPTY in str(error):
            return [], key
        raise
    return [each for each in found if len(each.messages) > 1 or any(message.role == "user" for message in each.messages.values())], key


def _arranged(conversation: Conversation, log: Log, who: Character | None, id: str) -> Conversation:
    """With the file's title, mode and character, a known id, and the file's time where its messages have none."""
    timed = any(message.created for message in conversation.messages.values())
    messages = {
        message.id: replace(
            message,
            created=message.created if timed else log.changed,
            details={**message.details, "name": who.name} if who and message.role == "assistant" else message.details,
        )
        for message in conversation.messages.values()
    }
    return replace(conversation, id=id, title=log.title or conversation.title, messages=messages, settings=_values(log, who))


def _keep(store: Store, owner: str, conversation: Conversation) -> None:
    """Its id is known beforehand: where a crash came before it was marked, the next call finds it."""
    try:
        store.info(owner, conversation.id)
    except NotFound:
        store.import_conversations(owner, [conversation])


def _character(characters: Characters, name: str) -> Character | None:
    """Who speaks in the chats of a folder; what its file says, where it can be read. None in instruct mode."""
    try:
        return characters.get(name) if name else None
    except UserError:
        return Character(name)


def _values(log: Log, who: Character | None) -> dict[str, Any]:
    """What the conversation goes on with."""
    known = {"character": log.character, "name2": who.name, "context": who.context, "greeting": who.greeting} if who else {}
    return {"mode": log.mode, **{key: value for key, value in known.items() if value}}


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()
