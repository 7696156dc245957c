"""The panel beside the conversation, what the controls show of it, its styles and languages, in a real browser."""

import http.server
import threading

import pytest

from modules.samplers import SamplingParams
from modules.ui import ASSETS
from tests.fakes import FakeBackend, until
from tests.ui.acting import ask, filled, parameters

pytestmark = pytest.mark.browser

expect = pytest.importorskip("playwright.sync_api").expect
expect.set_options(timeout=20_000)

STYLES = sorted(path.stem for path in (ASSETS / "styles").glob("*.css"))
WIDE = (1440, 900)
OVERFLOW = "document.documentElement.scrollWidth > innerWidth"


@pytest.fixture
def wide(new_tab):
    """Opens tabs with room for the panel."""

    def make(path="/"):
        tab = new_tab(path, WIDE)
        filled(tab)
        return tab

    return make


def opened(tab, live_server, path=""):
    tab.goto(live_server.url + path)
    tab.locator(".tgw-composer textarea").wait_for()
    tab.wait_for_function("document.querySelector('.tgw-chip').dataset.state === 'ready'")
    filled(tab)
    return tab


def panel(tab):
    return tab.locator("#tgw-panel")


def open_again(tab):
    """Close the panel and open it: its menus are read again."""
    with tab.expect_response("**/chat/library"):
        tab.evaluate("window.tgw.panel(); window.tgw.panel()")


def knob(tab, name):
    return tab.locator(f".knob-{name}")


def field(tab, name):
    return knob(tab, name).locator("input, textarea").first


def mode(tab, name):
    knob(tab, "mode").locator(f"input[value={name}]").check()
    until(lambda: in_effect(tab)["mode"] == name)


def chosen_mode(tab):
    return knob(tab, "mode").locator("input:checked")


def in_effect(tab):
    return tab.evaluate("window.tgw.call('GET', `chat/session?conversation=${location.hash.replace('#c=', '')}`).then((found) => found.values)")


def listed(tab, title):
    return tab.locator(".tgw-list a", has_text=title)


def menu(tab, kind):
    return tab.locator(f".tgw-{kind} input")


def choose(tab, kind, name):
    menu(tab, kind).click()
    tab.get_by_role("option", name=name, exact=True).click()


# --- the panel -----------------------------------------------------------------------------------------------------------------------


def test_the_panel_is_shown_where_there_is_room_and_stays_as_it_was_left(wide):
    tab = wide()
    expect(panel(tab)).to_be_visible()
    tab.keyboard.press("Control+s")
    expect(panel(tab)).to_be_hidden()
    tab.reload()
    tab.locator(".tgw-composer textarea").wait_for()
    expect(panel(tab)).to_be_hidden()
    tab.locator(".tgw-head").get_by_role("button", name="Settings of this chat").click()
    expect(panel(tab)).to_be_visible()
    assert panel(tab).get_attribute("aria-label") == "Settings of this chat"
    panel(tab).get_by_role("button", name="Close").click()
    expect(panel(tab)).to_be_hidden()


def test_without_room_it_is_hidden_and_lies_over_the_conversation(live_server, new_browser):
    tab = opened(new_browser(viewport={"width": 1000, "height": 800}).new_page(), live_server)
    expect(panel(tab)).to_be_hidden()
    tab.keyboard.press("Control+s")
    expect(panel(tab)).to_be_visible()
    expect(panel(tab).get_by_role("button", name="Close")).to_be_focused()
    tab.keyboard.press("Escape")
    expect(panel(tab)).to_be_hidden()
    expect(tab.locator(".tgw-composer textarea")).to_be_focused()
    tab.keyboard.press("Control+s")
    tab.locator(".tgw-panel-shade").click(position={"x": 400, "y": 300})
    expect(panel(tab)).to_be_hidden()


def test_on_a_telephone_it_is_a_drawer(live_server, new_browser):
    tab = opened(new_browser(viewport={"width": 390, "height": 844}, has_touch=True).new_page(), live_server)
    expect(panel(tab)).to_be_hidden()
    tab.locator(".tgw-head").get_by_role("button", name="Settings of this chat").tap()
    expect(panel(tab)).to_be_visible()
    assert not tab.evaluate(OVERFLOW)
    tab.locator(".knob-mode").get_by_text("chat-instruct", exact=True).tap()
    expect(tab.locator(".tgw-people")).to_be_visible()
    for each in panel(tab).get_by_role("button").all():
        assert not each.is_visible() or each.bounding_box()["height"] >= 40, each.text_content()
    panel(tab).get_by_role("button", name="Close").tap()
    expect(panel(tab)).to_be_hidden()


