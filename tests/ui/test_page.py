"""The page builds without a model, has a control for every declared parameter, and asks no other host for anything."""

import json
import re
import shutil
from contextlib import contextmanager

import gradio as gr
import pytest

from modules import app, launch, settings
from modules.loaders import LOADERS
from modules.paths import UserData
from modules.samplers import NEUTRAL, SamplingParams
from modules.settings import ChatOptions, PageOptions
from modules.ui import ASSETS
from modules.ui.controls import UNPAINTED
from modules.ui.page import TABS, TITLE, appearance, build_page
from modules.ui.views import BlockPresenter


@contextmanager
def building(folder):
    """Makes apps in `folder` from flags."""
    made = []

    def make(*flags):
        data = UserData(folder)
        data.create()
        configuration = settings.load(flags, [], [], app.option_groups())
        made.append(app.build(configuration, data, launch.open_store(data, configuration.settings.multi_user), BlockPresenter))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def make_app(tmp_path):
    with building(tmp_path) as make:
        yield make


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Built once: the tests only look at it."""
    with building(tmp_path_factory.mktemp("page")) as make:
        yield build_page(make())


def of_knob(page, name):
    return [block for block in page.blocks.values() if f"knob-{name}" in (getattr(block, "elem_classes", None) or [])]


def tabs(page):
    return [str(block.label) for block in page.blocks.values() if isinstance(block, gr.Tab)]


def event_of(page, text):
    """The only event whose script contains `text`."""
    (found,) = [event for event in page.fns.values() if text in str(event.js)]
    return found


def test_one_tab_a_row_of_the_table(page):
    assert tabs(page) == [tab.label for tab in TABS]
    assert page.title == TITLE


SHOWN = SamplingParams.knobs() | ChatOptions.knobs() | PageOptions.knobs()
MENUS = {"preset", "instruction_template", "character"}
"""Parameters that are set by menus of files."""


@pytest.mark.parametrize("name", sorted(SHOWN.keys() - MENUS))
def test_every_parameter_has_exactly_one_control(page, name):
    (control,) = of_knob(page, name)
    if SHOWN[name].range:
        assert (control.minimum, control.maximum, control.step) == SHOWN[name].range
    posted = [event.js for event in page.fns.values() if event.inputs == [control]]
    assert posted
    assert all(f'window.tgw.set("{name}", ' in js for js in posted)


def test_every_value_in_effect_is_shown(page):
    event = event_of(page, "tgwPanel.show(")
    spans = json.loads(re.search(r"show\((\{.*\})\)", event.js)[1])
    assert spans.keys() == SHOWN.keys()
    for (name, span), control in zip(spans.items(), event.outputs, strict=True):
        assert f"knob-{name}" in span["classes"] or name in MENUS
        assert control.elem_classes == [*span["classes"], UNPAINTED]  # it is not seen before it shows its value
        if isinstance(control, gr.Slider):
            assert span["range"] == [control.minimum, control.maximum]
        else:
            assert span.keys() == {"classes"}


def test_characters_and_users_are_chosen_saved_and_deleted_as_files(page):
    for kind in ("character", "user"):
        assert event_of(page, f'window.tgwPanel.menu("{kind}s")')
        for what in ("choose", "save", "remove"):
            assert event_of(page, f'window.tgwPanel.{what}("{kind}", name)')


def test_in_multi_user_mode_nothing_is_written_to_the_servers_folders(make_app):
    page = build_page(make_app("--multi-user"))
    assert event_of(page, 'window.tgwPanel.choose("character"')
    assert not [event for event in page.fns.values() if re.search(r"tgwPanel\.(save|remove)|library\.(save|remove)", str(event.js))]


def test_every_loader_option_has_exactly_one_control(page):
    for loader in LOADERS:
        for knob in loader.options.knobs().values():
            events = [e for e in page.fns.values() if f'window.tgw.option("{loader.name}", "{knob.name}", ' in str(e.js)]
            hidden = knob.later or knob.start_only
            assert bool(events) is not hidden
            assert len({control for event in events for control in event.inputs}) == (0 if hidden else 1)


def test_no_control_sends_its_value_through_gradio(page):
    """No function of ours runs on the server: what people do, the page's script does."""
    assert [event for event in page.fns.values() if event.fn is not None] == []


