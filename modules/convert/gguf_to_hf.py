"""A GGUF file to a Hugging Face folder with float weights, which `from_pretrained` loads.

Architectures of `architectures.ARCHITECTURES` go through one tensor at a time; memory is a shard's. What else Transformers can read goes through
its own reader, which holds the whole model in memory, twice for a while.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from modules.convert.architectures import ROPE_FACTORS, Architecture, Rows, TensorNames, config_values, rows
from modules.convert.hf_to_gguf import LARGEST_F16
from modules.convert.output import Report, written
from modules.convert.sources import GgufFile, expected, understood
from modules.convert.vocabulary import save_tokenizer
from modules.errors import DataError, ModelError

Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")
SHARD_BYTES = 2 << 30


def gguf_to_hf(source: Path, target: Path, dtype: Dtype, report: Report, force: bool = False, shard_bytes: int = SHARD_BYTES) -> None:
    """Convert the file `source` to the folder `target`, dequantised.

    Raises ModelError for what cannot be converted, DataError for what cannot be written.
    """
    report.progress(0.0, f"Reading {source.name}")
    file = GgufFile(source)
    width = 4 if dtype == "float32" else 2
    with written(target, file.size * width, force, folder=True) as place:
        report.progress(0.02, "Converting the tokenizer")
        tokenizer = save_tokenizer(file.header, place, report)
        if file.architecture is None:
            _by_transformers(file, place, dtype, report, shard_bytes)
        else:
            config = _config(file, file.architecture, tokenizer, dtype)
            wanted = _wanted(file, file.architecture, config)
            _write_tensors(file, wanted, rows(file.architecture, config), place, dtype, report, shard_bytes)
            config.save_pretrained(place)
            _save_generation_config(file, config, place)
    report.done(target)


def _config(file: GgufFile, architecture: Architecture, tokenizer: Any, dtype: Dtype) -> Any:
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
    config.dtype = dtype
    return config


def _write_tensors(file: GgufFile, wanted: Mapping[str, str], order: Rows, folder: Path, dtype: Dtype, report: Report, shard_bytes: int) -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    kind: torch.dtype = getattr(torch, dtype)
    sizes = {theirs: int(np.prod(file.shapes[ours])) * kind.itemsize for theirs, ours in wanted.items()}
    shards = _shards(sizes, shard_bytes)
    done, total = 0, sum(sizes.values())
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        tensors = {}
        for name in names:
            report.progress(0.05 + 0.95 * done / total, f"Dequantising {wanted[name]}")
            values = order.to_hf(wanted[name], file.read(wanted[name]))
            if dtype == "float16" and np.abs(values).max(initial=0) > LARGEST_F16:
                raise ModelError(f"The tensor {wanted[name]!r} has numbers too large for float16. Convert to bfloat16 or float32.")
            tensors[name] = torch.from_numpy(np.array(values, order="C")).to(kind)
            done += sizes[name]
        shard = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        try:
            save_file(tensors, folder / shard, metadata={"format": "pt"})
        except SafetensorError as error:
            raise DataError(f"Cannot write {shard}: {error}. Free some space, then try again.") from error
        places |= dict.fromkeys(names, shard)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")


def _wanted(file: GgufFile, architecture: Architecture, config: Any) -> dict[str, str]:
    """Name in the folder → name in the file, for each tensor; all there, none left over, each of the shape that the model will want.

    Enters the model's class into `config`.
    """
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
        raise ModelError(f"{file.path.name} has the tensor {min(left)[:80]!r}, which {config.model_type} does not know. It cannot be converted.")
    return found


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in groups of at most `limit` bytes; a larger tensor is alone."""
    groups: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if groups[-1] and size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def _save_generation_config(file: GgufFile, config: Any, folder: Path) -> None:
    """A reply ends with any of several tokens: that of a text, and that of a turn where the file names one."""
    from transformers import GenerationConfig

    ends = [config.eos_token_id, *(file.header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom"))]
    several = list(dict.fromkeys(end for end in ends if isinstance(end, int)))
    eos = several if len(several) > 1 else config.eos_token_id
    GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=eos, pad_token_id=config.pad_token_id).save_pretrained(folder)


def _by_transformers(file: GgufFile, folder: Path, dtype: Dtype, report: Report, shard_bytes: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    if file.header.split[1] > 1:
        raise ModelError(f"{file.path.name} is in several files; models of architecture {file.header.architecture} must be in one for this.")
    report.progress(0.05, "Transformers reads the whole model")
    with understood(f"Transformers cannot read it (architecture {file.header.architecture[:40]!r})", "Use a folder made by others."):
        model = AutoModelForCausalLM.from_pretrained(file.path.parent, gguf_file=file.path.name, dtype=getattr(torch, dtype), local_files_only=True)
    report.progress(0.6, "Writing the folder")
    # It remembers that it came from quantised weights, and would refuse to be saved without them.
    model.hf_quantizer = None  # type: ignore[assignment]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder, max_shard_size=shard_bytes)
