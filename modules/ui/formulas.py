"""Formulas: the Markdown rules that find them, and LaTeX to MathML. A formula that fails shows its source."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from html import escape, unescape
from typing import Any
from xml.etree.ElementTree import Element, tostring

from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

FORMULA_LIMIT = 2_000
_CLOSERS = {"$$": "$$", "$": "$", "\\(": "\\)", "\\[": "\\]"}
_PRICE = re.compile(r"\d[\d.,]*[kKmMbB]?\s+[A-Za-z]{2,}")  # "$5 for one, 6$ for two" holds no formula
_DEFINITION = re.compile(r"\\(?:(?:re|provide)?new(?:command|environment)|renew\w+|[egx]?def|let|DeclareMathOperator|csname)(?![A-Za-z])")
_CHARACTER = re.compile("&#x[0-9A-Fa-f]{1,6};")  # the converter writes most characters so
_ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{(align(?:ed)?|gather(?:ed)?\*?|multline\*?)\}")
_LIMITS = {"lim", "max", "min", "sup", "inf", "lim sup", "lim inf", "limsup", "liminf", "argmax", "argmin"}
_CHILDREN = dict.fromkeys(("mfrac", "msub", "msup", "mroot", "munder", "mover"), 2) | dict.fromkeys(("msubsup", "munderover"), 3)


def inline_formula(state: StateInline, silent: bool) -> bool:
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


def block_formula(state: StateBlock, first: int, end_line: int, silent: bool) -> bool:
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


def formula_html(_: Any, tokens: Sequence[Token], index: int, *__: Any) -> str:
    """Markdown-it render rule of a "formula" token."""
    token = tokens[index]
    source = token.markup + token.content + _CLOSERS[token.markup]
    return formula(token.content.strip(), token.markup in ("$$", "\\["), source)


def formula(latex: str, display: bool, source: str) -> str:
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
