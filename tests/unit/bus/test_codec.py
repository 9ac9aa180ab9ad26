"""The record on disk. What any bytes do is in tests/properties; the bytes of one record are in tests/golden."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bus.errors import RemoteProtocolError
from lightning_bus.log.codec import HEADER_BYTES, decode_event, decode_record, encode_event, encode_record, offset_key
from lightning_bus.records import Kind, Record, RolloutEvent

RECORD = Record(5, Kind.SPANS, "gateway-1", 2, 3, 4, "r-1", 6, 7, 8, b"body")


def test_every_field_comes_back() -> None:
    assert decode_record(encode_record(RECORD)) == RECORD


def test_keys_sort_as_offsets_do() -> None:
    offsets = [0, 1, 255, 256, 65_535, 65_536, (1 << 63) - 1]
    assert sorted(map(offset_key, offsets)) == list(map(offset_key, offsets))


@pytest.mark.parametrize(
    ("at", "what"), [(0, "not a log record"), (5, "format"), (20, "checksum"), (HEADER_BYTES, "checksum")]
)
def test_damage_is_noticed_and_named(at: int, what: str) -> None:
    value = bytearray(encode_record(RECORD))
    value[at] ^= 1
    with pytest.raises(RemoteProtocolError, match=what):
        decode_record(bytes(value))


def test_any_flipped_bit_is_noticed() -> None:
    value = encode_record(RECORD)
    for bit in range(8 * len(value)):
        damaged = bytearray(value)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RemoteProtocolError):
            decode_record(bytes(damaged))


@given(
    record=st.builds(
        Record,
        offset=st.integers(0, 2**63 - 1),
        kind=st.sampled_from(Kind),
        producer=st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=8),
        epoch=st.integers(0, 2**32 - 1),
        seq=st.integers(0, 2**63 - 1),
        part=st.integers(0, 2**32 - 1),
        rollout_id=st.text(max_size=8),
        attempt=st.integers(0, 2**32 - 1),
        span_count=st.integers(0, 2**32 - 1),
        wall_ns=st.integers(0, 2**63 - 1),
        body=st.binary(max_size=200),
    ),
    at=st.floats(0, 1, exclude_max=True),
    flip=st.integers(1, 255),
)
def test_any_changed_byte_of_any_record_is_noticed(record: Record, at: float, flip: int) -> None:
    value = bytearray(encode_record(record))
    value[int(at * len(value))] ^= flip
    with pytest.raises(RemoteProtocolError):
        decode_record(bytes(value))


def test_a_kind_from_another_version_is_refused_by_number() -> None:
    with pytest.raises(RemoteProtocolError, match="record 5 is of kind 9"):
        decode_record(encode_record(RECORD._replace(kind=9)))  # type: ignore[arg-type]


def test_a_record_outlives_the_buffer_it_was_read_from() -> None:
    buffer = bytearray(encode_record(RECORD))
    record = decode_record(memoryview(buffer))
    buffer[:] = bytes(len(buffer))
    assert record == RECORD
    assert isinstance(record.body, bytes)


def test_every_cut_is_noticed() -> None:
    value = encode_record(RECORD)
    for length in range(len(value)):
        with pytest.raises(RemoteProtocolError):
            decode_record(value[:length])
    with pytest.raises(RemoteProtocolError, match="should have"):
        decode_record(value + b"\0")


def test_an_event_comes_back_and_another_body_does_not_pass_for_one() -> None:
    event = RolloutEvent("submit", "queued", "g", "", None, "", {"phase": "rl"}, b"task")
    record = RECORD._replace(kind=Kind.ROLLOUT, body=encode_event(event))
    assert decode_event(record) == event
    with pytest.raises(RemoteProtocolError, match="record 5"):
        decode_event(RECORD)
