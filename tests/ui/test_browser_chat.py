"""The page in a real browser, against a live server with a scripted engine."""

import re

import pytest

from modules.conversation import Conversation, new_id
from tests.fakes import until
from tests.ui.acting import ask, box, finished, parameters, reply, send, user

pytestmark = pytest.mark.browser

expect = pytest.importorskip("playwright.sync_api").expect
expect.set_options(timeout=20_000)

CODE = ["Some code:\n\n", "```python\n", "a = 1\n", "b = 2\n", "```\n", "\nAnd **done**."]
EVIL = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'


def rows(tab):
    return tab.locator(".tgw-list li")


def delete(tab, row):
    row.hover()
    row.locator(".tgw-tools button").click()
    tab.get_by_role("menuitem", name="Delete").click()


def open_tab(tab, name):
    tab.get_by_role("tab", name=name).click()


# --- a turn ---------------------------------------------------------------------------------------------------------------------------


def test_a_question_gets_an_answer_that_grows(live_server, new_tab):
    live_server.hold(*CODE)
    tab = new_tab()
    send(tab, "Write *code*")
    expect(user(tab).locator(".tgw-body")).to_have_text("Write *code*")
    expect(box(tab)).to_have_value("")
    expect(tab.locator(".tgw-send")).to_have_attribute("aria-label", "Stop")
    live_server.say(3)
    expect(reply(tab).locator("pre code")).to_have_text("a = 1")
    live_server.say(1)
    expect(reply(tab).locator("pre code")).to_have_text("a = 1\nb = 2")
    live_server.say(2)
    expect(reply(tab).locator("strong")).to_have_text("done")
    finished(tab)
    assert reply(tab).locator("pre code").inner_text() == "a = 1\nb = 2\n"
    expect(reply(tab).locator(".tgw-figures")).to_contain_text("6 tokens")
    expect(tab).to_have_title("Write *code*")
    assert "#c=" in tab.url
    expect(rows(tab).first).to_have_text("Write *code*")


def test_earlier_messages_are_not_touched_by_later_ones(live_server, new_tab):
    tab = new_tab()
    ask(tab, "one")
    tab.evaluate("document.querySelector('.tgw-msg .tgw-block').mark = document.querySelector('.tgw-msg.assistant .tgw-block').mark = 1")
    ask(tab, "two")
    assert tab.evaluate("[...document.querySelectorAll('.tgw-msg .tgw-block')].map((each) => each.mark ?? 0)") == [1, 1, 0, 0]


def test_enter_sends_and_shift_enter_begins_a_line(live_server, new_tab):
    tab = new_tab()
    box(tab).fill("one")
    box(tab).press("Shift+Enter")
    box(tab).type("two")
    expect(box(tab)).to_have_value("one\ntwo")
    box(tab).evaluate("(e) => e.dispatchEvent(new KeyboardEvent('keydown', { key: 'Enter', isComposing: true, bubbles: true }))")
    expect(box(tab)).to_have_value("one\ntwo")  # an input method was choosing characters
    box(tab).press("Enter")
    expect(user(tab).locator(".tgw-body")).to_have_text("one\ntwo")


def test_escape_stops_and_continue_goes_on(live_server, new_tab):
    live_server.hold("First ", "second ", "third ", "fourth")
    tab = new_tab()
    send(tab, "Count")
    live_server.say(2)
    expect(reply(tab)).to_contain_text("First second")
    tab.keyboard.press("Escape")
    expect(reply(tab).locator(".tgw-notice")).to_contain_text("Stopped")
    live_server.hold("and on")
    live_server.say(1)
    tab.locator(".tgw-notice button", has_text="Continue").click()
    expect(reply(tab).locator(".tgw-body")).to_have_text("First second and on")
    finished(tab)
    assert tab.locator(".tgw-msg").count() == 2


def test_versions_of_a_reply(live_server, new_tab):
    tab = new_tab()
    live_server.backend.script = ["Version one"]
    ask(tab, "Again")
    live_server.backend.script = ["Version two"]
    box(tab).press("Control+Enter")
    expect(reply(tab).locator(".tgw-body")).to_have_text("Version two")
    finished(tab)
    expect(reply(tab).locator(".tgw-versions")).to_have_text("2/2")
    tab.keyboard.press("ArrowLeft")
    expect(reply(tab).locator(".tgw-body")).to_have_text("Version one")
    expect(reply(tab).locator(".tgw-versions")).to_have_text("1/2")
    reply(tab).get_by_label("Next version").click()
    expect(reply(tab).locator(".tgw-body")).to_have_text("Version two")
    tab.reload()
    expect(reply(tab).locator(".tgw-body")).to_have_text("Version two")


