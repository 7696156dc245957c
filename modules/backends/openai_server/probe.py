"""What a server is and can do, found out once when its model is loaded: its kind, the model, its context, its template, its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from modules.backends.base import CancelToken, Progress
from modules.backends.openai_server.options import OpenAIServerOptions
from modules.backends.openai_server.payload import CHAT_TEMPLATE, Kind
from modules.backends.openai_server.wire import Json, Refused, Wire, error_of
from modules.errors import ModelError, PromptError
from modules.log import logger
from modules.options import nearest

DEFAULT_CONTEXT = 4096
ESTIMATE_BYTES = 3
MAX_MODELS = 1000
ASK_SECONDS = 15.0
_ABSENT = (404, 405, 501)
_OWNERS: dict[str, Kind] = {"llamacpp": "llama.cpp", "vllm": "vllm", "me": "llama_cpp.server"}
"""`owned_by` of a server's models → its kind."""


class Tokenizer:
    """Text to numbers and back, as the server does it."""

    exact = True

    def __init__(self, wire: Wire, encode: tuple[str, Callable[[str, bool], Json]], decode: tuple[str, Callable[[Sequence[int]], Json], str]) -> None:
        """Path and body of each kind of request; the answer to encoding has `tokens`, that to decoding the text under the last of `decode`."""
        self._wire, self._encode, self._decode = wire, encode, decode
        bos = self._raw("", True)
        self.bos: tuple[int, ...] = tuple(bos[:1])

    def _raw(self, text: str, special: bool) -> list[int]:
        path, body = self._encode
        found = self._wire.ask("POST", path, body(text, special), seconds=ASK_SECONDS)
        tokens = found.get("tokens") if isinstance(found, dict) else None
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise ModelError("The server's tokenizer answers in a form that is not known here.")
        return tokens

    def encode(self, text: str) -> list[int]:
        """Without BOS."""
        return self._raw(text, False) if text else []

    def decode(self, tokens: Sequence[int]) -> str:
        """Raises PromptError for numbers that are no tokens."""
        if not tokens:
            return ""
        path, body, key = self._decode
        if not all(0 <= token < 2**31 for token in tokens):
            raise PromptError("There are numbers in this that are no tokens of the model.")
        try:
            found = self._wire.ask("POST", path, body(tokens), seconds=ASK_SECONDS)
        except Refused as refused:
            raise PromptError(f"These numbers are no tokens of the model. The server says: {refused.message}.") from None
        text = found.get(key) if isinstance(found, dict) else None
        if not isinstance(text, str):
            raise PromptError("The server does not tell the text of these tokens.")
        return text


class Estimate:
    """For servers without a tokenizer: three bytes of UTF-8 count as one token, and its number is these bytes.

    English has four or five bytes a token, other languages two to four: a prompt is rather counted too long than too short. The numbers mean
    nothing to the server, which gets the text.
    """

    exact = False
    bos: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        """One number for each three bytes; the highest byte tells how many they are."""
        data = text.encode("utf-8")
        pieces = [data[at : at + ESTIMATE_BYTES] for at in range(0, len(data), ESTIMATE_BYTES)]
        return [len(piece) << 24 | int.from_bytes(piece, "big") for piece in pieces]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text whose estimate this is. Raises PromptError for other numbers."""
        try:
            return b"".join((token & 0xFFFFFF).to_bytes(_length(token), "big") for token in tokens).decode("utf-8", "replace")
        except (OverflowError, ValueError):
            raise PromptError("There are numbers in this that are no tokens: this server has no tokenizer, so they are made up here.") from None


def _length(token: int) -> int:
    if not 1 <= token >> 24 <= ESTIMATE_BYTES:
        raise ValueError(token)
    return token >> 24


@dataclass(frozen=True)
class Server:
    """What was found out."""

    kind: Kind
    model: str
    context_length: int
    tokenizer: Tokenizer | Estimate
    takes_tokens: bool
    """Whether a prompt may be token ids."""
    completes: bool
    """Whether it has /v1/completions. Without it, it can only chat."""
    chat_template: str | None = None
    bos_token: str = ""
    eos_token: str = ""


def model_entries(wire: Wire, cancel: CancelToken | None = None) -> list[Json]:
    """The entries of /v1/models. Raises Refused, EngineDied, ModelError."""
    found = wire.ask("GET", "/v1/models", cancel=cancel, seconds=ASK_SECONDS)
    data = found.get("data") if isinstance(found, dict) else None
    entries = [entry for entry in data[:MAX_MODELS] if isinstance(entry, dict) and isinstance(entry.get("id"), str)] if isinstance(data, list) else []
    return [entry for entry in entries if 0 < len(entry["id"]) <= 300 and entry["id"].isprintable()]


def look(wire: Wire, options: OpenAIServerOptions, model: str, progress: Progress, cancel: CancelToken) -> Server:
    """Find out what the server is. Raises ModelError, EngineDied, Busy."""
    progress(0.1, f"Asking {wire.host} for its models")
    try:
        entries = model_entries(wire, cancel)
    except Refused as refused:
        if refused.status not in _ABSENT:
            raise error_of(refused, wire.host, model) from None
        entries = []
    entry = _entry(entries, model, wire.host)
    kind = _kind(entry)
    progress(0.3, "Asking what it can do")
    props = _props(wire, cancel) if kind == "llama.cpp" else {}
    tokenizer = _tokenizer(wire, kind, entry["id"], cancel)
    progress(0.6, "Trying it")
    completes, takes_tokens = _tried(wire, kind, entry["id"], tokenizer, cancel)
    template = _text(props, "chat_template") or (CHAT_TEMPLATE if _chats(wire, kind, entry["id"], cancel) else None)
    if not completes and template != CHAT_TEMPLATE:
        raise ModelError(f"{wire.host} has neither /v1/completions nor /v1/chat/completions. Correct the address (--server-url).")
    context = options.server_context or _context(entry, props)
    if not context:
        context = DEFAULT_CONTEXT
        logger.warning("%s does not say how long its context is; %d tokens are assumed. Set --server-context.", wire.host, context)
    special = {"bos_token": _text(props, "bos_token"), "eos_token": _text(props, "eos_token")}
    return Server(kind, entry["id"], context, tokenizer, takes_tokens, completes, template, **special)


def _entry(entries: list[Json], model: str, host: str) -> Json:
    """The wanted model's. One that is not listed is taken as it is where the list tells nothing, as that of a router."""
    if not model:
        loaded = [entry for entry in entries if entry.get("loaded")] or entries
        if not loaded:
            raise ModelError(f"{host} lists no models. Give the name of one with --server-model.")
        return loaded[0]
    for entry in entries:
        if entry["id"] == model:
            return entry
    names = [entry["id"] for entry in entries]
    if names and names != ["unknown"]:
        raise ModelError(f"{host} has no model {model[:100]!r}; it has {', '.join(names[:5])}.{nearest(model[:100], names)}")
    return {"id": model}


