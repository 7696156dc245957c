"""LlamaCppBackend: the engine process as a Backend. A process that dies is started again at once, with growing pauses while that does not help."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from modules.backends.base import Adapter, CancelToken, Chunk, Embeddings, EngineStats, GenerationRequest, Progress, Timings, TokenLogprob
from modules.backends.llama_cpp.connection import Call, Connection, verbose
from modules.backends.llama_cpp.options import DEFAULT_CONTEXT, LlamaCppOptions
from modules.backends.llama_cpp.protocol import MAX_RAW, Frame, ProtocolError, pack_images, pack_tokens, unpack_floats, unpack_tokens
from modules.backends.llama_cpp.samplers import chain_plan
from modules.errors import Busy, EngineDied, ModelError, NoModel, PromptError, PromptTooLong, SettingsError, UserError
from modules.gguf import check_parts, mmproj_beside, model_file, read_header
from modules.log import logger
from modules.markers import MARKERS

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a start, after lives of the engine that brought nothing."""
MAX_SCALE = 100
"""Of an adapter: far more than any makes sense with."""


def load(path: Path, options: LlamaCppOptions, progress: Progress, cancel: CancelToken) -> LlamaCppBackend:
    """Load the GGUF file `path`, or the one model in the folder `path`. Raises ModelError with the reason and the fix."""
    file = model_file(path)
    check_parts(read_header(file))
    draft = model_file(Path(options.model_draft)) if options.model_draft else None
    if draft:
        check_parts(read_header(draft))
    beside = mmproj_beside(file)
    if beside and not options.mmproj:
        logger.info("%s is used with it: the model can see images.", beside.name)
        options = options.replace({"mmproj": str(beside)})
    backend = LlamaCppBackend(file, options, progress, draft)
    backend.start(cancel)
    return backend


