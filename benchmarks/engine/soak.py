"""64 clients for ten minutes, random lengths, a third of the requests cancelled or left: no leak, no mixed text, every end accounted for.

Each client asks with a word of its own, many times over; greedily continued, the text goes on with that word, which is checked for each word alone
beforehand. Then any other word in a reply is another client's text. That no cell has leaked shows a prompt that needs all of them.
"""

from __future__ import annotations

import collections
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engine.harness import GREEDY, Bench, Check, Ours, Stream, made_up, median_of, percentile, say, title
from modules.backends.base import CancelToken, GenerationRequest
from modules.errors import Busy, UserError

CLIENTS, PARALLEL = 64, 8
SHORTEST = 12
"""Repetitions of the word in a prompt, at least."""
SAYING = "The word of the day is repeated here again and again, and nothing else is said: "


@dataclass
class Tally:
    """What all clients saw. Guarded by `lock`."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    submitted: int = 0
    ends: collections.Counter[str] = field(default_factory=collections.Counter)
    """By finish reason; "vanished" where the client left; "busy"; the error's name otherwise."""
    bad_ends: int = 0
    """Streams that ended without a finish reason, or with two."""
    mixed: list[str] = field(default_factory=list)
    own: int = 0
    """Replies with their own word in them."""
    pure: int = 0
    """Of these: with nothing else."""
    checked: int = 0
    """Replies long enough to hold it."""
    waits: list[float] = field(default_factory=list)

    def end(self, how: str) -> None:
        """Count an end."""
        with self.lock:
            self.ends[how] += 1


def measure(bench: Bench) -> list[Check]:
    """See the module."""
    minutes = 0.2 if bench.quick else bench.minutes
    clients, cells = bench.few(CLIENTS, 6), bench.few(4096, 768)
    longest = bench.few(90, 30)
    title(f"soak: {clients} clients for {minutes:g} minutes, {PARALLEL} at once, {cells} cells, cache in main memory 256 MiB")
    tally = Tally()
    with bench.ours(parallel=PARALLEL, ctx_size=cells, cache_ram=256, max_queue=2 * CLIENTS) as ours:
        words = reliable_words(ours, clients, longest)
        before = dict(ours.idle().finished)
        memory = _run(ours, words, longest, tally, minutes * 60)
        stats = ours.idle(30)
        leaked = _leaked(bench, ours, cells)
    ended = {reason: count - before.get(reason, 0) for reason, count in stats.finished.items()}
    early, late = _memory_at(memory, minutes * 12, minutes * 3), _memory_at(memory, minutes * 60, minutes * 6)
    say(f"submitted {tally.submitted}; ends as seen by the clients {dict(tally.ends)}; by the engine {ended}")
    say(f"waited for the first token: median {median_of(tally.waits):.1f} s, 99th percentile {percentile(tally.waits, 0.99):.1f} s")
    say(f"replies with their own word {tally.own} of {tally.checked} long enough for it, {tally.pure} with nothing else")
    say(f"replies with another's word {len(tally.mixed)} {tally.mixed[:3]}")
    say(
        f"resident memory {early / 2**20:.1f} MiB early, {late / 2**20:.1f} MiB late, {stats.spilled_bytes / 2**20:.1f} MiB of it sequences; "
        f"restarts {stats.restarts}, preemptions {stats.preemptions}, evictions {stats.evictions}; "
        f"from main memory {stats.cache_hits_memory}, from cells {stats.cache_hits_cells}"
    )
    lost = abs(tally.submitted - sum(tally.ends.values())) + tally.bad_ends
    grown = Check("soak: resident memory in the last minute over minute two", late / early, 1.02, at_least=False)
    return [
        Check("soak: requests that ended not exactly once, for their client", lost, 0, at_least=False),
        Check("soak: requests whose end the engine did not count, or counted twice", _uncounted(tally, ended), 0, at_least=False),
        Check("soak: errors other than busy", _errors(tally), 0, at_least=False),
        Check("soak: replies with another client's word", len(tally.mixed), 0, at_least=False),
        Check("soak: replies with their own word, of those long enough", tally.own / max(1, tally.checked), 1),
        Check("soak: cells in use that nothing explains, at the end", leaked, 0, at_least=False),
        Check("soak: engine restarts, and requests still there", stats.restarts + stats.busy_sequences + stats.waiting, 0, at_least=False),
        *([] if bench.quick else [grown]),  # in so short a time it is still filled
    ]


def _uncounted(tally: Tally, ended: dict[str, int]) -> int:
    """A refused request may be counted as an error or not at all."""
    counted, refused = sum(ended.values()), tally.ends["busy"]
    return max(0, tally.submitted - refused - counted, counted - tally.submitted)


def _errors(tally: Tally) -> int:
    return sum(count for how, count in tally.ends.items() if how not in ("stop", "length", "cancelled", "vanished", "busy"))


# --- words --------------------------------------------------------------------------------------------------------------------------------


