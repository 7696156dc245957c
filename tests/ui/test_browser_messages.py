"""Messages in a real browser: what can be done with one, replies side by side, the tree, explanations, and two browsers on one conversation."""

import math
import re
import threading
from collections import defaultdict
from dataclasses import replace

import pytest

from modules.backends.base import Chunk, Timings, TokenLogprob
from modules.conversation import Conversation, Summary, new_id
from modules.models import Rules
from tests.fakes import WAIT, FakeBackend, until
from tests.ui.acting import ask, box, finished, reply, send, user

pytestmark = pytest.mark.browser

expect = pytest.importorskip("playwright.sync_api").expect
expect.set_options(timeout=20_000)

FIRST_SEED = 100
FIRST_WORD = 2_000_000  # ids of whole words; below them a token is a character


class Voices(FakeBackend):
    """Writes several replies at once: with the seed FIRST_SEED + n it says `words[n]`, a token each, when `gates[n]` lets it.

    Every token had the probability `chance`; what might have stood there are `others` (word, probability).
    """

    def __init__(self) -> None:
        super().__init__(features=frozenset({"parallel", "logprobs"}))
        self.words = {0: ["One ", "answer"], 1: ["Two ", "answers"], 2: ["Three ", "answers"]}
        self.gates = defaultdict(lambda: threading.Semaphore(10**6))
        self.chance, self.others = 0.5, [("One ", 0.5), ("Another ", 0.25)]
        self.ends, self.prompt_tokens = "stop", 0
        self._known: list[str] = []

    def word(self, text: str) -> int:
        if text not in self._known:
            self._known.append(text)
        return FIRST_WORD + self._known.index(text)

    def decode(self, tokens) -> str:
        return "".join(self._known[token - FIRST_WORD] if token >= FIRST_WORD else chr(token) for token in tokens)

    def hold(self, *numbers: int) -> None:
        self.gates.update({number: threading.Semaphore(0) for number in numbers})

    def say(self, number: int, pieces: int = 1) -> None:
        self.gates[number].release(pieces)

    def generate(self, request):
        if request.logprobs:
            top = tuple((self.word(text), text, math.log(chance)) for text, chance in self.others)
            yield Chunk("One ", (top[0][0],), logprobs=(TokenLogprob(*top[0], top),))
            yield Chunk(finish_reason="length", completion_tokens=1)
            return
        self.requests.append(request)
        number, said = request.seed - FIRST_SEED, 0
        gate = self.gates[number]
        request.cancel.on_cancel(lambda: gate.release(1))
        for said, text in enumerate(self.words[number], 1):
            assert gate.acquire(timeout=6 * WAIT), "the test never opened the gate"
            if request.cancel.cancelled:
                yield Chunk(finish_reason="cancelled", prompt_tokens=len(request.prompt), completion_tokens=said - 1)
                return
            told = (TokenLogprob(self.word(text), text, math.log(self.chance)),)
            yield Chunk(text, (self.word(text),), prompt_tokens=len(request.prompt) if said == 1 else 0, completion_tokens=said, logprobs=told)
        told = self.prompt_tokens or len(request.prompt)
        yield Chunk(finish_reason=self.ends, prompt_tokens=told, completion_tokens=said, timings=Timings(decode_seconds=1.0))


def messages(tab):
    return tab.locator(".tgw-msg .tgw-body")


def menu_of(tab, message, *names):
    """Open a message's menu and choose: an entry, then one of the menu that follows."""
    message.get_by_label("More to do with this message").click()
    for name in names:
        tab.get_by_role("menuitem", name=name, exact=True).click()


def columns(tab):
    return tab.locator(".tgw-row > .tgw-msg")


def toast(tab):
    return tab.locator(".tgw-toast").last


def conversation_of(tab):
    return tab.url.split("#c=")[1]


def stored(live_server, tab):
    return live_server.app.store.conversation(live_server.owner(tab), conversation_of(tab))


def import_chat(live_server, tab, conversation):
    live_server.app.store.import_conversations(conversation.owner, [conversation])
    tab.goto(f"{live_server.url}/#c={conversation.id}")
    expect(tab.locator(".tgw-msg").last).to_be_visible()


def open_chat(tab, title):
    tab.locator(".tgw-list a", has_text=title).click()
    expect(messages(tab).first).to_have_text(title)


def long_chat(owner, turns):
    conversation = Conversation(new_id(), owner, "Long")
    for n in range(turns):
        conversation, _ = conversation.add("user", f"Question {n}")
        conversation, _ = conversation.add("assistant", f"Answer {n}")
    return conversation


@pytest.fixture
def voices(live_server):
    live_server.engine.make = Voices
    live_server.app.models.load(live_server.app.models.choose("other.fake"))
    yield live_server.backend
    for gate in live_server.backend.gates.values():
        gate.release(10**6)


@pytest.fixture
def seeded(voices, new_tab):
    """A tab whose replies are those of `voices`."""
    tab = new_tab()
    with tab.expect_response("**/chat/session"):
        tab.evaluate("(seed) => window.tgw.set('seed', seed)", FIRST_SEED)
    return tab


