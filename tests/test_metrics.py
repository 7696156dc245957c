"""What /metrics tells: names, types, values, and that no total ever goes back."""

import dataclasses
import logging
import threading
from contextlib import suppress

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_families
from prometheus_client.parser import text_string_to_metric_families as families

from modules import loaders, metrics
from modules.backends.base import Chunk, EngineStats, Timings
from modules.errors import Busy, ModelError
from modules.metrics import Metrics
from modules.models import ModelSlot
from modules.paths import UserData
from tests.fakes import WAIT, FakeBackend, FakeEngine, FakeOptions

OPEN = "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.3"
STATS = EngineStats(
    busy_sequences=3,
    parallel=4,
    waiting=5,
    max_queue=64,
    cells=8192,
    cells_used=2048,
    cached_sequences=6,
    spilled_sequences=7,
    spilled_bytes=700_000,
    memory_bytes=900_000,
    threads=2,
    prompt_tokens=1000,
    reused_tokens=3000,
    generated_tokens=500,
    draft_tokens=80,
    accepted_tokens=60,
    prefill_seconds=4.0,
    decode_seconds=25.0,
    queue_seconds=1.5,
    steps=250,
    cache_hits_cells=11,
    cache_hits_memory=12,
    cache_misses=13,
    evictions=14,
    preemptions=15,
    finished={"stop": 16, "error": 1},
    restarts=2,
)


@pytest.fixture
def engine(monkeypatch):
    engine = FakeEngine(lambda: FakeBackend(features=frozenset({"parallel", "stats"})))
    monkeypatch.setattr(loaders, "LOADERS", (engine.loader,))
    return engine


@pytest.fixture
def slot(engine, tmp_path):
    data = UserData(tmp_path)
    data.create()
    for name in ("a.fake", "b.fake"):
        (data.models / name).touch()
    slot = ModelSlot(data, {FakeOptions: FakeOptions()})
    yield slot
    slot.close()


@pytest.fixture
def told(slot):
    return Metrics(slot)


def load(slot, engine, name="a.fake", stats=STATS):
    slot.load(slot.choose(name))
    engine.loaded[-1].told = stats
    return engine.loaded[-1]


def samples(told: Metrics) -> dict[str, float]:
    """Values by name, or by name{label} with the label's value."""
    found = {}
    for family in families(told.render()[0].decode()):
        for sample in family.samples:
            labels = ",".join(sample.labels.values())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def counters(told: Metrics) -> dict[str, float]:
    return {name: value for name, value in samples(told).items() if name.partition("{")[0].endswith(("_total", "_bucket", "_count", "_sum"))}


# --- values ---------------------------------------------------------------------------------------------------------------------------


def test_the_figures_of_a_working_engine(told, slot, engine):
    load(slot, engine)
    found = samples(told)
    expected = {
        "tgw_requests_processing": 3,
        "tgw_parallel_sequences": 4,
        "tgw_requests_deferred": 5,
        "tgw_requests_deferred_limit": 64,
        "tgw_kv_cache_cells": 8192,
        "tgw_kv_cache_tokens": 2048,
        "tgw_kv_cache_usage_ratio": 0.25,
        "tgw_kv_cache_sequences": 6,
        "tgw_spilled_sequences": 7,
        "tgw_spilled_bytes": 700_000,
        "tgw_engine_resident_memory_bytes": 900_000,
        "tgw_engine_threads": 2,
        "tgw_prompt_tokens_total": 1000,
        "tgw_prompt_tokens_reused_total": 3000,
        "tgw_prompt_seconds_total": 4,
        "tgw_prompt_tokens_seconds": 250,
        "tgw_tokens_predicted_total": 500,
        "tgw_tokens_predicted_seconds_total": 25,
        "tgw_predicted_tokens_seconds": 20,
        "tgw_queue_seconds_total": 1.5,
        "tgw_n_decode_total": 250,
        "tgw_n_busy_slots_per_decode": 2,
        "tgw_spec_decode_num_draft_tokens_total": 80,
        "tgw_spec_decode_num_accepted_tokens_total": 60,
        "tgw_prompt_cache_lookups_total{cells}": 11,
        "tgw_prompt_cache_lookups_total{memory}": 12,
        "tgw_prompt_cache_lookups_total{miss}": 13,
        "tgw_kv_cache_evictions_total": 14,
        "tgw_preemptions_total": 15,
        "tgw_requests_finished_total{stop}": 16,
        "tgw_requests_finished_total{error}": 1,
        "tgw_engine_restarts_total": 2,
        "tgw_model_info{fake,a.fake}": 1,
    }
    assert {name: found.get(name) for name in expected} == expected


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(EngineStats)])
def test_no_figure_of_the_engine_is_forgotten(told, slot, engine, field):
    number = {"stop": 987_654} if field == "finished" else 987_654
    load(slot, engine, stats=dataclasses.replace(STATS, **{field: number}))
    assert 987_654 in samples(told).values()


