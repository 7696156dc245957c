"""What our engine is measured against: a bare loop (bare.py), a `llama-server` binary, and `llama_cpp.server`."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.engine.harness import CONTEXT, Bench, Stream, Threaded, wait

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0
ANSWER_SECONDS = 600.0
SERVER_EXTRA = ("sse_starlette", "starlette_context", "pydantic_settings")
"""What the extra [server] of llama-cpp-python brings."""


class Bare:
    """The bare loop in a process of its own. One client, or several in one batch; it has no clients that come and go."""

    name = "bare loop"

    def __init__(self, model: Path, threads: int, sequences: int, cells: int = CONTEXT) -> None:
        command = [sys.executable, "-m", "benchmarks.engine.bare", str(model), str(threads), str(cells), str(sequences)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._answer() != "ready":
            raise RuntimeError("The bare loop did not start; its own words stand above.")

    def run(self, stream: Stream) -> None:
        """See Subject."""
        self.together([stream])

    def together(self, streams: Sequence[Stream]) -> None:
        """See Subject. All must want as many tokens."""
        answer = self._ask(do="write", prompts=[list(s.prompt) for s in streams], tokens=streams[0].wanted, ban_eos=True)
        for stream, times, tokens in zip(streams, answer["times"], answer["tokens"], strict=True):
            stream.sent, stream.times, stream.tokens = answer["began"], times, tokens

    def write(self, prompt: Sequence[int], tokens: int, **how: int) -> list[int]:
        """Greedy token ids; a token that ends the text is the last one. `piece`: how many tokens of the prompt are computed at once."""
        ids: list[int] = self._ask(do="write", prompts=[list(prompt)], tokens=tokens, ban_eos=False, **how)["tokens"][0]
        return ids

    def logits(self, prompt: Sequence[int], written: Sequence[int], of: Sequence[int]) -> list[float]:
        """Logits of the tokens `of` after `prompt` and `written`."""
        logits: list[float] = self._ask(do="logits", prompt=list(prompt), written=list(written), of=list(of))
        return logits

    def _ask(self, **fields: Any) -> Any:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(fields) + "\n")
        self._process.stdin.flush()
        return json.loads(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"The bare loop ended with code {self._process.wait(10)}; its own words stand above.")
        return line.strip()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(10)


@contextlib.contextmanager
def bare(bench: Bench, sequences: int = 1) -> Iterator[Bare]:
    """A bare loop with the compared number of threads."""
    loop = Bare(bench.model, bench.threads, sequences)
    try:
        yield loop
    finally:
        loop.close()


class HttpServer(Threaded):
    """A server process that streams server-sent events."""

    def __init__(self, name: str, command: Sequence[str], port: int, health: str) -> None:
        """Starts it and waits until `health` answers. Raises TimeoutError, or RuntimeError with its last words."""
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close()
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)
        # llama-server closes a connection after a stream without saying so; one that is kept fails at the next request.
        limits = httpx.Limits(max_connections=128, max_keepalive_connections=0)
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=ANSWER_SECONDS, limits=limits, trust_env=False)
        try:
            wait(lambda: self._healthy(health), START_SECONDS, f"{name} to start")
        except BaseException:
            self.close()
            raise

    def _healthy(self, path: str) -> bool:
        if self._process.poll() is not None:
            self._log.seek(0)
            raise RuntimeError(f"{self.name} ended with code {self._process.returncode}: {self._log.read()[-2000:].decode(errors='replace')}")
        time.sleep(0.02)
        with contextlib.suppress(httpx.HTTPError):
            return self._client.get(path).status_code == 200
        return False

    def _events(self, path: str, body: dict[str, Any], stream: Stream) -> Iterator[Any]:
        """The events of an answer. Once `stream.cancel` is set the connection is closed."""
        stream.sent = time.perf_counter()
        with self._client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{self.name} answered {response.status_code}: {response.read()[:500].decode(errors='replace')}")
            rest = b""
            for raw in response.iter_raw():
                *events, rest = (rest + raw).replace(b"\r\n", b"\n").split(b"\n\n")
                for event in events:
                    if event.startswith(b"data: {"):
                        yield json.loads(event[6:])
                if stream.cancel.cancelled:
                    return

    def close(self) -> None:
        """End the process."""
        self._client.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


class LlamaServer(HttpServer):
    """llama.cpp's own server."""

    def __init__(self, binary: Path, model: Path, slots: int, threads: int, flags: Sequence[str] = (), name: str = "llama-server") -> None:
        """`threads`: 0 for its own default."""
        port = free_port()
        command = [str(binary), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-np", str(slots), "-c", str(CONTEXT)]
        command += ["-t", str(threads), "-tb", str(threads)] if threads else []
        known = _flags(binary)
        command += [flag for flag in ("--no-ui", "--no-webui", "--offline") if flag in known and not (flag == "--no-webui" and "--no-ui" in known)]
        super().__init__(name, [*command, *flags], port, "/health")

    def run(self, stream: Stream) -> None:
        """See Subject."""
        body = {"prompt": list(stream.prompt), "n_predict": stream.wanted, "stream": True, "cache_prompt": True, "ignore_eos": True}
        for event in self._events("/completion", {**body, "temperature": 0, "samplers": ["temperature"]}, stream):
            if event.get("stop"):
                stream.took(max(0, int(event["tokens_predicted"]) - len(stream.times)))  # those whose text came with a later one
            else:
                stream.took(1 if event.get("content") or event.get("tokens") else 0, event.get("tokens", ()))


class PythonServer(HttpServer):
    """The server of llama-cpp-python. It computes one request at a time."""

    def __init__(self, model: Path, threads: int, ours: Any) -> None:
        """`ours`: a backend with the same model, to turn token ids into text; this server takes no ids."""
        self._decode = ours.decode
        self._never = {str(token): -100 for token in ours.encode(ours.eos_token)}
        port = free_port()
        command = [sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--n_ctx", str(CONTEXT), "--n_threads", str(threads), "--n_threads_batch", str(threads)]
        # A second request would end the first one; and the logits of a whole prompt cost time that nobody asked for.
        command += ["--interrupt_requests", "false", "--logits_all", "false", "--verbose", "false"]
        super().__init__("llama_cpp.server", command, port, "/v1/models")

    def run(self, stream: Stream) -> None:
        """See Subject."""
        body = {"prompt": self._decode(stream.prompt), "max_tokens": stream.wanted, "stream": True, "temperature": 0, "logit_bias": self._never}
        for event in self._events("/v1/completions", body, stream):
            if event["choices"][0]["text"]:
                stream.took(1)


@contextlib.contextmanager
def llama_server(
    bench: Bench, slots: int, flags: Sequence[str] = (), own_threads: bool = False, name: str = "llama-server"
) -> Iterator[LlamaServer | None]:
    """llama-server with the compared number of threads or its own; None where no binary was given."""
    if not bench.llama_server:
        yield None
        return
    server = LlamaServer(bench.llama_server, bench.model, slots, 0 if own_threads else bench.threads, flags, name)
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def python_server(bench: Bench, ours: Any) -> Iterator[PythonServer | None]:
    """llama_cpp.server; None where its extra is not installed."""
    if any(importlib.util.find_spec(name) is None for name in SERVER_EXTRA):
        yield None
        return
    server = PythonServer(bench.model, bench.threads, ours)
    try:
        yield server
    finally:
        server.close()


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _flags(binary: Path) -> set[str]:
    answer = subprocess.run([str(binary), "--help"], capture_output=True, text=True, timeout=60, check=False, env=dict(os.environ))
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", answer.stdout + answer.stderr))
