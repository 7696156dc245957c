"""The list of conversations in a real browser: dates, folders, tags, several at once, the trash, files."""

import json
import re
from dataclasses import replace
from datetime import datetime, timedelta
from urllib.parse import parse_qs, urlparse

import pytest

from modules import transfer
from modules.conversation import Conversation, new_id
from tests.fakes import until
from tests.ui.acting import ask, box, user

pytestmark = pytest.mark.browser

expect = pytest.importorskip("playwright.sync_api").expect
expect.set_options(timeout=20_000)

LETTERS = ("Alpha", "Beta", "Gamma", "Delta")


def rows(tab):
    return tab.locator(".tgw-list li")


def store(live_server, tab, *titles, text="word", when=None, **fields):
    """Conversations as they would come from a file, the first one newest; the list then shows them. Their ids, by title."""
    found = []
    for n, title in enumerate(titles):
        conversation, message = Conversation(new_id(), live_server.owner(tab), title, **fields).add("user", text)
        created = (when or datetime.now()).timestamp() - n
        found.append(Conversation(conversation.id, conversation.owner, title, {message.id: replace(message, created=created)}, message.id, **fields))
    live_server.app.store.import_conversations(live_server.owner(tab), reversed(found))
    return {conversation.title: conversation.id for conversation in found}


def listed(live_server, new_tab, *titles, **fields):
    tab = new_tab()
    store(live_server, tab, *titles, **fields)
    tab.reload()
    expect(rows(tab)).to_have_count(min(len(titles), 50))
    return tab


def title(tab):
    return tab.locator(".tgw-list .tgw-title")


def row(tab, name):
    return tab.locator(".tgw-list li").filter(has=tab.locator(".tgw-title", has_text=re.compile(f"^{re.escape(name)}$")))


def choose(tab, name, *items):
    """Click through the menu of a row."""
    row(tab, name).hover()
    row(tab, name).locator(".tgw-tools button").click()
    for item in items:
        tab.get_by_role("menuitem", name=item, exact=True).click()


def of_list(tab, item):
    tab.get_by_label("Menu of the list").click()
    tab.get_by_role("menuitem", name=item, exact=True).click()


def dialog(tab):
    return tab.locator("dialog.tgw-dialog")


def chips(tab):
    return tab.locator(".tgw-filter")


def headings(tab):
    return tab.locator(".tgw-when")


def info(live_server, tab, name):
    owner = live_server.owner(tab)
    return next(item for item in live_server.app.store.conversations(owner).items if item.title == name)


# --- dates ------------------------------------------------------------------------------------------------------------------------------


def test_conversations_stand_under_their_days(live_server, new_tab):
    tab = new_tab()
    now = datetime.now()
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    ages = {
        "today": now,
        "yesterday": midnight - timedelta(hours=1),
        "five days": midnight - timedelta(days=5),
        "twenty days": midnight - timedelta(days=20),
    }
    for name, when in ages.items():
        store(live_server, tab, name, when=when)
    store(live_server, tab, "old", when=datetime(2024, 3, 5, 12))
    store(live_server, tab, "older", when=datetime(2024, 2, 5, 12))
    tab.reload()
    expect(headings(tab)).to_have_text(["Today", "Yesterday", "Previous 7 days", "Previous 30 days", "March 2024", "February 2024"])
    expect(title(tab)).to_have_text([*ages, "old", "older"])


@pytest.mark.parametrize(("seconds", "key"), [(0, "today"), (-1, "yesterday"), (-86_400, "yesterday"), (-86_401, "week"), (3600, "today")])
def test_the_borders_of_the_days(live_server, new_tab, seconds, key):
    tab = new_tab()
    found = tab.evaluate(
        """async (seconds) => {
            const script = document.querySelector('script[src$="main.js"]').src;
            const { groupOf } = await import(script.replace('main.js', 'dates.js'));
            const now = new Date(2025, 5, 10, 15);
            return groupOf({ updated: new Date(2025, 5, 10).getTime() / 1000 + seconds }, now).key;
        }""",
        seconds,
    )
    assert found == key


