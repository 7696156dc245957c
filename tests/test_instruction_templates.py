"""Instruction templates: golden prompts of those that come along, files in all forms, the older form, hostile files and names."""

# ruff: noqa: E501 - prompts are easier to compare when each turn stands on one line
from __future__ import annotations

import os
import time
from datetime import datetime

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from modules import instruction_templates, templates
from modules.errors import DataError, NameError_, NotFound, SettingsError, TemplateError
from modules.instruction_templates import MAX_BYTES, SHIPPED, Templates, check, read_template
from modules.templates import FALLBACK, ChatTemplate, PromptMessage, stop_strings

SYSTEM, USER, REPLY, NEXT = (
    PromptMessage("system", "Be brief."),
    PromptMessage("user", "One?"),
    PromptMessage("assistant", "Un."),
    PromptMessage("user", "Two?"),
)
CHAT = [SYSTEM, USER, REPLY, NEXT]
GOOD = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"

# name: (bos_token, eos_token, prompt of CHAT, stop string), each as the model's makers document it
DOCUMENTED = {
    "Alpaca": (
        "<s>",
        "</s>",
        "Be brief.\n\n### Instruction:\nOne?\n\n### Response:\nUn.\n\n### Instruction:\nTwo?\n\n### Response:\n",
        "\n### Instruction:",
    ),
    "ChatML": (
        "",
        "<|im_end|>",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nUn.<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "Command-R": (
        "<BOS_TOKEN>",
        "<|END_OF_TURN_TOKEN|>",
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>One?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Un.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Two?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
    ),
    "DeepSeek": (
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>One?<｜Assistant｜>Un.<｜end▁of▁sentence｜><｜User｜>Two?<｜Assistant｜>",
        "<｜end▁of▁sentence｜>",
    ),
    "Gemma": (
        "<bos>",
        "<eos>",
        "<bos><start_of_turn>user\nBe brief.\n\nOne?<end_of_turn>\n<start_of_turn>model\nUn.<end_of_turn>\n<start_of_turn>user\nTwo?<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>",
    ),
    "GPT-OSS": (
        "<|startoftext|>",
        "<|return|>",
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\nCurrent date: 2025-06-28\n\n"
        "Reasoning: medium\n\n# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
        "<|start|>developer<|message|># Instructions\n\nBe brief.\n\n<|end|><|start|>user<|message|>One?<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Un.<|end|><|start|>user<|message|>Two?<|end|><|start|>assistant",
        "<|end|>",
    ),
    "Llama 2": (
        "<s>",
        "</s>",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nOne? [/INST] Un. </s><s>[INST] Two? [/INST]",
        "</s>",
    ),
    "Llama 3": (
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nOne?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nUn.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nTwo?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "Mistral": ("<s>", "</s>", "<s>[INST] Be brief.\n\nOne?[/INST] Un.</s>[INST] Two?[/INST]", "</s>"),
    "Mistral V7 Tekken": ("<s>", "</s>", "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]One?[/INST]Un.</s>[INST]Two?[/INST]", "</s>"),
    "OpenChat": (
        "<s>",
        "<|end_of_turn|>",
        "<s>Be brief.<|end_of_turn|>GPT4 Correct User: One?<|end_of_turn|>GPT4 Correct Assistant: Un.<|end_of_turn|>GPT4 Correct User: Two?<|end_of_turn|>GPT4 Correct Assistant:",
        "<|end_of_turn|>",
    ),
    "Phi-3": (
        "<s>",
        "<|endoftext|>",
        "<|system|>\nBe brief.<|end|>\n<|user|>\nOne?<|end|>\n<|assistant|>\nUn.<|end|>\n<|user|>\nTwo?<|end|>\n<|assistant|>\n",
        "<|end|>",
    ),
    "Phi-4": (
        "<|endoftext|>",
        "<|im_end|>",
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>One?<|im_end|><|im_start|>assistant<|im_sep|>Un.<|im_end|>"
        "<|im_start|>user<|im_sep|>Two?<|im_end|><|im_start|>assistant<|im_sep|>",
        "<|im_end|>",
    ),
    "Vicuna": ("<s>", "</s>", "<s>Be brief. USER: One? ASSISTANT: Un.</s>USER: Two? ASSISTANT:", "</s>"),
    "Zephyr": ("<s>", "</s>", "<|system|>\nBe brief.</s>\n<|user|>\nOne?</s>\n<|assistant|>\nUn.</s>\n<|user|>\nTwo?</s>\n<|assistant|>\n", "</s>"),
}


def shipped(name):
    bos, eos = DOCUMENTED[name][:2]
    return ChatTemplate(SHIPPED[name], bos, eos, now=lambda: datetime(2025, 6, 28))


# --- what comes with the program


def test_every_shipped_template_is_compared():
    assert set(DOCUMENTED) == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_golden_prompts(name):
    assert shipped(name).render(CHAT) == DOCUMENTED[name][2]


@pytest.mark.parametrize("name", SHIPPED)
def test_stop_strings(name):
    assert stop_strings(shipped(name)) == (DOCUMENTED[name][3],)


@pytest.mark.parametrize("name", SHIPPED)
def test_turns_end_although_the_model_names_no_end_token(name):
    assert stop_strings(ChatTemplate(SHIPPED[name])) == (DOCUMENTED[name][3],)


TRIMMED = ("Command-R", "Gemma", "Llama 2", "Llama 3", "Mistral")
"""As the models' own templates do; Mistral's only the assistant's texts."""


@pytest.mark.parametrize("name", TRIMMED)
def test_texts_are_trimmed_where_the_models_own_template_trims(name):
    answer = PromptMessage("assistant", " Un. \n")
    assert shipped(name).render([USER, answer, NEXT]) == shipped(name).render([USER, REPLY, NEXT])
    if name != "Mistral":
        assert shipped(name).render([PromptMessage("user", "\n One? ")]) == shipped(name).render([USER])


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("text", ["One, ", "", "a\n", " lead", "{{ x }} <|im_end|>"])
def test_a_reply_is_continued(name, text):
    prompt = shipped(name).render([SYSTEM, USER, PromptMessage("assistant", text)], continue_last=True)
    opened = shipped(name).render([SYSTEM, USER], add_generation_prompt=True)
    start = opened + {"GPT-OSS": "<|channel|>final<|message|>"}.get(name, "")
    space = " " if name in ("Llama 2", "Mistral", "OpenChat", "Vicuna") else ""  # part of the reply's first token, so not in the opening
    assert prompt == start + space + (text.lstrip() if name in TRIMMED else text)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("messages", [[SYSTEM, REPLY, NEXT], [USER, REPLY, SYSTEM, NEXT], [USER, NEXT, REPLY, REPLY, NEXT], [SYSTEM, USER]])
def test_no_order_of_messages_loses_one(name, messages):
    prompt = shipped(name).render(messages)
    for text in {message.content for message in messages}:
        assert prompt.count(text) == [message.content for message in messages].count(text)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_finished_chat_ends_with_its_last_turn(name):
    prompt = shipped(name).render(CHAT[:3], add_generation_prompt=False)
    assert shipped(name).render(CHAT).startswith(prompt)  # what an engine has cached stays valid
    assert prompt.rstrip().endswith(("Un.", DOCUMENTED[name][3]))


@pytest.mark.parametrize(
    ("name", "start"), [("Alpaca", "Below is an instruction that describes a task."), ("Vicuna", "<s>A chat between a curious user")]
)
def test_the_documented_preface_stands_where_no_system_message_does(name, start):
    assert shipped(name).render([USER]).startswith(start)
    assert start not in shipped(name).render([SYSTEM, USER])


def test_harmony_shows_effort_and_only_unfinished_thinking():
    template = shipped("GPT-OSS")
    assert "\nReasoning: high\n" in template.render([USER], reasoning_effort="high")
    thought = PromptMessage("assistant", "", "Let me")
    assert template.render([USER, thought], continue_last=True).endswith("<|start|>assistant<|channel|>analysis<|message|>Let me")
    assert "analysis<|message|>" not in template.render([USER, PromptMessage("assistant", "Un.", "Let me"), NEXT])


# --- files


def test_the_forms_of_a_file():
    assert read_template(GOOD, "a.jinja") == read_template(GOOD, "a.jinja2") == GOOD
    for key in ("instruction_template", "chat_template"):
        assert read_template(yaml.safe_dump({key: GOOD}), "a.yaml") == GOOD
    assert read_template("instruction_template: |-\n  a\n    b: {{ 'c' }}\n\n  d\n", "a.yml") == "a\n  b: {{ 'c' }}\n\nd"


def test_the_newer_field_wins():
    text = yaml.safe_dump({"turn_template": "x", "chat_template": "older", "instruction_template": GOOD})
    assert read_template(text, "a.yaml") == GOOD


@pytest.mark.parametrize(
    ("text", "name", "fix"),
    [
        ("", "a.jinja", "delete it"),
        (" \n", "a.yaml", "delete it"),
        (GOOD, "a.txt", "ends with .jinja"),
        ("[1, 2]", "a.yaml", "expected 'instruction_template"),
        ("just text", "a.yaml", "expected 'instruction_template"),
        ("user: x", "a.yaml", "Add that key"),
        ("a: b\nc: 'open", "a.yaml", "line 2.*Correct that line"),
        ("instruction_template: [a]", "a.yaml", "must be text"),
        ("instruction_template: {a: b}", "a.yaml", "must be text"),
        ('instruction_template: "a\\ud800"', "a.yaml", "Write the character itself"),
        ("turn_template: x", "a.yaml", r"must contain <\|user-message\|> once"),
        ("turn_template: <|bot-message|><|user-message|>", "a.yaml", "once after it"),
        ("turn_template: <|user-message|><|user-message|><|bot-message|>", "a.yaml", "once after it"),
        ("turn_template: <|user-message|><|bot-message|>\nuser: [a]", "a.yaml", "user must be text"),
        ("x" * (MAX_BYTES + 1), "a.jinja", "larger than"),
        ("x: " * 1_000_000, "a.yaml", "larger than"),
    ],
)
def test_a_wrong_file_is_named_with_its_fix(text, name, fix):
    with pytest.raises(TemplateError, match=f"(?s){name}.*{fix}"):
        read_template(text, name)


BOMBS = {
    "aliases": "a: &a [x]\n" + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]\n" for n in range(20)),
    "merges": "a: &a {x: y}\n" + "".join(f"{chr(98 + n)}: &{chr(98 + n)} {{<<: [*{chr(97 + n)}, *{chr(97 + n)}]}}\n" for n in range(20)),
    "itself": "a: &a [*a]\n",
    "deep": "[" * 100_000,
    "deep mapping": "{a: " * 90_000,
    "many": "[" + "a," * 190_000 + "]",
    "many lines": "a: b\n" * 70_000,
    "many dashes": "- " * 190_000,
    "objects": "instruction_template: !!python/object/apply:os.system [exit]",
    "keys": "? [a]\n: b",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_yaml_bomb_is_refused_soon(name):
    start = time.process_time()
    with pytest.raises(TemplateError, match=r"bomb\.yaml"):
        read_template(BOMBS[name], "bomb.yaml")
    assert time.process_time() - start < 8  # of hours, or of what the memory holds


def test_values_are_text_whatever_they_look_like():
    text = "instruction_template: 0x" + "f" * 50_000
    assert read_template(text, "a.yaml") == "0x" + "f" * 50_000
    fields = "turn_template: <|user|><|user-message|><|bot|><|bot-message|>\nuser: yes\nbot: 2020-99-99"
    assert ChatTemplate(read_template(fields, "a.yaml")).render([USER]) == "yesOne?2020-99-99"


# --- the older form


def older(**fields):
    return ChatTemplate(read_template(yaml.safe_dump(fields), "older.yaml"))


def test_an_older_file_with_a_place_for_the_system_message():
    template = older(
        user="USER:",
        bot="ASSISTANT:",
        turn_template="<|user|> <|user-message|>\n<|bot|> <|bot-message|></s>\n",
        context="<|system-message|>\n\n",
        system_message="A chat.",
    )
    assert template.render(CHAT) == "Be brief.\n\nUSER: One?\nASSISTANT: Un.</s>\nUSER: Two?\nASSISTANT:"
    assert template.render([USER]) == "A chat.\n\nUSER: One?\nASSISTANT:"
    assert template.render([USER, REPLY], continue_last=True) == "A chat.\n\nUSER: One?\nASSISTANT: Un."
    assert stop_strings(template) == ("</s>",)


def test_an_older_file_with_a_fixed_context():
    template = older(
        user="### Instruction:",
        bot="### Response:",
        turn_template="<|user|>\n<|user-message|>\n\n<|bot|>\n<|bot-message|>\n\n",
        context="Below is an instruction.\n\n",
    )
    assert template.render(CHAT) == (
        "Below is an instruction.\n\n### Instruction:\nBe brief.\n\nOne?\n\n### Response:\nUn.\n\n### Instruction:\nTwo?\n\n### Response:\n"
    )
    assert stop_strings(template) == ("\n### Instruction:",)


def test_an_older_file_without_a_bots_name():
    template = older(turn_template="[INST] <|user-message|> [/INST] <|bot-message|></s>", context="<s>")
    assert template.render([USER, REPLY, NEXT]) == "<s>[INST] One? [/INST] Un.</s>[INST] Two? [/INST]"


def test_an_older_file_whose_names_look_like_marks():
    template = older(user="<|user|>", bot="<|bot-message|>", turn_template="<|user|>\n<|user-message|>\n<|bot|>\n<|bot-message|>\n")
    assert template.render([USER, REPLY, NEXT]) == "<|user|>\nOne?\n<|bot-message|>\nUn.\n<|user|>\nTwo?\n<|bot-message|>\n"


NASTY = """'"\\ {{ 7*7 }} {% endfor %} {# x #} \\n \\u0041 \n\t é😀 %} }} {%- raw -%} #}"""


def test_nothing_in_an_older_file_is_jinja():
    template = older(
        user=NASTY, bot=NASTY, turn_template=f"{NASTY}<|user|><|user-message|><|bot|><|bot-message|>{NASTY}", context=f"{NASTY}<|system-message|>"
    )
    assert template.render(CHAT) == f"{NASTY}Be brief.{NASTY}{NASTY}One?{NASTY}Un.{NASTY}{NASTY}{NASTY}Two?{NASTY}"
    template = older(turn_template="<|user-message|>\n<|bot-message|>", context="<|system-message|>|", system_message=NASTY)
    assert template.render([USER]) == f"{NASTY}|One?\n"


FIELD = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda text: "<|" not in text)


@settings(max_examples=60, deadline=None)
@given(FIELD, FIELD, FIELD, FIELD)
def test_whatever_the_fields_they_are_shown_as_they_are(user, bot, context, end):
    fields = {"user": user, "bot": bot, "context": context, "turn_template": f"<|user|><|user-message|><|bot|><|bot-message|>{end}"}
    template = ChatTemplate(instruction_templates._converted(fields, "x.yaml"))
    assert template.render([USER, REPLY, NEXT]) == f"{context}{user}One?{bot}Un.{end}{user}Two?{bot.rstrip(' ')}"


# --- the folder


@pytest.fixture
def own(tmp_path):
    return Templates(tmp_path / "instruction-templates")


def put(own, file, content=GOOD):
    own.folder.mkdir(exist_ok=True)
    path = own.folder / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_without_a_folder_there_are_the_shipped_ones(own):
    assert own.names() == sorted(SHIPPED, key=str.casefold)
    assert own.get("ChatML") == SHIPPED["ChatML"]
    assert ChatTemplate(own.get("ChatML")).render(CHAT) == FALLBACK.render(CHAT)


def test_files_are_listed_among_them_and_win(own):
    put(own, "alpha.yaml", yaml.safe_dump({"instruction_template": GOOD}))
    put(own, "Zebra.1.jinja")
    put(own, "ChatML.jinja2")
    put(own, "notes.txt")
    put(own, ".hidden.jinja")
    (own.folder / "folder.jinja").mkdir()
    names = own.names()
    assert names == sorted({*SHIPPED, "alpha", "Zebra.1"}, key=str.casefold)
    assert own.get("alpha") == own.get("Zebra.1") == own.get("ChatML") == GOOD
    assert own.own() == {"alpha", "Zebra.1", "ChatML"}


def test_save_get_delete(own):
    path = own.save("Mine", GOOD)
    assert path == own.folder / "Mine.jinja"
    assert own.get("Mine") == GOOD
    own.save("Mine", GOOD + "é")
    assert own.get("Mine") == GOOD + "é"
    own.delete("Mine")
    assert "Mine" not in own.names()
    assert list(own.folder.iterdir()) == []


def test_a_saved_template_hides_the_shipped_one_until_it_is_deleted(own):
    own.save("Vicuna", GOOD)
    assert own.get("Vicuna") == GOOD
    own.delete("Vicuna")
    assert own.get("Vicuna") == SHIPPED["Vicuna"]
    with pytest.raises(NotFound, match="comes with the program"):
        own.delete("Vicuna")


def test_deleting_leaves_no_file_of_the_name(own):
    put(own, "Old.yaml", yaml.safe_dump({"instruction_template": GOOD}))
    own.save("Old", GOOD + "new")
    assert own.get("Old") == GOOD + "new"
    own.delete("Old")
    assert "Old" not in own.names()


def test_what_is_not_there(own):
    with pytest.raises(NotFound, match="Choose one from the list"):
        own.get("nothing")
    with pytest.raises(NotFound, match="does not exist"):
        own.delete("nothing")


LOOP = GOOD + "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
BROKEN = {
    "not UTF-8": ("Broken.jinja", GOOD.encode() + b"\xff", "UTF-8"),
    "huge": ("Broken.jinja", b"x" * (MAX_BYTES + 1), "larger than"),
    "no Jinja": ("Broken.jinja", GOOD + "{% if", "failed"),
    "no YAML": ("Broken.yaml", "instruction_template: 'open", "Correct that line"),
    "loops": ("Broken.jinja", LOOP, "stopped"),
    "escapes": ("Broken.jinja", GOOD + "{{ ''.__class__.__mro__ }}", "not allowed"),
    "fixed": ("Broken.jinja", "Hello", "leaves messages out"),
    "refuses": ("Broken.jinja", "{{ raise_exception('never') }}", "never"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_listed_and_fails_when_it_is_chosen(own, case):
    file, content, reason = BROKEN[case]
    put(own, file, content)
    put(own, "Fine.jinja")
    assert {"Broken", "Fine"} <= set(own.names())
    assert own.get("Fine") == GOOD
    start = time.process_time()
    with pytest.raises((TemplateError, SettingsError), match=f"(?s){file}.*{reason}"):
        own.get("Broken")
    assert time.process_time() - start < 5


@pytest.mark.parametrize("text", ["", GOOD + "{% if", LOOP, "Hello", GOOD + "{{ ''.__class__.__mro__ }}", "x" * (MAX_BYTES + 1), GOOD + "\ud800"])
def test_a_wrong_text_is_not_saved(own, text):
    own.save("Mine", GOOD)
    with pytest.raises((TemplateError, SettingsError), match=r"Mine\.jinja"):
        own.save("Mine", text)
    assert own.get("Mine") == GOOD
    assert [path.name for path in own.folder.iterdir()] == ["Mine.jinja"]


@pytest.mark.parametrize(
    "name", ["", " ", "..", "../x", "/etc/passwd", "a/b", "a\\b", ".hidden", "CON", "a\0b", "a:b", "x" * 300, "．．／x", "end.", "a\nb", "\ud800"]
)
def test_hostile_names(own, name):
    put(own, "Fine.jinja")
    before = sorted(own.folder.parent.rglob("*"))
    for act in (own.get, own.delete, lambda it: own.save(it, GOOD)):
        with pytest.raises(NameError_):
            act(name)
    assert sorted(own.folder.parent.rglob("*")) == before


def test_a_link_does_not_lead_out_of_the_folder(own, tmp_path):
    outside = tmp_path / "secret.jinja"
    outside.write_text(GOOD)
    own.folder.mkdir()
    (own.folder / "Link.jinja").symlink_to(outside)
    for act in (own.get, own.delete, lambda it: own.save(it, "changed " + GOOD)):
        with pytest.raises(NameError_, match="leads out of"):
            act("Link")
    assert outside.read_text() == GOOD


def test_saving_over_a_folder_is_a_named_error(own):
    (own.folder / "Mine.jinja").mkdir(parents=True)
    with pytest.raises(DataError, match="is a folder"):
        own.save("Mine", GOOD)


def test_a_folder_that_is_a_file_is_a_named_error(own):
    own.folder.write_text("x")
    with pytest.raises(DataError, match="Make the folder readable"):
        own.names()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_no_template(own):
    own.folder.mkdir()
    os.mkfifo(own.folder / "Pipe.jinja")
    assert "Pipe" not in own.names()
    with pytest.raises(NotFound):
        own.get("Pipe")


def test_a_byte_order_mark_is_no_part_of_the_text(own):
    put(own, "Bom.jinja", b"\xef\xbb\xbf" + GOOD.encode())
    assert own.get("Bom") == GOOD


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_template_can_be_saved_as_ones_own(own, name):
    check(SHIPPED[name], name)
    own.save(name, SHIPPED[name])
    assert templates.ChatTemplate(own.get(name)).render(CHAT, reasoning_effort="low") == ChatTemplate(SHIPPED[name]).render(
        CHAT, reasoning_effort="low"
    )
