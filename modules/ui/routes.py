"""The page's own routes: conversations, turns, parameters, models, events. Each asks who is asking, calls one function, answers JSON."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Request, Response, WebSocket
from fastapi.responses import FileResponse

from modules import chat, settings
from modules.app import App
from modules.auth import Auth, Identity, NotLoggedIn
from modules.errors import AccessDenied, SettingsError, UserError
from modules.guard import require_json
from modules.paths import write_atomically
from modules.ui import ASSETS
from modules.ui.events import serve_events
from modules.ui.views import engine_view, info_view, message_view, status_view

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
    _add_turns(router, app, writer)
    _add_session(router, app, who, writer)
    _add_models(router, app, who, writer)
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
    @router.get("/chat/conversations")
    def conversations(identity: Annotated[Identity, Depends(who)], query: str = "", before: str = "") -> Json:
        page = app.store.conversations(identity.owner, query, before=before or None)
        items = [info_view(item, app.replies.running(item.id) is not None) for item in page.items]
        return {"items": items, "next": page.next}

    @router.get("/chat/conversations/{id}")
    def conversation(id: str, identity: Annotated[Identity, Depends(who)], before: str = "") -> Json:
        return _branch_view(app, identity, id, before or None)

    @router.patch("/chat/conversations/{id}")
    def rename(id: str, identity: Annotated[Identity, Depends(writer)], title: Annotated[str, Body(embed=True)]) -> Json:
        chat.rename(app, identity, id, title)
        return {}

    @router.delete("/chat/conversations/{id}")
    def delete(id: str, identity: Annotated[Identity, Depends(writer)]) -> Json:
        chat.delete(app, identity, id)
        return {}

    @router.post("/chat/select")
    def select(identity: Annotated[Identity, Depends(writer)], conversation: Annotated[str, Body()], message: Annotated[str, Body()]) -> Json:
        chat.select(app, identity, conversation, message)
        return _branch_view(app, identity, conversation)


def _branch_view(app: App, who: Identity, id: str, before: str | None = None) -> Json:
    """The newest messages of the branch shown, or those above message `before`; a running reply as it is now."""
    page = app.store.messages(who.owner, id, before=before)
    messages = [message_view(app.replies.now(m.message), m.versions) for m in page.items]
    return {"id": id, "title": app.store.info(who.owner, id).title, "messages": messages, "earlier": page.next is not None}


def _add_turns(router: APIRouter, app: App, writer: Callable[..., Identity]) -> None:
    Asker = Annotated[Identity, Depends(writer)]
    Text = Annotated[str, Body()]

    def current(identity: Identity, revision: int) -> None:
        known = app.sessions.get(identity.session).revision
        if revision != known:
            raise StaleRevision("The parameters were changed elsewhere, or the server has started anew. Check them and send again.")

    def answer(turn: chat.Turn) -> Json:
        owner, id = turn.conversation.owner, turn.conversation.id
        page = app.store.messages(owner, id, limit=len(turn.messages))
        title = app.store.info(owner, id).title
        return {"conversation": {"id": id, "title": title}, "messages": [message_view(m.message, m.versions) for m in page.items]}

    @router.post("/chat/messages", status_code=202)
    def send(identity: Asker, text: Text, revision: Annotated[int, Body()], conversation: Annotated[str | None, Body()] = None) -> Json:
        current(identity, revision)
        return answer(chat.reply(app, identity, conversation, text))

    @router.post("/chat/ahead", status_code=202)
    def ahead(identity: Asker, text: Text, revision: Annotated[int, Body()], conversation: Annotated[str | None, Body()] = None) -> Json:
        """A draft; `{"ahead": false}` where telling another one is useless until another model is loaded."""
        return {"ahead": chat.ahead(app, identity, conversation, text, revision)}

    @router.post("/chat/regenerate", status_code=202)
    def regenerate(identity: Asker, conversation: Text, message: Text, revision: Annotated[int, Body()]) -> Json:
        current(identity, revision)
        return answer(chat.regenerate(app, identity, conversation, message))

    @router.post("/chat/continue", status_code=202)
    def continue_reply(identity: Asker, conversation: Text, message: Text, revision: Annotated[int, Body()]) -> Json:
        current(identity, revision)
        return answer(chat.continue_reply(app, identity, conversation, message))

    @router.post("/chat/edit", status_code=202)
    def edit(identity: Asker, conversation: Text, message: Text, text: Text, revision: Annotated[int, Body()]) -> Json:
        current(identity, revision)
        return answer(chat.edit(app, identity, conversation, message, text))

    @router.post("/chat/stop")
    def stop(identity: Asker, message: Annotated[str, Body(embed=True)]) -> Json:
        app.replies.stop(identity.owner, message)
        return {}


def _add_session(router: APIRouter, app: App, who: Callable[..., Identity], writer: Callable[..., Identity]) -> None:
    @router.get("/chat/session")
    def session(identity: Annotated[Identity, Depends(who)]) -> Json:
        found = app.sessions.get(identity.session)
        return {"revision": found.revision, "values": found.values()}

    @router.patch("/chat/session")
    def change(identity: Annotated[Identity, Depends(writer)], values: Annotated[Json, Body()]) -> Json:
        return {"revision": app.sessions.change(identity.session, values).revision}

    @router.post("/chat/session/save")
    def save(identity: Annotated[Identity, Depends(writer)]) -> Json:
        """Make this browser's values the defaults: the differences go to the user's settings file, the rest of it is kept."""
        if app.settings.multi_user:
            raise AccessDenied("In multi-user mode the defaults are set by the settings file only.")
        found = app.sessions.get(identity.session)
        stored = settings.parse_yaml(settings.Text(str(app.data.settings), _read(app)))
        kept = {key: value for key, value in stored.items() if key not in found.values()}
        changed = {**found.sampling.differences(), **found.chat.differences()}
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


def _add_models(router: APIRouter, app: App, who: Callable[..., Identity], writer: Callable[..., Identity]) -> None:
    def admin(identity: Annotated[Identity, Depends(writer)]) -> Identity:
        if app.settings.multi_user:
            raise AccessDenied("In multi-user mode the model is chosen where the server is started.")
        return identity

    def status() -> Json:
        return {"status": status_view(app.models.status())}

    @router.get("/models")
    def models(identity: Annotated[Identity, Depends(who)]) -> Json:
        return {"models": [] if app.settings.multi_user else app.models.names(), **status()}

    @router.get("/models/status")
    def now(identity: Annotated[Identity, Depends(who)]) -> Json:
        """What the Model tab asks again and again while it is shown."""
        stats = app.models.stats()
        return {**status(), "engine": engine_view(stats) if stats else None}

    @router.post("/models/load", status_code=202)
    def load(
        identity: Annotated[Identity, Depends(admin)],
        name: Annotated[str, Body()],
        loader: Annotated[str, Body()] = "",
        options: Annotated[Json | None, Body()] = None,
    ) -> Json:
        app.models.start_loading(app.models.choose(name, loader, options))
        return status()

    @router.post("/models/unload", status_code=202)
    def unload(identity: Annotated[Identity, Depends(admin)]) -> Json:
        app.models.unload()
        return status()

    @router.post("/models/cancel", status_code=202)
    def cancel(identity: Annotated[Identity, Depends(admin)]) -> Json:
        app.models.cancel_loading()
        return status()


def _add_metrics(router: APIRouter, app: App, auth: Auth) -> None:
    @router.get("/metrics")
    def metrics(request: Request) -> Response:
        """For a Prometheus. Where there are logins it needs one; else it cannot have this page's cookie, and there is nothing private in it."""
        if auth.login_required:
            auth.need(request)
        body, content_type = app.metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type, "Cache-Control": "no-store"})
