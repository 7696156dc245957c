"""Chat templates: golden prompts, continuing, folding roles, stop strings, fit."""

# ruff: noqa: E501 - templates are easier to compare when each stands on one line
from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules import sandbox, templates
from modules.errors import PromptTooLong, TemplateError
from modules.templates import FALLBACK, ChatTemplate, PromptMessage, fit, leave_out, opens_thinking, stop_strings

GOLDEN = Path(__file__).parent / "golden" / "prompts"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.jinja"))


def template(name):
    source = (GOLDEN / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(source, "<s>", "</s>", now=lambda: datetime(2024, 7, 26))


def system(text):
    return PromptMessage("system", text)


def user(text):
    return PromptMessage("user", text)


def assistant(text, reasoning=""):
    return PromptMessage("assistant", text, reasoning)


HELLO = (PromptMessage("user", "Hello"),)


def render(source, messages=HELLO, **variables):
    return ChatTemplate(source).render(messages, **variables)


# --- golden prompts


CASES = {
    "one question": ([user("Hello {{ 7*7 }} {% raw %}")], {}),
    "system and history": ([system("Be brief."), user("One?"), assistant(" Un. ", "counting"), user("Two?")], {}),
    "no thinking": ([user("Hi")], {"enable_thinking": False}),
    "two in a row": ([user("A"), user("B"), assistant("C"), assistant("D"), user("E")], {}),
    "begins with a greeting": ([system("S"), assistant("Welcome"), user("Thanks")], {}),
    "continued": ([system("S"), user("Count"), assistant("One, ")], {"continue_last": True}),
    "continued, kept thinking": ([user("Count"), assistant("One, ", "plan")], {"continue_last": True, "preserve_thinking": True}),
    "finished": ([user("Hi"), assistant("Bye")], {"add_generation_prompt": False}),
    "tools": ([user("Time?")], {"tools": [{"name": "clock", "about": "<ü>"}]}),
    "empty texts": ([user(""), assistant(""), user("")], {}),
}


@pytest.mark.parametrize("name", NAMES)
def test_golden_prompts(name):
    """Read over by eye when they change: delete the .txt file and run again to write it anew."""
    path = GOLDEN / f"{name}.txt"
    text = "".join(f"=== {case}\n{template(name).render(messages, **options)}\n" for case, (messages, options) in CASES.items())
    if not path.exists():
        path.write_text(text, encoding="utf-8", newline="\n")
        pytest.fail(f"wrote {path.name}: read it over, then run again")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("chatml", ("<|im_end|>",)),
        ("headers", ("<|eot_id|>",)),
        ("inst", ("</s>",)),
        ("turns", ("<end_of_turn>",)),
        ("alpaca", ("\n### Instruction:",)),
        ("reasoning", ("<|im_end|>",)),
    ],
)
def test_stop_strings(name, stops):
    assert stop_strings(template(name)) == stops


@pytest.mark.parametrize(
    ("name", "stops"), [("chatml", ("<|im_end|>",)), ("inst", ("[/INST]",)), ("alpaca", ("\n### Response:",)), ("turns", ("<end_of_turn>",))]
)
def test_what_ends_a_users_turn(name, stops):
    assert stop_strings(template(name), "user") == stops