def test_a_new_message_moves_a_conversation_to_today(live_server, new_tab):
    tab = listed(live_server, new_tab, "old", when=datetime(2024, 3, 5, 12))
    expect(headings(tab)).to_have_text(["March 2024"])
    row(tab, "old").locator("a").click()
    ask(tab, "again")
    expect(headings(tab)).to_have_text(["Today"])
    expect(title(tab)).to_have_text(["old"])


@pytest.fixture
def ten_thousand(new_browser, live_server):
    """A tab whose list is told of 10,000 conversations, one an hour; `asked` are the cursors that it asked with."""
    tab = new_browser().new_page()
    newest = datetime(2024, 12, 31, 23).timestamp()
    info = {"snippet": [], "running": False, "folder": "", "pinned": False, "tags": [], "incognito": False}
    tab.asked = []

    def answer(route):
        first = int(parse_qs(urlparse(route.request.url).query).get("before", ["0"])[0])
        tab.asked.append(first)
        numbers = range(first, min(first + 50, 10_000))
        items = [{"id": f"{n:032x}", "title": f"chat {n:05}", "updated": newest - 3600 * n, **info} for n in numbers]
        route.fulfill(json={"items": items, "next": str(first + 50) if first < 9_950 else None})

    tab.route(re.compile(r"/chat/conversations\?"), answer)
    tab.goto(live_server.url)
    expect(rows(tab)).to_have_count(50)
    return tab


def test_ten_thousand_conversations_come_page_by_page_under_their_months(ten_thousand):
    tab = ten_thousand
    assert tab.asked == [0]
    expect(headings(tab)).to_have_text(["December 2024"])
    for page in (1, 2, 3):
        rows(tab).last.scroll_into_view_if_needed()
        tab.wait_for_function(f"document.querySelectorAll('.tgw-list li').length > {50 * page}")
    of_list(tab, "Select…")
    tab.get_by_role("button", name="All", exact=True).click()
    expect(tab.locator(".tgw-chosen")).to_contain_text("10000 selected")
    assert tab.asked == list(range(0, 10_000, 50))
    assert title(tab).all_text_contents() == [f"chat {n:05}" for n in range(10_000)]
    assert headings(tab).all_text_contents()[:3] == ["December 2024", "November 2024", "October 2024"]
    assert headings(tab).count() == 14


# --- folders, tags, pin -----------------------------------------------------------------------------------------------------------------


def test_pin_and_unpin(live_server, new_tab):
    tab = listed(live_server, new_tab, *LETTERS)
    choose(tab, "Gamma", "Pin")
    expect(headings(tab)).to_have_text(["Pinned", "Today"])
    expect(title(tab)).to_have_text(["Gamma", "Alpha", "Beta", "Delta"])
    tab.reload()
    expect(title(tab)).to_have_text(["Gamma", "Alpha", "Beta", "Delta"])
    choose(tab, "Gamma", "Unpin")
    expect(title(tab)).to_have_text([*LETTERS])
    expect(headings(tab)).to_have_text(["Today"])


def test_a_new_folder_and_an_old_one(live_server, new_tab):
    tab = listed(live_server, new_tab, *LETTERS)
    expect(chips(tab)).to_have_count(0)
    choose(tab, "Beta", "Move to folder…")
    tab.keyboard.type("Work")
    tab.keyboard.press("Enter")
    expect(chips(tab)).to_have_text(["Work1"])
    choose(tab, "Delta", "Move to folder…")
    dialog(tab).get_by_role("button", name="Work 1").click()
    expect(chips(tab)).to_have_text(["Work2"])
    chips(tab).first.click()
    expect(title(tab)).to_have_text(["Beta", "Delta"])
    choose(tab, "Beta", "Move to folder…")
    dialog(tab).get_by_role("button", name="No folder").click()
    expect(title(tab)).to_have_text(["Delta"])
    chips(tab).first.click()
    expect(title(tab)).to_have_text([*LETTERS])
    assert info(live_server, tab, "Delta").folder == "Work"


