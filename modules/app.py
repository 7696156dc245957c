"""App: everything a turn needs, built once and passed explicitly. No globals; importing this loads no engine, no torch, no gradio."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modules import loaders
from modules.ahead import Ahead
from modules.characters import Characters, Users
from modules.conversions import Conversions
from modules.downloads import Downloads
from modules.hashes import FileHashes
from modules.instruction_templates import Templates
from modules.metrics import Metrics
from modules.model_settings import ModelSettings
from modules.models import ModelSlot, Rules
from modules.options import Options
from modules.paths import UserData
from modules.places import Places
from modules.presets import Presets
from modules.prompts import Prompts
from modules.replies import Presenter, Replies, Stops
from modules.samplers import SamplingParams
from modules.sessions import Sessions
from modules.settings import ChatOptions, Configuration, PageOptions, Settings
from modules.store import INCOGNITO, Store


@dataclass(frozen=True)
class App:
    """The running program."""

    settings: Settings
    configuration: Configuration
    data: UserData
    models: ModelSlot
    metrics: Metrics
    store: Store
    incognito: Store
    """Conversations that are never on disk."""
    presets: Presets
    characters: Characters
    users: Users
    prompts: Prompts
    templates: Templates
    hashes: FileHashes
    downloads: Downloads
    conversions: Conversions
    replies: Replies
    sessions: Sessions
    ahead: Ahead
    present: Callable[[], Presenter]
    """Makes the presenter of one reply."""
    stops: Stops = field(default_factory=Stops)
    """Those of the API's replies."""

    @property
    def places(self) -> Places:
        """Where models are."""
        return self.models.places

    @property
    def model_settings(self) -> ModelSettings:
        """What is saved for each model."""
        return self.models.settings

    def store_of(self, conversation: str | None) -> Store:
        """Where a conversation is kept; its id tells."""
        return self.incognito if conversation and conversation.startswith(INCOGNITO) else self.store

    def close(self) -> None:
        """Pause downloads; end a conversion and replies, saving them; free the model; close the store."""
        self.ahead.close()
        self.downloads.close()
        self.conversions.close()
        self.replies.close()
        self.models.close()
        self.store.close()
        self.incognito.close()


def option_groups() -> Sequence[type[Options]]:
    """The classes of options besides Settings, for `settings.load`."""
    return (SamplingParams, ChatOptions, PageOptions, *(loader.options for loader in loaders.LOADERS))


def build(
    configuration: Configuration, data: UserData, store: Store, present: Callable[[], Presenter], caches: Mapping[str, Path] | None = None
) -> App:
    """Join the parts. `caches`: those of other programs, whose models are listed too (`places.other_programs`)."""
    sampling, chat, page = configuration.group(SamplingParams), configuration.group(ChatOptions), configuration.group(PageOptions)
    chosen, templates = configuration.settings, Templates(data.instruction_templates)
    rules = Rules(chosen.idle_timeout, chosen.max_loaded_models, chosen.load_on_request, configuration.explicit)
    places = Places((data.models, *data.more_models), caches or {})
    models = ModelSlot(data, configuration.groups, rules, places, templates.get)
    return App(
        configuration.settings,
        configuration,
        data,
        models,
        Metrics(models),
        store,
        Store.open_memory(),
        Presets(data.presets),
        Characters(data.characters),
        Users(data.users),
        Prompts(data.prompts),
        templates,
        FileHashes(data.cache / "hashes.json"),
        Downloads(data),
        Conversions(),
        Replies(),
        Sessions(store, sampling, chat, page),
        Ahead(),
        present,
    )
