"""The engine process: `python -m modules.backends.llama_cpp.engine`, frames on stdin and stdout (see `protocol.py`).

Threads: the main one loads and computes; the reader takes frames and ends the process at end-of-file, so that it cannot outlive the server,
whatever native code is doing; one prepares prompts and counts tokens and one prepares those with images, so that neither waits for a reply; one
sends a heartbeat each second.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import psutil

from modules.backends.llama_cpp.cache import Cache
from modules.backends.llama_cpp.jobs import check_tokens, error_frame, make_job, prepare
from modules.backends.llama_cpp.model import EMBEDDED_AT_ONCE, Model
from modules.backends.llama_cpp.protocol import Frame, ProtocolError, encode, pack_tokens, read_frame, split, unpack_tokens
from modules.backends.llama_cpp.scheduler import Job, Scheduler, Speculator
from modules.backends.llama_cpp.speculation import DraftModel, NgramLookup
from modules.errors import Busy, ModelError, PromptError, PromptTooLong, UserError

HEARTBEAT_SECONDS = 1.0
LOW_MEMORY = 0.05
"""Share of the machine's memory; with less available, what is kept for later is given back."""
MIB = 1 << 20


class Engine:
    """One model, served over two streams. `leave` ends the process, at once and without clean-up: the system frees the memory."""

    def __init__(self, frames_in: BinaryIO, frames_out: BinaryIO, leave: Callable[[int], None]) -> None:
        self._in = frames_in
        self._out = Outlet(frames_out, lambda: self._finish(0))
        self._leave = leave
        self._loads: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._words: queue.SimpleQueue[tuple[Frame, Job | None] | None] = queue.SimpleQueue()
        self._sights: queue.SimpleQueue[tuple[Frame, Job | None] | None] = queue.SimpleQueue()
        self._preparing: dict[int, Job] = {}
        self._model: Model | None = None
        self._scheduler: Scheduler | None = None
        self._over = threading.Event()

    def serve(self) -> None:
        """Load, then compute until the server closes the stream."""
        for work in (self._read, self._beat):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()
        for name, frames in (("words", self._words), ("sights", self._sights)):
            threading.Thread(target=self._prepare, args=(frames,), name=name, daemon=True).start()
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
                self._out.send(Frame("progress", frame.id, {"fraction": fraction}))

        options = frame.fields["options"]
        try:
            self._model = model = Model(frame.fields["path"], options, progress, frame.fields["verbose"])
            speculator = _speculator(frame.fields.get("draft"), options, model)
        except ModelError as error:
            self._out.send(error_frame(frame.id, error))
            return
        cache = Cache(model, model.context_length, model.sequences, spill_bytes(options["cache_ram"]))
        self._scheduler = Scheduler(
            model,
            cache,
            parallel=model.parallel,
            max_queue=options["max_queue"],
            prefill_share=options["prefill_share"],
            speculator=speculator,
            cuts=model.cuts,
            seconds_per_token=model.seconds_per_token / 2,  # several at once cost less each than one alone
            flush=self._out.flush,
        )
        self._out.send(Frame("heartbeat", 0, self.health()))
        self._out.send(Frame("loaded", frame.id, {**model.describe(), "speculates": speculator is not None and model.cuts}))

    # --- frames in ------------------------------------------------------------------------------------------------------------------

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
        self._sights.put(None)
        self._loads.put(None)
        if self._scheduler:
            self._scheduler.stop()
        self._leave(code)

    def _take(self, frame: Frame) -> None:
        if frame.kind == "load":
            self._loads.put(frame)
        elif frame.kind == "ping":
            self._out.send(Frame("pong", frame.id))
        elif self._scheduler is None:
            self._out.send(error_frame(frame.id, ModelError("The model is still loading. Wait a moment.")))
        elif frame.kind == "cancel":
            self._cancel(frame.id)
        elif frame.kind in ("generate", "prefill"):
            self._begin(frame)
        elif frame.kind in ("encode", "decode"):
            self._words.put((frame, None))
        elif frame.kind == "embed":
            self._preparing[frame.id] = Job(frame.id, voice=None)  # type: ignore[arg-type]  # only to be cancelled
            self._words.put((frame, None))
        elif frame.kind == "adapter":
            self._scheduler.chore(lambda: self._answer(frame, self._adapter))

    def _begin(self, frame: Frame) -> None:
        """A job exists from here on, so that a cancel finds it while its prompt is being read."""
        assert self._model
        if len(self._preparing) >= 2 * self._model.max_queue:
            self._out.send(error_frame(frame.id, Busy("Too many requests are coming in at once. Try again in a moment.")))
            return
        job = make_job(frame, self._model, self._out.put)
        self._preparing[job.id] = job
        (self._sights if frame.fields["images"] else self._words).put((frame, job))

    def _cancel(self, id: int) -> None:
        assert self._scheduler
        job = self._preparing.get(id)
        if job:
            job.cancelled = True
        self._scheduler.cancel(id)

    # --- the preparing threads --------------------------------------------------------------------------------------------------------

    def _prepare(self, frames: queue.SimpleQueue[tuple[Frame, Job | None] | None]) -> None:
        while item := frames.get():
            frame, job = item
            if job is None:
                self._answer(frame, self._embed if frame.kind == "embed" else self._translated)
            else:
                self._answer(frame, lambda frame, job=job: self._submit(frame, job))  # type: ignore[misc]
                self._preparing.pop(job.id, None)

    def _answer(self, frame: Frame, work: Callable[[Frame], Frame | None]) -> None:
        """Send what `work` returns, or the error it raises."""
        try:
            answer = work(frame)
            if answer:
                self._out.send(answer)
        except UserError as error:
            self._out.send(error_frame(frame.id, error))
        except ProtocolError:
            self._out.send(error_frame(frame.id, PromptError("The request, or its answer, is too large. Send it in smaller pieces.")))
        except Exception as error:  # noqa: BLE001  # the top of a thread: one frame's failure must not end it
            traceback.print_exc(file=sys.stderr)
            self._out.send(error_frame(frame.id, ModelError(f"The engine failed ({type(error).__name__}). Send again, or load the model again.")))

    def _submit(self, frame: Frame, job: Job) -> None:
        assert self._model and self._scheduler
        try:
            if not job.cancelled:
                prepare(job, frame, self._model)
            self._scheduler.submit(job)
        except UserError as error:
            job.voice.failed(job, error)
            self._out.flush()

    def _translated(self, frame: Frame) -> Frame:
        assert self._model
        if frame.kind == "encode":
            return Frame("tokens", frame.id, raw=pack_tokens(self._model.tokenize(frame.raw, frame.fields["add_bos"])))
        tokens = unpack_tokens(frame.raw)
        check_tokens(self._model, tokens)
        return Frame("text", frame.id, raw=self._model.detokenize(tokens))

    # --- the computing thread's other work --------------------------------------------------------------------------------------------

    def _adapter(self, frame: Frame) -> Frame:
        assert self._model and self._scheduler
        path = frame.fields["path"]
        if frame.fields["load"]:
            self._model.load_adapter(path)
        else:
            if self._scheduler.uses(lambda key: _names(key, path)) or any(_names(job.key, path) for job in list(self._preparing.values())):
                raise Busy("A reply uses this adapter. Wait for it to end, or stop it, then unload the adapter.", retry_after=5)
            self._scheduler.cache.forget(lambda key: _names(key, path))  # another file may bear its name later
            self._model.unload_adapter(path)
        return Frame("done", frame.id)

    def _embed(self, frame: Frame) -> None:
        """Read the texts, then embed some between each two steps."""
        assert self._model and self._scheduler
        job, found = self._preparing[frame.id], []  # type: tuple[Job, list[np.ndarray]]
        with self._forgotten_on_error(frame.id):
            parts = split(frame.raw, frame.fields["lengths"])
            texts = [
                self._model.tokenize(part, True) if text else unpack_tokens(part) for part, text in zip(parts, frame.fields["text"], strict=True)
            ]
            for number, text in enumerate(texts, 1):
                check_tokens(self._model, text)
                if not text:
                    raise PromptError(f"Text {number} is empty. Leave it out, or write something.")
        self._scheduler.chore(lambda: self._answer(frame, lambda frame: self._embed_some(frame, job, texts, found)))

    def _embed_some(self, frame: Frame, job: Job, texts: list[list[int]], found: list[np.ndarray]) -> Frame | None:
        assert self._model and self._scheduler
        with self._forgotten_on_error(frame.id):
            done = sum(map(len, found))
            if not job.cancelled:
                found.append(self._model.embed(_together(texts[done:], self._model.longest_embedding, done)))
                done = sum(map(len, found))
        if not job.cancelled and done < len(texts):
            self._scheduler.chore(lambda: self._answer(frame, lambda frame: self._embed_some(frame, job, texts, found)))
            return None
        self._preparing.pop(frame.id, None)
        if job.cancelled:
            return Frame("end", frame.id, {"reason": "cancelled"})
        fields = {"tokens": sum(map(len, texts)), "count": len(texts)}
        return Frame("vectors", frame.id, fields, np.concatenate(found).astype("<f4").tobytes())

    @contextlib.contextmanager
    def _forgotten_on_error(self, id: int) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._preparing.pop(id, None)
            raise

    # --- health ---------------------------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS):
            self._out.send(Frame("heartbeat", 0, self.health()))
            self._spare_memory()

    def _spare_memory(self) -> None:
        """Chats kept in main memory are a convenience: better without them than ended by the system for want of memory."""
        memory, scheduler = psutil.virtual_memory(), self._scheduler
        if scheduler and scheduler.cache.spilled and memory.available < LOW_MEMORY * memory.total:
            print("engine: memory is short, so chats kept in it are dropped", file=sys.stderr)
            scheduler.chore(scheduler.cache.give_back_memory)

    def health(self) -> dict[str, Any]:
        """Fields of a heartbeat. `beats` grows while the engine gets on with its work, `busy` says whether it has any."""
        model, scheduler = self._model, self._scheduler
        if model is None or scheduler is None:
            return {"beats": 0, "busy": False, "stats": {"memory_bytes": memory_in_use()}}
        waiting, running = scheduler.load
        cache, totals = scheduler.cache, scheduler.totals
        stats = {
            "busy_sequences": running,
            "parallel": scheduler.parallel,
            "waiting": waiting + len(self._preparing),
            "max_queue": scheduler.max_queue,
            "cells": cache.size,
            "cells_used": cache.used,
            "cached_sequences": cache.idle,
            "spilled_sequences": cache.spilled,
            "spilled_bytes": cache.spilled_bytes,
            "memory_bytes": memory_in_use(),
            "threads": model.threads.last,
        }
        counted = {
            **vars(totals),
            "finished": dict(totals.finished),
            "cache_hits_cells": cache.hits_cells,
            "cache_hits_memory": cache.hits_memory,
            "cache_misses": cache.misses,
            "evictions": cache.evictions,
        }
        return {"beats": totals.steps + model.nodes, "busy": not scheduler.idle, "stats": stats, "totals": counted}


