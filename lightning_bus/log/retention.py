"""What of the log may be forgotten. Pure: it looks at numbers, and others drop files.

Whole segments go, from the oldest on, and the one that is being written never does. One rule stands above all: what a
cursor has still to read stays, whatever the limits say, so a slow trainer loses nothing; the log grows instead, and
`held_back` says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol


class SegmentInfo(NamedTuple):
    """One segment, as its log describes it: the records [first_offset, end_offset)."""

    first_offset: int
    end_offset: int
    bytes: int  # on disk
    newest_wall_ns: int  # of its last record; 0 while it has none


class Policy(Protocol):
    """The keys of [broker] that say how much is kept; `config.BrokerSection` has them."""

    @property
    def retain_s(self) -> float: ...

    @property
    def retain_bytes(self) -> int: ...

    @property
    def drop_read(self) -> bool: ...


def droppable(segments: Sequence[SegmentInfo], cursors: Mapping[str, int], policy: Policy, wall_ns: int) -> int | None:
    """Return the offset before which everything may be dropped, or None when nothing may.

    segments  oldest first, the active one last
    cursors   name → offset of the next record that this reader wants
    """
    end = _unwanted_before(segments, cursors, policy, wall_ns)
    wanted_from = min(cursors.values(), default=end)
    ends = [segment.end_offset for segment in segments[:-1] if segment.end_offset <= min(end, wanted_from)]
    return ends[-1] if ends else None


def held_back(segments: Sequence[SegmentInfo], cursors: Mapping[str, int], policy: Policy, wall_ns: int) -> str | None:
    """Return a warning when a cursor keeps what the limits would drop: its name, how much, and the way out."""
    end = _unwanted_before(segments, cursors, policy, wall_ns)
    held = [s for s in segments[:-1] if s.end_offset <= end and any(at < s.end_offset for at in cursors.values())]
    if not held:
        return None
    name, at = min(cursors.items(), key=lambda item: item[1])
    size = sum(segment.bytes for segment in held)
    return (
        f"the log keeps {size / 1e6:.0f} MB beyond its limits (retain_s={policy.retain_s:g}, "
        f"retain_bytes={policy.retain_bytes}), because cursor {name!r} is at {at} and has not read "
        f"{held[-1].end_offset - at} records of them. Let its reader catch up, or move the cursor on if nobody reads there any more."
    )


def _unwanted_before(segments: Sequence[SegmentInfo], cursors: Mapping[str, int], policy: Policy, wall_ns: int) -> int:
    """Return the end of the oldest segments that the limits alone would drop."""
    size = sum(segment.bytes for segment in segments)
    end = 0
    for segment in segments[:-1]:
        too_old = policy.retain_s > 0 and segment.newest_wall_ns < wall_ns - policy.retain_s * 1e9
        too_large = policy.retain_bytes > 0 and size > policy.retain_bytes
        read = policy.drop_read and bool(cursors) and min(cursors.values()) >= segment.end_offset
        if not (too_old or too_large or read):
            break
        size -= segment.bytes
        end = segment.end_offset
    return end
