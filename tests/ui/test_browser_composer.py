"""The box, its menu, its keys, the bar and the drafts, in a real browser against a live server with a scripted engine."""

import json
import re
import socket

import pytest

from modules import auth
from modules.backends.base import Chunk
from modules.errors import DataError, ModelError
from modules.store import Store
from tests.fakes import until
from tests.ui.acting import ask, box, finished, send
from tests.ui.conftest import serving

pytestmark = pytest.mark.browser

expect = pytest.importorskip("playwright.sync_api").expect
expect.set_options(timeout=20_000)

AWAY = """(away) => {
    Object.defineProperty(document, 'hidden', { value: away, configurable: true });
    document.hasFocus = () => !away;
    document.dispatchEvent(new Event('visibilitychange'));
}"""


def said(tab):
    """The texts of all messages."""
    return tab.locator(".tgw-msg .tgw-body")


def queued(tab):
    return tab.locator(".tgw-queue li")


def listed(tab):
    """The names in the list over the box."""
    return tab.locator(".tgw-slash strong")


def chosen(tab):
    return tab.locator(".tgw-slash [aria-selected=true] strong")


def menu(tab, *names):
    """Choose from the menu beside the box."""
    tab.get_by_label("More to do", exact=True).click()
    for name in names:
        tab.get_by_role("menuitem", name=name).click()


def draft(live_server, tab, conversation=None):
    return live_server.app.store.draft(live_server.owner(tab), conversation)


def conversation(tab):
    return tab.url.split("#c=")[1]


@pytest.fixture
def writing(live_server, new_tab):
    """A tab in which a reply is being written, two of its pieces still to come."""
    live_server.hold("One ", "two ", "three")
    tab = new_tab()
    send(tab, "Count")
    live_server.say()
    expect(said(tab).last).to_have_text("One")
    return tab


# --- the queue ------------------------------------------------------------------------------------------------------------------------


def test_a_message_typed_during_a_reply_is_sent_after_it(live_server, writing):
    send(writing, "And then?")
    expect(queued(writing)).to_have_text(["Queued: And then?"])
    expect(box(writing)).to_have_value("")
    send(writing, "And after that?")
    live_server.say(100)
    expect(said(writing)).to_have_text(["Count", "One two three", "And then?", "One two three", "And after that?", "One two three"])
    finished(writing)
    expect(queued(writing)).to_have_count(0)
    assert live_server.asked == 3


def test_what_is_queued_can_be_edited_and_removed(live_server, writing):
    send(writing, "First")
    send(writing, "Second")
    queued(writing).first.get_by_label("Edit this queued message").click()
    expect(box(writing)).to_have_value("First")
    queued(writing).first.get_by_label("Remove this queued message").click()
    expect(queued(writing)).to_have_count(0)
    live_server.say(100)
    finished(writing)
    expect(box(writing)).to_have_value("First")
    assert live_server.asked == 1


def test_the_queue_outlives_a_reload_and_is_sent_by_one_tab(live_server, writing, new_tab):
    send(writing, "And then?")
    other = new_tab("/" + writing.url.split("/")[-1])
    expect(queued(other)).to_have_text(["Queued: And then?"])
    box(writing).fill("still typing")
    writing.reload()
    expect(queued(writing)).to_have_text(["Queued: And then?"])
    expect(box(writing)).to_have_value("still typing")
    live_server.say(100)
    for tab in (writing, other):
        expect(said(tab)).to_have_text(["Count", "One two three", "And then?", "One two three"])
        expect(queued(tab)).to_have_count(0)
    assert live_server.asked == 2


def test_no_queued_message_falls_out_for_a_new_one(writing):
    full = json.dumps([{"conversation": f"other {n}", "id": str(n), "text": "waits", "tab": "another"} for n in range(40)])
    writing.evaluate("(full) => localStorage.setItem('tgw.queue', full)", full)
    send(writing, "And then?")
    expect(writing.locator(".tgw-toast")).to_contain_text("No more can be queued now")
    expect(box(writing)).to_have_value("And then?")
    assert writing.evaluate("localStorage.getItem('tgw.queue')") == full


