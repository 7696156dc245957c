"""ModelSlot: the models in memory, as a rule one. Loads, unloads, unloads when idle, and says who may generate.

One of them is the current one, which the page uses; further ones are there for the API with --max-loaded-models. A load waits for the running
replies of what has to go, and says so. Where memory suffices for both, the former model goes when the new one is ready; else it goes first, and
is loaded again when the new one fails. Unloading does not wait: it ends replies, with a clear error.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from modules import memory
from modules.backends.base import Adapter, Adapting, Backend, CancelToken, EngineStats, Measured
from modules.choices import Choice, Choices
from modules.devices import devices
from modules.errors import Busy, ModelError, NoModel, UserError
from modules.inspect_model import inspect
from modules.log import logger
from modules.model_settings import FILE, ModelSettings
from modules.options import Options
from modules.paths import UserData, write_atomically
from modules.places import Places
from modules.turn_lock import TurnLock

IDLE_CHECK_SECONDS = 5.0
PATIENCE = 600.0
"""Seconds that a load waits for running replies, or a request for a load."""


@dataclass(frozen=True)
class ModelStatus:
    """What the page shows about the current model."""

    state: Literal["none", "loading", "ready", "failed"] = "none"
    name: str | None = None
    loader: str | None = None
    progress: float = 0.0
    text: str = "No model is loaded."
    context_length: int | None = None
    memory: int | None = None
    samplers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loaded:
    """A model in memory."""

    name: str
    loader: str
    memory: int
    """Bytes of main memory."""
    users: int
    """Replies that are written, or wait for their turn."""
    current: bool


@dataclass
class _Loaded:
    choice: Choice
    backend: Backend
    status: ModelStatus
    turns: TurnLock = field(default_factory=TurnLock)
    last_use: float = 0.0
    users: int = 0
    leaving: bool = False
    """Nobody begins with it any more."""

    def __post_init__(self) -> None:
        self.last_use = time.monotonic()
        self.own_template = self.backend.chat_template


def measured(backend: Backend) -> Measured | None:
    """`backend`, if it tells what it does."""
    return cast(Measured, backend) if "stats" in backend.features else None


@dataclass(frozen=True)
class Rules:
    """What the settings say about models in memory."""

    idle_minutes: int = 0
    """Without use, after which a model is unloaded. 0: never."""
    most: int = 1
    on_request: bool = False
    """A request that names a model may load it."""
    explicit: frozenset[str] = frozenset()
    """Options given by flags: they win over what is saved for a model."""


class ModelSlot:
    """The models in memory. Every method may be called from any thread."""

    def __init__(
        self,
        data: UserData,
        options: Mapping[type[Options], Options],
        rules: Rules | None = None,
        places: Places | None = None,
        template: Callable[[str], str] | None = None,
    ) -> None:
        """`template` gives the text of an instruction template by name."""
        self.data = data
        self.choices = Choices(data, options, places or Places((data.models,), {}), ModelSettings(data.models / FILE))
        self.rules = rules or Rules()
        self.adapters: tuple[Adapter, ...] = ()
        """To use with every model that can (`--lora`)."""
        self._template = template
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._loading: CancelToken | None = None
        self._loaded: dict[str, _Loaded] = {}
        self._current: _Loaded | None = None
        self._former: Choice | None = None  # given up for the load under way; in use again if that fails
        self._idle_choice: Choice | None = None  # until another one is ready
        self._retiring: list[_Loaded] = []  # replaced, and still writing replies
        self._status = ModelStatus()
        self._listeners: list[Callable[[], None]] = []
        self._on_load: list[Callable[[Backend], None]] = []
        self._closed = threading.Event()
        if self.rules.idle_minutes:
            threading.Thread(target=self._watch_idle, name="idle-unload", daemon=True).start()

    # --- asking ---------------------------------------------------------------------------------------------------------------------

    def status(self) -> ModelStatus:
        """The present state; `memory` is read now."""
        with self._lock:
            loaded, status = self._current, self._status
        if not loaded or status.state != "ready":
            return status
        if not loaded.backend.alive():
            return replace(status, text="The engine stopped. It is started again by itself.")
        return replace(status, memory=loaded.backend.memory())

    def loaded(self) -> tuple[Loaded, ...]:
        """The models in memory."""
        with self._lock:
            there = [(each, each is self._current) for each in self._loaded.values()]
        return tuple(Loaded(each.choice.name, each.choice.loader.name, each.backend.memory(), each.users, current) for each, current in there)

    def stats(self) -> EngineStats | None:
        """What the engine does; None without a model, or when its engine does not tell. Never waits, and loads nothing."""
        backend = self.loaded_backend()
        engine = measured(backend) if backend else None
        return engine.stats() if engine else None

    @property
    def places(self) -> Places:
        """Where models are."""
        return self.choices.places

    @property
    def settings(self) -> ModelSettings:
        """What is saved for each model."""
        return self.choices.settings

    def names(self) -> list[str]:
        """See `Choices.names`."""
        return self.choices.names()

    def last_used(self) -> str:
        """The name of the model that was loaded last, by an earlier run too, if it is still there; else ""."""
        try:
            name = self._last_file.read_text("utf-8")[:4096].strip()
            return name if name and self.choices.path(name) else ""
        except (OSError, ValueError, UserError):
            return ""

    @property
    def _last_file(self) -> Path:
        return self.data.cache / "last-model.txt"

    def _remember(self, choice: Choice) -> None:
        with suppress(UserError, ValueError):  # a convenience only; a name may hold what UTF-8 cannot
            write_atomically(self._last_file, choice.name)

    def listen(self, changed: Callable[[], None]) -> None:
        """Call `changed` after each change of the status, from any thread. It must be short and must not raise."""
        with self._lock:
            self._listeners.append(changed)

    def on_load(self, loaded: Callable[[Backend], None]) -> None:
        """Call `loaded` with each model before anybody can use it. It must be short, must not raise and must not ask this slot."""
        with self._lock:
            self._on_load.append(loaded)

    @property
    def backend(self) -> Backend:
        """The current model; loads it again if it was unloaded for being idle. Raises NoModel."""
        with self._lock:
            if self._current:
                return self._current.backend
        with self.use("") as backend:
            return backend

    def backend_of(self, name: str) -> Backend:
        """The model called `name` if it is in memory; for "" see `backend`. Raises NoModel."""
        if not name:
            return self.backend
        with self._lock:
            if name not in self._loaded:
                raise NoModel(f"The model {name!r} is not loaded any more. Load it, or choose another one.")
            return self._loaded[name].backend

    def name_of(self, backend: Backend) -> str:
        """What `backend` is called. Raises NoModel when it is not in memory any more."""
        with self._lock:
            name = next((name for name, each in self._loaded.items() if each.backend is backend), None)
        if name is None:
            raise NoModel("The model was replaced while the request was being read. Send again.")
        return name

    @property
    def file(self) -> Path | None:
        """The file or folder of the current model."""
        return self.file_of("")

    def file_of(self, name: str) -> Path | None:
        """The file or folder of the model called `name`, if it is in memory; of the current one for ""."""
        with self._lock:
            loaded = self._loaded.get(name) if name else self._current
            return loaded.choice.path if loaded else None

    def status_of(self, name: str) -> ModelStatus:
        """The status, as it was when it was loaded, of the model that `answering` named; of the current one for "", or when that has gone."""
        with self._lock:
            loaded = self._loaded.get(name, self._current)
            return loaded.status if loaded else self._status

    def loaded_as(self, name: str) -> Backend | None:
        """The model called `name` if it is in memory."""
        with self._lock:
            loaded = self._loaded.get(name)
            return loaded.backend if loaded else None

    def loaded_backend(self) -> Backend | None:
        """The current model if it is there now. Unlike `backend` this never loads it again, and it is no use that keeps it from being idle."""
        with self._lock:
            return self._current.backend if self._current else None

    def answering(self, name: str) -> str:
        """The name of the model that answers a request for `name`: where that one is not to be had, the current one; "" where there is none."""
        may_load = bool(name) and self.rules.on_request and name not in self._loaded and self.choices.known(name)
        with self._lock:
            if name in self._loaded or may_load:
                return name
            return self._current.choice.name if self._current else ""

    @contextmanager
    def use(self, name: str, cancel: CancelToken | None = None) -> Iterator[Backend]:
        """The model called `name`, as `answering` gave it, kept in memory meanwhile; loads it if need be. Raises NoModel, Busy, ModelError."""
        loaded = self._enter(name, cancel or CancelToken())
        if loaded is None:
            raise NoModel("The request was given up while the model was awaited.")
        try:
            yield loaded.backend
        finally:
            self._leave(loaded)

    @contextmanager
    def turn(self, cancel: CancelToken, name: str = "") -> Iterator[Backend | None]:
        """The model, and the right to generate with it: the lock, or a place in the engine's own batch when it has "parallel".

        `name`: as for `use`. Yields None if cancelled while waiting. Raises NoModel, Busy, ModelError.
        """
        loaded = self._enter(name, cancel)
        if loaded is None:
            yield None
            return
        try:
            if "parallel" in loaded.backend.features:
                yield loaded.backend
                return
            with loaded.turns.turn(cancel) as held:
                yield loaded.backend if held else None
        finally:
            self._leave(loaded)

    def _leave(self, loaded: _Loaded) -> None:
        with self._lock:
            loaded.users -= 1
            loaded.last_use = time.monotonic()
            self._changed.notify_all()

    def _enter(self, name: str, cancel: CancelToken) -> _Loaded | None:
        """The model, counted as in use: from then on it is not idle, and no load makes it go. None if cancelled while waiting."""
        while True:
            with self._lock:
                found = self._loaded.get(name) if name else self._current
                if found and not found.leaving:
                    found.users += 1
                    return found
                waits = self.rules.on_request if name else self._idle_choice is not None  # that one is on its way
                if self._loading and waits:
                    if not self._wait(lambda: not self._loading, cancel):
                        return None
                    continue
                if not name:
                    choice = self._again()
            if name:
                if not self.rules.on_request:
                    raise NoModel(self._why_none() if self._loading else f"The model {name!r} is not loaded any more. Send again.")
                choice = self.choose(name)
            with self._lock:  # another request may have loaded it, or begun to, while this one chose
                if self._loading or (name in self._loaded if name else self._current):
                    continue
                begun = self._begin(choice)
            self._load(choice, begun, take_over=not name)

    def _again(self) -> Choice:
        """The model that was unloaded for being idle. Raises NoModel."""
        if self._idle_choice is None or self._loading:
            raise NoModel(self._why_none())
        return self._idle_choice

    def _why_none(self) -> str:
        if self._loading:
            return "The model is still loading. Your text is kept; send it again when the model is ready."
        return "No model is loaded. Choose one on the Model tab and press Load; your text is kept."

    def _wait(self, true: Callable[[], bool], cancel: CancelToken) -> bool:
        """Wait, holding the lock, until `true()`; False if cancelled. Raises Busy when it takes too long."""
        cancel.on_cancel(self._wake)
        if not self._changed.wait_for(lambda: true() or cancel.cancelled or self._closed.is_set(), PATIENCE):
            raise Busy("Replies of the model that has to go are still running. Stop them, or try again later.", retry_after=30)
        return true()

    def _wake(self) -> None:
        with self._lock:
            self._changed.notify_all()

    # --- choosing -------------------------------------------------------------------------------------------------------------------

    def choose(self, name: str, loader: str = "", options: Mapping[str, Any] | None = None, *, anywhere: bool = False) -> Choice:
        """See `Choices.choose`."""
        return self.choices.choose(name, loader, options, self.rules.explicit, anywhere)

    def use_template(self, name: str) -> None:
        """Let the model called `name`, if it is in memory, use the instruction template that is saved for it, or its own. Raises NotFound, …"""
        with self._lock:
            loaded = self._loaded.get(name)
        if loaded:
            self._apply_template(loaded)
            self._tell()

    def _apply_template(self, loaded: _Loaded) -> None:
        saved = self.settings.get(loaded.choice.name).instruction_template
        wanted = self._template(saved) if saved and self._template else loaded.own_template
        if loaded.backend.chat_template != wanted:
            loaded.backend.chat_template = wanted

    # --- loading --------------------------------------------------------------------------------------------------------------------

    def load(self, choice: Choice) -> None:
        """Load, and return when it is done. Raises ModelError (the former model is then in use again) or Busy."""
        self._load(choice, self._begin(choice))

    def start_loading(self, choice: Choice) -> None:
        """Load on a thread of its own; the status tells how it goes. Raises Busy when another load is under way."""
        cancel = self._begin(choice)
        threading.Thread(target=self._load_quietly, args=(choice, cancel), name="load-model", daemon=True).start()

    def cancel_loading(self) -> None:
        """Stop a load under way. It may be some seconds before the loader hears of it: the status says so."""
        with self._lock:
            cancel = self._loading
            if cancel:
                self._status = replace(self._status, text="Cancelling…")
        if cancel:
            self._tell()
            cancel.cancel()

    def unload(self, name: str | None = None) -> None:
        """Free a model, or all; running replies end with an error and what they had so far. A load under way is cancelled with all."""
        with self._lock:
            gone = [each for each in self._loaded.values() if name in (None, each.choice.name)]
            if name is None:
                gone += self._retiring
                self._former = self._idle_choice = None
                self.cancel_loading()
            for each in gone:
                self._forget(each)
            if not self._loading and not self._current and (gone or name is None):
                self._status = ModelStatus()
        for each in gone:
            each.backend.unload()
            logger.info("Unloaded %s", each.choice.name)
        self._tell()

    def close(self) -> None:
        """Unload and stop watching."""
        self._closed.set()
        self._wake()
        self.unload()

    def _forget(self, loaded: _Loaded) -> None:
        if self._loaded.get(loaded.choice.name) is loaded:
            del self._loaded[loaded.choice.name]
        if self._current is loaded:
            self._current = None

    def _begin(self, choice: Choice) -> CancelToken:
        with self._lock:
            if self._loading:
                raise Busy("Another model is being loaded. Wait for it, or cancel it on the Model tab.", retry_after=5)
            self._loading = CancelToken()
            self._set(ModelStatus("loading", choice.name, choice.loader.name, text="Starting…"))
            return self._loading

    def _load_quietly(self, choice: Choice, cancel: CancelToken) -> None:
        try:
            self._load(choice, cancel)
        except UserError as error:
            logger.log(logging.INFO if cancel.cancelled else logging.ERROR, "%s", error)
        except Exception:  # noqa: BLE001  a thread's top: the status must not stay "loading" for ever
            logger.exception("Loading %s failed", choice.name)

    def _load(self, choice: Choice, cancel: CancelToken, take_over: bool = True) -> None:
        """Load; with `take_over` the model is the current one then, else only where none is."""
        with self._lock:
            self._former = None
        began = time.monotonic()
        try:
            if choice.loader.inspected:
                inspect(choice.path)  # a broken file makes nobody go
            later = self._make_room(choice, cancel)
            options = _with_layers(choice)
            backend = choice.loader.load(choice.path, options, self._progress(choice, cancel), cancel)
            self._adapt(backend)
            self._ready(choice, backend, cancel, time.monotonic() - began, later, take_over)
        except BaseException as error:
            self._failed(choice, cancel, error)
            raise
        for each in later:
            threading.Thread(target=self._retire_later, args=(each,), name="retire-model", daemon=True).start()
        _compare(choice, backend, options)

    def _make_room(self, choice: Choice, cancel: CancelToken) -> list[_Loaded]:
        """Unload what has to go before the load; what can stay until the new one is ready is returned. Raises ModelError if cancelled, Busy."""
        with self._lock:
            by_use = sorted(self._loaded.values(), key=lambda each: (each.users > 0, each.last_use))
            same = [each for each in by_use if each.choice.name == choice.name]
            others = [each for each in by_use if each not in same]
        too_many = max(0, len(others) + 1 - self.rules.most)
        going, staying = [*same, *others[:too_many]], others[too_many:]
        if not by_use:
            return []
        fits = _fits(choice)
        if fits:
            return going
        while going or (fits is False and staying):
            self._retire(going.pop(0) if going else staying.pop(0), cancel)
            if fits is False and (fits := _fits(choice)):
                return going
        return []

    def _retire(self, loaded: _Loaded, cancel: CancelToken) -> None:
        """Unload a model when its replies have ended; nobody begins with it meanwhile. Raises ModelError if cancelled, Busy."""
        with self._lock:
            loaded.leaving = True
            try:
                if loaded.users and self._status.state == "loading":
                    self._set(replace(self._status, text=f"Waiting for running replies of {loaded.choice.name}: {loaded.users}…"))
                if not self._wait(lambda: not loaded.users, cancel):
                    raise ModelError("Loading was cancelled.")
            except UserError:
                loaded.leaving = False
                raise
            if self._current is loaded:
                self._former = loaded.choice
            self._forget(loaded)
        loaded.backend.unload()
        logger.info("Unloaded %s", loaded.choice.name)

    def _retire_later(self, loaded: _Loaded) -> None:
        """Unload a model that has been replaced, when its replies have ended; after a long time all the same."""
        try:
            self._retire(loaded, CancelToken())
        except UserError:
            loaded.backend.unload()
        finally:
            with self._lock:
                self._retiring.remove(loaded)

    def _adapt(self, backend: Backend) -> None:
        """Load the adapters. The model goes without one that does not fit it."""
        for adapter in self.adapters:
            try:
                if "adapters" not in backend.features:
                    raise ModelError(f"{backend.name} cannot use LoRA adapters. Leave --lora out.")
                cast(Adapting, backend).load_adapter(adapter.path)
            except UserError as error:
                logger.error("%s", error)

    def _progress(self, choice: Choice, cancel: CancelToken) -> Callable[[float, str], None]:
        def progress(fraction: float, words: str) -> None:
            if self._loading is cancel and not cancel.cancelled:
                self._set(ModelStatus("loading", choice.name, choice.loader.name, progress=min(max(fraction, 0.0), 1.0), text=words))

        return progress

    def _ready(self, choice: Choice, backend: Backend, cancel: CancelToken, seconds: float, later: list[_Loaded], take_over: bool) -> None:
        status = ModelStatus(
            "ready",
            choice.name,
            choice.loader.name,
            1.0,
            f"Loaded in {seconds:.1f} s.",
            backend.context_length,
            samplers=tuple(sorted(choice.loader.samplers)),
        )
        loaded = _Loaded(choice, backend, status)
        try:
            self._apply_template(loaded)
        except UserError as error:  # it is gone, or wrong: the model has its own
            logger.error("%s", error)
        with self._lock:
            wanted = not (cancel.cancelled or self._closed.is_set())
            if wanted:
                self._loading = self._former = self._idle_choice = None
                for each in later:
                    self._forget(each)
                self._retiring += later
                self._loaded[choice.name] = loaded
                self._current = loaded if take_over or not self._current else self._current
                self._status = self._current.status
                for told in self._on_load:
                    told(backend)
                self._changed.notify_all()
        if not wanted:
            backend.unload()
            raise ModelError("Loading was cancelled.")
        self._remember(choice)
        logger.info("Loaded %s in %.1f s with %s, context %d tokens", choice.name, seconds, choice.loader.name, backend.context_length)
        self._tell()

    def _failed(self, choice: Choice, cancel: CancelToken, error: BaseException) -> None:
        words = str(error) if isinstance(error, UserError) else f"Loading failed: {type(error).__name__}. The terminal has the details."
        with self._lock:
            self._loading = None
            former = None if self._closed.is_set() or self._current else self._former
            again = self._begin(former) if former else None
        if former and again:
            self._restore(former, again)
            words += f" {former.name} is in use again." if self._current else ""
        elif self._current and not cancel.cancelled:
            words += f" {self._current.choice.name} is still in use."
        status = ModelStatus("failed", choice.name, choice.loader.name, text=words)
        if cancel.cancelled:
            status = ModelStatus(text="Loading was cancelled.")
        with self._lock:
            if not self._loading:  # else the next load has begun meanwhile
                self._status = replace(self._current.status, text=words) if self._current else status
            self._changed.notify_all()
        self._tell()

    def _restore(self, former: Choice, cancel: CancelToken) -> None:
        try:
            self._load(former, cancel)
        except UserError as error:
            logger.error("Could not load %s again: %s", former.name, error)

    # --- idle -----------------------------------------------------------------------------------------------------------------------

    def _watch_idle(self) -> None:
        while not self._closed.wait(IDLE_CHECK_SECONDS):
            self.unload_if_idle()

    def unload_if_idle(self) -> None:
        """Free the models that nobody used for the idle time; the next use loads the current one again."""
        minutes = self.rules.idle_minutes
        with self._lock:
            before = time.monotonic() - minutes * 60
            idle = [each for each in self._loaded.values() if not each.users and each.last_use <= before]
            for each in idle:
                if each is self._current:
                    name, self._idle_choice = each.choice.name, each.choice
                    self._status = ModelStatus("none", name, text=f"{name} was unloaded while idle; the next message loads it again.")
                self._forget(each)
        for each in idle:
            each.backend.unload()
            logger.info("Unloaded %s after %d minutes without use", each.choice.name, minutes)
        if idle:
            self._tell()

    def _set(self, status: ModelStatus) -> None:
        with self._lock:
            self._status = status
        self._tell()

    def _tell(self) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener()


def _fits(choice: Choice) -> bool | None:
    """Whether the model fits into the memory that is free now; None where that cannot be said."""
    if choice.loader.elsewhere:
        return True
    if not choice.loader.inspected:
        return None
    try:
        machine = memory.usable(choice.options, devices())
        card = inspect(choice.path)
        return memory.fits(memory.estimate(card, memory.with_best_layers(card, choice.options, machine), machine), machine)
    except UserError:  # the loader says better what is wrong
        return None


def _compare(choice: Choice, backend: Backend, options: Options) -> None:
    """Log what was expected of the model's memory beside what it is."""
    if not choice.loader.own_process:
        return
    with suppress(UserError):
        found = memory.estimate(inspect(choice.path), options, memory.usable(options, devices()))
        logger.info("%s", memory.compared(found, backend.memory()))


def _with_layers(choice: Choice) -> Options:
    """The options, with as many layers on the GPUs as fit there where that is left to us (gpu_layers −1)."""
    if not choice.loader.inspected:
        return choice.options
    try:
        return memory.with_best_layers(inspect(choice.path), choice.options, memory.usable(choice.options, devices()))
    except UserError:  # the loader says better what is wrong
        return choice.options
