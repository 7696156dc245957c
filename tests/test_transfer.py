import json
from copy import deepcopy
from datetime import datetime, timezone
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from modules import transfer
from modules.conversation import Conversation, Message, Summary, new_id
from modules.errors import DataError
from modules.paths import safe_name
from modules.replies import Stats
from modules.store import MAX_NAME, MAX_TAGS, Store, clean_title
from modules.transfer import FORMAT, file_name, read, to_json, to_markdown

ANNA = "anna"


def take(document, name: str = "file.json") -> list[Conversation]:
    """What `read` makes of a JSON value, or of a list of lines."""
    return read(json.dumps(document).encode(), name, ANNA)


def lines(*values) -> bytes:
    return "\n".join(json.dumps(value) for value in values).encode()


def shape(conversation: Conversation):
    """A conversation with places instead of ids."""
    place = {None: None, **{id: number for number, id in enumerate(conversation.messages)}}
    rows = [(place[m.parent], m.role, m.text, m.reasoning, m.created, m.state, dict(m.details)) for m in conversation.messages.values()]
    return conversation.title, place[conversation.tip], rows


def branch(conversation: Conversation) -> list[tuple[str, str]]:
    return [(m.role, m.text) for m in conversation.path()]


def versions(conversation: Conversation, place: int) -> list[str]:
    """Texts of the versions of a message of the branch shown."""
    return [conversation[id].text for id in conversation.siblings(conversation.path()[place].id)]


def chain(count: int) -> Conversation:
    messages: dict[str, Message] = {}
    above = None
    for number in range(count):
        messages[str(number)] = Message(str(number), above, "assistant" if number % 2 else "user", f"text {number}")
        above = str(number)
    return Conversation("deep", ANNA, "Deep", messages, above)


# Small files of each format

OWN = {
    "format": FORMAT,
    "version": 1,
    "conversations": [
        {
            "title": "Greek",
            "tip": "c",
            "messages": [
                {"id": "a", "parent": None, "role": "user", "text": "What is τ?", "reasoning": "", "created": 5.5, "state": "done", "details": {}},
                {"id": "b", "parent": "a", "role": "assistant", "text": "2", "state": "running", "details": {"seed": 7, "stats": {"tokens": 2}}},
                {"id": "c", "parent": "a", "role": "assistant", "text": "2π", "reasoning": "hm", "created": 6, "details": {"model": "m"}},
            ],
        },
        {"title": "", "tip": None, "messages": []},
    ],
}

EARLIER = {
    "internal": [
        ["<|BEGIN-VISIBLE-CHAT|>", "Hello & welcome"],
        ["1 < 2?", "<think>\nsure\n</think>\n\nYes"],
        ["And &amp;?", ""],
    ],
    "visible": [["", "Hello &amp; welcome"], ["1 &lt; 2?", "shown"], ["And &amp;amp;?", ""]],
    "metadata": {
        "assistant_0": {"timestamp": "Nov 24, 2026 19:10"},
        "user_1": {"timestamp": "Nov 24, 2026 19:11", "attachments": [{"name": "a.txt", "type": "text/plain", "content": "…"}, 5]},
        "assistant_1": {
            "timestamp": "Nov 24, 2026 19:12",
            "model_name": "llama.gguf",
            "versions": [
                {"content": "No", "visible_content": "No", "timestamp": "Nov 24, 2026 19:12"},
                {"content": "<think>\nsure\n</think>\n\nYes", "visible_content": "…", "timestamp": "Nov 24, 2026 19:13"},
                {"content": "", "visible_content": "Maybe &lt;", "timestamp": "?"},
            ],
            "current_version_index": 1,
        },
    },
}

TAVERN = [
    {"user_name": "Anna", "character_name": "Chiharu", "create_date": "2024-1-5 @10h 00m 00s 1ms", "chat_metadata": {}},
    {"name": "Chiharu", "is_user": False, "is_system": False, "mes": "*smiles* Hi", "send_date": "January 5, 2024 2:20pm"},
    {"name": "Anna", "is_user": True, "is_system": False, "mes": "Hi there", "send_date": 1704464460000},
    {
        "name": "Chiharu",
        "is_user": False,
        "is_system": False,
        "mes": "second",
        "send_date": "2024-01-05T14:22:00.000Z",
        "swipes": ["first", "second"],
        "swipe_id": 1,
        "swipe_info": [{"send_date": "2024-01-05T14:21:00.000Z", "extra": {"model": "old"}}, {"send_date": "2024-01-05T14:22:00.000Z"}],
        "extra": {"model": "new", "reasoning": "let me think"},
    },
    {"name": "Narrator", "is_user": False, "is_system": True, "mes": "Night falls."},
]


