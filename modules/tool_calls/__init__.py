"""Calls of tools in a reply's text: told from prose while it streams, whatever format the model writes them in.

One file a format, which holds its marks and how it is read; `reader` is what they read with; here is the streaming, once. Like `streams`:
`feed` what came, `finish` at the end; any cutting of a text into pieces gives the same result, and a piece costs its own length plus the
longest marker, however long the reply has become.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache

from modules.tool_calls import deepseek, gemma, generic, glm, gpt_oss, hermes, kimi, llama, minimax, mistral, pythonic, qwen_coder
from modules.tool_calls.json_text import loads
from modules.tool_calls.objects import from_value
from modules.tool_calls.reader import Format, NoCall, Reader, Steps
from modules.tool_calls.schema import grammar_schema

__all__ = ["FORMATS", "Format", "ToolCall", "ToolDelta", "ToolStream", "formats_for", "grammar_schema", "new_call_id", "parse_forced"]

FORMATS = (
    deepseek.FORMAT, kimi.FORMAT, gpt_oss.FORMAT, gemma.FORMAT, minimax.FORMAT, glm.FORMAT, qwen_coder.FORMAT, hermes.FORMAT,
    mistral.FORMAT, llama.BARE, llama.TAGGED, llama.ANSWER, pythonic.FORMAT, generic.FORMAT,
)  # fmt: skip
"""In the order in which they are tried; the first that reads a call has it."""
_MAX_SPACE = 64  # white space held back before what may be a call
_VISIBLE = re.compile(r"\S")
_LETTERS = string.ascii_lowercase + string.digits


@dataclass(frozen=True)
class ToolCall:
    """One call: `index` counts those of a reply, `arguments` is the text of a JSON object."""

    id: str
    index: int
    name: str
    arguments: str


@dataclass(frozen=True)
class ToolDelta:
    """A piece of prose or one whole call; never both."""

    text: str = ""
    call: ToolCall | None = None


def new_call_id() -> str:
    """`call_` and eight letters or digits."""
    return "call_" + "".join(secrets.choice(_LETTERS) for _ in range(8))


def formats_for(template: str) -> tuple[Format, ...]:
    """The formats whose hint stands in `template`, with those that need none; all, when no hint does."""
    hinted = {row.name for row in FORMATS if any(hint in template for hint in row.hints)}
    return tuple(row for row in FORMATS if not hinted or not row.hints or row.name in hinted)


class ToolStream:
    """Tells calls from prose. Only `names` are tools, a mapping has the schemas of their parameters; `template` tells which formats the model writes.

    A place where a call may begin is tried with each format in turn. Text is withheld while it can be a call; when it is none it is given out
    unchanged up to where that showed, and the search goes on there. White space before a call is dropped. `begins`: what the prompt holds of
    the reply already, such as a marker that the template writes; it is read but not given out again.
    """

    def __init__(self, names: Collection[str], template: str = "", new_id: Callable[[], str] = new_call_id, begins: str = "") -> None:
        self._formats = formats_for(template) if any(names) else ()
        self._opening = _opening(self._formats, "".join(sorted({name[0] for name in names if name})))
        self._reader = Reader({name: names[name] if isinstance(names, Mapping) else None for name in names if name})
        self._new_id = new_id
        self._steps: Steps[None] | None = None  # of the format that is being tried
        self._untried: list[Format] = []
        self._called = False  # whether what is tried was a call
        self._far = 0  # how far any format could read here
        self._beginning = bool(self._formats)  # no prose yet
        self._space = ""
        self._index = 0
        self._known = 0  # characters withheld that are not to be given out
        self._deltas: list[ToolDelta] = []
        self._prose: list[str] = []
        if begins:
            self.feed(begins)
            self._known, self._index, self._space = self._reader.held, 0, ""

    def feed(self, text: str) -> list[ToolDelta]:
        """What can be given out now, in order."""
        self._reader.feed(text)
        while self._try() if self._steps else self._search():
            pass
        self._flush()
        deltas, self._deltas = self._deltas, []
        return deltas

    def finish(self) -> list[ToolDelta]:
        """What was withheld: a call that only lacks its end marker, else text."""
        self._reader.more = False
        deltas = self.feed("")
        return [*deltas, ToolDelta(self._space)] if self._space else deltas

    def _search(self) -> bool:
        """To the next place where a call may begin; False: none yet."""
        reader = self._reader
        found = (_VISIBLE if self._beginning else self._opening).search(reader.window, reader.place)
        reader.place = found.start() if found else len(reader.window)
        self._say(reader.take())
        if not found:
            return False
        self._untried = list(self._formats if self._beginning else _candidates(self._formats, found[0], reader.at_line_start))
        if self._untried:
            self._far, self._called = 0, False
            self._steps = self._untried.pop(0).parse(reader)
        elif reader.more:  # a marker that may go on
            return False
        else:
            reader.place += 1
            self._say(reader.take())
        return True

    def _try(self) -> bool:
        """One step of a format; False: it waits for more text."""
        assert self._steps
        waits = True
        try:
            next(self._steps)
        except (StopIteration, NoCall):
            waits = False
        self._give()
        if not waits:
            self._go_on()
        return not waits

    def _go_on(self) -> None:
        """From the end of calls, or where a format could read no call."""
        reader, self._steps = self._reader, None
        if self._called:
            self._say(reader.take())
            return
        self._far = max(self._far, reader.kept)
        reader.rewind()
        if self._untried:
            self._steps = self._untried.pop(0).parse(reader)
        else:
            reader.place += max(self._far, 1)
            self._say(reader.take())

    def _give(self) -> None:
        for name, arguments in self._reader.calls:
            self._flush()
            self._deltas.append(ToolDelta(call=ToolCall(self._new_id(), self._index, name, arguments)))
            self._index += 1
            self._space, self._known, self._called = "", 0, True
        self._reader.calls.clear()

    def _say(self, text: str) -> None:
        """Prose; the white space at its end waits for what follows."""
        known = min(self._known, len(text))
        self._known -= known
        self._beginning = self._beginning and not text.strip()
        text = self._space + text[known:]
        cut = max(len(text.rstrip()), len(text) - _MAX_SPACE)
        self._prose.append(text[:cut])
        self._space = text[cut:]

    def _flush(self) -> None:
        if prose := "".join(self._prose):
            self._deltas.append(ToolDelta(prose))
        self._prose = []


@lru_cache(maxsize=64)
def _opening(formats: tuple[Format, ...], firsts: str) -> re.Pattern[str]:
    """Where a call may begin: what can begin one where a line begins; or a start marker, whole or cut off by the end of the text."""
    line = [f"^[{re.escape(firsts)}\\[]"] if any(row.line for row in formats) else []
    marks = [_beginning_of(start) for start in sorted({start for row in formats for start in row.starts})]
    return re.compile("|".join(line + marks) or r"(?!)", re.MULTILINE)


@lru_cache(maxsize=1024)
def _candidates(formats: tuple[Format, ...], mark: str, line: bool) -> tuple[Format, ...]:
    """The formats that `mark`, which `_opening` found, may begin; none when it is cut off."""
    if line and len(mark) == 1:
        return tuple(row for row in formats if row.line or any(start[0] == mark for start in row.starts))
    return tuple(row for row in formats if any(mark.startswith(start) for start in row.starts))


def _beginning_of(marker: str) -> str:
    pattern = ""
    for character in reversed(marker[1:]):
        pattern = rf"(?:{re.escape(character)}{pattern}|\Z)"
    return re.escape(marker[0]) + pattern


def parse_forced(text: str, names: Collection[str], new_id: Callable[[], str] = new_call_id) -> list[ToolCall]:
    """The calls of a reply that followed `grammar_schema`; none when it is not whole or a tool is not of `names`."""
    try:
        found = from_value(loads(text), names)
    except ValueError:
        return []
    return [ToolCall(new_id(), index, name, arguments) for index, (name, arguments) in enumerate(found)]
