"""A user_data folder of the earlier system works as it is: its files are found and read, its chats become conversations once."""

import gc
import json
import logging
import os
import threading
import weakref
from pathlib import Path

import pytest

from modules import app, launch, old_data
from modules.characters import Character, Characters, UserProfile, Users
from modules.errors import DataError
from modules.instruction_templates import Templates
from modules.old_data import adopt, find_logs, import_logs
from modules.paths import UserData
from modules.presets import Presets
from modules.samplers import SamplingParams
from modules.settings import ChatOptions
from modules.store import Store
from modules.ui.library_routes import grammars
from tests.fakes import WAIT, PlainPresenter, until

GREETING = "<|BEGIN-VISIBLE-CHAT|>"
NOON = 1_700_000_000


@pytest.fixture
def data(tmp_path):
    return UserData(tmp_path / "user_data")


@pytest.fixture
def store(tmp_path):
    opened = Store.open(tmp_path / "conversations.sqlite3")
    yield opened
    opened.close()


def history(*rows, **metadata):
    return json.dumps({"internal": rows, "visible": rows, "metadata": metadata}, indent=4)


def put(data, place, text, changed=NOON):
    path = data.root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    os.utime(path, (changed, changed))
    return path


def talk(store, owner="me"):
    """Everything that `owner` has, the newest first: (title, texts, what the conversation goes on with)."""
    found = []
    for item in store.conversations(owner).items:
        texts = [message.text for message in store.conversation(owner, item.id).path()]
        found.append((item.title, texts, store.settings(owner, item.id)))
    return found


