"""Processes, signals, locks, browsers and compilers: everything that differs between Linux, macOS and Windows.

Standard library only, so that `start.py` can use it before a package is installed. Functions that differ take `platform`
(a value of `sys.platform`), which is how the tests try the branches of systems they do not run on.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from modules.errors import DataError, InUse, SettingsError

RESTART_EXIT_CODE = 75  # server.py ends with it to ask start.py for a new child (EX_TEMPFAIL of sysexits.h: "try again")

_CREATE_NEW_PROCESS_GROUP = 0x200  # winbase.h; `subprocess` has the name on Windows only
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SYNCHRONIZE, _WAIT_TIMEOUT = 0x100000, 0x102  # winnt.h, winbase.h
_LOCKED_BYTE = 1 << 30  # Windows locks are mandatory: one byte far behind the process number, which stays readable


# Environment ----------------------------------------------------------------------------------------------------------


def program_environment(user_data: Path) -> dict[str, str]:
    """Variables the program sets for itself: temporary files inside `user_data`, no telemetry, hub libraries offline."""
    cache = user_data.absolute() / "cache"
    return {
        "GRADIO_TEMP_DIR": str(cache / "gradio"),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "MPLBACKEND": "Agg",  # plots are files; a desktop backend would want the main thread
        "MPLCONFIGDIR": str(cache / "matplotlib"),
        "TOKENIZERS_PARALLELISM": "false",  # its threads and a later fork do not go together
        "PYTHONUTF8": "1",  # Windows: the same encoding for files and terminal as everywhere else
    }


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without what would lead `.venv` or its pip to another place. The user's pip configuration stays."""
    foreign = {"PYTHONPATH", "PYTHONHOME", "PYTHONINSPECT", "PYTHONSTARTUP", "PYTHONSAFEPATH", "PYTHONPLATLIBDIR", "PYTHONEXECUTABLE"}
    foreign |= {"VIRTUAL_ENV", "__PYVENV_LAUNCHER__", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON", "PIP_DRY_RUN"}
    kept = {name: value for name, value in environment.items() if name.upper() not in foreign}
    return {**kept, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}  # "0" and not absent: a pip.conf may say `user = true`


def split_flags(text: str, source: str = "CMD_FLAGS.txt") -> list[str]:
    """The words of a flags file: one flag a line, lines that begin with `#` dropped, a trailing backslash ignored, quotes as in a shell.

    A backslash inside a line is an ordinary character, because Windows paths have them. Raises SettingsError with the line number.
    """
    words: list[str] = []
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        stripped = line.strip().removesuffix("\\").strip()
        if stripped.startswith("#"):
            continue
        lexer = shlex.shlex(stripped, posix=True)
        lexer.whitespace_split, lexer.escape, lexer.commenters = True, "", ""
        try:
            words += list(lexer)
        except ValueError:
            raise SettingsError(f"{source} line {number}: a quotation mark is not closed. Close it.") from None
    return words


def venv_python(venv: Path, platform: str = sys.platform) -> Path:
    """The interpreter inside a virtual environment. Does not say whether it exists."""
    return venv / "Scripts" / "python.exe" if platform == "win32" else venv / "bin" / "python"


# Processes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code (128 + n when signal n killed it, as shells say) and the signal we passed on, if any."""

    code: int
    passed_on: int | None = None


def child_options(dies_with_parent: bool = False, platform: str = sys.platform) -> dict[str, Any]:
    """Arguments for `subprocess.Popen` that give a child a process group of its own.

    The terminal's Ctrl+C then reaches this program only, which passes it on once, and the whole tree can be ended together.
    `dies_with_parent` (Linux only, ignored elsewhere): SIGTERM to the child when this process ends in any way. The kernel ties that to
    the *thread* that starts the child, so ask for it in the main thread only; raises RuntimeError in another.
    """
    if platform == "win32":
        return {"creationflags": _CREATE_NEW_PROCESS_GROUP}
    options: dict[str, Any] = {"start_new_session": True}
    if dies_with_parent and platform == "linux":
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("dies_with_parent works in the main thread only")
        options["preexec_fn"] = _follow(os.getpid())
    return options


def _follow(parent: int) -> Callable[[], None]:
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork: nothing but the call itself happens in the child

    def in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # the parent died before the request was made
            os._exit(1)

    return in_child


def start_child(
    command: Sequence[str | Path], *, dies_with_parent: bool = False, platform: str = sys.platform, **options: Any
) -> subprocess.Popen[bytes]:
    """Start `command` in a process group of its own (see `child_options`); `options` go to `subprocess.Popen`."""
    return subprocess.Popen([str(part) for part in command], **child_options(dies_with_parent, platform), **options)


def run_child(command: Sequence[str | Path], *, whole_tree: bool = False, grace: float = 30.0, platform: str = sys.platform, **options: Any) -> Ended:
    """Run `command` to its end and pass interrupts on to it; main thread only.

    A signal (Ctrl+C, SIGTERM, hang-up, Ctrl+Break) is sent on to the child, or with `whole_tree` to its process group, and this
    function goes on waiting. `grace` seconds after the first one the child's tree is killed. Signals that are ignored
    (nohup) stay ignored.
    """
    passed_on: list[int] = []
    too_early: list[int] = []
    child: subprocess.Popen[bytes] | None = None
    timer: threading.Timer | None = None

    def pass_on(number: int, _frame: object = None) -> None:
        nonlocal timer
        if child is None:
            too_early.append(number)
            return
        passed_on.append(number)
        send_signal(child, number, whole_tree, platform)
        if timer is None:
            timer = threading.Timer(grace, stop_tree, (child, 0.0, platform))
            timer.daemon = True
            timer.start()

    with _handling(_interrupts(platform), pass_on):
        child = start_child(command, dies_with_parent=True, platform=platform, **options)
        for number in too_early:
            pass_on(number)
        code = _wait(child, platform)
        if timer:
            timer.cancel()
    if passed_on and whole_tree:
        stop_tree(child, 0.0, platform)
    return Ended(code if code >= 0 else 128 - code, passed_on[0] if passed_on else None)


def exit_when_terminated() -> None:
    """Let SIGTERM end this process as `sys.exit(0)` does, `finally` clauses included; main thread only. Windows ends processes without asking."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


def _interrupts(platform: str) -> list[int]:
    names = ["SIGINT", "SIGTERM", "SIGBREAK"] if platform == "win32" else ["SIGINT", "SIGTERM", "SIGHUP"]
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


@contextlib.contextmanager
def _handling(numbers: Sequence[int], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """`handler` for each signal of `numbers` that is not ignored, until the block ends."""
    before = {number: signal.getsignal(number) for number in numbers}
    for number, old in before.items():
        if old is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


def _wait(process: subprocess.Popen[bytes], platform: str) -> int:
    # On Windows a wait without end cannot be interrupted by Ctrl+C; elsewhere one with a time limit would poll.
    timeout = 0.5 if platform == "win32" else None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout)


def send_signal(process: subprocess.Popen[bytes], number: int, whole_tree: bool = False, platform: str = sys.platform) -> None:
    """Send a signal to a child of `start_child`, or to its process group. On Windows every signal is Ctrl+Break. A dead child is no error."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: PermissionError for a group of zombies
        if platform == "win32":
            process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", 1))
        elif whole_tree and _leads_a_group(process.pid):
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)


