"""Chat messages: Markdown -> safe HTML, block by block.

    feed() -> _Splitter (sources of top-level blocks) -> markdown-it-py -> Pygments, MathML -> nh3 -> BlockUpdate

A closed block is parsed once and sent once. Only the open block, the source after the last boundary, is parsed again, and that work is bounded,
so the cost of a token does not grow with the reply. Boundaries depend on the text alone, never on how it was cut into deltas: `render_blocks` of
the whole text gives the same blocks.

What differs from GitHub's Markdown: a single newline is a line break; raw HTML is shown as text; reference definitions (`[a]: url`) are shown as
text, because they would change blocks that were already sent; `$`, `$$`, `\\(`, `\\[` and ```` ```math ```` are formulas (no blank line inside);
a remote image becomes a link, because showing a reply must not send a request to another host.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from time import perf_counter

from markdown_it.token import Token

from modules.ui.markdown import PLAIN_FRAME, code_frame, lines_of, parser, to_html

# All limits count characters of source.
SHORT = 2_048  # a shorter open block is drawn at each update
WINDOW = 4_096  # a longer list or quotation is cut between two of its items: the open block stays cheap
WINDOW_MAX = 32_768  # any other block (but a code fence) is cut at the line that passes this
OPEN_LIMIT = 16_384  # a longer open block is shown as plain text until it is closed
HEADER_LIMIT = 2_048  # the header of a table that is cut is repeated, unless it is longer


@dataclass(frozen=True)
class BlockUpdate:
    """A change of one block of a message.

    `append`: `html` is escaped text to be added to the block's only `<code>` element; otherwise `html` replaces the block.
    `closed`: final, this block is never sent again.
    """

    index: int
    html: str
    closed: bool
    append: bool = False


class BlockRenderer:
    """One message while it streams; used by one thread."""

    def __init__(self) -> None:
        self._incoming: list[str] = []
        self._normalise = _Normaliser()
        self._splitter = _Splitter()
        self._closed: list[str] = []
        self._open = _OpenBlock()

    def feed(self, text: str) -> None:
        """Add a delta. Nothing is parsed here."""
        self._incoming.append(text)

    def updates(self) -> list[BlockUpdate]:
        """What changed since the last call: blocks that were closed, each once, then the open block."""
        closed = self._close(self._splitter.push(self._take()))
        shown = self._open.show(len(self._closed), self._splitter)
        return closed + ([shown] if shown else [])

    def finish(self) -> list[BlockUpdate]:
        """Close everything. A second call returns nothing."""
        return self._close(self._splitter.push(self._take()) + self._splitter.finish())

    def blocks(self) -> list[str]:
        """HTML of every block as of the last `updates()` or `finish()`: the snapshot to which later updates apply."""
        return [*self._closed, *([html] if (html := self._open.html) else [])]

    def _take(self) -> str:
        text = self._normalise("".join(self._incoming))
        self._incoming.clear()
        return text

    def _close(self, sources: Sequence[str]) -> list[BlockUpdate]:
        first = len(self._closed)
        self._closed += map(to_html, sources)
        if sources:
            self._open = _OpenBlock()
        return [BlockUpdate(index, self._closed[index], closed=True) for index in range(first, len(self._closed))]


def render_blocks(text: str) -> list[str]:
    """Safe HTML of each block of a finished message; the same as streaming gives."""
    renderer = BlockRenderer()
    renderer.feed(text)
    renderer.finish()
    return renderer.blocks()


def render_plain(text: str) -> str:
    """Text exactly as typed, as safe HTML: nothing is interpreted, newlines and spaces are kept."""
    return f'<div class="tgw-plain">{escape(_Normaliser()(text), quote=False)}</div>'


class _Normaliser:
    """Line ends to \\n, also when \\r and \\n come in two deltas; NUL and lone surrogates to U+FFFD (nh3 takes UTF-8 only)."""

    _BAD = re.compile("[\0\ud800-\udfff]")

    def __init__(self) -> None:
        self._after_return = False

    def __call__(self, text: str) -> str:
        if not text:
            return text
        if self._after_return and text[0] == "\n":
            text = text[1:]
            self._after_return = False
        if text:
            self._after_return = text[-1] == "\r"
        return self._BAD.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


class _OpenBlock:
    """The block that still grows, as the page shows it."""

    def __init__(self) -> None:
        self._source = ""
        self._parts: list[str] = []
        self._tail = ""
        self._mode = ""
        self._rest_until = 0.0

    @property
    def html(self) -> str:
        return "".join(self._parts) + self._tail

    def show(self, index: int, splitter: _Splitter) -> BlockUpdate | None:
        """The update that brings the page to the splitter's open source; None when there is nothing new."""
        if splitter.fence:
            return self._append(index, "fence", splitter.fence.fresh(splitter.open), code_frame(splitter.fence.info))
        if splitter.open.isspace() or splitter.open == self._source:
            return None
        if len(splitter.open) > OPEN_LIMIT:
            fresh = splitter.open[len(self._source) if self._mode == "plain" else 0 :]
            self._source = splitter.open
            return self._append(index, "plain", fresh, PLAIN_FRAME)
        return self._replace(index, splitter.open)

    def _append(self, index: int, mode: str, text: str, frame: tuple[str, str]) -> BlockUpdate | None:
        html = escape(text, quote=False)
        if self._mode != mode:
            self._mode, self._parts, self._tail = mode, [frame[0], html], frame[1]
            return BlockUpdate(index, self.html, closed=False)
        self._parts.append(html)
        return BlockUpdate(index, html, closed=False, append=True) if html else None

    def _replace(self, index: int, source: str) -> BlockUpdate | None:
        """A long block is drawn again only after a rest of ten times what drawing it took: a tenth of a core, and no lag where tokens are slow."""
        started = perf_counter()
        if len(source) > SHORT and started < self._rest_until:
            return None
        self._source, html = source, to_html(source, still_open=True)
        self._rest_until = perf_counter() + 10 * (perf_counter() - started)
        if html == self.html:
            return None
        self._parts = [html]
        return BlockUpdate(index, html, closed=False)