def question(word: str, times: int) -> str:
    """A prompt after which the word comes again."""
    return SAYING + " ".join([word] * times)


def reliable_words(ours: Ours, count: int, longest: int) -> list[str]:
    """So many words, each of which comes again after the shortest and the longest question, alone."""
    random_ = random.Random(count)
    words: list[str] = []
    tried = 0
    while len(words) < count:
        word = made_up(random_)
        tried += 1
        apart = not any(word in other or other in word for other in words)
        if apart and all(only(word, _ask(ours, question(word, times), 24)) for times in (SHORTEST, longest)):
            words.append(word)
        if tried > 20 * count:
            raise RuntimeError(f"Only {len(words)} of {tried} words come again alone: this model cannot be asked this way.")
    say(f"{count} words that come again, alone, of {tried} tried: {', '.join(words[:5])}, …")
    return words


def only(word: str, text: str) -> bool:
    """Whether `text` is that word again and again, the last one perhaps cut off."""
    said = text.split()
    return len(said) > 1 and all(each == word for each in said[:-1]) and word.startswith(said[-1])


def _ask(ours: Ours, text: str, tokens: int) -> str:
    return "".join(chunk.text for chunk in ours.backend.generate(GenerationRequest(text, GREEDY, max_new_tokens=tokens)))


# --- the load -----------------------------------------------------------------------------------------------------------------------------


def _run(ours: Ours, words: list[str], longest: int, tally: Tally, seconds: float) -> list[tuple[float, int]]:
    """Let all clients ask until the time is over; (seconds, resident bytes of the engine) each second."""
    began = time.perf_counter()
    end = began + seconds
    threads = [threading.Thread(target=_client, args=(ours, words, i, longest, tally, end)) for i in range(len(words))]
    for thread in threads:
        thread.start()
    memory = []
    while time.perf_counter() < end:
        memory.append((time.perf_counter() - began, _resident(ours.backend.pid)))
        time.sleep(min(1.0, seconds / 60))
    for thread in threads:
        thread.join()
    return memory


def _client(ours: Ours, words: list[str], number: int, longest: int, tally: Tally, end: float) -> None:
    random_ = random.Random(number)
    while time.perf_counter() < end:
        cancel = CancelToken()
        text = question(words[number], random_.randint(SHORTEST, longest))
        request = GenerationRequest(text, GREEDY, max_new_tokens=random_.randint(8, 96), client=words[number], cancel=cancel)
        leaves = random_.random()
        timer, stay = None, None
        if leaves < 1 / 6:  # cancels, perhaps before it got its place
            timer = threading.Timer(random_.uniform(0, 4), cancel.cancel)
            timer.start()
        elif leaves < 1 / 3:  # vanishes after so many chunks
            stay = random_.randint(1, 40)
        with tally.lock:
            tally.submitted += 1
        _one(ours, request, stay, words, number, tally)
        if timer:
            timer.cancel()


def _one(ours: Ours, request: GenerationRequest, stay: int | None, words: list[str], number: int, tally: Tally) -> None:
    began, first, text, reasons, tokens = time.perf_counter(), 0.0, "", [], 0
    chunks: Any = ours.backend.generate(request)
    try:
        for count, chunk in enumerate(chunks, 1):
            text += chunk.text
            tokens += len(chunk.token_ids)
            first = first or (time.perf_counter() if chunk.token_ids else 0.0)
            reasons += [chunk.finish_reason] if chunk.finish_reason else []
            if count == stay and not reasons:
                break
    except Busy as error:
        tally.end("busy")
        time.sleep(error.retry_after)
        return
    except UserError as error:
        tally.end(type(error).__name__)
        return
    finally:
        chunks.close()
    tally.end(reasons[0] if reasons else "vanished")
    with tally.lock:
        tally.bad_ends += len(reasons) > 1 or (not reasons and stay is None)
        tally.waits += [first - began] if first else []
        others = [word for other, word in enumerate(words) if other != number and word in text]
        tally.mixed += [f"{words[number]}: {text[:80]!r}"] if others else []
        if tokens >= 24:
            tally.checked += 1
            tally.own += words[number] in text
            tally.pure += only(words[number], text)


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


def _memory_at(memory: list[tuple[float, int]], moment: float, window: float) -> float:
    """Median of the samples in the `window` seconds before `moment`."""
    return median_of([size for seconds, size in memory if moment - window <= seconds <= moment])


def _leaked(bench: Bench, ours: Ours, cells: int) -> int:
    """Cells that a prompt which needs all of them cannot have; what finished sequences keep must make room for it."""
    prompt = bench.prompts.fresh(cells - 1)
    try:
        ours.run(Stream(prompt, 1))
    except UserError as error:
        say(f"a prompt of {cells - 1} tokens after the soak: {error}")
        return cells
    stats = ours.idle()
    say(f"after a prompt of {len(prompt)} tokens: {stats.cells_used} of {stats.cells} cells in use, by {stats.cached_sequences} finished sequences")
    return max(0, int(stats.cells_used) - len(prompt) - 1)
