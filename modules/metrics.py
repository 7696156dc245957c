"""Metrics of the server and of its engine, in Prometheus form: what GET /metrics answers. Counts only, no text of anybody.

Each metric is declared once, below; the documentation's table and the output are made from that. Names follow those of llama.cpp's own
server where it has the same thing, with the prefix `tgw_`. Nothing here costs anything per token: a generation is observed at its end,
and the engine's figures are read when somebody asks.

Totals never go back while the server lives: what the models before this one have done stays counted.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from types import TracebackType
from typing import Literal, get_args

import psutil
from prometheus_client import CollectorRegistry, exposition
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.utils import floatToGoString

from modules.backends.base import Backend, Chunk, EngineStats, FinishReason, Measured
from modules.errors import UserError
from modules.models import ModelSlot, ModelStatus, measured

ERROR = "error"
"""Stands among the finish reasons for a generation that failed."""

# --- declarations ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Declared:
    """One metric. A counter's name ends in `_total`, before it comes the unit, if it has one."""

    name: str
    kind: Literal["counter", "gauge", "histogram", "info"]
    help: str
    unit: str = ""
    labels: tuple[str, ...] = ()

    def family(self, samples: Mapping[str, float]) -> Metric:
        """A counter or gauge with its values by its label's value, or by "" without a label."""
        make = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        family = make(self.name, self.help, labels=self.labels, unit=self.unit)
        for label, value in samples.items():
            family.add_metric((_encodable(label),) if self.labels else (), value)
        return family


@dataclass(frozen=True)
class OfEngine(Declared):
    """A counter or gauge that comes from the engine's stats."""

    read: Callable[[EngineStats], float | Mapping[str, float]] = lambda stats: 0

    def samples(self, stats: EngineStats) -> Mapping[str, float]:
        """Values by label, as `family` takes them."""
        value = self.read(stats)
        return value if isinstance(value, Mapping) else {"": value}


@dataclass(frozen=True)
class OfReplies(Declared):
    """A histogram with one observation a generation. `bounds`: the upper ends of its buckets, rising; one without end comes last."""

    bounds: tuple[float, ...] = ()


_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_SPEEDS = (1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0, 80.0, 100.0, 150.0, 200.0, 300.0, 500.0, 1000.0)
_TOKENS = (0.0, *(float(4**n) for n in range(2, 10)))

UPTIME = Declared("tgw_uptime_seconds", "gauge", "Time since the server was started.", "seconds")
SERVER_MEMORY = Declared("tgw_server_resident_memory_bytes", "gauge", "Resident memory of the server's process.", "bytes")
MODEL = Declared("tgw_model_info", "info", "The model in use, as labels of a gauge that is 1. Absent when there is none.", labels=("model", "loader"))
ENGINE_MEMORY = Declared("tgw_engine_resident_memory_bytes", "gauge", "Resident memory of the engine, where it is a process of its own.", "bytes")
RUNNING = Declared("tgw_generations_running", "gauge", "Generations under way, those that wait for a place included.")
FINISHED = Declared(
    "tgw_generations_finished_total",
    "counter",
    "Generations that ended. A stop string that the server found, or a reader that went away, counts as cancelled.",
    labels=("finish_reason",),
)
ERRORS = Declared("tgw_generation_errors_total", "counter", "Generations that failed, by the name of the error.", labels=("error",))
SERVER = (UPTIME, SERVER_MEMORY, MODEL, ENGINE_MEMORY, RUNNING, FINISHED, ERRORS)

QUEUE = OfReplies("tgw_request_queue_seconds", "histogram", "Wait until a generation got its place.", "seconds", bounds=_SECONDS)
FIRST_TOKEN = OfReplies(
    "tgw_time_to_first_token_seconds", "histogram", "From the request for a generation to its first token.", "seconds", bounds=_SECONDS
)
SPEED = OfReplies(
    "tgw_request_tokens_per_second", "histogram", "Tokens a second of one generation, from its first token to its last.", bounds=_SPEEDS
)
COMPUTED = OfReplies("tgw_request_prompt_tokens_computed", "histogram", "Prompt tokens of a generation that were computed.", bounds=_TOKENS)
REUSED = OfReplies("tgw_request_prompt_tokens_reused", "histogram", "Prompt tokens of a generation that came from the cache.", bounds=_TOKENS)
REPLIES = (QUEUE, FIRST_TOKEN, SPEED, COMPUTED, REUSED)


