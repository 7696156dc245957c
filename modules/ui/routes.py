"""The page's own routes: conversations, turns, parameters, models, events. Each asks who is asking, calls one function, answers JSON."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Body, Depends, Request, Response, WebSocket
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse

from modules import archive, chat, old_data, revisit, settings
from modules.app import App
from modules.auth import Auth, Identity, NotLoggedIn
from modules.errors import AccessDenied, NotFound, SettingsError, UserError
from modules.guard import require_json, require_own_page
from modules.paths import inside, write_atomically
from modules.turns import source_of
from modules.ui import ASSETS
from modules.ui.branches import branch_view, greeting_view, message_views
from modules.ui.download_routes import add_downloads
from modules.ui.events import serve_events
from modules.ui.library_routes import add_library
from modules.ui.model_routes import add_models
from modules.ui.views import info_view

Json = dict[str, Any]


class StaleRevision(UserError):
    """The page's parameters are not the ones the server has."""

    status = 409


def build_router(app: App, auth: Auth) -> APIRouter:
    """All routes under the page's root."""

    def who(request: Request) -> Identity:
        return auth.need(request)

    def writer(request: Request) -> Identity:
        """Who asks, for requests that change something: only our own page can send what this needs."""
        require_json(request)
        return auth.need(request)

    router = APIRouter()
    _add_assets(router)
    _add_conversations(router, app, who, writer)
    _add_import(router, app, auth)
    _add_turns(router, app, writer)
    _add_explanations(router, app, who, writer)
    _add_session(router, app, who, writer)
    _add_files(router, app, who)
    add_library(router, app, who, writer)
    add_downloads(router, app.downloads, app.settings.multi_user, who, writer)
    add_models(router, app, who, writer)
    _add_metrics(router, app, auth)

    @router.websocket("/chat/events")
    async def events(socket: WebSocket) -> None:
        try:
            await serve_events(socket, app, auth)
        except NotLoggedIn:
            await socket.close(1008)  # before it is accepted: the browser sees 403

    return router


def _add_assets(router: APIRouter) -> None:
    """Our files, each by name, in a folder whose name changes with them: scripts find each other beside themselves."""

    def serve(path: Path) -> Callable[[], FileResponse]:
        return lambda: FileResponse(path, headers={"Cache-Control": "public, max-age=31536000, immutable"})

    for path in ASSETS.rglob("*"):
        if path.is_file():
            name = path.relative_to(ASSETS).as_posix()
            router.add_api_route(f"/assets/{{fingerprint}}/{name}", serve(path), methods=["GET", "HEAD"])


