"""What each browser has chosen: its sampling parameters, chat options and page options, frozen, with a revision that Send carries.

A change posts only itself; the stored form is the differences from the configured defaults, so that new defaults reach old sessions.
A conversation keeps sampling parameters and chat options of its own (`Session.kept`), which come before the browser's.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

from modules.errors import SettingsError
from modules.options import Options, nearest
from modules.samplers import SamplingParams
from modules.settings import ChatOptions, PageOptions

MAX_IN_MEMORY = 1000
T = TypeVar("T", bound=Options)


@dataclass(frozen=True)
class Session:
    """The values in effect for a browser, or for one of its conversations."""

    sampling: SamplingParams
    chat: ChatOptions
    page: PageOptions

    @cached_property
    def revision(self) -> int:
        """A number made of the values that shape a reply: the same values have the same one, in every tab and after every restart."""
        return zlib.crc32(json.dumps([self.sampling.model_dump(), self.chat.model_dump()], sort_keys=True).encode())

    def values(self) -> dict[str, Any]:
        """All values by name."""
        return {**self.sampling.model_dump(), **self.chat.model_dump(), **self.page.model_dump()}

    def change(self, values: Mapping[str, Any]) -> Session:
        """A session with `values` changed. Raises SettingsError naming the option; then nothing is changed."""
        parts = [{k: v for k, v in values.items() if k in part.model_fields} for part in (SamplingParams, ChatOptions, PageOptions)]
        for name in values.keys() - parts[0].keys() - parts[1].keys() - parts[2].keys():
            raise SettingsError(f"There is no parameter {name[:60]!r}.{nearest(name[:60], self.values())}")
        return Session(self.sampling.replace(parts[0]), self.chat.replace(parts[1]), self.page.replace(parts[2]))

    def kept(self) -> dict[str, Any]:
        """What a conversation stores: the differences from the declared defaults. Never empty, so that it can be told from none."""
        return {"mode": self.chat.mode, **self.sampling.differences(), **self.chat.differences()}

    def of(self, kept: Mapping[str, Any]) -> Session:
        """The session of a conversation that stores `kept`. Names and values that this version does not take are passed over."""
        if not kept:
            return self
        return replace(self, sampling=_lenient(SamplingParams, kept), chat=_lenient(ChatOptions, kept))


def _lenient(options: type[T], values: Mapping[str, Any]) -> T:
    known = {name: value for name, value in values.items() if name in options.model_fields}
    try:
        return options.build(known)
    except SettingsError:
        return options.build({name: value for name, value in known.items() if _valid(options, name, value)})


def _valid(options: type[Options], name: str, value: Any) -> bool:
    try:
        options.build({name: value})
    except SettingsError:
        return False
    return True


class Memory(Protocol):
    """Where sessions outlive the server: `store.Store`."""

    def session(self, key: str) -> Mapping[str, Any] | None:
        """The values saved for `key`."""
        ...

    def save_session(self, key: str, values: Mapping[str, Any]) -> None:
        """Save them."""
        ...


class Sessions:
    """Sessions by key. Safe from any thread; the most recent are kept in memory, all of them in `memory`."""

    def __init__(self, memory: Memory, sampling: SamplingParams, chat: ChatOptions, page: PageOptions) -> None:
        self._memory = memory
        self._defaults = Session(sampling, chat, page)
        self._known: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Session:
        """The session of `key`; the defaults for a browser never seen."""
        with self._lock:
            return self._get(key)

    def change(self, key: str, values: Mapping[str, Any]) -> Session:
        """Change `values`, save, and give the new session. Raises SettingsError; then nothing is changed."""
        with self._lock:
            session = self._get(key).change(values)
            defaults = self._defaults.values()
            changed = {name: value for name, value in session.values().items() if value != defaults[name]}
            self._memory.save_session(key, {"values": changed})
            self._known[key] = session
            return session

    def set_defaults(self, session: Session) -> None:
        """Let new browsers begin with the values of `session`."""
        with self._lock:
            self._defaults = session

    def _get(self, key: str) -> Session:
        session = self._known.get(key) or self._load(key)
        self._known[key] = session
        self._known.move_to_end(key)
        while len(self._known) > MAX_IN_MEMORY:
            self._known.popitem(last=False)
        return session

    def _load(self, key: str) -> Session:
        saved = self._memory.session(key)
        if not saved:
            return self._defaults
        known = {k: v for k, v in dict(saved.get("values", {})).items() if k in self._defaults.values()}
        try:
            return self._defaults.change(known)
        except SettingsError:  # saved by a version with other limits: the defaults are better than no page
            return self._defaults
