"""llama.cpp: GGUF models in a process of their own. `LOADER` costs nothing until a model is loaded; see `client.py` and `engine.py`."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from modules.backends.base import Backend, CancelToken, Loader, Progress
from modules.backends.llama_cpp.options import LlamaCppOptions
from modules.backends.llama_cpp.samplers import SUPPORTED
from modules.gguf import looks_like_gguf
from modules.options import Options


def detect(path: Path) -> bool:
    """Whether `path` is a GGUF file, or a folder that holds one."""
    return any(path.glob("*.gguf")) if path.is_dir() else looks_like_gguf(path)


def _load(path: Path, options: Options, progress: Progress, cancel: CancelToken) -> Backend:
    from modules.backends.llama_cpp.client import load

    return load(path, cast(LlamaCppOptions, options), progress, cancel)


LOADER = Loader(
    name="llama.cpp", options=LlamaCppOptions, detect=detect, load=_load, samplers=SUPPORTED, package="llama_cpp", inspected=True, own_process=True
)
