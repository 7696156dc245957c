"""What the tests of conversions share: folders of tiny models with random weights, tokenizers for them, and reading what came of a conversion."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from modules.convert.hf_to_gguf import Kind, hf_to_gguf
from modules.convert.output import Report

TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
SAMPLE = (
    "In 1989 there were 1234567 of them, and they don't say why. I'LL go; we've been to 12 places -- HeLLo WORLD, naïve café!\n\n\n"
    "  if x == 10:\n\t\treturn  'yes'   # three  spaces\n It's 3.14159, isn't it? Привет, мир! 漢字 🙂 a/b//c\n"
)
ASKED = (
    SAMPLE,
    "1234567 89 0",
    "they don't, I'LL, we've",
    "  two\n\n\n three   \t x",
    "Привет 漢字 🙂 naïve CAFÉ HeLLo",
    "if x<|end|>then</s>so",
    "",
    " ",
    "a",
)
"""Texts in which every way of splitting shows."""

_FAST = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>", "chat_template": TEMPLATE}
_GPT2 = {"first": None, "regex": True}
_DIGITS = {"first": pre_tokenizers.Digits(individual_digits=True), "regex": True}


def _split(expression: str) -> dict[str, Any]:
    return {"first": pre_tokenizers.Split(Regex(expression), behavior="isolated"), "regex": False}


SPLITTINGS = {
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "llama-bpe": _split(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "qwen2": _split(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
    "tekken": _split(
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""How these tokenizers split, as their tokenizer.json files say it."""


def byte_level(name: str, add_bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits as `name` does, trained on unsplit text: wherever it does not split, pieces are merged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", "<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([*SAMPLE.split("\n"), SAMPLE], trainer)
    first, last = SPLITTINGS[name]["first"], pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=SPLITTINGS[name]["regex"])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, last]) if first else last
    tokenizer.model.ignore_merges = name in ("llama-bpe", "tekken")
    tokenizer.decoder = decoders.ByteLevel()
    if add_bos:
        _add_bos(tokenizer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_FAST)


def sentencepiece() -> PreTrainedTokenizerFast:
    """BPE over whole text with a space before it and bytes for what it does not know, as Llama 2 has it."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(SAMPLE.replace("🙂", "").split("\n"), trainers.BpeTrainer(vocab_size=200, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(state["vocab"], key=state["vocab"].get)]
    model = models.BPE(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=[tuple(merge) for merge in state["merges"]],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    _add_bos(tokenizer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_FAST)


def _add_bos(tokenizer: Tokenizer) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])


def make_folder(path: Path, model_type: str, tokenizer: PreTrainedTokenizerFast, **values: Any) -> Path:
    """A folder of a model with 2 layers whose logits depend on everything before, and on where it stands."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    values = {
        **sizes,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        **values,
    }
    config = AutoConfig.for_model(model_type, **values)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=0.3 if "proj" in name else 0.5)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def silent() -> Report:
    return Report(io.StringIO())


def to_file(folder: Path, kind: Kind = "F32", name: str = "") -> Path:
    target = folder.parent / (name or f"{folder.name}-{kind}.gguf")
    hf_to_gguf(folder, target, kind, silent())
    return target


def logprobs(folder: Path, tokens: list[int], model: Any = None) -> np.ndarray:
    """Of what comes after each token, in Transformers (tokens, vocabulary)."""
    model = model or AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: np.ndarray = torch.log_softmax(model(torch.tensor([tokens])).logits[0], -1).numpy()
    return found


def edit_json(path: Path, **values: Any) -> None:
    """Change values of a JSON object in a file; None takes one out."""
    found = {**json.loads(path.read_text("utf-8")), **values}
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}), "utf-8")
