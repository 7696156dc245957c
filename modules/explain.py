"""What explains a reply, kept beside its message: the exact prompt, and every token with its log-probability; and what is needed to ask again.

A prompt is kept without the texts that stand elsewhere, so that a chat's file grows with its messages and not with their square: as the
beginning of an earlier prompt of the same branch (its base), slices of message texts, and literal text for the rest (a template's frames). All
references go up the branch and are counted in messages, not named by ids: above a message nothing is ever changed or taken away (a message's
text only grows, at its end), and a copied branch keeps its explanations as they are. A check sum tells when the parts do not make the prompt again.

A base has a base itself. Every STRIDE-th prompt of such a chain has the one STRIDE before it as its base, so that each piece is stored twice and a
prompt is put together from n / STRIDE + STRIDE stored ones at most, in a loop.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from modules.backends.base import Adapter, Backend, CancelToken, Chunk, GenerationRequest
from modules.conversation import Message
from modules.errors import DataError, ModelError, NotFound, PromptError
from modules.samplers import NEUTRAL, SamplingParams
from modules.store import Store

STRIDE = 32
NEAREST = 32
"""So many messages up a base is looked for."""
WORTH = 12
"""Characters from which on a text is worth a reference."""
MAX_SEARCHED = 50_000_000
"""Characters looked through for message texts in one prompt; what is not found until then is kept literally."""
MAX_ALTERNATIVES = 100

Stored = Callable[[Sequence[str]], Mapping[str, str]]
"""What `prompt_parts` made for messages, by their ids; those without are left out."""


# --- tokens ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Token:
    """A token of a reply and its natural log-probability before samplers, where the engine told it."""

    id: int
    logprob: float | None = None
    given: bool = False
    """It was not chosen by the model: the reply was made to go on from it."""


class Recorder:
    """Collects a reply's tokens from its chunks. `said` are tokens that the request began with."""

    def __init__(self, said: Sequence[Token] = ()) -> None:
        self._given = len(said)
        self._ids = [token.id for token in said]
        self._logprobs = [token.logprob for token in said]

    def seen(self, chunk: Chunk) -> None:
        """Take the tokens of `chunk`."""
        if not chunk.token_ids:
            return
        told = [entry.logprob for entry in chunk.logprobs]
        self._ids += chunk.token_ids
        self._logprobs += told if len(told) == len(chunk.token_ids) else [None] * len(chunk.token_ids)

    def packed(self) -> bytes:
        """What `unpack` reads."""
        count = len(self._ids)
        raw = struct.pack(f"<{count}i{count}e", *self._ids, *map(_half, self._logprobs))
        small = zlib.compress(raw, 6)
        pays = len(small) < len(raw)
        return _HEAD.pack(_VERSION, pays, self._given, count) + (small if pays else raw)


_HEAD = struct.Struct("<B?II")  # version, whether zlib packed the rest, tokens given, tokens in all; then int32 ids and float16 log-probabilities
_VERSION = 1


def _half(logprob: float | None) -> float:
    """As float16 holds it: three digits, which is enough to see; NaN for one that is not known."""
    if logprob is None or math.isnan(logprob):
        return math.nan
    return max(-60_000.0, min(0.0, logprob))


def unpack(packed: bytes) -> list[Token]:
    """The tokens that a Recorder packed. Raises DataError."""
    try:
        version, is_small, given, count = _HEAD.unpack_from(packed)
        raw = packed[_HEAD.size :]
        if is_small:
            raw = zlib.decompressobj().decompress(raw, 6 * count + 1)
        if version != _VERSION:
            raise ValueError
        values = struct.unpack(f"<{count}i{count}e", raw)
    except (struct.error, zlib.error, ValueError):
        raise DataError("The tokens kept of this reply cannot be read. Regenerate the reply to see its tokens.") from None
    logprobs = (None if math.isnan(value) else value for value in values[count:])
    return [Token(id, logprob, place < given) for place, (id, logprob) in enumerate(zip(values[:count], logprobs, strict=True))]