def test_editing_a_question_asks_it_anew(live_server, new_tab):
    tab = new_tab()
    ask(tab, "Wrnog question")
    box(tab).press("Control+ArrowUp")
    area = tab.locator(".tgw-edit textarea")
    expect(area).to_have_value("Wrnog question")
    area.fill("Right question")
    area.press("Enter")
    expect(user(tab).locator(".tgw-body")).to_have_text("Right question")
    finished(tab)
    assert tab.locator(".tgw-msg").count() == 2
    expect(user(tab).locator(".tgw-versions")).to_have_text("2/2")


def test_editing_an_answer_keeps_the_question(live_server, new_tab):
    tab = new_tab()
    ask(tab, "Question")
    reply(tab).get_by_label("Edit").click()
    tab.locator(".tgw-edit textarea").fill("My own **answer**")
    tab.get_by_role("button", name="Save", exact=True).click()
    expect(reply(tab).locator("strong")).to_have_text("answer")
    assert tab.locator(".tgw-msg").count() == 2
    assert live_server.asked == 1


def test_copy_works_without_the_clipboard_api(live_server, new_tab):
    live_server.backend.script = CODE
    tab = new_tab()
    ask(tab, "Code")
    tab.evaluate("""() => {
        Object.defineProperty(navigator, 'clipboard', { value: undefined });
        document.execCommand = () => { window.copied = document.activeElement.value; };
    }""")
    reply(tab).locator("[data-copy]").click()
    tab.wait_for_function("window.copied === 'a = 1\\nb = 2\\n'")
    reply(tab).get_by_label("Copy", exact=True).last.click()
    tab.wait_for_function("window.copied.startsWith('Some code:')")


# --- nothing lost ---------------------------------------------------------------------------------------------------------------------


def test_a_reload_during_a_reply_goes_on_where_it_is(live_server, new_tab):
    live_server.hold(*CODE)
    tab = new_tab()
    send(tab, "Code")
    live_server.say(3)
    expect(reply(tab).locator("pre code")).to_have_text("a = 1")
    tab.reload()
    expect(reply(tab).locator("pre code")).to_have_text("a = 1")
    expect(tab.locator(".tgw-send")).to_have_attribute("aria-label", "Stop")
    live_server.say(3)
    expect(reply(tab).locator("strong")).to_have_text("done")
    finished(tab)
    assert reply(tab).locator("pre code").inner_text() == "a = 1\nb = 2\n"
    assert live_server.asked == 1


def test_a_second_tab_sees_it_grow(live_server, new_tab):
    live_server.hold(*CODE)
    first = new_tab()
    send(first, "Code")
    live_server.say(3)
    expect(reply(first).locator("pre code")).to_have_text("a = 1")
    second = new_tab("/" + first.url.split("/")[-1])
    expect(reply(second).locator("pre code")).to_have_text("a = 1")
    live_server.say(3)
    for tab in (first, second):
        expect(reply(tab).locator("strong")).to_have_text("done")
        assert reply(tab).locator("pre code").inner_text() == "a = 1\nb = 2\n"
    live_server.backend.script, before = ["From the other tab"], live_server.asked
    live_server.say(1)
    ask(second, "Next")
    expect(reply(first).locator(".tgw-body")).to_have_text("From the other tab")
    assert live_server.asked == before + 1


def test_twelve_tabs_all_load_and_follow(live_server, new_tab):
    live_server.hold("One ", "two ", "three")
    first = new_tab()
    send(first, "Count")
    live_server.say(1)
    expect(reply(first)).to_contain_text("One")
    tabs = [first, *(new_tab("/" + first.url.split("/")[-1]) for _ in range(11))]
    live_server.say(2)
    for tab in tabs:
        expect(reply(tab)).to_contain_text("One two three")


def test_a_reply_does_not_leak_into_another_conversation(live_server, new_tab):
    tab = new_tab()
    ask(tab, "First")
    first = tab.url
    live_server.hold("Slow ", "reply")
    send(tab, "Second question")
    live_server.say(1)
    expect(reply(tab)).to_contain_text("Slow")
    tab.get_by_role("button", name="New chat").first.click()
    expect(tab.locator(".tgw-welcome")).to_be_visible()
    expect(rows(tab).first).to_have_class(re.compile("running"))
    live_server.say(1)
    expect(rows(tab).first).not_to_have_class(re.compile("running"))
    assert tab.locator(".tgw-msg").count() == 0
    tab.go_back()
    expect(reply(tab)).to_contain_text("Slow reply")
    assert tab.url == first