def test_a_reply_that_was_stopped_sends_nothing_by_itself(live_server, writing):
    send(writing, "And then?")
    expect(queued(writing).get_by_label("Send now")).to_have_count(0)
    writing.keyboard.press("Escape")
    expect(writing.locator(".tgw-notice").last).to_contain_text("Stopped")
    expect(queued(writing)).to_have_count(1)
    assert live_server.asked == 1
    live_server.say(100)
    queued(writing).get_by_label("Send now").click()
    expect(said(writing).last).to_have_text("One two three")
    expect(said(writing).nth(2)).to_have_text("And then?")
    expect(queued(writing)).to_have_count(0)


def test_a_queued_message_that_is_refused_waits(live_server, writing):
    send(writing, "And then?")
    writing.route("**/chat/messages", lambda route: route.fulfill(status=409, json={"error": {"code": "Busy", "message": "Not now."}}))
    live_server.say(100)
    expect(writing.locator(".tgw-toast")).to_contain_text("Not now.")
    expect(queued(writing)).to_have_text(["Queued: And then?"])
    writing.unroute("**/chat/messages")
    box(writing).press("Enter")  # with nothing typed: what waits
    expect(said(writing)).to_have_count(4)


def test_only_a_handful_waits(live_server, writing):
    for n in range(5):
        send(writing, f"Number {n}")
        expect(queued(writing)).to_have_count(n + 1)
    send(writing, "One too many")
    expect(writing.locator(".tgw-toast")).to_contain_text("No more can be queued")
    expect(box(writing)).to_have_value("One too many")


# --- what was sent, and drafts --------------------------------------------------------------------------------------------------------


def test_arrows_bring_back_what_was_sent(live_server, new_tab):
    tab = new_tab()
    for text in ("First", "Second\nof two lines", "First"):
        ask(tab, text)
    tab.reload()
    box(tab).press("ArrowUp")
    expect(box(tab)).to_have_value("First")
    box(tab).press("ArrowUp")
    expect(box(tab)).to_have_value("Second\nof two lines")
    box(tab).press("ArrowUp")
    expect(box(tab)).to_have_value("Second\nof two lines")  # there is none before it: the same text is kept once
    box(tab).press("ArrowDown")
    expect(box(tab)).to_have_value("First")
    box(tab).press("ArrowDown")
    expect(box(tab)).to_have_value("")
    box(tab).fill("typed")
    box(tab).press("ArrowUp")
    expect(box(tab)).to_have_value("typed")


def test_a_draft_is_there_on_another_device(live_server, new_tab, new_browser):
    tab = new_tab()
    ask(tab, "Hello")
    box(tab).fill("for this chat")
    until(lambda: draft(live_server, tab, conversation(tab)) == "for this chat")
    tab.get_by_role("button", name="New chat").first.click()
    expect(box(tab)).to_have_value("")
    box(tab).fill("for a new one")
    until(lambda: draft(live_server, tab) == "for a new one")
    other = new_browser()
    other.add_cookies(tab.context.cookies())
    device = other.new_page()
    device.goto(live_server.url)
    expect(box(device)).to_have_value("for a new one")
    device.locator(".tgw-list a").first.click()
    expect(box(device)).to_have_value("for this chat")
    box(device).press("Enter")
    finished(device)
    until(lambda: draft(live_server, tab, conversation(device)) == "")
    tab.locator(".tgw-list a").first.click()
    expect(said(tab).nth(2)).to_have_text("for this chat")
    expect(box(tab)).to_have_value("")


def test_a_draft_waits_in_the_browser_while_the_server_cannot_keep_it(live_server, new_tab, monkeypatch):
    def fail(*_):
        tried.append(1)
        raise DataError("The disk is full.")

    tried: list[int] = []
    with monkeypatch.context() as broken:
        broken.setattr(Store, "save_draft", fail)
        tab = new_tab()
        tab.clock.install()
        box(tab).fill("Do not lose me")
        tab.clock.run_for(2000)
        until(lambda: tried)
        tab.reload()
        expect(box(tab)).to_have_value("Do not lose me")
    assert draft(live_server, tab) == ""
    with tab.expect_response("**/chat/draft"):
        tab.clock.run_for(10_000)
    until(lambda: draft(live_server, tab) == "Do not lose me")
    assert tab.locator(".tgw-toast").count() == 0


def test_a_page_that_is_left_tells_its_draft(live_server, new_tab):
    tab = new_tab()
    box(tab).fill("At once")
    tab.close(run_before_unload=False)
    other = new_tab()
    expect(box(other)).to_have_value("At once")


