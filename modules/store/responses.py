"""Responses of the API that clients may come back to: each with its own input and the one it goes on from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from modules.errors import NotFound
from modules.store.database import Connection

MAX_RESPONSES = 1000
MAX_RESPONSES_SIZE = 2**29
"""Characters of all together."""
_CHAIN = """
    WITH RECURSIVE chain (number, previous, depth) AS (
        SELECT number, previous, 0 FROM responses WHERE id = ? AND client = ?
        UNION ALL SELECT r.number, r.previous, depth + 1 FROM responses r JOIN chain c ON r.id = c.previous AND r.client = ?
    )"""


@dataclass(frozen=True)
class StoredResponse:
    """One response. `items`: what was asked, as JSON objects; `body`: the answer as it was given."""

    id: str
    previous: str | None
    items: list[dict[str, Any]]
    body: dict[str, Any]


def chain(db: Connection, client: str, id: str) -> list[StoredResponse]:
    """Response `id` and those before it, oldest first."""
    sql = f"{_CHAIN} SELECT r.* FROM responses r JOIN chain c ON c.number = r.number ORDER BY c.depth DESC"
    found = [_read(row) for row in db.execute(sql, (id, client, client))]
    if not found:
        raise _absent(id)
    if found[0].previous is not None:
        raise NotFound(f"A response before {id[:100]!r} is not kept any more ({found[0].previous!r}). Send the whole conversation as input.")
    return found


def one(db: Connection, client: str, id: str) -> StoredResponse:
    """Response `id`."""
    row = db.one("SELECT * FROM responses WHERE id = ? AND client = ?", id, client)
    if row is None:
        raise _absent(id)
    return _read(row)


def insert(db: Connection, client: str, response: StoredResponse) -> None:
    """Keep a response. Those before it count as used; the least used go when there are too many."""
    (used,) = db.execute("SELECT coalesce(max(used), 0) + 1 FROM responses").fetchone()
    if response.previous is not None:
        sql = f"{_CHAIN} UPDATE responses SET used = ? WHERE number IN (SELECT number FROM chain)"
        db.execute(sql, (response.previous, client, client, used))
    items, body = json.dumps(response.items, ensure_ascii=False), json.dumps(response.body, ensure_ascii=False)
    sql = "INSERT INTO responses (id, client, previous, used, size, items, body) VALUES (?, ?, ?, ?, ?, ?, ?)"
    db.execute(sql, (response.id, client, response.previous, used, len(items) + len(body), items, body))
    places = "row_number() OVER newest AS place, sum(size) OVER newest AS size FROM responses WINDOW newest AS (ORDER BY used DESC, number DESC)"
    db.execute(
        f"DELETE FROM responses WHERE number IN (SELECT number FROM (SELECT number, {places}) WHERE place > ? OR size > ?)",
        (MAX_RESPONSES, MAX_RESPONSES_SIZE),
    )


def delete(db: Connection, client: str, id: str) -> None:
    """Forget response `id`."""
    if not db.execute("DELETE FROM responses WHERE id = ? AND client = ?", (id, client)).rowcount:
        raise _absent(id)


def _absent(id: str) -> NotFound:
    return NotFound(f"There is no response {id[:100]!r} here: it was not stored, was deleted, or is too old. Send the whole conversation as input.")


def _read(row: Any) -> StoredResponse:
    return StoredResponse(row["id"], row["previous"], json.loads(row["items"]), json.loads(row["body"]))
