"""Samplers on torch tensors, for every engine that computes logits with torch. Patches no library.

The functions are pure: logits of shape (vocabulary,) in float32 go in, new ones come out; −inf is a token that may not be chosen. None of
them leaves nothing. `Sampler` composes those that a request asks for. Random numbers come from one generator a request, so the
same seed gives the same reply, alone or among others, on any device.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from modules.samplers import DEFAULT_PRIORITY, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

LONGEST_MATCH = 50
"""Tokens that DRY compares backwards at most: a longer repetition is penalised no further."""
FEW = 1024
"""Candidates that are looked at before all are sorted: nearly always these are enough, and sorting a vocabulary takes milliseconds."""
MIROSTAT_TOKENS = 100
"""From so many of the likeliest tokens Mirostat 1 estimates the exponent of Zipf's law."""
_COLDEST = 1e-5  # below it, dividing logits overflows; there it is greedy anyway

# --- curve shape ------------------------------------------------------------------------------------------------------------------------


def temperature(logits: Tensor, value: float) -> Tensor:
    """Logits divided by `value`."""
    return logits / max(value, _COLDEST)


def dynamic_temperature(logits: Tensor, low: float, high: float, exponent: float) -> Tensor:
    """Divided by low + (high − low) · (H / H_max)^exponent: H is the entropy, H_max the largest for as many tokens."""
    choices = int((logits > -math.inf).sum())
    share = _entropy(logits) / math.log(choices) if choices > 1 else 0.0
    return temperature(logits, low + (high - low) * min(max(share, 0.0), 1.0) ** exponent)


def quadratic(logits: Tensor, factor: float, curve: float) -> Tensor:
    """m − k · f · d² + s · f · d³ with d the distance from the largest logit m (d ≤ 0), k = (3 − curve) / 2 and s = (curve − 1) / 2."""
    largest = logits.max()
    distance = logits - largest
    bent = distance.pow(2) * (-(3 - curve) / 2 * factor) + distance.pow(3) * ((curve - 1) / 2 * factor) + largest
    return bent.masked_fill(logits == -math.inf, -math.inf)


# --- cut-offs ---------------------------------------------------------------------------------------------------------------------------


def top_k(logits: Tensor, count: int) -> Tensor:
    """The `count` largest."""
    if count >= len(logits):
        return logits
    return _only(logits, logits.topk(count).indices)


def top_p(logits: Tensor, share: float) -> Tensor:
    """The likeliest that together reach `share`, the one that reaches it included."""
    probabilities = logits.softmax(-1)
    values, indices = probabilities.topk(min(FEW, len(logits)))
    if len(values) < len(logits) and float(values.sum()) < share:
        some = (probabilities >= (1 - share) / len(logits)).nonzero().flatten()  # all others together cannot have 1 − share
        values, order = probabilities[some].sort(descending=True)
        indices = some[order]
    before = values.cumsum(-1) - values
    return _only(logits, indices[: max(1, int((before < share).sum()))])


def min_p(logits: Tensor, share: float) -> Tensor:
    """Those at least `share` as likely as the likeliest."""
    return _without(logits, logits < logits.max() + (math.log(share) if share > 0 else -math.inf))


def top_a(logits: Tensor, value: float) -> Tensor:
    """Those at least as likely as `value` · (largest probability)²."""
    probabilities = logits.softmax(-1)
    return _without(logits, probabilities < value * probabilities.max() ** 2)


def top_n_sigma(logits: Tensor, count: float) -> Tensor:
    """Those within `count` standard deviations of the largest logit; what is ruled out already takes no part in the deviation."""
    finite = logits[logits > -math.inf]
    return _without(logits, logits < finite.max() - count * finite.std(correction=0)) if len(finite) > 1 else logits


def typical_p(logits: Tensor, share: float) -> Tensor:
    """Those whose information is nearest to the entropy, up to `share` of the probability. The likeliest token may be among the dropped."""
    logarithms = logits.log_softmax(-1)
    probabilities = logarithms.exp()
    strangeness = (-logarithms - _entropy(logits)).abs()
    order = strangeness.argsort()
    before = probabilities[order].cumsum(-1) - probabilities[order]
    return _only(logits, order[: max(1, int((before < share).sum()))])


