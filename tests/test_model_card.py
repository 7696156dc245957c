"""ModelCards from files made by hand: GGUF headers, Hugging Face folders, adapters; what is missing or wrong is named."""

from __future__ import annotations

import json
import struct
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from modules.errors import ModelError
from modules.instruction_templates import SHIPPED
from modules.model_card import ModelCard, card, gguf_file, read_card
from tests.test_gguf import build, number_pair, pair, string_pair, tensor

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": 10,
    "torch_dtype": "bfloat16",
}


def numbers(kind: int, form: str, *values: int) -> bytes:
    return struct.pack("<IQ", kind, len(values)) + struct.pack(f"<{len(values)}{form}", *values)


def gguf(path: Path, *more: bytes, tensors: tuple[bytes, ...] = (), size: int = 0, arch: str = "llama", layers: int = 2) -> Path:
    pairs = [string_pair("general.architecture", arch), number_pair(f"{arch}.block_count", layers), *more]
    path.write_bytes(build(pairs, list(tensors), b"\0" * size))
    return path


def attention(arch: str, **keys: int) -> list[bytes]:
    named = {"head_count": 4, "head_count_kv": 2, "key_length": 32, "value_length": 32, **keys}
    return [number_pair(f"{arch}.embedding_length", 64), *(number_pair(f"{arch}.attention.{key}", value) for key, value in named.items() if value)]


def keys_of(layers: int) -> tuple[bytes, ...]:
    return tuple(tensor(f"blk.{layer}.attn_k.weight", [32], 0, 128 * layer) for layer in range(layers))


def safetensors(path: Path, tensors: dict[str, tuple[str, list[int], int]]) -> Path:
    fields_, at = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        fields_[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(fields_).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * at)
    return path


def folder(tmp_path: Path, config: dict[str, Any] = CONFIG, tensors: dict[str, tuple[str, list[int], int]] | None = None) -> Path:
    place = tmp_path / "tiny"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config))
    plain = {
        "model.embed_tokens.weight": ("BF16", [10, 8], 160),
        "model.layers.0.self_attn.k_proj.weight": ("BF16", [4, 8], 64),
        "model.layers.1.mlp.up_proj.weight": ("BF16", [16, 8], 256),
        "model.norm.weight": ("F32", [8], 32),
    }
    safetensors(place / "model.safetensors", plain if tensors is None else tensors)
    return place


# --- GGUF -------------------------------------------------------------------------------------------------------------------------------


def test_the_starter(starter_model):
    found = read_card(starter_model)
    assert (found.kind, found.architecture, found.family, found.quantisation, found.licence) == ("gguf", "llama", "Llama", "Q4_1", "apache-2.0")
    assert (found.parameters, found.context_length, found.layers, found.vocabulary, found.texts) == (134_515_008, 8192, 30, 49152, 49152 + 48900)
    assert (found.heads, found.kv_heads, found.head_size, found.embedding_size, found.feed_forward) == (9, 3, 64, 576, 1536)
    assert found.cache_width == (3 * 2 * 64,) * 30 and found.tied and found.chat_template and found.files == (starter_model.name,)
    weights = sum(found.layer_bytes) + sum(found.expert_bytes) + found.input_bytes + found.output_bytes
    assert weights == 96_576_768 and weights < found.size == starter_model.stat().st_size


def test_a_value_for_each_layer_and_a_layer_without_keys(tmp_path):
    more = [*attention("jamba", head_count_kv=0), pair("jamba.attention.head_count_kv", 9, numbers(5, "i", 0, 2))]
    more += [number_pair("jamba.ssm.inner_size", 128), number_pair("jamba.ssm.state_size", 16), number_pair("jamba.ssm.conv_kernel", 4)]
    tensors = (tensor("blk.0.ssm_a", [32], 0, 0), tensor("blk.1.attn_k.weight", [32], 0, 128))
    found = read_card(gguf(tmp_path / "m.gguf", *more, tensors=tensors, size=256, arch="jamba"))
    assert found.kv_heads == 2 and found.cache_width == (0, 2 * 64)
    assert found.state_bytes == (3 * 128 + 128 * 16) * 4  # of one layer
    assert found.layer_bytes == (128, 128)


def test_windows_from_the_file_and_by_the_familys_habit(tmp_path):
    window = number_pair("gemma3.attention.sliding_window", 16)
    listed = pair("gemma3.attention.sliding_window_pattern", 9, numbers(7, "?", 1, 0, 1, 1, 1, 0, 1))
    by_file = read_card(gguf(tmp_path / "a.gguf", window, listed, arch="gemma3", layers=7))
    assert by_file.windowed == (True, False, True, True, True, False, True)
    by_habit = read_card(gguf(tmp_path / "b.gguf", window, arch="gemma3", layers=7))
    assert by_habit.windowed == (True, True, True, True, True, False, True) and by_habit.template == "Gemma"
    unknown = read_card(gguf(tmp_path / "c.gguf", number_pair("new.attention.sliding_window", 16), arch="new"))
    assert unknown.windowed == () and unknown.sliding_window == 16 and unknown.family == "new"


