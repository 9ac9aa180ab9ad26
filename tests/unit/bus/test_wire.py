"""Frames: what is refused, and that the refusal says why. What any bytes do is in tests/properties."""

from __future__ import annotations

import msgspec
import pytest

from lightning_bus import messages as m
from lightning_bus import wire
from lightning_bus.errors import LocalProtocolError, MessageTooLarge, RemoteProtocolError, VersionError


def header(version: object, **fields: object) -> bytes:
    return msgspec.msgpack.encode([version, m.Op.STATUS, *fields.values()])


def test_another_version_is_told_both_versions() -> None:
    with pytest.raises(VersionError, match="peer speaks protocol version 2, this side version 1.*Install the same"):
        wire.decode([header(2), b"\x90"])


def test_a_later_version_may_look_entirely_different_behind_its_number() -> None:
    frame = msgspec.msgpack.encode([7, {"op": "status"}, None, [1, 2]])
    with pytest.raises(VersionError):
        wire.decode([frame, b""])


@pytest.mark.parametrize("version", ["1", None, 1.5, [], True, -1])
def test_a_header_without_a_version_is_no_header(version: object) -> None:
    with pytest.raises((RemoteProtocolError, VersionError)):
        wire.decode([header(version), b"\x90"])


def test_too_large_is_said_before_it_is_sent() -> None:
    with pytest.raises(MessageTooLarge, match=rf"APPEND of \d+ bytes exceeds the limit of {m.MESSAGE_BYTES_MAX}"):
        wire.encode(m.Append([]), [b"x" * m.MESSAGE_BYTES_MAX])


def test_the_largest_blob_fits_into_a_message_and_comes_back_in_a_record() -> None:
    frames = wire.encode(m.Append([m.Part("r" * 200, 1, 1)]), [b"x" * m.BLOB_BYTES_MAX], producer="p" * 255)
    assert sum(map(len, frames)) <= m.MESSAGE_BYTES_MAX
    wire.encode(m.Chunk(1, 1), [b"x" * (m.BLOB_BYTES_MAX + 64 + 255 + 1 + 200)])


def test_too_many_blobs_are_refused_on_both_sides() -> None:
    with pytest.raises(MessageTooLarge, match="4097 blobs"):
        wire.encode(m.Append([]), [b""] * (wire.BLOBS_MAX + 1))
    frames = wire.encode(m.Append([]), [b""] * wire.BLOBS_MAX)
    assert len(wire.decode(frames).blobs) == wire.BLOBS_MAX
    with pytest.raises(RemoteProtocolError, match="not 4099 frames"):
        wire.decode([*frames, b""])


@pytest.mark.parametrize("frames", [[], [b""], [b"\x92\x01\x19"]])
def test_a_message_has_a_header_and_a_body(frames: list[bytes]) -> None:
    with pytest.raises(RemoteProtocolError):
        wire.decode(frames)


def test_a_header_has_a_limit() -> None:
    with pytest.raises(RemoteProtocolError, match="exceeds the limit of 4096"):
        wire.decode([b"\x90" * 4097, b"\x90"])


def test_an_unknown_operation_is_refused() -> None:
    with pytest.raises(RemoteProtocolError):
        wire.decode([msgspec.msgpack.encode([1, 77]), b"\x90"])


def test_a_body_of_another_operation_is_refused() -> None:
    frames = wire.encode(m.Accepted(3))
    frames[0] = wire.encode(m.Cancel(["r-1"]))[0]
    with pytest.raises(RemoteProtocolError):
        wire.decode(frames)


def test_a_number_that_the_log_has_no_room_for_is_refused() -> None:
    frames = wire.encode(m.Append([m.Part("r-1", 1 << 32, 1)]), [b""])
    with pytest.raises(RemoteProtocolError, match=r"\$\[0\]"):
        wire.decode(frames)


def test_a_body_that_is_not_a_message_is_our_bug() -> None:
    with pytest.raises(LocalProtocolError):
        wire.encode(m.Body())


def test_a_nest_bomb_is_refused() -> None:
    bomb = b"\x91" * 1_000_000
    frames = [msgspec.msgpack.encode([1, int(m.Op.SUBMIT)]), bomb]
    with pytest.raises(RemoteProtocolError):
        wire.decode(frames)


def test_a_field_that_this_version_does_not_know_is_ignored() -> None:
    """The evolution promise: fields are appended, so an old reader reads what a new writer sends."""
    body = msgspec.msgpack.encode([5, [], "added later"])
    head = msgspec.msgpack.encode(
        [1, int(m.Op.ACCEPTED), 0, "", 0, 0, "", 0, 0, 0, wire.checksum(body, []), "", "added later"]
    )
    assert wire.decode([head, body]).body == m.Accepted(5)


