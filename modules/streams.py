"""What happens to a reply's text on its way to the reader: thinking is told from the answer, the answer ends at a stop string; in chats
with characters the speaker's name before it is taken away.

Small state machines over text deltas: `feed` what came, `finish` at the end. Any cutting of a text into pieces gives the same result.
A piece costs its own length plus at most the longest marker, however long the reply has become.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

REPLACED = "\N{REPLACEMENT CHARACTER}"
"""The text of a token that is a part of a character."""


@dataclass(frozen=True)
class Delta:
    """A piece of the answer or of the thinking; never both."""

    text: str = ""
    reasoning: str = ""


class _Markers:
    """Finds fixed strings in text that is still growing."""

    def __init__(self, markers: Sequence[str]) -> None:
        # Longest first: of two that match at one place the longer wins, and a longer one that may still come is waited for.
        self._markers = sorted({marker for marker in markers if marker}, key=len, reverse=True)
        self._longest = max(map(len, self._markers), default=0)
        firsts = "".join(sorted({re.escape(marker[0]) for marker in self._markers}))
        self._starts = re.compile(f"[{firsts}]" if firsts else r"(?!)")

    def at(self, text: str, place: int, more: bool) -> str | None:
        """The marker at `place`; "" when there is none; None when that is not known yet and `more` text can come."""
        rest = text[place:] if len(text) - place < self._longest else ""
        for marker in self._markers:
            if text.startswith(marker, place):
                return marker
            if more and rest and marker.startswith(rest):
                return None
        return ""

    def find(self, text: str, more: bool = True) -> tuple[int, str]:
        """Place of the earliest marker and the marker; (place, "") when nothing is decided from `place` on."""
        for start in self._starts.finditer(text):
            marker = self.at(text, start.start(), more)
            if marker is None:
                return start.start(), ""
            if marker:
                return start.start(), marker
        return len(text), ""


class StopStrings:
    """Ends a text at the earliest of some strings (the longest of those at one place). The stop itself is not part of the text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._markers = _Markers(stops)
        self._held = ""
        self.matched = ""
        self.withheld = 0
        """Characters at the end of what was fed that are not given out: what may become a stop string, or one and what came after it."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string came; what is fed afterwards is ignored."""
        return bool(self.matched)

    def feed(self, text: str) -> str:
        """What can be shown now. The beginning of a possible stop at the end is withheld."""
        return self._advance(text, more=True)

    def finish(self) -> str:
        """What was withheld and turned out to be text."""
        return self._advance("", more=False)

    def _advance(self, text: str, more: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        place, self.matched = self._markers.find(text, more)
        self._held = "" if self.matched else text[place:]
        self.withheld = len(text) - place
        return text[:place]


@dataclass(frozen=True)
class ThinkingFormat:
    """How a family of models marks its thinking. With `content`, whatever stands between `end` and `content` is a header and is dropped."""

    start: str
    end: str
    content: str = ""


FORMATS = (
    ThinkingFormat("<think>", "</think>"),
    ThinkingFormat("<seed:think>", "</seed:think>"),
    ThinkingFormat("<|channel|>analysis<|message|>", "<|end|>", "<|channel|>final<|message|>"),
    ThinkingFormat("<|channel|>commentary<|message|>", "<|end|>", "<|channel|>final<|message|>"),
    ThinkingFormat("<|channel>thought", "<channel|>"),
    ThinkingFormat("thought\n", "<channel|>"),
    ThinkingFormat("<|think|>", "<|end|>", "<|content|>"),
    ThinkingFormat("[THINK]", "[/THINK]"),
    ThinkingFormat("<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>"),
)
_BY_START = {row.start: row for row in FORMATS}
_CONTENT = frozenset(row.content for row in FORMATS if row.content)
_OPENING = _Markers([*_BY_START, *_CONTENT])
_MAX_SPACE = 64  # white space held back before a start marker
_MAX_HEADER = 200  # text held back between thinking and a content marker


def opened_by(prompt: str) -> ThinkingFormat | None:
    """The format whose thinking a reply to `prompt` begins in, because the prompt ends with its start; None: it begins outside."""
    tail = prompt[-200:].rstrip()
    return next((row for start, row in _BY_START.items() if tail.endswith(start)), None)


class ReasoningSplitter:
    """Tells thinking from answer.

    Thinking opens at the very beginning of a reply (after white space) and nowhere later, so markers quoted in an answer are text; formats
    with a content marker may open it again before the answer begins. When `prompt` ends with a start marker the reply begins inside
    thinking. `text` and `reasoning` are what the reply has already, at the prompt's end, and goes on from: within the answer when there is
    text, else within the thinking. A lone end marker is text: what was shown as answer is not taken back. Line breaks at the beginning of
    thinking, and of an answer after thinking, are dropped.
    """

    def __init__(self, prompt: str = "", text: str = "", reasoning: str = "") -> None:
        self._held = ""
        self._trim = False
        self._state = self._begin
        if text:
            self._answer(trim=False)
        elif reasoning:
            written = len(reasoning.lstrip())  # a template may have dropped the line breaks before it
            self._think(opened_by(prompt[: len(prompt) - written]) or FORMATS[0], trim=False)
        elif row := opened_by(prompt):
            self._think(row)

    def feed(self, text: str) -> list[Delta]:
        """What can be shown now, in order."""
        return self._run(text, more=True)

    def finish(self) -> list[Delta]:
        """What was withheld; unfinished thinking stays thinking."""
        return self._run("", more=False)

    def _run(self, text: str, more: bool) -> list[Delta]:
        self._held += text
        deltas: list[Delta] = []
        state = None
        # A state that consumes its end hands the rest of the text to the next one.
        while state is not self._state:
            state = self._state
            state(deltas, more)
        return deltas

    def _think(self, row: ThinkingFormat, trim: bool = True) -> None:
        self._row = row
        self._ends = _Markers([row.end, row.content])
        self._trim = trim
        self._state = self._thinking

    def _answer(self, trim: bool) -> None:
        self._trim = trim
        self._state = self._answering

    def _take(self, length: int) -> str:
        """The next characters of what is held, without leading line breaks where those are dropped."""
        piece, self._held = self._held[:length], self._held[length:]
        if self._trim:
            piece = piece.lstrip("\r\n")
            self._trim = not piece
        return piece

    def _begin(self, deltas: list[Delta], more: bool) -> None:
        space = len(self._held) - len(self._held.lstrip())
        marker = _OPENING.at(self._held, space, more) if space <= _MAX_SPACE else ""
        if marker is None or (more and space == len(self._held) <= _MAX_SPACE):
            return
        self._held = self._held[space + len(marker) :] if marker else self._held
        self._open(marker)

    def _open(self, marker: str) -> None:
        if marker in _BY_START:
            self._think(_BY_START[marker])
        else:
            self._answer(trim=marker in _CONTENT)

    def _thinking(self, deltas: list[Delta], more: bool) -> None:
        place, marker = self._ends.find(self._held, more)
        if piece := self._take(place):
            deltas.append(Delta(reasoning=piece))
        if not marker:
            return
        self._held = self._held[len(marker) :]
        if self._row.content and marker == self._row.end:
            self._state = self._between
        else:
            self._answer(trim=True)

    def _between(self, deltas: list[Delta], more: bool) -> None:
        if "to=functions." in self._held:  # the header of a call, which is for whoever reads calls
            self._answer(trim=True)
            return
        place, marker = _OPENING.find(self._held, more)
        if marker and place <= _MAX_HEADER:
            self._held = self._held[place + len(marker) :]
            self._open(marker)
        elif not more and self._held.lstrip().startswith("<|"):
            self._held = ""  # the reply ended within the header
        elif not more or place > _MAX_HEADER:
            self._answer(trim=True)  # no header after all

    def _answering(self, deltas: list[Delta], more: bool) -> None:
        if piece := self._take(len(self._held)):
            deltas.append(Delta(text=piece))


class NamePrefix:
    """Takes white space, one of some names with a colon, and white space after it away from the beginning of a text."""

    def __init__(self, names: Sequence[str]) -> None:
        self._markers = _Markers([f"{name}:" for name in names if name])
        self._held = ""
        self._looking = self._trim = True

    def feed(self, text: str) -> str:
        """What can be shown now. The beginning of a possible name is withheld."""
        return self._advance(text, more=True)

    def finish(self) -> str:
        """What was withheld and turned out to be text."""
        return self._advance("", more=False)

    def _advance(self, text: str, more: bool) -> str:
        self._held += text
        if self._looking and not self._past_name(more):
            return ""
        text, self._held = self._held, ""
        if self._trim:
            text = text.lstrip()
            self._trim = not text
        return text

    def _past_name(self, more: bool) -> bool:
        """Whether it is known where the text begins; a name is then gone."""
        self._held = self._held.lstrip()
        name = self._markers.at(self._held, 0, more) if self._held else None
        if name is None and more:
            return False
        self._held = self._held[len(name or "") :]
        self._looking = False
        return True


class ReplyStream:
    """A reply's raw text to the thinking and the answer that a reader sees. Stop strings act on the answer, not on thinking.

    `prompt`: the exact text that the model goes on from. `text`, `reasoning`: what the reply consists of already (see ReasoningSplitter).
    `names`: white space and one of these with a colon are no part of the answer where they begin it; an answer that is there already goes on
    as it is.
    """

    def __init__(self, stops: Sequence[str] = (), prompt: str = "", text: str = "", reasoning: str = "", names: Sequence[str] = ()) -> None:
        self._splitter = ReasoningSplitter(prompt, text, reasoning)
        self._prefix = NamePrefix(names) if names and not text else None
        self._stops = StopStrings(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string came: nothing more will be shown and generation can end."""
        return self._stops.stopped

    @property
    def matched(self) -> str:
        """The stop string that came, or ""."""
        return self._stops.matched

    @property
    def withheld(self) -> int:
        """See StopStrings."""
        return self._stops.withheld

    def feed(self, text: str) -> list[Delta]:
        """What can be shown now, in order."""
        return self._shown(self._splitter.feed(text))

    def finish(self) -> list[Delta]:
        """What was withheld."""
        deltas = self._shown(self._splitter.finish())
        rest = self._stops.feed(self._prefix.finish()) if self._prefix else ""
        rest += self._stops.finish()
        return [*deltas, Delta(text=rest)] if rest else deltas

    def _shown(self, deltas: list[Delta]) -> list[Delta]:
        kept = [Delta(text=self._answer(delta.text)) if delta.text else delta for delta in deltas]
        return [delta for delta in kept if delta.text or delta.reasoning]

    def _answer(self, text: str) -> str:
        return self._stops.feed(self._prefix.feed(text) if self._prefix else text)


def token_places(text: str, tokens: Sequence[str]) -> list[int]:
    """Where each of `tokens`, which make up `text`, begins in it. A part of a character, whose text is U+FFFD, begins where that character does.

    How many parts a character has is not known here: those between two whole tokens are taken to be shared out evenly.
    """
    places: list[int] = []
    place = parts = 0

    def share_out(end: int) -> None:
        for number in range(parts):
            places.append(place + number * (end - place) // parts)

    for token in tokens:
        if REPLACED in token and not text.startswith(token, place):
            token = token.rstrip(REPLACED)  # noqa: PLW2901  whole characters before the part of one
            if not token:
                parts += 1
                continue
        if parts:
            found = text.find(token, place + 1)
            end = found if found >= 0 else min(place + 1, len(text))
            share_out(end)
            place, parts = end, 0
        places.append(place)
        place += len(token) if text.startswith(token, place) else 0  # else a token that is not shown
    share_out(len(text))
    return places
