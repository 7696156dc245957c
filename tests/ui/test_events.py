"""The tab's WebSocket: resume, snapshots, several listeners, keep-alive, news of the list, and who may listen."""

import json
import socket
import threading

import pytest
from websockets.exceptions import InvalidStatus

from modules import replies
from modules.auth import Identity
from modules.errors import DataError
from modules.ui import events
from modules.ui.events import Tab
from modules.ui.render import render_blocks
from tests.fakes import make_app, until
from tests.ui.live import Message, live_app

MARKDOWN = list("# A title\n\nSome *words* and `code`:\n\n```python\nprint(1)\n```\n\n- one\n- two\n\nThe end.")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with live_app(tmp_path_factory.mktemp("events") / "user_data") as live:
        yield live


@pytest.fixture
def live(server):
    server.backend.script = ["Hello", " world"]
    yield server
    server.let_go()


@pytest.fixture
def me(live):
    with live.browser() as browser:
        yield browser


def ids(turn):
    return turn["conversation"]["id"], turn["messages"][1]["id"]


def held(live, me, script=MARKDOWN, said=1):
    """A reply that has said some pieces and waits; its ids."""
    live.hold(*script)
    turn = me.ask("Go")
    conversation, reply = ids(turn)
    live.say(said)
    until(lambda: me.messages(conversation)[-1]["text"] == "".join(script[:said]))
    return conversation, reply


def test_every_listener_sees_the_same_reply_grow(live, me):
    conversation, reply = held(live, me)
    with me.tab() as one, me.tab() as two:
        for tab in (one, two):
            assert tab.next()["type"] == "hello"
            tab.follow(conversation, {reply: 0})
        live.say(len(MARKDOWN))
        pages = [Message().follow(tab, reply) for tab in (one, two)]
    for page in pages:
        assert page.blocks == render_blocks("".join(MARKDOWN)) == page.final["blocks"]
        assert page.final["state"] == "done" and page.final["text"] == "".join(MARKDOWN)
        assert page.seen == sorted(set(page.seen))


def test_a_tab_that_comes_back_gets_what_it_missed_and_no_more(live, me):
    conversation, reply = held(live, me)
    page = Message()
    with me.tab() as tab:
        tab.follow(conversation, {reply: 0})
        page.take(tab.until("update", lambda event: event["reply"] == reply))
    last = page.seen[-1]
    live.say(5)
    until(lambda: live.app.replies.running(conversation)[0].ring.last > last)
    with me.tab() as tab:
        tab.follow(conversation, {reply: last})
        first = tab.until("update", lambda event: event["reply"] == reply)
        assert first["event"] == last + 1
        page.take(first)
        live.say(len(MARKDOWN))
        page.follow(tab, reply)
    assert page.blocks == render_blocks("".join(MARKDOWN)) and page.seen == list(range(page.seen[0], page.seen[-1] + 1))


def test_a_tab_older_than_the_ring_gets_a_snapshot(live, me, monkeypatch):
    monkeypatch.setattr(replies.Ring.__init__, "__defaults__", (3, 0))
    monkeypatch.setattr(replies, "PUBLISH_SECONDS", 0.0)
    conversation, reply = held(live, me)
    ring = live.app.replies.running(conversation)[0].ring
    for _ in range(12):
        before = ring.last
        live.say()
        until(lambda now=before: ring.last > now)
    with me.tab() as tab:
        tab.follow(conversation, {reply: 1})
        page = Message()
        first = tab.until("snapshot", lambda event: event["reply"] == reply)
        page.take(first)
        live.say(len(MARKDOWN))
        page.follow(tab, reply)
    assert page.blocks == render_blocks("".join(MARKDOWN))


def test_an_event_that_never_was_gives_a_snapshot(live, me):
    conversation, reply = held(live, me)
    with me.tab() as tab:
        tab.follow(conversation, {reply: 10**9})
        assert tab.until("snapshot")["reply"] == reply


def test_a_reply_that_ended_before_is_told_as_ended(live, me):
    conversation, reply = ids(me.ask("Hi"))
    me.ended(conversation)
    with me.tab() as tab:
        tab.follow(conversation, {reply: 0})
        assert tab.until("end")["message"]["text"] == "Hello world"
    live.app.replies._replies.pop(reply)  # as after a restart of the server
    with me.tab() as tab:
        tab.follow(conversation, {reply: 7})
        assert tab.until("end")["message"]["state"] == "done"


