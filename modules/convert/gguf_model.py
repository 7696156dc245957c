"""A GGUF model as Hugging Face has it: the one reading for conversions to a folder and for the Transformers loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from modules.convert.architectures import ROPE_FACTORS, Architecture, Rows, TensorNames, config_values, rows
from modules.convert.hf_to_gguf import LARGEST_F16
from modules.convert.sources import GgufFile, expected, understood
from modules.convert.vocabulary import read_tokenizer
from modules.errors import ModelError

if TYPE_CHECKING:
    import torch

PIECE = 1 << 24
"""Numbers that are dequantised at once, where the rows of a tensor allow it."""


class GgufModel:
    """A model of an architecture in `architectures.ARCHITECTURES`. Tensors are read one at a time, from any thread."""

    def __init__(self, file: GgufFile, architecture: Architecture, warn: Callable[[str], None]) -> None:
        """`warn` is told what differs from llama.cpp. Raises ModelError unless all tensors are there, none is left over, and each has its shape."""
        self._file = file
        self.tokenizer = read_tokenizer(file.header, warn)
        self.config = _config(file, architecture, self.tokenizer)
        self.generation_config = _generation_config(file, self.config)
        self._rows: Rows = rows(architecture, self.config)
        self.names = _names(file, architecture, self.config)
        """Hugging Face's name → GGUF's, of each tensor. An output matrix that is the embeddings is none of its own."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor with Hugging Face's `name`."""
        return self._file.shapes[self.names[name]]

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The dequantised tensor with Hugging Face's `name`, on the CPU. Takes little memory beside that of the result.

        Raises ModelError for a type that cannot be dequantised, and for numbers too large for float16.
        """
        import torch

        made = torch.empty(self.shape(name), dtype=dtype)
        start = 0
        for values in self._pieces(self.names[name]):
            if dtype == torch.float16 and np.abs(values).max(initial=0) > LARGEST_F16:
                raise ModelError(f"The tensor {self.names[name]!r} has numbers too large for float16. Use bfloat16 or float32.")
            made[start : start + len(values)] = torch.from_numpy(np.require(values, requirements=["C", "W"]))
            start += len(values)
        return made

    def _pieces(self, ours: str) -> Iterator[np.ndarray]:
        """The tensor with GGUF's name in Hugging Face's form, some rows at a time."""
        shape = self._file.shapes[ours]
        step = max(PIECE // shape[-1], 1) if len(shape) > 1 and self._rows.stay(ours) else shape[0]
        for start in range(0, shape[0], step):
            rows_here = slice(start, start + step) if step < shape[0] else slice(None)
            yield self._rows.to_hf(ours, self._file.read(ours, rows_here))


def _config(file: GgufFile, architecture: Architecture, tokenizer: Any) -> Any:
    import torch
    from transformers import AutoConfig

    if "token_embd.weight" not in file.shapes:
        raise ModelError(f"{file.path.name} has no embeddings: it is not a whole model. Use another file.")
    values = config_values(architecture, file.header, file.shapes["token_embd.weight"][0], file.factors)
    values |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    values["tie_word_embeddings"] = "output.weight" not in file.shapes
    for key, tensor in (("attention_bias", "blk.0.attn_output.bias"), ("mlp_bias", "blk.0.ffn_down.bias")):
        values[key] = tensor in file.shapes
    with understood(f"{file.path.name} says something about its model that cannot be", "Use another conversion of it."):
        config = AutoConfig.for_model(architecture.model_types[0], **values)
    config.dtype = torch.bfloat16 if file.bfloat16 else None
    return config


def _generation_config(file: GgufFile, config: Any) -> Any:
    """A reply ends with any of several tokens: that of a text, and that of a turn where the file names one."""
    from transformers import GenerationConfig

    ends = [config.eos_token_id, *(file.header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom"))]
    several = list(dict.fromkeys(end for end in ends if isinstance(end, int)))
    eos = several if len(several) > 1 else config.eos_token_id
    return GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=eos, pad_token_id=config.pad_token_id)


def _names(file: GgufFile, architecture: Architecture, config: Any) -> dict[str, str]:
    """Hugging Face's name → GGUF's, for each tensor. Enters the model's class into `config`."""
    names = TensorNames(architecture, config.num_hidden_layers)
    shapes, name = expected(config, file.path.name)
    config.architectures = [name]
    found: dict[str, str] = {}
    for theirs, shape in shapes.items():
        ours = names.get(theirs) or ""
        if file.shapes.get(ours) != shape:
            raise ModelError(f"{file.path.name} has no tensor {ours or theirs!r} of shape {shape}. Use another conversion of this model.")
        found[theirs] = ours
    left = file.shapes.keys() - found.values() - {ROPE_FACTORS}
    if left:
        raise ModelError(f"{file.path.name} has the tensor {min(left)[:80]!r}, which {config.model_type} does not know. Use it with llama.cpp.")
    return found
