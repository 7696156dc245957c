"""What the store keeps for the chat besides messages: order in the list, values, drafts, explanations, the trash; and stores in memory."""

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from modules import store as store_module
from modules.conversation import Conversation, Message, Summary, new_id
from modules.errors import DataError, NameError_, NotFound, PromptTooLong
from modules.store import INCOGNITO, MAX_NAME, MAX_TAGS, Store, Trashed, trash
from tests.test_store import ANNA, BERT, found, ids, path, say, store

__all__ = ["path", "store"]  # fixtures

DAY = 24 * 3600


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    now = store_module.time.time()
    monkeypatch.setattr(store_module.time, "time", lambda: now + seconds)


# The list


def test_folders_tags_and_pins_choose_and_order(store: Store):
    a, b, c, d = (say(store, f"chat {i}").id for i in range(4))
    store.arrange(ANNA, [a, b], folder="Work", add_tags=["red", "blue"])
    store.arrange(ANNA, [c], folder="Home", tags=["red"])
    store.arrange(ANNA, [a], pinned=True)
    assert ids(store.conversations(ANNA)) == [a, d, c, b]
    assert ids(store.conversations(ANNA, folder="Work")) == [a, b]
    assert ids(store.conversations(ANNA, folder="")) == [d]
    assert ids(store.conversations(ANNA, tag="red")) == [a, c, b]
    assert ids(store.conversations(ANNA, folder="Work", tag="red")) == [a, b]
    assert ids(store.conversations(ANNA, folder="Home", tag="blue")) == ids(store.conversations(ANNA, folder="work")) == []
    assert store.folders(ANNA) == ([("Home", 1), ("Work", 2)], [("blue", 2), ("red", 3)])
    info = store.info(ANNA, a)
    assert (info.folder, info.pinned, info.tags) == ("Work", True, ("blue", "red"))
    assert 0 < info.created <= info.updated
    store.arrange(ANNA, [a, b], folder="", pinned=False, remove_tags=["red", "absent"])
    assert ids(store.conversations(ANNA)) == [d, c, b, a]
    assert store.folders(ANNA) == ([("Home", 1)], [("blue", 2), ("red", 1)])
    store.arrange(ANNA, [a], tags=[])
    assert store.info(ANNA, a).tags == ()
    assert store.folders(BERT) == ([], [])


def test_arranging_is_all_or_nothing_and_bounded(store: Store):
    a = say(store, "a").id
    with pytest.raises(NotFound):
        store.arrange(ANNA, [a, "absent"], folder="x")
    with pytest.raises(NameError_, match=str(MAX_TAGS)):
        store.arrange(ANNA, [a], folder="x", add_tags=[f"t{i}" for i in range(MAX_TAGS + 1)])
    assert store.info(ANNA, a).folder == ""
    assert store.info(ANNA, a).tags == ()
    store.arrange(ANNA, [a], folder="a\nb\x1f\ud800" + "x" * 500, add_tags=["", " \n", "a\x1fb", "a b"])
    assert store.info(ANNA, a).folder == ("a b \ufffd" + "x" * 500)[:MAX_NAME]
    assert store.info(ANNA, a).tags == ("a b",)


def test_pinned_ones_are_on_the_first_page_beyond_its_limit(store: Store):
    all_ = [say(store, f"chat {i}").id for i in range(12)]
    pinned = all_[::3]
    store.arrange(ANNA, pinned, pinned=True)
    first = store.conversations(ANNA, limit=3)
    assert ids(first) == [*pinned[::-1], *[id for id in all_[::-1] if id not in pinned][:3]]
    seen, cursor = ids(first), first.next
    while cursor:
        page = store.conversations(ANNA, limit=3, before=cursor)
        assert 0 < len(page.items) <= 3
        seen, cursor = seen + ids(page), page.next
    assert sorted(seen) == sorted(all_)
    store.arrange(ANNA, [all_[0]], folder="f")
    assert ids(store.conversations(ANNA, folder="f", limit=3)) == [all_[0]]


