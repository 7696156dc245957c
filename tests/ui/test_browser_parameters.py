"""The Parameters tab in a real browser: presets, grammars and instruction templates of the user's folder, and the knobs."""

import re

import pytest
import yaml

from modules.samplers import NEUTRAL
from modules.templates import FALLBACK
from tests.fakes import until
from tests.ui.acting import SLOW_FRAMES, ask, filled, parameters, two_frames

pytestmark = pytest.mark.browser

expect = pytest.importorskip("playwright.sync_api").expect

LISTING = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
SLOW = """
const [ask, held] = [window.fetch, new Promise((resolve) => { window.release = resolve; })];
window.fetch = async (url, options) => {
  if (`${url}`.endsWith('chat/session') && (options?.method ?? 'GET') === 'GET') await held;
  return ask(url, options);
};
"""
"""What is in effect is answered when `release()` is called."""


@pytest.fixture
def tab(live_server, new_tab):
    """A tab that shows Parameters, its menus read."""
    page = new_tab()
    filled(page)
    open_parameters(page)
    return page


def open_parameters(page):
    with page.expect_response("**/chat/library"):
        parameters(page)


def group(tab, title):
    """An accordion, opened."""
    heading = tab.locator(".tgw-group > button.label-wrap", has_text=title)
    if heading.evaluate("(e) => !e.classList.contains('open')"):
        heading.click()
    opened = tab.locator(".tgw-group", has=tab.locator("button.label-wrap", has_text=title))
    filled(tab)
    return opened


def menu(tab, name):
    return tab.get_by_role("combobox", name=name, exact=True)


def choose(tab, name, item):
    menu(tab, name).click()
    tab.get_by_role("option", name=item, exact=True).click()


def write(tab, name, text):
    """Write a new name into a menu."""
    menu(tab, name).fill(text)
    menu(tab, name).press("Enter")
    expect(menu(tab, name)).to_have_value(text)


def button(tab, title, name):
    return group(tab, title).get_by_role("button", name=name, exact=True)


def knob(tab, name):
    return tab.locator(f".knob-{name} input[type=number]")


def in_effect(tab):
    return tab.evaluate("window.tgw.call('GET', 'chat/session').then((found) => found.values)")


def put(live_server, place, text):
    path = live_server.app.data.root / place
    path.write_text(text, "utf-8")
    return path


def test_a_preset_sets_every_sampler_and_the_knobs_show_it(live_server, tab):
    knob(tab, "min_p").fill("0.3")
    knob(tab, "min_p").press("Tab")
    until(lambda: in_effect(tab)["min_p"] == 0.3)
    choose(tab, "Preset", "Qwen3 - Thinking")
    expect(knob(tab, "top_k")).to_have_value("20")
    expect(knob(tab, "temperature")).to_have_value("0.6")
    expect(knob(tab, "min_p")).to_have_value("0")  # not named by it: neutral
    found = in_effect(tab)
    assert (found["preset"], found["top_k"], found["temperature"], found["min_p"]) == ("Qwen3 - Thinking", 20, 0.6, 0)
    tab.reload()
    tab.locator(".tgw-composer textarea").wait_for()
    open_parameters(tab)
    expect(menu(tab, "Preset")).to_have_value("Qwen3 - Thinking")


def test_the_next_message_is_made_with_it(live_server, tab):
    choose(tab, "Preset", "Deterministic")
    until(lambda: in_effect(tab)["preset"] == "Deterministic")
    tab.get_by_role("tab", name="Chat").click()
    tab.locator(".tgw-composer textarea").fill("Hello")
    tab.keyboard.press("Enter")
    until(lambda: live_server.asked == 1)
    assert live_server.backend.requests[0].sampling.differences() == {**NEUTRAL.differences(), "do_sample": False, "top_k": 1}


def test_a_slider_reaches_a_value_beyond_its_range_and_comes_back(live_server, tab):
    put(live_server, "presets/Hot.yaml", "temperature: 9.5\n")
    for name, most in (("Hot", "9.5"), ("Creative", "5")):
        tab.evaluate("(name) => window.tgw.preset(name)", name)
        expect(knob(tab, "temperature")).to_have_attribute("max", most)
    expect(knob(tab, "temperature")).to_have_value("1")


def test_what_somebody_is_typing_is_not_painted_over_but_another_chat_shows_its_own(live_server, tab):
    tab.get_by_role("tab", name="Chat").click()
    ask(tab, "Hi")
    chat = tab.evaluate("location.hash")
    tab.evaluate("location.hash = ''")
    expect(tab.locator(".tgw-msg")).to_have_count(0)
    open_parameters(tab)
    group(tab, "Tokens and constraints")
    grammar = tab.locator(".knob-grammar_string textarea")
    grammar.fill("root ::=")
    tab.evaluate("window.tgw.preset('Creative')")
    expect(knob(tab, "min_p")).to_have_value("0.02")
    expect(grammar).to_have_value("root ::=")
    tab.evaluate("(chat) => { location.hash = chat; }", chat)
    expect(knob(tab, "min_p")).to_have_value("0")
    expect(grammar).to_have_value("")