def test_a_new_engine_that_has_done_nothing_divides_by_nothing(told, slot, engine):
    load(slot, engine, stats=EngineStats())
    found = samples(told)
    averages = "tgw_kv_cache_usage_ratio", "tgw_prompt_tokens_seconds", "tgw_predicted_tokens_seconds", "tgw_n_busy_slots_per_decode"
    assert [found[name] for name in averages] == [0, 0, 0, 0]
    assert found["tgw_prompt_tokens_total"] == 0


def test_without_a_model_the_server_alone_is_told(told):
    found = samples(told)
    assert found["tgw_uptime_seconds"] >= 0 and found["tgw_server_resident_memory_bytes"] > 1e6
    assert found["tgw_generations_running"] == 0 and found["tgw_generations_finished_total{stop}"] == 0
    engines = {each.name for each in metrics.ENGINE} | {"tgw_model_info", "tgw_engine_resident_memory_bytes"}
    assert engines.isdisjoint(name.partition("{")[0] for name in found)


def test_an_engine_that_tells_nothing_has_its_name_and_memory(told, slot, engine):
    engine.make = FakeBackend
    load(slot, engine)
    found = samples(told)
    assert found["tgw_model_info{fake,a.fake}"] == 1 and found["tgw_engine_resident_memory_bytes"] == 123
    assert {each.name for each in metrics.ENGINE}.isdisjoint(name.partition("{")[0] for name in found)


# --- form -----------------------------------------------------------------------------------------------------------------------------


def everything(slot, engine, told):
    load(slot, engine)
    with suppress(Busy), told.generation():
        raise Busy("Full.")


def test_the_older_text_is_what_is_declared(told, slot, engine):
    everything(slot, engine, told)
    body, kind = told.render("text/html,*/*;q=0.8")
    assert kind == "text/plain; version=0.0.4; charset=utf-8"
    found = {family.name: family for family in families(body.decode())}
    kinds = {each.name.removesuffix("_total"): "gauge" if each.kind == "info" else each.kind for each in metrics.declared()}
    assert {name: family.type for name, family in found.items()} == kinds
    for each in metrics.declared():
        assert f"# HELP {each.name} {each.help}\n" in body.decode()


def test_openmetrics_is_for_who_asks_and_names_the_units(told, slot, engine):
    everything(slot, engine, told)
    body, kind = told.render(OPEN)
    assert kind == "application/openmetrics-text; version=1.0.0; charset=utf-8" and body.endswith(b"# EOF\n")
    found = {family.name: family for family in open_families(body.decode())}
    for each in metrics.declared():
        family = found.pop(each.name.removesuffix("_total").removesuffix("_info"))
        assert (family.type, family.unit, family.documentation) == (each.kind, each.unit, each.help)
    assert found == {}


@pytest.mark.parametrize("accept", ["", "*/*", "text/plain;version=banana", ";;,=", "application/openmetrics-text;version=banana", "é" * 9000])
def test_no_accept_header_is_an_error(told, accept):
    body, kind = told.render(accept)
    assert b"tgw_uptime_seconds" in body and kind.startswith("application/openmetrics-text" if "openmetrics" in accept else "text/plain")


@pytest.mark.parametrize("each", list(metrics.declared()), ids=lambda each: each.name)
def test_names_say_type_and_unit(each):
    assert each.name.startswith("tgw_") and each.help.endswith(".") and "|" not in each.help
    assert each.name.endswith("_total") == (each.kind == "counter")
    plain = each.name.removesuffix("_total")
    assert each.unit in ("", "seconds", "bytes", "ratio") and plain.endswith(each.unit)
    speeds = {"tgw_prompt_tokens_seconds", "tgw_predicted_tokens_seconds"}  # tokens a second; llama.cpp's names
    assert bool(each.unit) == (plain.endswith(("_seconds", "_bytes", "_ratio")) and each.name not in speeds)


def test_each_metric_is_declared_once():
    names = [each.name for each in metrics.declared()]
    assert len(names) == len(set(names))
    assert all(f"| `{name}` |" in metrics.markdown_table() for name in names)


@pytest.mark.parametrize("accept", ["", OPEN])
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ('a"b.fake', 'a"b.fake'),
        ("a\nb.fake", "a\nb.fake"),
        ("a\\b\\n.fake", "a\\b\\n.fake"),
        ('"} 1\ntgw_evil 1\n#.fake', '"} 1\ntgw_evil 1\n#.fake'),
        ("日本 é\r\t\x01.fake", "日本 é\r\t\x01.fake"),
        ("\udcff.fake", "?.fake"),  # a file name that is not UTF-8
    ],
    ids=ascii,
)
def test_a_hostile_name_of_a_model_stays_a_label(told, slot, engine, name, shown, accept, caplog):
    caplog.set_level(logging.WARNING, "tgw")  # pytest-xdist cannot carry a captured line that is not UTF-8
    slot.load(dataclasses.replace(slot.choose("a.fake"), name=name))
    found = {family.name: family for family in (open_families if accept else families)(told.render(accept)[0].decode())}
    assert "tgw_evil" not in found
    (sample,) = found["tgw_model" if accept else "tgw_model_info"].samples
    assert sample.labels == {"model": shown, "loader": "fake"}