def test_stop_strings_of_other_shapes():
    assert stop_strings(FALLBACK) == ("<|im_end|>",)
    spaced = "{% for m in messages %}{{ m.role|upper ~ ': ' ~ m.content ~ ' ' }}{% endfor %}"
    assert stop_strings(ChatTemplate(spaced)) == (" USER:",)
    assert stop_strings(ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")) == ()
    assert stop_strings(ChatTemplate("fixed")) == ()
    bracket = "{% for m in messages %}{{ '[INST]' ~ m.content if m.role == 'user' else m.content }}{% endfor %}"
    assert stop_strings(ChatTemplate(bracket)) == ("[INST]",)


# --- rendering


def test_text_in_messages_is_never_a_template():
    text = "{{ 1/0 }} {% for %} {# #} {{ raise_exception('x') }}"
    assert text in FALLBACK.render([user(text)])


def test_equal_templates_are_equal_and_compiled_once():
    source = "compiled once {{ messages|length }}"
    assert ChatTemplate(source) == ChatTemplate(source, now=lambda: datetime(2000, 1, 1))
    assert len({ChatTemplate(source), ChatTemplate(source)}) == 1
    render(source)
    misses = sandbox._compiled.cache_info().misses
    assert render(source, (user("a"), user("b"))) == "compiled once 2"
    assert sandbox._compiled.cache_info().misses == misses


def test_variables_that_are_none_are_not_defined():
    source = "{{ enable_thinking is defined }} {{ thinking }} {{ thinking_budget }} {{ tools is none }}"
    assert render(source, enable_thinking=None) == "False   True"
    assert render(source, enable_thinking=False) == "True False 0 True"
    assert render(source, enable_thinking=True, thinking_budget=5) == "True True 5 True"


def test_thinking_is_given_under_both_names():
    assert render("{{ messages[0].thinking }}{{ messages[0].reasoning_content }}", [assistant("a", "b")]) == "bb"
    assert render("{{ messages[0].reasoning_content is defined }}", [assistant("a")]) == "False"


def test_lone_surrogates_become_a_character_a_tokenizer_takes():
    prompt = FALLBACK.render([user("a\ud800b \ud83d\ude00 é")])
    assert "a\ufffdb 😀 é" in prompt
    prompt.encode()


def test_a_message_of_a_megabyte():
    text = "word ✓ " * 150_000
    assert text in template("headers").render([user("x" + text + "x")])


def test_the_templates_own_refusal_is_told():
    with pytest.raises(TemplateError, match="refuses this conversation: tell me why"):
        render("{{ raise_exception('tell me why') }}")


# --- roles


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ raise_exception('no') if m.role == 'system' else '<' ~ m.content ~ '>' }}{% endfor %}",
        "{% for m in messages if m.role != 'system' %}<{{ m.content }}>{% endfor %}",
        "{% for m in messages %}<{{ {'user': m.content, 'assistant': m.content}[m.role] | trim }}>{% endfor %}{{ messages[0].content if messages[0].role != 'user' and 1/0 }}",
    ],
)
def test_a_system_message_goes_into_the_first_user_message_where_it_is_not_taken(source):
    probe = ChatTemplate(source)
    assert probe.render([system("S"), user("U"), assistant("A")]) == "<S\n\nU><A>"
    assert probe.render([system("S")]) == "<S>"
    assert not probe.takes_system


def test_a_system_message_that_is_taken_stays():
    assert FALLBACK.takes_system
    assert FALLBACK.render([system("S"), user("U")]).startswith("<|im_start|>system\nS<|im_end|>")


def test_neighbours_are_joined_only_when_the_template_refuses():
    two = [user("A"), user("B")]
    assert "A<end_of_turn>" not in template("turns").render(two)
    assert "A<|im_end|>" in template("chatml").render(two)


def test_a_later_system_message_counts_as_the_users():
    prompt = template("inst").render([user("A"), assistant("B"), system("C"), user("D")])
    assert prompt == "<s>[INST] A [/INST] B</s>[INST] C\n\nD [/INST]"


def test_a_name_for_the_effort_that_the_template_refuses_is_not_given():
    source = "{{ raise_exception('no such effort') if reasoning_effort is defined and reasoning_effort != 'high' }}{{ reasoning_effort }}"
    picky = ChatTemplate(source + "{% for m in messages %}<{{ m.content }}>{% endfor %}")
    assert picky.render([user("U")], reasoning_effort="high") == "high<U>"
    assert picky.render([user("U")], reasoning_effort="medium") == "<U>"
    assert picky.takes_system


def test_of_several_refusals_the_first_is_told():
    source = "{{ raise_exception('order') if messages[1].role == messages[0].role else raise_exception('joined') }}"
    with pytest.raises(TemplateError, match="order"):
        ChatTemplate(source).render([user("A"), user("B"), assistant("C")], reasoning_effort="low")


