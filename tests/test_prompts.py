"""The prompt library: places in a text, what fills them, files."""

import re
import time
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.errors import NameError_, NotFound, SettingsError
from modules.prompts import MAX_VARIABLES, SHIPPED, Prompts, Variable, dated, fill, variables

NOW = datetime(2031, 5, 6, 7, 8)


def test_places_are_found_once_in_order():
    text = "{{ text }} {{tone=clear and friendly}} {{text}} {{language = English }} {{имя}} {{two words}} {{a_b-c}}"
    assert variables(text) == (
        Variable("text"),
        Variable("tone", "clear and friendly"),
        Variable("language", "English"),
        Variable("имя"),
        Variable("two words"),
        Variable("a_b-c"),
    )


def test_a_default_may_stand_at_any_place_of_a_name_and_be_empty():
    assert variables("{{a}} {{a=1}} {{a=2}} {{b=}}") == (Variable("a", "1"), Variable("b", ""))


OTHER = ["", "{name}", "{{}}", "{{ }}", "{{=x}}", "{{a", "{{a}", "{{{{", "{{a\nb}}", "{{a.b}}", "{{_a}}", "{% if x %}", "{{" + "a" * 61 + "}}"]


@pytest.mark.parametrize("text", OTHER)
def test_other_braces_are_text(text):
    assert variables(text) == ()
    assert fill(text, {"a": "1", "name": "2"}) == text


def test_filling():
    text = "{{a}}-{{ a }}-{{b=two}}-{{c}}"
    assert fill(text, {}) == "{{a}}-{{ a }}-two-{{c}}"
    assert fill(text, {"a": "1", "b": "", "unknown": "x"}) == "1-1--{{c}}"
    assert fill("{{a}}", {"a": "{{b=2}}{{date}}"}, NOW) == "{{b=2}}{{date}}"  # what is filled in is text


def test_date_and_time_fill_themselves():
    text = "{{date}} {{ time }} {{a}} {{date=never}}"
    assert variables(text) == (Variable("a"),)
    assert dated(text, NOW) == "2031-05-06 07:08 {{a}} 2031-05-06"
    assert fill(text, {"a": "x", "date": "mine"}, NOW) == "2031-05-06 07:08 x 2031-05-06"


def test_only_so_many_names_are_asked_for():
    text = "".join(f"{{{{n{i}}}}}" for i in range(MAX_VARIABLES + 5))
    assert len(variables(text)) == MAX_VARIABLES
    assert fill(text, {f"n{i}": "x" for i in range(100)}) == "x" * MAX_VARIABLES + "".join(f"{{{{n{i}}}}}" for i in range(50, 55))


@pytest.mark.parametrize("text", ["{{a" * 60_000, "{{" + " " * 190_000, "{{a=" + "x" * 190_000, "{{a=" * 50_000, "{" * 200_000, "{{a " * 50_000])
def test_hostile_texts_take_no_time(text):
    began = time.process_time()
    assert variables(text) == () and fill(text, {"a": "1"}) == text
    assert time.process_time() - began < 2


@given(st.text(st.sampled_from("{}ab= \n"), max_size=60), st.text(max_size=10))
def test_filling_touches_nothing_but_the_places(text, value):
    asked = variables(text)
    filled = fill(text, {each.name: value for each in asked})
    places = r"\{\{[ \t]{0,8}[ab][ab ]*(=[^{}]*)?\}\}"
    assert filled == re.sub(places, lambda _: value, text)


@pytest.fixture
def prompts(tmp_path):
    return Prompts(tmp_path / "prompts")


def test_shipped_prompts_need_no_file_and_ask_for_something(prompts):
    assert prompts.names() == ["Explain code", "Rewrite", "Summarise", "Translate"]
    for name, text in SHIPPED.items():
        assert prompts.get(name) == text and variables(text)
    assert Variable("language", "English") in variables(prompts.get("Translate"))


def test_text_and_markdown_files(prompts):
    prompts.folder.mkdir()
    (prompts.folder / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (prompts.folder / "b.md").write_text("# {{x}}", "utf-8")
    (prompts.folder / "c.pdf").write_text("no", "utf-8")
    assert prompts.names()[:2] == ["a", "b"] and prompts.own() == {"a", "b"}
    assert prompts.get("a") == "one\ntwo"
    assert prompts.get("b") == "# {{x}}"


def test_save_get_delete(prompts):
    prompts.save("Mine", "Say {{what}}")
    assert prompts.get("Mine") == "Say {{what}}"
    prompts.save("Rewrite", "Anew")
    assert prompts.get("Rewrite") == "Anew"
    prompts.delete("Rewrite")
    assert prompts.get("Rewrite") == SHIPPED["Rewrite"]
    prompts.delete("Mine")
    with pytest.raises(NotFound):
        prompts.get("Mine")


def test_wrong_files_and_names(prompts):
    prompts.folder.mkdir()
    (prompts.folder / "bad.txt").write_bytes(b"a\x00b")
    (prompts.folder / "huge.txt").write_bytes(b"x" * 300_000)
    with pytest.raises(SettingsError, match=r"bad\.txt: the text contains the control character U\+0000"):
        prompts.get("bad")
    with pytest.raises(SettingsError, match=r"huge\.txt is larger"):
        prompts.get("huge")
    with pytest.raises(NameError_):
        prompts.get("../secret")
    with pytest.raises(SettingsError):
        prompts.save("Mine", "a\0b")
    assert "Mine" not in prompts.names()
