"""Submitting with terms, and how attempts end: keys, delays, priorities, timeouts, credit, NACK, RELEASE, drain."""

from __future__ import annotations

import msgspec
import pytest

from lightning_bus import messages as m
from lightning_bus.broker import moves
from lightning_bus.lifecycle import Status
from lightning_bus.log.codec import decode_event
from lightning_bus.records import Kind, Put, Table
from tests.core_harness import LEASE_S, Desk

TASK = b"\xa4task"


@pytest.fixture
def desk() -> Desk:
    return Desk()


def submit(desk: Desk, rollout_id: str = "r-1", task: bytes = TASK, **terms: object) -> m.Accepted:
    answer = desk.say("t", m.Submit([m.Submission(rollout_id, task, **terms)]))  # pyright: ignore[reportArgumentType]
    assert isinstance(answer, m.Accepted), answer
    return answer


def events(desk: Desk, rollout_id: str = "r-1") -> list[tuple[str, str]]:
    records = [r for r in desk.log.records if r.kind is Kind.ROLLOUT and r.rollout_id == rollout_id]
    return [(decode_event(record).what, decode_event(record).status) for record in records]


# -- what is written


def test_a_task_is_written_once_and_not_at_each_move(desk: Desk) -> None:
    submit(desk, task=b"x" * 10_000)
    desk.beat("w", 1)
    moved = [write for write in desk.last.writes if isinstance(write, Put)]
    assert [write.table for write in moved] == [Table.STANDINGS]
    assert len(moved[0].value) < 100
    desk.say("w", m.Done("r-1", 1, 1.0))
    assert sum(len(write.value) for write in desk.last.writes if isinstance(write, Put)) < 100


def test_a_log_without_standings_loads_as_it_always_did(desk: Desk) -> None:
    old = m.Rollout(m.Submission("r-1", TASK), Status.LEASED, attempt=2, worker="w", order=5)
    desk.log.tables[Table.ROLLOUTS][b"r-1"] = msgspec.msgpack.encode(old)
    desk.restart()
    assert desk.rollout() == old
    assert desk.beat("w", 1, ("r-1", 2)) == []
    submit(desk, "r-2")
    assert desk.rollout("r-2").order == 6


@pytest.mark.parametrize("restarted", [False, True], ids=["live", "restarted"])
def test_a_rollout_that_is_over_lets_go_of_its_task_and_still_knows_another(desk: Desk, restarted: bool) -> None:
    submit(desk)
    desk.beat("w", 1)
    desk.say("w", m.Done("r-1", 1))
    if restarted:
        desk.restart()
    assert desk.rollout().submission.task == b""
    assert submit(desk).fresh == 0
    for other in (b"other", b""):
        assert desk.refused("t", m.Submit([m.Submission("r-1", other)])).code == "Conflict"


def test_a_rollout_that_failed_keeps_its_task(desk: Desk) -> None:
    submit(desk)
    desk.beat("w", 1)
    desk.say("w", m.Fail("r-1", 1, "boom", retryable=False))
    assert desk.rollout().submission.task == TASK
    desk.restart()
    assert desk.rollout().submission.task == TASK


def test_another_field_under_a_known_id_is_a_conflict_that_names_it(desk: Desk) -> None:
    submit(desk, group="g", priority=1)
    error = desk.refused("t", m.Submit([m.Submission("r-1", TASK, "g", priority=2)]))
    assert error.code == "Conflict"
    assert "priority 1, now with 2" in error.message


# -- idempotency keys


@pytest.mark.parametrize("restarted", [False, True], ids=["live", "restarted"])
def test_a_known_key_is_the_rollout_that_was_submitted_with_it(desk: Desk, restarted: bool) -> None:
    assert submit(desk, "r-1", key="row 7") == m.Accepted(1, ["r-1"])
    if restarted:
        desk.restart()
    assert submit(desk, "r-2", key="row 7") == m.Accepted(0, ["r-1"])
    assert "r-2" not in desk.state.rollouts


def test_a_key_names_one_rollout_within_a_message_too(desk: Desk) -> None:
    both = [m.Submission(i, TASK, key="k") for i in ("r-1", "r-2")]
    assert desk.say("t", m.Submit([*both, m.Submission("r-3", TASK)])) == m.Accepted(2, ["r-1", "r-1", "r-3"])


