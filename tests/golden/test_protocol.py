"""The bytes of protocol version 1, and the page that describes them.

`protocol.json` was written once by `python tests/golden/test_protocol.py` and only ever grows: bytes that a client in
another language was built on do not change. Here they are read by the `msgpack` package and a checksum of five lines,
which share no code with ours.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest

from lightning_bus import messages as m
from lightning_bus import wire
from lightning_bus.lifecycle import Status
from lightning_bus.log.codec import decode_record, encode_event, encode_record
from lightning_bus.records import Kind, Record, RolloutEvent
from lightning_bus.resources import Resource
from lightning_bus.spans import PROMPT_IDS, Span, decode_spans, encode_spans, pack_ids
from lightning_bus.tokens import Claims, check, mint

GOLDEN = Path(__file__).with_name("protocol.json")
PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")

SPAN = Span(b"span-id1", b"trace-id-16bytes", None, "chat", 1, 2, {PROMPT_IDS: pack_ids([1, 2])}, "r-1", 1, 3, "")
SUBMISSION = m.Submission("r-1", b"\xa4task", "g-1", "policy", {"temperature": 0.5}, {"phase": "rl"}, 3)
RECORD = Record(7, Kind.SPANS, "gateway-1", 2, 3, 1, "r-1", 1, 1, 1_700_000_000_000_000_000, b"body")
EVENT = RolloutEvent("succeed", "succeeded", "g-1", "worker-1", 1.0, "", {"phase": "rl"}, b"")
CLAIMS = Claims("r-1", 1, "policy", {"temperature": 0.5})
SECRET = bytes(range(32))

MESSAGES: dict[str, tuple[m.Body, list[bytes], dict[str, Any]]] = {
    "hello": (m.Hello("worker", 0, b"12345678"), [], {"request": 1}),
    "welcome": (m.Welcome(1, 0, m.MESSAGE_BYTES_MAX, 10.0, 42), [], {"request": 1}),
    "submit": (m.Submit([SUBMISSION]), [], {"request": 2, "epoch": 1}),
    "accepted": (m.Accepted(1), [], {"request": 2}),
    "heartbeat": (m.Heartbeat(4, [m.Held("r-1", 1)]), [], {"request": 3, "epoch": 1}),
    "beat": (m.Beat([m.Held("r-1", 1)]), [], {"request": 3}),
    "task": (m.Task("r-1", 1, b"\xa4task", "token", 10.0, "g-1", {"phase": "rl"}), [], {}),
    "done": (m.Done("r-1", 1, 0.5), [encode_spans([SPAN])], {"request": 4, "epoch": 1, "count": 1}),
    "fail": (m.Fail("r-1", 1, "boom", False), [], {"request": 5, "epoch": 1}),
    "cancel": (m.Cancel(["r-1", "r-2"]), [], {"request": 6, "epoch": 1}),
    "append": (
        m.Append([m.Part("r-1", 1, 1), m.Part("", 0, 1)]), [encode_spans([SPAN]), encode_spans([SPAN])],
        {"request": 7, "epoch": 1, "seq": 1, "count": 2},
    ),
    "acked": (m.Acked(44, [1], False), [], {"request": 7}),
    "fetch": (m.Fetch(42, 1 << 20, 1000), [], {"request": 8, "epoch": 1}),
    "chunk": (m.Chunk(43, 44), [encode_record(RECORD)], {"request": 8}),
    "cursor": (m.Cursor("trainer", 42), [], {"request": 9, "epoch": 1}),
    "cursor_at": (m.CursorAt("trainer", 42), [], {"request": 9}),
    "put": (m.Put(Resource("prompt", 1, b"\xa2hi")), [], {"request": 10, "epoch": 1}),
    "get": (m.Get("prompt", None), [], {"request": 11, "epoch": 1}),
    "resource": (m.ResourceIs(Resource("prompt", 1, b"\xa2hi")), [], {"request": 11}),
    "status": (m.StatusQuery(), [], {"request": 12, "epoch": 1}),
    "status_is": (m.StatusIs({"queued": 1}, 1, 4, 0, 44, 2, 3), [], {"request": 12}),
    "query": (m.Query(["r-1"], 10), [], {"request": 13, "epoch": 1}),
    "rollouts": (m.Rollouts([m.Rollout(SUBMISSION, Status.LEASED, 1, "worker-1")]), [], {"request": 13}),
    "error": (m.Error("FencedError", "why, and the way out", 0.0), [], {"request": 14}),
}  # fmt: skip
ANSWERS = {
    "welcome",
    "accepted",
    "beat",
    "task",
    "acked",
    "chunk",
    "cursor_at",
    "resource",
    "status_is",
    "rollouts",
    "error",
}


def frames_of(name: str) -> list[bytes]:
    body, blobs, header = MESSAGES[name]
    return wire.encode(body, blobs, producer="" if name in ANSWERS else "worker-1", **header)


def golden() -> dict[str, Any]:
    return {
        "messages": {name: [frame.hex() for frame in frames_of(name)] for name in MESSAGES},
        "record": encode_record(RECORD).hex(),
        "event": encode_event(EVENT).hex(),
        "spans": encode_spans([SPAN]).hex(),
        "token": mint(SECRET, CLAIMS),
    }


def crc32c(data: bytes) -> int:
    """CRC-32C from its definition, a bit at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_what_we_write_is_what_was_written_when_version_1_was_made(recorded: dict[str, Any]) -> None:
    assert golden() == recorded


