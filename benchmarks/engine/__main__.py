"""The llama.cpp engine beside its references, in one run.

    python -m benchmarks.engine [all | decode clients prefix return interference soak ahead kills neighbour greedy]
                                [--model FILE] [--llama-server PATH] [--threads N] [--runs 5] [--minutes 10] [--seed 1] [--quick]

References: a bare llama.cpp loop in a process of its own; llama_cpp.server where its extra is installed; a llama-server binary where its path
is given. They compute in turn with ours, never at the same time; leave the machine alone meanwhile. Each figure that is asked for is printed with
its bound; exit code 1 when one is missed or could not be measured. All take about an hour; `--quick` makes everything so small that it takes
two minutes: then the figures only show that everything runs.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from benchmarks.engine import ahead, greedy, interference, kills, neighbour, prefix, returning, soak, writing
from benchmarks.engine.harness import CONTEXT, Bench, Check, Ours, Prompts, say
from modules.backends.llama_cpp.threads import usable_cores

MODEL = Path("user_data/models/SmolLM2-135M-Instruct.Q4_1.gguf")
MEASUREMENTS: dict[str, Callable[[Bench], list[Check]]] = {
    "decode": writing.decode,
    "clients": writing.clients,
    "prefix": prefix.measure,
    "return": returning.measure,
    "interference": interference.measure,
    "ahead": ahead.measure,
    "neighbour": neighbour.measure,
    "greedy": greedy.measure,
    "kills": kills.measure,
    "soak": soak.measure,
}


def main() -> None:
    """Measure what was asked for, print the table; exit code 1 when something is missed."""
    args = arguments()
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))  # as an exception it ends the references too
    bench = prepared(args)
    say(f"{args.model.name}, {bench.threads} threads on {usable_cores()} cores, load before {load()}" + (", a smoke run" if args.quick else ""))
    checks: list[Check] = []
    missing: list[str] = []
    for name, measure in MEASUREMENTS.items():
        if name not in args.what and "all" not in args.what:
            continue
        began = time.perf_counter()
        try:
            checks += measure(bench)
        except Exception as error:  # noqa: BLE001  # the others must be measured too
            traceback.print_exc()
            missing.append(f"FAILED  {name}: {type(error).__name__}: {error}")
        say(f"({name}: {time.perf_counter() - began:.0f} s, load {load()})")
    say("\n=== " + ("a smoke run: the figures mean little" if args.quick else "summary"))
    for line in [*(check.row() for check in checks), *missing]:
        say(line)
    sys.exit(bool(missing) or not all(check.met for check in checks))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[*MEASUREMENTS, "all", []], default=["all"], metavar="what")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--llama-server", type=Path, help="the binary to compare with")
    parser.add_argument("--threads", type=int, default=0, help="of every subject where they are compared; 0: one a core")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=10, help="of the soak")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a smoke run of two minutes")
    return parser.parse_args()


def prepared(args: argparse.Namespace) -> Bench:
    """What the measurements need; the prompts are made with the model's own tokens."""
    ours = Ours(args.model, {"ctx_size": CONTEXT})
    prompts = Prompts(ours.backend.encode, args.seed)
    ours.backend.unload()
    return Bench(
        model=args.model,
        prompts=prompts,
        threads=args.threads or usable_cores(),
        llama_server=args.llama_server,
        runs=1 if args.quick else args.runs,
        minutes=args.minutes,
        quick=args.quick,
    )


def load() -> str:
    """How busy the machine is: anything much above 0 before a measurement disturbs it."""
    return f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"


if __name__ == "__main__":
    main()