def test_a_field_that_an_older_peer_does_not_send_has_its_default() -> None:
    body = msgspec.msgpack.encode([["r-1"]])
    head = msgspec.msgpack.encode([1, int(m.Op.QUERY), 0, "", 0, 0, "", 0, 0, 0, wire.checksum(body, [])])
    assert wire.decode([head, body]).body == m.Query(["r-1"], 1000)


# -- bundles


def bundled(*messages: wire.Packed) -> list[wire.Message | wire.Unreadable]:
    """What a peer finds in these messages."""
    return [inner for frames in wire.join(messages, producer="p", epoch=3) for inner in wire.split(wire.decode(frames))]


def test_what_leaves_together_arrives_one_by_one_and_in_order() -> None:
    first = wire.pack(m.Done("r-1", 1, 0.5), [b"chunk"], request=7, count=2)
    second = wire.pack(m.Append([m.Part("", 0, 1), m.Part("r-1", 1, 1)]), [b"a", b"b"], request=8, seq=4, count=2)
    assert len(list(wire.join([first, second]))) == 1
    one, two = bundled(first, second)
    assert isinstance(one, wire.Message) and isinstance(two, wire.Message)
    assert (one.body, one.blobs) == (m.Done("r-1", 1, 0.5), [b"chunk"])
    assert (two.body, two.blobs) == (m.Append([m.Part("", 0, 1), m.Part("r-1", 1, 1)]), [b"a", b"b"])
    assert [(h.op, h.request, h.producer, h.epoch, h.seq, h.count) for h in (one.header, two.header)] == [
        (m.Op.DONE, 7, "p", 3, 0, 2),
        (m.Op.APPEND, 8, "p", 3, 4, 2),
    ]


def test_a_message_alone_is_no_bundle() -> None:
    (frames,) = wire.join([wire.pack(m.Accepted(1), request=5)], producer="p")
    assert frames == wire.encode(m.Accepted(1), request=5, producer="p")


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([wire.pack(m.Accepted())] * (m.BUNDLE_MESSAGES_MAX + 1), 2),
        ([wire.pack(m.Append([]), [b"x" * 600_000])] * 3, 3),
        ([wire.pack(m.Append([]), [b""] * 1500)] * 4, 2),
        ([wire.pack(m.Accepted()), wire.pack(m.Append([]), [b"x" * m.BLOB_BYTES_MAX]), wire.pack(m.Accepted())], 3),
    ],
)
def test_a_bundle_is_bounded_in_messages_bytes_and_blobs(messages: list[wire.Packed], expected: int) -> None:
    assert len(list(wire.join(messages))) == expected
    assert [type(inner) for inner in bundled(*messages)] == [wire.Message] * len(messages)


def test_a_message_of_a_bundle_that_is_none_concerns_nobody_else() -> None:
    bad = [
        m.Bundled(200, msgspec.Raw(b"\x90"), request=1),  # an operation of another version
        m.Bundled(m.Op.DONE, msgspec.Raw(b"\xc0"), request=2),
        m.Bundled(m.Op.BUNDLE, msgspec.Raw(msgspec.msgpack.encode(m.Bundle([]))), request=3),  # not nested
    ]
    good = m.Bundled(m.Op.STATUS, msgspec.Raw(b"\x90"), request=4, blobs=1)
    one, two, three, four = wire.split(wire.decode(wire.encode(m.Bundle([*bad, good]), [b"its"])))
    assert [
        (inner.request, type(inner.error)) for inner in (one, two, three) if isinstance(inner, wire.Unreadable)
    ] == [
        (1, RemoteProtocolError),
        (2, RemoteProtocolError),
        (3, RemoteProtocolError),
    ]
    assert isinstance(four, wire.Message)
    assert (four.body, four.blobs) == (m.StatusQuery(), [b"its"])


@pytest.mark.parametrize("blobs", [0, 2])
def test_a_bundle_whose_blobs_do_not_add_up_is_refused_whole(blobs: int) -> None:
    bundle = m.Bundle([m.Bundled(m.Op.STATUS, msgspec.Raw(b"\x90"), blobs=blobs)])
    with pytest.raises(RemoteProtocolError, match="other than its 1 blobs"):
        wire.split(wire.decode(wire.encode(bundle, [b""])))


def test_a_bundle_of_too_many_is_refused_before_it_is_read() -> None:
    bundle = m.Bundle([m.Bundled(m.Op.STATUS, msgspec.Raw(b"\x90"))] * (m.BUNDLE_MESSAGES_MAX + 1))
    with pytest.raises(RemoteProtocolError, match="length <= 1024"):
        wire.decode(wire.encode(bundle))
