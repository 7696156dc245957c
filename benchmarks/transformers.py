"""The Transformers loader beside the library's own `generate`, in one process, with the same weights, taking turns; medians.

    python -m benchmarks.transformers [--model PATH] [--tokens 64] [--runs 3] [--clients 8] [--sampler greedy|top_p]

Wanted: one client at least 1.0 of plain `generate`; eight at once, together, at least 2.0 of plain `generate` for one; time to the first
token of the second turn of a chat of 1,000 tokens at most 0.2 of that turn without the cache.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

from modules.backends.base import CancelToken, GenerationRequest
from modules.samplers import NEUTRAL

PROMPT = "Once upon a time there was a fox who lived at the edge of a large forest. One day the fox"
MODEL = Path("user_data/models/SmolLM2-135M-Instruct.Q4_1.gguf")
SEED = 7


def plain_copy(model: Any) -> Any:
    """The same weights in a model that only the library touches."""
    import torch

    config = copy.deepcopy(model.config)
    config._attn_implementation = "sdpa"
    made = type(model)(config).to(model.dtype)
    made.load_state_dict(model.state_dict(), assign=True)
    made.generation_config = copy.deepcopy(model.generation_config)
    with torch.inference_mode():
        return made.to(model.device).eval()


def plain(model: Any, prompt: list[int], tokens: int, sampler: str) -> tuple[float, list[int]]:
    """Seconds of `generate` for exactly `tokens` new tokens, and these."""
    import torch

    asked = torch.tensor([prompt], device=model.device)
    values: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0} if sampler == "top_p" else {"do_sample": False}
    torch.manual_seed(SEED)
    began = time.perf_counter()
    found = model.generate(asked, attention_mask=torch.ones_like(asked), min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0, **values)
    return time.perf_counter() - began, found[0, len(prompt) :].tolist()


def ours(backend: Any, prompt: list[int], tokens: int, sampler: str, seed: int = SEED) -> tuple[float, float, list[int]]:
    """Seconds to the first token, and of the whole reply of exactly `tokens`, and these."""
    sampling = NEUTRAL.replace({"ban_eos_token": True, **({"temperature": 0} if sampler == "greedy" else {"top_p": 0.95})})
    began, first = time.perf_counter(), 0.0
    done: list[int] = []
    for chunk in backend.generate(GenerationRequest(tuple(prompt), sampling, max_new_tokens=tokens, seed=seed)):
        if chunk.token_ids and not first:
            first = time.perf_counter() - began
        done += chunk.token_ids
    assert len(done) == tokens, f"{len(done)} tokens came"
    return first, time.perf_counter() - began, done


def together(backend: Any, prompts: list[list[int]], tokens: int, sampler: str) -> float:
    """Seconds until all of `prompts`, asked at once, have `tokens` new tokens each."""
    threads = [threading.Thread(target=ours, args=(backend, prompt, tokens, sampler, seed)) for seed, prompt in enumerate(prompts)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


def second_turn(backend: Any, run: int) -> tuple[float, float]:
    """Seconds to the first token of a second turn: with the first one in the cache, and of the same length without."""
    chats = [
        backend.encode(f"Chat {run} {name}. " + f"The {name} of {run} is long and has many words in it. " * 100)[:1000] for name in ("warm", "cold")
    ]
    for token in range(16):  # a reply and the next question, the same for both
        chats = [[*chat, 100 + token] for chat in chats]
    ours(backend, chats[0][:1000], 1, "greedy")
    return ours(backend, chats[0], 1, "greedy")[0], ours(backend, chats[1], 1, "greedy")[0]


def main() -> None:
    """Measure and print; exit code 1 when something is below what is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--sampler", choices=("greedy", "top_p"), default="greedy")
    args = parser.parse_args()
    from modules.backends.transformers import LOADER

    options = LOADER.options.build({"parallel": args.clients, "ctx_size": 2048, "kept_tokens": 8192})
    backend: Any = LOADER.load(args.model, options, lambda _fraction, _words: None, CancelToken())
    library = plain_copy(backend._model)
    prompt = backend.encode(PROMPT)
    prompts = [backend.encode(f"{PROMPT} {number}") for number in range(args.clients)]
    speeds: dict[str, list[float]] = {"plain": [], "one": [], "many": []}
    turns: dict[str, list[float]] = {"warm": [], "cold": []}
    for run in range(args.runs + 1):  # the first one warms up
        seconds, wanted = plain(library, prompt, args.tokens, args.sampler)
        _, own, found = ours(backend, prompt, args.tokens, args.sampler)
        if args.sampler == "greedy" and found != wanted:
            print("The two wrote different tokens.")
        times = {
            "plain": args.tokens / seconds,
            "one": args.tokens / own,
            "many": args.tokens * args.clients / together(backend, prompts, args.tokens, args.sampler),
        }
        warm, cold = second_turn(backend, run)
        if run:
            for name, value in times.items():
                speeds[name].append(value)
            turns["warm"].append(warm)
            turns["cold"].append(cold)
        shown = ", ".join(f"{name} {value:6.1f} tok/s" for name, value in times.items())
        print(f"{f'run {run}' if run else 'warm-up'}: {shown}; first token of a second turn {warm:.3f} s, without the cache {cold:.3f} s", flush=True)
    backend.unload()
    fast = {name: statistics.median(values) for name, values in speeds.items()}
    turn = {name: statistics.median(values) for name, values in turns.items()}
    one, many, again = fast["one"] / fast["plain"], fast["many"] / fast["plain"], turn["warm"] / turn["cold"]
    print(f"medians, {args.sampler}: plain {fast['plain']:.1f}, one {fast['one']:.1f}, {args.clients} together {fast['many']:.1f} tok/s")
    print(f"one/plain {one:.2f} (wanted: 1.0), together/plain {many:.2f} (wanted: 2.0), second turn {again:.3f} (wanted: 0.2 at most)")
    sys.exit(one < 1.0 or many < 2.0 or again > 0.2)


if __name__ == "__main__":
    main()
