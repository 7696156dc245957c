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
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape, unescape
from itertools import pairwise
from time import perf_counter, thread_time
from typing import Any
from xml.etree.ElementTree import Element, tostring

import nh3
from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_core import StateCore
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

# All limits count characters of source.
SHORT = 2_048  # a shorter open block is drawn at each update
WINDOW = 4_096  # a longer list or quotation is cut between two of its items: the open block stays cheap
WINDOW_MAX = 32_768  # any other block (but a code fence) is cut at the line that passes this
OPEN_LIMIT = 16_384  # a longer open block is shown as plain text until it is closed
RENDER_LIMIT = 40_000  # a longer block (one enormous line) stays plain text; a code fence has no limit
BRACKET_LIMIT = 1_000  # a paragraph with more "[" stays text: finding links takes time in proportion to their number times its length
HIGHLIGHT_LIMIT = 100_000  # longer code is not coloured
HIGHLIGHT_SECONDS = 0.5  # of processor time; code that a lexer has not read by then (many are quadratic) stays plain from there on
FORMULA_LIMIT = 2_000
HEADER_LIMIT = 2_048  # the header of a table that is cut is repeated, unless it is longer
MAX_NESTING = 60  # quotations and lists; a deeper block is shown as plain text


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
        self._closed += map(_render, sources)
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
            return self._append(index, "fence", splitter.fence.fresh(splitter.open), _code_frame(splitter.fence.info))
        if splitter.open.isspace() or splitter.open == self._source:
            return None
        if len(splitter.open) > OPEN_LIMIT:
            fresh = splitter.open[len(self._source) if self._mode == "plain" else 0 :]
            self._source = splitter.open
            return self._append(index, "plain", fresh, _PLAIN_FRAME)
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
        self._source, html = source, _render(source, still_open=True)
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
            yield from self._look()
            if before is self.open:
                self._seen = len(before)
                return
            self._seen = 0

    def _look(self, size: int = WINDOW) -> Iterator[str]:
        """Cut the first window of complete lines at its boundaries; a full window without one is widened, then cut inside the block."""
        full = self.open.find("\n", size - 1) + 1
        window = self.open[: full or self.open.rfind("\n") + 1]
        if not window:
            return
        tokens: list[Token] = []
        _markdown().block.parse(window, _markdown(), {}, tokens)
        tops = [token for token in tokens if token.level == 0 and token.nesting >= 0]
        offsets = [0, *(newline.end() for newline in re.finditer("\n", window))]
        if len(tops) > 1:
            starts = [offsets[_lines(token)[0]] for token in tops]
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
        self._lines = [opening]
        self._shown = (1, 0)  # lines, and characters of the line after them
        mark, length = re.escape(token.markup[0]), len(token.markup)
        self._ends = re.compile(rf" {{0,3}}{mark}{{{length},}}[ \t]*\n")
        self._may_end = re.compile(rf" {{0,3}}{mark}*[ \t]*")

    def add(self, line: str) -> str | None:
        """Take a complete line; the source of the whole block when the line closes it."""
        self._lines.append(line)
        return self.source() if self._ends.fullmatch(line) else None

    def source(self) -> str:
        return "".join(self._lines)

    def fresh(self, incomplete: str) -> str:
        """Code that was not shown yet. `incomplete`, the last line, is held back while it may become the closing mark."""
        lines, characters = self._shown
        visible = "" if self._may_end.fullmatch(incomplete) else incomplete
        self._shown = (len(self._lines), len(visible))
        return ("".join(self._lines[lines:]) + visible)[characters:]


def _lines(token: Token) -> tuple[int, int]:
    """First line and line after the last; every block token that opens something has them."""
    assert token.map
    return token.map[0], token.map[1]


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
    return _lines(children[-1])[0]


# Markdown -> HTML -----------------------------------------------------------------------------------------------------------------------------


_OPENS_FENCE = re.compile(r" {0,3}(?:`{3,}[^`\n]*|~{3}[^\n]*)\n")


