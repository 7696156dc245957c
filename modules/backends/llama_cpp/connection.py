"""One life of the engine process, as the server sees it: start, frames out and in, death, end.

Four threads: one writes (a caller never blocks on a full pipe), one reads and hands frames to the calls that wait for them, one keeps the
last lines of stderr, one watches that the process is heard and gets on with its work. When the process ends, however it ends, every waiting call
is told and the process is reaped.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from modules.backends.llama_cpp.protocol import Frame, ProtocolError, encode, read_frame
from modules.errors import Busy, EngineDied, ModelError, PromptError, PromptTooLong, SettingsError, UserError
from modules.log import logger
from modules.system import start_child, stop_tree

ROOT = Path(__file__).resolve().parents[3]
COMMAND = (sys.executable, "-m", "modules.backends.llama_cpp.engine")
TIMEOUT_SECONDS = 120.0
START_SECONDS = 15.0
"""Before its first heartbeat an engine has at least so long: Python and the library are being read."""
WATCH_SECONDS = 0.25
MERGE_FROM = 64
_LAST_FRAMES = ("end", "error", "loaded", "tokens", "text", "vectors", "done", "pong")
_ERRORS: dict[str, type[UserError]] = {error.__name__: error for error in (Busy, ModelError, PromptError, PromptTooLong, SettingsError)}


class Call:
    """One request and the frames that answer it. `frames` is for one thread; the rest may be called from any."""

    def __init__(self, connection: Connection, id: int) -> None:
        self.id = id
        self._connection = connection
        self._frames: collections.deque[Frame] = collections.deque()
        self._error: UserError | None = None
        self._ended = False  # the engine will send nothing more
        self._cancelled_at: float | None = None
        self._changed = threading.Condition()

    def put(self, frame: Frame) -> None:
        """Take a frame from the reader. Chunks that nobody fetches are merged, so that a slow listener holds up nothing."""
        with self._changed:
            if len(self._frames) >= MERGE_FROM and frame.kind == self._frames[-1].kind == "chunk":
                frame = merge(self._frames.pop(), frame)
            self._frames.append(frame)
            self._ended = self._ended or frame.kind in _LAST_FRAMES
            self._changed.notify()

    def fail(self, error: UserError) -> None:
        """Raise `error` in `frames` after the frames that came before."""
        with self._changed:
            self._error, self._ended = self._error or error, True
            self._changed.notify()

    def cancel(self) -> None:
        """Ask the engine to end this request and wake the waiting thread."""
        with self._changed:
            if self._ended or self._cancelled_at is not None:
                return
            self._cancelled_at = time.monotonic()
            self._changed.notify()
        self._connection.send(Frame("cancel", self.id))

    def frames(self, patience: float = 0.5) -> Iterator[Frame]:
        """The frames, the last one included. Ends without a last one `patience` seconds after `cancel`, if the engine is slow.

        Raises the error that the engine sent, and EngineDied.
        """
        while (frame := self._next(patience)) is not None:
            if frame.kind == "error":
                raise _error(frame.fields)
            yield frame
            if frame.kind in _LAST_FRAMES:
                return

    def _next(self, patience: float) -> Frame | None:
        while True:
            with self._changed:
                if self._frames:
                    return self._frames.popleft()
                if self._error:
                    raise self._error
                if self._cancelled_at is not None and time.monotonic() - self._cancelled_at >= patience:
                    return None
                self._changed.wait(None if self._cancelled_at is None else patience)

    def last(self) -> Frame:
        """The last frame; the others are dropped. Same errors as `frames`."""
        for frame in self.frames():
            if frame.kind in _LAST_FRAMES:
                return frame
        raise EngineDied("The engine did not finish this. Try again.")

    def close(self) -> None:
        """Cancel if it has not ended, and forget it."""
        self.cancel()
        self._connection.forget(self)


def _error(fields: Mapping[str, Any]) -> UserError:
    kind = _ERRORS.get(fields["kind"], ModelError)
    return Busy(fields["message"], fields["retry_after"]) if kind is Busy and "retry_after" in fields else kind(fields["message"])


def merge(first: Frame, second: Frame) -> Frame:
    """Two chunks of one request as one: text, tokens and log-probabilities joined, the later counts."""
    joined = {name: [*first.fields.get(name, ()), *second.fields.get(name, ())] for name in ("tokens", "logprobs", "prompt_logprobs")}
    fields = {**first.fields, **second.fields, **{name: values for name, values in joined.items() if values}}
    return Frame("chunk", second.id, fields, first.raw + second.raw)


class Connection:
    """A running engine process."""

    def __init__(
        self, command: tuple[str, ...] = COMMAND, timeout: float = TIMEOUT_SECONDS, on_death: Callable[[Connection], None] = lambda _: None
    ) -> None:
        """Starts the process. Raises ModelError when the system refuses.

        `timeout`: seconds without a sign of life, or without progress in its work, after which the process is ended. `on_death` is called once
        the process is gone, unless `close` ended it.
        """
        self._timeout = timeout
        self._on_death = on_death
        self._closing = False
        self._over = threading.Event()
        self._beats, self._progressed = -1, time.monotonic()
        self._calls: dict[int, Call] = {}
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._death: UserError | None = None
        self._ending: UserError | None = None  # why we end it ourselves
        self._heard = self._first_call = time.monotonic()
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._said: collections.deque[str] = collections.deque(maxlen=50)
        self.health: Mapping[str, Any] = {}
        """What the engine does, as its last heartbeat says: fields of `EngineStats`."""
        self.totals: Mapping[str, Any] = {}
        """What it has done, likewise."""
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        try:
            self._process = start_child(command, cwd=ROOT, env=environment(os.environ), **pipes)
        except OSError as error:
            raise ModelError(f"The engine could not be started: {error.strerror or error}. Free some memory and try again.") from error
        # The reader comes last: when the process dies at once, it waits for the listener, which must have been started.
        self._threads = [
            threading.Thread(target=work, name=f"engine-{work.__name__}", daemon=True)
            for work in (self._listen, self._write, self._watch, self._read)
        ]
        self._listener = self._threads[0]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs, as far as is known."""
        return self._death is None

    def call(self, kind: str, fields: Mapping[str, Any], raw: bytes = b"") -> Call:
        """Send a request. Raises EngineDied when the process has ended, PromptError when the request is too large."""
        number = next(self._ids)
        try:
            data = encode(Frame(kind, number, fields, raw))
        except ProtocolError:
            raise PromptError("The request is too large for the engine. Shorten its text, grammar or lists.") from None
        with self._lock:
            if self._death:
                raise self._death
            call = Call(self, number)
            if not self._calls:
                self._first_call = time.monotonic()  # silence before it harmed nobody
            self._calls[call.id] = call
        self._out.put(data)
        return call

    def send(self, frame: Frame) -> None:
        """Queue a frame for the process; never blocks."""
        self._out.put(encode(frame))

    def forget(self, call: Call) -> None:
        """Drop what still comes for `call`."""
        with self._lock:
            self._calls.pop(call.id, None)

    def kill(self, reason: UserError) -> None:
        """End the process at once; calls end with `reason`."""
        with self._lock:
            self._ending = self._ending or reason
        self._process.kill()

    def close(self, reason: UserError, patience: float = 2.0) -> None:
        """End the process in order: ask, wait `patience` seconds, then force. It is gone, and reaped, afterwards."""
        with self._lock:
            self._ending = self._ending or reason
            self._closing = True
        self._out.put(encode(Frame("shutdown")))
        self._out.put(None)
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            stop_tree(self._process, grace=patience)
        for thread in self._threads:
            thread.join(patience)

    # --- threads --------------------------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        assert self._process.stdin
        with contextlib.suppress(OSError, ValueError):  # it is dead: the reader tells everybody
            while data := self._out.get():
                self._process.stdin.write(data)
                self._process.stdin.flush()
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def _read(self) -> None:
        assert self._process.stdout
        try:
            while frame := read_frame(self._process.stdout.read):
                self._heard = time.monotonic()
                self._hand_out(frame)
        except ProtocolError as error:
            logger.error("The engine sent something that is no frame: %s", error)
        self._bury()

    def _hand_out(self, frame: Frame) -> None:
        if frame.kind == "heartbeat":
            self.health, self.totals = frame.fields["stats"], frame.fields.get("totals", {})
            if not frame.fields["busy"] or frame.fields["beats"] != self._beats:
                self._progressed, self._beats = self._heard, frame.fields["beats"]
            return
        self._progressed = self._heard
        with self._lock:
            call = self._calls.get(frame.id)
        if call:
            call.put(frame)

    def _watch(self) -> None:
        """End a process that is silent, or makes no progress, for too long while somebody waits for it."""
        while not self._over.wait(WATCH_SECONDS):
            now = time.monotonic()
            allowed = max(self._timeout, START_SECONDS) if not self.health else self._timeout
            with self._lock:
                waited_for = bool(self._calls)
            if not waited_for:
                self._progressed = now  # what nobody waits for cannot be late
            elif now - max(self._heard, self._first_call) > allowed:
                self.kill(EngineDied(f"The engine did not answer for {allowed:.0f} seconds and was stopped. {_AGAIN}"))
            elif now - self._progressed > self._timeout and self.health:
                self.kill(EngineDied(f"The engine made no progress for {self._timeout:.0f} seconds and was stopped. {_AGAIN}"))

    def _bury(self) -> None:
        """The stream has ended: reap the process and tell every waiting call why."""
        assert self._process.stdout
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._out.put(None)
        self._listener.join(1)  # its last words belong into the message
        with self._lock:
            self._death = self._ending or self._unexpected_death()
            calls = list(self._calls.values())
        self._over.set()
        for call in calls:
            call.fail(self._death)
        if not self._closing:
            self._on_death(self)

    def _unexpected_death(self) -> EngineDied:
        how = exit_words(self._process.returncode)
        logger.error("The engine (process %d) stopped unexpectedly: %s. Its last lines:\n%s", self.pid, how, "\n".join(self._said) or "(none)")
        return EngineDied(f"The engine stopped unexpectedly ({how}). {_AGAIN}")

    def _listen(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            text = line.decode("utf-8", "replace").rstrip()
            self._said.append(text)
            logger.debug("engine: %s", text)
        self._process.stderr.close()


_AGAIN = "Your text is kept; the engine starts again by itself: send again."


def exit_words(code: int) -> str:
    """How a process ended, from `Popen.returncode`."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        hint = ", perhaps because memory ran out" if name == "SIGKILL" else ""
        return f"signal {-code}, {name}{hint}"
    return f"signal {-code}"


def environment(current: Mapping[str, str]) -> dict[str, str]:
    """The engine's environment: modules come from this program's folder, and a native crash ends at once.

    (ggml would attach a debugger to print a backtrace, which can hang.) What the user has set for malloc stays.
    """
    kept = {name: value for name, value in current.items() if name not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    return {**_TUNING, **kept, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "GGML_NO_BACKTRACE": "1"}


_TUNING = {
    # Saved states of sequences are large and come and go: each in pages of its own, which go back to the system at once.
    "MALLOC_MMAP_THRESHOLD_": "1048576",
}


def verbose() -> bool:
    """Whether the engine should tell all of llama.cpp's log."""
    return logger.isEnabledFor(logging.DEBUG)
