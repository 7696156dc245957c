"""transformers' progress bars as our progress, and an end between two weights once loading is cancelled."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from modules.backends.base import CancelToken, Progress
from modules.errors import ModelError

START, READ, END = 0.05, 0.6, 0.95
"""Where weights begin to be loaded; where a file that the library reads as a whole is read; where all are in their places."""
_HOOK = threading.Lock()
"""transformers has one hook for its progress bars."""


def check_cancel(cancel: CancelToken) -> None:
    """Raise ModelError once cancelled."""
    if cancel.cancelled:
        raise ModelError("Loading was cancelled. Load the model again when you want it.")


@contextmanager
def watched(progress: Progress, cancel: CancelToken) -> Iterator[None]:
    """Within it, what transformers shows as bars is told to `progress`, and a bar's loop ends with ModelError once cancelled. Nothing is printed."""
    import transformers
    from transformers import modeling_gguf_pytorch_utils as gguf_reader

    start = START

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], values: dict[str, Any]) -> Any:
        made = factory(*args, **values)
        length = getattr(args[0], "__len__", None) if args else None
        total = values.get("total") or (length() if length else 0)
        return _Watched(made, total, (start, END), "Loading the model", progress, cancel) if args and total else made

    def reading(tensors: Any, **_words: Any) -> Any:
        nonlocal start
        start = READ
        return _Watched(tensors, len(tensors), (START, READ), "Reading the file", progress, cancel)

    with _HOOK:
        former, bar = transformers.utils.logging.set_tqdm_hook(hook), gguf_reader.tqdm
        gguf_reader.tqdm = reading  # that module's bar knows no hook
        try:
            progress(START, "Loading the model")
            yield
        finally:
            gguf_reader.tqdm = bar
            transformers.utils.logging.set_tqdm_hook(former)


class _Watched:
    """A progress bar, or what would have been in one, that is iterated over."""

    def __init__(self, bar: Iterable[Any], total: int, span: tuple[float, float], words: str, progress: Progress, cancel: CancelToken) -> None:
        self._bar: Any = bar
        self._total, self._span, self._words, self._progress, self._cancel = total, span, words, progress, cancel

    def __iter__(self) -> Iterator[Any]:
        shown = 0
        start, end = self._span
        for done, each in enumerate(self._bar):
            check_cancel(self._cancel)
            percent = 100 * done // self._total
            if percent != shown:
                shown = percent
                self._progress(start + (end - start) * percent / 100, f"{self._words}: {percent} %")
            yield each

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *_error: object) -> None:
        self._bar.close()
