"""The source of one block -> safe HTML: parser, code, and the sanitiser over all of it. Who cuts a message into blocks is `render.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from html import escape
from time import thread_time
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

from modules.ui.formulas import block_formula, formula, formula_html, inline_formula

# Limits count characters of source.
RENDER_LIMIT = 40_000  # a longer block (one enormous line) stays plain text; a code fence has no limit
BRACKET_LIMIT = 1_000  # a paragraph with more "[" stays text: finding links takes time in proportion to their number times its length
HIGHLIGHT_LIMIT = 100_000  # longer code is not coloured
HIGHLIGHT_SECONDS = 0.5  # of processor time; code that a lexer has not read by then (many are quadratic) stays plain from there on
MAX_NESTING = 60  # quotations and lists; a deeper block is shown as plain text


def lines_of(token: Token) -> tuple[int, int]:
    """First line and line after the last; every block token that opens something has them."""
    assert token.map
    return token.map[0], token.map[1]


OPENS_FENCE = re.compile(r" {0,3}(?:`{3,}[^`\n]*|~{3}[^\n]*)\n")


def to_html(source: str, still_open: bool = False) -> str:
    """Safe HTML of one block's source. `still_open`: code and formulas that reach the end of the source are not finished."""
    markdown = parser()
    env = {"growing_from": source.count("\n") + (source[-1] != "\n") if still_open else None}
    if len(source) > RENDER_LIMIT and not OPENS_FENCE.match(source):
        return plain(source)
    tokens = markdown.parse(source, env)
    if any(token.level >= MAX_NESTING - 1 for token in tokens):
        return plain(source)  # the parser drops what is nested deeper
    return cleaner().clean(str(markdown.renderer.render(tokens, markdown.options, env))).strip("\n")


PLAIN_FRAME = ('<pre class="tgw-plain"><code>', "</code></pre>")


def plain(source: str) -> str:
    """HTML of source shown as it is."""
    return escape(source.rstrip("\n"), quote=False).join(PLAIN_FRAME)


class _Markdown(MarkdownIt):
    _LINK = re.compile(r"https?://|mailto:|data:image/(?:png|jpeg|gif|webp);base64,[A-Za-z0-9+/=]+\Z", re.IGNORECASE)

    def validateLink(self, url: str) -> bool:
        return bool(self._LINK.match(url))


@lru_cache(maxsize=1)
def parser() -> MarkdownIt:
    """The parser. It keeps no state between calls, so threads share it."""
    options = {"html": False, "breaks": True, "maxNesting": MAX_NESTING, "tasklists": True}
    markdown = _Markdown("commonmark", options).enable(["table", "strikethrough"]).disable(["reference", "html_block", "html_inline"])
    markdown.inline.ruler.push("address", _inline_address)
    markdown.inline.ruler.before("escape", "formula", inline_formula)
    markdown.block.ruler.before("fence", "formula", block_formula, {"alt": ["paragraph", "blockquote", "list"]})
    markdown.core.ruler.after("block", "guard", _guard)
    markdown.core.ruler.push("adapt", _adapt)
    markdown.add_render_rule("fence", _fence_html)
    markdown.add_render_rule("code_block", _fence_html)
    markdown.add_render_rule("formula", formula_html)
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


# Code ----------------------------------------------------------------------------------------------------


def _fence_html(_: Any, tokens: Sequence[Token], index: int, __: Any, env: dict[str, Any]) -> str:
    token = tokens[index]
    growing = env["growing_from"] is not None and lines_of(token)[1] >= env["growing_from"]
    language = _language(token.info)
    if language == "math" and not growing:
        return f"<p>{formula(token.content.strip(), True, token.content)}</p>\n"
    before, after = code_frame(token.info)
    return before + (escape(token.content) if growing else highlight(token.content, language)) + after


def _language(info: str) -> str:
    return "".join(re.findall(r"[\w+#.-]", info.strip().split(" ", 1)[0])[:30]).lower()


def code_frame(info: str) -> tuple[str, str]:
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
def highlight(code: str, language: str) -> str:
    """HTML of `code`, coloured by CSS classes; plain when the language is unknown or the code too long."""
    from pygments import format as format_tokens
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
    return format_tokens(_timed_tokens(lexer, code), HtmlFormatter(nowrap=True))


def _timed_tokens(lexer: Any, code: str) -> Iterator[tuple[Any, str]]:
    from pygments.token import Text

    end = thread_time() + HIGHLIGHT_SECONDS
    for position, kind, value in lexer.get_tokens_unprocessed(code):
        if thread_time() > end:
            yield Text, code[position:]
            return
        yield kind, value


# Sanitiser ----------------------------------------------------------------------------------------------------

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
def cleaner() -> nh3.Cleaner:
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
