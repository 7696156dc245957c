"""Routes of the Model tab: models and their cards, what they need of memory, loading, what is saved for each, adapters, conversions.

In multi-user mode the page only learns the state of the model in use. Routes that wait for the disk or a child are plain `def`s: they run on threads.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Depends

from modules import adapters, loaders, memory
from modules.app import App
from modules.auth import Identity
from modules.backends.base import adapters_of
from modules.choices import Choice
from modules.conversions import Conversion
from modules.devices import MAIN, Device
from modules.errors import InUse, NotFound, SettingsError, UserError
from modules.inspect_model import inspect
from modules.memory import Estimate
from modules.model_card import ModelCard
from modules.options import Options
from modules.paths import inside, safe_name
from modules.ui.branches import status_now
from modules.ui.download_routes import administrators
from modules.ui.views import engine_view

Json = dict[str, Any]
Name = Annotated[str, Body(max_length=1000)]
Text = Annotated[str, Body(max_length=200)]
Values = Annotated[Json | None, Body()]
Who = Callable[..., Identity]


class DoesNotFit(UserError):
    """There is too little memory for a model; the page asks whether to load it all the same."""

    status = 409


def add_models(router: APIRouter, app: App, who: Who, writer: Who) -> None:
    """Add the routes. `who` and `writer` say who asks, for reading and for changing something."""

    refusal = "In multi-user mode the model is chosen where the server is started."
    reader, admin = (administrators(app.settings.multi_user, refusal, each) for each in (who, writer))
    _add_state(router, app, who)
    _add_loading(router, app, admin)
    _add_cards(router, app, reader, admin)
    _add_kept(router, app, admin)
    _add_adapters(router, app, reader, admin)
    _add_conversions(router, app, reader, admin)


# --- state and loading ------------------------------------------------------------------------------------------------------------------


def _add_state(router: APIRouter, app: App, who: Who) -> None:
    @router.get("/models", dependencies=[Depends(who)])
    def models() -> Json:
        alone = not app.settings.multi_user
        folder = {"folder": str(app.data.models)} if alone else {}
        return {"models": app.models.names() if alone else [], **folder, "status": status_now(app)}

    @router.get("/models/status", dependencies=[Depends(who)])
    def now() -> Json:
        """What the Model tab asks again and again while it is shown."""
        stats = app.models.stats()
        loaded = () if app.settings.multi_user else app.models.loaded()
        return {"status": status_now(app), "engine": engine_view(stats) if stats else None, "loaded": [vars(each) for each in loaded]}


def _add_loading(router: APIRouter, app: App, admin: Who) -> None:
    def status() -> Json:
        return {"status": status_now(app)}

    @router.post("/models/load", status_code=202, dependencies=[Depends(admin)])
    def load(name: Name, loader: Text = "", options: Values = None, force: Annotated[bool, Body()] = False) -> Json:
        """Begin to load. A model for which there is too little memory is refused with the numbers unless `force` is given."""
        choice = app.models.choose(name, loader, options or {})
        if not force:
            _need_memory(app, choice)
        app.models.start_loading(choice)
        return status()

    @router.post("/models/unload", status_code=202, dependencies=[Depends(admin)])
    def unload(name: Annotated[str | None, Body(embed=True, max_length=1000)] = None) -> Json:
        """Free the model of that name, or without a name all."""
        app.models.unload(name)
        return status()

    @router.post("/models/cancel", status_code=202, dependencies=[Depends(admin)])
    def cancel() -> Json:
        app.models.cancel_loading()
        return status()


def _need_memory(app: App, choice: Choice) -> None:
    """Raise DoesNotFit. Of a model that cannot be looked at nothing is known: its loader says what is wrong."""
    try:
        found, machine = _estimated(app, choice)
    except UserError:
        return
    problem = memory.refusal(found, machine)
    if problem:
        raise DoesNotFit(problem)


def _estimated(app: App, choice: Choice) -> tuple[Estimate, Sequence[Device]]:
    """What `choice` needs, and what is free for it: models that make place for it count as gone. Raises UserError."""
    machine = _freed(app, memory.usable(choice.options, memory.devices()))
    card, drafting = inspect(choice.path), getattr(choice.options, "model_draft", "")
    draft = inspect(Path(drafting)) if drafting else None
    return memory.estimate(card, memory.with_best_layers(card, choice.options, machine, draft), machine, draft), machine


def _freed(app: App, machine: Sequence[Device]) -> list[Device]:
    """`machine` with what the models in memory take of it. What they take of GPUs is not known, and estimated."""
    found = list(machine)
    for each in app.models.loaded():
        with suppress(UserError, OSError):  # of another server, or its files have gone
            choice = app.models.choose(each.name, each.loader)
            card = inspect(choice.path)
            whole = [Device(device.name, device.total, device.total) for device in machine]
            taken = memory.estimate(card, memory.with_best_layers(card, choice.options, whole), whole)
            mapped = choice.path.stat().st_size if choice.path.is_file() else 0  # the system has a mapped file among what is available
            found = [_with(device, max(each.memory - mapped, 0) if device.name == MAIN else taken.on(device.name)) for device in found]
    return found


def _with(device: Device, freed: int) -> Device:
    return Device(device.name, device.total, min(device.free + freed, device.total))


# --- the chosen model -------------------------------------------------------------------------------------------------------------------


def _add_cards(router: APIRouter, app: App, reader: Who, admin: Who) -> None:
    @router.get("/models/card", dependencies=[Depends(reader)])
    def card(name: str, loader: str = "") -> Json:
        """A model's card, its loader, and each option of that loader as it would be used. Reads the files: up to ten seconds."""
        saved = app.model_settings.get(name)
        chosen, error = _chosen(app, name, loader or saved.loader)
        found, wrong = _looked(chosen.path)
        return {
            "name": name,
            "own": app.places.own(name) and chosen.path.exists(),
            "file": chosen.path.is_file(),
            "card": card_view(found) if found else None,
            "error": wrong or error,
            "loader": chosen.loader.name,
            "values": _shown(app, chosen.options),
            "saved": {"loader": saved.loader, "options": dict(saved.options), "instruction_template": saved.instruction_template},
        }

    @router.post("/models/estimate", dependencies=[Depends(admin)])
    def estimate(name: Name, loader: Text = "", options: Values = None) -> Json:
        """What a model needs with these options, by device and purpose."""
        return estimate_view(*_estimated(app, app.models.choose(name, loader, options or {})))

    @router.get("/models/hash", dependencies=[Depends(reader)])
    def file_hash(name: str) -> Json:
        """The SHA-256 of a model's file; null while it is computed, which this begins."""
        path = app.places.path(name)
        if not path.is_file():
            raise NotFound(f"{name!r} is a folder. Only files have a hash.")
        return {"sha256": app.hashes.get(path)}

    @router.get("/models/memory", dependencies=[Depends(reader)])
    def free() -> Json:
        """All memory of this machine, and what is free of it."""
        return {"devices": [vars(device) for device in memory.devices()]}


