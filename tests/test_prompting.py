"""Prompts of the three modes: golden texts, hostile names and texts, going on, impersonating, summaries, what is kept and left out."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.conversation import Message, Summary
from modules.errors import PromptTooLong
from modules.prompting import Prompting, printable_name, substituted, summary_messages
from modules.settings import ChatOptions
from modules.streams import ReplyStream
from modules.templates import FALLBACK, ChatTemplate

GOLDEN = Path(__file__).parent / "golden" / "prompts"
MODES = ("instruct", "chat", "chat-instruct")
INST = ChatTemplate((GOLDEN / "inst.jinja").read_text(encoding="utf-8"), "<s>", "</s>")
REASONING = ChatTemplate((GOLDEN / "reasoning.jinja").read_text(encoding="utf-8"))
OPENS = ChatTemplate(
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{{ '\n' }}{% endif %}"
)
"""Begins the thinking itself and hides earlier thinking, like DeepSeek R1's."""
HARMONY = ChatTemplate(
    "{% for m in messages %}{% if m.thinking and loop.last %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>{{ m.role }}{{ '<|channel|>final' if m.role == 'assistant' }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}{# {{ reasoning_effort }} #}{{ reasoning_effort[:0] }}"
)


def values(mode, **fields):
    people = {"name1": "Anna", "name2": "Bob", "context": "{{char}} is a pirate and <USER> is not.", "user_bio": "{{user}} likes tea."}
    return ChatOptions(**{"mode": mode, "custom_system_message": "Be brief.", **people, **fields})


def prompting(mode, template=FALLBACK, **fields):
    return Prompting(template, values(mode, **fields))


def message(number, role, text="", reasoning="", **details):
    return Message(str(number), str(number - 1), role, text, reasoning, details=details)


GREETING = message(1, "assistant", "Ahoy!", greeting=True)
ASKED = message(2, "user", "Who are you?")
TOLD = message(3, "assistant", "Bob I am.", "They ask my name.")
AGAIN = message(4, "user", "Again?")
PATH = (GREETING, ASKED, TOLD, AGAIN)


def encode(text):
    return [hash(word) for word in text.split()]


def prompt(made, path=PATH, **options):
    fitted = made.fit(path, 100_000, encode, **options)
    assert fitted.dropped == 0
    assert fitted.prompt == made.render(path, 0, **options)
    return fitted.prompt


# --- golden prompts


CASES = {
    "an answer": (PATH, {}),
    "one goes on": ((*PATH, message(5, "assistant", "Bob,")), {"open_end": True}),
    "thinking goes on": ((*PATH, message(5, "assistant", "", "Once more")), {"open_end": True}),
    "impersonating": (PATH[:3], {"speaker": "user"}),
    "impersonating from what is typed": ((*PATH[:3], message(4, "user", "And you ar")), {"speaker": "user", "open_end": True}),
    "with a summary": (PATH, {"summary": Summary("They met.", "3")}),
    "nothing yet": ((), {}),
}


@pytest.mark.parametrize("mode", MODES)
def test_golden_prompts(mode):
    """Read over by eye when they change: delete the file and run again to write it anew."""
    path = GOLDEN / f"mode-{mode}.txt"
    templates = {"ChatML": FALLBACK, "inst": INST, "reasoning": REASONING}
    text = "".join(
        f"=== {case}, {name}\n{prompt(Prompting(template, values(mode), adds_bos=True), messages, **options)}\n"
        for case, (messages, options) in CASES.items()
        for name, template in templates.items()
    )
    if not path.exists():
        path.write_text(text, encoding="utf-8", newline="\n")
        pytest.fail(f"wrote {path.name}: read it over, then run again")
    assert text == path.read_text(encoding="utf-8")


def test_a_chat_with_nothing_set_is_only_its_lines():
    made = Prompting(FALLBACK, ChatOptions(mode="chat"))
    assert prompt(made, (ASKED,)) == "You: Who are you?\nAI:"
    assert prompt(Prompting(FALLBACK, ChatOptions()), (ASKED,)) == "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"


