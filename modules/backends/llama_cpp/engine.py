"""The engine process: `python -m modules.backends.llama_cpp.engine`, frames on stdin and stdout (see `protocol.py`).

Threads: the main one loads and computes; the reader takes frames and ends the process at end-of-file, so that it cannot outlive the server,
whatever native code is doing; one tokenises, so that counting tokens never waits for a reply; one sends a heartbeat each second.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from modules.backends.llama_cpp.model import Model
from modules.backends.llama_cpp.protocol import Frame, ProtocolError, encode, pack_tokens, read_frame, unpack_tokens
from modules.backends.llama_cpp.scheduler import Job, Scheduler, check_tokens, error_frame
from modules.errors import ModelError, UserError

HEARTBEAT_SECONDS = 1.0


class Engine:
    """One model, served over two streams. `leave` ends the process, at once and without clean-up: the system frees the memory."""

    def __init__(self, frames_in: BinaryIO, frames_out: BinaryIO, leave: Callable[[int], None]) -> None:
        self._in = frames_in
        self._out = frames_out
        self._leave = leave
        self._sending = threading.Lock()
        self._loads: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._words: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._model: Model | None = None
        self._scheduler: Scheduler | None = None
        self._over = threading.Event()

    def serve(self) -> None:
        """Load, then compute until the server closes the stream."""
        for work in (self._read, self._tokenise, self._beat):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()
        while frame := self._loads.get():
            self._load(frame)
            if self._scheduler:
                self._scheduler.run()
                return

    def _load(self, frame: Frame) -> None:
        shown = 0.0

        def progress(fraction: float) -> None:
            nonlocal shown
            if fraction - shown >= 0.01:
                shown = fraction
                self._send(Frame("progress", frame.id, {"fraction": fraction}))

        try:
            self._model = Model(frame.fields["path"], frame.fields["options"], progress, frame.fields["verbose"])
        except ModelError as error:
            self._send(error_frame(frame.id, error))
            return
        self._scheduler = Scheduler(self._model, self._send)
        self._send(Frame("loaded", frame.id, self._model.describe()))

    # --- threads --------------------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            while (frame := read_frame(self._in.read)) and frame.kind != "shutdown":
                self._take(frame)
            code = 0
        except ProtocolError as error:
            print(f"engine: {error}", file=sys.stderr)
            code = 2
        self._finish(code)

    def _finish(self, code: int) -> None:
        self._over.set()
        self._words.put(None)
        self._loads.put(None)
        if self._scheduler:
            self._scheduler.stop()
        self._leave(code)

    def _take(self, frame: Frame) -> None:
        if frame.kind == "load":
            self._loads.put(frame)
        elif frame.kind == "ping":
            self._send(Frame("pong", frame.id))
        elif self._scheduler is None:
            self._send(error_frame(frame.id, ModelError("The model is still loading. Wait a moment.")))
        elif frame.kind == "cancel":
            self._scheduler.cancel(frame.id)
        elif frame.kind in ("encode", "decode"):
            self._words.put(frame)
        elif frame.kind == "generate":
            try:
                self._scheduler.submit(Job(frame.id, frame.fields, frame.raw))
            except UserError as error:
                self._send(error_frame(frame.id, error))

    def _tokenise(self) -> None:
        while frame := self._words.get():
            try:
                self._send(self._translated(frame))
            except (UserError, ProtocolError) as error:
                self._send(error_frame(frame.id, error if isinstance(error, UserError) else ModelError(str(error))))

    def _translated(self, frame: Frame) -> Frame:
        assert self._model
        if frame.kind == "encode":
            return Frame("tokens", frame.id, raw=pack_tokens(self._model.tokenize(frame.raw, frame.fields["add_bos"])))
        tokens = unpack_tokens(frame.raw)
        check_tokens(self._model, tokens)
        return Frame("text", frame.id, raw=self._model.detokenize(tokens))

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS):
            model, scheduler = self._model, self._scheduler
            queued, running = scheduler.load if scheduler else (0, 0)
            counts = {"steps": scheduler.steps if scheduler else 0, "nodes": model.nodes if model else 0}
            self._send(Frame("heartbeat", 0, {**counts, "memory": memory_in_use(), "queued": queued, "running": running}))

    def _send(self, frame: Frame) -> None:
        data = encode(frame)
        try:
            with self._sending:
                self._out.write(data)
                self._out.flush()
        except (BrokenPipeError, ValueError):  # the server is gone; ValueError: the stream was closed
            self._finish(0)


def memory_in_use(statm: Path = Path("/proc/self/statm")) -> int:
    """Resident bytes of this process (elsewhere than on Linux the most it ever had; 0 where that is unknown)."""
    try:
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, AttributeError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def main() -> None:
    """Run the engine on this process's stdin and stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is the server's business
    frames_out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what native code prints must not land between frames
    Engine(sys.stdin.buffer, frames_out, os._exit).serve()
    while True:
        time.sleep(60)  # the reader ends the process


if __name__ == "__main__":
    main()