# Boundaries -----------------------------------------------------------------------------------------------------------------------------------


class _Splitter:
    """Cuts growing text into the sources of its top-level blocks.

    Only complete lines are looked at, always the same windows of them, so that the cuts depend on the text alone: a block is closed when
    markdown-it sees the next one begin. That holds for every longer text too, because none of the enabled rules looks back over a boundary.
    """

    _BLANK = re.compile(r"(?:[ \t]*\n)+")

    def __init__(self) -> None:
        self.open = ""  # source after the last boundary, or the incomplete last line of an open fence
        self.fence: _Fence | None = None
        self._seen = 0  # characters of `open` at the last look

    def push(self, text: str) -> list[str]:
        """Add text; the sources of the blocks it closes."""
        self.open += text
        return list(self._closed_sources()) if "\n" in text else []

    def finish(self) -> list[str]:
        """The sources that were still open."""
        if self.open and not self.open.endswith("\n"):
            self.open += "\n"
        self._seen = 0  # look now
        sources = list(self._closed_sources())
        last = (self.fence.source() if self.fence else "") + self.open
        self.open, self.fence = "", None
        return [*sources, last] if last and not last.isspace() else sources

    def _closed_sources(self) -> Iterator[str]:
        while True:
            if self.fence:
                source = self._fence_end()
                if source is None:
                    return
                yield source
            if blank := self._BLANK.match(self.open):
                self.open = self.open[blank.end() :]
            if WINDOW < len(self.open) < self._seen * 17 // 16:
                return  # a look costs as much as the block is long: look seldom, the mean cost of a character stays constant
            before = self.open
            yield from self._look(WINDOW)
            if before is self.open:
                self._seen = len(before)
                return
            self._seen = 0

    def _look(self, size: int) -> Iterator[str]:
        """Cut the first window of complete lines at its boundaries; a full window without one is widened, then cut inside the block."""
        full = self.open.find("\n", size - 1) + 1
        window = self.open[: full or self.open.rfind("\n") + 1]
        if not window:
            return
        tokens: list[Token] = []
        parser().block.parse(window, parser(), {}, tokens)
        tops = [token for token in tokens if token.level == 0 and token.nesting >= 0]
        offsets = [0, *(newline.end() for newline in re.finditer("\n", window))]
        if len(tops) > 1:
            # After a widened look only the first block: the next ones may be long enough to be cut inside a window of their own.
            starts = [offsets[lines_of(token)[0]] for token in (tops if size == WINDOW else tops[:2])]
            self.open = self.open[starts[-1] :]
            yield from (window[start:end] for start, end in pairwise(starts))
        elif tops[0].type == "fence":
            self.fence = _Fence(window[: offsets[1]], tops[0])
            self.open = self.open[offsets[1] :]
        elif full and (child := _last_child(tokens)):
            yield self._cut_at(offsets[child])
        elif full and size < WINDOW_MAX:
            yield from self._look(size * 2)
        elif full:
            header = window[: offsets[2]] if tops[0].type == "table_open" else ""
            yield self._cut_at(full, header if len(header) <= HEADER_LIMIT else "")

    def _cut_at(self, end: int, header: str = "") -> str:
        source, self.open = self.open[:end], header + self.open[end:]
        return source

    def _fence_end(self) -> str | None:
        assert self.fence
        start, source = 0, None
        while source is None and (end := self.open.find("\n", start) + 1):
            source = self.fence.add(self.open[start:end])
            start = end
        self.open = self.open[start:]
        if source is not None:
            self.fence = None
        return source


class _Fence:
    """An open code fence, which is followed line by line: code may be long and needs no parser."""

    def __init__(self, opening: str, token: Token) -> None:
        self.info = token.info
        self.lines_of = [opening]
        self._shown = (1, 0)  # lines, and characters of the line after them
        mark, length = re.escape(token.markup[0]), len(token.markup)
        self._ends = re.compile(rf" {{0,3}}{mark}{{{length},}}[ \t]*\n")
        self._may_end = re.compile(rf" {{0,3}}{mark}*[ \t]*")

    def add(self, line: str) -> str | None:
        """Take a complete line; the source of the whole block when the line closes it."""
        self.lines_of.append(line)
        return self.source() if self._ends.fullmatch(line) else None

    def source(self) -> str:
        return "".join(self.lines_of)

    def fresh(self, incomplete: str) -> str:
        """Code that was not shown yet. `incomplete`, the last line, is held back while it may become the closing mark."""
        lines, characters = self._shown
        visible = "" if self._may_end.fullmatch(incomplete) else incomplete
        self._shown = (len(self.lines_of), len(visible))
        return ("".join(self.lines_of[lines:]) + visible)[characters:]


def _last_child(tokens: Sequence[Token]) -> int:
    """Line at which the last item of a list or quotation begins; 0 when it may not be cut there.

    The rest of an ordered list must go on with the right number, which it has only when the source counts.
    """
    if tokens[0].type not in ("bullet_list_open", "ordered_list_open", "blockquote_open"):
        return 0
    children = [token for token in tokens if token.level == 1 and token.nesting >= 0]
    first, last = children[0].info, children[-1].info
    if tokens[0].type == "ordered_list_open" and int(last) != int(first) + len(children) - 1:
        return 0
    return lines_of(children[-1])[0]
