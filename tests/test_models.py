import dataclasses
import threading
import time

import pytest

from modules import loaders, models
from modules.backends.base import Adapter, CancelToken, EngineStats, GenerationRequest, adapters_of
from modules.errors import Busy, EngineDied, ModelError, NameError_, NoModel, NotFound, SettingsError
from modules.models import ModelSlot, ModelStatus, Rules
from modules.options import Options, knob
from modules.paths import UserData
from modules.turn_lock import TurnLock
from tests.fakes import WAIT, FakeBackend, FakeEngine, FakeOptions, until


@pytest.fixture
def engine(monkeypatch):
    engine = FakeEngine()
    monkeypatch.setattr(loaders, "LOADERS", (engine.loader,))
    return engine


@pytest.fixture
def slot(engine, tmp_path):
    data = UserData(tmp_path)
    data.create()
    for name in ("a.fake", "b.fake", "c.fake"):
        (data.models / name).touch()
    slot = ModelSlot(data, {FakeOptions: FakeOptions(fake_size=5)})
    yield slot
    engine.go.set()
    slot.close()


def run(function, *args):
    """Start `function` on a thread; the returned function joins it and gives its result or the error it raised."""
    results = []

    def body():
        try:
            results.append(function(*args))
        except BaseException as error:  # noqa: BLE001  handed to the test
            results.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()

    def join():
        thread.join(WAIT)
        assert results, "the thread never ended"
        return results[0]

    return join


def hold(engine, slot, name):
    """A load of `name` under way that does not go on before `engine.go` is set."""
    while engine.started.acquire(blocking=False):
        pass
    engine.go.clear()
    join = run(slot.load, slot.choose(name))
    assert engine.started.acquire(timeout=WAIT)
    return join


# --- choosing -----------------------------------------------------------------------------------------------------------------------


def test_choose_finds_loader_and_options(slot):
    choice = slot.choose("a.fake")
    assert (choice.name, choice.loader.name, choice.options) == ("a.fake", "fake", FakeOptions(fake_size=5))
    assert slot.choose("a.fake", "FAKE", {"fake_size": 7}).options == FakeOptions(fake_size=7)
    assert slot.names() == ["a.fake", "b.fake", "c.fake"]


def test_a_wrong_choice_is_told(slot, tmp_path):
    (slot.data.models / "x.txt").touch()
    for arguments, error in [
        (("none.fake",), NotFound),
        (("../a.fake",), NameError_),
        ((str(slot.data.models / "a.fake"),), NameError_),
        (("x.txt",), ModelError),
        (("a.fake", "exllama"), ModelError),
        (("a.fake", "", {"fake_size": 99}), SettingsError),
        (("a.fake", "", {"trust_remote_code": True}), SettingsError),
    ]:
        with pytest.raises(error):
            slot.choose(*arguments)
    assert slot.status() == ModelStatus()


def test_only_the_command_line_may_name_a_path_elsewhere(slot, tmp_path):
    (tmp_path / "elsewhere.fake").touch()
    choice = slot.choose(str(tmp_path / "elsewhere.fake"), anywhere=True)
    assert (choice.name, choice.path) == ("elsewhere.fake", tmp_path / "elsewhere.fake")
    assert slot.choose("a.fake", anywhere=True).path == slot.data.models / "a.fake"


class FileOptions(Options):
    vision: str = knob("", "A file.", group="fake", file="mmproj")


def test_names_of_files_in_options_become_paths(slot, engine, tmp_path, monkeypatch):
    loader = dataclasses.replace(engine.loader, options=FileOptions)
    monkeypatch.setattr(loaders, "LOADERS", (loader,))
    elsewhere, inside = tmp_path / "own.gguf", slot.data.mmproj / "eyes.gguf"
    elsewhere.touch()
    inside.touch()
    assert slot.choose("a.fake", "", {"vision": "eyes.gguf"}).options.vision == str(inside)
    with pytest.raises(NotFound, match=r"no mmproj 'none\.gguf'"):
        slot.choose("a.fake", "", {"vision": "none.gguf"})
    for name in (str(elsewhere), "../own.gguf"):  # from the page no paths
        with pytest.raises(NameError_):
            slot.choose("a.fake", "", {"vision": name})
    slot.choices = dataclasses.replace(slot.choices, configured={FileOptions: FileOptions(vision=str(elsewhere))})
    assert slot.choose("a.fake").options.vision == str(elsewhere)
    assert slot.choose("a.fake", "", {"vision": str(elsewhere)}).options.vision == str(elsewhere)


