"""Characters and users: who speaks. Shipped ones, and files in `user_data/characters/` and `user_data/users/`.

A file is YAML or JSON, in any of the spellings that earlier systems and Pygmalion's tools used; it is written as YAML with name, greeting and
context (a user: name and user_bio), empty ones left out. All values are text. {{char}} and {{user}} in them are replaced where a prompt is made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from modules.errors import SettingsError
from modules.library import Shelf, plain, yaml_mapping, yaml_text

MAX_NAME = 100
"""Characters of a speaker's name."""
_SUFFIXES = (".yaml", ".yml", ".json")
_UNFIT = re.compile("[\n\t\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""In a name: it stands within a line, and must not turn that line's direction."""

_NAME = ("name", "bot", "<|bot|>", "char_name")
_USER = ("your_name", "user", "<|user|>")
_GREETING = ("greeting", "char_greeting")
_PARTS = ("char_persona", "world_scenario", "example_dialogue")
_BIO = ("user_bio", "bio")


@dataclass(frozen=True)
class Character:
    """Whom the model plays."""

    name: str
    context: str = ""
    """Who that is; empty: nothing is known."""
    greeting: str = ""
    """The first message of a chat; empty: there is none."""


@dataclass(frozen=True)
class UserProfile:
    """Whom the person plays."""

    name: str
    bio: str = ""


SHIPPED: Mapping[str, Character] = MappingProxyType({
    "Assistant": Character(
        "AI",
        "{{char}} is an assistant that runs on {{user}}'s own computer. It answers precisely, says what it does not know, and keeps to the point.",
        "Hello! What shall we look at?",
    ),
    "Example": Character(
        "Ines Marlow",
        "{{char}} is a lighthouse keeper of 58 on a small northern island. She reads old atlases, repairs clocks, and has not been on the mainland "
        "for three years. She speaks dryly and kindly, in short sentences, and likes to answer a question with a story.\n\n"
        "{{user}}: Is it not lonely here?\n"
        "{{char}}: *She winds the clock before she answers.* The gulls think so. I think they talk too much to judge.",
        "*The door at the foot of the tower stands open; there is a lamp on the table, and two cups.* You came with the supply boat, {{user}}? "
        "Sit down. The next one leaves on Thursday, so we have time.",
    ),
})  # fmt: skip
SHIPPED_USERS: Mapping[str, UserProfile] = MappingProxyType({"Default": UserProfile("You")})


def read_character(text: str, file: str) -> Character:
    """The character in a file's `text`; the file's name says how it is written. Raises SettingsError naming the file."""
    fields = _fields(text, file)
    name = _first(fields, _NAME, file)
    context = _first(fields, ("context",), file) or _pygmalion(fields, name, file)
    greeting = _first(fields, _GREETING, file)
    if fields.keys().isdisjoint((*_NAME, *_GREETING, *_PARTS, "context")):
        raise SettingsError(f"{file} has none of name, context and greeting. Add them, or delete the file.")
    return Character(_name(name or Path(file).stem, file), context, greeting)


def read_user(text: str, file: str) -> UserProfile:
    """The person in a file's `text`. Raises SettingsError naming the file."""
    fields = _fields(text, file)
    if fields.keys().isdisjoint(("name", *_USER, *_BIO)):
        raise SettingsError(f"{file} has neither name nor user_bio. Add them, or delete the file.")
    return UserProfile(_name(_first(fields, ("name", *_USER), file) or Path(file).stem, file), _first(fields, _BIO, file))


@dataclass(frozen=True)
class Characters:
    """The shipped characters and those in `folder`, where a file wins over a shipped one of its name. That name is not the speaker's."""

    folder: Path

    @property
    def _shelf(self) -> Shelf:
        return Shelf(self.folder, "character", _SUFFIXES, SHIPPED)

    def names(self) -> list[str]:
        """All names, sorted without regard to case. A broken file is listed and fails when it is chosen. Raises DataError."""
        return self._shelf.names()

    def own(self) -> set[str]:
        """The names of the files in the folder. Raises DataError."""
        return self._shelf.own()

    def get(self, name: str) -> Character:
        """The character. Raises NotFound, NameError_, SettingsError for a file that is wrong, DataError."""
        found = self._shelf.text(name)
        return read_character(found[1], found[0]) if found else SHIPPED[name]

    def save(self, name: str, character: Character) -> Path:
        """Write the user's character `name`, replacing it; the file's path. Raises NameError_, SettingsError, DataError."""
        file = self._shelf.path(name).name
        values = {"name": _name(character.name, file), "greeting": character.greeting, "context": character.context}
        return self._shelf.write(name, yaml_text(_kept(values, file)))

    def delete(self, name: str) -> None:
        """Delete the user's files of that name; a shipped character of the name is there again. Raises NotFound, NameError_, DataError."""
        self._shelf.delete(name)


@dataclass(frozen=True)
class Users:
    """The shipped user and those in `folder`, where a file wins over a shipped one of its name."""

    folder: Path

    @property
    def _shelf(self) -> Shelf:
        return Shelf(self.folder, "user", _SUFFIXES, SHIPPED_USERS)

    def names(self) -> list[str]:
        """All names, sorted without regard to case. A broken file is listed and fails when it is chosen. Raises DataError."""
        return self._shelf.names()

    def own(self) -> set[str]:
        """The names of the files in the folder. Raises DataError."""
        return self._shelf.own()

    def get(self, name: str) -> UserProfile:
        """The person. Raises NotFound, NameError_, SettingsError for a file that is wrong, DataError."""
        found = self._shelf.text(name)
        return read_user(found[1], found[0]) if found else SHIPPED_USERS[name]

    def save(self, name: str, user: UserProfile) -> Path:
        """Write the user's profile `name`, replacing it; the file's path. Raises NameError_, SettingsError, DataError."""
        file = self._shelf.path(name).name
        return self._shelf.write(name, yaml_text(_kept({"name": _name(user.name, file), "user_bio": user.bio}, file)))

    def delete(self, name: str) -> None:
        """Delete the user's files of that name; the shipped one is there again. Raises NotFound, NameError_, DataError."""
        self._shelf.delete(name)


def _fields(text: str, file: str) -> dict[str, Any]:
    return _json(text, file) if Path(file).suffix == ".json" else yaml_mapping(text, file)


def _json(text: str, file: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise SettingsError(f"{file} line {error.lineno}: {error.msg}. Correct that line, or delete the file.") from None
    except (ValueError, RecursionError):
        raise SettingsError(f"{file} is not the JSON of a character. Correct it, or delete the file.") from None
    if not isinstance(found, dict):
        raise SettingsError(f'{file}: expected {{"name": "…", "context": "…", "greeting": "…"}}. Correct the file, or delete it.')
    return found


def _first(fields: Mapping[str, Any], keys: Sequence[str], file: str) -> str:
    """The first of `keys` that holds something, without spaces around it; "" when none does."""
    return next((text for key in keys if (text := _text(fields, key, file))), "")


def _text(fields: Mapping[str, Any], key: str, file: str) -> str:
    value = fields.get(key)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise SettingsError(f"{file}: {key} must be text. Put its value in quotes, or indent it after “|-”.")
    return plain(str(value), key, file).strip()


def _pygmalion(fields: Mapping[str, Any], name: str, file: str) -> str:
    persona, scenario, example = (_text(fields, key, file) for key in _PARTS)
    return "\n\n".join(
        part for part in (persona and f"{name or '{{char}}'}'s persona: {persona}", scenario and f"Scenario: {scenario}", example) if part
    )


def _name(name: str, file: str) -> str:
    name = plain(name, "name", file).strip()
    if not name or len(name) > MAX_NAME or _UNFIT.search(name):
        raise SettingsError(f"{file}: a name is one line of 1 to {MAX_NAME} characters. Correct it.")
    return name


def _kept(values: Mapping[str, str], file: str) -> dict[str, Any]:
    return {key: text for key, value in values.items() if (text := plain(value, key, file).strip())}
