"""Each format as it comes over the wire; whole, by characters and by threes."""

from __future__ import annotations

import pytest
from tool_call_help import HERMES, read

from modules.tool_calls import FORMATS

CITY = '{"city": "Paris \\"{<é😀"}'
CALL = ("get_weather", {"city": 'Paris "{<é😀'})
ADD = ("add", {"a": 1})
DS = "<｜tool▁call▁begin｜>"
DS_END = "<｜tool▁call▁end｜>"
KIMI = "<|tool_call_begin|>functions."
KIMI_END = "<|tool_call_end|>"
ARG = "<|tool_call_argument_begin|>"
GLM = "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>n</arg_key>\n<arg_value>3</arg_value>\n"
QWEN = "<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=n>\n3\n</parameter>\n</function>"
INVOKE = '<invoke name="get_weather"><parameter name="city">Paris</parameter><parameter name="n">3</parameter></invoke>'
TWO = ("get_weather", {"city": "Paris", "n": 3})
LLAMA = f'{{"name": "get_weather", "parameters": {CITY}}}'
PLAIN = f'{{"name": "get_weather", "arguments": {CITY}}}'

WIRE = {
    "deepseek": (f'{DS}get_weather<｜tool▁sep｜>{CITY}{DS_END}\n{DS}add<｜tool▁sep｜>{{"a": 1}}{DS_END}<｜tool▁calls▁end｜>', [CALL, ADD]),
    "deepseek, section": (f"<｜tool▁calls▁begin｜>{DS}get_weather<｜tool▁sep｜>{CITY}{DS_END}<｜tool▁calls▁end｜>", [CALL]),
    "deepseek, V3": (f"<｜tool▁calls▁begin｜>{DS}function<｜tool▁sep｜>get_weather\n```json\n{CITY}\n```{DS_END}<｜tool▁calls▁end｜>", [CALL]),
    "kimi": (f"<|tool_calls_section_begin|>{KIMI}get_weather:0{ARG}{CITY}{KIMI_END}<|tool_calls_section_end|>", [CALL]),
    "kimi, two": (f'{KIMI}get_weather:0{ARG}{CITY}{KIMI_END}{KIMI}add:1{ARG}{{"a": 1}}{KIMI_END}', [CALL, ADD]),
    "gpt_oss": (f"<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{CITY}<|call|>", [CALL]),
    "gpt_oss, channel first": (f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{CITY}<|call|>", [CALL]),
    "gpt_oss, begun": (f" to=functions.get_weather<|channel|>commentary json<|message|>{CITY}", [CALL]),
    "gpt_oss, start and channel": (f"<|start|>assistant<|channel|>commentary to=functions.get_weather<|message|>{CITY}<|call|>", [CALL]),
    "gemma": ('<|tool_call>call:get_weather{city:<|"|>Paris "{<é😀<|"|>}<tool_call|>', [CALL]),
    "gemma, values": (
        '<|tool_call>call:add{a:-1.5,b:true,c:null,d:[1,<|"|>}<|"|>],e:{f:<|"|><|"|>}}<tool_call|>',
        [("add", {"a": -1.5, "b": True, "c": None, "d": [1, "}"], "e": {"f": ""}})],
    ),
    "minimax": (f"<minimax:tool_call>\n{INVOKE}\n{INVOKE}\n</minimax:tool_call>", [TWO, TWO]),
    "glm": (f"{GLM}</tool_call>", [TWO]),
    "glm, two": (f"{GLM}</tool_call>\n<tool_call>get\n</tool_call>", [TWO, ("get", {})]),
    "qwen_coder": (f"<tool_call>\n{QWEN}\n</tool_call>\n<tool_call>\n{QWEN}\n</tool_call>", [TWO, TWO]),
    "qwen_coder, bare": (QWEN, [TWO]),
    "hermes": (f"<tool_call>\n{PLAIN}\n</tool_call>\n{HERMES}", [CALL, ADD]),
    "hermes, end marker within": (
        '<tool_call>{"name": "get", "arguments": {"x": "</tool_call> <tool_call>"}}</tool_call>',
        [("get", {"x": "</tool_call> <tool_call>"})],
    ),
    "hermes, arguments first": ('<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', [ADD]),
    "hermes, arguments as text": ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', [ADD]),
    "hermes, no arguments": ('<tool_call>{"name": "get"}</tool_call>', [("get", {})]),
    "hermes, line breaks in a string": ('<tool_call>{"name": "get", "arguments": {"x": "a\nb"}}</tool_call>', [("get", {"x": "a\nb"})]),
    "mistral": (f'[TOOL_CALLS]get_weather[ARGS]{CITY}[TOOL_CALLS]add[CALL_ID]abc123[ARGS]{{"a": 1}}', [CALL, ADD]),
    "mistral, older": (f'[TOOL_CALLS] [{PLAIN}, {{"name": "add", "arguments": {{"a": 1}}}}]', [CALL, ADD]),
    "llama, bare": (f'get_weather{CITY}\nadd{{"a": 1}}', [CALL, ADD]),
    "llama, answer": (LLAMA, [CALL]),
    "llama, answers": (f"{LLAMA}; {LLAMA}\n{LLAMA}", [CALL] * 3),
    "llama, tagged": (f"<|python_tag|>{LLAMA}; {LLAMA}", [CALL, CALL]),
    "pythonic": ("[get_weather(city='Paris \"{<é😀'), add(a=1)]", [CALL, ADD]),
    "pythonic, values": (
        '[add(a=[1, -2.5, None], b={\'c\': True, "d": (1,)}, e="\\n\\u00e9\\\'"), get()]',
        [("add", {"a": [1, -2.5, None], "b": {"c": True, "d": [1]}, "e": "\né'"}), ("get", {})],
    ),
    "generic, fence": (f"```json\n{PLAIN}\n```", [CALL]),
    "generic, fence without language": (f"```\n[{PLAIN}]\n```", [CALL]),
    "generic, tag": (f"<function_call>{PLAIN}\n{PLAIN}</function_call>", [CALL, CALL]),
    "generic, answer": (f"[{PLAIN}, {PLAIN}]", [CALL, CALL]),
    "generic, OpenAI's": ('{"type": "function", "function": {"name": "add", "arguments": "{\\"a\\": 1}"}}', [ADD]),
    "generic, function": ('{"function": "add", "parameters": {"a": 1}}', [ADD]),
}


@pytest.mark.parametrize(("text", "calls"), WIRE.values(), ids=WIRE.keys())
def test_calls_as_they_come(text, calls):
    assert [part for part in read(text) if not isinstance(part, str) or part.strip()] == calls


MARKED = {
    name: wire
    for name, wire in WIRE.items()
    if name.split(",")[0] not in ("generic", "llama", "pythonic") or name in ("llama, tagged", "llama, bare", "pythonic")
}


@pytest.mark.parametrize(("text", "calls"), MARKED.values(), ids=MARKED.keys())
def test_prose_before_and_behind_is_given_out(text, calls):
    found = read(f"Let me see.\n\n{text}\nThat is all.")
    assert [part for part in found if not isinstance(part, str) or part.strip()] == ["Let me see.", *calls, "\nThat is all."]


@pytest.mark.parametrize("name", ["get_weathe", "unknown", "GET_WEATHER"])
@pytest.mark.parametrize("text", [text for text, calls in WIRE.values() if {name for name, _ in calls} == {"get_weather"}])
def test_only_offered_names_count(text, name):
    text = text.replace("get_weather", name)
    assert read(text) == [text]


CERTAIN = [text for name, (text, calls) in MARKED.items() if len(calls) == 1 and name != "glm"]


@pytest.mark.parametrize("text", CERTAIN)
def test_a_call_cut_off_anywhere_is_text_or_the_whole_call(text):
    whole = read(text)
    for cut in range(1, len(text)):
        assert read(text[:cut]) in ([text[:cut]], whole, [*whole, "\n"])


def test_glm_may_end_where_its_only_end_marker_would_stand():
    assert read(GLM) == [TWO]
    assert read(GLM[:-2]) == [GLM[:-2]]
    assert read("<tool_call>get_weather\n") == ["<tool_call>get_weather\n"]


MALFORMED = [
    '<tool_call>{"name": "add", "arguments": {"a": }}</tool_call> b',
    '<tool_call>{"name": "add", "arguments": {"a": 1}]</tool_call>',
    '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "add", "arguments": "x"}</tool_call>',
    '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>',
    '<tool_call>{"name": "add", "arguments": {"a": 1e999}}</tool_call>',
    '<tool_call>{"name": "add", "arguments": {"a": ' + "9" * 5000 + "}}</tool_call>",
    "<tool_call>{'name': 'add'}</tool_call>",
    "<tool_call>[]</tool_call>",
    "<tool_call></tool_call>",
    "[TOOL_CALLS]add[ARGS][1]",
    "[TOOL_CALLS]add[ARGS]",
    'add{"a": 1',
    "add{a: 1}",
    "add {}",
    "[add(1)]",
    "[add(a=b)]",
    "[add(a=1]",
    "[add(a=1)",
    "[add(a=1); add(a=2)]",
    "<tool_call><function=add><parameter=a>1</function></tool_call>",
    "<tool_call><function=add><parameter=a>1</parameter>x</function></tool_call>",
    "<tool_call>add<arg_key>a</arg_key>1</tool_call>",
    '<minimax:tool_call><invoke name="add">x</invoke></minimax:tool_call>',
    "<|tool_call>call:add{a:b}<tool_call|>",
    "<|tool_call>call:add{<tool_call|>",
    "<|channel|>commentary to=functions.add<|message|>x{}",
    "<|channel|>final<|message|>add{}",
    "<|channel|>" + "x" * 500 + "to=add<|message|>{}",
    f"{DS}add<｜tool▁sep｜>x{DS_END}",
    '```json\n{"name": "add"}\n``` {"a": 1}',
    '{"name": "add", "arguments": {}} and more',
    '<p>{"name": "add", "arguments": {}}</q>',
]


@pytest.mark.parametrize("text", MALFORMED)
def test_what_is_no_call_is_text_unchanged(text):
    assert read(text) == [text]
    assert read(f"a \n{text}\n b") == [f"a \n{text}\n b"]


def test_the_last_of_two_values_for_one_name_counts():
    two = [("add", {"a": 2})]
    assert read("<function=add><parameter=a>1</parameter><parameter=a>2</parameter></function>") == two
    assert read("<tool_call>add<arg_key>a</arg_key><arg_value>1</arg_value><arg_key>a</arg_key><arg_value>2</arg_value></tool_call>") == two
    assert read('[TOOL_CALLS]add[ARGS]{"a": 1, "a": 2}') == two
    assert read("[add(a=1, a=2)]") == two
    assert read("<|tool_call>call:add{a:1,a:2}<tool_call|>") == two


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("Paris", "Paris"),
        ("3", 3),
        ("007", "007"),
        ('"3"', "3"),
        ("[1, 2]", [1, 2]),
        ('{"a": [}', '{"a": [}'),
        ("", ""),
        ("NaN", "NaN"),
        ("1e999", "1e999"),
        ("\n\n  indented\n\n", "\n  indented\n"),
        ("[" * 100 + "]" * 100, "[" * 100 + "]" * 100),
    ],
)
def test_parameter_text_that_is_json_becomes_its_value(value, meant):
    text = value.removeprefix("\n").removesuffix("\n")
    assert read(f"<function=add><parameter=a>\n{text}\n</parameter></function>") == [("add", {"a": meant})]
    if not value.startswith("\n"):
        assert read(f"<tool_call>add<arg_key>a</arg_key><arg_value>{value}</arg_value></tool_call>") == [("add", {"a": meant})]


