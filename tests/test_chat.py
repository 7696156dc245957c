import threading

import pytest

from modules import archive, chat, revisit
from modules.auth import Identity
from modules.chat import MAX_MESSAGE_CHARACTERS
from modules.conversation import Conversation
from modules.errors import Busy, DataError, EngineDied, NoModel, NotFound, PromptError, PromptTooLong, SettingsError, UserError
from modules.models import Rules
from modules.turns import source_of
from tests.fakes import WAIT, make_app, until

ANNA, BERT = Identity("anna", "anna-browser"), Identity("bert", "bert-browser")


@pytest.fixture
def app(tmp_path, monkeypatch):
    made = make_app(tmp_path, monkeypatch)
    yield made
    made.close()


@pytest.fixture
def backend(app):
    return app.models.backend


def revision(app, who=ANNA):
    return app.sessions.get(who.session).revision


def finish(turn):
    assert all(reply.finished.wait(WAIT) for reply in turn.replies), "the reply never ended"
    return turn


def say(app, text, conversation=None, who=ANNA):
    """A whole turn; the stored conversation after it."""
    turn = finish(chat.reply(app, who, conversation, text))
    return app.store.conversation(who.owner, turn.conversation.id)


def held(app, text="Hi", conversation=None):
    """A turn whose reply stands still after its first piece, until the gate is opened or it is cancelled."""
    app.models.backend.gate = threading.Semaphore(1)
    turn = chat.reply(app, ANNA, conversation, text)
    until(lambda: turn.reply.message.text)
    return turn


def shown(app, conversation, who=ANNA):
    return [(m.role, m.text, m.state) for m in app.store.conversation(who.owner, conversation).path()]


def prompt(backend, number=-1):
    return backend.decode(backend.requests[number].prompt)


def nothing_is_saved(app):
    return app.store.conversations("anna").items == ()


# --- reply --------------------------------------------------------------------------------------------------------------------------


def test_a_turn_saves_the_message_and_the_answer(app, backend):
    turn = chat.reply(app, ANNA, None, "Hi")
    assert [m.role for m in turn.messages] == ["user", "assistant"] and turn.messages[-1].state == "running"
    assert turn.reply.id == turn.messages[-1].id and turn.conversation.tip == turn.reply.id
    finish(turn)
    assert shown(app, turn.conversation.id) == [("user", "Hi", "done"), ("assistant", "Hello world", "done")]
    assert prompt(backend) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert app.store.conversations("anna").items[0].title == "Hi"


def test_the_next_turn_carries_the_ones_before(app, backend):
    first = say(app, "One")
    second = say(app, "Two", first.id)
    assert second.id == first.id and len(second.path()) == 4
    assert prompt(backend).count("<|im_start|>") == 4 and "Hello world<|im_end|>\n<|im_start|>user\nTwo" in prompt(backend)


def test_what_explains_the_reply_is_kept_with_it(app, backend):
    app.sessions.change(ANNA.session, {"temperature": 0.5, "sampler_priority": "top_k", "seed": 42})
    details = say(app, "Hi").path()[-1].details
    assert (details["model"], details["seed"], details["dropped_messages"]) == ("model.fake", 42, 0)
    assert details["parameters"] == {"temperature": 0.5, "sampler_priority": ["top_k"], "seed": 42}
    stats = details["stats"]
    assert (stats["tokens"], stats["finish_reason"], stats["context_length"], stats["reused_tokens"]) == (2, "stop", 2048, 3)
    assert stats["prompt_tokens"] == len(backend.requests[0].prompt)
    assert backend.requests[0].seed == 42


def test_a_random_seed_is_chosen_and_recorded(app, backend):
    seeds = [say(app, "Hi").path()[-1].details["seed"] for _ in range(3)]
    assert seeds == [request.seed for request in backend.requests]
    assert len(set(seeds)) == 3 and all(0 <= seed < 2**32 for seed in seeds)


def test_the_parameters_of_this_browser_count(app, backend):
    app.sessions.change("another-browser", {"top_k": 9})
    app.sessions.change(ANNA.session, {"max_new_tokens": 7, "auto_max_new_tokens": False, "custom_system_message": "Be brief."})
    say(app, "Hi")
    request = backend.requests[0]
    assert (request.max_new_tokens, request.sampling.top_k) == (7, 0)
    assert prompt(backend).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")
    app.sessions.change(ANNA.session, {"auto_max_new_tokens": True})
    say(app, "Hi")
    assert backend.requests[1].max_new_tokens is None


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_an_empty_message_is_refused(text, app):
    with pytest.raises(PromptError, match="Type something"):
        chat.reply(app, ANNA, None, text)
    assert nothing_is_saved(app)


def test_without_a_model_nothing_is_saved(app):
    kept = say(app, "before")
    app.models.unload()
    for conversation in (None, kept.id):
        with pytest.raises(NoModel, match="your text is kept"):
            chat.reply(app, ANNA, conversation, "Hi")
    with pytest.raises(NoModel):
        chat.regenerate(app, ANNA, kept.id, kept.tip)
    with pytest.raises(NoModel):
        chat.continue_reply(app, ANNA, kept.id, kept.tip)
    with pytest.raises(NoModel):
        chat.edit(app, ANNA, kept.id, kept.path()[0].id, "other")
    assert len(app.store.conversations("anna").items) == 1 and app.store.conversation("anna", kept.id) == kept


@pytest.mark.parametrize("size", [5000, 1_000_000, MAX_MESSAGE_CHARACTERS + 1])
def test_a_message_beyond_the_context_leaves_nothing(size, app):
    with pytest.raises(PromptTooLong):
        chat.reply(app, ANNA, None, "x" * size)
    assert nothing_is_saved(app)
    assert say(app, "Hi").tip


def test_a_bad_template_leaves_nothing(app, backend):
    backend.chat_template = "{{ messages["
    with pytest.raises(PromptError):
        chat.reply(app, ANNA, None, "Hi")
    assert nothing_is_saved(app)


def test_the_models_own_template_is_used(app, backend):
    backend.chat_template = "{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    say(app, "Hi")
    assert prompt(backend) == "[user: Hi]>"