def _per(amount: float, of: float) -> float:
    return amount / of if of else 0.0


ENGINE = (
    OfEngine("tgw_requests_processing", "gauge", "Requests that have a place in the batch.", read=lambda s: s.busy_sequences),
    OfEngine("tgw_parallel_sequences", "gauge", "Places in the batch.", read=lambda s: s.parallel),
    OfEngine("tgw_requests_deferred", "gauge", "Requests that wait for a place.", read=lambda s: s.waiting),
    OfEngine("tgw_requests_deferred_limit", "gauge", "How many may wait; more are refused.", read=lambda s: s.max_queue),
    OfEngine("tgw_kv_cache_cells", "gauge", "Places for tokens in the context's cache.", read=lambda s: s.cells),
    OfEngine("tgw_kv_cache_tokens", "gauge", "Places in use, by requests under way and by finished ones that are kept.", read=lambda s: s.cells_used),
    OfEngine("tgw_kv_cache_usage_ratio", "gauge", "Share of the places in use; 1 is full.", "ratio", read=lambda s: _per(s.cells_used, s.cells)),
    OfEngine("tgw_kv_cache_sequences", "gauge", "Finished sequences kept in the context's cache.", read=lambda s: s.cached_sequences),
    OfEngine("tgw_spilled_sequences", "gauge", "Finished sequences kept in main memory.", read=lambda s: s.spilled_sequences),
    OfEngine("tgw_spilled_bytes", "gauge", "Main memory that these take.", "bytes", read=lambda s: s.spilled_bytes),
    OfEngine("tgw_engine_threads", "gauge", "Threads of the engine's last step.", read=lambda s: s.threads),
    OfEngine("tgw_prompt_tokens_total", "counter", "Prompt tokens computed.", read=lambda s: s.prompt_tokens),
    OfEngine("tgw_prompt_tokens_reused_total", "counter", "Prompt tokens taken from the cache instead.", read=lambda s: s.reused_tokens),
    OfEngine(
        "tgw_prompt_seconds_total",
        "counter",
        "Time that requests took for their prompts, added up over requests.",
        "seconds",
        read=lambda s: s.prefill_seconds,
    ),
    OfEngine(
        "tgw_prompt_tokens_seconds",
        "gauge",
        "Prompt tokens a second of computing, on average over the requests since this model was loaded.",
        read=lambda s: _per(s.prompt_tokens, s.prefill_seconds),
    ),
    OfEngine("tgw_tokens_predicted_total", "counter", "Tokens generated.", read=lambda s: s.generated_tokens),
    OfEngine(
        "tgw_tokens_predicted_seconds_total",
        "counter",
        "Time from first to last token, added up over requests.",
        "seconds",
        read=lambda s: s.decode_seconds,
    ),
    OfEngine(
        "tgw_predicted_tokens_seconds",
        "gauge",
        "Tokens a second that one request gets, on average since this model was loaded.",
        read=lambda s: _per(s.generated_tokens, s.decode_seconds),
    ),
    OfEngine("tgw_queue_seconds_total", "counter", "Time that requests waited for a place, all together.", "seconds", read=lambda s: s.queue_seconds),
    OfEngine("tgw_n_decode_total", "counter", "Steps of the engine: one llama_decode() each, for all sequences.", read=lambda s: s.steps),
    OfEngine(
        "tgw_n_busy_slots_per_decode",
        "gauge",
        "Tokens generated a step, on average since this model was loaded: the sequences that a step served. Speculation raises it.",
        read=lambda s: _per(s.generated_tokens, s.steps),
    ),
    OfEngine("tgw_spec_decode_num_draft_tokens_total", "counter", "Tokens guessed ahead (speculation).", read=lambda s: s.draft_tokens),
    OfEngine("tgw_spec_decode_num_accepted_tokens_total", "counter", "Of these, those that the model agreed with.", read=lambda s: s.accepted_tokens),
    OfEngine(
        "tgw_prompt_cache_lookups_total",
        "counter",
        "Requests, by where the beginning of their prompt was found: in cells of the context, in main memory, nowhere (miss).",
        labels=("found",),
        read=lambda s: {"cells": s.cache_hits_cells, "memory": s.cache_hits_memory, "miss": s.cache_misses},
    ),
    OfEngine("tgw_kv_cache_evictions_total", "counter", "Finished sequences that had to leave the context's cache.", read=lambda s: s.evictions),
    OfEngine("tgw_preemptions_total", "counter", "Requests that gave their place up for a time.", read=lambda s: s.preemptions),
    OfEngine(
        "tgw_requests_finished_total",
        "counter",
        "Requests that the engine ended, by reason or as error.",
        labels=("finish_reason",),
        read=lambda s: s.finished,
    ),
    OfEngine("tgw_engine_restarts_total", "counter", "Starts of a new engine process after the old one died or hung.", read=lambda s: s.restarts),
)


