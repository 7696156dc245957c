import gc
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modules import store as store_module
from modules.conversation import Conversation, Message, Summary, new_id
from modules.errors import Busy, DataError, NotFound, UserError
from modules.store import MAX_SESSIONS, MAX_TITLE, MIGRATIONS, Store, clean_title, database, lists, title_from
from modules.store.words import match_expression

ANNA, BERT = "anna", "bert"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "conversations.sqlite3"


@pytest.fixture
def store(path: Path):
    opened = Store.open(path)
    yield opened
    opened.close()


def say(store: Store, *texts: str, owner: str = ANNA, title: str = "") -> Conversation:
    """A stored conversation with these messages, user and assistant in turn."""
    conversation = store.create(owner, title)
    messages = []
    for index, text in enumerate(texts):
        conversation, message = conversation.add("assistant" if index % 2 else "user", text)
        messages.append(message)
    if messages:
        store.add(owner, conversation.id, messages, messages[-1].id)
    return conversation


def found(store: Store, query: str, owner: str = ANNA) -> set[str]:
    return {item.id for item in store.conversations(owner, query).items}


def ids(page) -> list[str]:
    return [item.id for item in page.items]


# The tree


def test_what_is_added_comes_back(store: Store, path: Path):
    conversation = store.create(ANNA, "Greek")
    conversation, question = conversation.add("user", "What is τ?\n\ttab")
    conversation, answer = conversation.add("assistant", "2π", reasoning="hm", details={"seed": 7, "tokens": [1, {"p": 0.5}]})
    store.add(ANNA, conversation.id, [question, answer], answer.id)
    assert store.conversation(ANNA, conversation.id) == conversation
    store.close()
    again = Store.open(path)
    assert again.conversation(ANNA, conversation.id) == conversation
    again.close()


def test_add_is_all_or_nothing(store: Store):
    conversation = say(store, "one")
    _, good = conversation.add("assistant", "two")
    stray = Message(new_id(), "unknown", "user", "three")
    with pytest.raises(NotFound):
        store.add(ANNA, conversation.id, [good, stray], good.id)
    with pytest.raises(NotFound):
        store.add(ANNA, conversation.id, [good], "no such tip")
    with pytest.raises(DataError):
        store.add(ANNA, conversation.id, [good, good], good.id)
    assert store.conversation(ANNA, conversation.id).tip == conversation.tip
    assert len(store.conversation(ANNA, conversation.id).messages) == 1
    assert found(store, "two") == set()


def test_a_message_cannot_hang_on_another_conversations_message(store: Store):
    first, second = say(store, "one"), say(store, "two")
    with pytest.raises(NotFound):
        store.add(ANNA, second.id, [message := Message(new_id(), first.tip, "user", "x")], message.id)
    with pytest.raises(NotFound):
        store.set_tip(ANNA, second.id, first.tip)


def test_pages_of_the_branch_shown(store: Store):
    conversation = say(store, *"abcdefg")
    newest = store.messages(ANNA, conversation.id, limit=3)
    assert [item.message.text for item in newest.items] == ["e", "f", "g"]
    above = store.messages(ANNA, conversation.id, limit=3, before=newest.next)
    assert [item.message.text for item in above.items] == ["b", "c", "d"]
    top = store.messages(ANNA, conversation.id, limit=3, before=above.next)
    assert [item.message.text for item in top.items] == ["a"]
    assert top.next is None
    assert store.messages(ANNA, conversation.id, before=top.items[0].message.id).items == ()
    with pytest.raises(NotFound):
        store.messages(ANNA, conversation.id, before="nonsense")
    assert store.messages(ANNA, store.create(ANNA).id).items == ()


def test_versions_and_swipes(store: Store):
    conversation = say(store, "q", "a1")
    question, first = conversation.path()
    conversation, second = conversation.add_sibling(first.id, "a2")
    store.add(ANNA, conversation.id, [second], second.id)
    conversation, follow = conversation.add("user", "q2")
    store.add(ANNA, conversation.id, [follow], follow.id)

    shown = store.messages(ANNA, conversation.id).items
    assert [(s.message.text, len(s.versions), s.position) for s in shown] == [("q", 1, 0), ("a2", 2, 1), ("q2", 1, 0)]
    assert shown[1].versions == (first.id, second.id)
    store.set_tip(ANNA, conversation.id, first.id)
    assert [s.message.text for s in store.messages(ANNA, conversation.id).items] == ["q", "a1"]
    assert store.show(ANNA, conversation.id, second.id) == follow.id
    assert store.conversation(ANNA, conversation.id).tip == conversation.move_to(second.id).tip == follow.id
    assert store.show(ANNA, conversation.id, question.id) == follow.id

    conversation, edited = conversation.add_sibling(question.id, "Q")
    store.add(ANNA, conversation.id, [edited], edited.id)
    assert store.messages(ANNA, conversation.id).items[0].versions == (question.id, edited.id)


