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


BUNDLE_MESSAGES_MAX = 1024  # then others get their turn
APPEND_BYTES_MAX = 64 << 20  # batches a producer may have on the way, together
APPEND_BATCHES_MAX = 4  # and how many: their verdicts are what the broker remembers of it

# What a log record has room for. Checked when decoding, so that nothing is decided that cannot be written.
U32 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]
U63 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]


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
    COMMIT = 19
    CURSOR_AT = 20
    PUT = 21
    GET = 23
    RESOURCE = 24
    STATUS = 25
    STATUS_IS = 26
    QUERY = 27
    ROLLOUTS = 28
    NACK = 29
    RELEASE = 31
    RESYNC = 34
    WAIT = 35
    ENDED = 36
    WATCH = 37
    DRAIN = 39
    REPLAY = 41
    PURGE = 43
    BUNDLE = 45
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
    token: str = ""  # an agent's: it may append to the attempt that the token names, and to no other


class Welcome(Body, frozen=True, array_like=True):
    """The broker's terms, and what it last knows of this producer."""

    epoch: int
    seq_last: int
    message_bytes_max: int
    lease_s: float
    next_offset: int
    append_bytes_max: int = APPEND_BYTES_MAX  # credit: what may be on the way to the broker, unacknowledged
    append_batches_max: int = 1  # and in how many batches


class Submission(Body, frozen=True, array_like=True):
    """One rollout to be carried out once. Submitting an id again is a no-op, so a lost answer is simply resent."""

    rollout_id: str
    task: bytes  # MessagePack; opaque to the broker
    group: str = ""  # rollouts of the same task share it
    model: str = ""  # which model the gateway calls for this rollout; empty: as the agent asked
    overrides: dict[str, Any] = {}  # request fields the gateway sets whatever the agent asked (temperature, …)
    labels: dict[str, str] = {}  # for people and filters: phase, split, step …
    max_attempts: U32 = 0  # 0: as the broker is configured
    priority: Annotated[int, msgspec.Meta(ge=-(1 << 15), lt=1 << 15)] = 0  # higher goes first; waiting raises it
    timeout_s: Seconds = 0.0  # a whole attempt may take this long; 0: no limit
    lease_s: Seconds = 0.0  # silence that ends an attempt, 0.1 or more; 0: as the broker is configured
    delay_s: Seconds = 0.0  # not before this long after it was submitted
    key: str = ""  # idempotency key: a later submission with it is this rollout, whatever its id; 400 bytes at most


class Submit(Body, frozen=True, array_like=True):
    rollouts: list[Submission]


class Accepted(Body, frozen=True, array_like=True):
    """Durable. `fresh` counts what was not known before."""

    fresh: int = 0
    rollout_ids: list[str] = []  # to SUBMIT with keys and to REPLAY: the id of each, in the order asked


class Rollout(msgspec.Struct, array_like=True):
    """A rollout as the broker keeps it.

    One that succeeded or was cancelled, purged or replayed has let go of its task: `submission.task` is empty then,
    and the log's "submit" event has it.
    """

    submission: Submission
    status: Status
    attempt: int = 0  # newest attempt; 0 before the first lease
    worker: str = ""  # who holds that attempt
    reward: float | None = None
    error: str = ""  # of the last attempt that failed, traceback included
    order: int = 0  # place in the line
    excused: int = 0  # attempts that do not count against max_attempts: they were handed back
    ready_wall_ns: int = 0  # while it is delayed: when it may be leased
    ended_offset: int = 0  # of the record that tells its end
    replayed_as: str = ""  # a dead letter that was replayed: the id it got
    purged: bool = False  # a dead letter that nobody wants to see any more
    delay_s: float = 0.0  # while it is delayed: the whole delay, so that a clock that was set cannot prolong it
    worker_before: str = ""  # who ended the attempt before this one: what that worker sends again was recorded


class Standing(msgspec.Struct, frozen=True, array_like=True):
    """Where a rollout stands: a Rollout without its submission, which is written once and not at each move."""

    status: Status
    attempt: int = 0
    worker: str = ""
    reward: float | None = None
    error: str = ""
    order: int = 0
    excused: int = 0
    ready_wall_ns: int = 0
    ended_offset: int = 0
    replayed_as: str = ""
    purged: bool = False
    delay_s: float = 0.0
    worker_before: str = ""


class Held(Body, frozen=True, array_like=True):
    rollout_id: str
    attempt: U32


class Heartbeat(Body, frozen=True, array_like=True):
    """A worker's whole standing: what it can hold (its credit) and what it holds. Stateless: any beat can be lost."""

    slots: U32
    held: list[Held] = []
    task_bytes_max: U63 = 0  # what the tasks it holds may weigh together; 0: no limit


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
    timeout_s: float = 0.0  # the broker ends the attempt after this; 0: never


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