def test_start_reply_with_leads_to_its_field(wide):
    tab = wide()
    tab.keyboard.press("Control+s")
    tab.get_by_label("More to do", exact=True).click()
    tab.get_by_role("menuitem", name="Start reply with…").click()
    expect(field(tab, "start_with")).to_be_focused()


# --- what matters ----------------------------------------------------------------------------------------------------------------------


def test_only_what_the_mode_uses_is_shown(wide):
    tab = wide()
    people, system, command = tab.locator(".tgw-people"), knob(tab, "custom_system_message"), knob(tab, "chat_instruct_command")
    expect(system).to_be_visible()
    expect(people).to_be_hidden()
    mode(tab, "chat-instruct")
    expect(people).to_be_visible()
    expect(command).to_be_visible()
    expect(system).to_be_hidden()
    mode(tab, "chat")
    expect(people).to_be_visible()
    expect(command).to_be_hidden()


class Thinking(FakeBackend):
    chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking %}<think>{% endif %}"


def test_thinking_is_offered_where_the_template_knows_it(live_server, wide):
    tab = wide()
    for name in ("enable_thinking", "reasoning_effort", "preserve_thinking"):
        expect(knob(tab, name)).to_be_hidden()
    live_server.engine.make = Thinking
    live_server.app.models.load(live_server.app.models.choose("other.fake"))
    expect(knob(tab, "enable_thinking")).to_be_visible()
    expect(knob(tab, "reasoning_effort")).to_be_hidden()
    mode(tab, "chat")  # there the model's template is not used
    expect(knob(tab, "enable_thinking")).to_be_hidden()


# --- values of the conversation shown ----------------------------------------------------------------------------------------------------


def test_the_controls_show_the_values_of_the_conversation(live_server, wide):
    tab = wide()
    ask(tab, "first")
    field(tab, "custom_system_message").fill("Be short.")
    field(tab, "custom_system_message").blur()
    until(lambda: in_effect(tab)["custom_system_message"] == "Be short.")
    tab.locator(".tgw-new").click()
    ask(tab, "second")
    mode(tab, "chat")
    listed(tab, "first").click()
    expect(chosen_mode(tab)).to_have_value("instruct")
    expect(field(tab, "custom_system_message")).to_have_value("Be short.")
    listed(tab, "second").click()
    expect(chosen_mode(tab)).to_have_value("chat")
    for _ in range(3):  # quicker than the answers come
        listed(tab, "first").click()
        listed(tab, "second").click()
    listed(tab, "first").click()
    expect(field(tab, "custom_system_message")).to_have_value("Be short.")
    expect(chosen_mode(tab)).to_have_value("instruct")
    tab.reload()  # the conversation is in the address
    expect(field(tab, "custom_system_message")).to_have_value("Be short.")


def test_a_foreign_conversation_shows_the_browsers_own_values(live_server, new_browser, wide):
    other = opened(new_browser(viewport={"width": 1440, "height": 900}).new_page(), live_server)
    ask(other, "secret")
    field(other, "custom_system_message").fill("Mine.")
    field(other, "custom_system_message").blur()
    until(lambda: in_effect(other)["custom_system_message"] == "Mine.")
    id = other.evaluate("location.hash.replace('#c=', '')")
    tab = wide(f"/#c={id}")
    expect(tab.locator(".tgw-welcome")).to_be_visible()
    expect(field(tab, "custom_system_message")).to_have_value("")


def test_a_number_beyond_the_sliders_range_is_shown_as_it_is(live_server, wide):
    tab = wide()
    tab.evaluate("window.tgw.call('PATCH', 'chat/session', { temperature: 9.5 })")
    tab.reload()
    parameters(tab)
    number = tab.locator(".knob-temperature input[type=number]")
    expect(number).to_have_value("9.5")
    number.focus()
    number.blur()
    expect(number).to_have_value("9.5")
    number.fill("12")
    number.blur()
    expect(number).to_have_value("9.5")  # as far as the slider reaches
    assert in_effect(tab)["temperature"] == 9.5
    number.fill("6")
    number.blur()
    until(lambda: in_effect(tab)["temperature"] == 6)
    expect(number).to_have_value("6")
    tab.get_by_role("button", name="Restore defaults").click()
    until(lambda: in_effect(tab)["temperature"] == SamplingParams().temperature)
    tab.reload()
    parameters(tab)
    expect(number).to_have_attribute("max", "5")


# --- characters and users ------------------------------------------------------------------------------------------------------------------


