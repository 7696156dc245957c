"""App: everything a turn needs, built once and passed explicitly. No globals; importing this loads no engine, no torch, no gradio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modules import loaders
from modules.ahead import Ahead
from modules.metrics import Metrics
from modules.models import ModelSlot
from modules.options import Options
from modules.paths import UserData
from modules.replies import Presenter, Replies
from modules.samplers import SamplingParams
from modules.sessions import Sessions
from modules.settings import ChatOptions, Configuration, Settings
from modules.store import Store


@dataclass(frozen=True)
class App:
    """The running program."""

    settings: Settings
    configuration: Configuration
    data: UserData
    models: ModelSlot
    metrics: Metrics
    store: Store
    replies: Replies
    sessions: Sessions
    ahead: Ahead
    present: Callable[[], Presenter]
    """Makes the presenter of one reply."""

    def close(self) -> None:
        """End replies, saving them; free the model; close the store."""
        self.ahead.close()
        self.replies.close()
        self.models.close()
        self.store.close()


def option_groups() -> Sequence[type[Options]]:
    """The classes of options besides Settings, for `settings.load`."""
    return (SamplingParams, ChatOptions, *(loader.options for loader in loaders.LOADERS))


def build(configuration: Configuration, data: UserData, store: Store, present: Callable[[], Presenter]) -> App:
    """Join the parts."""
    sampling, chat = configuration.group(SamplingParams), configuration.group(ChatOptions)
    models = ModelSlot(data, configuration.groups, configuration.settings.idle_timeout)
    return App(
        configuration.settings,
        configuration,
        data,
        models,
        Metrics(models),
        store,
        Replies(),
        Sessions(store, sampling, chat),
        Ahead(),
        present,
    )
