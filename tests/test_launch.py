import sys
from pathlib import Path

import pytest

from modules import launch, loaders
from modules.backends.base import Adapter
from modules.errors import DataError, NotFound, SettingsError
from modules.models import ModelSlot
from modules.paths import UserData
from modules.samplers import SamplingParams
from modules.settings import Settings
from tests.fakes import FakeEngine, until


@pytest.fixture
def root(tmp_path):
    (tmp_path / "user_data").mkdir()
    return tmp_path


def write(root: Path, name: str, text: str | bytes) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# --- configuration ------------------------------------------------------------------------------------------------------------------

PLACES = (
    ("settings.yaml", "top_k: {}"),
    ("user_data/settings.yaml", "top_k: {}"),
    ("CMD_FLAGS.txt", "--top-k {}"),
    ("user_data/CMD_FLAGS.txt", "--top_k {}"),
)


@pytest.mark.parametrize("levels", range(6))
def test_the_six_levels_each_over_the_ones_before(levels, root):
    for number, (name, text) in enumerate(PLACES[:levels], 1):
        write(root, name, text.format(number))
    argv = ["--top-k=5"] if levels == 5 else []
    assert launch.configure(root, argv).group(SamplingParams).top_k == levels


def test_a_clone_without_any_file_has_the_defaults(root):
    found = launch.configure(root, [])
    assert found.settings == Settings() and found.explicit == frozenset() and found.warnings == ()


def test_the_user_data_folder_may_be_named_first(root):
    write(root, "CMD_FLAGS.txt", "--user-data-dir mine")
    write(root, "mine/CMD_FLAGS.txt", "--verbose")
    write(root, "mine/settings.yaml", "top_k: 4")
    write(root, "user_data/settings.yaml", "top_k: 9")
    found = launch.configure(root, [])
    assert found.settings.verbose and found.group(SamplingParams).top_k == 4
    assert launch.user_data(root, found.settings).root == root / "mine"


@pytest.mark.parametrize("place", ["argv", "CMD_FLAGS.txt", "user_data/CMD_FLAGS.txt"])
def test_another_settings_file_relative_to_the_program(place, root, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    write(root, "other.yaml", "top_k: 3")
    write(root, "user_data/settings.yaml", "top_k: 9")
    argv = ["--settings", "other.yaml"] if place == "argv" else []
    if not argv:
        write(root, place, "--settings other.yaml")
    found = launch.configure(root, argv)
    assert found.group(SamplingParams).top_k == 3
    assert launch.user_data(root, found.settings).settings == root / "other.yaml"


def test_a_named_settings_file_must_be_there(root):
    with pytest.raises(SettingsError, match=r"There is no settings file .*gone\.yaml\. Correct --settings\."):
        launch.configure(root, ["--settings", "gone.yaml"])


def test_byte_order_marks_and_windows_lines(root):
    write(root, "CMD_FLAGS.txt", b"\xef\xbb\xbf# x\r\n--model-dir C:\\models\r\n")
    write(root, "user_data/settings.yaml", b"\xef\xbb\xbftop_k: 3\r\n")
    found = launch.configure(root, [])
    assert found.settings.model_dir == "C:\\models" and found.group(SamplingParams).top_k == 3


@pytest.mark.parametrize("name", ["settings.yaml", "user_data/settings.yaml", "CMD_FLAGS.txt", "user_data/CMD_FLAGS.txt"])
def test_a_file_that_is_no_text_is_named(name, root):
    path = write(root, name, "é: 1".encode("utf-16"))
    with pytest.raises(SettingsError) as refused:
        launch.configure(root, [])
    assert f"Cannot read {path}: it is not UTF-8 text." in str(refused.value)


def test_a_folder_in_place_of_a_file_is_named(root):
    (root / "user_data" / "settings.yaml").mkdir()
    with pytest.raises(SettingsError, match=r"Cannot read .*settings\.yaml: .*Correct or remove"):
        launch.configure(root, [])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("user_data/settings.yaml", "a: [\nb: 1", "settings.yaml line "),
        ("user_data/CMD_FLAGS.txt", '\n--model "x', "CMD_FLAGS.txt line 2: a quotation mark is not closed"),
        ("CMD_FLAGS.txt", "--lissten", "Did you mean --listen?"),
    ],
)
def test_a_malformed_file_is_named_with_its_place(name, text, words, root):
    path = write(root, name, text)
    with pytest.raises(SettingsError) as refused:
        launch.configure(root, [])
    assert words in str(refused.value) and str(path) in str(refused.value)


def test_folders(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root / "home"))
    monkeypatch.setenv("USERPROFILE", str(root / "home"))
    data = launch.user_data(root, Settings(model_dir="models here", lora_dir="~/loras", settings=""))
    assert (data.root, data.models, data.loras) == (root / "user_data", root / "models here", root / "home" / "loras")
    absolute = root / "x"
    assert launch.user_data(Path("/elsewhere"), Settings(user_data_dir=str(absolute))).root == absolute


