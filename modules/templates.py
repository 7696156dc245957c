"""Chat templates: messages to prompt text, and cut to fit the context. What a template may do is limited in `sandbox.py`."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from modules import sandbox
from modules.errors import PromptTooLong, TemplateError
from modules.sandbox import Refused
from modules.streams import FORMATS, opened_by

MAX_SOURCE = sandbox.MAX_SOURCE
"""Characters of template text, at most."""


@dataclass(frozen=True)
class PromptMessage:
    """One message as a template sees it. `reasoning` is the thinking before an assistant's text; one that is `kept` is never left out."""

    role: str
    content: str
    reasoning: str = ""
    kept: bool = False

    def fields(self) -> dict[str, Any]:
        """The mapping given to the template; thinking under both names in use."""
        thinking = {"reasoning_content": self.reasoning, "thinking": self.reasoning} if self.reasoning else {}
        return {"role": self.role, "content": self.content, **thinking}


_MARK = "TGWMARK7f3a9c51"  # letters and digits only: survives trim, escapes and tojson
_USUAL: Mapping[str, Any] = {"enable_thinking": True, "reasoning_effort": "medium", "preserve_thinking": False, "name1": "You", "name2": "AI"}
"""Variables for trying a template out: some fail without them."""


def _clean(value: Any) -> Any:
    """Text without lone surrogates, which no tokenizer takes; pairs become the character they mean."""
    if not isinstance(value, str) or value.isascii():
        return value
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _join_texts(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return {**first, **second, "role": first["role"], "content": f"{first['content']}\n\n{second['content']}"}


def _without_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The leading system message moved into the first user message, which is made if the assistant speaks first."""
    system, *rest = messages
    if rest and rest[0]["role"] == "user":
        return [{**_join_texts(system, rest[0]), "role": "user"}, *rest[1:]]
    return [{**system, "role": "user"}, *rest]


def _alternating(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """System first if at all, then user and assistant in turn: later system texts count as the user's, neighbours of one role are joined."""
    result: list[dict[str, Any]] = []
    for message in messages:
        current = {**message, "role": "user"} if message["role"] == "system" and result else message
        if current["role"] == "assistant" and (not result or result[-1]["role"] == "system"):
            result.append({"role": "user", "content": ""})
        if result and result[-1]["role"] == current["role"] and current["role"] in ("user", "assistant"):
            result[-1] = _join_texts(result[-1], current)
        else:
            result.append(current)
    return result


def _thinking_names(variables: Mapping[str, Any]) -> dict[str, Any]:
    """`enable_thinking` under the other names that templates ask for, and no variable that is None (templates ask "is defined")."""
    given = {name: value for name, value in variables.items() if value is not None}
    if "enable_thinking" in given:
        on = bool(given["enable_thinking"])
        return {"thinking": on, "thinking_budget": -1 if on else 0, **given}
    return given


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template with its model's special tokens. Equal texts are equal and are compiled once."""

    source: str
    bos_token: str = ""
    eos_token: str = ""
    now: Callable[[], datetime] = field(default=datetime.now, compare=False)

    def render(
        self,
        messages: Sequence[Mapping[str, Any] | PromptMessage],
        *,
        add_generation_prompt: bool = True,
        continue_last: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt. Raises TemplateError.

        `continue_last`: the last message, an assistant's or a user's, is left open, so that the model goes on writing it: its thinking when
        it has thinking and no text, else its text. `variables`: tools, enable_thinking, reasoning_effort, preserve_thinking ...; None is as
        not given. A template that does not take a system message gets it inside the first user message; one that refuses the order of roles
        gets neighbours of one role joined. Special tokens inside message texts are not escaped.
        """
        plain = [{name: _clean(value) for name, value in (m.fields() if isinstance(m, PromptMessage) else m).items()} for m in messages]
        if plain and plain[0]["role"] == "system" and not self.takes_system:
            plain = _without_system(plain)
        try:
            if continue_last:
                return self._continued(plain, variables)
            return self._ordered(plain, add_generation_prompt, variables)
        except Refused as refusal:
            raise TemplateError(
                f"The chat template refuses this conversation: {refusal}. Change the message that it means, or choose another template."
            ) from None

    @cached_property
    def takes_system(self) -> bool:
        """Whether a system message's text reaches the prompt; tried once."""
        messages = [{"role": "system", "content": _MARK}, {"role": "user", "content": "Hello"}]
        try:
            return _MARK in self._ordered(messages, True, _USUAL)
        except (Refused, TemplateError):
            return False

    @cached_property
    def thinking_variables(self) -> frozenset[str]:
        """Which of enable_thinking, reasoning_effort and preserve_thinking the template asks for (the first under any of its names)."""
        names = sandbox.variables(self.source)
        switch = {"enable_thinking"} if names & {"enable_thinking", "thinking_budget", "thinking"} else set()
        return frozenset(switch | (names & {"reasoning_effort", "preserve_thinking"}))

    def _rendered(self, messages: list[dict[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]) -> str:
        known = {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "strftime_now": self._strftime_now,
        }
        return sandbox.run(self.source, {**known, **_thinking_names(variables)})

    def _strftime_now(self, form: str) -> str:
        if len(form) > 100:
            raise sandbox.limit("it makes a huge text")
        return self.now().strftime(form)

    def _ordered(self, messages: list[dict[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]) -> str:
        """The prompt; where the template refuses, that of the messages in an order that each template takes, or without the effort's name,
        for which some have other words. Raises the first refusal."""
        joined, plain = _alternating(messages), {name: value for name, value in variables.items() if name != "reasoning_effort"}
        first: Refused | None = None
        for order, given in ((messages, variables), (joined, variables), (messages, plain), (joined, plain)):
            try:
                return self._rendered(order, add_generation_prompt, given)
            except Refused as refusal:
                first = first or refusal
        assert first
        raise first

    def _continued(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        if not messages or messages[-1]["role"] not in ("assistant", "user"):
            raise TemplateError("Only a reply or a message of yours can be continued. Send a message instead.")
        *earlier, last = messages
        text, thinking = last["content"], last.get("reasoning_content", "")
        if before := self._before_mark(messages, variables):
            return before
        if last["role"] == "user":
            raise TemplateError("The chat template does not show the user's last message. Choose another template for this model.")
        opened = self._ordered(earlier, True, variables)
        return opened + (text or self._thinking(opened, thinking))

    def _before_mark(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        """The prompt up to the end of the last message; "" when the template does not show that.

        The mark stands where the model goes on; being no white space it also keeps trimming templates from eating the text's end.
        """
        *earlier, last = messages
        text, thinking = last["content"], last.get("reasoning_content", "")
        in_thinking = {name: thinking + _MARK for name in ("reasoning_content", "thinking")}
        if not thinking or text:
            return self._ordered([*earlier, {**last, "content": text + _MARK}], False, variables).rpartition(_MARK)[0]
        try:
            return self._ordered([*earlier, {**last, **in_thinking}], False, variables).rpartition(_MARK)[0]
        except Refused:
            return ""  # some refuse a message without text

    def _thinking(self, opened: str, thinking: str) -> str:
        """`thinking` after the beginning of a reply, as this template's model begins it."""
        if opened_by(opened):
            return thinking
        start = next((row.start for row in FORMATS if row.start in self.source), FORMATS[0].start)
        return start + ("\n" if start.endswith(("think>", "thought")) else "") + thinking


FALLBACK = ChatTemplate(
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML, for models whose files hold no template."""

_BRACKETED = re.compile(r"<[^<>\n]{1,60}>|\[[^\[\]\n]{1,60}\]")


@lru_cache(maxsize=64)
def stop_strings(template: ChatTemplate, speaker: str = "assistant", **variables: Any) -> tuple[str, ...]:
    """What ends a turn of the assistant (or of the "user"), read off between its text and the other one's next text.

    The special token there (`<|im_end|>`, `[INST]`); without one, the beginning of the next turn (`\\n### Instruction:`). Empty when
    the template shows neither. `variables` as for `render`. Raises TemplateError.
    """
    other = "user" if speaker == "assistant" else "assistant"
    turns = [PromptMessage("user", "one")] * (other == "user") + [PromptMessage(speaker, f"{_MARK}a"), PromptMessage(other, f"{_MARK}u")]
    after = template.render(turns, add_generation_prompt=False, **{**_USUAL, **variables}).rpartition(f"{_MARK}a")[2]
    between, found, _ = after.partition(f"{_MARK}u")
    first_line = between.strip().partition("\n")[0].rstrip()
    if not found or not first_line:
        return ()
    if token := _BRACKETED.match(first_line):
        return (token[0],)
    space = between[: len(between) - len(between.lstrip())]
    return (("\n" if "\n" in space else space) + first_line,)


@lru_cache(maxsize=32)
def opens_thinking(template: ChatTemplate) -> bool:
    """Whether the template itself begins the thinking of each reply. Raises TemplateError."""
    return opened_by(template.render([PromptMessage("user", "one")], **_USUAL)) is not None


# --- fit to the context ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """A prompt that fits. `dropped` is how many of the oldest messages that are not kept were left out."""

    prompt: str
    tokens: tuple[int, ...]
    dropped: int


Render = Callable[[Sequence[PromptMessage]], str]
Encode = Callable[[str], list[int]]


class _Counts:
    """Token counts of texts for one tokenizer, the least recently used forgotten. Holds hashes, not the texts."""

    SIZE = 50_000

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._lock = threading.Lock()

    def count(self, text: str, encode: Encode) -> int:
        key = (hash(text), len(text))
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        number = len(encode(text))
        with self._lock:
            self._known[key] = number
            if len(self._known) > self.SIZE:
                self._known.popitem(last=False)
        return number


_counts: WeakKeyDictionary[Any, _Counts] = WeakKeyDictionary()


def _counter(encode: Encode) -> Callable[[str], int]:
    owner = getattr(encode, "__self__", encode)  # a bound method is a new object each time; what it is bound to is not
    counts = _counts.setdefault(owner, _Counts())
    return lambda text: counts.count(text, encode)


def fit(render: Render, messages: Sequence[PromptMessage], budget: int, encode: Encode, step: float = 0.25) -> Fitted:
    """The prompt of as many of the newest messages as `budget` tokens hold. Raises PromptTooLong, and what `render` raises.

    Whole messages are left out, oldest first, never a leading system message, one that is `kept`, nor anything from the last user message
    on; what follows the kept ones begins with a user message. The cut is chosen within the last `step` of the budget so that it stays where
    it is for many turns and an engine's cached prefix stays valid. Texts are counted once each and from the newest back; the prompt itself
    is rendered and encoded a few times at most, however long the history.
    """
    head, body, last = _parts(messages)
    if sum(len(m.content) for m in messages) <= 4 * budget:  # may well fit
        whole = _fitted(render, encode, messages, 0)
        if len(whole.tokens) <= budget:
            return whole
    needed = _without(body, last)
    alone = _fitted(render, encode, [*head, *needed], last - sum(m.kept for m in body[:last]))
    if len(alone.tokens) > budget:
        pinned = " and what is pinned" if len(needed) > len(body) - last else ""
        raise PromptTooLong(
            f"The last message needs {len(alone.tokens):,} tokens together with the system prompt{pinned} and {budget:,} are allowed. "
            f"Shorten it,{' unpin messages,' if pinned else ''} lower max_new_tokens, or set a larger ctx-size or truncation length."
        )
    weigh = _message_weight(render, encode, head, needed)
    room, after = budget - len(alone.tokens), -1
    for share in (1.0, 1.0, 1.0, 0.5):
        cut = _cut(body[:last], weigh, room * share, step * budget, after)
        result = _fitted(render, encode, [*head, *_without(body, cut)], cut - sum(m.kept for m in body[:cut]))
        if len(result.tokens) <= budget:
            return result
        after = cut  # texts can take more tokens together than apart; what is newer is tried, so that the cut does not go back and forth
    return alone


def leave_out(messages: Sequence[PromptMessage], dropped: int) -> list[PromptMessage]:
    """`messages` as `fit` keeps them when it leaves out so many."""
    head, body, _ = _parts(messages)
    last_dropped = [-1, *(place for place, message in enumerate(body) if not message.kept)]
    return [*head, *_without(body, last_dropped[min(dropped, len(last_dropped) - 1)] + 1)]


def _without(body: Sequence[PromptMessage], cut: int) -> list[PromptMessage]:
    """`body` from place `cut` on, and what is kept before it."""
    return [*(message for message in body[:cut] if message.kept), *body[cut:]]


def _fitted(render: Render, encode: Encode, kept: Sequence[PromptMessage], dropped: int) -> Fitted:
    prompt = render(kept)
    return Fitted(prompt, tuple(encode(prompt)), dropped)


def _parts(messages: Sequence[PromptMessage]) -> tuple[Sequence[PromptMessage], Sequence[PromptMessage], int]:
    """Leading system messages, all others, and the place among these of the last user message (of the last message when there is none)."""
    start = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    body = messages[start:]
    last = next((i for i in range(len(body) - 1, -1, -1) if body[i].role == "user"), max(len(body) - 1, 0))
    return messages[:start], body, last


def _message_weight(render: Render, encode: Encode, head: Sequence[PromptMessage], tail: Sequence[PromptMessage]) -> Callable[[PromptMessage], int]:
    """A function that tells the tokens of one more message in the prompt: its text and the template's frame around it."""
    count = _counter(encode)
    pair = (PromptMessage("user", _MARK), PromptMessage("assistant", _MARK, f"{_MARK}thinking"))
    without, with_pair = render([*head, *tail]), render([*head, *pair, *tail])
    shows_thinking = f"{_MARK}thinking" in with_pair
    texts = 2 * count(_MARK) + shows_thinking * count(f"{_MARK}thinking")
    frame = max(0, -(-(count(with_pair) - count(without) - texts) // 2))

    def weigh(message: PromptMessage) -> int:
        if message.kept:
            return 0  # it is in the prompt without which nothing is
        return frame + count(message.content) + (count(message.reasoning) if shows_thinking and message.reasoning else 0)

    return weigh


def _cut(old: Sequence[PromptMessage], weigh: Callable[[PromptMessage], int], room: float, step: float, after: int) -> int:
    """Place of the first message kept of `old`, beyond `after`; len(old) when none is.

    Of the user messages at which the kept part leaves at most `step` of `room` unused, the one whose number has the most factors of two:
    it stays the best one until it slides out of the room, so the cut moves about once in a `step` of new text, and it is found without
    looking at what is older.
    """
    used, fitting = 0, []
    for place in range(len(old) - 1, after, -1):
        used += weigh(old[place])
        if used > room:
            break
        if old[place].role == "user":
            fitting.append((place, used))
    else:
        if after < 0 and next((m.role for m in old if not m.kept), "user") == "user":
            return 0
    candidates = [place for place, tokens in fitting if tokens >= room - step] or [place for place, _ in fitting[-1:]]
    return max(candidates, key=lambda place: (place & -place, place), default=len(old))