def token_texts(backend: Backend, ids: Sequence[int]) -> list[str]:
    """The text of each token, as it stands in the middle of a text. Of tokens that are parts of one character the last has it, the others "".

    Asks the backend once for each different token. Raises PromptError for one that it does not have.
    """
    anchor = backend.encode("a")[-1:]  # alone, or at a beginning, some tokenizers leave out a token's leading space
    skipped = len(backend.decode(anchor)) if anchor else 0

    def text(some: Sequence[int]) -> str:
        return backend.decode([*anchor, *some])[skipped:]

    known = {id: text([id]) for id in dict.fromkeys(ids)}
    texts: list[str] = []
    parts: list[int] = []
    for id in ids:
        broken = "\ufffd" in known[id]
        if not broken:
            texts += [*_replacements(parts), known[id]]
            parts = []
            continue
        parts.append(id)
        whole = text(parts)
        if "\ufffd" not in whole:
            texts += [*[""] * (len(parts) - 1), whole]
            parts = []
        elif len(parts) == _LONGEST_CHARACTER:
            texts += _replacements(parts[:1])
            parts = parts[1:]
    return [*texts, *_replacements(parts)]


_LONGEST_CHARACTER = 4
"""Bytes, so tokens."""


def _replacements(parts: Sequence[int]) -> list[str]:
    return ["\ufffd"] * len(parts)


# --- prompts --------------------------------------------------------------------------------------------------------------------------


class _Base(NamedTuple):
    """The beginning of another prompt: of the message so many steps up, the so many-th of its prompts, so many characters."""

    up: int
    which: int
    length: int


class _Slice(NamedTuple):
    """A part of the text (or thinking) of the message so many steps up."""

    up: int
    start: int
    end: int
    thinking: int = 0


class _Check(NamedTuple):
    """Length and CRC-32 of the beginning of a prompt: whether another begins with it is known without putting it together."""

    length: int
    sum: int

    @classmethod
    def of(cls, text: str) -> _Check:
        return cls(len(text), zlib.crc32(text.encode("utf-8", "surrogatepass")))


class _Kept(NamedTuple):
    """One stored prompt."""

    number: int
    """Its place in its chain: more than that of its base."""
    base: _Base | None
    parts: list[str | _Slice]
    """What follows the base."""
    checks: list[_Check]
    """Of the prompt up to its last message text, if there is one, and of the whole prompt."""


def prompt_parts(prompt: str, message: Message, path: Sequence[Message], stored: Stored) -> str:
    """JSON that stands for `prompt`, for which `message` is being written: to be stored beside the message in place of what was there.

    `path` holds the messages above it, as the prompt was made of them. What was kept before (of a message that goes on) stays in it.
    """
    branch = _Branch(message, path, stored)
    earlier: list[_Kept] = []
    number, base = 0, None
    with suppress(DataError):  # what cannot be read any more shall not cost this one
        earlier = branch.kept(0)
        number, base = branch.base_of(prompt)
    rest = prompt[base.length :] if base else prompt
    parts = _parts(rest, branch.line)
    kept = _Kept(number, base, parts, _checks(prompt, parts))
    return _dumped({"v": 1, "prompts": [*earlier, kept]})


def prompt_text(message: Message, path: Sequence[Message], stored: Stored) -> str | None:
    """The prompt that was kept for `message`; None when there is none. `path`: the messages above. Raises DataError when it cannot be had again."""
    branch = _Branch(message, path, stored)
    kept = branch.kept(0)
    return branch.text(0, len(kept) - 1) if kept else None


