"""GGUF files to folders: the starter model's weights to the bit, what Transformers reads for us, and what is refused."""

from __future__ import annotations

import io
import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from convert_help import ASKED, byte_level, make_folder, silent, to_file
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from modules.convert.gguf_to_hf import gguf_to_hf
from modules.convert.output import Report
from modules.convert.sources import GgufFile
from modules.errors import ModelError
from modules.gguf import read_header
from tests.backends import tiny_models
from tests.backends.llama_cpp_help import load

NUMBERS = "In 1989 there were 1234567 of 3.14, 12 00 7"


@pytest.fixture(scope="module")
def starter_folder(starter_model, tmp_path_factory):
    target = tmp_path_factory.mktemp("starter") / "folder"
    gguf_to_hf(starter_model, target, "float32", silent(), shard_bytes=200 << 20)
    return target


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A GGUF file of architecture llama, with tied embeddings."""
    return to_file(make_folder(tmp_path_factory.mktemp("tiny") / "tiny", "llama", byte_level("smollm"), tie_word_embeddings=True))


def test_the_starter_model_becomes_a_whole_folder(starter_folder, starter_model):
    names = {path.name for path in starter_folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert sorted(name for name in names if name.endswith(".safetensors")) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    model = AutoModelForCausalLM.from_pretrained(starter_folder)
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    generation = GenerationConfig.from_pretrained(starter_folder)
    assert (generation.bos_token_id, generation.eos_token_id) == (1, 2)
    tokenizer = AutoTokenizer.from_pretrained(starter_folder)
    assert tokenizer.chat_template == read_header(starter_model).chat_template
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    written = model.generate(**prompt, max_new_tokens=7, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(written)


def test_the_starter_model_there_and_back_is_the_dequantised_source_to_the_bit(starter_folder, starter_model):
    source, back = GgufFile(starter_model), GgufFile(to_file(starter_folder))
    assert source.shapes == back.shapes and len(source.shapes) == 272
    for name in source.shapes:
        assert np.array_equal(back.read(name).view(np.uint32), source.read(name).view(np.uint32)), name


@pytest.mark.engine
def test_the_starter_models_tokenizer_is_the_engines(starter_folder, starter_model):
    """Transformers' own conversion does not split digits as this model wants it."""
    tokenizer = AutoTokenizer.from_pretrained(starter_folder)
    backend = load(starter_model)
    try:
        for text in (*ASKED, NUMBERS, "<|im_start|>user\n12<|im_end|>"):
            assert tokenizer(text).input_ids == backend.encode(text)
    finally:
        backend.unload()


@pytest.mark.engine
def test_tokens_that_are_matched_as_a_whole_may_hold_any_characters(tmp_path):
    """Transformers' own conversion takes those with other characters than bytes have to pieces."""
    tokenizer = byte_level("qwen2")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<｜User｜>", "<a b>"]})
    tokenizer.add_tokens(["<思>", "<think>"])
    file = to_file(make_folder(tmp_path / "model", "qwen2", tokenizer, head_dim=16))
    gguf_to_hf(file, tmp_path / "folder", "float32", silent())
    back = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert len(back) == len(tokenizer)
    assert back.decode(back("<｜User｜>a<a b><思>").input_ids, skip_special_tokens=True) == "a<思>"
    backend = load(file)
    try:
        for text in ("<｜User｜>Hello<think>", "1<思> 2", "a<a b>c", "<｜User>"):
            assert back(text).input_ids == backend.encode(text) == tokenizer(text).input_ids
            assert back.decode(back(text).input_ids) == text
    finally:
        backend.unload()