def test_neutralise_switches_samplers_off_and_leaves_the_rest_alone(page):
    buttons = {str(block.value): block for block in page.blocks.values() if isinstance(block, gr.Button)}
    (event,) = [e for e in page.fns.values() if e.targets[0][0] == buttons["Neutralise samplers"]._id]
    values = json.loads(re.search(r"setMany\((\{.*?\})\)", event.js)[1])
    assert values["top_p"] == NEUTRAL.top_p == 1
    assert not {"max_new_tokens", "seed", "grammar_string", "custom_stopping_strings", "custom_system_message", "sampler_priority"} & set(values)
    assert len(event.outputs) == len(values)


def test_restore_brings_back_what_is_configured(make_app):
    page = build_page(make_app("--temperature", "0.3"))
    buttons = {str(block.value): block for block in page.blocks.values() if isinstance(block, gr.Button)}
    (event,) = [e for e in page.fns.values() if e.targets[0][0] == buttons["Restore defaults"]._id]
    values = json.loads(re.search(r"setMany\((\{.*\})\); return", event.js)[1])
    assert values["temperature"] == 0.3
    assert set(values) == {*SamplingParams.model_fields}


def test_in_multi_user_mode_the_model_tab_is_not_built(make_app):
    page = build_page(make_app("--multi-user"))
    assert tabs(page) == ["Chat", "Parameters"]
    assert "tgwModel" not in json.dumps(page.get_config_file(), default=str)


def test_the_chosen_theme_is_in_the_page(make_app):
    page = build_page(make_app("--dark-theme", "on"))
    assert any('data-theme="on"' in str(getattr(block, "value", "")) for block in page.blocks.values())


def test_the_model_tab_says_where_models_go(make_app):
    built = make_app()
    page = build_page(built)
    assert any(str(built.data.models) in str(getattr(block, "info", "")) for block in page.blocks.values())


def test_theme_and_assets_name_no_other_host():
    """Also no Google font, which Gradio's own themes would ask for."""
    look = appearance()
    texts = [look["head"], look["theme"]._get_theme_css(), *(path.read_text("utf-8") for path in ASSETS.rglob("*") if path.suffix in (".js", ".css"))]
    hosts = {host for text in texts for host in re.findall(r"https?://([\w.-]+)", text)}
    assert hosts <= {"www.w3.org"}  # the name of the SVG namespace
    assert look["theme"]._stylesheets == []
    assert look["footer_links"] == []


def test_a_changed_asset_has_another_address(monkeypatch, tmp_path):
    from modules.ui import page as module

    first = appearance()["head"]
    shutil.copytree(ASSETS, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat.js").write_bytes((ASSETS / "chat.js").read_bytes() + b"\n")
    monkeypatch.setattr(module, "ASSETS", tmp_path)
    assert appearance()["head"] != first


def test_the_script_uses_html_only_for_what_the_server_sanitised():
    """Everything else goes in as text. A new innerHTML must be thought about, and added here."""
    script = "".join(path.read_text("utf-8") for path in sorted(ASSETS.glob("*.js")))
    assert re.findall(r".*\b(?:innerHTML|outerHTML|insertAdjacentHTML|document\.write)\b.*", re.sub(r"(?m)^\s*//.*", "", script)) == [
        "  const blocks = [el('div.tgw-plain', { textContent: text }).outerHTML];",  # text, escaped by the browser itself
        "      this.code.element.insertAdjacentHTML('beforeend', html);",
        "      block.innerHTML = html;",
    ]
    assert "new Function" not in script
    for path in ASSETS.glob("*.js"):  # a function of its own may be called like one of the browser's
        text = path.read_text("utf-8")
        called = set(re.findall(r"(?<![.\w])(eval|confirm|alert|prompt)\(", text))
        assert called <= set(re.findall(r"^function (\w+)", text, re.MULTILINE)), path.name
