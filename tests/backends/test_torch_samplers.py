"""Samplers with numbers that can be checked by hand: mostly four tokens with probabilities 1/2, 1/4, 1/8, 1/8."""

import math

import pytest

torch = pytest.importorskip("torch")

from modules.backends import torch_samplers as samplers  # noqa: E402
from modules.backends.torch_samplers import AdaptiveP, Mirostat, Sampler  # noqa: E402
from modules.samplers import DEFAULT_PRIORITY, NEUTRAL, SamplingParams  # noqa: E402

HALVES = [0.5, 0.25, 0.125, 0.125]


def logits(probabilities=HALVES):
    return torch.tensor(probabilities).log()


def kept(found):
    return [token for token, value in enumerate(found.tolist()) if value > -math.inf]


def close(found, wanted):
    assert found.tolist() == pytest.approx(wanted, abs=1e-5)


def sampler(values, seed=1, prompt=0, **more):
    return Sampler(NEUTRAL.replace(values), seed, prompt, **more)


# --- curve shape ----------------------------------------------------------------------------------------------------------------------


def test_temperature():
    close(samplers.temperature(torch.tensor([1.0, 2.0]), 2), [0.5, 1.0])
    close(samplers.temperature(logits(), 0.5).softmax(-1), [16 / 22, 4 / 22, 1 / 22, 1 / 22])  # squares: 1/4, 1/16, 1/64, 1/64


def test_dynamic_temperature_follows_the_entropy():
    """H = 1/2·1 + 1/4·2 + 2·1/8·3 = 1.75 bits of 2 at most."""
    close(samplers.dynamic_temperature(logits(), 1, 5, 1) * (1 + 4 * 1.75 / 2), logits().tolist())
    close(samplers.dynamic_temperature(logits(), 1, 5, 2) * (1 + 4 * (1.75 / 2) ** 2), logits().tolist())
    even = torch.zeros(8)
    even[4:] = -math.inf  # four that are even: the whole range
    assert samplers.dynamic_temperature(even + 1, 1, 5, 1)[0] == pytest.approx(1 / 5)
    only = torch.tensor([3.0, -math.inf])
    close(samplers.dynamic_temperature(only, 2, 5, 1), [1.5, -math.inf])


def test_quadratic():
    """d = 0, −1, −2. Curve 1: k = 1, s = 0, so m − f·d². Curve 2: k = 1/2, s = 1/2."""
    x = torch.tensor([3.0, 2.0, 1.0, -math.inf])
    close(samplers.quadratic(x, 0.5, 1), [3, 2.5, 1, -math.inf])
    close(samplers.quadratic(x, 1, 2), [3, 3 - 0.5 - 0.5, 3 - 2 - 4, -math.inf])


# --- cut-offs --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (lambda x: samplers.top_k(x, 2), [0, 1]),
        (lambda x: samplers.top_k(x, 9), [0, 1, 2, 3]),
        (lambda x: samplers.top_p(x, 0.5), [0]),
        (lambda x: samplers.top_p(x, 0.51), [0, 1]),
        (lambda x: samplers.top_p(x, 0.74), [0, 1]),
        (lambda x: samplers.top_p(x, 0), [0]),
        (lambda x: samplers.min_p(x, 0.4), [0, 1]),
        (lambda x: samplers.min_p(x, 1), [0]),
        (lambda x: samplers.top_a(x, 0.6), [0, 1]),  # 0.6 · (1/2)² = 0.15
        (lambda x: samplers.epsilon_cutoff(x, 0.2), [0, 1]),
        (lambda x: samplers.epsilon_cutoff(x, 0.9), [0]),
        (lambda x: samplers.eta_cutoff(x, 0.7), [0, 1]),  # √0.7 · 2^−1.75 = 0.249
        (lambda x: samplers.eta_cutoff(x, 0.1), [0, 1, 2, 3]),  # 0.094
        (lambda x: samplers.typical_p(x, 0.25), [1]),  # information 1, 2, 3, 3 bits; the entropy is 1.75
        (lambda x: samplers.typical_p(x, 0.26), [0, 1]),
        (lambda x: samplers.tfs(x, 0.4), [0]),  # differences −1/4, −1/8, 0; second ones 1/8, 1/8: each half of the sum
        (lambda x: samplers.tfs(x, 0.6), [0, 1]),
        (lambda x: samplers.tfs(x, 1), [0, 1, 2]),
        (lambda x: samplers.xtc(x, 0.2), [1, 2, 3]),
        (lambda x: samplers.xtc(x, 0.3), [0, 1, 2, 3]),
        (lambda x: samplers.xtc(x, 0.2, spared=[0]), [0, 1, 2, 3]),
        (lambda x: samplers.xtc(x, 0.2, spared=[1]), [1, 2, 3]),
    ],
)
def test_what_is_left(found, wanted):
    x = logits()
    left = found(x)
    assert kept(left) == wanted
    assert all(left[token] == x[token] for token in kept(left))