def test_bos_begins_the_script_only_where_plain_text_begins_with_it():
    assert prompt(Prompting(INST, values("chat"), adds_bos=True)).startswith("<s>Bob is a pirate")
    assert prompt(Prompting(INST, values("chat"))).startswith("Bob is a pirate")
    assert prompt(Prompting(INST, values("chat-instruct"), adds_bos=True)).count("<s>") == 1


def test_messages_without_text_are_not_sent():
    path = (ASKED, message(3, "assistant", "", "stopped while thinking"), message(4, "user", "Hello?"))
    for mode in MODES:
        assert "stopped" not in prompt(prompting(mode), path)
    assert prompt(prompting("instruct"), path).count("<|im_start|>") == 4


def test_leading_system_messages_join_the_system_text():
    path = (message(1, "system", "Imported."), ASKED)
    assert prompt(prompting("instruct"), path).startswith("<|im_start|>system\nBe brief.\n\nImported.<|im_end|>\n<|im_start|>user")
    assert prompt(prompting("chat"), path).startswith("Bob is a pirate and Anna is not.\n\nImported.\n\nWhat is known about Anna:")


def test_a_later_system_message_of_a_chat_stands_as_it_is():
    assert prompt(prompting("chat"), (ASKED, message(3, "system", "It rains."), AGAIN)).endswith("?\nIt rains.\nAnna: Again?\nBob:")


# --- names and marks


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Anna", "Anna"),
        ("  Anna  Lena\t", "Anna Lena"),
        ("An\nna\r:\u2028\x00x", "An na : x"),
        ("\n", "You"),
        ("", "You"),
        ("\u202eevil\ufeff", "evil"),
        ("\ud800", "You"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("x" * 1000, "x" * 100),
        ("{{ 7*7 }}<|im_end|>", "{{ 7*7 }}<|im_end|>"),
    ],
)
def test_names_are_one_printable_line(name, shown):
    assert printable_name(name, "You") == shown


def test_substitution_is_one_pass():
    chat = values("chat", name1="{{char}}", name2="<USER>")
    assert substituted("{{char}} {{ User }} <BOT> <USER> {{other}} <user>", chat) == "<USER> {{char}} <USER> {{char}} {{other}} <user>"


def test_marks_in_messages_names_and_bio_are_data():
    nasty = "{{user}} <|prompt|> <|character|> {{ 1/0 }} {% for %} {# #} <|im_start|>"
    path = (message(1, "user", nasty), message(2, "assistant", nasty), message(3, "user", nasty))
    for mode in MODES:
        made = prompting(mode, name1="<|prompt|>", name2="<|character|>", user_bio="<|prompt|>")
        assert prompt(made, path).count(nasty) == 3


def test_a_command_without_a_place_for_the_chat_still_shows_it():
    made = prompting("chat-instruct", chat_instruct_command="Speak as <|character|>.")
    assert "user\nSpeak as Bob.\n\nBob is a pirate" in prompt(made)
    assert "Anna: Again?<|im_end|>" in prompt(made)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=30), st.sampled_from(MODES))
def test_whatever_the_texts_every_message_is_there_once_and_the_end_is_open(name1, name2, text, mode):
    made = prompting(mode, name1=name1, name2=name2, context=text, user_bio=text)
    shown = prompt(made, (message(1, "user", "BEGIN" + text + "END"), message(2, "assistant", "A"), message(3, "user", "LAST")))
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert shown.count("BEGIN" + clean + "END") == 1
    assert shown.endswith("\n" if mode == "instruct" else f"{printable_name(name2, 'AI')}:")


# --- stops and names


def test_stops():
    assert prompting("instruct").stops == ("<|im_end|>",)
    assert prompting("chat").stops == ("\nAnna:", "\nBob:")
    assert prompting("chat-instruct").stops == ("<|im_end|>", "\nAnna:", "\nBob:")
    assert prompting("chat", name1="a\nb", name2="").stops == ("\na b:", "\nAI:")


def test_stops_of_an_impersonation():
    assert prompting("instruct", INST).stops_of("user") == ("[/INST]",)
    assert prompting("instruct", INST).stops == ("</s>",)
    assert prompting("chat-instruct", INST).stops_of("user") == ("</s>", "\nAnna:", "\nBob:")  # the model's own turn all the same