class _Branch:
    """A message and what stands above it, with what is stored of their prompts."""

    def __init__(self, message: Message, path: Sequence[Message], stored: Stored) -> None:
        self.line = _line(message, path)
        self._stored = stored
        self._known: dict[str, list[_Kept]] = {}

    def kept(self, up: int) -> list[_Kept]:
        """The prompts of the message so many steps up, the newest last. Raises DataError."""
        if up >= len(self.line):
            raise _unreadable()
        self._read([self.line[up].id])
        return self._known[self.line[up].id]

    def _read(self, ids: Sequence[str]) -> None:
        missing = [id for id in ids if id not in self._known]
        found = self._stored(missing) if missing else {}
        for id in missing:
            self._known[id] = _loaded(found[id]) if id in found else []

    def at(self, up: int, which: int) -> _Kept:
        """One of them."""
        kept = self.kept(up)
        if not 0 <= which < len(kept):
            raise _unreadable()
        return kept[which]

    def text(self, up: int, which: int) -> str:
        """The whole prompt, put together from its end back. Raises DataError when it is not what it was."""
        wanted = self.at(up, which)
        pieces: list[str] = []
        end: int | None = None  # so many characters of the prompt at hand are wanted
        number = wanted.number + 1
        while True:
            kept = self.at(up, which)
            if kept.number >= number or (kept.base and (kept.base.up < 0 or kept.base.length < 0)):
                raise _unreadable()  # a chain that goes in a circle
            number = kept.number
            begin = kept.base.length if kept.base else 0
            if end is None or end > begin:
                pieces.append(self._joined(kept.parts, up, None if end is None else end - begin))
                end = begin
            if kept.base is None:
                break
            up, which = up + kept.base.up, kept.base.which
        prompt = "".join(reversed(pieces))
        if _Check.of(prompt) != wanted.checks[-1]:
            raise _unreadable()
        return prompt

    def _joined(self, parts: Sequence[str | _Slice], up: int, length: int | None) -> str:
        texts: list[str] = []
        missing = length
        for part in parts:
            if missing is not None and missing <= 0:
                break
            text = part if isinstance(part, str) else self._slice(part, up)
            texts.append(text)
            missing = None if missing is None else missing - len(text)
        return "".join(texts)[:length]

    def _slice(self, part: _Slice, up: int) -> str:
        if not 0 <= up + part.up < len(self.line):
            raise _unreadable()
        message = self.line[up + part.up]
        return (message.reasoning if part.thinking else message.text)[part.start : part.end]

    def base_of(self, prompt: str) -> tuple[int, _Base | None]:
        """The best base for a new prompt of the message itself, and the new prompt's number."""
        up = self._nearest()
        if up is None:
            return 0, None
        which = len(self.kept(up)) - 1
        kept = self.at(up, which)
        known = (check.length for check in reversed(kept.checks) if check == _Check.of(prompt[: check.length]))
        same = next(known, None) or _common(prompt, self.text(up, which))
        while kept.base and kept.base.length >= same:  # that much it has from its base, too
            up, which, kept = self._below(up, kept.base)
        if same < WORTH:
            return 0, None
        number = kept.number + 1
        if number % STRIDE == 0:
            self.text(up, which)  # raises when it is lost: then this one stands alone, and others on it
            while kept.base and kept.number > number - STRIDE:
                same = min(same, kept.base.length)
                up, which, kept = self._below(up, kept.base)
        return number, _Base(up, which, same)

    def _below(self, up: int, base: _Base) -> tuple[int, int, _Kept]:
        return up + base.up, base.which, self.at(up + base.up, base.which)

    def _nearest(self) -> int | None:
        """How far up the nearest message is that has a prompt; 0 for the message itself."""
        near = [up for up, message in enumerate(self.line[:NEAREST]) if message.role == "assistant"]
        self._read([self.line[up].id for up in near])
        return next((up for up in near if self.kept(up)), None)


def _line(message: Message, path: Sequence[Message]) -> list[Message]:
    """`message`, its parent, and so on up, as far as `path` goes."""
    known = {other.id: other for other in path if other.id}
    line = [message]
    while (above := line[-1].parent) and above in known and len(line) <= len(known):
        line.append(known[above])
    return line