def test_of_many_pinned_ones_the_rest_is_on_later_pages(store: Store, monkeypatch):
    monkeypatch.setattr(store_module.lists, "MAX_PINNED", 2)
    all_ = [say(store, f"chat {i}").id for i in range(6)]
    store.arrange(ANNA, all_, pinned=True)
    first = store.conversations(ANNA, limit=1)
    assert ids(first) == all_[:2:-1]
    assert ids(store.conversations(ANNA, before=first.next)) == all_[2::-1]


def test_a_page_after_another_misses_nothing_when_the_list_changes_between(store: Store):
    all_ = [say(store, f"chat {i}").id for i in range(6)]
    first = store.conversations(ANNA, limit=2)
    store.delete(ANNA, all_[4])
    moved = Message(new_id(), store.conversation(ANNA, all_[0]).tip, "user", "x")
    store.add(ANNA, all_[0], [moved], moved.id)
    assert ids(store.conversations(ANNA, before=first.next)) == all_[3:0:-1]


@pytest.mark.parametrize(
    "before", ["1", "2_1_1_1", "0_1_x_1", "0_1_1e999_1", "0_1_nan_1", "0_1_1_1_1", "0_" + "9" * 50 + "_1_1", "0_1_1_-1", "0__1_1"]
)
def test_a_foreign_cursor_of_the_list_is_refused_or_harmless(store: Store, before: str):
    say(store, "a chat")
    try:
        assert len(store.conversations(ANNA, before=before).items) <= 1
    except NotFound as error:
        assert "Reload" in str(error)


def test_imported_conversations_stand_where_their_time_is(store: Store):
    def old(day: float) -> Conversation:
        message = Message(new_id(), None, "user", f"day {day}", created=day * DAY)
        return Conversation(new_id(), ANNA, str(day), {message.id: message}, message.id)

    now = say(store, "now").id
    five, three, four, undated = old(5), old(3), old(4), old(0)
    store.import_conversations(ANNA, [five, three, four])
    assert ids(store.conversations(ANNA)) == [now, five.id, four.id, three.id]
    store.import_conversations(ANNA, [undated])
    newest = say(store, "newest").id
    assert ids(store.conversations(ANNA)) == [newest, undated.id, now, five.id, four.id, three.id]
    pages, cursor = [], None
    for _ in range(6):
        page = store.conversations(ANNA, limit=1, before=cursor)
        pages, cursor = [*pages, *ids(page)], page.next
    assert pages == [newest, undated.id, now, five.id, four.id, three.id]
    assert cursor is None
    assert store.info(ANNA, four.id).created == store.info(ANNA, four.id).updated == 4 * DAY


def test_a_search_within_a_folder_or_a_tag(store: Store):
    by_title, by_text, outside = say(store, "x", title="apple").id, say(store, "x", "apple", title="t").id, say(store, "apple", "apple").id
    store.arrange(ANNA, [by_title, by_text], folder="f", add_tags=["t"])
    assert ids(store.conversations(ANNA, "apple", folder="f")) == ids(store.conversations(ANNA, "apple", tag="t")) == [by_title, by_text]
    assert ids(store.conversations(ANNA, "apple", folder="")) == [outside]
    assert ids(store.conversations(ANNA, "apple", folder="f", tag="other")) == []
    first = store.conversations(ANNA, "apple", limit=1, folder="f")
    assert ids(store.conversations(ANNA, "apple", limit=1, folder="f", before=first.next)) == [by_text]