class Nack(Body, frozen=True, array_like=True):
    """Not now: lease it again, to anybody, after `delay_s`. The attempt counts: after the last one the rollout fails."""

    rollout_id: str
    attempt: U32
    delay_s: Seconds = 0.0
    reason: str = ""


class Release(Body, frozen=True, array_like=True):
    """Hand an attempt back as if it had never begun: a worker that stops does. It does not count."""

    rollout_id: str
    attempt: U32


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


class Resync(Body, frozen=True, array_like=True):
    """To an APPEND out of turn: the last batch in sequence was seq_last. Send again from the next one on."""

    epoch: int
    seq_last: int


class Fetch(Body, frozen=True, array_like=True):
    """Records from `offset` on. Waits up to wait_ms for the first one."""

    offset: U63
    bytes_max: U63 = 1 << 20
    wait_ms: U63 = 0


class Chunk(Body, frozen=True, array_like=True):
    """Records as blobs, as the log holds them. `next_offset` is where to go on."""

    next_offset: int
    end_offset: int  # the log's end when this was read


class Commit(Body, frozen=True, array_like=True):
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
    dead: int = 0  # failed rollouts that were neither replayed nor purged
    delayed: int = 0  # queued ones whose time has not come
    draining: bool = False
    first_offset: int = 0  # the oldest record that is still kept
    refused: dict[str, int] = {}  # requests turned down since the broker started, by error


class Query(Body, frozen=True, array_like=True):
    """Rollouts by id, or all when the list is empty."""

    rollout_ids: list[str] = []
    limit: U63 = 1000
    status: str = ""  # only those that stand so
    dead: bool = False  # only dead letters
    after: str = ""  # only those submitted after this one: to page on


class Rollouts(Body, frozen=True, array_like=True):
    rollouts: list[Rollout]


class Wait(Body, frozen=True, array_like=True):
    """Tell me when these rollouts end, for up to wait_ms. Answered by ENDED at once, and pushed again as they do."""

    rollout_ids: list[str]
    wait_ms: U63 = 0


class End(Body, frozen=True, array_like=True):
    """How a rollout ended."""

    rollout_id: str
    status: Status
    attempt: int
    reward: float | None = None
    error: str = ""


class Ended(Body, frozen=True, array_like=True):
    """Those that have ended. `request` in the header is the WAIT's, however often this comes."""

    ended: list[End]
    open: int  # how many of the WAIT are still to be told of


class Watch(Body, frozen=True, array_like=True):
    """Answered with the newest version of a resource as soon as it is above `above`, with nil after wait_ms."""

    name: str
    above: int = -1
    wait_ms: U63 = 0


class Drain(Body, frozen=True, array_like=True):
    """Lease nothing more until told to resume. What is held goes on."""

    resume: bool = False


class Replay(Body, frozen=True, array_like=True):
    """Submit dead letters anew. Each gets a new id; one that was replayed before keeps that."""

    rollout_ids: list[str]


class Purge(Body, frozen=True, array_like=True):
    """Take dead letters off the list. Their history stays in the log."""

    rollout_ids: list[str]


class Bundled(Body, frozen=True, array_like=True):
    """One message of a bundle: its header's own fields, its body, and how many of the blobs are its."""

    op: U32  # an Op; a number here, so that one that is unknown spoils its own message only
    body: msgspec.Raw
    request: U63 = 0
    seq: U63 = 0
    count: U32 = 0
    blobs: U32 = 0


class Bundle(Body, frozen=True, array_like=True):
    """Several messages of one sender in one, each handled as if it had come alone, in this order."""

    messages: Annotated[list[Bundled], msgspec.Meta(max_length=BUNDLE_MESSAGES_MAX)]


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
    Op.COMMIT: Commit,
    Op.CURSOR_AT: CursorAt,
    Op.PUT: Put,
    Op.GET: Get,
    Op.RESOURCE: ResourceIs,
    Op.STATUS: StatusQuery,
    Op.STATUS_IS: StatusIs,
    Op.QUERY: Query,
    Op.ROLLOUTS: Rollouts,
    Op.NACK: Nack,
    Op.RELEASE: Release,
    Op.RESYNC: Resync,
    Op.WAIT: Wait,
    Op.ENDED: Ended,
    Op.WATCH: Watch,
    Op.DRAIN: Drain,
    Op.REPLAY: Replay,
    Op.PURGE: Purge,
    Op.BUNDLE: Bundle,
    Op.ERROR: Error,
}