def _chosen(app: App, name: str, loader: str) -> tuple[Choice, str]:
    """What loading would use, and what is wrong with what is saved: then only what is configured is used. Raises UserError."""
    try:
        return app.models.choose(name, loader), ""
    except UserError as error:
        path = app.places.path(name)
        found = loaders.named(loader) if loader else loaders.detect(path)
        return Choice(name, path, found, app.configuration.group(found.options)), str(error)


def _looked(path: Path) -> tuple[ModelCard | None, str]:
    """A card, or what is wrong; neither for a model of another server, which has no file here."""
    if not path.exists():
        return None, ""
    try:
        return inspect(path), ""
    except UserError as error:
        return None, str(error)


def _shown(app: App, options: Options) -> Json:
    """Options as the page shows them: a file by the name that may be written for it."""
    values = options.model_dump()
    for name, knob in type(options).knobs().items():
        if knob.file and values[name]:
            path = Path(values[name])
            folder = next((each for each in (app.data.mmproj, app.data.models) if path.is_relative_to(each.absolute())), None)
            values[name] = path.relative_to(folder.absolute()).as_posix() if folder else values[name]
    return values


_OF_CARD = (
    "kind", "architecture", "family", "parameters", "quantisation", "context_length", "layers", "experts", "experts_used", "embeds", "vision",
    "licence", "base_model", "template", "remote_code", "size",
)  # fmt: skip


def card_view(card: ModelCard) -> Json:
    """What the page shows of a card."""
    return {name: getattr(card, name) for name in _OF_CARD} | {"has_template": card.chat_template is not None, "files": len(card.files)}


def estimate_view(found: Estimate, machine: Sequence[Device]) -> Json:
    """An estimate as the page shows it: bytes."""
    return {
        "devices": [{**vars(device), "needs": found.purposes(device.name)} for device in machine],
        "fits": memory.fits(found, machine),
        "refusal": memory.refusal(found, machine) or "",
        "largest_context": memory.largest_context(found.card, found.options, machine, found.draft),
        "best_gpu_layers": memory.best_gpu_layers(found.card, found.options, machine, found.draft),
        "gpus": len(machine) > 1,
    }


# --- what is kept for a model -----------------------------------------------------------------------------------------------------------