@pytest.fixture
def two_browsers(live_server, new_browser):
    """Two browsers of one person, as (open tab, function that opens what the first shows in the second)."""
    one, other = new_browser(), new_browser()
    tab = one.new_page()
    tab.goto(live_server.url)
    box(tab).wait_for()

    def second():
        other.add_cookies(one.cookies())
        page = other.new_page()
        page.goto(tab.url)
        box(page).wait_for()
        return page

    return tab, second


# --- what can be done with a message --------------------------------------------------------------------------------------------------------


def test_what_is_offered_for_a_message(live_server, new_tab):
    tab = new_tab()
    ask(tab, "Hello")
    for message, names in ((user(tab), ["Copy", "Edit"]), (reply(tab), ["Copy", "Edit", "Regenerate", "Continue"])):
        expect(message.locator(".tgw-foot > button[aria-label]")).to_have_count(len(names) + 1)
        for name in names:
            expect(message.get_by_label(name, exact=True)).to_be_visible()
    menu_of(tab, reply(tab))
    expect(tab.get_by_role("menuitem")).to_have_text(
        ["Explain", "Several answers…", "Answer again with…", "Branch into a new chat", "All branches of this chat", "Pin", "Remove"]
    )
    tab.keyboard.press("Escape")
    expect(reply(tab).get_by_label("More to do with this message")).to_be_focused()
    menu_of(tab, user(tab))
    expect(tab.get_by_role("menuitem")).to_have_text(["Branch into a new chat", "All branches of this chat", "Pin", "Remove"])


def test_any_reply_can_be_regenerated(live_server, new_tab):
    tab = new_tab()
    ask(tab, "First")
    ask(tab, "Second")
    live_server.backend.script = ["Another first answer"]
    tab.locator(".tgw-msg.assistant").first.hover()
    tab.locator(".tgw-msg.assistant").first.get_by_label("Regenerate").click()
    expect(messages(tab)).to_have_text(["First", "Another first answer"])
    finished(tab)
    tab.keyboard.press("ArrowLeft")
    expect(messages(tab)).to_have_text(["First", "Hello world", "Second", "Hello world"])


def test_a_question_can_be_saved_without_an_answer(live_server, new_tab):
    tab = new_tab()
    ask(tab, "Wrnog")
    user(tab).hover()
    user(tab).get_by_label("Edit").click()
    tab.locator(".tgw-edit textarea").fill("Right")
    tab.get_by_role("button", name="Save only").click()
    expect(messages(tab)).to_have_text(["Right"])
    expect(user(tab).locator(".tgw-versions")).to_have_text("2/2")
    assert live_server.asked == 1
    user(tab).get_by_label("Previous version").click()
    expect(messages(tab)).to_have_text(["Wrnog", "Hello world"])
    expect(user(tab).get_by_label("Next version")).to_be_focused()


def test_what_is_typed_into_an_edit_is_not_lost_when_the_message_goes(two_browsers, live_server):
    tab, second = two_browsers
    ask(tab, "Question")
    other = second()
    expect(messages(other)).to_have_text(["Question", "Hello world"])
    reply(other).get_by_label("Edit").click()
    other.locator(".tgw-edit textarea").fill("Long work")
    box(tab).press("Control+Enter")
    expect(reply(other).locator(".tgw-versions")).to_have_text("2/2")
    expect(box(other)).to_have_value("Long work")


def test_a_branch_is_a_chat_of_its_own(live_server, new_tab):
    tab = new_tab()
    ask(tab, "First")
    ask(tab, "Second")
    old = conversation_of(tab)
    tab.locator(".tgw-msg.assistant").first.hover()
    menu_of(tab, tab.locator(".tgw-msg.assistant").first, "Branch into a new chat")
    expect(messages(tab)).to_have_text(["First", "Hello world"])
    assert conversation_of(tab) != old
    ask(tab, "Third")
    tab.go_back()
    expect(messages(tab)).to_have_text(["First", "Hello world", "Second", "Hello world"])


def test_remove_takes_what_follows_and_undo_brings_it_back(live_server, new_tab):
    tab = new_tab()
    for text in ("First", "Second", "Third"):
        ask(tab, text)
    tab.locator(".tgw-msg.user").nth(1).hover()
    menu_of(tab, tab.locator(".tgw-msg.user").nth(1), "Remove")
    expect(messages(tab)).to_have_text(["First", "Hello world"])
    ask(tab, "Another second")
    toast(tab).get_by_role("button", name="Undo").click()
    expect(messages(tab)).to_have_text(["First", "Hello world", "Second", "Hello world", "Third", "Hello world"])
    tab.reload()
    expect(messages(tab)).to_have_text(["First", "Hello world", "Second", "Hello world", "Third", "Hello world"])


def test_a_chat_of_which_everything_is_removed_can_be_gone_on_with(live_server, new_tab):
    tab = new_tab()
    ask(tab, "Only")
    user(tab).hover()
    menu_of(tab, user(tab), "Remove")
    expect(messages(tab)).to_have_count(0)
    expect(tab.locator(".tgw-welcome")).to_be_visible()
    ask(tab, "New")
    expect(messages(tab)).to_have_text(["New", "Hello world"])


