"""Conversions from the server: progress, the end in words, cancel, one at a time."""

from __future__ import annotations

import sys
import time

import pytest

from modules.conversions import Conversion, Conversions
from modules.errors import Busy, ModelError
from modules.system import is_alive

WAIT = 30.0
GO_ON = "import sys, time, json, os, pathlib\nsay = lambda **fields: print(json.dumps(fields), flush=True)\ntarget = pathlib.Path(sys.argv[3])\n"


def child(code: str) -> tuple[str, ...]:
    """A command that stands in for `python -m modules.convert`."""
    return (sys.executable, "-c", GO_ON + code)


@pytest.fixture
def job(tmp_path):
    return Conversion("to-hf", tmp_path / "model.gguf", tmp_path / "folder")


def until(condition) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def ended(conversions: Conversions):
    assert conversions.wait(WAIT)
    return conversions.status


def test_progress_and_warnings_are_told_and_the_end(job):
    told = []
    conversions = Conversions(
        lambda: told.append(conversions.status), child("say(progress=0.5, text='Half')\nsay(warning='Mind')\nprint('noise')\nsay(done='x')")
    )
    assert conversions.status.state == "none"
    conversions.start(job)
    status = ended(conversions)
    assert (status.state, status.progress, status.warnings, status.conversion) == ("done", 1.0, ("Mind",), job)
    until(lambda: told[-1].state == "done")
    assert next((each.state, each.text) for each in told if each.progress == 0.5) == ("running", "Half")


def test_an_error_is_told_in_the_childs_words(job):
    conversions = Conversions(command=child("say(progress=0.1, text='x')\nsay(error='It is cut short.')\nsys.exit(1)"))
    conversions.start(job)
    status = ended(conversions)
    assert (status.state, status.text) == ("failed", "It is cut short.")


@pytest.mark.parametrize("code", ["sys.exit(3)", "os.kill(os.getpid(), 9)"])
def test_an_unexpected_end_is_told_and_cleaned_up_after(job, tmp_path, code):
    conversions = Conversions(command=child(f"(target.parent / '.folder.part').mkdir()\nsys.stderr.write('last words')\n{code}"))
    conversions.start(job)
    status = ended(conversions)
    assert status.state == "failed" and ("(code 3)" in status.text or "(code -9)" in status.text)
    assert list(tmp_path.iterdir()) == []


def test_cancel_ends_the_process_and_another_may_begin(job, tmp_path):
    conversions = Conversions(command=child("(target.parent / '.folder.part').mkdir()\nsay(progress=0.2, text=str(os.getpid()))\ntime.sleep(60)"))
    conversions.start(job)
    until(lambda: conversions.status.progress == 0.2)
    pid = int(conversions.status.text)
    with pytest.raises(Busy, match="Another conversion"):
        conversions.start(job)
    conversions.cancel()
    assert ended(conversions).state == "cancelled" and not is_alive(pid)
    assert list(tmp_path.iterdir()) == []
    conversions.start(job)
    conversions.close()
    assert conversions.status.state == "cancelled"
    conversions.cancel()  # of nothing


def test_one_that_says_nothing_is_ended(job):
    conversions = Conversions(command=child("time.sleep(60)"), silence=0.2)
    conversions.start(job)
    status = ended(conversions)
    assert status.state == "failed" and "said nothing" in status.text


def test_a_process_that_cannot_be_started_is_told(job, tmp_path):
    conversions = Conversions(command=(str(tmp_path / "nothing"),))
    with pytest.raises(ModelError, match="could not be started"):
        conversions.start(job)
    assert conversions.status.state == "none"


def test_arguments_are_paths_and_never_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from pathlib import Path

    words = Conversion("lora", Path("--force"), Path("-x"), base=Path("b"), force=True).arguments()
    assert words == ["lora", str(tmp_path / "--force"), str(tmp_path / "-x"), "--base", str(tmp_path / "b"), "--force"]
    assert Conversion("to-hf", Path("/a"), Path("/b"), "float32").arguments()[-2:] == ["--dtype", "float32"]
    assert Conversion("to-gguf", Path("/a"), Path("/b"), "F16").arguments()[-2:] == ["--type", "F16"]


def test_the_real_command(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    conversions = Conversions()
    conversions.start(Conversion("to-hf", tmp_path / "model.gguf", tmp_path / "folder"))
    status = ended(conversions)
    assert status.state == "failed" and "is cut short" in status.text
