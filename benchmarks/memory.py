"""The estimate of llama.cpp's memory beside the engine's resident memory, after a prompt that fills the context.

    python -m benchmarks.memory [--model FILE] [--contexts 512,2048,8192] [--cache-types fp16,q8_0] [--fill 1.0]

`--fill`: how much of the context the prompt takes (all of the cache is resident in any case: llama.cpp clears it). Within 10 % is wanted.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from modules.backends.base import Backend, CancelToken, GenerationRequest
from modules.backends.llama_cpp import LOADER
from modules.backends.llama_cpp.options import LlamaCppOptions
from modules.devices import MAIN
from modules.inspect_model import inspect
from modules.memory import devices, estimate, usable
from modules.samplers import NEUTRAL

MODEL = Path("user_data/models/SmolLM2-135M-Instruct.Q4_1.gguf")
NEW_TOKENS = 16
SETTLED_SECONDS = 2.5
"""The engine tells its memory each second."""


def used(backend: Backend, tokens: int) -> int:
    """Resident bytes of the engine after it has read `tokens` tokens and written some."""
    words = backend.encode("One day the fox went into the large forest and saw a river. ")
    prompt = tuple((words * (tokens // len(words) + 1))[: max(tokens, 1)])
    for _ in backend.generate(GenerationRequest(prompt, NEUTRAL, max_new_tokens=NEW_TOKENS, seed=1)):
        pass
    time.sleep(SETTLED_SECONDS)
    return backend.memory()


def main() -> None:
    """Measure and print; exit code 1 where an estimate is off by more than 10 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--contexts", default="512,2048,8192")
    parser.add_argument("--cache-types", default="fp16,q8_0")
    parser.add_argument("--fill", type=float, default=1.0)
    given = parser.parse_args()
    card = inspect(given.model)
    worst = 0.0
    print("context  cache  estimate  measured   error")
    for context in map(int, given.contexts.split(",")):
        for cache_type in given.cache_types.split(","):
            options = LlamaCppOptions().replace({"ctx_size": context, "cache_type": cache_type})
            expected = estimate(card, options, usable(options, devices())).resident(MAIN)
            backend = LOADER.load(given.model, options, lambda *_: None, CancelToken())
            try:
                measured = used(backend, int(given.fill * (context - NEW_TOKENS - 1)))
            finally:
                backend.unload()
            error = 100 * (expected - measured) / measured
            worst = max(worst, abs(error))
            print(f"{context:7}  {cache_type:5}  {expected / 2**20:4.0f} MiB  {measured / 2**20:4.0f} MiB  {error:+5.1f} %", flush=True)
    sys.exit(worst > 10)


if __name__ == "__main__":
    main()
