import threading

import pytest

from modules import sessions as sessions_module
from modules.errors import DataError, SettingsError
from modules.samplers import SamplingParams
from modules.sessions import Session, Sessions
from modules.settings import ChatOptions, PageOptions
from modules.store import Store


@pytest.fixture
def store(tmp_path):
    opened = Store.open(tmp_path / "c.sqlite3")
    yield opened
    opened.close()


def make(store, **sampling) -> Sessions:
    return Sessions(store, SamplingParams.build(sampling), ChatOptions(), PageOptions())


def test_a_new_browser_begins_with_the_configured_values(store):
    session = make(store, top_k=7).get("a")
    assert session.sampling.top_k == 7
    assert session.values() == {**session.sampling.model_dump(), **session.chat.model_dump(), **session.page.model_dump()}


def test_a_change_touches_one_browser_and_its_revision(store):
    sessions = make(store)
    begun = sessions.get("a")
    first = sessions.change("a", {"temperature": 0.5})
    second = sessions.change("a", {"start_with": "Sure"})
    assert (second.sampling.temperature, second.chat.start_with) == (0.5, "Sure")
    assert len({begun.revision, first.revision, second.revision, sessions.change("a", {"start_with": ""}).revision}) == 3  # the values alone count
    assert sessions.change("a", {"language": "ru", "start_with": "Sure"}).revision == second.revision  # which shapes no reply
    second = sessions.change("a", {"language": "auto"})
    assert sessions.get("a") == second
    assert sessions.get("b").values() == make(store).get("c").values()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -1}, "temperature cannot be -1"),
        ({"temprature": 1}, "no parameter 'temprature'. Did you mean 'temperature'?"),
        ({"user_data_dir": "/"}, "no parameter 'user_data_dir'"),
        ({"temperature": 0.1, "start_with": 5}, "start_with cannot be 5"),
        ({"x" * 10_000: 1}, "no parameter"),
    ],
)
def test_a_wrong_change_changes_nothing(values, words, store):
    sessions = make(store)
    with pytest.raises(SettingsError) as refused:
        sessions.change("a", values)
    assert words in str(refused.value) and len(str(refused.value)) < 300
    assert sessions.get("a") == make(store).get("b") and store.session("a") is None


def test_choices_outlive_the_server_as_differences(store):
    make(store).change("a", {"temperature": 0.5, "sampler_priority": "top_k\ntop_p"})
    assert store.session("a")["values"] == {"temperature": 0.5, "sampler_priority": ["top_k", "top_p"]}
    later = make(store, min_p=0.3).get("a")
    assert (later.sampling.temperature, later.sampling.min_p) == (0.5, 0.3)
    assert later.sampling.sampler_priority == ("top_k", "top_p")


@pytest.mark.parametrize(
    "saved", [{}, {"values": {"gone": 1}, "revision": 3}, {"values": {"temperature": -5}, "revision": 3}, {"revision": 3}, {"values": {}}]
)
def test_what_another_version_saved_never_costs_the_page(saved, store):
    store.save_session("a", saved)
    session = make(store).get("a")
    assert session.sampling == SamplingParams()


def test_a_change_that_cannot_be_saved_is_not_made(store, monkeypatch):
    sessions = make(store)

    def full(key, values):
        raise DataError("The disk is full.")

    monkeypatch.setattr(store, "save_session", full)
    with pytest.raises(DataError):
        sessions.change("a", {"top_k": 3})
    assert sessions.get("a").sampling.top_k == 0


def test_new_defaults_reach_new_browsers(store):
    sessions = make(store)
    chosen = sessions.change("a", {"top_k": 3})
    sessions.set_defaults(chosen)
    assert sessions.get("b").sampling.top_k == 3


def test_only_so_many_are_in_memory_and_none_is_lost(store, monkeypatch):
    monkeypatch.setattr(sessions_module, "MAX_IN_MEMORY", 3)
    sessions = make(store)
    for number in range(10):
        sessions.change(str(number), {"top_k": number + 1})
    assert len(sessions._known) == 3
    assert [sessions.get(str(n)).sampling.top_k for n in range(10)] == list(range(1, 11))


def test_changes_from_many_threads_are_all_counted(store):
    sessions = make(store)
    names = ["top_k", "max_new_tokens", "seed", "repetition_penalty_range"]
    threads = [threading.Thread(target=lambda n=n: [sessions.change("a", {n: i}) for i in range(1, 11)]) for n in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    session = sessions.get("a")
    assert [getattr(session.sampling, n) for n in names] == [10] * 4


def test_a_session_is_a_value():
    session = Session(SamplingParams(), ChatOptions(), PageOptions())
    assert session.change({}) == session and session.change({"top_k": 5}) != session


# --- a conversation's own values ------------------------------------------------------------------------------------------------------


def test_a_conversation_keeps_what_shapes_its_replies(store):
    session = make(store, top_k=7).get("a").change({"mode": "chat", "name2": "Ada", "language": "ru", "dry_sequence_breakers": '"a", "b"'})
    kept = session.kept()
    assert kept["name2"] == "Ada" and "language" not in kept and kept["top_k"] == 7
    other = make(store).get("b").of(kept)
    assert (other.sampling, other.chat, other.page) == (session.sampling, session.chat, PageOptions())
    assert other.revision == session.revision


def test_plain_values_are_kept_too(store):
    """Else a conversation with the defaults would follow every later change of the browser's values."""
    browser = make(store).get("a")
    assert browser.kept() and browser.change({"top_k": 3}).of(browser.kept()).sampling.top_k == 0
    assert browser.change({"top_k": 3}).of({}).sampling.top_k == 3  # one that keeps none, from an earlier version


def test_what_another_version_kept_costs_only_itself(store):
    found = make(store).get("a").of({"mode": "chat", "temperature": -5, "gone": 1, "top_k": 4, "name2": 7})
    assert (found.chat.mode, found.sampling.top_k, found.sampling.temperature, found.chat.name2) == ("chat", 4, 1, "AI")
