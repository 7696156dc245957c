"""What the page is told, as JSON."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.backends.base import EngineStats
from modules.conversation import Message
from modules.models import ModelStatus
from modules.replies import Stats
from modules.store import ConversationInfo
from modules.ui.render import render_blocks
from modules.ui.views import BlockPresenter, engine_view, info_view, message_view, stats_view, status_view
from tests.ui.live import Message as Shown

MARKDOWN = (
    "# T\n\nA *b* `c`\n\n```py\nx = 1\ny = 2\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n1. one\n2. two\n\n$$x^2$$\n\n<script>alert(1)</script>\n\nEnd"
)


def test_a_users_text_is_shown_as_typed_and_a_replys_as_markdown():
    user, reply = (message_view(Message("m", None, role, "**<b>x</b>**", "*why*")) for role in ("user", "assistant"))
    assert "**&lt;b&gt;" in user["blocks"][0] and "<strong>" not in user["blocks"][0]
    assert "<strong>" in reply["blocks"][0] and "<em>" in reply["reasoning"][0]
    assert user["text"] == reply["text"] == "**<b>x</b>**"


def test_what_is_not_known_is_null():
    view = message_view(Message("m", None, "assistant", ""))
    assert (view["stats"], view["error"], view["model"], view["versions"], view["dropped_messages"]) == (None, None, None, ["m"], 0)
    assert stats_view(Stats())["seed"] is None and stats_view(Stats())["context_used"] == 0


def test_counts_are_those_of_the_message():
    details = {"stats": {"tokens": 3, "prompt_tokens": 10, "context_length": 64}, "seed": 5, "error": "No.", "model": "x", "dropped_messages": 2}
    view = message_view(Message("m", None, "assistant", "a", state="failed", details=details), ["l", "m"])
    assert view["stats"]["context_used"] == 13 and view["stats"]["seed"] == 5 and view["versions"] == ["l", "m"]
    assert (view["error"], view["model"], view["dropped_messages"], view["state"]) == ("No.", "x", 2, "failed")


def test_a_status_and_a_line_of_the_list_are_json():
    assert json.loads(json.dumps(status_view(ModelStatus("ready", "m", samplers=("top_k",)))))["samplers"] == ["top_k"]
    line = info_view(ConversationInfo("c", "T", 5.0, True, (("a ", False), ("b", True))), running=False)
    assert line == {"id": "c", "title": "T", "updated": 5.0, "snippet": [["a ", False], ["b", True]], "hit": "", "running": False} | {
        "folder": "",
        "pinned": False,
        "tags": [],
        "incognito": False,
    }


def test_the_card_is_told_what_the_engine_does():
    stats = EngineStats(2, 4, 1, 64, 8192, 2048, 5, 6, 7_000_000, 999, 2, 123, finished={"stop": 1})
    shown = {"busy": 2, "parallel": 4, "waiting": 1, "cells": 8192, "cells_used": 2048, "kept": 5, "spilled": 6, "spilled_bytes": 7_000_000}
    assert json.loads(json.dumps(engine_view(stats))) == shown


def test_prefill_is_told_until_the_first_token():
    presenter = BlockPresenter()
    assert presenter.update(Stats(prompt_tokens=100, prefill_done=30), False)["prefill"] == [30, 100]
    assert presenter.update(Stats(prompt_tokens=100, prefill_done=100, tokens=1), False)["prefill"] is None


def told(presenter, number, type, data):
    return {"type": type, "event": number, **json.loads(json.dumps(data))}


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, len(MARKDOWN)), max_size=12), late=st.integers(0, 12))
def test_however_the_text_is_cut_the_page_ends_with_the_same_blocks(cuts, late):
    """One page takes every update, another begins with a snapshot in the middle."""
    presenter, early, later = BlockPresenter(), Shown(), Shown()
    edges = [0, *sorted(cuts), len(MARKDOWN)]
    for number, (begin, end) in enumerate(itertools.pairwise(edges), 1):
        presenter.feed(MARKDOWN[begin:end], "")
        update = told(presenter, number, "update", presenter.update(Stats(), end == len(MARKDOWN) and number == len(edges) - 1))
        early.take(update)
        if number > late:
            later.take(update)
        elif number == late:
            later.take(told(presenter, number, "snapshot", presenter.snapshot(Stats())))
    final = presenter.end(Message("m", None, "assistant", MARKDOWN))["message"]["blocks"]
    assert early.blocks == final == render_blocks(MARKDOWN)
    assert late > len(edges) - 1 or later.blocks == final
    assert not any("<script" in block for block in final)


@pytest.mark.parametrize("text", ["", "x", "a\n\nb"])
def test_thinking_and_answer_may_be_the_same_text(text):
    presenter = BlockPresenter()
    presenter.feed(text, text)
    presenter.update(Stats(), True)
    view = presenter.end(Message("m", None, "assistant", text, text))["message"]
    assert view["blocks"] == view["reasoning"] == render_blocks(text)