class LlamaCppBackend:
    """A model in an engine process of its own. Satisfies `Backend`, and all protocols beside it; methods may be called from any thread."""

    def __init__(self, path: Path, options: LlamaCppOptions, progress: Progress, draft: Path | None = None) -> None:
        self.name = path.stem
        self.context_length = 0
        self.chat_template: str | None = None
        self.bos_token = ""
        self.eos_token = ""
        self.image_marker = ""
        self.description = ""
        self.features: frozenset[str] = frozenset()
        self._parallel = 1
        self._path = path
        self._draft = draft
        self._options = options
        self._progress = progress
        self._adapters: dict[Path, None] = {}
        self._changed = threading.Condition()
        self._connection: Connection | None = None
        self._loading: Connection | None = None
        self._trouble: EngineDied | None = None
        self._fruitless = 0
        """Lives of the engine, one after the other, in which no request was answered."""
        self._unloaded = False
        self._former: dict[str, Any] = {}
        """Totals of the lives before this one."""
        self._restarts = 0

    # --- the Backend protocol ---------------------------------------------------------------------------------------------------------

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Token ids of `text`. See `Backend.encode`."""
        raw = text.encode("utf-8", "replace")
        _check_size(raw)
        return unpack_tokens(self._ask("encode", {"add_bos": add_bos}, raw).raw)

    def decode(self, tokens: list[int] | tuple[int, ...]) -> str:
        """Text of `tokens`. Raises PromptError for one that the model does not have."""
        return self._ask("decode", {}, _packed(tokens)).raw.decode("utf-8", "replace")

    def generate(self, request: GenerationRequest) -> Iterator[Chunk]:
        """See `Backend.generate`. Busy when too many requests wait."""
        if "generate" not in self.features:
            raise ModelError(f"{self.name} makes embeddings only. Load a model that writes text.")
        fields, raw = _asked(request)
        connection = self._connected(request.cancel)
        if connection is None:
            yield Chunk(finish_reason="cancelled", timings=Timings())
            return
        for adapter in request.adapters:
            self.load_adapter(adapter.path)
        call = connection.call("generate", fields, raw)
        request.cancel.on_cancel(call.cancel)
        try:
            yield from self._chunks(call)
        finally:
            call.close()

    def alive(self) -> bool:
        """Whether the engine process runs. A dead one is started again by itself."""
        connection = self._connection
        return connection is not None and connection.alive

    def memory(self) -> int:
        """Resident bytes of the engine process."""
        connection = self._connection
        return int(connection.health.get("memory_bytes", 0)) if connection and connection.alive else 0

    def unload(self) -> None:
        """End the engine process. See `Backend.unload`."""
        with self._changed:
            self._unloaded = True
            connection, loading = self._connection, self._loading
            self._changed.notify_all()
        for each in {connection, loading} - {None}:
            assert each
            each.close(EngineDied("The model was unloaded during this. Send again when a model is ready; the Model tab shows it."))

    @property
    def pid(self) -> int | None:
        """Number of the engine process, if there is one."""
        return self._connection.pid if self._connection else None

    # --- what it has besides ------------------------------------------------------------------------------------------------------------

    def prefill(self, request: GenerationRequest) -> None:
        """See `Prefilling.prefill`."""
        fields, raw = _asked(request)
        connection = self._connection
        if connection is None or not connection.alive or request.cancel.cancelled or "prefill" not in self.features:
            return
        for adapter in request.adapters:
            self.load_adapter(adapter.path)
        call = connection.call("prefill", fields, raw)
        request.cancel.on_cancel(call.cancel)
        try:
            for _ in call.frames():
                pass
        except Busy:
            return
        finally:
            call.close()

    @property
    def adapters(self) -> tuple[Path, ...]:
        """See `Adapting.adapters`."""
        return tuple(self._adapters)

    def load_adapter(self, path: Path) -> None:
        """See `Adapting.load_adapter`."""
        path = path.resolve()
        if path in self._adapters:
            return
        if path.is_dir():
            fix = "Convert it to a GGUF adapter on the Model tab, or load the model with Transformers, which takes such folders."
            raise ModelError(f"llama.cpp cannot use the folder {path.name}. {fix}")
        header = read_header(path)
        if header.metadata.get("general.type") != "adapter":
            raise ModelError(f"{path.name} is not a LoRA adapter. Choose a GGUF file of an adapter (llama.cpp's convert_lora_to_gguf makes one).")
        self._ask("adapter", {"path": str(path), "load": True})
        self._adapters[path] = None

    def unload_adapter(self, path: Path) -> None:
        """See `Adapting.unload_adapter`."""
        path = path.resolve()
        if path in self._adapters:
            self._ask("adapter", {"path": str(path), "load": False})
            self._adapters.pop(path, None)

    def embed(self, texts: Sequence[str | tuple[int, ...]], cancel: CancelToken) -> Embeddings:
        """See `Embedding.embed`."""
        if not texts:
            return Embeddings((), 0)
        parts = [text.encode("utf-8", "replace") if isinstance(text, str) else _packed(text) for text in texts]
        fields = {"lengths": [len(part) for part in parts], "text": [isinstance(text, str) for text in texts]}
        raw = b"".join(parts)
        _check_size(raw)
        frame = self._ask("embed", fields, raw, cancel)
        if frame.kind != "vectors":
            return Embeddings((), 0)
        values = unpack_floats(frame.raw)
        width = len(values) // frame.fields["count"]
        vectors = tuple(tuple(values[n : n + width]) for n in range(0, len(values), width))
        return Embeddings(vectors, frame.fields["tokens"])

    def stats(self) -> EngineStats:
        """See `Measured.stats`."""
        with self._changed:
            connection, former, restarts = self._connection, self._former, self._restarts
        totals = _added(former, connection.totals if connection else {})
        known = {"parallel": self._parallel, "cells": self.context_length, "max_queue": self._options.max_queue}
        now = connection.health if connection and connection.alive else {}
        return EngineStats(**{**known, **now, **totals, "restarts": restarts})

    # --- the engine's life --------------------------------------------------------------------------------------------------------------

    def start(self, cancel: CancelToken) -> None:
        """Start the process and load the model. Raises ModelError; cancelling ends the process at once."""
        connection = Connection(timeout=self._options.engine_timeout, on_death=self._died)
        with self._changed:
            self._loading = connection
        cancel.on_cancel(lambda: self._cancel_loading(connection))
        try:
            self._describe(self._load(connection))
            self._reload_adapters(connection)
        except ModelError as error:
            connection.close(error)
            if isinstance(error, EngineDied):
                raise ModelError(f"{self._path.name} could not be loaded: {_without_advice(error)} {_LOAD_ADVICE}") from error
            raise
        finally:
            with self._changed:
                self._loading = None
        with self._changed:
            wanted = not self._unloaded
            self._connection = connection
            self._changed.notify_all()
        if not wanted:  # meanwhile, from another thread: no process may be left behind
            connection.close(NoModel(_UNLOADED))
            raise NoModel(_UNLOADED)
        if not connection.alive:  # it died before it was known here
            self._died(connection)

    def _cancel_loading(self, connection: Connection) -> None:
        if self._loading is connection:  # a reply may be cancelled long after it waited for the engine to start
            connection.kill(ModelError("Loading was cancelled. Load the model again when you want it."))

    def _load(self, connection: Connection) -> dict[str, Any]:
        more = {"tensor_split": self._options.shares, "default_context": DEFAULT_CONTEXT, "markers": MARKERS}
        options = {**self._options.model_dump(), **more}
        draft = str(self._draft.resolve()) if self._draft else None
        self._progress(0.0, "Starting the engine")
        call = connection.call("load", {"path": str(self._path.resolve()), "options": options, "draft": draft, "verbose": verbose()})
        try:
            for frame in call.frames():
                if frame.kind == "loaded":
                    self._progress(1.0, "Loaded")
                    return dict(frame.fields)
                self._progress(float(frame.fields["fraction"]), "Loading the model")
        finally:
            connection.forget(call)
        raise ModelError("The engine did not say whether the model is loaded. Load it again.")

    def _describe(self, loaded: dict[str, Any]) -> None:
        self.context_length = int(loaded["context_length"])
        self.chat_template = loaded["chat_template"]
        self.bos_token, self.eos_token = loaded["bos_token"], loaded["eos_token"]
        self.image_marker = loaded["image_marker"]
        self._parallel = int(loaded["parallel"])
        self.description = loaded["description"]
        writing = {"generate", "parallel", "grammar", "logprobs", "prefill", "adapters"} if loaded["writes"] else {"parallel"}
        self.features = frozenset(writing | {"embeddings", "stats"} | ({"images"} if self.image_marker else set()))
        logger.info(
            "%s: %s, context %d, %d replies at once, %d threads for one reply and %d for more; %s",
            self.name,
            self.description,
            self.context_length,
            loaded["parallel"],
            loaded["threads"],
            loaded["threads_batch"],
            "any prefix can be shared" if loaded["cuts"] else "its cache cannot be cut back: only whole beginnings are shared",
        )
        if loaded["speculates"]:
            logger.info("%s: guesses ahead with %s", self.name, self._draft.name if self._draft else "what stands in the text")
        elif self._draft or self._options.spec_type != "none":
            logger.warning("%s: its cache cannot be cut back, so nothing is guessed ahead.", self.name)

    def _reload_adapters(self, connection: Connection) -> None:
        for path in list(self._adapters):
            try:
                _answer(connection, "adapter", {"path": str(path), "load": True})
            except UserError as error:
                self._adapters.pop(path, None)
                logger.warning("%s was not loaded again: %s", path.name, error)

    def _died(self, connection: Connection) -> None:
        """Called on the dead connection's own thread."""
        with self._changed:
            if connection is not self._connection or self._unloaded:
                return  # known already, or nobody's business
            self._former = _added(self._former, connection.totals)
            self._connection = None
            self._restarts += 1
            self._trouble = None
        threading.Thread(target=self._revive, name="engine-start", daemon=True).start()

    def _revive(self) -> None:
        """Start the engine until it runs. Who asks meanwhile waits for the first attempt, and later gets what went wrong."""
        while True:
            self._fruitless += 1
            pause = pause_before(self._fruitless)
            with self._changed:
                if pause and self._trouble is None:
                    words = f"The engine stopped {self._fruitless} times in a row. It is started again in {pause:.0f} seconds"
                    self._trouble = EngineDied(f"{words}; your text is kept, send it again then, or load another model.")
                    self._changed.notify_all()
                if self._changed.wait_for(lambda: self._unloaded, pause):
                    return
            logger.warning("Starting the engine again and loading %s", self._path.name)
            try:
                self.start(CancelToken())
                return
            except UserError as error:
                with self._changed:
                    if self._unloaded:
                        return
                    self._trouble = EngineDied(f"The engine stopped and could not be started again; it is tried again by itself. {error}")
                    self._changed.notify_all()
                logger.error("%s", error)

    def _connected(self, cancel: CancelToken) -> Connection | None:
        """A living connection, waiting for one that is being started; None when cancelled meanwhile. Raises EngineDied, NoModel."""
        cancel.on_cancel(self._wake)
        with self._changed:
            self._changed.wait_for(lambda: self._unloaded or self._connection or self._trouble or cancel.cancelled)
            if self._unloaded:
                raise NoModel(_UNLOADED)
            if cancel.cancelled:
                return None
            if self._connection is None:
                assert self._trouble
                raise self._trouble
            return self._connection

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _chunks(self, call: Call) -> Iterator[Chunk]:
        prompt = done = 0
        for frame in call.frames():
            prompt, done = frame.fields.get("prompt", prompt), frame.fields.get("done", done)
            if frame.kind == "end":
                self._fruitless = 0
            yield _chunk(frame, done)
            if frame.kind == "end":
                return
        yield Chunk(finish_reason="cancelled", prompt_tokens=prompt, completion_tokens=done, timings=Timings())

    def _ask(self, kind: str, fields: dict[str, Any], raw: bytes = b"", cancel: CancelToken | None = None) -> Frame:
        connection = self._connected(cancel or CancelToken())
        return _answer(connection, kind, fields, raw, cancel) if connection else Frame("end")


