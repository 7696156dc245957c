"""From a Hugging Face folder (configuration, safetensors headers, README) to a ModelCard."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.errors import ModelError
from modules.model_card.card import (
    MAX_COUNT,
    Kind,
    ModelCard,
    checked_layers,
    count,
    family_of,
    file_size,
    read_json,
    sums,
    template_text,
    windowed_layers,
    words,
)
from modules.safetensors_header import DTYPE_BITS, Tensor, read_header

MAX_CONFIG, MAX_INDEX, MAX_TOKENIZER, MAX_README = 4 << 20, 16 << 20, 16 << 20, 64 << 10
MAX_FILES = 1000
_PICKLES = (".bin", ".pt", ".pth")
_NOT_WEIGHTS = re.compile(r"(?:^|/)(?:training_args|optimizer|scheduler|rng_state|adapter_model|consolidated)")
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d{1,9})\.")
_EXPERTS = re.compile(r"\.experts?\.")
_ELSEWHERE = re.compile(r"(?:^|\.)(?:vision_\w+|visual|audio_\w+|multi_modal_projector|mtp)\.")
_INPUTS = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|tok_embeddings|embeddings|wpe)(?:\.\w+)?\.weight$")
_BESIDES = re.compile(r"\.(?:qzeros|scales|g_idx|suh|svh|su|sv|absmax|quant_map|nested_\w+|SCB|weight_scale\w*|weight_zero_point|\w*quant_state\S*)$")
"""Tensors beside quantised ones: they say how to read these, and are no parameters."""
_PACKED = ("I32", "I16", "U8", "I8")
_DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


def read_folder(folder: Path) -> ModelCard:
    """The card of the model, or PEFT adapter, in `folder`. Raises ModelError."""
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        return _adapter(folder)
    try:
        config = read_json(folder / "config.json", MAX_CONFIG)
    except FileNotFoundError:
        raise ModelError(f"{folder.name} has no config.json, so nothing can load it. Download the whole folder of the model.") from None
    return _Reading(folder, config).card()


def _adapter(folder: Path) -> ModelCard:
    config = read_json(folder / "adapter_config.json", MAX_CONFIG)
    weights = _weights(folder, ("adapter_model.safetensors", "adapter_model.bin"))
    tags = _front_matter(folder)
    return ModelCard(
        name=words(folder.name),
        kind="adapter",
        architecture=words(config.get("peft_type")),
        parameters=min(sum(tensor.elements for tensor in weights.tensors.values()), MAX_COUNT),
        quantisation=_most_used(weights.tensors),
        licence=tags.get("license", ""),
        base_model=words(config.get("base_model_name_or_path")),
        output_bytes=weights.size,
        size=weights.size,
        files=weights.files,
    )


class _Reading:
    """One folder while its card is made. Keys are those of the library's configuration classes, which differ between families."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        self.config = config
        inner: dict[str, Any] = next(
            (config[key] for key in ("text_config", "llm_config", "language_config") if isinstance(config.get(key), dict)), {}
        )
        self.values = {**config, **inner}
        """Those of the part that reads and writes text win."""
        quantisation = config.get("quantization_config", self.values.get("quantization_config"))
        self.quantised: Mapping[str, Any] = quantisation if isinstance(quantisation, dict) else {}
        self.layers = checked_layers(folder.name, self.number("num_hidden_layers", "n_layer", "num_layers", "n_layers"))
        self.weights = _weights(folder)

    def number(self, *keys: str) -> int:
        """The first of these that is there; 0 when none is."""
        return next((found for key in keys if (found := count(self.values.get(key)))), 0)

    def card(self) -> ModelCard:
        values, weights = self.values, self.weights
        architecture = words(values.get("model_type") or self.config.get("model_type"))
        family = family_of(architecture)
        heads, width = self.number("num_attention_heads", "n_head", "n_heads"), self.number("hidden_size", "n_embd", "d_model")
        used = self.number("num_experts_per_tok", "num_experts_per_token", "top_k_experts")
        experts = self.number("num_local_experts", "num_experts", "n_routed_experts")
        inner = self.number("intermediate_size", "ffn_dim", "n_inner") or 4 * width
        head_size = self.number("head_dim") or (width // heads if heads else 0)
        multi_query = values.get("multi_query") is True and not values.get("new_decoder_architecture")
        kv_heads = 1 if multi_query else self.number("num_key_value_heads", "num_kv_heads") or heads
        layer_bytes, expert_bytes, input_bytes, output_bytes = self.sizes()
        tags = _front_matter(self.folder)
        return ModelCard(
            name=words(self.folder.name),
            kind=self.kind(),
            architecture=architecture,
            family=words(family.name),
            parameters=self.parameters(),
            quantisation=self.quantisation(),
            context_length=self.number(
                "max_position_embeddings", "n_positions", "model_max_length", "max_seq_len", "max_sequence_length", "seq_length"
            ),
            layers=self.layers,
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            embedding_size=width,
            feed_forward=max(inner, (self.number("moe_intermediate_size") or inner) * used),
            vocabulary=self.number("vocab_size"),
            experts=experts,
            experts_used=used,
            sliding_window=self.window(),
            windowed=self.windowed(family.window_pattern),
            cache_width=self.cache_width(kv_heads, head_size),
            layer_bytes=layer_bytes,
            expert_bytes=expert_bytes,
            input_bytes=input_bytes,
            output_bytes=output_bytes,
            tied=bool(weights.tensors) and not any("lm_head" in name for name in weights.tensors),
            texts=self.number("vocab_size"),
            embeds=self.embeds(),
            vision=any(isinstance(self.config.get(key), dict) for key in ("vision_config", "vision_tower_config", "visual")),
            licence=tags.get("license", ""),
            base_model=tags.get("base_model", ""),
            chat_template=_chat_template(self.folder),
            template=family.template,
            remote_code=isinstance(self.config.get("auto_map"), dict),
            size=weights.size,
            files=weights.files,
        )

    def method(self) -> str:
        return words(self.quantised.get("quant_method")).lower()

    def kind(self) -> Kind:
        return "exl2" if self.method() == "exl2" else "exl3" if self.method() == "exl3" else "transformers"

    def bits(self) -> float:
        """Of a quantised number; 0 when it is not said."""
        found = self.quantised.get("bits", self.quantised.get("w_bit"))
        if found is None:
            found = 4 if self.quantised.get("load_in_4bit") or self.method() == "mxfp4" else 8 if self.quantised.get("load_in_8bit") else 0
        return float(found) if type(found) in (int, float) and 0.5 <= found <= 64 else 0.0

    def quantisation(self) -> str:
        method, bits = self.method(), self.bits()
        if self.kind() in ("exl2", "exl3"):
            return f"{method.upper()} {bits:.1f} bpw" if bits else method.upper()
        if method:
            known = {"bitsandbytes": "bitsandbytes", "fp8": "FP8", "fbgemm_fp8": "FP8", "mxfp4": "MXFP4", "compressed-tensors": "compressed-tensors"}
            name = known.get(method, method.upper())
            return f"{name} {bits:g}-bit" if bits and name not in ("FP8", "MXFP4") else name
        declared = self.values.get("dtype", self.values.get("torch_dtype"))
        return _most_used(self.weights.tensors) or _DTYPE_NAMES.get(str(declared), "")

    def parameters(self) -> int:
        """Packed tensors count as many numbers as their bits hold."""
        bits = self.bits() if self.quantised else 0
        total = 0
        for name, tensor in self.weights.tensors.items():
            if bits and _BESIDES.search(name):
                continue
            packed = bits and tensor.dtype in _PACKED
            total += int((tensor.end - tensor.begin) * 8 / bits) if packed else tensor.elements
        return min(total, MAX_COUNT)

    def window(self) -> int:
        return 0 if self.values.get("use_sliding_window") is False else self.number("sliding_window")

    def windowed(self, pattern: int) -> tuple[bool, ...]:
        if not self.window():
            return ()
        if kinds := self.layer_types():
            return tuple(kind == "sliding_attention" for kind in kinds)
        pattern = self.number("sliding_window_pattern") or pattern
        # Mistral's first generation: one window in all layers, and nothing says so.
        return windowed_layers(self.layers, self.window(), pattern) if pattern else (True,) * self.layers

    def cache_width(self, kv_heads: int, head_size: int) -> tuple[int, ...]:
        """Keys and values; the library keeps those of latent attention (DeepSeek) unpacked."""
        key, value = head_size, head_size
        if self.number("kv_lora_rank"):
            key = self.number("qk_nope_head_dim") + self.number("qk_rope_head_dim") or head_size
            value = self.number("v_head_dim") or head_size
        width, kinds = min(kv_heads * (key + value), MAX_COUNT), self.layer_types()
        return tuple(width if kind.endswith("attention") and kind != "linear_attention" else 0 for kind in kinds or ["attention"] * self.layers)

    def layer_types(self) -> list[str]:
        """What each layer is; empty when it is not said."""
        kinds = self.values.get("layer_types")
        return [str(kind) for kind in kinds] if isinstance(kinds, list) and len(kinds) == self.layers else []

    def embeds(self) -> bool:
        if (self.folder / "modules.json").exists() and (self.folder / "1_Pooling").is_dir():  # a folder of sentence-transformers
            return True
        names = self.config.get("architectures")
        writes = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForImageTextToText", "ForVision2Seq")
        return isinstance(names, list) and bool(names) and not any(str(name).endswith(writes) for name in names)

    def sizes(self) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
        """Bytes: of layers, of their experts, of the input, of the rest."""
        plain: list[tuple[int, int]] = []
        experts: list[tuple[int, int]] = []
        read = rest = 0
        for name, tensor in self.weights.tensors.items():
            size, place = tensor.end - tensor.begin, _LAYER.search(name)
            if place and int(place[1]) < self.layers and not _ELSEWHERE.search(name):
                (experts if _EXPERTS.search(name) else plain).append((int(place[1]), size))
            elif _INPUTS.search(name) and not _ELSEWHERE.search(name):
                read += size
            else:
                rest += size
        if not self.weights.tensors:  # weights that cannot be looked into
            rest = self.weights.size
        return sums(self.layers, plain), sums(self.layers, experts), read, rest


# --- files ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weights:
    """The files with weights, in order; tensors only where all of them are safetensors."""

    files: tuple[str, ...]
    size: int
    tensors: Mapping[str, Tensor]


def _weights(folder: Path, names: Sequence[str] = ("model.safetensors", "pytorch_model.bin")) -> _Weights:
    """What the index lists, else a file of one of `names`, else all safetensors (or pickles) of the folder. Raises ModelError for missing ones."""
    listed = _listed(folder)
    if listed is not None:
        files = tuple(sorted(set(listed.values())))
    else:
        files = next(((name,) for name in names if (folder / name).is_file()), ()) or tuple(_found(folder))
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        verb = "is" if len(missing) == 1 else "are"
        raise ModelError(f"{', '.join(missing[:5])}{more} {verb} missing in {folder.name}. Download what is missing into that folder.")
    if not files:
        raise ModelError(f"{folder.name} holds no weights (*.safetensors). Download the whole folder of the model.")
    size = sum(file_size(folder / name) for name in files)
    if not all(name.endswith(".safetensors") for name in files):
        return _Weights(files, size, {})
    tensors: dict[str, Tensor] = {}
    for name in files:
        tensors |= read_header(folder / name).tensors
    _check_listed(folder, listed or {}, tensors)
    return _Weights(files, size, tensors)


def _listed(folder: Path) -> dict[str, str] | None:
    """File by tensor from the index beside the weights; None when there is none."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        try:
            places = read_json(folder / name, MAX_INDEX).get("weight_map")
        except FileNotFoundError:
            continue
        if not isinstance(places, dict) or not places or not all(isinstance(file, str) and _is_plain(file) for file in places.values()):
            raise ModelError(f"{name} in {folder.name} does not say which file holds which tensor. Download it again.")
        if len(set(places.values())) > MAX_FILES:
            raise ModelError(f"{name} in {folder.name} lists more than {MAX_FILES} files. Use another conversion of this model.")
        return places
    return None


def _is_plain(name: str) -> bool:
    """Whether it names a file with weights in the folder itself."""
    return len(name) < 256 and name.endswith((".safetensors", *_PICKLES)) and not re.search(r"[/\\\0:]|^\.", name)


def _found(folder: Path) -> list[str]:
    """The safetensors of a folder without an index, else its pickles."""
    files = (path.name for path in folder.iterdir() if path.suffix in (".safetensors", *_PICKLES) and path.is_file())
    names = sorted(name for name in itertools.islice(files, MAX_FILES) if not _NOT_WEIGHTS.search(name))
    found = [name for name in names if name.endswith(".safetensors")] or names
    parts = [part for name in found if (part := re.fullmatch(r"(.+)-\d{5}-of-(\d{5})(\.\w+)", name))]
    if not parts or len(parts) != len(found):
        return found
    stem, last, suffix = parts[0].groups()  # shards whose index is lost: their names say how many there are
    return [f"{stem}-{number:05d}-of-{last}{suffix}" for number in range(1, min(int(last), MAX_FILES) + 1)]


def _check_listed(folder: Path, listed: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    lost = [name for name in listed if name not in tensors]
    if lost:
        raise ModelError(
            f"{listed[lost[0]]} in {folder.name} does not hold the tensor {lost[0][:60]!r}, which the index says it does. Download that file again."
        )


def _most_used(tensors: Mapping[str, Tensor]) -> str:
    """The number format of most bytes."""
    totals: dict[str, int] = {}
    for tensor in tensors.values():
        if tensor.dtype in DTYPE_BITS:
            totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.end - tensor.begin
    return max(totals, key=lambda dtype: totals[dtype], default="")


def _chat_template(folder: Path) -> str | None:
    """From `chat_template.jinja`, `chat_template.json` or `tokenizer_config.json`, the first that has one."""
    try:
        with (folder / "chat_template.jinja").open("rb") as file:
            return template_text(file.read(MAX_TOKENIZER).decode("utf-8", "replace"))
    except OSError:
        pass
    for name in ("chat_template.json", "tokenizer_config.json"):
        try:
            found = read_json(folder / name, MAX_TOKENIZER).get("chat_template")
        except FileNotFoundError:
            continue
        if isinstance(found, list):  # several, each with a name
            named: dict[str, Any] = {
                item["name"]: item.get("template") for item in found if isinstance(item, dict) and isinstance(item.get("name"), str)
            }
            found = named.get("default") or next(iter(named.values()), None)
        if found:
            return template_text(found)
    return None


def _front_matter(folder: Path) -> dict[str, str]:
    """`license` and `base_model` of the README's first block. Plain lines of YAML: a value, or the first item of a list."""
    try:
        with (folder / "README.md").open("rb") as file:
            text = file.read(MAX_README).decode("utf-8", "replace")
    except OSError:
        return {}
    block = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---", text, re.DOTALL)
    found: dict[str, str] = {}
    for key in ("license", "base_model"):
        match = block and re.search(rf"^{key}:[ \t]*(?:\r?\n[ \t]*-[ \t]*)?([^\r\n]*)", block[1], re.MULTILINE)
        if match:
            found[key] = words(match[1].strip(" \t'\"[]"))
    return found