def test_a_filter_ends_with_its_last_conversation(live_server, new_tab):
    tab = listed(live_server, new_tab, *LETTERS)
    choose(tab, "Beta", "Move to folder…")
    tab.keyboard.type("Work")
    tab.keyboard.press("Enter")
    chips(tab).first.click()
    expect(title(tab)).to_have_text(["Beta"])
    row(tab, "Beta").locator("a").focus()
    tab.keyboard.press("Delete")
    expect(title(tab)).to_have_text(["Alpha", "Gamma", "Delta"])
    expect(chips(tab)).to_have_count(0)


def test_tags_are_set_shown_and_clicked(live_server, new_tab):
    tab = listed(live_server, new_tab, *LETTERS)
    choose(tab, "Beta", "Tags…")
    tab.keyboard.type("red")
    tab.keyboard.press("Enter")
    tab.keyboard.type("blue")
    dialog(tab).get_by_role("button", name="Save").click()
    expect(row(tab, "Beta").locator(".tgw-tag")).to_have_text(["blue", "red"])
    expect(chips(tab)).to_have_text(["blue1", "red1"])
    choose(tab, "Delta", "Tags…")
    dialog(tab).get_by_label("red").check()
    dialog(tab).get_by_role("button", name="Save").click()
    expect(chips(tab)).to_have_text(["blue1", "red2"])
    row(tab, "Delta").locator(".tgw-tag").click()
    expect(title(tab)).to_have_text(["Beta", "Delta"])
    expect(chips(tab).last).to_have_attribute("aria-pressed", "true")
    choose(tab, "Beta", "Tags…")
    dialog(tab).get_by_label("red").uncheck()
    dialog(tab).get_by_role("button", name="Save").click()
    expect(title(tab)).to_have_text(["Delta"])
    assert info(live_server, tab, "Beta").tags == ("blue",)


def test_a_row_dragged_onto_a_folder(live_server, new_tab):
    tab = listed(live_server, new_tab, *LETTERS)
    choose(tab, "Beta", "Move to folder…")
    tab.keyboard.type("Work")
    tab.keyboard.press("Enter")
    expect(chips(tab)).to_have_text(["Work1"])
    row(tab, "Delta").locator("a").drag_to(chips(tab).first)
    expect(chips(tab)).to_have_text(["Work2"])
    assert info(live_server, tab, "Delta").folder == "Work"


def test_folders_and_tags_are_renamed_and_removed(live_server, new_tab):
    tab = listed(live_server, new_tab, *LETTERS, folder="Work", tags=("red",))
    expect(chips(tab)).to_have_text(["Work4", "red4"])
    of_list(tab, "Folders and tags…")
    dialog(tab).get_by_label("Rename Work").click()
    tab.keyboard.type("Play")
    tab.keyboard.press("Enter")
    expect(dialog(tab).locator("li")).to_have_text(["Play4", "red4"])
    dialog(tab).get_by_label("Remove red").click()
    expect(chips(tab)).to_have_count(2)
    dialog(tab).get_by_text("Remove? The conversations stay.").click()
    expect(dialog(tab).locator("li")).to_have_text(["Play4"])
    tab.keyboard.press("Escape")
    expect(chips(tab)).to_have_text(["Play4"])
    assert {(info(live_server, tab, name).folder, info(live_server, tab, name).tags) for name in LETTERS} == {("Play", ())}


def test_other_tabs_see_what_is_arranged(live_server, new_tab):
    first, second = listed(live_server, new_tab, *LETTERS), new_tab()
    choose(first, "Gamma", "Pin")
    choose(first, "Beta", "Move to folder…")
    first.keyboard.type("Work")
    first.keyboard.press("Enter")
    expect(title(second)).to_have_text(["Gamma", "Alpha", "Beta", "Delta"])
    expect(chips(second)).to_have_text(["Work1"])


# --- deleting and bringing back -----------------------------------------------------------------------------------------------------------


def test_delete_and_undo(live_server, new_tab):
    tab = listed(live_server, new_tab, *LETTERS)
    row(tab, "Beta").locator("a").click()
    expect(user(tab)).to_contain_text("word")
    tab.keyboard.press("Delete")
    expect(title(tab)).to_have_text(["Alpha", "Gamma", "Delta"])
    expect(tab.locator(".tgw-welcome")).to_be_visible()
    tab.get_by_role("button", name="Undo").click()
    expect(title(tab)).to_have_text([*LETTERS])
    expect(user(tab)).to_contain_text("word")  # what was shown is shown again
    expect(row(tab, "Beta")).to_have_class(re.compile("current"))


