"""What the log holds, apart from how it is laid out: records in one order, and tables beside them.

The broker's decisions are lists of these; the store writes each list in one transaction. Records are history and are
only ever appended; tables are state and could be rebuilt from them.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import NamedTuple

import msgspec


class Kind(IntEnum):
    """What the body holds."""

    SPANS = 1  # MessagePack array of spans
    ROLLOUT = 2  # RolloutEvent
    RESOURCE = 3  # resources.Resource


class RolloutEvent(msgspec.Struct, frozen=True, array_like=True):
    """One step in a rollout's life, as the log tells it."""

    what: str  # "submit", a lifecycle.Event, or "replay" or "purge" of one that failed and stays so
    status: str  # after the step
    group: str = ""
    worker: str = ""
    reward: float | None = None
    error: str = ""
    labels: dict[str, str] = {}
    task: bytes = b""  # only with "submit"


class Record(NamedTuple):
    """One record of the log."""

    offset: int
    kind: Kind
    producer: str
    epoch: int
    seq: int
    part: int
    rollout_id: str
    attempt: int
    span_count: int
    wall_ns: int
    body: bytes


class Table(StrEnum):
    """State kept beside the records, one value a key."""

    ROLLOUTS = "rollouts"  # rollout_id → messages.Rollout, as it was submitted
    STANDINGS = "standings"  # rollout_id → messages.Standing, since its first move
    PRODUCERS = "producers"  # producer → ProducerMark
    CURSORS = "cursors"  # name → offset
    RESOURCES = "resources"  # name NUL version → resources.Resource


class Put(NamedTuple):
    """Set one key of one table. Values are encoded when decided, not when written: state moves on meanwhile."""

    table: Table
    key: bytes
    value: bytes


class Delete(NamedTuple):
    """Forget one key of one table."""

    table: Table
    key: bytes


class ProducerMark(msgspec.Struct, frozen=True, array_like=True):
    """The last batches taken from a producer, and which parts were fenced, so that a resend gets the same answer."""

    epoch: int
    seq: int = 0
    fenced: list[int] = []  # of batch `seq`
    nonce: bytes = b""  # of the HELLO that asked for this epoch
    fenced_before: list[list[int]] = []  # of the batches before it, newest first: as many as may be on the way
    rollout_id: str = ""  # an agent's: its token lets it append to this attempt only
    attempt: int = 0


Write = Record | Put | Delete