def test_the_oldest_messages_make_room(app, backend):
    backend.context_length = 600
    app.sessions.change(ANNA.session, {"max_new_tokens": 100})
    conversation = say(app, "first " + "x" * 150)
    for number in range(4):
        conversation = say(app, f"number {number} " + "y" * 120, conversation.id)
    assert len(backend.requests[-1].prompt) <= 500
    assert "first" not in prompt(backend) and "number 3" in prompt(backend)
    assert conversation.path()[-1].details["dropped_messages"] > 0
    assert len(conversation.path()) == 10


def test_truncation_length_and_room_for_the_reply(app):
    app.sessions.change(ANNA.session, {"truncation_length": 100, "max_new_tokens": 4000})
    with pytest.raises(PromptTooLong):
        chat.reply(app, ANNA, None, "x" * 60)  # half of the context is the reply's
    app.sessions.change(ANNA.session, {"max_new_tokens": 1})
    assert say(app, "x" * 20).tip


def test_binary_in_a_message_goes_through(app):
    text = "\x00\x01\ud800 \U0001f600"
    assert say(app, text).path()[0].text == text.replace("\ud800", "\ufffd")


def test_stop_strings_end_the_answer(app, backend):
    backend.script = ["One", " ST", "OP two", " three", " four"]
    app.sessions.change(ANNA.session, {"custom_stopping_strings": '"STOP"'})
    answer = say(app, "Hi").path()[-1]
    assert (answer.text, answer.state, answer.details["stats"]["finish_reason"]) == ("One ", "done", "stop")


def test_the_templates_own_end_marker_ends_the_answer(app, backend):
    backend.script = ["One", "<|im_", "end|>", "\n<|im_start|>user"]
    assert say(app, "Hi").path()[-1].text == "One"


def test_thinking_is_told_from_the_answer_and_not_sent_again(app, backend):
    backend.script = ["<thi", "nk>I wonder.</think>", "\n\nYes."]
    conversation = say(app, "Hi")
    assert (conversation.path()[-1].reasoning, conversation.path()[-1].text) == ("I wonder.", "Yes.")
    say(app, "And?", conversation.id)
    assert "Yes." in prompt(backend)


def test_every_reply_begins_with(app, backend):
    app.sessions.change(ANNA.session, {"start_with": "Sure:"})
    backend.script = [" here"]
    turn = chat.reply(app, ANNA, None, "Hi")
    assert turn.messages[-1].text == "Sure:"
    finish(turn)
    assert shown(app, turn.conversation.id)[-1] == ("assistant", "Sure: here", "done")
    assert prompt(backend).endswith("<|im_start|>assistant\nSure:")


def test_the_engine_dies_and_the_next_message_is_answered(app, backend):
    backend.error = EngineDied("The engine ended. Send again.")
    conversation = say(app, "Hi")
    answer = conversation.path()[-1]
    assert (answer.text, answer.state, answer.details["error"]) == ("Hello world", "failed", "The engine ended. Send again.")
    backend.error = None
    assert say(app, "Again", conversation.id).path()[-1].state == "done"


def test_a_reply_that_never_began_is_not_sent_again(app, backend):
    backend.script, backend.error = [], EngineDied("Dead.")
    conversation = say(app, "Hi")
    backend.script, backend.error = ["Yes"], None
    say(app, "Again", conversation.id)
    assert prompt(backend) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\n"


def test_the_model_goes_between_preparing_and_starting(app, monkeypatch):
    """What was saved by then must not stay "running" for ever."""
    add = app.store.add

    def add_and_unload(*arguments):
        add(*arguments)
        app.models.unload()

    monkeypatch.setattr(app.store, "add", add_and_unload)
    turn = finish(chat.reply(app, ANNA, None, "Hi"))
    assert shown(app, turn.conversation.id) == [("user", "Hi", "done"), ("assistant", "", "failed")]


