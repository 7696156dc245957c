"""LlamaCppOptions: how a GGUF model is loaded."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from modules.options import Options, knob
from modules.samplers import split_list

GROUP = "llama.cpp"
DEFAULT_CONTEXT = 8192


class LlamaCppOptions(Options):
    """Options of the llama.cpp loader."""

    ctx_size: int = knob(
        0,
        f"Context length in tokens. 0 is the model's own, at most {DEFAULT_CONTEXT}.",
        range=(0, 131072, 256),
        bounds=(0, 2**31 - 1),
        group=GROUP,
        flags=("--n_ctx", "--max_seq_len"),
    )
    gpu_layers: int = knob(
        -1, "Layers on the GPU, where the installed llama.cpp can use one. −1 is all.", range=(-1, 256, 1), bounds=(-1, 10**6), group=GROUP
    )
    split_mode: Literal["layer", "row", "tensor", "none"] = knob("layer", "How several GPUs share a model.", group=GROUP)
    tensor_split: str = knob("", 'Shares of the GPUs, like "60,40".', group=GROUP, metavar="SHARES")
    no_kv_offload: bool = knob(False, "Keep the context's cache in main memory.", group=GROUP)
    cache_type: Literal["fp16", "q8_0", "q4_0"] = knob("fp16", "Number format of the context's cache: smaller saves memory, not time.", group=GROUP)
    flash_attn: Literal["auto", "on", "off"] = knob("auto", "Flash attention. A quantised cache needs it.", group=GROUP)
    threads: int = knob(0, "CPU threads for writing. 0 is one fewer than there are cores.", range=(0, 256, 1), bounds=(0, 512), group=GROUP)
    threads_batch: int = knob(0, "CPU threads for reading the prompt. 0 is one a core.", range=(0, 256, 1), bounds=(0, 512), group=GROUP)
    batch_size: int = knob(512, "Prompt tokens computed in one piece.", range=(32, 4096, 32), bounds=(1, 65536), group=GROUP)
    ubatch_size: int = knob(512, "Prompt tokens computed at the same time.", range=(32, 4096, 32), bounds=(1, 65536), group=GROUP)
    no_mmap: bool = knob(False, "Read the whole file into memory instead of mapping it.", group=GROUP)
    mlock: bool = knob(False, "Keep the model from being swapped out.", group=GROUP)
    numa: bool = knob(False, "Spread the threads over the processors of a NUMA machine.", group=GROUP)
    rope_freq_base: float = knob(0.0, "Base frequency of RoPE. 0 is the model's own.", range=(0, 1000000, 1000), bounds=(0, None), group=GROUP)
    compress_pos_emb: float = knob(
        1.0, "Linear RoPE scaling: positions are divided by it. 1 is the model's own.", range=(1, 8, 0.1), bounds=(0.01, None), group=GROUP
    )

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
