"""A Hugging Face folder to a GGUF file. Tensors go through one at a time: the largest one, three times, is the memory it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from modules.convert.architectures import ROPE_FACTORS, metadata, rope_factors
from modules.convert.output import Report, written
from modules.convert.sources import HfFolder
from modules.convert.vocabulary import add_vocabulary
from modules.errors import ModelError

Kind = Literal["F32", "F16", "Q8_0"]
KINDS: tuple[Kind, ...] = ("F32", "F16", "Q8_0")
LARGEST_F16 = 65504.0
_BLOCK = 32  # numbers of a row that Q8_0 packs together


def hf_to_gguf(source: Path, target: Path, kind: Kind, report: Report, force: bool = False) -> None:
    """Convert the folder `source` to the file `target`. Norms and other vectors stay F32; rows that Q8_0 cannot pack are F16.

    Raises ModelError for what cannot be converted, DataError for what cannot be written.
    """
    import gguf

    report.progress(0.0, f"Reading {source.name}")
    folder = HfFolder(source)
    factors = rope_factors(folder.config)
    kinds = {name: _kind(shape, kind) for name, shape in folder.shapes.items()}
    sizes = {name: _bytes(folder.shapes[name], kinds[name]) for name in kinds}
    window = getattr(folder.config, "sliding_window", None)
    if window and window < folder.config.max_position_embeddings:
        report.warning(f"The model was made to see {window} tokens back; llama.cpp will show it all of its context.")
    with written(target, sum(sizes.values()), force) as place:
        writer = gguf.GGUFWriter(place, folder.architecture.name)
        try:
            _add_header(writer, folder, kind)
            if factors is not None:
                writer.add_tensor_info(ROPE_FACTORS, factors.shape, np.dtype(np.float32), factors.nbytes, gguf.GGMLQuantizationType.F32)
            for name, shape in folder.shapes.items():
                writer.add_tensor_info(name, shape, np.dtype(np.float32), sizes[name], gguf.GGMLQuantizationType[kinds[name]])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if factors is not None:
                writer.write_tensor_data(factors)
            done = 0
            for name, each in kinds.items():
                report.progress(done / sum(sizes.values()), f"Writing {name}")
                writer.write_tensor_data(packed(folder.read(name), each, name))
                done += sizes[name]
        finally:
            writer.close()
    report.done(target)


def _add_header(writer: Any, folder: HfFolder, kind: Kind) -> None:
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(folder.path.resolve().name)
    for key, value in metadata(folder.architecture, folder.config).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key, value)
    types = {"F32": gguf.LlamaFileType.ALL_F32, "F16": gguf.LlamaFileType.MOSTLY_F16, "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    writer.add_file_type(types[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_vocabulary(writer, folder.path, folder.shapes["token_embd.weight"][0])


def _kind(shape: tuple[int, ...], kind: Kind) -> Kind:
    if len(shape) < 2:
        return "F32"
    return "F16" if kind == "Q8_0" and shape[-1] % _BLOCK else kind


def _bytes(shape: tuple[int, ...], kind: Kind) -> int:
    count = int(np.prod(shape))
    return {"F32": 4 * count, "F16": 2 * count, "Q8_0": count // _BLOCK * (_BLOCK + 2)}[kind]


def packed(values: np.ndarray, kind: Kind, name: str) -> np.ndarray:
    """float32 `values` as `kind`. Raises ModelError for numbers that F16 cannot hold."""
    import gguf

    if not np.isfinite(values).all():
        raise ModelError(f"The tensor {name!r} has values that are no numbers. Download the folder again.")
    if kind == "F16" and np.abs(values).max(initial=0) > LARGEST_F16:
        raise ModelError(f"The tensor {name!r} has numbers too large for F16. Convert to F32.")
    return gguf.quantize(values, gguf.GGMLQuantizationType[kind])