# --- totals never go back -------------------------------------------------------------------------------------------------------------


def test_totals_go_on_over_a_change_of_the_model(told, slot, engine):
    first = load(slot, engine)
    samples(told)
    first.told = dataclasses.replace(STATS, generated_tokens=600)  # since it was last asked
    load(slot, engine, "b.fake", EngineStats(generated_tokens=5, finished={"length": 2}))
    found = samples(told)
    assert found["tgw_tokens_predicted_total"] == 605 and found["tgw_prompt_tokens_total"] == 1000
    finished = [found[f"tgw_requests_finished_total{{{reason}}}"] for reason in ("stop", "error", "length")]
    assert finished == [16, 1, 2]
    assert found["tgw_predicted_tokens_seconds"] == 0 and found["tgw_requests_processing"] == 0  # of this model alone


def test_models_that_nobody_asked_about_count_too(told, slot, engine):
    for name in ("a.fake", "b.fake", "a.fake"):
        load(slot, engine, name, EngineStats(generated_tokens=7))
    assert samples(told)["tgw_tokens_predicted_total"] == 21


def test_unloaded_the_totals_stay_and_the_rest_goes(told, slot, engine):
    load(slot, engine)
    before = counters(told)
    slot.unload()
    assert counters(told) == before
    assert "tgw_requests_processing" not in samples(told) and "tgw_model_info{fake,a.fake}" not in samples(told)
    load(slot, engine, stats=EngineStats(generated_tokens=1))
    assert samples(told)["tgw_tokens_predicted_total"] == 501


def test_the_totals_stay_while_an_engine_without_stats_is_in_use(told, slot, engine):
    load(slot, engine)
    before = counters(told)
    engine.make = FakeBackend
    load(slot, engine, "b.fake")
    assert counters(told) == before and "tgw_requests_processing" not in samples(told)


def test_a_failed_load_brings_the_former_model_back_and_nothing_is_lost(told, slot, engine):
    load(slot, engine)
    engine.errors["b.fake"] = ModelError("No.")
    with pytest.raises(ModelError):
        slot.load(slot.choose("b.fake"))
    assert len(engine.loaded) == 2 and samples(told)["tgw_tokens_predicted_total"] == 500


def test_asking_is_no_use_of_the_model(told, slot, engine):
    backend = load(slot, engine)
    slot.unload_if_idle()  # no idle time: at once
    assert backend.unloaded
    assert samples(told)["tgw_tokens_predicted_total"] == 500 and slot.stats() is None
    assert len(engine.loaded) == 1


# --- generations ----------------------------------------------------------------------------------------------------------------------


def generate(told, chunks, close_after=None):
    """As text_generation does it."""

    def generating():
        with told.generation() as measure:
            measure.admitted()
            for chunk in chunks:
                measure.seen(chunk)
                yield chunk

    stream = generating()
    for number, _ in enumerate(stream, 1):
        if number == close_after:
            stream.close()


def ended(reason, tokens=11, **timings):
    return Chunk(finish_reason=reason, completion_tokens=tokens, timings=Timings(**timings))


def failing(error):
    yield Chunk("a", (1,), completion_tokens=1)
    raise error


def test_a_generation_is_observed_once_with_what_its_last_chunk_says(told):
    last = ended("stop", queue_seconds=0.3, prefill_tokens=100, reused_tokens=20, decode_seconds=0.5)
    generate(told, [Chunk(prompt_tokens=120), Chunk("a", (1,), completion_tokens=1), last])
    found = samples(told)
    assert found["tgw_generations_finished_total{stop}"] == 1 and found["tgw_generations_running"] == 0
    assert found["tgw_request_queue_seconds_count"] == 1 and found["tgw_request_queue_seconds_sum"] == pytest.approx(0.3, abs=0.2)
    assert (found["tgw_request_queue_seconds_bucket{0.25}"], found["tgw_request_queue_seconds_bucket{+Inf}"]) == (0, 1)
    assert found["tgw_time_to_first_token_seconds_count"] == 1
    assert (found["tgw_request_prompt_tokens_computed_sum"], found["tgw_request_prompt_tokens_reused_sum"]) == (100, 20)
    assert found["tgw_request_tokens_per_second_sum"] == 20
    assert (found["tgw_request_tokens_per_second_bucket{10.0}"], found["tgw_request_tokens_per_second_bucket{20.0}"]) == (0, 1)


