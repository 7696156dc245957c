"""From a `generate` or `prefill` frame to a job, and from a job's tokens to frames. Engine process only."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from modules.backends.llama_cpp.chain import Chain
from modules.backends.llama_cpp.json_schema import grammar_of
from modules.backends.llama_cpp.model import Model
from modules.backends.llama_cpp.protocol import Frame, unpack_images, unpack_tokens
from modules.backends.llama_cpp.scheduler import LOW, NORMAL, Job
from modules.errors import ModelError, PromptError, PromptTooLong, SettingsError, UserError

MAX_SCHEMA = 256 * 1024
MAX_REPETITIONS = 2000
"""Of one thing in a JSON schema."""
TELL_SECONDS = 0.015
"""Between two chunks of one reply. Tokens that come faster go together: each chunk costs the server's process a piece of a core that, on a small
machine, the engine's threads are waiting for."""
MAX_ALTERNATIVES = 1000
"""Reported for one token at most."""
Send = Callable[[Frame], None]


def make_job(frame: Frame, model: Model, send: Send) -> Job:
    """The job of a frame, not ready yet: see `prepare`."""
    fields = frame.fields
    low = frame.kind == "prefill"
    return Job(
        frame.id,
        Speaker(frame.id, fields, model, send),
        client=fields["client"],
        priority=LOW if low else NORMAL,
        key=adapters_key(fields["adapters"]),
        limit=0 if low else fields["max_new"],
        reads_probabilities=fields["prompt_logprobs"] is not None,
    )


def adapters_key(adapters: Sequence[Sequence[Any]]) -> tuple[tuple[str, float], ...] | None:
    """What a cache computed with these adapters may be shared by; None without any."""
    return tuple(sorted((str(path), float(scale)) for path, scale in adapters if scale)) or None


def prepare(job: Job, frame: Frame, model: Model) -> None:
    """Read the prompt and make the samplers, on a thread that does not compute. Raises UserError for what cannot be done."""
    fields = frame.fields
    if not model.has_adapters(job.key):
        raise ModelError("An adapter of this request is not loaded any more. Send it again.")
    positions: Sequence[int] | None = None
    images: Sequence[Any] = ()
    if fields["images"]:
        text, pictures = unpack_images(frame.raw, fields["images"])
        if model.vision is None:
            raise ModelError("This model cannot see images. Load it with its --mmproj file, or send the message without images.")
        read = model.vision.read(text, pictures, fields["add_bos"])
        tokens, positions, images = read.tokens, read.positions, read.segments
        job.images = images  # from here on the job frees them
        check_length(model, len(tokens))
        check_images(model, tokens, images)
        for image in images:
            if not job.cancelled:
                model.vision.encode(image)
    else:
        tokens = model.tokenize(frame.raw, fields["add_bos"]) if fields["text"] else unpack_tokens(frame.raw)
        check_tokens(model, tokens)
    check_length(model, len(tokens))
    job.ask(tokens, positions, images)
    if job.priority == NORMAL:
        assert isinstance(job.voice, Speaker)
        job.voice.chain = chain = model.chain(_with_schema(fields["plan"], fields["json_schema"]))
        chain.accept_prompt([token for token in tokens if token >= 0])


