"""Folders to GGUF files: what llama.cpp computes from the file is what Transformers computes from the folder."""

from __future__ import annotations

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from convert_help import ASKED, SAMPLE, TEMPLATE, byte_level, edit_json, logprobs, make_folder, sentencepiece, silent, to_file
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from modules.backends.base import GenerationRequest
from modules.convert import output
from modules.convert.architectures import rope_factors
from modules.convert.gguf_to_hf import gguf_to_hf
from modules.convert.hf_to_gguf import hf_to_gguf, packed
from modules.convert.sources import GgufFile
from modules.errors import DataError, ModelError
from modules.gguf import read_header
from tests.backends.llama_cpp_help import GREEDY, load, of_prompt

LLAMA_3_1 = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3_1 |= {"original_max_position_embeddings": 8192}
KINDS = {
    "llama": ("llama", lambda: byte_level("smollm"), {"tie_word_embeddings": True}),
    "biased llama": (
        "llama",
        lambda: byte_level("gpt-2"),
        {"attention_bias": True, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama 3": ("llama", lambda: byte_level("llama-bpe", add_bos=True), {"rope_parameters": LLAMA_3_1}),
    "mistral": ("mistral", lambda: byte_level("tekken", add_bos=True), {"sliding_window": None}),
    "llama 2": ("llama", sentencepiece, {"head_dim": 16, "num_key_value_heads": 4}),
    "qwen2": ("qwen2", lambda: byte_level("qwen2"), {"head_dim": 16}),
    "qwen3": ("qwen3", lambda: byte_level("qwen2"), {"tie_word_embeddings": True}),
    "gemma": ("gemma", sentencepiece, {}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("folders")
    made = {}

    def get(name: str):
        if name not in made:
            model_type, tokenizer, values = KINDS[name]
            path = place / name.replace(" ", "-")
            made[name] = make_folder(path, model_type, tokenizer(), **values), to_file_once(path)
        return made[name]

    return get


def to_file_once(path):
    return path.parent / f"{path.name}-F32.gguf"


@pytest.fixture
def copied(folders, tmp_path):
    """A folder of architecture llama that a test may spoil."""
    return shutil.copytree(folders("llama")[0], tmp_path / "model")


@pytest.mark.engine
@pytest.mark.parametrize("name", KINDS)
def test_llama_cpp_computes_and_tokenises_as_transformers(folders, name):
    from transformers import AutoTokenizer

    folder, file = folders(name)
    hf_to_gguf(folder, file, "F32", silent(), force=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    backend = load(file, flash_attn="off")
    try:
        assert backend.chat_template == TEMPLATE and (backend.bos_token, backend.eos_token) == ("<s>", "</s>")
        for text in ASKED:
            assert backend.encode(text, add_bos=True) == tokenizer(text).input_ids or text == ""
        tokens = tokenizer(SAMPLE).input_ids
        found = of_prompt(backend.generate(GenerationRequest(tuple(tokens), GREEDY, 1, prompt_logprobs=5)))
    finally:
        backend.unload()
    wanted = logprobs(folder, tokens)
    assert len(found) == len(tokens) - 1
    apart = [abs(logprob - wanted[place, token]) for place, entry in enumerate(found) for token, _, logprob in entry.top]
    assert np.mean(apart) < 0.02 and max(apart) < 0.3, (np.mean(apart), max(apart))  # the cache is in 16 bits; another order of rows: 1 and more


@pytest.mark.parametrize("name", [name for name in KINDS if name != "gemma"])
def test_there_and_back_keeps_every_bit_and_the_configuration(folders, name, tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    folder, file = folders(name)
    hf_to_gguf(folder, file, "F32", silent(), force=True)
    back = tmp_path / "back"
    gguf_to_hf(file, back, "float32", silent())
    before, after = load_file(folder / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    one, other = AutoConfig.from_pretrained(folder), AutoConfig.from_pretrained(back)
    names = ("hidden_size", "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings", "eos_token_id", "bos_token_id")
    assert [getattr(one, key, None) or 16 for key in names] == [getattr(other, key, None) or 16 for key in names]
    assert one.rms_norm_eps == pytest.approx(other.rms_norm_eps)
    assert {key: pytest.approx(value) for key, value in one.rope_parameters.items()} == other.rope_parameters
    ours, theirs = AutoTokenizer.from_pretrained(back), AutoTokenizer.from_pretrained(folder)
    assert [ours(text).input_ids for text in ASKED if text.strip()] == [theirs(text).input_ids for text in ASKED if text.strip()]
    assert ours.chat_template == TEMPLATE


@pytest.mark.parametrize(("head", "base", "factor"), [(128, 500_000.0, 8.0), (64, 500_000.0, 32.0)])
def test_the_frequencies_of_llama_3_are_transformers_own(head, base, factor):
    config = LlamaConfig(hidden_size=2 * head, num_attention_heads=2, rope_parameters={**LLAMA_3_1, "rope_theta": base, "factor": factor})
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = base ** (-np.arange(0, head, 2) / head)
    factors = rope_factors(config)
    assert factors is not None and factors.max() == factor and factors.min() == 1
    np.testing.assert_allclose(plain / factors, wanted.numpy(), rtol=1e-5)


def test_f16_is_rounded_and_q8_0_is_what_the_package_packs(folders, tmp_path):
    folder, _ = folders("llama")
    plain, half, packed8 = (GgufFile(to_file(folder, kind, f"again-{kind}.gguf")) for kind in ("F32", "F16", "Q8_0"))
    for name, shape in plain.shapes.items():
        values = plain.read(name)
        rounded = values.astype(np.float16).astype(np.float32) if len(shape) > 1 else values
        assert np.array_equal(half.read(name), rounded)
        assert np.abs(packed8.read(name) - values).max() <= (np.abs(values).max() / 127 if len(shape) > 1 else 0)
    assert [read_header(file.path).metadata["general.file_type"] for file in (plain, half, packed8)] == [0, 1, 7]


def test_rows_that_q8_0_cannot_pack_are_f16(tmp_path):
    folder = make_folder(tmp_path / "odd", "llama", byte_level("gpt-2"), intermediate_size=40)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(to_file(folder, "Q8_0")).tensors}
    assert (types["blk.0.ffn_down.weight"], types["blk.0.ffn_up.weight"], types["blk.0.attn_norm.weight"]) == ("F16", "Q8_0", "F32")


def test_tokens_that_the_embeddings_have_more_of_are_filled_up(tmp_path):
    tokenizer = byte_level("gpt-2")
    folder = make_folder(tmp_path / "padded", "llama", tokenizer, vocab_size=len(tokenizer) + 12)
    reader = gguf.GGUFReader(to_file(folder))
    assert reader.fields["tokenizer.ggml.tokens"].contents()[-1] == f"[PAD{len(tokenizer) + 11}]"
    assert reader.fields["tokenizer.ggml.token_type"].contents()[-1] == gguf.TokenType.UNUSED


def spoil(kind: str, folder) -> None:
    config, weights, tokenizer = folder / "config.json", folder / "model.safetensors", folder / "tokenizer.json"
    if kind == "type":
        edit_json(config, model_type="bert")
    elif kind == "quantised":
        edit_json(config, quantization_config={"quant_method": "gptq"})
    elif kind == "yarn":
        edit_json(config, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128})
    elif kind == "activation":
        edit_json(config, hidden_act="relu")
    elif kind == "not json":
        config.write_text("{")
    elif kind == "heads":
        edit_json(config, num_attention_heads=0)
    elif kind == "pickles":
        weights.rename(folder / "pytorch_model.bin")
    elif kind == "index":
        edit_index(folder, "../../model.safetensors")
    elif kind == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif kind == "tensor":
        save_file({**load_file(weights), "model.layers.0.self_attn.sinks": torch.ones(4)}, weights, {"format": "pt"})
    elif kind == "numbers":
        save_file({**load_file(weights), "model.norm.weight": torch.full((64,), float("nan"))}, weights, {"format": "pt"})
    elif kind == "splitting":
        edit_json(tokenizer, pre_tokenizer={"type": "Whitespace"})
    elif kind == "missing":
        save_file({name: values for name, values in load_file(weights).items() if "1.mlp.up" not in name}, weights, {"format": "pt"})
    elif kind == "more tokens":
        edit_json(config, vocab_size=100)
        save_file({**load_file(weights), "model.embed_tokens.weight": torch.ones(100, 64)}, weights, {"format": "pt"})
    elif kind == "tokens":
        save_file({**load_file(weights), "model.embed_tokens.weight": torch.ones(100, 64)}, weights, {"format": "pt"})


def edit_index(folder, name: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("type", "'?bert'? cannot be converted here; these can: llama, mistral, qwen2, qwen3, gemma"),
        ("quantised", "is quantised"),
        ("yarn", "'yarn'"),
        ("activation", "'relu'"),
        ("not json", "is not JSON"),
        ("heads", "config.json cannot be used"),
        ("pickles", "no .safetensors files"),
        ("index", "outside its folder"),
        ("cut", "Cannot read model.safetensors"),
        ("tensor", "sinks' has no place"),
        ("numbers", "no numbers"),
        ("splitting", "splits text in a way that is not known here"),
        ("tokens", r"no tensor 'model.embed_tokens.weight' of shape"),
        ("more tokens", "do not belong together"),
        ("missing", r"no tensor 'model.layers.1.mlp.up_proj.weight'"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name_and_leaves_nothing(copied, kind, words):
    spoil(kind, copied)
    with pytest.raises(ModelError, match=words):
        to_file(copied)
    assert [path.name for path in copied.parent.iterdir()] == ["model"]


def test_numbers_too_large_for_f16_are_refused():
    values = np.full((2, 32), 70_000, np.float32)
    with pytest.raises(ModelError, match="too large for F16"):
        packed(values, "F16", "blk.0.ffn_up.weight")
    assert np.array_equal(packed(values, "F32", "blk.0.ffn_up.weight"), values)


def test_what_exists_is_kept_unless_forced(copied):
    target = copied.parent / "model-F32.gguf"
    target.write_text("mine")
    with pytest.raises(DataError, match="exists"):
        to_file(copied)
    edit_json(copied / "config.json", hidden_act="relu")
    with pytest.raises(ModelError):
        hf_to_gguf(copied, target, "F32", silent(), force=True)
    assert target.read_text() == "mine"
    edit_json(copied / "config.json", hidden_act="silu")
    hf_to_gguf(copied, target, "F32", silent(), force=True)
    assert read_header(target).architecture == "llama"
    assert sorted(path.name for path in copied.parent.iterdir()) == ["model", "model-F32.gguf"]


def test_the_disk_is_asked_before(copied, monkeypatch):
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1 << 20))
    with pytest.raises(DataError, match="free"):
        to_file(copied)
    assert [path.name for path in copied.parent.iterdir()] == ["model"]
