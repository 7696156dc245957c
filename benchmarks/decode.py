"""Writing speed: tokens/s where `Backend.generate` yields in the server's process, over tokens/s of a bare llama.cpp loop.

    python -m benchmarks.decode [--model FILE] [--tokens 256] [--runs 5] [--threads 0] [--sampler greedy|top_p]

The bare loop (decode, sample, repeat: nothing else) runs in a process of its own, with the same model, prompt, threads and sampler. The
two take turns, one computing at a time. Counted from the first token to the last; medians. At least 0.95 is wanted.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from modules.backends.base import CancelToken, GenerationRequest
from modules.backends.llama_cpp.threads import usable_cores
from modules.samplers import NEUTRAL

PROMPT = "Once upon a time there was a fox who lived at the edge of a large forest. One day the fox"
SEED = 7
MODEL = Path("user_data/models/SmolLM2-135M-Instruct.Q4_1.gguf")


def bare(model: Path, tokens: int, threads: int, sampler: str) -> None:
    """The reference process: for each line on stdin, one run, and its tokens/s on stdout."""
    import ctypes

    import llama_cpp.llama_cpp as lib

    quiet = lib.llama_log_callback(lambda _level, _text, _data: None)
    lib.llama_log_set(quiet, None)
    lib.llama_backend_init()
    loaded = lib.llama_model_load_from_file(str(model).encode(), lib.llama_model_default_params())
    vocabulary = lib.llama_model_get_vocab(loaded)
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = 8192, 512, threads, threads
    context = lib.llama_init_from_model(loaded, params)
    text = PROMPT.encode()
    prompt = (ctypes.c_int32 * 512)()
    length = lib.llama_tokenize(vocabulary, text, len(text), prompt, 512, False, True)
    for _ in sys.stdin:
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        if sampler == "top_p":
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_p(0.95, 1))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(SEED) if sampler == "top_p" else lib.llama_sampler_init_greedy())
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        lib.llama_decode(context, lib.llama_batch_get_one(prompt, length))
        one = (ctypes.c_int32 * 1)()
        times: list[float] = []
        while len(times) < tokens:
            one[0] = lib.llama_sampler_sample(chain, context, -1)
            times.append(time.perf_counter())
            if lib.llama_vocab_is_eog(vocabulary, one[0]):
                break
            lib.llama_decode(context, lib.llama_batch_get_one(one, 1))
        lib.llama_sampler_free(chain)
        print(len(times), (len(times) - 1) / (times[-1] - times[0]), flush=True)


def ours(backend: object, tokens: int, sampler: str) -> tuple[int, float]:
    """Tokens and tokens/s of one run through the backend."""
    sampling = NEUTRAL.replace({"temperature": 0} if sampler == "greedy" else {"top_p": 0.95})
    times = []
    for chunk in backend.generate(GenerationRequest(PROMPT, sampling, max_new_tokens=tokens, seed=SEED)):  # type: ignore[attr-defined]
        times += [time.perf_counter()] * len(chunk.token_ids)
    return len(times), (len(times) - 1) / (times[-1] - times[0])


def main() -> None:
    """Measure and print; exit code 1 below 0.95."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--sampler", choices=("greedy", "top_p"), default="greedy")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    threads = args.threads or usable_cores()
    if args.bare:
        bare(args.model, args.tokens, threads, args.sampler)
        return
    from modules.backends.llama_cpp import LOADER

    command = [sys.executable, "-m", "benchmarks.decode", "--bare", "--model", str(args.model), "--tokens", str(args.tokens)]
    command += ["--threads", str(threads), "--sampler", args.sampler]
    reference = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert reference.stdin and reference.stdout
    backend = LOADER.load(args.model, LOADER.options.build({"threads": threads}), lambda _fraction, _words: None, CancelToken())
    speeds: dict[str, list[float]] = {"bare": [], "ours": []}
    for run in range(args.runs + 1):  # the first one warms up
        print("go", file=reference.stdin, flush=True)
        count, speed = reference.stdout.readline().split()
        mine = ours(backend, args.tokens, args.sampler)
        if run:
            speeds["bare"].append(float(speed))
            speeds["ours"].append(mine[1])
        name = f"run {run}" if run else "warm-up"
        print(f"{name}: bare {float(speed):6.1f} tok/s ({count} tokens), ours {mine[1]:6.1f} tok/s ({mine[0]} tokens)", flush=True)
    reference.stdin.close()
    reference.wait()
    backend.unload()
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratio = medians["ours"] / medians["bare"]
    print(
        f"medians: bare {medians['bare']:.1f}, ours {medians['ours']:.1f} tok/s, {threads} threads, {args.sampler}; ratio {ratio:.3f} (wanted: 0.95)"
    )
    sys.exit(ratio < 0.95)


if __name__ == "__main__":
    main()