def _leads_a_group(pid: int) -> bool:
    """Whether `pid` leads its process group, or is gone (its group may live on). False for a child that shares our group."""
    try:
        return os.getpgid(pid) == pid
    except ProcessLookupError:
        return True


def stop_tree(process: subprocess.Popen[bytes], grace: float = 5.0, platform: str = sys.platform) -> int:
    """End a child of `start_child` and all its descendants: politely, then after `grace` seconds by force. Returns the exit code.

    Descendants that made a session of their own are not reached on POSIX.
    """
    if grace and process.poll() is None:
        send_signal(process, signal.SIGTERM, True, platform)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    if platform == "win32":
        if process.poll() is None:
            subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True, timeout=30, check=False)
    else:
        send_signal(process, signal.SIGKILL, True, platform)  # also when the child is gone: its own children may not be
    return process.wait(30)


def is_alive(pid: int, platform: str = sys.platform) -> bool:
    """Whether a process with this number exists. A zombie still counts; a reused number cannot be told from the first owner."""
    if platform == "win32":  # os.kill(pid, 0) would end the process there
        kernel = ctypes.windll.kernel32  # type: ignore[attr-defined,unused-ignore]
        handle = kernel.OpenProcess(_SYNCHRONIZE, False, pid)
        if not handle:
            return False
        try:
            return bool(kernel.WaitForSingleObject(handle, 0) == _WAIT_TIMEOUT)
        finally:
            kernel.CloseHandle(handle)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# Locks ----------------------------------------------------------------------------------------------------------------