def _render(source: str, still_open: bool = False) -> str:
    """Safe HTML of one block's source. `still_open`: code and formulas that reach the end of the source are not finished."""
    markdown = _markdown()
    env = {"growing_from": source.count("\n") + (source[-1] != "\n") if still_open else None}
    if len(source) > RENDER_LIMIT and not _OPENS_FENCE.match(source):
        return _plain(source)
    tokens = markdown.parse(source, env)
    if any(token.level >= MAX_NESTING - 1 for token in tokens):
        return _plain(source)  # the parser drops what is nested deeper
    return _cleaner().clean(str(markdown.renderer.render(tokens, markdown.options, env))).strip("\n")


_PLAIN_FRAME = ('<pre class="tgw-plain"><code>', "</code></pre>")


def _plain(source: str) -> str:
    return escape(source.rstrip("\n"), quote=False).join(_PLAIN_FRAME)


class _Markdown(MarkdownIt):
    _LINK = re.compile(r"https?://|mailto:|data:image/(?:png|jpeg|gif|webp);base64,[A-Za-z0-9+/=]+\Z", re.IGNORECASE)

    def validateLink(self, url: str) -> bool:
        return bool(self._LINK.match(url))


@lru_cache(maxsize=1)
def _markdown() -> MarkdownIt:
    """The parser. It keeps no state between calls, so threads share it."""
    options = {"html": False, "breaks": True, "maxNesting": MAX_NESTING, "tasklists": True}
    markdown = _Markdown("commonmark", options).enable(["table", "strikethrough"]).disable(["reference", "html_block", "html_inline"])
    markdown.inline.ruler.push("address", _inline_address)
    markdown.inline.ruler.before("escape", "formula", _inline_formula)
    markdown.block.ruler.before("fence", "formula", _block_formula, {"alt": ["paragraph", "blockquote", "list"]})
    markdown.core.ruler.after("block", "guard", _guard)
    markdown.core.ruler.push("adapt", _adapt)
    markdown.add_render_rule("fence", _fence_html)
    markdown.add_render_rule("code_block", _fence_html)
    markdown.add_render_rule("formula", _formula_html)
    markdown.add_render_rule("table_open", lambda *_: '<div class="tgw-table"><table>\n')
    markdown.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return markdown


_SCHEME = re.compile(r"(?<![A-Za-z0-9])https?\Z", re.IGNORECASE)
_ADDRESS = re.compile(r"://[^\s<>\"`|]{0,2000}[^\s<>\"`|?!.,:;*_~']")


def _inline_address(state: StateInline, silent: bool) -> bool:
    """Markdown-it rule: a bare web address is a link. (linkify-it and gfm_autolink take quadratic time on hostile text.)"""
    if state.src[state.pos] != ":" or state.linkLevel or not (scheme := _SCHEME.search(state.pending[-6:])):
        return False
    rest = _ADDRESS.match(state.src, state.pos, state.posMax)
    if not rest:
        return False
    end = rest.end()
    while state.src[end - 1] == ")" and state.src.count(")", state.pos, end) > state.src.count("(", state.pos, end):
        end -= 1  # the bracket belongs to the sentence
    address = scheme[0] + state.src[state.pos : end]
    if not silent:
        state.pending = state.pending[: -len(scheme[0])]
        state.push("link_open", "a", 1).attrs = {"href": state.md.normalizeLink(address)}
        state.push("text", "", 0).content = address
        state.push("link_close", "a", -1)
    state.pos = end
    return True


def _guard(state: StateCore) -> None:
    for token in state.tokens:
        if token.type == "inline" and token.content.count("[") > BRACKET_LIMIT:
            token.type = "text"


def _adapt(state: StateCore) -> None:
    """Table alignment as an attribute (style is not allowed), remote images as links."""
    for token in state.tokens:
        if token.type in ("th_open", "td_open") and "style" in token.attrs:
            token.attrs = {"align": str(token.attrs["style"]).removeprefix("text-align:")}
        if token.children:
            token.children = list(_local_images(token.children))


