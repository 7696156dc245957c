"""SamplingParams: every sampling parameter, its meaning, range and neutral value. Declarations only.

A parameter at its neutral value takes no part in sampling. `range` limits the page's control; the API accepts what `bounds` allow.
Which engine honours which parameter stands in that engine's Loader record.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import field_validator

from modules.options import Options, knob, nearest

CURVE, CUTOFF, REPETITION, ALTERNATIVE, OTHER, LENGTH, TOKENS = (
    "Curve shape",
    "Curve cutoff",
    "Repetition",
    "Alternative sampling",
    "Order and mode",
    "Length and seed",
    "Tokens and constraints",
)

DEFAULT_PRIORITY = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "dry",
    "top_n_sigma",
    "temperature",
    "dynamic_temperature",
    "quadratic_sampling",
    "top_k",
    "top_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "tfs",
    "top_a",
    "min_p",
    "adaptive_p",
    "mirostat",
    "xtc",
    "encoder_repetition_penalty",
    "no_repeat_ngram",
)
MAX_DIGITS = 9
"""Of a token's number: no vocabulary needs more."""
MAX_COUNT = 2**31 - 1
"""Engines count in 32 bits."""
DEFAULT_BREAKERS = '"\\n", ":", "\\"", "*"'


def split_list(value: str | list[str] | tuple[str, ...]) -> list[str]:
    """Names from text separated by commas or newlines, or from a list of such texts."""
    parts = (value if isinstance(value, str) else ",".join(value)).replace("\n", ",").split(",")
    return [part.strip() for part in parts if part.strip()]


def quoted_strings(value: str) -> list[str]:
    """Texts from a JSON list, or from quoted strings separated by commas (`"\\n", "User:"`). Raises ValueError with the fix."""
    text = value.strip()
    if not text:
        return []
    try:
        found = json.loads(text if text.startswith("[") else f"[{text}]")
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise ValueError('write quoted texts separated by commas, like "\\n", "User:"')
    return [item for item in found if item]


