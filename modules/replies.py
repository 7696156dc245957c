"""Running replies: a thread, a cancel token and a ring of events each; any number of listeners, from any event on.

A reply belongs to the server, not to a page. One thread takes pieces from the engine; a second one presents them (coalesced:
the first at once, then at most every 50 ms), saves them (at once, then at most once a second) and wakes the listeners.
Nothing here knows Markdown, HTTP or the store: presenting and saving are handed in.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from modules.backends.base import CancelToken, Chunk
from modules.conversation import Message, State
from modules.errors import Busy, DataError, NotFound, UserError
from modules.log import logger

PUBLISH_SECONDS = 0.05
SAVE_SECONDS = 1.0
RING_EVENTS = 512
FINISHED_KEPT = 64
OWNERS_KEPT = 1000
SAVE_RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, *[10.0] * 60)


@dataclass(frozen=True)
class Piece:
    """A piece of a reply: deltas of the answer and of the thinking, and the chunk they came with (for its counts)."""

    text: str = ""
    reasoning: str = ""
    chunk: Chunk = field(default_factory=Chunk)
    reasoning_tokens: int = 0
    """How many of the tokens so far were thinking."""
    note: str = ""
    """What is done before the reply can begin, for the reader."""
    warning: str = ""
    """What went otherwise than was wished, for the reader; it stays with the reply."""
    stop: str = ""
    """In the last piece: the stop string that ended the reply."""
    places: tuple[int, ...] = ()
    """Of each of the chunk's log-probabilities: characters of the raw reply before its token."""


@dataclass(frozen=True)
class Event:
    """Something a listener is told. `data` is JSON."""

    id: int
    type: str
    data: Mapping[str, Any]


class Ring:
    """The last events, numbered from 1, or from after `last`. Safe from any thread."""

    def __init__(self, size: int = RING_EVENTS, last: int = 0) -> None:
        self._events: deque[Event] = deque(maxlen=size)
        self._last = last
        self._lock = threading.Lock()

    @property
    def last(self) -> int:
        """Number of the newest event; 0 when there was none."""
        return self._last

    def append(self, type: str, data: Mapping[str, Any]) -> None:
        """Add an event; the oldest one falls out of a full ring."""
        with self._lock:
            self._last += 1
            self._events.append(Event(self._last, type, data))

    def after(self, event: int) -> list[Event] | None:
        """The events after number `event`; None if some of them have fallen out, or `event` was never here."""
        with self._lock:
            missed = self._last - event
            if missed < 0 or missed > len(self._events):
                return None
            return [self._events[i] for i in range(len(self._events) - missed, len(self._events))]


@dataclass(frozen=True)
class Stats:
    """Counts and times of one reply, so far or final. Seconds are counted from its start."""

    tokens: int = 0
    tokens_per_second: float | None = None
    prompt_tokens: int | None = None
    prefill_done: int = 0
    reused_tokens: int | None = None
    context_length: int | None = None
    first_token_seconds: float | None = None
    seconds: float = 0.0
    finish_reason: str | None = None
    queue_position: int | None = None
    """While it waits for a place in the engine: how many stand in front."""
    queue_seconds: float | None = None
    prefill_seconds: float | None = None
    draft_tokens: int | None = None
    accepted_tokens: int | None = None
    reasoning_tokens: int | None = None
    note: str | None = None
    warning: str | None = None

    def seen(self, piece: Piece, seconds: float) -> Stats:
        """The stats after `piece`, which came `seconds` after the start."""
        chunk, first = piece.chunk, self.first_token_seconds
        if first is None and chunk.completion_tokens:
            first = seconds
        tokens = max(self.tokens, chunk.completion_tokens)
        span = (seconds - first) if first is not None else 0.0
        timings = chunk.timings
        if timings and timings.decode_seconds:
            span = timings.decode_seconds
        return replace(
            self,
            tokens=tokens,
            tokens_per_second=(tokens - 1) / span if tokens > 1 and span > 0 else self.tokens_per_second,
            prompt_tokens=chunk.prompt_tokens or self.prompt_tokens,
            prefill_done=max(self.prefill_done, chunk.prefill_done),
            reused_tokens=timings.reused_tokens if timings else self.reused_tokens,
            first_token_seconds=first,
            seconds=seconds,
            finish_reason=chunk.finish_reason or self.finish_reason,
            queue_position=chunk.queue_position,
            queue_seconds=timings.queue_seconds if timings else self.queue_seconds,
            prefill_seconds=timings.prefill_seconds if timings else self.prefill_seconds,
            draft_tokens=timings.draft_tokens or None if timings else self.draft_tokens,
            accepted_tokens=timings.accepted_tokens if timings and timings.draft_tokens else self.accepted_tokens,
            reasoning_tokens=piece.reasoning_tokens or self.reasoning_tokens,
            note=piece.note or None,
            warning=piece.warning or self.warning,
        )


