"""Chat templates: golden prompts, hostile templates, continuing, folding roles, stop strings, fit."""

# ruff: noqa: E501 - templates are easier to compare when each stands on one line
from __future__ import annotations

import threading
import time
import tracemalloc
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules import templates
from modules.conversation import Conversation
from modules.errors import PromptTooLong, TemplateError
from modules.templates import FALLBACK, ChatTemplate, PromptMessage, fit, leave_out, prompt_messages, stop_strings

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
    misses = templates._compiled.cache_info().misses
    assert render(source, (user("a"), user("b"))) == "compiled once 2"
    assert templates._compiled.cache_info().misses == misses


def test_blocks_are_trimmed():
    assert render("  {% if true %}\n  a\n  {% endif %}\nb\n") == "  a\nb"


def test_loop_controls_and_generation_blocks():
    source = "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 4 %}{% break %}{% endif %}{% generation %}{{ i }}{% endgeneration %}{% endfor %}"
    assert render(source) == "023"


def test_what_chat_templates_use_works():
    source = """
{%- macro show(value, sep=', ') -%}{{ value | map('upper') | join(sep) }}{%- endmacro -%}
{%- set ns = namespace(n=0, text='') -%}
{%- for key, value in {'a': 1, 'b': 2}.items() -%}{%- set ns.n = ns.n + value -%}{%- endfor -%}
{{- ns.n }}|{{ show(['x', 'y']) }}|{{ messages[0].content[1:3] }}|{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{- '|' ~ ('a' if messages is iterable and messages is not string else 'b') }}|{{ 'a,b'.split(',')[-1] }}|{{ '%05.1f' % 3.14159 }}
{{- '|{:>4}|'.format(7) }}{{ 'x\ny' | indent(2) }}|{{ 'x\ny' | indent(2, first=true) }}|{{ [3, 1, 2] | sort | first }}|{{ [1, 2] | sum }}
{{- '|' ~ ['a', 'b'][::-1] | join }}|{{ 2 ** 10 }}|{{ 7 % 4 }}|{{ 'ab' * 2 }}|{{ dict(a=1).get('b', 'none') }}|{{ 'x'.center(3) }}|{{ 'aXbX'.replace('X', '-', 1) }}
{{- '|' ~ [{'n': 1}, {'n': 2}] | map(attribute='n') | join('+') }}|{{ [{'n': 1}, {'n': 2}] | sum(attribute='n') }}|{{ [{'n': 1}] | join('', attribute='n') }}
{{- '|' ~ 'a\nb'.splitlines() }}|{{ '<' | e }}{{ '<' | safe }}|{{ 2.567 | round(1) }}|{{ 'a' ~ 1 ~ none }}|{{ missing }}|{{ missing | default('d') }}|{{ '-'.join(['a', 'b']) }}
{{- '|' ~ '%s=%s' | format('k', 'v') }}{% set block %}in{% endset %}{{ block }}{% macro wrap() %}({{ caller() }}){% endmacro %}{% call wrap() %}c{% endcall %}{% filter upper %}f{% endfilter %}"""
    expected = "3|X, Y|el|1|a|b|003.1|   7|x\n  y|  x\n  y|1|3|ba|1024|3|abab|none| x |a-bX|1+2|3|1|['a', 'b']|&lt;<|2.6|a1None||d|a-b|k=vin(c)F"
    assert render(source) == expected


def test_recursive_loops_work_within_the_budget():
    source = "{% for x in tree recursive %}({{ x.n }}{{ loop(x.kids) if x.kids }}){% endfor %}"
    assert render(source, tree=[{"n": 1, "kids": [{"n": 2, "kids": []}]}]) == "(1(2))"


def test_a_field_called_like_a_method_of_dict_is_read():
    assert render("{{ messages[0].pop }}", [{"role": "user", "content": "", "pop": "corn"}]) == "corn"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ x | tojson }}", '{"b": "<é>", "a": [1, null]}'),
        ("{{ x | tojson(sort_keys=true, separators=(',', ':')) }}", '{"a":[1,null],"b":"<é>"}'),
        ("{{ x.a | tojson(indent=1) }}", "[\n 1,\n null\n]"),
        ("{{ x.b | tojson(ensure_ascii=true) }}", '"<\\u00e9>"'),
    ],
)
def test_tojson_as_hugging_face_does_it(source, expected):
    assert render(source, x={"b": "<é>", "a": [1, None]}) == expected


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


def test_messages_of_a_conversation():
    chat, _ = Conversation("c", "me").add("user", "Hi")
    chat, _ = chat.add("assistant", "Yes", reasoning="hm")
    assert prompt_messages(chat.path()) == (user("Hi"), assistant("Yes", "hm"))


@pytest.mark.parametrize(
    "source", ["{{", "{% if %}", "{{ 'a'|nofilter }}", "{{ 1/0 }}", "{{ nothing.at.all }}", "{% endfor %}", "{{ [] + 1 }}", "x" * 100_001]
)
def test_a_broken_template_is_a_named_error(source):
    with pytest.raises(TemplateError, match="template"):
        render(source)