def _add_conversations(router: APIRouter, app: App, who: Callable[..., Identity], writer: Callable[..., Identity]) -> None:
    Reader = Annotated[Identity, Depends(who)]
    Asker = Annotated[Identity, Depends(writer)]
    Text = Annotated[str, Body()]
    Ids = Annotated[list[str], Body()]

    @router.get("/chat/conversations")
    def conversations(identity: Reader, query: str = "", before: str = "", folder: str | None = None, tag: str | None = None) -> Json:
        old_data.adopt(app.data, app.store, identity.owner, app.settings.multi_user)
        page = app.store.conversations(identity.owner, query, before=before or None, folder=folder, tag=tag)
        first = app.incognito.conversations(identity.owner, query) if not (before or folder or tag) else None
        items = [info_view(item, bool(app.replies.running(item.id))) for item in ((*first.items, *page.items) if first else page.items)]
        return {"items": items, "next": page.next}

    @router.get("/chat/conversations/{id}")
    def conversation(id: str, identity: Reader, before: str = "") -> Json:
        return branch_view(app, identity, id, before or None)

    @router.patch("/chat/conversations/{id}")
    def change(
        id: str,
        identity: Asker,
        title: Annotated[str | None, Body()] = None,
        folder: Annotated[str | None, Body()] = None,
        pinned: Annotated[bool | None, Body()] = None,
        tags: Annotated[list[str] | None, Body()] = None,
    ) -> Json:
        app.store_of(id).info(identity.owner, id)  # told to be gone, whatever is asked of it
        if title is not None:
            archive.rename(app, identity, id, title)
        if (folder, pinned, tags) != (None, None, None):
            archive.arrange(app, identity, [id], folder, pinned, tags=tags)
        return {}

    @router.delete("/chat/conversations/{id}")
    def delete(id: str, identity: Asker) -> Json:
        return {"undo": next(iter(archive.delete(app, identity, [id])), None)}

    @router.post("/chat/arrange")
    def arrange(
        identity: Asker,
        conversations: Ids,
        folder: Annotated[str | None, Body()] = None,
        pinned: Annotated[bool | None, Body()] = None,
        add_tags: Annotated[list[str], Body()] = [],  # noqa: B006  FastAPI copies it
        remove_tags: Annotated[list[str], Body()] = [],  # noqa: B006
    ) -> Json:
        archive.arrange(app, identity, conversations, folder, pinned, add_tags, remove_tags)
        return {}

    @router.post("/chat/delete")
    def delete_several(identity: Asker, conversations: Annotated[list[str], Body(embed=True)]) -> Json:
        return {"undo": archive.delete(app, identity, conversations)}

    @router.post("/chat/undo")
    def undo(identity: Asker, undo: Annotated[list[int], Body(embed=True)]) -> Json:
        return {"conversations": archive.undo(app, identity, undo)}

    @router.get("/chat/folders")
    def folders(identity: Reader) -> Json:
        folders, tags = app.store.folders(identity.owner)
        return {"folders": folders, "tags": tags}

    @router.get("/chat/trash")
    def trash(identity: Reader) -> Json:
        found = app.store.trash(identity.owner)
        names = ("kind", "title", "conversation", "removed")
        return {"items": [{"undo": item.number, **{name: getattr(item, name) for name in names}} for item in found]}

    @router.delete("/chat/trash")
    def empty_trash(identity: Asker) -> Json:
        app.store.empty_trash(identity.owner)
        return {}

    @router.post("/chat/select")
    def select(identity: Asker, conversation: Text, message: Text) -> Json:
        archive.select(app, identity, conversation, message)
        return branch_view(app, identity, conversation)

    @router.post("/chat/choose")
    def choose(identity: Asker, conversation: Text, message: Text) -> Json:
        archive.choose(app, identity, conversation, message)
        return branch_view(app, identity, conversation)

    @router.post("/chat/pin")
    def pin(identity: Asker, conversation: Text, message: Text, pinned: Annotated[bool, Body()]) -> Json:
        archive.pin_message(app, identity, conversation, message, pinned)
        return {}

    @router.post("/chat/remove")
    def remove(identity: Asker, conversation: Text, message: Text) -> Json:
        number = archive.remove(app, identity, conversation, message)
        return {"undo": number, "page": branch_view(app, identity, conversation)}

    @router.post("/chat/branch")
    def branch(identity: Asker, conversation: Text, message: Text) -> Json:
        return {"id": archive.branch(app, identity, conversation, message).id}

    @router.patch("/chat/summary")
    def summary(identity: Asker, conversation: Text, text: Text) -> Json:
        archive.summarise(app, identity, conversation, text)
        return {}

    @router.get("/chat/tree/{id}")
    def tree(id: str, identity: Reader) -> Json:
        nodes, tip = app.store_of(id).tree(identity.owner, id)
        return {"nodes": [vars(node) for node in nodes], "tip": tip}

    @router.get("/chat/draft")
    def draft(identity: Reader) -> Json:
        return {"text": app.store.draft(identity.owner, None)}

    @router.put("/chat/draft")
    def save_draft(identity: Asker, text: Text, conversation: Annotated[str | None, Body()] = None) -> Json:
        app.store_of(conversation).save_draft(identity.owner, conversation, text)
        return {}

    @router.post("/chat/export")
    def export(
        identity: Asker, form: Annotated[Literal["json", "markdown"], Body()], conversations: Annotated[list[str] | None, Body()] = None
    ) -> Response:
        name, content = archive.export(app, identity, conversations, form)
        headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(name)}", "Cache-Control": "no-store"}
        return Response(content, media_type="application/json" if form == "json" else "text/markdown", headers=headers)


def _add_import(router: APIRouter, app: App, auth: Auth) -> None:
    @router.post("/chat/import")
    async def import_file(request: Request, name: str = "") -> Json:
        """The body is the file itself. Our own page alone can send the header that this asks for."""
        require_own_page(request)
        identity = await run_in_threadpool(auth.need, request)
        data = await request.body()
        ids = await run_in_threadpool(archive.import_file, app, identity, data, name)
        return {"conversations": ids[:1000], "count": len(ids)}


