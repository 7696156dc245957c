"""Routes of downloads from the Hub: looking at a repository, fetching from it, pausing and ending that. In multi-user mode there are none."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends

from modules.auth import Identity
from modules.downloads import Downloads, Plan
from modules.errors import AccessDenied

Json = dict[str, Any]
Text = Annotated[str, Body(max_length=2000)]


def administrators(multi_user: bool, refusal: str, who: Callable[..., Identity]) -> Callable[..., Identity]:
    """`who`, as a dependency of routes about the whole server: nobody in multi-user mode."""

    def administrator(identity: Annotated[Identity, Depends(who)]) -> Identity:
        if multi_user:
            raise AccessDenied(refusal)
        return identity

    return administrator


def add_downloads(router: APIRouter, downloads: Downloads, multi_user: bool, who: Callable[..., Identity], writer: Callable[..., Identity]) -> None:
    """Add the routes. `who` and `writer` say who asks, for reading and for changing something."""

    reader, admin = (
        administrators(multi_user, "In multi-user mode models are downloaded where the server is started.", each) for each in (who, writer)
    )

    def all_of_them() -> Json:
        return {"downloads": [asdict(status) for status in downloads.status()]}

    @router.get("/downloads", dependencies=[Depends(reader)])
    def listed() -> Json:
        """All downloads; what the Model tab asks again and again while one is under way."""
        return all_of_them()

    @router.post("/downloads/plan", dependencies=[Depends(admin)])
    def plan(text: Text, branch: Text = "", pattern: Text = "") -> Json:
        """What a repository offers. `pattern` names the wanted file or files."""
        return plan_view(downloads.plan(text, branch, pattern))

    @router.post("/downloads", status_code=202, dependencies=[Depends(admin)])
    def start(
        text: Text,
        branch: Text = "",
        files: Annotated[list[str] | None, Body(max_length=5000)] = None,
        replace: Annotated[bool, Body()] = False,
    ) -> Json:
        """Begin; without `files` with those that a plan marks as chosen."""
        return {"id": downloads.start(downloads.plan(text, branch), files, replace=replace), **all_of_them()}

    for name in ("pause", "resume", "cancel"):
        router.add_api_route(f"/downloads/{{id}}/{name}", _changing(downloads, name), methods=["POST"], dependencies=[Depends(admin)])
    router.add_api_route("/downloads/{id}", _changing(downloads, "forget"), methods=["DELETE"], dependencies=[Depends(admin)])


def plan_view(plan: Plan) -> Json:
    """A plan as the page shows it; largest files first."""
    chosen = set(plan.chosen)
    files = [
        {"name": file.name, "size": file.size, "quant": file.quant, "chosen": file.name in chosen}
        for file in sorted(plan.files, key=lambda file: (-file.size, file.name))
    ]
    return {"repo": plan.repo, "branch": plan.branch, "revision": plan.revision, "kind": plan.kind, "note": plan.note, "files": files}


def _changing(downloads: Downloads, method: str) -> Callable[[str], Json]:
    def change(id: str) -> Json:
        getattr(downloads, method)(id)
        return {"downloads": [asdict(status) for status in downloads.status()]}

    return change