def test_remove_last_puts_the_text_back_into_the_box(live_server, new_tab):
    tab = new_tab()
    ask(tab, "First")
    ask(tab, "To be said better")
    tab.keyboard.press("Control+Shift+Backspace")
    expect(messages(tab)).to_have_text(["First", "Hello world"])
    expect(box(tab)).to_have_value("To be said better")


def test_a_summary_being_changed_stays_with_its_chat(live_server, new_tab):
    tab = new_tab()
    store, owner = live_server.app.store, live_server.owner(tab)
    chats = [replace(long_chat(owner, 4), title=name) for name in "AB"]
    for chat in chats:
        import_chat(live_server, tab, chat)
        store.set_summary(owner, chat.id, Summary(f"Summary of {chat.title}", chat.path()[3].id))
    tab.goto(f"{live_server.url}/#c={chats[0].id}")
    tab.reload()
    card = tab.locator(".tgw-summary")
    card.locator("summary").click()
    card.get_by_label("Summary").fill("Corrected")
    tab.goto(f"{live_server.url}/#c={chats[1].id}")
    expect(card.locator("textarea")).to_have_value("Summary of B")
    expect(card.locator("button.primary")).to_be_disabled()


@pytest.mark.parametrize("typed", ["", "In the box"])
def test_an_edit_that_is_left_for_another_chat_becomes_a_draft(live_server, new_tab, typed):
    tab = new_tab()
    ask(tab, "Hello")
    first = tab.evaluate("location.hash")
    tab.get_by_role("button", name="New chat").first.click()
    ask(tab, "Other")
    second = tab.evaluate("location.hash")
    tab.goto(live_server.url + "/" + first)
    expect(user(tab)).to_contain_text("Hello")
    box(tab).fill(typed)
    user(tab).hover()
    user(tab).get_by_role("button", name="Edit").click()
    tab.locator(".tgw-edit textarea").fill("A new version")
    tab.goto(live_server.url + "/" + second)
    expect(user(tab)).to_contain_text("Other")
    expect(box(tab)).to_have_value("")
    tab.goto(live_server.url + "/" + first)
    expect(user(tab)).to_contain_text("Hello")
    expect(box(tab)).to_have_value("In the box\n\nA new version" if typed else "A new version")


def test_a_pinned_message_says_so(live_server, new_tab):
    tab = new_tab()
    ask(tab, "Keep me")
    user(tab).hover()
    menu_of(tab, user(tab), "Pin")
    expect(user(tab).locator(".tgw-pinned")).to_be_visible()
    assert stored(live_server, tab).path()[0].details["pinned"]
    tab.reload()
    expect(user(tab).locator(".tgw-pinned")).to_be_visible()
    user(tab).hover()
    menu_of(tab, user(tab), "Unpin")
    expect(user(tab).locator(".tgw-pinned")).to_have_count(0)


def test_each_reply_has_a_stop(live_server, new_tab):
    live_server.hold("One ", "two")
    tab = new_tab()
    send(tab, "Count")
    live_server.say()
    expect(reply(tab)).to_contain_text("One")
    reply(tab).get_by_label("Stop this reply").click()
    expect(reply(tab).locator(".tgw-notice")).to_contain_text("Stopped")
    finished(tab)


def test_while_a_reply_is_written_other_turns_are_refused_aloud(live_server, new_tab):
    tab = new_tab()
    ask(tab, "First")
    live_server.hold("Slow")
    send(tab, "Second")
    expect(reply(tab)).to_have_class(re.compile("running"))
    tab.locator(".tgw-msg.assistant").first.hover()
    tab.locator(".tgw-msg.assistant").first.get_by_label("Regenerate").click()
    expect(toast(tab)).to_contain_text("A reply is being written")
    live_server.say()
    expect(messages(tab)).to_have_text(["First", "Hello world", "Second", "Slow"])


# --- thinking and going on -------------------------------------------------------------------------------------------------------------------


def test_thinking_tells_how_much_of_it_there_is(live_server, new_tab):
    live_server.hold("<think>", "So ", "it is", "</think>", "Answer")
    tab = new_tab()
    send(tab, "Why?")
    live_server.say(3)
    summary = reply(tab).locator(".tgw-thought summary")
    expect(summary).to_have_text("Thinking… 3 tokens")
    expect(reply(tab).locator(".tgw-thought > div")).to_be_hidden()
    live_server.say(2)
    expect(summary).to_have_text(re.compile(r"^Thought · \d tokens$"))
    finished(tab)
    summary.click()
    expect(reply(tab).locator(".tgw-thought > div")).to_have_text("So it is")
    tab.reload()
    expect(summary).to_have_text(re.compile(r"^Thought · \d tokens$"))