def test_what_somebody_typed_is_not_shown_to_the_next_one_who_logs_in(live_server, new_browser, monkeypatch):
    def unreachable(*_):
        raise DataError("The disk is full.")

    app, users = live_server.app, {"ann": "secret", "bert": "hidden"}
    with socket.create_server(("127.0.0.1", 0)) as listening, serving(app, auth.Auth(users, app.data.sessions), listening) as url:
        live_server.url = url  # what `watched` lets a page ask
        context = new_browser()
        tab = context.new_page()

        def come(name):
            context.clear_cookies()
            tab.goto(url)
            tab.get_by_label("Name").fill(name)
            tab.get_by_label("Password").fill(users[name])
            tab.keyboard.press("Enter")
            box(tab).wait_for()
            tab.wait_for_function("name => localStorage.getItem('tgw.user') === name", arg=name)

        come("ann")
        ask(tab, "A secret of Ann")
        with monkeypatch.context() as patch:
            patch.setattr(Store, "save_draft", unreachable)
            tab.get_by_role("button", name="New chat").first.click()
            box(tab).fill("not told yet")
            tab.reload()
            expect(box(tab)).to_have_value("not told yet")
            come("bert")
            expect(box(tab)).to_have_value("")
        kept = tab.evaluate("Object.values(localStorage).join()")
        assert "Ann" not in kept and "not told" not in kept
        box(tab).press("ArrowUp")
        expect(box(tab)).to_have_value("")
        assert app.store.draft("user-bert", None) == ""


def test_an_incognito_draft_is_stored_nowhere(live_server, new_tab):
    tab = new_tab()
    send(tab, "/incognito")
    expect(tab.locator(".tgw-head-secret")).to_be_visible()
    tab.clock.install()
    box(tab).fill("A secret")
    tab.clock.run_for(3000)  # longer than the pauses after which a draft is kept, and told
    box(tab).press("Enter")
    expect(said(tab).first).to_have_text("A secret")
    finished(tab)
    box(tab).fill("Another secret")
    tab.get_by_role("button", name="New chat").first.click()
    expect(box(tab)).to_have_value("")
    kept = tab.evaluate("JSON.stringify({ ...localStorage })")
    assert "secret" not in kept
    assert draft(live_server, tab) == ""
    box(tab).press("ArrowUp")
    expect(box(tab)).to_have_value("")


# --- commands -------------------------------------------------------------------------------------------------------------------------


def test_a_slash_lists_what_can_be_done(live_server, new_tab):
    tab = new_tab()
    box(tab).type("/")
    expect(listed(tab).filter(has_text="/help")).to_be_visible()
    expect(listed(tab).filter(has_text="/regenerate")).to_have_count(0)  # there is no reply yet
    box(tab).fill("")
    expect(tab.locator(".tgw-slash")).to_be_hidden()
    ask(tab, "Hello")
    box(tab).type("/re")
    expect(listed(tab)).to_have_text(["/regenerate", "/remove", "/rename", "Rewrite"])
    expect(chosen(tab)).to_have_text("/regenerate")
    box(tab).press("ArrowUp")
    expect(chosen(tab)).to_have_text("Rewrite")
    box(tab).press("ArrowDown")
    live_server.backend.script = ["Another one"]
    box(tab).press("Enter")
    expect(said(tab).last).to_have_text("Another one")
    expect(box(tab)).to_have_value("")
    assert live_server.asked == 2


def test_what_is_no_command_is_a_message(live_server, new_tab):
    tab = new_tab()
    for text in ("/etc/passwd is what?", "/nothing of this name", "/new is a strange word"):
        ask(tab, text)
    box(tab).type("/help")
    expect(tab.locator(".tgw-slash")).to_be_visible()
    box(tab).press("Escape")
    expect(tab.locator(".tgw-slash")).to_be_hidden()
    box(tab).press("Enter")
    expect(said(tab).nth(6)).to_have_text("/help")
    assert tab.locator("dialog").count() == 0


def test_a_command_with_an_argument(live_server, new_tab):
    tab = new_tab()
    ask(tab, "Hello")
    box(tab).type("/ren")
    box(tab).press("Escape")
    box(tab).fill("")
    box(tab).type("/rename A better name")
    box(tab).press("Enter")
    expect(tab.locator("button.tgw-head-title")).to_have_text("A better name")
    expect(tab.locator(".tgw-list li")).to_contain_text(["A better name"])
    box(tab).type("/ins")
    box(tab).press("Tab")
    expect(box(tab)).to_have_value("/insert ")
    box(tab).type("Said by me")
    box(tab).press("Enter")
    expect(said(tab)).to_have_text(["Hello", "Hello world", "Said by me"])
    box(tab).fill("/export markdown")
    with tab.expect_download() as download:
        box(tab).press("Enter")
    assert download.value.suggested_filename == "A better name.md"
    assert live_server.asked == 1