def _local_images(tokens: Sequence[Token]) -> Iterator[Token]:
    links = 0
    for token in tokens:
        links += token.nesting if token.type in ("link_open", "link_close") else 0
        address = str(token.attrs.get("src", ""))
        if token.type != "image" or address.lower().startswith("data:image/"):
            yield token
            continue
        text = Token("text", "", 0, content=f"🖼 {token.content.strip() or 'image'}")
        yield from [text] if links else [Token("link_open", "a", 1, attrs={"href": address}), text, Token("link_close", "a", -1)]


# Code -----------------------------------------------------------------------------------------------------------------------------------------


def _fence_html(_: Any, tokens: Sequence[Token], index: int, __: Any, env: dict[str, Any]) -> str:
    token = tokens[index]
    growing = env["growing_from"] is not None and _lines(token)[1] >= env["growing_from"]
    language = _language(token.info)
    if language == "math" and not growing:
        return f"<p>{_formula(token.content.strip(), True, token.content)}</p>\n"
    before, after = _code_frame(token.info)
    return before + (escape(token.content) if growing else _highlight(token.content, language)) + after


def _language(info: str) -> str:
    return "".join(re.findall(r"[\w+#.-]", info.strip().split(" ", 1)[0])[:30]).lower()


def _code_frame(info: str) -> tuple[str, str]:
    """HTML before and after the code. The page's script serves every [data-copy] button."""
    language = _language(info)
    kind = f' class="language-{language}"' if language else ""
    head = (
        f'<div class="tgw-code"><div class="tgw-code-head"><span class="tgw-lang">{language or "text"}</span>'
        f'<button type="button" class="tgw-copy" data-copy="">Copy</button></div><pre class="hl"><code{kind}>'
    )
    return head, "</code></pre></div>\n"


_SLOW_CODE = re.compile(r"[^\n]{400}|\s{100}")  # one step of some lexers takes seconds on it, and a step cannot be interrupted


@lru_cache(maxsize=32)  # code inside a list that is still open is drawn again and again
def _highlight(code: str, language: str) -> str:
    """HTML of `code`, coloured by CSS classes; plain when the language is unknown or the code too long."""
    from pygments import format as to_html
    from pygments.formatters import HtmlFormatter
    from pygments.lexer import DelegatingLexer
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    if not language or len(code) > HIGHLIGHT_LIMIT or _SLOW_CODE.search(code):
        return escape(code)
    try:
        lexer = get_lexer_by_name(language)
    except ClassNotFound:
        return escape(code)
    if isinstance(lexer, DelegatingLexer):  # reads everything before its first token, so that no time limit can hold
        return escape(code)
    return to_html(_timed_tokens(lexer, code), HtmlFormatter(nowrap=True))


def _timed_tokens(lexer: Any, code: str) -> Iterator[tuple[Any, str]]:
    from pygments.token import Text

    end = thread_time() + HIGHLIGHT_SECONDS
    for position, kind, value in lexer.get_tokens_unprocessed(code):
        if thread_time() > end:
            yield Text, code[position:]
            return
        yield kind, value


# Formulas -------------------------------------------------------------------------------------------------------------------------------------

_CLOSERS = {"$$": "$$", "$": "$", "\\(": "\\)", "\\[": "\\]"}
_PRICE = re.compile(r"\d[\d.,]*[kKmMbB]?\s+[A-Za-z]{2,}")  # "$5 for one, 6$ for two" holds no formula
_DEFINITION = re.compile(r"\\(?:(?:re|provide)?new(?:command|environment)|renew\w+|[egx]?def|let|DeclareMathOperator|csname)(?![A-Za-z])")
_CHARACTER = re.compile("&#x[0-9A-Fa-f]{1,6};")  # the converter writes most characters so
_ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{(align(?:ed)?|gather(?:ed)?\*?|multline\*?)\}")
_LIMITS = {"lim", "max", "min", "sup", "inf", "lim sup", "lim inf", "limsup", "liminf", "argmax", "argmin"}
_CHILDREN = dict.fromkeys(("mfrac", "msub", "msup", "mroot", "munder", "mover"), 2) | dict.fromkeys(("msubsup", "munderover"), 3)