def test_unfinished_thinking_goes_on(live_server, new_tab):
    live_server.hold("<think>", "So ", "it")
    tab = new_tab()
    send(tab, "Why?")
    live_server.say(2)
    expect(reply(tab).locator(".tgw-thought summary")).to_contain_text("Thinking…")
    tab.keyboard.press("Escape")
    expect(reply(tab).locator(".tgw-notice")).to_contain_text("Stopped")
    live_server.backend.script = ["it is", "</think>", "Because"]
    live_server.say(10)
    tab.locator(".tgw-notice button", has_text="Continue").click()
    expect(reply(tab).locator(".tgw-body")).to_have_text("Because")
    expect(reply(tab).locator(".tgw-thought > div")).to_have_text("So it is")
    assert tab.locator(".tgw-msg").count() == 2


def test_a_continuation_that_ends_before_it_was_told_to_have_begun(live_server, new_tab):
    """All its events come before the page knows that it runs."""
    tab = new_tab()
    live_server.hold("First ", "second")
    send(tab, "Count")
    live_server.say()
    expect(reply(tab)).to_contain_text("First")
    tab.keyboard.press("Escape")
    expect(reply(tab).locator(".tgw-notice")).to_contain_text("Stopped")
    replies, id = live_server.app.replies, stored(live_server, tab).tip
    tell = replies.tell

    def late(owner, type, data):
        if type == "started":
            until(lambda: not replies.running(data["conversation"]))
        tell(owner, type, data)

    replies.tell = late
    live_server.backend.script = ["and on"]
    live_server.say(10)
    tab.locator(".tgw-notice button", has_text="Continue").click()
    expect(messages(tab)).to_have_text(["Count", "First and on"])
    finished(tab)
    expect(reply(tab)).not_to_have_class(re.compile("running"))
    assert stored(live_server, tab)[id].text == "First and on"
    ask(tab, "Next")


# --- who speaks ------------------------------------------------------------------------------------------------------------------------------


def speak_as(tab, **values):
    for name, value in values.items():
        tab.evaluate("([name, value]) => window.tgw.set(name, value)", [name, value])
    with tab.expect_response("**/chat/session"):
        tab.evaluate("window.tgw.setMany({})")


def test_names_and_a_greeting(live_server, new_tab):
    tab = new_tab()
    speak_as(tab, mode="chat", name1="Ann", name2="Bob <b>", greeting="Hello {{user}}, I am {{char}}.")
    tab.reload()
    expect(messages(tab)).to_have_text(["Hello Ann, I am Bob <b>."])
    expect(tab.locator(".tgw-welcome")).to_be_hidden()
    assert tab.locator(".tgw-msg").get_by_label("Regenerate").count() == 0
    ask(tab, "Good day")
    expect(messages(tab)).to_have_text(["Hello Ann, I am Bob <b>.", "Good day", "Hello world"])
    expect(tab.locator(".tgw-name")).to_have_text(["Bob <b>", "Ann", "Bob <b>"])
    expect(tab.locator(".tgw-avatar")).to_have_text(["B", "A", "B"])
    greeting = tab.locator(".tgw-msg").first
    greeting.hover()
    expect(greeting.get_by_label("Regenerate")).to_have_count(0)
    menu_of(tab, greeting)
    expect(tab.get_by_role("menuitem", name="Several answers…")).to_have_count(0)


# --- side by side ----------------------------------------------------------------------------------------------------------------------------


def three(tab, voices):
    """Three replies to one question, none of which has said anything."""
    ask(tab, "Question")
    voices.hold(0, 1, 2)
    menu_of(tab, reply(tab), "Several answers…", "3 answers")
    expect(columns(tab)).to_have_count(3)


def test_several_answers_stream_side_by_side_and_one_is_chosen(seeded, voices, live_server):
    tab = seeded
    three(tab, voices)
    voices.say(1, 2)
    voices.say(2, 1)
    expect(columns(tab).nth(1).locator(".tgw-body")).to_have_text("Two answers")
    expect(columns(tab).nth(2).locator(".tgw-body")).to_have_text("Three")
    expect(columns(tab).nth(1).get_by_role("button", name="Choose this one")).to_be_visible()
    columns(tab).nth(2).get_by_label("Stop this reply").click()
    expect(columns(tab).nth(2).locator(".tgw-notice")).to_contain_text("Stopped")
    expect(columns(tab).nth(0)).to_have_class(re.compile("running"))
    tab.reload()
    expect(columns(tab)).to_have_count(3)
    voices.say(0, 2)
    expect(columns(tab).locator(".tgw-body")).to_have_text(["One answer", "Two answers", "Three"])
    finished(tab)
    columns(tab).nth(1).get_by_role("button", name="Choose this one").press("Enter")
    expect(columns(tab)).to_have_count(0)
    expect(messages(tab)).to_have_text(["Question", "Two answers"])
    expect(reply(tab).locator(".tgw-versions")).to_have_text("3/4")
    expect(box(tab)).to_be_focused()
    tab.reload()
    expect(messages(tab)).to_have_text(["Question", "Two answers"])


def test_to_choose_one_stops_the_others(seeded, voices):
    tab = seeded
    three(tab, voices)
    voices.say(1, 2)
    columns(tab).nth(1).get_by_role("button", name="Choose this one").click()
    expect(messages(tab)).to_have_text(["Question", "Two answers"])
    finished(tab)


