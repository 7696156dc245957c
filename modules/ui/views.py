"""What the page is told, as JSON: messages, lists, statuses, and the presenter that turns a reply's deltas into block updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from modules.backends.base import EngineStats
from modules.conversation import Message
from modules.models import ModelStatus
from modules.replies import Stats
from modules.store import INCOGNITO, ConversationInfo
from modules.ui.render import BlockRenderer, BlockUpdate, render_blocks, render_plain


def message_view(message: Message, versions: Sequence[str] = (), blocks: Callable[[str], list[str]] = render_blocks) -> dict[str, Any]:
    """MessageView. A user's text is shown as typed, an assistant's as Markdown."""
    stats, details = message.details.get("stats"), message.details
    known = Stats(**stats) if stats else None
    return {
        "id": message.id,
        "parent": message.parent,
        "role": message.role,
        "name": details.get("name"),
        "blocks": [render_plain(message.text)] if message.role == "user" else blocks(message.text),
        "reasoning": blocks(message.reasoning),
        "text": message.text,
        "state": message.state,
        "versions": list(versions) or [message.id],
        "stats": stats_view(known, details.get("seed")) if known else None,
        "error": details.get("error"),
        "created": message.created,
        "model": details.get("model"),
        "dropped_messages": details.get("dropped_messages", 0),
        "pinned": bool(details.get("pinned")),
        "greeting": bool(details.get("greeting")),
        "group": None if details.get("chosen") else details.get("group"),
        "reasoning_tokens": known.reasoning_tokens if known else None,
        "explained": message.role == "assistant" and "seed" in details,
    }


def stats_view(stats: Stats, seed: int | None = None) -> dict[str, Any]:
    """Stats, as the page reads them."""
    return {
        "tokens": stats.tokens,
        "tokens_per_second": stats.tokens_per_second,
        "prompt_tokens": stats.prompt_tokens,
        "reused_tokens": stats.reused_tokens,
        "context_used": (stats.prompt_tokens or 0) + stats.tokens,
        "context_length": stats.context_length,
        "seconds": stats.seconds,
        "first_token_seconds": stats.first_token_seconds,
        "queue_seconds": stats.queue_seconds,
        "prefill_seconds": stats.prefill_seconds,
        "draft_tokens": stats.draft_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "seed": seed,
        "reasoning_tokens": stats.reasoning_tokens,
        "finish_reason": stats.finish_reason,
    }


def info_view(info: ConversationInfo, running: bool) -> dict[str, Any]:
    """One line of the conversation list."""
    return {
        "id": info.id,
        "title": info.title,
        "updated": info.updated,
        "snippet": [list(piece) for piece in info.snippet],
        "hit": info.hit,
        "running": running,
        "folder": info.folder,
        "pinned": info.pinned,
        "tags": list(info.tags),
        "incognito": info.id.startswith(INCOGNITO),
    }


def status_view(status: ModelStatus, thinking: Sequence[str] = ()) -> dict[str, Any]:
    """ModelStatus, and which of the thinking options the template in use knows."""
    return vars(status) | {"samplers": list(status.samplers), "thinking": list(thinking)}


def engine_view(stats: EngineStats) -> dict[str, Any]:
    """What the card on the Model tab shows of a working engine."""
    return {
        "busy": stats.busy_sequences,
        "parallel": stats.parallel,
        "waiting": stats.waiting,
        "cells": stats.cells,
        "cells_used": stats.cells_used,
        "kept": stats.cached_sequences,
        "spilled": stats.spilled_sequences,
        "spilled_bytes": stats.spilled_bytes,
    }


class BlockPresenter:
    """Presents one reply as block updates: a finished block is sent once and never again."""

    def __init__(self) -> None:
        self._text, self._reasoning = BlockRenderer(), BlockRenderer()
        self._progress: tuple[int, int] = (0, 0)

    def feed(self, text: str, reasoning: str) -> None:
        """Take deltas."""
        self._text.feed(text)
        self._reasoning.feed(reasoning)

    def update(self, stats: Stats, final: bool) -> Mapping[str, Any]:
        """An "update": blocks that changed, and the counts."""
        take: Callable[[BlockRenderer], list[BlockUpdate]] = BlockRenderer.finish if final else BlockRenderer.updates
        return {"blocks": _changes(take(self._text)), "reasoning": _changes(take(self._reasoning)), **self._counts(stats)}

    def snapshot(self, stats: Stats) -> Mapping[str, Any]:
        """A "snapshot": all blocks so far."""
        return {"blocks": self._text.blocks(), "reasoning": self._reasoning.blocks(), **self._counts(stats)}

    def end(self, message: Message) -> Mapping[str, Any]:
        """An "end": the message, with the blocks already rendered."""
        rendered = {message.text: self._text.blocks(), message.reasoning: self._reasoning.blocks()}
        return {"message": message_view(message, blocks=lambda text: rendered[text] if text else [])}

    def _counts(self, stats: Stats) -> dict[str, Any]:
        prefill = [stats.prefill_done, stats.prompt_tokens] if not stats.tokens and stats.prompt_tokens else None
        return {"stats": stats_view(stats), "prefill": prefill, "queue": stats.queue_position, "note": stats.note}


def _changes(updates: Sequence[BlockUpdate]) -> list[list[Any]]:
    return [[u.index, u.html, u.closed, u.append] for u in updates]
