import argparse
import math
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError, field_validator

from modules.errors import SettingsError
from modules.options import Options, add_arguments, knob, markdown_table, nearest, yaml_template


class Kettle(Options):
    heat: float = knob(1.0, "How hot, in %.", range=(0.01, 5, 0.01), bounds=(0, 10), group="Shape", source="Watt 1769")
    cups: int = knob(2, "How many | cups.", bounds=(1, None), group="Shape", metavar="CUPS")
    lid: bool = knob(True, "Close it.", group="Shape")
    no_steam: bool = knob(False, "Keep the steam.", group="Shape")
    kind: Literal["steel", "glass"] = knob("steel", "Made of.", group="Look", flags=("--k_ind",))
    owner: str = knob("", "Whose it is.", group="Look", later=True)
    parts: tuple[str, ...] = knob(("a",), "What it has.", group="Look")
    secret: str = knob("", "No flag.", group="Look", flag=False, multiline=True)
    tale: str = knob("once " * 20, "Long.", group="Look")

    @field_validator("owner")
    @classmethod
    def _upper(cls, value):
        if value and not value[0].isupper():
            raise ValueError('write a capital, like "Ann"')
        return value


def refusal(values, source=""):
    with pytest.raises(SettingsError) as refused:
        Kettle.build(values, source)
    return str(refused.value)


def test_the_declaration_as_its_readers_see_it():
    heat = Kettle.knobs()["heat"]
    assert (heat.type, heat.default, heat.range, heat.bounds, heat.group, heat.source) == (float, 1.0, (0.01, 5, 0.01), (0, 10), "Shape", "Watt 1769")
    assert Kettle.knobs()["kind"].choices == ("steel", "glass") and Kettle.knobs()["kind"].type is str
    assert Kettle.knobs()["parts"].type is list
    assert Kettle.knobs()["no_steam"].label == "no steam"
    assert list(Kettle.knobs()) == list(Kettle.model_fields)


def test_frozen_and_replaced():
    kettle = Kettle()
    with pytest.raises(ValidationError):
        kettle.heat = 2
    assert kettle.replace({"cups": 3}).cups == 3 and kettle.cups == 2
    assert kettle.replace({"cups": 3, "heat": 1}).differences() == {"cups": 3}
    assert kettle.differences() == {}
    with pytest.raises(SettingsError, match="file: cups cannot be 0"):
        kettle.replace({"cups": 0}, "file")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"heat": -1}, "heat cannot be -1. Use a number of at least 0 and of at most 10."),
        ({"heat": "warm"}, "heat cannot be 'warm'. Use a number"),
        ({"heat": None}, "heat cannot be None. Use a number"),
        ({"heat": [1]}, "heat cannot be [1]. Use a number"),
        ({"heat": True}, "heat cannot be true. Use a number"),
        ({"cups": False}, "cups cannot be false. Use a whole number of at least 1."),
        ({"cups": 1.5}, "cups cannot be 1.5. Use a whole number"),
        ({"cups": "2.5"}, "cups cannot be '2.5'"),
        ({"lid": "perhaps"}, "lid cannot be 'perhaps'. Use true or false."),
        ({"kind": "gold"}, "kind cannot be 'gold'. Use one of: steel, glass."),
        ({"owner": 5}, "owner cannot be 5. Use a text."),
        ({"owner": "Ann".lower()}, "owner cannot be 'ann'. Write a capital, like \"Ann\"."),
        ({"parts": "a"}, "parts cannot be 'a'. Use a list of texts."),
        ({"het": 1}, "unknown option 'het'. Did you mean 'heat'?"),
        ({"zzzzz": 1}, "unknown option 'zzzzz'."),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(values, words):
    assert words in refusal(values)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "nan", "inf", "1e999"])
def test_no_value_is_nan_or_infinite(value):
    assert "heat" in refusal({"heat": value}) and "Use a number" in refusal({"heat": value})


def test_infinity_is_refused_where_there_are_no_bounds_too():
    class Free(Options):
        x: float = knob(0.0, "Any.")

    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(SettingsError, match=r"x cannot be .*Use a number"):
            Free.build({"x": value})


def test_every_fault_is_told_at_once_with_the_source_and_a_long_value_shortened():
    message = refusal({"heat": "x" * 1000, "cups": 0, "kettle": 1}, "my.yaml")
    assert [line.startswith("my.yaml: ") for line in message.splitlines()] == [True] * 3
    assert len(message) < 500 and "…" in message


def parse(*words):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser, Kettle, skip={"tale"})
    return vars(parser.parse_args(words))


def test_only_given_flags_appear_unvalidated():
    assert parse() == {}
    assert parse("--heat", "-1", "--cups=x") == {"heat": "-1", "cups": "x"}
    assert parse("--parts", "a", "b") == {"parts": ["a", "b"]}
    assert parse("--lid") == {"lid": True} and parse("--no-lid") == {"lid": False}
    assert parse("--no-steam") == {"no_steam": True}
    assert parse("--k-ind", "glass") == {"kind": "glass"}


@pytest.mark.parametrize("word", ["--secret", "--tale", "--no-no-steam", "--he"])
def test_no_flag_for_what_has_none(word, capsys):
    with pytest.raises(SystemExit):
        parse(word)
    capsys.readouterr()


def test_help_shows_groups_defaults_and_what_is_not_here_yet():
    parser = argparse.ArgumentParser()
    add_arguments(parser, Kettle)
    text = " ".join(parser.format_help().split())
    for part in ("Shape:", "Look:", "How hot, in %. (default: 1.0)", "Whose it is. [not in this version yet]", "{steel,glass}", "--cups CUPS"):
        assert part in text
    assert text.count("Shape:") == 1


@given(st.text(max_size=20))
def test_nearest_never_fails(name):
    assert nearest(name, ["heat", "no-steam"]) in ("", " Did you mean 'heat'?", " Did you mean 'no_steam'?")


def test_the_yaml_template_is_all_comment_and_uncommented_gives_the_defaults():
    text = yaml_template(Kettle)
    assert yaml.safe_load(text) is None
    assert "# --- Shape ---" in text and "Use one of: steel, glass." in text and "of at most 10" in text
    keys = [line.removeprefix("# ") for line in text.splitlines() if line[2:].split(":")[0] in Kettle.model_fields]
    assert Kettle.build(yaml.safe_load("\n".join(keys))) == Kettle()


def test_the_table_of_the_documentation():
    lines = markdown_table(Kettle).splitlines()
    assert lines[2] == "| `heat` | `1.0` | 0.01 – 5, step 0.01 | How hot, in %. (Watt 1769) |"
    assert "How many \\| cups." in lines[3]
    assert "| `steel`, `glass` |" in lines[6]
    assert "[not in this version yet]" in lines[7]
    assert "| `tale` | see below |" in lines[10]
    assert lines[-1].startswith('Default of `tale`: `"once once')
    assert sum(line.startswith("|") for line in lines) == 2 + len(Kettle.model_fields)
