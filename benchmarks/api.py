"""The API beside the engine itself: added time to first token, added time a token, and what 16 streams lose of the engine's aggregate.

    python -m benchmarks.api MODEL.gguf [--runs 10] [--tokens 64] [--streams 16]

The server and its engine in processes of their own, the client in another one, whose CPU is told. The engine's own times are those that it reports
for the same reply; the aggregate is beside that of as many `generate_reply` threads in one process with the same engine settings.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from modules import app, settings  # noqa: E402
from modules.backends.base import GenerationRequest  # noqa: E402
from modules.paths import UserData  # noqa: E402
from modules.replies import TextPresenter  # noqa: E402
from modules.samplers import NEUTRAL  # noqa: E402
from modules.store import Store  # noqa: E402
from modules.text_generation import generate_reply  # noqa: E402

SAMPLING = {"temperature": 0.8, "top_p": 0.95, "ban_eos_token": True}


def built(folder: Path, model: Path, streams: int) -> app.App:
    """An App with the model loaded."""
    data = UserData(folder)
    data.create()
    shutil.copy(model, data.models)
    flags = ("--api", "--ctx-size", str(512 * streams), "--parallel", str(streams))
    made = app.build(settings.load(flags, (), (), app.option_groups()), data, Store.open(data.database), TextPresenter)
    made.models.load(made.models.choose(model.name))
    return made


def serve(folder: str, model: str, streams: int, ready: Any, stop: Any) -> None:
    """The body of the server's process: first the engine's aggregate without the API, then the API. `ready` gets both."""
    from modules.api.server import ApiServer, build_api
    from modules.guard import Hosts
    from modules.listening import claim

    made = built(Path(folder), Path(model), streams)
    listener = claim("127.0.0.1", 0)
    server = ApiServer(build_api(made, lambda: Hosts.build(False)), listener)
    server.start()
    ready.put(listener.getsockname()[1])
    while (order := stop.get()) != "stop":
        ready.put(aggregate(made, streams, order))
    server.stop()
    made.close()


def aggregate(made: app.App, streams: int, tokens: int) -> float:
    """Tokens a second of `streams` replies at once, without the API."""

    def one(seed: int) -> None:
        for _ in generate_reply(made, GenerationRequest(prompt(seed), NEUTRAL.replace(SAMPLING), tokens, seed=seed)):
            pass

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(streams)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return streams * tokens / (time.perf_counter() - began)


def prompt(number: int) -> str:
    """A prompt that no other has."""
    return f"Chapter {number} of a long story about the sea, in which"


def client(url: str, number: int, tokens: int, came: Any) -> None:
    """One stream; puts (seconds to the first token, seconds from first to last, timings of the engine).

    It keeps what comes and reads it afterwards: what it computes meanwhile, the engine beside it could not.
    """
    body = {"prompt": prompt(number), "max_tokens": tokens, "seed": number, "stream": True, **SAMPLING}
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=300)
    connection.request("GET", "/health")  # a client of long standing is connected
    connection.getresponse().read()
    kept: list[tuple[float, bytes]] = []
    began = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    while data := response.read1(65536):
        kept.append((time.perf_counter(), data))
    connection.close()
    came.append((began, kept))


def read(began: float, kept: list[tuple[float, bytes]]) -> tuple[float, float, dict[str, Any]]:
    """Seconds to the first token, seconds from first to last, and timings of the engine."""
    first = last = 0.0
    timings: dict[str, Any] = {}
    for came, data in kept:
        for line in data.split(b"\n"):
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                timings = event.get("timings") or timings
                if event["choices"] and event["choices"][0]["text"]:
                    last = came
                    first = first or last
    return first - began, last - first, timings


def clients(url: str, streams: int, tokens: int, answer: Any) -> None:
    """The body of the clients' process: (wall seconds, CPU seconds, [what each saw])."""
    came: list[Any] = []
    threads = [threading.Thread(target=client, args=(url, number, tokens, came)) for number in range(streams)]
    began, cpu = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answer.put((time.perf_counter() - began, time.process_time() - cpu, [read(*each) for each in came]))


def asked(context: Any, url: str, streams: int, tokens: int) -> Any:
    """What a process of clients saw."""
    answer = context.Queue()
    process = context.Process(target=clients, args=(url, streams, tokens, answer))
    process.start()
    found = answer.get(timeout=300)
    process.join()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--streams", type=int, default=16)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ready, stop = context.Queue(), context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        server = context.Process(target=serve, args=(folder, arguments.model, arguments.streams, ready, stop))
        server.start()
        url = f"http://127.0.0.1:{ready.get(timeout=120)}"
        asked(context, url, 1, arguments.tokens)  # what a first reply makes once
        first, each = [], []
        for _ in range(arguments.runs):
            _, _, ((to_first, rest, timings),) = asked(context, url, 1, arguments.tokens)
            own = (timings["queue_ms"] + timings["prompt_ms"]) / 1000
            first.append((to_first - own) * 1000)
            each.append((rest - timings["predicted_ms"] / 1000) / (arguments.tokens - 1) * 1000)
        print(f"added to the first token: {statistics.median(first):.1f} ms (wanted <= 10)")
        print(f"added to each further token: {statistics.median(each):.3f} ms (wanted <= 0.5)")
        ratios, used = [], []
        for _ in range(3):
            stop.put(arguments.tokens)
            alone = ready.get(timeout=300)
            wall, cpu, came = asked(context, url, arguments.streams, arguments.tokens)
            assert len(came) == arguments.streams
            ratios.append(arguments.streams * arguments.tokens / wall / alone)
            used.append(cpu / wall)
        print(
            f"{arguments.streams} streams: {statistics.median(ratios):.3f} of the engine's aggregate (wanted >= 0.9); the clients used "
            f"{100 * statistics.median(used):.1f} % of one of {os.cpu_count()} cores, which the engine could have had"
        )
        stop.put("stop")
        server.join(20)


if __name__ == "__main__":
    main()