def _with_schema(plan: Sequence[Sequence[Any]], schema: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The plan of samplers with a JSON schema as its grammar. Raises SettingsError for one that cannot be followed."""
    stages: list[tuple[str, Mapping[str, Any]]] = [(name, args) for name, args in plan]
    if not schema:
        return stages
    if any(name == "grammar" for name, _ in stages):
        raise SettingsError("A grammar and a JSON schema cannot both be followed. Leave one out.")
    if len(schema) > MAX_SCHEMA:
        raise SettingsError(f"The JSON schema has {len(schema)} characters; at most {MAX_SCHEMA} are read. Make it smaller.")
    try:
        parsed = json.loads(schema)
        _check_counts(parsed)
        grammar = grammar_of(parsed)
    except SettingsError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever a hostile schema leads to
        raise SettingsError(f"The JSON schema cannot be used: {str(error)[:200] or type(error).__name__}. Correct or simplify it.") from None
    return [("grammar", {"text": grammar}), *stages]


def _check_counts(schema: Any) -> None:
    """Refuse counts that would be written out as so many copies: minItems, maxLength, and {n,m} in patterns."""
    todo = [schema]
    while todo:
        part = todo.pop()
        if isinstance(part, dict):
            todo += part.values()
            counts = [part.get(name) for name in ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")]
            counts += [int(number) for number in re.findall(r"[{,]\s*(\d{1,18})", str(part.get("pattern", "")))]
            too_many = next((count for count in counts if isinstance(count, int | float) and count > MAX_REPETITIONS), None)
            if too_many is not None:
                raise SettingsError(f"The JSON schema counts to {too_many}; at most {MAX_REPETITIONS} can be enforced. Lower it or leave it out.")
        elif isinstance(part, list):
            todo += part


def check_length(model: Model, length: int) -> None:
    """Raise PromptError or PromptTooLong for a prompt of so many tokens."""
    if not length:
        raise PromptError("The prompt is empty. Write something first.")
    if length > model.context_length:
        raise PromptTooLong(
            f"The prompt has {length} tokens and the context holds {model.context_length}. Shorten it, or load the model with a larger --ctx-size."
        )


def check_images(model: Model, tokens: Sequence[int], images: Sequence[Any]) -> None:
    """Raise PromptError for images that cannot be computed where they stand."""
    if tokens[-1] < 0:
        raise PromptError("The prompt ends with an image. Write something after it.")
    longest = model.longest_image
    for image in images:
        if image.non_causal and image.length > longest:
            raise PromptError(
                f"An image takes {image.length} tokens, which this model must compute at once, and {longest} can be. "
                f"Load the model with --batch-size and --ubatch-size {image.length} or more."
            )


def check_tokens(model: Model, tokens: Sequence[int]) -> None:
    """Raise PromptError when a token id is not in the vocabulary."""
    unknown = model.first_unknown(tokens)
    if unknown is not None:
        raise PromptError(f"There is no token {unknown} in this model: its tokens are 0 to {model.vocabulary.size - 1}.")


def error_frame(id: int, error: UserError) -> Frame:
    """The `error` frame that says `error`."""
    fields: dict[str, Any] = {"kind": error.code, "message": str(error)}
    retry_after = getattr(error, "retry_after", None)
    return Frame("error", id, fields if retry_after is None else {**fields, "retry_after": retry_after})


class Speaker:
    """A job's voice: samples with the native chain, turns tokens into text, sends frames. Every job ends with one `end` or `error` frame."""

    def __init__(self, id: int, fields: Mapping[str, Any], model: Model, send: Send) -> None:
        self.chain: Chain | None = None
        self._id = id
        self._model = model
        self._send = send
        self._special: bool = fields["special"]
        self._logprobs = min(fields["logprobs"], MAX_ALTERNATIVES)
        self._chosen_logprob: bool = fields.get("chosen_logprob", False)
        self._prompt_logprobs = min(fields["prompt_logprobs"] or 0, MAX_ALTERNATIVES)
        self._told = 0  # of the prompt's tokens, those whose log-probabilities were sent
        self._tokens: list[int] = []  # chosen and not told yet
        self._found: list[list[Any]] = []  # their log-probabilities
        self._told_at = 0.0
        self._text = codecs.getincrementaldecoder("utf-8")("replace")  # holds back the bytes of an unfinished character

    def choose(self, output: int) -> int | None:
        """See `Voice.choose`."""
        assert self.chain
        before = self._model.logprobs(output) if self._logprobs else None
        token = self._model.sample(self.chain, output)
        if token is None or token in self._model.ends:
            return None
        if before is not None:
            self._found.append(self._alternatives(before, token, self._logprobs))
        elif self._chosen_logprob:
            self._found.append([token, "", round(self._model.logprob(output, token), 6), []])
        return token

    def wrote(self, job: Job, tokens: Sequence[int]) -> None:
        """See `Voice.wrote`."""
        self._tokens += tokens
        if job.last_token - self._told_at >= TELL_SECONDS:
            self._told_at = job.last_token
            self._tell(job)

    def _tell(self, job: Job) -> None:
        fields: dict[str, Any] = {"tokens": self._tokens, "done": job.done}
        if self._found:
            fields["logprobs"], self._found = self._found, []
        text = "".join([self._text.decode(self._model.piece(token, self._special)) for token in self._tokens])
        self._tokens = []
        self._send(Frame("chunk", self._id, fields, text.encode()))

    def read(self, job: Job, outputs: range) -> None:
        """See `Voice.read`."""
        fields: dict[str, Any] = {"prompt": job.prompt, "prefill": min(job.computed, job.prompt)}
        if outputs:
            fields["prompt_logprobs"] = self._of_prompt(job, outputs)
        self._send(Frame("chunk", self._id, fields))

    def _of_prompt(self, job: Job, outputs: range) -> list[list[Any]]:
        """An output tells the probabilities of the token after it."""
        end = min(job.computed, job.prompt - 1)
        first = max(job.computed - len(outputs), self._told)  # a job that gave way reads its prompt again
        self._told = max(end, self._told)
        places = range(first, end)
        logprobs = (self._model.logprobs(outputs[place - job.computed]) for place in places)
        return [self._alternatives(found, int(job.tokens[place + 1]), self._prompt_logprobs) for place, found in zip(places, logprobs, strict=True)]

    def waits(self, position: int) -> None:
        """See `Voice.waits`."""
        self._send(Frame("chunk", self._id, {"queue": position}))

    def ended(self, job: Job, reason: str) -> None:
        """See `Voice.ended`."""
        if self._tokens:
            self._tell(job)
        self._close(job)
        fields = {"reason": reason, "prompt": job.prompt, "done": job.done, "timings": job.timings()}
        self._send(Frame("end", self._id, fields, self._text.decode(b"", True).encode()))

    def failed(self, job: Job, error: UserError) -> None:
        """See `Voice.failed`."""
        if self._tokens:
            self._tell(job)
        self._close(job)
        self._send(error_frame(self._id, error))

    def _close(self, job: Job) -> None:
        for image in job.images:
            image.close()
        if self.chain:
            self.chain.close()
            self.chain = None

    def _alternatives(self, logprobs: np.ndarray, token: int, count: int) -> list[Any]:
        """[token, text, log-probability, [[token, text, log-probability], …]], best first."""
        count = min(count, len(logprobs))
        best = np.argpartition(logprobs, -count)[-count:] if count else np.zeros(0, np.int64)
        best = best[np.argsort(-logprobs[best], kind="stable")]
        return [*self._described(token, logprobs), [self._described(int(other), logprobs) for other in best]]

    def _described(self, token: int, logprobs: np.ndarray) -> list[Any]:
        return [token, self._model.piece(token, special=True).decode("utf-8", "replace"), float(logprobs[token])]
