"""Every message on the wire, as a schema. `docs/protocol.md` is this file in prose.

A message is `[header][body][blob…]`: the header is the same small struct for all, the operation in it names the type
of the body (`BODIES`), and blobs are bytes that the broker stores and hands out without ever looking inside.

Evolution: structs are arrays on the wire. A field may be appended with a default; none is removed, reordered or given
another meaning. What would break that is a new PROTOCOL_VERSION, and peers of different versions refuse each other.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Any

import msgspec

from lightning_bus.lifecycle import Status
from lightning_bus.resources import Resource

PROTOCOL_VERSION = 1
MESSAGE_BYTES_MAX = 16 * 1024 * 1024  # ZeroMQ drops the connection above this, so clients check first
BLOB_BYTES_MAX = MESSAGE_BYTES_MAX - (1 << 16)  # a blob comes back inside a log record, so the record needs room too
SUBMISSION_BYTES_MAX = MESSAGE_BYTES_MAX // 2  # it goes out again as a TASK, with its overrides also in the token


# What a log record has room for. Checked when decoding, so that nothing is decided that cannot be written.
U32 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]
U63 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Op(IntEnum):
    """What a message asks or answers. Requests are odd lines, their answers follow."""

    HELLO = 1
    WELCOME = 2
    SUBMIT = 3
    ACCEPTED = 4
    HEARTBEAT = 5
    BEAT = 6
    TASK = 7  # broker → worker, unasked
    DONE = 9
    FAIL = 11
    CANCEL = 13
    APPEND = 15
    ACKED = 16
    FETCH = 17
    CHUNK = 18
    CURSOR = 19
    CURSOR_AT = 20
    PUT = 21
    GET = 23
    RESOURCE = 24
    STATUS = 25
    STATUS_IS = 26
    QUERY = 27
    ROLLOUTS = 28
    ERROR = 99


class Header(msgspec.Struct, frozen=True, array_like=True):
    """First frame of every message."""

    version: int
    op: Op
    request: U63 = 0  # chosen by whoever asks, echoed by whoever answers
    producer: str = ""  # the session that sends
    epoch: U32 = 0  # its incarnation: a higher one fences a lower one
    seq: U63 = 0  # number of this batch within (producer, epoch), from 1
    stream: str = ""  # which log
    count: U32 = 0  # spans in the blobs
    deadline_ms: int = 0  # how long the sender will wait; 0 is for ever
    flags: int = 0
    crc32c: int = 0  # of body and blobs
    traceparent: str = ""


class Body(msgspec.Struct, frozen=True, array_like=True):
    """Base of all bodies."""


class Hello(Body, frozen=True, array_like=True):
    """A client introduces itself. epoch 0 asks for a new incarnation; otherwise it is coming back."""

    role: str
    epoch: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)] = 0
    nonce: bytes = b""  # names this request for an incarnation: sent again, it gets the same one


class Welcome(Body, frozen=True, array_like=True):
    """The broker's terms, and what it last knows of this producer."""

    epoch: int
    seq_last: int
    message_bytes_max: int
    lease_s: float
    next_offset: int


class Submission(Body, frozen=True, array_like=True):
    """One rollout to be carried out once. Submitting an id again is a no-op, so a lost answer is simply resent."""

    rollout_id: str
    task: bytes  # MessagePack; opaque to the broker
    group: str = ""  # rollouts of the same task share it
    model: str = ""  # which model the gateway calls for this rollout; empty: as the agent asked
    overrides: dict[str, Any] = {}  # request fields the gateway sets whatever the agent asked (temperature, …)
    labels: dict[str, str] = {}  # for people and filters: phase, split, step …
    max_attempts: U32 = 0  # 0: as the broker is configured


class Submit(Body, frozen=True, array_like=True):
    rollouts: list[Submission]


class Accepted(Body, frozen=True, array_like=True):
    """Durable. `fresh` counts what was not known before."""

    fresh: int = 0


class Rollout(msgspec.Struct, array_like=True):
    """A rollout as the broker keeps it."""

    submission: Submission
    status: Status
    attempt: int = 0  # newest attempt; 0 before the first lease
    worker: str = ""  # who holds that attempt
    reward: float | None = None
    error: str = ""  # of the last attempt that failed, traceback included
    order: int = 0  # place in the line


class Held(Body, frozen=True, array_like=True):
    rollout_id: str
    attempt: U32


