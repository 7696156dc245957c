"""GGUF files for this loader: read as `modules.convert` reads them, by the library only where that does not know the architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from modules.convert.gguf_model import GgufModel
from modules.convert.sources import GgufFile
from modules.convert.vocabulary import TOKENIZERS, read_tokenizer
from modules.log import logger

if TYPE_CHECKING:
    import torch


def read_model(file: GgufFile) -> GgufModel | None:
    """The model in `file`; None where only the library knows its architecture. Raises ModelError."""
    if file.architecture is None:
        logger.info("%s: transformers itself reads files of architecture %s", file.path.stem, file.header.architecture[:40])
        return None
    return GgufModel(file, file.architecture, _warner(file))


def tokenizer_of(file: GgufFile) -> Any:
    """The tokenizer in `file`; None where only the library knows its kind. Raises ModelError."""
    known = file.header.metadata.get("tokenizer.ggml.model") in TOKENIZERS
    return read_tokenizer(file.header, _warner(file)) if known else None


def _warner(file: GgufFile) -> Callable[[str], None]:
    return lambda words: logger.warning("%s: %s", file.path.stem, words)


def weights(model: GgufModel, dtype: torch.dtype) -> dict[str, _Weight]:
    """A state dict for `from_pretrained`, of which each tensor is read when it is put into its place."""
    return {name: _Weight(model, name, dtype) for name in model.names}


class _Weight:
    """A tensor that is not read yet. transformers takes `[...]` of each value of a state dict, as of safetensors' slices, in several threads."""

    def __init__(self, model: GgufModel, name: str, dtype: torch.dtype) -> None:
        self._model, self._name, self._dtype = model, name, dtype

    def __getitem__(self, _all: Any) -> torch.Tensor:
        return self._model.read(self._name, self._dtype)
