import pytest

from modules.conversation import Conversation, Message, new_id
from modules.errors import NotFound


def chain(*texts: str) -> Conversation:
    conversation = Conversation(new_id(), "anna")
    for text in texts:
        conversation, _ = conversation.add("user", text)
    return conversation


def texts(conversation: Conversation) -> list[str]:
    return [message.text for message in conversation.path()]


def test_add_appends_to_the_tip_and_leaves_the_old_value_alone():
    before = chain("a", "b")
    after, message = before.add("assistant", "c", state="running")
    assert texts(before) == ["a", "b"]
    assert texts(after) == ["a", "b", "c"]
    assert after.tip == message.id
    assert message.state == "running"
    assert message.created > 0


def test_add_under_an_earlier_message_makes_a_branch():
    conversation = chain("a", "b", "c")
    root = conversation.path()[0]
    conversation, message = conversation.add("user", "d", parent=root.id)
    assert texts(conversation) == ["a", "d"]
    assert len(conversation.siblings(message.id)) == 2


def test_a_sibling_has_the_same_parent_and_role_also_at_the_root():
    conversation = chain("a", "b")
    first, second = conversation.path()
    conversation, edited = conversation.add_sibling(first.id, "A")
    assert texts(conversation) == ["A"]
    assert conversation.siblings(first.id) == (first.id, edited.id)
    conversation, again = conversation.add_sibling(second.id, "B")
    assert texts(conversation) == ["a", "B"]
    assert again.parent == first.id
    assert again.role == second.role


def test_moving_to_a_version_shows_its_newest_leaf():
    conversation = chain("a", "b", "c")
    root, middle, leaf = conversation.path()
    conversation, other = conversation.add_sibling(middle.id, "B")
    assert conversation.move_to(middle.id).tip == leaf.id
    assert conversation.move_to(root.id).tip == other.id


@pytest.mark.parametrize(
    "use", [lambda c: c["x"], lambda c: c.path("x"), lambda c: c.siblings("x"), lambda c: c.move_to("x"), lambda c: c.add("user", "t", parent="x")]
)
def test_an_unknown_message_is_not_found(use):
    with pytest.raises(NotFound, match="Reload"):
        use(chain("a"))


def test_an_empty_conversation_has_an_empty_path():
    assert Conversation(new_id(), "anna").path() == ()


def test_values_share_no_state():
    assert Message("a", None, "user", "t").details == {}
    with pytest.raises(TypeError):
        Message("a", None, "user", "t").details["x"] = 1  # type: ignore[index]


def test_a_path_of_100_000_messages_is_walked_without_recursion():
    messages = {str(i): Message(str(i), str(i - 1) if i else None, "user", "") for i in range(100_000)}
    conversation = Conversation("c", "anna", "", messages, "99999")
    assert len(conversation.path()) == 100_000
    assert conversation.move_to("0").tip == "99999"