def test_without_a_choice_the_chat_goes_on_from_the_marked_one(seeded, voices, live_server):
    tab = seeded
    three(tab, voices)
    for number in range(3):
        voices.say(number, 2)
    finished(tab)
    expect(columns(tab).first).to_have_attribute("aria-current", "true")
    box(tab).press("ArrowRight")
    expect(columns(tab).nth(1)).to_have_attribute("aria-current", "true")
    voices.say(0, 2)
    ask(tab, "Next")
    expect(messages(tab)).to_have_text(["Question", "Two answers", "Next", "One answer"])
    expect(tab.locator(".tgw-msg.assistant").first.locator(".tgw-versions")).to_have_text("3/4")


def test_several_answers_to_a_new_message_are_seen_in_both_browsers(two_browsers, voices):
    tab, second = two_browsers
    with tab.expect_response("**/chat/session"):
        tab.evaluate("(seed) => window.tgw.set('seed', seed)", FIRST_SEED)
    ask(tab, "Question")
    other = second()
    voices.hold(0, 1)
    box(tab).fill("Two of you")
    tab.get_by_label("More to do", exact=True).click()
    tab.get_by_role("menuitem", name="Several answers…").click()
    tab.get_by_role("menuitem", name="2 answers").click()
    for number in (0, 1):
        voices.say(number, 2)
    for each in (tab, other):
        expect(columns(each).locator(".tgw-body")).to_have_text(["One answer", "Two answers"])
        finished(each)
    columns(other).nth(1).get_by_role("button", name="Choose this one").click()
    for each in (tab, other):
        expect(messages(each)).to_have_text(["Question", "One answer", "Two of you", "Two answers"])


def test_an_answer_with_another_model_in_memory_stands_beside_the_former(live_server, new_tab, monkeypatch):
    app, first = live_server.app, live_server.backend
    monkeypatch.setattr(app.models, "rules", Rules(most=2))
    app.models.load(app.models.choose("other.fake"))
    tab = new_tab()
    ask(tab, "Question")
    first.script = ["Other words"]
    menu_of(tab, reply(tab), "Answer again with…", "Model model.fake")
    expect(columns(tab).locator(".tgw-body")).to_have_text(["Hello world", "Other words"])
    expect(columns(tab).locator(".tgw-ordinal")).to_have_text(["Answer 1 · other.fake", "Answer 2 · model.fake"])
    finished(tab)
    columns(tab).nth(1).get_by_role("button", name="Choose this one").click()
    expect(messages(tab)).to_have_text(["Question", "Other words"])
    ask(tab, "Next")  # that was for one reply only
    assert (len(first.requests), len(live_server.backend.requests)) == (1, 2)


def test_an_answer_with_another_preset_stands_beside_the_former(live_server, new_tab):
    (live_server.app.data.presets / "Cold.yaml").write_text("temperature: 0.1\n")
    tab = new_tab()
    ask(tab, "Question")
    live_server.backend.script = ["Colder"]
    menu_of(tab, reply(tab), "Answer again with…", "Preset Cold")
    expect(columns(tab).locator(".tgw-body")).to_have_text(["Hello world", "Colder"])
    finished(tab)
    assert live_server.backend.requests[-1].sampling.temperature == 0.1
    columns(tab).first.get_by_role("button", name="Choose this one").click()
    expect(messages(tab)).to_have_text(["Question", "Hello world"])
    expect(reply(tab).locator(".tgw-versions")).to_have_text("1/2")
    ask(tab, "Next")
    assert live_server.backend.requests[-1].sampling.temperature != 0.1


# --- the tree --------------------------------------------------------------------------------------------------------------------------------


def test_the_tree_jumps_between_branches(live_server, new_tab):
    tab = new_tab()
    ask(tab, "First")
    ask(tab, "Second")
    live_server.backend.script = ["Other first"]
    tab.locator(".tgw-msg.assistant").first.hover()
    tab.locator(".tgw-msg.assistant").first.get_by_label("Regenerate").click()
    expect(messages(tab)).to_have_text(["First", "Other first"])
    finished(tab)
    menu_of(tab, reply(tab), "All branches of this chat")
    rows = tab.get_by_role("treeitem")
    expect(rows).to_have_count(3)
    texts = [re.sub(r"\s+", " ", text).strip() for text in rows.all_inner_texts()]
    assert texts == ["First", "Other first here", "Hello world 3 messages"]
    assert [rows.nth(n).get_attribute("aria-level") for n in range(3)] == ["1", "1", "2"]
    expect(tab.get_by_role("tree")).to_be_focused()
    expect(rows.nth(1)).to_have_attribute("aria-selected", "true")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("dialog")).to_have_count(0)
    expect(messages(tab)).to_have_text(["First", "Hello world", "Second", "Hello world"])
    expect(tab.locator(".tgw-msg.assistant").first).to_be_focused()


