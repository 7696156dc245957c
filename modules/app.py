"""App: everything a turn needs, built once and passed explicitly. No globals; importing this loads no engine, no torch, no gradio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from modules import loaders
from modules.ahead import Ahead
from modules.characters import Characters, Users
from modules.hashes import FileHashes
from modules.instruction_templates import Templates
from modules.metrics import Metrics
from modules.models import ModelSlot
from modules.options import Options
from modules.paths import UserData
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
    replies: Replies
    sessions: Sessions
    ahead: Ahead
    present: Callable[[], Presenter]
    """Makes the presenter of one reply."""
    stops: Stops = field(default_factory=Stops)
    """Those of the API's replies."""

    def store_of(self, conversation: str | None) -> Store:
        """Where a conversation is kept; its id tells."""
        return self.incognito if conversation and conversation.startswith(INCOGNITO) else self.store

    def close(self) -> None:
        """End replies, saving them; free the model; close the store."""
        self.ahead.close()
        self.replies.close()
        self.models.close()
        self.store.close()
        self.incognito.close()


def option_groups() -> Sequence[type[Options]]:
    """The classes of options besides Settings, for `settings.load`."""
    return (SamplingParams, ChatOptions, PageOptions, *(loader.options for loader in loaders.LOADERS))


def build(configuration: Configuration, data: UserData, store: Store, present: Callable[[], Presenter]) -> App:
    """Join the parts."""
    sampling, chat, page = configuration.group(SamplingParams), configuration.group(ChatOptions), configuration.group(PageOptions)
    models = ModelSlot(data, configuration.groups, configuration.settings.idle_timeout)
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
        Templates(data.instruction_templates),
        FileHashes(data.cache / "hashes.json"),
        Replies(),
        Sessions(store, sampling, chat, page),
        Ahead(),
        present,
    )
