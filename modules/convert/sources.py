"""What is converted: a Hugging Face folder or a GGUF file, with tensors that are read one at a time. Both are hostile until checked here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from modules.convert.architectures import ROPE_FACTORS, Architecture, Rows, TensorNames, named, of_model_type, rows
from modules.errors import ModelError
from modules.gguf import check_parts, model_file, read_header

MAX_JSON = 64 << 20
_ALL = slice(None)
_BF16 = 30  # gguf.GGMLQuantizationType


@contextmanager
def understood(what: str, fix: str) -> Iterator[None]:
    """Raise ModelError "`what`: …. `fix`" for whatever a library raises when it is given what it does not understand."""
    from huggingface_hub.errors import StrictDataclassError

    known = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, StrictDataclassError)
    try:
        yield
    except known as error:
        words = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{what}: {words}. {fix}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise ModelError(f"{path} is too large to be what it should be. Download it again.")
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ModelError(f"Cannot read {path}: {error.strerror or error}. Choose a complete folder.") from error
    except (ValueError, RecursionError):
        raise ModelError(f"{path} is not JSON. Download it again.") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} is not a JSON object. Download it again.")
    return found


class Tensors:
    """The tensors of some safetensors files, by name. Files with pickles are not read: they can run code."""

    def __init__(self, files: list[Path]) -> None:
        import safetensors

        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, Any] = {}
        for file in files:
            try:
                opened = safetensors.safe_open(str(file), framework="pt")
                names = opened.keys()
                self.shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in names}
            except (OSError, safetensors.SafetensorError) as error:
                raise ModelError(f"Cannot read {file.name}: {error}. Download it again.") from error
            self._places |= dict.fromkeys(names, opened)

    def read(self, name: str) -> np.ndarray:
        """The numbers, as float32."""
        values = self._places[name].get_tensor(name)
        if not values.is_floating_point():
            raise ModelError(f"The tensor {name[:80]!r} is quantised ({values.dtype}). Convert a folder that holds plain float numbers.")
        found: np.ndarray = values.float().numpy()
        return found


class HfFolder:
    """A Hugging Face folder of a model. `shapes` has GGUF's names."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError for a folder that is not complete, or of a model that cannot be converted."""
        from transformers import AutoConfig

        self.path = path
        declared = read_json(path / "config.json")
        if "quantization_config" in declared:
            raise ModelError(f"{path.name} is quantised; only float weights can be converted. Use the folder it was made from.")
        self.architecture = of_model_type(declared.get("model_type", ""))
        with understood(f"{path / 'config.json'} cannot be used", "Download the folder again."):
            self.config = AutoConfig.from_pretrained(path, local_files_only=True)
        self.rows: Rows = rows(self.architecture, self.config)
        self._tensors = Tensors(_weight_files(path))
        self._names = self._gguf_names()
        self.shapes = {name: self._tensors.shapes[theirs] for name, theirs in self._names.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor with GGUF's `name`, in GGUF's form, as float32."""
        return np.ascontiguousarray(self.rows.to_gguf(name, self._tensors.read(self._names[name])))

    def _gguf_names(self) -> dict[str, str]:
        """GGUF's name → the folder's, for each tensor; all there, each of its shape, none left over."""
        names = TensorNames(self.architecture, self.config.num_hidden_layers)
        found: dict[str, str] = {}
        wanted, _ = expected(self.config, self.path.name)
        for theirs, shape in wanted.items():
            if self._tensors.shapes.get(theirs) != shape:
                raise ModelError(f"{self.path.name} has no tensor {theirs!r} of shape {shape}. Choose a complete folder.")
            ours = names.get(theirs)
            if ours is None:
                raise ModelError(f"The tensor {theirs[:80]!r} has no place in a GGUF file of architecture {self.architecture.name}.")
            found[ours] = theirs
        computed = {name for name in self._tensors.shapes if name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"}
        left = self._tensors.shapes.keys() - wanted.keys() - computed
        if left:
            raise ModelError(f"The tensor {min(left)[:80]!r} has no place in a GGUF file of architecture {self.architecture.name}.")
        return found


def expected(config: Any, what: str) -> tuple[dict[str, tuple[int, ...]], str]:
    """(shapes of a model's tensors by their names, without an output matrix that is the embeddings; the name of the model's class).

    Raises ModelError when `what` has a configuration of which no model can be made.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with understood(f"{what} says something about its model that cannot be", "Use another copy of it."), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes, type(model).__name__


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
        if any(Path(name).name != name for name in names):
            raise ModelError(f"{index} names files outside its folder. Download the folder from somebody else.")
        files = [path / name for name in names]
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(f"There are no .safetensors files in {path}. Other formats can run code when they are read; convert them elsewhere first.")
    return files


class GgufFile:
    """A GGUF model, in one file or several. `shapes` has GGUF's names and numpy's order: (outputs, inputs)."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError."""
        self.path = model_file(path)
        self.header = read_header(self.path)
        self.architecture: Architecture | None = named(self.header.architecture)
        parts = (self.header, *check_parts(self.header))
        self._tensors = {name: (part.path, tensor) for part in parts for name, tensor in part.tensors.items()}
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tensor.shape[::-1] for name, (_, tensor) in self._tensors.items()}
        self.size = sum(tensor.elements for _, tensor in self._tensors.values())
        """Numbers in all tensors together."""
        self.bfloat16 = any(tensor.kind == _BF16 for _, tensor in self._tensors.values())
        """Whether some of them are of that type."""

    def read(self, name: str, rows: slice = _ALL) -> np.ndarray:
        """The dequantised tensor, or `rows` of a matrix, as float32. Raises ModelError for a type that cannot be dequantised here."""
        import gguf

        file, tensor = self._tensors[name]
        try:
            kind = gguf.GGMLQuantizationType(tensor.kind)
            data = np.memmap(file, np.uint8, "r", tensor.place, (*self.shapes[name][:-1], tensor.size // math.prod(self.shapes[name][:-1])))
            values: np.ndarray = gguf.dequantize(data[rows], kind).astype(np.float32, copy=False)
        except (NotImplementedError, ValueError, ZeroDivisionError):
            raise ModelError(
                f"The tensor {name[:80]!r} of {file.name} is of a type that cannot be read here. Use another file of this model."
            ) from None
        return values

    def for_library(self) -> dict[str, Any]:
        """Arguments with which transformers' own `from_pretrained` reads it. Raises ModelError for a model in several files."""
        if self.header.split[1] > 1:
            raise ModelError(
                f"{self.path.name} is in several files; models of architecture {self.header.architecture[:40]} must be in one here. "
                "Use it with llama.cpp, or as one file."
            )
        return {"pretrained_model_name_or_path": self.path.parent, "gguf_file": self.path.name, "local_files_only": True}

    @property
    def factors(self) -> np.ndarray | None:
        """What its RoPE frequencies are divided by."""
        return self.read(ROPE_FACTORS) if ROPE_FACTORS in self.shapes else None
