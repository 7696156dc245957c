"""The bounded GGUF reader, on files made by hand: right ones are read, wrong ones are named, none takes long."""

from __future__ import annotations

import ctypes
import random
import struct
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modules import gguf
from modules.errors import ModelError


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def string_pair(key: str, value: str) -> bytes:
    return pair(key, 8, text(value))


def number_pair(key: str, value: int) -> bytes:
    return pair(key, 4, struct.pack("<I", value))


def tensor(name: str, shape: list[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", kind, offset)


STRINGS = pair("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 3) + text("a") + text("") + text("ccc"))
FLOATS = pair("tokenizer.ggml.scores", 9, struct.pack("<IQfff", 6, 3, 0.0, 1.0, 2.0))
PAIRS = [
    string_pair("general.architecture", "llama"),
    string_pair("general.name", "Tiny"),
    number_pair("llama.context_length", 2048),
    number_pair("llama.block_count", 2),
    STRINGS,
    FLOATS,
    string_pair("tokenizer.chat_template", "{{ messages }}"),
    pair("general.flag", 7, b"\x01"),
    pair("general.big", 10, struct.pack("<Q", 2**63)),
]
TENSORS = [tensor("a", [32, 2], 0, 0), tensor("b", [32], 8, 256)]  # 256 bytes of float32, then one block of 34 bytes


def build(
    pairs: list[bytes] = PAIRS,
    tensors: list[bytes] = TENSORS,
    data: bytes = b"\0" * 290,
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors) if n_tensors is None else n_tensors, len(pairs) if n_keys is None else n_keys)
    head += b"".join(pairs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


def refused(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        gguf.read_header(path)
    assert time.monotonic() - start < 5
    assert str(caught.value).startswith("model.gguf ") and str(caught.value).endswith(".")
    return str(caught.value)


def test_a_right_file_is_read(tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(build())
    header = gguf.read_header(path)
    assert (header.version, header.architecture, header.name, header.context_length, header.block_count) == (3, "llama", "Tiny", 2048, 2)
    assert header.chat_template == "{{ messages }}" and header.n_tensors == 2 and header.file_size == path.stat().st_size
    assert header.metadata["general.flag"] is True and header.metadata["general.big"] == 2**63 and header.split == (0, 1)
    assert "tokenizer.ggml.tokens" not in header.metadata


def test_what_is_not_said_has_a_neutral_value(tmp_path):
    path = tmp_path / "bare.gguf"
    path.write_bytes(build([string_pair("general.architecture", "x")], [], b"", version=2))
    header = gguf.read_header(path)
    assert (header.name, header.context_length, header.block_count, header.chat_template) == ("bare", 0, 0, None)


def test_truncation_at_every_byte_is_named(tmp_path):
    whole = build()
    for length in range(len(whole)):
        message = refused(tmp_path, whole[:length])
        assert "again" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a GGUF"),
        (b"PK\x03\x04" + b"\0" * 100, "not a GGUF"),
        (build(version=1), "version 1"),
        (build(version=0x03000000), "version"),
        (build(n_keys=2**63), "claims"),
        (build(n_tensors=2**63), "claims"),
        (build(n_keys=60_000), "damaged"),
        (build([*PAIRS, PAIRS[0]]), "twice"),
        (build(n_tensors=3), ""),
        (build([PAIRS[1]]), "architecture"),
        (build([pair("general.architecture", 4, b"\0\0\0\0")]), "architecture"),
        (build([pair("k", 8, struct.pack("<Q", 2**62))]), "longer than the file"),
        (build([struct.pack("<Q", 2**64 - 1)], n_keys=1), "longer than the file"),
        (build([pair("k", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 4, 0))]), "lists cannot"),
        (build([pair("k", 9, struct.pack("<IQ", 4, 2**62))]), "behind its end"),
        (build([pair("k", 9, struct.pack("<IQ", 8, 2**61))]), "list in its header"),
        (build([pair("k", 9, struct.pack("<IQ", 8, 1) + struct.pack("<Q", 2**63))]), ""),
        (build([pair("k", 99, b"")]), "unknown type 99"),
        (build([*PAIRS, number_pair("general.alignment", 0)]), "alignment"),
        (build([*PAIRS, number_pair("general.alignment", 24)]), "alignment"),
        (build([*PAIRS, pair("general.alignment", 7, b"\1")]), "alignment"),
        (build([*PAIRS, string_pair("general.alignment", "32")]), "alignment"),
        (build(PAIRS, [tensor("a", [32], 0, 0), tensor("a", [32], 0, 128)]), "twice"),
        (build(PAIRS, [tensor("a", [32], 0, 0), tensor("b", [32], 0, 96)]), "overlap"),
        (build(PAIRS, [tensor("a", [2**62, 2**62], 0, 0)]), "cut short"),
        (build(PAIRS, [tensor("a", [32], 0, 2**60)]), "cut short"),
        (build(PAIRS, [tensor("a", [33], 8, 0)]), "its type does not allow"),
        (build(PAIRS, [tensor("a", [32], 0, 4)]), "its type does not allow"),
        (build(PAIRS, [tensor("a", [1, 1, 1, 1, 1], 0, 0)]), "5 dimensions"),
    ],
)
def test_hostile_headers_are_named(tmp_path, content, words):
    assert words in refused(tmp_path, content)


def test_a_file_that_is_cut_short_says_how_large_it_should_be(tmp_path):
    whole = build(PAIRS, [tensor("a", [32], 0, 0), tensor("b", [2000], 0, 128)], data=b"\0" * 128)
    header = len(whole) - 128
    assert f"should have {header + 128 + 8000:,} bytes and has {len(whole):,}" in refused(tmp_path, whole)


def test_tensors_and_lists_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    windows = pair("llama.windows", 9, struct.pack("<IQ???", 7, 3, True, False, True))
    path.write_bytes(build([*PAIRS, windows]))
    header = gguf.read_header(path)
    assert header.tensors == {"a": gguf.Tensor((32, 2), 0, 256), "b": gguf.Tensor((32,), 8, 34)} and header.tensors["a"].elements == 64
    assert header.lists == {"tokenizer.ggml.scores": (0.0, 1.0, 2.0), "llama.windows": (True, False, True)}
    assert header.lengths == {"tokenizer.ggml.tokens": 3, "tokenizer.ggml.scores": 3, "llama.windows": 3}
    monkeypatch.setattr(gguf, "MAX_LIST", 2)
    assert gguf.read_header(path).lists == {}
    monkeypatch.undo()
    monkeypatch.setattr(gguf, "MAX_LISTED", 5)
    assert list(gguf.read_header(path).lists) == ["tokenizer.ggml.scores"]


def test_whole_lists(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "MAX_LIST", 2)
    monkeypatch.setattr(gguf, "_BLOCK", 16)
    path = tmp_path / "m.gguf"
    path.write_bytes(build())
    header = gguf.read_header(path)
    assert gguf.whole_list(header, "tokenizer.ggml.tokens") == ["a", "", "ccc"]
    assert gguf.whole_list(header, "tokenizer.ggml.scores") == [0.0, 1.0, 2.0] and gguf.whole_list(header, "none") == []
    for changed, words in (
        (build([pair("x", 7, b"\x01"), *PAIRS]), "changed"),
        (build()[: header.list_places["tokenizer.ggml.scores"] + 16], "cut short"),
    ):
        path.write_bytes(changed)
        with pytest.raises(ModelError, match=words):
            gguf.whole_list(header, "tokenizer.ggml.scores")


def test_what_is_kept_of_texts_is_limited_in_all(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "MAX_TEXT", 60)
    assert "more than 60 bytes of texts" in refused(tmp_path, build())
    monkeypatch.undo()
    assert "a tensor's name" in refused(tmp_path, build(PAIRS, [tensor("x" * 600, [32], 0, 0)]))


def test_a_text_too_long_to_keep_is_refused_but_arrays_of_any_size_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "MAX_STRING", 10)
    assert "more than the 10 allowed" in refused(tmp_path, build())
    monkeypatch.setattr(gguf, "MAX_STRINGS", 2)
    assert "too many texts" in refused(tmp_path, build([PAIRS[0], STRINGS]))


def test_arrays_larger_than_the_window(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "_BLOCK", 64)
    strings = pair("tokens", 9, struct.pack("<IQ", 8, 500) + b"".join(text("x" * (i % 70)) for i in range(500)))
    path = tmp_path / "m.gguf"
    path.write_bytes(build([strings, *PAIRS]))
    assert gguf.read_header(path).context_length == 2048


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_damaged_bytes_give_a_header_or_a_named_error(tmp_path, seed, count):
    chance = random.Random(seed)
    content = bytearray(build())
    for _ in range(count):
        content[chance.randrange(len(content))] = chance.choice((0, 1, 8, 9, 127, 128, 255))
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(content)
    try:
        gguf.read_header(path)
    except ModelError as error:
        assert "fuzz.gguf" in str(error)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400))