def test_a_turn_begun_in_one_tab_appears_in_the_others(live, me):
    first = ids(me.ask("Hi"))[0]
    me.ended(first)
    with me.tab() as tab:
        tab.follow(first)
        tab.until("model")
        turn = me.ask("Again", first)
        started = tab.until("started")
        assert [m["id"] for m in started["messages"]] == [m["id"] for m in turn["messages"]]
        assert tab.until("end")["reply"] == turn["messages"][1]["id"]


def test_the_list_is_told_of_new_renamed_and_deleted_chats(live, me):
    with me.tab() as tab:
        tab.until("hello")
        conversation = ids(me.ask("A question"))[0]
        mine = lambda event: [c["id"] for c in event["changed"]] == [conversation]  # noqa: E731
        assert tab.until("conversations", mine)["changed"][0]["title"] == "A question"
        tab.until("conversations", lambda event: mine(event) and not event["changed"][0]["running"])
        me.json("PATCH", f"/chat/conversations/{conversation}", {"title": "Renamed"})
        assert tab.until("conversations", mine)["changed"][0]["title"] == "Renamed"
        me.json("DELETE", f"/chat/conversations/{conversation}")
        assert tab.until("conversations", lambda event: event["deleted"])["deleted"] == [conversation]


def test_another_tab_is_told_that_the_branch_has_changed(live, me):
    conversation, reply = ids(me.ask("Hi"))
    me.ended(conversation)
    with me.tab() as tab:
        tab.follow(conversation)
        tab.until("model")
        me.json("POST", "/chat/select", {"conversation": conversation, "message": reply})
        assert tab.until("changed")["conversation"] == conversation


def test_a_model_change_is_told_at_once(live, me):
    with me.tab() as tab:
        assert tab.until("model")["status"]["state"] == "ready"
        me.json("POST", "/models/unload", {}, 202)
        assert tab.until("model")["status"]["state"] == "none"
        me.json("POST", "/models/load", {"name": "model.fake"}, 202)
        assert tab.until("model", lambda event: event["status"]["state"] == "ready")["status"]["name"] == "model.fake"


def test_nobody_hears_of_another_owners_reply(live, me):
    conversation, reply = held(live, me)
    with live.browser() as other, other.tab() as tab:
        tab.follow(conversation, {reply: 0})
        theirs = ids(other.ask("Mine"))
        tab.until("conversations", lambda event: event["changed"] and event["changed"][0]["id"] == theirs[0])
        live.let_go()
        me.ended(conversation)
        until(lambda: other.messages(theirs[0])[-1]["state"] != "running")
        tab.follow(theirs[0], {theirs[1]: 0})
        tab.until("end")
        assert all(event.get("reply") != reply and conversation not in json.dumps(event) for event in tab.events)


def test_a_quiet_tab_is_kept_alive(live, me, monkeypatch):
    monkeypatch.setattr(events, "PING_SECONDS", 0.05)
    with me.tab() as tab:
        tab.until("ping")
        tab.until("ping")


@pytest.mark.parametrize(
    "frame", ["x", "[]", "null", '{"type": "follow", "conversation": 5, "replies": [1]}', '{"type": "follow", "replies": {"a": "b"}}', '{"type": 1}']
)
def test_a_frame_that_makes_no_sense_harms_nobody(live, me, frame):
    with me.tab() as tab:
        tab.until("hello")
        tab.socket.send(frame)
    with me.tab() as tab:
        assert tab.until("model")


def test_many_half_open_tabs_wait_for_nobody(live, me):
    held_open = [me.tab() for _ in range(40)]
    tabs = [each.__enter__() for each in held_open]
    try:
        conversation, reply = ids(me.ask("Hi"))
        tabs[-1].follow(conversation, {reply: 0})
        assert tabs[-1].until("end")["message"]["text"] == "Hello world"
    finally:
        for each in held_open:
            each.__exit__(None, None, None)
    until(lambda: not any(live.app.replies._wakes.values()) or len(next(iter(live.app.replies._wakes.values()))) == 0)


def test_without_a_cookie_or_from_a_foreign_page_there_is_no_connection(live, me):
    me.cookies.clear()
    with pytest.raises(InvalidStatus) as refused, me.tab():
        pass
    assert refused.value.response.status_code == 403


