"""Our renderer against the one of transformers: the same template text and messages give the same prompt, to the character.

Templates compared: those that come with the program, those of the golden prompts, and every *.jinja file of the folder that the environment
variable CHAT_TEMPLATES names (other people's templates are no part of this repository).

Where ours differs on purpose (`DIFFERENCES`), the prompt still is what transformers makes of the same messages once they are mended:

- "system": the template does not show a system message, or refuses it. Ours tells its text at the beginning of the first user message.
- "order": the template refuses the order of roles. Ours joins neighbours of one role, lets a later system message count as the user's and
  puts an empty user message before an assistant's that comes first.
- "effort": the template refuses "medium" (or another word) for the reasoning effort. Ours does not name an effort then.
- "hidden": a message that is to go on (its thinking, mostly) is not shown by the template. Ours writes it after the beginning of a reply.

A template that fails by itself (it wants tools, or variables that nobody gives) fails in both.
"""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from modules import templates
from modules.conversation import Message
from modules.errors import TemplateError
from modules.instruction_templates import SHIPPED
from modules.prompting import SCRIPT, Prompting
from modules.settings import ChatOptions
from modules.templates import ChatTemplate

GOLDEN = Path(__file__).parent / "golden" / "prompts"
OTHERS = os.environ.get("CHAT_TEMPLATES", "")
NOW = datetime(2024, 7, 26)

OURS = {
    **SHIPPED,
    "script": SCRIPT,
    **{f"golden {path.stem}": path.read_text(encoding="utf-8") for path in sorted(GOLDEN.glob("*.jinja"))},
}
GIVEN = {path.stem: path.read_text(encoding="utf-8") for path in sorted(Path(OTHERS).glob("*.jinja"))} if OTHERS else {}

HIDDEN = {"hidden"}
DIFFERENCES = {
    "GPT-OSS": set(),
    "Gemma": {"system", "order", "hidden"},
    "Llama 2": {"order", "hidden"},
    "Mistral": {"system", "order", "hidden"},
    "golden inst": {"order", "hidden"},
    "golden reasoning": set(),
    "golden turns": {"system", "order", "hidden"},
}
"""By template of ours; all others: HIDDEN."""


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, thinking=""):
    thoughts = {"reasoning_content": thinking, "thinking": thinking} if thinking else {}
    return {"role": "assistant", "content": text, **thoughts}


ODD = "  <é>\u2028 {{ x }} {% y %} \"double\" 'single' \\n \t 😀 &amp; </s> <|im_end|>\n\n"
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "a question": ([user("Hi")], {}),
    "with a system message": ([system("Be brief."), user("Hi")], {}),
    "several turns": ([user("One?"), assistant("Un."), user("Two?"), assistant("Deux."), user("Three?")], {}),
    "several turns with a system message": ([system("Be brief."), user("One?"), assistant("Un."), user("Two?")], {}),
    "finished": ([system("Be brief."), user("One?"), assistant("Un.")], {"add_generation_prompt": False}),
    "with thinking": ([user("One?"), assistant("Un.", "counting"), user("Two?")], {}),
    "with thinking preserved": ([user("One?"), assistant("Un.", "counting"), user("Two?")], {"preserve_thinking": True}),
    "finished with thinking": ([user("One?"), assistant("Un.", "counting")], {"add_generation_prompt": False}),
    "thinking asked for": ([user("Hi")], {"enable_thinking": True, "reasoning_effort": "high"}),
    "no thinking": ([system("Be brief."), user("Hi")], {"enable_thinking": False, "reasoning_effort": "low"}),
    "medium effort": ([system("Be brief."), user("Hi")], {"enable_thinking": True, "reasoning_effort": "medium"}),
    "odd characters": ([system(ODD), user(ODD), assistant(ODD), user(ODD)], {}),
    "empty texts": ([user(""), assistant(""), user("")], {}),
    "two in a row": ([user("A"), user("B"), assistant("C"), assistant("D"), user("E")], {}),
    "a greeting": ([system("S"), assistant("Welcome"), user("Hi")], {}),
    "a later system message": ([user("A"), assistant("B"), system("C"), user("D")], {}),
    "an answer goes on": ([user("Count"), assistant("One, two")], {"continue_last": True}),
    "thinking goes on": ([user("Count"), assistant("", "First")], {"continue_last": True}),
}