class TextPresenter:
    """Events of a text that is not shown as a message: the deltas as they are."""

    def __init__(self) -> None:
        self._text, self._new = "", ""

    def feed(self, text: str, reasoning: str) -> None:
        """Take deltas."""
        self._text, self._new = self._text + text, self._new + text

    def update(self, stats: Stats, final: bool) -> Mapping[str, Any]:
        """The text since the last call."""
        new, self._new = self._new, ""
        return {"text": new}

    def snapshot(self, stats: Stats) -> Mapping[str, Any]:
        """The whole text."""
        return {"text": self._text, "whole": True}

    def end(self, message: Message) -> Mapping[str, Any]:
        """The whole text, and how it ended."""
        return {"text": message.text, "whole": True, "state": message.state, "error": message.details.get("error")}


class Presenter(Protocol):
    """Makes events of one reply for its listeners. Used by one thread at a time."""

    def feed(self, text: str, reasoning: str) -> None:
        """Take deltas."""
        ...

    def update(self, stats: Stats, final: bool) -> Mapping[str, Any]:
        """Data of an "update" event: what changed since the last call."""
        ...

    def snapshot(self, stats: Stats) -> Mapping[str, Any]:
        """Data of a "snapshot" event: everything so far."""
        ...

    def end(self, message: Message) -> Mapping[str, Any]:
        """Data of the "end" event."""
        ...