class FileLock:
    """A lock held on a file. The system takes it back when the process ends, however it ends."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def release(self) -> None:
        """Give the lock back; a second call does nothing. The file stays: deleting it would let two holders in."""
        self._file.close()

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock_file(path: Path, what: str, fix: str, platform: str = sys.platform) -> FileLock:
    """Lock `path` for this process, which is named inside it; never waits.

    Raises InUse "Another `what` (process 123) is using <folder>. `fix`", and DataError when the folder cannot be written.
    """
    file: IO[bytes] | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
        if not _try_lock(file, platform):
            raise InUse(f"Another {what} (process {_holder(file)}) is using {path.parent}. {fix}")
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
    except BaseException as error:
        if file:
            file.close()
        if isinstance(error, OSError):
            raise DataError(f"Cannot lock {path}: {error.strerror or error}. Make the folder writable or choose another one.") from error
        raise
    return FileLock(file)


def _holder(file: IO[bytes]) -> str:
    for _ in range(10):  # a holder writes its number right after it has the lock
        file.seek(0)
        number = file.read(20).decode("ascii", "replace").strip()
        if number:
            return number
        time.sleep(0.01)
    return "unknown"


def _try_lock(file: IO[bytes], platform: str) -> bool:
    """Lock the open file; False when another holder has it. Other failures (a network disk without locks) stay OSError."""
    try:
        if platform == "win32":
            msvcrt = importlib.import_module("msvcrt")
            file.seek(_LOCKED_BYTE)
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            finally:
                file.seek(0)
        else:
            fcntl = importlib.import_module("fcntl")
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True


# Ports ----------------------------------------------------------------------------------------------------------------

ADDRESS_IN_USE = (errno.EADDRINUSE, 10048)  # the second is WSAEADDRINUSE


def claim_port(listener: socket.socket, platform: str = sys.platform) -> None:
    """Prepare a socket for `bind`: a port in its closing wait may be taken again, one that another program listens on may not."""
    if platform == "win32":  # SO_REUSEADDR would steal a port there
        listener.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_EXCLUSIVEADDRUSE", -5), 1)
    else:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


# Browsers -------------------------------------------------------------------------------------------------------------


def open_browser(url: str, platform: str = sys.platform, environment: Mapping[str, str] = os.environ) -> bool:
    """Show `url` in the user's browser. False where there is no desktop: a text browser would take the terminal away."""
    if platform not in ("win32", "darwin") and not (environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY")):
        return False
    try:
        return webbrowser.open(url)
    except webbrowser.Error:
        return False


_BROWSER_COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge", "msedge")
_BROWSER_PLACES = {
    "linux": ("/snap/bin/chromium", "~/.cache/ms-playwright/chromium-*/chrome-linux*/chrome"),
    "darwin": (
        "/Applications/Chromium.app/Contents/MacOS/Chromium",
        "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
        "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
        "~/Library/Caches/ms-playwright/chromium-*/chrome-mac*/*.app/Contents/MacOS/*",
    ),
    "win32": (
        "{PROGRAMFILES}/Google/Chrome/Application/chrome.exe",
        "{PROGRAMFILES(X86)}/Google/Chrome/Application/chrome.exe",
        "{LOCALAPPDATA}/Google/Chrome/Application/chrome.exe",
        "{LOCALAPPDATA}/Chromium/Application/chrome.exe",
        "{PROGRAMFILES(X86)}/Microsoft/Edge/Application/msedge.exe",
        "{PROGRAMFILES}/Microsoft/Edge/Application/msedge.exe",
        "{LOCALAPPDATA}/ms-playwright/chromium-*/chrome-win*/chrome.exe",
    ),
}


def find_browser(platform: str = sys.platform, environment: Mapping[str, str] = os.environ) -> Path | None:
    """A Chromium, Chrome or Edge of this machine: `TGW_BROWSER`, then PATH, then the usual places. None when there is none.

    Raises SettingsError when `TGW_BROWSER` names no file.
    """
    if named := environment.get("TGW_BROWSER"):
        if Path(named).is_file():
            return Path(named)
        raise SettingsError(f"TGW_BROWSER names {named}, which is not a file. Correct it or unset it.")
    for command in _BROWSER_COMMANDS:
        if found := shutil.which(command, path=environment.get("PATH")):
            return Path(found)
    return next(_in_usual_places(platform, environment), None)


def _in_usual_places(platform: str, environment: Mapping[str, str]) -> Iterator[Path]:
    home = environment.get("HOME") or environment.get("USERPROFILE") or str(Path.home())
    folders = {name: environment.get(name, "") for name in ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA")}
    for place in _BROWSER_PLACES.get(platform, ()):
        pattern = Path(re.sub(r"\{(.+?)\}", lambda match: folders[match[1]], place.replace("~", home, 1)))
        if pattern.is_absolute():
            yield from (path for path in sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor)))) if path.is_file())


