"""Log-probabilities of prompts through the API beside a float32 forward pass in Transformers, from the same weights.

    python -m benchmarks.prompt_logprobs [MODEL.gguf]

Ten texts of 50 to 200 tokens, `POST /v1/completions` with echo, max_tokens 0 and logprobs. Twice: from the dequantised model written as a float32
GGUF file, and from the file itself, whose quantised weights llama.cpp multiplies with numbers rounded to 8 bits.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx

from benchmarks.reference_model import STARTER, TEXTS, Reference, file_of, folder_of
from modules import app, settings
from modules.api.server import ApiServer, build_api
from modules.guard import Hosts
from modules.listening import claim
from modules.paths import UserData
from modules.replies import TextPresenter
from modules.store import Store


@contextlib.contextmanager
def served(model: Path, folder: Path) -> Iterator[str]:
    """The API's address, with `model` loaded."""
    data = UserData(folder, model_dir=model.parent)
    data.create()
    made = app.build(settings.load(("--api",), (), (), app.option_groups()), data, Store.open(data.database), TextPresenter)
    made.models.load(made.models.choose(model.name))
    listener = claim("127.0.0.1", 0)
    server = ApiServer(build_api(made, lambda: Hosts.build(False)), listener)
    server.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.stop()
        made.close()


def differences(model: Path, folder: Path, reference: Reference) -> list[float]:
    """|API − Transformers| for every token of every text, from each text's second token on."""
    found = []
    with served(model, folder) as url, httpx.Client(base_url=url, timeout=300) as client:
        for text in TEXTS:
            answer = client.post("/v1/completions", json={"prompt": text, "echo": True, "max_tokens": 0, "logprobs": 1})
            answer.raise_for_status()
            ours = answer.json()["choices"][0]["logprobs"]["token_logprobs"][1:]
            tokens = reference.encode(text)
            theirs = reference.logprobs(tokens)[range(len(tokens) - 1), tokens[1:]].tolist()
            found += [abs(one - other) for one, other in zip(ours, theirs, strict=True)]
    return found


def main() -> None:
    """Measure and print."""
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else STARTER
    with tempfile.TemporaryDirectory() as place:
        folder = folder_of(model, Path(place))
        reference = Reference(folder)
        print(f"{len(TEXTS)} texts of {min(lengths := [len(reference.encode(text)) for text in TEXTS])} to {max(lengths)} tokens")
        for what, file, wanted in (("float32 GGUF", file_of(folder, "F32"), "wanted <= 0.002"), (model.name, model, "no bound")):
            found = differences(file, Path(place) / what, reference)
            print(f"{what}: mean |difference| {statistics.mean(found):.6f}, largest {max(found):.4f}, {len(found)} tokens ({wanted})", flush=True)


if __name__ == "__main__":
    main()