def test_ten_thousand_conversations_are_listed_by_an_index(store: Store):
    """Rows are not sorted: a page costs what its rows cost, whatever stands behind it."""
    for chosen in (store_module.Filter([1]), store_module.Filter([1], "f"), store_module.Filter([1], None, "t")):
        where, values = chosen.sql()
        order = "ORDER BY c.pinned DESC, c.turn DESC, c.changed DESC, c.number DESC LIMIT 50"
        for place in ("", "AND (c.pinned, c.turn, c.changed, c.number) < (0, 5, 5.5, 5)"):
            sql = f"EXPLAIN QUERY PLAN {store_module.lists.INFO} WHERE {where} {place} {order}"
            with store._reading() as db:
                plan = [row["detail"] for row in db.execute(sql, values)]
            assert not any("TEMP B-TREE" in step or step.startswith("SCAN") for step in plan), plan


# Values of a conversation


def test_settings_and_summaries(store: Store, path: Path):
    plain, own = store.create(ANNA), store.create(ANNA, "own", {"mode": "chat", "temperature": 0.5})
    assert own.settings == {"mode": "chat", "temperature": 0.5}
    assert store.conversation(ANNA, own.id) == own
    assert (store.settings(ANNA, plain.id), store.settings(ANNA, own.id)) == ({}, {"mode": "chat", "temperature": 0.5})
    store.set_settings(ANNA, own.id, {"name1": "Ä\ud800", "stop": ("a", "b")})
    assert store.settings(ANNA, own.id) == {"name1": "Ä\ufffd", "stop": ["a", "b"]}
    assert store.summary(ANNA, own.id) is None
    store.set_summary(ANNA, own.id, Summary("They met.", "m"))
    assert store.summary(ANNA, own.id) == Summary("They met.", "m")
    assert store.summary(ANNA, plain.id) is None
    assert ids(store.conversations(ANNA)) == [own.id, plain.id]
    store.set_summary(ANNA, own.id, None)
    assert store.summary(ANNA, own.id) is None


def test_a_message_stays_pinned_while_its_reply_is_written_and_unpinned_too(store: Store):
    conversation = say(store, "question")
    conversation, reply = conversation.add("assistant", "", state="running", details={"seed": 1})
    store.add(ANNA, conversation.id, [reply], reply.id)
    store.pin_message(ANNA, conversation.id, reply.id, True)
    store.save(replace(reply, text="half"))
    assert store.conversation(ANNA, conversation.id)[reply.id].details == {"seed": 1, "pinned": True}
    store.save(replace(reply, text="whole", state="done", details={"seed": 2}))
    pinned = store.conversation(ANNA, conversation.id)[reply.id]
    assert pinned.details == {"seed": 2, "pinned": True}
    store.pin_message(ANNA, conversation.id, reply.id, False)
    store.save(replace(pinned, text="again"))
    assert store.conversation(ANNA, conversation.id)[reply.id].details == {"seed": 2}
    with pytest.raises(NotFound):
        store.pin_message(ANNA, conversation.id, "absent", True)


def test_the_tree_view_gets_beginnings(store: Store):
    conversation = say(store, "q" * 1000, "answer")
    conversation, other = conversation.add_sibling(conversation.tip or "", "other", state="stopped")
    store.add(ANNA, conversation.id, [other], other.id)
    nodes, tip = store.tree(ANNA, conversation.id)
    assert tip == other.id
    assert [n.text for n in nodes] == ["q" * 80, "answer", "other"]
    assert [(n.role, n.state) for n in nodes] == [("user", "done"), ("assistant", "done"), ("assistant", "stopped")]
    assert [n.parent for n in nodes] == [None, nodes[0].id, nodes[0].id]
    assert nodes[2].created == other.created
    assert store.tree(ANNA, store.create(ANNA).id) == ([], None)


# Copies


