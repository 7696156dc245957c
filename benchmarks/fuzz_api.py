"""The API under generated requests: Schemathesis makes them from /openapi.json, good and bad ones, and looks at every answer.

    python -m benchmarks.fuzz_api [--minutes 10] [--seed 0]

A scripted engine answers, so that it is the API that is tried. Told are requests by status and faults, each once with a request that shows it; the
exit status is 1 where there are any. tests/api/test_openapi.py runs a few of the same requests.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import hypothesis  # noqa: E402
import requests  # noqa: E402
import schemathesis  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.core.failures import FailureGroup  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from modules import app, settings  # noqa: E402
from modules.api.server import ApiServer, build_api  # noqa: E402
from modules.guard import Hosts  # noqa: E402
from modules.paths import UserData  # noqa: E402
from modules.replies import TextPresenter  # noqa: E402
from modules.store import Store  # noqa: E402

WAIT = 120.0
"""Seconds for an answer: a request may ask for one token a second, and the model has 85."""
MODEL = "model.echo"
SAYS = '<think>hm</think> Hello <tool_call>{"name": "a", "arguments": {}}</tool_call> to you.'
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
HONEST = {501, 503}
"""Server errors that are answers: not offered, and no model."""
MODES = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
CHANGES = ("/v1/internal/model/load", "/v1/internal/model/unload")
"""After these the model is loaded again."""


@dataclass(frozen=True)
class Served:
    """The API on a port, with a model that says always the same."""

    app: app.App
    url: str

    def load(self) -> None:
        """Load that model. It claims to have grammars too, so that what needs them is asked for."""
        models = self.app.models
        models.load(models.choose(MODEL, "echo", {"word_delay": 0.0}))
        backend: Any = models.backend
        backend.features |= {"grammar"}


@contextmanager
def scripted() -> Iterator[tuple[Served, Any]]:
    """The API, and its schema as Schemathesis reads it."""
    with tempfile.TemporaryDirectory() as folder:
        data = UserData(Path(folder))
        data.create()
        (data.models / MODEL).write_text(SAYS, "utf-8")
        configured = settings.load(("--api",), (), (), app.option_groups())
        built = app.build(configured, data, Store.open(data.database), TextPresenter)
        listener = socket.create_server(("127.0.0.1", 0))
        server = ApiServer(build_api(built, lambda: Hosts.build(False)), listener)
        api = Served(built, f"http://127.0.0.1:{listener.getsockname()[1]}")
        api.load()
        server.start()
        try:
            yield api, schemathesis.openapi.from_url(f"{api.url}/openapi.json", config=schemathesis.Config(), wait_for_schema=WAIT)
        finally:
            server.stop()
            built.close()


def operations(schema: Any) -> list[Any]:
    """All of them."""
    return [found.ok() for found in schema.get_all_operations()]


def ask(api: Served, case: Any, session: requests.Session) -> Any:
    """The answer to `case`, looked at. Raises what is wrong with it."""
    response = case.call(base_url=api.url, session=session, timeout=WAIT)
    if case.operation.path in CHANGES:
        api.load()
    checks = [check for check in CHECKS if not (check is not_a_server_error and response.status_code in HONEST)]
    case.validate_response(response, checks=checks)
    return response


def drive(operation: Any, mode: Any, examples: int, seed: int, each: Callable[[Any], None]) -> None:
    """Give `each` that many cases of `operation`, the same for the same seed. Ends early where there are no more."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        each(case)

    try:
        run()
    except hypothesis.errors.Unsatisfiable:
        return  # such as a bad request to a route that takes nothing


@dataclass
class Found:
    """What came of it."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    faults: dict[tuple[str, str], str] = field(default_factory=dict)

    def look(self, api: Served, case: Any, session: requests.Session) -> None:
        """Ask, and note what is wrong."""
        name = case.operation.label
        try:
            self.statuses[name, ask(api, case, session).status_code] += 1
        except FailureGroup as group:
            for failure in group.exceptions:
                self.note(name, failure, case)
        except (AssertionError, requests.RequestException) as error:
            self.note(name, error, case)

    def note(self, name: str, error: BaseException, case: Any) -> None:
        """Each kind of fault once."""
        self.statuses[name, 0] += 1
        key = name, f"{type(error).__name__} {getattr(error, 'title', '')} {getattr(error, 'status_code', '')}"
        self.faults.setdefault(key, f"{str(error)[:600]}\n    {case.as_curl_command()[:1500]}")


def main() -> int:
    """Ask until the time is over."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--minutes", type=float, default=10)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    found, seed, began = Found(), options.seed, time.monotonic()
    ends = began + options.minutes * 60
    with scripted() as (api, schema), requests.Session() as session:
        known = operations(schema)
        while time.monotonic() < ends:
            for operation in known:
                for mode in MODES:
                    if time.monotonic() < ends:
                        drive(operation, mode, 20 if operation.body else 3, seed, lambda case: found.look(api, case, session))
            seed += 1
    seconds = time.monotonic() - began
    total = sum(found.statuses.values())
    by_status: Counter[int] = Counter()
    for (_, status), count in found.statuses.items():
        by_status[status] += count
    figures = {
        "operations": len(known),
        "asked_operations": len({name for name, _ in found.statuses}),
        "rounds": seed - options.seed,
        "requests": total,
        "requests_per_second": round(total / seconds, 1),
        "never_followed": sorted(
            operation.label for operation in known if not {(operation.label, 200), (operation.label, 501)} & set(found.statuses)
        ),
        "by_status": {str(status or "fault"): by_status[status] for status in sorted(by_status)},
        "faults": len(found.faults),
    }
    for (name, kind), text in found.faults.items():
        print(f"{name}: {kind}\n    {text}\n")
    print(json.dumps(figures, indent=2))
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