def test_focus_goes_on_after_a_deletion(live_server, new_tab):
    tab = listed(live_server, new_tab, *LETTERS)
    row(tab, "Beta").locator("a").focus()
    tab.keyboard.press("Delete")
    expect(row(tab, "Gamma").locator("a")).to_be_focused()
    tab.keyboard.press("End")
    tab.keyboard.press("Delete")
    expect(row(tab, "Gamma").locator("a")).to_be_focused()
    expect(title(tab)).to_have_text(["Alpha", "Gamma"])


def test_the_trash_gives_back_and_is_emptied_at_the_second_click(live_server, new_tab):
    tab = listed(live_server, new_tab, *LETTERS)
    for name in ("Alpha", "Beta"):
        choose(tab, name, "Delete")
        expect(row(tab, name)).to_have_count(0)
    of_list(tab, "Trash…")
    expect(dialog(tab).locator(".tgw-line")).to_have_count(2)
    dialog(tab).get_by_label("Restore Alpha").click()
    expect(title(tab)).to_have_text(["Alpha", "Gamma", "Delta"])
    dialog(tab).get_by_role("button", name="Empty the trash").click()
    assert len(live_server.app.store.trash(live_server.owner(tab))) == 1
    dialog(tab).get_by_role("button", name=re.compile("Click again")).click()
    expect(dialog(tab)).to_contain_text("The trash is empty.")
    assert live_server.app.store.trash(live_server.owner(tab)) == []


def test_what_was_restored_can_be_opened_from_the_trash(live_server, new_tab):
    tab = listed(live_server, new_tab, *LETTERS)
    choose(tab, "Beta", "Delete")
    of_list(tab, "Trash…")
    dialog(tab).get_by_label("Restore Beta").click()
    dialog(tab).get_by_role("button", name="Open").click()
    expect(dialog(tab)).to_have_count(0)
    expect(row(tab, "Beta")).to_have_class(re.compile("current"))


def test_an_empty_trash_says_so(live_server, new_tab):
    tab = new_tab()
    of_list(tab, "Trash…")
    expect(dialog(tab)).to_contain_text("The trash is empty.")
    expect(dialog(tab).get_by_role("button", name="Empty the trash")).to_be_hidden()


# --- several ----------------------------------------------------------------------------------------------------------------------------


def test_several_are_chosen_moved_and_deleted(live_server, new_tab):
    tab = listed(live_server, new_tab, *LETTERS)
    row(tab, "Alpha").locator("a").click(modifiers=["Control"])
    row(tab, "Gamma").locator("a").click(modifiers=["Shift"])
    expect(tab.locator(".tgw-chosen")).to_contain_text("3 selected")
    row(tab, "Beta").locator("a").click()
    expect(tab.locator(".tgw-chosen")).to_contain_text("2 selected")
    bar = tab.get_by_role("toolbar", name="Selected conversations")
    bar.get_by_role("button", name="Move").click()
    tab.keyboard.type("Work")
    tab.keyboard.press("Enter")
    expect(chips(tab)).to_have_text(["Work2"])
    bar.get_by_role("button", name="Delete").click()
    expect(title(tab)).to_have_text(["Beta", "Delta"])
    expect(bar).to_be_hidden()
    tab.get_by_role("button", name="Undo").click()
    expect(title(tab)).to_have_text([*LETTERS])


def test_several_by_keyboard(live_server, new_tab):
    tab = listed(live_server, new_tab, *LETTERS)
    row(tab, "Alpha").locator("a").focus()
    tab.keyboard.press("Space")
    expect(row(tab, "Alpha").get_by_role("checkbox")).to_be_checked()
    tab.keyboard.press("Shift+ArrowDown")
    expect(tab.locator(".tgw-chosen")).to_contain_text("2 selected")
    tab.keyboard.press("Control+a")
    expect(tab.locator(".tgw-chosen")).to_contain_text("4 selected")
    tab.keyboard.press("Escape")
    expect(tab.locator(".tgw-selected")).to_be_hidden()
    expect(tab.get_by_role("checkbox")).to_have_count(0)


