"""Frames ↔ messages, and nothing else.

`[header][body][blob…]`. Any bytes go in; what comes out is a `Message` or RemoteProtocolError, never another
exception (`tests/properties` feeds it everything). What is checked when decoding was checked when encoding.

Sending has two steps, so that messages made one after another can leave as one: `pack` encodes a body and checks its
size, `join` makes frames of what was packed, several small messages to a BUNDLE. `split` takes a bundle apart again;
what is not a bundle is itself. A bundle costs a peer one message, and what is in it one body each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec
from crc32c import crc32c

from lightning_bus.errors import (
    LightningBusError,
    LocalProtocolError,
    MessageTooLarge,
    RemoteProtocolError,
    VersionError,
)
from lightning_bus.messages import (
    BODIES,
    BUNDLE_MESSAGES_MAX,
    MESSAGE_BYTES_MAX,
    PROTOCOL_VERSION,
    Body,
    Bundle,
    Bundled,
    Header,
    Op,
)

HEADER_BYTES_MAX = 4096
BLOBS_MAX = 4096  # frames a single message may carry beside header and body
BUNDLED_BYTES_MAX = 64  # what a message weighs in a bundle beside its body and blobs
BUNDLE_BYTES_MAX = 1 << 20  # of the bundles made here: what is larger gains nothing, and would hold up what is small


class Message(NamedTuple):
    """One decoded message."""

    header: Header
    body: Body
    blobs: list[bytes]


class Packed(NamedTuple):
    """A message ready to leave, alone or with others."""

    op: Op
    payload: bytes
    blobs: Sequence[bytes]
    size: int  # of payload and blobs
    request: int = 0
    seq: int = 0
    span_count: int = 0


class Unreadable(NamedTuple):
    """A message of a bundle that is none, and whose it was."""

    request: int
    error: LightningBusError


_encoder = msgspec.msgpack.Encoder()
_header_decoder = msgspec.msgpack.Decoder(Header)
_body_decoders = {op: msgspec.msgpack.Decoder(kind) for op, kind in BODIES.items()}
_op_of = {kind: op for op, kind in BODIES.items()}
_version_decoder = msgspec.msgpack.Decoder(list[msgspec.Raw])


def pack(body: Body, blobs: Sequence[bytes] = (), *, request: int = 0, seq: int = 0, count: int = 0) -> Packed:
    """Return the message encoded. Raises MessageTooLarge before anything is sent."""
    op = _op_of.get(type(body))
    if op is None:
        raise LocalProtocolError(f"{type(body).__name__} is not in messages.BODIES")
    payload = _encoder.encode(body)
    size = len(payload)
    for blob in blobs:
        size += len(blob)
    if size > MESSAGE_BYTES_MAX - HEADER_BYTES_MAX:
        raise MessageTooLarge(
            f"a {op.name} of {size} bytes exceeds the limit of {MESSAGE_BYTES_MAX} bytes per message. "
            "Send it in several, or keep large objects in a file and send the path."
        )
    if len(blobs) > BLOBS_MAX:
        raise MessageTooLarge(f"a {op.name} with {len(blobs)} blobs exceeds the limit of {BLOBS_MAX}. Send several.")
    return Packed(op, payload, blobs, size, request, seq, count)


def join(messages: Iterable[Packed], *, producer: str = "", epoch: int = 0) -> Iterator[list[bytes]]:
    """Yield the frames of messages that hold all these, in this order. A lone one and a large one go as they are."""
    group: list[Packed] = []
    size = blobs = 0
    for message in messages:
        size += message.size + BUNDLED_BYTES_MAX
        blobs += len(message.blobs)
        if group and (size > BUNDLE_BYTES_MAX or blobs > BLOBS_MAX or len(group) == BUNDLE_MESSAGES_MAX):
            yield _join_group(group, producer, epoch)
            group = []
            size, blobs = message.size + BUNDLED_BYTES_MAX, len(message.blobs)
        group.append(message)
    if group:
        yield _join_group(group, producer, epoch)


def split(message: Message) -> Sequence[Message | Unreadable]:
    """Return the messages of a bundle, in order, or the message itself when it is none.

    A message in it that cannot be read concerns nobody else. Raises RemoteProtocolError when the bundle does not add up.
    """
    header, bundle, blobs = message
    if not isinstance(bundle, Bundle):
        return (message,)
    if sum(bundled.blobs for bundled in bundle.messages) != len(blobs):
        raise RemoteProtocolError(f"the messages of a BUNDLE name other than its {len(blobs)} blobs")
    found: list[Message | Unreadable] = []
    at = 0
    version, producer, epoch = header.version, header.producer, header.epoch
    for op, raw, request, seq, count, taken in map(_fields, bundle.messages):
        own, at = blobs[at : at + taken], at + taken
        decoder = _body_decoders.get(op) if op != Op.BUNDLE else None  # type: ignore[call-overload] - any number hashes
        if decoder is None:
            error = RemoteProtocolError(f"operation {op} is not one that a BUNDLE of this version can hold")
            found.append(Unreadable(request, error))
            continue
        try:
            body = decoder.decode(raw)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, OverflowError) as exc:
            error = RemoteProtocolError(f"{Op(op).name} in a BUNDLE is not a message: {exc}")
            found.append(Unreadable(request, error))
            continue
        inner = Header(version, Op(op), request, producer, epoch, seq, header.stream, count)
        found.append(Message(inner, body, own))
    return found


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
    packed = pack(body, blobs, request=request, seq=seq, count=count)
    return _frames(packed, producer, epoch, stream, deadline_ms)


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
    try:
        header = _header_decoder.decode(frames[0])
        if header.version != PROTOCOL_VERSION:
            raise _other_version(header.version)
        decoder = _body_decoders.get(header.op)
        if decoder is None:
            raise RemoteProtocolError(f"operation {header.op.name} has no body in this version")
        body = decoder.decode(frames[1])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, OverflowError) as exc:
        version = _version_of(frames[0])  # of another version all else may look different
        if version != PROTOCOL_VERSION:
            raise _other_version(version) from exc
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


def _join_group(group: list[Packed], producer: str, epoch: int) -> list[bytes]:
    if len(group) == 1:
        return _frames(group[0], producer, epoch)
    bundle = Bundle(
        [
            Bundled(op, msgspec.Raw(payload), request, seq, count, len(blobs))
            for op, payload, blobs, _, request, seq, count in group
        ]
    )
    return _frames(pack(bundle, [blob for message in group for blob in message.blobs]), producer, epoch)


def _frames(packed: Packed, producer: str, epoch: int, stream: str = "", deadline_ms: int = 0) -> list[bytes]:
    op, payload, blobs, _, request, seq, count = packed
    crc = checksum(payload, blobs)
    header = Header(PROTOCOL_VERSION, op, request, producer, epoch, seq, stream, count, deadline_ms, 0, crc)
    return [_encoder.encode(header), payload, *blobs]


def _fields(bundled: Bundled) -> tuple[int, msgspec.Raw, int, int, int, int]:
    return bundled.op, bundled.body, bundled.request, bundled.seq, bundled.count, bundled.blobs


def _other_version(version: int) -> VersionError:
    return VersionError(
        f"the peer speaks protocol version {version}, this side version {PROTOCOL_VERSION}. "
        "Install the same lightning-bus on both sides."
    )


def _version_of(frame: bytes) -> int:
    """Read only the first field, which keeps its place in every version, so that old and new can say who is who."""
    try:
        fields = _version_decoder.decode(frame)
        return msgspec.msgpack.decode(fields[0], type=int)
    except (msgspec.DecodeError, IndexError, RecursionError, UnicodeDecodeError, OverflowError) as exc:
        raise RemoteProtocolError(f"the first frame is not a header: {exc}") from exc