def test_the_newest_page_reads_no_more_rows_in_a_long_conversation(store: Store):
    """The cost is counted in SQLite's own steps, not in time."""

    def steps(conversation_id: str) -> int:
        count = 0

        def tick() -> None:
            nonlocal count
            count += 1

        with store._reading() as db:
            reader = db
        reader.set_progress_handler(tick, 10)
        store.messages(ANNA, conversation_id, limit=20)
        reader.set_progress_handler(None, 0)
        return count

    def chain(length: int) -> Conversation:
        messages = [Message(f"{length}-{i}", f"{length}-{i - 1}" if i else None, "user", "x") for i in range(length)]
        return Conversation(new_id(), ANNA, "t", {m.id: m for m in messages}, messages[-1].id)

    short, long = chain(50), chain(5_000)
    store.import_conversations(ANNA, [short, long])
    assert 0 < steps(long.id) <= 1.1 * steps(short.id)


def test_a_branch_of_100_000_messages(store: Store):
    messages = {str(i): Message(str(i), str(i - 1) if i else None, "user", "deep") for i in range(100_000)}
    store.import_conversations(ANNA, [Conversation("deep", ANNA, "", messages, "99999")])
    assert [s.message.id for s in store.messages(ANNA, "deep", limit=2).items] == ["99998", "99999"]
    assert store.show(ANNA, "deep", "0") == "99999"
    assert len(store.conversation(ANNA, "deep").path()) == 100_000
    assert found(store, "deep") == {"deep"}
    store.delete(ANNA, "deep")
    assert found(store, "deep") == set()


# A running reply


def test_a_running_message_is_saved_and_enters_the_index_when_it_ends(store: Store):
    conversation = say(store, "question")
    _, reply = conversation.add("assistant", "", state="running")
    store.add(ANNA, conversation.id, [reply], reply.id)
    assert store.conversations(ANNA).items[0].running
    assert store.info(ANNA, conversation.id) == store.conversations(ANNA).items[0]
    store.save(replace(reply, text="zebra crossing", reasoning="stripes"))
    assert store.conversation(ANNA, conversation.id)[reply.id].text == "zebra crossing"
    assert found(store, "zebra") == set()
    store.save(replace(reply, text="zebra crossing ahead", state="done", details={"seed": 1}))
    assert found(store, "zebra") == {conversation.id}
    assert not store.conversations(ANNA).items[0].running
    assert store.conversation(ANNA, conversation.id)[reply.id].details == {"seed": 1}
    # Continued: running again, then ended with other words.
    store.save(replace(reply, text="zebra crossing ahead", state="running"))
    assert found(store, "zebra") == set()
    store.save(replace(reply, text="tiger", state="stopped"))
    assert (found(store, "zebra"), found(store, "tiger")) == (set(), {conversation.id})


def test_saving_a_running_message_writes_one_row(store: Store):
    conversation = say(store, "question")
    _, reply = conversation.add("assistant", "", state="running")
    store.add(ANNA, conversation.id, [reply], reply.id)
    statements: list[str] = []
    store._writer.set_trace_callback(statements.append)
    store.save(replace(reply, text="some words"))
    writes = [s for s in statements if not s.startswith(("BEGIN", "SELECT", "COMMIT"))]
    assert len(writes) == 1
    assert writes[0].startswith("UPDATE messages SET text")


def test_saving_a_deleted_message_is_not_found(store: Store):
    conversation = say(store, "question")
    _, reply = conversation.add("assistant", "", state="running")
    store.add(ANNA, conversation.id, [reply], reply.id)
    store.delete(ANNA, conversation.id)
    with pytest.raises(NotFound, match="deleted"):
        store.save(replace(reply, text="late"))


def test_replies_that_nobody_writes_any_more_are_interrupted_and_searchable(path: Path):
    store = Store.open(path)
    conversation = say(store, "question")
    _, reply = conversation.add("assistant", "half a zebra", state="running")
    store.add(ANNA, conversation.id, [reply], reply.id)
    store.close()
    store = Store.open(path)
    assert store.conversation(ANNA, conversation.id)[reply.id] == replace(reply, state="interrupted")
    assert found(store, "zebra") == {conversation.id}
    store.close()