def test_a_known_key_with_another_task_is_a_conflict(desk: Desk) -> None:
    submit(desk, "r-1", key="k")
    error = desk.refused("t", m.Submit([m.Submission("r-2", b"other", key="k")]))
    assert error.code == "Conflict"
    assert "and key" in error.message


def test_ids_are_answered_only_where_keys_are_used(desk: Desk) -> None:
    assert submit(desk).rollout_ids == []


def test_a_key_that_is_too_long_is_refused(desk: Desk) -> None:
    assert desk.refused("t", m.Submit([m.Submission("r-1", TASK, key="x" * 401)])).code == "CallError"


# -- bounds


def test_a_full_queue_is_busy_and_takes_nothing_of_the_message() -> None:
    desk = Desk(queued_max=2)
    submit(desk, "r-1")
    error = desk.refused("t", m.Submit([m.Submission("r-2", TASK), m.Submission("r-3", TASK)]))
    assert (error.code, error.retry_after_s) == ("BusyError", 1.0)
    assert "limit of 2" in error.message
    assert list(desk.state.rollouts) == ["r-1"]
    submit(desk, "r-2")
    submit(desk, "r-1")  # known ones need no room
    desk.beat("w", 1)
    submit(desk, "r-3")


def test_a_message_that_no_queue_could_hold_is_not_told_to_come_back() -> None:
    error = Desk(queued_max=1).refused("t", m.Submit([m.Submission(f"r-{i}", TASK) for i in range(2)]))
    assert error.code == "CallError"


def test_a_lease_shorter_than_a_look_is_refused(desk: Desk) -> None:
    assert desk.refused("t", m.Submit([m.Submission("r-1", TASK, lease_s=0.05)])).code == "CallError"


