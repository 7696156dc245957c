"""The openai_server backend against servers that do as they are told: what is sent, what is made of the answers, and what goes wrong."""

from __future__ import annotations

import json
import threading
import time
from unittest import mock

import pytest

from modules import app, loaders, settings
from modules import chat as page
from modules.auth import Identity
from modules.backends.base import CancelToken, GenerationRequest
from modules.backends.openai_server import LOADER, models
from modules.backends.openai_server.options import key_of
from modules.backends.openai_server.payload import CHAT_TEMPLATE, MARK, SAMPLERS, chat, sampling
from modules.backends.openai_server.probe import Estimate
from modules.errors import Busy, EngineDied, ModelError, NotFound, PromptError, PromptTooLong, SettingsError, UserError
from modules.paths import UserData
from modules.revisit import explained
from modules.samplers import NEUTRAL, SamplingParams
from modules.store import Store
from modules.streams import ReplyStream
from modules.templates import ChatTemplate, PromptMessage
from modules.tool_calls import ToolStream
from tests.backends.llama_cpp_help import Task, load, text_of
from tests.backends.remote_help import connect, our_api, told_server
from tests.fakes import WAIT, FakeEngine, PlainPresenter, until

KEY = "sk-very-secret"
PIECE, END = {"choices": [{"text": "word "}]}, {"choices": [{"text": "", "finish_reason": "stop"}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 3}}
WHOLE = [PIECE, PIECE, END, USAGE, "[DONE]"]


def listing(*names, **more):
    return 200, {"object": "list", "data": [{"id": name, "object": "model", **more} for name in names]}


def completing(events, tried=(200, {"choices": [{"text": "x"}]})):
    """The route of completions: `tried` for what is tried at the load, then `events`."""
    return lambda body: (200, events) if body.get("stream") and isinstance(events, list) else events if body.get("stream") else tried


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setenv("OPENAI_SERVER_KEY", KEY)
    with told_server() as made:
        made.routes[("GET", "/v1/models")] = listing("first", "second")
        made.routes[("POST", "/v1/completions")] = completing(WHOLE)
        yield made


@pytest.fixture
def use(told):
    """Connects; what is connected is unloaded in the end."""
    made = []

    def connected(model="", **values):
        made.append(connect(told.url, model, **{"server_context": 1000, **values}))
        return made[-1]

    yield connected
    for backend in made:
        backend.unload()


def run(backend, prompt="Hello", **values):
    return list(backend.generate(GenerationRequest(prompt, **{"sampling": NEUTRAL, "max_new_tokens": 9, **values})))


# --- what is sent and what comes --------------------------------------------------------------------------------------------------------


def test_a_reply_with_its_counts(use, told):
    chunks = run(backend := use("second"))
    assert backend.name == "second" and backend.features == {"generate", "parallel", "text-only", "estimate"} and backend.chat_template is None
    assert text_of(chunks) == "word word " and chunks[-1].finish_reason == "stop" and chunks[-1].prompt_tokens == 3
    assert [chunk.completion_tokens for chunk in chunks] == [0, 1, 2, 2]
    body = told.bodies("/v1/completions")[-1]
    assert (body["model"], body["prompt"], body["max_tokens"], body["stream"]) == ("second", "Hello", 9, True)
    assert body["stream_options"] == {"include_usage": True}
    assert all(headers["authorization"] == f"Bearer {KEY}" for *_, headers in told.asked)


def test_only_the_parameters_that_a_server_knows():
    params = SamplingParams(temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.2, custom_token_bans="5", ban_eos_token=True)
    request = GenerationRequest("", params, seed=2**32 - 1, logit_bias=((3, float("-inf")), (4, 1.5)))
    common = {"temperature": 0.5, "top_p": 0.9, "frequency_penalty": 0.0, "presence_penalty": 0.0, "seed": 2**31 - 1, "stream": True}
    common |= {"stream_options": {"include_usage": True}, "logit_bias": {"3": -100.0, "4": 1.5, "5": -100.0}}
    assert sampling(request, "unknown") == {**common, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2}
    assert sampling(GenerationRequest("", NEUTRAL), "unknown").keys() == common.keys() - {"logit_bias"}
    assert sampling(request, "vllm").items() >= {**common, "ignore_eos": True, "top_k": 7, "repetition_penalty": 1.2}.items()
    llama = sampling(GenerationRequest("", NEUTRAL), "llama.cpp")
    assert (llama["top_k"], llama["min_p"], llama["repeat_penalty"], llama["dynatemp_range"], llama["mirostat"]) == (0, 0, 1, 0, 0)
    warm = NEUTRAL.replace({"dynamic_temperature": True, "dynatemp_low": 0.5, "dynatemp_high": 1.5, "repetition_penalty_range": 0})
    llama = sampling(GenerationRequest("", warm), "llama.cpp")
    assert (llama["temperature"], llama["dynatemp_range"], llama["repeat_last_n"]) == (1.0, 0.5, -1)
    ours = sampling(request, "ours")
    assert ours["ban_eos_token"] is True and ours["repetition_penalty"] == 1.2 and "max_new_tokens" not in ours
    assert sampling(GenerationRequest("", NEUTRAL.replace({"do_sample": False})), "vllm")["temperature"] == 0
    assert set(SamplingParams.model_fields) >= SAMPLERS


