"""Prompting: from the path of a conversation and the values in effect to a prompt, in the three modes.

    instruct       the model's chat template over the system message and the messages
    chat           a plain script (SCRIPT): who the character is, then lines of the form "Name: text"
    chat-instruct  that script inside `chat_instruct_command`, as the one user message of the model's chat template; the reply begins with "Name:"

Names are made one printable line; texts of any origin are data, and no mark or template in them is ever expanded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from modules.conversation import Message, Summary
from modules.errors import PromptTooLong
from modules.settings import ChatOptions
from modules.templates import ChatTemplate, Encode, Fitted, PromptMessage, fit, leave_out, opens_thinking, stop_strings

Speaker = Literal["assistant", "user"]
"""Whose message is to be written."""

SCRIPT = """\
{{ bos_token -}}
{% if messages and messages[0].role == 'system' %}
{{ messages[0].content }}

{% endif %}
{% if user_bio %}
What is known about {{ name1 }}:
{{ user_bio }}

{% endif %}
{% for message in messages %}
{% if message.role == 'user' %}
{{ name1 }}: {{ message.content }}
{% elif message.role == 'assistant' %}
{{ name2 }}: {{ message.content }}
{% elif not loop.first %}
{{ message.content }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ name2 }}:
{%- endif %}
"""
"""The chat template of the chat modes. Variables: messages, name1 (the user), name2 (the character), user_bio, bos_token, add_generation_prompt."""

_NAME_LENGTH = 100
_JOINERS = "\u200c\u200d"  # not printable by themselves, but part of names in some scripts and of emoji


def printable_name(name: str, default: str) -> str:
    """`name` as one line without control characters and of bounded length; `default` when nothing is left of it."""
    plain = "".join(c if c.isprintable() or c in _JOINERS else " " for c in name)
    return " ".join(plain.split())[:_NAME_LENGTH].strip() or default


def substituted(text: str, chat: ChatOptions) -> str:
    """`text` with the names for {{char}} or <BOT> and {{user}} or <USER>. One pass: what stands in a name is not expanded."""
    names = {"char": _character(chat), "bot": _character(chat), "user": _user(chat)}
    return re.sub(r"\{\{\s*((?i:char|user))\s*\}\}|<(BOT|USER)>", lambda found: names[(found[1] or found[2]).lower()], text)


def _user(chat: ChatOptions) -> str:
    return printable_name(chat.name1, "You")


def _character(chat: ChatOptions) -> str:
    return printable_name(chat.name2, "AI")


@dataclass(frozen=True)
class Prompting:
    """How prompts are made of one `template` (the model's) and the values of one conversation."""

    template: ChatTemplate
    chat: ChatOptions
    adds_bos: bool = False
    """Whether a plain text begins with the model's BOS token: the script of chat mode then does. (Chat templates see to that themselves.)"""

    def fit(
        self,
        path: Sequence[Message],
        budget: int,
        encode: Encode,
        *,
        open_end: bool = False,
        speaker: Speaker = "assistant",
        summary: Summary | None = None,
    ) -> Fitted:
        """The prompt for what follows `path`, of at most `budget` tokens. Raises PromptTooLong, TemplateError.

        `open_end`: the last message goes on (its thinking, when it has thinking and no text). `speaker` "user": the user's next message is
        to be written; with `open_end` the last message is the user's and goes on. The oldest messages are left out as far as they must be,
        but never pinned ones, a greeting, nor anything from the last user message on; with `context_full` "stop" none is.
        """
        messages = self._messages(path, open_end, summary)
        render = self._renderer(open_end, speaker)
        if self.chat.context_full != "stop":
            return fit(render, messages, budget, encode)
        prompt = render(messages)
        tokens = tuple(encode(prompt))
        if len(tokens) > budget:
            raise PromptTooLong(
                f"The conversation needs {len(tokens):,} tokens and {budget:,} are allowed. Choose another way for a full context "
                "(leave out or summarise the oldest messages), remove messages, or load the model with a larger ctx-size."
            )
        return Fitted(prompt, tokens, 0)

    def render(
        self, path: Sequence[Message], dropped: int, *, open_end: bool = False, speaker: Speaker = "assistant", summary: Summary | None = None
    ) -> str:
        """The prompt that `fit` makes when it leaves out so many messages."""
        return self._renderer(open_end, speaker)(leave_out(self._messages(path, open_end, summary), dropped))

    def left_out(self, path: Sequence[Message], dropped: int, summary: Summary | None = None) -> tuple[Message, ...]:
        """The messages that `fit` leaves out, oldest first, when it leaves out so many; `summary` as given to it."""
        sent = self._sent(path, False, summary)
        return tuple(message for message in sent if not _kept(message))[:dropped]

    @property
    def stops(self) -> tuple[str, ...]:
        """What ends a reply of the assistant."""
        return self.stops_of("assistant")

    def stops_of(self, speaker: Speaker) -> tuple[str, ...]:
        """What ends a message of `speaker`: what the template writes after it; in the chat modes the beginning of anybody's next line."""
        lines = () if self.chat.mode == "instruct" else (f"\n{_user(self.chat)}:", f"\n{_character(self.chat)}:")
        if self.chat.mode == "chat":
            return lines
        turn = stop_strings(self.template, "user" if speaker == "user" and self.chat.mode == "instruct" else "assistant", **self.variables)
        return (*turn, *lines)

    def names(self, speaker: Speaker = "assistant") -> tuple[str, ...]:
        """Names that a model writes before a text though it should not: `ReplyStream` takes them away. None in instruct mode."""
        if self.chat.mode == "instruct":
            return ()
        names = (_character(self.chat), _user(self.chat))
        return names if speaker == "assistant" else names[::-1]

    @cached_property
    def knows(self) -> frozenset[str]:
        """Which of enable_thinking, reasoning_effort and preserve_thinking the template asks for; in chat mode it is not used."""
        return frozenset() if self.chat.mode == "chat" else self.template.thinking_variables

    # --- from messages to text ----------------------------------------------------------------------------------------------------------

    def _sent(self, path: Sequence[Message], open_end: bool, summary: Summary | None) -> list[Message]:
        """The messages of `path` that are sent when all fits, without leading system messages."""
        start = next((place for place, message in enumerate(path) if message.role != "system"), len(path))
        covered = _covered(path, summary)
        return [
            message
            for place, message in enumerate(path)
            if place >= start
            and (message.text or (open_end and place == len(path) - 1))
            and (place >= covered or _kept(message))
        ]  # fmt: skip

    def _messages(self, path: Sequence[Message], open_end: bool, summary: Summary | None) -> list[PromptMessage]:
        """Everything that is sent when all fits: one system message, if there is something to say in it, and the messages."""
        start = next((place for place, message in enumerate(path) if message.role != "system"), len(path))
        own = self.chat.custom_system_message if self.chat.mode == "instruct" else substituted(self.chat.context, self.chat)
        told = [own.strip(), *(message.text for message in path[:start])]
        if summary and _covered(path, summary):
            told.append(f"What happened so far, in short:\n{summary.text.strip()}")
        system = "\n\n".join(text for text in told if text)
        sent = [PromptMessage(m.role, m.text, m.reasoning, _kept(m)) for m in self._sent(path, open_end, summary)]
        return [PromptMessage("system", system), *sent] if system else sent

    def _renderer(self, open_end: bool, speaker: Speaker) -> Callable[[Sequence[PromptMessage]], str]:
        """The function from messages (whose last one is open, if `open_end`) to the prompt."""
        write = {"instruct": self._instruct, "chat": self._chat, "chat-instruct": self._chat_instruct}[self.chat.mode]

        def render(messages: Sequence[PromptMessage]) -> str:
            if open_end:
                return write(list(messages[:-1]), messages[-1], speaker)
            return write(list(messages), PromptMessage("user", "") if speaker == "user" else None, speaker)

        return render

    def _instruct(self, messages: list[PromptMessage], begun: PromptMessage | None, speaker: Speaker) -> str:
        return _written(self.template, messages, begun, self.variables)

    def _chat(self, messages: list[PromptMessage], begun: PromptMessage | None, speaker: Speaker) -> str:
        script = ChatTemplate(SCRIPT, self.template.bos_token if self.adds_bos else "")
        return _written(script, messages, begun, self.variables)

    def _chat_instruct(self, messages: list[PromptMessage], begun: PromptMessage | None, speaker: Speaker) -> str:
        name = _user(self.chat) if speaker == "user" else _character(self.chat)
        script = ChatTemplate(SCRIPT).render(messages, add_generation_prompt=False, **self.variables).rstrip("\n")
        values, command = {"<|character|>": name, "<|prompt|>": script}, self.chat.chat_instruct_command
        if "<|prompt|>" not in command:
            command += "\n\n<|prompt|>"  # without it the model would not see the conversation
        asked = PromptMessage("user", re.sub(r"<\|(?:character|prompt)\|>", lambda found: values[found[0]], command).strip())
        return _written(self.template, [asked], self._in_character(begun, name, speaker), self.variables)

    def _in_character(self, begun: PromptMessage | None, name: str, speaker: Speaker) -> PromptMessage | None:
        """The beginning of the model's answer, with the speaker's name; none for a model that may think before it."""
        if begun and begun.reasoning and not begun.content:
            return begun
        if begun and begun.content:
            return PromptMessage("assistant", f"{name}: {begun.content}", begun.reasoning)
        return None if speaker == "assistant" and self._thinks_first else PromptMessage("assistant", f"{name}:")

    @property
    def _thinks_first(self) -> bool:
        asked = self.template.thinking_variables & {"enable_thinking", "reasoning_effort"}
        return self.chat.enable_thinking and (bool(asked) or opens_thinking(self.template))

    @property
    def variables(self) -> Mapping[str, Any]:
        """What templates are told besides messages and tokens. (`ChatTemplate` adds thinking and thinking_budget, and leaves out what is None.)"""
        chat = self.chat
        return {
            "tools_in_user_message": False,
            "enable_thinking": chat.enable_thinking,
            "reasoning_effort": chat.reasoning_effort,
            "preserve_thinking": chat.preserve_thinking,
            "name1": _user(chat),
            "name2": _character(chat),
            "user_bio": substituted(chat.user_bio.strip(), chat),
        }


def _kept(message: Message) -> bool:
    return bool(message.details.get("pinned") or message.details.get("greeting"))


def _covered(path: Sequence[Message], summary: Summary | None) -> int:
    """How many of the first messages of `path` the summary stands for: none from the last user message on, nor of another branch."""
    if summary is None or not summary.text.strip():
        return 0
    place = next((place for place, message in enumerate(path) if message.id == summary.after), -1)
    last = max((place for place, message in enumerate(path) if message.role == "user"), default=len(path) - 1)
    return max(0, min(place + 1, last))


def _written(template: ChatTemplate, messages: list[PromptMessage], begun: PromptMessage | None, variables: Mapping[str, Any]) -> str:
    if begun is None:
        return template.render(messages, **variables)
    prompt = template.render([*messages, begun], continue_last=True, **variables)
    return prompt if begun.content or begun.reasoning else prompt.rstrip(" ")  # a model's first word has its space with it


# --- a summary by the model -----------------------------------------------------------------------------------------------------------


def summary_messages(messages: Sequence[Message], former: str) -> list[PromptMessage]:
    """What the model is asked to make a summary of `messages`, with the `former` one of what stands before them."""
    names = {"user": "User", "assistant": "Assistant", "system": "System"}
    lines = [f"{printable_name(str(m.details.get('name') or ''), names[m.role])}: {m.text}" for m in messages if m.text]
    before = f"What happened before it, in short:\n{former.strip()}\n\n" if former.strip() else ""
    asked = (
        f"{before}Part of a conversation:\n\n" + "\n\n".join(lines) + "\n\n"
        "Write a summary of everything above, of at most 200 words, so that the conversation can go on without it: who is who, what was said, "
        "decided and asked, and what is still open. Keep names, numbers and the language. Answer with the summary alone."
    )
    return [PromptMessage("user", asked)]
