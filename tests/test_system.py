"""Process, signal, lock, browser and compiler code: this system for real, the others by their branch with the system faked."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import webbrowser
from pathlib import Path

import pytest

from modules import system
from modules.errors import DataError, InUse, SettingsError

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX processes")
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
ROOT = Path(system.__file__).resolve().parent.parent


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def gone(pid: int) -> bool:
    """Not there, or a zombie nobody in this sandbox reaps."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z" if sys.platform == "linux" else not system.is_alive(pid)
    except FileNotFoundError:
        return True


def python(code: str, *arguments: str, **options) -> subprocess.Popen[bytes]:
    # A test run in the background has SIGINT ignored, one under nohup SIGHUP, and would pass that on.
    restore = None if sys.platform == "win32" else lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGHUP)]
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE, preexec_fn=restore, **options)


@pytest.fixture
def executable(tmp_path):
    def make(name: str, script: str = "exit 0") -> Path:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return make


# Environment


def test_importing_needs_the_standard_library_only():
    code = "import sys; import modules.system; import modules.paths; print(sorted(m for m in sys.modules if m.partition('.')[0] == 'modules'))"
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"], capture_output=True, text=True
    )
    assert result.stdout.strip() == "['modules', 'modules.errors', 'modules.paths', 'modules.system']", result.stderr


def test_program_environment_keeps_everything_inside_user_data_and_offline(tmp_path):
    environment = system.program_environment(tmp_path / "мой data")
    assert environment["GRADIO_TEMP_DIR"] == str(tmp_path / "мой data" / "cache" / "gradio")
    assert environment["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert all(environment[name] == "1" for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"))
    assert Path(system.program_environment(Path("user_data"))["GRADIO_TEMP_DIR"]).is_absolute()


def test_clean_environment_drops_what_leads_out_of_the_venv_and_keeps_pip_configuration():
    user = {
        "PYTHONPATH": "/x",
        "PYTHONHOME": "/x",
        "VIRTUAL_ENV": "/x",
        "PIP_TARGET": "/x",
        "PIP_USER": "1",
        "PIP_INDEX_URL": "u",
        "CMAKE_ARGS": "-D",
        "PATH": "p",
    }
    cleaned = system.clean_environment(user)
    assert cleaned == {"PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_INDEX_URL": "u", "CMAKE_ARGS": "-D", "PATH": "p"}
    assert "PythonPath" not in system.clean_environment({"PythonPath": "/x"})  # Windows does not mind the case


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("\ufeff--listen\r\n\n  # --share\n", ["--listen"]),
        ("--model-dir C:\\models\\big", ["--model-dir", "C:\\models\\big"]),
        ("--model-dir '/big disk/m'\n--model=\"a b\"", ["--model-dir", "/big disk/m", "--model=a b"]),
        ("--gradio-auth a:b#c", ["--gradio-auth", "a:b#c"]),
        ("# it's a comment\n--listen \\\n--share", ["--listen", "--share"]),
    ],
)
def test_flags_files(text, words):
    assert system.split_flags(text) == words


def test_an_open_quotation_mark_is_an_error_with_its_line():
    with pytest.raises(SettingsError, match=r"my flags line 2: a quotation mark"):
        system.split_flags("--listen\n--model 'a b", "my flags")


def test_venv_python():
    assert system.venv_python(Path("v"), "linux") == Path("v/bin/python") == system.venv_python(Path("v"), "darwin")
    assert system.venv_python(Path("v"), "win32") == Path("v/Scripts/python.exe")


# Processes


def test_child_options_by_system():
    assert system.child_options(platform="win32") == {"creationflags": 0x200}
    assert system.child_options(dies_with_parent=True, platform="win32") == {"creationflags": 0x200}
    assert system.child_options(dies_with_parent=True, platform="darwin") == {"start_new_session": True}
    assert system.child_options(platform="linux") == {"start_new_session": True}


@linux
def test_dies_with_parent_is_refused_in_a_thread():
    # The kernel would end the child with the thread, not with the process.
    errors: list[BaseException] = []

    def ask():
        try:
            system.child_options(dies_with_parent=True)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(10)
    assert errors


@linux
def test_a_child_does_not_outlive_a_killed_parent():
    code = """
import sys; from modules.system import run_child
run_child([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(120)"])
"""
    parent = python(code)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait(10)
    assert until(lambda: gone(child))


