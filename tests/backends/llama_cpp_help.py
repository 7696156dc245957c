"""What the tests of the llama.cpp engine share: small backends, requests, threads that tell what happened in them, and waiting for a condition."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from modules.backends.base import CancelToken, Chunk, GenerationRequest, TokenLogprob
from modules.backends.llama_cpp import LOADER
from modules.backends.llama_cpp.client import LlamaCppBackend
from modules.samplers import NEUTRAL, SamplingParams
from modules.system import is_alive

GREEDY = NEUTRAL.replace({"temperature": 0})
ENDLESS = GREEDY.replace({"ban_eos_token": True})
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
OPTIONS = {"ctx_size": 2048, "threads": 1, "threads_batch": 1, "cache_ram": 64}
SECONDS = 60.0
"""After which a test says that something hangs. Nothing that works takes so long."""
NEAR, NEAR_IN_STARTER = 0.1, 0.6
"""Two candidates whose logits are nearer than that may change places when the batch is another one: with flash attention, 64 tokens and more at once
are computed in another way than fewer. The starter's 4-bit weights, multiplied with 8-bit numbers, make up to 0.5 of it, the tiny models 0.03."""


def dice(tokens: Sequence[int]) -> tuple[tuple[int, float], ...]:
    """A bias that leaves `tokens` only, each as likely: draws then depend on the seed alone, not on how a batch rounds."""
    return tuple((token, 1e9) for token in tokens)


def load(
    path: Path, progress: Callable[[float, str], None] = lambda _fraction, _words: None, cancel: CancelToken | None = None, **values
) -> LlamaCppBackend:
    backend = LOADER.load(path, LOADER.options.build({**OPTIONS, **values}), progress, cancel or CancelToken())
    assert isinstance(backend, LlamaCppBackend)
    return backend


def request(prompt: str | Sequence[int], sampling: SamplingParams = GREEDY, **values) -> GenerationRequest:
    return GenerationRequest(prompt if isinstance(prompt, str) else tuple(prompt), sampling, **{"max_new_tokens": 24, **values})


def run(backend: LlamaCppBackend, prompt: str | Sequence[int], sampling: SamplingParams = GREEDY, **values) -> list[Chunk]:
    return list(backend.generate(request(prompt, sampling, **values)))


def text_of(chunks: Iterable[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def tokens_of(chunks: Iterable[Chunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def logprobs_of(chunks: Iterable[Chunk]) -> list[TokenLogprob]:
    return [entry for chunk in chunks for entry in chunk.logprobs]


def of_prompt(chunks: Iterable[Chunk]) -> list[TokenLogprob]:
    return [entry for chunk in chunks for entry in chunk.prompt_logprobs]


def reused(chunks: Sequence[Chunk]) -> int:
    return chunks[-1].timings.reused_tokens


def differ(wanted: Sequence[Chunk], got: Sequence[Chunk], near: float = NEAR) -> str:
    """What is wrong when two greedy replies are not the same; empty when nothing is.

    `wanted` must have been asked with `logprobs` of 2 or more: where its two best were nearer than `near`, either may follow, and all after it.
    """
    ours, theirs = tokens_of(wanted), tokens_of(got)
    for place, entry in enumerate(logprobs_of(wanted)):
        if place >= len(theirs) or ours[place] != theirs[place]:
            (_, _, best), (_, _, second) = entry.top[:2]
            return "" if best - second < near else f"token {place}: {ours[place : place + 3]} was wanted and {theirs[place : place + 3]} came"
    return "" if len(ours) == len(theirs) else f"{len(ours)} tokens were wanted and {len(theirs)} came"


class Task(threading.Thread):
    """Runs `work` in a thread of its own. `result` waits for it, and raises what it raised."""

    def __init__(self, work: Callable[..., Any], *args: Any, **values: Any) -> None:
        super().__init__(daemon=True)
        self._work = functools.partial(work, *args, **values)
        self._found: Any = None
        self.error: BaseException | None = None
        self.started_at = time.monotonic()
        self.ended_at = 0.0
        self.start()

    def run(self) -> None:
        try:
            self._found = self._work()
        except BaseException as error:  # noqa: BLE001  # raised again by `result`
            self.error = error
        self.ended_at = time.monotonic()

    def result(self, seconds: float = SECONDS) -> Any:
        self.join(seconds)
        assert not self.is_alive(), f"still at work after {seconds} seconds"
        if self.error:
            raise self.error
        return self._found


class Stream:
    """A reply that is read in a thread of its own; chunks are kept with the time at which they came."""

    def __init__(self, backend: LlamaCppBackend, asked: GenerationRequest) -> None:
        self.chunks: list[Chunk] = []
        self.times: list[float] = []
        self.asked = asked
        self.task = Task(self._read, backend)

    def _read(self, backend: LlamaCppBackend) -> None:
        for chunk in backend.generate(self.asked):
            self.times.append(time.monotonic())
            self.chunks.append(chunk)

    def until(self, wanted: Callable[[Chunk], bool]) -> Stream:
        """Wait for a chunk that is wanted."""
        wait_for(lambda: any(map(wanted, list(self.chunks))) or not self.task.is_alive())
        assert any(map(wanted, self.chunks)), f"ended without it: {self.task.error or self.chunks[-1:]}"
        return self

    def writes(self) -> Stream:
        """Wait for its first token."""
        return self.until(lambda chunk: bool(chunk.token_ids))

    def waits(self) -> Stream:
        """Wait until it is told that it has to wait."""
        return self.until(lambda chunk: chunk.queue_position is not None)

    def result(self) -> list[Chunk]:
        """All chunks, once it has ended."""
        self.task.result()
        return self.chunks

    def stop(self) -> list[Chunk]:
        """Cancel it, and all its chunks."""
        self.asked.cancel.cancel()
        return self.result()

    @property
    def first_token(self) -> float:
        """When its first token came."""
        return next(at for at, chunk in zip(self.times, self.chunks, strict=False) if chunk.token_ids)


def wait_for(condition: Callable[[], Any], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """Whether the process ends, and is reaped, within a bounded time."""
    deadline = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False