def tfs(logits: Tensor, share: float) -> Tensor:
    """Tail-free: up to where the sorted probabilities' second differences (absolute) have used `share` of their sum."""
    if len(logits) < 3:
        return logits
    probabilities, order = logits.softmax(-1).sort(descending=True)
    curvature = probabilities.diff().diff().abs()
    used = (curvature / curvature.sum().clamp_min(1e-30)).cumsum(-1)
    return _only(logits, order[: 1 + int((used <= share).sum())])


def epsilon_cutoff(logits: Tensor, floor: float) -> Tensor:
    """Those of at least this probability, and the likeliest."""
    return _without(logits, logits.softmax(-1) < floor)


def eta_cutoff(logits: Tensor, epsilon: float) -> Tensor:
    """Those of at least min(ε, √ε · e^−H), and the likeliest."""
    return epsilon_cutoff(logits, min(epsilon, math.sqrt(epsilon) * math.exp(-_entropy(logits))))


def xtc(logits: Tensor, threshold: float, spared: Iterable[int] = ()) -> Tensor:
    """Without all tokens at least `threshold` likely but the least likely of them. Nothing is removed if one of `spared` would be."""
    probabilities = logits.softmax(-1)
    above = ((probabilities >= threshold) & (probabilities > 0)).nonzero().flatten()
    if len(above) < 2:
        return logits
    least = above[probabilities[above].argmin()]
    gone = above[above != least]
    return logits if set(gone.tolist()) & set(spared) else logits.index_fill(0, gone, -math.inf)


# --- repetition -------------------------------------------------------------------------------------------------------------------------


def repetition_penalty(logits: Tensor, seen: Sequence[int], value: float) -> Tensor:
    """Positive logits of the tokens `seen` divided by `value`, negative ones multiplied."""
    return _changed(logits, set(seen), lambda some: some.where(some <= 0, some / value).where(some > 0, some * value))


def presence_penalty(logits: Tensor, seen: Sequence[int], value: float) -> Tensor:
    """`value` subtracted once from each of the tokens `seen`."""
    return _changed(logits, set(seen), lambda some: some - value)


def frequency_penalty(logits: Tensor, seen: Sequence[int], value: float) -> Tensor:
    """`value` subtracted from a token for each time it was seen."""
    return _added(logits, {token: -value * count for token, count in Counter(seen).items()})


def encoder_repetition_penalty(logits: Tensor, prompt: Sequence[int], value: float) -> Tensor:
    """The opposite of a repetition penalty for the prompt's tokens: above 1 they become likelier."""
    return repetition_penalty(logits, prompt, 1 / value)


def dry(logits: Tensor, seen: Sequence[int], multiplier: float, base: float, allowed: int, breakers: frozenset[int] = frozenset()) -> Tensor:
    """Subtracts multiplier · base^(n − allowed) from a token that would lengthen a repetition of n ≥ allowed tokens. Matches end at `breakers`."""
    lengths = repetitions(seen, breakers)
    return _added(logits, {token: -_power(multiplier, base, n - allowed) for token, n in lengths.items() if n >= allowed and token not in breakers})


def repetitions(seen: Sequence[int], breakers: frozenset[int] = frozenset()) -> dict[int, int]:
    """For each token that would continue a repetition of the end of `seen`: how many tokens are repeated already, at most 50."""
    end = len(seen) - 1
    found: dict[int, int] = {}
    if end < 1 or seen[end] in breakers:
        return found
    last = seen[end]
    for place in range(end):
        if seen[place] != last:
            continue
        length = 1
        while length < min(LONGEST_MATCH, place + 1) and seen[place - length] == seen[end - length] and seen[place - length] not in breakers:
            length += 1
        following = seen[place + 1]
        found[following] = max(found.get(following, 0), length)
    return found


def no_repeat_ngram(logits: Tensor, seen: Sequence[int], size: int) -> Tensor:
    """Without the tokens that would repeat a sequence of `size` tokens."""
    if len(seen) < size:
        return logits
    start = tuple(seen[len(seen) - size + 1 :])
    banned = {seen[place + size - 1] for place in range(len(seen) - size + 1) if tuple(seen[place : place + size - 1]) == start}
    return _changed(logits, banned, lambda some: some.fill_(-math.inf))


# --- bans, guidance, probabilities ------------------------------------------------------------------------------------------------------


def biased(logits: Tensor, bias: dict[int, float]) -> Tensor:
    """Logits with `bias` added to those of its tokens."""
    return _added(logits, bias)


