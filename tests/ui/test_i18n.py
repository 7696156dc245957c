"""Two languages: every text of the script and of Gradio's controls has its Russian, and a page is written in the language of who asks."""

import copy
import json
import re

import gradio as gr
import pytest
from gradio.routes import toorjson

from modules.errors import UserError
from modules.loaders import LOADERS
from modules.samplers import SamplingParams
from modules.settings import ChatOptions, PageOptions
from modules.ui import ASSETS
from modules.ui.controls import groups, label
from modules.ui.i18n import Speaking, Words, language_of, russian, speaking, translate
from modules.ui.page import build_page
from tests.fakes import run
from tests.ui.test_page import building

MARKS = re.compile(r"\{(\w+)\}")
CYRILLIC = re.compile("[а-яё]", re.IGNORECASE)
SAME = {"TFS", "NUMA", "Flash attention", "{loader}: {group}", "fp16", "q8_0", "q4_0", "Top p", "Top k", "Min p", "Typical p", "Top a", "Top n sigma"}
SAME |= {"Mirostat mode", "float16", "bfloat16", "float32", "sdpa", "flash_attention_2", "flex_attention", "nf4", "fp4"}
"""Names that are written with Latin letters in Russian too."""


# --- the script's texts -------------------------------------------------------------------------------------------------------------


def literals():
    """Every English text that stands in a t('…') of the script."""
    found = set()
    for path in sorted(ASSETS.glob("*.js")):
        for quote, text in re.findall(r"\bt\((['\"`])((?:\\.|(?!\1).)*)\1", path.read_text("utf-8")):
            assert quote != "`", f"{path.name}: t(`{text}`) cannot be translated: its text is not known before it runs"
            found.add(text.replace(f"\\{quote}", quote))
    return found


def words(name):
    return json.loads((ASSETS / "texts" / f"{name}.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def told():
    """What the program itself says through t(note): notes of a reply, which the server tells in English."""
    return {"Summarising the oldest messages…"}


def test_every_text_of_the_script_has_its_russian_and_there_are_no_others(told):
    assert literals() | told == set(words("ru"))


def test_nothing_of_the_script_is_left_in_english():
    left = [text for text, said in words("ru").items() if not CYRILLIC.search(said) and re.search("[A-Za-z]{4}", text)]
    assert set(left) <= {"Ctrl+K"}


@pytest.mark.parametrize("name", ["ru", "ru_controls"])
def test_a_translation_has_the_same_places_for_values(name):
    for text, said in words(name).items():
        assert sorted(set(MARKS.findall(text))) == sorted(set(MARKS.findall(said))), text
        assert said == said.strip() and said


# --- the controls' texts -------------------------------------------------------------------------------------------------------------


def texts_of(page):
    """Every text that the controls of a built page show, in English."""
    found = set()
    for block in page.blocks.values():
        names = ("label", "info", "placeholder", *(["value"] if isinstance(block, gr.Button | gr.HTML) else []))
        said = [getattr(block, name, None) for name in names]
        if isinstance(block, gr.Radio | gr.Dropdown):
            said += [text for text, value in block.choices if isinstance(block, gr.Radio) or str(text) != value]
        for text in said:
            if isinstance(text, Words):
                found |= {text.english, *(str(value) for value in text.values.values() if isinstance(value, Words))}
            elif text:
                found.add(text)
    return found


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The texts of the page, alone and with many users."""
    with building(tmp_path_factory.mktemp("i18n")) as make:
        return texts_of(build_page(make())) | texts_of(build_page(make("--multi-user")))


def test_every_text_of_a_control_has_its_russian_and_there_are_no_others(shown):
    assert {text for text in shown if not text.startswith("<div")} - {"Jinja2", "llama.cpp", "Echo", "Transformers"} == set(russian())


@pytest.mark.parametrize("options", [SamplingParams, ChatOptions, PageOptions, *(loader.options for loader in LOADERS)])
def test_every_knob_has_a_russian_name_and_help(options):
    menus = {"preset", "instruction_template", "character"}  # they have texts of their own
    for knob in (knob for knobs in groups(options).values() for knob in knobs if knob.name not in menus):
        assert {label(knob), knob.help} <= russian().keys(), knob.name


def test_what_is_left_in_latin_letters_is_a_name():
    assert {text for text, said in russian().items() if not CYRILLIC.search(said)} == SAME


def test_a_text_says_itself_in_the_language_of_who_asks():
    put = Words("Put .gguf files, or folders of models, into {folder} and press Refresh.", {"folder": "/x"})
    with speaking(lambda: "ru"):
        assert (str(Words("Temperature")), str(put)) == ("Температура", "Положите файлы .gguf или папки моделей в /x и нажмите «Обновить».")
        assert str(Words("not translated {x}")) == "not translated {x}"
    assert (str(Words("Temperature")), str(put)) == ("Temperature", "Put .gguf files, or folders of models, into /x and press Refresh.")


def test_gradio_writes_it_as_a_string_into_the_page():
    config = copy.deepcopy({"label": Words("Temperature"), "choices": [(Words("drop"), "drop")]})  # as Gradio does
    with speaking(lambda: "ru"):
        assert json.loads(str(toorjson(config)).replace("\\u0027", "'")) == {"label": "Температура", "choices": [["отбросить", "drop"]]}


def test_names_of_files_are_not_translated():
    with gr.Blocks() as page:
        files = gr.Dropdown(["Model", "x"], label="Character")
        fixed = gr.Dropdown([("Automatic", "")], label="unknown")
        few = gr.Radio(["drop", "stop"], label="Context full")
    translate(page)
    with speaking(lambda: "ru"):
        assert [str(text) for text, _ in files.choices] == ["Model", "x"]
        assert [str(text) for text, _ in fixed.choices] == ["Автоматически"]
        assert [str(text) for text, _ in few.choices] == ["отбросить", "остановиться"]
        assert (str(files.label), str(fixed.label)) == ("Персонаж", "unknown")
    assert [value for _, value in few.choices] == ["drop", "stop"]


@pytest.mark.parametrize(
    ("chosen", "accepted", "language"),
    [
        ("ru", "en-US,en;q=0.9", "ru"),
        ("en", "ru-RU", "en"),
        ("auto", "ru-RU,ru;q=0.9,en;q=0.8", "ru"),
        ("auto", "en-GB", "en"),
        ("auto", "de-DE,ru;q=0.9", "en"),
        ("auto", "", "en"),
        ("", "*", "en"),
        ("../x", "RU", "ru"),
    ],
)
def test_the_choice_comes_first_then_the_browsers_first_language(chosen, accepted, language):
    assert language_of(chosen, accepted) == language


def asked(values, headers=()):
    """What an app behind Speaking says, asked with `headers`."""
    said = []

    async def app(scope, receive, send):
        said.append(str(Words("Temperature")))

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(name.encode(), value.encode()) for name, value in headers]}
    run(Speaking(app, values)(scope, None, None))
    return said[0]


def test_the_server_speaks_the_language_of_each_request():
    def unknown(request):
        raise UserError("Log in first.")

    def broken(request):
        raise AssertionError("asked for a page without texts")

    assert asked(lambda request: {"language": "ru"}) == "Температура"
    assert asked(lambda request: {"language": "auto"}, [("accept-language", "ru")]) == "Температура"
    assert asked(unknown, [("accept-language", "ru")]) == "Температура"
    assert asked(unknown) == "Temperature"

    async def quiet(scope, receive, send):
        pass

    run(Speaking(quiet, broken)({"type": "http", "headers": []}, None, None))  # asked only when something is said