def test_nothing_can_be_changed_before_the_server_has_answered(live_server, tab):
    choose(tab, "Preset", "Creative")
    expect(knob(tab, "min_p")).to_have_value("0.02")
    tab.wait_for_function("localStorage.getItem('tgw.language')")  # else the page asks for it first
    tab.add_init_script(SLOW)
    tab.reload()
    tab.get_by_role("tab", name="Parameters").click()
    knob(tab, "min_p").wait_for(state="attached")
    expect(knob(tab, "min_p")).to_be_hidden()
    tab.evaluate("release()")
    knob(tab, "min_p").fill("0.3")
    expect(knob(tab, "temperature")).to_be_visible()
    expect(knob(tab, "min_p")).to_have_value("0.3")
    until(lambda: in_effect(tab)["min_p"] == 0.3)


def test_what_is_typed_at_first_sight_stands(live_server, new_tab):
    page = new_tab(script=SLOW_FRAMES)
    page.get_by_role("tab", name="Parameters").click()
    knob(page, "min_p").fill("0.3")
    page.locator(".tgw-group > button.label-wrap", has_text="Tokens and constraints").click()
    page.locator(".knob-grammar_string textarea").fill("root ::= [a-z]")
    two_frames(page)
    expect(knob(page, "min_p")).to_have_value("0.3")
    expect(page.locator(".knob-grammar_string textarea")).to_have_value("root ::= [a-z]")
    until(lambda: in_effect(page)["min_p"] == 0.3)


def test_values_that_could_not_be_read_come_with_the_next_connection(tab):
    sockets = []
    tab.wait_for_function("localStorage.getItem('tgw.language')")
    tab.route_web_socket(re.compile("/chat/events"), lambda socket: sockets.append((socket, socket.connect_to_server())))
    tab.route("**/chat/session", lambda route: route.abort(), times=1)
    tab.reload()
    tab.get_by_role("tab", name="Parameters").click()
    knob(tab, "min_p").wait_for(state="attached")
    expect(tab.locator(".tgw-toast")).to_contain_text("cannot be reached")
    expect(knob(tab, "min_p")).to_be_hidden()
    tab.wait_for_function("document.querySelector('.tgw-chip').dataset.state === 'ready'")  # told by the first of them
    for end in sockets[-1]:
        end.close()
    expect(knob(tab, "min_p")).to_be_visible()


def test_saving_the_present_values_under_a_name(live_server, tab):
    knob(tab, "top_k").fill("33")
    knob(tab, "top_k").press("Tab")
    write(tab, "Preset", "My mix")
    button(tab, "Preset", "Save").click()
    path = live_server.app.data.presets / "My mix.yaml"
    until(path.is_file)
    assert yaml.safe_load(path.read_text("utf-8")) == {"top_p": 0.95, "top_k": 33}
    until(lambda: in_effect(tab)["preset"] == "My mix")
    choose(tab, "Preset", "Top-P")
    expect(knob(tab, "top_k")).to_have_value("0")
    choose(tab, "Preset", "My mix")  # it is in the menu now
    expect(knob(tab, "top_k")).to_have_value("33")


def test_deleting_asks_first(live_server, tab):
    path = put(live_server, "presets/Old.yaml", "top_k: 5\n")
    tab.get_by_role("tab", name="Chat").click()
    open_parameters(tab)  # reads the folder again
    choose(tab, "Preset", "Old")
    until(lambda: in_effect(tab)["preset"] == "Old")
    button(tab, "Preset", "Delete").click()
    button(tab, "Preset", "Keep it").click()
    assert path.is_file()
    button(tab, "Preset", "Delete").click()
    button(tab, "Preset", "Delete for good").click()
    expect(menu(tab, "Preset")).to_have_value("")
    assert not path.exists()
    until(lambda: in_effect(tab)["preset"] == "")
    expect(button(tab, "Preset", "Delete")).to_be_visible()
    expect(button(tab, "Preset", "Delete for good")).to_be_hidden()


def test_what_is_deleted_is_what_was_asked_about(live_server, tab):
    paths = [put(live_server, f"presets/{name}.yaml", "top_p: 0.5\n") for name in ("Mine", "Other")]
    tab.get_by_role("tab", name="Chat").click()
    open_parameters(tab)
    choose(tab, "Preset", "Mine")
    button(tab, "Preset", "Delete").click()
    expect(button(tab, "Preset", "Delete for good")).to_be_visible()
    choose(tab, "Preset", "Other")
    expect(button(tab, "Preset", "Delete for good")).to_be_hidden()
    expect(button(tab, "Preset", "Delete")).to_be_visible()
    assert all(path.exists() for path in paths)


def test_ones_own_presets_are_in_the_menu_when_one_of_them_is_in_use(live_server, tab):
    for name in ("Mine", "Other"):
        put(live_server, f"presets/{name}.yaml", "top_p: 0.5\n")
    tab.get_by_role("tab", name="Chat").click()
    open_parameters(tab)
    choose(tab, "Preset", "Mine")
    until(lambda: in_effect(tab)["preset"] == "Mine")
    tab.reload()
    open_parameters(tab)
    expect(menu(tab, "Preset")).to_have_value("Mine")
    choose(tab, "Preset", "Other")
    until(lambda: in_effect(tab)["preset"] == "Other")


