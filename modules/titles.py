"""Titles by the model: after the first reply of a new conversation the model is asked for a few words. On a thread; nobody waits for it."""

from __future__ import annotations

import threading

from modules.app import App
from modules.backends.base import CancelToken, GenerationRequest
from modules.errors import UserError
from modules.log import logger
from modules.replies import Reply
from modules.store import clean_title
from modules.templates import PromptMessage
from modules.text_generation import generate_reply, split_reply
from modules.turns import Source, prompting_of

MOST_TOKENS = 24
_WAIT = 3600.0
"""Seconds for the reply to end."""
_LOOKED_AT = 1500
"""Characters of each message."""


def later(app: App, source: Source, conversation: str, reply: Reply) -> None:
    """Name the conversation when its first `reply` has ended well."""
    threading.Thread(target=_quietly, args=(app, source, conversation, reply), name=f"title-{conversation[:8]}", daemon=True).start()


def _quietly(app: App, source: Source, conversation: str, reply: Reply) -> None:
    try:
        if reply.finished.wait(_WAIT) and reply.message.state == "done":
            _name(app, source, conversation)
    except UserError as error:
        logger.warning("A conversation was not named by the model: %s", error)
    except Exception:  # noqa: BLE001  a thread's top: the title made of the first words stays
        logger.exception("Naming a conversation failed")


def _name(app: App, source: Source, conversation: str) -> None:
    store, owner = source.store, source.who.owner
    before = store.info(owner, conversation).title
    path = store.conversation(owner, conversation).path()
    title = clean_title(_asked(app, source, "\n\n".join(m.text[:_LOOKED_AT] for m in path if m.text)).strip().strip('"*#').strip())
    if title and store.info(owner, conversation).title == before:  # else somebody has named it meanwhile
        store.rename(owner, conversation, title[:80])
        app.replies.tell(owner, "conversation", {"id": conversation})


def _asked(app: App, source: Source, text: str) -> str:
    backend = app.models.backend
    template = prompting_of(app, backend, source.session).template
    asked = PromptMessage("user", f"{text}\n\nGive this conversation a title of at most six words. Answer with the title alone.")
    prompt = template.render([asked], add_generation_prompt=True, enable_thinking=False)
    tokens = backend.encode(prompt)
    if len(tokens) + MOST_TOKENS > backend.context_length:
        return ""
    sampling = source.session.sampling.replace({"temperature": 0.3, "grammar_string": ""})
    plain = GenerationRequest(tuple(tokens), sampling, MOST_TOKENS, stop=("\n\n",), client=f"{source.who.owner}-title", cancel=CancelToken())
    return "".join(piece.text for piece in split_reply(generate_reply(app, plain), plain, prompt)).partition("\n")[0]
