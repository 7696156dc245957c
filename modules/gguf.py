"""Bounded reader of GGUF headers: what a model file says about itself, without its vocabulary and weights.

The file is hostile until read: every length is checked against the file's size, long lists are skipped, counts are limited, tensors must lie
inside the file and apart. Time and memory are bounded whatever the file says. Format: GGUF specification, ggml `docs/gguf.md`.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from modules.errors import ModelError

Scalar = int | float | bool | str

MAX_KEYS = 65_536
MAX_TENSORS = 100_000
MAX_STRINGS = 4_000_000  # in all arrays together; the largest vocabularies with merges have under a million
MAX_STRING = 4 << 20  # of a value that is kept: chat templates are the longest
MAX_TEXT = 32 << 20  # of all values that are kept
MAX_KEY = 65_535
MAX_NAME = 512  # of a tensor; ggml allows 63 bytes
MAX_LIST = 4096  # numbers of a list that is kept: those with one for each layer
MAX_LISTED = 65_536  # in all of these together
MAX_PARTS = 1000
_BLOCK = 1 << 20

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9

TENSOR_TYPES: dict[int, tuple[int, int]] = {
    **{0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36)},
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292)},
    **{16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136)},
    **{24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17)},
}
"""Number of a ggml type → (elements in a block, bytes of a block). A type not listed is newer than this table: its size is not checked."""


@dataclass(frozen=True)
class Tensor:
    """One tensor: `shape` with the numbers that lie together first, `kind` a key of TENSOR_TYPES or newer. `size` in bytes is 0 if newer."""

    shape: tuple[int, ...]
    kind: int
    size: int
    place: int = field(default=0, compare=False)
    """Where its first byte is in the file."""

    @property
    def elements(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What stands before the weights.

    `metadata` holds the scalars and texts, `lists` the short lists of numbers, `lengths` how long each list is; `whole_list` reads the others.
    """

    path: Path
    version: int
    file_size: int
    metadata: Mapping[str, Scalar]
    lists: Mapping[str, tuple[int | float | bool, ...]]
    lengths: Mapping[str, int]
    tensors: Mapping[str, Tensor]
    list_places: Mapping[str, int] = field(default_factory=dict, repr=False)
    """Where each list begins in the file: its type, its length, its values."""

    @property
    def n_tensors(self) -> int:
        """In this file."""
        return len(self.tensors)

    def of_architecture(self, key: str) -> Scalar | None:
        """The value of `<architecture>.<key>`."""
        return self.metadata.get(f"{self.architecture}.{key}")

    def _number(self, key: str) -> int:
        value = self.of_architecture(key)
        return value if isinstance(value, int) and value > 0 else 0

    def _text(self, key: str) -> str:
        value = self.metadata.get(key)
        return value if isinstance(value, str) else ""

    @property
    def architecture(self) -> str:
        """Such as `llama`."""
        return self._text("general.architecture")

    @property
    def name(self) -> str:
        """The model's own name, or its file's."""
        return self._text("general.name") or self.path.stem

    @property
    def context_length(self) -> int:
        """Context the model was trained for, in tokens; 0 when not said."""
        return self._number("context_length")

    @property
    def block_count(self) -> int:
        """Layers; 0 when not said."""
        return self._number("block_count")

    @property
    def chat_template(self) -> str | None:
        """Jinja source, hostile until proven otherwise."""
        return self._text("tokenizer.chat_template") or None

    @property
    def split(self) -> tuple[int, int]:
        """(number of this part from 0, parts in all); (0, 1) for a model in one file."""
        number, count = self.metadata.get("split.no", 0), self.metadata.get("split.count", 1)
        return (int(number), max(int(count), 1)) if isinstance(number, int) and isinstance(count, int) else (0, 1)


class _Bad(Exception):
    """What is wrong with the file, in words that continue "<file> …"."""


def read_header(path: Path) -> Header:
    """The header of a GGUF file. Raises ModelError with what is wrong and what to do about it."""
    try:
        with path.open("rb") as file:
            return _header(path, _Reader(file, path.stat().st_size))
    except FileNotFoundError:
        raise ModelError(f"There is no file {path}. Choose a model from the list on the Model tab.") from None
    except OSError as error:
        raise ModelError(f"Cannot read {path}: {error.strerror or error}. Check the file and its permissions.") from error
    except _Bad as bad:
        raise ModelError(f"{path.name} {bad}") from None