class Outlet:
    """The stream of frames to the server. Frames that belong to one step are put, and go out together."""

    def __init__(self, stream: BinaryIO, gone: Callable[[], None]) -> None:
        """`gone` is called when the server does not read any more."""
        self._stream = stream
        self._gone = gone
        self._lock = threading.Lock()
        self._put: list[bytes] = []

    def put(self, frame: Frame) -> None:
        """Keep a frame for the next `flush` or `send`."""
        with self._lock:
            self._put.append(encode(frame))

    def flush(self) -> None:
        """Send what was put."""
        with self._lock:
            data, self._put = b"".join(self._put), []
            if data:
                self._write(data)

    def send(self, frame: Frame) -> None:
        """Send a frame now, after what was put before."""
        with self._lock:
            data = b"".join([*self._put, encode(frame)])
            self._put = []
            self._write(data)

    def _write(self, data: bytes) -> None:
        try:
            self._stream.write(data)
            self._stream.flush()
        except (BrokenPipeError, ValueError):  # ValueError: the stream was closed
            self._gone()


def _speculator(draft: str | None, options: Mapping[str, Any], model: Model) -> Speculator | None:
    """As the options say. Raises ModelError for a draft model that does not fit."""
    if draft:
        small = Model(draft, _for_draft(options, model), lambda _fraction: None)
        if small.vocabulary.size != model.vocabulary.size or small.tokenize(b"The fox, 42!", False) != model.tokenize(b"The fox, 42!", False):
            raise ModelError("The draft model has another vocabulary than the model. Choose one of the same family.")
        if not small.writes:
            raise ModelError("The draft model makes embeddings only. Choose a small model of the same family that writes text.")
        if not small.cuts:
            raise ModelError("The draft model's cache cannot be cut back. Choose a draft model without recurrent layers or sliding window.")
        return DraftModel(small, options["draft_max"])
    if options["spec_type"] != "none":
        return NgramLookup(options["spec_ngram_size_n"], options["spec_ngram_size_m"], options["spec_ngram_min_hits"])
    return None