def test_grammars_go_to_servers_that_enforce_them():
    asked = GenerationRequest("", NEUTRAL.replace({"grammar_string": 'root ::= "a"'}))
    schema = GenerationRequest("", NEUTRAL, json_schema='{"type": "object"}')
    assert sampling(asked, "vllm")["structured_outputs"] == {"grammar": 'root ::= "a"'} and sampling(asked, "llama.cpp")["grammar"] == 'root ::= "a"'
    assert sampling(schema, "vllm")["structured_outputs"] == {"json": {"type": "object"}}
    assert sampling(schema, "llama.cpp")["json_schema"] == {"type": "object"}


def test_estimates_are_numbers_that_hold_their_text():
    for text in ("", "a", "ab", "abc", "Hello there", "naïve 文字 🦊"):
        tokens = Estimate().encode(text)
        assert Estimate().decode(tokens) == text and len(tokens) == -(-len(text.encode()) // 3)
    for wrong in (0, 5, -1, 2**40, 4 << 24, 1 << 24 | 0xFFFF):
        with pytest.raises(PromptError):
            Estimate().decode([wrong])


def test_a_llama_server_is_asked_for_its_template_and_tokens(use, told):
    settings = {"default_generation_settings": {"n_ctx": 77}, "chat_template": "{{ messages }}", "bos_token": "<s>", "eos_token": "</s>"}
    told.routes |= {
        ("GET", "/v1/models"): listing("m.gguf", owned_by="llamacpp"),
        ("GET", "/props"): (200, settings),
        ("POST", "/tokenize"): lambda body: (200, {"tokens": [1] * body["add_special"] + [ord(c) for c in body["content"]]}),
        ("POST", "/detokenize"): lambda body: (200, {"content": "".join(map(chr, body["tokens"]))}),
    }
    backend = use(server_context=0)
    assert (backend.context_length, backend.chat_template, backend.bos_token, backend.eos_token) == (77, "{{ messages }}", "<s>", "</s>")
    assert backend.features == {"generate", "parallel", "text-only", "grammar"}
    assert backend.encode("ab", add_bos=True) == [1, 97, 98] and backend.encode("ab") == [97, 98] and backend.decode([97, 98]) == "ab"
    assert backend.encode("\x01b", add_bos=True) == [1, 98]  # never doubled
    run(backend, "ab")
    assert told.bodies("/v1/completions")[-1]["prompt"] == [1, 97, 98]
    run(backend, "ab", sampling=NEUTRAL.replace({"add_bos_token": False}))
    assert told.bodies("/v1/completions")[-1]["prompt"] == [97, 98]
    with pytest.raises(PromptTooLong, match=r"101 tokens.*77"):
        run(backend, "x" * 100)


def test_vllm_is_asked_in_its_own_words(use, told):
    told.routes |= {
        ("GET", "/v1/models"): listing("m", owned_by="vllm", max_model_len=99),
        ("POST", "/tokenize"): lambda body: (200, {"tokens": [ord(c) for c in body["prompt"]]}) if body["model"] == "m" else (404, {}),
        ("POST", "/detokenize"): lambda body: (200, {"prompt": "".join(map(chr, body["tokens"]))}),
        ("POST", "/v1/chat/completions"): (400, {"error": {"message": "no messages"}}),
    }
    backend = use(server_context=0)
    assert backend.context_length == 99 and "estimate" not in backend.features and backend.chat_template == CHAT_TEMPLATE
    run(backend, "ab", max_new_tokens=None)
    assert told.bodies("/v1/completions")[-1]["prompt"] == [97, 98] and told.bodies("/v1/completions")[-1]["max_tokens"] == 97


def test_a_tokenizer_that_does_not_work_is_done_without(use, told):
    told.routes[("GET", "/v1/models")] = listing("m", owned_by="vllm")
    assert "estimate" in use().features  # there is no /tokenize, as behind a router


def test_the_models_of_a_server(use, told):
    assert use().name == "first"
    with pytest.raises(ModelError, match=r"third.*first, second"):
        use("third")
    options = LOADER.options.build({"server_url": told.url})
    assert models(options) == ["openai:first", "openai:second"] == models(options)
    assert len([path for _, path, *_ in told.asked if path == "/v1/models"]) == 3  # the second list was kept
    assert models(LOADER.options()) == []
    told.routes[("GET", "/v1/models")] = listing("unknown")
    assert use("any/name").name == "any/name"  # a router
    told.routes[("GET", "/v1/models")] = listing()
    with pytest.raises(ModelError, match="lists no models"):
        use()


# --- chats ------------------------------------------------------------------------------------------------------------------------------

TURNS = (PromptMessage("system", 'Be "kind"\n'), PromptMessage("user", "Hi <|chat|> {{x}}"))


def test_messages_come_through_the_template_as_they_are():
    template = ChatTemplate(CHAT_TEMPLATE)
    sent = [{"role": turn.role, "content": turn.content} for turn in TURNS]
    assert chat(template.render(TURNS), "unknown") == {"messages": sent} and template.takes_system
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "function": {"name": "look", "arguments": {"at": "sky"}}}]}
    messages = [*sent, call, {"role": "tool", "tool_call_id": "c1", "content": "blue"}]
    found = chat(template.render(messages, tools=[tool]), "unknown")
    assert found["tools"] == [tool] and found["messages"][3] == messages[3]
    function = {"name": "look", "arguments": '{"at": "sky"}'}
    assert found["messages"][2] == {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "type": "function", "function": function}]}
    assert chat("Once upon a time", "unknown") is None
    for broken in (MARK, MARK + "[]", MARK + '{"messages": []}', MARK + '{"messages": [1]}', MARK + "{" * 100_000):
        with pytest.raises(PromptError):
            chat(broken, "unknown")