def test_any_bytes_after_the_magic(tmp_path, content):
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + content)
    try:
        gguf.read_header(path)
    except ModelError as error:
        assert "fuzz.gguf" in str(error)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(ModelError, match="There is no file"):
        gguf.read_header(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match="Cannot read"):
        gguf.read_header(tmp_path)


def test_a_folder_must_hold_one_model(tmp_path):
    with pytest.raises(ModelError, match="exactly one"):
        gguf.model_file(tmp_path)
    for name in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "mmproj-m.gguf"):
        (tmp_path / name).write_bytes(build())
    assert gguf.model_file(tmp_path).name == "m-00001-of-00002.gguf"
    assert gguf.model_file(tmp_path / "x.gguf") == tmp_path / "x.gguf"
    (tmp_path / "other.gguf").write_bytes(build())
    with pytest.raises(ModelError, match="exactly one"):
        gguf.model_file(tmp_path)


def split_part(tmp_path: Path, number: int, name: str) -> gguf.Header:
    path = tmp_path / name
    path.write_bytes(build([*PAIRS, pair("split.no", 2, struct.pack("<H", number)), pair("split.count", 2, struct.pack("<H", 2))]))
    return gguf.read_header(path)


def test_the_vision_part_beside_a_model(tmp_path):
    model = tmp_path / "m.gguf"
    model.touch()
    assert gguf.mmproj_beside(model) is None
    (tmp_path / "mmproj-m.gguf").touch()
    assert gguf.mmproj_beside(model) == tmp_path / "mmproj-m.gguf"
    (tmp_path / "other.gguf").touch()  # whose is it?
    assert gguf.mmproj_beside(model) is None


