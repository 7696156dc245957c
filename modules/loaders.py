"""LOADERS: the engines this program knows, in the order they are asked. Listing them imports none of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from modules.backends import echo, llama_cpp, openai_server, transformers
from modules.backends.base import Loader
from modules.errors import ModelError
from modules.options import nearest

LOADERS: tuple[Loader, ...] = (llama_cpp.LOADER, transformers.LOADER, openai_server.LOADER, echo.LOADER)

_LATER_PART = re.compile(r"-(?!0*1-of-)\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def named(name: str) -> Loader:
    """The loader called `name`, in any usual spelling (llama.cpp, llamacpp, llama-cpp). Raises ModelError with the list."""
    for loader in LOADERS:
        if _plain(loader.name) == _plain(name):
            return loader
    known = [loader.name for loader in LOADERS]
    raise ModelError(f"There is no loader {name[:60]!r} here; there are: {', '.join(known)}.{nearest(name[:60], known)}")


def takes(path: Path) -> bool:
    """Whether some loader takes the file or folder."""
    return any(loader.detect(path) for loader in LOADERS)


def detect(path: Path) -> Loader:
    """The loader for the model at `path`. Raises ModelError when none takes it."""
    for loader in LOADERS:
        if loader.detect(path):
            return loader
    raise ModelError(f"No loader takes {path.name!r}. Use a .gguf file, or a folder with a config.json and .safetensors files.")


def list_models(folder: Path) -> list[str]:
    """Names (relative to `folder`, with '/') of the models there, in natural order; only the first part of split files.

    A folder is named only when what is in it is not named itself.
    """
    if not folder.is_dir():
        return []
    paths = [
        path
        for path in folder.rglob("*")
        if not _LATER_PART.search(path.name) and not path.name.startswith("mmproj") and not _hidden(path, folder) and takes(path)
    ]
    around = {parent for path in paths for parent in path.parents}
    found = [path.relative_to(folder).as_posix() for path in paths if path not in around]
    return natural_order(found)


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def natural_order(names: Iterable[str]) -> list[str]:
    """Sorted as people count: model-2 before model-10."""
    return sorted(names, key=_natural)


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name.lower()) if part]
