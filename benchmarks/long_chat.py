"""What a streamed token costs in long chats: server CPU, and the time until it is painted, at 10, 200 and 1,000 messages of history.

    python benchmarks/long_chat.py [--runs 5] [--tokens 200] [--browser /path/to/chromium]

The server runs in this process on a scripted engine, so that the moment a token is produced is known to the microsecond; the browser is
a real one. Prints, for each history: CPU per token, last token produced to last token painted; then the first token's time over 20 replies, how
long a chat of 5,000 messages takes to show its end, and how much the page's heap has grown over a reply of 10,000 tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from modules import app as app_module  # noqa: E402
from modules import launch, settings, system  # noqa: E402
from modules.auth import Auth, Identity  # noqa: E402
from modules.backends.base import Backend, Chunk, GenerationRequest, Loader  # noqa: E402
from modules.conversation import Conversation  # noqa: E402
from modules.guard import Hosts  # noqa: E402
from modules.models import Choice  # noqa: E402
from modules.options import Options  # noqa: E402
from modules.paths import UserData  # noqa: E402
from modules.ui.views import BlockPresenter  # noqa: E402

HISTORIES = (10, 200, 1000)
TOKENS_PER_SECOND = 100.0
LAST = "omega"
WORDS = ["Here", "is", "a", "**short**", "paragraph", "with", "`code`", "and", "words,", "as", "a", "model", "would", "write", "it.", ""]


class Metronome:
    """A backend that writes `tokens` words at a steady pace and notes when."""

    name, context_length, bos_token, eos_token = "metronome", 10_000_000, "", ""
    chat_template: str | None = None
    features = frozenset({"parallel"})

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.first = self.last = 0.0
        self.cpu = 0.0

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """One token a byte, by length only."""
        return [0] * len(text)

    def decode(self, tokens: list[int] | tuple[int, ...]) -> str:
        """Nothing to decode."""
        return ""

    def generate(self, request: GenerationRequest) -> Iterator[Chunk]:
        """The script."""
        began = time.perf_counter()
        cpu = 0.0
        for i in range(self.tokens):
            time.sleep(max(0.0, began + i / TOKENS_PER_SECOND - time.perf_counter()))
            word = LAST if i == self.tokens - 1 else WORDS[i % len(WORDS)] + ("\n\n" if i % 40 == 39 else " ")
            if i == 0:
                self.first, cpu = time.time(), time.process_time()
            self.last = time.time()
            yield Chunk(word, (0,), completion_tokens=i + 1, prompt_tokens=100)
        time.sleep(0.2)  # what the last tokens still cause belongs to them
        self.cpu = (time.process_time() - cpu) / self.tokens
        yield Chunk(finish_reason="stop", completion_tokens=self.tokens, prompt_tokens=100)

    def alive(self) -> bool:
        """Always."""
        return True

    def memory(self) -> int:
        """Not known."""
        return 0

    def unload(self) -> None:
        """Nothing to free."""


class Bench:
    """A served App with a browser page on it."""

    def __init__(self, folder: Path, tokens: int) -> None:
        import os

        os.environ.update(system.program_environment(folder))
        self.backend = Metronome(tokens)
        configuration = settings.load([], (), (), app_module.option_groups())
        data = UserData(folder)
        data.create()
        self.app = app_module.build(configuration, data, launch.open_store(data, False), BlockPresenter)
        loader = Loader("metronome", Options, lambda _: True, self._load, frozenset())
        self.app.models.load(Choice("metronome", folder, loader, Options()))
        self.auth = Auth({}, data.sessions)
        self.url = self._serve()

    def _load(self, *_: Any) -> Backend:
        return self.backend

    def _serve(self) -> str:
        import uvicorn

        from modules.ui import serve

        listener = serve.bind(self.app.settings)
        guard = serve.build_server(self.app, self.auth, Hosts.build(False))
        server = uvicorn.Server(uvicorn.Config(guard, log_level="warning", access_log=False))
        self.app.models.listen(self.app.replies.wake)
        threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
        return serve.address(self.app.settings, listener)

    def fill(self, owner: Identity, messages: int) -> str:
        """A conversation of so many messages; its id."""
        conversation = Conversation("", owner.owner)
        for i in range(messages):
            conversation, _ = conversation.add("user" if i % 2 == 0 else "assistant", f"Message {i}. " + "Some *words* of an older turn. " * 8)
        created = self.app.store.create(owner.owner, f"{messages} messages")
        self.app.store.add(owner.owner, created.id, list(conversation.messages.values()), conversation.tip or "")
        return created.id


PAINTED = """
(word) => { window.tgwPainted = new Promise((done) => {
  const pane = document.querySelector('#tgw-chat');
  const newest = () => [...pane.querySelectorAll('.tgw-msg')].at(-1);
  const before = newest();
  const observer = new MutationObserver(() => {
    const now = newest();
    if (now === before || !now?.textContent.includes(word)) return;
    observer.disconnect();
    requestAnimationFrame(() => { const c = new MessageChannel(); c.port1.onmessage = () => done(Date.now()); c.port2.postMessage(0); });
  });
  observer.observe(pane, { childList: true, subtree: true, characterData: true });
}); }
"""


def ask(bench: Bench, page: Any, word: str) -> float:
    """Send a message and give the time (seconds since the epoch) at which `word` of its answer was painted."""
    page.evaluate(PAINTED, word)
    box = page.locator("#tgw-chat textarea").first
    box.fill("Go on, please.")
    box.press("Enter")
    return float(page.evaluate("() => window.tgwPainted")) / 1000


def ended(bench: Bench, conversation: str) -> None:
    """Wait for the reply's end."""
    for reply in bench.app.replies.running(conversation):
        reply.finished.wait(30)