@posix
@pytest.mark.parametrize(("code", "expected"), [("pass", 0), ("raise SystemExit(75)", 75), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_run_child_gives_the_exit_code(code, expected):
    before = signal.getsignal(signal.SIGTERM)
    assert system.run_child([sys.executable, "-c", code]) == system.Ended(expected)
    assert signal.getsignal(signal.SIGTERM) is before


CHILD = """
import os, signal, sys, time
def end(number, frame):
    os.write(1, b"got %d\\n" % number); sys.exit(40 + number)  # print may be under way
for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(n, end)
print(os.getpid(), flush=True)
while True: time.sleep(0.05)  # a signal in the moment before one long sleep would wait for its end
"""
PARENT = """
import sys; from modules.system import run_child
ended = run_child([sys.executable, "-c", sys.argv[1]], grace=float(sys.argv[2]), whole_tree=sys.argv[3] == "tree")
print(ended.code, ended.passed_on, flush=True)
"""


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, 1])
def test_run_child_passes_a_signal_on_once_and_waits(number):
    parent = python(PARENT, CHILD, "60", "one")
    parent.stdout.readline()
    parent.send_signal(number)
    out = parent.communicate(timeout=30)[0].decode()
    assert out == f"got {int(number)}\n{40 + number} {int(number)}\n"
    assert parent.returncode == 0


@posix
def test_run_child_kills_a_child_that_does_not_end_and_its_children():
    stubborn = """
import os, signal, subprocess, sys, time
for n in (signal.SIGINT, signal.SIGTERM): signal.signal(n, signal.SIG_IGN)
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
print(grandchild.pid, flush=True); time.sleep(120)
"""
    parent = python(PARENT, stubborn, "0.3", "tree")
    grandchild = int(parent.stdout.readline())
    parent.send_signal(signal.SIGINT)
    assert parent.communicate(timeout=30)[0].decode() == "137 2\n"
    assert until(lambda: gone(grandchild))


@posix
def test_whole_tree_leaves_nothing_behind_when_only_the_leader_listens():
    leader = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(2, signal.SIG_IGN); print('up', flush=True); time.sleep(120)"],
    stdout=subprocess.PIPE)
child.stdout.readline()
try:
    print(child.pid, flush=True)
    while True: time.sleep(0.05)