def test_experts_and_latent_attention(tmp_path):
    more = [*attention("deepseek2", head_count_kv=1, key_length=576, value_length=512, key_length_mla=192)]
    more += [number_pair("deepseek2.expert_count", 8), number_pair("deepseek2.expert_used_count", 2)]
    more += [number_pair("deepseek2.feed_forward_length", 100), number_pair("deepseek2.expert_feed_forward_length", 70)]
    tensors = (tensor("blk.0.attn_kv_a_mqa.weight", [32], 0, 0), tensor("blk.0.ffn_up_exps.weight", [32, 2], 0, 128))
    found = read_card(gguf(tmp_path / "m.gguf", *more, tensors=tensors, size=384, arch="deepseek2", layers=1))
    assert found.cache_width == (576,) and found.layer_bytes == (128,) and found.expert_bytes == (256,)
    assert (found.experts, found.experts_used, found.feed_forward) == (8, 2, 140)


def test_quantisation_by_name_and_by_most_numbers(tmp_path):
    named = read_card(gguf(tmp_path / "a.gguf", number_pair("general.file_type", 15)))
    assert named.quantisation == "Q4_K_M"
    tensors = (tensor("a", [32], 0, 0), tensor("b", [64], 8, 128))
    assert read_card(gguf(tmp_path / "b.gguf", tensors=tensors, size=196)).quantisation == "Q8_0"
    assert read_card(gguf(tmp_path / "c.gguf")).quantisation == ""


def test_matrices_that_are_laid_out_anew(tmp_path):
    eights, seven, row = tensor("blk.0.a.weight", [32, 8], 2, 0), tensor("blk.0.b.weight", [32, 7], 2, 160), tensor("blk.1.c.weight", [32], 20, 288)
    assert read_card(gguf(tmp_path / "m.gguf", tensors=(eights, seven, row), size=306)).repacked_bytes == (8 * 18, 0)


def test_names_of_types_are_the_formats_own():
    library = pytest.importorskip("gguf")
    for number, name in gguf_file.FILE_TYPES.items():
        assert library.LlamaFileType(number).name.removeprefix("ALL_").removeprefix("MOSTLY_") == name
    for number, name in gguf_file.TENSOR_NAMES.items():
        assert library.GGMLQuantizationType(number).name == name


def test_parts_are_added_up_and_missing_ones_named(tmp_path):
    first, second, third = (tmp_path / f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3))
    known = [string_pair("general.architecture", "llama"), number_pair("llama.block_count", 1)]
    marks = [[pair("split.no", 2, struct.pack("<H", n)), pair("split.count", 2, struct.pack("<H", 3))] for n in range(3)]
    first.write_bytes(build([*known, *marks[0]], [tensor("token_embd.weight", [32, 2], 0, 0)], b"\0" * 256))
    with pytest.raises(ModelError, match=r"m-00002-of-00003\.gguf, m-00003-of-00003\.gguf are missing"):
        read_card(first)
    second.write_bytes(build(marks[1], [tensor("blk.0.attn_k.weight", [32], 0, 0)], b"\0" * 128))
    third.write_bytes(build(marks[2], [tensor("output.weight", [32], 0, 0)], b"\0" * 128))
    found = read_card(first)
    assert found.files == (first.name, second.name, third.name) and found.parameters == 128 and not found.tied
    assert (found.layer_bytes, found.input_bytes, found.output_bytes) == ((128,), 256, 128)
    assert found.size == sum(file.stat().st_size for file in (first, second, third))
    third.write_bytes(build(marks[2], [tensor("output.weight", [32], 0, 0)], b"\0" * 100))
    with pytest.raises(ModelError, match=r"m-00003-of-00003\.gguf is cut short"):
        read_card(first)


@pytest.mark.parametrize(
    ("more", "kind"),
    [([string_pair("general.type", "adapter")], "adapter"), ([string_pair("general.type", "mmproj")], "vision"), ([], "gguf")],
)
def test_kinds(tmp_path, more, kind):
    assert read_card(gguf(tmp_path / "m.gguf", *more)).kind == kind