def test_a_prompt_with_places_to_fill(live_server, new_tab):
    prompts = live_server.app.data.prompts
    prompts.mkdir(exist_ok=True)
    (prompts / "Poem.txt").write_text("Write a {{form=poem}} about {{thing}}, {{thing}}!")
    (prompts / "Plain.txt").write_text("Just this.")
    tab = new_tab()
    box(tab).type("/prompt p")
    expect(listed(tab)).to_have_text(["Plain", "Poem"])
    box(tab).press("ArrowDown")
    box(tab).press("Enter")
    form = tab.locator(".tgw-fill")
    expect(form.get_by_label("form")).to_have_value("poem")
    form.get_by_label("thing").fill("{{form}} <b>")
    form.get_by_role("button").click()
    expect(box(tab)).to_have_value("Write a poem about {{form}} <b>, {{form}} <b>!")
    menu(tab, "Prompts…")
    tab.get_by_label("Search prompts").fill("plain")
    tab.get_by_label("Search prompts").press("Enter")
    expect(box(tab)).to_have_value(re.compile("!Just this.$"))
    assert live_server.asked == 0


def test_the_menu_beside_the_box(live_server, new_tab):
    tab = new_tab()
    box(tab).fill("A question")
    menu(tab, "Insert user message")
    expect(said(tab)).to_have_text(["A question"])
    expect(box(tab)).to_have_value("")
    box(tab).fill("An answer")
    menu(tab, "Insert assistant message")
    expect(said(tab)).to_have_text(["A question", "An answer"])
    menu(tab, "Insert user message")
    expect(tab.locator(".tgw-toast")).to_contain_text("Type the message first")
    assert live_server.asked == 0
    menu(tab, "Remove last")
    expect(said(tab)).to_have_count(0)
    expect(box(tab)).to_have_value("A question")


def test_several_answers(live_server, new_tab):
    tab = new_tab()
    box(tab).fill("Which one?")
    menu(tab, "Several answers…", "3 answers")
    until(lambda: live_server.asked == 3)
    finished(tab)


# --- the model writes for the user ----------------------------------------------------------------------------------------------------


def test_impersonate_writes_in_the_box(live_server, new_tab):
    tab = new_tab()
    ask(tab, "Hello")
    live_server.hold(" and", " go", " on")
    box(tab).fill("Sit down")
    menu(tab, "Impersonate")
    live_server.say(2)
    expect(box(tab)).to_have_value("Sit down and go")
    expect(tab.locator(".tgw-send")).to_have_attribute("aria-label", "Stop")
    live_server.say(1)
    expect(box(tab)).to_have_value("Sit down and go on")
    finished(tab)
    assert said(tab).count() == 2
    until(lambda: draft(live_server, tab, conversation(tab)) == "Sit down and go on")


@pytest.mark.parametrize("how", ["Escape", "x"])
def test_impersonating_ends_with_a_key(live_server, new_tab, how):
    tab = new_tab()
    live_server.hold("Once", " upon", " a time")
    box(tab).press("Control+Shift+M")
    live_server.say(1)
    expect(box(tab)).to_have_value("Once")
    box(tab).press(how)
    finished(tab)
    until(lambda: live_server.backend.closed == 1)
    live_server.say(100)
    expect(box(tab)).to_have_value("Once" if how == "Escape" else "Oncex")


def test_an_impersonation_that_fails_says_why(live_server, new_tab):
    from modules.errors import EngineDied

    tab = new_tab()
    live_server.backend.error = EngineDied("The engine ended.")
    box(tab).press("Control+Shift+M")
    expect(tab.locator(".tgw-toast")).to_contain_text("The engine ended.")
    finished(tab)


# --- keys -----------------------------------------------------------------------------------------------------------------------------