except KeyboardInterrupt: sys.exit(3)
"""
    parent = python(PARENT, leader, "60", "tree")
    left_over = int(parent.stdout.readline())
    parent.send_signal(signal.SIGINT)
    assert parent.communicate(timeout=30)[0].decode() == "3 2\n"
    assert until(lambda: gone(left_over))


@posix
def test_an_ignored_signal_stays_ignored():
    # nohup: the hang-up must reach neither this program nor the child.
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + PARENT
    quick = "import os, signal; os.kill(os.getppid(), signal.SIGHUP)"
    assert python(code, quick, "60", "one").communicate(timeout=30)[0].decode() == "0 None\n"


@posix
def test_a_signal_before_the_child_is_there_is_not_lost(monkeypatch):
    start = system.start_child

    def slow(command, **options):
        signal.raise_signal(signal.SIGTERM)
        return start(command, **options)

    monkeypatch.setattr(system, "start_child", slow)
    ended = system.run_child([sys.executable, "-c", "import time; time.sleep(120)"])
    assert ended == system.Ended(128 + 15, signal.SIGTERM)


@posix
def test_stop_tree_ends_descendants_and_gives_the_code():
    code = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '120']); print(p.pid, flush=True); time.sleep(120)"
    process = system.start_child([sys.executable, "-c", code], stdout=subprocess.PIPE)
    grandchild = int(process.stdout.readline())
    assert system.stop_tree(process, 10) == -signal.SIGTERM
    assert until(lambda: gone(grandchild))
    assert system.stop_tree(process, 10) == -signal.SIGTERM  # a second time is no error


@posix
def test_stop_tree_never_kills_our_own_group():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])  # shares the group of the tests
    assert system.stop_tree(process, 0) == -signal.SIGKILL


class FakeProcess:
    """A process on Windows that ends only by taskkill."""

    pid = 4711

    def __init__(self):
        self.events: list[object] = []
        self.waits = 0

    def poll(self):
        return None

    def send_signal(self, number):
        self.events.append(number)

    def wait(self, timeout=None):
        self.waits += 1
        if timeout is not None and self.waits == 1:
            raise subprocess.TimeoutExpired("x", timeout)
        return 1


def test_windows_stops_by_break_and_then_taskkill(monkeypatch):
    process, ran = FakeProcess(), []
    monkeypatch.setattr(system.subprocess, "run", lambda command, **_: ran.append(command))
    assert system.stop_tree(process, 0.1, "win32") == 1
    assert process.events == [getattr(signal, "CTRL_BREAK_EVENT", 1)]
    assert ran == [["taskkill", "/T", "/F", "/PID", "4711"]]


def test_windows_waits_in_slices_so_that_interrupts_are_seen(monkeypatch):
    process = FakeProcess()
    monkeypatch.setattr(system, "start_child", lambda *_, **__: process)
    assert system.run_child(["server"], platform="win32") == system.Ended(1)
    assert process.waits == 2


@posix
def test_is_alive():
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait(30)
    assert not system.is_alive(process.pid)
    assert system.is_alive(os.getpid())


@posix
def test_a_process_of_somebody_else_is_alive(monkeypatch):
    monkeypatch.setattr(system.os, "kill", lambda *_: (_ for _ in ()).throw(PermissionError()))
    assert system.is_alive(1)


@pytest.mark.parametrize(("handle", "wait", "alive"), [(0, 0, False), (7, 0x102, True), (7, 0, False)])
def test_is_alive_on_windows(monkeypatch, handle, wait, alive):
    closed = []
    kernel = types.SimpleNamespace(OpenProcess=lambda *_: handle, WaitForSingleObject=lambda *_: wait, CloseHandle=closed.append)
    monkeypatch.setattr(ctypes, "windll", types.SimpleNamespace(kernel32=kernel), raising=False)
    assert system.is_alive(5, "win32") is alive
    assert closed == ([handle] if handle else [])


# Locks


def test_a_lock_is_exclusive_names_its_holder_and_comes_back(tmp_path):
    path = tmp_path / "new" / ".lock"
    with system.lock_file(path, "server", "Stop it."):
        with pytest.raises(InUse) as caught:
            system.lock_file(path, "server", "Stop it, or start with --user-data-dir other.")
        assert str(caught.value) == (f"Another server (process {os.getpid()}) is using {path.parent}. Stop it, or start with --user-data-dir other.")
    system.lock_file(path, "server", "").release()
    assert path.exists()


@posix
def test_a_killed_holder_loses_the_lock(tmp_path):
    code = """
