"""SHA-256 of model files, which takes long for many gigabytes: computed once in the background, and known by the file's size and time from then on.

The hash of a model in several files is that of all of them, one after the other.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from modules.errors import DataError
from modules.gguf import part_files
from modules.log import logger
from modules.paths import write_atomically

MAX_KNOWN = 1000
MAX_WAITING = 64
MAX_CACHE_BYTES = 4 << 20
_BLOCK = 4 << 20


class FileHashes:
    """Hashes of files, kept in `cache_file`. Every method may be called from any thread; none waits for a file to be read."""

    def __init__(self, cache_file: Path) -> None:
        self._cache_file = cache_file
        self._changed = threading.Condition()
        self._known: OrderedDict[str, str] | None = None  # read when first asked for
        self._waiting: OrderedDict[str, Path] = OrderedDict()
        self._failed: set[str] = set()
        self._at_work = False

    def stamp(self, path: Path) -> str:
        """Sizes and times of a model's files, which change when they do: with it `get` finds the hash that the files had. "" when there are none."""
        try:
            return ",".join(f"{status.st_size}-{status.st_mtime_ns}" for status in (part.stat() for part in part_files(path)))
        except OSError:
            return ""

    def get(self, path: Path, stamp: str | None = None) -> str | None:
        """The SHA-256 of `path` (with the other parts of a split GGUF), in hexadecimal, as it is, or was when it had `stamp`.

        None while it is computed, which this begins, and when it cannot be known.
        """
        now = self.stamp(path)
        key = _key(path, now if stamp is None else stamp)
        with self._changed:
            known = self._read()
            if key in known:
                return known[key]
            if now and stamp in (None, now) and key not in self._failed and len(self._waiting) < MAX_WAITING:
                self._waiting.setdefault(key, path)
                self._begin()
        return None

    def wait(self, seconds: float) -> bool:
        """Wait until nothing is being computed, at most so long; whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._at_work, seconds)

    def _begin(self) -> None:
        if not self._at_work:
            self._at_work = True
            threading.Thread(target=self._work, name="hashes", daemon=True).start()

    def _work(self) -> None:
        """Until nobody waits: hash a file, keep that."""
        while True:
            with self._changed:
                if not self._waiting:
                    self._at_work = False
                    self._changed.notify_all()
                    return
                key, path = next(iter(self._waiting.items()))
            digest = self._digest(key, path)
            with self._changed:
                del self._waiting[key]
                if digest is None:
                    self._failed.add(key)
                    continue
                known = self._read()
                known[key] = digest
                while len(known) > MAX_KNOWN:
                    known.popitem(last=False)
                self._write(known)

    def _digest(self, key: str, path: Path) -> str | None:
        try:
            digest = _sha256(part_files(path))
        except OSError as error:
            logger.warning("The SHA-256 of %s cannot be computed: %s", path.name, error.strerror or error)
            return None
        return digest if key == _key(path, self.stamp(path)) else None  # else it was changed meanwhile; asked for again, it has another key

    def _read(self) -> OrderedDict[str, str]:
        if self._known is None:
            self._known = OrderedDict(_loaded(self._cache_file))
        return self._known

    def _write(self, known: Mapping[str, str]) -> None:
        try:
            write_atomically(self._cache_file, json.dumps(known, indent=0))
        except DataError as error:
            logger.warning("%s", error)  # the next start computes it again


def _key(path: Path, stamp: str) -> str:
    return f"{path.absolute()}|{stamp}"


def _loaded(file: Path) -> dict[str, str]:
    """What was kept; nothing when that cannot be read: it can be computed again."""
    try:
        with file.open("rb") as opened:
            found = json.loads(opened.read(MAX_CACHE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in list(found.items())[-MAX_KNOWN:] if isinstance(value, str)}


def _sha256(files: list[Path]) -> str:
    """At half a processor's time at most: who is being answered meanwhile needs the rest."""
    digest = hashlib.sha256()
    block = bytearray(_BLOCK)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            began = time.monotonic()
            while count := opened.readinto(block):
                digest.update(memoryview(block)[:count])
                time.sleep(time.monotonic() - began)
                began = time.monotonic()
    return digest.hexdigest()
