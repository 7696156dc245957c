"""Models are read in a child with limits: a right file gives its card, and nothing that a file or the child does costs more than a message."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import mutate_models
from modules import inspect_model
from modules.errors import Busy, ModelError
from modules.inspect_model import inspect
from modules.model_card import read_card
from modules.system import is_alive
from tests.test_gguf import build


@pytest.fixture(autouse=True)
def empty():
    inspect_model._known.clear()


@pytest.fixture
def tiny(tmp_path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(build())
    return path


def child(monkeypatch, code: str) -> None:
    """The reader does this instead; the path is its only argument."""
    monkeypatch.setattr(inspect_model, "_COMMAND", (sys.executable, "-S", "-c", code))


def test_a_model_is_read_once_while_its_files_stay(tiny, monkeypatch):
    found = inspect(tiny)
    assert found == read_card(tiny) and found.context_length == 2048
    child(monkeypatch, "raise SystemExit(3)")
    assert inspect(tiny) is found
    os.utime(tiny, ns=(1, 1))
    with pytest.raises(ModelError, match=r"tiny\.gguf could not be read"):
        inspect(tiny)


def test_a_file_beside_it_that_comes_or_goes_counts(tiny):
    assert not inspect(tiny).vision
    (tiny.parent / "mmproj-tiny.gguf").touch()
    assert inspect(tiny).vision


def test_what_is_wrong_comes_back_in_words(tmp_path, tiny):
    (tmp_path / "bad.gguf").write_bytes(tiny.read_bytes()[:100])
    for _ in range(2):  # the second time from memory
        with pytest.raises(ModelError, match=r"bad\.gguf is cut short"):
            inspect(tmp_path / "bad.gguf")
    with pytest.raises(ModelError, match="There is no file"):
        inspect(tmp_path / "none.gguf")


def test_names_with_any_characters(tiny):
    for name in ("-x.gguf", "a b\nc.gguf", "ü…'\".gguf"):
        tiny = tiny.rename(tiny.with_name(name))
        assert inspect(tiny).context_length == 2048


def test_memory_of_cards_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(inspect_model, "MAX_KNOWN", 2)
    monkeypatch.setattr(inspect_model, "asked", lambda path: path.name)
    for name in "abc":
        (tmp_path / name).mkdir()
        with pytest.raises(ModelError, match=name):  # a text is what is wrong
            inspect(tmp_path / name)
    assert list(inspect_model._known.values()) == ["b", "c"]


@pytest.mark.parametrize(
    "code",
    ["", "import os; os.abort()", "print('{}')", "print('x' * 9_000_000)", "print('[' * 100_000)", "import sys; sys.stdout.buffer.write(b'\\xff')"],
)
def test_a_child_that_fails_costs_a_message(tiny, monkeypatch, code):
    child(monkeypatch, code)
    with pytest.raises(ModelError, match=r"tiny\.gguf could not be read"):
        inspect(tiny)
    monkeypatch.undo()
    assert inspect(tiny).context_length == 2048  # it is asked again


def test_a_child_that_hangs_is_ended(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(inspect_model, "WALL_SECONDS", 0.5)
    child(monkeypatch, f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); print('x', flush=True); time.sleep(600)")
    began = time.monotonic()
    with pytest.raises(ModelError, match="could not be read"):
        inspect_model.asked(tiny)
    assert time.monotonic() - began < 20
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_a_child_without_a_parent_ends_by_itself(monkeypatch):
    code = "from modules import inspect_model as m; import time; m.LIFE_SECONDS = 0.3; m._limit(True); time.sleep(600)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False).returncode == 1


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has all limits")
def test_the_limits_hold():
    code = """
from modules import inspect_model as m
m.CPU_SECONDS = 1
m._limit(True)
def much(path): bytearray(2 << 30)
m.read_card = much
print(m.described(m.Path("x.gguf")).decode())
while True: pass
"""
    done = subprocess.run([sys.executable, "-uc", code], capture_output=True, text=True, timeout=60, check=False)
    assert "needs too much memory" in done.stdout and done.returncode < 0


def test_only_a_few_children_at_once(tiny, monkeypatch):
    monkeypatch.setattr(inspect_model, "WALL_SECONDS", 0.05)
    for _ in range(inspect_model.AT_ONCE):
        inspect_model._places.acquire()
    try:
        with pytest.raises(Busy):
            inspect(tiny)
    finally:
        for _ in range(inspect_model.AT_ONCE):
            inspect_model._places.release()


def test_one_child_for_many(tiny, tmp_path):
    paths = [str(tiny), str(tmp_path / "none.gguf"), str(tiny)]
    lines = "".join(json.dumps(path) + "\n" for path in paths)
    done = subprocess.run([*inspect_model._COMMAND, "--many"], input=lines.encode(), capture_output=True, timeout=60, check=True)
    first, second, third = (inspect_model.answer("x", line) for line in done.stdout.splitlines())
    assert first == third == read_card(tiny) and isinstance(second, str) and "There is no file" in second


def test_the_command_says_how_it_is_used():
    done = subprocess.run(inspect_model._COMMAND, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "usage" in done.stderr


def test_mutants_give_a_card_or_a_named_error(tmp_path):
    counts = mutate_models.run(tmp_path, random.Random(11), files=300, alone=6)
    assert counts.files >= 300 and counts.crashes == [] and counts.cards > 10 and counts.errors > 100
    assert counts.slowest < inspect_model.WALL_SECONDS
