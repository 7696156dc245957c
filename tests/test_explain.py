"""What explains a reply: tokens and prompts are kept small and come back exactly; alternatives; asking again."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules import explain
from modules.backends.base import Adapter, CancelToken, Chunk, GenerationRequest, TokenLogprob
from modules.backends.echo import EchoBackend, words
from modules.conversation import Conversation, Message, Summary
from modules.errors import DataError, ModelError, NotFound, PromptError, SettingsError
from modules.explain import Recorder, Token, before, differences, prompt_parts, prompt_text, request_again, resumed, token_texts, unpack
from modules.prompting import Prompting
from modules.samplers import SamplingParams
from modules.settings import ChatOptions
from modules.store import Store
from modules.templates import FALLBACK, ChatTemplate

# --- tokens ---------------------------------------------------------------------------------------------------------------------------

IDS = st.integers(0, 2**31 - 1)
LOGPROBS = st.none() | st.floats(-100, 0) | st.just(-math.inf)


def recorded(tokens: list[Token]) -> bytes:
    recorder = Recorder([token for token in tokens if token.given])
    for token in tokens:
        if not token.given:
            recorder.seen(Chunk(token_ids=(token.id,), logprobs=() if token.logprob is None else (TokenLogprob(token.id, "", token.logprob),)))
    return recorder.packed()


@given(st.lists(st.tuples(IDS, LOGPROBS), max_size=60), st.integers(0, 60))
def test_tokens_come_back(values, given_count):
    tokens = [Token(id, logprob, place < given_count) for place, (id, logprob) in enumerate(values)]
    found = unpack(recorded(tokens))
    assert [(t.id, t.given) for t in found] == [(t.id, t.given) for t in tokens]
    for one, other in zip(tokens, found, strict=True):
        if one.logprob is None:
            assert other.logprob is None
        elif one.logprob < -60_000:
            assert other.logprob == -60_000
        else:
            assert other.logprob == pytest.approx(one.logprob, rel=1e-3, abs=1e-7)


def test_tokens_take_six_bytes_each_at_most_and_less_when_they_repeat():
    many = Recorder()
    many.seen(Chunk(token_ids=tuple(range(10_000, 12_000)), logprobs=tuple(TokenLogprob(0, "", -n / 777) for n in range(2000))))
    assert len(many.packed()) <= 6 * 2000 + 16
    same = Recorder()
    same.seen(Chunk(token_ids=(7,) * 2000, logprobs=(TokenLogprob(7, "", -0.5),) * 2000))
    assert len(same.packed()) < 200 and unpack(same.packed()) == [Token(7, -0.5)] * 2000


def test_chunks_without_tokens_or_without_probabilities():
    recorder = Recorder()
    for chunk in (Chunk(prefill_done=5), Chunk("ab", (1, 2)), Chunk("", (), "stop"), Chunk("c", (3,), logprobs=(TokenLogprob(3, "", math.nan),))):
        recorder.seen(chunk)
    assert unpack(recorder.packed()) == [Token(1), Token(2), Token(3)]
    assert unpack(Recorder().packed()) == []


@given(st.binary(max_size=60))
def test_bytes_that_are_no_tokens_are_refused(raw):
    packed = recorded([Token(5, -0.5)] * 100)
    for broken in (raw, packed[:-1], packed[:6] + raw, b"\x09" + packed[1:]):
        if broken == packed:
            continue
        try:
            unpack(broken)
        except DataError as error:
            assert "Regenerate" in str(error)
    with pytest.raises(DataError):
        unpack(packed[: len(packed) // 2])
    with pytest.raises(DataError):
        unpack(b"\x09" + packed[1:])


def test_the_texts_of_tokens():
    echo = EchoBackend(words(""))
    texts = token_texts(echo, list("né 🦊!".encode()))
    assert texts == ["n", "", "é", " ", "", "", "", "🦊", "!"]
    broken = token_texts(echo, [0xE2, 0x41, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xC3, 0xA9, 0xF0])
    assert len(broken) == 10 and broken[:2] == ["\ufffd", "A"] and broken[-1] == "\ufffd"
    with pytest.raises(PromptError):
        token_texts(echo, [1, 256])


class Leading(EchoBackend):
    """Leaves out the first space of what it decodes, as SentencePiece does, and counts how often it is asked."""

    asked = 0

    def decode(self, tokens):
        self.asked += 1
        return "".join([" the", " fox", "a"][token] for token in tokens).removeprefix(" ")

    def encode(self, text, add_bos=False):
        return [2]


def test_a_token_keeps_its_leading_space_and_is_asked_for_once():
    backend = Leading(words(""))
    assert token_texts(backend, [0, 1, 0, 0]) == [" the", " fox", " the", " the"] and backend.asked == 3


# --- prompts --------------------------------------------------------------------------------------------------------------------------


class Kept(dict):
    """What is stored, by message id; it counts what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __call__(self, ids):
        self.asked += ids
        return {id: self[id] for id in ids if id in self}

    def keep(self, prompt: str, message: Message, path) -> None:
        self[message.id] = prompt_parts(prompt, message, path, self)

    def size(self) -> int:
        return sum(len(text.encode("utf-8", "surrogatepass")) for text in self.values())


