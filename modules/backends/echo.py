"""Echo: a backend that speaks from a script instead of a model, so that the page, the API and the tests run without weights.

As a loader it takes text files that end in `.echo`: their text is every reply, word by word; an empty file repeats the prompt.
Its tokens are the bytes of UTF-8. The probabilities it tells are made up: the same for a byte wherever it stands.
"""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import cast

from modules.backends.base import Backend, CancelToken, Chunk, FinishReason, GenerationRequest, Loader, Progress, Timings, TokenLogprob
from modules.errors import EngineDied, ModelError, NoModel, PromptError, PromptTooLong
from modules.options import Options, knob

Script = Callable[[GenerationRequest], Iterable[str]]


class EchoOptions(Options):
    """Options of the echo loader."""

    word_delay: float = knob(0.02, "Seconds between two words.", range=(0, 1, 0.01), bounds=(0, 60), group="Echo", flag=False)


class EchoBackend:
    """Satisfies `Backend`. `script` gives the pieces of the reply; it may wait (best on `request.cancel`) and may raise."""

    def __init__(self, script: Script, name: str = "echo", context_length: int = 4096, chat_template: str | None = None) -> None:
        self.name = name
        self.context_length = context_length
        self.chat_template = chat_template
        self.bos_token = self.eos_token = ""
        self.features: frozenset[str] = frozenset({"generate", "parallel", "logprobs"})
        self._script = script
        self._unloaded = False

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """The bytes of `text`; there is no BOS."""
        return list(text.encode("utf-8", "replace"))

    def decode(self, tokens: list[int] | tuple[int, ...]) -> str:
        """Text of bytes. Raises PromptError for a number that is none."""
        try:
            return bytes(tokens).decode("utf-8", "replace")
        except ValueError:
            raise PromptError("There are tokens in this that are no bytes: echo's tokens are 0 to 255.") from None

    def generate(self, request: GenerationRequest) -> Iterator[Chunk]:
        """See `Backend.generate`."""
        asked = self.encode(request.prompt) if isinstance(request.prompt, str) else self.encode(self.decode(request.prompt))
        prompt = len(asked)
        if prompt > self.context_length:
            raise PromptTooLong(f"The prompt has {prompt} tokens and the context holds {self.context_length}. Shorten it.")
        room = self.context_length - prompt
        limit = room if request.max_new_tokens is None else min(room, request.max_new_tokens)
        yield Chunk(prompt_tokens=prompt, prefill_done=prompt, prompt_logprobs=_of_prompt(asked, request.prompt_logprobs))
        text = codecs.getincrementaldecoder("utf-8")("replace")
        done = 0
        for piece in self._pieces(request):
            data = piece[: limit - done]
            done += len(data)
            if data:
                yield Chunk(text.decode(data), tuple(data), completion_tokens=done, logprobs=_of_reply(data, request))
            if len(data) < len(piece) or request.cancel.cancelled:
                break
        reason: FinishReason = "cancelled" if request.cancel.cancelled else "length" if done >= limit else "stop"
        timings = Timings(prefill_tokens=prompt)
        yield Chunk(text.decode(b"", True), (), reason, prompt_tokens=prompt, completion_tokens=done, timings=timings)

    def _pieces(self, request: GenerationRequest) -> Iterator[bytes]:
        if self._unloaded:
            raise NoModel("The model was unloaded. Load it again on the Model tab.")
        for piece in self._script(request):
            if self._unloaded:
                raise EngineDied("The model was unloaded during this. Load it again on the Model tab and send again.")
            if request.cancel.cancelled:
                return
            yield piece.encode("utf-8", "replace")

    def alive(self) -> bool:
        """Until `unload`."""
        return not self._unloaded

    def memory(self) -> int:
        """Not known."""
        return 0

    def unload(self) -> None:
        """Running generations end with EngineDied."""
        self._unloaded = True


def _of_prompt(tokens: list[int], alternatives: int | None) -> tuple[TokenLogprob, ...]:
    return () if alternatives is None else tuple(_logprob(token, alternatives) for token in tokens[1:])


def _of_reply(data: bytes, request: GenerationRequest) -> tuple[TokenLogprob, ...]:
    if request.logprobs:
        return tuple(_logprob(byte, request.logprobs) for byte in data)
    return tuple(TokenLogprob(byte, "", _probabilities(byte)[byte]) for byte in data) if request.chosen_logprob else ()


def _logprob(byte: int, alternatives: int) -> TokenLogprob:
    known = _probabilities(byte)
    best = sorted(known, key=lambda other: -known[other])[:alternatives]
    return TokenLogprob(byte, _shown(byte), known[byte], tuple((other, _shown(other), known[other]) for other in best))


def _probabilities(byte: int) -> dict[int, float]:
    """Log-probabilities of `byte` and 25 letters: its own between 1 and 98 %, each of the others half of the one before."""
    own = 0.01 + 0.97 * (byte * 37 % 64) / 63
    letters = [97 + (byte + place) % 26 for place in range(26)]
    others = [letter for letter in letters if letter != byte][:25]
    return {byte: math.log(own)} | {letter: math.log((1 - own) / 2**place) for place, letter in enumerate(others, 1)}


def _shown(byte: int) -> str:
    return bytes([byte]).decode("utf-8", "replace")


def words(text: str, delay: float = 0.0) -> Script:
    """A script that says `text` word by word, or the prompt's own words if `text` is empty; cancelling ends a delay."""

    def script(request: GenerationRequest) -> Iterator[str]:
        prompt = request.prompt if isinstance(request.prompt, str) else bytes(request.prompt).decode("utf-8", "replace")
        for word in re.findall(r"\s*\S+|\s+$", text or prompt):
            if delay and request.cancel.wait(delay):
                return
            yield word

    return script


def _load(path: Path, options: Options, progress: Progress, cancel: CancelToken) -> Backend:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"Cannot read {path.name}: {error}. An echo model is a text file in UTF-8.") from None
    progress(1.0, "Loaded")
    return EchoBackend(words(text.strip("\n"), cast(EchoOptions, options).word_delay), path.stem)


LOADER = Loader(
    name="echo",
    options=EchoOptions,
    detect=lambda path: path.suffix.lower() == ".echo" and path.is_file(),
    load=_load,
    samplers=frozenset({"max_new_tokens", "auto_max_new_tokens", "truncation_length", "custom_stopping_strings", "max_tokens_second"}),
)
