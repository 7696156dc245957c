"""The folders of `user_data/`, and the only place that joins a name from outside to a path.

Names are hostile until `safe_name` has seen them: the browser, the API, archives and model files all send names.
"""

from __future__ import annotations

import os
import re
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from modules.errors import DataError, NameError_, NotFound

_WINDOWS_RESERVED = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", *(f"COM{i}" for i in range(1, 10)), *(f"LPT{i}" for i in range(1, 10))}
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"|?*\\/]')
MAX_NAME_BYTES = 200
MAX_PARTS = 16


def safe_name(name: str, what: str = "name") -> str:
    """`name` unchanged if it is usable as one file name on every system; raises NameError_ otherwise.

    Checked after NFKC, so that full-width dots and slashes count as dots and slashes.
    """
    shown = repr(name[:60])
    folded = unicodedata.normalize("NFKC", name)
    if not folded.strip() or folded != folded.strip():
        raise NameError_(f"The {what} {shown} is empty or begins or ends with a space. Choose another {what}.")
    if _FORBIDDEN.search(folded) or any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in folded):
        raise NameError_(f'The {what} {shown} contains a character that file names cannot have (such as / \\ : * ? " < > |). Leave it out.')
    if folded.startswith(".") or folded.endswith("."):
        raise NameError_(f"The {what} {shown} begins or ends with a dot. Choose another {what}.")
    if folded.split(".")[0].strip().upper() in _WINDOWS_RESERVED:
        raise NameError_(f"The {what} {shown} is reserved by Windows. Choose another {what}.")
    if max(len(name.encode()), len(folded.encode())) > MAX_NAME_BYTES:
        raise NameError_(f"The {what} {shown}… is longer than {MAX_NAME_BYTES} bytes. Shorten it.")
    return name


def inside(folder: Path, name: str, what: str = "name") -> Path:
    """`folder/name` for a relative `name` of one or more parts, each part checked, symlinks not leading out of `folder`.

    Does not say whether the file exists.
    """
    parts = name.split("/")
    if len(parts) > MAX_PARTS:
        raise NameError_(f"The {what} {name[:60]!r}… has more than {MAX_PARTS} parts. Put it into a folder less deep.")
    if not all(parts) and name:
        raise NameError_(f"{name[:60]!r} is no {what}: it begins or ends with a slash, or has two in a row. Give it as it is listed.")
    for part in parts:
        safe_name(part, what)
    path = folder.joinpath(*parts)
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):  # Path.resolve raises where links go in a circle
        raise NameError_(f"The {what} {name[:60]!r} leads out of {folder}. Put the file itself there instead of a link.")
    return path


def write_atomically(path: Path, data: str | bytes, mode: int = 0o644) -> None:
    """Write `data` to `path` so that a reader, or a power loss, sees the old file or the new one and nothing else."""
    raw = data.encode("utf-8") if isinstance(data, str) else data
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise DataError(f"Cannot write {path}: {error.strerror or error}. Free some space or make the folder writable, then try again.") from error


@dataclass(frozen=True)
class UserData:
    """The folder tree of one user_data directory. Only `create()` touches the disk."""

    root: Path
    model_dir: Path | None = None
    lora_dir: Path | None = None
    settings_file: Path | None = None
    more_models: tuple[Path, ...] = ()
    """Further folders of models."""

    @property
    def models(self) -> Path:
        """Model files and folders."""
        return self.model_dir or self.root / "models"

    @property
    def loras(self) -> Path:
        """LoRA adapters."""
        return self.lora_dir or self.root / "loras"

    @property
    def mmproj(self) -> Path:
        """Vision parts of models."""
        return self.root / "mmproj"

    @property
    def characters(self) -> Path:
        """Characters (`characters.py`)."""
        return self.root / "characters"

    @property
    def users(self) -> Path:
        """What characters know about the person (`characters.py`)."""
        return self.root / "users"

    @property
    def presets(self) -> Path:
        """Sets of sampling values (`presets.py`)."""
        return self.root / "presets"

    @property
    def instruction_templates(self) -> Path:
        """Chat templates (`instruction_templates.py`)."""
        return self.root / "instruction-templates"

    @property
    def grammars(self) -> Path:
        """GBNF grammars."""
        return self.root / "grammars"

    @property
    def prompts(self) -> Path:
        """Texts to begin a message with (`prompts.py`)."""
        return self.root / "prompts"

    @property
    def css(self) -> Path:
        """Looks of the conversation."""
        return self.root / "css"

    @property
    def logs(self) -> Path:
        """Chats of the earlier system, only read (`old_data.py`)."""
        return self.root / "logs"

    @property
    def notification(self) -> Path:
        """The sound of a finished reply."""
        return self.root / "notification.mp3"

    @property
    def cache(self) -> Path:
        """Everything that may be deleted while the program is not running."""
        return self.root / "cache"

    @property
    def database(self) -> Path:
        """Conversations (`store.py`)."""
        return self.root / "conversations.sqlite3"

    @property
    def sessions(self) -> Path:
        """Login sessions, hashed (`auth.py`)."""
        return self.root / "sessions.json"

    @property
    def settings(self) -> Path:
        """What the page saves."""
        return self.settings_file or self.root / "settings.yaml"

    @property
    def flags(self) -> Path:
        """Flags read before argv."""
        return self.root / "CMD_FLAGS.txt"

    @property
    def lock(self) -> Path:
        """Held by the one server that uses this folder."""
        return self.root / ".lock"

    @property
    def _library(self) -> tuple[Path, ...]:
        """Folders into which a person puts files for the page."""
        return (self.characters, self.users, self.presets, self.instruction_templates, self.grammars, self.prompts, self.css)

    def create(self) -> None:
        """Make the folders. Raises DataError when the disk refuses."""
        try:
            for folder in (*self._library, self.models, self.loras, self.mmproj, self.cache / "gradio"):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"Cannot create {error.filename}: {error.strerror}. Choose a writable folder with --user-data-dir.") from error

    def file(self, kind: str, name: str) -> Path:
        """The existing file or folder called `name`: of kind "model", "mmproj" (looked for among the models too) or "lora". Raises NotFound."""
        folders = {"model": (self.models, *self.more_models), "mmproj": (self.mmproj, self.models), "lora": (self.loras,)}[kind]
        for folder in folders:
            path = inside(folder, name, f"{kind} name")
            if path.exists():
                return path
        raise NotFound(f"There is no {kind} {name!r} in {' or '.join(map(str, folders))}. Put it there, or correct the name.")