def test_rollouts_that_are_cancelled_while_nobody_works_leave_no_line_behind(desk: Desk) -> None:
    desk.state.queued_max = 1_000_000
    for batch in range(5):
        ids = [f"r-{batch}-{i}" for i in range(moves.STALE_MAX // 2)]
        desk.say("t", m.Submit([m.Submission(i, b"") for i in ids]))
        desk.say("t", m.Cancel(ids[1:]))
    assert len(desk.state.ready) <= moves.STALE_MAX + 2 * 5
    desk.beat("w", 5)
    assert [task.rollout_id for _, task in desk.tasks] == [f"r-{batch}-0" for batch in range(5)]


# -- when


def test_a_higher_priority_goes_first(desk: Desk) -> None:
    submit(desk, "low", priority=-1)
    submit(desk, "middle")
    submit(desk, "high", priority=1)
    desk.beat("w", 3)
    assert [task.rollout_id for _, task in desk.tasks] == ["high", "middle", "low"]


def test_a_delayed_rollout_waits_for_its_time(desk: Desk) -> None:
    submit(desk, delay_s=5.0)
    desk.beat("w", 1)
    assert desk.tick(4.9) == []
    status = desk.say("t", m.StatusQuery())
    assert isinstance(status, m.StatusIs)
    assert (status.delayed, status.rollouts["queued"]) == (1, 1)
    assert len(desk.tick(0.2)) == 1


@pytest.mark.parametrize(
    ("passed_s", "left_s"),
    [(3.0, 2.0), (9.0, 0.0), (-3600.0, 5.0)],
    ids=["part of it", "all of it", "the clock was set back"],
)
def test_a_delay_survives_a_restart(desk: Desk, passed_s: float, left_s: float) -> None:
    submit(desk, delay_s=5.0)
    desk.wall_ns += int(passed_s * 1e9)
    desk.restart()
    desk.beat("w", 1)
    if left_s:
        assert desk.tick(left_s - 0.01) == []
        desk.beat("w", 1)
    desk.tick(0.02)
    assert len(desk.tasks) == 1


def test_a_backoff_survives_a_restart(desk: Desk) -> None:
    submit(desk)
    desk.beat("w", 1)
    desk.say("w", m.Nack("r-1", 1, delay_s=100.0))
    desk.restart()
    desk.beat("w", 1)
    assert desk.tick(0.5) == []
    assert desk.state.delayed.at_s("r-1") == pytest.approx(1100.0)  # pyright: ignore[reportUnknownMemberType]


def test_failures_of_one_moment_come_back_at_different_ones() -> None:
    waits = {moves.retry_delay_s(f"r-{i}", 1) for i in range(100)}
    assert len(waits) == 100
    assert min(waits) >= 0.375
    assert max(waits) <= 0.625
    assert moves.retry_delay_s("r-1", 1) == moves.retry_delay_s("r-1", 1)


# -- how long


def test_a_rollout_may_have_its_own_lease(desk: Desk) -> None:
    submit(desk, lease_s=1.0)
    desk.beat("w", 1)
    assert desk.tasks[0][1].lease_s == 1.0
    assert desk.tick(0.9) == []
    assert desk.beat("w", 1, ("r-1", 1)) == []
    desk.tick(0.9)
    assert desk.rollout().status is Status.LEASED
    desk.tick(0.1)
    assert "silent for 1 s" in desk.rollout().error


def test_an_attempt_that_takes_too_long_ends_and_its_worker_learns_of_it(desk: Desk) -> None:
    submit(desk, timeout_s=30.0)
    desk.beat("w", 1)
    assert desk.tasks[0][1].timeout_s == 30.0
    for _ in range(5):
        desk.tick(5.99)
        assert desk.beat("w", 1, ("r-1", 1)) == []
    desk.tick(0.05)
    assert desk.beat("w", 0, ("r-1", 1)) == [("r-1", 1)]
    rollout = desk.rollout()
    assert rollout.status is Status.QUEUED
    assert "timed out: attempt 1 on w took longer than timeout_s=30" in rollout.error
    error = desk.refused("w", m.Done("r-1", 1))
    assert error.code == "FencedError"
    assert "timeout_s=30" in error.message


def test_timeouts_count_against_the_attempts(desk: Desk) -> None:
    submit(desk, timeout_s=1.0, max_attempts=2)
    for _ in range(2):
        desk.beat("w", 1)
        desk.tick(1.0)
        desk.tick(1.0)  # the backoff
    assert desk.rollout().status is Status.FAILED


# -- credit


def test_a_worker_holds_no_more_task_bytes_than_it_said(desk: Desk) -> None:
    for i in range(4):
        submit(desk, f"r-{i}", b"x" * 40)
    desk.say("w", m.Heartbeat(4, task_bytes_max=100))
    assert [task.rollout_id for _, task in desk.tasks] == ["r-0", "r-1"]
    desk.say("w", m.Done("r-0", 1))
    assert [task.rollout_id for _, task in desk.tasks] == ["r-0", "r-1", "r-2"]


def test_a_task_that_fits_nobody_goes_to_one_who_holds_nothing(desk: Desk) -> None:
    submit(desk, "small", b"x")
    submit(desk, "large", b"x" * 1000)
    submit(desk, "last", b"x")
    desk.say("w", m.Heartbeat(4, task_bytes_max=100))
    assert [task.rollout_id for _, task in desk.tasks] == ["small"]  # and nothing overtakes the large one
    desk.say("w", m.Done("small", 1))
    assert [task.rollout_id for _, task in desk.tasks] == ["small", "large"]
    desk.say("v", m.Heartbeat(1, task_bytes_max=100))
    assert [task.rollout_id for _, task in desk.tasks] == ["small", "large", "last"]


def test_what_is_too_large_for_one_worker_goes_to_the_next(desk: Desk) -> None:
    desk.say("w", m.Heartbeat(2, task_bytes_max=100))
    desk.say("v", m.Heartbeat(2))
    submit(desk, "r-1", b"x" * 60)
    submit(desk, "r-2", b"x" * 60)
    submit(desk, "r-3", b"x" * 60)
    assert [(worker, task.rollout_id) for worker, task in desk.tasks] == [("w", "r-1"), ("v", "r-2"), ("v", "r-3")]


def test_the_next_in_line_may_be_cancelled_while_nobody_has_room(desk: Desk) -> None:
    desk.say("w", m.Heartbeat(3, task_bytes_max=100))
    submit(desk, "r-1", b"x" * 60)
    submit(desk, "r-2", b"x" * 60)
    submit(desk, "r-3", b"x" * 10)
    desk.say("t", m.Cancel(["r-2"]))
    assert [task.rollout_id for _, task in desk.tick(0.1)] == ["r-3"]


# -- handing back


def test_a_nack_comes_back_after_its_delay_and_counts(desk: Desk) -> None:
    submit(desk, max_attempts=2)
    desk.beat("w", 1)
    assert desk.say("w", m.Nack("r-1", 1, 3.0, "rate limit")) == m.Accepted(1)
    assert desk.tick(2.9) == []
    assert desk.rollout().error == "rate limit"
    ((_, task),) = desk.tick(0.2)
    assert task.attempt == 2
    desk.say("w", m.Nack("r-1", 2, 3.0, "rate limit"))
    assert desk.rollout().status is Status.FAILED
    assert events(desk) == [
        ("submit", "queued"), ("lease", "leased"), ("nack", "queued"), ("lease", "leased"), ("fail", "failed"),
    ]  # fmt: skip


def test_a_release_is_leased_again_at_once_and_does_not_count(desk: Desk) -> None:
    submit(desk, max_attempts=1)
    submit(desk, "r-2")
    desk.beat("w", 1)
    for attempt in range(1, 6):
        assert desk.say("w", m.Release("r-1", attempt)) == m.Accepted(1)
        assert desk.tasks[-1][1].rollout_id == "r-1"  # its place in the line is what it was
    assert desk.rollout().excused == 5
    assert events(desk)[2] == ("release", "queued")
    desk.say("w", m.Fail("r-1", 6, "boom"))
    assert desk.rollout().status is Status.FAILED


HAND_BACKS = [m.Fail("r-1", 1, "boom"), m.Nack("r-1", 1), m.Release("r-1", 1)]


@pytest.mark.parametrize("body", HAND_BACKS, ids=["fail", "nack", "release"])
@pytest.mark.parametrize("restarted", [False, True], ids=["live", "restarted"])
def test_what_is_sent_again_after_a_new_lease_is_accepted_once(desk: Desk, body: m.Body, restarted: bool) -> None:
    submit(desk, max_attempts=5)
    desk.beat("w", 1)
    assert desk.say("w", body) == m.Accepted(1)
    assert desk.say("w", body) == m.Accepted(0)
    desk.beat("w", 0)
    desk.beat("v", 1)
    desk.tick(1.0)
    assert desk.rollout().attempt == 2
    if restarted:
        desk.restart()
    assert desk.say("w", body) == m.Accepted(0)
    assert not desk.last.writes
    assert desk.refused("v", body).code == "FencedError"
    desk.say("v", m.Done("r-1", 2))
    assert desk.say("w", body) == m.Accepted(0)


@pytest.mark.parametrize("body", HAND_BACKS, ids=["fail", "nack", "release"])
def test_what_is_handed_back_after_its_lease_is_fenced(desk: Desk, body: m.Body) -> None:
    submit(desk)
    desk.beat("w", 1)
    desk.tick(LEASE_S)
    assert desk.refused("w", body).code == "FencedError"
    desk.beat("v", 1)
    assert desk.refused("w", body).code == "FencedError"


def test_a_hand_back_carries_no_spans(desk: Desk) -> None:
    submit(desk)
    desk.beat("w", 1)
    assert desk.refused("w", m.Release("r-1", 1), [b"spans"], count=1).code == "RemoteProtocolError"
    assert desk.refused("w", m.Nack("r-1", 1), [b"spans"], count=1).code == "RemoteProtocolError"


# -- drain


def test_a_draining_broker_leases_nothing_more_and_what_is_held_goes_on(desk: Desk) -> None:
    submit(desk, "r-1")
    submit(desk, "r-2")
    desk.beat("w", 1)
    assert desk.say("t", m.Drain()) == m.Accepted(1)
    assert desk.say("t", m.Drain()) == m.Accepted(0)
    assert desk.say("w", m.Done("r-1", 1)) == m.Accepted(1)
    assert desk.tick(0.1) == []
    status = desk.say("t", m.StatusQuery())
    assert isinstance(status, m.StatusIs)
    assert status.draining
    assert desk.say("t", m.Drain(resume=True)) == m.Accepted(1)
    assert [task.rollout_id for _, task in desk.tasks] == ["r-1", "r-2"]