def test_a_branch_becomes_a_conversation(store: Store):
    conversation = say(store, "q", "a1", "q2", title="Talk")
    _, first, _ = conversation.path()
    conversation, second = conversation.add_sibling(first.id, "a2", details={"group": "g", "seed": 3}, reasoning="hm")
    store.add(ANNA, conversation.id, [second], second.id)
    store.set_settings(ANNA, conversation.id, {"mode": "chat"})
    store.arrange(ANNA, [conversation.id], folder="f", pinned=True, add_tags=["t"])
    store.save_explanation(first.id, "not on the way", b"")
    store.save_explanation(second.id, "the prompt", b"tokens")
    before = store.conversation(ANNA, conversation.id)

    copy = store.copy_branch(ANNA, conversation.id, second.id)
    assert store.conversation(ANNA, copy.id) == copy
    assert store.conversation(ANNA, conversation.id) == before
    assert (copy.title, copy.folder, copy.tags, copy.pinned, copy.settings) == ("Talk (branch)", "f", ("t",), False, {"mode": "chat"})
    one, two = copy.path()
    assert [(m.role, m.text, m.reasoning, m.details) for m in (one, two)] == [("user", "q", "", {}), ("assistant", "a2", "hm", {"seed": 3})]
    assert {one.id, two.id}.isdisjoint(before.messages)
    assert store.explanations(ANNA, copy.id, [one.id, two.id]) == {two.id: ("the prompt", b"tokens")}
    assert found(store, "a2") == {conversation.id, copy.id}
    assert ids(store.conversations(ANNA))[1] == copy.id  # the newest, below the pinned one
    assert store.copy_branch(ANNA, copy.id, one.id).title == "Talk (branch)"
    with pytest.raises(NotFound):
        store.copy_branch(ANNA, conversation.id, one.id)


def test_a_summary_goes_with_the_branch_that_it_tells_of(store: Store):
    conversation = say(store, "q", "a", "q2")
    root, reply, _ = conversation.path()
    store.set_summary(ANNA, conversation.id, Summary("They met.", reply.id))
    copy = store.copy_branch(ANNA, conversation.id, reply.id)
    assert store.summary(ANNA, copy.id) == copy.summary == Summary("They met.", copy.tip)
    assert store.copy_branch(ANNA, conversation.id, root.id).summary is None


def test_a_copy_of_what_is_being_written_is_interrupted(store: Store):
    conversation = say(store, "q", title="x" * 500)
    _, reply = conversation.add("assistant", "half", state="running")
    store.add(ANNA, conversation.id, [reply], reply.id)
    copy = store.copy_branch(ANNA, conversation.id, reply.id)
    assert copy.path()[1].state == "interrupted"
    assert found(store, "half") == {copy.id}
    assert len(copy.title) == store_module.MAX_TITLE
    assert store.conversation(ANNA, copy.id) == copy


# The trash


def family(store: Store) -> tuple[Conversation, dict[str, str]]:
    """root -> (a1 -> q2 -> b1, a2, a3); a2 is shown. With what hangs on it."""
    conversation = say(store, "root", "a1", "q2", "b1", title="Family")
    names = {m.text: m.id for m in conversation.path()}
    for text in ("a2", "a3"):
        conversation, message = conversation.add_sibling(names["a1"], text)
        store.add(ANNA, conversation.id, [message], message.id)
        names[text] = message.id
    store.set_tip(ANNA, conversation.id, names["a2"])
    for text, id in names.items():
        store.save_explanation(id, f"prompt of {text}", text.encode())
    return store.conversation(ANNA, conversation.id), names