def test_a_login_that_ends_closes_the_connection(tmp_path, monkeypatch):
    monkeypatch.setattr(events, "PING_SECONDS", 0.05)
    with live_app(tmp_path, users={"ann": "pw"}) as live, live.browser() as browser:
        cookie = live.auth.login("ann", "pw")
        browser.cookies.set(cookie.name, cookie.value)
        with browser.tab() as tab:
            tab.until("hello")
            closed: list[int] = []
            listener = threading.Thread(target=lambda: closed.append(tab.closed()))
            listener.start()
            browser.post("/logout", headers={"Origin": live.url})
            listener.join(20)
        assert closed == [1008]


def test_a_continued_reply_is_not_mistaken_for_the_one_before(live, me, monkeypatch):
    monkeypatch.setattr(replies, "PUBLISH_SECONDS", 0.0)
    conversation, reply = held(live, me, said=20)
    live.let_go()
    me.ended(conversation)
    seen = live.app.replies.get(live.auth.need(me).owner, reply).ring.last - 2  # a tab that slept through the end
    live.hold(*"Once again, with many more words than before to be said.")
    me.json("POST", "/chat/continue", {"conversation": conversation, "message": reply, "revision": me.revision}, 202)
    for _ in range(seen + 3):
        before = live.app.replies.running(conversation)[0].ring.last
        live.say()
        until(lambda now=before: live.app.replies.running(conversation)[0].ring.last > now)
    with me.tab() as tab:
        tab.follow(conversation, {reply: seen})
        page = Message()
        page.take(tab.until("snapshot"))
        live.let_go()
        page.follow(tab, reply)
    assert page.blocks == page.final["blocks"] and page.final["text"].endswith("be said.")


def test_a_reply_that_an_earlier_server_was_writing_is_told_as_interrupted(tmp_path):
    with live_app(tmp_path) as live, live.browser() as me:
        save = live.app.store.save
        live.app.store.save = lambda message: save(message) if message.state == "running" else None  # as if killed: no last save
        live.hold("a", "b")
        conversation, reply = ids(me.ask("Hi"))
        live.say()
        until(lambda: me.messages(conversation)[-1]["text"] == "a")
        cookies = dict(me.cookies)
    with live_app(tmp_path) as live, live.browser() as me:
        me.cookies.update(cookies)
        with me.tab() as tab:
            tab.follow(conversation, {reply: 3})
            view = tab.until("end", lambda event: event["reply"] == reply)["message"]
        assert (view["state"], view["text"]) == ("interrupted", "a")


def test_a_tab_that_reads_nothing_costs_no_memory_and_no_time(live, me, monkeypatch):
    """It holds a cursor, not a queue: what it has not read is not kept for it."""
    monkeypatch.setattr(replies, "PUBLISH_SECONDS", 0.0)
    sent = []
    real = events._send
    monkeypatch.setattr(events, "_send", lambda socket, message: sent.append(message) or real(socket, message))
    script = ["word " * 200 + "\n\n"] * 300
    live.hold(*script)
    conversation, reply = ids(me.ask("Hi"))
    with me.tab(max_queue=1) as deaf, me.tab() as tab:
        deaf.follow(conversation, {reply: 0})
        tab.follow(conversation, {reply: 0})
        tab.until("model")
        live.say(len(script))
        page = Message().follow(tab, reply)  # the one that reads waits for nobody
        assert len(page.blocks) == len(script)
        assert len(live.app.replies.get(live.auth.need(me).owner, reply).ring._events) <= replies.RING_EVENTS
    assert len(sent) < 3 * len(script) + 50


def test_a_hundred_half_open_sockets(live, me):
    """Handshakes begun and never ended, as by a phone that left the network."""
    host, port = live.url.removeprefix("http://").split(":")
    open_sockets = [socket.create_connection((host, int(port)), timeout=20) for _ in range(100)]
    try:
        for each in open_sockets:
            each.sendall(b"GET /chat/events HTTP/1.1\r\nHost: " + host.encode())
        assert me.ended(ids(me.ask("Hi"))[0])["text"] == "Hello world"
        with me.tab() as tab:
            assert tab.until("model")
    finally:
        for each in open_sockets:
            each.close()


@pytest.mark.parametrize("frame", [b"\x00\xff", "[" * 60_000, '{"type":"follow","conversation":"\\ud800","replies":{"\\ud800":1}}', "x" * 100_000])
def test_a_hostile_frame_ends_at_most_its_own_connection(live, me, frame):
    with me.tab() as tab, me.tab() as other:
        tab.until("hello")
        tab.socket.send(frame)
        other.until("model")
        conversation = ids(me.ask("Hi"))[0]
        other.until("conversations", lambda event: event["changed"][0]["id"] == conversation)