_WRITER = """
import sys
from dataclasses import replace
from pathlib import Path
from modules.store import Store
store = Store.open(Path(sys.argv[1]))
conversation = store.create("anna")
for turn in range(10**9):
    conversation, question = conversation.add("user", f"question {turn}")
    conversation, reply = conversation.add("assistant", "", state="running")
    store.add("anna", conversation.id, [question, reply], reply.id)
    for step in range(5):
        store.save(replace(reply, text=f"word{step} " * 500))
        print(conversation.id, reply.id, step, flush=True)
    store.save(replace(reply, text="finished", state="done"))
"""


@pytest.mark.parametrize("lines", [3, 23])
def test_kill_9_keeps_everything_committed(path: Path, lines: int):
    child = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    assert child.stdout is not None
    try:
        for _ in range(lines):
            conversation_id, reply_id, step = child.stdout.readline().split()
    finally:
        child.kill()
        child.wait(10)
    rest = child.stdout.read().splitlines()
    child.stdout.close()
    if rest and len(rest[-1].split()) == 3:
        conversation_id, reply_id, step = rest[-1].split()
    store = Store.open(path)
    conversation = store.conversation(ANNA, conversation_id)
    reply = conversation[reply_id]
    assert reply.text == "finished" or int(reply.text[4]) >= int(step)
    assert reply.state == ("done" if reply.text == "finished" else "interrupted")
    assert all(m.state in ("done", "interrupted") for m in conversation.messages.values())
    earlier = [m for m in conversation.path() if m.role == "assistant"][: lines // 5]
    assert [m.text for m in earlier if m.id != reply_id] == ["finished"] * len([m for m in earlier if m.id != reply_id])
    assert conversation_id in found(store, "question")
    store.close()
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


# The list


def test_the_list_is_ordered_by_the_last_change_and_paged(store: Store):
    all_ = [say(store, f"chat {i}").id for i in range(7)]
    assert ids(store.conversations(ANNA)) == all_[::-1]
    first = store.conversations(ANNA, limit=3)
    second = store.conversations(ANNA, limit=3, before=first.next)
    third = store.conversations(ANNA, limit=3, before=second.next)
    assert ids(first) + ids(second) + ids(third) == all_[::-1]
    assert third.next is None
    message = Message(new_id(), store.conversation(ANNA, all_[0]).tip, "assistant", "answer")
    store.add(ANNA, all_[0], [message], message.id)
    assert ids(store.conversations(ANNA))[0] == all_[0]
    assert ids(store.conversations(ANNA, limit=0)) == [all_[0]]
    store.save(replace(message, text="better"))
    store.save(replace(store.conversation(ANNA, all_[1]).path()[0], text="edited"))
    assert ids(store.conversations(ANNA, limit=2)) == [all_[1], all_[0]]
    assert store.conversations("nobody").items == store.conversations("nobody", "chat").items == ()


def test_the_order_survives_a_clock_that_jumps_back(store: Store, monkeypatch):
    old = say(store, "old")
    monkeypatch.setattr(store_module.time, "time", lambda: 5.0)
    new = say(store, "new")
    assert ids(store.conversations(ANNA)) == [new.id, old.id]


@pytest.mark.parametrize("before", ["", "x", "-1", "9" * 5000, "１", "1; DROP TABLE messages", "\ud800", "\0"])
def test_a_foreign_cursor_is_refused(store: Store, before: str):
    say(store, "a chat")
    for query in ("", "chat"):
        with pytest.raises(NotFound):
            store.conversations(ANNA, query, before=before)


def test_titles_come_from_the_first_user_message_once(store: Store):
    conversation = say(store, "  How do I\n\tboil an egg\0 so that the yolk stays soft and the white is firm? ", "Six minutes.")
    assert store.conversation(ANNA, conversation.id).title == "How do I boil an egg so that the yolk stays soft and the…"
    assert found(store, "yolk") == {conversation.id}
    _, second = conversation.add("user", "Thanks")
    store.add(ANNA, conversation.id, [second], second.id)
    assert store.conversation(ANNA, conversation.id).title.startswith("How do I")
    store.rename(ANNA, conversation.id, "Eggs")
    assert store.conversations(ANNA).items[0].title == "Eggs"
    assert store.conversation(ANNA, say(store, "hello", title="Mine").id).title == "Mine"


def test_a_chat_that_the_assistant_begins_takes_its_title_from_that(store: Store):
    conversation = store.create(ANNA)
    _, message = conversation.add("assistant", "Welcome aboard")
    store.add(ANNA, conversation.id, [message], message.id)
    assert store.info(ANNA, conversation.id).title == "Welcome aboard"


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("", ""),
        ("short", "short"),
        ("x" * 100, "x" * 60 + "…"),
        ("word " * 12, ("word " * 12).strip()),
        ("a\u202eb\x1b[31m\x00c\u2028d", "ab [31m c d"),
        ("\ud800", "\ufffd"),
    ],
)
def test_a_title_is_one_printable_line(text: str, title: str):
    assert title_from(text) == title
    assert len(clean_title(text * 1000)) <= MAX_TITLE