def _for_draft(options: Mapping[str, Any], model: Model) -> dict[str, Any]:
    return {
        **options,
        "gpu_layers": options["gpu_layers_draft"],
        "ctx_size": options["ctx_size_draft"] or model.context_length,
        "parallel": model.parallel,
        "mmproj": "",
        "model_draft": "",
        "spec_type": "none",
        "tensor_split": (),
    }


def _names(key: Any, path: str) -> bool:
    """Whether a cache key names the adapter `path`."""
    return any(name == path for name, _ in key or ())


def _together(texts: list[list[int]], longest: int, before: int) -> list[list[int]]:
    """As many of the first `texts` as can be embedded at once. Raises PromptTooLong for one that cannot even alone."""
    if len(texts[0]) > longest:
        raise PromptTooLong(f"Text {before + 1} has {len(texts[0])} tokens; at most {longest} can be embedded. Cut it into pieces.")
    count, total = 0, 0
    for text in texts[:EMBEDDED_AT_ONCE]:
        total += len(text)
        if total > longest:
            break
        count += 1
    return texts[:count]


def spill_bytes(cache_ram: int) -> int:
    """Bytes of main memory for evicted sequences, from MiB; −1 is a quarter of what is free now."""
    return cache_ram * MIB if cache_ram >= 0 else psutil.virtual_memory().available // 4


def memory_in_use(statm: Path = Path("/proc/self/statm")) -> int:
    """Resident bytes of this process (elsewhere than on Linux the most it ever had; 0 where that is unknown)."""
    with contextlib.suppress(OSError, AttributeError):
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(psutil.Error):
        return int(psutil.Process().memory_info().rss)
    return 0


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
