"""Images in prompts, by the model's own processor."""

from __future__ import annotations

import io
import secrets
from collections.abc import Sequence
from typing import Any

from modules.errors import PromptError

MAX_PIXELS = 64_000_000
MAX_BYTES = 64 << 20


class Vision:
    """Reads prompts with images. Methods may be called from any thread."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.marker = f"<image {secrets.token_hex(8)}>"
        token = getattr(processor, "image_token", None)
        self._token: str = token if isinstance(token, str) else str(getattr(token, "content", "<image>"))

    def read(self, text: str, images: Sequence[bytes]) -> tuple[list[int], dict[str, Any]]:
        """Tokens, and the tensors that the model needs with them. Raises PromptError."""
        if text.count(self.marker) != len(images):
            raise PromptError(f"The prompt has {text.count(self.marker)} places for images and {len(images)} images. Send as many of both.")
        if self._token in text:
            raise PromptError(f"A message holds {self._token!r}, which stands for an image in this model. Leave that word out.")
        pictures = [_picture(data, number) for number, data in enumerate(images, 1)]
        try:
            found = self._processor(text=[text.replace(self.marker, self._token)], images=pictures, return_tensors="pt", add_special_tokens=False)
        except (ValueError, TypeError, RuntimeError, IndexError, KeyError) as error:
            raise PromptError(f"The model's processor cannot read these images: {str(error)[:200]}. Try other ones.") from None
        tokens = found["input_ids"][0].tolist()
        return tokens, {name: value for name, value in found.items() if name not in ("input_ids", "attention_mask")}


def _picture(data: bytes, number: int) -> Any:
    from PIL import Image, UnidentifiedImageError

    if len(data) > MAX_BYTES:
        raise PromptError(f"Image {number} has {len(data) >> 20} MiB and at most {MAX_BYTES >> 20} can be read. Make it smaller.")
    try:
        picture = Image.open(io.BytesIO(data))
        if picture.width * picture.height > MAX_PIXELS:
            raise PromptError(f"Image {number} has {picture.width} × {picture.height} pixels, which is too large. Make it smaller.")
        return picture.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise PromptError(f"Image {number} cannot be read. Send it as PNG or JPEG.") from None
