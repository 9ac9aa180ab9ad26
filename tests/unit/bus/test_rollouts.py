"""Log records → finished rollouts, on logs that the broker's own core wrote."""

from __future__ import annotations

from lightning_bus import messages as m
from lightning_bus.adapters.rollouts import Assembler, FinishedRollout
from lightning_bus.lifecycle import Status
from lightning_bus.records import Record
from lightning_bus.spans import Span, encode_spans
from tests.bus_fixtures import span
from tests.core_harness import LEASE_S, Desk


def finished(records: list[Record], assembler: Assembler | None = None) -> list[FinishedRollout]:
    assembler = assembler or Assembler()
    return [rollout for record in records if (rollout := assembler.feed(record)) is not None]


def append(desk: Desk, seq: int, rollout_id: str, attempt: int, spans: list[Span]) -> None:
    desk.append("g", 1, seq, (rollout_id, attempt, encode_spans(spans)))


def test_a_rollout_ends_once_with_the_spans_of_its_last_attempt() -> None:
    desk = Desk()
    desk.hello("g")
    desk.leased("r-1")
    lost, kept, last = span("lost"), span("kept"), span("last")
    append(desk, 1, "r-1", 1, [lost])
    desk.tick(LEASE_S)
    desk.beat("w", 1)
    append(desk, 2, "r-1", 2, [kept])
    desk.say("w", m.Done("r-1", 2, 0.5), [encode_spans([last])], count=1)
    (rollout,) = finished(desk.log.records)
    assert (rollout.status, rollout.attempt, rollout.reward) == (Status.SUCCEEDED, 2, 0.5)
    assert rollout.spans == [kept, last]
    assert (rollout.first_offset, rollout.end_offset) == (0, len(desk.log.records))


def test_a_failed_rollout_has_an_error_and_no_reward() -> None:
    desk = Desk()
    desk.leased("r-1")
    desk.say("w", m.Fail("r-1", 1, "boom", retryable=False))
    (rollout,) = finished(desk.log.records)
    assert (rollout.status, rollout.reward, rollout.error) == (Status.FAILED, None, "boom")


def test_group_and_labels_come_along() -> None:
    desk = Desk()
    desk.say("t", m.Submit([m.Submission("r-1", b"", group="g-1", labels={"phase": "rl"})]))
    desk.say("t", m.Cancel(["r-1"]))
    (rollout,) = finished(desk.log.records)
    assert (rollout.status, rollout.group, rollout.labels, rollout.attempt) == (
        Status.CANCELLED,
        "g-1",
        {"phase": "rl"},
        0,
    )


def test_a_successor_that_starts_at_the_low_offset_misses_nothing() -> None:
    desk = Desk()
    desk.hello("g")
    for name in ("r-1", "r-2", "r-3"):
        desk.leased(name)
        append(desk, int(name[-1]), name, 1, [span(name)])
    desk.say("w", m.Done("r-1", 1))
    first = Assembler()
    seen = finished(desk.log.records, first)
    assert [rollout.rollout_id for rollout in seen] == ["r-1"]
    desk.say("w", m.Done("r-3", 1))
    desk.say("w", m.Done("r-2", 1))
    rest = desk.log.records[first.low_offset :]
    for assembler in (first, Assembler(first.low_offset)):
        records = rest if assembler is not first else desk.log.records[first.next_offset :]
        assert [(r.rollout_id, [s.name for s in r.spans]) for r in finished(records, assembler)] == [
            ("r-3", ["r-3"]), ("r-2", ["r-2"]),
        ]  # fmt: skip
        assert assembler.low_offset == len(desk.log.records)  # nothing is left open, so nothing is kept


def test_what_began_before_the_first_record_is_passed_over() -> None:
    desk = Desk()
    desk.leased("r-1")
    desk.say("w", m.Done("r-1", 1))
    assert finished(desk.log.records[1:]) == []