def test_the_templates_own_refusal_is_told():
    with pytest.raises(TemplateError, match="refuses this conversation: tell me why"):
        render("{{ raise_exception('tell me why') }}")


def test_rendering_in_several_threads_at_once():
    results = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(FALLBACK.render([user(str(n))]) == FALLBACK.render([user(str(n))]))) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert results == [True] * 8


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


def test_only_a_reply_can_be_continued():
    for messages in ([], [user("Hi")]):
        with pytest.raises(TemplateError, match="Send a message"):
            FALLBACK.render(messages, continue_last=True)


# --- hostile templates


BIG = "{% set ns = namespace(x='a', t=(1,), g=[1]) %}{% for i in range(100000) %}"
HOSTILE = [
    *("{{ ''.__class__ }}", "{{ ''.__class__.__mro__ }}", "{{ ''['__class__'] }}", "{{ ''|attr('__class__') }}", "{{ cycler.__init__.__globals__ }}"),
    *("{{ lipsum.__globals__ }}", "{{ joiner.__init__ }}", "{{ namespace.__init__.__globals__ }}", "{{ raise_exception.__globals__ }}"),
    *("{{ self._TemplateReference__context }}", "{{ '{0.__class__}'.format(1) }}", "{{ '{0.__class__}'.format_map({}) }}", "{{ strftime_now.__self__ }}"),
    *("{{ [''] | map(attribute='__class__') | list }}", "{{ [''] | map('attr', '__class__') | list }}", "{{ (messages | map).gi_frame }}"),
    *("{{ messages.append(1) }}", "{{ messages[0].update({}) }}", "{{ messages[0].clear() }}", "{{ ''.encode() }}", "{{ loop }}{{ ''.translate({}) }}"),
    *("{% include 'x' %}", "{% import 'x' as y %}", "{% from 'x' import y %}", "{% extends 'x' %}", "{% block a %}{% endblock %}", "{% autoescape true %}{% endautoescape %}"),
    # loops
    "{% for i in range(1000000000) %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) if false %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{% set x = range(100000) | list %}{% endfor %}",
    "{% for i in range(100000) %}{% set x = range(100000) | select | list %}{% endfor %}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% macro f(n) %}{% if n < 60 %}{{ f(n + 1) }}{{ f(n + 1) }}{% endif %}{% endmacro %}{{ f(0) }}",
    "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "{% for x in [1] recursive %}{{ loop(range(100000)) }}{% endfor %}",
    # numbers
    *("{{ 10 ** (10 ** 8) }}", "{{ (10 ** 1000) ** 1000 }}", "{{ 2 ** 4095 * 2 ** 4095 }}", "{{ 9.9 ** 99999 }}", "{{ 1.5 | round(1000000000, 'ceil') }}", "{{ " + "9" * 90_000 + " }}"),
    # text
    *("{{ 'ab' * 1000000000 }}", "{{ 1000000000 * 'ab' }}", "{{ [0] * 10 ** 9 }}", "{{ (0,) * 10 ** 9 }}"),
    *("{{ '%1000000000d' % 1 }}", "{{ '%*d' % (1000000000, 1) }}", "{{ '%.1000000000f' % 1 }}", "{{ '%1000000000d' | format(1) }}"),
    *("{{ ('%(a)s' * 100000) % {'a': 'x' * 1000} }}", "{{ ('%s' * 5000) % ((('x' * 10000),) * 5000) }}"),
    *("{{ 'a' | center(10 ** 9) }}", "{{ 'a'.center(10 ** 9) }}", "{{ 'a'.ljust(10 ** 9) }}", "{{ 'a'.rjust(width=10 ** 9) }}", "{{ '1'.zfill(10 ** 9) }}"),
    *("{% filter center(10 ** 9) %}a{% endfilter %}", "{{ '\\t'.expandtabs(10 ** 9) }}", "{{ (1).to_bytes(10 ** 9, 'big') }}"),
    *("{{ '{:>1000000000}'.format(1) }}", "{{ '{:{w}}'.format(1, w=10 ** 9) }}", "{{ ('{0}' * 100000).format('x' * 10000) }}", "{{ '{0!r:>99999}'.format(1) }}"),
    *("{{ range(100000) | join('x' * 10000) }}", "{{ ('x' * 10000).join('y' * 100000) }}", "{{ ''.join([1]) }}"),
    *("{{ ('a' * 10000) | replace('a', 'b' * 10000) }}", "{{ ('a' * 10000).replace('', 'b' * 10000) }}", "{{ 'a\\nb' | indent(10 ** 9) }}", "{{ ('a\\n' * 100000) | indent('x' * 10000) }}"),
    *("{{ messages | tojson(indent=10 ** 9) }}", "{{ [1, 2] | tojson(separators=('x' * 100000, 'y')) }}", "{{ strftime_now('%Y' * 10000) }}", "{{ lipsum(n=10 ** 9) }}"),
    BIG + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    BIG + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    BIG + "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    BIG + "{% set ns.x = ns.x | replace('a', 'aa') %}{% endfor %}",
    BIG + "{% set ns.x = ns.x ~ 'y' * 1000000 %}{% set x = (ns.x, ns.x) | string %}{% endfor %}",
    "{% for i in range(100000) %}" + "y" * 1000 + "{% endfor %}",
    "{% set x %}{% for i in range(100000) %}" + "y" * 10_000 + "{% endfor %}{% endset %}",
    "{% macro m() %}{% for i in range(100000) %}" + "y" * 1000 + "{% endfor %}{% endmacro %}{{ m() | length }}",
    "{{ " + "('a' * 9000000) ~ " * 500 + "'' }}",
    "{% set a = 'x' * 9000000 %}" + "".join(f"{{% set a{i} = a[{i}:] %}}" for i in range(2000)),
    "{% set a = 'x' * 9000000 %}" + "{% if 'xy' in a or a[1:] == a[:-1] %}{% endif %}" * 1500,
    # lists and nesting
    *("{{ range(1000000000) | list }}", "{{ ('x' * 9000000) | list }}", "{{ ('x ' * 4000000).split() }}", "{{ ('x\\n' * 4000000).splitlines() }}", "{{ ('x' * 9000000) | map('upper') | list }}"),
    *("{{ messages | batch(10 ** 9, 'x') | list }}", "{{ messages | slice(10 ** 9) | list }}", "{{ ([[1]] * 10) | sum(start=[]) }}", "{{ [[1], [2]] | sum }}", "{{ dict([[1, 2]]) }}"),
    BIG + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    BIG + "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x | tojson }}",
    BIG + "{% set ns.t = (ns.t, ns.t) %}{% endfor %}{{ {ns.t: 1} }}",
    BIG + "{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
    BIG + "{% set ns.x = {'a': ns.x}.items() %}{% endfor %}{{ ns.x }}",
    BIG + "{% set ns.g = ns.g | map('abs') %}{% endfor %}{{ ns.g | list }}{{ 1 / 0 }}",
    BIG + "{% set ns.g = namespace(a=ns.g, b=ns.g) %}{% endfor %}{{ ns.g }}{{ 1 / 0 }}",
    # depth of the source
    *("{{ " + "(" * 40_000 + "1" + ")" * 40_000 + " }}", "{{ " + "1+" * 40_000 + "1 }}", "{% if 1 %}" * 4000 + "{% endif %}" * 4000, "{{ " + "[" * 40_000 + "]" * 40_000 + " }}"),
    *("{{ " + "-" * 90_000 + "1 }}", "{{ a" + ".b" * 40_000 + " }}", "{{ a" + "|upper" * 15_000 + " }}", "{% for a in b %}" * 30 + "{% endfor %}" * 30),
]  # fmt: skip