@pytest.mark.parametrize(
    ("removed", "tip", "shown", "left"),
    [
        ("a2", "a2", "b1", ["root", "a1", "q2", "b1", "a3"]),  # the version before, down to its newest leaf
        ("a1", "b1", "a2", ["root", "a2", "a3"]),  # of the first version the one after
        ("a3", "a3", "a2", ["root", "a1", "q2", "b1", "a2"]),
        ("b1", "b1", "q2", ["root", "a1", "q2", "a2", "a3"]),  # no other version: what stands above
        ("q2", "b1", "a1", ["root", "a1", "a2", "a3"]),
        ("a1", "a3", "a3", ["root", "a2", "a3"]),  # not shown: nothing moves
        ("root", "a2", None, []),
    ],
)
def test_a_message_goes_with_all_below_it_and_comes_back(store: Store, removed: str, tip: str, shown: str | None, left: list[str]):
    conversation, names = family(store)
    store.set_tip(ANNA, conversation.id, names[tip])
    before = store.conversation(ANNA, conversation.id)
    number = store.remove(ANNA, conversation.id, names[removed])
    after = store.conversation(ANNA, conversation.id)
    assert [m.text for m in after.messages.values()] == left
    assert after.tip == (names[shown] if shown else None)
    assert set(store.explanations(ANNA, conversation.id, names.values())) == {names[text] for text in left}
    for text in names:
        assert found(store, text) == ({conversation.id} if text in left else set())
    (kept,) = store.trash(ANNA)
    assert kept == Trashed(number, "messages", removed, conversation.id, kept.removed)
    assert store.trash(BERT) == []

    assert store.restore(ANNA, number) == conversation.id
    again = store.conversation(ANNA, conversation.id)
    assert again == before
    assert list(again.messages) == list(before.messages)
    assert store.explanations(ANNA, conversation.id, names.values()) == {id: (f"prompt of {text}", text.encode()) for text, id in names.items()}
    assert all(found(store, text) == {conversation.id} for text in names)
    assert store.trash(ANNA) == []
    with pytest.raises(NotFound, match="not in the trash any more"):
        store.restore(ANNA, number)


def test_what_comes_back_shows_itself_only_if_it_was_shown(store: Store):
    conversation, names = family(store)
    hidden = store.remove(ANNA, conversation.id, names["a3"])
    shown = store.remove(ANNA, conversation.id, names["a2"])
    store.restore(ANNA, hidden)
    assert store.conversation(ANNA, conversation.id).tip == names["b1"]
    store.restore(ANNA, shown)
    assert store.conversation(ANNA, conversation.id).tip == names["a2"]


def test_a_branch_comes_back_only_where_it_hung(store: Store):
    conversation, names = family(store)
    below = store.remove(ANNA, conversation.id, names["q2"])
    above = store.remove(ANNA, conversation.id, names["a1"])
    whole = store.delete(ANNA, conversation.id)
    with pytest.raises(NotFound, match="conversation of these messages is deleted"):
        store.restore(ANNA, below)
    store.restore(ANNA, whole)
    with pytest.raises(NotFound, match="stood above"):
        store.restore(ANNA, below)
    assert len(store.trash(ANNA)) == 2
    store.restore(ANNA, above)
    store.restore(ANNA, below)
    assert {m.text for m in store.conversation(ANNA, conversation.id).messages.values()} == set(names)


def test_a_conversation_comes_back_as_it_was(store: Store):
    older = say(store, "older").id
    conversation, names = family(store)
    store.arrange(ANNA, [conversation.id], folder="f", add_tags=["t", "u"])
    store.set_settings(ANNA, conversation.id, {"mode": "chat"})
    store.set_summary(ANNA, conversation.id, Summary("s", "m"))
    store.save_draft(ANNA, conversation.id, "not sent yet")
    newer = say(store, "newer").id
    before, info = store.conversation(ANNA, conversation.id), store.info(ANNA, conversation.id)

    number = store.delete(ANNA, conversation.id)
    assert store.trash(ANNA) == [Trashed(number, "conversation", "Family", conversation.id, store.trash(ANNA)[0].removed)]
    assert ids(store.conversations(ANNA)) == [newer, older]
    assert found(store, "family") == found(store, "b1") == set()
    assert store.folders(ANNA) == ([], [])
    with pytest.raises(NotFound):
        store.draft(ANNA, conversation.id)
    with pytest.raises(NotFound):
        store.restore(BERT, number)

    assert store.restore(ANNA, number) == conversation.id
    assert store.conversation(ANNA, conversation.id) == before
    assert store.info(ANNA, conversation.id) == info
    assert ids(store.conversations(ANNA)) == [newer, conversation.id, older]
    assert (store.draft(ANNA, conversation.id), store.settings(ANNA, conversation.id)) == ("not sent yet", {"mode": "chat"})
    assert store.summary(ANNA, conversation.id) == Summary("s", "m")
    assert len(store.explanations(ANNA, conversation.id, names.values())) == len(names)
    assert found(store, "family") == found(store, "b1") == {conversation.id}
    store.rename(ANNA, conversation.id, "Other")
    assert found(store, "family") == set()