def node(id: str, parent: str | None, children: list[str], role: str = "", text: str = "", **more):
    message = {"author": {"role": role}, "content": {"content_type": "text", "parts": [text]}, "create_time": 1700000000.25, **more} if role else None
    return {"id": id, "parent": parent, "children": children, "message": message}


CHATGPT = [
    {
        "title": "Trip to Rome",
        "create_time": 1700000000.0,
        "current_node": "e",
        "mapping": {  # not in the order of the tree
            "e": node("e", "tool", [], "assistant", "Three days", metadata={"model_slug": "gpt-4"}),
            "root": node("root", None, ["sys"]),
            "sys": node("sys", "root", ["q"], "system", ""),
            "tool": node("tool", "think", ["e"], "tool", "search results"),
            "q": node("q", "sys", ["a", "think"], "user", "How long?"),
            "think": node("think", "q", ["tool"], "assistant", "", content={"content_type": "thoughts", "thoughts": [{"content": "x"}]}),
            "a": node("a", "q", [], "assistant", "Two days"),
        },
    },
    {"title": None, "mapping": {"x": node("x", None, [], "user", "Untitled question"), "bad": 5}},
    {"title": "empty", "mapping": {}},
]


def test_our_own_format():
    first, empty = take(OWN)
    assert shape(first) == (
        "Greek",
        2,
        [
            (None, "user", "What is τ?", "", 5.5, "done", {}),
            (0, "assistant", "2", "", 0.0, "interrupted", {"seed": 7, "stats": {"tokens": 2}}),
            (0, "assistant", "2π", "hm", 6.0, "done", {"model": "m"}),
        ],
    )
    assert shape(empty) == ("", None, [])
    assert first.owner == ANNA


def test_the_export_is_the_documented_format():
    document = json.loads(to_json(take(OWN)))
    assert (document["format"], document["version"], len(document["conversations"])) == ("tgw-conversations", 1, 2)
    assert set(document["conversations"][0]) == {"title", "tip", "messages"}
    assert set(document["conversations"][0]["messages"][0]) == {"id", "parent", "role", "text", "reasoning", "created", "state", "details"}


def test_folder_tags_pins_and_settings_travel_too():
    pinned = Message("m", None, "user", "text", details={"pinned": True})
    settings_ = {"mode": "chat", "stopping_strings": ["a"], "temperature": 0.5}
    whole = Conversation("c", "bert", "t", {"m": pinned}, "m", settings_, "My folder", ("a", "ü"), True, Summary("They met.", "m"))
    plain = Conversation("d", "bert", "plain")
    found, other = read(to_json([whole, plain]).encode(), "x", ANNA)
    assert (found.folder, found.tags, found.pinned, found.settings) == ("My folder", ("a", "ü"), True, settings_)
    assert next(iter(found.messages.values())).details == {"pinned": True}
    assert found.summary == Summary("They met.", found.tip)
    assert (other.folder, other.tags, other.pinned, other.settings) == ("", (), False, {})
    assert json.loads(to_json([plain]))["conversations"] == [{"title": "plain", "tip": None, "messages": []}]


@pytest.mark.parametrize("odd_value", [None, 5, "x", [1], {"a": 1}, float("inf"), "\ud800", ["a", 5, None, "", " a\n", "x" * 999]])
def test_odd_arrangements_in_a_file_are_left_out(odd_value):
    entry = {"title": "t", "tip": None, "messages": [], **dict.fromkeys(("folder", "tags", "pinned", "settings", "summary"), odd_value)}
    (found,) = take({"format": FORMAT, "version": 1, "conversations": [entry]})
    assert found.folder == ({"x": "x", "\ud800": "\ufffd"}.get(odd_value, "") if isinstance(odd_value, str) else "")
    assert found.tags == (("a", "x" * MAX_NAME) if odd_value == ["a", 5, None, "", " a\n", "x" * 999] else ())
    assert found.pinned is False
    assert found.settings == ({"a": 1} if isinstance(odd_value, dict) else {})
    assert found.summary is None


@pytest.mark.parametrize(
    "summary", [{"text": "They met.", "after": "elsewhere"}, {"text": "", "after": "m"}, {"text": 5, "after": "m"}, {"text": "They met."}]
)
def test_a_summary_of_nothing_in_a_file_is_left_out(summary):
    conversation = Conversation("c", ANNA, "t", {"m": Message("m", None, "user", "text")}, "m")
    document = json.loads(to_json([conversation]))
    document["conversations"][0]["summary"] = summary
    (found,) = take(document)
    assert found.summary is None


