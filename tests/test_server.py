"""The server as a process: bad starts, orderly and violent ends, what survives them, and that it asks nobody outside."""

import os
import re
import shutil
import signal
import socket
import sys
import time

import psutil
import pytest

from tests.fakes import until
from tests.ui.live import ROOT, Browser, Message, free_port, servers

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
WORDS = [f"word{n}" for n in range(400)]


@pytest.fixture
def start():
    with servers() as make:
        yield make


def echo(folder, words=WORDS):
    """A user_data folder with one echo model, which is therefore loaded; it says a word every 20 ms."""
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "slow.echo").write_text(" ".join(words))
    return folder


def port():
    return f"--listen-port={free_port()}"


def test_a_second_server_on_the_same_folder_names_the_first(start, tmp_path):
    first = start(tmp_path, port()).up()
    second = start(tmp_path, port())
    assert second.ends() == 1
    assert str(first.process.pid) in second.output and "--user-data-dir" in second.output and "Traceback" not in second.output


def test_a_port_in_use_is_named_with_the_fix(start, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = start(tmp_path, f"--listen-port={taken.getsockname()[1]}")
        assert server.ends() == 1
    assert f"Port {taken.getsockname()[1] if taken.fileno() >= 0 else ''}".strip() in server.output
    assert "--listen-port" in server.output and "Traceback" not in server.output


@pytest.mark.parametrize(
    ("file", "content", "flags", "told"),
    [
        ("settings.yaml", "temperature: [", (), r"settings\.yaml line \d"),
        ("settings.yaml", "temperature: hot", (), r"temperature cannot be 'hot'"),
        ("CMD_FLAGS.txt", "--lisen", (), r"CMD_FLAGS\.txt.*--lisen.*--listen"),
        ("CMD_FLAGS.txt", "--model 'x", (), r"CMD_FLAGS\.txt line 1.*quotation"),
        ("nothing", "", ("--temprature", "1"), r"--temperature"),
        ("nothing", "", ("--gradio-auth", "justaname"), r"name:password"),
    ],
)
def test_bad_settings_end_the_start_with_one_sentence(start, tmp_path, file, content, flags, told):
    (tmp_path / file).write_text(content)
    server = start(tmp_path, *flags)
    assert server.ends() == 1
    assert re.search(told, server.output) and "Traceback" not in server.output


def test_an_unknown_model_is_told_and_the_page_comes_all_the_same(start, tmp_path):
    server = start(tmp_path, "--model", "nowhere.gguf", port()).up()
    assert "nowhere.gguf" in server.output
    with server.browser() as me:
        assert me.ask("Hi", status=409)["error"]["code"] == "NoModel"
        assert me.json("GET", "/chat/conversations")["items"] == []


def test_a_truncated_model_costs_a_message_not_the_server(start, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "broken.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + (2).to_bytes(8, "little") + (9).to_bytes(8, "little"))
    server = start(tmp_path, port()).up()
    with server.browser() as me:
        until(lambda: me.json("GET", "/models")["status"]["state"] == "failed")
        assert "broken.gguf" in me.json("GET", "/models")["status"]["text"]
    assert "Traceback" not in server.output


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order_and_the_running_reply_is_kept(start, tmp_path, number):
    server = start(echo(tmp_path), port(), "--gradio-auth", "ann:pw").up()
    me = logged_in(server)
    turn = me.ask("Go")
    id = turn["conversation"]["id"]
    until(lambda: "word20" in me.messages(id)[-1]["text"])
    assert server.interrupt(number) < 15
    assert "Traceback" not in server.output
    again = start(tmp_path, server_port(server), "--gradio-auth", "ann:pw").up()
    me.url = again.url
    kept = me.messages(id)[-1]
    assert kept["state"] == "stopped" and "word20" in kept["text"]


def server_port(server):
    return f"--listen-port={server.url.rpartition(':')[2]}"


def logged_in(server):
    me = server.browser()
    assert me.post("/login", data={"username": "ann", "password": "pw", "next": "/"}, headers={"Origin": server.url}).status_code == 200
    until(lambda: me.json("GET", "/models")["status"]["state"] == "ready")
    return me


@posix
def test_kill_9_loses_at_most_the_last_second(start, tmp_path):
    server = start(echo(tmp_path), port(), "--gradio-auth", "ann:pw").up()
    me = logged_in(server)
    id = me.ask("Go")["conversation"]["id"]
    seen = []
    until(lambda: seen.append((time.monotonic(), me.messages(id)[-1]["text"])) or "word150" in seen[-1][1])
    server.kill()
    killed = time.monotonic()
    again = start(tmp_path, server_port(server), "--gradio-auth", "ann:pw").up()
    me.url = again.url
    kept = me.messages(id)[-1]  # the login has survived too
    assert kept["state"] == "interrupted" and seen[-1][1].startswith(kept["text"])
    assert len(kept["text"]) >= max(len(text) for when, text in seen if when < killed - 1.5)
    until(lambda: me.json("GET", "/models")["status"]["state"] == "ready")
    me.json("POST", "/chat/continue", {"conversation": id, "message": kept["id"], "revision": me.revision}, 202)
    until(lambda: len(me.messages(id)[-1]["text"]) > len(kept["text"]))


def test_listening_without_a_login_makes_one_up_and_prints_it_once(start, tmp_path):
    server = start(tmp_path, "--listen", "--listen-host", "127.0.0.1", port()).up()
    found = re.findall(r"user admin, password (\S+)", server.output)
    assert len(found) == 1
    with server.browser() as me:
        page = me.get("/", headers={"Accept": "text/html"})
        assert page.status_code == 303 and "/login" in page.headers["location"]
        me.json("GET", "/chat/conversations", status=401)
        me.post("/login", data={"username": "admin", "password": found[0], "next": "/"}, headers={"Origin": server.url})
        assert me.json("GET", "/chat/conversations")["items"] == []


def test_verbose_prints_prompt_and_parameters_and_each_reply_its_figures(start, tmp_path):
    server = start(echo(tmp_path, ["Hello", "there"]), port(), "--verbose", "--temperature", "0.5").up()
    me = server.ready()
    me.ended(me.ask("My question")["conversation"]["id"])
    server.says(r"Prompt:[\s\S]*My question")
    server.says(r"Parameters: .*'temperature': 0\.5")
    server.says(r"Output generated in [\d.]+ s \([\d.]+ tokens/s, \d+ tokens, context \d+ of \d+, seed \d+")


WATCH = """
import os, sys
def watch(event, arguments):
    if event == "socket.connect":
        address = arguments[1]
        outside = isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost", "0.0.0.0")
    elif event == "socket.getaddrinfo":
        outside = arguments[0] not in (None, "", "127.0.0.1", "::1", "localhost", "0.0.0.0", b"127.0.0.1", b"localhost")
    else:
        return
    if outside:
        with open(os.environ["WATCH_FILE"], "a") as file:
            file.write(f"{event} {arguments[-3:]!r}\\n")
sys.addaudithook(watch)
with open(os.environ["WATCH_FILE"], "a") as file:
    file.write("watching\\n")
"""


def test_it_asks_no_other_host(start, tmp_path):
    hook, folder, seen = tmp_path / "hook", tmp_path / "user_data", tmp_path / "seen"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(WATCH)
    server = start(echo(folder, ["Hello"]), port(), env={"PYTHONPATH": str(hook), "WATCH_FILE": str(seen)}).up()
    me = server.ready()
    me.get("/", headers={"Accept": "text/html"})
    me.get("/config")
    me.ended(me.ask("Hi")["conversation"]["id"])
    server.interrupt(signal.SIGTERM)
    assert set(seen.read_text().splitlines()) == {"watching"}


@pytest.mark.engine
@posix
def test_a_killed_engine_costs_a_message_and_a_killed_server_leaves_none(start, tmp_path, starter_model):
    (tmp_path / "models").mkdir()
    os.symlink(starter_model, tmp_path / "models" / "starter.gguf")
    server = start(tmp_path, port(), "--ban-eos-token", "--model", str(starter_model)).up()
    me = server.ready()
    id = me.ask("Tell me a long story.")["conversation"]["id"]
    until(lambda: len(me.messages(id)[-1]["text"]) > 20)
    engine = next(child for child in server.children() if "engine" in " ".join(child.cmdline()))
    engine.kill()
    failed = me.ended(id)
    assert failed["state"] == "failed" and "engine" in failed["error"] and failed["text"]
    until(lambda: all(child.status() != psutil.STATUS_ZOMBIE for child in server.children()))
    me.ask("And now?", id)
    until(lambda: len(me.messages(id)[-1]["text"]) > 5)
    engine = next(child for child in server.children() if "engine" in " ".join(child.cmdline()))
    server.kill()
    engine.wait(5)
    assert not engine.is_running()


@pytest.mark.parametrize(
    ("place", "content", "told"),
    [
        ("conversations.sqlite3", b"this is no database" * 100, r"conversations\.sqlite3.*backup"),
        ("models", b"a file", r"Cannot create .*models.*--user-data-dir"),
        ("settings.yaml", b"\xff\xfe", r"settings\.yaml.*not UTF-8"),
    ],
)
def test_a_damaged_folder_ends_the_start_and_is_left_as_it_is(start, tmp_path, place, content, told):
    (tmp_path / place).write_bytes(content)
    server = start(tmp_path, port())
    assert server.ends() == 1
    assert re.search(told, server.output) and "Traceback" not in server.output
    assert (tmp_path / place).read_bytes() == content


def test_a_folder_that_cannot_be_made_is_named(start, tmp_path):
    """Root may write everywhere, so a file stands where the folder should be made."""
    (tmp_path / "file").write_text("")
    server = start(tmp_path / "file" / "user_data", port())
    assert server.ends() == 1
    assert "user_data" in server.output and "--user-data-dir" in server.output and "Traceback" not in server.output


def test_a_run_leaves_the_programs_folder_as_it_was(start, tmp_path):
    """In a copy, since other tests run in the real one at the same time."""
    clone, folder = tmp_path / "clone", echo(tmp_path / "user_data", ["Hello"])
    shutil.copytree(ROOT / "modules", clone / "modules", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("server.py", "settings.yaml", "CMD_FLAGS.txt"):
        shutil.copy2(ROOT / name, clone / name)
    before = {path: path.stat().st_mtime_ns for path in clone.rglob("*") if path.is_file()}
    server = start(folder, port(), root=clone, env={"PYTHONDONTWRITEBYTECODE": "1"}).up()
    me = server.ready()
    me.get("/", headers={"Accept": "text/html"})
    me.ended(me.ask("Hi")["conversation"]["id"])
    me.json("PATCH", "/chat/session", {"temperature": 0.5})
    me.json("POST", "/chat/session/save", {})
    server.interrupt(signal.SIGTERM)
    assert (folder / "settings.yaml").read_text() == "temperature: 0.5\n"
    assert {path: path.stat().st_mtime_ns for path in clone.rglob("*") if path.is_file()} == before
    folders = ["cache", "characters", "css", "grammars", "instruction-templates", "loras", "mmproj", "models", "presets", "prompts", "users"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([".lock", "conversations.sqlite3", "sessions.json", "settings.yaml", *folders])


def test_without_logins_the_cookie_is_still_the_owner_after_a_restart(start, tmp_path):
    server = start(echo(tmp_path), port()).up()
    me = server.ready()
    turn = me.ask("Go")
    id, reply = turn["conversation"]["id"], turn["messages"][1]["id"]
    with me.tab() as tab:  # a reload in the middle: the conversation as it is, then what comes
        until(lambda: "word60" in me.messages(id)[-1]["text"])
        assert me.messages(id)[-1]["state"] == "running"
        tab.follow(id, {reply: 0})
        page = Message()
        page.take(tab.until("snapshot"))
        page.take(tab.until("update", lambda event: event["reply"] == reply))
        assert "word60" in page.blocks[0] and page.seen[1] == page.seen[0] + 1
        boot = next(event["boot"] for event in tab.events if event["type"] == "hello")
    server.kill()
    start(tmp_path, server_port(server)).up()
    assert me.messages(id)[-1]["state"] == "interrupted"
    with me.tab() as tab:
        assert tab.until("hello")["boot"] != boot
        tab.follow(id, {reply: page.seen[-1]})
        assert tab.until("end")["message"]["state"] == "interrupted"
    with Browser(me.url, tmp_path) as stranger:
        stranger.json("GET", f"/chat/conversations/{id}", status=404)