def _add_kept(router: APIRouter, app: App, admin: Who) -> None:
    @router.put("/models/settings", dependencies=[Depends(admin)])
    def save(name: Name, loader: Text = "", options: Values = None) -> Json:
        """Save a loader ("": found from the file) and options for a model, beside those that are saved for it and that loader."""
        saved = app.model_settings.get(name)
        app.models.choose(name, loader, options or {})  # says what is wrong with them
        kept: Mapping[str, Any] = saved.options if saved.loader == loader else {}
        app.model_settings.save(name, loader, {**kept, **(options or {})})
        return {}

    @router.put("/models/template", dependencies=[Depends(admin)])
    def template(name: Name, template: Text) -> Json:
        """Save which instruction template a model uses; "" is its own."""
        _chosen(app, name, "")
        if template:
            app.templates.get(template)
        app.model_settings.set_template(name, template)
        app.models.use_template(name)
        return {}

    @router.post("/models/restore", dependencies=[Depends(admin)])
    def restore(name: Annotated[str, Body(embed=True, max_length=1000)]) -> Json:
        """Forget what is saved for a model."""
        app.model_settings.forget(name)
        app.models.use_template(name)
        return {}

    @router.post("/models/delete", dependencies=[Depends(admin)])
    def delete(name: Annotated[str, Body(embed=True, max_length=1000)]) -> Json:
        """Delete the files of a model of ours."""
        status = app.models.status()
        in_memory = {each.name for each in app.models.loaded()} | ({status.name} if status.state == "loading" else set())
        if name in in_memory:
            raise InUse(f"{name} is in memory. Unload it first.")
        app.places.delete(name)
        return {"models": app.models.names()}


# --- adapters ---------------------------------------------------------------------------------------------------------------------------


def _add_adapters(router: APIRouter, app: App, reader: Who, admin: Who) -> None:
    def view() -> Json:
        backend = app.models.loaded_backend()
        used = {adapters.name_of(app, each.path): each.scale for each in adapters_of(backend, app.models.adapters)} if backend else {}
        found = [{"name": name, "used": name in used, "scale": used.get(name, 1.0)} for name in adapters.names(app)]
        return {"adapters": found, "able": backend is not None and "adapters" in backend.features}

    @router.get("/models/adapters", dependencies=[Depends(reader)])
    def names() -> Json:
        """Those of the LoRA folder, which are in use with what scale, and whether the model in use can use any."""
        return view()

    @router.post("/models/adapters", dependencies=[Depends(admin)])
    def use(wanted: Annotated[dict[str, float], Body(embed=True, max_length=16)]) -> Json:
        """Use these, with these scales, and no others."""
        adapters.use(app, adapters.named(app, list(wanted.items())))
        return view()


# --- conversions ------------------------------------------------------------------------------------------------------------------------


def _add_conversions(router: APIRouter, app: App, reader: Who, admin: Who) -> None:
    def view() -> Json:
        status = app.conversions.status
        target = status.conversion.target.name if status.conversion else ""
        return {"state": status.state, "target": target, "progress": status.progress, "text": status.text, "warnings": list(status.warnings)}

    @router.get("/conversions", dependencies=[Depends(reader)])
    def now() -> Json:
        """How the newest conversion goes."""
        return view()

    @router.get("/conversions/sources", dependencies=[Depends(reader)])
    def sources() -> Json:
        """What can be converted, each with the number formats it can be converted to."""
        return {"sources": list(_sources(app))}

    @router.post("/conversions", status_code=202, dependencies=[Depends(admin)])
    def start(kind: Annotated[Literal["to-hf", "to-gguf", "lora"], Body()], name: Name, numbers: Text = "", base: Name = "") -> Json:
        """Convert a model, or an adapter, whose `base` model may be named so that they are compared."""
        if numbers not in _NUMBERS[kind]:
            raise SettingsError(f"Choose one of these formats: {', '.join(_NUMBERS[kind])}.")
        lora = kind == "lora"
        source = app.data.file("lora", name) if lora else app.places.path(name)
        target = inside(app.data.loras if lora else app.data.models, _target(kind, name, numbers), "name")
        if target.exists():
            raise InUse(f"{target.name} exists already. Delete it first, or choose another format.")
        app.conversions.start(Conversion(kind, source, target, numbers, app.places.path(base) if base else None))
        return view()

    @router.post("/conversions/cancel", status_code=202, dependencies=[Depends(admin)])
    def cancel() -> Json:
        app.conversions.cancel()
        return view()


_NUMBERS: Mapping[str, tuple[str, ...]] = {"to-hf": ("float16", "bfloat16", "float32"), "to-gguf": ("F16", "Q8_0", "F32"), "lora": ("",)}
"""Number formats of the result, the usual one first."""


def _sources(app: App) -> Iterator[Json]:
    for name in app.models.names():
        with suppress(UserError):  # gone meanwhile, or on another server
            path = app.places.path(name)
            kind = "to-hf" if path.is_file() else "to-gguf"
            yield {"name": name, "kind": kind, "numbers": _NUMBERS[kind]}
    for name in adapters.names(app):
        if not name.endswith(".gguf"):
            yield {"name": name, "kind": "lora", "numbers": _NUMBERS["lora"]}


def _target(kind: str, name: str, numbers: str) -> str:
    """The name of what is made."""
    stem = re.sub(r"(-0*1-of-\d+)?\.gguf$", "", name.rpartition("/")[2].replace(":", "-"), flags=re.IGNORECASE)
    return safe_name(stem + f"-{numbers}" * bool(numbers) + ".gguf" * (kind != "to-hf"))
