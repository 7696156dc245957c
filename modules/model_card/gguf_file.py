"""From the header of a GGUF file, with those of its later parts, to a ModelCard."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from modules.gguf import Header, Tensor, check_parts, mmproj_beside, model_file, read_header
from modules.model_card.card import (
    MAX_COUNT,
    Kind,
    ModelCard,
    checked_layers,
    count,
    family_of,
    sums,
    template_text,
    windowed_layers,
    words,
)

FILE_TYPES = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L"},
    **{14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS"},
    **{23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M"},
    **{32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE"},
}
"""llama.h, enum llama_ftype."""
TENSOR_NAMES = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"},
    **{16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 28: "F64", 29: "IQ1_M"},
    **{30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"},
}
"""ggml.h, enum ggml_type."""

REPACKED = (2, 12, 20)
"""Types of matrices that llama.cpp lays out anew on a CPU (ggml-cpu/repack.cpp: Q4_0, Q4_K, IQ4_NL, rows in eights)."""

_LAYER = re.compile(r"(?:v\.|mm\.)?blk\.(\d{1,9})\.(.+)")
_EXPERTS = re.compile(r"ffn_(?:up|down|gate|gate_up)_(?:ch|)exps\.")
_INPUTS = ("token_embd.", "position_embd.", "token_types.", "per_layer_token_embd.", "token_embd_norm.")
_STATES = ("ssm_", "shortconv.", "time_mix_")


def read_gguf(path: Path) -> ModelCard:
    """The card of the GGUF model at `path`: a file, or a folder that holds one. Raises ModelError."""
    file = model_file(path)
    header = read_header(file)
    parts = (header, *check_parts(header))
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    return _Reading(header, parts, tensors).card()


class _Reading:
    """One model's header while its card is made. Keys: GGUF specification and llama.cpp's `llama-arch.cpp`."""

    def __init__(self, header: Header, parts: Sequence[Header], tensors: Mapping[str, Tensor]) -> None:
        self.header = header
        self.parts = parts
        self.tensors = tensors
        self.layers = checked_layers(header.path.name, self.number("block_count"))
        places = ((_LAYER.match(name), name) for name in tensors)
        self.inside = {name: (int(place[1]), place[2]) for place, name in places if place and int(place[1]) < self.layers}
        """Layer and name in it, for the tensors that belong to a layer."""

    def number(self, key: str) -> int:
        return count(self.header.of_architecture(key))

    def each(self, key: str, otherwise: int = 0) -> list[int]:
        """A value for each layer: the list of that key, or its one number, or `otherwise`."""
        numbers = self.header.lists.get(f"{self.header.architecture}.{key}")
        if numbers is None:
            return [self.number(key) or otherwise] * self.layers
        return ([count(value) for value in numbers] + [0] * self.layers)[: self.layers]

    def card(self) -> ModelCard:
        header, family = self.header, family_of(self.header.architecture)
        heads = max(self.each("attention.head_count"), default=0)
        width = self.number("embedding_length")
        experts, used = self.number("expert_count"), self.number("expert_used_count")
        inner = max(self.each("feed_forward_length"), default=0)
        head_size = self.number("attention.key_length") or (width // heads if heads else 0)
        windowed = self.windowed(family.window_pattern)
        layer_bytes, expert_bytes, input_bytes, output_bytes = self.weights()
        general = header.metadata.get
        return ModelCard(
            name=words(header.name),
            kind=self.kind(),
            architecture=words(header.architecture),
            family=words(family.name),
            parameters=min(sum(tensor.elements for tensor in self.tensors.values()), MAX_COUNT),
            quantisation=self.quantisation(),
            context_length=self.number("context_length"),
            layers=self.layers,
            heads=heads,
            kv_heads=max(self.each("attention.head_count_kv", heads), default=0),
            head_size=head_size,
            embedding_size=width,
            feed_forward=max(inner, (self.number("expert_feed_forward_length") or inner) * used),
            vocabulary=self.vocabulary(),
            experts=experts,
            experts_used=used,
            sliding_window=self.number("attention.sliding_window"),
            windowed=windowed,
            cache_width=self.cache_width(heads, head_size, windowed),
            state_bytes=self.state_bytes(width),
            layer_bytes=layer_bytes,
            expert_bytes=expert_bytes,
            repacked_bytes=self.repacked(),
            input_bytes=input_bytes,
            output_bytes=output_bytes,
            tied="output.weight" not in self.tensors and "token_embd.weight" in self.tensors,
            texts=header.lengths.get("tokenizer.ggml.tokens", 0) + header.lengths.get("tokenizer.ggml.merges", 0),
            embeds=self.embeds(),
            vision=self.kind() == "vision" or mmproj_beside(header.path) is not None,
            licence=words(general("general.license")),
            base_model=words(general("general.base_model.0.name") or general("general.base_model.0.repo_url")),
            chat_template=template_text(header.chat_template),
            template=family.template,
            size=sum(part.file_size for part in self.parts),
            files=tuple(part.path.name for part in self.parts),
        )

    def kind(self) -> Kind:
        if self.header.metadata.get("general.type") == "adapter":
            return "adapter"
        return "vision" if self.header.metadata.get("general.type") == "mmproj" or self.header.architecture == "clip" else "gguf"

    def embeds(self) -> bool:
        architecture = self.header.architecture
        return "bert" in architecture or architecture.endswith(("-embedding", "-embed")) or self.number("pooling_type") > 0

    def vocabulary(self) -> int:
        embeddings = self.tensors.get("token_embd.weight")
        rows = embeddings.shape[1] if embeddings and len(embeddings.shape) > 1 else 0
        return count(rows) or self.header.lengths.get("tokenizer.ggml.tokens", 0) or self.number("vocab_size")

    def quantisation(self) -> str:
        """What the file calls itself, else the type of most of its numbers."""
        declared = FILE_TYPES.get(count(self.header.metadata.get("general.file_type")), "")
        if declared and "general.file_type" in self.header.metadata:
            return declared
        totals: dict[int, int] = {}
        for tensor in self.tensors.values():
            totals[tensor.kind] = totals.get(tensor.kind, 0) + tensor.elements
        most = max(totals, key=lambda kind: totals[kind], default=None)
        return "" if most is None else TENSOR_NAMES.get(most, f"type {most}")

    def windowed(self, pattern: int) -> tuple[bool, ...]:
        """From the file where it says so, else by the family's habit."""
        window = self.number("attention.sliding_window")
        listed = self.header.lists.get(f"{self.header.architecture}.attention.sliding_window_pattern")
        if window and listed is not None:
            return tuple(bool(value) for value in (*listed, *[0] * self.layers)[: self.layers])
        return windowed_layers(self.layers, window, self.number("attention.sliding_window_pattern") or pattern)

    def cache_width(self, heads: int, head_size: int, windowed: Sequence[bool]) -> tuple[int, ...]:
        """Layers without keys have no cache; nor have the last ones where these use those of earlier layers."""
        kv_heads = self.each("attention.head_count_kv", heads)
        key, value = head_size, self.number("attention.value_length") or head_size
        small_key, small_value = self.number("attention.key_length_swa") or key, self.number("attention.value_length_swa") or value
        if self.number("attention.key_length_mla"):  # the values are a part of the keys there
            value = small_value = 0
        names = {layer: set[str]() for layer in range(self.layers)}
        for layer, name in self.inside.values():
            names[layer].add(name)
        own = self.layers - self.number("attention.shared_kv_layers")
        small = (*windowed, *[False] * self.layers)
        sizes = ((small_key + small_value) if small[layer] else (key + value) for layer in range(self.layers))
        return tuple(min(kv_heads[layer] * size, MAX_COUNT) if layer < own and _has_keys(names[layer]) else 0 for layer, size in enumerate(sizes))

    def state_bytes(self, width: int) -> int:
        """float32 numbers of all recurrent layers: what convolutions look back on, and the states."""
        recurrent = len({layer for layer, name in self.inside.values() if name.startswith(_STATES)})
        inner, state = self.number("ssm.inner_size"), self.number("ssm.state_size")
        convolved = inner + 2 * self.number("ssm.group_count") * state
        numbers = max(self.number("ssm.conv_kernel") - 1, 0) * convolved + inner * state
        numbers += max(self.number("shortconv.l_cache") - 1, 0) * width
        numbers += (self.number("token_shift_count") or 2) * width + self.number("wkv.head_size") * width if self.number("wkv.head_size") else 0
        return min(recurrent * numbers * 4, MAX_COUNT)

    def repacked(self) -> tuple[int, ...]:
        tensors = ((layer, self.tensors[name]) for name, (layer, _) in self.inside.items())
        eights = ((layer, tensor) for layer, tensor in tensors if len(tensor.shape) > 1 and tensor.shape[1] % 8 == 0)
        return sums(self.layers, ((layer, tensor.size) for layer, tensor in eights if tensor.kind in REPACKED))

    def weights(self) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
        """Bytes: of layers, of their experts, of the input, of the rest."""
        experts = {name for name, (_, inner) in self.inside.items() if _EXPERTS.match(inner)}
        plain = [(layer, self.tensors[name].size) for name, (layer, _) in self.inside.items() if name not in experts]
        outside = {name: tensor.size for name, tensor in self.tensors.items() if name not in self.inside}
        read = sum(size for name, size in outside.items() if name.startswith(_INPUTS))
        expert_bytes = sums(self.layers, ((self.inside[name][0], self.tensors[name].size) for name in experts))
        return sums(self.layers, plain), expert_bytes, read, sum(outside.values()) - read


def _has_keys(names: set[str]) -> bool:
    """Whether a layer with these tensors computes keys for a cache."""
    if names & {"attn_k.weight", "attn_k_b.weight", "attn_kv_a_mqa.weight", "attn_kv_b.weight"}:
        return True
    return "attn_qkv.weight" in names and not any(name.startswith(_STATES) for name in names)
