"""Random sequences of everything that can be done to a conversation, against a plain model in memory.

HYPOTHESIS_EXAMPLES=1000 (say) runs more sequences than the usual ones.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from modules.conversation import Conversation, Message, Summary
from modules.errors import NotFound
from modules.store import Store, title_from
from modules.transfer import read, to_json
from tests.test_transfer import shape

ANNA, BERT = "anna", "bert"
EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", "100"))
STEPS = 40

picks = st.integers(0, 999)
texts = st.text(max_size=12)
folders = st.sampled_from(["", "work", "play"])
tag_sets = st.sets(st.sampled_from(["a", "b", "ü"])).map(sorted).map(tuple)


@dataclass
class Beside:
    """What the store keeps of a conversation besides its value."""

    draft: str = ""
    explained: dict[str, tuple[str, bytes]] = field(default_factory=dict)


@dataclass
class Gone:
    """What is in the trash: a whole conversation, or some messages of one (and its tip, if that was among them)."""

    conversation: str
    whole: tuple[Conversation, Beside] | None = None
    messages: tuple[Message, ...] = ()
    explained: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    tip: str | None = None


class TreeMachine(RuleBasedStateMachine):
    """`chats` and `beside` are what must be on the disk; `order` is the order in which messages were made, over all conversations."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.chats: dict[str, Conversation] = {}
        self.beside: dict[str, Beside] = {}
        self.gone: dict[int, Gone] = {}
        self.order: dict[str, int] = {}
        self.tokens: list[str] = []
        self.new_draft = ""
        self.touched: str | None = None

    @initialize()
    def begin(self) -> None:
        self._open()

    def _open(self) -> None:
        self.store = Store.open(self.folder / "conversations.sqlite3")
        self.store._writer.execute("PRAGMA synchronous = OFF")  # no test of power loss: sequences take a tenth of the time

    def teardown(self) -> None:
        try:
            if hasattr(self, "store"):
                self.reopen()
                self.store.close()
        finally:
            shutil.rmtree(self.folder)

    # Choosing, and the model's own steps

    def _chat(self, pick: int) -> Conversation:
        ids = list(self.chats)
        self.touched = ids[pick % len(ids)]
        return self.chats[self.touched]

    def _message(self, conversation: Conversation, pick: int) -> Message:
        return list(conversation.messages.values())[pick % len(conversation.messages)]

    def _word(self, text: str) -> str:
        self.tokens.append(f"q{len(self.tokens)}q")
        return f"{self.tokens[-1]} {text}"

    def _keep(self, conversation: Conversation) -> None:
        for id in conversation.messages:
            self.order.setdefault(id, len(self.order))
        in_order = sorted(conversation.messages, key=self.order.__getitem__)
        self.chats[conversation.id] = replace(conversation, messages={id: conversation.messages[id] for id in in_order})

    def _add(self, grown: Conversation, *new: Message) -> None:
        self.store.add(ANNA, grown.id, new, new[-1].id)
        title = grown.title or title_from(next((m.text for m in new if m.role == "user"), ""))
        self._keep(replace(grown, title=title))

    def _change(self, conversation: Conversation, message: Message) -> None:
        self._keep(replace(conversation, messages={**conversation.messages, message.id: message}))

    some_chat = precondition(lambda self: self.chats)
    some_message = precondition(lambda self: any(chat.messages for chat in self.chats.values()))

    def _full_chat(self, pick: int) -> Conversation:
        full = [chat for chat in self.chats.values() if chat.messages]
        self.touched = full[pick % len(full)].id
        return full[pick % len(full)]

    # Talking

    @rule(text=texts, title=st.sampled_from(["", "A title"]), mode=st.sampled_from([{}, {"mode": "chat", "name2": "Ü"}]))
    def new_chat(self, text: str, title: str, mode: dict) -> None:
        made = self.store.create(ANNA, title, mode)
        self.touched = made.id
        self.beside[made.id] = Beside()
        self._keep(made)
        self.send(0, text, made)

    @some_chat
    @rule(pick=picks, text=texts)
    def send(self, pick: int, text: str, conversation: Conversation | None = None) -> None:
        grown, question = (conversation or self._chat(pick)).add("user", self._word(text))
        grown, answer = grown.add("assistant", "", state="running", details={"seed": pick})
        self._add(grown, question, answer)

    @some_message
    @rule(pick=picks, which=picks)
    def regenerate(self, pick: int, which: int) -> None:
        conversation = self._full_chat(pick)
        answers = [m for m in conversation.messages.values() if m.role == "assistant"]
        if answers:
            grown, answer = conversation.add_sibling(answers[which % len(answers)].id, "", state="running", details={"group": "g"})
            self._add(grown, answer)

    @some_message
    @rule(pick=picks, which=picks, text=texts, thought=texts, state=st.sampled_from(["running", "done", "stopped", "failed"]))
    def write(self, pick: int, which: int, text: str, thought: str, state) -> None:
        """A running reply grows or ends; one that had ended goes on."""
        conversation = self._full_chat(pick)
        old = self._message(conversation, which)
        new = replace(old, text=self._word(text), reasoning=thought, state=state, details={"seed": which, "x": [thought]})
        self.store.save(new)
        pinned = {"pinned": True} if old.details.get("pinned") else {}
        self._change(conversation, replace(new, details={**new.details, **pinned}))

    @some_message
    @rule(pick=picks, which=picks, text=texts)
    def edit(self, pick: int, which: int, text: str) -> None:
        conversation = self._full_chat(pick)
        grown, edited = conversation.add_sibling(self._message(conversation, which).id, self._word(text))
        self._add(grown, edited)

    @some_chat
    @rule(pick=picks, text=texts, role=st.sampled_from(["user", "assistant"]))
    def insert(self, pick: int, text: str, role) -> None:
        grown, message = self._chat(pick).add(role, self._word(text))
        self._add(grown, message)

    # Moving in the tree

    @some_message
    @rule(pick=picks, which=picks)
    def select(self, pick: int, which: int) -> None:
        conversation = self._full_chat(pick)
        message = self._message(conversation, which)
        tip = self.store.show(ANNA, conversation.id, message.id)
        self._keep(conversation.move_to(message.id))
        assert tip == self.chats[conversation.id].tip

    @some_message
    @rule(pick=picks, which=picks)
    def branch(self, pick: int, which: int) -> None:
        conversation = self._full_chat(pick)
        message = self._message(conversation, which)
        copy = self.store.copy_branch(ANNA, conversation.id, message.id)
        old, new = conversation.path(message.id), copy.path()
        assert len(copy.messages) == len(new) == len(old)
        for before, after in zip(old, new, strict=True):
            assert (after.role, after.text, after.reasoning, after.created) == (before.role, before.text, before.reasoning, before.created)
            assert after.state == ("interrupted" if before.state == "running" else before.state)
            assert after.id not in self.order
        assert (copy.settings, copy.folder, copy.tags, copy.pinned) == (conversation.settings, conversation.folder, conversation.tags, False)
        known = self.beside[conversation.id].explained
        names = {a.id: b.id for a, b in zip(old, new, strict=True)}
        told = conversation.summary if conversation.summary and conversation.summary.after in names else None
        assert copy.summary == (replace(told, after=names[told.after]) if told else None)
        explained = {names[id]: kept for id, kept in known.items() if id in names}
        self.beside[copy.id] = Beside(explained=explained)
        self._keep(copy)

    # Taking away, and back

    @some_message
    @rule(pick=picks, which=picks)
    def remove(self, pick: int, which: int) -> None:
        conversation = self._full_chat(pick)
        first = self._message(conversation, which)
        below = {first.id}
        for message in conversation.messages.values():  # parents come first
            if message.parent in below:
                below.add(message.id)
        number = self.store.remove(ANNA, conversation.id, first.id)
        explained = self.beside[conversation.id].explained
        tip = conversation.tip if conversation.tip in below else None
        self.gone[number] = Gone(
            conversation.id,
            messages=tuple(m for m in conversation.messages.values() if m.id in below),
            explained={id: explained.pop(id) for id in list(explained) if id in below},
            tip=tip,
        )
        versions = conversation.siblings(first.id)
        place = versions.index(first.id)
        near = versions[place - 1] if place else versions[1] if len(versions) > 1 else None
        left = replace(conversation, messages={id: m for id, m in conversation.messages.items() if id not in below})
        if tip:
            left = left.move_to(near) if near else replace(left, tip=first.parent)
        self._keep(left)

    @some_chat
    @rule(pick=picks)
    def delete(self, pick: int) -> None:
        conversation = self._chat(pick)
        number = self.store.delete(ANNA, conversation.id)
        self.gone[number] = Gone(conversation.id, whole=(self.chats.pop(conversation.id), self.beside.pop(conversation.id)))
        self.touched = None

    @precondition(lambda self: self.gone)
    @rule(pick=picks, newest=st.booleans())
    def undo(self, pick: int, newest: bool) -> None:
        number = max(self.gone) if newest else list(self.gone)[pick % len(self.gone)]
        gone = self.gone[number]
        chat = self.chats.get(gone.conversation)
        possible = gone.whole is not None or (chat is not None and gone.messages[0].parent in (None, *chat.messages))
        if not possible:
            self._refused(number)
            return
        assert self.store.restore(ANNA, number) == gone.conversation
        del self.gone[number]
        if gone.whole:
            conversation, self.beside[gone.conversation] = gone.whole
            self._keep(replace(conversation, messages={id: _ended(m) for id, m in conversation.messages.items()}))
        elif chat:
            back = {m.id: _ended(m) for m in gone.messages}
            self.beside[chat.id].explained.update(gone.explained)
            self._keep(replace(chat, messages={**chat.messages, **back}, tip=gone.tip or chat.tip))
        self.touched = gone.conversation
        self._refused(number)  # once is enough

    def _refused(self, number: int) -> None:
        try:
            self.store.restore(ANNA, number)
        except NotFound:
            return
        raise AssertionError(f"{number} came back")

    @rule()
    def empty_trash(self) -> None:
        self.store.empty_trash(BERT)
        assert {kept.number for kept in self.store.trash(ANNA)} == set(self.gone)
        self.store.empty_trash(ANNA)
        self.gone.clear()

    # Naming and arranging

    @some_chat
    @rule(pick=picks, text=texts)
    def rename(self, pick: int, text: str) -> None:
        conversation = self._chat(pick)
        title = self._word("".join(filter(str.isalnum, text)))
        self.store.rename(ANNA, conversation.id, title)
        self._keep(replace(conversation, title=title.strip()))

    @some_chat
    @rule(picked=st.lists(picks, min_size=1, max_size=3), folder=st.none() | folders, pinned=st.none() | st.booleans(), add=tag_sets, remove=tag_sets)
    def arrange(self, picked: list[int], folder, pinned, add, remove) -> None:
        chosen = {chat.id: chat for chat in map(self._chat, picked)}
        self.store.arrange(ANNA, list(chosen), folder=folder, pinned=pinned, add_tags=add, remove_tags=remove)
        for chat in chosen.values():
            tags = tuple(sorted((set(chat.tags) - set(remove)) | set(add)))
            in_folder, on_top = chat.folder if folder is None else folder, chat.pinned if pinned is None else pinned
            self._keep(replace(chat, folder=in_folder, pinned=on_top, tags=tags))

    @some_message
    @rule(pick=picks, which=picks, pinned=st.booleans())
    def pin(self, pick: int, which: int, pinned: bool) -> None:
        conversation = self._full_chat(pick)
        message = self._message(conversation, which)
        self.store.pin_message(ANNA, conversation.id, message.id, pinned)
        details = {k: v for k, v in message.details.items() if k != "pinned"}
        self._change(conversation, replace(message, details={**details, **({"pinned": True} if pinned else {})}))

    @some_chat
    @rule(pick=picks, text=texts, after=st.none() | picks)
    def keep_beside(self, pick: int, text: str, after: int | None) -> None:
        conversation = self._chat(pick)
        summary = Summary(text, [*conversation.messages, "gone"][after % (len(conversation.messages) + 1)]) if after is not None else None
        self.store.save_draft(ANNA, conversation.id, text)
        self.store.save_draft(ANNA, None, text * 2)
        self.store.set_settings(ANNA, conversation.id, {"name1": text})
        self.store.set_summary(ANNA, conversation.id, summary)
        self.new_draft = text * 2
        self.beside[conversation.id].draft = text
        self._keep(replace(conversation, settings={"name1": text}, summary=summary))

    @some_message
    @rule(pick=picks, which=picks, tokens=st.binary(max_size=8))
    def explain(self, pick: int, which: int, tokens: bytes) -> None:
        conversation = self._full_chat(pick)
        id = self._message(conversation, which).id
        self.store.save_explanation(id, f"prompt {which}", tokens)
        self.beside[conversation.id].explained[id] = f"prompt {which}", tokens

    # Out and in

    @some_chat
    @rule(picked=st.lists(picks, min_size=1, max_size=2, unique=True))
    def export_and_import(self, picked: list[int]) -> None:
        exported = [self.store.conversation(ANNA, self._chat(pick).id) for pick in picked]
        found = read(to_json(exported).encode(), "chats.json", ANNA)
        assert len(found) == len(exported)
        for old, new in zip(exported, found, strict=True):
            assert shape(new) == shape(replace(old, messages={id: _ended(m) for id, m in old.messages.items()}))
            assert (new.folder, new.tags, new.pinned, new.settings) == (old.folder, old.tags, old.pinned, old.settings)
            assert new.id not in self.chats
            assert not self.order.keys() & new.messages.keys()
        self.store.import_conversations(ANNA, found)
        for new in found:
            self._keep(new)
            self.beside[new.id] = Beside()

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self._open()
        for chat in list(self.chats.values()):
            self._keep(replace(chat, messages={id: _ended(m) for id, m in chat.messages.items()}))
            self.same(chat.id)
        self.everything()

    # What holds

    @invariant()
    def what_was_touched_is_the_same(self) -> None:
        if self.touched in self.chats:
            self.same(self.touched)

    @invariant()
    def the_list_is_complete(self) -> None:
        if not hasattr(self, "store"):
            return
        items, cursor = [], None
        while items == [] or cursor:
            page = self.store.conversations(ANNA, limit=3, before=cursor)
            items, cursor = [*items, *page.items], page.next
            if not page.items:
                break
        assert sorted(item.id for item in items) == sorted(self.chats)
        assert [item.pinned for item in items] == sorted((chat.pinned for chat in self.chats.values()), reverse=True)
        for token in self.tokens[-2:]:
            self.found(token)

    def same(self, id: str) -> None:
        chat, beside = self.chats[id], self.beside[id]
        stored = self.store.conversation(ANNA, id)
        assert stored == chat
        assert list(stored.messages) == list(chat.messages)
        above: set[str | None] = {None}
        for message in stored.messages.values():
            assert message.parent in above, "its parent stands before it, so a root is reached"
            above.add(message.id)
        assert stored.tip in above
        assert (stored.tip is None) == (not stored.messages)
        shown = self.store.messages(ANNA, id, limit=1000).items
        assert [s.message for s in shown] == list(chat.path())
        assert [s.versions for s in shown] == [chat.siblings(m.id) for m in chat.path()]
        nodes, tip = self.store.tree(ANNA, id)
        assert tip == chat.tip
        assert [(n.id, n.parent, n.role, n.state) for n in nodes] == [(m.id, m.parent, m.role, m.state) for m in chat.messages.values()]
        info = self.store.info(ANNA, id)
        assert (info.title, info.folder, info.pinned, info.tags) == (chat.title, chat.folder, chat.pinned, chat.tags)
        assert info.running == any(m.state == "running" for m in chat.messages.values())
        assert self.store.settings(ANNA, id) == chat.settings
        assert self.store.draft(ANNA, id) == beside.draft
        assert self.store.summary(ANNA, id) == chat.summary
        assert self.store.explanations(ANNA, id, chat.messages) == beside.explained

    def found(self, token: str) -> None:
        expected = {
            chat.id
            for chat in self.chats.values()
            if token in chat.title or any(token in m.text for m in chat.messages.values() if m.state != "running")
        }
        assert {item.id for item in self.store.conversations(ANNA, token, limit=1000).items} == expected

    def everything(self) -> None:
        for token in self.tokens:
            self.found(token)
        for name in ("work", "play", ""):
            inside = {chat.id for chat in self.chats.values() if chat.folder == name}
            assert {item.id for item in self.store.conversations(ANNA, folder=name).items} == inside
        for name in ("a", "b", "ü"):
            tagged = {chat.id for chat in self.chats.values() if name in chat.tags}
            assert {item.id for item in self.store.conversations(ANNA, tag=name).items} == tagged
        assert {kept.number: kept.conversation for kept in self.store.trash(ANNA)} == {n: gone.conversation for n, gone in self.gone.items()}
        assert self.store.draft(ANNA, None) == self.new_draft
        assert self.store.conversations(BERT).items == ()
        writer = self.store._writer
        assert [row[0] for row in writer.execute("PRAGMA integrity_check")] == ["ok"]
        assert writer.execute("PRAGMA foreign_key_check").fetchall() == []
        for table, count in (("messages", sum(len(chat.messages) for chat in self.chats.values())), ("conversations", len(self.chats))):
            assert writer.execute(f"SELECT count(*) FROM {table}").fetchone()[0] == count


def _ended(message: Message) -> Message:
    return replace(message, state="interrupted") if message.state == "running" else message


def test_any_sequence_leaves_on_the_disk_what_is_in_memory():
    many = settings(max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(TreeMachine, settings=many)


def test_the_machine_finds_a_message_that_is_lost(monkeypatch):
    """The check itself: a store that forgets the last of several messages is found out."""
    whole = Store.add
    monkeypatch.setattr(Store, "add", lambda self, owner, id, messages, tip: whole(self, owner, id, messages[:1], messages[0].id))
    few = settings(max_examples=20, stateful_step_count=5, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    try:
        run_state_machine_as_test(TreeMachine, settings=few)
    except AssertionError:
        return
    raise AssertionError("nothing was found")