def snapshot(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_without_logs_there_is_nothing_to_do(data, store):
    assert find_logs(data) == []
    assert import_logs(data, store, "me") == old_data.Report()
    data.logs.mkdir(parents=True)
    assert import_logs(data, store, "me") == old_data.Report()


def test_chats_come_with_title_mode_and_character(data, store):
    put(data, "logs/instruct/20240131-12-30-59.json", history(["What is 1 + 1?", "2"]), NOON)
    put(data, "logs/instruct/Plans for May.json", history(["Hi", "Hello"], ["More", "Less"]), NOON + 1)
    put(data, "logs/chat/Ann/20240131-12-30-59.json", history([GREETING, "Hi, I am Ann."], ["Who?", "Ann."]), NOON + 2)
    put(data, "logs/persistent_Old Bob.json", json.dumps({"data": [["Ho", "Hum"]], "data_visible": [["Ho", "Hum"]]}), NOON + 3)
    put(data, "characters/Ann.yaml", "name: Ann Lee\ncontext: Kind.\ngreeting: Hi, I am Ann.")
    before = snapshot(data.root)
    assert import_logs(data, store, "me") == old_data.Report(imported=4)
    assert talk(store) == [
        ("Ho", ["Ho", "Hum"], {"mode": "chat", "character": "Old Bob", "name2": "Old Bob"}),
        (
            "Who?",
            ["Hi, I am Ann.", "Who?", "Ann."],
            {"mode": "chat", "character": "Ann", "name2": "Ann Lee", "context": "Kind.", "greeting": "Hi, I am Ann."},
        ),
        ("Plans for May", ["Hi", "Hello", "More", "Less"], {"mode": "instruct"}),
        ("What is 1 + 1?", ["What is 1 + 1?", "2"], {"mode": "instruct"}),
    ]
    assert snapshot(data.root) == before  # only read
    assert store.conversations("you").items == ()
    for _, _, values in talk(store):
        ChatOptions.build(values)
    speakers = [[message.details.get("name") for message in store.conversation("me", item.id).path()] for item in store.conversations("me").items]
    assert speakers == [[None, "Old Bob"], ["Ann Lee", None, "Ann Lee"], [None] * 4, [None] * 2]


def test_each_comes_once_even_when_it_was_deleted_here(data, store):
    path = put(data, "logs/instruct/a.json", history(["Hi", "Hello"]))
    assert import_logs(data, store, "me").imported == 1
    (item,) = store.conversations("me").items
    store.delete("me", item.id)
    os.utime(path)  # its time is not what tells it
    assert import_logs(data, store, "me") == old_data.Report()
    path.rename(path.with_name("b.json"))
    assert import_logs(data, store, "me") == old_data.Report()
    assert store.conversations("me").items == ()


def test_one_that_has_gone_on_comes_again_beside_the_first(data, store):
    put(data, "logs/instruct/a.json", history(["Hi", "Hello"]))
    import_logs(data, store, "me")
    put(data, "logs/instruct/a.json", history(["Hi", "Hello"], ["So?", "So."]), NOON + 5)
    put(data, "logs/chat/Ann/a.json", history(["Hi", "Hello"]))  # the same words elsewhere are another chat
    assert import_logs(data, store, "me").imported == 2
    assert sorted(len(texts) for _, texts, _ in talk(store)) == [2, 2, 4]


def test_chats_in_which_nobody_spoke_are_left_out(data, store):
    put(data, "logs/instruct/a.json", history())
    put(data, "logs/chat/Ann/b.json", history([GREETING, "Hi, I am Ann."]))
    put(data, "logs/chat/Ann/c.json", history([GREETING, "Hi, I am Ann."], ["", "Still there?"]))
    assert import_logs(data, store, "me") == old_data.Report(imported=1, empty=2)
    assert import_logs(data, store, "me") == old_data.Report()


BAD = {
    "logs/instruct/no json.json": "{",
    "logs/instruct/not utf-8.json": b"\xff\xfe\xfa",
    "logs/instruct/a list.json": "[1, 2]",
    "logs/instruct/rows.json": json.dumps({"internal": [["a", 5]]}),
    "logs/chat/Ann/deep.json": "[" * 100_000,
    "logs/chat/Ann/empty.json": "",
}


def test_bad_files_are_reported_and_do_not_stop_the_others(data, store):
    for place, text in BAD.items():
        put(data, place, text)
    put(data, "logs/instruct/z.json", history(["Hi", "Hello"]))
    put(data, "logs/instruct/note.txt", "x")
    (data.logs / "instruct" / "folder.json").mkdir()
    put(data, "logs/notebook/x.json", "{")
    report = import_logs(data, store, "me")
    assert report.imported == 1
    assert {Path(file).relative_to(data.root).as_posix() for file, _ in report.failed} == set(BAD)
    assert all(reason and len(reason) < 500 for _, reason in report.failed)
    put(data, "logs/instruct/no json.json", history(["Mended", "Yes"]))
    again = import_logs(data, store, "me")
    assert (again.imported, len(again.failed)) == (1, len(BAD) - 1)


def test_names_of_folders_are_hostile_too(data, store):
    put(data, "logs/chat/\u202eevil\n<b>/a.json", history(["Hi", "Hello"]))
    put(data, "logs/chat/CON/a.json", history(["Hi", "Hello"]))
    put(data, "characters/CON.yaml", "context: never read")
    assert import_logs(data, store, "me").imported == 2
    values = [values for _, _, values in talk(store)]
    assert {each["name2"] for each in values} == {"evil <b>", "CON"} and not any("context" in each for each in values)


def test_a_broken_character_file_does_not_stop_its_chats(data, store):
    put(data, "logs/chat/Ann/a.json", history(["Hi", "Hello"]))
    put(data, "characters/Ann.yaml", "a: &a [*a]")
    assert import_logs(data, store, "me") == old_data.Report(imported=1)
    assert talk(store)[0][2] == {"mode": "chat", "character": "Ann", "name2": "Ann"}


def test_they_stand_in_the_list_by_their_time(data, store):
    put(data, "logs/instruct/b.json", history(["second", ""]), NOON + 1000)
    put(data, "logs/instruct/a.json", history(["third", ""]), NOON + 2000)
    put(data, "logs/instruct/c.json", history(["first", ""], user_0={"timestamp": "Nov 14, 2020 12:00"}), NOON + 3000)
    import_logs(data, store, "me")
    items = store.conversations("me").items
    assert [item.title for item in items] == ["a", "b", "c"]
    assert items[0].updated == NOON + 2000  # its messages have no time: the file's


def test_a_store_that_refuses_stops_the_import_and_the_next_goes_on(data, store, monkeypatch):
    for name in "abc":
        put(data, f"logs/instruct/{name}.json", history([name, "x"]))
    real, calls = Store.import_conversations, []

    def full(self, owner, conversations):
        calls.append(owner)
        if len(calls) == 2:
            raise DataError("The disk is full.")
        real(self, owner, conversations)

    monkeypatch.setattr(Store, "import_conversations", full)
    with pytest.raises(DataError, match="full"):
        import_logs(data, store, "me")
    assert import_logs(data, store, "me").imported == 2
    assert [(title, values) for title, _, values in talk(store)] == [(name, {"mode": "instruct"}) for name in "cba"]


def test_a_crash_before_it_was_marked_does_not_double_a_chat(data, store, monkeypatch):
    put(data, "logs/instruct/a.json", history(["Hi", "Hello"]))
    with monkeypatch.context() as crash:
        crash.setattr(Store, "mark_imported", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            import_logs(data, store, "me")
    import_logs(data, store, "me")
    assert [title for title, _, _ in talk(store)] == ["a"]


def test_one_file_at_a_time_is_in_memory(data, store, monkeypatch):
    for number in range(5):
        put(data, f"logs/instruct/{number}.json", history([f"{number}", "x"]))
    read, made = old_data._read, []

    def reading(log, owner):
        gc.collect()
        assert not any(former() for former in made)
        found = read(log, owner)
        made.extend(weakref.ref(conversation) for conversation in found[0])
        return found

    monkeypatch.setattr(old_data, "_read", reading)
    assert import_logs(data, store, "me").imported == len(made) == 5


# --- adopting


def test_the_first_who_asks_gets_them(data, store, caplog):
    put(data, "logs/instruct/a.json", history(["Hi", "Hello"]))
    put(data, "logs/instruct/b.json", "{")
    with caplog.at_level(logging.INFO):
        adopt(data, store, "me")
    assert "1 taken over, 1 could not be read" in caplog.text and "b.json was left out" in caplog.text
    adopt(data, store, "you")
    assert [title for title, _, _ in talk(store)] == ["a"]
    assert store.conversations("you").items == ()


def test_later_calls_do_not_look_at_the_files(data, store, monkeypatch):
    put(data, "logs/instruct/a.json", history(["Hi", "Hello"]))
    adopt(data, store, "me")
    looked = []
    monkeypatch.setattr(old_data, "import_logs", lambda *given: looked.append(given) or old_data.Report())
    adopt(data, store, "me")
    assert looked == []
    put(data, "logs/instruct/new.json", history(["New", "Yes"]))
    adopt(data, store, "me")
    assert len(looked) == 1


def test_in_multi_user_mode_nothing_is_taken_over(data, store):
    put(data, "logs/instruct/a.json", history(["Hi", "Hello"]))
    adopt(data, store, "me", multi_user=True)
    assert store.conversations("me").items == ()


def test_a_long_import_goes_on_behind_the_list_and_is_not_begun_twice(data, store, monkeypatch):
    put(data, "logs/instruct/a.json", history(["Hi", "Hello"]))
    go, began = threading.Event(), []
    real = import_logs

    def slow(*given):
        began.append(given)
        assert go.wait(WAIT)
        return real(*given)

    monkeypatch.setattr(old_data, "import_logs", slow)
    monkeypatch.setattr(old_data, "PATIENCE", 0.01)
    adopt(data, store, "me")
    adopt(data, store, "you")
    assert len(began) == 1 and store.conversations("me").items == ()
    go.set()
    until(lambda: [title for title, _, _ in talk(store)] == ["a"])
    until(lambda: not old_data._importing.locked())


def test_a_store_that_refuses_is_told_in_the_log_only(data, store, monkeypatch, caplog):
    put(data, "logs/instruct/a.json", history(["Hi", "Hello"]))

    def full(*_):
        raise DataError("The disk is full.")

    monkeypatch.setattr(Store, "import_conversations", full)
    adopt(data, store, "me")
    assert "The disk is full." in caplog.text
    monkeypatch.undo()
    adopt(data, store, "me")
    assert [title for title, _, _ in talk(store)] == ["a"]


# --- everything else in such a folder

SETTINGS = """\
show_controls: true
start_with: ''
mode: chat-instruct
chat_style: cai-chat
chat-instruct_command: |-
  Continue the chat dialogue below.

  <|prompt|>
dark_theme: true
preset: Mine
max_new_tokens: 1024
max_new_tokens_min: 1
temperature: 0.9
top_p: 0.95
sampler_priority: |-
  repetition_penalty
  dry
  temperature
  top_p
enable_thinking: true
reasoning_effort: medium
custom_stopping_strings: '"###"'
custom_token_bans: ''
grammar_string: ''
seed: -1
stream: true
character: Ann
user: Default
name1: Bo
name2: Ann
user_bio: Likes tea.
context: Kind.
greeting: Hi.
default_extensions: []
gallery-items_per_page: 50
"""


@pytest.fixture
def old_folder(data):
    """A folder as the earlier system leaves it."""
    put(data, "settings.yaml", SETTINGS)
    put(
        data, "CMD_FLAGS.txt", "# Only used by the one-click installer.\n# Example:\n# --listen --api\n\n--verbose\n--ctx-size 4096 --gpu_layers 20\n"
    )
    put(data, "characters/Ann.yaml", "name: Ann\ngreeting: |-\n  Hi.\ncontext: |-\n  Kind.\n")
    put(data, "characters/Ann.png", b"\x89PNG")
    put(data, "characters/Zed.json", '{"char_name": "Zed", "char_persona": "Last."}')
    put(data, "users/Me.yaml", "name: Bo\nuser_bio: Likes tea.\n")
    put(data, "presets/Mine.yaml", "temperature: 0.9\ntop_k: 30\n")
    put(data, "instruction-templates/Own.yaml", "instruction_template: |-\n  {%- for m in messages %}{{ m.role }}: {{ m.content }}\n  {% endfor %}\n")
    turns = "user: USER\nbot: BOT\nturn_template: |-\n  <|user|>: <|user-message|>\n  <|bot|>: <|bot-message|>\n"
    put(data, "instruction-templates/Older.yaml", turns)
    put(data, "grammars/digits.gbnf", "root ::= [0-9]+")
    put(data, "logs/instruct/20240131-12-30-59.json", history(["Hi", "Hello"]))
    put(data, "logs/chat/Ann/20240131-12-30-59.json", history([GREETING, "Hi."], ["Who?", "Ann."]))
    put(data, "logs/chat_state.json", '{"last_chats": {"instruct": "20240131-12-30-59"}}')
    put(data, "logs/notebook/2024.txt", "Once")
    put(data, "models/config-user.yaml", "x$:\n  loader: llama.cpp\n")
    return data


def test_a_folder_of_the_earlier_system_works_as_it_is(old_folder, tmp_path):
    before = snapshot(old_folder.root)
    found = launch.configure(tmp_path, ["--user-data-dir", str(old_folder.root)])
    assert found.settings.verbose
    sampling, chat = found.group(SamplingParams), found.group(ChatOptions)
    assert (sampling.max_new_tokens, sampling.temperature, sampling.sampler_priority[1]) == (1024, 0.9, "dry")
    assert (chat.mode, chat.preset, chat.character, chat.name1, chat.name2) == ("chat-instruct", "Mine", "Ann", "Bo", "Ann")
    assert chat.chat_instruct_command.endswith("<|prompt|>") and (chat.context, chat.greeting, chat.user_bio) == ("Kind.", "Hi.", "Likes tea.")
    assert {"default_extensions", "gallery-items_per_page", "stream"} <= {key for key, _ in found.unknown}

    assert Characters(old_folder.characters).names() == ["Ann", "Assistant", "Example", "Zed"]
    assert Characters(old_folder.characters).get("Ann") == Character("Ann", "Kind.", "Hi.")
    assert Characters(old_folder.characters).get("Zed").context == "Zed's persona: Last."
    assert Users(old_folder.users).get("Me") == UserProfile("Bo", "Likes tea.")
    assert {name: value for name, value in Presets(old_folder.presets).get("Mine").items() if name in ("temperature", "top_k", "top_p")} == {
        "temperature": 0.9,
        "top_k": 30,
        "top_p": 1.0,
    }
    templates = Templates(old_folder.instruction_templates)
    assert {"Own", "Older"} <= set(templates.names())
    assert "m.content" in templates.get("Own") and "USER" in templates.get("Older")

    built = app.build(found, old_folder, Store.open(tmp_path / "c.sqlite3"), PlainPresenter)
    try:
        assert grammars(built).text("digits") == ("digits.gbnf", "root ::= [0-9]+")
        adopt(built.data, built.store, "me")
        assert sorted(texts for _, texts, _ in talk(built.store)) == [["Hi", "Hello"], ["Hi.", "Who?", "Ann."]]
    finally:
        built.close()
    after = snapshot(old_folder.root)
    assert {path: after[path] for path in before} == before  # nothing of it was changed or deleted
