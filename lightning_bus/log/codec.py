"""What a record in the log looks like. Drawn before it was coded:

    key    offset, u64 big-endian: LMDB's byte order is then the log's order
    value  ┌ header, 64 bytes, little-endian ──────────────────────────────────────────────┐
           │ magic "LBR1" · kind u8 · format u8 · scope bytes u16 · count u32 · crc32c u32  │
           │ offset u64 · wall_ns u64 · epoch u32 · attempt u32 · seq u64 · body bytes u64  │
           │ part u32 · reserved u32                                                        │
           ├ scope: producer NUL rollout_id, UTF-8 ─────────────────────────────────────────┤
           └ body: opaque bytes, whatever the kind holds ───────────────────────────────────┘

One record is a chunk: the spans that one producer sent for one attempt in one batch, or one event in a rollout's
life, or one published resource. The checksum covers the header (with its own field zero), scope and body. The layout
is set in stone; a new one gets a new magic and both stay readable.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import lru_cache

import msgspec
from crc32c import crc32c

from lightning_bus.errors import RemoteProtocolError
from lightning_bus.records import Kind, Record, RolloutEvent

MAGIC = b"LBR1"
FORMAT = 1
_HEADER = struct.Struct("<4sBBHIIQQIIQQII")
HEADER_BYTES = _HEADER.size
_CRC_AT = 12
_ZERO_CRC = bytes(4)
_KINDS = {int(kind): kind for kind in Kind}
_unpack = _HEADER.unpack_from
_tuple_new: Callable[..., Record] = tuple.__new__  # type: ignore[assignment]
_decode_event = msgspec.msgpack.Decoder(RolloutEvent).decode
assert HEADER_BYTES == 64


def encode_record(record: Record) -> bytes:
    """Return the value that the log keeps under `record.offset`."""
    scope = f"{record.producer}\0{record.rollout_id}".encode()
    fields = (
        len(scope), record.span_count, 0, record.offset, record.wall_ns, record.epoch, record.attempt, record.seq,
        len(record.body), record.part, 0,
    )  # fmt: skip
    head = _HEADER.pack(MAGIC, record.kind, FORMAT, *fields)
    crc = crc32c(record.body, crc32c(scope, crc32c(head)))
    return b"".join((head[:_CRC_AT], crc.to_bytes(4, "little"), head[_CRC_AT + 4 :], scope, record.body))


def decode_record(value: bytes | memoryview) -> Record:
    """Return the record; its body is a copy, so `value` may be a view into the log of an open read transaction.

    Raises RemoteProtocolError, naming what does not fit, when the bytes are not a record.
    """
    # Once for every record that anybody reads, so quick: the checksum runs over a view, and the body alone is copied.
    view = memoryview(value)
    size = len(view)
    start = bytes(view[:_CRC_AT])
    if size < HEADER_BYTES or not start.startswith(MAGIC):
        raise RemoteProtocolError(f"{size} bytes starting {start[:4]!r} are not a log record")
    _, kind, form, scope_bytes, count, crc, offset, wall_ns, epoch, attempt, seq, body_bytes, part, _ = _unpack(view)
    if form != FORMAT:
        raise RemoteProtocolError(f"record {offset} has format {form}; this version reads format {FORMAT}")
    body_at = HEADER_BYTES + scope_bytes
    if size != body_at + body_bytes:
        raise RemoteProtocolError(f"record {offset} should have {body_at + body_bytes} bytes, has {size}")
    if crc32c(view[_CRC_AT + 4 :], _crc_of_start(start)) != crc:
        raise RemoteProtocolError(f"record {offset} is damaged: its checksum does not match")
    try:
        producer, _, rollout_id = str(view[HEADER_BYTES:body_at], "utf-8").partition("\0")
    except UnicodeDecodeError as exc:
        raise RemoteProtocolError(f"record {offset} is damaged: {exc}") from exc
    known = _KINDS.get(kind)
    if known is None:
        raise RemoteProtocolError(
            f"record {offset} is of kind {kind}; this version reads {', '.join(map(str, _KINDS))}"
        )
    fields = offset, known, producer, epoch, seq, part, rollout_id, attempt, count, wall_ns, bytes(view[body_at:])
    return _tuple_new(Record, fields)  # what Record(...) does by way of Python


@lru_cache(1024)
def _crc_of_start(start: bytes) -> int:
    """Return the checksum of a header up to and with its own field, zero: of one run's records few starts differ."""
    return crc32c(start + _ZERO_CRC)


def encode_event(event: RolloutEvent) -> bytes:
    return msgspec.msgpack.encode(event)


def decode_event(record: Record) -> RolloutEvent:
    """Return the event that a ROLLOUT record holds."""
    try:
        return _decode_event(record.body)
    except msgspec.DecodeError as exc:
        raise RemoteProtocolError(f"record {record.offset} does not hold a rollout event: {exc}") from exc


def offset_key(offset: int) -> bytes:
    return offset.to_bytes(8, "big")
