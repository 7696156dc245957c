"""Hugging Face Transformers: models as folders of safetensors, or GGUF files, computed with torch in the server's process.

`LOADER` costs nothing until a model is loaded; torch and transformers are imported then. See `backend.py` and `engine.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from modules.backends.base import Backend, CancelToken, Loader, Progress
from modules.backends.torch_samplers import SUPPORTED
from modules.backends.transformers.load import is_model_folder
from modules.backends.transformers.options import TransformersOptions
from modules.errors import ModelError
from modules.options import Options


def _load(path: Path, options: Options, progress: Progress, cancel: CancelToken) -> Backend:
    try:
        from modules.backends.transformers.backend import load
    except ImportError as error:
        raise ModelError(
            f"The Transformers loader needs a package that is not installed ({error.name}): pip install -r requirements-torch.txt"
        ) from None

    return load(path, cast(TransformersOptions, options), progress, cancel)


LOADER = Loader(
    name="Transformers",
    options=TransformersOptions,
    detect=is_model_folder,
    load=_load,
    samplers=SUPPORTED
    | {
        *("max_new_tokens", "auto_max_new_tokens", "truncation_length", "max_tokens_second", "add_bos_token", "skip_special_tokens"),
        *("custom_stopping_strings", "grammar_string", "guidance_scale", "negative_prompt", "prompt_lookup_num_tokens"),
    },
    package="transformers",
    inspected=True,
)
