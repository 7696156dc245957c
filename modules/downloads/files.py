"""What a repository of the Hub offers, and which of its files are wanted. Pure: names, sizes and rules, no network, no disk.

Every name comes from a server and is hostile: one that could not be a file here is left out, and refused when it is asked for.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import unquote, urlsplit

from modules.errors import NameError_, NotFound, SettingsError
from modules.options import nearest
from modules.paths import MAX_PARTS, UserData, inside, safe_name

Kind = Literal["gguf", "transformers", "adapter"]

PREFERRED = "Q4_K_M"
QUANTS = (
    "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K_S", "Q2_K", "Q2_K_L", "Q2_K_XL", "IQ3_XXS", "IQ3_XS",
    "Q3_K_S", "IQ3_S", "IQ3_M", "Q3_K_M", "Q3_K_L", "Q3_K_XL", "IQ4_XS", "IQ4_NL", "Q4_0", "MXFP4", "Q4_K_S", "Q4_1", "Q4_K_M", "Q4_K_L",
    "Q4_K_XL", "Q5_0", "Q5_K_S", "Q5_1", "Q5_K_M", "Q5_K_L", "Q5_K_XL", "Q6_K", "Q6_K_L", "Q6_K_XL", "Q8_0", "Q8_K_XL", "BF16", "F16", "F32",
)  # fmt: skip
"""Number formats of GGUF files, smallest first: the nearest to PREFERRED is taken where that is not offered."""

_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_OTHER_WEIGHTS = {".msgpack", ".h5", ".onnx", ".tflite", ".ot", ".pb", ".mlmodel", ".npz", ".llamafile", ".dduf"}
_NOT_NEEDED = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".mp4", ".mp3", ".wav", ".pdf", ".zip"}
_TEXTS = {".json", ".txt", ".md", ".jinja", ".jinja2", ".model", ".tiktoken", ".yaml", ".yml"}
_OTHER_FOLDERS = {"onnx", "openvino", "original", "coreml", "metal", "gguf"}
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.IGNORECASE)
_QUANT = re.compile(rf"(?:^|[-._/])({'|'.join(sorted(QUANTS, key=len, reverse=True))})(?=[-._/]|$)", re.IGNORECASE)
_REPO_PART = r"[A-Za-z0-9_](?:[\w.-]{0,94}[\w])?"
_REPO = re.compile(rf"{_REPO_PART}/{_REPO_PART}", re.ASCII)
_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. Large ones have a SHA-256; small ones only the SHA-1 that Git gives their content."""

    name: str
    size: int
    sha256: str = ""
    git_sha1: str = ""

    @property
    def digest(self) -> str:
        """What it is told from others by."""
        return self.sha256 or self.git_sha1

    @property
    def quant(self) -> str:
        """Number format of a GGUF file as its name tells it, or ""."""
        found = _QUANT.findall(self.name) if self.suffix == ".gguf" else []
        return found[-1].upper() if found else ""

    @property
    def suffix(self) -> str:
        """Such as ".gguf"."""
        return PurePosixPath(self.name).suffix.lower()

    @property
    def base(self) -> str:
        """The name without folders."""
        return PurePosixPath(self.name).name


@dataclass(frozen=True)
class Wanted:
    """What a person asked for."""

    repo: str
    branch: str = "main"
    file: str = ""


