"""The record on disk. What any bytes do is in tests/properties; the bytes of one record are in tests/golden."""

from __future__ import annotations

import pytest

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