def test_adapters_are_loaded_with_every_model_that_can(slot, engine, tmp_path, caplog):
    fits, not_there = tmp_path / "fits.gguf", tmp_path / "other.gguf"
    slot.adapters = (Adapter(fits, 0.5), Adapter(not_there))

    class Adapting(FakeBackend):
        adapters = ()

        def load_adapter(self, path):
            if path == not_there:
                raise ModelError("made for another base")
            self.adapters = (*self.adapters, path.resolve())

    engine.make = lambda: Adapting(features=frozenset({"adapters"}))
    slot.load(slot.choose("a.fake"))
    assert adapters_of(slot.backend, slot.adapters) == (Adapter(fits, 0.5),)
    engine.make = FakeBackend
    slot.load(slot.choose("b.fake"))
    assert adapters_of(slot.backend, slot.adapters) == ()


# --- loading and unloading ----------------------------------------------------------------------------------------------------------


def test_load_use_unload_and_what_listeners_see(slot, engine):
    seen = []
    slot.listen(lambda: seen.append((slot._status.state, slot._status.name, slot._status.progress)))
    with pytest.raises(NoModel, match="Choose one on the Model tab"):
        _ = slot.backend
    slot.load(slot.choose("a.fake"))
    status = slot.status()
    assert (status.state, status.name, status.loader, status.context_length, status.memory) == ("ready", "a.fake", "fake", 2048, 123)
    assert "temperature" in status.samplers and status.samplers == tuple(sorted(status.samplers))
    assert slot.backend is engine.loaded[0]
    slot.unload()
    assert engine.loaded[0].unloaded and slot.status() == ModelStatus()
    slot.unload()
    assert seen == [("loading", "a.fake", 0.0), ("loading", "a.fake", 0.5), ("ready", "a.fake", 1.0), ("none", None, 0.0), ("none", None, 0.0)]


def test_who_listens_for_loads_gets_each_model_before_it_can_be_used(slot, engine):
    seen = []
    slot.on_load(lambda backend: seen.append((backend, slot._status.state)))
    slot.load(slot.choose("a.fake"))
    engine.errors["b.fake"] = ModelError("No.")
    with pytest.raises(ModelError):
        slot.load(slot.choose("b.fake"))
    assert seen == [(engine.loaded[0], "ready"), (engine.loaded[1], "ready")]  # the second: a again, after b


def test_stats_are_there_with_a_model_that_tells_them(slot, engine):
    assert slot.stats() is None
    slot.load(slot.choose("a.fake"))
    assert slot.stats() is None
    engine.make = lambda: FakeBackend(features=frozenset({"stats"}))
    slot.load(slot.choose("b.fake"))
    engine.loaded[-1].told = EngineStats(busy_sequences=3)
    assert slot.stats() == EngineStats(busy_sequences=3)
    slot.unload_if_idle()
    assert slot.stats() is None and len(engine.loaded) == 2  # asking loads nothing


def test_the_former_model_is_freed_before_the_next_is_loaded(slot, engine):
    slot.load(slot.choose("a.fake"))
    join = hold(engine, slot, "b.fake")
    assert engine.loaded[0].unloaded
    with pytest.raises(NoModel, match="still loading"):
        _ = slot.backend
    engine.go.set()
    assert join() is None
    assert slot.status().name == "b.fake" and slot.backend is engine.loaded[1]


def test_two_loads_at_once_are_refused(slot, engine):
    join = hold(engine, slot, "a.fake")
    for start in (slot.load, slot.start_loading):
        with pytest.raises(Busy) as busy:
            start(slot.choose("b.fake"))
        assert busy.value.retry_after > 0
    assert slot.status().name == "a.fake"
    engine.go.set()
    join()
    assert slot.status().state == "ready"


def test_a_failed_load_brings_the_former_model_back(slot, engine):
    slot.load(slot.choose("a.fake"))
    engine.errors["b.fake"] = ModelError("The file is cut off. Fetch it again.")
    with pytest.raises(ModelError, match="cut off"):
        slot.load(slot.choose("b.fake"))
    status = slot.status()
    assert (status.state, status.name) == ("ready", "a.fake")
    assert status.text == "The file is cut off. Fetch it again. a.fake is in use again."
    assert slot.backend is engine.loaded[1] and not engine.loaded[1].unloaded


