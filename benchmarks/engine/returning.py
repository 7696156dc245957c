"""Going back to an old chat: 30 chats visited round robin with cells for five, the others in main memory.

At each visit a short message is sent, answered, and the same message sent again: the first finds its chat in main memory, the second in cells.
"""

from __future__ import annotations

from benchmarks.engine.harness import CONTEXT, Bench, Check, Ours, Stream, Subject, median_of, say, title
from benchmarks.engine.references import llama_server

MESSAGE, REPLY = 12, 16


def measure(bench: Bench) -> list[Check]:
    """See the module."""
    chats, length, cells = bench.few(30, 6), bench.few(1500, 200), bench.few(CONTEXT, 768)
    title(f"return: {chats} chats of {length} tokens, round robin, {cells} cells")
    with bench.ours(cache_ram=4096, ctx_size=cells) as ours:
        ratio = tour(bench, ours, chats, length)
        stats = ours.idle()
        say(f"{'':<16} hits in cells {stats.cache_hits_cells}, in main memory {stats.cache_hits_memory}, nowhere {stats.cache_misses}; in main")
        say(f"{'':<16} memory {stats.spilled_sequences} sequences of {stats.spilled_bytes >> 20} MiB; engine {stats.memory_bytes >> 20} MiB")
    with llama_server(bench, 4, ["-kvu", "-c", str(cells)]) as server:
        if server:
            tour(bench, server, chats, length)
    return [Check("return: time to first token back in a chat over one still in cells", ratio, 1.3, at_least=False)]


def tour(bench: Bench, subject: Subject, chats: int, length: int) -> float:
    """Visit all chats; the ratio of the medians."""
    message = bench.prompts.more(MESSAGE)
    texts = [list(bench.prompts.fresh(length)) for _ in range(chats)]
    computed = [_send(subject, text, message).first for text in texts]
    back, still, reused = [], [], []
    for _ in range(bench.few(2, 1)):
        for text in texts:
            before = len(text)
            stream = _send(subject, text, message)
            back.append(stream.first)
            reused.append(stream.timings.reused_tokens / before)
            still.append(_send(subject, text, message).first)
    ratio = median_of(back) / median_of(still)
    say(
        f"{subject.name:<16} first token: computed {median_of(computed) * 1000:7.1f} ms   on return {median_of(back) * 1000:6.1f} ms (worst "
        f"{max(back) * 1000:.1f})   still in cells {median_of(still) * 1000:6.1f} ms   ratio {ratio:.3f}"
        + (f", reused on return: least {min(reused):.2f} of the chat" if isinstance(subject, Ours) else "")
    )
    return ratio


def _send(subject: Subject, text: list[int], message: tuple[int, ...]) -> Stream:
    """Send a message in a chat and put both it and the reply at the chat's end."""
    stream = Stream((*text, *message), REPLY)
    subject.run(stream)
    text += [*message, *stream.tokens]
    return stream