def test_what_the_server_refuses_is_told(live_server, tab):
    write(tab, "Preset", "../secret")
    button(tab, "Preset", "Save").click()
    expect(tab.locator(".tgw-toast")).to_contain_text("preset name")
    assert not (live_server.app.data.root / "secret.yaml").exists()
    write(tab, "Preset", "Top-P")
    button(tab, "Preset", "Delete").click()
    button(tab, "Preset", "Delete for good").click()
    expect(tab.locator(".tgw-toast").last).to_contain_text("comes with the program")
    put(live_server, "presets/Bad.yaml", "top_p: 7\n")
    tab.get_by_role("tab", name="Chat").click()
    open_parameters(tab)
    before = in_effect(tab)
    choose(tab, "Preset", "Bad")
    expect(tab.locator(".tgw-toast").last).to_contain_text("Bad.yaml: top_p cannot be 7")
    assert in_effect(tab) == before


def test_a_grammar_file_fills_the_grammar(live_server, tab):
    put(live_server, "grammars/digits.gbnf", "root ::= [0-9]+\n# <b>\n")
    tab.get_by_role("tab", name="Chat").click()
    open_parameters(tab)
    group(tab, "Tokens and constraints")
    choose(tab, "Grammar file", "digits")
    expect(tab.locator(".knob-grammar_string textarea")).to_have_value("root ::= [0-9]+\n# <b>\n")
    until(lambda: in_effect(tab)["grammar_string"] == "root ::= [0-9]+\n# <b>\n")


def test_a_template_is_chosen_shown_with_an_example_edited_and_saved(live_server, tab):
    group(tab, "Instruction template")
    text, example = tab.locator(".tgw-template-text textarea"), tab.locator(".tgw-template-example textarea")
    until(lambda: text.input_value() == FALLBACK.source)  # of a model that has none
    choose(tab, "Template", "Alpaca")
    until(lambda: "### Instruction:" in text.input_value())
    until(lambda: "What has six sides?" in example.input_value())
    until(lambda: in_effect(tab)["instruction_template"] == "Alpaca")
    text.fill(LISTING)
    text.press("Tab")
    until(lambda: example.input_value().startswith("[system] Answer in one sentence."))
    write(tab, "Template", "Listing")
    button(tab, "Instruction template", "Save").click()
    until(lambda: in_effect(tab)["instruction_template"] == "Listing")
    assert live_server.app.templates.get("Listing") == LISTING
    tab.get_by_role("tab", name="Chat").click()
    tab.locator(".tgw-composer textarea").fill("Hello")
    tab.keyboard.press("Enter")
    until(lambda: live_server.asked == 1)
    assert "".join(map(chr, live_server.backend.requests[0].prompt)).startswith("[user] Hello")


def test_a_wrong_template_is_told_beside_it_and_edits_outlive_a_change_of_tabs(live_server, tab):
    group(tab, "Instruction template")
    text, example = tab.locator(".tgw-template-text textarea"), tab.locator(".tgw-template-example textarea")
    choose(tab, "Template", "Alpaca")
    until(lambda: "### Instruction:" in text.input_value())
    text.fill("{{ raise_exception('only one message') }}")
    text.press("Tab")
    until(lambda: "only one message" in example.input_value())
    tab.get_by_role("tab", name="Chat").click()
    open_parameters(tab)
    assert "raise_exception" in text.input_value()
    button(tab, "Instruction template", "Save").click()
    expect(tab.locator(".tgw-toast").last).to_contain_text("Alpaca.jinja")
    assert live_server.app.templates.own() == set()
    choose(tab, "Template", "The model’s own")
    until(lambda: in_effect(tab)["instruction_template"] == "" and "raise_exception" not in text.input_value())


@pytest.mark.parametrize("live_server", [("--multi-user",)], indirect=True)
def test_in_multi_user_mode_there_is_nothing_to_save_or_delete(live_server, tab):
    choose(tab, "Preset", "Creative")
    until(lambda: in_effect(tab)["preset"] == "Creative")
    group(tab, "Instruction template")
    choose(tab, "Template", "ChatML")
    until(lambda: "What has six sides?" in tab.locator(".tgw-template-example textarea").input_value())
    assert tab.locator(".tgw-template-text textarea").is_disabled()
    for name in ("Save", "Delete"):
        expect(tab.get_by_role("button", name=name, exact=True)).to_have_count(0)


def test_it_fits_a_telephone_and_is_reached_by_keyboard(live_server, new_browser):
    page = new_browser(viewport={"width": 390, "height": 844}, has_touch=True).new_page()
    page.goto(live_server.url)
    page.locator(".tgw-composer textarea").wait_for()
    open_parameters(page)
    group(page, "Instruction template")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for name in ("Save", "Delete"):
        for each in page.get_by_role("button", name=name, exact=True).all():
            assert each.bounding_box()["height"] >= 40
    menu(page, "Preset").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    until(lambda: in_effect(page)["preset"] != "")