def test_an_error_is_shown_and_the_text_stays(live_server, new_tab):
    tab = new_tab()
    live_server.app.models.unload()
    expect(tab.locator(".tgw-needs")).to_contain_text("No model is loaded")
    send(tab, "Do not lose me")
    expect(tab.locator(".tgw-toast")).to_contain_text(re.compile("model", re.IGNORECASE))
    expect(box(tab)).to_have_value("Do not lose me")
    tab.evaluate("location.reload()")
    expect(box(tab)).to_have_value("Do not lose me")
    tab.locator(".tgw-needs button").click()
    expect(tab.get_by_role("tab", name="Model")).to_have_attribute("aria-selected", "true")


def test_each_conversation_has_its_own_draft(live_server, new_tab):
    tab = new_tab()
    ask(tab, "Kept")
    box(tab).fill("draft of the old one")
    tab.get_by_role("button", name="New chat").first.click()
    expect(box(tab)).to_have_value("")
    box(tab).fill("draft of the new one")
    rows(tab).first.locator("a").click()
    expect(box(tab)).to_have_value("draft of the old one")
    tab.get_by_role("button", name="New chat").first.click()
    expect(box(tab)).to_have_value("draft of the new one")


def test_a_lost_connection_is_told_and_made_again(live_server, new_tab):
    live_server.hold("Before ", "after")
    tab, sockets, down = new_tab(), [], False

    def relay(socket):
        if down:
            return socket.close()
        sockets.append((socket, socket.connect_to_server()))

    tab.route_web_socket(re.compile("/chat/events"), relay)
    tab.reload()
    send(tab, "Go")
    live_server.say(1)
    expect(reply(tab)).to_contain_text("Before")
    down = True
    tab.context.set_offline(True)
    for end in sockets[-1]:  # being offline leaves open sockets alone
        end.close()
    box(tab).fill("typed meanwhile")
    expect(tab.locator(".tgw-banner")).to_be_visible()
    live_server.say(1)
    until(lambda: not live_server.app.replies.running(tab.url.split("#c=")[1]))
    down = False
    tab.context.set_offline(False)
    expect(tab.locator(".tgw-banner")).to_be_hidden()
    expect(reply(tab).locator(".tgw-body")).to_have_text("Before after")
    expect(box(tab)).to_have_value("typed meanwhile")
    finished(tab)


def test_a_failed_reply_says_why_and_can_be_made_again(live_server, new_tab):
    from modules.errors import EngineDied

    tab = new_tab()
    live_server.backend.error = EngineDied("The engine ended. Send again.")
    send(tab, "Go")
    expect(reply(tab).locator(".tgw-notice")).to_contain_text("The engine ended. Send again.")
    live_server.backend.error = None
    reply(tab).locator(".tgw-notice button", has_text="Regenerate").click()
    finished(tab)
    expect(reply(tab).locator(".tgw-notice")).to_be_hidden()
    expect(reply(tab).locator(".tgw-body")).to_have_text("Hello world")


# --- the list -------------------------------------------------------------------------------------------------------------------------


def test_rename_search_and_delete(live_server, new_tab):
    tab = new_tab()
    for text in ("About zebras", "About lions"):
        tab.get_by_role("button", name="New chat").first.click()
        ask(tab, text)
    expect(rows(tab)).to_have_count(2)
    rows(tab).nth(1).locator("a").focus()
    tab.keyboard.press("F2")
    tab.locator(".tgw-rename").fill("Stripes")
    tab.keyboard.press("Enter")
    expect(rows(tab).nth(1)).to_have_text("Stripes")
    tab.locator(".tgw-search input").fill("zebras")
    expect(rows(tab)).to_have_count(1)
    expect(rows(tab).first.locator("mark").first).to_have_text("zebras")
    tab.locator(".tgw-search input").fill("")
    expect(rows(tab)).to_have_count(2)
    delete(tab, rows(tab).first)
    expect(rows(tab)).to_have_count(1)
    expect(tab.locator(".tgw-welcome")).to_be_visible()  # it was the one shown
    tab.reload()
    expect(rows(tab)).to_have_text(["Stripes"])