def whole_list(header: Header, key: str) -> list[Scalar]:
    """All values of a list in the header, however long; [] when there is none. Raises ModelError when the file has changed meanwhile."""
    if key not in header.list_places:
        return []
    try:
        with header.path.open("rb") as file:
            reader = _Reader(file, header.path.stat().st_size)
            reader.skip(header.list_places[key])
            kind, count = reader.u32(), reader.u64()
            if count != header.lengths[key] or kind not in {_STRING, *_SCALARS}:
                raise _Bad("changed while it was read. Wait until its download has finished.")
            if kind == _STRING:
                return [reader.string(MAX_KEY, f"a text of {key[:60]!r}") for _ in range(count)]
            form = f"<{count}{_SCALARS[kind][1]}"
            return list(struct.unpack(form, reader.take(struct.calcsize(form))))
    except OSError as error:
        raise ModelError(f"Cannot read {header.path}: {error.strerror or error}. Check the file and its permissions.") from error
    except _Bad as bad:
        raise ModelError(f"{header.path.name} {bad}") from None


class _Reader:
    """Little-endian values from a file through a sliding window. Every read is checked against the file's size first."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.size = size
        self._file = file
        self._window = b""
        self._start = 0  # position of the window in the file
        self._at = 0  # position in the window
        self.strings_left = MAX_STRINGS
        self.text_left = MAX_TEXT
        self.listed_left = MAX_LISTED

    @property
    def position(self) -> int:
        return self._start + self._at

    def _need(self, count: int) -> None:
        if self._at + count <= len(self._window):
            return
        position = self.position
        if position + count > self.size:
            raise _Bad("is cut short: it ends inside its header. Download or copy it again.")
        self._file.seek(position)
        self._window, self._start, self._at = self._file.read(max(count, _BLOCK)), position, 0
        if len(self._window) < count:
            raise _Bad("became shorter while it was read. Wait until its download has finished.")

    def take(self, count: int) -> bytes:
        self._need(count)
        self._at += count
        return self._window[self._at - count : self._at]

    def skip(self, count: int) -> None:
        if self.position + count > self.size:
            raise _Bad("is cut short or damaged: a length in its header leads behind its end. Download or copy it again.")
        self._at += count

    def number(self, form: str) -> int | float | bool:
        value: int | float | bool = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def u32(self) -> int:
        return int(self.number("<I"))

    def u64(self) -> int:
        return int(self.number("<Q"))

    def string(self, limit: int, what: str) -> str:
        length = self.u64()
        if self.position + length > self.size:
            raise _Bad(f"is cut short or damaged: {what} is longer than the file. Download or copy it again.")
        if length > limit:
            raise _Bad(f"has {what} of {length} bytes, more than the {limit} allowed. Use another file of this model.")
        return self.take(length).decode("utf-8", "replace")

    def skip_strings(self, count: int) -> None:
        self.strings_left -= count
        if count * 8 > self.size - self.position or self.strings_left < 0:
            raise _Bad("is damaged: a list in its header is longer than the file or has too many texts. Download or copy it again.")
        unpack = struct.Struct("<Q").unpack_from
        window, at, last = self._window, self._at, len(self._window) - 8
        for _ in range(count):  # local names and one comparison: a vocabulary has 100,000 texts
            if at > last:
                self._at = at
                self._need(8)
                window, at, last = self._window, self._at, len(self._window) - 8
            at += 8 + unpack(window, at)[0]
        self._at = at
        self.skip(0)


def _header(path: Path, reader: _Reader, later_part: bool = False) -> Header:
    if reader.size < 4 or reader.take(4) != b"GGUF":
        raise _Bad("is not a GGUF file. Choose a file that ends in .gguf, and download it again if it does.")
    version = reader.u32()
    if version not in (2, 3):
        raise _Bad(f"is GGUF of version {version}; versions 2 and 3 can be read. Use a newer conversion of this model.")
    n_tensors, n_keys = reader.u64(), reader.u64()
    if n_tensors > MAX_TENSORS or n_keys > MAX_KEYS:
        raise _Bad(f"is damaged: it claims {n_tensors} tensors and {n_keys} keys. Download or copy it again.")
    metadata, lists, lengths, places = _metadata(reader, n_keys)
    if not later_part and not isinstance(metadata.get("general.architecture"), str):
        raise _Bad("does not say its architecture, so nothing can load it. Use another conversion of this model.")
    tensors = _tensors(reader, n_tensors, _alignment(metadata))
    return Header(path, version, reader.size, metadata, lists, lengths, tensors, places)


_Lists = dict[str, tuple[int | float | bool, ...]]


def _metadata(reader: _Reader, count: int) -> tuple[dict[str, Scalar], _Lists, dict[str, int], dict[str, int]]:
    """Scalars and texts, short lists of numbers, lengths of all lists, their places."""
    metadata: dict[str, Scalar] = {}
    lists: _Lists = {}
    lengths: dict[str, int] = {}
    places: dict[str, int] = {}
    seen: set[str] = set()
    for _ in range(count):
        key = reader.string(MAX_KEY, "a key")
        if key in seen:
            raise _Bad(f"is damaged: it has the key {key[:60]!r} twice. Use another conversion of this model.")
        seen.add(key)
        kind = reader.u32()
        if kind == _ARRAY:
            places[key] = reader.position
            lengths[key], numbers = _list(reader, key)
            if numbers is not None:
                lists[key] = numbers
        elif kind == _STRING:
            metadata[key] = text = reader.string(MAX_STRING, f"the value of {key[:60]!r}")
            reader.text_left -= len(text)
        elif kind in _SCALARS:
            metadata[key] = reader.number(_SCALARS[kind])
        else:
            raise _Bad(f"is damaged: the key {key[:60]!r} has the unknown type {kind}. Download or copy it again.")
        reader.text_left -= len(key)
        if reader.text_left < 0:
            raise _Bad(f"has more than {MAX_TEXT} bytes of texts in its header. Use another conversion of this model.")
    return metadata, lists, lengths, places


def _list(reader: _Reader, key: str) -> tuple[int, tuple[int | float | bool, ...] | None]:
    """Length of a list, and what is in it if that is a few numbers."""
    kind, count = reader.u32(), reader.u64()
    if kind == _STRING:
        reader.skip_strings(count)
    elif kind not in _SCALARS:
        raise _Bad(f"is damaged: the list {key[:60]!r} holds the type {kind}, which lists cannot. Download or copy it again.")
    elif count <= min(MAX_LIST, reader.listed_left):
        reader.listed_left -= count
        form = f"<{count}{_SCALARS[kind][1]}"
        return count, struct.unpack(form, reader.take(struct.calcsize(form)))
    else:
        reader.skip(count * struct.calcsize(_SCALARS[kind]))
    return count, None


def _alignment(metadata: Mapping[str, Scalar]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment <= 0 or alignment & (alignment - 1):
        raise _Bad(f"is damaged: its alignment is {alignment!r}, not a power of two. Use another conversion of this model.")
    return alignment


def _tensors(reader: _Reader, count: int, alignment: int) -> dict[str, Tensor]:
    """The tensors by name; they lie inside the file and apart."""
    tensors: dict[str, Tensor] = {}
    offsets: dict[str, int] = {}
    for _ in range(count):
        name = reader.string(MAX_NAME, "a tensor's name")
        if name in tensors:
            raise _Bad(f"is damaged: it has the tensor {name[:60]!r} twice. Download or copy it again.")
        offsets[name], tensors[name] = _tensor(reader, name, alignment)
    start = -(-reader.position // alignment) * alignment
    end = 0
    for offset, size in sorted((offsets[name], tensor.size) for name, tensor in tensors.items()):
        if offset < end:
            raise _Bad("is damaged: its tensors overlap. Download or copy it again.")
        end = offset + size
    if start + end > reader.size:
        raise _Bad(f"is cut short: it should have {start + end:,} bytes and has {reader.size:,}. Download or copy it again.")
    return {name: replace(tensor, place=start + offsets[name]) for name, tensor in tensors.items()}


def _tensor(reader: _Reader, name: str, alignment: int) -> tuple[int, Tensor]:
    """A tensor, and where it begins, counted from the start of the weights."""
    n_dimensions = reader.u32()
    if n_dimensions > 4:
        raise _Bad(f"is damaged: the tensor {name[:60]!r} has {n_dimensions} dimensions. Download or copy it again.")
    shape = tuple(reader.u64() for _ in range(n_dimensions))
    kind, offset = reader.u32(), reader.u64()
    block, size = TENSOR_TYPES.get(kind, (1, 0))
    row = shape[0] if shape else 1
    if row % block or offset % alignment or any(length >= 1 << 63 for length in shape):
        raise _Bad(f"is damaged: the tensor {name[:60]!r} has a size or place that its type does not allow. Download or copy it again.")
    return offset, Tensor(shape, kind, math.prod(shape) // block * size)


_PART = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$", re.IGNORECASE)


def model_file(path: Path) -> Path:
    """The file to load for `path`: the file itself, or the model in a folder (its first part if split). Raises ModelError."""
    if not path.is_dir():
        return path
    files = sorted(f for f in path.glob("*.gguf") if is_first_part(f) and not f.name.lower().startswith("mmproj"))
    if len(files) != 1:
        found = ", ".join(f.name for f in files[:5]) or "none"
        raise ModelError(f"The folder {path} must hold exactly one GGUF model (found: {found}). Choose the file itself.")
    return files[0]


def mmproj_beside(model: Path) -> Path | None:
    """The vision part of `model`: the only one in its folder, if no other model lies there that it could belong to."""
    files = [file for file in model.parent.glob("*.gguf") if is_first_part(file)]
    vision = [file for file in files if file.name.lower().startswith("mmproj")]
    return vision[0] if len(vision) == 1 and len(files) == 2 else None


def looks_like_gguf(path: Path) -> bool:
    """By its name; Ollama's files are named by their hashes only: those are looked into."""
    if path.suffix.lower() == ".gguf":
        return True
    if not path.name.startswith("sha256-"):
        return False
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def is_first_part(path: Path) -> bool:
    """False for the second and later files of a split model. Judges by the name."""
    match = _PART.match(path.name)
    return match is None or int(match["number"]) == 1