def test_keys_from_anywhere(live_server, new_tab):
    tab = new_tab()
    ask(tab, "Hello")
    tab.keyboard.press("Control+b")
    expect(tab.locator(".tgw-side")).to_be_hidden()
    tab.keyboard.press("Control+k")
    expect(tab.locator(".tgw-search input")).to_be_focused()
    tab.keyboard.press("Control+Shift+O")
    expect(tab.locator(".tgw-msg")).to_have_count(0)
    expect(box(tab)).to_be_focused()
    for closed in (False, True):
        tab.keyboard.press("Control+s")
        expect(tab.locator("#tgw-panel")).to_be_visible(visible=not closed)
    tab.keyboard.press("Control+/")
    expect(tab.locator("dialog h2")).to_have_text("Keys and commands")


PRESS = """([key, code]) => document.activeElement.dispatchEvent(
    new KeyboardEvent('keydown', { key, code, ctrlKey: true, bubbles: true, cancelable: true }))"""


def test_keys_of_another_alphabet(live_server, new_tab):
    tab = new_tab()
    tab.evaluate(PRESS, ["и", "KeyB"])
    expect(tab.locator(".tgw-side")).to_be_hidden()
    tab.evaluate(PRESS, [".", "Slash"])
    expect(tab.locator("dialog h2")).to_have_text("Keys and commands")


def test_a_reply_is_removed_and_the_question_is_back(live_server, new_tab):
    tab = new_tab()
    ask(tab, "One")
    ask(tab, "Two")
    box(tab).press("Control+Shift+Backspace")
    expect(said(tab)).to_have_text(["One", "Hello world"])
    expect(box(tab)).to_have_value("Two")
    tab.get_by_role("button", name="Undo").click()
    expect(said(tab)).to_have_text(["One", "Hello world", "Two", "Hello world"])
    expect(box(tab)).to_have_value("")


def test_a_command_that_cannot_be_done_now_is_not_sent(live_server, new_tab):
    tab = new_tab()
    for text in ("/rename Foo", "/regenerate", "/TREE"):
        send(tab, text)
        expect(tab.locator(".tgw-toast").last).to_contain_text(f"{text.split()[0]} cannot be done here now")
        expect(box(tab)).to_have_value(text)
    assert live_server.asked == 0
    tab.get_by_role("button", name="Send as a message").last.click()
    expect(said(tab)).to_have_text(["/TREE", "Hello world"])
    finished(tab)
    box(tab).fill("/continue")
    box(tab).press("Escape")
    box(tab).press("Enter")
    expect(said(tab)).to_have_text(["/TREE", "Hello world", "/continue", "Hello world"])
    finished(tab)
    live_server.hold("Slow")
    send(tab, "Go on")
    expect(tab.locator(".tgw-stop").first).to_be_visible()
    send(tab, "/insert Foo")  # nor does it wait for the reply's end, as other words do
    expect(tab.locator(".tgw-toast").last).to_contain_text("/insert cannot be done here now")
    expect(box(tab)).to_have_value("/insert Foo")
    live_server.say()
    finished(tab)
    send(tab, "/tree of life")
    expect(said(tab).nth(6)).to_have_text("/tree of life")


def test_the_help_sheet_tells_all_keys(live_server, new_tab):
    tab = new_tab()
    tab.get_by_label("Keys and commands").click()
    sheet = tab.locator("dialog")
    for text in ("Ctrl", "Regenerate", "/impersonate", "/rename title"):
        expect(sheet).to_contain_text(text)
    tab.keyboard.press("Escape")
    expect(sheet).to_have_count(0)


def test_keys_rest_in_an_edit_form(live_server, new_tab):
    tab = new_tab()
    ask(tab, "Hello")
    box(tab).press("Control+ArrowUp")
    area = tab.locator(".tgw-edit textarea")
    area.press("ArrowLeft")
    area.press("Control+Shift+Backspace")
    area.press("ArrowRight")
    expect(said(tab).last).to_have_text("Hello world")
    assert live_server.asked == 1


# --- the bar --------------------------------------------------------------------------------------------------------------------------


def test_a_reply_that_ends_does_not_cut_a_new_title_short(live_server, writing):
    writing.locator("button.tgw-head-title").click()
    field = writing.locator(".tgw-head-field")
    field.fill("My new ti")
    live_server.say(10)
    finished(writing)
    expect(writing.locator(".tgw-list li.running")).to_have_count(0)  # the news of the list have come
    expect(field).to_be_focused()
    field.press_sequentially("tle")
    field.press("Enter")
    expect(writing.locator("button.tgw-head-title")).to_have_text("My new title")
    assert live_server.app.store.info(live_server.owner(writing), conversation(writing)).title == "My new title"


