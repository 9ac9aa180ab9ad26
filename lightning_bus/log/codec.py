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

import msgspec
from crc32c import crc32c

from lightning_bus.errors import RemoteProtocolError
from lightning_bus.records import Kind, Record, RolloutEvent

MAGIC = b"LBR1"
FORMAT = 1
_HEADER = struct.Struct("<4sBBHIIQQIIQQII")
HEADER_BYTES = _HEADER.size
_CRC_AT = 12
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
    """Return the record. Raises RemoteProtocolError, naming what does not fit, when the bytes are not one."""
    value = bytes(value)
    if len(value) < HEADER_BYTES or value[:4] != MAGIC:
        raise RemoteProtocolError(f"{len(value)} bytes starting {value[:4]!r} are not a log record")
    _, kind, form, scope_bytes, count, crc, offset, wall_ns, epoch, attempt, seq, body_bytes, part, _ = (
        _HEADER.unpack_from(value)
    )
    if form != FORMAT:
        raise RemoteProtocolError(f"record {offset} has format {form}; this version reads format {FORMAT}")
    if len(value) != HEADER_BYTES + scope_bytes + body_bytes:
        raise RemoteProtocolError(
            f"record {offset} should have {HEADER_BYTES + scope_bytes + body_bytes} bytes, has {len(value)}"
        )
    zeroed = b"".join((value[:_CRC_AT], b"\0\0\0\0", value[_CRC_AT + 4 :]))
    if crc32c(zeroed) != crc:
        raise RemoteProtocolError(f"record {offset} is damaged: its checksum does not match")
    try:
        producer, _, rollout_id = value[HEADER_BYTES : HEADER_BYTES + scope_bytes].decode().partition("\0")
        return Record(
            offset=offset, kind=Kind(kind), producer=producer, epoch=epoch, seq=seq, part=part, rollout_id=rollout_id,
            attempt=attempt, span_count=count, wall_ns=wall_ns, body=value[HEADER_BYTES + scope_bytes :],
        )  # fmt: skip
    except ValueError as exc:
        raise RemoteProtocolError(f"record {offset} is damaged: {exc}") from exc


def encode_event(event: RolloutEvent) -> bytes:
    return msgspec.msgpack.encode(event)


def decode_event(record: Record) -> RolloutEvent:
    """Return the event that a ROLLOUT record holds."""
    try:
        return msgspec.msgpack.decode(record.body, type=RolloutEvent)
    except msgspec.DecodeError as exc:
        raise RemoteProtocolError(f"record {record.offset} does not hold a rollout event: {exc}") from exc


def offset_key(offset: int) -> bytes:
    return offset.to_bytes(8, "big")
