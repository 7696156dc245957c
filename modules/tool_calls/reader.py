"""Reading a call out of text that is still growing.

A format's `parse` is a generator over a Reader: each step reads on from where the last one ended and yields where it needs more text, so every
character is read once, however the text is cut. What cannot be a call raises NoCall; the stream then gives out what was read as text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from modules.tool_calls.json_text import MAX_DEPTH, arguments_text, loads

T = TypeVar("T")
Steps: TypeAlias = Generator[None, None, T]
Found: TypeAlias = tuple[str, str]
"""A call: the tool's name, and its arguments as the text of a JSON object."""

_ANYTHING = re.compile(r".*", re.DOTALL)
_SPACE = re.compile(r"\s*")
_BETWEEN = re.compile(r"[\s:,0-9.+\-aeflnrstuE]*")  # what JSON has outside of strings and brackets
_BODY = {quote: re.compile(rf"[^{quote}\\]*(?:\\.[^{quote}\\]*)*", re.DOTALL) for quote in "\"'"}
_CLOSING = {"{": "}", "[": "]"}


class NoCall(Exception):
    """What was read is no call."""


@dataclass(frozen=True)
class Format:
    """How a family of models writes calls.

    `hints`: with any of these in a template its model writes so; none: any model may. `starts`: what can begin a call anywhere in a reply;
    `marks`: what else is written around it. `line`: a call may also stand at the beginning of a line. Every format is tried where the answer begins.
    """

    name: str
    parse: Callable[[Reader], Steps[None]]
    hints: tuple[str, ...] = ()
    starts: tuple[str, ...] = ()
    line: bool = False
    marks: tuple[str, ...] = ()