def test_the_list_follows_other_tabs(live_server, new_tab):
    first, second = new_tab(), new_tab()
    ask(first, "Seen everywhere")
    expect(rows(second)).to_have_text(["Seen everywhere"])
    rows(second).first.locator("a").dblclick()
    second.locator(".tgw-rename").fill("New name")
    second.keyboard.press("Enter")
    expect(rows(first)).to_have_text(["New name"])
    expect(first).to_have_title("New name")
    delete(second, rows(second).first)
    expect(rows(first)).to_have_count(0)
    expect(first.locator(".tgw-welcome")).to_be_visible()


def import_chat(live_server, tab, turns, title="Long"):
    conversation = Conversation(new_id(), live_server.owner(tab), title)
    for n in range(turns):
        conversation, _ = conversation.add("user", f"Question {n}", conversation.tip)
        conversation, _ = conversation.add("assistant", f"Answer {n}\n\n" + "word " * 50, conversation.tip)
    live_server.app.store.import_conversations(conversation.owner, [conversation])
    tab.reload()
    rows(tab).first.locator("a").click()
    expect(reply(tab)).to_contain_text(f"Answer {turns - 1}")


def test_long_chats_load_older_messages_when_scrolled_up(live_server, new_tab):
    tab = new_tab()
    import_chat(live_server, tab, 100)
    assert tab.locator(".tgw-msg").count() == 40
    expect(reply(tab)).to_be_in_viewport()
    tab.evaluate("document.querySelector('.tgw-scroll').scrollTop = 0")
    tab.wait_for_function("document.querySelectorAll('.tgw-msg').length >= 80")
    assert tab.evaluate("document.querySelector('.tgw-scroll').scrollTop") > 100  # the reader's place was kept
    expect(tab.locator(".tgw-jump")).to_be_visible()
    tab.locator(".tgw-jump").click()
    expect(reply(tab)).to_be_in_viewport()
    expect(tab.locator(".tgw-jump")).to_be_hidden()


def test_at_the_bottom_a_long_chat_costs_no_more_than_a_short_one(live_server, new_tab):
    """What is far above is let go, and comes back."""
    tab = new_tab()
    import_chat(live_server, tab, 100)
    # Moved at each look: a move to where it stands already, while the last page is still being drawn, would tell the page nothing.
    to_the_top = "(() => { const s = document.querySelector('.tgw-scroll'); s.scrollTop = s.scrollTop === 0 ? 1 : 0; return true; })()"
    for loaded in (80, 120, 160):
        tab.wait_for_function(f"{to_the_top} && document.querySelectorAll('.tgw-msg').length >= {loaded}")
    tab.locator(".tgw-jump").click()
    tab.wait_for_function("document.querySelectorAll('.tgw-msg').length <= 120")
    expect(reply(tab)).to_be_in_viewport()
    while tab.locator(".tgw-msg").count() < 200:
        before = tab.locator(".tgw-msg").count()
        tab.wait_for_function(f"{to_the_top} && document.querySelectorAll('.tgw-msg').length > {before}")
    texts = tab.evaluate("[...document.querySelectorAll('.tgw-msg.user')].map((e) => e.querySelector('.tgw-body').textContent)")
    assert texts == [f"Question {n}" for n in range(100)]


def test_a_growing_reply_leaves_the_reader_alone(live_server, new_tab):
    tab = new_tab()
    import_chat(live_server, tab, 10)
    live_server.hold(*["A line of the reply.\n\n"] * 60)
    send(tab, "Go on")
    live_server.say(30)
    expect(reply(tab).locator("p")).to_have_count(30)
    gap = "(s => s.scrollHeight - s.scrollTop - s.clientHeight)(document.querySelector('.tgw-scroll'))"
    tab.wait_for_function(f"{gap} < 2")
    tab.mouse.move(700, 300)
    tab.mouse.wheel(0, -500)
    expect(tab.locator(".tgw-jump")).to_be_visible()
    top = tab.evaluate("document.querySelector('.tgw-scroll').scrollTop")
    live_server.say(30)
    expect(reply(tab).locator("p")).to_have_count(60)
    assert tab.evaluate("document.querySelector('.tgw-scroll').scrollTop") == top


# --- hostile text ----------------------------------------------------------------------------------------------------------------------


