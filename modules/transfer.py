"""Conversations to and from files: our own JSON, Markdown for readers, and what other programs export.

`read` recognises a format by its content, never by the file's name. Files come from anywhere, so everything in them is bounded and checked;
whatever is wrong becomes one DataError that says where and what to do. Ids are always new: an import never overwrites. Pure: no storage here.

What other programs know and a Message does not is left out: pictures, tool calls and their results, the contents of attached files (their
names stay in `details["attachments"]`). SillyTavern's system lines, which also hold what was hidden there, become system messages.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from typing import Any, get_args, get_type_hints

from markdown_it import MarkdownIt

from modules.conversation import Conversation, Message, Role, State, Summary, new_id
from modules.errors import DataError, NameError_
from modules.paths import safe_name
from modules.replies import Stats
from modules.store import MAX_TAGS, clean, clean_name, clean_title, title_from
from modules.streams import ReasoningSplitter

FORMAT, VERSION = "tgw-conversations", 1
MAX_BYTES = 128 * 1024 * 1024
MAX_CONVERSATIONS = 50_000
MAX_MESSAGES = 500_000
"""In one file."""
_MAX_VALUES = 10_000_000  # brackets and commas: a small file may not become gigabytes of empty lists
_MAX_DEPTH = 32  # of lists and mappings in a message's details
_MAX_FILE_NAME = 120  # bytes, without the ending
_MAX_PARSED = 100_000  # characters; a longer text is quoted in Markdown without a look at its headings
_LAST_SECOND = 253_402_300_799  # of the year 9999


class _Fault(Exception):
    """What is wrong with the file, and what to do; `read` puts the file's name before it."""

    def __init__(self, problem: str, fix: str = "Export it again, or repair this place in a text editor.") -> None:
        super().__init__(f"{problem}. {fix}")


class _Tree:
    """A conversation while it is read. `title` None: made from the first words, after the name of `speaker`."""

    def __init__(self, title: str | None = None, speaker: str = "") -> None:
        self.title = title
        self.speaker = speaker
        self.messages: dict[str, Message] = {}
        self.tip: str | None = None
        self.settings: dict[str, Any] = {}
        self.folder = ""
        self.tags: tuple[str, ...] = ()
        self.pinned = False
        self.summary: Summary | None = None

    def add(self, parent: str | None, message: Message) -> str:
        if len(self.messages) >= MAX_MESSAGES:
            raise _too_many()
        id = new_id()
        self.messages[id] = replace(message, id=id, parent=parent)
        return id

    def add_versions(self, shown: Message, others: Sequence[Message], index: object) -> None:
        """Below the tip: all versions with text as siblings. The one that was shown (see `_choose`) becomes the tip."""
        versions, place = _choose(shown, others, index)
        ids = [self.add(self.tip, _thought(version)) for version in versions]
        self.tip = ids[place] if ids else self.tip

    def conversation(self, owner: str, name: str) -> Conversation:
        title = self.title
        if title is None:
            words = [m.text for m in self.messages.values() if m.role == "user"] or [m.text for m in self.messages.values()]
            title = title_from(": ".join(filter(None, (self.speaker, *words[:1])))) or name
        arranged = self.settings, self.folder, self.tags, self.pinned, self.summary
        return Conversation(new_id(), owner, clean_title(title), self.messages, self.tip, *arranged)


def read(data: bytes, name: str, owner: str) -> list[Conversation]:
    """The conversations in a file, ready for `Store.import_conversations`: new ids, parents before children; at least one.

    Reads our own JSON, histories of the earlier system, SillyTavern chats (JSONL) and ChatGPT's conversations.json. `name` is the file's,
    for messages. Raises DataError, whose text says what to do, when the file is none of these, damaged, or too large; then nothing is read.
    """
    label = clean_title(re.split(r"[/\\]", name[-1000:])[-1])[:80] or "The file"
    result: list[Conversation] = []
    messages = 0
    try:
        for tree in _trees(_document(_decoded(data))):
            messages += len(tree.messages)
            if messages > MAX_MESSAGES or len(result) >= MAX_CONVERSATIONS:
                raise _too_many()
            result.append(tree.conversation(owner, label))
        if not result:
            raise _Fault("it holds no message with text", "Choose another file.")
    except _Fault as fault:
        raise DataError(f"{label} was not imported: {fault}") from None
    return result