def _add_turns(router: APIRouter, app: App, writer: Callable[..., Identity]) -> None:
    Asker = Annotated[Identity, Depends(writer)]
    Text = Annotated[str, Body()]
    Number = Annotated[int, Body()]
    Chat = Annotated[str | None, Body()]

    def current(identity: Identity, conversation: str | None, revision: int) -> None:
        if revision != source_of(app, identity, conversation).session.revision:
            raise StaleRevision("The parameters were changed elsewhere. Check them and send again.")

    def answer(turn: chat.Turn) -> Json:
        owner, id = turn.conversation.owner, turn.conversation.id
        views = message_views(app, Identity(owner, ""), id, [message.id for message in turn.messages])
        return {"conversation": {"id": id, "title": app.store_of(id).info(owner, id).title}, "messages": views}

    @router.post("/chat/messages", status_code=202)
    def send(
        identity: Asker, text: Text, revision: Number, conversation: Chat = None, n: Number = 1, incognito: Annotated[bool, Body()] = False
    ) -> Json:
        current(identity, conversation, revision)
        return answer(chat.reply(app, identity, conversation, text, n, incognito))

    @router.post("/chat/ahead", status_code=202)
    def ahead(identity: Asker, text: Text, revision: Number, conversation: Chat = None) -> Json:
        """A draft; `{"ahead": false}` where telling another one is useless until another model is loaded."""
        return {"ahead": chat.ahead(app, identity, conversation, text, revision)}

    @router.post("/chat/regenerate", status_code=202)
    def regenerate(
        identity: Asker,
        conversation: Text,
        message: Text,
        revision: Number,
        n: Number = 1,
        preset: Annotated[str | None, Body()] = None,
        adapters: Annotated[list[tuple[str, float]] | None, Body()] = None,
        model: Annotated[str | None, Body()] = None,
    ) -> Json:
        current(identity, conversation, revision)
        asked = {"preset": preset, "adapters": adapters, "model": model}
        changes = {name: value for name, value in asked.items() if value is not None}
        return answer(chat.regenerate(app, identity, conversation, message, n, changes))

    @router.post("/chat/continue", status_code=202)
    def continue_reply(identity: Asker, conversation: Text, message: Text, revision: Number) -> Json:
        current(identity, conversation, revision)
        return answer(chat.continue_reply(app, identity, conversation, message))

    @router.post("/chat/edit", status_code=202)
    def edit(
        identity: Asker, conversation: Text, message: Text, text: Text, revision: Number, answered: Annotated[bool, Body(alias="answer")] = True
    ) -> Json:
        current(identity, conversation, revision)
        return answer(chat.edit(app, identity, conversation, message, text, answered))

    @router.post("/chat/insert", status_code=202)
    def insert(
        identity: Asker, role: Annotated[Literal["user", "assistant"], Body()], text: Text, revision: Number, conversation: Chat = None
    ) -> Json:
        current(identity, conversation, revision)
        return answer(chat.insert(app, identity, conversation, role, text))

    @router.post("/chat/impersonate", status_code=202)
    def impersonate(identity: Asker, text: Text, revision: Number, conversation: Chat = None) -> Json:
        current(identity, conversation, revision)
        return {"reply": chat.impersonate(app, identity, conversation, text).id}

    @router.post("/chat/resume", status_code=202)
    def resume(identity: Asker, conversation: Text, message: Text, position: Number, token: Number) -> Json:
        return answer(chat.resume(app, identity, conversation, message, position, token))

    @router.post("/chat/repeat", status_code=202)
    def repeat(identity: Asker, conversation: Text, message: Text) -> Json:
        return answer(chat.repeat(app, identity, conversation, message))

    @router.post("/chat/stop")
    def stop(identity: Asker, message: Annotated[str, Body(embed=True)]) -> Json:
        app.replies.stop(identity.owner, message)
        return {}


