"""From the start of server.py to the first page served, over `python -c "import gradio"`, alternating; prints the ratio of medians.

    python benchmarks/startup.py [--runs 5]

The model is not counted: the server runs in an empty user_data folder.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_SECONDS = 120.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    imports, starts = [], []
    for _ in range(runs):
        imports.append(import_seconds())
        starts.append(start_seconds())
        print(f"import gradio {imports[-1]:.2f} s   first page {starts[-1]:.2f} s", flush=True)
    ratio = statistics.median(starts) / statistics.median(imports)
    print(f"medians of {runs}: import gradio {statistics.median(imports):.2f} s, first page {statistics.median(starts):.2f} s, ratio {ratio:.2f}")


def import_seconds() -> float:
    """Wall time of a fresh interpreter that imports gradio."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import gradio"], check=True, cwd=ROOT)
    return time.perf_counter() - began


def start_seconds() -> float:
    """Wall time from starting server.py to the whole first page."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "server.py", "--user-data-dir", folder, "--listen-port", str(port)]
        began = time.perf_counter()
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for_page(f"http://127.0.0.1:{port}/", began)
            return time.perf_counter() - began
        finally:
            server.terminate()
            server.wait(30)


def wait_for_page(url: str, began: float) -> None:
    """Ask every 5 ms until the page comes. Raises TimeoutError."""
    while time.perf_counter() - began < LIMIT_SECONDS:
        try:
            request = urllib.request.Request(url, headers={"Accept": "text/html"})
            with urllib.request.urlopen(request, timeout=10) as answer:
                answer.read()
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.005)
    raise TimeoutError(f"No page at {url} within {LIMIT_SECONDS:.0f} s.")


if __name__ == "__main__":
    main()
