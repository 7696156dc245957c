"""LoRA adapters in use: which there are, and another set of them while the model runs."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

from modules.app import App
from modules.backends.base import Adapter, Adapting, Backend
from modules.errors import Busy, ModelError, SettingsError, UserError

PEFT = "adapter_config.json"
_one_at_a_time = threading.Lock()


def names(app: App) -> list[str]:
    """All adapters of the LoRA folder: GGUF files, and folders as PEFT writes them."""
    folder = app.data.loras
    found = {name_of(app, path) for path in folder.rglob("*.gguf")} | {name_of(app, path.parent) for path in folder.rglob(PEFT)}
    return sorted(found - {"."})


def name_of(app: App, path: Path) -> str:
    """As in the LoRA folder; one from elsewhere (`--lora`) by the name of its file."""
    return path.relative_to(app.data.loras).as_posix() if path.is_relative_to(app.data.loras) else path.name


def named(app: App, adapters: Sequence[tuple[str, float]]) -> list[Adapter]:
    """Adapters from names and scales. Raises NotFound, NameError_, SettingsError."""
    if not all(math.isfinite(scale) for _, scale in adapters):
        raise SettingsError("The scale of an adapter must be a finite number.")
    return [Adapter(app.data.file("lora", name), scale) for name, scale in adapters]


def use(app: App, wanted: Sequence[Adapter]) -> None:
    """Use these from now on, and no others. Raises NoModel; ModelError when one does not fit, and then all stays as it was."""
    with _one_at_a_time:
        backend = app.models.backend
        if wanted and "adapters" not in backend.features:
            raise ModelError(f"{backend.name} cannot use LoRA adapters. Load a model that another loader runs.")
        before = {path.resolve() for path in cast(Adapting, backend).adapters} if "adapters" in backend.features else set()
        try:
            for adapter in wanted:
                cast(Adapting, backend).load_adapter(adapter.path)
        except UserError:
            _drop(backend, [adapter.path for adapter in wanted if adapter.path.resolve() not in before])
            raise
        former, app.models.adapters = app.models.adapters, tuple(wanted)
        kept = {adapter.path.resolve() for adapter in wanted}
        _drop(backend, [adapter.path for adapter in former if adapter.path.resolve() not in kept])


def use_none(app: App) -> None:
    """Use no adapters from now on, with a model or without."""
    with _one_at_a_time:
        former, app.models.adapters = app.models.adapters, ()
        backend = app.models.loaded_backend()
        if backend:
            _drop(backend, [adapter.path for adapter in former])


def _drop(backend: Backend, paths: Sequence[Path]) -> None:
    """Free adapters. One that a reply under way uses stays in memory, without taking part in what comes."""
    for path in paths if "adapters" in backend.features else ():
        with suppress(Busy):
            cast(Adapting, backend).unload_adapter(path)
