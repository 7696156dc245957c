"""What a model's files say of it, without an engine: `read_card(path)`. The server asks `inspect_model.inspect`, which calls it in a child."""

from __future__ import annotations

from pathlib import Path

from modules.errors import ModelError
from modules.gguf import looks_like_gguf
from modules.model_card.card import ModelCard
from modules.model_card.gguf_file import read_gguf
from modules.model_card.hf_folder import read_folder

__all__ = ["ModelCard", "read_card"]


def read_card(path: Path) -> ModelCard:
    """The card of a GGUF file, a folder that holds one, or a Hugging Face folder. Raises ModelError with what is wrong and what to do."""
    if path.is_dir():
        return read_gguf(path) if any(path.glob("*.gguf")) else read_folder(path)
    if looks_like_gguf(path):
        return read_gguf(path)
    if not path.exists():
        raise ModelError(f"There is no file {path}. Choose a model from the list on the Model tab.")
    raise ModelError(f"{path.name} is no model that can be read. Choose a .gguf file, or the folder of a model.")
