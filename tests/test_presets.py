"""Presets: values that are always whole, files of earlier systems, what is unknown kept."""

import logging

import pytest
import yaml

from modules.errors import NameError_, NotFound, SettingsError
from modules.presets import NAMES, SHIPPED, Presets
from modules.samplers import NEUTRAL, SamplingParams


@pytest.fixture
def presets(tmp_path):
    return Presets(tmp_path / "presets")


def put(presets, file, text):
    presets.folder.mkdir(exist_ok=True)
    (presets.folder / file).write_text(text, "utf-8")


def changed(values):
    neutral = NEUTRAL.model_dump()
    return {name: value for name, value in values.items() if value != neutral[name]}


def test_a_preset_sets_every_sampler_and_nothing_else():
    assert {"temperature", "top_p", "do_sample", "sampler_priority", "dry_sequence_breakers", "adaptive_decay"} <= set(NAMES)
    assert not {"seed", "max_new_tokens", "truncation_length", "grammar_string", "custom_stopping_strings", "custom_token_bans"} & set(NAMES)


def test_shipped_presets_need_no_file(presets):
    assert presets.names() == ["Creative", "Deterministic", "Instruct", "min_p", "Qwen3 - No Thinking", "Qwen3 - Thinking", "Top-P"]
    assert changed(presets.get("Top-P")) == {"top_p": 0.95}
    assert changed(presets.get("Creative")) == {"min_p": 0.02, "xtc_probability": 0.5}
    assert changed(presets.get("Deterministic")) == {"do_sample": False, "top_k": 1}
    assert changed(presets.get("Qwen3 - Thinking")) == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_preset_is_whole_and_valid(presets, name):
    values = presets.get(name)
    assert tuple(values) == NAMES
    sampling = SamplingParams(seed=7, min_p=0.3, temperature=0.1).replace(values)
    assert sampling.seed == 7  # not the preset's
    assert sampling.differences().items() >= {k: v for k, v in SHIPPED[name].items() if k != "top_p"}.items()
    assert sampling.min_p == SHIPPED[name].get("min_p", 0)


def test_what_a_file_does_not_name_is_neutral(presets):
    put(presets, "Mine.yaml", "temperature: 0.7\n")
    assert presets.get("Mine") == {**{name: NEUTRAL.model_dump()[name] for name in NAMES}, "temperature": 0.7}
    put(presets, "Empty.yaml", "")
    assert changed(presets.get("Empty")) == {}


def test_a_file_of_the_earlier_system(presets):
    put(presets, "Old.yaml", "temperature: 1.31\ntop_p: 0.29\nrepetition_penalty: 1.09\ntop_k: 72\nsampler_priority: |-\n  top_p\n  temperature\n")
    values = presets.get("Old")
    assert changed(values) == {
        "temperature": 1.31,
        "top_p": 0.29,
        "repetition_penalty": 1.09,
        "top_k": 72,
        "sampler_priority": ("top_p", "temperature"),
    }


def test_a_file_wins_over_a_shipped_preset_until_it_is_deleted(presets):
    presets.save("Top-P", {"top_p": 0.5})
    assert presets.get("Top-P")["top_p"] == 0.5
    assert "Top-P" in presets.own()
    presets.delete("Top-P")
    assert presets.get("Top-P")["top_p"] == 0.95
    with pytest.raises(NotFound, match="comes with the program"):
        presets.delete("Top-P")


def test_only_differences_from_neutral_are_saved(presets):
    path = presets.save("Mine", {**SamplingParams(temperature=0.5, seed=3, sampler_priority=("top_p",)).model_dump(), "mode": "chat"})
    assert path == presets.folder / "Mine.yaml"
    assert yaml.safe_load(path.read_text("utf-8")) == {"temperature": 0.5, "top_p": 0.95, "sampler_priority": ["top_p"]}
    assert presets.get("Mine")["sampler_priority"] == ("top_p",)


def test_values_as_controls_show_them_are_taken(presets):
    presets.save("Mine", {"sampler_priority": "top_p\nmin_p", "top_k": 5})
    assert presets.get("Mine")["sampler_priority"] == ("top_p", "min_p")


def test_unknown_keys_are_told_with_the_nearest_name_and_kept(presets, caplog):
    put(presets, "Mine.yaml", "temprature: 0.5\nseed: 3\nnum_beams: 4\ntop_k: 3\n")
    with caplog.at_level(logging.WARNING):
        assert changed(presets.get("Mine")) == {"top_k": 3}
    told = caplog.text
    assert "Mine.yaml: 'temprature' is no parameter of a preset" in told and "Did you mean 'temperature'?" in told
    assert "'seed'" in told and "'num_beams'" in told
    presets.save("Mine", {"top_k": 4})
    assert yaml.safe_load((presets.folder / "Mine.yaml").read_text("utf-8")) == {"top_k": 4, "temprature": 0.5, "seed": 3, "num_beams": 4}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("temperature: hot", r"Bad\.yaml: temperature cannot be 'hot'\. Use a number"),
        ("temperature: true", r"Bad\.yaml: .*temperature"),
        ("top_p: 7", r"Bad\.yaml: top_p cannot be 7"),
        ("temperature: .nan", r"Bad\.yaml: .*temperature cannot be nan"),
        ("temperature: .inf", r"Bad\.yaml: .*temperature cannot be inf"),
        ("top_k: [1, 2]", r"Bad\.yaml: top_k"),
        ("sampler_priority: [top_q]", "Did you mean 'top_p'|unknown sampler 'top_q'"),
        ("- a", r"Bad\.yaml: expected lines"),
        ("a: &a [*a]", r"Bad\.yaml"),
    ],
)
def test_a_wrong_file_fails_when_it_is_chosen_and_names_itself(presets, text, reason):
    put(presets, "Bad.yaml", text)
    assert "Bad" in presets.names()
    with pytest.raises(SettingsError, match=reason):
        presets.get("Bad")


def test_a_wrong_value_is_not_saved(presets):
    presets.save("Mine", {"top_k": 3})
    with pytest.raises(SettingsError, match="top_k"):
        presets.save("Mine", {"top_k": "many"})
    assert presets.get("Mine")["top_k"] == 3
    with pytest.raises(NameError_):
        presets.save("../x", {})