def open_chat(page: Any, bench: Bench, conversation: str) -> None:
    """Show a conversation."""
    page.goto(f"{bench.url}#c={conversation}")
    page.reload()
    page.wait_for_function("() => document.querySelector('#tgw-chat')?.textContent.includes('Message ')")


def measure(bench: Bench, page: Any, owner: Identity, runs: int) -> None:
    """All figures, printed."""
    rows = {}
    for messages in HISTORIES:
        conversation = bench.fill(owner, messages)
        open_chat(page, bench, conversation)
        cpu, paint = [], []
        for _ in range(runs + 1):
            painted = ask(bench, page, LAST)
            paint.append((painted - bench.backend.last) * 1000)
            ended(bench, conversation)
            cpu.append(bench.backend.cpu * 1000)
        rows[messages] = (statistics.median(cpu[1:]), statistics.median(paint[1:]))
        token, last = rows[messages]
        print(f"{messages:5} messages: server CPU {token:.3f} ms a token, last token painted after {last:.1f} ms", flush=True)
    few, many = rows[HISTORIES[0]], rows[HISTORIES[-1]]
    print(f"1,000 over 10 messages: CPU {many[0] / few[0]:.2f}, paint {many[1] / few[1]:.2f} ({many[1] - few[1]:+.1f} ms)", flush=True)
    first = []
    bench.backend.tokens = 5
    for _ in range(20):
        painted = ask(bench, page, WORDS[0])
        first.append((painted - bench.backend.first) * 1000)
        ended(bench, conversation)
    print(f"first token painted {statistics.median(first):.1f} ms after the engine produced it (median of 20, worst {max(first):.1f})", flush=True)


LONG, LONG_REPLY = 5000, 10_000


def opening(bench: Bench, page: Any, owner: Identity, runs: int) -> None:
    """A click on a long chat in the list, until its last message is painted."""
    short, long = bench.fill(owner, 10), bench.fill(owner, LONG)
    page.goto(f"{bench.url}#c={short}")
    page.reload()
    page.wait_for_function("() => document.querySelector('#tgw-chat')?.textContent.includes('Message 9.')")
    taken = []
    for _ in range(runs):
        began = time.time()
        page.evaluate(PAINTED, f"Message {LONG - 1}.")
        page.evaluate("(id) => { location.hash = `#c=${id}`; }", long)
        taken.append(float(page.evaluate("() => window.tgwPainted")) - began * 1000)
        page.evaluate(PAINTED, "Message 9.")
        page.evaluate("(id) => { location.hash = `#c=${id}`; }", short)
        page.evaluate("() => window.tgwPainted")
    print(f"a chat of {LONG:,} messages shows its end after {statistics.median(taken):.0f} ms (median of {runs}, worst {max(taken):.0f})", flush=True)


def heap(page: Any) -> float:
    """MB in use in the page after a collection."""
    session = page.context.new_cdp_session(page)
    session.send("HeapProfiler.enable")
    session.send("HeapProfiler.collectGarbage")
    used = {each["name"]: each["value"] for each in _enabled(session).send("Performance.getMetrics")["metrics"]}["JSHeapUsedSize"]
    session.detach()
    return float(used) / 1e6


def _enabled(session: Any) -> Any:
    session.send("Performance.enable")
    return session


def growth(bench: Bench, page: Any, owner: Identity) -> None:
    """The page's heap before and after a long reply."""
    open_chat(page, bench, bench.fill(owner, 10))
    bench.backend.tokens = 50
    ask(bench, page, LAST)  # what a first reply makes once is no growth
    before = heap(page)
    bench.backend.tokens = LONG_REPLY
    ask(bench, page, LAST)
    after = heap(page)
    print(f"heap of the page after a reply of {LONG_REPLY:,} tokens: {after - before:+.1f} MB ({before:.1f} -> {after:.1f})", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--browser", default=str(system.find_browser() or ""))
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        bench = Bench(Path(folder), arguments.tokens)
        flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
        flags += ["--disable-component-update", "--disable-sync"]
        browser = playwright.chromium.launch(executable_path=arguments.browser, args=flags)
        context = browser.new_context(viewport={"width": 1200, "height": 800})
        page = context.new_page()
        page.goto(bench.url)
        cookies = {cookie["name"]: cookie["value"] for cookie in context.cookies()}
        owner = bench.auth.identify(cookies)
        assert owner, json.dumps(sorted(cookies))
        measure(bench, page, owner, arguments.runs)
        opening(bench, page, owner, max(arguments.runs, 5))
        page.set_default_timeout(300_000)
        growth(bench, page, owner)
        browser.close()
        bench.app.close()


if __name__ == "__main__":
    main()