def _kind(entry: Json) -> Kind:
    owner = str(entry.get("owned_by", ""))
    if owner == "local" and "loaded" in entry:
        return "ours"
    return _OWNERS.get(owner, "unknown")


def _asked(wire: Wire, method: str, path: str, body: Json | None, cancel: CancelToken, seconds: float = ASK_SECONDS) -> Json | int:
    """The answer's object, or the status that the server refused with."""
    try:
        found = wire.ask(method, path, body, cancel, seconds)
    except Refused as refused:
        if refused.status in (401, 403, 429, 503):
            raise error_of(refused, wire.host, "") from None
        return refused.status
    return found if isinstance(found, dict) else {}


def _props(wire: Wire, cancel: CancelToken) -> Json:
    found = _asked(wire, "GET", "/props", None, cancel)
    return found if isinstance(found, dict) else {}


def _tokenizer(wire: Wire, kind: Kind, model: str, cancel: CancelToken) -> Tokenizer | Estimate:
    """The server's, where it is of a kind that has one and it works."""
    forms: dict[Kind, Any] = {
        "llama.cpp": (
            ("/tokenize", lambda text, special: {"content": text, "add_special": special, "parse_special": True}),
            ("/detokenize", lambda tokens: {"tokens": list(tokens)}, "content"),
        ),
        "vllm": (
            ("/tokenize", lambda text, special: {"model": model, "prompt": text, "add_special_tokens": special}),
            ("/detokenize", lambda tokens: {"model": model, "tokens": list(tokens)}, "prompt"),
        ),
        "ours": (
            ("/v1/internal/encode", lambda text, special: {"text": text, "add_bos_token": special}),
            ("/v1/internal/decode", lambda tokens: {"tokens": list(tokens)}, "text"),
        ),
    }
    if kind in forms:
        try:
            found = Tokenizer(wire, *forms[kind])
            if found.decode(found.encode("Hello there")) == "Hello there":
                return found
        except (Refused, PromptError, ModelError) as error:
            if cancel.cancelled:
                raise ModelError("Loading was cancelled.") from None
            logger.warning("The tokenizer of %s cannot be used, lengths are estimated: %s", wire.host, error)
    return Estimate()


def _tried(wire: Wire, kind: Kind, model: str, tokenizer: Tokenizer | Estimate, cancel: CancelToken) -> tuple[bool, bool]:
    """Whether it has completions, and whether of token ids too. Makes one token; a server that loads models when asked does it here."""
    body: Json = {"model": model, "prompt": "Hello", "max_tokens": 1}
    if tokenizer.exact:
        found = _asked(wire, "POST", "/v1/completions", {**body, "prompt": [*tokenizer.bos, *tokenizer.encode("Hello")]}, cancel, wire.timeout)
        if isinstance(found, dict):
            return True, True
    found = _asked(wire, "POST", "/v1/completions", body, cancel, wire.timeout)
    if isinstance(found, int) and found not in (*_ABSENT, 400, 403):
        raise error_of(Refused(found, "", 0), wire.host, model)
    return isinstance(found, dict), False


def _chats(wire: Wire, kind: Kind, model: str, cancel: CancelToken) -> bool:
    """Whether it has /v1/chat/completions: a request without messages is refused otherwise than a route that is not there."""
    found = _asked(wire, "POST", "/v1/chat/completions", {"model": model, "messages": [], "max_tokens": 1}, cancel, wire.timeout)
    return isinstance(found, dict) or found not in _ABSENT


def _context(entry: Json, props: Json) -> int:
    settings = props.get("default_generation_settings")
    meta = entry.get("meta")
    places = [props.get("n_ctx"), *(entry.get(name) for name in ("max_model_len", "context_length", "context_window"))]
    places += [values.get("n_ctx") for values in (settings, meta) if isinstance(values, dict)]
    return next((value for value in places if isinstance(value, int) and 0 < value < 2**31), 0)


def _text(values: Json, key: str) -> str:
    value = values.get(key)
    return value if isinstance(value, str) else ""
