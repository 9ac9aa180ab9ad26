"""Where a span hangs: W3C Trace Context, and the trace that every attempt has.

Trace and root of an attempt follow from its name, so gateway, worker and agent agree on them without a word. Pure.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")


@lru_cache(maxsize=4096)
def root_of_attempt(rollout_id: str, attempt: int) -> tuple[bytes, bytes]:
    """Return the trace id (16 bytes) and the root span's id (8 bytes) of an attempt."""
    digest = hashlib.blake2b(f"{rollout_id}/{attempt}".encode(), digest_size=24).digest()
    return digest[:16], digest[16:]


def format_traceparent(trace_id: bytes, span_id: bytes) -> str:
    """Return the header's value, which says that the trace is recorded."""
    return f"00-{trace_id.hex()}-{span_id.hex()}-01"


def parse_traceparent(text: str) -> tuple[bytes, bytes] | None:
    """Return trace id and parent's span id, or None for what is not a traceparent (it is then ignored, as W3C asks)."""
    match = _TRACEPARENT.fullmatch(text.strip())
    if match is None or match[1] == "ff" or (match[1] == "00" and match[4]):
        return None
    trace_id, span_id = bytes.fromhex(match[2]), bytes.fromhex(match[3])
    return (trace_id, span_id) if any(trace_id) and any(span_id) else None