# --- continuing


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ["One, ", "", "a\n", " lead", "{{ x }}", "[INST] <|im_end|>", "x" * 1000])
def test_a_continued_reply_ends_the_prompt(name, text):
    prompt = template(name).render([user("Count"), assistant(text)], continue_last=True)
    assert prompt.endswith(text if name not in ("headers", "inst", "turns") else text.lstrip())
    assert templates._MARK not in prompt


def test_unfinished_thinking_is_continued_inside_it():
    prompt = template("reasoning").render([user("Hi"), assistant("", "I think")], continue_last=True)
    assert prompt.endswith("<|im_start|>assistant\n<think>\nI think")


def test_continuing_where_the_template_hides_the_text():
    hides = ChatTemplate("{{ messages[0].content }}{{ 'bot: ' if add_generation_prompt }}")
    assert hides.render([user("q: "), assistant("so ")], continue_last=True) == "q: bot: so "
    assert hides.render([user("q: "), assistant("", "hm")], continue_last=True) == "q: bot: <think>\nhm"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ["I ask", "", "a\n", "{{ x }}"])
def test_a_users_message_is_continued_too(name, text):
    history = [user("Hi"), assistant("Hello")]
    prompt = template(name).render([*history, user(text)], continue_last=True)
    whole = template(name).render([*history, user("I ask")], add_generation_prompt=False)
    assert prompt.endswith(text)
    assert whole.startswith(prompt.removesuffix(text))


def test_thinking_goes_on_where_the_template_refuses_a_message_without_text():
    source = "{% for m in messages %}{{ m.content or raise_exception('no text') }} {% endfor %}{% if add_generation_prompt %}bot: {% endif %}"
    assert ChatTemplate(source).render([user("q"), assistant("", "hm")], continue_last=True) == "q bot: <think>\nhm"
    with pytest.raises(TemplateError, match="no text"):
        ChatTemplate(source).render([user(""), assistant("a")], continue_last=True)


def test_only_a_reply_or_a_users_message_can_be_continued():
    for messages in ([], [system("Hi")]):
        with pytest.raises(TemplateError, match="Send a message"):
            FALLBACK.render(messages, continue_last=True)
    with pytest.raises(TemplateError, match="does not show the user's last message"):
        ChatTemplate("fixed").render([user("Hi")], continue_last=True)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("bot: ", "bot: <think>\nhm"),
        ("bot: {# no such: <seed:think> #}", "bot: <seed:think>\nhm"),
        ("{# <|channel|>analysis<|message|> #}<|start|>assistant", "<|start|>assistant<|channel|>analysis<|message|>hm"),
        ("{# <|channel>thought #}model\n", "model\n<|channel>thought\nhm"),
        ("bot: {% if add_generation_prompt %}<think>{{ '\n' }}{% endif %}", "bot: <think>\nhm"),  # the template begins it itself
    ],
)
def test_thinking_that_the_template_hides_begins_as_its_model_begins_it(source, expected):
    assert ChatTemplate(source + "{{ '' }}").render([user("q"), assistant("", "hm")], continue_last=True) == expected


# --- thinking


@pytest.mark.parametrize(
    ("source", "known"),
    [
        ("{{ enable_thinking }}", {"enable_thinking"}),
        ("{{ thinking_budget }}", {"enable_thinking"}),
        ("{% if thinking is defined %}{% endif %}", {"enable_thinking"}),
        ("{{ messages[0].thinking }}", set()),
        ("{{ reasoning_effort }}{{ preserve_thinking }}", {"reasoning_effort", "preserve_thinking"}),
    ],
)
def test_which_thinking_variables_a_template_knows(source, known):
    assert ChatTemplate(source).thinking_variables == known


def test_whether_a_template_begins_the_thinking():
    assert opens_thinking(ChatTemplate("{{ messages[0].content }}bot: <think>{{ '\n' }}"))
    assert not opens_thinking(ChatTemplate("{{ messages[0].content }}bot: <think></think>{{ '\n' }}"))
    assert not opens_thinking(FALLBACK)


# --- fit: the toy tokenizer makes one token of each word


class Words:
    def __init__(self):
        self.encoded = 0

    def encode(self, text):
        self.encoded += len(text)
        return [hash(word) for word in text.split()]


