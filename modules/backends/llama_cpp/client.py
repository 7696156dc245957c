"""LlamaCppBackend: the engine process as a Backend. When the process dies, the next request starts it and loads the model again."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modules.backends.base import CancelToken, Chunk, GenerationRequest, Progress, Timings, TokenLogprob
from modules.backends.llama_cpp.connection import Call, Connection, verbose
from modules.backends.llama_cpp.options import DEFAULT_CONTEXT, LlamaCppOptions
from modules.backends.llama_cpp.protocol import MAX_RAW, Frame, ProtocolError, pack_tokens, unpack_tokens
from modules.backends.llama_cpp.samplers import chain_plan
from modules.errors import EngineDied, ModelError, NoModel, PromptError, PromptTooLong
from modules.gguf import check_parts, model_file, read_header
from modules.log import logger

DEATHS_ALLOWED = 3
DEATHS_WITHIN_SECONDS = 60.0


def load(path: Path, options: LlamaCppOptions, progress: Progress, cancel: CancelToken) -> LlamaCppBackend:
    """Load the GGUF file `path`, or the one model in the folder `path`. Raises ModelError with the reason and the fix."""
    file = model_file(path)
    check_parts(read_header(file))
    backend = LlamaCppBackend(file, options, progress)
    backend.start(cancel)
    return backend


class LlamaCppBackend:
    """A model in an engine process of its own. Satisfies `Backend`; methods may be called from any thread."""

    features = frozenset({"grammar", "logprobs"})

    def __init__(self, path: Path, options: LlamaCppOptions, progress: Progress) -> None:
        self.name = path.stem
        self.context_length = 0
        self.chat_template: str | None = None
        self.bos_token = ""
        self.eos_token = ""
        self.description = ""
        self._path = path
        self._options = options
        self._progress = progress
        self._connection: Connection | None = None
        self._loading: Connection | None = None
        self._unloaded = False
        self._deaths: collections.deque[float] = collections.deque(maxlen=DEATHS_ALLOWED)
        self._starting = threading.Lock()

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
        fields, raw = _asked(request)
        connection = self._connected(request.cancel)
        if connection is None:
            yield Chunk(finish_reason="cancelled", timings=Timings())
            return
        call = connection.call("generate", fields, raw)
        request.cancel.on_cancel(call.cancel)
        try:
            yield from _chunks(call)
        finally:
            call.close()

    def alive(self) -> bool:
        """Whether the engine process runs. A dead one is started again by the next request."""
        connection = self._connection
        return connection is not None and connection.alive

    def memory(self) -> int:
        """Resident bytes of the engine process."""
        connection = self._connection
        return int(connection.health.get("memory", 0)) if connection and connection.alive else 0

    def unload(self) -> None:
        """End the engine process. See `Backend.unload`."""
        self._unloaded = True
        if self._connection:
            self._connection.close(EngineDied("The model was unloaded during this. Load it again on the Model tab and send again."))

    @property
    def pid(self) -> int | None:
        """Number of the engine process, if there is one."""
        return self._connection.pid if self._connection else None

    # --- the engine's life --------------------------------------------------------------------------------------------------------------

    def start(self, cancel: CancelToken) -> None:
        """Start the process and load the model. Raises ModelError; cancelling ends the process at once."""
        self._connection = self._loading = connection = Connection()
        cancel.on_cancel(lambda: self._cancel_loading(connection))
        try:
            if self._unloaded:  # meanwhile, from another thread: no process may be left behind
                raise NoModel(_UNLOADED)
            self._describe(self._load(connection))
        except ModelError as error:
            connection.close(error)
            if isinstance(error, EngineDied):
                raise ModelError(f"{self._path.name} could not be loaded: {_without_advice(error)} {_LOAD_ADVICE}") from error
            raise
        finally:
            self._loading = None

    def _cancel_loading(self, connection: Connection) -> None:
        if self._loading is connection:  # a reply that started the engine again may be cancelled long after that
            connection.kill(ModelError("Loading was cancelled. Load the model again when you want it."))

    def _load(self, connection: Connection) -> dict[str, Any]:
        options = {**self._options.model_dump(), "tensor_split": self._options.shares, "default_context": DEFAULT_CONTEXT}
        self._progress(0.0, "Starting the engine")
        call = connection.call("load", {"path": str(self._path.resolve()), "options": options, "verbose": verbose()})
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
        self.description = loaded["description"]
        logger.info("%s: %s, context %d, %d threads", self.name, self.description, self.context_length, loaded["threads"])

    def _connected(self, cancel: CancelToken) -> Connection | None:
        """A living connection, started again if need be; None when cancelled meanwhile. Raises EngineDied after too many deaths."""
        while not self._starting.acquire(timeout=0.1):
            if cancel.cancelled:
                return None
        try:
            if self._unloaded:
                raise NoModel(_UNLOADED)
            if self._connection and self._connection.alive:
                return self._connection
            self._count_death()
            return self._started_again(cancel)
        finally:
            self._starting.release()

    def _started_again(self, cancel: CancelToken) -> Connection | None:
        try:
            self.start(cancel)
        except ModelError as error:
            if cancel.cancelled:
                return None
            raise EngineDied(f"The engine stopped and the model could not be loaded again. {error}") from error
        return self._connection

    def _count_death(self) -> None:
        now = time.monotonic()
        if len(self._deaths) == DEATHS_ALLOWED and now - self._deaths[0] < DEATHS_WITHIN_SECONDS:
            raise EngineDied(
                f"The engine stopped {DEATHS_ALLOWED} times within a minute. Load the model again on the Model tab, "
                "with a smaller context or fewer GPU layers if memory is short."
            )
        self._deaths.append(now)
        logger.warning("Starting the engine again and loading %s", self._path.name)

    def _ask(self, kind: str, fields: dict[str, Any], raw: bytes) -> Frame:
        connection = self._connected(CancelToken())
        assert connection
        call = connection.call(kind, fields, raw)
        try:
            return call.last()
        finally:
            connection.forget(call)


_UNLOADED = "The model was unloaded. Load it again on the Model tab."
_LOAD_ADVICE = "Its file may be damaged or need more memory than there is: download it again, or load it with a smaller context."


def _without_advice(error: EngineDied) -> str:
    return str(error).split(". ", 1)[0] + "."


def _check_size(raw: bytes) -> None:
    if len(raw) > MAX_RAW:
        raise PromptTooLong(f"The text has {len(raw) >> 20} MiB and at most {MAX_RAW >> 20} can be sent. Shorten it.")


def _packed(tokens: list[int] | tuple[int, ...]) -> bytes:
    try:
        return pack_tokens(tokens)
    except ProtocolError as error:
        raise PromptError(f"These are no token ids: {error}.") from None


def _asked(request: GenerationRequest) -> tuple[dict[str, Any], bytes]:
    """Fields and raw part of a `generate` frame. Raises ModelError for what this version cannot do."""
    if request.images:
        raise ModelError("Images are not supported with llama.cpp in this version. Send the message without them.")
    if request.adapters:
        raise ModelError("LoRA adapters are not supported with llama.cpp in this version. Turn them off.")
    is_text = isinstance(request.prompt, str)
    raw = request.prompt.encode("utf-8", "replace") if isinstance(request.prompt, str) else _packed(request.prompt)
    _check_size(raw)
    sampling = request.sampling
    return {
        "text": is_text,
        "add_bos": sampling.add_bos_token,
        "plan": chain_plan(sampling, request.seed, request.logit_bias),
        "max_new": request.max_new_tokens,
        "logprobs": request.logprobs,
        "special": not sampling.skip_special_tokens,
    }, raw


def _chunks(call: Call) -> Iterator[Chunk]:
    prompt = done = 0
    for frame in call.frames():
        prompt, done = frame.fields.get("prompt", prompt), frame.fields.get("done", done)
        yield _chunk(frame, done)
        if frame.kind == "end":
            return
    yield Chunk(finish_reason="cancelled", prompt_tokens=prompt, completion_tokens=done, timings=Timings())


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
    )


def _logprob(token: int, text: str, logprob: float, top: list[Any]) -> TokenLogprob:
    return TokenLogprob(token, text, logprob, tuple((other, words, value) for other, words, value in top))