def test_a_character_fills_the_fields_and_is_saved_under_another_name(live_server, wide):
    tab = wide()
    mode(tab, "chat")
    choose(tab, "character", "Example")
    expect(field(tab, "name2")).to_have_value("Ines Marlow")
    until(lambda: in_effect(tab)["character"] == "Example")
    field(tab, "name2").fill("Ines")
    field(tab, "name2").blur()
    until(lambda: in_effect(tab)["name2"] == "Ines")
    tab.locator(".tgw-save-character").click()
    sheet = tab.get_by_role("dialog", name="Save the character")
    expect(sheet.get_by_role("textbox")).to_have_value("Example")
    expect(sheet.get_by_role("button", name="Replace")).to_be_visible()
    sheet.get_by_role("textbox").fill("Keeper")
    sheet.get_by_role("button", name="Save").click()
    expect(menu(tab, "character")).to_have_value("Keeper")
    kept = live_server.app.characters.get("Keeper")
    assert (kept.name, kept.greeting) == ("Ines", live_server.app.characters.get("Example").greeting)
    until(lambda: in_effect(tab)["character"] == "Keeper")
    tab.locator(".tgw-delete-character").click()
    tab.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    assert "Keeper" in live_server.app.characters.own()
    tab.locator(".tgw-delete-character").click()
    tab.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(menu(tab, "character")).to_have_value("")
    assert live_server.app.characters.own() == set()
    expect(field(tab, "name2")).to_have_value("Ines")  # what was read of it stays


def test_a_user_is_chosen_from_a_file_that_has_just_come(live_server, wide):
    tab = wide()
    mode(tab, "chat")
    (live_server.app.data.users / "Anna.yaml").write_text("name: Anna\nuser_bio: Likes tea.\n", "utf-8")
    open_again(tab)
    choose(tab, "user", "Anna")
    expect(field(tab, "name1")).to_have_value("Anna")
    expect(field(tab, "user_bio")).to_have_value("Likes tea.")
    tab.locator(".tgw-save-user").click()
    tab.get_by_role("dialog").get_by_role("textbox").fill("../out")
    tab.get_by_role("dialog").get_by_role("button", name="Save").click()
    expect(tab.locator(".tgw-toast")).to_contain_text("user name")


@pytest.mark.parametrize("live_server", [("--multi-user",)], indirect=True)
def test_with_many_users_nothing_is_saved(live_server, wide):
    tab = wide()
    mode(tab, "chat")
    choose(tab, "character", "Example")
    expect(field(tab, "name2")).to_have_value("Ines Marlow")
    expect(panel(tab).get_by_role("button", name="Save as…")).to_have_count(0)
    expect(panel(tab).get_by_role("button", name="Delete…")).to_have_count(0)


# --- styles --------------------------------------------------------------------------------------------------------------------------------


def style(tab, name):
    knob(tab, "chat_style").locator("input").click()
    tab.get_by_role("option", name=name, exact=True).click()
    expect(tab.locator(".tgw")).to_have_attribute("data-chat-style", name)


STYLED = "(name) => [...document.styleSheets].some((sheet) => sheet.href?.endsWith(`/styles/${name}.css`))"
"""Whether the style of that name has been read."""


def bubble(tab):
    """The look of the user's message."""
    return tab.locator(".tgw-msg.user .tgw-body").evaluate(
        "(e) => { const s = getComputedStyle(e); return [s.backgroundColor, s.fontFamily, s.fontSize, s.borderRadius, s.maxWidth].join(); }"
    )


def test_a_style_is_applied_at_once_and_stays(wide):
    tab = wide()
    ask(tab, "Hello")
    seen = [bubble(tab)]
    for name in [name for name in STYLES if name != "modern"]:
        style(tab, name)
        until(lambda: tab.locator("link[href*='/styles/']").count() == 1 and bubble(tab) not in seen)
        seen.append(bubble(tab))
    until(lambda: in_effect(tab)["chat_style"] == name)
    tab.reload()
    until(lambda: tab.locator(".tgw-msg.user").count() == 1 and bubble(tab) == seen[-1])


def test_each_style_fits_a_telephone(live_server, new_browser):
    tab = opened(new_browser(viewport={"width": 390, "height": 844}, has_touch=True).new_page(), live_server)
    live_server.backend.script = ["A long-word-that-does-not-end-" * 9 + "\n\n```\n" + "code " * 60 + "\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"]
    ask(tab, "w" * 200)
    tab.locator(".tgw-msg.assistant .tgw-code").wait_for()
    for name in STYLES:
        tab.evaluate("(name) => window.tgw.set('chat_style', name)", name)
        expect(tab.locator(".tgw")).to_have_attribute("data-chat-style", name)
        tab.wait_for_function(STYLED, arg=name)
        assert not tab.evaluate(OVERFLOW), name
        room = tab.locator(".tgw-scroll").evaluate("(e) => e.scrollWidth - e.clientWidth")
        assert room <= 0, name