class SamplingParams(Options):
    """How the next token is chosen, and what limits a generation."""

    temperature: float = knob(
        1.0,
        "Divides the logits: lower is more predictable. To take the likeliest token always, switch do_sample off (or give 0 by flag, file or API).",
        range=(0.01, 5, 0.01),
        bounds=(0, None),
        group=CURVE,
    )
    dynamic_temperature: bool = knob(
        False, "Let the temperature follow the entropy of the distribution.", group=CURVE, source="kalomaze, dynamic temperature sampling"
    )
    dynatemp_low: float = knob(1.0, "Temperature when the model is certain.", range=(0.01, 5, 0.01), bounds=(0, None), group=CURVE)
    dynatemp_high: float = knob(1.0, "Temperature when the model is uncertain.", range=(0.01, 5, 0.01), bounds=(0, None), group=CURVE)
    dynatemp_exponent: float = knob(
        1.0, "Bends the way from low to high: low + (high − low) · (H / H_max)^exponent.", range=(0.01, 5, 0.01), bounds=(0, None), group=CURVE
    )
    smoothing_factor: float = knob(
        0.0,
        "Quadratic sampling: lowers logits by the square of their distance from the best. 0 is off.",
        range=(0, 10, 0.01),
        bounds=(0, None),
        group=CURVE,
    )
    smoothing_curve: float = knob(1.0, "Adds a cubic term to quadratic sampling; 1 is none.", range=(1, 10, 0.01), bounds=(1, None), group=CURVE)

    top_p: float = knob(
        0.95,
        "Keep the likeliest tokens that together reach this probability. 1 is off.",
        range=(0, 1, 0.01),
        bounds=(0, 1),
        group=CUTOFF,
        source="Holtzman et al. 2019, arXiv:1904.09751",
    )
    top_k: int = knob(0, "Keep the k likeliest tokens. 0 is off.", range=(0, 200, 1), bounds=(0, MAX_COUNT), group=CUTOFF)
    min_p: float = knob(
        0.0,
        "Drop tokens less likely than this share of the likeliest one. 0 is off.",
        range=(0, 1, 0.01),
        bounds=(0, 1),
        group=CUTOFF,
        source="Nguyen et al. 2024, arXiv:2407.01082",
    )
    top_n_sigma: float = knob(
        0.0,
        "Keep logits within n standard deviations of the largest. 0 is off.",
        range=(0, 5, 0.01),
        bounds=(0, None),
        group=CUTOFF,
        source="Tang et al. 2024, arXiv:2411.07641",
    )
    typical_p: float = knob(
        1.0,
        "Keep tokens whose information is nearest to the expected one, up to this probability. 1 is off.",
        range=(0, 1, 0.01),
        bounds=(0, 1),
        group=CUTOFF,
        source="Meister et al. 2022, arXiv:2202.00666",
    )
    xtc_threshold: float = knob(
        0.1, "XTC looks at tokens at least this likely.", range=(0, 0.5, 0.01), bounds=(0, 1), group=CUTOFF, source="p-e-w, exclude top choices"
    )
    xtc_probability: float = knob(
        0.0,
        "Chance that XTC removes all tokens above the threshold but the least likely of them. 0 is off.",
        range=(0, 1, 0.01),
        bounds=(0, 1),
        group=CUTOFF,
    )
    epsilon_cutoff: float = knob(
        0.0,
        "Drop tokens below this probability, in units of 1e-4. 0 is off.",
        range=(0, 9, 0.01),
        bounds=(0, None),
        group=CUTOFF,
        source="Hewitt et al. 2022, arXiv:2210.15191",
    )
    eta_cutoff: float = knob(
        0.0,
        "Drop tokens below a floor that falls with entropy, in units of 1e-4. 0 is off.",
        range=(0, 20, 0.01),
        bounds=(0, None),
        group=CUTOFF,
        source="Hewitt et al. 2022, arXiv:2210.15191",
    )
    tfs: float = knob(
        1.0,
        "Tail-free sampling: cut where the curve's second derivative has used this share. 1 is off.",
        range=(0, 1, 0.01),
        bounds=(0, 1),
        group=CUTOFF,
        source="Bricken 2019, tail-free sampling",
    )
    top_a: float = knob(
        0.0, "Drop tokens below this share of the square of the largest probability. 0 is off.", range=(0, 1, 0.01), bounds=(0, 1), group=CUTOFF
    )

    dry_multiplier: float = knob(
        0.0,
        "Strength of DRY, which penalises continuing a repeated sequence. 0 is off; 0.8 is usual.",
        range=(0, 5, 0.01),
        bounds=(0, None),
        group=REPETITION,
        source="p-e-w, don't repeat yourself",
    )
    dry_allowed_length: int = knob(2, "Sequences up to this long may repeat freely.", range=(1, 20, 1), bounds=(0, MAX_COUNT), group=REPETITION)
    dry_base: float = knob(
        1.75, "Growth of the DRY penalty: multiplier · base^(length − allowed length).", range=(1, 4, 0.01), bounds=(1, None), group=REPETITION
    )
    dry_sequence_breakers: str = knob(DEFAULT_BREAKERS, "Texts over which DRY does not match: quoted, separated by commas.", group=REPETITION)
    repetition_penalty: float = knob(
        1.0,
        "Makes tokens already seen less likely, by division. 1 is off.",
        range=(1, 1.5, 0.01),
        bounds=(0.01, None),
        group=REPETITION,
        source="Keskar et al. 2019, arXiv:1909.05858",
    )
    frequency_penalty: float = knob(
        0.0, "Subtracted from a token's logit for each time it was seen. 0 is off.", range=(0, 2, 0.05), group=REPETITION, source="OpenAI API"
    )
    presence_penalty: float = knob(
        0.0, "Subtracted once from the logit of each token that was seen. 0 is off.", range=(0, 2, 0.05), group=REPETITION, source="OpenAI API"
    )
    encoder_repetition_penalty: float = knob(
        1.0, "Above 1, favours tokens of the prompt; below 1, avoids them. 1 is off.", range=(0.8, 1.5, 0.01), bounds=(0.01, None), group=REPETITION
    )
    no_repeat_ngram_size: int = knob(
        0, "Never repeat a sequence of so many tokens. 0 is off.", range=(0, 20, 1), bounds=(0, MAX_COUNT), group=REPETITION
    )
    repetition_penalty_range: int = knob(
        1024,
        "How many last tokens the penalties and DRY look at. 0 is the whole context.",
        range=(0, 4096, 64),
        bounds=(0, MAX_COUNT),
        group=REPETITION,
    )

    penalty_alpha: float = knob(
        0.0,
        "Contrastive search (needs sampling off and a small top k). 0 is off.",
        range=(0, 5, 0.01),
        bounds=(0, None),
        group=ALTERNATIVE,
        source="Su et al. 2022, arXiv:2202.06417",
    )
    guidance_scale: float = knob(
        1.0,
        "Classifier-free guidance against the negative prompt. 1 is off.",
        range=(-0.5, 2.5, 0.05),
        group=ALTERNATIVE,
        source="Sanchez et al. 2023, arXiv:2306.17806",
    )
    mirostat_mode: int = knob(
        0,
        "Keep the surprise constant: 1 or 2 is the version, 0 is off.",
        range=(0, 2, 1),
        bounds=(0, 2),
        group=ALTERNATIVE,
        source="Basu et al. 2020, arXiv:2007.14966",
    )
    mirostat_tau: float = knob(5.0, "Mirostat's target surprise, in bits.", range=(0, 10, 0.01), bounds=(0, None), group=ALTERNATIVE)
    mirostat_eta: float = knob(0.1, "Mirostat's learning rate.", range=(0, 1, 0.01), bounds=(0, None), group=ALTERNATIVE)
    adaptive_target: float = knob(
        0.0,
        "Adaptive-p: prefer tokens near this probability. 0 is off.",
        range=(0, 1, 0.01),
        bounds=(0, 1),
        group=ALTERNATIVE,
        source="adaptive-p, llama.cpp",
    )
    adaptive_decay: float = knob(
        0.9, "Adaptive-p: how slowly its running average forgets.", range=(0, 0.99, 0.01), bounds=(0, 0.99), group=ALTERNATIVE
    )

    do_sample: bool = knob(True, "Off: always take the likeliest token.", group=OTHER)
    temperature_last: bool = knob(False, "Apply temperature after all other samplers.", group=OTHER)
    sampler_priority: tuple[str, ...] = knob(
        DEFAULT_PRIORITY, "Order of the samplers, first to last; those not listed run first.", group=OTHER, multiline=True
    )

    max_new_tokens: int = knob(
        512, "Longest reply, in tokens. Counts while auto max new tokens is off.", range=(1, 4096, 1), bounds=(1, MAX_COUNT), group=LENGTH
    )
    auto_max_new_tokens: bool = knob(True, "Let a reply use all of the context that is left, however long max new tokens is.", group=LENGTH)
    truncation_length: int = knob(
        0, "Longest prompt together with the reply, in tokens. 0 is the model's context.", range=(0, 131072, 256), bounds=(0, MAX_COUNT), group=LENGTH
    )
    seed: int = knob(
        -1, "The same seed and settings repeat a reply. −1 chooses one at random.", range=(-1, 2**31 - 1, 1), bounds=(-1, 2**32 - 1), group=LENGTH
    )
    max_tokens_second: int = knob(0, "Slow down to so many tokens per second. 0 is off.", range=(0, 20, 1), bounds=(0, MAX_COUNT), group=LENGTH)

    add_bos_token: bool = knob(True, "Begin the prompt with the model's BOS token (never twice).", group=TOKENS)
    ban_eos_token: bool = knob(False, "Never end by itself; the reply then ends at its longest or when stopped.", group=TOKENS)
    skip_special_tokens: bool = knob(True, "Leave special tokens out of the text.", group=TOKENS)
    custom_stopping_strings: str = knob("", 'Texts that end the reply: quoted, separated by commas, like "\\nUser:", "###".', group=TOKENS)
    custom_token_bans: str = knob("", "Numbers of tokens that may not appear, separated by commas.", group=TOKENS)
    negative_prompt: str = knob("", "What guidance steers away from.", group=TOKENS, multiline=True)
    grammar_string: str = knob("", "A GBNF grammar that the reply must follow.", group=TOKENS, multiline=True, source="llama.cpp, GBNF")
    prompt_lookup_num_tokens: int = knob(
        0, "Guess so many tokens ahead from the prompt itself. 0 is off.", range=(0, 10, 1), bounds=(0, MAX_COUNT), group=TOKENS
    )
    static_cache: bool = knob(False, "Allocate the cache once, at full size.", group=TOKENS)

    @field_validator("sampler_priority", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if not isinstance(value, str | list | tuple) or not all(isinstance(part, str) for part in value):
            return value  # refused by its type
        names = split_list(value)
        for name in names:
            if name not in DEFAULT_PRIORITY:
                raise ValueError(f"unknown sampler {name[:60]!r}.{nearest(name[:60], DEFAULT_PRIORITY)}")
        return names

    @field_validator("dry_sequence_breakers", "custom_stopping_strings")
    @classmethod
    def _quoted(cls, value: str) -> str:
        quoted_strings(value)
        return value

    @field_validator("custom_token_bans")
    @classmethod
    def _ids(cls, value: str) -> str:
        if not all(part.isascii() and part.isdigit() and len(part) <= MAX_DIGITS for part in split_list(value)):
            raise ValueError("write token numbers separated by commas")
        return value

    @property
    def stopping_strings(self) -> tuple[str, ...]:
        """`custom_stopping_strings` as texts."""
        return tuple(quoted_strings(self.custom_stopping_strings))

    @property
    def breakers(self) -> tuple[str, ...]:
        """`dry_sequence_breakers` as texts."""
        return tuple(quoted_strings(self.dry_sequence_breakers))

    @property
    def banned_tokens(self) -> tuple[int, ...]:
        """`custom_token_bans` as token ids."""
        return tuple(int(part) for part in split_list(self.custom_token_bans))


NEUTRAL = SamplingParams(top_p=1.0)
"""Every sampler off. The declared default differs in one place: the page and the API begin with top_p 0.95."""
