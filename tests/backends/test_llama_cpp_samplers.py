"""The plan of samplers: neutral parameters take no part, the order is the user's, meanings are llama.cpp's where they differ from ours."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.backends.llama_cpp.samplers import SUPPORTED, chain_plan
from modules.samplers import DEFAULT_PRIORITY, NEUTRAL, SamplingParams


def plan(seed: int = 1, bias: tuple[tuple[int, float], ...] = (), **values) -> list[tuple[str, dict]]:
    return [tuple(stage) for stage in chain_plan(NEUTRAL.replace(values), seed, bias)]


def names(**values) -> list[str]:
    return [name for name, _ in plan(**values)]


def test_neutral_parameters_take_no_part():
    assert plan() == [("dist", {"seed": 1})]
    assert [stage.name for stage in chain_plan(SamplingParams(), 1)] == ["top_p", "dist"]


@pytest.mark.parametrize(
    ("values", "stage"),
    [
        ({"top_k": 40}, ("top_k", {"value": 40})),
        ({"top_k": 2**31 - 1}, ("top_k", {"value": 2**31 - 1})),
        ({"top_p": 0.5}, ("top_p", {"value": 0.5})),
        ({"min_p": 0.1}, ("min_p", {"value": 0.1})),
        ({"typical_p": 0.9}, ("typical_p", {"value": 0.9})),
        ({"top_n_sigma": 1.5}, ("top_n_sigma", {"value": 1.5})),
        ({"temperature": 0.7}, ("temperature", {"t": 0.7})),
        (
            {"dynamic_temperature": True, "dynatemp_low": 0.5, "dynatemp_high": 1.5, "dynatemp_exponent": 2, "temperature": 9},
            ("dynamic_temperature", {"t": 1.0, "delta": 0.5, "exponent": 2}),
        ),
        ({"dynamic_temperature": True, "dynatemp_low": 2, "dynatemp_high": 1}, ("temperature", {"t": 1.5})),
        ({"repetition_penalty": 1.2}, ("penalties", {"last_n": 1024, "repeat": 1.2, "frequency": 0.0, "presence": 0.0})),
        ({"frequency_penalty": -1, "repetition_penalty_range": 0}, ("penalties", {"last_n": 0, "repeat": 1.0, "frequency": -1.0, "presence": 0.0})),
        ({"presence_penalty": 0.5}, ("penalties", {"last_n": 1024, "repeat": 1.0, "frequency": 0.0, "presence": 0.5})),
        (
            {"dry_multiplier": 0.8, "dry_sequence_breakers": '"\\n", "*"', "repetition_penalty_range": 64},
            ("dry", {"multiplier": 0.8, "base": 1.75, "allowed_length": 2, "last_n": 64, "breakers": ["\n", "*"]}),
        ),
    ],
)
def test_one_active_parameter_is_one_stage(values, stage):
    assert plan(**values) == [stage, ("dist", {"seed": 1})]


def test_range_zero_is_the_whole_context_not_off():
    assert plan(repetition_penalty=1.1, repetition_penalty_range=0)[0][1]["last_n"] == 0  # the chain puts the context's length in


def test_xtc_has_random_numbers_of_its_own():
    (_, xtc), (_, dist) = plan(seed=5, xtc_probability=0.5, xtc_threshold=0.2)
    assert xtc["p"] == 0.5 and xtc["t"] == 0.2 and xtc["seed"] != dist["seed"] == 5
    assert names(xtc_probability=0.5, xtc_threshold=0.6) == ["dist"]


def test_order_is_the_users_unlisted_first_and_temperature_last_on_request():
    everything = {"temperature": 0.7, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "frequency_penalty": 0.5}
    assert names(**everything) == ["penalties", "temperature", "top_k", "min_p", "dist"]
    assert names(**everything, sampler_priority=["min_p", "temperature"]) == ["penalties", "top_k", "min_p", "temperature", "dist"]
    assert names(**everything, temperature_last=True) == ["penalties", "top_k", "min_p", "temperature", "dist"]
    assert names(top_k=5, sampler_priority=["top_k", "top_k"]) == ["top_k", "dist"]
    late = [name for name in DEFAULT_PRIORITY if "penalty" not in name] + ["presence_penalty", "repetition_penalty", "frequency_penalty"]
    assert names(**everything, sampler_priority=late) == ["temperature", "top_k", "min_p", "penalties", "dist"]


@pytest.mark.parametrize(
    "values",
    [{"temperature": 0}, {"temperature": 1e-40}, {"do_sample": False}, {"dynamic_temperature": True, "dynatemp_low": 0, "dynatemp_high": 0}],
)
def test_greedy_drops_cutoffs_and_keeps_penalties(values):
    others = {"top_k": 5, "xtc_probability": 0.5, "repetition_penalty": 1.1, "dry_multiplier": 1, "mirostat_mode": 2, "ban_eos_token": True}
    assert names(**others, **values) == ["ban_eos", "penalties", "dry", "greedy"]


@pytest.mark.parametrize(("mode", "name"), [(1, "mirostat"), (2, "mirostat_v2")])
def test_mirostat_chooses_and_drops_cutoffs(mode, name):
    found = plan(mirostat_mode=mode, top_k=5, top_p=0.5, temperature=0.5, repetition_penalty=1.1, adaptive_target=0.5)
    assert [n for n, _ in found] == ["penalties", "temperature", name]
    assert found[-1][1] == {"seed": 1, "tau": 5.0, "eta": 0.1}


def test_adaptive_p_is_the_last_stage():
    assert plan(adaptive_target=0.4, min_p=0.1)[-1] == ("adaptive_p", {"target": 0.4, "decay": 0.9, "seed": 1})
    assert names(adaptive_target=0.4, min_p=0.1) == ["min_p", "adaptive_p"]


def test_bans_bias_eos_and_grammar_come_first():
    found = plan(bias=((7, 1.5), (9, 2.0)), custom_token_bans="9, 11", ban_eos_token=True, grammar_string='root ::= "a"')
    assert found[0] == ("logit_bias", {"bias": [[7, 1.5], [9, float("-inf")], [11, float("-inf")]]})
    assert found[1:3] == [("ban_eos", {}), ("grammar", {"text": 'root ::= "a"'})]
    assert names(grammar_string="  \n") == ["dist"]


def test_no_seed_is_random():
    assert plan(seed=2**32 - 1) == [("dist", {"seed": 2**32 - 2})]  # llama.cpp's own mark for "random" is 2**32 − 1


@given(st.integers(0, 2**32 - 1), st.floats(0, 2), st.integers(0, 100), st.booleans())
def test_every_plan_ends_in_exactly_one_chooser(seed, temperature, top_k, last):
    found = chain_plan(NEUTRAL.replace({"temperature": temperature, "top_k": top_k, "temperature_last": last}), seed)
    assert [stage.name in ("dist", "greedy") for stage in found] == [False] * (len(found) - 1) + [True]


def test_supported_names_exist():
    assert set(SamplingParams.model_fields) >= SUPPORTED
    assert not SUPPORTED & {"tfs", "top_a", "eta_cutoff", "epsilon_cutoff", "guidance_scale", "penalty_alpha", "smoothing_factor"}