class Reader:
    """A window onto the text, and a place in it. What was read before the window is kept until it is a call or text.

    For the stream: `feed`, `rewind`, `take`, `held`, `calls`; for formats the rest.
    """

    def __init__(self, tools: Mapping[str, Any]) -> None:
        self.names = frozenset(tools)
        self.tools = tools
        """The schemas of their parameters, where they are known."""
        self.more = True
        self.window = ""
        self.place = 0
        self.calls: list[Found] = []
        self._start = 0  # of what is kept, in the window
        self._passed: list[str] = []  # what is kept and no longer in the window

    @property
    def kept(self) -> int:
        """Characters read since the last call or text."""
        return sum(map(len, self._passed)) + self.place - self._start

    @property
    def held(self) -> int:
        """Characters that came and were neither a call nor text yet."""
        return self.kept + len(self.window) - self.place

    @property
    def at_line_start(self) -> bool:
        """Whether a line begins here. (The window keeps a character before its place.)"""
        return not self.place or self.window[self.place - 1] == "\n"

    def feed(self, text: str) -> None:
        """More text, behind what is there."""
        if self.place > self._start:
            self._passed.append(self.window[self._start : self.place])
        cut = max(self.place - 1, 0)
        self.window = self.window[cut:] + text
        self.place = self._start = self.place - cut

    def rewind(self) -> None:
        """Back to where what is kept begins."""
        if self._passed:
            self.window = "".join(self._passed) + self.window[self._start :]
            self._start = 0
            self._passed.clear()
        self.place = self._start

    def take(self) -> str:
        """What is kept, and it is kept no longer."""
        text = "".join(self._passed) + self.window[self._start : self.place]
        self.commit()
        return text

    def commit(self, *calls: Found) -> None:
        """What was read up to here was these calls, or belongs to the calls before."""
        self.calls += calls
        self._passed.clear()
        self._start = self.place

    def call(self, name: str, arguments: Any) -> None:
        """What was read up to here was this call."""
        try:
            self.commit((name, arguments_text(arguments)))
        except ValueError as error:
            raise NoCall from error

    def _wait(self) -> Steps[None]:
        if not self.more:
            raise NoCall
        yield

    def literal(self, *options: str) -> Steps[str]:
        """One of `options`, the longest that stands here. Reads nothing when it raises NoCall."""
        ordered = sorted(options, key=len, reverse=True)
        while True:
            rest = len(self.window) - self.place
            for option in ordered:
                if self.window.startswith(option, self.place):
                    self.place += len(option)
                    return option
                if rest < len(option) and self.more and option.startswith(self.window[self.place :]):
                    break
            else:
                raise NoCall
            yield

    def maybe(self, *options: str) -> Steps[str]:
        """One of `options`, or ""."""
        try:
            return (yield from self.literal(*options))
        except NoCall:
            return ""

    def name(self) -> Steps[str]:
        """The name of an offered tool."""
        return self.literal(*self.names)

    def run(self, pattern: re.Pattern[str]) -> Steps[str]:
        """As many characters as `pattern` (a set of characters with a star) takes; up to the end of the text if need be."""
        pieces = []
        while True:
            match = pattern.match(self.window, self.place)
            assert match
            pieces.append(match[0])
            self.place = match.end()
            if self.place < len(self.window) or not self.more:
                return "".join(pieces)
            yield

    def space(self) -> Steps[str]:
        """White space, or nothing."""
        return self.run(_SPACE)

    def ahead(self) -> Steps[str]:
        """The next character, not read; "" at the end of the text."""
        while self.place == len(self.window) and self.more:
            yield
        return self.window[self.place : self.place + 1]

    def end(self) -> Steps[None]:
        """The end of the text."""
        if (yield from self.ahead()):
            raise NoCall

    def closing(self, *ends: str) -> Steps[str]:
        """White space and an end marker, which belong to the call before; else "", and the white space may become text.

        An end marker that the end of the text cuts off belongs to the call too.
        """
        yield from self.space()
        end = yield from self.maybe(*ends)
        rest = "" if self.more or end else self.window[self.place :]
        if rest and any(end.startswith(rest) for end in ends):
            self.place = len(self.window)
            end = rest
        if end:
            self.commit()
        return end

    def until(self, end: str) -> Steps[str]:
        """What stands before `end`; `end` is read too."""
        pieces = []
        while (found := self.window.find(end, self.place)) < 0:
            safe = max(self.place, len(self.window) - len(end) + 1)
            pieces.append(self.window[self.place : safe])
            self.place = safe
            yield from self._wait()
        pieces.append(self.window[self.place : found])
        self.place = found + len(end)
        return "".join(pieces)

    def header(self, end: str, most: int = 200, pattern: re.Pattern[str] = _ANYTHING) -> Steps[str]:
        """What stands before `end`, a `pattern` of at most `most` characters; `end` is read too. Reads nothing when it raises NoCall."""
        while (found := self.window.find(end, self.place, self.place + most + len(end))) < 0:
            if len(self.window) - self.place >= most + len(end):
                raise NoCall
            yield from self._wait()
        if not pattern.fullmatch(self.window, self.place, found):
            raise NoCall
        text = self.window[self.place : found]
        self.place = found + len(end)
        return text

    def quoted(self, quote: str) -> Steps[str]:
        """A string's body as it is written, with its escapes, after the opening quote; the closing quote is read too."""
        pieces = []
        while True:
            match = _BODY[quote].match(self.window, self.place)
            assert match
            pieces.append(match[0])
            self.place = match.end()
            if self.window.startswith(quote, self.place):
                self.place += 1
                return "".join(pieces)
            yield from self._wait()  # a lone backslash at the end of the window waits for what it escapes

    def json(self, head: str, opened: str) -> Steps[Any]:
        """A JSON value of which `head` was read and in which the brackets `opened` are open."""
        pieces, stack = [head], [_CLOSING[bracket] for bracket in opened]
        while stack:
            match = _BETWEEN.match(self.window, self.place)
            assert match
            self.place = match.end()
            bracket = self.window[self.place : self.place + 1]
            pieces += match[0], bracket
            if not bracket:
                yield from self._wait()
                continue
            if bracket not in '"{[' and bracket != stack[-1]:
                raise NoCall
            self.place += 1
            if bracket == '"':
                pieces += (yield from self.quoted('"')), '"'
            elif bracket == stack[-1]:
                stack.pop()
            elif len(stack) < MAX_DEPTH:
                stack.append(_CLOSING[bracket])
            else:
                raise NoCall
        try:
            return loads("".join(pieces))
        except ValueError as error:
            raise NoCall from error

    def object(self) -> Steps[Any]:
        """A JSON object."""
        yield from self.literal("{")
        return (yield from self.json("{", "{"))