class Heartbeat(Body, frozen=True, array_like=True):
    """A worker's whole standing: what it can hold and what it holds. Stateless, so any beat can be lost."""

    slots: U32
    held: list[Held] = []


class Beat(Body, frozen=True, array_like=True):
    """Attempts in the heartbeat that are no longer this worker's: stop working on them."""

    lost: list[Held] = []


class Task(Body, frozen=True, array_like=True):
    """A lease: this attempt is yours as long as heartbeats name it."""

    rollout_id: str
    attempt: int
    task: bytes
    token: str  # API key for the gateway, good for this attempt only
    lease_s: float
    group: str = ""
    labels: dict[str, str] = {}


class Done(Body, frozen=True, array_like=True):
    """The agent returned. Last spans may ride along as a blob; they commit together with the new status."""

    rollout_id: str
    attempt: U32
    reward: float | None = None


class Fail(Body, frozen=True, array_like=True):
    """The agent did not return. Retryable failures are leased again while attempts remain."""

    rollout_id: str
    attempt: U32
    error: str
    retryable: bool = True


class Cancel(Body, frozen=True, array_like=True):
    rollout_ids: list[str]


class Part(Body, frozen=True, array_like=True):
    """Names the blob at the same index: whose spans, and how many. An empty rollout_id belongs to no rollout."""

    rollout_id: str
    attempt: U32
    count: U32


class Append(Body, frozen=True, array_like=True):
    parts: list[Part]


class Acked(Body, frozen=True, array_like=True):
    """The batch is durable up to `next_offset`, except for the parts listed as fenced, which were not kept."""

    next_offset: int
    fenced: list[int] = []
    duplicate: bool = False


class Fetch(Body, frozen=True, array_like=True):
    """Records from `offset` on. Waits up to wait_ms for the first one."""

    offset: U63
    bytes_max: U63 = 1 << 20
    wait_ms: U63 = 0


class Chunk(Body, frozen=True, array_like=True):
    """Records as blobs, as the log holds them. `next_offset` is where to go on."""

    next_offset: int
    end_offset: int  # the log's end when this was read


class Cursor(Body, frozen=True, array_like=True):
    """Move the named cursor to `offset`, or ask where it is (None)."""

    name: str
    offset: U63 | None = None


class CursorAt(Body, frozen=True, array_like=True):
    name: str
    offset: int


class Put(Body, frozen=True, array_like=True):
    resource: Resource


class Get(Body, frozen=True, array_like=True):
    name: str
    version: int | None = None  # None: the newest


class ResourceIs(Body, frozen=True, array_like=True):
    resource: Resource | None


class StatusQuery(Body, frozen=True, array_like=True):
    pass


class StatusIs(Body, frozen=True, array_like=True):
    """Counts for people and displays."""

    rollouts: dict[str, int]  # by status
    workers: int
    slots: int
    held: int
    next_offset: int
    requeued: int  # attempts that ended without a result since the broker started
    fenced: int


class Query(Body, frozen=True, array_like=True):
    """Rollouts by id, or all when the list is empty."""

    rollout_ids: list[str] = []
    limit: U63 = 1000


class Rollouts(Body, frozen=True, array_like=True):
    rollouts: list[Rollout]


class Error(Body, frozen=True, array_like=True):
    """A refusal. `code` is the name of the error class that the client raises."""

    code: str
    message: str
    retry_after_s: float = 0.0


BODIES: dict[Op, type[Body]] = {
    Op.HELLO: Hello,
    Op.WELCOME: Welcome,
    Op.SUBMIT: Submit,
    Op.ACCEPTED: Accepted,
    Op.HEARTBEAT: Heartbeat,
    Op.BEAT: Beat,
    Op.TASK: Task,
    Op.DONE: Done,
    Op.FAIL: Fail,
    Op.CANCEL: Cancel,
    Op.APPEND: Append,
    Op.ACKED: Acked,
    Op.FETCH: Fetch,
    Op.CHUNK: Chunk,
    Op.CURSOR: Cursor,
    Op.CURSOR_AT: CursorAt,
    Op.PUT: Put,
    Op.GET: Get,
    Op.RESOURCE: ResourceIs,
    Op.STATUS: StatusQuery,
    Op.STATUS_IS: StatusIs,
    Op.QUERY: Query,
    Op.ROLLOUTS: Rollouts,
    Op.ERROR: Error,
}