# --- the store ----------------------------------------------------------------------------------------------------------------------


def test_conversations_outlive_the_server_but_not_in_multi_user_mode(root):
    data = launch.user_data(root, Settings())
    data.create()
    for multi_user, left in ((False, 1), (True, 0), (False, 1)):
        for _ in range(2):
            store = launch.open_store(data, multi_user)
            found = len(store.conversations("anna").items)
            if not found:
                store.create("anna", "kept")
            store.close()
        assert found == left


@pytest.mark.skipif(sys.platform == "win32", reason="a folder cannot be unlinked anywhere, but the message differs")
def test_a_leftover_that_cannot_be_deleted_is_named(root):
    data = launch.user_data(root, Settings())
    (data.cache / "multi-user.sqlite3").mkdir(parents=True)
    with pytest.raises(DataError, match=r"Cannot delete .*multi-user\.sqlite3"):
        launch.open_store(data, multi_user=True)


# --- the first model ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slot(tmp_path, monkeypatch):
    engine = FakeEngine()
    monkeypatch.setattr(loaders, "LOADERS", (engine.loader,))
    data = UserData(tmp_path)
    data.create()
    slot = ModelSlot(data, {})
    slot.add = lambda *names: [(data.models / name).touch() for name in names]
    yield slot
    slot.close()


def loaded(slot) -> str | None:
    until(lambda: slot.status().state != "loading")
    return slot.status().name


def refuse(_question):
    raise AssertionError("nobody may be asked")


def test_the_only_model_is_loaded_without_a_word(slot):
    slot.add("a.fake")
    launch.load_first_model(slot, Settings(), refuse)
    assert loaded(slot) == "a.fake"


@pytest.mark.parametrize("names", [(), ("a.fake", "b.fake")])
def test_none_or_many_are_not_guessed(names, slot):
    slot.add(*names)
    launch.load_first_model(slot, Settings(), refuse)
    assert slot.status().state == "none"


def test_the_model_named_is_loaded_from_the_folder_or_a_path(slot, tmp_path):
    slot.add("a.fake", "b.fake")
    launch.load_first_model(slot, Settings(model="b.fake"), refuse)
    assert loaded(slot) == "b.fake"
    (tmp_path / "c.fake").touch()
    launch.load_first_model(slot, Settings(model=str(tmp_path / "c.fake")), refuse)
    assert loaded(slot) == "c.fake"


@pytest.mark.parametrize("chosen", [Settings(model="gone.fake"), Settings(model="a.fake", loader="exllama"), Settings(model="../../etc/passwd/x")])
def test_a_wrong_name_does_not_keep_the_page_from_starting(chosen, slot):
    slot.add("a.fake", "b.fake")
    launch.load_first_model(slot, chosen, refuse)
    assert slot.status().state == "none"


def test_the_menu_asks_until_it_understands(slot, capsys):
    slot.add("a.fake", "b.fake", "c.fake")
    answers = iter(["x", "0", "4", "²", "-1", " 2 "])
    launch.load_first_model(slot, Settings(model_menu=True), lambda _: next(answers))
    assert loaded(slot) == "b.fake"
    shown = capsys.readouterr().out
    assert "   1 a.fake\n   2 b.fake\n   3 c.fake\n" in shown and shown.count("Type a number from 1 to 3.") == 5


def no_terminal(_question):
    raise EOFError


@pytest.mark.parametrize("ask", [lambda _: "", no_terminal])
def test_the_menu_may_be_left(ask, slot):
    slot.add("a.fake", "b.fake")
    launch.load_first_model(slot, Settings(model_menu=True), ask)
    assert slot.status().state == "none"


def test_a_menu_of_nothing_says_so(slot):
    with pytest.raises(NotFound, match=r"Put a \.gguf file"):
        launch.load_first_model(slot, Settings(model_menu=True), refuse)


def test_a_model_named_wins_over_the_menu(slot):
    slot.add("a.fake", "b.fake")
    launch.load_first_model(slot, Settings(model_menu=True, model="b.fake"), refuse)
    assert loaded(slot) == "b.fake"


def test_adapters_by_name_path_and_scale(tmp_path, caplog):
    data = UserData(tmp_path)
    data.create()
    (data.loras / "style.gguf").touch()
    (tmp_path / "own.gguf").touch()
    found = launch.named_adapters(data, ["style.gguf", "style.gguf:0.5", f"{tmp_path}/own.gguf:-1", "none.gguf", "../own.gguf"])
    assert found == (Adapter(data.loras / "style.gguf"), Adapter(data.loras / "style.gguf", 0.5), Adapter(tmp_path / "own.gguf", -1.0))
