"""The bounded safetensors reader, on files made by hand: right ones are read, wrong ones are named, none takes long."""

from __future__ import annotations

import json
import random
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from modules import safetensors_header
from modules.errors import ModelError

FIELDS: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [4, 28]},
    "a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
    "scalar": {"dtype": "I64", "shape": [], "data_offsets": [28, 36]},
}


def build(fields: Any = FIELDS, data: bytes = b"\0" * 36, length: int | None = None) -> bytes:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def with_tensor(**changed: Any) -> bytes:
    return build({**FIELDS, "b": {**FIELDS["b"], **changed}})


def refused(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        safetensors_header.read_header(path)
    assert time.monotonic() - start < 5
    assert str(caught.value).startswith("model.safetensors ") and str(caught.value).endswith(".")
    return str(caught.value)


def test_a_right_file_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(build())
    header = safetensors_header.read_header(path)
    start = path.stat().st_size - 36
    assert list(header.tensors) == ["a", "b", "scalar"] and header.metadata == {"format": "pt"}
    assert header.tensors["b"] == safetensors_header.Tensor("F32", (2, 3), start + 4, start + 28)
    assert header.tensors["b"].elements == 6 and header.tensors["scalar"].elements == 1


def test_what_the_library_writes_is_read_the_same(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    import numpy as np

    values = {"one": np.arange(6, dtype=np.float32).reshape(2, 3), "two": np.ones((4,), np.float16), "none": np.zeros((0, 5), np.int8)}
    path = tmp_path / "model.safetensors"
    numpy.save_file(values, path, metadata={"made": "here"})
    header = safetensors_header.read_header(path)
    assert header.metadata == {"made": "here"} and set(header.tensors) == set(values)
    raw = path.read_bytes()
    for name, tensor in header.tensors.items():
        assert tensor.shape == values[name].shape and raw[tensor.begin : tensor.end] == values[name].tobytes()


def test_padding_after_the_header_and_an_unknown_format_are_allowed(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(build(json.dumps({"x": {"dtype": "F3_NEW", "shape": [3], "data_offsets": [0, 2]}}).encode() + b"    ", b"\0\0"))
    assert safetensors_header.read_header(path).tensors["x"].dtype == "F3_NEW"


def test_truncation_at_every_byte_is_named(tmp_path):
    whole = build()
    for length in range(len(whole)):
        assert "ownload" in refused(tmp_path, whole[:length])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no safetensors"),
        (b"PK\x03\x04" + b"\0" * 100, "no safetensors"),
        (build(length=2**64 - 1), "cut short"),
        (build(length=0), "no safetensors"),
        (build(b"[" * 100), "no safetensors"),
        (build(b'{"a":' * 100_000), "no JSON"),
        (build(b'{"a":' + b"9" * 5000 + b"}"), "no JSON"),
        (build(b'{"a": NaN}'), "NaN"),
        (build(b'{"a": 1, "a": 2}'), "twice"),
        (build(b'{"\xff": 1}'), "no JSON"),
        (build({**FIELDS, "__metadata__": {"a": 1}}), "metadata"),
        (build({**FIELDS, "__metadata__": []}), "metadata"),
        (build({"a": 3}), "not described"),
        (build({"x" * 600: FIELDS["a"]}), "not described"),
        (with_tensor(dtype=5), "no proper"),
        (with_tensor(shape=[2, -3]), "no proper"),
        (with_tensor(shape=[True, 3]), "no proper"),
        (with_tensor(shape=[1] * 17), "no proper"),
        (with_tensor(shape=[2.0, 3]), "no proper"),
        (with_tensor(shape=[2**62] * 16), "as long"),
        (with_tensor(data_offsets=[4]), "no proper"),
        (with_tensor(data_offsets=[28, 4]), "as long"),
        (with_tensor(data_offsets=[4, 24]), "as long"),
        (with_tensor(data_offsets=[0, 24]), "overlap"),
        (with_tensor(data_offsets=[5, 29]), "gap"),
        (build(data=b"\0" * 35), "cut short"),
        (build(data=b"\0" * 37), "follow"),
    ],
)
def test_wrong_files_are_named(tmp_path, content, words):
    assert words in refused(tmp_path, content)


def test_a_header_may_not_be_huge(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 17 << 20) + b"{")
        file.truncate(20 << 20)
    with pytest.raises(ModelError, match="more than the 16777216 allowed"):
        safetensors_header.read_header(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(ModelError, match="missing"):
        safetensors_header.read_header(tmp_path / "none.safetensors")
    with pytest.raises(ModelError, match="Cannot read"):
        safetensors_header.read_header(tmp_path)


def test_damage_anywhere_is_named_or_harmless(tmp_path):
    whole, chance = bytearray(build()), random.Random(5)
    path = tmp_path / "model.safetensors"
    for _ in range(500):
        content = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            content[chance.randrange(len(content) - 36)] = chance.randrange(256)
        path.write_bytes(content)
        try:
            safetensors_header.read_header(path)
        except ModelError as error:
            assert str(error).endswith(".")