def test_embedding_models_and_vision_beside(tmp_path):
    assert read_card(gguf(tmp_path / "a.gguf", arch="nomic-bert")).embeds
    (tmp_path / "one").mkdir()
    model = gguf(tmp_path / "one" / "m.gguf")
    assert not read_card(model).vision and not read_card(model).embeds
    (tmp_path / "one" / "mmproj-m.gguf").touch()
    assert read_card(model).vision and read_card(model.parent).files == ("m.gguf",)


def test_numbers_that_cannot_be_are_left_out_or_refused(tmp_path):
    huge = [pair(f"llama.{key}", 10, struct.pack("<Q", 2**64 - 1)) for key in ("context_length", "embedding_length", "attention.head_count_kv")]
    negative = pair("llama.attention.head_count", 5, struct.pack("<i", -4))
    found = read_card(gguf(tmp_path / "m.gguf", *huge, negative, tensors=keys_of(2), size=256))
    assert (found.context_length, found.embedding_size, found.heads, found.cache_width) == (0, 0, 0, (0, 0))
    with pytest.raises(ModelError, match="claims 100000 layers"):
        read_card(gguf(tmp_path / "n.gguf", layers=100_000))


def test_a_template_that_is_too_long_is_none(tmp_path):
    assert read_card(gguf(tmp_path / "m.gguf", string_pair("tokenizer.chat_template", "x" * (card.MAX_TEMPLATE + 1)))).chat_template is None


# --- Hugging Face folders ---------------------------------------------------------------------------------------------------------------


def test_a_folder(tmp_path):
    place = folder(tmp_path)
    (place / "README.md").write_text("---\nlanguage: en\nlicense: mit\nbase_model:\n- some/base\ntags:\n- x\n---\n# Tiny\nlicense: no\n")
    (place / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "other", "template": "o"}, {"name": "default", "template": "d"}]})
    )
    found = read_card(place)
    assert (found.kind, found.family, found.quantisation, found.licence, found.base_model) == ("transformers", "Llama", "BF16", "mit", "some/base")
    assert (found.parameters, found.layers, found.heads, found.kv_heads, found.head_size) == (80 + 32 + 128 + 8, 2, 4, 2, 2)
    assert found.cache_width == (8, 8) and found.layer_bytes == (64, 256) and (found.input_bytes, found.output_bytes) == (160, 32)
    assert found.chat_template == "d" and found.context_length == 256 and found.tied and not found.embeds and not found.vision
    assert found.files == ("model.safetensors",) and found.size == (place / "model.safetensors").stat().st_size
    (place / "chat_template.jinja").write_text("first")
    assert read_card(place).chat_template == "first"


def test_values_inside_text_config_win_and_vision_is_seen(tmp_path):
    config = {"model_type": "llava", "text_config": {**CONFIG, "num_hidden_layers": 3}, "vision_config": {"hidden_size": 99}, "num_hidden_layers": 1}
    found = read_card(folder(tmp_path, config))
    assert (found.layers, found.embedding_size, found.vision) == (3, 8, True)