import sys, time; from pathlib import Path; from modules.system import lock_file
lock = lock_file(Path(sys.argv[1]), "server", ""); print("held", flush=True); time.sleep(120)
"""
    holder = python(code, str(tmp_path / "lock"))
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(InUse, match=f"process {holder.pid}"):
        system.lock_file(tmp_path / "lock", "server", "")
    holder.kill()
    holder.wait(10)
    system.lock_file(tmp_path / "lock", "server", "").release()


@posix
def test_a_child_does_not_inherit_the_lock(tmp_path):
    lock = system.lock_file(tmp_path / "lock", "server", "")
    child = system.start_child(["sleep", "120"])
    try:
        lock.release()
        system.lock_file(tmp_path / "lock", "server", "").release()
    finally:
        system.stop_tree(child, 0)


def test_a_folder_that_cannot_be_written_is_a_data_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"Cannot lock .*Make the folder writable"):
        system.lock_file(tmp_path / "file" / ".lock", "server", "")


def _fake_msvcrt(monkeypatch, code: int | None):
    positions = []

    def locking(descriptor, mode, size):
        positions.append((os.lseek(descriptor, 0, os.SEEK_CUR), mode, size))
        if code:
            raise OSError(code, "locked")

    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(LK_NBLCK=2, locking=locking))
    return positions


def test_a_lock_on_windows_leaves_the_holder_readable(tmp_path, monkeypatch):
    positions = _fake_msvcrt(monkeypatch, None)
    with system.lock_file(tmp_path / "lock", "server", "", "win32"):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    assert positions == [(1 << 30, 2, 1)]
    _fake_msvcrt(monkeypatch, errno.EACCES)
    with pytest.raises(InUse, match=f"process {os.getpid()}"):
        system.lock_file(tmp_path / "lock", "server", "", "win32")


def test_a_disk_without_locks_is_not_taken_for_a_second_server(tmp_path, monkeypatch):
    _fake_msvcrt(monkeypatch, errno.ENOLCK)
    with pytest.raises(DataError):
        system.lock_file(tmp_path / "lock", "server", "", "win32")


def test_a_holder_that_has_not_said_its_number_is_unknown(tmp_path, monkeypatch):
    _fake_msvcrt(monkeypatch, errno.EACCES)
    with pytest.raises(InUse, match="process unknown"):
        system.lock_file(tmp_path / "lock", "server", "", "win32")


# Ports


@posix
def test_a_port_in_closing_wait_is_free_and_one_in_use_is_not():
    with socket.socket() as first, socket.socket() as second:
        for listener in (first, second):
            system.claim_port(listener)
        first.bind(("127.0.0.1", 0))
        first.listen()
        with pytest.raises(OSError) as caught:
            second.bind(first.getsockname())
            second.listen()
        assert caught.value.errno in system.ADDRESS_IN_USE


def test_a_port_on_windows_is_claimed_alone():
    asked = []
    system.claim_port(types.SimpleNamespace(setsockopt=lambda *option: asked.append(option)), "win32")
    assert asked == [(socket.SOL_SOCKET, getattr(socket, "SO_EXCLUSIVEADDRUSE", -5), 1)]


# Browsers and compilers


def test_open_browser_needs_a_desktop(monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or True)
    assert not system.open_browser("u", "linux", {})
    assert system.open_browser("u", "linux", {"DISPLAY": ":0"})
    assert system.open_browser("u", "darwin", {})
    assert opened == ["u", "u"]
    monkeypatch.setattr(webbrowser, "open", lambda url: (_ for _ in ()).throw(webbrowser.Error()))
    assert not system.open_browser("u", "win32", {})


@posix
def test_find_browser_takes_the_named_one_then_the_path(executable, tmp_path):
    chrome = executable("google-chrome")
    environment = {"PATH": str(chrome.parent), "HOME": str(tmp_path)}
    assert system.find_browser("linux", environment) == chrome
    mine = executable("mine")
    assert system.find_browser("linux", {**environment, "TGW_BROWSER": str(mine)}) == mine
    with pytest.raises(SettingsError, match="TGW_BROWSER"):
        system.find_browser("linux", {**environment, "TGW_BROWSER": "/not/there"})


@pytest.mark.parametrize(
    ("platform", "place"),
    [
        ("linux", ".cache/ms-playwright/chromium-1234/chrome-linux64/chrome"),
        ("darwin", "Library/Caches/ms-playwright/chromium-1/chrome-mac/Chromium.app/Contents/MacOS/Chromium"),
        ("win32", "Google/Chrome/Application/chrome.exe"),
    ],
)
def test_find_browser_in_the_usual_places(tmp_path, monkeypatch, platform, place):
    monkeypatch.setitem(system._BROWSER_PLACES, "linux", system._BROWSER_PLACES["linux"][1:])  # /snap of the machine is not ours
    home = tmp_path / "ein Heim"
    environment = {"PATH": "", "HOME": str(home), "LOCALAPPDATA": str(home)}
    if platform != sys.platform or sys.platform == "linux":  # the absolute places of another system are not here
        assert system.find_browser(platform, environment) is None
    browser = home / place
    browser.parent.mkdir(parents=True)
    browser.write_text("")
    assert system.find_browser(platform, environment) == browser


@posix
def test_missing_compilers_on_linux(executable, tmp_path):
    nothing = {"PATH": str(tmp_path)}
    assert system.missing_compilers("linux", nothing) == ["a C compiler (gcc or clang)", "a C++ compiler (g++ or clang++)"]
    path = str(executable("gcc").parent)
    assert system.missing_compilers("linux", {"PATH": path}) == ["a C++ compiler (g++ or clang++)"]
    assert system.missing_compilers("linux", {"PATH": path, "CXX": "/opt/c++"}) == []
    assert "build-essential" in system.compiler_advice("linux")


@posix
def test_missing_compilers_on_macos_and_windows(executable, tmp_path, monkeypatch):
    assert system.missing_compilers("win32", {"PATH": "", "PROGRAMFILES(X86)": str(tmp_path)}) == ["Microsoft Visual C++"]
    assert system.missing_compilers("win32", {"PATH": str(executable("cl").parent)}) == []
    executable("xcode-select", "echo /Library/Developer")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert system.missing_compilers("darwin", {}) == []
    executable("xcode-select", "exit 2")
    assert system.missing_compilers("darwin", {}) == ["Apple's C and C++ compiler (clang)"]
    assert "xcode-select" in system.compiler_advice("darwin")
    assert "Visual Studio" in system.compiler_advice("win32")