@pytest.mark.parametrize(
    ("name", "values", "ours"),
    [
        ("TemperatureLogitsWarper", (0.7,), lambda x, _: samplers.temperature(x, 0.7)),
        ("TopKLogitsWarper", (17,), lambda x, _: samplers.top_k(x, 17)),
        ("TopPLogitsWarper", (0.8,), lambda x, _: samplers.top_p(x, 0.8)),
        ("MinPLogitsWarper", (0.05,), lambda x, _: samplers.min_p(x, 0.05)),
        ("TypicalLogitsWarper", (0.6,), lambda x, _: samplers.typical_p(x, 0.6)),
        ("EpsilonLogitsWarper", (0.003,), lambda x, _: samplers.epsilon_cutoff(x, 0.003)),
        ("EtaLogitsWarper", (0.01,), lambda x, _: samplers.eta_cutoff(x, 0.01)),
        ("RepetitionPenaltyLogitsProcessor", (1.3,), lambda x, seen: samplers.repetition_penalty(x, seen, 1.3)),
        ("NoRepeatNGramLogitsProcessor", (3,), lambda x, seen: samplers.no_repeat_ngram(x, seen, 3)),
        ("EncoderRepetitionPenaltyLogitsProcessor", (1.3, "prompt"), lambda x, seen: samplers.encoder_repetition_penalty(x, seen[:6], 1.3)),
    ],
)
def test_it_is_what_the_library_does(name, values, ours):
    transformers = pytest.importorskip("transformers")
    seen = [5, 9, 2, 5, 9, 300, 7, 5, 9]
    for seed in range(5):
        x = torch.randn(500, generator=torch.Generator().manual_seed(seed)) * 3
        made = getattr(transformers, name)(*(torch.tensor([seen[:6]]) if value == "prompt" else value for value in values))
        close(ours(x, seen), made(torch.tensor([seen]), x[None].clone())[0].tolist())


def test_top_a_at_its_edge():
    assert kept(samplers.top_a(logits([0.6, 0.3, 0.1]), 1)) == [0]  # 0.36
    assert kept(samplers.top_a(logits([0.6, 0.3, 0.1]), 0.5)) == [0, 1]  # 0.18


def test_top_p_of_many_candidates_sorts_them_all():
    x = torch.zeros(5000)
    assert len(kept(samplers.top_p(x, 0.5))) == pytest.approx(2500, abs=3)
    assert len(kept(samplers.top_p(x, 0.1))) == pytest.approx(500, abs=3)


def test_top_n_sigma_does_not_count_what_is_ruled_out():
    """1, 3: the deviation is 1."""
    x = torch.tensor([3.0, 1.0, -math.inf])
    assert kept(samplers.top_n_sigma(x, 1.9)) == [0]
    assert kept(samplers.top_n_sigma(x, 2.1)) == [0, 1]
    assert kept(samplers.top_n_sigma(torch.tensor([-math.inf, 2.0]), 1)) == [1]


# --- repetition ------------------------------------------------------------------------------------------------------------------------


def test_penalties():
    x = torch.tensor([2.0, -2.0, 1.0, 0.5])
    close(samplers.repetition_penalty(x, [0, 1, 1], 2), [1, -4, 1, 0.5])
    close(samplers.presence_penalty(x, [0, 0, 3], 0.5), [1.5, -2, 1, 0])
    close(samplers.frequency_penalty(x, [0, 0, 3], 0.5), [1, -2, 1, 0])
    close(samplers.encoder_repetition_penalty(x, [0, 1], 2), [4, -1, 1, 0.5])
    close(x, [2, -2, 1, 0.5])  # what goes in stays


def test_penalties_look_as_far_as_their_range():
    s = sampler({"presence_penalty": 1, "repetition_penalty_range": 2, "temperature": 0})
    assert s.choose(torch.tensor([0.5, 1.0, 0.4]), [1, 0, 0]) == 1
    s = sampler({"presence_penalty": 1, "repetition_penalty_range": 0, "temperature": 0})
    assert s.choose(torch.tensor([0.1, 1.0, 0.4]), [1, 0, 0]) == 2