@dataclass(frozen=True)
class Plan:
    """A repository at one commit: what there is, and what would be taken."""

    repo: str
    branch: str
    revision: str
    kind: Kind
    files: tuple[RemoteFile, ...]
    chosen: tuple[str, ...]
    """Names taken unless others are asked for."""
    note: str = ""
    """What a person should know before."""

    @property
    def target(self) -> str:
        """Name of the folder for what is no GGUF file: `user_model`, with the branch unless that is main."""
        branch = "" if self.branch == "main" else "_" + re.sub(r"[^\w.-]", "_", self.branch)
        return self.repo.replace("/", "_") + branch

    def choose(self, names: Iterable[str]) -> tuple[RemoteFile, ...]:
        """These files, split ones whole. Raises NotFound, NameError_."""
        known = {file.name: file for file in self.files}
        found: dict[str, RemoteFile] = {}
        for name in names:
            if name not in known:
                check_name(name)
                raise NotFound(f"There is no file {name[:200]!r} in {self.repo} at {self.branch}.{nearest(name[:200], known)}")
            found |= {each.name: each for each in whole(self.files, known[name])}
        if not found:
            raise NotFound(f"No file of {self.repo} was chosen. Choose one.")
        return tuple(found.values())

    def destination(self, data: UserData, file: RemoteFile, output: Path | None = None) -> Path:
        """Where `file` goes: GGUF files flat into the folder of their kind, others into a folder of the repository's name."""
        check_name(file.name)
        if output:
            return inside(output, file.name, "file name")
        folder = data.loras if self.kind == "adapter" else data.models
        if file.suffix != ".gguf":
            return inside(folder, f"{self.target}/{file.name}", "file name")
        if is_vision(file):  # all of them have the same name
            return inside(data.mmproj, f"{self.repo.partition('/')[2]}-{file.base}", "file name")
        return inside(folder, file.base, "file name")


def wanted(text: str, branch: str = "", host: str = _HUB_HOSTS[0]) -> Wanted:
    """Read `user/model`, `user/model:branch` or a link to a repository, a branch of it or one of its files. Raises SettingsError."""
    text = text.strip()
    file = ""
    if "://" in text or text.startswith(tuple(f"{name}/" for name in _HUB_HOSTS)):
        link = urlsplit(text if "://" in text else "https://" + text)
        if link.netloc not in (host, *_HUB_HOSTS):
            raise SettingsError(f"This link is not one of {host}. Give user/model or a link to a repository there.")
        repo, found, file = _parts([unquote(part) for part in link.path.split("/") if part])
    else:
        repo, _, found = text.partition(":")
    branch = (branch or found or "main").strip()
    if not _REPO.fullmatch(repo) or ".." in repo:
        raise SettingsError(f"{repo[:100]!r} is no name of a repository. Write user/model, user/model:branch, or paste a link.")
    if not re.fullmatch(r"[\w./ +-]{1,120}", branch) or ".." in branch:
        raise SettingsError(f"{branch[:100]!r} is no name of a branch. Leave it empty for main.")
    return Wanted(repo, branch, file)


def _parts(parts: list[str]) -> tuple[str, str, str]:
    """Repository, branch and file of a link's path."""
    repo, rest = "/".join(parts[:2]), parts[2:]
    if len(rest) >= 2 and rest[0] in ("resolve", "blob", "raw"):
        return repo, rest[1], "/".join(rest[2:])
    return repo, rest[1] if len(rest) >= 2 and rest[0] == "tree" else "", ""


def usable(name: str) -> bool:
    """Whether a file can have that name here. Hidden files are of no use."""
    try:
        check_name(name)
    except NameError_:
        return False
    return True


def check_name(name: str) -> None:
    """Raises NameError_ for what could not be a file here, or would lie elsewhere."""
    parts = name.split("/")
    for part in parts:
        safe_name(part, "file name")
    if len(parts) > MAX_PARTS:
        raise NameError_(f"The file name {name[:60]!r}… has more than {MAX_PARTS} parts. It cannot be loaded.")


def is_vision(file: RemoteFile) -> bool:
    """Whether it is the vision part of a model."""
    return file.suffix == ".gguf" and "mmproj" in file.base.lower()


