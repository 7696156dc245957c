"""The same model in Transformers, computed in float32, beside which llama.cpp's results are put; and the prompts for both."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from modules.backends.base import CancelToken, GenerationRequest, TokenLogprob
from modules.backends.llama_cpp import LOADER
from modules.backends.llama_cpp.client import LlamaCppBackend
from modules.convert.gguf_to_hf import gguf_to_hf
from modules.convert.hf_to_gguf import Kind, hf_to_gguf
from modules.convert.output import Report
from modules.samplers import NEUTRAL

STARTER = Path(__file__).resolve().parent.parent / "user_data" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
GREEDY = NEUTRAL.replace({"temperature": 0})
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "How many legs has a spider?",
    "Write one sentence about the sea.",
    "Why is the sky blue?",
    "Translate 'good morning' to Spanish.",
    "What is 12 times 12?",
    "Who wrote Romeo and Juliet?",
    "Give me a recipe for pancakes.",
    "What is photosynthesis?",
    "List the planets of the solar system.",
    "What does a carpenter do?",
    "Tell me a short story about a fox.",
    "How do I boil an egg?",
    "What is the largest ocean?",
    "Explain gravity to a child.",
    "What is the opposite of hot?",
    "Write a haiku about winter.",
    "When did the Second World War end?",
    "What is a prime number?",
)
TEXTS = (
    "The river rises in the hills to the north of the town and runs for about sixty miles before it reaches the sea. In the last century it was "
    "used to carry coal and timber, and the remains of eleven locks can still be seen along its banks. Today it is known for its trout.",
    'def mean(values):\n    """The arithmetic mean of a list of numbers."""\n    if not values:\n        raise ValueError(\'no values\')\n'
    "    return sum(values) / len(values)\n\n\ndef median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n",
    "Photosynthesis is the process by which green plants turn light, water and carbon dioxide into sugar and oxygen. It takes place in the "
    "chloroplasts, which hold a green pigment called chlorophyll. The first stage needs light; the second, known as the Calvin cycle, does not.",
    "On 14 July 1789 a crowd stormed the Bastille, a prison in the east of Paris that held only 7 prisoners at the time. The event cost 98 of the "
    "attackers their lives. It is remembered as the beginning of the French Revolution, and since 1880 the day has been a national holiday.",
    "Dear Mrs Allen,\n\nThank you for your letter of the 3rd of March. We are sorry that the two chairs you ordered arrived with a broken leg. "
    "We will of course replace them without any cost to you, and our driver will call on Tuesday between 10 and 12 o'clock.\n\nYours sincerely,\n",
    "To make bread, mix 500 g of flour with 10 g of salt and 7 g of dried yeast. Add 320 ml of warm water and knead the dough for ten minutes until "
    "it is smooth. Let it rise for an hour, shape it into a loaf, let it rise again, and bake it at 220 °C for 35 minutes.",
    "The old man sat by the window and watched the snow fall on the empty street. Nobody had come to see him since the autumn, and he no longer "
    "expected anybody. So when there was a knock at the door, quiet but clear, he thought at first that he had imagined it.",
    "Water boils at 100 degrees Celsius at sea level, but at a lower temperature where the air is thinner. On the top of Mount Everest, 8,849 "
    "metres high, it boils at about 68 degrees. That is why it takes longer to cook potatoes in the mountains, and why pressure cookers help.",
    "Question: A train leaves the station at 9:15 and travels at 80 kilometres per hour. A second train leaves at 9:45 and travels at 100 kilometres "
    "per hour in the same direction. When will the second train reach the first?\nAnswer: The first train has a head start of 40 kilometres, and the",
    "Honey bees live in colonies of up to 60,000 insects. Each colony has one queen, who lays the eggs, a few hundred drones, and workers, who do "
    "everything else: they clean the hive, feed the larvae, build the combs, guard the entrance and, at the end of their lives, gather nectar.",
)


def chat(question: str) -> str:
    """The prompt of a question, in the starter model's template."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def folder_of(model: Path, place: Path) -> Path:
    """The GGUF file `model` as a float32 folder in `place`."""
    gguf_to_hf(model, place / "folder", "float32", Report(io.StringIO()))
    return place / "folder"


def file_of(folder: Path, kind: Kind) -> Path:
    """The folder as a GGUF file beside it."""
    target = folder.parent / f"{kind}.gguf"
    hf_to_gguf(folder, target, kind, Report(io.StringIO()))
    return target


class Reference:
    """A folder in Transformers, in float32. Log-probabilities are tensors (tokens, vocabulary)."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch = torch
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens in it recognised."""
        return cast("list[int]", self.tokenizer(text).input_ids)

    def logprobs(self, tokens: Sequence[int]) -> Any:
        """Of what comes after each of `tokens`, from one forward pass."""
        with self._torch.no_grad():
            return self._torch.log_softmax(self.model(self._torch.tensor([list(tokens)])).logits[0].float(), -1)

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """At most `count` best tokens after `tokens`; fewer when the model ends."""
        with self._torch.no_grad():
            written = self.model.generate(self._torch.tensor([list(tokens)]), max_new_tokens=count, do_sample=False)
        return cast("list[int]", written[0, len(tokens) :].tolist())


@contextlib.contextmanager
def llama_cpp(model: Path, **options: Any) -> Iterator[LlamaCppBackend]:
    """The model in llama.cpp, with the options of the program's loader."""
    backend = LOADER.load(model, LOADER.options.build({"ctx_size": 2048, **options}), lambda *_: None, CancelToken())
    try:
        yield cast(LlamaCppBackend, backend)
    finally:
        backend.unload()


def greedy(backend: LlamaCppBackend, tokens: Sequence[int], count: int, logprobs: int = 0) -> tuple[list[int], list[TokenLogprob]]:
    """At most `count` best tokens after `tokens`, and what else was likely."""
    chunks = list(backend.generate(GenerationRequest(tuple(tokens), GREEDY, count, logprobs=logprobs)))
    return [token for chunk in chunks for token in chunk.token_ids], [entry for chunk in chunks for entry in chunk.logprobs]


def prompt_logprobs(backend: LlamaCppBackend, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """The prompt's own tokens from the second on, each with `top` alternatives."""
    chunks = backend.generate(GenerationRequest(tuple(tokens), GREEDY, 1, prompt_logprobs=top))
    return [entry for chunk in chunks for entry in chunk.prompt_logprobs]
