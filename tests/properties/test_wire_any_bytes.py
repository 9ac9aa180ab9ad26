"""Any bytes in; a message or one of our typed errors out. And whatever was decoded can be decided, written and sent."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_bus import messages as m
from lightning_bus import wire
from lightning_bus.broker.access import Role
from lightning_bus.errors import RemoteProtocolError, VersionError
from lightning_bus.lifecycle import Status
from lightning_bus.log.codec import decode_record, encode_record
from lightning_bus.records import Kind, Record
from lightning_bus.resources import Resource
from tests.core_harness import Desk

U32 = st.integers(0, (1 << 32) - 1)
U63 = st.integers(0, (1 << 63) - 1)
names = st.sampled_from(["r-1", "r-2", "r-3"]) | st.text(max_size=30)
attempts = st.sampled_from([0, 1, 2]) | U32
plain = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
)
labels = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2)
seconds = st.sampled_from([0.0, 0.05, 0.5, 1e9]) | st.floats(0.0, 1e9)
keys = st.sampled_from(["", "k-1", "k-2"]) | st.text(max_size=5)
submissions = st.builds(
    m.Submission, names, st.binary(max_size=50), st.text(max_size=5), st.text(max_size=5),
    st.dictionaries(st.text(max_size=5), st.recursive(plain, lambda inner: st.lists(inner, max_size=2)), max_size=2),
    labels, U32, st.integers(-(1 << 15), (1 << 15) - 1), seconds, seconds, seconds, keys,
)  # fmt: skip
helds = st.builds(m.Held, names, attempts)
requests = st.one_of(
    st.builds(m.Hello, st.text(max_size=10), st.integers(0, (1 << 31) - 1), st.binary(max_size=8), st.just("") | st.text()),
    st.builds(m.Submit, st.lists(submissions, max_size=3)),
    st.builds(m.Heartbeat, U32, st.lists(helds, max_size=3), U63),
    st.builds(m.Nack, names, attempts, seconds, st.text(max_size=20)),
    st.builds(m.Release, names, attempts),
    st.builds(m.Done, names, attempts, st.none() | st.floats()),
    st.builds(m.Fail, names, attempts, st.text(max_size=50), st.booleans()),
    st.builds(m.Cancel, st.lists(names, max_size=2)),
    st.builds(m.Append, st.lists(st.builds(m.Part, names | st.just(""), attempts, U32), max_size=3)),
    st.builds(m.Put, st.builds(Resource, names, st.integers(-(1 << 63), (1 << 63) - 1), st.binary(max_size=20))),
    st.builds(m.Get, names, st.none() | st.integers(-5, 5)),
    st.builds(m.Commit, names, st.none() | U63),
    st.just(m.StatusQuery()),
    st.builds(
        m.Query, st.lists(names, max_size=2), U63, st.sampled_from(["", "queued", "failed"]) | st.text(max_size=5),
        st.booleans(), st.just("") | names,
    ),
    st.builds(m.Wait, st.lists(names, max_size=3), U63),
    st.builds(m.Watch, names, st.integers(-2, 5), U63),
    st.builds(m.Drain, st.booleans()),
    st.builds(m.Replay, st.lists(names, max_size=2)),
    st.builds(m.Purge, st.lists(names, max_size=2)),
)  # fmt: skip
answers = st.one_of(
    st.builds(m.Welcome, U32, U63, U32, st.floats(allow_nan=False), U63),
    st.builds(m.Accepted, U32, st.lists(names, max_size=2)),
    st.builds(m.Resync, U32, U63),
    st.builds(m.Ended, st.lists(st.builds(m.End, names, st.sampled_from(Status), U32), max_size=2), U32),
    st.builds(m.Beat, st.lists(helds, max_size=2)),
    st.builds(m.Task, names, attempts, st.binary(max_size=20), st.text(max_size=20), st.floats(allow_nan=False)),
    st.builds(m.Acked, U63, st.lists(U32, max_size=3), st.booleans()),
    st.builds(m.Chunk, U63, U63),
    st.builds(m.CursorAt, names, U63),
    st.builds(m.Error, st.text(max_size=10), st.text(max_size=10), st.floats(allow_nan=False)),
)


def whole(frames: list[bytes]) -> wire.Message | None:
    try:
        return wire.decode(frames)
    except (RemoteProtocolError, VersionError):
        return None


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_any_frames_are_a_message_or_a_typed_error(frames: list[bytes]) -> None:
    whole(frames)


any_value = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


@given(st.sampled_from(list(m.Op)) | U32, st.lists(any_value, max_size=11), any_value)
def test_any_values_in_a_header_and_a_body_are_a_message_or_a_typed_error(
    op: int, fields: list[Any], body: Any
) -> None:
    payload = msgspec.msgpack.encode(body)
    header = [m.PROTOCOL_VERSION, int(op), *fields]
    whole([msgspec.msgpack.encode(header), payload])
    # The checksum right, so that only the schema stands between the values and the broker.
    full = (header + [0, "", 0, 0, "", 0, 0, 0][len(fields) :])[:10] + [wire.checksum(payload, [])]
    whole([msgspec.msgpack.encode(full), payload])


@given(requests | answers, st.lists(st.binary(max_size=30), max_size=3), U63, U32)
def test_what_was_encoded_is_decoded(body: m.Body, blobs: list[bytes], request: int, epoch: int) -> None:
    assume(
        not (isinstance(body, m.Done) and body.reward is not None and math.isnan(body.reward))
    )  # no NaN equals itself
    message = wire.decode(wire.encode(body, blobs, request=request, epoch=epoch, producer="p"))
    assert message.body == body
    assert message.blobs == blobs
    assert (message.header.request, message.header.epoch, message.header.producer) == (request, epoch, "p")


@given(requests, st.lists(st.binary(min_size=1, max_size=30), max_size=2), st.data())
def test_a_flipped_bit_or_a_cut_is_noticed(body: m.Body, blobs: list[bytes], data: st.DataObject) -> None:
    frames = wire.encode(body, blobs, producer="p")
    index = data.draw(st.integers(1, len(frames) - 1))
    assume(frames[index])
    damaged = list(frames)
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(frames[index]) * 8 - 1))
        changed = bytearray(frames[index])
        changed[at // 8] ^= 1 << (at % 8)
        damaged[index] = bytes(changed)
    else:
        damaged[index] = frames[index][: data.draw(st.integers(0, len(frames[index]) - 1))]
    with pytest.raises(RemoteProtocolError):
        wire.decode(damaged)


def test_a_flipped_bit_in_a_header_changes_no_body() -> None:
    body = m.Done("r-1", 1, 1.0)
    frames = wire.encode(body, [b"spans"], producer="p", request=7)
    for at in range(len(frames[0]) * 8):
        changed = bytearray(frames[0])
        changed[at // 8] ^= 1 << (at % 8)
        message = whole([bytes(changed), *frames[1:]])
        if message is not None and message.header.op is m.Op.DONE:
            assert (message.body, message.blobs) == (body, [b"spans"])


@given(
    st.lists(
        st.tuples(requests | answers, st.lists(st.binary(max_size=20), max_size=3), st.integers(0, 3), U32), max_size=8
    ),
    st.sampled_from(["", *Role, "visitor"]),
)
def test_whatever_can_be_decoded_can_be_decided_written_and_answered(
    said: list[tuple[m.Body, list[bytes], int, int]], role: str
) -> None:
    desk = Desk()
    desk.submit("r-1", "r-2")
    desk.beat("w", 1)
    desk.hello("w")
    for body, blobs, seq, count in said:
        desk.ask("w", body, blobs, epoch=1, seq=seq, count=count)  # Desk encodes every write and every send
        desk.role = role
        desk.tick(3.0)
        desk.forget(seq)
    desk.drop_peer("w")
    desk.restart()


records = st.builds(
    Record, U63, st.sampled_from(list(Kind)), st.text(max_size=20).map(lambda s: s.replace("\0", "")), U32, U63, U32,
    names, U32, U32, U63, st.binary(max_size=100),
)  # fmt: skip


@given(records)
def test_a_record_that_was_encoded_is_decoded(record: Record) -> None:
    assert decode_record(encode_record(record)) == record
    assert decode_record(memoryview(encode_record(record))) == record


@given(records, st.data())
def test_a_damaged_record_is_noticed(record: Record, data: st.DataObject) -> None:
    value = encode_record(record)
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(value) * 8 - 1))
        damaged = bytearray(value)
        damaged[at // 8] ^= 1 << (at % 8)
        value = bytes(damaged)
    else:
        value = value[: data.draw(st.integers(0, len(value) - 1))]
    with pytest.raises(RemoteProtocolError):
        decode_record(value)


@given(st.binary(max_size=300) | st.binary(max_size=300).map(lambda tail: b"LBR1" + tail))
def test_any_bytes_are_a_record_or_a_typed_error(value: bytes) -> None:
    try:
        decode_record(value)
    except RemoteProtocolError:
        pass
