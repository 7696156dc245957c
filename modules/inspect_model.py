"""Reading a model's files in a child process with limits: `inspect(path)` here, `python -m modules.inspect_model PATH` there.

A file that makes the reader slow, large or dead costs a message. The child has the system's limits on memory and processor time where there
are such, ends by itself after LIFE_SECONDS (whatever became of its parent), may open few files. `--many` reads paths from
stdin, one JSON string a line, and answers each with one line.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import itertools
import json
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

from modules.errors import Busy, ModelError, UserError
from modules.gguf import part_files
from modules.model_card import ModelCard, read_card
from modules.system import start_child, stop_tree

WALL_SECONDS = 10.0
LIFE_SECONDS = 12.0
CPU_SECONDS = 10
MEMORY_BYTES = 1 << 30
"""Address space of the child: the largest header that is allowed takes about a third of it."""
MAX_OUTPUT = 8 << 20
MAX_KNOWN = 64
MAX_FILES = 5000
AT_ONCE = 2
_MAX_PATH = 64 << 10
_ROOT = Path(__file__).resolve().parents[1]
_COMMAND = (sys.executable, "-S", "-m", "modules.inspect_model")  # without the installed packages: only what stands in this folder is needed

_known: OrderedDict[tuple[Any, ...], ModelCard | str] = OrderedDict()
_lock = threading.Lock()
_places = threading.BoundedSemaphore(AT_ONCE)


def inspect(path: Path) -> ModelCard:
    """The card of the model at `path`, from memory if its files have not changed. Raises ModelError; Busy when many are being read.

    Waits for the child, WALL_SECONDS at most. Any thread. What a child says of a wrong file is kept too; that it gave no answer is not.
    """
    key = _stamp(path)
    with _lock:
        found = _known.get(key)
        if found is not None:
            _known.move_to_end(key)
    if found is None:
        found = asked(path)
        with _lock:
            _known[key] = found
            while len(_known) > MAX_KNOWN:
                _known.popitem(last=False)
    if isinstance(found, str):
        raise ModelError(found)
    return found


def _stamp(path: Path) -> tuple[Any, ...]:
    """What changes when the model's files do: their sizes and times, and which files lie beside a file. Raises ModelError."""
    try:
        files = sorted(itertools.islice(path.iterdir(), MAX_FILES)) if path.is_dir() else part_files(path)
        beside = [] if path.is_dir() else sorted(file.name for file in path.parent.glob("*.gguf"))
    except OSError as error:
        raise ModelError(f"Cannot read {path}: {error.strerror or error}. Check the file and its permissions.") from error
    return str(path.absolute()), hash(tuple(beside)), *map(_file_stamp, files)


def _file_stamp(file: Path) -> tuple[str, int, int] | None:
    """None for a file that is not there: the child says so."""
    try:
        status = file.stat()
    except OSError:
        return None
    return file.name, status.st_size, status.st_mtime_ns


def asked(path: Path) -> ModelCard | str:
    """What a child says of `path`: a card, or what is wrong. Raises ModelError when it gives no answer, Busy."""
    if not _places.acquire(timeout=WALL_SECONDS):
        raise Busy("Other models are being looked at. Try again in a moment.", retry_after=5)
    try:
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with start_child([*_COMMAND, str(path.absolute())], cwd=_ROOT, **pipes) as child:
            try:
                output = _output(child)
            finally:
                stop_tree(child, grace=0)
    except OSError as error:
        reason = error.strerror or error
        raise ModelError(f"The reader of model files could not be started: {reason}. Close other programs and try again.") from error
    finally:
        _places.release()
    return answer(path.name, output)


def _output(child: subprocess.Popen[bytes]) -> bytes:
    """What the child writes within WALL_SECONDS; more than MAX_OUTPUT bytes are too much."""
    timer = threading.Timer(WALL_SECONDS, child.kill)
    timer.daemon = True
    timer.start()
    try:
        assert child.stdout
        return child.stdout.read(MAX_OUTPUT + 1)
    finally:
        timer.cancel()


def answer(name: str, output: bytes) -> ModelCard | str:
    """What is in a child's line about the file `name`: the card, or what is wrong. Raises ModelError when that is no answer."""
    advice = "Download it again, or use another conversion of this model."
    if not output.strip():
        raise ModelError(f"{name} could not be read within {WALL_SECONDS:.0f} seconds and {MEMORY_BYTES >> 20} MiB of memory. {advice}")
    try:
        if len(output) > MAX_OUTPUT:
            raise ValueError("too long")
        found = json.loads(output)
        if isinstance(found, dict) and isinstance(found.get("error"), str):
            return str(found["error"])[:2000]
        return ModelCard.from_json(output.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ModelError(f"{name} could not be read: the reader gave no answer. {advice}") from None


# --- the child --------------------------------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """One path, or `--many` and paths on stdin."""
    _limit(one=arguments != ["--many"])
    if arguments == ["--many"]:
        return _many(sys.stdin.buffer)
    if len(arguments) != 1:
        print("usage: python -m modules.inspect_model PATH", file=sys.stderr)
        return 2
    sys.stdout.buffer.write(described(Path(arguments[0])) + b"\n")
    return 0


def _many(lines: IO[bytes]) -> int:
    while line := lines.readline(_MAX_PATH):
        faulthandler.dump_traceback_later(LIFE_SECONDS, exit=True)  # for each file anew
        sys.stdout.buffer.write(described(Path(json.loads(line))) + b"\n")
        sys.stdout.buffer.flush()
    return 0


def described(path: Path) -> bytes:
    """A line of JSON: the card, or {"error": what is wrong}."""
    try:
        text = read_card(path).to_json()
    except UserError as error:
        text = json.dumps({"error": str(error)})
    except MemoryError:
        text = json.dumps({"error": f"{path.name} needs too much memory to be read. Download it again, or use another conversion of this model."})
    return text.encode("utf-8", "replace")


def _limit(one: bool) -> None:
    """Limits of this process, where the system has them."""
    faulthandler.dump_traceback_later(LIFE_SECONDS, exit=True)
    if sys.platform == "win32":
        return
    resource = importlib.import_module("resource")
    limits = {"RLIMIT_AS": MEMORY_BYTES, "RLIMIT_CORE": 0, "RLIMIT_NOFILE": 64}
    if one:
        limits["RLIMIT_CPU"] = CPU_SECONDS
    for name, value in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):  # not on every system
            resource.setrlimit(getattr(resource, name), (value, value))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