def test_many_tags_and_deep_settings_in_a_file():
    entry = {"title": "t", "tip": None, "messages": [], "tags": [str(i) for i in range(1000)]}
    (found,) = take({"format": FORMAT, "version": 1, "conversations": [entry]})
    assert len(found.tags) == MAX_TAGS
    deep: list = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(DataError, match="conversation 1: its settings are nested too deeply"):
        take({"format": FORMAT, "version": 1, "conversations": [{**entry, "settings": {"a": deep}}]})


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("Boiled eggs", "Boiled eggs"),
        ("", "conversation"),
        ("...", "conversation"),
        ("CON", "conversation"),
        ("nul.json", "conversation"),
        ("../../etc/passwd", "etc passwd"),
        ('a/b\\c:d*e?f"g<h>i|j', "a b c d e f g h i j"),
        ("..\uff0f..\uff0fx", "x"),
        ("tab\tnew\nline\0", "tab new line"),
        ("Что такое τ? 北京", "Что такое τ 北京"),
        ("\u202egnp.exe", "gnp.exe"),
        ("ends with a dot. ", "ends with a dot"),
    ],
)
def test_a_title_becomes_a_file_name(title: str, name: str):
    assert file_name(title) == name


@given(st.text(max_size=300) | st.text("北ü.\u200b/", max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_title_becomes_a_usable_file_name(title: str):
    assert safe_name(file_name(title) + ".json") == file_name(title) + ".json"
    assert len(file_name(title).encode()) <= 120


def test_an_import_never_overwrites():
    data = to_json([chain(3)]).encode()
    seen = [id for again in (read(data, "x", ANNA), read(data, "x", ANNA)) for c in again for id in (c.id, *c.messages)]
    assert len(set(seen)) == 8
    assert not set(seen) & {"deep", "0", "1", "2"}


def test_a_history_of_the_earlier_system():
    (conversation,) = take(EARLIER)
    assert branch(conversation) == [("assistant", "Hello & welcome"), ("user", "1 < 2?"), ("assistant", "Yes"), ("user", "And &amp;?")]
    assert conversation.title == "1 < 2?"
    assert versions(conversation, 2) == ["No", "Yes", "Maybe <"]
    greeting, question, answer, _ = conversation.path()
    assert greeting.created == datetime(2026, 11, 24, 19, 10).timestamp()
    assert answer.created == datetime(2026, 11, 24, 19, 13).timestamp()
    assert answer.reasoning == "sure"
    assert answer.details == {"model": "llama.gguf"}
    assert question.details == {"attachments": ["a.txt"]}


def test_the_legacy_keys_of_the_earlier_system():
    (conversation,) = take({"data": [["a &lt;", "b", None, {}]], "data_visible": [["a &amp;lt;", "b"]]})
    assert branch(conversation) == [("user", "a &lt;"), ("assistant", "b")]


@pytest.mark.parametrize("key", ["visible", "data_visible"])
def test_only_what_was_escaped_is_unescaped(key: str):
    assert branch(take({key: [["a &lt; b", "&amp;lt;"]]})[0]) == [("user", "a < b"), ("assistant", "&lt;")]


@pytest.mark.parametrize(
    ("row", "contents", "index", "kept", "shown"),
    [
        ("b", ["a", "b"], 1, ["a", "b"], "b"),
        ("a", ["a", "b"], 1, ["a", "b"], "a"),  # the row wins over the index
        ("new", ["a", "b"], 0, ["a", "b", "new"], "new"),  # edited: no text is lost
        ("", ["a", ""], 1, ["a"], "a"),  # a new version that was never written
        ("", ["a", "b"], 0, ["a", "b"], "a"),
        ("a", ["a", "a"], 7, ["a", "a"], "a"),
        ("a", [], None, ["a"], "a"),
        ("a", ["", ""], True, ["a"], "a"),
    ],
)
def test_versions_become_siblings_and_the_current_one_is_shown(row, contents, index, kept, shown):
    notes = {"versions": [{"content": content} for content in contents], "current_version_index": index}
    (conversation,) = take({"internal": [["q", row], ["next", "last"]], "metadata": {"assistant_0": notes}})
    assert [text for _, text in branch(conversation)] == ["q", shown, "next", "last"]
    assert versions(conversation, 1) == kept


def test_of_two_equal_versions_the_marked_one_is_shown():
    notes = {"versions": [{"content": "a"}, {"content": "a", "timestamp": "Nov 24, 2026 19:10"}], "current_version_index": 1}
    (conversation,) = take({"internal": [["q", "a"]], "metadata": {"assistant_0": notes}})
    assert conversation.path()[1].created > 0


def test_the_shown_version_takes_the_time_of_its_row_when_it_has_none():
    notes = {"timestamp": "Nov 24, 2026 19:10", "versions": [{"content": "a"}, {"content": "b"}], "current_version_index": 1}
    (conversation,) = take({"internal": [["q", "b"]], "metadata": {"assistant_0": notes}})
    times = [conversation[id].created for id in conversation.siblings(conversation.tip or "")]
    assert times == [0.0, datetime(2026, 11, 24, 19, 10).timestamp()]


def test_versions_of_a_user_message_too():
    notes = {"versions": [{"content": "old"}, {"content": "new"}], "current_version_index": 1}
    (conversation,) = take({"internal": [["new", "answer"]], "metadata": {"user_0": notes}})
    assert branch(conversation) == [("user", "new"), ("assistant", "answer")]
    assert versions(conversation, 0) == ["old", "new"]


def test_a_sillytavern_chat():
    (conversation,) = read(lines(*TAVERN), "chat.jsonl", ANNA)
    roles = [("assistant", "*smiles* Hi"), ("user", "Hi there"), ("assistant", "second"), ("system", "Night falls.")]
    assert branch(conversation) == roles
    assert conversation.title == "Chiharu: Hi there"
    greeting, question, answer, narrator = conversation.path()
    first, second = (conversation[id] for id in conversation.siblings(answer.id))
    assert greeting.created == datetime(2024, 1, 5, 14, 20).timestamp()
    assert question.created == 1704464460.0
    assert (first.text, first.created) == ("first", datetime(2024, 1, 5, 14, 21, tzinfo=timezone.utc).timestamp())
    assert (second.reasoning, second.details) == ("let me think", {"model": "new", "name": "Chiharu"})
    assert first.details["model"] == "old"
    assert narrator.created == 0.0


def test_sillytavern_lines_may_end_as_on_windows_and_hold_unicode_separators():
    data = lines(*TAVERN[:2]) + b"\r\n\r\n" + json.dumps({"is_user": True, "mes": "a\u2028b"}, ensure_ascii=False).encode() + b"\r\n"
    assert branch(read(data, "x", ANNA)[0])[-1] == ("user", "a\u2028b")


def test_chatgpt():
    first, second = take(CHATGPT)
    assert branch(first) == [("user", "How long?"), ("assistant", "Three days")]
    assert versions(first, 1) == ["Two days", "Three days"]
    assert (first.title, first.path()[1].details, first.path()[1].created) == ("Trip to Rome", {"model": "gpt-4"}, 1700000000.25)
    assert (second.title, branch(second)) == ("Untitled question", [("user", "Untitled question")])


def test_chatgpt_shows_the_nearest_message_above_a_current_node_without_text():
    (conversation,) = take([{**CHATGPT[0], "current_node": "tool"}])
    assert branch(conversation) == [("user", "How long?")]
    (conversation,) = take({**CHATGPT[0], "current_node": "gone"})
    assert branch(conversation)[-1] == ("assistant", "Three days")


def test_chatgpt_joins_the_texts_of_parts_and_leaves_hidden_messages_out():
    parts = ["Look:", {"content_type": "image_asset_pointer"}, {"content_type": "audio_transcription", "text": "spoken"}, None]
    picture = node("p", "h", [], "user", content={"content_type": "multimodal_text", "parts": parts})
    hidden = node("h", None, ["p"], "system", "secret", metadata={"is_visually_hidden_from_conversation": True})
    (conversation,) = take([{"mapping": {"h": hidden, "p": picture}}])
    assert branch(conversation) == [("user", "Look:\nspoken")]


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        (1700000000, 1700000000.0),
        (1700000000123, 1700000000.123),
        ("1700000000123", 1700000000.123),
        ("2023-11-14T22:13:20Z", 1700000000.0),
        ("Nov 14, 2023 22:13", datetime(2023, 11, 14, 22, 13).timestamp()),
        ("June 19, 2023 2:20pm", datetime(2023, 6, 19, 14, 20).timestamp()),
        ("2023-6-19 @14h 20m 5s 123ms", datetime(2023, 6, 19, 14, 20, 5).timestamp()),
        ("2023-06-19@14h20m05s", datetime(2023, 6, 19, 14, 20, 5).timestamp()),
        *[(bad, 0.0) for bad in ("", "yesterday", -1, 10**400, 1e300, True, None, [], {}, "9" * 5000, "0001-01-01T00:00:00", "\ud800", "²")],
    ],
)
def test_times_in_all_their_spellings(written, seconds):
    (conversation,) = read(lines(TAVERN[0], {"is_user": True, "mes": "x", "send_date": written}), "x", ANNA)
    assert conversation.path()[0].created == pytest.approx(seconds)


