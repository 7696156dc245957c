"""Computing a chat's prompt ahead of the message, while the user types: time to first token with it over without."""

from __future__ import annotations

from benchmarks.engine.harness import Bench, Check, Stream, median_of, say, title

MESSAGE, REPLY = 12, 8


def measure(bench: Bench) -> list[Check]:
    """See the module."""
    rounds, length = bench.few(2 * bench.runs, 2), bench.few(1500, 300)
    title(f"ahead: chats of {length} tokens and a message of {MESSAGE}, each chat new, {rounds} with and {rounds} without, in turn")
    without, ahead, reused = [], [], []
    with bench.ours() as ours:
        ours.run(Stream(bench.prompts.fresh(64), 8))
        for _ in range(rounds):
            plain = Stream(bench.prompts.fresh(length + MESSAGE), REPLY)
            ours.run(plain)
            if plain.timings.reused_tokens:
                raise RuntimeError("A new chat was found in the cache: the comparison would not be fair.")
            without.append(plain.first)
            chat = bench.prompts.fresh(length)
            ours.prefill(Stream(chat, 1))
            prepared = Stream((*chat, *bench.prompts.more(MESSAGE)), REPLY)
            ours.run(prepared)
            ahead.append(prepared.first)
            reused.append(prepared.timings.reused_tokens)
    ratio = median_of(ahead) / median_of(without)
    say(
        f"first token: without {median_of(without) * 1000:.1f} ms, ahead {median_of(ahead) * 1000:.1f} ms; ratio {ratio:.3f}; "
        f"reused tokens: median {median_of(reused):.0f}, least {min(reused)}"
    )
    return [Check("ahead: time to first token with prefill-ahead over without", ratio, 0.15, at_least=False)]