def test_a_failed_load_without_a_former_model(slot, engine):
    engine.errors["b.fake"] = ModelError("The file is cut off. Fetch it again.")
    with pytest.raises(ModelError):
        slot.load(slot.choose("b.fake"))
    status = slot.status()
    assert (status.state, status.name, status.text) == ("failed", "b.fake", "The file is cut off. Fetch it again.")
    with pytest.raises(NoModel, match="No model is loaded"):
        _ = slot.backend
    slot.load(slot.choose("a.fake"))
    assert slot.status().state == "ready"


@pytest.mark.parametrize("error", [ModelError("Gone too."), Busy("No place."), SettingsError("Wrong.")])
def test_when_the_former_model_fails_too_the_first_error_is_told(error, slot, engine):
    slot.load(slot.choose("a.fake"))
    engine.errors |= {"b.fake": ModelError("The file is cut off."), "a.fake": error}
    with pytest.raises(ModelError, match="cut off"):
        slot.load(slot.choose("b.fake"))
    assert (slot.status().state, slot.status().name, slot.status().text) == ("failed", "b.fake", "The file is cut off.")


def test_an_error_that_nobody_foresaw_does_not_stay_loading(slot, engine, caplog, monkeypatch):
    monkeypatch.setattr(models.logger, "propagate", True)
    engine.errors["a.fake"] = ZeroDivisionError("secret path")
    slot.start_loading(slot.choose("a.fake"))
    until(lambda: slot.status().state == "failed")
    assert slot.status().text == "Loading failed: ZeroDivisionError. The terminal has the details."
    until(lambda: "Loading a.fake failed" in caplog.text)
    engine.errors["b.fake"] = ModelError("Told on the terminal.")
    slot.start_loading(slot.choose("b.fake"))
    until(lambda: "Told on the terminal." in caplog.text)
    slot.load(slot.choose("c.fake"))
    assert slot.status().state == "ready"


def test_cancelling_a_load_brings_the_former_model_back(slot, engine):
    """The fake notices nothing and loads to the end, as a cancel that comes too late."""
    slot.load(slot.choose("a.fake"))
    join = hold(engine, slot, "b.fake")
    slot.cancel_loading()
    assert isinstance(join(), ModelError)
    assert engine.loaded[1].unloaded
    assert (slot.status().state, slot.status().name) == ("ready", "a.fake")
    assert slot.status().text == "Loading was cancelled. a.fake is in use again."


def test_cancelling_the_first_load_leaves_no_model(slot, engine):
    engine.errors["a.fake"] = ModelError("Cancelled.")
    join = hold(engine, slot, "a.fake")
    seen = []
    slot.listen(lambda: seen.append(slot.status().text))
    slot.cancel_loading()
    assert isinstance(join(), ModelError)
    assert seen[0] == "Cancelling…"
    assert slot.status() == ModelStatus(text="Loading was cancelled.")
    slot.cancel_loading()


def test_unloading_during_a_load_leaves_no_model_not_even_the_former(slot, engine):
    slot.load(slot.choose("a.fake"))
    join = hold(engine, slot, "b.fake")
    slot.unload()
    assert isinstance(join(), ModelError)
    assert slot.status().state == "none" and all(backend.unloaded for backend in engine.loaded)
    with pytest.raises(NoModel, match="No model is loaded"):
        _ = slot.backend


def test_closing_during_a_load(slot, engine):
    slot.load(slot.choose("a.fake"))
    join = hold(engine, slot, "b.fake")
    slot.close()
    join()
    assert all(backend.unloaded for backend in engine.loaded) and slot.status().state == "none"


def test_a_model_unloaded_in_the_moment_it_is_ready_is_not_shown_as_ready(slot, engine, monkeypatch):
    info = models.logger.info
    monkeypatch.setattr(models.logger, "info", lambda *words: (info(*words), slot.unload() if words[0].startswith("Loaded") else None))
    slot.load(slot.choose("a.fake"))
    assert slot.status().state == "none" and engine.loaded[0].unloaded


