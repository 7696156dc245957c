"""Routes of the library: what there is to choose from, the texts of it, and saving one's own. In multi-user mode nothing here writes.

A name is the file's without its ending; `{name:path}` takes any, so that a hostile one reaches the check and its error instead of no route.
"""

from collections.abc import Callable
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Body, Depends

from modules import prompts
from modules.app import App
from modules.auth import Identity
from modules.characters import Character, UserProfile
from modules.errors import AccessDenied, TemplateError
from modules.library import Shelf, plain
from modules.store import clean
from modules.templates import FALLBACK, ChatTemplate, PromptMessage
from modules.ui import ASSETS

Json = dict[str, Any]

EXAMPLE = (
    PromptMessage("system", "Answer in one sentence."),
    PromptMessage("user", "What has six sides?"),
    PromptMessage("assistant", "A cube has six."),
    PromptMessage("user", "And eight?"),
)
"""What a template is shown with."""
MAX_EXAMPLE = 20_000
"""Characters of what it makes of that."""


class _Deletes(Protocol):
    def delete(self, name: str) -> None: ...


def add_library(router: APIRouter, app: App, who: Callable[..., Identity], writer: Callable[..., Identity]) -> None:
    """Add the routes. `who` and `writer` say who asks, for reading and for changing something."""

    def keeper(identity: Annotated[Identity, Depends(writer)]) -> Identity:
        if app.settings.multi_user:
            raise AccessDenied("In multi-user mode these files are changed where the server is started.")
        return identity

    _add_lists(router, app, who)
    _add_people(router, app, who, keeper)
    _add_templates(router, app, writer, keeper)
    kinds: dict[str, _Deletes] = {
        "presets": app.presets,
        "characters": app.characters,
        "users": app.users,
        "templates": app.templates,
        "prompts": app.prompts,
    }
    for kind, shelf in kinds.items():
        router.add_api_route(f"/chat/{kind}/{{name:path}}", _deleting(shelf), methods=["DELETE"], dependencies=[Depends(keeper)])
    _add_texts(router, app, who, keeper)


def grammars(app: App) -> Shelf:
    """The grammar files in `user_data/grammars/`."""
    return Shelf(app.data.grammars, "grammar", (".gbnf",))


def styles(app: App) -> list[str]:
    """Names of the looks of a conversation: those that come with the program, and the user's own."""
    return Shelf(app.data.css, "style", (".css",), {path.stem for path in (ASSETS / "styles").glob("*.css")}).names()


def tried(app: App, name: str, text: str | None) -> Json:
    """A template's text (`text`, or that of the template `name`; "": the model's own), what it makes of EXAMPLE, and what is wrong with it."""
    backend = app.models.loaded_backend()
    begin, end = (backend.bos_token, backend.eos_token) if backend else ("<s>", "</s>")
    error = ""
    text = clean(text) if text else text
    if text is None and name:
        text = app.templates.get(name)
    elif text is None:
        text = (backend.chat_template if backend else "") or FALLBACK.source
        error = "" if backend else "No model is loaded, so its own template is not known. This is the one of models that have none."
    try:
        return {"text": text, "example": ChatTemplate(text, begin, end).render(EXAMPLE)[:MAX_EXAMPLE], "error": error}
    except TemplateError as wrong:
        return {"text": text, "example": "", "error": str(wrong)}


def _add_lists(router: APIRouter, app: App, who: Callable[..., Identity]) -> None:
    @router.get("/chat/library", dependencies=[Depends(who)])
    def library() -> Json:
        return {
            "characters": app.characters.names(),
            "users": app.users.names(),
            "presets": app.presets.names(),
            "templates": app.templates.names(),
            "prompts": app.prompts.names(),
            "grammars": grammars(app).names(),
            "styles": styles(app),
            "notification": app.data.notification.is_file(),
            "adapters": _adapters(app),
            "other_models": [] if app.settings.multi_user else [each.name for each in app.models.loaded() if not each.current],
        }

    @router.get("/chat/grammars/{name:path}", dependencies=[Depends(who)])
    def grammar(name: str) -> Json:
        file, text = grammars(app).text(name) or ("", "")
        return {"text": plain(text, "the text", file)}


def _adapters(app: App) -> list[str]:
    """LoRA adapters that the model in memory could use."""
    backend = app.models.loaded_backend()
    if not backend or "adapters" not in backend.features:
        return []
    return sorted(path.name for path in app.data.loras.glob("*.gguf"))


def _add_people(router: APIRouter, app: App, who: Callable[..., Identity], keeper: Callable[..., Identity]) -> None:
    Text = Annotated[str, Body()]

    @router.get("/chat/characters/{name:path}", dependencies=[Depends(who)])
    def character(name: str) -> Json:
        return vars(app.characters.get(name))

    @router.put("/chat/characters/{file:path}", dependencies=[Depends(keeper)])
    def save_character(file: str, name: Text, context: Text = "", greeting: Text = "") -> Json:
        app.characters.save(file, Character(name, context, greeting))
        return {}

    @router.get("/chat/users/{name:path}", dependencies=[Depends(who)])
    def user(name: str) -> Json:
        return vars(app.users.get(name))

    @router.put("/chat/users/{file:path}", dependencies=[Depends(keeper)])
    def save_user(file: str, name: Text, bio: Text = "") -> Json:
        app.users.save(file, UserProfile(name, bio))
        return {}


def _add_templates(router: APIRouter, app: App, writer: Callable[..., Identity], keeper: Callable[..., Identity]) -> None:
    @router.post("/chat/template", dependencies=[Depends(writer)])
    def template(name: Annotated[str, Body()] = "", text: Annotated[str | None, Body()] = None) -> Json:
        """Show a template, or try a text."""
        if text is not None and app.settings.multi_user:
            raise AccessDenied("In multi-user mode only the templates of the list can be used.")
        return tried(app, name, text)

    @router.put("/chat/templates/{name:path}", dependencies=[Depends(keeper)])
    def save(name: str, text: Annotated[str, Body(embed=True)]) -> Json:
        app.templates.save(name, text)
        return {}


def _add_texts(router: APIRouter, app: App, who: Callable[..., Identity], keeper: Callable[..., Identity]) -> None:
    @router.get("/chat/presets/{name:path}", dependencies=[Depends(who)])
    def preset(name: str) -> Json:
        return {"values": app.presets.get(name)}

    @router.put("/chat/presets/{name:path}", dependencies=[Depends(keeper)])
    def save_preset(name: str, values: Annotated[Json, Body(embed=True)]) -> Json:
        app.presets.save(name, values)
        return {}

    @router.get("/chat/prompts/{name:path}", dependencies=[Depends(who)])
    def prompt(name: str) -> Json:
        """`text` with the date and time filled in, what a person fills in, and the `source` as it is stored."""
        source = app.prompts.get(name)
        return {
            "text": prompts.dated(source),
            "variables": [vars(each) for each in prompts.variables(source)],
            "source": source,
        }

    @router.put("/chat/prompts/{name:path}", dependencies=[Depends(keeper)])
    def save_prompt(name: str, text: Annotated[str, Body(embed=True)]) -> Json:
        app.prompts.save(name, text)
        return {}


def _deleting(shelf: _Deletes) -> Callable[[str], Json]:
    def delete(name: str) -> Json:
        shelf.delete(name)
        return {}

    return delete