@pytest.mark.parametrize("name", MESSAGES)
def test_another_implementation_reads_every_message(recorded: dict[str, Any], name: str) -> None:
    head, body, *blobs = [bytes.fromhex(frame) for frame in recorded["messages"][name]]
    expected, expected_blobs, fields = MESSAGES[name]
    header = dict(zip(msgspec.structs.asdict(m.Header(1, m.Op.HELLO)), msgpack.unpackb(head), strict=True))
    assert header["version"] == 1
    assert m.BODIES[m.Op(header["op"])] is type(expected)
    assert {key: header[key] for key in fields} == fields
    assert header["crc32c"] == crc32c(b"".join([body, *blobs]))
    assert msgpack.unpackb(body) == msgspec.to_builtins(expected, builtin_types=(bytes,))
    assert blobs == expected_blobs


def test_what_another_implementation_writes_is_read(recorded: dict[str, Any]) -> None:
    body = msgpack.packb([[["r-1", 1, 1]]])
    blob = msgpack.packb([[b"span-id1", b"trace-id-16bytes", None, "chat", 1, 2]])
    head = msgpack.packb([1, 15, 7, "other", 1, 1, "", 1, 0, 0, crc32c(body + blob)])
    message = wire.decode([head, body, blob])
    assert message.body == m.Append([m.Part("r-1", 1, 1)])
    assert decode_spans(message.blobs[0])[0].name == "chat"


def test_old_bytes_are_still_read(recorded: dict[str, Any]) -> None:
    for name, (body, blobs, _) in MESSAGES.items():
        message = wire.decode([bytes.fromhex(frame) for frame in recorded["messages"][name]])
        assert (message.body, message.blobs) == (body, blobs)
    assert decode_record(bytes.fromhex(recorded["record"])) == RECORD
    assert decode_spans(bytes.fromhex(recorded["spans"])) == [SPAN]
    assert check(SECRET, recorded["token"]) == CLAIMS


def test_the_checksum_of_a_record_is_what_the_page_says(recorded: dict[str, Any]) -> None:
    value = bytes.fromhex(recorded["record"])
    assert int.from_bytes(value[12:16], "little") == crc32c(value[:12] + b"\0\0\0\0" + value[16:])


# -- docs/protocol.md


def table_rows(first_column: str) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("|")]
    return [row for row in rows if re.fullmatch(first_column, row[0])]


def names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def fields(kind: type) -> list[str]:
    return [field.name for field in msgspec.structs.fields(kind)]


def test_the_page_lists_every_operation_and_its_fields_in_order() -> None:
    listed = {int(row[0]): (row[1], names(row[3])) for row in table_rows(r"\d+")}
    assert listed == {op.value: (op.name, fields(kind)) for op, kind in m.BODIES.items()}


@pytest.mark.parametrize(
    "kind", [m.Header, m.Submission, m.Held, m.Part, m.Rollout, Resource, Span, RolloutEvent, Claims]
)
def test_the_page_lists_the_fields_of_every_struct_in_order(kind: type) -> None:
    (row,) = table_rows(kind.__name__)
    assert names(row[1]) == fields(kind)


def test_the_example_on_the_page_is_what_the_code_sends() -> None:
    blocks = re.findall(r"```hex\n(.*?)```", PAGE, re.DOTALL)
    shown = [bytes.fromhex(re.sub(r"#.*", "", block).replace("\n", " ")) for block in blocks]
    assert shown == frames_of("append")[:2] + [encode_spans([SPAN])] + frames_of("acked")


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden(), indent=1) + "\n", encoding="utf-8")
