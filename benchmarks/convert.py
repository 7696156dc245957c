"""What conversions keep: tensors to the bit, logits and greedy texts in both engines, and what a LoRA adapter changes.

    python -m benchmarks.convert [MODEL.gguf]

The model becomes a float32 folder, and the folder an F32 and an F16 file. Tensors are compared with the model's own, dequantised; the F16 file in
llama.cpp with the folder in Transformers (float32): log-probabilities of each text's own tokens and of 20 alternatives at each place, and greedy
texts of 50 tokens. An adapter with random numbers (rank 8, on all linear layers) is put on both, and what it changes is compared.
"""

from __future__ import annotations

import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.reference_model import QUESTIONS, STARTER, TEXTS, Reference, chat, file_of, folder_of, greedy, llama_cpp, prompt_logprobs
from modules.backends.base import Adapter, GenerationRequest
from modules.convert.lora_to_gguf import lora_to_gguf
from modules.convert.output import Report
from modules.convert.sources import GgufFile
from modules.samplers import NEUTRAL

TOKENS, TOP = 50, 20


def tensors(model: Path, converted: Path, dtype: type) -> tuple[int, int]:
    """(tensors, those that are the bits of the model's own, rounded to `dtype` where they are matrices)."""
    source, target = GgufFile(model), GgufFile(converted)
    same = 0
    for name in source.shapes:
        wanted = source.read(name)
        wanted = wanted.astype(dtype).astype(np.float32) if wanted.ndim > 1 else wanted
        same += np.array_equal(wanted.view(np.uint32), target.read(name).view(np.uint32))
    return len({*source.shapes, *target.shapes}), same


def logits(model: Path, reference: Reference) -> tuple[float, float]:
    """(mean, largest) |difference| of log-probabilities."""
    found: list[float] = []
    with llama_cpp(model) as backend:
        for text in TEXTS:
            tokens = reference.encode(text)
            theirs = reference.logprobs(tokens)
            for place, entry in enumerate(prompt_logprobs(backend, tokens, TOP)):
                ours = {entry.token: entry.logprob, **{token: logprob for token, _, logprob in entry.top}}
                found += [abs(logprob - float(theirs[place, token])) for token, logprob in ours.items()]
    return statistics.mean(found), max(found)


def texts(model: Path, reference: Reference) -> int:
    """How many greedy texts are the same."""
    same = 0
    with llama_cpp(model) as backend:
        for question in QUESTIONS:
            prompt = reference.encode(chat(question))
            theirs = [token for token in reference.greedy(prompt, TOKENS) if token != reference.tokenizer.eos_token_id]
            same += greedy(backend, prompt, TOKENS)[0] == theirs
    return same


def adapter_of(folder: Path, reference: Reference) -> Path:
    """A PEFT adapter beside `folder` with random numbers."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(reference.model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.02)
    adapted.save_pretrained(str(folder.parent / "adapter"))
    reference.model = adapted
    return folder.parent / "adapter"


def own(reference: Reference) -> np.ndarray:
    """Log-probabilities of the texts' own tokens in Transformers."""
    every = [reference.encode(text) for text in TEXTS]
    return np.concatenate([reference.logprobs(tokens)[range(len(tokens) - 1), tokens[1:]].numpy() for tokens in every])


def change(file: Path, folder: Path, reference: Reference) -> tuple[float, float]:
    """(mean |change| by the adapter, |change in llama.cpp − change in Transformers| over the change, as lengths)."""
    before = own(reference)
    adapter = adapter_of(folder, reference)
    theirs = own(reference) - before
    target = folder.parent / "adapter.gguf"
    lora_to_gguf(adapter, target, folder, Report(io.StringIO()))
    found = []
    with llama_cpp(file) as backend:
        for text in TEXTS:
            pair = []
            for adapters in ((), (Adapter(target),)):
                request = GenerationRequest(tuple(reference.encode(text)), NEUTRAL, 1, prompt_logprobs=1, adapters=adapters)
                pair.append(np.array([entry.logprob for chunk in backend.generate(request) for entry in chunk.prompt_logprobs]))
            found.append(pair[1] - pair[0])
    ours = np.concatenate(found)
    return float(np.abs(theirs).mean()), float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def main() -> None:
    """Measure and print."""
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else STARTER
    with tempfile.TemporaryDirectory() as place:
        began = time.perf_counter()
        folder = folder_of(model, Path(place))
        print(f"to a float32 folder: {time.perf_counter() - began:.1f} s")
        began = time.perf_counter()
        plain, half = file_of(folder, "F32"), file_of(folder, "F16")
        print(f"to an F32 and an F16 file: {time.perf_counter() - began:.1f} s")
        for what, file, dtype in (("F32", plain, np.float32), ("F16", half, np.float16)):
            count, same = tensors(model, file, dtype)
            print(f"{what}: {same} of {count} tensors to the bit (wanted all)", flush=True)
        reference = Reference(folder)
        mean, largest = logits(half, reference)
        print(f"F16 file beside the folder: mean |difference| of log-probabilities {mean:.5f}, largest {largest:.4f} (wanted <= 0.02)", flush=True)
        print(f"greedy texts of {TOKENS} tokens: {texts(half, reference)} of {len(QUESTIONS)} the same (wanted >= 18)", flush=True)
        mean, apart = change(plain, folder, reference)
        print(f"adapter: changes log-probabilities by {mean:.3f} in the mean; the two changes are {100 * apart:.2f} % apart (wanted <= 5 %)")


if __name__ == "__main__":
    main()