def test_a_disk_that_is_full_costs_the_message_not_the_chat(app, backend, monkeypatch):
    conversation = say(app, "Hi")

    def full(*_):
        raise DataError("The disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr(app.store, "add", full)
        with pytest.raises(DataError):
            chat.reply(app, ANNA, conversation.id, "More")
        with pytest.raises(DataError):
            chat.reply(app, ANNA, None, "New")
    assert app.store.conversation("anna", conversation.id) == conversation
    assert len(app.store.conversations("anna").items) == 1 and len(backend.requests) == 1
    assert say(app, "More", conversation.id).path()[-1].state == "done"


def test_the_first_message_of_a_chat_can_be_continued(app, backend):
    begun = chat.insert(app, ANNA, None, "assistant", "Once upon a time")
    conversation, first = begun.conversation.id, begun.messages[0].id
    say(app, "Then?", conversation)
    finish(chat.continue_reply(app, ANNA, conversation, first))
    assert prompt(backend).count("Once upon a time") == 1 and "Then?" not in prompt(backend)


def test_continuing_one_of_several_replies_keeps_the_others_beside_it(app, backend):
    turn = finish(chat.reply(app, ANNA, None, "Hi", 2))
    group = {message.details["group"] for message in turn.messages if message.role == "assistant"}
    tip = app.store.conversation("anna", turn.conversation.id).tip
    finish(chat.continue_reply(app, ANNA, turn.conversation.id, tip))
    assert {app.store.conversation("anna", turn.conversation.id)[tip].details["group"]} == group


def test_two_browsers_change_values_of_one_chat_at_once(app):
    conversation, phone = say(app, "Hi").id, Identity("anna", "phone")
    for number in range(1, 31):
        changes = ((ANNA, {"temperature": 1 + number / 100}), (phone, {"top_k": number}))
        threads = [threading.Thread(target=archive.change_values, args=(app, who, conversation, values)) for who, values in changes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        kept = app.store.settings("anna", conversation)
        assert (kept["temperature"], kept["top_k"]) == (1 + number / 100, number)


def test_halves_of_a_character_in_a_value_are_the_same_in_memory_and_on_the_disk(app):
    conversation = say(app, "Hi").id
    changed = archive.change_values(app, ANNA, conversation, {"name1": "a\ud83d", "dry_sequence_breakers": '"\ud83d"'})
    assert changed.chat.name1 == "a\ufffd"
    assert source_of(app, ANNA, conversation).session.revision == changed.revision
    assert app.sessions.get(ANNA.session).values()["name1"] == "a\ufffd"


# --- stopping, deleting, two at once ------------------------------------------------------------------------------------------------


def test_stop_keeps_what_was_written(app):
    turn = held(app)
    with pytest.raises(NotFound):
        app.replies.stop("bert", turn.reply.id)
    assert not turn.reply.finished.is_set()
    app.replies.stop("anna", turn.reply.id)
    finish(turn)
    assert shown(app, turn.conversation.id)[-1] == ("assistant", "Hello", "stopped")


def test_a_second_turn_in_the_same_chat_waits_its_turn(app):
    turn = held(app)
    id, user, answer = turn.conversation.id, turn.messages[0].id, turn.reply.id
    for attempt in (
        lambda: chat.reply(app, ANNA, id, "more"),
        lambda: chat.regenerate(app, ANNA, id, answer),
        lambda: chat.continue_reply(app, ANNA, id, answer),
        lambda: chat.edit(app, ANNA, id, user, "other"),
        lambda: archive.select(app, ANNA, id, user),
    ):
        with pytest.raises(Busy):
            attempt()
    assert len(app.store.conversation("anna", id).messages) == 2
    app.replies.stop("anna", answer)
    finish(turn)
    archive.rename(app, ANNA, id, "New")
    assert app.store.conversations("anna").items[0].title == "New"


def test_another_chat_is_queued_behind_and_answered(app, backend):
    first = held(app)
    second = chat.reply(app, ANNA, None, "Other")
    assert second.conversation.id != first.conversation.id
    for _ in range(3):
        backend.gate.release()
    finish(first)
    finish(second)
    assert shown(app, second.conversation.id)[-1] == ("assistant", "Hello world", "done")
    assert backend.most_at_once == 1


def test_deleting_a_chat_stops_its_reply(app, backend):
    turn = held(app)
    archive.delete(app, ANNA, [turn.conversation.id])
    finish(turn)
    assert turn.reply.cancel.cancelled and nothing_is_saved(app)
    assert "deleted" in [e.type for e in app.replies.news("anna").after(0)]
    until(lambda: backend.at_once == 0)


def test_a_chat_of_somebody_else_does_not_exist(app):
    turn = held(app)
    id, message = turn.conversation.id, turn.reply.id
    for attempt in (
        lambda: chat.reply(app, BERT, "no-such-chat", "Hi"),
        lambda: chat.reply(app, BERT, id, "Hi"),
        lambda: chat.regenerate(app, BERT, id, message),
        lambda: archive.delete(app, BERT, [id]),
        lambda: archive.rename(app, BERT, id, "Mine"),
    ):
        with pytest.raises(NotFound):
            attempt()
    assert not turn.reply.cancel.cancelled
    app.replies.stop("anna", message)
    finish(turn)
    for attempt in (
        lambda: chat.reply(app, BERT, id, "Hi"),
        lambda: chat.regenerate(app, BERT, id, message),
        lambda: chat.continue_reply(app, BERT, id, message),
        lambda: chat.edit(app, BERT, id, message, "x"),
        lambda: archive.select(app, BERT, id, message),
    ):
        with pytest.raises(NotFound):
            attempt()
    assert app.replies.news("bert").last == 0 and app.store.conversations("bert").items == ()


# --- versions -----------------------------------------------------------------------------------------------------------------------


def test_regenerate_writes_another_version(app, backend):
    conversation = say(app, "Hi")
    old = conversation.tip
    backend.script = ["Other"]
    turn = finish(chat.regenerate(app, ANNA, conversation.id, old))
    after = app.store.conversation("anna", conversation.id)
    assert after.siblings(old) == (old, turn.reply.id) and after.tip == turn.reply.id
    assert shown(app, conversation.id) == [("user", "Hi", "done"), ("assistant", "Other", "done")]
    assert after[old].text == "Hello world" and prompt(backend, 0) == prompt(backend, 1)


def test_regenerate_in_the_middle_leaves_out_what_came_after(app, backend):
    conversation = say(app, "One")
    answer = conversation.tip
    conversation = say(app, "Two", conversation.id)
    finish(chat.regenerate(app, ANNA, conversation.id, answer))
    assert "Two" not in prompt(backend) and len(shown(app, conversation.id)) == 2
    assert len(app.store.conversation("anna", conversation.id).messages) == 5


def test_only_replies_are_regenerated_or_continued(app):
    conversation = say(app, "Hi")
    user = conversation.path()[0].id
    for attempt in (chat.regenerate, chat.continue_reply):
        with pytest.raises(PromptError, match="Edit your own message"):
            attempt(app, ANNA, conversation.id, user)
        with pytest.raises(NotFound):
            attempt(app, ANNA, conversation.id, "no-such-message")
    assert app.store.conversation("anna", conversation.id) == conversation


def test_an_edited_question_is_answered_again(app, backend):
    conversation = say(app, "Helo")
    user = conversation.path()[0].id
    turn = finish(chat.edit(app, ANNA, conversation.id, user, "Hello"))
    assert [m.role for m in turn.messages] == ["user", "assistant"]
    after = app.store.conversation("anna", conversation.id)
    assert len(after.siblings(user)) == 2 and [m.text for m in after.path()] == ["Hello", "Hello world"]
    assert "Helo" not in prompt(backend)


def test_an_edited_answer_is_a_version_without_a_new_reply(app, backend):
    conversation = say(app, "Hi")
    turn = chat.edit(app, ANNA, conversation.id, conversation.tip, "My own words")
    assert turn.replies == () and len(backend.requests) == 1
    assert shown(app, conversation.id) == [("user", "Hi", "done"), ("assistant", "My own words", "done")]
    assert app.replies.news("anna").after(0)[-1].type == "changed"
    say(app, "Next", conversation.id)
    assert "My own words" in prompt(backend)
    with pytest.raises(PromptError, match="empty"):
        chat.edit(app, ANNA, conversation.id, conversation.tip, " ")


def test_select_shows_another_version_at_its_newest_end(app):
    conversation = say(app, "Hi")
    old = conversation.tip
    conversation = say(app, "More", conversation.id)
    newest = conversation.tip
    finish(chat.regenerate(app, ANNA, conversation.id, old))
    assert len(shown(app, conversation.id)) == 2
    archive.select(app, ANNA, conversation.id, old)
    assert app.store.conversation("anna", conversation.id).tip == newest
    assert app.replies.news("anna").after(0)[-1].type == "changed"
    with pytest.raises(NotFound):
        archive.select(app, ANNA, conversation.id, "no-such-message")


# --- continue -----------------------------------------------------------------------------------------------------------------------


def test_continue_writes_on_in_the_same_message(app, backend):
    conversation = say(app, "Hi")
    backend.script = [" and", " more"]
    turn = chat.continue_reply(app, ANNA, conversation.id, conversation.tip)
    assert [m.id for m in turn.messages] == [conversation.tip]
    finish(turn)
    after = app.store.conversation("anna", conversation.id)
    assert len(after.messages) == 2 and after.tip == conversation.tip
    assert shown(app, conversation.id)[-1] == ("assistant", "Hello world and more", "done")
    assert prompt(backend).endswith("<|im_start|>assistant\nHello world")


def test_a_continuation_that_adds_nothing_leaves_the_figures(app, backend):
    conversation = say(app, "Hi")
    figures = conversation.path()[-1].details["stats"]
    backend.script = []
    finish(chat.continue_reply(app, ANNA, conversation.id, conversation.tip))
    after = app.store.conversation("anna", conversation.id).path()[-1]
    assert figures["tokens"] == 2 and (after.text, after.state, after.details["stats"]) == ("Hello world", "done", figures)


def test_continue_after_a_failure_forgets_the_error(app, backend):
    backend.error = EngineDied("Dead.")
    conversation = say(app, "Hi")
    backend.error = None
    finish(chat.continue_reply(app, ANNA, conversation.id, conversation.tip))
    answer = app.store.conversation("anna", conversation.id).path()[-1]
    assert (answer.text, answer.state) == ("Hello worldHello world", "done") and "error" not in answer.details


def test_continue_in_the_middle_goes_back_there(app):
    conversation = say(app, "One")
    answer = conversation.tip
    say(app, "Two", conversation.id)
    finish(chat.continue_reply(app, ANNA, conversation.id, answer))
    assert app.store.conversation("anna", conversation.id).tip == answer


def test_what_was_stopped_while_thinking_goes_on_thinking(app, backend):
    thinking = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    backend.chat_template = "{% for m in messages %}[{{ m.role }}: " + thinking + "{{ m.content }}]{% endfor %}"
    backend.script = ["<think>I wonder"]
    conversation = say(app, "Hi")
    assert conversation.path()[-1].reasoning == "I wonder"
    backend.script = [" what.</think>", "That!"]
    finish(chat.continue_reply(app, ANNA, conversation.id, conversation.tip))
    whole = app.store.conversation("anna", conversation.id).path()[-1]
    assert (whole.reasoning, whole.text, whole.state) == ("I wonder what.", "That!", "done")
    assert prompt(backend).endswith("I wonder")


# --- before a turn ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ready(app, backend):
    """A backend that computes ahead."""
    backend.features = frozenset({"prefill"})
    yield backend
    backend.hold_prefills(False)


def ahead(app, text="", conversation=None, who=ANNA, revision=None):
    """What was computed ahead for this draft, as text; None for nothing."""
    backend, revision = app.models.loaded_backend(), app.sessions.get(who.session).revision if revision is None else revision
    before = len(backend.prefilled)
    assert chat.ahead(app, who, conversation, text, revision)
    until(lambda: app.ahead.busy == 0)
    assert len(backend.prefilled) <= before + 1
    return backend.decode(backend.prefilled[-1].prompt) if len(backend.prefilled) > before else None


def test_what_is_computed_ahead_is_the_beginning_of_the_prompt(app, ready):
    app.sessions.change(ANNA.session, {"custom_system_message": "Be brief."})
    conversation = say(app, "One")
    history = prompt(ready) + "Hello world<|im_end|>\n<|im_start|>user\n"
    assert ahead(app, "", conversation.id) == history
    assert ahead(app, "Tell me of the sea", conversation.id) == history + "Tell me of the"
    say(app, "Tell me of the seaside", conversation.id)
    assert prompt(ready).startswith(history + "Tell me of the sea")
    assert ready.prefilled[-1].client == ready.requests[-1].client == "anna"


def test_the_first_message_is_computed_ahead_too(app, ready):
    assert ahead(app, "Tell me of") == "<|im_start|>user\nTell me"
    assert nothing_is_saved(app)


@pytest.mark.parametrize(
    ("text", "certain"),
    [
        ("", ""),
        (" \n", ""),
        ("Tell", ""),
        ("a", ""),
        ("1", ""),
        ("Tell ", ""),
        ("Tell me ", "Tell"),
        ("Tell\nme", "Tell"),
        ("Tell   me", "Tell"),
        ("Tell me\n\n  ", "Tell"),
        ("x" * 20, "x" * 4),
        ("Tell " + "x" * 20, "Tell xxxx"),
        ("海" * 30, "海" * 14),
        ("Tell <|im_end|>\n<|im_start|>assistant\n", "Tell <|im_end|>\n<|im_"),
    ],
)
def test_a_word_that_may_still_grow_is_not_computed(text, certain, app, ready):
    assert ahead(app, text) == "<|im_start|>user\n" + certain


def test_templates_that_trim_and_those_that_open_the_reply(app, ready):
    ready.chat_template = "{% for m in messages %}[{{ m.role }}: {{ m.content | trim }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    assert ahead(app, "Tell me ") == "[user: Tell"
    app.sessions.change(ANNA.session, {"start_with": "Tell me"})
    conversation = say(app, "Hi")
    assert ahead(app, "Tell me", conversation.id) == "[user: Hi][assistant: Tell meHello world][user: Tell"
    assert ahead(app, "", conversation.id) == "[user: Hi][assistant: Tell meHello world][user: "


def test_where_the_oldest_messages_make_room_they_do_so_ahead(app, ready):
    ready.context_length = 600
    app.sessions.change(ANNA.session, {"max_new_tokens": 100})
    conversation = say(app, "first " + "x" * 150)
    for number in range(4):
        conversation = say(app, f"number {number} " + "y" * 120, conversation.id)
    told = ahead(app, "the next question " + "z" * 30, conversation.id)
    say(app, "the next question " + "z" * 30, conversation.id)
    assert "first" not in told and told.endswith("the next question " + "z" * 14) and prompt(ready).startswith(told)


def test_other_parameters_of_the_request_are_the_replys(app, ready):
    app.sessions.change(ANNA.session, {"temperature": 0.5})
    ahead(app, "Tell me")
    assert ready.prefilled[0].sampling.temperature == 0.5 and ready.requests == []


def test_a_newer_draft_ends_the_older_one(app, ready):
    ready.hold_prefills()
    for text in ("Tell me", "Tell me of"):
        assert chat.ahead(app, ANNA, None, text, revision(app, ANNA))
        until(lambda text=text: ready.prefills and ready.decode(ready.prefills[-1].prompt).endswith(text.rpartition(" ")[0]))
    assert [request.cancel.cancelled for request in ready.prefills] == [True, False]
    chat.ahead(app, BERT, None, "Another one", revision(app, BERT))
    until(lambda: len(ready.prefills) == 3)
    assert not ready.prefills[1].cancel.cancelled


def test_a_draft_that_changed_nothing_certain_is_not_computed_again(app, ready):
    assert ahead(app, "Tell me") and ahead(app, "Tell me") is None and ahead(app, "Tell them") is None
    assert ahead(app, "Tell them all")


@pytest.mark.parametrize("turn", ["reply", "regenerate", "continue", "edit"])
@pytest.mark.parametrize("deaf", [False, True], ids=["", "an engine that hangs"])
def test_a_turn_ends_what_is_computed_before_it_begins_itself(turn, deaf, app, ready):
    conversation = say(app, "Hi")
    ready.hold_prefills(deaf=deaf)
    chat.ahead(app, ANNA, conversation.id, "More", revision(app, ANNA))
    chat.ahead(app, BERT, None, "Mine", revision(app, BERT))
    until(lambda: len(ready.prefills) == 2)
    mine = next(request for request in ready.prefills if request.client == "anna")
    states = []
    generate = ready.generate
    ready.generate = lambda request: states.append(mine.cancel.cancelled) or generate(request)
    act = {
        "reply": lambda: chat.reply(app, ANNA, conversation.id, "More"),
        "regenerate": lambda: chat.regenerate(app, ANNA, conversation.id, conversation.tip),
        "continue": lambda: chat.continue_reply(app, ANNA, conversation.id, conversation.tip),
        "edit": lambda: chat.edit(app, ANNA, conversation.id, conversation.path()[0].id, "Ho"),
    }
    finish(act[turn]())
    assert states == [True]
    assert not next(request for request in ready.prefills if request.client == "bert").cancel.cancelled
    assert shown(app, conversation.id)[-1][2] == "done"


def test_while_a_reply_is_written_nothing_is_computed(app, ready):
    turn = held(app)
    assert ahead(app, "Tell me", turn.conversation.id) is None and ready.prefills == []
    assert ahead(app, "Tell me") is not None, "another chat"
    ready.gate.release(10)
    finish(turn)
    assert ahead(app, "Tell me", turn.conversation.id) is not None


def test_without_a_model_nothing_is_computed_or_loaded(app, ready):
    app.models.unload()
    assert chat.ahead(app, ANNA, None, "Tell me", revision(app, ANNA))
    assert app.ahead.busy == 0 and ready.prefills == [] and app.models.status().state == "none"


def test_a_model_unloaded_for_being_idle_stays_so_and_one_in_use_ahead_counts_as_idle(app, ready):
    app.models.rules = Rules(idle_minutes=1)
    app.models._current.last_use -= 61
    assert ahead(app, "Tell me") is not None
    ready.hold_prefills()
    chat.ahead(app, ANNA, None, "Tell me of it", revision(app, ANNA))
    until(lambda: len(ready.prefills) == 2)
    app.models.unload_if_idle()
    assert ready.unloaded and app.models.status().state == "none"
    until(lambda: app.ahead.busy == 0)
    assert chat.ahead(app, ANNA, None, "Tell me of it all", revision(app, ANNA))
    assert app.models.status().state == "none" and app.models.loaded_backend() is None and len(ready.prefills) == 2
    assert say(app, "Tell me of it all").path()[-1].state == "done"


def test_an_engine_that_is_dead_is_left_to_the_next_turn(app, ready):
    ready.alive = lambda: False
    assert chat.ahead(app, ANNA, None, "Tell me", revision(app, ANNA)) and app.ahead.busy == 0 and ready.prefills == []


def test_a_model_that_cannot_and_a_switch_say_so(app, ready, tmp_path, monkeypatch):
    ready.features = frozenset({"parallel"})
    assert not chat.ahead(app, ANNA, None, "Tell me", revision(app, ANNA))
    off = make_app(tmp_path / "off", monkeypatch, "--no-prefill-ahead")
    try:
        off.models.backend.features = frozenset({"prefill"})
        assert not chat.ahead(off, ANNA, None, "Tell me", 0)
        assert off.models.backend.prefills == [] and off.ahead.busy == 0
        with pytest.raises(NotFound):
            chat.ahead(off, ANNA, "no-such-chat", "Tell me", 0)
    finally:
        off.close()


def test_an_old_revision_computes_nothing_and_changes_nothing(app, ready):
    app.sessions.change(ANNA.session, {"top_k": 5})
    session = app.sessions.get(ANNA.session)
    assert chat.ahead(app, ANNA, None, "Tell me", 0) and app.ahead.busy == 0 and ready.prefills == []
    assert ahead(app, "Tell me") and app.sessions.get(ANNA.session) == session


@pytest.mark.parametrize("size", [5000, 1_000_000, MAX_MESSAGE_CHARACTERS + 1])
def test_what_cannot_be_sent_is_no_error_ahead(size, app, ready):
    assert ahead(app, "x" * size) is None
    assert ahead(app, "Tell me") is not None


def test_a_bad_template_is_no_error_ahead(app, ready):
    ready.chat_template = "{{ messages["
    assert ahead(app, "Tell me") is None and ready.prefills == []


def test_a_chat_of_somebody_else_is_not_read_ahead(app, ready):
    conversation = say(app, "My secret")
    for id in (conversation.id, "no-such-chat"):
        with pytest.raises(NotFound):
            chat.ahead(app, BERT, id, "Tell me", revision(app, BERT))
    assert app.ahead.busy == 0 and ready.prefills == []


def test_the_end_of_the_program_ends_it(app, ready):
    ready.hold_prefills()
    chat.ahead(app, ANNA, None, "Tell me", revision(app, ANNA))
    until(lambda: ready.prefills)
    app.close()
    assert app.ahead.busy == 0 and ready.prefills[0].cancel.cancelled and ready.prefilled == []


def test_it_takes_no_turn(app, ready):
    """A model without "parallel" writes one reply at a time; computing ahead is not one."""
    ready.hold_prefills(deaf=True)
    chat.ahead(app, BERT, None, "Tell me", revision(app, BERT))
    until(lambda: ready.prefills)
    assert say(app, "Hi").path()[-1].state == "done"


# --- news ---------------------------------------------------------------------------------------------------------------------------


def test_the_owners_other_pages_are_told(app):
    turn = finish(chat.reply(app, ANNA, None, "Hi"))
    id = turn.conversation.id
    until(lambda: app.replies.news("anna").last == 3)
    events = app.replies.news("anna").after(0)
    assert sorted((e.type, e.data.get("id", e.data.get("conversation"))) for e in events) == [
        ("conversation", id),
        ("conversation", id),
        ("started", id),
    ]
    started = next(e for e in events if e.type == "started")
    assert started.data["messages"] == [m.id for m in turn.messages]


def test_a_wrong_parameter_never_reaches_a_turn(app, backend):
    with pytest.raises(SettingsError):
        app.sessions.change(ANNA.session, {"temperature": float("nan")})
    say(app, "Hi")
    assert backend.requests[0].sampling.temperature == 1.0


def test_a_conversation_survives_its_own_round_trip(app):
    conversation = say(app, "Hi")
    assert isinstance(conversation, Conversation) and conversation.owner == "anna"
    assert app.store.conversation("anna", conversation.id) == conversation


# --- modes and a conversation's own values ----------------------------------------------------------------------------------------------


def test_a_conversation_keeps_its_own_values(app, backend):
    app.sessions.change(ANNA.session, {"custom_system_message": "Be brief.", "temperature": 0.5})
    first = say(app, "Hi")
    archive.change_values(app, ANNA, None, {"custom_system_message": "Be long.", "temperature": 1.5})
    say(app, "Again", first.id)
    assert prompt(backend).startswith("<|im_start|>system\nBe brief.") and backend.requests[-1].sampling.temperature == 0.5
    say(app, "Hi")
    assert prompt(backend).startswith("<|im_start|>system\nBe long.")
    archive.change_values(app, ANNA, first.id, {"custom_system_message": "Be kind."})
    say(app, "Once more", first.id)
    assert prompt(backend).startswith("<|im_start|>system\nBe kind.") and backend.requests[-1].sampling.temperature == 0.5
    assert app.sessions.get(ANNA.session).chat.custom_system_message == "Be kind."  # a new chat begins with what was chosen last


def test_another_browser_of_the_same_login_has_the_conversations_values(app, backend):
    app.sessions.change(ANNA.session, {"custom_system_message": "Be brief."})
    first = say(app, "Hi")
    say(app, "Again", first.id, Identity("anna", "annas-phone"))
    assert prompt(backend).startswith("<|im_start|>system\nBe brief.")


def test_a_chat_with_a_character_begins_with_the_greeting(app, backend):
    app.sessions.change(
        ANNA.session, {"mode": "chat", "name1": "Anna", "name2": "Ada", "greeting": "Hello {{user}}, I am {{char}}.", "context": "Ada counts."}
    )
    backend.script = [" Ada: Two", ", of course.\nAnna: And"]
    conversation = say(app, "One and one?")
    assert shown(app, conversation.id) == [
        ("assistant", "Hello Anna, I am Ada.", "done"), ("user", "One and one?", "done"), ("assistant", "Two, of course.", "done"),
    ]  # fmt: skip
    assert [m.details.get("name") for m in conversation.path()] == ["Ada", "Anna", "Ada"]
    assert prompt(backend).startswith("Ada counts.") and prompt(backend).endswith("Anna: One and one?\nAda:")
    with pytest.raises(PromptError, match="greeting"):
        chat.regenerate(app, ANNA, conversation.id, conversation.path()[0].id)


def test_chat_instruct_asks_the_assistant_to_speak_as_the_character(app, backend):
    app.sessions.change(ANNA.session, {"mode": "chat-instruct", "name2": "Ada", "chat_instruct_command": "Go on as <|character|>:\n<|prompt|>"})
    say(app, "Who are you?")
    assert prompt(backend).startswith("<|im_start|>user\nGo on as Ada:\n") and "You: Who are you?" in prompt(backend)
    assert prompt(backend).endswith("<|im_start|>assistant\nAda:")


def test_a_chosen_template_is_used_instead_of_the_models(app, backend):
    backend.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    app.sessions.change(ANNA.session, {"instruction_template": "Alpaca"})
    say(app, "Hi")
    assert "### Instruction:\nHi" in prompt(backend)
    app.sessions.change(ANNA.session, {"instruction_template": "Gone"})
    with pytest.raises(NotFound, match="Gone"):
        chat.reply(app, ANNA, None, "Hi")


# --- several replies at once ------------------------------------------------------------------------------------------------------------


def test_several_answers_stand_side_by_side_until_one_is_chosen(app, backend):
    turn = finish(chat.reply(app, ANNA, None, "Hi", n=3))
    id, answers = turn.conversation.id, turn.messages[1:]
    assert len(turn.replies) == 3 and {m.parent for m in answers} == {turn.messages[0].id}
    assert len({request.seed for request in backend.requests}) == 3
    page = app.store.messages("anna", id)
    assert page.items[-1].message.id == answers[0].id
    assert [m.id for m in archive.beside(app, ANNA, id, page)] == [answers[1].id, answers[2].id]
    archive.choose(app, ANNA, id, answers[2].id)
    page = app.store.messages("anna", id)
    assert page.items[-1].message.id == answers[2].id and archive.beside(app, ANNA, id, page) == []
    archive.select(app, ANNA, id, answers[0].id)  # it stays a version
    assert archive.beside(app, ANNA, id, app.store.messages("anna", id)) == []
    for n in (0, 9):
        with pytest.raises(PromptError, match="at once"):
            chat.reply(app, ANNA, id, "Hi", n=n)


def test_going_on_below_one_of_several_answers_chooses_it(app):
    turn = finish(chat.reply(app, ANNA, None, "Hi", n=2))
    conversation = say(app, "And then?", turn.conversation.id)
    assert conversation.path()[1].id == turn.messages[1].id
    assert archive.beside(app, ANNA, conversation.id, app.store.messages("anna", conversation.id)) == []


def test_several_answers_have_a_stop_each(app, backend):
    backend.gate = threading.Semaphore(0)
    backend.features = frozenset({"parallel"})
    turn = chat.reply(app, ANNA, None, "Hi", n=2)
    until(lambda: len(backend.requests) == 2)
    app.replies.stop("anna", turn.replies[1].id)
    assert turn.replies[1].finished.wait(WAIT) and not turn.replies[0].finished.is_set()
    with pytest.raises(Busy):
        chat.reply(app, ANNA, turn.conversation.id, "More")
    backend.gate.release(10)
    finish(turn)
    assert {m.state for m in app.store.conversation("anna", turn.conversation.id).messages.values()} == {"done", "stopped"}


def test_an_answer_with_another_model_in_memory(app, backend, monkeypatch):
    monkeypatch.setattr(app.models, "rules", Rules(most=2))
    first = app.models.status().name
    (app.data.models / "other.fake").touch()
    app.models.load(app.models.choose("other.fake"))
    other = app.models.backend
    assert other is not backend and not backend.unloaded
    conversation = say(app, "Hi")
    assert len(other.requests) == 1 and conversation.path()[-1].details["model"] == "other.fake"
    turn = finish(chat.regenerate(app, ANNA, conversation.id, conversation.tip, changes={"model": first}))
    known = turn.messages[0].details
    assert (known["model"], len(backend.requests), len(other.requests)) == (first, 1, 1) and turn.replies[0].message.state == "done"
    say(app, "Again", conversation.id)
    assert len(other.requests) == 2  # that was for one reply only
    with pytest.raises(NoModel, match=r"'gone\.fake' is not loaded any more"):
        chat.regenerate(app, ANNA, conversation.id, conversation.tip, changes={"model": "gone.fake"})


def test_an_answer_with_another_preset(app, backend):
    conversation = say(app, "Hi")
    turn = finish(chat.regenerate(app, ANNA, conversation.id, conversation.tip, changes={"preset": "Deterministic"}))
    assert turn.messages[0].details["preset"] == "Deterministic" and backend.requests[-1].sampling != backend.requests[0].sampling
    say(app, "Again", conversation.id)
    assert backend.requests[-1].sampling == backend.requests[0].sampling
    with pytest.raises(UserError, match="preset name"):
        chat.regenerate(app, ANNA, conversation.id, conversation.tip, changes={"preset": "../x"})


# --- other turns ------------------------------------------------------------------------------------------------------------------------


def test_any_reply_can_be_written_again(app):
    conversation = say(app, "Two", say(app, "One").id)
    first = conversation.path()[1]
    turn = finish(chat.regenerate(app, ANNA, conversation.id, first.id))
    assert [m.text for m in app.store.conversation("anna", conversation.id).path()] == ["One", "Hello world"]
    assert app.store.conversation("anna", conversation.id).siblings(first.id) == (first.id, turn.messages[0].id)


def test_messages_without_an_answer(app, backend):
    id = chat.insert(app, ANNA, None, "user", "Mine").conversation.id
    chat.insert(app, ANNA, id, "assistant", "Yours")
    assert shown(app, id) == [("user", "Mine", "done"), ("assistant", "Yours", "done")] and backend.requests == []
    edited = chat.edit(app, ANNA, id, app.store.conversation("anna", id).path()[0].id, "Other", answer=False)
    assert edited.replies == () and shown(app, id) == [("user", "Other", "done")] and backend.requests == []


def test_the_model_writes_the_users_next_message(app, backend):
    conversation = say(app, "Hi")
    backend.script = ["tell me", " more<|im_end|>x"]
    reply = chat.impersonate(app, ANNA, conversation.id, "Please ")
    assert reply.finished.wait(WAIT) and reply.message.text == "Please tell me more"
    assert prompt(backend).endswith("<|im_start|>user\nPlease ") and len(app.store.conversation("anna", conversation.id).messages) == 2
    events = reply.ring.after(0)
    assert events[-1].type == "end" and events[-1].data["text"] == "Please tell me more"
    assert chat.impersonate(app, ANNA, None, "").finished.wait(WAIT)


def test_removing_can_be_taken_back(app):
    conversation = say(app, "Two", say(app, "One").id)
    before = app.store.conversation("anna", conversation.id)
    number = archive.remove(app, ANNA, conversation.id, conversation.path()[2].id)
    assert [m.text for m in app.store.conversation("anna", conversation.id).path()] == ["One", "Hello world"]
    assert archive.undo(app, ANNA, [number]) == [conversation.id]
    assert app.store.conversation("anna", conversation.id) == before
    with pytest.raises(NotFound):
        archive.undo(app, BERT, archive.delete(app, ANNA, [conversation.id]))


def test_a_branch_is_a_chat_of_its_own(app):
    conversation = say(app, "Two", say(app, "One").id)
    made = archive.branch(app, ANNA, conversation.id, conversation.path()[1].id)
    assert [m.text for m in app.store.conversation("anna", made.id).path()] == ["One", "Hello world"] and made.id != conversation.id
    say(app, "Other", made.id)
    assert len(app.store.conversation("anna", conversation.id).messages) == 4


def test_an_incognito_chat_is_never_on_disk(app, tmp_path):
    turn = finish(chat.reply(app, ANNA, None, "My secret is xyzzy", incognito=True))
    id = turn.conversation.id
    assert id.startswith("incognito-") and app.store.conversations("anna").items == ()
    finish(chat.reply(app, ANNA, id, "And plugh"))
    archive.change_values(app, ANNA, id, {"custom_system_message": "whisper frobozz"})
    assert len(app.incognito.conversation("anna", id).messages) == 4
    assert app.sessions.get(ANNA.session).chat.custom_system_message == ""
    with pytest.raises(NotFound):
        app.incognito.conversation("bert", id)
    for word in (b"xyzzy", b"plugh", b"frobozz"):
        assert not any(word in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert archive.delete(app, ANNA, [id]) == []


# --- explain and repeat -----------------------------------------------------------------------------------------------------------------


def test_a_reply_is_explained_and_repeated(app, backend):
    app.sessions.change(ANNA.session, {"temperature": 0.5, "seed": 7})
    conversation = say(app, "Hi")
    told = revisit.explained(app, ANNA, conversation.id, conversation.tip)
    assert told["prompt"] == prompt(backend) and told["prompt_tokens"] == len(told["prompt"]) and told["seed"] == 7
    assert told["parameters"]["temperature"] == 0.5 and told["model"] == "model.fake" and told["repeatable"], told["why_not"]
    assert [id for id, _, _ in told["tokens"]] == [1, 2]
    app.sessions.change(ANNA.session, {"temperature": 1.5, "seed": 9})
    finish(chat.repeat(app, ANNA, conversation.id, conversation.tip))
    first, second = backend.requests
    assert (second.prompt, second.sampling, second.seed, second.stop) == (first.prompt, first.sampling, first.seed, first.stop)
    app.models.load(app.models.choose("model.fake"))
    with pytest.raises(NotFound):
        revisit.explained(app, BERT, conversation.id, conversation.tip)
    with pytest.raises(NotFound, match="Nothing is kept"):
        revisit.explained(app, ANNA, conversation.id, conversation.path()[0].id)


def test_a_reply_goes_on_from_another_token(app, backend):
    conversation = say(app, "Hi")
    backend.script = [" there"]
    turn = finish(chat.resume(app, ANNA, conversation.id, conversation.tip, 1, ord("!")))
    assert backend.requests[-1].prompt == (*backend.requests[0].prompt, 1, ord("!"))
    assert turn.replies[0].message.text == chr(1) + "! there"
    told = revisit.explained(app, ANNA, conversation.id, turn.messages[0].id)
    assert [id for id, _, _ in told["tokens"]] == [1, ord("!"), 1] and told["prompt"] == prompt(backend, 0)
    assert app.store.conversation("anna", conversation.id).siblings(conversation.tip) == (conversation.tip, turn.messages[0].id)


def test_what_was_continued_is_explained_too(app, backend):
    conversation = say(app, "Hi")
    finish(chat.continue_reply(app, ANNA, conversation.id, conversation.tip))
    told = revisit.explained(app, ANNA, conversation.id, conversation.tip)
    assert told["prompt"] == prompt(backend) and told["prompt"].endswith("Hello world") and told["start"] == len("Hello world")


# --- a full context ---------------------------------------------------------------------------------------------------------------------


def full(app, backend, way):
    backend.context_length = 1200
    app.sessions.change(ANNA.session, {"max_new_tokens": 100, "context_full": way})
    backend.script = ["y" * 150]
    conversation = say(app, "first " + "x" * 150)
    for number in range(3):
        conversation = say(app, f"number {number} " + "z" * 100, conversation.id)
    return conversation


def test_a_full_context_can_stop_the_chat(app, backend):
    with pytest.raises(PromptTooLong, match="Choose another way"):
        for _ in range(4):
            full(app, backend, "stop")
            backend.context_length -= 200


def test_stop_strings_and_a_grammar_are_the_replys_not_the_summarys(app, backend):
    conversation = full(app, backend, "summarise")
    archive.change_values(app, ANNA, conversation.id, {"custom_stopping_strings": '"\\n\\n"', "grammar_string": 'root ::= "yes"'})
    backend.script = ["A short tale", "\n\n", "in two parts"]
    asked = len(backend.requests)
    for _ in range(6):
        conversation = say(app, "go on " + "w" * 150, conversation.id)
        if app.store.summary("anna", conversation.id):
            break
    assert app.store.summary("anna", conversation.id).text == "A short tale\n\nin two parts"
    summaries = [n for n in range(asked, len(backend.requests)) if "Write a summary" in prompt(backend, n)]
    assert summaries and not any(backend.requests[n].sampling.grammar_string for n in summaries)
    assert backend.requests[-1].sampling.grammar_string == 'root ::= "yes"'
    assert conversation.path()[-1].text == "A short tale"  # the reply to what follows has the stop string


def test_a_long_reply_goes_on_into_the_room_that_is_left(app, backend):
    backend.context_length = 1000
    app.sessions.change(ANNA.session, {"max_new_tokens": 512})
    backend.script = ["y" * 600]
    conversation = say(app, "A story")
    finish(chat.continue_reply(app, ANNA, conversation.id, conversation.tip))
    assert "A story" in prompt(backend) and prompt(backend).endswith("y" * 600)
    assert app.store.conversation("anna", conversation.id).path()[-1].text == "y" * 1200
    with pytest.raises(PromptTooLong, match="lower max_new_tokens"):
        chat.continue_reply(app, ANNA, conversation.id, conversation.tip)


def test_the_oldest_messages_can_be_summarised(app, backend):
    conversation = full(app, backend, "summarise")
    asked = len(backend.requests)
    backend.script = ["A short tale"]
    for _ in range(6):
        conversation = say(app, "go on " + "w" * 150, conversation.id)
        if app.store.summary("anna", conversation.id):
            break
    summary = app.store.summary("anna", conversation.id)
    assert summary.text == "A short tale" and summary.after in conversation.messages
    assert any("number 0" in prompt(backend, n) and "Write a summary" in prompt(backend, n) for n in range(asked, len(backend.requests)))
    assert "A short tale" in prompt(backend) and "first x" not in prompt(backend)
    archive.summarise(app, ANNA, conversation.id, "Mine")
    say(app, "next", conversation.id)
    assert "in short:\nMine<" in prompt(backend) and "in short:\nA short tale" not in prompt(backend)
    archive.summarise(app, ANNA, conversation.id, " ")
    assert app.store.summary("anna", conversation.id) is None


def test_a_summary_that_does_not_come_is_told(app, backend):
    conversation = full(app, backend, "summarise")
    backend.script = []
    for _ in range(6):
        conversation = say(app, "go on " + "w" * 150, conversation.id)
    assert "no summary" in conversation.path()[-1].details["stats"]["warning"]


def test_a_pinned_message_stays_in_the_prompt(app, backend):
    conversation = full(app, backend, "drop")
    archive.pin_message(app, ANNA, conversation.id, conversation.path()[0].id, True)
    for _ in range(4):
        conversation = say(app, "go on " + "w" * 150, conversation.id)
    assert "first x" in prompt(backend) and "number 0" not in prompt(backend)


# --- titles by the model ------------------------------------------------------------------------------------------------------------------


def test_the_model_names_a_new_chat_if_wanted(app, backend):
    app.sessions.change(ANNA.session, {"title_by_model": True})
    backend.script = ['"Greetings"']
    conversation = say(app, "Hi there, my friend")
    until(lambda: app.store.info("anna", conversation.id).title == "Greetings")
    say(app, "Again", conversation.id)
    assert len(backend.requests) == 3