def to_json(conversations: Iterable[Conversation]) -> str:
    """Everything about the conversations except their owners and what explains their replies, for `read`.

    What JSON cannot hold in details is kept as its text, NaN as null.
    """
    whole = [_entry(conversation) for conversation in conversations]
    return clean(json.dumps({"format": FORMAT, "version": VERSION, "conversations": whole}, ensure_ascii=False))


def _entry(conversation: Conversation) -> dict[str, Any]:
    c = conversation
    summary = vars(c.summary) if c.summary else None
    arranged = {"folder": c.folder, "tags": list(c.tags), "pinned": c.pinned, "settings": _plain(c.settings), "summary": summary}
    messages = [{**vars(m), "details": _plain(m.details)} for m in c.messages.values()]
    return {"title": c.title, **{name: value for name, value in arranged.items() if value}, "tip": c.tip, "messages": messages}


def file_name(title: str) -> str:
    """A file's name without its ending, usable on every system, made of a conversation's title."""
    name = re.sub(r'[<>:"/\\|?*]+', " ", "".join(c for c in unicodedata.normalize("NFKC", clean_title(title)) if unicodedata.category(c) != "Cf"))
    while len(name.encode()) > _MAX_FILE_NAME:
        name = name[:-1]
    name = " ".join(name.split()).strip(" .")
    try:
        return safe_name(name)
    except NameError_:
        return "conversation"


# Recognising


def _too_many() -> _Fault:
    return _Fault(f"it holds more than {MAX_MESSAGES} messages or {MAX_CONVERSATIONS} conversations", "Split it into several files.")


def _decoded(data: bytes) -> str:
    if len(data) > MAX_BYTES:
        raise _Fault(f"it is larger than {MAX_BYTES >> 20} MiB", "Split it into several files.")
    try:
        # surrogatepass: some programs write halves of a character; `clean` replaces them later.
        text = data.decode(json.detect_encoding(data), "surrogatepass")
    except UnicodeDecodeError:
        raise _Fault("it is not text in Unicode", "If it is a chat, open it in a text editor and save it as UTF-8.") from None
    if sum(map(text.count, "[{,")) > _MAX_VALUES:
        raise _Fault(f"it holds more than {_MAX_VALUES} values", "Split it into several files.")
    return text


def _document(text: str) -> Any:
    """The JSON value in the text; of several values (one a line, for example) the list of them."""
    values: list[Any] = []
    words, decode = re.compile(r"[^ \t\r\n]"), json.JSONDecoder().raw_decode
    found = words.search(text)
    try:
        while found:
            value, end = decode(text, found.start())
            values.append(value)
            if len(values) > MAX_MESSAGES:
                raise _too_many()
            found = words.search(text, end)
    except RecursionError:
        raise _Fault("its brackets are nested too deeply", "Choose another file.") from None
    except ValueError as error:
        why = str(error) if isinstance(error, json.JSONDecodeError) else "a number in it has thousands of digits"
        if text.lstrip().startswith(("#", "**")):
            raise _Fault("it looks like Markdown, which is for reading only", "Import the JSON export of the chat.") from None
        raise _Fault(f"it is not the JSON of a chat ({why})") from None
    return values[0] if len(values) == 1 else values


