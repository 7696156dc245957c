"""From the click on Send to the first token painted, beside the engine's own time to first token, in a chat whose prompt was read ahead.

    python -m benchmarks.first_token MODEL.gguf [--tokens 1500] [--runs 20] [--browser /path/to/chromium]

The real server, engine and model in processes of their own, a real browser. The engine's own time is what it reports for the same reply: from
the request's arrival in it to the first token (waiting, reading the rest of the prompt, one token).
"""

from __future__ import annotations

import argparse
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from modules import system  # noqa: E402

CLICK = """
() => { window.tgwFirst = new Promise((done) => {
  const before = document.querySelectorAll('.tgw-msg.assistant').length;
  let began = 0;
  document.querySelector('.tgw-send').addEventListener('click', () => { began = performance.now(); }, { capture: true, once: true });
  const look = () => {
    const replies = document.querySelectorAll('.tgw-msg.assistant');
    if (began && replies.length > before && replies[replies.length - 1].querySelector('.tgw-block')?.textContent.trim()) {
      observer.disconnect();
      const painted = new MessageChannel();
      painted.port1.onmessage = () => done(performance.now() - began);
      requestAnimationFrame(() => painted.port2.postMessage(0));
    }
  };
  const observer = new MutationObserver(look);
  observer.observe(document.querySelector('#tgw-chat'), { childList: true, subtree: true, characterData: true });
}); }
"""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_served(url: str, server: subprocess.Popen[bytes]) -> None:
    """Until the page is served. Raises RuntimeError when the server ends, or after a minute."""
    for _ in range(600):
        if server.poll() is not None:
            raise RuntimeError("The server ended.")
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("The page was not served in a minute.")


def figures(page: Any, words: int) -> tuple[float, dict[str, Any]]:
    """One new chat with a message of about `words` words, then a second message after its prompt was read ahead: milliseconds, the reply's stats."""
    page.evaluate("() => { location.hash = ''; }")
    box = page.locator(".tgw-composer textarea")
    page.get_by_role("button", name="New chat").first.click()
    box.fill(f"{time.time_ns()} " + "The river went on to the sea and nobody asked it why. " * (words // 12))
    box.press("Enter")
    page.wait_for_function("() => document.querySelector('.tgw-msg.assistant') && document.querySelector('.tgw-send').dataset.mode === 'send'")
    box.press_sequentially("Tell me more of the river and of the sea", delay=20)
    page.wait_for_timeout(2500)  # a person reads what was typed; the prompt is computed meanwhile
    page.evaluate(CLICK)
    page.locator(".tgw-send").click()
    taken = float(page.evaluate("() => window.tgwFirst"))
    page.wait_for_function("() => document.querySelector('.tgw-send').dataset.mode === 'send'")
    id = page.evaluate("() => location.hash.slice(3)")
    view = page.evaluate("(id) => fetch(`chat/conversations/${id}`).then((answer) => answer.json())", id)
    return taken, view["messages"][-1]["stats"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--browser", default=str(system.find_browser() or ""))
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    port = free_port()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        (Path(folder) / "settings.yaml").write_text("auto_max_new_tokens: false\nmax_new_tokens: 12\n", "utf-8")
        command = [sys.executable, str(ROOT / "server.py"), "--user-data-dir", folder, "--listen-port", str(port)]
        command += ["--model", str(arguments.model.resolve()), "--model-dir", str(arguments.model.resolve().parent), "--ctx-size", "4096"]
        server = subprocess.Popen(command, cwd=ROOT)
        try:
            url = f"http://127.0.0.1:{port}"
            browser = playwright.chromium.launch(executable_path=arguments.browser, args=["--no-sandbox", "--disable-gpu", "--disable-quic"])
            page = browser.new_context(viewport={"width": 1200, "height": 800}).new_page()
            page.set_default_timeout(120_000)
            wait_served(url, server)
            page.goto(url)
            page.locator(".tgw-composer textarea").wait_for()
            page.wait_for_function("document.querySelector('.tgw-chip').dataset.state === 'ready'")
            rows = [figures(page, round(arguments.tokens * 0.8)) for _ in range(arguments.runs + 1)][1:]
            browser.close()
        finally:
            server.terminate()
            server.wait(30)
    report(rows)


def report(rows: list[tuple[float, dict[str, Any]]]) -> None:
    """Medians, and how much of the prompt came from the cache."""
    painted = statistics.median(taken for taken, _ in rows)
    own = [1000 * (stats["queue_seconds"] + stats["prefill_seconds"]) for _, stats in rows]
    engine, over = statistics.median(own), statistics.median(taken - alone for (taken, _), alone in zip(rows, own, strict=True))
    reused = statistics.median(stats["reused_tokens"] / stats["prompt_tokens"] for _, stats in rows)
    size = statistics.median(stats["prompt_tokens"] for _, stats in rows)
    print(f"prompts of {size:.0f} tokens, {100 * reused:.1f} % of them read ahead (medians of {len(rows)})")
    print(
        f"click to first token painted {painted:.1f} ms; the engine's own time to first token {engine:.1f} ms; over it {over:.1f} ms (wanted <= 60)"
    )


if __name__ == "__main__":
    main()
