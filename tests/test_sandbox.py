"""The sandbox: what chat templates use works, and a hostile one is refused in bounded time and memory."""

# ruff: noqa: E501 - templates are easier to compare when each stands on one line
from __future__ import annotations

import threading
import time
import tracemalloc

import pytest

from modules import sandbox
from modules.errors import TemplateError
from modules.templates import FALLBACK, ChatTemplate, PromptMessage

HELLO = (PromptMessage("user", "Hello"),)


def user(text):
    return PromptMessage("user", text)


def render(source, messages=HELLO, **variables):
    return ChatTemplate(source).render(messages, **variables)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}{{ enable_thinking }}", "enable_thinking"),
        ("{%- set x = y if x is not defined else x %}{{ x }}", "x y"),
        ("{% macro f() %}{{ inside }}{% endmacro %}{% set ns = namespace(a=given) %}{{ ns.a }}", "given inside"),
        ("{% for m in messages %}{{ m.thinking }}{% endfor %}{# enable_thinking #}{{ 'reasoning_effort' }}", "messages"),
        ("{% for m in messages %}{% set thinking = m.thinking %}{{ thinking }}{% endfor %}", "messages"),
        ("plain", ""),
    ],
)
def test_what_a_template_may_ask_for(source, names):
    assert sandbox.variables(source) == set(names.split())


def test_what_a_broken_or_forbidden_template_asks_for_is_an_error():
    for source in ("{{", "{% include 'x' %}", "x" * (sandbox.MAX_SOURCE + 1)):
        with pytest.raises(TemplateError):
            sandbox.variables(source)


# --- what templates use


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


@pytest.mark.parametrize(
    "source", ["{{", "{% if %}", "{{ 'a'|nofilter }}", "{{ 1/0 }}", "{{ nothing.at.all }}", "{% endfor %}", "{{ [] + 1 }}", "x" * 100_001]
)
def test_a_broken_template_is_a_named_error(source):
    with pytest.raises(TemplateError, match="template"):
        render(source)


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
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
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
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.3)  # tracing makes everything slower
    tracemalloc.start()
    try:
        with pytest.raises(TemplateError):
            render(source)
        assert tracemalloc.get_traced_memory()[1] < 400_000_000
    finally:
        tracemalloc.stop()


def test_output_is_limited(monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_OUTPUT", 1000)
    assert len(render("{% for i in range(1000) %}x{% endfor %}")) == 1000
    with pytest.raises(TemplateError, match="huge text"):
        render("{% for i in range(1001) %}x{% endfor %}")


def test_steps_are_limited(monkeypatch):
    monkeypatch.setattr(sandbox, "_MAX_STEPS", 100)
    with pytest.raises(TemplateError, match="too many steps"):
        render("{% for i in range(101) %}{% endfor %}")
