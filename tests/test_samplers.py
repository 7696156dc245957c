import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.errors import SettingsError
from modules.samplers import DEFAULT_PRIORITY, NEUTRAL, SamplingParams, quoted_strings, split_list

# Written by hand from the inventory of the earlier system, so that a wrong declaration is seen:
# name, group, minimum, maximum and step of the control, default, neutral value.
SLIDERS = """
temperature                Curve shape          0.01  5     0.01 1    1
dynatemp_low               Curve shape          0.01  5     0.01 1    1
dynatemp_high              Curve shape          0.01  5     0.01 1    1
dynatemp_exponent          Curve shape          0.01  5     0.01 1    1
smoothing_factor           Curve shape          0     10    0.01 0    0
smoothing_curve            Curve shape          1     10    0.01 1    1
top_p                      Curve cutoff         0     1     0.01 0.95 1
top_k                      Curve cutoff         0     200   1    0    0
min_p                      Curve cutoff         0     1     0.01 0    0
top_n_sigma                Curve cutoff         0     5     0.01 0    0
typical_p                  Curve cutoff         0     1     0.01 1    1
xtc_threshold              Curve cutoff         0     0.5   0.01 0.1  0.1
xtc_probability            Curve cutoff         0     1     0.01 0    0
epsilon_cutoff             Curve cutoff         0     9     0.01 0    0
eta_cutoff                 Curve cutoff         0     20    0.01 0    0
tfs                        Curve cutoff         0     1     0.01 1    1
top_a                      Curve cutoff         0     1     0.01 0    0
dry_multiplier             Repetition           0     5     0.01 0    0
dry_allowed_length         Repetition           1     20    1    2    2
dry_base                   Repetition           1     4     0.01 1.75 1.75
repetition_penalty         Repetition           1     1.5   0.01 1    1
frequency_penalty          Repetition           0     2     0.05 0    0
presence_penalty           Repetition           0     2     0.05 0    0
encoder_repetition_penalty Repetition           0.8   1.5   0.01 1    1
no_repeat_ngram_size       Repetition           0     20    1    0    0
repetition_penalty_range   Repetition           0     4096  64   1024 1024
penalty_alpha              Alternative sampling 0     5     0.01 0    0
guidance_scale             Alternative sampling -0.5  2.5   0.05 1    1
mirostat_mode              Alternative sampling 0     2     1    0    0
mirostat_tau               Alternative sampling 0     10    0.01 5    5
mirostat_eta               Alternative sampling 0     1     0.01 0.1  0.1
adaptive_target            Alternative sampling 0     1     0.01 0    0
adaptive_decay             Alternative sampling 0     0.99  0.01 0.9  0.9
max_new_tokens             Length and seed      1     4096  1    512  512
max_tokens_second          Length and seed      0     20    1    0    0
prompt_lookup_num_tokens   Tokens and constraints 0   10    1    0    0
"""
OTHERS = {
    "dynamic_temperature": False,
    "do_sample": True,
    "temperature_last": False,
    "dry_sequence_breakers": '"\\n", ":", "\\"", "*"',
    "sampler_priority": (
        "repetition_penalty", "presence_penalty", "frequency_penalty", "dry", "top_n_sigma", "temperature", "dynamic_temperature",
        "quadratic_sampling", "top_k", "top_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "tfs", "top_a", "min_p", "adaptive_p", "mirostat",
        "xtc", "encoder_repetition_penalty", "no_repeat_ngram",
    ),
    "auto_max_new_tokens": True,
    "truncation_length": 0,  # 0 stands for the model's own context
    "seed": -1,
    "ban_eos_token": False,
    "add_bos_token": True,
    "skip_special_tokens": True,
    "custom_token_bans": "",
    "custom_stopping_strings": "",
    "negative_prompt": "",
    "grammar_string": "",
    "static_cache": False,
}  # fmt: skip
ROWS = [(line[:27].strip(), *line[27:].rsplit(maxsplit=5)) for line in SLIDERS.strip().splitlines()]


@pytest.mark.parametrize(("name", "group", "low", "high", "step", "default", "neutral"), ROWS, ids=[row[0] for row in ROWS])
def test_a_slider(name, group, low, high, step, default, neutral):
    knob = SamplingParams.knobs()[name]
    assert knob.group == group.strip()
    assert knob.range == (float(low), float(high), float(step))
    assert knob.default == getattr(SamplingParams(), name) == float(default)
    assert getattr(NEUTRAL, name) == float(neutral)
    assert knob.type is (int if step in ("1", "64") else float)


@pytest.mark.parametrize(("name", "default"), OTHERS.items())
def test_a_parameter_without_slider(name, default):
    assert getattr(SamplingParams(), name) == default
    assert type(getattr(SamplingParams(), name)) is type(default)


def test_nothing_is_missing_and_nothing_is_more():
    assert {row[0] for row in ROWS} | OTHERS.keys() == set(SamplingParams.model_fields)


