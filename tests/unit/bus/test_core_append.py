"""Several batches on the way: duplicates, gaps, verdicts, and the records that prove that no number was lost."""

from __future__ import annotations

import itertools

import pytest

from lightning_bus import messages as m
from lightning_bus.broker.producers import NO_SPANS
from lightning_bus.records import Kind
from lightning_bus.spans import decode_spans
from tests.core_harness import Desk

WINDOW = m.APPEND_BATCHES_MAX


@pytest.fixture
def desk() -> Desk:
    return Desk()


def spans(desk: Desk) -> list[tuple[int, bytes]]:
    return [(record.seq, record.body) for record in desk.log.records if record.kind is Kind.SPANS]


def test_welcome_states_the_credit(desk: Desk) -> None:
    welcome = desk.hello("g")
    assert (welcome.append_bytes_max, welcome.append_batches_max) == (m.APPEND_BYTES_MAX, WINDOW)


@pytest.mark.parametrize("restarted", [False, True], ids=["live", "restarted"])
def test_each_batch_of_the_window_gets_its_own_verdict_again(desk: Desk, restarted: bool) -> None:
    epoch = desk.hello("g").epoch
    desk.leased()
    verdicts: dict[int, list[int]] = {}
    for seq in range(1, 2 * WINDOW):
        parts = [("r-1", 1 if keep else 9, b"%d" % seq) for keep in (seq % 2, seq % 3)]
        answer = desk.append("g", epoch, seq, *parts)
        assert isinstance(answer, m.Acked)
        verdicts[seq] = answer.fenced
    if restarted:
        desk.restart()
    before = len(desk.log.records)
    for seq in range(WINDOW, 2 * WINDOW):
        again = desk.append("g", epoch, seq, ("r-1", 1, b"x"), ("r-1", 1, b"y"))
        assert isinstance(again, m.Acked)
        assert (again.duplicate, again.fenced) == (True, verdicts[seq])
    assert len(desk.log.records) == before


def test_a_gap_is_answered_with_where_to_go_on_and_nothing_is_kept(desk: Desk) -> None:
    epoch = desk.hello("g").epoch
    desk.append("g", epoch, 1, ("", 0, b"one"))
    for seq in (3, 4, 99):
        assert desk.append("g", epoch, seq, ("", 0, b"late")) == m.Resync(epoch, 1)
        assert not desk.last.writes
    desk.append("g", epoch, 2, ("", 0, b"two"))
    assert spans(desk) == [(1, b"one"), (2, b"two")]


def test_any_order_of_arrival_ends_with_every_batch_once_and_in_order() -> None:
    for order in itertools.permutations([1, 2, 3]):
        desk = Desk()
        epoch = desk.hello("g").epoch
        waiting = list(order)
        while waiting:  # what was answered RESYNC is sent again
            for seq in list(waiting):
                if isinstance(desk.append("g", epoch, seq, ("", 0, b"%d" % seq)), m.Acked):
                    waiting.remove(seq)
        assert spans(desk) == [(1, b"1"), (2, b"2"), (3, b"3")]


def test_a_batch_of_which_nothing_was_kept_leaves_a_record(desk: Desk) -> None:
    epoch = desk.hello("g").epoch
    answer = desk.append("g", epoch, 1, ("r-9", 1, b"late"), ("r-8", 1, b"late"))
    assert isinstance(answer, m.Acked)
    assert (answer.fenced, answer.next_offset) == ([0, 1], 1)
    (record,) = desk.log.records
    assert (record.kind, record.producer, record.epoch, record.seq, record.part) == (Kind.SPANS, "g", epoch, 1, 0)
    assert (record.rollout_id, record.attempt, record.span_count, record.body) == ("", 0, 0, NO_SPANS)
    assert decode_spans(record.body) == []


def test_a_batch_without_parts_leaves_a_record_too(desk: Desk) -> None:
    epoch = desk.hello("g").epoch
    assert isinstance(desk.append("g", epoch, 1), m.Acked)
    assert spans(desk) == [(1, NO_SPANS)]


def test_a_batch_of_an_epoch_that_was_never_begun_is_refused(desk: Desk) -> None:
    epoch = desk.hello("g").epoch
    body = m.Append([m.Part("", 0, 1)])
    assert desk.refused("g", body, [b"x"], epoch=epoch + 1, seq=1).code == "RemoteProtocolError"


def test_a_new_epoch_begins_with_no_verdicts(desk: Desk) -> None:
    first = desk.hello("g", nonce=b"1").epoch
    for seq in range(1, 4):
        desk.append("g", first, seq, ("", 0, b"x"))
    second = desk.hello("g", nonce=b"2").epoch
    assert desk.append("g", second, 2, ("", 0, b"x")) == m.Resync(second, 0)
    assert isinstance(desk.append("g", second, 1, ("", 0, b"x")), m.Acked)
    assert desk.state.producers["g"].fenced_before == []
