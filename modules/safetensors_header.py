"""Bounded reader of safetensors headers: names, number formats, shapes and places of the tensors, without the weights.

The file is hostile until read: the header's length is limited and checked against the file, the tensors must fill the rest of the file
without gaps, and each must be as long as its shape says. Format: the safetensors README (8 bytes little-endian length, JSON, weights).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from modules.errors import ModelError

MAX_HEADER = 16 << 20
"""Bytes. The format allows 100 MB; 100,000 tensors, more than any published file has, need 16 at most, and JSON takes ten times that in memory."""
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 16
MAX_NAME = 512
MAX_ELEMENTS = 1 << 62

DTYPE_BITS: Mapping[str, int] = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64},
    **{"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64},
}
"""Bits of a number. A format that is not listed is newer than this table: its size is not checked."""


@dataclass(frozen=True)
class Tensor:
    """One tensor. Its bytes are `begin` ≤ position < `end` in the file, counted from the file's start; rows last in `shape` lie together."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What stands before the weights: the tensors in the order of their places, and the texts of `__metadata__`."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


class _Bad(Exception):
    """What is wrong with the file, in words that continue "<file> …"."""


def read_header(path: Path) -> Header:
    """The header of a safetensors file. Raises ModelError with what is wrong and what to do about it."""
    try:
        with path.open("rb") as file:
            return _header(file, path.stat().st_size)
    except FileNotFoundError:
        raise ModelError(f"There is no file {path}. Download the model again; a part of it is missing.") from None
    except OSError as error:
        raise ModelError(f"Cannot read {path}: {error.strerror or error}. Check the file and its permissions.") from error
    except _Bad as bad:
        raise ModelError(f"{path.name} {bad}") from None


def _header(file: BinaryIO, size: int) -> Header:
    if size < 8:
        raise _Bad("is no safetensors file, or is cut short. Download it again.")
    length: int = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
    if file.read(1) != b"{" or length < 2:
        raise _Bad("is no safetensors file. Choose a file that ends in .safetensors, and download it again if it does.")
    if 8 + length > size:
        raise _Bad("is cut short: it ends inside its header. Download or copy it again.")
    if length > MAX_HEADER:
        raise _Bad(f"has a header of {length} bytes, more than the {MAX_HEADER} allowed. Use another file of this model.")
    text = b"{" + file.read(length - 1)
    if len(text) != length:
        raise _Bad("became shorter while it was read. Wait until its download has finished.")
    fields = _json(text)
    metadata = _metadata(fields.pop("__metadata__", None))
    if len(fields) > MAX_TENSORS:
        raise _Bad(f"is damaged: it claims {len(fields)} tensors. Download or copy it again.")
    start = 8 + length
    tensors = {name: _tensor(name, described, start) for name, described in fields.items()}
    return Header(_in_order(tensors, start, size), metadata)


def _json(text: bytes) -> dict[str, Any]:
    """The header's JSON object. Its depth is limited by the interpreter's own limit, and what comes out is checked field by field."""
    try:
        fields = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise _Bad("is damaged: its header is no JSON. Download or copy it again.") from None
    assert isinstance(fields, dict)  # it begins with a brace
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise _Bad("is damaged: a name stands twice in its header. Download or copy it again.")
    return fields


def _no_number(constant: str) -> None:
    raise _Bad(f"is damaged: its header holds {constant}. Download or copy it again.")


def _metadata(found: Any) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise _Bad("is damaged: its metadata is not a list of texts. Download or copy it again.")
    return found


def _tensor(name: str, described: Any, start: int) -> Tensor:
    """A tensor from its description, as long as its shape says. `start`: where the weights begin."""
    if len(name) > MAX_NAME or not isinstance(described, dict):
        raise _Bad(f"is damaged: the tensor {name[:60]!r} is not described. Download or copy it again.")
    dtype = described.get("dtype")
    shape, offsets = _whole_numbers(described.get("shape")), _whole_numbers(described.get("data_offsets"))
    if not isinstance(dtype, str) or len(dtype) > 32 or shape is None or offsets is None or len(offsets) != 2:
        raise _Bad(f"is damaged: the tensor {name[:60]!r} has no proper type, shape or place. Download or copy it again.")
    begin, end = offsets
    elements = math.prod(shape)
    bits = DTYPE_BITS.get(dtype)
    if end < begin or elements > MAX_ELEMENTS or (bits is not None and (end - begin) * 8 != elements * bits):
        raise _Bad(f"is damaged: the tensor {name[:60]!r} is not as long as its shape says. Download or copy it again.")
    return Tensor(dtype, shape, start + begin, start + end)


def _whole_numbers(value: Any) -> tuple[int, ...] | None:
    """The list as a tuple if it holds nothing but a few numbers 0 ≤ n ≤ MAX_ELEMENTS."""
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        return None
    return tuple(value) if all(type(number) is int and 0 <= number <= MAX_ELEMENTS for number in value) else None


def _in_order(tensors: Mapping[str, Tensor], start: int, size: int) -> dict[str, Tensor]:
    """The tensors in the order of their places. They fill the file from `start` to its end: the format allows neither gaps nor overlaps."""
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    at = start
    for name, tensor in ordered.items():
        if tensor.begin != at:
            raise _Bad(f"is damaged: before the tensor {name[:60]!r} its tensors overlap or leave a gap. Download or copy it again.")
        at = tensor.end
    if at > size:
        raise _Bad(f"is cut short: its weights need {at} bytes and it has {size}. Download or copy it again.")
    if at < size:
        raise _Bad(f"is damaged: {size - at} bytes follow its last tensor. Download or copy it again.")
    return ordered