def say(conversation: Conversation, kept: Kept, prompts: dict[str, str], render, asked: str, answer: str, **details) -> Conversation:
    """One turn: a user's message, and a reply whose prompt `render` makes of what stands above it."""
    conversation, _ = conversation.add("user", asked, details=details)
    above = conversation.path()
    prompt = render(above)
    conversation, reply = conversation.add("assistant", "", state="running")
    kept.keep(prompt, reply, above)
    prompts[reply.id] = prompt
    return grown(conversation, reply, answer)


def grown(conversation: Conversation, message: Message, text: str, reasoning: str = "") -> Conversation:
    now = replace(message, text=message.text + text, reasoning=message.reasoning + reasoning, state="done")
    return replace(conversation, messages={**conversation.messages, message.id: now})


def check_all(conversation: Conversation, kept: Kept, prompts: dict[str, str]) -> None:
    for id, prompt in prompts.items():
        assert prompt_text(conversation[id], conversation.path(id), kept) == prompt


def chatml(path) -> str:
    return "".join(f"<|im_start|>{m.role}\n{m.text}<|im_end|>\n" for m in path) + "<|im_start|>assistant\n"


def question(n: int) -> str:
    return f"Question number {n}: " + " ".join(f"word{(n * k) % 97}" for k in range(12)) + "?"


def answer(n: int) -> str:
    return f"Answer number {n}. " + " ".join(f"thing{(n * k) % 89}" for k in range(40)) + "."


def chat(turns: int, render=chatml) -> tuple[Conversation, Kept, dict[str, str]]:
    conversation, kept, prompts = Conversation("c", "me"), Kept(), {}
    for n in range(turns):
        conversation = say(conversation, kept, prompts, render, question(n), answer(n))
    return conversation, kept, prompts


def test_an_ordinary_chat_keeps_no_text_twice():
    conversation, kept, prompts = chat(40)
    check_all(conversation, kept, prompts)
    assert not any("word" in text or "thing" in text for text in kept.values())
    assert all(id not in text for text in kept.values() for id in conversation.messages)  # so a copied branch keeps its explanations


def test_what_is_kept_grows_with_the_chat_and_not_with_its_square():
    sizes = {turns: chat(turns)[1].size() for turns in (100, 200, 400)}
    assert sizes[200] < 2.1 * sizes[100] and sizes[400] < 2.1 * sizes[200]
    assert sizes[400] < 400 * 300


def test_a_long_chain_is_read_in_few_steps_without_recursion():
    conversation, kept, prompts = Conversation("c", "me"), Kept(), {}
    for n in range(600):
        kept.asked.clear()
        conversation = say(
            conversation, kept, prompts, lambda path: "".join(f"{m.role} {m.text}\n" for m in path), f"Question {n}", f"The answer is {n}"
        )
        assert len(kept.asked) <= explain.NEAREST + explain.STRIDE
    last = conversation.path()[-1]
    kept.asked.clear()
    assert prompt_text(last, conversation.path(), kept) == prompts[last.id]
    assert len(kept.asked) <= 600 / explain.STRIDE + explain.STRIDE + 1
    check_all(conversation, kept, dict(list(prompts.items())[::50]))