def guided(logits: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: away from what the negative prompt makes likely; in log-probabilities, as transformers does it."""
    steered, away = logits.log_softmax(-1), negative.log_softmax(-1)
    return away + scale * (steered - away)


def alternatives(logits: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """The log-probability of `token`, and the `count` likeliest tokens with theirs, best first."""
    logarithms = logits.log_softmax(-1)
    if not count:
        return float(logarithms[token]), []
    best = logarithms.topk(min(count, len(logits)))
    return float(logarithms[token]), list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


# --- choosing ---------------------------------------------------------------------------------------------------------------------------


def draw(logits: Tensor, number: float) -> int:
    """The token at `number` (0 ≤ number < 1) of the cumulated probabilities. One that is ruled out is never drawn."""
    import torch

    probabilities = logits.softmax(-1)
    cumulated = probabilities.cumsum(-1, dtype=torch.float32 if logits.device.type == "mps" else torch.float64)
    place = int(torch.searchsorted(cumulated, cumulated[-1:] * number, right=True))
    return place if place < len(logits) and probabilities[place] > 0 else int(probabilities.argmax())


class Mirostat:
    """Keeps the surprise of the chosen tokens near `tau` bits: version 1 by Zipf's law and top k, version 2 by a limit of the surprise."""

    def __init__(self, version: int, tau: float, eta: float) -> None:
        self._version, self._tau, self._eta = version, tau, eta
        self.limit = 2 * tau
        """Bits."""

    def choose(self, logits: Tensor, number: float) -> int:
        """One token; the limit moves by how far its surprise, among those that were left, was from what is wanted."""
        kept = self._by_rank(logits) if self._version == 1 else self._by_surprise(logits)
        token = draw(kept, number)
        surprise = -float(kept.log_softmax(-1)[token]) / math.log(2)
        self.limit -= self._eta * (surprise - self._tau)
        return token

    def _by_surprise(self, logits: Tensor) -> Tensor:
        return _without(logits, logits.log_softmax(-1) < -self.limit * math.log(2))

    def _by_rank(self, logits: Tensor) -> Tensor:
        size = int((logits > -math.inf).sum())
        best = logits.softmax(-1).topk(min(MIROSTAT_TOKENS, size)).values.tolist()
        above = below = 0.0
        for rank in range(1, len(best)):
            if best[rank] > 0:
                step = math.log((rank + 1) / rank)
                above += step * math.log(best[rank - 1] / best[rank])
                below += step**2
        slope = above / below if below else 1.0
        epsilon = slope - 1
        if abs(epsilon) < 1e-6 or slope <= 0:
            return logits
        many = (epsilon * 2.0 ** min(self.limit, 60.0)) / (1 - size**-epsilon)
        count = math.exp(min(math.log(many) / slope, 700.0))  # a flat distribution has a slope near 0
        return top_k(logits, max(1, min(round(count), size)))


class AdaptiveP:
    """Prefers tokens near a probability that moves, so that the chosen tokens' average comes near `target`. Constants as in llama.cpp."""

    WIDTH, PEAK, SHARPNESS = 0.3, 5.0, 10.0

    def __init__(self, target: float, decay: float) -> None:
        self._target, self._decay = target, decay
        self._sum, self._weight = target / (1 - decay), 1 / (1 - decay)

    @property
    def wanted(self) -> float:
        """The probability that the next token should have."""
        return min(max(2 * self._target - self._sum / self._weight, 0.0), 1.0)

    def choose(self, logits: Tensor, number: float) -> int:
        """One token; its probability enters the average."""
        probabilities = logits.softmax(-1)
        distance = (probabilities - self.wanted).abs() / self.WIDTH
        near = self.PEAK - self.SHARPNESS * distance**2 / (1 + distance)
        token = draw(near.masked_fill(logits == -math.inf, -math.inf), number)
        self._sum = float(probabilities[token]) + self._decay * self._sum
        self._weight = 1 + self._decay * self._weight
        return token


# --- all together -----------------------------------------------------------------------------------------------------------------------

Step = Callable[["Tensor", Sequence[int]], "Tensor"]
"""From logits and all tokens so far, the prompt's first, to logits."""
_TEMPERATURES = ("temperature", "dynamic_temperature", "quadratic_sampling")
_FOR_ALL = frozenset(
    ("repetition_penalty", "presence_penalty", "frequency_penalty", "dry", "encoder_repetition_penalty", "no_repeat_ngram"),
)
"""What also counts where the chooser sets its own cut-off, and for the likeliest token."""


class Sampler:
    """Chooses the tokens of one reply: its random numbers and what Mirostat and adaptive-p remember. Not for several threads.

    Order: biases and bans, then `sampler_priority` (unlisted first; `temperature_last` moves what shapes the curve to the end), then who
    chooses: the likeliest (sampling off or temperature 0: cut-offs are left out), Mirostat (it cuts off by itself), adaptive-p, or a draw.
    """

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        prompt_length: int,
        ends: Sequence[int] = (),
        logit_bias: Sequence[tuple[int, float]] = (),
        breakers: frozenset[int] = frozenset(),
        spared: Sequence[int] = (),
    ) -> None:
        """`ends`: tokens that end a reply. `breakers`: of DRY, as tokens. `spared`: those that XTC never removes."""
        bans = (*params.banned_tokens, *(ends if params.ban_eos_token else ()))
        self._bias = dict(logit_bias) | dict.fromkeys(bans, -math.inf)
        self._random = random.Random(seed)
        self.greedy = _is_greedy(params)
        self._mirostat = Mirostat(params.mirostat_mode, params.mirostat_tau, params.mirostat_eta) if params.mirostat_mode else None
        adaptive = params.adaptive_target > 0 and not self._mirostat
        self._adaptive = AdaptiveP(params.adaptive_target, params.adaptive_decay) if adaptive else None
        makers = _makers(params, prompt_length, breakers, spared, self._random)
        self._steps = [makers[name] for name in _order(params) if name in makers and self._counts(name)]

    def _counts(self, name: str) -> bool:
        shapes = name in _TEMPERATURES and not self.greedy
        return name in _FOR_ALL or shapes or not (self.greedy or self._mirostat)

    @property
    def plain(self) -> bool:
        """Whether it takes the largest of the logits as they are."""
        return self.greedy and not self._steps and not self._bias

    def choose(self, logits: Tensor, tokens: Sequence[int], allowed: Tensor | None = None) -> int | None:
        """The next token after `tokens`; None when nothing may be chosen. `allowed` (bool): what a grammar allows."""
        if self._bias:
            logits = biased(logits, {token: value for token, value in self._bias.items() if 0 <= token < len(logits)})
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -math.inf)
        if float(logits.max()) == -math.inf:
            return None
        for step in self._steps:
            logits = step(logits, tokens)
        if self.greedy:
            return int(logits.argmax())
        chooser = self._mirostat or self._adaptive
        return chooser.choose(logits, self._random.random()) if chooser else draw(logits, self._random.random())


