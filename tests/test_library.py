"""Shelves of small files: names, bounds, hostile contents, a disk that refuses."""

import os
import time

import pytest

from modules.errors import DataError, NameError_, NotFound, SettingsError
from modules.library import Shelf, plain, yaml_mapping, yaml_text
from modules.paths import UserData


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path / "things", "thing", (".yaml", ".txt"), {"Ready"}, max_bytes=1000)


def put(shelf, file, content="text"):
    shelf.folder.mkdir(exist_ok=True)
    (shelf.folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def test_without_a_folder_there_is_what_is_shipped(shelf):
    assert shelf.names() == ["Ready"]
    assert shelf.text("Ready") is None
    with pytest.raises(NotFound, match=r"no thing 'Other'.*Choose one from the list"):
        shelf.text("Other")


def test_files_are_listed_sorted_and_win(shelf):
    for file in ("b.txt", "A.yaml", "Ready.txt", "c.d.yaml", "notes.md", ".hidden.txt", "Зебра.txt"):
        put(shelf, file, file)
    (shelf.folder / "folder.txt").mkdir()
    assert shelf.names() == ["A", "b", "c.d", "Ready", "Зебра"]
    assert shelf.own() == {"A", "b", "c.d", "Ready", "Зебра"}
    assert shelf.text("Ready") == ("Ready.txt", "Ready.txt")


def test_of_several_files_of_a_name_the_first_ending_wins_and_deleting_leaves_none(shelf):
    put(shelf, "A.txt", "old")
    assert shelf.write("A", "new") == shelf.folder / "A.yaml"
    assert shelf.text("A") == ("A.yaml", "new")
    shelf.delete("A")
    assert list(shelf.folder.iterdir()) == []


def test_deleting_brings_what_is_shipped_back(shelf):
    shelf.write("Ready", "mine")
    shelf.delete("Ready")
    assert shelf.text("Ready") is None
    with pytest.raises(NotFound, match="comes with the program"):
        shelf.delete("Ready")
    with pytest.raises(NotFound, match="does not exist"):
        shelf.delete("Other")


HOSTILE = [
    "",
    " ",
    "..",
    "../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    ".hidden",
    "CON",
    "a\0b",
    "a:b",
    "x" * 300,
    "．．／x",
    "end.",
    "a\nb",
    "\ud800",
    "C:x",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names(shelf, name):
    put(shelf, "Fine.txt")
    before = sorted(shelf.folder.parent.rglob("*"))
    for act in (shelf.text, shelf.delete, lambda it: shelf.write(it, "x")):
        with pytest.raises(NameError_, match="thing name"):
            act(name)
    assert sorted(shelf.folder.parent.rglob("*")) == before


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need a right on Windows")
def test_a_link_does_not_lead_out_of_the_folder(shelf, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    shelf.folder.mkdir()
    (shelf.folder / "Link.txt").symlink_to(tmp_path / "secret.txt")
    for act in (shelf.text, shelf.delete):
        with pytest.raises(NameError_, match="leads out of"):
            act("Link")
    assert (tmp_path / "secret.txt").read_text() == "secret"


def test_a_wrong_file_is_listed_and_fails_when_it_is_read(shelf):
    put(shelf, "Huge.txt", "x" * 1001)
    put(shelf, "Bytes.txt", b"\xff\xfe\x00")
    assert {"Huge", "Bytes"} <= set(shelf.names())
    with pytest.raises(SettingsError, match=r"Huge\.txt is larger than 1,000 bytes, which no thing is"):
        shelf.text("Huge")
    with pytest.raises(SettingsError, match=r"Bytes\.txt is not UTF-8"):
        shelf.text("Bytes")


def test_what_is_too_large_is_not_written(shelf):
    shelf.write("A", "old")
    with pytest.raises(SettingsError, match="larger than"):
        shelf.write("A", "é" * 501)
    with pytest.raises(SettingsError, match=r"U\+0000"):
        shelf.write("A", "a\0b")
    assert shelf.text("A") == ("A.yaml", "old")


def test_a_byte_order_mark_is_no_part_of_the_text(shelf):
    put(shelf, "Bom.txt", b"\xef\xbb\xbftext")
    assert shelf.text("Bom") == ("Bom.txt", "text")


def test_a_folder_that_is_a_file_is_a_named_error(shelf):
    shelf.folder.write_text("x")
    with pytest.raises(DataError, match="Make the folder readable"):
        shelf.names()
    with pytest.raises(DataError, match="Cannot write"):
        shelf.write("A", "x")


def test_a_folder_in_a_files_place_is_a_named_error(shelf):
    (shelf.folder / "A.yaml").mkdir(parents=True)
    with pytest.raises(DataError, match="is a folder"):
        shelf.write("A", "x")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_no_file(shelf):
    shelf.folder.mkdir()
    os.mkfifo(shelf.folder / "Pipe.txt")
    assert "Pipe" not in shelf.names()
    with pytest.raises(NotFound):
        shelf.text("Pipe")


def test_the_libraries_of_user_data_have_folders(tmp_path):
    data = UserData(tmp_path)
    data.create()
    shelf = Shelf(data.grammars, "grammar", (".gbnf",))
    shelf.write("json", 'root ::= "x"')
    assert (tmp_path / "grammars" / "json.gbnf").read_text() == 'root ::= "x"'


def test_plain_text_has_one_kind_of_line_end_and_no_control_characters():
    assert plain("a\r\nb\rc\n\td é😀", "x", "f") == "a\nb\nc\n\td é😀"
    for wrong in ("\0", "\x1b[2J", "\x7f", "\x9b", "\ud83d", "\ufeff"):
        with pytest.raises(SettingsError, match=r"f\.yaml: context contains the control character U\+"):
            plain(f"a{wrong}b", "context", "f.yaml")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
WRONG = {
    "aliases that grow": (BOMB, "without & and"),
    "very deep": ("[" * 5000, "more than such a file needs|nested|Correct"),
    "very wide": ("a: [" + "1," * 5000 + "1]", "more than such a file needs"),
    "a list": ("- a\n- b\n", "expected lines"),
    "a text": ("only words", "expected lines"),
    "no YAML": ("a: 'open", "line 1"),
    "a tab": ("a:\n\tb: c", "line 2"),
    "objects": ("a: !!python/object/apply:os.system [ls]", "Correct that line"),
    "control characters": ("a: \x00b", "not allowed"),
    "two texts": ("a: b\n---\nc: d", "Correct that line"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("typed", [True, False])
def test_wrong_yaml_is_a_named_error_soon(case, typed):
    text, reason = WRONG[case]
    if case == "objects" and not typed:
        assert yaml_mapping(text, "f.yaml") == {"a": ["ls"]}  # without types a tag means nothing
        return
    began = time.process_time()
    with pytest.raises(SettingsError, match=rf"(?s)^f\.yaml.*({reason})"):
        yaml_mapping(text, "f.yaml", typed)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("value", ["!!bool foo", "!!int ''", "!!int '_'", "!!float ''", "!!timestamp foo"])
def test_a_value_that_is_not_of_the_kind_it_says_is_a_named_error(value):
    with pytest.raises(SettingsError, match=r"^f\.yaml: it is not YAML"):
        yaml_mapping(f"a: {value}", "f.yaml", typed=True)


@pytest.mark.parametrize("value", ["1" * 5000, "2024-99-99", ":".join(["59"] * 5000)])
def test_numbers_and_dates_that_cannot_be_are_errors_or_text_soon(value):
    began = time.process_time()
    try:
        yaml_mapping(f"a: {value}", "f.yaml", typed=True)
    except SettingsError as error:
        assert str(error).startswith("f.yaml")
    assert time.process_time() - began < 5


def test_keys_are_text():
    with pytest.raises(SettingsError, match="expected lines"):
        yaml_mapping("1: a", "f.yaml", typed=True)
    assert yaml_mapping("1: a", "f.yaml") == {"1": "a"}


def test_an_empty_file_is_an_empty_mapping():
    assert yaml_mapping("", "f") == yaml_mapping("# nothing\n", "f") == yaml_mapping("", "f", True) == {}


def test_several_lines_are_written_as_lines_and_read_back():
    values = {"name": "Zoë", "context": "one\ntwo: three\n\n  four", "odd": "ends with space \n", "yes": "no", "number": 0.5, "list": ["a"]}
    text = yaml_text(values)
    assert "context: |-\n  one\n  two: three\n" in text and "Zoë" in text
    assert yaml_mapping(text, "f", typed=True) == values
