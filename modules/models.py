"""ModelSlot: the one model in use. Loads, unloads, unloads when idle, and says who may generate.

A failed load leaves the former model in place. The slot never waits for a generation: unloading ends it, with a clear error.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from modules import loaders
from modules.backends.base import Adapter, Adapting, Backend, CancelToken, EngineStats, Loader, Measured
from modules.errors import Busy, ModelError, NoModel, UserError
from modules.log import logger
from modules.options import Options
from modules.paths import UserData, write_atomically

MAX_WAITING = 64
IDLE_CHECK_SECONDS = 5.0


@dataclass(frozen=True)
class ModelStatus:
    """What the page shows about the model."""

    state: Literal["none", "loading", "ready", "failed"] = "none"
    name: str | None = None
    loader: str | None = None
    progress: float = 0.0
    text: str = "No model is loaded."
    context_length: int | None = None
    memory: int | None = None
    samplers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """A model, the loader and the options to load it with."""

    name: str
    path: Path
    loader: Loader
    options: Options


@dataclass
class _Loaded:
    choice: Choice
    backend: Backend
    turns: TurnLock
    last_use: float = field(default_factory=time.monotonic)
    users: int = 0


def measured(backend: Backend) -> Measured | None:
    """`backend`, if it tells what it does."""
    return cast(Measured, backend) if "stats" in backend.features else None


class TurnLock:
    """The generation lock: one holder, first come first served, a bounded queue, and waiting that a cancel ends."""

    def __init__(self, max_waiting: int = MAX_WAITING) -> None:
        self._condition = threading.Condition()
        self._queue: deque[object] = deque()
        self._max = max_waiting

    @contextmanager
    def turn(self, cancel: CancelToken) -> Iterator[bool]:
        """Hold the lock inside; yields False, without the lock, if cancelled while waiting. Raises Busy when the queue is full."""
        ticket = object()
        with self._condition:
            if len(self._queue) > self._max:
                raise Busy("Too many replies are waiting for this model. Try again in a few seconds.", retry_after=5)
            self._queue.append(ticket)
        cancel.on_cancel(self._wake)
        try:
            with self._condition:
                self._condition.wait_for(lambda: self._queue[0] is ticket or cancel.cancelled)
                held = self._queue[0] is ticket and not cancel.cancelled
            yield held
        finally:
            with self._condition:
                self._queue.remove(ticket)
                self._condition.notify_all()

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify_all()


class ModelSlot:
    """Holds at most one model. Every method may be called from any thread."""

    def __init__(self, data: UserData, options: Mapping[type[Options], Options], idle_minutes: int = 0) -> None:
        self.data = data
        self.adapters: tuple[Adapter, ...] = ()
        """To use with every model that can (`--lora`)."""
        self._options = options
        self._idle_seconds = idle_minutes * 60
        self._lock = threading.RLock()
        self._loading: CancelToken | None = None
        self._loaded: _Loaded | None = None
        self._former: Choice | None = None  # given up for the load under way; in use again if that fails
        self._idle_choice: Choice | None = None
        self._status = ModelStatus()
        self._listeners: list[Callable[[], None]] = []
        self._on_load: list[Callable[[Backend], None]] = []
        self._closed = threading.Event()
        if idle_minutes:
            threading.Thread(target=self._watch_idle, name="idle-unload", daemon=True).start()

    # --- asking ---------------------------------------------------------------------------------------------------------------------

    def status(self) -> ModelStatus:
        """The present state; `memory` is read now."""
        with self._lock:
            loaded, status = self._loaded, self._status
        if not loaded or status.state != "ready":
            return status
        if not loaded.backend.alive():
            return replace(status, text="The engine stopped. It is started again by itself.")
        return replace(status, memory=loaded.backend.memory())

    def stats(self) -> EngineStats | None:
        """What the engine does; None without a model, or when its engine does not tell. Never waits, and loads nothing."""
        backend = self.loaded_backend()
        engine = measured(backend) if backend else None
        return engine.stats() if engine else None

    def names(self) -> list[str]:
        """Names of the models in the model folder."""
        return loaders.list_models(self.data.models)

    def last_used(self) -> str:
        """The name of the model that was loaded last, by an earlier run too, if it is still there; else ""."""
        try:
            name = self._last_file.read_text("utf-8")[:4096].strip()
            return name if name and self.data.model_path(name) else ""
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
        """The model in use; loads it again if it was unloaded for being idle. Raises NoModel."""
        return self._current().backend

    @property
    def file(self) -> Path | None:
        """The file or folder of the model in memory."""
        with self._lock:
            return self._loaded.choice.path if self._loaded else None

    def loaded_backend(self) -> Backend | None:
        """The model if it is there now. Unlike `backend` this never loads it again, and it is no use that keeps it from being idle."""
        with self._lock:
            return self._loaded.backend if self._loaded and self._status.state == "ready" else None

    @contextmanager
    def turn(self, cancel: CancelToken) -> Iterator[Backend | None]:
        """The model, and the right to generate with it: the lock, or a place in the engine's own batch when it has "parallel".

        Yields None if cancelled while waiting. Raises NoModel, Busy.
        """
        loaded = self._enter()
        try:
            if "parallel" in loaded.backend.features:
                yield loaded.backend
                return
            with loaded.turns.turn(cancel) as held:
                yield loaded.backend if held else None
        finally:
            with self._lock:
                loaded.users -= 1
                loaded.last_use = time.monotonic()

    def _enter(self) -> _Loaded:
        """The model, counted as in use: from then on it is not idle."""
        while True:
            loaded = self._current()
            with self._lock:
                if loaded is self._loaded:
                    loaded.users += 1
                    return loaded

    def _current(self) -> _Loaded:
        with self._lock:
            if self._loaded:
                return self._loaded
            choice = self._idle_choice
            if choice is None or self._loading:
                raise NoModel(self._why_none())
        self._load(choice, self._begin(choice))
        return self._current()

    def _why_none(self) -> str:
        if self._loading:
            return "The model is still loading. Your text is kept; send it again when the model is ready."
        return "No model is loaded. Choose one on the Model tab and press Load; your text is kept."

    # --- changing -------------------------------------------------------------------------------------------------------------------

    def choose(self, name: str, loader: str = "", options: Mapping[str, Any] | None = None, *, anywhere: bool = False) -> Choice:
        """What loading `name` would mean. `anywhere` allows a path outside the model folder (the command line only).

        Raises NotFound, NameError_, ModelError or SettingsError.
        """
        literal = Path(name).expanduser()
        path = literal if anywhere and literal.exists() else self.data.model_path(name)
        found = loaders.named(loader) if loader else loaders.detect(path)
        configured = self._options.get(found.options) or found.options()
        if not loader:  # who lets the loader be found cannot know whose options count: those of the others are left out
            others = {name for other in loaders.LOADERS for name in other.options.model_fields} - set(found.options.model_fields)
            options = {name: value for name, value in (options or {}).items() if name not in others}
        chosen = self._with_files(configured.replace(options or {}, found.name), configured)
        return Choice(path.name if path is literal else name, path, found, chosen)

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

    def load(self, choice: Choice) -> None:
        """Load, and return when it is done. Raises ModelError (the former model is then in use again) or Busy."""
        self._load(choice, self._begin(choice))

    def start_loading(self, choice: Choice) -> None:
        """Load on a thread of its own; the status tells how it goes. Raises Busy when another load is under way."""
        cancel = self._begin(choice)
        threading.Thread(target=self._load_quietly, args=(choice, cancel), name="load-model", daemon=True).start()

    def cancel_loading(self) -> None:
        """Stop a load under way."""
        with self._lock:
            cancel = self._loading
        if cancel:
            cancel.cancel()

    def unload(self) -> None:
        """Free the model; running replies end with an error and what they had so far. A load under way is cancelled."""
        with self._lock:
            self._former = None
            self.cancel_loading()
            loaded, self._loaded, self._idle_choice = self._loaded, None, None
            if not self._loading:
                self._status = ModelStatus()
        if loaded:
            loaded.backend.unload()
            logger.info("Unloaded %s", loaded.choice.name)
        self._tell()

    def close(self) -> None:
        """Unload and stop watching."""
        self._closed.set()
        self.unload()

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
            logger.error("%s", error)
        except Exception:  # noqa: BLE001  a thread's top: the status must not stay "loading" for ever
            logger.exception("Loading %s failed", choice.name)

    def _load(self, choice: Choice, cancel: CancelToken) -> None:
        with self._lock:
            loaded, self._loaded, self._idle_choice = self._loaded, None, None
            self._former = loaded.choice if loaded else None
        began = time.monotonic()
        try:
            if loaded:  # first, because memory for two models may not be there
                loaded.backend.unload()
            backend = choice.loader.load(choice.path, choice.options, self._progress(choice, cancel), cancel)
            self._adapt(backend)
            self._ready(choice, backend, cancel, time.monotonic() - began)
        except BaseException as error:
            self._failed(choice, cancel, error)
            raise

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
            if self._loading is cancel:
                self._set(ModelStatus("loading", choice.name, choice.loader.name, progress=min(max(fraction, 0.0), 1.0), text=words))

        return progress

    def _ready(self, choice: Choice, backend: Backend, cancel: CancelToken, seconds: float) -> None:
        status = ModelStatus(
            "ready",
            choice.name,
            choice.loader.name,
            1.0,
            f"Loaded in {seconds:.1f} s.",
            backend.context_length,
            samplers=tuple(sorted(choice.loader.samplers)),
        )
        with self._lock:
            wanted = not (cancel.cancelled or self._closed.is_set())
            if wanted:
                self._loading = self._former = None
                self._loaded, self._status = _Loaded(choice, backend, TurnLock()), status
                for told in self._on_load:
                    told(backend)
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
            former = None if self._closed.is_set() else self._former
            again = self._begin(former) if former else None
        if former and again:
            self._restore(former, again)
            words += f" {former.name} is in use again." if self._loaded else ""
        status = ModelStatus("failed", choice.name, choice.loader.name, text=words)
        if cancel.cancelled:
            status = ModelStatus(text="Loading was cancelled.")
        with self._lock:
            if not self._loading:  # else the next load has begun meanwhile
                self._status = replace(self._status, text=words) if self._loaded else status
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
        """Free the model if nobody used it for the idle time; the next use loads it again."""
        with self._lock:
            loaded = self._loaded
            if not loaded or loaded.users or time.monotonic() - loaded.last_use < self._idle_seconds:
                return
            self._loaded, self._idle_choice = None, loaded.choice
            self._status = ModelStatus(
                "none", loaded.choice.name, text=f"{loaded.choice.name} was unloaded while idle; the next message loads it again."
            )
        loaded.backend.unload()
        logger.info("Unloaded %s after %d minutes without use", loaded.choice.name, self._idle_seconds // 60)
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