def _trees(document: Any) -> Iterator[_Tree]:
    entries = document if isinstance(document, list) else [document]
    first = _maybe(dict, entries[0] if entries else None)
    if "mapping" in first:
        return _chatgpt(entries)
    if not first.keys().isdisjoint(("user_name", "character_name", "chat_metadata")):
        return _sillytavern(entries)
    if first is document and first.get("format") == FORMAT:
        return _own(first)
    if first is document and any(isinstance(first.get(key), list) for key in _ROWS):
        return _earlier(first)
    known = "an export of this program, a history of text-generation-webui, a SillyTavern chat, or ChatGPT's conversations.json"
    raise _Fault("it is no kind of chat file known here", f"Choose {known}.")


# Our own format


def _own(document: dict[str, Any]) -> Iterator[_Tree]:
    version = document.get("version")
    if isinstance(version, int) and version > VERSION:
        raise _Fault(f"a newer version of this program wrote it (format {version}, here {VERSION})", "Update this program.")
    for number, entry in enumerate(_field(document, "conversations", list, "the file"), 1):
        where = f"conversation {number}"
        tree = _Tree(_field(entry, "title", str, where))
        new: dict[str | None, str | None] = {None: None}
        for place, item in enumerate(_field(entry, "messages", list, where), 1):
            spot = f"{where}, message {place}"
            id, parent = _field(item, "id", str, spot), item.get("parent")
            if id in new or not isinstance(parent, str | None) or parent not in new:
                raise _Fault(f"{spot}: its id is there twice, or its parent does not stand before it")
            new[id] = tree.add(new[parent], _own_message(item, spot))
        tip = entry.get("tip")
        if not isinstance(tip, str | None) or tip not in new:
            raise _Fault(f"{where}: its tip is none of its messages")
        tree.tip = new[tip]
        tree.settings = _plain(_bounded(_maybe(dict, entry.get("settings")), f"{where}: its settings"))
        summary = _maybe(dict, entry.get("summary"))
        text, after = clean(_maybe(str, summary.get("text"))), new.get(_maybe(str, summary.get("after")))
        tree.summary = Summary(text, after) if text and after else None
        tree.folder, tree.pinned = clean_name(_maybe(str, entry.get("folder"))), entry.get("pinned") is True
        names = {clean_name(name) for name in _maybe(list, entry.get("tags"))[:MAX_TAGS] if isinstance(name, str)}
        tree.tags = tuple(sorted(names - {""}))
        yield tree


def _own_message(item: dict[str, Any], where: str) -> Message:
    item = {"reasoning": "", "state": "done", "details": {}, **item}
    role, state, text, reasoning = (_field(item, key, str, where) for key in ("role", "state", "text", "reasoning"))
    if role not in get_args(Role) or state not in get_args(State):
        raise _Fault(f"{where}: its role or state is unknown")
    ended: State = "interrupted" if state == "running" else state
    details = _details(_field(item, "details", dict, where), where)
    return Message("", None, role, clean(text), clean(reasoning), _time(item.get("created")), ended, details)


def _field(entry: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
        raise _Fault(f"{where}: {key!r} is missing or of the wrong kind")
    return entry[key]


_SHOWN_DETAILS = {  # what the page and the turns rely on
    **dict.fromkeys(("model", "error", "name", "group", "preset"), str),
    **dict.fromkeys(("seed", "dropped_messages", "begins", "began_thinking"), int),
}
_STATS = get_type_hints(Stats)  # so is this: another kind of value is left out


def _bounded(values: dict[str, Any], what: str) -> dict[str, Any]:
    level: list[Any] = [values]
    for _ in range(_MAX_DEPTH):
        level = [v for value in level for v in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())]
    if level:
        raise _Fault(f"{what} are nested too deeply")
    return values


def _details(details: dict[str, Any], where: str) -> dict[str, Any]:
    plain = _plain(_bounded(details, f"{where}: its details"))
    kept = {key: value for key, value in plain.items() if value is None or _is(value, _SHOWN_DETAILS.get(key, object))}
    stats = {key: value for key, value in _maybe(dict, kept.pop("stats", None)).items() if key in _STATS and _is(value, _STATS[key])}
    return {**kept, "stats": stats} if stats else kept


