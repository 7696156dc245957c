"""Which models can be converted both ways, and how their two forms differ: names of values and tensors, the order of rows, RoPE.

GGUF's names: the specification (ggml `docs/gguf.md`) and the `gguf` package. Tensor names come from that package's own mapping.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from modules.errors import ModelError
from modules.gguf import Header, Scalar

ROPE_FACTORS = "rope_freqs.weight"
MAX_LAYERS = 1000
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of every Llama 3.1 to 3.3: a GGUF file holds the frequencies that come of them, but not the numbers themselves."""


@dataclass(frozen=True)
class Architecture:
    """One architecture of GGUF files."""

    name: str
    model_types: tuple[str, ...]
    """`model_type` of the Hugging Face configurations that become it. It becomes the first."""
    activation: str = "silu"
    interleaved: bool = False
    """RoPE turns neighbouring numbers of a head, and not the first with the middle one: rows of queries and keys have another order."""
    norm_offset: float = 0.0
    """What a norm's weight is greater by in the GGUF file."""


ARCHITECTURES = (
    Architecture("llama", ("llama", "mistral"), interleaved=True),
    Architecture("qwen2", ("qwen2",)),
    Architecture("qwen3", ("qwen3",)),
    Architecture("gemma", ("gemma",), activation="gelu_pytorch_tanh", norm_offset=1.0),
)

_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
"""GGUF's key, without the architecture before it, to the name in a Hugging Face configuration."""


def named(name: str) -> Architecture | None:
    """The architecture that GGUF files call so."""
    return next((known for known in ARCHITECTURES if known.name == name), None)


def of_model_type(model_type: str) -> Architecture:
    """The architecture that a Hugging Face `model_type` becomes. Raises ModelError with the list."""
    for known in ARCHITECTURES:
        if model_type in known.model_types:
            return known
    supported = ", ".join(kind for known in ARCHITECTURES for kind in known.model_types)
    raise ModelError(f"Models of type {str(model_type)[:60]!r} cannot be converted here; these can: {supported}. Use a GGUF file made by others.")


# --- values ---------------------------------------------------------------------------------------------------------------------------


def metadata(architecture: Architecture, config: Any) -> dict[str, int | float | str]:
    """What a GGUF file says about a model with this Hugging Face `config`. Raises ModelError when that cannot be said."""
    activation = getattr(config, "hidden_act", architecture.activation)
    if activation != architecture.activation:
        raise ModelError(f"Its activation is {activation!r}; llama.cpp computes {architecture.activation!r} for it. It cannot be converted.")
    values: dict[str, Any] = {key: getattr(config, name, None) for key, name in _KEYS.items()}
    values["attention.head_count_kv"] = values["attention.head_count_kv"] or config.num_attention_heads
    head = values["rope.dimension_count"] or config.hidden_size // config.num_attention_heads
    values |= {key: head for key, name in _KEYS.items() if name == "head_dim"}
    values["rope.freq_base"], scaling = _rope(config)
    if scaling.get("rope_type") == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
    return {f"{architecture.name}.{key}": value for key, value in values.items()}


def rope_factors(config: Any) -> np.ndarray | None:
    """What each frequency of RoPE is divided by (head size / 2,), where they differ (Llama 3.1 and later)."""
    base, scaling = _rope(config)
    if scaling.get("rope_type") != "llama3":
        return None
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return _llama3_factors(head, base, scaling)


def _rope(config: Any) -> tuple[float, Mapping[str, Any]]:
    """(base frequency, scaling). Raises ModelError for a scaling that this conversion does not know."""
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    kind = parameters.get("rope_type", "default")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("Its RoPE turns a part of each head only, which this conversion does not know. Use a GGUF file made by others.")
    if kind not in ("default", "linear", "llama3"):
        raise ModelError(f"Its RoPE scaling is {kind!r}; this conversion knows linear and llama3. Use a GGUF file made by others.")
    return float(parameters.get("rope_theta") or 10_000.0), parameters