def _common(one: str, other: str) -> int:
    """Length of the common beginning. Each step looks at half of what is left."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _parts(rest: str, line: Sequence[Message]) -> list[str | _Slice]:
    """`rest` in parts: message texts, the newest looked for first and from the end back, and what stands between them."""
    parts: list[str | _Slice] = []
    end = 0
    for start, part in reversed(list(_found(rest, line))):
        parts += [rest[end:start], part] if start > end else [part]
        end = start + part.end - part.start
    return [*parts, rest[end:]] if end < len(rest) else parts


def _found(rest: str, line: Sequence[Message]) -> Iterator[tuple[int, _Slice]]:
    """Where texts of `line` stand in `rest`, from its end back, without overlap. Templates may leave out the blanks around a text."""
    backwards = rest[::-1]  # `find` takes linear time whatever the texts are, which `rfind` does not
    at = searched = 0
    for up, message in enumerate(line):
        if len(rest) - at < WORTH:
            break
        for thinking, text in enumerate((message.text, message.reasoning)):
            wanted = text.strip()
            if not WORTH <= len(wanted) <= len(rest) - at or searched > MAX_SEARCHED or not _storable(wanted):
                continue
            place = backwards.find(wanted[::-1], at)
            searched += (place if place >= 0 else len(rest)) - at + len(wanted)
            if place < 0:
                continue
            at = place + len(wanted)
            start = len(text) - len(text.lstrip())
            yield len(rest) - at, _Slice(up, start, start + len(wanted), thinking)


def _storable(text: str) -> bool:
    """Whether a message keeps this text as it is: lone surrogates are replaced when it is stored."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _checks(prompt: str, parts: Sequence[str | _Slice]) -> list[_Check]:
    whole = _Check.of(prompt)
    if isinstance(parts[-1] if parts else "", str) and any(isinstance(part, _Slice) for part in parts):
        return [_Check.of(prompt[: -len(parts[-1])]), whole]
    return [whole]


def _dumped(values: Any) -> str:
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    return text if _storable(text) else json.dumps(values, separators=(",", ":"))


def _loaded(text: str) -> list[_Kept]:
    try:
        return [_entry(*entry) for entry in _prompts(json.loads(text))]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _unreadable() from None


def _prompts(values: Any) -> Any:
    if values["v"] != 1:
        raise ValueError
    return values["prompts"]


def _entry(number: Any, base: Any, parts: Any, checks: Any) -> _Kept:
    read = [_Check(*map(int, check)) for check in checks]
    if not read:
        raise ValueError
    return _Kept(int(number), _Base(*map(int, base)) if base else None, [_part(part) for part in parts], read)


def _part(part: Any) -> str | _Slice:
    return part if isinstance(part, str) else _Slice(*map(int, part))


def _unreadable() -> DataError:
    return DataError("The prompt kept of this reply cannot be put together again. Regenerate the reply to have it explained.")


# --- both, with the store -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """What is kept of a reply besides its message."""

    prompt: str
    tokens: tuple[Token, ...]

    @property
    def given(self) -> tuple[int, ...]:
        """Ids of the tokens that its request went on from, after the prompt's."""
        return tuple(token.id for token in self.tokens if token.given)


def keep(store: Store, owner: str, conversation: str, message: Message, path: Sequence[Message], prompt: str, recorder: Recorder) -> None:
    """Store what explains `message` as it began (without what was written into it since); `path`: the messages above it, as in its prompt."""
    parts = prompt_parts(prompt, message, path, _stored(store, owner, conversation))
    store.save_explanation(message.id, parts, recorder.packed())


def recall(store: Store, owner: str, conversation: str, message: Message, path: Sequence[Message]) -> Explanation | None:
    """What explains `message`, if anything is kept; `path`: the messages above it. Raises DataError when it cannot be read."""
    found = store.explanations(owner, conversation, [message.id]).get(message.id)
    if found is None:
        return None
    prompt = prompt_text(message, path, _stored(store, owner, conversation))
    return None if prompt is None else Explanation(prompt, tuple(unpack(found[1])))


def _stored(store: Store, owner: str, conversation: str) -> Stored:
    return lambda ids: {id: parts for id, (parts, _) in store.explanations(owner, conversation, ids).items()}


# --- other tokens ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alternative:
    """A token that might have stood in some place, with its probability before samplers."""

    id: int
    text: str
    probability: float