@pytest.mark.parametrize("written", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(written: str):
    message = json.dumps({**GOOD, "created": "?", "details": {"p": ["?"]}}).replace('"?"', written)
    data = f'{{"format": "{FORMAT}", "version": 1, "conversations": [{{"title": "", "tip": "a", "messages": [{message}]}}]}}'
    (found,) = read(data.encode(), "x", ANNA)[0].path()
    assert (found.created, found.details) == (0.0, {"p": [None]})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_encodings(encoding: str):
    data = json.dumps({"internal": [["Grüße 👋", "b"]]}, ensure_ascii=False).encode(encoding)
    assert branch(read(data, "x", ANNA)[0])[0] == ("user", "Grüße 👋")


def test_halves_of_a_character_are_replaced_everywhere():
    item = {"id": "a", "parent": None, "role": "user", "text": "x\ud800", "reasoning": "\udfff", "details": {"k\ud800": "\ud800"}}
    own = {"format": FORMAT, "version": 1, "conversations": [{"title": "t\ud800", "tip": "a", "messages": [item]}]}
    (conversation,) = take(own)
    assert shape(conversation) == ("t\ufffd", 0, [(None, "user", "x\ufffd", "\ufffd", 0.0, "done", {"k\ufffd": "\ufffd"})])
    assert branch(read(b'{"internal": [["\xed\xa0\x80", ""]]}', "x", ANNA)[0]) == [("user", "\ufffd")]
    to_json([Conversation("c", ANNA, "\ud800", {"a": Message("a", None, "user", "\ud800")}, "a")]).encode()


# What is wrong is named


def own(*messages, **changes):
    return {**OWN, "conversations": [{"title": "t", "tip": None, "messages": list(messages), **changes}]}


GOOD = {"id": "a", "parent": None, "role": "user", "text": "x"}
FAULTS = {
    "nothing": (b"", "SillyTavern"),
    "a picture": (b"\x89PNG\r\n\x1a\n\x00\x00", "UTF-8"),
    "latin-1": ('{"internal": [["Grüße", ""]]}'.encode("latin-1"), "save it as UTF-8"),
    "cut off": (json.dumps(EARLIER).encode()[:-20], "not the JSON of a chat .*line 1"),
    "a line cut off": (lines(*TAVERN)[:-5], "line 5"),
    "another kind": (b'{"a": 1}', "SillyTavern"),
    "a number": (b"5", "SillyTavern"),
    "an empty list": (b"[]", "SillyTavern"),
    "two values": (b"1 2", "SillyTavern"),
    "deep lists": (b"[" * 100_000, "nested too deeply"),
    "deep mappings": (b'{"a":' * 100_000, "nested too deeply"),
    "many digits": (b'{"internal": [' + b"9" * 5000 + b"]}", "digits"),
    "no message": (json.dumps({"internal": []}).encode(), "no message"),
    "a row that is none": (json.dumps({"internal": [["a", "b"], 5]}).encode(), "row 2"),
    "a text that is none": (json.dumps({"internal": [["a", {}]]}).encode(), "row 1"),
    "a version that is none": (json.dumps({"internal": [["a", ""]], "metadata": {"user_0": {"versions": [{"content": 5}]}}}).encode(), "row 1"),
    "a line that is no object": (lines(TAVERN[0], [1]), "message 1"),
    "a mes that is none": (lines(TAVERN[0], {"mes": 5}), "message 1"),
    "a header alone": (lines(TAVERN[0]), "no message"),
    "a mapping that is none": (json.dumps([CHATGPT[0], {"title": "x"}]).encode(), "conversation 2.*mapping"),
    "its own parent": (json.dumps([{"mapping": {"a": node("a", "a", ["a"], "user", "x")}}]).encode(), "own ancestors"),
    "a ring": (json.dumps([{"mapping": {i: node(i, p, [], "user", "x") for i, p in ("ab", "bc", "ca")}}]).encode(), "conversation 1.*own ancestors"),
    "newer": (json.dumps({**OWN, "version": 2}).encode(), "Update this program"),
    "no list": (json.dumps({**OWN, "conversations": {}}).encode(), "'conversations'"),
    "no title": (json.dumps(own(GOOD, title=None)).encode(), "conversation 1: 'title'"),
    "no text": (json.dumps(own({**GOOD, "text": None})).encode(), "conversation 1, message 1: 'text'"),
    "an unknown role": (json.dumps(own({**GOOD, "role": "tool"})).encode(), "role"),
    "an unknown state": (json.dumps(own({**GOOD, "state": "odd"})).encode(), "state"),
    "an id twice": (json.dumps(own(GOOD, GOOD)).encode(), "message 2.*twice"),
    "a parent that comes later": (json.dumps(own({**GOOD, "parent": "b"}, {**GOOD, "id": "b"})).encode(), "message 1.*parent"),
    "a parent that is none": (json.dumps(own({**GOOD, "parent": []})).encode(), "parent"),
    "an unknown tip": (json.dumps(own(GOOD, tip="z")).encode(), "tip"),
    "a tip that is none": (json.dumps(own(GOOD, tip={})).encode(), "tip"),
    "no conversation": (json.dumps({**OWN, "conversations": []}).encode(), "no message"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named_with_the_file(fault: str):
    data, words = FAULTS[fault]
    with pytest.raises(DataError, match=words) as error:
        read(data, "C:\\chats/x.json", ANNA)
    assert str(error.value).startswith("x.json was not imported: ")
    assert str(error.value).endswith(".")


@pytest.mark.parametrize("name", ["", "/", "\ud800", "a" * 10_000_000, "\x1b[31m\n"])
def test_any_file_name_is_bounded(name: str):
    with pytest.raises(DataError) as error:
        read(b"x", name, ANNA)
    assert len(str(error.value)) < 300
    assert str(error.value).isprintable()


def test_details_that_are_nested_deeply():
    deep = json.loads('{"a":' * 30 + "1" + "}" * 30)
    assert take(own({**GOOD, "details": deep}))[0].messages
    with pytest.raises(DataError, match=r"message 1.*nested"):
        take(own({**GOOD, "details": {"x": deep, "y": [[[deep]]]}}))


def test_details_that_the_page_could_not_show_are_left_out():
    details = {
        "stats": {"tokens": "9", "seconds": 3, "tokens_per_second": True, "foreign": 1, "finish_reason": "stop"},
        "seed": "7",
        "error": [],
        "model": None,
    }
    (message,) = take(own({**GOOD, "details": {**details, "extra": True}}))[0].messages.values()
    assert message.details == {"stats": {"seconds": 3, "finish_reason": "stop"}, "model": None, "extra": True}
    (message,) = take(own({**GOOD, "details": {"stats": [1]}}))[0].messages.values()
    assert message.details == {}


@pytest.mark.parametrize(
    ("limit", "value", "document"),
    [
        ("MAX_BYTES", 100, EARLIER),
        ("_MAX_VALUES", 20, EARLIER),
        ("MAX_MESSAGES", 2, OWN),
        ("MAX_MESSAGES", 3, CHATGPT),  # together
        ("MAX_MESSAGES", 3, EARLIER),
        ("MAX_CONVERSATIONS", 1, OWN),
        ("MAX_CONVERSATIONS", 2, CHATGPT),  # one of them is empty
    ],
)
def test_limits(monkeypatch: pytest.MonkeyPatch, limit: str, value: int, document):
    assert take(document)
    monkeypatch.setattr(transfer, limit, value)
    with pytest.raises(DataError, match="Split it"):
        take(document)


def test_values_without_commas_are_counted_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transfer, "MAX_MESSAGES", 100)
    with pytest.raises(DataError, match="Split it"):
        read(b"1 " * 200, "x", ANNA)


# Size and depth

DEEP = 10_000


def chatgpt_chain(count: int):
    ids = [f"n{number}" for number in range(count)]
    above = [None, *ids]
    return [{"mapping": {id: node(id, above[i], ids[i + 1 : i + 2], "user", f"text {i}") for i, id in reversed(list(enumerate(ids)))}}]


@pytest.mark.parametrize(
    "data",
    [
        to_json([chain(DEEP)]).encode(),
        json.dumps({"internal": [[f"text {i}", f"text {i + 1}"] for i in range(0, DEEP, 2)]}).encode(),
        lines(TAVERN[0], *({"is_user": i % 2 == 0, "mes": f"text {i}"} for i in range(DEEP))),
        json.dumps(chatgpt_chain(DEEP)).encode(),
    ],
    ids=["own", "earlier", "sillytavern", "chatgpt"],
)
def test_long_chains(data: bytes):
    (conversation,) = read(data, "x", ANNA)
    assert [m.text for m in conversation.path()] == [f"text {i}" for i in range(DEEP)]
    assert shape(read(to_json([conversation]).encode(), "x", ANNA)[0]) == shape(conversation)
    assert to_markdown(conversation).count("\n## ") == DEEP


def test_a_wide_mapping_without_text_above_its_messages():
    mapping = {"r": node("r", None, []), **{f"n{i}": node(f"n{i}", "r", [], "user", str(i)) for i in range(DEEP)}}
    mapping["r"]["children"] = [f"n{i}" for i in reversed(range(DEEP))]
    (conversation,) = take([{"mapping": mapping}])
    assert [m.text for m in conversation.messages.values()] == [str(i) for i in reversed(range(DEEP))]
    assert {m.parent for m in conversation.messages.values()} == {None}


# Any tree comes back


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def trees(draw) -> Conversation:
    messages: dict[str, Message] = {}
    for _ in range(draw(st.integers(0, 8))):
        parent = draw(st.sampled_from([None, *messages]))
        role = draw(st.sampled_from(["system", "user", "assistant"]))
        state = draw(st.sampled_from(["running", "done", "stopped", "failed", "interrupted"]))
        details = draw(st.dictionaries(st.text(max_size=4).map("_".__add__), json_values, max_size=2))
        created = draw(st.floats(0, 4e9))
        id = new_id()
        messages[id] = Message(id, parent, role, draw(st.text(max_size=20)), draw(st.text(max_size=20)), created, state, details)
    return Conversation(new_id(), "bert", draw(st.text(max_size=30)), messages, draw(st.sampled_from([None, *messages])))


@given(st.lists(trees(), min_size=1, max_size=3))
@settings(deadline=None)
def test_any_trees_come_back_but_for_ids_and_owner(conversations: list[Conversation]):
    found = read(to_json(conversations).encode(), "x", ANNA)
    expected = []
    for conversation in conversations:
        title, tip, rows = shape(conversation)
        expected.append((clean_title(title), tip, [(*row[:5], "interrupted" if row[5] == "running" else row[5], row[6]) for row in rows]))
    assert [shape(conversation) for conversation in found] == expected
    assert {conversation.owner for conversation in found} == {ANNA}
    check(found)


def test_the_store_takes_what_was_read_and_gives_it_back(tmp_path: Path):
    store = Store.open(tmp_path / "conversations.sqlite3")
    found = [
        c
        for data in (json.dumps(OWN).encode(), json.dumps(EARLIER).encode(), lines(*TAVERN), json.dumps(CHATGPT).encode())
        for c in read(data, "x", ANNA)
    ]
    store.import_conversations(ANNA, found)
    for conversation in found:
        assert store.conversation(ANNA, conversation.id) == conversation
    store.close()


# Anything at all


def check(conversations: list[Conversation]) -> None:
    """What everything else relies on."""
    for conversation in conversations:
        assert conversation.tip is None or conversation.tip in conversation.messages
        before: set[str | None] = {None}
        for id, message in conversation.messages.items():
            assert id == message.id
            assert message.parent in before
            before.add(id)
            assert 0 <= message.created < 1e12
            assert message.state != "running"
            assert message.role in ("system", "user", "assistant")
            Stats(**message.details.get("stats", {}))
        json.dumps(json.loads(to_json([conversation])), allow_nan=False).encode()
        to_markdown(conversation).encode()


def check_any(data: bytes) -> None:
    try:
        found = read(data, "x.json", ANNA)
    except DataError as error:
        assert str(error).startswith("x.json was not imported: ")
    else:
        assert found
        check(found)


SAMPLES = [OWN, EARLIER, TAVERN, CHATGPT]
many = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@given(st.binary(max_size=200))
@many
def test_any_bytes(data: bytes):
    check_any(data)


@given(st.sampled_from(SAMPLES), st.lists(st.tuples(st.integers(0, 4000), st.binary(max_size=3)), min_size=1, max_size=4))
@many
def test_damaged_files(sample, damages):
    data = lines(*sample) if sample is TAVERN else json.dumps(sample).encode()
    for place, piece in damages:
        data = data[: place % len(data)] + piece + data[place % len(data) + 1 :]
    check_any(data)


odd = json_values | st.sampled_from(
    [10**400, -1, float("nan"), float("inf"), "\ud800", "a", "root", [], {}, [[]], True, "<|BEGIN-VISIBLE-CHAT|>", 1e300]
)


def containers(value) -> list:
    found, level = [], [value]
    while level:
        inside = [v for v in level if isinstance(v, dict | list) and v]
        found += inside
        level = [v for one in inside for v in (one.values() if isinstance(one, dict) else one)]
    return found


@given(st.data())
@many
def test_changed_values(data):
    sample = json.loads(json.dumps(data.draw(st.sampled_from(SAMPLES))))
    is_lines = "character_name" in sample[0] if isinstance(sample, list) else False
    for _ in range(data.draw(st.integers(1, 6))):
        places = containers(sample)
        if not places:
            break
        place = data.draw(st.sampled_from(places))
        key = data.draw(st.sampled_from(list(place))) if isinstance(place, dict) else data.draw(st.integers(0, len(place) - 1))
        if data.draw(st.booleans()):
            place[key] = deepcopy(data.draw(odd))  # what is changed next may be within it
        else:
            del place[key]
    check_any(lines(*sample) if is_lines else json.dumps(sample).encode())


# Markdown


def said(*texts: str, reasoning: str = "", title: str = "T") -> Conversation:
    conversation = Conversation(new_id(), ANNA, title)
    for number, text in enumerate(texts):
        conversation, _ = conversation.add("assistant" if number % 2 else "user", text, reasoning=reasoning if number % 2 else "")
    return conversation


def test_markdown_shows_the_branch():
    conversation = said("Why?", "Because.", reasoning="First\n\n# no heading", title="A *b*")
    conversation, _ = conversation.add_sibling(conversation.tip or "", "Other")
    conversation = conversation.move_to(conversation.path()[0].id).move_to(next(m.id for m in conversation.messages.values() if m.reasoning))
    assert to_markdown(conversation) == (
        "# A \\*b\\*\n\n## User\n\nWhy?\n\n## Assistant\n\n"
        "<details>\n<summary>Thinking</summary>\n\n> First\n>\n> # no heading\n\n</details>\n\nBecause.\n"
    )
    assert to_markdown(Conversation("c", ANNA)) == "# Conversation\n"


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("plain\r\ntext", "plain\ntext"),
        ("# One\n###### Six\n#", "### One\n###### Six\n###"),
        ("Two\nlines\n===\nx", "### Two lines\nx"),
        ("Under\n-----", "#### Under"),
        ("```\n# code", "```\n# code\n```"),
        ("~~~~md\n# code\n~~~\n", "~~~~md\n# code\n~~~\n~~~~"),
        ("```\n# code\n```", "```\n# code\n```"),
        ("- # in a list", "- # in a list"),
        ("<!-- open", "> <!-- open"),
        ("text\n\n---\n\ntext", "text\n\n---\n\ntext"),
    ],
)
def test_texts_stay_within_their_section(text: str, written: str):
    assert to_markdown(said(text)) == f"# T\n\n## User\n\n{written}\n"


