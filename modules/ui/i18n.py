"""The language of Gradio's own controls. They are declared in English; `translate` goes over the finished page, in one place.

    page = build_page(app, …)                            # translate(page) has been done
    server.add_middleware(Speaking, values=session_values)

What our script shows has its texts in `assets/texts/ru.json`; what Gradio shows (labels, helps, buttons, tabs) in `assets/texts/ru_controls.json`.
Gradio's own gr.I18n knows only the browser's language, not the person's choice, and cannot hold a text with a brace.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, cached_property
from typing import Any

import gradio as gr
from gradio.blocks import Block
from starlette.requests import Request

from modules.errors import UserError
from modules.guard import ASGIApp, Receive, Scope, Send
from modules.ui import ASSETS

ENGLISH, RUSSIAN = "en", "ru"
LANGUAGES = (ENGLISH, RUSSIAN)
_TEXTS = ("label", "info", "placeholder")


class Words:
    """A text that says itself in the language of whose page is being written: Gradio turns it into a string when it answers, not before.

    No dataclass: Gradio's JSON writer would take that apart.
    """

    __slots__ = ("english", "values")

    def __init__(self, english: str, values: Mapping[str, Any] | None = None) -> None:
        """`values`: what stands for {name} in the text."""
        self.english, self.values = english, values or {}

    def __str__(self) -> str:
        asker = _asker.get()
        said = russian().get(self.english, self.english) if asker and asker.language == RUSSIAN else self.english
        return said.format(**self.values) if self.values else said


@cache
def russian() -> Mapping[str, str]:
    """The Russian of every English text of the controls."""
    found: dict[str, str] = json.loads((ASSETS / "texts" / "ru_controls.json").read_text("utf-8"))
    return found


def translate(page: gr.Blocks) -> None:
    """Let each control of `page` say its name, help and choices in the language of who asks. Texts without a translation stay as they are."""
    for block in page.blocks.values():
        for name in (*_TEXTS, *(["value"] if isinstance(block, gr.Button | gr.HTML) else [])):
            text = getattr(block, name, None)
            if isinstance(text, str) and text in russian():
                setattr(block, name, Words(text))
        if isinstance(block, gr.Dropdown | gr.Radio):
            block.choices = [(_choice(block, shown, value), value) for shown, value in block.choices]


def _choice(menu: Block, shown: Any, value: Any) -> Any:
    """Names of files, which are shown as they are, may be words of ours; they stay."""
    fixed = isinstance(menu, gr.Radio) or shown != value
    return Words(shown) if fixed and isinstance(shown, str) and shown in russian() else shown


def language_of(chosen: str, accepted: str) -> str:
    """The language that is `chosen`, or ("auto") the first that the browser accepts (its Accept-Language); English where we have none."""
    wanted = chosen if chosen in LANGUAGES else accepted.partition(",")[0].strip()[:2].lower()
    return wanted if wanted in LANGUAGES else ENGLISH


class _Asker:
    """Who asks for a page. Their language is found out only if a text is said."""

    def __init__(self, find: Callable[[], str]) -> None:
        self._find = find

    @cached_property
    def language(self) -> str:
        return self._find()


_asker: ContextVar[_Asker | None] = ContextVar("asker", default=None)


@contextmanager
def speaking(find: Callable[[], str]) -> Iterator[None]:
    """Within it texts are said in the language that `find` answers."""
    token = _asker.set(_Asker(find))
    try:
        yield
    finally:
        _asker.reset(token)


class Speaking:
    """ASGI middleware: pages are written in the language that the asking browser has chosen, `values(request)["language"]`, or in its own."""

    def __init__(self, app: ASGIApp, values: Callable[[Any], Mapping[str, Any]]) -> None:
        self.app, self._values = app, values

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        with speaking(lambda: self._language(Request(scope))):
            await self.app(scope, receive, send)

    def _language(self, request: Request) -> str:
        try:
            chosen = self._values(request).get("language", "")
        except UserError:  # nobody we know
            chosen = ""
        return language_of(chosen, request.headers.get("accept-language", ""))
