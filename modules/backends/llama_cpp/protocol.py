"""Frames between the server and the engine process: bytes, never pickle, because the engine reads hostile files.

A frame is a fixed header (magic, length of the JSON head, length of the raw tail), the head `[kind, id, fields]`, and the tail: token ids
as little-endian int32, or UTF-8 text. Every frame carries the id of its request, so frames of many requests may interleave.

To the engine                                       From the engine
load     {path, options, draft, verbose}            progress  {fraction}
generate {text, add_bos, plan, max_new, logprobs,   loaded    {what the model is}
          chosen_logprob, prompt_logprobs,          chunk     {tokens, done, prompt, prefill, queue, logprobs, prompt_logprobs} raw: text
          special, client, adapters, images,                  end       {reason, prompt, done, timings} raw: last text
          json_schema}                              vectors   {tokens, count} raw: float32
          raw: prompt, UTF-8 or ids; with images    tokens    raw: ids
          the text's and images' lengths are fields
prefill  the same                                   text      raw: text
cancel   (id of the request)                        done
embed    {lengths, text} raw: texts or ids joined   pong
encode   {add_bos} raw: text                        error     {kind, message, retry_after}
decode   raw: ids                                   heartbeat {beats, busy, stats, totals}   (id 0, once a second)
adapter  {path, load}
ping
shutdown
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_HEAD = 8 << 20
MAX_RAW = 64 << 20
_HEADER = struct.Struct("<4sII")
_MAGIC = b"TGW1"
_JSON = json.JSONEncoder(separators=(",", ":"))


class ProtocolError(Exception):
    """The other side sent something that is no frame, or a frame would be too large. The connection cannot be used any more."""


@dataclass(frozen=True)
class Frame:
    """One message."""

    kind: str
    id: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)
    raw: bytes = b""


def encode(frame: Frame) -> bytes:
    """The bytes of a frame. Raises ProtocolError when it is over the limits."""
    head = _JSON.encode([frame.kind, frame.id, frame.fields]).encode()
    if len(head) > MAX_HEAD or len(frame.raw) > MAX_RAW:
        raise ProtocolError(f"a frame of {len(head)} + {len(frame.raw)} bytes is over the limit")
    return _HEADER.pack(_MAGIC, len(head), len(frame.raw)) + head + frame.raw


def read_frame(read: Callable[[int], bytes]) -> Frame | None:
    """The next frame; None at a clean end of the stream. `read(n)` returns 1 to n bytes, b"" at the end.

    Raises ProtocolError when the stream ends inside a frame or holds none. Reserves no memory before the lengths are checked.
    """
    header = _exactly(read, _HEADER.size, at_start=True)
    if not header:
        return None
    magic, head_length, raw_length = _HEADER.unpack(header)
    if magic != _MAGIC or head_length > MAX_HEAD or raw_length > MAX_RAW:
        raise ProtocolError("not a frame, or over the limits")
    kind, id, fields = _head(_exactly(read, head_length))
    return Frame(kind, id, fields, _exactly(read, raw_length))


def _head(data: bytes) -> tuple[str, int, dict[str, Any]]:
    try:
        head = json.loads(data)
    except (ValueError, RecursionError):
        raise ProtocolError("the head is not JSON") from None
    match head:
        case [str(kind), int(id), dict(fields)]:
            return kind, id, fields
    raise ProtocolError("the head is not [kind, id, fields]")


def _exactly(read: Callable[[int], bytes], count: int, at_start: bool = False) -> bytes:
    data = read(count) if count else b""
    if len(data) == count:  # what a buffered stream gives, nearly always
        return data
    parts = bytearray(data)
    while data and len(parts) < count:
        data = read(count - len(parts))
        parts += data
    if len(parts) < count and not (at_start and not parts):
        raise ProtocolError("the stream ended inside a frame")
    return bytes(parts)


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian int32. Raises ProtocolError when one does not fit."""
    try:
        return struct.pack(f"<{len(tokens)}i", *tokens)
    except struct.error:
        raise ProtocolError("a token id is not a 32-bit number") from None


def unpack_tokens(raw: bytes) -> list[int]:
    """Inverse of `pack_tokens`. Raises ProtocolError when the length is no multiple of four."""
    if len(raw) % 4:
        raise ProtocolError("token ids of a broken length")
    return list(struct.unpack(f"<{len(raw) // 4}i", raw))


def pack_images(text: bytes, images: Sequence[bytes]) -> tuple[bytes, list[int]]:
    """A prompt's text and its images in one tail, and their lengths, the text's first."""
    return b"".join([text, *images]), [len(text), *map(len, images)]


def unpack_images(raw: bytes, lengths: Sequence[int]) -> tuple[bytes, list[bytes]]:
    """Inverse of `pack_images`. Raises ProtocolError when the lengths are not those of `raw`."""
    parts = split(raw, lengths)
    return parts[0], parts[1:]


def split(raw: bytes, lengths: Sequence[int]) -> list[bytes]:
    """`raw` cut into pieces of these lengths. Raises ProtocolError when they do not add up to it."""
    if sum(lengths) != len(raw) or min(lengths, default=0) < 0:
        raise ProtocolError("lengths that do not fit their tail")
    ends = [sum(lengths[: n + 1]) for n in range(len(lengths))]
    return [raw[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def unpack_floats(raw: bytes) -> tuple[float, ...]:
    """Little-endian float32. Raises ProtocolError when the length is no multiple of four."""
    if len(raw) % 4:
        raise ProtocolError("numbers of a broken length")
    return struct.unpack(f"<{len(raw) // 4}f", raw)