def test_a_huge_text_is_quoted_without_a_look():
    assert to_markdown(said("# a\n" * 100_000)).count("\n> # a") == 100_000


PIECES = ["# a", "#", "a", "===", "---", "```", "~~~~", "<!--", "-->", "<script>", "<pre>", "<div>", "- x", "  ```", "   ~~~", "> q", ">"]
PIECES += ["", "    c", "</details>", "<details>", "[x]: y", "1. a", "\t# b", "-", "\\", "<?", "<![CDATA[", "|a|", "|-|", "- ```", "> ```", "\r"]
PIECES += ["\x00", "# \u2028", " * * *"]
nasty = st.lists(st.sampled_from(PIECES), max_size=8).map("\n".join)


@given(nasty, nasty, nasty, st.text(max_size=20))
@settings(max_examples=500, deadline=None)
def test_no_text_breaks_the_headings_of_the_document(first: str, second: str, reasoning: str, title: str):
    document = to_markdown(said(first, second, "end", reasoning=reasoning, title=title))
    tokens = MarkdownIt("commonmark").parse(document)
    headings = [tokens[at + 1].content for at, t in enumerate(tokens) if t.type == "heading_open" and t.level == 0 and t.tag in ("h1", "h2")]
    assert headings[1:] == ["User", "Assistant", "User"]
