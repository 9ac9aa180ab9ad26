"""Frames ↔ messages, and nothing else.

`[header][body][blob…]`. Any bytes go in; what comes out is a `Message` or RemoteProtocolError, never another
exception (`tests/properties` feeds it everything). What is checked when decoding was checked when encoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
from crc32c import crc32c

from lightning_bus.errors import LocalProtocolError, MessageTooLarge, RemoteProtocolError, VersionError
from lightning_bus.messages import BODIES, MESSAGE_BYTES_MAX, PROTOCOL_VERSION, Body, Header, Op

HEADER_BYTES_MAX = 4096
BLOBS_MAX = 4096  # frames a single message may carry beside header and body


class Message(NamedTuple):
    """One decoded message."""

    header: Header
    body: Body
    blobs: list[bytes]


_encoder = msgspec.msgpack.Encoder()
_header_decoder = msgspec.msgpack.Decoder(Header)
_body_decoders = {op: msgspec.msgpack.Decoder(kind) for op, kind in BODIES.items()}
_op_of = {kind: op for op, kind in BODIES.items()}
_version_decoder = msgspec.msgpack.Decoder(list[msgspec.Raw])


def encode(
    body: Body,
    blobs: Sequence[bytes] = (),
    *,
    request: int = 0,
    producer: str = "",
    epoch: int = 0,
    seq: int = 0,
    stream: str = "",
    count: int = 0,
    deadline_ms: int = 0,
) -> list[bytes]:
    """Return the frames of a message. Raises MessageTooLarge before anything is sent."""
    op = _op_of.get(type(body))
    if op is None:
        raise LocalProtocolError(f"{type(body).__name__} is not in messages.BODIES")
    payload = _encoder.encode(body)
    size = len(payload) + sum(map(len, blobs))
    if size > MESSAGE_BYTES_MAX - HEADER_BYTES_MAX:
        raise MessageTooLarge(
            f"a {op.name} of {size} bytes exceeds the limit of {MESSAGE_BYTES_MAX} bytes per message. "
            "Send it in several, or keep large objects in a file and send the path."
        )
    if len(blobs) > BLOBS_MAX:
        raise MessageTooLarge(f"a {op.name} with {len(blobs)} blobs exceeds the limit of {BLOBS_MAX}. Send several.")
    header = Header(
        version=PROTOCOL_VERSION,
        op=op,
        request=request,
        producer=producer,
        epoch=epoch,
        seq=seq,
        stream=stream,
        count=count,
        deadline_ms=deadline_ms,
        crc32c=checksum(payload, blobs),
    )
    return [_encoder.encode(header), payload, *blobs]


def decode(frames: Sequence[bytes]) -> Message:
    """Return the message that the frames hold.

    Raises VersionError when the peer speaks another version, RemoteProtocolError for anything else that is not a
    message of this one.
    """
    if len(frames) < 2 or len(frames) > BLOBS_MAX + 2:
        raise RemoteProtocolError(
            f"a message has a header, a body and at most {BLOBS_MAX} blobs, not {len(frames)} frames"
        )
    if len(frames[0]) > HEADER_BYTES_MAX:
        raise RemoteProtocolError(f"a header of {len(frames[0])} bytes exceeds the limit of {HEADER_BYTES_MAX}")
    version = _version_of(frames[0])
    if version != PROTOCOL_VERSION:
        raise VersionError(
            f"the peer speaks protocol version {version}, this side version {PROTOCOL_VERSION}. "
            "Install the same lightning-bus on both sides."
        )
    try:
        header = _header_decoder.decode(frames[0])
        decoder = _body_decoders.get(header.op)
        if decoder is None:
            raise RemoteProtocolError(f"operation {header.op.name} has no body in this version")
        body = decoder.decode(frames[1])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, OverflowError) as exc:
        raise RemoteProtocolError(f"the frames are not a message: {exc}") from exc
    blobs = list(frames[2:])
    if checksum(frames[1], blobs) != header.crc32c:
        raise RemoteProtocolError(f"{header.op.name}: checksum does not match {len(frames) - 1} frames")
    return Message(header, body, blobs)


def checksum(body: bytes, blobs: Sequence[bytes]) -> int:
    """CRC-32C over body and blobs, in order."""
    value = crc32c(body)
    for blob in blobs:
        value = crc32c(blob, value)
    return value


def op_of(body: Body) -> Op:
    """Return the operation that a body belongs to."""
    return _op_of[type(body)]


def _version_of(frame: bytes) -> int:
    """Read only the first field, which keeps its place in every version, so that old and new can say who is who."""
    try:
        fields = _version_decoder.decode(frame)
        return msgspec.msgpack.decode(fields[0], type=int)
    except (msgspec.DecodeError, IndexError, RecursionError, UnicodeDecodeError, OverflowError) as exc:
        raise RemoteProtocolError(f"the first frame is not a header: {exc}") from exc
