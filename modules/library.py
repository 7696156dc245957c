"""A shelf: small text files of the user's own, one a name, beside what comes with the program. Presets, characters, users, prompts, grammars.

Such files are passed around between people and are hostile: their size and number are bounded, their names go through `paths.safe_name`,
and YAML is read without aliases and with a limit of parts. Nothing is cached: a file that was put into the folder is there at once.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from modules.errors import DataError, NameError_, NotFound, SettingsError
from modules.paths import inside, safe_name, write_atomically

MAX_FILES = 10_000
"""Entries of a folder that are looked at."""
_MAX_EVENTS = 1000
"""Parts of a YAML file; a preset with every key and a list of samplers has about 150."""
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufeff]")


@dataclass(frozen=True)
class Shelf:
    """The files of one kind in `folder`. A name has no file ending."""

    folder: Path
    what: str
    """Such a thing, for messages: "preset"."""
    suffixes: tuple[str, ...]
    """Where several files have one name, the first of these wins. A file is written with the first."""
    shipped: Collection[str] = ()
    """Names that need no file; a file of the name wins over what comes with the program."""
    max_bytes: int = 400_000

    def names(self) -> list[str]:
        """All names, sorted without regard to case. Files are not read: a broken one is listed and fails when it is chosen. Raises DataError."""
        return sorted({*self.shipped, *self.own()}, key=lambda name: (name.casefold(), name))

    def own(self) -> set[str]:
        """The names of the files in the folder. Raises DataError."""
        return set(self._stems())

    def text(self, name: str) -> tuple[str, str] | None:
        """The file's name and text; None where only the program has it. Raises NotFound, NameError_, DataError, SettingsError for a wrong file."""
        for path in self._files(name):
            return path.name, self._read(path)
        if name in self.shipped:
            return None
        raise NotFound(f"There is no {self.what} {name!r} in {self.folder}. Choose one from the list, or put the file there.")

    def write(self, name: str, text: str) -> Path:
        """Write the user's file of that name, replacing it; its path. Raises NameError_, DataError, SettingsError."""
        path = self.path(name)
        raw = plain(text, "the text", path.name).encode()
        if len(raw) > self.max_bytes:
            raise self._too_large(path.name)
        if path.is_dir():
            raise DataError(f"{path} is a folder. Remove it, or choose another name.")
        write_atomically(path, raw)
        return path

    def delete(self, name: str) -> None:
        """Delete the user's files of that name; what comes with the program is there again. Raises NotFound, NameError_, DataError."""
        files = list(self._files(name))
        if not files:
            why = "comes with the program and cannot be deleted" if name in self.shipped else "does not exist"
            raise NotFound(f"The {self.what} {name!r} {why}. Choose one whose file is in {self.folder}.")
        for path in files:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise DataError(f"Cannot delete {path}: {error.strerror or error}. Make the folder writable, then try again.") from error

    def path(self, name: str, suffix: str = "") -> Path:
        """Where the file of that name is, or would be. Raises NameError_."""
        safe_name(name, f"{self.what} name")
        return inside(self.folder, name + (suffix or self.suffixes[0]), f"{self.what} name")

    def _files(self, name: str) -> Iterator[Path]:
        """The files of that name, the one that counts first."""
        return (path for path in [self.path(name, suffix) for suffix in self.suffixes] if path.is_file())

    def _stems(self) -> Iterator[str]:
        try:
            paths = [path for path in islice(self.folder.iterdir(), MAX_FILES) if path.suffix in self.suffixes and path.is_file()]
        except FileNotFoundError:
            return
        except OSError as error:
            raise DataError(f"Cannot read {self.folder}: {error.strerror or error}. Make the folder readable, then try again.") from error
        for path in paths:
            try:
                yield safe_name(path.stem, f"{self.what} name")
            except NameError_:
                continue  # cannot be asked for, and hidden and temporary files are among these

    def _read(self, path: Path) -> str:
        try:
            with path.open("rb") as file:
                raw = file.read(self.max_bytes + 1)
        except OSError as error:
            raise DataError(f"Cannot read {path}: {error.strerror or error}. Make the file readable, then try again.") from error
        if len(raw) > self.max_bytes:
            raise self._too_large(path.name)
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise SettingsError(f"{path.name} is not UTF-8 text. Save it with that encoding, or delete it.") from None

    def _too_large(self, file: str) -> SettingsError:
        return SettingsError(f"{file} is larger than {self.max_bytes:,} bytes, which no {self.what} is. Shorten it, or delete it.")


def plain(text: str, field: str, file: str) -> str:
    """`text` with \\n at the ends of its lines. Raises SettingsError for characters that belong into no text, naming the `field` and `file`."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    found = _CONTROL.search(text)
    if found:
        raise SettingsError(f"{file}: {field} contains the control character U+{ord(found[0]):04X}. Remove it.")
    return text


def yaml_mapping(text: str, file: str, typed: bool = False, parts: int = _MAX_EVENTS) -> dict[str, Any]:
    """The mapping in a YAML file of at most so many `parts`; empty for an empty one. Without `typed` all its scalars are text.

    Raises SettingsError naming file and line.
    """
    loader = yaml.SafeLoader if typed else yaml.BaseLoader
    try:
        for place, event in enumerate(yaml.parse(text, Loader=loader)):
            if isinstance(event, yaml.AliasEvent) or place > parts:
                raise SettingsError(f"{file} is more than such a file needs. Keep lines of the form 'name: value', without & and *.")
        found = yaml.load(text, Loader=loader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, LookupError, AttributeError, TypeError) as error:  # the latter: !!bool, !!int
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it is not YAML"
        raise SettingsError(f"{file}{where}: {problem}. Correct that line, or delete the file.") from None
    if found in (None, ""):
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise SettingsError(f"{file}: expected lines of the form 'name: value'. Correct the file, or delete it.")
    return found


class _Dumper(yaml.SafeDumper):
    """Several lines of text are written as such, for people who edit the file."""


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text_node)


def yaml_text(values: dict[str, Any]) -> str:
    """A YAML file with `values`, in their order."""
    return str(yaml.dump(values, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=10_000))