def test_a_restored_conversation_writes_over_nothing(store: Store):
    conversation, _ = family(store)
    number = store.delete(ANNA, conversation.id)
    taken = say(Store.open_memory(), "mine")
    store.import_conversations(BERT, [replace(taken, id=conversation.id)])
    with pytest.raises(DataError):
        store.restore(ANNA, number)
    assert [kept.number for kept in store.trash(ANNA)] == [number]
    assert len(store.conversations(ANNA).items) == 0


def test_numbers_of_the_trash_from_outside(store: Store):
    for number in (0, -1, 5, 10**30):
        with pytest.raises(NotFound):
            store.restore(ANNA, number)


def test_a_reply_that_was_being_written_comes_back_interrupted_and_searchable(store: Store):
    conversation = say(store, "question")
    _, reply = conversation.add("assistant", "half a zebra", state="running")
    store.add(ANNA, conversation.id, [reply], reply.id)
    for number in (store.remove(ANNA, conversation.id, reply.id), None):
        number = number or store.delete(ANNA, conversation.id)
        with pytest.raises(NotFound, match="deleted"):
            store.save(replace(reply, text="more"))
        with pytest.raises(NotFound, match="deleted"):
            store.save_explanation(reply.id, "p", b"t")
        store.restore(ANNA, number)
        assert store.conversation(ANNA, conversation.id)[reply.id] == replace(reply, state="interrupted")
        assert found(store, "zebra") == {conversation.id}


def test_the_trash_empties_after_thirty_days(store: Store, path: Path, monkeypatch):
    first, second, third = (say(store, f"chat {i}") for i in range(3))
    number = store.delete(ANNA, first.id)
    later(monkeypatch, 29 * DAY)
    younger = store.remove(ANNA, second.id, second.tip or "")
    assert [kept.number for kept in store.trash(ANNA)] == [younger, number]
    later(monkeypatch, 2 * DAY)
    newest = store.delete(ANNA, third.id)
    assert [kept.number for kept in store.trash(ANNA)] == [newest, younger]
    store.close()
    later(monkeypatch, 28 * DAY + 60)
    again = Store.open(path)
    assert [kept.number for kept in again.trash(ANNA)] == [newest]
    again.close()
    assert trash.KEPT_SECONDS == 30 * DAY


def test_emptying_the_trash_is_for_its_owner(store: Store):
    store.delete(ANNA, say(store, "a").id)
    number = store.delete(BERT, say(store, "b", owner=BERT).id)
    store.empty_trash(ANNA)
    assert store.trash(ANNA) == []
    assert [kept.number for kept in store.trash(BERT)] == [number]
    assert len(store.trash(BERT, limit=1)) == 1


def test_the_trash_and_drafts_follow_the_owner(store: Store):
    conversation, _ = family(store)
    number = store.delete(ANNA, conversation.id)
    store.save_draft(ANNA, None, "typed before the login")
    say(store, "x", owner=BERT)
    store.change_owner(ANNA, BERT)
    assert store.trash(ANNA) == []
    assert store.restore(BERT, number) == conversation.id
    assert store.draft(BERT, None) == "typed before the login"
    store.save_draft(BERT, None, "")
    assert store.draft(BERT, None) == ""


def test_removing_a_branch_of_100_000_messages(store: Store):
    messages = {str(i): Message(str(i), str(i - 1) if i else None, "user", "deep") for i in range(100_000)}
    store.import_conversations(ANNA, [Conversation("deep", ANNA, "", messages, "99999")])
    number = store.remove(ANNA, "deep", "1")
    assert [m.id for m in store.conversation(ANNA, "deep").messages.values()] == ["0"]
    store.restore(ANNA, number)
    assert store.conversation(ANNA, "deep").messages == messages