# Search


def test_search_finds_words_prefixes_and_any_accents(store: Store):
    cafe = say(store, "x", "Das Café in Zürich", title="one")
    other = say(store, "x", "Tee in Zug", title="two")
    assert found(store, "cafe") == found(store, "CAFÉ zu") == found(store, "caf") == {cafe.id}
    assert found(store, "z") == found(store, "in Zu") == {cafe.id, other.id}
    assert found(store, "caf tee") == found(store, "zürich x tee") == set()
    assert found(store, "two") == {other.id}


@pytest.mark.parametrize(
    ("text", "query", "hit"),
    [
        ("我们今天去北京大学", "北京", True),
        ("我们今天去北京大学", "京", True),
        ("我们今天去北京大学", "大北", False),
        ("東京タワーはどこですか", "タワー", True),
        ("학교에서 친구를 만났다", "학교 친구", True),
        ("ภาษาไทยสวยงาม", "ไทย", True),
        ("use vLLM的API now", "的api", True),
    ],
)
def test_scripts_without_spaces_are_found_by_any_part(store: Store, text: str, query: str, hit: bool):
    conversation = say(store, "x", text, title="t")
    assert found(store, query) == ({conversation.id} if hit else set())


def test_results_titles_first_then_the_newest_message_one_row_a_conversation(store: Store):
    by_text = say(store, "x", "apple", "apple", title="fruit")
    by_newer_text = say(store, "x", "apple", title="pie")
    by_title = say(store, "x", title="Apple")
    _, message = by_text.add("user", "an apple again")
    store.add(ANNA, by_text.id, [message], message.id)
    page = store.conversations(ANNA, "apple")
    assert ids(page) == [by_title.id, by_text.id, by_newer_text.id]
    assert page.items[0].snippet == (("Apple", True),)
    assert page.items[1].snippet == (("an ", False), ("apple", True), (" again", False))
    assert (page.items[0].hit, page.items[1].hit) == ("", message.id)
    assert page.next is None
    _, both = by_title.add("user", "apple, as the title says")
    store.add(ANNA, by_title.id, [both], both.id)
    assert [(item.id, item.hit) for item in store.conversations(ANNA, "apple").items][:1] == [(by_title.id, both.id)]


def test_search_is_paged_without_doubles(store: Store):
    all_ = {say(store, "x", "apple", "apple", title="apple" if i % 3 else "t").id for i in range(10)}
    seen: list[str] = []
    cursor = None
    for _ in range(4):
        page = store.conversations(ANNA, "apple", limit=3, before=cursor)
        seen += ids(page)
        cursor = page.next
    assert cursor is None
    assert len(seen) == 10
    assert set(seen) == all_


def test_snippets_are_plain_pieces_around_the_match(store: Store):
    say(store, "x", "lead " * 200 + "北京 <b>needle</b> \x02 \x1f \0" + " tail" * 200, title="t")
    (item,) = store.conversations(ANNA, "needle").items
    text = "".join(piece for piece, _ in item.snippet)
    assert [piece for piece, match in item.snippet if match] == ["needle"]
    assert "北京 <b>needle</b>" in text
    assert not set("\x02\x03\x1f\0") & set(text)
    assert len(text) < 300


def test_a_huge_message_shows_its_beginning(store: Store):
    conversation = say(store, "x", "start " + "word " * 200_000 + "needle", title="t")
    (item,) = store.conversations(ANNA, "needle").items
    assert item.id == conversation.id
    assert item.snippet[0][0].startswith("start word")
    assert sum(len(piece) for piece, _ in item.snippet) <= 200


@pytest.mark.parametrize(
    "query",
    [
        '"',
        '""',
        '"open',
        "a AND",
        "OR",
        "NOT x",
        "NEAR(a b)",
        "text:a",
        "owner:o1",
        "{owner} : o1",
        "a*",
        "*",
        "^a",
        "(",
        "a)(",
        "a\0b",
        "\ud800",
        "-a",
        "'",
        "%",
    ],
)
def test_operators_are_only_text(store: Store, query: str):
    say(store, "owner stays", "text", title="t")
    assert isinstance(store.conversations(ANNA, query).items, tuple)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(), max_size=300))
