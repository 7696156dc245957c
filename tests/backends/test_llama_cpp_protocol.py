"""Frames: what goes in comes out, however the stream is cut, and what is no frame is named."""

from __future__ import annotations

import contextlib
import io
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.backends.llama_cpp import protocol
from modules.backends.llama_cpp.protocol import (
    Frame,
    ProtocolError,
    encode,
    pack_images,
    pack_tokens,
    read_frame,
    split,
    unpack_floats,
    unpack_images,
    unpack_tokens,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False), lambda c: st.lists(c, max_size=3), max_leaves=5
)
FRAMES = st.builds(Frame, st.text(), st.integers(0, 2**40), st.dictionaries(st.text(), JSON, max_size=4), st.binary(max_size=64))


class Dripping(io.RawIOBase):
    """Gives at most `step` bytes at a time."""

    def __init__(self, data: bytes, step: int) -> None:
        self._data, self._step = io.BytesIO(data), step

    def read(self, count: int = -1) -> bytes:
        return self._data.read(min(count, self._step))


@given(st.lists(FRAMES, max_size=4), st.integers(1, 40))
def test_frames_survive_any_cutting(frames, step):
    stream = Dripping(b"".join(map(encode, frames)), step)
    assert [read_frame(stream.read) for _ in frames] == frames
    assert read_frame(stream.read) is None


def test_truncation_at_every_byte_is_an_error():
    data = encode(Frame("chunk", 7, {"tokens": [1]}, "text é".encode()))
    for length in range(1, len(data)):
        with pytest.raises(ProtocolError, match="inside a frame"):
            read_frame(io.BytesIO(data[:length]).read)


@given(st.binary(max_size=60))
def test_any_bytes_give_a_frame_or_a_protocol_error(data):
    with contextlib.suppress(ProtocolError):
        read_frame(io.BytesIO(data).read)


def raw_frame(head: bytes, head_length: int | None = None, raw_length: int = 0) -> bytes:
    return b"TGW1" + struct.pack("<II", len(head) if head_length is None else head_length, raw_length) + head


@pytest.mark.parametrize(
    "data",
    [
        b"XXXX" + b"\0" * 8,
        raw_frame(b"", head_length=2**32 - 1),
        raw_frame(b'["a",1,{}]', raw_length=protocol.MAX_RAW + 1),
        raw_frame(b"not json"),
        raw_frame(b"[" * 200_000),
        raw_frame(b'{"kind":"a"}'),
        raw_frame(b'["a","1",{}]'),
        raw_frame(b"[1,1,{}]"),
        raw_frame(b'["a",1,[]]'),
        raw_frame(b'["a",1,{},2]'),
        raw_frame(b'["a",' + b"9" * 5000 + b",{}]"),
        raw_frame(b"\xff\xfe"),
    ],
)
def test_hostile_frames_are_refused_before_memory_is_reserved(data):
    asked = []
    stream = io.BytesIO(data)

    def read(count: int) -> bytes:
        asked.append(count)
        return stream.read(count)

    with pytest.raises(ProtocolError):
        read_frame(read)
    assert max(asked) <= max(len(data), 12)


def test_frames_over_the_limit_are_not_sent(monkeypatch):
    monkeypatch.setattr(protocol, "MAX_RAW", 10)
    with pytest.raises(ProtocolError, match="over the limit"):
        encode(Frame("a", 1, {}, b"x" * 11))
    monkeypatch.setattr(protocol, "MAX_HEAD", 10)
    with pytest.raises(ProtocolError, match="over the limit"):
        encode(Frame("a", 1, {"text": "y" * 11}))


def test_the_head_is_plain_json():
    data = encode(Frame("end", 3, {"reason": "stop", "bias": float("-inf")}))
    assert json.loads(data[12:]) == ["end", 3, {"reason": "stop", "bias": float("-inf")}]


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_tokens_survive(tokens):
    assert unpack_tokens(pack_tokens(tokens)) == tokens


def test_broken_tokens_are_named():
    with pytest.raises(ProtocolError):
        pack_tokens([2**31])
    with pytest.raises(ProtocolError):
        unpack_tokens(b"123")


@given(st.binary(max_size=20), st.lists(st.binary(max_size=20), max_size=4))
def test_images_survive(text, images):
    raw, lengths = pack_images(text, images)
    assert unpack_images(raw, lengths) == (text, images) and split(raw, lengths) == [text, *images]


@pytest.mark.parametrize("lengths", [[], [2], [4], [5, -2], [1, 1, 2], [10**12], [-(10**12), 10**12 + 3]])
def test_lengths_that_are_not_those_of_the_tail(lengths):
    with pytest.raises(ProtocolError, match="lengths"):
        split(b"abc", lengths)


@given(st.lists(st.floats(width=32, allow_nan=False)))
def test_floats_survive(values):
    assert list(unpack_floats(struct.pack(f"<{len(values)}f", *values))) == values


def test_broken_floats_are_named():
    with pytest.raises(ProtocolError, match="numbers"):
        unpack_floats(b"12345")
