"""The bare loop, a process of its own: decode, sample, repeat, for one sequence or several in a batch, and nothing else.

    python -m benchmarks.engine.bare MODEL THREADS CONTEXT SEQUENCES

For each line of JSON on stdin one line on stdout. {"do": "write", "prompts": [[ids]], "tokens": n, "ban_eos": true, "piece": 512} computes the
prompts one after the other, at most so many tokens at once, and then writes greedily, one token of each in every decoding:
{"began": t, "times": [[t]], "tokens": [[ids]]}, with the clock of `time.perf_counter`, which all processes of a machine share.
{"do": "logits", "prompt": [ids], "written": [ids], "of": [ids]} computes the same way and gives the next token's logits of some ids.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp.llama_cpp as lib

BATCH = 512


class Loop:
    """A model, a context and a batch."""

    def __init__(self, model: str, threads: int, cells: int, sequences: int) -> None:
        lib.llama_backend_init()
        loaded = lib.llama_model_load_from_file(model.encode(), lib.llama_model_default_params())
        self.vocabulary = lib.llama_model_get_vocab(loaded)
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max, params.kv_unified = cells, BATCH, sequences, True
        params.n_threads = params.n_threads_batch = threads
        self.context = lib.llama_init_from_model(loaded, params)
        self.memory = lib.llama_get_memory(self.context)
        self.batch = lib.llama_batch_init(BATCH, 0, 1)
        self.size = int(lib.llama_vocab_n_tokens(self.vocabulary))

    def read(self, sequence: int, prompt: Sequence[int], piece: int = BATCH) -> None:
        """Compute a prompt, `piece` tokens at once; the logits after its last token are output −1."""
        batch = self.batch
        for start in range(0, len(prompt), piece):
            tokens = prompt[start : start + piece]
            batch.n_tokens = len(tokens)
            for place, token in enumerate(tokens):
                self._put(place, token, start + place, sequence, start + place == len(prompt) - 1)
            self._decode()

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> None:
        """Compute one token of each sequence; the logits of sequence i are output i."""
        self.batch.n_tokens = len(tokens)
        for sequence, token in enumerate(tokens):
            self._put(sequence, token, positions[sequence], sequence, True)
        self._decode()

    def _put(self, place: int, token: int, position: int, sequence: int, output: bool) -> None:
        batch = self.batch
        batch.token[place], batch.pos[place], batch.logits[place] = token, position, output
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence

    def _decode(self) -> None:
        status = lib.llama_decode(self.context, self.batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}: the context is too small for this.")

    def chain(self, ban_eos: bool) -> Any:
        """A greedy sampler."""
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        if ban_eos:
            ends = [token for token in range(self.size) if lib.llama_vocab_is_eog(self.vocabulary, token)]
            bias = (lib.llama_logit_bias * len(ends))(*(lib.llama_logit_bias(token, float("-inf")) for token in ends))
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_logit_bias(self.size, len(ends), bias))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
        return chain

    def write(self, prompts: Sequence[Sequence[int]], tokens: int, ban_eos: bool, piece: int) -> dict[str, Any]:
        """Write after all prompts. Without `ban_eos` for one prompt only: then the text may end by itself."""
        lib.llama_memory_clear(self.memory, True)
        count = len(prompts)
        chains = [self.chain(ban_eos) for _ in prompts]
        sample, context = lib.llama_sampler_sample, self.context
        written: list[list[int]] = [[] for _ in prompts]
        times: list[list[float]] = [[] for _ in prompts]
        began = time.perf_counter()
        for sequence, prompt in enumerate(prompts):
            self.read(sequence, prompt, piece)
            written[sequence].append(sample(chains[sequence], context, -1))
            times[sequence].append(time.perf_counter())
        positions = [len(prompt) for prompt in prompts]
        newest = [each[0] for each in written]
        while len(written[0]) < tokens and (ban_eos or not lib.llama_vocab_is_eog(self.vocabulary, newest[0])):
            self.step(newest, positions)
            newest = [sample(chains[sequence], context, sequence) for sequence in range(count)]
            positions = [position + 1 for position in positions]
            now = time.perf_counter()
            for sequence in range(count):
                written[sequence].append(newest[sequence])
                times[sequence].append(now)
        for chain in chains:
            lib.llama_sampler_free(chain)
        return {"began": began, "times": times, "tokens": written}

    def logits(self, prompt: Sequence[int], written: Sequence[int], of: Sequence[int]) -> list[float]:
        """Logits of the tokens `of` after `prompt` and `written`, computed as `write` does."""
        lib.llama_memory_clear(self.memory, True)
        self.read(0, prompt)
        for place, token in enumerate(written):
            self.step([token], [len(prompt) + place])
        row = lib.llama_get_logits_ith(self.context, -1)
        return [float(row[token]) for token in of]


def main() -> None:
    """Serve until stdin ends."""
    quiet = lib.llama_log_callback(lambda _level, _text, _data: None)
    lib.llama_log_set(quiet, ctypes.c_void_p())
    model, threads, cells, sequences = sys.argv[1:]
    loop = Loop(model, int(threads), int(cells), int(sequences))
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "write":
            answer: Any = loop.write(asked["prompts"], asked["tokens"], asked["ban_eos"], asked.get("piece", BATCH))
        else:
            answer = loop.logits(asked["prompt"], asked["written"], asked["of"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