@pytest.fixture(scope="module")
def theirs():
    """The prompt that transformers makes, or None where it (or the template) refuses."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="transformers, whose prompts are compared, is not installed")

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return NOW

    def render(source, messages, add_generation_prompt=True, continue_last=False, **variables):
        if "enable_thinking" in variables:  # the other names of the same switch
            on = variables["enable_thinking"]
            variables = {"thinking": on, "thinking_budget": -1 if on else 0, **variables}
        going_on = ("content" if messages[-1]["content"] else "reasoning_content") if continue_last else False
        try:
            (prompt,), _ = utils.render_jinja_template(
                [messages],
                chat_template=source,
                add_generation_prompt=add_generation_prompt and not continue_last,
                continue_final_message=going_on,
                bos_token="<s>",
                eos_token="</s>",
                **variables,
            )
        except Exception:  # noqa: BLE001  whatever Jinja lets through, and their own refusals
            return None
        return prompt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "datetime", Clock)
        yield render


def ours(source, messages, **options):
    try:
        return ChatTemplate(source, "<s>", "</s>", now=lambda: NOW).render(messages, **options)
    except TemplateError:
        return None


def mended(render, source, messages, options):
    """What transformers makes of the messages, mended as far as must be; and what had to be mended."""
    prompt, needed = mended_order(render, source, messages, options)
    if prompt is None and "reasoning_effort" in options:
        without = {name: value for name, value in options.items() if name != "reasoning_effort"}
        prompt, needed = mended_order(render, source, messages, without)
        needed |= {"effort"} if prompt is not None else set()
    return prompt, needed


def mended_order(render, source, messages, options):
    needed = set()
    if messages[0]["role"] == "system":
        shown = render(source, [system("SYSTEM"), user("Hi")])
        if shown is None or "SYSTEM" not in shown:
            messages, needed = templates._without_system(messages), {"system"}
    prompt = render(source, messages, **options)
    if prompt is None and (joined := templates._alternating(messages)) != messages:
        prompt = render(source, joined, **options)
        needed |= {"order"} if prompt is not None else set()
    if prompt is None and options.get("continue_last"):
        opened = render(source, messages[:-1])
        return opened, needed | ({"hidden"} if opened is not None else set())
    return prompt, needed


def compared(render, name, source):
    """The kinds of difference that occur; fails at one that is none of these."""
    kinds: set[str] = set()
    for case, (messages, options) in CONVERSATIONS.items():
        expected, needed = mended(render, source, messages, options)
        prompt = ours(source, messages, **options)
        if needed and "hidden" in needed:
            last = messages[-1]
            assert prompt is not None, (name, case)
            assert prompt.startswith(expected), (name, case)
            assert prompt.endswith(last["content"] or last["reasoning_content"]), (name, case)
        else:
            assert prompt == expected, (name, case)
        kinds |= needed
    return kinds


@pytest.mark.parametrize("name", OURS)
def test_our_templates_give_the_same_prompts(theirs, name):
    assert compared(theirs, name, OURS[name]) == DIFFERENCES.get(name, HIDDEN)


@pytest.mark.parametrize("name", OURS)
def test_none_of_our_templates_refuses(theirs, name):
    assert all(ours(OURS[name], messages, **options) is not None for messages, options in CONVERSATIONS.values())


@pytest.mark.parametrize("name", GIVEN)
def test_other_templates_give_the_same_prompts(theirs, name):
    assert compared(theirs, name, GIVEN[name]) <= {"system", "order", "effort", "hidden"}


@pytest.mark.parametrize("name", [*OURS, *GIVEN])
@pytest.mark.parametrize("thinking", [True, False])
def test_a_conversation_of_the_page_gives_the_same_prompt(theirs, name, thinking):
    """Through Prompting: the variables that it adds change nothing that a template does not ask for."""
    source = {**OURS, **GIVEN}[name]
    path = [Message("1", None, "user", "One?"), Message("2", "1", "assistant", "Un.", "counting"), Message("3", "2", "user", "Two?")]
    chat = ChatOptions(custom_system_message="Be brief.", enable_thinking=thinking, reasoning_effort="low", preserve_thinking=True)
    messages = [system("Be brief."), user("One?"), assistant("Un.", "counting"), user("Two?")]
    asked = {"enable_thinking": thinking, "reasoning_effort": "low", "preserve_thinking": True, "name1": "You", "name2": "AI", "user_bio": ""}
    expected, _ = mended(theirs, source, messages, asked)
    try:
        prompt = Prompting(ChatTemplate(source, "<s>", "</s>", now=lambda: NOW), chat).render(path, 0)
    except TemplateError:
        prompt = None
    assert prompt == expected


def test_the_folder_of_other_templates_holds_some():
    if not OTHERS:
        pytest.skip("CHAT_TEMPLATES names no folder with chat templates of models to compare")
    assert GIVEN, f"no *.jinja file in {OTHERS}"