def test_any_text_is_a_safe_query_title_and_message(store: Store, text: str):
    conversation = say(store, text)
    store.rename(ANNA, conversation.id, text)
    store.conversations(ANNA, text)
    assert store.conversation(ANNA, conversation.id).path()[0].text == store_module.clean(text)


def test_a_query_of_a_megabyte_is_bounded(store: Store):
    say(store, "needle")
    store.conversations(ANNA, "needle " * 150_000)
    assert len(match_expression([1], "abc " * 300_000)) < 2_000
    assert len(match_expression([1], " ".join(f"w{i}" for i in range(10_000)))) < 2_000
    assert match_expression([1], "!!! ***") == match_expression([], "word") == ""


def test_deleted_and_renamed_words_are_gone_from_the_index(store: Store, path: Path):
    conversation = say(store, "x", "zebra", title="tiger")
    store.rename(ANNA, conversation.id, "lion")
    assert found(store, "tiger") == set()
    assert found(store, "lion") == {conversation.id}
    store.delete(ANNA, conversation.id)
    assert found(store, "lion") == found(store, "zebra") == set()
    with pytest.raises(NotFound):
        store.conversation(ANNA, conversation.id)
    for index in ("message_index", "title_index"):
        store._writer.execute(f"CREATE VIRTUAL TABLE temp.{index}_words USING fts5vocab (main, {index}, row)")
        assert store._writer.execute(f"SELECT term FROM {index}_words").fetchall() == []


def test_a_conversation_full_of_the_word_cannot_make_the_search_long(store: Store, monkeypatch):
    monkeypatch.setattr(lists, "_MAX_HITS", 5)
    older = say(store, "x", "apple", title="t")
    newer = say(store, *["apple"] * 10, title="t")
    assert found(store, "apple") == {newer.id}
    assert older.id not in found(store, "apple")


# Owners


def test_another_owners_conversation_is_as_if_absent(store: Store):
    conversation = say(store, "secret")
    _, message = conversation.add("user", "mine now")
    tip = conversation.tip or ""
    for owner, id in ((BERT, conversation.id), (ANNA, "absent"), ("", conversation.id), ("\ud800", "\ud800")):
        attempts = (
            lambda owner=owner, id=id: store.conversation(owner, id),
            lambda owner=owner, id=id: store.info(owner, id),
            lambda owner=owner, id=id: store.messages(owner, id),
            lambda owner=owner, id=id: store.add(owner, id, [message], message.id),
            lambda owner=owner, id=id: store.set_tip(owner, id, tip),
            lambda owner=owner, id=id: store.show(owner, id, tip),
            lambda owner=owner, id=id: store.rename(owner, id, "hacked"),
            lambda owner=owner, id=id: store.delete(owner, id),
            lambda owner=owner, id=id: store.remove(owner, id, tip),
            lambda owner=owner, id=id: store.pin_message(owner, id, tip, True),
            lambda owner=owner, id=id: store.copy_branch(owner, id, tip),
            lambda owner=owner, id=id: store.tree(owner, id),
            lambda owner=owner, id=id: store.arrange(owner, [id], folder="x"),
            lambda owner=owner, id=id: store.settings(owner, id),
            lambda owner=owner, id=id: store.set_settings(owner, id, {"a": 1}),
            lambda owner=owner, id=id: store.summary(owner, id),
            lambda owner=owner, id=id: store.set_summary(owner, id, Summary("s", "m")),
            lambda owner=owner, id=id: store.draft(owner, id),
            lambda owner=owner, id=id: store.save_draft(owner, id, "x"),
            lambda owner=owner, id=id: store.explanations(owner, id, [tip]),
        )
        messages = set()
        for attempt in attempts:
            with pytest.raises(NotFound) as error:
                attempt()
            messages.add(str(error.value))
        assert len(messages) == 1
    say(store, "public", owner=BERT)
    assert found(store, "secret", BERT) == set()
    assert len(store.conversations(BERT).items) == 1
    assert store.conversation(ANNA, conversation.id) == replace(conversation, title="secret")


