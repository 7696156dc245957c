"""What computes: sequences with their cache, and the two ways to compute them. Imports torch: only when a model is loaded.

`PackedDecoder` puts the new tokens of all sequences behind each other into one forward pass, as [1, tokens]. Everything in a model but
attention looks at one token; attention is computed for each sequence with its own keys and values. So nothing is padded, prompts and
replies go together, and a sequence may bring several tokens (a piece of a prompt, guesses). `AloneDecoder` computes one sequence after the
other with the library's own cache: for models that cannot be packed (recurrent, encoder-decoder, with images) and special caches.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel, QuantizedCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PACKED = "packed_sequences"
"""Name of our attention in transformers' registry."""
ROUND = 256
"""Cells by which a sequence's memory grows at least."""


class State(Protocol):
    """What is computed of one sequence."""

    length: int
    """Tokens."""

    @property
    def nbytes(self) -> int:
        """Memory of the cache."""
        ...


@dataclass(frozen=True)
class Part:
    """The next tokens of a sequence; logits are wanted of the last `outputs` of them. `extra`: an image's tensors, with the first tokens."""

    state: Any
    tokens: Sequence[int]
    outputs: int
    extra: Any = None


class Decoder(Protocol):
    """Computes. One thread."""

    croppable: bool
    """Whether a sequence can be cut back; if not, only whole sequences can go on."""
    whole: bool
    """Whether a prompt must be computed in one piece."""
    repeatable: bool
    """Whether a run that failed leaves the sequences as they were."""

    def new(self) -> Any:
        """An empty sequence."""
        ...

    def copy(self, state: Any, length: int) -> Any:
        """A sequence of the first `length` tokens of `state`, which stays; all of them unless `croppable`."""
        ...

    def crop(self, state: Any, length: int) -> None:
        """Cut `state` back."""
        ...

    def run(self, parts: Sequence[Part]) -> list[torch.Tensor]:
        """Compute `parts`; for each, logits of shape (outputs, vocabulary) in float32. When it fails the states are of use only if `repeatable`."""
        ...

    def hidden(self, tokens: Sequence[int]) -> torch.Tensor:
        """The last layer's states of `tokens`, of shape (tokens, width) in float32, without the sequences here."""
        ...


# --- packed -------------------------------------------------------------------------------------------------------------------------------


class PackedState:
    """Keys and values of one sequence: a pair of tensors [1, heads, cells, size] a layer, of which the first `length` cells count."""

    def __init__(self) -> None:
        self.length = 0
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Memory of the cache."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers.values())

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put what is new behind the first `length` cells; returns all keys and values up to there."""
        end = self.length + keys.shape[2]
        held = self.layers.get(layer)
        if held is None or held[0].shape[2] < end:
            self.layers[layer] = held = self._room(held, keys, values, end)
        held[0][:, :, self.length : end] = keys
        held[1][:, :, self.length : end] = values
        return held[0][:, :, :end], held[1][:, :, :end]

    def _room(self, held: Any, keys: torch.Tensor, values: torch.Tensor, cells: int) -> tuple[torch.Tensor, torch.Tensor]:
        cells = -(-max(cells, self.length * 5 // 4) // ROUND) * ROUND
        made = [each.new_empty((1, each.shape[1], cells, each.shape[3])) for each in (keys, values)]
        for new, old in zip(made, held or (), strict=False):
            new[:, :, : self.length] = old[:, :, : self.length]
        return made[0], made[1]


@dataclass(frozen=True)
class _Piece:
    start: int
    end: int
    keys: torch.Tensor
    values: torch.Tensor
    past: int


_Shape = tuple[int, int, int, torch.device]
"""Of a mask: tokens before, tokens, window, where."""


class _Pieces:
    """What stands in place of the keys, and of the values, between our cache and our attention."""

    def __init__(self, pieces: list[_Piece], masks: dict[_Shape, torch.Tensor]) -> None:
        self.pieces = pieces
        self._masks = masks  # the same for all layers

    def mask(self, piece: _Piece, window: int | None) -> torch.Tensor | None:
        """Which keys each query sees; None where it sees those before it, as attention does by itself."""
        count, total = piece.end - piece.start, piece.keys.shape[2]
        if count == 1 or (piece.past == 0 and (window is None or count <= window)):
            return None
        device = piece.keys.device
        key = (piece.past, count, window or 0, device)
        if key not in self._masks:
            queries = torch.arange(piece.past, total, device=device)[:, None]
            cells = torch.arange(total, device=device)[None, :]
            seen = cells <= queries
            self._masks[key] = (seen & (cells > queries - window) if window else seen)[None, None]
        return self._masks[key]


class _PackedCache(Cache):
    """The library's cache for one forward pass over `parts`."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__(layers=[])
        self._parts = parts
        self._masks: dict[_Shape, torch.Tensor] = {}

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: Any, **_kwargs: Any) -> Any:
        """Called by each layer with the keys and values of all parts behind each other."""
        pieces, start = [], 0
        for part in self._parts:
            end = start + len(part.tokens)
            keys, values = part.state.write(layer_idx, key_states[:, :, start:end], value_states[:, :, start:end])
            pieces.append(_Piece(start, end, keys, values, part.state.length))
            start = end
        found = _Pieces(pieces, self._masks)
        return found, found