class Reply:
    """One reply being written into `message` (state "running"; its text and reasoning so far are what it goes on from)."""

    def __init__(
        self, owner: str, conversation: str, message: Message, context_length: int | None, presenter: Presenter, cancel: CancelToken
    ) -> None:
        self.owner = owner
        self.conversation = conversation
        self.cancel = cancel
        self.ring = Ring()
        self._message = message
        self._presenter = presenter
        self._present_lock = threading.Lock()
        self._condition = threading.Condition()
        self._pieces: list[Piece] = []
        self._ended: tuple[State, str] | None = None
        self._text, self._reasoning = [message.text], [message.reasoning]
        self._stats = Stats(context_length=context_length)
        self._began = time.monotonic()
        self.finished = threading.Event()
        self.told = False
        """Its end is in the ring, or nobody is left to hear of it."""
        presenter.feed(message.text, message.reasoning)

    @property
    def id(self) -> str:
        """The id of its message."""
        return self._message.id

    @property
    def message(self) -> Message:
        """The message as it is now."""
        with self._present_lock:
            return self._current()

    def snapshot(self) -> Event:
        """Everything so far, numbered like the newest event it contains."""
        with self._present_lock:
            return Event(self.ring.last, "snapshot", self._presenter.snapshot(self._stats))

    # --- the engine's side ----------------------------------------------------------------------------------------------------------

    def produce(self, pieces: Callable[[], Iterable[Piece]]) -> None:
        """Take all pieces; the body of the first thread. Always ends the reply, whatever happens."""
        state: State = "failed"
        error = ""
        try:
            for piece in pieces():
                self._take(piece)
            state = "stopped" if self.cancel.cancelled and self._last_reason() == "cancelled" else "done"
        except UserError as problem:
            error = str(problem)
            logger.warning("The reply failed: %s", problem)
        except Exception as problem:  # noqa: BLE001  a thread's top: the reply must end, and say so
            error = f"The reply failed ({type(problem).__name__}). The terminal has the details."
            logger.exception("The reply failed")
        finally:
            with self._condition:
                self._ended = (state, error)
                self._condition.notify()

    def _take(self, piece: Piece) -> None:
        with self._condition:
            self._stats = self._stats.seen(piece, time.monotonic() - self._began)
            self._pieces.append(piece)
            self._condition.notify()

    def _last_reason(self) -> str | None:
        return self._stats.finish_reason

    # --- the listeners' side --------------------------------------------------------------------------------------------------------

    def publish(self, save: Callable[[Message], None], wake: Callable[[], None], closing: threading.Event) -> None:
        """Present, save and wake until the reply has ended; the body of the second thread. Always finishes, whatever happens."""
        try:
            self._publish(save, wake)
            self._finish(save, wake, closing)
            self.told = True
        except Exception:  # noqa: BLE001  a thread's top: the chat must be free again
            logger.exception("Showing the reply failed")
            self._give_up(save)
        finally:
            self.finished.set()
            wake()

    def _publish(self, save: Callable[[Message], None], wake: Callable[[], None]) -> None:
        shown = saved = -1e9
        dirty = False
        while True:
            pieces = self._collect(shown + PUBLISH_SECONDS, saved + SAVE_SECONDS if dirty else None)
            if pieces is None:
                break
            if pieces:
                shown = time.monotonic()
                self._present(pieces)
                wake()
                dirty = True
            if dirty and time.monotonic() >= saved + SAVE_SECONDS:
                saved = time.monotonic()
                dirty = not self._save(save)

    def _collect(self, not_before: float, wake_at: float | None) -> list[Piece] | None:
        """Pieces that have come, not given out before `not_before`; [] when `wake_at` passes without any; None at the end."""
        with self._condition:
            timeout = None if wake_at is None else max(0.0, wake_at - time.monotonic())
            if not self._condition.wait_for(lambda: self._pieces or self._ended, timeout):
                return []
            self._condition.wait_for(lambda: self._ended, max(0.0, not_before - time.monotonic()))
            if self._ended:
                return None
            pieces, self._pieces = self._pieces, []
            return pieces

    def _present(self, pieces: list[Piece], final: bool = False) -> None:
        with self._present_lock:
            for piece in pieces:
                self._text.append(piece.text)
                self._reasoning.append(piece.reasoning)
                self._presenter.feed(piece.text, piece.reasoning)
            self.ring.append("update", self._presenter.update(self._stats, final))

    def _current(self, state: State | None = None, error: str = "") -> Message:
        self._text, self._reasoning = ["".join(self._text)], ["".join(self._reasoning)]
        details = {**self._message.details, **({"error": error} if error else {})}
        if self._stats.tokens or "stats" not in details:  # what a continuation that adds nothing goes on from keeps its figures
            details["stats"] = {k: v for k, v in vars(self._stats).items() if v is not None}
        return replace(self._message, text=self._text[0], reasoning=self._reasoning[0], state=state or self._message.state, details=details)

    def _save(self, save: Callable[[Message], None]) -> bool:
        """Save what there is; whether that worked. A chat deleted meanwhile stops the reply."""
        try:
            save(self.message)
        except NotFound:
            self.cancel.cancel()
        except (DataError, Busy) as error:
            logger.error("The running reply could not be saved, will try again: %s", error)
            return False
        return True

    def _finish(self, save: Callable[[Message], None], wake: Callable[[], None], closing: threading.Event) -> None:
        assert self._ended
        state, error = self._ended
        self._present(self._pieces, final=True)
        with self._present_lock:
            message = self._current(state, error)
        problem = self._save_final(save, message)
        with self._present_lock:
            self._message = message
            if not problem:
                self.finished.set()  # before the end is told: who hears of it may send the next message at once
            self.ring.append("end", self._presenter.end(_with_problem(message, problem)))
        wake()
        if problem:
            self._save_later(save, message, closing)

    def _give_up(self, save: Callable[[Message], None]) -> None:
        self.cancel.cancel()
        with self._present_lock:
            self._message = self._current("failed", "This reply could not be shown to its end. The terminal has the details.")
        self._save_final(save, self._message)

    def _save_final(self, save: Callable[[Message], None], message: Message) -> str:
        try:
            save(message)
        except NotFound:
            return ""
        except (DataError, Busy) as error:
            logger.error("%s", error)
            return f"This reply is not saved yet. {error}"
        return ""

    def _save_later(self, save: Callable[[Message], None], message: Message, closing: threading.Event) -> None:
        for seconds in SAVE_RETRY_SECONDS:
            last_chance = closing.wait(seconds)
            if not self._save_final(save, message):
                logger.info("The reply that could not be saved is saved now.")
                return
            if last_chance:
                return


def _with_problem(message: Message, problem: str) -> Message:
    return replace(message, details={**message.details, "error": problem}) if problem else message


