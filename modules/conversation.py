"""Message and Conversation: pure values. A conversation is a tree of messages with a tip; nothing here touches storage.

Regenerating or editing adds a sibling; a swipe moves the tip to another branch. Shared history is shared nodes.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from modules.errors import NotFound

Role = Literal["system", "user", "assistant"]
State = Literal["running", "done", "stopped", "failed", "interrupted"]


def _empty() -> Mapping[str, Any]:
    return MappingProxyType({})


def new_id() -> str:
    """A random identifier, 32 hexadecimal characters (128 bits: not guessable)."""
    return secrets.token_hex(16)


@dataclass(frozen=True)
class Message:
    """One node. `text` is raw model or user text; `reasoning` is the thinking that came before it."""

    id: str
    parent: str | None
    role: Role
    text: str
    reasoning: str = ""
    created: float = 0.0
    """Seconds since the epoch."""
    state: State = "done"
    """`running` while being written; `interrupted` when the server ended meanwhile; `failed` keeps its `details["error"]`."""
    details: Mapping[str, Any] = field(default_factory=_empty)
    """JSON values that explain the reply: model, seed, parameters, counts, timings, finish reason, error."""


@dataclass(frozen=True)
class Summary:
    """What stands for the oldest messages: all up to the one with the id `after`, which are not sent."""

    text: str
    after: str


@dataclass(frozen=True)
class Conversation:
    """`messages` by id and the `tip`, the message at the end of the branch shown. `tip` is None when empty."""

    id: str
    owner: str
    title: str = ""
    messages: Mapping[str, Message] = field(default_factory=_empty)
    tip: str | None = None
    settings: Mapping[str, Any] = field(default_factory=_empty)
    """JSON values: parameters and chat options of its own."""
    folder: str = ""
    """"" for none."""
    tags: tuple[str, ...] = ()
    pinned: bool = False
    """Stands at the top of the list."""
    summary: Summary | None = None

    def add(self, role: Role, text: str, parent: str | None = None, **fields: Any) -> tuple[Conversation, Message]:
        """The conversation with a new message under `parent` (default: the tip), which becomes the tip; and the message."""
        above = self.tip if parent is None else self[parent].id
        message = Message(new_id(), above, role, text, created=time.time(), **fields)
        return self._with(message), message

    def add_sibling(self, of: str, text: str, **fields: Any) -> tuple[Conversation, Message]:
        """The conversation with a new message beside message `of` (same parent and role), which becomes the tip; and the message."""
        other = self[of]
        message = Message(new_id(), other.parent, other.role, text, created=time.time(), **fields)
        return self._with(message), message

    def _with(self, message: Message) -> Conversation:
        return replace(self, messages={**self.messages, message.id: message}, tip=message.id)

    def __getitem__(self, message_id: str) -> Message:
        try:
            return self.messages[message_id]
        except KeyError:
            raise NotFound("This message is not in the conversation any more. Reload the page.") from None

    def path(self, tip: str | None = None) -> tuple[Message, ...]:
        """Messages from the root to `tip` (default: the conversation's tip)."""
        result: list[Message] = []
        current = tip or self.tip
        while current is not None:
            message = self[current]
            result.append(message)
            current = message.parent
        return tuple(reversed(result))

    def siblings(self, message_id: str) -> tuple[str, ...]:
        """Ids of the versions of a message, itself included, oldest first."""
        parent = self[message_id].parent
        return tuple(m.id for m in self.messages.values() if m.parent == parent)

    def move_to(self, message_id: str) -> Conversation:
        """The conversation showing the branch of `message_id`, at its newest leaf."""
        tip = self[message_id].id
        newest_child = {m.parent: m.id for m in self.messages.values()}
        while tip in newest_child:
            tip = newest_child[tip]
        return replace(self, tip=tip)