# Compilers ------------------------------------------------------------------------------------------------------------

_COMPILER_ADVICE = {
    "linux": "Install them: Debian and Ubuntu `sudo apt-get install build-essential`, Fedora `sudo dnf install gcc gcc-c++ make`.",
    "darwin": "Install Apple's command line tools: `xcode-select --install`.",
    "win32": 'Install "Build Tools for Visual Studio" from Microsoft, with the workload "Desktop development with C++".',
}


def missing_compilers(platform: str = sys.platform, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Names of the compilers, of those a C++ package needs, that are not on this machine."""

    def have(*commands: str) -> bool:
        return any(shutil.which(command, path=environment.get("PATH")) for command in commands)

    if platform == "win32":
        installer = Path(environment.get("PROGRAMFILES(X86)", ""), "Microsoft Visual Studio", "Installer", "vswhere.exe")
        return [] if have("cl", "clang-cl", "g++") or _prints([str(installer), *_VSWHERE]) else ["Microsoft Visual C++"]
    if platform == "darwin":  # /usr/bin/cc is always there and only asks for the tools
        return [] if _prints(["xcode-select", "-p"]) else ["Apple's C and C++ compiler (clang)"]
    missing = []
    if not environment.get("CC") and not have("cc", "gcc", "clang"):
        missing.append("a C compiler (gcc or clang)")
    if not environment.get("CXX") and not have("c++", "g++", "clang++"):
        missing.append("a C++ compiler (g++ or clang++)")
    return missing


_VSWHERE = ("-products", "*", "-requires", "Microsoft.VisualStudio.Component.VC.Tools.x86.x64", "-property", "installationPath")


def _prints(command: Sequence[str]) -> bool:
    """Whether the command exists, succeeds and prints something."""
    try:
        result = subprocess.run(command, capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return result.returncode == 0 and bool(result.stdout.strip())


def compiler_advice(platform: str = sys.platform) -> str:
    """How to get a C and C++ compiler on this system, in one sentence."""
    return _COMPILER_ADVICE.get(platform, _COMPILER_ADVICE["linux"])
