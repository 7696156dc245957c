"""The command: lines of JSON, exit codes, and that nothing is left when it is ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from convert_help import byte_level, make_folder

from modules.convert.__main__ import main
from tests.backends.llama_cpp_help import wait_for

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "modules.convert")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("main") / "tiny", "llama", byte_level("smollm"))


def said(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_there_and_back_by_the_command(folder, tmp_path, capsys):
    file, back = tmp_path / "tiny.gguf", tmp_path / "back"
    assert main(["to-gguf", str(folder), str(file), "--type", "Q8_0"]) == 0
    assert main(["to-hf", str(file), str(back)]) == 0
    lines = said(capsys)
    assert [line["done"] for line in lines if "done" in line] == [str(file), str(back)]
    assert json.loads((back / "config.json").read_text())["dtype"] == "float16"


def test_what_is_wrong_is_the_last_line(folder, tmp_path, capsys):
    assert main(["to-gguf", str(tmp_path / "nothing"), str(tmp_path / "a.gguf")]) == 1
    assert "There is nothing at" in said(capsys)[-1]["error"]
    assert main(["to-gguf", str(folder), str(folder / "a.gguf")]) == 1
    assert "Choose another name" in said(capsys)[-1]["error"]
    assert main(["lora", str(folder), str(tmp_path / "a.gguf")]) == 1
    assert "adapter_config.json" in said(capsys)[-1]["error"]
    (tmp_path / "a.gguf").write_text("mine")
    assert main(["to-gguf", str(folder), str(tmp_path / "a.gguf")]) == 1
    assert "exists" in said(capsys)[-1]["error"] and (tmp_path / "a.gguf").read_text() == "mine"


def test_what_nobody_expected_is_told_too(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("modules.convert.__main__.hf_to_gguf", lambda *_: 1 / 0)
    assert main(["to-gguf", str(folder), str(tmp_path / "a.gguf")]) == 1
    assert "damaged, or of a kind not known here (ZeroDivisionError)" in said(capsys)[-1]["error"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends processes without asking")
def test_one_that_is_ended_leaves_nothing(starter_model, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*COMMAND, "to-hf", starter_model, tmp_path / "folder"], cwd=ROOT, env=environment, stdout=subprocess.PIPE) as child:
        wait_for(lambda: (tmp_path / ".folder.part").exists())
        child.send_signal(signal.SIGTERM)
        assert child.stdout
        lines = child.stdout.read().splitlines()
        assert child.wait(30) == 0
    assert not any(b'"done"' in line for line in lines)
    assert list(tmp_path.iterdir()) == []
