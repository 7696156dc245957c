"""Presets: named sets of sampling values, shipped and in `user_data/presets/`.

A file is YAML with the keys that differ from the neutral values, as earlier systems write it; what it does not name is neutral, so that a preset
is always all of a sampling. Length, seed, stop strings and the like are no part of it. Unknown keys have no effect and are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from modules.library import Shelf, yaml_mapping, yaml_text
from modules.log import logger
from modules.options import nearest
from modules.samplers import LENGTH, NEUTRAL, TOKENS, SamplingParams

MAX_BYTES = 64_000
NAMES = tuple(knob.name for knob in SamplingParams.knobs().values() if knob.group not in (LENGTH, TOKENS))
"""The parameters that a preset sets, all of them."""

SHIPPED: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "Top-P": {"top_p": 0.95},
    "Creative": {"min_p": 0.02, "xtc_probability": 0.5},
    "Deterministic": {"do_sample": False, "top_k": 1},
    "Instruct": {"temperature": 0.7, "top_p": 0.9, "top_k": 20},
    "Qwen3 - Thinking": {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
    "Qwen3 - No Thinking": {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
    "min_p": {"min_p": 0.05},
})  # fmt: skip
"""What differs from neutral, by name."""


@dataclass(frozen=True)
class Presets:
    """The shipped presets and those in `folder`, where a file wins over a shipped one of its name."""

    folder: Path

    @property
    def _shelf(self) -> Shelf:
        return Shelf(self.folder, "preset", (".yaml", ".yml"), SHIPPED, MAX_BYTES)

    def names(self) -> list[str]:
        """All names, sorted without regard to case. A broken file is listed and fails when it is chosen. Raises DataError."""
        return self._shelf.names()

    def own(self) -> set[str]:
        """The names of the files in the folder. Raises DataError."""
        return self._shelf.own()

    def get(self, name: str) -> dict[str, Any]:
        """A value for each of NAMES. Raises NotFound, NameError_, SettingsError for a file that is wrong, DataError."""
        file, stored = self._stored(name)
        for key in stored.keys() - set(NAMES):
            hint = nearest(key[:60], NAMES)
            logger.warning("%s: %r is no parameter of a preset; it is kept but has no effect.%s", file, key[:60], hint)
        values = NEUTRAL.replace({key: value for key, value in stored.items() if key in NAMES}, file).model_dump()
        return {key: values[key] for key in NAMES}

    def save(self, name: str, values: Mapping[str, Any]) -> Path:
        """Write the user's preset from those of `values` that a preset sets, keeping keys of its file that are unknown here; the file's path.

        Raises NameError_, SettingsError, DataError; the first also for a value that is wrong.
        """
        built = NEUTRAL.replace({key: value for key, value in values.items() if key in NAMES}, name).model_dump()
        neutral = NEUTRAL.model_dump()
        changed = {key: built[key] for key in NAMES if built[key] != neutral[key]}
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in changed.items()}
        former = self._stored(name)[1] if name in self.own() else {}
        return self._shelf.write(name, yaml_text({**plain, **{key: value for key, value in former.items() if key not in NAMES}}))

    def delete(self, name: str) -> None:
        """Delete the user's files of that name; a shipped preset of the name is there again. Raises NotFound, NameError_, DataError."""
        self._shelf.delete(name)

    def _stored(self, name: str) -> tuple[str, Mapping[str, Any]]:
        found = self._shelf.text(name)
        return (found[0], yaml_mapping(found[1], found[0], typed=True)) if found else (name, SHIPPED[name])
