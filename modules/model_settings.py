"""What is saved for each model: its loader, that loader's options and its instruction template, in `config-user.yaml` of the model folder.

    model.gguf: {loader: llama.cpp, ctx_size: 8192, instruction_template: ChatML}

An entry is for the model of exactly that name. The earlier system wrote patterns: a name with `$` behind it, which is read as that name, and
`n_gpu_layers` for gpu_layers. Several entries for one model count in their order. What stands there and is not known is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules.errors import DataError, SettingsError
from modules.library import yaml_mapping, yaml_text
from modules.log import logger
from modules.paths import write_atomically

FILE = "config-user.yaml"
MAX_BYTES = 4 << 20
_PARTS = 500_000
_OLD = {"n_gpu_layers": "gpu_layers"}
_TEMPLATE, _LOADER = "instruction_template", "loader"


@dataclass(frozen=True)
class Saved:
    """What is saved for one model; `loader` and `instruction_template` are "" where nothing is."""

    loader: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    """As they stand in the file: not checked."""
    instruction_template: str = ""


class ModelSettings:
    """The file `path`. Read at each question, because people edit it. Methods may be called from any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def get(self, model: str) -> Saved:
        """What is saved for `model`. A file that cannot be read is told in the log, and counts as empty."""
        try:
            found = self._read()
        except (SettingsError, DataError) as error:
            logger.warning("%s", error)
            return Saved()
        values: dict[str, Any] = {}
        for key in _keys(found, model):
            values |= found[key]
        options = {_OLD.get(name, name): value for name, value in values.items() if name not in (_LOADER, _TEMPLATE)}
        return Saved(_text(values.get(_LOADER)), options, _text(values.get(_TEMPLATE)))

    def save(self, model: str, loader: str, options: Mapping[str, Any]) -> None:
        """Save a loader and the options that differ from what is configured, instead of those there were. Raises SettingsError, DataError."""
        template = self.get(model).instruction_template
        self._write(model, {**({_LOADER: loader} if loader else {}), **options, **({_TEMPLATE: template} if template else {})})

    def set_template(self, model: str, template: str) -> None:
        """Save the name of an instruction template; "" for the model's own. Raises SettingsError, DataError."""
        saved = self.get(model)
        loader = {_LOADER: saved.loader} if saved.loader else {}
        self._write(model, {**loader, **saved.options, **({_TEMPLATE: template} if template else {})})

    def forget(self, model: str) -> None:
        """Drop what is saved. Raises SettingsError, DataError."""
        self._write(model, {})

    def _write(self, model: str, values: Mapping[str, Any]) -> None:
        with self._lock:
            found = self._read()
            for key in _keys(found, model):
                del found[key]
            if values:
                found[model] = dict(values)
            write_atomically(self.path, yaml_text(found))

    def _read(self) -> dict[str, Any]:
        try:
            with self.path.open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise DataError(f"Cannot read {self.path}: {error.strerror or error}. Make it a readable file, or delete it.") from None
        if len(raw) > MAX_BYTES:
            raise SettingsError(f"{self.path} is larger than {MAX_BYTES:,} bytes. Shorten it, or delete it.")
        try:
            return yaml_mapping(raw.decode("utf-8-sig"), str(self.path), typed=True, parts=_PARTS)
        except UnicodeDecodeError:
            raise SettingsError(f"{self.path} is not UTF-8 text. Save it with that encoding, or delete it.") from None


def _keys(found: Mapping[str, Any], model: str) -> list[str]:
    """The keys of entries that are for `model`."""
    return [key for key, values in found.items() if isinstance(values, dict) and model in _spellings(key)]


def _spellings(key: str) -> Iterator[str]:
    yield key
    if key.endswith("$"):  # a pattern of the earlier system; dots may have been escaped
        yield key[:-1]
        yield key[:-1].replace("\\", "")


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value != "None" else ""
