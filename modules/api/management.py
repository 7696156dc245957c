"""Routes beside the two APIs: health, metrics, tokens, probabilities, prompts, stopping, models, LoRA adapters; and ranking by embeddings.

What the server is made of (loading, unloading, lists, adapters, metrics) needs the admin key; `keys.ADMIN` names the paths.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.responses import Response

from modules import adapters, loaders
from modules.api.errors import BadRequest
from modules.api.keys import Keys
from modules.api.limits import StrictRoute
from modules.api.requests import Job, chat_job, completion_jobs, not_asked, prompt_length
from modules.api.running import Part, parts, told_headers, while_there, with_model
from modules.api.schemas import (
    AdaptersRequest,
    ChatRequest,
    CompletionRequest,
    LoadRequest,
    LogitsRequest,
    RerankRequest,
    StopRequest,
    TextRequest,
    TokensRequest,
    UnloadRequest,
)
from modules.app import App
from modules.backends.base import Backend, CancelToken, Embedding, adapters_of
from modules.choices import Choice
from modules.errors import AccessDenied, NotFound
from modules.guard import headers_by_name
from modules.options import nearest
from modules.samplers import SamplingParams

Json = dict[str, Any]
Client = Callable[[Request], str]


def build_router(app: App, client: Client) -> APIRouter:
    """The routes; `client` says who asks."""
    router = APIRouter(route_class=StrictRoute)
    _add_health(router, app)
    _add_tokens(router, app)
    _add_prompts(router, app, client)
    _add_stop(router, app, client)
    _add_models(router, app)
    _add_adapters(router, app)
    _add_rerank(router, app)
    return router


def _told(body: Any, view: Json, *ignored: str) -> JSONResponse:
    """`view`, and in a header what of the request was not followed."""
    return JSONResponse(view, headers=told_headers((*ignored, *(f"{name} is unknown" for name in body.unknown()))))


def _add_health(router: APIRouter, app: App) -> None:
    async def health() -> Json:
        """Whether the server answers."""
        return {"status": "ok"}

    for path in ("/health", "/v1/health", "/v1/internal/health"):
        router.add_api_route(path, health, methods=["GET"], tags=["Server"])
        router.add_api_route(path, health, methods=["HEAD"], include_in_schema=False)

    formats: Any = {200: {"content": {"application/openmetrics-text": {"schema": {"type": "string"}}}}}

    @router.get("/metrics", tags=["Server"], response_class=PlainTextResponse, responses=formats)
    def metrics(request: Request) -> Response:
        """For a Prometheus."""
        body, content_type = app.metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})


# --- tokens and prompts -----------------------------------------------------------------------------------------------------------------


def _add_tokens(router: APIRouter, app: App) -> None:
    @router.post("/v1/internal/encode", tags=["Tokens"])
    async def to_tokens(request: Request, body: TextRequest) -> Response:
        """Token ids of a text."""
        tokens = await with_model(request, app, "", lambda backend, _: backend.encode(body.text, body.add_bos_token))
        return _told(body, {"tokens": tokens, "length": len(tokens)})

    @router.post("/v1/internal/decode", tags=["Tokens"])
    async def to_text(request: Request, body: TokensRequest) -> Response:
        """The text of token ids."""
        return _told(body, {"text": await with_model(request, app, "", lambda backend, _: backend.decode(body.tokens))})

    @router.post("/v1/internal/token-count", tags=["Tokens"])
    async def count(request: Request, body: TextRequest) -> Response:
        """How many tokens a text has."""
        tokens = await with_model(request, app, "", lambda backend, _: backend.encode(body.text, body.add_bos_token))
        return _told(body, {"length": len(tokens)})


def _add_prompts(router: APIRouter, app: App, client: Client) -> None:
    @router.post("/v1/internal/chat-prompt", tags=["Tokens"])
    async def chat_prompt(request: Request, body: ChatRequest) -> Response:
        """The exact prompt that a chat request would have. `length`: its tokens; null where images belong into it."""

        def rendered(backend: Backend, _: CancelToken) -> tuple[Job, int | None]:
            job = chat_job(app, backend, body, client(request), fitting=False)
            return job, None if job.request.images else prompt_length(backend, job)

        job, length = await with_model(request, app, body.model, rendered)
        view = {"prompt": job.prompt, "length": length}
        return JSONResponse(view, headers=told_headers(job.ignored))

    @router.post("/v1/internal/logits", tags=["Tokens"])
    async def logits(request: Request, body: LogitsRequest) -> Response:
        """The likeliest next tokens with their probabilities, before samplers."""
        job = await with_model(request, app, "", lambda backend, _: _next_token(app, backend, body, client(request)))
        view = await while_there(request, _likeliest(parts(app, [job])))
        idle = [f"{name} has no effect without use_samplers" for name in body.given(SamplingParams) if name != "add_bos_token"]
        return _told(body, view, *sorted(idle))


def _next_token(app: App, backend: Backend, body: LogitsRequest, client: str) -> Job:
    if body.use_samplers:
        what = "The engines here tell probabilities as the model gives them, before samplers, and not those after."
        raise BadRequest(f"{what} Leave use_samplers out.", "use_samplers")
    # A prompt that would end here has alternatives too: its end is no candidate for the one token that is chosen.
    asked = {"prompt": body.prompt, "max_tokens": 1, "logprobs": 1, "temperature": 0, "ban_eos_token": True, "add_bos_token": body.add_bos_token}
    made = CompletionRequest.model_validate(asked)
    job = completion_jobs(app, backend, made, client)[0]
    return replace(job, request=replace(job.request, logprobs=body.top_logits))


async def _likeliest(came: AsyncIterator[Part]) -> Json:
    """`tokens`, best first, and `logits` by text: of tokens with one text, the likeliest."""
    found = [entry async for part in came for entry in part.chunk.logprobs]
    top = found[0].top if found else ()
    tokens = [{"id": id, "text": text, "probability": math.exp(logprob)} for id, text, logprob in top]
    by_text: dict[str, float] = {}
    for each in tokens:
        by_text.setdefault(cast(str, each["text"]), cast(float, each["probability"]))
    return {"logits": by_text, "tokens": tokens}


def _add_stop(router: APIRouter, app: App, client: Client) -> None:
    keys = Keys.build(app.settings)

    @router.post("/v1/internal/stop-generation", tags=["Server"])
    def stop(request: Request, body: StopRequest | None = None) -> Response:
        """Stop the replies of one completion, or all of this client, or with the admin key all of everybody. What they said is kept."""
        body = body or StopRequest.model_validate({})
        everybody = body.id or keys.administers(headers_by_name(request.scope))
        stopped = app.stops.stop(body.id, "" if everybody else client(request))
        return _told(body, {"status": "ok", "stopped": stopped})


# --- models -----------------------------------------------------------------------------------------------------------------------------


def _add_models(router: APIRouter, app: App) -> None:
    @router.get("/v1/internal/model/info", tags=["Models"])
    def info() -> Json:
        """The model in use; its fields are null when there is none."""
        return info_view(app)

    @router.get("/v1/internal/model/list", tags=["Models"])
    def names() -> Json:
        """All models of the model folder."""
        return {"model_names": app.models.names()}

    @router.post("/v1/internal/model/load", tags=["Models"])
    async def load(body: LoadRequest) -> Response:
        """Load a model, and answer when it is done. That goes on when the client goes away meanwhile."""
        _administer(app)
        choice = await run_in_threadpool(chosen, app, body.model_name, body.loader, body.args)
        await run_in_threadpool(app.models.load, choice)
        return _told(body, {"status": "ok", **await run_in_threadpool(info_view, app)})

    @router.post("/v1/internal/model/unload", tags=["Models"])
    def unload(body: UnloadRequest | None = None) -> Response:
        """Free a model, or all. Its replies under way end with an error; a load under way is cancelled with all."""
        _administer(app)
        body = body or UnloadRequest.model_validate({})
        if body.model_name is not None and app.models.loaded_as(body.model_name) is None:
            raise NotFound(f"The model {body.model_name[:200]!r} is not in memory. GET /v1/models tells which are: those with loaded true.")
        app.models.unload(body.model_name)
        return _told(body, {"status": "ok"})


def _administer(app: App) -> None:
    """Raises AccessDenied. That the admin key was given is seen to by the guard."""
    if app.settings.multi_user and not app.settings.admin_key:
        raise AccessDenied("In multi-user mode the model is chosen where the server is started, or with a key of its own: start it with --admin-key.")


def info_view(app: App) -> Json:
    """What is known of the model in use."""
    status, backend = app.models.status(), app.models.loaded_backend()
    if backend is None:
        nothing: Json = {"model_name": None, "lora_names": [], "loader": None, "context_length": None, "capabilities": [], "samplers": []}
        return {**nothing, "state": status.state}
    return {
        "model_name": status.name,
        "lora_names": [adapters.name_of(app, adapter.path) for adapter in adapters_of(backend, app.models.adapters)],
        "loader": status.loader,
        "context_length": backend.context_length,
        "capabilities": sorted(backend.features),
        "samplers": list(status.samplers),
        "state": status.state,
    }


def chosen(app: App, name: str, loader: str, args: Json) -> Choice:
    """What loading `name` with `args` means; these may be options of its loader only. Raises BadRequest and what `ModelSlot.choose` raises."""
    found = loaders.named(loader) if loader else app.models.choose(name).loader
    knobs = found.options.knobs()
    spellings = {spelling.lstrip("-").replace("-", "_"): knob.name for knob in knobs.values() for spelling in (knob.name, *knob.flags)}
    options = {}
    for key, value in args.items():
        option = spellings.get(key.replace("-", "_"))
        if option is None:
            raise BadRequest(f"args: {found.name} has no option {key[:60]!r}.{nearest(key, knobs)}", "args")
        options[option] = value
    if "server_url" in options:  # it decides who is told the key
        raise BadRequest("args: server_url is given when the program is started (--server-url), or on the Model tab.", "args")
    return app.models.choose(name, found.name, options)


# --- LoRA adapters ----------------------------------------------------------------------------------------------------------------------


def _add_adapters(router: APIRouter, app: App) -> None:
    @router.get("/v1/internal/lora/list", tags=["Models"])
    def names() -> Json:
        """All adapters of the LoRA folder."""
        return {"lora_names": adapters.names(app)}

    @router.post("/v1/internal/lora/load", tags=["Models"])
    def load(body: AdaptersRequest) -> Response:
        """Use these adapters from now on, and no others. When one does not fit, all stays as it was."""
        _administer(app)
        scales = body.lora_scales or [1.0] * len(body.lora_names)
        if len(scales) != len(body.lora_names):
            raise BadRequest("lora_scales needs one number for each of lora_names.", "lora_scales")
        if not all(map(math.isfinite, scales)):
            raise BadRequest("lora_scales must be finite numbers.", "lora_scales")
        adapters.use(app, adapters.named(app, list(zip(body.lora_names, scales, strict=True))))
        return _told(body, {"status": "ok", "lora_names": info_view(app)["lora_names"]})

    @router.post("/v1/internal/lora/unload", tags=["Models"])
    def unload() -> Json:
        """Use no adapters from now on."""
        _administer(app)
        adapters.use_none(app)
        return {"status": "ok", "lora_names": []}


# --- ranking ----------------------------------------------------------------------------------------------------------------------------


def _add_rerank(router: APIRouter, app: App) -> None:
    @router.post("/v1/rerank", tags=["OpenAI"])
    async def rerank(request: Request, body: RerankRequest) -> Response:
        """Documents by their likeness to a query, in the form of Jina, Cohere and llama.cpp's server.

        It is the similarity of embeddings: the cosine of the loaded model's vectors of query and document, -1 to 1. No reranking model
        reads the two together.
        """
        view = await with_model(request, app, body.model, lambda backend, cancel: _ranked(app, backend, body, cancel))
        return _told(body, view, *not_asked(body.model, view["model"]))


def _ranked(app: App, backend: Backend, body: RerankRequest, cancel: CancelToken) -> Json:
    name = app.models.name_of(backend)
    if "embeddings" not in backend.features:
        raise BadRequest("The loaded model gives no embeddings, by which documents are ranked here. Load a model for embeddings.", "model")
    texts = [each if isinstance(each, str) else each.text for each in body.documents]
    found = cast(Embedding, backend).embed([body.query, *texts], cancel)
    query, vectors = found.vectors[0] if found.vectors else (), found.vectors[1:]
    scores = [_cosine(query, vector) for vector in vectors]
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n]
    results: list[Json] = [{"index": index, "relevance_score": scores[index]} for index in order]
    if body.return_documents:
        results = [{**each, "document": {"text": texts[each["index"]]}} for each in results]
    usage = {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
    return {"object": "list", "model": name, "results": results, "usage": usage}


def _cosine(one: Sequence[float], other: Sequence[float]) -> float:
    lengths = math.sqrt(sum(x * x for x in one) * sum(y * y for y in other))
    return sum(x * y for x, y in zip(one, other, strict=True)) / lengths if lengths else 0.0
