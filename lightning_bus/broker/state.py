"""What the broker knows, and the few things that every decision does with it.

Only the modules beside this one change a BrokerState, and only while they take a decision. What always holds. State
in memory is what the log will hold once everything decided is written: both change in one place, `record` and `put`
beside the assignment.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from lightning_bus import messages as m
from lightning_bus.broker.deadlines import Deadlines
from lightning_bus.broker.effects import Effects
from lightning_bus.broker.ready import ReadyQueue
from lightning_bus.broker.register import Register
from lightning_bus.broker.waits import Waits, Watches
from lightning_bus.errors import CallError, MessageTooLarge, NotFound
from lightning_bus.leases import LeaseTable
from lightning_bus.records import Kind, ProducerMark, Record
from lightning_bus.resources import Resource

NAME_BYTES_MAX = 400  # of producers, cursors, resources and idempotency keys; LMDB keys hold 511 bytes
QUEUED_MAX = 1_000_000

encode = msgspec.msgpack.Encoder().encode


@dataclass(slots=True)
class Snapshot:
    """What a log holds when a broker opens it. A rollout stands where `standings` says, or as it was submitted."""

    next_offset: int = 0
    rollouts: list[m.Rollout] = field(default_factory=list[m.Rollout])
    standings: dict[str, m.Standing] = field(default_factory=dict[str, m.Standing])
    producers: dict[str, ProducerMark] = field(default_factory=dict[str, ProducerMark])
    cursors: dict[str, int] = field(default_factory=dict[str, int])
    resources: list[Resource] = field(default_factory=list[Resource])
    first_offset: int = 0


@dataclass(slots=True)
class BrokerState:
    """Everything the broker knows."""

    secret: bytes
    max_attempts: int
    table: LeaseTable
    queued_max: int = QUEUED_MAX
    next_offset: int = 0
    first_offset: int = 0
    rollouts: Register = field(default_factory=Register)
    line: list[str] = field(default_factory=list[str])  # their ids in the order of submission, to page through
    next_order: int = 0
    keys: dict[str, str] = field(default_factory=dict[str, str])  # idempotency key → rollout
    dead: dict[str, None] = field(default_factory=dict[str, None])  # dead letters, in the order they failed
    finished: deque[str] = field(default_factory=deque[str])  # terminal rollouts, in the order they ended
    producers: dict[str, ProducerMark] = field(default_factory=dict[str, ProducerMark])
    cursors: dict[str, int] = field(default_factory=dict[str, int])
    resources: dict[str, dict[int, Resource]] = field(default_factory=dict[str, dict[int, Resource]])
    ready: ReadyQueue = field(default_factory=ReadyQueue)  # stale entries are skipped
    next_up: str | None = None  # taken from the line, but no worker had room for it yet
    delayed: Deadlines[str] = field(default_factory=Deadlines[str])  # rollouts whose time has not come
    waits: Waits = field(default_factory=Waits)
    watches: Watches = field(default_factory=Watches)
    draining: bool = False
    counts: Counter[str] = field(default_factory=Counter[str])  # rollouts by status
    requeued: int = 0
    fenced: int = 0
    refused: Counter[str] = field(default_factory=Counter[str])  # by error class


class Context(NamedTuple):
    """One message and when it came."""

    state: BrokerState
    effects: Effects
    header: m.Header
    peer: str
    blobs: list[bytes]
    now_s: float
    wall_ns: int
    role: str = ""


def record(
    state: BrokerState, effects: Effects, kind: Kind, wall_ns: int, body: bytes, *, producer: str = "",
    epoch: int = 0, seq: int = 0, part: int = 0, rollout_id: str = "", attempt: int = 0, span_count: int = 0,
) -> None:  # fmt: skip
    """Append to the log."""
    effects.writes.append(
        Record(state.next_offset, kind, producer, epoch, seq, part, rollout_id, attempt, span_count, wall_ns, body)
    )
    state.next_offset += 1


def rollout_of(state: BrokerState, rollout_id: str) -> m.Rollout:
    """Return a known rollout. Raises NotFound."""
    rollout = state.rollouts.find(rollout_id)
    if rollout is None:
        raise NotFound(f"no rollout {rollout_id!r} is known to this broker: never submitted, or dropped by retention")
    return rollout


def check_name(what: str, name: str) -> None:
    """Raise CallError for what cannot be a name."""
    # 100 characters are 400 bytes at most, so that the usual name need not be encoded.
    if not 0 < len(name) <= NAME_BYTES_MAX // 4 and not 0 < len(name.encode()) <= NAME_BYTES_MAX or "\0" in name:
        raise CallError(f"{what} name {name[:100]!r}: 1 to {NAME_BYTES_MAX} bytes without NUL are allowed")


def check_blobs(blobs: Sequence[bytes]) -> None:
    """A record must fit into the message that carries it to a reader, or nobody could ever read past it."""
    for blob in blobs:
        if len(blob) > m.BLOB_BYTES_MAX:
            raise MessageTooLarge(
                f"{len(blob)} bytes exceed the limit of {m.BLOB_BYTES_MAX} for one record. Send several."
            )