def history(turns, words=10):
    return [message for n in range(turns) for message in (user(" ".join([f"q{n}"] * words)), assistant(" ".join([f"a{n}"] * words)))]


def chat(messages):
    return FALLBACK.render(messages)


def test_all_is_kept_when_it_fits():
    messages = [system("S"), *history(3), user("last")]
    fitted = fit(chat, messages, 1000, Words().encode)
    assert fitted.prompt == chat(messages)
    assert fitted.dropped == 0
    assert list(fitted.tokens) == Words().encode(fitted.prompt)


def test_oldest_are_dropped_whole_and_system_and_last_are_kept():
    messages = [system("SYSTEM"), *history(20), user("LAST")]
    fitted = fit(chat, messages, 100, Words().encode)
    assert len(fitted.tokens) <= 100
    kept = messages[1 + fitted.dropped :]
    assert fitted.prompt == chat([messages[0], *kept])
    assert kept[0].role == "user"
    assert fitted.dropped > 0


def test_a_last_message_that_fits_only_alone():
    messages = [*history(3), user("w " * 90)]
    fitted = fit(chat, messages, 100, Words().encode)
    assert fitted.dropped == 6
    assert fitted.prompt == chat(messages[-1:])


def test_a_last_message_that_does_not_fit_says_both_numbers():
    messages = [system("S"), *history(3), user("w " * 5000)]
    with pytest.raises(PromptTooLong, match=r"5,00\d tokens .* 1,000 .*ctx-size"):
        fit(chat, messages, 1000, Words().encode)


def test_a_reply_that_is_continued_stays_with_its_question():
    messages = [*history(20), user("Q"), assistant("begun")]
    fitted = fit(lambda m: FALLBACK.render(m, continue_last=True), messages, 60, Words().encode)
    assert fitted.prompt.endswith("begun")
    assert "user\nQ" in fitted.prompt


@pytest.mark.parametrize("messages", [[], [system("S")], [assistant("greeting")], [system("S"), assistant("A"), assistant("B")]])
def test_histories_without_a_user(messages):
    assert fit(chat, messages, 100, Words().encode).prompt == chat(messages)
    with pytest.raises(PromptTooLong):
        fit(chat, [*messages, assistant("w " * 500)], 100, Words().encode)


def test_the_cut_moves_seldom_and_the_prompt_always_fits():
    words, messages, cuts, kept = Words(), [system("You are terse.")], [], []
    for n in range(200):
        messages.append(user(f"question {n} " * (1 + n % 7)))
        fitted = fit(chat, messages, 1000, words.encode)
        assert len(fitted.tokens) <= 1000
        assert fitted.prompt == chat([messages[0], *messages[1 + fitted.dropped :]])
        cuts.append(fitted.dropped)
        kept.append(len(fitted.tokens))
        messages.append(assistant(f"answer {n} " * (1 + n % 11)))
    moves = sum(a != b for a, b in pairwise(cuts))
    assert cuts == sorted(cuts)
    assert cuts[-1] > 200
    assert moves <= 36  # of about 155 turns that do not fit whole; each of them would move a plain cut
    assert min(kept[60:]) >= 650


def test_the_cost_does_not_depend_on_the_length_of_the_history():
    def cost(turns):
        words, renders = Words(), []
        fit(lambda m: renders.append(len(m)) or chat(m), [*history(turns), user("last")], 1000, words.encode)
        return words.encoded, len(renders), max(renders)

    short, long = cost(200), cost(5000)
    assert long[1] <= 6
    assert long[2] <= 200
    assert long[0] <= 1.5 * short[0]


def test_a_text_is_counted_once():
    words, messages = Words(), [*history(300), user("last")]
    fit(chat, messages, 1000, words.encode)
    first, words.encoded = words.encoded, 0
    fitted = fit(chat, messages, 1000, words.encode)
    assert words.encoded <= first / 1.6
    assert words.encoded <= 1.1 * len(fitted.prompt)  # the prompt itself and the last message alone


def test_counts_are_bounded_and_forget_the_oldest(monkeypatch):
    monkeypatch.setattr(templates._Counts, "SIZE", 3)
    words = Words()
    count = templates._counter(words.encode)
    for text in ("a", "b", "c", "a", "d", "a"):
        assert count(text) == 1
    assert words.encoded == 4
    count("b")  # forgotten: "a" was used after it
    assert words.encoded == 5