def test_all_reaches_beyond_what_is_loaded(live_server, new_tab):
    tab = listed(live_server, new_tab, *(f"chat {n:03}" for n in range(120)), when=datetime(2024, 3, 5, 12))
    of_list(tab, "Select…")
    tab.get_by_role("button", name="All", exact=True).click()
    expect(tab.locator(".tgw-chosen")).to_contain_text("120 selected")
    tab.get_by_role("toolbar").get_by_role("button", name="Delete").click()
    expect(rows(tab)).to_have_count(0)
    assert not live_server.app.store.conversations(live_server.owner(tab)).items


def test_tags_that_only_some_have_stay_so(live_server, new_tab):
    tab = new_tab()
    store(live_server, tab, "Alpha", tags=("red",))
    store(live_server, tab, "Beta", tags=("blue",))
    tab.reload()
    expect(rows(tab)).to_have_count(2)
    of_list(tab, "Select…")
    tab.keyboard.press("Control+a")
    expect(tab.locator(".tgw-chosen")).to_contain_text("2 selected")
    tab.get_by_role("toolbar").get_by_role("button", name="Tag").click()
    dialog(tab).get_by_label("red").check()
    dialog(tab).get_by_role("button", name="Save").click()
    until(lambda: tab.evaluate("1") and info(live_server, tab, "Beta").tags == ("blue", "red"))
    assert info(live_server, tab, "Alpha").tags == ("red",)


# --- files ------------------------------------------------------------------------------------------------------------------------------


def exported(*titles):
    made = []
    for name in titles:
        conversation, _ = Conversation(new_id(), "somebody", name).add("user", f"About {name}")
        made.append(conversation)
    return {"name": f"{titles[0]}.json", "mimeType": "application/json", "buffer": transfer.to_json(made).encode()}


def test_files_are_imported_and_the_first_is_opened(live_server, new_tab):
    tab = new_tab()
    bad = {"name": "bad.json", "mimeType": "application/json", "buffer": b"{"}
    with tab.expect_file_chooser() as chooser:
        of_list(tab, "Import…")
    chooser.value.set_files([exported("One", "Two"), bad, exported("Three")])
    expect(tab.locator(".tgw-toast.done")).to_contain_text("3 imported")
    expect(tab.locator(".tgw-toast.error")).to_contain_text("bad.json")
    expect(rows(tab)).to_have_count(3)
    expect(user(tab)).to_contain_text("About One")


def test_files_are_dropped_onto_the_list(live_server, new_tab):
    tab = new_tab()
    data = tab.evaluate_handle(
        """(text) => { const data = new DataTransfer(); data.items.add(new File([text], 'chats.json')); return data; }""",
        exported("Dropped")["buffer"].decode(),
    )
    tab.dispatch_event(".tgw-side", "dragover", {"dataTransfer": data})
    expect(tab.locator(".tgw-drop")).to_be_visible()
    tab.dispatch_event(".tgw-side", "drop", {"dataTransfer": data})
    expect(tab.locator(".tgw-drop")).to_be_hidden()
    expect(title(tab)).to_have_text(["Dropped"])


def test_one_and_all_are_exported(live_server, new_tab, tmp_path):
    tab = listed(live_server, new_tab, *LETTERS)
    with tab.expect_download() as one:
        choose(tab, "Beta", "Export as Markdown")
    assert one.value.suggested_filename == "Beta.md"
    assert "word" in one.value.path().read_text()
    of_list(tab, "Export all…")
    with tab.expect_download() as everything:
        dialog(tab).get_by_role("button", name=re.compile("JSON")).click()
    saved = everything.value.path().read_bytes()
    assert {each["title"] for each in json.loads(saved)["conversations"]} == set(LETTERS)
    assert len(transfer.read(saved, everything.value.suggested_filename, "me")) == 4


# --- search, incognito, keys, hostile names ------------------------------------------------------------------------------------------------


