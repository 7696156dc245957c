"""From SamplingParams to a plan of llama.cpp's samplers. Pure: no engine, no model; `chain.py` makes the native samplers from a plan."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from modules.samplers import DEFAULT_PRIORITY, SamplingParams

WHOLE_CONTEXT = 0
"""`last_n` of penalties and DRY that means the whole context. (llama.cpp takes 0 and −1 as off; the chain puts the length in.)"""
_COLDEST = 1e-5  # below it, dividing logits overflows; there it is greedy anyway
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_TEMPERATURES = ("temperature", "dynamic_temperature")


class Stage(NamedTuple):
    """One sampler of a chain and its arguments, fit for JSON."""

    name: str
    args: dict[str, Any]


Maker = Callable[[SamplingParams, int], "Stage | None"]


def chain_plan(params: SamplingParams, seed: int, logit_bias: Sequence[tuple[int, float]] = ()) -> list[Stage]:
    """The samplers to run, first to last. A neutral parameter takes no part.

    First bias and grammar, then `sampler_priority` (unlisted first; `temperature_last` moves temperature to the end), then the one that
    chooses: greedy (sampling off or temperature 0; cut-offs are dropped), Mirostat (it sets its own cut-off, so others are dropped),
    adaptive-p, or a draw by probability.
    """
    stages = [*_bias(params, logit_bias), *_grammar(params)]
    stages += [stage for name in _order(params) if (stage := _STAGES[name](params, seed)) is not None]
    chooser = _chooser(params, seed)
    if chooser.name not in ("greedy", "mirostat", "mirostat_v2"):
        return [*stages, chooser]
    kept = {"logit_bias", "ban_eos", "grammar", "penalties", "dry"} | (set(_TEMPERATURES) if chooser.name != "greedy" else set())
    return [*(stage for stage in stages if stage.name in kept), chooser]


def _bias(params: SamplingParams, logit_bias: Sequence[tuple[int, float]]) -> list[Stage]:
    bias = dict(logit_bias) | dict.fromkeys(params.banned_tokens, float("-inf"))
    stages = [Stage("logit_bias", {"bias": [[token, value] for token, value in bias.items()]})] if bias else []
    return [*stages, Stage("ban_eos", {})] if params.ban_eos_token else stages


def _grammar(params: SamplingParams) -> list[Stage]:
    return [Stage("grammar", {"text": params.grammar_string})] if params.grammar_string.strip() else []


def _order(params: SamplingParams) -> list[str]:
    listed = list(dict.fromkeys(params.sampler_priority))
    order = [name for name in DEFAULT_PRIORITY if name not in listed] + listed
    if params.temperature_last:
        order = [name for name in order if name not in _TEMPERATURES] + [name for name in order if name in _TEMPERATURES]
    first_penalty = next(name for name in order if name in _PENALTIES)
    return [name for name in order if name in _STAGES and (name not in _PENALTIES or name == first_penalty)]


def _is_greedy(params: SamplingParams) -> bool:
    hottest = max(params.dynatemp_low, params.dynatemp_high) if params.dynamic_temperature else params.temperature
    return not params.do_sample or hottest < _COLDEST


def _chooser(params: SamplingParams, seed: int) -> Stage:
    if _is_greedy(params):
        return Stage("greedy", {})
    seed = _repeatable(seed)
    if params.mirostat_mode:
        name = "mirostat" if params.mirostat_mode == 1 else "mirostat_v2"
        return Stage(name, {"seed": seed, "tau": params.mirostat_tau, "eta": params.mirostat_eta})
    if params.adaptive_target > 0:
        return Stage("adaptive_p", {"target": params.adaptive_target, "decay": params.adaptive_decay, "seed": seed})
    return Stage("dist", {"seed": seed})


def _repeatable(seed: int) -> int:
    return min(seed % 2**32, 2**32 - 2)  # llama.cpp takes 2**32 − 1 as "random"


def _penalties(p: SamplingParams, _seed: int) -> Stage | None:
    if p.repetition_penalty == 1 and p.frequency_penalty == 0 and p.presence_penalty == 0:
        return None
    args = {"repeat": p.repetition_penalty, "frequency": p.frequency_penalty, "presence": p.presence_penalty}
    return Stage("penalties", {"last_n": p.repetition_penalty_range, **args})


def _dry(p: SamplingParams, _seed: int) -> Stage | None:
    if p.dry_multiplier == 0:
        return None
    args = {"multiplier": p.dry_multiplier, "base": p.dry_base, "allowed_length": p.dry_allowed_length}
    return Stage("dry", {**args, "last_n": p.repetition_penalty_range, "breakers": list(p.breakers)})


def _temperature(p: SamplingParams, _seed: int) -> Stage | None:
    return Stage("temperature", {"t": p.temperature}) if not p.dynamic_temperature and p.temperature != 1 else None


def _dynamic_temperature(p: SamplingParams, _seed: int) -> Stage | None:
    """llama.cpp takes the middle and half the range; with low above high it uses the middle alone."""
    if not p.dynamic_temperature:
        return None
    middle, half = (p.dynatemp_low + p.dynatemp_high) / 2, (p.dynatemp_high - p.dynatemp_low) / 2
    if half <= 0:
        return Stage("temperature", {"t": middle}) if middle != 1 else None
    return Stage("dynamic_temperature", {"t": middle, "delta": half, "exponent": p.dynatemp_exponent})


def _xtc(p: SamplingParams, seed: int) -> Stage | None:
    if p.xtc_probability == 0 or p.xtc_threshold > 0.5:  # two tokens can not both be likelier than that
        return None
    # A seed of its own: with the draw's, both would use the same random numbers, and XTC would bias the draw.
    return Stage("xtc", {"p": p.xtc_probability, "t": p.xtc_threshold, "seed": _repeatable(seed ^ 0x9E3779B9)})


def _simple(name: str, neutral: float) -> Maker:
    def make(params: SamplingParams, _seed: int) -> Stage | None:
        value = getattr(params, name)
        return Stage(name, {"value": value}) if value != neutral else None

    return make


_STAGES: dict[str, Maker] = {
    **dict.fromkeys(_PENALTIES, _penalties),
    "dry": _dry,
    "top_n_sigma": _simple("top_n_sigma", 0),
    "temperature": _temperature,
    "dynamic_temperature": _dynamic_temperature,
    "top_k": _simple("top_k", 0),
    "top_p": _simple("top_p", 1),
    "typical_p": _simple("typical_p", 1),
    "min_p": _simple("min_p", 0),
    "xtc": _xtc,
}

SUPPORTED = frozenset(
    re.findall(
        r"\w+",
        """temperature dynamic_temperature dynatemp_low dynatemp_high dynatemp_exponent top_p top_k min_p top_n_sigma typical_p
    xtc_threshold xtc_probability dry_multiplier dry_allowed_length dry_base dry_sequence_breakers repetition_penalty frequency_penalty
    presence_penalty repetition_penalty_range mirostat_mode mirostat_tau mirostat_eta adaptive_target adaptive_decay do_sample
    temperature_last sampler_priority max_new_tokens auto_max_new_tokens truncation_length seed max_tokens_second add_bos_token
    ban_eos_token skip_special_tokens custom_stopping_strings custom_token_bans grammar_string""",
    )
)
"""SamplingParams that mean something with llama.cpp, those included that the rooms above apply for every engine."""
