"""SHA-256 of model files, in the background and once."""

from __future__ import annotations

import hashlib
import json
import os
import threading

import pytest

from modules import hashes
from modules.hashes import FileHashes

WAIT = 20.0


def sha(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.fixture
def known(tmp_path):
    return FileHashes(tmp_path / "cache" / "hashes.json")


def got(known: FileHashes, path) -> str | None:
    known.get(path)
    assert known.wait(WAIT)
    return known.get(path)


def test_it_is_none_first_and_then_known_and_kept(known, tmp_path, monkeypatch):
    path = tmp_path / "fox.gguf"
    path.write_bytes(b"fox" * 1000)
    assert known.get(path) is None
    assert known.wait(WAIT) and known.get(path) == sha(b"fox" * 1000)
    monkeypatch.setattr(hashes, "_sha256", lambda files: pytest.fail("it was computed again"))
    assert FileHashes(tmp_path / "cache" / "hashes.json").get(path) == sha(b"fox" * 1000)


def test_a_changed_file_is_hashed_again_and_the_former_hash_is_found_by_its_stamp(known, tmp_path):
    path = tmp_path / "fox.gguf"
    path.write_bytes(b"fox")
    stamp = known.stamp(path)
    assert got(known, path) == sha(b"fox")
    path.write_bytes(b"hen")
    os.utime(path, ns=(1, 1))
    assert known.stamp(path) != stamp and known.get(path, stamp) == sha(b"fox")
    assert got(known, path) == sha(b"hen") and known.get(path, stamp) == sha(b"fox")
    assert known.get(path, "1-2") is None and known.wait(0)  # of a file that is gone nothing can be computed


def test_all_parts_of_a_split_model(known, tmp_path):
    parts = [tmp_path / f"fox-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for n, part in enumerate(parts):
        part.write_bytes(bytes([n]) * 10)
    whole = sha(b"\0" * 10, b"\1" * 10, b"\2" * 10)
    assert got(known, parts[0]) == whole
    assert got(known, tmp_path) == whole  # the one model in a folder
    parts[1].unlink()
    assert known.stamp(parts[0]) == "" and known.get(parts[0]) is None and known.wait(0)


def test_files_that_cannot_be_hashed(known, tmp_path):
    assert known.get(tmp_path / "missing.gguf") is None and known.get(tmp_path) is None and known.wait(0)
    (tmp_path / "a.gguf").write_bytes(b"a")
    (tmp_path / "b.gguf").write_bytes(b"b")
    assert known.get(tmp_path) is None and known.wait(0)


def test_a_failing_read_is_not_tried_for_ever(known, tmp_path, monkeypatch):
    path, tries = tmp_path / "fox.gguf", []
    path.write_bytes(b"fox")

    def fail(files):
        tries.append(files)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(hashes, "_sha256", fail)
    assert got(known, path) is None and known.wait(WAIT) and len(tries) == 1


def test_a_file_that_changes_while_it_is_read_is_not_known(known, tmp_path, monkeypatch):
    path = tmp_path / "fox.gguf"
    path.write_bytes(b"fox")

    def change(files):
        path.write_bytes(b"longer")
        return "0" * 64

    monkeypatch.setattr(hashes, "_sha256", change)
    known.get(path)
    assert known.wait(WAIT)
    monkeypatch.undo()
    assert got(known, path) == sha(b"longer")


def test_one_thread_at_a_time_and_a_bounded_queue(known, tmp_path, monkeypatch):
    go, at_work, most = threading.Event(), [], []

    def slow(files):
        at_work.append(files)
        most.append(sum(thread.name == "hashes" for thread in threading.enumerate()))
        assert go.wait(WAIT)
        return "1" * 64

    monkeypatch.setattr(hashes, "_sha256", slow)
    monkeypatch.setattr(hashes, "MAX_WAITING", 3)
    paths = [tmp_path / f"{n}.gguf" for n in range(5)]
    for path in paths:
        path.write_bytes(b"x")
        assert known.get(path) is None and known.get(path) is None
    assert not known.wait(0)
    go.set()
    assert known.wait(WAIT) and len(at_work) == 3 and set(most) == {1}


@pytest.mark.parametrize("content", [b"", b"nonsense", b"[1]", b'{"a": 1}', b"[" * 100_000, b"\xff\xfe"])
def test_a_broken_cache_is_as_none(tmp_path, content):
    cache, path = tmp_path / "hashes.json", tmp_path / "fox.gguf"
    cache.write_bytes(content)
    path.write_bytes(b"fox")
    assert got(FileHashes(cache), path) == sha(b"fox")
    assert sha(b"fox") in json.loads(cache.read_text()).values()


def test_a_cache_that_cannot_be_written_costs_only_its_use(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    path = tmp_path / "fox.gguf"
    path.write_bytes(b"fox")
    assert got(FileHashes(tmp_path / "cache" / "hashes.json"), path) == sha(b"fox")


def test_the_oldest_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "MAX_KNOWN", 2)
    known, paths = FileHashes(tmp_path / "hashes.json"), [tmp_path / f"{n}.gguf" for n in range(3)]
    for path in paths:
        path.write_bytes(path.name.encode())
        assert got(known, path)
    assert len(json.loads((tmp_path / "hashes.json").read_text())) == 2