def test_enter_opens_the_first_hit_and_escape_clears(live_server, new_tab):
    tab = listed(live_server, new_tab, *LETTERS)
    field = tab.locator(".tgw-search input")
    field.fill("gamma")
    field.press("Enter")
    expect(row(tab, "Gamma")).to_have_class(re.compile("current"))
    expect(headings(tab)).to_have_count(0)
    field.focus()
    field.press("Escape")
    expect(field).to_have_value("")
    expect(title(tab)).to_have_text([*LETTERS])
    field.fill("nowhere")
    expect(tab.locator(".tgw-none")).to_contain_text("Nothing found")


def test_a_hit_is_opened_at_its_message_on_whatever_branch_it_is(live_server, new_tab):
    tab = new_tab()
    conversation = Conversation(new_id(), live_server.owner(tab), "Long")
    for n in range(120):
        conversation, _ = conversation.add(("user", "assistant")[n % 2], "a needle" if n == 3 else f"hay {n}")
    side = replace(conversation, tip=conversation.path()[10].id)
    conversation = replace(side.add("user", "a thimble")[0], tip=conversation.tip)
    live_server.app.store.import_conversations(live_server.owner(tab), [conversation])
    tab.reload()
    for word in ("needle", "thimble"):
        tab.locator(".tgw-search input").fill(word)
        tab.locator(".tgw-snippet", has_text=word).click()
        expect(tab.locator(".tgw-msg.found", has_text=f"a {word}")).to_be_in_viewport()


def test_what_was_searched_for_is_seen_in_the_hit(live_server, new_tab):
    tab = new_tab()
    ask(tab, "In addition to sharing stories of the old kingdom there was one about a dragon and its gold")
    tab.locator(".tgw-search input").fill("dragon")
    mark, line = (tab.locator(f".tgw-snippet{inner}").bounding_box() for inner in (" mark", ""))
    assert line["x"] <= mark["x"] and mark["x"] + mark["width"] <= line["x"] + line["width"]


def test_an_incognito_chat_stands_on_top_and_is_not_kept(live_server, new_tab):
    tab = listed(live_server, new_tab, *LETTERS)
    choose(tab, "Beta", "Pin")
    of_list(tab, "Incognito chat")
    ask(tab, "A secret")
    expect(headings(tab).first).to_have_text("Incognito")
    expect(title(tab).first).to_have_text("A secret")
    expect(title(tab).first.locator("svg")).to_be_visible()
    assert live_server.app.store.conversations(live_server.owner(tab), "secret").items == ()
    rows(tab).first.locator("a").focus()
    tab.keyboard.press("Delete")
    dialog(tab).get_by_role("button", name="Cancel").click()
    expect(title(tab).first).to_have_text("A secret")
    rows(tab).first.locator("a").focus()
    tab.keyboard.press("Delete")
    dialog(tab).get_by_role("button", name="Delete").click()
    expect(title(tab).first).to_have_text("Beta")
    expect(tab.locator(".tgw-toast.done")).not_to_contain_text("Undo")


def test_the_list_is_one_stop_of_tab(live_server, new_tab):
    tab = listed(live_server, new_tab, *LETTERS)
    tab.locator(".tgw-search input").focus()
    tab.keyboard.press("Tab")
    expect(row(tab, "Alpha").locator("a")).to_be_focused()
    tab.keyboard.press("ArrowDown")
    expect(row(tab, "Beta").locator("a")).to_be_focused()
    tab.keyboard.press("Tab")
    expect(row(tab, "Beta").locator(".tgw-tools button")).to_be_focused()
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("menuitem", name="Rename")).to_be_focused()
    tab.keyboard.press("Escape")
    tab.keyboard.press("Tab")
    assert not tab.evaluate("document.querySelector('.tgw-list').contains(document.activeElement)")
    row(tab, "Beta").locator("a").focus()
    tab.keyboard.press("Shift+F10")
    expect(tab.get_by_role("menuitem", name="Rename")).to_be_focused()


def test_right_click_opens_the_menu(live_server, new_tab):
    tab = listed(live_server, new_tab, *LETTERS)
    row(tab, "Gamma").click(button="right")
    tab.get_by_role("menuitem", name="Rename").click()
    tab.locator(".tgw-rename").fill("Gamma ray")
    tab.keyboard.press("Enter")
    expect(title(tab)).to_have_text(["Alpha", "Beta", "Gamma ray", "Delta"])
    expect(row(tab, "Gamma ray").locator("a")).to_be_focused()


