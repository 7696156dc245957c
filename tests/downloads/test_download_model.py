"""The command on the terminal, as a process of its own: killed while it works, and asked again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from modules.loaders import list_models
from tests.fakes import WAIT, until
from tests.hub_server import serving

ROOT = Path(__file__).parents[2]
GGUF = random.Random(2).randbytes(3_000_000)


@pytest.fixture
def hub():
    with serving(files={"m.Q4_K_M.gguf": GGUF, "m.Q8_0.gguf": GGUF[1:], "README.md": b"# Hi"}, token="secret-token") as made:
        yield made


@pytest.fixture
def command(hub, tmp_path):
    """Begins the command with these arguments."""

    def begin(*arguments: str, token: str = "secret-token") -> subprocess.Popen:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        words = [sys.executable, str(ROOT / "download-model.py"), *arguments, "--user-data-dir", str(tmp_path / "data")]
        return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)

    return begin


def ended(process: subprocess.Popen) -> tuple[int, str]:
    told, _ = process.communicate(timeout=60)
    assert "secret-token" not in told
    return process.returncode, told


def test_killed_three_times_and_resumed(command, hub, tmp_path):
    models, hub.hold = tmp_path / "data" / "models", threading.Event()

    def size() -> int:
        return sum(path.stat().st_size for path in models.rglob("*.part"))

    before = 0
    for how in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
        process = command("some/model")
        try:
            until(lambda now=before: size() >= now + (len(GGUF) - now) // 2 - (64 << 10), 3 * WAIT)  # the server holds there
        finally:
            process.send_signal(how)
        ended(process)
        assert size() > before and list_models(models) == []
        before = size()
    hub.hold.set()
    code, told = ended(command("some/model"))
    assert code == 0 and "[done]" in told, told
    assert (models / "m.Q4_K_M.gguf").read_bytes() == GGUF and [path.name for path in models.iterdir()] == ["m.Q4_K_M.gguf"]
    starts = [int(headers.get("range", "bytes=0-")[6:-1]) for headers in hub.contents()]
    assert len(starts) == 4 and starts == sorted(starts) and starts[-1] >= before > len(GGUF) // 2


def test_flags(command, hub, tmp_path):
    code, told = ended(command("some/model", "--specific-file", "m.Q8_0.gguf", "--output", str(tmp_path / "out"), "--threads", "1"))
    assert code == 0 and (tmp_path / "out" / "m.Q8_0.gguf").read_bytes() == GGUF[1:], told
    code, told = ended(command("some/model", "--check"))
    assert code == 1 and "missing or damaged: m.Q4_K_M.gguf" in told
    other = tmp_path / "other"
    other.mkdir()
    (other / "m.Q4_K_M.gguf").write_bytes(b"something else")
    code, told = ended(command("some/model", "--model-dir", str(other)))
    assert code == 1 and "another m.Q4_K_M.gguf" in told and (other / "m.Q4_K_M.gguf").read_bytes() == b"something else"
    code, told = ended(command("some/model", "--model-dir", str(other), "--clean"))
    assert code == 0 and "* " in told and "m.Q8_0.gguf" in told and (other / "m.Q4_K_M.gguf").read_bytes() == GGUF
    code, told = ended(command("some/model", "--model-dir", str(other), "--check"))
    assert code == 0 and "1 of 1" in told


@pytest.mark.parametrize(
    ("arguments", "token", "words"),
    [
        (("some/model",), "", "Accept its conditions"),
        (("other/model",), "secret-token", "no repository other/model"),
        (("some/model", "--branch", "nope"), "secret-token", "no such branch"),
        (("some/model", "--threads", "0"), "secret-token", "from 1 to 16"),
        (("some/model", "--text-only", "--specific-file", "x"), "secret-token", "exclude each other"),
    ],
)
def test_what_goes_wrong_is_told_in_words(command, arguments, token, words):
    code, told = ended(command(*arguments, token=token))
    assert code in (1, 2) and words in told and "Traceback" not in told