MODES = [
    ChatOptions(custom_system_message="Be brief. " * 20),
    ChatOptions(mode="chat", name2="Ada", context="{{char}} is a mathematician. " * 20, user_bio="likes bread"),
    ChatOptions(mode="chat-instruct", name2="Ada", context="{{char}} is a mathematician. " * 20),
    ChatOptions(mode="chat-instruct", chat_instruct_command="This:\n<|prompt|>\nWrite what <|character|> says next, in one sentence."),
]
TRIMMING = ChatTemplate(
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}",
    "<s>",
    "</s>",
)


@pytest.mark.parametrize("template", [FALLBACK, TRIMMING])
@pytest.mark.parametrize("options", MODES)
def test_real_prompts_of_all_modes_with_messages_left_out(options, template):
    prompting, conversation, kept, prompts, dropped = Prompting(template, options), Conversation("c", "me"), Kept(), {}, []

    def render(path):
        summary = Summary("They talked about numbers and words.", path[8].id) if 30 < len(path) < 40 else None
        fitted = prompting.fit(path, 6000, lambda text: [0] * len(text), summary=summary)
        dropped.append(fitted.dropped)
        return fitted.prompt

    for n in range(60):
        pinned = {"pinned": True} if n == 3 else {}
        conversation = say(conversation, kept, prompts, render, f"  {question(n)}\n", f"\n{answer(n)}  ", **pinned)
    assert dropped[0] == 0 and dropped[-1] > 40
    check_all(conversation, kept, prompts)
    assert kept.size() < 60 * 700 < sum(map(len, prompts.values())) / 5