def test_hostile_names_are_only_text(live_server, new_tab):
    evil = "<img src=x onerror=window.hacked=1>"
    tab = listed(live_server, new_tab, evil, folder=evil, tags=(evil,))
    expect(title(tab)).to_have_text([evil])
    expect(chips(tab)).to_have_count(2)
    chips(tab).first.click()
    of_list(tab, "Folders and tags…")
    expect(dialog(tab).locator("li").first).to_contain_text(evil)
    tab.keyboard.press("Escape")
    choose(tab, evil, "Delete")
    of_list(tab, "Trash…")
    expect(dialog(tab).locator(".tgw-line")).to_contain_text(evil)
    assert tab.evaluate("window.hacked") is None
    assert tab.locator(".tgw-side img, dialog img").count() == 0


def test_a_list_without_a_server_says_so_and_keeps_its_rows(live_server, new_tab):
    tab = listed(live_server, new_tab, *LETTERS)
    tab.context.set_offline(True)
    row(tab, "Beta").locator("a").focus()
    tab.keyboard.press("Delete")
    expect(tab.locator(".tgw-toast.error").first).to_contain_text("cannot be reached")
    expect(title(tab)).to_have_text([*LETTERS])
    tab.context.set_offline(False)


# --- touch ------------------------------------------------------------------------------------------------------------------------------


def test_everything_can_be_touched_on_a_phone(live_server, new_browser):
    context = new_browser(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    tab = context.new_page()
    tab.goto(live_server.url)
    box(tab).wait_for()
    store(live_server, tab, *LETTERS, folder="Work", tags=("red", "blue"))
    tab.reload()
    tab.get_by_label("Show conversations").tap()
    expect(rows(tab)).to_have_count(4)
    expect(chips(tab)).to_have_count(3)
    small = """(within) => [...document.querySelectorAll(within + ' :is(button, a, label, input[type=text])')]
        .filter((e) => e.checkVisibility() && e.offsetHeight && e.offsetHeight < 40).map((e) => [e.title || e.innerText, e.offsetHeight])"""
    assert tab.evaluate(small, ".tgw-side") == []
    row(tab, "Beta").locator(".tgw-tools button").tap()
    assert tab.evaluate(small, ".tgw-menu") == []
    tab.get_by_role("menuitem", name="Select", exact=True).tap()
    row(tab, "Delta").locator("a").tap()
    expect(tab.locator(".tgw-chosen")).to_contain_text("2 selected")
    assert tab.evaluate(small, ".tgw-side") == []
    tab.get_by_role("toolbar").get_by_role("button", name="Tag").tap()
    expect(dialog(tab).get_by_label("red")).to_be_checked()
    assert tab.evaluate(small, ".tgw-dialog") == []
    tab.keyboard.press("Escape")
    tab.get_by_role("toolbar").get_by_role("button", name="Delete").tap()
    expect(title(tab)).to_have_text(["Alpha", "Gamma"])
    tab.get_by_role("button", name="Undo").tap()  # the drawer does not hide it
    expect(title(tab)).to_have_text([*LETTERS])
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    row(tab, "Alpha").locator("a").tap()
    expect(tab.locator(".tgw-side")).to_be_hidden()


def test_a_conversation_that_is_written_in_can_be_deleted(live_server, new_tab):
    live_server.hold("One ", "two")
    tab = new_tab()
    box(tab).fill("Count")
    box(tab).press("Enter")
    live_server.say(1)
    expect(tab.locator(".tgw-msg.assistant")).to_contain_text("One")
    expect(rows(tab).first).to_have_class(re.compile("running"))
    choose(tab, "Count", "Delete")
    expect(rows(tab)).to_have_count(0)
    expect(tab.locator(".tgw-welcome")).to_be_visible()
    until(lambda: tab.evaluate("1") and live_server.backend.closed == 1)
    tab.get_by_role("button", name="Undo").click()
    expect(title(tab)).to_have_text(["Count"])
