"""generate_reply: the centre. One request in, Chunks of raw text out, whoever asks; and its split into answer and thinking."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from modules.app import App
from modules.backends.base import Backend, Chunk, GenerationRequest, TokenLogprob
from modules.log import logger
from modules.replies import Piece
from modules.streams import ReplyStream, StopStrings, token_places


def generate_reply(app: App, request: GenerationRequest) -> Iterator[Chunk]:
    """Raw text of one generation. Takes the lock, or a place in the engine's batch.

    Close it on its own thread or set `request.cancel` from any: the place is free within one step. Stop strings are not applied here.
    Raises NoModel, Busy, PromptTooLong, EngineDied.
    """
    with app.metrics.generation() as measure, app.models.turn(request.cancel, request.model) as backend:
        measure.admitted()
        if backend is None:
            yield Chunk(finish_reason="cancelled")
            return
        if app.settings.verbose:
            _log_request(request, backend)
        began, last, prompt_tokens = time.monotonic(), Chunk(), 0
        stream = backend.generate(request)
        try:
            for last in _paced(stream, request):
                measure.seen(last)
                prompt_tokens = max(prompt_tokens, last.prompt_tokens)
                yield last
        finally:
            _close(stream)
            _log_result(replace(last, prompt_tokens=prompt_tokens), time.monotonic() - began, backend.context_length, request.seed)


def split_reply(
    chunks: Iterator[Chunk], request: GenerationRequest, prompt: str, text: str = "", reasoning: str = "", names: Sequence[str] = ()
) -> Iterator[Piece]:
    """Answer and thinking apart, up to the first of `request.stop` in the answer.

    `prompt`: text that the reply continues; `text` and `reasoning`: what the message already has. `names`: see `NamePrefix`.
    """
    splitter, thought, tokens = ReplyStream(request.stop, prompt, text, reasoning, names), 0, _Tokens()
    for chunk in chunks:
        stopped = splitter.stopped  # after a stop string only the counts of what was under way are of interest
        deltas = [] if stopped else splitter.feed(chunk.text)
        if splitter.stopped and not stopped:
            request.cancel.cancel()
        if chunk.finish_reason:
            deltas += splitter.finish()
            chunk = replace(chunk, finish_reason="stop") if splitter.stopped else chunk  # noqa: PLW2901
        chunk, places = tokens.told(chunk, splitter, stopped)  # noqa: PLW2901
        reasoning = "".join(d.reasoning for d in deltas)
        thought = chunk.completion_tokens if reasoning else thought
        stop = splitter.matched if chunk.finish_reason else ""
        yield Piece("".join(d.text for d in deltas), reasoning, chunk, thought, stop=stop, places=places)


def raw_reply(chunks: Iterator[Chunk], request: GenerationRequest) -> Iterator[Piece]:
    """The text as it is, thinking and all, up to the first of `request.stop`."""
    stops, tokens = StopStrings(request.stop), _Tokens()
    for chunk in chunks:
        stopped = stops.stopped
        text = "" if stopped else stops.feed(chunk.text)
        if stops.stopped and not stopped:
            request.cancel.cancel()
        if chunk.finish_reason:
            text += stops.finish()
            chunk = replace(chunk, finish_reason="stop") if stops.stopped else chunk  # noqa: PLW2901
        chunk, places = tokens.told(chunk, stops, stopped)  # noqa: PLW2901
        yield Piece(text, chunk=chunk, stop=stops.matched if chunk.finish_reason else "", places=places)


class _Tokens:
    """Log-probabilities are told with the text that their tokens begin in: none of a token that begins in a stop string or after it."""

    def __init__(self) -> None:
        self._length = 0  # of the raw text so far
        self._held: list[tuple[int, TokenLogprob]] = []

    def told(self, chunk: Chunk, stops: StopStrings | ReplyStream, stopped: bool) -> tuple[Chunk, tuple[int, ...]]:
        """`chunk` with what is to be told now, and the places of that. `stopped`: `stops` did not take in its text any more."""
        if stopped:
            return (replace(chunk, logprobs=()) if chunk.logprobs else chunk), ()
        places = token_places(chunk.text, [each.text for each in chunk.logprobs]) if chunk.logprobs else []
        self._held += [(self._length + place, each) for place, each in zip(places, chunk.logprobs, strict=True)]
        self._length += len(chunk.text)
        if not self._held:
            return chunk, ()
        ended = chunk.finish_reason and not stops.stopped
        count = len(self._held) if ended else sum(place < self._length - stops.withheld for place, _ in self._held)
        now, self._held = self._held[:count], self._held[count:]
        return replace(chunk, logprobs=tuple(each for _, each in now)), tuple(place for place, _ in now)


def encode(app: App, text: str, add_bos: bool = False) -> list[int]:
    """Token ids of `text` for the model in use. Raises NoModel."""
    return app.models.backend.encode(text, add_bos)


def decode(app: App, tokens: list[int]) -> str:
    """Text of `tokens` for the model in use. Raises NoModel."""
    return app.models.backend.decode(tokens)


def _close(stream: Iterator[Chunk]) -> None:
    close = getattr(stream, "close", None)
    if close:
        close()


def _paced(stream: Iterator[Chunk], request: GenerationRequest) -> Iterator[Chunk]:
    """No faster than `max_tokens_second`."""
    limit = request.sampling.max_tokens_second
    began: float | None = None
    for chunk in stream:
        yield chunk
        if limit and chunk.completion_tokens:
            began = began or time.monotonic()
            request.cancel.wait(max(0.0, began + chunk.completion_tokens / limit - time.monotonic()))


def _log_request(request: GenerationRequest, backend: Backend) -> None:
    prompt = request.prompt if isinstance(request.prompt, str) else backend.decode(request.prompt)
    logger.info("Prompt:\n%s", prompt)
    logger.info("Parameters: %s, stop %s, seed %d", request.sampling.differences() or "defaults", list(request.stop), request.seed)


def _log_result(last: Chunk, seconds: float, context_length: int, seed: int) -> None:
    decoding = (last.timings and last.timings.decode_seconds) or seconds  # without the prompt, where the engine tells
    speed = max(0, last.completion_tokens - 1) / decoding if decoding else 0.0
    timings = last.timings
    if timings and timings.draft_tokens:
        share = 100 * timings.accepted_tokens / timings.draft_tokens
        logger.info("Guessed ahead: %d of %d tokens were right (%.0f %%)", timings.accepted_tokens, timings.draft_tokens, share)
    logger.info(
        "Output generated in %.2f s (%.2f tokens/s, %d tokens, context %d of %d, seed %d, %s)",
        seconds,
        speed,
        last.completion_tokens,
        min(last.prompt_tokens + last.completion_tokens, context_length),  # the last token of a full context is not computed
        context_length,
        seed,
        last.finish_reason or "cut off",
    )