def test_hostile_text_is_only_text(live_server, new_tab):
    tab = new_tab()
    live_server.backend.script = [EVIL, "\n\n[a](javascript:window.hacked=1)\n\n```\n", EVIL, "\n```"]
    ask(tab, EVIL)
    tab.locator(".tgw-search input").fill("hacked")
    expect(tab.locator(".tgw-snippet").first).to_contain_text("hacked")
    rows(tab).first.locator("a").dblclick()
    tab.locator(".tgw-rename").fill(EVIL + "2")
    tab.keyboard.press("Enter")
    expect(rows(tab).first).to_contain_text("onerror")
    tab.reload()
    expect(user(tab).locator(".tgw-body")).to_have_text(EVIL)
    finished(tab)
    assert tab.evaluate("window.hacked") is None
    assert tab.locator(".tgw img, .tgw script, .tgw a[href^=javascript]").count() == 0


# --- parameters, model, appearance -----------------------------------------------------------------------------------------------------


def session_value(live_server, tab, name):
    return tab.evaluate("async () => (await (await fetch('chat/session')).json()).values")[name]


def test_a_changed_parameter_is_used_by_the_next_message(live_server, new_tab):
    tab = new_tab()
    open_tab(tab, "Parameters")
    number = tab.locator(".knob-temperature input[type=number]")
    number.fill("0.42")
    number.press("Tab")
    tab.locator(".knob-top_k input[type=range]").press("ArrowRight")
    open_tab(tab, "Chat")
    box(tab).press("Control+s")  # the panel
    tab.locator(".knob-custom_system_message textarea").fill("Be brief.")
    ask(tab, "Hi")
    sampling = live_server.backend.requests[-1].sampling
    assert (sampling.temperature, sampling.top_k) == (0.42, 1)
    assert session_value(live_server, tab, "custom_system_message") == "Be brief."
    tab.reload()
    open_tab(tab, "Parameters")
    expect(tab.locator(".knob-temperature input[type=number]")).to_have_value("0.42")
    open_tab(tab, "Chat")
    expect(tab.locator(".knob-custom_system_message textarea")).to_have_value("Be brief.")


def test_neutralise_restore_and_save(live_server, new_tab):
    tab = new_tab()
    open_tab(tab, "Parameters")
    top_p = tab.locator(".knob-top_p input[type=number]")
    expect(top_p).to_have_value("0.95")
    tab.get_by_role("button", name="Neutralise samplers").click()
    expect(top_p).to_have_value("1")
    until(lambda: session_value(live_server, tab, "top_p") == 1)
    tab.get_by_role("button", name="Save as defaults").click()
    expect(tab.locator(".tgw-toast.done")).to_be_visible()
    assert "top_p: 1" in live_server.app.data.settings.read_text()
    tab.get_by_role("button", name="Restore defaults").click()
    expect(top_p).to_have_value("0.95")
    until(lambda: session_value(live_server, tab, "top_p") == 0.95)


def test_a_refused_value_is_told(live_server, new_tab):
    tab = new_tab()
    open_tab(tab, "Parameters")
    tab.get_by_role("button", name="Tokens and constraints").click()
    field = tab.locator(".knob-custom_stopping_strings input, .knob-custom_stopping_strings textarea")
    field.fill("not quoted")
    field.press("Tab")
    expect(tab.locator(".tgw-toast")).to_contain_text("quoted")


def test_only_what_the_loader_uses(live_server, new_tab):
    tab = new_tab()
    open_tab(tab, "Parameters")
    expect(tab.locator(".knob-temperature")).to_be_visible()
    tab.get_by_label("Only what this model's loader uses").check()
    expect(tab.locator(".knob-temperature")).to_be_hidden()
    expect(tab.locator(".knob-top_p")).to_be_visible()
    tab.get_by_label("Only what this model's loader uses").uncheck()
    expect(tab.locator(".knob-temperature")).to_be_visible()


def test_loading_and_unloading_a_model(live_server, new_tab):
    from modules.errors import ModelError

    tab = new_tab()
    open_tab(tab, "Model")
    card = tab.locator("#tgw-status .tgw-card")
    expect(card).to_contain_text("Ready")
    tab.get_by_role("button", name="Unload").click()
    expect(card).to_contain_text("No model is loaded")
    live_server.engine.go.clear()
    tab.get_by_label("Model", exact=True).click()
    tab.get_by_role("option", name="other.fake").click()
    tab.get_by_role("button", name="Load", exact=True).click()
    expect(card).to_contain_text("Loading")
    expect(card.locator("progress")).to_be_visible()
    live_server.engine.go.set()
    expect(card).to_contain_text("Ready")
    expect(card).to_contain_text("other.fake")
    live_server.engine.errors["model.fake"] = ModelError("The file is cut off.\nDownload it again.")
    tab.get_by_label("Model", exact=True).click()
    tab.get_by_role("option", name="model.fake").click()
    tab.get_by_role("button", name="Load", exact=True).click()
    expect(card).to_contain_text("The file is cut off.\nDownload it again.", use_inner_text=True)


