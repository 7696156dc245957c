"""One model through llama.cpp and through Transformers: do they write the same greedy texts, and how near were the candidates where they part?

    python -m benchmarks.two_engines [MODEL.gguf]

Twenty questions, the first 20 tokens of each answer. Transformers computes the dequantised model in float32; llama.cpp the file itself, and then a
float32 GGUF file written from the dequantised model.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.reference_model import QUESTIONS, STARTER, Reference, chat, file_of, folder_of, greedy, llama_cpp
from modules.backends.base import TokenLogprob

TOKENS = 20
TOP = 20
NEAR = 1.0


def parting(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Where two texts, each with its end or of TOKENS tokens, part; None when they do not."""
    for place, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return place
    return None


def in_llama_cpp(entry: TokenLogprob, other: int) -> float:
    """By how much the chosen token's logit is greater than that of `other`; infinite when that one is not among the alternatives."""
    return entry.logprob - next((logprob for token, _, logprob in entry.top if token == other), float("-inf"))


def compare(model: Path, reference: Reference, written: Sequence[tuple[list[int], list[int]]]) -> tuple[int, float]:
    """(texts that agree, largest distance of two candidates where texts part, in either engine); tells about each that parts."""
    same, farthest = 0, 0.0
    with llama_cpp(model) as backend:
        for question, (prompt, theirs) in zip(QUESTIONS, written, strict=True):
            ours, entries = greedy(backend, prompt, TOKENS, TOP)
            if len(ours) < TOKENS:
                ours.append(reference.tokenizer.eos_token_id)  # which Transformers shows
            place = parting(ours, theirs)
            if place is None:
                same += 1
                continue
            mine, other = ours[place], theirs[place]
            after = reference.logprobs([*prompt, *theirs[:place]])[-1]
            here = in_llama_cpp(entries[place], other) if place < len(entries) else float("inf")
            there = float(after[other] - after[mine])
            farthest = max(farthest, here, there)
            print(f"    {question!r} parts at token {place}: candidates {here:.3f} apart in llama.cpp, {there:.3f} in Transformers")
    return same, farthest


def main() -> None:
    """Measure and print."""
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else STARTER
    with tempfile.TemporaryDirectory() as place:
        folder = folder_of(model, Path(place))
        reference = Reference(folder)
        prompts = [reference.encode(chat(question)) for question in QUESTIONS]
        written = [(prompt, reference.greedy(prompt, TOKENS)) for prompt in prompts]
        for what, file, wanted in ((model.name, model, f"candidates nearer than {NEAR}"), ("float32 GGUF", file_of(folder, "F32"), "all agree")):
            same, farthest = compare(file, reference, written)
            print(f"{what}: {same} of {len(QUESTIONS)} agree; candidates {farthest:.3f} apart at most (wanted: {wanted})", flush=True)


if __name__ == "__main__":
    main()
