"""What an engine is: GenerationRequest in, Chunks out. One stream for the page, the API and the notebook.

Nothing here knows a chat, a template or a stop string's meaning; `text_generation.py` does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, cast

from modules.options import Options
from modules.samplers import SamplingParams

FinishReason = Literal["stop", "length", "cancelled"]
Progress = Callable[[float, str], None]
"""Called with a fraction 0..1 and a few words, from any thread."""


class CancelToken:
    """The stop of one piece of work. Set from any thread; wakes those who asked to be called."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._event = threading.Event()
        self._callbacks: list[Callable[[], None]] = []

    def cancel(self) -> None:
        """Cancel. A second call does nothing."""
        with self._lock:
            if self._event.is_set():
                return
            self._event.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, on the thread that cancels; at once if already cancelled. It must be short and must not raise."""
        with self._lock:
            if not self._event.is_set():
                self._callbacks.append(callback)
                return
        callback()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._event.is_set()

    def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds; True if cancelled."""
        return self._event.wait(timeout)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in use for one request."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True)
class GenerationRequest:
    """One generation. `prompt` is text (special tokens are recognised, BOS by `sampling.add_bos_token`) or exact token ids.

    With `images` it is text that holds the backend's `image_marker` once for each image, in order.
    """

    prompt: str | tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int | None = None
    """At most so many new tokens; None: until the context is full."""
    seed: int = 0
    """0 ≤ seed < 2³²; the caller resolves "random" before, so that the reply can be repeated."""
    stop: tuple[str, ...] = ()
    """Applied to text by `text_generation`; a backend ignores them."""
    images: tuple[bytes, ...] = ()
    """Encoded files (PNG, JPEG, …), as they came."""
    adapters: tuple[Adapter, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, value added to its logit); −inf bans the token."""
    json_schema: str = ""
    """A JSON schema that the text must satisfy, with "grammar"; not together with `sampling.grammar_string`."""
    logprobs: int = 0
    """How many alternatives to report for each token; 0: none."""
    chosen_logprob: bool = False
    """Report the log-probability of each chosen token, without alternatives and texts: that costs next to nothing. For backends with "logprobs"."""
    prompt_logprobs: int | None = None
    """Report the prompt's own tokens too, each with so many alternatives. The prompt is then computed whole, without the cache."""
    model: str = ""
    """Which of several models in memory; "" for the current one."""
    client: str = ""
    """Who asks. An engine that runs many requests takes waiting ones of different clients in turn."""
    cancel: CancelToken = field(default_factory=CancelToken, compare=False)


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability (natural) of a chosen token before samplers, and the `top` alternatives, best first. `text` may be empty without them."""

    token: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True)
class Timings:
    """Seconds and tokens of one generation, as measured in the engine."""

    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    """Prompt tokens computed."""
    reused_tokens: int = 0
    """Prompt tokens taken from the cache."""
    decode_seconds: float = 0.0
    """From the first generated token to the last."""
    draft_tokens: int = 0
    """Tokens guessed ahead (speculation)."""
    accepted_tokens: int = 0
    """Of these, how many the model agreed with."""


@dataclass(frozen=True)
class Chunk:
    """A piece of the stream. `text` is a delta of whole characters; a chunk may carry only counts or prefill progress.

    The last chunk, and only it, has a `finish_reason` and `timings`. No chunk comes after it.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    """In the first chunk and the last: length of the whole prompt."""
    completion_tokens: int = 0
    """Generated so far, this chunk included."""
    prefill_done: int = 0
    """While the prompt is being computed: tokens done so far (cached ones included)."""
    timings: Timings | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """The next part of the prompt's tokens, from its second one on: nothing stands before the first."""
    queue_position: int | None = None
    """While waiting for a place: how many stand in front; 0 is the next."""


@dataclass(frozen=True)
class EngineStats:
    """What an engine does now, and has done since its model was loaded (restarts of its process included)."""

    busy_sequences: int = 0
    """Requests that have a place in the batch."""
    parallel: int = 1
    """How many may."""
    waiting: int = 0
    max_queue: int = 0
    cells: int = 0
    """Places for tokens in the context's cache."""
    cells_used: int = 0
    cached_sequences: int = 0
    """Finished sequences kept in cells."""
    spilled_sequences: int = 0
    """Finished sequences kept in main memory."""
    spilled_bytes: int = 0
    memory_bytes: int = 0
    """Resident memory of the engine."""
    threads: int = 0
    """Threads of the last step."""
    prompt_tokens: int = 0
    """Computed. Of this field and those below: totals."""
    reused_tokens: int = 0
    generated_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    queue_seconds: float = 0.0
    steps: int = 0
    cache_hits_cells: int = 0
    """Requests that found a prefix in cells, in main memory, nowhere."""
    cache_hits_memory: int = 0
    cache_misses: int = 0
    evictions: int = 0
    preemptions: int = 0
    finished: Mapping[str, int] = field(default_factory=dict)
    """Requests that ended, by finish reason, or "error"."""
    restarts: int = 0