def _llama3_factors(head: int, base: float, scaling: Mapping[str, Any]) -> np.ndarray:
    """Long waves are stretched by `factor`, short ones not at all, between them it changes smoothly (as transformers' `llama3`)."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi * base ** (np.arange(0, head, 2) / head))
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    factors: np.ndarray = (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)
    return factors


def config_values(architecture: Architecture, header: Header, vocabulary: int, factors: np.ndarray | None) -> dict[str, Any]:
    """Values of the Hugging Face configuration for a GGUF file with `vocabulary` tokens and, where it has them, RoPE `factors`.

    Raises ModelError for what such a configuration cannot say.
    """
    found = {name: header.of_architecture(key) for key, name in _KEYS.items() if header.of_architecture(key) is not None}
    for key, name in _KEYS.items():
        value = found.get(name, 1 if name in ("head_dim", "vocab_size", "num_key_value_heads") else None)
        if not isinstance(value, int | float) or value <= 0:
            raise ModelError(f"{header.path.name} says that its {key} is {value!r}, which cannot be. Use another conversion of this model.")
    if header.of_architecture("expert_count"):
        raise ModelError(f"{header.path.name} has experts; mixtures of experts are not known here. Use it with llama.cpp.")
    values: dict[str, Any] = {**found, "vocab_size": vocabulary, "hidden_act": architecture.activation}
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    base = header.of_architecture("rope.freq_base") or 10_000.0
    return {**values, "rope_parameters": {"rope_theta": base, **_rope_scaling(header, values["head_dim"], float(base), factors)}}


def _rope_scaling(header: Header, head: Any, base: float, factors: np.ndarray | None) -> dict[str, Scalar]:
    kind, factor = header.of_architecture("rope.scaling.type") or "none", header.of_architecture("rope.scaling.factor")
    if factors is not None:
        scaling: dict[str, Scalar] = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3}
        wanted = _llama3_factors(head, base, scaling)
        if wanted.shape != factors.shape or not np.allclose(wanted, factors, rtol=1e-4):
            raise ModelError(f"{header.path.name} has RoPE frequencies of its own, which no configuration can say. Use it with llama.cpp.")
        return scaling
    if kind == "linear" and factor:
        return {"rope_type": "linear", "factor": float(factor)}
    if kind != "none":
        raise ModelError(f"The RoPE scaling of {header.path.name} is {kind!r}; linear and llama3 are known here. Use it with llama.cpp.")
    return {"rope_type": "default"}


# --- tensors --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """How the numbers of a tensor differ in the two forms of one model."""

    architecture: Architecture
    heads: int
    kv_heads: int

    def to_gguf(self, name: str, values: np.ndarray) -> np.ndarray:
        """From Hugging Face's form; `name` is GGUF's."""
        if heads := self._turned(name):
            halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            return halves.swapaxes(1, 2).reshape(values.shape)
        return values + np.float32(self.architecture.norm_offset) if self._shifted(name) else values

    def to_hf(self, name: str, values: np.ndarray) -> np.ndarray:
        """To Hugging Face's form; `name` is GGUF's."""
        if heads := self._turned(name):
            pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
            return pairs.swapaxes(1, 2).reshape(values.shape)
        return values - np.float32(self.architecture.norm_offset) if self._shifted(name) else values

    def stay(self, name: str) -> bool:
        """Whether each row stays in its place, so that rows can be brought into the other form apart from each other."""
        return not self._turned(name)

    def _turned(self, name: str) -> int:
        """Heads of a tensor whose rows have another order; 0 when it has not."""
        if not self.architecture.interleaved:
            return 0
        return {"attn_q": self.heads, "attn_k": self.kv_heads}.get(name.split(".")[-2], 0)

    def _shifted(self, name: str) -> bool:
        return bool(self.architecture.norm_offset) and name.endswith("norm.weight")


def rows(architecture: Architecture, config: Any) -> Rows:
    """The `Rows` of a model with this Hugging Face configuration."""
    return Rows(architecture, config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads)


class TensorNames:
    """GGUF's names of Hugging Face tensors."""

    def __init__(self, architecture: Architecture, layers: int) -> None:
        """Raises ModelError for a number of `layers` that no model has."""
        import gguf

        if not 0 < layers <= MAX_LAYERS:
            raise ModelError(f"The model says that it has {layers} layers; 1 to {MAX_LAYERS} are possible. Download it again.")
        number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
        self._map = gguf.get_tensor_name_map(number, layers)

    def get(self, name: str) -> str | None:
        """None for a tensor that has no place in a GGUF file."""
        return self._map.get_name(name, try_suffixes=(".weight", ".bias"))