def test_parts_of_a_split_model(tmp_path):
    first = split_part(tmp_path, 0, "m-00001-of-00002.gguf")
    with pytest.raises(ModelError, match=r"m-00002-of-00002\.gguf is missing"):
        gguf.check_parts(first)
    second = tmp_path / "m-00002-of-00002.gguf"
    second.write_bytes(b"not a model, whatever its name may say")
    with pytest.raises(ModelError, match="not a part"):
        gguf.check_parts(first)
    header = split_part(tmp_path, 1, second.name)
    gguf.check_parts(first)
    with pytest.raises(ModelError, match="Choose the first part"):
        gguf.check_parts(header)
    with pytest.raises(ModelError, match="do not rename"):
        gguf.check_parts(split_part(tmp_path, 0, "renamed.gguf"))


def test_a_model_in_too_many_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "MAX_PARTS", 1)
    with pytest.raises(ModelError, match="at most 1 can be read"):
        gguf.check_parts(split_part(tmp_path, 0, "m-00001-of-00002.gguf"))


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(build())
    with path.open("rb") as file, pytest.raises(gguf._Bad, match="shorter"):
        gguf._Reader(file, 10_000_000).take(5_000)


@pytest.mark.engine
def test_the_starter_and_its_tensor_types(starter_model):
    header = gguf.read_header(starter_model)
    assert header.architecture == "llama" and header.context_length == 8192 and "<|im_start|>" in (header.chat_template or "")
    library = ctypes.CDLL(str(next((Path(pytest.importorskip("llama_cpp").__file__).parent / "lib").glob("libggml-base*"))))
    library.ggml_type_size.restype, library.ggml_blck_size.restype = ctypes.c_size_t, ctypes.c_int64
    for kind, (block, size) in gguf.TENSOR_TYPES.items():
        assert (library.ggml_blck_size(kind), library.ggml_type_size(kind)) == (block, size), kind