class Backend(Protocol):
    """A loaded model. Methods may be called from any thread.

    `features` (ask these, never the class): "parallel" (many generate() at once), "grammar", "logprobs" (of the prompt too), "generate"
    (it writes text: all but models for embeddings do), "text-only" (its chunks carry no token ids), "estimate" (its tokens are made up,
    for counting only); each of the following with the methods of that name's protocol below:
    "images", "adapters", "prefill", "embeddings", "stats".
    """

    name: str
    context_length: int
    chat_template: str | None
    bos_token: str
    eos_token: str
    features: frozenset[str]

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Token ids of `text`; special tokens in it are recognised. A BOS is never doubled."""
        ...

    def decode(self, tokens: list[int] | tuple[int, ...]) -> str:
        """Text of `tokens`, special tokens included."""
        ...

    def generate(self, request: GenerationRequest) -> Iterator[Chunk]:
        """Generate. Closing the iterator, from its own thread, or `request.cancel`, from any, frees the place within one step.

        Raises PromptTooLong before the first chunk; EngineDied at any time.
        """
        ...

    def alive(self) -> bool:
        """Whether the engine can be expected to answer."""
        ...

    def memory(self) -> int:
        """Bytes of main memory in use by the engine; 0 when not known."""
        ...

    def unload(self) -> None:
        """Free everything. Running generations end with EngineDied. A second call does nothing."""
        ...


class Prefilling(Protocol):
    """What a backend with "prefill" has besides."""

    def prefill(self, request: GenerationRequest) -> None:
        """Compute the prompt into the cache while nobody else computes; returns when done, given way for good, or cancelled.

        Never raises Busy: under load it does nothing. Raises PromptTooLong, EngineDied.
        """
        ...


class Adapting(Protocol):
    """What a backend with "adapters" has besides. Requests name adapters by path; one that is not loaded is loaded first."""

    def load_adapter(self, path: Path) -> None:
        """Raises ModelError when it does not fit the model. A second call does nothing."""
        ...

    def unload_adapter(self, path: Path) -> None:
        """Free it. Raises Busy while a request uses it; one that is not loaded is no error."""
        ...

    @property
    def adapters(self) -> tuple[Path, ...]:
        """Those loaded."""
        ...


class Embedding(Protocol):
    """What a backend with "embeddings" has besides."""

    def embed(self, texts: Sequence[str | tuple[int, ...]], cancel: CancelToken) -> Embeddings:
        """Pooled as the model says (mean where it does not), of length 1. Raises PromptTooLong naming the text, Busy, EngineDied."""
        ...


class Seeing(Protocol):
    """What a backend with "images" has besides."""

    image_marker: str
    """Stands in a prompt where an image belongs. Made up at each load, so that no text from outside can hold it."""


class Measured(Protocol):
    """What a backend with "stats" has besides."""

    def stats(self) -> EngineStats:
        """Now; at most a second old. Never waits for the engine."""
        ...


def adapters_of(backend: Backend, wanted: Sequence[Adapter]) -> tuple[Adapter, ...]:
    """Those of `wanted` that `backend` has loaded."""
    loaded = cast(Adapting, backend).adapters if "adapters" in backend.features else ()
    return tuple(adapter for adapter in wanted if adapter.path.resolve() in loaded)


@dataclass(frozen=True)
class Embeddings:
    """Vectors of some texts, and how many tokens these had together."""

    vectors: tuple[tuple[float, ...], ...]
    tokens: int


@dataclass(frozen=True)
class Loader:
    """How one engine is found, configured and started. Costs nothing until `load` is called."""

    name: str
    options: type[Options]
    detect: Callable[[Path], bool]
    """Whether this loader is for that file or folder; looks at names and headers only."""
    load: Callable[[Path, Options, Progress, CancelToken], Backend]
    """Imports the engine and loads. Raises ModelError with the fix; returns promptly with ModelError once cancelled."""
    samplers: frozenset[str]
    """Names of the SamplingParams fields that this engine honours."""
    package: str = ""
    """Import name of the package needed; empty when none."""
    inspected: bool = False
    """Whether `inspect_model` reads its models, so that a broken one is refused before anything is done for it."""
    own_process: bool = False
    """Whether its models have a process of their own, so that `Backend.memory` is all that a model takes."""
    elsewhere: bool = False
    """Whether its models run on another server: none here has to go for one."""
    info: Mapping[str, str] = field(default_factory=dict)
    """A few words each for the documentation."""