def test_a_tree_of_thousands_of_branches_makes_only_the_rows_in_sight(live_server, new_tab):
    tab = new_tab()
    conversation = long_chat(live_server.owner(tab), 50)
    question = conversation.path()[40]
    for n in range(5_000):
        conversation, _ = conversation.add("assistant", f"Version {n}", question.id)
    import_chat(live_server, tab, conversation)
    tab.get_by_label("All branches of this chat").click()
    tree = tab.get_by_role("tree")
    expect(tree.get_by_role("treeitem").first).to_be_visible()
    assert tree.get_by_role("treeitem").count() < 60
    tab.keyboard.press("End")
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("dialog")).to_have_count(0)
    expect(tab.locator(".tgw-msg.assistant", has_text="Version").or_(tab.locator(".tgw-msg", has_text="Answer 49")).last).to_be_visible()


def test_a_row_far_above_is_found(live_server, new_tab):
    tab = new_tab()
    import_chat(live_server, tab, long_chat(live_server.owner(tab), 100))
    assert tab.locator(".tgw-msg").count() == 40
    tab.get_by_label("All branches of this chat").click()
    tab.get_by_role("treeitem").first.click()
    first = tab.locator(".tgw-msg", has_text=re.compile("^Question 0$"))
    expect(first).to_be_focused()
    expect(first).to_be_in_viewport()


# --- how a reply was made ----------------------------------------------------------------------------------------------------------------------


def test_a_reply_is_explained_and_goes_on_from_another_token(seeded, voices, live_server):
    tab = seeded
    ask(tab, "Question")
    reply(tab).locator("button.tgw-figures").click()
    dialog = tab.get_by_role("dialog")
    expect(dialog).to_contain_text("other.fake")
    expect(dialog.locator(".tgw-facts")).to_contain_text(str(FIRST_SEED))
    tokens = dialog.locator(".tgw-tokens .tgw-token")
    expect(tokens).to_have_text(["One ", "answer"])
    expect(tokens.first).to_have_class(re.compile(r"\bp1\b"))
    dialog.locator(".tgw-prompt summary").click()
    expect(dialog.locator(".tgw-prompt pre")).to_contain_text("Question")
    tokens.first.focus()
    tab.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(dialog.locator(".tgw-status")).to_contain_text("50.0 %")
    tab.keyboard.press("Home")
    tab.keyboard.press("Enter")
    offered = dialog.locator(".tgw-alternatives ol button")
    expect(offered).to_have_count(2)
    expect(offered.first).to_have_attribute("aria-current", "true")
    voices.words[0] = ["goes on"]
    tab.get_by_label("Continue from here with “Another ” (25.0 %)").click()
    expect(dialog).to_have_count(0)
    expect(messages(tab)).to_have_text(["Question", "Another goes on"])
    expect(reply(tab).locator(".tgw-versions")).to_have_text("2/2")


def test_a_reply_is_repeated(seeded, voices):
    tab = seeded
    ask(tab, "Question")
    menu_of(tab, reply(tab), "Explain")
    tab.get_by_role("dialog").get_by_role("button", name="Repeat").click()
    expect(reply(tab).locator(".tgw-versions")).to_have_text("2/2")
    finished(tab)
    first, again = voices.requests
    assert (first.prompt, first.seed, first.sampling) == (again.prompt, again.seed, again.sampling)


def test_what_cannot_be_told_or_repeated_says_why(seeded, voices, live_server):
    tab = seeded
    ask(tab, "Question")
    live_server.app.models.unload()
    menu_of(tab, reply(tab), "Explain")
    dialog = tab.get_by_role("dialog")
    expect(dialog).to_contain_text("while the model that wrote it is loaded")
    expect(dialog.get_by_role("button", name="Repeat")).to_be_disabled()
    expect(dialog).to_contain_text("No model is loaded.")


def test_what_the_server_says_against_alternatives_is_shown_where_they_would_stand(seeded, voices):
    tab = seeded
    ask(tab, "Question")
    menu_of(tab, reply(tab), "Explain")
    voices.features = frozenset({"parallel"})
    tab.get_by_role("dialog").locator(".tgw-tokens .tgw-token").first.click()
    expect(tab.get_by_role("dialog").get_by_role("alert")).to_contain_text("does not tell probabilities")


@pytest.mark.parametrize(("room", "why"), [(2, "because the context is full"), (3, "at the longest allowed length")])
def test_why_a_reply_was_cut_off_is_told(seeded, voices, room, why):
    tab = seeded
    voices.ends, voices.prompt_tokens = "length", voices.context_length - room  # the reply has two tokens
    ask(tab, "Question")
    figures = reply(tab).locator("button.tgw-figures")
    expect(figures).to_contain_text(f"ended {why}")
    figures.click()
    expect(tab.get_by_role("dialog").locator(".tgw-facts > div", has_text="Ended")).to_contain_text(why)