def part_files(path: Path) -> list[Path]:
    """All files of the model that `path` is, or is the first part of, or that lies alone in the folder `path`. Judges by the names.

    Raises OSError for a folder of which that cannot be said.
    """
    try:
        file = model_file(path)
    except ModelError as error:
        raise OSError(str(error)) from None
    match = _PART.match(file.name)
    if match is None:
        return [file]
    count = min(int(match["count"]), MAX_PARTS)
    return [file.with_name(f"{match['stem']}-{part:05d}-of-{match['count']}.gguf") for part in range(1, count + 1)]


def check_parts(header: Header) -> tuple[Header, ...]:
    """The headers of the later parts when `header` is the first part of a split model; () for a whole one.

    Raises ModelError when it is a later part, or other parts are missing beside it or cannot be read.
    """
    number, count = header.split
    if count == 1:
        return ()
    match = _PART.match(header.path.name)
    if number != 0 or match is None:
        raise ModelError(f"{header.path.name} is a part of a model in {count} files. Choose the first part, and do not rename the parts.")
    if count > MAX_PARTS:
        raise ModelError(f"{header.path.name} says that its model has {count} files; at most {MAX_PARTS} can be read. Use another file of it.")
    others = [header.path.with_name(f"{match['stem']}-{part:05d}-of-{count:05d}.gguf") for part in range(2, count + 1)]
    missing = [other.name for other in others if not other.exists()]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        verb = "is" if len(missing) == 1 else "are"
        raise ModelError(
            f"{', '.join(missing[:5])}{more} {verb} missing: the model has {count} files. Download what is missing into {header.path.parent}."
        )
    return tuple(read_part(other) for other in others)


def read_part(path: Path) -> Header:
    """A later part of a split model, which has a header of its own without an architecture. Raises ModelError."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise _Bad("is not a part of a GGUF model. Download it again.")
            file.seek(0)
            return _header(path, _Reader(file, path.stat().st_size), later_part=True)
    except OSError as error:
        raise ModelError(f"Cannot read {path}: {error.strerror or error}. Check the file and its permissions.") from error
    except _Bad as bad:
        raise ModelError(f"{path.name} {bad}") from None