def _inline_formula(state: StateInline, silent: bool) -> bool:
    """Markdown-it rule: a formula inside text. A dollar pair is one only without inner outer spaces and without a digit after it (as in Pandoc)."""
    start, source = state.pos, state.src
    opener = next((mark for mark in _CLOSERS if source.startswith(mark, start)), "")
    if not opener:
        return False
    first, limit = start + len(opener), min(state.posMax, start + FORMULA_LIMIT)
    if opener[0] == "$" and "$" in (source[start - 1 : start], source[first : first + 1]):
        return False  # "$$$" is a price class
    end = _find_unescaped(source, _CLOSERS[opener], first, limit)
    content = source[first:end]
    if end < 0 or not content.strip() or "\n\n" in content or (opener == "$" and not _is_formula(source, start, end)):
        return False
    state.pos = end + len(opener)
    if not silent:
        token = state.push("formula", "math", 0)
        token.content, token.markup = content, opener
    return True


def _find_unescaped(source: str, mark: str, start: int, limit: int) -> int:
    end = source.find(mark, start, limit)
    while mark[0] == "$" and end > start and source[end - 1] == "\\":
        end = source.find(mark, end + 1, limit)
    return end


def _is_formula(source: str, start: int, end: int) -> bool:
    content, after = source[start + 1 : end], source[end + 1 : end + 2]
    return not (content[0].isspace() or content[-1].isspace() or after.isdigit() or source[start - 1 : start].isdigit() or _PRICE.match(content))


def _block_formula(state: StateBlock, first: int, end_line: int, silent: bool) -> bool:
    """Markdown-it rule: a line that begins with $$ or \\[ takes all lines to the closing mark or to a blank line.

    It takes them even while the closing mark is missing: otherwise a "- b" inside the formula would start a list, whose boundary
    would have to be taken back when the mark comes.
    """
    start = state.bMarks[first] + state.tShift[first]
    opener = state.src[start : start + 2]
    if opener not in ("$$", "\\[") or state.src.startswith("$$$", start) or state.is_code_block(first):
        return False
    closer = _CLOSERS[opener]
    found, last = state.src.find(closer, start + 2, state.eMarks[first]), first
    if found >= 0 and state.src[found + 2 : state.eMarks[first]].strip():
        return False  # text follows on the same line: an ordinary paragraph
    if silent:
        return True
    while found < 0 and last + 1 < end_line and not state.isEmpty(last + 1) and state.sCount[last + 1] >= state.blkIndent:
        last += 1
        found = state.src.find(closer, state.bMarks[last], state.eMarks[last])
    _push_paragraph(state, first, last + 1)
    return True


def _push_paragraph(state: StateBlock, first: int, end: int) -> None:
    """A paragraph of these lines; the inline rule finds the formula in it, and text after it."""
    for kind, nesting in (("paragraph_open", 1), ("inline", 0), ("paragraph_close", -1)):
        token = state.push(kind, "" if kind == "inline" else "p", nesting)  # type: ignore[arg-type]
        token.map = [first, end]
        if kind == "inline":
            token.content, token.children = state.getLines(first, end, state.blkIndent, False).strip(), []
    state.line = end


def _formula_html(_: Any, tokens: Sequence[Token], index: int, *__: Any) -> str:
    token = tokens[index]
    source = token.markup + token.content + _CLOSERS[token.markup]
    return _formula(token.content.strip(), token.markup in ("$$", "\\["), source)


def _formula(latex: str, display: bool, source: str) -> str:
    """MathML, or `source` where it cannot be had."""
    mathml = _mathml(latex, display) if len(latex) <= FORMULA_LIMIT else ""
    if not mathml:
        return f'<code class="tgw-math-error">{escape(source)}</code>'
    return f'<span class="tgw-display">{mathml}</span>' if display else mathml