def _is_greedy(params: SamplingParams) -> bool:
    hottest = max(params.dynatemp_low, params.dynatemp_high) if params.dynamic_temperature else params.temperature
    return not params.do_sample or hottest < _COLDEST


def _order(params: SamplingParams) -> list[str]:
    listed = list(dict.fromkeys(params.sampler_priority))
    order = [name for name in DEFAULT_PRIORITY if name not in listed] + listed
    if params.temperature_last:
        order = [name for name in order if name not in _TEMPERATURES] + [name for name in order if name in _TEMPERATURES]
    return order


def _makers(p: SamplingParams, prompt_length: int, breakers: frozenset[int], spared: Sequence[int], numbers: random.Random) -> dict[str, Step]:
    """The steps whose parameters are not neutral, by their names in `sampler_priority`."""

    def recent(tokens: Sequence[int]) -> Sequence[int]:
        return tokens[-p.repetition_penalty_range :] if p.repetition_penalty_range else tokens

    def maybe_xtc(logits: Tensor) -> Tensor:
        return xtc(logits, p.xtc_threshold, spared) if numbers.random() < p.xtc_probability else logits

    on: dict[str, tuple[bool, Step]] = {
        "repetition_penalty": (p.repetition_penalty != 1, lambda x, seen: repetition_penalty(x, recent(seen), p.repetition_penalty)),
        "presence_penalty": (p.presence_penalty != 0, lambda x, seen: presence_penalty(x, recent(seen), p.presence_penalty)),
        "frequency_penalty": (p.frequency_penalty != 0, lambda x, seen: frequency_penalty(x, recent(seen), p.frequency_penalty)),
        "dry": (p.dry_multiplier != 0, lambda x, seen: dry(x, recent(seen), p.dry_multiplier, p.dry_base, p.dry_allowed_length, breakers)),
        "top_n_sigma": (p.top_n_sigma != 0, lambda x, _: top_n_sigma(x, p.top_n_sigma)),
        "temperature": (not p.dynamic_temperature and p.temperature != 1, lambda x, _: temperature(x, p.temperature)),
        "dynamic_temperature": (
            p.dynamic_temperature,
            lambda x, _: dynamic_temperature(x, p.dynatemp_low, p.dynatemp_high, p.dynatemp_exponent),
        ),
        "quadratic_sampling": (p.smoothing_factor != 0, lambda x, _: quadratic(x, p.smoothing_factor, p.smoothing_curve)),
        "top_k": (p.top_k != 0, lambda x, _: top_k(x, p.top_k)),
        "top_p": (p.top_p != 1, lambda x, _: top_p(x, p.top_p)),
        "typical_p": (p.typical_p != 1, lambda x, _: typical_p(x, p.typical_p)),
        "epsilon_cutoff": (p.epsilon_cutoff != 0, lambda x, _: epsilon_cutoff(x, p.epsilon_cutoff * 1e-4)),
        "eta_cutoff": (p.eta_cutoff != 0, lambda x, _: eta_cutoff(x, p.eta_cutoff * 1e-4)),
        "tfs": (p.tfs != 1, lambda x, _: tfs(x, p.tfs)),
        "top_a": (p.top_a != 0, lambda x, _: top_a(x, p.top_a)),
        "min_p": (p.min_p != 0, lambda x, _: min_p(x, p.min_p)),
        "xtc": (p.xtc_probability != 0 and p.xtc_threshold <= 0.5, lambda x, _: maybe_xtc(x)),
        "encoder_repetition_penalty": (
            p.encoder_repetition_penalty != 1,
            lambda x, seen: encoder_repetition_penalty(x, seen[:prompt_length], p.encoder_repetition_penalty),
        ),
        "no_repeat_ngram": (p.no_repeat_ngram_size != 0, lambda x, seen: no_repeat_ngram(x, seen, p.no_repeat_ngram_size)),
    }
    return {name: step for name, (active, step) in on.items() if active}


