"""One download: its files fetched into a hidden folder, each checked, then all moved to their place.

Until the last file is whole nothing stands where models are looked for. What was fetched stays when the work is interrupted, however that
happens, and is used by the next download of the same files.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules import connections
from modules.downloads.files import Plan, RemoteFile
from modules.errors import Busy, DataError, InUse, UserError
from modules.system import lock_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

    from modules.downloads.hub import Hub

SPARE_BYTES = 64 << 20
"""Left free on the disk."""
LONGEST_PAUSE = 60.0
PROGRESS_BYTES = 64 << 10
"""An attempt that brought so much is no failure: the next one begins without a pause."""
SLOWEST, SLOW_SECONDS = 1024, 60.0
"""Bytes a second below which a connection counts as broken, after so many seconds."""
SPEED_SECONDS = 10.0
STALE_SECONDS = 14 * 24 * 3600
HIDDEN = ".downloads"


class Halted(Exception):
    """The work was told to stop."""


@dataclass(frozen=True)
class Place:
    """A file and where it goes."""

    file: RemoteFile
    path: Path


class Meter:
    """Bytes that are there, and how fast they come."""

    def __init__(self, files: Iterable[RemoteFile]) -> None:
        self.total = sum({file.digest: file.size for file in files}.values())
        self._lock = threading.Lock()
        self._done: dict[str, int] = {}
        self._recent: deque[tuple[float, int]] = deque()

    def put(self, file: RemoteFile, done: int, came: int = 0) -> None:
        """Of `file` there are `done` bytes now, `came` of which over the network since the last call."""
        now = time.monotonic()
        with self._lock:
            self._done[file.digest] = done
            self._recent.append((now, came))
            while now - self._recent[0][0] > SPEED_SECONDS:
                self._recent.popleft()

    @property
    def done(self) -> int:
        """Bytes of all files."""
        with self._lock:
            return sum(self._done.values())

    @property
    def speed(self) -> float:
        """Bytes a second, over the last seconds."""
        now = time.monotonic()
        with self._lock:
            recent = [(at, came) for at, came in self._recent if now - at <= SPEED_SECONDS]
        return sum(came for _, came in recent) / max(now - recent[0][0], 0.5) if recent else 0.0


class Fetch:
    """The work of one download. `run` does it, in the thread that calls it; `halt` ends it from any other."""

    def __init__(
        self, hub: Hub, plan: Plan, places: Sequence[Place], root: Path, meter: Meter, *, replace: bool, threads: int, retries: int, pause: float
    ) -> None:
        """`root`: the folder whose hidden folder takes what is not whole yet. `pause`: seconds before the second attempt; doubled each time."""
        self._hub, self._plan, self._places, self._meter = hub, plan, places, meter
        self._there: frozenset[Path] = frozenset()
        key = hashlib.sha256("\n".join([plan.repo, plan.revision, *sorted(str(place.path) for place in places)]).encode()).hexdigest()[:16]
        self.staging = root / HIDDEN / key
        self._replace, self._threads, self._retries, self._pause = replace, threads, retries, pause
        self._halt = threading.Event()
        self._lock = threading.Lock()
        self._open: set[httpx.Response] = set()

    def halt(self) -> None:
        """Stop soon: waiting ends at once, what is being read is broken off."""
        self._halt.set()
        with self._lock:
            for response in self._open:
                connections.end(response)

    def run(self) -> None:
        """Fetch, check and move. Raises Halted, Busy (after all attempts), AccessDenied, NotFound, DataError, InUse."""
        try:
            with lock_file(self.staging / "lock", "download of these files", "Wait for it, or stop it."):
                self._there = frozenset(place.path for place in self._places if not self._replace and self._stands(place))
                for place in self._places:
                    self._meter.put(place.file, place.file.size if place.path in self._there else 0)
                self._check_target()
                _drop_stale(self.staging)
                self._check_space()
                self._fetch_all()
                self._check_target()  # it may have come to be meanwhile
                self._move()
            self.drop()
        except OSError as error:
            raise DataError(f"Cannot write {error.filename or self.staging}: {error.strerror or error}. Free some space, then resume.") from error

    def drop(self) -> None:
        """Delete what was fetched. Only when it does not run."""
        shutil.rmtree(self.staging, ignore_errors=True)
        with suppress(OSError):  # others are in it
            self.staging.parent.rmdir()

    # --- fetching ---------------------------------------------------------------------------------------------------------------------

    def _fetch_all(self) -> None:
        pool = ThreadPoolExecutor(self._threads, "download")
        try:
            work = [pool.submit(self._fetch, file) for file in self._missing()]
            done, _ = wait(work, return_when=FIRST_EXCEPTION)
            errors = [error for future in done if (error := future.exception())]
            if errors:
                asked = self._halt.is_set()
                self.halt()  # the others
                if not asked:
                    raise next((error for error in errors if not isinstance(error, Halted)), errors[0])
                raise Halted
        finally:
            pool.shutdown(cancel_futures=True)

    def _missing(self) -> list[RemoteFile]:
        """What must be fetched; one file for each content."""
        return list({place.file.digest: place.file for place in self._places if place.path not in self._there}.values())

    def _fetch(self, file: RemoteFile) -> None:
        """Until the file is whole in the hidden folder."""
        part, failures = self._part(file), 0
        if self._done(file).exists():
            self._meter.put(file, file.size)
            return
        while True:
            before = _size(part)
            try:
                self._attempt(file, part)
                return
            except Busy as error:
                failures = 0 if _size(part) - before >= PROGRESS_BYTES else failures + 1
                if failures > self._retries:
                    raise
                pause = max(min(self._pause * 2 ** (failures - 1), LONGEST_PAUSE), error.retry_after) if failures else 0.0
                if self._halt.wait(pause):
                    raise Halted from None

    def _attempt(self, file: RemoteFile, part: Path) -> None:
        """Fetch what is missing of `part`, and check it. Raises Busy when another attempt can help."""
        digest, have = self._begun(file, part)
        whole_at_once = have == 0
        if have < file.size:
            with self._answer(file, part, have) as (response, start):
                if start == 0:
                    digest, whole_at_once = _digest(file), True
                have = self._write(file, part, response, digest, start)
        elif file.size == 0:
            part.touch()
        if have < file.size:
            raise Busy(f"The connection ended before {file.name} was whole.", 0)
        if digest.hexdigest() != file.digest:
            part.unlink()
            self._meter.put(file, 0)
            if not whole_at_once:  # its beginning may be of another time
                raise Busy(f"{file.name} came in pieces that do not fit together. It begins anew.", 0)
            raise DataError(f"{file.name} is not what {self._hub.host} lists: its checksum is wrong. It was thrown away; try again later.")
        os.replace(part, self._done(file))

    def _begun(self, file: RemoteFile, part: Path) -> tuple[Any, int]:
        """The checksum so far, and the bytes of `part` that it counts."""
        digest, have = _digest(file), 0
        if _size(part) > file.size:
            part.unlink()
        with suppress(FileNotFoundError), part.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
                have += len(block)
                self._stop_if_halted()
        self._meter.put(file, have)
        return digest, have

    @contextmanager
    def _answer(self, file: RemoteFile, part: Path, have: int) -> Iterator[tuple[httpx.Response, int]]:
        """The content from byte `have` on, or from the beginning: with it, from where."""
        tag_file = part.with_suffix(".etag")
        tag = _strong(tag_file.read_text("latin-1")) if have and tag_file.exists() else ""
        headers = {"Range": f"bytes={have}-", **({"If-Range": tag} if tag else {})} if have else {}
        with self._hub.open(self._plan.repo, self._plan.revision, file.name, headers) as response, self._ended_by_halt(response):
            told = response.headers.get("etag", "")
            if have and not (response.status_code == 206 and told == (tag or told) and _range(response) == (have, file.size)):
                if response.status_code != 200:  # another file, or another range than was asked for
                    part.unlink()
                    raise Busy(f"{file.name} was changed on the server. It begins anew.", 0)
                have = 0
            length = response.headers.get("content-length")
            if length and length != str(file.size - have):
                raise DataError(f"{file.name} has another size than {self._hub.host} lists. Ask for the list of files again.")
            if not have:
                tag_file.write_text(_strong(told), "latin-1")
            yield response, have

    @contextmanager
    def _ended_by_halt(self, response: httpx.Response) -> Iterator[None]:
        with self._lock:
            self._open.add(response)
        try:
            self._stop_if_halted()
            yield
        finally:
            with self._lock:
                self._open.discard(response)

    def _write(self, file: RemoteFile, part: Path, response: httpx.Response, digest: Any, have: int) -> int:
        """Add what comes to `part` and to `digest`; how many bytes there are then."""
        began, came = time.monotonic(), 0
        with part.open("r+b" if have else "wb") as opened:
            opened.seek(have)
            try:
                for block in response.iter_raw():
                    have += len(block)
                    came += len(block)
                    if have > file.size:
                        raise DataError(f"{self._hub.host} sends more than {file.name} has. Try again later.")
                    opened.write(block)
                    digest.update(block)
                    self._meter.put(file, have, len(block))
                    self._stop_if_halted()
                    seconds = time.monotonic() - began
                    if seconds > SLOW_SECONDS:
                        if came < SLOWEST * seconds:
                            raise Busy(f"{file.name} comes too slowly.", 0)
                        began, came = time.monotonic(), 0
            finally:
                opened.flush()
            os.fsync(opened.fileno())
        return have

    def _stop_if_halted(self) -> None:
        if self._halt.is_set():
            raise Halted

    def _part(self, file: RemoteFile) -> Path:
        return self.staging / f"{file.digest}.part"

    def _done(self, file: RemoteFile) -> Path:
        return self.staging / f"{file.digest}.done"

    # --- moving -----------------------------------------------------------------------------------------------------------------------

    def _check_target(self) -> None:
        """Raise InUse where another file stands that must not be replaced."""
        for place in self._places if not self._replace else ():
            if place.path.exists() and place.path not in self._there:
                raise InUse(f"There is another {place.path.name} in {place.path.parent} already. Rename or delete it, or choose to replace it.")

    def _stands(self, place: Place) -> bool:
        return place.path.is_file() and matches(place.path, place.file, self._halt.is_set)

    def _check_space(self) -> None:
        self.staging.mkdir(parents=True, exist_ok=True)
        needed = sum(file.size - _size(self._part(file)) for file in self._missing() if not self._done(file).exists())
        free = shutil.disk_usage(self.staging).free
        if needed and needed + SPARE_BYTES > free:
            raise DataError(
                f"{self._plan.repo} needs {_gib(needed)} on the disk of {self.staging.parent.parent}, where {_gib(free)} are free. "
                "Free some space, or choose smaller files; then resume."
            )

    def _move(self) -> None:
        """A folder that is new is put together out of sight and appears whole; of a split file the first part, by which it is found, comes last."""
        groups: dict[Path, list[Place]] = {}
        for place in self._places:
            top = self._folder_of(place)
            groups.setdefault(top, []).append(place)
        for top, places in groups.items():
            target = top
            if not top.exists():
                target = self.staging / f".{top.name}"
                shutil.rmtree(target, ignore_errors=True)
            for place in sorted(places, key=lambda place: place.path, reverse=True):
                self._put(place, target / place.path.relative_to(top))
            if target != top:
                top.parent.mkdir(parents=True, exist_ok=True)
                os.rename(target, top)

    def _put(self, place: Place, path: Path) -> None:
        if place.path in self._there:
            return
        done = self._done(place.file)
        path.parent.mkdir(parents=True, exist_ok=True)
        if sum(other.file.digest == place.file.digest for other in self._places) > 1:
            new = self.staging / "copy"
            shutil.copyfile(done, new)
            done = new
        try:
            os.replace(done, path)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            hidden = path.with_name(f".{path.name}")  # on another disk: copied out of sight first
            shutil.copyfile(done, hidden)
            os.replace(hidden, path)

    def _folder_of(self, place: Place) -> Path:
        """The folder that appears as a whole: that of a model in a folder; for others the one that they lie in."""
        inner = self.staging.parent.parent / self._plan.target
        return inner if place.path.is_relative_to(inner) else place.path.parent


def _digest(file: RemoteFile) -> Any:
    """Git's SHA-1 is that of a head and the content."""
    return hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def matches(path: Path, file: RemoteFile, stopped: Callable[[], bool] = lambda: False) -> bool:
    """Whether `path` has the content of `file`; reads all of it. Raises Halted, OSError."""
    if path.stat().st_size != file.size:
        return False
    digest = _digest(file)
    with path.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
            if stopped():
                raise Halted
    return bool(digest.hexdigest() == file.digest)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _strong(tag: str) -> str:
    """`tag` if it is an entity tag that promises the same bytes; a weak one (W/) does not."""
    return tag if re.fullmatch(r'"[!-~]{1,200}"', tag) else ""


def _range(response: httpx.Response) -> tuple[int, int]:
    """First byte and length of the whole file, as an answer to a range tells them; (-1, -1) when it does not."""
    found = re.fullmatch(r"bytes (\d{1,20})-\d{1,20}/(\d{1,20})", response.headers.get("content-range", ""))
    return (int(found[1]), int(found[2])) if found else (-1, -1)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _drop_stale(staging: Path) -> None:
    """Delete what downloads of long ago left."""
    for other in staging.parent.iterdir():
        with suppress(OSError, UserError):
            if other != staging and time.time() - max(path.stat().st_mtime for path in (other, *other.iterdir())) > STALE_SECONDS:
                with lock_file(other / "lock", "download", ""):
                    pass
                shutil.rmtree(other, ignore_errors=True)
