"""What happens once, between the command line and a served page: reading the configuration, opening the store, choosing the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from modules import app, settings
from modules.backends.base import Adapter
from modules.errors import DataError, NotFound, SettingsError, UserError
from modules.log import logger
from modules.models import ModelSlot
from modules.paths import UserData
from modules.settings import Configuration, Settings, Text
from modules.store import Store


def configure(root: Path, argv: Sequence[str]) -> Configuration:
    """The configuration of the program in `root` from its files and the command line. Raises SettingsError."""
    top = _texts(root / "CMD_FLAGS.txt")
    groups = app.option_groups()
    first = settings.load(argv, top, (), groups).settings  # where the user's own files are is itself a setting
    flags = (*top, *_texts(user_data(root, first).flags))
    named = settings.load(argv, flags, (), groups).settings
    chosen = user_data(root, named).settings
    if named.settings and not chosen.is_file():
        raise SettingsError(f"There is no settings file {chosen}. Correct --settings.")
    return settings.load(argv, flags, (*_texts(root / "settings.yaml"), *_texts(chosen)), groups)


def _texts(path: Path) -> tuple[Text, ...]:
    try:
        return (Text(str(path), path.read_text("utf-8-sig")),)
    except (FileNotFoundError, NotADirectoryError):  # the second: the user's folder cannot be made, which is told when it is tried
        return ()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SettingsError(f"Cannot read {path}: {reason}. Correct or remove that file.") from None


def user_data(root: Path, chosen: Settings) -> UserData:
    """The folders that the settings name; relative ones are in `root`."""

    def folder(name: str) -> Path | None:
        return (root / Path(name).expanduser()).absolute() if name else None

    more = tuple(path for path in map(folder, chosen.more_model_dirs) if path)
    data = folder(chosen.user_data_dir) or root / "user_data"
    return UserData(data, folder(chosen.model_dir), folder(chosen.lora_dir), folder(chosen.settings), more)


def open_store(data: UserData, multi_user: bool) -> Store:
    """The conversations; in multi-user mode, new and empty ones that the next start deletes."""
    if not multi_user:
        return Store.open(data.database)
    path = data.cache / "multi-user.sqlite3"
    try:
        for file in data.cache.glob("multi-user.sqlite3*"):
            file.unlink()
    except OSError as error:
        raise DataError(f"Cannot delete {error.filename}: {error.strerror}. Delete it and start again.") from None
    return Store.open(path)


def load_first_model(models: ModelSlot, chosen: Settings, ask: Callable[[str], str] = input) -> None:
    """Begin loading the model named, or chosen from the menu, or used last if that is wanted, or the only one there is.

    A wrong name is told; the page starts all the same.
    """
    names = models.names()
    last = models.last_used() if chosen.load_last_model else ""
    name = chosen.model or (_menu(names, ask) if chosen.model_menu else "") or last or (names[0] if len(names) == 1 else "")
    if not name:
        logger.info("No model is loaded; choose one on the Model tab." if names else "There is no model yet; the Model tab says where to put one.")
        return
    models.adapters = named_adapters(models.data, chosen.lora)
    try:
        models.start_loading(models.choose(name, chosen.loader, anywhere=True))
    except UserError as error:
        logger.error("%s", error)


def named_adapters(data: UserData, names: Sequence[str]) -> tuple[Adapter, ...]:
    """LoRA adapters by name in the LoRA folder or by path, each with `:scale` after it if that is not 1. A wrong one is told and left out."""
    found = []
    for name in names:
        file, _, scale = name.rpartition(":") if re.search(r":[-+.\d]+$", name) else (name, "", "1")
        literal = Path(file).expanduser()
        try:
            found.append(Adapter(literal if literal.exists() else data.file("lora", file), float(scale)))
        except (UserError, ValueError) as error:
            logger.error("--lora %s: %s", name, error)
    return tuple(found)


def _menu(names: Sequence[str], ask: Callable[[str], str]) -> str:
    if not names:
        raise NotFound("There is no model to choose from. Put a .gguf file into the model folder, or leave --model-menu out.")
    for number, name in enumerate(names, 1):
        print(f"{number:4} {name}")
    while True:
        try:
            answer = ask("Which model? Number (Enter: none): ").strip()
        except EOFError:  # no terminal to ask on
            return ""
        if not answer:
            return ""
        if answer.isascii() and answer.isdigit() and 1 <= int(answer) <= len(names):
            return names[int(answer) - 1]
        print(f"Type a number from 1 to {len(names)}.")