@pytest.mark.parametrize(
    ("quantised", "kind", "words"),
    [
        ({"quant_method": "exl3", "bits": 4.0}, "exl3", "EXL3 4.0 bpw"),
        ({"quant_method": "exl2", "bits": 3.75}, "exl2", "EXL2 3.8 bpw"),
        ({"quant_method": "gptq", "bits": 4}, "transformers", "GPTQ 4-bit"),
        ({"quant_method": "awq", "bits": 4}, "transformers", "AWQ 4-bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "transformers", "bitsandbytes 4-bit"),
        ({"quant_method": "fp8"}, "transformers", "FP8"),
        ({"quant_method": ["gptq"], "bits": 1e-300}, "transformers", "I32"),
    ],
)
def test_quantised_folders(tmp_path, quantised, kind, words):
    tensors = {"model.layers.0.q_proj.qweight": ("I32", [4, 8], 128), "model.layers.0.q_proj.scales": ("F16", [8], 16)}
    found = read_card(folder(tmp_path, {**CONFIG, "quantization_config": quantised}, tensors))
    assert (found.kind, found.quantisation) == (kind, words)
    if quantised.get("bits") == 4:
        assert found.parameters == 128 * 8 // 4  # the scales are no parameters


def test_windows_of_folders(tmp_path):
    kinds = ["sliding_attention", "full_attention"]
    found = read_card(folder(tmp_path, {**CONFIG, "sliding_window": 64, "layer_types": kinds}))
    assert found.sliding_window == 64 and found.windowed == (True, False)


def test_window_that_is_off_and_linear_layers(tmp_path):
    config = {**CONFIG, "sliding_window": 64, "use_sliding_window": False, "layer_types": ["linear_attention", "full_attention"]}
    found = read_card(folder(tmp_path, config))
    assert found.sliding_window == 0 and found.windowed == () and found.cache_width == (0, 8)


def test_shards_are_listed_by_the_index_and_missing_ones_named(tmp_path):
    place = folder(tmp_path)
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    (place / "model.safetensors").unlink()
    safetensors(place / one, {"model.norm.weight": ("F32", [8], 32)})
    with pytest.raises(ModelError, match=f"{two} is missing"):  # by its name
        read_card(place)
    index = place / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": one, "lm_head.weight": two}}))
    with pytest.raises(ModelError, match=f"{two} is missing"):
        read_card(place)
    safetensors(place / two, {"other.weight": ("F32", [8], 32)})
    with pytest.raises(ModelError, match=r"does not hold the tensor 'lm_head\.weight'"):
        read_card(place)
    safetensors(place / two, {"lm_head.weight": ("F32", [8], 32)})
    found = read_card(place)
    assert found.files == (one, two) and found.parameters == 16 and not found.tied
    for bad in ({"a": "../x.safetensors"}, {"a": "/x.safetensors"}, {"a": 5}, {}, {"a": "x.exe"}, {str(n): f"{n}.safetensors" for n in range(1001)}):
        index.write_text(json.dumps({"weight_map": bad}))
        with pytest.raises(ModelError, match="index"):
            read_card(place)


def test_pickles_are_named_but_not_looked_into(tmp_path):
    place = folder(tmp_path)
    (place / "model.safetensors").unlink()
    (place / "pytorch_model.bin").write_bytes(b"x" * 50)
    found = read_card(place)
    assert (found.files, found.size, found.parameters, found.quantisation, found.output_bytes) == (("pytorch_model.bin",), 50, 0, "BF16", 50)


def test_an_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 8}))
    with pytest.raises(ModelError, match="holds no weights"):
        read_card(tmp_path)
    safetensors(tmp_path / "adapter_model.safetensors", {"a.lora_A.weight": ("F32", [2, 4], 32)})
    found = read_card(tmp_path)
    assert (found.kind, found.base_model, found.parameters, found.quantisation) == ("adapter", "some/base", 8, "F32")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"a":' * 50 + "1" + "}" * 50, '{"a":' * 100_000, '{"a": ' + "9" * 5000 + "}", "\x00", '"' + "x" * (5 << 20) + '"'],
)
def test_a_wrong_config_is_named(tmp_path, text):
    place = folder(tmp_path)
    (place / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_card(place)


@pytest.mark.parametrize("value", [None, True, -1, 1.5, 2**70, "8", [], {}, [[1]]])
def test_any_value_in_any_place_gives_a_card_or_a_named_error(tmp_path, value):
    place = folder(tmp_path)
    others = (
        "text_config",
        "quantization_config",
        "layer_types",
        "sliding_window",
        "auto_map",
        "head_dim",
        "num_local_experts",
        "kv_lora_rank",
        "dtype",
    )
    for key in (*CONFIG, *others):
        (place / "config.json").write_text(json.dumps({**CONFIG, key: value}))
        assert read_card(place).kind == "transformers"


def test_what_is_no_model_is_named(tmp_path):
    (tmp_path / "x.txt").touch()
    for path, words in ((tmp_path / "x.txt", "is no model"), (tmp_path / "y", "There is no file"), (tmp_path, r"no config\.json")):
        with pytest.raises(ModelError, match=words):
            read_card(path)


# --- the card itself, and the families --------------------------------------------------------------------------------------------------


def test_a_card_comes_back_from_its_json(starter_model):
    found = read_card(starter_model)
    assert ModelCard.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    "changed", [{"layers": "2"}, {"layers": True}, {"kind": "other"}, {"windowed": [1]}, {"files": [1]}, {"chat_template": 5}, {"more": 1}]
)
def test_json_that_is_no_card_is_refused(changed):
    values = json.loads(ModelCard("x", "gguf").to_json())
    with pytest.raises(ValueError, match="not a model card"):
        ModelCard.from_json(json.dumps({**values, **changed}))


def test_families_name_what_exists():
    library = pytest.importorskip("gguf.constants")
    known = set(library.MODEL_ARCH_NAMES.values())
    transformers = pytest.importorskip("transformers.models.auto.configuration_auto")
    known |= set(transformers.CONFIG_MAPPING_NAMES)
    rows = json.loads(card.FAMILIES.read_text("utf-8"))
    listed = [architecture for row in rows for architecture in row["architectures"]]
    assert [name for name in listed if name not in known] == [] and len(listed) == len(set(listed))
    assert {row["template"] for row in rows if "template" in row} <= set(SHIPPED)
    assert all(set(row) <= {"name", "architectures", "template", "window_pattern"} for row in rows)
    assert {field.name for field in fields(card.Family)} == {"name", "template", "window_pattern"}
