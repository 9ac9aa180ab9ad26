"""The bytes of protocol version 1, and the page that describes them.

`protocol.json` is written by `python tests/golden/test_protocol.py` and only ever grows: bytes that a client in
another language was built on do not change, and are read for ever. Where a struct has grown since (`GROWN`), a newer
vector shows what is written now. All are read by the `msgpack` package and a checksum of five lines, which share no
code with ours.
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
from lightning_bus.broker.access import ALLOWED, Role
from lightning_bus.lifecycle import Status
from lightning_bus.log.codec import decode_record, encode_event, encode_record
from lightning_bus.records import Kind, ProducerMark, Record, RolloutEvent
from lightning_bus.resources import Resource
from lightning_bus.spans import PROMPT_IDS, Span, decode_spans, encode_spans, pack_ids
from lightning_bus.tokens import Claims, check, mint

GOLDEN = Path(__file__).with_name("protocol.json")
PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")

SPAN = Span(b"span-id1", b"trace-id-16bytes", None, "chat", 1, 2, {PROMPT_IDS: pack_ids([1, 2])}, "r-1", 1, 3, "")
SUBMISSION = m.Submission("r-1", b"\xa4task", "g-1", "policy", {"temperature": 0.5}, {"phase": "rl"}, 3)
RECORD = Record(7, Kind.SPANS, "gateway-1", 2, 3, 1, "r-1", 1, 1, 1_700_000_000_000_000_000, b"body")
EVENT = RolloutEvent("succeed", "succeeded", "g-1", "worker-1", 1.0, "", {"phase": "rl"}, b"")
TERMS = m.Submission(
    "r-2", b"\xa4task", "g-1", "policy", {"temperature": 0.5}, {"phase": "rl"}, 3, -2, 600.0, 30.0, 1.5, "row 7"
)
ROLLOUT = m.Rollout(
    TERMS,
    Status.FAILED,
    3,
    "worker-1",
    None,
    "boom",
    7,
    1,
    1_700_000_000_000_000_000,
    42,
    "r-2.r1",
    False,
    1.5,
    "worker-2",
)
STANDING = m.Standing(
    Status.FAILED, 3, "worker-1", None, "boom", 7, 1, 1_700_000_000_000_000_000, 42, "r-2.r1", False, 1.5, "worker-2"
)
MARK = ProducerMark(2, 9, [1], b"12345678", [[], [0, 2], []], "r-1", 1)
END = m.End("r-1", Status.SUCCEEDED, 2, 0.5, "")
CLAIMS = Claims("r-1", 1, "policy", {"temperature": 0.5})
ENDS_WALL_S = 1_767_225_600.0
NAMED_CLAIMS = Claims("", 0, "policy", expires_wall_s=ENDS_WALL_S, name="alice")
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
    "cursor": (m.Commit("trainer", 42), [], {"request": 9, "epoch": 1}),
    "cursor_at": (m.CursorAt("trainer", 42), [], {"request": 9}),
    "put": (m.Put(Resource("prompt", 1, b"\xa2hi")), [], {"request": 10, "epoch": 1}),
    "get": (m.Get("prompt", None), [], {"request": 11, "epoch": 1}),
    "resource": (m.ResourceIs(Resource("prompt", 1, b"\xa2hi")), [], {"request": 11}),
    "status": (m.StatusQuery(), [], {"request": 12, "epoch": 1}),
    "status_is": (m.StatusIs({"queued": 1}, 1, 4, 0, 44, 2, 3), [], {"request": 12}),
    "query": (m.Query(["r-1"], 10), [], {"request": 13, "epoch": 1}),
    "rollouts": (m.Rollouts([m.Rollout(SUBMISSION, Status.LEASED, 1, "worker-1")]), [], {"request": 13}),
    "error": (m.Error("FencedError", "why, and the way out", 0.0), [], {"request": 14}),
    "hello_token": (m.Hello("agent", 0, b"12345678", "claims.mac"), [], {"request": 1}),
    "welcome_credit": (m.Welcome(1, 0, m.MESSAGE_BYTES_MAX, 10.0, 42, 67_108_864, 4), [], {"request": 1}),
    "submit_terms": (m.Submit([TERMS]), [], {"request": 2, "epoch": 1}),
    "accepted_ids": (m.Accepted(1, ["r-2"]), [], {"request": 2}),
    "heartbeat_bytes": (m.Heartbeat(4, [m.Held("r-1", 1)], 1 << 26), [], {"request": 3, "epoch": 1}),
    "task_timeout": (m.Task("r-1", 1, b"\xa4task", "token", 10.0, "g-1", {"phase": "rl"}, 600.0), [], {}),
    "nack": (m.Nack("r-1", 1, 2.5, "rate limit"), [], {"request": 15, "epoch": 1}),
    "release": (m.Release("r-1", 1), [], {"request": 16, "epoch": 1}),
    "resync": (m.Resync(1, 6), [], {"request": 17}),
    "status_is_dead": (
        m.StatusIs({"failed": 2}, 1, 4, 0, 44, 2, 3, 1, 5, True, 10, {"FencedError": 3}), [], {"request": 12}
    ),
    "query_dead": (m.Query([], 10, "failed", True, "r-1"), [], {"request": 13, "epoch": 1}),
    "rollouts_dead": (m.Rollouts([ROLLOUT]), [], {"request": 13}),
    "wait": (m.Wait(["r-1", "r-2"], 60_000), [], {"request": 18, "epoch": 1}),
    "ended": (m.Ended([END], 1), [], {"request": 18}),
    "watch": (m.Watch("prompt", 1, 60_000), [], {"request": 19, "epoch": 1}),
    "drain": (m.Drain(False), [], {"request": 20, "epoch": 1}),
    "replay": (m.Replay(["r-2"]), [], {"request": 21, "epoch": 1}),
    "purge": (m.Purge(["r-2"]), [], {"request": 22, "epoch": 1}),
    "bundle": (
        m.Bundle([
            m.Bundled(m.Op.DONE, msgspec.Raw(msgspec.msgpack.encode(m.Done("r-1", 1, 0.5))), 23, 0, 1, 1),
            m.Bundled(m.Op.STATUS, msgspec.Raw(msgspec.msgpack.encode(m.StatusQuery())), 24),
        ]),
        [encode_spans([SPAN])], {"epoch": 1},
    ),
}  # fmt: skip
# Their structs have got fields since: these vectors are read, and written no more.
GROWN = {"hello", "welcome", "submit", "accepted", "heartbeat", "task", "status_is", "query", "rollouts"}
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
    "welcome_credit",
    "accepted_ids",
    "task_timeout",
    "resync",
    "status_is_dead",
    "rollouts_dead",
    "ended",
}


def frames_of(name: str) -> list[bytes]:
    body, blobs, header = MESSAGES[name]
    return wire.encode(body, blobs, producer="" if name in ANSWERS else "worker-1", **header)


def golden() -> dict[str, Any]:
    """Return the vectors of what is written today."""
    return {
        "messages": {name: [frame.hex() for frame in frames_of(name)] for name in MESSAGES if name not in GROWN},
        "record": encode_record(RECORD).hex(),
        "event": encode_event(EVENT).hex(),
        "spans": encode_spans([SPAN]).hex(),
        "token_with_a_name": mint(SECRET, NAMED_CLAIMS),
        "standing": msgspec.msgpack.encode(STANDING).hex(),
        "mark": msgspec.msgpack.encode(MARK).hex(),
    }


def crc32c(data: bytes) -> int:
    """CRC-32C from its definition, a bit at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def plain(value: Any) -> Any:
    """Return what another implementation sees: arrays, maps and plain values."""
    if isinstance(value, msgspec.Raw):
        return msgpack.unpackb(bytes(value))
    if isinstance(value, msgspec.Struct):
        return [plain(getattr(value, name)) for name in value.__struct_fields__]
    if isinstance(value, list):
        return [plain(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return msgspec.to_builtins(value, builtin_types=(bytes,))


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_what_we_write_is_what_was_written_when_version_1_was_made(recorded: dict[str, Any]) -> None:
    written = {name: frames for name, frames in recorded["messages"].items() if name not in GROWN}
    older = {name: recorded[name] for name in ("token", "token_that_ends")}  # from before tokens ended, and had names
    assert {**golden(), **older} == {**recorded, "messages": written}
    assert list(recorded["messages"]) == list(MESSAGES)


def test_every_operation_has_a_vector() -> None:
    assert {type(body) for body, _, _ in MESSAGES.values()} == set(m.BODIES.values())


@pytest.mark.parametrize("name", [name for name in MESSAGES if name not in GROWN])
def test_another_implementation_reads_every_message(recorded: dict[str, Any], name: str) -> None:
    head, body, *blobs = [bytes.fromhex(frame) for frame in recorded["messages"][name]]
    expected, expected_blobs, fields = MESSAGES[name]
    header = dict(zip(msgspec.structs.asdict(m.Header(1, m.Op.HELLO)), msgpack.unpackb(head), strict=True))
    assert header["version"] == 1
    assert m.BODIES[m.Op(header["op"])] is type(expected)
    assert {key: header[key] for key in fields} == fields
    assert header["crc32c"] == crc32c(b"".join([body, *blobs]))
    assert msgpack.unpackb(body) == plain(expected)
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
    assert check(SECRET, recorded["token_that_ends"]) == msgspec.structs.replace(CLAIMS, expires_wall_s=ENDS_WALL_S)
    assert check(SECRET, recorded["token_with_a_name"]) == NAMED_CLAIMS
    assert msgspec.msgpack.decode(bytes.fromhex(recorded["standing"]), type=m.Standing) == STANDING
    assert msgspec.msgpack.decode(bytes.fromhex(recorded["mark"]), type=ProducerMark) == MARK


def test_tables_of_an_older_log_are_still_read() -> None:
    mark = msgspec.msgpack.decode(msgpack.packb([2, 9, [1], b"12345678"]), type=ProducerMark)
    assert mark == ProducerMark(2, 9, [1], b"12345678")
    rollout = msgpack.packb([["r-1", b"task"], "leased", 1, "worker-1", None, "", 7])
    assert msgspec.msgpack.decode(rollout, type=m.Rollout) == m.Rollout(
        m.Submission("r-1", b"task"), Status.LEASED, 1, "worker-1", order=7
    )


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


def test_the_page_tells_what_each_role_may_do() -> None:
    listed = {row[0].strip("`"): set(re.findall(r"[A-Z_]{3,}", row[1])) for row in table_rows(r"`[a-z]+`|any of them")}
    every = listed.pop("any of them")
    names_of = {kind: op.name for op, kind in m.BODIES.items()}
    assert set(listed) == set(Role) - {Role.ADMIN}
    for role, named in listed.items():
        assert named | every == {names_of[kind] for kind in ALLOWED[Role(role)]}, role


def test_the_page_lists_every_operation_and_its_fields_in_order() -> None:
    listed = {int(row[0]): (row[1], names(row[3])) for row in table_rows(r"\d+")}
    assert listed == {op.value: (op.name, fields(kind)) for op, kind in m.BODIES.items()}


@pytest.mark.parametrize(
    "kind",
    [m.Header, m.Submission, m.Held, m.Part, m.Rollout, m.End, m.Bundled, Resource, Span, RolloutEvent, Claims],
)
def test_the_page_lists_the_fields_of_every_struct_in_order(kind: type) -> None:
    (row,) = table_rows(kind.__name__)
    assert names(row[1]) == fields(kind)


def test_the_example_on_the_page_is_what_the_code_sends() -> None:
    blocks = re.findall(r"```hex\n(.*?)```", PAGE, re.DOTALL)
    shown = [bytes.fromhex(re.sub(r"#.*", "", block).replace("\n", " ")) for block in blocks]
    assert shown == frames_of("append")[:2] + [encode_spans([SPAN])] + frames_of("acked")


if __name__ == "__main__":
    old = json.loads(GOLDEN.read_text(encoding="utf-8"))
    new = golden()
    new["messages"] = {**new["messages"], **old["messages"]}  # what was ever written stays
    new["messages"] = {name: new["messages"][name] for name in MESSAGES}
    GOLDEN.write_text(json.dumps({**new, **{k: v for k, v in old.items() if k != "messages"}}, indent=1) + "\n")