def _attend(module: torch.nn.Module, query: torch.Tensor, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Attention of each sequence by itself, by the library's own function; [1, tokens, heads, size]."""
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if not isinstance(key, _Pieces):
        return sdpa(module, query, key, value, attention_mask, **kwargs)
    window = kwargs.get("sliding_window")
    found = []
    for piece in key.pieces:
        keys, values = piece.keys, piece.values
        if window and piece.end - piece.start == 1:
            keys, values = keys[:, :, -window:], values[:, :, -window:]
        found.append(sdpa(module, query[:, :, piece.start : piece.end], keys, values, key.mask(piece, window), **kwargs)[0])
    return found[0] if len(found) == 1 else torch.cat(found, 1), None


class PackedDecoder:
    """All sequences in one forward pass. See the top of the file."""

    croppable, whole, repeatable = True, False, True

    def __init__(self, model: PreTrainedModel) -> None:
        ALL_ATTENTION_FUNCTIONS.register(PACKED, _attend)
        self._model = model
        model.set_attn_implementation(PACKED)
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def new(self) -> PackedState:
        """See `Decoder.new`."""
        return PackedState()

    def copy(self, state: PackedState, length: int) -> PackedState:
        """See `Decoder.copy`."""
        made = PackedState()
        for layer, (keys, values) in state.layers.items():
            made.write(layer, keys[:, :, :length], values[:, :, :length])
        made.length = length
        return made

    def crop(self, state: PackedState, length: int) -> None:
        """See `Decoder.crop`."""
        state.length = min(state.length, length)

    @torch.inference_mode()
    def run(self, parts: Sequence[Part]) -> list[torch.Tensor]:
        """See `Decoder.run`."""
        tokens = [token for part in parts for token in part.tokens]
        places = [place for part in parts for place in range(part.state.length, part.state.length + len(part.tokens))]
        device = self._model.device
        wanted = torch.tensor(_outputs(parts), dtype=torch.long, device=device)
        kept = {"logits_to_keep": wanted} if self._keeps and len(wanted) else {}
        logits = self._model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.tensor([places], device=device),
            past_key_values=_PackedCache(parts),
            use_cache=True,
            **kept,
        ).logits[0]
        logits = (logits if kept else logits[wanted]).float()
        for part in parts:
            part.state.length += len(part.tokens)
        return list(logits.split([part.outputs for part in parts]))

    @torch.inference_mode()
    def hidden(self, tokens: Sequence[int]) -> torch.Tensor:
        """See `Decoder.hidden`."""
        device = self._model.device
        found = self._model.base_model(
            input_ids=torch.tensor([list(tokens)], device=device),
            position_ids=torch.arange(len(tokens), device=device)[None],
            past_key_values=_PackedCache([Part(self.new(), tokens, 0)]),
            use_cache=True,
        )
        return found.last_hidden_state[0].float()


def _outputs(parts: Sequence[Part]) -> list[int]:
    wanted: list[int] = []
    end = 0
    for part in parts:
        end += len(part.tokens)
        wanted += range(end - part.outputs, end)
    return wanted


# --- alone --------------------------------------------------------------------------------------------------------------------------------


class AloneState:
    """One sequence in a cache of the library."""

    def __init__(self, cache: Any) -> None:
        self.length = 0
        self.cache = cache
        self.encoded: Any = None
        """What the encoder made of the prompt."""
        self.carried: dict[str, Any] = {}

    @property
    def nbytes(self) -> int:
        """Memory of the cache, as far as it tells."""
        tensors = [getattr(layer, name, None) for layer in getattr(self.cache, "layers", ()) for name in ("keys", "values")]
        return sum(each.nbytes for each in tensors if isinstance(each, torch.Tensor))


