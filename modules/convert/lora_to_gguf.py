"""A LoRA adapter as PEFT saves it to a GGUF adapter for llama.cpp, which adds `alpha / rank · B · A` to a matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modules.convert.architectures import ARCHITECTURES, Architecture, Rows, TensorNames
from modules.convert.output import Report, written
from modules.convert.sources import GgufFile, HfFolder, Tensors, read_json
from modules.errors import ModelError

_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_OTHER_KINDS = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "kasa_config", "monteclora_config", "alora_invocation_tokens"),
    *("layer_replication", "modules_to_save", "trainable_token_indices", "target_parameters"),
)
"""Settings of PEFT with which an adapter is more than two matrices for some matrices of the model."""


@dataclass(frozen=True)
class Base:
    """What an adapter must fit: a model's tensors by GGUF's names."""

    name: str
    architecture: Architecture
    rows: Rows
    layers: int
    shapes: Mapping[str, tuple[int, ...]]


def lora_to_gguf(source: Path, target: Path, base: Path | None, report: Report, force: bool = False) -> None:
    """Convert the adapter in the folder `source` to the file `target`.

    `base` is the model it was trained on, a Hugging Face folder or a GGUF file; without it the folder that the adapter itself names. Raises
    ModelError when the adapter does not fit it or is of a kind that llama.cpp does not have, DataError for what cannot be written.
    """
    import gguf

    report.progress(0.0, f"Reading {source.name}")
    settings = _settings(source)
    tensors = Tensors([source / "adapter_model.safetensors"])
    found = read_base(base or _named_base(settings))
    report.progress(0.3, f"Comparing it with {found.name}")
    names = _names(tensors, found)
    alpha = float(settings.get("lora_alpha", 8))
    size = sum(4 * int(np.prod(shape)) for shape in tensors.shapes.values())
    with written(target, size, force) as place:
        writer = gguf.GGUFWriter(place, found.architecture.name)
        try:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_name(source.resolve().name)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
            for module, name in names.items():
                a, b = tensors.read(_PREFIX + module + _A), tensors.read(_PREFIX + module + _B)
                strength = _scale(settings, module, a.shape[0]) / (alpha / a.shape[0])
                b = found.rows.to_gguf(name, b) * np.float32(strength)
                writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a))
                writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b))
            report.progress(0.6, "Writing the adapter")
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    report.done(target)


def read_base(path: Path) -> Base:
    """What adapters of the model at `path` must fit. Raises ModelError."""
    if (path / "config.json").is_file():
        folder = HfFolder(path)
        return Base(path.name, folder.architecture, folder.rows, folder.config.num_hidden_layers, folder.shapes)
    file = GgufFile(path)
    if file.architecture is None:
        known = ", ".join(each.name for each in ARCHITECTURES)
        raise ModelError(f"Adapters for architecture {file.header.architecture[:40]!r} cannot be converted here; for these they can: {known}.")
    heads = file.header.of_architecture("attention.head_count")
    kv_heads = file.header.of_architecture("attention.head_count_kv") or heads
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or not heads:
        raise ModelError(f"{path.name} does not say how many heads it has. Use another conversion of this model.")
    return Base(path.name, file.architecture, Rows(file.architecture, heads, kv_heads), file.header.block_count, file.shapes)


def _settings(source: Path) -> Mapping[str, Any]:
    settings = read_json(source / "adapter_config.json")
    if settings.get("peft_type") != "LORA":
        raise ModelError(f"{source.name} is an adapter of type {settings.get('peft_type')!r}; llama.cpp knows LoRA only.")
    other = next((name for name in _OTHER_KINDS if settings.get(name)), None)
    if other:
        raise ModelError(f"{source.name} was trained with {other}, which GGUF adapters cannot hold. Merge it into its model and convert that.")
    if not (source / "adapter_model.safetensors").is_file():
        raise ModelError(f"There is no adapter_model.safetensors in {source}. Save the adapter as safetensors.")
    return settings


def _named_base(settings: Mapping[str, Any]) -> Path:
    path = Path(str(settings.get("base_model_name_or_path") or ""))
    if not path.is_absolute() or not path.exists():
        raise ModelError("The model that the adapter was trained on is not known here. Give it with --base: a folder or a GGUF file.")
    return path


def _names(tensors: Tensors, base: Base) -> dict[str, str]:
    """PEFT's name of each adapted module → GGUF's name of its matrix. Raises ModelError when the adapter does not fit."""
    names = TensorNames(base.architecture, base.layers)
    foreign = next((key for key in tensors.shapes if not key.startswith(_PREFIX) or not key.endswith((_A, _B))), None)
    if foreign:
        raise ModelError(f"The adapter has the tensor {foreign[:100]!r}, which GGUF adapters cannot hold. Merge it into its model and convert that.")
    found: dict[str, str] = {}
    for module in dict.fromkeys(key.removeprefix(_PREFIX).removesuffix(_A).removesuffix(_B) for key in tensors.shapes):
        name = names.get(f"{module}.weight")
        if name is None or name not in base.shapes:
            raise ModelError(
                f"The adapter changes {module[:80]!r}, and {base.name} has no such matrix of its own. Choose the model it was trained on."
            )
        _check_shapes(tensors.shapes.get(_PREFIX + module + _A), tensors.shapes.get(_PREFIX + module + _B), module, name, base)
        found[module] = name
    if not found:
        raise ModelError("The adapter changes nothing. Choose another one.")
    return found


def _check_shapes(a: tuple[int, ...] | None, b: tuple[int, ...] | None, module: str, name: str, base: Base) -> None:
    outputs, inputs = (base.shapes[name] + (0, 0))[:2]
    if not a or not b or len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
        raise ModelError(f"The adapter's matrices for {module[:80]!r} are damaged or incomplete. Save it again.")
    if (b[0], a[1]) != (outputs, inputs):
        raise ModelError(
            f"The adapter does not fit {base.name}: for {module[:80]!r} it has {b[0]} × {a[1]} and the model {outputs} × {inputs}. "
            "Choose the model it was trained on."
        )


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """What B · A is multiplied with, as PEFT does it."""
    from peft.utils.other import get_pattern_key

    patterns: dict[str, Any] = settings.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(list(patterns), module), settings.get("lora_alpha", 8)))
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
