"""What each browser has chosen: its sampling parameters and chat options, frozen, with a revision that Send carries.

A change posts only itself; the stored form is the differences from the configured defaults, so that new defaults reach old sessions.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from modules.errors import SettingsError
from modules.options import nearest
from modules.samplers import SamplingParams
from modules.settings import ChatOptions

MAX_IN_MEMORY = 1000


@dataclass(frozen=True)
class Session:
    """One browser's choices. `revision` grows with every change."""

    sampling: SamplingParams
    chat: ChatOptions
    revision: int = 0

    def values(self) -> dict[str, Any]:
        """All values by name."""
        return {**self.sampling.model_dump(), **self.chat.model_dump()}

    def change(self, values: Mapping[str, Any]) -> Session:
        """A session with `values` changed. Raises SettingsError naming the option; then nothing is changed."""
        sampling = {k: v for k, v in values.items() if k in SamplingParams.model_fields}
        chat = {k: v for k, v in values.items() if k in ChatOptions.model_fields}
        for name in values.keys() - sampling.keys() - chat.keys():
            raise SettingsError(f"There is no parameter {name[:60]!r}.{nearest(name[:60], self.values())}")
        return replace(self, sampling=self.sampling.replace(sampling), chat=self.chat.replace(chat), revision=self.revision + 1)


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

    def __init__(self, memory: Memory, sampling: SamplingParams, chat: ChatOptions) -> None:
        self._memory = memory
        self._defaults = Session(sampling, chat)
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
            self._memory.save_session(key, {"revision": session.revision, "values": changed})
            self._known[key] = session
            return session

    def set_defaults(self, session: Session) -> None:
        """Let new browsers begin with the values of `session`."""
        with self._lock:
            self._defaults = replace(session, revision=0)

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
            session = self._defaults.change(known)
        except SettingsError:  # saved by a version with other limits: the defaults are better than no page
            session = self._defaults
        return replace(session, revision=int(saved.get("revision", 0)))