class AloneDecoder:
    """One sequence after the other. See the top of the file."""

    repeatable = False

    def __init__(self, model: PreTrainedModel, cache_kind: str = "dynamic") -> None:
        self._model = model
        self._kind = cache_kind
        parameters = inspect.signature(model.forward).parameters
        self._keeps = "logits_to_keep" in parameters
        self._cache_name = "past_key_values" if "past_key_values" in parameters or "cache_params" not in parameters else "cache_params"
        self._encodes = bool(model.config.is_encoder_decoder)
        self.whole = self._encodes
        self.croppable = not self._encodes and _croppable(self._cache())

    def _cache(self) -> Any:
        config = self._model.config.get_text_config(decoder=True)
        if self._encodes:
            return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        return QuantizedCache("quanto", config) if self._kind == "quantized" else DynamicCache(config=config)

    def new(self) -> AloneState:
        """See `Decoder.new`."""
        return AloneState(self._cache())

    def copy(self, state: AloneState, length: int) -> AloneState:
        """See `Decoder.copy`."""
        made = copy.deepcopy(state)
        self.crop(made, length)
        return made

    def crop(self, state: AloneState, length: int) -> None:
        """See `Decoder.crop`."""
        if length < state.length:
            state.cache.crop(length - state.length)
            state.length = length

    @torch.inference_mode()
    def run(self, parts: Sequence[Part]) -> list[torch.Tensor]:
        """See `Decoder.run`."""
        return [self._one(part) for part in parts]

    def _one(self, part: Part) -> torch.Tensor:
        state, device = part.state, self._model.device
        tokens = torch.tensor([list(part.tokens)], device=device)
        fields: dict[str, Any] = {self._cache_name: state.cache, "use_cache": True}
        if self._encodes:
            if state.encoded is None:
                state.encoded = self._model.get_encoder()(input_ids=tokens, attention_mask=torch.ones_like(tokens))
                tokens = torch.tensor([[_first_of_decoder(self._model.config)]], device=device)
            shape = state.encoded.last_hidden_state.shape[:2]
            mask = torch.ones(shape, dtype=torch.long, device=device)
            fields |= {"decoder_input_ids": tokens, "encoder_outputs": state.encoded, "attention_mask": mask}
        else:
            fields |= {"input_ids": tokens, **(part.extra or {})}
            if self._keeps and part.outputs:
                fields["logits_to_keep"] = part.outputs
        found = self._model(**fields)
        state.length += len(part.tokens)
        logits = found.logits[0, len(found.logits[0]) - part.outputs :] if part.outputs else found.logits[0, :0]
        return logits.float()

    @torch.inference_mode()
    def hidden(self, tokens: Sequence[int]) -> torch.Tensor:
        """See `Decoder.hidden`. Of an encoder-decoder, the encoder's."""
        inside = self._model.get_encoder() if self._encodes else self._model.base_model
        fields = {} if self._encodes else {"use_cache": False}
        found = inside(input_ids=torch.tensor([list(tokens)], device=self._model.device), **fields)
        return found.last_hidden_state[0].float()


def _croppable(cache: Any) -> bool:
    """Whether any prefix of a sequence can be had by cutting: no window that forgets, no recurrent state."""
    from transformers.cache_utils import DynamicLayer

    layers = cache.layers
    return bool(getattr(cache, "is_croppable", True)) and all(type(layer) is DynamicLayer for layer in layers) and not any(cache.is_sliding)


def _first_of_decoder(config: Any) -> int:
    first = config.decoder_start_token_id
    return int(first if first is not None else config.bos_token_id)


# --- which of them ------------------------------------------------------------------------------------------------------------------------


def packable(model: PreTrainedModel) -> str:
    """Why this model cannot be packed: "" when its packed logits equal the library's, tried on two sequences that are mixed."""
    before = model.config._attn_implementation
    if before != "sdpa":
        return f"attention is {before}"
    one, other = _sample(model, 7, 1), _sample(model, 5, 2)
    try:
        with torch.inference_mode():
            wanted = [model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits[0, -1].float() for tokens in (one, other)]
        decoder = PackedDecoder(model)
        if model.config._attn_implementation != PACKED:
            return "its attention cannot be replaced"
        first, second = decoder.new(), decoder.new()
        decoder.run([Part(first, one[:4], 1)])
        got = decoder.run([Part(first, one[4:6], 1), Part(second, other[:-1], 1)])
        got = decoder.run([Part(second, other[-1:], 1), Part(first, one[6:], 1)])
        reason = "" if _alike(got[1][0], wanted[0]) and _alike(got[0][0], wanted[1]) else "packed it computes something else"
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, NotImplementedError, AssertionError) as error:
        reason = f"{type(error).__name__}: {str(error)[:120]}"
    if reason:
        model.set_attn_implementation(before)
    return reason


def _sample(model: PreTrainedModel, count: int, seed: int) -> list[int]:
    size: int = cast(Any, model.get_input_embeddings()).weight.shape[0]
    numbers = torch.Generator().manual_seed(seed)
    return torch.randint(min(3, size - 1), size, (count,), generator=numbers).tolist()


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two rows of logits are the same up to rounding, in any number format."""
    one, other = one - one.mean(), other - other.mean()
    return bool(torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.99)