def test_a_load_begun_while_another_fails_keeps_its_own_status(slot, engine):
    slot.load(slot.choose("a.fake"))
    engine.errors["b.fake"] = ModelError("The file is cut off.")
    joins = []

    def at_once_another():  # in the moment the former model is back
        if slot._loading is None and not joins:
            joins.append(hold(engine, slot, "c.fake"))

    slot.listen(at_once_another)
    with pytest.raises(ModelError):
        slot.load(slot.choose("b.fake"))
    assert (slot.status().state, slot.status().name) == ("loading", "c.fake")
    engine.go.set()
    joins[0]()
    assert (slot.status().state, slot.status().name) == ("ready", "c.fake")


def test_progress_that_comes_after_the_load_changes_nothing(slot, engine):
    late = []
    make = engine.loader.load

    def load(path, options, progress, cancel):
        late.append(progress)
        progress(7, "too much")
        assert slot.status().progress == 1.0
        return make(path, options, progress, cancel)

    choice = slot.choose("a.fake")
    object.__setattr__(engine.loader, "load", load)
    slot.load(choice)
    late[0](0.9, "late")
    assert slot.status().state == "ready"


# --- generating ---------------------------------------------------------------------------------------------------------------------


def test_unloading_ends_a_running_generation_with_an_error(slot, engine):
    engine.make = lambda: FakeBackend(["a", "b", "c"])
    slot.load(slot.choose("a.fake"))
    backend = engine.loaded[0]
    backend.gate = threading.Semaphore(1)
    pieces = []

    def generate():
        with slot.turn(CancelToken()) as model:
            for chunk in model.generate(GenerationRequest("x")):
                pieces.append(chunk.text)

    join = run(generate)
    until(lambda: pieces)
    slot.unload()
    assert isinstance(join(), EngineDied) and pieces == ["a"]
    with pytest.raises(NoModel), slot.turn(CancelToken()):
        pass


def test_a_parallel_engine_is_not_locked(slot, engine):
    engine.make = lambda: FakeBackend(features=frozenset({"parallel"}))
    slot.load(slot.choose("a.fake"))
    with slot.turn(CancelToken()) as first, slot.turn(CancelToken()) as second:
        assert first is second is engine.loaded[0]


def test_one_at_a_time_otherwise(slot, engine):
    slot.load(slot.choose("a.fake"))
    cancel = CancelToken()
    with slot.turn(CancelToken()) as first:
        assert first is engine.loaded[0]

        def wait():
            with slot.turn(cancel) as second:
                return second

        join = run(wait)
        until(lambda: len(slot._current.turns._queue) == 2)
        cancel.cancel()
        assert join() is None
    assert slot.loaded()[0].users == 0


def waiting(lock, order, name, cancel=None):
    def body():
        with lock.turn(cancel or CancelToken()) as held:
            order.append((name, held))

    before = len(lock._queue)
    join = run(body)
    until(lambda: len(lock._queue) > before)
    return join


def test_turns_are_first_come_first_served():
    lock, order = TurnLock(), []
    with lock.turn(CancelToken()) as held:
        assert held
        joins = [waiting(lock, order, n) for n in range(8)]
        assert order == []
    for join in joins:
        join()
    assert order == [(n, True) for n in range(8)]
    assert not lock._queue


def test_a_cancelled_waiter_leaves_the_others_in_order():
    lock, order, cancel = TurnLock(), [], CancelToken()
    with lock.turn(CancelToken()):
        first = waiting(lock, order, 1, cancel)
        second = waiting(lock, order, 2)
        cancel.cancel()
        first()
        assert order == [(1, False)]
    second()
    assert order == [(1, False), (2, True)]


def test_already_cancelled_never_holds():
    cancel = CancelToken()
    cancel.cancel()
    with TurnLock().turn(cancel) as held:
        assert not held


def test_the_queue_is_bounded_and_says_when_to_come_back():
    lock, order = TurnLock(max_waiting=2), []
    with lock.turn(CancelToken()):
        joins = [waiting(lock, order, n) for n in range(2)]
        cancelled = CancelToken()
        cancelled.cancel()  # so that a lock that lets it in fails the test and does not hang it
        with pytest.raises(Busy) as busy, lock.turn(cancelled):
            pass
        assert busy.value.retry_after > 0
    for join in joins:
        join()
    with lock.turn(CancelToken()) as held:
        assert held


def test_an_error_inside_gives_the_lock_back():
    lock = TurnLock()
    with pytest.raises(ZeroDivisionError), lock.turn(CancelToken()):
        raise ZeroDivisionError
    with lock.turn(CancelToken()) as held:
        assert held


# --- several models, and room for them ----------------------------------------------------------------------------------------------