def _is(value: object, kind: Any) -> bool:
    """isinstance, where a whole number is also a float and a truth value is no number."""
    if isinstance(value, bool):
        return kind is object
    return isinstance(value, kind) or (isinstance(value, int) and isinstance(0.0, kind))


def _plain(details: Mapping[str, Any]) -> dict[str, Any]:
    """A copy made of JSON values only: no lone surrogates, nothing infinite."""
    text = json.dumps(dict(details), ensure_ascii=False, default=lambda v: dict(v) if isinstance(v, Mapping) else str(v))
    plain: dict[str, Any] = json.loads(clean(text), parse_constant=lambda _: None)
    return plain


# Other programs


def _text(value: object, where: str) -> str:
    if not isinstance(value, str | None):
        raise _Fault(f"{where}: its text is of the wrong kind")
    return clean(value or "")


def _maybe(kind: type[Any], value: object) -> Any:
    """What is optional in a file: something of another kind counts as absent, an empty `kind`."""
    return value if isinstance(value, kind) else kind()


def _named(**details: object) -> dict[str, Any]:
    """Those details that are a name."""
    return {key: clean_title(value) for key, value in details.items() if isinstance(value, str) and value}


def _time(value: object) -> float:
    """Seconds since the epoch, from a number (of seconds or milliseconds) or a date as the programs write it; 0.0 when unknown."""
    if isinstance(value, str):
        value = _date(value[:60].strip())
    if not isinstance(value, int | float) or isinstance(value, bool):
        return 0.0
    seconds = value / 1000 if 1e11 < value < 1e15 else value
    return float(seconds) if 0 <= seconds <= _LAST_SECOND else 0.0


def _date(text: str) -> float:
    if text.isascii() and text.isdigit():
        return float(text)
    compact = "".join(re.sub(r"\d+ms$", "", text).split())
    for form in ("", "%b%d,%Y%H:%M", "%B%d,%Y%I:%M%p", "%Y-%m-%d@%Hh%Mm%Ss"):
        try:
            moment = datetime.strptime(compact, form) if form else datetime.fromisoformat(text.replace("Z", "+00:00"))
            return moment.timestamp()  # without a zone: this computer's
        except (ValueError, OverflowError, OSError):
            continue
    return 0.0


def _thought(message: Message) -> Message:
    """An assistant's message with thinking at the beginning of its text told apart."""
    if message.role != "assistant" or message.reasoning:
        return message
    splitter = ReasoningSplitter()
    deltas = [*splitter.feed(message.text), *splitter.finish()]
    return replace(message, text="".join(d.text for d in deltas), reasoning="".join(d.reasoning for d in deltas).rstrip("\r\n"))


def _choose(shown: Message, others: Sequence[Message], index: object) -> tuple[list[Message], int]:
    """The versions that have text, and which of them was shown: `index` of the others says so, but the shown text wins over it."""
    marked = others[index] if isinstance(index, int) and 0 <= index < len(others) else shown
    wanted = shown.text or marked.text
    kept = [version for version in others if version.text]
    same = [place for place, version in enumerate(kept) if version.text == wanted]
    if not same:
        kept += [shown] if shown.text else []
        return kept, len(kept) - 1
    place = next((place for place in same if kept[place] is marked), same[0])
    one = kept[place]
    details = {**shown.details, **one.details}
    kept[place] = replace(one, created=one.created or shown.created, reasoning=one.reasoning or shown.reasoning, details=details)
    return kept, place


_ROWS = ("internal", "data", "visible", "data_visible")
_GREETING = "<|BEGIN-VISIBLE-CHAT|>"


