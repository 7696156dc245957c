"""LlamaCppOptions: how a GGUF model is loaded."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from modules.backends.shared_options import AHEAD, DEFAULT_CONTEXT, DRAFT_MAX, MANY, MAX_QUEUE, MODEL_DRAFT, PARALLEL, PREFILL_SHARE
from modules.options import Options, knob
from modules.samplers import split_list

GROUP = "llama.cpp"


class LlamaCppOptions(Options):
    """Options of the llama.cpp loader."""

    ctx_size: int = knob(
        0,
        f"Context in tokens, shared by all replies at once. 0 is the model's own, at most {DEFAULT_CONTEXT}.",
        range=(0, 131072, 256),
        bounds=(0, 2**31 - 1),
        group=GROUP,
        flags=("--n_ctx", "--max_seq_len"),
    )
    gpu_layers: int = knob(
        -1,
        "Layers on the GPU, where the installed llama.cpp can use one. −1 is as many as fit.",
        range=(-1, 256, 1),
        bounds=(-1, 10**6),
        group=GROUP,
        flags=("--n-gpu-layers",),
    )
    cpu_moe: bool = knob(False, "Keep the experts of a mixture-of-experts model in main memory.", group=GROUP)
    split_mode: Literal["layer", "row", "tensor", "none"] = knob("layer", "How several GPUs share a model.", group=GROUP)
    tensor_split: str = knob("", 'Shares of the GPUs, like "60,40".', group=GROUP, metavar="SHARES")
    no_kv_offload: bool = knob(False, "Keep the context's cache in main memory.", group=GROUP)
    cache_type: Literal["fp16", "q8_0", "q4_0"] = knob("fp16", "Number format of the context's cache: smaller saves memory, not time.", group=GROUP)
    flash_attn: Literal["auto", "on", "off"] = knob("auto", "Flash attention. A quantised cache needs it.", group=GROUP)
    streaming_llm: bool = knob(
        False, "Keep the whole context of sliding-window layers, so that more beginnings of chats can be used again. Costs memory.", group=GROUP
    )
    threads: int = knob(
        0, "CPU threads for a single reply. 0 is one a core, fewer while other programs are busy.", range=(0, 256, 1), bounds=(0, 512), group=GROUP
    )
    threads_batch: int = knob(
        0,
        "CPU threads for prompts and several replies at once. 0 is one a core, fewer while other programs are busy.",
        range=(0, 256, 1),
        bounds=(0, 512),
        group=GROUP,
    )
    batch_size: int = knob(512, "Tokens computed in one step at most.", range=(32, 4096, 32), bounds=(1, 65536), group=GROUP)
    ubatch_size: int = knob(512, "Tokens computed at the same time.", range=(32, 4096, 32), bounds=(1, 65536), group=GROUP)
    no_mmap: bool = knob(False, "Read the whole file into memory instead of mapping it.", group=GROUP)
    mlock: bool = knob(False, "Keep the model from being swapped out.", group=GROUP)
    numa: bool = knob(False, "Spread the threads over the processors of a NUMA machine.", group=GROUP)
    rope_freq_base: float = knob(0.0, "Base frequency of RoPE. 0 is the model's own.", range=(0, 1000000, 1000), bounds=(0, None), group=GROUP)
    compress_pos_emb: float = knob(
        1.0, "Linear RoPE scaling: positions are divided by it. 1 is the model's own.", range=(1, 8, 0.1), bounds=(0.01, None), group=GROUP
    )
    mmproj: str = knob(
        "",
        "Vision part of the model: a file in mmproj/ of the user data, in the model folder, or a path.",
        group=GROUP,
        metavar="NAME",
        file="mmproj",
    )

    parallel: int = PARALLEL
    max_queue: int = MAX_QUEUE
    prefill_share: float = PREFILL_SHARE
    cache_ram: int = knob(
        -1,
        "Main memory in MiB for chats whose place in the context was needed. −1 is a quarter of what is free, 0 is off.",
        range=(-1, 65536, 128),
        bounds=(-1, 2**31 - 1),
        group=MANY,
    )
    engine_timeout: int = knob(
        120, "Seconds without progress after which the engine is ended and started again.", range=(5, 600, 5), bounds=(2, 86_400), group=MANY
    )

    model_draft: str = MODEL_DRAFT
    draft_max: int = DRAFT_MAX
    gpu_layers_draft: int = knob(256, "Layers of the draft model on the GPU.", range=(-1, 256, 1), bounds=(-1, 10**6), group=AHEAD)
    ctx_size_draft: int = knob(0, "Context of the draft model. 0 is the model's.", range=(0, 131072, 256), bounds=(0, 2**31 - 1), group=AHEAD)
    spec_type: Literal["none", "ngram-simple", "ngram-mod", "ngram-map-k", "ngram-map-k4v"] = knob(
        "none", "Guess ahead from the text itself, without a draft model. All ngram- names are the same here.", group=AHEAD
    )
    spec_ngram_size_n: int = knob(24, "Tokens that must have stood in the text before, in a row.", range=(1, 64, 1), bounds=(1, 1024), group=AHEAD)
    spec_ngram_size_m: int = knob(48, "Tokens guessed at most.", range=(1, 64, 1), bounds=(1, 256), group=AHEAD)
    spec_ngram_min_hits: int = knob(1, "How often they must have stood there.", range=(1, 16, 1), bounds=(1, 1024), group=AHEAD)

    @field_validator("tensor_split")
    @classmethod
    def _shares(cls, value: str) -> str:
        try:
            shares = [float(part) for part in split_list(value)]
        except ValueError:
            shares = [-1.0]
        if any(not 0 <= share < float("inf") for share in shares):
            raise ValueError('write numbers separated by commas, like "60,40"')
        return value

    @property
    def shares(self) -> tuple[float, ...]:
        """`tensor_split` as numbers."""
        return tuple(float(part) for part in split_list(self.tensor_split))