def test_a_load_waits_for_running_replies_and_says_so(slot, engine):
    slot.load(slot.choose("a.fake"))
    with slot.turn(CancelToken()):
        join = run(slot.load, slot.choose("b.fake"))
        until(lambda: slot.status().text == "Waiting for running replies of a.fake: 1…")
        assert not engine.loaded[0].unloaded and slot.backend is engine.loaded[0]  # a running reply may ask it
        with pytest.raises(NoModel, match="still loading"), slot.turn(CancelToken()):
            pass
    assert join() is None and engine.loaded[0].unloaded and slot.backend is engine.loaded[1]


def test_a_waiting_load_can_be_cancelled_and_changes_nothing(slot, engine):
    slot.load(slot.choose("a.fake"))
    with slot.turn(CancelToken()):
        join = run(slot.load, slot.choose("b.fake"))
        until(lambda: slot.status().text.startswith("Waiting"))
        slot.cancel_loading()
        assert isinstance(join(), ModelError)
        assert slot.status().state == "ready" and slot.status().name == "a.fake"
    with slot.turn(CancelToken()) as backend:
        assert backend is engine.loaded[0] and not backend.unloaded


def test_a_wait_has_a_limit(slot, engine, monkeypatch):
    monkeypatch.setattr(models, "PATIENCE", 0.05)
    slot.load(slot.choose("a.fake"))
    with slot.turn(CancelToken()), pytest.raises(Busy, match="still running"):
        slot.load(slot.choose("b.fake"))
    assert slot.backend is engine.loaded[0]


def test_where_memory_suffices_the_former_model_stays_until_the_next_is_there(slot, engine, monkeypatch):
    monkeypatch.setattr(models, "_fits", lambda choice: True)
    slot.load(slot.choose("a.fake"))
    join = hold(engine, slot, "b.fake")
    with slot.turn(CancelToken()) as backend:
        assert backend is engine.loaded[0] and not backend.unloaded
        engine.go.set()
        until(lambda: slot.status().name == "b.fake")
        assert not backend.unloaded  # its reply runs
        assert join() is None and [each.name for each in slot.loaded()] == ["b.fake"]  # whoever asked for it waits no longer
    until(lambda: engine.loaded[0].unloaded)
    engine.errors["c.fake"] = ModelError("broken")
    with pytest.raises(ModelError):
        slot.load(slot.choose("c.fake"))
    assert slot.backend is engine.loaded[1] and slot.status().state == "ready" and slot.status().text == "broken b.fake is still in use."


def test_for_a_model_of_another_server_none_here_has_to_go(slot, engine, monkeypatch):
    engine.errors["b.fake"] = ModelError("The server does not answer.")
    slot.load(slot.choose("a.fake"))
    with pytest.raises(ModelError):
        slot.load(slot.choose("b.fake"))
    assert engine.loaded.pop(0).unloaded  # it went, and came back
    remote = dataclasses.replace(engine.loader, elsewhere=True)
    monkeypatch.setattr(loaders, "LOADERS", (remote,))
    with pytest.raises(ModelError, match="does not answer"):
        slot.load(slot.choose("b.fake"))
    assert not engine.loaded[0].unloaded and slot.backend is engine.loaded[0]


@pytest.fixture
def several(slot):
    slot.rules = Rules(most=2, on_request=True)
    return slot


def test_a_request_for_a_model_at_a_server_that_is_not_configured_is_for_the_current_one(several):
    several.load(several.choose("a.fake"))
    assert several.answering("openai:gpt") == "a.fake"


def test_the_model_used_least_recently_goes_first(several, engine, monkeypatch):
    monkeypatch.setattr(models.time, "monotonic", clock := Clock())
    for name in ("a.fake", "b.fake"):
        several.load(several.choose(name))
        clock.now += 1
    assert {each.name: each.current for each in several.loaded()} == {"a.fake": False, "b.fake": True}
    with several.use("a.fake") as backend:
        assert backend is engine.loaded[0]
    clock.now += 1
    several.load(several.choose("c.fake"))
    assert {each.name for each in several.loaded()} == {"a.fake", "c.fake"} and engine.loaded[1].unloaded
    several.unload("a.fake")
    assert [each.name for each in several.loaded()] == ["c.fake"] and several.status().name == "c.fake"


