"""Stop strings and thinking, fed one character at a time and in any pieces."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.streams import FORMATS, Delta, NamePrefix, ReasoningSplitter, ReplyStream, StopStrings, opened_by

GPT = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>"


def pieces(text, cuts):
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(places)]


def stopped(stops, parts):
    stream = StopStrings(stops)
    shown = "".join(stream.feed(part) for part in parts) + stream.finish()
    return shown, stream.matched


def split(parts, prompt=""):
    stream = ReasoningSplitter(prompt)
    return joined([delta for part in parts for delta in stream.feed(part)] + stream.finish())


def replied(parts, stops=(), prompt="", **begun):
    stream = ReplyStream(stops, prompt, **begun)
    return joined([delta for part in parts for delta in stream.feed(part)] + stream.finish()), stream.matched


def joined(deltas):
    assert all(bool(delta.text) != bool(delta.reasoning) for delta in deltas)
    return "".join(delta.reasoning for delta in deltas), "".join(delta.text for delta in deltas)


@pytest.mark.parametrize(
    ("stops", "text", "shown", "matched"),
    [
        ([], "abc", "abc", ""),
        ([""], "abc", "abc", ""),
        (["x"], "abc", "abc", ""),
        (["b"], "abc", "a", "b"),
        (["abcd", "bc"], "abcd", "", "abcd"),  # the earliest place wins, though "bc" was complete first
        (["abcd", "bc"], "abcx", "a", "bc"),
        (["abcd", "bc"], "abc", "a", "bc"),
        (["ab", "abc"], "xabcd", "x", "abc"),  # at one place the longest
        (["ab", "abc"], "xabd", "x", "ab"),
        (["ab", "abc"], "xab", "x", "ab"),
        (["aab"], "aaab", "a", "aab"),  # a failed beginning holds the real one
        (["\nYou:"], "Hello\nYo", "Hello\nYo", ""),
        (["]", "^", "\\", "-"], "a^", "a", "^"),
        (["😀"], "a😀b", "a", "😀"),
    ],
)
def test_stop_strings(stops, text, shown, matched):
    assert stopped(stops, [text]) == (shown, matched)
    assert stopped(stops, text) == (shown, matched)


def test_a_possible_stop_is_withheld_and_nothing_else():
    stream = StopStrings(["<end>"])
    assert stream.feed("one <e") == "one "
    assert stream.feed("n") == ""
    assert stream.feed("emy") == "<enemy"
    assert not stream.stopped
    assert stream.feed(" <end> two") == " "
    assert stream.stopped
    assert stream.feed("three") == stream.finish() == ""


@given(st.text("ab<\n"), st.lists(st.text("ab<\n", max_size=4), max_size=4), st.lists(st.integers(0, 40)))
def test_any_cutting_gives_the_same_stop(text, stops, cuts):
    places = [(text.find(stop), -len(stop), stop) for stop in stops if stop and stop in text]
    place, _, matched = min(places, default=(len(text), 0, ""))
    assert stopped(stops, pieces(text, cuts)) == stopped(stops, text) == (text[:place], matched)


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("", "", ""),
        ("Hello", "", "Hello"),
        ("  \n Hello", "", "  \n Hello"),
        ("<think>\nhm\n</think>\n\nYes\n", "hm\n", "Yes\n"),
        ("\n <think>hm</think>Yes", "hm", "Yes"),
        ("<think>hm", "hm", ""),
        ("<think>hm</thi", "hm</thi", ""),
        ("<think></think>\n\n", "", ""),
        ("<thin air", "", "<thin air"),
        ("<thi", "", "<thi"),
        ("<think>a</think>b<think>c</think>", "a", "b<think>c</think>"),  # only at the beginning
        ("```html\n<think>x</think>\n```", "", "```html\n<think>x</think>\n```"),
        ("no start</think>yes", "", "no start</think>yes"),
        ("<seed:think>hm</seed:think>Yes", "hm", "Yes"),
        ("<|channel>thought\nhm<channel|>Yes", "hm", "Yes"),
        ("thought\nhm<channel|>Yes", "hm", "Yes"),
        ("thoughtful", "", "thoughtful"),
        ("<|think|>hm<|end|><|begin|>assistant<|content|>Yes", "hm", "Yes"),
        (GPT + "Yes", "hm", "Yes"),
        ("<|channel|>final<|message|>Yes", "", "Yes"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>b<|end|><|channel|>final<|message|>c", "ab", "c"),
        ("<|channel|>analysis<|message|>a<|channel|>final<|message|>c", "a", "c"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assis", "a", ""),
        ("<|channel|>analysis<|message|>a<|end|>just text", "a", "just text"),
        ("<|channel|>analysis<|message|>a<|end|>" + "long " * 60, "a", "long " * 60),
        (" " * 100 + "<think>", "", " " * 100 + "<think>"),
    ],
)
def test_thinking_is_told_from_the_answer(text, reasoning, answer):
    assert split([text]) == (reasoning, answer)
    assert split(text) == (reasoning, answer)


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.start)
def test_every_format_works_whole_and_one_character_at_a_time(row):
    text = f"{row.start}deep thought{row.end}{row.content}answer"
    assert split([text]) == split(text) == ("deep thought", "answer")


@pytest.mark.parametrize("start", ["<think>", "<think>\n", "<|channel|>analysis<|message|>", "<|think|>"])
def test_a_prompt_that_ends_in_a_start_marker_begins_thinking(start):
    end = "</think>" if start.startswith("<think>") else "<|end|><|content|>"
    assert split("hm" + end + "\nYes", prompt="user: hi\n" + start) == ("hm", "Yes")


def test_a_prompt_that_closed_thinking_does_not_begin_it():
    assert split("Yes", prompt="<think>\n\n</think>\n\n") == ("", "Yes")


# --- a reply that goes on


# Not the format that only a model begins, with the bare word.
@pytest.mark.parametrize("row", [row for row in FORMATS if row.start != "thought\n"], ids=lambda row: row.start)
@pytest.mark.parametrize("thought", ["I think", "\nI think", "x " * 500])
def test_unfinished_thinking_goes_on_inside_it_and_keeps_its_line_breaks(row, thought):
    prompt = f"user: what does <think> mean?\n{row.start}{thought.lstrip()}"  # a template may drop the line break before thinking
    text = f"\n\nand more{row.end}{row.content}\nanswer"
    assert replied(text, prompt=prompt, reasoning=thought) == replied([text], prompt=prompt, reasoning=thought)
    assert replied([text], prompt=prompt, reasoning=thought)[0] == ("\n\nand more", "answer")


def test_unfinished_thinking_whose_beginning_the_prompt_does_not_show():
    assert replied(["more</think>answer"], prompt="bot: so", reasoning="so")[0] == ("more", "answer")


@pytest.mark.parametrize("text", ["<think>x</think>y", " thought\nthat", GPT])
def test_an_answer_that_goes_on_begins_no_thinking(text):
    assert replied([text], prompt="bot: He said what he", text="He said what he")[0] == ("", text)
    assert replied([text], prompt="bot: <think>", text="so", reasoning="hm")[0] == ("", text)


def test_which_format_a_prompt_has_begun():
    assert opened_by("a\n<seed:think>\n").end == "</seed:think>"
    assert opened_by("what is <think> for?") is None


# --- names before a reply


def named(parts, names=("Bob", "Anna")):
    stream = NamePrefix(names)
    return "".join(stream.feed(part) for part in parts) + stream.finish()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        (" \n", ""),
        ("Hi", "Hi"),
        (" Hi \n", "Hi \n"),
        ("Bob: Hi", "Hi"),
        ("\n Bob:\n\nHi", "Hi"),
        ("Anna: Bob: Hi", "Bob: Hi"),  # one only
        ("Bob", "Bob"),
        ("Bob and Anna: hi", "Bob and Anna: hi"),
        ("bob: hi", "bob: hi"),
        ("Bob:", ""),
        ("Bo Anna: x", "Bo Anna: x"),
    ],
)
def test_the_name_before_a_text_is_taken_away(text, shown):
    assert named([text]) == named(text) == shown


def test_only_a_possible_name_is_withheld():
    stream = NamePrefix(["Bob"])
    assert stream.feed("  Bo") == ""
    assert stream.feed("ring") == "Boring"
    assert stream.feed(" Bob: ") == " Bob: "


@given(st.text("Bob: n\n", max_size=12), st.lists(st.integers(0, 12)), st.lists(st.sampled_from(["Bob", "B", "Bob: n", "", "o"])))
def test_any_cutting_takes_the_same_name_away(text, cuts, names):
    assert named(pieces(text, cuts), names) == named([text], names) == named(text, names)


def test_names_are_taken_away_before_stop_strings_act():
    assert replied("<think>Bob: hm</think>\n\nBob: Hi\nBob: no", ["\nBob:"], names=["Bob"]) == (("Bob: hm", "Hi"), "\nBob:")
    assert replied("\nBob: Hi", ["\nBob:"], names=["Bob"]) == (("", "Hi"), "")
    assert replied("Bo", ["\nBob:"], names=["Bob"]) == (("", "Bo"), "")
    assert replied(" Bob: Hi", names=["Bob"], text="So") == (("", " Bob: Hi"), "")  # goes on


@given(st.text("ABb: \n", max_size=20), st.lists(st.integers(0, 20)))
def test_any_cutting_gives_the_same_reply_with_names(text, cuts):
    stops, names = ["\nA:", "\nB:"], ["B", "A"]
    assert replied(pieces(text, cuts), stops, names=names) == replied([text], stops, names=names) == replied(text, stops, names=names)


def test_the_start_marker_is_withheld_while_it_may_still_come():
    stream = ReasoningSplitter()
    assert stream.feed(" <th") == []
    assert stream.feed("ink>a") == [Delta(reasoning="a")]
    assert stream.feed("b</") == [Delta(reasoning="b")]
    assert stream.feed("think>\n") == []
    assert stream.feed("c") == [Delta(text="c")]


PARTS = st.lists(st.sampled_from([*(m for row in FORMATS for m in (row.start, row.end, row.content)), "\n", " ", "a", "<", "<|", "thought", "</"]))


@given(PARTS.map("".join), st.lists(st.integers(0, 200)), st.sampled_from(["", "<think>\n"]))
def test_any_cutting_gives_the_same_thinking(text, cuts, prompt):
    assert split(pieces(text, cuts), prompt) == split([text], prompt) == split(text, prompt)


@given(PARTS.map("".join), st.lists(st.integers(0, 200)), st.lists(st.sampled_from(["a", "a\n", "<|", "\n ", "</think>a"])))
def test_any_cutting_gives_the_same_reply(text, cuts, stops):
    assert replied(pieces(text, cuts), stops) == replied([text], stops) == replied(text, stops)


def test_stop_strings_act_on_the_answer_only():
    text = "<think>You: no\nYou: yes</think>Hi\nYou: bye"
    assert replied(text, ["\nYou:"]) == (("You: no\nYou: yes", "Hi"), "\nYou:")


def test_a_reply_that_stopped_shows_nothing_more():
    stream = ReplyStream(["."])
    assert stream.feed("One. Two") == [Delta(text="One")]
    assert stream.stopped
    assert stream.feed(" three") == stream.finish() == []


def test_a_withheld_beginning_of_a_stop_comes_out_at_the_end():
    stream = ReplyStream(["<end>"])
    assert stream.feed("One <e") == [Delta(text="One ")]
    assert stream.finish() == [Delta(text="<e")]


@pytest.mark.parametrize("start", ["", "<think>"])
def test_the_work_for_a_piece_does_not_grow_with_the_reply(start):
    """Counted in calls, not in time: what is held stays short, whatever came before."""

    def calls_for_one_piece(stream):
        count = 0

        def count_one(frame, event, arg):
            nonlocal count
            count += 1

        sys.setprofile(count_one)
        try:
            stream.feed("word ")
        finally:
            sys.setprofile(None)
        return count

    stream = ReplyStream(["\nYou:", "<|im_end|>"])
    stream.feed(start)
    stream.feed("word ")
    early = calls_for_one_piece(stream)
    for _ in range(20_000):
        stream.feed("word ")
    assert calls_for_one_piece(stream) == early
    assert len(stream._splitter._held) + len(stream._stops._held) < 10