def test_an_old_chat_that_the_list_has_not_loaded_is_renamed(live_server, new_tab):
    first = new_tab()
    ask(first, "Oldest")
    owner, old = live_server.owner(first), conversation(first)
    for number in range(140):
        live_server.app.store.create(owner, f"chat {number}")
    tab = new_tab(f"/#c={old}")
    expect(said(tab)).to_have_count(2)
    expect(tab.locator(f".tgw-list a[href='#c={old}']")).to_have_count(0)
    tab.locator("button.tgw-head-title").click()
    tab.locator(".tgw-head-field").fill("Found")
    tab.locator(".tgw-head-field").press("Enter")
    expect(tab.locator("button.tgw-head-title")).to_have_text("Found")


def test_the_title_is_changed_where_it_stands(live_server, new_tab):
    tab = new_tab()
    expect(tab.locator(".tgw-head-title:visible")).to_have_text("New chat")
    ask(tab, "Hello")
    tab.locator("button.tgw-head-title").click()
    field = tab.locator(".tgw-head-field")
    expect(field).to_have_value("Hello")
    field.fill("Not this")
    field.press("Escape")
    expect(tab.locator("button.tgw-head-title")).to_have_text("Hello")
    tab.locator("button.tgw-head-title").click()
    field.fill("Greetings")
    field.press("Enter")
    expect(tab.locator(".tgw-list .tgw-title")).to_have_text("Greetings")
    expect(tab).to_have_title("Greetings")


def test_the_model_is_changed_in_the_bar(live_server, new_tab):
    tab = new_tab()
    name = tab.locator(".tgw-head-model")
    expect(name).to_have_text("model.fake")
    live_server.engine.go.clear()
    name.click()
    tab.get_by_role("menuitem", name="other.fake").click()
    expect(name).to_contain_text("Loading other.fake")
    expect(name.locator("progress")).to_be_visible()
    live_server.engine.go.set()
    expect(name).to_have_text("other.fake")
    expect(name.locator("progress")).to_be_hidden()


@pytest.fixture
def loading(live_server, new_tab):
    """A tab in whose box stands a message that was sent while a model is being loaded."""
    tab = new_tab()
    live_server.engine.go.clear()
    live_server.app.models.start_loading(live_server.app.models.choose("other.fake"))
    expect(tab.locator(".tgw-chip")).to_have_attribute("data-state", "loading")
    send(tab, "Soon")
    expect(tab.locator(".tgw-needs")).to_contain_text("Your message is sent when it is ready.")
    expect(box(tab)).to_have_value("Soon")
    yield tab
    live_server.engine.go.set()


def test_a_message_sent_while_a_model_loads_waits_for_it(live_server, loading):
    box(loading).press_sequentially(", or later")
    live_server.engine.go.set()
    expect(said(loading)).to_have_count(2)
    expect(said(loading).first).to_have_text("Soon, or later")
    finished(loading)
    expect(box(loading)).to_have_value("")
    assert live_server.asked == 1 and live_server.app.models.status().name == "other.fake"


@pytest.mark.parametrize("how", ["key", "button"])
def test_a_message_that_waits_for_a_model_can_be_held_back(live_server, loading, how):
    if how == "key":
        loading.keyboard.press("Escape")
    else:
        loading.get_by_role("button", name="Stop").click()
    expect(loading.get_by_role("button", name="Send", exact=True)).to_be_visible()
    expect(loading.locator(".tgw-needs")).not_to_contain_text("Your message")
    live_server.engine.go.set()
    expect(loading.locator(".tgw-chip")).to_have_attribute("data-state", "ready")
    expect(box(loading)).to_have_value("Soon")
    assert live_server.asked == 0


def test_a_message_stays_in_the_box_when_the_model_cannot_be_loaded(live_server, loading):
    for name in ("model.fake", "other.fake"):
        live_server.engine.errors[name] = ModelError("The file is cut off.")
    live_server.engine.go.set()
    expect(loading.locator(".tgw-chip")).to_have_attribute("data-state", "failed")
    expect(loading.get_by_role("button", name="Send", exact=True)).to_be_enabled()
    expect(box(loading)).to_have_value("Soon")
    assert live_server.asked == 0


