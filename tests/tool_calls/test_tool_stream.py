"""The stream: prose and calls told apart in any pieces, and nothing withheld for longer than it must be."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tool_formats import WIRE
from tool_call_help import HERMES, NAMES, fed, joined, pieces, read

from modules.tool_calls import FORMATS, ToolCall, ToolStream, formats_for, new_call_id, parse_forced

ADD = ("add", {"a": 1})
ALWAYS = {"bare", "llama_tagged", "llama", "pythonic", "generic"}
FRAGMENTS = [
    *(start for row in FORMATS for start in row.starts),
    *(text for text, _ in WIRE.values()),
    *NAMES,
    *("<", "[", "{", "}", "]", '"', "\\", "'", "\n", " ", "```", "```json\n", "</tool_call>", '{"name": "', "<parameter=a>", "</parameter>"),
    *("</function>", "<|message|>", "to=functions.add", "(a=", ")", "call:", ":", ",", "1", "x", "<arg_key>", '<|"|>', '"arguments": {'),
]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join), st.lists(st.integers(0, 400), max_size=30))
def test_any_cutting_gives_the_same(text, cuts):
    whole = joined(fed([text]))
    assert joined(fed(pieces(text, cuts))) == whole
    assert joined(fed(text)) == whole
    if not any(isinstance(part, tuple) for part in whole):
        assert "".join(whole) == text


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([text for text, _ in WIRE.values()]), st.integers(0, 300), st.text('<>[]{}"\\|\n `a', max_size=2), st.lists(st.integers(0, 300))
)
def test_any_cutting_of_a_damaged_call_gives_the_same(text, place, damage, cuts):
    text = text[:place] + damage + text[place + 1 :]
    assert joined(fed(pieces(text, cuts))) == joined(fed([text]))


@settings(deadline=None)
@given(st.text(), st.lists(st.integers(0, 60)))
def test_prose_is_given_out_unchanged(text, cuts):
    assert "".join(joined(fed(pieces(text, cuts)))) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n",
        "Write <tool_call> and then </tool_call>.",
        "`[TOOL_CALLS]` begins it, <|channel|> too, and <minimax:tool_call> <function=add",
        "I call get_weather{ or get_weather{} here",
        "get the paper\nadd salt\n[link](x) [1]\n- [x] done",
        "Answer:\n```json\n" + '{"name": "add", "arguments": {"a": 1}}' + "\n```",  # only where the answer begins
        '```python\nx = {"name": 1}\n```',
        '{"name": "Ada", "age": 36}',
        "<b>bold</b>",
        "<think",
        " " * 500,
    ],
)
def test_prose_that_mentions_markers_is_prose(text):
    assert read(text) == [text] * bool(text)


def test_a_mention_does_not_hide_the_call_that_follows():
    assert read(f"I use <tool_call> now: {HERMES}") == ["I use <tool_call> now:", ADD]
    assert read(f"<tool_call><tool_call>\n{HERMES}") == ["<tool_call><tool_call>", ADD]
    assert read(f"<tool_c{HERMES}") == ["<tool_c", ADD]
    assert read(f'<tool_call>{{"name": "none"}}</tool_call>{HERMES}') == ['<tool_call>{"name": "none"}</tool_call>', ADD]


def test_white_space_goes_only_before_a_call():
    assert read(f"a \n\n{HERMES}\n\n{HERMES}\n\nb\n") == ["a", ADD, ADD, "\n\nb\n"]
    assert read(f"{' ' * 100}{HERMES}") == [" " * 36, ADD]
    assert read("a \n\n<tool_call>\n\nb ") == ["a \n\n<tool_call>\n\nb "]


def test_what_follows_a_call_without_end_marker_is_given_out():
    assert read('<tool_call>{"name": "add", "arguments": {"a": 1}} so') == [ADD, " so"]


def test_prose_streams_on():
    stream = ToolStream(NAMES)
    for piece in ["The ", "code", " is:\n", "```py\n", "a = {1: [2]}\n", "<b>", "x < y", "z"]:
        shown = "".join(delta.text for delta in stream.feed(piece))
        assert shown.strip() == piece.strip()


def test_only_what_can_be_a_call_is_withheld():
    stream = ToolStream(NAMES)
    assert stream.feed('{"name": "') == []
    assert [delta.text for delta in stream.feed("Bob")] == ['{"name": "Bob']
    assert [delta.text for delta in stream.feed("\nget_w")] == []
    assert [delta.text for delta in stream.feed("ind{")] == ["\nget_wind{"]
    assert [delta.text for delta in stream.feed(" <tool_c")] == []
    assert [delta.text for delta in stream.feed("ase>")] == [" <tool_case>"]


def test_a_call_is_given_as_soon_as_it_is_whole():
    stream = ToolStream(NAMES)
    assert stream.feed('a <tool_call>{"name": "add", "arguments": {"a": 1}')[-1].text == "a"
    assert stream.feed("}")[0].call.name == "add"
    assert stream.feed("</tool_call>") == stream.finish() == []


def test_ids_and_indices():
    calls = [delta.call for delta in fed([HERMES * 3])]
    assert [call.index for call in calls] == [0, 1, 2]
    assert len({call.id for call in calls}) == 3
    assert all(re.fullmatch("call_[a-z0-9]{8}", call.id) for call in calls)
    assert fed([HERMES], new_id=lambda: "x")[0].call == ToolCall("x", 0, "add", '{"a": 1}')
    assert new_call_id() != new_call_id()


def test_what_the_prompt_holds_already_is_read_and_not_given_out_again():
    rest = '{"name": "add", "arguments": {"a": 1}}</tool_call>'
    assert read(rest, begins="<tool_call>\n") == [ADD]
    assert read("or so I thought", begins="Yes <tool_call>\n") == ["or so I thought"]
    assert read("ol_call>" + rest, begins="Yes <to") == [ADD]
    assert read("ld you", begins="Yes <to") == ["ld you"]
    assert read("get{}", begins="I ") == ["get{}"]  # no line begins here
    assert fed([HERMES], begins=HERMES)[0].call.index == 0


def test_without_tools_everything_is_text():
    for names in ((), ("",)):
        assert read(f"a {HERMES}", names=names) == [f"a {HERMES}"]


def test_the_template_chooses_the_formats():
    def chosen(template):
        return {row.name for row in formats_for(template)}

    assert chosen("") == chosen("{{ messages }}") == {row.name for row in FORMATS}
    assert chosen("x [TOOL_CALLS] y") == {"mistral"} | ALWAYS
    assert chosen("<tool_call>") == {"hermes", "qwen_coder"} | ALWAYS
    assert chosen("<tool_call><arg_key>") == {"hermes", "qwen_coder", "glm"} | ALWAYS
    assert chosen("<|channel|>") == {"gpt_oss"} | ALWAYS
    assert read(f"a {HERMES}", template="[TOOL_CALLS]") == [f"a {HERMES}"]


def test_a_forced_reply_is_read_back():
    one = '{"name": "add", "arguments": {"a": 1}}'
    assert [(call.index, call.name, call.arguments) for call in parse_forced(f"\n[{one}, {one}]", NAMES)] == [
        (0, "add", '{"a": 1}'),
        (1, "add", '{"a": 1}'),
    ]
    assert parse_forced(one, NAMES, lambda: "x") == [ToolCall("x", 0, "add", '{"a": 1}')]
    assert parse_forced(one, ["other"]) == parse_forced(one[:-1], NAMES) == parse_forced("[]", NAMES) == parse_forced("[" * 5000, NAMES) == []