def test_a_request_loads_the_model_that_it_names_and_the_page_keeps_its_own(several, engine):
    several.load(several.choose("a.fake"))
    assert several.answering("b.fake") == "b.fake" and several.answering("nowhere.fake") == several.answering("a.fake") == "a.fake"
    with several.turn(CancelToken(), "b.fake") as backend:
        assert backend is engine.loaded[1] and several.backend is engine.loaded[0] and several.status().name == "a.fake"
    several.rules = Rules(most=1, on_request=True)
    with several.turn(CancelToken(), "c.fake") as backend:
        assert backend is several.backend and [each.name for each in several.loaded()] == ["c.fake"]


def test_without_leave_a_request_loads_nothing(slot, engine):
    slot.load(slot.choose("a.fake"))
    assert slot.answering("b.fake") == "a.fake"
    with pytest.raises(NoModel, match="not loaded any more"), slot.turn(CancelToken(), "b.fake"):
        pass


def test_a_broken_model_makes_nobody_go(several, engine, monkeypatch):
    """Its file is looked into before anything is done for it."""

    def broken(path):
        raise ModelError(f"{path.name} is damaged")

    for name in ("a.fake", "b.fake"):
        several.load(several.choose(name))
    monkeypatch.setattr(models, "inspect", broken)
    choice = several.choose("c.fake")
    choice = dataclasses.replace(choice, loader=dataclasses.replace(choice.loader, inspected=True))
    with pytest.raises(ModelError, match="damaged"):
        several.load(choice)
    assert {each.name for each in several.loaded()} == {"a.fake", "b.fake"} and several.status().state == "ready"


def test_while_another_model_loads_the_current_one_answers_as_itself(several, engine):
    several.load(several.choose("a.fake"))
    join = hold(engine, several, "b.fake")
    assert several.status().name == "b.fake" and several.answering("") == several.answering("nowhere") == "a.fake"
    assert several.status_of("").name == several.status_of("a.fake").name == "a.fake" and several.status_of("a.fake").samplers
    engine.go.set()
    join()


def test_requests_for_one_model_wait_for_one_load(several, engine):
    several.load(several.choose("a.fake"))
    engine.go.clear()

    def ask():
        with several.turn(CancelToken(), "b.fake") as backend:
            return backend

    joins = [run(ask) for _ in range(3)]
    until(lambda: several.status().state == "loading")
    engine.go.set()
    assert {join() for join in joins} == {engine.loaded[1]}


def test_a_request_whose_model_came_while_it_chose_does_not_load_it_again(several, engine, monkeypatch):
    several.load(several.choose("a.fake"))
    choose = several.choose

    def slowly(name):
        monkeypatch.setattr(several, "choose", choose)
        several.load(choose(name))  # another request was quicker
        return choose(name)

    monkeypatch.setattr(several, "choose", slowly)
    with several.turn(CancelToken(), "b.fake") as backend:
        assert backend is engine.loaded[1] and len(engine.loaded) == 2


def test_a_request_that_is_given_up_waits_no_longer(several, engine):
    join = hold(engine, several, "a.fake")
    cancel = CancelToken()

    def ask():
        with several.turn(cancel, "b.fake") as backend:
            return backend

    asked = run(ask)
    cancel.cancel()
    assert asked() is None
    engine.go.set()
    join()


# --- what is saved for a model ------------------------------------------------------------------------------------------------------


def test_saved_options_count_unless_a_flag_or_the_page_says_otherwise(slot):
    slot.settings.save("a.fake", "fake", {"fake_size": 3, "other": 1})
    assert slot.choose("a.fake").options.fake_size == 3 and slot.choose("b.fake").options.fake_size == 5
    assert slot.choose("a.fake", options={"fake_size": 4}).options.fake_size == 4
    slot.rules = Rules(explicit=frozenset({"fake_size"}))
    assert slot.choose("a.fake").options.fake_size == 5


def test_a_saved_loader_that_is_not_here_is_passed_over(slot, engine, caplog):
    slot.settings.save("a.fake", "ExLlamav3_HF", {"fake_size": 3})
    choice = slot.choose("a.fake")
    assert choice.loader is engine.loader and choice.options.fake_size == 3 and "ExLlamav3_HF" in caplog.text


def test_a_wrong_saved_value_is_told_with_its_file(slot):
    slot.settings.save("a.fake", "fake", {"fake_size": 99})
    with pytest.raises(SettingsError, match=r"config-user\.yaml: fake_size cannot be 99"):
        slot.choose("a.fake")