def test_neutral_differs_from_the_default_in_top_p_alone():
    assert NEUTRAL.differences() == {"top_p": 1.0}


@pytest.mark.parametrize(
    "values",
    [
        {"frequency_penalty": -2, "presence_penalty": -1.5},
        {"temperature": 0},
        {"temperature": 100},
        {"top_k": 10**6},
        {"max_new_tokens": 10**6},
        {"guidance_scale": -3},
        {"repetition_penalty": 0.5},
        {"seed": 2**32 - 1},
        {"max_tokens_second": 500},
    ],
)
def test_the_control_limits_the_page_only(values):
    assert SamplingParams.build(values).differences() == values


@pytest.mark.parametrize(
    "values",
    [{"temperature": -0.1}, {"top_p": 1.01}, {"min_p": -1}, {"seed": -2}, {"seed": 2**32}, {"top_k": -1}, {"max_new_tokens": 0}, {"mirostat_mode": 3},
     {"adaptive_decay": 1}, {"dry_base": 0.5}, {"repetition_penalty": 0}, {"temperature": True}, {"top_k": 1.5}],
    ids=str,
)  # fmt: skip
def test_what_has_no_meaning_is_refused(values):
    with pytest.raises(SettingsError):
        SamplingParams.build(values)


def test_a_bound_is_told_in_full():
    with pytest.raises(SettingsError, match="at most 4294967295"):
        SamplingParams.build({"seed": 2**32})


@pytest.mark.parametrize("value", ["top_k,top_p", "top_k\ntop_p\n", " top_k ,\n top_p", ["top_k", "top_p"], ("top_k", "top_p"), ["top_k, top_p"]])
def test_priority_is_a_list_or_text_split_on_commas_and_lines(value):
    assert SamplingParams.build({"sampler_priority": value}).sampler_priority == ("top_k", "top_p")


def test_a_priority_may_be_empty_and_its_names_are_checked():
    assert SamplingParams.build({"sampler_priority": ""}).sampler_priority == ()
    with pytest.raises(SettingsError, match=r"Unknown sampler 'top_q'\. Did you mean 'top_p'\?$"):
        SamplingParams.build({"sampler_priority": ["top_k", "top_q"]})
    for wrong in (5, [1], None, {"a": 1}):
        with pytest.raises(SettingsError, match="Use a list of texts"):
            SamplingParams.build({"sampler_priority": wrong})


def test_default_breakers():
    assert SamplingParams().breakers == ("\n", ":", '"', "*")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", ()),
        ("  ", ()),
        ('"a"', ("a",)),
        ('"\\n", "User:"', ("\n", "User:")),
        ('["a", "b"]', ("a", "b")),
        ('"a,b", "\\u00e9", ""', ("a,b", "é")),
    ],
)
def test_quoted_texts(text, found):
    assert SamplingParams.build({"custom_stopping_strings": text}).stopping_strings == found
    assert SamplingParams.build({"dry_sequence_breakers": text}).breakers == found


@pytest.mark.parametrize("text", ["a", "a, b", '"a', '"a" "b"', "[1]", '["a", 1]', '{"a": 1}', "[[]]"])
def test_texts_without_quotes_are_refused_with_an_example(text):
    with pytest.raises(SettingsError) as refused:
        SamplingParams.build({"custom_stopping_strings": text})
    assert 'Write quoted texts separated by commas, like "\\n", "User:".' in str(refused.value)


@given(st.text(max_size=40))
def test_quoted_strings_gives_texts_or_a_value_error(text):
    try:
        found = quoted_strings(text)
    except ValueError:
        return
    assert all(isinstance(item, str) and item for item in found)


def test_banned_tokens():
    assert SamplingParams.build({"custom_token_bans": " 1, 22,\n333,"}).banned_tokens == (1, 22, 333)
    assert SamplingParams().banned_tokens == ()
    for wrong in ("x", "1 2", "-1", "1.5", "٣", "9" * 5000):
        with pytest.raises(SettingsError, match="Write token numbers separated by commas"):
            SamplingParams.build({"custom_token_bans": wrong})


def test_split_list():
    assert split_list("a, b\n\n c ,,") == ["a", "b", "c"]
    assert split_list(("a", " b, c ")) == ["a", "b", "c"]


def test_priority_names_only_what_is_declared():
    declared = " ".join(SamplingParams.model_fields)
    renamed = {"dry": "dry_multiplier", "quadratic_sampling": "smoothing_factor", "adaptive_p": "adaptive_target", "mirostat": "mirostat_mode",
               "xtc": "xtc_probability", "no_repeat_ngram": "no_repeat_ngram_size"}  # fmt: skip
    assert len(set(DEFAULT_PRIORITY)) == len(DEFAULT_PRIORITY) == 21
    assert all(renamed.get(name, name) in declared for name in DEFAULT_PRIORITY)