@lru_cache(maxsize=256)  # the open block is drawn again and again
def _mathml(latex: str, display: bool) -> str:
    """MathML of a formula; empty when it is wrong, or defines commands (which may grow without end)."""
    from latex2mathml.converter import Converter

    if _DEFINITION.search(latex):
        return ""
    try:
        tree = Converter(display="block" if display else "inline").convert_to_element(_ENVIRONMENT.sub(_known_environment, latex))
        # The standard serialiser, because the converter's own undoes the escaping of < and &.
        return tostring(tree, encoding="unicode") if all(_repair(element, display) for element in tree.iter()) else ""
    except _conversion_errors():
        return ""


def _known_environment(match: re.Match[str]) -> str:
    return f"\\{match[1]}{{{'align*' if match[2].startswith('align') else 'matrix'}}}"


def _repair(element: Element, display: bool) -> bool:
    """Make up for what the converter leaves undone; False when it misunderstood the formula."""
    text = element.text = _CHARACTER.sub(lambda match: unescape(match[0]), element.text or "")
    if element.tag == "mi" and len(text) == 1 and text != "∞" and unicodedata.category(text) in ("Sm", "Ps", "Pe"):
        element.tag = "mo"  # relations and brackets, for their spacing
        element.set("stretchy", "false")
    if display and element.tag == "msub" and len(element) and (element[0].text or "") in _LIMITS:
        element.tag = "munder"
    unknown_command = element.tag in ("mi", "mo") and re.match(r"\\[A-Za-z]", text)
    return not unknown_command and len(element) == _CHILDREN.get(element.tag, len(element))


def _conversion_errors() -> tuple[type[Exception], ...]:
    """The converter's errors have no common base, and on wrong input it also fails with whatever its code meets first."""
    from latex2mathml import exceptions

    own = [kind for kind in vars(exceptions).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, LookupError, ValueError, TypeError, AttributeError, RuntimeError, StopIteration)


# Sanitiser ------------------------------------------------------------------------------------------------------------------------------------

_HTML_TAGS = "p br hr h1 h2 h3 h4 h5 h6 strong em s code pre blockquote ul ol li table thead tbody tr th td a img div span button input"
_MATH_TAGS = (
    "math mrow mi mn mo mtext mspace ms mfrac msqrt mroot mstyle merror mpadded mphantom msub msup msubsup munder mover munderover "
    "mmultiscripts mprescripts mtable mtr mtd menclose"
)
_MATH_ATTRIBUTES = (
    "display displaystyle scriptlevel mathvariant mathcolor mathbackground mathsize stretchy fence separator form accent accentunder largeop "
    "movablelimits symmetric lspace rspace minsize maxsize linethickness width height depth voffset columnalign columnlines columnspacing "
    "rowlines rowspacing notation"
)
_ATTRIBUTES = {
    "a": {"href"},
    "img": {"src", "alt"},
    "button": {"type", "class", "data-copy"},
    "input": {"class", "checked", "disabled"},
    "ol": {"start"},
    "th": {"align"},
    "td": {"align"},
    **{tag: {"class"} for tag in ("code", "pre", "div", "span", "ul", "li")},
    **{tag: set(_MATH_ATTRIBUTES.split()) for tag in _MATH_TAGS.split()},
}


def _safe_address(tag: str, attribute: str, value: str) -> str | None:
    """Links lead to the web or to mail; images are inside the page."""
    if attribute == "href":
        return value if re.match(r"https?://|mailto:", value, re.IGNORECASE) else None
    if attribute == "src":
        return value if re.match(r"data:image/(?:png|jpeg|gif|webp);base64,", value, re.IGNORECASE) else None
    return value


@lru_cache(maxsize=1)
def _cleaner() -> nh3.Cleaner:
    """The allow-list through which every block goes, whatever the parsers above made of it."""
    return nh3.Cleaner(
        tags={*_HTML_TAGS.split(), *_MATH_TAGS.split()},
        attributes=_ATTRIBUTES,
        attribute_filter=_safe_address,
        set_tag_attribute_values={"a": {"target": "_blank"}, "input": {"type": "checkbox"}},
        link_rel="noopener noreferrer nofollow",
        url_schemes={"http", "https", "mailto", "data"},
        url_relative="deny",
    )
