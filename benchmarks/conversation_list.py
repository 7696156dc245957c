"""Times of the conversation list, its search, a long chat's newest page and the save of a running reply, on a generated store.

    python -m benchmarks.conversation_list [--conversations 10000] [--messages 20] [--seed 1]

Two thirds of the conversations lie in FOLDERS folders, half have tags (one common, one of TAGS), one in 200 is pinned.

Words are drawn with a natural language's frequencies (Zipf), about 40 a message, so that a common word stands in nearly every conversation.
Prints milliseconds: the median of 20 and the worst.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from modules.conversation import Conversation, Message, Role, State, new_id
from modules.store import Store

OWNER = "benchmark"
LONG = 1000
"""Messages of the long conversation."""
HAN = "的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后"
RARE = "quetzalcoatl"
FOLDERS, TAGS = 20, 100


def vocabulary(random_: random.Random, size: int = 20_000) -> list[str]:
    """Made-up words, shorter ones first, as frequent words are short."""
    syllables = [a + b for a in "bcdfghjklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "in", "on", "st")]
    return ["".join(random_.choices(syllables, k=1 + (i > 50) + (i > 3000))) + random_.choice(("", "s", "ed", "ing")) for i in range(size)]


def conversations(count: int, messages: int, random_: random.Random) -> Iterator[Conversation]:
    """`count` conversations of `messages` each, one message in 200 in Chinese, one in 50,000 with the rare word."""
    words = vocabulary(random_)
    weights = list(itertools.accumulate(1 / (rank + 2) for rank in range(len(words))))
    for number in range(count):
        # The title holds no word that is searched for: title hits would fill the page and hide the cost of the messages.
        made = _conversation(f"Conversation {number}", messages, words, weights, random_)
        folder = f"folder {number % FOLDERS}" if number % 3 else ""
        tags = ("common", f"tag {number // 2 % TAGS}") if number % 2 else ()
        yield replace(made, folder=folder, tags=tags, pinned=number % 200 == 0)


def _conversation(title: str, count: int, words: list[str], weights: list[float], random_: random.Random) -> Conversation:
    tree: dict[str, Message] = {}
    parent: str | None = None
    roles: tuple[Role, Role] = ("user", "assistant")
    for turn in range(count):
        text = " ".join(random_.choices(words, cum_weights=weights, k=random_.randint(10, 70)))
        if random_.random() < 1 / 200:
            text = "".join(random_.choices(HAN, k=60))
        if random_.random() < 1 / 50_000:
            text += f" {RARE}"
        message = Message(new_id(), parent, roles[turn % 2], text, created=time.time())
        tree[message.id], parent = message, message.id
    return Conversation(new_id(), OWNER, title, tree, parent)


def report(name: str, action: Callable[[], object], repeats: int = 20) -> float:
    """Print and return the median of `action` in milliseconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append((time.perf_counter() - start) * 1000)
    print(f"{name:<46} median {statistics.median(times):8.2f}   worst {max(times):8.2f}")
    return statistics.median(times)


def queries(random_: random.Random) -> dict[str, str]:
    """Queries of every kind that a person types, by what they are."""
    words = vocabulary(random_)
    common, medium = words[0], words[500]
    return {
        "common word": common,
        "medium word": medium,
        "rare word": RARE,
        "two common words": f"{words[1]} {words[2]}",
        "common and rare word": f"{common} {RARE}",
        "five common words": " ".join(words[1:6]),
        "prefix of 1 letter": common[:1],
        "prefix of 2 letters": common[:2],
        "prefix of 3 letters": medium[:3],
        "prefix of 4 letters": words[5000][:4],
        "Chinese, 1 character": HAN[5],
        "Chinese, 2 characters": HAN[5:7],
        "word of every title": "conversation",
        "no hit": "xyzzyplugh",
        "second page of a common word": common,
    }


def measure(path: Path, store: Store, seed: int) -> None:
    """Print all figures of the store at `path`."""
    start = time.perf_counter()
    cold = Store.open(path)
    cold.conversations(OWNER)
    print(f"{'open the file and list, first time':<46}        {(time.perf_counter() - start) * 1000:8.2f}")
    cold.close()
    report("list, first page", lambda: store.conversations(OWNER))
    second = store.conversations(OWNER).next
    report("list, second page", lambda: store.conversations(OWNER, before=second))
    report("list, a folder", lambda: store.conversations(OWNER, folder="folder 3"))
    report("list, those in no folder", lambda: store.conversations(OWNER, folder=""))
    report("list, a common tag", lambda: store.conversations(OWNER, tag="common"))
    report("list, a rare tag", lambda: store.conversations(OWNER, tag="tag 7"))
    report("list, a folder and a tag", lambda: store.conversations(OWNER, folder="folder 4", tag="common"))
    report("names of folders and tags, with counts", lambda: store.folders(OWNER))
    for name, query in queries(random.Random(seed)).items():
        before = store.conversations(OWNER, query).next if name.startswith("second") else None
        hits = len(store.conversations(OWNER, query, before=before).items)
        report(f"search, {name} ({hits} rows)", lambda query=query, before=before: store.conversations(OWNER, query, before=before))  # type: ignore[misc]
    common = queries(random.Random(seed))["common word"]
    report("search, common word in a folder", lambda: store.conversations(OWNER, common, folder="folder 3"))
    report("search, common word with a rare tag", lambda: store.conversations(OWNER, common, tag="tag 7"))
    some = [item.id for item in store.conversations(OWNER).items]
    report("pin and tag 50 conversations", lambda: store.arrange(OWNER, some, pinned=True, add_tags=["new"]))
    report("delete a conversation and undo it", lambda: store.restore(OWNER, store.delete(OWNER, some[0])))


def measure_long(store: Store, random_: random.Random) -> None:
    """Print the figures of one conversation of LONG messages."""
    long = next(conversations(1, LONG, random_))
    store.import_conversations(OWNER, [long])
    report(f"newest 40 of {LONG} messages", lambda: store.messages(OWNER, long.id))
    report(f"all {LONG} messages", lambda: store.conversation(OWNER, long.id))
    _, reply = long.add("assistant", "", state="running")
    store.add(OWNER, long.id, [reply], reply.id)

    def save(state: State) -> None:
        text = " ".join(random_.sample(long.messages[long.tip or ""].text.split(), k=10))
        store.save(replace(reply, text=(text * 100)[:4000], state=state))

    report("the tree view's beginnings", lambda: store.tree(OWNER, long.id))
    report("save a running reply of 4,000 characters", lambda: save("running"))
    report("end a reply of 4,000 characters", lambda: save("done"))


def main(argv: list[str]) -> None:
    """Generate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--conversations", type=int, default=10_000)
    parser.add_argument("--messages", type=int, default=20, help="a conversation")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "conversations.sqlite3")
        store = Store.open(path)
        start = time.perf_counter()
        store.import_conversations(OWNER, conversations(arguments.conversations, arguments.messages, random.Random(arguments.seed)))
        seconds = time.perf_counter() - start
        print(
            f"{arguments.conversations * arguments.messages} messages generated and stored in {seconds:.1f} s, "
            f"{path.stat().st_size >> 20} MiB. Milliseconds:"
        )
        measure(path, store, arguments.seed)
        measure_long(store, random.Random(arguments.seed))
        store.close()


if __name__ == "__main__":
    main(sys.argv[1:])
