"""Ahead: prompts computed before they are asked for, at most one for each browser, on a thread that ends when nothing is left to do.

A newer one takes the place of an older one, and a real request ends it; what the engine has computed by then stays in its cache.
Nothing here knows a chat: what to compute is handed in, and found out on the thread.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from modules.backends.base import CancelToken, GenerationRequest, Prefilling
from modules.errors import UserError
from modules.log import logger

MAX_SESSIONS = 8
"""Browsers for which something is computed at the same time; for further ones nothing is."""
CLOSE_SECONDS = 2.0
_REMEMBERED = 1000

Work = tuple[Prefilling, GenerationRequest]
Prepare = Callable[[CancelToken], Work | None]
"""Finds out what to compute, and for which backend; None: nothing. The request carries the token that it is given."""


@dataclass
class _Worker:
    waiting: Prepare | None
    cancel: CancelToken = field(default_factory=CancelToken)
    """Of what is under way."""
    thread: threading.Thread = field(default_factory=threading.Thread)


class Ahead:
    """Every method may be called from any thread, and none of them waits for an engine but `close`, for a moment."""

    def __init__(self, most: int = MAX_SESSIONS) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._workers: dict[str, _Worker] = {}
        self._last: OrderedDict[str, int] = OrderedDict()
        self._closed = False

    def start(self, session: str, prepare: Prepare) -> bool:
        """Compute what `prepare` finds, instead of what is under way or waits for `session`. False: too many others do so already."""
        with self._lock:
            worker = self._workers.get(session)
            if self._closed or (worker is None and len(self._workers) >= self._most):
                return False
            if worker is None:
                self._begin(session, _Worker(prepare))
                return True
            worker.waiting, former = prepare, worker.cancel
        former.cancel()
        return True

    def cancel(self, session: str) -> None:
        """End what is computed for `session`; returns at once."""
        with self._lock:
            self._last.pop(session, None)
            worker = self._workers.get(session)
            if worker is None:
                return
            worker.waiting, former = None, worker.cancel
        former.cancel()

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """End everything, for good, waiting up to `seconds` for it."""
        with self._lock:
            self._closed = True
            workers = list(self._workers.values())
            for worker in workers:
                worker.waiting = None
        for worker in workers:
            worker.cancel.cancel()
        deadline = time.monotonic() + seconds
        for worker in workers:
            worker.thread.join(max(0.0, deadline - time.monotonic()))

    @property
    def busy(self) -> int:
        """For how many sessions something is under way."""
        with self._lock:
            return len(self._workers)

    def _begin(self, session: str, worker: _Worker) -> None:
        worker.thread = threading.Thread(target=self._run, args=(session, worker), name=f"ahead-{session[:8]}", daemon=True)
        worker.thread.start()  # it waits for the lock, which is held here
        self._workers[session] = worker

    def _run(self, session: str, worker: _Worker) -> None:
        while True:
            with self._lock:
                prepare, worker.waiting = worker.waiting, None
                if prepare is None:
                    del self._workers[session]
                    return
                cancel = worker.cancel = CancelToken()
            self._quietly(session, prepare, cancel)

    def _quietly(self, session: str, prepare: Prepare, cancel: CancelToken) -> None:
        try:
            self._compute(session, prepare, cancel)
        except UserError as error:  # nobody asked for it, so nobody is told; the request itself will say it
            logger.debug("Nothing was computed ahead: %s", error)
        except Exception:  # noqa: BLE001  a thread's top: the next draft is another chance
            logger.exception("Computing ahead failed")

    def _compute(self, session: str, prepare: Prepare, cancel: CancelToken) -> None:
        work = prepare(cancel)
        if work is None or cancel.cancelled:
            return
        backend, request = work
        what = hash((id(backend), request.prompt))  # not the tokens: there may be many, of many sessions
        with self._lock:
            if self._last.get(session) == what:
                return
        backend.prefill(request)
        with self._lock:
            if not cancel.cancelled:
                self._remember(session, what)

    def _remember(self, session: str, what: int) -> None:
        self._last[session] = what
        self._last.move_to_end(session)
        while len(self._last) > _REMEMBERED:
            self._last.popitem(last=False)