def test_chats_move_to_the_login_name_and_stay_searchable(store: Store):
    anonymous, second = "cookie-1", "cookie-2"
    mine = say(store, "apple", owner=ANNA)
    one = say(store, "apple pie", owner=anonymous)
    two = say(store, "apple tart", owner=second)
    store.change_owner(anonymous, ANNA)
    store.change_owner(second, ANNA)
    store.change_owner("nobody", ANNA)
    assert ids(store.conversations(ANNA)) == [two.id, one.id, mine.id]
    assert found(store, "apple") == {mine.id, one.id, two.id}
    assert store.conversations(anonymous).items == ()
    assert found(store, "apple", anonymous) == set()
    assert store.conversation(ANNA, one.id).owner == ANNA
    store.delete(ANNA, two.id)
    assert len(store.conversations(ANNA).items) == 2


# Hostile and odd values


def test_nul_surrogates_and_a_megabyte(store: Store):
    conversation = store.create("o\ud800", "t\ud800\0")
    conversation, odd = conversation.add("user", "a\0b\ud800c", reasoning="\udfff", details={"x": "\ud800", "y": {1, 2}, "z": (1,)})
    conversation, huge = conversation.add("assistant", "x😀" * 500_000)
    store.add("o\ud800", conversation.id, [odd, huge], huge.id)
    store.save(replace(odd, text="\ud800 again", state="done"))
    loaded = store.conversation("o\ud800", conversation.id)
    assert loaded[odd.id].text == "\ufffd again"
    assert loaded[odd.id].reasoning == "\ufffd"
    assert loaded[odd.id].details == {"x": "\ufffd", "y": "{1, 2}", "z": [1]}
    assert loaded[huge.id].text == huge.text
    assert found(store, "again", "o\ud800") == {conversation.id}


def test_sessions_are_kept_and_bounded(store: Store, path: Path, monkeypatch):
    assert store.session("a") is None
    store.save_session("a", {"temperature": 0.5})
    store.save_session("a", {"temperature": 0.7, "text": "ü\ud800"})
    assert store.session("a") == {"temperature": 0.7, "text": "ü\ufffd"}
    assert MAX_SESSIONS == 10_000
    monkeypatch.setattr(store_module, "MAX_SESSIONS", 3)
    for key in "bcad":
        store.save_session(key, {"key": key})
    assert [key for key in "abcd" if store.session(key)] == ["a", "c", "d"]


def test_imports_keep_ids_and_end_running_messages(store: Store):
    source = Conversation(new_id(), "somebody", "Imported")
    source, _ = source.add("user", "hello")
    source, second = source.add("assistant", "zebra", state="running")
    store.import_conversations(ANNA, [source])
    stored = store.conversation(ANNA, source.id)
    assert (stored.title, stored.tip, stored.owner) == ("Imported", second.id, ANNA)
    assert stored[second.id].state == "interrupted"
    assert found(store, "zebra") == {source.id}
    cycle = {"a": Message("a", "b", "user", ""), "b": Message("b", "a", "user", "")}
    for bad in (Conversation("cycle", ANNA, "", cycle, "a"), Conversation("tipless", ANNA, "", {}, "nothing")):
        with pytest.raises(NotFound):
            store.import_conversations(ANNA, [bad])
    with pytest.raises(DataError):
        store.import_conversations(ANNA, [source])
    assert len(store.conversations(ANNA).items) == 1


# Threads


def test_forty_threads_write_and_read_at_once(store: Store):
    def work(number: int) -> str:
        owner = f"owner {number}"
        conversation = say(store, f"hello {number}", owner=owner)
        conversation, reply = conversation.add("assistant", "", state="running")
        store.add(owner, conversation.id, [reply], reply.id)
        for step in range(5):
            store.save(replace(reply, text=f"{number} " * step))
            assert len(store.messages(owner, conversation.id).items) == 2
        store.save(replace(reply, text=f"ends{number}", state="done"))
        return conversation.id if found(store, f"ends{number}", owner) == {conversation.id} else "lost"

    with ThreadPoolExecutor(40) as pool:
        done = list(pool.map(work, range(40)))
    assert len(set(done)) == 40
    assert "lost" not in done


def test_dead_threads_leave_no_connections(store: Store, path: Path):
    say(store, "hello")
    for _ in range(30):
        thread = threading.Thread(target=store.conversations, args=(ANNA,))
        thread.start()
        thread.join(10)
    gc.collect()

    def file(connection):
        with suppress(sqlite3.ProgrammingError):  # another test's, closed
            return connection.execute("PRAGMA database_list").fetchone()["file"]

    connections = [o for o in gc.get_objects() if isinstance(o, database.Connection)]
    assert 0 < sum(file(each) == str(path) for each in connections) <= 1 + database.READERS