def alternatives(
    backend: Backend, tokens: Sequence[int], count: int = 20, adapters: tuple[Adapter, ...] = (), client: str = "", cancel: CancelToken | None = None
) -> list[Alternative]:
    """The `count` likeliest tokens to follow `tokens`, likeliest first: one forward pass. Empty when cancelled.

    Raises ModelError when the backend tells no probabilities, and what `Backend.generate` raises.
    """
    if "logprobs" not in backend.features:
        raise ModelError(f"{backend.name} runs with a loader that does not tell probabilities. Load the model with another one to see them.")
    request = GenerationRequest(
        tuple(tokens),
        NEUTRAL.replace({"temperature": 0, "ban_eos_token": True}),  # a text that would end here has alternatives, too
        max_new_tokens=1,
        adapters=adapters,
        logprobs=max(1, min(count, MAX_ALTERNATIVES)),
        client=client,
        cancel=cancel or CancelToken(),
    )
    found = [entry for chunk in backend.generate(request) for entry in chunk.logprobs]
    return [Alternative(id, text, math.exp(logprob)) for id, text, logprob in (found[0].top if found else ())]


def before(prompt: Sequence[int], tokens: Sequence[Token], position: int) -> tuple[int, ...]:
    """All that stood before token `position` of a reply. Raises NotFound when it has no such token."""
    if not 0 <= position < len(tokens):
        raise NotFound(f"This reply has {len(tokens)} tokens, and no token {position}. Reload the page.")
    return (*prompt, *(token.id for token in tokens[:position]))


def resumed(backend: Backend, tokens: Sequence[Token], position: int, token: int, ends: Collection[str] = ()) -> tuple[Token, ...]:
    """The beginning of a reply that differs from `tokens` from `position` on, where it has `token`: what a Recorder and a request begin with.

    `ends`: texts of tokens that end a reply (stop strings). Raises NotFound; PromptError for a token that the model does not have or that ends it.
    """
    before((), tokens, position)
    if backend.decode([token]) in {*ends, backend.eos_token} - {""}:
        raise PromptError("This token ends the reply, nothing can follow it. Choose another one.")
    return (*(Token(t.id, t.logprob, True) for t in tokens[:position]), Token(token, None, True))


# --- asking again ---------------------------------------------------------------------------------------------------------------------


def request_again(details: Mapping[str, Any], tokens: Sequence[int], adapters: tuple[Adapter, ...] = (), client: str = "") -> GenerationRequest:
    """The request of a reply with these `details`, with all its tokens (the prompt's and those given). Raises SettingsError."""
    sampling = SamplingParams.build({name: value for name, value in details.get("parameters", {}).items() if name in SamplingParams.model_fields})
    return GenerationRequest(
        tuple(tokens),
        sampling,
        None if sampling.auto_max_new_tokens else sampling.max_new_tokens,
        int(details.get("seed", 0)),
        stop=tuple(details.get("stop", ())),
        adapters=adapters,
        chosen_logprob=True,
        client=client,
        cancel=CancelToken(),
    )


def differences(
    details: Mapping[str, Any], length: int, backend: Backend, model: str, model_hash: str | None, adapters: Collection[str]
) -> list[str]:
    """Why a reply with these `details` might become another one if it were asked again now, a sentence each; empty when none is known.

    `length`: tokens of its prompt and itself. `model`, `model_hash`: of the model now loaded, the hash where it is known; `adapters`: names of
    those that can be had.
    """
    found = [_other_model(details, model, model_hash)]
    wanted = [str(name) for name, _ in details.get("adapters", ())]
    if wanted and "adapters" not in backend.features:
        found.append(f"It was written with LoRA adapters ({', '.join(wanted)}), which {model} cannot use here.")
    else:
        found += [f"The adapter {name} is not there any more." for name in wanted if name not in adapters]
    if length > backend.context_length:
        found.append(f"Its prompt and it have {length:,} tokens together, and the context holds {backend.context_length:,} now.")
    unknown = sorted(details.get("parameters", {}).keys() - SamplingParams.model_fields.keys())
    if unknown:
        found.append(f"This version does not know its parameters {', '.join(unknown)}.")
    return [sentence for sentence in found if sentence]


def _other_model(details: Mapping[str, Any], model: str, model_hash: str | None) -> str:
    was, its_hash = details.get("model") or "another model", details.get("model_hash")
    if its_hash and model_hash:
        if its_hash == model_hash:
            return ""
        return f"The file of {model} is not the same any more." if was == model else f"It was written by {was}, and {model} is loaded now."
    return "" if was == model else f"It was written by {was}, and {model} is loaded now."