def test_repetitions():
    assert samplers.repetitions([1, 2, 3, 1, 2]) == {3: 2}
    assert samplers.repetitions([5, 2, 3, 1, 2]) == {3: 1}
    assert samplers.repetitions([1, 2, 3, 4]) == {}
    assert samplers.repetitions([1, 2, 3, 1, 2], frozenset([1])) == {3: 1}
    assert samplers.repetitions([1, 2, 3, 1, 2], frozenset([2])) == {}
    assert samplers.repetitions([7] * 200) == {7: samplers.LONGEST_MATCH}
    assert samplers.repetitions([1, 2, 4, 9, 1, 2, 3, 1, 2]) == {3: 2, 4: 2}


def test_dry():
    x = torch.zeros(5)
    close(samplers.dry(x, [1, 2, 3, 1, 2], 0.8, 2, 2), [0, 0, 0, -0.8, 0])
    close(samplers.dry(x, [1, 2, 3, 1, 2], 0.8, 2, 1), [0, 0, 0, -1.6, 0])
    close(samplers.dry(x, [1, 2, 3, 1, 2], 0.8, 2, 3), [0] * 5)
    assert samplers.dry(x, [4] * 90, 1, 1e30, 2)[4] == -math.inf


def test_no_repeat_ngram():
    x = torch.zeros(5)
    assert kept(samplers.no_repeat_ngram(x, [1, 2, 3, 1, 2], 3)) == [0, 1, 2, 4]
    assert kept(samplers.no_repeat_ngram(x, [1, 2], 1)) == [0, 3, 4]
    assert kept(samplers.no_repeat_ngram(x, [1, 2], 5)) == [0, 1, 2, 3, 4]


# --- guidance, probabilities, choosing -------------------------------------------------------------------------------------------------


def test_guidance():
    """away + scale · (steered − away), in log-probabilities."""
    found = samplers.guided(logits([0.5, 0.5]), logits([0.25, 0.75]), 2)
    close(found, [math.log(0.25) + 2 * math.log(2), math.log(0.75) + 2 * math.log(2 / 3)])
    close(samplers.guided(logits(), logits([0.1, 0.2, 0.3, 0.4]), 1), logits().tolist())


def test_alternatives():
    own, best = samplers.alternatives(logits() + 7, 3, 2)
    assert own == pytest.approx(math.log(1 / 8))
    assert [token for token, _ in best] == [0, 1] and [value for _, value in best] == pytest.approx([math.log(0.5), math.log(0.25)])


@pytest.mark.parametrize(("number", "token"), [(0.0, 0), (0.49, 0), (0.51, 1), (0.74, 1), (0.76, 2), (0.9, 3), (1 - 1e-12, 3)])
def test_draw(number, token):
    assert samplers.draw(logits(), number) == token


def test_what_is_ruled_out_is_never_drawn():
    x = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    assert {samplers.draw(x, number / 100) for number in range(100)} == {1, 3}


def test_mirostat_2():
    """With tau 1 the limit is 2 bits: 1/2 and 1/4 are left, as 2/3 and 1/3."""
    mirostat = Mirostat(2, 1.001, 0.5)
    assert mirostat.choose(logits(), 0.5) == 0
    assert mirostat.limit == pytest.approx(2.002 - 0.5 * (math.log2(1.5) - 1.001), abs=1e-4)
    mirostat.limit = -5  # the likeliest is always left
    assert mirostat.choose(logits(), 0.99) == 0


def test_mirostat_1_estimates_zipfs_law():
    """Probabilities ∝ 1/rank²: the exponent is 2, so k = (ε · 2^μ / (1 − N^−ε))^(1/2), with ε = 1 and N = 50."""
    x = torch.tensor([rank**-2.0 for rank in range(1, 51)]).log()
    mirostat = Mirostat(1, 2, 0.1)
    assert len(kept(mirostat._by_rank(x))) == round(math.sqrt(2**4 / (1 - 1 / 50)))


def test_adaptive_p():
    adaptive = AdaptiveP(0.3, 0.9)
    assert adaptive.wanted == pytest.approx(0.3)
    assert adaptive.choose(logits(), 0.3) == 1  # 1/4 is nearest: 5 − 10·(1/6)²/(7/6) = 4.76, and 1/2: 5 − 10·(2/3)²/(5/3) = 2.33
    # the average was 3/10; now (1/4 + 0.9·3) / (1 + 0.9·10)
    assert adaptive.wanted == pytest.approx(0.6 - 2.95 / 10)


# --- all together -----------------------------------------------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same():
    params = {"top_p": 0.9, "xtc_probability": 0.5, "temperature": 1.3}
    runs = [[s.choose(torch.arange(50) / 20, []) for _ in range(30)] for s in (sampler(params, 5), sampler(params, 5), sampler(params, 6))]
    assert runs[0] == runs[1] != runs[2]


def test_draws_have_the_right_frequencies():
    s = sampler({}, seed=3)
    counts = torch.bincount(torch.tensor([s.choose(logits(), []) for _ in range(4000)])) / 4000
    assert counts.tolist() == pytest.approx(HALVES, abs=0.03)


