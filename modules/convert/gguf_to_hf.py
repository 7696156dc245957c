"""A GGUF file to a Hugging Face folder with float weights, which `from_pretrained` loads.

Architectures of `architectures.ARCHITECTURES` go through one tensor at a time; memory is a shard's. What else Transformers can read goes through
its own reader, which holds the whole model in memory, twice for a while.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from modules.convert.gguf_model import GgufModel
from modules.convert.output import Report, written
from modules.convert.sources import GgufFile, understood
from modules.convert.vocabulary import read_tokenizer
from modules.errors import DataError

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
        report.progress(0.02, "Reading the tokenizer")
        if file.architecture is None:
            read_tokenizer(file.header, report.warning).save_pretrained(place)
            _by_transformers(file, place, dtype, report, shard_bytes)
        else:
            model = GgufModel(file, file.architecture, report.warning)
            model.tokenizer.save_pretrained(place)
            _write_tensors(model, place, dtype, report, shard_bytes)
            model.config.dtype = dtype
            model.config.save_pretrained(place)
            model.generation_config.save_pretrained(place)
    report.done(target)


def _write_tensors(model: GgufModel, folder: Path, dtype: Dtype, report: Report, shard_bytes: int) -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    kind: torch.dtype = getattr(torch, dtype)
    sizes = {name: math.prod(model.shape(name)) * kind.itemsize for name in model.names}
    shards = _shards(sizes, shard_bytes)
    done, total = 0, sum(sizes.values())
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        tensors = {}
        for name in names:
            report.progress(0.05 + 0.95 * done / total, f"Dequantising {model.names[name]}")
            tensors[name] = model.read(name, kind)
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


def _by_transformers(file: GgufFile, folder: Path, dtype: Dtype, report: Report, shard_bytes: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    given = file.for_library()
    report.progress(0.05, "Transformers reads the whole model")
    with understood(f"Transformers cannot read it (architecture {file.header.architecture[:40]!r})", "Use a folder made by others."):
        model = AutoModelForCausalLM.from_pretrained(**given, dtype=getattr(torch, dtype))
    report.progress(0.6, "Writing the folder")
    # It remembers that it came from quantised weights, and would refuse to be saved without them.
    model.hf_quantizer = None  # type: ignore[assignment]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder, max_shard_size=shard_bytes)
