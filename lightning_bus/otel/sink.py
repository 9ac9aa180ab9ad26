"""Spans in batches: joined without being encoded again, and cut in two where a message carries no such batch."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from lightning_bus.errors import MessageTooLarge

TRACES = "/v1/traces"
CHUNK = "application/vnd.lightning-bus.chunk"  # spans as the log keeps them; what our own exporter sends to the gateway

T = TypeVar("T")


def join_spans(encoded: list[bytes]) -> bytes:
    """Return spans, each encoded, as the chunk body that the log keeps: a MessagePack array of them."""
    count = len(encoded)
    if count < 16:
        head = bytes((0x90 | count,))
    elif count < 1 << 16:
        head = b"\xdc" + count.to_bytes(2, "big")
    else:
        head = b"\xdd" + count.to_bytes(4, "big")
    return head + b"".join(encoded)


async def append_whole(append: Callable[[list[T]], Awaitable[None]], items: list[T]) -> int:
    """Append items in as few calls as they fit; return how many alone exceed what a message carries, and were not kept.

    Raises what `append` raises, but for MessageTooLarge.
    """
    try:
        await append(items)
        return 0
    except MessageTooLarge:
        if len(items) == 1:
            return 1
    half = len(items) // 2
    return await append_whole(append, items[:half]) + await append_whole(append, items[half:])
