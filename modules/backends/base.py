"""What an engine is: GenerationRequest in, Chunks out. One stream for the page, the API and the notebook.

Nothing here knows a chat, a template or a stop string's meaning; `text_generation.py` does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

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
    """One generation. `prompt` is text (special tokens are recognised, BOS by `sampling.add_bos_token`) or exact token ids."""

    prompt: str | tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int | None = None
    """At most so many new tokens; None: until the context is full."""
    seed: int = 0
    """0 ≤ seed < 2³²; the caller resolves "random" before, so that the reply can be repeated."""
    stop: tuple[str, ...] = ()
    """Applied to text by `text_generation`; a backend ignores them."""
    images: tuple[bytes, ...] = ()
    adapters: tuple[Adapter, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, value added to its logit); −inf bans the token."""
    logprobs: int = 0
    """How many alternatives to report for each token; 0: none."""
    cancel: CancelToken = field(default_factory=CancelToken, compare=False)


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability (natural) of a chosen token before samplers, and the `top` alternatives, best first."""

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


class Backend(Protocol):
    """A loaded model. Methods may be called from any thread.

    `features` (ask these, never the class): "parallel" (many generate() at once), "grammar", "logprobs", "images", "adapters",
    "prefill", "embeddings".
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
    info: Mapping[str, str] = field(default_factory=dict)
    """A few words each for the documentation."""