@pytest.mark.parametrize(("dtype", "wanted"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_half_precision_is_rounded_once(tiny, tmp_path, dtype, wanted):
    gguf_to_hf(tiny, tmp_path / "plain", "float32", silent())
    gguf_to_hf(tiny, tmp_path / "half", dtype, silent())
    plain, half = load_file(tmp_path / "plain" / "model.safetensors"), load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(half[name], plain[name].to(wanted)) for name in plain)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == wanted


@pytest.mark.parametrize("make", [tiny_models.short_convolution, tiny_models.sliding_window])
def test_architectures_outside_the_table_go_through_transformers(make, tmp_path):
    target = tmp_path / "folder"
    gguf_to_hf(make(tmp_path / "model.gguf"), target, "float32", silent())
    model = AutoModelForCausalLM.from_pretrained(target)
    source = GgufFile(tmp_path / "model.gguf")
    assert np.array_equal(model.get_input_embeddings().weight.detach().numpy(), source.read("token_embd.weight"))
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    AutoTokenizer.from_pretrained(target)


def test_all_tokens_that_end_a_reply_go_there_and_back(tmp_path):
    gguf_to_hf(tiny_models.dense(tmp_path / "model.gguf"), tmp_path / "folder", "float32", silent())
    ends = [tiny_models.EOS, tiny_models.IM_END]
    assert GenerationConfig.from_pretrained(tmp_path / "folder").eos_token_id == ends
    assert len(AutoTokenizer.from_pretrained(tmp_path / "folder")) == read_header(tmp_path / "model.gguf").lengths["tokenizer.ggml.tokens"]
    back = read_header(to_file(tmp_path / "folder")).metadata
    assert [back[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot")] == ends


def test_a_way_of_splitting_that_is_not_known_is_told(tiny, tmp_path):
    file = copy_with(tiny, tmp_path / "other.gguf", **{"tokenizer.ggml.pre": "poro-chat"})
    said = io.StringIO()
    gguf_to_hf(file, tmp_path / "folder", "float32", Report(said))
    lines = [json.loads(line) for line in said.getvalue().splitlines()]
    assert any("poro-chat" in line.get("warning", "") for line in lines)
    fractions = [line["progress"] for line in lines if "progress" in line]
    assert fractions == sorted(fractions) and len(fractions) > 20 and lines[-1] == {"done": str(tmp_path / "folder")}


def test_a_model_in_several_files_is_the_same(tiny, tmp_path):
    copy_with(tiny, tmp_path / "parts.gguf", in_parts=6)
    parts = sorted(tmp_path.iterdir())
    assert len(parts) > 2 and parts[0].name.startswith("parts-00001-of-")
    for name, file in (("one", tiny), ("several", parts[0])):
        gguf_to_hf(file, tmp_path / name, "float32", silent())
    one, several = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "several"))
    assert one.keys() == several.keys() and all(torch.equal(one[name], several[name]) for name in one)
    parts[-1].unlink()
    with pytest.raises(ModelError, match="missing"):
        gguf_to_hf(parts[0], tmp_path / "folder", "float32", silent())


def copy_with(source, target, drop: str = "", add: str = "", in_parts: int = 0, **changed):
    """A copy of a GGUF file with other metadata, without a tensor, with one more, or in files of so many tensors."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents(), split_max_tensors=in_parts)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            value = changed.pop(key, field.contents())
            writer.add_key_value(key, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for key, value in changed.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT32)
    for tensor in reader.tensors:
        if tensor.name != drop:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    if add:
        writer.add_tensor(add, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"drop": "blk.1.ffn_up.weight"}, "no tensor 'blk.1.ffn_up.weight'"),
        ({"drop": "token_embd.weight"}, "no embeddings"),
        ({"add": "blk.0.attn_sinks.weight"}, "attn_sinks"),
        ({"llama.block_count": 10**9}, "layers"),
        ({"llama.block_count": 3}, "no tensor 'blk.2"),
        ({"llama.embedding_length": 2**31}, "no tensor"),
        ({"llama.attention.head_count": 0}, "cannot be"),
        ({"llama.expert_count": 8}, "experts"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn'"),
        ({"add": "rope_freqs.weight"}, "RoPE frequencies of its own"),
        ({"tokenizer.ggml.model": "rwkv"}, "tokenizer"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name_and_leaves_nothing(tiny, tmp_path, change, words):
    file = copy_with(tiny, tmp_path / "spoilt.gguf", **change)
    with pytest.raises(ModelError, match=words):
        gguf_to_hf(file, tmp_path / "folder", "float32", silent())
    assert [path.name for path in tmp_path.iterdir()] == ["spoilt.gguf"]


def test_files_that_are_cut_or_none_are_refused(tiny, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cut short"):
        gguf_to_hf(cut, tmp_path / "folder", "float32", silent())
    with pytest.raises(ModelError, match=r"The tokenizer of lora\.gguf cannot be read"):
        gguf_to_hf(tiny_models.lora(tmp_path / "lora.gguf", tiny), tmp_path / "folder", "float32", silent())
    assert not (tmp_path / "folder").exists()


def test_a_folder_that_exists_is_replaced_as_a_whole(tiny, tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old.txt").write_text("old")
    gguf_to_hf(tiny, target, "float32", silent(), force=True)
    assert not (target / "old.txt").exists() and (target / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_a_killed_conversion_left_is_no_hindrance(tiny, tmp_path):
    left = tmp_path / ".folder.part"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    gguf_to_hf(tiny, tmp_path / "folder", "float32", silent())
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    shutil.rmtree(tmp_path / "folder")
