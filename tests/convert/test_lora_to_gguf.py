"""PEFT adapters to GGUF adapters: they change in llama.cpp what they change in Transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from convert_help import SAMPLE, byte_level, edit_json, logprobs, make_folder, silent, to_file
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modules.backends.base import Adapter, GenerationRequest
from modules.convert.lora_to_gguf import lora_to_gguf
from modules.errors import ModelError
from tests.backends.llama_cpp_help import GREEDY, load, of_prompt

ADAPTERS = {
    "llama, all matrices": ("llama", {"target_modules": "all-linear"}),
    "llama, of several strengths": (
        "llama",
        {"target_modules": ["q_proj", "k_proj", "up_proj"], "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 20}},
    ),
    "qwen3, rank stabilised": ("qwen3", {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True}),
}


def adapt(base, target, **settings):
    """An adapter with random numbers in `target`, and the model with it."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.15)
    model.save_pretrained(target)
    return model


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    place = tmp_path_factory.mktemp("bases")
    return {kind: make_folder(place / kind, kind, byte_level("qwen2")) for kind in ("llama", "qwen3")}


@pytest.fixture
def adapter(bases, tmp_path):
    adapt(bases["llama"], tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    return tmp_path / "adapter"


@pytest.mark.engine
@pytest.mark.parametrize("name", ADAPTERS)
def test_llama_cpp_changes_as_transformers_does(bases, tmp_path, name):
    kind, settings = ADAPTERS[name]
    base, file = bases[kind], to_file(bases[kind], name=f"{name[:14]}.gguf")
    model = adapt(base, tmp_path / "adapter", **settings)
    lora_to_gguf(tmp_path / "adapter", tmp_path / "adapter.gguf", file, silent())
    tokens = AutoTokenizer.from_pretrained(base)(SAMPLE).input_ids
    places = range(len(tokens) - 1), tokens[1:]
    theirs = (logprobs(base, tokens, model) - logprobs(base, tokens))[places]
    backend = load(file, flash_attn="off")
    try:
        before, after = (
            np.array(
                [
                    entry.logprob
                    for entry in of_prompt(backend.generate(GenerationRequest(tuple(tokens), GREEDY, 1, prompt_logprobs=1, adapters=some)))
                ]
            )
            for some in ((), (Adapter(tmp_path / "adapter.gguf"),))
        )
    finally:
        backend.unload()
    assert np.abs(theirs).mean() > 0.5
    assert np.linalg.norm(after - before - theirs) / np.linalg.norm(theirs) < 0.05


def test_folder_file_and_the_adapters_own_name_are_the_same_base(bases, adapter, tmp_path):
    bytes_of = []
    for base in (bases["llama"], to_file(bases["llama"], "Q8_0"), None):
        lora_to_gguf(adapter, tmp_path / "adapter.gguf", base, silent(), force=True)
        bytes_of.append((tmp_path / "adapter.gguf").read_bytes())
    assert bytes_of[0] == bytes_of[1] == bytes_of[2]


def change_weights(adapter, change) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def renamed(weights, old: str, new: str):
    return {name.replace(old, new): values for name, values in weights.items()}


@pytest.mark.parametrize(
    ("settings", "change", "words"),
    [
        ({"peft_type": "LOHA"}, None, "'LOHA'"),
        ({"use_dora": True}, None, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, None, "modules_to_save"),
        ({"base_model_name_or_path": "somebody/model"}, None, "--base"),
        ({}, lambda weights: renamed(weights, "q_proj.lora_A", "q_proj.lora_magnitude"), "cannot hold"),
        ({}, lambda weights: renamed(weights, "layers.1.", "layers.7."), "no such matrix"),
        ({}, lambda weights: {name: values for name, values in weights.items() if "q_proj.lora_B" not in name}, "incomplete"),
        ({}, lambda weights: {name: values[:, :-1].clone() if "lora_A" in name else values for name, values in weights.items()}, "does not fit"),
        ({}, lambda weights: {"base_model.model.a": torch.ones(1)}, "cannot hold"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_leaves_nothing(adapter, settings, change, words):
    edit_json(adapter / "adapter_config.json", **settings)
    if change:
        change_weights(adapter, change)
    with pytest.raises(ModelError, match=words):
        lora_to_gguf(adapter, adapter.parent / "adapter.gguf", None, silent())
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]


def test_an_adapter_of_another_architecture_is_refused(bases, tmp_path):
    adapt(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    other = make_folder(tmp_path / "other", "llama", byte_level("gpt-2"), num_attention_heads=2)
    with pytest.raises(ModelError, match=r"does not fit other: .* 128 × 64 and the model 64 × 64"):
        lora_to_gguf(tmp_path / "adapter", tmp_path / "adapter.gguf", other, silent())
