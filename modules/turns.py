"""The steps of a turn: what the model is asked (`prepare`), and the replies that come of it (`start`). Nothing here decides what to answer.

prepare: the conversation's values -> Prompting (mode, template) -> fit to the context -> GenerationRequest
start:   a Reply on threads of its own: [a summary of what no longer fits ->] generate_reply -> thinking told from answer
         -> what explains it is kept
"""

from __future__ import annotations

import secrets
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from modules import explain
from modules.app import App
from modules.auth import Identity
from modules.backends.base import Backend, CancelToken, Chunk, GenerationRequest, adapters_of
from modules.conversation import Conversation, Message, Summary
from modules.errors import UserError
from modules.explain import Recorder, Token
from modules.log import logger
from modules.prompting import Prompting, Speaker, summary_messages
from modules.replies import Piece, Reply
from modules.sessions import Session
from modules.store import Store
from modules.templates import FALLBACK, ChatTemplate, stop_strings
from modules.text_generation import generate_reply, split_reply

SUMMARY_TOKENS = 400
"""Length of a summary, at most; and never more than a quarter of the context."""


@dataclass(frozen=True)
class Source:
    """What a reply is made of, besides the model: the values in effect, the conversation's store and summary."""

    who: Identity
    store: Store
    conversation: str
    """"" for one that is not there yet."""
    session: Session
    summary: Summary | None = None
    model: str = ""
    """Which of several models in memory; "" for the current one."""


@dataclass(frozen=True)
class Plan:
    """One reply, ready to start."""

    source: Source
    request: GenerationRequest
    prompt: str
    """The exact text, for the reader and for `ReplyStream`."""
    path: Sequence[Message]
    """The messages that it answers, or goes on from."""
    dropped: int = 0
    open_end: bool = False
    outgrown: bool = False
    """The oldest messages are to be summarised before it begins."""
    said: tuple[Token, ...] = ()
    """Tokens that stand already, and that the request goes on from: they are shown first."""
    names: tuple[str, ...] = ()
    """That the model may write before its text (`ReplyStream`)."""


def source_of(app: App, who: Identity, conversation: str | None) -> Source:
    """The values of a conversation, or of this browser for a new one. Raises NotFound."""
    own = app.sessions.get(who.session)
    store = app.store_of(conversation)
    if not conversation:
        return Source(who, store, "", own)
    kept = store.settings(who.owner, conversation)
    return Source(who, store, conversation, own.of(kept), store.summary(who.owner, conversation))


def backend_of(app: App, source: Source) -> Backend:
    """The model that replies. Raises NoModel."""
    return app.models.backend_of(source.model)


def prompting_of(app: App, backend: Backend, session: Session) -> Prompting:
    """How this session's prompts are made for `backend`: the template chosen, or the model's own, or ChatML."""
    name = session.chat.instruction_template
    text = app.templates.get(name) if name else backend.chat_template
    template = ChatTemplate(text, backend.bos_token, backend.eos_token) if text else FALLBACK
    # The script of chat mode is nobody's template: whether it begins with BOS is the tokenizer's and the user's affair.
    adds_bos = session.chat.mode == "chat" and session.sampling.add_bos_token and bool(backend.encode("", True))
    return Prompting(template, session.chat, adds_bos)


def opened(session: Session, path: Sequence[Message]) -> tuple[Sequence[Message], bool]:
    """`path` with the text that every reply begins with, if there is one, and whether it then ends in an open message."""
    begun = session.chat.start_with
    return ((*path, Message("", None, "assistant", begun)), True) if begun else (path, False)


def prepare(app: App, backend: Backend, source: Source, path: Sequence[Message], open_end: bool = False, speaker: Speaker = "assistant") -> Plan:
    """The plan for what follows `path`. `open_end`: its last message goes on. Raises PromptTooLong, TemplateError."""
    session = source.session
    prompting = prompting_of(app, backend, session)
    budget, summary = _budget(backend, session, open_end), _valid(source.summary, path)
    fitted = prompting.fit(path, budget, backend.encode, open_end=open_end, speaker=speaker, summary=summary)
    request = _request(app, backend, source, fitted.tokens, prompting.stops_of(speaker))
    plan = Plan(source, request, fitted.prompt, path, fitted.dropped, open_end, names=prompting.names(speaker))
    return replace(plan, outgrown=bool(fitted.dropped) and session.chat.context_full == "summarise" and speaker == "assistant")