def test_thinking_counts_only_where_the_template_shows_it():
    messages = [m for n in range(30) for m in (user(f"q{n}"), assistant(f"a{n}", "deep " * 50))] + [user("last")]
    hidden = fit(chat, messages, 100, Words().encode)
    shown = fit(lambda m: template("reasoning").render(m, preserve_thinking=True), messages, 100, Words().encode)
    assert 0 < hidden.dropped < shown.dropped
    assert len(hidden.tokens) > 70
    assert len(shown.tokens) <= 100


def test_a_tokenizer_that_takes_more_for_the_whole_than_for_its_parts():
    def encode(text):
        return list(range(len(text.split()) + (len(text) // 10 if len(text) > 500 else 0)))

    messages = [*history(50), user("last")]
    fitted = fit(chat, messages, 200, encode)
    assert len(fitted.tokens) <= 200


def kept(message):
    return replace(message, kept=True)


def test_what_is_kept_stays_and_the_rest_is_dropped_oldest_first():
    old = history(30)
    messages = [system("S"), kept(assistant("GREETING")), *old[:9], kept(old[9]), *old[10:], user("last")]
    fitted = fit(chat, messages, 120, Words().encode)
    shown = leave_out(messages, fitted.dropped)
    assert len(fitted.tokens) <= 120
    assert fitted.prompt == chat(shown)
    assert shown[:3] == [messages[0], messages[1], kept(old[9])]
    assert shown[3:] == messages[2 + fitted.dropped + 1 :]
    assert shown[3].role == "user"
    assert fitted.dropped > 10


def test_what_is_kept_does_not_make_the_rest_drop_when_all_fits():
    long_words = [kept(assistant("x" * 900)), *[user("y" * 900), assistant("z" * 900)] * 3, user("last")]
    fitted = fit(chat, long_words, 40, Words().encode)  # many characters, few tokens
    assert (fitted.dropped, fitted.prompt) == (0, chat(long_words))


def test_too_much_that_is_kept_says_so():
    messages = [*map(kept, history(10)), user("last")]
    with pytest.raises(PromptTooLong, match=r"what is pinned .*unpin messages"):
        fit(chat, messages, 100, Words().encode)


def test_leaving_out_more_than_there_is_leaves_what_is_kept():
    messages = [system("S"), kept(user("A")), assistant("B"), user("C")]
    assert leave_out(messages, 0) == messages
    assert leave_out(messages, 99) == messages[:2]
    assert leave_out([], 3) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=30), st.integers(20, 400))
def test_whatever_is_kept_the_prompt_fits_or_says_why(parts, budget):
    messages = [replace((assistant if n % 2 else user)("w " * length), kept=pinned) for n, (length, pinned) in enumerate(parts)]
    messages = [system("S"), *messages, user("last")]
    try:
        fitted = fit(chat, messages, budget, Words().encode)
    except PromptTooLong:
        assert len(chat([m for m in messages[:-1] if m.kept or m.role == "system"] + messages[-1:]).split()) > budget
        return
    shown = leave_out(messages, fitted.dropped)
    assert len(fitted.tokens) <= budget
    assert fitted.prompt == chat(shown)
    assert len(shown) == len(messages) - fitted.dropped
    assert all(message in shown for message in messages if message.kept)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=40), st.integers(20, 400), st.sampled_from([0.0, 0.25, 1.0]), st.booleans())
def test_whatever_the_history_the_prompt_fits_or_says_why(lengths, budget, step, with_system):
    messages = [(assistant if n % 2 else user)("w " * length) for n, length in enumerate(lengths)]
    messages = [system("S")] * with_system + messages + [user("last")]
    fitted = fit(chat, messages, budget, Words().encode, step)
    assert len(fitted.tokens) <= budget
    kept = messages[with_system + fitted.dropped :]
    assert fitted.prompt == chat(messages[:with_system] + kept) == chat(leave_out(messages, fitted.dropped))
    assert fitted.dropped == 0 or kept[0].role == "user"
