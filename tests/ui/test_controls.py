"""Controls made from declarations: the right kind, range and hook for each kind of knob."""

from typing import Literal

import gradio as gr
import pytest

from modules.options import Options, knob
from modules.samplers import SamplingParams
from modules.settings import ChatOptions
from modules.ui.controls import control, controls, groups, label, shown


class Example(Options):
    on: bool = knob(True, "A switch.", group="One")
    share: float = knob(0.5, "A share.", range=(0, 1, 0.01), group="One")
    count: int = knob(3, "A count.", range=(0, 10, 1), group="One")
    seed: int = knob(-1, "A very wide range.", range=(-1, 2**31 - 1, 1), group="Two")
    free: float = knob(1.0, "No range.", bounds=(0, None), group="Two")
    name: str = knob("x", "A text.", group="One")
    prompt: str = knob("", "A long text.", group="One", multiline=True)
    names: tuple[str, ...] = knob(("a", "b"), "A list.", group="One")
    size: Literal["s", "m", "l"] = knob("m", "Few choices.", group="One")
    letter: Literal["a", "b", "c", "d", "e"] = knob("a", "Many choices.", group="One")
    someday: bool = knob(False, "Not here yet.", group="One", later=True)


KNOBS = Example.knobs()


def build(name, hook="window.tgw.set"):
    with gr.Blocks() as page:
        made = control(KNOBS[name], hook, KNOBS[name].default)
    return made, page


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("on", gr.Checkbox),
        ("share", gr.Slider),
        ("count", gr.Slider),
        ("seed", gr.Number),
        ("free", gr.Number),
        ("name", gr.Textbox),
        ("prompt", gr.Textbox),
        ("names", gr.Textbox),
        ("size", gr.Radio),
        ("letter", gr.Dropdown),
    ],
)
def test_each_kind_of_knob_has_its_control(name, kind):
    made, _ = build(name)
    assert type(made) is kind
    assert made.info == KNOBS[name].help
    assert f"knob-{name}" in made.elem_classes
    assert made.interactive is True  # Gradio disables what is an output only


def test_ranges_and_lines():
    assert [build("share")[0].minimum, build("share")[0].maximum, build("share")[0].step] == [0, 1, 0.01]
    assert [build("seed")[0].minimum, build("seed")[0].maximum, build("seed")[0].precision] == [-1, 2**31 - 1, 0]
    assert [build("free")[0].minimum, build("free")[0].maximum] == [0, None]
    assert build("name")[0].lines == 1
    assert build("prompt")[0].lines > 1
    assert build("names")[0].value == "a\nb"


def test_a_control_calls_the_script_and_never_the_server():
    _, page = build("share")
    (event,) = page.fns.values()
    assert event.targets[0][1] == "input"  # a change by a person, not by the page itself
    assert event.js == '(value) => { window.tgw.set("share", window.tgwPanel.within("share", value, 0, 1)); }'
    assert event.fn is None
    assert not event.outputs


def test_a_text_is_told_when_it_is_complete():
    _, page = build("name")
    assert {event.targets[0][1] for event in page.fns.values()} == {"blur", "submit"}


def test_a_list_is_told_as_a_list():
    _, page = build("names")
    assert 'split("\\n")' in next(iter(page.fns.values())).js


def test_a_hook_may_be_a_call_with_a_first_argument():
    _, page = build("share", 'window.tgw.option("llama.cpp", ')
    js = next(iter(page.fns.values())).js
    assert js == '(value) => { window.tgw.option("llama.cpp", "share", window.tgwPanel.within("share", value, 0, 1)); }'


def test_groups_leave_out_what_is_not_here_yet():
    found = groups(Example)
    assert list(found) == ["One", "Two"]
    assert "someday" not in [each.name for each in found["One"]]
    assert sum(map(len, groups(SamplingParams).values())) == len(SamplingParams.knobs())


def test_given_values_are_shown():
    with gr.Blocks():
        made = controls([KNOBS["share"], KNOBS["count"]], "f", {"share": 0.25})
    assert {name: each.value for name, each in made.items()} == {"share": 0.25, "count": 3}


def test_given_choices_are_offered():
    """Words for what is declared, or a menu of files for a text: one that is not there any more is shown all the same."""
    with gr.Blocks():
        made = controls([KNOBS["size"], KNOBS["name"]], "f", {"name": "gone"}, choices={"size": [("Small", "s")], "name": [("x", "x")]})
    assert made["size"].choices == [("Small", "s")]
    assert isinstance(made["name"], gr.Dropdown) and made["name"].value == "gone" and made["name"].allow_custom_value


def test_labels_spell_abbreviations():
    samplers, chat = SamplingParams.knobs(), ChatOptions.knobs()
    assert label(samplers["xtc_probability"]) == "XTC probability"
    assert label(samplers["ban_eos_token"]) == "Ban EOS token"
    assert label(chat["enable_thinking"]) == "Enable thinking"


def test_shown_leaves_other_values_alone():
    assert [shown(value) for value in (("a", "b"), ["a"], "a", 1.5, True)] == ["a\nb", "a", "a", 1.5, True]