def test_a_saved_template_is_used_from_the_load_on_and_changed_at_once(slot, engine):
    slot._template = {"Mine": "{{ mine }}"}.__getitem__
    slot.settings.set_template("a.fake", "Mine")
    slot.load(slot.choose("a.fake"))
    assert slot.backend.chat_template == "{{ mine }}"
    slot.settings.set_template("a.fake", "")
    slot.use_template("a.fake")
    assert slot.backend.chat_template is None


# --- idle ---------------------------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def idle(slot, monkeypatch):
    """A slot that unloads after a minute, its loaded model, and a way to let time pass."""
    now = [time.monotonic()]
    monkeypatch.setattr(models.time, "monotonic", lambda: now[0])
    slot.rules = Rules(idle_minutes=1)
    slot.load(slot.choose("a.fake"))
    slot._current.last_use = now[0]

    def sleep(seconds):
        now[0] += seconds

    return sleep


def test_an_unused_model_is_unloaded_and_the_next_use_loads_it_again(slot, engine, idle):
    idle(59)
    slot.unload_if_idle()
    assert slot.status().state == "ready"
    idle(1)
    slot.unload_if_idle()
    slot.unload_if_idle()
    assert (slot.status().state, slot.status().name) == ("none", "a.fake") and "next message" in slot.status().text
    assert engine.loaded[0].unloaded
    with slot.turn(CancelToken()) as backend:
        assert backend is engine.loaded[1]
    assert slot.status().state == "ready"


def test_who_asks_while_an_idle_model_is_loaded_again_waits_for_it(slot, engine, idle):
    idle(60)
    slot.unload_if_idle()
    engine.go.clear()
    joins = [run(lambda: slot.use("", CancelToken()).__enter__()) for _ in range(3)]
    assert engine.started.acquire(timeout=WAIT)
    engine.go.set()
    assert [join() for join in joins] == [engine.loaded[1]] * 3 and len(engine.loaded) == 2


def test_an_idle_model_comes_back_although_another_one_could_not_be_loaded(slot, engine, idle):
    idle(60)
    slot.unload_if_idle()
    engine.errors["b.fake"] = ModelError("broken")
    with pytest.raises(ModelError):
        slot.load(slot.choose("b.fake"))
    with slot.turn(CancelToken()) as backend:
        assert backend is engine.loaded[1]
    assert slot.status().name == "a.fake"


@pytest.mark.parametrize("end", ["unload", "close"])
def test_a_replaced_model_that_still_writes_is_unloaded_with_all(slot, engine, monkeypatch, end):
    monkeypatch.setattr(models, "_fits", lambda choice: True)
    slot.load(slot.choose("a.fake"))
    with slot.turn(CancelToken()):
        slot.load(slot.choose("b.fake"))
        assert not engine.loaded[0].unloaded
        getattr(slot, end)()
        assert engine.loaded[0].unloaded and engine.loaded[1].unloaded


def test_a_model_in_use_is_not_idle(slot, engine, idle):
    with slot.turn(CancelToken()):
        idle(1000)
        slot.unload_if_idle()
        assert slot.status().state == "ready"
    slot.unload_if_idle()  # its end counts as a use
    assert slot.status().state == "ready"
    idle(60)
    slot.unload_if_idle()
    assert slot.status().state == "none"


def test_the_users_own_unload_is_not_undone_by_a_message(slot, engine, idle):
    idle(60)
    slot.unload_if_idle()
    slot.unload()
    with pytest.raises(NoModel):
        _ = slot.backend


def test_a_model_that_is_gone_after_idling_is_told(slot, engine, idle):
    idle(60)
    slot.unload_if_idle()
    engine.errors["a.fake"] = ModelError("The file is gone.")
    with pytest.raises(ModelError, match="gone"):
        _ = slot.backend
    assert slot.status().state == "failed"


def test_the_watcher_unloads_by_itself(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "IDLE_CHECK_SECONDS", 0.01)
    data = UserData(tmp_path)
    data.create()
    (data.models / "a.fake").touch()
    monkeypatch.setattr(models.time, "monotonic", clock := Clock())
    slot = ModelSlot(data, {}, Rules(idle_minutes=1))
    slot.load(slot.choose("a.fake"))
    clock.now += 61
    until(lambda: engine.loaded[0].unloaded)
    slot.close()
    until(lambda: not any(t.name == "idle-unload" and t.is_alive() for t in threading.enumerate()))
