"""TransformersBackend: a model of Hugging Face Transformers as a Backend, in the server's process."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from modules.backends.base import CancelToken, Chunk, Embeddings, EngineStats, GenerationRequest, Progress, Timings
from modules.backends.torch_samplers import Sampler
from modules.backends.transformers.adapters import Adapters, key_of
from modules.backends.transformers.decoders import AloneDecoder, Decoder, PackedDecoder, packable
from modules.backends.transformers.engine import DURING, UNLOADED, Engine, Limits
from modules.backends.transformers.grammar import Grammars
from modules.backends.transformers.jobs import Job, Track
from modules.backends.transformers.load import LoadedModel, explained, find_source, free_memory, load_model
from modules.backends.transformers.options import TransformersOptions
from modules.backends.transformers.progress import check_cancel
from modules.backends.transformers.speculation import DraftModel, Guesser, from_text
from modules.backends.transformers.text import Text, TextStream
from modules.backends.transformers.vision import Vision
from modules.errors import Busy, EngineDied, ModelError, NoModel, PromptError, PromptTooLong
from modules.log import logger

FEW_CHARACTERS = 100_000
"""A prompt of so many is tokenised, and its tokens counted, however small the context."""


def load(path: Path, options: TransformersOptions, progress: Progress, cancel: CancelToken) -> TransformersBackend:
    """Load the folder or GGUF file `path`. Raises ModelError with the reason and the fix."""
    source = find_source(path, options)
    draft_source = find_source(Path(options.model_draft), options) if options.model_draft else None
    loaded = load_model(source, options, progress, cancel)
    with explained(source, options):
        backend = TransformersBackend(source.name, loaded, options)
    try:
        if draft_source:
            backend.draft_with(load_model(draft_source, options, progress, cancel), options.draft_max)
        check_cancel(cancel)
    except ModelError:
        backend.unload()
        raise
    progress(1.0, "Loaded")
    return backend


class TransformersBackend:
    """A loaded model with its engine. Satisfies `Backend` and the protocols beside it; methods may be called from any thread."""

    def __init__(self, name: str, loaded: LoadedModel, options: TransformersOptions) -> None:
        self.name = name
        self.context_length = loaded.context_length
        self._options = options
        self._model: Any = loaded.model
        self._encodes = bool(loaded.model.config.is_encoder_decoder)
        self._text = Text(loaded.tokenizer, loaded.model.get_input_embeddings().weight.shape[0])
        self._vision = Vision(loaded.processor) if loaded.processor is not None else None
        self.image_marker = self._vision.marker if self._vision else ""
        self.chat_template = _template(loaded.processor) or _template(loaded.tokenizer)
        self.bos_token = loaded.tokenizer.bos_token or ""
        self.eos_token = loaded.tokenizer.eos_token or ""
        self._ends = _ends(loaded)
        self._spared = (*self._ends, *self._text.encode("\n"))
        self._grammars = Grammars(self._text, self._ends)
        self._adapters = Adapters(loaded.model, options.allow_pickle)
        self._guesser: Guesser | None = None
        decoder = self._decoder(loaded)
        # a model that sees may keep where its images were in itself: then only one reply at a time is right
        parallel = 1 if self._vision else options.parallel or max(1, self.context_length // 2048)
        kept = self.context_length if options.kept_tokens < 0 else options.kept_tokens
        limits = Limits(parallel, options.max_queue, options.batch_size, options.prefill_share, self.context_length, 0 if self._encodes else kept)
        self._engine = Engine(decoder, self._adapters, limits)
        self.features = self._features(loaded)

    def _decoder(self, loaded: LoadedModel) -> Decoder:
        reason = "its context's cache is quantized" if self._options.cache_kind != "dynamic" else ""
        reason = reason or ("it sees images" if self._vision else "") or ("it has an encoder" if self._encodes else "")
        reason = reason or ("it is compiled" if self._options.torch_compile else "") or packable(loaded.model)
        logger.info("%s: %s", self.name, f"replies are computed one by one, because {reason}" if reason else "replies are computed together")
        if self._options.torch_compile:
            loaded.model.compile(dynamic=True)
        return AloneDecoder(loaded.model, self._options.cache_kind) if reason else PackedDecoder(loaded.model)

    def _features(self, loaded: LoadedModel) -> frozenset[str]:
        found = {"generate", "parallel", "logprobs", "embeddings", "stats"}
        found |= {"grammar"} if loaded.tokenizer.is_fast and importlib.util.find_spec("llguidance") else set()
        found |= {"adapters"} if importlib.util.find_spec("peft") else set()
        found |= {"images"} if self._vision else set()
        return frozenset(found | (set() if self._encodes else {"prefill"}))

    def draft_with(self, loaded: LoadedModel, count: int) -> None:
        """Let another model write ahead, `count` tokens at most. Raises ModelError when its tokens are not the same."""
        sample = "The quick brown fox, 12345; naïve café\n\n\tdef main(): return 'x'"
        if list(loaded.tokenizer(sample)["input_ids"]) != list(self._text.tokenizer(sample)["input_ids"]):
            raise ModelError("The draft model has other tokens than the model. Choose a small model of the same family.")
        decoder: Decoder = PackedDecoder(loaded.model) if not packable(loaded.model) else AloneDecoder(loaded.model)
        if decoder.croppable:
            self._guesser = DraftModel(decoder, self._text.vocabulary, count)
        else:
            logger.warning("The draft model's cache cannot be cut back, so nothing is guessed ahead.")

    # --- the Backend protocol -----------------------------------------------------------------------------------------------------------------

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """See `Backend.encode`."""
        return self._text.encode(text, add_bos)

    def decode(self, tokens: list[int] | tuple[int, ...]) -> str:
        """See `Backend.decode`. Raises PromptError for a token that the model does not have."""
        self._text.check(tokens)
        return self._text.decode(tokens)

    def generate(self, request: GenerationRequest) -> Iterator[Chunk]:
        """See `Backend.generate`. Busy when too many requests wait."""
        if not self.alive():
            raise NoModel(UNLOADED)
        if request.cancel.cancelled:
            yield Chunk(finish_reason="cancelled", timings=Timings())
            return
        job = self._job(request)
        for adapter in request.adapters:
            self.load_adapter(adapter.path)
        yield from self._chunks(job, request)

    def _chunks(self, job: Job, request: GenerationRequest) -> Iterator[Chunk]:
        self._engine.submit(job)
        request.cancel.on_cancel(lambda: self._engine.cancel(job))
        try:
            while True:
                try:
                    chunk = job.chunks.get(timeout=1.0)
                except Empty:
                    if not self._engine.alive() and job.chunks.empty():
                        raise EngineDied(DURING) from None
                    continue
                if isinstance(chunk, Exception):
                    raise chunk
                yield chunk
                if chunk.finish_reason:
                    return
        finally:
            if not job.ended:
                self._engine.cancel(job)

    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._engine.alive()

    def memory(self) -> int:
        """Bytes of weights and caches in main memory."""
        model = self._model
        if model is None:
            return 0
        weights = sum(each.nbytes for each in [*model.parameters(), *model.buffers()] if each.device.type == "cpu")
        return int(weights + (self._engine.cache_bytes() if model.device.type == "cpu" else 0))

    def unload(self) -> None:
        """See `Backend.unload`."""
        self._engine.close()
        self._model = self._guesser = None
        self._adapters = Adapters(None)
        free_memory()

    # --- what it has besides --------------------------------------------------------------------------------------------------------------------

    def prefill(self, request: GenerationRequest) -> None:
        """See `Prefilling.prefill`."""
        if not self.alive() or request.cancel.cancelled:
            return
        job = self._job(request, writes=False)
        for adapter in request.adapters:
            self.load_adapter(adapter.path)
        for _ in self._chunks(job, request):
            pass

    @property
    def adapters(self) -> tuple[Path, ...]:
        """See `Adapting.adapters`."""
        return self._adapters.paths

    def load_adapter(self, path: Path) -> None:
        """See `Adapting.load_adapter`."""
        path = path.resolve()
        if path not in self._adapters.paths:
            self._engine.between_steps(lambda: self._adapters.load(path))

    def unload_adapter(self, path: Path) -> None:
        """See `Adapting.unload_adapter`."""
        path = path.resolve()

        def named(key: Any) -> bool:
            return key is not None and any(used == str(path) for used, _ in key)

        def unload() -> None:
            if self._engine.uses(named):
                raise Busy(f"A reply is being written with {path.name}. Stop it first, or wait for its end.")
            self._engine.forget(named)
            self._adapters.unload(path)

        if path in self._adapters.paths:
            self._engine.between_steps(unload)

    def embed(self, texts: Sequence[str | tuple[int, ...]], cancel: CancelToken) -> Embeddings:
        """See `Embedding.embed`: the mean of the last layer's states."""
        asked = [self._text.encode(text, True) if isinstance(text, str) else list(text) for text in texts]
        for number, tokens in enumerate(asked, 1):
            self._text.check(tokens)
            if not tokens:
                raise PromptError(f"Text {number} is empty. Leave it out.")
            if len(tokens) > self.context_length:
                raise PromptTooLong(f"Text {number} has {len(tokens)} tokens and the context holds {self.context_length}. Shorten it.")
        vectors = []
        for tokens in asked:
            if cancel.cancelled:
                return Embeddings((), 0)
            vectors.append(self._engine.between_steps(self._pooling(tokens)))
        return Embeddings(tuple(vectors), sum(map(len, asked)))

    def _pooling(self, tokens: list[int]) -> Callable[[], tuple[float, ...]]:
        def pooled() -> tuple[float, ...]:
            mean = self._engine.hidden(tokens).mean(0)
            return tuple(torch.nn.functional.normalize(mean, dim=0).tolist())

        return pooled

    def stats(self) -> EngineStats:
        """See `Measured.stats`."""
        return replace(self._engine.stats(), memory_bytes=self.memory())

    # --- from a request to a job ------------------------------------------------------------------------------------------------------------------

    def _job(self, request: GenerationRequest, writes: bool = True) -> Job:
        params = request.sampling
        tokens, extra = self._prompt(request)
        _check_length(tokens, self.context_length)
        self._text.check(tokens)
        room = self.context_length - (0 if self._encodes else len(tokens))
        limit = room if request.max_new_tokens is None else min(room, request.max_new_tokens)
        negative = self._negative(params.negative_prompt) if writes and params.guidance_scale != 1 and not extra and not self._encodes else None
        limit = min(limit, self.context_length - len(negative)) if negative else limit
        breakers = self._text.containing(params.breakers) if params.dry_multiplier and params.breakers else frozenset()
        grammar = (params.grammar_string, request.json_schema) if writes else ("", "")
        return Job(
            request,
            Track(tokens, extra=extra),
            limit if writes else 0,
            Sampler(params, request.seed, len(tokens), self._ends, request.logit_bias, breakers, self._spared) if writes else None,
            TextStream(lambda some: self._text.decode(some, special=not params.skip_special_tokens), [] if self._encodes else tokens),
            lambda token: self._text.decode([token]),
            frozenset(self._ends),
            key_of(request.adapters),
            Track(negative) if negative else None,
            self._grammars.follower(*grammar),
            reuse=not extra and not self._encodes,
            guesser=from_text(params.prompt_lookup_num_tokens) if params.prompt_lookup_num_tokens else self._guesser,
        )

    def _prompt(self, request: GenerationRequest) -> tuple[list[int], Any]:
        prompt = request.prompt
        if request.images:
            if self._vision is None:
                raise ModelError("This model cannot see images. Send the message without images, or load a model that can.")
            if not isinstance(prompt, str):
                raise PromptError("A prompt with images must be text. Send it as text with the images' marker.")
            return self._vision.read(prompt, request.images)
        if not isinstance(prompt, str):
            return list(prompt), None
        if len(prompt) > max(FEW_CHARACTERS, self._text.longest * self.context_length):
            raise PromptTooLong(f"The prompt has {len(prompt)} characters and the context holds {self.context_length} tokens. Shorten it.")
        return self._text.with_ends(prompt) if self._encodes else self._text.encode(prompt, request.sampling.add_bos_token), None

    def _negative(self, text: str) -> list[int]:
        """The negative prompt's tokens: where there is no text, one that says nothing."""
        tokens = self._text.encode(text, add_bos=True) or [self._text.bos if self._text.bos is not None else self._spared[0]]
        self._text.check(tokens)
        if len(tokens) >= self.context_length:
            raise PromptTooLong(f"The negative prompt has {len(tokens)} tokens and the context holds {self.context_length}. Shorten it.")
        return tokens


def _check_length(tokens: Sequence[int], context_length: int) -> None:
    if not tokens:
        raise PromptError("The prompt is empty. Write something first.")
    if len(tokens) > context_length:
        raise PromptTooLong(
            f"The prompt has {len(tokens)} tokens and the context holds {context_length}. Shorten it, or load the model with a larger --ctx-size."
        )


def _template(holder: Any) -> str | None:
    """The chat template of a tokenizer or processor; of several, the default one."""
    found = getattr(holder, "chat_template", None)
    if isinstance(found, dict):
        found = found.get("default") or next(iter(found.values()), None)
    return found if isinstance(found, str) else None


def _ends(loaded: LoadedModel) -> tuple[int, ...]:
    """The tokens that end a reply, as the model and the tokenizer name them."""
    configured = getattr(loaded.model.generation_config, "eos_token_id", None)
    named = configured if isinstance(configured, list) else [configured]
    return tuple(dict.fromkeys(token for token in [*named, loaded.tokenizer.eos_token_id] if isinstance(token, int)))