def test_buckets_hold_what_is_not_above_their_end(told):
    for tokens in (0, 1, 16, 17):
        told.observe(ended("stop", prefill_tokens=100, reused_tokens=tokens))
    found = samples(told)
    assert [found[f"tgw_request_prompt_tokens_reused_bucket{{{end}}}"] for end in ("0.0", "16.0", "64.0", "+Inf")] == [1, 3, 4, 4]


def test_waiting_before_the_engine_counts_as_waiting(told):
    told.observe(ended("stop", queue_seconds=0.5, prefill_tokens=1), 2.5, waited=1.0)
    found = samples(told)
    assert found["tgw_request_queue_seconds_sum"] == 1.5 and found["tgw_time_to_first_token_seconds_sum"] == 2.5


def test_running_is_told_while_it_runs(told):
    def chunks():
        assert samples(told)["tgw_generations_running"] == 1
        yield ended("length")

    generate(told, chunks())
    assert samples(told)["tgw_generations_running"] == 0 and samples(told)["tgw_generations_finished_total{length}"] == 1


def test_ends_of_every_kind_are_counted_once(told):
    generate(told, [Chunk("a", (1,), completion_tokens=1), Chunk("b", (2,), completion_tokens=2)], close_after=1)  # the reader went away
    generate(told, [ended("stop")], close_after=1)  # closed, but at its end
    generate(told, [Chunk(finish_reason="cancelled", timings=Timings())])  # while it waited
    for error in (Busy("Full."), Busy("Full."), ZeroDivisionError()):
        with pytest.raises(type(error)):
            generate(told, failing(error))
    found = samples(told)
    reasons = [found[f"tgw_generations_finished_total{{{reason}}}"] for reason in ("stop", "length", "cancelled", "error")]
    assert reasons == [1, 0, 2, 3] and found["tgw_generations_running"] == 0
    assert (found["tgw_generation_errors_total{Busy}"], found["tgw_generation_errors_total{InternalError}"]) == (2, 1)
    assert found["tgw_request_queue_seconds_count"] == 0  # none of them got a prompt computed
    assert found["tgw_time_to_first_token_seconds_count"] == 5


def test_a_generation_without_tokens_has_no_first_one_and_no_speed(told):
    generate(told, [ended("stop", tokens=0, prefill_tokens=5, decode_seconds=0.0)])
    generate(told, [ended("stop", tokens=1, prefill_tokens=5, decode_seconds=0.0)])
    found = samples(told)
    assert found["tgw_time_to_first_token_seconds_count"] == 1 and found["tgw_request_tokens_per_second_count"] == 0


# --- many threads ---------------------------------------------------------------------------------------------------------------------


WHOLE = "tgw_request_queue_seconds_count", "tgw_request_prompt_tokens_computed_count", "tgw_request_prompt_tokens_reused_sum"
"""In that test one more with each generation."""


def test_from_many_threads_nothing_is_lost_torn_or_goes_back(told, slot, engine):
    load(slot, engine, stats=EngineStats(generated_tokens=100))
    writers, rounds, faults = 6, 50, []
    finished = threading.Event()

    def write():
        for number in range(rounds):
            generate(told, [Chunk("a", (1,), completion_tokens=1), ended("stop", prefill_tokens=number, reused_tokens=1, decode_seconds=1.0)])

    def reload():
        for number in range(10):
            load(slot, engine, "ab"[number % 2] + ".fake", EngineStats(generated_tokens=100))

    def read():
        before = {}
        while not finished.is_set():
            now = counters(told)
            faults.extend((name, value, now.get(name)) for name, value in before.items() if now.get(name, -1) < value)
            faults.extend(("torn", name, now[name]) for name in WHOLE if now[name] != now["tgw_generations_finished_total{stop}"])
            before = now

    def guarded(body):
        try:
            body()
        except BaseException as error:  # noqa: BLE001  told to the test
            faults.append(error)

    working = [threading.Thread(target=guarded, args=(body,), daemon=True) for body in (*[write] * writers, reload)]
    reading = [threading.Thread(target=guarded, args=(read,), daemon=True) for _ in range(2)]
    for thread in (*reading, *working):
        thread.start()
    for thread in working:
        thread.join(WAIT)
    finished.set()
    for thread in reading:
        thread.join(WAIT)
    assert not any(thread.is_alive() for thread in (*working, *reading))
    assert faults == []
    found = samples(told)
    assert found["tgw_generations_finished_total{stop}"] == writers * rounds and found["tgw_generations_running"] == 0
    assert found["tgw_request_prompt_tokens_computed_sum"] == writers * sum(range(rounds))
    assert found["tgw_tokens_predicted_total"] == 1100
