"""Which share of LangChain's standard suite for chat models a real model passes through the API.

    python -m benchmarks.langchain_suite MODEL.gguf

`tests/api/test_langchain_standard.py` runs the same suite with a scripted engine, which passes all of it: what fails here is the model.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.api import built
from modules.api.server import ApiServer, build_api
from modules.guard import Hosts
from modules.listening import claim

SUITE = "tests/api/test_langchain_standard.py"


def main() -> int:
    """Serve the model, run the suite, print pytest's summary. Returns 0: a model that passes nothing is no fault of ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = built(Path(folder), Path(arguments.model), 4)
        listener = claim("127.0.0.1", 0)
        server = ApiServer(build_api(made, lambda: Hosts.build(False)), listener)
        server.start()
        environment = {**os.environ, "TGW_LANGCHAIN_URL": f"http://127.0.0.1:{listener.getsockname()[1]}/v1"}
        command = [sys.executable, "-m", "pytest", SUITE, "-q", "--tb=no", "-rN", "--reruns", "0", "-p", "no:cacheprovider"]
        ended = subprocess.run(command, cwd=Path(__file__).resolve().parent.parent, env=environment, capture_output=True, text=True, check=False)
        print(ended.stdout.strip().splitlines()[-1])
        server.stop()
        made.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