def test_readers_do_not_wait_for_the_writer(store: Store):
    conversation = say(store, "hello")
    with store._writing() as db:
        db.execute("UPDATE conversations SET title = 'half done'")
        assert store.conversation(ANNA, conversation.id).title == "hello"


def test_no_connection_comes_free(store: Store, monkeypatch):
    monkeypatch.setattr(database, "_WAIT", 0.01)
    with store._writing(), pytest.raises(Busy):
        store.create(ANNA)
    taken = [store._readers.get(timeout=1) for _ in range(database.READERS)]
    with pytest.raises(Busy):
        store.conversations(ANNA)
    for reader in taken:
        store._readers.put(reader)
    assert store.conversations(ANNA).items == ()


# The file


def test_closing_twice_is_allowed_and_calls_after_it_say_so(store: Store):
    store.close()
    store.close()
    for call in (lambda: store.create(ANNA), lambda: store.conversations(ANNA)):
        with pytest.raises(DataError, match="closed"):
            call()


def test_wal_and_full_synchronisation(store: Store):
    assert store._writer.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert store._writer.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert store._writer.execute("PRAGMA foreign_keys").fetchone()[0] == 1


@pytest.mark.parametrize("damage", ["garbage", "truncated", "foreign", "newer", "directory"])
def test_a_file_that_cannot_be_used_is_named_and_untouched(path: Path, damage: str):
    if damage == "garbage":
        path.write_bytes(os.urandom(10_000))
    elif damage == "directory":
        path.mkdir()
    elif damage == "foreign":
        other = sqlite3.connect(path)
        other.executescript("CREATE TABLE notes (text)")
        other.close()
    else:
        store = Store.open(path)
        say(store, *["some words"] * 500)
        store.close()
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:9000])
        else:
            other = sqlite3.connect(path)
            other.execute("PRAGMA user_version = 99")
            other.close()
    before = path.read_bytes() if path.is_file() else b""
    words = {"newer": "Update the program", "foreign": "another program", "directory": "cannot be opened"}.get(damage, "damaged")
    with pytest.raises(DataError, match=words) as error:
        Store.open(path)
    assert str(path) in str(error.value)
    assert (path.read_bytes() if path.is_file() else b"") == before


def test_an_empty_file_is_a_new_store(path: Path):
    path.touch()
    store = Store.open(path)
    assert store.conversations(ANNA).items == ()
    store.close()


@pytest.mark.parametrize(
    ("pragma", "words"),
    [("max_page_count = 1", "Free some space"), ("query_only = ON", "writable")],
)
def test_a_disk_that_refuses_is_a_named_error_and_what_was_there_stays(store: Store, pragma: str, words: str):
    conversation = say(store, "hello")
    _, reply = conversation.add("assistant", "", state="running")
    store.add(ANNA, conversation.id, [reply], reply.id)
    store._writer.execute(f"PRAGMA {pragma}")
    with pytest.raises(DataError, match=words):
        store.save(replace(reply, text="x" * 1_000_000, state="done"))
    assert store.conversation(ANNA, conversation.id)[reply.id].text == ""
    store._writer.execute("PRAGMA max_page_count = 4294967294")
    store._writer.execute("PRAGMA query_only = OFF")
    store.save(replace(reply, text="kept", state="done"))
    assert found(store, "kept") == {conversation.id}


def test_a_lock_of_another_program_is_a_named_error(path: Path, monkeypatch):
    monkeypatch.setattr(database, "_BUSY", 0.01)
    store = Store.open(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DataError, match="another program holds it"):
        store.create(ANNA)
    with pytest.raises(DataError, match="another program holds it"):
        Store.open(path)
    other.execute("ROLLBACK")
    store.create(ANNA)
    other.close()
    store.close()


def test_an_unknown_error_of_sqlite_is_still_a_user_error(store: Store):
    with pytest.raises(UserError, match="no such table"), store._reading() as db:
        db.execute("SELECT * FROM absent")


# Migrations

_NEXT = "ALTER TABLE conversations ADD COLUMN colour TEXT NOT NULL DEFAULT 'blue'"
_NEWER = len(MIGRATIONS) + 1


@pytest.fixture
def former(path: Path) -> str:
    """A file of the schema of today with one conversation; its id."""
    store = Store.open(path)
    conversation = say(store, "old words")
    store.close()
    return conversation.id