def test_a_full_disk_takes_nothing_away(store: Store):
    conversation = say(store, "x" * 1_000_000, "zebra")
    store._writer.execute("PRAGMA max_page_count = 1")  # as many as there are
    for take in (lambda: store.delete(ANNA, conversation.id), lambda: store.remove(ANNA, conversation.id, conversation.path()[0].id)):
        with pytest.raises(DataError, match="Free some space"):
            take()
    assert len(store.conversation(ANNA, conversation.id).messages) == 2
    assert found(store, "zebra") == {conversation.id}
    assert store.trash(ANNA) == []


# Drafts


def test_drafts(store: Store, monkeypatch):
    one, two = say(store, "one").id, say(store, "two").id
    assert store.draft(ANNA, one) == store.draft(ANNA, None) == store.draft("nobody", None) == ""
    store.save_draft(ANNA, one, "first\0\ud800")
    store.save_draft(ANNA, one, "second")
    store.save_draft(ANNA, None, "new chat")
    assert (store.draft(ANNA, one), store.draft(ANNA, two), store.draft(ANNA, None)) == ("second", "", "new chat")
    assert store.draft(BERT, None) == ""
    assert ids(store.conversations(ANNA)) == [two, one]
    with pytest.raises(PromptTooLong, match="400,000"):
        store.save_draft(ANNA, one, "x" * 400_001)
    store.save_draft(ANNA, one, "")
    assert store.draft(ANNA, one) == ""
    monkeypatch.setattr(store_module, "MAX_DRAFTS", 2)
    store.save_draft(ANNA, one, "1")
    store.save_draft(ANNA, two, "2")
    assert (store.draft(ANNA, one), store.draft(ANNA, two), store.draft(ANNA, None)) == ("1", "2", "")


# Explanations


def test_explanations_belong_to_their_message(store: Store):
    mine, other = say(store, "a", "b"), say(store, "c", owner=BERT)
    question, answer = mine.path()
    store.save_explanation(answer.id, "the prompt\ud800", bytes(range(256)))
    store.save_explanation(answer.id, "the prompt", bytes(range(256)))
    store.save_explanation(other.tip or "", "p", b"")
    assert store.explanations(ANNA, mine.id, [question.id, answer.id, other.tip or "", "absent"]) == {answer.id: ("the prompt", bytes(range(256)))}
    assert store.explanations(ANNA, mine.id, []) == {}
    with pytest.raises(NotFound):
        store.save_explanation("absent", "p", b"")
    store.save(replace(answer, text="other"))
    assert answer.id in store.explanations(ANNA, mine.id, [answer.id])
    store.delete(ANNA, mine.id)
    assert store._writer.execute("SELECT count(*) FROM explanations").fetchone()[0] == 1


def test_a_chat_of_200_turns_with_explanations_grows_linearly(store: Store):
    def pages() -> int:
        return store._writer.execute("PRAGMA page_count").fetchone()[0]

    conversation = store.create(ANNA)
    sizes = [pages()]
    for turn in range(200):
        conversation, question = conversation.add("user", f"question {turn} " + "word " * 100)
        conversation, answer = conversation.add("assistant", "", state="running")
        store.add(ANNA, conversation.id, [question, answer], answer.id)
        for part in range(3):
            store.save(replace(answer, text="some words " * 50 * part))
        store.save(replace(answer, text="some words " * 200, state="done"))
        # What is said of a prompt names the messages in it; only what stands in no message is kept as text.
        store.save_explanation(answer.id, f'{{"base":"{question.id}","more":"{"x" * 200}"}}', b"t" * 2000)
        if turn in (99, 199):
            sizes.append(pages())
    first, second = sizes[1] - sizes[0], sizes[2] - sizes[1]
    assert second <= 1.1 * first
    assert second * 4096 < 100 * 12_000


# Imports