def test_a_frame_beyond_all_limits_closes_its_connection(live, me):
    with me.tab() as tab:
        tab.until("hello")
        tab.socket.send("x" * 2**18)
        assert tab.closed() == 1009


def test_only_so_many_replies_are_followed(live, me):
    conversation, reply = held(live, me)
    with me.tab() as tab:
        tab.follow(conversation, {**{f"x{n}": 0 for n in range(100)}, "y": True, "z": -5})
        assert tab.until("update")["reply"] == reply  # the one that runs is followed without being named


def test_a_tab_that_missed_news_of_the_list_is_told_to_load_it_again(live, me):
    tab = events.Tab(live.app, live.auth.need(me))
    list(tab.news())
    for _ in range(replies.RING_EVENTS + 1):
        live.app.replies.tell(live.auth.need(me).owner, "deleted", {"id": "x"})
    told = list(tab.news())
    assert [event["type"] for event in told] == ["hello"] and told[0]["boot"] != events.BOOT
    assert list(tab.news()) == []


def test_what_happens_while_a_tab_reads_its_news_is_told_next(tmp_path, monkeypatch):
    app = make_app(tmp_path, monkeypatch)
    tab = Tab(app, Identity("anna", "browser"))
    list(tab.news())
    ring = app.replies.news("anna")
    after = ring.after

    def read(event):
        found = after(event)
        app.replies.tell("anna", "deleted", {"id": "x"})
        return found

    with monkeypatch.context() as patch:
        patch.setattr(ring, "after", read)
        assert list(tab.news()) == []
    assert list(tab.news()) == [{"type": "conversations", "changed": [], "deleted": ["x"]}]
    app.close()


def test_news_of_what_is_gone_meanwhile_are_left_out(live, me):
    who = live.auth.need(me)
    tab = events.Tab(live.app, who)
    list(tab.news())
    tab.follow({"conversation": "gone"})
    live.app.replies.tell(who.owner, "conversation", {"id": "gone"})
    live.app.replies.tell(who.owner, "started", {"conversation": "gone", "messages": ["m"], "running": ["m"]})
    assert [event["type"] for event in tab.news()] == []


@pytest.mark.parametrize(
    ("template", "known"),
    [("{{ messages[", []), ("{{ ''.__class__ }}", []), ("{% if enable_thinking %}x{% endif %}{{ messages }}", ["enable_thinking"]), (None, [])],
)
def test_a_wrong_template_of_the_model_ends_no_tab(template, known, live, me):
    """It is told when it is used; the model's state is told at each event."""
    live.backend.chat_template = template
    told = [event["status"]["thinking"] for event in events.Tab(live.app, live.auth.need(me)).news() if event["type"] == "model"]
    assert told == [known]


def test_a_template_is_looked_at_once_not_at_each_event(live, me, monkeypatch):
    live.backend.chat_template = "{% if reasoning_effort %}once{% endif %}"
    looked = []
    monkeypatch.setattr("modules.templates.sandbox.variables", lambda source: looked.append(source) or frozenset())
    tab = events.Tab(live.app, live.auth.need(me))
    for _ in range(20):
        list(tab.news())
    assert len(looked) == 1


def test_a_disk_that_is_full_at_the_end_is_told_and_the_reply_saved_later(live, me, monkeypatch):
    full = threading.Event()
    full.set()
    real = live.app.store.save

    def save(message):
        if full.is_set():
            raise DataError("The conversations cannot be written: the disk is full. Free some space and try again.")
        real(message)

    monkeypatch.setattr(replies, "SAVE_RETRY_SECONDS", (0.01,) * 2000)
    monkeypatch.setattr(live.app.store, "save", save, raising=False)
    with me.tab() as tab:
        conversation, reply = ids(me.ask("Hi"))
        tab.follow(conversation, {reply: 0})
        view = tab.until("end")["message"]
        assert view["text"] == "Hello world" and "not saved yet" in view["error"] and "Free some space" in view["error"]
        assert me.messages(conversation)[-1]["text"] == "Hello world"  # from memory
        full.clear()
        until(lambda: me.messages(conversation)[-1]["state"] == "done")
    owner = live.auth.need(me).owner
    until(lambda: live.app.store.conversation(owner, conversation)[reply].text == "Hello world")
    me.ended(ids(me.ask("Next", conversation))[0])