def name_of(source):
    return source[:60].replace("\\", "/")


@pytest.mark.parametrize("source", HOSTILE, ids=name_of)
def test_a_hostile_template_is_refused_in_bounded_time(source, monkeypatch):
    """Processor time is what is bounded: it depends little on what else the machine does. (Unbounded, each takes minutes or for ever.)"""
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.2)
    begun = time.thread_time()
    with pytest.raises(TemplateError):
        render(source)
    assert time.thread_time() - begun < 15


def test_the_time_limit_is_a_second():
    begun = time.thread_time()
    with pytest.raises(TemplateError, match="more than 1 s"):
        render("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}")
    assert 0.9 < time.thread_time() - begun < 1.5


HEAVY = [
    source
    for source in HOSTILE
    if any(
        part in source
        for part in ("ns.x ~ ns.x", "[ns.x, ns.x]", "'%s' * 5000", "a[0:]", "(0,) *", "('x ' * 4000000)", "| select | list", "namespace(a=ns.g")
    )
]


@pytest.mark.parametrize("source", HEAVY, ids=name_of)
def test_a_hostile_template_is_refused_in_bounded_memory(source, monkeypatch):
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.3)  # tracing makes everything slower
    tracemalloc.start()
    try:
        with pytest.raises(TemplateError):
            render(source)
        assert tracemalloc.get_traced_memory()[1] < 400_000_000
    finally:
        tracemalloc.stop()


def test_output_is_limited(monkeypatch):
    monkeypatch.setattr(templates, "MAX_OUTPUT", 1000)
    assert len(render("{% for i in range(1000) %}x{% endfor %}")) == 1000
    with pytest.raises(TemplateError, match="huge text"):
        render("{% for i in range(1001) %}x{% endfor %}")


def test_steps_are_limited(monkeypatch):
    monkeypatch.setattr(templates, "_MAX_STEPS", 100)
    with pytest.raises(TemplateError, match="too many steps"):
        render("{% for i in range(101) %}{% endfor %}")


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