def test_dark_and_light(live_server, new_tab):
    tab = new_tab()
    expect(tab.locator("body")).not_to_have_class(re.compile("dark"))
    tab.get_by_label("Change between light and dark").click()
    expect(tab.locator("body")).to_have_class(re.compile("dark"))
    tab.reload()
    expect(tab.locator(".tgw-composer textarea")).to_be_visible()
    expect(tab.locator("body")).to_have_class(re.compile("dark"))
    tab.emulate_media(color_scheme="dark")
    tab.emulate_media(color_scheme="light")  # Gradio follows the system; the choice made here wins
    expect(tab.locator("body")).to_have_class(re.compile("dark"))


@pytest.mark.parametrize("live_server", [("--dark-theme", "on")], indirect=True)
def test_the_configured_theme(live_server, new_tab):
    expect(new_tab().locator("body")).to_have_class(re.compile("dark"))


def test_nothing_overflows_on_a_phone(live_server, new_browser):
    context = new_browser(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    tab = context.new_page()
    tab.goto(live_server.url)
    live_server.backend.script = ["| a | b | c |\n|---|---|---|\n| " + "long " * 9 + "| " + "x" * 200 + " | c |\n\n```\n" + "y" * 300 + "\n```"]
    box(tab).fill("z" * 300)
    tab.locator(".tgw-send").tap()
    expect(reply(tab).locator("table")).to_be_visible()
    finished(tab)
    for name in ("Chat", "Parameters", "Model"):
        open_tab(tab, name)
        expect(tab.locator(f"#tgw-tab-{name.lower()}")).to_be_visible()
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
        assert tab.evaluate("Math.max(...[...document.querySelectorAll('.tabitem')].map((e) => e.scrollWidth))") <= 390
    open_tab(tab, "Chat")
    small = """[...document.querySelectorAll('.tgw button')].filter((e) => e.checkVisibility())
        .map((e) => [e.title || e.innerText, Math.round(e.getBoundingClientRect().height)]).filter(([, height]) => height > 0 && height < 40)"""
    assert tab.evaluate(small) == []
    tab.get_by_label("Show conversations").tap()
    expect(rows(tab).first).to_be_visible()
    rows(tab).first.locator("a").tap()
    expect(tab.locator(".tgw-side")).to_be_hidden()


def test_the_keyboard_alone(live_server, new_tab):
    tab = new_tab()
    ask(tab, "One")
    tab.get_by_role("button", name="New chat").first.click()
    ask(tab, "Two")
    tab.locator(".tgw-search input").focus()
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Enter")
    expect(user(tab).locator(".tgw-body")).to_have_text("One")
    rows(tab).first.locator("a").focus()
    tab.keyboard.press("Delete")
    expect(rows(tab)).to_have_count(1)
    tab.get_by_role("button", name="Undo").focus()
    tab.keyboard.press("Enter")
    expect(rows(tab)).to_have_count(2)


def test_a_megabyte_can_be_typed_and_sent(live_server, new_tab):
    tab = new_tab()
    live_server.app.models.unload()
    text = ("word " * 20 + "\n") * 10_000
    box(tab).evaluate("(e, text) => { e.value = text; e.dispatchEvent(new Event('input')); }", text)
    box(tab).press("Enter")
    expect(tab.locator(".tgw-toast")).to_be_visible()
    assert box(tab).input_value() == text


def test_what_is_typed_while_the_first_message_is_sent_stays(live_server, new_tab):
    tab = new_tab()
    live_server.hold("Hello")
    held = []
    tab.route("**/chat/messages", lambda route: held.append(route))
    box = tab.locator(".tgw-composer textarea")
    box.fill("The first message")
    box.press("Enter")
    until(lambda: tab.evaluate("1") and held)
    box.press("End")
    tab.keyboard.type(" and more")
    held[0].continue_()
    expect(tab.locator(".tgw-msg.user")).to_have_count(1)
    expect(box).to_have_value("and more")
    live_server.say(1)


def test_arrows_in_the_row_of_tabs_do_not_make_another_version(live_server, new_tab):
    tab = new_tab()
    send(tab, "Hi")
    until(lambda: live_server.asked == 1)
    expect(tab.locator(".tgw-msg.running")).to_have_count(0)
    tab.locator("[role=tab]").first.focus()
    tab.keyboard.press("ArrowRight")
    tab.locator("[role=tab]").first.click()
    send(tab, "Again")
    until(lambda: live_server.asked >= 2)
    expect(tab.locator(".tgw-msg.assistant")).to_have_count(2)
    assert live_server.asked == 2


def parameter(tab, name):
    return tab.locator(f".knob-{name} input[type=number]")


def test_the_parameter_shown_is_the_one_in_effect(live_server, new_tab):
    tab = new_tab()
    parameters(tab)
    for typed, shown in (("999", 5), ("-5", 0.01), ("", 0.01), ("0.7", 0.7)):
        parameter(tab, "temperature").fill(typed)
        parameter(tab, "temperature").press("Tab")
        until(lambda shown=shown: session_value(live_server, tab, "temperature") == shown)
        expect(parameter(tab, "temperature")).to_have_value(str(shown))


def test_a_refused_parameter_and_one_of_another_tab_are_shown_as_the_server_has_them(live_server, new_tab):
    one, two = new_tab(), new_tab()
    for tab in (one, two):
        parameters(tab)
    parameter(one, "seed").fill("-99")
    parameter(one, "seed").press("Tab")
    expect(parameter(one, "seed")).to_have_value("-1")
    parameter(one, "top_p").fill("0.5")
    parameter(one, "top_p").press("Tab")
    until(lambda: session_value(live_server, one, "top_p") == 0.5)
    two.get_by_role("tab", name="Chat").click()
    send(two, "Hi")
    until(lambda: live_server.asked == 1)
    two.get_by_role("tab", name="Parameters").click()
    expect(parameter(two, "top_p")).to_have_value("0.5")


def test_back_leaves_a_deleted_chat_behind(live_server, new_tab):
    tab = new_tab()
    send(tab, "One")
    expect(tab.locator(".tgw-msg.assistant")).to_have_count(1)
    first = tab.url
    tab.goto(f"{live_server.url}/#c={'0' * 32}")
    tab.wait_for_function("!location.hash")
    tab.go_back()
    tab.wait_for_function("(url) => location.href === url", arg=first)
    expect(tab.locator(".tgw-msg.user")).to_have_count(1)


# --- computed ahead -------------------------------------------------------------------------------------------------------------------

SPY = """
window.told = [];
const plain = window.fetch;
window.fetch = (url, options) => {
    if (String(url).endsWith('/chat/ahead')) window.told.push(JSON.parse(options.body));
    return plain(url, options);
};
"""


@pytest.fixture
def reading(live_server):
    """A model that reads ahead what is typed."""
    backend = live_server.backend
    backend.features = frozenset({"prefill"})
    yield backend
    backend.hold_prefills(False)


@pytest.fixture
def spied(new_browser, live_server):
    """A tab whose `told` are the drafts that it told the server, and whose clock `pause` puts forward."""
    tab = new_browser().new_page()
    tab.clock.install()
    tab.add_init_script(SPY)
    with tab.expect_response("**/chat/ahead"):
        tab.goto(live_server.url)
        box(tab).wait_for()
        until(lambda: told(tab))
    return tab


def told(tab):
    pause(tab)
    return tab.evaluate("told")


def pause(tab):
    """Longer than the pause in typing after which a draft is told."""
    tab.clock.run_for(400)


def read(backend):
    """What the model was last told to read ahead."""
    return backend.decode(backend.prefills[-1].prompt) if backend.prefills else ""


def test_what_is_typed_is_read_before_it_is_sent(live_server, reading, new_tab):
    tab = new_tab()
    until(lambda: read(reading).endswith("user\n"))
    box(tab).type("Tell me of the sea")
    until(lambda: read(reading).endswith("user\nTell me of the"))
    box(tab).press("Enter")
    expect(reply(tab).locator(".tgw-body")).to_have_text("Hello world")
    finished(tab)
    assert reading.decode(reading.requests[0].prompt).startswith("<|im_start|>user\nTell me of the sea")
    until(lambda: read(reading).endswith("Hello world<|im_end|>\n<|im_start|>user\n"))
    box(tab).type("And more of it")
    until(lambda: read(reading).endswith("Hello world<|im_end|>\n<|im_start|>user\nAnd more of"))


def test_a_chat_that_is_opened_is_read(live_server, reading, new_tab):
    tab = new_tab()
    ask(tab, "First")
    tab.get_by_role("button", name="New chat").first.click()
    ask(tab, "Second")
    until(lambda: "Second" in read(reading))
    rows(tab).nth(1).locator("a").click()
    until(lambda: "user\nFirst<|im_end|>" in read(reading) and read(reading).endswith("<|im_start|>user\n"))
    box(tab).fill("A draft that stays")
    until(lambda: read(reading).endswith("A draft that"))
    live_server.app.ahead.cancel(next(iter(live_server.app.ahead._last)))  # else it is known to have been read
    reading.prefills.clear()
    tab.reload()
    until(lambda: read(reading).endswith("A draft that"))


def test_a_message_is_sent_though_the_reading_hangs(live_server, reading, new_tab):
    reading.hold_prefills(deaf=True)
    tab = new_tab()
    box(tab).type("Tell me of the sea")
    until(lambda: reading.prefills)
    box(tab).press("Enter")
    expect(reply(tab).locator(".tgw-body")).to_have_text("Hello world")
    finished(tab)
    send(tab, "And more of it")
    expect(tab.locator(".tgw-msg")).to_have_count(4)
    expect(reply(tab).locator(".tgw-body")).to_have_text("Hello world")
    finished(tab)
    assert len(reading.prefills) == 1 and tab.locator(".tgw-toast").count() == 0


def test_a_request_that_hangs_keeps_nobody_from_typing_and_sending(live_server, reading, spied):
    held = []
    spied.route("**/chat/ahead", lambda route: held.append(route))
    for word in ("Tell me", " of the", " deep sea"):
        box(spied).press("End")
        spied.keyboard.type(word)
        until(lambda: told(spied) and held)
    box(spied).press("Enter")
    expect(reply(spied).locator(".tgw-body")).to_have_text("Hello world")
    finished(spied)
    assert [draft["text"] for draft in told(spied)] == ["", "Tell me"], "one at a time"
    held[0].abort()
    until(lambda: len(told(spied)) == 3 and len(held) == 2)
    assert told(spied)[2]["text"] == "" and told(spied)[2]["conversation"] in spied.url
    assert spied.locator(".tgw-toast").count() == 0
    held[1].abort()


def test_only_what_changed_is_told_and_never_during_a_reply(live_server, reading, spied):
    for text in ("He", "Hello you", "Hello there you"):
        box(spied).fill(text)
        until(lambda text=text: told(spied)[-1]["text"] == (text if len(text) > 2 else ""))
        until(lambda: live_server.app.ahead.busy == 0)
        box(spied).dispatch_event("input")
        pause(spied)
    assert [draft["text"] for draft in told(spied)] == ["", "Hello you", "Hello there you"]
    live_server.hold("One", "two")
    box(spied).press("Enter")
    live_server.say()
    expect(reply(spied).locator(".tgw-body")).to_have_text("One")
    spied.keyboard.type("What I think meanwhile")
    pause(spied)
    assert len(told(spied)) == 3
    live_server.say()
    finished(spied)
    until(lambda: len(told(spied)) == 4)
    assert told(spied)[3]["text"] == "What I think meanwhile" and told(spied)[3]["conversation"] in spied.url


def test_a_page_that_is_not_seen_tells_nothing(live_server, reading, spied):
    hide = "(hidden) => { Object.defineProperty(document, 'hidden', { value: hidden, configurable: true }); }"
    spied.evaluate(hide, True)
    box(spied).type("Tell me of the sea")
    pause(spied)
    assert len(told(spied)) == 1
    spied.evaluate(hide, False)
    spied.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    until(lambda: told(spied)[-1]["text"] == "Tell me of the sea")


@pytest.mark.parametrize("live_server", [("--no-prefill-ahead",)], indirect=True)
def test_where_it_is_switched_off_the_page_asks_once(live_server, reading, spied):
    box(spied).type("Tell me of the sea")
    pause(spied)
    box(spied).press("Enter")
    expect(reply(spied).locator(".tgw-body")).to_have_text("Hello world")
    finished(spied)
    pause(spied)
    assert [draft["text"] for draft in told(spied)] == [""] and reading.prefills == []


def test_another_model_is_asked_anew(live_server, spied):
    box(spied).type("Tell me of the sea")
    pause(spied)
    assert len(told(spied)) == 1, "the first model cannot"
    make = live_server.engine.make
    live_server.engine.make = lambda: make(features=frozenset({"prefill"}))
    live_server.app.models.load(live_server.app.models.choose("other.fake"))
    until(lambda: told(spied) and read(live_server.backend).endswith("Tell me of the"))