def declared() -> Iterator[Declared]:
    """Every metric once, in the order of the documentation."""
    yield from SERVER
    yield from REPLIES
    yield from ENGINE


def markdown_table() -> str:
    """The documentation's table."""
    rows = ["| Name | Type | Labels | Meaning |", "| --- | --- | --- | --- |"]
    for each in declared():
        labels = ", ".join(f"`{label}`" for label in each.labels)
        rows.append(f"| `{each.name}` | {'gauge' if each.kind == 'info' else each.kind} | {labels} | {each.help} |")
    return "\n".join(rows) + "\n"


# --- measuring ------------------------------------------------------------------------------------------------------------------------


class _Histogram:
    """Observations of one `OfReplies`. Not safe from several threads."""

    def __init__(self, of: OfReplies) -> None:
        self._of = of
        self._counts = [0] * (len(of.bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._of.bounds, value)] += 1
        self._sum += value

    def family(self) -> Metric:
        ends = [floatToGoString(bound) for bound in (*self._of.bounds, float("inf"))]
        buckets = list(zip(ends, accumulate(self._counts), strict=True))
        return HistogramMetricFamily(self._of.name, self._of.help, buckets=buckets, sum_value=self._sum, unit=self._of.unit)


class Generation:
    """One generation under way, as a context: counted as running until the block ends, then observed, whatever ended it. For one thread."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._began = time.monotonic()
        self._waited = 0.0
        self._first: float | None = None
        self._last = Chunk()

    def admitted(self) -> None:
        """It has its turn. What the engine's own queue costs is in the last chunk's timings."""
        self._waited = time.monotonic() - self._began

    def seen(self, chunk: Chunk) -> None:
        """The chunk that has just come."""
        if self._first is None and chunk.completion_tokens:
            self._first = time.monotonic() - self._began
        self._last = chunk

    def __enter__(self) -> Generation:
        self._metrics._count_running(1)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._metrics._count_running(-1)
        failed = error if isinstance(error, Exception) else None  # a closed generator (GeneratorExit) is no failure
        self._metrics.observe(self._last, self._first, self._waited, failed)


class Metrics:
    """What the server has done, and what its engine tells of itself. Safe from any thread."""

    def __init__(self, models: ModelSlot) -> None:
        self._models = models
        self._lock = threading.Lock()  # models may call us while it holds its own: never ask it for anything inside
        self._began = time.monotonic()
        self._process = psutil.Process()
        self._running = 0
        self._finished = dict.fromkeys((*get_args(FinishReason), ERROR), 0.0)
        self._errors: dict[str, float] = {}
        self._histograms = {each: _Histogram(each) for each in REPLIES}
        self._engine: Measured | None = None  # of the model loaded last; unloaded, it still knows what it has done
        self._former: dict[str, Mapping[str, float]] = {}  # totals of the engines before it
        self._registry = CollectorRegistry()
        self._registry.register(self)
        models.on_load(self._loaded)

    def generation(self) -> Generation:
        """Measure one generation; enter it before the generation waits for its turn."""
        return Generation(self)

    def observe(self, last: Chunk, first_token_seconds: float | None = None, waited: float = 0.0, error: Exception | None = None) -> None:
        """Count one generation that has ended with the chunk `last` or, after it, with `error`. `Generation` calls this.

        Seconds: `first_token_seconds` from the request to the first token (None: there was none), `waited` before the engine was asked.
        """
        with self._lock:
            self._finished = _added(self._finished, {ERROR if error else last.finish_reason or "cancelled": 1})
            if error:
                self._errors = _added(self._errors, {error.code if isinstance(error, UserError) else "InternalError": 1})
            for histogram, value in _observations(last, first_token_seconds, waited):
                self._histograms[histogram].observe(value)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """All metrics now and their content type: OpenMetrics 1.0 for a client whose Accept header names it, else the older text format."""
        if "application/openmetrics-text" in accept:
            return openmetrics.generate_latest(self._registry), openmetrics.CONTENT_TYPE_LATEST
        return exposition.generate_latest(self._registry), exposition.CONTENT_TYPE_PLAIN_0_0_4

    def collect(self) -> list[Metric]:
        """For prometheus-client: the families as they are at one moment."""
        status = self._models.status()
        with self._lock:
            stats = self._engine.stats() if self._engine else None
            replies = [histogram.family() for histogram in self._histograms.values()]
            return [*self._of_server(status, stats), *replies, *self._of_engine(status, stats)]

    def _of_server(self, status: ModelStatus, stats: EngineStats | None) -> Iterator[Metric]:
        yield UPTIME.family({"": time.monotonic() - self._began})
        yield SERVER_MEMORY.family({"": self._process.memory_info().rss})
        if status.state == "ready":
            names = (_encodable(status.name or ""), _encodable(status.loader or ""))
            yield InfoMetricFamily(MODEL.name.removesuffix("_info"), MODEL.help, dict(zip(MODEL.labels, names, strict=True)))
            memory = stats.memory_bytes if stats else status.memory
            if memory:
                yield ENGINE_MEMORY.family({"": memory})
        yield RUNNING.family({"": self._running})
        yield FINISHED.family(self._finished)
        yield ERRORS.family(self._errors)

    def _of_engine(self, status: ModelStatus, stats: EngineStats | None) -> Iterator[Metric]:
        """Totals once there has been an engine that tells them; what it does now only while its model is loaded."""
        for each in ENGINE:
            now = each.samples(stats) if stats else {}
            if each.kind == "counter" and (stats or self._former):
                yield each.family(_added(self._former.get(each.name, {}), now))
            elif each.kind == "gauge" and stats and status.state == "ready":
                yield each.family(now)

    def _loaded(self, backend: Backend) -> None:
        """Another model takes the place of the former one, whose totals are final."""
        with self._lock:
            if self._engine:
                stats = self._engine.stats()
                self._former = {each.name: _added(self._former.get(each.name, {}), each.samples(stats)) for each in ENGINE if each.kind == "counter"}
            self._engine = measured(backend)

    def _count_running(self, change: int) -> None:
        with self._lock:
            self._running += change


def _observations(last: Chunk, first_token_seconds: float | None, waited: float) -> Iterator[tuple[OfReplies, float]]:
    timings = last.timings
    if first_token_seconds is not None:
        yield FIRST_TOKEN, first_token_seconds
    if timings is None or not timings.prefill_tokens + timings.reused_tokens:  # it never got its place
        return
    yield QUEUE, waited + timings.queue_seconds
    yield COMPUTED, timings.prefill_tokens
    yield REUSED, timings.reused_tokens
    if timings.decode_seconds and last.completion_tokens > 1:
        yield SPEED, (last.completion_tokens - 1) / timings.decode_seconds


def _added(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {key: one.get(key, 0) + other.get(key, 0) for key in {**one, **other}}


def _encodable(text: str) -> str:
    """`text` without lone surrogates, which a file name that is not UTF-8 has. Quotes and line ends are escaped by prometheus-client."""
    return text.encode("utf-8", "replace").decode()