def test_xtc_happens_as_often_as_its_probability_says():
    s = sampler({"xtc_probability": 0.25, "xtc_threshold": 0.2, "top_k": 2}, seed=9)
    first = sum(s.choose(logits(), []) == 0 for _ in range(4000)) / 4000
    assert first == pytest.approx(2 / 3 * 0.75, abs=0.03)


def test_greedy_leaves_cut_offs_out_but_not_penalties():
    assert sampler({"temperature": 0, "top_k": 5, "min_p": 0.5}).plain and sampler({"do_sample": False}).plain
    assert not sampler({"temperature": 0, "repetition_penalty": 1.1}).plain
    assert sampler({"do_sample": False, "frequency_penalty": 2}).choose(logits(), [0]) == 1
    assert sampler({"dynamic_temperature": True, "dynatemp_low": 0, "dynatemp_high": 0}).greedy


def test_order():
    """Top p of 0.51 keeps two of the halves, but one when the temperature has sharpened them before."""
    first = sampler({"temperature": 0.25, "top_p": 0.51})
    last = sampler({"temperature": 0.25, "top_p": 0.51, "temperature_last": True})
    listed = sampler({"temperature": 0.25, "top_p": 0.51, "sampler_priority": ["top_p", "temperature"]})
    chosen = [{s.choose(logits(), []) for _ in range(400)} for s in (first, last, listed)]
    assert chosen == [{0}, {0, 1}, {0, 1}]


def test_bans_and_biases():
    assert sampler({"temperature": 0, "custom_token_bans": "0, 1"}).choose(logits(), []) == 2
    assert sampler({"temperature": 0}, logit_bias=[(3, 5.0), (9, 1.0)]).choose(logits(), []) == 3
    assert sampler({"temperature": 0, "ban_eos_token": True}, ends=[0]).choose(logits(), []) == 1
    allowed = torch.tensor([False, False, True, False])
    assert sampler({}).choose(logits(), [], allowed) == 2
    assert sampler({"custom_token_bans": "2"}).choose(logits(), [], allowed) is None


@pytest.mark.parametrize("mode", [1, 2])
def test_with_mirostat_other_cut_offs_are_left_out(mode):
    s = sampler({"mirostat_mode": mode, "mirostat_tau": 9, "top_k": 1})
    assert len({s.choose(logits(), []) for _ in range(200)}) > 1


EXTREME = {
    "temperature": 1e-9, "smoothing_factor": 10, "smoothing_curve": 10, "top_p": 0.0, "top_k": 1, "min_p": 1.0, "top_n_sigma": 1e-6, "typical_p": 0.0,
    "epsilon_cutoff": 9999, "eta_cutoff": 9999, "tfs": 0.0, "top_a": 1.0, "dry_multiplier": 5, "dry_base": 4, "repetition_penalty": 100,
    "encoder_repetition_penalty": 0.01, "no_repeat_ngram_size": 1, "mirostat_mode": 2, "mirostat_tau": 0, "adaptive_target": 1.0,
    "xtc_probability": 1.0, "frequency_penalty": 2, "presence_penalty": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", EXTREME)
def test_extremes_leave_something_to_choose(name):
    values = {name: EXTREME[name]} | ({"xtc_threshold": 0.0} if name == "xtc_probability" else {})
    wild = torch.randn(300, generator=torch.Generator().manual_seed(1)) * 20
    single = torch.full((300,), -math.inf).index_fill(0, torch.tensor(7), 0)
    for x in (wild, torch.zeros(300), single):
        chosen = sampler(values, prompt=3).choose(x, [5, 6, 5, 6])
        assert chosen is not None and 0 <= chosen < 300 and x[chosen] > -math.inf


def test_every_name_of_the_priority_has_a_step_or_a_chooser():
    everything = SamplingParams(**{**EXTREME, "dynamic_temperature": False})
    warm = NEUTRAL.replace({"dynamic_temperature": True})
    makers = samplers._makers(everything, 0, frozenset(), (), None) | samplers._makers(warm, 0, frozenset(), (), None)
    assert set(DEFAULT_PRIORITY) == set(makers) | {"adaptive_p", "mirostat"}


def test_what_is_supported_exists():
    assert SamplingParams.model_fields.keys() >= samplers.SUPPORTED


@pytest.mark.parametrize("spread", [0.5, 0.05])
def test_mirostat_1_takes_a_flat_distribution(spread):
    mirostat = Mirostat(1, 5.0, 0.1)
    mirostat.limit = 40.0
    assert mirostat._by_rank(torch.linspace(0, -spread, 32_000)).isfinite().any()
