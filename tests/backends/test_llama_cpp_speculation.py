"""Guessing ahead: the lookup by hand, and on the real engine the same text as without, whoever guesses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from modules.backends.llama_cpp.client import LlamaCppBackend
from modules.backends.llama_cpp.speculation import NgramLookup
from modules.errors import ModelError
from modules.samplers import NEUTRAL
from tests.backends.llama_cpp_help import (
    ENDLESS,
    GREEDY,
    NEAR_IN_STARTER,
    Stream,
    Task,
    dice,
    differ,
    load,
    logprobs_of,
    request,
    run,
    text_of,
    tokens_of,
    wait_for,
)

pytest.importorskip("gguf")

from tests.backends import tiny_models

real_engine = pytest.mark.engine


class Text:
    """What the lookup sees of a job."""

    def __init__(self, tokens: list[int], id: int = 1) -> None:
        self.id = id
        self.tokens = np.array(tokens, np.int32)
        self.drafted = self.accepted = 0


def guess(lookup: NgramLookup, job: Text, most: int = 100) -> list[int]:
    return lookup.guess([job], {job.id: most}).get(job.id, [])


# --- the lookup ---------------------------------------------------------------------------------------------------------------------


def test_what_came_after_the_same_tokens_is_guessed():
    assert guess(NgramLookup(2, 4), Text([1, 2, 3, 4, 5, 6, 7, 1, 2])) == [3, 4, 5, 6]
    assert guess(NgramLookup(2, 4), Text([1, 2, 3, 4, 5, 6, 7, 1, 9])) == []
    assert guess(NgramLookup(3, 4), Text([1, 2, 3, 4, 5, 6, 7, 1, 2])) == []


def test_the_newest_place_counts():
    assert guess(NgramLookup(1, 2), Text([7, 1, 1, 7, 2, 2, 7, 3, 3, 7])) == [3, 3]


def test_a_guess_ends_where_the_text_ends():
    assert guess(NgramLookup(2, 10), Text([1, 2, 3, 1, 2])) == [3, 1, 2]
    assert guess(NgramLookup(1, 10), Text([5, 5])) == [5]


def test_limits_of_the_lookup():
    text = Text([1, 2, 3, 4, 5, 6, 7, 1, 2])
    assert guess(NgramLookup(2, 4), text, most=2) == [3, 4]
    assert guess(NgramLookup(2, 4), text, most=0) == [] == guess(NgramLookup(2, 4), text, most=-1)
    assert guess(NgramLookup(2, 1), text) == [3]
    for tokens in ([], [1], [1, 2]):
        assert guess(NgramLookup(2, 4), Text(tokens)) == []


def test_hits_are_counted():
    text = Text([1, 2, 3, 9, 1, 2, 3, 8, 1, 2])
    assert guess(NgramLookup(2, 1, min_hits=2), text) == [3]
    assert guess(NgramLookup(2, 1, min_hits=3), text) == []


def test_right_guesses_grow_and_wrong_ones_shrink():
    lookup, text = NgramLookup(1, 64), Text([*range(100), 0])
    lengths = []
    for accepted in (1.0, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 1.0):
        found = len(guess(lookup, text))
        lengths.append(found)
        text.drafted += found
        text.accepted += int(found * accepted)
    assert lengths == [8, 16, 32, 64, 64, 32, 16, 8, 4, 2]
    assert len(guess(lookup, text)) == 4
    lookup.forget(text)
    assert len(guess(lookup, Text([*range(100), 0]))) == 8


def test_many_jobs_are_told_apart():
    jobs = [Text([1, 2, 3, 1], 1), Text([4, 5, 6, 4], 2), Text([7, 8, 9], 3)]
    assert NgramLookup(1, 2).guess(jobs, {1: 2, 2: 1, 3: 5}) == {1: [2, 3], 2: [5]}


# --- the real engine ----------------------------------------------------------------------------------------------------------------

PROMPTS = ["hello water name why " * 12, "one two three " * 20, "user is to system of", "why " * 3]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("models")

    def make(kind: str, **values) -> Path:
        path = folder / f"{kind}{values.get('seed', '')}.gguf"
        return path if path.exists() else getattr(tiny_models, kind)(path, **values)

    return make


@pytest.fixture(scope="module")
def plain(tiny: Callable[..., Path]) -> Iterator[LlamaCppBackend]:
    made = load(tiny("dense"), ctx_size=512)
    yield made
    made.unload()


GUESSERS = {
    "lookup": {"spec_type": "ngram-simple", "spec_ngram_size_n": 3, "spec_ngram_size_m": 16},
    "lookup of one": {"spec_type": "ngram-mod", "spec_ngram_size_n": 1},
    "itself": {"model_draft": "dense", "draft_max": 5},
    "another": {"model_draft": "dense2", "draft_max": 4},
    "a short one": {"model_draft": "dense", "draft_max": 5, "ctx_size_draft": 256},
}


@pytest.fixture(scope="module", params=GUESSERS)
def guessing(request: pytest.FixtureRequest, tiny: Callable[..., Path]) -> Iterator[LlamaCppBackend]:
    values = dict(GUESSERS[request.param])
    if "model_draft" in values:
        values["model_draft"] = str(tiny("dense", seed=2) if values["model_draft"] == "dense2" else tiny("dense"))
    made = load(tiny("dense"), ctx_size=512, **values)
    made.guesser = request.param
    yield made
    made.unload()


@real_engine
def test_the_text_is_the_same_as_without(plain, guessing):
    wanted = [run(plain, prompt, ENDLESS, max_new_tokens=120, logprobs=2) for prompt in PROMPTS]
    got = [run(guessing, prompt, ENDLESS, max_new_tokens=120) for prompt in PROMPTS]
    assert not [fault for pair in zip(wanted, got, strict=True) if (fault := differ(*pair))]
    at_once = [task.result() for task in [Task(run, guessing, prompt, ENDLESS, max_new_tokens=120) for prompt in PROMPTS]]
    assert not [fault for pair in zip(wanted, at_once, strict=True) if (fault := differ(*pair))]
    drafted, accepted = (sum(getattr(chunks[-1].timings, name) for chunks in got) for name in ("draft_tokens", "accepted_tokens"))
    assert drafted > 0 and 0 <= accepted <= drafted
    share = accepted / drafted
    assert share > 0.9 if guessing.guesser == "itself" else share < 0.5 if guessing.guesser == "another" else accepted > 0
    wait_for(lambda: guessing.stats().finished.get("length") == 2 * len(PROMPTS))
    stats = guessing.stats()
    assert stats.draft_tokens >= drafted and stats.accepted_tokens >= accepted


@real_engine
def test_limits_stops_and_ends_are_exact(plain, guessing):
    for limit in (0, 1, 2, 3, 7, 50):
        chunks = run(guessing, PROMPTS[0], ENDLESS, max_new_tokens=limit)
        assert chunks[-1].completion_tokens == limit == len(tokens_of(chunks)) and chunks[-1].finish_reason == "length"
    for bias in (8.0, 9.0, 10.0, 11.0, 12.0):  # the end comes sooner or later, inside a guess or not
        ending = ((tiny_models.EOS, bias), (tiny_models.IM_END, bias - 1))
        wanted = run(plain, PROMPTS[1], GREEDY, max_new_tokens=200, logit_bias=ending, logprobs=2)
        got = run(guessing, PROMPTS[1], GREEDY, max_new_tokens=200, logit_bias=ending)
        assert not differ(wanted, got)
        if tokens_of(got) == tokens_of(wanted):
            assert got[-1].finish_reason == wanted[-1].finish_reason
            assert got[-1].completion_tokens == len(tokens_of(got))


@real_engine
def test_probabilities_are_of_the_model_not_of_the_guesser(plain, guessing):
    wanted = run(plain, PROMPTS[0], ENDLESS, max_new_tokens=40, logprobs=3)
    got = run(guessing, PROMPTS[0], ENDLESS, max_new_tokens=40, logprobs=3, prompt_logprobs=0)
    assert not differ(wanted, got) and len(logprobs_of(got)) == len(tokens_of(got)) == 40
    assert [entry.token for entry in logprobs_of(got)] == tokens_of(got)
    for one, two in zip(logprobs_of(wanted), logprobs_of(got), strict=True):
        if one.token != two.token:
            break
        assert one.logprob == pytest.approx(two.logprob, abs=0.1)
    alone = run(guessing, PROMPTS[0], ENDLESS, max_new_tokens=40, chosen_logprob=True, prompt_logprobs=0)
    assert [entry.token for entry in logprobs_of(alone)] == tokens_of(alone) and len(tokens_of(alone)) == 40


@real_engine
def test_grammars_penalties_and_seeds_hold(plain, guessing):
    schema = json.dumps({"type": "array", "items": {"enum": ["one", "two"]}, "minItems": 6, "maxItems": 6})
    found = json.loads(text_of(run(guessing, PROMPTS[1], GREEDY, max_new_tokens=200, json_schema=schema)))
    assert len(found) == 6 and set(found) <= {"one", "two"}
    penalised = ENDLESS.replace({"repetition_penalty": 1.2, "dry_multiplier": 0.8, "presence_penalty": 0.3})
    wanted = run(plain, PROMPTS[0], penalised, max_new_tokens=60, logprobs=2)
    got = run(guessing, PROMPTS[0], penalised, max_new_tokens=60)
    place = next((n for n, (a, b) in enumerate(zip(tokens_of(wanted), tokens_of(got), strict=True)) if a != b), 60)
    assert place >= 5  # penalties make near ties that logprobs, of the model before them, do not show
    four = dice(guessing.encode("abcd"))
    drawn = [tokens_of(run(backend, PROMPTS[0], NEUTRAL, seed=seed, logit_bias=four)) for backend, seed in ((plain, 1), (guessing, 1), (guessing, 2))]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 4


@real_engine
def test_the_end_of_the_context_and_others_who_need_room(plain, guessing):
    streams = [Stream(guessing, request(f"{n} {PROMPTS[1]}", ENDLESS, max_new_tokens=150)) for n in range(4)]
    assert all(stream.result()[-1].completion_tokens == 150 for stream in streams)  # together more than the 512 cells
    full = guessing.encode("hello water " * 500)[:494]
    last = run(guessing, full, ENDLESS, max_new_tokens=None)[-1]
    assert last.finish_reason == "length" and 18 <= last.completion_tokens <= 19
    assert run(guessing, PROMPTS[3], ENDLESS, max_new_tokens=5)[-1].completion_tokens == 5


@real_engine
def test_cancel_inside_guesses(guessing):
    stream = Stream(guessing, request(PROMPTS[0], ENDLESS, max_new_tokens=None)).writes()
    last = stream.stop()[-1]
    assert last.finish_reason in ("cancelled", "length") and last.completion_tokens == len(tokens_of(stream.chunks))
    wait_for(lambda: guessing.stats().busy_sequences == 0)


@real_engine
def test_guessing_is_off_by_default(plain):
    timings = run(plain, PROMPTS[0], ENDLESS)[-1].timings
    assert timings.draft_tokens == timings.accepted_tokens == 0


@real_engine
@pytest.mark.parametrize("kind", ["sliding_window", "recurrent"])
def test_nothing_is_guessed_where_it_could_not_be_taken_back(tiny, kind, caplog):
    backend = load(tiny(kind), spec_type="ngram-simple", spec_ngram_size_n=1)
    try:
        timings = run(backend, PROMPTS[0], ENDLESS)[-1].timings
        assert timings.draft_tokens == 0 and "nothing is guessed ahead" in caplog.text
    finally:
        backend.unload()


@real_engine
def test_a_draft_that_does_not_fit_is_refused(tiny, starter_model):
    with pytest.raises(ModelError, match="another vocabulary"):
        load(tiny("dense"), model_draft=str(starter_model))
    with pytest.raises(ModelError, match="cannot be cut back"):
        load(tiny("dense"), model_draft=str(tiny("recurrent")))
    with pytest.raises(ModelError, match=r"embeddings|write"):
        load(tiny("dense"), model_draft=str(tiny("bert")))
    with pytest.raises(ModelError, match="no file"):
        load(tiny("dense"), model_draft="/nowhere/draft.gguf")


@real_engine
def test_the_starter_as_its_own_draft(starter_model):
    prompt = "The capital of France is Paris. The capital of Italy is"
    backend = load(starter_model, ctx_size=512)
    wanted = run(backend, prompt, logprobs=2, max_new_tokens=30)
    backend.unload()
    backend = load(starter_model, ctx_size=512, model_draft=str(starter_model), draft_max=4)
    try:
        got = run(backend, prompt, max_new_tokens=30)
        assert not differ(wanted, got, NEAR_IN_STARTER)
        assert got[-1].timings.accepted_tokens > 0.8 * got[-1].timings.draft_tokens > 0
    finally:
        backend.unload()
