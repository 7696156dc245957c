"""TransformersOptions: how a model is loaded with Hugging Face Transformers. Imports neither torch nor transformers."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from modules.backends.shared_options import DEFAULT_CONTEXT, DRAFT_MAX, MANY, MAX_QUEUE, MODEL_DRAFT, PARALLEL, PREFILL_SHARE
from modules.options import Options, knob
from modules.samplers import split_list

GROUP, MEMORY = "Transformers", "Memory"


class TransformersOptions(Options):
    """Options of the Transformers loader."""

    ctx_size: int = knob(
        0,
        f"Context in tokens. 0 is the model's own, at most {DEFAULT_CONTEXT}.",
        range=(0, 131072, 256),
        bounds=(0, 2**31 - 1),
        group=GROUP,
        flags=("--n_ctx", "--max_seq_len"),
    )
    bf16: bool = knob(False, "Compute in bfloat16, whatever the model says. Not on a CPU.", group=GROUP)
    compute_dtype: Literal["auto", "float16", "bfloat16", "float32"] = knob(
        "auto", "Numbers to compute in. auto is the model's own, and float32 on a CPU.", group=GROUP
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = knob(
        "sdpa", "How attention is computed. Only sdpa computes several replies in one step.", group=GROUP
    )
    load_in_8bit: bool = knob(False, "Quantise the weights to 8 bits while loading, with bitsandbytes.", group=GROUP)
    load_in_4bit: bool = knob(False, "Quantise the weights to 4 bits while loading, with bitsandbytes.", group=GROUP)
    quant_type: Literal["nf4", "fp4"] = knob("nf4", "Number format of 4-bit weights.", group=GROUP)
    use_double_quant: bool = knob(False, "Quantise the scales of 4-bit weights too.", group=GROUP)
    no_use_fast: bool = knob(False, "Use the tokenizer's slow form. Grammars need the fast one.", group=GROUP)
    torch_compile: bool = knob(False, "Compile the model with torch.compile. Replies are then computed one by one.", group=GROUP)
    allow_pickle: bool = knob(
        False, "Load weights in .bin, .pt and .pth files. Such a file can run programs: only from whom you trust.", group=GROUP, start_only=True
    )
    trust_remote_code: bool = knob(False, "Run program code that comes with a model: only from whom you trust.", group=GROUP, start_only=True)

    cpu: bool = knob(False, "Compute on the CPU, also where there is a GPU.", group=MEMORY)
    gpu_split: str = knob("", 'Memory to use of each GPU for weights in GiB, like "20,7".', group=MEMORY, metavar="GIB")
    cpu_memory: float = knob(
        0.0, "Main memory to use for weights in GiB, beside a GPU. 0 is what is free.", range=(0, 512, 1), bounds=(0, 10**6), group=MEMORY
    )
    disk: bool = knob(False, "Keep on disk what fits neither the GPU nor main memory. Very slow.", group=MEMORY)
    disk_cache_dir: str = knob("", "Folder for that.", group=MEMORY, metavar="PATH", start_only=True)
    cache_kind: Literal["dynamic", "quantized"] = knob(
        "dynamic",
        "Cache of the context. quantized (4 bits) saves memory and needs optimum-quanto; replies are then computed one by one.",
        group=MEMORY,
    )
    kept_tokens: int = knob(
        -1,
        "Tokens of finished chats that stay computed, so that the next turn need not read them again. −1 is one context.",
        range=(-1, 131072, 1024),
        bounds=(-1, 2**31 - 1),
        group=MEMORY,
    )

    parallel: int = PARALLEL
    max_queue: int = MAX_QUEUE
    prefill_share: float = PREFILL_SHARE
    batch_size: int = knob(512, "Tokens computed in one step at most.", range=(32, 4096, 32), bounds=(1, 65536), group=MANY)

    model_draft: str = MODEL_DRAFT
    draft_max: int = DRAFT_MAX

    @field_validator("gpu_split")
    @classmethod
    def _sizes(cls, value: str) -> str:
        try:
            sizes = [float(part) for part in split_list(value)]
        except ValueError:
            sizes = [-1.0]
        if any(not 0 <= size < 10**6 for size in sizes):
            raise ValueError('write numbers of GiB separated by commas, like "20,7"')
        return value

    @property
    def gpu_sizes(self) -> tuple[float, ...]:
        """`gpu_split` in GiB."""
        return tuple(float(part) for part in split_list(self.gpu_split))