def _valid(summary: Summary | None, path: Sequence[Message]) -> Summary | None:
    """A summary tells of one branch only."""
    return summary if summary and any(message.id == summary.after for message in path) else None


def rendered(app: App, backend: Backend, plan: Plan, path: Sequence[Message]) -> str:
    """The prompt of `plan` with another path of the same length, and the same messages left out."""
    source = plan.source
    prompting = prompting_of(app, backend, source.session)
    return prompting.render(path, plan.dropped, open_end=plan.open_end, summary=_valid(source.summary, path))


def _request(app: App, backend: Backend, source: Source, tokens: tuple[int, ...], stops: Sequence[str]) -> GenerationRequest:
    sampling = source.session.sampling
    return GenerationRequest(
        tokens,
        sampling,
        None if sampling.auto_max_new_tokens else sampling.max_new_tokens,
        secrets.randbelow(2**31) if sampling.seed < 0 else sampling.seed,
        stop=(*sampling.stopping_strings, *stops),
        adapters=adapters_of(backend, app.models.adapters),
        chosen_logprob=True,
        client=source.who.owner,
        cancel=CancelToken(),
        model=source.model,
    )


def _budget(backend: Backend, session: Session, open_end: bool) -> int:
    """Tokens that a prompt may have: the context without room for the reply, of which at least half is the prompt's.

    What goes on (`open_end`) needs less room, as most of it is in the prompt already: an eighth, and it may end with the context.
    """
    sampling = session.sampling
    context = min(backend.context_length, sampling.truncation_length or backend.context_length)
    return context - min(sampling.max_new_tokens, context // (8 if open_end else 2))


def again(plan: Plan, number: int) -> Plan:
    """The plan for another reply to the same: it has a seed and a stop of its own."""
    request = replace(plan.request, seed=(plan.request.seed + number) % 2**31, cancel=CancelToken())
    return replace(plan, request=request)


def details(app: App, plan: Plan, **more: Any) -> dict[str, Any]:
    """What explains the reply later, besides its prompt and tokens."""
    request, status = plan.request, app.models.status_of(plan.source.model)
    chat = plan.source.session.chat
    known: dict[str, Any] = {
        "model": status.name,
        "seed": request.seed,
        "parameters": {k: list(v) if isinstance(v, tuple) else v for k, v in request.sampling.differences().items()},
        "dropped_messages": plan.dropped,
        **more,
    }
    file = app.models.file_of(plan.source.model)
    if file:
        known["model_stamp"] = app.hashes.stamp(file)
        known["model_hash"] = app.hashes.get(file)
    if request.stop:
        known["stop"] = list(request.stop)
    if request.adapters:
        known["adapters"] = [[adapter.path.name, adapter.scale] for adapter in request.adapters]
    if chat.mode != "instruct":
        known["name"] = chat.name2
    return known


def start(app: App, who: Identity, conversation: Conversation, plans: Mapping[str, Plan], messages: Sequence[Message]) -> tuple[Reply, ...]:
    """Start the replies of `plans` (by message id) into their `messages`, which are stored and running."""
    store, running = app.store_of(conversation.id), []
    for message in messages:
        if message.id not in plans:
            continue
        plan = plans[message.id]
        context_length = app.models.status_of(plan.source.model).context_length
        reply = Reply(who.owner, conversation.id, message, context_length, app.present(), plan.request.cancel)
        app.replies.start(reply, _writing(app, plan, conversation.id, message), store.save)
        running.append(reply)
    app.replies.tell(who.owner, "started", {"conversation": conversation.id, "messages": [m.id for m in messages], "running": list(plans)})
    app.replies.tell(who.owner, "conversation", {"id": conversation.id})
    return tuple(running)


def _writing(app: App, plan: Plan, conversation: str, message: Message) -> Any:
    """The function whose pieces the reply takes."""

    def pieces() -> Iterable[Piece]:
        ready = plan
        if plan.outgrown:
            ready = yield from _summarised(app, plan, conversation)
        recorder = Recorder(ready.said)
        try:
            chunks = _recorded(_spoken(app, ready), recorder)
            yield from split_reply(chunks, ready.request, ready.prompt, message.text, message.reasoning, ready.names)
        finally:
            _keep(ready, conversation, message, recorder)

    return pieces


def _spoken(app: App, plan: Plan) -> Iterator[Chunk]:
    if plan.said:
        backend = backend_of(app, plan.source)
        yield Chunk("".join(explain.token_texts(backend, [token.id for token in plan.said])))
    yield from generate_reply(app, plan.request)


def _recorded(chunks: Iterator[Chunk], recorder: Recorder) -> Iterator[Chunk]:
    for chunk in chunks:
        recorder.seen(chunk)
        yield chunk


def _keep(plan: Plan, conversation: str, message: Message, recorder: Recorder) -> None:
    """Keep what explains the reply. It is no reason for a reply to fail."""
    source = plan.source
    above = [other for other in plan.path if other.id and other.id != message.id]
    try:
        explain.keep(source.store, source.who.owner, conversation, message, above, plan.prompt, recorder)
    except UserError as error:
        logger.warning("What explains a reply was not kept: %s", error)


# --- a summary of what no longer fits -------------------------------------------------------------------------------------------------


def _summarised(app: App, plan: Plan, conversation: str) -> Generator[Piece, None, Plan]:
    """Let the model tell the dropped messages in short, keep that, and plan anew; the pieces on the way are only a note."""
    yield Piece(note="Summarising the oldest messages…")
    source, backend, cancel = plan.source, backend_of(app, plan.source), plan.request.cancel
    prompting = prompting_of(app, backend, source.session)
    former = _valid(source.summary, plan.path)
    left_out = prompting.left_out(plan.path, plan.dropped, former)
    text = former.text if former else ""
    for part in _parts(left_out, backend):
        text = _told(app, plan, prompting.template, part, text)
        if cancel.cancelled:
            return plan
    if not text.strip() or not left_out:
        yield Piece(warning=f"The model gave no summary: the oldest {plan.dropped} messages were left out.")
        return replace(plan, outgrown=False)
    summary = Summary(text.strip(), left_out[-1].id)
    source.store.set_summary(source.who.owner, conversation, summary)
    app.replies.tell(source.who.owner, "changed", {"conversation": conversation})
    ready = prepare(app, backend, replace(source, summary=summary), plan.path, plan.open_end)
    return replace(ready, request=replace(ready.request, seed=plan.request.seed, cancel=cancel, adapters=plan.request.adapters), outgrown=False)


def _parts(messages: Sequence[Message], backend: Backend) -> Iterator[Sequence[Message]]:
    """Consecutive messages of at most half the context together; one longer than that stands alone and is cut where it is used."""
    part: list[Message] = []
    used, most = 0, backend.context_length // 2
    for message in messages:
        size = len(backend.encode(message.text))
        if part and used + size > most:
            yield part
            part, used = [], 0
        part.append(message)
        used += size
    if part:
        yield part


def _told(app: App, plan: Plan, template: ChatTemplate, messages: Sequence[Message], former: str) -> str:
    """What the model makes of `messages` and the `former` summary."""
    backend = backend_of(app, plan.source)
    limit = min(SUMMARY_TOKENS, backend.context_length // 4)
    room = backend.context_length - limit
    prompt = template.render(summary_messages(messages, former), add_generation_prompt=True, enable_thinking=False)
    tokens = backend.encode(prompt)
    if len(tokens) > room:  # one message of more than half the context: its end is left out
        cut = [replace(m, text=m.text[: len(m.text) * room // (2 * len(tokens))]) for m in messages]
        prompt = template.render(summary_messages(cut, former), add_generation_prompt=True, enable_thinking=False)
        tokens = backend.encode(prompt)
    # No stop strings and no grammar, which are meant for the reply; and a token of its own: the template's end of a turn cancels that one only.
    cancel = CancelToken()
    plan.request.cancel.on_cancel(cancel.cancel)
    plain = plan.request.sampling.replace({"grammar_string": ""})
    stop = stop_strings(template, "assistant")
    wanted = replace(plan.request, prompt=tuple(tokens), sampling=plain, max_new_tokens=limit, stop=stop, cancel=cancel)
    return "".join(piece.text for piece in split_reply(generate_reply(app, wanted), wanted, prompt))
