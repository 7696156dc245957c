"""The prompt library: texts to begin a message with, shipped and in `user_data/prompts/`, with places to fill in.

A place is `{{name}}` or `{{name=what stands there otherwise}}`; the same name is asked for once. {{date}} and {{time}} fill themselves.
Braces in any other form are text. A file is plain text or Markdown (`.txt`, `.md`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType

from modules.library import Shelf, plain

MAX_VARIABLES = 50
"""Different names in one prompt; further ones are text."""
MAX_BYTES = 200_000
_PLACE = re.compile(r"\{\{[ \t]{0,8}([^\W_][\w \-]{0,59})(?:=([^{}]*))?\}\}")

SHIPPED: Mapping[str, str] = MappingProxyType({
    "Summarise": "Summarise the following text in {{length=five short points}}. Keep names, numbers and what is to be done.\n\n{{text}}",
    "Translate": "Translate the following text into {{language=English}}. Keep its tone and its form, and answer with the translation alone."
    "\n\n{{text}}",
    "Explain code": "Explain what this code does, step by step, for {{reader=somebody who knows the language a little}}. Name mistakes and what "
    "could surprise.\n\n```{{programming language=}}\n{{code}}\n```",
    "Rewrite": "Rewrite the following text so that it is {{tone=clear and friendly}}. Keep the meaning and about the same length.\n\n{{text}}",
})  # fmt: skip


@dataclass(frozen=True)
class Variable:
    """One name to fill in. `default`: what stands there when nothing is given; None: the place stays as it is."""

    name: str
    default: str | None = None


def variables(text: str) -> tuple[Variable, ...]:
    """What a person is asked for, in the order of the text; {{date}} and {{time}} are not among them."""
    found: dict[str, Variable] = {}
    for place in _PLACE.finditer(text):
        name, default = place[1].strip(), None if place[2] is None else place[2].strip()
        if name not in _BUILT_IN and len(found) < MAX_VARIABLES:
            known = found.setdefault(name, Variable(name, default))
            if known.default is None and default is not None:
                found[name] = Variable(name, default)
    return tuple(found.values())


def fill(text: str, values: Mapping[str, str], now: datetime | None = None) -> str:
    """`text` with its places filled: from `values`, else with defaults; one with neither stays as it is. What is filled in is not read again."""
    asked = {each.name: each.default for each in variables(text)}
    return _filled(text, {**asked, **{name: value for name, value in values.items() if name in asked}, **_built_in(now)})


def dated(text: str, now: datetime | None = None) -> str:
    """`text` with {{date}} and {{time}} filled alone."""
    return _filled(text, _built_in(now))


_BUILT_IN = {"date": "%Y-%m-%d", "time": "%H:%M"}


def _built_in(now: datetime | None) -> dict[str, str]:
    moment = now or datetime.now()
    return {name: moment.strftime(form) for name, form in _BUILT_IN.items()}


def _filled(text: str, values: Mapping[str, str | None]) -> str:
    def filled(place: re.Match[str]) -> str:
        value = values.get(place[1].strip())
        return place[0] if value is None else value

    return _PLACE.sub(filled, text)


@dataclass(frozen=True)
class Prompts:
    """The shipped prompts and those in `folder`, where a file wins over a shipped one of its name."""

    folder: Path

    @property
    def _shelf(self) -> Shelf:
        return Shelf(self.folder, "prompt", (".txt", ".md"), SHIPPED, MAX_BYTES)

    def names(self) -> list[str]:
        """All names, sorted without regard to case. Raises DataError."""
        return self._shelf.names()

    def own(self) -> set[str]:
        """The names of the files in the folder. Raises DataError."""
        return self._shelf.own()

    def get(self, name: str) -> str:
        """The text, its places not filled. Raises NotFound, NameError_, SettingsError for a file that is no text, DataError."""
        found = self._shelf.text(name)
        return plain(found[1], "the text", found[0]) if found else SHIPPED[name]

    def save(self, name: str, text: str) -> Path:
        """Write the user's prompt `name`, replacing it; the file's path. Raises NameError_, SettingsError, DataError."""
        return self._shelf.write(name, text)

    def delete(self, name: str) -> None:
        """Delete the user's files of that name; a shipped prompt of the name is there again. Raises NotFound, NameError_, DataError."""
        self._shelf.delete(name)
