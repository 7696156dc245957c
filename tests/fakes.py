"""Fakes for tests: an engine that says what it is told to say, when it is let, and an App around it."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from modules import loaders
from modules.app import App, build, option_groups
from modules.backends.base import CancelToken, Chunk, EngineStats, GenerationRequest, Loader, Timings
from modules.errors import EngineDied
from modules.options import Options, knob
from modules.paths import UserData
from modules.samplers import SamplingParams
from modules.settings import load
from modules.store import Store

WAIT = 20.0
"""Seconds after which a test that waits has failed."""


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What `coroutine` returns. In a thread of its own: a worker that drives a browser has an event loop running in its main one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result(WAIT)


class FakeBackend:
    """Says `script`, piece by piece; `gate` holds it back before each piece, `error` is raised after the last one.

    With "prefill" in `features` it takes prompts ahead: `prefills` are those begun, `prefilled` those done; `hold_prefills()` keeps them waiting.
    """

    name, chat_template, bos_token, eos_token = "fake", None, "", ""

    def __init__(self, script=("Hello", " world"), context_length=2048, features=frozenset(), error=None) -> None:
        self.script, self.context_length, self.features, self.error = list(script), context_length, features, error
        self.gate = threading.Semaphore(10**6)
        self.requests: list[GenerationRequest] = []
        self.unloaded, self.closed, self.at_once, self.most_at_once = False, 0, 0, 0
        self.told = EngineStats()
        self.prefills: list[GenerationRequest] = []
        self.prefilled: list[GenerationRequest] = []
        self._prefilling, self._held, self._deaf = threading.Condition(), False, False

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, tokens) -> str:
        return "".join(map(chr, tokens))

    def generate(self, request: GenerationRequest) -> Iterator[Chunk]:
        self.requests.append(request)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        prompt, said = len(request.prompt), 0
        try:
            for said, text in enumerate(self.script, 1):
                self._wait(request)
                if self.unloaded:
                    raise EngineDied("The model was unloaded. Load it and send again.")
                if request.cancel.cancelled:
                    yield Chunk(finish_reason="cancelled", prompt_tokens=prompt, completion_tokens=said - 1)
                    return
                yield Chunk(text, (said,), prompt_tokens=prompt if said == 1 else 0, completion_tokens=said)
            if self.error:
                raise self.error
            yield Chunk(finish_reason="stop", prompt_tokens=prompt, completion_tokens=said, timings=Timings(decode_seconds=1.0, reused_tokens=3))
        finally:
            self.at_once -= 1
            self.closed += 1

    def _wait(self, request: GenerationRequest) -> None:
        """Until the gate lets one piece through, or the request is cancelled."""
        for _ in range(int(6 * WAIT / 0.01)):
            if self.gate.acquire(timeout=0.01) or request.cancel.cancelled or self.unloaded:
                return
        raise AssertionError("the test never opened the gate")

    def prefill(self, request: GenerationRequest) -> None:
        self.prefills.append(request)
        request.cancel.on_cancel(self._look_again)
        with self._prefilling:
            ended = self._prefilling.wait_for(lambda: not self._held or self.unloaded or (request.cancel.cancelled and not self._deaf), WAIT)
        assert ended, "the test never let the prefill go on"
        if self.unloaded:
            raise EngineDied("The model was unloaded. Load it and send again.")
        if not request.cancel.cancelled:
            self.prefilled.append(request)

    def hold_prefills(self, held: bool = True, deaf: bool = False) -> None:
        """Let prefills wait, or go on. `deaf`: they do not even hear that they are cancelled, as in an engine that hangs."""
        self._held, self._deaf = held, deaf
        self._look_again()

    def _look_again(self) -> None:
        with self._prefilling:
            self._prefilling.notify_all()

    def alive(self) -> bool:
        return not self.unloaded

    def memory(self) -> int:
        return 123

    def stats(self) -> EngineStats:
        return self.told

    def unload(self) -> None:
        self.unloaded = True
        self.gate.release()
        self._look_again()


class FakeOptions(Options):
    fake_size: int = knob(1, "Size.", bounds=(0, 10), group="fake")


class FakeEngine:
    """A Loader of `.fake` files and all that it loaded; `hold()` keeps loads waiting until `go` is set or they are cancelled."""

    def __init__(self, make=FakeBackend) -> None:
        self.make, self.errors, self.loaded, self.progress = make, {}, [], []
        self.started, self.go = threading.Semaphore(0), threading.Event()
        self.go.set()
        self.loader = Loader("fake", FakeOptions, lambda path: path.suffix == ".fake", self._load, frozenset(SamplingParams.model_fields))

    def _load(self, path, options, progress, cancel: CancelToken) -> FakeBackend:
        progress(0.5, "half")
        self.started.release()
        cancel.on_cancel(self.go.set)
        assert self.go.wait(WAIT), "the test never let the load go on"
        error = self.errors.get(path.name)
        if error:
            raise error
        self.loaded.append(self.make())
        return self.loaded[-1]


class PlainPresenter:
    """Tells the deltas as they are, so that a listener can put the text together again; `update` fails once the text has `fail_in`."""

    def __init__(self):
        self.text, self.new, self.reasoning = "", "", ""
        self.fail_in = ""

    def feed(self, text, reasoning):
        self.text, self.new, self.reasoning = self.text + text, self.new + text, self.reasoning + reasoning

    def update(self, stats, final):
        if self.fail_in and self.fail_in in self.text:
            raise RecursionError("too deep")
        new, self.new = self.new, ""
        return {"new": new, "tokens": stats.tokens, "final": final}

    def snapshot(self, stats):
        return {"text": self.text}

    def end(self, message):
        return {"text": message.text, "state": message.state, "error": message.details.get("error")}


def until(true, seconds: float = WAIT) -> None:
    """Wait until `true()`; fails after `seconds`."""
    waited = threading.Event()
    for _ in range(int(seconds / 0.005)):
        if true():
            return
        waited.wait(0.005)
    raise AssertionError("the condition never came true")


def make_app(folder, monkeypatch, *flags: str, model: bool = True) -> App:
    """An App in `folder` with a fake engine, `model` loaded; its store is a real one."""
    engine = FakeEngine()
    monkeypatch.setattr(loaders, "LOADERS", (engine.loader,))
    data = UserData(folder)
    data.create()
    (data.models / "model.fake").touch()
    app = build(load(flags, (), (), option_groups()), data, Store.open(data.database), PlainPresenter)
    if model:
        app.models.load(app.models.choose("model.fake"))
    return app
