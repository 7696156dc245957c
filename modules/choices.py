"""Choosing a model: from its name to the file, the loader and the options to load it with."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from modules import loaders
from modules.backends import openai_server
from modules.backends.base import Loader
from modules.backends.openai_server.options import OpenAIServerOptions
from modules.errors import ModelError, SettingsError, UserError
from modules.log import logger
from modules.model_settings import ModelSettings, Saved
from modules.options import Options
from modules.paths import UserData
from modules.places import Places


@dataclass(frozen=True)
class Choice:
    """A model, the loader and the options to load it with."""

    name: str
    path: Path
    loader: Loader
    options: Options


@dataclass(frozen=True)
class Choices:
    """What there is to choose from, and what loading it would mean."""

    data: UserData
    configured: Mapping[type[Options], Options]
    places: Places
    settings: ModelSettings

    def names(self) -> list[str]:
        """Names of all models, of a server named in the settings too. May wait some seconds for that one."""
        remote = self.configured.get(openai_server.LOADER.options)
        return [*self.places.names(), *(openai_server.models(remote) if remote else ())]

    def path(self, name: str) -> Path:
        """The file or folder of the model called `name`; a name at a server is none. Raises NotFound, NameError_."""
        return Path(name) if name.startswith(openai_server.PREFIX) else self.places.path(name)

    def known(self, name: str) -> bool:
        """Whether a request may have `name` loaded: a model that is here, or one at the server that is configured."""
        if name.startswith(openai_server.PREFIX):
            remote = cast("OpenAIServerOptions | None", self.configured.get(OpenAIServerOptions))
            return bool(remote and remote.server_url)
        try:
            return bool(self.places.path(name))
        except UserError:
            return False

    def choose(
        self, name: str, loader: str = "", options: Mapping[str, Any] | None = None, explicit: Set[str] = frozenset(), anywhere: bool = False
    ) -> Choice:
        """What loading `name` would mean: with what is configured, what is saved for the model, and `options`, the later the stronger.

        What was configured `explicit`ly, by flags, is stronger than what is saved. `anywhere` allows a path outside the places of models (the
        command line only). Raises NotFound, NameError_, ModelError or SettingsError.
        """
        literal = Path(name).expanduser()
        path = literal if anywhere and literal.exists() else self.path(name)
        known = path.name if path is literal else name
        saved = self.settings.get(known)
        found = loaders.named(loader) if loader else _saved_loader(known, saved) or _detected(name, path)
        configured = self.configured.get(found.options) or found.options()
        fields = found.options.model_fields
        if not loader:  # who lets the loader be found cannot know whose options count: those of the others are left out
            others = {name for other in loaders.LOADERS for name in other.options.model_fields} - set(fields)
            options = {name: value for name, value in (options or {}).items() if name not in others}
        start_only = {name for name, knob in found.options.knobs().items() if knob.start_only}
        for option in start_only & set(options or {}):
            raise SettingsError(f"{option} can only be given when the server is started: --{option.replace('_', '-')}.")
        stored = {name: value for name, value in saved.options.items() if name in fields and name not in start_only | explicit}
        usual = configured.replace(stored, str(self.settings.path))
        return Choice(known, path, found, self._with_files(usual.replace(options or {}, found.name), configured))

    def _with_files(self, options: Options, configured: Options) -> Options:
        """`options` with the names of files as paths. What was configured where the server starts may be a path already."""
        paths = {}
        for name, knob in type(options).knobs().items():
            value = getattr(options, name) if knob.file else ""
            if value:
                literal = Path(value).expanduser()
                trusted = value == getattr(configured, name) and literal.exists()
                paths[name] = str(literal.absolute() if trusted else self.data.file(knob.file, value))
        return options.replace(paths) if paths else options


def _saved_loader(name: str, saved: Saved) -> Loader | None:
    """The loader that is saved for a model; None for one that is not here, as in files of the earlier system."""
    try:
        return loaders.named(saved.loader) if saved.loader else None
    except ModelError as error:
        logger.warning("%s: %s It is found from the file instead.", name, error)
        return None


def _detected(name: str, path: Path) -> Loader:
    return openai_server.LOADER if name.startswith(openai_server.PREFIX) else loaders.detect(path)
