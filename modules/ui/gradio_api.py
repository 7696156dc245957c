"""Endpoints for programs that speak Gradio's own API (gradio_client). Each is named and told; no handler of the page is among them.

    client = gradio_client.Client("http://127.0.0.1:7860/")
    for text in client.submit("Hello", api_name="/chat"): ...    # the text so far, again and again

They ask as the API does, behind the page's login. Cancelling the job, or going away, ends the reply.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import gradio as gr
from anyio.to_thread import run_sync
from pydantic import ValidationError

from modules.api.errors import BadRequest
from modules.api.management import chosen, info_view
from modules.api.requests import Job, chat_job, completion_jobs
from modules.api.running import parts
from modules.api.schemas import ChatRequest, CompletionRequest
from modules.app import App
from modules.auth import Identity
from modules.errors import AccessDenied, UserError
from modules.text_generation import encode

Json = dict[str, Any]
AT_ONCE = 64
"""Replies that run at once; further ones wait in Gradio's queue."""
MAX_QUEUE = 256
"""Calls that wait there; more are refused."""
TELL_SECONDS = 0.05
SILENCE = 5.0
"""Seconds after which the same text is told again: only so is it noticed that nobody listens any more."""
ELSEWHERE = frozenset(
    {"messages", "prompt", "stream", "stream_options", "n", "best_of", "logprobs", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls"}
    | {"functions", "function_call"}
)
"""Fields of the OpenAI API that a stream of text cannot follow."""


class Who(Protocol):
    """Says who asks. Raises NotLoggedIn."""

    def __call__(self, request: gr.Request) -> Identity:
        """`request`: with the cookies of the login."""
        ...


def add_endpoints(app: App, who: Who) -> None:
    """Add them to the page that is being built."""
    _add_writing(app, who)
    _add_models(app, who)


def _add_writing(app: App, who: Who) -> None:
    async def chat(
        request: gr.Request, message: str, history: list[Json] | None = None, system: str = "", parameters: Json | None = None
    ) -> AsyncIterator[str]:
        before = [{"role": "system", "content": system}] if system else []
        given = {"messages": [*before, *(history or []), {"role": "user", "content": message}]}

        def job(client: str) -> Job:
            with app.models.use("") as backend:
                return chat_job(app, backend, _read(ChatRequest, given, parameters), client)

        async for text in _written(app, who, request, job):
            yield text

    async def generate(request: gr.Request, prompt: str, parameters: Json | None = None) -> AsyncIterator[str]:
        def job(client: str) -> Job:
            with app.models.use("") as backend:
                return completion_jobs(app, backend, _read(CompletionRequest, {"prompt": prompt}, parameters), client)[0]

        async for text in _written(app, who, request, job):
            yield text

    def token_count(request: gr.Request, text: str) -> int:
        with _Told():
            who(request)
            return len(encode(app, text))

    for written in (chat, generate):
        written.__annotations__["return"] = str  # what each of its items is, as Gradio tells it
    writing: Json = {"concurrency_limit": AT_ONCE, "concurrency_id": "writing"}
    gr.api(
        chat,
        api_name="chat",
        api_description="A reply to a message, streamed: each item is the whole text so far, without thinking. history: earlier messages as "
        '{"role": "user" or "assistant", "content": text}. system: what the model is told before. parameters: any of the fields that '
        '/v1/chat/completions takes for one reply of text, such as {"temperature": 0.7, "max_tokens": 200}.',
        **writing,
    )
    gr.api(
        generate,
        api_name="generate",
        api_description="What follows a text, streamed: each item is the whole text so far, without the prompt. parameters: any of the fields that "
        "/v1/completions takes for one reply of text.",
        **writing,
    )
    gr.api(token_count, api_name="token_count", api_description="How many tokens a text has for the model in use.", concurrency_limit=AT_ONCE)


def _add_models(app: App, who: Who) -> None:
    def administer(request: gr.Request) -> None:
        who(request)
        if app.settings.multi_user:
            raise AccessDenied("In multi-user mode the model is chosen where the server is started.")

    def load_model(request: gr.Request, name: str, loader: str = "", options: Json | None = None) -> Json:
        with _Told():
            administer(request)
            app.models.load(chosen(app, name, loader, options or {}))
            return info_view(app)

    def unload_model(request: gr.Request) -> Json:
        with _Told():
            administer(request)
            app.models.unload()
            return info_view(app)

    def list_models(request: gr.Request) -> Json:
        with _Told():
            who(request)
            loaded = info_view(app)["model_name"]
            return {"models": [] if app.settings.multi_user else app.models.names(), "loaded": loaded}

    loading: Json = {"concurrency_limit": 4, "concurrency_id": "models"}
    gr.api(
        load_model,
        api_name="load_model",
        api_description="Load a model of the model folder, and answer when it is done with what is known of it. loader: found from the file when "
        'empty. options: of that loader, such as {"ctx_size": 8192}. Refused in multi-user mode.',
        **loading,
    )
    gr.api(unload_model, api_name="unload_model", api_description="Free the model. Refused in multi-user mode.", **loading)
    gr.api(list_models, api_name="list_models", api_description="The models of the model folder (none in multi-user mode), and the one in use.")


class _Told:
    """Turns an error for people into one that Gradio shows them."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, UserError):
            raise gr.Error(str(error), print_exception=False) from None


def _read(kind: type[Any], given: Json, parameters: Json | None) -> Any:
    """The request. Raises BadRequest for a parameter that cannot be followed here."""
    wanted = {name: value for name, value in (parameters or {}).items() if value is not None}
    elsewhere = sorted(ELSEWHERE & wanted.keys())
    if elsewhere:
        raise BadRequest(f"parameters: {elsewhere[0]} is no part of this endpoint. Use the OpenAI API (--api) for it.", elsewhere[0])
    try:
        body = kind.model_validate({**wanted, **given})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadRequest(f"{where + ': ' if where else ''}{first['msg']}. Correct it.", where or None) from None
    unknown = body.unknown()
    if unknown:
        raise BadRequest(f"parameters: {unknown[0][:60]!r} is unknown. The fields of the OpenAI API count here.", unknown[0][:60])
    return body


async def _written(app: App, who: Who, request: gr.Request, job: Callable[[str], Job]) -> AsyncIterator[str]:
    """The text so far, as it grows; `job` makes the reply of a client."""
    with _Told():
        made = await run_sync(lambda: job(who(request).owner))
        for words in made.ignored:
            gr.Warning(words)
        async for text in _growing(app, made):
            yield text


async def _growing(app: App, job: Job) -> AsyncIterator[str]:
    stream = parts(app, [job])
    following = asyncio.ensure_future(anext(stream, None))
    text, told, ended = "", None, False
    try:
        while not ended:
            done, _ = await asyncio.wait({following}, timeout=SILENCE)
            silent = not done
            while done and not ended:  # all that has come meanwhile
                part = following.result()
                ended = part is None
                if part is not None:
                    text += part.text
                    following = asyncio.ensure_future(anext(stream, None))
                    done, _ = await asyncio.wait({following}, timeout=0)
            if text != told or silent:
                told = text
                yield text
                await asyncio.sleep(0 if ended else TELL_SECONDS)
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await stream.aclose()  # type: ignore[attr-defined]