def _earlier(document: dict[str, Any]) -> Iterator[_Tree]:
    """The earlier system: rows of [user, assistant]. `visible` is escaped for HTML, so it is read only where nothing else is there."""
    key = next(key for key in _ROWS if isinstance(document.get(key), list))
    metadata = _maybe(dict, document.get("metadata"))
    tree = _Tree()
    roles: tuple[Role, Role] = ("user", "assistant")
    for number, row in enumerate(document[key]):
        where = f"row {number + 1}"
        if not isinstance(row, list):
            raise _Fault(f"{where} is not a pair of user and assistant")
        for role, value in zip(roles, row, strict=False):
            text = html.unescape(_text(value, where)) if "visible" in key else _text(value, where)
            notes = _maybe(dict, metadata.get(f"{role}_{number}"))
            files = [_named(name=_maybe(dict, item).get("name")).get("name") for item in _maybe(list, notes.get("attachments"))]
            details = {**_named(model=notes.get("model_name")), **({"attachments": [*filter(None, files)]} if any(files) else {})}
            if role == "assistant" and row[0] == _GREETING:
                details["greeting"] = True
            shown = Message("", None, role, text, created=_time(notes.get("timestamp")), details=details)
            versions = [_earlier_version(role, _maybe(dict, item), where) for item in _maybe(list, notes.get("versions"))]
            if text != _GREETING:
                tree.add_versions(shown, versions, notes.get("current_version_index"))
    if tree.messages:
        yield tree


def _earlier_version(role: Role, entry: dict[str, Any], where: str) -> Message:
    text = _text(entry.get("content"), where) or html.unescape(_text(entry.get("visible_content"), where))
    return Message("", None, role, text, created=_time(entry.get("timestamp")))


def _sillytavern(lines: Sequence[Any]) -> Iterator[_Tree]:
    """A header, then a message a line, with its swipes."""
    character = _maybe(str, lines[0].get("character_name"))
    tree = _Tree(speaker="" if character == "unused" else character)
    for number, line in enumerate(lines[1:], 1):
        where = f"message {number}"
        if not isinstance(line, dict):
            raise _Fault(f"{where} is not an object")
        swipes = [_text(swipe, where) for swipe in _maybe(list, line.get("swipes"))]
        infos = [_maybe(dict, info) for info in _maybe(list, line.get("swipe_info"))] + [{}] * len(swipes)
        others = [_swipe(text, info, line) for text, info in zip(swipes, infos, strict=False)]
        tree.add_versions(_swipe(_text(line.get("mes"), where), line, line), others, line.get("swipe_id"))
    if tree.messages:
        yield tree


def _swipe(text: str, info: dict[str, Any], line: dict[str, Any]) -> Message:
    role: Role = "system" if line.get("is_system") is True else "user" if line.get("is_user") is True else "assistant"
    extra = _maybe(dict, info.get("extra"))
    details = _named(model=extra.get("model"), name=line.get("name"))
    return Message("", None, role, text, clean(_maybe(str, extra.get("reasoning"))), _time(info.get("send_date")), details=details)


def _chatgpt(entries: Sequence[Any]) -> Iterator[_Tree]:
    """Trees of nodes. Those without text for a reader are skipped; their children hang on the nearest ancestor that was kept."""
    for number, entry in enumerate(entries, 1):
        if number > MAX_CONVERSATIONS:
            raise _too_many()  # those without text cost time too
        mapping = {id: _maybe(dict, node) for id, node in _field(entry, "mapping", dict, f"conversation {number}").items()}
        tree = _Tree(_maybe(str, entry.get("title")).strip() or None)
        below = _children(mapping)
        kept: dict[str, str | None] = {}
        waiting: list[tuple[str, str | None]] = [(id, None) for id in reversed(below[None])]
        while waiting:
            id, parent = waiting.pop()
            said = _said(_maybe(dict, mapping[id].get("message")))
            kept[id] = tree.add(parent, said) if said else parent
            waiting += [(child, kept[id]) for child in reversed(below[id])]
        if len(kept) < len(mapping):
            raise _Fault(f"conversation {number}: messages in it are their own ancestors", "Export it again.")
        tree.tip = kept.get(_maybe(str, entry.get("current_node"))) or next(reversed(tree.messages), None)
        if tree.messages:
            yield tree


