"""What the tests of the Transformers loader share: tiny models with random weights, made here, and a tokenizer of bytes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from modules.backends.base import CancelToken, Chunk, GenerationRequest
from modules.backends.transformers import LOADER
from modules.backends.transformers.backend import TransformersBackend
from modules.samplers import NEUTRAL

SPECIAL = ["<s>", "</s>", "<|user|>", "<image>"]
VOCABULARY = 256 + len(SPECIAL)
TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.4,  # far apart, so that the best token is clear
}
GREEDY = NEUTRAL.replace({"temperature": 0, "add_bos_token": False})
ENDLESS = GREEDY.replace({"ban_eos_token": True})


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after the special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={text: number for number, text in enumerate([*SPECIAL, *letters])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", extra_special_tokens=SPECIAL[2:])
    made.chat_template = TEMPLATE
    return made


def save(model: PreTrainedModel, folder: Path) -> Path:
    """A model's folder as it is published."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})).eval()


def load(folder: Path, **values) -> TransformersBackend:
    options = LOADER.options.build({"ctx_size": 256, **values})
    backend = LOADER.load(folder, options, lambda _fraction, _words: None, CancelToken())
    assert isinstance(backend, TransformersBackend)
    return backend


def request(prompt: str | tuple[int, ...] = "Hello, you", **values) -> GenerationRequest:
    return GenerationRequest(prompt, values.pop("sampling", ENDLESS), **{"max_new_tokens": 12, **values})


def run(backend: TransformersBackend, prompt: str | tuple[int, ...] = "Hello, you", **values) -> list[Chunk]:
    return list(backend.generate(request(prompt, **values)))


def tokens_of(chunks: list[Chunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def library_greedy(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """What transformers' own `generate` writes."""
    asked = torch.tensor([prompt])
    found = model.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=count, do_sample=False, suppress_tokens=[1], pad_token_id=1)
    return found[0, len(prompt) :].tolist()


def library_logprobs(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities after each of `tokens`, by the library's own forward pass."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens])).logits[0].float().log_softmax(-1)


def lora(model: PreTrainedModel, folder: Path, seed: int, **changes) -> Path:
    """A LoRA adapter for `model`, with random weights, as PEFT saves it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    made = get_peft_model(
        model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **changes})
    )
    made.save_pretrained(str(folder))
    made.unload()
    return folder


def change_json(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **values}), "utf-8")