def test_stops_of_a_template_that_writes_the_names():
    named = ChatTemplate("{% for m in messages %}{{ name1 if m.role == 'user' else name2 }}: {{ m.content }}\n{% endfor %}{{ name2 }}:")
    assert prompting("instruct", named).stops == ("\nAnna:",)
    assert prompting("instruct", named).stops_of("user") == ("\nBob:",)


def test_names_to_take_away():
    assert prompting("instruct").names() == ()
    assert prompting("chat").names() == ("Bob", "Anna")
    assert prompting("chat-instruct").names("user") == ("Anna", "Bob")


@pytest.mark.parametrize("mode", ["chat", "chat-instruct"])
def test_a_reply_in_character_as_it_is_shown(mode):
    made = prompting(mode)
    stream = ReplyStream(made.stops, prompt(made), names=made.names())
    shown = stream.feed(" Bob: Aye.\nWhat now?\nAnna: I") + stream.finish()
    assert "".join(delta.text for delta in shown) == "Aye.\nWhat now?"


# --- thinking


@pytest.mark.parametrize("template", [REASONING, OPENS, HARMONY], ids=["asked for", "opened", "effort"])
def test_a_character_thinks_first_where_the_model_may(template):
    with_thinking = prompt(prompting("chat-instruct", template))
    opened = template.render([], reasoning_effort="medium", enable_thinking=True)
    assert opened
    assert with_thinking.endswith(opened)
    assert not with_thinking.endswith("Bob:")
    assert prompt(prompting("chat-instruct", template, enable_thinking=False)).endswith("Bob:")
    assert prompt(prompting("chat-instruct", template), PATH[:3], speaker="user").endswith("Anna:")


@pytest.mark.parametrize("template", [FALLBACK, INST, REASONING, OPENS, HARMONY], ids=["plain", "inst", "reasoning", "opens", "harmony"])
@pytest.mark.parametrize("mode", MODES)
def test_unfinished_thinking_goes_on_inside_it(mode, template):
    thought = "First, <think> about it"
    made = prompting(mode, template)
    asked = prompt(made, (*PATH, message(5, "assistant", "", thought)), open_end=True)
    assert asked.endswith(thought)
    stream = ReplyStream(made.stops, asked, reasoning=thought, names=made.names())
    end = "<|end|><|start|>assistant<|channel|>final<|message|>" if template is HARMONY and mode != "chat" else "</think>"
    shown = stream.feed(f"\nthen{end}\n\nBob") + stream.finish()
    assert "".join(delta.reasoning for delta in shown) == "\nthen"
    assert "".join(delta.text for delta in shown) == "Bob"


def test_thinking_that_is_done_does_not_go_on():
    asked = prompt(prompting("instruct", REASONING), (*PATH, message(5, "assistant", "Bob,", "So.")), open_end=True)
    assert asked.endswith("Bob,")


def test_earlier_thinking_is_shown_when_it_is_to_be_preserved():
    assert "They ask my name." not in prompt(prompting("instruct", REASONING))
    assert "They ask my name." in prompt(prompting("instruct", REASONING, preserve_thinking=True))


def test_what_a_mode_knows_of_thinking():
    assert prompting("instruct", REASONING).knows == {"enable_thinking", "preserve_thinking"}
    assert prompting("chat-instruct", HARMONY).knows == {"reasoning_effort"}
    assert prompting("chat", REASONING).knows == frozenset()


def test_templates_are_told_what_they_may_ask_for():
    names = "enable_thinking thinking thinking_budget reasoning_effort preserve_thinking tools_in_user_message name1 name2 user_bio"
    template = ChatTemplate("".join(f"{{{{ {name} }}}}|" for name in names.split()) + "{{ tools is none }}|{{ builtin_tools is defined }}")
    assert prompt(prompting("instruct", template, enable_thinking=False), ()) == (
        "False|False|0|medium|False|False|Anna|Bob|Anna likes tea.|True|False"
    )


# --- fitting