def test_a_reply_of_ten_thousand_tokens_can_be_explained(seeded, voices):
    tab = seeded
    voices.words[0] = [f"w{n % 97} " for n in range(10_000)]
    ask(tab, "Question")
    reply(tab).get_by_label("More to do with this message").scroll_into_view_if_needed()
    menu_of(tab, reply(tab), "Explain")
    tokens = tab.get_by_role("dialog").locator(".tgw-tokens .tgw-token")
    expect(tokens).to_have_count(10_000)
    tokens.first.focus()
    for key in ("ArrowDown", "End", "ArrowUp", "ArrowLeft"):
        tab.keyboard.press(key)
    expect(tab.get_by_role("dialog").locator(".tgw-status")).to_contain_text("of 10,000")


# --- the summary -------------------------------------------------------------------------------------------------------------------------------


def test_the_summary_stands_where_it_is_told_and_can_be_changed(live_server, new_tab):
    tab = new_tab()
    conversation = long_chat(live_server.owner(tab), 4)
    import_chat(live_server, tab, conversation)
    store, path = live_server.app.store, conversation.path()
    store.set_summary(conversation.owner, conversation.id, Summary("They spoke of the sea.", path[3].id))
    tab.reload()
    card = tab.locator(".tgw-summary")
    expect(card).to_be_visible()
    assert tab.evaluate("document.querySelector('.tgw-summary').nextSibling.dataset.id") == path[4].id
    card.locator("summary").click()
    expect(card.get_by_label("Summary")).to_have_value("They spoke of the sea.")
    card.get_by_label("Summary").fill("They spoke of ships.")
    card.get_by_role("button", name="Save").click()
    until(lambda: store.summary(conversation.owner, conversation.id).text == "They spoke of ships.")
    expect(card.get_by_role("button", name="Save")).to_be_disabled()
    card.get_by_role("button", name="Forget it").click()
    expect(card).to_have_count(0)
    assert store.summary(conversation.owner, conversation.id) is None


# --- two browsers on one conversation ------------------------------------------------------------------------------------------------------------


def test_two_browsers_see_the_same_through_every_turn(two_browsers, live_server):
    tab, second = two_browsers
    ask(tab, "First")
    other = second()
    both = (tab, other)
    ask(other, "Second")
    for each in both:
        expect(messages(each)).to_have_text(["First", "Hello world", "Second", "Hello world"])
    live_server.backend.script = ["Edited answer"]
    box(tab).press("Control+ArrowUp")
    tab.locator(".tgw-edit textarea").fill("Second, edited")
    tab.locator(".tgw-edit textarea").press("Enter")
    for each in both:
        expect(messages(each)).to_have_text(["First", "Hello world", "Second, edited", "Edited answer"])
        finished(each)
    live_server.hold("Slow ", "answer")
    box(other).press("Control+Enter")
    live_server.say()
    for each in both:
        expect(messages(each).last).to_have_text("Slow")
    reply(tab).get_by_label("Stop this reply").click()
    for each in both:
        expect(reply(each).locator(".tgw-notice")).to_contain_text("Stopped")
        expect(reply(each).locator(".tgw-versions")).to_have_text("2/2")
        finished(each)
    box(other).press("ArrowLeft")
    for each in both:
        expect(messages(each).last).to_have_text("Edited answer")
    menu_of(tab, user(tab), "Remove")
    for each in both:
        expect(messages(each)).to_have_text(["First", "Hello world", "Second", "Hello world"])
    toast(tab).get_by_role("button", name="Undo").click()
    for each in both:
        expect(messages(each).last).to_have_text("Edited answer")
    assert [message.text for message in stored(live_server, tab).path()] == ["First", "Hello world", "Second, edited", "Edited answer"]


def test_an_answer_that_comes_late_does_not_undo_what_happened_meanwhile(two_browsers, live_server):
    """The answer to one browser's Send is held back until the other has gone on and chosen another version."""
    tab, second = two_browsers
    ask(tab, "First")
    other = second()
    expect(messages(other)).to_have_text(["First", "Hello world"])
    held = []
    tab.route("**/chat/messages", lambda route: held.append((route, route.fetch())))
    send(tab, "Second")
    expect(messages(other)).to_have_text(["First", "Hello world", "Second", "Hello world"])
    finished(other)
    live_server.backend.script = ["Another"]
    other.locator(".tgw-msg.assistant").first.hover()
    other.locator(".tgw-msg.assistant").first.get_by_label("Regenerate").click()
    expect(messages(other)).to_have_text(["First", "Another"])
    finished(other)
    expect(messages(tab)).to_have_text(["First", "Another"])
    route, response = held[0]
    route.fulfill(response=response)
    tab.unroute("**/chat/messages")
    finished(tab)
    expect(box(tab)).to_have_value("")
    expect(messages(tab)).to_have_text(["First", "Another"])
    ask(tab, "Third")
    for each in (tab, other):
        expect(messages(each)).to_have_text(["First", "Another", "Third", "Another"])