def test_a_migration_keeps_a_copy_and_the_data(path: Path, former: str):
    store = Store.open(path, (*MIGRATIONS, _NEXT))
    assert found(store, "words") == {former}
    assert store._writer.execute("SELECT colour FROM conversations").fetchone()[0] == "blue"
    store.close()
    copy = path.with_name(f"conversations.sqlite3.before-v{_NEWER}")
    another = shutil.copy(copy, path.with_name("former.sqlite3"))
    store = Store.open(Path(another))
    assert found(store, "words") == {former}
    store.close()
    written = copy.read_bytes()
    Store.open(path, (*MIGRATIONS, _NEXT)).close()
    assert copy.read_bytes() == written
    assert sorted(p.name for p in path.parent.iterdir() if p.name.startswith(path.name)) == [path.name, copy.name]


def test_a_migration_that_fails_changes_nothing_and_names_the_copy(path: Path, former: str):
    with pytest.raises(DataError, match=f"before-v{_NEWER + 1}") as error:
        Store.open(path, (*MIGRATIONS, _NEXT, "CREATE TABLE half (a); SELECT * FROM absent"))
    assert "unchanged" in str(error.value)
    raw = sqlite3.connect(path)
    assert raw.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
    assert raw.execute("SELECT count(*) FROM sqlite_master WHERE name = 'half'").fetchone() == (0,)
    raw.close()
    store = Store.open(path)
    assert found(store, "words") == {former}
    store.close()


def test_a_first_schema_that_fails_is_a_named_error(path: Path):
    with pytest.raises(DataError, match="no such table"):
        Store.open(path, ("SELECT * FROM absent",))


_VERSION_1 = """
    INSERT INTO owners (name) VALUES ('anna'), ('bert');
    INSERT INTO conversations (id, owner, title, tip, changed, turn) VALUES
        ('c1', 1, 'Greek letters', 'm3', 20.5, 1), ('c2', 2, '', NULL, 30.5, 2), ('c3', 1, 'Later', 'm4', 40.5, 3);
    INSERT INTO messages (id, conversation, parent, role, created, state, details, reasoning, text) VALUES
        ('m1', 1, NULL, 'user', 10.5, 'done', '{}', '', 'What is tau?'),
        ('m2', 1, 'm1', 'assistant', 11.5, 'stopped', '{"seed":7}', 'hm', 'Half of it'),
        ('m3', 1, 'm1', 'assistant', 12.5, 'running', '{"model":"m"}', '', 'Two pi'),
        ('m4', 3, NULL, 'user', 0.0, 'done', '{}', '', 'zebra');
    INSERT INTO title_index (rowid, owner, text) SELECT number, owner, text FROM title_search;
    INSERT INTO message_index (rowid, owner, text) SELECT number, owner, text FROM message_search WHERE number <> 3;
    INSERT INTO sessions VALUES ('key', '{"values":{"temperature":0.5}}', 9.5);
"""


def test_a_file_of_the_first_version_keeps_everything(path: Path):
    raw = Store._opened(path, MIGRATIONS[:1])
    raw.executescript(_VERSION_1)
    raw.close()
    store = Store.open(path)
    messages = (
        Message("m1", None, "user", "What is tau?", "", 10.5),
        Message("m2", "m1", "assistant", "Half of it", "hm", 11.5, "stopped", {"seed": 7}),
        Message("m3", "m1", "assistant", "Two pi", "", 12.5, "interrupted", {"model": "m"}),
    )
    assert store.conversation(ANNA, "c1") == Conversation("c1", ANNA, "Greek letters", {m.id: m for m in messages}, "m3")
    assert ids(store.conversations(ANNA)) == ["c3", "c1"]
    assert [(item.updated, item.created) for item in store.conversations(ANNA).items] == [(40.5, 40.5), (20.5, 10.5)]
    assert store.conversation(BERT, "c2") == Conversation("c2", BERT)
    assert (found(store, "tau"), found(store, "greek"), found(store, "two"), found(store, "zebra")) == ({"c1"}, {"c1"}, {"c1"}, {"c3"})
    assert store.session("key") == {"values": {"temperature": 0.5}}
    assert store.settings(ANNA, "c1") == {}
    assert store.summary(ANNA, "c1") is None
    assert store.folders(ANNA) == ([], [])
    assert ids(store.conversations(ANNA, folder="")) == ["c3", "c1"]
    number = store.delete(ANNA, "c1")
    assert store.restore(ANNA, number) == "c1"
    assert store._writer.execute("PRAGMA foreign_key_check").fetchall() == []
    store.close()
    assert path.with_name(f"conversations.sqlite3.before-v{len(MIGRATIONS)}").exists()