TEXT = (
    st.text(max_size=8)
    | st.text("ab \n", max_size=60)
    | st.sampled_from(["a" * 40, "the same words again", "  blanks around it \n", "\ud800 is half a letter"])
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_prompt_of_any_texts_comes_back(data):
    conversation, kept, prompts = Conversation("c", "me"), Kept(), {}
    for _ in range(data.draw(st.integers(1, 8))):
        if conversation.messages and data.draw(st.booleans()):  # go on from any message, on a branch of its own
            conversation = replace(conversation, tip=data.draw(st.sampled_from(list(conversation.messages))))
        conversation, _ = conversation.add("user", data.draw(TEXT))
        conversation, reply = conversation.add("assistant", data.draw(TEXT), reasoning=data.draw(TEXT), state="running")
        for _ in range(data.draw(st.integers(1, 2))):  # the second time it goes on
            path = conversation.path()
            pieces = [text for m in path for text in (m.text, m.text.strip(), m.reasoning)]
            old = data.draw(st.sampled_from([*prompts.values(), ""]))
            prompt = old[: data.draw(st.integers(0, len(old)))] + "".join(data.draw(st.lists(st.sampled_from(pieces) | TEXT, max_size=8)))
            kept.keep(prompt, conversation[reply.id], path)
            prompts[reply.id] = prompt
            more = data.draw(TEXT)
            conversation = grown(conversation, conversation[reply.id], more.replace("\ud800", "?"), more.replace("\ud800", "?"))
    cleaned = {id: replace(m, text=m.text.replace("\ud800", "\ufffd")) for id, m in conversation.messages.items()}
    cleaned = {id: replace(m, reasoning=m.reasoning.replace("\ud800", "\ufffd")) for id, m in cleaned.items()}
    check_all(replace(conversation, messages=cleaned), kept, prompts)  # as the store gives them back
    assert all(text.encode() and json.loads(text) for text in kept.values())


def test_a_reply_that_goes_on_keeps_what_later_prompts_build_on():
    conversation, kept, prompts = chat(6)
    middle = conversation.path()[5]
    assert middle.role == "assistant"
    entirely_different = "Everything is different now: " + middle.text
    kept.keep(entirely_different, middle, conversation.path(middle.id))
    conversation = grown(conversation, middle, " And on it goes.")
    check_all(conversation, kept, {**prompts, middle.id: entirely_different})


def test_thinking_is_kept_once_too():
    conversation, _ = Conversation("c", "me").add("user", "What is six times seven, please?")
    conversation, reply = conversation.add("assistant", "It is forty-two, of course.", reasoning="Six times seven is forty-two.")
    conversation, _ = conversation.add("user", "And seven times eight, please?")
    path = conversation.path()
    prompt = f"<u>{path[0].text}<a><think>{reply.reasoning}</think>{reply.text}<u>{path[2].text}<a>"
    conversation, last = conversation.add("assistant", "", state="running")
    kept = Kept()
    kept.keep(prompt, last, path)
    assert prompt_text(last, conversation.path(), kept) == prompt
    assert not any(word in kept[last.id] for word in ("six", "Six", "forty", "eight"))


def test_versions_side_by_side_and_branches():
    conversation, kept, prompts = chat(5)
    asked = conversation.path()[-2]
    for n in range(4):
        conversation = replace(conversation, tip=asked.id)
        conversation, reply = conversation.add("assistant", "", state="running")
        prompts[reply.id] = chatml(conversation.path(asked.id))
        kept.keep(prompts[reply.id], reply, conversation.path(asked.id))
        conversation = grown(conversation, reply, answer(100 + n))
        conversation = say(conversation, kept, prompts, chatml, question(n), answer(n))
    check_all(conversation, kept, prompts)


def test_a_copied_branch_is_explained_without_the_original():
    conversation, kept, prompts = chat(40)
    ids = {id: f"copy-{id}" for id in conversation.messages}
    copies = {ids[m.id]: replace(m, id=ids[m.id], parent=ids.get(m.parent or "")) for m in conversation.messages.values()}
    copied = Conversation("d", "me", messages=copies, tip=ids[conversation.tip])
    of_copies = Kept()
    of_copies.update({ids[id]: text for id, text in kept.items()})
    check_all(copied, of_copies, {ids[id]: prompt for id, prompt in prompts.items()})


def test_what_is_lost_or_changed_is_said_and_costs_the_next_prompts_nothing():
    conversation, kept, prompts = chat(6)
    first, last = (m for m in (conversation.path()[1], conversation.path()[-1]))
    whole = kept.pop(first.id)
    with pytest.raises(DataError, match="Regenerate"):
        prompt_text(last, conversation.path(), kept)
    for n in range(40):
        conversation = say(conversation, kept, prompts, chatml, question(n), answer(n))
    readable = [m.id for m in conversation.path()[-16:] if m.id in prompts]
    assert [prompt_text(conversation[id], conversation.path(id), kept) for id in readable] == [prompts[id] for id in readable]
    kept[first.id] = whole
    check_all(conversation, kept, prompts)
    changed = replace(conversation.path()[2], text="Somebody wrote something else into the file")
    with pytest.raises(DataError):
        prompt_text(last, [changed if m.id == changed.id else m for m in conversation.path()], kept)


ENTRIES = """[1] | [0,[0,0,5],[],[[0,0]]] | [0,[0,-1,5],[],[[0,0]]] | [9,[-1,0,5],[],[[0,0]]] | [9,[1,0,-5],[],[[0,0]]] | [0,null,[[99,0,5]],[[0,0]]]
    | [0,null,[["x",0,5]],[[0,0]]] | ["a",null,[],[[0,0]]] | [0,null,[[-1,0,5]],[[0,0]]] | [0,null,[],[]] | [0,null,[],[[0]]] | [0,null,[],[[0,7]]]"""
BROKEN = ["", "{}", "[]", "null", '{"v":2,"prompts":[]}', "[" * 100_000, *(f'{{"v":1,"prompts":[{entry}]}}' for entry in ENTRIES.split("|"))]


@pytest.mark.parametrize("broken", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_row_is_an_error_with_a_fix_and_can_be_written_again(broken):
    conversation, kept, _ = chat(2)
    last = conversation.path()[-1]
    kept[last.id] = broken
    with pytest.raises(DataError, match="Regenerate"):
        prompt_text(last, conversation.path(), kept)
    kept.keep("a new prompt", last, conversation.path())
    assert prompt_text(last, conversation.path(), kept) == "a new prompt"


def test_messages_without_explanation():
    conversation, kept, _ = chat(2)
    asked = conversation.path()[0]
    assert prompt_text(asked, conversation.path(asked.id), kept) is None


def test_endless_repetition_costs_little(monkeypatch):
    """Texts that make a naive search quadratic: it must end, and stays exact."""
    conversation = Conversation("c", "me")
    for n in range(40):
        conversation, _ = conversation.add("user", "a" * 20_000 + "b" * (n % 3) + "a" * 20_000)
    path = conversation.path()
    conversation, reply = conversation.add("assistant", "", state="running")
    kept, prompt = Kept(), "a" * 1_000_000 + "b"
    kept.keep(prompt, reply, path)
    assert prompt_text(reply, conversation.path(), kept) == prompt
    monkeypatch.setattr(explain, "MAX_SEARCHED", 0)
    kept.keep(prompt := chatml(path), reply, path)
    assert prompt_text(reply, conversation.path(), kept) == prompt


# --- with the store -------------------------------------------------------------------------------------------------------------------


def file_size(path: Path, turns: int) -> int:
    """Of a chat's file, all its replies explained."""
    store = Store.open(path)
    conversation = store.create("me")
    current = replace(conversation, tip=None)
    for n in range(turns):
        current, asked = current.add("user", question(n))
        above = current.path()
        current, reply = current.add("assistant", "", state="running")
        store.add("me", conversation.id, (asked, reply), reply.id)
        recorder = Recorder()
        recorder.seen(Chunk(token_ids=tuple(range(60)), logprobs=tuple(TokenLogprob(0, "", -k / 7) for k in range(60))))
        explain.keep(store, "me", conversation.id, reply, above, chatml(above), recorder)
        current = grown(current, reply, answer(n))
        store.save(current[reply.id])
    last = current.path()[-1]
    found = explain.recall(store, "me", conversation.id, last, current.path())
    assert found and found.prompt == chatml(current.path()[:-1]) and len(found.tokens) == 60 and found.given == ()
    assert explain.recall(store, "me", conversation.id, current.path()[0], current.path()[:1]) is None
    with pytest.raises(NotFound):
        explain.recall(store, "somebody else", conversation.id, last, current.path())
    store.close()
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


def test_the_file_of_a_chat_of_200_turns_grows_linearly(tmp_path):
    empty, half, whole = (file_size(tmp_path / f"{turns}.sqlite3", turns) for turns in (1, 100, 200))
    assert (whole - empty) / (half - empty) < 2.15


# --- other tokens ---------------------------------------------------------------------------------------------------------------------


def test_alternatives_are_the_likeliest_first():
    echo = EchoBackend(words("Hello there"))
    found = explain.alternatives(echo, echo.encode("Say something"), count=5)
    assert len(found) == 5 and [a.probability for a in found] == sorted((a.probability for a in found), reverse=True)
    assert all(0 < a.probability < 1 and a.text == chr(a.id) for a in found) and sum(a.probability for a in found) <= 1


def test_alternatives_ask_for_one_token_before_samplers():
    class Asked(EchoBackend):
        def generate(self, request: GenerationRequest):
            self.request = request
            return super().generate(request)

    echo = Asked(words("Hello"))
    adapter = Adapter(Path("a.gguf"), 0.5)
    explain.alternatives(echo, [65, 66], count=10**6, adapters=(adapter,), client="me")
    asked = echo.request
    assert (asked.prompt, asked.max_new_tokens, asked.logprobs, asked.adapters, asked.client) == (
        (65, 66),
        1,
        explain.MAX_ALTERNATIVES,
        (adapter,),
        "me",
    )
    assert asked.sampling.differences().keys() == SamplingParams().replace({**asked.sampling.model_dump()}).differences().keys()
    assert asked.sampling.ban_eos_token and asked.sampling.temperature == 0


def test_alternatives_cancelled_or_not_to_be_had():
    cancel = CancelToken()
    cancel.cancel()
    assert explain.alternatives(EchoBackend(words("Hello")), [65], cancel=cancel) == []
    plain = EchoBackend(words("Hello"))
    plain.features = frozenset({"generate"})
    with pytest.raises(ModelError, match="another"):
        explain.alternatives(plain, [65])


def test_before_a_token_and_on_from_another():
    tokens = [Token(65, -0.1, True), Token(66, -0.2), Token(67, None)]
    assert before([1, 2], tokens, 0) == (1, 2) and before([1, 2], tokens, 2) == (1, 2, 65, 66)
    for position in (-1, 3, 10**9):
        with pytest.raises(NotFound, match="3 tokens"):
            before([1], tokens, position)
        with pytest.raises(NotFound):
            resumed(EchoBackend(words("")), tokens, position, 65)
    echo = EchoBackend(words(""))
    said = resumed(echo, tokens, 2, 90)
    assert said == (Token(65, -0.1, True), Token(66, -0.2, True), Token(90, None, True))
    recorder = Recorder(said)
    recorder.seen(Chunk("x", (120,), logprobs=(TokenLogprob(120, "", -0.5),)))
    assert [t.given for t in unpack(recorder.packed())] == [True, True, True, False]
    for token in (256, -1, 2**40):
        with pytest.raises(PromptError):
            resumed(echo, tokens, 1, token)
    echo.eos_token = "Z"
    for ends in ((), ("Y",)):
        with pytest.raises(PromptError, match="ends the reply"):
            resumed(echo, tokens, 1, 90 if not ends else 89, ends)


# --- asking again ---------------------------------------------------------------------------------------------------------------------

DETAILS = {
    "model": "fox",
    "model_hash": "aa",
    "seed": 42,
    "parameters": {"temperature": 0.5, "max_new_tokens": 99, "auto_max_new_tokens": False, "sampler_priority": ["top_k", "temperature"]},
    "stop": ["\nYou:"],
    "adapters": [["tail.gguf", 0.5]],
}


class Adapting(EchoBackend):
    def __init__(self) -> None:
        super().__init__(words(""), context_length=100)
        self.features |= {"adapters"}


def test_the_request_again():
    adapters = (Adapter(Path("tail.gguf"), 0.5),)
    asked = request_again(DETAILS, [1, 2, 3], adapters, "me")
    sampling = SamplingParams(temperature=0.5, max_new_tokens=99, auto_max_new_tokens=False, sampler_priority=("top_k", "temperature"))
    assert asked == GenerationRequest((1, 2, 3), sampling, 99, 42, ("\nYou:",), adapters=adapters, chosen_logprob=True, client="me")
    assert request_again({"parameters": {"auto_max_new_tokens": True, "of_a_later_version": 1}}, [1]).max_new_tokens is None
    with pytest.raises(SettingsError):
        request_again({"parameters": {"temperature": "warm"}}, [1])


def test_why_it_would_not_be_the_same():
    def why(details=DETAILS, length=50, backend=None, model="fox", model_hash="aa", adapters=("tail.gguf",)):
        return differences(details, length, backend or Adapting(), model, model_hash, adapters)

    assert why() == [] == why(model="renamed fox") == why(model_hash=None) == why(details={**DETAILS, "model_hash": None}, length=100)
    (changed,) = why(model_hash="bb")
    assert "fox" in changed and "not the same" in changed
    for other in (why(model="hen", model_hash="bb"), why(model="hen", model_hash=None), why(details={**DETAILS, "model_hash": None}, model="hen")):
        assert len(other) == 1 and "fox" in other[0] and "hen" in other[0]
    (missing,) = why(adapters=())
    assert "tail.gguf" in missing
    (unable,) = why(backend=EchoBackend(words(""), context_length=100))
    assert "tail.gguf" in unable and "cannot use" in unable
    (small,) = why(length=101)
    assert "101" in small and "100" in small
    (unknown,) = why(details={**DETAILS, "parameters": {"warmth": 1}})
    assert "warmth" in unknown
    assert len(why(details={}, model="hen")) == 1 and "another model" in why(details={}, model="hen")[0]