def test_a_page_that_was_read_before_a_turn_does_not_hide_it(two_browsers, live_server):
    tab, second = two_browsers
    ask(tab, "First")
    other = second()
    expect(messages(other)).to_have_text(["First", "Hello world"])
    held = []
    other.route("**/chat/conversations/*", lambda route: held.append((route, route.fetch())) if not held else route.continue_())
    menu_of(tab, reply(tab), "Pin")  # the other reads the page again
    until(lambda: other.evaluate("1") and held)
    ask(tab, "Second")
    expect(messages(other)).to_have_text(["First", "Hello world", "Second", "Hello world"])
    route, response = held[0]
    with other.expect_response("**/chat/conversations/*"):  # it is read once more
        route.fulfill(response=response)
    expect(other.locator(".tgw-pinned")).to_have_count(1)
    expect(messages(other)).to_have_text(["First", "Hello world", "Second", "Hello world"])


def test_a_chat_deleted_in_one_browser_is_left_in_the_other_and_comes_back(two_browsers, live_server):
    tab, second = two_browsers
    ask(tab, "Here")
    other = second()
    live_server.hold("Slow ", "answer")
    send(tab, "Going on")
    live_server.say()
    for each in (tab, other):
        expect(reply(each)).to_contain_text("Slow")
    row = tab.locator(".tgw-list li").first
    row.hover()
    row.get_by_role("button").click()
    tab.get_by_role("menuitem", name="Delete").click()
    for each in (tab, other):
        expect(each.locator(".tgw-welcome")).to_be_visible()
        expect(each.locator(".tgw-msg")).to_have_count(0)
        assert "#c=" not in each.url
    toast(tab).get_by_role("button", name="Undo").click()
    expect(messages(tab).first).to_have_text("Here")
    expect(reply(tab)).not_to_have_class(re.compile("running"))
    other.locator(".tgw-list li").first.locator("a").click()
    expect(messages(other).first).to_have_text("Here")


def test_values_changed_in_one_browser_are_used_by_the_other(two_browsers, live_server):
    tab, second = two_browsers
    ask(tab, "First")
    other = second()
    with tab.expect_response("**/chat/session?conversation=*"):
        tab.evaluate("window.tgw.set('temperature', 0.33)")
    module = "document.querySelector('script[src*=\"/main.js\"]').src.replace('main.js', 'session.js')"
    until(lambda: other.evaluate(f"async () => (await import({module})).session.values.temperature") == 0.33)
    ask(other, "Second")
    assert live_server.backend.requests[-1].sampling.temperature == 0.33
    assert other.locator(".tgw-toast").count() == 0


def test_two_replies_in_two_chats_never_mix(seeded, voices, new_tab):
    tab, other = seeded, new_tab()
    voices.hold(0)
    for each, text in ((tab, "In the first"), (other, "In the second")):
        send(each, text)
        expect(each.locator(".tgw-msg.running")).to_have_count(1)
    voices.say(0, 1)
    voices.say(0, 1)
    for _ in range(2):  # each tab shows the other's chat for a moment, and comes back
        for each in (tab, other):
            open_chat(each, "In the first")
            open_chat(each, "In the second")
            expect(each.locator(".tgw-msg")).to_have_count(2)
    voices.say(0, 2)
    for each in (tab, other):
        expect(messages(each)).to_have_text(["In the second", "One answer"])
        open_chat(each, "In the first")
        expect(messages(each)).to_have_text(["In the first", "One answer"])


# --- size ----------------------------------------------------------------------------------------------------------------------------------------


def test_a_chat_of_thousands_of_messages_opens_at_its_end(live_server, new_tab):
    tab = new_tab()
    import_chat(live_server, tab, long_chat(live_server.owner(tab), 2_500))
    expect(reply(tab)).to_contain_text("Answer 2499")
    expect(reply(tab)).to_be_in_viewport()
    assert tab.locator(".tgw-msg").count() == 40


def test_messages_on_a_phone(live_server, new_browser, voices):
    context = new_browser(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    tab = context.new_page()
    tab.goto(live_server.url)
    box(tab).wait_for()
    with tab.expect_response("**/chat/session"):
        tab.evaluate("(seed) => window.tgw.set('seed', seed)", FIRST_SEED)
    box(tab).fill("Question")
    tab.locator(".tgw-send").tap()
    expect(messages(tab)).to_have_text(["Question", "One answer"])
    finished(tab)
    small = """[...document.querySelectorAll('.tgw-main button, dialog button, .tgw-menu button')].filter((e) => e.checkVisibility())
        .map((e) => [e.title || e.innerText, Math.round(e.getBoundingClientRect().height)]).filter(([, height]) => height > 0 && height < 40)"""
    assert tab.evaluate(small) == []
    menu_of(tab, reply(tab), "Several answers…", "3 answers")
    expect(columns(tab)).to_have_count(3)
    finished(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    assert columns(tab).first.bounding_box()["width"] > 250
    assert tab.evaluate(small) == []
    columns(tab).nth(2).get_by_role("button", name="Choose this one").tap()
    expect(messages(tab)).to_have_text(["Question", "Three answers"])
    for name in ("Explain", "All branches of this chat"):
        menu_of(tab, reply(tab), name)
        expect(tab.get_by_role("dialog")).to_be_visible()
        assert tab.evaluate("document.querySelector('dialog').scrollWidth") <= 390
        assert tab.evaluate(small) == []
        tab.get_by_role("dialog").get_by_label("Close").first.tap()