def _children(mapping: Mapping[str, dict[str, Any]]) -> defaultdict[str | None, list[str]]:
    """Ids below each id, and below None the roots. Parents decide what hangs where, `children` only in which order."""
    lists = (_maybe(list, node.get("children")) for node in mapping.values())
    rank = {child: place for children in lists for place, child in enumerate(children) if isinstance(child, str)}
    below: defaultdict[str | None, list[str]] = defaultdict(list)
    for id in sorted(mapping, key=lambda id: rank.get(id, 0)):
        parent = mapping[id].get("parent")
        below[parent if isinstance(parent, str) and parent in mapping else None].append(id)
    return below


def _said(message: dict[str, Any]) -> Message | None:
    content, author, notes = (_maybe(dict, message.get(key)) for key in ("content", "author", "metadata"))
    role = author.get("role")
    if role not in get_args(Role) or content.get("content_type") not in ("text", "multimodal_text"):
        return None
    parts = [part.get("text") if isinstance(part, dict) else part for part in _maybe(list, content.get("parts"))]
    text = clean("\n".join(part for part in parts if isinstance(part, str) and part))
    if not text.strip() or notes.get("is_visually_hidden_from_conversation") is True:
        return None
    details = _named(model=notes.get("model_slug")) if role == "assistant" else {}
    return Message("", None, role, text, created=_time(message.get("create_time")), details=details)


# Markdown


def to_markdown(conversation: Conversation) -> str:
    """The branch shown: the title as heading 1, who speaks as heading 2, thinking folded and quoted.

    Texts stay the Markdown they are, but their headings sink by two levels and a code fence left open is closed. A text that would still
    change what follows it (an open HTML comment, say) is quoted as a whole, which every Markdown reader ends by itself.
    """
    title = re.sub(r"([\\`*_\[\]<>#&|~])", r"\\\1", clean_title(conversation.title))
    parts = [f"# {title or 'Conversation'}"]
    for message in conversation.path():
        parts.append(f"## {message.role.capitalize()}")
        text, reasoning = (re.sub(r"\r\n?", "\n", clean(said)).strip("\n") for said in (message.text, message.reasoning))
        if reasoning.strip():
            parts.append(f"<details>\n<summary>Thinking</summary>\n\n{_quoted(reasoning)}\n\n</details>")
        if text.strip():
            parts.append(_within_section(text))
    return "\n\n".join(parts) + "\n"


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.split("\n"))


def _within_section(text: str) -> str:
    if len(text) <= _MAX_PARSED:
        lower = _lowered(text)
        fence = next((f"\n{token.markup}" for token in _blocks().parse(lower)[-1:] if token.type == "fence"), "")
        for closed in (lower, lower + fence):
            if _is_contained(closed):
                return closed
    return _quoted(text)


@lru_cache(1)
def _blocks() -> MarkdownIt:
    return MarkdownIt("commonmark").disable(["inline", "text_join"])


def _headings(text: str) -> list[tuple[int, int, int]]:
    """Level, first line and line after the last of each heading that is not within a list or a quotation."""
    tokens = _blocks().parse(text)
    return [(int(token.tag[1]), token.map[0], token.map[1]) for token in tokens if token.type == "heading_open" and not token.level and token.map]


def _lowered(text: str) -> str:
    lines = text.split("\n")
    for level, start, end in reversed(_headings(text)):
        words = " ".join(line.strip() for line in lines[start : end - 1]) or lines[start].strip().lstrip("#").strip()
        lines[start:end] = [f"{'#' * min(level + 2, 6)} {words}".rstrip()]
    return "\n".join(lines)


def _is_contained(text: str) -> bool:
    """Whether a heading put after the text is one, and the text itself has none of our levels."""
    last = text.count("\n") + 2
    return [heading for heading in _headings(f"{text}\n\n# next") if heading[0] < 3] == [(1, last, last + 1)]