def test_what_was_imported_is_remembered(store: Store, path: Path):
    assert not store.imported("a")
    store.mark_imported(["a", "b"])
    store.mark_imported(iter(["b", "c\ud800"]))
    store.close()
    again = Store.open(path)
    assert [again.imported(key) for key in ("a", "b", "c\ud800", "d")] == [True, True, True, False]
    again.close()


def test_an_import_keeps_folder_tags_and_values_and_writes_over_nothing(store: Store):
    conversation = Conversation(new_id(), BERT, "t", {}, None, {"mode": "chat"}, "a\nfolder", ("b", "a", "", "a"), True)
    store.import_conversations(ANNA, [conversation])
    assert store.conversation(ANNA, conversation.id) == replace(conversation, owner=ANNA, folder="a folder", tags=("a", "b"))
    with pytest.raises(DataError):
        store.import_conversations(ANNA, [replace(conversation, title="other")])
    assert store.conversation(ANNA, conversation.id).title == "t"
    store.import_conversations(ANNA, [replace(conversation, id=new_id(), tags=tuple(map(str, range(1000))))])
    assert len(store.conversations(ANNA, folder="a folder").items) == 2
    assert len(store.folders(ANNA)[1]) == MAX_TAGS + 2


# In memory


def test_a_store_in_memory_does_all_of_it_and_leaves_no_file(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store.open_memory()
    conversation, names = family(store)
    assert conversation.id.startswith(INCOGNITO)
    assert found(store, "b1") == {conversation.id}
    number = store.remove(ANNA, conversation.id, names["a1"])
    assert number > trash.FIRST_IN_MEMORY
    store.restore(ANNA, number)
    assert store.conversation(ANNA, conversation.id) == conversation
    assert store.copy_branch(ANNA, conversation.id, names["root"]).id.startswith(INCOGNITO)
    store.save_draft(ANNA, conversation.id, "secret")
    for row in store._writer.execute("PRAGMA database_list"):
        assert row["file"] == ""
    assert store._writer.execute("PRAGMA temp_store").fetchone()[0] == 2
    store.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="closed"):
        store.conversations(ANNA)


def test_what_is_deleted_in_memory_is_gone_for_good():
    store = Store.open_memory()
    conversation, names = family(store)
    branch = store.remove(ANNA, conversation.id, names["a1"])
    number = store.delete(ANNA, conversation.id)
    assert store.trash(ANNA) == []
    for each in (branch, number):
        with pytest.raises(NotFound):
            store.restore(ANNA, each)
    store.close()


def test_two_stores_in_memory_are_two():
    one, two = Store.open_memory(), Store.open_memory()
    say(one, "secret")
    assert two.conversations(ANNA).items == ()
    one.close()
    two.close()


def test_threads_share_a_store_in_memory():
    store = Store.open_memory()

    def work(number: int) -> int:
        conversation = say(store, f"hello {number}", f"word{number}x")
        assert found(store, f"word{number}x") == {conversation.id}
        return len(store.messages(ANNA, conversation.id).items)

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(work, range(60))) == [2] * 60
    store.close()


# Several at once


def test_undo_pressed_twice_at_once_restores_once(store: Store):
    numbers = [store.delete(ANNA, say(store, f"chat {i}").id) for i in range(10)]
    results: list[str] = []
    start = threading.Barrier(4)

    def press() -> None:
        start.wait(10)
        for number in numbers:
            with suppress(NotFound):
                results.append(store.restore(ANNA, number))

    threads = [threading.Thread(target=press) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(results) == len(set(results)) == len(store.conversations(ANNA).items) == 10


def test_the_file_is_sound_after_all_that(store: Store, path: Path):
    conversation, names = family(store)
    store.remove(ANNA, conversation.id, names["a1"])
    store.restore(ANNA, store.delete(ANNA, conversation.id))
    store.close()
    raw = sqlite3.connect(path)
    assert raw.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert raw.execute("PRAGMA foreign_key_check").fetchall() == []
    raw.close()