class Replies:
    """All running replies, the last finished ones, and each owner's news. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._replies: OrderedDict[str, Reply] = OrderedDict()
        self._busy: set[tuple[str, str]] = set()
        self._news: OrderedDict[str, Ring] = OrderedDict()
        self._wakes: dict[str, set[Callable[[], None]]] = {}
        self._closing = threading.Event()

    @contextmanager
    def starting(self, owner: str, conversation: str) -> Iterator[None]:
        """Hold a conversation while a turn is prepared. Raises Busy when `owner` has another prepared or written there."""
        key = owner, conversation
        with self._lock:
            if key in self._busy or any(reply.owner == owner for reply in self.running(conversation)):
                raise Busy("A reply is being written in this chat. Wait for its end, or stop it, then send again.")
            self._busy.add(key)
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(key)

    def start(self, reply: Reply, pieces: Callable[[], Iterable[Piece]], save: Callable[[Message], None]) -> None:
        """Run `reply` to its end on threads of its own. Returns at once."""
        with self._lock:
            if self._closing.is_set():
                raise Busy("The server is shutting down. Your text is kept; send it again when the server is back.")
            former = self._replies.get(reply.id)
            if former:  # continued: a tab that knows the former's events must not take these for them
                reply.ring = Ring(last=former.ring.last)
            self._replies[reply.id] = reply
            self._forget_finished()
        threading.Thread(target=reply.produce, args=(pieces,), name=f"reply-{reply.id[:8]}", daemon=True).start()

        def wake() -> None:
            self.wake(reply.owner)

        def publish() -> None:
            reply.publish(save, wake, self._closing)
            self.tell(reply.owner, "conversation", {"id": reply.conversation})  # it is no longer running
            if not reply.told:
                self.tell(reply.owner, "changed", {"conversation": reply.conversation})

        threading.Thread(target=publish, name=f"publish-{reply.id[:8]}", daemon=True).start()

    def _forget_finished(self) -> None:
        finished = [key for key, reply in self._replies.items() if reply.finished.is_set()]
        for key in finished[: max(0, len(finished) - FINISHED_KEPT)]:
            del self._replies[key]

    def get(self, owner: str, reply: str) -> Reply | None:
        """The running or lately finished reply of `owner`, or None."""
        with self._lock:
            found = self._replies.get(reply)
        return found if found and found.owner == owner else None

    def now(self, message: Message) -> Message:
        """`message` as it is now, which may be ahead of what was saved; what others decide about it while it runs is in what was saved."""
        with self._lock:
            found = self._replies.get(message.id)
        if not found:
            return message
        now = found.message
        decided = {name: message.details[name] for name in ("pinned", "chosen") if name in message.details}
        return replace(now, details={**{k: v for k, v in now.details.items() if k not in ("pinned", "chosen")}, **decided})

    def running(self, conversation: str) -> tuple[Reply, ...]:
        """The replies being written in a conversation: none, one, or several side by side."""
        with self._lock:
            return tuple(r for r in self._replies.values() if r.conversation == conversation and not r.finished.is_set())

    def stop(self, owner: str, reply: str) -> None:
        """Cancel one reply of `owner`; nothing happens to one that has ended. Raises NotFound for one that is not known (any more)."""
        found = self.get(owner, reply)
        if found is None:
            raise NotFound("This reply is not being written any more.")
        found.cancel.cancel()

    # --- news and listeners ---------------------------------------------------------------------------------------------------------

    def news(self, owner: str) -> Ring:
        """The ring of what happens to an owner's conversations."""
        with self._lock:
            ring = self._news.setdefault(owner, Ring())
            self._news.move_to_end(owner)
            while len(self._news) > OWNERS_KEPT:
                self._news.popitem(last=False)
            return ring

    def tell(self, owner: str, type: str, data: Mapping[str, Any]) -> None:
        """Add to an owner's news and wake the owner's listeners."""
        self.news(owner).append(type, data)
        self.wake(owner)

    def listen(self, owner: str, wake: Callable[[], None]) -> Callable[[], None]:
        """Call `wake` after each event of `owner`, from any thread, until the returned function is called. It must not raise."""
        with self._lock:
            self._wakes.setdefault(owner, set()).add(wake)

        def stop() -> None:
            with self._lock:
                left = self._wakes.get(owner, set())
                left.discard(wake)
                if not left:
                    self._wakes.pop(owner, None)

        return stop

    def wake(self, owner: str | None = None) -> None:
        """Wake the listeners of `owner`, or everybody's."""
        with self._lock:
            sets = self._wakes.values() if owner is None else [self._wakes.get(owner, set())]
            wakes = [wake for some in sets for wake in some]
        for wake in wakes:
            wake()

    def close(self, seconds: float = 10.0) -> None:
        """Stop every reply, waiting up to `seconds` in all for them to be saved."""
        self._closing.set()
        with self._lock:
            running = [reply for reply in self._replies.values() if not reply.finished.is_set()]
        for reply in running:
            reply.cancel.cancel()
        deadline = time.monotonic() + seconds
        for reply in running:
            reply.finished.wait(max(0.0, deadline - time.monotonic()))


class Stops:
    """Replies of the API while they run, by answer and by who asked: they can be stopped by another request. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[object, tuple[str, str, tuple[CancelToken, ...]]] = {}

    @contextmanager
    def kept(self, answer: str, client: str, tokens: Iterable[CancelToken]) -> Iterator[None]:
        """Replies that can be stopped meanwhile. `answer`: the id that the client was told, if any."""
        key = object()
        with self._lock:
            self._running[key] = (answer, client, tuple(tokens))
        try:
            yield
        finally:
            with self._lock:
                del self._running[key]

    def stop(self, answer: str = "", client: str = "") -> int:
        """Stop the replies of one answer, those of one client, or all if neither is given; how many."""
        with self._lock:
            running = list(self._running.values())
        found = [token for a, c, tokens in running if answer in ("", a) and client in ("", c) for token in tokens]
        for token in found:
            token.cancel()
        return len(found)