def test_a_style_of_ones_own_from_the_css_folder(live_server, wide):
    tab = wide()
    ask(tab, "Hello")
    (live_server.app.data.css / "mine.css").write_text(".tgw-msg.user .tgw-body { background: rgb(1, 2, 3) }", "utf-8")
    open_again(tab)
    style(tab, "mine")
    until(lambda: "rgb(1, 2, 3)" in bubble(tab))
    until(lambda: in_effect(tab)["chat_style"] == "mine")
    tab.reload()
    until(lambda: tab.locator(".tgw-msg.user").count() == 1 and "rgb(1, 2, 3)" in bubble(tab))
    expect(knob(tab, "chat_style").locator("input")).to_have_value("mine")
    filled(tab)
    style(tab, "modern")
    until(lambda: "rgb(1, 2, 3)" not in bubble(tab))


def test_a_style_that_is_not_there_is_told(live_server, wide):
    tab = wide()
    tab.evaluate("window.tgw.call('PATCH', 'chat/session', { chat_style: '../style' })")
    tab.reload()
    expect(tab.locator(".tgw-toast")).to_contain_text("There is no style")


def test_a_style_loads_nothing_from_other_hosts(live_server, chromium):
    """Not through a fixture: it would take the browser's complaints for faults of the page."""
    asked = []

    class Host(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

    host = http.server.HTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=host.serve_forever, daemon=True).start()
    other = f"http://localhost:{host.server_port}"
    css = f"""
        @import "{other}/a.css";
        @font-face {{ font-family: f; src: url({other}/b.woff2) }}
        .tgw {{ background: url({other}/c.png); font-family: f }}"""
    (live_server.app.data.css / "evil.css").write_text(css, "utf-8")
    context = chromium.new_context()
    complaints = []
    context.on("console", lambda message: complaints.append(message.text))
    tab = opened(context.new_page(), live_server)
    tab.evaluate("window.tgw.call('PATCH', 'chat/session', { chat_style: 'evil' })")
    tab.reload()
    for name in ("a.css", "b.woff2", "c.png"):
        until(lambda name=name: tab.evaluate("true") and any(f"{other}/{name}" in text for text in complaints))
    context.close()
    host.shutdown()
    host.server_close()
    assert asked == []


# --- languages -----------------------------------------------------------------------------------------------------------------------------


def test_a_russian_browser_gets_a_russian_page(live_server, new_browser):
    tab = opened(new_browser(locale="ru-RU", viewport={"width": 1440, "height": 900}).new_page(), live_server)
    assert tab.evaluate("document.documentElement.lang") == "ru"
    expect(tab.get_by_role("tab", name="Чат")).to_be_visible()
    expect(tab.locator(".tgw-welcome h2")).to_have_text("О чём поговорим?")
    expect(panel(tab)).to_have_attribute("aria-label", "Настройки этого чата")
    expect(panel(tab).get_by_text("Кто этот персонаж", exact=False)).to_be_hidden()
    expect(knob(tab, "mode").get_by_text("помощник в роли", exact=True)).to_be_visible()
    mode(tab, "chat")  # the value is what it was
    expect(panel(tab).get_by_text("Кто этот персонаж; {{char}} и {{user}} заменяются именами.")).to_be_visible()
    tab.get_by_role("tab", name="Параметры").click()
    expect(knob(tab, "temperature")).to_contain_text("Температура")
    expect(tab.get_by_role("button", name="Вернуть исходные")).to_be_visible()
    tab.get_by_role("tab", name="Модель").click()
    expect(tab.get_by_text("Положите файлы .gguf или папки моделей в")).to_be_visible()
    expect(tab.locator("#tgw-status strong")).to_have_text("Готова")


def test_the_choice_comes_before_the_browsers_language(wide):
    tab = wide()
    assert tab.evaluate("document.documentElement.lang") == "en"
    knob(tab, "language").locator("input[value=ru]").check()
    until(lambda: in_effect(tab)["language"] == "ru")
    tab.reload()
    expect(tab.get_by_role("tab", name="Чат")).to_be_visible()
    expect(tab.locator(".tgw-composer textarea")).to_have_attribute("placeholder", "Напишите сообщение")
    expect(knob(tab, "language").locator("input[value=ru]")).to_be_checked()
    knob(tab, "language").locator("input[value=en]").check()
    until(lambda: in_effect(tab)["language"] == "en")
    tab.reload()
    expect(tab.get_by_role("tab", name="Chat", exact=True)).to_be_visible()
    expect(tab.locator(".tgw-composer textarea")).to_have_attribute("placeholder", "Write a message")