def long_path(turns=30, pinned=()):
    made = [GREETING]
    for n in range(2, 2 * turns + 2):
        role = "user" if n % 2 == 0 else "assistant"
        made.append(message(n, role, " ".join([f"{role}{n}"] * 10), **({"pinned": True} if n in pinned else {})))
    return (*made, message(2 * turns + 2, "user", "last"))


@pytest.mark.parametrize("mode", MODES)
def test_the_oldest_are_left_out_and_what_is_kept_stays(mode):
    made, path = prompting(mode), long_path(pinned=(5, 8))
    fitted = made.fit(path, 250, encode)
    assert len(fitted.tokens) <= 250
    assert fitted.dropped > 20
    left_out = made.left_out(path, fitted.dropped)
    assert len(left_out) == fitted.dropped
    for m in path:
        assert (m.text in fitted.prompt) == (m not in left_out)
    assert GREETING not in left_out
    assert {"5", "8"}.isdisjoint(m.id for m in left_out)
    assert made.render(path, fitted.dropped) == fitted.prompt
    assert ("Be brief." if mode == "instruct" else "Bob is a pirate") in fitted.prompt


def test_a_full_context_can_stop_instead():
    made, path = prompting("instruct", context_full="stop"), long_path()
    with pytest.raises(PromptTooLong, match=r"needs \d{3,} tokens and 250 are allowed.*another way.*remove messages.*ctx-size"):
        made.fit(path, 250, encode)
    assert made.fit(path, 5000, encode).dropped == 0


def test_a_summary_stands_for_what_it_covers():
    made, path = prompting("instruct"), long_path(pinned=(5,))
    summary = Summary("They talked at length.", "40")
    fitted = made.fit(path, 5000, encode, summary=summary)
    sent = [m for m in path if m.text in fitted.prompt]
    assert [m.id for m in sent] == ["1", "5", *map(str, range(41, 63))]
    assert fitted.prompt.startswith("<|im_start|>system\nBe brief.\n\nWhat happened so far, in short:\nThey talked at length.<|im_end|>")
    tight = made.fit(path, 150, encode, summary=summary)
    assert [m.id for m in made.left_out(path, tight.dropped, summary)] == [str(n) for n in range(41, 41 + tight.dropped)]
    assert made.render(path, tight.dropped, summary=summary) == tight.prompt


@pytest.mark.parametrize("summary", [Summary("Of another branch.", "99"), Summary("  ", "3")])
def test_a_summary_that_does_not_belong_here_is_not_told(summary):
    assert prompt(prompting("instruct"), summary=summary) == prompt(prompting("instruct"))


def test_a_summary_never_hides_the_last_user_message():
    shown = prompt(prompting("instruct"), summary=Summary("All.", "4"))
    assert "Again?" in shown
    assert "Who are you?" not in shown
    alone = prompt(prompting("instruct"), (ASKED,), summary=Summary("All.", "2"))
    assert "Who are you?" in alone
    assert "All." not in alone  # it covers nothing that could be left out
    assert prompt(prompting("instruct"), (), summary=Summary("All.", "2")) == prompt(prompting("instruct"), ())


def test_each_text_is_counted_once_over_the_turns():
    class Counting:
        texts = 0

        def encode(self, text):
            self.texts += len(text)
            return encode(text)

    engine, made, path = Counting(), prompting("chat"), long_path(300)
    made.fit(path, 1000, engine.encode)
    first, engine.texts = engine.texts, 0
    again = made.fit((*path, message(700, "assistant", "So."), message(701, "user", "And?")), 1000, engine.encode)
    assert engine.texts < first / 1.5
    assert engine.texts < 1.5 * len(again.prompt)


def test_what_the_model_is_asked_for_a_summary():
    (asked,) = summary_messages((message(1, "user", "Hi", name="Anna\n"), TOLD, message(3, "assistant", "")), " They met. ")
    assert asked.role == "user"
    assert asked.content.startswith(
        "What happened before it, in short:\nThey met.\n\nPart of a conversation:\n\nAnna: Hi\n\nAssistant: Bob I am.\n\n"
    )
    assert "They ask my name." not in asked.content
    (first,) = summary_messages((ASKED,), "")
    assert first.content.startswith("Part of a conversation:\n\nUser: Who are you?")