@pytest.mark.parametrize("said", ['He said "no', "two\nlines", "naïve 🦊 \\", "", '"}]}'])
def test_a_reply_that_goes_on_is_the_last_message(said):
    template = ChatTemplate(CHAT_TEMPLATE)
    begun = {"role": "assistant", "content": said}
    found = chat(template.render([*TURNS, begun], continue_last=True), "vllm")
    assert found["messages"][-1] == begun and found["continue_final_message"] is True
    if said:
        assert chat(template.render(TURNS) + said, "ours")["messages"][-1] == begun


def deltas(*some):
    return [*({"choices": [{"delta": delta}]} for delta in some), {"choices": [{"delta": {}, "finish_reason": "stop"}]}, "[DONE]"]


def test_a_server_that_only_chats(use, told):
    del told.routes[("POST", "/v1/completions")]
    events = deltas({"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": "lo"})
    told.routes[("POST", "/v1/chat/completions")] = lambda body: (200, events) if body.get("stream") else (400, {})
    backend = use()
    prompt = ChatTemplate(backend.chat_template).render(TURNS)
    chunks = run(backend, prompt, max_new_tokens=None)
    assert text_of(chunks) == "Hello" and chunks[-1].finish_reason == "stop"
    body = told.bodies("/v1/chat/completions")[-1]
    assert body["messages"][1]["content"] == TURNS[1].content and "max_tokens" not in body and "prompt" not in body
    assert text_of(run(backend, tuple(backend.encode(prompt)))) == "Hello"
    with pytest.raises(PromptError, match="can only chat"):
        run(backend, "Once upon a time")
    del told.routes[("POST", "/v1/chat/completions")]
    with pytest.raises(ModelError, match="neither"):
        use()


def test_thinking_and_calls_are_told_as_in_a_stream_of_text(use, told):
    call = {"index": 0, "id": "c1", "function": {"name": "look", "arguments": '{"at": '}}
    events = deltas({"reasoning_content": "Hm, "}, {"reasoning": "well."}, {"content": "So "}, {"content": "be it."}, {"tool_calls": [call]},
                    {"tool_calls": [{"index": 0, "function": {"arguments": '"sky"}'}}]})  # fmt: skip
    told.routes[("POST", "/v1/chat/completions")] = lambda body: (200, events) if body.get("stream") else (400, {})
    backend = use()
    text = text_of(run(backend, ChatTemplate(backend.chat_template).render(TURNS)))
    reply = ReplyStream()
    split = [*reply.feed(text), *reply.finish()]
    assert "".join(delta.reasoning for delta in split) == "Hm, well."
    tools = ToolStream(["look"], backend.chat_template)
    told_calls = [delta for piece in split if piece.text for delta in tools.feed(piece.text)] + list(tools.finish())
    assert "".join(delta.text for delta in told_calls).strip() == "So be it."
    assert [(delta.call.name, json.loads(delta.call.arguments)) for delta in told_calls if delta.call] == [("look", {"at": "sky"})]


