"""The tab's WebSocket: one per tab, events with ids, resume, a snapshot for a listener older than the ring, keep-alive.

A connection holds cursors, not queues: it pulls what is new when it is woken, so a slow tab costs no memory and gets a snapshot.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from modules.app import App
from modules.auth import Auth, Identity
from modules.errors import NotFound
from modules.replies import Reply
from modules.ui.branches import message_views, status_now
from modules.ui.views import info_view, message_view

PING_SECONDS = 15.0
MAX_FOLLOWED = 32
SHORT = 8
"""A listener new to a reply of more events than this gets a snapshot instead of all of them."""
MAX_FRAME_CHARACTERS = 65_536
BOOT = secrets.token_hex(8)
"""Different at each start of the server, so that a page notices a restart."""


class Tab:
    """What one tab has seen, and what it has to be told next."""

    def __init__(self, app: App, who: Identity) -> None:
        self._app = app
        self._who = who
        self._conversation: str | None = None
        self._cursors: dict[str, int] = {}
        self._asked: deque[dict[str, Any]] = deque(maxlen=1)
        self._status: dict[str, Any] = {}
        self._news = app.replies.news(who.owner).last

    def follow(self, request: dict[str, Any]) -> None:
        """Follow another conversation, its running replies each from an event on; takes effect at the next `news`."""
        self._asked.append(request)

    def _follow(self, request: dict[str, Any]) -> None:
        conversation, replies = request.get("conversation"), request.get("replies")
        self._conversation = conversation if isinstance(conversation, str) else None
        wanted = list(replies.items())[:MAX_FOLLOWED] if isinstance(replies, dict) else []
        self._cursors = {str(key): event for key, event in wanted if isinstance(event, int)}
        for running in self._app.replies.running(self._conversation) if self._conversation else ():
            if running.owner == self._who.owner:
                self._cursors.setdefault(running.id, 0)

    def news(self) -> Iterator[dict[str, Any]]:
        """Everything new since the last call, oldest first. One thread at a time."""
        if self._asked:
            self._follow(self._asked.popleft())
        yield from self._model()
        yield from self._conversations()
        for reply in list(self._cursors):
            yield from self._reply(reply)

    def _model(self) -> Iterator[dict[str, Any]]:
        status = status_now(self._app)
        if {**status, "memory": None} != {**self._status, "memory": None}:
            self._status = status
            yield {"type": "model", "status": status}

    def _conversations(self) -> Iterator[dict[str, Any]]:
        ring = self._app.replies.news(self._who.owner)
        events = ring.after(self._news)
        if events is None:  # too far behind, or the ring of somebody long away was let go: as if the server had started anew
            self._news = ring.last
            yield {"type": "hello", "boot": secrets.token_hex(8)}
            return
        for event in events:
            self._news = event.id  # not the ring's last: that one may have come since
            told = self._told(event.type, dict(event.data))
            if told:
                yield told

    def _told(self, type: str, data: dict[str, Any]) -> dict[str, Any] | None:
        try:
            if type == "deleted":
                return {"type": "conversations", "changed": [], "deleted": [data["id"]]}
            if type == "conversation":
                info = self._app.store_of(data["id"]).info(self._who.owner, data["id"])
                running = bool(self._app.replies.running(info.id))
                return {"type": "conversations", "changed": [info_view(info, running)], "deleted": []}
            if data["conversation"] != self._conversation:
                return None
            if type == "started":
                for running in data["running"]:
                    self._cursors.setdefault(running, 0)
                return {
                    "type": "started",
                    "conversation": self._conversation,
                    "messages": message_views(self._app, self._who, data["conversation"], data["messages"]),
                }
            return {"type": type, **data}
        except NotFound:  # deleted meanwhile; that is told too
            return None

    def _reply(self, id: str) -> Iterator[dict[str, Any]]:
        reply = self._app.replies.get(self._who.owner, id)
        if reply is None:
            del self._cursors[id]
            yield from self._finished(id)
            return
        for event in self._events(reply):
            self._cursors[id] = event.id
            yield {"type": event.type, "reply": id, "event": event.id, **event.data}
            if event.type == "end":
                del self._cursors[id]

    def _events(self, reply: Reply) -> list[Any]:
        cursor = self._cursors[reply.id]
        events = reply.ring.after(cursor) if cursor or reply.ring.last <= SHORT else None
        if events is not None:
            return events
        snapshot = reply.snapshot()
        ended = reply.ring.after(max(0, snapshot.id - 1)) or []
        return [snapshot, *(event for event in ended if event.type == "end")]

    def _finished(self, id: str) -> Iterator[dict[str, Any]]:
        """A reply that this server does not run: its message as it was saved."""
        try:
            message = self._app.store_of(self._conversation).conversation(self._who.owner, self._conversation or "")[id]
        except NotFound:
            return
        yield {"type": "end", "reply": id, "event": 0, "message": message_view(message)}


async def serve_events(socket: WebSocket, app: App, auth: Auth) -> None:
    """Run one tab's connection until it closes, or its login ends. Raises NotLoggedIn before it is accepted."""
    who = auth.need(socket)
    await socket.accept()
    woken, loop = asyncio.Event(), asyncio.get_running_loop()

    def wake() -> None:
        try:
            loop.call_soon_threadsafe(woken.set)
        except RuntimeError:  # the loop has closed: the server is ending
            return

    tab = Tab(app, who)
    stop_listening = app.replies.listen(who.owner, wake)
    reader = asyncio.create_task(_read(socket, tab, wake))
    try:
        await _send(socket, {"type": "hello", "boot": BOOT, "user": who.name})
        await _write(socket, tab, woken, reader, lambda: auth.who(socket) == who)
    except (WebSocketDisconnect, RuntimeError, ConnectionError):
        return  # the tab has gone; its replies go on
    finally:
        stop_listening()
        reader.cancel()


async def _write(socket: WebSocket, tab: Tab, woken: asyncio.Event, reader: asyncio.Task[None], welcome: Callable[[], bool]) -> None:
    woken.set()
    checked = time.monotonic()
    while not reader.done():
        if time.monotonic() >= checked + PING_SECONDS:
            checked = time.monotonic()
            if not welcome():  # logged out, or the password was changed
                await socket.close(1008)
                return
        try:
            await asyncio.wait_for(woken.wait(), PING_SECONDS)
        except TimeoutError:
            await _send(socket, {"type": "ping"})
            continue
        woken.clear()
        for told in await asyncio.to_thread(lambda: list(tab.news())):
            await _send(socket, told)


async def _read(socket: WebSocket, tab: Tab, wake: Callable[[], None]) -> None:
    try:
        while True:
            text = await socket.receive_text()
            request = json.loads(text) if len(text) <= MAX_FRAME_CHARACTERS else None
            if isinstance(request, dict) and request.get("type") == "follow":
                tab.follow(request)
            wake()
    except (WebSocketDisconnect, RuntimeError, ValueError, KeyError, RecursionError):
        wake()


async def _send(socket: WebSocket, message: dict[str, Any]) -> None:
    await socket.send_text(json.dumps(message, ensure_ascii=False, separators=(",", ":")))
