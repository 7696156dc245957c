"""Where models are: the model folders, and the caches of other programs, which are read in place. A model has one name for page, API and files.

    Own models: the path in a model folder, "folder/model.gguf". Of folders that have the same name, the first counts.
    Of other programs: "lmstudio:publisher/repository/file.gguf", "ollama:model:tag", "huggingface:owner/repository[/file.gguf]".

No file name has a colon here (`paths.safe_name`), so the two never mix. Layouts: the documentation of LM Studio, of Ollama, and of huggingface_hub
("Cache-system reference").
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modules import loaders
from modules.errors import AccessDenied, DataError, NotFound
from modules.gguf import part_files
from modules.paths import inside

MAX_MANIFEST = 1 << 20
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_LIBRARY = "registry.ollama.ai/library/"


def other_programs(environment: Mapping[str, str], home: Path) -> dict[str, Path]:
    """The caches of other programs that are there, by the prefix of their models' names."""
    hub = environment.get("HF_HUB_CACHE") or str(Path(environment.get("HF_HOME") or home / ".cache/huggingface") / "hub")
    usual: dict[str, tuple[str | Path, ...]] = {
        "lmstudio": (home / ".lmstudio/models", home / ".cache/lm-studio/models"),
        "ollama": (environment.get("OLLAMA_MODELS", ""), home / ".ollama/models", "/usr/share/ollama/.ollama/models"),
        "huggingface": (hub,),
    }
    found = {}
    for prefix, folders in usual.items():
        there = next((Path(each) for each in folders if each and _is_folder(Path(each))), None)
        if there:
            found[prefix] = there
    return found


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # not ours to look into
        return False


@dataclass(frozen=True)
class Places:
    """All places. Reads the disk at each question: files come and go."""

    folders: Sequence[Path]
    caches: Mapping[str, Path]
    """By prefix, as of `other_programs`."""

    def names(self) -> list[str]:
        """Names of all models: ours in natural order, then those of each other program. What cannot be read is left out."""
        ours = dict.fromkeys(name for folder in self.folders for name in loaders.list_models(folder))
        found = loaders.natural_order(ours)
        for prefix, folder in self.caches.items():
            found += [f"{prefix}:{name}" for name in loaders.natural_order(set(_readable(_LISTS[prefix](folder))))]
        return found

    def path(self, name: str) -> Path:
        """The existing file or folder of the model called `name`. Raises NotFound, NameError_."""
        prefix, colon, rest = name.partition(":")
        if colon and prefix in self.caches:
            path = _PATHS[prefix](self.caches[prefix], rest)
        else:
            paths = [inside(folder, name, "model name") for folder in self.folders]
            path = next((each for each in paths if each.exists()), None)
        if path is None or not path.exists():
            where = " or ".join(map(str, self.folders))
            raise NotFound(f"There is no model {name!r} in {where}. Put it there, or choose one from the list on the Model tab.")
        return path

    def own(self, name: str) -> bool:
        """Whether it lies in one of our folders, so that it is ours to delete."""
        return name.partition(":")[0] not in self.caches

    def delete(self, name: str) -> None:
        """Delete the files of a model of ours: all parts of a split one. Raises NotFound, AccessDenied, DataError."""
        if not self.own(name):
            raise AccessDenied(f"{name!r} belongs to another program. Delete it there.")
        path = self.path(name)
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                for part in part_files(path):
                    part.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"Cannot delete {error.filename or path}: {error.strerror}. Close what uses it, or make the folder writable.") from None


def _readable(names: Iterator[str]) -> Iterator[str]:
    try:
        yield from names
    except OSError:
        return


# --- LM Studio ----------------------------------------------------------------------------------------------------------------------------


def _lmstudio(folder: Path) -> Iterator[str]:
    yield from loaders.list_models(folder)


def _in_folder(folder: Path, name: str) -> Path:
    return inside(folder, name, "model name")


# --- Ollama -------------------------------------------------------------------------------------------------------------------------------


def _ollama(folder: Path) -> Iterator[str]:
    manifests = folder / "manifests"
    for path in manifests.rglob("*"):
        relative = path.relative_to(manifests).as_posix()
        if path.is_file() and relative.count("/") >= 2 and _weights(folder, path):
            model, _, tag = relative.rpartition("/")
            yield f"{model.removeprefix(_LIBRARY).removeprefix('registry.ollama.ai/')}:{tag}"


def _of_ollama(folder: Path, name: str) -> Path | None:
    model, _, tag = name.rpartition(":")
    for registry in (_LIBRARY, "registry.ollama.ai/", ""):
        manifest = inside(folder / "manifests", f"{registry}{model}/{tag}", "model name")
        if manifest.is_file():
            return _weights(folder, manifest)
    return None


def _weights(folder: Path, manifest: Path) -> Path | None:
    """The file of weights that a manifest names; None where it names none, or is no manifest."""
    try:
        if manifest.stat().st_size > MAX_MANIFEST:
            return None
        found = json.loads(manifest.read_text("utf-8"))
        layers = [layer for layer in found["layers"] if layer["mediaType"] == "application/vnd.ollama.image.model"]
        digest = _DIGEST.fullmatch(layers[0]["digest"])
    except (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError):
        return None
    return folder / "blobs" / f"sha256-{digest[1]}" if digest else None


# --- the Hub's cache ----------------------------------------------------------------------------------------------------------------------


def _huggingface(folder: Path) -> Iterator[str]:
    for path in folder.glob("models--*--*"):
        owner, _, name = path.name.removeprefix("models--").partition("--")
        snapshot = _snapshot(path)
        if snapshot is None:
            continue
        inner = loaders.list_models(snapshot)
        yield from (f"{owner}/{name}/{each}" for each in inner)
        if not inner and loaders.takes(snapshot):
            yield f"{owner}/{name}"


def _of_huggingface(folder: Path, name: str) -> Path | None:
    owner, _, rest = name.partition("/")
    repository, _, inner = rest.partition("/")
    snapshot = _snapshot(inside(folder, f"models--{owner}--{repository}", "model name"))
    if snapshot is None or not inner:
        return snapshot
    return inside(folder, f"{snapshot.relative_to(folder).as_posix()}/{inner}", "model name")


def _snapshot(repository: Path) -> Path | None:
    """The files of the branch main, or of what was fetched last."""
    snapshots = repository / "snapshots"
    try:
        named = snapshots / (repository / "refs" / "main").read_text("ascii").strip()[:64]
        if named.parent == snapshots and named.is_dir():
            return named
    except (OSError, ValueError):
        pass
    try:
        return max(snapshots.iterdir(), key=lambda path: path.stat().st_mtime, default=None)
    except OSError:
        return None


_LISTS: Mapping[str, Callable[[Path], Iterator[str]]] = {"lmstudio": _lmstudio, "ollama": _ollama, "huggingface": _huggingface}
_PATHS: Mapping[str, Callable[[Path, str], Path | None]] = {"lmstudio": _in_folder, "ollama": _of_ollama, "huggingface": _of_huggingface}