def test_a_turn_of_the_page_over_a_server_that_keeps_its_template(use, told, tmp_path):
    """Nothing on the way needs token ids: the reply is saved, counted and explained without them."""
    events = deltas({"content": "Hel"}, {"content": "lo"})
    told.routes[("POST", "/v1/chat/completions")] = lambda body: (200, events) if body.get("stream") else (400, {})
    engine = FakeEngine(use)
    data = UserData(tmp_path)
    data.create()
    (data.models / "model.fake").touch()
    with mock.patch.object(loaders, "LOADERS", (engine.loader,)):
        built = app.build(settings.load((), (), (), app.option_groups()), data, Store.open(data.database), PlainPresenter)
        built.models.load(built.models.choose("model.fake"))
        me = Identity("me", "session")
        turn = page.reply(built, me, None, "Hi there")
        until(lambda: not built.replies.running(turn.conversation.id))
        _, said = built.store.conversation("me", turn.conversation.id).path()
        assert (said.text, said.state) == ("Hello", "done")
        assert told.bodies("/v1/chat/completions")[-1]["messages"][-1] == {"role": "user", "content": "Hi there"}
        assert explained(built, me, turn.conversation.id, said.id)["prompt"]
        built.close()


# --- what goes wrong --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        ((401, {"error": "Unauthorized"}), ModelError, "OPENAI_SERVER_KEY"),
        ((404, {"error": {"message": f"no model for {KEY}"}}), NotFound, "does not know the model 'first'"),
        ((429, {"error": {"message": "slow down"}}, {"Retry-After": "7"}), Busy, "slow down"),
        ((503, b"no"), Busy, "no place"),
        ((500, b"oops"), EngineDied, "500"),
        ((400, {"error": {"message": "exceeds the maximum context length"}}), PromptTooLong, "context"),
        ((422, {"detail": [{"msg": "bad top_k"}]}), ModelError, "bad top_k"),
        ((302, b"", {"Location": "http://127.0.0.1:1/"}), ModelError, "not followed"),
        ([{"error": {"message": f"gone {KEY}"}}], EngineDied, "broke off"),
        ([PIECE, PIECE], EngineDied, "without saying why"),
        ([PIECE, "[DONE]"], EngineDied, "without saying why"),
        ([b"data: {broken\n\n"], EngineDied, "cannot be read"),
        ([b"data: " + b"x" * 1000] * 9000, EngineDied, "too long"),
    ],
)
def test_errors_say_what_to_do_and_never_the_key(use, told, caplog, answer, kind, words):
    backend = use()
    told.routes[("POST", "/v1/completions")] = completing(answer)
    with pytest.raises(kind, match=words) as raised:
        run(backend)
    assert KEY not in str(raised.value) + caplog.text
    if isinstance(raised.value, Busy) and words == "slow down":
        assert raised.value.retry_after == 7
    told.routes[("POST", "/v1/completions")] = completing(WHOLE)
    assert text_of(run(backend)) == "word word "  # the place is free again


@pytest.mark.parametrize(("status", "kind"), [(401, ModelError), (503, Busy), (500, EngineDied)])
def test_a_load_that_is_refused(use, told, status, kind):
    told.routes[("GET", "/v1/models")] = (status, {})
    with pytest.raises(kind):
        use()
    told.routes[("GET", "/v1/models")] = listing("m")
    told.routes[("POST", "/v1/completions")] = (status, {})
    with pytest.raises(kind):
        use()


def test_nobody_there(told):
    with told_server() as gone:
        url = gone.url
    with pytest.raises(EngineDied, match="no connection"):
        connect(url)
    for wrong in ("", "ftp://127.0.0.1", "http://u:p@127.0.0.1", "127.0.0.1:80"):
        with pytest.raises(UserError):
            connect(wrong)
    assert models(LOADER.options.build({"server_url": url})) == []


def test_a_server_that_stalls_has_a_time_limit(use, told):
    backend, never = use(server_timeout=1), threading.Event()
    told.routes[("POST", "/v1/completions")] = completing([PIECE, lambda: never.wait(WAIT) or b""])
    began = time.monotonic()
    with pytest.raises(EngineDied, match="in time"):
        run(backend)
    assert time.monotonic() - began < WAIT / 2
    never.set()