def pause_before(start: int) -> float:
    """Seconds before the engine is started again, for the first time (at once), the second…, while nobody has got a reply from it."""
    return 0.0 if start == 1 else min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (start - 2))


_UNLOADED = "The model was unloaded. Load it again on the Model tab."
_LOAD_ADVICE = "Its file may be damaged or need more memory than there is: download it again, or load it with a smaller context."


def _answer(connection: Connection, kind: str, fields: dict[str, Any], raw: bytes = b"", cancel: CancelToken | None = None) -> Frame:
    call = connection.call(kind, fields, raw)
    if cancel:
        cancel.on_cancel(call.cancel)
    try:
        return call.last()
    except EngineDied:
        if cancel and cancel.cancelled:  # a slow engine does not hold up who gave up waiting
            return Frame("end")
        raise
    finally:
        connection.forget(call)


def _without_advice(error: EngineDied) -> str:
    return str(error).split(". ", 1)[0] + "."


def _added(former: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Totals of all lives so far; of "finished" each reason for itself."""
    return {name: _sum(former.get(name), now.get(name)) for name in {**former, **now}}


def _sum(one: Any, other: Any) -> Any:
    if isinstance(one, Mapping) or isinstance(other, Mapping):  # the other may be missing, or empty
        return _added(one or {}, other or {})
    return (one or 0) + (other or 0)


def _check_size(raw: bytes) -> None:
    if len(raw) > MAX_RAW:
        raise PromptTooLong(f"The text has {len(raw) >> 20} MiB and at most {MAX_RAW >> 20} can be sent. Shorten it.")


def _packed(tokens: list[int] | tuple[int, ...]) -> bytes:
    try:
        return pack_tokens(tokens)
    except ProtocolError as error:
        raise PromptError(f"These are no token ids: {error}.") from None


def _adapters(adapters: Sequence[Adapter]) -> list[list[Any]]:
    for adapter in adapters:
        if not abs(adapter.scale) <= MAX_SCALE:
            raise SettingsError(f"The scale of {adapter.path.name} cannot be {adapter.scale}. Use a number between −{MAX_SCALE} and {MAX_SCALE}.")
    return [[str(adapter.path.resolve()), adapter.scale] for adapter in adapters]


def _asked(request: GenerationRequest) -> tuple[dict[str, Any], bytes]:
    """Fields and raw part of a `generate` frame. Raises PromptError for what makes no sense."""
    is_text = isinstance(request.prompt, str)
    raw = request.prompt.encode("utf-8", "replace") if isinstance(request.prompt, str) else _packed(request.prompt)
    lengths: list[int] = []
    if request.images:
        if not is_text:
            raise PromptError("A prompt with images must be text. Send it as text with the images' marker.")
        raw, lengths = pack_images(raw, request.images)
    _check_size(raw)
    sampling = request.sampling
    return {
        "text": is_text,
        "add_bos": sampling.add_bos_token,
        "plan": chain_plan(sampling, request.seed, request.logit_bias),
        "json_schema": request.json_schema,
        "max_new": request.max_new_tokens,
        "logprobs": request.logprobs,
        "chosen_logprob": request.chosen_logprob,
        "prompt_logprobs": request.prompt_logprobs,
        "special": not sampling.skip_special_tokens,
        "client": request.client,
        "adapters": _adapters(request.adapters),
        "images": lengths,
    }, raw


def _chunk(frame: Frame, done: int) -> Chunk:
    fields = frame.fields
    return Chunk(
        text=frame.raw.decode("utf-8"),
        token_ids=tuple(fields.get("tokens", ())),
        finish_reason=fields.get("reason"),
        prompt_tokens=fields.get("prompt", 0),
        completion_tokens=done,
        prefill_done=fields.get("prefill", 0),
        timings=Timings(**fields["timings"]) if "timings" in fields else None,
        logprobs=tuple(_logprob(*entry) for entry in fields.get("logprobs", ())),
        prompt_logprobs=tuple(_logprob(*entry) for entry in fields.get("prompt_logprobs", ())),
        queue_position=fields.get("queue"),
    )


def _logprob(token: int, text: str, logprob: float, top: list[Any]) -> TokenLogprob:
    return TokenLogprob(token, text, logprob, tuple((other, words, value) for other, words, value in top))
