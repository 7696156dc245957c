"""Downloads from the Hub, in the background: planned, fetched, checked, moved; paused, resumed, cancelled.

`files.py` says what is wanted, `hub.py` asks the Hub, `job.py` does one download. Only the person's own asking makes this program use the
network here; the token is told to the Hub's own host alone and never shown.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from uuid import uuid4

from modules.downloads.files import Plan, RemoteFile, chosen, kind_of, note_of, usable, wanted
from modules.downloads.job import Fetch, Halted, Meter, Place, matches
from modules.errors import Busy, InUse, NameError_, NotFound, UserError
from modules.log import logger
from modules.paths import UserData

if TYPE_CHECKING:
    from modules.downloads.hub import Hub

State = Literal["queued", "running", "paused", "done", "failed", "cancelled"]
MAX_WAITING = 16
MAX_ENDED = 20
CLOSE_SECONDS = 25.0

__all__ = ["Downloads", "Plan", "RemoteFile", "Status"]


@dataclass(frozen=True)
class Status:
    """One download now. Sizes in bytes, times in seconds."""

    id: str
    repo: str
    branch: str
    files: tuple[str, ...]
    targets: tuple[str, ...]
    """Names of the files and folders that it makes."""
    state: State
    done: int
    total: int
    speed: float = 0.0
    left: float | None = None
    """Seconds to go; None while that cannot be told."""
    error: str = ""


@dataclass
class _Job:
    id: str
    plan: Plan
    places: tuple[Place, ...]
    meter: Meter
    make: Callable[[], Fetch]
    fetch: Fetch
    """The present one, or that of the next time."""
    state: State = "queued"
    error: str = ""
    thread: threading.Thread | None = None


class Downloads:
    """All downloads of this program. Every method may be called from any thread; only `plan` and `check` wait for the network."""

    def __init__(
        self,
        data: UserData,
        endpoint: str = "",
        *,
        at_once: int = 2,
        threads: int = 2,
        retries: int = 7,
        pause: float = 1.0,
        token: str | None = None,
    ) -> None:
        """`at_once` downloads, each with `threads` files at the same time; a file is tried `retries` times more, first after `pause` seconds.

        Without `endpoint` and `token` those of the environment, read when they are first needed.
        """
        self._data, self._endpoint, self._token = data, endpoint, token
        self._at_once, self._threads, self._retries, self._pause = at_once, threads, retries, pause
        self._changed = threading.Condition()
        self._jobs: dict[str, _Job] = {}
        self._listeners: list[Callable[[], None]] = []
        self._made: Hub | None = None

    # --- planning ---------------------------------------------------------------------------------------------------------------------

    def plan(self, text: str, branch: str = "", pattern: str = "", exclude: str = "", text_only: bool = False) -> Plan:
        """What `user/model[:branch]`, or a link, offers, and what of it would be taken.

        Raises SettingsError, NotFound, AccessDenied, NameError_, DataError, Busy.
        """
        hub = self._hub()
        asked = wanted(text, branch, hub.host)
        revision = hub.commit(asked.repo, asked.branch)
        listed = hub.files(asked.repo, revision)
        files = tuple(file for file in listed if usable(file.name))
        kind = kind_of(files)
        names = chosen(files, kind, pattern or asked.file, exclude, text_only)
        return Plan(asked.repo, asked.branch, revision, kind, files, names, note_of(files, names))

    def check(self, plan: Plan, names: Iterable[str] | None = None, output: Path | None = None) -> list[str]:
        """Which of these files are missing, or are not what the Hub lists. Reads them all."""
        places = self._places(plan, names, output)
        return [place.file.name for place in places if not (place.path.is_file() and matches(place.path, place.file))]

    def _places(self, plan: Plan, names: Iterable[str] | None, output: Path | None) -> tuple[Place, ...]:
        places = tuple(
            Place(file, plan.destination(self._data, file, output)) for file in plan.choose(plan.chosen if names is None else tuple(names))
        )
        by_path: dict[str, Place] = {}
        for place in places:
            other = by_path.setdefault(str(place.path).casefold(), place)
            if other is not place:
                raise NameError_(f"{other.file.name[:100]} and {place.file.name[:100]} would be the same file here. Choose one of them.")
        return places

    def _hub(self) -> Hub:
        from modules.downloads import hub  # its HTTP library takes a while to import

        with self._changed:
            if self._made is None:
                self._made = hub.Hub(self._endpoint or hub.endpoint_of(), hub.token_of() if self._token is None else self._token)
            return self._made

    # --- starting and stopping --------------------------------------------------------------------------------------------------------

    def start(self, plan: Plan, names: Iterable[str] | None = None, *, replace: bool = False, anew: bool = False, output: Path | None = None) -> str:
        """Begin to load these files of `plan` (its own choice when None), or let that wait for its turn; gives the download's id.

        `replace`: put them in place of other files of their names. `anew`: use nothing of an earlier attempt. `output`: a folder for all of them.
        Raises Busy when too many wait, InUse when one of the files is on its way already, NotFound, NameError_.
        """
        hub, places = self._hub(), self._places(plan, names, output)
        root = output or (self._data.loras if plan.kind == "adapter" else self._data.models)
        meter = Meter(place.file for place in places)

        def make() -> Fetch:
            return Fetch(hub, plan, places, root, meter, replace=replace, threads=self._threads, retries=self._retries, pause=self._pause)

        job = _Job(uuid4().hex, plan, places, meter, make, make())
        with self._changed:
            alive = [other for other in self._jobs.values() if other.state in ("queued", "running", "paused")]
            if len(alive) >= MAX_WAITING:
                raise Busy(f"{len(alive)} downloads are under way or waiting. Cancel one, or wait for one.", retry_after=30)
            paths = {place.path for place in places}
            for other in alive:
                if paths & {place.path for place in other.places}:
                    raise InUse(f"{other.plan.repo} is being downloaded there already. Wait for it, or cancel it.")
            if anew:
                job.fetch.drop()
            self._jobs[job.id] = job
            self._forget_old()
            self._pump()
        self._tell()
        return job.id

    def pause(self, id: str) -> None:
        """Let a download rest; what it has is kept. Another one takes its turn."""
        with self._changed:
            job = self._job(id)
            if job.state in ("queued", "running"):
                self._end(job, "paused")
        self._tell()

    def resume(self, id: str) -> None:
        """Go on with one that is paused or failed."""
        with self._changed:
            job = self._job(id)
            if job.state in ("paused", "failed"):
                job.state, job.error = "queued", ""
                self._pump()
        self._tell()

    def cancel(self, id: str) -> None:
        """End a download, and delete what it has so far."""
        with self._changed:
            job = self._job(id)
            if job.state in ("done", "cancelled"):
                return
            self._end(job, "cancelled")
            self._drop(job)
        self._tell()

    def forget(self, id: str) -> None:
        """Take one that ended off the list."""
        with self._changed:
            job = self._job(id)
            if job.state in ("queued", "running", "paused"):
                raise InUse(f"{job.plan.repo} is still being downloaded. Cancel it first.")
            del self._jobs[id]
        self._tell()

    def status(self) -> tuple[Status, ...]:
        """All downloads, in the order in which they were asked for."""
        with self._changed:
            return tuple(map(_status, self._jobs.values()))

    def get(self, id: str) -> Status:
        """One download. Raises NotFound."""
        with self._changed:
            return _status(self._job(id))

    def wait(self, id: str, seconds: float) -> Status:
        """Its status, once it neither runs nor waits, at most so many seconds from now."""
        with self._changed:
            self._changed.wait_for(lambda: self._job(id).state not in ("queued", "running"), seconds)
            return _status(self._job(id))

    def listen(self, changed: Callable[[], None]) -> None:
        """Call `changed` when a download begins, ends or changes its state, from any thread. It must be short and must not raise."""
        with self._changed:
            self._listeners.append(changed)

    def close(self) -> None:
        """Pause all, and wait for that."""
        with self._changed:
            for job in self._jobs.values():
                if job.state in ("queued", "running"):
                    self._end(job, "paused")
            self._changed.wait_for(lambda: not any(job.thread for job in self._jobs.values()), CLOSE_SECONDS)
            if self._made:
                self._made.close()

    # --- inside (the lock is held) ----------------------------------------------------------------------------------------------------

    def _job(self, id: str) -> _Job:
        if id not in self._jobs:
            raise NotFound("There is no such download any more. Ask for the list again.")
        return self._jobs[id]

    def _pump(self) -> None:
        """Let those begin whose turn it is. One whose former thread still ends waits for it."""
        for job in self._jobs.values():
            if sum(other.thread is not None for other in self._jobs.values()) >= self._at_once:
                return
            if job.state == "queued" and job.thread is None:
                job.state = "running"
                job.thread = threading.Thread(target=self._run, args=(job, job.fetch), name="download", daemon=True)
                job.thread.start()

    def _end(self, job: _Job, state: State) -> None:
        job.state = state
        job.fetch.halt()
        job.fetch = job.make()
        self._pump()

    def _drop(self, job: _Job) -> None:
        """Delete what a cancelled one has, or leave that to its thread, which may still write."""
        if job.thread is None:
            job.fetch.drop()

    def _forget_old(self) -> None:
        ended = [job.id for job in self._jobs.values() if job.state in ("done", "failed", "cancelled") and job.thread is None]
        for id in ended[:-MAX_ENDED]:
            del self._jobs[id]

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    # --- a download's thread ----------------------------------------------------------------------------------------------------------

    def _run(self, job: _Job, fetch: Fetch) -> None:
        error = ""
        try:
            fetch.run()
            state: State = "done"
        except Halted:
            state = "paused"
        except UserError as known:
            state, error = "failed", str(known)
            logger.error("Download of %s: %s", job.plan.repo, known)
        except Exception as unknown:  # noqa: BLE001  a thread's top: the download must not seem to go on for ever
            state, error = "failed", f"The download failed: {type(unknown).__name__}. The terminal has the details."
            logger.exception("Download of %s failed", job.plan.repo)
        with self._changed:
            job.thread = None
            if job.state == "running" and fetch is job.fetch:
                job.state, job.error, job.fetch = state, error, job.make()
            elif state == "done" and job.state != "cancelled":  # it was whole before it could be stopped
                job.state = "done"
            if job.state == "cancelled":
                self._drop(job)
            self._pump()
        if state == "done":
            logger.info("Downloaded %s", job.plan.repo)
        self._tell()


def _status(job: _Job) -> Status:
    meter, running = job.meter, job.state == "running"
    done, speed = meter.done, meter.speed if running else 0.0
    left = (meter.total - done) / speed if speed > 0 else None
    names = tuple(place.file.name for place in job.places)
    tops = dict.fromkeys(place.path.name if place.file.suffix == ".gguf" else job.plan.target for place in job.places)
    return Status(job.id, job.plan.repo, job.plan.branch, names, tuple(tops), job.state, done, meter.total, speed, left, job.error)