SUPPORTED = frozenset(
    re.findall(
        r"\w+",
        """temperature dynamic_temperature dynatemp_low dynatemp_high dynatemp_exponent smoothing_factor smoothing_curve top_p top_k min_p
    top_n_sigma typical_p xtc_threshold xtc_probability epsilon_cutoff eta_cutoff tfs top_a dry_multiplier dry_allowed_length dry_base
    dry_sequence_breakers repetition_penalty frequency_penalty presence_penalty encoder_repetition_penalty no_repeat_ngram_size
    repetition_penalty_range mirostat_mode mirostat_tau mirostat_eta adaptive_target adaptive_decay do_sample temperature_last
    sampler_priority seed ban_eos_token custom_token_bans""",
    )
)
"""SamplingParams that `Sampler` honours."""

# --- helpers ----------------------------------------------------------------------------------------------------------------------------


def _entropy(logits: Tensor) -> float:
    """Nats."""
    logarithms = logits.log_softmax(-1)
    return float(-(logarithms.exp() * logarithms.masked_fill(logarithms == -math.inf, 0.0)).sum())


def _only(logits: Tensor, kept: Tensor) -> Tensor:
    """All but those at `kept` ruled out."""
    return logits.new_full(logits.shape, -math.inf).index_copy(0, kept, logits[kept])


def _without(logits: Tensor, gone: Tensor) -> Tensor:
    """Those where `gone` is true ruled out, but never the likeliest."""
    gone = gone.index_fill(0, logits.argmax(), False)
    return logits.masked_fill(gone, -math.inf)


def _changed(logits: Tensor, tokens: set[int], change: Callable[[Tensor], Tensor]) -> Tensor:
    index = _index(logits, tokens)
    return logits.index_copy(0, index, change(logits[index])) if len(index) else logits


def _added(logits: Tensor, values: dict[int, float]) -> Tensor:
    values = {token: value for token, value in values.items() if 0 <= token < len(logits)}
    return logits.index_add(0, _index(logits, values), logits.new_tensor(list(values.values()))) if values else logits


def _index(logits: Tensor, tokens: Iterable[int]) -> Tensor:
    import torch

    return torch.tensor([token for token in tokens if 0 <= token < len(logits)], dtype=torch.long, device=logits.device)


def _power(multiplier: float, base: float, exponent: int) -> float:
    try:
        return multiplier * base**exponent
    except OverflowError:
        return math.inf