def test_cancel_closes_the_connection(use, told):
    backend, token = use(), CancelToken()
    told.routes[("POST", "/v1/completions")] = completing([PIECE, *[lambda: (told.gone.wait(0.01) and b"") or PIECE] * 5000])
    chunks = []
    for chunk in backend.generate(GenerationRequest("Hello", NEUTRAL, cancel=token)):
        chunks.append(chunk)
        if chunk.completion_tokens == 3:
            token.cancel()
    assert chunks[-1].finish_reason == "cancelled" and chunks[-1].completion_tokens < 100
    assert told.gone.wait(WAIT)


def test_cancel_while_the_server_says_nothing_yet(use, told):
    backend, token, asked, never = use(), CancelToken(), threading.Event(), threading.Event()

    def silent(body):
        asked.set()
        never.wait(WAIT)
        return 200, WHOLE

    told.routes[("POST", "/v1/completions")] = silent
    reply = Task(run, backend, cancel=token)
    assert asked.wait(WAIT)
    token.cancel()
    assert reply.result(WAIT / 2)[-1].finish_reason == "cancelled"
    never.set()


def test_so_many_at_once_so_many_waiting_and_no_more(use, told):
    backend, going, started = use(server_parallel=1, server_queue=1), threading.Event(), threading.Semaphore(0)

    def slow(body):
        started.release()
        going.wait(WAIT)
        return 200, WHOLE

    told.routes[("POST", "/v1/completions")] = slow
    first = Task(run, backend)
    assert started.acquire(timeout=WAIT)
    token = CancelToken()
    second = Task(run, backend, cancel=token)
    while not backend._waiting:
        time.sleep(0.005)
    with pytest.raises(Busy):
        run(backend)
    token.cancel()
    assert second.result(WAIT)[-1].finish_reason == "cancelled"
    going.set()
    assert text_of(first.result(WAIT)) == "word word " and not started.acquire(blocking=False)


def test_a_load_can_be_cancelled(told):
    token, asked, never = CancelToken(), threading.Event(), threading.Event()

    def silent(body):
        asked.set()
        never.wait(WAIT)
        return listing("m")

    told.routes[("GET", "/v1/models")] = silent
    loading = Task(connect, told.url, cancel=token)
    assert asked.wait(WAIT)
    token.cancel()
    with pytest.raises(ModelError, match="cancelled"):
        loading.result(WAIT / 2)
    never.set()


# --- the key ----------------------------------------------------------------------------------------------------------------------------


def test_where_the_key_comes_from(tmp_path):
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    assert key_of({}) == "" and key_of({"OPENAI_SERVER_KEY": KEY}) == KEY == key_of({"OPENAI_SERVER_KEY_FILE": str(file)})
    for wrong in ({"OPENAI_SERVER_KEY": "a b"}, {"OPENAI_SERVER_KEY": "a\nb: c"}, {"OPENAI_SERVER_KEY_FILE": str(tmp_path)}):
        with pytest.raises(SettingsError) as raised:
            key_of(wrong)
        assert KEY not in str(raised.value)


def test_no_option_holds_the_key(use):
    backend = use()
    assert not [name for name in LOADER.options.knobs() if "key" in name]
    assert KEY not in backend.name and KEY not in repr(backend._options) + repr(backend._server)


# --- our own API, with the real engine --------------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_the_same_model_here_and_behind_our_api(starter_model, tmp_path):
    made = []
    with our_api(lambda: made.append(load(starter_model, ctx_size=512)) or made[-1], tmp_path) as url:
        there, here = connect(url), made[0]
        try:
            text = "Once upon a time, naïve 文字"
            assert there.context_length == 512 and there.encode(text, True) == here.encode(text, True) and "estimate" not in there.features
            for params in (NEUTRAL.replace({"temperature": 0}), NEUTRAL.replace({"temperature": 0.8, "top_k": 20})):
                ours, theirs = (run(backend, text, sampling=params, seed=5, max_new_tokens=12) for backend in (here, there))
                assert text_of(ours) == text_of(theirs) and ours[-1].prompt_tokens == theirs[-1].prompt_tokens
            chunks = run(there, ChatTemplate(there.chat_template).render([PromptMessage("user", "Say hello.")]), sampling=params, max_new_tokens=12)
            assert text_of(chunks) and chunks[-1].completion_tokens > 1
        finally:
            there.unload()
