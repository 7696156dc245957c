"""The generation lock of an engine that writes one reply at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from modules.backends.base import CancelToken
from modules.errors import Busy

MAX_WAITING = 64


class TurnLock:
    """The generation lock: one holder, first come first served, a bounded queue, and waiting that a cancel ends."""

    def __init__(self, max_waiting: int = MAX_WAITING) -> None:
        self._condition = threading.Condition()
        self._queue: deque[object] = deque()
        self._max = max_waiting

    @contextmanager
    def turn(self, cancel: CancelToken) -> Iterator[bool]:
        """Hold the lock inside; yields False, without the lock, if cancelled while waiting. Raises Busy when the queue is full."""
        ticket = object()
        with self._condition:
            if len(self._queue) > self._max:
                raise Busy("Too many replies are waiting for this model. Try again in a few seconds.", retry_after=5)
            self._queue.append(ticket)
        cancel.on_cancel(self._wake)
        try:
            with self._condition:
                self._condition.wait_for(lambda: self._queue[0] is ticket or cancel.cancelled)
                held = self._queue[0] is ticket and not cancel.cancelled
            yield held
        finally:
            with self._condition:
                self._queue.remove(ticket)
                self._condition.notify_all()

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify_all()
