import errno
import os
import stat
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.errors import DataError, NameError_, NotFound
from modules.paths import MAX_NAME_BYTES, UserData, inside, safe_name, write_atomically

HOSTILE = {
    "empty": "",
    "spaces": "   ",
    "no-break space": "\u00a0",
    "dot": ".",
    "dots": "..",
    "parent": "../secret",
    "deep parent": "a/../../secret",
    "backslash parent": "..\\secret",
    "absolute": "/etc/passwd",
    "drive": "C:\\Windows\\x",
    "drive relative": "C:x",
    "UNC": "\\\\host\\share\\x",
    "UNC with slashes": "//host/share/x",
    "device": "\\\\.\\PhysicalDrive0",
    "NUL byte": "a\0b",
    "newline": "a\nb",
    "escape": "a\033[2Jb",
    "delete": "a\x7fb",
    "4 KB": "a" * 4096,
    "one byte too long": "a" * (MAX_NAME_BYTES + 1),
    "too long in UTF-8": "é" * 101,
    "too long before folding": "\uff41" * 150,
    "reserved": "NUL",
    "reserved with extension": "con.txt",
    "reserved with two extensions": "lpt1.tar.gz",
    "reserved with space": "aux .txt",
    "reserved superscript": "COM\u00b9",
    "console": "CONOUT$",
    "full-width dots": "\uff0e\uff0e",
    "one dot leader": "\u2024\u2024",
    "two dot leader": "\u2025",
    "ellipsis": "\u2026",
    "full-width slash": "a\uff0fb",
    "full-width backslash": "a\uff3cb",
    "full-width colon": "C\uff1ax",
    "small reverse solidus": "a\ufe68b",
    "account of": "\u2100",
    "hidden": ".ssh",
    "trailing dot": "a.",
    "trailing space": "a ",
    "leading space": " a",
    "right-to-left override": "a\u202egpj.exe",
    "right-to-left mark": "a\u200fb",
    "zero width": "a\u200bb",
    "byte order mark": "\ufeffa",
    "lone surrogate": "a\ud800",
    "stream": "a:b",
    "star": "*",
    "question": "a?",
    "quote": 'a"b',
    "pipe": "a|b",
    "angle": "<a>",
}
GOOD = ["a", "SmolLM2-135M-Instruct.Q4_1.gguf", "Моя модель", "模型", "a b", "a.b.c", "~", "$HOME", "%TEMP%", "-rf", "a'b", "nulls", "é" * 100, "😀"]


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_names_are_refused_with_a_message_of_bounded_length(name, tmp_path):
    with pytest.raises(NameError_) as refused:
        safe_name(name, "preset")
    assert "preset" in str(refused.value) and len(str(refused.value)) < 500
    with pytest.raises(NameError_):
        inside(tmp_path, name)


@pytest.mark.parametrize("name", GOOD)
def test_usable_names_pass_unchanged(name, tmp_path):
    assert safe_name(name) == name
    assert inside(tmp_path, name) == tmp_path / name


@given(st.text(max_size=300))
def test_whatever_passes_stays_one_part_inside_the_folder(name):
    try:
        safe_name(name)
    except NameError_:
        return
    folder = Path("/somewhere/models")
    joined = Path(os.path.normpath(folder / name))
    assert joined.parent == folder and len(os.fsencode(name)) <= 255


def test_parts_are_checked_one_by_one(tmp_path):
    assert inside(tmp_path, "folder/model.gguf") == tmp_path / "folder" / "model.gguf"
    for name in ("folder//x", "folder/", "/folder", "a/./b", "a/CON/b"):
        with pytest.raises(NameError_):
            inside(tmp_path, name)


def test_a_path_of_many_parts_is_refused_not_an_operating_system_error(tmp_path):
    with pytest.raises(NameError_, match="parts"):
        inside(tmp_path, "/".join(["a" * 100] * 60))


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need a right on Windows")
def test_links_may_not_lead_out(tmp_path):
    folder, outside = tmp_path / "models", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "secret").write_text("x")
    (folder / "link").symlink_to(outside)
    (folder / "relative").symlink_to("../outside/secret")
    (folder / "within").symlink_to("real")
    for name in ("link", "link/secret", "relative"):
        with pytest.raises(NameError_, match="leads out"):
            inside(folder, name)
    assert inside(folder, "within") == folder / "within"


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need a right on Windows")
def test_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises((NameError_, NotFound)):
        UserData(tmp_path, model_dir=tmp_path).file("model", "loop")


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need a right on Windows")
def test_the_folder_itself_may_be_a_link(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "models").symlink_to(real)
    assert inside(tmp_path / "models", "x") == tmp_path / "models" / "x"


def test_write_atomically_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "new" / "settings.yaml"
    write_atomically(path, "é\n")
    write_atomically(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    assert [p.name for p in path.parent.iterdir()] == ["settings.yaml"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
def test_write_atomically_sets_the_mode(tmp_path):
    write_atomically(tmp_path / "open", "x")
    write_atomically(tmp_path / "closed", "x", mode=0o600)
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "closed").stat().st_mode) == 0o600


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(step, tmp_path, monkeypatch):
    path = tmp_path / "settings.yaml"
    write_atomically(path, "old")

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(DataError, match=r"settings\.yaml: No space left on device\. Free some space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["settings.yaml"]


def test_a_folder_that_cannot_be_made_is_a_data_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError):
        write_atomically(tmp_path / "file" / "x", "y")
    with pytest.raises(DataError, match="--user-data-dir"):
        UserData(tmp_path / "file" / "data").create()


def test_the_folders_of_user_data(tmp_path):
    data = UserData(tmp_path / "ud")
    assert not data.root.exists()
    data.create()
    data.create()
    assert data.models.is_dir() and data.loras.is_dir() and (data.cache / "gradio").is_dir()
    elsewhere = UserData(tmp_path, tmp_path / "m", tmp_path / "l", tmp_path / "s.yaml")
    assert (elsewhere.models, elsewhere.loras, elsewhere.settings) == (tmp_path / "m", tmp_path / "l", tmp_path / "s.yaml")
    names = {getattr(data, n).name for n in ("database", "sessions", "settings", "flags", "lock")}
    assert names == {"conversations.sqlite3", "sessions.json", "settings.yaml", "CMD_FLAGS.txt", ".lock"}


def test_folders_and_files_that_earlier_systems_have_are_where_those_have_them(tmp_path):
    data = UserData(tmp_path / "ud")
    data.create()
    made = {path.name for path in data.root.iterdir()}
    library = {"characters", "users", "presets", "instruction-templates", "grammars", "prompts", "css"}
    assert made == library | {"models", "loras", "mmproj", "cache"}
    found = {data.characters, data.users, data.presets, data.instruction_templates, data.grammars, data.prompts, data.css}
    assert found == {data.root / name for name in library}
    assert (data.logs, data.notification) == (data.root / "logs", data.root / "notification.mp3")  # only read: never made


def test_further_folders_of_models_are_looked_into(tmp_path):
    data = UserData(tmp_path / "data", more_models=(tmp_path / "more",))
    data.create()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.gguf").write_bytes(b"GGUF")
    assert data.file("model", "a.gguf") == tmp_path / "more" / "a.gguf"
    with pytest.raises(NotFound, match=r"no model 'b\.gguf'"):
        data.file("model", "b.gguf")