HOSTILE = {
    "objects": 'add{"a": ' + '{"a": ' * 5000 + "1" + "}" * 5001,
    "lists": '<tool_call>{"name": "add", "arguments": {"a": ' + "[" * 5000 + "]" * 5000 + "}}</tool_call>",
    "unclosed": "{" * 5000 + "[" * 5000,
    "pythonic": "[add(a=" + "[" * 5000 + "]" * 5000 + ")]",
    "pythonic objects": "[add(a=" + "{'a':" * 5000 + "1" + "}" * 5000 + ")]",
    "gemma": "<|tool_call>call:add{a:" + "{a:" * 5000 + "1" + "}" * 5001 + "<tool_call|>",
    "within a string": '<tool_call>{"name": "add", "arguments": "' + "[" * 5000 + '"}</tool_call>',
    "quotes": '<tool_call>{"name": "add", "arguments": {' + '"\\"' * 5000,
    "backslashes": '<tool_call>{"name": "add", "arguments": {"' + "\\" * 5001,
    "signs": "[add(a=" + "-" * 5000 + "1)]",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_depth_is_text(text):
    assert read(text) == [text]
    assert read(f"{text}\n{HERMES}")[-1:] in ([("add", {"a": 1})], [f"{text}\n{HERMES}"])


def test_depth_up_to_the_bound_is_read():
    assert read('add{"a": ' + "[" * 60 + "]" * 60 + "}") != ['add{"a": ' + "[" * 60 + "]" * 60 + "}"]


def test_arguments_can_always_be_encoded():
    [(name, arguments)] = read('add{"a": "\\ud800", "b": "é"}')
    assert (name, arguments) == ("add", {"a": "?", "b": "é"})


def test_names_are_not_mistaken_for_longer_ones_and_may_be_unusual():
    assert read("get{}") == [("get", {})]
    assert read("get_weather{}") == [("get_weather", {})]
    assert read('write-file{"a": "б"}\nпогода{}') == [("write-file", {"a": "б"}), ("погода", {})]


def test_format_names_are_unique():
    assert len({row.name for row in FORMATS}) == len(FORMATS)


# --- values without quotes --------------------------------------------------------------------------------------------------------------

UNQUOTED = {
    "glm": "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>{}</arg_value></tool_call>",
    "qwen_coder": "<function=add>\n<parameter=a>\n{}\n</parameter>\n</function>",
    "minimax": '<minimax:tool_call><invoke name="add"><parameter name="a">{}</parameter></invoke></minimax:tool_call>',
}
OPTIONAL = {"anyOf": [{"type": "string"}, {"type": "null"}]}
CHOICE = {"$defs": {"Mode": {"enum": ["1", "2"]}}, "properties": {"a": {"$ref": "#/$defs/Mode"}}}


@pytest.mark.parametrize("form", UNQUOTED.values(), ids=UNQUOTED)
@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "1.10", "1.10"),
        ({"type": "string"}, '{"name": "x"}', '{"name": "x"}'),
        ({"type": "string"}, "true", "true"),
        ({"type": "string"}, "null", "null"),
        ({"type": "string"}, '"quoted"', '"quoted"'),
        ({"type": ["string", "null"]}, "1", "1"),
        ({"type": ["string", "null"]}, "null", None),
        (OPTIONAL, "7", "7"),
        (OPTIONAL, "null", None),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"const": "1"}, "1", "1"),
        ({"allOf": [{"description": "x"}, {"type": "string"}]}, "1", "1"),
        ({"allOf": [{}]}, "1", 1),
        ({"type": "integer"}, "1", 1),
        ({"type": ["string", "integer"]}, "1", 1),
        ({"enum": ["1", 1]}, "1", 1),
        ({"type": "object"}, '{"x": "1"}', {"x": "1"}),
        ({}, "1", 1),
        (None, "1", 1),
        ({"type": {"hostile": []}}, "1", 1),
        ({"$ref": "#/properties/a"}, "1", 1),
        ({"anyOf": [{"$ref": 1}, 5]}, "1", 1),
    ],
)
def test_a_value_without_quotes_is_what_the_tool_declares(form, schema, text, value):
    tools = {"add": {"type": "object", "properties": {"a": schema}}}
    assert read(form.format(text), names=tools) == [("add", {"a": value})]


@pytest.mark.parametrize("form", UNQUOTED.values(), ids=UNQUOTED)
@pytest.mark.parametrize(("tool", "value"), [(CHOICE, "1"), ({"properties": {}}, 1), ({"properties": 5}, 1), ({}, 1), (None, 1), ({"$defs": 1}, 1)])
def test_a_declaration_may_be_shared_or_absent(form, tool, value):
    assert read(form.format("1"), names={"add": tool}) == [("add", {"a": value})]