def _add_explanations(router: APIRouter, app: App, who: Callable[..., Identity], writer: Callable[..., Identity]) -> None:
    @router.get("/chat/explain/{conversation}/{message}")
    def explain(conversation: str, message: str, identity: Annotated[Identity, Depends(who)]) -> Json:
        return revisit.explained(app, identity, conversation, message)

    @router.post("/chat/alternatives")
    def alternatives(
        identity: Annotated[Identity, Depends(writer)],
        conversation: Annotated[str, Body()],
        message: Annotated[str, Body()],
        position: Annotated[int, Body()],
    ) -> Json:
        found = revisit.alternatives(app, identity, conversation, message, position)
        return {"alternatives": [[each.id, each.text, each.probability] for each in found]}


def _add_session(router: APIRouter, app: App, who: Callable[..., Identity], writer: Callable[..., Identity]) -> None:
    Reader = Annotated[Identity, Depends(who)]
    Asker = Annotated[Identity, Depends(writer)]
    Text = Annotated[str, Body()]
    Chat = Annotated[str | None, Body()]

    def told(identity: Identity, conversation: str | None) -> Json:
        found = source_of(app, identity, conversation).session
        return {"revision": found.revision, "values": found.values(), "greeting": None if conversation else greeting_view(found)}

    @router.get("/chat/session")
    def session(identity: Reader, conversation: str = "") -> Json:
        return told(identity, conversation or None)

    @router.patch("/chat/session")
    def change(identity: Asker, values: Annotated[Json, Body()], conversation: str = "") -> Json:
        return {"revision": archive.change_values(app, identity, conversation or None, values).revision}

    @router.post("/chat/preset")
    def preset(identity: Asker, name: Text, conversation: Chat = None) -> Json:
        archive.change_values(app, identity, conversation, {**app.presets.get(name), "preset": name})
        return told(identity, conversation)

    @router.post("/chat/character")
    def character(identity: Asker, name: Text, conversation: Chat = None) -> Json:
        found = app.characters.get(name)
        values = {"character": name, "name2": found.name, "context": found.context, "greeting": found.greeting}
        archive.change_values(app, identity, conversation, values)
        return told(identity, conversation)

    @router.post("/chat/user")
    def user(identity: Asker, name: Text, conversation: Chat = None) -> Json:
        found = app.users.get(name)
        archive.change_values(app, identity, conversation, {"name1": found.name, "user_bio": found.bio})
        return told(identity, conversation)

    @router.post("/chat/session/save")
    def save(identity: Asker) -> Json:
        """Make this browser's values the defaults: the differences go to the user's settings file, the rest of it is kept."""
        if app.settings.multi_user:
            raise AccessDenied("In multi-user mode the defaults are set by the settings file only.")
        found = app.sessions.get(identity.session)
        stored = settings.parse_yaml(settings.Text(str(app.data.settings), _read(app)))
        kept = {key: value for key, value in stored.items() if key not in found.values()}
        changed = {**found.sampling.differences(), **found.chat.differences(), **found.page.differences()}
        write_atomically(app.data.settings, settings.saved(changed, kept.items()))
        app.sessions.set_defaults(found)
        return {}


def _read(app: App) -> str:
    try:
        return app.data.settings.read_text("utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"Cannot read {app.data.settings}: {error}. Correct or remove that file, then save again.") from None


def _add_files(router: APIRouter, app: App, who: Callable[..., Identity]) -> None:
    """Files of the user's folder that the page uses."""

    @router.get("/notification")
    def notification(identity: Annotated[Identity, Depends(who)]) -> FileResponse:
        if not app.data.notification.is_file():
            raise NotFound("There is no notification file in the user data.")
        return FileResponse(app.data.notification, headers={"Cache-Control": "no-store"})

    @router.get("/styles/{name}.css")
    def style(name: str, identity: Annotated[Identity, Depends(who)]) -> FileResponse:
        shipped, own = inside(ASSETS / "styles", f"{name}.css", "style"), inside(app.data.css, f"{name}.css", "style")
        path = own if own.is_file() else shipped
        if not path.is_file():
            raise NotFound(f"There is no style {name!r}. Put {name}.css into {app.data.css}, or choose another one.")
        return FileResponse(path, media_type="text/css", headers={"Cache-Control": "no-cache"})


def _add_metrics(router: APIRouter, app: App, auth: Auth) -> None:
    @router.get("/metrics")
    def metrics(request: Request) -> Response:
        """For a Prometheus. Where there are logins it needs one; else it cannot have this page's cookie, and there is nothing private in it."""
        if auth.login_required:
            auth.need(request)
        body, content_type = app.metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type, "Cache-Control": "no-store"})