def whole(files: Sequence[RemoteFile], file: RemoteFile) -> list[RemoteFile]:
    """`file`, and the other parts of a GGUF model that it is a part of. Raises NotFound when one of these is not there."""
    split = _PART.search(file.name)
    if not split:
        return [file]
    stem, count = file.name[: split.start()], int(split[1])
    names = [f"{stem}-{part:05d}-of-{split[1]}{file.name[-5:]}" for part in range(1, min(count, 1000) + 1)]
    known = {each.name: each for each in files}
    missing = [name for name in names if name not in known]
    if missing:
        raise NotFound(f"{missing[0]} is missing in the repository: the model has {count} files. Choose another one.")
    return [known[name] for name in names]


def kind_of(files: Iterable[RemoteFile]) -> Kind:
    """What a repository holds."""
    names, suffixes = set(), set()
    for file in files:
        names.add(file.name)
        suffixes.add(file.suffix)
    if "adapter_config.json" in names:
        return "adapter"
    return "gguf" if ".gguf" in suffixes and ".safetensors" not in suffixes else "transformers"


def chosen(files: Sequence[RemoteFile], kind: Kind, pattern: str = "", exclude: str = "", text_only: bool = False) -> tuple[str, ...]:
    """Names of the files to take. `pattern`: a name or a pattern with * and ?; `exclude`: a regular expression. Raises NotFound, SettingsError."""
    if pattern:
        found = [file for file in files if pattern in (file.name, file.base) or any(map(fnmatch.fnmatch, (file.name, file.base), [pattern] * 2))]
        if not found:
            if not any(character in pattern for character in "*?["):
                check_name(pattern)
            raise NotFound(f"No file there is called {pattern[:200]!r}.{nearest(pattern[:200], [file.name for file in files])}")
    elif kind == "gguf" and not text_only:
        found = _best(files)
    else:
        found = _needed(files)
    if text_only:
        found = [file for file in found if file.suffix in _TEXTS]
    if exclude:
        try:
            unwanted = re.compile(exclude)
        except re.error as error:
            raise SettingsError(f"The pattern of files to leave out is wrong: {error}. Correct it.") from None
        found = [file for file in found if not unwanted.search(file.name)]
    return tuple(dict.fromkeys(each.name for file in found for each in whole(files, file)))


def _best(files: Iterable[RemoteFile]) -> list[RemoteFile]:
    """The GGUF file in PREFERRED, or else the one nearest to it; of equal ones the smaller."""
    models = [file for file in files if file.suffix == ".gguf" and not is_vision(file) and "imatrix" not in file.base.lower()]

    def distance(file: RemoteFile) -> tuple[int, int, str]:
        place = QUANTS.index(file.quant) if file.quant else 2 * len(QUANTS)
        return abs(place - QUANTS.index(PREFERRED)), place, file.name

    return sorted(models, key=distance)[:1]


def _needed(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """What a model or adapter in a folder needs: safetensors rather than pickles, one form of the weights."""
    left_out = _OTHER_WEIGHTS | _NOT_NEEDED
    names = {file.name for file in files}
    if any(file.suffix == ".safetensors" for file in files):
        left_out = left_out | _PICKLED | {".gguf"}
    twice = any(re.match(r"model.*\.safetensors$", name) for name in names)

    def needed(file: RemoteFile) -> bool:
        folder = file.name.partition("/")[0] if "/" in file.name else ""
        if file.suffix in left_out or folder in _OTHER_FOLDERS:
            return False
        return not (twice and file.base.startswith("consolidated"))  # the same weights in the form of their makers

    return [file for file in files if needed(file)]


def note_of(files: Sequence[RemoteFile], names: Sequence[str]) -> str:
    """What a person should know of these files, or ""."""
    by_name = {file.name: file for file in files}
    if any(by_name[name].suffix in _PICKLED - {".bin"} or re.search(r"(model|adapter).*\.bin$", name) for name in names):
        return "Its weights are pickles, which can hold programs: they are loaded only when the server was started with --allow-pickle."
    if any(map(is_vision, files)) and not any(is_vision(by_name[name]) for name in names):
        return "It can see: choose an mmproj file too if you want to show it images."
    return ""