# --- told while nobody looks ----------------------------------------------------------------------------------------------------------


SILENT = """() => {
    window.played = [];
    window.Audio = function (source) { this.play = async () => { window.played.push(String(source)); }; };
}"""


@pytest.mark.parametrize("sound", [True, False])
def test_a_reply_that_ends_in_the_background_is_told(live_server, new_tab, sound):
    live_server.app.data.notification.write_bytes(b"sound")
    tab = new_tab()
    tab.evaluate(SILENT)
    if not sound:
        tab.evaluate("window.tgw.set('sound', false)")
    ask(tab, "While I look")
    assert tab.evaluate("played") == []
    live_server.hold("At ", "last")
    send(tab, "While I am away")
    live_server.say(1)
    expect(said(tab).last).to_have_text("At")
    tab.evaluate(AWAY, True)
    live_server.say(1)
    expect(tab).to_have_title("● While I look")
    if sound:
        tab.wait_for_function("played.length === 1")
        assert tab.evaluate("played[0]") == f"{live_server.url}/notification"
    tab.evaluate(AWAY, False)
    expect(tab).to_have_title("While I look")
    assert tab.evaluate("played.length") == int(sound)


def test_the_line_below_tells_how_far_the_prompt_is_read(live_server, new_tab):
    tab = new_tab()
    backend = live_server.backend

    def generate(request):
        yield Chunk(prompt_tokens=len(request.prompt), prefill_done=len(request.prompt) // 2)
        backend.gate.acquire()
        yield from plain(request)

    plain, backend.generate = backend.generate, generate
    live_server.hold("Read")
    send(tab, "Hello")
    expect(tab.locator(".tgw-live")).to_contain_text(re.compile("Reading prompt: (49|50) %"))
    live_server.say(100)
    finished(tab)
    expect(tab.locator(".tgw-live")).not_to_contain_text("Reading")
    expect(tab.locator(".tgw-live meter")).to_be_visible()


# --- on a phone -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def phone(live_server, new_browser):
    tab = new_browser(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True).new_page()
    tab.goto(live_server.url)
    expect(tab.locator(".tgw-head-model")).to_contain_text("model")
    return tab


def test_menus_on_a_phone(live_server, phone):
    box(phone).fill("Hello")
    phone.locator(".tgw-send").tap()
    finished(phone)
    phone.get_by_label("More to do", exact=True).tap()
    for entry in phone.get_by_role("menuitem").all():
        assert entry.bounding_box()["height"] >= 40
    phone.keyboard.press("Escape")
    box(phone).type("/")
    expect(listed(phone).filter(has_text="Rewrite")).to_be_attached()
    assert phone.evaluate("Math.min(...[...document.querySelectorAll('.tgw-slash li')].map((row) => row.getBoundingClientRect().height))") >= 40
    box(phone).fill("/hel")
    phone.locator(".tgw-slash li").first.tap()
    expect(phone.locator("dialog h2")).to_be_visible()
    assert phone.evaluate("document.documentElement.scrollWidth") == 390
    phone.get_by_label("Close").tap()
    small = """[...document.querySelectorAll('.tgw button')].filter((e) => e.checkVisibility())
        .map((e) => [e.title || e.innerText, Math.round(e.getBoundingClientRect().height)]).filter(([, height]) => height > 0 && height < 40)"""
    assert phone.evaluate(small) == []


def test_a_message_is_queued_by_touch(live_server, phone):
    live_server.hold("One ", "two")
    box(phone).fill("Count")
    phone.locator(".tgw-send").tap()
    live_server.say(1)
    expect(said(phone).last).to_have_text("One")
    box(phone).fill("And then? " + "word " * 40)
    phone.get_by_label("Send after this reply").tap()
    expect(queued(phone)).to_contain_text("Queued: And then?")
    expect(queued(phone).get_by_label("Remove this queued message")).to_be_in_viewport(ratio=1)
    live_server.say(100)
    expect(said(phone)).to_have_count(4)


def test_a_keyboard_on_the_screen_does_not_hide_the_box(live_server, phone):
    phone.evaluate("""() => {
        Object.defineProperty(visualViewport, 'height', { value: 500, configurable: true });
        visualViewport.dispatchEvent(new Event('resize'));
    }""")
    expect(box(phone)).to_be_visible()
    assert box(phone).bounding_box()["y"] + box(phone).bounding_box()["height"] < 500
